"""
What interrupted attempts leave behind: bounded for each key, taken over, and collected.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from memory import MemorySource
from trees import read_tree, write_files

from kserve_pvc import InsufficientSpaceError, ModelStore
from kserve_pvc._download.reuse import noted_bytes, unfinished
from kserve_pvc._format import layout
from kserve_pvc._format.records import PartNote, encode
from kserve_pvc._keys.claims import newest_epoch
from kserve_pvc._keys.log import read_all
from kserve_pvc._source.ref import parse_ref
from kserve_pvc._volume.reading import Volume
from kserve_pvc._volume.sweeping import sweep_staging
from kserve_pvc._volume.writing import VolumeWriter

URI = "s3://bucket/model"
BITS = random.Random(7)
FILES = {"config.json": b"{}", **{f"part-{number}": BITS.randbytes(3_000_000) for number in range(4)}}
SIZE = sum(map(len, FILES.values()))

# Killed at the last file, or at the first one that another process had not left.
CRASHES = """
import os, signal, sys
from kserve_pvc import ModelStore
from kserve_pvc._download import adoption
from kserve_pvc._download.publication import Publication
from kserve_pvc._volume.tree import Tree
honest = Tree.settle
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
Tree.settle = die
store = ModelStore(sys.argv[1], mode="rw", lease_seconds=0.5, part_bytes=1 << 20)
store.ensure(sys.argv[2], progress=False, refresh=len(sys.argv) > 3)
"""


def crash(root: Path, uri: str, *refresh: str) -> None:
    command = [sys.executable, "-I", "-c", CRASHES, str(root), uri, *refresh]
    assert subprocess.run(command, timeout=60).returncode == -9


def room_taken(root: Path) -> int:
    """
    The bytes below a directory, of each inode once.
    """
    found = {path.stat().st_ino: path.stat().st_size for path in root.rglob("*") if path.is_file()}
    return sum(found.values())


@pytest.fixture
def source(tmp_path):
    write_files(tmp_path / "source", FILES)
    return f"file://{tmp_path}/source"


@pytest.mark.parametrize("is_present", [False, True], ids=["absent", "present"])
def test_a_crash_loop_does_not_grow_the_volume(root, tmp_path, source, is_present):
    """
    Six kills leave no more than two, whether there is an older version of the model or none; then it is whole.
    """
    most = 2.2 * SIZE
    if is_present:
        old = ModelStore(root, mode="rw", lease_seconds=0.5).ensure(source, progress=False)
        write_files(tmp_path / "source", {name: data[::-1] for name, data in FILES.items()})
        most += SIZE
    taken = []

    for _ in range(6):
        crash(root, source, *(["refresh"] if is_present else []))
        taken.append(room_taken(root))
        if is_present:
            assert ModelStore(root).get(source).path == old.path
            assert read_tree(old.path) == FILES
    store = ModelStore(root, mode="rw", lease_seconds=0.5)
    model = store.ensure(source, refresh=True, progress=False)

    print([round(number / SIZE, 2) for number in taken])
    assert max(taken) <= most
    assert store.verify(source, "full").ok
    assert list((root / layout.STAGING).glob("0*")) == []
    kept = {old.path.name, model.path.name} if is_present else {model.path.name}
    assert {path.name for path in model.path.parent.iterdir()} == kept


def leave(root: Path, generation: str, key: str, size: int) -> None:
    """
    Leave a generation with a journal that speaks of so many bytes.
    """
    place = root / layout.generation_dir(key, generation)
    place.mkdir(parents=True)
    (place / "part-0").write_bytes(FILES["part-0"][:size])
    journal = root / layout.journal_file(generation)
    journal.parent.mkdir(parents=True)
    journal.write_bytes(encode(PartNote(path="part-0", token="t", stop=size, crc32=1)))


def test_the_leftover_that_has_most_is_kept(root, monkeypatch):
    """
    A writer that was killed early does not cost what the one before it had.
    """
    store = ModelStore(root, mode="rw", lease_seconds=0.5, backends={"s3": MemorySource({URI: FILES})})
    key, names = parse_ref(URI).key, [f"{number:012d}-{number:032x}" for number in (1, 2, 3)]
    for name, size in zip(names, (5, 2_000_000, 7), strict=True):
        leave(root, name, key, size)
    seen = []

    def look(attempt: object) -> None:
        seen.append(sorted(unfinished(Volume(root), key)))
        raise ZeroDivisionError

    monkeypatch.setattr("kserve_pvc._download.attempt.Attempt.run", look)
    with pytest.raises(ZeroDivisionError):
        store.ensure(URI, progress=False)

    assert seen == [[names[1]]]
    assert noted_bytes(Volume(root), names[1]) == 2_000_000
    assert [entry.type for entry in read_all(Volume(root), key)] == ["tombstone"]
    assert URI not in store


def test_a_paused_writer_whose_leftovers_were_collected_loses(root):
    """
    It was begun on an older record than the one that was appended before its bytes were collected.
    """
    from kserve_pvc._keys.log_writer import LogWriter
    from kserve_pvc._keys.procedures import append, drive

    source = MemorySource({URI: FILES})
    store, key = ModelStore(root, mode="rw", lease_seconds=0.5, backends={"s3": source}), parse_ref(URI).key
    for number in (1, 2):
        leave(root, f"{number:012d}-{number:032x}", key, number)

    model = store.ensure(URI, progress=False)

    def make(operation):
        raise AssertionError("it has published")

    paused = LogWriter(VolumeWriter(root), key, make, private=layout.STAGING / "x", collect=lambda name: None)
    assert drive(append(0, "commit"), paused.perform) is None
    assert store.get(URI).path == model.path
    assert newest_epoch(Volume(root), key) > 0


def test_a_forced_download_is_not_satisfied_by_a_record_of_the_same_generation(root):
    """
    The record that comes before leftovers are collected changes nothing, so it is no newer model.
    """
    store = ModelStore(root, mode="rw", lease_seconds=0.5, backends={"s3": MemorySource({URI: FILES})})
    first = store.ensure(URI, progress=False)
    for number in (5, 6):
        leave(root, f"{number:012d}-{number:032x}", first.key, number)

    second = store.ensure(URI, force_download=True, progress=False)

    assert (second.status, second.path == first.path) == ("downloaded", False)
    assert [entry.type for entry in read_all(Volume(root), first.key)] == ["commit", "restore", "commit"]


def test_the_journal_of_a_model_whose_writer_died_after_its_commit_goes(root):
    """
    It is no leftover, so it neither grows the log nor stays.
    """
    store = ModelStore(root, mode="rw", lease_seconds=0.5, backends={"s3": MemorySource({URI: FILES})})
    models = [store.ensure(URI, force_download=True, progress=False) for _ in range(3)]
    for model in models:
        journal = root / layout.journal_file(model.path.name)
        journal.parent.mkdir(parents=True)
        journal.write_bytes(b"")

    store.ensure(URI, force_download=True, progress=False)

    assert {entry.type for entry in read_all(Volume(root), models[0].key)} == {"commit"}
    assert list((root / layout.STAGING).glob("0*")) == []
    assert [read_tree(model.path) for model in models] == [FILES] * 3


def test_a_long_journal_is_read_as_far_as_it_may_be(root, monkeypatch):
    """
    Beyond the bound notes are passed over, and those before count.
    """
    monkeypatch.setattr("kserve_pvc._download.reuse._PIECE_BYTES", 1000)
    generation = f"{1:012d}-{1:032x}"
    journal = root / layout.journal_file(generation)
    journal.parent.mkdir(parents=True)
    lines = [encode(PartNote(path=f"{n}", token="t", stop=10, crc32=n)) for n in range(1000)]
    journal.write_bytes(b"".join(lines))
    whole = noted_bytes(Volume(root), generation)
    monkeypatch.setattr("kserve_pvc._download.reuse._MAX_JOURNAL_BYTES", sum(map(len, lines)) // 2)

    half = noted_bytes(Volume(root), generation)

    assert whole == 10_000
    assert 4_900 < half < 5_100


def test_a_journal_without_lines_costs_little(root):
    """
    Bytes without an end of a line are no note, and are not gathered.
    """
    generation = f"{1:012d}-{1:032x}"
    journal = root / layout.journal_file(generation)
    journal.parent.mkdir(parents=True)
    with open(journal, "wb") as file:
        file.truncate(1 << 30)
    began = time.monotonic()

    assert noted_bytes(Volume(root), generation) == 0
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("name", ["create", "remove", "discard"])
def test_what_a_killed_call_left_in_staging_is_swept_after_a_day(root, name):
    """
    Old directories of brief calls go; new ones, those of downloads and what is none of ours stay.
    """
    staging = root / layout.STAGING
    old, new, download, foreign = f"{name}-{'a' * 32}", f"{name}-{'b' * 32}", f"{1:012d}-{'c' * 32}", f"{name}-me"
    for directory in (old, new, download, foreign):
        (staging / directory).mkdir(parents=True)
        (staging / directory / "record").write_bytes(b"x")
        if directory != new:
            os.utime(staging / directory, (0, 0))

    sweep_staging(VolumeWriter(root))

    assert {path.name for path in staging.iterdir()} == {new, download, foreign}


def test_downloads_and_removals_sweep(root):
    """
    Whichever comes first collects what a killed removal has left.
    """
    store = ModelStore(root, mode="rw", lease_seconds=0.5, backends={"s3": MemorySource({URI: {"x": b"x"}})})
    left = root / layout.STAGING / f"remove-{'a' * 32}"
    for act in (lambda: store.ensure(URI, progress=False), lambda: store.remove(URI)):
        left.mkdir(parents=True)
        os.utime(left, (0, 0))

        act()

        assert not left.exists()


def test_a_full_volume_leaves_no_claim_and_no_descriptor(mount):
    """
    When not even the first heartbeat fits, the claim is deleted: the next download does not wait for its lease.
    """
    place = mount("-t", "tmpfs", "-o", "size=2m", "tmpfs")
    store = ModelStore(place, mode="rw", lease_seconds=60, backends={"s3": MemorySource({URI: {"x": b"x" * 10}})})
    (place / "models").mkdir(exist_ok=True)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kserve_pvc.locks.lease.os.pwrite", refuse)
        with pytest.raises(InsufficientSpaceError):
            store.ensure(URI, progress=False)
    assert len(os.listdir("/proc/self/fd")) <= before
    began = time.monotonic()

    model = store.ensure(URI, progress=False)

    assert model.status == "downloaded"
    assert time.monotonic() - began < 10


def refuse(*_: object) -> int:
    raise OSError(28, "No space left on device")
