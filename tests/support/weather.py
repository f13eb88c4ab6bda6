"""
A small S3 server with weather, certificates of our own, and a proxy to reach it through.

It exists because no real server resets, stalls, lies or changes its mind at the request that a test names. What a real
server can show is tested on a real one.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import math
import select
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from xml.sax.saxutils import escape

HERE = "127.0.0.1"
ELSEWHERE = "127.0.0.2"
# A name that no resolver knows: who reaches it went through the proxy.
UNKNOWN_HOST = "s3.weather.invalid"

_SLICE_BYTES = 64 * 1024
_MAX_HEAD_BYTES = 64 * 1024
_REASONS = {
    200: "OK",
    206: "Partial Content",
    404: "Not Found",
    412: "Precondition Failed",
    429: "Too Many Requests",
    503: "Slow Down",
}

Kind = Literal["list", "head", "get"]


@dataclass(frozen=True, kw_only=True)
class Stored:
    """
    One object. `etag` comes without quotes, `checksums` are what S3 would announce: algorithm to base64.
    """

    data: bytes
    etag: str
    checksums: Mapping[str, str] = field(default_factory=dict)


def multipart_etag(data: bytes) -> str:
    """
    Name some content as S3 names an upload in three parts: it pins the content, and is no digest of it.
    """
    return hashlib.sha256(data).hexdigest()[:32] + "-3"


@dataclass(kw_only=True)
class Request:
    """
    One request as it arrived. `number` counts requests, `connection` connections, `turn` requests on this connection.

    `arrived_at` and `answered_at` are seconds of the monotonic clock; the latter is when the answer began. `range` is
    first byte and first byte not wanted. `status` is None if nothing was answered; `body_bytes` is what was handed to
    the network.
    """

    number: int
    connection: int
    turn: int
    method: str
    target: str
    headers: Mapping[str, str]
    arrived_at: float
    kind: Kind
    bucket: str
    key: str
    query: Mapping[str, str]
    range: tuple[int, int] | None
    answered_at: float = math.inf
    status: int | None = None
    body_bytes: int = 0
    sent_bytes: int = 0


@dataclass(kw_only=True)
class Answer:
    """
    What is sent for a request. A header of value None is left out.
    """

    status: int
    headers: dict[str, str | None]
    body: bytes = b""

    @property
    def head(self) -> bytes:
        lines = [f"HTTP/1.1 {self.status} {_REASONS.get(self.status, 'Weather')}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items() if value is not None]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")


class _HungUpError(Exception):
    """The server's side of a connection is over."""


class Exchange:
    """
    One request, its honest answer, and the means to answer otherwise.
    """

    def __init__(self, storm: StormyS3, connection: socket.socket, request: Request) -> None:
        self.storm = storm
        self.request = request
        self._connection = connection
        self._season = storm.season
        self.answer = storm.honest_answer(request)

    def reply(self, body_bytes: int | None = None) -> None:
        """
        Send the answer, or its head and the first bytes of its body.
        """
        self.request.status = self.answer.status
        self.send(self.answer.head)
        if self.request.method != "HEAD":
            self.send_body(self.answer.body[:body_bytes])
        if "close" in str(self.answer.headers.get("Connection")):
            self.hang_up()

    def send_body(self, data: bytes) -> None:
        for start in range(0, len(data), _SLICE_BYTES):
            piece = data[start : start + _SLICE_BYTES]
            self.request.body_bytes += len(piece)  # Counted first: a client that has its last byte may ask at once.
            self.send(piece)

    def send(self, data: bytes) -> None:
        self.request.answered_at = min(self.request.answered_at, time.monotonic())
        self.request.sent_bytes += len(data)
        self._connection.sendall(data)

    def hang_up(self, *, hard: bool = False) -> None:
        """
        Close the connection: after what was sent, or `hard` so that what was not read yet is lost. TLS is not told
            either way.
        """
        if hard:
            self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise _HungUpError

    def wait(self, seconds: float = math.inf) -> None:
        """
        Say nothing for some time; hang up once the client is gone or the weather is over.
        """
        until = time.monotonic() + seconds
        gone = select.poll()
        gone.register(self._connection, select.POLLRDHUP)
        while time.monotonic() < until:
            if gone.poll(min(20.0, max(0.0, until - time.monotonic()) * 1000)) or self.storm.season != self._season:
                raise _HungUpError


