"""
`http://` and `https://`: one file, or an archive whose members are the model.

There is nothing to sign and nothing to list, but everything that a URL leads to is chosen by others: where it
redirects, which address a name has, what an archive holds. Redirects are followed here, hop by hop, each to a checked
address.
"""

from __future__ import annotations

import base64
import os
import re
import threading
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any
from urllib.parse import quote, unquote

import attrs

from kserve_pvc._format.records import FileEntry
from kserve_pvc._source.contract import Backend, RangeReader, RemoteFile, Resolved, order_listing
from kserve_pvc._source.redaction import redact
from kserve_pvc._source.ref import ModelRef
from kserve_pvc.backends._addresses import make_address_check
from kserve_pvc.backends._http.client import HTTPClient
from kserve_pvc.backends._http.target import HTTPError, Target, target_of
from kserve_pvc.backends._options import (
    Rule,
    TrimmedEnvironment,
    checks_certificates,
    configured_options,
    options_beyond,
    trim_options,
    warn_unverified,
)
from kserve_pvc.backends._ranges import Reader, follow, read_refusal, request_with_retries, unavailable
from kserve_pvc.backends._refusals import hide_sent, words_of
from kserve_pvc.backends._validators import identifies, make_token
from kserve_pvc.backends._web_settings import OWN_OPTIONS, Headers, WebFile, parse_file, unpack_limits
from kserve_pvc.errors import (
    PolicyError,
    SourceChangedError,
    SourceDeniedError,
    SourceNotFoundError,
    SourceUnavailableError,
    StoreError,
)

# `Content-Encoding` to the endings of files that are stored so.
_CODING_ENDINGS = {
    **dict.fromkeys(("gzip", "x-gzip"), (".gz", ".tgz", ".gzip", ".taz")),
    **dict.fromkeys(("xz", "x-xz"), (".xz", ".txz")),
    **dict.fromkeys(("bzip2", "x-bzip2"), (".bz2", ".tbz", ".tbz2")),
    **dict.fromkeys(("zstd", "x-zstd"), (".zst", ".tzst")),
    **dict.fromkeys(("compress", "x-compress"), (".z", ".tz")),
}
_REDIRECTS = (301, 302, 303, 307, 308)
# The status by which servers refuse ranges, instead of ignoring them.
_NO_RANGES = (400, 403, 405, 406, 416, 417, 501)
_MAX_HOPS = 5
_MAX_ONE_BYTE_ANSWER = 1024
# How much is received of a file only to count it, as its server does not say its length.
_MAX_COUNTED_BYTES = 2**40
_COUNTING_BYTES = 256 * 1024
_CONTENT_RANGE = re.compile(r"bytes (?:0-0|\*)/([0-9]{1,18})")
_LENGTH = re.compile(r"[0-9]{1,18}")
_REPRESENTATION_DIGEST = re.compile(r"(?:^|,)\s*sha-256=:([A-Za-z0-9+/]{43}=):")
_PATH_SAFE = "%/:=&~+!$,;'@()*[]"
RULES = (
    Rule(configured_options, "is set in fsspec's configuration"),
    Rule(options_beyond(OWN_OPTIONS), "is an argument of fsspec's HTTPFileSystem"),
)


