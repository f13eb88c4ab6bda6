"""
Which model a key, a name or a directory of the store means: whatever the store itself prints is understood.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import PurePath, PurePosixPath

from kserve_pvc._format import layout
from kserve_pvc._format.codec import KEY, MAX_RECORD_BYTES
from kserve_pvc._format.log_entry import LogEntry
from kserve_pvc._format.records import Claim, decode
from kserve_pvc._keys.aliases import read_aliases
from kserve_pvc._keys.claims import read_claim
from kserve_pvc._source.ref import ModelRef
from kserve_pvc._volume.reading import Volume
from kserve_pvc.errors import StoreError


def find_ref(volume: Volume, name: str) -> ModelRef | None:
    """
    Find the model that is meant by a key, its last 16 hex digits, an alias, or a path of the store below `models/` or
    `names/`.

    Returns:
        None if it means no model that the store knows, or only damaged records speak of it.
    """
    place = PurePath(name)
    if place.is_absolute():
        if not place.is_relative_to(volume.root):
            return None
        parts = place.relative_to(volume.root).parts
        if len(parts) < 2 or PurePosixPath(parts[0]) not in (layout.MODELS, layout.NAMES):
            return None
        name = parts[1]
    key = _find_key(volume, name)
    return None if key is None else ref_of_key(volume, key)


def _find_key(volume: Volume, name: str) -> str | None:
    keys = [key for key in volume.list_names(layout.KEYS) if KEY.fullmatch(key)]
    return next((key for key in keys if name in (key, layout.view_link(key).name)), read_aliases(volume).get(name))


def ref_of_key(volume: Volume, key: str) -> ModelRef | None:
    """
    Return what the newest undamaged record of a key speaks of, or the claim of a download that has published nothing.
    """
    for name in reversed(volume.list_names(layout.log_dir(key))):
        with suppress(StoreError):
            place = layout.record_file(key, name)
            data = volume.read(place, MAX_RECORD_BYTES)
            if data is not None and (ref := _named_by(decode(LogEntry, data, str(place)), key)) is not None:
                return ref
    with suppress(StoreError):
        sign = read_claim(volume, key)
        if sign is not None and isinstance(sign.owner, Claim):
            ref = ModelRef(uri=sign.owner.uri)
            return ref if ref.key == key else None
    return None


def _named_by(entry: LogEntry, key: str) -> ModelRef | None:
    ref = ModelRef(
        uri=entry.uri,
        revision=entry.revision,
        allow_patterns=entry.allow_patterns,
        ignore_patterns=entry.ignore_patterns,
    )
    return ref if ref.key == key else None
