"""
A small HTTP/1.1 client that only reads: bodies go straight from the socket into a buffer of the caller.

The clients of the standard library and of the SDKs copy every byte several times, into buffers that are new each time,
and spend more on the head of an answer than a small file costs. This one receives into the caller's memory with one
system call for each buffer, keeps connections open, and trusts no answer further than it can see.
"""

from __future__ import annotations

import base64
import os
import re
import select
import socket
import struct
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, Protocol
from urllib.parse import unquote, urlsplit

from kserve_pvc.errors import StoreError

if TYPE_CHECKING:
    import ssl

CONNECT_SECONDS = 5.0
# How long a read waits before its caller may look up: whoever is told to stop does so within this time.
MOMENT = 0.25
_MAX_HEAD_BYTES = 32 * 1024
_HEAD_PIECE = 2048
_MAX_INTERIM_ANSWERS = 8
_MAX_TRAILERS = 100
_PEEK = socket.MSG_PEEK | socket.MSG_DONTWAIT
# Servers close idle connections after five seconds at the earliest; a younger one is worth trying.
_MAX_IDLE_SECONDS = 4.0
# How long a server may think before its answer starts, where the caller does not say.
_ANSWER_SECONDS = 30.0


class HTTPError(Exception):
    """
    A request that got no proper answer. With `is_final` another try would end the same.
    """

    def __init__(self, reason: str, *, is_final: bool = False) -> None:
        super().__init__(reason)
        self.is_final = is_final


class _StaleError(HTTPError):
    """A connection that was kept open had been closed by the server before the request came."""


class Target(NamedTuple):
    """
    Where a URL leads: what to connect to, and what to ask for there.
    """

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """What belongs into the `Host` header: without the port where it is the usual one."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


_PORTS = {"http": 80, "https": 443}


def target_of(url: str) -> Target:
    """
    Take a URL apart.

    Raises:
        HTTPError: It is no http or https URL.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise HTTPError("its address is no http or https URL", is_final=True) from error
    if parts.scheme not in _PORTS or not parts.hostname or port == 0:
        raise HTTPError("its address is no http or https URL", is_final=True)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Target(parts.scheme, parts.hostname, port or _PORTS[parts.scheme], path)


