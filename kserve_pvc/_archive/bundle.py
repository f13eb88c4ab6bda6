"""
A bundle: one model as one file, for sites without a network.

A bundle is a tar archive whose every byte follows from its first member, the manifest, and from the files that the
manifest names. So the same model gives the same bytes, an interrupted export is resumed by comparing what it left, and
a reader parses no untrusted archive: it computes what the bundle has to look like, and compares.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import PurePosixPath

import attrs

from kserve_pvc._archive.bundle_bytes import (
    BLOCK,
    MANIFEST_NAME,
    SIZE_FIELD,
    BundleLayout,
    bundle_length,
    bundle_pieces,
    lay_out_bundle,
    tar_header,
)
from kserve_pvc._archive.bundle_manifest import BundleManifest
from kserve_pvc._format.codec import SHA256, decode, encode
from kserve_pvc._format.records import MAX_MANIFEST_BYTES
from kserve_pvc._source.contract import RemoteFile, Resolved, order_listing
from kserve_pvc._source.ref import ModelRef
from kserve_pvc.errors import (
    DigestMismatchError,
    DownloadCancelledError,
    SettingsError,
    SourceChangedError,
    SourceDeniedError,
    SourceNotFoundError,
    SourceUnavailableError,
    StoreError,
    StoreFormatError,
)

BUFFER_BYTES = 1024 * 1024
_OTHER = "copy the bundle again, or check which one the digest belongs to"
_INNER = "what was expected is the digest of its manifest: pass it as `--manifest-sha256`"


@contextmanager
def open_bundle(
    file: str | os.PathLike[str],
    *,
    sha256: str | None = None,
    manifest_sha256: str | None = None,
    cancel: threading.Event | None = None,
) -> Iterator[Bundle]:
    """
    Open a bundle and compare all of it with its manifest, except for the content of the files: their digests are
    compared when they are read.

    Args:
        sha256: The digest that the file must have, as printed by `export` and by `sha256sum`. It takes reading the
            whole file once more. Without a digest a bundle is only as trustworthy as its origin.
        manifest_sha256: The digest that its manifest must have, which takes no time.
        cancel: Ends the comparison with `sha256` when it is set.

    Raises:
        SourceNotFoundError: The file does not exist.
        SourceDeniedError: The file may not be read.
        StoreFormatError: It is not a bundle, was truncated, modified or repacked, or has a newer format.
        DigestMismatchError: It does not have the digest `sha256`, or its manifest not the digest `manifest_sha256`.
        SettingsError: It is not a regular file, or a digest is malformed.
        DownloadCancelledError: `cancel` was set.
    """
    expected, expected_of_manifest = _digest("sha256", sha256), _digest("manifest_sha256", manifest_sha256)
    name = os.fspath(file)
    try:
        fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _translate(name, error) from error
    try:
        bundle = _read_bundle(fd, name)
        if expected_of_manifest not in (None, bundle.manifest_sha256):
            raise _mismatch(name, expected_of_manifest, bundle.manifest_sha256)
        if expected is not None and (found := bundle.read(cancel=cancel).sha256) != expected:
            is_inner = expected == bundle.manifest_sha256
            raise _mismatch(name, expected, found, _INNER if is_inner else _OTHER)
        yield bundle
    finally:
        os.close(fd)


def _digest(name: str, given: str | None) -> str | None:
    """Return a digest as this package writes it; other tools print capitals, and messages have the algorithm before."""
    if given is None:
        return None
    digest = given.strip().lower().removeprefix("sha256:")
    if re.fullmatch(SHA256, digest) is None:
        raise SettingsError(name, given, "expected 64 hex digits, as printed by `export`")
    return digest


def _mismatch(name: str, expected: str | None, found: str, hint: str = _OTHER) -> DigestMismatchError:
    return DigestMismatchError(name, f"sha256:{expected}", f"sha256:{found}", hint)


def _translate(name: str, error: OSError) -> StoreError:
    reason = os.strerror(error.errno or errno.EIO)
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return SourceNotFoundError(name, reason)
    if isinstance(error, PermissionError):
        return SourceDeniedError(name, reason)
    # A retry does not help with a local file.
    return SourceUnavailableError(name, reason, is_final=True)


def _read_bundle(fd: int, name: str) -> Bundle:
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        raise SettingsError(
            "file", name, "reading a bundle needs random access, so it must be a regular file; save it to one first"
        )
    try:
        layout = _read_layout(fd, name, found.st_size)
        offsets = _compare(fd, name, layout, found.st_size)
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise _translate(name, error) from error
    return Bundle(path=name, layout=layout, offsets=offsets, fd=fd)


def _read_layout(fd: int, name: str, bundle_bytes: int) -> BundleLayout:
    head = os.pread(fd, BLOCK, 0)
    try:
        size_bytes = int(head[SIZE_FIELD], 8)
    except ValueError:
        size_bytes = -1
    if size_bytes < 0 or head != tar_header(MANIFEST_NAME, size_bytes):
        raise StoreFormatError(name, "it is not a bundle: the header of the manifest is missing")
    if size_bytes > MAX_MANIFEST_BYTES:
        raise StoreFormatError(name, f"its manifest is larger than {MAX_MANIFEST_BYTES} bytes")
    if BLOCK + size_bytes > bundle_bytes:
        raise StoreFormatError(name, "it was truncated inside its manifest; copy it again")
    data = os.pread(fd, size_bytes, BLOCK)
    manifest = decode(BundleManifest, data, name)
    if encode(manifest) != data:
        raise StoreFormatError(name, "its manifest is not in canonical form")
    return lay_out_bundle(manifest, data)


def _compare(fd: int, name: str, layout: BundleLayout, size_bytes: int) -> Mapping[PurePosixPath, int]:
    """Compare all bytes but those of the files with the layout, and return the offset of each file."""
    if size_bytes < layout.size_bytes:
        reason = f"it was truncated to {size_bytes} of {layout.size_bytes} bytes; copy it again, or finish its export"
        raise StoreFormatError(name, reason)
    if size_bytes > layout.size_bytes:
        raise StoreFormatError(name, f"{size_bytes - layout.size_bytes} bytes follow its end")
    offsets, offset = {}, 0
    for piece in bundle_pieces(layout.manifest, layout.data):
        if not isinstance(piece, bytes):
            offsets[piece.path] = offset
        elif os.pread(fd, len(piece), offset) != piece:
            raise StoreFormatError(
                name, f"at byte {offset} it differs from what its manifest implies, so it was modified or repacked"
            )
        offset += bundle_length(piece)
    return offsets


@attrs.frozen(kw_only=True, eq=False)
class Bundle:
    """
    An open bundle, as the backend of the one model that it holds.
    """

    path: str
    layout: BundleLayout
    _offsets: Mapping[PurePosixPath, int] = attrs.field(repr=False)
    _fd: int = attrs.field(repr=False)

    @property
    def manifest(self) -> BundleManifest:
        return self.layout.manifest

    @property
    def manifest_sha256(self) -> str:
        return self.layout.manifest_sha256

    def resolve(self, ref: ModelRef) -> Resolved:
        if ref != self.manifest.ref:
            raise SourceNotFoundError(str(ref), f"`{self.path}` holds `{self.manifest.ref}`")
        remote = (RemoteFile(entry=file, address=str(self._offsets[file.path]), pin={}) for file in self.manifest.files)
        # Those of an archive were selected when it was unpacked.
        bare = attrs.evolve(ref, allow_patterns=None, ignore_patterns=())
        found = order_listing(bare if self.manifest.archive_sha256 else ref, remote, version=self.manifest.version)
        return attrs.evolve(found, ref=ref, archive_sha256=self.manifest.archive_sha256)

    @contextmanager
    def open_range(self, file: RemoteFile, start: int, stop: int) -> Iterator[_Reader]:
        offset = int(file.address)
        yield _Reader(self, str(file.entry.path), self._fd, offset + start, offset + stop)

    def read(self, *, cancel: threading.Event | None = None) -> BundleDigests:
        """
        Read the whole file, and hash it as well as each file in it.
        """
        whole, is_valid = hashlib.sha256(), True
        buffer = memoryview(bytearray(BUFFER_BYTES))
        # What lies between the files was compared when the bundle was opened.
        for piece in bundle_pieces(self.layout.manifest, self.layout.data):
            if isinstance(piece, bytes):
                whole.update(piece)
                continue
            remote = RemoteFile(entry=piece, address=str(self._offsets[piece.path]), pin={})
            digest = hashlib.sha256()
            with self.open_range(remote, 0, piece.size_bytes) as reader:
                while count := reader.readinto(buffer):
                    if cancel is not None and cancel.is_set():
                        raise DownloadCancelledError(str(self.manifest.ref))
                    whole.update(buffer[:count])
                    digest.update(buffer[:count])
            is_valid = is_valid and digest.hexdigest() == piece.sha256
        return BundleDigests(whole.hexdigest(), is_valid)


@attrs.frozen
class BundleDigests:
    """
    What reading a bundle as a whole found.

    Args:
        sha256: The digest of the bundle.
        is_valid: Whether each file in it has the digest in the manifest.
    """

    sha256: str
    is_valid: bool


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
        if not count:  # It was complete when it was opened.
            raise SourceChangedError(self.bundle.path, self.name)
        self.offset += count
        return count
