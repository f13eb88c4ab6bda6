"""
The log of the storage initializer, in the format of KServe's own.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from datetime import UTC, datetime


def log(level: str, text: str) -> None:
    """
    Write one line to standard error.
    """
    now = datetime.now(UTC)
    stamp = f"{now:%Y-%m-%d %H:%M:%S}.{now.microsecond // 1000:03d}"
    try:
        print(f"{stamp} {os.getpid()} storage.initializer {level} {text}", file=sys.stderr, flush=True)
    except (OSError, ValueError):
        # A log that is full ends no download. What it did not take, Python would write once more at its exit, and fail.
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            os.dup2(null, sys.stderr.fileno())
            os.close(null)