Misbehaviour = Callable[[Exchange], None]


def cut(after: int, *, hard: bool = False) -> Misbehaviour:
    """
    Send so many bytes of the body and close the connection.
    """

    def act(exchange: Exchange) -> None:
        exchange.reply(after)
        exchange.hang_up(hard=hard)

    return act


def stall(after: int) -> Misbehaviour:
    """
    Send so many bytes of the body and then nothing.
    """

    def act(exchange: Exchange) -> None:
        exchange.reply(after)
        exchange.wait()

    return act


def say(data: bytes, *, then: Literal["stay", "wait", "close"] = "close") -> Misbehaviour:
    """
    Send these bytes instead of an answer.
    """

    def act(exchange: Exchange) -> None:
        exchange.send(data)
        if then == "wait":
            exchange.wait()
        if then == "close":
            exchange.hang_up()

    return act


def say_for_ever(data: bytes) -> Misbehaviour:
    """
    Send these bytes again and again, as long as somebody reads them.
    """

    def act(exchange: Exchange) -> None:
        while True:
            exchange.send(data)
            exchange.wait(0)

    return act


def drip(seconds: float, *, head: bool = True) -> Misbehaviour:
    """
    Send the answer byte by byte with a pause before each, or only its body.
    """

    def act(exchange: Exchange) -> None:
        exchange.request.status = exchange.answer.status
        slowly = exchange.answer.body
        if head:
            slowly = exchange.answer.head + slowly
        else:
            exchange.reply(0)
        for byte in slowly:
            exchange.wait(seconds)
            exchange.send(bytes([byte]))

    return act


