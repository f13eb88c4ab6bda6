"""
Identifies this process, and tells whether another process is provably dead.
"""

from __future__ import annotations

import os
from pathlib import Path

from kserve_pvc._format.log_entry import Holder


def here(pod: str | None = None, node: str | None = None) -> Holder:
    """
    Describe this process. The host name is the default for pod and node.
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
    Whether the process no longer exists, which can be known only in the same PID namespace.

    Across pods, host names and PIDs prove nothing: a replacement pod has another name, and reuses PIDs. False means
    "unknown", never "alive".
    """
    if not holder.boot_id or holder.boot_id != _boot_id() or holder.pid_namespace != _pid_namespace():
        return False
    return _started(holder.pid) != holder.started


def _boot_id() -> str:
    return _read("/proc/sys/kernel/random/boot_id")


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    stat = _read(f"/proc/{pid}/stat")
    # The command name is in parentheses and may contain anything. A zombie (Z) or dead (X) process cannot write.
    fields = stat.rpartition(")")[2].split()
    if len(fields) < 20 or fields[0] in ("Z", "X"):
        return None
    return int(fields[19])


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""
