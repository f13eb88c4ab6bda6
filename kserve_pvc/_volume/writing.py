"""
The only module that creates, renames or deletes anything under a store's root.

`Volume` can only look. `VolumeWriter` adds writing, and a read-only store never constructs one. A writer walks from
the root by directory descriptors that follow no symbolic link, so a link planted on the volume leads nowhere.

Rules of network volumes that shape this code: names are looked up by listing or opening, never by `stat`, whose
result may be half a minute old; a call that failed may have been carried out, so its effect is looked for; a
descriptor whose `fsync` failed is never synced again.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import PurePosixPath

from kserve_pvc._format.layout import DOCTOR, LEASES, MANIFESTS, MODELS, NAMES, STAGING, TRASH, is_claim
from kserve_pvc._volume.calls import (
    DIRECTORY_FLAGS,
    UNSUPPORTED,
    dated_name,
    delete_tree,
    is_free_for_link,
    list_large,
    retry_stale,
    sync_below,
    sync_directory,
    write_all,
)
from kserve_pvc._volume.making import create_file_at, enter_or_make, make_directory_at, open_lock_file, widened
from kserve_pvc._volume.reading import Volume, translating_links
from kserve_pvc.errors import StoreError, UnsafePathError, VolumeError

# What `dated_name` makes.
_TRASH_NAME = re.compile(r"([0-9]{12,15})-")


class VolumeWriter(Volume):
    """
    The writing half of a store's volume.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        super().__init__(root)
        self._list_directory = list_large  # It looks at the whole log of a key several times.
        # The permission bits of the root are those of the store, whatever the umask.
        bits = stat.S_IMODE(self._kept.stat().st_mode) & 0o777
        self._directory_mode = bits | 0o700
        self.file_mode = (bits & 0o666) | 0o600

    @contextmanager
    def translated(self, operation: str, place: PurePosixPath) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except OSError as error:
            raise self.failure(operation, place, error) from error

    @cached_property
    def is_local(self) -> bool:
        """
        Whether all processes that see the volume share a kernel, and with it what is not synced yet.
        """
        from kserve_pvc._volume.mount import LOCAL_TYPES, mount_of  # A hit writes nothing.

        return mount_of(self.root).type in LOCAL_TYPES

    def make_directory(self, place: PurePosixPath) -> None:
        """
        Make a directory and what is missing above it.

        They are as durable as the last sync of their parents: a record is linked, and a tree is complete, after all
        directories above were synced. Nothing else needs to survive a power failure.
        """
        with self.translated("making a directory", place):
            os.close(self.ensure_directory(place))

    def ensure_directory(self, place: PurePosixPath) -> int:
        return retry_stale(lambda: self._make_way(place))

    def check(self) -> None:
        """
        See that what is about to be written lands in the store that was opened.

        Raises:
            StoreRootError: Its volume was unmounted or replaced, or its `store.json` is gone or another.
        """
        self._kept.check_store()

    def _make_way(self, place: PurePosixPath) -> int:
        self.check()
        with suppress(FileNotFoundError, PermissionError), translating_links(place):
            return widened(self._kept.open(place, DIRECTORY_FLAGS), self._directory_mode)
        fd = self._kept.open(PurePosixPath(), DIRECTORY_FLAGS)
        for part in place.parts:
            try:
                child = enter_or_make(fd, PurePosixPath(part), self._directory_mode)
            finally:
                os.close(fd)
            fd = child
        return fd

    def reserve(self, place: PurePosixPath, *, is_durable: bool = True) -> bool:
        """
        Take a number by making its directory; exactly one process gets True.

        `mkdir` excluded on every shared volume that was measured, which holds for neither `O_EXCL` nor `link`.
        A lost reply makes the winner believe that it lost; the number then stays unused.
        """
        with self.translated("reserving a number", place):
            return retry_stale(lambda: self._reserve(place, is_durable))

    def _reserve(self, place: PurePosixPath, is_durable: bool) -> bool:
        fd = self._make_way(place.parent)
        try:
            make_directory_at(fd, place, self._directory_mode, is_durable=is_durable)
        except FileExistsError:
            return False
        finally:
            os.close(fd)
        return True

    def publish(self, place: PurePosixPath, data: bytes, private: PurePosixPath) -> bool:
        """
        Make a file exist with all of its content, exclusively and durably, and read it back.

        Readers see all of it or none: it is written and synced under the name `private`, which no other process uses,
        and linked into place. Where there are no hard links it is created exclusively in place, and a reader that comes
        too early refuses the checksum. If the process dies here, `private` is garbage in a staging directory.

        Returns:
            False if another file is already there.

        Raises:
            VolumeError: The volume failed, or reported success and the file is missing.
        """
        with self.translated("publishing", place):
            with self._making_in(private.parent) as staging:
                self._write_new(staging, private, data)
            self.make_directory(place.parent)
            # Not only this one: the process that made an existing directory may have died before it was durable.
            self._sync_above(place.parent)
            with self.open_parent(private) as source, self.open_parent(place) as target:
                self._link_or_create(source, private, target, place, data)
                with suppress(FileNotFoundError):
                    os.unlink(private.name, dir_fd=source)
                sync_directory(target)
            found = self.read(place, max(len(data), 1) * 2)
        if found is None:
            raise VolumeError(
                str(self.root / place), "publishing", "the volume reported success, but the file is missing"
            )
        return found == data

    def _link_or_create(
        self, source: int, private: PurePosixPath, target: int, place: PurePosixPath, data: bytes
    ) -> None:
        try:
            os.link(private.name, place.name, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)
        except FileExistsError:
            return
        except OSError as error:
            # A network volume may lose the reply of a link that was made: `publish` checks the file, not the errno.
            if error.errno not in UNSUPPORTED and place.name not in os.listdir(target):
                raise
            if place.name in os.listdir(target):
                return
            with suppress(FileExistsError):
                self._write_new(target, place, data)

    def write_private(self, place: PurePosixPath, data: bytes) -> None:
        """
        Write a small file under a name that no other process uses, durably.
        """
        with self.translated("writing", place), self._making_in(place.parent) as directory:
            self._write_new(directory, place, data)
            sync_directory(directory)

    def write_sign(self, place: PurePosixPath, data: bytes) -> None:
        """
        Write a small file for other processes to see now. After a power failure it may be gone, as they are.
        """
        with self.translated("writing", place), self._making_in(place.parent) as directory:
            self._write_new(directory, place, data, is_durable=not self.is_local)

    @contextmanager
    def _making_in(self, place: PurePosixPath) -> Iterator[int]:
        fd = self.ensure_directory(place)
        try:
            yield fd
        finally:
            os.close(fd)

    def _write_new(self, parent: int, place: PurePosixPath, data: bytes, *, is_durable: bool = True) -> None:
        fd = create_file_at(parent, place, self.file_mode)
        try:
            write_all(fd, data, 0)
            if is_durable:
                os.fsync(fd)
        finally:
            os.close(fd)

    def create(self, place: PurePosixPath) -> int:
        """
        Create a new file for a single writer and return its descriptor, open for reading and writing.
        """
        with self.translated("creating", place):
            fd = self.ensure_directory(place.parent)
            try:
                return create_file_at(fd, place, self.file_mode)
            finally:
                os.close(fd)

    def open_shared(self, place: PurePosixPath) -> int:
        """
        Open a file that several processes lock, creating it if need be. It is never deleted.
        """
        with self.translated("opening", place):
            fd = self.ensure_directory(place.parent)
            try:
                return open_lock_file(fd, place, self.file_mode)
            finally:
                os.close(fd)

    def sync_tree(self, place: PurePosixPath) -> None:
        """
        Make every directory of a tree durable, deepest first, then the ones above it up to the root.
        """
        with self.translated("syncing", place):
            fd = self.open_directory(place)
            try:
                sync_below(fd)
            finally:
                os.close(fd)
            self._sync_above(place)

    def _sync_above(self, place: PurePosixPath) -> None:
        for above in place.parents:
            fd = self.open_directory(above)
            try:
                sync_directory(fd)
            finally:
                os.close(fd)

    def repoint(self, place: PurePosixPath, target: str) -> bool:
        """
        Replace the target of a symbolic link in one step.

        Returns:
            False if something other than a link or an empty directory is there, or the volume has no links.
        """
        made = TRASH / dated_name()  # It is found there if this process dies here.
        with self.translated("linking", place):
            self.make_directory(TRASH)
            self.make_directory(place.parent)
            with self.open_parent(made) as source, self.open_parent(place) as directory:
                if not is_free_for_link(directory, place.name):
                    return False
                try:
                    os.symlink(target, made.name, dir_fd=source)
                except OSError as error:
                    if error.errno in UNSUPPORTED:
                        return False
                    raise
                os.rename(made.name, place.name, src_dir_fd=source, dst_dir_fd=directory)
                sync_directory(directory)
            if place.parent == NAMES:  # A name that was given stays, and so does the directory of names.
                self._sync_above(place.parent)
        return True

    def discard(self, place: PurePosixPath) -> PurePosixPath | None:
        """
        Move a tree into the trash, where it stays intact for readers that have its files open.

        Returns:
            Its name in the trash, or None if there is no such tree.
        """
        if not {MODELS, STAGING, MANIFESTS, LEASES, NAMES} & set(place.parents) and not is_claim(place):
            raise UnsafePathError(str(place), "only models and what belongs to one generation may be discarded")
        trashed = TRASH / dated_name()
        with self.translated("moving to the trash", place):
            self.make_directory(TRASH)
            try:
                with self.open_parent(place) as source, self.open_parent(trashed) as target:
                    os.rename(place.name, trashed.name, src_dir_fd=source, dst_dir_fd=target)
                    if {MODELS, NAMES} & set(place.parents):  # Nobody reads the rest of what is gone.
                        sync_directory(source)
                        sync_directory(target)
            except FileNotFoundError:
                return None
        return trashed

    def throw_away(self, place: PurePosixPath) -> None:
        """
        Discard a tree that no process can be reading, and delete it at once. What cannot be deleted stays in the trash.
        """
        if (trashed := self.discard(place)) is not None:
            with suppress(StoreError):
                self.delete_trash(trashed)

    def empty_trash(self, older_than: float) -> None:
        """
        Delete what has been in the trash for longer than this many seconds by this node's clock.

        Zero seconds delete all of it, also what a node threw away whose clock is ahead. A wrong clock deletes early;
        that costs only readers without a lease, since all others were waited for. What cannot be deleted stays, and
        fails nothing: a file of another user, one that is open, or what is none of ours.
        """
        with suppress(StoreError):
            for name in self.list_names(TRASH):
                thrown_at = _TRASH_NAME.match(name)
                if thrown_at and (older_than <= 0 or time.time() - int(thrown_at[1]) >= older_than):
                    with suppress(StoreError):
                        self.delete_trash(TRASH / name)

    def delete_trash(self, place: PurePosixPath) -> None:
        """
        Delete a tree in the trash or of a doctor, following no link and tolerating concurrent deletion.
        """
        if place.parent not in (TRASH, DOCTOR):
            raise UnsafePathError(str(place), "only the trash and directories of a doctor may be deleted")
        with self.translated("deleting", place):
            try:
                with self.open_parent(place) as parent:
                    delete_tree(parent, place.name)
            except FileNotFoundError:
                return
