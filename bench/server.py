"""
`python server.py ROOT ADDRESS LOG …`: files below a directory, spoken as much S3 and Hugging Face hub as clients ask for.

One thread a connection, bodies by `sendfile`, and slow on demand. What was sent is written to a log, a line a request.
Signatures are not checked, and object names are the files' names. It imports nothing of this directory.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path
from stat import S_ISREG
from urllib.parse import parse_qsl, quote, unquote
from xml.sax.saxutils import escape

_LOOPBACK = "127.0.0.1"
_SLICE_BYTES = 256 * 1024
_PAGE_KEYS = 1000


class _Pace:
    """
    Says when the next bytes may go, so that no more than a limit goes through, without bursts. Any thread may ask.
    """

    def __init__(self, bytes_per_second: float) -> None:
        self._seconds_per_byte = 1 / bytes_per_second if bytes_per_second else 0.0
        self._guard = threading.Lock()
        self._due = 0.0

    def wait(self, size: int) -> None:
        if not self._seconds_per_byte:
            return
        with self._guard:
            # Time in which nobody sent is lost: it may not be caught up on.
            self._due = max(self._due, time.monotonic() - 0.002) + size * self._seconds_per_byte
            due = self._due
        time.sleep(max(0.0, due - time.monotonic()))


@dataclass(frozen=True, kw_only=True)
class _Request:
    method: str
    target: str
    fields: dict[str, str]

    @property
    def path(self) -> str:
        return unquote(self.target.partition("?")[0])

    @property
    def query(self) -> dict[str, str]:
        return dict(parse_qsl(self.target.partition("?")[2], keep_blank_values=True))


class _Server:
    def __init__(self, root: Path, log: Path, latency: float, connection_limit: float, total_limit: float) -> None:
        self._root, self._latency, self._connection_limit = root, latency, connection_limit
        self._total = _Pace(total_limit)
        self._log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._keys: dict[str, list[tuple[str, int, float]]] = {}
        self._pages: dict[str, bytes] = {}

    def serve(self, listener: socket.socket) -> None:
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=self._connection, args=(connection,), daemon=True).start()

    def _connection(self, connection: socket.socket) -> None:
        if connection.family == socket.AF_INET:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        pace = _Pace(self._connection_limit)
        with contextlib.suppress(OSError), connection:
            for request in _requests(connection):
                if self._latency:
                    time.sleep(self._latency)
                self._answer(connection, pace, request)

    def _answer(self, connection: socket.socket, pace: _Pace, request: _Request) -> None:
        bucket, _, key = request.path.lstrip("/").partition("/")
        if request.path.startswith("/api/"):
            self._send(connection, request, *self._hub(request.path))
        elif not key:
            self._send(connection, request, *self._bucket(bucket, request))
        elif found := re.fullmatch(r"([^/]+)/resolve/([0-9a-f]+)/(.+)", key):
            place = self._root / bucket / found[1] / found[3]
            self._object(connection, pace, request, place, f"X-Repo-Commit: {found[2]}\r\n")
        else:
            self._object(connection, pace, request, self._root / bucket / key, "")

    def _object(self, connection: socket.socket, pace: _Pace, request: _Request, place: Path, more: str) -> None:
        try:
            descriptor = os.open(place, os.O_RDONLY)
        except OSError:
            return self._send(connection, request, 404, _error("NoSuchKey"))
        try:
            stat = os.fstat(descriptor)
            if not S_ISREG(stat.st_mode):
                return self._send(connection, request, 404, _error("NoSuchKey"))
            etag = _etag(stat.st_mtime, stat.st_size)
            if (wanted := request.fields.get("if-match", etag)) not in (etag, "*"):
                return self._send(connection, request, 412, _error("PreconditionFailed", wanted))
            span = _span(request.fields.get("range"), stat.st_size)
            if span is None:
                return self._send(connection, request, 416, _error("InvalidRange"))
            start, stop = span
            status = 206 if "range" in request.fields else 200
            more += f"Content-Range: bytes {start}-{stop - 1}/{stat.st_size}\r\n" if status == 206 else ""
            more += f"ETag: {etag}\r\nLast-Modified: {formatdate(stat.st_mtime, usegmt=True)}\r\nAccept-Ranges: bytes\r\n"
            connection.sendall(_head(status, stop - start, "application/octet-stream", more))
            self._body(connection, pace, request, status, descriptor, start, stop)
        finally:
            os.close(descriptor)

    def _body(self, connection: socket.socket, pace: _Pace, request: _Request, status: int, descriptor: int, start: int, stop: int) -> None:
        sent = start
        try:
            while request.method == "GET" and sent < stop:
                size = min(_SLICE_BYTES, stop - sent)
                pace.wait(size)
                self._total.wait(size)
                sent += os.sendfile(connection.fileno(), descriptor, sent, size)
        finally:
            self._count(request, status, sent - start)

    def _bucket(self, bucket: str, request: _Request) -> tuple[int, bytes]:
        if not (self._root / bucket).is_dir():
            return 404, _error("NoSuchBucket")
        query = request.query
        if request.method == "HEAD":
            return 200, b""
        if "location" in query:
            return 200, b'<?xml version="1.0"?><LocationConstraint xmlns="http://s3.amazonaws.com/doc/2006-03-01/"/>'
        if {"versioning", "uploads", "acl"} & query.keys():
            return 200, b'<?xml version="1.0"?><VersioningConfiguration xmlns="http://s3.amazonaws.com/doc/2006-03-01/"/>'
        page = self._pages.get(request.target)
        if page is None:
            # Made once: it is the clients that are measured.
            page = self._pages[request.target] = self._page(bucket, query)
        return 200, page

    def _page(self, bucket: str, query: dict[str, str]) -> bytes:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        second = query.get("list-type") == "2"
        after = query.get("continuation-token", query.get("start-after", "")) if second else query.get("marker", "")
        limit = min(int(query.get("max-keys") or _PAGE_KEYS), _PAGE_KEYS)
        entries = self._entries(bucket, prefix, delimiter, after)
        page = [entry for entry, _ in zip(entries, range(limit), strict=False)]
        more = bool(page) and next(self._entries(bucket, prefix, delimiter, page[-1][0]), None) is not None
        name = quote if query.get("encoding-type") == "url" else escape
        return _listing(bucket, prefix, delimiter, page, more, second, limit, name)

    def _entries(self, bucket: str, prefix: str, delimiter: str, after: str) -> Iterator[tuple[str, int, float]]:
        """Keys in order, and common prefixes, which are those with a size of -1."""
        if bucket not in self._keys:
            self._keys[bucket] = sorted(_keys(self._root / bucket), key=lambda item: item[0].encode())
        last = after
        for key, size, changed_at in self._keys[bucket]:
            if not key.startswith(prefix):
                continue
            shared, found, _ = key[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
            entry = (prefix + shared + delimiter, -1, 0.0) if found else (key, size, changed_at)
            if entry[0].encode() > last.encode():
                last = entry[0]
                yield entry

    def _hub(self, path: str) -> tuple[int, bytes]:
        """A hub's answers about one revision, which is named after the model."""
        found = re.fullmatch(r"/api/models/([^/]+)/([^/]+)(?:/(revision|tree)/[^/]+)?", path)
        if found is None or not (self._root / found[1] / found[2]).is_dir():
            return 404, b"{}"
        bucket, prefix, kind = found.groups()
        files = [(key.partition("/")[2], size) for key, size, _ in self._entries(bucket, prefix + "/", "", "")]
        commit = hashlib.sha1(prefix.encode()).hexdigest()
        if kind == "tree":
            answer: object = [{"type": "file", "oid": commit, "size": size, "path": name} for name, size in files]
        else:
            siblings = [{"rfilename": name} for name, _ in files]
            answer = {"id": f"{bucket}/{prefix}", "sha": commit, "private": False, "siblings": siblings, "tags": [], "downloads": 0}
        return 200, json.dumps(answer).encode()

    def _send(self, connection: socket.socket, request: _Request, status: int, body: bytes) -> None:
        kind = "application/json" if body[:1] in b"[{" else "application/xml"
        connection.sendall(_head(status, len(body), kind, "") + (b"" if request.method == "HEAD" else body))
        self._count(request, status, 0 if request.method == "HEAD" else len(body))

    def _count(self, request: _Request, status: int, size: int) -> None:
        os.write(self._log, f"{request.method} {status} {size} {request.target}\n".encode())


