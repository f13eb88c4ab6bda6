"""
Showing a person what happens: bars on a terminal or in a notebook, one line every ten seconds elsewhere.
"""

from __future__ import annotations

import io
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from typing import Any, Protocol, TextIO

from kserve_pvc._show.events import (
    BytesAdopted,
    BytesReceived,
    CallFinished,
    ClaimLost,
    ClaimTakenOver,
    Event,
    Listener,
    LockerUnavailable,
    RequestRetried,
    TransferStarted,
    WaitingForDownload,
)
from kserve_pvc._show.text import describe
from kserve_pvc._show.units import format_bytes, shorten
from kserve_pvc.errors import printable

LINE_SECONDS = 10.0


class Callback(Protocol):
    """
    What is used of an `fsspec.callbacks.Callback`: sizes in bytes.
    """

    def set_size(self, size: int) -> None: ...

    def relative_update(self, inc: int = 1) -> None: ...


@contextmanager
def make_listener(
    progress: bool | None,
    callback: Callback | None,
    stream: TextIO | None = None,
    *,
    names_model: bool = False,
    may_draw: bool = True,
) -> Iterator[Listener]:
    """
    Show a person what happens, and report sizes to a callback, until the context ends.

    Args:
        progress: None chooses by where stderr goes, True always draws bars, False shows nothing.
        callback: Reported the size of the model, and every step in bytes.
        stream: Where to write, instead of stderr.
        names_model: Several models are shown at the same time, so each line names its model.
        may_draw: False writes lines instead of bars: other processes would draw over them.
    """
    stream = stream or sys.stderr or io.StringIO()  # A process may have none.
    listeners: list[Listener] = []
    bars = None
    if may_draw and (progress or (progress is None and _is_interactive(stream))):
        bars = _Bars(stream, names_model)
        listeners.append(bars)
    elif progress is not False:
        listeners.append(Lines(partial(_print, stream), names_model=names_model))
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


def _print(stream: TextIO, text: str) -> None:
    with suppress(OSError, ValueError):  # A log that is full, or closed, ends no download.
        print(text, file=stream, flush=True)


def _silent(event: Event) -> None:
    pass


def _is_interactive(stream: TextIO) -> bool:
    return stream.isatty() or "ipykernel" in sys.modules


def _size(stream: TextIO) -> dict[str, Any]:
    # A terminal whose size was never set is 0 by 0, as with `kubectl exec -t` from a script; tqdm draws nothing on it.
    with suppress(OSError, ValueError, AttributeError):
        found = os.get_terminal_size(stream.fileno())
        if not (found.columns and found.lines):
            return {"ncols": found.columns or 80, "nrows": found.lines or 24}
    return {"dynamic_ncols": True}


def _for_callback(callback: Callback) -> Listener:
    def tell(event: Event) -> None:
        if isinstance(event, TransferStarted):
            callback.set_size(event.bytes_total)
        elif isinstance(event, BytesAdopted | BytesReceived):
            callback.relative_update(event.size_bytes)

    return tell


def share(callback: Callback) -> Callable[[], Callback]:
    """
    Let several models share one callback: it is reported the sum of their sizes, by one thread at a time.

    Returns:
        A function that makes the callback of one model.
    """
    guard = threading.Lock()
    sizes: dict[_Part, int] = {}

    def resize(part: _Part, size: int) -> None:
        with guard:
            sizes[part] = size
            callback.set_size(sum(sizes.values()))

    def update(inc: int) -> None:
        with guard:
            callback.relative_update(inc)

    return lambda: _Part(resize, update)


class _Part:
    def __init__(self, resize: Callable[[_Part, int], None], update: Callable[[int], None]) -> None:
        self._resize = resize
        self._update = update

    def set_size(self, size: int) -> None:
        self._resize(self, size)

    def relative_update(self, inc: int = 1) -> None:
        self._update(inc)


# Without a size there is nothing to be a part of.
_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt}iB [{elapsed}<{remaining}, {speed}]"
_NO_SIZE = "{desc} [{elapsed}]"
_NARROW = "{percentage:3.0f}% {speed}, {remaining} left"
_NARROWEST_BAR = 6
_NARROWEST_SUBJECT = 6


