"""
`gs://`: Google Cloud Storage.

Listing and bytes come by plain HTTP requests of the JSON API, the bytes pinned by their generation and straight into
the caller's buffer. Google's own library is only asked who we are, and not even that where nobody or a given token
asks.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import chain
from typing import Any
from urllib.parse import quote, urlencode

import attrs

from kserve_pvc._format.records import FileEntry
from kserve_pvc._source.contract import RemoteFile, Resolved, order_listing
from kserve_pvc._source.ref import ModelRef
from kserve_pvc.backends._crc32c import make_checksum
from kserve_pvc.backends._http.client import HTTPClient
from kserve_pvc.backends._http.target import HTTPError, Target
from kserve_pvc.backends._login.google import LoginError, find_endpoint, find_login, hide
from kserve_pvc.backends._ranges import (
    Reader,
    RefusedError,
    ask_patiently,
    from_base64,
    read_refusal,
    retry_after,
    unavailable,
)
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

_BUSY = {"rateLimitExceeded", "userRateLimitExceeded"}
_MAX_PAGE_BYTES = 16 * 1024 * 1024
# As many as the service lists at once.
_PAGE_OBJECTS = 1000
# An MD5 costs more than fetching and hashing together, so where it is all there is, it is compared only if that is soon
# done.
_MAX_MD5_BYTES = 16 * 1024 * 1024
_MAX_SAID = 500
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,221}")
_GENERATION = re.compile(r"[0-9]{1,19}", re.ASCII)
_SIZE = re.compile(r"[0-9]{1,18}", re.ASCII)
_FIELDS = "name,size,generation,crc32c,md5Hash,contentEncoding"
_NO_VERSION = "there is no such version; the revision of a gs URI is the generation of one object"
# Arguments of `gcsfs.GCSFileSystem` that count here, and those that say nothing about what a file holds.
_OPTIONS = {"endpoint_url", "project", "requester_pays", "token"}
_IGNORED_OPTIONS = {
    *(
        "access",
        "asynchronous",
        "batch_size",
        "block_size",
        "cache_timeout",
        "check_connection",
        "consistency",
        "default_location",
    ),
    *(
        "listings_expiry_time",
        "loop",
        "max_paths",
        "requests_timeout",
        "secure_serialize",
        "skip_instance_cache",
        "timeout",
    ),
    *("use_listings_cache", "version_aware"),
}


@attrs.frozen(kw_only=True)
class Object:
    """
    One object as the service describes it. `digest` is what it vouches for, as `name:hex`.
    """

    name: str
    size_bytes: int
    generation: str
    digest: str | None
    is_compressed: bool


class GSBackend:
    """
    Models in a bucket of Google Cloud Storage: `gs://bucket/prefix` is a directory, `gs://bucket/object` a single file.

    A prefix never brings its siblings: `gs://b/m/model` means `m/model/…`, not `m/model-v2/…`. Empty objects are files;
    those whose names end in `/` and that hold nothing are markers of directories. `revision` is the generation of one
    object.

    Args:
        options: Arguments of `gcsfs.GCSFileSystem`: `token`, `endpoint_url`, `project`, `requester_pays`. Without
            `token` the default credentials count, and where there are none, nobody in particular asks.
        environ: Where the endpoint, proxies and certificates are looked up. google-auth has only the environment of the
            process.
    """

    def __init__(self, options: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> None:
        if find_spec("google") is None or find_spec("google.auth") is None:
            raise ImportError("No module named 'google.auth'", name="google.auth")
        options = _with_fsspec(options, environ)
        self._endpoint, is_emulator = find_endpoint(options, environ)
        self._login = find_login(options.get("token"), self._endpoint, is_emulator=is_emulator)
        self._payer = _payer(options)
        self._client = HTTPClient(environ=environ)
        self._retry_seconds = 300.0

    def resolve(self, ref: ModelRef) -> Resolved:
        return order_listing(ref, chain.from_iterable(self.pages(ref)))

    def pages(self, ref: ModelRef) -> Iterator[Sequence[RemoteFile]]:
        bucket, name = _place(ref)
        with self._translated(ref.uri):
            if name and not name.endswith("/") and (single := self._single(ref, bucket, name)) is not None:
                yield [single]
                return
            if ref.revision is not None:
                raise SourceNotFoundError(str(ref), _NO_VERSION)
            yield from self._below(ref, bucket, name.rstrip("/") + "/" if name.strip("/") else "")

    def _single(self, ref: ModelRef, bucket: str, name: str) -> RemoteFile | None:
        """The object itself, if the URI names one; it wins over a prefix of the same name."""
        query = {"fields": _FIELDS} | ({"generation": ref.revision} if ref.revision else {})
        try:
            found = parse_object(_parse(self._ask(_object_path(bucket, name), query)))
        except RefusedError as refusal:
            # Without the right to list, the service answers 403 for what is not there: the listing then tells what it
            # is.
            if refusal.status == 404 or (_is_denied(refusal) and ref.revision is None):
                return None
            raise
        if found.name != name or (ref.revision is not None and int(found.generation) != int(ref.revision)):
            raise RefusedError(f"it was asked for `{name}` and described another object")
        return self._file(ref, bucket, name.rpartition("/")[2], found)

    def _below(self, ref: ModelRef, bucket: str, prefix: str) -> Iterator[Sequence[RemoteFile]]:
        for page in self._listing(bucket, prefix):
            files = []
            for found in page:
                if not found.name.startswith(prefix):
                    raise SourceUnavailableError(ref.uri, f"it was asked for `{prefix}` and listed `{found.name}`")
                if found.size_bytes or not found.name.endswith("/"):
                    files.append(self._file(ref, bucket, found.name[len(prefix) :], found))
            yield files

    def _listing(self, bucket: str, prefix: str) -> Iterator[list[Object]]:
        query = {"prefix": prefix, "maxResults": str(_PAGE_OBJECTS), "fields": f"nextPageToken,items({_FIELDS})"}
        tokens: set[str] = set()
        while True:
            page, token = parse_listing(self._ask(f"/storage/v1/b/{quote(bucket, safe='')}/o", query))
            yield page
            if token is None:
                return
            if token in tokens:
                raise RefusedError("its listing does not end: it names a page a second time")
            tokens.add(token)
            query = {**query, "pageToken": token}

    def _file(self, ref: ModelRef, bucket: str, name: str, found: Object) -> RemoteFile:
        entry = FileEntry(path=name, size_bytes=found.size_bytes, token=found.generation)
        if found.is_compressed and ref.selects(entry.path):
            rule = "it is stored with `Content-Encoding: gzip`, so its size and checksum are not those of what it holds"
            raise PolicyError(
                f"gs://{bucket}/{found.name}", f"{rule}; upload it without, or leave it out with `ignore_patterns`"
            )
        return RemoteFile(
            entry=entry, address=f"{bucket}/{found.name}", pin={"generation": found.generation}, digest=found.digest
        )

    def open_range(self, file: RemoteFile, start: int, stop: int) -> Reader:
        return Reader(self._client, self, file, f"gs://{file.address}", start, stop)

    def request(self, file: RemoteFile, *, renewed: bool) -> tuple[Target, Mapping[str, str]]:
        bucket, _, name = file.address.partition("/")
        # A generation names bytes for ever: another one is not given instead.
        query = {"alt": "media", "generation": file.pin["generation"]}
        with self._translated(f"gs://{file.address}"):
            return self._target("/download" + _object_path(bucket, name), query), self._login.headers(renewed=renewed)

    def refusal(self, file: RemoteFile, status: int, headers: Mapping[str, str], body: bytes) -> StoreError | None:
        refusal = _refusal(status, headers, body)
        if status in (404, 412, 416):
            # What was listed a moment ago has since gone or become another.
            return SourceChangedError(f"gs://{file.address}", str(file.entry.path))
        is_known = _is_denied(refusal) or refusal.busy is not None or 400 <= status < 500
        return self._meaning(refusal, f"gs://{file.address}") if is_known else None

    def tune(self, *, stall_seconds: float, retry_seconds: float) -> None:
        """
        How long a listing may stay silent, and how long it is tried.
        """
        self._client.answer_seconds = stall_seconds
        self._retry_seconds = retry_seconds

    def close(self) -> None:
        """
        Let go of idle connections. Whoever goes on gets new ones.
        """
        self._client.close()

    checksum = staticmethod(make_checksum)

    def evidence(self, file: RemoteFile) -> str | None:
        """
        What the listing says: the service computes it itself when an object is uploaded, and keeps it with the
            generation.
        """
        return file.digest

    def _target(self, path: str, query: Mapping[str, str]) -> Target:
        whole = {**query, "userProject": self._payer} if self._payer else query
        place = self._endpoint.path.rstrip("/") + path
        return self._endpoint._replace(path=f"{place}?{urlencode(whole, quote_via=quote, safe='')}")

    def _ask(self, path: str, query: Mapping[str, str]) -> bytes:
        """A small request, asked again while the service is busy or the network fails. Raises `RefusedError`."""
        return ask_patiently(lambda: self._ask_once(self._target(path, query)), self._retry_seconds)

    def _ask_once(self, target: Target) -> bytes:
        headers = self._login.headers(renewed=False)
        try:
            return self._get(target, headers)
        except RefusedError as refusal:
            if not _is_denied(refusal) or (newer := self._login.headers(renewed=True)) == headers:
                raise
        return self._get(target, newer)

    def _get(self, target: Target, headers: Mapping[str, str]) -> bytes:
        with self._client.open("GET", target, headers) as answer:
            if answer.status == 200:
                return answer.read(_MAX_PAGE_BYTES, time.monotonic() + 2 * self._client.answer_seconds)
            raise _refusal(answer.status, answer.headers, read_refusal(answer))

    @contextmanager
    def _translated(self, uri: str) -> Iterator[None]:
        try:
            yield
        except RefusedError as refusal:
            raise self._meaning(refusal, uri) from None
        except LoginError as error:
            raise (SourceDeniedError if error.is_denied else SourceUnavailableError)(
                uri, f"no token: {error}"
            ) from None
        except HTTPError as error:
            raise SourceUnavailableError(uri, str(error), is_final=error.is_final) from error

    def _meaning(self, refusal: RefusedError, uri: str) -> StoreError:
        secret = self._login.secret()
        reason = hide(refusal.reason.replace(secret, "…") if secret else refusal.reason).rstrip(". ")
        if _is_denied(refusal):
            hint = self._login.hint()
            return SourceDeniedError(uri, f"{reason}; {hint}" if hint else reason)
        if refusal.status == 404:
            return SourceNotFoundError(uri, reason)
        is_final = 300 <= refusal.status < 500 and not refusal.is_transient
        return SourceUnavailableError(uri, reason, retry_after=refusal.busy, is_final=is_final)


def _with_fsspec(options: Mapping[str, Any], environ: Mapping[str, str]) -> Mapping[str, Any]:
    """Options, and below them what fsspec's own variables say for gcsfs, which goes by two names."""
    if any(name.startswith(("FSSPEC_GS", "FSSPEC_GCS")) for name in environ):
        from fsspec.config import set_conf_env

        found: dict[str, dict[str, Any]] = {}
        set_conf_env(
            found, {name: value for name, value in environ.items() if name.startswith(("FSSPEC_GS", "FSSPEC_GCS"))}
        )
        options = {**found.get("gcs", {}), **found.get("gs", {}), **options}
    if unknown := sorted(set(options) - _OPTIONS - _IGNORED_OPTIONS):
        raise SettingsError(
            "storage_options", ", ".join(unknown), f"write {', '.join(f'`{name}`' for name in sorted(_OPTIONS))}"
        )
    return options


