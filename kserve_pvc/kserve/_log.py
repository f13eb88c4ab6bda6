"""
The log of the storage initializer, in the format of KServe's own.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from datetime import UTC, datetime
from typing import TextIO

_hidden: frozenset[str] = frozenset()


def hide(*levels: str) -> None:
    """
    Write no lines of these levels from now on.
    """
    global _hidden
    _hidden = frozenset(levels)


def log(level: str, text: str) -> None:
    """
    Write one line to standard error.
    """
    if level in _hidden:
        return
    now = datetime.now(UTC)
    stamp = f"{now:%Y-%m-%d %H:%M:%S}.{now.microsecond // 1000:03d}"
    write(sys.stderr, f"{stamp} {os.getpid()} storage.initializer {level} {text}\n")


def write(stream: TextIO | None, text: str) -> None:
    """
    Write to a stream, or nowhere if it is closed or full: a log that takes nothing ends no download.
    """
    if stream is None:
        return
    try:
        stream.write(text)
        stream.flush()
    except (OSError, ValueError):
        # What it did not take, Python would write once more at its exit, and fail.
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            os.dup2(null, stream.fileno())
            os.close(null)