class HTTPClient:
    """
    Connections to servers, kept open between requests and used by any number of threads, each by one at a time.

    `answer_seconds` is how long `open` waits for an answer to begin.

    Args:
        ca_bundle: File or directory of certificates to trust, False to check none, or None for those of the system.
        environ: Where `HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY` are looked up, in either case.
        check_address: Told the name and every address of a host before one of those very addresses is connected to;
            raises if it may not be. Behind a proxy it is told only of hosts that are addresses, as the proxy looks up
            names.
    """

    def __init__(
        self,
        *,
        environ: Mapping[str, str],
        ca_bundle: str | bool | None = None,
        check_address: Callable[[str, str], None] | None = None,
    ) -> None:
        self._environ = environ
        self._ca_bundle = ca_bundle
        self._check_address = check_address
        self.answer_seconds = _ANSWER_SECONDS
        self._idle: dict[tuple[str, str, int], deque[_Connection]] = defaultdict(deque)
        self._guard = threading.Lock()
        self._context: ssl.SSLContext | None = None

    @contextmanager
    def open(self, method: str, target: Target, headers: Mapping[str, str]) -> Iterator[Answer]:
        """
        Send a request, wait for its answer, and give it; its body is read inside the `with`.

        Raises:
            HTTPError: There is no answer, or none that makes sense.
        """
        with self.send(method, target, headers) as exchange:
            deadline = time.monotonic() + self.answer_seconds
            while (answer := exchange.answer()) is None:
                if time.monotonic() > deadline:
                    raise HTTPError(f"it did not answer within {self.answer_seconds:g} s")
            yield answer

    def send(self, method: str, target: Target, headers: Mapping[str, str]) -> Exchange:
        """
        Send a request and do not wait. Redirects are not followed.

        Raises:
            HTTPError: There is no connection.
        """
        return Exchange(self, method, target, headers)

    def head(self, method: str, target: Target, connection: _Connection, headers: Mapping[str, str]) -> bytes:
        """
        The head of a request as it goes over a connection.
        """
        place = f"http://{target.authority}{target.path}" if connection.is_forwarded else target.path
        # An answer in another encoding would have other bytes than the range that was asked for.
        lines = [f"{method} {place} HTTP/1.1", f"Host: {target.authority}", "Accept-Encoding: identity"]
        if connection.is_forwarded and connection.proxy_password:
            lines.append(f"Proxy-Authorization: {connection.proxy_password}")
        lines += [f"{name}: {value}" for name, value in headers.items()]
        head = "\r\n".join(lines)
        if head.count("\n") != len(lines) - 1 or head.count("\r") != len(lines) - 1:
            raise HTTPError("a header holds a line break", is_final=True)
        try:
            return head.encode("latin-1") + b"\r\n\r\n"
        except UnicodeEncodeError as error:
            raise HTTPError("a header holds what HTTP cannot carry", is_final=True) from error

    def take(self, target: Target) -> _Connection | None:
        """
        A connection that was kept, if there is a young one.
        """
        with self._guard:
            idle = self._idle[target.scheme, target.host, target.port]
            while idle:
                connection = idle.pop()  # The one used last is the likeliest to be alive.
                if time.monotonic() - connection.used < _MAX_IDLE_SECONDS and connection.is_quiet():
                    return connection
                connection.close()
        return None

    def give_back(self, target: Target, connection: _Connection) -> None:
        """
        Keep a connection for the next request to the same place.
        """
        connection.used = time.monotonic()
        with self._guard:
            self._idle[target.scheme, target.host, target.port].append(connection)

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """
        Close every connection that nobody uses.
        """
        with self._guard:
            for idle in self._idle.values():
                while idle:
                    idle.pop().close()

    def connect(self, target: Target) -> _Connection:
        """
        Make a connection, through a proxy where one is named.
        """
        proxy = self._proxy(target)
        deadline = time.monotonic() + CONNECT_SECONDS
        if proxy and self._check_address and (literal := _literal_address(target.host)):
            self._check_address(target.host, literal)
        # Which proxy there is was chosen by whoever runs this.
        sock = _dial(proxy or target, None if proxy else self._check_address)
        try:
            password = _basic(proxy) if proxy else ""
            if target.scheme == "http":
                return _Connection(sock, _Plain(sock), is_forwarded=proxy is not None, proxy_password=password)
            if proxy:
                _tunnel(sock, target, password, deadline)
            sealed = _Sealed(sock, self._tls(), target.host, deadline)
            return _Connection(sealed.sock, sealed)
        except BaseException:
            sock.close()
            raise

    def _proxy(self, target: Target) -> _Proxy | None:
        url = self._look(f"{target.scheme}_proxy") or self._look("all_proxy")
        if not url or _is_direct(target, self._look("no_proxy")):
            return None
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            host, port = parts.hostname, parts.port or 80
        except ValueError:
            host, port = None, 0
        if not host or parts.scheme != "http":
            raise HTTPError(f"the proxy for {target.scheme} is no `http://host:port`", is_final=True)
        return _Proxy(host, port, unquote(parts.username or ""), unquote(parts.password or ""))

    def _look(self, name: str) -> str:
        # Whoever runs under CGI gets `HTTP_PROXY` from a header of a request, so there only the lower case counts.
        is_forged = name == "http_proxy" and "REQUEST_METHOD" in self._environ
        return self._environ.get(name) or ("" if is_forged else self._environ.get(name.upper(), ""))

    def _tls(self) -> ssl.SSLContext:
        # Loading the certificates takes longer than a small download: once for all connections.
        with self._guard:
            if self._context is None:
                self._context = make_context(self._ca_bundle, self._environ)
            return self._context


