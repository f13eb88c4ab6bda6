"""
A volume for the model checker: its states, what each operation on it may lead to, and the laws that every state keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

from attrs import frozen

from kserve_pvc._format.codec import decode
from kserve_pvc._format.log_entry import LogEntry
from kserve_pvc._format.records import Beat, encode_beat

EMPTY, PARTIAL, WHOLE, SYNCED, CLOSED, BROKEN = range(6)
# A holder with this number was killed.
DEAD = 9
LEASE_SECONDS = 1.0
# A live reader may miss five of the six beats in its lease of four leases.
READER_SILENCE = 4 * LEASE_SECONDS * 5 / 6
STOP_SECONDS = 10 * LEASE_SECONDS
VISIBILITY_DELAY = 60.0
# The answer of an operation that is not over.
AGAIN = "again"


class ViolationError(Exception):
    """A law does not hold."""


class Record(NamedTuple):
    name: str
    data: bytes

    @property
    def seq(self) -> int:
        return int(self.name.partition(".")[0])

    @property
    def type(self) -> str:
        return self.name.partition(".")[2]

    @property
    def entry(self) -> LogEntry:
        return _entry(self.data)


@lru_cache(maxsize=10_000)
def _entry(data: bytes) -> LogEntry:
    return decode(LogEntry, data, "a record")


class Claim(NamedTuple):
    epoch: int
    holder: int
    is_released: bool = False
    beats: int = 0
    owner: bytes = b""


class Lease(NamedTuple):
    """The lease of a reader. `silent` are the seconds since its last beat, on the clock of whoever watches it."""

    holder: int
    generation: str
    name: str
    owner: bytes = b""
    is_released: bool = False
    beats: int = 0
    silent: float = 0.0


class Files(NamedTuple):
    """The bytes of one generation. `writer` is None once they were collected."""

    generation: str
    writer: int | None
    content: int = EMPTY


class World(NamedTuple):
    """
    One state of the volume. `seen_log` records and `seen_leases` are known to every node; what is newer may be missed
    by a node that only reads. `silences` and `faults` are how often holders may yet be cut off for a lease, or the
    volume fail; `outage` is how much of such a lease is left. `stops` is how often a process
    that watches others may be stopped. `version` is what the source holds.
    """

    log: tuple[Record, ...] = ()
    slots: frozenset[int] = frozenset()
    claims: tuple[Claim, ...] = ()
    files: tuple[Files, ...] = ()
    leases: frozenset[Lease] = frozenset()
    readers: frozenset[tuple[int, str]] = frozenset()
    seen_log: int = 0
    seen_leases: frozenset[str] = frozenset()
    silences: int = 0
    faults: int = 0
    outage: float = 0.0
    stops: int = 0
    was_silent: bool = False
    version: int = 1


@frozen(kw_only=True)
class Conditions:
    """
    What the volume and its clients are like. The defaults are what the protocol asks for; a mutant changes one.
    """

    locks_exclude: bool = True
    one_fetch: bool = False
    looks_up_by_name: bool = False
    publish_replaces: bool = False
    believes_errors: bool = False
    reports_close: bool = True
    syncs_again: bool = False
    # What would need more claims or generations than this is not looked at.
    most_generations: int = 5


# Operations. What is `local` touches what no other process changes, or belongs to the operation before it, so it is
# done in one step with that.


class ListLog(NamedTuple):
    is_late: bool = False


class ReadRecord(NamedTuple):
    name: str
    local: ClassVar = True


class ListSlots(NamedTuple):
    pass


class Reserve(NamedTuple):
    seq: int


class Publish(NamedTuple):
    name: str
    data: bytes


class ListClaims(NamedTuple):
    pass


class MakeClaim(NamedTuple):
    epoch: int


class WriteOwner(NamedTuple):
    epoch: int
    data: bytes
    local: ClassVar = True


class ReadOwner(NamedTuple):
    epoch: int
    local: ClassVar = True


class ReadBeat(NamedTuple):
    epoch: int
    local: ClassVar = True


class ForgetClaim(NamedTuple):
    epoch: int
    local: ClassVar = True


class Release(NamedTuple):
    """What the heart of a claim or lease writes last."""

    epoch: int
    lease: str


class ListGenerations(NamedTuple):
    pass


class Begin(NamedTuple):
    generation: str


class Write(NamedTuple):
    generation: str
    content: int


class Sync(NamedTuple):
    generation: str


class Close(NamedTuple):
    generation: str


class Collect(NamedTuple):
    generation: str


class ListLeases(NamedTuple):
    generation: str


class TakeLease(NamedTuple):
    generation: str
    name: str
    data: bytes


class ReadLeaseOwner(NamedTuple):
    name: str
    local: ClassVar = True


class ReadLeaseBeat(NamedTuple):
    name: str
    local: ClassVar = True


class DropLease(NamedTuple):
    name: str


class ForgetLeases(NamedTuple):
    generation: str
    local: ClassVar = True


class Read(NamedTuple):
    """A server reads the files of a generation, from here until it releases its lease."""

    generation: str


class Sleep(NamedTuple):
    seconds: float


class Watch(NamedTuple):
    """Sleep between two looks at signs of life."""

    seconds: float


class Now(NamedTuple):
    """How many seconds this process has been stopped, as by SIGSTOP, since it was asked last."""


class AwaitModel(NamedTuple):
    """Wait until somebody has published a model."""


class Resolve(NamedTuple):
    pass


class Upload(NamedTuple):
    """The source gets a newer version."""


Outcomes = Sequence[tuple[Hashable, World]]


def outcomes(conditions: Conditions, world: World, who: int, operation: Any) -> Outcomes:
    """
    What an operation may answer, and lead to, the lucky outcome first.

    Raises:
        ViolationError: A law does not hold.
    """
    found = _OUTCOMES[type(operation)](conditions, world, who, operation)
    for _, after in found:
        _check(after)
    return found


def _check(world: World) -> None:
    """
    S1: what a record vouches for is there, whole and durable. S4: one record for each number. S5: of two records the
    later one does not have the older version.

    A record that was published below a newer one has never been read by anybody: its writer lost, and says so.
    """
    if len({r.seq for r in world.log}) != len(world.log):
        raise ViolationError(f"S4: two records of one number: {world.log}")
    buried = max((r.seq for r in world.log if r.type == "tombstone"), default=0)
    newest, version = 0, ""
    for record in world.log:
        if record.seq > max(buried, newest):
            _check_record(record, world, version)
            version = record.entry.version
        newest = max(newest, record.seq)


def _check_record(record: Record, world: World, version: str) -> None:
    found = [f for f in world.files if f.generation == record.entry.generation]
    if [f.content for f in found if f.writer is not None] != [CLOSED]:
        raise ViolationError(f"S1: {record.name} names what is not whole, durable and there: {found}")
    if record.type == "commit" and record.entry.version < version:
        raise ViolationError(f"S5: {record.name} is {record.entry.version} after {version}")


def _list_log(conditions: Conditions, world: World, who: int, operation: ListLog) -> Outcomes:
    lengths = range(world.seen_log, len(world.log) + 1) if operation.is_late else [len(world.log)]
    views = {tuple(sorted(r.name for r in world.log[:length])) for length in lengths}
    if conditions.looks_up_by_name:  # What was looked for in vain stays hidden for a while.
        views.add(())
    return [(view, world) for view in sorted(views, key=len, reverse=True)]


def _reserve(conditions: Conditions, world: World, who: int, operation: Reserve) -> Outcomes:
    if operation.seq in world.slots:
        return [(False, world)]
    made = world._replace(slots=world.slots | {operation.seq})
    answers: list[tuple[Hashable, World]] = [(True, made)]
    if world.faults:
        answers.append((False, made._replace(faults=world.faults - 1)))  # Its reply was lost.
    return answers


def _publish(conditions: Conditions, world: World, who: int, operation: Publish) -> Outcomes:
    record = Record(operation.name, operation.data)
    if conditions.publish_replaces and any(r.seq == record.seq for r in world.log):
        raise ViolationError(f"S4: {record.name} was replaced")
    there = [r for r in world.log if r.name == record.name]
    if there:
        return [(there == [record], world)]
    published = world._replace(log=(*world.log, record))
    answers: list[tuple[Hashable, World]] = [(True, published)]
    if world.faults:
        # The reply was lost. Whoever looks finds the record there.
        answers.append((not conditions.believes_errors, published._replace(faults=world.faults - 1)))
    return answers


def _make_claim(conditions: Conditions, world: World, who: int, operation: MakeClaim) -> Outcomes:
    if operation.epoch > conditions.most_generations:
        return []
    if conditions.locks_exclude and any(c.epoch == operation.epoch for c in world.claims):
        return [(False, world)]
    others = tuple(c for c in world.claims if c.epoch != operation.epoch)
    return [(True, world._replace(claims=(*others, Claim(operation.epoch, who))))]


def _with_claim(world: World, epoch: int, **changes: Any) -> World:
    return world._replace(claims=tuple(c._replace(**changes) if c.epoch == epoch else c for c in world.claims))


def _read_owner(conditions: Conditions, world: World, who: int, operation: ReadOwner) -> Outcomes:
    return [(next((c.owner for c in world.claims if c.epoch == operation.epoch), None), world)]


def _beat(of: Claim | Lease | None) -> bytes | None:
    return None if of is None else _encoded_beat(of.beats + 1, of.is_released)


@lru_cache
def _encoded_beat(count: int, released: bool) -> bytes:
    return encode_beat(Beat(count=count, released=released))


def _read_beat(conditions: Conditions, world: World, who: int, operation: ReadBeat) -> Outcomes:
    return [(_beat(next((c for c in world.claims if c.epoch == operation.epoch), None)), world)]


def _release(conditions: Conditions, world: World, who: int, operation: Release) -> Outcomes:
    claims = tuple(
        c._replace(is_released=True) if (c.holder, c.epoch) == (who, operation.epoch) else c for c in world.claims
    )
    leases = frozenset(x._replace(is_released=True) if x.name == operation.lease else x for x in world.leases)
    readers = world.readers
    if operation.lease:
        readers = frozenset(reader for reader in readers if reader[0] != who)
    return [(None, world._replace(claims=claims, leases=leases, readers=readers))]


def _list_generations(conditions: Conditions, world: World, who: int, _: ListGenerations) -> Outcomes:
    return [(tuple(sorted(f.generation for f in world.files if f.writer is not None)), world)]


def _begin(conditions: Conditions, world: World, who: int, operation: Begin) -> Outcomes:
    if len(world.files) == conditions.most_generations:
        return []
    if conditions.one_fetch and world.files:
        raise ViolationError("L6: a second fetch, though nothing went wrong")
    return [(None, world._replace(files=(*world.files, Files(operation.generation, who))))]


def _files(world: World, generation: str) -> Files:
    return next(f for f in world.files if f.generation == generation)


def _with_files(world: World, generation: str, **changes: Any) -> World:
    return world._replace(files=tuple(f._replace(**changes) if f.generation == generation else f for f in world.files))


def _write(conditions: Conditions, world: World, who: int, operation: Write) -> Outcomes:
    files = _files(world, operation.generation)
    if any(r.type == "commit" and r.entry.generation == operation.generation for r in world.log):
        raise ViolationError("S2: written to after it was committed")
    if files.writer not in (who, None):
        raise ViolationError("S3: written to by a second process")
    # A collected directory takes no more bytes; the writer learns it only when it is done.
    written = world if files.writer is None else _with_files(world, operation.generation, content=operation.content)
    answers: list[tuple[Hashable, World]] = [(True, written)]
    if any(c.epoch > int(operation.generation[:12]) for c in world.claims) or world.was_silent:
        answers.append((False, world))
    return answers


def _sync(conditions: Conditions, world: World, who: int, operation: Sync) -> Outcomes:
    return _settle(world, operation.generation, WHOLE, SYNCED, says_so=not conditions.syncs_again)


def _close(conditions: Conditions, world: World, who: int, operation: Close) -> Outcomes:
    return _settle(world, operation.generation, SYNCED, CLOSED, says_so=conditions.reports_close)


def _settle(world: World, generation: str, before: int, after: int, *, says_so: bool) -> Outcomes:
    files = _files(world, generation)
    if files.writer is None:
        return [(True, world)]
    content = after if files.content == before else files.content
    answers: list[tuple[Hashable, World]] = [(True, _with_files(world, generation, content=content))]
    if world.faults:
        answers.append((not says_so, _with_files(world, generation, content=BROKEN)._replace(faults=world.faults - 1)))
    return answers


def _collect(conditions: Conditions, world: World, who: int, operation: Collect) -> Outcomes:
    if any(generation == operation.generation for _, generation in world.readers):
        raise ViolationError("S6: collected while somebody reads it")
    return [(None, _with_files(world, operation.generation, writer=None))]


def _list_leases(conditions: Conditions, world: World, who: int, operation: ListLeases) -> Outcomes:
    every = tuple(sorted(x.name for x in world.leases if x.generation == operation.generation))
    known = tuple(name for name in every if name in world.seen_leases)
    return [(view, world) for view in dict.fromkeys((every, known))]


def _take_lease(conditions: Conditions, world: World, who: int, operation: TakeLease) -> Outcomes:
    lease = Lease(who, operation.generation, operation.name, operation.data)
    return [(None, world._replace(leases=world.leases | {lease}))]


def _lease(world: World, name: str) -> Lease | None:
    return next((x for x in world.leases if x.name == name), None)


def _read_lease_owner(conditions: Conditions, world: World, who: int, operation: ReadLeaseOwner) -> Outcomes:
    lease = _lease(world, operation.name)
    return [(None if lease is None else lease.owner, world)]


def _without_leases(world: World, gone: Callable[[Lease], bool]) -> Outcomes:
    return [(None, world._replace(leases=frozenset(x for x in world.leases if not gone(x))))]


def _read(conditions: Conditions, world: World, who: int, operation: Read) -> Outcomes:
    if _files(world, operation.generation).writer is None:
        raise ViolationError("S6: collected under a reader that holds a lease")
    return [(None, world._replace(readers=world.readers | {(who, operation.generation)}))]


def _sleep(conditions: Conditions, world: World, who: int, operation: Sleep) -> Outcomes:
    if operation.seconds >= VISIBILITY_DELAY:
        # Twice the time after which every node sees what is on the volume: in the first half the tombstone becomes
        # known, in the second the leases of those who looked before that.
        if world.seen_log < len(world.log):
            return [(AGAIN, world._replace(seen_log=len(world.log)))]
        return [(operation.seconds, world._replace(seen_leases=frozenset(x.name for x in world.leases)))]
    return [(operation.seconds, after) for after in _beating(world, operation.seconds)]


def _beating(world: World, seconds: float) -> list[World]:
    """Whatever downloads beats while somebody sleeps, or is cut off for so long that others take it for dead."""
    if world.outage:
        return [world._replace(outage=_after(world.outage, seconds))]
    if not any(not c.is_released and c.holder != DEAD for c in world.claims):
        return [world]
    beaten = tuple(c if c.is_released or c.holder == DEAD else c._replace(beats=c.beats + 1) for c in world.claims)
    found = [world._replace(claims=beaten)]
    if world.silences:
        outage = _after(LEASE_SECONDS, seconds)
        found.append(world._replace(silences=world.silences - 1, outage=outage, was_silent=True))
    return found


def _after(seconds: float, passed: float) -> float:
    return max(0.0, round(seconds - passed, 3))


def _watch(conditions: Conditions, world: World, who: int, operation: Watch) -> Outcomes:
    found = []
    for after in _beating(world, operation.seconds):
        held = frozenset(x for x in after.leases if not x.is_released)
        rest = after.leases - held
        beaten = frozenset(x._replace(beats=x.beats + 1, silent=0.0) for x in held)
        found.append(after._replace(leases=rest | beaten))
        silent = frozenset(x._replace(silent=round(x.silent + operation.seconds, 3)) for x in held)
        if held and max(x.silent for x in silent) <= READER_SILENCE:
            found.append(after._replace(leases=rest | silent))
    return [(operation.seconds, after) for after in found]


def _now(conditions: Conditions, world: World, who: int, _: Now) -> Outcomes:
    found: list[tuple[Hashable, World]] = [(0.0, world)]
    if world.stops:
        leases = frozenset(x if x.is_released else x._replace(beats=x.beats + 1, silent=0.0) for x in world.leases)
        found.append((STOP_SECONDS, world._replace(leases=leases, stops=world.stops - 1)))
        # What stopped it may have stopped those whom it watches, too.
        found.append((STOP_SECONDS, world._replace(stops=world.stops - 1)))
    return found


def _upload(conditions: Conditions, world: World, who: int, _: Upload) -> Outcomes:
    return [(None, world._replace(version=world.version + 1))]


_OUTCOMES: dict[type, Callable[[Conditions, World, int, Any], Outcomes]] = {
    ListLog: _list_log,
    ReadRecord: lambda _, world, who, o: [(next((r.data for r in world.log if r.name == o.name), None), world)],
    ListSlots: lambda _, world, who, o: [(tuple(f"{n:012d}" for n in sorted(world.slots)), world)],
    Reserve: _reserve,
    Publish: _publish,
    ListClaims: lambda _, world, who, o: [(tuple(f"{c.epoch:012d}" for c in sorted(world.claims)), world)],
    MakeClaim: _make_claim,
    WriteOwner: lambda _, world, who, o: [(None, _with_claim(world, o.epoch, owner=o.data))],
    ReadOwner: _read_owner,
    ReadBeat: _read_beat,
    ForgetClaim: lambda _, world, who, o: [
        (None, world._replace(claims=tuple(c for c in world.claims if c.epoch != o.epoch)))
    ],
    Release: _release,
    ListGenerations: _list_generations,
    Begin: _begin,
    Write: _write,
    Sync: _sync,
    Close: _close,
    Collect: _collect,
    ListLeases: _list_leases,
    TakeLease: _take_lease,
    ReadLeaseOwner: _read_lease_owner,
    ReadLeaseBeat: lambda _, world, who, o: [(_beat(_lease(world, o.name)), world)],
    DropLease: lambda _, world, who, o: _without_leases(world, lambda x: x.name == o.name),
    ForgetLeases: lambda _, world, who, o: _without_leases(world, lambda x: x.generation == o.generation),
    Read: _read,
    Sleep: _sleep,
    Watch: _watch,
    Now: _now,
    AwaitModel: lambda _, world, who, o: [(None, world)] if world.log else [],
    Resolve: lambda _, world, who, o: [(f"v{world.version}", world)],
    Upload: _upload,
}
