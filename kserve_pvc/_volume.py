"""
The only module that creates, renames or deletes anything under a store's root.

`Volume` can only look. `VolumeWriter` adds writing, and a read-only store never constructs one. A writer walks from
the root by directory descriptors that follow no symbolic link, so a link planted on the volume leads nowhere.

Rules of network volumes that shape this code: names are looked up by listing or opening, never by `stat`, whose
answer may be half a minute old; a call that failed may have been carried out, so its effect is looked for; a
descriptor whose `fsync` failed is never synced again.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypeVar

import attrs

from kserve_pvc._format.layout import DOCTOR, LEASES, MANIFESTS, MODELS, NAMES, STAGING, TRASH, is_claim
from kserve_pvc.errors import (
    InsufficientSpaceError,
    ReadOnlyStoreError,
    StoreFormatError,
    StoreRootError,
    UnsafePathError,
    VolumeError,
)

if TYPE_CHECKING:
    from kserve_pvc._format.records import FoundFile

_T = TypeVar("_T")

# What a file system without the operation answers; the step then takes the next rung or does without.
_UNSUPPORTED = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EXDEV, errno.EMLINK}
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_NO_PERMISSION = {errno.EACCES, errno.EPERM}
_CREATE_FLAGS = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# The kernel writes blanks and backslashes of mount points as octal escapes.
_OCTAL = re.compile(r"\\([0-7]{3})")
# Where `syncfs` reaches the medium and reports what failed on the way.
_LOCAL_TYPES = {"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "tmpfs", "overlay"}
_NO_REPLACE = 1  # RENAME_NOREPLACE
_KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE: a file is as long as what was written to it.
_COPY_BYTES = 1 << 30
_PIECE_BYTES = 1024 * 1024
_MOST_DIRECTORIES = 256
_MOST_SYNCED_ALONE = 100
# Where the other name of a file is lost to the node that wrote it, once another node has linked it and deleted the
# first.
_FALSE_LINK_TYPES = {"fuse.seaweedfs"}
_NETWORK_TYPES = (
    "nfs",
    "cifs",
    "smb",
    "fuse",
    "ceph",
    "lustre",
    "glusterfs",
    "gpfs",
    "9p",
    "virtiofs",
    "beegfs",
    "afs",
)


@attrs.frozen(kw_only=True)
class Mount:
    """
    What the kernel says about the mount a path lies on.

    `visibility_delay` is the number of seconds after which a change made on one node is seen on all others.
    """

    type: str
    options: tuple[str, ...]

    @property
    def is_network(self) -> bool:
        return self.type.startswith(_NETWORK_TYPES)

    @property
    def visibility_delay(self) -> float:
        if not self.is_network:
            return 0.0
        if self.type.startswith("nfs"):
            # nfs(5): attributes of directories are cached for up to acdirmax seconds, 60 by default.
            return 0.0 if "noac" in self.options else 2 * self._seconds("acdirmax", self._seconds("actimeo", 60.0))
        if self.type.startswith(("cifs", "smb")):
            return 2 * self._seconds("acdirmax", self._seconds("actimeo", 1.0))
        return 2.0

    def _seconds(self, option: str, default: float) -> float:
        for text in self.options:
            name, _, value = text.partition("=")
            if name == option and value.isdigit():
                return float(value)
        return default


def mount_of(path: Path) -> Mount:
    """
    Find the mount a path lies on. Unknown answers as a network volume does, which only makes waits longer.
    """
    best, found = "", Mount(type="fuse", options=())
    with suppress(OSError), open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        for line in table:
            left, _, right = line.rstrip("\n").partition(" - ")
            place = _OCTAL.sub(lambda match: chr(int(match[1], 8)), left.split()[4])
            # A later line covers an earlier one at the same place.
            if len(place) >= len(best) and (path == Path(place) or Path(place) in path.parents):
                kind, _, super_options = right.split(" ", 2)
                best, found = place, Mount(type=kind, options=(*left.split()[5].split(","), *super_options.split(",")))
    return found


# Paths are joined slower than files are opened, and the same few are asked for again and again.
@lru_cache(maxsize=256)
def _joined(root: Path, place: PurePosixPath) -> Path:
    return root / place


class Volume:
    """
    The reading half of a store's volume.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        if not os.fspath(root):
            raise StoreRootError("", "the path is empty, as from a variable that is not set")
        try:
            self.root = Path(root).resolve(strict=True)
        except (OSError, ValueError, RuntimeError) as error:  # A loop of links is a RuntimeError before Python 3.13.
            raise StoreRootError(
                os.fspath(root), "it does not exist; mount the volume there, or create the directory"
            ) from error
        if not self.root.is_dir():
            raise StoreRootError(str(self.root), "it is not a directory")

        self._prefix = f"{self.root}/"

    def absolute(self, place: PurePosixPath) -> Path:
        return _joined(self.root, place)

    def read(self, place: PurePosixPath, limit: int, *, anew: bool = False) -> bytes | None:
        """
        Read a small regular file whole, or return None if it is not there.

        Args:
            anew: Whether the file is rewritten in place, so that what this node has read of it before may have changed.

        Raises:
            StoreFormatError: It is a link, no regular file, or larger than `limit` bytes.
        """
        for _ in range(2):
            try:
                fd = os.open(f"{self._prefix}{place}", _READ_FLAGS)
            except OSError as error:
                if error.errno == errno.ESTALE:
                    continue
                if error.errno in (errno.ENOENT, errno.ENOTDIR):
                    return None
                if error.errno in (errno.ELOOP, errno.ENXIO):
                    raise StoreFormatError(str(place), "it is not a regular file") from error
                raise self.failure("reading", place, error) from error
            try:
                if anew:
                    # Some mounts, such as those of GlusterFS, serve pages that they have read before for a second more.
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                return self._read_open(fd, place, limit)
            except OSError as error:
                if error.errno != errno.ESTALE:
                    raise self.failure("reading", place, error) from error
            finally:
                os.close(fd)
        return None

    def _read_open(self, fd: int, place: PurePosixPath, limit: int) -> bytes:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise StoreFormatError(str(place), "it is not a regular file")
        data = b""
        if found.st_size > limit:
            raise StoreFormatError(str(place), f"it is larger than {limit} bytes")
        # Asked for what is there and a byte more: memory for all that may be there costs time too.
        while len(data) <= limit and (more := os.read(fd, found.st_size + 1)):
            data += more
            if len(data) == found.st_size:
                break  # Nobody appends to a record, so nothing is asked for beyond its end.
        if len(data) > limit:
            raise StoreFormatError(str(place), f"it is larger than {limit} bytes")
        return data

    def link_target(self, place: PurePosixPath) -> str | None:
        """
        Where a symbolic link leads; None if there is something else, or nothing. It is read and never followed.
        """
        with suppress(OSError), self._parent(place) as parent:
            return os.readlink(place.name, dir_fd=parent)
        return None

    def names(self, place: PurePosixPath) -> list[str]:
        """
        List a directory, sorted; empty if it is not there. Listing is fresh on every volume measured, `stat` is not.
        """
        try:
            return sorted(os.listdir(f"{self._prefix}{place}"))
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
                return self._names_below(place)
            raise self.failure("listing", place, error) from error

    def _names_below(self, place: PurePosixPath) -> list[str]:
        # NFS remembers for half a minute that a name was not there. Opening the directories above makes it look again.
        try:
            return _settled(lambda: self._listed(place), {errno.ESTALE})
        except (FileNotFoundError, UnsafePathError):
            return []
        except OSError as error:
            raise self.failure("listing", place, error) from error

    def _listed(self, place: PurePosixPath) -> list[str]:
        fd = self._open_directory(place)
        try:
            return sorted(os.listdir(fd))
        finally:
            os.close(fd)

    def free_bytes(self) -> int:
        """
        Bytes an unprivileged writer can still use. Some network volumes make this number up.
        """
        found = os.statvfs(self.root)
        return found.f_bavail * found.f_frsize

    def tree(self, place: PurePosixPath) -> Iterator[FoundFile]:
        """
        Walk a directory without following links. Directories themselves are not reported; nothing is there if it is
        not.

        Raises:
            UnsafePathError: The directory itself is a link.
        """
        try:
            fd = self._open_directory(place)
            try:
                yield from self._walk(fd, PurePosixPath())
            finally:
                os.close(fd)
        except FileNotFoundError:
            return
        except OSError as error:
            raise self.failure("reading", place, error) from error

    def _walk(self, fd: int, inside: PurePosixPath) -> Iterator[FoundFile]:
        from kserve_pvc._format.records import FoundFile

        with os.scandir(fd) as entries:
            names = sorted(entry.name for entry in entries)
        for name in names:
            found = os.stat(name, dir_fd=fd, follow_symlinks=False)
            if stat.S_ISDIR(found.st_mode):
                child = os.open(name, _DIRECTORY_FLAGS, dir_fd=fd)
                try:
                    yield from self._walk(child, inside / name)
                finally:
                    os.close(child)
            else:
                yield FoundFile(path=inside / name, size_bytes=found.st_size, is_regular=stat.S_ISREG(found.st_mode))

    @contextmanager
    def open_file(self, place: PurePosixPath) -> Iterator[int]:
        """
        Open a regular file for reading; no component below the root may be a link.

        Raises:
            FileNotFoundError: It is not there.
            UnsafePathError: A link or something that is no regular file stands in the way.
        """
        with self._parent(place) as parent:
            fd = self._open_at(parent, place, _READ_FLAGS)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise UnsafePathError(str(place), "it is not a regular file")
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def _parent(self, place: PurePosixPath) -> Iterator[int]:
        fd = self._open_directory(place.parent)
        try:
            yield fd
        finally:
            os.close(fd)

    def _open_directory(self, place: PurePosixPath) -> int:
        fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for part in place.parts:
            try:
                child = self._open_at(fd, PurePosixPath(part), _DIRECTORY_FLAGS)
            finally:
                os.close(fd)
            fd = child
        return fd

    def _open_at(self, parent: int, place: PurePosixPath, flags: int, mode: int = 0o666) -> int:
        try:
            return os.open(place.name, flags, mode, dir_fd=parent)
        except OSError as error:
            # O_NOFOLLOW answers ELOOP for a link, or ENOTDIR when a directory was asked for.
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise UnsafePathError(
                    str(place), "a link or file stands where a directory or file of the store belongs"
                ) from error
            raise

    def failure(self, operation: str, place: PurePosixPath, error: OSError) -> Exception:
        """
        Say what an error of the volume means to the caller.
        """
        if error.errno in _NO_SPACE:
            return InsufficientSpaceError(str(self.root), 0, self.free_bytes())
        is_read = operation in ("reading", "listing")
        if error.errno == errno.EROFS:
            remedy = "its volume is mounted read-only; mount it read-write for the process that downloads"
            return ReadOnlyStoreError(str(self.root), f"write `{place}`", remedy)
        if error.errno in _NO_PERMISSION and not is_read:
            remedy = f"{self._who_may('write')}; set `fsGroup`, or give the group write permission"
            return ReadOnlyStoreError(str(self.root), f"write `{place}`", remedy)
        reason = os.strerror(error.errno or errno.EIO)
        if error.errno in _NO_PERMISSION:
            reason = f"{self._who_may('read')}; set `fsGroup`, or give the group read permission"
        return VolumeError(str(self.root / place), operation, reason)

    def _who_may(self, act: str) -> str:
        found = os.stat(self.root)
        return (
            f"uid {os.geteuid()} gid {os.getegid()} may not {act} it, below a root of uid {found.st_uid} gid {found.st_gid} "
            f"mode {stat.S_IMODE(found.st_mode):04o}"
        )


