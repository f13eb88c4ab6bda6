"""
Counting the bytes of a download, and notifying what observes it.
"""

from __future__ import annotations

import threading
import time

from kserve_pvc._download.cancellation import Cancellation
from kserve_pvc._format.records import Beat, Claim
from kserve_pvc._keys.claims import Sign
from kserve_pvc._show.events import (
    BytesAdopted,
    BytesReceived,
    Event,
    Listener,
    RequestRetried,
    Subject,
    WaitingForDownload,
)
from kserve_pvc.locks.lease import Heartbeat, LeaseLostError


class StoppedError(Exception):
    """
    The call is over, and what still runs for it ends.
    """


class Tally:
    """
    Counts what a call moved, for its heartbeat and its events, and ends the transfer when the claim is lost or the call
    is over.
    """

    def __init__(self, subject: Subject, listener: Listener, cancellation: Cancellation) -> None:
        self.subject = subject
        self._listener = listener
        self._cancellation = cancellation
        self._guard = threading.Lock()
        self._total = self._done = 0
        self._started: float | None = None
        self._is_announced = False
        self._waiting_since: float | None = None
        self._sign_changed = 0.0
        self._last_sign = b""
        self._is_stopped = False
        self.fetched = 0
        self.heart: Heartbeat | None = None

    def tell(self, event: Event) -> None:
        """
        Notify the listener, unless the call is over.
        """
        if not self._is_stopped:
            self._listener(event)

    def stop(self) -> None:
        """
        End what runs for this call at its next check. Events of what cannot be ended at once are dropped.
        """
        self._is_stopped = True

    def begin(self) -> None:
        """
        Begin an attempt. The size of the model is known when its listing is complete.
        """
        with self._guard:
            self._total, self._done = 0, 0
            self._started, self._is_announced = time.monotonic(), False

    def announce(self, total: int) -> None:
        """
        Note that the listing is complete, and report what was moved during it.
        """
        with self._guard:
            self._total, early, self._is_announced = total, self._done, True
        if early:
            self.tell(BytesReceived(**self.subject, size_bytes=early))

    def progress(self) -> tuple[int, int, int]:
        """
        Return bytes done, bytes in total, and bytes per second.
        """
        with self._guard:
            seconds = 0.0 if self._started is None else time.monotonic() - self._started
            return self._done, self._total, int(self._done / seconds) if seconds else 0

    def check(self) -> None:
        """
        Raises:
            StoppedError: The call is over, or was cancelled.
            LeaseLostError: The claim is lost.
        """
        if self._is_stopped or self._cancellation.is_cancelled:
            raise StoppedError
        if self.heart is None:
            raise LeaseLostError
        self.heart.check()

    def adopted(self, size_bytes: int) -> None:
        with self._guard:
            self._done += size_bytes
            is_announced = self._is_announced
        if is_announced:
            self.tell(BytesAdopted(**self.subject, size_bytes=size_bytes))

    def received(self, size_bytes: int) -> None:
        with self._guard:
            self._done += size_bytes
            self.fetched += size_bytes
            is_announced = self._is_announced
        if is_announced:
            self.tell(BytesReceived(**self.subject, size_bytes=size_bytes))

    def retried(self, reason: str, delay: float) -> None:
        self.tell(RequestRetried(**self.subject, reason=reason, delay=delay))

    def look(self, sign: Sign | None) -> None:
        """
        Note when the sign of life of the current holder last changed.
        """
        raw = b"" if sign is None else sign.raw
        if raw != self._last_sign or not self._sign_changed:
            self._last_sign, self._sign_changed = raw, time.monotonic()

    def waiting(self, sign: Sign | None) -> WaitingForDownload:
        """
        Describe the wait for the holder of a claim.
        """
        current = time.monotonic()
        if self._waiting_since is None:
            self._waiting_since = current
        beat = sign.beat if sign is not None and sign.beat is not None else Beat(count=0)
        owner = sign.owner if sign is not None and isinstance(sign.owner, Claim) else None
        return WaitingForDownload(
            **self.subject,
            holder="an unknown process" if sign is None else sign.holder,
            since="unknown" if owner is None else owner.claimed_at.isoformat(timespec="seconds"),
            waited=current - self._waiting_since,
            idle=current - self._sign_changed,
            bytes_done=beat.bytes_done,
            bytes_total=beat.bytes_total,
            bytes_per_second=beat.bytes_per_second,
        )
