"""
A lock that something outside of the store keeps: a file system, Redis or Kubernetes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

from kserve_pvc.locks import Grab, NoLockError

_PATIENCE = 1.0


class ExternalLock:
    """
    Tries to get a lock, and never waits for long.

    The tries run in a thread of their own: on NFS even a lock call that does not wait hangs while the server recovers,
    a service may not answer, and no time limit can interrupt either. A try that has not come back within a second
    counts as "not now", unless its caller says otherwise. The same second goes for giving it back.
    """

    def __init__(self, grab: Grab) -> None:
        self._grab = grab
        self._guard = threading.Lock()
        self._give_back: Callable[[], None] | None = None
        self._wanted = False
        self._attempt: threading.Thread | None = None
        self._error: Exception | None = None

    def try_acquire(self, seconds: float = _PATIENCE, *, unanswered: bool | None = False) -> bool | None:
        """
        Try once to get the lock: True if this process holds it, False if not now, None if there is none to be had.

        Args:
            seconds: How long to wait for an answer.
            unanswered: What to return if there is none by then. For who asks again and again, it is "not now".

        Raises:
            StoreError: Somebody has to change something first.
        """
        with self._guard:
            self._wanted = True
            if self._give_back is not None:
                return True
            if self._attempt is None or not self._attempt.is_alive():
                self._attempt = threading.Thread(target=self._acquire, name="kserve-pvc-lock", daemon=True)
                self._attempt.start()
        self._attempt.join(seconds)
        with self._guard:
            error, self._error = self._error, None
            if isinstance(error, NoLockError):
                return None
            if error is not None:
                raise error
            if self._attempt.is_alive() and self._give_back is None:
                return unanswered
            return self._give_back is not None

    def release(self) -> None:
        """
        Give the lock back, if it is held. It is waited for a second.
        """
        with self._guard:
            self._wanted = False
            give_back, self._give_back = self._give_back, None
        if give_back is not None:
            leaving = threading.Thread(target=_quietly, args=(give_back,), name="kserve-pvc-unlock", daemon=True)
            leaving.start()
            leaving.join(_PATIENCE)

    def _acquire(self) -> None:
        try:
            give_back = self._grab()
        except Exception as error:  # Raised again where somebody hears it.
            self._error = error
            return
        with self._guard:
            if self._wanted:
                self._give_back = give_back
                return
        if give_back is not None:
            _quietly(give_back)  # It was granted after its caller had left.


def _quietly(give_back: Callable[[], None]) -> None:
    # Whoever cannot say goodbye is found silent after a while, which costs time and nothing else.
    with suppress(Exception):
        give_back()
