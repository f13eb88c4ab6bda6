"""
Events as records of the logger `kserve_pvc`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from kserve_pvc._show.events import (
    BytesAdopted,
    BytesReceived,
    CallFailed,
    CallFinished,
    ClaimLost,
    ClaimTakenOver,
    Event,
    LockerUnavailable,
    RequestRetried,
    TransferStarted,
    WaitingForDownload,
)

if TYPE_CHECKING:
    import logging

NAME = "kserve_pvc"


class EventLog:
    """
    Writes the events of one call to the log.

    Nothing can be configured to receive a record before `logging` is imported, so it is not imported here.
    """

    def __init__(self) -> None:
        self._logger = _find_logger()
        self._is_waiting = False

    def __call__(self, event: Event) -> None:
        if self._logger is None or isinstance(event, BytesReceived | BytesAdopted):
            return
        if isinstance(event, WaitingForDownload):
            if self._is_waiting:  # Once, and not at every poll.
                return
            self._is_waiting = True
        level = _level(event)
        if self._logger.isEnabledFor(level):
            from kserve_pvc._show.text import describe

            self._logger.log(level, "%s", describe(event), extra=extra(event))


def _find_logger() -> logging.Logger | None:
    if "logging" not in sys.modules:
        return None
    import logging

    logger = logging.getLogger(NAME)
    if not logger.handlers:  # Otherwise warnings go to stderr in a program that has not configured logging.
        logger.addHandler(logging.NullHandler())
    return logger


def _level(event: Event) -> int:
    import logging

    match event:
        case ClaimLost() | LockerUnavailable():
            return logging.WARNING
        case RequestRetried() | CallFailed() | CallFinished(status="present"):
            return logging.DEBUG
    return logging.INFO


def extra(event: Event) -> dict[str, Any]:
    """
    Return the attributes of a record. Every record has all of them, so that a format string can name any.
    """
    facts: dict[str, Any] = dict.fromkeys(("holder", "bytes", "seconds", "reason"))
    match event:
        case TransferStarted():
            facts.update(bytes=event.bytes_total)
        case WaitingForDownload():
            facts.update(holder=event.holder, bytes=event.bytes_done, seconds=event.waited)
        case ClaimTakenOver():
            facts.update(holder=event.holder, reason=event.reason)
        case LockerUnavailable():
            facts.update(holder=event.locker)
        case RequestRetried():
            facts.update(reason=event.reason, seconds=event.delay)
        case CallFinished():
            facts.update(bytes=event.bytes_fetched, seconds=event.seconds, reason=event.status)
        case CallFailed():
            facts.update(reason=event.error, seconds=event.seconds)
    return {
        "event": type(event).__name__,
        "store": event.store,
        "key": event.key,
        "uri": event.uri,
        **facts,
    }