def _requests(connection: socket.socket) -> Iterator[_Request]:
    """The requests of one connection. Those with a body are not for this server."""
    held = b""
    while True:
        while (end := held.find(b"\r\n\r\n")) < 0:
            more = connection.recv(65536)
            if not more:
                return
            held += more
        first, *lines = held[:end].decode("latin-1").split("\r\n")
        held = held[end + 4 :]
        method, target, _ = first.split(" ")
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        yield _Request(method=method, target=target, fields=fields)


def _head(status: int, length: int, kind: str, more: str) -> bytes:
    reason = {200: "OK", 206: "Partial Content", 404: "Not Found", 412: "Precondition Failed", 416: "Range Not Satisfiable"}[status]
    return f"HTTP/1.1 {status} {reason}\r\nContent-Length: {length}\r\nContent-Type: {kind}\r\n{more}\r\n".encode("latin-1")


def _error(code: str, detail: str = "") -> bytes:
    return f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{escape(detail)}</Message></Error>'.encode()


def _span(wanted: str | None, size: int) -> tuple[int, int] | None:
    if wanted is None:
        return 0, size
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted)
    if found is None or not any(found.groups()):
        return None
    if not found[1]:
        return max(0, size - int(found[2])), size
    start, stop = int(found[1]), min(size, int(found[2]) + 1 if found[2] else size)
    return (start, stop) if start < stop else None


