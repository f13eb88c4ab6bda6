"""
`python server.py ROOT ADDRESS LOG …`: files below a directory, spoken as much S3, Google Cloud Storage, Azure Blob
Storage and Hugging Face hub as clients ask for.

One thread a connection, bodies by `sendfile`, and slow on demand. What was sent is written to a log, a line a request.
Signatures are not checked, and object names are the files' names.
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
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path
from stat import S_ISREG
from urllib.parse import parse_qsl, unquote
from xml.sax.saxutils import escape

import listings

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
        self._digests = listings.Digests(root)
        self._keys: dict[str, list[listings.Entry]] = {}
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
        path = request.path
        bucket, _, key = path.lstrip("/").partition("/")
        if path == "/token":
            self._send(
                connection, request, 200, b'{"access_token": "ya29.bench", "expires_in": 3600, "token_type": "Bearer"}'
            )
        elif path.startswith("/api/"):
            self._send(connection, request, *self._hub(path))
        elif path.startswith("/storage/"):
            self._send(connection, request, *self._google(path, request.query))
        elif found := re.fullmatch(r"/download/storage/v1/b/([^/]+)/o/(.+)", path):
            self._google_object(connection, pace, request, *found.groups())
        elif path.startswith(f"/{listings.AZURE_ACCOUNT}/") and "comp" in request.query:
            self._send(connection, request, *self._azure(key, request.query))
        elif path.startswith(f"/{listings.AZURE_ACCOUNT}/"):
            self._object(connection, pace, request, self._root / key, "")
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
            etag = listings.etag(stat.st_mtime, stat.st_size)
            if (wanted := request.fields.get("if-match", etag)) not in (etag, "*"):
                return self._send(connection, request, 412, _error("PreconditionFailed", wanted))
            span = _span(request.fields.get("range"), stat.st_size)
            if span is None:
                return self._send(connection, request, 416, _error("InvalidRange"))
            start, stop = span
            status = 206 if "range" in request.fields else 200
            more += f"Content-Range: bytes {start}-{stop - 1}/{stat.st_size}\r\n" if status == 206 else ""
            more += (
                f"ETag: {etag}\r\nLast-Modified: {formatdate(stat.st_mtime, usegmt=True)}\r\nAccept-Ranges: bytes\r\n"
            )
            connection.sendall(_head(status, stop - start, "application/octet-stream", more))
            self._body(connection, pace, request, status, descriptor, start, stop)
        finally:
            os.close(descriptor)

    def _body(
        self,
        connection: socket.socket,
        pace: _Pace,
        request: _Request,
        status: int,
        descriptor: int,
        start: int,
        stop: int,
    ) -> None:
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
            return (
                200,
                b'<?xml version="1.0"?><VersioningConfiguration xmlns="http://s3.amazonaws.com/doc/2006-03-01/"/>',
            )
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
        page, more = self._cut(bucket, prefix, delimiter, after, limit)
        encoded = query.get("encoding-type") == "url"
        return listings.s3(bucket, prefix, delimiter, page, more=more, second=second, limit=limit, encoded=encoded)

    def _cut(
        self, bucket: str, prefix: str, delimiter: str, after: str, limit: int
    ) -> tuple[list[listings.Entry], bool]:
        """One page of entries, and whether there are more."""
        entries = self._entries(bucket, prefix, delimiter, after)
        page = [entry for entry, _ in zip(entries, range(limit), strict=False)]
        return page, bool(page) and next(self._entries(bucket, prefix, delimiter, page[-1][0]), None) is not None

    def _google(self, path: str, query: dict[str, str]) -> tuple[int, bytes]:
        """A listing; what is asked about single objects is whether there is one, and none has the name of a prefix."""
        found = re.fullmatch(r"/storage/v1/b/([^/]+)/o", path)
        if found is None or not (self._root / found[1]).is_dir():
            return 404, b'{"error": {"code": 404, "message": "Not Found"}}'
        limit = min(int(query.get("maxResults") or _PAGE_KEYS), _PAGE_KEYS)
        page, more = self._cut(found[1], query.get("prefix", ""), "", query.get("pageToken", ""), limit)
        return 200, listings.google(found[1], page, self._digests, more=more)

    def _google_object(self, connection: socket.socket, pace: _Pace, request: _Request, bucket: str, key: str) -> None:
        generation = request.query.get("generation", "")
        if generation != listings.GENERATION:
            return self._send(connection, request, 404, _error("NoSuchKey"))
        return self._object(
            connection, pace, request, self._root / bucket / key, f"X-Goog-Generation: {generation}\r\n"
        )

    def _azure(self, bucket: str, query: dict[str, str]) -> tuple[int, bytes]:
        if not (self._root / bucket).is_dir():
            return 404, _error("ContainerNotFound")
        prefix, limit = query.get("prefix", ""), min(int(query.get("maxresults") or _PAGE_KEYS), _PAGE_KEYS)
        page, more = self._cut(bucket, prefix, "", query.get("marker", ""), limit)
        return 200, listings.azure(bucket, prefix, page, self._digests, more=more)

    def _entries(self, bucket: str, prefix: str, delimiter: str, after: str) -> Iterator[listings.Entry]:
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
        entries = list(self._entries(bucket, prefix + "/", "", ""))
        if kind == "tree":
            return 200, listings.hub_tree(bucket, prefix + "/", entries, self._digests)
        siblings = [{"rfilename": key.partition("/")[2]} for key, _, _ in entries]
        commit = hashlib.sha1(prefix.encode()).hexdigest()
        answer = {
            "id": f"{bucket}/{prefix}",
            "sha": commit,
            "private": False,
            "siblings": siblings,
            "tags": [],
            "downloads": 0,
        }
        return 200, json.dumps(answer).encode()

    def _send(self, connection: socket.socket, request: _Request, status: int, body: bytes) -> None:
        kind = "application/json" if body[:1] in b"[{" else "application/xml"
        connection.sendall(_head(status, len(body), kind, "") + (b"" if request.method == "HEAD" else body))
        self._count(request, status, 0 if request.method == "HEAD" else len(body))

    def _count(self, request: _Request, status: int, size: int) -> None:
        os.write(self._log, f"{request.method} {status} {size} {request.target}\n".encode())


def _requests(connection: socket.socket) -> Iterator[_Request]:
    """The requests of one connection. What one brings along, as those for a token do, is not looked at."""
    held = b""
    while True:
        while (end := held.find(b"\r\n\r\n")) < 0:
            more = connection.recv(65536)
            if not more:
                return
            held += more
        first, *lines = held[:end].decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ")
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        end += 4 + int(fields.get("content-length", 0))
        while len(held) < end:
            more = connection.recv(65536)
            if not more:
                return
            held += more
        held = held[end:]
        yield _Request(method=method, target=target, fields=fields)


def _head(status: int, length: int, kind: str, more: str) -> bytes:
    reason = {
        200: "OK",
        206: "Partial Content",
        404: "Not Found",
        412: "Precondition Failed",
        416: "Range Not Satisfiable",
    }[status]
    return f"HTTP/1.1 {status} {reason}\r\nContent-Length: {length}\r\nContent-Type: {kind}\r\n{more}\r\n".encode(
        "latin-1"
    )


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


def _keys(bucket: Path) -> Iterator[tuple[str, int, float]]:
    for directory, _, names in os.walk(bucket):
        for name in names:
            place = Path(directory, name)
            stat = place.stat()
            yield str(place.relative_to(bucket)), stat.st_size, stat.st_mtime


def _main() -> None:
    parser = argparse.ArgumentParser(
        description="Serve the files below ROOT as S3, Google Cloud Storage, Azure Blob Storage and a hub."
    )
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
