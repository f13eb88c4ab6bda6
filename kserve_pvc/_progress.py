"""
Showing a person what happens: bars on a terminal or in a notebook, one line every ten seconds elsewhere.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TextIO

from kserve_pvc._events import Adopted, Event, Finished, Listener, Received, Retried, Started, TookOver, Waiting
from kserve_pvc.errors import printable

LINE_SECONDS = 10.0


class Callback(Protocol):
    """
    What is used of an `fsspec.callbacks.Callback`: sizes in bytes.
    """

    def set_size(self, size: int) -> None: ...

    def relative_update(self, inc: int = 1) -> None: ...


@contextmanager
def make_listener(progress: bool | None, callback: Callback | None, stream: TextIO | None = None) -> Iterator[Listener]:
    """
    Tell a person and a callback what happens, until the context ends.

    Args:
        progress: None chooses by where stderr goes, True insists on bars, False shows nothing.
    """
    stream = stream or sys.stderr
    listeners: list[Listener] = []
    bars = None
    if progress or (progress is None and _is_interactive(stream)):
        bars = _Bars(stream)
        listeners.append(bars)
    elif progress is None:
        listeners.append(Lines(lambda text: print(text, file=stream, flush=True)))
    if callback is not None:
        listeners.append(_for_callback(callback))
    guard = threading.Lock()

    def tell(event: Event) -> None:
        with guard:
            for listener in listeners:
                listener(event)

    try:
        yield tell if listeners else _silent
    finally:
        if bars is not None:
            bars.close()


def _silent(event: Event) -> None:
    pass


def _is_interactive(stream: TextIO) -> bool:
    return stream.isatty() or "ipykernel" in sys.modules


def _for_callback(callback: Callback) -> Listener:
    def tell(event: Event) -> None:
        if isinstance(event, Started):
            callback.set_size(event.bytes_total)
        elif isinstance(event, Adopted | Received):
            callback.relative_update(event.size_bytes)

    return tell


class _Bars:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bar: Any = None

    def __call__(self, event: Event) -> None:
        match event:
            case Started(ref=ref, bytes_total=total):
                self._show(f"downloading {printable(ref)}", total).n = 0
            case Adopted(size_bytes=size) | Received(size_bytes=size) if self._bar is not None:
                self._bar.update(size)
            case Waiting():
                bar = self._show(f"waiting for {printable(event.holder)}", event.bytes_total)
                bar.n = event.bytes_done
                bar.refresh()
            case TookOver() | Retried():
                self._show("", 0).write(describe(event), file=self._stream)
            case _:
                self.close()

    def _show(self, description: str, total: int) -> Any:
        if self._bar is None:
            from tqdm.auto import tqdm

            self._bar = tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, file=self._stream, leave=False)
        if description:
            self._bar.set_description_str(description, refresh=False)
            self._bar.total = total or None
        return self._bar

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class Lines:
    """
    One line at each turn of events, and one every ten seconds in between.
    """

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._write = write
        self._clock = clock
        self._due: float | None = None
        self._started = 0.0
        self._total = self._done = self._received = 0

    def __call__(self, event: Event) -> None:
        match event:
            case Started():
                self._started, self._total, self._done, self._received = self._clock(), event.bytes_total, 0, 0
                self._say(describe(event))
            case Adopted(size_bytes=size) | Received(size_bytes=size):
                self._done += size
                self._received += size if isinstance(event, Received) else 0
                if self._is_due():
                    self._say(self._rate(event.ref))
            case Waiting() if not self._is_due():
                pass
            case Finished(status="present"):
                pass
            case _:
                self._say(describe(event))

    def _is_due(self) -> bool:
        return self._due is None or self._clock() >= self._due

    def _say(self, text: str) -> None:
        self._due = self._clock() + LINE_SECONDS
        self._write(f"kserve-pvc: {text}")

    def _rate(self, ref: str) -> str:
        seconds = max(self._clock() - self._started, 1e-3)
        rate = self._received / seconds
        left = (self._total - self._done) / rate if rate else 0.0
        return f"downloading {printable(ref)}: {amount(self._done)} of {amount(self._total)}, {amount(rate)}/s, {left:.0f} s left"


def describe(event: Event) -> str:
    """
    Say one event in one line.
    """
    match event:
        case Started():
            return f"downloading {printable(event.ref)}: {count(event.files, 'file')}, {amount(event.bytes_total)}"
        case Waiting():
            return (
                f"waiting for {printable(event.holder)}, at work since {event.since}: {amount(event.bytes_done)} of "
                f"{amount(event.bytes_total)}, {amount(event.bytes_per_second)}/s; waited {event.waited:.0f} s, "
                f"last sign of life {event.idle:.0f} s ago"
            )
        case TookOver():
            return f"taking over {printable(event.ref)} from {printable(event.holder)}: {event.reason}"
        case Retried():
            return f"asking again in {event.delay:.1f} s: {printable(event.reason)}"
        case Adopted():
            return f"took over {amount(event.size_bytes)} of {printable(event.ref)} that a dead writer left"
        case Received():
            return f"received {amount(event.size_bytes)} of {printable(event.ref)}"
        case Finished():
            return f"{printable(event.ref)}: {event.status}"


def amount(size_bytes: float) -> str:
    """
    Bytes for people: `1.5 GiB`.
    """
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < (1023.5 if unit == "B" else 1023.95):
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def count(number: int, noun: str) -> str:
    """
    Things for people: `1 file`, `2 files`.
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
