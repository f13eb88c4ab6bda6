"""
Watching signs of life: who lives, and who has been silent for long enough. Pure: the caller looks and reads the clock.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import attrs

# How often it is looked for a sign of life while a lease lasts, and the longest pause between two looks.
_LOOKS = 20
_LONGEST_PAUSE = 0.25
# How many signs are read at each look but the first and the last, which read all of them.
_READ_AT_ONCE = 16


class Watch:
    """
    Counts for how long signs of life have stayed as they are.

    Time counts only while the observer observes: however long it was stopped, or a look hung, between two looks pass at
    most two pauses. An outage that stops the observer stops those whom it watches too. Where many are watched, a look
    reads some, in turn: the last one decides, and most of them are dead.

    Args:
        seconds: For how long a sign must stay as it is for its holder to be considered dead.
        silent: Signs that were watched for so long before, as they were then.
    """

    def __init__(self, seconds: float, silent: Mapping[str, bytes] | None = None) -> None:
        self.pause = min(_LONGEST_PAUSE, seconds / _LOOKS)
        self._seconds = seconds
        self._before = dict(silent or {})
        self._watched: dict[str, _Watched] | None = None
        self._looked = 0.0
        self._turn = 0

    @property
    def silent(self) -> Mapping[str, bytes]:
        """
        The signs of those who have been silent for long enough.
        """
        watched = self._watched or {}
        return {name: w.sign for name, w in watched.items() if w.sign is not None and w.silence >= self._seconds}

    @property
    def names(self) -> Collection[str] | None:
        """
        Whose signs are to be looked at next; None before the first look, which finds them.
        """
        if self._watched is None or len(self._watched) <= _READ_AT_ONCE or self._is_decided:
            return self._watched
        names = list(self._watched)
        turn = self._turn % len(names)
        unread = [name for name, watched in self._watched.items() if watched.sign is None]
        return {*(names + names)[turn : turn + _READ_AT_ONCE], *unread}

    @property
    def _is_decided(self) -> bool:
        return self._watched is not None and all(w.silence >= self._seconds for w in self._watched.values())

    def look(self, now: float, signs: Mapping[str, bytes | None]) -> tuple[str, ...] | None:
        """
        Take in what a look has shown.

        Args:
            now: When the look began, on a monotonic clock of this observer.
            signs: The signs of all `names`. Those who are missing have released their lease, or are provably dead;
                those who are new live. None stands for a sign that could not be read, which is not silence.

        Returns:
            Who shows a sign of life, or cannot be read for as long; empty if none does; None if another look is
            needed after a pause. There is one more look after the last silence has been long enough.
        """
        if self._watched is None:
            self._watched = {
                name: _Watched(sign, self._seconds if sign is not None and self._before.get(name) == sign else 0.0)
                for name, sign in signs.items()
            }
            self._looked = now
            return None if self._watched else ()
        passed, self._looked = min(now - self._looked, 2 * self.pause), now
        looked_at = self.names or ()
        self._turn += _READ_AT_ONCE
        gone = {name for name in looked_at if name not in signs}
        newcomers = tuple(name for name in signs if name not in self._watched)
        self._watched = {name: watched for name, watched in self._watched.items() if name not in gone}
        is_decided = self._is_decided and all(name in looked_at for name in self._watched)
        live = newcomers + tuple(
            name for name, w in self._watched.items() if w.changed(signs.get(name, w.sign), passed)
        )
        live += tuple(name for name, watched in self._watched.items() if watched.unread >= self._seconds)
        is_read = None not in signs.values()
        return live if live or (is_decided and is_read) else None


@attrs.define
class _Watched:
    """
    A sign as it was first read, and for how long it has stayed so, or could not be read.
    """

    sign: bytes | None
    silence: float
    unread: float = 0.0

    def changed(self, sign: bytes | None, passed: float) -> bool:
        if sign is None:
            self.unread += passed
            return False
        self.unread = 0.0
        if self.sign is None:
            self.sign = sign
            return False
        self.silence += passed
        return sign != self.sign
