"""
Reading from a source that stalls, breaks and refuses.
"""

from __future__ import annotations

import random
import threading
import time
from contextlib import nullcontext
from pathlib import PurePosixPath

import pytest
from transfers import (
    DATA,
    PART,
    Place,
    Recorder,
    Source,
    nothing_left_open,
    run,
    sha256,
    transfer,
)

from kserve_pvc import (
    RemoteFile,
    SourceDeniedError,
    SourceUnavailableError,
)
from kserve_pvc._download.slowness import Slowness


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


def test_a_connection_that_breaks_goes_on_at_the_next_byte(place):
    """
    After a reset in the middle of a part nothing that arrived is requested again.
    """
    source, recorder, broken = Source({"a.bin": DATA}), Recorder(), []

    def break_once(name: str, offset: int) -> bool:
        if offset == 1500 and not broken:
            broken.append(offset)
            raise SourceUnavailableError(name, "connection reset")
        return True

    source.on_read = break_once
    run(source, place, recorder)

    assert place.content() == {"a.bin": DATA}
    assert source.ranges == [
        ("a.bin", 0, PART),
        ("a.bin", PART, 2 * PART),
        ("a.bin", 1500, 2 * PART),
        ("a.bin", 2 * PART, 3 * PART),
    ]
    assert (recorder.received_bytes, recorder.retries) == (len(DATA), 1)


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("digest", ["sha256", "none"])
def test_a_source_that_breaks_all_the_time_is_worn_down(place, workers, digest):
    """
    As long as every try brings something, any number of breaks leaves a file exact.
    """
    data, bits = random.Random(4).randbytes(20 * PART), random.Random(6)
    source, recorder = Source({"a.bin": data, "small": data[:999]}), Recorder()
    last = threading.local()

    def break_often(name: str, offset: int) -> bool:
        is_first = getattr(last, "seen", None) != (name, offset - 100)
        last.seen = (name, offset)
        if not is_first and bits.random() < 0.2:
            raise SourceUnavailableError(name, "reset")
        return True

    source.on_read = break_often
    entries = run(source, place, recorder, workers=workers, digest=digest)

    assert place.content() == source.files
    assert (recorder.received_bytes, recorder.retries > 10) == (20_999, True)
    assert entries[PurePosixPath("a.bin")].sha256 == (sha256(data) if digest == "sha256" else None)


def test_a_response_that_ends_early_is_requested_again(place):
    """
    A short body is not the end of the file.
    """
    source, recorder, cut = Source({"a.bin": DATA}), Recorder(), []

    def cut_once(name: str, offset: int) -> bool:
        if offset == 700 and not cut:
            cut.append(offset)
            return False
        return True

    source.on_read = cut_once
    run(source, place, recorder)

    assert place.content() == {"a.bin": DATA}
    assert recorder.retries == 1


def test_polls_without_a_byte_are_not_a_failure(place):
    """
    A source without bytes for a poll interval is read again on the same connection, and `check` is called meanwhile.
    """
    source, recorder, silent = Source({"a.bin": DATA}), Recorder(), iter([None, None, True] * 100)
    source.on_read = lambda name, offset: next(silent)

    run(source, place, recorder)

    assert (place.content(), recorder.retries, len(source.ranges)) == ({"a.bin": DATA}, 0, 3)
    assert recorder.checks >= 90


def test_a_source_that_is_slow_for_long_fails_the_transfer(place):
    """
    A source that sends steadily, but so little that the model would take days, is given up; what came is noted.
    """
    source, recorder = Source({"a.bin": DATA}, piece=10), Recorder()
    source.on_read = lambda name, offset: time.sleep(0.002) or True

    with pytest.raises(
        SourceUnavailableError, match=r"only \d+ bytes a second came for 0.1 s, of at least 100000"
    ) as e:
        run(source, place, recorder, slow_seconds=0.1, least_bytes_per_second=100_000)

    assert e.value.is_final
    assert recorder.retries == 0


