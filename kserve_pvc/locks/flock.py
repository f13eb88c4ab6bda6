"""
An advisory file lock, for volumes on which it is known to work across nodes.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from contextlib import suppress

from kserve_pvc.locks import NoLockError


def grab_file(open_file: Callable[[], int]) -> Callable[[], None] | None:
    """
    Try to acquire an exclusive `flock(2)` without waiting.

    The file is kept when the lock is released: deleting it would admit a second holder.

    Args:
        open_file: Opens the file for reading and writing, which NFS needs for an exclusive lock.

    Returns:
        A function that releases the lock, or None if another process holds it.

    Raises:
        NoLockError: The volume does not support locks.
        StoreError: The lock file cannot be opened.
    """
    try_lock, unlock = _load()
    fd = open_file()
    try:
        is_locked = try_lock(fd)
    except OSError as error:  # ENOLCK, ENOSYS and the like.
        os.close(fd)
        raise NoLockError from error
    if not is_locked:
        os.close(fd)
        return None

    def release() -> None:
        with suppress(OSError):
            unlock(fd)
        os.close(fd)

    return release


def _load() -> tuple[Callable[[int], bool], Callable[[int], None]]:
    try:
        import portalocker
    except FileNotFoundError:
        # Importing portalocker needs a directory for temporary files, for kinds of locks that are not used here. A
        # container with a read-only root file system may have none. portalocker calls flock(2) too.
        return _flock, lambda fd: fcntl.flock(fd, fcntl.LOCK_UN)

    def try_lock(fd: int) -> bool:
        try:
            portalocker.lock(fd, portalocker.LockFlags.EXCLUSIVE | portalocker.LockFlags.NON_BLOCKING)
        except portalocker.AlreadyLocked:
            return False
        except portalocker.LockException as error:
            raise OSError(str(error)) from error
        return True

    def unlock(fd: int) -> None:
        try:
            portalocker.unlock(fd)
        except portalocker.LockException as error:
            raise OSError(str(error)) from error

    return try_lock, unlock


def _flock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
