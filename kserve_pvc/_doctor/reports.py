"""
The messages between two doctors on two nodes, and their reports.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import attrs

from kserve_pvc._format.codec import integer, text
from kserve_pvc._format.log_entry import Holder, to_holder
from kserve_pvc._volume.profile import LockAnswer

MAX_MESSAGE_BYTES = 64 * 1024
MAX_TIMESTAMP = 1e11

LockVerdict = Literal["excludes", "not exclusive", "unsupported", "unclear"]


class PeerLostError(Exception):
    """
    The other doctor stopped. Internal: the report says how far the tests came.
    """


def _timestamp(_: object, field: attrs.Attribute[Any], value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_TIMESTAMP:
        raise TypeError(f"`{field.name}` must be a timestamp")


@attrs.frozen(kw_only=True)
class Hello:
    """
    The announcement of a doctor that waits for a peer. `device` distinguishes two mounts on one node.
    """

    rendezvous: str = attrs.field(validator=text)
    holder: Holder = attrs.field(converter=to_holder)
    device: int = attrs.field(validator=integer)


@attrs.frozen(kw_only=True)
class Message:
    """
    One numbered message of an exchange.

    Args:
        to: The directory name of the receiver.
        written: When this message was written, by the clock of the sender.
        seen: When the previous message of the receiver was seen, by the clock of the sender.
        payload: A JSON object.
    """

    to: str = attrs.field(validator=text)
    step: int = attrs.field(validator=integer)
    written: float = attrs.field(validator=_timestamp)
    seen: float = attrs.field(validator=_timestamp)
    payload: str = attrs.field(validator=text)


@attrs.frozen(kw_only=True)
class Race:
    """
    The outcome of names that both nodes created at the same time.

    Args:
        rounds: How many names both nodes created.
        contested: In how many rounds the two calls overlapped in time, as far as the clocks can tell.
        both_won, neither_won: In how many rounds the call succeeded on both nodes, or on neither.
        supported: False if a node does not support the call; then there were no rounds.
    """

    rounds: int
    contested: int
    both_won: int
    neither_won: int
    supported: bool


@attrs.frozen(kw_only=True)
class LockTest:
    """
    The results of two nodes that requested the same lock.

    Args:
        held: The result of the first node, which holds the lock if it was granted.
        second: The result of the second node meanwhile. `granted` means that the lock does not exclude.
        after_release: The result of the second node after the first had released the lock; None if it was never held.
    """

    held: LockAnswer
    second: LockAnswer | None
    after_release: LockAnswer | None

    @property
    def verdict(self) -> LockVerdict:
        if self.held == "granted" and self.second == "granted":
            return "not exclusive"
        if (self.held, self.second, self.after_release) == ("granted", "refused", "granted"):
            return "excludes"
        return "unsupported" if "unsupported" in (self.held, self.second) else "unclear"


@attrs.frozen(kw_only=True)
class PeerReport:
    """
    What two nodes found out about each other through the volume. Times are in seconds; None means not within the test.

    Args:
        name: The other process.
        same_node, same_mount: Whether the other process shares this kernel, and this very mount. Then the results say
            nothing about other nodes.
        clock_ahead: How far its clock is ahead of this one, plus or minus `clock_error`.
        listed_after: Until a new name appeared in a listing.
        found_after: Until a new name was found that had been looked up before it existed.
        replaced_after: Until opening a replaced file returned the new content.
        deleted_after, gone_after: Until a deleted file could not be opened, and until `stat` failed.
        heartbeat_after: The longest wait for a heartbeat that is written every half second.
        races: By the call that the nodes raced with.
        locks: By kind of lock, one test for each node that holds it first.
        step: The last step that was started; `done` if all were completed.
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
    heartbeat_after: float | None = None
    races: Mapping[str, Race] = attrs.field(factory=dict)
    locks: Mapping[str, Sequence[LockTest]] = attrs.field(factory=dict)
    step: str = "hello"

    @property
    def is_done(self) -> bool:
        return self.step == "done"

    @property
    def has_compared_names(self) -> bool:
        """
        Whether the step was completed that measures when changes of the other node are seen.
        """
        return self.step not in ("hello", "clocks", "names")