class VolumeWriter(Volume):
    """
    The writing half of a store's volume.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        super().__init__(root)
        # Whoever may write the root may write the store: the root's permission bits are the store's, whatever the
        # umask.
        bits = stat.S_IMODE(os.stat(self.root).st_mode) & 0o777
        self._directory_mode = bits | 0o700
        self._file_mode = (bits & 0o666) | 0o600

    @contextmanager
    def _translated(self, operation: str, place: PurePosixPath) -> Iterator[None]:
        try:
            yield
        except (ReadOnlyStoreError, InsufficientSpaceError, VolumeError, UnsafePathError, StoreFormatError):
            raise
        except OSError as error:
            raise self.failure(operation, place, error) from error

    def make_directory(self, place: PurePosixPath) -> None:
        """
        Make a directory and what is missing above it, durably.
        """
        with self._translated("making a directory", place):
            os.close(self._ensure_directory(place))

    def _ensure_directory(self, place: PurePosixPath) -> int:
        return _settled(lambda: self._make_way(place))

    def _make_way(self, place: PurePosixPath) -> int:
        fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for part in place.parts:
            try:
                child = self._enter_or_make(fd, PurePosixPath(part))
            finally:
                os.close(fd)
            fd = child
        return fd

    def _enter_or_make(self, parent: int, part: PurePosixPath) -> int:
        with suppress(FileNotFoundError):
            return self._open_at(parent, part, _DIRECTORY_FLAGS)
        with suppress(FileExistsError):
            os.mkdir(part.name, self._directory_mode, dir_fd=parent)
            self._set_mode(parent, part.name, self._directory_mode)
            _sync_directory(parent)
        return self._open_at(parent, part, _DIRECTORY_FLAGS)

    def _set_mode(self, parent: int, name: str, mode: int) -> None:
        # Only of what was just made here, and only against a narrow umask; object and SMB mounts refuse.
        with suppress(OSError):
            found = stat.S_IMODE(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
            if found & 0o777 != mode:
                os.chmod(
                    name, found & 0o7000 | mode, dir_fd=parent
                )  # The set-gid bit of an `fsGroup` volume is inherited.

    def reserve(self, place: PurePosixPath) -> bool:
        """
        Take a number by making its directory; exactly one process gets True.

        `mkdir` excluded on every shared volume that was measured, which holds for neither `O_EXCL` nor `link`.
        A lost reply makes the winner believe that it lost; the number then stays unused.
        """
        with self._translated("reserving a number", place):
            return _settled(lambda: self._reserve(place))

    def _reserve(self, place: PurePosixPath) -> bool:
        fd = self._make_way(place.parent)
        try:
            os.mkdir(place.name, self._directory_mode, dir_fd=fd)
            self._set_mode(fd, place.name, self._directory_mode)
            _sync_directory(fd)
        except FileExistsError:
            return False
        finally:
            os.close(fd)
        return True

    def publish(self, place: PurePosixPath, data: bytes, private: PurePosixPath) -> bool:
        """
        Make a file exist with all of its content, exclusively and durably, and read it back.

        Readers see all of it or none: it is written and synced under the name `private`, which nobody else uses, and
        linked into place. Where there are no hard links it is created exclusively in place, and a reader who comes
        too early refuses the checksum. If the process dies here, `private` is garbage in a staging directory.

        Returns:
            False if another file is already there.

        Raises:
            VolumeError: The volume said yes and the file is not there, or said no for reasons of its own.
        """
        with self._translated("publishing", place):
            self.write_private(private, data)
            self.make_directory(place.parent)
            # Not only this one: whoever made a directory that is there may have died before it was durable.
            self._sync_above(place.parent)
            with self._parent(private) as source, self._parent(place) as target:
                self._link_or_create(source, private, target, place, data)
                with suppress(FileNotFoundError):
                    os.unlink(private.name, dir_fd=source)
                _sync_directory(target)
            found = self.read(place, max(len(data), 1) * 2)
        if found is None:
            raise VolumeError(
                str(self.root / place), "publishing", "the volume reported success and the file is not there"
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
            # A network volume may lose the reply of a link that was made: `publish` asks the file, not the errno.
            if error.errno not in _UNSUPPORTED and place.name not in os.listdir(target):
                raise
            if place.name in os.listdir(target):
                return
            with suppress(FileExistsError):
                self._write_new(target, place, data)

    def write_private(self, place: PurePosixPath, data: bytes) -> None:
        """
        Write a small file under a name that nobody else uses, durably.
        """
        with self._translated("writing", place):
            fd = self._ensure_directory(place.parent)
            try:
                self._write_new(fd, place, data)
                _sync_directory(fd)
            finally:
                os.close(fd)

    def _write_new(self, parent: int, place: PurePosixPath, data: bytes) -> None:
        fd = self._open_at(
            parent, place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, self._file_mode
        )
        try:
            self._set_open_mode(fd, self._file_mode)
            write_all(fd, data, 0)
            os.fsync(fd)
        finally:
            os.close(fd)

    def create(self, place: PurePosixPath) -> int:
        """
        Create a new file for a single writer and return its descriptor, open for reading and writing.
        """
        with self._translated("creating", place):
            fd = self._ensure_directory(place.parent)
            try:
                made = self._open_at(fd, place, _CREATE_FLAGS, self._file_mode)
            finally:
                os.close(fd)
            self._set_open_mode(made, self._file_mode)
            return made

    def open_shared(self, place: PurePosixPath) -> int:
        """
        Open a file that several processes lock, creating it if need be. It is never deleted.
        """
        with self._translated("opening", place):
            fd = self._ensure_directory(place.parent)
            try:
                made = self._open_at(fd, place, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, self._file_mode)
            finally:
                os.close(fd)
            self._set_open_mode(made, self._file_mode)
            return made

    def _set_open_mode(self, fd: int, mode: int) -> None:
        with suppress(OSError):
            if stat.S_IMODE(os.fstat(fd).st_mode) & 0o777 != mode:
                os.fchmod(fd, mode)

    @contextmanager
    def writing_tree(self, place: PurePosixPath) -> Iterator[Tree]:
        """
        Write a new tree of files, made durable when the `with` ends well.
        """
        self.make_directory(place)
        tree = Tree(self, place)
        try:
            yield tree
            tree.settle()
        finally:
            tree.close()

    def sync_tree(self, place: PurePosixPath) -> None:
        """
        Make every directory of a tree durable, deepest first, then the ones above it up to the root.
        """
        with self._translated("syncing", place):
            fd = self._open_directory(place)
            try:
                _sync_below(fd)
            finally:
                os.close(fd)
            self._sync_above(place)

    def _sync_above(self, place: PurePosixPath) -> None:
        for above in place.parents:
            fd = self._open_directory(above)
            try:
                _sync_directory(fd)
            finally:
                os.close(fd)

    def point(self, place: PurePosixPath, target: str) -> bool:
        """
        Let a symbolic link lead somewhere else, in one step.

        Returns:
            False if something that is no link stands there, other than an empty directory, or the volume has no links.
        """
        made = TRASH / dated_name()  # Where it is found if this process dies here.
        with self._translated("linking", place):
            self.make_directory(TRASH)
            self.make_directory(place.parent)
            with self._parent(made) as source, self._parent(place) as directory:
                if not _is_free_for_link(directory, place.name):
                    return False
                try:
                    os.symlink(target, made.name, dir_fd=source)
                except OSError as error:
                    if error.errno in _UNSUPPORTED:
                        return False
                    raise
                os.rename(made.name, place.name, src_dir_fd=source, dst_dir_fd=directory)
                _sync_directory(directory)
        return True

    def discard(self, place: PurePosixPath) -> PurePosixPath | None:
        """
        Move a tree into the trash, where it stays intact for readers who hold its files open.

        Returns:
            Its name in the trash, or None if there is no such tree.
        """
        if not {MODELS, STAGING, MANIFESTS, LEASES, NAMES} & set(place.parents) and not is_claim(place):
            raise UnsafePathError(str(place), "only models and what belongs to one generation are ever thrown away")
        trashed = TRASH / dated_name()
        with self._translated("moving to the trash", place):
            self.make_directory(TRASH)
            try:
                with self._parent(place) as source, self._parent(trashed) as target:
                    os.rename(place.name, trashed.name, src_dir_fd=source, dst_dir_fd=target)
                    _sync_directory(source)
                    _sync_directory(target)
            except FileNotFoundError:
                return None
        return trashed

    def throw_away(self, place: PurePosixPath) -> None:
        """
        Discard a tree that nobody can be reading, and delete it at once.
        """
        if (trashed := self.discard(place)) is not None:
            self.delete_trash(trashed)

    def empty_trash(self, older_than: float) -> None:
        """
        Delete what has lain in the trash for longer than this many seconds by this node's clock.

        A wrong clock deletes early; that costs only readers without a lease, since all others were waited for.
        """
        for name in self.names(TRASH):
            thrown_at = name.partition("-")[0]
            if thrown_at.isdigit() and time.time() - int(thrown_at) >= older_than:
                self.delete_trash(TRASH / name)

    def delete_trash(self, place: PurePosixPath) -> None:
        """
        Delete a tree in the trash or of a doctor, following no link and tolerating others who delete it too.
        """
        if place.parent not in (TRASH, DOCTOR):
            raise UnsafePathError(str(place), "only the trash is ever deleted, and what a doctor made")
        with self._translated("deleting", place):
            try:
                with self._parent(place) as parent:
                    delete_tree(parent, place.name)
            except FileNotFoundError:
                return

    @contextmanager
    def scratch(self, place: PurePosixPath) -> Iterator[Scratch]:
        """
        Open a directory in which is tried out what the volume can do, making it if need be; `delete_trash` takes it
        away.
        """
        if not {TRASH, DOCTOR} & set(place.parents):
            raise UnsafePathError(
                str(place), "what a volume can do is tried out in the trash or by a doctor, and nowhere else"
            )
        with self._translated("trying out the volume", place):
            fd = self._ensure_directory(place)
            try:
                yield Scratch(fd, self._file_mode)
            finally:
                os.close(fd)


class Scratch:
    """
    One directory, open, for trying out single calls. They answer as the volume does, with a bare `OSError`.
    """

    def __init__(self, fd: int, file_mode: int) -> None:
        self.fd = fd
        self._file_mode = file_mode

    def make_directory(self, name: str) -> None:
        os.mkdir(name, 0o700, dir_fd=self.fd)

    def create(self, name: str) -> int:
        """Make a new file and return its descriptor, open for reading and writing."""
        return os.open(name, _CREATE_FLAGS, self._file_mode, dir_fd=self.fd)

    def write(self, name: str, data: bytes) -> None:
        fd = self.create(name)
        try:
            write_all(fd, data, 0)
        finally:
            os.close(fd)

    def open(self, name: str, flags: int = 0) -> int:
        return os.open(name, _READ_FLAGS | flags, dir_fd=self.fd)

    def open_shared(self, name: str) -> int:
        return os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, self._file_mode, dir_fd=self.fd)

    def link(self, name: str, new: str) -> None:
        os.link(name, new, src_dir_fd=self.fd, dst_dir_fd=self.fd, follow_symlinks=False)

    def replace(self, name: str, new: str) -> None:
        os.rename(name, new, src_dir_fd=self.fd, dst_dir_fd=self.fd)

    def move(self, name: str, new: str) -> None:
        """Rename where nothing is replaced: `renameat2` with RENAME_NOREPLACE."""
        _rename_no_replace(self.fd, name, new)

    def remove(self, name: str) -> None:
        os.unlink(name, dir_fd=self.fd)

    def names(self) -> list[str]:
        # Opened anew: through a descriptor Btrfs lists what was there when it was opened.
        fd = os.open(".", _DIRECTORY_FLAGS, dir_fd=self.fd)
        try:
            return os.listdir(fd)
        finally:
            os.close(fd)

    def sync(self) -> None:
        os.fsync(self.fd)


class Tree:
    """
    A directory of model files being written by one process.

    Every directory is entered once. On a local file system small files are made durable together at the end: a few one
    by one, many by one `syncfs`, which also writes what others have there and so is worth it only for many. Elsewhere,
    where `syncfs` reaches only this node's kernel, every file is synced when it is finished. All of it is before the
    commit record, and that is all that durability needs: nobody reads a generation without one.
    """

    def __init__(self, writer: VolumeWriter, place: PurePosixPath) -> None:
        self._writer = writer
        self._place = place
        self._guard = threading.Lock()
        self._directories: dict[PurePosixPath, int] = {}
        # Opened before the first write, so that an error of any write since is reported by `syncfs` on it.
        self._root = os.open(writer.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        kind = mount_of(writer.root).type
        self._syncs_at_once = kind in _LOCAL_TYPES
        # Memory has no pieces to lay out, and reserving it costs as much as writing it.
        self._allocates = kind != "tmpfs"
        self._links = kind not in _FALSE_LINK_TYPES
        self._unsynced: list[PurePosixPath] = []

    def create(self, path: PurePosixPath) -> int:
        """
        Create a new file and return its descriptor, open for reading and writing.
        """
        try:
            if (kept := self._directories.get(path.parent)) is not None:  # What most files of a large model find.
                return os.open(path.name, _CREATE_FLAGS, self._writer._file_mode, dir_fd=kept)
            with self._directory(path.parent) as parent:
                return os.open(path.name, _CREATE_FLAGS, self._writer._file_mode, dir_fd=parent)
        except OSError as error:
            raise self._writer.failure("creating", self._place / path, error) from error

    def allocate(self, fd: int, size_bytes: int) -> None:
        """
        Reserve room for a large file, and let others of the store's group take over what is there if this process dies.
        """
        self._writer._set_open_mode(fd, self._writer._file_mode)
        if self._allocates:
            allocate(fd, size_bytes)

    def link(self, existing: PurePosixPath, path: PurePosixPath) -> bool:
        """
        Give a file that nobody writes any more a second name in this tree. False: the volume cannot, or it is gone.
        """
        if not self._links:
            return False
        try:
            with self._writer._parent(existing) as source, self._directory(path.parent) as parent:
                os.link(existing.name, path.name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
        except OSError as error:
            # GlusterFS says that it is full when a file has about fifty names. If it is full, the copy will say so.
            if error.errno not in _UNSUPPORTED | _NO_SPACE and error.errno not in (errno.ENOENT, errno.ESTALE):
                raise
            return False
        if self._syncs_at_once:
            self._unsynced.append(path)  # Whoever wrote it may have died before it was durable.
        return True

    def finish(self, fd: int, path: PurePosixPath, is_large: bool) -> None:
        """
        Make a file immutable and close it. Large files are made durable at once, while others are still being fetched.

        Its descriptor is gone afterwards, well or not. A failed `close` fails the file: a network volume may report a
        failed write nowhere else.
        """
        try:
            try:
                with suppress(OSError):  # Object and SMB mounts refuse.
                    os.fchmod(fd, self._writer._file_mode & 0o444)
                if is_large or not self._syncs_at_once:
                    os.fsync(fd)
                else:
                    self._unsynced.append(path)
            except BaseException:
                with suppress(OSError):
                    os.close(fd)
                raise
            os.close(fd)
        except OSError as error:
            raise self._writer.failure("syncing", self._place / path, error) from error

    def remove(self, path: PurePosixPath) -> None:
        """
        Take a finished file out of the tree again, which was only needed to make others.
        """
        try:
            with self._directory(path.parent) as parent:
                os.unlink(path.name, dir_fd=parent)
        except OSError as error:
            raise self._writer.failure("removing", self._place / path, error) from error
        with suppress(ValueError):
            self._unsynced.remove(path)

    def settle(self) -> None:
        """
        Make everything durable that is not yet.
        """
        with self._writer._translated("syncing", self._place):
            if len(self._unsynced) > _MOST_SYNCED_ALONE and _has("syncfs"):
                _call("syncfs", self._root)
                return
            for path in self._unsynced:
                with self._directory(path.parent) as parent:
                    fd = os.open(path.name, _READ_FLAGS, dir_fd=parent)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
        self._writer.sync_tree(self._place)

    def close(self) -> None:
        """
        Let go of all directories.
        """
        for fd in (*self._directories.values(), self._root):
            os.close(fd)
        self._directories.clear()

    @contextmanager
    def _directory(self, path: PurePosixPath) -> Iterator[int]:
        with self._guard:
            kept = self._directories.get(path)
            fd = self._writer._ensure_directory(self._place / path) if kept is None else kept
            # A model of many directories must not use up the descriptors.
            if kept is None and len(self._directories) < _MOST_DIRECTORIES:
                kept = self._directories[path] = fd
        try:
            yield fd
        finally:
            if kept is None:
                os.close(fd)


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """
    Write all of the data at an offset; a short write goes on where it stopped.
    """
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def allocate(fd: int, size: int) -> None:
    """
    Reserve room for a file, where the volume can: a full volume says so at once, and files lie in one piece.

    `os.posix_fallocate` writes a byte into every block where the volume cannot, so the system call itself is made.
    """
    try:
        _call("fallocate", fd, _KEEP_SIZE, 0, size)
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise


def _has(name: str) -> bool:
    try:
        import ctypes

        return hasattr(ctypes.CDLL(None), name)
    except (ImportError, OSError):  # A Python that was built without it.
        return False


def _call(name: str, *arguments: int) -> None:
    """A system call of Linux that Python does not have."""
    if not _has(name):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    import ctypes

    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    if function(arguments[0], *map(ctypes.c_int64, arguments[1:])) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _rename_no_replace(directory: int, name: str, new: str) -> None:
    if not _has("renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    import ctypes

    function = ctypes.CDLL(None, use_errno=True).renameat2
    if function(directory, os.fsencode(name), directory, os.fsencode(new), _NO_REPLACE) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))  # As the class that belongs to the number, such as FileExistsError.


def copy_range(source: int, target: int, start: int, stop: int) -> bool:
    """
    Copy a range of one file to the same place of another: as a shared extent, on the server, or byte by byte.

    Returns:
        False if the source ends before the range does.
    """
    while start < stop:
        try:
            count = os.copy_file_range(source, target, min(stop - start, _COPY_BYTES), start, start)
        except OSError as error:
            if error.errno not in _UNSUPPORTED | {errno.EBADF, errno.EOVERFLOW, errno.EIO}:
                raise
            count = 0
        if count == 0:  # Some file systems say so instead of that they cannot.
            piece = os.pread(source, min(stop - start, _PIECE_BYTES), start)
            if not piece:
                return False
            write_all(target, piece, start)
            count = len(piece)
        start += count
    return True


def _is_free_for_link(directory: int, name: str) -> bool:
    # Kubernetes makes an empty directory where a pod mounts a `subPath` that is not there. Nothing is lost with it.
    with suppress(OSError):
        os.rmdir(name, dir_fd=directory)
    try:
        return stat.S_ISLNK(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return True


def dated_name() -> str:
    """A name nobody else uses, which says to whoever cleans up how old it is."""
    return f"{int(time.time()):012d}-{os.urandom(8).hex()}"


def _settled(act: Callable[[], _T], codes: Collection[int] = (errno.ENOENT, errno.ESTALE)) -> _T:
    """Try again, for a second or so, what failed because a directory on its way is only just being made."""
    pause = 0.005
    while True:
        try:
            return act()
        except OSError as error:
            # GlusterFS says both of a directory that exists, while the node that made it is not done with it.
            if error.errno not in codes or pause > 1:
                raise
        time.sleep(pause)
        pause *= 2


def _sync_directory(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _UNSUPPORTED and error.errno != errno.EBADF:
            raise


def _sync_below(fd: int) -> None:
    for name in os.listdir(fd):
        if stat.S_ISDIR(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
            child = os.open(name, _DIRECTORY_FLAGS, dir_fd=fd)
            try:
                _sync_below(child)
            finally:
                os.close(child)
    _sync_directory(fd)


def delete_tree(parent: int, name: str) -> None:
    """
    Delete a file, or a directory with all that is in it, below an open directory, following no link.
    """
    try:
        fd = os.open(name, _DIRECTORY_FLAGS, dir_fd=parent)
    except NotADirectoryError:
        os.unlink(name, dir_fd=parent)
        return
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        os.unlink(name, dir_fd=parent)
        return
    try:
        for child in os.listdir(fd):
            with suppress(FileNotFoundError):
                delete_tree(fd, child)
    finally:
        os.close(fd)
    try:
        os.rmdir(name, dir_fd=parent)
    except OSError as error:
        # On NFS a file that somebody holds open becomes `.nfs…` instead of going; the trash is emptied again later.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY):
            raise