class Exchange:
    """
    One request and its answer, on a connection of its own until it is closed.

    A connection whose answer was read to the end is kept for others; any other is closed, since what it still holds
    answers nobody's question.
    """

    def __init__(self, client: HTTPClient, method: str, target: Target, headers: Mapping[str, str]) -> None:
        self._client = client
        self._method = method
        self._target = target
        self._headers = headers
        self._answer: Answer | None = None
        kept = client.take(target)
        self._is_kept = kept is not None
        self._connection = kept or client.connect(target)
        try:
            self._send()
        except _StaleError:
            self._start_over()
        except BaseException:
            self._connection.close()
            raise

    def __enter__(self) -> Exchange:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        answer = self._answer
        if kind is None and answer is not None and answer.is_over and answer.keeps_alive:
            self._client.give_back(self._target, self._connection)
        else:
            self._connection.close()

    def answer(self) -> Answer | None:
        """
        The head of the answer, or None if it has not come within a moment.

        Raises:
            HTTPError: There will be none.
        """
        if self._answer is None:
            try:
                self._answer = self._connection.receive_head(self._method)
            except _StaleError:
                self._start_over()
        return self._answer

    def _send(self) -> None:
        self._connection.send(self._client.head(self._method, self._target, self._connection, self._headers))

    def _start_over(self) -> None:
        """A server may close a connection that was kept at any time: then the request goes out once more, on a new one."""
        self._connection.close()
        if not self._is_kept:
            raise  # noqa: PLE0704
        self._is_kept = False
        self._connection = self._client.connect(self._target)
        self._send()


class _Proxy(NamedTuple):
    host: str
    port: int
    user: str
    password: str


def make_context(ca_bundle: str | bool | None, environ: Mapping[str, str]) -> ssl.SSLContext:
    """
    Decide which certificates to trust.

    `ca_bundle` wins, then `AWS_CA_BUNDLE`, `REQUESTS_CA_BUNDLE`, `CURL_CA_BUNDLE`, then what OpenSSL finds by itself
    (`SSL_CERT_FILE`, `SSL_CERT_DIR`, the system's store). Slim images have none, and what certifi or botocore bring is
    used.

    Raises:
        HTTPError: The bundle cannot be read.
    """
    import ssl

    if ca_bundle is False:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return context
    named = ca_bundle if isinstance(ca_bundle, str) else None
    source = "the CA bundle"
    for name in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        if named is None and environ.get(name):
            named, source = environ[name], name
    try:
        if named is not None:
            from pathlib import Path

            is_directory = Path(named).is_dir()
            return ssl.create_default_context(
                cafile=None if is_directory else named, capath=named if is_directory else None
            )
        context = ssl.create_default_context()
        if not context.get_ca_certs() and not _has_directory():
            bundle = _packaged_bundle()
            if bundle is not None:
                context.load_verify_locations(bundle)
        return context
    except (OSError, ssl.SSLError) as error:
        raise HTTPError(f"{source} `{named or ''}` cannot be read: {error}", is_final=True) from error


def _packaged_bundle() -> str | None:
    """The certificates that come with certifi or botocore, found without importing them."""
    from importlib.util import find_spec
    from pathlib import Path

    for package in ("certifi", "botocore"):
        spec = find_spec(package)
        place = Path(spec.origin).parent / "cacert.pem" if spec is not None and spec.origin else None
        if place is not None and place.is_file():
            return str(place)
    return None


def _has_directory() -> bool:
    """Certificates of a directory are loaded when they are needed, so a context does not count them."""
    import ssl
    from pathlib import Path

    place = ssl.get_default_verify_paths().capath
    return place is not None and any(Path(place).iterdir())


