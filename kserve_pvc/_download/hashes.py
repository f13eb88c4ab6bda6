"""
The digests of a file that is being written.
"""

from __future__ import annotations

import copy
import hashlib
import zlib
from collections.abc import Callable

from kserve_pvc._source.contract import Checksum


class Hashes:
    """
    The digests of one file, fed in order: ours, and the one the source vouches for.

    `make` makes a checksum that the standard library does not have, by its name, or says that nobody can.
    """

    def __init__(self, digest: str, promised: str | None, make: Callable[[str], Checksum | None]) -> None:
        self.sha256 = hashlib.sha256() if digest == "sha256" else None
        self.promised = promised
        self._make = make
        self._kind = (promised or "").partition(":")[0]
        self._other = None if self._kind == "sha256" else self._checksum()
        self.is_needed = self.sha256 is not None or self._other is not None

    def _checksum(self) -> Checksum | None:
        if self._kind == "md5":
            return hashlib.md5(usedforsecurity=False)
        if self._kind == "crc32":
            return CRC32()
        return self._make(self._kind) if self._kind else None

    def anew(self) -> Hashes:
        return Hashes("none" if self.sha256 is None else "sha256", self.promised, self._make)

    def copy(self) -> Hashes:
        twin = copy.copy(self)
        twin.sha256 = self.sha256 and self.sha256.copy()
        twin._other = self._other and self._other.copy()
        return twin

    def update(self, piece: memoryview) -> None:
        if self.sha256 is not None:
            self.sha256.update(piece)
        if self._other is not None:
            self._other.update(piece)

    def so_far(self) -> str | None:
        return None if self.sha256 is None else self.sha256.hexdigest()

    def compare(self) -> tuple[str, str] | None:
        """What the source promised and what came, or None if it promised nothing."""
        found = self.sha256 if self._kind == "sha256" else self._other
        return None if found is None or self.promised is None else (self.promised, f"{self._kind}:{found.hexdigest()}")


class CRC32:
    def __init__(self, value: int = 0) -> None:
        self.value = value

    def update(self, piece: memoryview) -> None:
        self.value = zlib.crc32(piece, self.value)

    def hexdigest(self) -> str:
        return f"{self.value:08x}"

    def copy(self) -> CRC32:
        return CRC32(self.value)
