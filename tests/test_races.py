"""
Real processes on one store: started together, killed at random, and with every lock lying.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import actors
import pytest
from origin import CountingProxy
from trees import digests, model_files, read_tree, write_files

from kserve_pvc import ModelStore

WRITERS = 8
PART_BYTES = 64 * 1024
# `nox -s soak` asks for many more, each of which costs processes, a part of a download or a lease.
KILLS = int(os.environ.get("KSERVE_PVC_TEST_KILLS", "90"))
ROUNDS = int(os.environ.get("KSERVE_PVC_TEST_ROUNDS", "20"))
PAUSES = int(os.environ.get("KSERVE_PVC_TEST_PAUSES", "5"))


def race(
    root: Path, uri: str, arguments: dict[str, Any], writers: int, act: Any = actors.ensure
) -> list[tuple[Any, ...]]:
    """
    Let several processes ask for one model at the same moment.
    """
    context = actors.context()
    gate, results = context.Barrier(writers), context.Queue()
    processes = [actors.start(act, str(root), uri, arguments, {}, results, gate) for _ in range(writers)]
    outcomes = [results.get(timeout=120) for _ in processes]
    actors.run_all(processes)
    return outcomes


@pytest.mark.parametrize("locker", ["lease", "flock"])
def test_the_source_sends_each_byte_once(root, s3, proxy: CountingProxy, upload, locker):
    """
    However many processes ask at once, one downloads, the others wait, and nothing is sent twice.
    """
    files = model_files(seed=3, big=5_000_000)
    uri = upload(files)
    ModelStore(root, mode="rw", locker=locker)

    outcomes = race(root, uri, s3, WRITERS)

    assert sorted(outcome[1] for outcome in outcomes) == ["downloaded"] + ["waited"] * (WRITERS - 1)
    assert len({outcome[2] for outcome in outcomes}) == 1
    assert proxy.body_bytes() == sum(map(len, files.values()))
    assert read_tree(ModelStore(root).get(uri).path) == files


def test_threads_share_one_download(root, s3, proxy: CountingProxy, upload):
    """
    Threads of one process, even of different stores, download once.
    """
    from concurrent.futures import ThreadPoolExecutor

    files = model_files(seed=4, big=2_000_000)
    uri = upload(files)
    stores = [ModelStore(root, mode="rw", **s3) for _ in range(2)]

    with ThreadPoolExecutor(8) as pool:
        models = list(pool.map(lambda number: stores[number % 2].ensure(uri, progress=False), range(8)))

    assert sorted(model.status for model in models).count("downloaded") == 1
    assert {model.status for model in models} <= {"downloaded", "waited", "present"}
    assert proxy.body_bytes() == sum(map(len, files.values()))


@pytest.mark.timeout(3600)
def test_with_all_locks_lying_exactly_one_generation_is_visible(root, source, tmp_path):
    """
    With flock, lockf and every claim granted to everybody, 16 writers leave one exact model, and no reader sees a mix.
    """
    files = read_tree(source)
    ModelStore(root, mode="rw", locker="flock", lease_seconds=5)
    context = actors.context()
    gate, stop, watched = context.Event(), context.Event(), context.Queue()
    readers = [actors.start(actors.watch, str(root), digests(files), gate, stop, watched) for _ in range(2)]
    gate.set()

    downloads = 0
    for number in range(ROUNDS):
        write_files(tmp_path / f"round-{number}", files)
        uri = f"file://{tmp_path}/round-{number}"
        outcomes = race(root, uri, {}, 16, actors.ensure_with_lying_locks)
        assert [outcome for outcome in outcomes if outcome[1] not in ("downloaded", "waited", "present")] == []
        assert len({outcome[2] for outcome in outcomes}) == 1
        downloads += sum(outcome[1] == "downloaded" for outcome in outcomes)
        model = ModelStore(root).get(uri)
        assert read_tree(model.path) == files
        assert [path.name for path in model.path.parent.iterdir()] == [model.path.name]
    stop.set()
    reports = [watched.get(timeout=60) for _ in readers]
    actors.run_all(readers)

    print(f"{ROUNDS} rounds, {downloads} downloads, {sum(seen for seen, _ in reports)} models read meanwhile")
    assert downloads == ROUNDS
    assert all(seen > ROUNDS / 2 for seen, _ in reports)
    assert [wrong for _, wrong in reports] == [[], []]


@pytest.mark.timeout(7200)
def test_kill_9_at_random_moments_never_publishes_a_wrong_model(root, s3, proxy: CountingProxy, upload):
    """
    After each kill the model is absent or exact, and each kill costs at most one part per stream.

    Every tenth child is left to finish, so however fast the machine is, kills hit fresh downloads and resumed ones.
    """
    files = model_files(seed=5, big=1_500_000)
    uri, expected, size = upload(files), digests(files), sum(map(len, files.values()))
    arguments = {**s3, "part_bytes": PART_BYTES}
    store = ModelStore(root, mode="rw", **arguments)
    moments, kills, kills_here, commits, worst = random.Random(6), 0, 0, 0, 0
    longest = _seconds_of_one(root, uri, arguments)
    before = proxy.body_bytes()

    for number in range(KILLS * 10 // 9):
        child = actors.start(actors.ensure, str(root), uri, arguments, {"max_workers": 2})
        if number % 10 < 9:
            child.join(moments.uniform(0, longest))
            child.kill()
        child.join()
        kills_here += child.exitcode != 0
        if uri in ModelStore(root):
            assert digests(read_tree(ModelStore(root).get(uri).path)) == expected
            worst = max(worst, _refetched(proxy.body_bytes() - before, size, kills_here))
            store.remove(uri, trash_seconds=0)
            before, kills, kills_here, commits = proxy.body_bytes(), kills + kills_here, 0, commits + 1

    print(f"{kills + kills_here} kills, {commits} models published, at most {worst} bytes fetched again for each kill")
    assert commits >= KILLS // 9
    assert kills > KILLS / 2
    # Files that are smaller than a part count as one more together, as `how-to/resume` says.
    assert worst <= PART_BYTES * 2 + sum(len(data) for data in files.values() if len(data) < PART_BYTES)
    store.ensure(uri, progress=False)
    assert store.verify(uri, "full").ok
    # The record of a collection that was killed lies there until it is swept, after a day.
    left = (path.name for path in (root / ".kserve-pvc" / "staging").iterdir())
    assert [name for name in left if not name.startswith("discard-")] == []


def _seconds_of_one(root: Path, uri: str, arguments: dict[str, Any]) -> float:
    took = 0.0
    for _ in range(2):  # The first one also starts the server that children are forked from.
        started = time.monotonic()
        actors.run_all([actors.start(actors.ensure, str(root), uri, arguments, {"max_workers": 2})])
        took = time.monotonic() - started
        ModelStore(root, mode="rw").remove(uri, trash_seconds=0)
    return took


def _refetched(sent: int, size: int, kills: int) -> int:
    """
    Bytes that each kill cost on average, rounded up.
    """
    return -(-(sent - size) // max(kills, 1))


def test_a_dead_writers_parts_are_taken_over(root, s3, proxy: CountingProxy, upload):
    """
    After a kill half-way the next process fetches only what is missing, at most one part more.
    """
    files = {"weights.bin": random.Random(7).randbytes(4_000_000)}
    uri = upload(files)
    proxy.limit_bytes_per_second = 4_000_000
    child = actors.start(actors.ensure, str(root), uri, {**s3, "part_bytes": PART_BYTES}, {})
    while proxy.body_bytes() < 2_000_000:
        time.sleep(0.01)
    child.kill()
    child.join()
    proxy.limit_bytes_per_second = None
    store = ModelStore(root, mode="rw", part_bytes=PART_BYTES, **s3)
    planned = store.plan(uri)
    time.sleep(0.2)
    before = proxy.body_bytes()

    model = store.ensure(uri, progress=False)

    assert model.status == "downloaded"
    assert model.bytes_fetched == planned.bytes_to_fetch == proxy.body_bytes() - before
    assert before + model.bytes_fetched <= 4_000_000 + PART_BYTES + 1024 * 1024
    assert store.verify(uri, "full").ok


def test_a_stopped_writer_is_taken_over_and_comes_back_to_nothing(root, s3, proxy: CountingProxy, upload):
    """
    A writer that was paused past its lease finds the model published by another, and changes nothing.
    """
    import signal

    files = model_files(seed=8, big=3_000_000)
    uri = upload(files)
    proxy.limit_bytes_per_second = 2_000_000
    ModelStore(root, mode="rw", lease_seconds=1)
    results = actors.context().Queue()
    paused = actors.start(actors.ensure, str(root), uri, s3, {}, results)
    while proxy.body_bytes() < 500_000:
        time.sleep(0.01)
    os.kill(paused.pid, signal.SIGSTOP)
    proxy.limit_bytes_per_second = None

    started = time.monotonic()
    model = ModelStore(root, mode="rw", **s3).ensure(uri, progress=False)
    took = time.monotonic() - started
    os.kill(paused.pid, signal.SIGCONT)
    outcome = results.get(timeout=60)
    paused.join()

    assert model.status == "downloaded"
    assert took >= 1
    assert outcome[1:3] == ("waited", str(model.path))
    assert read_tree(model.path) == files
    assert [path.name for path in model.path.parent.iterdir()] == [model.path.name]


@pytest.mark.timeout(3600)
def test_stopped_writers_that_come_back_at_any_moment_change_nothing(root, s3, proxy: CountingProxy, upload):
    """
    Writers are stopped at random moments and come back after others have published, while what is there is hashed.
    """
    import signal

    uris = [upload(model_files(seed=20 + number, big=1_500_000)) for number in range(4)]
    trees = {uri: model_files(seed=20 + number, big=1_500_000) for number, uri in enumerate(uris)}
    ModelStore(root, mode="rw", lease_seconds=1)
    store = ModelStore(root, mode="rw", **s3)
    moments, overtaken, late = random.Random(7), 0, 0

    for number in range(PAUSES):
        uri = uris[number % 4]
        if uri in store:
            store.remove(uri, trash_seconds=0)
        proxy.limit_bytes_per_second = 4_000_000
        results = actors.context().Queue()
        paused = actors.start(actors.ensure, str(root), uri, s3, {}, results)
        _wait_for_claim(root)
        time.sleep(moments.uniform(0, 0.45))
        os.kill(paused.pid, signal.SIGSTOP)
        proxy.limit_bytes_per_second = None
        model = store.ensure(uri, progress=False)
        os.kill(paused.pid, signal.SIGCONT)
        while paused.is_alive():
            assert read_tree(model.path) == trees[uri]
        outcome = results.get(timeout=60)
        assert outcome[1] in ("downloaded", "waited"), outcome
        assert ModelStore(root).get(uri).path == model.path
        overtaken += model.status == "downloaded"
        late += model.status == outcome[1] == "downloaded"
        assert [path.name for path in model.path.parent.iterdir()] == [model.path.name]

    print(f"{PAUSES} pauses, {overtaken} writers overtaken")
    assert overtaken >= PAUSES / 2
    assert late == 0
    assert all(store.verify(uri, "full").ok for uri in uris if uri in store)


def _wait_for_claim(root: Path) -> None:
    while not ModelStore(root).locks():
        time.sleep(0.005)
