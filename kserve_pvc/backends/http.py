"""
`http://` and `https://`: one file, or an archive whose members are the model.

There is nothing to sign and nothing to list, but everything that a URL leads to is somebody else's choice: where it
redirects, which address a name has, what an archive holds. Redirects are followed here, hop by hop, each to a checked
address.
"""

from __future__ import annotations

import base64
import ipaddress
import json
import os
import re
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any
from urllib.parse import quote, unquote

import attrs

from kserve_pvc._archive.unpack import check_readable, is_archive
from kserve_pvc._format.file_names import check_name
from kserve_pvc._format.records import FileEntry
from kserve_pvc._source.contract import RangeReader, RemoteFile, Resolved, UnpackLimits, order_listing
from kserve_pvc._source.ref import ModelRef
from kserve_pvc.backends._http.client import HTTPClient
from kserve_pvc.backends._http.target import HTTPError, Target, target_of
from kserve_pvc.backends._ranges import Reader, ask_patiently, follow, read_refusal, unavailable
from kserve_pvc.errors import (
    InvalidURIError,
    PolicyError,
    SettingsError,
    SourceChangedError,
    SourceDeniedError,
    SourceNotFoundError,
    SourceUnavailableError,
    StoreError,
    UnsafePathError,
)

ALLOW_PRIVATE = "KSERVE_PVC_ALLOW_PRIVATE_ADDRESSES"
_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_HOPS = 5
_MAX_ONE_BYTE_ANSWER = 1024
_CONTENT_RANGE = re.compile(r"bytes (?:0-0|\*)/([0-9]{1,18})")
_LENGTH = re.compile(r"[0-9]{1,18}")
_SHA256_FRAGMENT = re.compile(r"sha256=([0-9a-f]{64})")
_REPRESENTATION_DIGEST = re.compile(r"(?:^|,)\s*sha-256=:([A-Za-z0-9+/]{43}=):")
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
# What requests are made of: a header of the user's would change which bytes are asked for, or how answers are framed.
_OWN_HEADERS = {
    *(
        "accept-encoding",
        "connection",
        "content-length",
        "expect",
        "host",
        "if-match",
        "if-none-match",
        "if-range",
        "range",
    ),
    *(
        "if-modified-since",
        "if-unmodified-since",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "proxy-authorization",
    ),
}
# What lies inside and is not told as such by all versions of Python: what virtual machines of Azure and Oracle learn
# secrets from, and the local addresses that IPv6 had first.
_ALSO_INSIDE = [ipaddress.ip_network(network) for network in ("168.63.129.16/32", "192.0.0.0/24", "fec0::/10")]
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_PATH_SAFE = "%/:=&~+!$,;'@()*[]"


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
        self._given = _given_headers(options.get("headers") or {})
        self._environ = environ
        self._limits = _limits(options.get("unpack_limits") or {}) if options.get("unpack", True) else None
        self._client = HTTPClient(
            environ=environ, ca_bundle=options.get("verify"), check_address=_make_check(options, environ)
        )
        self._retry_seconds = 300.0
        self._places: dict[str, _Place] = {}
        self._guard = threading.Lock()

    def resolve(self, ref: ModelRef) -> Resolved:
        if ref.revision is not None:
            raise InvalidURIError(ref.uri, "a URL has no revisions; pin its content with `#sha256=<64 hex digits>`")
        address, _, fragment = ref.uri.partition("#")
        name = _name(ref.uri, address)
        limits = self._limits if is_archive(name) else None
        if limits is not None:
            check_readable(name)
        promised = _SHA256_FRAGMENT.fullmatch(fragment)
        place = self._ask(address, name, is_promised=promised is not None)
        with self._guard:
            self._places[address] = place
        return order_listing(ref, [_remote_file(name, address, place, promised[1] if promised else None, limits)])

    def open_range(self, file: RemoteFile, start: int, stop: int) -> AbstractContextManager[RangeReader]:
        size = file.entry.size_bytes
        is_whole = not file.in_ranges
        first, last = (0, size) if is_whole else (start, stop)
        reader = Reader(self._client, _Asking(self, file.address), file, file.address, first, last)
        return _Rest(reader, start) if is_whole and start else reader

    def tune(self, *, stall_seconds: float, retry_seconds: float) -> None:
        """
        How long a server may stay silent before it answers, and how long it is asked for a file.
        """
        self._client.answer_seconds = stall_seconds
        self._retry_seconds = retry_seconds

    def close(self) -> None:
        """
        Let go of idle connections. Whoever goes on gets new ones.
        """
        self._client.close()

    def place(self, address: str, *, instead_of: _Place | None = None) -> _Place:
        """
        Where the bytes of a file are. The server is asked again if that is not known, or if it led to `instead_of`.
        """
        with self._guard:
            place = self._places.get(address)
            if place is None or place is instead_of:
                place = self._places[address] = self._find(address)
            return place

    def forget(self, address: str, place: _Place | None) -> None:
        """
        Ask anew the next time, unless somebody has in the meantime.
        """
        with self._guard:
            if self._places.get(address) is place:
                self._places.pop(address, None)

    def headers(self, target: Target, address: str) -> Mapping[str, str]:
        """
        What goes along with a request: the headers that are given for the host of the URI, and for that host only.
        """
        origin = _target(address)
        given: Mapping[str, str] = {}
        # A server that stands behind both usual ports is one, and leads from the open one to the other.
        is_upgrade = (origin.scheme, origin.port, target.scheme, target.port) == ("http", 80, "https", 443)
        if target.host == origin.host and (target[:3] == origin[:3] or is_upgrade):
            given = self._own_headers(origin.host)
        return given if any(name.lower() == "user-agent" for name in given) else {"User-Agent": "kserve-pvc", **given}

    def _own_headers(self, host: str) -> Mapping[str, str]:
        name = f"{host}-headers"
        given = self._given.get(host)
        if given is None and self._environ.get(name):
            try:
                given = json.loads(self._environ[name])
            except (ValueError, RecursionError):
                given = ()
        return {} if given is None else _checked_headers(name, given)

    def _ask(self, address: str, name: str, *, is_promised: bool) -> _Place:
        """Find out what is there, asked again while the server is busy or the network fails."""
        try:
            return ask_patiently(lambda: self._find(address, None if is_promised else name), self._retry_seconds)
        except HTTPError as error:
            raise SourceUnavailableError(address, str(error), is_final=error.is_final) from error

    def _find(self, address: str, name: str | None = None) -> _Place:
        """Follow a URL to where it leads. With `name`, an answer that is a web page and not such a file is refused."""
        target, method, hops = _target(address), "HEAD", 0
        while True:
            status, headers = self._look(method, target, address)
            if status in _REDIRECTS and "location" in headers:
                hops += 1
                if hops > _MAX_HOPS:
                    raise SourceUnavailableError(
                        address, f"it points elsewhere more than {_MAX_HOPS} times in a row", is_final=True
                    )
                target = follow(address, target, headers["location"])
            elif method == "HEAD" and _says_too_little(status, headers):
                method = "GET"
            else:
                return _place(address, target, method, status, headers, name)

    def _look(self, method: str, target: Target, address: str) -> tuple[int, Mapping[str, str]]:
        """Ask for the head of a file: by HEAD, or by GET of one byte where that is refused or does not say enough."""
        wanted = {"Range": "bytes=0-0"} if method == "GET" else {}
        with self._client.open(method, target, {**self.headers(target, address), **wanted}) as answer:
            # A whole file that comes instead is not read: the connection is closed.
            if answer.status != 200 and (answer.length or 0) <= _MAX_ONE_BYTE_ANSWER:
                read_refusal(answer)
            return answer.status, answer.headers


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
        return target, {**self._backend.headers(target, self._address), **file.pin}

    def refusal(self, file: RemoteFile, status: int, headers: Mapping[str, str], body: bytes) -> StoreError | None:
        del body  # It is for people with a browser.
        if status in (412, 416):
            return SourceChangedError(self._address, str(file.entry.path))
        is_elsewhere = self._place is not None and self._place.target != _target(self._address)
        if status in _REDIRECTS or (is_elsewhere and status in (404, 410)):
            # Asked from the beginning, the server may lead to a better place, or say that there is none any more.
            self._backend.forget(self._address, self._place)
            return SourceUnavailableError(self._address, f"where it led before answers {status}")
        error = _refused(self._address, status, headers)
        return (
            SourceChangedError(self._address, str(file.entry.path)) if isinstance(error, SourceNotFoundError) else error
        )


