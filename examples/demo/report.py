"""
What the demonstration prints: tables, lines and promises, for a person at a terminal or in a log.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Promise:
    """
    A sentence, whether it held, and what was measured.
    """

    text: str
    holds: bool
    measured: str


def say(text: str = "") -> None:
    """
    Print a line at once, for readers of a pipe as well.
    """
    print(text, flush=True)


def title(text: str) -> None:
    say(f"\n{_style('1', text)}\n")


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, right: frozenset[int]) -> None:
    """
    Print rows under a header, each column as wide as its widest cell.

    Args:
        right: The columns whose cells end at the same place, such as numbers.
    """
    body = list(rows)
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    rule = ["─" * width for width in widths]
    for row in (header, rule, *body):
        cells = (
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        say("  " + "  ".join(cells).rstrip())


def promises(held: Iterable[Promise]) -> bool:
    """
    Print every promise with what was measured, and return whether all hold.
    """
    held = list(held)
    width = max(len(promise.text) for promise in held)
    for promise in held:
        mark = _style("32", "✓") if promise.holds else _style("31", "✗")
        say(f"  {mark} {promise.text.ljust(width)}  {_style('2', promise.measured)}")
    return all(promise.holds for promise in held)


def amount(size_bytes: float) -> str:
    """
    Bytes for people: `1.5 GiB`.
    """
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def plural(count: int, noun: str) -> str:
    """
    A count with its noun: `1 file`, `2 files`.
    """
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _style(code: str, text: str) -> str:
    return f"\033[{code}m{text}\033[0m" if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else text
