"""
Ending a call from outside, whatever it is waiting for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from kserve_pvc._threads import start_thread
from kserve_pvc.errors import DownloadCancelledError

# How soon a cancelled call notices. It compares a flag, which costs nothing beside a download.
POLL_SECONDS = 0.1
# How long a cancelled call waits for what it interrupts. A source may be silent for much longer.
PATIENCE_SECONDS = 0.5

_T = TypeVar("_T")


class Cancel(Protocol):
    """
    What cancels a call, as a `threading.Event` does.
    """

    def is_set(self) -> bool: ...


class AnyOf:
    """
    Several of them as one.
    """

    def __init__(self, *events: Cancel | None) -> None:
        self._events = [event for event in events if event is not None]

    def is_set(self) -> bool:
        return any(event.is_set() for event in self._events)


class Cancellation:
    """
    Whether a call was cancelled, and ways to wait that end when it is.
    """

    def __init__(self, ref: str, cancel: Cancel | None) -> None:
        self._ref = ref
        self._cancel = cancel

    @property
    def is_cancelled(self) -> bool:
        return self._cancel is not None and self._cancel.is_set()

    def check(self) -> None:
        """
        Raises:
            DownloadCancelledError: The call was cancelled.
        """
        if self.is_cancelled:
            raise DownloadCancelledError(self._ref)

    def sleep(self, seconds: float) -> None:
        """
        Wait for so long.
        """
        self._wait(time.sleep, seconds)

    def acquire(self, lock: threading.Lock, seconds: float) -> bool:
        """
        Acquire a lock, or return False if it is not free for so long.
        """
        return self._wait(lambda left: lock.acquire(timeout=left), min(seconds, threading.TIMEOUT_MAX))

    def wait(self, event: threading.Event) -> None:
        """
        Wait for an event.
        """
        self._wait(event.wait, threading.TIMEOUT_MAX)

    def _wait(self, try_for: Callable[[float], bool | None], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while True:
            self.check()
            left = max(0.0, deadline - time.monotonic())
            if try_for(left if self._cancel is None else min(left, POLL_SECONDS)):
                return True
            if time.monotonic() >= deadline:
                return False


def _nothing() -> None:
    pass


def run_detachable(
    act: Callable[[], _T],
    cancellation: Cancellation,
    *,
    stop: Callable[[], None] = _nothing,
    leave: Callable[[], None] = _nothing,
    patience: float = PATIENCE_SECONDS,
) -> _T:
    """
    Run something in a thread of its own that is left behind if it does not end when it should.

    If the call is cancelled or interrupted, the thread is told to stop and waited for briefly. A thread that waits for
    a silent source ends later, and closes what it has open; its call is over by then.

    Args:
        act: What to run. It returns or raises soon after `stop`, unless it waits for something that cannot be
            interrupted.
        stop: Tells it to stop.
        leave: Called if it is left behind.
        patience: How many seconds to wait before that.

    Raises:
        DownloadCancelledError: The call was cancelled.
        BaseException: What `act` raised.
    """
    results: list[_T] = []
    failures: list[BaseException] = []
    is_over = threading.Event()

    def run() -> None:
        try:
            results.append(act())
        except BaseException as error:
            failures.append(error)
        finally:
            is_over.set()

    start_thread(run, "kserve-pvc-download")
    try:
        cancellation.wait(is_over)
    except BaseException:  # A KeyboardInterrupt too, and the SystemExit of a signal handler.
        stop()
        if not is_over.wait(min(patience, threading.TIMEOUT_MAX)):
            leave()
        raise
    if failures:
        raise failures.pop()
    return results[0]
