"""
Child processes that hold a model open.
"""

from __future__ import annotations

from typing import Any

from kserve_pvc import ModelStore


def hold(root: str, uri: str, line: Any) -> None:
    """
    Keep a model from being removed, say so, and let go when the other end of the line says something or is gone.

    A connection, because an event that a killed process waited for cannot be set any more.
    """
    with ModelStore(root, mode="rw").open(uri):
        line.send("inside")
        line.poll(60)
