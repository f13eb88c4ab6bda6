"""
How many streams a transfer finds to be worth while, on sources and networks that are only numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kserve_pvc._download.streams import FIRST_STREAMS, StreamLimit

MB = 1_000_000


class Line:
    """
    A transfer on a clock of its own: `rate` says how many bytes a second so many streams bring, `waiting` which share
    of their time they wait for them.
    """

    def __init__(
        self, limit: StreamLimit, rate: Callable[[int], float], waiting: Callable[[int], float] = lambda streams: 1.0
    ) -> None:
        self.limit, self.rate, self.waiting = limit, rate, waiting
        self.now = self.received = self.waited = 0.0

    def run(self, seconds: float) -> Iterator[int]:
        """The number of streams after each look."""
        end = self.now + seconds
        while self.now < end:
            pause = self.limit.look(self.now, int(self.received), self.waited)
            assert 0 < pause <= 1
            yield self.limit.streams
            self.now += pause
            self.received += self.rate(self.limit.streams) * pause
            self.waited += self.waiting(self.limit.streams) * self.limit.streams * pause


def per_stream(streams: int) -> float:
    return 10 * MB * streams


def full(streams: int) -> float:
    return min(per_stream(streams), 40 * MB)


@pytest.mark.parametrize("most", [1, 2, 4, 7, 32])
def test_a_limit_for_each_connection_is_met_by_more_of_them(most):
    """
    Where each stream is slow there are soon as many as are allowed, and never more.
    """
    streams = list(Line(StreamLimit(most), per_stream).run(5))

    assert (streams[0], streams[-1], max(streams)) == (min(FIRST_STREAMS, most), most, most)
    assert streams == sorted(streams)


def test_a_full_line_gets_no_more_streams():
    """
    A try that brings nothing is taken back, and repeated only now and then.
    """
    streams = list(Line(StreamLimit(32), full).run(20))

    assert set(streams) == {FIRST_STREAMS, 2 * FIRST_STREAMS}
    assert streams.count(2 * FIRST_STREAMS) <= len(streams) / 10


def test_more_streams_that_bring_less_are_taken_back():
    """
    Where streams hinder each other there are soon as few as before.
    """
    streams = list(Line(StreamLimit(32), lambda streams: 40 * MB if streams <= FIRST_STREAMS else 20 * MB).run(4))

    assert (streams[-1], max(streams)) == (FIRST_STREAMS, 2 * FIRST_STREAMS)


def test_a_line_that_becomes_wider_is_used():
    """
    What did not help once is tried again, so that a limit which is gone is found.
    """
    line = Line(StreamLimit(32), full)
    for _ in line.run(20):
        pass
    line.rate = per_stream

    assert list(line.run(10))[-1] == 32


@pytest.mark.parametrize(("waiting", "expected"), [(0.6, 32), (0.4, FIRST_STREAMS)])
def test_busy_streams_get_no_company(waiting, expected):
    """
    Where hashing and writing are the limit, more streams would only take turns.
    """
    streams = list(Line(StreamLimit(32), per_stream, waiting=lambda streams: waiting).run(10))

    assert streams[-1] == expected


def test_streams_become_as_many_as_have_to_wait():
    """
    Streams that waited alone and are kept busy together stay as many as they are.
    """
    streams = list(Line(StreamLimit(32), per_stream, waiting=lambda streams: 1.0 if streams < 16 else 0.1).run(10))

    assert streams[-1] == 16


def test_nothing_received_is_no_reason_for_more():
    """
    As long as no byte has come there is nothing to judge by.
    """
    assert set(Line(StreamLimit(32), lambda streams: 0.0).run(10)) == {FIRST_STREAMS}


def test_a_look_too_early_judges_nothing():
    """
    A second look within a window says when it is over.
    """
    limit = StreamLimit(32)
    limit.look(0.0, 0, 0.0)

    assert [limit.look(0.1, 5 * MB, 0.1), limit.streams] == [pytest.approx(0.15), FIRST_STREAMS]


def test_too_much_halves_the_streams_rests_and_recovers():
    """
    After a refusal there are half as many, for a while no more, and in the end as many as before.
    """
    line = Line(StreamLimit(32), per_stream)
    for _ in line.run(5):
        pass
    line.limit.congested(line.now, 1.0)

    assert set(line.run(4.5)) == {16}
    assert list(line.run(5))[-1] == 32


def test_refusals_at_the_same_time_count_once():
    """
    Refusals of many streams at the same time count like one, later ones again.
    """
    limit = StreamLimit(32)
    line = Line(limit, per_stream)
    for _ in line.run(5):
        pass
    for _ in range(32):
        limit.congested(line.now, 2.0)
    after_one = limit.streams
    limit.congested(line.now + 6, 2.0)

    assert (after_one, limit.streams) == (16, 8)


def test_a_long_retry_after_is_kept_to():
    """
    The rest lasts as long as the pause that the source demands.
    """
    line = Line(StreamLimit(32), per_stream)
    for _ in line.run(5):
        pass
    line.limit.congested(line.now, 30.0)

    assert set(line.run(29)) == {16}


def test_one_stream_is_always_left():
    """
    However often a source refuses, one stream goes on.
    """
    limit = StreamLimit(32)
    for hour in range(20):
        limit.congested(hour * 3600.0, 1.0)

    assert limit.streams == 1


@given(
    most=st.integers(-1, 40),
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("look"), st.floats(0, 3), st.integers(0, 10**9), st.floats(0, 5)),
            st.tuples(st.just("congested"), st.floats(0, 100), st.just(0), st.just(0.0)),
        ),
        max_size=60,
    ),
)
def test_the_number_of_streams_keeps_its_bounds(most, steps):
    """
    Whatever is seen, there are never more streams than allowed nor fewer than one, and the next look is soon.
    """
    limit, now, received, waited = StreamLimit(most), 0.0, 0, 0.0
    for what, seconds, size, more in steps:
        if what == "look":
            now, received, waited = now + seconds, received + size, waited + more
            assert 0 < limit.look(now, received, waited) <= 1
        else:
            limit.congested(now, seconds)
        assert 1 <= limit.streams <= max(1, most)