def http_backend(options: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> Backend:
    """
    Make the backend for `http://` and `https://`: our own, or fsspec's `HTTPFileSystem` where an option is one of its
    arguments.

    Raises:
        SettingsError: An option is unknown.
    """
    from kserve_pvc.backends._through_class import choose

    def load() -> list[Any]:
        from aiohttp import ClientSession
        from fsspec.implementations.http import HTTPFileSystem

        return [HTTPFileSystem, ClientSession._request]

    def through(arguments: Mapping[str, Any]) -> Backend:
        from kserve_pvc.backends._fsspec.web import web_backend

        return web_backend(arguments, options, environ)

    return choose(
        "https",
        options,
        environ,
        rules=RULES,
        own=OWN_OPTIONS,
        load=load,
        direct=lambda given: HTTPBackend(given, environ),
        through=through,
    )


@attrs.frozen(kw_only=True)
class _Place:
    """
    What the end of a chain of redirects says about a file.
    """

    target: Target
    size_bytes: int
    etag: str | None
    modified: str | None
    sha256: str | None
    in_ranges: bool

    @property
    def useful_etag(self) -> str | None:
        """The ETag, if it can tell one content from another."""
        return self.etag if identifies(self.etag, self.size_bytes) else None

    @property
    def pin(self) -> Mapping[str, str]:
        """The condition that is true for this content only."""
        etag = self.useful_etag
        if etag and not etag.startswith("W/"):
            return {"If-Match": etag}
        return {"If-Unmodified-Since": self.modified} if self.modified else {}


class HTTPBackend:
    """
    Models behind a URL: `https://host/path/weights.bin` is that one file, `https://host/path/model.tar.gz` what the
    archive holds. `#sha256=<64 hex digits>` says what the fetched file must amount to.

    Args:
        options: `headers` (host to headers, which win over the variable `<host>-headers`), `verify` (a file or
            directory of certificates, or False), `allow_private` (True, or the hosts that may have private addresses),
            `unpack` (False keeps archives as they are), and `unpack_limits` (fields of `UnpackLimits`).
        environ: What stands for the environment of the process.
    """

    def __init__(self, options: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> None:
        options, environ = trim_options(options), TrimmedEnvironment(environ)
        self._headers = Headers(options, environ)
        self._limits = unpack_limits(options)
        self._client = HTTPClient(
            environ=environ, ca_bundle=options.get("verify"), check_address=make_address_check(options, environ)
        )
        self._is_verified = checks_certificates(options)
        if not self._is_verified:
            warn_unverified("https")
        self._retry_seconds = 300.0
        self._places: dict[str, _Place] = {}
        self._unconditional: set[str] = set()
        # Files whose digest is given, which tells the whole of one from a part.
        self._promised: set[str] = set()
        # Secrets, so they are in memory only. Of two links to one file the newer counts.
        self._queries: dict[str, str] = {}
        self._guard = threading.Lock()

    def resolve(self, ref: ModelRef) -> Resolved:
        file = parse_file(ref, self._limits)
        if file.sha256 is not None:
            self._promised.add(file.address)
        with self._guard:
            self._queries.pop(file.address, None)
            if file.query is not None:
                self._queries[file.address] = file.query
        place = self._ask(file.address, file.name, is_promised=file.sha256 is not None)
        with self._guard:
            self._places[file.address] = place
        return order_listing(ref, [_remote_file(file, place)])

    def access(self, ref: ModelRef) -> str:
        del ref
        return "direct"

    def checks_certificates(self, ref: ModelRef) -> bool:
        del ref
        return self._is_verified

    def open_range(self, file: RemoteFile, start: int, stop: int) -> AbstractContextManager[RangeReader]:
        size = file.entry.size_bytes
        is_whole = not file.in_ranges
        first, last = (0, size) if is_whole else (start, stop)
        reader = Reader(self._client, _Asking(self, file.address), file, file.address, first, last)
        return _Rest(reader, start) if is_whole and start else reader

    def tune(self, *, stall_seconds: float, retry_seconds: float) -> None:
        """
        Limit how long a server may take for a response, and for how long a request is retried.
        """
        self._client.response_seconds = stall_seconds
        self._retry_seconds = retry_seconds

    def close(self) -> None:
        """
        Release idle connections. Later calls make new ones.
        """
        self._client.close()

    def place(self, address: str, *, instead_of: _Place | None = None) -> _Place:
        """
        Return where the bytes of a file are. It is looked up again if that is unknown, or if it was `instead_of`.
        """
        with self._guard:
            place = self._places.get(address)
            if place is None or place is instead_of:
                place = self._places[address] = self._find(address)
            return place

    def target(self, address: str) -> Target:
        """
        Where a file is requested first.
        """
        target, query = _target(address), self._queries.get(address)
        return target if query is None else target._replace(path=f"{target.path}?{query}")

    def forget(self, address: str, place: _Place | None) -> None:
        """
        Look a place up again the next time, unless another thread already has.
        """
        with self._guard:
            if self._places.get(address) is place:
                self._places.pop(address, None)

    def is_unconditional(self, address: str) -> bool:
        """
        Whether the server of a file refuses every condition.
        """
        return address in self._unconditional

    def request_without_condition(self, address: str) -> None:
        """
        Send no conditions for a file from now on. Validators of responses are compared anyhow.
        """
        self._unconditional.add(address)

    def headers(self, target: Target, address: str) -> Mapping[str, str]:
        """
        What goes along with a request: the headers that are given for the host of the URI, and for that host only.
        """
        origin = _target(address)
        given: Mapping[str, str] = {}
        # A server that stands behind both usual ports is one, and leads from the open one to the other.
        is_upgrade = (origin.scheme, origin.port, target.scheme, target.port) == ("http", 80, "https", 443)
        if target.host == origin.host and (target[:3] == origin[:3] or is_upgrade):
            given = self._headers.for_host(origin.host)
        return given if any(name.lower() == "user-agent" for name in given) else {"User-Agent": "kserve-pvc", **given}

    def _ask(self, address: str, name: str, *, is_promised: bool) -> _Place:
        """Find out what is there, and retry while the server is busy or the network fails."""
        try:
            return request_with_retries(lambda: self._find(address, None if is_promised else name), self._retry_seconds)
        except HTTPError as error:
            raise SourceUnavailableError(address, str(error), is_final=error.is_final) from error

    def _find(self, address: str, name: str | None = None) -> _Place:
        """Follow a URL to where it leads. With `name`, a response that is a web page and not such a file is refused."""
        target, method, is_ranged, hops = self.target(address), "HEAD", False, 0
        while True:
            status, headers, words = self._look(method, target, address, is_ranged=is_ranged)
            if status in _REDIRECTS and "location" in headers:
                hops += 1
                if hops > _MAX_HOPS:
                    raise SourceUnavailableError(address, f"more than {_MAX_HOPS} redirects in a row", is_final=True)
                target = follow(address, target, headers["location"])
            elif method == "HEAD" and _says_too_little(status, headers):
                method, is_ranged = "GET", True
            elif is_ranged and status in _NO_RANGES and _size_of(status, headers) != "0":
                is_ranged = False
            else:
                if status in (200, 206) and address in self._promised and not _size_of(status, headers):
                    status, headers = 200, {**headers, "content-length": str(self._count(target, address))}
                return _place(address, target, method, status, headers, name, words)

    def _count(self, target: Target, address: str) -> int:
        """Receive a file whose length its server does not say, only to count its bytes."""
        size, buffer = 0, memoryview(bytearray(_COUNTING_BYTES))
        with self._client.open("GET", target, self.headers(target, address)) as answer:
            since = time.monotonic()
            while (count := answer.readinto(buffer)) != 0:
                size, since = size + (count or 0), time.monotonic() if count else since
                if size > _MAX_COUNTED_BYTES:
                    rule = f"the server sends no length, and more than {_MAX_COUNTED_BYTES} bytes"
                    raise PolicyError(address, rule)
                if time.monotonic() - since > self._client.response_seconds:
                    raise HTTPError(f"nothing came for {self._client.response_seconds:g} s")
        return size

    def _look(
        self, method: str, target: Target, address: str, *, is_ranged: bool
    ) -> tuple[int, Mapping[str, str], str]:
        """
        Request the head of a file: by HEAD, by GET of one byte where that is refused or does not say enough, and by GET
        of all of it where ranges are refused.

        Returns:
            Status and headers, and what a refusal says.
        """
        wanted = {"Range": "bytes=0-0"} if is_ranged else {}
        sent, words = {**self.headers(target, address), **wanted}, ""
        with self._client.open(method, target, sent) as answer:
            # A whole file that comes instead is not read: the connection is closed.
            is_refusal = answer.status >= 400
            if is_refusal or (answer.status != 200 and (answer.length or 0) <= _MAX_ONE_BYTE_ANSWER):
                body = read_refusal(answer)
                words = hide_sent(words_of(answer.headers, body), target, sent) if is_refusal else ""
            return answer.status, answer.headers, words


class _Asking:
    """
    The requests for one range, which know where the last one went.
    """

    def __init__(self, backend: HTTPBackend, address: str) -> None:
        self._backend = backend
        self._address = address
        self._place: _Place | None = None

    def request(self, file: RemoteFile, *, renewed: bool) -> tuple[Target, Mapping[str, str]]:
        try:
            self._place = self._backend.place(self._address, instead_of=self._place if renewed else None)
        except SourceNotFoundError as error:
            raise SourceChangedError(self._address, str(file.entry.path)) from error
        target = self._place.target
        pin = {} if self._backend.is_unconditional(self._address) else file.pin
        return target, {**self._backend.headers(target, self._address), **pin}

    def is_unchanged(self, file: RemoteFile) -> bool:
        """
        Look what is there now, and remember if it is what was pinned.
        """
        if self._backend.is_unconditional(self._address):
            return True
        place = self._backend.place(self._address, instead_of=self._place)
        is_same = place.pin == file.pin and place.size_bytes == file.entry.size_bytes
        if is_same:
            self._backend.request_without_condition(self._address)
        return is_same

    def refusal(self, file: RemoteFile, status: int, headers: Mapping[str, str], body: bytes) -> StoreError | None:
        if status in (412, 416):
            return SourceChangedError(self._address, str(file.entry.path))
        is_elsewhere = self._place is not None and self._place.target != self._backend.target(self._address)
        if status in _REDIRECTS or (is_elsewhere and status in (404, 410)):
            # Asked from the beginning, the server may lead to a better place, or say that there is none any more.
            self._backend.forget(self._address, self._place)
            return SourceUnavailableError(self._address, f"HTTP {status} from where it redirected to before")
        error = _refused(self._address, status, headers, words_of(headers, body))
        return (
            SourceChangedError(self._address, str(file.entry.path)) if isinstance(error, SourceNotFoundError) else error
        )


class _Rest:
    """
    What follows the first bytes of a response that cannot begin later.
    """

    def __init__(self, reader: Reader, skipped_bytes: int) -> None:
        self._reader = reader
        self._left = skipped_bytes

    def __enter__(self) -> _Rest:
        self._reader.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.__exit__(kind, error, trace)

    def readinto(self, buffer: memoryview) -> int | None:
        """
        Fill the start of a buffer with what comes next. None: no data within a poll interval; 0: the response has
        ended.
        """
        if not self._left:
            return self._reader.readinto(buffer)
        count = self._reader.readinto(buffer[: min(len(buffer), self._left)])
        if count == 0:
            return 0
        self._left -= count or 0
        return None


def _target(address: str) -> Target:
    scheme, _, rest = address.partition("#")[0].partition("://")
    authority, _, path = rest.partition("/")
    return target_of(f"{scheme}://{authority}/{quote(path, safe=_PATH_SAFE)}")


def _remote_file(file: WebFile, place: _Place) -> RemoteFile:
    etag = place.useful_etag
    is_strong = etag is not None and not etag.startswith("W/")
    token = etag.strip('"') if is_strong and etag else " ".join(t for t in (etag, place.modified) if t)
    return RemoteFile(
        entry=FileEntry(
            path=file.name,
            size_bytes=place.size_bytes,
            sha256=file.sha256,
            token=file.sha256 or token or place.sha256 or make_token(),
        ),
        address=file.address,
        pin=place.pin,
        digest=f"sha256:{place.sha256}" if place.sha256 else None,
        in_ranges=place.in_ranges,
        unpack=file.limits,
    )


def _says_too_little(status: int, headers: Mapping[str, str]) -> bool:
    """Whether the response to HEAD leaves out something that GET may say."""
    if status == 429 or (status >= 500 and status != 501):
        return False
    length = headers.get("content-length", "0")
    return (
        status != 200
        or not _LENGTH.fullmatch(length)
        or not int(length)
        or headers.get("accept-ranges", "").lower() != "bytes"
    )


def _place(
    address: str, target: Target, method: str, status: int, headers: Mapping[str, str], name: str | None, words: str
) -> _Place:
    size = _size_of(status, headers)
    if status not in (200, 206) and not (status == 416 and size == "0"):
        raise _refused(address, status, headers, words) or unavailable(address, status, headers, words)
    coding = headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("identity", "") and not _repeats_name(coding, target):
        coding = coding[:40]
        raise PolicyError(
            address, f"the server encodes it as `{coding}` unasked, so the bytes are not those of the file"
        )
    if not _LENGTH.fullmatch(size):
        rule = "the server sends no length, so a part cannot be told from the whole; serve it with Content-Length"
        raise PolicyError(address, rule)
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if name is not None and kind == "text/html" and not name.lower().endswith((".html", ".htm")):
        reason = "the response is a web page, not a file, as from a server that requires a login"
        raise SourceDeniedError(address, f"{reason}; if it is the file, say so with `#sha256=`")
    return _Place(
        target=target,
        size_bytes=int(size),
        etag=headers.get("etag"),
        modified=headers.get("last-modified"),
        sha256=_announced_digest(headers),
        in_ranges=method == "HEAD" or status != 200,
    )


def _size_of(status: int, headers: Mapping[str, str]) -> str:
    """The length of the whole file, as a response says it; empty if it does not."""
    found = _CONTENT_RANGE.fullmatch(headers.get("content-range", ""))
    if found and status in (206, 416):
        return found[1]
    return headers.get("content-length", "") if status == 200 else ""


def _repeats_name(coding: str, target: Target) -> bool:
    """Whether a coding only says what the name of a file does: servers set it for `model.tar.gz` as it lies there."""
    name = unquote(target.path.partition("?")[0]).lower()
    return name.endswith(_CODING_ENDINGS.get(coding, ()))


def _announced_digest(headers: Mapping[str, str]) -> str | None:
    """The SHA-256 that a server gives a file: as RFC 9530 has it, or as repositories of artefacts do."""
    match = _REPRESENTATION_DIGEST.search(headers.get("repr-digest", ""))
    if match is not None:
        return base64.b64decode(match[1]).hex()
    digest = headers.get("x-checksum-sha256", "").lower()
    return digest if re.fullmatch(r"[0-9a-f]{64}", digest) else None


def _refused(address: str, status: int, headers: Mapping[str, str], words: str) -> StoreError | None:
    said = f"HTTP {status}" + (f" ({redact(words)})" if words else "")
    if status in (401, 403, 407):
        host = _target(address).host
        where = f"the variable `{host}-headers` or the option `headers`"
        reason = f"{said}; set headers for this host in {where}, or get another link if it is signed"
        return SourceDeniedError(address, reason)
    if status in (404, 410):
        return SourceNotFoundError(address, said)
    return unavailable(address, status, headers, words) if status not in _REDIRECTS else None
