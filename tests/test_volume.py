"""
What the volume's writer promises for each operation.
"""

from __future__ import annotations

import errno
import os
import time
from contextlib import nullcontext, suppress
from pathlib import Path, PurePosixPath
from threading import Barrier, Thread
from types import SimpleNamespace

import pytest

from kserve_pvc import StoreFormatError, StoreRootError, UnsafePathError, VolumeError
from kserve_pvc._volume import calls
from kserve_pvc._volume import tree as tree_module
from kserve_pvc._volume.calls import allocate, copy_range, write_all
from kserve_pvc._volume.mount import Mount, mount_of
from kserve_pvc._volume.reading import Volume
from kserve_pvc._volume.tree import Tree, writing_tree
from kserve_pvc._volume.writing import VolumeWriter

PLACE = PurePosixPath(".kserve-pvc/keys/k/log/000000000001.commit")
PRIVATE = PurePosixPath(".kserve-pvc/staging/g/record")


def publish_in_threads(root: Path, contents: list[bytes]) -> list[bool]:
    """
    Publish different contents under one name at the same moment.
    """
    barrier, won = Barrier(len(contents)), [False] * len(contents)

    def act(number: int) -> None:
        writer = VolumeWriter(root)
        barrier.wait()
        won[number] = writer.publish(PLACE, contents[number], PRIVATE.with_name(f"record-{number}"))

    threads = [Thread(target=act, args=(number,)) for number in range(len(contents))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return won


@pytest.mark.parametrize("round_number", range(10))
def test_one_of_many_publishes_and_its_content_stays(root, round_number):
    """
    Among simultaneous writers of one name exactly one wins, and the file is its content.
    """
    contents = [f"{round_number}-{number}".encode() for number in range(8)]

    won = publish_in_threads(root, contents)

    assert won.count(True) == 1
    assert Volume(root).read(PLACE, 100) == contents[won.index(True)]
    assert list((root / PRIVATE).parent.iterdir()) == []


def test_publishing_the_same_again_is_true_and_other_content_false(root):
    """
    A record that is already there with this content counts as published, as after a lost reply.
    """
    writer = VolumeWriter(root)

    assert writer.publish(PLACE, b"mine", PRIVATE)
    assert writer.publish(PLACE, b"mine", PRIVATE)
    assert not writer.publish(PLACE, b"other", PRIVATE)
    assert writer.read(PLACE, 100) == b"mine"


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS])
def test_without_hard_links_a_record_is_created_exclusively(root, monkeypatch, code):
    """
    On a volume that has no hard links publishing still excludes.
    """

    def link(*_args, **_kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", link)
    writer = VolumeWriter(root)

    assert writer.publish(PLACE, b"first", PRIVATE)
    assert not writer.publish(PLACE, b"second", PRIVATE)
    assert writer.read(PLACE, 100) == b"first"


def test_a_link_that_was_made_although_it_failed_counts(root, monkeypatch):
    """
    When the reply of a link is lost, its effect is looked for, and the record is published.
    """
    honest = os.link

    def link(*args, **kwargs):
        honest(*args, **kwargs)
        raise OSError(errno.EIO, "reply lost")

    monkeypatch.setattr(os, "link", link)

    assert VolumeWriter(root).publish(PLACE, b"mine", PRIVATE)


def test_a_link_that_reports_success_and_did_nothing_is_an_error(root, monkeypatch):
    """
    A record that cannot be read back is not published, whatever the volume said.
    """
    monkeypatch.setattr(os, "link", lambda *_args, **_kwargs: None)

    with pytest.raises(VolumeError, match="the file is missing"):
        VolumeWriter(root).publish(PLACE, b"mine", PRIVATE)


def test_a_number_is_reserved_once(root):
    """
    Of many who reserve a number at the same moment one gets it.
    """
    barrier, won = Barrier(8), []

    def act() -> None:
        writer = VolumeWriter(root)
        barrier.wait()
        won.append(writer.reserve(PurePosixPath(".kserve-pvc/keys/k/slots/000000000001")))

    threads = [Thread(target=act) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(won) == [False] * 7 + [True]


@pytest.fixture
def unsettled(monkeypatch):
    """
    Directories that others have just made fail to open, so many times, as they do for a moment on GlusterFS.
    """
    left, pauses, honest = [], [], os.open

    def open_(path, flags, mode=0o777, *, dir_fd=None):
        if left and dir_fd is not None:
            raise OSError(left.pop(), "not yet", path)
        return honest(path, flags, mode, dir_fd=dir_fd)

    def set_(code: int, times: int) -> list[float]:
        monkeypatch.setattr(os, "open", open_)
        monkeypatch.setattr(time, "sleep", pauses.append)
        left.extend([code] * times)
        return pauses

    return set_


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ESTALE])
def test_a_directory_that_is_only_just_being_made_is_tried_again(root, unsettled, nothing_is_left_open, code):
    """
    Errors that pass are waited for, and the number is reserved.
    """
    pauses = unsettled(code, 5)

    assert VolumeWriter(root).reserve(PurePosixPath(".kserve-pvc/keys/k/claims/000000000001"))

    assert pauses


