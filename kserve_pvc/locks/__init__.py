"""
How writers of one model keep out of each other's way. Locks save work; they never carry safety.
"""

from __future__ import annotations

from typing import Literal

LOCKERS: tuple[str, ...] = ("lease", "flock")
LockerKind = Literal["lease", "flock"]
