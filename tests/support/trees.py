"""
Small models as files, and what is left of them on a volume.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from pathlib import Path


def model_files(seed: int, big: int = 700_000) -> dict[str, bytes]:
    """
    The files of a small model, different for each seed.
    """
    bits = random.Random(seed)
    return {
        "config.json": b'{"seed": %d}' % seed,
        "weights/a.bin": bits.randbytes(big),
        "weights/b.bin": bits.randbytes(1000),
        "empty": b"",
    }


def write_files(place: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def digests(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


def read_tree(place: Path) -> dict[str, bytes]:
    return {p.relative_to(place).as_posix(): p.read_bytes() for p in sorted(place.rglob("*")) if p.is_file()}


def listing(place: Path) -> dict[str, tuple[int, int, int]]:
    """
    Everything below a directory with inode, size and modification time, to show that nothing was touched.
    """
    found = {}
    for path in [place, *place.rglob("*")]:
        status = path.lstat()
        found[str(path.relative_to(place))] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return found
