"""
What the volume's writer promises for each operation.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path, PurePosixPath
from threading import Barrier, Thread

import pytest

from kserve_pvc import StoreFormatError, StoreRootError, UnsafePathError, VolumeError
from kserve_pvc._volume import Mount, Volume, VolumeWriter, mount_of

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

    with pytest.raises(VolumeError, match="not there"):
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


def test_a_failed_close_fails_the_file(root, monkeypatch):
    """
    An error that only `close` reports, as network volumes do, is an error of the file.
    """
    writer = VolumeWriter(root)
    place = PurePosixPath("models/k/g/file")
    fd = writer.create(place)
    honest = os.close

    def close(number):
        honest(number)
        if number == fd:
            raise OSError(errno.EDQUOT, "over quota")

    monkeypatch.setattr(os, "close", close)

    with pytest.raises(OSError, match="did not fit"):
        writer.finish(fd, place)


def test_a_failed_fsync_is_never_repeated_on_the_same_descriptor(root, monkeypatch):
    """
    After `fsync` has failed once the descriptor is closed, because a second one would report success.
    """
    writer = VolumeWriter(root)
    place = PurePosixPath("models/k/g/file")
    fd = writer.create(place)
    synced = []

    def fsync(number):
        synced.append(number)
        raise OSError(errno.EIO, "lost")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(VolumeError):
        writer.finish(fd, place)

    assert synced == [fd]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_finished_files_cannot_be_opened_for_writing_by_mode(root):
    """
    A file of a model ends with the root's read bits and no write bits, whatever the umask.
    """
    root.chmod(0o775)
    writer, place = VolumeWriter(root), PurePosixPath("models/k/g/file")
    old = os.umask(0o077)
    try:
        writer.finish(writer.create(place), place)
    finally:
        os.umask(old)

    assert (root / place).stat().st_mode & 0o777 == 0o444
    assert (root / place).parent.stat().st_mode & 0o777 == 0o775


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
    assert volume.names(PurePosixPath("a/b")) == []
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


@pytest.mark.parametrize(("name", "reason"), [("missing", "does not exist"), ("file", "not a directory"), ("nul\0", "does not exist")])
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
