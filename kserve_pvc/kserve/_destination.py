"""
A directory that a model server reads and that belongs to one model: an `emptyDir`, or the directory that a Job is
given.

It may be a mount point, which has no siblings and cannot be renamed. So files are prepared in one directory of ours
inside of it and renamed into place one by one. The record goes last: with it everything is there, without it nothing is
believed. What is removed is only what an earlier record or plan of ours names; strangers stay.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

import attrs
from attrs.validators import instance_of

from kserve_pvc._format import layout
from kserve_pvc._format.codec import build, decode, encode, text
from kserve_pvc._format.file_names import check_collisions, check_name
from kserve_pvc._format.records import MAX_MANIFEST_BYTES, FileEntry, Holder
from kserve_pvc._keys.claims import find_live_downloader, newest_epoch, start_heartbeat, take_claim
from kserve_pvc._volume.buffers import make_buffer
from kserve_pvc._volume.calls import allocate, copy_range, delete_tree
from kserve_pvc._volume.mount import mount_of
from kserve_pvc._volume.writing import VolumeWriter
from kserve_pvc.errors import LockTimeoutError, SettingsError, StoreFormatError, UnsafePathError, VolumeError
from kserve_pvc.locks.external import ExternalLock
from kserve_pvc.locks.flock import grab_file
from kserve_pvc.locks.lease import LeaseLostError

OURS = PurePosixPath(".kserve-pvc-initialize")
WORK = OURS / "work"
_RECORD = OURS / "record.json"
_PLAN = OURS / "plan.json"
_NEXT = OURS / "next"
_LOCK = OURS / "lock"
_KEY = "destination-0000000000000000"

Way = Literal["reflink", "link", "copy", "symlink"]

_CLONE = 0x40049409  # FICLONE
_T = TypeVar("_T")

# What a volume answers that cannot do it, or not between these two places.
_CANNOT = {
    *(
        errno.EXDEV,
        errno.EPERM,
        errno.EACCES,
        errno.EMLINK,
        errno.ENOTSUP,
        errno.EOPNOTSUPP,
        errno.ENOSYS,
        errno.EINVAL,
    ),
    *(errno.ENOTTY, errno.EBADF, errno.ETXTBSY),
}


@attrs.frozen(kw_only=True)
class Source:
    """
    One model that was put into a directory: the key says which one it is, patterns included.
    """

    key: str = attrs.field(validator=text)
    uri: str = attrs.field(validator=text)
    version: str = attrs.field(validator=text)


def _sources(value: Any) -> tuple[Source, ...]:
    return tuple(item if isinstance(item, Source) else build(Source, item) for item in _listed(value))


def _files(value: Any) -> tuple[FileEntry, ...]:
    return tuple(item if isinstance(item, FileEntry) else build(FileEntry, item) for item in _listed(value))


def _listed(value: Any) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise TypeError("it must be a list")
    return value


def _checked(value: Any) -> tuple[str, ...]:
    return tuple(str(check_name(path)) for path in _listed(value))


@attrs.frozen(kw_only=True)
class Contents:
    """
    What of ours lies in a directory: complete, if this is its record.
    """

    sources: tuple[Source, ...] = attrs.field(converter=_sources)
    files: tuple[FileEntry, ...] = attrs.field(converter=_files)
    # Whether the files are links into a store.
    is_linked: bool = attrs.field(default=False, validator=instance_of(bool))

    def __attrs_post_init__(self) -> None:
        check_collisions(f.path for f in self.files)
        for file in self.files:
            if file.path.parts[0] == OURS.name:
                raise UnsafePathError(str(file.path), f"`{OURS}` is where the initializer keeps its own files")


@attrs.frozen(kw_only=True)
class _Plan:
    """
    The names of all files of ours that may lie in a directory.
    """

    paths: tuple[str, ...] = attrs.field(converter=_checked)


class Destination:
    """
    The directory itself, which is made if it is missing.

    Raises:
        SettingsError: It is no directory, or a link, or cannot be made.
    """

    def __init__(self, place: str | os.PathLike[str]) -> None:
        _make(Path(place))
        self._writer = VolumeWriter(place)
        # The server may run as any user.
        self._writer.file_mode = 0o644 | (self._writer.file_mode & 0o020)

    @property
    def root(self) -> Path:
        return self._writer.root

    def absolute(self, place: PurePosixPath) -> Path:
        """
        Return the path of something in the directory.
        """
        return self._writer.absolute(place)

    def record(self) -> Contents | None:
        """
        What is completely there, or None.
        """
        contents = self._read(Contents, _RECORD)
        if contents is None:
            return None
        is_there = self._is_linked if contents.is_linked else self._is_there
        return contents if all(map(is_there, contents.files)) else None

    def _is_there(self, file: FileEntry) -> bool:
        try:
            with self._writer.open_parent(file.path) as parent:
                found = os.stat(file.path.name, dir_fd=parent, follow_symlinks=False)
        except (OSError, UnsafePathError):
            return False
        return stat.S_ISREG(found.st_mode) and found.st_size == file.size_bytes

    def _is_linked(self, file: FileEntry) -> bool:
        try:
            found = os.stat(self.absolute(file.path))
        except OSError:
            return False
        return stat.S_ISREG(found.st_mode) and found.st_size == file.size_bytes

    def _read(self, cls: type[_T], place: PurePosixPath) -> _T | None:
        # One that is damaged counts as none: then everything is put there anew.
        try:
            data = self._writer.read(place, MAX_MANIFEST_BYTES)
            return None if data is None else decode(cls, data, str(self.absolute(place)))
        except StoreFormatError:
            return None

    @contextmanager
    def writing(self, holder: Holder, lease_seconds: float) -> Iterator[Callable[[], None]]:
        """
        Be the only one who writes here. Yields what to call before each step that others would see.

        Raises:
            LockTimeoutError: Another process that lives is writing here.
        """
        with ExitStack() as stack:
            # Between nodes the kernel's lock may be granted to all, or stay with a node that is gone: signs of life
            # decide alone.
            is_alone = not mount_of(self.root).is_network and self._has_kernel_lock(stack, lease_seconds)
            yield _nothing if is_alone else stack.enter_context(self._claimed(holder, lease_seconds))

    def _has_kernel_lock(self, stack: ExitStack, timeout: float) -> bool:
        """Acquire the kernel's lock, which ends with its holder. False if it is unavailable, or takes too long."""
        lock = ExternalLock(partial(grab_file, partial(self._writer.open_shared, _LOCK)), timeout=timeout)
        stack.callback(lock.release)
        is_held = lock.try_acquire(on_timeout=None)
        if is_held is False:
            raise self._taken("another process")
        return is_held is True

    @contextmanager
    def _claimed(self, holder: Holder, lease_seconds: float) -> Iterator[Callable[[], None]]:
        self._writer.make_directory(OURS)
        claims = VolumeWriter(self.absolute(OURS))
        if (other := find_live_downloader(claims, _KEY, lease_seconds=lease_seconds)) is not None:
            raise self._taken(other)
        epoch = newest_epoch(claims, _KEY) + 1
        if take_claim(claims, _KEY, epoch, uri="file://", holder=holder) is None:
            raise self._taken("another process")
        heart = start_heartbeat(
            claims,
            layout.claim_dir(_KEY, epoch),
            lease_seconds=lease_seconds,
            superseded=lambda: newest_epoch(claims, _KEY) > epoch,
        )

        def check() -> None:
            try:
                heart.check()
            except LeaseLostError as error:
                raise self._taken("another process, since this one stood still for too long") from error

        try:
            yield check
        finally:
            heart.stop()

    def _taken(self, holder: str) -> LockTimeoutError:
        return LockTimeoutError(str(self.root), holder, 0.0, 0.0, 0, 0)

    def fill(self, contents: Contents, bring: Callable[[FileEntry], None], check: Callable[[], None]) -> None:
        """
        Put these files here and remove others of ours. Whatever happens meanwhile, doing it again comes to the same
        end.

        Args:
            bring: Puts one file into its place.
        """
        wanted = {file.path for file in contents.files}
        ours = self._known()
        check()
        self._plan(wanted | ours)
        for path in sorted(ours - wanted, reverse=True):
            check()
            self._remove(path)
        for file in contents.files:
            check()
            bring(file)
        with self._writer.translated("syncing", PurePosixPath()):
            self._sync_directories(wanted)
        check()
        self._put(_RECORD, encode(contents))

    def tidy(self) -> None:
        """
        Remove what is needed no longer once the record is there.
        """
        for place in (_PLAN, _NEXT, WORK):
            self.drop(place)

    def make_work(self) -> Path:
        """
        Make the directory in which models are prepared, and return its path.
        """
        self._writer.make_directory(WORK)
        return self.absolute(WORK)

    def begun(self) -> set[str]:
        """
        Return the keys of the models that an earlier call began to prepare.
        """
        return set(self._writer.list_names(WORK / layout.KEYS))

    def _known(self) -> set[PurePosixPath]:
        """Every file that an earlier call has put here, or may have."""
        record, plan = self._read(Contents, _RECORD), self._read(_Plan, _PLAN)
        return {file.path for file in (record.files if record else ())} | {
            PurePosixPath(path) for path in (plan.paths if plan else ())
        }

    def _plan(self, paths: Iterable[PurePosixPath]) -> None:
        # First what may be here from now on, then that the old record holds no longer.
        self._put(_PLAN, encode(_Plan(paths=tuple(map(str, sorted(paths))))))
        self.drop(_RECORD)
        with self._writer.translated("syncing", OURS):
            self._sync_directory(OURS)

    def _put(self, place: PurePosixPath, data: bytes) -> None:
        self.drop(_NEXT)
        self._writer.write_private(_NEXT, data)
        self._rename(_NEXT, place)
        with self._writer.translated("syncing", place):
            self._sync_directory(place.parent)

    def drop(self, place: PurePosixPath) -> None:
        """
        Delete something of our own, if it is there.
        """
        if place.parts[0] != OURS.name or len(place.parts) < 2:
            raise UnsafePathError(str(place), "only what the initializer has made is deleted")
        with (
            self._writer.translated("deleting", place),
            suppress(FileNotFoundError),
            self._writer.open_parent(place) as parent,
        ):
            delete_tree(parent, place.name)

    def _remove(self, path: PurePosixPath) -> None:
        """Remove a file that an earlier call has put here, and the directories that become empty."""
        with self._writer.translated("removing", path), suppress(FileNotFoundError, UnsafePathError):
            with self._writer.open_parent(path) as parent, suppress(IsADirectoryError):
                os.unlink(path.name, dir_fd=parent)
            for above in path.parents[:-1]:
                with self._writer.open_parent(above) as parent:
                    try:
                        os.rmdir(above.name, dir_fd=parent)
                    except OSError:
                        return

    def move(self, source: PurePosixPath, file: FileEntry) -> bool:
        """
        Rename a file of our own into its place.

        Returns:
            False if it is not there any more and what lies in its place is not it either.
        """
        try:
            with self._writer.open_file(source) as fd:
                self._writer.set_open_mode(fd, self._writer.file_mode)
        except FileNotFoundError:
            return self._is_moved(file)
        self._rename(source, file.path)
        return True

    def _is_moved(self, file: FileEntry) -> bool:
        try:
            with self._writer.open_file(file.path) as fd:
                return os.fstat(fd).st_size == file.size_bytes and (file.sha256 is None or _digest(fd) == file.sha256)
        except (FileNotFoundError, UnsafePathError):
            return False

    def take(self, source: Path, file: FileEntry, ways: Iterable[Way]) -> Way:
        """
        Put what a store holds into its place, in the first of these ways that the volumes can.

        Raises:
            VolumeError: None of them can.
        """
        self.drop(_NEXT)
        for way in ways:
            with self._writer.translated(f"making a {way} of `{source}`", file.path):
                if self._take(source, file, way):
                    self._rename(_NEXT, file.path)
                    return way
                self.drop(_NEXT)
        reason = f"the volumes cannot make it a {' or a '.join(ways)}; choose another way with `KSERVE_PVC_MATERIALIZE`"
        raise VolumeError(str(self.absolute(file.path)), f"taking it from `{source}`", reason)

    def _take(self, source: Path, file: FileEntry, way: Way) -> bool:
        self._writer.make_directory(OURS)
        if way == "symlink":
            place = self.absolute(file.path).parent
            return self._made(lambda parent: os.symlink(os.path.relpath(source, place), _NEXT.name, dir_fd=parent))
        if way == "link":
            return self._made(lambda parent: os.link(source, _NEXT.name, dst_dir_fd=parent, follow_symlinks=False))
        return self._copy(source, file, is_clone=way == "reflink")

    def _made(self, make: Callable[[int], None]) -> bool:
        try:
            with self._writer.open_parent(_NEXT) as parent:
                make(parent)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
            return False
        return True

    def _copy(self, source: Path, file: FileEntry, *, is_clone: bool) -> bool:
        read = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            written = self._writer.create(_NEXT)
            try:
                if is_clone and not _clone(read, written):
                    return False
                if not is_clone:
                    allocate(written, file.size_bytes)
                    copy_range(read, written, 0, file.size_bytes)
                if os.fstat(written).st_size != file.size_bytes:
                    raise VolumeError(str(source), "copying", f"it has not the {file.size_bytes} bytes of its record")
                os.fsync(written)
            finally:
                os.close(written)
        finally:
            os.close(read)
        return True

    def _rename(self, source: PurePosixPath, path: PurePosixPath) -> None:
        with self._writer.translated("renaming", path):
            fd = self._writer.ensure_directory(path.parent)
            try:
                with self._writer.open_parent(source) as parent:
                    _rename_into(parent, source.name, fd, path)
            finally:
                os.close(fd)

    def _sync_directories(self, paths: Iterable[PurePosixPath]) -> None:
        for directory in sorted({above for path in paths for above in path.parents}, reverse=True):
            self._sync_directory(directory)

    def _sync_directory(self, place: PurePosixPath) -> None:
        fd = self._writer.open_directory(place)
        try:
            with suppress(OSError):  # Some volumes refuse to; then there is nothing to be done.
                os.fsync(fd)
        finally:
            os.close(fd)


