"""
How a transfer goes about it: sizes of ranges, number of streams, patience.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import attrs

from kserve_pvc import _defaults as defaults
from kserve_pvc._source.retry import ATTEMPTS, delays

KIB = 1024
MIB = 1024 * KIB


@attrs.frozen(kw_only=True)
class Tuning:
    """
    How bytes are fetched. The first five are arguments of `ModelStore` and `ensure`; the others are measured constants.

    Args:
        part_bytes: The longest range, and so the most that a killed process costs per stream.
        max_workers: The most streams at once; how many are worth while is found out on the way.
        digest: `sha256`, or `none` to trust the transport and the volume.
        stall_seconds: After how long without a byte a range is requested again on another connection.
        retry_seconds: How long a range is retried without a byte of progress before the transfer fails.
        shortest_range_bytes: The least that is worth a request of its own. Towards the end ranges shrink to it, so that
            all streams end together. Smaller files are fetched with one request.
        tiny_file_bytes: Of the files that are fetched with one request, those up to this size are tiny: most of the
            work for one needs the interpreter's lock, so more workers are slower than more requests of one worker.
        evidence_bytes: Up to this size the MD5 of a listing is good enough. For larger files a digest that is cheaper
            or more certain is requested from the source.
        trickle_bytes: A stream that receives less than this within `stall_seconds` is treated as silent.
        slow_seconds: Over how long the rate of all streams together is judged.
        least_bytes_per_second: A source that is slower than this for so long fails the transfer: it would hold the
            claim, and the room that is reserved for the model, for days.
        retry_attempts: How many tries without a byte of progress, unless the source says when to come back.
        retry_first_seconds: The pause after the first of them, before it is scattered; it doubles from there.
    """

    part_bytes: int = defaults.PART_BYTES
    max_workers: int = defaults.MAX_WORKERS
    digest: Literal["sha256", "none"] = "sha256"
    stall_seconds: float = defaults.STALL_SECONDS
    retry_seconds: float = defaults.RETRY_SECONDS
    shortest_range_bytes: int = 8 * MIB
    tiny_file_bytes: int = 256 * KIB
    evidence_bytes: int = 16 * MIB
    trickle_bytes: int = 16 * KIB
    slow_seconds: float = 600.0
    least_bytes_per_second: int = 16 * KIB
    retry_attempts: int = ATTEMPTS
    retry_first_seconds: float = 0.2

    def pauses(self, random: float) -> Iterator[float]:
        """
        The seconds between the tries of one range, scattered by `random` in [0, 1).
        """
        return delays(random, attempts=self.retry_attempts, first=self.retry_first_seconds)
