"""
The protocol against every interleaving of its processes: what holds, and that breaking it is noticed.

The processes are calls of `ModelStore`, as production makes them.
"""

from __future__ import annotations

import os

import attrs
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from model_checker import Checker, Explored, current
from model_processes import (
    Attempt,
    Clock,
    asks,
    breaks,
    commit,
    forces,
    once_present,
    passes,
    reads,
    refreshes,
    removes,
    simulate,
    token_of,
    uploads,
)
from model_volume import (
    CLOSED,
    DEAD,
    PARTIAL,
    Begin,
    Claim,
    Conditions,
    Files,
    ListGenerations,
    Sleep,
    ViolationError,
    World,
)

from kserve_pvc import _store
from kserve_pvc._download import attempt, protocol, publication
from kserve_pvc._keys import claims, procedures, removal

# How many states are visited of a crowd that is too large to see all; `nox -s soak` visits more.
MOST_STATES = int(os.environ.get("KSERVE_PVC_TEST_STATES", "25_000"))
FEW_STATES = 400_000
# No mutant below is caught later than this.
SAME_PLAY = 100_000
# How many steps the eight processes have taken.
STEPS = [0]


@pytest.fixture(autouse=True)
def simulated(monkeypatch):
    """Production runs on the simulated volume."""
    simulate(monkeypatch)


NOTHING = World()
THERE = commit(1, 1, DEAD)
# One model is there, and its writer is gone.
MODEL = World(
    log=(THERE,),
    slots=frozenset({1}),
    claims=(Claim(1, DEAD, is_released=True),),
    files=(Files(THERE.entry.generation, DEAD, CLOSED),),
    seen_log=1,
)
# A process was killed while it wrote.
WRECK = World(claims=(Claim(1, DEAD),), files=(Files(f"{1:012d}-{token_of(DEAD, 1)}", DEAD, PARTIAL),))
# Two were.
WRECKS = World(
    claims=(Claim(2, DEAD),),
    files=tuple(Files(f"{epoch:012d}-{token_of(DEAD, epoch)}", DEAD, PARTIAL) for epoch in (1, 2)),
)

HONEST = Conditions()


def explore(processes, start, *, conditions=HONEST, most_states=FEW_STATES, **luck) -> Explored:
    return Checker(processes, conditions).explore(start._replace(**luck), most_states=most_states)


CROWDS = {
    "on nothing": ([asks, asks, refreshes, reads, reads, removes], NOTHING, {"silences": 1, "faults": 1}),
    "on a model": ([asks, forces, refreshes, reads, reads, removes], MODEL, {"silences": 1, "faults": 1}),
    "on what a killed one left": ([asks, asks, refreshes, reads, reads, removes], WRECK, {"silences": 1, "faults": 1}),
    "on what two killed ones left": ([asks, asks, removes], WRECKS, {"silences": 1}),
    "two removals and a reader": ([removes, removes, reads], MODEL, {}),
    "a removal, one who refreshes and a reader": ([removes, forces, reads], MODEL, {"silences": 1}),
    "two writers on a volume that fails": ([asks, asks], NOTHING, {"faults": 1}),
    "two writers of whom some fall silent": ([asks, refreshes], NOTHING, {"silences": 2, "faults": 1}),
}


@pytest.mark.parametrize("locks_exclude", [True, False], ids=["locks-hold", "locks-lie"])
@pytest.mark.parametrize("crowd", CROWDS)
def test_a_crowd(crowd, locks_exclude):
    """
    In the first so many states that several processes can reach together, no law is broken.
    """
    processes, start, luck = CROWDS[crowd]
    explored = explore(
        processes, start, conditions=Conditions(locks_exclude=locks_exclude), **luck, most_states=MOST_STATES
    )

    print(explored)
    assert explored.is_complete or explored.states >= MOST_STATES


SCENES = {
    "two writers": ([asks, asks], NOTHING, {}),
    "a writer and one who refreshes": ([asks, refreshes], NOTHING, {}),
    "a writer and what a killed one left": ([asks, asks], WRECK, {}),
    "two download anew": ([forces, forces], MODEL, {}),
    "a removal and a reader": ([removes, reads], MODEL, {"faults": 1}),
    "a removal that is stopped, and a reader": ([removes, reads], MODEL, {"stops": 1}),
    "two refresh, and the source moves on": ([refreshes, refreshes, uploads], MODEL, {}),
}


