"""
Counting the bytes of a download and telling its listeners.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from kserve_pvc._format.records import Beat, Claim
from kserve_pvc._keys.claims import Sign
from kserve_pvc._show.events import Adopted, Listener, Received, Retried, Waiting
from kserve_pvc.errors import VolumeError
from kserve_pvc.locks.lease import Heartbeat, LeaseLostError


def nothing() -> None:
    pass


class Tally:
    """
    Counts what a call moved, for its beat and its events, and stops the transfer when the claim is lost.
    """

    def __init__(self, ref: str, listener: Listener) -> None:
        self._ref = ref
        self._listener = listener
        # Who may end a call even while a source is silent, and there is nothing to tell.
        self._ask_listener: Callable[[], None] = getattr(listener, "check", nothing)
        self._guard = threading.Lock()
        self._total = self._done = 0
        self._started: float | None = None
        self._is_told = False
        self._waiting_since: float | None = None
        self._sign_changed = 0.0
        self._last_sign = b""
        self.fetched = 0
        self.heart: Heartbeat | None = None
        self.spoiled: VolumeError | None = None

    def begin(self) -> None:
        """
        An attempt begins; how large the model is will be known when its listing is complete.
        """
        with self._guard:
            self._total, self._done, self._started, self._is_told = 0, 0, time.monotonic(), False

    def start(self, total: int) -> None:
        """
        The listing is complete. What was moved while it was still coming in is told now.
        """
        with self._guard:
            self._total, early, self._is_told = total, self._done, True
        if early:
            self._listener(Received(ref=self._ref, size_bytes=early))

    def progress(self) -> tuple[int, int, int]:
        with self._guard:
            seconds = 0.0 if self._started is None else time.monotonic() - self._started
            return self._done, self._total, int(self._done / seconds) if seconds else 0

    def check(self) -> None:
        if self.heart is None:
            raise LeaseLostError
        self.heart.check()
        self._ask_listener()

    def adopted(self, size_bytes: int) -> None:
        with self._guard:
            self._done += size_bytes
            is_told = self._is_told
        if is_told:
            self._listener(Adopted(ref=self._ref, size_bytes=size_bytes))

    def received(self, size_bytes: int) -> None:
        with self._guard:
            self._done += size_bytes
            self.fetched += size_bytes
            is_told = self._is_told
        if is_told:
            self._listener(Received(ref=self._ref, size_bytes=size_bytes))

    def retried(self, reason: str, delay: float) -> None:
        self._listener(Retried(ref=self._ref, reason=reason, delay=delay))

    def look(self, sign: Sign | None) -> None:
        raw = b"" if sign is None else sign.raw
        if raw != self._last_sign or not self._sign_changed:
            self._last_sign, self._sign_changed = raw, time.monotonic()

    def waiting(self, sign: Sign | None) -> Waiting:
        moment = time.monotonic()
        if self._waiting_since is None:
            self._waiting_since = moment
        beat = sign.beat if sign is not None and sign.beat is not None else Beat(count=0)
        owner = sign.owner if sign is not None and isinstance(sign.owner, Claim) else None
        return Waiting(
            ref=self._ref,
            holder="an unknown process" if sign is None else sign.holder,
            since="unknown" if owner is None else owner.claimed_at.isoformat(timespec="seconds"),
            waited=moment - self._waiting_since,
            idle=moment - self._sign_changed,
            bytes_done=beat.bytes_done,
            bytes_total=beat.bytes_total,
            bytes_per_second=beat.bytes_per_second,
        )
