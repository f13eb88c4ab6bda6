"""
Reading untrusted archives, member by member.

Nothing is written here: the caller gets a checked path and the bytes in pieces, so that an archive of any size needs
little memory. Archives are untrusted. One may name files outside of the model, claim sizes it does not have, turn a
kilobyte into a terabyte, or hold links and devices; each of these is an error that names the archive and the member.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from kserve_pvc._archive.decompressed import Decompressed, GzipDecompressor
from kserve_pvc._archive.members import (
    Member,
    Meter,
    MeteredStream,
    NameCheck,
    Readable,
    read_pieces,
    translating,
)
from kserve_pvc._archive.tar import tar_members
from kserve_pvc._archive.zip import zip_members
from kserve_pvc._source.contract import UnpackLimits
from kserve_pvc.errors import PolicyError

# The format and the compression by file extension, the longer extensions first.
_EXTENSIONS = {
    ".tar.gz": ("tar", "gz"),
    ".tar.xz": ("tar", "xz"),
    ".tar.zst": ("tar", "zst"),
    ".tgz": ("tar", "gz"),
    ".tar": ("tar", ""),
    ".zip": ("zip", ""),
    ".gz": ("", "gz"),
    ".xz": ("", "xz"),
    ".zst": ("", "zst"),
}
# How a compressed stream begins. No tar does: its first bytes are a name.
_MAGIC = {b"\x1f\x8b": "gz", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zst"}
# Limits for decompressor memory, above what the presets of the compressors need. A header may request gigabytes.
_WINDOW_LOG = 27
_XZ_BYTES = 129 * 1024 * 1024
_INSTALL = "install it with `pip install 'kserve-pvc[http]'`, or keep the file as it is with `unpack=False`"


def is_archive(name: str) -> bool:
    """
    Whether a file is unpacked, by its extension.
    """
    return _extension(name) is not None


def check_readable(name: str) -> None:
    """
    Check before the download that an archive of this name can be unpacked.

    Raises:
        PolicyError: A package that unpacking needs is not installed.
    """
    extension = _extension(name) or ""
    if _EXTENSIONS[extension][1] == "zst":
        try:
            _load_zstd()
        except ImportError as error:
            raise PolicyError(name, f"unpacking it needs the package `backports.zstd`; {_INSTALL}") from error


def unpack(
    archive: BinaryIO,
    name: str,
    limits: UnpackLimits,
    *,
    selects: Callable[[str], bool],
    make_room: Callable[[int], None],
) -> Iterator[Member]:
    """
    Yield the selected regular files of an archive.

    Args:
        archive: A seekable binary file, open for reading.
        name: The file name, whose extension determines the format.
        selects: Whether to unpack a path. Other members are not looked at further, and may have any name.
        make_room: Called with the number of bytes that are about to be needed, where the archive states it.

    Raises:
        UnsafePathError: A member has an unsafe or colliding name, or is not a regular file.
        PolicyError: The archive exceeds the limits, is encrypted, or has an unsupported compression.
        DigestMismatchError: The archive is damaged.
    """
    extension = _extension(name)
    assert extension is not None  # The caller checks `is_archive`.
    container, coding = _EXTENSIONS[extension]
    names = NameCheck(name, limits, selects)
    size = archive.seek(0, io.SEEK_END)
    archive.seek(0)
    meter = Meter(name, limits, size)
    with translating(name):
        if not size:
            raise EOFError("the file is empty")
        if container == "zip":
            yield from zip_members(archive, names, meter, make_room)
            return
        if container == "tar":
            coding = _seen_coding(archive)
        stream = MeteredStream(_decoded(archive, name, coding), meter)
        if container == "tar":
            yield from tar_members(stream, names, make_room, is_compressed=bool(coding))
            return
        path = names.add(name[: -len(extension)])
        if path is not None and selects(str(path)):
            yield Member(path=path, pieces=read_pieces(stream, name))


def _extension(name: str) -> str | None:
    last = name.rpartition("/")[2].lower()
    extension = next((extension for extension in _EXTENSIONS if last.endswith(extension)), None)
    return None if extension == last else extension


def _seen_coding(archive: BinaryIO) -> str:
    """
    How a tar is compressed, by its first bytes: servers and clients undo or add a compression and keep the name.
    """
    start = archive.read(8)
    archive.seek(0)
    return next((coding for magic, coding in _MAGIC.items() if start.startswith(magic)), "")


def _decoded(archive: BinaryIO, name: str, coding: str) -> Readable:
    if coding == "gz":
        return Decompressed(archive, name, GzipDecompressor)
    if coding == "xz":
        import lzma

        # `lzma.LZMAFile` has no memory limit, and silently ignores trailing data that is not xz.
        return Decompressed(archive, name, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_BYTES))
    if coding == "zst":
        zstd = _load_zstd()
        options = {zstd.DecompressionParameter.window_log_max: _WINDOW_LOG}
        return Decompressed(archive, name, lambda: zstd.ZstdDecompressor(options=options))
    return archive


def _load_zstd() -> Any:
    from importlib import import_module

    # In the standard library since Python 3.14; `backports.zstd` has the same interface.
    try:
        return import_module("compression.zstd")
    except ImportError:
        return import_module("backports.zstd")