@cache
def _bar_class() -> Any:
    """Make the class on first use: importing tqdm takes longer than a hit."""
    from tqdm.auto import tqdm

    class Bar(tqdm):  # type: ignore[misc, unused-ignore]  # Untyped.
        """
        A bar with binary units, whose description leaves room for the rate and the time.
        """

        bytes_per_second: float | None = None
        subject = ""

        @property
        def format_dict(self) -> dict[str, Any]:
            facts = dict(super().format_dict)
            rate = self.bytes_per_second
            facts["bar_format"] = _BAR if facts["total"] else _NO_SIZE
            facts["rate"] = rate or None
            facts["speed"] = f"{format_bytes(rate)}/s" if rate else "? B/s"
            if facts["ncols"]:
                meter = {**facts, "prefix": "", "ncols": None, "bar_format": facts["bar_format"].replace("{bar}", "")}
                room = facts["ncols"] - len(self.format_meter(**meter)) - len(": ") - _NARROWEST_BAR
                if room < 0 and facts["total"]:
                    facts["bar_format"] = _NARROW
                elif len(facts["prefix"]) > room:
                    facts["prefix"] = shorten(self.subject, room) if room > _NARROWEST_SUBJECT else ""
            return facts

    return Bar


@contextmanager
def above_bars(stream: TextIO) -> Iterator[None]:
    """
    Write to a terminal on which bars are drawn: they are cleared before, and drawn again after.
    """
    tqdm = sys.modules.get("tqdm")
    if tqdm is None or not stream.isatty():
        yield
        return
    with tqdm.tqdm.external_write_mode(file=stream):
        yield


class _Bars:
    def __init__(self, stream: TextIO, names_model: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._names_model = names_model
        self._clock = clock
        self._started = clock()
        self._received = 0
        self._bar: Any = None

    def __call__(self, event: Event) -> None:
        match event:
            case TransferStarted(ref=ref, bytes_total=total, activity=activity):
                self._started, self._received = self._clock(), 0
                bar = self._show(f"{activity} {printable(ref)}", total)
                bar.n, bar.bytes_per_second, bar.subject = 0, None, printable(ref)
            case BytesAdopted(size_bytes=size) | BytesReceived(size_bytes=size) if self._bar is not None:
                # Bytes of an earlier attempt do not count for the rate.
                self._received += size if isinstance(event, BytesReceived) else 0
                self._bar.bytes_per_second = self._received / max(self._clock() - self._started, 1e-3)
                self._bar.update(size)
            case WaitingForDownload():
                bar = self._show(
                    _named(event, f"waiting for {printable(event.holder)}", self._names_model), event.bytes_total
                )
                bar.n, bar.bytes_per_second = event.bytes_done, event.bytes_per_second
                bar.subject = printable(event.ref if self._names_model else event.holder)
                bar.refresh()
            case ClaimTakenOver() | LockerUnavailable() | RequestRetried():
                self._show("", 0).write(_named(event, describe(event), self._names_model), file=self._stream)
            case ClaimLost():
                pass
            case _:
                self.close()

    def _show(self, description: str, total: int) -> Any:
        if self._bar is None:
            self._bar = _bar_class()(
                total=total,
                unit="B",
                unit_scale=True,
                unit_divisor=1024,
                file=self._stream,
                leave=False,
                **_size(self._stream),
            )
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
    One line for each event that changes something, and one every ten seconds in between.
    """

    def __init__(
        self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic, *, names_model: bool = False
    ) -> None:
        self._write = write
        self._clock = clock
        self._names_model = names_model
        self._due: float | None = None
        self._started = 0.0
        self._activity = "downloading"
        self._total = self._done = self._received = 0

    def __call__(self, event: Event) -> None:
        match event:
            case TransferStarted():
                self._activity = event.activity
                self._started, self._total, self._done, self._received = self._clock(), event.bytes_total, 0, 0
                self._say(describe(event))
            case BytesAdopted(size_bytes=size) | BytesReceived(size_bytes=size):
                self._done += size
                self._received += size if isinstance(event, BytesReceived) else 0
                if self._is_due():
                    self._say(self._rate(event.ref))
            case WaitingForDownload() if not self._is_due():
                pass
            case ClaimLost() | CallFinished(status="present"):
                pass
            case _:
                self._say(_named(event, describe(event), self._names_model))

    def _is_due(self) -> bool:
        return self._due is None or self._clock() >= self._due

    def _say(self, text: str) -> None:
        self._due = self._clock() + LINE_SECONDS
        self._write(f"kserve-pvc: {text}")

    def _rate(self, ref: str) -> str:
        seconds = max(self._clock() - self._started, 1e-3)
        rate = self._received / seconds
        left = (self._total - self._done) / rate if rate else 0.0
        done = f"{format_bytes(self._done)} of {format_bytes(self._total)}"
        return f"{self._activity} {printable(ref)}: {done}, {format_bytes(rate)}/s, {left:.0f} s left"


def _named(event: Event, text: str, names_model: bool) -> str:
    needs_name = names_model and isinstance(event, WaitingForDownload | RequestRetried)
    return f"{printable(event.ref)}: {text}" if needs_name else text
