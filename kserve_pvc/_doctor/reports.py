"""
What two doctors on two nodes tell each other, and what they report.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import attrs

from kserve_pvc._format.codec import integer, text
from kserve_pvc._format.log_entry import Holder, to_holder
from kserve_pvc._volume.profile import LockAnswer

MAX_MESSAGE_BYTES = 64 * 1024
FARTHEST = 1e11  # Seconds since 1970 that a clock may show.


class PeerLostError(Exception):
    """
    The other doctor stopped. Not an error of the caller's.
    """


def _time(_: object, field: attrs.Attribute[Any], value: object) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or abs(value) > FARTHEST
    ):
        raise TypeError(f"`{field.name}` must be a time")


@attrs.frozen(kw_only=True)
class Hello:
    """
    Who waits for whom. `device` tells two mounts of one node apart.
    """

    meeting: str = attrs.field(validator=text)
    holder: Holder = attrs.field(converter=to_holder)
    device: int = attrs.field(validator=integer)


@attrs.frozen(kw_only=True)
class Message:
    """
    One step of a meeting: when it was written, when the step before was seen from the other side, and a JSON text.
    """

    to: str = attrs.field(validator=text)
    step: int = attrs.field(validator=integer)
    written: float = attrs.field(validator=_time)
    seen: float = attrs.field(validator=_time)
    answer: str = attrs.field(validator=text)


@attrs.frozen(kw_only=True)
class Race:
    """
    What became of names that both nodes made at the same moment.

    Args:
        rounds: How many names were made by both.
        contested: In how many of them the two calls overlapped in time, as far as the clocks can tell.
        both_won, nobody_won: In how many both, or neither, were told that they made it.
        supported: False if a node cannot do it at all; then nothing was raced for.
    """

    rounds: int
    contested: int
    both_won: int
    nobody_won: int
    supported: bool


@attrs.frozen(kw_only=True)
class LockTest:
    """
    What two nodes were answered that asked for one lock.

    Args:
        held: What the node that asked first was answered, and then held it.
        second: What the other one was answered meanwhile. `granted` means that the lock excludes nobody.
        after_release: What it was answered after the first had let go; None if it was never held.
    """

    held: LockAnswer
    second: LockAnswer | None
    after_release: LockAnswer | None

    @property
    def verdict(self) -> Literal["excludes", "lies", "unsupported", "unclear"]:
        if self.held == "granted" and self.second == "granted":
            return "lies"
        if (self.held, self.second, self.after_release) == ("granted", "refused", "granted"):
            return "excludes"
        return "unsupported" if "unsupported" in (self.held, self.second) else "unclear"


@attrs.frozen(kw_only=True)
class PeerReport:
    """
    What two nodes found out about each other through the volume. Times are seconds; None means never within the test.

    Args:
        name: The other process.
        same_node, same_mount: The other process shares this kernel, and this very mount: then nothing is known about
            others.
        clock_ahead: How far its clock is ahead of this one, give or take `clock_error`.
        listed_after: A new name is in a listing.
        found_after: A new name that was looked for too early is found.
        replaced_after: A file that was replaced is opened with its new content.
        deleted_after, gone_after: A deleted file can no longer be opened; `stat` says so too.
        beat_after: The longest wait for a beat that is written every half second.
        races: By what the nodes raced for.
        locks: By kind of lock, one test for each node that holds it first.
        step: How far the two came; `done` if to the end.
    """

    name: str
    same_node: bool
    same_mount: bool
    clock_ahead: float | None = None
    clock_error: float | None = None
    listed_after: float | None = None
    found_after: float | None = None
    replaced_after: float | None = None
    deleted_after: float | None = None
    gone_after: float | None = None
    beat_after: float | None = None
    races: Mapping[str, Race] = attrs.field(factory=dict)
    locks: Mapping[str, Sequence[LockTest]] = attrs.field(factory=dict)
    step: str = "hello"

    @property
    def is_done(self) -> bool:
        return self.step == "done"
