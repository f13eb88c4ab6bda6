"""
A volume that fails to write for a moment: what was written then is never proven from the page cache.

After a failed write the kernel reports the error once. The page stays in the cache, clean and as it was written, so
that it is read back well and synced well, and is gone after the next start.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath

import pytest
from memory import MemorySource
from trees import read_tree, write_files

import kserve_pvc._volume.tree as tree_module
from kserve_pvc import ModelStore, StoreError, VolumeError
from kserve_pvc._download.journal import Journal
from kserve_pvc._download.transfer import Transfer
from kserve_pvc._format import layout
from kserve_pvc._format.records import PartNote
from kserve_pvc._volume.mount import Mount
from kserve_pvc._volume.writing import VolumeWriter

URI = "s3://bucket/model"
FEW = {"config.json": b"{}", "below/tokenizer.json": b"t" * 3000, "empty": b""}
MANY = {f"{number % 3}/{number:03}": b"%d" % number for number in range(130)}
LARGE = {**FEW, "weights.bin": bytes(range(256)) * 40_000}


class FailingMedium:
    """
    The system calls of a process that make data durable, some of which fail. With the one that fails, all that was not
    durable yet is lost: `lost` are the inodes.

    Nothing real fails at a chosen call and only there; `test_a_device_that_fails_for_a_moment` has a real device.

    Args:
        is_due: Chooses by its name the file whose sync fails.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        root: Path,
        code: int,
        *,
        times: int = 1,
        is_due: Callable[[str], bool] = lambda name: True,
    ) -> None:
        self._models = root / "models"
        self._code = code
        self._left = times
        self._is_due = is_due
        self._honest = {"fsync": os.fsync, "fdatasync": os.fdatasync}
        self._honest_libc = tree_module.call_libc
        self._durable: set[int] = set()
        self._guard = threading.Lock()
        self._kept: list[int] = []  # So that no other file gets the number of one that was deleted.
        self.lost: set[int] = set()
        monkeypatch.setattr(os, "fsync", partial(self._sync, "fsync"))
        monkeypatch.setattr(os, "fdatasync", partial(self._sync, "fdatasync"))
        monkeypatch.setattr(tree_module, "call_libc", self._call_libc)

    def close(self) -> None:
        for fd in self._kept:
            os.close(fd)

    def _sync(self, call: str, fd: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        with self._guard:
            if path.is_relative_to(self._models) and path.is_file() and self._is_due(path.name):
                self._fail_if_due()
            self._honest[call](fd)
            self._durable.add(os.fstat(fd).st_ino)

    def _call_libc(self, name: str, *arguments: int) -> None:
        if name == "syncfs":
            self._fail_if_due()
            self._durable |= inodes(self._models)
        self._honest_libc(name, *arguments)

    def _fail_if_due(self) -> None:
        if not self._left:
            return
        self._left -= 1
        for path in self._models.rglob("*"):
            if path.is_file() and path.stat().st_ino not in self._durable:
                self._kept.append(os.open(path, os.O_RDONLY))
                self.lost.add(path.stat().st_ino)
        raise OSError(self._code, os.strerror(self._code))


def inodes(place: Path) -> set[int]:
    return {path.stat().st_ino for path in place.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["ext4", "nfs4"])
@pytest.mark.parametrize("code", [errno.EIO, errno.EDQUOT], ids=["EIO", "EDQUOT"])
@pytest.mark.parametrize("files", [FEW, MANY, LARGE], ids=["few", "many", "large"])
@pytest.mark.parametrize("digest", ["sha256", "none"])
@pytest.mark.parametrize("at", ["any", "the last"])
def test_what_could_not_be_written_is_in_no_model(root, monkeypatch, kind, code, files, digest, at):
    """
    Whatever call reports it, the same call or the next one writes the bytes into new files, and all that was lost stays
    out.
    """
    monkeypatch.setattr(tree_module, "mount_of", lambda place: Mount(type=kind, options=()))
    source = MemorySource({URI: files})
    last = "weights.bin" if files is LARGE else "config.json"
    is_due = (lambda name: True) if at == "any" else (lambda name: name == last)
    medium = FailingMedium(monkeypatch, root, code, is_due=is_due)

    for _ in range(2):
        with suppress(StoreError):
            store = ModelStore(root, mode="rw", backends={"s3": source}, digest=digest, part_bytes=1 << 20)
            model = store.ensure(URI, progress=False)

    monkeypatch.undo()
    assert medium.lost or (files is MANY and at != "any")
    assert inodes(model.path) & medium.lost == set()
    assert read_tree(model.path) == files
    medium.close()


@pytest.mark.parametrize("marks", [True, False], ids=["noted", "could not be noted"])
@pytest.mark.parametrize("files", [FEW, MANY, LARGE], ids=["few", "many", "large"])
def test_a_later_call_copies_what_could_not_be_written(root, monkeypatch, files, marks):
    """
    Leftovers of a call that saw an error are proven and copied, never linked: also where it could not leave word.
    """
    with monkeypatch.context() as patch:
        medium = FailingMedium(patch, root, errno.EIO, times=1000)
        if not marks:
            patch.setattr(Journal, "spoil", lambda journal: None)
        with pytest.raises(VolumeError):
            ModelStore(root, mode="rw", backends={"s3": MemorySource({URI: files})}).ensure(URI, progress=False)

    model = ModelStore(root, mode="rw", backends={"s3": MemorySource({URI: files})}).ensure(URI, progress=False)

    assert medium.lost
    assert inodes(model.path) & medium.lost == set()
    assert read_tree(model.path) == files
    medium.close()


def test_a_spoiled_generation_lends_no_inode(root, monkeypatch):
    """
    Not even a file that was synced without an error: the volume failed while it was written.
    """
    source = MemorySource({URI: LARGE})
    honest = Transfer.run

    def run(transfer: Transfer, pages: object) -> None:
        honest(transfer, pages)
        raise VolumeError(str(root), "writing", "Input/output error")

    store = ModelStore(root, mode="rw", backends={"s3": source})
    with monkeypatch.context() as patch:
        patch.setattr(Transfer, "run", run)
        with pytest.raises(VolumeError):
            store.ensure(URI, progress=False)
    left = inodes(root / "models")
    # So that no other file gets the number of one that is collected.
    kept = [os.open(path, os.O_RDONLY) for path in (root / "models").rglob("*") if path.is_file()]
    assert list((root / layout.STAGING).glob("*/spoiled"))

    model = store.ensure(URI, progress=False)

    for fd in kept:
        os.close(fd)
    assert inodes(model.path) & left == set()
    assert (read_tree(model.path), model.bytes_fetched) == (LARGE, 0)


def test_notes_of_an_older_version_lend_no_inode(root, monkeypatch):
    """
    They do not say whether a file is durable, so it is copied.
    """
    monkeypatch.setattr(
        "kserve_pvc._download.journal.PartNote",
        lambda is_durable, **fields: PartNote(**fields),
    )
    leave_without_a_commit(root, monkeypatch)
    left = inodes(root / "models")

    model = ModelStore(root, mode="rw", backends={"s3": MemorySource({URI: LARGE})}).ensure(URI, progress=False)

    assert inodes(model.path) & left == set()
    assert (read_tree(model.path), model.bytes_fetched) == (LARGE, 0)


def test_what_a_process_left_whole_and_durable_is_linked(root, monkeypatch):
    """
    A large file that was synced before it was noted needs no second copy; small ones are copied.
    """
    leave_without_a_commit(root, monkeypatch)
    (large,) = (path.stat().st_ino for path in (root / "models").rglob("weights.bin"))
    left = inodes(root / "models")

    model = ModelStore(root, mode="rw", backends={"s3": MemorySource({URI: LARGE})}).ensure(URI, progress=False)

    assert inodes(model.path) & left == {large}
    assert (read_tree(model.path), model.bytes_fetched) == (LARGE, 0)


def leave_without_a_commit(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Leave what a process leaves that fails when it has written all files.
    """

    honest = Transfer.run

    def run(transfer: Transfer, pages: object) -> None:
        honest(transfer, pages)
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(Transfer, "run", run)
        store = ModelStore(root, mode="rw", backends={"s3": MemorySource({URI: LARGE})})
        with pytest.raises(ZeroDivisionError):
            store.ensure(URI, progress=False)


@pytest.fixture
def thin(tmp_path, mount, tool):
    """
    An ext4 volume on a thin device: metadata have their place, and data only as long as the pool below has room.
    """
    for name in ("mkfs.ext4", "fstrim"):
        tool(name)
    pool = mount("-t", "tmpfs", "-o", "size=80m", "tmpfs", at="pool")
    image = pool / "image"
    with open(image, "wb") as made:
        made.truncate(64 << 20)
        options = "lazy_itable_init=0,lazy_journal_init=0"
        subprocess.run(["mkfs.ext4", "-q", "-E", options, "-J", "size=4", str(image)], check=True)
        os.posix_fallocate(made.fileno(), 0, 64 << 20)
    place = mount("-o", "loop", str(image), at="volume")
    subprocess.run(["fstrim", str(place)], check=True)
    return pool, place


def write_back(models: Path) -> None:
    """
    Let the kernel write what it has of these files, as it does by itself after a while. What fails is forgotten.
    """
    for path in models.rglob("*.bin"):
        fd = os.open(path, os.O_RDONLY)
        ctypes.CDLL(None).sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), 2)  # SYNC_FILE_RANGE_WRITE
        os.close(fd)
    time.sleep(0.5)


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize("count", [20, 150], ids=["few", "many"])
def test_a_device_that_fails_for_a_moment(tmp_path, thin, monkeypatch, count):
    """
    On a full thin device that has room again after the first error, a model that was returned is whole after a remount.
    """
    pool, place = thin
    files = {f"{number % 3}/{number:03}.bin": b"%03d" % number * 10_000 for number in range(count)}
    files["zeros.bin"] = b"z" * (9 << 20)
    write_files(tmp_path / "source", files)
    store = ModelStore(place, mode="rw", lease_seconds=1)
    free = os.statvfs(pool)
    ballast = pool / "ballast"
    ballast.write_bytes(bytes(free.f_bavail * free.f_frsize - (600 << 10)))
    failed: list[OSError] = []

    def failure(writer: VolumeWriter, operation: str, which: PurePosixPath, error: OSError) -> Exception:
        failed.append(error)
        if len(failed) == 1:
            write_back(place / "models")
            ballast.unlink()
        return VolumeError(str(which), operation, str(error))

    # The device is full for this kernel, and unable to write for others: then the same call tries again.
    monkeypatch.setattr(VolumeWriter, "failure", failure)

    model = store.ensure(f"file://{tmp_path}/source", progress=False)

    assert failed
    failed.clear()
    del store
    gc.collect()  # Or else the root is open, and cannot be unmounted.
    subprocess.run(["umount", str(place)], check=True)
    subprocess.run(["mount", "-o", "loop", str(pool / "image"), str(place)], check=True)
    assert read_tree(model.path) == files
    assert ModelStore(place).verify(model.uri, "full").ok
