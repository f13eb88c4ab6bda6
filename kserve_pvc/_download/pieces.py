"""
Reading a range patiently: stalls, retries and pauses.
"""

from __future__ import annotations

import random
import time
from contextlib import AbstractContextManager
from types import TracebackType

from kserve_pvc._download.tuning import Tuning
from kserve_pvc._source.contract import RangeReader


class OpenedRange:
    """
    A range that was asked for before anybody reads it, as a context manager around its reader. It is closed once.
    """

    def __init__(self, context: AbstractContextManager[RangeReader]) -> None:
        self._context: AbstractContextManager[RangeReader] | None = context
        self._reader = context.__enter__()

    def __enter__(self) -> RangeReader:
        return self._reader

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        context, self._context = self._context, None
        if context is not None:
            context.__exit__(kind, error, trace)


class Tries:
    """
    How often and how long something is tried that makes no progress.
    """

    def __init__(self, tuning: Tuning) -> None:
        self._deadline = time.monotonic() + tuning.retry_seconds
        self._pauses = tuning.pauses(random.random())
        self._last = tuning.retry_first_seconds

    def next_delay(self, retry_after: float | None) -> float | None:
        """
        Seconds until the next try, or None after the last. A source that is busy may be for long: only time limits it.
        """
        delay = next(self._pauses, None if retry_after is None else min(self._last * 2, 10.0))
        if delay is None:
            return None
        self._last = delay
        delay = max(delay, retry_after or 0.0)
        return None if time.monotonic() + delay > self._deadline else delay
