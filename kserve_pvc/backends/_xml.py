"""
Responses in XML, as S3 and Azure send them.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET


def parse_xml(body: bytes) -> ET.Element | None:
    """
    Return the root of a response; None if it is not XML, or more of it than a service has use for.
    """
    # Without a document type there are no entities to expand. Decoded first, so that no other encoding hides one.
    try:
        text = body.decode("utf-8-sig")
        return None if "<!" in text else ET.fromstring(text)
    except (ValueError, ET.ParseError):
        return None


def is_size(text: str) -> bool:
    """
    Whether a string is a number of bytes, and not one that only looks like it.
    """
    return text.isascii() and text.isdigit() and len(text) <= 18
