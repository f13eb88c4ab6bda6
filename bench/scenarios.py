"""
What is no race between peers: hits on a model that is there, and a download that is killed and done again.
"""

from __future__ import annotations

import inspect
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import data
import measure
import origins
import peers
from report import MIB, Facts

_WARM = Path(__file__).with_name("warm.py")
_OURS = next(peer for peer in peers.DOWNLOADERS if peer.name == peers.OURS)
_PAIRS_PER_ROUND = 5
_SLOWEST_DOWNLOAD_SECONDS = 900.0

Scenario = Callable[[Facts, peers.Job, data.Model, origins.Origin, int], None]


class ScenarioError(Exception):
    """
    A scenario that did not come to its end; the message says why.
    """


def warm_hit(facts: Facts, job: peers.Job, model: data.Model, origin: origins.Origin, rounds: int) -> None:
    """
    Time hits in a process, and whole commands next to an interpreter that does nothing.
    """
    _ensure(job, model)
    mark = origin.mark()
    for _ in range(rounds):
        run = [sys.executable, "-P", str(_WARM), job.uri, str(job.destination)]
        output = subprocess.run(run, env=job.environ, cwd=job.home, check=True, capture_output=True, text=True).stdout
        for name, microseconds in json.loads(output).items():
            facts.add(f"{name}, us", microseconds)
    python = [sys.executable, "-c"]
    commands = {
        "python -c pass": [*python, "pass"],
        "kserve-pvc path": [
            str(Path(sys.executable).with_name("kserve-pvc")),
            "path",
            job.uri,
            "--store",
            str(job.destination),
        ],
        "import kserve_pvc": [*python, "import kserve_pvc"],
        "from kserve_pvc import ModelStore": [*python, "from kserve_pvc import ModelStore"],
    }
    for number in range(rounds * _PAIRS_PER_ROUND):
        order = list(commands) if number % 2 == 0 else list(commands)[::-1]
        taken = {name: measure.seconds(commands[name], job.environ, job.home) for name in order}
        bare = taken["python -c pass"]
        for name in commands:
            facts.add(f"{name}, ms", taken[name] * 1000)
            if name != "python -c pass":
                facts.add(f"{name}, ms over python -c pass", (taken[name] - bare) * 1000)
    if (sent := origin.since(mark)) is not None:
        facts.add("requests at the origin", sent.requests)


def killed(facts: Facts, job: peers.Job, model: data.Model, origin: origins.Origin, rounds: int) -> None:
    """
    Kill a download with half of the model written, have another process do it again, and count what came twice.
    """
    for _ in range(rounds):
        measure.empty(job.destination)
        measure.touch_memory(min(model.size_bytes, measure.free_memory() * 3 // 4))
        mark = origin.mark()
        written, streams = _kill_at_half(job, model, int(job.endpoint.rpartition(":")[2]))
        usage = _ensure(job, model)
        sent = origin.since(mark)
        if sent is None:
            raise ScenarioError("this origin does not count what it sends")
        twice = (sent.body_bytes - model.size_bytes) / MIB
        facts.add("written at the kill, of the model", written / model.size_bytes)
        facts.add("streams at the kill", streams)
        facts.add("part, MiB", _part_bytes() / MIB)
        facts.add("sent twice, MiB", twice)
        facts.add("sent twice per stream, MiB", twice / max(1, streams))
        facts.add("second run, s", usage.wall)


SCENARIOS: dict[str, Scenario] = {"w5": warm_hit, "w7": killed}


def _part_bytes() -> int:
    """The most that ours fetch in one piece, by default."""
    from kserve_pvc import ModelStore

    return int(inspect.signature(ModelStore).parameters["part_bytes"].default)


def _kill_at_half(job: peers.Job, model: data.Model, port: int) -> tuple[int, int]:
    """Bytes written and connections open at the moment of the kill."""
    nothing = subprocess.DEVNULL
    process = subprocess.Popen(
        _OURS.command(job), env=job.environ, cwd=job.home, stdin=nothing, stdout=nothing, stderr=nothing
    )
    try:
        ends_at = time.monotonic() + _SLOWEST_DOWNLOAD_SECONDS
        while (written := measure.written_bytes(process.pid)) < model.size_bytes // 2:
            if process.poll() is not None or time.monotonic() > ends_at:
                raise ScenarioError("the download ended before it could be killed")
            time.sleep(0.001)
        # Stopped first, so that what is counted is what is killed.
        process.send_signal(signal.SIGSTOP)
        return written, measure.connections_to(port)
    finally:
        process.kill()
        process.wait()


def _ensure(job: peers.Job, model: data.Model) -> measure.Usage:
    usage = measure.run(_OURS.command(job), job.environ, job.home)
    if usage.status:
        raise ScenarioError(f"`ensure` ended with {usage.status}: {usage.errors.strip()[-300:]}")
    if why := model.check(Path(usage.output.strip().splitlines()[-1])):
        raise ScenarioError(why)
    return usage
