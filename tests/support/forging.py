"""
What may stand where a record of a store belongs: forged, cut short, foreign, or no file at all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Forgery = Callable[[Path, bytes], None]
ABSENT = object()


def signed(body: dict[str, Any]) -> bytes:
    """
    A record with a checksum that is right, whatever the record says.
    """
    rest = {name: value for name, value in body.items() if name != "checksum"}
    return _compact({**rest, "checksum": hashlib.sha256(_compact(rest)).hexdigest()}) + b"\n"


def _compact(body: dict[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def edited(**changes: Any) -> Forgery:
    """
    The good record with some fields changed, or taken away if ABSENT, and a checksum that is right.
    """

    def forge(path: Path, good: bytes) -> None:
        body = {**json.loads(good), **changes}
        path.write_bytes(signed({name: value for name, value in body.items() if value is not ABSENT}))

    return forge


def holding(data: bytes | Callable[[bytes], bytes]) -> Forgery:
    """
    A file with these bytes, or with what is made of the good ones.
    """

    def forge(path: Path, good: bytes) -> None:
        path.write_bytes(data(good) if callable(data) else data)

    return forge


def huge(path: Path, good: bytes) -> None:
    path.write_bytes(good)
    os.truncate(path, 2**40)


def pipe(path: Path, good: bytes) -> None:
    os.mkfifo(path)


def directory(path: Path, good: bytes) -> None:
    path.mkdir()


def link(path: Path, good: bytes) -> None:
    """A link to a good copy outside."""
    copy = outside(path) / "copy"
    copy.write_bytes(good)
    path.symlink_to(copy)


def dangling_link(path: Path, good: bytes) -> None:
    path.symlink_to(outside(path) / "not-there")


def outside(path: Path) -> Path:
    """The directory `outside` beside the volume that a path lies on."""
    return next(parent / "outside" for parent in path.parents if (parent / "outside").is_dir())


# What is wrong whatever the file should be.
DEBRIS: dict[str, Forgery] = {
    "empty": holding(b""),
    "truncated": holding(lambda good: good[: len(good) // 2]),
    "flipped": holding(lambda good: good.replace(b'"checksum":"', b'"checksum":"0', 1)),
    "binary": holding(bytes(range(256))),
    "foreign": holding(b'{"apiVersion": "v1", "kind": "Pod"}'),
    "list": holding(b"[]"),
    "deep": holding(b"[" * 50_000),
    "huge": huge,
    "pipe": pipe,
    "directory": directory,
    "link": link,
    "dangling link": dangling_link,
}