def test_a_directory_that_is_only_just_being_made_is_listed(root, unsettled, monkeypatch, nothing_is_left_open):
    """
    A handle that is stale for a moment is no error of a listing either.
    """
    (root / "a" / "b").mkdir(parents=True)
    honest = os.listdir

    def listdir(place):
        if isinstance(place, str):
            raise OSError(errno.ESTALE, "not yet", place)
        return honest(place)

    monkeypatch.setattr(os, "listdir", listdir)
    unsettled(errno.ESTALE, 3)

    names = Volume(root).list_names(PurePosixPath("a"))
    monkeypatch.undo()

    assert names == ["b"]


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ESTALE])
def test_a_directory_that_never_opens_is_an_error(root, unsettled, nothing_is_left_open, code):
    """
    Errors that stay are told, after a second or so.
    """
    pauses = unsettled(code, 1000)

    with pytest.raises(VolumeError, match="reserving a number"):
        VolumeWriter(root).reserve(PurePosixPath(".kserve-pvc/keys/k/claims/000000000001"))

    assert 0.5 < sum(pauses) < 2


GENERATION = PurePosixPath("models/k/g")


@pytest.fixture
def nothing_is_left_open():
    """
    Whatever happens, no descriptor is left over.
    """
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) <= before


def in_a_tree(root: Path) -> Tree:
    """
    A tree that is written on a volume where each file is synced by itself.
    """
    writer = VolumeWriter(root)
    writer.make_directory(GENERATION)
    tree = Tree(writer, GENERATION)
    tree._syncs_at_once = False
    return tree


@pytest.mark.parametrize("is_large", [True, False])
def test_a_failed_close_fails_the_file(root, monkeypatch, is_large, nothing_is_left_open):
    """
    An error that only `close` reports, as network volumes do, is an error of the file.
    """
    tree = in_a_tree(root)
    fd = tree.create(PurePosixPath("file"))
    honest = os.close

    def close(number):
        honest(number)
        if number == fd:
            raise OSError(errno.EDQUOT, "over quota")

    monkeypatch.setattr(os, "close", close)

    def finish() -> None:
        tree.finish(fd, PurePosixPath("file"), is_large)
        tree.settle()

    with pytest.raises(OSError, match="quota is used up"):
        finish()
    monkeypatch.undo()
    tree.close()


def test_a_failed_fsync_is_never_repeated_on_the_same_descriptor(root, monkeypatch, nothing_is_left_open):
    """
    After `fsync` has failed once the descriptor is closed, because a second one would report success.
    """
    tree = in_a_tree(root)
    fd = tree.create(PurePosixPath("file"))
    synced = []

    def fsync(number):
        synced.append(number)
        raise OSError(errno.EIO, "lost")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(VolumeError):
        tree.finish(fd, PurePosixPath("file"), True)
    monkeypatch.undo()

    assert synced == [fd]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    tree.close()


