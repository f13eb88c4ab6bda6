"""
Several nodes on real volumes, with honest locks and with lying ones, watched by processes that know what is right.

`KSERVE_PVC_TEST_NODES`, `KSERVE_PVC_TEST_PER_NODE` and `KSERVE_PVC_TEST_VOLUME_ROUNDS` ask for more than the few of a
normal run, as `nox -s soak` does, and `KSERVE_PVC_TEST_LEASE_SECONDS` for a longer lease where nodes are slow.
`KSERVE_PVC_TEST_FIGURES` names a file that gets what was measured, a line of JSON for each test.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import actors
import nodes
import pytest
from auditor import Auditor, auditing
from hub import Answer, Hub, Request
from origin import CountingProxy
from shell import COMMAND, clean_environ
from shell import run as run_command
from trees import digests, model_files, read_tree, write_files
from volumes import LOCAL, MOUNTS, NETWORK, CannotStartError, SharedVolume, fresh_root
from waiting import until

from kserve_pvc import ModelInUseError, ModelStore
from kserve_pvc._volume.tree import writing_tree
from kserve_pvc._volume.writing import VolumeWriter
from kserve_pvc.kserve._contents import OURS

NODES = int(os.environ.get("KSERVE_PVC_TEST_NODES", "2"))
PER_NODE = int(os.environ.get("KSERVE_PVC_TEST_PER_NODE", "3"))
ROUNDS = int(os.environ.get("KSERVE_PVC_TEST_VOLUME_ROUNDS", "1"))
PART_BYTES = 64 * 1024
LEASE_SECONDS = float(os.environ.get("KSERVE_PVC_TEST_LEASE_SECONDS", "1.5"))

everywhere = pytest.mark.parametrize("volume", [*NETWORK, *LOCAL], indirect=True, scope="module")
between_clients = pytest.mark.parametrize("volume", [*NETWORK], indirect=True, scope="module")


@pytest.fixture(scope="module")
def volume(request: pytest.FixtureRequest) -> Iterator[SharedVolume]:
    """
    A volume with a mount for each node; skipped by name where it cannot be started.
    """
    try:
        started = {**NETWORK, **LOCAL}[request.param](NODES)
        with started as running:
            yield running
    except CannotStartError as reason:
        pytest.skip(f"{request.param}: {reason}")


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[..., None]:
    """
    Write figures down, if somebody wants them.
    """

    def write(**figures: object) -> None:
        if place := os.environ.get("KSERVE_PVC_TEST_FIGURES"):
            with open(place, "a", encoding="utf-8") as file:
                file.write(json.dumps({"test": request.node.name, **figures}) + "\n")

    return write


@pytest.fixture
def roots(volume: SharedVolume) -> Sequence[Path]:
    """
    An empty directory on the volume, as each node sees it.
    """
    return fresh_root(volume)


@everywhere
def test_a_cold_start_on_all_nodes_downloads_once(roots, s3, proxy: CountingProxy, upload, measured):
    """
    However many processes on however many nodes ask at once, all get the exact model, and the source sends each byte
    once.
    """
    files = model_files(seed=21, big=4_000_000)
    uri, size = upload(files), sum(map(len, files.values()))
    ModelStore(roots[0], mode="rw")

    with auditing(roots, {uri: digests(files)}) as reports:
        outcomes = nodes.all_at_once(nodes.ensure, roots, uri, s3, PER_NODE)
    ready, statuses = sorted(got.ready_at for got in outcomes), Counter(got.status for got in outcomes)
    measured(
        processes=len(outcomes),
        nodes=NODES,
        times_sent=proxy.body_bytes() / size,
        last_after_first_seconds=ready[-1] - ready[0],
    )

    assert statuses["downloaded"] == 1
    assert set(statuses) <= {"downloaded", "waited", "present"}  # `present` for those that were slow to ask.
    assert {got.path for got in outcomes} == {outcomes[0].path}
    assert all(got.digests == digests(files) for got in outcomes)
    assert proxy.body_bytes() == size
    assert len(seen_without_a_flaw(reports)) == 1


@everywhere
def test_numbers_in_directories_that_all_nodes_make_at_once(roots):
    """
    Each number is reserved by one process and refused to the others, though no directory above it was there a moment
    ago.
    """
    numbers = [f".kserve-pvc/keys/model-{number:016x}/claims/000000000001" for number in range(100)]
    context = actors.context()
    gate, results = context.Barrier(len(roots) * 8), context.Queue()

    processes = [
        actors.start(nodes.reserve_each, str(root), numbers, results, gate) for root in roots for _ in range(8)
    ]
    outcomes = [results.get(timeout=120) for _ in processes]
    actors.run_all(processes)

    assert [failed for _, failures in outcomes for failed in failures] == []
    assert sorted(number for won, _ in outcomes for number in won) == numbers


@between_clients
def test_who_asked_too_early_sees_the_model_when_it_is_there(roots, source, measured):
    """
    A read-only process that was told "absent" on its node is told "present" soon after another node has published.
    """
    uri, here, there = f"file://{source}", ModelStore(roots[0], mode="rw"), ModelStore(roots[1])
    was_there = uri in there

    here.ensure(uri, progress=False)
    published_at = time.monotonic()
    until(lambda: uri in there, 15)
    measured(seconds_until_seen=time.monotonic() - published_at)

    assert not was_there
    assert digests(read_tree(there.get(uri).path)) == digests(model_files(seed=1))


HIT = """
import os, sys
from kserve_pvc import ModelStore
root, uri = sys.argv[1:]
store = ModelStore(root, mode="rw")
os.path.exists("/begin")
model = store.ensure(uri)
os.path.exists("/end")
assert model.status == "present"
"""


@everywhere
def test_a_warm_ensure_lists_once_and_reads_once(roots, source, tool, tmp_path, measured):
    """
    On a node that never saw the model, a hit lists the log, reads the newest record, and writes nothing. Directories on
    the way are opened one after the other, by name only.
    """
    uri, log = f"file://{source}", tmp_path / "trace"
    ModelStore(roots[0], mode="rw").ensure(uri, progress=False)
    tracing = [tool("strace"), "-f", "-y", "-qq", "-o", str(log), "-e", "trace=%file,%desc"]

    subprocess.run([*tracing, sys.executable, "-I", "-c", HIT, str(roots[-1]), uri], check=True, timeout=120)

    calls = calls_on(roots[-1], log.read_text())
    measured(calls=calls)
    assert (calls.pop("getdents64"), calls.pop("read")) == (2, 1)
    assert calls == {"openat": 13, "newfstatat": 3, "readlinkat": 1, "fcntl": 3, "lseek": 1, "close": 14}


def calls_on(root: Path, trace: str) -> dict[str, int]:
    """
    Count the system calls between the two marks that name the root or something below it.
    """
    between = trace.partition('"/begin"')[2].partition('"/end"')[0]
    lines = [line for line in between.splitlines() if str(root) in line]
    return dict(Counter(re.sub(r"^\d+\s+", "", line).partition("(")[0] for line in lines))


@between_clients
@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGINT], ids=["killed", "stopped"])
def test_another_node_takes_over(roots, s3, proxy: CountingProxy, upload, measured, signal_):
    """
    A killed downloader is replaced by another node after its lease, a stopped one at once; the parts it wrote are kept.
    """
    files = {"weights.bin": model_files(seed=22, big=4_000_000)["weights/a.bin"], "config.json": b"{}"}
    uri, size, arguments = upload(files), sum(map(len, files.values())), {**s3, "part_bytes": PART_BYTES}
    ModelStore(roots[0], mode="rw", lease_seconds=LEASE_SECONDS)
    proxy.limit_bytes_per_second = 1_500_000
    results = actors.context().Queue()

    with auditing(roots, {uri: digests(files)}) as reports:
        first = actors.start(nodes.ensure, 0, str(roots[0]), uri, arguments)
        until(lambda: proxy.body_bytes() > 500_000)
        second = actors.start(nodes.ensure, 1, str(roots[1]), uri, arguments, results)
        until(lambda: proxy.body_bytes() > 2_500_000)
        proxy.limit_bytes_per_second = None
        assert first.pid is not None
        os.kill(first.pid, signal_)
        first.join()
        ended_at = time.monotonic()
        until(lambda: all(request.ended_at is not None for request in proxy.requests))
        sent = proxy.body_bytes()
        # What a killed process had asked for may arrive after its end; one that was stopped has heard all its answers.
        stragglers = len(proxy.requests) if signal_ == signal.SIGKILL else 0
        got = results.get(timeout=60)
        actors.run_all([second])
    began_at = min(request.started_at for request in proxy.requests[stragglers:] if request.started_at > ended_at)
    again = sent + got.bytes_fetched - size
    measured(seconds_until_taken_over=began_at - ended_at, lease_seconds=LEASE_SECONDS, bytes_fetched_again=again)

    assert (got.status, got.digests) == ("downloaded", digests(files))
    assert got.bytes_fetched <= proxy.body_bytes() - sent
    assert got.bytes_fetched < size - 1_000_000
    assert len(seen_without_a_flaw(reports)) == 1


@pytest.mark.timeout(3600)
@between_clients
def test_a_paused_writer_comes_back_to_nothing(roots, s3, proxy: CountingProxy, upload):
    """
    A writer that was paused past its lease finds the model published by another node; who hashes all along sees no
    wrong byte.
    """
    for number in range(ROUNDS):
        files = model_files(seed=30 + number, big=3_000_000)
        uri = f"{upload({f'{number}/{name}': data for name, data in files.items()})}/{number}"
        root = roots[0] / str(number)
        root.mkdir()
        here = [place / str(number) for place in roots]
        until(lambda here=here: all(place.name in os.listdir(place.parent) for place in here))
        _pause_and_take_over(here, s3, proxy, uri, digests(files))


def _pause_and_take_over(
    roots: Sequence[Path], s3: dict[str, object], proxy: CountingProxy, uri: str, expected: dict[str, str]
) -> None:
    ModelStore(roots[0], mode="rw", lease_seconds=LEASE_SECONDS)
    results, before = actors.context().Queue(), proxy.body_bytes()
    proxy.limit_bytes_per_second = 2_000_000
    with auditing(roots, {uri: expected}) as reports:
        paused = actors.start(nodes.ensure, 0, str(roots[0]), uri, s3, results)
        assert paused.pid is not None
        until(lambda: proxy.body_bytes() > before + 500_000)
        os.kill(paused.pid, signal.SIGSTOP)
        proxy.limit_bytes_per_second = None
        second = actors.start(nodes.ensure, 1, str(roots[1]), uri, s3, results)
        taker = results.get(timeout=60)
        os.kill(paused.pid, signal.SIGCONT)
        late = results.get(timeout=60)
        actors.run_all([paused, second])

    assert (taker.node, taker.status, taker.digests) == (1, "downloaded", expected)
    assert (late.node, late.status, late.digests, late.path) == (0, "waited", expected, taker.path)
    assert len(seen_without_a_flaw(reports)) == 1


@pytest.mark.timeout(3600)
@everywhere
def test_with_all_locks_lying_nobody_sees_a_mix(roots, source, tmp_path):
    """
    With every lock and claim granted to everybody, what writers on all nodes get and leave is exact.
    """
    files = model_files(seed=23)
    sources = [tmp_path / f"round-{number}" for number in range(ROUNDS)]
    for place in sources:
        write_files(place, files)
    ModelStore(roots[0], mode="rw", locker="flock", lease_seconds=5)

    with auditing(roots, {f"file://{place}": digests(files) for place in sources}) as reports:
        returned: set[str] = set()
        for place in sources:
            outcomes = nodes.all_at_once(nodes.ensure_with_lying_locks, roots, f"file://{place}", {}, 4)
            paths = {got.path for got in outcomes}
            assert all(got.digests == digests(files) for got in outcomes)
            assert [got.status for got in outcomes].count("downloaded") == len(paths)
            # A writer that stands still for a second between its number and its record may be followed by another one.
            assert all(digests(read_tree(root / path)) == digests(files) for root in roots for path in paths)
            returned |= {path.name for path in paths}

    assert seen_without_a_flaw(reports) <= returned


@pytest.mark.timeout(
    300
)  # A server of NFS that was just started answers no lock for 90 s, which is waited for up to a lease.
@between_clients
def test_an_init_container_goes_on_where_one_on_another_node_was_killed(roots):
    """
    Without a store, in a directory of the volume: a model of the hub is there exactly, and after that nobody asks for
    its bytes.
    """
    files = {f"part-{number:02}.safetensors": os.urandom(200_000) for number in range(20)} | {"config.json": b"{}"}
    places = [root / "served" for root in roots]
    go_on = threading.Event()
    with Hub() as hub:
        hub.push("team/model", files)
        environ = {
            "HF_ENDPOINT": hub.endpoint,
            "KSERVE_PVC_ALLOW_PRIVATE_ADDRESSES": "1",
            "KSERVE_PVC_LEASE_SECONDS": str(LEASE_SECONDS),
        }
        command = [*COMMAND, "initialize", "hf://team/model"]

        def hold_back(request: Request, answer: Answer) -> None:
            if len(hub.asked("storage")) > 10:
                go_on.wait(120)

        hub.meddle = hold_back
        first = subprocess.Popen([*command, str(places[0])], env=clean_environ(environ), stderr=subprocess.DEVNULL)
        until(lambda: len(hub.asked("storage")) > 10, 120)
        first.kill()
        first.wait()
        go_on.set()
        second = run_command([*command, str(places[1])], env=environ)
        sent = len(hub.asked("storage"))
        third = run_command([*command, str(places[0])], env=environ)

    assert second.returncode == third.returncode == 0, (second.stderr, third.stderr)
    assert first.returncode == -signal.SIGKILL
    assert len(hub.asked("storage")) == sent
    for place in places:
        assert {name: data for name, data in read_tree(place).items() if not name.startswith(str(OURS))} == files


@pytest.mark.timeout(900)  # A removal waits until every node sees it, which takes minutes on NFS.
@between_clients
def test_a_model_that_another_node_reads_is_not_removed(roots, source):
    """
    While a node holds a model open, another one cannot remove it; afterwards it can, and it is gone for both.
    """
    files = model_files(seed=1)
    uri = f"file://{source}"
    here, there = ModelStore(roots[0], mode="rw", lease_seconds=2), ModelStore(roots[1], mode="rw")
    here.ensure(uri, progress=False)

    with auditing(roots, {uri: digests(files)}) as reports:
        with there.open(uri), pytest.raises(ModelInUseError):
            here.remove(uri, trash_seconds=0)
        kept = [uri in store for store in (here, there)]
        here.remove(uri, trash_seconds=0)
    left = [uri in store for store in (here, there)]

    assert (kept, left) == ([True, True], [False, False])
    assert list((roots[1] / "models").rglob("*.bin")) == []
    assert len(seen_without_a_flaw(reports)) == 1


def add_a_file(model: Path, record: Path) -> None:
    (model / "stranger").write_bytes(b"")


def change_a_byte(model: Path, record: Path) -> None:
    (model / "weights" / "a.bin").chmod(0o600)
    with (model / "weights" / "a.bin").open("r+b") as file:
        file.write(b"\0")


def lose_a_file(model: Path, record: Path) -> None:
    (model / "empty").unlink()


def rewrite_the_record(model: Path, record: Path) -> None:
    body = json.loads(record.read_text()) | {"version": "another"}
    del body["checksum"]
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    record.write_text(json.dumps({**body, "checksum": hashlib.sha256(text.encode()).hexdigest()}))


def take_the_record_away(model: Path, record: Path) -> None:
    record.unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (add_a_file, "wrong, missing or too many: stranger"),
        (change_a_byte, "wrong, missing or too many: weights/a.bin"),
        (lose_a_file, "wrong, missing or too many: empty"),
        (rewrite_the_record, "000000000001.commit of KEY was changed"),
        (take_the_record_away, "all records of KEY are gone"),
    ],
)
def test_an_auditor_sees_every_kind_of_damage(root, source, damage, said):
    """
    Who watches a store reports what is changed, missing, added, rewritten or taken back after a commit.
    """
    model = ModelStore(root, mode="rw").ensure(f"file://{source}", progress=False)
    log = root / ".kserve-pvc" / "keys" / model.key / "log"
    auditor = Auditor(root, {model.uri: digests(model_files(seed=1))}, settling_seconds=0.1)

    auditor.look()
    before = list(auditor.violations)
    damage(model.path, log / "000000000001.commit")
    auditor.look()

    assert before == []
    assert len(auditor.violations) == 1
    assert auditor.violations[0].endswith(said.replace("KEY", model.key))


STARTED = """
import os, sys, time
sys.path += sys.argv[2:]
from volumes import LOCAL, NETWORK
with {**NETWORK, **LOCAL}[sys.argv[1]](2) as volume:
    print(volume.mounts[0].parent, flush=True)
    time.sleep(600)
