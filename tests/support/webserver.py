"""
A web server of a few lines, over HTTP or TLS, that does with each page what a test wants.

It exists because no real server redirects to a private address, forgets its ranges, lies about a length or changes a
file at the request that a test names.
"""

from __future__ import annotations

import hashlib
import re
import socket
import ssl
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import quote, unquote

HERE = "127.0.0.1"
MODIFIED = "Mon, 02 Nov 2026 10:00:00 GMT"
# A header that is easily found where it does not belong.
SECRET = "canary-of-a-header"
_SLICE_BYTES = 64 * 1024


@dataclass(kw_only=True)
class Page:
    """
    One path. `etag` is sent as it is, quotes included; None sends none.

    Args:
        status: Answered instead of the data, if it is no 200, with `location` where it leads.
        takes_head: False answers HEAD with 405.
        in_ranges: False ignores `Range` and does not offer it.
        tells_length: False sends the data without a length, until the connection is closed.
        checks: False ignores `If-Match` and `If-Unmodified-Since`.
        wants: Headers without which a request is answered 403.
        headers: More to be sent.
        refuses: Returns a status for a method and the text of its `Range`, or None for no refusal.
        cuts: After how many bytes of the answers to GET the connection is cut, one answer after the other.
    """

    data: bytes = b""
    etag: str | None = None
    modified: str | None = None
    status: int = 200
    location: str | None = None
    takes_head: bool = True
    in_ranges: bool = True
    tells_length: bool = True
    checks: bool = True
    wants: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    refuses: Callable[[str, str | None], int | None] = lambda method, wanted: None
    cuts: list[int] = field(default_factory=list)


def page(data: bytes, **how: Any) -> Page:
    """
    A file with a strong ETag.
    """
    return Page(data=data, **{"etag": f'"{hashlib.sha256(data).hexdigest()[:16]}"', "modified": MODIFIED, **how})


@dataclass(frozen=True, kw_only=True)
class Asked:
    """
    A request as it came. Names of headers are in lower case.
    """

    method: str
    path: str
    headers: Mapping[str, str]

    @property
    def range(self) -> str | None:
        return self.headers.get("range")


class WebServer:
    """
    Serves `pages` by path while the `with` lasts; whole URLs, as a proxy is asked for them, are paths too.

    `asked` holds every request in order; `before` is called with each before it is answered.

    Args:
        tls: The server's side, or None for plain HTTP.
        wants: Headers without which anything that `put` has stored is answered 403.
    """

    def __init__(
        self, *, host: str = HERE, tls: ssl.SSLContext | None = None, wants: Mapping[str, str] | None = None
    ) -> None:
        self._scheme = "https" if tls else "http"
        self._wants = dict(wants or {})
        self.host = host
        self.pages: dict[str, Page] = {}
        self.asked: list[Asked] = []
        self.before: Callable[[Asked], object] = lambda asked: None
        self._server = ThreadingHTTPServer((host, 0), _handler(self))
        self._server.daemon_threads = True
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def endpoint(self) -> str:
        return f"{self._scheme}://{self.host}:{self.port}"

    @property
    def storage_options(self) -> Mapping[str, Any]:
        """How a store reaches it."""
        return {"allow_private": True, "headers": {self.host: self._wants}}

    @property
    def denied_options(self) -> Mapping[str, Any] | None:
        """The same with headers that it refuses, or None if it wants none."""
        return (
            {"allow_private": True, "headers": {self.host: dict.fromkeys(self._wants, "wrong")}}
            if self._wants
            else None
        )

    def uri(self, path: str) -> str:
        return f"{self.endpoint}/{quote(path)}"

    # No option of this scheme says where a server is.
    unreachable_options = None

    def unreachable_uri(self, path: str) -> str:
        """
        A URI where nobody listens.
        """
        with socket.socket() as unused:
            unused.bind((self.host, 0))
            return f"http://{self.host}:{unused.getsockname()[1]}/{path}"

    def put(self, path: str, data: bytes) -> None:
        """
        Make or replace one file.
        """
        self.pages[f"/{path}"] = page(data, wants=self._wants)

    def delete(self, path: str) -> None:
        self.pages.pop(f"/{path}", None)

    def ranges(self) -> list[str | None]:
        """What GET was asked for, in order, without questions about the first byte alone."""
        return [asked.range for asked in self.asked if asked.method == "GET" and asked.range != "bytes=0-0"]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)


def _handler(server: WebServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # A connection that nobody uses any more ends its thread.
        timeout = 30

        def do_GET(self) -> None:
            asked = Asked(
                method=self.command,
                path=self.path,
                headers={name.lower(): value for name, value in self.headers.items()},
            )
            server.asked.append(asked)
            server.before(asked)
            found = server.pages.get(asked.path) or server.pages.get(unquote(asked.path)) or Page(status=404)
            _answer(self, asked, found)

        def do_HEAD(self) -> None:
            self.do_GET()

        def handle(self) -> None:
            with suppress(OSError):  # Whoever has enough hangs up.
                super().handle()

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def _answer(handler: BaseHTTPRequestHandler, asked: Asked, found: Page) -> None:
    status, headers, data = _decide(asked, found)
    if asked.method == "GET" and found.status == 200 and not found.tells_length:
        handler.close_connection = True
        headers.pop("Content-Length", None)
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()
    if asked.method == "HEAD":
        return
    cut = found.cuts.pop(0) if found.cuts and status in (200, 206) and asked.range != "bytes=0-0" else len(data)
    for start in range(0, min(cut, len(data)), _SLICE_BYTES):
        handler.wfile.write(data[start : min(cut, start + _SLICE_BYTES)])
    if cut < len(data):
        handler.close_connection = True


def _decide(asked: Asked, found: Page) -> tuple[int, dict[str, str], bytes]:
    headers = dict(found.headers)
    if any(asked.headers.get(name.lower()) != value for name, value in found.wants.items()):
        return 403, {**headers, "Content-Length": "6"}, b"denied"
    if (refused := found.refuses(asked.method, asked.range)) is not None:
        return refused, {"Content-Length": "0"}, b""
    if asked.method == "HEAD" and not found.takes_head:
        return 405, {**headers, "Content-Length": "0"}, b""
    if found.status != 200:
        if found.location is not None:
            headers["Location"] = found.location
        return found.status, {**headers, "Content-Length": str(len(found.data))}, found.data
    headers |= {
        name: value for name, value in (("ETag", found.etag), ("Last-Modified", found.modified)) if value is not None
    }
    if found.checks and asked.headers.get("if-match", found.etag) != found.etag:
        return 412, {"Content-Length": "0"}, b""
    if found.checks and asked.headers.get("if-unmodified-since", found.modified) != found.modified:
        return 412, {"Content-Length": "0"}, b""
    match = re.fullmatch(r"bytes=([0-9]+)-([0-9]+)", asked.range or "")
    size = len(found.data)
    if match is None or not found.in_ranges:
        if found.in_ranges:
            headers["Accept-Ranges"] = "bytes"
        if found.tells_length:
            headers["Content-Length"] = str(size)
        return 200, headers, found.data
    start, stop = int(match[1]), min(int(match[2]) + 1, size)
    if start >= size:
        return 416, {"Content-Range": f"bytes */{size}", "Content-Length": "0"}, b""
    total = str(size) if found.tells_length else "*"
    headers |= {"Content-Range": f"bytes {start}-{stop - 1}/{total}", "Content-Length": str(stop - start)}
    return 206, headers, found.data[start:stop]