# What is known to be wrong where claims do not exclude.
BROKEN_WITHOUT_LOCKS = {
    "two refresh, and the source moves on": "S5: of two who have reserved numbers, the second publishes what is older"
}


# Collecting leftovers makes too many states where claims do not exclude, as they may be those of live writers.
LARGE_WITHOUT_LOCKS = {"a writer and what a killed one left"}


@pytest.mark.parametrize("locks_exclude", [True, False], ids=["locks-hold", "locks-lie"])
@pytest.mark.parametrize("scene", SCENES)
def test_a_scene(scene, locks_exclude, request):
    """
    Every state that a few processes can reach together keeps the laws, up to the end of each; the first of them where
    there are too many.
    """
    processes, start, luck = SCENES[scene]
    if scene in BROKEN_WITHOUT_LOCKS and not locks_exclude:
        reason = BROKEN_WITHOUT_LOCKS[scene]
        request.applymarker(pytest.mark.xfail(raises=ViolationError, reason=reason, strict=True))

    is_large = scene in LARGE_WITHOUT_LOCKS and not locks_exclude
    most_states = MOST_STATES if is_large else 3_000_000
    explored = explore(
        processes, start, conditions=Conditions(locks_exclude=locks_exclude), **luck, most_states=most_states
    )

    print(explored)
    assert explored.is_complete or (is_large and explored.states >= MOST_STATES)


def test_one_fetch_without_faults():
    """
    L6: while claims exclude and nothing fails, one of three writers fetches.
    """
    for processes in ([asks, asks], [asks, asks, asks]):
        explored = explore(processes, NOTHING, conditions=Conditions(one_fetch=True), most_states=MOST_STATES)

        print(explored)
        assert explored.is_complete or explored.states >= MOST_STATES


class EightProcesses(RuleBasedStateMachine):
    """
    Eight processes on one volume, each taking its next step whenever it likes, with luck or without.
    """

    @initialize(start=st.sampled_from([NOTHING, MODEL, WRECK]), locks_exclude=st.booleans())
    def begin(self, start, locks_exclude):
        crowd = [asks, asks, forces, refreshes, reads, reads, removes, removes]
        self.checker = Checker(
            crowd,
            Conditions(locks_exclude=locks_exclude, most_generations=50),
        )
        self.state = self.checker.start(start._replace(silences=4, faults=3))

    @rule(who=st.integers(0, 7), steps=st.integers(1, 12), luck=st.integers(0, 2))
    def go(self, who, steps, luck):
        for _ in range(steps):
            outcomes = [state for _, state in self.checker.steps(self.state, who)]
            if outcomes:
                self.state = outcomes[luck % len(outcomes)]
                STEPS[0] += 1

    def teardown(self):
        # From wherever this led to, good luck ends it: nobody waits for ever, even for processes that do nothing any
        # more.
        for who in range(8):
            for _ in range(2000):
                self.state = next((state for _, state in self.checker.steps(self.state, who)), self.state)
        assert [who for who in range(8) if any(self.checker.steps(self.state, who))] == []


