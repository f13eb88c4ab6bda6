"""
Bytes from a pinned source into a generation of our own: hashed once, written once, in bounded memory.

Each worker owns one file at a time and one small buffer. A file is written in order, so its SHA-256 is known when the
last byte is; after every part the bytes are made durable and noted in the journal, with the digest of all bytes so
far. Whoever finds the journal of a dead writer copies those bytes, checks that digest while copying, and fetches the
rest. Nothing of a dead writer is ever written to.
"""

from __future__ import annotations

import hashlib
import os
import queue
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import PurePosixPath
from typing import Protocol

import attrs

from kserve_pvc._record import FileEntry, PartNote
from kserve_pvc._retry import delays
from kserve_pvc._source import Backend, RemoteFile
from kserve_pvc.errors import DigestMismatchError, SourceUnavailableError

PART_BYTES = 64 * 1024 * 1024
MAX_WORKERS = 4
_BUFFER_BYTES = 1024 * 1024


@attrs.frozen(kw_only=True)
class Donor:
    """
    What a dead writer left of one file: notes in rising order of `stop`, and how to open what it wrote.
    """

    notes: tuple[PartNote, ...]
    open_file: Callable[[], AbstractContextManager[int]]


@attrs.frozen(kw_only=True)
class Destination:
    """
    Where a generation is written.

    `create` opens a new file, `write` puts bytes at an offset, `finish` makes the file durable, immutable and closed,
    `note` appends to the journal, `failure` says what an error of the volume means.
    """

    create: Callable[[PurePosixPath], int]
    write: Callable[[int, memoryview, int], None]
    finish: Callable[[int, PurePosixPath], None]
    note: Callable[[PartNote], None]
    failure: Callable[[str, PurePosixPath, OSError], Exception]


class Observer(Protocol):
    """
    Hears of every byte, and ends the transfer by raising from `check`.
    """

    def check(self) -> None: ...

    def adopted(self, size_bytes: int) -> None: ...

    def received(self, size_bytes: int) -> None: ...

    def retried(self, reason: str, delay: float) -> None: ...


class _CancelledError(Exception):
    """Another worker failed first."""


