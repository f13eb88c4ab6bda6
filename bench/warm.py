"""
`python warm.py URI ROOT`: time hits on a model that is there, next to the least that any way of looking takes.

Prints the medians as JSON, in microseconds.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable

from kserve_pvc import ModelStore

_TURNS = 2000


def main(uri: str, root: str) -> None:
    store = ModelStore(root, mode="rw")
    log = os.path.join(root, ".kserve-pvc", "keys", store.get(uri).key, "log")
    calls: dict[str, Callable[[], object]] = {
        "bare listing and read": lambda: _look(log),
        "get": lambda: store.get(uri),
        "in": lambda: uri in store,
        "ensure": lambda: store.ensure(uri, progress=False),
    }
    taken: dict[str, list[int]] = {name: [] for name in calls}
    # They take turns, so that all of them meet the same machine.
    for _ in range(_TURNS):
        for name, call in calls.items():
            started_at = time.perf_counter_ns()
            call()
            taken[name].append(time.perf_counter_ns() - started_at)
    print(json.dumps({name: statistics.median(each) / 1000 for name, each in taken.items()}))


def _look(log: str) -> bytes:
    """List the log and read its newest record: what a hit has to do, in as few calls as there can be."""
    descriptor = os.open(os.path.join(log, max(os.listdir(log))), os.O_RDONLY)
    try:
        return os.read(descriptor, 65536)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    main(*sys.argv[1:])
