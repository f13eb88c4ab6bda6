"""
What a notebook displays: small tables without scripts, colours or external resources, with all text escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from kserve_pvc._show.units import count, format_bytes
from kserve_pvc.errors import printable

# A table is for people. Programs use `list()` and `problems`.
MAX_ROWS = 100

# MathJax, which would typeset formulas in names, skips elements of these classes: version 3 and later, and version 2.
_PLAIN = 'class="mathjax_ignore tex2jax_ignore"'
# Notebooks align cells to the right, and a long word widens the table.
_WORDS = "text-align:left;overflow-wrap:anywhere"
# Without a minimum a narrow column is broken after each letter.
_COLUMN = f"{_WORDS};min-width:8em"
_HEAD = "text-align:left;white-space:nowrap"
_AMOUNT = "text-align:right;white-space:nowrap"
_AMOUNTS = frozenset({"Size", "Files", "Created"})


def show_store(root: str, mode: str, models: Iterable[Mapping[str, Any]]) -> str:
    """
    Show a store, and each model in it.
    """
    access, total, rows = "read-write" if mode == "rw" else "read-only", 0, []
    for model in models:
        total += model["size_bytes"]
        selection = " ".join(f"{label.lower()} {value}" for label, value in _selection(model).items())
        rows.append(
            (
                model["uri"],
                selection,
                format_bytes(model["size_bytes"]),
                str(model["files"]),
                f"{model['created_at']:%Y-%m-%d %H:%M}",
                model["key"],
            )
        )
    caption = f"ModelStore at {root}, {access}: {count(len(rows), 'model')}, {format_bytes(total)}"
    return _table(caption, ("URI", "Which", "Size", "Files", "Created", "Key"), rows)


def show_model(
    *,
    uri: str,
    key: str,
    version: str,
    path: Path,
    status: str,
    size_bytes: int,
    files: int,
    created_at: datetime,
    bytes_fetched: int,
    seconds: float,
    **selection: Any,
) -> str:
    """
    Show a model, and how a call obtained it.
    """
    return _facts(
        f"Model {uri}",
        {
            **_selection(selection),
            "Status": f"{status}, {format_bytes(bytes_fetched)} fetched in {seconds:.1f} s"
            if status != "present"
            else status,
            "Size": f"{format_bytes(size_bytes)} in {count(files, 'file')}",
            "Path": str(path),
            "Version": version,
            "Key": key,
            "Created": f"{created_at:%Y-%m-%d %H:%M} {created_at.tzname()}",
        },
    )


def show_plan(
    *,
    uri: str,
    key: str,
    version: str,
    action: str,
    files: int,
    size_bytes: int,
    bytes_to_fetch: int,
    bytes_reusable: int,
    free_bytes: int,
    seconds: float | None,
    bytes_shared: int,
    fits: bool,
) -> str:
    """
    Show what `ensure` would do.
    """
    if action == "nothing":
        return _facts(
            f"Plan for {uri}",
            {"Action": "nothing, it is present", "Size": f"{format_bytes(size_bytes)} in {count(files, 'file')}"},
        )
    return _facts(
        f"Plan for {uri}",
        {
            "Action": action,
            "Size": f"{format_bytes(size_bytes)} in {count(files, 'file')}",
            "To fetch": format_bytes(bytes_to_fetch),
            "On the volume": format_bytes(bytes_reusable)
            + (f", {format_bytes(bytes_shared)} of it in whole files" if bytes_shared else ""),
            "Free": f"{format_bytes(free_bytes)}: {'it fits' if fits else 'it does NOT fit'}",
            "Time": "unknown" if seconds is None else f"about {seconds:.0f} s",
            "Version": version,
            "Key": key,
        },
    )


def show_verification(
    uri: str, level: str, files: int, size_bytes: int, problems: Sequence[tuple[str, str, str]]
) -> str:
    """
    Show what was compared, and every difference with its kind, path and detail.
    """
    compared = f"{count(files, 'file')}, {format_bytes(size_bytes)}, {'digests' if level == 'full' else 'sizes'}"
    found = f"{count(len(problems), 'problem')}" if problems else "no difference"
    return _table(
        f"Verification of {uri}: {'ok' if not problems else 'BAD'}, {found} ({compared})",
        ("Kind", "Path", "Detail"),
        problems,
    )


def _selection(model: Mapping[str, Any]) -> dict[str, str]:
    """The revision and patterns of a model, by their labels."""
    found = {
        "At": model["revision"],
        "Only": " ".join(model["allow_patterns"] or ()),
        "Without": " ".join(model["ignore_patterns"]),
    }
    return {label: value for label, value in found.items() if value}


def _facts(caption: str, facts: Mapping[str, str]) -> str:
    rows = "".join(f"<tr>{_cell(name, _HEAD, head='row')}{_cell(value, _WORDS)}</tr>" for name, value in facts.items())
    return f"<table {_PLAIN}>{_caption(caption)}<tbody>{rows}</tbody></table>"


def _table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return f"<p {_PLAIN}>{_escaped(caption)}</p>"
    head = "".join(_cell(name, _AMOUNT if name in _AMOUNTS else _HEAD, head="col") for name in heads)
    styles = [_AMOUNT if name in _AMOUNTS else _COLUMN for name in heads]
    body = ["".join(map(_cell, row, styles)) for row in rows[:MAX_ROWS]]
    if len(rows) > MAX_ROWS:
        body.append(f'<td colspan="{len(heads)}" style="{_WORDS}">and {len(rows) - MAX_ROWS} more</td>')
    lines = "".join(f"<tr>{row}</tr>" for row in body)
    return f"<table {_PLAIN}>{_caption(caption)}<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"


def _cell(text: str, style: str, *, head: str | None = None) -> str:
    return (
        f'<td style="{style}">{_escaped(text)}</td>'
        if head is None
        else f'<th scope="{head}" style="{style}">{_escaped(text)}</th>'
    )


def _caption(text: str) -> str:
    return f'<caption style="{_WORDS}">{_escaped(text)}</caption>'


def _escaped(text: str) -> str:
    return escape(printable(text))
