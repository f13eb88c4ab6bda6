"""
Writing a model into a bundle, resumable where the bundle is a file.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol

import attrs

from kserve_pvc._archive.bundle import BUFFER_BYTES, open_bundle
from kserve_pvc._archive.bundle_bytes import BLOCK, BundleLayout, bundle_length, bundle_pieces, lay_out_bundle
from kserve_pvc._archive.bundle_manifest import BundleManifest
from kserve_pvc._format.codec import encode
from kserve_pvc._format.records import FileEntry
from kserve_pvc._show.events import BytesAdopted, BytesReceived, CallFinished, Listener, Subject, TransferStarted
from kserve_pvc._volume.calls import NO_SPACE, sync_directory, write_all
from kserve_pvc.errors import InsufficientSpaceError, SettingsError, StoreError, VolumeError

OpenFile = Callable[[PurePosixPath], AbstractContextManager[int]]


@attrs.frozen(kw_only=True)
class Exported:
    """
    A bundle that was written.

    Args:
        sha256: The digest of the bundle, as `sha256sum` prints it.
        manifest_sha256: The digest of its manifest, which holds the digest of every file.
        bytes_written: The bytes written by this call. The rest was left by an earlier one and has been verified.
    """

    uri: str
    key: str
    version: str
    file: str
    files: int
    size_bytes: int
    sha256: str
    manifest_sha256: str
    bytes_written: int


def export_bundle(
    manifest: BundleManifest,
    open_file: OpenFile,
    file: str | os.PathLike[str] | BinaryIO,
    *,
    root: Path,
    subject: Subject,
    listener: Listener,
) -> Exported:
    """
    Write a model as a bundle, comparing every file with its SHA-256 on the way.

    The bundle appears under its name once it is complete and synced. Until then its bytes are in
    `<file>.<16 hex>.partial` in the same directory, and the next export of the same version adopts the valid ones.
    Concurrent exports write the same bytes at the same offsets. To a stream, everything is written in order, and its
    end is missing after an error.

    Args:
        open_file: Opens one file of the model for reading.
        file: A path, or a binary stream.
        root: The store, inside of which no bundle may be written.

    Returns:
        What was written and its digest.

    Raises:
        VolumeError: A file of the model is missing or damaged, or the bundle could not be written.
        InsufficientSpaceError: The bundle does not fit on the target's volume.
        SettingsError: The path is inside the store, or exists and is not a regular file.
    """
    started = time.monotonic()
    target = _check_target(Path(file), root) if isinstance(file, str | os.PathLike) else file
    layout = lay_out_bundle(manifest, encode(manifest))
    listener(
        TransferStarted(**subject, bytes_total=manifest.size_bytes, files=len(manifest.files), activity="exporting")
    )
    export = _Export(layout, open_file, subject, listener)
    if isinstance(target, Path):
        sha256 = _export_to_file(export, target)
    else:
        sha256 = export.write(_StreamTarget(target))
        target.flush()
    seconds, size = time.monotonic() - started, manifest.size_bytes
    listener(CallFinished(**subject, status="exported", size_bytes=size, bytes_fetched=0, seconds=seconds))
    return Exported(
        uri=manifest.uri,
        key=manifest.key,
        version=manifest.version,
        file=str(target) if isinstance(target, Path) else "-",
        files=len(manifest.files),
        size_bytes=layout.size_bytes,
        sha256=sha256,
        manifest_sha256=layout.manifest_sha256,
        bytes_written=export.written,
    )


def _check_target(file: Path, root: Path) -> Path:
    target = Path(os.path.realpath(file.parent), file.name)
    if target.is_relative_to(root):
        raise SettingsError("file", str(file), f"it is inside the store at `{root}`; choose a path outside")
    if target.is_symlink():
        # It may be another's, who would choose by it which file is replaced.
        raise SettingsError("file", str(file), "it is a link; name the file itself")
    with _translating_writes(target):
        is_special = target.exists() and not target.is_file()
    if is_special:
        raise SettingsError(
            "file", str(file), "it exists and is not a regular file; name a file, or `-` for standard output"
        )
    return target


def _export_to_file(export: _Export, file: Path) -> str:
    """Write a bundle under its name, and return its digest."""
    layout = export.layout
    if (sha256 := _digest_if_written(layout, file)) is not None:
        export.listener(BytesAdopted(**export.subject, size_bytes=layout.manifest.size_bytes))
        return sha256
    partial = file.with_name(f"{file.name}.{layout.manifest_sha256[:16]}.partial")
    with _translating_writes(partial):
        fd = _open_partial(partial)
        try:
            _check_partial(partial, os.fstat(fd), layout.size_bytes)
            sha256 = _write_durably(export, fd, partial)
            _publish(fd, partial, file)
        finally:
            os.close(fd)
        _sync_parent(file)
    return sha256


def _open_partial(partial: Path) -> int:
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with suppress(FileExistsError):
        return os.open(partial, flags | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        return os.open(partial, flags)
    except FileNotFoundError:  # Another export of the same version has just given it its name.
        return os.open(partial, flags | os.O_CREAT | os.O_EXCL, 0o666)


def _write_durably(export: _Export, fd: int, partial: Path) -> str:
    """
    Write the bundle and sync it. What cannot be synced is deleted: the page cache still has its bytes, which the next
    export would read, find valid, and believe to be on the medium.
    """
    try:
        sha256 = export.write(_FileTarget(fd, partial))
        os.ftruncate(fd, export.layout.size_bytes)
    except (OSError, StoreError):
        with suppress(OSError):
            _sync_or_delete(fd, partial)
        raise
    _sync_or_delete(fd, partial)
    return sha256


def _sync_or_delete(fd: int, partial: Path) -> None:
    try:
        os.fsync(fd)
    except OSError:
        with suppress(OSError):
            partial.unlink()
        raise


def _publish(fd: int, partial: Path, file: Path) -> None:
    """Rename a complete bundle, unless a concurrent export of the same version, which shares the file, already did."""
    with suppress(FileNotFoundError):
        # A third export may have created a new file under the partial name since.
        if os.path.samestat(partial.lstat(), os.fstat(fd)):
            partial.replace(file)


def _digest_if_written(layout: BundleLayout, file: Path) -> str | None:
    """Return the digest of the file if it already is this bundle, as when a Job is run again."""
    with suppress(StoreError), open_bundle(file) as bundle:
        if bundle.manifest_sha256 == layout.manifest_sha256:
            digests = bundle.read()
            return digests.sha256 if digests.is_valid else None
    return None


def _check_partial(partial: Path, found: os.stat_result, size_bytes: int) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise SettingsError("file", str(partial), "it exists and is not a regular file; remove it")
    # Its name can be known before: whoever may write to the directory could have it lead to a file of this user.
    if found.st_nlink > 1 or found.st_uid != os.geteuid():
        raise SettingsError("file", str(partial), "it exists and is another user's, or has a second name; remove it")
    needed = size_bytes - found.st_blocks * BLOCK
    free = _free_bytes(partial.parent)
    if free < needed:
        raise InsufficientSpaceError(str(partial.parent), needed, free)


def _free_bytes(directory: Path) -> int:
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize


def _sync_parent(file: Path) -> None:
    fd = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync_directory(fd)
    finally:
        os.close(fd)


@contextmanager
def _translating_writes(file: Path) -> Iterator[None]:
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        if error.errno in NO_SPACE:
            is_quota = error.errno == errno.EDQUOT
            raise InsufficientSpaceError(str(file.parent), 0, _free_bytes(file.parent), is_quota=is_quota) from error
        raise VolumeError(str(file), "writing a bundle", os.strerror(error.errno or errno.EIO)) from error


@contextmanager
def _translating_reads(file: FileEntry) -> Iterator[None]:
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        is_gone = isinstance(error, FileNotFoundError)
        raise _damaged(file, "missing" if is_gone else os.strerror(error.errno or errno.EIO)) from error


def _damaged(file: FileEntry, reason: str) -> VolumeError:
    return VolumeError(str(file.path), "exporting", reason)


class _Digests:
    """
    The digests of one file and of the bundle up to its end.
    """

    def __init__(self, whole: hashlib._Hash) -> None:
        self.file, self.whole = hashlib.sha256(), whole.copy()

    def update(self, data: memoryview) -> None:
        self.file.update(data)
        self.whole.update(data)


class _Target(Protocol):
    """The file or the stream that a bundle is written to."""

    def existing_bytes(self, offset: int, size_bytes: int) -> int:
        """Return how many bytes of a range an earlier export wrote, valid or not."""

    def read(self, offset: int, buffer: memoryview) -> int: ...

    def write(self, offset: int, data: bytes | memoryview) -> None: ...


class _FileTarget:
    """
    A file that may hold what an interrupted export left.
    """

    def __init__(self, fd: int, path: Path) -> None:
        self._fd = fd
        self._path = path
        self._size = os.fstat(fd).st_size

    def existing_bytes(self, offset: int, size_bytes: int) -> int:
        return min(max(0, self._size - offset), size_bytes)

    def read(self, offset: int, buffer: memoryview) -> int:
        with _translating_writes(self._path):
            return os.preadv(self._fd, [buffer], offset)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        with _translating_writes(self._path):
            write_all(self._fd, data, offset)


class _StreamTarget:
    """
    A pipe, which takes every byte once and in order. Its errors are passed on untranslated.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def existing_bytes(self, offset: int, size_bytes: int) -> int:
        return 0

    def read(self, offset: int, buffer: memoryview) -> int:
        return 0

    def write(self, offset: int, data: bytes | memoryview) -> None:
        self._stream.write(data)


