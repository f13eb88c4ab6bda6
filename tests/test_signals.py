"""
How a download ends before its time: SIGTERM, Ctrl-C, a cancelled task, and a volume that hangs.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import shell
from trees import read_tree
from waiting import until

from kserve_pvc import LockTimeoutError, ModelRef, ModelStore
from kserve_pvc._format import layout

FILES = {f"{number}.bin": bytes([number]) * 100_000 for number in range(12)}
SIZE = 12 * 100_000

# What a server does that is no command: SIGTERM unwinds the main thread, wherever it is.
SERVER = """
import json, signal, sys
from kserve_pvc import ModelStore

signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
root, options, uri = sys.argv[1:]
ModelStore(root, mode="rw", storage_options=json.loads(options)).ensure(uri, progress=False, max_workers=2)
"""
UNHANDLED = SERVER.replace("signal.signal", "(lambda *_: None)")


@pytest.fixture
def slow(upload, proxy):
    """
    A model that takes seconds to arrive.
    """
    uri = upload(FILES)
    proxy.limit_bytes_per_second = 400_000
    return uri


def serve(script: str, root, s3, uri) -> subprocess.Popen[str]:
    command = [sys.executable, "-I", "-c", script, str(root), json.dumps(s3["storage_options"]), uri]
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(
        command, env=shell.clean_environ(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def assert_the_rest_is_fetched(root, s3, proxy, uri) -> None:
    """
    The next call waits for nobody, and does not fetch again what had arrived.
    """
    proxy.limit_bytes_per_second = None
    model = ModelStore(root, mode="rw", **s3).ensure(uri, progress=False)
    assert read_tree(model.path) == FILES
    # Two workers had at most one file each under way.
    assert proxy.body_bytes() <= SIZE + 2 * 100_000


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["sigterm", "interrupt"])
@pytest.mark.parametrize("who", ["command", "server"])
def test_whoever_is_told_to_end_gives_the_claim_back(root, s3, slow, origin, proxy, who, number):
    """
    Row 44: the claim is free within the second that a grace period of five leaves, and the parts are used.
    """
    if who == "command":
        env = {**origin.environ, "AWS_ENDPOINT_URL": proxy.endpoint}
        process = shell.start(root, "ensure", slow, "--max-workers", "2", env=env)
    else:
        process = serve(SERVER, root, s3, slow)
    until(lambda: proxy.body_bytes() > 500_000)

    told = time.monotonic()
    process.send_signal(number)
    until(lambda: list(ModelStore(root).locks()) == [], 5)
    took = time.monotonic() - told
    process.communicate(timeout=30)

    print(f"{who}: {took * 1000:.0f} ms from {number.name} to a free claim")
    assert process.returncode in ((143,) if number == signal.SIGTERM else (130, -signal.SIGINT))
    assert_the_rest_is_fetched(root, s3, proxy, slow)


def test_a_server_without_a_handler_leaves_a_claim_that_is_seen_to_be_dead(root, s3, slow, proxy):
    """
    Row 44: Python's SIGTERM ends a process on the spot; on the same node nobody waits for its lease all the same.
    """
    process = serve(UNHANDLED, root, s3, slow)
    until(lambda: proxy.body_bytes() > 500_000)

    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    locks = [lock.state for lock in ModelStore(root).locks()]

    proxy.limit_bytes_per_second = None
    model = ModelStore(root, mode="rw", **s3).ensure(slow, timeout=1, progress=False)
    assert (process.returncode, locks) == (-signal.SIGTERM, ["dead"])
    assert read_tree(model.path) == FILES


class StoppedError(Exception):
    pass


class Cancelled:
    """
    A callback, as `ensure` takes it, that ends the call once it is told to.
    """

    def __init__(self) -> None:
        self.event = threading.Event()

    def set_size(self, size: int) -> None:
        pass

    def relative_update(self, size: int) -> None:
        if self.event.is_set():
            raise StoppedError


def test_a_cancelled_task_ends_its_thread_by_the_callback(root, s3, slow, proxy):
    """
    Row 44: cancelling `asyncio.to_thread` stops no thread; a callback that raises does, and gives the claim back.
    """
    store, stop = ModelStore(root, mode="rw", **s3), Cancelled()
    ended = threading.Event()

    def ensure() -> None:
        try:
            store.ensure(slow, progress=False, max_workers=2, callback=stop)
        except StoppedError:
            ended.set()

    async def act() -> None:
        task = asyncio.create_task(asyncio.to_thread(ensure))
        while proxy.body_bytes() < 500_000:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        stop.event.set()

    asyncio.run(act())

    assert ended.is_set()
    assert list(store.locks()) == []
    assert_the_rest_is_fetched(root, s3, proxy, slow)


def test_a_cancelled_task_that_says_nothing_finishes_its_download(root, s3, upload, proxy):
    """
    Row 44: without a callback the thread goes on and publishes, and the claim is free when the loop is closed.
    """
    uri = upload(FILES)
    store = ModelStore(root, mode="rw", **s3)

    async def act() -> None:
        task = asyncio.create_task(asyncio.to_thread(store.ensure, uri, progress=False))
        while proxy.body_bytes() < 100_000:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(act())

    assert read_tree(store.get(uri).path) == FILES
    assert list(store.locks()) == []


def test_a_fork_during_a_download_shares_nothing_with_the_child(root, s3, slow, proxy):
    """
    Row 44: a child that is forked half-way ends without touching the parent's claim or descriptors.
    """
    script = """
