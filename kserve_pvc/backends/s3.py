"""
`s3://`: Amazon S3 and what speaks its protocol.

s3fs is the control plane: profiles, roles, SSO, proxies of credentials and every configuration that botocore knows.
Where the credentials are plain (arguments, the environment, or none) requests are signed here, because loading an SDK
takes longer than fetching a small model. Either way bytes come by plain HTTP requests that are pinned with If-Match or
VersionId, straight into the caller's buffer.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, unquote_plus

import attrs

from kserve_pvc._format.records import FileEntry
from kserve_pvc._source.contract import RemoteFile, Resolved, order_listing
from kserve_pvc._source.ref import ModelRef, redact
from kserve_pvc.backends._crc32c import make_checksum
from kserve_pvc.backends._http.client import HTTPClient
from kserve_pvc.backends._http.target import HTTPError, Target, target_of
from kserve_pvc.backends._login.sigv4 import Credentials, encode_query, sign
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
    SettingsError,
    SourceChangedError,
    SourceDeniedError,
    SourceNotFoundError,
    SourceUnavailableError,
    StoreError,
)

DENIED = {
    "AccessDenied",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "401",
    "403",
    "AccountProblem",
}
_MISSING = {"NoSuchBucket", "NoSuchKey", "NoSuchVersion", "404"}
_CHANGED = {"PreconditionFailed", "412", "InvalidRange", "416"}
_BUSY = {"SlowDown", "TooManyRequests", "RequestLimitExceeded", "Throttling", "429", "503", "ServiceUnavailable"}
_MAX_PAGE_BYTES = 16 * 1024 * 1024
# An MD5 costs more than fetching and hashing together, so it is compared only where that is soon done.
_MAX_MD5_BYTES = 16 * 1024 * 1024
_MD5 = re.compile(r'"([0-9a-f]{32})"')
# What needs none of botocore's special rules: no ARN, no access point, no directory bucket.
_PLAIN_BUCKET = re.compile(r"(?!.*--)[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
# A bucket that can be part of a host's name, and a host that can have none in front.
_HOST_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_ADDRESS = re.compile(r"[0-9.]+|.*:.*")
_PLAIN_OPTIONS = {
    "key",
    "secret",
    "token",
    "anon",
    "endpoint_url",
    "client_kwargs",
    "config_kwargs",
    "use_listings_cache",
}
_PLAIN_CLIENT = {
    "endpoint_url",
    "region_name",
    "verify",
    "aws_access_key_id",
    "aws_secret_access_key",
    "aws_session_token",
}
# Any of these in the environment changes what botocore or fsspec would do in ways that only they know.
_SDK_VARIABLES = (
    "AWS_PROFILE",
    "AWS_DEFAULT_PROFILE",
    "AWS_USE_FIPS_ENDPOINT",
    "AWS_USE_DUALSTACK_ENDPOINT",
    "AWS_S3_US_EAST_1_REGIONAL_ENDPOINT",
)
_OTHER_PARTITIONS = ("cn-", "us-iso", "eu-iso")


class Access(Protocol):
    """
    How the service is asked: signed here, or through s3fs.
    """

    def head(self, bucket: str, key: str, version: str | None) -> Mapping[str, str]:
        """The headers of one object, by lower-case name. Raises `RefusedError`."""

    def pages(self, bucket: str, prefix: str) -> Iterator[list[tuple[str, int, str]]]:
        """Key, size and ETag of all objects below a prefix, page by page. Raises `RefusedError`."""

    def request(
        self, bucket: str, key: str, pin: Mapping[str, str], *, renewed: bool
    ) -> tuple[Target, Mapping[str, str]]:
        """The address and headers of a GET. Raises `RefusedError`."""


class S3Backend:
    """
    Models in an S3 bucket: `s3://bucket/prefix` is a directory, `s3://bucket/key` of one object a single file.

    A prefix never brings its siblings: `s3://b/m/model` means `m/model/…`, not `m/model-v2/…`. Zero-byte objects are
    files; keys that end in `/` and hold nothing are markers of directories. `revision` is the VersionId of one object.

    Args:
        options: Arguments of `s3fs.S3FileSystem`. Without them, AWS's own environment and files count. One more of
            our own: `etag_is_md5=False`, for servers whose ETags of 32 digits are no MD5.
        environ: What stands for the environment of the process.
    """

    def __init__(self, options: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> None:
        if find_spec("s3fs") is None:
            raise ImportError("No module named 's3fs'", name="s3fs")
        self._options = {name: value for name, value in options.items() if name != "etag_is_md5"}
        self._etag_is_md5 = bool(options.get("etag_is_md5", True))
        self._environ = environ
        verify = self._options.get("client_kwargs", {}).get("verify")
        self._client = HTTPClient(environ=environ, ca_bundle=verify)
        self._plain = _plain_access(self._options, environ, self._client)
        self._sdk: Access | None = None

    def _access(self, bucket: str) -> Access:
        if self._plain is not None and _PLAIN_BUCKET.fullmatch(bucket):
            return self._plain
        if self._sdk is None:
            from kserve_pvc.backends._s3fs import S3fsAccess

            self._sdk = S3fsAccess(self._options)
        return self._sdk

    def resolve(self, ref: ModelRef) -> Resolved:
        return order_listing(ref, chain.from_iterable(self.pages(ref)))

    def pages(self, ref: ModelRef) -> Iterator[Sequence[RemoteFile]]:
        bucket, _, key = ref.location.partition("/")
        if not bucket:
            raise InvalidURIError(ref.uri, "it names no bucket; write `s3://bucket/path`")
        with _translated(ref.uri):
            access = self._access(bucket)
            if key and not key.endswith("/") and (single := self._single(access, ref, bucket, key)) is not None:
                yield [single]
                return
            if ref.revision is not None:
                raise SourceNotFoundError(
                    str(ref), "there is no such version; the revision of an S3 URI is the VersionId of one object"
                )
            yield from self._below(access, ref, bucket, key.rstrip("/") + "/" if key.strip("/") else "")

    def _single(self, access: Access, ref: ModelRef, bucket: str, key: str) -> RemoteFile | None:
        """The object itself, if the URI names one; it wins over a prefix of the same name."""
        try:
            head = access.head(bucket, key, ref.revision)
        except RefusedError as refusal:
            # Without the right to list, S3 answers 403 for what is not there: the listing then tells what it is.
            if refusal.code in _MISSING or (refusal.code in DENIED and ref.revision is None):
                return None
            raise
        size, etag = head.get("content-length", ""), head.get("etag")
        if not is_size(size) or etag is None:
            raise RefusedError("its answer has no length or no ETag, so it does not speak S3")
        version = ref.revision or head.get("x-amz-version-id", "null")
        return self._file(bucket, key, key.rpartition("/")[2], int(size), etag, None if version == "null" else version)

    def _below(self, access: Access, ref: ModelRef, bucket: str, prefix: str) -> Iterator[Sequence[RemoteFile]]:
        for page in access.pages(bucket, prefix):
            files = []
            for key, size, etag in page:
                if not key.startswith(prefix):
                    raise SourceUnavailableError(ref.uri, f"it was asked for `{prefix}` and listed `{key}`")
                if size or not key.endswith("/"):
                    files.append(self._file(bucket, key, key[len(prefix) :], size, etag, None))
            yield files

    def _file(self, bucket: str, key: str, name: str, size: int, etag: str, version: str | None) -> RemoteFile:
        # A VersionId names bytes for ever; an ETag at least makes the read of other bytes fail.
        pin = {"VersionId": version} if version else {"If-Match": etag}
        digest = _MD5.fullmatch(etag) if self._etag_is_md5 and size <= _MAX_MD5_BYTES else None
        entry = FileEntry(path=name, size_bytes=size, token=version or etag.strip('"'))
        return RemoteFile(
            entry=entry, address=f"{bucket}/{key}", pin=pin, digest=f"md5:{digest[1]}" if digest else None
        )

    def open_range(self, file: RemoteFile, start: int, stop: int) -> Reader:
        return Reader(self._client, self, file, f"s3://{file.address}", start, stop)

    def request(self, file: RemoteFile, *, renewed: bool) -> tuple[Target, Mapping[str, str]]:
        bucket, _, key = file.address.partition("/")
        with _translated(f"s3://{file.address}"):
            return self._access(bucket).request(bucket, key, file.pin, renewed=renewed)

    def refusal(self, file: RemoteFile, status: int, headers: Mapping[str, str], body: bytes) -> StoreError | None:
        refusal = _refusal(status, headers, body)
        if refusal.code in _CHANGED | _MISSING:
            # What was listed a moment ago has since gone or become another.
            return SourceChangedError(f"s3://{file.address}", str(file.entry.path))
        return _meaning(refusal, f"s3://{file.address}") if refusal.code in DENIED or refusal.busy is not None else None

    def tune(self, *, stall_seconds: float, retry_seconds: float) -> None:
        """
        How long a listing may stay silent, and how long it is tried.
        """
        self._client.answer_seconds = stall_seconds
        if self._plain is not None:
            self._plain.retry_seconds = retry_seconds

    def close(self) -> None:
        """
        Let go of idle connections. Whoever goes on gets new ones.
        """
        self._client.close()

    checksum = staticmethod(make_checksum)

    def evidence(self, file: RemoteFile) -> str | None:
        """
        Ask for a checksum of a whole object that the service vouches for, as `name:hex`.

        That is its SHA-256, CRC32 or CRC32C if it was uploaded with one, else its ETag where that is an MD5: not after
        a multipart upload, and not where S3 encrypts with keys of its own service or of the customer.
        """
        bucket, _, key = file.address.partition("/")
        gone = SourceChangedError(f"s3://{file.address}", str(file.entry.path))
        with _translated(f"s3://{file.address}"):
            try:
                head = self._access(bucket).head(bucket, key, file.pin.get("VersionId"))
            except RefusedError as refusal:
                raise gone if refusal.code in _MISSING else refusal from None
        if "If-Match" in file.pin and head.get("etag", "").strip('"') != file.pin["If-Match"].strip('"'):
            raise gone
        if head.get("x-amz-checksum-type", "FULL_OBJECT") == "FULL_OBJECT":
            for name in ("sha256", "crc32", "crc32c") if make_checksum("crc32c") else ("sha256", "crc32"):
                if (digest := from_base64(head.get(f"x-amz-checksum-{name}", ""))) is not None:
                    return f"{name}:{digest}"
        is_plain = head.get("x-amz-server-side-encryption", "AES256") == "AES256" and not any(
            "customer" in name for name in head
        )
        return file.digest if is_plain else None


@contextmanager
def _translated(uri: str) -> Iterator[None]:
    try:
        yield
    except RefusedError as refusal:
        raise _meaning(refusal, uri) from refusal.__cause__
    except HTTPError as error:
        raise SourceUnavailableError(uri, str(error), is_final=error.is_final) from error


@attrs.define(eq=False)
class _PlainAccess:
    """
    Requests that are signed here, or not at all.
    """

    client: HTTPClient
    endpoint: Target | None
    region: str
    credentials: Credentials | None
    is_virtual: bool
    retry_seconds: float = 300.0
    _regions: dict[str, str] = attrs.field(factory=dict, init=False)

    def head(self, bucket: str, key: str, version: str | None) -> Mapping[str, str]:
        query = {} if version is None else {"versionId": version}
        return self._ask("HEAD", bucket, key, query, {"x-amz-checksum-mode": "ENABLED"})[0]

    def pages(self, bucket: str, prefix: str) -> Iterator[list[tuple[str, int, str]]]:
        query = {"list-type": "2", "prefix": prefix, "encoding-type": "url"}
        tokens: set[str] = set()
        while True:
            page, token = parse_listing(self._ask("GET", bucket, "", query, {})[1])
            yield page
            if token is None:
                return
            if token in tokens:
                raise RefusedError("its listing does not end: it names a page a second time")
            tokens.add(token)
            query = {**query, "continuation-token": token}

    def request(
        self, bucket: str, key: str, pin: Mapping[str, str], *, renewed: bool
    ) -> tuple[Target, Mapping[str, str]]:
        del renewed  # These credentials are all there are.
        query = {"versionId": pin["VersionId"]} if "VersionId" in pin else {}
        return self._signed("GET", bucket, key, query, {} if query else {"if-match": pin["If-Match"]})

    def _signed(
        self, method: str, bucket: str, key: str, query: Mapping[str, str], headers: Mapping[str, str]
    ) -> tuple[Target, Mapping[str, str]]:
        region = self._regions.get(bucket, self.region)
        path = f"/{quote(key, safe='/~')}"
        scheme, host, port, base = self.endpoint or Target("https", f"s3.{region}.amazonaws.com", 443, "")
        if (
            self.is_virtual
            and _HOST_BUCKET.fullmatch(bucket)
            and ("." not in bucket or scheme == "http")
            and not _ADDRESS.fullmatch(host)
        ):
            host = f"{bucket}.{host}"
        else:
            path = f"/{bucket}{path if key else ''}"
        path = base.rstrip("/") + path
        target = Target(scheme, host, port, f"{path}?{encode_query(query)}" if query else path)
        if self.credentials is None:
            return target, headers
        return target, sign(method, target.authority, path, query, headers, self.credentials, region, time.time())

    def _ask(
        self, method: str, bucket: str, key: str, query: Mapping[str, str], headers: Mapping[str, str]
    ) -> tuple[Mapping[str, str], bytes]:
        """A small request, asked again while the service is busy or the network fails. Raises `RefusedError`."""
        return ask_patiently(lambda: self._ask_once(method, bucket, key, query, headers), self.retry_seconds)

    def _ask_once(
        self, method: str, bucket: str, key: str, query: Mapping[str, str], headers: Mapping[str, str]
    ) -> tuple[Mapping[str, str], bytes]:
        target, signed = self._signed(method, bucket, key, query, headers)
        with self.client.open(method, target, signed) as answer:
            if answer.status == 200:
                return answer.headers, answer.read(_MAX_PAGE_BYTES, time.monotonic() + 2 * self.client.answer_seconds)
            refusal = _refusal(answer.status, answer.headers, read_refusal(answer))
        region = answer.header("x-amz-bucket-region")
        if (
            region
            and bucket not in self._regions
            and region != self.region
            and re.fullmatch(r"[a-z0-9-]{1,40}", region)
        ):
            self._regions[bucket] = region  # Said by S3 itself, at whatever status; asked there once.
            return self._ask_once(method, bucket, key, query, headers)
        raise refusal


def _plain_access(options: Mapping[str, Any], environ: Mapping[str, str], client: HTTPClient) -> _PlainAccess | None:
    """Decide whether what is configured is simple enough to be asked without an SDK."""
    arguments, config = options.get("client_kwargs", {}), options.get("config_kwargs", {})
    addressing = config.get("s3", {}).get("addressing_style", "auto")
    known = (
        (options, _PLAIN_OPTIONS),
        (arguments, _PLAIN_CLIENT),
        (config, {"s3"}),
        (config.get("s3", {}), {"addressing_style"}),
    )
    if any(set(given) - plain for given, plain in known):
        return None
    if (
        any(environ.get(name) for name in _SDK_VARIABLES)
        or any(name.startswith("FSSPEC_") for name in environ)
        or _has_files(environ)
    ):
        return None
    names = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
    key, secret, token = (
        options.get(short) or arguments.get(name) for short, name in zip(("key", "secret", "token"), names, strict=True)
    )
    if not key and not secret:
        key, secret, token = (environ.get(name.upper()) for name in names)
    if not options.get("anon") and not (key and secret):
        return None
    url = options.get("endpoint_url") or arguments.get("endpoint_url")
    if not url and environ.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() != "true":
        url = environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL")
    region = (
        arguments.get("region_name") or environ.get("AWS_DEFAULT_REGION") or environ.get("AWS_REGION") or "us-east-1"
    )
    if not url and region.startswith(_OTHER_PARTITIONS):
        return None
    try:
        endpoint = target_of(url) if url else None
    except HTTPError as error:
        raise SettingsError("endpoint_url", redact(str(url)), "write `https://host:port`") from error
    # As botocore does: the bucket goes into the name of the host, but not at an endpoint that was named.
    is_virtual = addressing == "virtual" or (addressing == "auto" and endpoint is None)
    credentials = None if options.get("anon") else Credentials(str(key), str(secret), token)
    return _PlainAccess(client, endpoint, region, credentials, is_virtual)


def _has_files(environ: Mapping[str, str]) -> bool:
    """Whether AWS's files are there, which may say anything about endpoints, regions and proxies."""
    places = (
        environ.get("AWS_CONFIG_FILE") or "~/.aws/config",
        environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials",
    )
    # Not `Path.expanduser`, which fails for a home that nobody has.
    return any(Path(os.path.expanduser(place)).exists() for place in places)  # noqa: PTH111


