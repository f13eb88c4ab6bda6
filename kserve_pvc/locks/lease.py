"""
The heart of a claim or of a reader's lease: a thread that shows a sign of life.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from time import monotonic

from kserve_pvc._format.records import Beat, encode_beat

# A lease of 30 s is renewed every 5 s and given up by its holder after 20 s, so that holder and observer agree even
# if their clocks run at rates that differ by half.
BEATS_PER_LEASE = 6
RENEW_DEADLINE = 2 / 3


class LeaseLostError(Exception):
    """
    The lease could not be renewed in time, or somebody claimed a higher number. Not an error of the caller's.
    """


class Heart:
    """
    Renews one lease until it is stopped.

    Reading and writing the volume happens in a thread of its own, because a hard-mounted volume may hang for minutes;
    whoever calls `check` compares clocks and never waits. After a fork the child has no heart, and `check` says so.
    """

    def __init__(
        self,
        fd: int,
        *,
        lease_seconds: float,
        progress: Callable[[], tuple[int, int, int]] = lambda: (0, 0, 0),
        superseded: Callable[[], bool] = lambda: False,
    ) -> None:
        self._fd = fd
        self._lease_seconds = lease_seconds
        self._progress = progress
        self._superseded = superseded
        self._count = 0
        self._lost = False
        self._stop = threading.Event()
        self._renewed = monotonic()
        self._write(released=False)
        self._thread = threading.Thread(target=self._run, name="kserve-pvc-heart", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """
        Raises:
            LeaseLostError: Others may believe by now that this process is dead.
        """
        if self._lost or monotonic() - self._renewed > self._lease_seconds * RENEW_DEADLINE:
            self._lost = True
            raise LeaseLostError

    def stop(self) -> None:
        """
        Say goodbye, so that nobody has to wait for the lease to run out. A hanging volume is waited for two seconds.
        """
        self._stop.set()
        self._thread.join(2.0)

    def _run(self) -> None:
        pause = self._lease_seconds / BEATS_PER_LEASE
        # An error of the volume is one missed beat: `check` decides when too many are missed.
        while not self._stop.wait(pause):
            with suppress(OSError):
                if self._superseded():
                    self._lost = True
                    break
                began = monotonic()
                self._write(released=False)
                self._renewed = began  # Others may have seen it as early as that.
        with suppress(OSError):
            self._write(released=True)
        with suppress(OSError):
            os.close(self._fd)

    def _write(self, *, released: bool) -> None:
        self._count += 1
        done, total, rate = self._progress()
        beat = Beat(count=self._count, released=released, bytes_done=done, bytes_total=total, bytes_per_second=rate)
        os.pwrite(self._fd, encode_beat(beat), 0)
        os.fsync(self._fd)
