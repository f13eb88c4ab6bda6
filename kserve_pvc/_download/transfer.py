"""
Bytes from a pinned source into a generation of our own: written once, hashed in order, in bounded memory.

Ranges of all files are in flight together, each received into a small buffer that is used again and again. Whoever
fetches the range at the front of a file (the first byte that is not hashed yet) hashes it on the way; a range further
on gets a CRC32, is written to its place, and is hashed from the page cache once the front has reached it. After every
range the bytes are made durable and noted in the journal with a digest. Whoever finds the journal of a dead writer
takes those bytes over, checks them while doing so, and fetches the rest. Nothing of a dead writer is ever written to.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import PurePosixPath

import attrs

from kserve_pvc._download.adoption import Donor
from kserve_pvc._download.budget import Budget, process_budget
from kserve_pvc._download.destination import Destination, Observer, TransferCancelledError, naming_errors
from kserve_pvc._download.hashes import CRC32, Chasers, Hashes, Promises, hash_range
from kserve_pvc._download.pieces import OpenedRange, Tries
from kserve_pvc._download.schedule import Batch, Begin, Progress, Range, Schedule, Work
from kserve_pvc._download.streams import StreamLimit
from kserve_pvc._download.tuning import Tuning
from kserve_pvc._format.records import FileEntry, PartNote
from kserve_pvc._source.contract import Backend, RemoteFile, SupportsEvidence
from kserve_pvc.errors import DigestMismatchError, SourceUnavailableError, StoreError


@attrs.define(eq=False)
class Writing:
    """
    A file that is being written.
    """

    file: RemoteFile
    fd: int
    hashes: Hashes
    is_adopted: bool = False


class Transfer:
    """
    One attempt to write all files of a model.

    Memory is bounded by one buffer of 1 MiB per stream and what the back end holds per open range.
    """

    def __init__(
        self,
        *,
        backend: Backend,
        destination: Destination,
        donors: Mapping[PurePosixPath, Sequence[Donor]],
        observer: Observer,
        tuning: Tuning,
        uri: str,
        budget: Budget | None = None,
    ) -> None:
        self._backend = backend
        self._uri = uri
        self._destination = destination
        self._donors = donors
        self._observer = observer
        self._tuning = tuning
        self._budget = process_budget() if budget is None else budget
        self._part_bytes = tuning.part_bytes
        self._digest = tuning.digest
        self._stall_seconds = tuning.stall_seconds
        self._evidence: Callable[[RemoteFile], str | None] = (
            backend.evidence if isinstance(backend, SupportsEvidence) else lambda file: file.digest
        )
        self._promises = Promises(backend, tuning, request=self._asked, check=self._check)
        self._pace = StreamLimit(tuning.max_workers)
        self._guard = threading.Condition()
        self._schedule = Schedule(tuning, donors)
        self._open: dict[PurePosixPath, Writing] = {}
        self._failure: BaseException | None = None
        self._done: dict[PurePosixPath, FileEntry] = {}
        # For the pace only, so an addition that is lost between threads does not matter.
        self._received, self._waited = 0, 0.0
        self._leave_alone_until = 0.0
        self._chasers = Chasers(self._catch_up, self._fail)

    def run(self, pages: Iterable[Sequence[RemoteFile]]) -> Mapping[PurePosixPath, FileEntry]:
        """
        Write every file and return what was written.

        Files of a page are begun while the next page is being listed.

        Raises:
            StoreError: The first failure; all workers have stopped when it is raised.
        """
        workers: list[threading.Thread] = []
        try:
            for page in pages:
                self._check()  # A listing may take long: a failure ends it.
                self._add(page)
                self._staff(workers)
            with self._guard:
                self._schedule.end_listing()
                self._guard.notify_all()
            while True:
                seconds = self._pace.look(time.monotonic(), self._received, self._waited)
                self._staff(workers)
                if self._wait(seconds):
                    break
        except BaseException as error:  # A KeyboardInterrupt too: no worker outlives this call.
            self._fail(error)
        for thread in workers:
            thread.join()
        self._chasers.join()
        if self._failure is not None:
            for writing in self._open.values():
                with suppress(OSError):
                    os.close(writing.fd)
            raise self._failure
        return self._done

    def _wait(self, seconds: float) -> bool:
        with self._guard:
            return self._guard.wait_for(lambda: self._failure is not None or self._schedule.is_finished, seconds)

    def _add(self, page: Sequence[RemoteFile]) -> None:
        with self._guard:
            self._schedule.add(page)
            self._guard.notify_all()

    def _staff(self, workers: list[threading.Thread]) -> None:
        """Start as many workers as there may be streams and as there is work for; those above the pace rest."""
        with self._guard:
            wanted = self._schedule.workers(self._pace.streams)
            self._guard.notify_all()
        while len(workers) < wanted:
            number = len(workers)
            name = f"kserve-pvc-transfer-{number}"
            worker = threading.Thread(target=self._work, args=(number,), name=name, daemon=True)
            worker.start()
            workers.append(worker)

    def _fail(self, error: BaseException) -> None:
        with self._guard:
            # Whoever stopped because of another's failure may be done before it.
            if self._failure is None and not isinstance(error, TransferCancelledError):
                self._failure = error
            self._guard.notify_all()

    def _work(self, number: int) -> None:
        try:
            with self._budget.buffer(self._check) as buffer:
                last: RemoteFile | None = None
                while (work := self._next(number, last)) is not None:
                    last = self._do(work, buffer)
                    with self._guard:
                        self._schedule.done(work)
        except BaseException as error:
            self._fail(error)

    def _do(self, work: Work, buffer: memoryview) -> RemoteFile | None:
        if isinstance(work, Batch):
            self._write_small_files(work, buffer)
            return None
        if isinstance(work, Begin):
            self._begin(work.file, buffer)
        else:
            self._fetch(work, buffer)
        return work.file

    def _next(self, number: int, last: RemoteFile | None) -> Work | None:
        """Wait for work. None: all of it is done."""
        with self._guard:
            while True:
                if self._failure is not None:
                    raise TransferCancelledError
                # Workers above the limit rest.
                if number < self._pace.streams and (work := self._schedule.next(self._pace.streams, last)) is not None:
                    return work
                if self._schedule.is_finished:
                    return None
                self._guard.wait(1.0)

    def _begin(self, file: RemoteFile, buffer: memoryview) -> None:
        """Open a file, take over what is there of it, and fetch its first range; the rest is there for all workers."""
        self._check()
        if (entry := self._share(file, buffer)) is not None:
            self._finished(file, entry)
            return
        writing = self._create(file)
        fd = writing.fd
        progress = Progress.of(file, is_hashed=writing.hashes.is_needed)
        try:
            with naming_errors(self._destination, file.entry.path):
                if file.entry.size_bytes >= self._tuning.shortest_range_bytes:
                    self._destination.allocate(fd, file.entry.size_bytes)
                self._adopt(writing, progress, buffer)
        except BaseException:
            with suppress(OSError):
                os.close(fd)
            raise
        with self._guard:
            self._open[file.entry.path] = writing
            self._schedule.opened(progress)
            work = self._schedule.first(file, self._pace.streams)
            self._guard.notify_all()
        if work is not None:
            self._fetch(work, buffer)
        else:
            self._settle(file)

    def _create(self, file: RemoteFile) -> Writing:
        hashes = self._promises.hashes(file)
        return Writing(file, self._destination.create(file.entry.path), hashes)

    def _write_small_files(self, batch: Batch, buffer: memoryview) -> None:
        """
        Write small files, one after the other, and request some before it is their turn: neither side waits then.
        """
        opened: deque[OpenedRange | None] = deque([None])
        try:
            while batch.files:
                while (following := self._extend(batch)) is not None:
                    opened.append(self._ask_ahead(following))
                self._write_small(batch, opened[0], buffer)
                opened.popleft()
        finally:
            for ahead in opened:
                if ahead is not None:
                    ahead.__exit__(None, None, None)
        with self._guard:
            self._guard.notify_all()

    def _extend(self, batch: Batch) -> RemoteFile | None:
        if len(batch.files) >= batch.length:
            return None
        with self._guard:
            return None if self._failure is not None else self._schedule.extend(batch, self._pace.streams)

    def _ask_ahead(self, file: RemoteFile) -> OpenedRange | None:
        """If that fails, it will fail once more when it is its turn, and be told or tried again then."""
        if not file.entry.size_bytes or self._leave_alone_until > time.monotonic():
            return None
        try:
            return OpenedRange(self._backend.open_range(file, 0, file.entry.size_bytes))
        except StoreError:
            return None

    def _write_small(self, batch: Batch, opened: OpenedRange | None, buffer: memoryview) -> None:
        self._check()
        file = batch.files[0]
        writing, position, path, size = self._create(file), 0, file.entry.path, file.entry.size_bytes
        try:
            for piece in self._pieces(file, 0, size, buffer, opened, len(batch.files)):
                writing.hashes.update(piece)
                self._destination.write(writing.fd, piece, position)
                position += len(piece)
                self._observer.received(len(piece))
            self._received += position
            checked = self._promises.compare(writing.file, writing.fd, writing.hashes)
        except BaseException as error:
            with suppress(OSError):
                os.close(writing.fd)
            if isinstance(error, OSError) and not isinstance(error, StoreError) and error.errno is not None:
                raise self._destination.failure("writing", path, error) from error
            raise
        entry = self._finish(writing, checked)
        with self._guard:
            self._done[path] = entry
            self._schedule.advance(batch)
            if self._schedule.is_finished:
                self._guard.notify_all()

    def _asked(self, file: RemoteFile) -> str | None:
        """Ask the source for a digest, as patiently as for bytes."""
        tries = Tries(self._tuning)
        while True:
            self._wait_until_welcome()
            try:
                return self._evidence(file)
            except SourceUnavailableError as error:
                self._pause(error, tries)

    def _fetch(self, work: Range, buffer: memoryview) -> None:
        path = work.file.entry.path
        writing, position, crc = self._open[path], work.start, 0
        proves = not work.is_front and writing.hashes.sha256 is not None
        with naming_errors(self._destination, path):
            for piece in self._pieces(work.file, work.start, work.stop, buffer):
                if work.is_front:
                    writing.hashes.update(piece)
                elif proves:
                    crc = zlib.crc32(piece, crc)
                self._destination.write(writing.fd, piece, position)
                position += len(piece)
                self._received += len(piece)
                self._observer.received(len(piece))
            self._note(work, writing, crc if proves else None)
        with self._guard:
            self._schedule.written(work)
        self._settle(work.file)

    def _note(self, work: Range, writing: Writing, crc: int | None) -> None:
        """Make a range durable and note it, except for the last one of a file, which is finished at once."""
        with self._guard:
            if self._schedule.is_last(work):
                return
        os.fdatasync(writing.fd)
        path, token = work.file.entry.path, str(work.file.entry.token)
        if work.is_front and writing.hashes.sha256 is not None:
            self._destination.note(path, token, 0, work.stop, writing.hashes.so_far(), None)
        else:
            self._destination.note(path, token, work.start, work.stop, None, crc)

    def _settle(self, file: RemoteFile) -> None:
        """Hash what has become the front, and end a file that has all its bytes."""
        with self._guard:
            due = self._schedule.due(file)
            if due == "finish":
                writing = self._open.pop(file.entry.path)
            elif due is None:
                self._guard.notify_all()
        if due == "hash":
            self._chasers.add(file)
        elif due == "finish":
            self._end(writing)

    def _catch_up(self, file: RemoteFile, buffer: memoryview) -> None:
        """Hash what was written ahead of the front, as long as there is any."""
        writing = self._open[file.entry.path]
        while True:
            with self._guard:
                unhashed = self._schedule.next_unhashed(file)
            if unhashed is None:
                break
            with naming_errors(self._destination, file.entry.path):
                if not hash_range(writing.fd, *unhashed, buffer, writing.hashes.update, self._check):
                    raise OSError(errno.EIO, "a file is shorter than what was written to it")
            with self._guard:
                self._schedule.hashed(file, unhashed[1])
        self._settle(file)

    def _end(self, writing: Writing) -> None:
        try:
            checked = self._promises.compare(writing.file, writing.fd, writing.hashes)
        except BaseException as error:
            if writing.is_adopted and isinstance(error, DigestMismatchError):
                self._start_over(writing)
                return
            os.close(writing.fd)
            raise
        self._finished(writing.file, self._finish(writing, checked))

    def _finish(self, writing: Writing, checked: str | None) -> FileEntry:
        entry, sha256 = writing.file.entry, writing.hashes.so_far()
        is_large = entry.size_bytes >= self._tuning.shortest_range_bytes
        self._destination.finish(writing.fd, entry.path, is_large)
        self._destination.note(entry.path, str(entry.token), 0, entry.size_bytes, sha256, None)
        return entry.with_digests(sha256, checked)

    def _finished(self, file: RemoteFile, entry: FileEntry) -> None:
        with self._guard:
            self._done[entry.path] = entry
            self._schedule.finished(file)
            if self._schedule.is_finished:
                self._guard.notify_all()

    def _start_over(self, writing: Writing) -> None:
        """What a dead writer left was as it had noted, and still not what the source has: all of it is fetched."""
        writing.hashes, writing.is_adopted = writing.hashes.anew(), False
        with self._guard:
            self._open[writing.file.entry.path] = writing
            self._schedule.opened(Progress.of(writing.file, is_hashed=writing.hashes.is_needed))
            self._guard.notify_all()

    def _pieces(
        self,
        file: RemoteFile,
        start: int,
        stop: int,
        buffer: memoryview,
        asked: OpenedRange | None = None,
        streams: int = 1,
    ) -> Iterator[memoryview]:
        """
        Yield the bytes of a range in order; after a failure go on where the last byte was.

        `asked` is the range if it was asked for before, `streams` is how many wait when this one does.
        """
        tries = Tries(self._tuning)
        while start < stop:
            self._wait_until_welcome()
            began, opened = start, time.monotonic()
            try:
                opened_range, asked = asked or self._backend.open_range(file, start, stop), None
                with opened_range as reader:
                    while start < stop:
                        self._check()
                        asking, worked = time.monotonic(), getattr(reader, "worked", 0.0)
                        count = reader.readinto(buffer[: min(len(buffer), stop - start)])
                        now = time.monotonic()
                        # Decrypting is no waiting: more streams would only take turns with it.
                        self._waited += (now - asking - getattr(reader, "worked", 0.0) + worked) * streams
                        if count == 0:
                            raise SourceUnavailableError(
                                self._uri, f"its answer for `{file.entry.path}` ended {stop - start} bytes early"
                            )
                        if count is not None:
                            start += count
                            yield buffer[:count]
                        if now - opened > self._stall_seconds:
                            if start - began < self._tuning.trickle_bytes and start < stop:
                                self._pace.congested(now, 0.0)
                                text = f"it sent {start - began} bytes of `{file.entry.path}` in {now - opened:.3g} s"
                                raise SourceUnavailableError(self._uri, text)
                            began, opened = start, now
                            tries = Tries(self._tuning)
            except SourceUnavailableError as error:
                if start - began >= self._tuning.trickle_bytes:
                    tries = Tries(self._tuning)  # Bytes arrived: the source is well, start counting anew.
                self._pause(error, tries)

    def _pause(self, error: SourceUnavailableError, tries: Tries) -> None:
        delay = None if error.is_final else tries.next_delay(error.retry_after)
        if delay is None:
            raise error
        if error.retry_after is not None:
            self._pace.congested(time.monotonic(), delay)
        if error.retry_after:
            # The source asked for it, so it is not only this stream that leaves it alone.
            self._leave_alone_until = max(self._leave_alone_until, time.monotonic() + error.retry_after)
        self._observer.retried(str(error), delay)
        self._sleep(delay)

    def _wait_until_welcome(self) -> None:
        while (seconds := self._leave_alone_until - time.monotonic()) > 0:
            self._sleep(seconds)

    def _sleep(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self._check()
            with self._guard:
                self._guard.wait_for(lambda: self._failure is not None, min(left, 0.5))

    def _share(self, file: RemoteFile, buffer: memoryview) -> FileEntry | None:
        """Give a whole file of somebody else, if it proves itself, a second name instead of fetching it."""
        if self._digest == "none":
            return None
        for donor, note in self._offers(file):
            if note.sha256 is None or (note.start, note.stop) != (0, file.entry.size_bytes):
                continue
            if file.entry.sha256 not in (None, note.sha256):
                continue
            try:
                with donor.open_file() as fd:
                    is_whole = os.fstat(fd).st_size == note.stop
                    digest = hashlib.sha256()
                    if (
                        not is_whole
                        or not hash_range(fd, 0, note.stop, buffer, digest.update, self._check)
                        or digest.hexdigest() != note.sha256
                    ):
                        continue
                if not donor.link(file.entry.path):
                    continue
            except (OSError, ValueError):
                continue  # Collected, lost, replaced or not for us to read: its bytes are fetched.
            self._observer.adopted(note.stop)
            self._destination.note(note.path, note.token, 0, note.stop, note.sha256, None)
            return file.entry.with_digests(note.sha256, None)
        return None

    def _offers(self, file: RemoteFile) -> Iterator[tuple[Donor, PartNote]]:
        # Without a token nothing says that the source still means the same bytes.
        for donor in self._donors.get(file.entry.path, ()) if file.entry.token else ():
            for note in donor.notes:
                if note.token == file.entry.token and note.stop <= file.entry.size_bytes:
                    yield donor, note

    def _adopt(self, writing: Writing, progress: Progress, buffer: memoryview) -> None:
        """Copy what others have of a file, as far as it proves itself; the gaps are left to be fetched."""
        offers = list(self._offers(writing.file))
        # Beginnings first, each from where the one before ended; then what lies further on.
        for donor, note in sorted(offers, key=lambda offer: (offer[1].sha256 is None, offer[1].start, offer[1].stop)):
            is_front = note.sha256 is not None and writing.hashes.sha256 is not None
            start = progress.hashed if is_front else note.start
            is_proven = is_front or note.crc32 is not None or self._digest == "none"
            if not is_proven or note.stop <= start or not progress.lacks(start, note.stop):
                continue
            try:
                with donor.open_file() as source:
                    if not self._take_over(writing, source, note, start, buffer, is_front=is_front):
                        continue
            except (OSError, ValueError):
                continue
            writing.is_adopted = True
            progress.add(start, note.stop, is_front=is_front)
            self._observer.adopted(note.stop - start)

    def _take_over(
        self, writing: Writing, source: int, note: PartNote, start: int, buffer: memoryview, *, is_front: bool
    ) -> bool:
        """Copy what a note speaks of and check the copy. False: it does not prove itself."""
        if not self._destination.copy(source, writing.fd, start, note.stop):
            return False
        if is_front:
            hashes = writing.hashes.copy()
            if (
                not hash_range(writing.fd, start, note.stop, buffer, hashes.update, self._check)
                or hashes.so_far() != note.sha256
            ):
                return False
            writing.hashes = hashes
        elif note.crc32 is not None:
            crc = CRC32()
            if not hash_range(writing.fd, start, note.stop, buffer, crc.update, self._check) or crc.value != note.crc32:
                return False
        return True

    def _check(self) -> None:
        if self._failure is not None:
            raise TransferCancelledError
        self._observer.check()
