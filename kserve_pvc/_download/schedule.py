"""
Which range of which file is fetched next. Pure: no threads, no clock, no disk.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from kserve_pvc._download.hashes import Hashes
from kserve_pvc._download.tuning import Tuning
from kserve_pvc._source.contract import RemoteFile


@attrs.define(eq=False)
class Writing:
    """
    One file being written: what nobody fetches yet, what is written, and how far it is hashed.
    """

    file: RemoteFile
    fd: int
    hashes: Hashes
    gaps: list[tuple[int, int]]
    unwritten: int
    hashed: int = 0
    is_hashing: bool = False
    is_adopted: bool = False
    ready: dict[int, int] = attrs.field(factory=dict)

    @property
    def is_over(self) -> bool:
        return (
            not self.unwritten
            and not self.is_hashing
            and (self.hashed == self.file.entry.size_bytes or not self.hashes.is_needed)
        )


@attrs.frozen
class Span:
    """A range for one worker. `is_front`: it begins where the file is hashed up to, so it is hashed on the way."""

    of: Writing
    start: int
    stop: int
    is_front: bool


def at_once(file: RemoteFile, tuning: Tuning) -> int:
    """How many small files one worker asks for at the same time."""
    return 4 if file.entry.size_bytes <= tuning.tiny_file_bytes else 2


def gap_bytes(writing: Writing) -> int:
    return sum(stop - start for start, stop in writing.gaps)


def is_free(gaps: Sequence[tuple[int, int]], start: int, stop: int) -> bool:
    return any(first <= start and stop <= last for first, last in gaps)


def without(gaps: Sequence[tuple[int, int]], start: int, stop: int) -> list[tuple[int, int]]:
    """Gaps without a range that lies in one of them."""
    left = []
    for first, last in gaps:
        if first <= start and stop <= last:
            left += [(a, b) for a, b in ((first, start), (stop, last)) if a < b]
        else:
            left.append((first, last))
    return left