def refuse(status: int, code: str, *, body: bytes | None = None, **headers: str) -> Misbehaviour:
    """
    Answer with an error of S3, or with another body.
    """

    def act(exchange: Exchange) -> None:
        exchange.answer = error(status, code)
        exchange.answer.headers |= {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None:
            exchange.answer.body = body
            exchange.answer.headers["Content-Length"] = str(len(body))
        exchange.reply()

    return act


def changed(change: Callable[[Answer], object]) -> Misbehaviour:
    """
    Send the answer after a change to it; refusals are sent as they are.
    """

    def act(exchange: Exchange) -> None:
        if exchange.answer.status < 300:
            change(exchange.answer)
        exchange.reply()

    return act


def first(event: Callable[[], object]) -> Misbehaviour:
    """
    Let something happen in the bucket, and only then look what the honest answer is.
    """

    def act(exchange: Exchange) -> None:
        event()
        exchange.answer = exchange.storm.honest_answer(exchange.request)
        exchange.reply()

    return act


def error(status: int, code: str) -> Answer:
    body = (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f"<Error><Code>{code}</Code><Message>The weather is {code}.</Message></Error>"
    ).encode()
    return Answer(
        status=status, headers={"Content-Type": "application/xml", "Content-Length": str(len(body))}, body=body
    )


@dataclass(kw_only=True)
class _Rule:
    kind: Kind
    act: Misbehaviour
    times: float
    skip: int
    key: str

    def takes(self, request: Request) -> bool:
        """Whether this is one of the requests it is for; each question counts."""
        if request.kind != self.kind or not request.key.endswith(self.key) or self.times <= 0:
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.times -= 1
        return True


class StormyS3:
    """
    An S3 server on the loopback interface that keeps its objects in memory and does what its script says.

    It serves ListObjectsV2, HEAD and GET with Range and If-Match, to the one identity it knows: a request whose
    signature is wrong is refused as S3 refuses it, whichever weather was ordered.

    Args:
        tls: Speak TLS as this says.
        prefix: A path before that of the bucket.
        page_keys: How many objects one page of a listing has at most.
        pins: False ignores If-Match, as some servers do.
    """

    key = "weather-key"
    secret = "weather-secret"
    token = "weather-session-token"

    def __init__(
        self,
        *,
        host: str = HERE,
        tls: ssl.SSLContext | None = None,
        prefix: str = "",
        page_keys: int = 1000,
        pins: bool = True,
    ) -> None:
        self._host = host
        self._tls = tls
        self._prefix = prefix
        self.page_keys = page_keys
        self.pins = pins
        self.buckets: dict[str, dict[str, Stored]] = {}
        self.season = 0
        self.connections = 0
        self._requests: list[Request] = []
        self._rules: list[_Rule] = []
        self._server = _Server(host, self._serve)

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()
        self._server.stop()

    @property
    def address(self) -> tuple[str, int]:
        return (self._host, self._server.port)

    @property
    def endpoint(self) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{'https' if self._tls else 'http'}://{host}:{self._server.port}{self._prefix}"

    @property
    def options(self) -> dict[str, object]:
        """
        The `storage_options` of a store that uses this server.
        """
        return {"endpoint_url": self.endpoint, "key": self.key, "secret": self.secret, "token": self.token}

    @property
    def requests(self) -> list[Request]:
        """
        Every request so far, in the order of arrival.
        """
        with self._server.guard:
            return list(self._requests)

    def put(
        self, bucket: str, key: str, data: bytes, *, etag: str | None = None, checksums: Sequence[str] = ()
    ) -> None:
        """
        Store an object. Its ETag is the MD5 of its bytes unless another is given; `checksums` are announced when asked
        for.
        """
        made = {"SHA256": hashlib.sha256(data).digest(), "CRC32": struct.pack(">I", zlib.crc32(data))}
        announced = {name: base64.b64encode(made[name]).decode() for name in checksums}
        etag = etag or hashlib.md5(data, usedforsecurity=False).hexdigest()
        self.buckets.setdefault(bucket, {})[key] = Stored(data=data, etag=etag, checksums=announced)

    def delete(self, bucket: str, key: str) -> None:
        del self.buckets[bucket][key]

    def script(self, kind: Kind, act: Misbehaviour, *, times: float = math.inf, skip: int = 0, key: str = "") -> None:
        """
        Order weather for some requests; of several orders that fit, the earliest one counts.

        Args:
            times: How many requests it is for, after letting `skip` of them pass.
            key: How the name of the object ends.
        """
        with self._server.guard:
            self._rules.append(_Rule(kind=kind, act=act, times=times, skip=skip, key=key))

    def clear(self) -> None:
        """
        End all weather, also what is going on at the moment.
        """
        with self._server.guard:
            self._rules.clear()
            self.season += 1

    def _serve(self, raw: socket.socket) -> None:
        with self._server.guard:
            self.connections += 1
            number = self.connections
        with self._server.known(
            raw if self._tls is None else self._tls.wrap_socket(raw, server_side=True)
        ) as connection:
            turn = 0
            with suppress(_HungUpError):
                while head := _read_head(connection):
                    turn += 1
                    exchange = Exchange(self, connection, self._take(head, number, turn))
                    self._weather(exchange.request)(exchange)

    def _take(self, head: bytes, connection: int, turn: int) -> Request:
        arrived_at = time.monotonic()
        method, target, headers = _parse(head)
        bucket, _, key = unquote(urlsplit(target).path).removeprefix(self._prefix).lstrip("/").partition("/")
        with self._server.guard:
            request = Request(
                number=len(self._requests) + 1,
                connection=connection,
                turn=turn,
                method=method,
                target=target,
                headers=headers,
                arrived_at=arrived_at,
                kind="head" if method == "HEAD" else "get" if key else "list",
                bucket=bucket,
                key=key,
                query=dict(parse_qsl(urlsplit(target).query, keep_blank_values=True)),
                range=_parse_range(headers.get("range", "")),
            )
            self._requests.append(request)
        return request

    def _weather(self, request: Request) -> Misbehaviour:
        with self._server.guard:
            return next((rule.act for rule in self._rules if rule.takes(request)), Exchange.reply)

    def honest_answer(self, request: Request) -> Answer:
        """
        What a server without weather would say now.
        """
        if not unquote(urlsplit(request.target).path).startswith(f"{self._prefix}/"):
            return error(404, "NoSuchBucket")
        if not _is_signed(request, self.key, self.secret, self.token):
            return error(403, "SignatureDoesNotMatch")
        if request.bucket not in self.buckets:
            return error(404, "NoSuchBucket")
        answer = self._listing(request) if request.kind == "list" else self._object(request)
        if request.headers.get("connection", "").lower() == "close":
            answer.headers["Connection"] = "close"
        return answer

    def _object(self, request: Request) -> Answer:
        stored = self.buckets[request.bucket].get(request.key)
        if stored is None:
            return error(404, "NoSuchKey")
        if self.pins and request.headers.get("if-match", stored.etag).strip('"') != stored.etag:
            return error(412, "PreconditionFailed")
        size = len(stored.data)
        start, stop = request.range or (0, size)
        stop = min(stop, size)
        if request.range and start >= stop:
            return error(416, "InvalidRange")
        headers: dict[str, str | None] = {
            "Content-Length": str(stop - start),
            "Content-Type": "binary/octet-stream",
            "Accept-Ranges": "bytes",
            "ETag": f'"{stored.etag}"',
            "Last-Modified": "Sun, 22 Nov 2026 12:00:00 GMT",
        }
        if request.headers.get("x-amz-checksum-mode", "").upper() == "ENABLED" and stop - start == size:
            headers |= {f"x-amz-checksum-{name.lower()}": value for name, value in stored.checksums.items()}
            headers |= {"x-amz-checksum-type": "FULL_OBJECT"} if stored.checksums else {}
        if request.range:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        return Answer(status=206 if request.range else 200, headers=headers, body=stored.data[start:stop])

    def _listing(self, request: Request) -> Answer:
        prefix, after = request.query.get("prefix", ""), _key_of(request.query.get("continuation-token", ""))
        objects = self.buckets[request.bucket]
        keys = [
            key for key in sorted(objects, key=str.encode) if key.startswith(prefix) and key.encode() > after.encode()
        ]
        page = keys[: min(self.page_keys, int(request.query.get("max-keys", "1000")))]
        spelled = quote if request.query.get("encoding-type") == "url" else escape
        parts = [
            f"<Name>{escape(request.bucket)}</Name><Prefix>{spelled(prefix)}</Prefix><KeyCount>{len(page)}</KeyCount>"
        ]
        parts += ["<EncodingType>url</EncodingType>"] if spelled is quote else []
        parts += [_listed(spelled(key), objects[key]) for key in page]
        parts += [f"<IsTruncated>{'true' if len(keys) > len(page) else 'false'}</IsTruncated>"]
        if len(keys) > len(page):
            parts += [f"<NextContinuationToken>{_token_of(page[-1])}</NextContinuationToken>"]
        return listing_of("".join(parts))


def listing_of(inside: str, before: str = "") -> Answer:
    """
    A listing whose root element holds this XML, after a prologue.
    """
    root = f'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{inside}</ListBucketResult>'
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n{before}{root}'.encode()
    return Answer(status=200, headers={"Content-Type": "application/xml", "Content-Length": str(len(body))}, body=body)


def _listed(key: str, stored: Stored) -> str:
    algorithms = "".join(f"<ChecksumAlgorithm>{name}</ChecksumAlgorithm>" for name in stored.checksums)
    checksums = f"{algorithms}<ChecksumType>FULL_OBJECT</ChecksumType>" if algorithms else ""
    return (
        f"<Contents><Key>{key}</Key><LastModified>2026-11-22T12:00:00.000Z</LastModified><ETag>&quot;{stored.etag}&quot;</ETag>"
        f"{checksums}<Size>{len(stored.data)}</Size><StorageClass>STANDARD</StorageClass></Contents>"
    )


def _token_of(key: str) -> str:
    return base64.b64encode(key.encode()).decode()


def _key_of(token: str) -> str:
    return base64.b64decode(token).decode()


def _read_head(connection: socket.socket) -> bytes:
    """
    The next request, which has no body; nothing if the connection ends before it.
    """
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        piece = connection.recv(_MAX_HEAD_BYTES)
        if not piece or len(head) > _MAX_HEAD_BYTES:
            return b""
        head += piece
        if not head[:1].isalpha():  # Such as the greeting of TLS: answered as web servers do.
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            return b""
    return head


def _parse(head: bytes) -> tuple[str, str, dict[str, str]]:
    request, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    method, target, _ = request.split(" ")
    return (
        method,
        target,
        {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)},
    )


