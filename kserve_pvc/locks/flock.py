"""
An advisory file lock, for volumes on which it is known to work across nodes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress

from kserve_pvc.locks import NoLockError


def grab_file(open_file: Callable[[], int]) -> Callable[[], None] | None:
    """
    Try `flock(2)` through portalocker. The file stays when the lock is given back: deleting it admits a second holder.

    `open_file` opens for reading and writing, which NFS needs for an exclusive lock.

    Raises:
        NoLockError: The volume has no locks.
        StoreError: The lock file cannot be opened.
    """
    _load_portalocker()
    from portalocker import AlreadyLocked, LockException, LockFlags, lock, unlock

    fd = open_file()
    try:
        lock(fd, LockFlags.EXCLUSIVE | LockFlags.NON_BLOCKING)
    except AlreadyLocked:
        os.close(fd)
        return None
    except LockException as error:  # ENOLCK, ENOSYS and the like.
        os.close(fd)
        raise NoLockError from error

    def give_back() -> None:
        with suppress(OSError, LockException):
            unlock(fd)
        os.close(fd)

    return give_back


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
