"""
Removing a model: absent at once for all processes, deleted only when no process can be reading it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import PurePosixPath

import attrs

from kserve_pvc._format import layout
from kserve_pvc._format.log_entry import Holder, LogEntry, StoreSettings, now
from kserve_pvc._keys.claims import Readers, find_live_downloader
from kserve_pvc._keys.log import LogView, read_log_of
from kserve_pvc._keys.log_writer import LogWriter, generations, tombstone_of
from kserve_pvc._keys.procedures import AwaitReaders, AwaitVisibility, Operation, Publish, drive, remove
from kserve_pvc._source.ref import ModelRef
from kserve_pvc._volume.mount import mount_of
from kserve_pvc._volume.reserve import fill_reserve, release_reserve
from kserve_pvc._volume.sweeping import sweep_staging
from kserve_pvc._volume.writing import VolumeWriter
from kserve_pvc.errors import InsufficientSpaceError, ModelInUseError, StoreError


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
            ModelInUseError: Another process downloads it, or reads it. It was there all the time, unless the reader
                came just before the tombstone, which is undone then.
            InsufficientSpaceError: The volume is full, and there is neither trash nor a reserve to give up.
        """
        try:
            return self._run_in_little_room()
        finally:
            self.writer.empty_trash(trash_seconds)
            sweep_staging(self.writer)
            fill_reserve(self.writer)

    def _run_in_little_room(self) -> bool:
        # A tombstone takes room before anything is freed. A second attempt goes on where the first one stopped.
        with suppress(InsufficientSpaceError):
            return self._run()
        self.writer.empty_trash(0)
        with suppress(InsufficientSpaceError):
            return self._run()
        release_reserve(self.writer)
        try:
            return self._run()
        except InsufficientSpaceError as error:
            hint = "a removal has to note it on the volume; enlarge it, or delete a file that is not of the store"
            raise attrs.evolve(error, hint=hint) from error

    def _run(self) -> bool:
        # Generations first, the log after: what is collected was begun on a record older than the tombstone, and loses.
        found = generations(self.writer, self.ref.key)
        view = read_log_of(self.writer, self.ref)
        if not found and not view.is_present:
            return False
        lease_seconds = self.settings.lease_seconds
        if downloader := find_live_downloader(self.writer, self.ref.key, lease_seconds=lease_seconds):
            raise ModelInUseError(str(self.ref), (f"a download by {downloader}",))
        staging = layout.staging_dir(f"remove-{secrets.token_hex(16)}")
        log = self._log_writer(staging, _named(found, view))
        leases = Readers(self.writer, lease_seconds=lease_seconds)
        readers: list[str] = []

        def perform(operation: Operation) -> object:
            match operation:
                case AwaitVisibility():
                    time.sleep(mount_of(self.writer.root).visibility_delay)
                    return None
                case AwaitReaders(which):
                    readers.extend(leases.watch(which))
                    return bool(readers)
            return log.perform(operation)

        try:
            outcome = drive(remove(view, found), perform)
        finally:
            with suppress(StoreError):
                self.writer.throw_away(staging)
        if outcome == "read":
            raise ModelInUseError(str(self.ref), tuple(readers))
        return True

    def _log_writer(self, staging: PurePosixPath, generation: str) -> LogWriter:
        make = partial(self._record, generation)
        return LogWriter(self.writer, self.ref.key, make, private=staging / "record", collect=self._collect)

    def _record(self, generation: str, request: Publish) -> LogEntry:
        before = request.of.entry if isinstance(request.of, LogView) else None
        entry = tombstone_of(self.ref, generation, self.holder) if before is None else before
        return attrs.evolve(entry, type=request.type, seq=request.seq, created_at=now(), writer=self.holder)

    def _collect(self, generation: str) -> None:
        for place in (layout.staging_dir(generation), layout.manifest_file(generation), layout.lease_dir(generation)):
            self.writer.throw_away(place)
        # Last, since what is left of a removal is found by it.
        self.writer.discard(layout.generation_dir(self.ref.key, generation))


def _named(found: Sequence[str], view: LogView) -> str:
    """The generation that a tombstone speaks of. The directory of a model that is present may be gone."""
    return found[-1] if found or view.entry is None else view.entry.generation
