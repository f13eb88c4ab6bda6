"""
What happens during a call, told to whoever wants to show it.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs


@attrs.frozen(kw_only=True)
class Started:
    """This process downloads: `bytes_total` to have, whether they come from the source or from a dead writer."""

    ref: str
    bytes_total: int
    files: int
    activity: str = "downloading"


@attrs.frozen(kw_only=True)
class Adopted:
    """Bytes of a dead writer were checked and taken over instead of fetched."""

    ref: str
    size_bytes: int


@attrs.frozen(kw_only=True)
class Received:
    """Bytes arrived from the source and were written."""

    ref: str
    size_bytes: int


@attrs.frozen(kw_only=True)
class Waiting:
    """
    Another process downloads. Times are seconds: `waited` by this call, `idle` without a sign of life from the holder.
    """

    ref: str
    holder: str
    since: str
    waited: float
    idle: float
    bytes_done: int
    bytes_total: int
    bytes_per_second: int


@attrs.frozen(kw_only=True)
class TookOver:
    """The holder is dead or gone, and this process takes its place."""

    ref: str
    holder: str
    reason: str


@attrs.frozen(kw_only=True)
class Unlocked:
    """The outside lock is not to be had now, so the claims on the volume alone decide who downloads."""

    ref: str
    locker: str


@attrs.frozen(kw_only=True)
class Retried:
    """The source failed, and is asked again after `delay` seconds."""

    ref: str
    reason: str
    delay: float


@attrs.frozen(kw_only=True)
class Finished:
    """The call is over, well or not."""

    ref: str
    status: str


Event = Started | Adopted | Received | Waiting | TookOver | Unlocked | Retried | Finished
Listener = Callable[[Event], None]