class _Rest:
    """
    What follows the first bytes of an answer that cannot begin later.
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
        Fill the start of a buffer with what comes next. None: nothing of it has come for a moment; 0: the answer is
        over.
        """
        if not self._left:
            return self._reader.readinto(buffer)
        count = self._reader.readinto(buffer[: min(len(buffer), self._left)])
        if count == 0:
            return 0
        self._left -= count or 0
        return None


def check_address(host: str, address: str) -> None:
    """
    Refuse what lies inside of a network: whoever chooses a URL must not choose whom this machine talks to there.

    Raises:
        PolicyError: The address is private, loopback, link-local, of metadata, multicast or reserved.
    """
    for found in _addresses(ipaddress.ip_address(address)):
        is_outside = found.is_global and not found.is_multicast and not found.is_reserved
        if not is_outside or any(found in network for network in _ALSO_INSIDE):
            rule = f"its address {address} is not public; allow it with `allow_private` or {ALLOW_PRIVATE}=1 if it is meant"
            raise PolicyError(host, rule)


def _addresses(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """Where packets may end up: an address of IPv6 may hold one of IPv4."""
    if isinstance(address, ipaddress.IPv4Address):
        return [address]
    if address.ipv4_mapped is not None:
        return [address.ipv4_mapped]
    if address in _NAT64:
        return [ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)]
    return [address, *(found for found in (address.sixtofour, *(address.teredo or ())) if found is not None)]


