"""
Members of an archive: their names checked, their bytes metered.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Protocol

import attrs

from kserve_pvc._format.file_names import check_name, fold
from kserve_pvc._source.contract import UnpackLimits
from kserve_pvc.errors import DamagedArchiveError, PolicyError, StoreError, UnsafePathError

PIECE_BYTES = 256 * 1024
# So much may come out of however small an archive: not worth a question about its ratio.
_HARMLESS_BYTES = 16 * 1024 * 1024


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


class Readable(Protocol):
    def read(self, most: int, /) -> bytes: ...


class NameCheck:
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


class Meter:
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


class MeteredStream:
    """
    What comes out of an archive, in order and counted.
    """

    def __init__(self, source: Readable, meter: Meter) -> None:
        self._source = source
        self._meter = meter
        self.position = 0

    def read(self, most: int) -> bytes:
        data = self._source.read(most)
        self._meter.add(len(data))
        self.position += len(data)
        return data

    def read_some(self, most: int) -> bytes:
        data = self.read(min(most, PIECE_BYTES))
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
def translating(archive: str) -> Iterator[None]:
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
        raise DamagedArchiveError(archive, str(error)[:200] or type(error).__name__) from error


def read_pieces(stream: MeteredStream, archive: str) -> Iterator[bytes]:
    with translating(archive):
        while piece := stream.read(PIECE_BYTES):
            yield piece