def test_a_rate_is_judged_by_the_time_that_streams_wait():
    """
    The time in which no stream waits for the source, as while the process is stopped, is no time of the source.
    """
    slowness = Slowness(10.0, 100, 0.0)

    assert [slowness.add(float(second), 99) for second in range(1, 11)] == [None] * 9 + [99.0]
    assert [slowness.add(float(second), 101) for second in range(11, 21)] == [None] * 10
    assert slowness.add(10_000.0, 0) is None
    assert [slowness.add(10_000.0 + second, 50) for second in range(1, 10)] == [None] * 8 + [45.0]


@pytest.mark.parametrize("trickle", [0, 20], ids=["silence", "trickle"])
def test_a_connection_that_stalls_is_replaced(place, trickle):
    """
    Silence and next to nothing are both ended after the time of a stall, and what had come is kept.
    """
    source, recorder, stalled = Source({"a.bin": DATA}, piece=10), Recorder(), []

    def stall(name: str, offset: int) -> bool | None:
        if offset >= 1500 + trickle and len(source.ranges) == 2:
            stalled.append(offset)
            time.sleep(0.01)
            return None
        if trickle and offset >= 1500 and len(source.ranges) == 2:
            time.sleep(0.05)
        return True

    source.on_read = stall
    run(source, place, recorder, stall_seconds=0.1)

    assert (place.content(), recorder.retries, bool(stalled)) == ({"a.bin": DATA}, 1, True)
    assert source.ranges[2] == ("a.bin", stalled[-1], 2 * PART)
    assert " bytes of `a.bin` came in " in recorder.reasons[0]


def test_a_source_that_stalls_for_ever_is_given_up(place):
    """
    Connections that stay silent end the transfer like those that break.
    """
    source, recorder = Source({"a.bin": DATA}), Recorder()
    source.on_read = lambda name, offset: time.sleep(0.005)

    with pytest.raises(SourceUnavailableError, match=r"only 0 bytes of `a\.bin` came in"):
        run(source, place, recorder, stall_seconds=0.02)

    assert (len(source.ranges), recorder.retries) == (5, 4)


def test_a_slow_source_is_not_a_stall(place):
    """
    A source that sends more than a trickle within `stall_seconds` is read on, however long it takes.
    """
    source, recorder = Source({"a.bin": DATA}), Recorder()
    source.on_read = lambda name, offset: time.sleep(0.02) or True

    run(source, place, recorder, stall_seconds=0.03)

    assert (place.content(), recorder.retries) == ({"a.bin": DATA}, 0)


def test_a_source_that_stays_away_is_given_up(place):
    """
    Tries without a byte in between are bounded.
    """
    source, recorder = Source({"a.bin": DATA}), Recorder()

    def reset(name: str, offset: int) -> bool:
        raise SourceUnavailableError(name, "connection refused")

    source.on_read = reset
    with pytest.raises(SourceUnavailableError):
        run(source, place, recorder)

    assert (len(source.ranges), recorder.retries) == (5, 4)


def test_bytes_that_arrive_start_the_count_anew(place):
    """
    Four tries without progress, some bytes, and four more tries are no reason to give up.
    """
    source, recorder, tries = Source({"a.bin": DATA[:900]}), Recorder(), []

    def reset(name: str, offset: int) -> bool:
        tries.append(offset)
        if tries.count(offset) < 5 and offset in (0, 100, 800):
            raise SourceUnavailableError(name, "connection refused")
        return True

    source.on_read = reset
    run(source, place, recorder)

    assert (place.content(), recorder.retries) == ({"a.bin": DATA[:900]}, 12)


