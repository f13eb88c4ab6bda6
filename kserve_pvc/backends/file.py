"""
`file://`: models that already lie on a mounted file system.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs

from kserve_pvc._source.contract import Backend, RemoteFile, Resolved, order_listing
from kserve_pvc._source.ref import ModelRef
from kserve_pvc._volume.beneath import open_beneath
from kserve_pvc.backends._listing import Place, hub_repository, list_place, token
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
    Copies a file or directory of the local file system.

    Only regular files, and what links inside of the directory lead to. A link that leads out of it is refused, except
    from a snapshot in a cache of the Hugging Face Hub to the blobs of the same repository.

    Content is pinned by device, inode, size and the times of its last change. Two changes within one tick of the
    kernel's clock, and some made through memory maps, look like one. Copy from directories that nothing edits.
    """

    options: Mapping[str, Any] = attrs.field(factory=dict, repr=False)

    def resolve(self, ref: ModelRef) -> Resolved:
        if ref.revision is not None:
            raise InvalidURIError(ref.uri, "a file has no revisions")
        if not ref.location.startswith("/"):
            raise InvalidURIError(ref.uri, "a file URI is `file:///absolute/path`")
        place = Path(ref.location)
        if ".." in place.parts:
            raise UnsafePathError(ref.location, "a path may not climb with `..`")
        root = hub_repository(place) or place
        try:
            fd = os.open(root, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise translate_error(ref.uri, error) from error
        try:
            return self.resolve_opened(ref, fd, root, place=place)
        finally:
            os.close(fd)

    def resolve_opened(self, ref: ModelRef, fd: int, root: Path, *, place: Path, name: str | None = None) -> Resolved:
        """
        List what lies below an open descriptor, following no link that leads out of it.

        Args:
            root: The path of what is open.
            place: What to list: `root`, or a path below it.
            name: What to call a single file, if not by the name it has there.
        """
        try:
            return order_listing(ref, list_place(Place(fd, root), place, ref, name or place.name))
        except OSError as error:
            if isinstance(error, StoreError):
                raise
            if error.errno == errno.ELOOP:
                raise UnsafePathError(str(place), "a link was put there while it was listed") from error
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
        if token(os.fstat(self.fd)) != self.file.entry.token:
            raise _changed(self.file)
        return count


def _open_file(file: RemoteFile) -> int:
    """Open a file from the directory that was listed; the token tells whether it still is the one that was."""
    root = file.pin["root"]
    inside = str(Path(file.address).relative_to(root))
    above = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return open_beneath(above, inside, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        os.close(above)


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
