"""
What processes on the nodes of a shared volume do. A module of its own, because a child must be able to import it.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import actors
import attrs
from auditor import hash_tree

from kserve_pvc import Diagnosis, ModelStore, StoreError
from kserve_pvc._doctor.doctor import diagnose
from kserve_pvc._volume.writing import VolumeWriter
from kserve_pvc.locks import liveness


@attrs.frozen(kw_only=True)
class Got:
    """
    What one process got, and when, on the clock that all processes of a machine share.
    """

    node: int
    status: str
    path: Path
    bytes_fetched: int
    ready_at: float
    digests: Mapping[str, str]


def ensure(node: int, root: str, uri: str, arguments: Mapping[str, Any], results: Any = None, gate: Any = None) -> None:
    """
    Ask for a model on a node when the gate opens, hash what is there, and put what came of it into the queue.
    """
    liveness._boot_id = lambda: f"node-{node}"  # A PID on another node proves nothing.
    store = ModelStore(root, mode="rw", **arguments)
    if gate is not None:
        gate.wait(60)
    try:
        model = store.ensure(uri, progress=False)
        ready_at = time.monotonic()
        path = model.path.relative_to(root)
        found = hash_tree(model.path)
        got: Got | str = Got(
            node=node,
            status=model.status,
            path=path,
            bytes_fetched=model.bytes_fetched,
            ready_at=ready_at,
            digests=found,
        )
    except (StoreError, OSError) as error:
        got = f"on node {node}: {type(error).__name__}: {error}"
    except KeyboardInterrupt:
        return
    if results is not None:
        results.put(got)
        results.close()
        results.join_thread()


def ensure_with_lying_locks(*arguments: Any) -> None:
    """
    The same while every lock and claim is granted to everybody.
    """
    fcntl.flock = lambda *_: None
    fcntl.lockf = lambda *_: None
    actors._grant_every_claim()
    ensure(*arguments)


def reserve_each(root: str, numbers: Sequence[str], results: Any, gate: Any) -> None:
    """
    Reserve numbers whose directories are not there yet, each when the others do, and put what came of it into the
    queue.
    """
    writer = VolumeWriter(root)
    won, failed = [], []
    for number in map(PurePosixPath, numbers):
        gate.wait(60)
        try:
            if writer.reserve(number):
                won.append(str(number))
        except (StoreError, OSError) as error:
            failed.append(f"{type(error).__name__}: {error}")
    results.put((won, failed))
    results.close()
    results.join_thread()


def all_at_once(
    act: Callable[..., None], roots: Sequence[Path], uri: str, arguments: Mapping[str, Any], on_each: int
) -> Sequence[Got]:
    """
    Let so many processes on each node ask for one model at the same moment.
    """
    context = actors.context()
    gate, results = context.Barrier(len(roots) * on_each), context.Queue()
    where = [(node, str(root)) for node, root in enumerate(roots) for _ in range(on_each)]
    processes = [actors.start(act, node, root, uri, arguments, results, gate) for node, root in where]
    outcomes = [results.get(timeout=120) for _ in processes]
    actors.run_all(processes)
    failures = [outcome for outcome in outcomes if isinstance(outcome, str)]
    if failures:
        raise AssertionError("; ".join(failures))
    return outcomes


def examine(root: str, peer: str | None, results: Any, clock_ahead: float = 0.0) -> None:
    """
    Let a doctor examine a directory, alone or with another one, and put its diagnosis into the queue.

    No other clock can be set for one process only, so `clock_ahead` is added to what Python says the time is.
    """
    real = time.time
    time.time = lambda: real() + clock_ahead
    try:
        found: Any = diagnose(
            root, writes=True, holder=liveness.here(), peer=peer, timeout=30, sample_bytes=4 * 1024 * 1024
        )
    except (StoreError, OSError) as error:
        found = f"{type(error).__name__}: {error}"
    results.put(found)
    results.close()
    results.join_thread()


def examine_together(roots: Sequence[Path], **arguments: float) -> Sequence[Diagnosis]:
    """
    Let two doctors meet, the second with these arguments, and return what each has found.
    """
    queues = [actors.context().Queue() for _ in roots]
    second = (arguments.get("clock_ahead", 0.0),)
    more: Sequence[tuple[float, ...]] = [(), second]
    processes = [
        actors.start(examine, str(root), "here", queue, *rest)
        for root, queue, rest in zip(roots, queues, more, strict=True)
    ]
    found = [queue.get(timeout=120) for queue in queues]
    actors.run_all(processes)
    failures = [what for what in found if isinstance(what, str)]
    if failures:
        raise AssertionError("; ".join(failures))
    return found
