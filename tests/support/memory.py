"""
A source in memory, for tests that are about the store and not about any source.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from kserve_pvc import FileEntry, ModelRef, RemoteFile, Resolved, SourceChangedError, order_listing


class MemorySource:
    """
    Models by URI; each is a mapping of names to bytes, and may be replaced at any time.
    """

    def __init__(self, models: Mapping[str, Mapping[str, bytes]]) -> None:
        self.models = dict(models)
        self.bytes_read = 0

    def __call__(self, options: Mapping[str, Any]) -> MemorySource:
        return self

    def resolve(self, ref: ModelRef) -> Resolved:
        files = self.models.get(ref.uri, {})
        return order_listing(ref, [_remote(ref.uri, name, data) for name, data in files.items()])

    @contextmanager
    def open_range(self, file: RemoteFile, start: int, stop: int) -> Iterator[_Reader]:
        uri, _, name = file.address.partition("#")
        data = self.models[uri].get(name)
        if data is None or _token(data) != file.entry.token:
            raise SourceChangedError(uri, name)
        yield _Reader(self, data[start:stop])


class _Reader:
    def __init__(self, source: MemorySource, data: bytes) -> None:
        self._source = source
        self._data = io.BytesIO(data)

    def readinto(self, buffer: memoryview) -> int:
        count = self._data.readinto(buffer)
        self._source.bytes_read += count
        return count


def _remote(uri: str, name: str, data: bytes) -> RemoteFile:
    token = _token(data)
    return RemoteFile(
        entry=FileEntry(path=name, size_bytes=len(data), token=token), address=f"{uri}#{name}", pin={"token": token}
    )


def _token(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()
