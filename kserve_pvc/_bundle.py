"""
A model as one file, to carry it to where there is no network.

A bundle is a tar archive whose every byte follows from its first member, the manifest, and from the files that this one
names. So the same model gives the same bytes; what an interrupted export left is proven by reading it; and nobody
parses an archive that others made up: whoever reads a bundle works out what it has to look like, and compares.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol

import attrs
from attrs.validators import matches_re, optional

from kserve_pvc._format.codec import KEY, SHA256, build, decode, encode, size, text, texts
from kserve_pvc._format.file_names import check_collisions
from kserve_pvc._format.log_entry import LogEntry
from kserve_pvc._format.records import MAX_MANIFEST_BYTES, FileEntry
from kserve_pvc._show.events import Adopted, Finished, Listener, Received, Started
from kserve_pvc._source.contract import MAX_FILES, RemoteFile, Resolved, resolved
from kserve_pvc._source.ref import ModelRef, parse_ref
from kserve_pvc.errors import (
    DigestMismatchError,
    InsufficientSpaceError,
    PolicyError,
    SettingsError,
    SourceChangedError,
    SourceDeniedError,
    SourceNotFoundError,
    SourceUnavailableError,
    StoreError,
    StoreFormatError,
    VolumeError,
)

MANIFEST_NAME = "kserve-pvc-bundle.json"
END_NAME = "kserve-pvc-bundle.end"
FILES = "model/"

_BLOCK = 512
# name, mode, uid, gid, size, mtime, checksum, type, linkname, magic, version, uname, gname, devmajor, devminor, prefix
_HEADER = struct.Struct("100s 8s 8s 8s 12s 12s 8s c 100s 6s 2s 32s 32s 8s 8s 155s 12x")
_SIZE_FIELD = slice(124, 135)
_NAME_BYTES = 100
_MAX_PLAIN_SIZE = 8**11 - 1
_BUFFER_BYTES = 1024 * 1024

OpenFile = Callable[[PurePosixPath], AbstractContextManager[int]]


def _files(value: Any) -> tuple[FileEntry, ...]:
    if not isinstance(value, list | tuple):
        raise TypeError("`files` must be a list")
    return tuple(f if isinstance(f, FileEntry) else build(FileEntry, f) for f in value)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@attrs.frozen(kw_only=True)
class BundleManifest:
    """
    The first member of a bundle: which version of which model it holds, and every file of it with its SHA-256.

    It says nothing about the store, the time or the process that wrote it, so that the same version of a model gives
    the same bundle.
    """

    uri: str = attrs.field(validator=text)
    revision: str | None = attrs.field(validator=optional(text))
    allow_patterns: tuple[str, ...] | None = attrs.field(converter=_tuple, validator=optional(texts))
    ignore_patterns: tuple[str, ...] = attrs.field(converter=_tuple, validator=texts)
    key: str = attrs.field(validator=matches_re(KEY))
    version: str = attrs.field(validator=text)
    size_bytes: int = attrs.field(validator=size)
    files: tuple[FileEntry, ...] = attrs.field(converter=_files)

    def __attrs_post_init__(self) -> None:
        ref = self._parse_ref()
        if not 0 < len(self.files) <= MAX_FILES:
            raise ValueError(f"a model has 1 to {MAX_FILES} files")
        if any(file.sha256 is None or file.evidence is not None for file in self.files):
            raise ValueError("every file needs its `sha256`, and nothing else vouches for it")
        if list(self.files) != sorted(self.files, key=_order) or not all(ref.selects(file.path) for file in self.files):
            raise ValueError("its files are not in order, or not those that its patterns let through")
        if sum(file.size_bytes for file in self.files) != self.size_bytes:
            raise ValueError("`size_bytes` is not the sum of its files")
        check_collisions(file.path for file in self.files)

    @property
    def ref(self) -> ModelRef:
        """
        What a caller asks for to get this model.
        """
        return ModelRef(
            uri=self.uri,
            revision=self.revision,
            allow_patterns=self.allow_patterns,
            ignore_patterns=self.ignore_patterns,
        )

    def _parse_ref(self) -> ModelRef:
        try:
            ref = parse_ref(
                self.uri,
                revision=self.revision,
                allow_patterns=self.allow_patterns,
                ignore_patterns=self.ignore_patterns,
            )
        except PolicyError as error:  # The other one that it raises is a ValueError, as is expected here.
            raise ValueError(str(error)) from error
        if ref != self.ref or ref.key != self.key:
            raise ValueError("`key`, `uri` and patterns do not belong together")
        return ref


def _order(file: FileEntry) -> str:
    # As the listing of a source is put in order: part by part.
    return str(file.path).replace("/", "\0")


def manifest_of(entry: LogEntry, files: Iterable[FileEntry]) -> BundleManifest:
    """
    Describe a model of a store as a bundle does.

    Raises:
        PolicyError: It was never hashed, so nothing could tell its bytes from damaged ones.
    """
    bare = [file.proven(file.sha256, None) for file in files]
    if any(file.sha256 is None for file in bare):
        rule = "it was fetched without hashing, so nothing proves its bytes; fetch it with `force_download=True` in a store that hashes"
        raise PolicyError(entry.uri, rule)
    return BundleManifest(
        uri=entry.uri,
        revision=entry.revision,
        allow_patterns=entry.allow_patterns,
        ignore_patterns=entry.ignore_patterns,
        key=entry.key,
        version=entry.version,
        size_bytes=sum(file.size_bytes for file in bare),
        files=tuple(sorted(bare, key=_order)),
    )


@attrs.frozen
class _Plan:
    """
    A manifest, as it is written, and what follows from it.
    """

    manifest: BundleManifest
    data: bytes
    sha256: str
    size_bytes: int


def _plan(manifest: BundleManifest, data: bytes) -> _Plan:
    return _Plan(
        manifest, data, hashlib.sha256(data).hexdigest(), sum(_length(piece) for piece in _pieces(manifest, data))
    )


def _pieces(manifest: BundleManifest, data: bytes) -> Iterator[bytes | FileEntry]:
    """
    A bundle from its first byte to its last: bytes that follow from the manifest, and files of the model.
    """
    yield _header(MANIFEST_NAME, len(data)) + data + _padding(len(data))
    for file in manifest.files:
        yield _header(f"{FILES}{file.path}", file.size_bytes)
        yield file
        yield _padding(file.size_bytes)
    end = hashlib.sha256(data).hexdigest().encode() + b"\n"
    # Two empty blocks end a tar archive.
    yield _header(END_NAME, len(end)) + end + _padding(len(end)) + bytes(2 * _BLOCK)


def _length(piece: bytes | FileEntry) -> int:
    return len(piece) if isinstance(piece, bytes) else piece.size_bytes


def _padding(size_bytes: int) -> bytes:
    return bytes(-size_bytes % _BLOCK)


def _header(name: str, size_bytes: int) -> bytes:
    """
    What comes before the content of a member: a POSIX header that names nobody and no time.

    Names that are long or not ASCII, and sizes from 8 GiB, stand in an extended header before it.
    """
    extended = b""
    if not name.isascii() or len(name) > _NAME_BYTES:
        extended += _extension("path", name)
    if size_bytes > _MAX_PLAIN_SIZE:
        extended += _extension("size", str(size_bytes))
        plain = _block(name, 0, b"0")
    else:
        plain = _block(name, size_bytes, b"0")
    return _block("PaxHeader", len(extended), b"x") + extended + _padding(len(extended)) + plain if extended else plain


def _extension(keyword: str, value: str) -> bytes:
    rest = len(f" {keyword}={value}\n".encode())
    length = rest
    while length != (whole := rest + len(str(length))):  # The length counts its own digits.
        length = whole
    return f"{length} {keyword}={value}\n".encode()


def _block(name: str, size_bytes: int, kind: bytes) -> bytes:
    none, number = bytes(0), b"0000000\0"
    fields: list[bytes] = [
        name.encode("ascii", "replace"),
        b"0000444\0",
        number,
        number,
        b"%011o\0" % size_bytes,
        b"00000000000\0",
    ]
    rest: list[bytes] = [kind, none, b"ustar\0", b"00", none, none, none, none, none]
    # The checksum is taken with blanks in its own place.
    checksum = b"%06o\0 " % sum(_HEADER.pack(*fields, b" " * 8, *rest))
    return _HEADER.pack(*fields, checksum, *rest)


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
    target = _check_place(Path(file), root) if isinstance(file, str | os.PathLike) else file
    plan = _plan(manifest, encode(manifest))
    listener(
        Started(ref=str(manifest.ref), bytes_total=manifest.size_bytes, files=len(manifest.files), activity="exporting")
    )
    export = _Export(plan, open_file, listener)
    if isinstance(target, Path):
        _export_to_file(export, target)
    else:
        export.write(_Stream(target))
        target.flush()
    listener(Finished(ref=str(manifest.ref), status="exported"))
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
        export.listener(Adopted(ref=export.ref, size_bytes=plan.manifest.size_bytes))
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


def _is_written(plan: _Plan, file: Path) -> bool:
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
    free, needed = space.f_bavail * space.f_frsize, size_bytes - found.st_blocks * _BLOCK
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

    def __init__(self, plan: _Plan, open_file: OpenFile, listener: Listener) -> None:
        self.plan = plan
        self.ref = str(plan.manifest.ref)
        self.listener = listener
        self.written = 0
        self._open_file = open_file
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))

    def write(self, target: _Target) -> None:
        at = 0
        for piece in _pieces(self.plan.manifest, self.plan.data):
            if isinstance(piece, bytes):
                self._write_plain(target, at, piece)
            else:
                self._write_file(target, at, piece)
            at += _length(piece)

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
        while at < stop and (count := target.read(at, self._buffer[: min(_BUFFER_BYTES, stop - at)])):
            update(self._buffer[:count])
            self.listener(Adopted(ref=self.ref, size_bytes=count))
            at += count

    def _copy(
        self, target: _Target, at: int, file: FileEntry, start: int, update: Callable[[memoryview], None]
    ) -> None:
        if start and start == file.size_bytes:
            return
        with self._opened(file) as fd:
            while start < file.size_bytes:
                with _reading(file):
                    count = os.preadv(fd, [self._buffer[: min(_BUFFER_BYTES, file.size_bytes - start)]], start)
                if not count:
                    raise _damaged(file, "it is shorter than recorded")
                update(self._buffer[:count])
                self._put(target, at + start, self._buffer[:count])
                self.listener(Received(ref=self.ref, size_bytes=count))
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


@contextmanager
def open_bundle(file: str | os.PathLike[str], *, sha256: str | None = None) -> Iterator[Bundle]:
    """
    Open a bundle and compare everything with its manifest but the content of the files, whose digests are compared
    when they are read.

    Args:
        sha256: The digest its manifest must have, as `export` told it. Without it a bundle is as good as where it comes
            from.

    Raises:
        SourceNotFoundError, SourceDeniedError: It is not there, or may not be read.
        StoreFormatError: It is no bundle, was cut off, changed, packed anew, or comes from a newer version.
        DigestMismatchError: It is another one than `sha256` says.
        SettingsError: It is no regular file, or `sha256` is no digest.
    """
    if sha256 is not None and re.fullmatch(SHA256, sha256) is None:
        raise SettingsError("sha256", sha256, "write the 64 hex digits that `export` has told")
    name = os.fspath(file)
    try:
        fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _translate(name, error) from error
    try:
        bundle = _read_bundle(fd, name)
        if sha256 not in (None, bundle.sha256):
            raise DigestMismatchError(name, f"sha256:{sha256}", f"sha256:{bundle.sha256}")
        yield bundle
    finally:
        os.close(fd)


def _translate(name: str, error: OSError) -> StoreError:
    reason = os.strerror(error.errno or errno.EIO)
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return SourceNotFoundError(name, reason)
    # Asking a disk again does not help.
    return (
        SourceDeniedError(name, reason)
        if isinstance(error, PermissionError)
        else SourceUnavailableError(name, reason, is_final=True)
    )


def _read_bundle(fd: int, name: str) -> Bundle:
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        raise SettingsError(
            "file", name, "a bundle is read from any place in it, so it must be a regular file; write it to one first"
        )
    try:
        plan = _read_plan(fd, name, found.st_size)
        places = _compare(fd, name, plan, found.st_size)
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise _translate(name, error) from error
    return Bundle(path=name, manifest=plan.manifest, sha256=plan.sha256, places=places, fd=fd)


def _read_plan(fd: int, name: str, bundle_bytes: int) -> _Plan:
    head = os.pread(fd, _BLOCK, 0)
    try:
        size_bytes = int(head[_SIZE_FIELD], 8)
    except ValueError:
        size_bytes = -1
    if size_bytes < 0 or head != _header(MANIFEST_NAME, size_bytes):
        raise StoreFormatError(name, "it does not begin as a bundle does")
    if size_bytes > MAX_MANIFEST_BYTES:
        raise StoreFormatError(name, f"its manifest is larger than {MAX_MANIFEST_BYTES} bytes")
    if _BLOCK + size_bytes > bundle_bytes:
        raise StoreFormatError(name, "it ends inside its manifest, so it was cut off; copy it again")
    data = os.pread(fd, size_bytes, _BLOCK)
    manifest = decode(BundleManifest, data, name)
    if encode(manifest) != data:
        raise StoreFormatError(name, "its manifest is not written as a manifest is")
    return _plan(manifest, data)


def _compare(fd: int, name: str, plan: _Plan, size_bytes: int) -> Mapping[PurePosixPath, int]:
    """Compare all but the files with what it has to be, and return where these lie."""
    if size_bytes < plan.size_bytes:
        reason = f"it has {size_bytes} of {plan.size_bytes} bytes, so it was cut off; copy it again, or end its export"
        raise StoreFormatError(name, reason)
    if size_bytes > plan.size_bytes:
        raise StoreFormatError(name, f"{size_bytes - plan.size_bytes} bytes follow its end")
    places, at = {}, 0
    for piece in _pieces(plan.manifest, plan.data):
        if not isinstance(piece, bytes):
            places[piece.path] = at
        elif os.pread(fd, len(piece), at) != piece:
            raise StoreFormatError(
                name, f"what begins at byte {at} is not what its manifest makes it, so it was changed or packed anew"
            )
        at += _length(piece)
    return places


@attrs.frozen(kw_only=True, eq=False)
class Bundle:
    """
    An open bundle, as the back end of the one model that it holds.

    Args:
        sha256: The digest of the manifest, as it was written.
    """

    path: str
    manifest: BundleManifest
    sha256: str
    _places: Mapping[PurePosixPath, int] = attrs.field(repr=False)
    _fd: int = attrs.field(repr=False)

    def resolve(self, ref: ModelRef) -> Resolved:
        if ref != self.manifest.ref:
            raise SourceNotFoundError(str(ref), f"`{self.path}` holds `{self.manifest.ref}`")
        remote = (RemoteFile(entry=file, address=str(self._places[file.path]), pin={}) for file in self.manifest.files)
        return resolved(ref, remote, version=self.manifest.version)

    @contextmanager
    def open_range(self, file: RemoteFile, start: int, stop: int) -> Iterator[_Reader]:
        place = int(file.address)
        yield _Reader(self, str(file.entry.path), self._fd, place + start, place + stop)

    def is_right(self) -> bool:
        """
        Whether every file has the digest that the manifest names.
        """
        buffer = memoryview(bytearray(_BUFFER_BYTES))
        for file in self.resolve(self.manifest.ref).files:
            digest = hashlib.sha256()
            with self.open_range(file, 0, file.entry.size_bytes) as reader:
                while count := reader.readinto(buffer):
                    digest.update(buffer[:count])
            if digest.hexdigest() != file.entry.sha256:
                return False
        return True


@attrs.define
class _Reader:
    bundle: Bundle
    name: str
    fd: int
    offset: int
    stop: int

    def readinto(self, buffer: memoryview) -> int:
        if self.offset >= self.stop:
            return 0
        try:
            count = os.preadv(self.fd, [buffer[: self.stop - self.offset]], self.offset)
        except OSError as error:
            raise _translate(self.bundle.path, error) from error
        if not count:  # It was whole when it was opened.
            raise SourceChangedError(self.bundle.path, self.name)
        self.offset += count
        return count