"""


@everywhere
def test_a_volume_that_refuses_another_name_for_a_file_is_not_full(roots):
    """
    A file that cannot get a second, or a hundredth, name is left to be copied, whatever the volume calls that.
    """
    writer, one, two = VolumeWriter(roots[0]), PurePosixPath("models/one"), PurePosixPath("models/two")
    with writing_tree(writer, one) as tree:
        tree.finish(tree.create(PurePosixPath("file")), PurePosixPath("file"), is_large=True)

    with writing_tree(writer, two) as tree:
        linked = {f"{number}" for number in range(100) if tree.link(one / "file", PurePosixPath(f"{number}"))}

    assert set(os.listdir(roots[-1] / two)) == linked


@pytest.mark.skipif(MOUNTS in os.environ, reason="the volume was mounted by somebody else")
@between_clients
def test_nothing_stays_mounted_when_the_tests_are_killed(volume):
    """
    A volume whose owner was killed is unmounted, and its servers end.
    """
    command = [sys.executable, "-I", "-c", STARTED, volume.name, *sys.path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        place = owner.stdout.readline().strip()
        owner.kill()

    until(lambda: place not in Path("/proc/mounts").read_text(), 30)
    until(lambda: not processes_of(place), 30)
    shutil.rmtree(place)


def processes_of(place: str) -> Sequence[str]:
    """
    The command lines that name a directory.
    """
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            found.append((process / "cmdline").read_text().replace("\0", " "))
    return [command for command in found if place in command]


def seen_without_a_flaw(reports: Sequence[dict[str, Any]]) -> set[str]:
    """
    The generations that auditors hashed; every one of them has found models, and nothing wrong.
    """
    assert [report["violations"] for report in reports] == [[]] * len(reports)
    assert all(report["models_hashed"] for report in reports)
    return {name for report in reports for names in report["generations"].values() for name in names}
