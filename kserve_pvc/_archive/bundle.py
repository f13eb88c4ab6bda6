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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import PurePosixPath

import attrs

from kserve_pvc._archive.bundle_bytes import (
    BLOCK,
    MANIFEST_NAME,
    SIZE_FIELD,
    BundlePlan,
    bundle_length,
    bundle_pieces,
    plan_bundle,
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


def _read_plan(fd: int, name: str, bundle_bytes: int) -> BundlePlan:
    head = os.pread(fd, BLOCK, 0)
    try:
        size_bytes = int(head[SIZE_FIELD], 8)
    except ValueError:
        size_bytes = -1
    if size_bytes < 0 or head != tar_header(MANIFEST_NAME, size_bytes):
        raise StoreFormatError(name, "it does not begin as a bundle does")
    if size_bytes > MAX_MANIFEST_BYTES:
        raise StoreFormatError(name, f"its manifest is larger than {MAX_MANIFEST_BYTES} bytes")
    if BLOCK + size_bytes > bundle_bytes:
        raise StoreFormatError(name, "it ends inside its manifest, so it was cut off; copy it again")
    data = os.pread(fd, size_bytes, BLOCK)
    manifest = decode(BundleManifest, data, name)
    if encode(manifest) != data:
        raise StoreFormatError(name, "its manifest is not written as a manifest is")
    return plan_bundle(manifest, data)


def _compare(fd: int, name: str, plan: BundlePlan, size_bytes: int) -> Mapping[PurePosixPath, int]:
    """Compare all but the files with what it has to be, and return where these lie."""
    if size_bytes < plan.size_bytes:
        reason = f"it has {size_bytes} of {plan.size_bytes} bytes, so it was cut off; copy it again, or end its export"
        raise StoreFormatError(name, reason)
    if size_bytes > plan.size_bytes:
        raise StoreFormatError(name, f"{size_bytes - plan.size_bytes} bytes follow its end")
    places, at = {}, 0
    for piece in bundle_pieces(plan.manifest, plan.data):
        if not isinstance(piece, bytes):
            places[piece.path] = at
        elif os.pread(fd, len(piece), at) != piece:
            raise StoreFormatError(
                name, f"what begins at byte {at} is not what its manifest makes it, so it was changed or packed anew"
            )
        at += bundle_length(piece)
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
        return order_listing(ref, remote, version=self.manifest.version)

    @contextmanager
    def open_range(self, file: RemoteFile, start: int, stop: int) -> Iterator[_Reader]:
        place = int(file.address)
        yield _Reader(self, str(file.entry.path), self._fd, place + start, place + stop)

    def is_right(self) -> bool:
        """
        Whether every file has the digest that the manifest names.
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
        if not count:  # It was whole when it was opened.
            raise SourceChangedError(self.bundle.path, self.name)
        self.offset += count
        return count
