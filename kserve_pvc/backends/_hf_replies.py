"""
What responses of a Hugging Face Hub say beside their content.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import parse_qsl, urlsplit

from kserve_pvc.errors import SourceUnavailableError

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