@attrs.frozen(kw_only=True)
class Transfer:
    """
    One attempt to write all files of a model.
    """

    backend: Backend
    destination: Destination
    donors: Mapping[PurePosixPath, Sequence[Donor]]
    observer: Observer
    part_bytes: int = PART_BYTES
    max_workers: int = MAX_WORKERS
    _cancelled: threading.Event = attrs.field(factory=threading.Event, init=False)
    _buffers: queue.SimpleQueue[memoryview] = attrs.field(factory=queue.SimpleQueue, init=False)

    def run(self, files: Sequence[RemoteFile]) -> tuple[FileEntry, ...]:
        """
        Write every file, the largest first, and return what was written, in the order given.

        Memory is bounded by `max_workers` buffers of 1 MiB and what the back end holds per open range.

        Raises:
            StoreError: The first failure; all other workers have stopped when it is raised.
        """
        workers = max(1, min(self.max_workers, len(files)))
        for _ in range(workers):
            self._buffers.put(memoryview(bytearray(_BUFFER_BYTES)))
        largest_first = sorted(files, key=lambda f: -f.entry.size_bytes)
        with ThreadPoolExecutor(workers, thread_name_prefix="kserve-pvc-transfer") as pool:
            futures = {f.entry.path: pool.submit(self._one, f) for f in largest_first}
            try:
                wait(futures.values(), return_when=FIRST_EXCEPTION)
            finally:  # Also after a KeyboardInterrupt: no worker outlives this call.
                if not all(f.done() and f.exception() is None for f in futures.values()):
                    self._cancelled.set()
                    pool.shutdown(wait=True, cancel_futures=True)
        failures = [error for f in futures.values() if not f.cancelled() and (error := f.exception()) is not None]
        # Whoever stopped because of another's failure may be done before it.
        for error in sorted(failures, key=lambda error: isinstance(error, _CancelledError)):
            raise error
        return tuple(futures[f.entry.path].result() for f in files)

    def _one(self, file: RemoteFile) -> FileEntry:
        buffer = self._buffers.get()
        try:
            return self._write_file(file, buffer)
        except BaseException:
            self._cancelled.set()
            raise
        finally:
            self._buffers.put(buffer)

    def _write_file(self, file: RemoteFile, buffer: memoryview) -> FileEntry:
        path = file.entry.path
        self._check()
        fd = self.destination.create(path)
        try:
            digest = self._fill(file, fd, buffer)
        except BaseException as error:
            with suppress(OSError):
                os.close(fd)
            if isinstance(error, OSError) and error.errno is not None:
                raise self.destination.failure("writing", path, error) from error
            raise
        self.destination.finish(fd, path)
        if file.entry.sha256 not in (None, digest):
            raise DigestMismatchError(str(path), f"sha256:{file.entry.sha256}", f"sha256:{digest}")
        self.destination.note(self._note(file, file.entry.size_bytes, digest))
        return attrs.evolve(file.entry, sha256=digest)

    def _fill(self, file: RemoteFile, fd: int, buffer: memoryview) -> str:
        size = file.entry.size_bytes
        digest, offset = self._adopt(file, fd, buffer)
        while offset < size:
            stop = min(size, (offset // self.part_bytes + 1) * self.part_bytes)
            for piece in self._pieces(file, offset, stop, buffer):
                digest.update(piece)
                self.destination.write(fd, piece, offset)
                offset += len(piece)
                self.observer.received(len(piece))
            if offset < size:
                os.fdatasync(fd)
                self.destination.note(self._note(file, offset, digest.hexdigest()))
        return digest.hexdigest()

    def _note(self, file: RemoteFile, stop: int, sha256: str) -> PartNote:
        return PartNote(path=file.entry.path, token=str(file.entry.token), stop=stop, sha256=sha256)

    def _pieces(self, file: RemoteFile, start: int, stop: int, buffer: memoryview) -> Iterator[memoryview]:
        """Yield the bytes of a range in order; after a failure go on where the last byte was."""
        pauses = delays(random.random())
        while start < stop:
            try:
                with self.backend.open_range(file, start, stop) as reader:
                    while start < stop:
                        self._check()
                        count = reader.readinto(buffer[: min(len(buffer), stop - start)])
                        if count == 0:
                            raise SourceUnavailableError(file.address, f"the answer ended {stop - start} bytes early")
                        start += count
                        yield buffer[:count]
                        pauses = delays(random.random())  # Bytes arrived: the source is well, start counting anew.
            except SourceUnavailableError as error:
                delay = next(pauses, None)
                if delay is None:
                    raise
                self.observer.retried(str(error), delay)
                if self._cancelled.wait(delay):
                    raise _CancelledError from error

    def _adopt(self, file: RemoteFile, fd: int, buffer: memoryview) -> tuple[hashlib._Hash, int]:
        """Copy what dead writers left of a file, as far as it proves itself, and return the digest so far."""
        digest, offset = hashlib.sha256(), 0
        # Without a token nothing says that the source still means the same bytes.
        donors = self.donors.get(file.entry.path, ()) if file.entry.token else ()
        for donor in donors:
            notes = [n for n in donor.notes if n.token == str(file.entry.token) and offset < n.stop <= file.entry.size_bytes]
            with ExitStack() as opened:
                try:
                    source = opened.enter_context(donor.open_file())
                except (OSError, ValueError):
                    continue  # Collected, lost, replaced or not for us to read: its bytes are fetched.
                for note in notes:
                    copied = self._copy(source, fd, offset, note.stop, digest.copy(), buffer)
                    if copied is None or copied.hexdigest() != note.sha256:
                        break
                    self.observer.adopted(note.stop - offset)
                    digest, offset = copied, note.stop
        return digest, offset

    def _copy(self, source: int, target: int, start: int, stop: int, digest: hashlib._Hash, buffer: memoryview) -> hashlib._Hash | None:
        while start < stop:
            self._check()
            try:
                count = os.preadv(source, [buffer[: min(len(buffer), stop - start)]], start)
            except OSError:
                return None
            if count == 0:
                return None
            digest.update(buffer[:count])
            self.destination.write(target, buffer[:count], start)
            start += count
        return digest

    def _check(self) -> None:
        if self._cancelled.is_set():
            raise _CancelledError
        self.observer.check()
