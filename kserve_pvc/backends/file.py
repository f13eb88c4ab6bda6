"""
`file://`: models that already lie on a mounted file system.
"""

from __future__ import annotations

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
            return order_listing(ref, _list(root, ref))
        except OSError as error:
            if isinstance(error, StoreError):
                raise
            raise _translate(ref.uri, error) from error

    def access(self, ref: ModelRef) -> str:
        del ref
        return "direct"

    @contextmanager
    def open_range(self, file: RemoteFile, start: int, stop: int) -> Iterator[_FileReader]:
        try:
            fd = os.open(file.address, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except PermissionError as error:
            raise _translate(file.address, error) from error
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
            raise _translate(self.file.address, error) from error
        self.offset += count
        # Compared after reading: bytes that were read before the inode was found unchanged are those that were pinned.
        if _token(os.fstat(self.fd)) != self.file.entry.token:
            raise _changed(self.file)
        return count


def _list(root: Path, ref: ModelRef) -> Iterator[RemoteFile]:
    found = os.lstat(root)
    if not stat.S_ISDIR(found.st_mode):
        yield _file(root, PurePosixPath(check_name(root.name)), found)
        return

    def pass_over(error: OSError) -> None:
        # What cannot be listed may hold a part of the model, unless the patterns leave all of it out.
        inside = os.path.relpath(error.filename or root, root)
        if inside == "." or ref.may_select_below(inside):
            raise error

    for directory, names, files in os.walk(root, onerror=pass_over):
        if directory == str(root):
            # `fsck` makes it at the root of a volume, for nobody but root to read; it is no part of a model.
            names[:] = [name for name in names if name != LOST_AND_FOUND]
        for name in [n for n in names if os.path.islink(os.path.join(directory, n))] + files:
            path = Path(directory, name)
            inside = path.relative_to(root).as_posix()
            if ref.selects(inside):
                yield _file(path, check_name(inside), os.lstat(path))


def _file(path: Path, inside: PurePosixPath, found: os.stat_result) -> RemoteFile:
    if not stat.S_ISREG(found.st_mode):
        raise UnsafePathError(str(path), "only regular files are copied; links and devices are refused")
    token = _token(found)
    return RemoteFile(
        entry=FileEntry(path=inside, size_bytes=found.st_size, token=token), address=str(path), pin={"inode": token}
    )


def _token(found: os.stat_result) -> str:
    # Compared, never interpreted. Programs can set the time of the content back, but not that of the inode.
    return f"{found.st_dev:x}-{found.st_ino:x}-{found.st_size:x}-{found.st_mtime_ns:x}-{found.st_ctime_ns:x}"


def _changed(file: RemoteFile) -> SourceChangedError:
    return SourceChangedError(f"file://{file.address}", str(file.entry.path))


def _translate(where: str, error: OSError) -> StoreError:
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
