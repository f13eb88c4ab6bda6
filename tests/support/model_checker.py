"""
A model checker: every interleaving of several processes on one simulated volume, breadth first.

The processes run production code. What it does to the volume is an operation, whose answer is chosen by the checker.
A process is run from its beginning with the answers so far, up to the operation after them; there it is identified by
where it stands in its code and by its variables, so two ways to the same situation are one state.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from pathlib import PurePath
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, GeneratorType, MethodType, ModuleType
from typing import Any

from attrs import field, frozen
from model_volume import AGAIN, Conditions, ViolationError, World, outcomes

Program = Callable[[], object]
# Where each process stands, and the volume.
State = tuple[tuple[int, ...], World]
CameFrom = dict[State, tuple[State, str] | None]


class EndOfAnswersError(BaseException):
    """
    The process has no answer for its next operation. Not an `Exception`, so that no handler catches it.
    """


class Run:
    """
    One run of one process. `now` is its monotonic clock.

    Args:
        answer: Answers an operation that is local, once the other answers are used up.
    """

    def __init__(self, who: int, answers: Sequence[Hashable], answer: Callable[[Any], Hashable]) -> None:
        self.who = who
        self.now = 0.0
        self.tokens = 0
        self.is_late = False
        self.returned: dict[Any, int] = {}
        self.operation: Any = None
        self.situation: Hashable = None
        self._answers = iter(answers)
        self._answer = answer
        self.local: list[tuple[Any, Hashable]] = []

    def do(self, operation: Any) -> Any:
        """
        Return the answer to an operation.

        Raises:
            EndOfAnswersError: There is none. What is done while the process unwinds counts no more.
        """
        if self.operation is None:
            for answer in self._answers:
                return answer
            if is_local(operation):
                self.local.append((operation, self._answer(operation)))
                return self.local[-1][1]
            self.operation = operation
            own = (self.now, self.tokens, self.is_late, tuple(sorted(self.returned.items())))
            self.situation = (operation, own, _stack(sys._getframe(1)))
        raise EndOfAnswersError


_current: list[Run] = []


def current() -> Run:
    """
    The process that runs now.
    """
    return _current[-1]


def is_local(operation: Any) -> bool:
    return getattr(operation, "local", False)


class Checker:
    """
    Explores what some processes can do to each other on one volume.
    """

    def __init__(self, programs: Sequence[Program], conditions: Conditions) -> None:
        self._machines = [_Machine(who, program) for who, program in enumerate(programs)]
        self._conditions = conditions

    def start(self, world: World) -> State:
        return tuple(0 for _ in self._machines), world

    def steps(self, state: State, who: int) -> Iterator[tuple[str, State]]:
        """
        What the next operation of one process may lead to, the lucky outcome first; nothing, if it has ended.

        Raises:
            ViolationError: A law does not hold.
        """
        places, world = state
        operation = self._machines[who].operations[places[who]]
        if operation is None:
            return
        try:
            for answer, after in outcomes(self._conditions, world, who, operation):
                place, world = (places[who], after) if answer is AGAIN else self._go(who, places[who], answer, after)
                yield f"{who}: {operation} -> {answer}", ((*places[:who], place, *places[who + 1 :]), world)
        except ViolationError as violation:
            raise ViolationError(f"{violation}\n{who}: {operation}") from None

    def _go(self, who: int, place: int, answer: Hashable, world: World) -> tuple[int, World]:
        """Where a process stands after an answer, with all that is local after it."""
        machine = self._machines[who]
        after = world

        def answer_local(operation: Any) -> Hashable:
            nonlocal after
            [(found, after)] = outcomes(self._conditions, after, who, operation)
            return found

        place = machine.next(place, answer, answer_local)
        while is_local(operation := machine.operations[place]):
            [(answer, world)] = outcomes(self._conditions, world, who, operation)
            after = world
            place = machine.next(place, answer, answer_local)
        return place, world

    def explore(self, world: World, *, most_states: int) -> Explored:
        """
        Visit states breadth first, from one on, until all are seen or so many.

        Raises:
            ViolationError: A law does not hold; the message tells the shortest way there.
        """
        start = self.start(world)
        came_from: CameFrom = {start: None}
        level, transitions, depth = [start], 0, 0
        while level:
            following = []
            for state in level:
                for label, successor in self._successors(state, came_from):
                    transitions += 1
                    if successor not in came_from:
                        came_from[successor] = (state, label)
                        following.append(successor)
                if len(came_from) >= most_states:
                    return Explored(len(came_from), transitions, depth, is_complete=False)
            level, depth = following, depth + 1
        return Explored(len(came_from), transitions, depth, is_complete=True)

    def _successors(self, state: State, came_from: CameFrom) -> Iterator[tuple[str, State]]:
        try:
            for who in range(len(self._machines)):
                yield from self.steps(state, who)
        except ViolationError as violation:
            law, step = str(violation).split("\n")
            raise ViolationError("\n".join([law, *_way(state, came_from), step])) from None


@frozen
class Explored:
    states: int
    transitions: int
    depth: int
    is_complete: bool = field(kw_only=True)


def _way(state: State, came_from: CameFrom) -> list[str]:
    steps = []
    while (before := came_from[state]) is not None:
        state, label = before
        steps.append(label)
    return steps[::-1]


class _Machine:
    """
    One program as the automaton it is: its situations are numbered, and each step is taken once and remembered.
    """

    def __init__(self, who: int, program: Program) -> None:
        self._who = who
        self._program = program
        self._numbers: dict[Hashable, int] = {}
        self._histories: list[tuple[Hashable, ...]] = []
        self.operations: list[Any] = []
        self._steps: dict[tuple[int, Hashable], int] = {}
        self._number((), _no_answer)

    def next(self, place: int, answer: Hashable, answer_local: Callable[[Any], Hashable]) -> int:
        step = (place, answer)
        if step not in self._steps:
            self._steps[step] = self._number((*self._histories[place], answer), answer_local)
        return self._steps[step]

    def _number(self, history: tuple[Hashable, ...], answer_local: Callable[[Any], Hashable]) -> int:
        run = self._run(history, answer_local)
        # Between an operation and the local ones after it values wait where no variable shows them, so there the
        # answers themselves are the situation.
        places = [history]
        for _, answer in run.local:
            places.append((*places[-1], answer))
        numbers = [
            self._place(("local", before), operation, before)
            for before, (operation, _) in zip(places, run.local, strict=False)
        ]
        numbers.append(self._place(run.situation, run.operation, places[-1]))
        for (_, answer), here, there in zip(run.local, numbers, numbers[1:], strict=False):
            self._steps[here, answer] = there
        return numbers[0]

    def _run(self, history: tuple[Hashable, ...], answer_local: Callable[[Any], Hashable]) -> Run:
        run = Run(self._who, history, answer_local)
        _current.append(run)
        try:
            self._program()
        except EndOfAnswersError:
            pass
        finally:
            _current.pop()
        return run

    def _place(self, situation: Hashable, operation: Any, history: tuple[Hashable, ...]) -> int:
        if situation not in self._numbers:
            self._numbers[situation] = len(self._numbers)
            self._histories.append(history)
            self.operations.append(operation)
        return self._numbers[situation]


def _no_answer(operation: Any) -> Hashable:
    raise AssertionError(f"{operation} comes before all that others could see")


# Which types do not change while a process runs, so that their names are enough.
CONSTANT: set[type] = {Run, ModuleType, BuiltinFunctionType, CodeType}


def _stack(frame: FrameType | None) -> Hashable:
    """Where a process stands, and what its variables hold."""
    frames: list[Hashable] = []
    seen: dict[int, int] = {}
    while frame is not None and frame.f_code is not _Machine._run.__code__:
        frames.append(_frame(frame, seen))
        frame = frame.f_back
    return tuple(frames)


def _frame(frame: FrameType, seen: dict[int, int]) -> Hashable:
    names = sorted(frame.f_locals.items())
    return frame.f_code, frame.f_lasti, tuple((name, _value(value, seen)) for name, value in names)


def _value(value: Any, seen: dict[int, int]) -> Hashable:
    kind = type(value)
    if value is None or kind in (bool, int, float, str, bytes):
        return (kind.__name__, value) if kind is bool else value
    if isinstance(value, PurePath | type):
        return str(value)
    if kind in CONSTANT or kind.__module__ in ("_thread", "threading", "datetime"):
        return kind.__name__
    if id(value) in seen:
        return "seen", seen[id(value)]
    seen[id(value)] = len(seen)
    if isinstance(value, dict):
        return kind.__name__, tuple((_value(k, seen), _value(v, seen)) for k, v in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value) if isinstance(value, set | frozenset) else value
        return kind.__name__, *(_value(item, seen) for item in items)
    return kind.__qualname__, *(_value(part, seen) for part in _parts(value))


def _parts(value: Any) -> Sequence[Any]:
    """What an object of another kind consists of."""
    match value:
        case GeneratorType(gi_running=True):  # It is one of the frames.
            return []
        case GeneratorType():
            running = []
            while isinstance(value, GeneratorType) and value.gi_frame is not None:
                frame = value.gi_frame
                running.append((frame.f_code.co_qualname, frame.f_lasti, dict(sorted(frame.f_locals.items()))))
                value = value.gi_yieldfrom
            return running
        case FunctionType():
            return value.__qualname__, *(cell.cell_contents for cell in value.__closure__ or ())
        case MethodType():
            return value.__name__, value.__self__
        case partial():
            return value.func, value.args, value.keywords
    if hasattr(value, "__length_hint__"):  # An iterator, which shows how far it is.
        return (value.__length_hint__(),)
    slots = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ()) if name != "__weakref__"]
    own = [getattr(value, name, None) for name in slots]
    return [*own, *getattr(value, "__dict__", {}).values()]
