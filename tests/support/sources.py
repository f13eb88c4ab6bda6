"""
Back ends for the tests: one that offers whatever it is told, and one that interferes with another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from kserve_pvc import Backend, FileEntry, ModelRef, RangeReader, RemoteFile, Resolved, order_listing


class Reader:
    """
    An answer that is in memory already.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data

    def readinto(self, buffer: memoryview) -> int:
        piece, self._data = self._data[: len(buffer)], self._data[len(buffer) :]
        buffer[: len(piece)] = piece
        return len(piece)


class FakeBackend:
    """
    Offers a listing as it is given, even with names that no server would accept.

    Args:
        files: What is announced. `sent` is what is sent instead of a file, `sha256` what is announced as its digest.
    """

    def __init__(
        self,
        files: Mapping[str, bytes],
        *,
        sent: Mapping[str, bytes] | None = None,
        sha256: Mapping[str, str] | None = None,
    ) -> None:
        self.files = dict(files)
        self.sent = {**self.files, **(sent or {})}
        self.sha256 = dict(sha256 or {})
        self.calls: list[str] = []

    def resolve(self, ref: ModelRef) -> Resolved:
        self.calls.append("resolve")
        return order_listing(ref, (self._remote(name, data) for name, data in self.files.items()))

    def _remote(self, name: str, data: bytes) -> RemoteFile:
        token = hashlib.sha256(data).hexdigest()
        entry = FileEntry(path=name, size_bytes=len(data), sha256=self.sha256.get(name), token=token)
        return RemoteFile(entry=entry, address=name, pin={})

    @contextmanager
    def open_range(self, file: RemoteFile, start: int, stop: int) -> Iterator[RangeReader]:
        self.calls.append(file.address)
        yield Reader(self.sent[file.address][start:stop])

    def factory(self, options: Mapping[str, Any]) -> FakeBackend:
        return self


class Interfering:
    """
    Another back end, with something happening after its listing or before one of its ranges is read.

    Args:
        before_range: Called with the number of the range, from 1, and the file.
    """

    def __init__(
        self,
        inner: Backend,
        *,
        after_resolve: Callable[[], object] = lambda: None,
        before_range: Callable[[int, RemoteFile], object] = lambda number, file: None,
    ) -> None:
        self._inner = inner
        self._after_resolve = after_resolve
        self._before_range = before_range
        self.ranges: list[tuple[str, int, int]] = []

    def resolve(self, ref: ModelRef) -> Resolved:
        found = self._inner.resolve(ref)
        self._after_resolve()
        return found

    @contextmanager
    def open_range(self, file: RemoteFile, start: int, stop: int) -> Iterator[RangeReader]:
        self.ranges.append((str(file.entry.path), start, stop))
        self._before_range(len(self.ranges), file)
        with self._inner.open_range(file, start, stop) as reader:
            yield reader

    def close(self) -> None:
        close = getattr(self._inner, "close", None)
        if close is not None:
            close()

    def factory(self, options: Mapping[str, Any]) -> Interfering:
        return self
