"""
The receive buffers of all transfers of this process together.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kserve_pvc._volume.buffers import make_buffer

BUFFERS = 32
BUFFER_BYTES = 1024 * 1024
_POLL_SECONDS = 0.1


class Budget:
    """
    So many buffers may be in use at the same time; a stream beyond them waits for one.
    """

    def __init__(self, buffers: int = BUFFERS) -> None:
        self._free = threading.BoundedSemaphore(buffers)

    @contextmanager
    def buffer(self, check: Callable[[], None]) -> Iterator[memoryview]:
        """
        Make a buffer that counts as long as the context lasts.

        Args:
            check: Called again and again while there is none; ends the wait by raising.
        """
        while not self._free.acquire(timeout=_POLL_SECONDS):
            check()
        try:
            yield make_buffer(BUFFER_BYTES)
        finally:
            self._free.release()


_budget = Budget()


def process_budget() -> Budget:
    """
    Return the budget that all transfers of this process share.
    """
    return _budget


def _renew_budget() -> None:
    global _budget
    _budget = Budget()


# What other threads held at the time of a fork is not held in the child.
os.register_at_fork(after_in_child=_renew_budget)
