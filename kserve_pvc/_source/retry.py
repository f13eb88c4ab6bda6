"""
How long to wait before a request is retried.
"""

from __future__ import annotations

from collections.abc import Iterator

ATTEMPTS = 5


def delays(random: float, *, attempts: int = ATTEMPTS, first: float = 0.2, ceiling: float = 10.0) -> Iterator[float]:
    """
    The pauses in seconds between `attempts` tries: doubling up to a ceiling, each scaled into [0.5, 1.5) by `random` in
    [0, 1).

    Without the scatter, all processes that failed together would retry together.
    """
    for attempt in range(attempts - 1):
        yield min(ceiling, first * 2**attempt) * (0.5 + random)
