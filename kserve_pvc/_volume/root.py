"""
`KeptRoot`: the root of a volume, which stays open, so that neither a link nor another volume takes its place.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from kserve_pvc._format.layout import SETTINGS
from kserve_pvc._volume.beneath import PATH_FLAGS, open_beneath
from kserve_pvc.errors import StoreRootError

# A descriptor of a volume that was mounted anew, as after the end of what served it.
_IS_LOST = {errno.ESTALE, errno.ENOTCONN}
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class _Opened:
    """A directory that is open for as long as something refers to it."""

    __slots__ = ("fd", "identity")

    def __init__(self, path: Path) -> None:
        self.fd = -1
        self.fd = os.open(path, PATH_FLAGS)
        self.identity = _identify(os.fstat(self.fd))

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class KeptRoot:
    """
    The root of a volume, opened once.

    Args:
        path: The root, with all links resolved.

    Attributes:
        settings: The content of `store.json`, once the store was opened. It is never written again, so it tells stores
            apart.

    Raises:
        StoreRootError: It cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.settings: bytes | None = None
        self._opened = self._open()
        self._sign: tuple[int, ...] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path, "settings": self.settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._opened, self._sign = self._open(), None

    def _open(self) -> _Opened:
        try:
            return _Opened(self._path)
        except OSError as error:
            raise StoreRootError(str(self._path), os.strerror(error.errno or errno.EIO)) from error

    def stat(self) -> os.stat_result:
        opened = self._opened  # It stays open until this call is over.
        return os.fstat(opened.fd)

    def open(self, place: PurePosixPath, flags: int, mode: int = 0) -> int:
        """
        Open something below the root.

        Raises:
            OSError: Its number is `ELOOP` if a link stands anywhere on the way.
            StoreRootError: The volume was mounted anew, and is another.
        """
        opened = self._opened
        try:
            return open_beneath(opened.fd, str(place), flags, mode)
        except OSError as error:
            if error.errno not in _IS_LOST:
                raise
        self._reopen()
        opened = self._opened
        return open_beneath(opened.fd, str(place), flags, mode)

    def check(self, *, may_change: bool = True) -> None:
        """
        See that the directory which was opened is still the one at its path. If the same store was mounted again, that
        is opened instead.

        Args:
            may_change: Whether any other directory will do as long as no store was opened here, as for a reader.

        Raises:
            StoreRootError: Another volume is there, or none.
        """
        try:
            found = os.stat(self._path)
        except OSError as error:
            raise StoreRootError(str(self._path), f"it is gone: {os.strerror(error.errno or errno.EIO)}") from error
        if _identify(found) != self._opened.identity:
            self._reopen(may_change=may_change)

    def check_store(self) -> None:
        """
        See that `store.json` is there and the one that was opened, before anything is made.

        Raises:
            StoreRootError: It is not.
        """
        self.check(may_change=False)
        if self.settings is None:
            return  # No store was opened here, as before one is created.
        opened, sign = self._opened, None
        with suppress(OSError):
            found = os.stat(str(SETTINGS), dir_fd=opened.fd, follow_symlinks=False)
            sign = (*_identify(found), found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        if sign is not None and sign == self._sign:
            return
        # A network volume may have cached that sign; the content decides.
        if not _holds(opened, self.settings):
            raise StoreRootError(
                str(self._path),
                f"`{SETTINGS}` of the store that was opened here is gone or was replaced, so nothing is written; "
                "restore it, or open the store anew",
            )
        self._sign = sign

    def _reopen(self, *, may_change: bool = True) -> None:
        opened = self._open()
        if not (may_change if self.settings is None else _holds(opened, self.settings)):
            raise StoreRootError(
                str(self._path), "what was opened here was unmounted or replaced; mount it again, or open it anew"
            )
        self._opened, self._sign = opened, None


def _identify(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _holds(opened: _Opened, settings: bytes) -> bool:
    """Whether a directory is the root of the store with these settings."""
    fd = -1
    try:
        fd = open_beneath(opened.fd, str(SETTINGS), _READ_FLAGS)
        return os.read(fd, len(settings) + 1) == settings
    except OSError:
        return False
    finally:
        if fd >= 0:
            os.close(fd)