def test_a_busy_source_is_left_alone_for_as_long_as_it_says(place):
    """
    Retry-After of one range holds back every stream: no range is requested before it is over.
    """
    files = {f"{number:02d}": DATA[:500] for number in range(24)}
    source, recorder, refused, opened_at = Source(files), Recorder(), [], []

    def busy_once(name: str, offset: int) -> bool:
        time.sleep(0.005)
        if name == "02" and not refused:
            refused.append(time.monotonic())
            raise SourceUnavailableError(name, "busy", retry_after=0.5)
        return True

    source.on_read = busy_once
    honest = source.open_range
    source.open_range = lambda *args: (opened_at.append(time.monotonic()), honest(*args))[1]
    run(source, place, recorder, workers=4)

    assert (place.content(), recorder.retries) == (files, 1)
    assert [at for at in opened_at if refused[0] + 0.1 < at < refused[0] + 0.49] == []
    assert max(opened_at) >= refused[0] + 0.5


def test_a_busy_source_is_retried_as_long_as_time_is_left(place):
    """
    Who says that it is busy may say so more often than a connection may break.
    """
    source, recorder = Source({"a.bin": DATA[:500]}), Recorder()

    def busy(name: str, offset: int) -> bool:
        if recorder.retries < 6:
            raise SourceUnavailableError(name, "busy", retry_after=0.01)
        return True

    source.on_read = busy
    run(source, place, recorder)

    assert (place.content(), recorder.retries) == ({"a.bin": DATA[:500]}, 6)


@pytest.mark.parametrize(("retry_after", "least"), [(3600.0, 0.0), (0.1, 0.2)])
def test_the_deadline_bounds_what_a_busy_source_may_demand(place, retry_after, least):
    """
    A wait that would end after the deadline is not begun, and waits together do not go beyond it.
    """
    source, recorder, began = Source({"a.bin": DATA}), Recorder(), time.monotonic()

    def busy(name: str, offset: int) -> bool:
        raise SourceUnavailableError(name, "busy", retry_after=retry_after)

    source.on_read = busy
    with pytest.raises(SourceUnavailableError, match="busy"):
        run(source, place, recorder, retry_seconds=0.35)

    assert least <= time.monotonic() - began < 2


@pytest.mark.parametrize("step", ["bytes", "evidence"])
@pytest.mark.parametrize(
    "error",
    [SourceDeniedError("a", "expired"), SourceUnavailableError("a", "moved", is_final=True)],
    ids=["denied", "final"],
)
def test_errors_that_no_retry_cures_are_not_retried(place, error, step):
    """
    Denied once is denied, and what is final stays so.
    """
    source, recorder, calls = Source({"a.bin": DATA}), Recorder(), []

    def fail(*_: object) -> None:
        calls.append(1)
        raise error

    setattr(source, "on_read" if step == "bytes" else "evidence", fail)
    with pytest.raises(type(error)) as caught:
        run(source, place, recorder, evidence_bytes=1000)

    assert (caught.value, len(calls), recorder.retries) == (error, 1, 0)


def test_a_digest_is_requested_as_patiently_as_bytes(place):
    """
    A source that fails meanwhile is tried again.
    """
    source, recorder = Source({"a.bin": DATA}), Recorder()

    def evidence(file: RemoteFile) -> str:
        if recorder.retries < 3:
            raise SourceUnavailableError("a.bin", "reset")
        return f"sha256:{sha256(DATA)}"

    source.evidence = evidence
    entries = run(source, place, recorder, evidence_bytes=1000)

    assert (recorder.retries, entries[PurePosixPath("a.bin")].evidence) == (3, f"sha256:{sha256(DATA)}")


@pytest.mark.parametrize("works", [True, False])
def test_a_reader_that_works_does_not_wait(place, works):
    """
    Time that a reader spends decrypting is not time it waits for the source: more streams would not help.
    """
    source = Source({"a.bin": DATA})

    class Slow(Source._Reader):
        worked = 5.0  # What the connection did before does not count.

        def readinto(self, buffer: memoryview) -> int | None:
            time.sleep(0.002)
            self.worked += 0.002 if works else 0.0
            return super().readinto(buffer)

    source.open_range = lambda file, start, stop: nullcontext(Slow(source, file.address, start, stop))
    one = transfer(source, place)
    one.run([source.all()])
    reads = len(DATA) / 100

    assert (one.reader.waited < reads * 0.001) is works
    assert one.reader.waited > 0
