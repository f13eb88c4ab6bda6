"""
Where things lie on the volume, relative to the store's root.

Every name below a key is made by us from checked parts; nothing here comes from a remote unchecked.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import PurePosixPath

MODELS = PurePosixPath("models")
META = PurePosixPath(".kserve-pvc")
SETTINGS = META / "store.json"
KEYS = META / "keys"
STAGING = META / "staging"
TRASH = META / "trash"
LEASES = META / "leases"
MANIFESTS = META / "manifests"
DOCTOR = META / "doctor"
# Numbers of attempts to create the store, one empty directory each.
CREATION = META / "creation"
# Files that a removal deletes where the volume is full, since it has to write before it frees anything.
RESERVE = META / "reserve"
NAMES = PurePosixPath("names")
# How fast the last download was, for estimates. Nothing is decided by it.
RATE = META / "rate"

_LOG_NAME = re.compile(r"([0-9]{12})\.(commit|restore|tombstone)")
# What fits into the twelve digits of a name.
MAX_NUMBER = 10**12 - 1

_GENERATION = re.compile(r"[0-9]{12}-[0-9a-f]{32}")
_NUMBER = re.compile(r"[0-9]{12}")


# Joining paths takes longer than what a hit does on the volume, so those of a hit are kept.
@lru_cache(maxsize=256)
def generation_dir(key: str, generation: str) -> PurePosixPath:
    """The model itself: plain files only."""
    return MODELS.joinpath(key, generation)


@lru_cache(maxsize=256)
def log_dir(key: str) -> PurePosixPath:
    return KEYS.joinpath(key, "log")


@lru_cache(maxsize=256)
def record_file(key: str, name: str) -> PurePosixPath:
    return log_dir(key) / name


def view_link(key: str) -> PurePosixPath:
    """
    Where KServe looks for a model in a volume: `models/` and the first 16 hex digits of the SHA-256 of its URI.
    """
    return MODELS / key.rpartition("-")[2]


def name_link(name: str) -> PurePosixPath:
    return NAMES / name


def slot_dir(key: str) -> PurePosixPath:
    """Numbers that are taken: one empty directory each, because `mkdir` is the most widely exclusive call."""
    return KEYS / key / "slots"


def claims_dir(key: str) -> PurePosixPath:
    return KEYS / key / "claims"


def claim_dir(key: str, epoch: int) -> PurePosixPath:
    """One claim: making this directory wins it. `owner` names its holder, `beat` is the holder's heartbeat."""
    return claims_dir(key) / f"{epoch:012d}"


def is_claim(place: PurePosixPath) -> bool:
    """Whether a path is one numbered claim of some key."""
    return len(place.parts) == 5 and place.parent == claims_dir(place.parts[2]) and parse_number(place.name) is not None


def lock_file(key: str) -> PurePosixPath:
    return KEYS / key / "lock"


def manifest_file(generation: str) -> PurePosixPath:
    return MANIFESTS / f"{generation}.json"


def staging_dir(generation: str) -> PurePosixPath:
    return STAGING / generation


def journal_file(generation: str) -> PurePosixPath:
    return staging_dir(generation) / "journal"


def spoiled_file(generation: str) -> PurePosixPath:
    """A file that says that the volume failed while this generation was written."""
    return staging_dir(generation) / "spoiled"


def lease_dir(generation: str) -> PurePosixPath:
    return LEASES / generation


def parse_log_name(name: str) -> int | None:
    """The number of a log record, or None for anything else."""
    match = _LOG_NAME.fullmatch(name)
    return int(match[1]) if match else None


def parse_number(name: str) -> int | None:
    """The number of a claim or slot, or None for anything else."""
    return int(name) if _NUMBER.fullmatch(name) else None


def parse_generation(name: str) -> str | None:
    """The name itself if it can be a generation's, or None for anything else."""
    return name if _GENERATION.fullmatch(name) else None
