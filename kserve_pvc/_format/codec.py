"""
How the small files of a store are encoded, and decoded as untrusted input.

Every record is one JSON object with the format number and a checksum over all other fields. Whatever is read back
is untrusted input: other tenants, older and newer versions and broken volumes all write there. Decoding is strict:
an unknown field, a wrong type, a name that would leave its place or a failing checksum makes the record unusable.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any, NoReturn, TypeVar

import attrs
from attrs.validators import and_, ge, instance_of, lt

from kserve_pvc.errors import StoreFormatError, UnsafePathError

FORMAT = 1

MAX_RECORD_BYTES = 64 * 1024

KEY = re.compile(r"[a-z0-9._-]{1,40}-[0-9a-f]{16}")
GENERATION = re.compile(r"[0-9]{12}-[0-9a-f]{32}")
SHA256 = re.compile(r"[0-9a-f]{64}")

# A field of this kind is written only if it differs from its default.
OMITTED = {"omitted": True}

_T = TypeVar("_T")


def integer(_: object, field: attrs.Attribute[Any], value: object) -> None:
    # JSON knows numbers of any length, and Python takes a truth value for one.
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise TypeError(f"`{field.name}` must be an integer of 64 bits")


def strings(_: object, field: attrs.Attribute[Any], value: Iterable[object]) -> None:
    if not isinstance(value, tuple) or not all(isinstance(item, str) for item in value):
        raise TypeError(f"`{field.name}` must be a list of strings")


text = instance_of(str)
size = and_(integer, ge(0))
number = and_(integer, ge(1), lt(10**12))


def timestamp(value: str | datetime) -> datetime:
    """
    Convert what was written to a time, which has a zone.
    """
    found = value if isinstance(value, datetime) else datetime.fromisoformat(value)
    if found.tzinfo is None:
        raise ValueError("a time needs its zone")
    return found


def build(cls: Callable[..., _T], body: Mapping[str, Any]) -> _T:
    """
    Make a value of the fields that were read, nested ones included.
    """
    if not isinstance(body, Mapping):
        raise TypeError("a nested record is not an object")
    return cls(**body)


def encode(record: attrs.AttrsInstance) -> bytes:
    """
    Encode a record with its format number and checksum.
    """
    body = {"format": FORMAT, **_fields_of(record)}
    return _canonical({**body, "checksum": hashlib.sha256(_canonical(body)).hexdigest()}) + b"\n"


def decode(cls: type[_T], data: bytes, where: str) -> _T:
    """
    Decode a record as untrusted input.

    Args:
        where: The file it was read from, for the message.

    Raises:
        StoreFormatError: It is damaged, forged, or from a newer version.
    """
    body = _parse(data, where)
    checksum = body.pop("checksum", None)
    if checksum != hashlib.sha256(_canonical({"format": FORMAT, **body})).hexdigest():
        raise StoreFormatError(where, "its checksum does not match, so it was truncated or changed")
    return _valid(cls, body, where)


def decode_proven(cls: type[_T], data: bytes, where: str, *, part: Callable[[dict[str, Any]], object]) -> _T:
    """
    Decode a large record whose bytes were compared with a digest of them, so that its own checksum says nothing more.

    Args:
        part: Makes what an object of the record stands for, as soon as that is read, so that a list of many takes
            little memory. It returns what is none of its kind as it is.
    """

    def make(pairs: list[tuple[str, Any]]) -> object:
        body = _unique(pairs)
        try:
            return part(body)
        except (TypeError, ValueError, UnsafePathError) as error:
            raise StoreFormatError(where, f"it is not a valid {cls.__name__}: {_short(error)}") from error

    body = _parse(data, where, json.JSONDecoder(object_pairs_hook=make, parse_constant=_refuse_constant))
    body.pop("checksum", None)
    return _valid(cls, body, where)


def _valid(cls: type[_T], body: Mapping[str, Any], where: str) -> _T:
    try:
        return build(cls, body)
    except (TypeError, ValueError, UnsafePathError) as error:
        raise StoreFormatError(where, f"it is not a valid {cls.__name__}: {_short(error)}") from error


def encode_plain(value: attrs.AttrsInstance) -> bytes:
    """
    Encode a value as JSON that people read and edit, so without a checksum.
    """
    return (json.dumps({"format": FORMAT, **_fields_of(value)}, indent=2) + "\n").encode()


def decode_plain(cls: type[_T], data: bytes, where: str, *, what: str) -> _T:
    """
    Decode what `encode_plain` wrote.

    Raises:
        StoreFormatError: It is damaged, or from a newer version.
    """
    body = _parse(data, where)
    try:
        return build(cls, body)
    except (TypeError, ValueError) as error:
        raise StoreFormatError(where, f"these are not valid {what}: {_short(error)}") from error


def _parse(data: bytes, where: str, reader: json.JSONDecoder | None = None) -> dict[str, Any]:
    """Read the fields without their format number, which must be ours."""
    try:
        if len(data) > MAX_RECORD_BYTES:
            from kserve_pvc._format.json_size import check_size

            check_size(data)
        body = (reader or _READER).decode(data.decode())
    except StoreFormatError:
        raise  # A part of it is invalid.
    except (ValueError, RecursionError) as error:
        raise StoreFormatError(where, f"it is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise StoreFormatError(where, "it is not a JSON object")
    _check_format(body.pop("format", None), where)
    return body


def _check_format(version: object, where: str) -> None:
    if type(version) is int and version > FORMAT:
        raise StoreFormatError(
            where, f"it has format {version} and this version reads up to {FORMAT}; upgrade kserve_pvc"
        )
    if type(version) is not int or version != FORMAT:
        raise StoreFormatError(where, "it has no valid format number, so it does not belong to a store")


def _short(error: Exception) -> str:
    # Validators append the whole field and value to their message.
    message = str(error.args[0] if error.args and not isinstance(error, UnsafePathError) else error)
    return message if len(message) <= 200 else message[:200] + "..."


def _fields_of(record: attrs.AttrsInstance) -> dict[str, Any]:
    """As `attrs.asdict`, in a quarter of its time: a manifest may have 250,000 files."""
    fields = {}
    for name, default in _written(type(record)):
        value = getattr(record, name)
        if value != default:
            fields[name] = _plain(value)
    return fields


@lru_cache
def _written(cls: type[attrs.AttrsInstance]) -> Sequence[tuple[str, Any]]:
    """The fields of a class, each with the value that is left out."""
    return [(field.name, field.default if field.metadata == OMITTED else attrs.NOTHING) for field in attrs.fields(cls)]


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, PurePosixPath):
        return str(value)
    if isinstance(value, datetime):
        return value.isoformat()
    return [_plain(item) for item in value] if isinstance(value, tuple) else _fields_of(value)


def _canonical(body: Mapping[str, Any]) -> bytes:
    return _WRITER.encode(body).encode()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    body = dict(pairs)
    if len(body) != len(pairs):
        raise ValueError("a field is repeated")
    return body


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


# Made once, since `json.loads` and `json.dumps` make one for each call with such arguments.
_READER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)
_WRITER = json.JSONEncoder(sort_keys=True, separators=(",", ":"))