def _is_direct(target: Target, no_proxy: str) -> bool:
    host = target.host.lower()
    for name in (n.strip().lower().lstrip(".") for n in no_proxy.split(",")):
        if name == "*" or (name and (host == name or host.endswith("." + name) or f"{host}:{target.port}" == name)):
            return True
    return False


def _basic(proxy: _Proxy) -> str:
    if not proxy.user:
        return ""
    return "Basic " + base64.b64encode(f"{proxy.user}:{proxy.password}".encode()).decode()


def _literal_address(host: str) -> str | None:
    """The address that a host is, in any of the spellings that a resolver takes for one; None for a name."""
    try:
        socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
        return host
    except (OSError, ValueError):
        pass
    try:
        # Also `0x7f000001`, `2130706433` and `127.1`.
        return socket.inet_ntoa(socket.inet_aton(host))
    except (OSError, ValueError):
        return None


def _connect_checked(host: str, port: int, check: Callable[[str, str], None]) -> socket.socket:
    """Look a host up once, and connect to what was checked: a second look could be told something else."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for *_, address in found:
        check(host, str(address[0]))
    failure: OSError | None = None
    for family, kind, protocol, _, address in found:
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(CONNECT_SECONDS)
            sock.connect(address)
            return sock
        except OSError as error:
            sock.close()
            failure = error
    raise failure or OSError("it has no address")


def _dial(place: Target | _Proxy, check: Callable[[str, str], None] | None = None) -> socket.socket:
    try:
        if check is not None:
            sock = _connect_checked(place.host, place.port, check)
        else:
            sock = socket.create_connection((place.host, place.port), timeout=CONNECT_SECONDS)
    except StoreError:
        raise
    except OSError as error:
        name = (
            f"the proxy {place.host}:{place.port}"
            if isinstance(place, _Proxy)
            else f"{place.scheme}://{place.authority}"
        )
        raise HTTPError(f"no connection to {name}: {error.strerror or error}") from error
    except UnicodeError as error:
        raise HTTPError(f"`{place.host}` is no name of a host", is_final=True) from error
    sock.settimeout(None)
    moment = struct.pack("ll", int(MOMENT), int(MOMENT % 1 * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, moment)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(CONNECT_SECONDS), 0))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _tunnel(sock: socket.socket, target: Target, password: str, deadline: float) -> None:
    host = f"[{target.host}]" if ":" in target.host else target.host
    lines = [f"CONNECT {host}:{target.port} HTTP/1.1", f"Host: {host}:{target.port}"]
    if password:
        lines.append(f"Proxy-Authorization: {password}")
    connection = _Connection(sock, _Plain(sock))
    connection.send("\r\n".join([*lines, "", ""]).encode("latin-1"))
    while (answer := connection.receive_head("CONNECT")) is None:
        if time.monotonic() > deadline:
            raise HTTPError("the proxy did not answer CONNECT in time")
    if answer.status != 200:
        raise HTTPError(
            f"the proxy answered {answer.status} to CONNECT", is_final=answer.status in (401, 403, 405, 407)
        )


class _Wire(Protocol):
    """
    How bytes come and go; two ways of it, in the clear and under TLS. `worked` is how many seconds reading took without
    waiting.
    """

    worked: float

    def send(self, data: bytes) -> None: ...

    def receive(self, buffer: memoryview) -> int | None:
        """Receive into a buffer. None: nothing has come for a moment; 0: nothing will come any more."""

    def fill(self, buffer: memoryview) -> int | None:
        """Receive until a buffer is full, the other side has ended, or a moment has passed."""

    def has_more(self) -> bool:
        """Whether there is something to receive already, be it the end."""


class _Plain:
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


class _Sealed:
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
            reason = f"certificate verification failed: {error.verify_message}; name the CA to trust in AWS_CA_BUNDLE or SSL_CERT_FILE"
            raise HTTPError(reason, is_final=True) from error
        except (ssl.SSLError, OSError) as error:
            # A broken-off handshake may be the weather; an answer that is no TLS will stay that.
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
                return self.sock.read(len(buffer), buffer)  # type: ignore[return-value]
            except self._nothing_yet:
                if not self._wait():
                    return None
            except self._end:
                return 0

    def _wait(self) -> bool:
        """Wait for more, a moment at most."""
        began = time.monotonic()
        try:
            return bool(self._poll.poll(MOMENT * 1000))
        finally:
            self._waited += time.monotonic() - began

    def fill(self, buffer: memoryview) -> int | None:
        began, waited = time.monotonic(), self._waited
        try:
            return self._fill(buffer, began + MOMENT)
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


class _Connection:
    """
    One connection, and the bytes that came with a head but belong to what follows it.
    """

    def __init__(
        self, sock: socket.socket, wire: _Wire, *, is_forwarded: bool = False, proxy_password: str = ""
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
        Whether it can be used again: what came after an answer has no question, and must not answer the next one. After
        a fork two processes hold one end of it, and only the one that made it may speak.
        """
        return self._owner == os.getpid() and self._start == self._stop and not self._wire.has_more()

    def send(self, data: bytes) -> None:
        self._interim = 0
        try:
            self._wire.send(data)
        except OSError as error:
            raise _StaleError(f"the connection broke: {error.strerror or error}") from error

    def receive_head(self, method: str) -> Answer | None:
        """
        The head of the next answer, or None if it is not there within a moment.
        """
        while (block := self._receive_block()) is not None:
            answer = Answer(self, method, block)
            if answer.status >= 200:
                return answer
            self._interim += 1
            if self._interim > _MAX_INTERIM_ANSWERS:
                raise HTTPError(f"it sent {self._interim} interim answers and no final one")
        return None

    def _receive_block(self) -> bytes | None:
        """Receive up to the next empty line. None: it is not there within a moment."""
        enough = time.monotonic() + MOMENT
        while True:
            found = bytes(self._buffer[self._start : self._stop])
            end = found.find(b"\r\n\r\n")
            if end >= 0:
                self._start += end + 4
                return found[:end]
            if self._stop == len(self._buffer):
                self._shift()
            if self._stop == len(self._buffer):
                raise HTTPError(f"the head of its answer is longer than {_MAX_HEAD_BYTES} bytes")
            # Little more than a head: the body is to go straight into the caller's buffer.
            count = self._receive(self._buffer[self._stop : self._stop + _HEAD_PIECE])
            if count is None or time.monotonic() > enough:
                self._stop += count or 0
                return None
            if count == 0:
                if self._start == self._stop:
                    raise _StaleError("it closed the connection without an answer")
                raise HTTPError("it closed the connection in the head of an answer")
            self._stop += count

    def _shift(self) -> None:
        kept = bytes(self._buffer[self._start : self._stop])
        self._buffer[: len(kept)] = kept
        self._start, self._stop = 0, len(kept)

    def _receive(self, buffer: memoryview) -> int | None:
        try:
            return self._wire.receive(buffer)
        except OSError as error:
            kind = _StaleError if self._start == self._stop else HTTPError
            raise kind(f"the connection broke: {error.strerror or error}") from error

    def read(self, buffer: memoryview) -> int | None:
        """What came with the head first, then from the wire: together, so that a small body is whole at once."""
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
                return early  # Whoever asks for more will hear of it.
            raise HTTPError(f"the connection broke: {error.strerror or error}") from error
        return early + (count or 0) if early else count

    @property
    def worked(self) -> float:
        """
        Seconds that reading took without waiting for anybody.
        """
        return self._wire.worked

    def read_line(self) -> bytes | None:
        """
        A short line of a chunked body, or None if it is not there within a moment.
        """
        enough = time.monotonic() + MOMENT
        while (end := bytes(self._buffer[self._start : self._stop]).find(b"\r\n")) < 0:
            if self._stop - self._start > 1024:
                raise HTTPError("a line of its chunked answer does not end")
            self._shift()
            count = self._receive(self._buffer[self._stop : self._stop + _HEAD_PIECE])
            if count == 0:
                raise HTTPError("it closed the connection inside an answer")
            self._stop += count or 0
            if count is None or time.monotonic() > enough:
                return None
        line = bytes(self._buffer[self._start : self._start + end])
        self._start += end + 2
        return line


