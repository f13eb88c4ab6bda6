"""
Child processes that hold a model open.
"""

from __future__ import annotations

from typing import Any

from kserve_pvc import ModelStore


def hold(root: str, uri: str, inside: Any, leave: Any) -> None:
    """
    Keep a model from being removed, until told to leave.
    """
    with ModelStore(root, mode="rw").open(uri):
        inside.set()
        leave.wait(60)
