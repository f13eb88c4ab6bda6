"""
Links, hard links and other volumes, put where the store, a source or a destination is about to look or write.
"""

import errno
import os
import shutil
import stat
import threading
from contextlib import suppress
from pathlib import Path, PurePosixPath

import pytest

from kserve_pvc import ModelStore
from kserve_pvc._format import layout
from kserve_pvc._format.records import FileEntry
from kserve_pvc._source.ref import parse_ref
from kserve_pvc._volume import beneath
from kserve_pvc._volume.beneath import open_beneath, walk_beneath
from kserve_pvc._volume.reading import Volume
from kserve_pvc._volume.writing import VolumeWriter
from kserve_pvc.backends.file import FileBackend
from kserve_pvc.backends.pvc import PvcBackend
from kserve_pvc.errors import (
    ModelNotFoundError,
    SourceChangedError,
    SourceNotFoundError,
    StoreError,
    StoreFormatError,
    StoreRootError,
    UnsafePathError,
)
from kserve_pvc.kserve._contents import OURS
from kserve_pvc.kserve._destination import Destination

SECRET = b"a private file outside of the volume"
READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


@pytest.fixture(autouse=True, params=["openat2", "step by step"])
def way(request, monkeypatch):
    """
    Everything here holds with the system call and without.
    """
    if request.param == "openat2" and beneath._openat2() is None:
        pytest.skip("this kernel has no openat2")
    monkeypatch.setattr(beneath, "_call_if_worth", lambda: beneath._openat2() if request.param == "openat2" else None)
    return request.param


@pytest.fixture
def root(tmp_path):
    place = tmp_path / "volume"
    place.mkdir()
    place.chmod(0o777)
    return place


@pytest.fixture
def source(tmp_path):
    place = tmp_path / "source"
    (place / "deep").mkdir(parents=True)
    (place / "deep" / "weights.bin").write_bytes(b"weights")
    return place


@pytest.fixture
def outside(tmp_path):
    place = tmp_path / "outside"
    place.mkdir(mode=0o700)
    (place / "weights.bin").write_bytes(SECRET)
    (place / "weights.bin").chmod(0o600)
    return place


@pytest.fixture
def warm(root, source):
    """
    A store that holds one model, and its URI.
    """
    store, uri = ModelStore(root, mode="rw"), f"file://{source}"
    return store, uri, store.ensure(uri, progress=False)


def swap(place: Path, target: Path) -> None:
    """
    Move something away, and put a link there to the place where it went, or elsewhere.
    """
    place.rename(place.with_name(f"{place.name}-aside"))
    place.symlink_to(target)


# What is opened


@pytest.mark.parametrize("path", ["link", "link/file", "directory/link", "directory/link/file", "loop", "loop/file"])
def test_no_component_may_be_a_link(tmp_path, path):
    """
    A link is refused wherever it stands in a path, and wherever it leads.
    """
    (tmp_path / "directory").mkdir()
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_text("x")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "directory" / "link").symlink_to("../real")
    (tmp_path / "loop").symlink_to("loop")
    top = os.open(tmp_path, os.O_PATH)
    try:
        with pytest.raises(OSError, match="symbolic links"):
            open_beneath(top, path, READ)
        os.close(open_beneath(top, "real/file", READ))
    finally:
        os.close(top)


@pytest.mark.parametrize("path", ["..", "real/../../x", "../x"])
def test_a_path_does_not_climb(tmp_path, path):
    """
    What is opened lies below the directory, however the path is spelled.
    """
    (tmp_path / "top" / "real").mkdir(parents=True)
    (tmp_path / "x").write_text("x")
    top = os.open(tmp_path / "top", os.O_PATH)
    try:
        with pytest.raises(OSError, match=r"symbolic links|cross-device"):
            os.close(open_beneath(top, path, READ))
    finally:
        os.close(top)


