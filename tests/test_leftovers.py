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

from kserve_pvc import InsufficientSpaceError, ModelStore, VolumeError
from kserve_pvc._download.publication import Publication
from kserve_pvc._download.reuse import find_donors, noted_bytes, unfinished
from kserve_pvc._download.transfer import Transfer
from kserve_pvc._format import layout
from kserve_pvc._format.records import PartNote, encode
from kserve_pvc._keys.claims import newest_epoch
from kserve_pvc._keys.log import read_all, read_log
from kserve_pvc._source.ref import parse_ref
from kserve_pvc._volume.reading import Volume
from kserve_pvc._volume.sweeping import sweep_staging
from kserve_pvc._volume.writing import VolumeWriter
from kserve_pvc.locks.liveness import here

URI = "s3://bucket/model"
BITS = random.Random(7)
FILES = {"config.json": b"{}", **{f"part-{number}": BITS.randbytes(3_000_000) for number in range(4)}}
SIZE = sum(map(len, FILES.values()))

# Each process is killed at the end of the first file that it has to fetch or to copy.
KILLS = 4
CRASHES = """
import os, signal, sys
from pathlib import Path
from kserve_pvc import ModelStore
from kserve_pvc._download import attempt
from kserve_pvc._volume.tree import Tree
from kserve_pvc.backends.file import FileBackend
root, uri, refresh, kills = sys.argv[1:]
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
Tree.settle = die
for _ in range(int(kills)):
    if not (child := os.fork()):
        store = ModelStore(root, mode="rw", lease_seconds=0.5, part_bytes=1 << 20, backends={"file": FileBackend})
        store.ensure(uri, progress=False, refresh=bool(refresh))
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    found = {path.stat().st_ino: path.stat().st_size for path in Path(root).rglob("*") if path.is_file()}
    print(sum(found.values()))
"""


def crash(root: Path, uri: str, *, refresh: bool) -> list[int]:
    """
    Let several processes after each other be killed, and return the bytes on the volume after each.
    """
    command = [sys.executable, "-I", "-c", CRASHES, str(root), uri, "refresh" if refresh else "", str(KILLS)]
    done = subprocess.run(command, timeout=120, check=True, capture_output=True, text=True)
    return [int(line) for line in done.stdout.split()]


def room_taken(place: Path) -> int:
    """
    The bytes below a directory, of each inode once.
    """
    return sum({path.stat().st_ino: path.stat().st_size for path in place.rglob("*") if path.is_file()}.values())


@pytest.fixture
def source(tmp_path):
    write_files(tmp_path / "source", FILES)
    return f"file://{tmp_path}/source"


@pytest.mark.parametrize("is_present", [False, True], ids=["absent", "present"])
def test_a_crash_loop_does_not_grow_the_volume(root, tmp_path, source, is_present):
    """
    However often it is killed it leaves no more than two, whether there is an older version or none; then it is whole.
    """
    most = 2.2 * SIZE
    if is_present:
        old = ModelStore(root, mode="rw", lease_seconds=0.5).ensure(source, progress=False)
        write_files(tmp_path / "source", {name: data[::-1] for name, data in FILES.items()})
        most += SIZE

    taken = crash(root, source, refresh=is_present)

    if is_present:
        assert ModelStore(root).get(source).path == old.path
        assert read_tree(old.path) == FILES
    store = ModelStore(root, mode="rw", lease_seconds=0.5)
    model = store.ensure(source, refresh=True, progress=False)
    print([round(number / SIZE, 2) for number in taken])
    assert len(taken) == KILLS
    assert max(taken) <= most
    assert store.verify(source, "full").ok
    assert list((root / layout.STAGING).glob("0*")) == []
    kept = {old.path.name, model.path.name} if is_present else {model.path.name}
    assert {path.name for path in model.path.parent.iterdir()} == kept


def leave(root: Path, generation: str, key: str, size: int, *, has_manifest: bool = False) -> None:
    """
    Leave a generation with a journal that speaks of so many bytes.
    """
    place = root / layout.generation_dir(key, generation)
    place.mkdir(parents=True)
    (place / "part-0").write_bytes(FILES["part-0"][:size])
    if has_manifest:
        manifest = root / layout.manifest_file(generation)
        manifest.parent.mkdir(parents=True, exist_ok=True)
        manifest.write_bytes(b"x")
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


