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
import heapq
import os
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import PurePosixPath

from kserve_pvc._download.adoption import Donor
from kserve_pvc._download.budget import BUFFER_BYTES, Budget, process_budget
from kserve_pvc._download.destination import Destination, Observer, TransferCancelledError, naming_errors
from kserve_pvc._download.hashes import CRC32, Hashes
from kserve_pvc._download.pieces import OpenedRange, Tries
from kserve_pvc._download.schedule import Span, Writing, at_once, gap_bytes, is_free, without
from kserve_pvc._download.streams import StreamLimit
from kserve_pvc._download.tuning import MIB, Tuning
from kserve_pvc._format.records import FileEntry, PartNote
from kserve_pvc._source.contract import Backend, Checksum, RemoteFile, SupportsChecksums, SupportsEvidence
from kserve_pvc._volume.buffers import make_buffer
from kserve_pvc.errors import DigestMismatchError, SourceUnavailableError, StoreError


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
        self._make_checksum: Callable[[str], Checksum | None] = (
            backend.checksum if isinstance(backend, SupportsChecksums) else lambda name: None
        )
        self._pace = StreamLimit(tuning.max_workers)
        self._guard = threading.Condition()
        self._waiting: list[tuple[int, int, RemoteFile]] = []  # A heap: the largest file first.
        self._number = 0
        self._open: list[Writing] = []
        self._unassigned = 0
        self._asking = 0  # Ranges that are being fetched or were asked for.
        self._at_small_files = 0  # Workers that are.
        self._left = 0  # Files that are not done.
        self._is_listed = False
        self._failure: BaseException | None = None
        self._done: dict[PurePosixPath, FileEntry] = {}
        # For the pace only, so an addition that is lost between threads does not matter.
        self._received, self._waited = 0, 0.0
        self._leave_alone_until = 0.0
        self._chasers: list[threading.Thread] = []
        self._to_chase: deque[Writing] = deque()
        self._chasing = 0

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
                self._is_listed = True
                self._guard.notify_all()
            while True:
                seconds = self._pace.look(time.monotonic(), self._received, self._waited)
                self._staff(workers)
                if self._wait(seconds):
                    break
        except BaseException as error:  # A KeyboardInterrupt too: no worker outlives this call.
            self._fail(error)
        for thread in (*workers, *self._chasers):  # Only workers start chasers, so these are all.
            thread.join()
        if self._failure is not None:
            for writing in self._open:
                with suppress(OSError):
                    os.close(writing.fd)
            raise self._failure
        return self._done

    def _wait(self, seconds: float) -> bool:
        with self._guard:
            return self._guard.wait_for(lambda: self._failure is not None or not self._left, seconds)

    def _add(self, page: Sequence[RemoteFile]) -> None:
        with self._guard:
            for file in page:
                self._number += 1
                heapq.heappush(self._waiting, (-file.entry.size_bytes, self._number, file))
                self._unassigned += file.entry.size_bytes
            self._left += len(page)
            self._guard.notify_all()

    def _staff(self, workers: list[threading.Thread]) -> None:
        """Start as many workers as there may be streams and as there is work for; those above the pace rest."""
        with self._guard:
            wanted = min(
                self._pace.streams,
                len(self._waiting) + self._unassigned // min(self._part_bytes, self._tuning.shortest_range_bytes) + 1,
            )
            self._guard.notify_all()
        while len(workers) < wanted:
            worker = threading.Thread(
                target=self._work, args=(len(workers),), name=f"kserve-pvc-transfer-{len(workers)}", daemon=True
            )
            workers.append(worker)
            worker.start()

    def _fail(self, error: BaseException) -> None:
        with self._guard:
            # Whoever stopped because of another's failure may be done before it.
            if self._failure is None and not isinstance(error, TransferCancelledError):
                self._failure = error
            self._guard.notify_all()

    def _work(self, number: int) -> None:
        try:
            with self._budget.buffer(self._check) as buffer:
                last: Writing | None = None
                while (work := self._next(number, last)) is not None:
                    if isinstance(work, Span):
                        self._fetch(work, buffer)
                        last = work.of
                    elif self._is_small(work):
                        self._write_small_files(work, buffer)
                        last = None
                    else:
                        last = self._begin(work, buffer)
                    with self._guard:
                        self._asking -= 1
        except BaseException as error:
            self._fail(error)

    def _next(self, number: int, last: Writing | None) -> RemoteFile | Span | None:
        """What a worker does now: the front of a file before a new file before a range further on."""
        with self._guard:
            while True:
                if self._failure is not None:
                    raise TransferCancelledError
                if number < self._pace.streams and self._asking < self._pace.streams:
                    work = self._choose(last)
                    if work is not None:
                        self._asking += 1
                        return work
                if self._is_listed and not self._left:
                    return None
                self._guard.wait(1.0)

    def _choose(self, last: Writing | None) -> RemoteFile | Span | None:
        if last is not None and last.gaps and self._is_front(last):
            return self._take(last)
        front = next((w for w in self._open if w.gaps and self._is_front(w)), None)
        if front is not None:
            return self._take(front)
        # Who writes small files asks for some at a time, so fewer are enough.
        if self._waiting and (
            not self._is_small(self._waiting[0][2])
            or self._at_small_files * at_once(self._waiting[0][2], self._tuning) < self._pace.streams
        ):
            file = self._take_file()
            self._at_small_files += self._is_small(file)
            return file
        longest = max((w for w in self._open if w.gaps), key=gap_bytes, default=None)
        return None if longest is None else self._take(longest)

    def _take_file(self) -> RemoteFile:
        size, _, file = heapq.heappop(self._waiting)
        self._unassigned += size
        return file

    def _is_small(self, file: RemoteFile) -> bool:
        """Whether one worker fetches all of it with one request: nobody else needs to know of it before it is done."""
        is_short = (
            file.entry.size_bytes <= min(self._tuning.shortest_range_bytes, self._part_bytes)
            and file.entry.path not in self._donors
        )
        return is_short or not file.in_ranges

    def _is_front(self, writing: Writing) -> bool:
        return not writing.is_hashing and writing.gaps[0][0] == writing.hashed and writing.hashes.is_needed

    def _take(self, writing: Writing) -> Span:
        is_front = self._is_front(writing)
        start, end = writing.gaps[0]
        # As long as there is much to do, ranges are long; near the end each stream's share of what is left.
        share = self._unassigned // (2 * max(1, self._pace.streams))
        length = min(self._part_bytes, max(self._tuning.shortest_range_bytes, -(-share // MIB) * MIB))
        stop = min(end, (start // length + 1) * length)
        if stop < end:
            writing.gaps[0] = (stop, end)
        else:
            del writing.gaps[0]
        writing.is_hashing = writing.is_hashing or is_front
        self._unassigned -= stop - start
        return Span(writing, start, stop, is_front)

    def _begin(self, file: RemoteFile, buffer: memoryview) -> Writing | None:
        """Open a file, take over what others have of it, and fetch its first range; the rest is there for all workers."""
        self._check()
        size = file.entry.size_bytes
        if (entry := self._share(file, buffer)) is not None:
            self._finished(file, entry)
            return None
        writing = self._create(file)
        fd = writing.fd
        try:
            with naming_errors(self._destination, file.entry.path):
                if size >= self._tuning.shortest_range_bytes:
                    self._destination.allocate(fd, size)
                self._adopt(writing, buffer)
        except BaseException:
            with suppress(OSError):
                os.close(fd)
            raise
        with self._guard:
            self._open.append(writing)
            self._unassigned += gap_bytes(writing)
            span = self._take(writing) if writing.gaps else None
            if writing.gaps:
                self._guard.notify_all()
        if span is not None:
            self._fetch(span, buffer)
        else:
            self._settle(writing)
        return writing

    def _create(self, file: RemoteFile) -> Writing:
        size, promised = file.entry.size_bytes, file.digest
        if file.entry.sha256:
            promised = f"sha256:{file.entry.sha256}"
        elif size > self._tuning.evidence_bytes:
            promised = self._asked(file)
        hashes = Hashes(self._digest, promised, self._make_checksum)
        return Writing(file, self._destination.create(file.entry.path), hashes, [(0, size)] if size else [], size)

    def _write_small_files(self, file: RemoteFile, buffer: memoryview) -> None:
        """
        Write small files, one after the other, and ask for some before it is their turn: neither side waits then.
        """
        asked: deque[tuple[RemoteFile, OpenedRange | None]] = deque([(file, None)])
        try:
            while asked:
                while len(asked) < at_once(asked[0][0], self._tuning) and (following := self._next_small()) is not None:
                    asked.append((following, self._ask_ahead(following)))
                self._write_small(*asked[0], buffer, len(asked))
                asked.popleft()
                if asked:
                    with self._guard:
                        self._asking -= 1
        finally:
            for _, ahead in asked:
                if ahead is not None:
                    ahead.__exit__(None, None, None)
        with self._guard:
            self._at_small_files -= 1
            if self._waiting:
                self._guard.notify_all()

    def _next_small(self) -> RemoteFile | None:
        with self._guard:
            if self._failure is not None or not self._waiting or not self._is_small(self._waiting[0][2]):
                return None
            # What else there is to do comes first, and nobody asks for more than the pace allows.
            if self._asking >= self._pace.streams or any(w.gaps for w in self._open):
                return None
            self._asking += 1
            return self._take_file()

    def _ask_ahead(self, file: RemoteFile) -> OpenedRange | None:
        """If that fails, it will fail once more when it is its turn, and be told or tried again then."""
        if not file.entry.size_bytes or self._leave_alone_until > time.monotonic():
            return None
        try:
            return OpenedRange(self._backend.open_range(file, 0, file.entry.size_bytes))
        except StoreError:
            return None

    def _write_small(self, file: RemoteFile, asked: OpenedRange | None, buffer: memoryview, streams: int) -> None:
        self._check()
        writing, position, path = self._create(file), 0, file.entry.path
        try:
            for piece in self._pieces(file, 0, writing.unwritten, buffer, asked, streams):
                writing.hashes.update(piece)
                self._destination.write(writing.fd, piece, position)
                position += len(piece)
                self._observer.received(len(piece))
            self._received += position
        except BaseException as error:
            with suppress(OSError):
                os.close(writing.fd)
            if isinstance(error, OSError) and not isinstance(error, StoreError) and error.errno is not None:
                raise self._destination.failure("writing", path, error) from error
            raise
        self._end(writing)

    def _asked(self, file: RemoteFile) -> str | None:
        """Ask the source for a digest, as patiently as for bytes."""
        tries = Tries(self._tuning)
        while True:
            self._wait_until_welcome()
            try:
                return self._evidence(file)
            except SourceUnavailableError as error:
                self._pause(error, tries)

    def _fetch(self, span: Span, buffer: memoryview) -> None:
        writing, position, crc = span.of, span.start, 0
        proves = not span.is_front and writing.hashes.sha256 is not None
        path = writing.file.entry.path
        with naming_errors(self._destination, path):
            for piece in self._pieces(writing.file, span.start, span.stop, buffer):
                if span.is_front:
                    writing.hashes.update(piece)
                elif proves:
                    crc = zlib.crc32(piece, crc)
                self._destination.write(writing.fd, piece, position)
                position += len(piece)
                self._received += len(piece)
                self._observer.received(len(piece))
            is_last = writing.unwritten == span.stop - span.start
            if not is_last:
                os.fdatasync(writing.fd)
                token = str(writing.file.entry.token)
                if span.is_front and writing.hashes.sha256 is not None:
                    self._destination.note(path, token, 0, span.stop, writing.hashes.so_far(), None)
                else:
                    self._destination.note(path, token, span.start, span.stop, None, crc if proves else None)
        with self._guard:
            writing.unwritten -= span.stop - span.start
            if span.is_front:
                writing.hashed, writing.is_hashing = span.stop, False
            elif writing.hashes.is_needed:
                writing.ready[span.start] = span.stop
        self._settle(writing)

    def _settle(self, writing: Writing) -> None:
        """Hash what has become the front, and end a file that has all its bytes."""
        with self._guard:
            is_chased = not writing.is_hashing and writing.hashed in writing.ready
            is_over = writing.is_over and writing in self._open
            if is_chased:
                writing.is_hashing = True
                self._to_chase.append(writing)
                # One for each processor: more would only take turns.
                is_new = self._chasing < (os.cpu_count() or 1)
                self._chasing += is_new
            elif is_over:
                self._open.remove(writing)
            elif writing.gaps:
                self._guard.notify_all()
        if is_chased and is_new:
            chaser = threading.Thread(target=self._chase, name=f"kserve-pvc-hash-{len(self._chasers)}", daemon=True)
            self._chasers.append(chaser)
            chaser.start()
        elif is_over:
            self._end(writing)

    def _chase(self) -> None:
        """Hash what was written ahead of the front, from the page cache, as long as there is any."""
        buffer = make_buffer(BUFFER_BYTES // 2)
        try:
            while True:
                with self._guard:
                    if not self._to_chase:
                        self._chasing -= 1
                        return
                    writing = self._to_chase.popleft()
                self._catch_up(writing, buffer)
                self._settle(writing)
        except BaseException as error:
            self._fail(error)

    def _catch_up(self, writing: Writing, buffer: memoryview) -> None:
        while True:
            with self._guard:
                stop = writing.ready.pop(writing.hashed, None)
                if stop is None:
                    writing.is_hashing = False
                    return
            with naming_errors(self._destination, writing.file.entry.path):
                if not self._read(writing.fd, writing.hashed, stop, buffer, writing.hashes.update):
                    raise OSError(errno.EIO, "a file is shorter than what was written to it")
            writing.hashed = stop

    def _end(self, writing: Writing) -> None:
        file, size = writing.file, writing.file.entry.size_bytes
        try:
            checked = self._compare(writing)
        except DigestMismatchError:
            if writing.is_adopted:
                self._start_over(writing)
                return
            os.close(writing.fd)
            raise
        except BaseException:
            os.close(writing.fd)
            raise
        self._destination.finish(writing.fd, file.entry.path, size >= self._tuning.shortest_range_bytes)
        sha256 = writing.hashes.so_far()
        self._destination.note(file.entry.path, str(file.entry.token), 0, size, sha256, None)
        self._finished(file, file.entry.with_digests(sha256, checked))

    def _start_over(self, writing: Writing) -> None:
        """What a dead writer left was as it had noted, and still not what the source has: all of it is fetched."""
        size = writing.file.entry.size_bytes
        writing.hashes, writing.is_adopted = writing.hashes.anew(), False
        writing.gaps, writing.unwritten, writing.hashed = [(0, size)], size, 0
        with self._guard:
            self._open.append(writing)
            self._unassigned += size
            self._guard.notify_all()

    def _finished(self, file: RemoteFile, entry: FileEntry) -> None:
        with self._guard:
            self._done[file.entry.path] = entry
            self._left -= 1
            if not self._left:
                self._guard.notify_all()

    def _compare(self, writing: Writing) -> str | None:
        compared = writing.hashes.compare()
        if compared is None:
            return None
        promised, found = compared
        file = writing.file
        if promised != found and promised == file.digest and not file.entry.sha256:
            # What looks like an MD5 in a listing is none where the server encrypts: then the source has another word.
            better = self._asked(file)
            if better is None:
                return None
            hashes = Hashes("sha256", better, self._make_checksum)
            self._read(writing.fd, 0, file.entry.size_bytes, make_buffer(BUFFER_BYTES), hashes.update)
            promised, found = hashes.compare() or (better, "nothing that can be compared with it")
        if promised != found:
            raise DigestMismatchError(str(file.entry.path), promised, found)
        return promised

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
                        or not self._read(fd, 0, note.stop, buffer, digest.update)
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

    def _adopt(self, writing: Writing, buffer: memoryview) -> None:
        """Copy what others have of a file, as far as it proves itself; the gaps are left to be fetched."""
        offers = list(self._offers(writing.file))
        # Beginnings first, each from where the one before ended; then what lies further on.
        for donor, note in sorted(offers, key=lambda offer: (offer[1].sha256 is None, offer[1].start, offer[1].stop)):
            is_front = note.sha256 is not None and writing.hashes.sha256 is not None
            start = writing.hashed if is_front else note.start
            is_proven = is_front or note.crc32 is not None or self._digest == "none"
            if not is_proven or note.stop <= start or not is_free(writing.gaps, start, note.stop):
                continue
            try:
                with donor.open_file() as source:
                    if not self._take_over(writing, source, note, start, buffer, is_front=is_front):
                        continue
            except (OSError, ValueError):
                continue
            writing.is_adopted = True
            writing.gaps = without(writing.gaps, start, note.stop)
            writing.unwritten -= note.stop - start
            self._observer.adopted(note.stop - start)

    def _take_over(
        self, writing: Writing, source: int, note: PartNote, start: int, buffer: memoryview, *, is_front: bool
    ) -> bool:
        """Copy what a note speaks of and check the copy. False: it does not prove itself."""
        if not self._destination.copy(source, writing.fd, start, note.stop):
            return False
        if is_front:
            hashes = writing.hashes.copy()
            if not self._read(writing.fd, start, note.stop, buffer, hashes.update) or hashes.so_far() != note.sha256:
                return False
            writing.hashes, writing.hashed = hashes, note.stop
            return True
        if note.crc32 is not None:
            crc = CRC32()
            if not self._read(writing.fd, start, note.stop, buffer, crc.update) or crc.value != note.crc32:
                return False
        if writing.hashes.is_needed:
            writing.ready[start] = note.stop
        return True

    def _read(self, fd: int, start: int, stop: int, buffer: memoryview, update: Callable[[memoryview], None]) -> bool:
        """Feed a range of a file to a digest. False: the file ends before it."""
        while start < stop:
            self._check()
            count = os.preadv(fd, [buffer[: min(len(buffer), stop - start)]], start)
            if count == 0:
                return False
            update(buffer[:count])
            start += count
        return True

    def _check(self) -> None:
        if self._failure is not None:
            raise TransferCancelledError
        self._observer.check()
