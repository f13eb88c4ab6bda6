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
    ".tar.bz2": ("tar", "bz2"),
    ".tar.xz": ("tar", "xz"),
    ".tar.lzma": ("tar", "lzma"),
    ".tar.zst": ("tar", "zst"),
    ".tgz": ("tar", "gz"),
    ".taz": ("tar", "gz"),
    ".tz": ("tar", "gz"),
    ".tbz2": ("tar", "bz2"),
    ".tbz": ("tar", "bz2"),
    ".txz": ("tar", "xz"),
    ".tzst": ("tar", "zst"),
    ".tar": ("tar", ""),
    ".zip": ("zip", ""),
    ".gz": ("", "gz"),
    ".xz": ("", "xz"),
    ".zst": ("", "zst"),
}
# How a compressed stream begins. No tar does: its first bytes are a name.
_MAGIC = {
    b"\x1f\x8b": "gz",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zst",
    # A block, or the end of a stream without one: a name could begin with the first four bytes.
    **{b"BZh%d%b" % (level, mark): "bz2" for level in range(1, 10) for mark in (b"1AY&SY", b"\x17rE8P\x90")},
}
_LZMA_MAGIC = b"\x5d\0\0"
# What begins like this is not unpacked, whatever its name.
_FOREIGN = {
    b"PK\x03\x04": "a zip archive",
    b"PK\x05\x06": "a zip archive",
    b"\x1f\x9d": "compressed by compress (`.Z`)",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive",
    b"Rar!\x1a\x07": "a RAR archive",
    b"LZIP": "compressed by lzip",
    b"\x04\x22\x4d\x18": "compressed by LZ4",
    b"\x89LZO\0": "compressed by LZO",
}
_NAMES = {"gz": "gzip", "bz2": "bzip2", "xz": "xz", "lzma": "LZMA", "zst": "Zstandard"}
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
            _check_zip(archive, name)
            yield from zip_members(archive, names, meter, make_room)
            return
        if container == "tar":
            coding = _seen_coding(archive, name)
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


def _seen_coding(archive: BinaryIO, name: str) -> str:
    """
    How a tar is compressed, by its first bytes: servers and clients undo or add a compression and keep the name.

    Raises:
        PolicyError: It is something else.
    """
    start = _start_of(archive)
    foreign = next((what for magic, what in _FOREIGN.items() if start.startswith(magic)), None)
    if foreign is not None and not _is_tar_header(start):
        raise PolicyError(name, f"its content is {foreign}, not a tar that can be unpacked; rename or repack it")
    # The size that follows is unknown or above zero, while a name would be followed by zeros.
    if start.startswith(_LZMA_MAGIC) and start[5:13].strip(b"\0"):
        return "lzma"
    return next((coding for magic, coding in _MAGIC.items() if start.startswith(magic)), "")


def _check_zip(archive: BinaryIO, name: str) -> None:
    """
    Raises:
        PolicyError: It is something that has another name.
    """
    start = _start_of(archive)
    coding = next((_NAMES[coding] for magic, coding in _MAGIC.items() if start.startswith(magic)), None)
    if coding is not None or _is_tar_header(start):
        what = "a tar archive" if coding is None else f"compressed by {coding}"
        raise PolicyError(name, f"its content is {what}, not a zip archive; rename it, for example to `.tar.gz`")


def _start_of(archive: BinaryIO) -> bytes:
    start = archive.read(512)
    archive.seek(0)
    return start


def _is_tar_header(start: bytes) -> bool:
    return start[257:262] == b"ustar"


def _decoded(archive: BinaryIO, name: str, coding: str) -> Readable:
    if coding == "gz":
        return Decompressed(archive, name, GzipDecompressor)
    if coding == "bz2":
        import bz2

        return Decompressed(archive, name, bz2.BZ2Decompressor)
    if coding == "lzma":
        import lzma

        return Decompressed(archive, name, lambda: lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=_XZ_BYTES))
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
