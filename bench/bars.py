"""
What was to be reached, and what was: every bar is worked out from the results, none from anything written down before.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

from peers import EIGHT_REPLICAS, IN_A_GIGABYTE, ONE_REPLICA, OURS
from report import GIB, MIB, Facts, Results, Series, columns

UNVERIFIED = "ours, hashing off"
PAIRS = 5


@dataclass(frozen=True, kw_only=True)
class Bar:
    """
    One promise and what was measured of it.

    Attributes:
        measured: None if what it takes was not run, or did not succeed; `detail` then says so.
        limit: Reached is what is no more than this.
        pairs: How many runs the median is of. Fewer than `PAIRS` prove little.
    """

    what: str
    measured: float | None
    limit: float
    unit: str = "x"
    pairs: int = 0
    detail: str = ""

    @property
    def is_reached(self) -> bool | None:
        return None if self.measured is None else self.measured <= self.limit


def judge(results: Results) -> list[Bar]:
    """
    Work out every bar whose workload was run.

    Ratios are medians of the ratios of single rounds; of several peers the one with the lowest median is the best.
    """
    bars: list[Bar] = []
    for series in results.series.values():
        for workload, variant, judge_series in _OF_SERIES:
            if (series.workload, series.variant) == (workload, variant) and _counts(series):
                bars += judge_series(series)
    for facts in results.facts.values():
        if facts.variant == "plain":
            bars += _OF_FACTS[facts.workload](facts)
    return [*bars, *_flat_memory(results)]


def table(bars: Sequence[Bar], *, quick: bool) -> str:
    """
    Lay out the bars, a line each.
    """
    rows = [["to reach", "measured", "bar", "n", ""], *(_row(bar) for bar in bars)]
    notes = ["  large files had a quarter of their size, so these prove nothing: --quick"] if quick else []
    if any(bar.pairs < PAIRS for bar in bars if bar.measured is not None):
        notes.append(f"  fewer than {PAIRS} pairs prove little")
    return "\n".join([*columns(rows), *notes])


def document(bars: Sequence[Bar]) -> list[dict[str, object]]:
    """
    The same for JSON.
    """
    return [{**asdict(bar), "reached": bar.is_reached} for bar in bars]


def _row(bar: Bar) -> list[str]:
    measured = "-" if bar.measured is None else f"{bar.measured:.3g} {bar.unit}"
    verdict = {None: "not measured", True: "reached", False: "NOT reached"}[bar.is_reached]
    return [bar.what, measured, f"{bar.limit:g} {bar.unit}", str(bar.pairs), f"{verdict}{f' ({bar.detail})' if bar.detail else ''}"]


def _ratio(series: Series, what: str, mine: str, rivals: Sequence[str], limit: float, value: str = "wall") -> Bar:
    """How much of the best rival's seconds ours take."""
    label = f"{series.workload} {series.variant}: {what} {'CPU' if value == 'cpu' else value}"
    medians = {name: median for name in rivals if name not in series.skipped and (median := series.median(name, value))}
    missing = [name for name in rivals if name not in medians]
    if not medians or mine in series.skipped or not series.samples.get(mine):
        return Bar(what=label, measured=None, limit=limit, detail=f"without {', '.join(missing) or mine}")
    best = min(medians, key=lambda name: medians[name])
    found = series.ratios(mine, best, value)
    detail = [f"best: {best}"] * (len(rivals) > 1) + [f"without {', '.join(missing)}"] * bool(missing)
    return Bar(what=label, measured=statistics.median(found), limit=limit, pairs=len(found), detail="; ".join(detail))


def _counts(series: Series) -> bool:
    """The origin must not be what limits, nor a disk; only memory is judged whatever is written to."""
    return series.origin != "SeaweedFS" and (series.destination != "disk" or series.workload.startswith("w8-"))


def _others(series: Series) -> list[str]:
    return [name for name in series.samples if not name.startswith(OURS)]


def _over_interpreter(series: Series, peer: str) -> float | None:
    peak = series.median(peer, "peak_rss")
    return None if peak is None or peer in series.skipped else (peak - series.interpreter_rss) / MIB


def _cold(series: Series) -> Iterator[Bar]:
    kserve = ["kserve-storage"]
    yield _ratio(series, "verified / s5cmd", OURS, ["s5cmd"], 1.0)
    yield _ratio(series, "verified / rclone", OURS, ["rclone"], 1.25)
    yield _ratio(series, "verified / download, then sha256sum", OURS, ["s5cmd, then sha256sum", "rclone, then sha256sum"], 0.7)
    # Asked for of `sha256sum`, which may not use the processor's instructions; this is how it compares with one that does.
    yield _ratio(series, "verified / download, then openssl", OURS, ["s5cmd, then openssl", "rclone, then openssl"], 0.7)
    yield _ratio(series, "verified / kserve-storage", OURS, kserve, 0.65)
    yield _ratio(series, "verified / kserve-storage", OURS, kserve, 0.7, "cpu")
    peak, pairs = _over_interpreter(series, OURS), len(series.samples.get(OURS, ()))
    yield Bar(what="w2 plain: verified, peak RSS over the interpreter", measured=peak, limit=64, unit="MiB", pairs=pairs)
    yield _ratio(series, "hashing off / s5cmd", UNVERIFIED, ["s5cmd"], 0.9)
    yield _ratio(series, "hashing off / rclone", UNVERIFIED, ["rclone"], 1.1)
    yield _ratio(series, "hashing off / kserve-storage", UNVERIFIED, kserve, 0.5, "cpu")
    yield _ratio(series, "hashing off / rclone", UNVERIFIED, ["rclone"], 1.1, "cpu")


