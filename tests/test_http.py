"""
The HTTP client by itself, against servers of a few lines that say byte for byte what a test wants.
"""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Self

import pytest
import shell
from weather import Authority, StormyS3

from kserve_pvc.backends._http import client as _http
from kserve_pvc.backends._http.client import HTTPClient
from kserve_pvc.backends._http.dial import bypasses_proxy
from kserve_pvc.backends._http.target import HTTPError, Target, target_of
from kserve_pvc.backends._http.wire import POLL_SECONDS

HERE = "127.0.0.1"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"


class Server:
    """
    Accepts connections and answers each request on them with what `act` says: bytes to send, or a function of the
    connection.

    `act` gets the number of the connection and the number of the request on it; None closes the connection. `asked`
    holds the heads of all requests, with the number of their connection.
    """

    def __init__(self, act: Callable[[int, int], object], tls: ssl.SSLContext | None = None) -> None:
        self._act = act
        self._tls = tls
        self._server = socket.create_server((HERE, 0))
        self.port = self._server.getsockname()[1]
        self.asked: list[tuple[int, bytes]] = []
        self.connections = 0
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for connection in self._open:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
        for connection in self._open:
            connection.close()

    def target(self, path: str = "/", *, scheme: str | None = None) -> Target:
        return Target(scheme or ("https" if self._tls else "http"), HERE, self.port, path)

    def _start(self, act: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=act, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                raw, _ = self._server.accept()
                self.connections += 1
                self._open.append(raw)
                self._start(self._serve, raw, self.connections)

    def _serve(self, raw: socket.socket, number: int) -> None:
        connection = raw
        with suppress(OSError):
            if self._tls is not None:
                connection = self._tls.wrap_socket(raw, server_side=True)
                self._open.append(connection)
            turn = 0
            while head := read_head(connection):
                turn += 1
                self.asked.append((number, head))
                said = self._act(number, turn)
                if callable(said):
                    said(connection)
                elif said is not None:
                    connection.sendall(said)
                else:
                    break
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        connection.close()


def read_head(connection: socket.socket) -> bytes:
    data = b""
    while not data.endswith(b"\r\n\r\n"):
        piece = connection.recv(1)
        if not piece:
            return b""
        data += piece
    return data


def always(said: object) -> Callable[[int, int], object]:
    return lambda connection, turn: said


@contextmanager
def answering(act: object, tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    with Server(act if callable(act) else always(act), tls) as server:
        yield server


@pytest.fixture
def client() -> Iterator[HTTPClient]:
    """
    A client without proxies.
    """
    made = HTTPClient(environ={})
    yield made
    made.close()


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def tls(authority) -> ssl.SSLContext:
    """
    A server's side of TLS.
    """
    return authority.context("server")


@pytest.fixture(autouse=True)
def nothing_is_left_open():
    """
    However an exchange ends, no descriptor is left over.
    """
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) <= before


def get(
    client: HTTPClient,
    target: Target,
    *,
    method: str = "GET",
    headers: dict[str, str] | None = None,
    limit: int = 10**6,
) -> tuple[int, bytes]:
    with client.open(method, target, headers or {}) as answer:
        return answer.status, answer.read(limit, time.monotonic() + 10)


def test_a_request_is_what_was_asked_for(client):
    """
    Method, path, host and headers go out as given, and no encoding but the plain one is asked for.
    """
    with answering(OK) as server:
        found = get(client, server.target("/a%20b?x=1"), headers={"Range": "bytes=0-4", "if-match": '"e"'})
        (_, head), port = server.asked[0], server.port

    assert found == (200, b"hello")
    assert head.decode().split("\r\n") == [
        "GET /a%20b?x=1 HTTP/1.1",
        f"Host: {HERE}:{port}",
        "Accept-Encoding: identity",
        "Range: bytes=0-4",
        'if-match: "e"',
        "",
        "",
    ]


@pytest.mark.parametrize(
    ("url", "target", "authority"),
    [
        ("http://host", ("http", "host", 80, "/"), "host"),
        ("https://Host:443/a?b=c#d", ("https", "host", 443, "/a?b=c"), "host"),
        ("https://host:8443/", ("https", "host", 8443, "/"), "host:8443"),
        ("http://user:word@host:80/x", ("http", "host", 80, "/x"), "host"),
        ("http://[::1]:9000/a/", ("http", "::1", 9000, "/a/"), "[::1]:9000"),
        ("https://[::1]", ("https", "::1", 443, "/"), "[::1]"),
    ],
)
def test_an_address_is_taken_apart(url, target, authority):
    """
    The port goes into the Host header where it is not the usual one, credentials of a URL go nowhere.
    """
    found = target_of(url)

    assert (tuple(found), found.authority) == (target, authority)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "host",
        "ftp://host/",
        "http://",
        "http:///path",
        "http://host:0",
        "http://host:99999",
        "http://host:x",
        "http://[::1",
    ],
)
def test_what_is_no_address_is_refused(url):
    """
    Anything but an http or https URL of a host is one error that no retry cures.
    """
    with pytest.raises(HTTPError) as caught:
        target_of(url)

    assert caught.value.is_final


