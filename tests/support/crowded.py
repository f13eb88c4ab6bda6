"""
Stores of very many models, and keys with very long logs, made without downloading them.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path, PurePosixPath

import attrs

from kserve_pvc import ModelStore
from kserve_pvc._format import layout
from kserve_pvc._format.records import FileEntry, LogEntry, Manifest, encode
from kserve_pvc._keys.log import read_log
from kserve_pvc._source.ref import parse_ref


def add_models(store: ModelStore, uri: str, count: int) -> None:
    """
    Add models to a store, each a copy of one that is present under a URI of its own.

    Args:
        uri: The model that is copied. The copies are named `<uri>-<number>`.
    """
    entry = read_log(store._volume, parse_ref(uri).key).entry
    assert entry is not None
    for number in range(count):
        ref = parse_ref(f"{uri}-{number:06}")
        copy = attrs.evolve(entry, uri=ref.uri, key=ref.key, generation=f"{1:012d}-{number:032x}")
        _write(store.root, copy)
        claim = store.root / layout.claim_dir(ref.key, 1)
        claim.mkdir(parents=True)
        for name in ("owner", "beat"):
            (claim / name).write_bytes((store.root / layout.claim_dir(entry.key, 1) / name).read_bytes())


def lengthen_log(store: ModelStore, uri: str, count: int, *, has_files: bool = True) -> None:
    """
    Add commits of other generations to the log of a model, all of which are there; or more commits of the one that is.
    """
    entry = read_log(store._volume, parse_ref(uri).key).entry
    assert entry is not None
    for number in range(2, count + 2):
        if has_files:
            _write(store.root, attrs.evolve(entry, seq=number, generation=f"{number:012d}-{number:032x}"))
        else:
            _append(store.root, attrs.evolve(entry, seq=number))


def _write(root: Path, entry: LogEntry) -> None:
    files = (FileEntry(path=PurePosixPath("model.bin"), size_bytes=1, sha256=sha256(b"x").hexdigest(), token="t"),)
    manifest = encode(Manifest(key=entry.key, generation=entry.generation, version=entry.version, files=files))
    entry = attrs.evolve(entry, manifest_sha256=sha256(manifest).hexdigest())
    place = root / layout.generation_dir(entry.key, entry.generation)
    place.mkdir(parents=True)
    (place / "model.bin").write_bytes(b"x")
    (root / layout.manifest_file(entry.generation)).write_bytes(manifest)
    _append(root, entry)


def _append(root: Path, entry: LogEntry) -> None:
    log = root / layout.log_dir(entry.key)
    log.mkdir(parents=True, exist_ok=True)
    (log / entry.name).write_bytes(encode(entry))
    (root / layout.slot_dir(entry.key) / f"{entry.seq:012d}").mkdir(parents=True)
