"""
The members of a tar archive, read as a stream.
"""

from __future__ import annotations

import logging
import stat
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import attrs

from kserve_pvc._archive.members import (
    PIECE_BYTES,
    EmptyReadError,
    Member,
    Meter,
    MeteredStream,
    NameCheck,
    spell,
    translating,
)
from kserve_pvc.errors import PolicyError, UnsafePathError

if TYPE_CHECKING:
    import tarfile

_logger = logging.getLogger("kserve_pvc")
_MAX_EXTENDED_BYTES = 64 * 1024
_BLOCK = 512
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")
_REGULAR_TYPES, _HARD_LINK_TYPE, _LINK_TYPE, _DIRECTORY_TYPE = (b"0", b"\0", b"7"), b"1", b"2", b"5"


def tar_members(
    stream: MeteredStream, names: NameCheck, make_room: Callable[[int], None], *, is_compressed: bool
) -> Iterator[Member]:
    """
    Yield the selected regular files of a tar archive.

    `tarfile` parses each header. It is not used to walk the archive, because it keeps all members in memory, reads
    names of any length, and follows headers that point backwards.

    The two empty blocks at the end, which some writers leave out, are not needed. A compressed stream shows by itself
    that it is whole; if it is not compressed, a warning is logged.

    Args:
        is_compressed: Whether the stream comes out of a compressed one.
    """
    extended: dict[str, str] = {}
    sizes: dict[PurePosixPath, int] = {}
    while (header := _next_header(stream, names, may_end=not extended, is_compressed=is_compressed)) is not None:
        names.count()
        if header.type in (b"x", b"X", b"g", b"L", b"K"):
            extended |= _extension(stream, header, names)
            continue
        name, size = extended.get("path", header.name), _size(extended.get("size"), header)
        target, extended = extended.get("linkpath", header.linkname), {}
        end = stream.position + (0 if header.type in _WITHOUT_DATA else -(-size // _BLOCK) * _BLOCK)
        # How much of a sparse file is stored, further headers say, which are not read.
        if header.type == b"S" or names.selects(name, is_directory=header.type == _DIRECTORY_TYPE):
            if header.type == _DIRECTORY_TYPE:
                names.add(name, is_directory=True)
            elif header.type == _HARD_LINK_TYPE:
                linked = _hard_link(names, name, target, sizes, stream.meter, make_room)
                yield attrs.evolve(linked, is_executable=_is_executable(header))
            elif header.type not in _REGULAR_TYPES:
                raise UnsafePathError(names.shown(name), _wrong_type(header))
            elif (path := names.add(name)) is not None:
                make_room(size)
                sizes[path] = size
                pieces = _tar_pieces(stream, names.archive, size)
                yield Member(path=path, pieces=pieces, is_executable=_is_executable(header))
        stream.skip_to(end)
    while piece := stream.read(PIECE_BYTES):
        if piece.strip(b"\0"):
            raise PolicyError(
                names.archive, "data follows the end of the archive, which other tools may take for a part of it"
            )


def _is_executable(header: tarfile.TarInfo) -> bool:
    return bool(header.mode & stat.S_IXUSR)


def _next_header(
    stream: MeteredStream, names: NameCheck, *, may_end: bool, is_compressed: bool
) -> tarfile.TarInfo | None:
    """Read the header of the next member; None at the end."""
    import tarfile

    try:
        block = stream.read_exactly(_BLOCK)
    except EmptyReadError:
        if not may_end or not stream.position:
            raise
        if not is_compressed:
            _logger.warning(
                "archive `%s` ends without an end mark; if members are missing, upload it again", names.archive
            )
        return None
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        if type(error).__name__ == "EOFHeaderError":
            return None
        raise


def _hard_link(
    names: NameCheck,
    name: str,
    target: str,
    sizes: dict[PurePosixPath, int],
    meter: Meter,
    make_room: Callable[[int], None],
) -> Member:
    """A hard link to an earlier member: that file once more."""
    path, first = names.add(name), PurePosixPath(spell(target))
    if path is None or first not in sizes:
        rule = f"it is a hard link to `{target}`, which is not among the files that were unpacked before it"
        raise UnsafePathError(names.shown(name), rule)
    sizes[path] = sizes[first]
    # The copy is written, so it counts as what is unpacked.
    meter.add(sizes[first])
    make_room(sizes[first])
    return Member(path=path, pieces=iter(()), copy_of=first)


def _tar_pieces(stream: MeteredStream, archive: str, size: int) -> Iterator[bytes]:
    end = stream.position + size
    with translating(archive):
        while stream.position < end:
            yield stream.read_some(end - stream.position)


def _size(extended: str | None, header: tarfile.TarInfo) -> int:
    if extended is not None and not (extended.isascii() and extended.isdigit() and len(extended) <= 18):
        raise ValueError("a size is not a number")
    size = header.size if extended is None else int(extended)
    if size < 0:
        raise ValueError("a size is negative")
    return size


def _wrong_type(header: tarfile.TarInfo) -> str:
    if header.type == _LINK_TYPE:
        return "it is a link, and only regular files and directories are unpacked"
    what = {b"3": "a device", b"4": "a device", b"6": "a named pipe", b"S": "a sparse file"}.get(
        header.type, "of an unknown kind"
    )
    return f"it is {what}, and only regular files and directories are unpacked"


def _extension(stream: MeteredStream, header: tarfile.TarInfo, names: NameCheck) -> dict[str, str]:
    """Read the path and the size that an extended header sets for the next member."""
    if not 0 <= header.size <= _MAX_EXTENDED_BYTES:
        raise PolicyError(names.archive, f"an extended header is longer than {_MAX_EXTENDED_BYTES} bytes")
    data = stream.read_exactly(-(-header.size // _BLOCK) * _BLOCK)[: header.size]
    if header.type == b"L":
        return {"path": _decode(data.partition(b"\0")[0])}
    if header.type == b"K":
        return {"linkpath": _decode(data.partition(b"\0")[0])}
    records = _records(data)
    if any(key.startswith("GNU.sparse.") for key in records):
        raise PolicyError(names.archive, "it holds a sparse file, which is not unpacked")
    found = {key: value for key, value in records.items() if key in ("path", "size", "linkpath")}
    if found and header.type == b"g":
        raise PolicyError(names.archive, "a global header sets one path or size for all members")
    return found


def _records(data: bytes) -> dict[str, str]:
    """Parse records of the form `<length> <key>=<value>\\n`, where the length counts the whole record."""
    records, start = {}, 0
    while start < len(data):
        digits = data[start : start + 20].partition(b" ")[0]
        stop = start + (int(digits) if digits.isdigit() else 0)
        if not start + len(digits) + 2 < stop <= len(data) or data[stop - 1 : stop] != b"\n":
            raise ValueError("an extended header is malformed")
        key, _, value = data[start + len(digits) + 1 : stop - 1].partition(b"=")
        records[_decode(key)] = _decode(value)
        start = stop
    return records


def _decode(data: bytes) -> str:
    # Bytes that are not UTF-8 become surrogates, which `check_name` refuses.
    return data.decode("utf-8", "surrogateescape")