def _payer(options: Mapping[str, Any]) -> str:
    """The project that pays for requests, if it is not that of the bucket."""
    payer = options.get("requester_pays")
    if not payer:
        return ""
    payer = options.get("project") if payer is True else payer
    if not isinstance(payer, str) or not payer:
        raise SettingsError(
            "requester_pays", str(options["requester_pays"]), "name the project that pays, here or as `project`"
        )
    return payer


def _place(ref: ModelRef) -> tuple[str, str]:
    bucket, _, name = ref.location.partition("/")
    if not bucket:
        raise InvalidURIError(ref.uri, "it names no bucket; write `gs://bucket/path`")
    if not _BUCKET.fullmatch(bucket):
        raise InvalidURIError(ref.uri, "a bucket has letters, digits, `-`, `_` and `.` only; write `gs://bucket/path`")
    if {".", ".."} & set(name.split("/")):
        # Servers and proxies take such parts out of a path, and then it is another object, if not another bucket.
        raise UnsafePathError(ref.location, "a path may not hold `.` or `..`")
    if ref.revision is not None and not _GENERATION.fullmatch(ref.revision):
        raise InvalidURIError(ref.uri, "the revision of a gs URI is a generation, which is a number")
    return bucket, name


def _object_path(bucket: str, name: str) -> str:
    return f"/storage/v1/b/{quote(bucket, safe='')}/o/{quote(name, safe='')}"