import json, os, sys, threading, time, warnings
from kserve_pvc import ModelStore
warnings.simplefilter("ignore")
root, options, uri = sys.argv[1:]
store = ModelStore(root, mode="rw", storage_options=json.loads(options))
results = []
thread = threading.Thread(target=lambda: results.append(store.ensure(uri, progress=False, max_workers=2).status))
thread.start()
while not ModelStore(root).locks() or not any(l.bytes_done for l in ModelStore(root).locks()) and thread.is_alive():
    time.sleep(0.01)
child = os.fork()
if not child:
    ModelStore(root, mode="rw", storage_options=json.loads(options))
    sys.exit(7)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
thread.join()
print(code, *results)
"""
    ModelStore(root, mode="rw", lease_seconds=2)
    said = shell.python(script, str(root), json.dumps(s3["storage_options"]), slow)

    assert said.split() == ["7", "downloaded"]
    assert read_tree(ModelStore(root).get(slow).path) == FILES


def test_a_beat_that_hangs_costs_the_claim_and_not_the_model(root, s3, slow, proxy, tool):
    """
    Row 20: while the volume takes seconds for a beat the holder gives up by its own clock, and another call makes the
    model.
    """
    ModelStore(root, mode="rw", lease_seconds=1)
    script = SERVER + "print('done')"
    # The second write of the heartbeat by each thread takes three leases: a renewal, and nothing else.
    beat = root / layout.claim_dir(ModelRef(uri=slow).key, 1) / "beat"
    options = [
        "-f",
        "-qq",
        "-o",
        os.devnull,
        "-e",
        "trace=pwrite64",
        "-e",
        "inject=pwrite64:delay_enter=3000000:when=2",
    ]
    command = [
        tool("strace"),
        *options,
        "-P",
        str(beat),
        sys.executable,
        "-I",
        "-c",
        script,
        str(root),
        json.dumps(s3["storage_options"]),
        slow,
    ]
    hanging = subprocess.Popen(command, env=shell.clean_environ(), stdout=subprocess.PIPE, text=True)
    until(lambda: proxy.body_bytes() > 0)
    first = ModelStore(root).locks()[0].epoch

    model = ModelStore(root, mode="rw", **s3).ensure(slow, progress=False)
    proxy.limit_bytes_per_second = None
    stdout, _ = hanging.communicate(timeout=60)

    assert (hanging.returncode, stdout) == (0, "done\n")
    assert first < max(int(path.name) for path in root.glob(".kserve-pvc/keys/*/claims/*"))
    assert read_tree(model.path) == FILES
    assert ModelStore(root).get(slow).path == model.path


def test_a_waiting_call_keeps_its_time_although_the_volume_hangs_for_the_holder(root, source, tool):
    """
    Row 20: a call gives up waiting when its time is over, whatever hangs elsewhere.
    """
    ModelStore(root, mode="rw", lease_seconds=30)
    script = (
        "import sys; from kserve_pvc import ModelStore; "
        "ModelStore(sys.argv[1], mode='rw').ensure(sys.argv[2], progress=False)"
    )
    options = ["-f", "-qq", "-o", os.devnull, "-e", "trace=linkat", "-e", "inject=linkat:delay_enter=60000000:when=1"]
    command = [tool("strace"), *options, sys.executable, "-I", "-c", script, str(root), f"file://{source}"]
    hanging = subprocess.Popen(command, start_new_session=True)
    until(lambda: ModelStore(root).locks())

    with pytest.raises(LockTimeoutError) as caught:
        ModelStore(root, mode="rw").ensure(f"file://{source}", timeout=1, progress=False)

    os.killpg(hanging.pid, signal.SIGKILL)
    hanging.wait()
    assert str(caught.value).startswith("waited 1 s for ")
