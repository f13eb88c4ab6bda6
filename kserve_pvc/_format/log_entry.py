"""
What a warm hit reads, and nothing more: the newest entry of a log and the settings of the store.

Making an attrs class costs about a millisecond when its module is loaded, so all other records are in `_record`,
which a hit does not load.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal

import attrs
from attrs.validators import and_, ge, le, matches_re, optional

from kserve_pvc._format.codec import (
    GENERATION,
    KEY,
    SHA256,
    build,
    decode_plain,
    encode_plain,
    integer,
    number,
    size,
    strings,
    text,
    timestamp,
)

MIN_LEASE_SECONDS = 0.1
MAX_LEASE_SECONDS = 3600.0


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError("seconds must be a number")
    return float(value) if isinstance(value, float) or abs(value) <= MAX_LEASE_SECONDS else math.inf


def to_tuple(value: Any) -> Any:
    """
    Convert a JSON array to a tuple; leave other values to the validator.
    """
    return tuple(value) if isinstance(value, list) else value


@attrs.frozen(kw_only=True)
class Holder:
    """
    The process that writes or reads: enough for a person to find the pod, and for a process in the same PID namespace
    to see whether it is dead.

    `started` is the process's start time in clock ticks since boot, so that a reused PID is recognised.
    """

    pod: str = attrs.field(validator=text)
    node: str = attrs.field(validator=text)
    uid: int = attrs.field(validator=integer)
    pid: int = attrs.field(validator=integer)
    boot_id: str = attrs.field(validator=text)
    pid_namespace: str = attrs.field(validator=text)
    started: int = attrs.field(validator=integer)

    def __str__(self) -> str:
        return f"pod {self.pod} on {self.node} (uid {self.uid}, pid {self.pid})"


def to_holder(value: Holder | Mapping[str, Any]) -> Holder:
    return value if isinstance(value, Holder) else build(Holder, value)


@attrs.frozen(kw_only=True)
class StoreSettings:
    """
    What every process that uses a store must agree on; written once, when the store is created.
    """

    store_id: str = attrs.field(validator=matches_re(r"[0-9a-f]{32}"))
    locker: str = attrs.field(validator=text)
    lease_seconds: float = attrs.field(converter=_seconds, validator=and_(ge(MIN_LEASE_SECONDS), le(MAX_LEASE_SECONDS)))
    created_at: datetime = attrs.field(converter=timestamp)


@attrs.frozen(kw_only=True)
class LogEntry:
    """
    One numbered step in the life of a model: complete from here on, gone from here on, or complete again.

    A `commit` or `restore` names the generation that is the model; a `tombstone` says that the model was removed.
    `digest` is the kind of digest every byte was hashed into, `none` if that was switched off; `policy` is the verdict
    the model was admitted with.
    """

    type: Literal["commit", "restore", "tombstone"] = attrs.field(validator=matches_re("commit|restore|tombstone"))
    seq: int = attrs.field(validator=number)
    key: str = attrs.field(validator=matches_re(KEY))
    uri: str = attrs.field(validator=text)
    revision: str | None = attrs.field(validator=optional(text))
    allow_patterns: tuple[str, ...] | None = attrs.field(converter=to_tuple, validator=optional(strings))
    ignore_patterns: tuple[str, ...] = attrs.field(converter=to_tuple, validator=strings)
    generation: str = attrs.field(validator=matches_re(GENERATION))
    version: str = attrs.field(validator=text)
    files: int = attrs.field(validator=size)
    size_bytes: int = attrs.field(validator=size)
    manifest_sha256: str = attrs.field(validator=matches_re(SHA256))
    digest: Literal["sha256", "none"] = attrs.field(validator=matches_re("sha256|none"))
    policy: Literal["allow"] = attrs.field(validator=matches_re("allow"))
    created_at: datetime = attrs.field(converter=timestamp)
    writer: Holder = attrs.field(converter=to_holder)

    @property
    def is_present(self) -> bool:
        return self.type != "tombstone"

    @property
    def name(self) -> str:
        return f"{self.seq:012d}.{self.type}"


def now() -> datetime:
    """
    The wall clock, for people to read. Nothing is decided by it.
    """
    return datetime.now(UTC)


def encode_settings(settings: StoreSettings) -> bytes:
    """
    Write a store's settings as plain JSON, which people read and back up.
    """
    return encode_plain(settings)


def decode_settings(data: bytes, where: str) -> StoreSettings:
    """
    Read a store's settings.

    Raises:
        StoreFormatError: They are damaged, or the store was made by a newer version.
    """
    return decode_plain(StoreSettings, data, where, what="store settings")
