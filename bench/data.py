"""
The models that are downloaded, made once per run: bytes that look random, so that nobody profits from pages of zeros.

Only those of the memory workload are mostly zeros, as its origin has to hold more than there is memory.
"""

from __future__ import annotations

import hashlib
import os
import random
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BUCKET = "bench"
ARCHIVE = "model.tar"
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
_BLOCKS = 16
_STAMP_BYTES = 8
_FIRST_TIME = 1_700_000_000
_SMALL = {
    "README.md": 6_000,
    "LICENSE": 11_000,
    "config.json": 800,
    "generation_config.json": 200,
    "model.safetensors.index.json": 24_000,
    "special_tokens_map.json": 300,
    "tokenizer.json": 2_300_000,
    "tokenizer.model": 500_000,
    "tokenizer_config.json": 50_000,
    "vocab.json": 800_000,
    "merges.txt": 450_000,
    "chat_template.jinja": 5_000,
}


@dataclass(frozen=True, kw_only=True)
class Model:
    """
    One model at the origin: what must have arrived after a download.

    Attributes:
        prefix: The key below which its objects lie, in `BUCKET`.
        sizes: Bytes by name below the prefix.
        probe: The name of the file whose content is compared, and `probe_sha256` what it must be.
        is_stamped: Whether every MiB of every file says which it is.
        archive: The same files as one, of the name `ARCHIVE`, for sources that list nothing.
    """

    prefix: str
    sizes: dict[str, int]
    probe: str
    probe_sha256: str
    is_stamped: bool = True
    archive: Model | None = None

    @property
    def uri(self) -> str:
        return f"s3://{BUCKET}/{self.prefix}"

    @property
    def size_bytes(self) -> int:
        return sum(self.sizes.values())

    def check(self, directory: Path) -> str | None:
        """
        Compare what arrived: names and sizes, that every MiB of every file is in its place, and all bytes of one file.

        Returns:
            What is wrong, or None.
        """
        found = {str(path.relative_to(directory)): path.stat().st_size for path in _files(directory)}
        if found != self.sizes:
            expected = f"{len(self.sizes)} of {self.size_bytes}"
            return f"{len(found)} files of {sum(found.values())} bytes arrived instead of {expected}"
        for number, name in enumerate(self.sizes):
            if self.is_stamped and not _is_stamped(directory / name, number):
                return f"a part of `{name}` is missing or in another's place"
        return (
            None if _sha256(directory / self.probe) == self.probe_sha256 else f"`{self.probe}` arrived with other bytes"
        )


def shape(workload: str, *, quick: bool) -> dict[str, int]:
    """
    The files of a workload by name, with their sizes in bytes.
    """
    large = GIB // 4 if quick else GIB
    match workload:
        case "w1":
            return {"model.safetensors": 4 * large}
        case "w2" | "w6" | "w7":
            return _SMALL | {f"model-{i:05}-of-00004.safetensors": large for i in range(1, 5)}
        case "w3":
            return {f"part-{i:05}.bin": 64 * KIB for i in range(2_000)}
        case "w4":
            return {f"layer-{i // 100:03}/tensor-{i:05}.bin": 1 * KIB for i in range(10_000)}
        case "w5":
            return _SMALL | {f"model-{i:05}-of-00004.safetensors": 1 * MIB for i in range(1, 5)}
        case "w9":
            return _SMALL | {f"model-{i:05}-of-00002.safetensors": large for i in (1, 2)}
        case "w8-1" | "w8-4" | "w8-16":
            quarter = int(workload.removeprefix("w8-")) * large // 4
            return _SMALL | {f"model-{i:05}-of-00004.safetensors": quarter for i in range(1, 5)}
    raise ValueError(f"there is no workload `{workload}`")


def parts(workload: str) -> list[str]:
    """
    The models of a workload, by the names that `shape` and `make` know; all but `w8` have one, of the same name.
    """
    return [f"w8-{size}" for size in (1, 4, 16)] if workload == "w8" else [workload]


def make(root: Path, workload: str, *, quick: bool = False) -> Model:
    """
    Write the files of a workload below `root/BUCKET/<workload>`.

    Those of `w8` are sparse: every MiB begins with its stamp, and the rest is a hole, which in memory takes no room.
    Those of `w9` come as an archive too, below `root/BUCKET/w9-archive`.
    """
    sizes = shape(workload, quick=quick)
    for number, (name, size) in enumerate(sizes.items()):
        path = root / BUCKET / workload / name
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, size, number, sparse=workload.startswith("w8") and size > GIB // 8)
        # An ETag is made of time and size here, and no two objects may have the same.
        os.utime(path, (_FIRST_TIME + number, _FIRST_TIME + number))
    probe = "tokenizer.json" if workload.startswith("w8") else max(sizes, key=lambda name: sizes[name])
    archive = _pack(root / BUCKET / workload, root / BUCKET / f"{workload}-archive") if workload == "w9" else None
    digest = _sha256(root / BUCKET / workload / probe)
    return Model(prefix=workload, sizes=sizes, probe=probe, probe_sha256=digest, archive=archive)


def _pack(source: Path, directory: Path) -> Model:
    directory.mkdir()
    place = directory / ARCHIVE
    with tarfile.open(place, "w") as archive:
        for path in sorted(source.iterdir()):
            archive.add(path, path.name)
    os.utime(place, (_FIRST_TIME, _FIRST_TIME))
    sizes = {ARCHIVE: place.stat().st_size}
    return Model(
        prefix=f"{directory.name}/{ARCHIVE}", sizes=sizes, probe=ARCHIVE, probe_sha256=_sha256(place), is_stamped=False
    )


def _write(path: Path, size: int, number: int, *, sparse: bool) -> None:
    """Write one random block repeatedly; each copy is stamped with the file's number and offset, so that all differ."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        os.truncate(descriptor, size)
        for start in range(0, size, MIB):
            length = min(MIB, size - start)
            rest = [] if sparse else [_BLOCK[(start // MIB) % _BLOCKS][_STAMP_BYTES:length]]
            os.pwritev(descriptor, [_stamp(number, start)[:length], *rest], start)
    finally:
        os.close(descriptor)


def _stamp(number: int, start: int) -> bytes:
    return (number + 1).to_bytes(4, "big") + (start // MIB).to_bytes(4, "big")


def _is_stamped(path: Path, number: int) -> bool:
    size = path.stat().st_size
    with path.open("rb", buffering=0) as file:
        return all(
            os.pread(file.fileno(), _STAMP_BYTES, start) == _stamp(number, start)[: size - start]
            for start in range(0, size, MIB)
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_BLOCK = [memoryview(random.Random(number).randbytes(MIB)) for number in range(_BLOCKS)]


def _files(directory: Path) -> Iterator[Path]:
    for path in directory.rglob("*"):
        # huggingface_hub keeps notes of its own below its destination.
        if path.is_file() and ".cache" not in path.parts[len(directory.parts) :]:
            yield path
