"""
A connected socket, in the clear or under TLS, that never blocks for longer than one poll interval.
"""

from __future__ import annotations

import select
import socket
import time
from typing import TYPE_CHECKING, Protocol

from kserve_pvc.backends._http.target import HTTPError

if TYPE_CHECKING:
    import ssl

CONNECT_SECONDS = 5.0
# How long a read blocks before its caller can check whether it should stop.
POLL_SECONDS = 0.25
_PEEK = socket.MSG_PEEK | socket.MSG_DONTWAIT


class Transport(Protocol):
    """
    How bytes are sent and received, in the clear or under TLS. `worked` is how many seconds reading took without
    waiting.
    """

    worked: float

    def send(self, data: bytes) -> None: ...

    def receive(self, buffer: memoryview) -> int | None:
        """Receive into a buffer. None: nothing arrived within a poll interval; 0: the other side has ended."""

    def fill(self, buffer: memoryview) -> int | None:
        """Receive until a buffer is full, the other side has ended, or a poll interval has passed."""

    def has_more(self) -> bool:
        """Whether there is something to receive already, or the other side has ended."""


class PlainTransport:
    worked = 0.0

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def send(self, data: bytes) -> None:
        self._sock.sendall(data)

    def receive(self, buffer: memoryview) -> int | None:
        try:
            return self._sock.recv_into(buffer)
        except BlockingIOError:
            return None

    def fill(self, buffer: memoryview) -> int | None:
        try:
            return self._sock.recv_into(buffer, len(buffer), socket.MSG_WAITALL)
        except BlockingIOError:
            return None

    def has_more(self) -> bool:
        return _is_readable(self._sock)


class TLSTransport:
    def __init__(self, sock: socket.socket, context: ssl.SSLContext, host: str, deadline: float) -> None:
        import ssl

        self._nothing_yet = ssl.SSLWantReadError, ssl.SSLWantWriteError
        self._end = ssl.SSLZeroReturnError, ssl.SSLEOFError
        self.worked = 0.0
        self._waited = 0.0
        sock.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            self.sock = context.wrap_socket(sock, server_hostname=host, suppress_ragged_eofs=False)
        except TimeoutError:
            raise HTTPError(f"the TLS handshake took more than {CONNECT_SECONDS:g} s") from None
        except ssl.SSLCertVerificationError as error:
            hint = "name the CA to trust in AWS_CA_BUNDLE or SSL_CERT_FILE"
            reason = f"certificate verification failed: {error.verify_message}; {hint}"
            raise HTTPError(reason, is_final=True) from error
        except (ssl.SSLError, OSError) as error:
            # An interrupted handshake may be transient; a response that is not TLS will stay that.
            is_end = isinstance(error, ssl.SSLEOFError | ConnectionError)
            raise HTTPError(
                f"the TLS handshake failed: {getattr(error, 'reason', None) or error}", is_final=not is_end
            ) from error
        self.sock.setblocking(False)
        self._poll = select.poll()
        self._poll.register(self.sock, select.POLLIN)

    def send(self, data: bytes) -> None:
        self.sock.settimeout(CONNECT_SECONDS)
        self.sock.sendall(data)
        self.sock.setblocking(False)

    def receive(self, buffer: memoryview) -> int | None:
        while True:
            try:
                return self.sock.read(len(buffer), buffer)  # type: ignore[return-value]  # A count.
            except self._nothing_yet:
                if not self._wait():
                    return None
            except self._end:
                return 0

    def _wait(self) -> bool:
        """Wait for more, one poll interval at most."""
        began = time.monotonic()
        try:
            return bool(self._poll.poll(POLL_SECONDS * 1000))
        finally:
            self._waited += time.monotonic() - began

    def fill(self, buffer: memoryview) -> int | None:
        began, waited = time.monotonic(), self._waited
        try:
            return self._fill(buffer, began + POLL_SECONDS)
        finally:
            self.worked += time.monotonic() - began - (self._waited - waited)

    def _fill(self, buffer: memoryview, enough: float) -> int | None:
        filled = 0
        while filled < len(buffer):
            count = self.receive(buffer[filled:])
            if not count:
                return filled or count
            filled += count
            if time.monotonic() > enough:
                break
        return filled

    def has_more(self) -> bool:
        return bool(self.sock.pending() or self._poll.poll(0))


def _is_readable(sock: socket.socket) -> bool:
    try:
        sock.recv(1, _PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
