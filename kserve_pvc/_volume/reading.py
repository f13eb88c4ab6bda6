"""
`Volume`: the reading half of a store's volume. Nothing here changes anything.

Names are looked up by listing or opening, never by `stat`, which a network volume may serve from a cache that is half a
minute old.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import copy
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Self

from kserve_pvc._volume.beneath import PATH_FLAGS, open_each, walk_beneath
from kserve_pvc._volume.calls import DIRECTORY_FLAGS, NO_SPACE, list_large, retry_stale
from kserve_pvc._volume.root import KeptRoot
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

_NO_PERMISSION = {errno.EACCES, errno.EPERM}
READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


# Joining paths is slower than opening files, and the same few are needed again and again.
@lru_cache(maxsize=256)
def _joined(root: Path, place: PurePosixPath) -> Path:
    return root / place


class Volume:
    """
    The reading half of a store's volume.

    The root is kept open, and all that lies below is opened from there, following no link in any component.
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
        self._kept = KeptRoot(self.root)
        self._list_directory: Callable[[int], list[str]] = os.listdir

    @property
    def settings(self) -> bytes | None:
        """
        The content of `store.json`, once the store was opened. From then on what replaces it is noticed.
        """
        return self._kept.settings

    @settings.setter
    def settings(self, data: bytes | None) -> None:
        self._kept.settings = data

    def check(self) -> None:
        """
        See that the directory which was opened is still the one at its path.

        Raises:
            StoreRootError: Another volume is there, or none.
        """
        self._kept.check()

    def absolute(self, place: PurePosixPath) -> Path:
        return _joined(self.root, place)

    def read(self, place: PurePosixPath, limit: int, *, uncached: bool = False) -> bytes | None:
        """
        Read a small regular file whole, or return None if it is not there.

        Args:
            uncached: Whether the file is rewritten in place, so that what this node has cached of it may be stale.

        Raises:
            StoreFormatError: It is not a regular file, or larger than `limit` bytes.
        """
        for _ in range(2):
            try:
                fd = self._kept.open(place, READ_FLAGS)
            except StoreRootError:
                raise
            except OSError as error:
                if error.errno == errno.ESTALE:
                    continue
                if error.errno in (errno.ENOENT, errno.ENOTDIR):
                    return None
                if error.errno in (errno.ELOOP, errno.ENXIO):
                    raise StoreFormatError(str(place), "it is not a regular file") from error
                raise self.failure("reading", place, error) from error
            try:
                if uncached:
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
        # Reads the known size and a byte more: memory for `limit` bytes would cost time too.
        while len(data) <= limit and (more := os.read(fd, found.st_size + 1)):
            data += more
            if len(data) == found.st_size:
                break  # No process appends to a record, so there is nothing beyond its end.
        if len(data) > limit:
            raise StoreFormatError(str(place), f"it is larger than {limit} bytes")
        return data

    def link_target(self, place: PurePosixPath) -> str | None:
        """
        Return the target of a symbolic link, which is never followed; None if there is something else, or nothing.
        """
        with suppress(OSError), self.open_parent(place) as parent:
            return os.readlink(place.name, dir_fd=parent)
        return None

    def listing_much(self) -> Self:
        """
        Return this volume for a call that is no hit: it lists what has very many names in few calls.
        """
        other = copy(self)
        other._list_directory = list_large
        return other

    def list_names(self, place: PurePosixPath, list_directory: Callable[[int], list[str]] | None = None) -> list[str]:
        """
        List a directory, sorted; empty if it is not there. Listing is fresh on every volume measured, `stat` is not.

        Args:
            list_directory: Lists an open directory; `list_large` where very many names are expected.
        """
        try:
            fd = self._kept.open(place, DIRECTORY_FLAGS)
            try:
                return sorted((list_directory or self._list_directory)(fd))
            finally:
                os.close(fd)
        except StoreRootError:
            raise
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ELOOP):
                return self._names_below(place)
            raise self.failure("listing", place, error) from error

    def _names_below(self, place: PurePosixPath) -> list[str]:
        # What is below a link is not there. And NFS remembers for half a minute that a name was not there. Opening the
        # directories above makes it look again.
        try:
            return retry_stale(lambda: self._listed(place), {errno.ESTALE})
        except (FileNotFoundError, UnsafePathError):
            return []
        except StoreRootError:
            raise
        except OSError as error:
            raise self.failure("listing", place, error) from error

    def _listed(self, place: PurePosixPath) -> list[str]:
        fd = self.open_directory(place)
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
        Walk a directory without following links. Directories themselves are not reported, but for those that lie deeper
        than any file of a model can; nothing is there if it is not.

        Raises:
            UnsafePathError: The directory itself is a link.
        """
        try:
            fd = self.open_directory(place)
            try:
                yield from self._walk(fd)
            finally:
                os.close(fd)
        except FileNotFoundError:
            return
        except StoreRootError:
            raise
        except OSError as error:
            raise self.failure("reading", place, error) from error

    def _walk(self, top: int) -> Iterator[FoundFile]:
        from kserve_pvc._format.records import FoundFile

        for inside, found in walk_beneath(top):
            yield FoundFile(path=inside, size_bytes=found.st_size, is_regular=stat.S_ISREG(found.st_mode))

    @contextmanager
    def open_file(self, place: PurePosixPath) -> Iterator[int]:
        """
        Open a regular file for reading; no component below the root may be a link.

        Raises:
            FileNotFoundError: It is not there.
            UnsafePathError: It, or a directory above it, is a link or not a regular file.
        """
        with translating_links(place):
            fd = self._kept.open(place, READ_FLAGS)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise UnsafePathError(str(place), "it is not a regular file")
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def open_parent(self, place: PurePosixPath) -> Iterator[int]:
        fd = self.open_directory(place.parent)
        try:
            yield fd
        finally:
            os.close(fd)

    def open_directory(self, place: PurePosixPath) -> int:
        with translating_links(place):
            try:
                return self._kept.open(place, DIRECTORY_FLAGS)
            except FileNotFoundError:
                # A network volume may remember that there was nothing, and looks again when it is entered step by step.
                fd = self._kept.open(PurePosixPath(), DIRECTORY_FLAGS)
                try:
                    return open_each(fd, str(place), DIRECTORY_FLAGS)
                finally:
                    os.close(fd)

    def is_directory(self, place: PurePosixPath) -> bool:
        """
        Return False if a link or a file stands there or on the way; True if a directory is there, or nothing.
        """
        try:
            os.close(self._kept.open(place, PATH_FLAGS))
        except OSError as error:
            return error.errno not in (errno.ELOOP, errno.ENOTDIR)
        return True

    def failure(self, operation: str, place: PurePosixPath, error: OSError) -> Exception:
        """
        Translate an error of the volume for the caller.
        """
        if error.errno in NO_SPACE:
            return InsufficientSpaceError(
                str(self.root), 0, self._free_bytes_now(), is_quota=error.errno == errno.EDQUOT
            )
        is_read = operation in ("reading", "listing")
        if error.errno == errno.EROFS:
            hint = "its volume is mounted read-only; mount it read-write for the process that downloads"
            return ReadOnlyStoreError(str(self.root), f"write `{place}`", hint)
        if error.errno in _NO_PERMISSION and not is_read:
            hint = f"{self._who_may('write')}; set `fsGroup`, or give the group write permission"
            return ReadOnlyStoreError(str(self.root), f"write `{place}`", hint)
        reason = os.strerror(error.errno or errno.EIO)
        if error.errno in _NO_PERMISSION:
            reason = f"{self._who_may('read')}; set `fsGroup`, or give the group read permission"
        return VolumeError(str(self.root / place), operation, reason)

    def _free_bytes_now(self) -> int:
        # The root may be gone, or refuse to be looked at, by the time an error is told.
        try:
            return self.free_bytes()
        except OSError:
            return 0

    def _who_may(self, act: str) -> str:
        try:
            found = os.stat(self.root)
        except OSError as error:
            return f"uid {os.geteuid()} gid {os.getegid()} may not {act} it, nor look at the root ({error.strerror})"
        return (
            f"uid {os.geteuid()} gid {os.getegid()} may not {act} it, below a root of uid {found.st_uid} "
            f"gid {found.st_gid} mode {stat.S_IMODE(found.st_mode):04o}"
        )


@contextmanager
def translating_links(place: PurePosixPath) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # O_NOFOLLOW fails with ELOOP for a link, or with ENOTDIR if a directory was requested.
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise UnsafePathError(
                str(place), "a link or file stands where a directory or file of the store belongs"
            ) from error
        raise


def open_part(parent: int, place: PurePosixPath, flags: int, mode: int = 0) -> int:
    """
    Open the last component of a path in an open directory.

    Raises:
        UnsafePathError: A link stands there, or a file instead of a directory.
    """
    with translating_links(place):
        return os.open(place.name, flags, mode, dir_fd=parent)
