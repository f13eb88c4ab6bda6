"""
The small files that say what is in a store: how they are written, and how little of them is believed.

Every record is one JSON object with the format number and a checksum over all other fields. Whatever is read back
is untrusted input: other tenants, older and newer versions and broken volumes all write there. Decoding is strict:
an unknown field, a wrong type, a name that would leave its place or a failing checksum makes the record unusable.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any, Literal, NoReturn, TypeVar

import attrs
from attrs.validators import and_, ge, instance_of, le, lt, matches_re, optional

from kserve_pvc._names import check_collisions, check_name
from kserve_pvc.errors import StoreFormatError, UnsafePathError

FORMAT = 1

MAX_RECORD_BYTES = 64 * 1024
MAX_MANIFEST_BYTES = 512 * 1024 * 1024
BEAT_BYTES = 256
MIN_LEASE_SECONDS = 0.1
MAX_LEASE_SECONDS = 3600.0

_T = TypeVar("_T")
_SHA256 = r"[0-9a-f]{64}"
_text = instance_of(str)


def _integer(_: object, field: attrs.Attribute[Any], value: object) -> None:
    # JSON knows numbers of any length, and Python takes a truth value for one.
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise TypeError(f"`{field.name}` must be an integer of 64 bits")


_size = and_(_integer, ge(0))
_number = and_(_integer, ge(1), lt(10**12))


def _texts(_: object, field: attrs.Attribute[Any], value: Iterable[object]) -> None:
    if not isinstance(value, tuple) or not all(isinstance(item, str) for item in value):
        raise TypeError(f"`{field.name}` must be a list of texts")


KEY = re.compile(r"[a-z0-9._-]{1,40}-[0-9a-f]{16}")
GENERATION = re.compile(r"[0-9]{12}-[0-9a-f]{32}")


def _datetime(value: str | datetime) -> datetime:
    moment = value if isinstance(value, datetime) else datetime.fromisoformat(value)
    if moment.tzinfo is None:
        raise ValueError("a time needs its zone")
    return moment


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError("seconds must be a number")
    return float(value) if isinstance(value, float) or abs(value) <= MAX_LEASE_SECONDS else math.inf


def _path(value: str | PurePosixPath) -> PurePosixPath:
    if not isinstance(value, str | PurePosixPath):
        raise TypeError("a path must be a text")
    return check_name(str(value))


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@attrs.frozen(kw_only=True)
class FileEntry:
    """
    One file of a model.

    `token` is what the source calls this content (an ETag, a version id); it identifies, but is not a digest.
    """

    path: PurePosixPath = attrs.field(converter=_path)
    size_bytes: int = attrs.field(validator=_size)
    sha256: str | None = attrs.field(default=None, validator=optional(matches_re(_SHA256)))
    token: str | None = attrs.field(default=None, validator=optional(_text))


@attrs.frozen(kw_only=True)
class Holder:
    """
    Who writes or reads: enough for a person to find the pod, and for a neighbour in the same PID namespace to know it is dead.

    `started` is the process's start time in clock ticks since boot, so that a reused PID is told apart.
    """

    pod: str = attrs.field(validator=_text)
    node: str = attrs.field(validator=_text)
    uid: int = attrs.field(validator=_integer)
    pid: int = attrs.field(validator=_integer)
    boot_id: str = attrs.field(validator=_text)
    pid_namespace: str = attrs.field(validator=_text)
    started: int = attrs.field(validator=_integer)

    def __str__(self) -> str:
        return f"pod {self.pod} on {self.node} (uid {self.uid}, pid {self.pid})"


def _holder(value: Holder | Mapping[str, Any]) -> Holder:
    return value if isinstance(value, Holder) else _build(Holder, value)


@attrs.frozen(kw_only=True)
class StoreSettings:
    """
    What every process that uses a store must agree on; written once, when the store is created.
    """

    store_id: str = attrs.field(validator=matches_re(r"[0-9a-f]{32}"))
    locker: str = attrs.field(validator=_text)
    lease_seconds: float = attrs.field(converter=_seconds, validator=and_(ge(MIN_LEASE_SECONDS), le(MAX_LEASE_SECONDS)))
    created_at: datetime = attrs.field(converter=_datetime)


@attrs.frozen(kw_only=True)
class LogEntry:
    """
    One numbered step in the life of a model: complete from here on, gone from here on, or complete again.

    A `commit` or `restore` names the generation that is the model; a `tombstone` says that there is none.
    `digest` is the kind of digest every byte was checked into, `policy` the verdict the model was admitted with.
    """

    type: Literal["commit", "restore", "tombstone"] = attrs.field(validator=matches_re("commit|restore|tombstone"))
    seq: int = attrs.field(validator=_number)
    key: str = attrs.field(validator=matches_re(KEY))
    uri: str = attrs.field(validator=_text)
    revision: str | None = attrs.field(validator=optional(_text))
    allow_patterns: tuple[str, ...] | None = attrs.field(converter=_tuple, validator=optional(_texts))
    ignore_patterns: tuple[str, ...] = attrs.field(converter=_tuple, validator=_texts)
    generation: str = attrs.field(validator=matches_re(GENERATION))
    version: str = attrs.field(validator=_text)
    files: int = attrs.field(validator=_size)
    size_bytes: int = attrs.field(validator=_size)
    manifest_sha256: str = attrs.field(validator=matches_re(_SHA256))
    digest: Literal["sha256"] = attrs.field(validator=matches_re("sha256"))
    policy: Literal["allow"] = attrs.field(validator=matches_re("allow"))
    created_at: datetime = attrs.field(converter=_datetime)
    writer: Holder = attrs.field(converter=_holder)

    @property
    def is_present(self) -> bool:
        return self.type != "tombstone"

    @property
    def name(self) -> str:
        return f"{self.seq:012d}.{self.type}"


def _files(value: Any) -> tuple[FileEntry, ...]:
    if not isinstance(value, list | tuple):
        raise TypeError("`files` must be a list")
    return tuple(f if isinstance(f, FileEntry) else _build(FileEntry, f) for f in value)


@attrs.frozen(kw_only=True)
class Manifest:
    """
    Every file of one generation, in the order of their paths.
    """

    key: str = attrs.field(validator=matches_re(KEY))
    generation: str = attrs.field(validator=matches_re(GENERATION))
    version: str = attrs.field(validator=_text)
    files: tuple[FileEntry, ...] = attrs.field(converter=_files)

    def __attrs_post_init__(self) -> None:
        check_collisions(f.path for f in self.files)

    @property
    def size_bytes(self) -> int:
        return sum(f.size_bytes for f in self.files)


@attrs.frozen(kw_only=True)
class Record:
    """
    What a store knows about a model it holds: where it came from and what it consists of.
    """

    uri: str
    revision: str | None
    allow_patterns: tuple[str, ...] | None
    ignore_patterns: tuple[str, ...]
    key: str
    version: str
    generation: str
    files: tuple[FileEntry, ...]
    size_bytes: int
    created_at: datetime
    writer: Holder


@attrs.frozen(kw_only=True)
class Claim:
    """
    The wish of one process to download a model; the highest number is the current one.
    """

    epoch: int = attrs.field(validator=_number)
    nonce: str = attrs.field(validator=matches_re(r"[0-9a-f]{32}"))
    uri: str = attrs.field(validator=_text)
    holder: Holder = attrs.field(converter=_holder)
    claimed_at: datetime = attrs.field(converter=_datetime)

    @property
    def generation(self) -> str:
        return f"{self.epoch:012d}-{self.nonce}"


@attrs.frozen(kw_only=True)
class Beat:
    """
    The sign of life of a claim's holder or of a reader. What counts is that it changed, never when it says it did.
    """

    count: int = attrs.field(validator=_size)
    released: bool = attrs.field(default=False, validator=instance_of(bool))
    bytes_done: int = attrs.field(default=0, validator=_size)
    bytes_total: int = attrs.field(default=0, validator=_size)
    bytes_per_second: int = attrs.field(default=0, validator=_size)


@attrs.frozen(kw_only=True)
class ReaderLease:
    """
    A reader's request not to delete a generation while it lives.
    """

    generation: str = attrs.field(validator=matches_re(GENERATION))
    holder: Holder = attrs.field(converter=_holder)


@attrs.frozen(kw_only=True)
class PartNote:
    """
    One line of a journal: so far, `path` holds `stop` bytes whose digest is `sha256`, and they are on the volume.
    """

    path: PurePosixPath = attrs.field(converter=_path)
    token: str = attrs.field(validator=_text)
    stop: int = attrs.field(validator=_size)
    sha256: str = attrs.field(validator=matches_re(_SHA256))


@attrs.frozen(kw_only=True)
class FoundFile:
    """
    What lies in a model's directory. `is_regular` is False for links, devices, pipes and sockets.
    """

    path: PurePosixPath
    size_bytes: int
    is_regular: bool


def now() -> datetime:
    """
    The wall clock, for people to read. Nothing is decided by it.
    """
    return datetime.now(UTC)


def encode(record: attrs.AttrsInstance) -> bytes:
    """
    Write a record down, with its format number and checksum.
    """
    body = {"format": FORMAT, **attrs.asdict(record, value_serializer=_plain)}
    return _canonical({**body, "checksum": hashlib.sha256(_canonical(body)).hexdigest()}) + b"\n"


def encode_beat(beat: Beat) -> bytes:
    """
    Write a beat down in exactly `BEAT_BYTES`, so that it is replaced in place by a single write.
    """
    return encode(beat).rstrip(b"\n").ljust(BEAT_BYTES - 1) + b"\n"


def decode(cls: type[_T], data: bytes, where: str) -> _T:
    """
    Read a record back, believing nothing.

    Args:
        where: The file it was read from, for the message.

    Raises:
        StoreFormatError: It is damaged, forged, or from a newer version.
    """
    body = _parse(data, where)
    version = body.pop("format", None)
    _check_format(version, where)
    checksum = body.pop("checksum", None)
    if checksum != hashlib.sha256(_canonical({"format": FORMAT, **body})).hexdigest():
        raise StoreFormatError(where, "its checksum does not match, so it was cut short or changed")
    try:
        return _build(cls, body)
    except (TypeError, ValueError, UnsafePathError) as error:
        raise StoreFormatError(where, f"it is not a valid {cls.__name__}: {_short(error)}") from error


def encode_settings(settings: StoreSettings) -> bytes:
    """
    Write a store's settings as plain JSON, which people read and back up.
    """
    return (json.dumps({"format": FORMAT, **attrs.asdict(settings, value_serializer=_plain)}, indent=2) + "\n").encode()


def decode_settings(data: bytes, where: str) -> StoreSettings:
    """
    Read a store's settings.

    Raises:
        StoreFormatError: They are damaged, or the store was made by a newer version.
    """
    body = _parse(data, where)
    version = body.pop("format", None)
    _check_format(version, where)
    try:
        return _build(StoreSettings, body)
    except (TypeError, ValueError) as error:
        raise StoreFormatError(where, f"these are not valid store settings: {_short(error)}") from error


def _check_format(version: object, where: str) -> None:
    if type(version) is int and version > FORMAT:
        raise StoreFormatError(where, f"it has format {version} and this version reads up to {FORMAT}; upgrade kserve_pvc")
    if type(version) is not int or version != FORMAT:
        raise StoreFormatError(where, "it has no valid format number, so it does not belong to a store")


def _short(error: Exception) -> str:
    # Validators append the whole field and value to their message.
    text = str(error.args[0] if error.args and not isinstance(error, UnsafePathError) else error)
    return text if len(text) <= 200 else text[:200] + "..."


def _plain(_: object, __: object, value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value) if isinstance(value, PurePosixPath) else value


def _canonical(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def _parse(data: bytes, where: str) -> dict[str, Any]:
    try:
        body = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise StoreFormatError(where, f"it is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise StoreFormatError(where, "it is not a JSON object")
    return body


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    body = dict(pairs)
    if len(body) != len(pairs):
        raise ValueError("a field is there twice")
    return body


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _build(cls: Callable[..., _T], body: Mapping[str, Any]) -> _T:
    if not isinstance(body, Mapping):
        raise TypeError("a nested record is not an object")
    return cls(**body)
