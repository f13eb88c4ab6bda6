"""
What an archive holds, member by member, and nothing of it believed.

Nothing is written here: whoever asks gets a checked path and the bytes, piece by piece, so that an archive of any size
needs little memory. An archive comes from a stranger. It may name files outside of the model, claim sizes it does not
have, turn a kilobyte into a terabyte, or hold links and devices; each is an error that names archive and member.
"""

from __future__ import annotations

import io
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import attrs

from kserve_pvc._format.file_names import check_name, fold
from kserve_pvc._source.contract import UnpackLimits
from kserve_pvc.errors import DigestMismatchError, PolicyError, StoreError, UnsafePathError

if TYPE_CHECKING:
    import tarfile
    import zipfile

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
_PIECE_BYTES = 256 * 1024
# So much may come out of however small an archive: not worth a question about its ratio.
_HARMLESS_BYTES = 16 * 1024 * 1024
# What is written without special wishes is unpacked with less; a header may ask for gigabytes.
_WINDOW_LOG = 27
_XZ_BYTES = 129 * 1024 * 1024
_MAX_EXTENDED_BYTES = 64 * 1024
_MAX_DIRECTORY_BYTES = 16 * 1024 * 1024
_BLOCK = 512
_LOCAL_HEADER_BYTES = 30
_ENTRY_SIGNATURE = b"PK\x01\x02"
_IS_ENCRYPTED, _IS_UTF8 = 0x1, 0x800
_STORED, _DEFLATED = 0, 8
_REGULAR_TYPES, _LINK_TYPES = (b"0", b"\0", b"7"), (b"1", b"2")
_INSTALL = "install it with `pip install 'kserve-pvc[http]'`, or keep the file as it is with `unpack=False`"


@attrs.frozen(kw_only=True)
class Member:
    """
    One regular file of an archive, whose pieces are read to their end before the next member is asked for.

    `evidence` is the digest that the archive gives it, as `name:hex`; the pieces end in an error if they do not have
    it.
    """

    path: PurePosixPath
    pieces: Iterator[bytes]
    evidence: str | None = None


class _Readable(Protocol):
    def read(self, most: int, /) -> bytes: ...


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
    names = _Names(name, limits)
    size = archive.seek(0, io.SEEK_END)
    archive.seek(0)
    meter = _Meter(name, limits, size)
    with _translated(name):
        if not size:
            raise EOFError("it is empty")
        if kind == "zip":
            yield from _zip_members(archive, names, meter, selects, make_room)
            return
        stream = _Stream(_decoded(archive, coding), meter)
        if kind == "tar":
            yield from _tar_members(stream, names, selects, make_room)
            return
        path = names.take(name[: -len(ending)])
        if path is not None and selects(path):
            yield Member(path=path, pieces=_pieces(stream, name))


def _ending(name: str) -> str | None:
    last = name.rpartition("/")[2].lower()
    ending = next((ending for ending in _ENDINGS if last.endswith(ending)), None)
    return None if ending == last else ending


class _Names:
    """
    The names of an archive so far, each checked by itself and against all others.
    """

    def __init__(self, archive: str, limits: UnpackLimits) -> None:
        self.archive = archive
        self.limits = limits
        self._left = limits.entries
        # The archive itself lies where its members go, until they are all there.
        self._files = {fold(archive): archive}
        self._directories: dict[str, str] = {}

    def shown(self, member: str) -> str:
        return f"{self.archive}: {member}"

    def count(self) -> None:
        """
        Count an entry of whatever kind.
        """
        self._left -= 1
        if self._left < 0:
            raise PolicyError(
                self.archive, f"it has more than {self.limits.entries} entries; `unpack_limits` may allow more"
            )

    def take(self, name: str, *, is_directory: bool = False) -> PurePosixPath | None:
        """
        Turn a name into a path inside the model. None: it is the name of the model's directory itself.
        """
        # What `tar -C model .` puts before every name; it says nothing.
        inside = name.removeprefix("./")
        if is_directory:
            inside = inside.rstrip("/") if inside.strip("/") else inside[:1]
            if inside in ("", "."):
                return None
        try:
            path = check_name(inside)
        except UnsafePathError as error:
            raise UnsafePathError(self.shown(name), error.rule) from None
        if len(inside.encode()) > self.limits.path_bytes:
            raise PolicyError(
                self.shown(name),
                f"its name is longer than {self.limits.path_bytes} bytes; `unpack_limits` may allow more",
            )
        self._enter(name, inside if is_directory else inside.rpartition("/")[0])
        if not is_directory:
            folded = fold(inside)
            twin = self._files.get(folded) or self._directories.get(folded)
            if twin is not None:
                raise self._collision(name, twin)
            self._files[folded] = inside
        return path

    def _enter(self, name: str, directory: str) -> None:
        while directory and self._directories.get(folded := fold(directory)) != directory:
            twin = self._directories.get(folded) or self._files.get(folded)
            if twin is not None:
                raise self._collision(name, twin)
            self._directories[folded] = directory
            directory = directory.rpartition("/")[0]

    def _collision(self, name: str, twin: str) -> UnsafePathError:
        rule = f"it collides with `{twin}`, at least on a volume that ignores case or Unicode form"
        return UnsafePathError(self.shown(name), rule)


