"""
Memory to read into.
"""

from __future__ import annotations

import mmap


def make_buffer(size_bytes: int) -> memoryview:
    """
    Memory that begins with a page, as what the kernel copies into it mostly does.

    What `bytearray` gives begins 16 or 32 bytes later. A processor compares addresses within a page first, takes each
    read of
    such a copy for one of what it wrote just before, and waits: copying from a socket then takes up to six times as
    long.
    """
    return memoryview(mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
