"""
A lock that is not kept in the store: by a file system, Redis or Kubernetes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress

from kserve_pvc._threads import start_thread
from kserve_pvc.errors import VolumeError
from kserve_pvc.locks import Grab, NoLockError

TIMEOUT = 1.0


class ExternalLock:
    """
    Tries to acquire a lock, and never blocks for longer than a timeout.

    Attempts run in a thread of their own: on NFS even a non-blocking lock call hangs while the server recovers, a
    service may not respond, and neither can be interrupted.

    Args:
        timeout: Seconds to wait for an attempt, and for a release.
    """

    def __init__(self, grab: Grab, *, timeout: float = TIMEOUT) -> None:
        self._grab = grab
        self._timeout = timeout
        self._guard = threading.Lock()
        self._release: Callable[[], None] | None = None
        self._wanted = False
        self._attempt: threading.Thread | None = None
        self._error: Exception | None = None
        self._pid = os.getpid()

    def try_acquire(self, *, on_timeout: bool | None = False) -> bool | None:
        """
        Try once to acquire the lock.

        Args:
            on_timeout: What to return if the attempt is still running after the timeout. For a caller that retries,
                it is the same as a lock that is held.

        Returns:
            True if this process holds the lock, False if another process does, None if the lock is unavailable.

        Raises:
            StoreError: The lock will stay unavailable until the configuration is changed.
        """
        with self._guard:
            self._wanted = True
            if self._release is not None:
                return True
            if self._attempt is None or not self._attempt.is_alive():
                self._attempt = start_thread(self._acquire, "kserve-pvc-lock")
        self._attempt.join(self._timeout)
        with self._guard:
            error, self._error = self._error, None
            if isinstance(error, NoLockError):
                return None
            if error is not None:
                raise error
            if self._attempt.is_alive() and self._release is None:
                return on_timeout
            return self._release is not None

    def release(self) -> None:
        """
        Release the lock, if it is held.

        A forked child leaves it alone: the lock is its parent's, and many kinds can be released from either.
        """
        if os.getpid() != self._pid:
            return
        with self._guard:
            self._wanted = False
            release, self._release = self._release, None
        if release is not None:
            try:
                start_thread(_try_release, "kserve-pvc-unlock", release).join(self._timeout)
            except VolumeError:
                _try_release(release)

    def _acquire(self) -> None:
        try:
            release = self._grab()
        except Exception as error:  # Raised by `try_acquire`.
            self._error = error
            return
        with self._guard:
            if self._wanted:
                self._release = release
                return
        if release is not None:
            _try_release(release)  # It was granted after the caller had given up.


def _try_release(release: Callable[[], None]) -> None:
    # A lock that cannot be released expires, which costs other processes time and nothing else.
    with suppress(Exception):
        release()