class _Meter:
    """
    Counts what comes out of an archive, and ends it when that is too much.
    """

    def __init__(self, archive: str, limits: UnpackLimits, archive_bytes: int) -> None:
        self._archive = archive
        self._allowed = int(min(limits.size_bytes, max(limits.ratio * archive_bytes, _HARMLESS_BYTES)))
        self._total = 0

    def add(self, count: int) -> None:
        self._total += count
        self.check(self._total)

    def check(self, total: int) -> None:
        """
        Refuse an archive that holds so much in all.
        """
        if total > self._allowed:
            rule = f"it holds more than {self._allowed} bytes, the most for its size; if you trust it, allow more with `unpack_limits`"
            raise PolicyError(self._archive, rule)


class _Stream:
    """
    What comes out of an archive, in order and counted.
    """

    def __init__(self, source: _Readable, meter: _Meter) -> None:
        self._source = source
        self._meter = meter
        self.position = 0

    def read(self, most: int) -> bytes:
        data = self._source.read(most)
        self._meter.add(len(data))
        self.position += len(data)
        return data

    def read_some(self, most: int) -> bytes:
        data = self.read(min(most, _PIECE_BYTES))
        if not data:
            raise EOFError("it ends early")
        return data

    def read_exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            data += self.read_some(count - len(data))
        return bytes(data)

    def skip_to(self, position: int) -> None:
        while self.position < position:
            self.read_some(position - self.position)


@contextmanager
def _translated(archive: str) -> Iterator[None]:
    try:
        yield
    except StoreError:
        raise
    except Exception as error:
        import gzip

        # An error of the volume. What gzip finds wrong calls itself one too.
        if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile):
            raise
        # Whatever a library says to bytes that somebody else has chosen.
        raise DigestMismatchError(
            archive, "a whole archive", f"damaged ({str(error)[:200] or type(error).__name__})"
        ) from error


def _pieces(stream: _Stream, archive: str) -> Iterator[bytes]:
    with _translated(archive):
        while piece := stream.read(_PIECE_BYTES):
            yield piece


def _decoded(archive: BinaryIO, coding: str) -> _Readable:
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
                given = (self._decompressor.unused_data or self._source.read(_PIECE_BYTES)).lstrip(b"\0")
                if not given and not (given := self._source.read(_PIECE_BYTES).lstrip(b"\0")):
                    return b""
                self._decompressor = self._make()
            elif self._decompressor.needs_input:
                given = self._source.read(_PIECE_BYTES)
                if not given:
                    raise EOFError("it ends early")
            data: bytes = self._decompressor.decompress(given, most)
            if data:
                return data


