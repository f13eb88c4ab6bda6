"""
Appending to a key's log, collecting garbage and removing a model, as pure procedures.

Each is a generator: it yields the next operation and is sent its result. Nothing here touches a disk or reads a
clock, so production and the model checker of the tests run the same decisions. `drive` runs one for real.

None of them relies on a lock. They rely on three properties of a volume: of all callers that make one directory
exactly one succeeds, `link` never replaces a file, and a listing shows whatever was finished before it began.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from typing import Any, Literal, Protocol, TypeVar

import attrs

# How often a writer looks, while it waits for the record of a number that another process has reserved.
LOOKS_FOR_A_RECORD = 20
LOOK_PAUSE = 0.05

_T = TypeVar("_T")


class Newest(Protocol):
    """The newest record of a log: `seq` is 0 for an empty one."""

    @property
    def seq(self) -> int: ...

    @property
    def is_present(self) -> bool: ...


@attrs.frozen
class ReadNewest:
    """Result: `Newest`."""


@attrs.frozen
class ReadHighestSlot:
    """Result: the highest number that is reserved, 0 for none."""


@attrs.frozen
class Reserve:
    """Make the directory of a number. Result: whether it was made by this very call."""

    seq: int


@attrs.frozen
class Publish:
    """
    Write a record durably under a number, replacing nothing. Result: whether what is there is this record.

    A `tombstone` or `restore` speaks of the same generation as `of`.
    """

    seq: int
    type: Literal["commit", "tombstone", "restore"]
    of: Newest | None = None


@attrs.frozen
class Pause:
    seconds: float


@attrs.frozen
class ListGenerations:
    """Result: the names of all generations of the key, whatever their state."""


@attrs.frozen
class ListNamed:
    """Result: those of these generations that any record names, and perhaps others that one names."""

    generations: tuple[str, ...]


@attrs.frozen
class Collect:
    """Throw away what there is of a generation."""

    generation: str


@attrs.frozen
class AwaitVisibility:
    """Wait until every node sees what is on the volume now."""


@attrs.frozen
class AwaitReaders:
    """Result: whether a process is reading one of these generations, once that is certain."""

    generations: tuple[str, ...]


Operation = (
    ReadNewest
    | ReadHighestSlot
    | Reserve
    | Publish
    | Pause
    | ListGenerations
    | ListNamed
    | Collect
    | AwaitVisibility
    | AwaitReaders
)
Procedure = Generator[Operation, Any, _T]


def drive(procedure: Procedure[_T], perform: Callable[[Operation], object]) -> _T:
    """
    Run a procedure: carry out each operation, and send the result back.
    """
    try:
        operation = next(procedure)
        while True:
            operation = procedure.send(perform(operation))
    except StopIteration as end:
        result: _T = end.value
        return result


def append(
    after_seq: int, type: Literal["commit", "tombstone", "restore"], of: Newest | None = None, *, above: int = 0
) -> Procedure[int | None]:
    """
    Append the next record, or learn that another process did.

    The order is what makes this safe without any lock: the number is reserved, the log is listed again, the record is
    published, and the log is listed once more. A record that was published before is respected, a process that
    reserves later sees ours, and a process that was paused anywhere in between finds a newer record and has lost.

    Args:
        above: A number that is reserved, and everything up to it is passed over: whoever holds one of these loses by a
            record above them.

    Returns:
        The number of the record, or None if the log moved on since `after_seq`. Then it may hold this record below a
        newer one.
    """
    seq = max(after_seq, above) + 1
    while not (yield Reserve(seq)):
        highest = yield from _highest_unless_moved_on(after_seq, seq)
        if highest is None:
            return None
        # The process with that number died before it wrote, or will lose by what we write now. So will those with the
        # numbers up to the highest, which are not tried one by one: there may be many.
        seq = max(seq + 1, highest)
    newest: Newest = yield ReadNewest()
    if newest.seq > after_seq:
        return None
    is_ours: bool = yield Publish(seq, type, of)
    if not is_ours:
        return None
    newest = yield ReadNewest()
    return seq if newest.seq == seq else None


def _highest_unless_moved_on(after_seq: int, taken: int) -> Procedure[int | None]:
    """Wait for the record of a number that is taken. Returns None if there is one, else the highest number."""
    highest = taken
    for _ in range(LOOKS_FOR_A_RECORD):
        newest: Newest = yield ReadNewest()
        if newest.seq > after_seq:
            return None
        highest = yield ReadHighestSlot()
        if highest > taken:
            break
        yield Pause(LOOK_PAUSE)
    return highest


def collect_garbage(seq: int, begun: Sequence[str]) -> Procedure[None]:
    """
    Collect the generations `begun` before our commit `seq` was appended, and that no record names.

    Our own commit is what makes this safe: they were begun on an older record, so a process that still writes them
    sees a newer one and loses, unless it had reserved a higher number before, which is looked for first. Whether it is
    alive does not matter.
    """
    highest: int = yield ReadHighestSlot()
    if highest == seq:
        yield from collect_unnamed(begun)


def collect_unnamed(generations: Sequence[str]) -> Procedure[None]:
    """
    Collect those of these generations that no record names. None of them may become a model any more.
    """
    if not generations:
        return
    named: Collection[str] = yield ListNamed(tuple(generations))
    for generation in generations:
        if generation not in named:
            yield Collect(generation)


def discard_leftovers(newest: Newest, leftovers: Sequence[str]) -> Procedure[bool]:
    """
    Collect generations that dead writers left, before another one is begun.

    A record that changes nothing is appended first: a `restore` of what is present, or a tombstone where there is no
    model. They were begun on an older record, so a process that still writes one of them loses. Nothing has to be
    known of which processes live.

    Returns:
        False if the log moved on, and nothing was collected.
    """
    present = newest if newest.is_present else None
    seq: int | None = yield from append(newest.seq, "tombstone" if present is None else "restore", present)
    if seq is None:
        return False
    yield from collect_garbage(seq, leftovers)
    return True


def remove(newest: Newest, generations: Sequence[str]) -> Procedure[Literal["removed", "read"]]:
    """
    Remove a model and what else there is of its key: look for readers, tombstone, wait until every node sees it, look
    for readers once more, collect.

    The first look only keeps a model that is read from vanishing for a while. The second one decides: a reader that
    comes after it sees the tombstone.

    Args:
        newest: Read after `generations` were listed: what is collected was begun on a record older than the
            tombstone, and loses.

    Returns:
        `read` if a process reads it. Then there is no tombstone, or it was undone, unless another removal came in
        between: the process that wrote the tombstone on the model alone decides about it.
    """
    is_read: bool = yield AwaitReaders(tuple(generations))
    if is_read:
        return "read"
    before: Newest | None = newest if newest.is_present else None
    highest: int = 0
    while True:
        # Until a tombstone has the highest number that is reserved, also where there is no commit: a download that
        # reserved a number above an earlier one, and was paused, would make a model of bytes about to be collected.
        seq: int | None = yield from append(newest.seq, "tombstone", before, above=highest)
        if seq is not None:
            highest = yield ReadHighestSlot()
            if highest == seq:
                break
        generations = yield ListGenerations()
        newest = yield ReadNewest()
        if newest.seq != seq:
            # What another removal has buried may be collected by now, and is never brought back.
            before = newest if newest.is_present else None
    yield AwaitVisibility()
    is_read = yield AwaitReaders(tuple(generations))
    if is_read:
        if before is not None:
            yield from append(seq, "restore", before)
        return "read"
    for generation in generations:
        yield Collect(generation)
    return "removed"
