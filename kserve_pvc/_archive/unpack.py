"""
What an archive holds, member by member, and nothing of it believed.

Nothing is written here: whoever asks gets a checked path and the bytes, piece by piece, so that an archive of any size
needs little memory. An archive comes from a stranger. It may name files outside of the model, claim sizes it does not
have, turn a kilobyte into a terabyte, or hold links and devices; each is an error that names archive and member.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from kserve_pvc._archive.members import (
    PIECE_BYTES,
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

# What a name ends in: what the archive is, and how it is compressed. The longer ones first.
_ENDINGS = {
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
# What is written without special wishes is unpacked with less; a header may ask for gigabytes.
_WINDOW_LOG = 27
_XZ_BYTES = 129 * 1024 * 1024
_INSTALL = "install it with `pip install 'kserve-pvc[http]'`, or keep the file as it is with `unpack=False`"


def is_archive(name: str) -> bool:
    """
    Whether a file is unpacked, by what its name ends in.
    """
    return _ending(name) is not None


def check_readable(name: str) -> None:
    """
    Make sure that an archive of this name can be unpacked here, before it is fetched.

    Raises:
        PolicyError: It needs a package that is not installed.
    """
    ending = _ending(name) or ""
    if _ENDINGS[ending][1] == "zst":
        try:
            _load_zstd()
        except ImportError as error:
            raise PolicyError(name, f"unpacking it needs the package `backports.zstd`; {_INSTALL}") from error


def unpack(
    archive: BinaryIO,
    name: str,
    limits: UnpackLimits,
    *,
    selects: Callable[[PurePosixPath], bool],
    make_room: Callable[[int], None],
) -> Iterator[Member]:
    """
    Yield the regular files of an archive that are wanted.

    Args:
        archive: It, open for reading, and seekable.
        name: How it is called, which says what it is.
        selects: Whether a file is wanted. Names of others are checked all the same.
        make_room: Told how many bytes are about to be needed, where the archive says so.

    Raises:
        UnsafePathError: A member would leave its place, collides with another, or is no regular file.
        PolicyError: It holds more than the limits allow, or is encrypted or compressed in ways that are not read.
        DigestMismatchError: It is damaged.
    """
    ending = _ending(name)
    assert ending is not None  # Nothing else is asked to be unpacked.
    kind, coding = _ENDINGS[ending]
    names = NameCheck(name, limits)
    size = archive.seek(0, io.SEEK_END)
    archive.seek(0)
    meter = Meter(name, limits, size)
    with translating(name):
        if not size:
            raise EOFError("it is empty")
        if kind == "zip":
            yield from zip_members(archive, names, meter, selects, make_room)
            return
        stream = MeteredStream(_decoded(archive, coding), meter)
        if kind == "tar":
            yield from tar_members(stream, names, selects, make_room)
            return
        path = names.take(name[: -len(ending)])
        if path is not None and selects(path):
            yield Member(path=path, pieces=read_pieces(stream, name))


def _ending(name: str) -> str | None:
    last = name.rpartition("/")[2].lower()
    ending = next((ending for ending in _ENDINGS if last.endswith(ending)), None)
    return None if ending == last else ending


def _decoded(archive: BinaryIO, coding: str) -> Readable:
    if coding == "gz":
        import gzip

        return gzip.GzipFile(fileobj=archive, mode="rb")
    if coding == "xz":
        import lzma

        # The file object of `lzma` has no limit for memory, and ends quietly before what is no xz.
        return _Decompressed(archive, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_BYTES))
    if coding == "zst":
        zstd = _load_zstd()
        options = {zstd.DecompressionParameter.window_log_max: _WINDOW_LOG}
        return _Decompressed(archive, lambda: zstd.ZstdDecompressor(options=options))
    return archive


def _load_zstd() -> Any:
    from importlib import import_module

    # Python has it since 3.14; before that, the same comes as a package.
    try:
        return import_module("compression.zstd")
    except ImportError:
        return import_module("backports.zstd")


class _Decompressed:
    """
    One stream after the other, decompressed without ever holding more than was asked for.
    """

    def __init__(self, source: BinaryIO, make: Callable[[], Any]) -> None:
        self._source = source
        self._make = make
        self._decompressor = make()

    def read(self, most: int, /) -> bytes:
        while True:
            given = b""
            if self._decompressor.eof:
                # Zeros may fill up what follows a stream of xz.
                given = (self._decompressor.unused_data or self._source.read(PIECE_BYTES)).lstrip(b"\0")
                if not given and not (given := self._source.read(PIECE_BYTES).lstrip(b"\0")):
                    return b""
                self._decompressor = self._make()
            elif self._decompressor.needs_input:
                given = self._source.read(PIECE_BYTES)
                if not given:
                    raise EOFError("it ends early")
            data: bytes = self._decompressor.decompress(given, most)
            if data:
                return data