BODIES = {
    "length": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    "lower-case": b"HTTP/1.1 200 OK\r\ncontent-length:5\r\n\r\nhello",
    "blanks": b"HTTP/1.1 200 OK\r\nContent-Length: \t 5 \t\r\n\r\nhello",
    "length-twice": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX: y\r\nContent-Length: 5\r\n\r\nhello",
    "length-list": b"HTTP/1.1 200 OK\r\nContent-Length: 5, 5\r\n\r\nhello",
    "no-reason": b"HTTP/1.1 200\r\nContent-Length: 5\r\n\r\nhello",
    "interim": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nContent-Length: 9\r\n\r\n" + OK,
    "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n",
    "Chunked": b"HTTP/1.1 200 OK\r\nTRANSFER-ENCODING: CHUNKED\r\n\r\n05\r\nhello\r\n000\r\n\r\n",
    "extensions": b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;a="b";c\r\nhello\r\n0;z\r\n\r\n',
    "trailers": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n"
    b"\r\n5\r\nhello\r\n0\r\nX-Sum: 1\r\nX-More: 2\r\n\r\n",
}


@pytest.mark.parametrize("pieces", ["at-once", "byte-by-byte"])
@pytest.mark.parametrize("name", BODIES)
def test_an_answer_is_read_to_its_end_and_the_connection_kept(client, name, pieces):
    """
    However the end of a body is told, and however it arrives, its bytes are exact and the next request uses the same
    connection.
    """

    def act(connection: int, turn: int) -> object:
        return BODIES[name] if pieces == "at-once" else bytewise

    def bytewise(connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in BODIES[name]:
            connection.sendall(bytes([byte]))
            time.sleep(0.0005)

    with answering(act) as server:
        found = [get(client, server.target()) for _ in range(3)]
        connections = {number for number, _ in server.asked}

    assert (found, connections) == ([(200, b"hello")] * 3, {1})


@pytest.mark.parametrize("size", [1, 100, 70_000, 600_000])
@pytest.mark.parametrize("coding", ["length", "chunked", "close"])
def test_a_body_of_any_size_is_read_through_any_buffer(client, size, coding):
    """
    What came with the head and what came later are put together as they were sent.
    """
    body = bytes(range(256)) * (size // 256 + 1)
    body = body[:size]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(body[i : i + 999]), body[i : i + 999]) for i in range(0, size, 999))
    answer = {
        "length": b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (size, body),
        "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%b0\r\n\r\n" % chunks,
        "close": b"HTTP/1.1 200 OK\r\n\r\n" + body,
    }[coding]
    send = (
        (lambda c: (c.sendall(answer), c.shutdown(socket.SHUT_WR)))
        if coding == "close"
        else (lambda c: c.sendall(answer))
    )

    with answering(lambda connection, turn: send) as server:
        for buffer_bytes in (7, 4096, 10**6) if size < 1000 else (4096, 10**6):
            data, buffer = b"", memoryview(bytearray(buffer_bytes))
            with client.open("GET", server.target(), {}) as answered:
                while (count := answered.readinto(buffer)) != 0:
                    data += buffer[: count or 0]
            assert data == body