class Answer:
    """
    The head of an answer, and its body being read.

    `status` is its number, `length` is how many bytes the body has, if the server said so.
    """

    def __init__(self, connection: _Connection, method: str, head: bytes) -> None:
        self._connection = connection
        # Found when they are asked for: a small file is soon fetched, and few headers matter.
        self._head = head + b"\r\n"
        self._lower = self._head.lower()
        code = head[9:12]
        if not head.startswith((b"HTTP/1.1 ", b"HTTP/1.0 ")) or not code.isdigit() or len(code) < 3:
            raise HTTPError("its answer is no HTTP")
        self.status = int(code)
        words = (self.header("connection") or "").lower()
        self.keeps_alive = "keep-alive" in words if head.startswith(b"HTTP/1.0") else "close" not in words
        self._frame(method)

    def header(self, name: str) -> str | None:
        """
        The value of a header by its lower-case name; of one that comes twice, both, joined by a comma.
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
        names = {line.partition(b":")[0].decode("latin-1") for line in self._lower.split(b"\r\n")[1:] if b":" in line}
        return {name: self.header(name) or "" for name in names}

    def _frame(self, method: str) -> None:
        self.length: int | None = None
        self._is_chunked = self._is_trailer = False
        self._is_framed = True  # A chunk has ended, or none has begun.
        self._trailers = 0
        self.is_over = False
        coding, length = self.header("transfer-encoding"), self.header("content-length")
        if (
            method == "HEAD"
            or self.status in (204, 304)
            or self.status < 200
            or (method == "CONNECT" and self.status == 200)
        ):
            self._left, self.is_over = 0, True
        elif coding is not None:
            # Both at once is how one answer is made to look like two.
            if coding.lower() != "chunked" or length is not None:
                raise HTTPError(f"its answer has the transfer encoding `{coding[:40]}`")
            self._is_chunked, self._left = True, 0
        elif length is not None:
            if not length.isascii() or not length.isdigit() or len(length) > 18:
                raise HTTPError(f"its answer has the length `{length[:40]}`")
            self.length = self._left = int(length)
            self.is_over = self._left == 0
        else:
            self._left = -1  # Until the server closes the connection.

    def readinto(self, buffer: memoryview) -> int | None:
        """
        Receive the bytes that come next. None: nothing has come for a moment; 0: the body is over.

        Raises:
            HTTPError: The connection broke, or ended before the body did.
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
            raise HTTPError(f"it closed the connection {self._left} bytes before the end of its answer")
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
        """Read what stands between two chunks, or after the last. False: not all of it is there yet."""
        while (line := self._connection.read_line()) is not None:
            if self._is_trailer:
                self._trailers += 1
                if not line:
                    self.is_over = True
                    return True
                if self._trailers > _MAX_TRAILERS:
                    raise HTTPError("the trailer of its answer does not end")
            elif not self._is_framed:
                # The line break that ends a chunk.
                if line:
                    raise HTTPError("a chunk of its answer is longer than it said")
                self._is_framed = True
            else:
                size = line.partition(b";")[0].strip()
                if not re.fullmatch(rb"[0-9A-Fa-f]{1,15}", size):
                    raise HTTPError("a chunk of its answer has no length")
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
                raise HTTPError(f"its answer is longer than {limit} bytes")
            if time.monotonic() > deadline:
                raise HTTPError("its answer did not end in time")
        return bytes(data)
