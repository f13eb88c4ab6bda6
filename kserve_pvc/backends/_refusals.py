"""
What a response that is not a success says for people: found in its body or headers, without what was sent along.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterator, Mapping
from urllib.parse import unquote

from kserve_pvc._source.redaction import MASK, hide, redact
from kserve_pvc.backends._http.target import Target
from kserve_pvc.backends._xml import is_size, parse_xml
from kserve_pvc.errors import StoreError

# The hint of a refusal that is final and says why itself.
SAME_AGAIN = "a retry gets the same response"
# Longer messages are cut; what is cut first is long enough that no secret loses its end in what is shown.
_MAX_WORDS = 500
_MAX_RAW = 8000
# What goes along with a request and is no secret.
_PLAIN_HEADERS = {
    *("accept", "accept-encoding", "host", "if-match", "if-unmodified-since", "range", "user-agent", "date"),
    *("x-amz-content-sha256", "x-amz-date", "x-amz-checksum-mode", "x-amz-request-payer", "x-ms-version", "x-ms-date"),
}
_PLAIN_PARAMETERS = {
    *("list-type", "prefix", "delimiter", "encoding-type", "continuation-token", "versionid", "partnumber", "alt"),
    *("generation", "maxresults", "fields", "pagetoken", "userproject", "restype", "comp", "include", "marker"),
    *("recursive", "expand", "cursor", "limit", "x-amz-algorithm", "x-amz-date", "x-amz-expires", "sv", "sr", "sp"),
    *("se", "st", "spr", "expires", "x-amz-signedheaders", "x-id"),
}
_PART = re.compile(r"[^\s,=:]+=([^\s,]{8,})")
_FIELDS = ("message", "error_description", "detail", "error", "title", "reason", "errors")


def final_status(status: int) -> bool:
    """
    Whether a retry of the same request gets the same response: so it is with every refusal of a client's request but
    those that are about time.
    """
    return (300 <= status < 500 and status not in (408, 425, 429)) or status in (501, 505)


def hides_reason(status: int, code: str) -> bool:
    """
    Whether a response to HEAD, which has no body, leaves out why something is refused. GET then says it.

    Args:
        code: What the service names as its reason; the status, if it names none.
    """
    return code in (str(status), "") and final_status(status) and status not in (404, 410, 412, 416)


def head_of_range(headers: Mapping[str, str]) -> Mapping[str, str]:
    """
    Turn the headers of a response with the first byte of an object into those of the whole object.
    """
    size = headers.get("content-range", "").rpartition("/")[2]
    return {**headers, "content-length": size} if is_size(size) else headers


def hide_sent(text: str, target: Target, headers: Mapping[str, str]) -> str:
    """
    Take out of a message what its request brought along: services repeat headers and queries in their errors. It is
    cut if it is too long to be shown.
    """
    return _cut(redact(hide(text, _sent(target, headers))))


def without_sent(error: StoreError, target: Target, headers: Mapping[str, str]) -> StoreError:
    """
    Take out of an error what its request brought along.
    """
    if isinstance(said := getattr(error, "reason", None), str):
        error.reason = hide(said, _sent(target, headers))  # type: ignore[attr-defined]  # It has a reason.
    return error


def _sent(target: Target, headers: Mapping[str, str]) -> Iterator[str]:
    for name, value in headers.items():
        if name.lower() in _PLAIN_HEADERS:
            continue
        scheme, _, credentials = value.partition(" ")
        is_scheme = name.lower().endswith("authorization") and credentials
        yield credentials if is_scheme else value
        yield from _PART.findall(value)
        if scheme.lower() == "basic":
            yield from _of_basic(credentials)
        elif scheme.lower().startswith("sharedkey"):
            yield credentials.rpartition(":")[2]
    for pair in target.path.partition("?")[2].split("&"):
        name, _, value = pair.partition("=")
        if name.lower() not in _PLAIN_PARAMETERS:
            yield unquote(value)


def _of_basic(credentials: str) -> Iterator[str]:
    try:
        both = base64.b64decode(credentials, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return
    yield both
    yield both.partition(":")[2]


def words_of(headers: Mapping[str, str], body: bytes) -> str:
    """
    Return code and message of a refusal on one line, as far as it has them in a form that is known; empty if not.
    """
    words = _shortened(headers.get("x-error-message", "")) or _of_body(headers, body)
    code = headers.get("x-error-code") or headers.get("x-ms-error-code") or ""
    return f"{code}: {words}" if code and words and code not in words else words or code


def _of_body(headers: Mapping[str, str], body: bytes) -> str:
    text = body.decode("utf-8", "replace").strip()
    if text.startswith("<"):
        return _of_xml(body)
    if text.startswith(("{", "[", '"')):
        try:
            return _shortened(_of_json(json.loads(text)))
        except (ValueError, RecursionError):
            return ""
    # A page is for people with a browser.
    kind = headers.get("content-type", "text/plain").partition(";")[0].strip().lower()
    return _shortened(text.partition("\n")[0]) if kind == "text/plain" else ""


def _of_xml(body: bytes) -> str:
    root = parse_xml(body)
    if root is None or root.tag.rpartition("}")[2] != "Error":
        return ""
    said = {child.tag.rpartition("}")[2]: _shortened(child.text or "") for child in root}
    return ": ".join(part for part in (said.get("Code"), said.get("Message") or said.get("Details")) if part)


def _of_json(found: object, depth: int = 4) -> str:
    """The message of an error, in any of the usual shapes."""
    if isinstance(found, str):
        return found
    if isinstance(found, list):
        return _of_json(found[0], depth - 1) if found and depth else ""
    if not isinstance(found, dict) or not depth:
        return ""
    message = next((said for name in _FIELDS if (said := _of_json(found.get(name), depth - 1))), "")
    code = found.get("code")
    return f"{code}: {message}" if isinstance(code, str) and message and code not in message else message


def _shortened(text: str) -> str:
    if len(text) > _MAX_RAW:
        text = text[:_MAX_RAW].rpartition(" ")[0]
    return " ".join(text.split())


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_WORDS else text[:_MAX_WORDS].rstrip() + MASK
