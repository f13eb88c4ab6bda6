"""
A model checker for the protocol: every interleaving of several processes on one model of a volume, breadth first.

The processes run what production runs, `_protocol.step` and the procedures of `_procedures`. Only the volume, the bytes
and the clocks are modelled. A process is identified by where it stands in its code and by its variables, so two ways to
the same situation are one state.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

from attrs import evolve, field, frozen

from kserve_pvc._download import protocol
from kserve_pvc._keys import procedures

LEASE_TICKS = 2
PATIENCE_TICKS = 3
EMPTY, PARTIAL, WHOLE, SYNCED, CLOSED, BROKEN = range(6)
RULES = protocol.Rules(lease_seconds=LEASE_TICKS, timeout=PATIENCE_TICKS)

Program = Generator[Any, Any, object]


class ViolationError(Exception):
    """A law does not hold."""


class Newest(NamedTuple):
    seq: int = 0
    is_present: bool = False
    generation: str = ""


class Record(NamedTuple):
    seq: int
    type: str
    generation: str


class Claim(NamedTuple):
    epoch: int
    holder: int
    is_released: bool = False
    beats: int = 0


class Files(NamedTuple):
    """The bytes of one generation. `writer` is None once they were collected."""

    writer: int | None
    content: int = EMPTY


class World(NamedTuple):
    """
    One state of the volume. `seen_log` records and `seen_leases` are known to every node; what is newer may be missed
    by a node that only reads. `silences` and `faults` are how often a holder may yet miss its beat, or the volume fail.
    """

    log: tuple[Record, ...] = ()
    slots: frozenset[int] = frozenset()
    claims: tuple[Claim, ...] = ()
    files: tuple[Files, ...] = ()
    leases: frozenset[tuple[int, str]] = frozenset()
    readers: frozenset[tuple[int, str]] = frozenset()
    seen_log: int = 0
    seen_leases: frozenset[tuple[int, str]] = frozenset()
    silences: int = 0
    faults: int = 0
    was_silent: bool = False

    @property
    def newest(self) -> Newest:
        return newest_of(self.log)


def newest_of(log: Sequence[Record]) -> Newest:
    if not log:
        return Newest()
    # As in a listing: of one number, the type that sorts last.
    last = max(log, key=lambda r: (r.seq, r.type))
    return Newest(last.seq, last.type != "tombstone", last.generation)


@frozen(kw_only=True)
class Volume:
    """
    What the volume and its clients are like. The defaults are what the protocol asks for; a mutant changes one.
    """

    locks_exclude: bool = True
    one_fetch: bool = False
    looks_up_by_name: bool = False
    beats_by_stat: bool = False
    publish_replaces: bool = False
    believes_errors: bool = False
    waits_for_visibility: bool = True
    reports_close: bool = True
    syncs_again: bool = False
    # What would need more claims or generations than this is not looked at.
    most_generations: int = 5


# What only the model asks for: the fetch, the lease of a reader, and the passing of time.


class Look(NamedTuple):
    pass


class LookAtClaim(NamedTuple):
    pass


class MakeClaim(NamedTuple):
    epoch: int


class Tick(NamedTuple):
    pass


class Release(NamedTuple):
    pass


class Begin(NamedTuple):
    epoch: int


class Write(NamedTuple):
    generation: str
    epoch: int
    content: int


class Sync(NamedTuple):
    generation: str


class Close(NamedTuple):
    generation: str


class TakeLease(NamedTuple):
    generation: str


class Read(NamedTuple):
    generation: str


class DropLease(NamedTuple):
    generation: str


class ReadLater(NamedTuple):
    """The newest record, as a node sees it that may be late."""


class Visible(NamedTuple):
    half: int


# The processes.


def fetch(epoch: int, *, settles: bool = True, continues_anothers: bool = False) -> Program:
    """
    Fetch into a generation; the bytes come in two pieces. What the keywords change is wrong.
    """
    there: tuple[str, ...] = ()
    if continues_anothers:
        there = yield procedures.ListGenerations()
    generation = there[-1] if there else (yield Begin(epoch))
    for content in (PARTIAL, WHOLE):
        is_alive = yield Write(generation, epoch, content)
        if not is_alive:
            return protocol.ClaimLost(), generation
    for operation in (Sync(generation), Close(generation)) if settles else ():
        is_well = yield operation
        if not is_well:
            return protocol.Spoiled(), generation
    return protocol.Fetched(), generation


@frozen(kw_only=True)
class Programs:
    """
    What the processes do. A mutant replaces one of these.
    """

    fetch: Callable[..., Program] = fetch
    rechecks: bool = True
    looks_again: bool = True
    append: Callable[..., Program] = procedures.append
    remove: Callable[..., Program] = procedures.remove
    collect_garbage: Callable[..., Program] = procedures.collect_garbage
    clears_up_at_once: bool = False


def ensure(programs: Programs, refresh: bool = False) -> Program:
    """
    A call of `ensure`, as `_download` drives it.
    """
    after_seq = 0
    if refresh:
        first = yield procedures.ReadNewest()
        after_seq = first.seq
        del first
    clock, generation, unpublished = 0, "", ()
    state, actions = protocol.begin(RULES)
    while True:
        event: protocol.Event | None = None
        for action in actions:
            match action:
                case protocol.Look():
                    newest = yield Look()
                    claim = yield LookAtClaim()
                    if state.phase == "rechecking" and not programs.rechecks:
                        newest, claim = Newest(seq=newest.seq), None
                    event = protocol.Looked(
                        now=clock, present=newest.is_present and newest.seq > after_seq, seq=newest.seq, claim=claim
                    )
                    del newest, claim
                case protocol.MakeClaim(epoch=epoch):
                    won = yield MakeClaim(epoch)
                    event = protocol.Claimed(now=clock, won=won)
                    del won, epoch
                case protocol.Fetch():
                    event, generation = yield from programs.fetch(state.epoch)
                    unpublished = (*unpublished, generation)
                case protocol.Publish(after_seq=base):
                    begun = yield procedures.ListGenerations()
                    seq = yield from programs.append(base, "commit", Newest(generation=generation))
                    if seq is not None:
                        unpublished = tuple(g for g in unpublished if g != generation)
                        yield from programs.collect_garbage(seq, begun)
                    elif programs.clears_up_at_once:
                        yield procedures.Collect(generation)
                    event = protocol.Published(won=seq is not None)
                    del begun, seq, base
                case protocol.Pause():
                    yield Tick()
                    clock += 1
                    event = protocol.Paused()
                case protocol.Release():
                    yield Release()
                case protocol.Return(status=status):
                    yield Release()
                    yield from procedures.collect_unnamed(unpublished)
                    return status
                case protocol.GiveUp(reason=reason):
                    yield Release()
                    return reason
        assert event is not None
        state, actions = protocol.step(state, event)
        action = event = None


def read(programs: Programs) -> Program:
    """
    The `with store.open(…)` of a reader.
    """
    while True:
        newest = yield ReadLater()
        if not newest.is_present:
            return "absent"
        generation = newest.generation
        yield TakeLease(generation)
        if programs.looks_again:
            newest = yield ReadLater()
        if newest.is_present and newest.generation == generation:
            yield Read(generation)
            yield DropLease(generation)
            return "read"
        yield DropLease(generation)


def remove(programs: Programs) -> Program:
    """
    A call of `remove`.
    """
    generations = yield procedures.ListGenerations()
    newest = yield procedures.ReadNewest()
    if not generations and not newest.is_present:
        return "nothing"
    result = yield from programs.remove(newest, generations)
    return result


# The volume.

# Where each process stands, and the volume.
State = tuple[tuple[int, ...], World]
CameFrom = dict[State, tuple[State, str] | None]


class Checker:
    """
    Explores what some processes can do to each other on one volume.
    """

    def __init__(self, programs: Sequence[Callable[[], Program]], volume: Volume) -> None:
        self._machines = [_Machine(program) for program in programs]
        self._volume = volume

    def start(self, world: World) -> State:
        return tuple(0 for _ in self._machines), world

    def steps(self, state: State, who: int) -> Iterator[tuple[str, State]]:
        """
        What the next operation of one process may lead to, the lucky outcome first; nothing, if it has ended.

        Raises:
            ViolationError: A law does not hold.
        """
        places, world = state
        machine = self._machines[who]
        operation = machine.operations[places[who]]
        if operation is None:
            return
        try:
            for answer, after in _OUTCOMES[type(operation)](self._volume, world, who, operation):
                _check(after)
                then = places[who] if answer is _AGAIN else machine.next(places[who], answer)
                yield f"{who}: {operation} -> {answer}", ((*places[:who], then, *places[who + 1 :]), after)
        except ViolationError as violation:
            raise ViolationError(f"{violation}\n{who}: {operation}") from None

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

    def __init__(self, program: Callable[[], Program]) -> None:
        self._program = program
        self._numbers: dict[Hashable, int] = {}
        self._histories: list[tuple[Hashable, ...]] = []
        self.operations: list[Any] = []
        self._steps: dict[tuple[int, Hashable], int] = {}
        self._number(())

    def next(self, place: int, answer: Hashable) -> int:
        step = (place, answer)
        if step not in self._steps:
            self._steps[step] = self._number((*self._histories[place], answer))
        return self._steps[step]

    def _number(self, history: tuple[Hashable, ...]) -> int:
        running = self._program()
        try:
            operation = next(running)
            for answer in history:
                operation = running.send(answer)
            situation: Hashable = (operation, _situation(running))
        except StopIteration:
            operation, situation = None, None
        if situation not in self._numbers:
            self._numbers[situation] = len(self._numbers)
            self._histories.append(history)
            self.operations.append(operation)
        return self._numbers[situation]


def _situation(running: Any) -> Hashable:
    """Where a generator stands, and what its variables hold, down to the one it waits for."""
    frames = []
    while running is not None and getattr(running, "gi_frame", None) is not None:
        frame = running.gi_frame
        frames.append(
            (frame.f_code, frame.f_lasti, tuple(sorted((name, repr(value)) for name, value in frame.f_locals.items())))
        )
        running = running.gi_yieldfrom
    return tuple(frames)


_WHOLE = {Files(writer, CLOSED) for writer in range(10)}


def _check(world: World) -> None:
    """
    S1: what a record vouches for is there, whole and durable. S4: one record for each number.

    A record that was published below a newer one has never been read by anybody: its writer lost, and says so.
    """
    buried = max((r.seq for r in world.log if r.type == "tombstone"), default=0)
    newest = 0
    for record in world.log:
        if record.seq > max(buried, newest) and world.files[int(record.generation)] not in _WHOLE:
            raise ViolationError(f"S1: {record} names what is not whole, durable and there: {world.files}")
        newest = max(newest, record.seq)
    if len({r.seq for r in world.log}) != len(world.log):
        raise ViolationError(f"S4: two records of one number: {world.log}")


def _look(volume: Volume, world: World, who: int, _: Look) -> list[tuple[Hashable, World]]:
    # What was looked for by name in vain stays hidden for a while.
    return [(newest, world) for newest in ([world.newest, Newest()] if volume.looks_up_by_name else [world.newest])]


def _look_at_claim(volume: Volume, world: World, who: int, _: LookAtClaim) -> list[tuple[Hashable, World]]:
    claim = max(world.claims, default=None)
    if claim is None:
        return [(None, world)]
    seen = protocol.ClaimSeen(epoch=claim.epoch, sign_of_life=b"%d" % claim.beats, released=claim.is_released)
    return [(answer, world) for answer in ([seen, evolve(seen, sign_of_life=b"0")] if volume.beats_by_stat else [seen])]


def _make_claim(volume: Volume, world: World, who: int, operation: MakeClaim) -> list[tuple[Hashable, World]]:
    if operation.epoch > volume.most_generations:
        return []
    if volume.locks_exclude and any(c.epoch == operation.epoch for c in world.claims):
        return [(False, world)]
    others = tuple(c for c in world.claims if c.epoch != operation.epoch)
    return [(True, world._replace(claims=(*others, Claim(operation.epoch, who))))]


def _tick(volume: Volume, world: World, who: int, _: Tick) -> list[tuple[Hashable, World]]:
    held = [c for c in world.claims if not c.is_released]
    if not held:
        return [(None, world)]
    beaten = tuple(c if c.is_released else c._replace(beats=c.beats + 1) for c in world.claims)
    answers: list[tuple[Hashable, World]] = [(None, world._replace(claims=beaten))]
    if world.silences:
        answers.append((None, world._replace(silences=world.silences - 1, was_silent=True)))
    return answers


def _release(volume: Volume, world: World, who: int, _: Release) -> list[tuple[Hashable, World]]:
    claims = tuple(c._replace(is_released=True) if c.holder == who else c for c in world.claims)
    return [(None, world._replace(claims=claims))]


def _begin(volume: Volume, world: World, who: int, _: Begin) -> list[tuple[Hashable, World]]:
    if len(world.files) == volume.most_generations:
        return []
    if volume.one_fetch and world.files:
        raise ViolationError("L6: a second fetch, though nothing went wrong")
    return [(str(len(world.files)), world._replace(files=(*world.files, Files(who))))]


def _with_files(world: World, generation: str, **changes: Any) -> World:
    at = int(generation)
    return world._replace(files=(*world.files[:at], world.files[at]._replace(**changes), *world.files[at + 1 :]))


def _write(volume: Volume, world: World, who: int, operation: Write) -> list[tuple[Hashable, World]]:
    files = world.files[int(operation.generation)]
    if any(r.generation == operation.generation and r.type == "commit" for r in world.log):
        raise ViolationError("S2: written to after it was committed")
    if files.writer not in (who, None):
        raise ViolationError("S3: written to by a second process")
    # A collected directory takes no more bytes; the writer learns it only when it is done.
    written = world if files.writer is None else _with_files(world, operation.generation, content=operation.content)
    answers: list[tuple[Hashable, World]] = [(True, written)]
    if any(c.epoch > operation.epoch for c in world.claims) or world.was_silent:
        answers.append((False, world))
    return answers


def _sync(volume: Volume, world: World, who: int, operation: Sync) -> list[tuple[Hashable, World]]:
    return _settle(world, operation.generation, WHOLE, SYNCED, says_so=not volume.syncs_again)


def _close(volume: Volume, world: World, who: int, operation: Close) -> list[tuple[Hashable, World]]:
    return _settle(world, operation.generation, SYNCED, CLOSED, says_so=volume.reports_close)


def _settle(world: World, generation: str, before: int, after: int, *, says_so: bool) -> list[tuple[Hashable, World]]:
    files = world.files[int(generation)]
    if files.writer is None:
        return [(True, world)]
    content = after if files.content == before else files.content
    answers: list[tuple[Hashable, World]] = [(True, _with_files(world, generation, content=content))]
    if world.faults:
        answers.append((not says_so, _with_files(world, generation, content=BROKEN)._replace(faults=world.faults - 1)))
    return answers


def _reserve(volume: Volume, world: World, who: int, operation: procedures.Reserve) -> list[tuple[Hashable, World]]:
    if operation.seq in world.slots:
        return [(False, world)]
    made = world._replace(slots=world.slots | {operation.seq})
    answers: list[tuple[Hashable, World]] = [(True, made)]
    if world.faults:
        answers.append((False, made._replace(faults=world.faults - 1)))  # Its reply was lost.
    return answers


def _publish(volume: Volume, world: World, who: int, operation: procedures.Publish) -> list[tuple[Hashable, World]]:
    generation = getattr(operation.of, "generation", "0")
    record = Record(operation.seq, operation.type, generation)
    there = [r for r in world.log if r.seq == operation.seq]
    if there and volume.publish_replaces:
        raise ViolationError(f"S4: {there} was replaced")
    if any(r.type == operation.type for r in there):
        return [(record in there, world)]
    published = world._replace(log=(*world.log, record))
    answers: list[tuple[Hashable, World]] = [(True, published)]
    if world.faults:
        # The reply was lost. Whoever looks finds the record there.
        answers.append((not volume.believes_errors, published._replace(faults=world.faults - 1)))
    return answers


def _collect(volume: Volume, world: World, who: int, operation: procedures.Collect) -> list[tuple[Hashable, World]]:
    if any(generation == operation.generation for _, generation in world.readers):
        raise ViolationError("S6: collected while somebody reads it")
    return [(None, _with_files(world, operation.generation, writer=None))]


def _await_visibility(
    volume: Volume, world: World, who: int, _: procedures.AwaitVisibility
) -> list[tuple[Hashable, World]]:
    # Twice the time after which every node sees what is on the volume: in the first half the tombstone becomes known,
    # in the second the leases of those who looked before that.
    if not volume.waits_for_visibility:
        return [(None, world)]
    if world.seen_log < len(world.log):
        return [(_AGAIN, world._replace(seen_log=len(world.log)))]
    return [(None, world._replace(seen_leases=world.leases))]


def _await_readers(
    volume: Volume, world: World, who: int, operation: procedures.AwaitReaders
) -> list[tuple[Hashable, World]]:
    def any_of(leases: frozenset[tuple[int, str]]) -> bool:
        return any(generation in operation.generations for _, generation in leases)

    return [(answer, world) for answer in {any_of(world.leases), any_of(world.leases & world.seen_leases)}]


def _read_later(volume: Volume, world: World, who: int, _: ReadLater) -> list[tuple[Hashable, World]]:
    views = {newest_of(world.log[:length]) for length in range(world.seen_log, len(world.log) + 1)}
    return [(view, world) for view in sorted(views)]


def _read(volume: Volume, world: World, who: int, operation: Read) -> list[tuple[Hashable, World]]:
    if world.files[int(operation.generation)].writer is None:
        raise ViolationError("S6: collected under a reader that holds a lease")
    return [(None, world._replace(readers=world.readers | {(who, operation.generation)}))]


def _take_lease(volume: Volume, world: World, who: int, operation: TakeLease) -> list[tuple[Hashable, World]]:
    return [(None, world._replace(leases=world.leases | {(who, operation.generation)}))]


def _drop_lease(volume: Volume, world: World, who: int, operation: DropLease) -> list[tuple[Hashable, World]]:
    mine = {(who, operation.generation)}
    return [(None, world._replace(leases=world.leases - mine, readers=world.readers - mine))]


def _list_generations(
    volume: Volume, world: World, who: int, _: procedures.ListGenerations
) -> list[tuple[Hashable, World]]:
    return [(tuple(str(n) for n, files in enumerate(world.files) if files.writer is not None), world)]


_AGAIN = "again"

_OUTCOMES: dict[type, Callable[[Volume, World, int, Any], Sequence[tuple[Hashable, World]]]] = {
    Look: _look,
    LookAtClaim: _look_at_claim,
    MakeClaim: _make_claim,
    Tick: _tick,
    Release: _release,
    Begin: _begin,
    Write: _write,
    Sync: _sync,
    Close: _close,
    TakeLease: _take_lease,
    Read: _read,
    DropLease: _drop_lease,
    ReadLater: _read_later,
    procedures.ReadNewest: lambda volume, world, who, _: [(world.newest, world)],
    procedures.ReadHighestSlot: lambda volume, world, who, _: [(max(world.slots, default=0), world)],
    procedures.Reserve: _reserve,
    procedures.Publish: _publish,
    procedures.Pause: lambda volume, world, who, _: [(None, world)],
    procedures.ListGenerations: _list_generations,
    procedures.ListNamed: lambda volume, world, who, _: [(frozenset(r.generation for r in world.log), world)],
    procedures.Collect: _collect,
    procedures.AwaitVisibility: _await_visibility,
    procedures.AwaitReaders: _await_readers,
}
