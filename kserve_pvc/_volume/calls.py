"""
System calls with the fallbacks that network volumes need.

A call that failed may have been carried out, so its effect is looked for. A descriptor whose `fsync` failed is never
synced again.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from typing import Any, NoReturn, TypeVar

_T = TypeVar("_T")
# How a file system without the operation fails; then the next alternative is tried, or none.
UNSUPPORTED = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EXDEV, errno.EMLINK}
NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
CREATE_FLAGS = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_REPLACE = 1  # RENAME_NOREPLACE
_KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE: a file is as long as what was written to it.
_PUNCH_HOLE = 2  # FALLOC_FL_PUNCH_HOLE
_COPY_BYTES = 1 << 30
_PIECE_BYTES = 1024 * 1024
_FIRST_LISTING_BYTES = 16 * 1024
_LISTING_BYTES = 512 * 1024
_DELETED_LEVELS = 32


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
    Reserve room for a file, where the volume can: a full volume fails at once, and files are contiguous.

    `os.posix_fallocate` writes a byte into every block where the volume cannot, so the system call itself is made.
    """
    try:
        call_libc("fallocate", fd, _KEEP_SIZE, 0, size)
    except OSError as error:
        if error.errno in NO_SPACE:
            raise


def trim(fd: int, ranges: Iterable[tuple[int, int]]) -> None:
    """
    Free what a file occupies outside of these ranges, which are in order, where the volume can. The file ends with the
    last of them.
    """
    with suppress(OSError):
        end = 0
        for start, stop in ranges:
            if start > end:
                with suppress(OSError):  # A hole where the volume has holes; the end is cut off everywhere.
                    call_libc("fallocate", fd, _PUNCH_HOLE | _KEEP_SIZE, end, start - end)
            end = stop
        # Even if the file ends there, what was reserved beyond is given back.
        os.ftruncate(fd, end)


@lru_cache(maxsize=1)
def _libc() -> Any:
    try:
        import ctypes

        return ctypes.CDLL(None, use_errno=True)
    except (ImportError, OSError):  # A Python that was built without it.
        return None


def has_libc(name: str) -> bool:
    return hasattr(_libc(), name)


def call_libc(name: str, *arguments: int) -> None:
    """A system call of Linux that Python does not have."""
    if not has_libc(name):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    import ctypes

    if getattr(_libc(), name)(arguments[0], *map(ctypes.c_int64, arguments[1:])) != 0:
        _raise_libc()


def _raise_libc() -> NoReturn:
    import ctypes

    code = ctypes.get_errno()
    raise OSError(code, os.strerror(code))  # As the class that belongs to the number, such as FileExistsError.