class _Export:
    """
    One export. Valid bytes that the target already has are read and not written.
    """

    def __init__(self, layout: BundleLayout, open_file: OpenFile, subject: Subject, listener: Listener) -> None:
        self.layout = layout
        self.subject = subject
        self.listener = listener
        self.written = 0
        self._open_file = open_file
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self._whole = hashlib.sha256()

    def write(self, target: _Target) -> str:
        """Write the bundle, and return its digest."""
        offset = 0
        for piece in bundle_pieces(self.layout.manifest, self.layout.data):
            if isinstance(piece, bytes):
                self._write_bytes(target, offset, piece)
                self._whole.update(piece)
            else:
                self._write_file(target, offset, piece)
            offset += bundle_length(piece)
        return self._whole.hexdigest()

    def _write_bytes(self, target: _Target, offset: int, piece: bytes) -> None:
        found = bytearray(target.existing_bytes(offset, len(piece)))
        if target.read(offset, memoryview(found)) != len(piece) or found != piece:
            self._put(target, offset, piece)

    def _write_file(self, target: _Target, offset: int, file: FileEntry) -> None:
        existing = target.existing_bytes(offset, file.size_bytes)
        # Existing bytes are adopted only if the digest of the whole file matches; else the file is written again.
        for start in (existing, 0) if existing else (0,):
            digests = _Digests(self._whole)
            self._hash(target, offset, offset + start, digests.update)
            self._copy(target, offset, file, start, digests.update)
            if digests.file.hexdigest() == file.sha256:
                self._whole = digests.whole
                return
        raise _damaged(file, f"its sha256 is {digests.file.hexdigest()} instead of {file.sha256}")

    def _hash(self, target: _Target, offset: int, stop: int, update: Callable[[memoryview], None]) -> None:
        while offset < stop and (count := target.read(offset, self._buffer[: min(BUFFER_BYTES, stop - offset)])):
            update(self._buffer[:count])
            self.listener(BytesAdopted(**self.subject, size_bytes=count))
            offset += count

    def _copy(
        self, target: _Target, offset: int, file: FileEntry, start: int, update: Callable[[memoryview], None]
    ) -> None:
        if start and start == file.size_bytes:
            return
        with self._open(file) as fd:
            while start < file.size_bytes:
                with _translating_reads(file):
                    count = os.preadv(fd, [self._buffer[: min(BUFFER_BYTES, file.size_bytes - start)]], start)
                if not count:
                    raise _damaged(file, "it is shorter than recorded")
                update(self._buffer[:count])
                self._put(target, offset + start, self._buffer[:count])
                self.listener(BytesReceived(**self.subject, size_bytes=count))
                start += count

    @contextmanager
    def _open(self, file: FileEntry) -> Iterator[int]:
        with ExitStack() as stack:
            with _translating_reads(file):
                fd = stack.enter_context(self._open_file(file.path))
                found = os.fstat(fd).st_size
            if found != file.size_bytes:
                raise _damaged(file, f"it has {found} bytes instead of {file.size_bytes}")
            yield fd

    def _put(self, target: _Target, offset: int, data: bytes | memoryview) -> None:
        target.write(offset, data)
        self.written += len(data)