def test_finished_files_cannot_be_opened_for_writing_by_mode(root):
    """
    A file of a model ends with the root's read bits and no write bits, whatever the umask.
    """
    root.chmod(0o775)
    old = os.umask(0o077)
    try:
        with writing_tree(VolumeWriter(root), GENERATION) as tree:
            tree.finish(tree.create(PurePosixPath("below/file")), PurePosixPath("below/file"), False)
    finally:
        os.umask(old)

    assert (root / GENERATION / "below/file").stat().st_mode & 0o777 == 0o444
    assert {(root / GENERATION / below).stat().st_mode & 0o777 for below in (".", "below")} == {0o775}


def test_a_tree_of_many_directories_holds_few_descriptors(root, monkeypatch, nothing_is_left_open):
    """
    Directories are kept open up to a number, and all files are where they belong.
    """
    monkeypatch.setattr(tree_module, "_MOST_DIRECTORIES", 5)
    writer = VolumeWriter(root)
    monkeypatch.setattr(tree_module, "_MOST_SYNCED_ALONE", 3)
    before = len(os.listdir("/proc/self/fd"))

    with writing_tree(writer, GENERATION) as tree:
        for number in range(100):
            path = PurePosixPath(f"{number % 20}/deep/{number}")
            fd = tree.create(path)
            write_all(fd, b"%d" % number, 0)
            tree.finish(fd, path, False)
        most = len(os.listdir("/proc/self/fd"))

    assert most <= before + 6 + 3
    assert {path.name: path.read_text() for path in (root / GENERATION).rglob("*") if path.is_file()} == {
        str(n): str(n) for n in range(100)
    }


def test_a_tree_is_entered_by_many_threads(root, nothing_is_left_open):
    """
    Threads that need the same new directories at the same moment all get them.
    """
    barrier, failed = Barrier(8), []

    def act(number: int, tree: Tree) -> None:
        barrier.wait()
        try:
            for part in range(10):
                path = PurePosixPath(f"{part}/{part}/{number}")
                tree.finish(tree.create(path), path, False)
        except BaseException as error:
            failed.append(error)

    with writing_tree(VolumeWriter(root), GENERATION) as tree:
        threads = [Thread(target=act, args=(number, tree)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert failed == []
    assert len([path for path in (root / GENERATION).rglob("*") if path.is_file()]) == 80


@pytest.mark.parametrize("planted", ["directory", "file"])
def test_a_link_that_was_planted_leads_a_tree_nowhere(root, tmp_path, planted, nothing_is_left_open):
    """
    Neither a directory nor a file of a tree is written through a link.
    """
    outside = tmp_path / "outside"
    outside.mkdir()
    place = root / GENERATION
    place.mkdir(parents=True)
    (place / ("below" if planted == "directory" else "file")).symlink_to(
        outside if planted == "directory" else outside / "file"
    )

    with writing_tree(VolumeWriter(root), GENERATION) as tree, pytest.raises((UnsafePathError, VolumeError)):
        tree.create(PurePosixPath("below/file" if planted == "directory" else "file"))

    assert list(outside.iterdir()) == []


def test_a_file_is_created_once(root):
    """
    What is there already is never opened for writing.
    """
    with writing_tree(VolumeWriter(root), GENERATION) as tree:
        os.close(tree.create(PurePosixPath("file")))
        with pytest.raises(VolumeError):
            tree.create(PurePosixPath("file"))


@pytest.mark.parametrize("at_once", ["many", "few", "never"])
def test_a_tree_is_durable_when_it_ends_well(root, monkeypatch, at_once):
    """
    Where one sync reaches the medium it is made once for many files, else every file and directory is synced; a tree
    that failed needs none.
    """
    monkeypatch.setattr(tree_module, "_MOST_SYNCED_ALONE", 0 if at_once == "many" else 1)
    synced, honest = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), honest(fd)))
    monkeypatch.setattr(tree_module, "call_libc", lambda name, *arguments: synced.append(name))
    writer, path = VolumeWriter(root), PurePosixPath("below/file")

    def write(place: PurePosixPath, error: Exception | None = None) -> set[str]:
        with suppress(ZeroDivisionError), writing_tree(writer, place) as tree:
            tree._syncs_later = at_once != "never"
            tree.finish(tree.create(path), path, False)
            if at_once != "never":
                synced.clear()
            made.append(tree)
            if error is not None:
                raise error
        return set(synced)

    made: list[Tree] = []
    well, failed = write(GENERATION), write(GENERATION.with_name("h"), ZeroDivisionError())

    above = {str(root / p) for p in (".", "models", "models/k", "models/k/g", "models/k/g/below")}
    file = {str(root / "models/k/g/below/file")}
    assert well == {"syncfs"} if at_once == "many" else well >= above | file
    assert "syncfs" not in failed
    assert at_once == "never" or failed == set()


