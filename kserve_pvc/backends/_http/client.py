"""
A small HTTP/1.1 client that only reads: bodies go straight from the socket into a buffer of the caller.

The clients of the standard library and of the SDKs copy every byte several times, into buffers that are new each time,
and spend more on the header of a response than a small file costs. This one receives into the caller's memory with one
system call for each buffer, keeps connections open, and trusts no response further than it can check.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from kserve_pvc.backends._http.connection import Connection, Response
from kserve_pvc.backends._http.dial import (
    Proxy,
    basic_authorization,
    bypasses_proxy,
    dial,
    literal_address,
    open_tunnel,
)
from kserve_pvc.backends._http.target import HTTPError, StaleConnectionError, Target
from kserve_pvc.backends._http.tls import make_context
from kserve_pvc.backends._http.wire import CONNECT_SECONDS, PlainTransport, TLSTransport

if TYPE_CHECKING:
    import ssl

# Servers close idle connections after five seconds at the earliest; a younger one is worth trying.
_MAX_IDLE_SECONDS = 4.0
# How long a response may take to begin, where the caller does not say.
_RESPONSE_SECONDS = 30.0


class HTTPClient:
    """
    Connections to servers, kept open between requests and used by any number of threads, each by one at a time.

    `response_seconds` is how long `open` waits for a response to begin.

    Args:
        ca_bundle: File or directory of certificates to trust, False to check none, or None for those of the system.
        environ: Holds `HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY`, in either case.
        check_address: Called with the name and every address of a host before one of those addresses is connected
            to; raises if it may not be. Behind a proxy, which looks up names, it is called with the name alone, or with
            the address that it is.
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
        self.response_seconds = _RESPONSE_SECONDS
        self._idle: dict[tuple[str, str, int], deque[Connection]] = defaultdict(deque)
        self._guard = threading.Lock()
        self._whole: dict[Hashable, WholeResponses] = {}
        self._context: ssl.SSLContext | None = None

    @contextmanager
    def open(self, method: str, target: Target, headers: Mapping[str, str]) -> Iterator[Response]:
        """
        Send a request and wait for its response, whose body is read inside the `with`.

        Raises:
            HTTPError: There is no response, or not a valid one.
        """
        with self.send(method, target, headers) as exchange:
            deadline = time.monotonic() + self.response_seconds
            while (response := exchange.response()) is None:
                if time.monotonic() > deadline:
                    raise HTTPError(f"no response within {self.response_seconds:g} s")
            yield response

    def send(self, method: str, target: Target, headers: Mapping[str, str]) -> Exchange:
        """
        Send a request and do not wait. Redirects are not followed.

        Raises:
            HTTPError: There is no connection.
        """
        return Exchange(self, method, target, headers)

    def head(self, method: str, target: Target, connection: Connection, headers: Mapping[str, str]) -> bytes:
        """
        Write the head of a request as it goes over a connection.
        """
        place = f"http://{target.authority}{target.path}" if connection.is_forwarded else target.path
        # A response in another encoding would have other bytes than the range that was requested.
        lines = [f"{method} {place} HTTP/1.1", f"Host: {target.authority}"]
        if "Accept-Encoding" not in headers:
            lines.append("Accept-Encoding: identity")
        if connection.is_forwarded and connection.proxy_password:
            lines.append(f"Proxy-Authorization: {connection.proxy_password}")
        lines += [f"{name}: {value}" for name, value in headers.items()]
        head = "\r\n".join(lines)
        if head.count("\n") != len(lines) - 1 or head.count("\r") != len(lines) - 1:
            raise HTTPError("a header contains a line break", is_final=True)
        try:
            return head.encode("latin-1") + b"\r\n\r\n"
        except UnicodeEncodeError as error:
            raise HTTPError("a header contains characters that HTTP cannot carry", is_final=True) from error

    def take(self, target: Target) -> Connection | None:
        """
        Return a connection that was kept, if it is recent enough.
        """
        with self._guard:
            idle = self._idle[target.scheme, target.host, target.port]
            while idle:
                connection = idle.pop()  # The one used last is the likeliest to be open.
                if time.monotonic() - connection.used < _MAX_IDLE_SECONDS and connection.is_quiet():
                    return connection
                connection.close()
        return None

    def give_back(self, target: Target, connection: Connection) -> None:
        """
        Keep a connection for the next request to the same place.
        """
        connection.used = time.monotonic()
        with self._guard:
            self._idle[target.scheme, target.host, target.port].append(connection)

    def whole_of(self, file: Hashable) -> WholeResponses:
        """
        Return what is known of a file whose server sends it whole only.
        """
        with self._guard:
            return self._whole.setdefault(file, WholeResponses())

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """
        Close every idle connection.
        """
        with self._guard:
            for whole in self._whole.values():
                whole.close()
            self._whole.clear()
            for idle in self._idle.values():
                while idle:
                    idle.pop().close()

    def connect(self, target: Target) -> Connection:
        """
        Open a connection, through a proxy where one is configured.
        """
        proxy = self._proxy(target)
        deadline = time.monotonic() + CONNECT_SECONDS
        if proxy and self._check_address:
            self._check_address(target.host, literal_address(target.host) or "")
        # The proxy is configured locally, so its own address is trusted.
        sock = dial(proxy or target, None if proxy else self._check_address)
        try:
            password = basic_authorization(proxy) if proxy else ""
            if target.scheme == "http":
                return Connection(sock, PlainTransport(sock), is_forwarded=proxy is not None, proxy_password=password)
            if proxy:
                open_tunnel(sock, target, password, deadline)
            sealed = TLSTransport(sock, self._tls(), target.host, deadline)
            return Connection(sealed.sock, sealed)
        except BaseException:
            sock.close()
            raise

    def _proxy(self, target: Target) -> Proxy | None:
        url = self._look(f"{target.scheme}_proxy") or self._look("all_proxy")
        if not url or bypasses_proxy(target, self._look("no_proxy")):
            return None
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            host, port = parts.hostname, parts.port or 80
        except ValueError:
            host, port = None, 0
        if not host or parts.scheme != "http":
            raise HTTPError(f"the proxy for {target.scheme} is not `http://host:port`", is_final=True)
        return Proxy(host, port, unquote(parts.username or ""), unquote(parts.password or ""))

    def _look(self, name: str) -> str:
        # Under CGI `HTTP_PROXY` comes from a header of a request, so there only the lower case counts.
        is_forged = name == "http_proxy" and "REQUEST_METHOD" in self._environ
        return self._environ.get(name) or ("" if is_forged else self._environ.get(name.upper(), ""))

    def _tls(self) -> ssl.SSLContext:
        # Loading the certificates takes longer than a small download: once for all connections.
        with self._guard:
            if self._context is None:
                self._context = make_context(self._ca_bundle, self._environ)
            return self._context


