"""
Opening what lies beneath a directory: no component of the path may be a link, or none may lead out of it.

Linux 5.6 has one call for it, `openat2`. Elsewhere every component is opened from the one above it, which is as safe
and somewhat slower.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path, PurePosixPath

# `EXDEV` is how `openat2` says that a path leads out, the others how a link is refused where a directory was requested.
IS_LINK = {errno.ELOOP, errno.EXDEV}
# A descriptor of a directory that only names it: it needs no right to read, and no volume keeps it open.
PATH_FLAGS = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# As long as the name of a file of a model can be, see `file_names`, with as many levels.
LONGEST_PATH = 1024
# As the kernel counts them on the way to one file.
_MAX_LINKS = 40
_SYS_OPENAT2 = 437  # On every architecture.
_NO_MAGIC_LINKS = 0x02
_NO_LINKS = 0x04
_BENEATH = 0x08
# How kernels, and the filters of container runtimes, refuse a call that they do not know; and a race with a rename.
_UNAVAILABLE = {errno.ENOSYS, errno.EPERM, errno.E2BIG, errno.EINVAL, errno.EAGAIN}

_FEW = 32
_steps = 0

_Call = Callable[[int, bytes, int, int, int], int]


def open_beneath(directory: int, path: str, flags: int, mode: int = 0) -> int:
    """
    Open a path below an open directory, following no link in any of its components and never leaving the directory.

    Raises:
        OSError: As `os.open`; its number is `ELOOP` where a link stands.
    """
    call = _call_if_worth()
    if call is None:
        return open_each(directory, path, flags, mode)
    sys.audit("open", path, None, flags)
    encoded = os.fsencode(path)
    mode = mode if flags & os.O_CREAT else 0  # The call refuses a mode that means nothing.
    fd = call(directory, encoded, flags | os.O_CLOEXEC, mode, _BENEATH | _NO_LINKS | _NO_MAGIC_LINKS)
    if fd >= 0:
        return fd
    if -fd in _UNAVAILABLE:
        return open_each(directory, path, flags, mode)
    raise OSError(errno.ELOOP if -fd in IS_LINK else -fd, os.strerror(-fd), path)


def open_each(directory: int, path: str, flags: int, mode: int = 0) -> int:
    """
    As `open_beneath`, one component after the other. A network volume looks again for each of them.
    """
    *above, name = path.split("/")
    if ".." in (*above, name):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
    parent = directory
    try:
        for part in above:
            child = _open_at(parent, part, PATH_FLAGS)
            if parent != directory:
                os.close(parent)
            parent = child
        return _open_at(parent, name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    finally:
        if parent != directory:
            os.close(parent)


def _open_at(parent: int, name: str, flags: int, mode: int = 0) -> int:
    try:
        return os.open(name, flags, mode, dir_fd=parent)
    except NotADirectoryError as error:
        # With O_NOFOLLOW and O_DIRECTORY a link is not a directory.
        if is_link(parent, name):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), name) from error
        raise


def walk_beneath(
    top: int, *, enters: Callable[[PurePosixPath], bool] = lambda inside: True
) -> Iterator[tuple[PurePosixPath, os.stat_result]]:
    """
    Walk an open directory without following links, one directory open at a time, however many levels there are.

    Args:
        enters: Whether a directory is walked too. One that is not need not be readable.

    Yields:
        Everything but directories, sorted within each; and those directories that lie deeper than any file of a model
        can, which are not entered.
    """
    waiting = [iter(_look_into(top, PurePosixPath()))]
    while waiting:
        for inside, found in waiting[-1]:
            if stat.S_ISDIR(found.st_mode) and len(os.fsencode(inside)) <= LONGEST_PATH:
                if not enters(inside):
                    continue
                waiting.append(iter(_look_into(top, inside)))
                break
            yield inside, found
        else:
            waiting.pop()


def follow_beneath(top: int, path: PurePosixPath, *, root: Path) -> tuple[PurePosixPath, os.stat_result]:
    """
    Find what a path below an open directory leads to, following links, but none that leads out of the directory.

    Every step is taken from `top` along a path without links, so whatever is renamed or replaced meanwhile, nothing
    outside is looked at.

    Args:
        root: The path of `top`. An absolute link below it is one of its own.

    Returns:
        The path below `top` without links, to be opened with `open_beneath`, and the status of what is there.

    Raises:
        OSError: `EXDEV` if a link leads out, `ELOOP` for a circle, `ENOENT` if it leads nowhere.
    """
    waiting, done, links = list(reversed(path.parts)), list[str](), 0
    while waiting:
        name = waiting.pop()
        if name == "..":
            if not done:
                raise _failure(errno.EXDEV, path)
            done.pop()
            continue
        target = _read_link(top, done, name)
        if target is None:
            done.append(name)
            continue
        links += 1
        if links > _MAX_LINKS:
            raise _failure(errno.ELOOP, path)
        if target.is_absolute():
            if not target.is_relative_to(root):
                raise _failure(errno.EXDEV, path)
            target, done = target.relative_to(root), []
        waiting += reversed(target.parts)
    real = PurePosixPath(*done)
    fd = open_beneath(top, str(real), os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return real, os.fstat(fd)
    finally:
        os.close(fd)


def _read_link(top: int, above: list[str], name: str) -> PurePosixPath | None:
    """Return where a name in a directory leads, or None if it is not a link."""
    fd = open_beneath(top, "/".join(above) or ".", PATH_FLAGS)
    try:
        found = os.stat(name, dir_fd=fd, follow_symlinks=False)
        return PurePosixPath(os.readlink(name, dir_fd=fd)) if stat.S_ISLNK(found.st_mode) else None
    finally:
        os.close(fd)


def _failure(code: int, path: PurePosixPath) -> OSError:
    return OSError(code, os.strerror(code), str(path))


def _look_into(top: int, inside: PurePosixPath) -> list[tuple[PurePosixPath, os.stat_result]]:
    fd = open_beneath(top, str(inside), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return [(inside / name, os.stat(name, dir_fd=fd, follow_symlinks=False)) for name in sorted(os.listdir(fd))]
    finally:
        os.close(fd)


def is_link(parent: int, name: str) -> bool:
    """
    Whether a name in an open directory is a symbolic link now.
    """
    try:
        return stat.S_ISLNK(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
    except OSError:
        return False


def _call_if_worth() -> _Call | None:
    global _steps
    # A process that looks for one model and is gone need not load `ctypes`, which takes longer.
    if _steps < _FEW and "ctypes" not in sys.modules:
        _steps += 1
        return None
    return _openat2()


@cache
def _openat2() -> _Call | None:
    """The system call, or None where the kernel, a filter or this Python does not have it."""
    try:
        import ctypes
    except ImportError:  # A Python that was built without it.
        return None

    class How(ctypes.Structure):
        _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))

    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.restype = ctypes.c_long
    syscall.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(How), ctypes.c_size_t)
    size, known = ctypes.sizeof(How), dict[tuple[int, int, int], How]()

    def openat2(directory: int, path: bytes, flags: int, mode: int, resolve: int) -> int:
        if (how := known.get((flags, mode, resolve))) is None:
            how = known[flags, mode, resolve] = How(flags, mode, resolve)  # There are a few, and making one takes time.
        while (fd := syscall(_SYS_OPENAT2, directory, path, how, size)) < 0:
            if (code := ctypes.get_errno()) != errno.EINTR:
                return -code
        return int(fd)

    root = os.open("/", PATH_FLAGS)
    try:
        found = openat2(root, b".", PATH_FLAGS, 0, _BENEATH | _NO_LINKS | _NO_MAGIC_LINKS)
    finally:
        os.close(root)
    if found < 0:
        return None
    os.close(found)
    return openat2
