"""
The JSON API of Google Cloud Storage: descriptions of objects, pages of a listing, and errors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from kserve_pvc._format.json_size import check_size
from kserve_pvc.backends._crc32c import make_checksum
from kserve_pvc.backends._object_store import Object, md5_digest
from kserve_pvc.backends._ranges import RefusedError, from_base64, retry_after, unavailable
from kserve_pvc.backends._refusals import words_of

# What is requested of each object.
FIELDS = "name,size,generation,crc32c,md5Hash,contentEncoding"
_BUSY = {"rateLimitExceeded", "userRateLimitExceeded"}
_MAX_MESSAGE = 500
_COMPRESSED = (
    "it is a tar stored with `Content-Encoding: gzip`; upload it without the encoding or with a name in `.tar.gz`, or "
    "exclude it with `ignore_patterns`"
)
_SUMS = ("crc32c", "md5Hash")
# Pinned as well: what such an object is asked for in.
ENCODING = "encoding"
_GENERATION = re.compile(r"[0-9]{1,19}", re.ASCII)
_SIZE = re.compile(r"[0-9]{1,18}", re.ASCII)


def is_generation(text: object) -> bool:
    """
    Whether it is the number of a generation.
    """
    return isinstance(text, str) and _GENERATION.fullmatch(text) is not None


def parse_listing(body: bytes) -> tuple[list[Object], str | None]:
    """
    Read one response of `objects.list`: the objects, and the token of the next page.

    Raises:
        RefusedError: It is not such a response.
    """
    content = parse_json(body)
    items, token = content.get("items", []), content.get("nextPageToken") or None
    if not isinstance(items, list) or not (token is None or _is_string(token)):
        raise RefusedError("response is not a list of objects; is this a Google Cloud Storage endpoint?")
    return [parse_object(item) for item in items], token


def parse_object(item: Any) -> Object:
    """
    Read the description of one object.

    Raises:
        RefusedError: It is not a description of an object.
    """
    if not isinstance(item, dict):
        item = {}
    name, size, generation = (item.get(field) for field in ("name", "size", "generation"))
    is_size = isinstance(size, str) and _SIZE.fullmatch(size) is not None
    if not _is_string(name) or not is_size or not is_generation(generation):
        raise RefusedError(
            "response has an object without name, size or generation; is this a Google Cloud Storage endpoint?"
        )
    is_compressed = "gzip" in str(item.get("contentEncoding", "")).lower()
    ending = name.lower()
    return Object(
        name=name,
        size_bytes=int(size),
        # Zero is what stands for no generation.
        token=generation if int(generation) else " ".join((generation, *(str(item[f]) for f in _SUMS if f in item))),
        pin={"generation": generation} | ({ENCODING: "gzip"} if is_compressed else {}),
        digest=_digest(item, int(size)),
        is_directory=size == "0" and name.endswith("/"),
        flaw=_COMPRESSED if is_compressed and ending.endswith(".tar") else "",
        # An encoding that only repeats what the name says is none: the file is kept as it is stored.
        is_compressed=is_compressed and not ending.endswith((".gz", ".tgz")),
    )


def _digest(item: Mapping[str, Any], size_bytes: int) -> str | None:
    crc32c, md5 = from_base64(item.get("crc32c"), 4), from_base64(item.get("md5Hash"), 16)
    if crc32c is not None and (md5 is None or make_checksum("crc32c") is not None):
        return f"crc32c:{crc32c}"
    return md5_digest(md5, size_bytes)


def _is_string(text: Any) -> bool:
    """Whether it is a string that can be sent; JSON may hold halves of characters."""
    try:
        return isinstance(text, str) and bool(text.encode())
    except UnicodeEncodeError:
        return False


def parse_json(body: bytes) -> dict[str, Any]:
    """
    Read the JSON object of a response.

    Raises:
        RefusedError: It is not JSON, or not an object.
    """
    try:
        check_size(body)
        content = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise RefusedError("response is not JSON; is this a Google Cloud Storage endpoint?")
    return content


def read_error(status: int, headers: Mapping[str, str], body: bytes) -> RefusedError:
    """
    Read an error response.
    """
    if 300 <= status < 400:
        return RefusedError(unavailable("", status, headers).reason, status=status)
    message, reason = _message(body)
    # Not all that speaks for the service speaks its JSON.
    message = message or words_of(headers, body)
    busy = retry_after(headers) if status in (429, 503) or reason in _BUSY else None
    return RefusedError(f"{status}: {message}" if message else f"HTTP {status}", status=status, busy=busy)


def _message(body: bytes) -> tuple[str, str]:
    """The message and the reason in the body of an error."""
    try:
        error = parse_json(body).get("error")
    except RefusedError:
        return "", ""
    if not isinstance(error, dict):
        return "", ""
    details = error.get("errors")
    first = details[0] if isinstance(details, list) and details and isinstance(details[0], dict) else {}
    return str(error.get("message", ""))[:_MAX_MESSAGE].strip(), str(first.get("reason", ""))
