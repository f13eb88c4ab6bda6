"""
Notifying everything that observes a call: what shows progress, the log, and the listeners of the program.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import attrs

from kserve_pvc._show.events import (
    BytesAdopted,
    BytesReceived,
    CallFailed,
    Event,
    Listener,
    Subject,
    WaitingForDownload,
)
from kserve_pvc._show.log import EventLog
from kserve_pvc.errors import StoreError, VolumeError


@contextmanager
def observing(subject: Subject, show: Listener, listeners: Sequence[Listener]) -> Iterator[Listener]:
    """
    Notify everything that observes a call, also of its failure, until the context ends.

    Args:
        show: What shows progress. It is called by the thread in which something happens, and may end the call by
            raising.
        listeners: Called in a thread of their own, which the call waits for only at its end.
    """
    started = time.monotonic()
    log = EventLog()
    delivery = Delivery(listeners) if listeners else None

    def tell(event: Event) -> None:
        log(event)
        if delivery is not None:
            delivery.put(event)

    def tell_and_show(event: Event) -> None:
        show(event)
        tell(event)

    try:
        yield tell_and_show
    except BaseException as error:
        message = str(error) if isinstance(error, StoreError) else ""
        seconds = time.monotonic() - started
        tell(CallFailed(**subject, error=type(error).__name__, message=message, seconds=seconds))
        raise
    finally:
        if delivery is not None:
            delivery.close()


def notify(listeners: Sequence[Listener], event: Event) -> None:
    """
    Notify the log and the listeners of a single event, in this thread.
    """
    EventLog()(event)
    _Calls(listeners)(event)


class _Calls:
    """
    Calls listeners, none of which can end the call that it listens to.
    """

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self._listeners = listeners
        self._failed: set[int] = set()

    def __call__(self, event: Event) -> None:
        for number, listener in enumerate(self._listeners):
            try:
                listener(event)
            except Exception:  # A listener is code of the caller, and ends no download.
                if number not in self._failed:  # Once: it may fail for each of many events.
                    self._failed.add(number)
                    kind, error, trace = sys.exc_info()
                    assert kind is not None  # It was raised just now.
                    thread = threading.current_thread()
                    threading.excepthook(threading.ExceptHookArgs((kind, error, trace, thread)))


class Delivery:
    """
    Hands events to listeners in one thread, in order.

    Whatever is downloading never waits for it. Byte counts that have not been delivered yet are summed up, so what
    waits here stays small however slow a listener is.
    """

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self._call = _Calls(listeners)
        self._changed = threading.Condition()
        self._pending: list[Event] = []
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="kserve-pvc-events", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            reason = "no thread can be started: the container is at its limit of threads"
            raise VolumeError("events", "starting a thread", reason, "raise its limit of PIDs") from error

    def put(self, event: Event) -> None:
        """
        Deliver an event soon. After `close` it is dropped.
        """
        with self._changed:
            if self._is_closed:
                return
            merged = _merge(self._pending[-1], event) if self._pending else None
            if merged is None:
                self._pending.append(event)
            else:
                self._pending[-1] = merged
            self._changed.notify()

    def close(self) -> None:
        """
        Wait until everything is delivered.
        """
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._is_closed)
                events, self._pending = self._pending, []
            if not events:
                return
            for event in events:
                self._call(event)


def _merge(last: Event, event: Event) -> Event | None:
    """Return two events as one, if one says as much."""
    match last, event:
        case BytesReceived(), BytesReceived():
            return attrs.evolve(event, size_bytes=last.size_bytes + event.size_bytes)
        case BytesAdopted(), BytesAdopted():
            return attrs.evolve(event, size_bytes=last.size_bytes + event.size_bytes)
        case WaitingForDownload(), WaitingForDownload():
            return event
    return None
