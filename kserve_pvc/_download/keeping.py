"""
What an interrupted download leaves for the next call, in numbers and in a sentence.
"""

from __future__ import annotations

from contextlib import suppress

from kserve_pvc._download.reuse import find_donors, reusable_bytes
from kserve_pvc._show.units import format_bytes
from kserve_pvc._source.contract import Resolved
from kserve_pvc._source.ref import ModelRef
from kserve_pvc._volume.reading import Volume
from kserve_pvc.errors import StoreError, printable


def kept_bytes(volume: Volume, ref: ModelRef, resolved: Resolved, *, with_complete: bool) -> int:
    """
    Return how many bytes of a model the next call need not fetch, as `plan` would.

    Args:
        with_complete: Whether it may take over what complete models of the same source have.
    """
    with suppress(OSError, StoreError):
        return reusable_bytes(find_donors(volume, ref, with_complete=with_complete), resolved)
    return 0


def describe_kept(ref: ModelRef, kept: int, total: int) -> str:
    """
    Say what the next call continues from.
    """
    what = printable(ref)
    if not kept:
        return f"nothing of `{what}` is kept; the next call fetches all of its {format_bytes(total)}"
    if kept >= total:
        return f"all {format_bytes(total)} of `{what}` are kept for the next call"
    return f"{format_bytes(kept)} of {format_bytes(total)} of `{what}` are kept; the next call fetches the rest"
