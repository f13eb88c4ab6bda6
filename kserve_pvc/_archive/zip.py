"""
The members of a zip archive, read through its central directory.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

from kserve_pvc._archive.members import PIECE_BYTES, RAISE, Member, Meter, NameCheck, translating
from kserve_pvc.errors import PolicyError, UnsafePathError

if TYPE_CHECKING:
    import zipfile

_MAX_DIRECTORY_BYTES = 16 * 1024 * 1024
_LOCAL_HEADER_BYTES = 30
_LOCAL_SIGNATURE, _DESCRIPTOR_SIGNATURE = b"PK\x03\x04", b"PK\x07\x08"
# Signature and version; flags, method; date; checksum, two lengths; lengths of name and extra field.
_LOCAL_HEADER = struct.Struct("<6xHH4xIIIHH")
_HAS_DESCRIPTOR, _IN_EXTRA = 0x8, 0xFFFFFFFF
_ENTRY_SIGNATURE = b"PK\x01\x02"
_IS_ENCRYPTED, _IS_UTF8 = 0x1, 0x800
# Encrypted, strongly encrypted, masked.
_COMPARED = 0x1 | 0x40 | 0x2000
# Signature and numbers of disks; entries here and in all; length and place of the directory; length of the comment.
_END = struct.Struct("<4s4xHHIIH")
_END_SIGNATURE = b"PK\x05\x06"
# The record and the locator that a zip with large fields has before its end record.
_LARGE_END_BYTES = 56 + 20
_STORED, _DEFLATED = 0, 8
_UNIX = 3


class _BoundedFile:
    """
    The file of a zip archive with a limit for its central directory, which `zipfile` reads into memory at once.
    """

    def __init__(self, file: BinaryIO, names: NameCheck) -> None:
        self._file = file
        self._names = names
        self.is_opening = True
        self.seekable, self.seek, self.tell = file.seekable, file.seek, file.tell

    def read(self, most: int = -1) -> bytes:
        # While an archive is being opened, only the central directory is read in one call.
        if self.is_opening and most > _MAX_DIRECTORY_BYTES:
            raise PolicyError(self._names.archive, f"its central directory is longer than {_MAX_DIRECTORY_BYTES} bytes")
        data = self._file.read(most)
        limit = self._names.limits.entries
        if self.is_opening and most > 0 and data.count(_ENTRY_SIGNATURE) > limit:
            raise PolicyError(self._names.archive, f"it has more than {limit} entries; {RAISE}")
        return data


def zip_members(
    archive: BinaryIO,
    names: NameCheck,
    meter: Meter,
    make_room: Callable[[int], None],
) -> Iterator[Member]:
    import zipfile

    bounded = _BoundedFile(archive, names)
    with zipfile.ZipFile(bounded) as opened:
        bounded.is_opening = False
        infos = opened.infolist()
        _check_overlaps(infos, opened.start_dir, names)
        _check_local_headers(archive, infos, opened.start_dir, names)
        _check_end(archive, opened, names)
        chosen = [(info, path) for info in infos if (path := _zip_path(info, names)) is not None]
        total = sum(info.file_size for info, _ in chosen)
        meter.check(total)
        make_room(total)
        for info, path in chosen:
            with opened.open(info) as stream:
                yield Member(
                    path=path,
                    pieces=_zip_pieces(stream, info, names, meter),
                    evidence=f"crc32:{info.CRC:08x}",
                    is_executable=info.create_system == _UNIX and bool(info.external_attr >> 16 & stat.S_IXUSR),
                )


def _check_overlaps(infos: list[zipfile.ZipInfo], end: int, names: NameCheck) -> None:
    """Refuse members that share bytes: overlapping members are how a zip bomb evades the limit for the ratio."""
    ordered = sorted(infos, key=lambda info: info.header_offset)
    starts = [(info.header_offset, info.orig_filename) for info in ordered] + [(end, "the central directory")]
    for info, ((start, name), (following, other)) in zip(ordered, pairwise(starts), strict=True):
        if start < 0 or start + _LOCAL_HEADER_BYTES + info.compress_size > following:
            raise UnsafePathError(names.shown(name), f"its bytes overlap with those of `{other}`")


def _check_local_headers(archive: BinaryIO, infos: list[zipfile.ZipInfo], end: int, names: NameCheck) -> None:
    """
    Refuse an archive that other readers, which go from header to header, would unpack to something else: with a prefix,
    hidden entries, or headers that disagree with the central directory.
    """
    following = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.header_offset != following:
            raise UnsafePathError(
                names.shown(info.orig_filename), f"{info.header_offset - following} bytes before it are in no entry"
            )
        following = _end_of_entry(archive, info, names)
    if following != end:
        raise UnsafePathError(names.archive, f"{end - following} bytes before its central directory are in no entry")


def _check_end(archive: BinaryIO, opened: zipfile.ZipFile, names: NameCheck) -> None:
    """
    Refuse what another reader may take for the end of the archive: bytes behind it, or an end record in its comment.
    """
    size, comment = archive.seek(0, 2), opened.comment
    start = size - _END.size - len(comment)
    archive.seek(max(0, start))
    fields = archive.read(_END.size)
    if start < opened.start_dir or len(fields) < _END.size or not fields.startswith(_END_SIGNATURE):
        raise UnsafePathError(names.archive, "it does not end with its comment, so others may read another archive")
    _, here, total, length, _, comment_length = _END.unpack(fields)
    if comment_length != len(comment) or _END_SIGNATURE in comment:
        raise UnsafePathError(names.archive, "its comment holds another end, so others may read another archive")
    is_large = start == opened.start_dir + length + _LARGE_END_BYTES or length == _IN_EXTRA
    entries = len(opened.infolist())
    if not is_large and (start != opened.start_dir + length or {here, total} != {entries}):
        raise UnsafePathError(names.archive, "its end disagrees with its central directory")


def _end_of_entry(archive: BinaryIO, info: zipfile.ZipInfo, names: NameCheck) -> int:
    """Compare a local header with its entry in the central directory, and return where its data descriptor ends."""
    archive.seek(info.header_offset)
    header = archive.read(_LOCAL_HEADER_BYTES)
    if len(header) < _LOCAL_HEADER_BYTES or header[:4] != _LOCAL_SIGNATURE:
        raise UnsafePathError(names.shown(info.orig_filename), "it has no local header")
    flags, method, crc, compressed, size, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    name = archive.read(name_length)
    extra = archive.read(extra_length)
    stored = info.orig_filename.encode("utf-8" if info.flag_bits & _IS_UTF8 else "cp437", "replace")
    has_descriptor = bool(flags & _HAS_DESCRIPTOR)
    # What is only known at the end of a stream is zero here, and all ones where it is in the field for large files.
    sizes = _large_sizes(extra, compressed, size)
    expected = (info.compress_size, info.file_size, info.CRC)
    is_same = (*sizes, crc) == expected or (has_descriptor and not crc and set(sizes) <= {0, *expected[:2]})
    if name != stored or method != info.compress_type or flags & _COMPARED != info.flag_bits & _COMPARED or not is_same:
        raise UnsafePathError(names.shown(info.orig_filename), "its local header disagrees with the central directory")
    end: int = info.header_offset + _LOCAL_HEADER_BYTES + name_length + extra_length + info.compress_size
    return end + (_descriptor_length(archive, end, info) if has_descriptor else 0)


def _large_sizes(extra: bytes, compressed: int, size: int) -> tuple[int, int]:
    while len(extra) >= 4:
        kind, length = struct.unpack("<HH", extra[:4])
        if kind == 1:
            large = list(struct.iter_unpack("<Q", extra[4 : 4 + length // 8 * 8]))
            size = large.pop(0)[0] if size == _IN_EXTRA and large else size
            compressed = large.pop(0)[0] if compressed == _IN_EXTRA and large else compressed
        extra = extra[4 + length :]
    return compressed, size


def _descriptor_length(archive: BinaryIO, start: int, info: zipfile.ZipInfo) -> int:
    """How long what follows the data is: a checksum and two lengths of four or eight bytes, after a mark or not."""
    archive.seek(start)
    found = archive.read(24)
    mark = len(_DESCRIPTOR_SIGNATURE) if found.startswith(_DESCRIPTOR_SIGNATURE) else 0
    for kind in ("<IQQ", "<III"):
        length = struct.calcsize(kind)
        values = found[mark : mark + length]
        if len(values) == length and struct.unpack(kind, values) == (info.CRC, info.compress_size, info.file_size):
            return mark + length
    return 0


def _zip_path(info: zipfile.ZipInfo, names: NameCheck) -> PurePosixPath | None:
    """Return the path of a regular file that is selected, or None."""
    names.count()
    # The name as stored: `filename` is cut at a NUL.
    name = info.orig_filename
    kind = stat.S_IFMT(info.external_attr >> 16)
    if not names.selects(name, is_directory=name.endswith("/")):
        return None
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        what = "a link" if kind == stat.S_IFLNK else "not a regular file"
        raise UnsafePathError(names.shown(name), f"it is {what}, and only regular files and directories are unpacked")
    if not info.flag_bits & _IS_UTF8 and not name.isascii():
        raise UnsafePathError(names.shown(name), "its name is not ASCII and not marked as UTF-8")
    if name.endswith("/") or kind == stat.S_IFDIR:
        names.add(name, is_directory=True)
        return None
    if info.flag_bits & _IS_ENCRYPTED:
        raise PolicyError(names.shown(name), "it is encrypted")
    if info.compress_type not in (_STORED, _DEFLATED):
        raise PolicyError(names.shown(name), "its compression is not supported (only stored and deflate are)")
    return names.add(name)


def _zip_pieces(stream: Any, info: zipfile.ZipInfo, names: NameCheck, meter: Meter) -> Iterator[bytes]:
    size = 0
    with translating(names.shown(info.orig_filename)):
        while piece := stream.read(PIECE_BYTES):
            size += len(piece)
            meter.add(len(piece))
            yield piece
    if size != info.file_size:
        raise PolicyError(names.shown(info.orig_filename), f"it claims to have {info.file_size} bytes but has {size}")
