"""
Requests to S3 that are made and signed here, and what the responses say.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol
from urllib.parse import quote, unquote_plus

from kserve_pvc._source.contract import RangeReader
from kserve_pvc.backends._http.target import HTTPError, Target
from kserve_pvc.backends._login.sigv4 import encode_query, sign
from kserve_pvc.backends._object_store import MetadataRequests, Request
from kserve_pvc.backends._ranges import NO_CREDENTIALS, RefusedError, retry_after, unavailable
from kserve_pvc.backends._refusals import head_of_range, hides_reason, words_of
from kserve_pvc.backends._s3_settings import Account
from kserve_pvc.backends._validators import http_date, identifies
from kserve_pvc.backends._xml import is_size, parse_xml

DENIED = frozenset(
    (
        *("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "401", "403"),
        *("AccountProblem", "TokenRefreshRequired", NO_CREDENTIALS),
    )
)
_BUSY = frozenset(
    (
        *("SlowDown", "TooManyRequests", "RequestLimitExceeded", "Throttling", "429", "503", "ServiceUnavailable"),
        "RequestTimeout",
    )
)
# Refusals with the status of a denial that credentials do not help with.
FINAL = frozenset(("InvalidObjectState", "RequestTimeTooSkewed"))
# A bucket that can be part of a host's name, and a host that can have none in front.
_HOST_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_ADDRESS = re.compile(r"[0-9.]+|.*:.*")
_REGION = re.compile(r"[a-z0-9-]{1,40}")
# "The authorization header is malformed; the region 'us-east-1' is wrong; expecting 'eu-west-1'"
_EXPECTED = re.compile(r"is wrong; expecting '([a-z0-9-]{1,40})'")
_REGIONAL_HOST = re.compile(
    r"(?:^|\.)s3(?:[.-](?:fips[.-])?(?:dualstack\.)?([a-z0-9-]{1,40}))?\.amazonaws\.com(?:\.cn)?(?::[0-9]+)?$"
)
_NOT_S3 = "is this an S3 endpoint?"

# Storage classes whose objects have to be restored before they can be read, on services that have such.
_COLD = frozenset(("GLACIER", "DEEP_ARCHIVE"))
# What to do about a refusal that is not about credentials.
HINTS = {
    "InvalidObjectState": "restore the object first, or copy it to another storage class",
    "RequestTimeTooSkewed": "correct the clock of this machine",
}


class Listed(NamedTuple):
    """
    What a listing says about an object.
    """

    key: str
    size_bytes: int
    etag: str | None
    date: str | None
    is_cold: bool = False


def is_cold(storage_class: str | None, status: str | None = None) -> bool:
    """
    Whether objects of a storage class may have to be restored before they can be read.

    Args:
        status: What `x-amz-archive-status` says, of objects that S3 itself moved.
    """
    return storage_class in _COLD or bool(status)


class Access(Protocol):
    """
    One way to reach S3. Methods raise `RefusedError` or `HTTPError`.
    """

    # As `SupportsAccess` names it.
    way: str

    def head(self, bucket: str, key: str, version: str | None) -> Mapping[str, str]:
        """Return the headers of one object, by lower-case name."""

    def page(self, bucket: str, prefix: str, token: str | None) -> tuple[list[Listed], str | None]:
        """Return key, size, ETag and date of the objects of a page below a prefix, and the token of the next page."""

    def read(self, bucket: str, key: str, pin: Mapping[str, str], *, renewed: bool) -> Request:
        """Return the address and headers that read a pinned object."""

    def reader(
        self, bucket: str, key: str, pin: Mapping[str, str], start: int, stop: int
    ) -> AbstractContextManager[RangeReader] | None:
        """Return a reader of its own; None where `read` is enough."""

    def secrets(self) -> Iterable[str]:
        """Return what must not be shown, as far as it was not removed from refusals before."""


class SignedAccess:
    """
    Requests that are signed here, or are anonymous.
    """

    def __init__(self, account: Account, requests: MetadataRequests, way: str) -> None:
        self.account = account
        self.way = way
        self._requests = requests
        self._payer = {"x-amz-request-payer": "requester"} if account.is_payer else {}
        # Learnt from S3 itself, by bucket.
        self._regions: dict[str, str] = {}

    def head(self, bucket: str, key: str, version: str | None) -> Mapping[str, str]:
        query = {} if version is None else {"versionId": version}
        headers = {"x-amz-checksum-mode": "ENABLED"}
        try:
            return self._send("HEAD", bucket, key, query, headers)[0]
        except RefusedError as refusal:
            if not hides_reason(refusal.status, refusal.code):
                raise
            hidden = refusal
        try:
            found = self._send("GET", bucket, key, query, {**headers, "range": "bytes=0-0"})[0]
        except HTTPError:
            raise hidden from None
        return head_of_range(found)

    def page(self, bucket: str, prefix: str, token: str | None) -> tuple[list[Listed], str | None]:
        query = {"list-type": "2", "prefix": prefix, "encoding-type": "url"}
        if token is not None:
            query["continuation-token"] = token
        return parse_listing(self._send("GET", bucket, "", query, {})[1])

    def read(self, bucket: str, key: str, pin: Mapping[str, str], *, renewed: bool) -> Request:
        if renewed:
            self.account.source.renew()
        if "VersionId" in pin:
            return self._signed("GET", bucket, key, {"versionId": pin["VersionId"]}, {})
        has_condition = "If-Match" in pin and self.account.has_conditions
        return self._signed("GET", bucket, key, {}, {"if-match": pin["If-Match"]} if has_condition else {})

    def reader(self, bucket: str, key: str, pin: Mapping[str, str], start: int, stop: int) -> None:
        return None

    def secrets(self) -> Iterable[str]:
        return ()

    def _signed(
        self, method: str, bucket: str, key: str, query: Mapping[str, str], headers: Mapping[str, str]
    ) -> Request:
        region = self._regions.get(bucket, self.account.region)
        host_target, path = self._address(bucket, key, region)
        target = host_target._replace(path=f"{path}?{encode_query(query)}" if query else path)
        headers = {**headers, **self._payer}
        credentials = self.account.source.get()
        if credentials is None:
            return target, headers
        return target, sign(method, target.authority, path, query, headers, credentials, region, time.time())

    def _address(self, bucket: str, key: str, region: str) -> tuple[Target, str]:
        """Host and path of an object, with the bucket in one of the two."""
        secure = self.account.scheme == "https"
        amazons = Target(self.account.scheme, f"s3.{region}.amazonaws.com", 443 if secure else 80, "")
        endpoint = self.account.endpoint or amazons
        path = f"/{quote(key, safe='/~')}"
        is_in_host = (
            self.account.is_virtual
            and _HOST_BUCKET.fullmatch(bucket)
            and ("." not in bucket or endpoint.scheme == "http")
            and not _ADDRESS.fullmatch(endpoint.host)
        )
        if is_in_host:
            endpoint = endpoint._replace(host=f"{bucket}.{endpoint.host}")
        else:
            path = f"/{bucket}{path if key else ''}"
        return endpoint, endpoint.path.rstrip("/") + path

    def _send(
        self, method: str, bucket: str, key: str, query: Mapping[str, str], headers: Mapping[str, str]
    ) -> tuple[Mapping[str, str], bytes]:
        return self._requests.send(
            method,
            lambda: self._signed(method, bucket, key, query, headers),
            lambda refusal: self._renew(bucket, refusal),
        )

    def _renew(self, bucket: str, refusal: RefusedError) -> bool:
        """Learn the region of a bucket, which S3 says at whatever status and is believed once; else renew."""
        region = refusal.headers.get("x-amz-bucket-region", "")
        if bucket not in self._regions and region != self.account.region and _REGION.fullmatch(region):
            self._regions[bucket] = region
            return True
        return refusal.code in DENIED and refusal.code != NO_CREDENTIALS and self.account.source.renew()


def parse_listing(body: bytes) -> tuple[list[Listed], str | None]:
    """
    Read one response to ListObjectsV2: key, size, ETag and date of each object, and the token of the next page.

    Raises:
        RefusedError: It is not such a response.
    """
    root = parse_xml(body)
    if root is None or root.tag.rpartition("}")[2] != "ListBucketResult":
        raise RefusedError(f"the listing is not a ListBucketResult; {_NOT_S3}")
    space = root.tag[: -len("ListBucketResult")]
    # Blanks come as `+`, and `+` as `%2B`.
    decode = unquote_plus if root.findtext(f"{space}EncodingType") == "url" else str
    page: list[Listed] = []
    names = (f"{space}Key", f"{space}Size", f"{space}ETag", f"{space}LastModified")
    # Few listings name such a class, and looking for it in each object costs.
    has_cold = any(name.encode() in body for name in _COLD)
    for item in root.iter(f"{space}Contents"):
        key, size, etag, date = map(item.findtext, names)
        if key is None or size is None or not is_size(size):
            raise RefusedError(f"the listing has an object without key or size; {_NOT_S3}")
        # Few objects need a date, and reading it costs more than all else.
        date = None if identifies(etag, int(size)) else http_date(date)
        page.append(
            Listed(decode(key), int(size), etag, date, has_cold and is_cold(item.findtext(f"{space}StorageClass")))
        )
    if root.findtext(f"{space}IsTruncated") != "true":
        return page, None
    token = root.findtext(f"{space}NextContinuationToken")
    if not token:
        raise RefusedError(f"the listing is truncated and has no continuation token; {_NOT_S3}")
    return page, token


def parse_refusal(status: int, headers: Mapping[str, str], body: bytes) -> RefusedError:
    """
    Read a response that is not a success.
    """
    words = _error_of(body)
    if region := _region_of(headers, words):
        headers = {**headers, "x-amz-bucket-region": region}
    if 300 <= status < 400:
        reason = unavailable("", status, headers).reason
        return RefusedError(reason, status=status, code=str(status), headers=headers)
    code, message = words.get("Code") or str(status), words.get("Message")
    says_when = status >= 500 and "retry-after" in headers
    busy = retry_after(headers) if status in (429, 503) or code in _BUSY or says_when else None
    # Not all that speaks for a service speaks its XML.
    message = message or ("" if words else words_of(headers, body))
    reason = f"{code}: {message}" if message else f"HTTP {status}" + (f" ({code})" if code != str(status) else "")
    return RefusedError(reason, status=status, code=code, busy=busy, headers=headers, hint=HINTS.get(code, ""))


def _error_of(body: bytes) -> Mapping[str, str | None]:
    root = parse_xml(body) if body else None
    if root is None or root.tag.rpartition("}")[2] != "Error":
        return {}
    return {child.tag.rpartition("}")[2]: child.text for child in root}


def _region_of(headers: Mapping[str, str], words: Mapping[str, str | None]) -> str:
    """
    The region of a bucket, wherever a refusal names it: in a header, in the body, or in the host where the bucket is.

    Only the region is taken: requests never go to a host that a response names.
    """
    if told := headers.get("x-amz-bucket-region"):
        return told
    if told := (words.get("Region") or "").strip():
        return told
    if match := _EXPECTED.search(words.get("Message") or ""):
        return match[1]
    for place in (words.get("Endpoint"), headers.get("location")):
        host = re.split(r"[/?#]", (place or "").rpartition("//")[2], maxsplit=1)[0]
        if match := _REGIONAL_HOST.search(host.lower()):
            return "us-east-1" if match[1] in (None, "external-1") else match[1]
    return ""
