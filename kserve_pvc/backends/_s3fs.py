"""
S3 through s3fs, for what only it and botocore know: access points, directory buckets, other signatures, extra
arguments.

It lists, and signs a URL for each object; the bytes come by plain requests to that URL. Where a URL cannot carry what
is set, the bytes come by calls of s3fs too, in bounded ranges.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from urllib.parse import parse_qsl

from aiohttp import ClientError as HTTPClientError
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError
from fsspec.asyn import sync
from s3fs import S3FileSystem

from kserve_pvc._source.contract import RangeReader
from kserve_pvc.backends._bounded_session import bounded
from kserve_pvc.backends._http.target import Target, target_of
from kserve_pvc.backends._login.aws import NO_CREDENTIALS_HINT
from kserve_pvc.backends._object_store import Request
from kserve_pvc.backends._ranges import NO_CREDENTIALS, RefusedError
from kserve_pvc.backends._refusals import head_of_range, hides_reason
from kserve_pvc.backends._s3_requests import HINTS, Listed, is_cold
from kserve_pvc.backends._validators import http_date

_PATIENCE = {"connect_timeout": 5, "read_timeout": 30, "retries": {"mode": "standard", "total_max_attempts": 3}}
_SIGNED_SECONDS = 3600
# Signed anew early enough that a request begun with a URL outlives neither it nor most temporary credentials.
_RENEW_SECONDS = 600.0
_MAX_SIGNED = 1000
_FOREIGN = (OSError, KeyError, BotoCoreError, HTTPClientError, asyncio.TimeoutError)


class S3fsAccess:
    """
    Requests through `s3fs.S3FileSystem`.

    Args:
        options: Arguments of the class.
        reads: Whether the class reads the bytes too.
    """

    def __init__(self, options: Mapping[str, Any], *, reads: bool) -> None:
        self.way = "fsspec:s3fs" if reads else "direct:s3fs"
        self._reads = reads
        self._options = options
        # botocore would sign URLs by the older rules, which newer regions and encrypted objects refuse.
        config = {**_PATIENCE, "signature_version": "s3v4", **bounded(), **(options.get("config_kwargs") or {})}
        self._fs = S3FileSystem(
            **{"use_listings_cache": False, **options, "config_kwargs": config, "skip_instance_cache": True}
        )
        # botocore's three tries are enough.
        self._fs.retries = 1
        self._signed: dict[tuple[str, str, str], tuple[float, Target]] = {}

    def head(self, bucket: str, key: str, version: str | None) -> Mapping[str, str]:
        wanted = {} if version is None else {"VersionId": version}
        try:
            return self._headers("head_object", Bucket=bucket, Key=key, ChecksumMode="ENABLED", **wanted)
        except RefusedError as refusal:
            if not hides_reason(refusal.status, refusal.code):
                raise
        found = self._headers("get_object", Bucket=bucket, Key=key, Range="bytes=0-0", **wanted)
        return head_of_range(found)

    def _headers(self, call: str, **arguments: str) -> Mapping[str, str]:
        with _translated():
            found = self._fs.call_s3(call, **arguments)
            return {name.lower(): str(value) for name, value in found["ResponseMetadata"]["HTTPHeaders"].items()}

    def page(self, bucket: str, prefix: str, token: str | None) -> tuple[list[Listed], str | None]:
        more = {"ContinuationToken": token} if token else {}
        with _translated():
            page = self._fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **more)
            items: list[Listed] = [
                Listed(
                    item["Key"],
                    item["Size"],
                    item.get("ETag"),
                    http_date(item.get("LastModified")),
                    is_cold(item.get("StorageClass")),
                )
                for item in page.get("Contents", ())
            ]
            return items, page["NextContinuationToken"] if page.get("IsTruncated") else None

    def read(self, bucket: str, key: str, pin: Mapping[str, str], *, renewed: bool) -> Request:
        pinned = _pinned(pin)
        name = (bucket, key, next(iter(pinned.values()), ""))
        signed_at, target = self._signed.get(name, (0.0, None))
        if target is None or renewed or time.monotonic() - signed_at > _RENEW_SECONDS:
            target = self._sign({"Bucket": bucket, "Key": key, **pinned})
            if len(self._signed) >= _MAX_SIGNED:
                self._signed.clear()
            self._signed[name] = (time.monotonic(), target)
        return target, self._signed_headers(target, pinned)

    def _signed_headers(self, target: Target, pinned: Mapping[str, str]) -> Mapping[str, str]:
        """Return the headers that a signed URL names: without them its signature is not valid."""
        query = dict(parse_qsl(target.path.partition("?")[2]))
        signed = query.get("X-Amz-SignedHeaders", "").split(";")
        headers = {"If-Match": pinned["IfMatch"]} if "IfMatch" in pinned else {}
        if "x-amz-request-payer" in signed:
            headers["x-amz-request-payer"] = "requester"
        return headers

    def reader(
        self, bucket: str, key: str, pin: Mapping[str, str], start: int, stop: int
    ) -> AbstractContextManager[RangeReader] | None:
        if not self._reads:
            return None
        from kserve_pvc.backends._fsspec.reading import Reader

        def piece(first: int, last: int, is_last: bool) -> bytes:
            with _translated():
                return self._get(bucket, key, first, last, pin)

        return Reader(piece, start, stop)

    def secrets(self) -> Iterable[str]:
        """
        Return what s3fs signs with now, and the options that hold secrets: services repeat headers in their errors.
        """
        signer = getattr(getattr(self._fs, "_s3", None), "_request_signer", None)
        found = getattr(signer, "_credentials", None)
        # Not the properties, which may renew what has expired.
        current = (getattr(found, name, None) for name in ("_secret_key", "_token", "secret_key", "token"))
        given = self._options.get("s3_additional_kwargs") or {}
        return [value for value in (*current, *given.values()) if isinstance(value, str)]

    def _get(self, bucket: str, key: str, start: int, stop: int, pin: Mapping[str, str]) -> bytes:
        async def get() -> bytes:
            found = await self._fs._call_s3(
                "get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}", **_pinned(pin)
            )
            if pin.get("If-Unmodified-Since") not in (None, http_date(found.get("LastModified"))):
                raise RefusedError("it has another date now", code="PreconditionFailed")
            async with found["Body"] as body:
                data: bytes = await body.read()
                return data

        data: bytes = sync(self._fs.loop, get)
        if len(data) != stop - start:
            raise RefusedError(f"{stop - start} bytes were requested and {len(data)} received", status=502)
        return data

    def _sign(self, wanted: Mapping[str, str]) -> Target:
        with _translated():
            payer = {"RequestPayer": "requester"} if self._fs.requester_pays else {}
            signing = self._fs.s3.generate_presigned_url
            arguments = {**payer, **wanted}
            return target_of(sync(self._fs.loop, signing, "get_object", Params=arguments, ExpiresIn=_SIGNED_SECONDS))


def _pinned(pin: Mapping[str, str]) -> dict[str, str]:
    if "VersionId" in pin:
        return {"VersionId": pin["VersionId"]}
    return {"IfMatch": pin["If-Match"]} if "If-Match" in pin else {}


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except _FOREIGN as error:
        raise _refusal(error) from None


def _refusal(error: Exception) -> RefusedError:
    source = error if isinstance(error, ClientError) else error.__cause__
    reason = str(error) or type(error).__name__
    if isinstance(source, ClientError):
        said = source.response.get("ResponseMetadata", {})
        headers = {name.lower(): str(value) for name, value in said.get("HTTPHeaders", {}).items()}
        code = str(source.response.get("Error", {}).get("Code", ""))
        return RefusedError(
            reason, status=said.get("HTTPStatusCode", 0), code=code, headers=headers, hint=HINTS.get(code, "")
        )
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return RefusedError(reason, code=NO_CREDENTIALS, hint=NO_CREDENTIALS_HINT)
    if isinstance(error, KeyError):
        return RefusedError(f"response lacks {reason}; is this an S3 endpoint?")
    if isinstance(error, PermissionError):
        return RefusedError(reason, code="403")
    return RefusedError(reason, code="404" if isinstance(error, FileNotFoundError) else "")
