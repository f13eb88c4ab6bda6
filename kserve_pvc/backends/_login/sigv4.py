"""
AWS Signature Version 4 for requests without a body.

The rules are those of "Create a signed AWS API request" in the AWS IAM user guide, with the differences that S3 has:
the path is quoted once and not normalised. Deriving a key takes four of the seven HMACs and holds for a day, so it is
kept. Tests compare every signature with botocore's.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Mapping
from functools import lru_cache
from urllib.parse import quote

import attrs

_EMPTY_BODY = hashlib.sha256(b"").hexdigest()


def _strip(text: str) -> str:
    return text.strip()


def _strip_optional(text: str | None) -> str | None:
    return None if text is None else text.strip()


@attrs.frozen
class Credentials:
    """
    Credentials that sign a request. `session_token` belongs to credentials that expire.
    """

    # As secrets that were made with `echo` end in a line break.
    key: str = attrs.field(converter=_strip)
    secret: str = attrs.field(repr=False, converter=_strip)
    session_token: str | None = attrs.field(default=None, repr=False, converter=_strip_optional)


def sign(
    method: str,
    host: str,
    path: str,
    query: Mapping[str, str],
    headers: Mapping[str, str],
    credentials: Credentials,
    region: str,
    timestamp: float,
) -> dict[str, str]:
    """
    Sign a request to S3, and return the given headers and those that sign it.

    Args:
        host: As the `Host` header has it.
        path: As the request line has it, quoted.
        query: Not quoted.
        headers: In lower case. Those that begin with `x-amz-` have to be signed; others are, too.
        timestamp: Seconds since 1970; servers refuse one that is more than a quarter of an hour off.
    """
    stamp = _stamp(int(timestamp))
    signed = {**headers, "host": host, "x-amz-content-sha256": _EMPTY_BODY, "x-amz-date": stamp}
    if credentials.session_token:
        signed["x-amz-security-token"] = credentials.session_token
    names = sorted(signed)
    lines = "\n".join([f"{name}:{signed[name]}" for name in names])
    words = ";".join(names)
    request = f"{method}\n{path}\n{encode_query(query)}\n{lines}\n\n{words}\n{_EMPTY_BODY}"
    scope = f"{stamp[:8]}/{region}/s3/aws4_request"
    text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
    signature = hmac.digest(_signing_key(credentials.secret, stamp[:8], region), text.encode(), "sha256").hex()
    del signed["host"]
    credential = f"Credential={credentials.key}/{scope}"
    signed["Authorization"] = f"AWS4-HMAC-SHA256 {credential}, SignedHeaders={words}, Signature={signature}"
    return signed


@lru_cache(maxsize=2)
def _stamp(second: int) -> str:
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(second))


def encode_query(query: Mapping[str, str]) -> str:
    """
    Write a query as signatures need it: sorted, everything but unreserved characters quoted.
    """
    pairs = sorted((quote(name, safe=""), quote(value, safe="")) for name, value in query.items())
    return "&".join(f"{name}={value}" for name, value in pairs)


@lru_cache(maxsize=4)
def _signing_key(secret: str, day: str, region: str) -> bytes:
    key = ("AWS4" + secret).encode()
    for part in (day, region, "s3", "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    return key
