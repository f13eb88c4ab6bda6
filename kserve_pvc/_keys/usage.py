"""
What a store occupies: complete models, what unfinished downloads left, damage, and the trash.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import PurePosixPath

import attrs

from kserve_pvc._format import layout
from kserve_pvc._keys.log import LogView
from kserve_pvc._keys.naming import ref_of_key
from kserve_pvc._volume.beneath import walk_beneath
from kserve_pvc._volume.reading import Volume
from kserve_pvc.errors import StoreError


@attrs.frozen(kw_only=True)
class KeyUsage:
    """
    What one key occupies.

    Args:
        uri: The source; None if only damaged records speak of it.
        size_bytes: The size of the model, 0 if none is present.
        unfinished_bytes: What downloads that have not ended, or ended too early, occupy in the volume. The next
            download of the model continues from there.
        damage: Why the newest record cannot be trusted, if so. Such a model counts as absent.
    """

    key: str
    uri: str | None
    size_bytes: int
    unfinished_bytes: int
    damage: str | None


@attrs.frozen(kw_only=True)
class Usage:
    """
    What a store occupies, by key, and what is free.
    """

    keys: tuple[KeyUsage, ...]
    trash_bytes: int
    free_bytes: int


def measure(volume: Volume, views: Iterable[tuple[str, LogView]]) -> Usage:
    """
    Measure every key that has a model, damage or leftovers. Only what is unfinished, or in the trash, is walked.
    """
    journals = {name for name in volume.list_names(layout.STAGING) if layout.parse_generation(name)}
    keys = []
    for key, view in views:
        unfinished = _unfinished_bytes(volume, key, view, journals) if journals else 0
        if view.present is None and view.damage is None and not unfinished:
            continue
        ref = ref_of_key(volume, key) if view.entry is None else None
        usage = KeyUsage(
            key=key,
            uri=view.entry.uri if view.entry else ref.uri if ref else None,
            size_bytes=view.present.size_bytes if view.present else 0,
            unfinished_bytes=unfinished,
            damage=None if view.damage is None else view.damage.reason,
        )
        keys.append(usage)
    return Usage(keys=tuple(keys), trash_bytes=_occupied(volume, layout.TRASH), free_bytes=volume.free_bytes())


def _unfinished_bytes(volume: Volume, key: str, view: LogView, journals: set[str]) -> int:
    published = view.present.generation if view.present else None
    with suppress(StoreError):
        names = [name for name in volume.list_names(layout.MODELS / key) if name in journals and name != published]
        return sum(_occupied(volume, layout.generation_dir(key, name)) for name in names)
    return 0


def _occupied(volume: Volume, place: PurePosixPath) -> int:
    """The bytes of the blocks below a directory. A file with several names belongs to a complete model too."""
    with suppress(OSError, StoreError):
        fd = volume.open_directory(place)
        try:
            return sum(found.st_blocks * 512 for _, found in walk_beneath(fd) if found.st_nlink == 1)
        finally:
            os.close(fd)
    return 0