def parse_listing(body: bytes) -> tuple[list[Object], str | None]:
    """
    Read one answer of `objects.list`: the objects, and where the next page begins.

    Raises:
        RefusedError: It is no such answer.
    """
    content = _parse(body)
    items, token = content.get("items", []), content.get("nextPageToken") or None
    if not isinstance(items, list) or not (token is None or _is_text(token)):
        raise RefusedError("its listing is none of objects, so it is no Google Cloud Storage")
    return [parse_object(item) for item in items], token


def parse_object(item: Any) -> Object:
    """
    Read the description of one object.

    Raises:
        RefusedError: It is none.
    """
    if not isinstance(item, dict):
        item = {}
    name, size, generation = (item.get(field) for field in ("name", "size", "generation"))
    if not _is_text(name) or not _matches(_SIZE, size) or not _matches(_GENERATION, generation):
        raise RefusedError("it describes an object without name, size or generation, so it is no Google Cloud Storage")
    return Object(
        name=name,
        size_bytes=int(size),
        generation=generation,
        digest=_digest(item, int(size)),
        is_compressed="gzip" in str(item.get("contentEncoding", "")).lower(),
    )


def _digest(item: Mapping[str, Any], size_bytes: int) -> str | None:
    crc32c, md5 = from_base64(item.get("crc32c"), 4), from_base64(item.get("md5Hash"), 16)
    if crc32c is not None and (md5 is None or make_checksum("crc32c") is not None):
        return f"crc32c:{crc32c}"
    return f"md5:{md5}" if md5 is not None and size_bytes <= _MAX_MD5_BYTES else None


