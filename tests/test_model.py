"""
The protocol against every interleaving of its processes: what holds, and that breaking it is noticed.
"""

from __future__ import annotations

import os
from functools import partial

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from model_checker import (
    CLOSED,
    PARTIAL,
    Checker,
    Claim,
    Explored,
    Files,
    Programs,
    Record,
    ViolationError,
    Volume,
    World,
    ensure,
    fetch,
    read,
    remove,
)

from kserve_pvc._keys import procedures

# How many states are visited of a crowd that is too large to see all; `nox -s soak` visits more.
MOST_STATES = int(os.environ.get("KSERVE_PVC_TEST_STATES", "40_000"))
FEW_STATES = 400_000
# How many steps the eight processes have taken.
STEPS = [0]


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """How often a writer looks changes when it goes on, which the checker tries at every moment anyway."""
    monkeypatch.setattr(procedures, "LOOKS_FOR_A_RECORD", 1)


NOTHING = World()
# One model is there, and its writer is gone.
MODEL = World(
    log=(Record(1, "commit", "0"),),
    slots=frozenset({1}),
    claims=(Claim(1, 9, is_released=True),),
    files=(Files(9, CLOSED),),
    seen_log=1,
)
# A process was killed while it wrote.
WRECK = World(claims=(Claim(1, 9),), files=(Files(9, PARTIAL),))

asks, refreshes = ensure, partial(ensure, refresh=True)


# As production has them; each mutant below changes one.
PROGRAMS, VOLUME = Programs(), Volume()


def explore(
    processes, start, *, programs=PROGRAMS, volume=VOLUME, silences=0, faults=0, most_states=FEW_STATES
) -> Explored:
    checker = Checker([partial(process, programs) for process in processes], volume)
    return checker.explore(start._replace(silences=silences, faults=faults), most_states=most_states)


CROWDS = {
    "on nothing": ([asks, asks, refreshes, read, read, remove], NOTHING, {"silences": 2, "faults": 1}),
    "on a model": ([asks, asks, refreshes, read, read, remove], MODEL, {"silences": 2, "faults": 1}),
    "on what a killed one left": ([asks, asks, refreshes, read, read, remove], WRECK, {"silences": 2, "faults": 1}),
    "two removals and a reader": ([remove, remove, read], MODEL, {}),
    "a removal, one who refreshes and a reader": ([remove, refreshes, read], MODEL, {"silences": 1}),
    "two writers of whom some fall silent": ([asks, refreshes], NOTHING, {"silences": 3, "faults": 1}),
}


# A mistake that this package has made shows as late as this.
AT_LEAST = {"two removals and a reader": 100_000}


@pytest.mark.parametrize("locks_exclude", [True, False], ids=["locks-hold", "locks-lie"])
@pytest.mark.parametrize("crowd", CROWDS)
def test_a_crowd(crowd, locks_exclude):
    """
    In the first so many states that several processes can reach together, no law is broken.
    """
    processes, start, luck = CROWDS[crowd]
    most_states = max(MOST_STATES, AT_LEAST.get(crowd, 0))

    explored = explore(processes, start, volume=Volume(locks_exclude=locks_exclude), **luck, most_states=most_states)

    print(explored)
    assert explored.states >= most_states


SCENES = {
    "two writers on a volume that fails": ([asks, asks], NOTHING, {"faults": 1}),
    "a writer and one who refreshes": ([asks, refreshes], NOTHING, {}),
    "a writer and what a killed one left": ([asks, asks], WRECK, {}),
    "two refresh": ([refreshes, refreshes], MODEL, {}),
    "a removal and two readers": ([remove, read, read], MODEL, {"faults": 1}),
}


@pytest.mark.parametrize("locks_exclude", [True, False], ids=["locks-hold", "locks-lie"])
@pytest.mark.parametrize("scene", SCENES)
def test_a_scene(scene, locks_exclude):
    """
    Every state that a few processes can reach together keeps the laws, up to the end of each.
    """
    processes, start, luck = SCENES[scene]

    explored = explore(processes, start, volume=Volume(locks_exclude=locks_exclude), **luck, most_states=3_000_000)

    print(explored)
    assert explored.is_complete


def test_one_fetch_without_faults():
    """
    L6: while claims exclude and nothing fails, one of three writers fetches.
    """
    explored = explore([asks, asks, asks], NOTHING, volume=Volume(one_fetch=True), most_states=3_000_000)

    print(explored)
    assert explored.is_complete


