"""
Which bytes of which file are fetched next. Pure: no threads, no clock, no disk.

A `Schedule` takes files and hands out work, and is notified of what became of it. It does not know who does the work.
A file that was begun is continued at its front (the first byte that is not hashed yet) before a new file is begun, the
largest file is begun first, and when all files are begun the one that lacks most is fetched by several workers at once.
Files that are fetched with one request are handed out in batches. Every byte is handed out once, unless its worker
fails.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import deque
from collections.abc import Container, Iterable
from pathlib import PurePosixPath
from typing import Literal

import attrs

from kserve_pvc._download.tuning import Tuning
from kserve_pvc._source.contract import RemoteFile

_TINY_BATCH = 4
_SMALL_BATCH = 2
# Tiny files that are on the volume are read, hashed and linked by so many workers: more would take turns with the
# interpreter's lock.
_MOST_TINY_BEGUN = 2


@attrs.frozen
class Begin:
    """
    Work: open a file and take over what is there of it. `Schedule.opened` makes its ranges available.
    """

    file: RemoteFile


@attrs.frozen
class Range:
    """
    Work: fetch a range. `is_front`: all bytes before it are hashed, so it is hashed while it is received.
    """

    file: RemoteFile
    start: int
    stop: int
    is_front: bool


@attrs.define(eq=False)
class Batch:
    """
    Work: small files, each fetched with one request. The first is written now, the others are requested ahead.

    `length` is how many one worker requests at the same time.
    """

    files: deque[RemoteFile]
    length: int


Work = Begin | Range | Batch


@attrs.define(eq=False)
class Progress:
    """
    How far one file is: what is not handed out yet, what is not written, and how far it is hashed.

    Args:
        is_hashed: Whether the bytes have to be hashed in order.
        ready: Ranges that are written and lie behind the front, by their start.
    """

    file: RemoteFile
    is_hashed: bool
    gaps: list[tuple[int, int]]
    unwritten: int
    hashed: int = 0
    is_hashing: bool = False
    ready: dict[int, int] = attrs.field(factory=dict)

    @classmethod
    def of(cls, file: RemoteFile, *, is_hashed: bool) -> Progress:
        """
        Return the progress of a file of which nothing is there.
        """
        size = file.entry.size_bytes
        return cls(file, is_hashed, [(0, size)] if size else [], size)

    @property
    def gap_bytes(self) -> int:
        return sum(stop - start for start, stop in self.gaps)

    @property
    def is_front_free(self) -> bool:
        """Whether a worker can continue the file where it is hashed up to, or at its first gap if it is not hashed."""
        return bool(self.gaps) and not self.is_hashing and (self.gaps[0][0] == self.hashed or not self.is_hashed)

    @property
    def is_complete(self) -> bool:
        is_hashed = self.hashed == self.file.entry.size_bytes or not self.is_hashed
        return not self.unwritten and not self.is_hashing and is_hashed

    def lacks(self, start: int, stop: int) -> bool:
        """
        Whether all of a range is missing and not handed out.
        """
        return any(first <= start and stop <= last for first, last in self.gaps)

    def add(self, start: int, stop: int, *, is_front: bool) -> None:
        """
        Add a range that was taken over from another file, before the first range of this one is handed out.

        Args:
            is_front: It begins at the front and is hashed already.
        """
        number = next(i for i, (first, last) in enumerate(self.gaps) if first <= start and stop <= last)
        first, last = self.gaps[number]
        self.gaps[number : number + 1] = [(a, b) for a, b in ((first, start), (stop, last)) if a < b]
        self.unwritten -= stop - start
        if is_front:
            self.hashed = stop
        elif self.is_hashed:
            self.ready[start] = stop


class Schedule:
    """
    The state of one transfer.

    `in_flight` counts what is being fetched or was requested ahead. The caller says with each request how many streams
    there may be, as that changes; what is in flight never exceeds it.
    """

    def __init__(self, tuning: Tuning) -> None:
        self._offered = set[PurePosixPath]()
        # Files of which one worker at a time fetches what is at the front. May grow at any time.
        self.sequential: Container[PurePosixPath] = ()
        self._part_bytes = tuning.part_bytes
        self._shortest = min(tuning.shortest_range_bytes, tuning.part_bytes)
        self._step = max(1, tuning.shortest_range_bytes // 8)
        self._tiny_bytes = tuning.tiny_file_bytes
        # A heap: the largest file first, and files of one size in the order of the listing.
        self._waiting: list[tuple[int, int, RemoteFile]] = []
        self._number = 0
        self._open: dict[PurePosixPath, Progress] = {}
        self._unassigned = 0
        self._batches = 0
        self._tiny_begun = set[PurePosixPath]()
        self._unfinished = 0
        self._is_listed = False
        self.in_flight = 0

    @property
    def is_finished(self) -> bool:
        """
        Whether all files were listed and all of them are finished.
        """
        return self._is_listed and not self._unfinished

    def add(self, files: Iterable[RemoteFile], offered: Iterable[PurePosixPath] = ()) -> None:
        """
        Add files that are to be fetched.

        Args:
            offered: Those of them that are on the volume at least in part: they are begun, however small.
        """
        self._offered.update(offered)
        for file in files:
            self._wait(file)
            self._unfinished += 1

    def end_listing(self) -> None:
        """
        No more files will be added.
        """
        self._is_listed = True

    def workers(self, streams: int) -> int:
        """
        Return how many workers there is work for.
        """
        return min(streams, len(self._waiting) + self._unassigned // self._shortest + 1)

    def next(self, streams: int, last: RemoteFile | None = None) -> Work | None:
        """
        Hand out work.

        Args:
            streams: The most that may be in flight.
            last: The file the worker was at, which it continues if possible.

        Returns:
            None if there is nothing to do now. That may change after any other call.
        """
        if self.in_flight >= streams:
            return None
        work = self._choose(streams, last)
        if work is not None:
            self.in_flight += 1
        return work

    def _choose(self, streams: int, last: RemoteFile | None) -> Work | None:
        own = None if last is None else self._open.get(last.entry.path)
        if own is not None and own.is_front_free:
            return self._take(own, streams)
        front = next((p for p in self._open.values() if p.is_front_free), None)
        if front is not None:
            return self._take(front, streams)
        if self._waiting:
            file = self._waiting[0][2]
            if not self._is_small(file):
                if not self._is_tiny(file):
                    return Begin(self._pop())
                if len(self._tiny_begun) < _MOST_TINY_BEGUN:
                    self._tiny_begun.add(file.entry.path)
                    return Begin(self._pop())
            # One worker at small files requests several at a time, so fewer workers are enough.
            elif self._batches * (length := self._batch_length(file)) < streams:
                self._batches += 1
                return Batch(deque([self._pop()]), length)
        gaps = (p for p in self._open.values() if p.gaps and p.file.entry.path not in self.sequential)
        longest = max(gaps, key=lambda p: p.gap_bytes, default=None)
        return None if longest is None else self._take(longest, streams)

    def extend(self, batch: Batch, streams: int) -> RemoteFile | None:
        """
        Add a small file to a batch, to be requested ahead.

        Returns:
            The file. None if the batch is long enough, if what may be in flight is, or if there is other work to do
            first.
        """
        if len(batch.files) >= batch.length or self.in_flight >= streams:
            return None
        if not self._waiting or not self._is_small(self._waiting[0][2]) or any(p.gaps for p in self._open.values()):
            return None
        file = self._pop()
        batch.files.append(file)
        self.in_flight += 1
        return file

    def advance(self, batch: Batch) -> None:
        """
        The first file of a batch is finished.
        """
        batch.files.popleft()
        if batch.files:
            batch.length = self._batch_length(batch.files[0])
        self.in_flight -= 1
        self._unfinished -= 1

    def opened(self, progress: Progress) -> None:
        """
        Make the ranges of a file available: it is open, or has to be fetched once more.
        """
        self._open[progress.file.entry.path] = progress
        self._unassigned += progress.gap_bytes

    def first(self, file: RemoteFile, streams: int) -> Range | None:
        """
        Hand out the first range of a file to the worker that has just opened it, instead of its `Begin`.
        """
        progress = self._open[file.entry.path]
        return self._take(progress, streams) if progress.gaps else None

    def written(self, work: Range) -> None:
        """
        A range is written, and hashed if it was at the front.
        """
        progress = self._open[work.file.entry.path]
        progress.unwritten -= work.stop - work.start
        if work.is_front:
            progress.hashed, progress.is_hashing = work.stop, False
        elif progress.is_hashed:
            progress.ready[work.start] = work.stop

    def is_last(self, work: Range) -> bool:
        """
        Whether nothing but this range is missing of its file.
        """
        return self._open[work.file.entry.path].unwritten == work.stop - work.start

    def due(self, file: RemoteFile) -> Literal["hash", "finish"] | None:
        """
        Hand out what has to be done for a file besides fetching, after one of its ranges was written, hashed or added.

        Returns:
            `hash`: what `next_unhashed` returns. `finish`: the file has all its bytes.
        """
        progress = self._open.get(file.entry.path)
        if progress is None:
            return None
        if not progress.is_hashing and progress.hashed in progress.ready:
            progress.is_hashing = True
            return "hash"
        if progress.is_complete:
            del self._open[file.entry.path]
            return "finish"
        return None

    def next_unhashed(self, file: RemoteFile) -> tuple[int, int] | None:
        """
        Return the range to hash next from what is written, or None if the front is a gap or being fetched.
        """
        progress = self._open[file.entry.path]
        stop = progress.ready.pop(progress.hashed, None)
        if stop is None:
            progress.is_hashing = False
            return None
        return progress.hashed, stop

    def hashed(self, file: RemoteFile, stop: int) -> None:
        """
        What `next_unhashed` returned is hashed.
        """
        self._open[file.entry.path].hashed = stop

    def finished(self, file: RemoteFile) -> None:
        """
        A file that was begun is as it should be.
        """
        self._unfinished -= 1

    def done(self, work: Work) -> None:
        """
        A worker is done with what `next` returned, and with the range that `first` returned in its place.
        """
        if isinstance(work, Batch):
            self._batches -= 1
        else:
            self.in_flight -= 1
            self._tiny_begun.discard(work.file.entry.path)

    def release(self, work: Work) -> None:
        """
        A worker failed: its work is handed out once more. Bytes of a range that it may have written do not count.
        """
        match work:
            case Begin(file=file):
                self._wait(file)
            case Batch():
                for file in work.files:
                    self._wait(file)
                self.in_flight -= len(work.files)
                work.files.clear()
            case Range(start=start, stop=stop):
                progress = self._open[work.file.entry.path]
                insort(progress.gaps, (start, stop))
                progress.is_hashing = progress.is_hashing and not work.is_front
                self._unassigned += stop - start
        self.done(work)

    def _wait(self, file: RemoteFile) -> None:
        self._number += 1
        heapq.heappush(self._waiting, (-file.entry.size_bytes, self._number, file))
        self._unassigned += file.entry.size_bytes

    def _pop(self) -> RemoteFile:
        file = heapq.heappop(self._waiting)[2]
        self._unassigned -= file.entry.size_bytes
        return file

    def _is_small(self, file: RemoteFile) -> bool:
        """Whether one worker fetches all of it with one request: no other needs to know of it before it is finished."""
        if not file.in_ranges:
            return True
        return file.entry.size_bytes <= self._shortest and file.entry.path not in self._offered

    def _is_tiny(self, file: RemoteFile) -> bool:
        return file.entry.size_bytes <= self._tiny_bytes

    def _batch_length(self, file: RemoteFile) -> int:
        return _TINY_BATCH if self._is_tiny(file) else _SMALL_BATCH

    def _take(self, progress: Progress, streams: int) -> Range:
        is_front = progress.is_front_free
        start, end = progress.gaps[0]
        # As long as there is much to do, ranges are long; near the end each stream's share of what is left.
        share = self._unassigned // (2 * max(1, streams))
        length = min(self._part_bytes, max(self._shortest, -(-share // self._step) * self._step))
        stop = min(end, (start // length + 1) * length)
        if stop < end:
            progress.gaps[0] = (stop, end)
        else:
            del progress.gaps[0]
        progress.is_hashing = progress.is_hashing or is_front
        self._unassigned -= stop - start
        return Range(progress.file, start, stop, is_front)
