"""
Names under which a pod can mount a model: links on the volume, which the store itself never follows.

`models/<16 hex digits>` is where KServe looks for a URI in a volume. It leads to the generation that is current, and is
put in place after every commit and removal. `names/<name>` leads to that link, so it is never moved again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress

from kserve_pvc._format import layout
from kserve_pvc._format.codec import KEY
from kserve_pvc._keys.log import read_log
from kserve_pvc._volume.reading import Volume
from kserve_pvc._volume.writing import VolumeWriter
from kserve_pvc.errors import StoreError, UnsafePathError, VolumeError

# As long as a label may be, in letters that stand in every URI and every YAML file as they are.
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", re.ASCII)
_TARGET = re.compile(r"\.\./models/([0-9a-f]{16})")
_MOST_LOOKS = 5


def check_alias(name: str) -> str:
    """
    Raises:
        UnsafePathError: The name cannot be part of a URI and a path.
    """
    if not _NAME.fullmatch(name):
        rule = "an alias has 1 to 63 letters, digits, `-`, `_` and `.`, and begins and ends with a letter or digit"
        raise UnsafePathError(name, rule)
    return name


def settle_view(writer: VolumeWriter, key: str) -> bool:
    """
    Point KServe's name for a model to its current generation, or to nothing if it is absent.

    It is looked again afterwards, since another writer may have published meanwhile: the last process to move the
    link has seen the newest record before or after.

    Returns:
        False if a foreign file has that name, or the volume has no links.
    """
    place = layout.view_link(key)
    for _ in range(_MOST_LOOKS):
        target = _target_of(writer, key)
        found = writer.link_target(place)
        if found == target:
            return True
        if target is not None:
            if not writer.repoint(place, target):
                return False
        elif found is not None and found.startswith(f"{key}/"):
            writer.throw_away(place)
        else:
            return False
    return True


def settle_view_quietly(writer: VolumeWriter, key: str) -> None:
    """
    As `settle_view`. A link that could not be moved does not fail a call that has succeeded.
    """
    with suppress(OSError, StoreError):
        settle_view(writer, key)


def point_alias(writer: VolumeWriter, name: str, key: str) -> None:
    """
    Point a name to a model that is present.

    Raises:
        VolumeError: Something other than a link has that name, or the volume has no links.
    """
    view, place = layout.view_link(key), layout.name_link(name)
    if not settle_view(writer, key) or not writer.repoint(place, f"../{view}"):
        reason = f"it or `{view}` is not a link, or the volume has no symbolic links"
        raise VolumeError(str(writer.absolute(place)), "naming a model", reason, "choose another name, or remove it")


def drop_alias(writer: VolumeWriter, name: str) -> None:
    """
    Remove a name. Anything but a link stays.
    """
    place = layout.name_link(name)
    if writer.link_target(place) is not None:
        writer.throw_away(place)


def read_aliases(volume: Volume) -> Mapping[str, str]:
    """
    The names that lead to a key of this store, each with that key, whether the model is present or not.
    """
    keys = {layout.view_link(key).name: key for key in volume.list_names(layout.KEYS) if KEY.fullmatch(key)}
    found: dict[str, str] = {}
    for name in sorted(volume.list_names(layout.NAMES)):
        match = _TARGET.fullmatch(volume.link_target(layout.name_link(name)) or "")
        if match and match[1] in keys and _NAME.fullmatch(name):
            found[name] = keys[match[1]]
    return found


def _target_of(volume: Volume, key: str) -> str | None:
    entry = read_log(volume, key).entry
    return f"{key}/{entry.generation}" if entry is not None and entry.is_present else None
