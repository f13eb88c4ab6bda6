"""
The results inside a page of the documentation, between two comments that stay; everything around them is written by
hand.
"""

from __future__ import annotations

from pathlib import Path

import bars
import peers
import report

_BEGIN, _END = "<!-- results: written by `bench --page` -->", "<!-- end of results -->"
_STATIC = "_static"


def write(place: Path, results: report.Results) -> None:
    """
    Replace what stands between the two comments of a page, and write the plots beside it.

    Raises:
        ValueError: The page has no such comments.
    """
    before, begin, rest = place.read_text().partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not (begin and end):
        raise ValueError(f"`{place}` needs the lines `{_BEGIN}` and `{_END}` for the results to stand between")
    static = place.parents[1] / _STATIC
    lines = [*_machine(results), *_bars(results)]
    for series in results.series.values():
        name = f"bench-{series.key}-wall.svg"
        (static / name).write_text(report.plot(series))
        table = report.table(series, peers.ours(series.samples))
        lines += [
            f"### {series.title}",
            "",
            f"![Seconds on the wall, by client](../{_STATIC}/{name})",
            "",
            *_literal(table),
        ]
    for facts in results.facts.values():
        title, _, table = report.facts_table(facts).partition("\n")
        lines += [f"### {title}", "", *_literal(table)]
    place.write_text("\n".join([before + begin, "", *lines, end + after]))


def _machine(results: report.Results) -> list[str]:
    described = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in results.machine.items())
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    return [f"Measured on: {described}. Versions: {versions}.", ""]


def _bars(results: report.Results) -> list[str]:
    return ["### What was to be reached", "", *_literal(bars.table(bars.judge(results), quick=results.quick))]


def _literal(text: str) -> list[str]:
    return ["```text", *text.splitlines(), "```", ""]
