"""
`s3://`: Amazon S3 and what speaks its protocol, through s3fs.

s3fs is the control plane: credentials, endpoints, retries of single requests and error texts. Bytes are read here,
each range pinned with If-Match or VersionId, because `S3FileSystem.get` pre-sizes the final path, pins nothing and
holds hundreds of megabytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import attrs
from aiobotocore.response import AioReadTimeoutError
from aiohttp import ClientError as HTTPClientError
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError
from fsspec.asyn import sync
from s3fs import S3FileSystem

from kserve_pvc._names import check_name
from kserve_pvc._record import FileEntry
from kserve_pvc._ref import ModelRef, redact
from kserve_pvc._source import RemoteFile, Resolved, resolved
from kserve_pvc.errors import (
    InvalidURIError,
    SourceChangedError,
    SourceDeniedError,
    SourceNotFoundError,
    SourceUnavailableError,
    StoreError,
)

_PATIENCE = {"connect_timeout": 5, "read_timeout": 30, "retries": {"mode": "standard", "total_max_attempts": 3}}
# A caller who is told to stop looks up after each buffer, and a slow source may take minutes to fill one.
_MOMENT = 0.25
_DENIED = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "401", "403", "AccountProblem"}
_MISSING = {"NoSuchBucket", "NoSuchKey", "NoSuchVersion", "404"}
_FOREIGN = (OSError, KeyError, BotoCoreError, HTTPClientError, AioReadTimeoutError, asyncio.TimeoutError)


class S3Backend:
    """
    Models in an S3 bucket: `s3://bucket/prefix` is a directory, `s3://bucket/key` of one object a single file.

    A prefix never brings its siblings: `s3://b/m/model` means `m/model/…`, not `m/model-v2/…`. Zero-byte objects are
    files; keys that end in `/` and hold nothing are markers of directories. `revision` is the VersionId of one object.

    Args:
        options: Arguments of `s3fs.S3FileSystem`. Without them, AWS's own environment and files count.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        config = {**_PATIENCE, **options.get("config_kwargs", {})}
        self._fs = S3FileSystem(**{"use_listings_cache": False, **options, "config_kwargs": config, "skip_instance_cache": True})
        # botocore's three tries are enough: who takes no connection is given up after 15 s, who says nothing after 90 s.
        self._fs.retries = 1

    def resolve(self, ref: ModelRef) -> Resolved:
        bucket, _, key = ref.location.partition("/")
        if not bucket:
            raise InvalidURIError(ref.uri, "it names no bucket; write `s3://bucket/path`")
        with _translated(ref.uri):
            if key and not key.endswith("/") and (single := self._single(ref, bucket, key)) is not None:
                return resolved(ref, [single])
            if ref.revision is not None:
                raise SourceNotFoundError(str(ref), "there is no such version; the revision of an S3 URI is the VersionId of one object")
            return resolved(ref, self._below(ref, bucket, key.rstrip("/") + "/" if key.strip("/") else ""))

    def _single(self, ref: ModelRef, bucket: str, key: str) -> RemoteFile | None:
        """The object itself, if the URI names one; it wins over a prefix of the same name."""
        version = {} if ref.revision is None else {"VersionId": ref.revision}
        try:
            head = self._fs.call_s3("head_object", Bucket=bucket, Key=key, **version)
        except OSError as error:
            # Without the right to list, S3 answers 403 for what is not there: the listing then tells what it is.
            if _code(error) in _MISSING or (_code(error) in _DENIED and ref.revision is None):
                return None
            raise
        name = check_name(key.rpartition("/")[2])
        version_id = head.get("VersionId") if head.get("VersionId") != "null" else None
        return _file(bucket, key, str(name), head["ContentLength"], head["ETag"], ref.revision or version_id)

    def _below(self, ref: ModelRef, bucket: str, prefix: str) -> Iterator[RemoteFile]:
        page: dict[str, Any] = {}
        while not page or page.get("IsTruncated"):
            more = {"ContinuationToken": page["NextContinuationToken"]} if page else {}
            page = self._fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **more)
            for item in page.get("Contents", ()):
                if item["Key"].endswith("/") and item["Size"] == 0:
                    continue
                if not item["Key"].startswith(prefix):
                    raise SourceUnavailableError(ref.uri, f"it was asked for `{prefix}` and listed `{item['Key']}`")
                name = check_name(item["Key"].removeprefix(prefix))
                yield _file(bucket, item["Key"], str(name), item["Size"], item["ETag"], None)

    @contextmanager
    def open_range(self, file: RemoteFile, start: int, stop: int) -> Iterator[_S3Reader]:
        bucket, _, key = file.address.partition("/")
        wanted = f"bytes={start}-{stop - 1}"
        with _translated(f"s3://{file.address}", changed=str(file.entry.path)):
            answer = self._fs.call_s3("get_object", Bucket=bucket, Key=key, Range=wanted, **file.pin)
            try:
                _check_range(file, answer, start, stop)
                yield _S3Reader(self._fs.loop, answer["Body"])
            finally:
                with suppress(Exception):
                    sync(self._fs.loop, _close, answer["Body"])