def test_a_file_is_synced_by_itself_where_nothing_else_does(root, monkeypatch):
    """
    On a network volume each file is synced as it ends; on a local one only large files are.
    """
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name))
    tree = in_a_tree(root)
    for at_once in (False, True):
        tree._syncs_later = at_once
        for is_large in (False, True):
            path = PurePosixPath(f"{'local' if at_once else 'network'}-{'large' if is_large else 'small'}")
            tree.finish(tree.create(path), path, is_large)
    tree.close()

    assert [name for name in synced if "-" in name] == ["network-small", "network-large", "local-large"]


def test_an_error_of_the_sync_fails_the_tree(root, monkeypatch, nothing_is_left_open):
    """
    What the medium did not take is no model.
    """

    def fail(name, *arguments):
        raise OSError(errno.EIO, "lost")

    monkeypatch.setattr(tree_module, "call_libc", fail)
    monkeypatch.setattr(tree_module, "_MOST_SYNCED_ALONE", 0)
    tree = in_a_tree(root)
    tree._syncs_at_once = True
    tree.finish(tree.create(PurePosixPath("small")), PurePosixPath("small"), False)

    with pytest.raises(VolumeError):
        tree.settle()
    tree.close()


def test_a_file_gets_a_second_name_in_a_tree(root, nothing_is_left_open):
    """
    A link is the same file, made in directories that are made for it.
    """
    (root / "models/k/old/below").mkdir(parents=True)
    (root / "models/k/old/below/file").write_text("content")
    with writing_tree(VolumeWriter(root), GENERATION) as tree:
        said = tree.link(PurePosixPath("models/k/old/below/file"), PurePosixPath("deep/down/file"))

    assert said is True
    assert (root / GENERATION / "deep/down/file").samefile(root / "models/k/old/below/file")


def test_a_small_file_is_synced_by_the_descriptor_that_wrote_it(root, monkeypatch, nothing_is_left_open):
    """
    A failed write is reported to descriptors that were open then: one that was opened later may learn nothing of it.
    """
    synced, honest = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(fd), honest(fd)))
    with writing_tree(VolumeWriter(root), GENERATION) as tree:
        tree._syncs_later = True
        fd = tree.create(PurePosixPath("file"))
        tree.finish(fd, PurePosixPath("file"), False)
        synced.clear()

    assert fd in synced


@pytest.mark.parametrize(
    ("kind", "release", "expected"),
    [("ext4", "6.1.0", True), ("ext4", "4.18.0-553", False), ("overlay", "6.1.0", False), ("xfs", "5.8", True)],
)
def test_one_sync_for_all_is_made_where_it_reports_errors(root, monkeypatch, kind, release, expected):
    """
    `syncfs` reports failed writes since Linux 5.8, and on an overlay it reports none: there each file is synced.
    """
    monkeypatch.setattr(tree_module, "mount_of", lambda place: Mount(type=kind, options=()))
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release=release))
    monkeypatch.setattr(tree_module, "_MOST_SYNCED_ALONE", 0)
    calls, synced = [], []
    monkeypatch.setattr(tree_module, "call_libc", lambda name, *arguments: calls.append(name))
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name))
    with writing_tree(VolumeWriter(root), GENERATION) as tree:
        tree.finish(tree.create(PurePosixPath("file")), PurePosixPath("file"), False)

    assert (calls == ["syncfs"], "file" in synced) == (expected, not expected)


