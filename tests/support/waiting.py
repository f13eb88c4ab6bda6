"""
Waiting for what another process does, with an end.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


def until(condition: Callable[[], _T], seconds: float = 30.0) -> _T:
    """
    Ask again and again until the answer is true, and return it; fail if it never is.
    """
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"it did not come true within {seconds:g} s")
        time.sleep(0.01)
    return answer
