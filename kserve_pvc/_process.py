"""
What this process remembers about stores, in whichever `ModelStore` objects it opened them.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kserve_pvc._format.records import Holder

# One download per process is a matter of the process, not of one ModelStore object: (identity of a store, key) -> lock.
_flights: dict[tuple[str, str], threading.Lock] = {}
_guard = threading.Lock()
# The newest record this process has returned, so that a stale listing never takes it back to an older one.
_returned: dict[tuple[str, str], int] = {}


def store_identity(root: Path, store_id: str) -> str:
    """
    Return what this process knows a store by, however often and under whatever path it is opened.

    A copy of a store, such as a clone or a snapshot of its volume, has the same store id, and a life of its own.
    """
    found = os.stat(root)
    return f"{store_id}@{found.st_dev}:{found.st_ino}"


def flight_of(identity: str, key: str) -> threading.Lock:
    """
    Return the lock under which threads of this process download one model of one store.
    """
    with _guard:
        return _flights.setdefault((identity, key), threading.Lock())


def newest_returned(identity: str, key: str) -> int:
    """
    Return the number of the newest record that this process has returned, 0 if none.
    """
    return _returned.get((identity, key), 0)


def remember_returned(identity: str, key: str, seq: int) -> None:
    """
    Note that this process returns a record, so that none older is returned later.
    """
    with _guard:
        _returned[identity, key] = max(seq, _returned.get((identity, key), 0))


def this_process() -> Holder:
    """
    Describe this process as the holder of a claim or a lease: its pod, node, uid and start.
    """
    from kserve_pvc._settings import pod_and_node
    from kserve_pvc.locks.liveness import here

    return here(*pod_and_node())


def _forget_flights() -> None:
    global _guard
    _guard = threading.Lock()
    _flights.clear()


# A lock that another thread held at the time of a fork would stay locked in the child for ever.
os.register_at_fork(after_in_child=_forget_flights)
