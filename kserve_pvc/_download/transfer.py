"""
Bytes from a pinned source into a generation of our own: written once, hashed in order, in bounded memory.

Ranges of all files are in flight together, each received into a small buffer that is reused. The worker at the front of
a file (the first byte that is not hashed yet) hashes what it receives; a range further on gets a CRC-32, is written to
its place, and is hashed from the page cache once the front has reached it. After every range the bytes are made durable
and noted in the journal with a digest. A process that finds the journal of a dead writer takes those bytes over, checks
them while doing so, and fetches the rest. Files of a dead writer are never written to.

Here are the threads. What they do next is decided in `schedule`.
"""

from __future__ import annotations

import errno
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath

from kserve_pvc._download.adoption import Adoption, Donor
from kserve_pvc._download.budget import Budget, process_budget
from kserve_pvc._download.destination import Destination, Observer, TransferCancelledError, Writing, naming_errors
from kserve_pvc._download.hashes import Chasers, Promises, hash_range
from kserve_pvc._download.pieces import OpenedRange, PatientReader
from kserve_pvc._download.schedule import Batch, Begin, Progress, Range, Schedule, Work
from kserve_pvc._download.streams import StreamLimit
from kserve_pvc._download.tuning import Tuning
from kserve_pvc._format.records import FileEntry
from kserve_pvc._source.contract import Backend, RemoteFile
from kserve_pvc._threads import start_thread
from kserve_pvc.errors import DigestMismatchError, StoreError, VolumeError


