"""
Run one command and say what it cost: seconds on the wall, CPU seconds and peak memory of its whole tree of processes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SAMPLE_SECONDS = 0.02
_ESTABLISHED = "01"
_TICKS = os.sysconf("SC_CLK_TCK")
_TOUCH = (
    "import mmap, sys; mmap.mmap(-1, int(sys.argv[1]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)"
)


@dataclass(frozen=True, kw_only=True)
class Usage:
    """
    What one command cost.

    Attributes:
        wall: From before it was started until it had ended, in seconds.
        cpu: User and system time of it and of all descendants that were waited for, in seconds.
        peak_rss: The larger of two: resident bytes summed over the tree, sampled every `SAMPLE_SECONDS`, where pages
            that processes share count once for each; and the high-water mark that the kernel keeps for a single
            process.
        stolen: The share of the processors' time meanwhile that the host gave to other machines; above a few percent,
            only ratios within a round mean something.
        status: The exit status, negative for a signal.
        output: What it printed on stdout. `errors` is the end of its stderr.
    """

    wall: float
    cpu: float
    peak_rss: int
    stolen: float
    status: int
    output: str
    errors: str


def run(command: Sequence[str], environ: Mapping[str, str], directory: Path, *, timeout: float = 900.0) -> Usage:
    """
    Run a command to its end and measure it.

    A command that takes longer than `timeout` is killed, with the processes of its session.
    """
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        stolen, passed = _stolen_and_passed()
        started_at = time.perf_counter()
        process = subprocess.Popen(
            command,
            env=environ,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            start_new_session=True,
        )
        sampler = _Sampler(process.pid, timeout)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started_at
        process.returncode = os.waitstatus_to_exitcode(status)
        peak = sampler.finish()
        stolen_then, passed_then = _stolen_and_passed()
        output.seek(0)
        errors.seek(max(0, errors.seek(0, os.SEEK_END) - 4000))
        return Usage(
            wall=wall,
            cpu=usage.ru_utime + usage.ru_stime,
            peak_rss=peak,
            stolen=(stolen_then - stolen) / max(1, passed_then - passed),
            status=process.returncode,
            output=output.read().decode(errors="replace"),
            errors=errors.read().decode(errors="replace"),
        )


class _Sampler(threading.Thread):
    """Looks at the memory of a tree of processes now and then, about 0.1 ms of work each time."""

    def __init__(self, root: int, timeout: float) -> None:
        super().__init__(name="memory-sampler", daemon=True)
        self._root = root
        self._ends_at = time.monotonic() + timeout
        self._done = threading.Event()
        self._peak = 0
        self.start()

    def run(self) -> None:
        # The first look is early, because some commands are over before the second.
        pause = SAMPLE_SECONDS / 10
        while not self._done.wait(pause):
            pause = SAMPLE_SECONDS
            resident = [_memory(pid) for pid in tree(self._root)]
            self._peak = max([self._peak, sum(now for now, _ in resident), *(highest for _, highest in resident)])
            if time.monotonic() > self._ends_at:
                os.killpg(self._root, 9)
                return

    def finish(self) -> int:
        self._done.set()
        self.join()
        return self._peak


def tree(root: int) -> list[int]:
    """
    A process and all its descendants.
    """
    found = [root]
    for pid in found:
        try:
            tasks = os.listdir(f"/proc/{pid}/task")
        except OSError:
            continue
        for task in tasks:
            try:
                children = Path(f"/proc/{pid}/task/{task}/children").read_bytes()
            except OSError:
                continue
            found += map(int, children.split())
    return found


def cpu_seconds(roots: Iterable[int]) -> float:
    """
    CPU seconds so far of processes and their descendants that still live, with those of children waited for.
    """
    ticks = 0
    for pid in (pid for root in roots for pid in tree(root)):
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            continue
        ticks += sum(map(int, stat.rpartition(")")[2].split()[11:15]))
    return ticks / _TICKS


def touch_memory(size_bytes: int) -> None:
    """
    Use so much memory once and give it back, so that the run that follows gets pages that the machine really has.

    A virtual machine may have given free memory back to its host, and the first touch of such a page then costs a
    fault there: by luck, several times what the download itself costs.
    """
    subprocess.run([sys.executable, "-I", "-S", "-c", _TOUCH, str(size_bytes)], check=True)


def interpreter_rss() -> int:
    """
    The most memory that a Python process holds that does nothing, in bytes: what no Python client can do without.
    """
    status = "print(open('/proc/self/status').read())"
    peaks = []
    for _ in range(3):
        lines = subprocess.run(
            [sys.executable, "-c", status], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        peaks += [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
    return sorted(peaks)[1]


def seconds(command: Sequence[str], environ: Mapping[str, str], directory: Path) -> float:
    """
    Time one short command, with nobody watching it.

    Raises:
        subprocess.CalledProcessError: It failed.
    """
    started_at = time.perf_counter()
    process = subprocess.Popen(command, env=environ, cwd=directory, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    status = process.wait()
    passed = time.perf_counter() - started_at
    if status:
        raise subprocess.CalledProcessError(status, command)
    return passed


def written_bytes(pid: int) -> int:
    """
    How much a process has written so far, to files or anything else; 0 once it has ended.
    """
    try:
        return next(
            int(line.split()[1])
            for line in Path(f"/proc/{pid}/io").read_text().splitlines()
            if line.startswith("wchar:")
        )
    except OSError:
        return 0


def connections_to(port: int) -> int:
    """
    How many connections to a port of this machine are open, seen from their clients' side.
    """
    rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return sum(row[3] == _ESTABLISHED and int(row[2].rpartition(":")[2], 16) == port for row in rows)


def free_memory() -> int:
    """
    Bytes that could be used now, page cache that can be dropped included.
    """
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def empty(directory: Path) -> Path:
    """
    Have the directory exist with nothing in it.
    """
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory


def _stolen_and_passed() -> tuple[int, int]:
    ticks = [int(word) for word in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]
    return ticks[7], sum(ticks)


def _memory(pid: int) -> tuple[int, int]:
    try:
        lines = Path(f"/proc/{pid}/status").read_bytes().split(b"\n")
    except OSError:
        return 0, 0
    found = {line[:6]: int(line.split()[1]) * 1024 for line in lines if line.startswith((b"VmRSS:", b"VmHWM:"))}
    return found.get(b"VmRSS:", 0), found.get(b"VmHWM:", 0)
