"""
Removing a model: gone at once for whoever asks, deleted only when nobody can be reading it.
"""

from __future__ import annotations

import secrets
import time
from hashlib import sha256

import attrs

from kserve_pvc import _layout as layout
from kserve_pvc._claims import is_claimed, live_readers
from kserve_pvc._entry import Holder, LogEntry, StoreSettings, now
from kserve_pvc._log import LogView, append, highest_slot, read_log_of
from kserve_pvc._ref import ModelRef
from kserve_pvc._volume import VolumeWriter, mount_of
from kserve_pvc.errors import ModelInUseError


@attrs.frozen
class Removal:
    """
    One removal: tombstone, wait until every node sees it, look for readers, trash, delete.

    If the process dies on the way the model stays gone, and the next removal or download of it collects the rest.
    """

    writer: VolumeWriter
    settings: StoreSettings
    ref: ModelRef
    holder: Holder

    def run(self, trash_seconds: float) -> bool:
        """
        Returns:
            False if there was nothing to remove.

        Raises:
            ModelInUseError: Somebody downloads it, or reads it; a tombstone was undone.
        """
        try:
            return self._run()
        finally:
            self.writer.empty_trash(trash_seconds)

    def _run(self) -> bool:
        view, generations = self._look()
        if not generations and not _is_present(view):
            return False
        if (downloader := is_claimed(self.writer, self.ref.key, lease_seconds=self.settings.lease_seconds)) is not None:
            raise ModelInUseError(str(self.ref), (f"a download by {downloader}",))
        before, tombstone, generations = self._tombstone(view, generations)
        time.sleep(mount_of(self.writer.root).visibility_delay)
        readers = [r for g in generations for r in live_readers(self.writer, g, lease_seconds=self.settings.lease_seconds)]
        if readers:
            if before is not None:
                self._append(attrs.evolve(before, type="restore"), after_seq=tombstone.seq)
            raise ModelInUseError(str(self.ref), tuple(readers))
        for generation in generations:
            self._collect(generation)
        return True

    def _look(self) -> tuple[LogView, list[str]]:
        # Generations first, the log after: what is collected was begun on a record older than the tombstone, and loses.
        generations = [g for g in self.writer.names(layout.MODELS / self.ref.key) if layout.parse_generation(g) is not None]
        return read_log_of(self.writer, self.ref), generations

    def _tombstone(self, view: LogView, generations: list[str]) -> tuple[LogEntry | None, LogEntry, list[str]]:
        """
        Append tombstones until one has the highest number that anybody has reserved, also where no commit is.

        That makes every download that has begun lose: one that reserved a number above an earlier tombstone, and was
        paused before it published, would otherwise make a model of bytes that are about to be collected.
        """
        before = view.entry if _is_present(view) else None
        while True:
            tombstone = attrs.evolve(before or self._nothing(generations), type="tombstone")
            appended = self._append(tombstone, after_seq=view.seq)
            if appended is not None and highest_slot(self.writer, self.ref.key) == appended.seq:
                return before, appended, generations
            view, generations = self._look()
            before = view.entry if _is_present(view) else before

    def _nothing(self, generations: list[str]) -> LogEntry:
        return LogEntry(
            type="tombstone",
            seq=1,
            key=self.ref.key,
            uri=self.ref.uri,
            revision=self.ref.revision,
            allow_patterns=self.ref.allow_patterns,
            ignore_patterns=self.ref.ignore_patterns,
            generation=generations[-1],
            version="unfinished",
            files=0,
            size_bytes=0,
            manifest_sha256=sha256(b"").hexdigest(),
            digest="sha256",
            policy="allow",
            created_at=now(),
            writer=self.holder,
        )

    def _append(self, entry: LogEntry, *, after_seq: int) -> LogEntry | None:
        place = layout.staging_dir(f"remove-{secrets.token_hex(16)}")
        try:
            return append(
                self.writer,
                self.ref.key,
                lambda seq: attrs.evolve(entry, seq=seq, created_at=now(), writer=self.holder),
                after_seq=after_seq,
                private=place / "record",
            )
        finally:
            self.writer.throw_away(place)

    def _collect(self, generation: str) -> None:
        for place in (layout.staging_dir(generation), layout.manifest_file(generation), layout.lease_dir(generation)):
            self.writer.throw_away(place)
        # Last, since what is left of a removal is found by it.
        self.writer.discard(layout.generation_dir(self.ref.key, generation))


def _is_present(view: LogView) -> bool:
    return view.entry is not None and view.entry.is_present