def list_large(fd: int) -> list[str]:
    """
    List an open directory that may have very many names, in calls of up to half a mebibyte. The libc makes 16 of them.
    """
    if not has_libc("getdents64"):
        return os.listdir(fd)
    import ctypes

    names: list[str] = []
    buffer = ctypes.create_string_buffer(_FIRST_LISTING_BYTES)
    while (count := _libc().getdents64(fd, buffer, ctypes.c_size_t(len(buffer)))) > 0:
        names.extend(_entry_names(memoryview(buffer)[:count].tobytes()))
        if len(buffer) < _LISTING_BYTES:
            buffer = ctypes.create_string_buffer(_LISTING_BYTES if count > len(buffer) // 2 else len(buffer))
    if count < 0:
        _raise_libc()
    return names


def _entry_names(data: bytes) -> Iterator[str]:
    """The names in an array of `struct linux_dirent64`: eight bytes, eight bytes, length, type, name, NUL."""
    offset = 0
    while offset < len(data):
        name = data[offset + 19 : data.index(b"\0", offset + 19)]
        if name not in (b".", b".."):
            yield os.fsdecode(name)
        offset += int.from_bytes(data[offset + 16 : offset + 18], sys.byteorder)


def rename_no_replace(directory: int, name: str, new: str) -> None:
    if not has_libc("renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if _libc().renameat2(directory, os.fsencode(name), directory, os.fsencode(new), _NO_REPLACE) != 0:
        _raise_libc()


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
            if error.errno not in UNSUPPORTED | {errno.EBADF, errno.EOVERFLOW, errno.EIO}:
                raise
            count = 0
        if count == 0:  # Some file systems return 0 instead of failing.
            piece = os.pread(source, min(stop - start, _PIECE_BYTES), start)
            if not piece:
                return False
            write_all(target, piece, start)
            count = len(piece)
        start += count
    return True


def is_free_for_link(directory: int, name: str) -> bool:
    # Kubernetes makes an empty directory where a pod mounts a `subPath` that is not there. Nothing is lost with it.
    with suppress(OSError):
        os.rmdir(name, dir_fd=directory)
    try:
        return stat.S_ISLNK(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return True


def dated_name() -> str:
    """Make a unique name that begins with the time, so that cleaning up sees how old it is."""
    return f"{int(time.time()):012d}-{os.urandom(8).hex()}"


def retry_stale(act: Callable[[], _T], codes: Collection[int] = (errno.ENOENT, errno.ESTALE)) -> _T:
    """Try again, for a second or so, what failed because a directory on its way is only just being made."""
    pause = 0.005
    while True:
        try:
            return act()
        except OSError as error:
            # GlusterFS returns either for a directory that exists, while another node is still making it.
            if error.errno not in codes or pause > 1:
                raise
        time.sleep(pause)
        pause *= 2


def sync_directory(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in UNSUPPORTED and error.errno != errno.EBADF:
            raise


def sync_below(fd: int) -> None:
    for name in os.listdir(fd):
        if stat.S_ISDIR(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
            child = os.open(name, DIRECTORY_FLAGS, dir_fd=fd)
            try:
                sync_below(child)
            finally:
                os.close(child)
    sync_directory(fd)


def delete_tree(parent: int, name: str) -> None:
    """
    Delete a file, or a directory with all that is in it, below an open directory, following no link.

    However many levels there are, few descriptors are open: what lies deep is moved up first. What cannot be deleted
    stays, and the first error is raised once the rest is gone.
    """
    failures: list[OSError] = []
    fd = _open_or_unlink(parent, name)
    if fd is None:
        return
    try:
        while _delete_children(fd, fd, _DELETED_LEVELS, failures):
            pass  # What was moved up is in this directory now.
    finally:
        os.close(fd)
    _remove_directory(parent, name)
    if failures:
        raise failures[0]


def _delete_children(fd: int, top: int, levels: int, failures: list[OSError]) -> int:
    """Delete what is in an open directory, and return how many deep directories were moved into `top`."""
    moved = 0
    for name in os.listdir(fd):
        try:
            child = _open_or_unlink(fd, name)
            if child is None:
                continue
            try:
                moved += _delete_children(child, top, levels - 1, failures) if levels else _move_up(child, top)
            finally:
                os.close(child)
            _remove_directory(fd, name)
        except FileNotFoundError:
            continue
        except OSError as error:
            failures.append(error)
    return moved


def _move_up(fd: int, top: int) -> int:
    names = os.listdir(fd)
    for name in names:
        os.rename(name, f"{os.urandom(16).hex()}", src_dir_fd=fd, dst_dir_fd=top)
    return len(names)


def _open_or_unlink(parent: int, name: str) -> int | None:
    """Open a directory, or delete what is none."""
    try:
        return os.open(name, DIRECTORY_FLAGS, dir_fd=parent)
    except PermissionError:
        os.rmdir(name, dir_fd=parent)  # Another user's, and empty.
        return None
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
    os.unlink(name, dir_fd=parent)
    return None


def _remove_directory(parent: int, name: str) -> None:
    try:
        os.rmdir(name, dir_fd=parent)
    except OSError as error:
        # On NFS a file that is open becomes `.nfs…` instead of vanishing; the trash is emptied again later.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY):
            raise