@attrs.define
class _S3Reader:
    loop: asyncio.AbstractEventLoop
    body: Any

    def readinto(self, buffer: memoryview) -> int:
        return int(sync(self.loop, _fill, self.body, buffer))


async def _fill(body: Any, buffer: memoryview) -> int:
    """Fill a buffer as far as the answer goes in a moment: one hop to the event loop for each buffer, not for each packet."""
    filled, clock = 0, asyncio.get_running_loop().time
    enough = clock() + _MOMENT
    while filled < len(buffer) and (not filled or clock() < enough):
        try:
            chunk = await body.read(len(buffer) - filled)
        except _FOREIGN:
            if not filled:
                raise
            break  # What arrived before counts; the next call meets the same error with nothing in hand.
        if not chunk:
            break
        buffer[filled : filled + len(chunk)] = chunk
        filled += len(chunk)
    return filled


async def _close(body: Any) -> None:
    body.close()


def _file(bucket: str, key: str, name: str, size: int, etag: str, version: str | None) -> RemoteFile:
    # A VersionId names bytes for ever; an ETag at least makes the read of other bytes fail.
    pin = {"VersionId": version} if version else {"IfMatch": etag}
    token = version or etag.strip('"')
    return RemoteFile(entry=FileEntry(path=name, size_bytes=size, token=token), address=f"{bucket}/{key}", pin=pin)


def _check_range(file: RemoteFile, answer: Mapping[str, Any], start: int, stop: int) -> None:
    expected = f"bytes {start}-{stop - 1}/{file.entry.size_bytes}"
    if answer.get("ContentRange") != expected:
        raise SourceUnavailableError(f"s3://{file.address}", f"it was asked for `{expected}` and answered `{answer.get('ContentRange')}`")


@contextmanager
def _translated(uri: str, changed: str | None = None) -> Iterator[None]:
    """Say what a foreign error means. With `changed`, what was listed a moment ago has since gone or become another."""
    try:
        yield
    except StoreError:
        raise
    except _FOREIGN as error:
        text = str(error)
        # A traceback prints the cause: where that names a URL with secrets in it, it is left out.
        raise _meaning(error, uri, changed) from (error if redact(text) == text else None)


def _meaning(error: Exception, uri: str, changed: str | None) -> StoreError:
    code, reason = _code(error), redact(str(error)).rstrip(". ") or type(error).__name__
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return SourceDeniedError(uri, f"{reason}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or anon")
    if isinstance(error, KeyError):
        return SourceUnavailableError(uri, f"its answer has no {reason}, so it does not speak S3")
    if changed is not None and (code in _MISSING or code in ("PreconditionFailed", "412")):
        return SourceChangedError(uri, changed)
    if code in _DENIED or isinstance(error, PermissionError):
        return SourceDeniedError(uri, reason)
    if code in _MISSING or isinstance(error, FileNotFoundError):
        return SourceNotFoundError(uri, reason)
    return SourceUnavailableError(uri, reason)


def _code(error: BaseException) -> str:
    """The service's own word for an error, which s3fs keeps as the cause of the one it raises."""
    source = error if isinstance(error, ClientError) else error.__cause__
    return str(source.response.get("Error", {}).get("Code", "")) if isinstance(source, ClientError) else ""
