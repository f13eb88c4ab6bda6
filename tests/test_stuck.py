"""
What lies on a volume, or happens to it, and must not end a call that has nothing to do with it.
"""

import errno
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import pytest

from kserve_pvc import ModelStore
from kserve_pvc._cli.main import main
from kserve_pvc._format import layout
from kserve_pvc._volume.calls import delete_tree
from kserve_pvc._volume.profile import try_lock
from kserve_pvc._volume.reading import Volume
from kserve_pvc._volume.writing import VolumeWriter
from kserve_pvc.errors import (
    InsufficientSpaceError,
    InvalidFileError,
    ModelNotFoundError,
    ReadOnlyStoreError,
    StoreError,
    UnknownSchemeError,
    VolumeError,
)
from kserve_pvc.kserve._yaml import read_documents
from kserve_pvc.locks.lease import Heartbeat
from tests.support.trees import write_files

FILES = {"weights.bin": b"weights", "deep/config.json": b"{}"}


@pytest.fixture
def root(tmp_path):
    place = tmp_path / "volume"
    place.mkdir()
    return place


@pytest.fixture
def source(tmp_path):
    place = tmp_path / "source"
    write_files(place, FILES)
    return place


@pytest.fixture
def store(root):
    return ModelStore(root, mode="rw")


@pytest.fixture
def uri(source):
    return f"file://{source}"


# The trash


@pytest.mark.parametrize(
    "name", ["²-x", "٣-x", "0-x", "-", "x", "9" * 30 + "-x", "000000000001-x\n", "000000000001", ".nfs0001", "0" * 200]
)
@pytest.mark.parametrize("directory", [True, False])
def test_what_lies_in_the_trash_ends_no_download(store, root, uri, name, directory):
    """
    Whatever has been put into the trash under whatever name, models come and go.
    """
    place = root / layout.TRASH / name
    place.parent.mkdir(exist_ok=True)
    place.mkdir() if directory else place.write_text("x")

    assert store.ensure(uri, progress=False).status == "downloaded"
    store.remove(uri, trash_seconds=0)


