"""
Writing to the log of one key: the operations of the procedures, carried out on a volume.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import PurePosixPath

from kserve_pvc._format.codec import encode
from kserve_pvc._format.layout import MAX_NUMBER, MODELS, log_dir, parse_generation, parse_number, slot_dir
from kserve_pvc._format.log_entry import Holder, LogEntry, now
from kserve_pvc._keys.log import find_named, read_log
from kserve_pvc._keys.procedures import (
    Collect,
    ListGenerations,
    ListNamed,
    Operation,
    Pause,
    Publish,
    ReadHighestSlot,
    ReadNewest,
    Reserve,
)
from kserve_pvc._source.ref import ModelRef
from kserve_pvc._volume.reading import Volume
from kserve_pvc._volume.writing import VolumeWriter
from kserve_pvc.errors import StoreFormatError


def highest_slot(volume: Volume, key: str) -> int:
    """
    Return the highest number that is reserved.
    """
    return max((n for name in volume.list_names(slot_dir(key)) if (n := parse_number(name)) is not None), default=0)


class LogWriter:
    """
    Carries out the operations of a procedure for one key.

    Args:
        make: Builds the record that a procedure wants to publish.
        private: A name in a staging directory that no other process uses.
        collect: Throws away what there is of a generation.
    """

    def __init__(
        self,
        writer: VolumeWriter,
        key: str,
        make: Callable[[Publish], LogEntry],
        *,
        private: PurePosixPath,
        collect: Callable[[str], None],
    ) -> None:
        self._writer = writer
        self._key = key
        self._make = make
        self._private = private
        self._collect = collect
        self.published: dict[int, LogEntry] = {}

    def perform(self, operation: Operation) -> object:
        """
        Carry out one operation and return its result.

        Raises:
            StoreFormatError: The numbers are used up, which takes a forged record, or `ListNamed` met a damaged one.
        """
        match operation:
            case ReadNewest():
                return read_log(self._writer, self._key)
            case ReadHighestSlot():
                return highest_slot(self._writer, self._key)
            case Reserve(seq):
                if seq > MAX_NUMBER:
                    raise StoreFormatError(
                        str(log_dir(self._key)),
                        f"it holds a record of number {seq - 1}, which no writer makes; delete that forgery",
                    )
                return self._writer.reserve(slot_dir(self._key) / f"{seq:012d}")
            case Publish():
                entry = self._make(operation)
                self.published[entry.seq] = entry
                return self._writer.publish(log_dir(self._key) / entry.name, encode(entry), self._private)
            case Pause(seconds):
                time.sleep(seconds)
            case ListGenerations():
                return generations(self._writer, self._key)
            case ListNamed(which):
                return find_named(self._writer, self._key, which)
            case Collect(generation):
                self._collect(generation)
        return None


def generations(volume: Volume, key: str) -> list[str]:
    """
    The names of all generations of a key, whatever their state.
    """
    return [name for name in volume.list_names(MODELS / key) if parse_generation(name) is not None]


def tombstone_of(ref: ModelRef, generation: str, holder: Holder) -> LogEntry:
    """
    Make a tombstone for a key without a model. It names an unfinished generation.
    """
    return LogEntry(
        type="tombstone",
        seq=1,
        key=ref.key,
        uri=ref.uri,
        revision=ref.revision,
        allow_patterns=ref.allow_patterns,
        ignore_patterns=ref.ignore_patterns,
        generation=generation,
        version="unfinished",
        files=0,
        size_bytes=0,
        manifest_sha256=sha256(b"").hexdigest(),
        digest="sha256",
        policy="allow",
        created_at=now(),
        writer=holder,
    )
