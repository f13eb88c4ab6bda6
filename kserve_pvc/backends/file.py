"""
`file://`: models that already lie on a mounted file system.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import attrs

from kserve_pvc._format.file_names import check_name
from kserve_pvc._format.records import FileEntry
from kserve_pvc._source.contract import Backend, RemoteFile, Resolved, order_listing
from kserve_pvc._source.ref import ModelRef
from kserve_pvc._volume.beneath import open_beneath, walk_beneath
from kserve_pvc.backends._options import Rule, configured_options, options_beyond
from kserve_pvc.errors import (
    InvalidURIError,
    SourceChangedError,
    SourceDeniedError,
    SourceNotFoundError,
    SourceUnavailableError,
    StoreError,
    UnsafePathError,
)

LOST_AND_FOUND = "lost+found"
RULES = (
    Rule(configured_options, "is set in fsspec's configuration"),
    Rule(options_beyond(()), "is an argument of fsspec's LocalFileSystem"),
)


def file_backend(options: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> Backend:
    """
    Make the backend for `file://`: our own, or fsspec's `LocalFileSystem` where an option is one of its arguments.

    Raises:
        SettingsError: An option is unknown.
    """
    from kserve_pvc.backends._through_class import choose

    def load() -> list[Any]:
        from fsspec.implementations.local import LocalFileSystem

        return [LocalFileSystem]

    def through(arguments: Mapping[str, Any]) -> Backend:
        from kserve_pvc.backends.fsspec_ import FsspecBackend

        return FsspecBackend(arguments)

    return choose(
        "file", options, environ, rules=RULES, own=(), load=load, direct=lambda _: FileBackend(), through=through
    )


@attrs.frozen
class FileBackend:
    """
    Copies a file or directory of the local file system. Only regular files; links are refused, not followed.

    Content is pinned by device, inode, size and the times of its last change. Two changes within one tick of the
    kernel's clock, and some made through memory maps, look like one. Copy from directories that nothing edits.
    """

    options: Mapping[str, Any] = attrs.field(factory=dict, repr=False)

    def resolve(self, ref: ModelRef) -> Resolved:
        if ref.revision is not None:
            raise InvalidURIError(ref.uri, "a file has no revisions")
        if not ref.location.startswith("/"):
            raise InvalidURIError(ref.uri, "a file URI is `file:///absolute/path`")
        root = Path(ref.location)
        if ".." in root.parts:
            raise UnsafePathError(ref.location, "a path may not climb with `..`")
        try:
            fd = os.open(root, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise translate_error(ref.uri, error) from error
        try:
            return self.resolve_opened(ref, fd, root)
        finally:
            os.close(fd)

    def resolve_opened(self, ref: ModelRef, fd: int, root: Path) -> Resolved:
        """
        List what an open descriptor leads to. A link below it is refused, also one that was put there a moment ago.

        Args:
            root: The path of what is open.
        """
        try:
            return order_listing(ref, _list(fd, root, ref))
        except OSError as error:
            if isinstance(error, StoreError):
                raise
            if error.errno == errno.ELOOP:
                raise _refused(root) from error
            raise translate_error(ref.uri, error) from error

    def access(self, ref: ModelRef) -> str:
        del ref
        return "direct"

    @contextmanager
    def open_range(self, file: RemoteFile, start: int, stop: int) -> Iterator[_FileReader]:
        try:
            fd = _open_file(file)
        except PermissionError as error:
            raise translate_error(file.address, error) from error
        except OSError as error:
            raise _changed(file) from error
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise _changed(file)
            yield _FileReader(fd, start, stop, file)
        finally:
            os.close(fd)


@attrs.define
class _FileReader:
    fd: int
    offset: int
    stop: int
    file: RemoteFile

    def readinto(self, buffer: memoryview) -> int:
        try:
            count = os.preadv(self.fd, [buffer[: self.stop - self.offset]], self.offset)
        except OSError as error:
            raise translate_error(self.file.address, error) from error
        self.offset += count
        # Compared after reading: bytes that were read before the inode was found unchanged are those that were pinned.
        if _token(os.fstat(self.fd)) != self.file.entry.token:
            raise _changed(self.file)
        return count


def _list(fd: int, root: Path, ref: ModelRef) -> Iterator[RemoteFile]:
    found = os.fstat(fd)
    if not stat.S_ISDIR(found.st_mode):
        yield _file(root, PurePosixPath(check_name(root.name)), found)
        return

    def enters(inside: PurePosixPath) -> bool:
        # `fsck` makes `lost+found` at the root of a volume, readable by root only; it is not part of a model.
        return inside != PurePosixPath(LOST_AND_FOUND) and ref.may_select_below(inside.as_posix())

    for inside, below in walk_beneath(fd, enters=enters):
        if ref.selects(inside.as_posix()):
            yield _file(root / inside, check_name(inside.as_posix()), below)


def _open_file(file: RemoteFile) -> int:
    """Open a file from the directory that was listed; the token tells whether it still is the one that was."""
    inside = str(file.entry.path)
    above = os.open(file.address.removesuffix(inside) or "/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return open_beneath(above, inside, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        os.close(above)


def _file(path: Path, inside: PurePosixPath, found: os.stat_result) -> RemoteFile:
    if not stat.S_ISREG(found.st_mode):
        raise _refused(path)
    token = _token(found)
    return RemoteFile(
        entry=FileEntry(
            path=inside, size_bytes=found.st_size, token=token, executable=bool(found.st_mode & stat.S_IXUSR)
        ),
        address=str(path),
        pin={"inode": token},
    )


def _refused(path: Path) -> UnsafePathError:
    return UnsafePathError(str(path), "only regular files are copied; links and devices are refused")


def _token(found: os.stat_result) -> str:
    # Compared, never interpreted. Programs can set the time of the content back, but not that of the inode.
    return f"{found.st_dev:x}-{found.st_ino:x}-{found.st_size:x}-{found.st_mtime_ns:x}-{found.st_ctime_ns:x}"


def _changed(file: RemoteFile) -> SourceChangedError:
    return SourceChangedError(f"file://{file.address}", str(file.entry.path))


def translate_error(where: str, error: OSError) -> StoreError:
    """
    Translate an error of a mounted file system for the caller.
    """
    reason = error.strerror or str(error)
    if error.filename and not where.endswith(str(error.filename)):
        reason = f"`{error.filename}`: {reason}"
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return SourceNotFoundError(where, reason)
    return (
        SourceDeniedError(where, reason)
        if isinstance(error, PermissionError)
        else SourceUnavailableError(where, reason)
    )