@pytest.mark.parametrize(
    ("method", "head", "kept"),
    [
        ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", True),
        ("HEAD", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", True),
        ("GET", b"HTTP/1.1 204 No Content\r\n\r\n", True),
        ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", True),
        ("GET", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", True),
        ("GET", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", False),
        ("GET", b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n", False),
        ("GET", b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\nConnection: Keep-Alive\r\n\r\n", True),
    ],
)
def test_answers_without_a_body_are_over_at_once(client, method, head, kept):
    """
    Nothing is waited for where nothing comes, and a connection is kept if its server keeps it.
    """
    with answering(head) as server:
        began = time.monotonic()
        bodies = [get(client, server.target(), method=method)[1] for _ in range(2)]
        connections = len({number for number, _ in server.asked})

    assert (bodies, connections, time.monotonic() - began < 1) == ([b"", b""], 1 if kept else 2, True)


def test_the_headers_of_an_answer_are_found_by_name(client):
    """
    Names are compared without case, values come without blanks, and one that comes twice has both.
    """
    head = (
        b'HTTP/1.1 200 OK\r\nETag:  "x"\r\nX-Twice: 1\r\nx-twice: '
        b"2\r\nX-Empty:\r\nX-ETag: no\r\nContent-Length: 0\r\n\r\n"
    )
    with answering(head) as server, client.open("GET", server.target(), {}) as answer:
        found = [answer.header(name) for name in ("etag", "x-twice", "x-empty", "none")]
        everything = answer.headers

    assert found == ['"x"', "1, 2", "", None]
    assert everything == {"etag": '"x"', "x-twice": "1, 2", "x-empty": "", "x-etag": "no", "content-length": "0"}


MALFORMED = {
    "no-http": b"SSH-2.0-OpenSSH\r\n\r\n",
    "http-2": b"HTTP/2.0 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    "no-status": b"HTTP/1.1 OK\r\nContent-Length: 5\r\n\r\nhello",
    "two-lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    "negative-length": b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nhello",
    "signed-length": b"HTTP/1.1 200 OK\r\nContent-Length: +5\r\n\r\nhello",
    "underlined-length": b"HTTP/1.1 200 OK\r\nContent-Length: 0_5\r\n\r\nhello",
    "endless-length": b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\nhello",
    "foreign-digits": "HTTP/1.1 200 OK\r\nContent-Length: ²\r\n\r\nhello".encode("latin-1"),
    "length-and-chunks": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "folded-coding": b"HTTP/1.1 200 OK\r\nTransfer-Encoding:\r\n chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "two-codings": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "gzip": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nhello",
    "huge-head": b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 40_000 + b"\r\nContent-Length: 5\r\n\r\nhello",
    "interim-for-ever": b"HTTP/1.1 100 Continue\r\n\r\n" * 20 + OK,
    "chunk-without-length": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\r\nhello\r\n0\r\n\r\n",
    "chunk-of-nonsense": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\nhello\r\n0\r\n\r\n",
    "chunk-with-sign": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n+5\r\nhello\r\n0\r\n\r\n",
    "chunk-below-0": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n0\r\n\r\n",
    "chunk-in-python": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0x5\r\nhello\r\n0\r\n\r\n",
    "chunk-underlined": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0_5\r\nhello\r\n0\r\n\r\n",
    "chunk-too-long": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhello\r\n0\r\n\r\n",
    "chunk-line-too-long": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;"
    + b"x" * 4000
    + b"\r\nhello\r\n0\r\n\r\n",
    "trailers-for-ever": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n"
    + b"x: y\r\n" * 200
    + b"\r\n",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_an_answer_that_makes_no_sense_is_an_error(client, name):
    """
    What is not HTTP, or could be read in two ways, is refused, and its connection is never used again.
    """
    with answering(MALFORMED[name]) as server:
        for _ in range(2):
            with pytest.raises(HTTPError):
                get(client, server.target())
        connections = len({number for number, _ in server.asked})

    assert connections == 2


CUT = {
    "before-the-head": b"",
    "in-the-head": b"HTTP/1.1 200 OK\r\nContent-Le",
    "after-the-head": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n",
    "in-the-body": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhell",
    "in-a-chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhell",
    "after-a-chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
    "in-the-trailer": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX: y\r\n",
}


@pytest.mark.parametrize("name", CUT)
def test_an_answer_that_breaks_off_is_an_error(client, name):
    """
    Where a body has an end of its own, the end of the connection is none.
    """
    with answering(lambda connection, turn: lambda c: (c.sendall(CUT[name]), c.shutdown(socket.SHUT_WR))) as server:
        with pytest.raises(HTTPError) as caught:
            get(client, server.target())

        assert (caught.value.is_final, len(server.asked)) == (False, 1)


def test_a_kept_connection_that_the_server_closed_is_replaced_once(client):
    """
    A request on a connection that had ended goes out again on a new one, and the caller does not notice.
    """
    with answering(lambda connection, turn: OK if turn == 1 else None) as server:
        found = [get(client, server.target()) for _ in range(3)]
        asked = [number for number, _ in server.asked]

    assert found == [(200, b"hello")] * 3
    assert asked == [1, 1, 2, 2, 3]


def test_a_new_connection_that_ends_is_not_replaced(client):
    """
    Only a connection that was kept may be stale: what a new one says counts.
    """
    with answering(lambda connection, turn: OK if connection == 1 and turn == 1 else None) as server:
        get(client, server.target())
        with pytest.raises(HTTPError, match="without a response"):
            get(client, server.target())
        asked = [number for number, _ in server.asked]

    assert asked == [1, 1, 2]


def test_an_answer_that_breaks_off_on_a_kept_connection_is_no_stale_one(client):
    """
    Once something of an answer has come, nothing is sent a second time by itself.
    """
    half = lambda c: (c.sendall(b"HTTP/1.1 200 OK\r\nContent-"), c.shutdown(socket.SHUT_WR))  # noqa: E731
    with answering(lambda connection, turn: OK if turn == 1 else half) as server:
        get(client, server.target())
        with pytest.raises(HTTPError, match="inside a response header"):
            get(client, server.target())

        assert len(server.asked) == 2


def test_a_connection_that_was_idle_for_long_is_not_used(client, monkeypatch):
    """
    A connection older than servers keep them is closed instead of tried.
    """
    with answering(OK) as server:
        get(client, server.target())
        monkeypatch.setattr(_http, "_MAX_IDLE_SECONDS", 0.0)
        get(client, server.target())

        assert [number for number, _ in server.asked] == [1, 2]


@pytest.mark.parametrize("surplus", [b"garbage", b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison"])
@pytest.mark.parametrize("moment", ["with-the-body", "later"])
@pytest.mark.parametrize("body", ["length", "chunked", "trailers"])
def test_what_comes_after_an_answer_answers_nothing(client, surplus, moment, body):
    """
    Bytes that nobody asked for end a connection: they are never taken for the next answer.
    """

    def act(number: int, turn: int) -> object:
        if (number, turn) != (1, 1):
            return OK.replace(b"hello", b"HELLO")
        if moment == "with-the-body":
            return BODIES[body] + surplus
        return lambda c: (c.sendall(BODIES[body]), sent.wait(5), c.sendall(surplus), done.set())

    sent, done = threading.Event(), threading.Event()
    with answering(act) as server:
        first = get(client, server.target())
        sent.set()
        assert moment == "with-the-body" or done.wait(5)
        time.sleep(0.05)
        second = get(client, server.target())

        assert (first[1], second[1], server.asked[-1][0]) == (b"hello", b"HELLO", 2)


def test_a_body_that_nobody_read_to_its_end_ends_its_connection(client):
    """
    The rest of an answer is not taken for the next one.
    """
    with answering(OK) as server:
        with client.open("GET", server.target(), {}) as answer:
            answer.readinto(memoryview(bytearray(2)))
        found = get(client, server.target())

        assert (found, [number for number, _ in server.asked]) == ((200, b"hello"), [1, 2])


def test_a_failure_of_the_caller_ends_the_connection(client):
    """
    An answer that was read to its end in vain is not worth a risk.
    """
    with answering(OK) as server:
        with suppress(ZeroDivisionError), client.open("GET", server.target(), {}) as answer:
            answer.read(100, time.monotonic() + 5)
            raise ZeroDivisionError
        get(client, server.target())

        assert [number for number, _ in server.asked] == [1, 2]


def test_a_body_larger_than_wanted_is_refused(client):
    """
    A small body is read as far as its limit and not beyond.
    """
    with answering(OK) as server:
        assert get(client, server.target(), limit=5) == (200, b"hello")
        with pytest.raises(HTTPError, match="longer than 4 bytes"):
            get(client, server.target(), limit=4)


def test_threads_share_a_client_and_no_connection(client):
    """
    Each of many threads gets the answers to its own questions.
    """

    def act(number: int, turn: int) -> object:
        return lambda c: c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n%8b" % path_of(number, server))

    def ask(name: str) -> None:
        for turn in range(20):
            path = f"/{name}{turn:02d}"
            found.append(get(client, server.target(path))[1].strip() == path.encode())

    found: list[bool] = []
    with answering(act) as server:
        threads = [threading.Thread(target=ask, args=(name,)) for name in "abcdef"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert (found, server.connections <= 6) == ([True] * 120, True)


def path_of(number: int, server: Server) -> bytes:
    """What was asked last on a connection."""
    return next(head for connection, head in reversed(list(server.asked)) if connection == number).split(b" ")[1]


@pytest.mark.parametrize("step", ["head", "body", "chunk-size", "chunk-end", "trailer"])
def test_silence_lets_the_caller_look_up(client, step):
    """
    Wherever an answer stops, a read returns within a moment and says that nothing has come.
    """
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    said = {
        "head": b"HTTP/1.1 200 OK\r\n",
        "body": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhe",
        "chunk-size": chunked + b"2",
        "chunk-end": chunked + b"2\r\nhe",
        "trailer": chunked + b"2\r\nhe\r\n0\r\nX: y",
    }[step]
    with answering(said) as server:
        assert silent_calls(client, server, until=1) <= POLL_SECONDS + 0.35


def silent_calls(client: HTTPClient, server: Server, until: int) -> float:
    """
    How long the calls take that find nothing.
    """
    buffer, calls, seconds = memoryview(bytearray(100)), 0, 0.0
    with client.send("GET", server.target(), {}) as exchange:
        while calls < until:
            began = time.monotonic()
            answer = exchange.response()
            count = None if answer is None else answer.readinto(buffer)
            if count is None:
                calls, seconds = calls + 1, seconds + time.monotonic() - began
            assert count != 0
    return seconds


@pytest.mark.parametrize("step", ["head", "chunk-size", "trailer"])
@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
def test_a_drip_lets_the_caller_look_up(authority, tls, step, secure):
    """
    A server that sends byte by byte what is not the body keeps nobody for longer than a moment.
    """
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    first, rest = {
        "head": (b"", b"HTTP/1.1 200 OK\r\nX: " + b"x" * 1000),
        "chunk-size": (chunked, b"5;" + b"x" * 900),
        "trailer": (chunked + b"0\r\n", b"X: " + b"x" * 900),
    }[step]

    def drip(connection: socket.socket) -> None:
        connection.sendall(first)
        for byte in rest:
            connection.sendall(bytes([byte]))
            time.sleep(0.01)

    made = HTTPClient(environ={}, ca_bundle=str(authority.file))
    with answering(lambda connection, turn: drip, tls if secure else None) as server:
        seconds = silent_calls(made, server, until=1)
    made.close()

    assert seconds <= POLL_SECONDS + 0.35


def test_an_answer_that_does_not_come_is_given_up(client):
    """
    Whoever waits for an answer waits for a time that is known.
    """
    client.response_seconds = 0.3
    with (
        answering(lambda connection, turn: b""),
        answering(b"") as server,
        pytest.raises(HTTPError, match="no response within"),
    ):
        get(client, server.target())


@pytest.mark.parametrize("text", ["a\r\nX-Evil: 1", "a\nb", "a\rb", "€"])
@pytest.mark.parametrize("place", ["value", "name", "path"])
def test_nothing_is_put_into_a_request_through_a_header(client, text, place):
    """
    Line breaks, and what HTTP cannot write, are one error before a byte of them is sent.
    """
    with answering(OK) as server:
        target = server.target(f"/{text}" if place == "path" else "/")
        headers = {"value": {"if-match": text}, "name": {text: "1"}, "path": {}}[place]
        with pytest.raises(HTTPError) as caught:
            get(client, target, headers=headers)

        assert (caught.value.is_final, server.asked) == (True, [])


def test_a_port_where_nobody_listens_is_an_error_that_may_pass(client):
    """
    No connection is told with the address, and worth another try.
    """
    with socket.create_server((HERE, 0)) as taken:
        port = taken.getsockname()[1]

    with pytest.raises(HTTPError, match=f"{HERE}:{port}.*refused") as caught:
        get(client, Target("http", HERE, port, "/"))

    assert not caught.value.is_final


@pytest.mark.parametrize("name", BODIES)
def test_answers_under_tls_are_those_in_the_clear(authority, tls, name):
    """
    A connection under TLS is read exactly and kept like any other.
    """
    made = HTTPClient(environ={}, ca_bundle=str(authority.file))
    with answering(BODIES[name], tls) as server:
        found = [get(made, server.target()) for _ in range(3)]
        connections = server.connections
    made.close()

    assert (found, connections) == ([(200, b"hello")] * 3, 1)


def test_a_large_body_under_tls_is_exact(authority, tls):
    """
    Many records fill one buffer, and none is lost between two reads.
    """
    body = os.urandom(3_000_000)
    made = HTTPClient(environ={}, ca_bundle=str(authority.file))
    with answering(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body), tls) as server:
        for size in (1000, 512 * 1024):
            data, buffer = bytearray(), memoryview(bytearray(size))
            with made.open("GET", server.target(), {}) as answer:
                while (count := answer.readinto(buffer)) != 0:
                    data += buffer[: count or 0]
            assert data == body
        assert server.connections == 1
    made.close()


def test_silence_inside_a_record_is_no_end(authority, tls):
    """
    What cannot be decrypted yet counts as nothing so far: a read returns within a moment, and again when the rest has
    come.
    """
    more, done = threading.Event(), threading.Event()

    def send_in_two(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        session = tls.wrap_bio(incoming, outgoing, server_side=True)
        with connection:
            for step in (session.do_handshake, lambda: session.read(1000)):
                finish_step(step, connection, incoming, outgoing)
            session.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2000\r\n\r\n" + b"a" * 1000)
            session.write(b"b" * 1000)
            records = outgoing.read()
            connection.sendall(records[:-500])
            more.wait(10)
            connection.sendall(records[-500:])
            done.wait(10)

    made, buffer = HTTPClient(environ={}, ca_bundle=str(authority.file)), memoryview(bytearray(5000))
    with socket.create_server((HERE, 0)) as listener:
        thread = threading.Thread(target=send_in_two, args=(listener,))
        thread.start()
        with made.open("GET", Target("https", HERE, listener.getsockname()[1], "/"), {}) as answer:
            began = time.monotonic()
            found = [answer.readinto(buffer), answer.readinto(buffer)]
            seconds = time.monotonic() - began
            more.set()
            found.append(answer.readinto(buffer))
        done.set()
        thread.join()
    made.close()

    assert (found, bytes(buffer[:1000])) == ([1000, None, 1000], b"b" * 1000)
    assert seconds < 4 * POLL_SECONDS


def finish_step(
    step: Callable[[], object], connection: socket.socket, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO
) -> None:
    """
    Do one thing of TLS on memory, with a socket behind it.
    """
    is_done = False
    while not is_done:
        try:
            step()
            is_done = True
        except ssl.SSLWantReadError:
            connection.sendall(outgoing.read())
            incoming.write(connection.recv(100_000))
    connection.sendall(outgoing.read())


@pytest.mark.parametrize("after", ["silence", "drip"])
def test_a_handshake_that_does_not_end_is_given_up(client, monkeypatch, after):
    """
    A server that accepts and says nothing, or next to nothing, does not hold a connection up for ever.
    """
    monkeypatch.setattr(_http, "CONNECT_SECONDS", 0.5)

    def hang(listener: socket.socket) -> None:
        with suppress(OSError):
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"\x16\x03\x03\x40\x00" if after == "drip" else b"")
                while after == "silence" and connection.recv(1000):
                    pass
                for _ in range(60):
                    connection.sendall(b"\x02")
                    time.sleep(0.05)

    with socket.create_server((HERE, 0)) as listener:
        thread = threading.Thread(target=hang, args=(listener,))
        thread.start()
        began = time.monotonic()
        with pytest.raises(HTTPError):
            get(client, Target("https", HERE, listener.getsockname()[1], "/"))
        seconds = time.monotonic() - began
        thread.join()

    assert seconds < 2


def proxied(server: Server, **variables: str) -> HTTPClient:
    return HTTPClient(environ={"http_proxy": f"http://us%40er:pa%3Ass@{HERE}:{server.port}", **variables})


def test_a_proxy_gets_whole_addresses_and_its_password():
    """
    Plain requests go to the proxy as absolute URLs, with the password for it, and the connection is kept.
    """
    with answering(OK) as proxy:
        made = proxied(proxy)
        found = [get(made, target_of("http://nowhere.invalid:8080/a?b=c")) for _ in range(2)]
        made.close()

        assert (found, proxy.connections) == ([(200, b"hello")] * 2, 1)
    lines = proxy.asked[0][1].decode().split("\r\n")
    assert lines[:2] == ["GET http://nowhere.invalid:8080/a?b=c HTTP/1.1", "Host: nowhere.invalid:8080"]
    assert "Proxy-Authorization: Basic dXNAZXI6cGE6c3M=" in lines


@pytest.mark.parametrize(
    ("variables", "is_direct"),
    [
        ({"no_proxy": "127.0.0.1"}, True),
        ({"NO_PROXY": "other, 127.0.0.1 "}, True),
        ({"no_proxy": "*"}, True),
        ({"no_proxy": "27.0.0.1"}, False),
        ({"no_proxy": "10.0.0.0/8,127.0.0.0/8"}, True),
        ({"no_proxy": "10.0.0.0/8"}, False),
        ({"no_proxy": ""}, False),
        ({"http_proxy": "", "HTTP_PROXY": "", "https_proxy": "http://nowhere.invalid:1"}, True),
    ],
)
def test_no_proxy_is_asked_where_none_is_wanted(variables, is_direct):
    """
    Names of hosts in NO_PROXY are reached directly; a part of a name is no name.
    """
    with answering(OK) as proxy, answering(OK.replace(b"hello", b"there")) as server:
        made = proxied(proxy, **variables)
        found = get(made, server.target())
        made.close()

    assert found == (200, b"there" if is_direct else b"hello")


@pytest.mark.parametrize(
    ("url", "entry", "expected"),
    [
        ("http://10.1.2.3:9000/", "10.0.0.0/8", True),
        ("http://10.1.2.3:9000/", "10.1.2.3/32", True),
        ("http://10.1.2.3:9000/", "10.1.2.4/32", False),
        ("http://10.1.2.3:9000/", "10.1.2.3/8", True),
        ("http://10.1.2.3:9000/", "10.1.2.0/40", False),
        ("http://10.1.2.3:9000/", "10.1.2.3:9000", True),
        ("http://10.1.2.3:9000/", "10.1.2.3:9001", False),
        ("http://10.1.2.3:9000/", "2.3", False),
        ("http://ten.example/", "10.0.0.0/8", False),
        ("http://[::1]:9000/", "[::1]", True),
        ("http://[::1]:9000/", "::1", True),
        ("http://[::1]:9000/", "[::1]:9000", True),
        ("http://[::1]:9000/", "[::1]:9001", False),
        ("http://[0:0:0:0:0:0:0:1]/", "::1", True),
        ("http://[fd00::5]/", "fd00::/8", True),
        ("http://[fd00::5]/", "fe80::/10", False),
        ("http://[fd00::5]/", "10.0.0.0/8", False),
        ("http://minio.svc.cluster.local/", "svc.cluster.local", True),
        ("http://minio.svc.cluster.local/", ".cluster.local", True),
        ("http://minio.svc.cluster.local/", "*.cluster.local", True),
        ("http://minio.svc.cluster.local./", "cluster.local", True),
        ("http://minio.svc.cluster.local/", "ter.local", False),
        ("http://Minio/", "MINIO", True),
        ("http://minio/", "minio:443", False),
        ("http://minio/", "minio:80", True),
        ("http://minio/", "/8", False),
        ("http://minio/", "[", False),
    ],
)
def test_no_proxy_names_hosts_domains_addresses_and_networks(url, entry, expected):
    """
    Entries mean what they mean for `requests`, and addresses of IPv6 may have brackets and a port.
    """
    assert [bypasses_proxy(target_of(url), f"other, {entry},") for _ in range(2)] == [expected] * 2


@pytest.mark.parametrize("environ", [{"HTTP_PROXY": "x"}, {"ALL_PROXY": "x"}, {"http_proxy": "x"}])
def test_a_header_of_a_request_names_no_proxy(environ):
    """
    Under CGI, HTTP_PROXY may come from whoever asks, and does not count; the others do.
    """
    with answering(OK) as proxy, answering(OK.replace(b"hello", b"there")) as server:
        made = HTTPClient(environ={**dict.fromkeys(environ, f"http://{HERE}:{proxy.port}"), "REQUEST_METHOD": "GET"})
        found = get(made, server.target())
        made.close()

    assert found == (200, b"there" if "HTTP_PROXY" in environ else b"hello")


@pytest.mark.parametrize("url", ["socks5://host:1080", "https://host:1", "http://", "http://host:x", "http://[::1"])
def test_a_proxy_that_cannot_be_used_is_named(url):
    """
    A proxy of another kind is an error that no retry cures, and never left out quietly.
    """
    made = HTTPClient(environ={"http_proxy": url})

    with pytest.raises(HTTPError, match="proxy") as caught:
        get(made, target_of("http://nowhere.invalid/"))

    assert caught.value.is_final


def tunnelling(answer: bytes, server: Server) -> Callable[[int, int], object]:
    """
    A proxy that answers CONNECT and passes on what follows.
    """

    def passing(near: socket.socket) -> None:
        near.sendall(answer)
        with socket.create_connection((HERE, server.port)) as far:
            back = threading.Thread(target=pump, args=(far, near))
            back.start()
            pump(near, far)
            back.join()

    return lambda connection, turn: passing if answer.startswith(b"HTTP/1.1 200") else answer


def pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
def test_decrypting_is_told_from_waiting(authority, tls, secure):
    """
    A connection says how long it has decrypted; waiting for a server that takes its time does not count.
    """
    body = os.urandom(4_000_000)

    def slowly(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body))
        time.sleep(0.3)
        connection.sendall(body)

    with answering(lambda connection, turn: slowly, tls if secure else None) as server:
        made = HTTPClient(environ={}, ca_bundle=str(authority.file))
        began = time.monotonic()
        with made.open("GET", server.target(), {}) as got:
            while got.readinto(memoryview(bytearray(1_000_000))) != 0:
                pass
            worked, taken = got.worked, time.monotonic() - began
        made.close()

    assert (worked > 0) is secure
    assert worked < taken - 0.25


def test_a_tunnel_goes_through_a_proxy(authority, tls):
    """
    Under TLS the proxy learns the name of the host and the password for itself, and nothing of the request.
    """
    with (
        answering(OK, tls) as server,
        answering(tunnelling(b"HTTP/1.1 200 Connected\r\nX: y\r\n\r\n", server)) as proxy,
    ):
        made = HTTPClient(
            environ={"https_proxy": f"http://user:word@{HERE}:{proxy.port}"}, ca_bundle=str(authority.file)
        )
        found = [get(made, server.target("/secret"), headers={"authorization": "secret"}) for _ in range(2)]
        made.close()

        assert found == [(200, b"hello")] * 2
    lines = proxy.asked[0][1].decode().split("\r\n")
    assert lines[:2] == [f"CONNECT {HERE}:{server.port} HTTP/1.1", f"Host: {HERE}:{server.port}"]
    assert ("Proxy-Authorization: Basic dXNlcjp3b3Jk" in lines, len(proxy.asked)) == (True, 1)
    assert b"Proxy-Authorization" not in server.asked[0][1]


@pytest.mark.parametrize(("status", "is_final"), [(403, True), (407, True), (502, False), (503, False)])
def test_a_tunnel_that_is_refused_is_an_error(authority, tls, status, is_final):
    """
    What a proxy answers to CONNECT is told; whether another try makes sense follows from it.
    """
    with (
        answering(OK, tls) as server,
        answering(tunnelling(b"HTTP/1.1 %d No\r\nContent-Length: 0\r\n\r\n" % status, server)) as proxy,
    ):
        made = HTTPClient(environ={"https_proxy": f"http://{HERE}:{proxy.port}"}, ca_bundle=str(authority.file))
        with pytest.raises(HTTPError, match=str(status)) as caught:
            get(made, server.target())

        assert (caught.value.is_final, server.connections) == (is_final, 0)


def test_a_closed_client_goes_on_with_new_connections(client):
    """
    Letting go of idle connections ends nothing but these.
    """
    with answering(OK) as server:
        get(client, server.target())
        client.close()
        found = get(client, server.target())

        assert (found, [number for number, _ in server.asked]) == ((200, b"hello"), [1, 2])


def test_a_client_that_nobody_holds_closes_its_connections():
    """
    Whoever forgets a client leaves no connection open.
    """
    with answering(OK) as server:
        made = HTTPClient(environ={})
        get(made, server.target())
        before = len(os.listdir("/proc/self/fd"))
        del made

        # The other side may have closed its end by now.
        assert len(os.listdir("/proc/self/fd")) <= before - 1


FORKED = """
import os, sys
from kserve_pvc._source.ref import parse_ref
from kserve_pvc.backends.s3 import S3Backend

ref, backend = parse_ref(sys.argv[1]), S3Backend({})
assert len(backend.resolve(ref).files) == 1
child = os.fork()
if child == 0:
    os._exit(len(backend.resolve(ref).files) - 1)
assert len(backend.resolve(ref).files) == 1
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_forked_child_makes_connections_of_its_own():
    """
    A connection that was open at the time of a fork goes on being used by the parent alone.
    """
    with StormyS3() as storm:
        storm.put("bucket", "model/config.json", b"{}")
        names = {
            "AWS_ACCESS_KEY_ID": storm.key,
            "AWS_SECRET_ACCESS_KEY": storm.secret,
            "AWS_SESSION_TOKEN": storm.token,
        }
        shell.python(FORKED, "s3://bucket/model", env={**names, "AWS_ENDPOINT_URL": storm.endpoint, "HOME": "/none"})

        assert storm.connections == 2
