"""
Removing what others read, download, or have left behind.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from threading import Event, Thread, Timer

import attrs
import pytest
from memory import MemorySource

from kserve_pvc import ModelInUseError, ModelNotFoundError, ModelStore
from kserve_pvc._format import layout
from kserve_pvc._format.records import Beat, ReaderLease, encode, encode_beat
from kserve_pvc._keys.claims import READER_LEASES, Readers
from kserve_pvc._keys.log import read_all
from kserve_pvc._volume.reading import Volume
from kserve_pvc._volume.tree import Tree
from kserve_pvc._volume.writing import VolumeWriter
from kserve_pvc.locks.liveness import here

URI = "s3://bucket/model"
FILES = {"a.bin": b"a" * 1000, "b.bin": b"b" * 1000}


@pytest.fixture
def store(root):
    return ModelStore(root, mode="rw", lease_seconds=0.3, backends={"s3": MemorySource({URI: FILES})})


def kinds(store: ModelStore, key: str) -> list[str]:
    return [entry.type for entry in read_all(Volume(store.root), key)]


def test_a_reader_keeps_its_model(store):
    """
    While a process holds the model it cannot be removed, and it is there all the time.
    """
    model = store.ensure(URI, progress=False)

    with store.open(URI) as held:
        with pytest.raises(ModelInUseError, match="in use by pod"):
            ModelStore(store.root, mode="rw").remove(URI)
        kept = (held.path / "a.bin").read_bytes()

    assert kept == FILES["a.bin"]
    assert kinds(store, model.key) == ["commit"]
    assert store.get(URI).path == model.path
    assert store.verify(URI, "full").ok


def test_a_reader_that_comes_before_the_tombstone_gets_its_model_back(store, monkeypatch):
    """
    A lease that was taken between the first look for readers and the tombstone undoes the tombstone.
    """
    model, honest, looks = store.ensure(URI, progress=False), Readers.watch, []

    def watch(self, generations):
        looks.append(kinds(store, model.key))
        return honest(self, generations) if len(looks) > 1 else ()

    monkeypatch.setattr(Readers, "watch", watch)
    with store.open(URI), pytest.raises(ModelInUseError):
        store.remove(URI)

    assert looks == [["commit"], ["commit", "tombstone"]]
    assert kinds(store, model.key) == ["commit", "tombstone", "restore"]
    assert store.get(URI).path == model.path


def test_nobody_misses_a_model_whose_removal_is_refused(store):
    """
    While the removal finds out that the model is read, it stays present, and nobody downloads it again.
    """
    model, absent, over = store.ensure(URI, progress=False), [], Event()

    def look() -> None:
        while not over.is_set():
            absent.extend([1] if URI not in store else [])

    thread = Thread(target=look)
    with store.open(URI):
        thread.start()
        with pytest.raises(ModelInUseError):
            ModelStore(store.root, mode="rw").remove(URI)
        over.set()
        thread.join()

    assert absent == []
    assert store.get(URI).path == model.path


LEAVES = {
    "leaves the with": "raise ZeroDivisionError",
    "ends it": "held.__exit__(None, None, None)",
    "exits": "sys.exit(0)",
    "runs to its end": "sys.stdout.flush()",
    "starts another": "p = multiprocessing.get_context('fork').Process(target=print); p.start(); p.join(); sys.exit(0)",
}
FORKS = """
import multiprocessing, os, sys
from contextlib import suppress
from kserve_pvc import ModelInUseError, ModelStore
root, uri, leave = sys.argv[1:]
store = ModelStore(root, mode="rw")
held = store.open(uri)
held.__enter__()
child = os.fork()
if child == 0:
    with suppress(ZeroDivisionError), held:
        exec(leave)
    sys.exit(0)
os.waitpid(child, 0)
try:
    store.remove(uri)
except ModelInUseError:
    print("in use")
    held.__exit__(None, None, None)
    store.remove(uri, trash_seconds=0)
    print("removed")
