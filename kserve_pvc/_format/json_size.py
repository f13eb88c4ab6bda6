"""
A bound for the memory that JSON of others takes once it is parsed, relative to its size.
"""

from __future__ import annotations

import re

# A string, or what begins like one and has no end: then nothing is looked at twice.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_MARKS = (b"[", b"{", b":", b",")
# The shortest entry of a manifest has nine of these in 55 bytes. What has more consists of values so small that each
# takes thirty times its size in memory.
BYTES_PER_MARK = 6
MARKS_OF_ANY = 1000


def check_size(data: bytes) -> None:
    """
    Refuse JSON that consists of very many very small values: parsed, it would take a multiple of the memory of others.

    Raises:
        ValueError: It is that.
    """
    most = MARKS_OF_ANY + len(data) // BYTES_PER_MARK
    # What stands in strings is counted too at first, which is quicker and rarely too much.
    if _count(data) > most and _count(_STRING.sub(b"", data)) > most:
        raise ValueError(f"it has more values than {len(data)} bytes of any record have")


def _count(data: bytes) -> int:
    return sum(map(data.count, _MARKS))
