"""
The bytes of a bundle, as its manifest implies them.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator

import attrs

from kserve_pvc._archive.bundle_manifest import BundleManifest
from kserve_pvc._format.records import FileEntry

MANIFEST_NAME = "kserve-pvc-bundle.json"
END_NAME = "kserve-pvc-bundle.end"
FILES = "model/"
BLOCK = 512
# name, mode, uid, gid, size, mtime, checksum, type, linkname, magic, version, uname, gname, devmajor, devminor, prefix
_HEADER = struct.Struct("100s 8s 8s 8s 12s 12s 8s c 100s 6s 2s 32s 32s 8s 8s 155s 12x")
SIZE_FIELD = slice(124, 135)
_NAME_BYTES = 100
_MAX_PLAIN_SIZE = 8**11 - 1


@attrs.frozen
class BundleLayout:
    """
    An encoded manifest, and its digest and the size of the bundle, which follow from it.
    """

    manifest: BundleManifest
    data: bytes
    manifest_sha256: str
    size_bytes: int


def lay_out_bundle(manifest: BundleManifest, data: bytes) -> BundleLayout:
    size_bytes = sum(bundle_length(piece) for piece in bundle_pieces(manifest, data))
    return BundleLayout(manifest, data, hashlib.sha256(data).hexdigest(), size_bytes)


def bundle_pieces(manifest: BundleManifest, data: bytes) -> Iterator[bytes | FileEntry]:
    """
    Yield a bundle from its first byte to its last: bytes that follow from the manifest, and files of the model.
    """
    yield tar_header(MANIFEST_NAME, len(data)) + data + _padding(len(data))
    for file in manifest.files:
        yield tar_header(f"{FILES}{file.path}", file.size_bytes)
        yield file
        yield _padding(file.size_bytes)
    end = hashlib.sha256(data).hexdigest().encode() + b"\n"
    # Two empty blocks end a tar archive.
    yield tar_header(END_NAME, len(end)) + end + _padding(len(end)) + bytes(2 * BLOCK)


def bundle_length(piece: bytes | FileEntry) -> int:
    return len(piece) if isinstance(piece, bytes) else piece.size_bytes


def _padding(size_bytes: int) -> bytes:
    return bytes(-size_bytes % BLOCK)


def tar_header(name: str, size_bytes: int) -> bytes:
    """
    Return the POSIX header of a member, without owner and time.

    Names that are long or not ASCII, and sizes from 8 GiB, go into an extended header before it.
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
    # The checksum is computed with blanks in its own field.
    checksum = b"%06o\0 " % sum(_HEADER.pack(*fields, b" " * 8, *rest))
    return _HEADER.pack(*fields, checksum, *rest)