def _make_check(options: Mapping[str, Any], environ: Mapping[str, str]) -> Callable[[str, str], None] | None:
    given = options.get("allow_private")
    if given is None:
        text = environ.get(ALLOW_PRIVATE, "").strip()
        given = text.lower() in ("1", "true", "yes", "on")
        if not given and text.lower() not in ("", "0", "false", "no", "off"):
            raise SettingsError(ALLOW_PRIVATE, text, "write 1, or leave it out")
    if isinstance(given, bool):
        return None if given else check_address
    hosts = {str(host).lower() for host in ([given] if isinstance(given, str) else given)}

    def check(host: str, address: str) -> None:
        if host not in hosts:
            check_address(host, address)

    return check


def _given_headers(given: Any) -> Mapping[str, Any]:
    if not isinstance(given, Mapping) or not all(isinstance(headers, Mapping) for headers in given.values()):
        raise SettingsError(
            "headers", "not shown", 'write them by host, as {"models.example.org": {"Authorization": "Bearer …"}}'
        )
    return {str(host).lower(): headers for host, headers in given.items()}


def _limits(given: Mapping[str, Any]) -> UnpackLimits:
    known = {field.name for field in attrs.fields(UnpackLimits)}
    for name, value in dict(given).items():
        if name not in known or isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise SettingsError(
                "unpack_limits", f"{name}={value!r}", f"write positive numbers for any of {', '.join(sorted(known))}"
            )
    return UnpackLimits(**given)


def _checked_headers(name: str, given: Any) -> Mapping[str, str]:
    """Headers of the user's. Their values are never shown, whatever is wrong with them."""
    remedy = 'write a JSON object of texts such as {"Authorization": "Bearer …"}'
    if not isinstance(given, Mapping):
        raise SettingsError(name, "not shown", remedy)
    for header, value in given.items():
        if (
            not isinstance(header, str)
            or not _TOKEN.fullmatch(header)
            or not isinstance(value, str)
            or not value.isprintable()
        ):
            raise SettingsError(name, "not shown", remedy)
        if header.lower() in _OWN_HEADERS:
            raise SettingsError(name, f"{header}: not shown", "leave this header out; requests have their own")
    return given