def test_a_file_that_is_gone_gets_no_second_name(root, nothing_is_left_open):
    """
    What was collected meanwhile is no error.
    """
    with writing_tree(VolumeWriter(root), GENERATION) as tree:
        assert tree.link(PurePosixPath("models/k/old/file"), PurePosixPath("file")) is False


@pytest.mark.parametrize("code", [errno.EPERM, errno.EMLINK, errno.EXDEV, errno.ENOTSUP, errno.ENOSYS, errno.ESTALE])
def test_a_volume_without_links_says_so(root, monkeypatch, code):
    """
    Where no second name can be given the answer is no, and other failures are told.
    """
    (root / "old").write_text("content")

    def link(*_args, **_kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", link)
    with writing_tree(VolumeWriter(root), GENERATION) as tree:
        assert tree.link(PurePosixPath("old"), PurePosixPath("file")) is False
        code = errno.EIO
        with pytest.raises(OSError, match="Input/output"):
            tree.link(PurePosixPath("old"), PurePosixPath("file"))


@pytest.mark.parametrize("planted", ["file", "directory"])
def test_no_second_name_is_given_through_a_link(root, tmp_path, planted, nothing_is_left_open):
    """
    A link on the way to the existing file is not followed: nothing from outside gets into a model.
    """
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_text("secret")
    (root / "models/k").mkdir(parents=True)
    if planted == "directory":
        (root / "models/k/old").symlink_to(tmp_path / "outside")
    else:
        (root / "models/k/old").mkdir()
        (root / "models/k/old/file").symlink_to(tmp_path / "outside/file")

    with suppress(OSError, ValueError), writing_tree(VolumeWriter(root), GENERATION) as tree:
        tree.link(PurePosixPath("models/k/old/file"), PurePosixPath("file"))

    found = root / GENERATION / "file"
    assert found.is_symlink() or not found.exists()
    assert (tmp_path / "outside/file").stat().st_nlink == 1


def test_room_is_reserved_without_a_byte(root):
    """
    A file keeps its length, so that a file of a dead writer ends where its writing did.
    """
    with open(root / "file", "w+b") as file:
        allocate(file.fileno(), 1_000_000)
        found = os.fstat(file.fileno())

    assert found.st_size == 0


@pytest.mark.parametrize(
    ("code", "is_told"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EOPNOTSUPP, False), (errno.EIO, False)]
)
def test_only_a_full_volume_fails_a_reservation(root, monkeypatch, code, is_told):
    """
    A volume that cannot reserve is written without; one that is full says so at once.
    """

    def call(name, *arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(calls, "call_libc", call)
    with (
        open(root / "file", "w+b") as file,
        pytest.raises(OSError, match=os.strerror(code)) if is_told else nullcontext(),
    ):
        allocate(file.fileno(), 1)


def test_a_full_volume_is_noticed_before_the_first_byte(mount):
    """
    On a real full volume a reservation that does not fit fails as it is made.
    """
    place = mount("-t", "tmpfs", "-o", "size=1m", "tmpfs")
    with open(place / "file", "w+b") as file, pytest.raises(OSError, match="No space") as caught:
        allocate(file.fileno(), 2 * 2**20)

    assert caught.value.errno == errno.ENOSPC


WAYS = ["kernel", "exdev", "unsupported", "nothing", "short", "fault"]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """
    How `copy_file_range` answers: as this kernel does, with an error, with nothing, or with less than was asked for.
    """
    honest = os.copy_file_range

    def copy(source, target, count, at, to):
        if request.param in ("exdev", "unsupported", "fault"):
            code = {"exdev": errno.EXDEV, "unsupported": errno.ENOSYS, "fault": errno.EIO}[request.param]
            raise OSError(code, os.strerror(code))
        return 0 if request.param == "nothing" else honest(source, target, min(count, 7), at, to)

    if request.param != "kernel":
        monkeypatch.setattr(os, "copy_file_range", copy)
    monkeypatch.setattr(calls, "_PIECE_BYTES", 11)


@pytest.mark.parametrize(("start", "stop"), [(0, 100), (0, 0), (1, 99), (37, 38), (100, 100)])
def test_a_range_is_copied_to_its_place(root, way, start, stop):
    """
    However the volume copies, exactly the range arrives, in its place, and nothing else changes.
    """
    (root / "a").write_bytes(bytes(range(100)))
    (root / "b").write_bytes(b"x" * 200)
    with open(root / "a", "rb") as source, open(root / "b", "r+b") as target:
        said = copy_range(source.fileno(), target.fileno(), start, stop)

    assert said is True
    assert (root / "b").read_bytes() == b"x" * start + bytes(range(start, stop)) + b"x" * (200 - stop)


@pytest.mark.parametrize(("start", "stop"), [(0, 101), (99, 200), (100, 101), (150, 160)])
def test_a_source_that_ends_early_is_told(root, way, start, stop):
    """
    A file that is shorter than the range gives False, whichever way was taken.
    """
    (root / "a").write_bytes(bytes(100))
    with open(root / "a", "rb") as source, open(root / "b", "w+b") as target:
        assert copy_range(source.fileno(), target.fileno(), start, stop) is False


def test_a_full_volume_is_told_by_a_copy(root, monkeypatch):
    """
    What no other way of copying cures is raised.
    """

    def copy(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", copy)
    (root / "a").write_bytes(bytes(100))
    with open(root / "a", "rb") as source, open(root / "b", "w+b") as target, pytest.raises(OSError, match="No space"):
        copy_range(source.fileno(), target.fileno(), 0, 100)


def test_a_copy_goes_from_one_volume_to_another(root, mount):
    """
    Between real file systems that share nothing the bytes are copied one by one.
    """
    place = mount("-t", "tmpfs", "tmpfs")
    (root / "a").write_bytes(bytes(range(256)) * 100)
    with open(root / "a", "rb") as source, open(place / "b", "w+b") as target:
        assert copy_range(source.fileno(), target.fileno(), 0, 25_600)

    assert (place / "b").read_bytes() == bytes(range(256)) * 100


@pytest.mark.parametrize("kind", ["link", "fifo", "directory", "huge"])
def test_only_small_regular_files_are_read(root, kind):
    """
    Whatever else stands where a record belongs is refused at once, without following or waiting.
    """
    place = root / "record"
    {
        "link": lambda: place.symlink_to(root / "elsewhere"),
        "fifo": lambda: os.mkfifo(place),
        "directory": place.mkdir,
        "huge": lambda: place.write_bytes(b"x" * 101),
    }[kind]()

    with pytest.raises(StoreFormatError):
        Volume(root).read(PurePosixPath("record"), 100)


def test_what_is_not_there_reads_as_none_and_lists_as_empty(root):
    """
    Absence is no error.
    """
    volume = Volume(root)

    assert volume.read(PurePosixPath("a/b"), 10) is None
    assert volume.list_names(PurePosixPath("a/b")) == []
    assert list(volume.tree(PurePosixPath("a/b"))) == []


@pytest.mark.parametrize("place", [".kserve-pvc/keys/k", ".kserve-pvc/store.json", "names", ""])
def test_only_what_belongs_to_one_generation_is_thrown_away(root, place):
    """
    Neither the log nor the settings nor the root itself can be discarded or deleted.
    """
    writer = VolumeWriter(root)

    with pytest.raises(UnsafePathError):
        writer.discard(PurePosixPath(place))
    with pytest.raises(UnsafePathError):
        writer.delete_trash(PurePosixPath(place))


def test_deleting_follows_no_link(root, tmp_path):
    """
    A link inside what is thrown away is deleted itself, and its target stays.
    """
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("here")
    model = root / "models" / "k" / "g"
    model.mkdir(parents=True)
    (model / "link").symlink_to(outside)
    writer = VolumeWriter(root)

    trashed = writer.discard(PurePosixPath("models/k/g"))
    assert trashed is not None
    writer.delete_trash(trashed)

    assert not (root / trashed).exists()
    assert (outside / "precious").read_text() == "here"


def test_what_somebody_holds_open_may_stay_in_the_trash(root, monkeypatch):
    """
    A directory that does not become empty, as on NFS while a file in it is open, is left for the next time.
    """
    (root / "models" / "k" / "g").mkdir(parents=True)
    (root / "models" / "k" / "g" / "file").write_text("x")
    writer = VolumeWriter(root)
    trashed = writer.discard(PurePosixPath("models/k/g"))
    assert trashed is not None
    honest = os.unlink

    def unlink(name, *, dir_fd):
        (root / trashed / ".nfs0001").write_text("x")
        honest(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", unlink)
    writer.delete_trash(trashed)
    left = [path.name for path in (root / trashed).iterdir()]
    monkeypatch.undo()
    writer.empty_trash(older_than=0)

    assert left == [".nfs0001"]
    assert not (root / trashed).exists()


def test_the_trash_keeps_what_is_young(root):
    """
    Emptying the trash spares what was thrown away more recently than asked for.
    """
    (root / "models" / "k" / "g").mkdir(parents=True)
    writer = VolumeWriter(root)
    trashed = writer.discard(PurePosixPath("models/k/g"))
    assert trashed is not None

    writer.empty_trash(older_than=60)
    kept = (root / trashed).is_dir()
    writer.empty_trash(older_than=0)

    assert kept
    assert not (root / trashed).exists()


@pytest.mark.parametrize(
    ("name", "reason"), [("missing", "does not exist"), ("file", "not a directory"), ("nul\0", "does not exist")]
)
def test_a_root_that_cannot_be_one_is_refused(tmp_path, name, reason):
    """
    A missing root is an error and is not created: it usually means that the volume is not mounted.
    """
    (tmp_path / "file").write_text("")

    with pytest.raises(StoreRootError, match=reason):
        Volume(tmp_path / name)
    with pytest.raises(StoreRootError, match="the path is empty"):
        Volume("")
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize(
    ("kind", "options", "network", "delay"),
    [
        ("ext4", "rw", False, 0),
        ("tmpfs", "rw", False, 0),
        ("nfs4", "rw,vers=4.2", True, 120),
        ("nfs", "rw,acdirmax=30", True, 60),
        ("nfs4", "rw,actimeo=5", True, 10),
        ("nfs4", "rw,noac", True, 0),
        ("cifs", "rw,actimeo=30", True, 60),
        ("fuse.juicefs", "rw", True, 2),
        ("ceph", "rw", True, 2),
    ],
)
def test_the_visibility_delay_follows_from_the_mount(kind, options, network, delay):
    """
    Deletions wait twice the time for which another node may remember a directory.
    """
    mount = Mount(type=kind, options=tuple(options.split(",")))

    assert (mount.is_network, mount.visibility_delay) == (network, delay)


def test_the_mount_of_a_path_is_the_innermost(mount):
    """
    A path on a tmpfs is on a tmpfs, though the mounts above are others.
    """
    place = mount("-t", "tmpfs", "tmpfs", at="with blank")
    (place / "below").mkdir()

    assert mount_of(place / "below").type == "tmpfs"


def test_a_directory_that_a_node_believes_missing_is_looked_for_again(root, monkeypatch):
    """
    A listing by path that says "not there", as NFS does from memory, is repeated from the root down.
    """
    (root / "log").mkdir()
    (root / "log" / "1").touch()
    honest = os.listdir

    def forgetful(place: object) -> list[str]:
        if not isinstance(place, int):
            raise FileNotFoundError(errno.ENOENT, "not there", place)
        return honest(place)

    monkeypatch.setattr(os, "listdir", forgetful)

    assert Volume(root).list_names(PurePosixPath("log")) == ["1"]
