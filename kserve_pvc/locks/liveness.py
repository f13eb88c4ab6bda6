"""
Identifies this process, and tells whether another process is provably dead.
"""

from __future__ import annotations

import os
from contextlib import suppress
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
        started=_stat_of(os.getpid())[1] or 0,
    )


def is_provably_dead(holder: Holder) -> bool:
    """
    Whether the process no longer exists, which can be known only in the same PID namespace.

    Across pods, host names and PIDs prove nothing: a replacement pod has another name, and reuses PIDs. False means
    "unknown", never "alive".

    What `/proc` does not show proves nothing: with `hidepid` it shows a process only its own user's. A signal is
    answered by the kernel, whatever is mounted.
    """
    if not holder.boot_id or holder.boot_id != _boot_id() or holder.pid_namespace != _pid_namespace():
        return False
    if not _exists(holder.pid):
        return True
    state, started = _stat_of(holder.pid)
    # A zombie (Z) or dead (X) process cannot write. A start time of 0 was not known to its process either.
    return state in ("Z", "X") or (holder.started != 0 and started not in (None, holder.started))


def is_elsewhere_here(holder: Holder) -> bool:
    """
    Whether a process belongs to this kernel and another PID namespace: that of another container, or of one before.
    """
    return bool(holder.boot_id) and holder.boot_id == _boot_id() and holder.pid_namespace != _pid_namespace()


def hold(fd: int) -> bool:
    """
    Lock a heartbeat file until its last descriptor is closed, which the kernel does for a process that is killed.
    """
    import fcntl  # A hit needs none of it.

    with suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def is_held(fd: int) -> bool:
    """
    Whether a process of this kernel holds a heartbeat file; True if that cannot be known.
    """
    import fcntl

    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    with suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_UN)
    return False


def _exists(pid: int) -> bool:
    """Whether there may be a process of this number in the PID namespace of this one."""
    if pid < 1:
        return True  # It would be a signal to several processes; no process wrote that.
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _boot_id() -> str:
    return _read("/proc/sys/kernel/random/boot_id")


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _stat_of(pid: int) -> tuple[str, int | None]:
    """The state of a process and when it started: "" and None if that cannot be read."""
    try:
        # A `/proc` of another namespace, such as the node's, numbers other processes.
        if os.readlink("/proc/self") != str(os.getpid()):
            return "", None
    except OSError:
        return "", None
    # The command name is in parentheses and may contain anything.
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return (fields[0], int(fields[19])) if len(fields) >= 20 else ("", None)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""