def test_a_tree_of_thousands_of_levels_is_walked(tmp_path):
    """
    A walk holds one descriptor, and does not enter what is deeper than any file of a model.
    """
    deepen(tmp_path / "top", 3000)
    (tmp_path / "top" / "file").write_text("x")
    top = os.open(tmp_path / "top", os.O_RDONLY)
    try:
        found = dict(walk_beneath(top))
    finally:
        os.close(top)
        level(tmp_path / "top")

    deepest, file = found
    assert file == PurePosixPath("file")
    assert stat.S_ISDIR(found[deepest].st_mode)
    assert len(str(deepest)) == beneath.LONGEST_PATH + 1


def deepen(place: Path, levels: int) -> None:
    place.mkdir()
    fd = os.open(place, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir("d", dir_fd=fd)
        child = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = child
    os.close(fd)


def level(place: Path) -> None:
    """
    Delete a deep tree, which `shutil` cannot.
    """
    while (place / "d").exists():
        below = place / "d" / "d"
        if below.exists():
            below.rename(place / "e")
        shutil.rmtree(place / "d")
        if (place / "e").exists():
            (place / "e").rename(place / "d")


# What is read


PARTS = [".kserve-pvc", ".kserve-pvc/keys", ".kserve-pvc/keys/*", ".kserve-pvc/keys/*/log"]
MODEL_PARTS = ["models", "models/*-*", "models/*-*/0*"]


@pytest.mark.parametrize("part", PARTS + MODEL_PARTS)
@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_reader_follows_no_link(warm, root, outside, part, elsewhere):
    """
    A component of the store that became a link is never followed, even if all is there behind it.
    """
    _, uri, _ = warm
    place = next(root.glob(part))
    swap(place, outside if elsewhere else place.with_name(f"{place.name}-aside"))

    with pytest.raises((ModelNotFoundError, StoreFormatError)):
        ModelStore(root).get(uri)

    if part != ".kserve-pvc":
        assert ModelStore(root).list() == []


@pytest.mark.parametrize("part", MODEL_PARTS)
def test_a_store_that_is_open_follows_no_link(warm, root, part):
    """
    A link that appears under a store that is open is seen at the next look.
    """
    store, uri, _ = warm
    place = next(root.glob(part))
    swap(place, Path("/etc"))

    assert uri not in store
    with pytest.raises(ModelNotFoundError, match="link"):
        store.get(uri)
    with pytest.raises(ModelNotFoundError, match="link"), store.open(uri):
        pass
    assert [found.ok for found in store.verify_all()] == [False]


def test_a_generation_that_is_a_link_is_downloaded_anew(warm, root, outside):
    """
    A model whose directory is a link is damaged: it is fetched again beside it, and can be removed.
    """
    store, uri, before = warm
    swap(before.path, outside)

    model = store.ensure(uri, progress=False)

    assert (model.status, model.path != before.path) == ("downloaded", True)
    assert (model.path / "deep" / "weights.bin").read_bytes() == b"weights"
    store.remove(uri, trash_seconds=0)
    assert (outside / "weights.bin").read_bytes() == SECRET


@pytest.mark.parametrize("part", [*PARTS, "models", "models/*-*", ".kserve-pvc/staging", ".kserve-pvc/trash"])
def test_a_writer_follows_no_link(warm, root, outside, source, part):
    """
    Nothing is made or deleted behind a link, wherever it stands.
    """
    store, uri, _ = warm
    swap(next(root.glob(part)), outside)
    (source / "deep" / "more.bin").write_bytes(b"more")

    for act in (lambda: store.ensure(uri, refresh=True, progress=False), lambda: store.remove(uri, trash_seconds=0)):
        with suppress(StoreError):
            act()

    assert {path.name: path.read_bytes() for path in outside.iterdir()} == {"weights.bin": SECRET}


# Modes


@pytest.fixture
def narrow():
    """
    A umask that takes everything from others, so that a mode has to be set.
    """
    before = os.umask(0o077)
    yield
    os.umask(before)


def after_mkdir(monkeypatch, act):
    """
    Let another process act after each directory that is made and before anything else is done with it.
    """
    honest = os.mkdir

    def mkdir(path, mode=0o777, *, dir_fd=None):
        honest(path, mode, dir_fd=dir_fd)
        if dir_fd is not None:
            act(Path(f"/proc/self/fd/{dir_fd}").readlink() / path)

    monkeypatch.setattr(os, "mkdir", mkdir)


@pytest.mark.parametrize("verb", ["make_directory", "reserve"])
@pytest.mark.parametrize("what", ["file", "directory"])
def test_a_directory_that_became_a_link_lends_no_mode(root, outside, monkeypatch, narrow, verb, what):
    """
    A private file or directory to which a link leads keeps its mode.
    """
    victim = outside / "weights.bin" if what == "file" else outside
    before = victim.stat().st_mode
    writer = VolumeWriter(root)
    after_mkdir(monkeypatch, lambda made: swap(made, victim))

    with suppress(StoreError):
        getattr(writer, verb)(PurePosixPath(".kserve-pvc/keys"))

    assert victim.stat().st_mode == before


def test_a_private_directory_that_was_moved_there_keeps_its_mode(root, outside, monkeypatch, narrow):
    """
    A directory of ours with something in it is not the one that was just made.
    """
    before = outside.stat().st_mode

    def swap_in(made):
        if outside.exists():
            made.rename(made.with_name("aside"))
            outside.rename(made)

    after_mkdir(monkeypatch, swap_in)
    VolumeWriter(root).make_directory(PurePosixPath("models"))

    assert (root / "models").stat().st_mode == before


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_a_directory_that_a_kill_left_closed_is_opened_by_the_next_process(root, levels):
    """
    A process that was killed between making a directory and setting its mode left it with that of its umask. The next
    one of the same user sets it before anything is in it, and all other users get in.
    """
    root.chmod(0o777)
    place = layout.claims_dir("model-0123456789abcdef")
    left = Path(root, *place.parts[:levels])
    left.mkdir(parents=True)
    for directory in (left, *left.parents):
        if directory.is_relative_to(root):
            directory.chmod(0o777)
    left.chmod(0o700)

    VolumeWriter(root).make_directory(place)

    assert stat.S_IMODE(left.stat().st_mode) == 0o777
    assert stat.S_IMODE((root / place).stat().st_mode) == 0o777


def test_a_private_directory_with_something_in_it_keeps_its_mode(root):
    """
    It was not left by a process that was killed there, whoever put it into the store.
    """
    root.chmod(0o777)
    (root / "models").mkdir()
    (root / "models").chmod(0o700)
    (root / "models" / "mine").write_text("x")

    VolumeWriter(root).make_directory(layout.MODELS)
    VolumeWriter(root).make_directory(layout.MODELS / "below")

    assert stat.S_IMODE((root / "models").stat().st_mode) == 0o700


def test_a_lock_that_is_a_second_name_is_refused(root, outside):
    """
    A hard link to a private file, put where a lock belongs, is neither opened for writing nor given another mode.
    """
    place = layout.lock_file("model-0123456789abcdef")
    (root / place).parent.mkdir(parents=True)
    os.link(outside / "weights.bin", root / place)
    before = (outside / "weights.bin").stat()

    with pytest.raises(UnsafePathError, match="this name only"):
        VolumeWriter(root).open_shared(place)

    after = (outside / "weights.bin").stat()
    assert (after.st_mode, after.st_mtime_ns) == (before.st_mode, before.st_mtime_ns)


def test_a_prepared_file_that_is_a_second_name_keeps_its_mode(root, outside):
    """
    A leftover in a destination that is a hard link to a private file is copied, and the private file stays private.
    """
    destination = Destination(root)
    destination.make_work()
    os.link(outside / "weights.bin", root / OURS / "work" / "left")
    file = FileEntry(path=PurePosixPath("weights.bin"), size_bytes=len(SECRET))

    assert destination.move(OURS / "work" / "left", file)

    assert stat.S_IMODE((outside / "weights.bin").stat().st_mode) == 0o600
    assert not (root / "weights.bin").samefile(outside / "weights.bin")


@pytest.mark.parametrize("method", ["copy", "link", "symlink", "reflink"])
@pytest.mark.parametrize("part", ["models", "models/*-*", "models/*-*/0*", "models/*-*/0*/deep"])
def test_nothing_is_materialized_through_a_link(warm, root, tmp_path, outside, method, part):
    """
    A file of the pod to which a planted link leads reaches no server.
    """
    _, _, model = warm
    swap(next(root.glob(part)), outside)
    place = tmp_path / "served"
    destination, origin = Destination(place), model.path / "deep" / "weights.bin"
    file = FileEntry(path=PurePosixPath("deep/weights.bin"), size_bytes=len(SECRET))

    with pytest.raises((StoreError, OSError)):
        destination.materialize(Volume(root), origin, file, (method,))

    assert not (place / "deep" / "weights.bin").exists()


def test_a_copy_is_compared_with_its_digest(warm, root, tmp_path):
    """
    A file that was changed in the store, with its size kept, is not served.
    """
    _, _, model = warm
    origin = model.path / "deep" / "weights.bin"
    origin.chmod(0o644)
    origin.write_bytes(b"changed")
    destination = Destination(tmp_path / "served")

    with pytest.raises(StoreError, match="sha256"):
        destination.materialize(Volume(root), origin, model.record.files[0], ("copy",))


# What a killed process leaves


def test_a_directory_that_others_cannot_enter_is_made_anew(root, monkeypatch):
    """
    What a process left that was killed between making a directory and setting its mode closes a key to no other.
    """
    (root / "models").mkdir(mode=0o700)
    refused, honest = [], os.open

    def open_(path, flags, mode=0o777, *, dir_fd=None):
        if path == "models" and os.stat(path, dir_fd=dir_fd).st_mode & 0o077 == 0:
            refused.append(path)
            raise PermissionError(errno.EACCES, "not entered", path)
        return honest(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(beneath, "_call_if_worth", lambda: None)
    writer = VolumeWriter(root)
    monkeypatch.setattr(os, "open", open_)

    writer.make_directory(PurePosixPath("models"))

    assert refused
    assert (root / "models").stat().st_mode & 0o777 == 0o777


# Sources


@pytest.mark.parametrize("scheme", ["file", "pvc"])
def test_a_source_is_listed_and_read_below_its_root(source, outside, scheme, monkeypatch):
    """
    A directory that turns into a link and back while a source is listed and read publishes no outside file.
    """
    if scheme == "file":
        backend, ref = FileBackend(), parse_ref(f"file://{source}")
    else:
        backend, ref = PvcBackend({"claims": {"data": str(source.parent)}}), parse_ref("pvc://data/source")
    stop = threading.Event()
    thread = threading.Thread(target=flip, args=(source / "deep", outside, stop))
    thread.start()
    read = []
    try:
        for _ in range(400):
            try:
                (file,) = backend.resolve(ref).files
                buffer = memoryview(bytearray(100))
                with backend.open_range(file, 0, file.entry.size_bytes) as reader:
                    read.append(bytes(buffer[: reader.readinto(buffer)]))
            except (UnsafePathError, SourceChangedError, SourceNotFoundError, ValueError):
                continue
    finally:
        stop.set()
        thread.join()

    assert set(read) <= {b"weights"}


def flip(place: Path, target: Path, stop: threading.Event) -> None:
    aside = place.parent.parent / "aside"
    while not stop.is_set():
        place.rename(aside)
        place.symlink_to(target)
        place.unlink()
        aside.rename(place)


# The root


def test_a_root_that_was_replaced_gets_nothing(warm, root, source):
    """
    What is downloaded after a volume was unmounted does not go into the bare directory below it.
    """
    store, uri, _ = warm
    (source / "deep" / "more.bin").write_bytes(b"more")
    root.rename(root.with_name("unmounted"))
    root.mkdir()

    for act in (
        lambda: store.ensure(uri, refresh=True, progress=False),
        lambda: store.ensure(f"file://{source}/deep", progress=False),
        lambda: store.remove(uri),
        lambda: store.alias("name", uri),
        lambda: store.break_lock(uri),
        lambda: store.get(uri),
        store.list,
    ):
        with pytest.raises(StoreRootError, match="unmounted or replaced"):
            act()

    assert list(root.iterdir()) == []


@pytest.mark.parametrize("what", ["gone", "another", "a link"])
def test_without_its_store_json_nothing_is_written(warm, root, tmp_path, source, what):
    """
    A root whose `store.json` is gone or that of another store is not the store that was opened.
    """
    store, uri, _ = warm
    place = root / layout.SETTINGS
    place.rename(tmp_path / "settings")
    if what == "another":
        (tmp_path / "other").mkdir()
        ModelStore(tmp_path / "other", mode="rw")
        shutil.copy(tmp_path / "other" / layout.SETTINGS, place)
    if what == "a link":
        place.symlink_to(tmp_path / "settings")
    before = sorted(root.rglob("*"))

    for act in (
        lambda: store.ensure(f"file://{source}/deep", progress=False),
        lambda: store.remove(uri),
        lambda: store.alias("name", uri),
        lambda: store.break_lock(uri),
    ):
        with pytest.raises(StoreRootError, match=r"store\.json"):
            act()

    assert sorted(root.rglob("*")) == before


def test_a_store_that_was_mounted_again_goes_on(warm, root, source):
    """
    The same store under the same path, as after a restart of what serves the volume, is opened anew by itself.
    """
    store, uri, _ = warm
    root.rename(root.with_name("unmounted"))
    root.mkdir()
    with pytest.raises(StoreRootError):
        store.get(uri)
    root.rmdir()
    shutil.copytree(root.with_name("unmounted"), root, symlinks=True)

    assert store.get(uri).status == "present"
    assert store.ensure(f"file://{source}/deep", progress=False).status == "downloaded"


def test_a_root_that_became_a_link_is_another(warm, root, tmp_path, source):
    """
    A link to another store, put where the root was, is not taken for it.
    """
    store, uri, _ = warm
    (tmp_path / "other").mkdir()
    ModelStore(tmp_path / "other", mode="rw")
    swap(root, tmp_path / "other")

    with pytest.raises(StoreRootError):
        store.get(uri)
    with pytest.raises(StoreRootError):
        store.ensure(f"file://{source}/deep", progress=False)


def test_a_reader_that_came_before_the_volume_sees_it(root, tmp_path, source):
    """
    A read-only store that was opened before the volume was mounted, or before there was a store, finds it later.
    """
    ready = tmp_path / "ready"
    ready.mkdir()
    uri = f"file://{source}"
    ModelStore(ready, mode="rw").ensure(uri, progress=False)
    store = ModelStore(root)
    assert uri not in store

    root.rmdir()
    ready.rename(root)

    assert uri in store


# Creation


def test_creators_agree_where_link_lets_several_win(root, monkeypatch):
    """
    Processes that create a store together agree on its settings, though a link is made by several of them.
    """
    honest = os.link

    def link(source, target, *, src_dir_fd, dst_dir_fd, follow_symlinks):
        try:
            honest(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd, follow_symlinks=follow_symlinks)
        except FileExistsError:
            if target != layout.SETTINGS.name:
                raise
            os.rename(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    monkeypatch.setattr(os, "link", link)
    barrier, found = threading.Barrier(8), []

    def create() -> None:
        barrier.wait()
        found.append(ModelStore(root, mode="rw")._writing[1].store_id)

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert (len(found), len(set(found))) == (8, 1)


def test_a_creator_that_died_stops_no_other(root):
    """
    A number that a killed process reserved is passed over after a second.
    """
    for number in (1, 2):
        (root / layout.CREATION / f"{number:012d}").mkdir(parents=True)

    assert ModelStore(root, mode="rw").mode == "rw"
