"""
Whether a directory still holds exactly what its manifest says.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
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
# More threads than processors would take turns, and a disk that turns would seek between the files.
_MOST_READERS = 8
_BATCH = 512
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


def _ignore(count: int) -> None:
    pass


def verify_files(
    volume: Volume,
    place: PurePosixPath,
    manifest: Manifest,
    *,
    uri: str,
    level: Level,
    read: Callable[[int], None] = _ignore,
) -> Verification:
    """
    Compare a directory of the volume with its manifest.

    Args:
        read: Is notified of how many bytes were read, by several threads.
    """
    try:
        problems = tuple(
            compare(manifest.files, volume.tree(place), lambda path: volume.open_file(place / path), level, read)
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
    expected: Iterable[FileEntry],
    found: Iterable[FoundFile],
    open_file: OpenFile,
    level: Level,
    read: Callable[[int], None] = _ignore,
) -> Iterator[Problem]:
    """
    Find every difference: missing, unexpected and irregular files, sizes and, at level `full`, digests.

    Args:
        open_file: Opens one of the expected files for reading, following no link. Several threads do so at a time.
        read: Is notified of how many bytes were read, by several threads.
    """
    lying = {file.path: file for file in found}
    sized = [(entry, _compare_size(entry, lying.pop(entry.path, None))) for entry in expected]
    digests = _compare_digests([entry for entry, problem in sized if problem is None], open_file, read)
    try:
        for _, found_so_far in sized:
            problem = next(digests) if found_so_far is None and level == "full" else found_so_far
            if problem is not None:
                yield problem
    finally:
        digests.close()
    for path in lying:
        yield Problem(path=str(path), kind="extra", detail="not in the manifest")


def _compare_size(entry: FileEntry, file: FoundFile | None) -> Problem | None:
    if file is None:
        return Problem(path=str(entry.path), kind="missing", detail="missing")
    if not file.is_regular:
        return Problem(path=str(entry.path), kind="type", detail="not a regular file")
    if file.size_bytes != entry.size_bytes:
        detail = f"{file.size_bytes} bytes instead of {entry.size_bytes}"
        return Problem(path=str(entry.path), kind="size", detail=detail)
    return None


class _StoppedError(Exception):
    """The result is no longer needed."""


def _compare_digests(
    entries: Sequence[FileEntry], open_file: OpenFile, read: Callable[[int], None]
) -> Generator[Problem | None, None, None]:
    """Compare the digest of each file, several at a time, and yield the results in order."""
    stopped = threading.Event()

    def note(count: int) -> None:
        if stopped.is_set():
            raise _StoppedError
        read(count)

    act = partial(_compare_digest, open_file=open_file, read=note)
    workers = min(len(entries), os.cpu_count() or 1, _MOST_READERS)
    if workers < 2:
        yield from map(act, entries)
        return
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(workers, thread_name_prefix="kserve-pvc-verify") as pool:
        try:
            for start in range(0, len(entries), _BATCH):
                batch = entries[start : start + _BATCH]
                try:
                    results = pool.map(act, batch)
                except RuntimeError:  # No thread can be started, as in a container that is at its limit.
                    results = map(act, batch)
                yield from results
        finally:
            stopped.set()  # An interrupt does not wait for the rest of a large file.
            pool.shutdown(wait=False, cancel_futures=True)


def _compare_digest(entry: FileEntry, open_file: OpenFile, read: Callable[[int], None]) -> Problem | None:
    if entry.sha256 is None:
        # It cannot be checked, so it is not reported as good.
        return Problem(path=str(entry.path), kind="digest", detail=_UNHASHED)
    try:
        with open_file(entry.path) as fd:
            actual = sha256_of(fd, entry.size_bytes, read)
    except (OSError, StoreError) as error:
        return Problem(path=str(entry.path), kind="unreadable", detail=str(error))
    if actual is None:
        detail = f"more or less than {entry.size_bytes} bytes, after it had been written to while it was read"
        return Problem(path=str(entry.path), kind="size", detail=detail)
    if actual != entry.sha256:
        return Problem(path=str(entry.path), kind="digest", detail=f"sha256 {actual} instead of {entry.sha256}")
    return None


def sha256_of(fd: int, size_bytes: int, read: Callable[[int], None] = _ignore) -> str | None:
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
        read(count)
    return None if os.preadv(fd, [buffer[:1]], offset) else digest.hexdigest()
