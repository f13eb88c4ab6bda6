"""
Azure Blob Storage: `az://`, `abfs://`, `abfss://`, and the `https` addresses of accounts that KServe knows.

Listing and bytes come by plain HTTP requests, the bytes pinned with If-Match and straight into the caller's buffer.
Azure's SDK is only asked for tokens. With an account's key a container is signed for and not a range, so that one
signature is enough for all its blobs.
"""

from __future__ import annotations

import os
import re
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any
from urllib.parse import quote, unquote, urlencode

import attrs

from kserve_pvc._format.records import FileEntry
from kserve_pvc._source.contract import RemoteFile, Resolved, order_listing
from kserve_pvc._source.ref import ModelRef, redact
from kserve_pvc.backends._http.client import HTTPClient
from kserve_pvc.backends._http.target import HTTPError, Target
from kserve_pvc.backends._login.azure import Signature, Token, TokenError, find_login, read_signature
from kserve_pvc.backends._ranges import (
    Reader,
    RefusedError,
    ask_patiently,
    from_base64,
    read_refusal,
    retry_after,
    unavailable,
)
from kserve_pvc.backends._xml import is_size, parse_xml
from kserve_pvc.errors import (
    InvalidURIError,
    SourceChangedError,
    SourceDeniedError,
    SourceNotFoundError,
    SourceUnavailableError,
    StoreError,
    UnsafePathError,
)

# The first version that spells names which XML cannot hold, and knows versions of blobs.
_VERSION = "2021-02-12"
_DENIED = {"AccountIsDisabled", "KeyBasedAuthenticationNotPermitted", "PublicAccessNotPermitted"}
_MISSING = {"ContainerBeingDeleted"}
_CHANGED = {"ConditionNotMet", "InvalidRange"}
_BUSY = {"ServerBusy", "OperationTimedOut"}
# What a blob says that has to be fetched from the archive first.
_RESTING = {"BlobArchived", "BlobBeingRehydrated"}
_MAX_PAGE_BYTES = 16 * 1024 * 1024
# So many with the longest names and metadata still fit a page.
_PAGE_BLOBS = 1000
# An MD5 costs more than fetching and hashing together, so it is compared only where that is soon done.
_MAX_MD5_BYTES = 16 * 1024 * 1024
_HOST = re.compile(r"[a-z0-9]{3,24}\.(?:blob\.core\.windows\.net|z[0-9]{1,2}\.blob\.storage\.azure\.net)")
_CONTAINER = re.compile(r"[$a-z0-9][a-z0-9-]{2,62}")
_SECRET = re.compile(r"(sig=|Bearer )[^&\s\"'<>]+", re.IGNORECASE)
_EXAMPLES = {
    "az": "az://container/path",
    "https": "https://account.blob.core.windows.net/container/path",
    "abfs": "abfs://container@account.dfs.core.windows.net/path",
    "abfss": "abfss://container@account.dfs.core.windows.net/path",
}
_NO_VERSION = "there is no such version; the revision of an Azure URI is the version id of one blob, in an account that keeps versions"


@attrs.frozen(kw_only=True)
class Blob:
    """
    One blob as the service describes it. `md5` is in base64, as whoever uploaded it said, or the service found.
    """

    name: str
    size_bytes: int
    etag: str
    md5: str | None
    is_directory: bool


@attrs.frozen
class _Place:
    """
    What a URI names: the host that stands for the account, a container, and a blob or what lies below it.
    """

    host: str
    container: str
    name: str

    @property
    def address(self) -> str:
        return f"{self.host}/{self.container}/{self.name}"

    @property
    def uri(self) -> str:
        return f"az://{self.container}/{self.name}"


