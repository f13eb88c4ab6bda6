"""
What this volume holds already of a requested model: complete files of other generations, and what dead writers left.

Nothing of it is trusted. A token selects it, and a digest proves it when it is taken over.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
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
from kserve_pvc.errors import StoreError, StoreFormatError, VolumeError

if TYPE_CHECKING:
    from kserve_pvc._download.adoption import Donor

# Of all journals that one download reads. A note takes some 300 bytes; what lies beyond is fetched again.
_MAX_JOURNAL_BYTES = 128 * 1024 * 1024
_PIECE_BYTES = 1024 * 1024
# How many unfinished generations of a model are read. There are no more of them, unless their writers are alive.
_MOST_LEFTOVERS = 4
# As the encoder of records writes a note.
_NOTED = re.compile(
    rb'"path":"([^"\\]*(?:\\.[^"\\]*)*)","sha256":[^,]*,(?:"start":([0-9]{1,18}),)?"stop":([0-9]{1,18})'
)
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
    room = _MAX_JOURNAL_BYTES
    for generation in islice((g for g in unfinished(volume, ref.key) if g != own), _MOST_LEFTOVERS):
        notes_of, size = _read_journal(volume, generation, room)
        room -= size
        is_spoiled = generation in spoiled or _is_marked_spoiled(volume, generation)
        for path, found in notes_of.items():
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
    with suppress(StoreFormatError, VolumeError):
        for kind in ("commit", "tombstone"):
            place = layout.record_file(key, f"{1:012d}.{kind}")
            if (data := volume.read(place, MAX_RECORD_BYTES)) is not None:
                return decode(LogEntry, data, str(place)).uri == uri
    return False


def unfinished(volume: Volume, key: str) -> Sequence[str]:
    """
    Return the generations of a key that have a journal, the newest first. Those of complete models have none.
    """
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


def most_noted(volume: Volume, generations: Sequence[str]) -> str:
    """
    Return the one of some unfinished generations whose journal speaks of most bytes; of the newest few, as none has
    more.
    """
    return max(generations[:_MOST_LEFTOVERS], key=partial(noted_bytes, volume))


def noted_bytes(volume: Volume, generation: str) -> int:
    """
    Return how many bytes the journal of a generation speaks of. Its notes are counted, and not checked.
    """
    fronts: dict[int, int] = {}
    ranges = 0
    with suppress(StoreError, OSError):
        for line in _lines(volume, layout.journal_file(generation), _MAX_JOURNAL_BYTES):
            if (note := _NOTED.search(line)) is None:
                break
            path, start, stop = hash(note[1]), int(note[2] or 0), int(note[3])
            if start:
                ranges += stop - start
            else:  # A note of the front covers those of it before.
                fronts[path] = max(stop, fronts.get(path, 0))
    return ranges + sum(fronts.values())


def _read_journal(volume: Volume, generation: str, limit: int) -> tuple[dict[PurePosixPath, list[PartNote]], int]:
    """The notes of a journal by their files, and how many bytes of it were read."""
    place = layout.journal_file(generation)
    notes: dict[PurePosixPath, list[PartNote]] = defaultdict(list)
    size = 0
    with suppress(StoreError, OSError):
        for line in _lines(volume, place, limit):
            size += len(line) + 1
            # The first line that is invalid is the torn end of a killed writer, or forged: nothing after it counts.
            note = decode(PartNote, line, str(place))
            if not note.stop:
                notes[note.path].clear()  # What was noted of the file before was taken back.
            notes[note.path].append(note)
    return notes, size


def _lines(volume: Volume, place: PurePosixPath, limit: int) -> Iterator[bytes]:
    """The whole lines of a journal up to a bound, of which no more than one piece is in memory."""
    rest, offset = b"", 0
    with volume.open_file(place) as fd:
        while offset < limit and (piece := os.pread(fd, min(_PIECE_BYTES, limit - offset), offset)):
            offset += len(piece)
            *lines, rest = (rest + piece).split(b"\n")
            yield from lines
            if len(rest) > MAX_RECORD_BYTES:
                return
