"""
Reading through a backend under test, and observing its calls.
"""

from __future__ import annotations

import hashlib
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from kserve_pvc._source.contract import (
    ABILITIES,
    Backend,
    RangeReader,
    RemoteFile,
    Resolved,
    SupportsChecksums,
    SupportsClose,
)
from kserve_pvc._source.ref import ModelRef
from kserve_pvc.errors import (
    SourceChangedError,
)
from kserve_pvc.testing._remote import (
    REPLACEMENT,
    Remote,
)


class WatchedBackend:
    """
    A backend that records ranges, and calls a function before each.
    """

    def __init__(self, inner: Backend, before_range: Callable[[int], object] = lambda number: None) -> None:
        self._inner = inner
        self._before_range = before_range
        self._guard = threading.Lock()
        self.ranges: list[tuple[int, int]] = []
        for name in ABILITIES:
            if hasattr(inner, name):
                setattr(self, name, getattr(inner, name))

    def resolve(self, ref: ModelRef) -> Resolved:
        return self._inner.resolve(ref)

    def open_range(self, file: RemoteFile, start: int, stop: int) -> AbstractContextManager[RangeReader]:
        with self._guard:
            self.ranges.append((start, stop))
            number = len(self.ranges)
        self._before_range(number)
        return self._inner.open_range(file, start, stop)


def close_backend(backend: Backend) -> None:
    if isinstance(backend, SupportsClose):
        backend.close()


def change_object(remote: Remote, path: str, change: str) -> None:
    if change == "deleted":
        remote.delete(path)
    else:
        remote.put(
            path,
            {"replaced": REPLACEMENT, "made-shorter": REPLACEMENT[:-300_000], "made-longer": REPLACEMENT * 2}[change],
        )


def read_pieces(reader: RangeReader, buffer_bytes: int, timeout: float = 60.0) -> Iterator[bytes]:
    """
    Yield what a reader reads, until its end.
    """
    buffer, deadline = memoryview(bytearray(buffer_bytes)), time.monotonic() + timeout
    while (count := reader.readinto(buffer)) != 0:
        if count is not None:
            assert 0 < count <= len(buffer)
            yield bytes(buffer[:count])
        assert time.monotonic() < deadline, "the reader stalled"


def read_range(backend: Backend, file: RemoteFile, start: int, stop: int, buffer_bytes: int = 65_536) -> bytes:
    with backend.open_range(file, start, stop) as reader:
        return b"".join(read_pieces(reader, buffer_bytes))


def read_or_changed(backend: Backend, file: RemoteFile, start: int, stop: int) -> bytes | None:
    try:
        return read_range(backend, file, start, stop)
    except SourceChangedError:
        return None


def is_digest_of(backend: Backend, digest: str | None, data: bytes) -> bool:
    """
    Whether a digest, as `name:hex`, is that of some bytes. A missing digest passes.
    """
    if digest is None:
        return True
    name, _, value = digest.partition(":")
    if name in ("md5", "sha256"):
        return hashlib.new(name, data, usedforsecurity=False).hexdigest() == value
    if name == "crc32":
        return f"{zlib.crc32(data):08x}" == value
    checksum = backend.checksum(name) if isinstance(backend, SupportsChecksums) else None
    if checksum is None:
        return False
    checksum.update(memoryview(data))
    return bool(checksum.hexdigest() == value)


def read_tree(place: Path) -> dict[str, bytes]:
    return {path.relative_to(place).as_posix(): path.read_bytes() for path in place.rglob("*") if path.is_file()}
