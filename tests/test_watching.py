"""
Who is seen to live, and who has been silent for long enough on a clock that stops with its observer.
"""

from __future__ import annotations

import pytest

from kserve_pvc._keys.watching import Watch


def watch_until(watch: Watch, signs, *, step: float | None = None, now: float = 0.0) -> tuple[int, float, object]:
    """
    Look until it is decided: how many looks that took, when it was, and what was decided.
    """
    for looks in range(1, 10_000):
        live = watch.look(now, signs(looks))
        if live is not None:
            return looks, now, live
        now += watch.pause if step is None else step
    raise AssertionError("it was never decided")


def test_nobody_is_not_watched():
    """
    Without leases the first look decides.
    """
    assert watch_until(Watch(10.0), lambda look: {}) == (1, 0.0, ())


@pytest.mark.parametrize("seconds", [0.3, 4.0, 60.0])
def test_the_silent_are_watched_for_all_of_their_term_and_once_more(seconds):
    """
    A sign that stays as it is holds for so many seconds and one more look.
    """
    watch = Watch(seconds)

    looks, now, live = watch_until(watch, lambda look: {"a": b"1"})

    assert live == ()
    assert seconds + watch.pause / 2 <= now <= seconds + 2 * watch.pause
    assert looks >= 20
    assert watch.silent == {"a": b"1"}


@pytest.mark.parametrize("change", ["first", "last", "after"])
def test_a_change_is_life_whenever_it_is_seen(change):
    """
    Also in the look that comes after the last silence was long enough.
    """
    whole, _, _ = watch_until(Watch(4.0), lambda look: {"a": b"1"})
    at = {"first": 2, "last": whole - 1, "after": whole}[change]

    looks, _, live = watch_until(Watch(4.0), lambda look: {"a": b"2" if look >= at else b"1", "b": b"1"})

    assert (looks, live) == (at, ("a",))


@pytest.mark.parametrize("at", [2, 5, 20])
@pytest.mark.parametrize("hours", [0.002, 1, 100])
def test_an_observer_that_was_stopped_goes_on_where_it_was(at, hours):
    """
    However long nothing was observed, it counts as two pauses at most: then others have time to show life.
    """
    watch, now = Watch(4.0), 0.0
    for looks in range(1, 10_000):
        now += hours * 3600 if looks == at else watch.pause
        live = watch.look(now, {"a": b"1"})
        if live is not None:
            break

    undisturbed, _, _ = watch_until(Watch(4.0), lambda look: {"a": b"1"})
    assert undisturbed - 1 <= looks <= undisturbed


def test_looks_that_all_hang_are_counted():
    """
    Where each look takes far longer than a pause it takes as many looks as half of the pauses of a term.
    """
    looks, _, live = watch_until(Watch(4.0), lambda look: {"a": b"1"}, step=50.0)

    assert (looks >= 4.0 / (2 * 0.2), live) == (True, ())


def test_those_who_let_go_or_died_are_not_waited_for():
    """
    A lease that is gone in a later look ends the watch of it.
    """
    assert watch_until(Watch(4.0), lambda look: {"a": b"1"} if look < 3 else {})[0] == 3


def test_a_newcomer_lives():
    """
    A claim that was made while another one was watched is a sign of life.
    """
    assert watch_until(Watch(4.0), lambda look: {"1": b"x"} if look < 3 else {"2": b"y"})[2] == ("2",)


def test_what_cannot_be_read_is_no_silence():
    """
    While the volume fails nothing is known; when it is back the sign has its whole term.
    """
    watch = Watch(4.0)

    looks, _, live = watch_until(watch, lambda look: {"a": None if 3 <= look < 13 else b"1"})

    undisturbed, _, _ = watch_until(Watch(4.0), lambda look: {"a": b"1"})
    assert (looks, live) == (undisturbed + 10, ())


def test_what_can_never_be_read_is_not_deleted():
    """
    A lease that could not be read for a whole term may be alive.
    """
    assert watch_until(Watch(4.0), lambda look: {"a": None})[2] == ("a",)


def test_who_was_silent_once_is_looked_at_twice():
    """
    A second watch takes over what the first has seen, as long as the sign is the same.
    """
    first = Watch(4.0)
    watch_until(first, lambda look: {"a": b"1", "b": b"1"})

    again, _, same = watch_until(Watch(4.0, first.silent), lambda look: {"a": b"1", "b": b"1"})
    moved, _, live = watch_until(Watch(4.0, first.silent), lambda look: {"a": b"1", "b": b"2"})
    woken, _, seen = watch_until(Watch(4.0, first.silent), lambda look: {"a": b"1" if look < 2 else b"2"})

    assert (again, same) == (2, ())
    assert (moved > 20, live) == (True, ())
    assert (woken, seen) == (2, ("a",))
