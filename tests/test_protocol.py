"""
Who may fetch, who waits, who takes over, and when a call is over: each decision by itself, and all of them together.
"""

import math
from collections.abc import Generator

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kserve_pvc._download.protocol import (
    MAX_SPOILED_ATTEMPTS,
    Action,
    Claimed,
    ClaimLost,
    ClaimSeen,
    Event,
    Fetch,
    Fetched,
    GiveUp,
    Locked,
    Look,
    Looked,
    MakeClaim,
    Pause,
    Paused,
    Publish,
    Published,
    Release,
    Return,
    Rules,
    Spoiled,
    TryLock,
    begin,
    step,
)

LEASE = 30.0
RULES = Rules(lease_seconds=LEASE, timeout=3600)
FLOCK = Rules(lease_seconds=LEASE, timeout=3600, lock_decides=True)

UNCLAIMED = "it is unclaimed"
RELEASED = "its holder has released it"
DEAD = "its process no longer exists"
SILENT = "no sign of life for 30 s"
FREE_LOCK = "its lock is free"


def play(*events: Event, rules: Rules = RULES) -> list[tuple[Action, ...]]:
    """
    What the machine decides after each event of one call.
    """
    state, actions = begin(rules)
    assert actions == (Look(),)
    steps = []
    for event in events:
        state, actions = step(state, event)
        steps.append(actions)
    return steps


def look(
    now: float = 0.0,
    *,
    epoch: int | None = None,
    sign: bytes = b"",
    released: bool = False,
    dead: bool = False,
    seq: int = 0,
) -> Looked:
    """
    A look that finds no model, and perhaps a claim.
    """
    claim = None if epoch is None else ClaimSeen(epoch=epoch, sign_of_life=sign, released=released, dead=dead)
    return Looked(now=now, present=False, seq=seq, claim=claim)


def found(now: float = 0.0) -> Looked:
    return Looked(now=now, present=True, seq=1)


def claim(epoch: int, reason: str) -> tuple[Action, ...]:
    return (MakeClaim(epoch=epoch, reason=reason),)


AGAIN = (Release(), Look())
WAIT = (Pause(seconds=0.05),)
WON = Claimed(now=0, won=True)


def test_a_model_that_is_there_is_returned_at_once():
    """
    The first look decides; nothing is claimed, locked or waited for.
    """
    assert play(found()) == [(Return(status="present"),)]
    assert play(found(), rules=FLOCK) == [(Return(status="present"),)]


def test_an_absent_model_is_claimed_checked_fetched_and_published():
    """
    The first caller claims the first number, looks again under its claim, fetches, publishes and lets go.
    """
    steps = play(look(), WON, look(epoch=1, seq=4), Fetched(), Published(won=True))

    assert steps == [
        claim(1, UNCLAIMED),
        (Look(),),
        (Fetch(),),
        (Publish(after_seq=4),),
        (Release(), Return(status="downloaded")),
    ]


def test_what_is_published_follows_the_record_seen_under_the_claim():
    """
    The record number comes from the look after the claim was made, never from an older one.
    """
    steps = play(look(seq=2), WON, look(epoch=1, seq=5), Fetched())

    assert steps[-1] == (Publish(after_seq=5),)


@pytest.mark.parametrize(
    ("seen", "step_taken"),
    [
        (look(), claim(1, UNCLAIMED)),
        (look(epoch=7, released=True), claim(8, RELEASED)),
        (look(epoch=7, dead=True), claim(8, DEAD)),
        (look(epoch=7, sign=b"a"), WAIT),
    ],
    ids=["unclaimed", "released", "dead", "alive"],
)
def test_the_first_look_decides_whether_to_wait(seen, step_taken):
    """
    A key without a claim, or whose holder has released it or provably died, is claimed at once; any other holder is
    waited for.
    """
    assert play(seen) == [step_taken]


def test_a_waiting_call_returns_as_soon_as_the_model_is_there():
    """
    A caller that waited gets the model with the status that says so.
    """
    steps = play(look(0, epoch=1, sign=b"a"), Paused(), look(0.05, epoch=1, sign=b"b"), Paused(), found(0.04))

    assert steps == [WAIT, (Look(),), WAIT, (Look(),), (Return(status="waited"),)]


