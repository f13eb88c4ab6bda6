"""
HTTP/1.1 on one connection: a request written, a response parsed.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Mapping

from kserve_pvc.backends._http.target import HTTPError, StaleConnectionError
from kserve_pvc.backends._http.wire import POLL_SECONDS, Transport

_MAX_HEAD_BYTES = 32 * 1024
_HEAD_PIECE = 2048
_MAX_INTERIM_RESPONSES = 8
_MAX_TRAILERS = 100


class Connection:
    """
    One connection, and the bytes that arrived with a header but belong to what follows it.
    """

    def __init__(
        self, sock: socket.socket, wire: Transport, *, is_forwarded: bool = False, proxy_password: str = ""
    ) -> None:
        self._sock = sock
        self._wire = wire
        self._buffer = memoryview(bytearray(_MAX_HEAD_BYTES))
        self._start = self._stop = 0
        self.is_forwarded = is_forwarded
        self.proxy_password = proxy_password
        self.used = 0.0
        self._owner = os.getpid()
        self._interim = 0

    def close(self) -> None:
        self._sock.close()

    def is_quiet(self) -> bool:
        """
        Whether it can be used again: bytes after a response belong to no request, and must not be taken for the next
        response. After a fork two processes hold one end of it, and only the one that opened it may use it.
        """
        return self._owner == os.getpid() and self._start == self._stop and not self._wire.has_more()

    def send(self, data: bytes) -> None:
        self._interim = 0
        try:
            self._wire.send(data)
        except OSError as error:
            raise StaleConnectionError(f"connection lost: {error.strerror or error}") from error

    def receive_head(self, method: str) -> Response | None:
        """
        Return the next response, or None if its header is not complete within a poll interval.
        """
        while (block := self._receive_block()) is not None:
            response = Response(self, method, block)
            if response.status >= 200:
                return response
            self._interim += 1
            if self._interim > _MAX_INTERIM_RESPONSES:
                raise HTTPError(f"{self._interim} interim responses and no final one")
        return None

    def _receive_block(self) -> bytes | None:
        """Receive up to the next empty line. None: it did not arrive within a poll interval."""
        enough = time.monotonic() + POLL_SECONDS
        while True:
            found = bytes(self._buffer[self._start : self._stop])
            end = found.find(b"\r\n\r\n")
            if end >= 0:
                self._start += end + 4
                return found[:end]
            if self._stop == len(self._buffer):
                self._shift()
            if self._stop == len(self._buffer):
                raise HTTPError(f"response header longer than {_MAX_HEAD_BYTES} bytes")
            # Little more than a header: the body is to go straight into the caller's buffer.
            count = self._receive(self._buffer[self._stop : self._stop + _HEAD_PIECE])
            if count is None or time.monotonic() > enough:
                self._stop += count or 0
                return None
            if count == 0:
                if self._start == self._stop:
                    raise StaleConnectionError("connection closed without a response")
                raise HTTPError("connection closed inside a response header")
            self._stop += count

    def _shift(self) -> None:
        kept = bytes(self._buffer[self._start : self._stop])
        self._buffer[: len(kept)] = kept
        self._start, self._stop = 0, len(kept)

    def _receive(self, buffer: memoryview) -> int | None:
        try:
            return self._wire.receive(buffer)
        except OSError as error:
            kind = StaleConnectionError if self._start == self._stop else HTTPError
            raise kind(f"connection lost: {error.strerror or error}") from error

    def read(self, buffer: memoryview) -> int | None:
        """Read what arrived with the header, then from the wire: together, so that a small body is whole at once."""
        early = min(len(buffer), self._stop - self._start)
        if early:
            buffer[:early] = self._buffer[self._start : self._start + early]
            self._start += early
            if self._start == self._stop:
                self._start = self._stop = 0
            if early == len(buffer):
                return early
        try:
            count = self._wire.fill(buffer[early:] if early else buffer)
        except OSError as error:
            if early:
                return early  # The next read raises it.
            raise HTTPError(f"connection lost: {error.strerror or error}") from error
        return early + (count or 0) if early else count

    @property
    def worked(self) -> float:
        """
        Seconds that reading took without waiting for the server.
        """
        return self._wire.worked

    def read_line(self) -> bytes | None:
        """
        Read a short line of a chunked body, or None if it did not arrive within a poll interval.
        """
        enough = time.monotonic() + POLL_SECONDS
        while (end := bytes(self._buffer[self._start : self._stop]).find(b"\r\n")) < 0:
            if self._stop - self._start > 1024:
                raise HTTPError("a line of the chunked response is too long")
            self._shift()
            count = self._receive(self._buffer[self._stop : self._stop + _HEAD_PIECE])
            if count == 0:
                raise HTTPError("connection closed inside a response")
            self._stop += count or 0
            if count is None or time.monotonic() > enough:
                return None
        line = bytes(self._buffer[self._start : self._start + end])
        self._start += end + 2
        return line


class Response:
    """
    The header of a response, and its body being read.

    `length` is how many bytes the body has, if the server said so.
    """

    def __init__(self, connection: Connection, method: str, head: bytes) -> None:
        self._connection = connection
        # Parsed on demand: a small file is soon fetched, and few headers matter.
        self._head = head + b"\r\n"
        self._lower = self._head.lower()
        code = head[9:12]
        if not head.startswith((b"HTTP/1.1 ", b"HTTP/1.0 ")) or not code.isdigit() or len(code) < 3:
            raise HTTPError("response is not HTTP")
        self.status = int(code)
        words = (self.header("connection") or "").lower()
        self.keeps_alive = "keep-alive" in words if head.startswith(b"HTTP/1.0") else "close" not in words
        self._frame(method)

    def header(self, name: str) -> str | None:
        """
        Return the value of a header by its lower-case name; of one that is repeated, all values, joined by a comma.
        """
        found, wanted, start = None, f"\r\n{name}:".encode(), 0
        while (start := self._lower.find(wanted, start)) >= 0:
            start += len(wanted)
            value = self._head[start : self._head.index(b"\r\n", start)].decode("latin-1").strip()
            found = value if found is None else f"{found}, {value}"
        return found

    @property
    def headers(self) -> Mapping[str, str]:
        """All headers by lower-case name."""
        found: dict[str, list[str]] = {}
        for line in self._head.split(b"\r\n")[1:]:
            name, colon, value = line.partition(b":")
            if colon:
                found.setdefault(name.lower().decode("latin-1"), []).append(value.decode("latin-1").strip())
        return {name: ", ".join(values) for name, values in found.items()}

    def _frame(self, method: str) -> None:
        self.length: int | None = None
        self._is_chunked = self._is_trailer = False
        self._is_framed = True  # A chunk has ended, or none has begun.
        self._trailers = 0
        self.is_over = False
        coding, length = self.header("transfer-encoding"), self.header("content-length")
        if length is not None and "," in length and len({part.strip() for part in length.split(",")}) == 1:
            # Repeated by a proxy. RFC 9110, section 8.6: equal values are one.
            length = length.partition(",")[0].strip()
        if (
            method == "HEAD"
            or self.status in (204, 304)
            or self.status < 200
            or (method == "CONNECT" and self.status == 200)
        ):
            self._left, self.is_over = 0, True
        elif coding is not None:
            # Both at once is how one response is made to look like two.
            if coding.lower() != "chunked" or length is not None:
                raise HTTPError(f"unsupported transfer encoding `{coding[:40]}`")
            self._is_chunked, self._left = True, 0
        elif length is not None:
            if not length.isascii() or not length.isdigit() or len(length) > 18:
                raise HTTPError(f"invalid Content-Length `{length[:40]}`")
            self.length = self._left = int(length)
            self.is_over = self._left == 0
        else:
            self._left = -1  # Until the server closes the connection.

    def readinto(self, buffer: memoryview) -> int | None:
        """
        Receive the bytes that come next. None: nothing arrived within a poll interval; 0: the body is over.

        Raises:
            HTTPError: The connection was lost, or ended before the body did.
        """
        if self._is_chunked and self._left == 0 and not self.is_over and not self._next_chunk():
            return None
        if self.is_over:
            return 0
        count = self._connection.read(buffer if self._left < 0 else buffer[: self._left])
        if count is None:
            return None
        if count == 0:
            if self._left < 0:
                self.is_over, self.keeps_alive = True, False
                return 0
            raise HTTPError(f"connection closed {self._left} bytes before the end of the response")
        if self._left > 0:
            self._left -= count
            self._is_framed = self._left > 0
            self.is_over = self._left == 0 and not self._is_chunked
        return count

    @property
    def worked(self) -> float:
        """
        Seconds that reading on this connection took without waiting for the server.
        """
        return self._connection.worked

    def _next_chunk(self) -> bool:
        """Read what stands between two chunks, or after the last. False: not all of it has arrived yet."""
        while (line := self._connection.read_line()) is not None:
            if self._is_trailer:
                self._trailers += 1
                if not line:
                    self.is_over = True
                    return True
                if self._trailers > _MAX_TRAILERS:
                    raise HTTPError("response trailer too long")
            elif not self._is_framed:
                # The line break that ends a chunk.
                if line:
                    raise HTTPError("chunk longer than announced")
                self._is_framed = True
            else:
                size = line.partition(b";")[0].strip()
                if not re.fullmatch(rb"[0-9A-Fa-f]{1,15}", size):
                    raise HTTPError("chunk without a valid length")
                self._left = int(size, 16)
                if self._left:
                    return True
                self._is_trailer = True
        return False

    def read(self, limit: int, deadline: float) -> bytes:
        """
        Read a small body whole.

        Raises:
            HTTPError: It is longer than `limit` bytes, breaks off, or is not over by `deadline`.
        """
        data, buffer = bytearray(), memoryview(bytearray(64 * 1024))
        while (count := self.readinto(buffer)) != 0:
            data += buffer[: count or 0]
            if len(data) > limit:
                raise HTTPError(f"response longer than {limit} bytes")
            if time.monotonic() > deadline:
                raise HTTPError("response did not end in time")
        return bytes(data)
