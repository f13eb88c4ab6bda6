"""
Publishing what a download wrote, and collecting what is left over.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from contextlib import suppress
from typing import Literal

import attrs

from kserve_pvc._download.reuse import most_noted, unfinished
from kserve_pvc._format import layout
from kserve_pvc._format.records import Holder, LogEntry, Manifest, now
from kserve_pvc._keys.log import LogView, find_named
from kserve_pvc._keys.log_writer import LogWriter, generations, tombstone_of
from kserve_pvc._keys.procedures import Publish, append, collect_garbage, collect_unnamed, discard_leftovers, drive
from kserve_pvc._source.ref import ModelRef
from kserve_pvc._volume.writing import VolumeWriter
from kserve_pvc.errors import StoreError, StoreFormatError

# How many of the newest generations of a key are looked at whether they have a journal or not.
_MOST_NEWEST = 4


@attrs.frozen(kw_only=True)
class Written:
    """
    A complete generation that no record names yet.
    """

    manifest: Manifest
    manifest_sha256: str
    digest: Literal["sha256", "none"]


class NothingNewerError(Exception):
    """
    The source holds what is present already.

    Internal: the caller looks again.
    """


class Publication:
    """
    Appends the commit of one call to the log of its key.
    """

    def __init__(self, writer: VolumeWriter, ref: ModelRef, holder: Holder) -> None:
        self._writer = writer
        self._ref = ref
        self._key = ref.key
        self._holder = holder
        self._written: Written | None = None
        self._unpublished: list[str] = []

    def begin(self, generation: str) -> None:
        """
        Note that this call writes a generation, which is collected at the end if it is not published.
        """
        self._unpublished.append(generation)

    def publish(self, written: Written, after_seq: int) -> LogView | None:
        """
        Make a generation the current one.

        Returns:
            The new end of the log, or None if another process published since record `after_seq`.
        """
        self._written = written
        # Listed before the commit: these were begun on an older record, so they lose. Later ones may be begun on ours.
        begun = self._collectable(generations(self._writer, self._key), written.manifest.generation)
        staging = layout.staging_dir(written.manifest.generation)
        log = LogWriter(self._writer, self._key, self._commit, private=staging / "record", collect=self.collect)
        seq = drive(append(after_seq, "commit"), log.perform)
        if seq is None:
            return None
        entry = log.published[seq]
        self._unpublished.remove(entry.generation)
        # The model is present whatever becomes of the leftovers; the next download of this key tries again.
        with suppress(OSError, StoreFormatError):
            self._writer.throw_away(staging)
            drive(collect_garbage(seq, begun), log.perform)
        return LogView(seq=seq, entry=entry)

    def discard_leftovers(self, view: LogView, *, most: int = 1) -> bool:
        """
        Collect what dead writers of this key left, but for those that have most, from which this call continues.

        What interrupted attempts leave is never more than one of them then, however many were killed. Nothing is
        collected above a damaged record: what it was must not be hidden by one of this process.

        Args:
            view: The newest record of the key.
            most: How many are kept: 1, or 0 where their room is needed.

        Returns:
            Whether the log may have a new record, which changes nothing, and has to be read again.
        """
        left = unfinished(self._writer, self._key)
        if len(left) <= most or view.damage is not None:
            return False
        with suppress(OSError, StoreError):
            named = find_named(self._writer, self._key, left)
            for generation in named.intersection(left):
                self._writer.throw_away(layout.staging_dir(generation))  # Its writer died after it had published.
            left = [generation for generation in left if generation not in named]
            best = [most_noted(self._writer, left)] if most and left else []
            if discarded := [generation for generation in left if generation not in best]:
                return self._discard(view, discarded)
        return False

    def _discard(self, view: LogView, leftovers: Sequence[str]) -> bool:
        staging = layout.staging_dir(f"discard-{secrets.token_hex(16)}")

        def record(operation: Publish) -> LogEntry:
            entry = view.present or tombstone_of(self._ref, leftovers[0], self._holder)
            return attrs.evolve(entry, type=operation.type, seq=operation.seq, created_at=now(), writer=self._holder)

        log = LogWriter(self._writer, self._key, record, private=staging / "record", collect=self.collect)
        # Whatever fails, a record may have been appended. What could not be collected is tried by the next call.
        with suppress(OSError, StoreError):
            drive(discard_leftovers(view, leftovers), log.perform)
        with suppress(OSError, StoreError):
            self._writer.throw_away(staging)
        return True

    def _collectable(self, begun: Sequence[str], own: str) -> Sequence[str]:
        """
        Leave out generations that cannot be garbage: older ones that have no journal were published, or would have been
        collected before.
        """
        begun = [generation for generation in begun if generation != own]
        older, newest = begun[:-_MOST_NEWEST], begun[-_MOST_NEWEST:]
        journals = set(self._writer.list_names(layout.STAGING)) if older else set()
        return [generation for generation in older if generation in journals] + newest

    def collect_unpublished(self) -> None:
        """
        Collect what this call wrote and will never be published, because another process published.
        """
        with suppress(OSError, StoreFormatError):
            log = LogWriter(self._writer, self._key, self._commit, private=layout.STAGING, collect=self.collect)
            drive(collect_unnamed(self._unpublished), log.perform)

    def collect(self, generation: str) -> None:
        """
        Throw away a generation and everything about it.
        """
        # The model's directory goes last: as long as it is there, the next collection finds the rest.
        for place in (
            layout.staging_dir(generation),
            layout.manifest_file(generation),
            layout.generation_dir(self._key, generation),
        ):
            self._writer.throw_away(place)

    def _commit(self, operation: Publish) -> LogEntry:
        assert self._written is not None  # Only what was written is published.
        manifest = self._written.manifest
        return LogEntry(
            type=operation.type,
            seq=operation.seq,
            key=self._key,
            uri=self._ref.uri,
            revision=self._ref.revision,
            allow_patterns=self._ref.allow_patterns,
            ignore_patterns=self._ref.ignore_patterns,
            generation=manifest.generation,
            version=manifest.version,
            files=len(manifest.files),
            size_bytes=manifest.size_bytes,
            manifest_sha256=self._written.manifest_sha256,
            digest=self._written.digest,
            policy="allow",
            created_at=now(),
            writer=self._holder,
        )
