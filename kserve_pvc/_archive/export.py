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
from kserve_pvc._archive.bundle_bytes import BLOCK, BundlePlan, bundle_length, bundle_pieces, plan_bundle
from kserve_pvc._archive.bundle_manifest import BundleManifest
from kserve_pvc._format.codec import encode
from kserve_pvc._format.records import FileEntry
from kserve_pvc._show.events import BytesAdopted, BytesReceived, CallFinished, Listener, Subject, TransferStarted
from kserve_pvc.errors import InsufficientSpaceError, SettingsError, StoreError, VolumeError

OpenFile = Callable[[PurePosixPath], AbstractContextManager[int]]


@attrs.frozen(kw_only=True)
class Exported:
    """
    A bundle that was written: `sha256` is the digest of its manifest, which names the digest of every file.

    Args:
        bytes_written: What this call itself wrote; the rest was there and has proven itself.
    """

    uri: str
    key: str
    version: str
    file: str
    files: int
    size_bytes: int
    sha256: str
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

    A file gets its name when it is whole and on the disk. Until then its bytes are in `<file>.<16 hex>.partial` beside
    it, and the next export of the same version takes over what of them is right. Two exports at the same time write the
    same bytes to the same places. To a stream all of it is written; its end is missing if something is wrong.

    Args:
        open_file: Opens one file of the model for reading.
        root: The store, where no bundle may be written.

    Raises:
        VolumeError: A file of the model is missing or damaged, or the bundle could not be written.
        InsufficientSpaceError: The bundle does not fit where it should be.
        SettingsError: It would lie in the store, or something that is no regular file is there.
    """
    started = time.monotonic()
    target = _check_place(Path(file), root) if isinstance(file, str | os.PathLike) else file
    plan = plan_bundle(manifest, encode(manifest))
    listener(
        TransferStarted(**subject, bytes_total=manifest.size_bytes, files=len(manifest.files), activity="exporting")
    )
    export = _Export(plan, open_file, subject, listener)
    if isinstance(target, Path):
        _export_to_file(export, target)
    else:
        export.write(_Stream(target))
        target.flush()
    seconds, size = time.monotonic() - started, manifest.size_bytes
    listener(CallFinished(**subject, status="exported", size_bytes=size, bytes_fetched=0, seconds=seconds))
    return Exported(
        uri=manifest.uri,
        key=manifest.key,
        version=manifest.version,
        file=str(target) if isinstance(target, Path) else "-",
        files=len(manifest.files),
        size_bytes=plan.size_bytes,
        sha256=plan.sha256,
        bytes_written=export.written,
    )


def _check_place(file: Path, root: Path) -> Path:
    place = Path(os.path.realpath(file))
    if place.is_relative_to(root):
        raise SettingsError("file", str(file), f"it lies in the store at `{root}`; choose a place outside")
    with _writing(place):
        is_foreign = place.exists() and not place.is_file()
    if is_foreign:
        raise SettingsError(
            "file", str(file), "something that is no regular file is there; name a file, or `-` for standard output"
        )
    return place


def _export_to_file(export: _Export, file: Path) -> None:
    plan = export.plan
    if _is_written(plan, file):
        export.listener(BytesAdopted(**export.subject, size_bytes=plan.manifest.size_bytes))
        return
    partial = file.with_name(f"{file.name}.{plan.sha256[:16]}.partial")
    with _writing(partial):
        fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        try:
            _check_room(partial, os.fstat(fd), plan.size_bytes)
            export.write(_File(fd, partial))
            os.ftruncate(fd, plan.size_bytes)
            os.fsync(fd)
            _give_name(fd, partial, file)
        finally:
            os.close(fd)
        _sync_directory(file.parent)


def _give_name(fd: int, partial: Path, file: Path) -> None:
    """Give a whole bundle its name, unless another export of the same version, which wrote to the same file, has done so."""
    with suppress(FileNotFoundError):
        # Under the private name may lie by now what a third one has begun.
        if os.path.samestat(partial.lstat(), os.fstat(fd)):
            partial.replace(file)


def _is_written(plan: BundlePlan, file: Path) -> bool:
    """Whether the very bundle is there already, as when a Job is run again."""
    try:
        with open_bundle(file) as bundle:
            return bundle.sha256 == plan.sha256 and bundle.is_right()
    except StoreError:
        return False


def _check_room(partial: Path, found: os.stat_result, size_bytes: int) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise SettingsError("file", str(partial), "something that is no regular file is there; remove it")
    space = os.statvfs(partial.parent)
    free, needed = space.f_bavail * space.f_frsize, size_bytes - found.st_blocks * BLOCK
    if free < needed:
        raise InsufficientSpaceError(str(partial.parent), needed, free)


def _sync_directory(place: Path) -> None:
    fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:  # Where directories cannot be synced.
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EPERM):
            raise
    finally:
        os.close(fd)


@contextmanager
def _writing(file: Path) -> Iterator[None]:
    """Errors of the place a bundle is written to, in its own words."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            space = os.statvfs(file.parent)
            raise InsufficientSpaceError(str(file.parent), 0, space.f_bavail * space.f_frsize) from error
        raise VolumeError(str(file), "writing a bundle", os.strerror(error.errno or errno.EIO)) from error


