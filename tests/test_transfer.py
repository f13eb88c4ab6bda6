"""
Moving bytes: ranges of many files at the same time, and how that ends.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import PurePosixPath

import attrs
import pytest
from transfers import (
    DATA,
    PART,
    Place,
    Recorder,
    Source,
    donor,
    is_true,
    left_unfinished,
    note,
    nothing_left_open,
    run,
    sha256,
    transfer,
    workers_alive,
)
from waiting import until

from kserve_pvc import (
    InsufficientSpaceError,
    RemoteFile,
    SourceDeniedError,
    SourceUnavailableError,
)
from kserve_pvc._download.budget import Budget
from kserve_pvc._volume.calls import write_all
from kserve_pvc.locks.lease import LeaseLostError


@pytest.fixture(autouse=True)
def nothing_is_left_open():
    """
    However a transfer ends, its descriptors are closed, its threads over and its buffers released.
    """
    with nothing_left_open():
        yield


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path / "new")


@pytest.fixture
def dead(tmp_path):
    """
    What a writer left that died after two of three parts.
    """
    return left_unfinished(tmp_path / "dead")


def test_files_arrive_whole_and_are_noted_part_by_part(place):
    """
    Bytes, digests and notes are exact, for files of no, one and several parts.
    """
    source, recorder = Source({"a.bin": DATA, "b.bin": b"b" * PART, "empty": b""}), Recorder()

    entries = run(source, place, recorder, workers=1)

    assert {str(path): (e.sha256, e.token) for path, e in entries.items()} == {
        n: (sha256(data), "t") for n, data in source.files.items()
    }
    assert place.content() == source.files
    assert [
        (str(n.path), n.start, n.stop, n.sha256 == sha256(source.files[str(n.path)][: n.stop])) for n in place.notes
    ] == [
        ("a.bin", 0, PART, True),
        ("a.bin", 0, 2 * PART, True),
        ("a.bin", 0, 3 * PART, True),
        ("b.bin", 0, PART, True),
        ("empty", 0, 0, True),
    ]
    assert recorder.received_bytes == 4 * PART


@pytest.mark.parametrize("digest", ["sha256", "none"])
@pytest.mark.parametrize("workers", [1, 2, 4, 16])
def test_ranges_of_several_streams_make_the_same_file(place, digest, workers):
    """
    However many streams fetch a file, in whichever order, its bytes, digest and notes are true, and no byte is
    requested twice.
    """
    files = {
        "big": random.Random(2).randbytes(40 * PART + 1),
        "odd": random.Random(3).randbytes(7 * PART - 1),
        "empty": b"",
    }
    source, recorder = Source(files), Recorder()
    source.on_read = lambda name, offset: time.sleep(random.random() / 2000) or True

    entries = run(source, place, recorder, workers=workers, digest=digest)

    assert place.content() == files
    assert {str(path): e.sha256 for path, e in entries.items()} == {
        n: sha256(d) if digest == "sha256" else None for n, d in files.items()
    }
    assert all(is_true(note, files[str(note.path)]) for note in place.notes)
    requested = [offset for name, start, stop in source.ranges if name == "big" for offset in range(start, stop)]
    assert sorted(requested) == list(range(len(files["big"])))
    assert (recorder.received_bytes, recorder.adopted_bytes) == (sum(map(len, files.values())), 0)


def test_a_range_ahead_of_the_front_is_proven_by_a_checksum_of_its_own(place):
    """
    While the front waits, what lies further on is noted with its CRC32, and the file's digest is right in the end.
    """
    source, ahead = Source({"a.bin": DATA}), threading.Event()

    def hold_the_front(name: str, offset: int) -> bool:
        if offset == 0:
            assert ahead.wait(10)
        return True

    source.on_read = hold_the_front
    destination = place.destination()

    def note(path, token, start, stop, *proof):
        destination.note(path, token, start, stop, *proof)
        if start:
            ahead.set()

    entries = run(source, place, workers=2, destination=attrs.evolve(destination, note=note))

    first = place.notes[0]
    assert (first.start > 0, first.sha256, first.crc32) == (True, None, zlib.crc32(DATA[first.start : first.stop]))
    assert entries[PurePosixPath("a.bin")].sha256 == sha256(DATA)
    assert place.content() == {"a.bin": DATA}


def test_wrong_bytes_ahead_of_the_front_change_the_digest(place, monkeypatch):
    """
    What is hashed behind the front is what lies on the volume: a byte that a volume lost is in the digest.
    """
    source, ahead = Source({"a.bin": DATA}), threading.Event()
    source.on_read = lambda name, offset: offset >= PART or ahead.wait(10)

    def spoil(fd: int, data: memoryview, offset: int) -> None:
        write_all(fd, data, offset)
        if offset <= 2 * PART + 50 < offset + len(data):
            write_all(fd, bytes([DATA[2 * PART + 50] ^ 1]), 2 * PART + 50)
            ahead.set()

    spoiled = DATA[: 2 * PART + 50] + bytes([DATA[2 * PART + 50] ^ 1]) + DATA[2 * PART + 51 :]
    entries = run(source, place, workers=3, destination=attrs.evolve(place.destination(), write=spoil))

    assert place.content() == {"a.bin": spoiled}
    assert entries[PurePosixPath("a.bin")].sha256 == sha256(spoiled)


def test_the_largest_file_comes_first(place):
    """
    Files of one page are begun by size, so that a large one is not alone at the end.
    """
    source = Source({"b": b"b" * 10, "a": b"a" * 10, "z": b"z" * 900, "m": b"m" * 500})

    run(source, place, workers=1)

    assert [name for name, _, _ in source.ranges] == ["z", "m", "b", "a"]


def test_a_page_is_fetched_while_the_next_is_listed(place):
    """
    The first files are there before the listing is complete.
    """
    source = Source({"a": b"a" * 10, "b": b"b" * 20})

    def pages() -> Iterator[list[RemoteFile]]:
        yield [source.remote("a")]
        yield []
        until(lambda: "note a" in place.events, 10)
        yield [source.remote("b")]

    entries = transfer(source, place).run(pages())

    assert (place.content(), {str(path) for path in entries}) == (source.files, {"a", "b"})


def test_bytes_are_durable_before_they_are_noted(place, monkeypatch):
    """
    A note in the journal never speaks of bytes that a power failure could still take.
    """
    monkeypatch.setattr(os, "fdatasync", lambda fd: place.events.append("sync"))
    source = Source({"a.bin": DATA})

    run(source, place)

    assert place.events == ["create a.bin", *["sync", "note a.bin"] * 2, "finish a.bin", "note a.bin"]


def test_a_failed_sync_is_never_noted(place, monkeypatch):
    """
    Bytes that may not be on the volume are not noted, and the transfer fails.
    """

    def fail(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail)

    with pytest.raises(InsufficientSpaceError, match=r"writing a\.bin"):
        run(Source({"a.bin": DATA}), place, workers=3)

    assert place.notes == []


def test_only_large_files_are_made_durable_one_by_one(place):
    """
    Small files are left to the sync of the whole tree.
    """
    source, said = Source({"large": b"l" * PART, "small": b"s" * (PART - 1)}), {}

    def finish(fd: int, path: PurePosixPath, is_large: bool, is_executable: bool) -> bool:
        said[str(path)] = is_large
        os.close(fd)
        return is_large

    run(source, place, destination=attrs.evolve(place.destination(), finish=finish))

    assert said == {"large": True, "small": False}


@pytest.mark.parametrize("attempt", range(10))
def test_the_first_failure_is_what_is_raised(place, attempt):
    """
    Workers that stop because another failed do not hide its error.
    """
    source = Source({f"{number}.bin": DATA for number in range(8)})

    def fail_one(name: str, offset: int) -> bool:
        if name == "3.bin" and offset > 500:
            raise SourceDeniedError(name, "expired")
        return True

    source.on_read = fail_one
    with pytest.raises(SourceDeniedError):
        run(source, place, workers=8)

    assert source.open == 0


def test_a_failure_ends_streams_that_only_wait(place):
    """
    A stream that waits for a silent source, and one that pauses for a busy one, stop at once when another fails.
    """
    source, recorder, began = (
        Source({"busy": DATA, "silent": DATA, "denied": DATA[:PART]}),
        Recorder(),
        time.monotonic(),
    )

    def act(name: str, offset: int) -> bool | None:
        until(lambda: len({name for name, _, _ in source.ranges}) == 3, 10)
        if name == "busy":
            raise SourceUnavailableError(name, "busy", retry_after=60)
        if name == "silent":
            return time.sleep(0.01)
        until(lambda: recorder.retries, 10)
        raise SourceDeniedError(name, "expired")

    source.on_read = act
    with pytest.raises(SourceDeniedError):
        run(source, place, recorder, workers=4)

    assert time.monotonic() - began < 10


def test_a_listing_that_fails_half_way_ends_the_transfer(place):
    """
    Its error is what is raised, although workers are at work on what was listed before.
    """
    source = Source({"a.bin": DATA, "b.bin": DATA})
    source.on_read = lambda name, offset: time.sleep(0.01)

    def pages() -> Iterator[list[RemoteFile]]:
        yield source.all()
        until(lambda: source.open, 10)
        raise SourceDeniedError("s3://bucket", "expired")

    with pytest.raises(SourceDeniedError, match="expired"):
        transfer(source, place, workers=4).run(pages())

    assert source.open == 0


def test_a_listing_is_not_read_on_after_a_failure(place):
    """
    Once a file has failed, the next page is the last that is requested.
    """
    source, listed = Source({"a.bin": DATA[:500]}), []

    def fail(name: str, offset: int) -> bool:
        raise SourceDeniedError(name, "expired")

    def pages() -> Iterator[list[RemoteFile]]:
        yield source.all()
        until(lambda: not workers_alive(), 10)
        for number in range(100):
            listed.append(number)
            yield []

    source.on_read = fail
    with pytest.raises(SourceDeniedError):
        transfer(source, place).run(pages())

    assert listed == [0]


def test_an_interrupt_ends_all_workers(place):
    """
    Control-C in the thread that called leaves no worker behind.
    """
    source = Source({"a.bin": DATA, "b.bin": DATA})
    source.on_read = lambda name, offset: time.sleep(0.01)

    def pages() -> Iterator[list[RemoteFile]]:
        yield source.all()
        until(lambda: source.open, 10)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        transfer(source, place, workers=4).run(pages())


def test_an_unexpected_error_ends_the_transfer(place):
    """
    A bug in a backend is raised as it is, and nothing hangs.
    """
    source = Source({"a.bin": DATA, "b.bin": DATA})

    def fail(name: str, offset: int) -> bool:
        raise ZeroDivisionError

    source.on_read = fail
    with pytest.raises(ZeroDivisionError):
        run(source, place, workers=4)


@pytest.mark.parametrize("workers", [1, 4])
def test_a_lost_lease_ends_the_transfer(place, workers):
    """
    Once the claim is lost no further byte is written.
    """
    source, recorder = Source({"a.bin": DATA}), Recorder()
    recorder.lose_after = 5

    with pytest.raises(LeaseLostError):
        run(source, place, recorder, workers=workers)

    assert recorder.received_bytes < len(DATA)


@pytest.mark.parametrize("step", ["create", "allocate", "write", "copy", "finish", "note"])
@pytest.mark.parametrize("size", [500, 3 * PART], ids=["small", "parts"])
def test_an_error_of_the_volume_is_raised_as_one(place, dead, step, size):
    """
    Whatever the volume cannot do is an error of its own kind, raised as such, or does not matter.
    """
    source = Source({"a.bin": DATA[:size], "b.bin": DATA})

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def refuse_finish(fd: int, *_: object) -> None:
        os.close(fd)
        raise InsufficientSpaceError("writing", 0, 0)

    def refuse(*_: object) -> None:
        raise InsufficientSpaceError("writing", 0, 0)

    # The tree and the journal translate by themselves, everything else is translated here.
    act = {"finish": refuse_finish, "create": refuse, "note": refuse}.get(step, fail)
    broken = attrs.evolve(place.destination(), **{step: act})
    offered = {"b.bin": [donor(dead, "a.bin", place, [note("b.bin", 0, PART, sha256=sha256(DATA[:PART]))])]}

    if step == "copy":
        # What cannot be taken over is fetched.
        run(source, place, donors=offered, destination=broken)
        assert place.content() == source.files
    else:
        with pytest.raises(InsufficientSpaceError, match="writing"):
            run(source, place, donors=offered, destination=broken, workers=2)


def test_streams_beyond_the_budget_wait_for_memory(place):
    """
    However many streams are allowed, no more buffers are in use at once than the process has room for.
    """
    source, most = Source({str(number): DATA for number in range(8)}), []
    source.on_read = lambda name, offset: most.append(source.open) or True

    run(source, place, workers=8, budget=Budget(2))

    assert (max(most), place.content()) == (2, source.files)


def test_streams_that_wait_for_memory_end_with_a_lost_lease(place):
    """
    A stream that waits for a buffer which never comes still ends when the claim is lost.
    """
    budget, recorder = Budget(1), Recorder()
    recorder.lose_after = 3

    with budget.buffer(recorder.check), pytest.raises(LeaseLostError):
        run(Source({"a.bin": DATA}), place, recorder, budget=budget)


FORK = """
import os
from contextlib import ExitStack
from kserve_pvc._download.budget import BUFFERS, process_budget