def _etag(changed_at: float, size: int) -> str:
    """As nginx makes it, so that its objects are those of our listings."""
    return f'"{int(changed_at):x}-{size:x}"'


def _keys(bucket: Path) -> Iterator[tuple[str, int, float]]:
    for directory, _, names in os.walk(bucket):
        for name in names:
            place = Path(directory, name)
            stat = place.stat()
            yield str(place.relative_to(bucket)), stat.st_size, stat.st_mtime


def _listing(
    bucket: str,
    prefix: str,
    delimiter: str,
    page: list[tuple[str, int, float]],
    more: bool,
    second: bool,
    limit: int,
    name: Callable[[str], str],
) -> bytes:
    parts = [
        f'<?xml version="1.0" encoding="UTF-8"?>\n<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>{bucket}</Name>'
    ]
    parts.append(f"<Prefix>{name(prefix)}</Prefix><MaxKeys>{limit}</MaxKeys><IsTruncated>{str(more).lower()}</IsTruncated>")
    if name is quote:
        parts.append("<EncodingType>url</EncodingType>")
    if delimiter:
        parts.append(f"<Delimiter>{escape(delimiter)}</Delimiter>")
    if second:
        parts.append(f"<KeyCount>{len(page)}</KeyCount>")
    if more and second:
        # The token is the last name; it comes back as it went, url-encoded listings or not.
        parts.append(f"<NextContinuationToken>{escape(page[-1][0])}</NextContinuationToken>")
    elif more:
        parts.append(f"<NextMarker>{name(page[-1][0])}</NextMarker>")
    for key, size, changed_at in page:
        if size < 0:
            parts.append(f"<CommonPrefixes><Prefix>{name(key)}</Prefix></CommonPrefixes>")
            continue
        when = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(changed_at))
        etag = escape(_etag(changed_at, size), {'"': "&quot;"})
        parts.append(f"<Contents><Key>{name(key)}</Key><LastModified>{when}</LastModified><ETag>{etag}</ETag><Size>{size}</Size>")
        parts.append("<StorageClass>STANDARD</StorageClass></Contents>")
    return "".join([*parts, "</ListBucketResult>"]).encode()


def _main() -> None:
    parser = argparse.ArgumentParser(description="Serve the files below ROOT as S3 and as a hub.")
    parser.add_argument("root", type=Path)
    parser.add_argument("address", help="a port on the loopback interface, or the path of a socket")
    parser.add_argument("log", type=Path)
    parser.add_argument("latency", type=float)
    parser.add_argument("connection_limit", type=float)
    parser.add_argument("total_limit", type=float)
    options = parser.parse_args()
    if options.address.isdigit():
        listener = socket.create_server((_LOOPBACK, int(options.address)), backlog=1024)
    else:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(options.address)
        listener.listen(128)
    _Server(options.root, options.log, options.latency, options.connection_limit, options.total_limit).serve(listener)


if __name__ == "__main__":
    _main()