class WholeResponses:
    """
    Responses with a whole file of which a part has been received, for readers of what comes next.

    Attributes:
        is_known: Whether the server sends the file whole only.
    """

    def __init__(self) -> None:
        self.is_known = False
        self._guard = threading.Lock()
        self._kept: list[tuple[int, Exchange]] = []

    def keep(self, position: int, exchange: Exchange) -> None:
        """
        Keep a response whose next byte has this position in the file.
        """
        with self._guard:
            self._kept.append((position, exchange))

    def take(self, start: int) -> tuple[int, Exchange] | None:
        """
        Return the response that needs to skip least to get to a position, with where it is; None if there is none.
        """
        with self._guard:
            found = max((kept for kept in self._kept if kept[0] <= start), key=lambda kept: kept[0], default=None)
            if found is not None:
                self._kept.remove(found)
            return found

    def close(self) -> None:
        """
        Close the connections of all of them.
        """
        with self._guard:
            while self._kept:
                self._kept.pop()[1].__exit__(None)


class Exchange:
    """
    One request and its response, on a connection of its own until it is closed.

    A connection whose response was read to the end is kept for others; any other is closed, since what it still holds
    belongs to no later request.
    """

    def __init__(self, client: HTTPClient, method: str, target: Target, headers: Mapping[str, str]) -> None:
        self._client = client
        self._method = method
        self._target = target
        self._headers = headers
        self._response: Response | None = None
        kept = client.take(target)
        self._is_kept = kept is not None
        self._connection = kept or client.connect(target)
        try:
            self._send()
        except StaleConnectionError:
            self._start_over()
        except BaseException:
            self._connection.close()
            raise

    def __enter__(self) -> Exchange:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        response = self._response
        if kind is None and response is not None and response.is_over and response.keeps_alive:
            self._client.give_back(self._target, self._connection)
        else:
            self._connection.close()

    def response(self) -> Response | None:
        """
        Return the response once its header is complete, or None if that takes longer than one poll interval.

        Raises:
            HTTPError: There will be none.
        """
        if self._response is None:
            try:
                self._response = self._connection.receive_head(self._method)
            except StaleConnectionError:
                self._start_over()
        return self._response

    def _send(self) -> None:
        self._connection.send(self._client.head(self._method, self._target, self._connection, self._headers))

    def _start_over(self) -> None:
        """A server may close an idle connection at any time: then the request is sent once more, on a new one."""
        self._connection.close()
        if not self._is_kept:
            raise  # noqa: PLE0704
        self._is_kept = False
        self._connection = self._client.connect(self._target)
        self._send()
