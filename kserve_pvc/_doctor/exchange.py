"""
The tests that two doctors run with each other, step by step, through numbered messages on the volume.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import PurePosixPath
from typing import Any

import attrs

from kserve_pvc._doctor.reports import (
    MAX_MESSAGE_BYTES,
    MAX_TIMESTAMP,
    Hello,
    LockTest,
    Message,
    PeerLostError,
    PeerReport,
    Race,
)
from kserve_pvc._format import layout
from kserve_pvc._format.codec import decode, encode
from kserve_pvc._format.records import BEAT_BYTES
from kserve_pvc._volume.calls import UNSUPPORTED
from kserve_pvc._volume.profile import LockAnswer, lock_range, try_lock
from kserve_pvc._volume.scratch import Scratch, open_scratch
from kserve_pvc._volume.writing import VolumeWriter
from kserve_pvc.errors import StoreError
from kserve_pvc.locks.liveness import is_provably_dead

# Operations that must succeed for at most one caller.
RACED = ("mkdir", "create", "link", "rename")
LOCKS = ("flock", "range_lock")
# Listing a directory on NFS refreshes the kernel's attributes of its subdirectories, and so of the names in them.
# Messages are found by listing, so names that are to be looked up without a listing are in a deeper directory.
_UNLISTED = PurePosixPath("deep", "unlisted")
_LATE_HEARTBEAT_SECONDS = 1.0
_POLL_SECONDS = 0.004
_SLOT_SECONDS = 0.015
_LEAD_SECONDS = 0.2
_LOCK_SECONDS = 5.0
_CLOCK_MESSAGES = 6
_Delays = Mapping[str, float | None]


@attrs.frozen(kw_only=True)
class ExchangeLimits:
    """
    How long the tests of two doctors may take.

    Args:
        rounds: How many names are raced for with each call.
        silence: Seconds without a message or heartbeat after which the peer counts as lost.
        visibility: Seconds to watch for changes of the peer. NFS hides a name that was looked up before it existed for
            up to a minute.
        heartbeats: Seconds to watch heartbeats.
        total: Seconds for everything.
    """

    rounds: int = 40
    silence: float = 20.0
    visibility: float = 75.0
    heartbeats: float = 2.0
    total: float = 300.0


def read_heartbeat(writer: VolumeWriter, name: str) -> bytes:
    """
    Return the current heartbeat of a doctor, to be compared with a later one.
    """
    return read_listed(writer, layout.DOCTOR / name / "beat", BEAT_BYTES)


def read_listed(writer: VolumeWriter, place: PurePosixPath, limit: int) -> bytes:
    """
    Read a file if a listing shows it. On NFS, looking up a name before it exists would hide it for half a minute.
    """
    with suppress(StoreError, OSError):
        return (
            (writer.read(place, limit, uncached=True) or b"") if place.name in writer.list_names(place.parent) else b""
        )
    return b""


class Exchange:
    """
    The tests of two doctors that have found each other. Both run the same steps in the same order.
    """

    def __init__(
        self,
        writer: VolumeWriter,
        scratch: Scratch,
        own: PurePosixPath,
        other: PurePosixPath,
        peer_hello: Hello,
        hello: Hello,
        limits: ExchangeLimits,
    ) -> None:
        self._writer = writer
        self._scratch = scratch
        self._own = own
        self._other = other
        self._peer_holder = peer_hello.holder
        self._limits = limits
        self._is_first = own.name < other.name
        self._step = 0
        self._deadline = time.monotonic() + limits.total
        self._seen = 0.0
        # The bounds of how far the peer's clock is ahead, from the times at which messages were written and seen.
        self._ahead = [-math.inf, math.inf]
        self._clock_ahead = self._clock_error = 0.0
        self._written: dict[int, float] = {}
        same_node = bool(hello.holder.boot_id) and hello.holder.boot_id == peer_hello.holder.boot_id
        self._report: dict[str, Any] = {
            "name": str(peer_hello.holder),
            "same_node": same_node,
            "same_mount": same_node and hello.device == peer_hello.device,
        }

    def run(self) -> PeerReport:
        """
        Run all tests. If the peer stops, the report says at which step.
        """
        steps = {
            "clocks": self._clocks,
            "names": self._names,
            "races": self._races,
            "locks": self._locks,
            "heartbeats": self._heartbeats,
        }
        for name, step in steps.items():
            self._report["step"] = name
            try:
                self._report |= step()
            except PeerLostError:
                return PeerReport(**self._report)
        with suppress(PeerLostError):  # The peer has all results, and may be gone before it sees this message.
            self._exchange({})
        return PeerReport(**{**self._report, "step": "done"})

    def _exchange(self, payload: Mapping[str, Any]) -> Mapping[str, Any]:
        """
        Send a message and wait for the one of the peer: a barrier between two steps.
        """
        self._step += 1
        self._written[self._step] = time.time()
        message = Message(
            to=self._other.name,
            step=self._step,
            written=self._written[self._step],
            seen=self._seen,
            payload=json.dumps(payload),
        )
        # Renamed, so that a listed message is complete; not synced, since it need not survive a crash of this node.
        self._scratch.write("draft", encode(message))
        self._scratch.replace("draft", self._message_name())
        received = self._receive()
        self._narrow_clock_bounds(received)
        return _parse(received.payload)

    def _message_name(self) -> str:
        return f"{self._step:06d}"

    def _receive(self) -> Message:
        heartbeat, began = b"", time.monotonic()
        silent_since, read_at = began, began + _LATE_HEARTBEAT_SECONDS
        longest = self._limits.silence + self._limits.visibility
        while True:
            now = time.monotonic()
            names = self._writer.list_names(self._other)
            if not names:
                raise PeerLostError  # It ended and deleted its directory.
            # NFS 3 detects a changed directory by its timestamp, so a listing made within the same clock tick as the
            # change may stay cached: the message is also read without being listed.
            if self._message_name() in names or now >= read_at:
                read_at = now + _LATE_HEARTBEAT_SECONDS
                if (message := self._read_message()) is not None:
                    self._seen = time.time()
                    return message
            newer = read_heartbeat(self._writer, self._other.name)
            if newer and newer != heartbeat:
                heartbeat, silent_since = newer, now
            if now - silent_since > _LATE_HEARTBEAT_SECONDS and is_provably_dead(self._peer_holder):
                raise PeerLostError
            # A peer may be alive and never send a message, if it is in an exchange with a third doctor.
            if now - silent_since > self._limits.silence or now - began > longest or now > self._deadline:
                raise PeerLostError
            time.sleep(_POLL_SECONDS)

    def _read_message(self) -> Message | None:
        with suppress(StoreError, OSError):
            name = self._message_name()
            message = decode(Message, self._writer.read(self._other / name, MAX_MESSAGE_BYTES) or b"", name)
            if message.to == self._own.name and message.step == self._step:
                return message
        return None

    def _narrow_clock_bounds(self, received: Message) -> None:
        # The peer wrote its message before it was seen here, and saw ours after it was written here.
        self._ahead[0] = max(self._ahead[0], received.written - self._seen)
        if received.step > 1 and received.seen > 0:
            self._ahead[1] = min(self._ahead[1], received.seen - self._written[received.step - 1])

    def _clocks(self) -> Mapping[str, Any]:
        for _ in range(_CLOCK_MESSAGES):
            self._exchange({})
        least, most = self._ahead
        if not (math.isfinite(least) and math.isfinite(most)):
            return {}
        self._clock_ahead, self._clock_error = (least + most) / 2, max((most - least) / 2, 0.0)
        return {"clock_ahead": self._clock_ahead, "clock_error": self._clock_error}

    def _names(self) -> Mapping[str, Any]:
        with (
            open_scratch(self._writer, self._own / _UNLISTED) as unlisted,
            open_scratch(self._writer, self._own / "listed") as listed,
        ):
            for name in ("replaced", "deleted"):
                unlisted.write(name, b"old")
            self._exchange({})
            self._look_up_early()
            self._exchange({})
            for directory, name in ((unlisted, "new"), (unlisted, "newer"), (listed, "new")):
                directory.write(name, b"new")
            unlisted.replace("newer", "replaced")
            unlisted.remove("deleted")
            self._exchange({})
            seen = self._watch()
            self._exchange({})  # The peer may still wait for a cache to expire.
        return seen

    def _look_up_early(self) -> None:
        self._writer.list_names(self._other / "listed")
        for name in ("new", "replaced", "deleted"):
            self._is_gone(name)
            self._content(name)

    def _content(self, name: str) -> bytes | None:
        """Return the content of a file of the peer, or None if it cannot be opened."""
        with suppress(StoreError, OSError):
            return self._writer.read(self._other / _UNLISTED / name, 16)
        return None

    def _is_gone(self, name: str) -> bool:
        try:
            os.lstat(self._writer.absolute(self._other / _UNLISTED / name))
        except OSError:
            return True
        return False

    def _watch(self) -> _Delays:
        signs: dict[str, Callable[[], bool]] = {
            "listed_after": lambda: "new" in self._writer.list_names(self._other / "listed"),
            "found_after": lambda: self._content("new") == b"new",
            "replaced_after": lambda: self._content("replaced") == b"new",
            "gone_after": lambda: self._is_gone("deleted"),
            "deleted_after": lambda: self._content("deleted") is None,
        }
        began = time.monotonic()
        seen: dict[str, float | None] = dict.fromkeys(signs)
        while None in seen.values() and time.monotonic() - began < self._limits.visibility:
            for name, shows in signs.items():
                if seen[name] is None and shows():
                    seen[name] = time.monotonic() - began
            time.sleep(_POLL_SECONDS)
        return seen

    def _races(self) -> Mapping[str, Any]:
        place = (self._own if self._is_first else self._other) / "race"
        self._writer.make_directory(place)
        with open_scratch(self._writer, place) as arena:
            mine = {what: self._race(arena, what) for what in RACED}
            reply = self._exchange({"races": mine})
        theirs = reply.get("races")
        return {
            "races": {what: self._judge(mine[what], _attempts(theirs, what, self._limits.rounds)) for what in RACED}
        }

    def _race(self, arena: Scratch, what: str) -> list[list[float]] | None:
        """Create names at agreed times. Each attempt is its begin, its end, and 1 if it created the name."""
        rounds = self._limits.rounds
        for number in range(rounds if what in ("link", "rename") else 0):
            arena.write(self._private(what, number), b"")
        start = self._agree_on_start()
        attempts: list[list[float]] = []
        for number in range(rounds):
            # The clock difference is known up to an error, and its middle is most likely: the first node sweeps from
            # early to late, mostly close to the middle.
            sweep = min(self._clock_error, _SLOT_SECONDS) * (2 * number / rounds - 1) ** 3 if self._is_first else 0.0
            time.sleep(max(0.0, start + number * _SLOT_SECONDS + sweep - time.time()))
            began = time.time()
            won = self._attempt(arena, what, number)
            if won is None:
                return None
            attempts.append([began, time.time(), float(won)])
        return attempts

    def _agree_on_start(self) -> float:
        """Return the time by this clock at which both begin, which the first node by name proposes."""
        self._exchange({})
        now = time.time()
        start = self._exchange({"start": now + _LEAD_SECONDS}).get("start")
        if self._is_first:
            return now + _LEAD_SECONDS
        if not isinstance(start, int | float) or not abs(start) < MAX_TIMESTAMP:
            return now
        return min(max(start - self._clock_ahead, now), now + 10 * _LEAD_SECONDS)

    def _private(self, what: str, number: int) -> str:
        return f"{what}-{number}-{'first' if self._is_first else 'second'}"

    def _attempt(self, arena: Scratch, what: str, number: int) -> bool | None:
        name = f"{what}-{number}"
        acts: dict[str, Callable[[], Any]] = {
            "mkdir": lambda: arena.make_directory(name),
            "create": lambda: os.close(arena.create(name)),
            "link": lambda: arena.link(self._private(what, number), name),
            "rename": lambda: arena.move(self._private(what, number), name),
        }
        try:
            acts[what]()
        except FileExistsError:
            return False
        except OSError as error:
            return None if error.errno in UNSUPPORTED else False
        return True

    def _judge(self, mine: Sequence[Sequence[float]] | None, theirs: Sequence[Sequence[float]] | None) -> Race:
        if mine is None or theirs is None:
            return Race(rounds=0, contested=0, both_won=0, neither_won=0, supported=False)
        pairs = list(zip(mine, theirs, strict=False))
        ahead = self._clock_ahead
        won = [m[2] + t[2] for m, t in pairs]
        return Race(
            rounds=len(pairs),
            contested=sum(m[0] <= t[1] - ahead and t[0] - ahead <= m[1] for m, t in pairs),
            both_won=won.count(2.0),
            neither_won=won.count(0.0),
            supported=True,
        )

    def _locks(self) -> Mapping[str, Any]:
        tests: dict[str, list[LockTest]] = {kind: [] for kind in LOCKS}
        place = (self._own if self._is_first else self._other) / "locks"
        self._writer.make_directory(place)
        with open_scratch(self._writer, place) as arena:
            for kind in LOCKS:
                for first_holds in (True, False):
                    tests[kind].append(self._lock(arena, f"{kind}-{first_holds}", kind, first_holds == self._is_first))
        return {"locks": tests}

    def _lock(self, arena: Scratch, name: str, kind: str, holds: bool) -> LockTest:
        """One node holds the lock, the other requests it meanwhile and after its release; both share their results."""
        with _open_file(arena, name) as fd:
            first = _request_lock(fd, kind) if holds else None
            peer_first = self._exchange({"lock": first})
            second = _request_lock(fd, kind) if not holds else None
            peer_second = self._exchange({"lock": second})
            if holds or second == "granted":
                _release(fd, kind)
            self._exchange({})
            third = _retry_until_granted(fd, kind) if not holds else None
            peer_third = self._exchange({"lock": third})
        return LockTest(
            held=first or _lock_result(peer_first) or "unsupported",
            second=second or _lock_result(peer_second),
            after_release=third or _lock_result(peer_third),
        )

    def _heartbeats(self) -> Mapping[str, Any]:
        began = last = time.monotonic()
        longest, heartbeat, count = 0.0, b"", 0
        limits = self._limits
        while (now := time.monotonic()) - began < limits.heartbeats or (count < 2 and now - began < limits.silence):
            newer = read_heartbeat(self._writer, self._other.name)
            if newer and newer != heartbeat:
                longest = max(longest, now - last) if count else 0.0
                heartbeat, last, count = newer, now, count + 1
            time.sleep(_POLL_SECONDS)
        self._exchange({})
        return {"heartbeat_after": longest if count >= 2 else None}


def _parse(payload: str) -> Mapping[str, Any]:
    try:
        found = json.loads(payload)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _attempts(races: object, what: str, most: int) -> Sequence[Sequence[float]] | None:
    """Return the attempts that the peer reports, or None if they are malformed."""
    found = races.get(what) if isinstance(races, dict) else None
    if not isinstance(found, list) or len(found) > most or not all(map(_is_attempt, found)):
        return None
    return found


def _is_attempt(value: object) -> bool:
    if not isinstance(value, list) or len(value) != 3:
        return False
    return all(isinstance(item, int | float) and abs(item) < MAX_TIMESTAMP for item in value) and value[2] in (0, 1)


def _lock_result(reply: Mapping[str, Any]) -> LockAnswer | None:
    known: Mapping[object, LockAnswer] = {
        "granted": "granted",
        "refused": "refused",
        "unsupported": "unsupported",
        "hangs": "hangs",
    }
    result = reply.get("lock")
    return known.get(result) if isinstance(result, str) else None


@contextmanager
def _open_file(arena: Scratch, name: str) -> Iterator[int]:
    fd = arena.open_shared(name)
    try:
        yield fd
    finally:
        os.close(fd)


def _request_lock(fd: int, kind: str) -> LockAnswer:
    import fcntl

    if kind == "flock":
        return try_lock(fd, lambda own: fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB), _LOCK_SECONDS)
    return try_lock(fd, lambda own: lock_range(own, release=False), _LOCK_SECONDS)


def _retry_until_granted(fd: int, kind: str) -> LockAnswer:
    # Some volumes grant a released lock to another node only after a delay.
    deadline = time.monotonic() + 3.0
    while (result := _request_lock(fd, kind)) == "refused" and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return result


def _release(fd: int, kind: str) -> None:
    import fcntl

    with suppress(OSError):
        if kind == "flock":
            fcntl.flock(fd, fcntl.LOCK_UN)
        else:
            lock_range(fd)