def fail():
    os._exit(1)

with ExitStack() as buffers:
    for _ in range(BUFFERS):
        buffers.enter_context(process_budget().buffer(fail))
    child = os.fork()
    if not child:
        with process_budget().buffer(fail):
            os._exit(0)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_process_has_a_budget_of_its_own():
    """
    Buffers that were in use at the time of a fork are not missing in the child.
    """
    assert subprocess.run([sys.executable, "-I", "-c", FORK]).returncode == 0


@pytest.mark.parametrize("workers", [1, 2, 4, 5, 9])
def test_no_more_is_in_flight_than_the_limit_allows(place, workers):
    """
    Small files are requested before their turn, and requests that are not read yet count among those in flight.
    """
    source = Source({f"{i:02}.bin": bytes([i]) * (i * 20) for i in range(40)})
    most, honest = [], source.open_range

    @contextmanager
    def open_range(file, start, stop):
        with honest(file, start, stop) as reader:
            most.append(source.open)
            yield reader

    source.open_range = open_range
    transfer(source, place, workers=workers).run([source.all()])

    assert place.content() == source.files
    assert max(most) == min(workers, 4)  # No stream waits for bytes here, so there are no more than at first.
    assert sorted(source.ranges) == [(name, 0, len(data)) for name, data in source.files.items() if data]