def test_eight_processes():
    """
    Whatever eight processes do in whichever order, no law is broken, and all of them end.
    """
    STEPS[0] = 0
    count = MOST_STATES // 1000

    run_state_machine_as_test(
        EightProcesses,
        settings=settings(
            max_examples=count, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )

    print(STEPS)
    assert STEPS[0] > count


# What a wrong implementation would do. Each must be noticed.


@attrs.frozen(kw_only=True)
class Mutant:
    """
    What is wrong, which law it breaks, and where that shows: who acts, from what start, with what luck.
    """

    law: str
    processes: list
    start: World = NOTHING
    conditions: Conditions = HONEST
    luck: dict = attrs.Factory(dict)
    patch: tuple | None = None


class Unsettled(Attempt):
    """Neither syncs nor closes."""

    settles = False


class Continuing(Attempt):
    """Writes into what another process left."""

    def begin(self):
        there = current().do(ListGenerations())
        if there:
            self._generation = there[-1]
        else:
            current().do(Begin(self._generation))


def fetches_without_a_second_look(state, event):
    return attrs.evolve(state, phase="fetching", base_seq=event.seq), (protocol.Fetch(),)


def collects_whatever_is_unnamed(seq, begun):
    there = yield procedures.ListGenerations()
    yield from procedures.collect_unnamed(there)


def collects_without_a_record(newest, leftovers):
    for generation in leftovers:
        yield procedures.Collect(generation)
    return True


def appends_by_rename(after_seq, kind, of=None):
    newest = yield procedures.ReadNewest()
    if newest.seq > after_seq:
        return None
    yield procedures.Publish(after_seq + 1, kind, of)
    return after_seq + 1


def removes_and_brings_back_anything(newest, generations):
    before = newest if newest.is_present else None
    while True:
        seq = yield from procedures.append(newest.seq, "tombstone", before)
        if seq is not None and seq == (yield procedures.ReadHighestSlot()):
            break
        generations = yield procedures.ListGenerations()
        newest = yield procedures.ReadNewest()
    yield procedures.AwaitVisibility()
    if (yield procedures.AwaitReaders(tuple(generations))):
        yield from procedures.append(seq, "restore", before)
        return "read"
    for generation in generations:
        yield procedures.Collect(generation)
    return "removed"


def removes_without_a_number(newest, generations):
    yield procedures.Publish(newest.seq + 1, "tombstone", newest)
    for generation in generations:
        yield procedures.Collect(generation)
    return "removed"


class AnyModel:
    """A look at the log that is not made."""

    def __init__(self, *_):
        self.present = self.generation = self

    def __eq__(self, other):
        return True

    __hash__ = None


honest_publish = publication.Publication.publish
honest_collectable = publication.Publication._collectable
honest_read_sign = claims._read_sign
honest_removal = removal.Removal._run


def publishes_and_clears_up_at_once(self, written, after_seq):
    view = honest_publish(self, written, after_seq)
    if view is None:
        self.collect(written.manifest.generation)
    return view


class ListedLater:
    """Lists the generations when they are looked at, which is after the commit."""

    def __init__(self, published, own):
        self._published = published
        self._own = own

    def __iter__(self):
        there = publication.generations(self._published._writer, self._published._key)
        return iter(honest_collectable(self._published, there, self._own))


def lists_later(published, begun, own):
    return ListedLater(published, own)


def signs_without_beats(*of):
    """What the status of a file tells of a beat that is rewritten in place, on a volume that caches it."""
    return attrs.evolve(honest_read_sign(*of), raw=b"always the same")


def watched_for(leases):
    def run(removal_):
        seconds = removal_.settings.lease_seconds * leases / claims.READER_LEASES
        return honest_removal(attrs.evolve(removal_, settings=attrs.evolve(removal_.settings, lease_seconds=seconds)))

    return run


def removes_without_a_look_at_readers(newest, generations):
    honest, answer = procedures.remove(newest, generations), None
    while True:
        try:
            operation = honest.send(answer)
        except StopIteration as end:
            return end.value
        answer = False if isinstance(operation, procedures.AwaitReaders) else (yield operation)


class NoTime(Clock):
    """Nothing is waited for."""

    def sleep(self, seconds):
        pass


class HalfTheTime(Clock):
    """Half as long as it takes."""

    def sleep(self, seconds):
        super().sleep(seconds / 2)


ONCE, FOR_ALL, FOR_ALL_ONCE = (
    Conditions(one_fetch=True),
    Conditions(locks_exclude=False),
    Conditions(locks_exclude=False, one_fetch=True),
)
MUTANTS = {
    "M1 every claim is granted": Mutant(law="L6", processes=[asks, asks], conditions=FOR_ALL_ONCE),
    "M2 no second look after the claim": Mutant(
        law="L6",
        processes=[asks, asks],
        conditions=ONCE,
        patch=(protocol, "_rechecked", fetches_without_a_second_look),
    ),
    "M3 looks up by name": Mutant(law="S1", processes=[asks, asks], conditions=Conditions(looks_up_by_name=True)),
    "M4 commits before it syncs": Mutant(law="S1", processes=[asks, asks], patch=(attempt, "Attempt", Unsettled)),
    "M5 writes into another's files": Mutant(
        law="S[23]", processes=[asks, asks], luck={"silences": 1}, patch=(attempt, "Attempt", Continuing)
    ),
    "M6 collects what no record names": Mutant(
        law="S1",
        processes=[asks, forces],
        conditions=FOR_ALL,
        patch=(publication, "collect_garbage", collects_whatever_is_unnamed),
    ),
    "M7 waits half the time until all see the tombstone": Mutant(
        law="S6", processes=[removes, reads], start=MODEL, patch=(removal, "time", HalfTheTime(Sleep))
    ),
    "M8 a reader does not look again": Mutant(
        law="S6", processes=[removes, reads], start=MODEL, patch=(_store, "read_log", AnyModel)
    ),
    "M9 publishes by replacing": Mutant(
        law="S4",
        processes=[asks, asks],
        conditions=Conditions(publish_replaces=True, locks_exclude=False),
        patch=(publication, "append", appends_by_rename),
    ),
    "M10 judges the beats of downloaders by the status of a file": Mutant(
        law="L6", processes=[asks, asks], conditions=ONCE, patch=(claims, "_read_sign", signs_without_beats)
    ),
    "M11 believes an error, and clears up": Mutant(
        law="S1",
        processes=[asks, asks],
        conditions=Conditions(believes_errors=True),
        luck={"faults": 1},
        patch=(publication.Publication, "publish", publishes_and_clears_up_at_once),
    ),
    "M12 does not hear what close says": Mutant(
        law="S1", processes=[asks, asks], conditions=Conditions(reports_close=False), luck={"faults": 1}
    ),
    "M13 syncs again after an error": Mutant(
        law="S1", processes=[asks, asks], conditions=Conditions(syncs_again=True), luck={"faults": 1}
    ),
    "M14 a tombstone takes no number": Mutant(
        law="S4", processes=[removes, forces], start=MODEL, patch=(removal, "remove", removes_without_a_number)
    ),
    "M15 lists the garbage after the commit": Mutant(
        law="S1",
        processes=[asks, once_present(breaks), once_present(forces)],
        patch=(publication.Publication, "_collectable", lists_later),
    ),
    "M16 watches a silent reader for one lease": Mutant(
        law="S6", processes=[removes, reads], start=MODEL, patch=(removal.Removal, "_run", watched_for(1))
    ),
    "M17 watches a silent reader for three leases": Mutant(
        law="S6", processes=[removes, reads], start=MODEL, patch=(removal.Removal, "_run", watched_for(3))
    ),
    "M18 has readers beat as often as downloaders": Mutant(
        law="S6", processes=[removes, reads], start=MODEL, patch=(claims, "READER_LEASES", 1)
    ),
    "M19 does not look for readers": Mutant(
        law="S6", processes=[removes, reads], start=MODEL, patch=(removal, "remove", removes_without_a_look_at_readers)
    ),
    "M20 does not wait until all see the tombstone": Mutant(
        law="S6", processes=[removes, reads], start=MODEL, patch=(removal, "time", NoTime(None))
    ),
    "M21 judges the beats of readers by the status of a file": Mutant(
        law="S6", processes=[removes, reads], start=MODEL, patch=(claims, "_read_sign", signs_without_beats)
    ),
    "M22 brings back what another removal has buried": Mutant(
        law="S1",
        processes=[removes, removes, passes],
        start=MODEL,
        patch=(removal, "remove", removes_and_brings_back_anything),
    ),
    "M23 collects leftovers without a record": Mutant(
        law="S1",
        processes=[asks, asks],
        start=WRECK,
        conditions=FOR_ALL,
        patch=(publication, "discard_leftovers", collects_without_a_record),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(name, monkeypatch):
    """
    Mistakes that others have made, or that a test did not notice once, break a law of this model.
    """
    mutant = MUTANTS[name]
    if mutant.patch is not None:
        monkeypatch.setattr(*mutant.patch)

    with pytest.raises(ViolationError, match=f"^{mutant.law}:"):
        explore(mutant.processes, mutant.start, conditions=mutant.conditions, most_states=SAME_PLAY, **mutant.luck)


def plays() -> dict:
    """Who acts where, once for all mutants that it catches, unless the volume itself is what is wrong."""
    found = {}
    for name, mutant in MUTANTS.items():
        if (
            mutant.patch is not None
            and not mutant.conditions.publish_replaces
            and not mutant.conditions.believes_errors
        ):
            found.setdefault(repr(attrs.evolve(mutant, law="", patch=None)), name)
    return found


@pytest.mark.parametrize("name", plays().values())
def test_the_same_play_without_the_mistake_breaks_no_law(name):
    """
    What catches a mutant is the mistake alone; and the same mistake in production would be caught here.
    """
    mutant = MUTANTS[name]

    explored = explore(
        mutant.processes, mutant.start, conditions=mutant.conditions, most_states=SAME_PLAY, **mutant.luck
    )

    print(explored)


def test_no_mutant_is_missing():
    """
    None is dropped because it survives.
    """
    assert [name.split()[0] for name in MUTANTS] == [f"M{number}" for number in range(1, 24)]