@contextmanager
def _reading(file: FileEntry) -> Iterator[None]:
    """Errors of the store's volume, in the words of an export."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        is_gone = isinstance(error, FileNotFoundError)
        raise _damaged(
            file, "it is recorded and not there" if is_gone else os.strerror(error.errno or errno.EIO)
        ) from error


def _damaged(file: FileEntry, reason: str) -> VolumeError:
    return VolumeError(str(file.path), "exporting", reason)


class _Target(Protocol):
    """Where a bundle is written."""

    def kept(self, at: int, size_bytes: int) -> int:
        """How many bytes of a range are there already, right or not."""

    def read(self, at: int, buffer: memoryview) -> int: ...

    def write(self, at: int, data: bytes | memoryview) -> None: ...


class _File:
    """
    A file that may hold what an interrupted export left.
    """

    def __init__(self, fd: int, path: Path) -> None:
        self._fd = fd
        self._path = path
        self._size = os.fstat(fd).st_size

    def kept(self, at: int, size_bytes: int) -> int:
        return min(max(0, self._size - at), size_bytes)

    def read(self, at: int, buffer: memoryview) -> int:
        with _writing(self._path):
            return os.preadv(self._fd, [buffer], at)

    def write(self, at: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        with _writing(self._path):
            while view:
                count = os.pwrite(self._fd, view, at)
                view, at = view[count:], at + count


class _Stream:
    """
    A pipe, which takes every byte once and in order. Its errors are its reader's, and stay what they are.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def kept(self, at: int, size_bytes: int) -> int:
        return 0

    def read(self, at: int, buffer: memoryview) -> int:
        return 0

    def write(self, at: int, data: bytes | memoryview) -> None:
        self._stream.write(data)


class _Export:
    """
    One writing of a bundle. What is there already and right is read and not written.
    """

    def __init__(self, plan: BundlePlan, open_file: OpenFile, subject: Subject, listener: Listener) -> None:
        self.plan = plan
        self.subject = subject
        self.listener = listener
        self.written = 0
        self._open_file = open_file
        self._buffer = memoryview(bytearray(BUFFER_BYTES))

    def write(self, target: _Target) -> None:
        at = 0
        for piece in bundle_pieces(self.plan.manifest, self.plan.data):
            if isinstance(piece, bytes):
                self._write_plain(target, at, piece)
            else:
                self._write_file(target, at, piece)
            at += bundle_length(piece)

    def _write_plain(self, target: _Target, at: int, piece: bytes) -> None:
        found = bytearray(target.kept(at, len(piece)))
        if target.read(at, memoryview(found)) != len(piece) or found != piece:
            self._put(target, at, piece)

    def _write_file(self, target: _Target, at: int, file: FileEntry) -> None:
        kept = target.kept(at, file.size_bytes)
        # What is there is believed only if all of the file turns out right; else all of it is written.
        for start in (kept, 0) if kept else (0,):
            digest = hashlib.sha256()
            self._hash(target, at, at + start, digest.update)
            self._copy(target, at, file, start, digest.update)
            if digest.hexdigest() == file.sha256:
                return
        raise _damaged(file, f"its sha256 is {digest.hexdigest()} instead of {file.sha256}")

    def _hash(self, target: _Target, at: int, stop: int, update: Callable[[memoryview], None]) -> None:
        while at < stop and (count := target.read(at, self._buffer[: min(BUFFER_BYTES, stop - at)])):
            update(self._buffer[:count])
            self.listener(BytesAdopted(**self.subject, size_bytes=count))
            at += count

    def _copy(
        self, target: _Target, at: int, file: FileEntry, start: int, update: Callable[[memoryview], None]
    ) -> None:
        if start and start == file.size_bytes:
            return
        with self._opened(file) as fd:
            while start < file.size_bytes:
                with _reading(file):
                    count = os.preadv(fd, [self._buffer[: min(BUFFER_BYTES, file.size_bytes - start)]], start)
                if not count:
                    raise _damaged(file, "it is shorter than recorded")
                update(self._buffer[:count])
                self._put(target, at + start, self._buffer[:count])
                self.listener(BytesReceived(**self.subject, size_bytes=count))
                start += count

    @contextmanager
    def _opened(self, file: FileEntry) -> Iterator[int]:
        with ExitStack() as opened:
            with _reading(file):
                fd = opened.enter_context(self._open_file(file.path))
                found = os.fstat(fd).st_size
            if found != file.size_bytes:
                raise _damaged(file, f"it has {found} bytes instead of {file.size_bytes}")
            yield fd

    def _put(self, target: _Target, at: int, data: bytes | memoryview) -> None:
        target.write(at, data)
        self.written += len(data)
