"""
Events in words.
"""

from __future__ import annotations

from kserve_pvc._show.events import (
    BytesAdopted,
    BytesReceived,
    CallFailed,
    CallFinished,
    ClaimLost,
    ClaimTakenOver,
    Event,
    LockerUnavailable,
    ModelRemoved,
    RequestRetried,
    TransferStarted,
    WaitingForDownload,
)
from kserve_pvc._show.units import count, format_bytes, progress_of
from kserve_pvc.errors import printable


def describe(event: Event) -> str:
    """
    Say one event in one line, with everything that others have written escaped.
    """
    return printable(_describe(event))


def _describe(event: Event) -> str:
    match event:
        case TransferStarted():
            return f"{event.activity} {event.ref}: {count(event.files, 'file')}, {format_bytes(event.bytes_total)}"
        case WaitingForDownload():
            return (
                f"waiting for {event.holder}, at work since {event.since}: "
                f"{progress_of(event.bytes_done, event.bytes_total)}{_rate(event.bytes_per_second)}; "
                f"waited {event.waited:.0f} s, last sign of life {event.idle:.0f} s ago"
            )
        case ClaimTakenOver():
            return f"taking over {event.ref} from {event.holder}: {event.reason}"
        case RequestRetried():
            return f"retrying in {event.delay:.1f} s: {event.reason}"
        case BytesAdopted():
            return f"adopted {format_bytes(event.size_bytes)} of {event.ref} that were on the volume already"
        case BytesReceived():
            return f"received {format_bytes(event.size_bytes)} of {event.ref}"
        case CallFinished():
            return f"{event.ref}: {event.status}"
        case CallFailed():
            return f"{event.ref}: failed: {event.message or event.error}"
    return _describe_rare(event)


def _rate(bytes_per_second: int) -> str:
    # Before the first bytes, and for a holder of an older version, nothing is known.
    return f", {format_bytes(bytes_per_second)}/s" if bytes_per_second else ""


def _describe_rare(event: Event) -> str:
    match event:
        case LockerUnavailable():
            return f"locker {event.locker} is unavailable; falling back to the claims on the volume for {event.ref}"
        case ClaimLost():
            return f"lost the claim on {event.ref}: this process was paused or cut off, or the claim was broken"
        case ModelRemoved():
            return f"removed {event.ref}"
    return f"{event.ref}: {type(event).__name__}"
