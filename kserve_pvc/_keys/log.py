"""
The numbered log of one key, which alone decides whether a model is present.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from functools import lru_cache
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import attrs

from kserve_pvc._format.codec import MAX_RECORD_BYTES, decode
from kserve_pvc._format.layout import generation_dir, journal_file, log_dir, manifest_file, parse_log_name, record_file
from kserve_pvc._format.log_entry import LogEntry
from kserve_pvc._source.ref import ModelRef
from kserve_pvc._volume.reading import Volume
from kserve_pvc.errors import StoreFormatError, UnsafePathError

if TYPE_CHECKING:
    from kserve_pvc._format.records import Manifest

_REREADS = 3
_REREAD_PAUSE = 0.05
# More than one file takes in a manifest, with the longest name in escapes, and more than what surrounds them.
_MANIFEST_BYTES = 8 * 1024


@attrs.frozen(kw_only=True)
class LogView:
    """
    The newest record of a log. `seq` is 0 for an empty log; `damage` is why the newest record is not an `entry`.
    """

    seq: int = 0
    entry: LogEntry | None = None
    damage: StoreFormatError | None = None

    @property
    def is_present(self) -> bool:
        return self.present is not None

    @property
    def present(self) -> LogEntry | None:
        """
        The record of a model that is present.
        """
        return self.entry if self.entry is not None and self.entry.is_present else None


def read_log(volume: Volume, key: str, *, may_pause: bool = True) -> LogView:
    """
    Read the newest record of a key: one listing and one small read. Waits for no lock and writes nothing.

    Args:
        may_pause: Whether a damaged record is read again after a pause, as it may be half written.
    """
    view = LogView()
    for attempt in range(_REREADS if may_pause else 1):
        if attempt:
            # A record that was created in place may be seen half written; one that was linked never is.
            time.sleep(_REREAD_PAUSE)
        view = _read_newest(volume, key)
        if view.damage is None:
            break
    return view


def read_model(volume: Volume, key: str, *, may_pause: bool = True) -> LogView:
    """
    As `read_log`. A record of a model whose directory is a link, or lies below one, is damage: nothing of ours is.
    """
    view = read_log(volume, key, may_pause=may_pause)
    if view.present is None:
        return view
    place = generation_dir(key, view.present.generation)
    if volume.is_directory(place):
        return view
    return LogView(seq=view.seq, damage=StoreFormatError(str(place), "it is a link or a file, or lies below one"))


def read_log_of(volume: Volume, ref: ModelRef) -> LogView:
    """
    Read the newest record of a ref. A record that speaks of another model is damage, though it is whole.
    """
    view = read_model(volume, ref.key)
    entry = view.entry
    if entry is None or (entry.uri, entry.revision, entry.allow_patterns, entry.ignore_patterns) == (
        ref.uri,
        ref.revision,
        ref.allow_patterns,
        ref.ignore_patterns,
    ):
        return view
    place = log_dir(ref.key) / entry.name
    return LogView(seq=view.seq, damage=StoreFormatError(str(place), f"it speaks of `{entry.uri}`, not of `{ref}`"))


def _read_newest(volume: Volume, key: str) -> LogView:
    # Should one number have several records, every reader takes the same; a tombstone sorts last and is the safe one.
    for name in reversed(volume.list_names(log_dir(key))):
        if (seq := parse_log_name(name)) is not None:
            break
    else:
        return LogView()
    try:
        return LogView(seq=seq, entry=_read_entry(volume, key, record_file(key, name)))
    except StoreFormatError as damage:
        return LogView(seq=seq, damage=damage)


def _read_entry(volume: Volume, key: str, place: PurePosixPath) -> LogEntry:
    data = volume.read(place, MAX_RECORD_BYTES)
    if data is None:
        raise StoreFormatError(str(place), "it is listed, but cannot be opened")
    entry = _decoded(data, str(place))
    if entry.name != place.name or entry.key != key:
        raise StoreFormatError(str(place), "it belongs under another name, so it was moved or forged")
    return entry


@lru_cache(maxsize=256)
def _decoded(data: bytes, where: str) -> LogEntry:
    # The volume is read each time; equal bytes are decoded once. Damage is an exception, which is not cached.
    return decode(LogEntry, data, where)


def read_all(volume: Volume, key: str) -> list[LogEntry]:
    """
    Read every record of a key.

    Raises:
        StoreFormatError: One of them is damaged.
    """
    place = log_dir(key)
    return [
        _read_entry(volume, key, record_file(key, name))
        for name in volume.list_names(place)
        if parse_log_name(name) is not None
    ]


def find_named(volume: Volume, key: str, generations: Iterable[str]) -> set[str]:
    """
    Find which of these generations a record of the key names as a model. A tombstone may name one that is unfinished.

    The log is read from its end until all are found. A generation that has a journal and no manifest was never
    published, so no record is read for it: what a log held long ago costs nothing.

    Raises:
        StoreFormatError: A record that would have to be read is damaged.
    """
    named = set[str]()
    missing = {generation for generation in generations if not _is_unpublished(volume, generation)}
    for name in reversed(volume.list_names(log_dir(key))) if missing else ():
        if parse_log_name(name) is not None:
            entry = _read_entry(volume, key, record_file(key, name))
            if entry.is_present:
                named.add(entry.generation)
            if missing <= named:
                break
    return named


def _is_unpublished(volume: Volume, generation: str) -> bool:
    return not _may_exist(volume, manifest_file(generation)) and _may_exist(volume, journal_file(generation))


def _may_exist(volume: Volume, place: PurePosixPath) -> bool:
    try:
        # By its directory, which is opened: a name alone may be cached as missing.
        with volume.open_parent(place) as parent:
            os.close(os.open(place.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent))
    except FileNotFoundError:
        return False
    except (OSError, UnsafePathError):
        return True
    return True


def read_manifest(volume: Volume, entry: LogEntry) -> Manifest:
    """
    Read the manifest that a record names.

    Raises:
        StoreFormatError: It is missing, or its digest is not the one in the record.
    """
    from hashlib import sha256

    from kserve_pvc._format.codec import decode_proven
    from kserve_pvc._format.records import MAX_MANIFEST_BYTES, Manifest, to_file

    place = manifest_file(entry.generation)
    # A record that names few files does not lead to reading a huge manifest.
    data = volume.read(place, min(MAX_MANIFEST_BYTES, _MANIFEST_BYTES + entry.files * _MANIFEST_BYTES))
    if data is None:
        raise StoreFormatError(str(place), "it is missing; `verify` the model, or `rm` and `ensure` it again")
    if sha256(data).hexdigest() != entry.manifest_sha256:
        raise StoreFormatError(str(place), "it is not the manifest its record names, so it was changed")
    return decode_proven(Manifest, data, str(place), part=to_file)
