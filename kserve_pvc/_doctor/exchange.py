"""
The tests that two doctors do with each other, step by step, through numbered messages on the volume.
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import PurePosixPath
from typing import Any

from kserve_pvc._doctor.reports import (
    FARTHEST,
    MAX_MESSAGE_BYTES,
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
from kserve_pvc._volume.profile import LockAnswer, lock_range, try_lock
from kserve_pvc._volume.scratch import Scratch, open_scratch
from kserve_pvc._volume.writing import VolumeWriter
from kserve_pvc.errors import StoreError
from kserve_pvc.locks.liveness import is_provably_dead

# Ways to make a name of which at most one caller may be told that he made it.
RACED = ("mkdir", "create", "link", "rename")
LOCKS = ("flock", "range_lock")
ROUNDS = 40
_UNSUPPORTED = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EXDEV, errno.EMLINK}
# On NFS a listing refreshes what the kernel believes of the directories in it, and so of their names. Messages are
# found by listing, so names that are asked for without one lie deeper.
_UNLISTED = PurePosixPath("deep", "unlisted")
_LONG_BEAT = 1.0
_SILENCE = 20.0
_POLL = 0.004
_LONGEST_MEETING = 300.0
_SLOT = 0.015
_LEAD = 0.2
_LONGEST_LOOK = 75.0  # NFS hides a name that was looked for too early for up to a minute.
_WATCHED = 2.0
_CLOCK_LOOKS = 6
Seen = Mapping[str, float | None]


def read_beat(writer: VolumeWriter, name: str) -> bytes:
    """
    The beat of a doctor as it is now, to be compared with another one of its beats.
    """
    return read_listed(writer, layout.DOCTOR / name / "beat", BEAT_BYTES)


def read_listed(writer: VolumeWriter, place: PurePosixPath, limit: int) -> bytes:
    """
    Read a file if it is listed: on NFS one that was asked for before it was made stays hidden for half a minute.
    """
    with suppress(StoreError, OSError):
        return (
            (writer.read(place, limit, uncached=True) or b"") if place.name in writer.list_names(place.parent) else b""
        )
    return b""


class Exchange:
    """
    The steps of two doctors that have found each other.
    """

    def __init__(
        self,
        writer: VolumeWriter,
        scratch: Scratch,
        own: PurePosixPath,
        other: PurePosixPath,
        their: Hello,
        hello: Hello,
    ) -> None:
        self._writer = writer
        self._scratch = scratch
        self._own = own
        self._other = other
        self._their_holder = their.holder
        self._is_first = own.name < other.name
        self._step = 0
        self._ends_at = time.monotonic() + _LONGEST_MEETING
        self._seen = 0.0
        # What the other clock is ahead at least and at most, from who can have seen what of whom when.
        self._ahead = [-math.inf, math.inf]
        self._clock_ahead = self._clock_error = 0.0
        self._written: dict[int, float] = {}
        same_node = bool(hello.holder.boot_id) and hello.holder.boot_id == their.holder.boot_id
        self._report: dict[str, Any] = {
            "name": str(their.holder),
            "same_node": same_node,
            "same_mount": same_node and hello.device == their.device,
        }

    def run(self) -> PeerReport:
        steps = {
            "clocks": self._clocks,
            "names": self._names,
            "races": self._races,
            "locks": self._locks,
            "beats": self._beats,
        }
        for name, step in steps.items():
            self._report["step"] = name
            try:
                self._report |= step()
            except PeerLostError:
                return PeerReport(**self._report)
        with suppress(PeerLostError):  # It has everything, and may have left before it saw this.
            self._exchange({})
        return PeerReport(**{**self._report, "step": "done"})

    def _exchange(self, answer: Mapping[str, Any]) -> Mapping[str, Any]:
        """
        Tell the other side, and wait for what it tells. Neither goes on before both are here.
        """
        self._step += 1
        self._written[self._step] = time.time()
        message = Message(
            to=self._other.name,
            step=self._step,
            written=self._written[self._step],
            seen=self._seen,
            answer=json.dumps(answer),
        )
        # Under another name first, so that it is whole when it is listed; not synced, as it may go with this kernel.
        self._scratch.write("unsaid", encode(message))
        self._scratch.replace("unsaid", self._name())
        heard = self._await()
        self._narrow(heard)
        return _parsed(heard.answer)

    def _name(self) -> str:
        return f"{self._step:06d}"

    def _await(self) -> Message:
        beat, began = b"", time.monotonic()
        silent_since, ask_at = began, began + _LONG_BEAT
        while True:
            now = time.monotonic()
            names = self._writer.list_names(self._other)
            if not names:
                raise PeerLostError  # It has left, and taken its directory with it.
            # NFS 3 tells a changed directory by its time alone, and so may keep a listing from the very tick of the
            # change.
            if self._name() in names or now >= ask_at:
                ask_at = now + _LONG_BEAT
                if (message := self._heard()) is not None:
                    self._seen = time.time()
                    return message
            newer = read_beat(self._writer, self._other.name)
            if newer and newer != beat:
                beat, silent_since = newer, now
            if now - silent_since > _LONG_BEAT and is_provably_dead(self._their_holder):
                raise PeerLostError
            # It may beat and have nothing to say: its other half is somebody else.
            if now - silent_since > _SILENCE or now - began > _SILENCE + _LONGEST_LOOK or now > self._ends_at:
                raise PeerLostError
            time.sleep(_POLL)

    def _heard(self) -> Message | None:
        with suppress(StoreError, OSError):
            message = decode(
                Message, self._writer.read(self._other / self._name(), MAX_MESSAGE_BYTES) or b"", self._name()
            )
            if message.to == self._own.name and message.step == self._step:
                return message
        return None

    def _narrow(self, heard: Message) -> None:
        # It wrote before I saw, and it saw what I wrote after I wrote it: the difference of the clocks lies between.
        self._ahead[0] = max(self._ahead[0], heard.written - self._seen)
        if heard.step > 1 and heard.seen > 0:
            self._ahead[1] = min(self._ahead[1], heard.seen - self._written[heard.step - 1])

    def _clocks(self) -> Mapping[str, Any]:
        for _ in range(_CLOCK_LOOKS):
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
            self._look_too_early()
            self._exchange({})
            for directory, name in ((unlisted, "new"), (unlisted, "newer"), (listed, "new")):
                directory.write(name, b"new")
            unlisted.replace("newer", "replaced")
            unlisted.remove("deleted")
            self._exchange({})
            seen = self._watch()
            self._exchange({})  # The other one may still be waiting for a cache of its own, and beats meanwhile.
        return seen

    def _look_too_early(self) -> None:
        self._writer.list_names(self._other / "listed")
        for name in ("new", "replaced", "deleted"):
            self._is_gone(name)
            self._content(name)

    def _content(self, name: str) -> bytes | None:
        """What a file of the other side holds; None if it cannot be opened, as whatever stands there instead."""
        with suppress(StoreError, OSError):
            return self._writer.read(self._other / _UNLISTED / name, 16)
        return None

    def _is_gone(self, name: str) -> bool:
        try:
            os.lstat(self._writer.absolute(self._other / _UNLISTED / name))
        except OSError:
            return True
        return False

    def _watch(self) -> Seen:
        signs: dict[str, Callable[[], bool]] = {
            "listed_after": lambda: "new" in self._writer.list_names(self._other / "listed"),
            "found_after": lambda: self._content("new") == b"new",
            "replaced_after": lambda: self._content("replaced") == b"new",
            "gone_after": lambda: self._is_gone("deleted"),
            "deleted_after": lambda: self._content("deleted") is None,
        }
        began = time.monotonic()
        seen: dict[str, float | None] = dict.fromkeys(signs)
        while None in seen.values() and time.monotonic() - began < _LONGEST_LOOK:
            for name, shows in signs.items():
                if seen[name] is None and shows():
                    seen[name] = time.monotonic() - began
            time.sleep(_POLL)
        return seen

    def _races(self) -> Mapping[str, Any]:
        place = (self._own if self._is_first else self._other) / "race"
        self._writer.make_directory(place)
        with open_scratch(self._writer, place) as arena:
            mine = {what: self._race(arena, what) for what in RACED}
            theirs = self._exchange({"races": mine})
        other = theirs.get("races")
        return {"races": {what: self._judge(mine[what], _attempts(other, what)) for what in RACED}}

    def _race(self, arena: Scratch, what: str) -> list[list[float]] | None:
        """Make names at agreed moments. Each attempt is when it began and ended, and 1 if it made the name."""
        for number in range(ROUNDS if what in ("link", "rename") else 0):
            arena.write(self._private(what, number), b"")
        start = self._agree_on_start()
        attempts: list[list[float]] = []
        for number in range(ROUNDS):
            # The clocks are known only so far, and best in the middle: one of the two comes earlier, then later, mostly
            # just a little.
            sweep = min(self._clock_error, _SLOT) * (2 * number / ROUNDS - 1) ** 3 if self._is_first else 0.0
            time.sleep(max(0.0, start + number * _SLOT + sweep - time.time()))
            began = time.time()
            won = self._attempt(arena, what, number)
            if won is None:
                return None
            attempts.append([began, time.time(), float(won)])
        return attempts

    def _agree_on_start(self) -> float:
        """The moment on this clock at which both begin: what the first by name proposes, once both are here."""
        self._exchange({})
        now = time.time()
        told = self._exchange({"start": now + _LEAD}).get("start")
        if self._is_first:
            return now + _LEAD
        proposed = float(told) - self._clock_ahead if isinstance(told, int | float) and abs(told) < FARTHEST else now
        return min(max(proposed, now), now + 10 * _LEAD)

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
            return None if error.errno in _UNSUPPORTED else False
        return True

    def _judge(self, mine: Sequence[Sequence[float]] | None, theirs: Sequence[Sequence[float]] | None) -> Race:
        if mine is None or theirs is None:
            return Race(rounds=0, contested=0, both_won=0, nobody_won=0, supported=False)
        pairs = list(zip(mine, theirs, strict=False))
        ahead = self._clock_ahead
        won = [m[2] + t[2] for m, t in pairs]
        return Race(
            rounds=len(pairs),
            contested=sum(m[0] <= t[1] - ahead and t[0] - ahead <= m[1] for m, t in pairs),
            both_won=won.count(2.0),
            nobody_won=won.count(0.0),
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
        """One node holds, the other tries meanwhile and again afterwards; each tells what it was answered."""
        with _open_file(arena, name) as fd:
            held = _ask(fd, kind) if holds else None
            told = self._exchange({"lock": held})
            second = _ask(fd, kind) if not holds else None
            told_second = self._exchange({"lock": second})
            if holds or second == "granted":
                _let_go(fd, kind)
            self._exchange({})
            third = _ask_until_granted(fd, kind) if not holds else None
            told_third = self._exchange({"lock": third})
        return LockTest(
            held=held or _answer(told) or "unsupported",
            second=second or _answer(told_second),
            after_release=third or _answer(told_third),
        )

    def _beats(self) -> Mapping[str, Any]:
        began = last = time.monotonic()
        longest, beat, count = 0.0, b"", 0
        while (now := time.monotonic()) - began < _WATCHED or (count < 2 and now - began < _SILENCE):
            newer = read_beat(self._writer, self._other.name)
            if newer and newer != beat:
                longest = max(longest, now - last) if count else 0.0
                beat, last, count = newer, now, count + 1
            time.sleep(_POLL)
        self._exchange({})
        return {"beat_after": longest if count >= 2 else None}


def _parsed(answer: str) -> Mapping[str, Any]:
    try:
        found = json.loads(answer)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _attempts(races: object, what: str) -> Sequence[Sequence[float]] | None:
    """What the other one says that it did, or None if that makes no sense."""
    found = races.get(what) if isinstance(races, dict) else None
    if not isinstance(found, list) or len(found) > ROUNDS:
        return None
    for attempt in found:
        if not isinstance(attempt, list) or len(attempt) != 3:
            return None
        if not all(isinstance(value, int | float) and abs(value) < FARTHEST for value in attempt) or attempt[2] not in (
            0,
            1,
        ):
            return None
    return found


def _answer(told: Mapping[str, Any]) -> LockAnswer | None:
    known: Mapping[object, LockAnswer] = {
        "granted": "granted",
        "refused": "refused",
        "unsupported": "unsupported",
        "hangs": "hangs",
    }
    answer = told.get("lock")
    return known.get(answer) if isinstance(answer, str) else None


@contextmanager
def _open_file(arena: Scratch, name: str) -> Iterator[int]:
    fd = arena.open_shared(name)
    try:
        yield fd
    finally:
        os.close(fd)


def _ask(fd: int, kind: str) -> LockAnswer:
    import fcntl

    return try_lock(
        lambda: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB) if kind == "flock" else lock_range(fd, release=False),
        5.0,
    )


def _ask_until_granted(fd: int, kind: str) -> LockAnswer:
    # Some volumes give a lock that was let go to another node only after a moment.
    deadline = time.monotonic() + 3.0
    while (answer := _ask(fd, kind)) == "refused" and time.monotonic() < deadline:
        time.sleep(_POLL)
    return answer


def _let_go(fd: int, kind: str) -> None:
    import fcntl

    with suppress(OSError):
        if kind == "flock":
            fcntl.flock(fd, fcntl.LOCK_UN)
        else:
            lock_range(fd)
