"""
S3 through s3fs, for everything that only botocore knows: profiles, roles, SSO, access points, other signatures.

It lists, and signs a URL for each file; the bytes come by plain requests to that URL.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from aiohttp import ClientError as HTTPClientError
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError
from fsspec.asyn import sync
from s3fs import S3FileSystem

from kserve_pvc.backends._http.target import Target, target_of
from kserve_pvc.backends._ranges import RefusedError

_PATIENCE = {"connect_timeout": 5, "read_timeout": 30, "retries": {"mode": "standard", "total_max_attempts": 3}}
_SIGNED_SECONDS = 3600
# Signed anew early enough that a request begun with a URL outlives neither it nor most temporary credentials.
_RENEW_SECONDS = 600.0
_MAX_SIGNED = 1000
_FOREIGN = (OSError, KeyError, BotoCoreError, HTTPClientError, asyncio.TimeoutError)


class S3fsAccess:
    """
    Asks the service through `s3fs.S3FileSystem`.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        # botocore would sign URLs by the older rules, which newer regions and encrypted objects refuse.
        config = {**_PATIENCE, "signature_version": "s3v4", **options.get("config_kwargs", {})}
        self._fs = S3FileSystem(
            **{"use_listings_cache": False, **options, "config_kwargs": config, "skip_instance_cache": True}
        )
        # botocore's three tries are enough.
        self._fs.retries = 1
        self._signed: dict[tuple[str, str, str], tuple[float, Target]] = {}

    def head(self, bucket: str, key: str, version: str | None) -> Mapping[str, str]:
        wanted = {} if version is None else {"VersionId": version}
        with _translated():
            answer = self._fs.call_s3("head_object", Bucket=bucket, Key=key, ChecksumMode="ENABLED", **wanted)
            return {name.lower(): str(value) for name, value in answer["ResponseMetadata"]["HTTPHeaders"].items()}

    def pages(self, bucket: str, prefix: str) -> Iterator[list[tuple[str, int, str]]]:
        page: dict[str, Any] = {}
        while not page or page.get("IsTruncated"):
            more = {"ContinuationToken": page["NextContinuationToken"]} if page else {}
            with _translated():
                newer = self._fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **more)
                items = [(item["Key"], item["Size"], item["ETag"]) for item in newer.get("Contents", ())]
                if newer.get("IsTruncated") and newer["NextContinuationToken"] == page.get("NextContinuationToken"):
                    raise RefusedError("its listing does not end: it names a page a second time")
            page = newer
            yield items

    def request(
        self, bucket: str, key: str, pin: Mapping[str, str], *, renewed: bool
    ) -> tuple[Target, Mapping[str, str]]:
        is_version = "VersionId" in pin
        pinned = {"VersionId": pin["VersionId"]} if is_version else {"IfMatch": pin["If-Match"]}
        name = (bucket, key, next(iter(pinned.values())))
        signed_at, target = self._signed.get(name, (0.0, None))
        if target is None or renewed or time.monotonic() - signed_at > _RENEW_SECONDS:
            target = self._sign({"Bucket": bucket, "Key": key, **pinned})
            if len(self._signed) >= _MAX_SIGNED:
                self._signed.clear()
            self._signed[name] = (time.monotonic(), target)
        return target, {} if is_version else {"If-Match": pin["If-Match"]}

    def _sign(self, wanted: Mapping[str, str]) -> Target:
        with _translated():
            payer = {"RequestPayer": "requester"} if self._fs.requester_pays else {}
            arguments = {**self._fs.s3_additional_kwargs, **payer, **wanted}
            signing = self._fs.s3.generate_presigned_url
            return target_of(sync(self._fs.loop, signing, "get_object", Params=arguments, ExpiresIn=_SIGNED_SECONDS))


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
        return RefusedError(reason, code=str(source.response.get("Error", {}).get("Code", "")))
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return RefusedError(reason, code="NoCredentials")
    if isinstance(error, KeyError):
        return RefusedError(f"its answer has no {reason}, so it does not speak S3")
    if isinstance(error, PermissionError):
        return RefusedError(reason, code="403")
    return RefusedError(reason, code="404" if isinstance(error, FileNotFoundError) else "")
