"""
Which names a remote may give to files.

A listing is untrusted input. A name is either stored exactly as it is, or the whole model is refused: silently
renaming, merging or dropping a file would change the model.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from operator import itemgetter
from pathlib import PurePosixPath

from kserve_pvc.errors import UnsafePathError

# NAME_MAX of every Linux file system, and room for our own prefix below PATH_MAX (4,096).
MAX_PART_BYTES = 255
MAX_NAME_BYTES = 1024
# Directories and the file itself. Real models have fewer than ten; each level costs a call for each file below it.
MAX_LEVELS = 32
MAX_DIRECTORIES = 100_000

# What Unicode says is not shown (Default_Ignorable_Code_Point), wherever that is not of an invisible category anyhow,
# and the blank pattern of Braille.
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2065\u2800\u3164\ufe00-\ufe0f\uffa0\ufff0-\ufff8"
    "\U000e0000-\U000e0fff]"
)
# Stands for bytes that were not UTF-8, and are lost.
_REPLACEMENT = "\ufffd"
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
    if len(name) > MAX_PART_BYTES or name.count("/") >= MAX_LEVELS or _PLAIN.fullmatch(name) is None:
        rule = _broken_rule(name)
        if rule is not None:
            raise UnsafePathError(name, rule)
    return PurePosixPath(name)


def _broken_rule(name: str) -> str | None:
    if any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in name) or _INVISIBLE.search(name):
        return "a name may hold no NUL, control, invisible or unpaired surrogate character"
    if _REPLACEMENT in name:
        return "a name may hold no U+FFFD, which stands for bytes that are not UTF-8 and are lost"
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
    if len(parts) > MAX_LEVELS:
        return f"a name may have {MAX_LEVELS} levels"
    return None


def check_collisions(paths: Iterable[PurePosixPath]) -> None:
    """
    Refuse two names that some volume would store as one, or that are a file and a directory at once.

    Names are compared as a case-insensitive, Unicode-normalising volume would (NFKC and case folding), because
    the model may be served from another volume than the one it is written to.

    Raises:
        UnsafePathError: Names both offenders, or there are more than `MAX_DIRECTORIES` directories.
    """
    # In this order names that collide are neighbours, as are all below one directory: one pass, and no list of these.
    ordered = sorted(((fold(name).replace("/", "\0"), name) for name in map(str, paths)), key=itemgetter(0))
    key = before = parent = ""
    directories = 0
    for following, name in ordered:
        above = name.rpartition("/")[0]
        if above != parent:
            directories += _count_new(above, parent, name)
            parent = above
        if before and following == key:
            raise UnsafePathError(name, f"it collides with `{before}` on a volume that ignores case or Unicode form")
        if before and following.startswith(f"{key}\0"):
            raise UnsafePathError(before, "it is both a file and a directory in the source")
        if directories > MAX_DIRECTORIES:
            raise UnsafePathError(name, f"a model may have {MAX_DIRECTORIES} directories")
        key, before = following, name


def _count_new(above: str, earlier: str, name: str) -> int:
    """How many directories of a path are not on the path before it, which must not have a twin of one of them."""
    parts = above.split("/") if above else []
    for level, (part, other) in enumerate(zip(parts, earlier.split("/"), strict=False)):
        if part == other:
            continue
        if fold(part) == fold(other):
            twin = "/".join(earlier.split("/")[: level + 1])
            rule = f"its directory collides with `{twin}` on a volume that ignores case or Unicode form"
            raise UnsafePathError(name, rule)
        return len(parts) - level
    return max(0, len(parts) - (len(earlier.split("/")) if earlier else 0))


def fold(part: str) -> str:
    if part.isascii():
        return part.lower()
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", part).casefold())
