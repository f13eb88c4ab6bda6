"""
Which names a remote may give to files.

A listing is untrusted input. A name is either stored exactly as it is, or the whole model is refused: silently
renaming, merging or dropping a file would change the model.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from pathlib import PurePosixPath

from kserve_pvc.errors import UnsafePathError

# NAME_MAX of every Linux file system, and room for our own prefix below PATH_MAX (4,096).
MAX_PART_BYTES = 255
MAX_NAME_BYTES = 1024

# With a separator behind it: `a:b.bin` is an ordinary name.
_DRIVE = re.compile(r"[A-Za-z]:(?:/|\Z)")
# Nearly every name is of this kind, which breaks no rule if it is short: looked at once, as models have many files.
_PLAIN = re.compile(r"[\w.+=@-]*[\w+=@-](?:/[\w.+=@-]*[\w+=@-])*", re.ASCII)


def check_name(name: str) -> PurePosixPath:
    """
    Turn a remote name, relative to its model, into a path that stays inside the model's directory.

    Raises:
        UnsafePathError: The name is absolute, escapes, is not normal, or cannot be a POSIX file name.
    """
    if len(name) > MAX_PART_BYTES or _PLAIN.fullmatch(name) is None:
        rule = _broken_rule(name)
        if rule is not None:
            raise UnsafePathError(name, rule)
    return PurePosixPath(name)


def _broken_rule(name: str) -> str | None:
    if any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in name):
        return "a name may hold no NUL, control, invisible or unpaired surrogate character"
    if name.startswith("/") or _DRIVE.match(name):
        return "a name must be relative"
    if "\\" in name:
        return "a name may hold no backslash, which some volumes read as a directory separator"
    parts = name.split("/")
    if ".." in parts:
        return "a name may not climb with `..`"
    if "" in parts or "." in parts:
        return "a name may have no empty or `.` part"
    if any(part.endswith((".", " ")) for part in parts):
        return "a name may not end in a dot or blank, which some volumes drop"
    if len(name.encode()) > MAX_NAME_BYTES or any(len(part.encode()) > MAX_PART_BYTES for part in parts):
        return f"a name may have {MAX_PART_BYTES} bytes a part and {MAX_NAME_BYTES} in all"
    return None


def check_collisions(paths: Iterable[PurePosixPath]) -> None:
    """
    Refuse two names that some volume would store as one, or that are a file and a directory at once.

    Names are compared as a case-insensitive, Unicode-normalising volume would (NFKC and case folding), because
    the model may be served from another volume than the one it is written to.

    Raises:
        UnsafePathError: Names both offenders.
    """
    seen: dict[str, str] = {}
    directories: dict[str, str] = {}
    for path in paths:
        name = str(path)
        folded = fold(name)
        if folded in seen:
            raise UnsafePathError(
                name, f"it collides with `{seen[folded]}` on a volume that ignores case or Unicode form"
            )
        seen[folded] = name
        parent, _, _ = name.rpartition("/")
        while parent and directories.get(folded := fold(parent)) != parent:
            if folded in directories:
                twin = directories[folded]
                raise UnsafePathError(
                    name, f"its directory collides with `{twin}` on a volume that ignores case or Unicode form"
                )
            directories[folded] = parent
            parent, _, _ = parent.rpartition("/")
    for folded, name in seen.items():
        if folded in directories:
            raise UnsafePathError(name, "it is both a file and a directory in the source")


def fold(part: str) -> str:
    if part.isascii():
        return part.lower()
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", part).casefold())
