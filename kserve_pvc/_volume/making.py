"""
Making directories and files with the mode of a store, whatever the umask.

A mode is set only through a descriptor, and only of what this process has just created: a path may lead to something
else by then, and a file may have a second name somewhere else.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import PurePosixPath

from kserve_pvc._volume.calls import CREATE_FLAGS, DIRECTORY_FLAGS, dated_name, sync_directory
from kserve_pvc._volume.reading import open_part
from kserve_pvc.errors import UnsafePathError

_LOCK_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def enter_or_make(parent: int, part: PurePosixPath, mode: int) -> int:
    """
    Open a directory in an open one, making it if need be. It is not durable then: its parent is to be synced by the
    caller, before anything that needs it.
    """
    try:
        return widened(open_part(parent, part, DIRECTORY_FLAGS), mode)
    except FileNotFoundError:
        pass
    except PermissionError:
        # What a process left that was killed before it could set the mode is empty, and nothing else is removed.
        with suppress(OSError):
            os.rmdir(part.name, dir_fd=parent)
    with suppress(FileExistsError):
        make_directory_at(parent, part, mode, is_durable=False)
    return open_part(parent, part, DIRECTORY_FLAGS)


def make_directory_at(parent: int, place: PurePosixPath, mode: int, *, is_durable: bool) -> None:
    """
    Make a directory in an open one.

    Raises:
        FileExistsError: The name is taken.
    """
    os.mkdir(place.name, mode, dir_fd=parent)
    with suppress(OSError, UnsafePathError):  # The name is taken, whatever became of it since.
        fd = open_part(parent, place, DIRECTORY_FLAGS)
        try:
            _widen_directory(fd, mode)
        finally:
            os.close(fd)
    if is_durable:
        sync_directory(parent)


def widened(fd: int, mode: int) -> int:
    """
    Return an open directory, with the mode of the store if a process of ours was killed before it could set that.

    Otherwise another process of ours would fill it, and it would stay closed to all other users.
    """
    with suppress(OSError):
        _widen_directory(fd, mode)
    return fd


def _widen_directory(fd: int, wanted: int) -> None:
    # Another process may have put something else there, so it has to look like what was just made: ours, empty, and
    # with no more than the mode it was made with, less what the umask took.
    found = os.fstat(fd)
    mode = stat.S_IMODE(found.st_mode)
    if not wanted & ~mode or mode & 0o777 & ~wanted or found.st_uid != os.geteuid() or os.listdir(fd):
        return
    os.fchmod(fd, mode | wanted)  # The set-gid bit of an `fsGroup` volume is inherited.


def create_file_at(parent: int, place: PurePosixPath, mode: int) -> int:
    """
    Create a file in an open directory, and open it for reading and writing.

    Raises:
        FileExistsError: The name is taken.
    """
    fd = open_part(parent, place, CREATE_FLAGS, mode)
    widen_new_file(fd, mode)
    return fd


def widen_new_file(fd: int, wanted: int) -> None:
    """
    Give a file that this process has just created the mode of the store, which a umask may have narrowed.
    """
    with suppress(OSError):  # Object and SMB mounts refuse.
        found = os.fstat(fd)
        if found.st_nlink == 1 and wanted & ~stat.S_IMODE(found.st_mode):
            os.fchmod(fd, wanted)


def open_lock_file(parent: int, place: PurePosixPath, mode: int) -> int:
    """
    Open a file that several processes lock, creating it if need be.

    Raises:
        UnsafePathError: It is not a regular file, or has a second name, as one of another tenant would.
    """
    with suppress(FileExistsError):
        return create_file_at(parent, place, mode)
    try:
        fd = open_part(parent, place, _LOCK_FLAGS)
    except PermissionError:
        # A process that was killed before it set the mode left it. Safety depends on no lock, so a second file does
        # less harm than a key that is closed to all others.
        os.rename(place.name, f"{place.name}.{dated_name()}", src_dir_fd=parent, dst_dir_fd=parent)
        return create_file_at(parent, place, mode)
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(fd)
        raise UnsafePathError(str(place), "it is not a file with this name only, so no writer made it; delete it")
    return fd