def test_a_changing_sign_of_life_is_never_taken_over():
    """
    A holder that shows another sign now and then is waited for, however long it takes.
    """
    looks = [look(second, epoch=1, sign=b"%d" % (second // 29)) for second in range(3000)]

    steps = play(*looks)

    assert {type(action) for actions in steps for action in actions} == {Pause}


def test_an_unchanged_sign_of_life_is_taken_over_after_the_lease():
    """
    A claim is dead once its sign has not changed for the whole lease on the observer's own clock, and not
    before.
    """
    seen = [look(now, epoch=4, sign=b"a") for now in (1000.0, 1015.0, 1029.999, 1030.0)]

    steps = play(*seen)

    assert [type(actions[0]) for actions in steps[:3]] == [Pause] * 3
    assert steps[3] == claim(5, SILENT)


@pytest.mark.parametrize(
    "changed", [look(29, epoch=4, sign=b"b"), look(29, epoch=5, sign=b"a"), look(29)], ids=["sign", "number", "gone"]
)
def test_each_change_starts_the_lease_anew(changed):
    """
    A new sign, a new number or a claim that came back all count as life.
    """
    steps = play(
        look(0, epoch=4, sign=b"a"),
        changed,
        Claimed(now=29, won=False),
        look(30, epoch=5, sign=b"b"),
        look(58.9, epoch=5, sign=b"b"),
    )

    assert [type(actions[-1]) for actions in steps[-2:]] == [Pause, Pause]


def test_time_before_the_first_look_does_not_count():
    """
    A sign of life that is seen for the first time is fresh, whatever the clock says.
    """
    steps = play(look(10**6, epoch=1, sign=b"old"))

    assert steps == [WAIT]


def test_a_lost_claim_means_looking_again():
    """
    A process that loses a number releases what it may hold, pauses, looks again, and waits for the winner.
    """
    steps = play(look(), Claimed(now=0, won=False), Paused(), look(0.1, epoch=1, sign=b"a"), Paused(), found(0.2))

    assert steps == [claim(1, UNCLAIMED), (Release(), *WAIT), (Look(),), WAIT, (Look(),), (Return(status="waited"),)]


def test_claims_that_are_lost_for_ever_end_with_the_timeout():
    """
    A number that can never be won, as behind a forged one, does not spin: each loss pauses, and the timeout ends it.
    """
    rules = Rules(lease_seconds=LEASE, timeout=10)

    steps = play(look(0), Claimed(now=0, won=False), look(11), Claimed(now=11, won=False), rules=rules)

    assert steps[-1] == (Release(), GiveUp(reason="timeout", waited=11.0, idle=0.0))


def test_a_model_that_appears_under_the_claim_is_not_fetched_again():
    """
    A look that was stale is made good under the claim: it is given back and the model returned.
    """
    steps = play(look(epoch=1, released=True), WON, found())

    assert steps == [claim(2, RELEASED), (Look(),), (Release(), Return(status="waited"))]


def test_a_higher_claim_under_the_own_one_wins():
    """
    A process that finds a higher number after claiming gives way and waits.
    """
    steps = play(look(), WON, look(0.1, epoch=2, sign=b"a"), look(0.2, epoch=2, sign=b"a"), found(0.3))

    assert steps == [claim(1, UNCLAIMED), (Look(),), AGAIN, WAIT, (Return(status="waited"),)]


@pytest.mark.parametrize("seen", [look(epoch=2), look(epoch=1), look()], ids=["own", "older", "nothing"])
def test_the_own_claim_under_which_nothing_changed_leads_to_a_fetch(seen):
    """
    The own claim, an older one or a listing that shows none yet are no reason not to fetch.
    """
    steps = play(look(epoch=1, dead=True), WON, seen)

    assert steps == [claim(2, DEAD), (Look(),), (Fetch(),)]


def test_a_claim_that_is_lost_during_the_fetch_ends_it():
    """
    A process that lost its claim while fetching publishes nothing and waits for the one that took over.
    """
    steps = play(look(), WON, look(epoch=1), ClaimLost(), look(50, epoch=2, sign=b"a"), Paused(), found(60))

    assert steps[3:] == [AGAIN, (Pause(seconds=1.0),), (Look(),), (Return(status="waited"),)]


def test_a_commit_that_came_second_is_no_failure():
    """
    A process that was not the first to publish returns the other's model, which is just as good.
    """
    steps = play(look(), WON, look(epoch=1), Fetched(), Published(won=False), found())

    assert steps[3:] == [(Publish(after_seq=0),), AGAIN, (Return(status="waited"),)]


def test_a_spoiled_attempt_is_made_again_under_a_new_number():
    """
    When the volume fails a generation a new one is made, a limited number of times, and the failure is then raised.
    """
    events: list[Event] = []
    for attempt in range(MAX_SPOILED_ATTEMPTS):
        events += [look(epoch=attempt, released=True), WON, look(epoch=attempt + 1), Spoiled()]

    steps = play(*events)

    assert [steps[i][0] for i in (0, 4, 8)] == [MakeClaim(epoch=epoch, reason=RELEASED) for epoch in (1, 2, 3)]
    assert steps[3::4] == [AGAIN, AGAIN, (Release(), GiveUp(reason="volume"))]


def test_spoiled_attempts_add_up_over_a_whole_call():
    """
    Other people's downloads in between do not reset the count, so a broken volume ends every call.
    """
    spoiled = [look(), WON, look(epoch=1), Spoiled()]
    lost = [look(), Claimed(now=0, won=False), look(epoch=1, released=True), WON, look(epoch=2), ClaimLost()]

    steps = play(*spoiled, *lost, *spoiled, *lost, *spoiled)

    assert steps[-1] == (Release(), GiveUp(reason="volume"))
    assert sum(isinstance(action, GiveUp) for actions in steps for action in actions) == 1


def test_waiting_ends_with_the_timeout():
    """
    A call that has waited long enough says how long that was and how long the holder has been silent.
    """
    rules = Rules(lease_seconds=LEASE, timeout=10)

    steps = play(
        look(100, epoch=1, sign=b"a"),
        look(104, epoch=1, sign=b"b"),
        look(109.5, epoch=1, sign=b"b"),
        look(110, epoch=1, sign=b"b"),
        rules=rules,
    )

    assert steps[2:] == [(Pause(seconds=0.475),), (GiveUp(reason="timeout", waited=10.0, idle=6.0),)]


def test_a_timeout_of_zero_never_waits():
    """
    With no time to wait the first look decides between the model, an own download and giving up.
    """
    rules = Rules(lease_seconds=LEASE, timeout=0)

    assert play(look(5, epoch=1, sign=b"a"), rules=rules) == [(GiveUp(reason="timeout", waited=0.0, idle=0.0),)]
    assert play(found(5), rules=rules) == [(Return(status="present"),)]
    assert play(look(5), rules=rules) == [claim(1, UNCLAIMED)]
    assert play(look(5, epoch=1, released=True), rules=rules) == [claim(2, RELEASED)]


def test_a_model_that_is_there_beats_the_timeout():
    """
    A look after the timeout that finds the model returns it.
    """
    rules = Rules(lease_seconds=LEASE, timeout=10)

    assert play(look(0, epoch=1, sign=b"a"), found(99), rules=rules)[-1] == (Return(status="waited"),)


def test_a_dead_holder_beats_the_timeout():
    """
    A look after the timeout that finds the claim free takes it.
    """
    rules = Rules(lease_seconds=LEASE, timeout=10)

    assert play(look(0, epoch=1, sign=b"a"), look(99, epoch=1, sign=b"a", dead=True), rules=rules)[-1] == claim(2, DEAD)


@pytest.mark.parametrize("stopped", [LEASE, 3600, 10**6])
def test_a_waiter_that_was_stopped_does_not_take_over_at_once(stopped):
    """
    However long this process was stopped, or the volume hung, the holder has half a lease to show a sign of life.
    """
    rules = attrs.evolve(RULES, timeout=math.inf)
    began, half = look(0, epoch=1, sign=b"a"), LEASE / 2

    silent = play(
        began,
        look(stopped, epoch=1, sign=b"a"),
        look(stopped + half - 0.001, epoch=1, sign=b"a"),
        look(stopped + half, epoch=1, sign=b"a"),
        rules=rules,
    )

    assert [type(actions[-1]) for actions in silent] == [Pause, Pause, Pause, MakeClaim]


def test_a_holder_that_dies_while_it_is_waited_for_is_taken_over_at_the_next_look():
    """
    A dead process changes nothing in its claim, and is taken over all the same before its lease is over.
    """
    assert play(look(0, epoch=1, sign=b"a"), look(0.1, epoch=1, sign=b"a", dead=True))[-1] == claim(2, DEAD)


def test_an_endless_timeout_waits_for_ever():
    """
    With `math.inf` no time is too long.
    """
    rules = Rules(lease_seconds=LEASE, timeout=math.inf)

    steps = play(look(0, epoch=1, sign=b"a"), look(10**9, epoch=1, sign=b"b"), rules=rules)

    assert steps == [WAIT, (Pause(seconds=1.0),)]


def test_the_time_to_wait_begins_with_the_first_look():
    """
    Losing a claim or a fetch does not give a call its time anew.
    """
    rules = Rules(lease_seconds=LEASE, timeout=10)

    steps = play(look(0), WON, look(1, epoch=1), ClaimLost(), look(10, epoch=2, sign=b"a"), rules=rules)

    assert steps[-1] == (GiveUp(reason="timeout", waited=10.0, idle=0.0),)


@given(
    lease=st.floats(0.1, 3600),
    timeout=st.floats(0, 10**5) | st.just(math.inf),
    start=st.floats(0, 10**6),
    share=st.floats(0, 1, exclude_max=True),
)
def test_a_pause_is_bounded_on_every_side(lease, timeout, start, share):
    """
    A pause takes no longer than a second, a quarter of the lease, and the time that is left, and never no time at all.
    """
    now = start + share * min(timeout, 10**6)
    left = timeout - (now - start)
    rules = Rules(lease_seconds=lease, timeout=timeout)

    *_, (action,) = play(look(start, epoch=1, sign=b"a"), look(now, epoch=1, sign=b"b"), rules=rules)

    if left <= 0:
        assert action == GiveUp(reason="timeout", waited=now - start, idle=0.0)
    else:
        assert isinstance(action, Pause)
        assert 0 < action.seconds <= min(1.0, lease / 4, max(left, 0.001))


@pytest.mark.parametrize(
    ("waited", "pause"), [(0.0, 0.05), (0.2, 0.05), (2.0, 0.1), (10.0, 0.5), (20.0, 1.0), (3000.0, 1.0)]
)
def test_a_pause_is_a_twentieth_of_the_wait(waited, pause):
    """
    The last waiter is ready within 5 % of the download it waited for, and a short download costs no long pause.
    """
    *_, actions = play(look(0, epoch=1, sign=b"a"), look(waited, epoch=1, sign=b"b"))

    assert actions == (Pause(seconds=pytest.approx(pause)),)


@pytest.mark.parametrize(
    ("lease", "timeout", "pause"), [(0.4, 3600, 0.1), (LEASE, 20.25, 0.25), (LEASE, 20.0001, 0.001)]
)
def test_a_pause_ends_before_lease_and_timeout(lease, timeout, pause):
    """
    A short lease is looked at four times, and the last pause ends with the time to wait.
    """
    rules = Rules(lease_seconds=lease, timeout=timeout)

    *_, actions = play(look(0, epoch=1, sign=b"a"), look(20, epoch=1, sign=b"b"), rules=rules)

    assert actions == (Pause(seconds=pytest.approx(pause)),)


def test_an_outside_lock_is_tried_before_anything_is_claimed():
    """
    Where a lock decides, it is tried first, and the claim that follows only says who downloads.
    """
    steps = play(look(), Locked(now=0, granted=True), WON, look(epoch=1), Fetched(), Published(won=True), rules=FLOCK)

    assert steps == [
        (TryLock(),),
        claim(1, FREE_LOCK),
        (Look(),),
        (Fetch(),),
        (Publish(after_seq=0),),
        (Release(), Return(status="downloaded")),
    ]


def test_a_lock_that_is_not_granted_is_waited_for():
    """
    Where a lock decides, a holder that shows signs of life is waited for, however long it takes.
    """
    events: list[Event] = []
    for now, sign in ((0, b"a"), (20, b"b"), (500, b"c")):
        events += [look(now, epoch=1, sign=sign), Locked(now=now, granted=False), Paused()]

    steps = play(*events, found(501), rules=FLOCK)

    assert steps == [
        (TryLock(),),
        WAIT,
        (Look(),),
        *[(TryLock(),), (Pause(seconds=1.0),), (Look(),)] * 2,
        (Return(status="waited"),),
    ]


@pytest.mark.parametrize("seen", [look(epoch=6, released=True), look(epoch=6, dead=True)], ids=["released", "dead"])
def test_a_granted_lock_of_one_who_is_gone_takes_the_next_number(seen):
    """
    With the lock, the claim of a holder that has released it or provably died is superseded at once.
    """
    assert play(seen, Locked(now=0, granted=True), rules=FLOCK) == [(TryLock(),), claim(7, FREE_LOCK)]


def test_a_granted_lock_of_a_silent_holder_takes_the_next_number_after_a_third_of_the_lease():
    """
    A holder with six heartbeats a lease has missed two once its sign is unchanged for a third of it: then the lock
    is trusted, and not before.
    """
    events: list[Event] = []
    for now in (1000.0, 1005.0, 1009.999, 1010.0):
        events += [look(now, epoch=6, sign=b"a"), Locked(now=now, granted=True)]

    steps = play(*events, rules=FLOCK)

    assert steps[0::2] == [(TryLock(),)] * 4
    assert [type(actions[0]) for actions in steps[1:7:2]] == [Pause] * 3
    assert steps[7] == claim(7, FREE_LOCK)


@pytest.mark.parametrize(
    "seen", [look(epoch=6, released=True), look(epoch=6, dead=True), look()], ids=["released", "dead", "unclaimed"]
)
def test_a_lock_that_is_held_is_stronger_than_a_claim_that_is_free(seen):
    """
    Where a lock decides, a process that does not get it waits, even if no claim stands in the way.
    """
    assert play(seen, Locked(now=0, granted=False), rules=FLOCK) == [(TryLock(),), WAIT]


@pytest.mark.parametrize(
    ("seen", "granted", "silence", "epoch", "reason"),
    [
        ({"epoch": 6, "sign": b"a"}, False, LEASE, 7, "no sign of life for 30 s"),
        ({"epoch": 6, "released": True}, False, LEASE / 3, 7, "its holder has released it"),
        ({"epoch": 6, "dead": True}, False, LEASE / 3, 7, "its process no longer exists"),
        ({}, False, LEASE, 1, "no sign of life for 30 s"),
        ({"epoch": 6, "sign": b"a"}, None, LEASE, 7, "no sign of life for 30 s"),
    ],
    ids=["silent", "released", "dead", "unclaimed", "no lock"],
)
def test_a_lock_that_stays_away_holds_nobody_up_for_ever(seen, granted, silence, epoch, reason):
    """
    A lock that a silent process keeps, or that is unavailable, is passed over, and not before its time.
    """
    events: list[Event] = []
    for now in (1000.0, 1000.0 + silence / 2, 1000.0 + silence - 0.001, 1000.0 + silence):
        events += [look(now, **seen), Locked(now=now, granted=granted)]

    steps = play(*events, rules=FLOCK)

    assert [type(actions[-1]) for actions in steps[1:7:2]] == [Pause] * 3
    assert steps[7] == claim(epoch, reason)


@pytest.mark.parametrize(
    ("seen", "epoch", "reason"),
    [
        ({"epoch": 6, "released": True}, 7, "its holder has released it"),
        ({"epoch": 6, "dead": True}, 7, "its process no longer exists"),
        ({}, 1, "it is unclaimed"),
    ],
    ids=["released", "dead", "unclaimed"],
)
def test_without_a_lock_the_claim_is_the_lock(seen, epoch, reason):
    """
    Where no lock is available a free claim is taken at once, as with the locker `lease`.
    """
    assert play(look(**seen), Locked(now=0, granted=None), rules=FLOCK) == [(TryLock(),), claim(epoch, reason)]


def test_a_granted_lock_that_is_not_believed_ends_with_the_timeout():
    """
    With no time to wait a granted lock beside a claim that may still be alive is given up.
    """
    rules = Rules(lease_seconds=LEASE, timeout=0, lock_decides=True)

    steps = play(look(0, epoch=6, sign=b"a"), Locked(now=1, granted=True), rules=rules)

    assert steps[-1] == (GiveUp(reason="timeout", waited=1.0, idle=1.0),)


def test_waiting_for_a_lock_ends_with_the_timeout():
    """
    Where a lock decides, the time to wait ends the call too.
    """
    rules = Rules(lease_seconds=LEASE, timeout=10, lock_decides=True)

    steps = play(
        look(0, epoch=1, sign=b"a"),
        Locked(now=1, granted=False),
        look(9, epoch=1, sign=b"a"),
        Locked(now=12, granted=False),
        rules=rules,
    )

    assert steps[-1] == (GiveUp(reason="timeout", waited=12.0, idle=12.0),)


def test_a_lock_is_given_back_with_a_claim_that_was_not_won():
    """
    A process that holds the lock and loses the number releases the lock before looking again.
    """
    steps = play(look(), Locked(now=0, granted=True), Claimed(now=0, won=False), rules=FLOCK)

    assert steps[-1] == (Release(), *WAIT)


def test_a_lock_that_is_granted_beside_a_beating_holder_is_not_believed():
    """
    Where locks do nothing, heartbeats decide: a granted lock takes over only from a sign that is unchanged.
    """
    beating = [
        look(0, epoch=1, sign=b"a"),
        Locked(now=0, granted=True),
        look(9, epoch=1, sign=b"b"),
        Locked(now=9, granted=True),
    ]
    silent = [look(20, epoch=1, sign=b"b"), Locked(now=20, granted=True)]

    steps = play(*beating, *silent, rules=FLOCK)

    assert [type(actions[-1]) for actions in steps[1::2]] == [Pause, Pause, MakeClaim]


# From here on: several callers on one small model of a volume, every order of their steps, and every kind of fault.

PARTS = 3
LONGEST_PAUSE = 1.0
Steps = Generator[None, None, Event | None]


@attrs.define(eq=False)
class Held:
    """A claim on the volume: whose it is, and what its heart last wrote."""

    owner: "Caller"
    beats: int = 0
    released: bool = False


@attrs.define(eq=False)
class Caller:
    """One call somewhere: what it does next, how it ended, and what has befallen it."""

    steps: Steps | None = None
    wakes: float = 0.0
    outcome: str | None = None
    saw_model: bool = False
    epoch: int = 0
    renewed: float = 0.0
    superseded: bool = False
    spoiled: int = 0
    frozen: bool = False
    crashed: bool = False

    @property
    def is_running(self) -> bool:
        return self.outcome is None and not self.crashed and not self.frozen


class Volume:
    """
    A volume with honest exclusive creates, a clock, and a lock that is honest or granted to everybody. Its log begins
    with a removed model.
    """

    def __init__(self, rules: Rules, *, shows_death: bool = False, lock_lies: bool = False, parts: int = PARTS) -> None:
        self.rules = rules
        self.shows_death = shows_death
        self.lock_lies = lock_lies
        self.parts = parts
        self.now = 0.0
        self.log = {1: "commit", 2: "tombstone"}
        self.claims: dict[int, Held] = {}
        self.lock: Caller | None = None
        self.callers: list[Caller] = []
        self.fetches: list[float] = []
        self.faults = 0

    def start(self) -> Caller:
        caller = Caller()
        caller.steps = self._call(caller)
        self.callers.append(caller)
        return caller

    def _call(self, me: Caller) -> Steps:
        """Do what the machine says; every `yield` is a place where anything else may happen."""
        state, actions = begin(self.rules)
        while me.outcome is None:
            for action in actions:
                yield
                event = yield from self._do(me, action)
            if event is not None:
                state, actions = step(state, event)
        return None

    def _do(self, me: Caller, action: Action) -> Steps:
        match action:
            case Look():
                seq = max(self.log)
                yield
                present = self.log[seq] == "commit"
                me.saw_model |= present
                return Looked(now=self.now, present=present, seq=seq, claim=None if present else self._claim_seen())
            case TryLock():
                self.lock = self.lock or me
                return Locked(now=self.now, granted=self.lock_lies or self.lock is me)
            case MakeClaim(epoch=epoch):
                if epoch in self.claims:
                    return Claimed(now=self.now, won=False)
                self.claims[epoch] = Held(owner=me)
                me.epoch, me.renewed, me.superseded = epoch, self.now, False
                return Claimed(now=self.now, won=True)
            case Fetch():
                return (yield from self._fetch(me))
            case Publish(after_seq=after_seq):
                if after_seq + 1 in self.log:
                    return Published(won=False)
                self.log[after_seq + 1] = "commit"
                me.saw_model = True
                return Published(won=True)
            case Pause(seconds=seconds):
                me.wakes = self.now + seconds
                yield
                return Paused()
            case Release():
                self._release(me)
            case Return(status=status):
                me.outcome = status
            case GiveUp(reason=reason):
                me.outcome = reason
        return None

    def _claim_seen(self) -> ClaimSeen | None:
        if not self.claims:
            return None
        epoch, held = max(self.claims.items())
        dead = self.shows_death and held.owner.crashed
        return ClaimSeen(epoch=epoch, sign_of_life=b"%d" % held.beats, released=held.released, dead=dead)

    def _fetch(self, me: Caller) -> Steps:
        self.fetches.append(self.now)
        for _ in range(self.parts):
            yield
            if me.spoiled:
                me.spoiled -= 1
                return Spoiled()
            if me.superseded or self.now - me.renewed > self.rules.lease_seconds * 2 / 3:
                return ClaimLost()
        return Fetched()

    def _release(self, me: Caller) -> None:
        if me.epoch:
            self.claims[me.epoch].released = True
        if self.lock is me:
            self.lock = None

    def run(self, caller: Caller) -> None:
        """Let a caller do one thing that nothing can come between."""
        if caller.is_running and caller.wakes <= self.now:
            assert caller.steps is not None
            next(caller.steps, None)

    def advance(self, seconds: float) -> None:
        """Let time pass, in which every heart of a living process beats."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + self.rules.lease_seconds / 6)
            for epoch, held in self.claims.items():
                if held.owner.is_running and not held.released and held.owner.epoch == epoch:
                    held.beats += 1
                    held.owner.renewed = self.now
                    held.owner.superseded |= max(self.claims) > epoch

    def crash(self, caller: Caller) -> None:
        if caller.outcome is None and not caller.crashed:
            caller.crashed = True
            self.faults += 1
            if self.lock is caller:
                self.lock = None

    def freeze(self, caller: Caller) -> None:
        if caller.is_running:
            caller.frozen = True
            self.faults += 1

    def spoil(self, caller: Caller) -> None:
        if caller.is_running:
            caller.spoiled += 1
            self.faults += 1

    def finish(self) -> None:
        """Run all processes until they have ended; time passes only while all of them pause."""
        deadline = self.now + self.rules.lease_seconds + 3 * LONGEST_PAUSE
        rounds = 0
        while running := [caller for caller in self.callers if caller.is_running]:
            rounds += 1
            assert rounds < 10_000, "a process never pauses"
            assert self.now <= deadline, "it takes longer than a lease and a few looks"
            for caller in running:
                self.run(caller)
            self.advance(
                max(0.0, min((caller.wakes for caller in running if caller.is_running), default=self.now) - self.now)
            )

    @property
    def outcomes(self) -> list[str | None]:
        return [caller.outcome for caller in self.callers]


who = st.integers(0, 3)
ordinary = st.one_of(
    st.tuples(st.just("run"), who, st.integers(1, 12)),
    st.tuples(st.just("run"), who, st.integers(1, 3)),
    st.tuples(st.just("advance"), st.floats(0.01, 70), st.none()),
)
faults = st.tuples(st.sampled_from(["crash", "freeze", "thaw", "spoil"]), who, st.none())


def act(volume: Volume, what: str, argument: float, times: int | None) -> None:
    if what == "advance":
        volume.advance(argument)
        return
    caller = volume.callers[int(argument)]
    match what:
        case "run":
            for _ in range(times or 0):
                volume.run(caller)
        case "crash":
            volume.crash(caller)
        case "freeze":
            volume.freeze(caller)
        case "spoil":
            volume.spoil(caller)
        case "thaw":
            caller.frozen = False


deciding = pytest.mark.parametrize("lock_decides", [False, True], ids=["lease", "lock"])


@deciding
@settings(deadline=None)
@given(schedule=st.lists(ordinary, max_size=60), shows_death=st.booleans())
def test_without_faults_exactly_one_caller_fetches(lock_decides, schedule, shows_death):
    """
    In whatever order four callers take their steps and however slow each of them is, one fetches once and all get the
    model.
    """
    volume = Volume(Rules(lease_seconds=LEASE, timeout=math.inf, lock_decides=lock_decides), shows_death=shows_death)
    for _ in range(4):
        volume.start()

    for what in schedule:
        act(volume, *what)
    volume.finish()

    assert len(volume.fetches) == 1
    assert volume.log == {1: "commit", 2: "tombstone", 3: "commit"}
    assert volume.outcomes.count("downloaded") == 1
    assert set(volume.outcomes) <= {"downloaded", "waited", "present"}


@deciding
@settings(deadline=None, max_examples=300)
@given(schedule=st.lists(ordinary | faults, max_size=60), shows_death=st.booleans())
def test_whatever_happens_one_record_is_written_and_whoever_lives_gets_it(lock_decides, schedule, shows_death):
    """
    However callers crash, freeze, come back and fail, there is one new record, each fault costs at most one more fetch,
    no process returns without having seen the model, and the living end within a lease and a few looks.
    """
    volume = Volume(Rules(lease_seconds=LEASE, timeout=math.inf, lock_decides=lock_decides), shows_death=shows_death)
    for _ in range(4):
        volume.start()

    for what in schedule:
        act(volume, *what)
    late = volume.start()
    if not lock_decides:
        volume.finish()  # Without those who are frozen: only a lock makes the others wait for them.
    for caller in volume.callers:
        caller.frozen = False
    volume.finish()

    assert volume.log == {1: "commit", 2: "tombstone", 3: "commit"}
    assert len(volume.fetches) <= 1 + volume.faults
    assert [c.saw_model for c in volume.callers if c.outcome in ("present", "waited", "downloaded")] == [
        True for c in volume.callers if not c.crashed and c.outcome != "volume"
    ]
    assert late.outcome in ("present", "waited", "downloaded")
    assert volume.outcomes.count("downloaded") <= 1


@settings(deadline=None, max_examples=300)
@given(schedule=st.lists(ordinary | faults, max_size=60), shows_death=st.booleans())
def test_a_lock_that_everybody_gets_costs_fetches_and_nothing_else(schedule, shows_death):
    """
    Where locks do nothing there is one new record all the same, no process returns without having seen the model, and
    the living end within a lease and a few looks.
    """
    rules = Rules(lease_seconds=LEASE, timeout=math.inf, lock_decides=True)
    volume = Volume(rules, shows_death=shows_death, lock_lies=True)
    for _ in range(4):
        volume.start()

    for what in schedule:
        act(volume, *what)
    late = volume.start()
    volume.finish()
    for caller in volume.callers:
        caller.frozen = False
    volume.finish()

    assert volume.log == {1: "commit", 2: "tombstone", 3: "commit"}
    assert [c.saw_model for c in volume.callers if c.outcome in ("present", "waited", "downloaded")] == [
        True for c in volume.callers if not c.crashed and c.outcome != "volume"
    ]
    assert late.outcome in ("present", "waited", "downloaded")
    assert volume.outcomes.count("downloaded") <= 1


@pytest.mark.parametrize("shows_death", [False, True], ids=["elsewhere", "neighbour"])
@pytest.mark.parametrize("lease", [0.4, 4.0, 30.0, 60.0])
@pytest.mark.parametrize("steps", [4, 6, 7, 8, 9, 10])
def test_a_dead_holder_is_replaced_within_its_lease_and_one_pause(lease, steps, shows_death):
    """
    Wherever a holder dies, the first of those who wait fetches no later than a lease and one pause after it began to
    wait, or at once if the death can be proved; the others wait for it.
    """
    volume = Volume(Rules(lease_seconds=lease, timeout=math.inf), shows_death=shows_death)
    holder = volume.start()
    for _ in range(steps):
        volume.run(holder)
    volume.crash(holder)
    began = volume.now
    fetched_before = len(volume.fetches)
    for _ in range(3):
        volume.start()

    volume.finish()

    assert holder.epoch == 1
    assert sorted(volume.outcomes[1:]) == ["downloaded", "waited", "waited"]
    assert len(volume.fetches) == fetched_before + 1
    patience = 0 if shows_death else lease
    assert patience <= volume.fetches[-1] - began <= patience + min(LONGEST_PAUSE, lease / 4)


def test_a_lock_that_everybody_gets_still_leads_to_one_download():
    """
    Where locks do nothing and each part takes longer than a heartbeat, the second caller waits for the first.
    """
    volume = Volume(Rules(lease_seconds=LEASE, timeout=math.inf, lock_decides=True), lock_lies=True, parts=50)
    callers = [volume.start(), volume.start()]

    while any(caller.is_running for caller in callers) and volume.now < 1000:
        for caller in callers:
            volume.run(caller)
        volume.advance(LEASE / 5)

    assert (volume.outcomes, len(volume.fetches)) == (["downloaded", "waited"], 1)
