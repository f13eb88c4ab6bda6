"""
What `ensure` would do.
"""

from __future__ import annotations

from typing import Literal

import attrs

from kserve_pvc._download.rate import read_rate
from kserve_pvc._download.reuse import find_donors, reusable_bytes, shared_bytes
from kserve_pvc._format.log_entry import LogEntry
from kserve_pvc._source.contract import Resolved
from kserve_pvc._source.ref import ModelRef
from kserve_pvc._volume.reading import Volume


@attrs.frozen(kw_only=True)
class Plan:
    """
    What `ensure` would do. Sizes are bytes; `seconds` is an estimate at the rate last measured, or None without one.

    Args:
        bytes_reusable: What is on the volume already and will be taken over if it proves itself.
        bytes_shared: How much of that is in complete files, which get a second name where the volume has hard links,
            and take no space.
    """

    uri: str
    key: str
    version: str
    action: Literal["nothing", "download"]
    files: int
    size_bytes: int
    bytes_to_fetch: int
    bytes_reusable: int
    free_bytes: int
    seconds: float | None
    bytes_shared: int = 0

    @property
    def fits(self) -> bool:
        """Whether there is enough free space."""
        return self.bytes_to_fetch + self.bytes_reusable - self.bytes_shared <= self.free_bytes

    def _repr_html_(self) -> str:
        from kserve_pvc._show.html import show_plan

        return show_plan(**attrs.asdict(self), fits=self.fits)


def plan_nothing(volume: Volume, ref: ModelRef, entry: LogEntry) -> Plan:
    """
    Plan for a model that is present as requested.
    """
    return Plan(
        uri=ref.uri,
        key=ref.key,
        version=entry.version,
        action="nothing",
        files=entry.files,
        size_bytes=entry.size_bytes,
        bytes_to_fetch=0,
        bytes_reusable=0,
        free_bytes=volume.free_bytes(),
        seconds=0.0,
    )


def plan_download(volume: Volume, ref: ModelRef, resolved: Resolved, *, shares: bool) -> Plan:
    """
    Plan for what the source holds, without what is on the volume already.

    Args:
        shares: Whether complete files get a second name, which needs digests.
    """
    donors = find_donors(volume, resolved.ref)
    reusable = reusable_bytes(donors, resolved)
    to_fetch = resolved.size_bytes - reusable
    rate = read_rate(volume) if to_fetch else 0
    return Plan(
        uri=ref.uri,
        key=ref.key,
        version=resolved.version,
        action="download",
        files=len(resolved.files),
        size_bytes=resolved.size_bytes,
        bytes_to_fetch=to_fetch,
        bytes_reusable=reusable,
        free_bytes=volume.free_bytes(),
        seconds=to_fetch / rate if rate else (None if to_fetch else 0.0),
        bytes_shared=shared_bytes(donors, resolved) if shares else 0,
    )
