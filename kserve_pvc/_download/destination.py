"""
Where a transfer writes, and who observes it.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import PurePosixPath
from typing import Protocol

import attrs

from kserve_pvc._download.hashes import Hashes
from kserve_pvc._format.records import FileEntry
from kserve_pvc._source.contract import RemoteFile
from kserve_pvc.errors import StoreError


@attrs.frozen(kw_only=True)
class Destination:
    """
    Where a generation is written.

    `create` opens a new file, `allocate` reserves room for it, `write` puts bytes at an offset, `copy` puts those of
    another file there (from, to, start, stop), `finish` makes the file immutable and returns whether it is durable yet,
    which it is if requested, `trim` gives back what was reserved for a file outside of some ranges, `note` appends to
    the journal the fields of a `PartNote`, `failure` says what an error of the volume means.
    """

    create: Callable[[PurePosixPath], int]
    allocate: Callable[[int, int], None]
    write: Callable[[int, memoryview, int], None]
    copy: Callable[[int, int, int, int], bool]
    finish: Callable[[int, PurePosixPath, bool, bool], bool]
    trim: Callable[[int, Sequence[tuple[int, int]]], None]
    note: Callable[[PurePosixPath, str, int, int, str | None, int | None, bool], None]
    failure: Callable[[str, PurePosixPath, OSError], Exception]


@attrs.define(eq=False)
class Writing:
    """
    A file that is open at the destination. `is_adopted`: some of its bytes were taken over from another file.

    `guard` is held by what changes `hashes` or `ahead`, and for no longer: never during a call of the volume. `ending`
    is held by what closes the file, or relies on it to be open.
    """

    destination: Destination
    file: RemoteFile
    fd: int
    hashes: Hashes
    is_adopted: bool = False
    # Ranges that are not hashed as the front: how far each is written, its checksum, and whether it is noted.
    ahead: dict[int, tuple[int, int | None, bool]] = attrs.field(factory=dict)
    guard: threading.Lock = attrs.field(factory=threading.Lock)
    ending: threading.Lock = attrs.field(factory=threading.Lock)
    is_ended: bool = False
    is_spoiled: bool = False  # It could not be synced, so that nothing more is known of its bytes.

    def hash(self, piece: memoryview) -> None:
        """
        Feed the digests with what is written at the front.
        """
        with self.guard:
            self.hashes.update(piece)

    def advance(self, start: int, stop: int, crc32: int | None, *, is_noted: bool = False) -> None:
        """
        Remember how far a range is written that is not hashed as the front.
        """
        with self.guard:
            self.ahead[start] = stop, crc32, is_noted

    def receive(
        self, pieces: Iterable[memoryview], start: int, *, is_front: bool, received: Callable[[int], None]
    ) -> int | None:
        """
        Write the pieces of a range to their place, and hash or check them.

        Args:
            is_front: All bytes before the range are hashed.
            received: Is notified of the size of each piece.

        Returns:
            The checksum of the range, if it needs one to prove itself.
        """
        position, crc = start, 0
        is_ahead = not is_front or not self.hashes.is_needed
        needs_crc = not is_front and self.hashes.sha256 is not None
        for piece in pieces:
            if needs_crc:
                crc = zlib.crc32(piece, crc)
            self.destination.write(self.fd, piece, position)
            position += len(piece)
            # Not before it is written: what is hashed, or counted here, is noted if the transfer ends now.
            if is_front:
                self.hash(piece)
            if is_ahead:
                self.advance(start, position, crc if needs_crc else None)
            received(len(piece))
        return crc if needs_crc else None

    def note(self, start: int, stop: int, crc32: int | None, *, is_front: bool) -> None:
        """
        Make a range durable and note it: by its own checksum, or by the digest of all up to its end at the front.
        """
        try:
            os.fdatasync(self.fd)
        except OSError:
            self.is_spoiled = True
            raise
        path, token = self.file.entry.path, str(self.file.entry.token)
        if is_front and self.hashes.sha256 is not None:
            self.destination.note(path, token, 0, stop, self.hashes.so_far(), None, True)
        else:
            self.destination.note(path, token, start, stop, None, crc32, True)
            if not is_front or not self.hashes.is_needed:
                self.advance(start, stop, crc32, is_noted=True)

    def keep(self) -> None:
        """
        Note what is written of a file that is not going to be complete, and give back what was reserved beyond.

        Nothing is synced for it: what is lost on the way to the volume does not prove itself to the next process. Only
        without digests there is nothing that could, so that a note has to be durable.
        """
        path, token = self.file.entry.path, str(self.file.entry.token)
        with self.guard:
            hashes, front, sha256 = self.hashes, 0, self.hashes.so_far()
            if hashes.is_needed:
                front = hashes.size_bytes
            ahead = [(start, *rest) for start, rest in self.ahead.items() if rest[0] > max(front, start)]
        with self.ending, suppress(OSError, StoreError):
            if self.is_ended or self.is_spoiled:
                return
            ranges = [(start, stop) for start, stop, _, _ in ahead]
            self.destination.trim(self.fd, _merged([(0, front), *ranges] if front else ranges))
            is_durable = hashes.sha256 is None
            if is_durable:
                os.fdatasync(self.fd)
            if front:
                self.destination.note(path, token, 0, front, sha256, None, is_durable)
            for start, stop, crc32, is_noted in ahead:
                if not is_noted:
                    self.destination.note(path, token, start, stop, None, crc32, is_durable)

    def discard(self) -> None:
        """
        Close a file whose bytes are wrong, give back its room, and take back its notes.
        """
        with self.ending, suppress(OSError, StoreError):
            if not self.is_ended:
                self.destination.trim(self.fd, [])
                self.destination.note(self.file.entry.path, str(self.file.entry.token), 0, 0, None, None, False)
        self.abandon()

    def finish(self, promised: str | None, *, is_durable: bool) -> FileEntry:
        """
        Make the complete file immutable, and note it.

        Args:
            promised: The digest by the source that it was found to have.
        """
        entry, sha256 = self.file.entry, self.hashes.so_far()
        with self.ending:
            self.is_ended = True
        is_durable = self.destination.finish(self.fd, entry.path, is_durable, entry.executable)
        self.destination.note(entry.path, str(entry.token), 0, entry.size_bytes, sha256, None, is_durable)
        return entry.with_digests(sha256, promised)

    def abandon(self) -> None:
        """
        Close a file that is not going to be complete.
        """
        with self.ending, suppress(OSError):
            if not self.is_ended:
                self.is_ended = True
                os.close(self.fd)


def _merged(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges in order, those that touch as one."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        else:
            merged.append((start, stop))
    return merged


class Observer(Protocol):
    """
    Is notified of every byte, and ends the transfer by raising from `check`.
    """

    def check(self) -> None: ...

    def adopted(self, size_bytes: int) -> None: ...

    def received(self, size_bytes: int) -> None: ...

    def retried(self, reason: str, delay: float) -> None: ...


class TransferCancelledError(Exception):
    """Another worker failed first."""


@contextmanager
def naming_errors(destination: Destination, path: PurePosixPath) -> Iterator[None]:
    """
    Translate errors of the volume to those of the store.
    """
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        if error.errno is None:
            raise
        raise destination.failure("writing", path, error) from error