def test_a_writer_whose_files_are_collected_again_and_again_goes_on(root, monkeypatch):
    """
    Where claims do not exclude, others take a live writer's files for leftovers. That is no error of the volume,
    however many they are.
    """
    source = MemorySource({URI: FILES})
    store, key = ModelStore(root, mode="rw", lease_seconds=0.5, backends={"s3": source}), parse_ref(URI).key
    honest, collected = Transfer.run, []

    def run(transfer, pages):
        if len(collected) < 5:
            newest = read_log(Volume(root), key)
            Publication(VolumeWriter(root), parse_ref(URI), here()).discard_leftovers(newest, most=0)
            collected.append(newest.seq)
            # What NFS says of a directory that is gone.
            raise VolumeError(str(root), "writing", "Stale file handle")
        return honest(transfer, pages)

    monkeypatch.setattr(Transfer, "run", run)

    model = store.ensure(URI, progress=False)

    assert read_tree(model.path) == FILES
    assert collected == [0, 1, 2, 3, 4]
    assert [path.name for path in model.path.parent.iterdir() if not path.is_symlink()] == [model.path.name]


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
    Beyond the bound notes are passed over, and those before count: of all journals of a model together.
    """
    monkeypatch.setattr("kserve_pvc._download.reuse._PIECE_BYTES", 1000)
    generation = name_of(1)
    journal = root / layout.journal_file(generation)
    journal.parent.mkdir(parents=True)
    (root / layout.generation_dir(parse_ref(URI).key, generation)).mkdir(parents=True)
    lines = [encode(PartNote(path=f"{n}", token="t", stop=10, crc32=n)) for n in range(1000)]
    journal.write_bytes(b"".join(lines))
    whole = noted_bytes(Volume(root), generation)
    monkeypatch.setattr("kserve_pvc._download.reuse._MAX_JOURNAL_BYTES", sum(map(len, lines)) // 2)

    half = noted_bytes(Volume(root), generation)

    donors = find_donors(Volume(root), parse_ref(URI))
    assert whole == 10_000
    assert 4_900 < half < 5_100
    assert 490 < len(donors) < 510


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


@pytest.fixture
def store(root):
    return ModelStore(root, mode="rw", lease_seconds=0.5, backends={"s3": MemorySource({URI: FILES})})


def name_of(number: int) -> str:
    return f"{number:012d}-{number:032x}"


def test_leftovers_that_were_complete_but_for_the_record_go(root, store):
    """
    Those of writers that were killed after the manifest are collected too, before and after a model is there.
    """
    key = parse_ref(URI).key
    for force in (False, True):
        for number in (1, 2, 3):
            leave(root, name_of(number), key, number, has_manifest=True)

        model = store.ensure(URI, progress=False, force_download=force)

        there = {path.name for path in model.path.parent.iterdir() if not path.is_symlink()}
        assert there & {name_of(number) for number in (1, 2, 3)} == set()
        assert {path.stem for path in (root / layout.MANIFESTS).iterdir()} == there


@pytest.mark.parametrize("leftovers", [1, 2])
def test_leftovers_give_way_to_a_download_that_needs_their_room(root, store, monkeypatch, leftovers):
    """
    Where a model does not fit beside what is left of it, that is collected, and all of it is fetched.
    """
    for number in range(1, leftovers + 1):
        leave(root, name_of(number), parse_ref(URI).key, 2_000_000)
    room = SIZE + 1_000_000
    monkeypatch.setattr(VolumeWriter, "free_bytes", lambda writer: room - room_taken(root / "models"))

    model = store.ensure(URI, progress=False)

    assert read_tree(model.path) == FILES
    assert room_taken(root / "models") == SIZE


def test_a_model_that_does_not_fit_fails_once_nothing_is_left(root, store, monkeypatch):
    """
    What cannot be helped by leftovers is the same error as without them.
    """
    leave(root, name_of(1), parse_ref(URI).key, 2_000_000)
    monkeypatch.setattr(VolumeWriter, "free_bytes", lambda writer: SIZE // 2)

    with pytest.raises(InsufficientSpaceError):
        store.ensure(URI, progress=False)

    assert room_taken(root / "models") == 0


def test_nothing_is_collected_above_a_damaged_record(root, store):
    """
    What the damaged record was is not hidden by a tombstone; a whole download comes above it.
    """
    model = store.ensure(URI, progress=False)
    (root / layout.log_dir(model.key) / f"{2:012d}.commit").write_bytes(b"damaged")
    (root / layout.slot_dir(model.key) / f"{2:012d}").mkdir()
    for number in (8, 9):
        leave(root, name_of(number), model.key, number)

    store.ensure(URI, progress=False)

    names = sorted(path.name for path in (root / layout.log_dir(model.key)).iterdir())
    assert [name.partition(".")[2] for name in names] == ["commit", "commit", "commit"]


def test_a_collection_that_fails_half_way_costs_no_second_download(root, monkeypatch):
    """
    Whatever ends the collection, the download begins on the record that was appended before it.
    """
    source = MemorySource({URI: FILES})
    store = ModelStore(root, mode="rw", lease_seconds=0.5, backends={"s3": source})
    for number in (1, 2, 3):
        leave(root, name_of(number), parse_ref(URI).key, number)
    honest, failed = VolumeWriter.throw_away, []

    def throw_away(writer, place):
        if place == layout.staging_dir(name_of(1)) and not failed:
            failed.append(place)
            raise VolumeError(str(place), "moving to the trash", "Input/output error")
        honest(writer, place)

    monkeypatch.setattr(VolumeWriter, "throw_away", throw_away)
    model = store.ensure(URI, progress=False)

    assert failed
    assert read_tree(model.path) == FILES
    assert source.bytes_read <= SIZE
    assert [path.name for path in model.path.parent.iterdir() if not path.is_symlink()] == [model.path.name]


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


def test_a_wrong_clock_of_this_node_sweeps_nothing(root, monkeypatch):
    """
    What another process has just made stays, however far this node's clock is ahead.
    """
    fresh = root / layout.STAGING / f"remove-{'a' * 32}"
    fresh.mkdir(parents=True)
    monkeypatch.setattr("time.time", lambda real=time.time: real() + 30 * 86_400)

    sweep_staging(VolumeWriter(root))

    assert fresh.exists()


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
