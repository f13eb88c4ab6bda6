"""
The members of a zip archive, read through its central directory.
"""

from __future__ import annotations

import stat
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
_ENTRY_SIGNATURE = b"PK\x01\x02"
_IS_ENCRYPTED, _IS_UTF8 = 0x1, 0x800
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