def test_what_cannot_be_deleted_ends_no_download(store, root, uri, monkeypatch):
    """
    One file that cannot be deleted, of another user or on a bad block, stays, and all that is beside it goes.
    """
    bad = root / layout.TRASH / f"{1:012d}-bad"
    write_files(bad, {"a/stuck": b"x", "b/fine": b"x", "c": b"x"})
    write_files(root / layout.TRASH / f"{2:012d}-fine", {"x": b"x"})
    honest = os.unlink

    def unlink(path, *, dir_fd=None):
        if path == "stuck":
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        honest(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", unlink)

    assert store.ensure(uri, progress=False).status == "downloaded"
    store.remove(uri, trash_seconds=0)

    assert [path.name for path in (root / layout.TRASH).rglob("*") if path.is_file()] == ["stuck"]
    assert uri not in store


def test_a_mount_in_the_trash_ends_no_download(store, root, uri, mount, as_root, monkeypatch):
    """
    A directory of the trash on which something is mounted stays, and ends neither a download nor a removal.
    """
    place = root / layout.TRASH / f"{1:012d}-mounted"
    place.mkdir(parents=True)
    mount("-t", "tmpfs", "none", at=str(place.relative_to(root.parent)))

    assert store.ensure(uri, progress=False).status == "downloaded"
    store.remove(uri, trash_seconds=0)

    assert place.is_dir()


def test_trash_of_a_clock_that_is_ahead_is_freed_where_room_is_needed(root):
    """
    What a node threw away whose clock is a year ahead waits for its time, unless the room is needed now.
    """
    ahead = root / layout.TRASH / f"{int(time.time()) + 31_536_000:012d}-x"
    write_files(ahead, {"x": b"x"})
    writer = VolumeWriter(root)

    writer.empty_trash(300)
    assert ahead.exists()
    writer.empty_trash(0)
    assert not ahead.exists()


@pytest.mark.parametrize("place", [layout.TRASH / f"{1:012d}-x", layout.MODELS / "m-0123456789abcdef"])
def test_thousands_of_levels_end_no_call(store, root, uri, place):
    """
    A tree of thousands of levels, in the trash or beside a model, is deleted or passed over by every verb.
    """
    deepen(root / place, 3000)

    assert store.ensure(uri, progress=False).status == "downloaded"
    assert store.verify(uri, "full").ok
    store.remove(uri, trash_seconds=0)

    assert list((root / layout.TRASH).iterdir()) == []
    delete_below(root)


def test_a_model_of_thousands_of_levels_is_verified_and_removed(store, root, uri):
    """
    Levels that no writer made are a problem that `verify` names, and `rm` deletes them.
    """
    model = store.ensure(uri, progress=False)
    deepen(model.path / "planted", 3000)

    report = store.verify(uri)
    store.remove(uri, trash_seconds=0)

    assert len(report.problems) == 1
    assert list((root / layout.TRASH).iterdir()) == []
    assert uri not in store


def test_a_deep_tree_is_deleted_with_few_descriptors(tmp_path):
    """
    However deep a tree is, some dozens of descriptors are enough to delete it.
    """
    deepen(tmp_path / "deep", 2000)
    fd = os.open(tmp_path, os.O_RDONLY)
    most, honest = [], os.open

    def open_(*arguments, **named):
        opened = honest(*arguments, **named)
        most.append(opened)
        return opened

    os.open, before = open_, honest
    try:
        delete_tree(fd, "deep")
    finally:
        os.open = before
        os.close(fd)

    assert not (tmp_path / "deep").exists()
    assert max(most) < fd + 60


def deepen(place: Path, levels: int) -> None:
    place.mkdir(parents=True)
    fd = os.open(place, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir("d", dir_fd=fd)
        child = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = child
    os.close(fd)


def delete_below(root: Path) -> None:
    """
    Delete what is too deep for the tools of the tests.
    """
    fd = os.open(root.parent, os.O_RDONLY)
    delete_tree(fd, root.name)
    os.close(fd)


# A key that cannot be read


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
def test_a_key_that_cannot_be_listed_takes_no_other_with_it(store, root, uri, monkeypatch, code):
    """
    One key on a bad block leaves `ls` and `locks` all others, and `verify --all` names it.
    """
    store.ensure(uri, progress=False)
    bad = "bad-0123456789abcdef"
    (root / layout.log_dir(bad)).mkdir(parents=True)
    honest = Volume.list_names

    def list_names(self, place):
        if bad in place.parts:
            raise VolumeError(str(place), "listing", os.strerror(code))
        return honest(self, place)

    monkeypatch.setattr(Volume, "list_names", list_names)

    assert [model.uri for model in store.list()] == [uri]
    assert list(store.locks()) == []
    assert sorted(found.ok for found in store.verify_all()) == [False, True]


# A volume that is full


@pytest.fixture
def full(mount, as_root):
    """
    A small volume that can be filled up to its last byte and inode.
    """
    place = mount("-t", "tmpfs", "-o", "size=2m,nr_inodes=300", "none")

    def fill() -> None:
        try:
            for number in range(1000):
                (place / f"filler{number}").write_bytes(b"x" * 65536)
        except OSError:
            pass
        try:
            for number in range(1000):
                (place / f"inode{number}").write_bytes(b"")
        except OSError:
            pass

    return place, fill


def test_a_model_is_removed_on_a_full_volume(full, uri):
    """
    With no byte and no inode free a model is removed, and its room can be used.
    """
    place, fill = full
    store = ModelStore(place, mode="rw")
    store.ensure(uri, progress=False)
    fill()
    with pytest.raises(OSError, match="No space"):
        (place / "more").mkdir()

    store.remove(uri, trash_seconds=0)

    assert uri not in ModelStore(place)
    with pytest.raises(ModelNotFoundError):
        store.remove(uri)


def test_models_are_removed_on_a_full_volume_one_after_the_other(full, source, tmp_path):
    """
    The reserve is made again from what a removal has freed.
    """
    place, fill = full
    store, uris = ModelStore(place, mode="rw"), []
    for number in range(4):
        write_files(tmp_path / str(number), {"weights.bin": b"x" * 100_000})
        uris.append(f"file://{tmp_path / str(number)}")
        store.ensure(uris[-1], progress=False)

    for uri in uris:
        fill()
        store.remove(uri, trash_seconds=0)

    assert store.list() == []


def test_what_cannot_be_removed_recommends_no_removal(full, uri):
    """
    Without a reserve and without trash the error says what else helps.
    """
    place, fill = full
    store = ModelStore(place, mode="rw")
    store.ensure(uri, progress=False)
    for kept in (place / layout.RESERVE).iterdir():
        kept.unlink()
    fill()

    with pytest.raises(InsufficientSpaceError) as caught:
        store.remove(uri)

    assert "kserve-pvc rm" not in str(caught.value)
    assert "enlarge" in str(caught.value)
    assert uri in store


def test_a_full_volume_is_read_by_those_that_may_write(full, uri, tmp_path):
    """
    A read-write store opens and exports on a full volume what a read-only one does.
    """
    place, fill = full
    store = ModelStore(place, mode="rw")
    store.ensure(uri, progress=False)
    fill()

    with store.open(uri) as model:
        assert (model.path / "weights.bin").read_bytes() == b"weights"
    assert store.export(uri, tmp_path / "model.tar", progress=False).files == 2


# Threads


@pytest.mark.parametrize("allowed", range(6))
def test_a_limit_of_threads_is_an_error_or_makes_it_slower(store, uri, monkeypatch, allowed):
    """
    However many threads may be started, a download ends well or with an error of ours, and leaves none behind.
    """
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    honest, started = threading.Thread.start, []

    def start(self):
        if len(started) >= allowed:
            raise RuntimeError("can't start new thread")
        started.append(self)
        honest(self)

    monkeypatch.setattr(threading.Thread, "start", start)
    try:
        status = store.ensure(uri, progress=False).status
    except VolumeError as error:
        status, text = "refused", str(error)
        assert "limit of threads" in text
    monkeypatch.setattr(threading.Thread, "start", honest)
    for thread in started:
        thread.join(10)

    assert status in ("downloaded", "refused")
    assert threading.active_count() <= threads
    assert len(os.listdir("/proc/self/fd")) <= files
    assert store.ensure(uri, progress=False, timeout=5).status in ("downloaded", "present")


@pytest.mark.parametrize("allowed", [0, 1])
def test_a_limit_of_threads_is_an_error_of_warm(store, uri, monkeypatch, allowed):
    """
    Where the caller's executor cannot start its threads, that is said in our words, and nothing stays behind.
    """
    honest, started = threading.Thread.start, []

    def start(self):
        if len(started) >= allowed:
            raise RuntimeError("can't start new thread")
        started.append(self)
        honest(self)

    with ThreadPoolExecutor(2) as pool:
        monkeypatch.setattr(threading.Thread, "start", start)
        with pytest.raises(VolumeError, match="limit of threads"):
            list(store.warm([uri, f"{uri}/deep"], executor=pool, progress=False))
        monkeypatch.setattr(threading.Thread, "start", honest)


def test_an_executor_that_was_shut_down_is_the_callers(store, uri):
    """
    What else an executor says reaches its owner as it is.
    """
    pool = ThreadPoolExecutor(1)
    pool.shutdown()

    with pytest.raises(RuntimeError, match="after shutdown"):
        list(store.warm([uri], executor=pool, progress=False))


def test_a_heartbeat_without_a_thread_is_released(tmp_path, monkeypatch):
    """
    A claim whose heartbeat cannot be started says so to all others, and its file is closed.
    """

    def refuse(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    fd = os.open(tmp_path / "beat", os.O_RDWR | os.O_CREAT)

    with pytest.raises(VolumeError, match="limit of threads"):
        Heartbeat(fd, lease_seconds=30)

    assert b'"released": true' in (tmp_path / "beat").read_bytes().replace(b'":true', b'": true')
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


def test_a_probe_that_hangs_unlocks_no_other_file(tmp_path):
    """
    A lock probe that returns after it was given up acts on its own descriptor, whatever has that number by then.
    """
    go_on, seen = threading.Event(), []
    fd = os.open(tmp_path / "probed", os.O_RDWR | os.O_CREAT)

    def hang(own):
        go_on.wait(10)
        seen.append(os.readlink(f"/proc/self/fd/{own}"))

    assert try_lock(fd, hang, 0.05) == "hangs"
    os.close(fd)
    other = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
    go_on.set()
    deadline = time.monotonic() + 10
    while not seen and time.monotonic() < deadline:
        time.sleep(0.01)
    os.close(other)

    assert seen == [str(tmp_path / "probed")]


# Errors about errors


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EIO, errno.EROFS])
def test_an_error_is_told_though_the_root_cannot_be_looked_at(root, monkeypatch, code):
    """
    An error of the volume is ours, also if nothing about the volume can be found out any more.
    """
    writer = VolumeWriter(root)

    def fail(*_arguments, **_named):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "stat", fail)
    monkeypatch.setattr(os, "statvfs", fail)

    for operation in ("reading", "writing"):
        found = writer.failure(operation, PurePosixPath("x"), OSError(code, os.strerror(code)))
        assert isinstance(found, InsufficientSpaceError | VolumeError | ReadOnlyStoreError)


