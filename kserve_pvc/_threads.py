"""
Starting threads in containers that may be at their limit of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from kserve_pvc.errors import VolumeError


def start_thread(target: Callable[..., object], name: str, *arguments: Any) -> threading.Thread:
    """
    Start a thread that does not keep the process from ending.

    Raises:
        VolumeError: The container, or the process, is at its limit of threads.
    """
    thread = threading.Thread(target=target, args=arguments, name=name, daemon=True)
    with naming_thread_limit(name):
        thread.start()
    return thread


@contextmanager
def naming_thread_limit(name: str) -> Iterator[None]:
    """
    Say what it means that a thread cannot be started.

    Raises:
        VolumeError: The container, or the process, is at its limit of threads.
    """
    try:
        yield
    except RuntimeError as error:
        if "thread" not in str(error):
            raise  # Such as an executor that was shut down.
        reason = "no thread can be started: the container is at its limit of threads"
        hint = "raise its limit of PIDs, or lower `max_workers`"
        raise VolumeError(name, "starting a thread", reason, hint) from error
