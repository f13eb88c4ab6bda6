"""
Calls of a file system that may hang.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from kserve_pvc._threads import start_thread


class Call:
    """
    One call of a file system, on a thread of its own, so that it can be waited for with a limit.

    A call cannot be cancelled. One that hangs keeps its thread until the file system gives up.
    """

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self._done = threading.Event()
        self._result: Any = None
        self._error: BaseException | None = None
        start_thread(self._run, "kserve-pvc-fsspec")

    def _run(self) -> None:
        try:
            self._result = self._work()
        except BaseException as error:
            self._error = error
        self._done.set()

    def wait(self, seconds: float) -> bool:
        """
        Wait at most this long; return whether the call has ended.
        """
        return self._done.wait(seconds)

    def result(self) -> Any:
        """
        Return the result of a call that has ended, or raise its error.
        """
        if self._error is not None:
            raise self._error
        return self._result