def _tar_members(
    stream: _Stream, names: _Names, selects: Callable[[PurePosixPath], bool], make_room: Callable[[int], None]
) -> Iterator[Member]:
    """
    Walk a tar by its headers.

    `tarfile` parses each of them. Walking is done here, since it keeps all members in memory, reads names of any
    length, and lets a header send it backwards.
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
            names.take(name, is_directory=True)
            continue
        if header.type not in _REGULAR_TYPES:
            raise UnsafePathError(names.shown(name), _wrong_type(header))
        path = names.take(name)
        end = stream.position + -(-size // _BLOCK) * _BLOCK
        if path is not None and selects(path):
            make_room(size)
            yield Member(path=path, pieces=_tar_pieces(stream, names.archive, size))
        stream.skip_to(end)
    while piece := stream.read(_PIECE_BYTES):
        if piece.strip(b"\0"):
            raise PolicyError(
                names.archive, "something follows the end of the archive, which others may take for a part of it"
            )


def _tar_pieces(stream: _Stream, archive: str, size: int) -> Iterator[bytes]:
    end = stream.position + size
    with _translated(archive):
        while stream.position < end:
            yield stream.read_some(end - stream.position)


def _size(extended: str | None, header: tarfile.TarInfo) -> int:
    if extended is not None and not (extended.isascii() and extended.isdigit() and len(extended) <= 18):
        raise ValueError("a size is no number")
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


def _extension(stream: _Stream, header: tarfile.TarInfo, names: _Names) -> dict[str, str]:
    """What a header says about the one that follows, as far as it matters: path and size."""
    if not 0 <= header.size <= _MAX_EXTENDED_BYTES:
        raise PolicyError(names.archive, f"a header of it is longer than {_MAX_EXTENDED_BYTES} bytes")
    data = stream.read_exactly(-(-header.size // _BLOCK) * _BLOCK)[: header.size]
    if header.type == b"L":
        return {"path": _text(data.partition(b"\0")[0])}
    if header.type == b"K":
        return {}  # Where a link leads; links are refused when they come.
    records = _records(data)
    if any(key.startswith("GNU.sparse.") for key in records):
        raise PolicyError(names.archive, "it holds a sparse file, which is not unpacked")
    found = {key: value for key, value in records.items() if key in ("path", "size")}
    if found and header.type == b"g":
        raise PolicyError(names.archive, "a header of it gives all members one path or size")
    return found


def _records(data: bytes) -> dict[str, str]:
    """Records as `<length> <key>=<value>` and a line break, the length counting all of it."""
    records = {}
    while data:
        digits = data[:20].partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        if not len(digits) + 2 < length <= len(data) or data[length - 1 : length] != b"\n":
            raise ValueError("an extended header is no list of records")
        key, _, value = data[len(digits) + 1 : length - 1].partition(b"=")
        records[_text(key)] = _text(value)
        data = data[length:]
    return records


def _text(data: bytes) -> str:
    # What is no UTF-8 becomes what no name may hold.
    return data.decode("utf-8", "surrogateescape")


class _BoundedFile:
    """
    The file of a zip, whose directory is read whole: bounded before that becomes objects.
    """

    def __init__(self, file: BinaryIO, names: _Names) -> None:
        self._file = file
        self._names = names
        self.is_opening = True
        self.seekable, self.seek, self.tell = file.seekable, file.seek, file.tell

    def read(self, most: int = -1) -> bytes:
        # The directory is the one thing that is read in its whole length while a zip is being opened.
        if self.is_opening and most > _MAX_DIRECTORY_BYTES:
            raise PolicyError(self._names.archive, f"its directory is longer than {_MAX_DIRECTORY_BYTES} bytes")
        data = self._file.read(most)
        limit = self._names.limits.entries
        if self.is_opening and most > 0 and data.count(_ENTRY_SIGNATURE) > limit:
            raise PolicyError(self._names.archive, f"it has more than {limit} entries; `unpack_limits` may allow more")
        return data


def _zip_members(
    archive: BinaryIO,
    names: _Names,
    meter: _Meter,
    selects: Callable[[PurePosixPath], bool],
    make_room: Callable[[int], None],
) -> Iterator[Member]:
    import zipfile

    bounded = _BoundedFile(archive, names)
    with zipfile.ZipFile(bounded) as opened:
        bounded.is_opening = False
        infos = opened.infolist()
        _check_overlaps(infos, opened.start_dir, names)
        chosen = [(info, path) for info in infos if (path := _zip_path(info, names)) is not None and selects(path)]
        total = sum(info.file_size for info, _ in chosen)
        meter.check(total)
        make_room(total)
        for info, path in chosen:
            with opened.open(info) as stream:
                yield Member(
                    path=path, pieces=_zip_pieces(stream, info, names, meter), evidence=f"crc32:{info.CRC:08x}"
                )


def _check_overlaps(infos: list[zipfile.ZipInfo], end: int, names: _Names) -> None:
    """Refuse members that share bytes: a few of them become any number of files, each with a ratio of its own."""
    ordered = sorted(infos, key=lambda info: info.header_offset)
    starts = [(info.header_offset, info.orig_filename) for info in ordered] + [(end, "the directory")]
    for info, ((start, name), (following, other)) in zip(ordered, pairwise(starts), strict=True):
        if start < 0 or start + _LOCAL_HEADER_BYTES + info.compress_size > following:
            raise UnsafePathError(names.shown(name), f"its bytes overlap with those of `{other}`")


def _zip_path(info: zipfile.ZipInfo, names: _Names) -> PurePosixPath | None:
    """The path of a member that is a regular file; None for a directory."""
    names.count()
    # As it is spelled: `zipfile` itself cuts names at a NUL.
    name = info.orig_filename
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        what = "a link" if kind == stat.S_IFLNK else "no regular file"
        raise UnsafePathError(names.shown(name), f"it is {what}, and only regular files and directories are unpacked")
    if not info.flag_bits & _IS_UTF8 and not name.isascii():
        raise UnsafePathError(names.shown(name), "its name is no ASCII, and nothing says that it is UTF-8")
    if name.endswith("/") or kind == stat.S_IFDIR:
        names.take(name, is_directory=True)
        return None
    if info.flag_bits & _IS_ENCRYPTED:
        raise PolicyError(names.shown(name), "it is encrypted")
    if info.compress_type not in (_STORED, _DEFLATED):
        raise PolicyError(names.shown(name), "it is compressed in another way than deflate, which is not read")
    return names.take(name)


def _zip_pieces(stream: Any, info: zipfile.ZipInfo, names: _Names, meter: _Meter) -> Iterator[bytes]:
    size = 0
    with _translated(names.shown(info.orig_filename)):
        while piece := stream.read(_PIECE_BYTES):
            size += len(piece)
            meter.add(len(piece))
            yield piece
    if size != info.file_size:
        raise PolicyError(
            names.shown(info.orig_filename), f"it says that it has {info.file_size} bytes, and has {size}"
        )
