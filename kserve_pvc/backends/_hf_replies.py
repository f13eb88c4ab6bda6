"""
What responses of a Hugging Face Hub say beside their content.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import parse_qsl, urlsplit

from kserve_pvc._source.redaction import redact
from kserve_pvc.backends._ranges import retry_after, unavailable
from kserve_pvc.errors import SourceDeniedError, SourceNotFoundError, SourceUnavailableError, StoreError

_NEXT_PAGE = re.compile(r'<([^<>]*)>[^,<]*;\s*rel="?next\b')
# `RateLimit: "api";r=0;t=55`: nothing is left, and there will be more in so many seconds.
_USED_UP = re.compile(r"\br\s*=\s*0\s*;\s*t\s*=\s*([0-9]{1,6})\b")


def find_next_page(uri: str, link: str) -> Mapping[str, str] | None:
    """
    Return the query of the next page, if a `Link` header names one.
    """
    match = _NEXT_PAGE.search(link)
    if match is None:
        return None
    try:
        return dict(parse_qsl(urlsplit(match[1]).query, keep_blank_values=True))
    except ValueError as error:
        raise not_a_hub(uri, "the link to the next page is malformed") from error


def seconds_until_more(headers: Mapping[str, str]) -> float:
    """
    Return how many seconds it takes until the hub accepts requests again (draft RateLimit header); rounded up, as the
    hub rounds down.
    """
    match = _USED_UP.search(headers.get("ratelimit", ""))
    return float(match[1]) + 1.0 if match else 0.0


def not_a_hub(uri: str, reason: str) -> SourceUnavailableError:
    """
    Make the error for a response that no hub sends.
    """
    return SourceUnavailableError(uri, f"{reason}, so it is not a Hugging Face Hub")


def read_refusal_of_hub(
    uri: str, status: int, headers: Mapping[str, str], words: str, *, has_token: bool
) -> StoreError:
    """
    Make the error for a response of a hub that is not a success.

    Args:
        words: What it says, without secrets. Where its code is understood, a sentence of our own says more.
    """
    code, said = headers.get("x-error-code", ""), f"HTTP {status}" + (f" ({redact(words)})" if words else "")
    if status == 429:
        pause = max(retry_after(headers), seconds_until_more(headers))
        return SourceUnavailableError(uri, said, retry_after=pause)
    if code == "GatedRepo":
        who = "the account of the token has no access" if has_token else "no token was given"
        reason = f"the model is gated and {who}; request access on the model's page, and pass a token (HF_TOKEN)"
        return SourceDeniedError(uri, reason)
    message = headers.get("x-error-message", "")
    if status == 401 and has_token and message.startswith("Invalid credentials"):
        return SourceDeniedError(uri, "the token is wrong or has expired; set HF_TOKEN to a valid one")
    if message.startswith("Access to this resource is disabled"):
        return SourceDeniedError(uri, "the hub has disabled it")
    if code == "RepoNotFound" or (status == 401 and not has_token):
        secret = "the token may not see it" if has_token else "no token was given; set HF_TOKEN"
        return SourceNotFoundError(uri, f"there is no such model, or it is private and {secret}")
    if code == "RevisionNotFound":
        return SourceNotFoundError(uri, "the model has no such revision")
    if code == "EntryNotFound":
        return SourceNotFoundError(uri, "the model has no such file or directory")
    if status in (401, 403):
        return SourceDeniedError(uri, f"{said}; the token (HF_TOKEN) may not read the model")
    if status == 404:
        return SourceNotFoundError(uri, f"{said}, without an error code of a hub; check HF_ENDPOINT too")
    return unavailable(uri, status, headers, words)
