"""
What this process remembers about stores, whichever `ModelStore` objects it has.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

# A server that starts on a warm volume loads what is imported above and nothing else. What downloads, removes, checks
# or talks to a source is imported by the method that does it.
if TYPE_CHECKING:
    from kserve_pvc._format.records import Holder


# One download per process is a matter of the process, not of one ModelStore object: (store id, key) -> lock.
_flights: dict[tuple[str, str], threading.Lock] = {}
_process_guard = threading.Lock()
# The newest record this process has returned, so that a stale listing never takes it back to an older one.
_returned: dict[tuple[str, str], int] = {}


def _forget_flights() -> None:
    global _process_guard
    _process_guard = threading.Lock()
    _flights.clear()


# A lock that another thread held at the time of a fork would stay locked in the child for ever.
os.register_at_fork(after_in_child=_forget_flights)


def _this_process() -> Holder:
    from kserve_pvc._settings import pod_and_node
    from kserve_pvc.locks.liveness import here

    return here(*pod_and_node())