class AzureBackend:
    """
    Models in a container of a storage account: `az://container/prefix` is a directory, `az://container/blob` a single
    file.

    A prefix never brings its siblings: `az://c/m/model` means `m/model/…`, not `m/model-v2/…`. Empty blobs are files;
    blobs that stand for directories are left out. `revision` is the version id of one blob.

    Args:
        options: Arguments of `adlfs.AzureBlobFileSystem` that say who asks. Without them the environment counts, by the
            names of adlfs, of Azure's SDK and of KServe. One more of our own: `check_md5=False`, for blobs
            whose Content-MD5 is wrong.
        environ: What stands for the environment of the process.
    """

    def __init__(self, options: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> None:
        self._login = find_login({name: value for name, value in options.items() if name != "check_md5"}, environ)
        self._checks_md5 = bool(options.get("check_md5", True))
        self._client = HTTPClient(environ=environ)
        # Signatures that came with URIs, by address. Replaced as a whole, since many threads look into it.
        self._signatures: Mapping[str, Signature] = {}
        self._retry_seconds = 300.0

    def resolve(self, ref: ModelRef) -> Resolved:
        return order_listing(ref, chain.from_iterable(self.pages(ref)))

    def pages(self, ref: ModelRef) -> Iterator[Sequence[RemoteFile]]:
        place = self._place(ref)
        self._remember(place, ref)
        with self._translated(ref.uri, place):
            if place.name and not place.name.endswith("/") and (single := self._single(place, ref)) is not None:
                yield [single]
                return
            if ref.revision is not None:
                raise SourceNotFoundError(str(ref), _NO_VERSION)
            yield from self._below(place, ref, place.name.rstrip("/") + "/" if place.name.strip("/") else "")

    def _place(self, ref: ModelRef) -> _Place:
        authority, _, name = ref.location.partition("/")
        container, _, host = authority.partition("@")
        if ref.scheme == "https":
            host = authority
            container, _, name = name.partition("/")
        # What is a file system at one host is a container at the other.
        host = host.replace(".dfs.", ".blob.", 1) or self._login.host or ""
        example = _EXAMPLES.get(ref.scheme, _EXAMPLES["az"])
        if not host:
            raise InvalidURIError(
                ref.uri, f"it names no account; set AZURE_STORAGE_ACCOUNT_NAME, or write `{_EXAMPLES['abfss']}`"
            )
        if not _HOST.fullmatch(host):
            raise InvalidURIError(ref.uri, f"its host is no storage account; write `{example}`")
        if not _CONTAINER.fullmatch(container):
            raise InvalidURIError(ref.uri, f"it names no container; write `{example}`")
        if {".", ".."} & set(name.split("/")):
            # Servers and proxies take such parts away, and then it is another blob, if not another container.
            raise UnsafePathError(ref.location, "a path may not hold `.` or `..`")
        return _Place(host, container, name)

    def _remember(self, place: _Place, ref: ModelRef) -> None:
        others = {address: signature for address, signature in self._signatures.items() if address != place.address}
        query = getattr(ref, "query", None)
        self._signatures = {**others, place.address: read_signature("the query of the URI", query)} if query else others

    def _single(self, place: _Place, ref: ModelRef) -> RemoteFile | None:
        """The blob itself, if the URI names one; it wins over a prefix of the same name."""
        try:
            headers, _ = self._ask("HEAD", place, {"versionid": ref.revision} if ref.revision else {})
        except RefusedError as refusal:
            if refusal.status == 404 and refusal.code != "ContainerNotFound":
                return None
            if ref.revision is not None and refusal.status == 400:
                raise SourceNotFoundError(str(ref), f"{refusal.reason}; {_NO_VERSION}") from None
            raise
        if _is_directory(headers.get("x-ms-resource-type"), headers.get("x-ms-meta-hdi_isfolder")):
            return None
        if ref.revision is not None and headers.get("x-ms-version-id") != ref.revision:
            raise SourceNotFoundError(str(ref), _NO_VERSION)
        size, etag = headers.get("content-length", ""), headers.get("etag")
        if not is_size(size) or not etag:
            raise RefusedError("its answer has no length or no ETag, so it is no blob service")
        blob = Blob(
            name=place.name, size_bytes=int(size), etag=etag, md5=headers.get("content-md5"), is_directory=False
        )
        return self._file(place, place.name.rpartition("/")[2], blob, ref.revision)

    def _below(self, place: _Place, ref: ModelRef, prefix: str) -> Iterator[Sequence[RemoteFile]]:
        for page in self._listing(place, prefix):
            files = []
            for blob in page:
                if not blob.name.startswith(prefix):
                    raise SourceUnavailableError(ref.uri, f"it was asked for `{prefix}` and listed `{blob.name}`")
                if not blob.is_directory:
                    files.append(self._file(place, blob.name[len(prefix) :], blob, None))
            yield files

    def _listing(self, place: _Place, prefix: str) -> Iterator[list[Blob]]:
        query = {
            "restype": "container",
            "comp": "list",
            "include": "metadata",
            "prefix": prefix,
            "maxresults": str(_PAGE_BLOBS),
        }
        markers: set[str] = set()
        while True:
            _, body = self._ask("GET", place, query)
            page, marker = parse_listing(body)
            yield page
            if not marker:
                return
            if marker in markers:
                raise RefusedError("its listing does not end: it names a page a second time")
            markers.add(marker)
            query["marker"] = marker

    def _file(self, place: _Place, name: str, blob: Blob, version: str | None) -> RemoteFile:
        etag = blob.etag.strip('"')
        # Listings have ETags without the quotes that a condition needs.
        pin = {"If-Match": f'"{etag}"'}
        if version is not None:
            pin["versionid"] = version
        digest = _md5_of(blob.md5) if self._checks_md5 and blob.size_bytes <= _MAX_MD5_BYTES else None
        entry = FileEntry(path=name, size_bytes=blob.size_bytes, token=version or etag)
        address = _Place(place.host, place.container, blob.name).address
        return RemoteFile(entry=entry, address=address, pin=pin, digest=digest)

    def open_range(self, file: RemoteFile, start: int, stop: int) -> Reader:
        return Reader(self._client, self, file, _place_of(file).uri, start, stop)

    def request(self, file: RemoteFile, *, renewed: bool) -> tuple[Target, Mapping[str, str]]:
        place = _place_of(file)
        query = {"versionid": file.pin["versionid"]} if "versionid" in file.pin else {}
        with self._translated(place.uri, place):
            target, headers = self._authorized(place, query, renewed=renewed)
            return target, {**headers, "If-Match": file.pin["If-Match"]}

    def refusal(self, file: RemoteFile, status: int, headers: Mapping[str, str], body: bytes) -> StoreError | None:
        refusal, place = _refusal(status, headers, body), _place_of(file)
        if _is_missing(refusal) or status in (412, 416) or refusal.code in _CHANGED:
            # What was listed a moment ago has since gone or become another.
            return SourceChangedError(place.uri, str(file.entry.path))
        is_known = _is_denied(refusal) or refusal.busy is not None or refusal.code in _RESTING
        return self._meaning(refusal, place.uri, place) if is_known else None

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
        if isinstance(self._login.credential, Token):
            self._login.credential.close()

    def _reach(self, place: _Place) -> tuple[Target, Any]:
        """Where a place is, and as whom it is asked for: a signature that came with a URI counts for what is below that."""
        endpoint, credential = self._login.reach(place.host)
        given = [a for a in self._signatures if f"{place.address}/".startswith(f"{a.rstrip('/')}/")]
        return endpoint, self._signatures[max(given, key=len)] if given else credential

    def _authorized(
        self, place: _Place, query: Mapping[str, str], *, renewed: bool = False
    ) -> tuple[Target, dict[str, str]]:
        endpoint, credential = self._reach(place)
        account = place.host.partition(".")[0]
        signed, headers = credential.authorize(
            account, place.container, is_sealed=endpoint.scheme == "https", renewed=renewed
        )
        name = "" if "comp" in query else f"/{quote(place.name, safe='/~')}"
        whole = "&".join(part for part in (urlencode(query, quote_via=quote), signed) if part)
        path = f"{endpoint.path.rstrip('/')}/{place.container}{name}"
        return endpoint._replace(path=f"{path}?{whole}" if whole else path), {"x-ms-version": _VERSION, **headers}

    def _ask(self, method: str, place: _Place, query: Mapping[str, str]) -> tuple[Mapping[str, str], bytes]:
        """A small request, asked again while the service is busy or the network fails. Raises `RefusedError`."""
        return ask_patiently(lambda: self._ask_once(method, place, query), self._retry_seconds)

    def _ask_once(self, method: str, place: _Place, query: Mapping[str, str]) -> tuple[Mapping[str, str], bytes]:
        target, headers = self._authorized(place, query)
        with self._client.open(method, target, headers) as answer:
            if answer.status == 200:
                return answer.headers, answer.read(_MAX_PAGE_BYTES, time.monotonic() + 2 * self._client.answer_seconds)
            raise _refusal(answer.status, answer.headers, read_refusal(answer))

    @contextmanager
    def _translated(self, uri: str, place: _Place) -> Iterator[None]:
        try:
            yield
        except RefusedError as refusal:
            raise self._meaning(refusal, uri, place) from None
        except TokenError as error:
            raise (SourceDeniedError if error.is_denied else SourceUnavailableError)(uri, str(error)) from None
        except HTTPError as error:
            raise SourceUnavailableError(uri, str(error), is_final=error.is_final) from error

    def _meaning(self, refusal: RefusedError, uri: str, place: _Place) -> StoreError:
        reason = _SECRET.sub(r"\1…", redact(refusal.reason)).rstrip(". ")
        if _is_denied(refusal) or _is_missing(refusal):
            # To whom may not look, Azure shows a private container as one that is not there.
            hint = self._reach(place)[1].hint()
            reason = f"{reason}; {hint}" if hint else reason
            return SourceDeniedError(uri, reason) if _is_denied(refusal) else SourceNotFoundError(uri, reason)
        is_final = 300 <= refusal.status < 500 and refusal.busy is None
        return SourceUnavailableError(uri, reason, retry_after=refusal.busy, is_final=is_final)


def parse_listing(body: bytes) -> tuple[list[Blob], str]:
    """
    Read one answer of List Blobs: the blobs, and the mark of the next page, empty if there is none.

    Raises:
        RefusedError: It is no such answer.
    """
    root = parse_xml(body)
    if root is None or root.tag != "EnumerationResults":
        raise RefusedError("its listing is no EnumerationResults, so it is no blob service")
    return [_parse_blob(item) for item in root.iterfind("Blobs/Blob")], root.findtext("NextMarker") or ""


def _parse_blob(item: ET.Element) -> Blob:
    named, properties = item.find("Name"), item.find("Properties")
    if named is None or not named.text or properties is None:
        raise RefusedError("its listing holds a blob without name or properties, so it is no blob service")
    size, etag = properties.findtext("Content-Length", ""), properties.findtext("Etag", "")
    if not is_size(size) or not etag:
        raise RefusedError("its listing holds a blob without length or ETag, so it is no blob service")
    # What XML cannot hold comes quoted, and says so.
    name = unquote(named.text) if named.get("Encoded") == "true" else named.text
    metadata = {child.tag.lower(): child.text for child in item.find("Metadata") or ()}
    is_directory = _is_directory(properties.findtext("ResourceType"), metadata.get("hdi_isfolder"))
    return Blob(
        name=name,
        size_bytes=int(size),
        etag=etag,
        md5=properties.findtext("Content-MD5"),
        is_directory=is_directory or (size == "0" and name.endswith("/")),
    )


def _is_directory(kind: str | None, is_folder: str | None) -> bool:
    """Accounts with directories say so themselves; in the others tools mark empty blobs."""
    return kind == "directory" or (is_folder or "").lower() == "true"


def _md5_of(text: str | None) -> str | None:
    digest = from_base64(text, 16)
    return None if digest is None else f"md5:{digest}"


def _place_of(file: RemoteFile) -> _Place:
    host, container, name = file.address.split("/", 2)
    return _Place(host, container, name)


def _is_denied(refusal: RefusedError) -> bool:
    return refusal.status in (401, 403) or refusal.code in _DENIED


def _is_missing(refusal: RefusedError) -> bool:
    return refusal.status == 404 or refusal.code in _MISSING


def _refusal(status: int, headers: Mapping[str, str], body: bytes) -> RefusedError:
    root = parse_xml(body) if body else None
    words = {child.tag: child.text or "" for child in root} if root is not None and root.tag == "Error" else {}
    if 300 <= status < 400:
        return RefusedError(unavailable("", status, headers).reason, status=status)
    code = headers.get("x-ms-error-code") or words.get("Code") or str(status)
    # What follows the first line are the numbers of the request.
    message = words.get("Message", "").strip().partition("\n")[0]
    busy = retry_after(headers) if status in (429, 503) or code in _BUSY else None
    return RefusedError(f"{code}: {message}" if message else f"it answered {code}", status=status, code=code, busy=busy)
