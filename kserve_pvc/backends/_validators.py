"""
What tells the content of an object from other content: its ETag, or its date where that identifies nothing.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from email.utils import format_datetime
from uuid import uuid4

# What some services give every object for its ETag.
_NOTHING = frozenset(("", "null", "(null)", "nil", "none", "undefined", "unknown", "false", "n/a"))
_FILLER = re.compile(r"[0-]+")
_ETAG = re.compile(r'(?:W/)?"?(.*?)"?', re.DOTALL)
# MD5, SHA-1 and SHA-256 of nothing.
_OF_NOTHING = frozenset(
    (
        "d41d8cd98f00b204e9800998ecf8427e",
        "da39a3ee5e6b4b0d3255bfef95601890afd80709",
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    )
)


def bare_etag(etag: str) -> str:
    """
    Return an ETag without the quotes that a header has and some listings lack, and without the mark of a weak one.
    """
    match = _ETAG.fullmatch(etag.strip())
    return etag if match is None else match[1].strip('"')


def identifies(etag: str | None, size_bytes: int) -> bool:
    """
    Whether an ETag can tell one content from another: not if it is absent, empty, a word such as `null`, or the digest
    of no bytes for an object that has some.
    """
    if etag is None:
        return False
    bare = bare_etag(etag).strip().lower()
    is_of_nothing = bare in _OF_NOTHING and size_bytes > 0
    return not (bare in _NOTHING or _FILLER.fullmatch(bare) or is_of_nothing)


def make_token() -> str:
    """
    Make the token of a file of which nothing tells one content from another: no refresh takes it for what it was.
    """
    return f"unidentified-{uuid4().hex}"


def http_date(text: object) -> str | None:
    """
    Write the date of a listing (ISO 8601, or a `datetime`) as a header has it, to the second; None if it is not one.
    """
    if isinstance(text, datetime):
        moment = text
    elif not isinstance(text, str) or text.endswith("GMT"):
        return text if isinstance(text, str) else None
    else:
        try:
            moment = datetime.fromisoformat(text.strip())
        except ValueError:
            return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return format_datetime(moment.astimezone(UTC).replace(microsecond=0), usegmt=True)
