"""
Downloads in other processes, and the resources of this one.
"""

from __future__ import annotations

import gc
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kserve_pvc._source.contract import (
    BackendFactory,
)
from kserve_pvc._source.ref import parse_ref
from kserve_pvc._store import ModelStore
from kserve_pvc.testing._backends import (
    WatchedBackend,
)
from kserve_pvc.testing._remote import (
    LEASE_SECONDS,
    PART_BYTES,
)


def count_resources() -> tuple[int, int]:
    """
    Return the numbers of threads and descriptors of this process.
    """
    gc.collect()
    descriptors = Path("/proc/self/fd")
    return threading.active_count(), len(os.listdir(descriptors)) if descriptors.exists() else 0


def our_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("kserve-pvc-")]


def count_stable_resources() -> tuple[int, int]:
    """
    Return the numbers once they have been stable for 0.3 s, so that threads that are ending have ended.
    """
    found, since = count_resources(), time.monotonic()
    while time.monotonic() - since < 0.3:
        time.sleep(0.05)
        if (now := count_resources()) != found:
            found, since = now, time.monotonic()
    return found


def wait_until(condition: Callable[[], bool], expected: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"expected {expected}, found {count_resources()}: {threading.enumerate()}"
        time.sleep(0.05)


@contextmanager
def _child(payload: bytes) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", f"from {__name__} import download_and_stop; download_and_stop()"]
    # The child finds the package where this process does.
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ
    )
    guard = threading.Timer(120, child.kill)
    guard.start()
    try:
        assert child.stdin is not None
        child.stdin.write(payload)
        child.stdin.close()
        yield child
    finally:
        guard.cancel()
        guard.join()
        child.kill()
        child.wait()
        for stream in (child.stdout, child.stderr):
            if stream is not None:
                stream.close()


def kill_halfway(backend: BackendFactory, options: Mapping[str, Any], uri: str, volume: Path) -> None:
    with _child(pickle.dumps((backend, options, uri, str(volume)))) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        if child.stdout.readline() != b"halfway\n":
            child.kill()
            raise AssertionError(f"the child did not get halfway:\n{child.stderr.read().decode(errors='replace')}")


def download_and_stop() -> None:
    """
    Download a model, and hang before the fifth range. Runs in the process that is killed.
    """
    backend, options, uri, volume = pickle.load(sys.stdin.buffer)

    def stop(number: int) -> None:
        if number > 4:
            print("halfway", flush=True)
            threading.Event().wait()

    ref, watched = parse_ref(uri), WatchedBackend(backend(options), stop)
    store = ModelStore(
        volume,
        mode="rw",
        backends={ref.scheme: lambda options: watched},
        part_bytes=PART_BYTES,
        lease_seconds=LEASE_SECONDS,
    )
    store.ensure(uri, progress=False, max_workers=1)
