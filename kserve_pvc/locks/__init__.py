"""
How writers of one model keep out of each other's way. Locks save work; they never carry safety.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

# As they are written in `store.json`; `redis` is followed by an address, `kubernetes` by a namespace.
LOCKERS: tuple[str, ...] = ("lease", "flock", "redis://HOST:PORT/DB", "kubernetes")


class NoLockError(Exception):
    """
    No lock is to be had: the volume has none, or the service that keeps them does not answer. Not an error of the
    caller's.
    """


class Grab(Protocol):
    """
    One try to get an outside lock. It may hang, so it is called where nobody waits for it.
    """

    def __call__(self) -> Callable[[], None] | None:
        """
        Get the lock, and answer how to give it back; None if somebody else has it.

        Raises:
            NoLockError: There is none to be had now.
            StoreError: There will not be one before somebody changes something.
        """
        ...