def _tls(series: Series) -> Iterator[Bar]:
    yield _ratio(series, "hashing off / s5cmd", UNVERIFIED, ["s5cmd"], 1.1)
    yield _ratio(series, "hashing off / s5cmd", UNVERIFIED, ["s5cmd"], 1.0, "cpu")
    yield _ratio(series, "verified / kserve-storage", OURS, ["kserve-storage"], 0.6)


def _gigabit(series: Series) -> Iterator[Bar]:
    yield _ratio(series, "verified / best", OURS, _others(series), 1.02)


def _slow_connections(series: Series) -> Iterator[Bar]:
    yield _ratio(series, "verified / best", OURS, _others(series), 1.05)


def _small_files(series: Series) -> Iterator[Bar]:
    yield _ratio(series, "verified / best", OURS, ["s5cmd", "rclone", "obstore"], 1.0)


def _listing(series: Series) -> Iterator[Bar]:
    yield _ratio(series, "resolve / boto3", OURS, ["boto3"], 0.25)
    yield _ratio(series, "plan / boto3", "ours, plan", ["boto3"], 0.25)


def _replicas(series: Series) -> Iterator[Bar]:
    sent, pairs = series.median(EIGHT_REPLICAS, "sent_bytes"), len(series.samples.get(EIGHT_REPLICAS, ()))
    # Listings are sent too, a few KiB each; the bar is about what two digits show.
    share = None if sent is None or EIGHT_REPLICAS in series.skipped else round(sent / series.size_bytes, 2)
    yield Bar(what="w6 plain: 8 replicas, sent by the origin", measured=share, limit=1.0, pairs=pairs, unit="x the model")
    yield _ratio(series, "last of 8 replicas ready / one alone", EIGHT_REPLICAS, [ONE_REPLICA], 1.10)


def _warm(facts: Facts) -> Iterator[Bar]:
    hits, bare = facts.median("get, us"), facts.median("bare listing and read, us")
    pairs = len(facts.values.get("get, us", ()))
    yield Bar(what="w5: a hit in process", measured=hits, limit=100, unit="us", pairs=pairs)
    yield Bar(what="w5: a hit / bare listing and read", measured=hits / bare if hits and bare else None, limit=2, pairs=pairs)
    for what, name, limit in (
        ("whole command `path`", "kserve-pvc path, ms", 120),
        ("`import kserve_pvc` over a bare interpreter", "import kserve_pvc, ms over python -c pass", 40),
        # That import loads little, so the first name that it gives is judged as well.
        ("the same and `ModelStore`", "from kserve_pvc import ModelStore, ms over python -c pass", 40),
    ):
        yield Bar(what=f"w5: {what}", measured=facts.median(name), limit=limit, unit="ms", pairs=len(facts.values.get(name, ())))


def _killed(facts: Facts) -> Iterator[Bar]:
    found = facts.values.get("sent twice per stream, MiB", [])
    # A promise about every kill, so the worst one counts.
    worst = max(found, default=None)
    yield Bar(what="w7: killed at 50 %, worst sent twice per stream", measured=worst, limit=64, unit="MiB", pairs=len(found))


def _in_a_gigabyte(series: Series) -> Iterator[Bar]:
    runs = len(series.samples.get(IN_A_GIGABYTE, ()))
    failed = float(IN_A_GIGABYTE in series.skipped)
    what = f"w8: failures with 1 GiB of address space, model of {series.size_bytes / GIB:.2g} GiB"
    yield Bar(what=what, measured=failed if failed or runs else None, limit=0, unit="", pairs=runs)


def _flat_memory(results: Results) -> Iterator[Bar]:
    """Flat is: no more than an eighth more, or 4 MiB, for sixteen times the model."""
    chosen = sorted((one for one in results.series.values() if one.workload.startswith("w8-")), key=lambda one: one.size_bytes)
    found = [(one.size_bytes, _over_interpreter(one, OURS), len(one.samples.get(OURS, ()))) for one in chosen]
    sized = [(size, over, pairs) for size, over, pairs in found if over is not None]
    if len(sized) > 1:
        (small, least, pairs), (large, most, _) = sized[0], sized[-1]
        detail = ", ".join(f"{size / GIB:.2g} GiB: {over:.0f} MiB" for size, over, _ in sized)
        what = f"w8: peak RSS over the interpreter, {large / small:.0f} times the model"
        yield Bar(what=what, measured=most - least, limit=max(4.0, least / 8), unit="MiB more", pairs=pairs, detail=detail)


_OF_SERIES: list[tuple[str, str, Callable[[Series], Iterator[Bar]]]] = [
    ("w2", "plain", _cold),
    ("w2", "gigabit", _gigabit),
    ("w2", "tls", _tls),
    ("w3", "plain", _small_files),
    ("w4", "plain", _listing),
    ("w2", "slow-connections", _slow_connections),
    ("w6", "plain", _replicas),
    ("w8-4", "plain", _in_a_gigabyte),
]
_OF_FACTS: dict[str, Callable[[Facts], Iterator[Bar]]] = {"w5": _warm, "w7": _killed}
