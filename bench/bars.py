"""
What was to be reached, and what was: every bar is worked out from the results, none from anything written down before.

A bar whose workload was not run stands there as not measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from peers import (
    BY_AZURE_KEY,
    BY_AZURE_SIGNATURE,
    BY_GOOGLE,
    BY_HTTP_ONE_FILE,
    BY_S3,
    BY_S3_ONE_FILE,
    CREDENTIALS,
    DOWNLOADERS,
    EIGHT_REPLICAS,
    IN_A_GIGABYTE,
    ONE_REPLICA,
    OURS,
)
from report import GIB, MIB, Facts, Results, Series, columns

UNVERIFIED = "ours, hashing off"
PAIRS = 5
# What finding credentials may take once, whatever is fetched then.
_START_SECONDS = 0.4
# Everybody else; to hash afterwards only makes the same slower.
_RIVALS = [peer.name for peer in DOWNLOADERS if not peer.name.startswith(OURS) and ", then" not in peer.name]


@dataclass(frozen=True, kw_only=True)
class Bar:
    """
    One promise and what was measured of it.

    Attributes:
        measured: None if what it takes was not run, or did not succeed; `detail` then says so.
        limit: Reached is what is no more than this.
        pairs: How many runs the median is of. Fewer than `PAIRS` prove little.
        conditions: What was run: model, way, origin and destination.
    """

    what: str
    measured: float | None
    limit: float
    unit: str = "x"
    pairs: int = 0
    detail: str = ""
    conditions: str = ""

    @property
    def is_reached(self) -> bool | None:
        return None if self.measured is None else self.measured <= self.limit


def judge(results: Results) -> list[Bar]:
    """
    Work out every bar there is.

    Ratios are medians of the ratios of single rounds; of several peers the one with the lowest median is the best.
    """
    bars: list[Bar] = []
    for workload, variant, judge_series in _OF_SERIES:
        found = [
            one
            for one in results.series.values()
            if (one.workload, one.variant) == (workload, variant) and _counts(one)
        ]
        for series in found or [
            Series(workload=workload, variant=variant, destination="", origin="", size_bytes=0, files=0)
        ]:
            bars += [_under(series.title if found else "", bar) for bar in judge_series(series)]
    for workload, judge_facts in _OF_FACTS.items():
        played = [one for one in results.facts.values() if (one.workload, one.variant) == (workload, "plain")]
        for facts in played or [Facts(workload=workload, variant="plain", destination="", origin="")]:
            # What was found out before it failed is not the whole of it.
            whole = replace(facts, values={}) if facts.failure else facts
            bars += [_under(facts.title if played else "", bar, facts.failure) for bar in judge_facts(whole)]
    return [*bars, *_memory(results)]


def _under(conditions: str, bar: Bar, failure: str | None = None) -> Bar:
    """A bar with the conditions it was measured under; without any, its workload was not run."""
    detail = bar.detail if conditions else "not run"
    return replace(bar, conditions=conditions, detail=failure or detail)


def table(bars: Sequence[Bar], *, quick: bool) -> str:
    """
    Lay out the bars, a line each.
    """
    rows = [["to reach", "measured", "bar", "n", ""], *(_row(bar) for bar in bars)]
    notes = ["  large files had a quarter of their size, so these prove nothing: --quick"] if quick else []
    if any(bar.pairs < PAIRS for bar in bars if bar.measured is not None):
        notes.append(f"  fewer than {PAIRS} pairs prove little")
    notes += [f"  measured in {title}" for title in dict.fromkeys(bar.conditions for bar in bars if bar.conditions)]
    return "\n".join([*columns(rows), *notes])


def document(bars: Sequence[Bar]) -> list[dict[str, object]]:
    """
    The same for JSON.
    """
    return [{**asdict(bar), "reached": bar.is_reached} for bar in bars]


def _row(bar: Bar) -> list[str]:
    measured = "-" if bar.measured is None else f"{bar.measured:.3g} {bar.unit}".rstrip()
    verdict = {None: "not measured", True: "reached", False: "NOT reached"}[bar.is_reached]
    detail = f" ({bar.detail})" if bar.detail else ""
    return [bar.what, measured, f"{bar.limit:g} {bar.unit}".rstrip(), str(bar.pairs), f"{verdict}{detail}"]


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


def _over_interpreter(series: Series, peer: str) -> float | None:
    peak = series.median(peer, "peak_rss")
    return None if peak is None or peer in series.skipped else (peak - series.interpreter_rss) / MIB


def _cold(series: Series) -> Iterator[Bar]:
    kserve = ["kserve-storage"]
    yield _ratio(series, "verified / s5cmd", OURS, ["s5cmd"], 1.0)
    yield _ratio(series, "verified / rclone", OURS, ["rclone"], 1.25)
    yield _ratio(
        series, "verified / download, then sha256sum", OURS, ["s5cmd, then sha256sum", "rclone, then sha256sum"], 0.7
    )
    # Asked for of `sha256sum`, which may not use the processor's instructions; this is how it compares with one that
    # does.
    yield _ratio(
        series, "verified / download, then openssl", OURS, ["s5cmd, then openssl", "rclone, then openssl"], 0.7
    )
    yield _ratio(series, "verified / kserve-storage", OURS, kserve, 0.65)
    yield _ratio(series, "verified / kserve-storage", OURS, kserve, 0.7, "cpu")
    yield _ratio(series, "hashing off / s5cmd", UNVERIFIED, ["s5cmd"], 0.9)
    yield _ratio(series, "hashing off / rclone", UNVERIFIED, ["rclone"], 1.1)
    yield _ratio(series, "hashing off / kserve-storage", UNVERIFIED, kserve, 0.5, "cpu")
    yield _ratio(series, "hashing off / rclone", UNVERIFIED, ["rclone"], 1.1, "cpu")


def _tls(series: Series) -> Iterator[Bar]:
    yield _ratio(series, "hashing off / s5cmd", UNVERIFIED, ["s5cmd"], 1.1)
    yield _ratio(series, "hashing off / s5cmd", UNVERIFIED, ["s5cmd"], 1.0, "cpu")
    yield _ratio(series, "verified / kserve-storage", OURS, ["kserve-storage"], 0.6)


def _gigabit(series: Series) -> Iterator[Bar]:
    yield _ratio(series, "verified / best", OURS, _RIVALS, 1.02)


def _slow_connections(series: Series) -> Iterator[Bar]:
    yield _ratio(series, "verified / best", OURS, _RIVALS, 1.05)


def _small_files(series: Series) -> Iterator[Bar]:
    yield _ratio(series, "verified / best", OURS, ["s5cmd", "rclone", "obstore"], 1.0)


def _listing(series: Series) -> Iterator[Bar]:
    yield _ratio(series, "resolve / boto3", OURS, ["boto3"], 0.25)
    yield _ratio(series, "plan / boto3", "ours, plan", ["boto3"], 0.25)


def _replicas(series: Series) -> Iterator[Bar]:
    sent, pairs = series.median(EIGHT_REPLICAS, "sent_bytes"), len(series.samples.get(EIGHT_REPLICAS, ()))
    # Listings are sent too, a few KiB each; the bar is about what two digits show.
    share = None if sent is None or EIGHT_REPLICAS in series.skipped else round(sent / series.size_bytes, 2)
    yield Bar(
        what="w6 plain: 8 replicas, sent by the origin", measured=share, limit=1.0, pairs=pairs, unit="x the model"
    )
    yield _ratio(series, "last of 8 replicas ready / one alone", EIGHT_REPLICAS, [ONE_REPLICA], 1.10)


def _warm(facts: Facts) -> Iterator[Bar]:
    hits, bare = facts.median("get, us"), facts.median("bare listing and read, us")
    pairs = len(facts.values.get("get, us", ()))
    yield Bar(what="w5 plain: a hit in process", measured=hits, limit=100, unit="us", pairs=pairs)
    yield Bar(
        what="w5 plain: a hit / bare listing and read",
        measured=hits / bare if hits and bare else None,
        limit=2,
        pairs=pairs,
    )
    for what, name, limit in (
        ("whole command `path`", "kserve-pvc path, ms", 120),
        ("`import kserve_pvc` over a bare interpreter", "import kserve_pvc, ms over python -c pass", 40),
        # That import loads little, so the first name that it gives is judged as well.
        ("the same and `ModelStore`", "from kserve_pvc import ModelStore, ms over python -c pass", 40),
    ):
        yield Bar(
            what=f"w5 plain: {what}",
            measured=facts.median(name),
            limit=limit,
            unit="ms",
            pairs=len(facts.values.get(name, ())),
        )


def _killed(facts: Facts) -> Iterator[Bar]:
    found = facts.values.get("sent twice per stream, MiB", [])
    # A promise about every kill, so the worst one counts.
    worst = max(found, default=None)
    part = facts.median("part, MiB") or 64.0
    yield Bar(
        what="w7 plain: killed at 50 %, worst sent twice per stream",
        measured=worst,
        limit=part,
        unit="MiB",
        pairs=len(found),
    )


def _in_a_gigabyte(series: Series) -> Iterator[Bar]:
    runs = len(series.samples.get(IN_A_GIGABYTE, ()))
    # Who had no room to take part is left out too, but has no samples.
    failed = float(IN_A_GIGABYTE in series.skipped and IN_A_GIGABYTE in series.samples)
    size = f", model of {series.size_bytes / GIB:.2g} GiB" if series.size_bytes else ""
    what = f"w8-4 plain: failures with 1 GiB of address space{size}"
    yield Bar(what=what, measured=failed if failed or runs else None, limit=0, unit="", pairs=runs)


def _sources(series: Series) -> Iterator[Bar]:
    for mine, theirs in (
        (BY_GOOGLE, BY_S3),
        (BY_AZURE_KEY, BY_S3),
        (BY_AZURE_SIGNATURE, BY_S3),
        (BY_HTTP_ONE_FILE, BY_S3_ONE_FILE),
    ):
        # They fetch the same bytes, so that this is the ratio of seconds per GiB too.
        yield _ratio(series, f"{mine} / {theirs}", mine, [theirs], 1.3, "cpu")


def _memory(results: Results) -> list[Bar]:
    """
    The most that ours ever held, and how that grows with the model.

    Flat is: no more than an eighth more, or 4 MiB, for sixteen times the model.
    """
    measured = [one for one in results.series.values() if one.size_bytes and OURS in one.samples]
    peaks = [(over, one) for one in measured if (over := _over_interpreter(one, OURS)) is not None]
    worst, series = max(peaks, key=lambda item: item[0], default=(None, None))
    bars = [
        Bar(
            what="verified, any model: peak RSS over the interpreter",
            measured=worst,
            limit=64,
            unit="MiB",
            pairs=len(series.samples[OURS]) if series else 0,
            detail=f"the most of {len(peaks)}: {series.workload} {series.variant}" if series else "not run",
            conditions=series.title if series else "",
        )
    ]
    by_place: dict[str, list[tuple[int, float, Series]]] = {}
    for over, one in peaks:
        if one.workload.startswith("w8-") and one.variant == "plain" and one.origin != "SeaweedFS":
            by_place.setdefault(one.destination, []).append((one.size_bytes, over, one))
    return bars + [_growth(sorted(found, key=lambda item: item[0])) for found in by_place.values() or [[]]]


def _growth(found: list[tuple[int, float, Series]]) -> Bar:
    what, unit = "w8 plain: peak RSS over the interpreter, sixteen times the model", "MiB more"
    if len(found) < len(_MEMORY):
        absent = ", ".join(sorted(_MEMORY - {one.workload for _, _, one in found}))
        return Bar(what=what, measured=None, limit=4, unit=unit, detail=f"without {absent}" if found else "not run")
    least, most = found[0][1], found[-1][1]
    detail = ", ".join(f"{size / GIB:.2g} GiB: {over:.0f} MiB" for size, over, _ in found)
    pairs, conditions = min(len(one.samples[OURS]) for _, _, one in found), found[-1][2].title
    limit = max(4.0, least / 8)
    return Bar(
        what=what, measured=most - least, limit=limit, unit=unit, pairs=pairs, detail=detail, conditions=conditions
    )


_MEMORY = {"w8-1", "w8-4", "w8-16"}


def _credentials(series: Series) -> Iterator[Bar]:
    """
    What other credentials cost over plain ones, less the start that the SDK may take. Judged only where it was run.
    """
    for name in series.samples:
        if not name.startswith(f"{OURS}, ") or name.removeprefix(f"{OURS}, ") not in CREDENTIALS:
            continue
        for value in ("wall", "cpu"):
            pairs = zip(series.samples[name], series.samples.get(OURS, ()), strict=False)
            found = [(getattr(mine, value) - _START_SECONDS) / getattr(plain, value) for mine, plain in pairs]
            label = f"{series.workload} {series.variant}: {name} less {_START_SECONDS:g} s / {OURS}"
            is_whole = bool(found) and name not in series.skipped
            yield Bar(
                what=f"{label} {'CPU' if value == 'cpu' else value}",
                measured=statistics.median(found) if is_whole else None,
                limit=1.10,
                pairs=len(found),
                detail="" if is_whole else series.skipped.get(name, f"without {OURS}"),
            )


_OF_SERIES: list[tuple[str, str, Callable[[Series], Iterator[Bar]]]] = [
    ("w2", "plain", _cold),
    ("w2", "gigabit", _gigabit),
    ("w2", "tls", _tls),
    ("w3", "plain", _small_files),
    ("w4", "plain", _listing),
    ("w2", "slow-connections", _slow_connections),
    ("w6", "plain", _replicas),
    ("w8-4", "plain", _in_a_gigabyte),
    ("w9", "plain", _sources),
    *((workload, "plain", _credentials) for workload in ("w2", "w3", "w4")),
]
_OF_FACTS: dict[str, Callable[[Facts], Iterator[Bar]]] = {"w5": _warm, "w7": _killed}
