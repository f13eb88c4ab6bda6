"""
Servers that load models from an event loop: cancelled tasks, and SIGTERM, while the source is silent.
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time

import pytest
import shell
from silence import SilentProxy
from trees import read_tree
from waiting import until

from kserve_pvc import DownloadCancelledError, ModelStore

FILES = {f"{number}.bin": bytes([number]) * 100_000 for number in range(8)}
SIZE = 8 * 100_000
# The promise is a second; a busy machine is given some more.
SOON = 1.5


def is_last_file(target: str) -> bool:
    return "/7.bin" in target


@pytest.fixture
def silent(origin):
    """
    A proxy in front of a real S3 server that falls silent at the last file.
    """
    with SilentProxy(origin.endpoint, at=is_last_file) as proxy:
        yield proxy


@pytest.fixture
def options(silent, origin):
    """
    How a store reaches the server through the proxy.
    """
    return {"endpoint_url": silent.endpoint, "key": origin.key, "secret": origin.secret}


async def load(store, uri, **arguments):
    """
    As the how-to page has it.
    """
    cancel = threading.Event()
    try:
        return await asyncio.to_thread(store.ensure, uri, cancel=cancel, progress=False, **arguments)
    finally:
        cancel.set()


async def fall_silent(silent) -> None:
    while not silent.silenced.is_set():
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.3)


def test_a_cancelled_task_releases_its_claim(root, upload, silent, options):
    """
    The claim of a cancelled task is free within a second, although its source is silent, and what it has is kept.
    """
    uri, store = upload(FILES), ModelStore(root, mode="rw", storage_options=options)

    async def act() -> float:
        task = asyncio.create_task(load(store, uri))
        await fall_silent(silent)
        began = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while store.locks():
            await asyncio.sleep(0.01)
        return time.monotonic() - began

    took = asyncio.run(act())

    silent.speak()
    before = silent.body_bytes()
    model = store.ensure(uri, progress=False)
    assert took < SOON
    assert read_tree(model.path) == FILES
    assert silent.body_bytes() - before <= SIZE / 2


def test_a_timeout_of_asyncio_is_a_cancellation(root, upload, silent, options):
    """
    `asyncio.timeout` limits a whole call, and the loop is closed soon after it.
    """
    uri, store = upload(FILES), ModelStore(root, mode="rw", storage_options=options)

    async def act() -> None:
        async with asyncio.timeout(1):
            await load(store, uri)

    began = time.monotonic()
    with pytest.raises(TimeoutError):
        asyncio.run(act())

    assert time.monotonic() - began < 1 + SOON
    assert store.locks() == []


def test_one_task_of_several_is_cancelled(root, upload, silent, options):
    """
    Of two tasks that wait for one model the cancelled one ends, and the other one gets the model.
    """
    uri, store = upload(FILES), ModelStore(root, mode="rw", storage_options=options, stall_seconds=1)

    async def act():
        first = asyncio.create_task(load(store, uri))
        await fall_silent(silent)
        second = asyncio.create_task(load(store, uri))
        await asyncio.sleep(0.2)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        silent.speak()
        return await first

    model = asyncio.run(act())

    assert (model.status, read_tree(model.path)) == ("downloaded", FILES)


def test_the_loop_is_not_held_up(root, upload, silent, options):
    """
    The event loop goes on while a model is loaded and while its task is cancelled.
    """
    uri, store, gaps = upload(FILES), ModelStore(root, mode="rw", storage_options=options), []

    async def tick() -> None:
        while True:
            began = time.monotonic()
            await asyncio.sleep(0.01)
            gaps.append(time.monotonic() - began)

    async def act() -> None:
        ticking = asyncio.create_task(tick())
        task = asyncio.create_task(load(store, uri))
        await fall_silent(silent)
        task.cancel()
        await asyncio.sleep(1.0)
        ticking.cancel()

    asyncio.run(act())

    assert len(gaps) > 50
    assert max(gaps) < 0.5


def test_the_thread_of_a_cancelled_task_says_that_it_was_cancelled(root, upload, silent, options):
    """
    What runs in the thread ends with `DownloadCancelledError`, for a caller that looks.
    """
    uri, store, cancel = upload(FILES), ModelStore(root, mode="rw", storage_options=options), threading.Event()

    async def act() -> None:
        task = asyncio.create_task(asyncio.to_thread(store.ensure, uri, cancel=cancel, progress=False))
        await fall_silent(silent)
        cancel.set()
        await task

    with pytest.raises(DownloadCancelledError):
        asyncio.run(act())


# Servers, as the how-to pages have them: one whose loop is told, and one whose main thread is.
ASYNCIO_SERVER = """
import asyncio, json, signal, sys, threading
from kserve_pvc import ModelStore

root, options, uri = sys.argv[1:]
store = ModelStore(root, mode="rw", storage_options=json.loads(options))

async def load(uri):
    cancel = threading.Event()
    try:
        return await asyncio.to_thread(store.ensure, uri, cancel=cancel, progress=False)
    finally:
        cancel.set()

async def main():
    task = asyncio.create_task(load(uri))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        sys.exit(143)

asyncio.run(main())
"""
PLAIN_SERVER = """
import json, signal, sys
from kserve_pvc import ModelStore

signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
root, options, uri = sys.argv[1:]
ModelStore(root, mode="rw", storage_options=json.loads(options)).ensure(uri, progress=False)
"""
CHAINED_SERVER = """
import json, signal, sys, threading
from kserve_pvc import DownloadCancelledError, ModelStore

cancel = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: cancel.set())
root, options, uri = sys.argv[1:]
try:
    ModelStore(root, mode="rw", storage_options=json.loads(options)).ensure(uri, progress=False, cancel=cancel)
except DownloadCancelledError:
    sys.exit(143)
"""


@pytest.mark.parametrize("script", [ASYNCIO_SERVER, PLAIN_SERVER, CHAINED_SERVER], ids=["asyncio", "exit", "event"])
def test_a_terminated_server_releases_its_claim(root, upload, silent, options, script):
    """
    A real process with a silent source is told to end: its claim is free within a second, and it ends.
    """
    uri = upload(FILES)
    command = [sys.executable, "-I", "-c", script, str(root), json.dumps(options), uri]
    server = subprocess.Popen(command, env=shell.clean_environ(), stderr=subprocess.PIPE, text=True)
    assert silent.silenced.wait(60)
    until(lambda: ModelStore(root).locks())
    time.sleep(0.3)

    began = time.monotonic()
    server.send_signal(signal.SIGTERM)
    until(lambda: not ModelStore(root).locks())
    took = time.monotonic() - began
    _, stderr = server.communicate(timeout=30)

    assert (server.returncode, took < SOON) == (143, True), (took, stderr)
    silent.speak()
    before = silent.body_bytes()
    assert read_tree(ModelStore(root, mode="rw", storage_options=options).ensure(uri, progress=False).path) == FILES
    assert silent.body_bytes() - before <= SIZE / 2
