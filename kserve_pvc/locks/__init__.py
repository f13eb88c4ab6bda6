"""
Lockers: how writers of one model exclude each other. Locks save work; correctness never depends on them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

# The values of `locker` in `store.json`. `kubernetes` may be followed by a namespace.
LOCKERS: tuple[str, ...] = ("lease", "flock", "redis://HOST:PORT/DB", "kubernetes")


class NoLockError(Exception):
    """
    No lock is available: the volume does not support it, or the lock service does not respond.

    Internal: the claims on the volume decide instead.
    """


class Grab(Protocol):
    """
    One attempt to acquire an external lock. It may hang, so it runs in a thread of its own.
    """

    def __call__(self) -> Callable[[], None] | None:
        """
        Acquire the lock without waiting.

        Returns:
            A function that releases the lock, or None if another process holds it.

        Raises:
            NoLockError: The lock is unavailable.
            StoreError: The lock will stay unavailable until the configuration is changed.
        """
        ...