class EightProcesses(RuleBasedStateMachine):
    """
    Eight processes on one volume, each taking its next step whenever it likes, with luck or without.
    """

    @initialize(start=st.sampled_from([NOTHING, MODEL, WRECK]), locks_exclude=st.booleans())
    def begin(self, start, locks_exclude):
        crowd = [asks, asks, asks, refreshes, read, read, remove, remove]
        self.checker = Checker(
            [partial(process, Programs()) for process in crowd],
            Volume(locks_exclude=locks_exclude, most_generations=50),
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
            for _ in range(400):
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


def collect_whatever_is_unnamed(seq, begun):
    there = yield procedures.ListGenerations()
    yield from procedures.collect_unnamed(there)


def append_by_rename(after_seq, kind, of):
    newest = yield procedures.ReadNewest()
    if newest.seq > after_seq:
        return None
    yield procedures.Publish(after_seq + 1, kind, of)
    return after_seq + 1


def remove_without_a_number(newest, generations):
    yield procedures.Publish(newest.seq + 1, "tombstone", newest)
    for generation in generations:
        yield procedures.Collect(generation)
    return "removed"


ONCE, FOR_ALL, FOR_ALL_ONCE = (
    Volume(one_fetch=True),
    Volume(locks_exclude=False),
    Volume(locks_exclude=False, one_fetch=True),
)
# What is wrong, which law it breaks, and where that shows: who acts, from what start, and with what luck.
MUTANTS = {
    "M1 every claim is granted": ("L6", [asks, asks], NOTHING, {"volume": FOR_ALL_ONCE}),
    "M2 no second look after the claim": (
        "L6",
        [asks, asks],
        NOTHING,
        {"programs": Programs(rechecks=False), "volume": ONCE},
    ),
    "M3 looks up by name": ("L6", [asks, asks], NOTHING, {"volume": Volume(one_fetch=True, looks_up_by_name=True)}),
    "M4 commits before it syncs": (
        "S1",
        [asks, asks],
        NOTHING,
        {"programs": Programs(fetch=partial(fetch, settles=False))},
    ),
    "M5 writes into another's files": (
        "S[23]",
        [asks, asks],
        NOTHING,
        {"programs": Programs(fetch=partial(fetch, continues_anothers=True)), "silences": 3},
    ),
    "M6 collects what no record names": (
        "S1",
        [asks, refreshes],
        NOTHING,
        {"programs": Programs(collect_garbage=collect_whatever_is_unnamed), "volume": FOR_ALL},
    ),
    "M7 does not wait until all see the tombstone": (
        "S6",
        [remove, read],
        MODEL,
        {"volume": Volume(waits_for_visibility=False)},
    ),
    "M8 a reader does not look again": ("S6", [remove, read], MODEL, {"programs": Programs(looks_again=False)}),
    "M9 publishes by replacing": (
        "S4",
        [asks, asks],
        NOTHING,
        {"programs": Programs(append=append_by_rename), "volume": Volume(publish_replaces=True), "silences": 3},
    ),
    "M10 judges beats by stat": ("L6", [asks, asks], NOTHING, {"volume": Volume(one_fetch=True, beats_by_stat=True)}),
    "M11 believes an error, and clears up": (
        "S1",
        [asks, asks],
        NOTHING,
        {"programs": Programs(clears_up_at_once=True), "volume": Volume(believes_errors=True), "faults": 1},
    ),
    "M12 does not hear what close says": (
        "S1",
        [asks, asks],
        NOTHING,
        {"volume": Volume(reports_close=False), "faults": 1},
    ),
    "M13 syncs again after an error": ("S1", [asks, asks], NOTHING, {"volume": Volume(syncs_again=True), "faults": 1}),
    "M14 a tombstone takes no number": (
        "S4",
        [remove, refreshes],
        MODEL,
        {"programs": Programs(remove=remove_without_a_number)},
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(name):
    """
    Mistakes that others have made break a law of this model, so the model can tell.
    """
    law, processes, start, play = MUTANTS[name]

    with pytest.raises(ViolationError, match=f"^{law}:"):
        explore(processes, start, **play)


def test_there_are_fourteen_mutants():
    """
    None is dropped because it survives.
    """
    assert [name.split()[0] for name in MUTANTS] == [f"M{number}" for number in range(1, 15)]
