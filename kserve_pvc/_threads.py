"""
Starting threads in containers that may be at their limit of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from kserve_pvc.errors import VolumeError


def start_thread(target: Callable[..., object], name: str, *arguments: Any) -> threading.Thread:
    """
    Start a thread that does not keep the process from ending.

    Raises:
        VolumeError: The container, or the process, is at its limit of threads.
    """
    thread = threading.Thread(target=target, args=arguments, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        reason = "no thread can be started: the container is at its limit of threads"
        hint = "raise its limit of PIDs, or lower `max_workers`"
        raise VolumeError(name, "starting a thread", reason, hint) from error
    return thread
