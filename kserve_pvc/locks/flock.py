"""
An advisory file lock, for volumes on which it is known to work across nodes.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

_PATIENCE = 1.0


class FileLock:
    """
    `flock(2)` through portalocker, tried without waiting.

    The call runs in a thread of its own: on NFS even a non-blocking lock hangs while the server recovers, and no
    time limit can interrupt it. A try that has not come back within a second counts as "not now".
    Where locks are not supported at all every try is granted, which costs duplicate work and nothing else.
    """

    def __init__(self, open_file: Callable[[], int]) -> None:
        self._open_file = open_file
        self._guard = threading.Lock()
        self._fd: int | None = None
        self._wanted = False
        self._attempt: threading.Thread | None = None
        self._error: Exception | None = None

    def try_acquire(self) -> bool:
        """
        Try once to get the lock; True if this process holds it.

        Raises:
            StoreError: The lock file cannot be opened.
        """
        with self._guard:
            self._wanted = True
            if self._fd is not None:
                return True
            if self._attempt is None or not self._attempt.is_alive():
                self._attempt = threading.Thread(target=self._acquire, name="kserve-pvc-flock", daemon=True)
                self._attempt.start()
        self._attempt.join(_PATIENCE)
        with self._guard:
            error, self._error = self._error, None
            if error is not None:
                raise error
            return self._fd is not None

    def release(self) -> None:
        """
        Give the lock back, if it is held. The file stays: deleting a lock file admits a second holder.
        """
        with self._guard:
            self._wanted = False
            fd, self._fd = self._fd, None
        if fd is not None:
            _give_back(fd)

    def _acquire(self) -> None:
        try:
            _load_portalocker()
            from portalocker import AlreadyLocked, LockException, LockFlags, lock

            fd = self._open_file()
        except Exception as error:  # Raised again where somebody hears it.
            self._error = error
            return
        try:
            lock(fd, LockFlags.EXCLUSIVE | LockFlags.NON_BLOCKING)
        except AlreadyLocked:
            os.close(fd)
            return
        except LockException:
            pass  # ENOLCK, ENOSYS and the like: no lock is to be had on this volume.
        with self._guard:
            if self._wanted:
                self._fd = fd
                return
        _give_back(fd)  # It was granted after its caller had left.


def _load_portalocker() -> None:
    """Import it where no directory for temporary files can be written, as in a container whose root file system is read-only."""
    try:
        import portalocker
    except FileNotFoundError:
        # It asks for that directory when it is imported, for locks that are not used here.
        asked = sys.modules["tempfile"]
        asked.tempdir = "/"  # type: ignore[attr-defined]
        try:
            import portalocker  # noqa: F401
        finally:
            asked.tempdir = None  # type: ignore[attr-defined]


def _give_back(fd: int) -> None:
    from portalocker import LockException, unlock

    with suppress(OSError, LockException):
        unlock(fd)
    with suppress(OSError):
        os.close(fd)