def _matches(pattern: re.Pattern[str], text: Any) -> bool:
    return isinstance(text, str) and pattern.fullmatch(text) is not None


def _is_text(text: Any) -> bool:
    """Whether it is a text that can be sent; JSON may hold halves of characters."""
    try:
        return isinstance(text, str) and bool(text.encode())
    except UnicodeEncodeError:
        return False


def _parse(body: bytes) -> dict[str, Any]:
    try:
        content = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise RefusedError("its answer is no JSON, so it is no Google Cloud Storage")
    return content


def _is_denied(refusal: RefusedError) -> bool:
    return refusal.status in (401, 403) and refusal.busy is None


def _refusal(status: int, headers: Mapping[str, str], body: bytes) -> RefusedError:
    if 300 <= status < 400:
        return RefusedError(unavailable("", status, headers).reason, status=status)
    message, reason = _said(body)
    busy = retry_after(headers) if status in (429, 503) or reason in _BUSY else None
    return RefusedError(f"{status}: {message}" if message else f"it answered {status}", status=status, busy=busy)


def _said(body: bytes) -> tuple[str, str]:
    """The message and the reason in the body of a refusal."""
    try:
        error = _parse(body).get("error")
    except RefusedError:
        return "", ""
    if not isinstance(error, dict):
        return "", ""
    details = error.get("errors")
    first = details[0] if isinstance(details, list) and details and isinstance(details[0], dict) else {}
    return str(error.get("message", ""))[:_MAX_SAID].strip(), str(first.get("reason", ""))
