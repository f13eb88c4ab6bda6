"""
What the benchmark says of the goals: each has its line, worked out from what was measured, or it is told that nothing
was.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

_BENCH = Path(__file__).parents[1] / "bench"
_NOT_RUN = "not measured (not run)"

pytestmark = pytest.mark.skipif(not _BENCH.is_dir(), reason="the benchmark is not part of this distribution")


def test_goal_without_a_run_is_told_as_not_measured(tmp_path):
    """
    Without any results every goal has its line, and none of them is reached or missed.
    """
    lines = _goals(tmp_path)

    assert [line for line in lines if not line.endswith(_NOT_RUN)] == []
    assert {line.split()[0] for line in lines} == {"w2", "w3", "w4", "w5", "w6", "w7", "w8", "w8-4", "w9", "verified,"}


def test_goal_of_sources_is_the_median_of_the_rounds(tmp_path):
    """
    The CPU time of a source is compared with that of S3 round by round, and the median counts.
    """
    seconds = {"ours, s3": [1.0, 2.0, 4.0], "ours, gs": [1.2, 3.0, 4.4], "ours, az, signature": [1.0, 2.0, 4.0]}
    lines = _goals(tmp_path, series=[_series("w9", seconds)])

    assert [" ".join(line.split()) for line in lines if line.startswith("w9")] == [
        "w9 plain: ours, gs / ours, s3 CPU 1.2 x 1.3 x 3 reached",
        "w9 plain: ours, az, key / ours, s3 CPU - 1.3 x 0 not measured (without ours, az, key)",
        "w9 plain: ours, az, signature / ours, s3 CPU 1 x 1.3 x 3 reached",
        "w9 plain: ours, http, one file / ours, s3, one file CPU - 1.3 x 0 not measured (without ours, s3, one file)",
    ]


def test_goal_of_a_peer_that_gave_up_is_not_measured(tmp_path):
    """
    What a peer did before it gave up is no measurement of it.
    """
    series = _series("w9", {"ours, s3": [1.0, 1.0], "ours, gs": [1.0]})
    lines = _goals(tmp_path, series=[{**series, "skipped": {"ours, gs": "it ended with 1"}}])

    assert "not measured" in next(line for line in lines if line.startswith("w9 plain: ours, gs"))


def test_best_peer_names_those_that_took_no_part(tmp_path):
    """
    A comparison with the best says who was not there to be it.
    """
    lines = _goals(tmp_path, series=[_series("w3", {"ours": [1.0], "s5cmd": [2.0]})])

    assert next(line for line in lines if line.startswith("w3")).endswith(
        "reached (best: s5cmd; without rclone, obstore)"
    )


def test_scenario_that_failed_is_not_measured(tmp_path):
    """
    Kills that went well prove nothing if a later one did not.
    """
    facts = {"workload": "w7", "variant": "plain", "destination": "tmpfs", "origin": "nginx"}
    values = {"sent twice per stream, MiB": [1.0], "part, MiB": [64.0]}
    lines = _goals(
        tmp_path, facts=[{**facts, "values": values, "failure": "the download ended before it could be killed"}]
    )

    verdict = next(line for line in lines if line.startswith("w7"))
    assert verdict.endswith("not measured (the download ended before it could be killed)")


def test_memory_is_judged_by_the_hungriest_model(tmp_path):
    """
    The goal for memory is for whatever model, so the most that any of them took counts.
    """
    small, large = _series("w8-1", {"ours": [1.0]}), _series("w2", {"ours": [1.0]}, peak_rss=80 << 20)
    lines = _goals(tmp_path, series=[small, large])

    verdict = next(line for line in lines if line.startswith("verified, any"))
    assert " ".join(verdict.split()).endswith("80 MiB 64 MiB 1 NOT reached (the most of 2: w2 plain)")


def _goals(
    directory: Path, *, series: Sequence[Mapping[str, Any]] = (), facts: Sequence[Mapping[str, Any]] = ()
) -> list[str]:
    """The lines that `bench --show` prints about goals."""
    document = {"machine": {}, "versions": {}, "quick": False, "bars": [], "series": series, "facts": facts}
    (directory / "results.json").write_text(json.dumps(document))
    command = [sys.executable, "-B", str(_BENCH), "--show", "--out", str(directory)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    lines = output.partition("  to reach")[2].splitlines()[1:]
    return [line.strip() for line in lines if not line.startswith(("  measured in", "  fewer"))]


def _series(workload: str, cpu: Mapping[str, Sequence[float]], *, peak_rss: int = 30 << 20) -> dict[str, Any]:
    rest = {"wall": 1.0, "peak_rss": peak_rss, "requests": 1, "sent_bytes": 1, "origin_cpu": 0.0, "stolen": 0.0}
    samples = {peer: [{**rest, "cpu": seconds} for seconds in each] for peer, each in cpu.items()}
    where = {"variant": "plain", "destination": "tmpfs", "origin": "nginx", "size_bytes": 1 << 30, "files": 14}
    return {"workload": workload, **where, "samples": samples, "skipped": {}}


def test_goals_of_credentials_leave_out_the_start(tmp_path):
    """
    What other credentials cost is compared with keys round by round, less what the SDK may take to start; where they
    were not run there is no line.
    """
    seconds = {"ours": [1.0, 2.0, 1.0], "ours, profile": [1.4, 2.6, 1.9], "ours, plan": [1.0, 1.0, 1.0]}
    lines = _goals(tmp_path, series=[_series("w4", seconds)])

    assert [" ".join(line.split()) for line in lines if "less 0.4 s" in line] == [
        "w4 plain: ours, profile less 0.4 s / ours wall 0.6 x 1.1 x 3 reached",
        "w4 plain: ours, profile less 0.4 s / ours CPU 1.1 x 1.1 x 3 reached",
    ]
