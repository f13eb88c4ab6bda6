"""
One process of the demonstration: a model server that may write to the volume, or one that may only read it.

`python worker.py ROLE PARENT ROOT URI` says `ready`, waits until its standard input ends, does what a server does at
its start, and prints a `Report` as one line of JSON.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from origin import die_with_parent

from kserve_pvc import ModelStore

Role = Literal["server", "reader"]

# What a kill may cost is one part for each stream.
STREAMS = 4
PART_BYTES = 16 * 1024 * 1024
_LOOK_SECONDS = 0.005
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_WRITES = {
    f"os.{name}"
    for name in (
        "chmod",
        "chown",
        "link",
        "mkdir",
        "remove",
        "rename",
        "rmdir",
        "setxattr",
        "symlink",
        "truncate",
        "utime",
    )
}
_NETWORK = {"socket.connect", "socket.getaddrinfo", "socket.sendto"}


@dataclass(frozen=True, kw_only=True)
class Report:
    """
    What one process saw and did.

    Times are seconds of the monotonic clock, which on Linux is the same for all processes: `requested_at` when it
    requested the model, `fetching_at` when it began to download, `found_at` when it had the model.
    """

    status: str
    requested_at: float
    found_at: float
    fetching_at: float | None = None
    bytes_fetched: int = 0
    peak_bytes: int = 0
    log_lines: list[str]
    looks: int = 0
    verify_seconds: float = 0.0
    problems: list[str]
    touched: list[str]


class _StartTime:
    """An `fsspec` callback that records when a download begins."""

    started_at: float | None = None

    def set_size(self, size: int) -> None:
        self.started_at = time.monotonic()

    def relative_update(self, inc: int = 1) -> None:
        pass


def serve(root: Path, uri: str) -> Report:
    """
    Get the model as every replica does: by one call, concurrently with the others.
    """
    _wait_for_start()
    requested_at, began = time.monotonic(), _StartTime()
    with redirect_stderr(io.StringIO()) as stderr:
        model = ModelStore(root, mode="rw", part_bytes=PART_BYTES).ensure(uri, callback=began, max_workers=STREAMS)
    return Report(
        status=model.status,
        requested_at=requested_at,
        found_at=time.monotonic(),
        fetching_at=began.started_at,
        bytes_fetched=model.bytes_fetched,
        peak_bytes=_peak_bytes(),
        log_lines=stderr.getvalue().splitlines(),
        problems=[],
        touched=[],
    )


def read(root: Path, uri: str) -> Report:
    """
    Poll for the model, then verify every byte of it, and count all writes and connections of this process.
    """
    _wait_for_start()
    touched = _watch_this_process()
    requested_at, looks = time.monotonic(), 1
    store = ModelStore(root, mode="r")
    while uri not in store:
        looks += 1
        time.sleep(_LOOK_SECONDS)
    found_at = time.monotonic()
    model = store.get(uri)
    result = store.verify(uri, level="full")
    return Report(
        status=model.status,
        requested_at=requested_at,
        found_at=found_at,
        peak_bytes=_peak_bytes(),
        log_lines=[],
        looks=looks,
        verify_seconds=time.monotonic() - found_at,
        problems=[f"{problem.path}: {problem.detail}" for problem in result.problems],
        touched=list(touched),
    )


def _wait_for_start() -> None:
    # All processes wait at the end of one pipe: closing it lets them go at the same moment.
    print("ready", flush=True)
    sys.stdin.read()


def _watch_this_process() -> list[str]:
    """List from now on every call of this process that changes a file system or uses the network."""
    touched: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[2], int) and not arguments[2] & _WRITE_FLAGS:
            return
        if event == "open" or event in _WRITES or event in _NETWORK:
            touched.append(f"{event} {arguments[0]}")

    sys.addaudithook(watch)
    return touched


def _peak_bytes() -> int:
    # `getrusage` would show the peak of the process that started this one.
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


def main(role: str, parent: str, root: str, uri: str) -> None:
    die_with_parent(int(parent))
    do: Callable[[Path, str], Report] = {"server": serve, "reader": read}[role]
    print(json.dumps(asdict(do(Path(root), uri))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
