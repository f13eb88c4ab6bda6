"""
Responses in XML, as S3 and Azure send them.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

_TEXT = re.compile(rb">[^<]*")
# A tag takes up to 160 bytes of memory, an attribute three times that. Real listings have a tag in 13 bytes at most.
BYTES_PER_TAG = 10
TAGS_OF_ANY = 1000
_TAGS_PER_ATTRIBUTE = 3


def parse_xml(body: bytes) -> ET.Element | None:
    """
    Return the root of a response; None if it is not XML, or more of it than a service has use for: a document type, or
    so many tags and attributes for its size that it would take a multiple of the memory of others.
    """
    if is_crowded(body):
        return None
    # Without a document type there are no entities to expand. Decoded first, so that no other encoding hides one.
    try:
        text = body.decode("utf-8-sig")
        return None if "<!" in text else ET.fromstring(text)
    except (ValueError, ET.ParseError):
        return None


def is_crowded(body: bytes | bytearray) -> bool:
    """
    Whether a response consists of so many small elements that parsed it would take a multiple of the memory of others.
    """
    most = TAGS_OF_ANY + len(body) // BYTES_PER_TAG
    # What stands between the tags is counted too at first, which is quicker and rarely too much.
    return _count(body) > most and _count(_TEXT.sub(b">", body)) > most


def _count(body: bytes | bytearray) -> int:
    return body.count(b"<") + _TAGS_PER_ATTRIBUTE * body.count(b"=")


def is_size(text: str) -> bool:
    """
    Whether a string is a number of bytes, and not one that only looks like it.
    """
    return text.isascii() and text.isdigit() and len(text) <= 18
