"""
Numbers for people.
"""

from __future__ import annotations

from kserve_pvc._units import format_bytes, progress_of

__all__ = ["count", "format_bytes", "progress_of", "shorten"]


def shorten(text: str, width: int) -> str:
    """
    Leave the middle out of a text that is wider than its place: the ends of URIs and paths tell them apart.
    """
    if len(text) <= width:
        return text
    kept = max(width - 3, 1)
    return f"{text[: kept // 3]}...{text[-(kept - kept // 3) :]}"[-max(width, 1) :]


def count(number: int, noun: str) -> str:
    """
    Things for people: `1 file`, `2 files`.
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