# Removals


def test_a_model_whose_directory_is_gone_is_removed_by_two(store, root, uri):
    """
    Removals of a model whose directory was deleted by hand end well or with an error of ours, however many there are.
    """
    model = store.ensure(uri, progress=False)
    for path in sorted(model.path.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    model.path.rmdir()
    failures, barrier = [], threading.Barrier(4)

    def run() -> None:
        barrier.wait()
        try:
            ModelStore(root, mode="rw").remove(uri)
        except StoreError:
            pass
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert failures == []
    assert uri not in store


@pytest.mark.parametrize("gap", [1, 5, 400])
def test_a_gap_of_numbers_costs_two_tombstones(store, root, uri, gap):
    """
    However far above the log a number is reserved, a removal passes over it at once.
    """
    model = store.ensure(uri, progress=False)
    (root / layout.slot_dir(model.key) / f"{1 + gap:012d}").mkdir()

    store.remove(uri)

    assert len(list((root / layout.log_dir(model.key)).glob("*.tombstone"))) <= 2
    assert uri not in store
    assert store.ensure(uri, progress=False).status == "downloaded"


# KServe's link


@pytest.mark.parametrize("before", ["gone", "old", "elsewhere"])
def test_kserves_link_is_put_right_by_the_next_ensure(store, root, uri, before):
    """
    A writer that died between the commit and the link leaves a link that the next process puts right.
    """
    model = store.ensure(uri, progress=False)
    link = root / layout.view_link(model.key)
    link.unlink()
    if before == "old":
        link.symlink_to(f"{model.key}/{7:012d}-{'0' * 32}")
    if before == "elsewhere":
        link.symlink_to("/etc")

    assert ModelStore(root, mode="rw").ensure(uri).status == "present"

    assert link.resolve() == model.path


def test_a_reader_puts_no_link_right(store, root, uri):
    """
    A read-only store writes nothing, not even that link.
    """
    model = store.ensure(uri, progress=False)
    (root / layout.view_link(model.key)).unlink()

    assert ModelStore(root).ensure(uri).status == "present"
    assert not (root / layout.view_link(model.key)).exists()


# What is read from elsewhere


@pytest.mark.parametrize("number", ["0x" + "f" * 2_000_000, "0b" + "1" * 2_000_000, "9" * 2_000_000])
def test_a_number_of_millions_of_digits_is_invalid(number):
    """
    A manifest with a number that cannot be printed is refused when it is read.
    """
    with pytest.raises(InvalidFileError, match="invalid YAML"):
        read_documents(f"a: {number}", "patch.yaml")


def test_a_catalogue_of_deep_json_is_an_error(store, tmp_path, capsys):
    """
    `warm -f` refuses a line that is nested too deeply, by its number.
    """
    catalogue = tmp_path / "models.txt"
    catalogue.write_text("# one\n" + '{"uri": ' + "[" * 100_000 + "]" * 100_000 + "}\n")

    assert main(["warm", "-f", str(catalogue), "--store", str(store.root)]) != 0
    assert "line 2" in capsys.readouterr().err


def test_a_factory_that_exits_serves_no_scheme(root):
    """
    A plug-in that ends the process when it is called is an error about its scheme.
    """

    def factory(options):
        raise SystemExit(3)

    with pytest.raises(UnknownSchemeError, match="SystemExit"):
        ModelStore(root, mode="rw", backends={"odd": factory}).ensure("odd://model", progress=False)
