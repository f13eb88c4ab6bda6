"""
The command line as a shell or an init container runs it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-I", "-m", "kserve_pvc"]


# Variables that would configure a store, or say who somebody is.
_OURS = ("KSERVE_", "AWS_", "POD_", "NODE_", "HF_", "HUGGING_FACE_", "GOOGLE_", "GCE_", "STORAGE_EMULATOR_", "AZURE_")


def clean_environ(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """
    This process's environment without what would configure a store or a client, and then what is given.
    """
    return {k: v for k, v in os.environ.items() if not k.startswith(_OURS)} | dict(extra or {})


def kserve_pvc(
    root: Path | str, *arguments: str, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """
    Run one verb on a store and wait for its end.
    """
    return run([*COMMAND, "--store", str(root), *arguments], env=env)


def run(command: Sequence[str], *, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """
    Run a command that says itself which store it means.
    """
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=clean_environ(env))


def start(
    root: Path | str, *arguments: str, env: Mapping[str, str] | None = None, **streams: Any
) -> subprocess.Popen[str]:
    """
    Start one verb on a store. It hears interrupts, although what a shell runs in the background, tests too, does not.
    """
    command = [*COMMAND, "--store", str(root), *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # What is ignored here would be ignored there too.
    return subprocess.Popen(command, text=True, env=clean_environ(env), **streams)


def document(result: subprocess.CompletedProcess[str]) -> Any:
    """
    The one JSON document that `--json` prints.
    """
    (line,) = result.stdout.splitlines()
    return json.loads(line)


def python(script: str, *arguments: str, env: Mapping[str, str] | None = None) -> str:
    """
    Run a script in an interpreter of its own and return what it printed.
    """
    command = [sys.executable, "-I", "-c", script, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=clean_environ(env))
    if result.returncode:
        raise AssertionError(f"the script ended with {result.returncode}:\n{result.stderr}")
    return result.stdout


# Of a process, not of the one that started it: `getrusage` keeps the parent's peak across `exec`, this does not.
PEAK_MIB = """
def peak_mib():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) // 1024 for line in status if line.startswith("VmHWM"))
"""
