"""
What child processes of the tests do. A module of its own, because a child must be able to import it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

from kserve_pvc import ModelStore, StoreError

# What a download loads only when it needs it.
_LOADED = (
    *(
        "kserve_pvc.backends.s3",
        "kserve_pvc.backends.file",
        "kserve_pvc._download.download",
        "kserve_pvc._download.attempt",
    ),
    *(
        "kserve_pvc._show.observing",
        "kserve_pvc._show.progress",
        "kserve_pvc._volume.profile",
        "kserve_pvc.locks.flock",
        "kserve_pvc.locks.lease",
        "portalocker",
    ),
)


def context() -> ForkServerContext:
    """
    Children are forked from a clean server that has imported everything, so that hundreds of them are cheap.
    """
    children = multiprocessing.get_context("forkserver")
    children.set_forkserver_preload(["actors", *_LOADED])
    return children


def start(act: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    """
    Run one of the actors below in a process of its own.
    """
    process = context().Process(target=_play, args=(act, *arguments), daemon=True)
    process.start()
    return process


def _play(act: Callable[..., None], *arguments: Any) -> None:
    # Whoever is started by what a shell runs in the background, tests too, would not hear interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    act(*arguments)


def run_all(processes: list[ForkServerProcess], timeout: float = 120) -> list[int | None]:
    """
    Wait for all of them and return their exit codes.
    """
    for process in processes:
        process.join(timeout)
    return [process.exitcode for process in processes]


def ensure(
    root: str, uri: str, arguments: Mapping[str, Any], options: Mapping[str, Any], results: Any = None, gate: Any = None
) -> None:
    """
    Ask for a model read-write, when the gate opens, and put what came of it into the queue.
    """
    store = ModelStore(root, mode="rw", **arguments)
    if gate is not None:
        gate.wait()
    try:
        model = store.ensure(uri, progress=False, **options)
    except StoreError as error:
        outcome: tuple[Any, ...] = ("error", error, 0, 0.0)
    else:
        outcome = (model.status, str(model.path), model.bytes_fetched, model.seconds)
    if results is not None:
        results.put((os.getpid(), *outcome))
        results.close()
        results.join_thread()


def with_environ(environ: Mapping[str, str], act: Callable[..., None], *arguments: Any) -> None:
    """
    Do something with these variables, which the server that children are forked from does not have.
    """
    os.environ.update(environ)
    act(*arguments)


def watch(root: str, expected: Mapping[str, str], gate: Any, stop: Any, results: Any) -> None:
    """
    Read models as soon as they are visible, as a read-only server does, and report every mix.
    """
    from hashlib import sha256

    store = ModelStore(root)
    gate.wait()
    read: set[str] = set()
    wrong = []
    while not stop.is_set():
        for model in store.list():
            if model.key in read:
                continue
            found = {
                p.relative_to(model.path).as_posix(): sha256(p.read_bytes()).hexdigest()
                for p in model.path.rglob("*")
                if p.is_file()
            }
            read.add(model.key)
            if found != expected:
                wrong.append((str(model.path), found))
    results.put((len(read), wrong))
    results.close()
    results.join_thread()


def ensure_with_lying_locks(*arguments: Any) -> None:
    """
    Ask for a model while every lock and claim says "granted" to everybody.
    """
    import fcntl

    fcntl.flock = lambda *_: None
    fcntl.lockf = lambda *_: None
    _grant_every_claim()
    ensure(*arguments)


def _grant_every_claim() -> None:
    """
    Making a claim's directory always wins, and its files are written whoever has written them before.
    """
    from pathlib import PurePosixPath

    from kserve_pvc._volume import writing
    from kserve_pvc._volume.calls import CREATE_FLAGS
    from kserve_pvc._volume.reading import open_part
    from kserve_pvc._volume.writing import VolumeWriter

    honest_reserve, honest_create = VolumeWriter.reserve, writing.create_file_at

    def reserve(self: VolumeWriter, place: PurePosixPath, *, is_durable: bool = True) -> bool:
        return honest_reserve(self, place, is_durable=is_durable) or place.parent.name == "claims"

    def create(parent: int, place: PurePosixPath, mode: int) -> int:
        if place.name in ("owner", "beat", "held"):
            return open_part(parent, place, CREATE_FLAGS & ~os.O_EXCL, mode)
        return honest_create(parent, place, mode)

    VolumeWriter.reserve = reserve  # type: ignore[method-assign]
    writing.create_file_at = create
