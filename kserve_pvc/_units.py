"""
Amounts in units, for messages and for what shows progress.
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


def progress_of(bytes_done: int, bytes_total: int) -> str:
    """
    How far a download is: `1.5 GiB of 2.0 GiB`, or that its size is not known yet, as before its source has responded.
    """
    if not bytes_total:
        return "size not known yet"
    return f"{format_bytes(bytes_done)} of {format_bytes(bytes_total)}"


def tell_apart(first: int, second: int) -> tuple[str, str]:
    """
    Two amounts that are compared: in units, or in bytes if they differ by less than units show.
    """
    shown = format_bytes(first), format_bytes(second)
    return shown if shown[0] != shown[1] else (f"{first} bytes", f"{second} bytes")
