"""
Whether a source is so slow that a download would hold its claim and its room for days. Pure: the caller reads a clock.
"""

from __future__ import annotations

import threading

# Between two looks of any stream passes a poll interval. More means that none of them was waiting for the source.
_LONGEST_LOOK = 1.0


class Slowness:
    """
    Counts the bytes of all streams of a transfer, and the time in which at least one of them was waiting for bytes.

    Args:
        seconds: Over how long a rate is judged.
        least: Bytes per second below which the source is too slow.
        now: The monotonic clock.
    """

    def __init__(self, seconds: float, least: int, now: float) -> None:
        self._guard = threading.Lock()
        self._window = seconds
        self._least = least
        self._looked = now
        self._seconds = 0.0
        self._bytes = 0

    def add(self, now: float, count: int) -> float | None:
        """
        Count what a stream has received by now.

        Returns:
            Bytes per second, if the source was too slow all the while; else None.
        """
        with self._guard:
            self._seconds += min(max(0.0, now - self._looked), _LONGEST_LOOK)
            self._looked = now
            self._bytes += count
            if self._seconds < self._window:
                return None
            rate = self._bytes / self._seconds
            self._seconds, self._bytes = 0.0, 0
            return rate if rate < self._least else None