"""


@pytest.mark.parametrize("leaves", LEAVES)
def test_a_forked_child_does_not_give_the_lease_back(store, leaves):
    """
    Whatever a child does with the `with` that it inherited, the lease is its parent's, as workers of a data loader are.
    """
    store.ensure(URI, progress=False)

    command = [sys.executable, "-I", "-c", FORKS, str(store.root), URI, LEAVES[leaves]]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)

    assert result.stdout.split("\n")[-3:-1] == ["in use", "removed"]


STOPS = """
import os, signal, sys
from kserve_pvc import ModelInUseError, ModelStore
from kserve_pvc._keys import claims
honest, looks = claims._read_sign, []
def read_sign(*arguments):
    sign = honest(*arguments)
    looks.append(1)
    if len(looks) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGSTOP)
    return sign
claims._read_sign = read_sign
try:
    ModelStore(sys.argv[1], mode="rw").remove(sys.argv[2])
except ModelInUseError:
    print("in use")
"""


@pytest.mark.parametrize("after", [2, 3])
def test_a_removal_that_was_stopped_looks_again(store, after):
    """
    However long it stood still between a look at a lease and its decision, a reader that lives keeps its model.
    """
    model = store.ensure(URI, progress=False)
    with store.open(URI):
        command = [sys.executable, "-I", "-c", STOPS, str(store.root), URI, str(after)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as remover:
            os.waitpid(remover.pid, os.WUNTRACED)
            time.sleep(0.3 * READER_LEASES + 0.5)
            remover.send_signal(signal.SIGCONT)
            said, _ = remover.communicate(timeout=60)
        assert (said, (model.path / "a.bin").exists()) == ("in use\n", True)


def test_a_silent_reader_is_watched_for_four_leases(store, monkeypatch):
    """
    A reader beats four times slower than a downloader, so it is silent for longer before it counts as dead.
    """
    model = store.ensure(URI, progress=False)
    monkeypatch.setattr("kserve_pvc._keys.claims.is_provably_dead", lambda holder: False)
    beat = store.root / layout.lease_dir(model.path.name) / "slow" / "beat"
    beat.parent.mkdir(parents=True)
    beat.write_bytes(encode_beat(Beat(count=1)))
    timer = Timer(0.3 * 2.5, lambda: beat.write_bytes(encode_beat(Beat(count=2))))
    timer.start()

    with pytest.raises(ModelInUseError):
        store.remove(URI)

    timer.join()
    assert store.get(URI).path == model.path


def test_many_dead_readers_are_read_once(store, monkeypatch):
    """
    Leases of processes that no longer exist cost one look, however long a silent one is waited for.
    """
    model, read = store.ensure(URI, progress=False), Counter()
    leases = store.root / layout.lease_dir(model.path.name)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead = encode(ReaderLease(generation=model.path.name, holder=attrs.evolve(here(), pid=gone.pid)))
    for number in range(50):
        (leases / f"dead-{number}").mkdir(parents=True)
        (leases / f"dead-{number}" / "owner").write_bytes(dead)
    (leases / "silent").mkdir()
    (leases / "silent" / "owner").write_bytes(b"of a pod that is no more")
    honest = Volume.read

    def count(self, place, *arguments, **more):
        read[place.parent.name, place.name] += 1
        return honest(self, place, *arguments, **more)

    monkeypatch.setattr(Volume, "read", count)

    store.remove(URI, trash_seconds=0)

    # One look before the tombstone and one after it.
    assert {number for (name, _), number in read.items() if name.startswith("dead-")} == {2}
    assert read["silent", "beat"] > 20


def test_a_reader_looks_again_under_its_lease(store, monkeypatch):
    """
    A model that was replaced before the lease could count is let go, and the newer one is held.
    """
    from kserve_pvc._keys import claims as _claims

    first = store.ensure(URI, progress=False)
    honest, newer = _claims.reading, []

    def reading(*args, **kwargs):
        if not newer:
            newer.append(
                ModelStore(store.root, mode="rw", backends={"s3": MemorySource({URI: FILES})}).ensure(
                    URI, force_download=True, progress=False
                )
            )
        return honest(*args, **kwargs)

    monkeypatch.setattr(_claims, "reading", reading)
    with store.open(URI) as held:
        path = held.path

    assert path == newer[0].path
    assert path != first.path


def test_a_reader_that_let_go_is_not_waited_for(store):
    """
    After the `with` the lease is gone, and removing succeeds.
    """
    model = store.ensure(URI, progress=False)
    with store.open(URI):
        pass

    store.remove(URI, trash_seconds=0)

    assert not model.path.exists()
    assert URI not in store


def test_a_reader_that_died_is_waited_out(store, monkeypatch):
    """
    A lease that shows no sign of life holds a model for its term and no longer.
    """
    model = store.ensure(URI, progress=False)
    monkeypatch.setattr("kserve_pvc._keys.claims.is_provably_dead", lambda holder: False)
    place = store.root / layout.lease_dir(model.path.name) / "dead"
    place.mkdir(parents=True)
    (place / "owner").write_bytes(b"of a pod that is no more")

    store.remove(URI, trash_seconds=0)

    assert not model.path.exists()
    assert not (store.root / layout.lease_dir(model.path.name)).exists()


def test_a_download_under_way_is_not_removed(root, store, monkeypatch):
    """
    What somebody is fetching cannot be removed, and the download ends well.
    """
    writing, go_on = Event(), Event()
    honest = Tree.create

    def create(self, path):
        if path.name == "b.bin":
            writing.set()
            assert go_on.wait(10)
        return honest(self, path)

    monkeypatch.setattr(Tree, "create", create)
    models = []
    thread = Thread(target=lambda: models.append(store.ensure(URI, max_workers=1, progress=False)))
    thread.start()
    assert writing.wait(10)
    with pytest.raises(ModelInUseError, match="a download by pod"):
        ModelStore(root, mode="rw").remove(URI)
    go_on.set()
    thread.join()

    assert models[0].status == "downloaded"
    assert store.verify(URI, "full").ok


def test_what_a_removal_left_that_died_half_way_is_collected(store, monkeypatch):
    """
    A removal that is killed after its tombstone leaves the model gone; the next one collects its bytes.
    """
    model = store.ensure(URI, progress=False)

    looks = []

    def die(*_args, **_kwargs):
        looks.append(1)
        if len(looks) == 2:
            raise KeyboardInterrupt
        return ()

    monkeypatch.setattr("kserve_pvc._keys.claims.Readers.watch", die)
    with pytest.raises(KeyboardInterrupt):
        store.remove(URI)
    monkeypatch.undo()
    gone = URI not in store
    left = model.path.is_dir()

    store.remove(URI, trash_seconds=0)

    assert (gone, left, model.path.exists()) == (True, True, False)
    with pytest.raises(ModelNotFoundError):
        store.remove(URI)


def test_a_removal_ends_above_every_number_that_was_reserved(store, monkeypatch):
    """
    A download that reserved the number after the tombstone's and was paused there finds a newer tombstone, and loses.
    """
    model = store.ensure(URI, progress=False)
    honest, reserved = VolumeWriter.reserve, []

    def reserve(self, place):
        if place.name == "000000000002" and not reserved:
            reserved.append(honest(self, place.with_name("000000000003")))
        return honest(self, place)

    monkeypatch.setattr(VolumeWriter, "reserve", reserve)
    store.remove(URI, trash_seconds=0)

    assert [(entry.seq, entry.type) for entry in read_all(Volume(store.root), model.key)] == [
        (1, "commit"),
        (2, "tombstone"),
        (4, "tombstone"),
    ]


def test_a_model_that_was_removed_can_be_fetched_again(store):
    """
    A tombstone is no obstacle to the next download, which gets a new directory.
    """
    first = store.ensure(URI, progress=False)
    store.remove(URI, trash_seconds=0)

    second = store.ensure(URI, progress=False)

    assert second.status == "downloaded"
    assert second.path != first.path
    assert kinds(store, first.key) == ["commit", "tombstone", "commit"]


def test_bytes_stay_in_the_trash_for_readers_without_a_lease(store):
    """
    A file that was opened before the removal is readable until the trash is emptied, by `rm --now` or a later writer.
    """
    model = store.ensure(URI, progress=False)

    store.remove(URI)

    (trashed,) = (store.root / layout.TRASH).iterdir()
    assert (trashed / "a.bin").read_bytes() == FILES["a.bin"]
    assert not model.path.exists()
    with pytest.raises(ModelNotFoundError):
        store.remove(URI, trash_seconds=0)
    assert list((store.root / layout.TRASH).iterdir()) == []