class Transfer:
    """
    One attempt to write all files of a model.

    Memory is bounded by one buffer of 1 MiB per stream and what the backend holds per open range.
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
        self._destination = destination
        self._observer = observer
        self._large_bytes = tuning.shortest_range_bytes
        self._budget = process_budget() if budget is None else budget
        self._failure: BaseException | None = None
        self._failed = threading.Event()
        self._guard = threading.Condition()  # Of the schedule and of the files that are open or done.
        self._schedule = Schedule(tuning)
        self._open: dict[PurePosixPath, Writing] = {}
        self._done: dict[PurePosixPath, FileEntry] = {}
        self._limit = StreamLimit(tuning.max_workers)
        self.reader = PatientReader(
            backend,
            uri,
            tuning,
            limit=self._limit,
            check=self._check,
            wait=self._failed.wait,
            retried=observer.retried,
        )
        self._schedule.sequential = self.reader.whole
        self._promises = Promises(backend, tuning, request=self.reader.evidence, check=self._check)
        self._adoption = Adoption(donors, destination, observer, self._promises, check=self._check)
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
            self._run(pages, workers)
        except BaseException as error:  # A KeyboardInterrupt too: no worker outlives this call.
            self._fail(error)
        for thread in workers:
            thread.join()
        self._chasers.join()
        if self._failure is not None:
            self.keep()
            for writing in self._open.values():
                writing.abandon()
            raise self._failure
        return self._done

    def keep(self) -> None:
        """
        Note what is written of the unfinished files, and give back the room that was reserved for the rest of them.
        """
        with self._guard:
            unfinished = list(self._open.values())  # Some worker may still wait for its source.
        for writing in unfinished:
            writing.keep()

    def _run(self, pages: Iterable[Sequence[RemoteFile]], workers: list[threading.Thread]) -> None:
        for page in pages:
            self._check()  # A listing may take long: a failure ends it.
            with self._guard:
                self._schedule.add(page, (file.entry.path for file in page if self._adoption.has_offers(file)))
            self._staff(workers)
        with self._guard:
            self._schedule.end_listing()
        is_over = False
        while not is_over:
            seconds = self._limit.look(time.monotonic(), self.reader.received, self.reader.waited)
            self._staff(workers)
            with self._guard:
                is_over = self._guard.wait_for(lambda: self._failed.is_set() or self._schedule.is_finished, seconds)

    def _staff(self, workers: list[threading.Thread]) -> None:
        """Start as many workers as there may be streams and as there is work for; those above the limit rest."""
        with self._guard:
            wanted = self._schedule.workers(self._limit.streams)
            self._guard.notify_all()
        while (number := len(workers)) < wanted:
            name = f"kserve-pvc-transfer-{number}"
            try:
                workers.append(start_thread(self._work, name, number))
            except VolumeError:
                if not workers:
                    raise
                return  # Those that run do the work too, and it is tried again at the next look.

    def _fail(self, error: BaseException) -> None:
        with self._guard:
            # A worker that stopped because of another's failure may be done before it.
            if self._failure is None and not isinstance(error, TransferCancelledError):
                self._failure = error
                self._failed.set()
            self._guard.notify_all()

    def _check(self) -> None:
        if self._failure is not None:
            raise TransferCancelledError
        self._observer.check()

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

    def _next(self, number: int, last: RemoteFile | None) -> Work | None:
        """Wait for work. None: all of it is done."""
        with self._guard:
            while True:
                if self._failure is not None:
                    raise TransferCancelledError
                streams = self._limit.streams
                if number < streams and (work := self._schedule.next(streams, last)) is not None:
                    return work
                if self._schedule.is_finished:
                    return None
                self._guard.wait(1.0)

    def _do(self, work: Work, buffer: memoryview) -> RemoteFile | None:
        """Do what was handed out, and return the file to continue, if any."""
        if isinstance(work, Range):
            self._fetch(work, buffer)
            return work.file
        if isinstance(work, Begin):
            self._begin(work.file, buffer)
            return work.file
        self._write_small_files(work, buffer)
        return None

    def _begin(self, file: RemoteFile, buffer: memoryview) -> None:
        """Open a file, take over what is there of it, and fetch its first range; the rest is there for all workers."""
        self._check()
        if (entry := self._adoption.share(file, buffer)) is not None:
            self._finished(file, entry)
            return
        writing = self._create(file)
        progress = Progress.of(file, is_hashed=writing.hashes.is_needed)
        with naming_errors(self._destination, file.entry.path):
            if file.entry.size_bytes >= self._large_bytes:
                self._destination.allocate(writing.fd, file.entry.size_bytes)
            self._adoption.adopt(writing, progress, buffer)
        with self._guard:
            self._schedule.opened(progress)
            work = self._schedule.first(file, self._limit.streams)
            self._guard.notify_all()
        if work is None:
            self._follow(file)
        else:
            self._fetch(work, buffer)

    def _create(self, file: RemoteFile) -> Writing:
        hashes = self._promises.hashes(file)
        writing = Writing(self._destination, file, self._destination.create(file.entry.path), hashes)
        with self._guard:
            self._open[file.entry.path] = writing
        return writing

    def _fetch(self, work: Range, buffer: memoryview) -> None:
        writing = self._open[work.file.entry.path]
        with naming_errors(self._destination, work.file.entry.path):
            pieces = self.reader.pieces(work.file, work.start, work.stop, buffer)
            crc = writing.receive(pieces, work.start, is_front=work.is_front, received=self._observer.received)
            with self._guard:
                is_last = self._schedule.is_last(work)
            if not is_last:  # The last range of a file is noted when the file is finished.
                writing.note(work.start, work.stop, crc, is_front=work.is_front)
        with self._guard:
            self._schedule.written(work)
        self._follow(work.file)

    def _follow(self, file: RemoteFile) -> None:
        """Hash what has become the front, and end a file that has all its bytes."""
        with self._guard:
            due = self._schedule.due(file)
            if due == "finish":
                writing = self._open[file.entry.path]
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
                if not hash_range(writing.fd, *unhashed, buffer, writing.hash, self._check):
                    raise OSError(errno.EIO, "a file is shorter than what was written to it")
            with self._guard:
                self._schedule.hashed(file, unhashed[1])
        self._follow(file)

    def _end(self, writing: Writing) -> None:
        try:
            promised = self._promises.compare(writing.file, writing.fd, writing.hashes)
        except BaseException as error:
            if writing.is_adopted and isinstance(error, DigestMismatchError):
                self._start_over(writing)
                return
            if isinstance(error, DigestMismatchError):
                writing.discard()
            raise
        self._finished(writing.file, self._finish(writing, promised))

    def _finish(self, writing: Writing, promised: str | None) -> FileEntry:
        self._check()  # What is given up is trimmed, and may have lost bytes that were just written.
        return writing.finish(promised, is_durable=writing.file.entry.size_bytes >= self._large_bytes)

    def _start_over(self, writing: Writing) -> None:
        """What a dead writer left was as it had noted, and still not what the source has: all of it is fetched."""
        with writing.guard:
            writing.hashes, writing.is_adopted = writing.hashes.anew(), False
            writing.ahead.clear()
        with self._guard:
            self._schedule.opened(Progress.of(writing.file, is_hashed=writing.hashes.is_needed))
            self._guard.notify_all()

    def _finished(self, file: RemoteFile, entry: FileEntry) -> None:
        with self._guard:
            self._open.pop(entry.path, None)  # A file that got a second name was not opened.
            self._done[entry.path] = entry
            self._schedule.finished(file)
            if self._schedule.is_finished:
                self._guard.notify_all()

    def _write_small_files(self, batch: Batch, buffer: memoryview) -> None:
        """
        Write small files, one after the other, and request some before it is their turn: neither side waits then.
        """
        opened: deque[OpenedRange | None] = deque([None])
        try:
            while batch.files:
                while (following := self._extend(batch)) is not None:
                    opened.append(self.reader.open_ahead(following))
                self._write_small(batch, opened[0], buffer)
                opened.popleft()
        finally:
            for ahead in opened:
                if ahead is not None:
                    ahead.__exit__(None, None, None)
        with self._guard:
            self._guard.notify_all()

    def _extend(self, batch: Batch) -> RemoteFile | None:
        if len(batch.files) >= batch.length or self._failure is not None:
            return None
        with self._guard:
            return self._schedule.extend(batch, self._limit.streams)

    def _write_small(self, batch: Batch, opened: OpenedRange | None, buffer: memoryview) -> None:
        self._check()
        file = batch.files[0]
        writing = self._create(file)
        try:
            pieces = self.reader.pieces(file, 0, file.entry.size_bytes, buffer, opened, len(batch.files))
            writing.receive(pieces, 0, is_front=True, received=self._observer.received)
            promised = self._promises.compare(file, writing.fd, writing.hashes)
            entry = self._finish(writing, promised)
        except BaseException as error:
            if isinstance(error, DigestMismatchError):
                writing.discard()
            if isinstance(error, OSError) and not isinstance(error, StoreError) and error.errno is not None:
                raise self._destination.failure("writing", file.entry.path, error) from error
            raise
        with self._guard:
            del self._open[entry.path]
            self._done[entry.path] = entry
            self._schedule.advance(batch)
            if self._schedule.is_finished:
                self._guard.notify_all()
