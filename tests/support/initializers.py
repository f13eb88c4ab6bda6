"""
Two storage initializers over the same sources: KServe's own, in an environment of its own, and ours.

Run as a script, this file is that environment's side: it imports one initializer once, and has a child for each case.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

STOCK = "KSERVE_PVC_TEST_STOCK"
CASE_SECONDS = 60
# What each keeps beside a model for itself.
OF_THEIR_OWN = (".cache/huggingface/", ".kserve-pvc-initialize")
PHRASES = ("Copying contents of ", "Successfully copied ", "Model downloaded in ")

Pairs = Sequence[tuple[str, str]]


def run_all(
    python: str, which: str, cases: Mapping[str, Mapping[str, object]], environ: Mapping[str, str]
) -> dict[str, dict[str, object]]:
    """
    Run every case, and return its exit code and what it logged.

    Args:
        python: The interpreter that has the initializer.
        which: `stock` or `ours`.
        cases: By name: `pairs` of sources and directories, and `env`.
        environ: All of the environment.
    """
    done = subprocess.run(
        [python, __file__, which], input=json.dumps(cases), capture_output=True, text=True, env=dict(environ)
    )
    if done.returncode:
        raise RuntimeError(f"the {which} side ended with {done.returncode}: {done.stderr[-2000:]}")
    found: dict[str, dict[str, object]] = json.loads(done.stdout)
    return found


def files_of(place: Path) -> dict[str, tuple[bytes, str]]:
    """
    What a model server finds in a directory, through links: bytes and modes, without the right to write.
    """
    found = {}
    for above, _, names in os.walk(place, followlinks=True):
        for name in names:
            path = Path(above) / name
            relative = str(path.relative_to(place))
            if not relative.startswith(OF_THEIR_OWN) and path.exists():
                found[relative] = (path.read_bytes(), f"{path.stat().st_mode & 0o555:o}")
    return found


def _stock() -> Callable[[Pairs], int]:
    from kserve_storage import Storage
    from kserve_storage.logging import configure_logging

    configure_logging()

    def run(pairs: Pairs) -> int:
        # The script of KServe's image is not part of the distribution: it hands its arguments on and exits with 1 after
        # an error.
        try:
            Storage.download_files([source for source, _ in pairs], [place for _, place in pairs])
        except Exception as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return 1
        return 0

    return run


def _ours() -> Callable[[Pairs], int]:
    from kserve_pvc.kserve._initialize import main

    return lambda pairs: main([word for pair in pairs for word in pair])


def _run_child(run: Callable[[Pairs], int], case: Mapping[str, object], log: Path) -> int:
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setsid()
            fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(fd, 1)
            os.dup2(fd, 2)
            os.environ.update(case["env"])  # type: ignore[call-overload]
            code = run(case["pairs"])  # type: ignore[arg-type]
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return _wait(child)


def _wait(child: int) -> int:
    deadline = time.monotonic() + CASE_SECONDS
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.005)
    with suppress(ProcessLookupError):  # Its own children too.
        os.killpg(child, signal.SIGKILL)
    if not ended:
        os.waitpid(child, 0)
        return -signal.SIGKILL
    return os.waitstatus_to_exitcode(status)


def _main(which: str) -> None:
    cases = json.load(sys.stdin)
    run = {"stock": _stock, "ours": _ours}[which]()
    found = {}
    for name, case in cases.items():
        log = Path(case["log"])
        began = time.monotonic()
        code = _run_child(run, case, log)
        found[name] = {"code": code, "log": log.read_text(errors="replace"), "seconds": time.monotonic() - began}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    _main(sys.argv[1])