def _rename_into(source: int, name: str, target: int, path: PurePosixPath) -> None:
    try:
        os.rename(name, path.name, src_dir_fd=source, dst_dir_fd=target)
    except IsADirectoryError:
        try:
            os.rmdir(path.name, dir_fd=target)
        except OSError as error:
            raise UnsafePathError(
                str(path), "a directory with files of others stands where it belongs; empty it"
            ) from error
        os.rename(name, path.name, src_dir_fd=source, dst_dir_fd=target)


def _clone(source: int, target: int) -> bool:
    import fcntl

    try:
        fcntl.ioctl(target, _CLONE, source)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
        return False
    return True


def _digest(fd: int) -> str:
    hashed, buffer, offset = sha256(), make_buffer(1024 * 1024), 0
    while count := os.preadv(fd, [buffer], offset):
        hashed.update(buffer[:count])
        offset += count
    return hashed.hexdigest()


def _make(place: Path) -> None:
    if place.is_symlink():
        raise SettingsError("DEST", str(place), "it is a link; name the directory itself")
    try:
        place.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise SettingsError("DEST", str(place), "it is not a directory") from error
    except OSError as error:
        reason = f"it cannot be made: {os.strerror(error.errno or errno.EIO)}; mount a volume there that uid {os.geteuid()} may write"
        raise SettingsError("DEST", str(place), reason) from error


@contextmanager
def temporary_directory() -> Iterator[str]:
    """
    Make a directory for a caller who names none. It stays, unless an error ends what is done with it.
    """
    from shutil import rmtree
    from tempfile import mkdtemp

    place = mkdtemp(prefix="kserve-pvc-")
    try:
        yield place
    except BaseException:
        rmtree(place, ignore_errors=True)
        raise


def _nothing() -> None:
    """Nobody else can have become the writer meanwhile."""