def _parse_range(value: str) -> tuple[int, int] | None:
    if not value.startswith("bytes="):
        return None
    start, _, last = value.removeprefix("bytes=").partition("-")
    return int(start), int(last) + 1 if last else 2**63


def _is_signed(request: Request, key: str, secret: str, token: str) -> bool:
    """
    Whether a request carries our signature of version 4, in its headers or in its query.
    """
    query = [
        (unquote(n), unquote(v))
        for n, _, v in (p.partition("=") for p in urlsplit(request.target).query.split("&") if p)
    ]
    fields = {name: value for name, value in query if name.startswith("X-Amz-")}
    scheme, _, rest = request.headers.get("authorization", "").partition(" ")
    if scheme == "AWS4-HMAC-SHA256":
        parts = dict(part.strip().partition("=")[::2] for part in rest.split(","))
        credential, names, signature = (parts.get(name, "") for name in ("Credential", "SignedHeaders", "Signature"))
        moment, payload = request.headers.get("x-amz-date", ""), request.headers.get("x-amz-content-sha256", "")
    else:
        credential, names, signature = (
            fields.get(f"X-Amz-{name}", "") for name in ("Credential", "SignedHeaders", "Signature")
        )
        moment, payload = fields.get("X-Amz-Date", ""), "UNSIGNED-PAYLOAD"
    if token != request.headers.get("x-amz-security-token", fields.get("X-Amz-Security-Token", "")):
        return False
    sorted_query = sorted((_spelled(n), _spelled(v)) for n, v in query if n != "X-Amz-Signature")
    canonical = [
        request.method,
        _spelled(unquote(urlsplit(request.target).path), "/"),
        "&".join(f"{name}={value}" for name, value in sorted_query),
        *(f"{name}:{' '.join(request.headers.get(name, '').split())}" for name in names.split(";")),
        "",
        names,
        payload,
    ]
    owner, _, scope = credential.partition("/")
    digest = hashlib.sha256("\n".join(canonical).encode()).hexdigest()
    signed = f"AWS4-HMAC-SHA256\n{moment}\n{scope}\n{digest}"
    signing_key = f"AWS4{secret}".encode()
    for part in scope.split("/"):
        signing_key = hmac.digest(signing_key, part.encode(), "sha256")
    required = {"host", *(name for name in request.headers if name.startswith("x-amz-"))}
    expected = hmac.digest(signing_key, signed.encode(), "sha256").hex()
    return owner == key and required <= set(names.split(";")) and hmac.compare_digest(signature, expected)


