"""
Which bytes are fetched next, as values: nothing here fetches anything.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kserve_pvc import FileEntry, RemoteFile
from kserve_pvc._download.schedule import Batch, Begin, Progress, Range, Schedule, Work
from kserve_pvc._download.tuning import Tuning

# Ranges of 10 to 100 bytes; up to 10 bytes a file is small, up to 2 it is tiny.
TUNING = Tuning(part_bytes=100, shortest_range_bytes=10, tiny_file_bytes=2)
# All ranges have 100 bytes.
PARTS = Tuning(part_bytes=100, shortest_range_bytes=100, tiny_file_bytes=2)


def remote(name: str, size: int, *, in_ranges: bool = True) -> RemoteFile:
    entry = FileEntry(path=name, size_bytes=size, token="t")
    return RemoteFile(entry=entry, address=name, pin={}, in_ranges=in_ranges)


def scheduled(*files: RemoteFile, offered: Sequence[str] = (), tuning: Tuning = TUNING) -> Schedule:
    schedule = Schedule(tuning)
    schedule.add(files, [remote(name, 0).entry.path for name in offered])
    return schedule


def opened(schedule: Schedule, work: Work | None, streams: int, *, is_hashed: bool = True) -> Range | None:
    """
    Open the file that a worker was told to begin, of which nothing is there, and return its first range.
    """
    assert isinstance(work, Begin)
    schedule.opened(Progress.of(work.file, is_hashed=is_hashed))
    return schedule.first(work.file, streams)


def span(work: Work | None) -> tuple[str, int, int, bool]:
    assert isinstance(work, Range)
    return str(work.file.entry.path), work.start, work.stop, work.is_front


def names(files: Iterable[RemoteFile]) -> list[str]:
    return [str(file.entry.path) for file in files]


def test_the_largest_file_is_begun_first():
    """
    Files are begun by size, and those of one size in the order of the listing.
    """
    schedule = scheduled(remote("m", 500), remote("b", 50), remote("z", 900), remote("a", 50))

    works = [schedule.next(9) for _ in range(5)]

    assert [work and str(work.file.entry.path) for work in works] == ["z", "m", "b", "a", None]


def test_a_file_that_is_begun_comes_before_a_new_one():
    """
    The worker that wrote the front of a file goes on with it, also if another file could be continued.
    """
    schedule = scheduled(a := remote("a", 300), remote("b", 300), remote("c", 300), tuning=PARTS)
    first, second = (opened(schedule, schedule.next(4), 4) for _ in range(2))
    for work in (first, second):
        schedule.written(work)
        schedule.done(work)

    assert span(schedule.next(4, second.file)) == ("b", 100, 200, True)
    assert span(schedule.next(4, second.file)) == ("a", 100, 200, True)
    assert schedule.next(4, a) == Begin(remote("c", 300))


def test_the_file_that_lacks_most_is_helped_when_all_are_begun():
    """
    Without a new file, what lies behind the front of the largest rest is fetched, and is not hashed on the way.
    """
    schedule = scheduled(remote("a", 500), remote("b", 400), tuning=PARTS)
    for _ in range(2):
        opened(schedule, schedule.next(8), 8)
    works = [span(schedule.next(8)) for _ in range(4)]

    assert works == [("a", 100, 200, False), ("a", 200, 300, False), ("b", 100, 200, False), ("a", 300, 400, False)]


def test_a_file_that_is_not_hashed_is_continued_before_a_new_one():
    """
    However many files there are, no more are open at once than there are workers, with or without hashing.
    """
    schedule = scheduled(*(remote(str(number), 1000) for number in range(50)))
    begun: set[str] = set()
    works = [opened(schedule, schedule.next(3), 3, is_hashed=False) for _ in range(3)]
    for _ in range(27):
        work = works.pop(0)
        begun.add(span(work)[0])
        schedule.written(work)
        schedule.done(work)
        works.append(schedule.next(3, work.file))

    assert begun == {"0", "1", "2"}


def test_ranges_end_where_parts_do_and_shrink_towards_the_end():
    """
    The longest come first, and the last ones are short enough that all streams end together.
    """
    schedule = scheduled(remote("a", 2000))
    works = [opened(schedule, schedule.next(4), 4)]
    while True:
        schedule.done(works[-1])
        if (work := schedule.next(4)) is None:
            break
        works.append(work)
    lengths = [work.stop - work.start for work in works]

    assert [span(work)[1:3] for work in works[:2]] == [(0, 100), (100, 200)]
    assert (lengths[0], lengths[-1], sum(lengths)) == (100, 10, 2000)


def test_the_last_ranges_are_a_share_of_what_is_left():
    """
    With few streams ranges stay long for longer than with many.
    """
    few, many = (scheduled(remote("a", 400)) for _ in range(2))

    assert span(opened(few, few.next(1), 1)) == ("a", 0, 100, True)
    assert span(opened(many, many.next(8), 8)) == ("a", 0, 25, True)


@pytest.mark.parametrize(("size", "length"), [(2, 4), (3, 2), (10, 2)])
def test_small_files_are_handed_out_in_batches(size, length):
    """
    A worker at tiny files has four of them at a time, one at small files two.
    """
    schedule = scheduled(*(remote(f"{number}", size) for number in range(9)))
    batch = schedule.next(9)
    while schedule.extend(batch, 9) is not None:
        pass

    assert names(batch.files) == [f"{number}" for number in range(length)]
    assert schedule.in_flight == length


def test_a_batch_goes_on_as_its_files_are_finished():
    """
    Each file that is finished makes room for another one, until none is left.
    """
    schedule = scheduled(*(remote(f"{number}", 1) for number in range(6)))
    schedule.end_listing()
    batch, written = schedule.next(4), []
    while batch.files:
        while schedule.extend(batch, 4) is not None:
            pass
        written.append((str(batch.files[0].entry.path), len(batch.files)))
        schedule.advance(batch)
    schedule.done(batch)

    assert written == [("0", 4), ("1", 4), ("2", 4), ("3", 3), ("4", 2), ("5", 1)]
    assert (schedule.in_flight, schedule.is_finished, schedule.next(4)) == (0, True, None)


@pytest.mark.parametrize(("streams", "workers"), [(1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_few_workers_are_enough_for_tiny_files(streams, workers):
    """
    As each worker requests four at a time, a fourth of the workers keeps all streams in use.
    """
    schedule = scheduled(*(remote(f"{number}", 1) for number in range(99)))

    works = [work for _ in range(streams) if (work := schedule.next(streams)) is not None]

    assert len(works) == workers


def test_a_batch_is_not_extended_while_there_is_other_work():
    """
    Nothing is requested ahead beyond what may be in flight, nor before ranges of files that are open.
    """
    large, small = remote("large", 1000), [remote(f"{number}", 1) for number in range(9)]
    schedule = scheduled(large, *small)
    opened(schedule, schedule.next(4), 4)
    full, batch = schedule.extend(Batch(deque(), 4), 1), Batch(deque(), 4)

    assert (full, schedule.extend(batch, 4)) == (None, None)


def test_a_file_without_ranges_is_fetched_whole():
    """
    However large, it is handed out with one request.
    """
    work = scheduled(remote("a", 10_000, in_ranges=False)).next(4)

    assert isinstance(work, Batch)
    assert (names(work.files), work.length) == (["a"], 2)


@pytest.mark.parametrize(("offered", "kind"), [([], Batch), (["a"], Begin)])
def test_a_small_file_of_which_something_is_there_is_begun(offered, kind):
    """
    What is on the volume can be taken over only if the file is opened first.
    """
    assert isinstance(scheduled(remote("a", 5), offered=offered).next(4), kind)


def test_what_is_written_ahead_of_the_front_is_hashed_once_the_front_is_there():
    """
    A range further on waits for the ones before it, and the file is finished when all of it is hashed.
    """
    schedule = scheduled(a := remote("a", 300), tuning=PARTS)
    schedule.end_listing()
    first = opened(schedule, schedule.next(3), 1)
    second, third = schedule.next(3), schedule.next(3)
    schedule.written(third)
    assert (schedule.due(a), schedule.is_last(first)) == (None, False)
    schedule.written(first)
    assert (schedule.due(a), schedule.is_last(second)) == (None, True)
    schedule.written(second)
    assert schedule.due(a) == "hash"
    assert schedule.due(a) is None  # It is being hashed.

    hashed = []
    while (unhashed := schedule.next_unhashed(a)) is not None:
        hashed.append(unhashed)
        schedule.hashed(a, unhashed[1])

    assert hashed == [(100, 200), (200, 300)]
    assert (schedule.due(a), schedule.due(a)) == ("finish", None)
    schedule.finished(a)
    assert schedule.is_finished


def test_a_file_is_not_finished_while_it_is_being_hashed():
    """
    The last bytes may be hashed before the one that hashes has seen that they were the last.
    """
    schedule = scheduled(a := remote("a", 200), tuning=PARTS)
    for work in (opened(schedule, schedule.next(2), 2), schedule.next(2)):
        schedule.written(work)
    assert (schedule.due(a), schedule.next_unhashed(a)) == ("hash", (100, 200))
    schedule.hashed(a, 200)

    assert (schedule.due(a), schedule.next_unhashed(a), schedule.due(a)) == (None, None, "finish")


def test_an_empty_file_is_finished_when_it_is_opened():
    """
    It has no range, and nothing of it is hashed.
    """
    schedule = scheduled(a := remote("a", 0), offered=["a"])

    assert opened(schedule, schedule.next(4), 4) is None
    assert schedule.due(a) == "finish"


def test_what_was_taken_over_is_not_handed_out():
    """
    A beginning that is hashed moves the front; a range further on is hashed once the front is there.
    """
    progress = Progress.of(a := remote("a", 300), is_hashed=True)
    progress.add(0, 50, is_front=True)
    progress.add(100, 200, is_front=False)
    assert [progress.lacks(*each) for each in ((50, 100), (50, 101), (0, 10), (200, 300))] == [True, False, False, True]
    schedule = scheduled(a, tuning=PARTS)
    schedule.next(4)
    schedule.opened(progress)
    first = schedule.first(a, 1)

    assert span(first) == ("a", 50, 100, True)
    assert span(schedule.next(4)) == ("a", 200, 300, False)
    schedule.written(first)
    assert (schedule.due(a), schedule.next_unhashed(a)) == ("hash", (100, 200))


def test_work_of_a_worker_that_failed_is_handed_out_again():
    """
    A file to begin, a range, and the files of a batch are there for the next worker.
    """
    schedule = scheduled(remote("a", 100), remote("b", 1), remote("c", 1), offered=["a"], tuning=PARTS)
    schedule.release(schedule.next(4))
    work = opened(schedule, schedule.next(4), 1)
    schedule.release(work)
    assert schedule.next(4) == work
    batch = schedule.next(9)
    schedule.extend(batch, 9)
    schedule.release(batch)

    again = schedule.next(9)
    assert (names(again.files), names([schedule.extend(again, 9)]), schedule.in_flight) == (["b"], ["c"], 3)


def test_a_front_that_was_lost_comes_first():
    """
    A range that is handed out again stands where it was: before those behind it.
    """
    schedule = scheduled(remote("a", 300), tuning=PARTS)
    first = opened(schedule, schedule.next(9), 9)
    workers = schedule.workers(9)
    schedule.release(first)

    assert (workers, schedule.workers(9)) == (3, 4)
    assert [span(schedule.next(9)) for _ in range(2)] == [("a", 0, 100, True), ("a", 100, 200, False)]


def test_there_are_as_many_workers_as_there_is_work_for():
    """
    One for each file and each range that a stream could fetch, within the limit.
    """
    assert [scheduled(remote("a", size)).workers(8) for size in (0, 1, 25, 1000)] == [2, 2, 4, 8]
    assert scheduled().workers(8) == 1


def test_more_files_may_come_until_the_listing_ends():
    """
    Without work the schedule is finished only if no page can follow.
    """
    schedule = scheduled()
    assert (schedule.next(4), schedule.is_finished) == (None, False)
    schedule.add([remote("a", 1)])
    batch = schedule.next(4)
    schedule.end_listing()
    assert (schedule.next(4), schedule.is_finished) == (None, False)
    schedule.advance(batch)

    assert schedule.is_finished


@attrs.define
class Crew:
    """
    Workers that do what a schedule hands out, in any order, and check that it is right.

    `written` says how often each byte of a file was written and not lost, `hashed` how far it was hashed in order.
    """

    schedule: Schedule
    is_hashed: bool
    begun: list[Begin] = attrs.field(factory=list)
    ranges: list[Range] = attrs.field(factory=list)
    batches: list[Batch] = attrs.field(factory=list)
    hashing: list[RemoteFile] = attrs.field(factory=list)
    changed: list[RemoteFile] = attrs.field(factory=list)
    spoiled: set[str] = attrs.field(factory=set)
    finished: list[str] = attrs.field(factory=list)
    written: dict[str, Counter[int]] = attrs.field(factory=dict)
    hashed: Counter[str] = attrs.field(factory=Counter)

    def take(self, streams: int, pick: int) -> None:
        own = self.ranges[pick % len(self.ranges)].file if self.ranges else None
        match self.schedule.next(streams, own):
            case Begin() as work:
                self.begun.append(work)
            case Range() as work:
                self.receive(work)
            case Batch() as work:
                self.batches.append(work)
            case None:
                return
        assert self.schedule.in_flight <= streams

    def receive(self, work: Range) -> None:
        """A range is in flight: none of its bytes may be so already, nor be written, and the front is where it is."""
        name = str(work.file.entry.path)
        assert 0 <= work.start < work.stop <= work.file.entry.size_bytes
        in_flight = {b for r in self.ranges if r.file is work.file for b in range(r.start, r.stop)}
        assert not in_flight & set(range(work.start, work.stop))
        assert not any(self.written[name][byte] for byte in range(work.start, work.stop))
        assert not (work.is_front and self.is_hashed) or work.start == self.hashed[name]
        self.ranges.append(work)

    def open(self, streams: int, pick: int, held: Sequence[tuple[int, int]]) -> None:
        """Begin a file, of which some ranges are there; each that begins at the front is hashed on the way."""
        file = self.begun.pop(pick % len(self.begun)).file
        progress = Progress.of(file, is_hashed=self.is_hashed)
        name, size = str(file.entry.path), file.entry.size_bytes
        self.written[name] = Counter()
        for start, stop in held:
            if start < min(stop, size) and progress.lacks(start, min(stop, size)):
                is_front = self.is_hashed and start == self.hashed[name]
                progress.add(start, min(stop, size), is_front=is_front)
                self.written[name].update(range(start, min(stop, size)))
                self.hashed[name] += (min(stop, size) - start) * is_front
        self.schedule.opened(progress)
        if (work := self.schedule.first(file, streams)) is not None:
            self.receive(work)
        else:
            self.changed.append(file)
            self.schedule.done(Begin(file))

    def write(self, pick: int) -> None:
        work = self.ranges.pop(pick % len(self.ranges))
        name = str(work.file.entry.path)
        self.written[name].update(range(work.start, work.stop))
        self.hashed[name] += (work.stop - work.start) * (work.is_front and self.is_hashed)
        self.schedule.written(work)
        self.changed.append(work.file)
        self.schedule.done(work)

    def follow(self, pick: int) -> None:
        """Do what is due for a file that has changed, be it much later."""
        file = self.changed.pop(pick % len(self.changed))
        due, name, size = self.schedule.due(file), str(file.entry.path), file.entry.size_bytes
        if due == "hash":
            self.hashing.append(file)
        elif due == "finish":
            assert self.written[name] == Counter(range(size))
            assert self.hashed[name] == (size if self.is_hashed else 0)
            if name in self.spoiled:
                self.finished.append(name)
                self.schedule.finished(file)
            else:  # The bytes are not what the source has: once more, from the start.
                self.spoiled.add(name)
                self.written[name], self.hashed[name] = Counter(), 0
                self.schedule.opened(Progress.of(file, is_hashed=self.is_hashed))
                self.changed.append(file)

    def hash(self, pick: int) -> None:
        file = self.hashing[pick % len(self.hashing)]
        unhashed = self.schedule.next_unhashed(file)
        if unhashed is None:
            self.hashing.remove(file)
            self.changed.append(file)
            return
        start, stop = unhashed
        name = str(file.entry.path)
        assert start == self.hashed[name]
        assert all(self.written[name][byte] == 1 for byte in range(start, stop))
        self.hashed[name] = stop
        self.schedule.hashed(file, stop)

    def advance(self, streams: int, pick: int, extensions: int) -> None:
        batch = self.batches[pick % len(self.batches)]
        for _ in range(extensions):
            if self.schedule.extend(batch, streams) is not None:
                assert self.schedule.in_flight <= streams
        assert len(batch.files) <= 4
        self.finished.append(str(batch.files[0].entry.path))
        self.schedule.advance(batch)
        if not batch.files:
            self.batches.remove(batch)
            self.schedule.done(batch)

    def fail(self, pick: int) -> None:
        """Some worker is lost with all that it had."""
        works = [*self.begun, *self.ranges, *self.batches]
        work = works[pick % len(works)]
        for held in (self.begun, self.ranges, self.batches):
            held[:] = [each for each in held if each is not work]
        self.schedule.release(work)

    def step(self, action: str, streams: int, pick: int, held: Sequence[tuple[int, int]]) -> None:
        if action == "take":
            self.take(streams, pick)
        elif action == "open" and self.begun:
            self.open(streams, pick, held)
        elif action == "write" and self.ranges:
            self.write(pick)
        elif action == "follow" and self.changed:
            self.follow(pick)
        elif action == "hash" and self.hashing:
            self.hash(pick)
        elif action == "advance" and self.batches:
            self.advance(streams, pick, len(held))
        elif action == "fail" and (self.begun or self.ranges or self.batches):
            self.fail(pick)
        in_flight = len(self.begun) + len(self.ranges) + sum(len(batch.files) for batch in self.batches)
        assert self.schedule.in_flight == in_flight


ACTIONS = ["take", "open", "write", "follow", "hash", "advance", "fail"]
SIZES = st.integers(0, 12) | st.integers(0, 400)
FILES = st.lists(st.tuples(SIZES, st.booleans(), st.booleans()), max_size=12)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(ACTIONS),
        st.integers(1, 6),
        st.integers(0, 20),
        st.lists(st.tuples(st.integers(0, 300), st.integers(0, 400)), max_size=4),
    ),
    max_size=80,
)


@settings(max_examples=200, deadline=None, database=None)
@given(pages=st.lists(FILES, max_size=3), steps=STEPS, is_hashed=st.booleans())
def test_every_byte_is_handed_out_once(pages, steps, is_hashed):
    """
    Whatever the order in which work is taken, written, hashed and lost, and whatever was there before, each file is
    finished once, with each of its bytes written once and hashed in order, and never too many are in flight.
    """
    files = [
        [remote(f"{page}-{number}", size, in_ranges=ranges) for number, (size, ranges, _) in enumerate(found)]
        for page, found in enumerate(pages)
    ]
    offered = {
        f"{page}-{number}" for page, found in enumerate(pages) for number, (*_, held) in enumerate(found) if held
    }
    crew = Crew(scheduled(offered=sorted(offered)), is_hashed)
    unlisted = list(files)
    for number, step in enumerate(steps):
        if unlisted and number % 7 == 0:
            crew.schedule.add(unlisted.pop(0))
        crew.step(*step)
    for page in unlisted:
        crew.schedule.add(page)
    crew.schedule.end_listing()
    rounds = 0
    while not crew.schedule.is_finished:  # Nothing fails any more, so it comes to an end.
        for action in ACTIONS[:-1]:
            crew.step(action, 3, 0, ())
        rounds += 1
        assert rounds < 10_000

    assert Counter(crew.finished) == Counter(names(file for page in files for file in page))
    assert (crew.schedule.in_flight, crew.schedule.next(3)) == (0, None)
