"""
The heartbeat of a claim or of a reader's lease.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from time import monotonic

from kserve_pvc._format.records import Beat, encode_beat
from kserve_pvc._threads import start_thread

# A lease of 30 s is renewed every 5 s and considered lost by its holder after 20 s, so that holder and observer agree
# even if their clocks run at rates that differ by half.
HEARTBEATS_PER_LEASE = 6
RENEW_DEADLINE = 2 / 3


class LeaseLostError(Exception):
    """
    The lease was not renewed in time, or another process took a higher number.

    Internal: the caller stops writing and waits for the other process.
    """


class Heartbeat:
    """
    Renews one lease until it is stopped.

    A thread of its own reads and writes the volume, because a hard-mounted volume may hang for minutes. `check` only
    compares clocks and never blocks. The lease belongs to the process that began it: in a forked child `check` fails
    and `stop` does nothing.

    Args:
        fd: The heartbeat file, which the thread closes.
        progress: Returns the bytes done, the total, and the bytes per second to publish.
        superseded: Returns whether another process took a higher number.
        is_shared: Whether processes of other kernels read it, which see what was synced.

    Raises:
        OSError: The first heartbeat could not be written. The file is closed.
    """

    def __init__(
        self,
        fd: int,
        *,
        lease_seconds: float,
        progress: Callable[[], tuple[int, int, int]] = lambda: (0, 0, 0),
        superseded: Callable[[], bool] = lambda: False,
        is_shared: bool = True,
    ) -> None:
        self._fd = fd
        self._is_shared = is_shared
        self._pid = os.getpid()
        self._lease_seconds = lease_seconds
        self._progress = progress
        self._superseded = superseded
        self._count = 0
        self._lost = False
        self._stop = threading.Event()
        self._renewed = monotonic()
        try:
            self._write(released=False)
            self._thread = start_thread(self._run, "kserve-pvc-heartbeat")
        except BaseException:
            self._end()  # No other process need wait for what shows no life.
            raise

    @property
    def is_ours(self) -> bool:
        """Whether the lease is this process's, and not that of a process it was forked from."""
        return os.getpid() == self._pid

    def check(self) -> None:
        """
        Raises:
            LeaseLostError: Other processes may already consider this one dead.
        """
        if self._lost or not self.is_ours or monotonic() - self._renewed > self._lease_seconds * RENEW_DEADLINE:
            self._lost = True
            raise LeaseLostError

    def stop(self) -> None:
        """
        Release the lease, so that others need not wait for it to expire. Waits two seconds for a hanging volume.
        """
        if not self.is_ours:
            return
        self._stop.set()
        self._thread.join(2.0)

    def _run(self) -> None:
        interval = self._lease_seconds / HEARTBEATS_PER_LEASE
        # An error of the volume is one missed heartbeat: `check` decides when too many are missed.
        while not self._stop.wait(interval):
            with suppress(OSError):
                if self._superseded():
                    self._lost = True
                    break
                began = monotonic()
                self._write(released=False)
                self._renewed = began  # Other processes may have seen it from here on.
        self._end()

    def _end(self) -> None:
        with suppress(OSError):
            self._write(released=True)
        with suppress(OSError):
            os.close(self._fd)

    def _write(self, *, released: bool) -> None:
        self._count += 1
        done, total, rate = self._progress()
        beat = Beat(count=self._count, released=released, bytes_done=done, bytes_total=total, bytes_per_second=rate)
        os.pwrite(self._fd, encode_beat(beat), 0)
        if self._is_shared:
            os.fsync(self._fd)