def _spelled(text: str, safe: str = "") -> str:
    return quote(text, safe=f"-_.~{safe}")


class _Server:
    """
    A listener with a thread for each connection, all of which end with it.
    """

    def __init__(self, host: str, serve: Callable[[socket.socket], None]) -> None:
        self._host = host
        self._serve = serve
        self.guard = threading.RLock()
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._closing = False

    def start(self) -> None:
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        self._listener = socket.create_server((self._host, 0), family=family, backlog=128)
        self.port = self._listener.getsockname()[1]
        self._spawn(self._accept)

    def stop(self) -> None:
        with self.guard:
            self._closing = True
            sockets = [self._listener, *self._sockets]
        for each in sockets:
            # Closing a socket wakes nobody who waits for it; shutting it down does.
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()

    @contextmanager
    def known(self, connection: socket.socket) -> Iterator[socket.socket]:
        """Have a connection closed with the server, and at the latest when the `with` is over."""
        with self.guard:
            self._sockets.add(connection)
        try:
            if self._closing:
                raise ConnectionError("the server is closing")
            with connection:
                yield connection
        finally:
            with self.guard:
                self._sockets.discard(connection)

    def _spawn(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, name="weather", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._spawn(self._guarded, connection)

    def _guarded(self, connection: socket.socket) -> None:
        with suppress(OSError, ValueError), self.known(connection):
            self._serve(connection)


class ForwardProxy:
    """
    A proxy for HTTP (absolute requests) and for TLS (CONNECT), which resolves the one name that nobody else knows.

    Args:
        target: Where `UNKNOWN_HOST` is.
        login: The `user:password` that it asks for.
        refusal: The status it answers instead of passing anything on.
    """

    def __init__(self, target: tuple[str, int], *, login: str = "", refusal: int | None = None) -> None:
        self._target = target
        self._login = login
        self.refusal = refusal
        self.heads: list[tuple[str, str, Mapping[str, str]]] = []
        self._server = _Server(HERE, self._serve)

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop()

    @property
    def url(self) -> str:
        return f"http://{self._login and self._login + '@'}{HERE}:{self._server.port}"

    def _serve(self, client: socket.socket) -> None:
        if not (head := _read_head(client)):
            return
        method, target, headers = _parse(head)
        self.heads.append((method, target, headers))
        if (status := self._refused(headers)) is not None:
            client.sendall(f"HTTP/1.1 {status} Refused\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
            return
        host, _, port = (target if method == "CONNECT" else urlsplit(target).netloc).rpartition(":")
        place = self._target if UNKNOWN_HOST in (host, port) else (host, int(port))
        with socket.create_connection(place) as plain, self._server.known(plain) as server:
            if method == "CONNECT":
                client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            else:
                server.sendall(_passed_on(method, target, head))
            _tunnel(client, server)

    def _refused(self, headers: Mapping[str, str]) -> int | None:
        expected = "Basic " + base64.b64encode(unquote(self._login).encode()).decode()
        if self._login and headers.get("proxy-authorization") != expected:
            return 407
        return self.refusal


def _passed_on(method: str, target: str, head: bytes) -> bytes:
    """The request for the server itself, the last one on its connection: the answer then ends with it."""
    parts = urlsplit(target)
    lines = [
        line for line in head.split(b"\r\n")[1:] if line and not line.lower().startswith((b"proxy-", b"connection:"))
    ]
    first_line = f"{method} {parts.path}{'?' + parts.query if parts.query else ''} HTTP/1.1".encode()
    return b"\r\n".join([first_line, *lines, b"Connection: close", b"", b""])


def _tunnel(near: socket.socket, far: socket.socket) -> None:
    other = {near: far, far: near}
    while True:
        for each in select.select([near, far], [], [])[0]:
            piece = each.recv(_SLICE_BYTES)
            if not piece:
                return
            other[each].sendall(piece)


class Authority:
    """
    A certificate authority that nobody trusts by default, made with the `openssl` command.

    Raises:
        FileNotFoundError: There is no such command.
    """

    def __init__(self, directory: Path) -> None:
        if shutil.which("openssl") is None:
            raise FileNotFoundError("openssl")
        self._directory = directory
        self.file = directory / "authority.pem"
        # Python 3.13 and later refuse an authority that does not say what its key is for (RFC 5280, 4.2.1.3).
        use = ["-addext", "keyUsage=critical,keyCertSign,cRLSign"]
        subject = ["-days", "2", "-out", str(self.file), "-subj", "/CN=Weather"]
        self._openssl("req", "-x509", *self._new_key("authority"), *use, *subject)

    def context(
        self, name: str, subjects: str = f"IP:{HERE},DNS:{UNKNOWN_HOST}", *, expired: bool = False
    ) -> ssl.SSLContext:
        """
        A server's side of TLS, with a certificate for these subjects.
        """
        request, certificate, extensions = (self._directory / f"{name}.{suffix}" for suffix in ("csr", "pem", "ext"))
        extensions.write_text(f"subjectAltName={subjects}\nsubjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n")
        self._openssl("req", "-new", *self._new_key(name), "-out", str(request), "-subj", f"/CN={name}")
        authority = ["-CA", str(self.file), "-CAkey", str(self._directory / "authority.key"), "-CAcreateserial"]
        days = self._days(expired)
        self._openssl(
            "x509",
            "-req",
            "-in",
            str(request),
            *authority,
            "-extfile",
            str(extensions),
            *days,
            "-out",
            str(certificate),
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, self._directory / f"{name}.key")
        return context

    def _new_key(self, name: str) -> list[str]:
        kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        return [*kind, "-keyout", str(self._directory / f"{name}.key")]

    def _days(self, expired: bool) -> list[str]:
        if not expired:
            return ["-days", "2"]
        # Newer versions take a date and no number below 0, older ones the number and no date.
        dates = ["-not_before", "20200101000000Z", "-not_after", "20200102000000Z"]
        return dates if "-not_after" in self._openssl("x509", "-help") else ["-days", "-1"]

    def _openssl(self, *arguments: str) -> str:
        done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, check=True)
        return done.stdout + done.stderr
