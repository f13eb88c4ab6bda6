"""
Members of an archive: name checks and size limits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Protocol

import attrs

from kserve_pvc._format.file_names import MAX_DIRECTORIES, check_name, fold
from kserve_pvc._source.contract import UnpackLimits
from kserve_pvc.errors import DamagedArchiveError, PolicyError, StoreError, UnsafePathError

PIECE_BYTES = 256 * 1024
# The compression ratio is not checked below this output size.
_HARMLESS_BYTES = 16 * 1024 * 1024
# How limits are raised: as an option of a store, or for KServe's containers.
RAISE = "raise `unpack_limits`, for the storage initializer `KSERVE_PVC_UNPACK_LIMITS`, to allow more"


@attrs.frozen(kw_only=True)
class Member:
    """
    One regular file of an archive. Its pieces must be read to the end before the next member is requested.

    `evidence` is the digest that the archive stores for it, as `name:hex`. The iteration of the pieces raises an error
    if they do not match it. A member with `copy_of` has no pieces: it is a hard link to that earlier member. Of its
    mode only counts whether its owner may execute it, as for `tarfile.data_filter`.
    """

    path: PurePosixPath
    pieces: Iterator[bytes]
    evidence: str | None = None
    copy_of: PurePosixPath | None = None
    is_executable: bool = False


class Readable(Protocol):
    def read(self, most: int, /) -> bytes: ...


class NameCheck:
    """
    Checks each name of an archive by itself and for collisions with the names before it.

    Names are spelled as tools spell those of a working directory: parts that are empty or `.` lead nowhere and go.
    """

    def __init__(self, archive: str, limits: UnpackLimits, selects: Callable[[str], bool]) -> None:
        self.archive = archive
        self.limits = limits
        self._selects = selects
        self._left = limits.entries
        # Every name is kept part by part, so that many below one directory take little memory. By the number of their
        # directory and by the part as a volume may compare it: the part itself, and the number of a directory.
        self._known: dict[tuple[int, str], tuple[str, int | None]] = {}
        self._directories = 0
        # The archive itself is in the same directory as its members until all of them are unpacked.
        self._known[0, fold(archive)] = archive, None

    def shown(self, member: str) -> str:
        return f"{self.archive}: {member}"

    def count(self) -> None:
        """
        Count an entry of any kind against the limit.

        Raises:
            PolicyError: The archive has too many entries.
        """
        self._left -= 1
        if self._left < 0:
            raise PolicyError(self.archive, f"it has more than {self.limits.entries} entries; {RAISE}")

    def selects(self, name: str, *, is_directory: bool = False) -> bool:
        """
        Whether the patterns select a member. What they leave out may have any name, and be anything.
        """
        inside = spell(name)
        return self._selects(f"{inside}/" if is_directory and inside else inside)

    def add(self, name: str, *, is_directory: bool = False) -> PurePosixPath | None:
        """
        Check a name and convert it to a path inside the model.

        Returns:
            None if it names the model's directory itself.

        Raises:
            UnsafePathError: The name is unsafe, or collides with an earlier one.
            PolicyError: The name is too long.
        """
        inside = spell(name)
        if is_directory and not inside:
            return None
        try:
            path = check_name(inside)
        except UnsafePathError as error:
            raise UnsafePathError(self.shown(name), error.rule) from None
        if len(inside.encode()) > self.limits.path_bytes:
            raise PolicyError(
                self.shown(name),
                f"its name is longer than {self.limits.path_bytes} bytes; {RAISE}",
            )
        parts = inside.split("/")
        number = self._enter(name, parts if is_directory else parts[:-1])
        if not is_directory:
            place = number, fold(parts[-1])
            if place in self._known:
                raise self._collision(name, [*parts[:-1], self._known[place][0]])
            self._known[place] = parts[-1], None
        return path

    def _enter(self, name: str, parts: list[str]) -> int:
        """Add a directory and those above it, and return its number."""
        number = 0
        for level, part in enumerate(parts):
            known = self._known.get((number, fold(part)))
            if known is None:
                self._directories += 1
                if self._directories > MAX_DIRECTORIES:
                    raise UnsafePathError(self.shown(name), f"a model may have {MAX_DIRECTORIES} directories")
                known = self._known[number, fold(part)] = part, self._directories
            spelled, below = known
            if spelled != part or below is None:
                raise self._collision(name, [*parts[:level], spelled])
            number = below
        return number

    def _collision(self, name: str, twin: list[str]) -> UnsafePathError:
        rule = f"it collides with `{'/'.join(twin)}` on volumes that ignore case or Unicode form"
        return UnsafePathError(self.shown(name), rule)


def spell(name: str) -> str:
    """
    Leave out the parts of a member's name that lead nowhere. An absolute name stays absolute.
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return ("/" if name.startswith("/") else "") + "/".join(parts)


class Meter:
    """
    Counts the bytes that are unpacked from an archive, and stops at a limit.
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
        Check a total number of unpacked bytes.

        Raises:
            PolicyError: It is over the limit.
        """
        if total > self._allowed:
            rule = (
                f"it unpacks to more than {self._allowed} bytes, the limit for an archive of its size; "
                f"if you trust it, {RAISE}"
            )
            raise PolicyError(self._archive, rule)


class EmptyReadError(EOFError):
    """
    A stream ends where something would begin.
    """


class MeteredStream:
    """
    A decompressed stream whose bytes are counted against the limit.
    """

    def __init__(self, source: Readable, meter: Meter) -> None:
        self._source = source
        self.meter = meter
        self.position = 0

    def read(self, most: int) -> bytes:
        data = self._source.read(most)
        self.meter.add(len(data))
        self.position += len(data)
        return data

    def read_some(self, most: int) -> bytes:
        data = self.read(min(most, PIECE_BYTES))
        if not data:
            raise EOFError("unexpected end of data")
        return data

    def read_exactly(self, count: int) -> bytes:
        data = bytearray(self.read(min(count, PIECE_BYTES)))
        if not data:
            raise EmptyReadError("unexpected end of data")
        while len(data) < count:
            data += self.read_some(count - len(data))
        return bytes(data)

    def skip_to(self, position: int) -> None:
        while self.position < position:
            self.read_some(position - self.position)


@contextmanager
def translating(archive: str) -> Iterator[None]:
    """
    Translate what the standard library raises for damaged data; errors of the volume pass.
    """
    try:
        yield
    except StoreError:
        raise
    except Exception as error:
        # An error of the volume has a number; those of decompressors, of which some are an `OSError` too, have none.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        # A decompressor may raise anything for untrusted bytes.
        raise DamagedArchiveError(archive, str(error)[:200] or type(error).__name__) from error


def read_pieces(stream: MeteredStream, archive: str) -> Iterator[bytes]:
    with translating(archive):
        while piece := stream.read(PIECE_BYTES):
            yield piece
