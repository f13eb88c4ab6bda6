"""
Taking over bytes that another writer left on the volume, once they prove themselves.

The files of other writers are read and never written to.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import PurePosixPath

import attrs

from kserve_pvc._download.destination import Destination, Observer, Writing
from kserve_pvc._download.hashes import CRC32, Hashes, Promises, hash_range
from kserve_pvc._download.schedule import Progress
from kserve_pvc._format.records import FileEntry, PartNote
from kserve_pvc._source.contract import RemoteFile
from kserve_pvc.errors import SourceDeniedError, SourceNotFoundError, SourceUnavailableError


@attrs.frozen(kw_only=True)
class Donor:
    """
    A file that another process wrote and that may hold the bytes we want.

    `notes` says what of it is proven by which digest. A durable note of a whole file also says that its writer has
    closed it for good, so that its inode may be shared: `link` gives it a second name in our generation, or returns
    False.
    """

    notes: tuple[PartNote, ...]
    open_file: Callable[[], AbstractContextManager[int]]
    link: Callable[[PurePosixPath], bool]


class Adoption:
    """
    What one transfer takes over. A donor that cannot be used is passed over: its bytes are fetched.

    Args:
        promises: What the source vouches for.
        check: Called before each read; ends what is done by raising.
    """

    def __init__(
        self,
        donors: Mapping[PurePosixPath, Sequence[Donor]],
        destination: Destination,
        observer: Observer,
        promises: Promises,
        *,
        check: Callable[[], None],
    ) -> None:
        self._donors = donors
        self._destination = destination
        self._observer = observer
        self._promises = promises
        self._check = check

    def has_offers(self, file: RemoteFile) -> bool:
        """
        Whether something of this very content is on the volume.
        """
        return any(True for _ in self._offers(file))

    def share(self, file: RemoteFile, buffer: memoryview) -> FileEntry | None:
        """
        Give a whole file of another generation a second name instead of fetching it, if it proves itself.

        It must have the digest that its writer noted, and the one that the source vouches for: anyone who may write on
        the volume can write a note too.
        """
        if self._promises.digest == "none":
            return None
        hashes: Hashes | None = None
        for donor, note in self._offers(file):
            is_whole = note.sha256 is not None and (note.start, note.stop) == (0, file.entry.size_bytes)
            # What may be in the page cache only is copied: its digest would prove the cache, not the medium.
            if not is_whole or not note.is_durable or file.entry.sha256 not in (None, note.sha256):
                continue
            hashes = self._promises.hashes(file) if hashes is None else hashes.anew()
            try:
                evidence = self._prove(donor, note, file, hashes, buffer)
                if not donor.link(file.entry.path):
                    continue
            except (SourceUnavailableError, SourceDeniedError, SourceNotFoundError):
                raise  # The source was requested for a digest. These are errors of the system too.
            except (OSError, ValueError):
                continue  # Collected, lost, replaced, not readable, or another content.
            self._observer.adopted(note.stop)
            self._destination.note(note.path, note.token, 0, note.stop, note.sha256, None, True)
            return file.entry.with_digests(note.sha256, evidence)
        return None

    def _prove(self, donor: Donor, note: PartNote, file: RemoteFile, hashes: Hashes, buffer: memoryview) -> str | None:
        """
        Compare a whole file with its note and with the source, and return the digest by the source, if it has one.

        Raises:
            ValueError: It is another content.
        """
        with donor.open_file() as fd:
            is_as_long = os.fstat(fd).st_size == note.stop
            if not is_as_long or not hash_range(fd, 0, note.stop, buffer, hashes.update, self._check):
                raise ValueError("another length")
            if hashes.so_far() != note.sha256:
                raise ValueError("another digest")
            return self._promises.compare(file, fd, hashes)

    def adopt(self, writing: Writing, progress: Progress, buffer: memoryview) -> None:
        """
        Copy what others have of a file, as far as it proves itself, into the file that is being written.

        Args:
            progress: Learns of what was copied; its gaps are left to be fetched.
        """
        offers = list(self._offers(writing.file))
        # Beginnings first, each from where the one before ended; then what lies further on.
        for donor, note in sorted(offers, key=lambda offer: (offer[1].sha256 is None, offer[1].start, offer[1].stop)):
            is_front = note.sha256 is not None and writing.hashes.sha256 is not None
            start = progress.hashed if is_front else note.start
            is_provable = is_front or note.crc32 is not None or (self._promises.digest == "none" and note.is_durable)
            if not is_provable or note.stop <= start or not progress.lacks(start, note.stop):
                continue
            try:
                with donor.open_file() as source:
                    if not self._take_over(writing, source, note, start, buffer, is_front=is_front):
                        continue
            except (OSError, ValueError):
                continue
            writing.is_adopted = True
            progress.add(start, note.stop, is_front=is_front)
            self._note(writing, note, start, is_front=is_front)
            self._observer.adopted(note.stop - start)

    def _note(self, writing: Writing, note: PartNote, start: int, *, is_front: bool) -> None:
        """Note the copy, so that the next process needs what it was made from no more."""
        if not is_front or not writing.hashes.is_needed:
            writing.advance(start, note.stop, note.crc32, is_noted=self._promises.digest != "none")
        if (
            self._promises.digest != "none"
        ):  # Without digests a note has to be durable, and is written when the copy is.
            first = 0 if is_front else start
            self._destination.note(note.path, note.token, first, note.stop, note.sha256, note.crc32, False)

    def _offers(self, file: RemoteFile) -> Iterator[tuple[Donor, PartNote]]:
        # Without a token there is no evidence that the source still means the same bytes.
        for donor in self._donors.get(file.entry.path, ()) if file.entry.token else ():
            for note in donor.notes:
                if note.token == file.entry.token and note.stop <= file.entry.size_bytes:
                    yield donor, note

    def _take_over(
        self, writing: Writing, source: int, note: PartNote, start: int, buffer: memoryview, *, is_front: bool
    ) -> bool:
        """Copy the range of a note and check the copy. False: it does not prove itself."""
        if not self._destination.copy(source, writing.fd, start, note.stop):
            return False
        if is_front:
            hashes = writing.hashes.copy()
            is_there = hash_range(writing.fd, start, note.stop, buffer, hashes.update, self._check)
            if not is_there or hashes.so_far() != note.sha256:
                return False
            writing.hashes = hashes
        elif note.crc32 is not None:
            crc = CRC32()
            is_there = hash_range(writing.fd, start, note.stop, buffer, crc.update, self._check)
            return is_there and crc.value == note.crc32
        return True
