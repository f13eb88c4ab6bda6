"""
`Tree`: one new generation being written, file by file, and made durable at the end.
"""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import PurePosixPath

from kserve_pvc._volume.calls import CREATE_FLAGS, NO_SPACE, UNSUPPORTED, allocate, call_libc, has_libc, trim
from kserve_pvc._volume.making import widen_new_file
from kserve_pvc._volume.mount import LOCAL_TYPES, mount_of
from kserve_pvc._volume.writing import VolumeWriter

# Where `syncfs` reports what failed before it was called. An overlay does not hear of it from the layer below.
_REPORTING_TYPES = LOCAL_TYPES - {"overlay"}
_REPORTING_KERNEL = (5, 8)
_MOST_DIRECTORIES = 256
_MOST_SYNCED_ALONE = 100
# Where the other name of a file is lost to the node that wrote it, once another node has linked it and deleted the
# first.
_FALSE_LINK_TYPES = {"fuse.seaweedfs"}


class Tree:
    """
    A directory of model files being written by one process.

    Every directory is entered once. On a local file system small files are made durable together at the end: a few one
    by one, many by one `syncfs`, which also writes what others have there and so is worth it only for many. Elsewhere,
    where `syncfs` reaches only this node's kernel, every file is synced when it is finished. All of it is before the
    commit record, which is sufficient for durability: no process reads a generation without one.

    A write that fails in the background is reported once, to descriptors that were open then, and its page looks like a
    good one afterwards. So each file is synced through the descriptor that wrote it, or by a `syncfs` on one that is
    older than all of them.
    """

    def __init__(self, writer: VolumeWriter, place: PurePosixPath) -> None:
        self._writer = writer
        self._place = place
        self._guard = threading.Lock()
        self._directories: dict[PurePosixPath, int] = {}
        # Opened before the first write, so that an error of any write since is reported by `syncfs` on it.
        self._root = writer.open_directory(PurePosixPath())
        kind = mount_of(writer.root).type
        self._syncs_later = kind in LOCAL_TYPES
        self._syncs_at_once = kind in _REPORTING_TYPES and _kernel() >= _REPORTING_KERNEL and has_libc("syncfs")
        # Memory has no pieces to lay out, and reserving it costs as much as writing it.
        self._allocates = kind != "tmpfs"
        self._links = kind not in _FALSE_LINK_TYPES
        self._unsynced: dict[PurePosixPath, int] = {}
        self._needs_syncfs = False

    def create(self, path: PurePosixPath) -> int:
        """
        Create a new file and return its descriptor, open for reading and writing.
        """
        try:
            if (kept := self._directories.get(path.parent)) is not None:  # What most files of a large model find.
                return os.open(path.name, CREATE_FLAGS, self._writer.file_mode, dir_fd=kept)
            with self._directory(path.parent) as parent:
                return os.open(path.name, CREATE_FLAGS, self._writer.file_mode, dir_fd=parent)
        except OSError as error:
            raise self._writer.failure("creating", self._place / path, error) from error

    def allocate(self, fd: int, size_bytes: int) -> None:
        """
        Reserve room for a large file, and let others of the store's group take over what is there if this process dies.
        """
        widen_new_file(fd, self._writer.file_mode)
        if self._allocates:
            allocate(fd, size_bytes)

    def trim(self, fd: int, ranges: Sequence[tuple[int, int]]) -> None:
        """
        Give back what was reserved for an unfinished file outside of these ranges, which are in order, and let others
        of the store's group take them over.
        """
        widen_new_file(fd, self._writer.file_mode)
        trim(fd, ranges)

    def link(self, existing: PurePosixPath, path: PurePosixPath) -> bool:
        """
        Link a durable file that is no longer written into this tree. False if the volume cannot, or the file is gone.
        """
        if not self._links:
            return False
        try:
            with self._writer.open_parent(existing) as source, self._directory(path.parent) as parent:
                os.link(existing.name, path.name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
        except OSError as error:
            # GlusterFS reports a full volume when a file has about fifty names. If it is full, the copy fails too.
            if error.errno not in UNSUPPORTED | NO_SPACE and error.errno not in (errno.ENOENT, errno.ESTALE):
                raise
            return False
        return True

    def finish(self, fd: int, path: PurePosixPath, is_large: bool, is_executable: bool = False) -> bool:
        """
        Make a file immutable. Large files are made durable at once, while others are still being fetched.

        Its descriptor belongs to the tree afterwards, well or not. A failed `close` fails the file: a network volume
        may report a failed write nowhere else.

        Returns:
            Whether the file is durable already.
        """
        try:
            mode = self._writer.file_mode & 0o444
            with suppress(OSError):  # Object and SMB mounts refuse.
                os.fchmod(fd, mode | (mode >> 2 if is_executable else 0))
            if is_large or not self._syncs_later:
                _close_all([fd], syncs=True)
                return True
            self._sync_later(fd, path)
        except OSError as error:
            raise self._writer.failure("syncing", self._place / path, error) from error
        return False

    def _sync_later(self, fd: int, path: PurePosixPath) -> None:
        with self._guard:
            self._unsynced[path] = fd
            if not self._needs_syncfs and len(self._unsynced) <= _MOST_SYNCED_ALONE:
                return
            several = list(self._unsynced.values())
            self._unsynced.clear()
            self._needs_syncfs = self._syncs_at_once
        _close_all(several, syncs=not self._syncs_at_once)

    def remove(self, path: PurePosixPath) -> None:
        """
        Take a finished file out of the tree again, which was only needed to make others.
        """
        try:
            with self._directory(path.parent) as parent:
                os.unlink(path.name, dir_fd=parent)
        except OSError as error:
            raise self._writer.failure("removing", self._place / path, error) from error
        with self._guard:
            fd = self._unsynced.pop(path, None)
        if fd is not None:
            os.close(fd)  # It is not part of the model, so nothing that failed on it matters.

    def settle(self) -> None:
        """
        Make everything durable that is not yet.
        """
        with self._writer.translated("syncing", self._place):
            if self._needs_syncfs:
                call_libc("syncfs", self._root)
                return
            several = list(self._unsynced.values())
            self._unsynced.clear()
            _close_all(several, syncs=True)
        self._writer.sync_tree(self._place)

    def close(self) -> None:
        """
        Close all directories, and the files of a tree that failed.
        """
        for fd in (*self._directories.values(), self._root):
            os.close(fd)
        self._directories.clear()
        for fd in self._unsynced.values():
            with suppress(OSError):
                os.close(fd)
        self._unsynced.clear()

    @contextmanager
    def _directory(self, path: PurePosixPath) -> Iterator[int]:
        with self._guard:
            kept = self._directories.get(path)
            fd = self._writer.ensure_directory(self._place / path) if kept is None else kept
            # A model of many directories must not use up the descriptors.
            if kept is None and len(self._directories) < _MOST_DIRECTORIES:
                kept = self._directories[path] = fd
        try:
            yield fd
        finally:
            if kept is None:
                os.close(fd)


def _kernel() -> tuple[int, ...]:
    """The version of the running kernel as two numbers."""
    match = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _close_all(several: Iterable[int], *, syncs: bool) -> None:
    """Close files, durable if so requested: all of them also after an error, which is raised at the end."""
    failures: list[OSError] = []
    for fd in several:
        try:
            if syncs and not failures:
                os.fsync(fd)
        except OSError as error:
            failures.append(error)
        try:
            os.close(fd)
        except OSError as error:
            failures.append(error)
    if failures:
        raise failures.pop(0)  # Not kept: an error that is held by its own frame holds all that is open there.


@contextmanager
def writing_tree(writer: VolumeWriter, place: PurePosixPath) -> Iterator[Tree]:
    """
    Write a new tree of files, made durable when the `with` ends well.
    """
    writer.make_directory(place)
    tree = Tree(writer, place)
    try:
        yield tree
        tree.settle()
    finally:
        tree.close()
