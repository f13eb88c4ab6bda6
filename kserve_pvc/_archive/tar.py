"""
The members of a tar archive, read as a stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from kserve_pvc._archive.members import PIECE_BYTES, Member, MeteredStream, NameCheck, translating
from kserve_pvc.errors import PolicyError, UnsafePathError

if TYPE_CHECKING:
    import tarfile

_MAX_EXTENDED_BYTES = 64 * 1024
_BLOCK = 512
_REGULAR_TYPES, _LINK_TYPES = (b"0", b"\0", b"7"), (b"1", b"2")


def tar_members(
    stream: MeteredStream, names: NameCheck, selects: Callable[[PurePosixPath], bool], make_room: Callable[[int], None]
) -> Iterator[Member]:
    """
    Yield the selected regular files of a tar archive.

    `tarfile` parses each header. It is not used to walk the archive, because it keeps all members in memory, reads
    names of any length, and follows headers that point backwards.
    """
    import tarfile

    extended: dict[str, str] = {}
    while True:
        try:
            header = tarfile.TarInfo.frombuf(stream.read_exactly(_BLOCK), "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            if stream.position and type(error).__name__ == "EOFHeaderError":
                break
            raise
        names.count()
        if header.type in (b"x", b"X", b"g", b"L", b"K"):
            extended |= _extension(stream, header, names)
            continue
        name, size = extended.get("path", header.name), _size(extended.get("size"), header)
        extended = {}
        if header.type == b"5":
            names.add(name, is_directory=True)
            continue
        if header.type not in _REGULAR_TYPES:
            raise UnsafePathError(names.shown(name), _wrong_type(header))
        path = names.add(name)
        end = stream.position + -(-size // _BLOCK) * _BLOCK
        if path is not None and selects(path):
            make_room(size)
            yield Member(path=path, pieces=_tar_pieces(stream, names.archive, size))
        stream.skip_to(end)
    while piece := stream.read(PIECE_BYTES):
        if piece.strip(b"\0"):
            raise PolicyError(
                names.archive, "data follows the end of the archive, which other tools may take for a part of it"
            )


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
    if header.type in _LINK_TYPES:
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
        return {}  # The target of a link; links are refused by their own header.
    records = _records(data)
    if any(key.startswith("GNU.sparse.") for key in records):
        raise PolicyError(names.archive, "it holds a sparse file, which is not unpacked")
    found = {key: value for key, value in records.items() if key in ("path", "size")}
    if found and header.type == b"g":
        raise PolicyError(names.archive, "a global header sets one path or size for all members")
    return found


def _records(data: bytes) -> dict[str, str]:
    """Parse records of the form `<length> <key>=<value>\\n`, where the length counts the whole record."""
    records = {}
    while data:
        digits = data[:20].partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        if not len(digits) + 2 < length <= len(data) or data[length - 1 : length] != b"\n":
            raise ValueError("an extended header is malformed")
        key, _, value = data[len(digits) + 1 : length - 1].partition(b"=")
        records[_decode(key)] = _decode(value)
        data = data[length:]
    return records


def _decode(data: bytes) -> str:
    # Bytes that are not UTF-8 become surrogates, which `check_name` refuses.
    return data.decode("utf-8", "surrogateescape")
