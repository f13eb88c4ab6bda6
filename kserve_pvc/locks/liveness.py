"""
Who am I, and is that other process provably dead?
"""

from __future__ import annotations

import os
from pathlib import Path

from kserve_pvc._format.log_entry import Holder


def here(pod: str | None = None, node: str | None = None) -> Holder:
    """
    Describe this process; the host name stands in for what is not given.
    """
    host = os.uname().nodename
    return Holder(
        pod=pod or host,
        node=node or host,
        uid=os.geteuid(),
        pid=os.getpid(),
        boot_id=_boot_id(),
        pid_namespace=_pid_namespace(),
        started=_started(os.getpid()) or 0,
    )


def is_provably_dead(holder: Holder) -> bool:
    """
    Whether the holder's process no longer exists, which only a neighbour in the same PID namespace can know.

    Host names and PIDs prove nothing across pods: a replacement pod has another name and starts its PIDs anew.
    False means "not known", never "alive".
    """
    if not holder.boot_id or holder.boot_id != _boot_id() or holder.pid_namespace != _pid_namespace():
        return False
    return _started(holder.pid) != holder.started


def _boot_id() -> str:
    return _text("/proc/sys/kernel/random/boot_id")


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    stat = _text(f"/proc/{pid}/stat")
    # The command name is in parentheses and may hold anything; a zombie (Z) or dead (X) process writes no more.
    fields = stat.rpartition(")")[2].split()
    if len(fields) < 20 or fields[0] in ("Z", "X"):
        return None
    return int(fields[19])


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""