def test_tiny_files_are_written_by_one_worker_as_long_as_that_is_enough(place):
    """
    One worker that requests four files at once is faster than four that take turns with the interpreter's lock.
    """
    source, threads = Source({f"{i:02}.bin": bytes([i]) * 20 for i in range(40)}), set()
    source.on_read = lambda name, offset: bool(threads.add(threading.current_thread().name)) or True
    transfer(source, place, workers=4).run([source.all()])

    assert len(threads) == 1
    assert place.content() == source.files


@pytest.mark.parametrize("name", ["00.bin", "01.bin", "39.bin"])
def test_what_was_requested_before_its_turn_is_released_after_a_failure(place, name):
    """
    The files behind the one that fails were requested already: their responses are closed and not written.
    """
    source = Source({f"{i:02}.bin": bytes([i]) * 20 for i in range(40)})

    def refuse(requested: str, offset: int) -> bool:
        if requested == name:
            raise SourceDeniedError(requested, "not for you")
        return True

    source.on_read = refuse
    with pytest.raises(SourceDeniedError):
        transfer(source, place, workers=4).run([source.all()])

    assert source.open == 0
    assert sorted(e for e in place.events if e.startswith("finish")) == [
        f"finish {n}" for n in sorted(source.files) if n < name
    ]


def test_a_request_that_fails_before_its_turn_is_made_again(place):
    """
    A request ahead that fails does not count: the file is requested once more when it is its turn.
    """
    source = Source({f"{i:02}.bin": bytes([i]) * 20 for i in range(9)})
    failed, honest = [], source.open_range

    def open_range(file, start, stop):
        if file.address not in failed:
            failed.append(file.address)
            raise SourceUnavailableError("x", "it is busy")
        return honest(file, start, stop)

    source.open_range = open_range
    recorder = Recorder()
    transfer(source, place, recorder, workers=4).run([source.all()])

    assert place.content() == source.files
    assert sorted(failed) == sorted(source.files)
    assert recorder.retries == 1  # The first was not requested ahead; the others had failed before their turn.


