"""
Whether a directory still holds exactly what its manifest says.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import PurePosixPath
from typing import Literal

import attrs

from kserve_pvc._format.records import FileEntry, FoundFile, Manifest
from kserve_pvc._volume.buffers import make_buffer
from kserve_pvc._volume.reading import Volume
from kserve_pvc.errors import StoreError, StoreFormatError, UnsafePathError

Level = Literal["size", "full"]
Kind = Literal["missing", "extra", "type", "size", "digest", "record", "unreadable"]
OpenFile = Callable[[PurePosixPath], AbstractContextManager[int]]

_BUFFER_BYTES = 1024 * 1024
_UNHASHED = "no sha256 was recorded, because the model was fetched without hashing"


@attrs.frozen(kw_only=True)
class Problem:
    """
    One difference between a model and its record.
    """

    path: str
    kind: Kind
    detail: str


@attrs.frozen(kw_only=True)
class Verification:
    """
    The result of verifying one model: `files` and `bytes` are what was checked.
    """

    uri: str
    level: Level
    files: int
    bytes: int
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    def _repr_html_(self) -> str:
        from kserve_pvc._show.html import show_verification

        return show_verification(
            self.uri, self.level, self.files, self.bytes, [(p.kind, p.path, p.detail) for p in self.problems]
        )


def verify_files(volume: Volume, place: PurePosixPath, manifest: Manifest, *, uri: str, level: Level) -> Verification:
    """
    Compare a directory of the volume with its manifest.
    """
    try:
        problems = tuple(
            compare(manifest.files, volume.tree(place), lambda path: volume.open_file(place / path), level)
        )
    except UnsafePathError as planted:
        problems = (Problem(path=planted.name, kind="type", detail=planted.rule),)
    return Verification(uri=uri, level=level, files=len(manifest.files), bytes=manifest.size_bytes, problems=problems)


def report_damage(damage: StoreFormatError, *, uri: str, level: Level) -> Verification:
    """
    Report a model whose record or manifest cannot be trusted, so that nothing is known about its files.
    """
    problem = Problem(path=damage.path, kind="record", detail=damage.reason)
    return Verification(uri=uri, level=level, files=0, bytes=0, problems=(problem,))


def compare(
    expected: Iterable[FileEntry], found: Iterable[FoundFile], open_file: OpenFile, level: Level
) -> Iterator[Problem]:
    """
    Find every difference: missing, unexpected and irregular files, sizes and, at level `full`, digests.

    Args:
        open_file: Opens one of the expected files for reading, following no link.
    """
    lying = {file.path: file for file in found}
    for entry in expected:
        file = lying.pop(entry.path, None)
        if file is None:
            yield Problem(path=str(entry.path), kind="missing", detail="missing")
        elif not file.is_regular:
            yield Problem(path=str(entry.path), kind="type", detail="not a regular file")
        elif file.size_bytes != entry.size_bytes:
            yield Problem(
                path=str(entry.path),
                kind="size",
                detail=f"{file.size_bytes} bytes instead of {entry.size_bytes}",
            )
        elif level == "full":
            yield from _compare_digest(entry, open_file)
    for path in lying:
        yield Problem(path=str(path), kind="extra", detail="not in the manifest")


def _compare_digest(entry: FileEntry, open_file: OpenFile) -> Iterator[Problem]:
    if entry.sha256 is None:
        # It cannot be checked, so it is not reported as good.
        yield Problem(path=str(entry.path), kind="digest", detail=_UNHASHED)
        return
    try:
        with open_file(entry.path) as fd:
            actual = sha256_of(fd, entry.size_bytes)
    except (OSError, StoreError) as error:
        yield Problem(path=str(entry.path), kind="unreadable", detail=str(error))
        return
    if actual is None:
        detail = f"more or less than {entry.size_bytes} bytes, after it had been written to while it was read"
        yield Problem(path=str(entry.path), kind="size", detail=detail)
    elif actual != entry.sha256:
        yield Problem(path=str(entry.path), kind="digest", detail=f"sha256 {actual} instead of {entry.sha256}")


def sha256_of(fd: int, size_bytes: int) -> str | None:
    """
    Digest an open file of so many bytes from its start, through one small buffer.

    Returns:
        None if it is shorter or longer by now. Of a file that is being appended to, one byte more is read.
    """
    digest, buffer, offset = hashlib.sha256(), make_buffer(_BUFFER_BYTES), 0
    while offset < size_bytes:
        count = os.preadv(fd, [buffer[: min(_BUFFER_BYTES, size_bytes - offset)]], offset)
        if not count:
            return None
        digest.update(buffer[:count])
        offset += count
    return None if os.preadv(fd, [buffer[:1]], offset) else digest.hexdigest()
