"""
What this volume holds already of a requested model: complete files of other generations, and what dead writers left.

Nothing of it is trusted. A token selects it, and a digest proves it when it is taken over.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import attrs

from kserve_pvc._format import layout
from kserve_pvc._format.codec import KEY, MAX_RECORD_BYTES
from kserve_pvc._format.records import LogEntry, PartNote, decode
from kserve_pvc._keys.log import read_log, read_manifest
from kserve_pvc._source.contract import RemoteFile, Resolved
from kserve_pvc._source.ref import ModelRef
from kserve_pvc._volume.calls import list_large
from kserve_pvc._volume.reading import Volume
from kserve_pvc._volume.tree import Tree
from kserve_pvc.errors import StoreFormatError, VolumeError

if TYPE_CHECKING:
    from kserve_pvc._download.adoption import Donor

_MAX_JOURNAL_BYTES = 64 * 1024 * 1024
# How many other models whose keys look alike are looked at, to find some of the same source.
_MOST_ALIKE = 4


@attrs.frozen
class Found:
    """
    A file of another generation, and the notes about its content.
    """

    volume: Volume
    place: PurePosixPath
    notes: tuple[PartNote, ...]

    def donor(self, tree: Tree) -> Donor:
        """
        Offer the file to a transfer that writes into a tree.
        """
        from kserve_pvc._download.adoption import Donor

        return Donor(
            notes=self.notes,
            open_file=partial(self.volume.open_file, self.place),
            link=lambda path: tree.link(self.place, path),
        )

    def has_all(self, file: RemoteFile) -> bool:
        """
        Whether a note covers all of a file at the source, which then gets a second name.
        """
        return any(
            n.sha256 is not None and n.is_durable and n.token == file.entry.token and n.stop == file.entry.size_bytes
            for n in self.notes
        )


def find_donors(
    volume: Volume, ref: ModelRef, *, own: str = "", with_complete: bool = True, spoiled: Collection[str] = ()
) -> Mapping[PurePosixPath, Sequence[Found]]:
    """
    Find files that may already hold what is requested: complete ones of the same source first, then what dead writers
    left, the newest attempt first.

    Args:
        own: The generation that is being written.
        with_complete: False for a download that is forced, as its caller doubts what is there.
        spoiled: Generations that this process saw the volume fail on. Nothing of them counts as durable.
    """
    donors: dict[PurePosixPath, list[Found]] = defaultdict(list)
    for key in _keys_of_source(volume, ref) if with_complete else ():
        with suppress(StoreFormatError, VolumeError):
            entry = read_log(volume, key).entry
            if entry is None or not entry.is_present or entry.uri != ref.uri:
                continue
            for file in read_manifest(volume, entry).files:
                if file.sha256 is not None and file.token is not None:
                    note = PartNote(
                        path=file.path, token=file.token, stop=file.size_bytes, sha256=file.sha256, is_durable=True
                    )
                    donors[file.path].append(
                        Found(volume, layout.generation_dir(key, entry.generation) / file.path, (note,))
                    )
    for generation in _unfinished(volume, ref.key):
        if generation == own:
            continue
        is_spoiled = generation in spoiled or _is_marked_spoiled(volume, generation)
        for path, found in _read_journal(volume, generation).items():
            notes = tuple(attrs.evolve(note, is_durable=False) for note in found) if is_spoiled else tuple(found)
            donors[path].append(Found(volume, layout.generation_dir(ref.key, generation) / path, notes))
    return donors


def _keys_of_source(volume: Volume, ref: ModelRef) -> Sequence[str]:
    """
    The keys that may hold a model of the same source, by their names only: that of this model, that of the plain URI,
    and a few that other patterns or revisions may have made.
    """
    plain = attrs.evolve(ref, revision=None, allow_patterns=None, ignore_patterns=())
    # They begin with the same words, as do models of other sources: reading all of these would take as long as there
    # are models.
    slug = ref.key.rpartition("-")[0]
    named = (key for key in volume.list_names(layout.KEYS, list_large) if KEY.fullmatch(key))
    alike = (key for key in named if key.rpartition("-")[0] == slug and key not in (ref.key, plain.key))
    others = [key for key in islice(alike, _MOST_ALIKE) if _began_with(volume, key, ref.uri)]
    return [*dict.fromkeys((ref.key, plain.key)), *others]


def _began_with(volume: Volume, key: str, uri: str) -> bool:
    """Whether the first record of a key is a model of this source, which costs less than to find the newest one."""
    place = layout.record_file(key, f"{1:012d}.commit")
    with suppress(StoreFormatError, VolumeError):
        data = volume.read(place, MAX_RECORD_BYTES)
        return data is not None and decode(LogEntry, data, str(place)).uri == uri
    return False


def _unfinished(volume: Volume, key: str) -> Sequence[str]:
    """The generations of a key that have a journal, the newest first. Those of complete models have none."""
    found = [name for name in volume.list_names(layout.MODELS / key, list_large) if layout.parse_generation(name)]
    journals = set(volume.list_names(layout.STAGING, list_large)) if found else set()
    return [name for name in reversed(found) if name in journals]


def shared_bytes(donors: Mapping[PurePosixPath, Sequence[Found]], resolved: Resolved) -> int:
    """
    Return how many bytes of a model are in complete files of other generations, so that hard links are enough.
    """
    return sum(f.entry.size_bytes for f in resolved.files if any(d.has_all(f) for d in donors.get(f.entry.path, ())))


def reusable_bytes(donors: Mapping[PurePosixPath, Sequence[Found]], resolved: Resolved) -> int:
    """
    Return how many bytes of a model need not be fetched, if all that is offered proves itself.
    """
    if not donors:
        return 0  # The usual case, and a model may have many files.
    total = 0
    for file in resolved.files:
        notes = [note for found in donors.get(file.entry.path, ()) for note in found.notes]
        ranges = sorted(
            (n.start, n.stop) for n in notes if n.token == file.entry.token and n.stop <= file.entry.size_bytes
        )
        end = 0
        for start, stop in ranges:
            total += max(0, stop - max(start, end))
            end = max(end, stop)
    return total


def _is_marked_spoiled(volume: Volume, generation: str) -> bool:
    marker = layout.spoiled_file(generation)
    return marker.name in volume.list_names(marker.parent)


def _read_journal(volume: Volume, generation: str) -> dict[PurePosixPath, list[PartNote]]:
    place = layout.journal_file(generation)
    notes: dict[PurePosixPath, list[PartNote]] = defaultdict(list)
    with suppress(StoreFormatError, VolumeError):
        for line in (volume.read(place, _MAX_JOURNAL_BYTES) or b"").splitlines():
            # The first line that is invalid is the torn end of a killed writer, or forged: nothing after it counts.
            note = decode(PartNote, line, str(place))
            if not note.stop:
                notes[note.path].clear()  # What was noted of the file before was taken back.
            notes[note.path].append(note)
    return notes
