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
    SettingsError,
    SourceChangedError,
    SourceDeniedError,
    SourceNotFoundError,
    SourceUnavailableError,
    StoreError,
    StoreFormatError,
)

BUFFER_BYTES = 1024 * 1024


@contextmanager
def open_bundle(file: str | os.PathLike[str], *, sha256: str | None = None) -> Iterator[Bundle]:
    """
    Open a bundle and compare all of it with its manifest, except for the content of the files: their digests are
    compared when they are read.

    Args:
        sha256: The digest that the manifest must have, as printed by `export`. Without it a bundle is only as
            trustworthy as its origin.

    Raises:
        SourceNotFoundError: The file does not exist.
        SourceDeniedError: The file may not be read.
        StoreFormatError: It is not a bundle, was truncated, modified or repacked, or has a newer format.
        DigestMismatchError: Its manifest does not have the digest `sha256`.
        SettingsError: It is not a regular file, or `sha256` is not a digest.
    """
    if sha256 is not None and re.fullmatch(SHA256, sha256) is None:
        raise SettingsError("sha256", sha256, "expected 64 hex digits, as printed by `export`")
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
    return Bundle(path=name, manifest=layout.manifest, sha256=layout.sha256, offsets=offsets, fd=fd)


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

    Args:
        sha256: The digest of the manifest.
    """

    path: str
    manifest: BundleManifest
    sha256: str
    _offsets: Mapping[PurePosixPath, int] = attrs.field(repr=False)
    _fd: int = attrs.field(repr=False)

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

    def has_valid_digests(self) -> bool:
        """
        Whether every file has the digest in the manifest.
        """
        buffer = memoryview(bytearray(BUFFER_BYTES))
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
        if not count:  # It was complete when it was opened.
            raise SourceChangedError(self.bundle.path, self.name)
        self.offset += count
        return count