def test_what_was_requested_ahead_and_breaks_is_fetched_all_the_same(place):
    """
    A connection may be lost while a response waits for its turn.
    """
    source = Source({f"{i:02}.bin": bytes([i]) * 20 for i in range(9)})
    broken = set()

    def cut(name: str, offset: int) -> bool:
        return name in broken or bool(broken.add(name))

    source.on_read = cut
    transfer(source, place, workers=4).run([source.all()])

    assert place.content() == source.files
    assert len(broken) == 9


@pytest.mark.parametrize("size", [10, 2 * PART])
def test_what_is_read_into_begins_with_a_page(place, size):
    """
    A processor copies much slower to an address that lies a little behind the source's within a page.
    """
    source, places = Source({"a.bin": DATA[:size]}, piece=5000), []

    class Reader(Source._Reader):
        def readinto(self, buffer: memoryview) -> int | None:
            places.append(ctypes.addressof(ctypes.c_char.from_buffer(buffer)))
            return super().readinto(buffer)

    source.open_range = lambda file, start, stop: nullcontext(Reader(source, file.address, start, stop))
    run(source, place)

    assert places
    assert {each % mmap.PAGESIZE for each in places} == {0}


def test_an_empty_listing_ends_at_once(place):
    """
    No page, or pages without files, end at once with nothing.
    """
    assert dict(transfer(Source({}), place).run([])) == {}
    assert dict(transfer(Source({}), place).run([[], []])) == {}