def _target(address: str) -> Target:
    scheme, _, rest = address.partition("://")
    authority, _, path = rest.partition("/")
    return target_of(f"{scheme}://{authority}/{quote(path, safe=_PATH_SAFE)}")


def _name(uri: str, address: str) -> str:
    last = address.partition("://")[2].partition("/")[2].rpartition("/")[2]
    if not last:
        raise InvalidURIError(uri, "it names no file; a directory cannot be listed over HTTP")
    # What is no UTF-8 becomes what no name may hold.
    name = unquote(last, errors="surrogateescape")
    if "/" in name:
        raise UnsafePathError(name, "the last part of a URL is the name of one file, and holds no slash")
    return str(check_name(name))


def _remote_file(
    name: str, address: str, place: _Place, promised: str | None, limits: UnpackLimits | None
) -> RemoteFile:
    is_strong = place.etag is not None and not place.etag.startswith("W/")
    token = (
        place.etag.strip('"') if is_strong and place.etag else " ".join(t for t in (place.etag, place.modified) if t)
    )
    pin = {}
    if is_strong and place.etag:
        pin["If-Match"] = place.etag
    elif place.modified:
        pin["If-Unmodified-Since"] = place.modified
    return RemoteFile(
        entry=FileEntry(path=name, size_bytes=place.size_bytes, sha256=promised, token=promised or token or None),
        address=address,
        pin=pin,
        digest=f"sha256:{place.sha256}" if place.sha256 else None,
        in_ranges=place.in_ranges,
        unpack=limits,
    )


def _says_too_little(status: int, headers: Mapping[str, str]) -> bool:
    """Whether an answer to HEAD leaves a question that GET may answer."""
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
    address: str, target: Target, method: str, status: int, headers: Mapping[str, str], name: str | None
) -> _Place:
    found = _CONTENT_RANGE.fullmatch(headers.get("content-range", ""))
    size = found[1] if found and status in (206, 416) else headers.get("content-length", "") if status == 200 else ""
    if status not in (200, 206) and not (status == 416 and size == "0"):
        raise _refused(address, status, headers) or unavailable(address, status, headers)
    if headers.get("content-encoding", "identity").lower() not in ("identity", ""):
        coding = headers["content-encoding"][:40]
        raise PolicyError(
            address, f"its server sends it as `{coding}` without being asked, so its bytes are not those of the file"
        )
    if not _LENGTH.fullmatch(size):
        rule = "its server does not say how long it is, so nothing tells a whole file from a part of it; serve it with Content-Length"
        raise PolicyError(address, rule)
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if name is not None and kind == "text/html" and not name.lower().endswith((".html", ".htm")):
        reason = "it answered with a web page and not with a file, as a server does that wants a login"
        raise SourceDeniedError(address, f"{reason}; if it is the file, say so with `#sha256=`")
    return _Place(
        target=target,
        size_bytes=int(size),
        etag=headers.get("etag"),
        modified=headers.get("last-modified"),
        sha256=_announced_digest(headers),
        in_ranges=method == "HEAD" or status != 200,
    )


def _announced_digest(headers: Mapping[str, str]) -> str | None:
    """The SHA-256 that a server gives a file: as RFC 9530 has it, or as repositories of artefacts do."""
    match = _REPRESENTATION_DIGEST.search(headers.get("repr-digest", ""))
    if match is not None:
        return base64.b64decode(match[1]).hex()
    digest = headers.get("x-checksum-sha256", "").lower()
    return digest if re.fullmatch(r"[0-9a-f]{64}", digest) else None


def _refused(address: str, status: int, headers: Mapping[str, str]) -> StoreError | None:
    if status in (401, 403, 407):
        host = _target(address).host
        reason = f"it answered {status}; headers for this host are given by the variable `{host}-headers` or the option `headers`"
        return SourceDeniedError(address, reason)
    if status in (404, 410):
        return SourceNotFoundError(address, f"it answered {status}")
    return unavailable(address, status, headers) if status not in _REDIRECTS else None
