"""
`s3://`: Amazon S3 and what speaks its protocol.

Where the settings are plain, requests are signed here with what is given. Otherwise they are what s3fs would make of
them: botocore finds credentials, region and endpoint, and requests are still signed here; s3fs itself lists and signs
URLs where the signature is not the ordinary one, and reads the bytes where a URL is not enough. Bytes come by HTTP
requests that are pinned with If-Match, by their date or by VersionId, straight into the caller's buffer.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.util import find_spec
from typing import Any

from kserve_pvc._source.contract import RangeReader, RemoteFile
from kserve_pvc._source.redaction import hide, redact
from kserve_pvc._source.ref import ModelRef
from kserve_pvc.backends._crc32c import make_checksum
from kserve_pvc.backends._http.client import HTTPClient
from kserve_pvc.backends._object_store import (
    Kind,
    MetadataRequests,
    Object,
    ObjectStore,
    Place,
    Request,
    md5_digest,
)
from kserve_pvc.backends._options import (
    check_options,
    checks_certificates,
    find_reasons,
    log_access,
    read_settings,
    warn_unverified,
)
from kserve_pvc.backends._ranges import RefusedError, from_base64
from kserve_pvc.backends._s3_requests import DENIED, FINAL, Access, Listed, SignedAccess, is_cold, parse_refusal
from kserve_pvc.backends._s3_settings import (
    BEYOND_URLS,
    ORDINARY_BUCKET,
    OWN_OPTIONS,
    PLAIN_OPTIONS,
    RULES,
    plain_account,
    sdk_account,
)
from kserve_pvc.backends._validators import bare_etag, http_date, identifies, make_token
from kserve_pvc.backends._xml import is_size
from kserve_pvc.errors import InvalidURIError, UnsafePathError

__all__ = ["RULES", "S3Backend"]

_MISSING = {"NoSuchBucket", "NoSuchKey", "NoSuchVersion", "404"}
_CHANGED = {"PreconditionFailed", "412", "InvalidRange", "416"}
# An access point, and what follows it.
_RESOURCE = re.compile(
    r"(arn:[^:/]+:[^:/]+:[^:/]*:[0-9]{12}:(?:outpost[:/][A-Za-z0-9-]+[:/])?accesspoint[:/][A-Za-z0-9.-]+)(?:/|$)(.*)",
    re.DOTALL | re.ASCII,
)
_MD5 = re.compile(r"[0-9a-f]{32}")


class S3Backend(ObjectStore):
    """
    Models in an S3 bucket: `s3://bucket/prefix` is a directory, `s3://bucket/key` of one object a single file.

    Keys that end in `/` and hold nothing are markers of directories. `revision` is the VersionId of one object.

    Args:
        options: Arguments of `s3fs.S3FileSystem`. fsspec's configuration counts below them, and AWS's own environment
            and files below that. One more of our own: `etag_is_md5=False`, for servers whose ETags of 32 digits are
            not an MD5.
        environ: What stands for the environment of the process. The SDK reads only that of the process.
    """

    def __init__(self, options: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> None:
        if find_spec("s3fs") is None:
            raise ImportError("No module named 's3fs'", name="s3fs")
        settings = read_settings("s3", options, environ)
        check_options("s3", settings.options, PLAIN_OPTIONS | OWN_OPTIONS, _load)
        reasons = find_reasons(RULES, settings)
        account, beyond = sdk_account(settings) if reasons else (plain_account(settings), ())
        requests = MetadataRequests(HTTPClient(environ=settings.environ, ca_bundle=account.ca_bundle), parse_refusal)
        signed = SignedAccess(account, requests, "direct:s3fs" if reasons else "direct")
        reads = bool(find_reasons(BEYOND_URLS, settings))

        def make_class() -> Access:
            from kserve_pvc.backends._s3fs import S3fsAccess

            arguments = {name: value for name, value in settings.options.items() if name not in OWN_OPTIONS}
            return S3fsAccess(arguments, reads=reads)

        self.signed = None if beyond or reads else signed
        service = _S3(self.signed, make_class, etag_is_md5=bool(settings.options.get("etag_is_md5", True)))
        super().__init__(service, requests)
        log_access("s3", "fsspec:s3fs" if reads else signed.way, reasons)
        self.is_unverified = account.ca_bundle is False or not checks_certificates(settings.options)
        if self.is_unverified:
            warn_unverified("s3")


class _S3:
    """
    What S3 is, for `ObjectStore`.
    """

    no_version = "there is no such version; the revision of an S3 URI is the VersionId of one object"

    def __init__(self, signed: Access | None, make_class: Callable[[], Access], *, etag_is_md5: bool) -> None:
        self._signed = signed
        self._make_class = make_class
        self._class: Access | None = None
        self._etag_is_md5 = etag_is_md5

    def way(self, bucket: str) -> Access:
        """
        Choose how a bucket is reached: one with rules of its own always by the class.
        """
        if self._signed is not None and ORDINARY_BUCKET.fullmatch(bucket):
            return self._signed
        if self._class is None:
            self._class = self._make_class()
        return self._class

    def place(self, ref: ModelRef) -> Place:
        if {".", ".."} & set(ref.location.split("/")):
            # Servers and proxies remove such parts of a path, and then it is another object, or even another bucket.
            raise UnsafePathError(ref.location, "a path may not contain `.` or `..`")
        match = _RESOURCE.match(ref.location)
        if match is not None:
            # The SDK takes slashes and colons alike, and one without a slash is a bucket as others are.
            return Place(match[1].replace("/", ":"), match[2])
        bucket, _, key = ref.location.partition("/")
        if not bucket or bucket.startswith("arn:"):
            raise InvalidURIError(ref.uri, "it names no bucket; write `s3://bucket/path`")
        return Place(bucket, key)

    def uri(self, place: Place) -> str:
        return f"s3://{place.address}"

    def head(self, place: Place, revision: str | None) -> Object:
        try:
            head = self.way(place.bucket).head(place.bucket, place.name, revision)
        except RefusedError as refusal:
            if revision is not None and _is_no_version(refusal):
                raise RefusedError(refusal.reason, status=404, code="NoSuchVersion") from None
            raise
        if not any(name in ("etag", "last-modified") or name.startswith("x-amz-") for name in head):
            raise RefusedError("response has neither ETag nor Last-Modified; is this an S3 endpoint?")
        size = head.get("content-length", "") or ("" if revision else self._listed_size(place))
        if not is_size(size):
            raise RefusedError("response lacks Content-Length; is this an S3 endpoint?")
        version = head.get("x-amz-version-id", "null")
        cold = is_cold(head.get("x-amz-storage-class"), head.get("x-amz-archive-status"))
        listed = Listed(place.name, int(size), head.get("etag"), http_date(head.get("last-modified")), cold)
        return self._object(listed, revision, None if version == "null" else version)

    def _listed_size(self, place: Place) -> str:
        """The size of an object whose description has none, as proxies send it."""
        found, _ = self.way(place.bucket).page(place.bucket, place.name, None)
        return next((str(listed.size_bytes) for listed in found if listed.key == place.name), "")

    def page(self, place: Place, token: str | None) -> tuple[Sequence[Object], str | None]:
        found, token = self.way(place.bucket).page(place.bucket, place.name, token)
        return [self._object(listed) for listed in found], token

    def _object(self, listed: Listed, revision: str | None = None, version: str | None = None) -> Object:
        key, size, etag, date, cold = listed
        name = bare_etag(etag) if etag is not None and identifies(etag, size) else None
        digest = _MD5.fullmatch(name) if name and self._etag_is_md5 else None
        if revision is not None:
            pin = {"VersionId": revision}
        elif name is not None:
            # Not the VersionId: reading by that needs a right that reading does not need.
            pin = {"If-Match": f'"{name}"'}
        else:
            pin = {"If-Unmodified-Since": date} if date else {"VersionId": version} if version else {}
        return Object(
            name=key,
            size_bytes=size,
            token=revision or version or name or date or make_token(),
            pin=pin,
            digest=md5_digest(digest and digest[0], size),
            is_directory=not size and key.endswith("/"),
            is_cold=cold,
        )

    def read(self, place: Place, pin: Mapping[str, str], *, renewed: bool) -> Request:
        return self.way(place.bucket).read(place.bucket, place.name, pin, renewed=renewed)

    def reader(
        self, place: Place, file: RemoteFile, start: int, stop: int
    ) -> AbstractContextManager[RangeReader] | None:
        return self.way(place.bucket).reader(place.bucket, place.name, file.pin, start, stop)

    def evidence(self, place: Place, file: RemoteFile) -> str | None:
        """
        Return its SHA-256, CRC32 or CRC32C if it was uploaded with one, else its ETag where that is an MD5: not after a
        multipart upload, and not where S3 encrypts with keys of its own service or of the customer.
        """
        head = self.way(place.bucket).head(place.bucket, place.name, file.pin.get("VersionId"))
        if "If-Match" in file.pin and bare_etag(head.get("etag", "")) != bare_etag(file.pin["If-Match"]):
            raise RefusedError("it has another ETag now", code="PreconditionFailed")
        if file.pin.get("If-Unmodified-Since") not in (None, http_date(head.get("last-modified"))):
            raise RefusedError("it has another date now", code="PreconditionFailed")
        if head.get("x-amz-checksum-type", "FULL_OBJECT") == "FULL_OBJECT":
            for name in ("sha256", "crc32", "crc32c") if make_checksum("crc32c") else ("sha256", "crc32"):
                if (digest := from_base64(head.get(f"x-amz-checksum-{name}", ""))) is not None:
                    return f"{name}:{digest}"
        encryption = head.get("x-amz-server-side-encryption", "AES256")
        is_plain = encryption == "AES256" and not any("customer" in name for name in head)
        return file.digest if is_plain else None

    def refused(self, status: int, headers: Mapping[str, str], body: bytes) -> RefusedError:
        return parse_refusal(status, headers, body)

    def kind(self, refusal: RefusedError) -> Kind:
        if refusal.code in DENIED:
            return "denied"
        if refusal.code in _MISSING:
            return "missing"
        if refusal.code in _CHANGED:
            return "changed"
        if refusal.code in FINAL:
            return "final"
        if refusal.status in (401, 403):
            return "denied"
        return "other" if refusal.busy is None else "busy"

    def describe(self, refusal: RefusedError, place: Place) -> str:
        secrets = () if self._class is None else self._class.secrets()
        return redact(hide(refusal.reason, secrets)).rstrip(". ")

    def access(self, place: Place) -> str:
        return self.way(place.bucket).way

    def close(self) -> None:
        """Nothing but the client is kept open: s3fs closes its own session when it is collected."""


def _is_no_version(refusal: RefusedError) -> bool:
    """Whether a VersionId is that of a delete marker, or is malformed."""
    if refusal.status == 405:
        return refusal.headers.get("x-amz-delete-marker") == "true"
    return refusal.status == 400 and refusal.code in ("400", "InvalidArgument", "InvalidVersionId")


def _load() -> Sequence[Callable[..., Any]]:
    from aiobotocore.session import AioSession
    from s3fs import S3FileSystem

    return S3FileSystem, AioSession
