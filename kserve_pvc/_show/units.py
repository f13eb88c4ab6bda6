"""
Numbers for people.
"""

from __future__ import annotations


def format_bytes(size_bytes: float) -> str:
    """
    Bytes for people: `1.5 GiB`.
    """
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < (1023.5 if unit == "B" else 1023.95):
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def count(number: int, noun: str) -> str:
    """
    Things for people: `1 file`, `2 files`.
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
