"""
How many streams are worth while.

That is found out by trying, as the path between a volume and its source is unknown. More streams help where each is
slow (a limit per connection, a long round trip), and only cost where the processor or the network is saturated. So a
transfer begins with a few, doubles them while they mostly wait for bytes and the rate rises by at least a seventh, goes
back by one step when it does not, and halves them when the source refuses.
"""

from __future__ import annotations

FIRST_STREAMS = 4
_WINDOW_SECONDS = 0.25
_GAIN = 1.15
_REST_SECONDS = 5.0
# Streams that wait for the source for a smaller share of their time are busy with hashing and writing.
_WAITING_SHARE = 0.5


class StreamLimit:
    """
    The number of streams over time. Reads no clock: the caller says what time it is.

    Args:
        most: The most streams at once.
    """

    def __init__(self, most: int) -> None:
        self._most = max(1, most)
        self.streams = min(FIRST_STREAMS, self._most)
        self._before = 0  # How many there were before the last try, if one is under way.
        self._best = 0.0
        self._rest_until = 0.0
        self._since: tuple[float, int, float] | None = None

    def look(self, now: float, received: int, waited: float) -> float:
        """
        Judge what was received since the last look.

        Args:
            now: Monotonic seconds.
            received: Bytes so far.
            waited: Seconds that all streams together have waited for them so far.

        Returns:
            In how many seconds to look again.
        """
        if self._since is None:
            self._since = now, received, waited
        since, before, waited_before = self._since
        if now - since < _WINDOW_SECONDS:
            return _WINDOW_SECONDS - (now - since)
        rate = (received - before) / (now - since)
        is_busy = (waited - waited_before) / ((now - since) * self.streams) < _WAITING_SHARE
        self._since = now, received, waited
        if now < self._rest_until:
            return _WINDOW_SECONDS
        if self._before and rate < self._best * _GAIN:
            self.streams, self._before, self._rest_until = self._before, 0, now + _REST_SECONDS
        elif is_busy or self.streams == self._most:
            self._best, self._before = rate, 0
        elif received:
            self._best, self._before = rate, self.streams
            self.streams = min(self._most, self.streams * 2)
        return _WINDOW_SECONDS

    def congested(self, now: float, seconds: float) -> None:
        """
        Halve the streams, as the source refused or stalled, and try no more of them for a while.

        Args:
            now: Monotonic seconds.
            seconds: How long at least.
        """
        if now < self._rest_until and not self._before:
            return  # The refusals of many streams at the same time count once.
        self.streams, self._before = max(1, self.streams // 2), 0
        self._rest_until = now + max(seconds, _REST_SECONDS)
