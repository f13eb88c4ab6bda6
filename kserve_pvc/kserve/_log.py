"""
The log of the storage initializer, in the format of KServe's own.
"""

from __future__ import annotations

import os
import sys
from datetime import UTC, datetime


def log(level: str, text: str) -> None:
    """
    Write one line to standard error.
    """
    now = datetime.now(UTC)
    stamp = f"{now:%Y-%m-%d %H:%M:%S}.{now.microsecond // 1000:03d}"
    print(f"{stamp} {os.getpid()} storage.initializer {level} {text}", file=sys.stderr, flush=True)