def parse_listing(body: bytes) -> tuple[list[tuple[str, int, str]], str | None]:
    """
    Read one answer of ListObjectsV2: key, size and ETag of each object, and where the next page begins.

    Raises:
        RefusedError: It is no such answer.
    """
    root = parse_xml(body)
    if root is None or root.tag.rpartition("}")[2] != "ListBucketResult":
        raise RefusedError("its listing is no ListBucketResult, so it does not speak S3")
    space = root.tag[: -len("ListBucketResult")]
    # Blanks come as `+`, and `+` as `%2B`.
    decode = unquote_plus if root.findtext(f"{space}EncodingType") == "url" else str
    page = []
    names = (f"{space}Key", f"{space}Size", f"{space}ETag")
    for item in root.iter(f"{space}Contents"):
        key, size, etag = map(item.findtext, names)
        if key is None or etag is None or size is None or not is_size(size):
            raise RefusedError("its listing names an object without key, size or ETag, so it does not speak S3")
        page.append((decode(key), int(size), etag))
    if root.findtext(f"{space}IsTruncated") != "true":
        return page, None
    token = root.findtext(f"{space}NextContinuationToken")
    if not token:
        raise RefusedError("its listing goes on and does not say where, so it does not speak S3")
    return page, token


def _refusal(status: int, headers: Mapping[str, str], body: bytes) -> RefusedError:
    root = parse_xml(body) if body else None
    code = message = None
    if root is not None and root.tag.rpartition("}")[2] == "Error":
        words = {child.tag.rpartition("}")[2]: child.text for child in root}
        code, message = words.get("Code"), words.get("Message")
    if 300 <= status < 400:
        return RefusedError(unavailable("", status, headers).reason, status=status, code=str(status))
    code = code or str(status)
    says_when = status >= 500 and "retry-after" in headers
    busy = retry_after(headers) if status in (429, 503) or code in _BUSY or says_when else None
    return RefusedError(f"{code}: {message}" if message else f"it answered {code}", status=status, code=code, busy=busy)


def _meaning(refusal: RefusedError, uri: str) -> StoreError:
    code, reason = refusal.code, redact(refusal.reason).rstrip(". ")
    if code == "NoCredentials":
        return SourceDeniedError(uri, f"{reason}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or anon")
    if code in DENIED:
        return SourceDeniedError(uri, reason)
    if code in _MISSING:
        return SourceNotFoundError(uri, reason)
    return SourceUnavailableError(uri, reason, retry_after=refusal.busy)
