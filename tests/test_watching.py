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


def test_many_who_are_silent_are_read_at_the_beginning_and_at_the_end():
    """
    A thousand dead readers are read little more than twice each, and in between some of them at each look.
    """
    watch, reads, now = Watch(4.0), 0, 0.0
    everyone = {f"{number:04}": b"1" for number in range(1000)}
    while True:
        names = everyone if watch.names is None else watch.names
        reads += len(names)
        if (live := watch.look(now, {name: everyone[name] for name in names})) is not None:
            break
        now += watch.pause

    assert live == ()
    assert 2000 < reads <= 2500
    assert now >= 4.0
    assert watch.silent == everyone


@pytest.mark.parametrize("name", ["0000", "0500", "0999"])
@pytest.mark.parametrize("begins", [0.5, 3.9])
def test_one_of_many_who_lives_is_seen(name, begins):
    """
    Whenever it beats and whoever it is: in its turn, or in the last look.
    """
    watch, now = Watch(4.0), 0.0
    everyone = {f"{number:04}": b"1" for number in range(1000)}
    while True:
        everyone[name] = b"2" if now >= begins else b"1"
        names = everyone if watch.names is None else watch.names
        if (live := watch.look(now, {name: everyone[name] for name in names})) is not None:
            break
        now += watch.pause

    assert live == (name,)


def test_those_of_many_who_leave_are_not_waited_for():
    """
    When all but one of a thousand have released their leases, that one alone decides.
    """
    watch, now = Watch(4.0), 0.0
    everyone = {f"{number:04}": b"1" for number in range(1000)}
    while True:
        names = everyone if watch.names is None else watch.names
        here = {name: everyone[name] for name in names if name == "0007" or now < 1.0}
        if (live := watch.look(now, here)) is not None:
            break
        now += watch.pause

    assert live == ()
    assert watch.silent == {"0007": b"1"}
