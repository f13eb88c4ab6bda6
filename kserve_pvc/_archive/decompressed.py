"""
Compressed streams, several of which may follow each other in one file.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

from kserve_pvc._archive.members import PIECE_BYTES
from kserve_pvc.errors import PolicyError

# Streams that may follow each other, and how many bytes of the archive allow for one more. One takes about ten bytes
# and ten microseconds, whether it holds something or not.
MAX_STREAMS = 100_000
BYTES_PER_STREAM = 1024
# What a stream is given first, since what it does not need of that is copied. Each further piece is twice as long.
_FIRST_BYTES = 1024


class Decompressed:
    """
    Decompresses concatenated streams, never more than the requested number of bytes at once.
    """

    def __init__(self, source: BinaryIO, name: str, make: Callable[[], Any]) -> None:
        self._source = source
        self._name = name
        self._make = make
        self._decompressor = make()
        self._whole = b""
        self._data = memoryview(b"")
        self._step = _FIRST_BYTES
        self._streams = 1
        self._received = 0

    def read(self, most: int, /) -> bytes:
        while True:
            if self._decompressor.eof and not self._begin_next():
                return b""
            compressed = self._take() if self._decompressor.needs_input else memoryview(b"")
            data: bytes = self._decompressor.decompress(compressed, most)
            if self._decompressor.eof and (unused := len(self._decompressor.unused_data)):
                self._put_back(unused)
            if data:
                return data

    def _begin_next(self) -> bool:
        """Begin with the next stream, if there is one. A stream may be followed by zero padding."""
        while self._fill():
            rest = len(bytes(self._data[: self._step]).lstrip(b"\0"))
            if rest:
                self._data = self._data[min(self._step, len(self._data)) - rest :]
                break
            self._data = self._data[self._step :]
        else:
            return False
        self._streams += 1
        if self._streams > MAX_STREAMS + self._received // BYTES_PER_STREAM:
            raise PolicyError(
                self._name,
                f"it consists of more than {MAX_STREAMS} compressed streams, and one for each KiB; compress it anew",
            )
        self._decompressor, self._step = self._make(), _FIRST_BYTES
        return True

    def _fill(self) -> bool:
        if not self._data:
            self._whole = self._source.read(PIECE_BYTES)
            self._data = memoryview(self._whole)
            self._received += len(self._whole)
        return bool(self._data)

    def _take(self) -> memoryview:
        if not self._fill():
            raise EOFError("unexpected end of data")
        taken, self._data = self._data[: self._step], self._data[self._step :]
        self._step = min(2 * self._step, PIECE_BYTES)
        return taken

    def _put_back(self, count: int) -> None:
        self._data = memoryview(self._whole)[len(self._whole) - len(self._data) - count :]


class GzipDecompressor:
    """
    One member of a gzip file, with the interface of the decompressors of `lzma`.
    """

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(16 + zlib.MAX_WBITS)
        self._is_full = False

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    @property
    def needs_input(self) -> bool:
        return not (self._is_full or self._zlib.unconsumed_tail)

    def decompress(self, data: bytes | memoryview, most: int) -> bytes:
        """
        Decompress what comes next, or what an earlier call left over.
        """
        found = self._zlib.decompress(self._zlib.unconsumed_tail or data, most)
        self._is_full = len(found) == most
        return found
