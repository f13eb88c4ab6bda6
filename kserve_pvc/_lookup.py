"""
What a store holds: models looked up in the logs of their keys, without network, lock or write.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from kserve_pvc._format import layout
from kserve_pvc._format.codec import KEY
from kserve_pvc._format.log_entry import LogEntry
from kserve_pvc._keys.log import LogView, read_log_of, read_model
from kserve_pvc._model import Model, Status
from kserve_pvc._process import newest_returned, remember_returned
from kserve_pvc._source.ref import ModelRef
from kserve_pvc._volume.reading import Volume
from kserve_pvc.errors import DamagedRecordError, ModelNotFoundError, StoreFormatError, StoreRootError, VolumeError


class Lookup:
    """
    The models of one store, read from the volume with each call.

    Args:
        identity: What this process knows the store by, however often it is opened.
    """

    def __init__(self, volume: Volume, identity: str) -> None:
        self.identity = identity
        self._volume = volume
        # The generation of each model to which KServe's link was seen to lead, so that it is looked at once.
        self.seen_views: dict[str, str] = {}

    def view(self, ref: ModelRef) -> LogView:
        """
        Read the newest record of a ref, and never an older one than this process has returned.

        Raises:
            StoreFormatError: The newest record is older than one that was returned.
        """
        self._volume.check()
        # Before reading: another thread may return a newer one meanwhile.
        seen = newest_returned(self.identity, ref.key)
        view = read_log_of(self._volume, ref)
        if view.seq < seen:
            reason = f"its newest record is {view.seq}, but this process has returned {seen}; records were deleted"
            raise StoreFormatError(str(layout.log_dir(ref.key)), reason)
        return view

    def get(self, ref: ModelRef) -> Model:
        """
        Return a model that is present.

        Raises:
            ModelNotFoundError: It is absent.
        """
        started = time.monotonic()
        view = self.view(ref)
        if view.present is None:
            raise self.absent(ref, view)
        return self.model(view.present, "present", started)

    def model(self, entry: LogEntry, status: Status, started: float, bytes_fetched: int = 0) -> Model:
        """
        Describe the model of a record that is about to be returned to the caller.
        """
        self.remember(entry)
        return Model(
            uri=entry.uri,
            revision=entry.revision,
            allow_patterns=entry.allow_patterns,
            ignore_patterns=entry.ignore_patterns,
            key=entry.key,
            version=entry.version,
            path=self._volume.absolute(layout.generation_dir(entry.key, entry.generation)),
            status=status,
            size_bytes=entry.size_bytes,
            files=entry.files,
            created_at=entry.created_at,
            bytes_fetched=bytes_fetched,
            seconds=time.monotonic() - started,
            entry=entry,
            root=self._volume.root,
        )

    def remember(self, entry: LogEntry) -> None:
        """
        Note that this process returns a record, so that no older one is returned later.
        """
        remember_returned(self.identity, entry.key, entry.seq)

    def absent(self, ref: ModelRef, view: LogView) -> ModelNotFoundError:
        """
        Make the error for a model that is absent.
        """
        if view.damage is not None:
            return DamagedRecordError(
                ref=str(ref), root=str(self._volume.root), path=view.damage.path, reason=view.damage.reason
            )
        return ModelNotFoundError(str(ref), str(self._volume.root))

    def list_keys(self) -> Sequence[str]:
        """
        List every key of the store, whether its model is present or not.
        """
        self._volume.check()
        return [name for name in self._volume.list_names(layout.KEYS) if KEY.fullmatch(name)]

    def views(self) -> Iterator[tuple[str, LogView]]:
        """
        Read the newest record of every key.
        """
        for key in self.list_keys():
            try:
                view = read_model(self._volume, key)
            except StoreRootError:
                raise
            except VolumeError as error:
                # One key that cannot be read takes no other with it.
                view = LogView(damage=StoreFormatError(error.path, error.reason))
            yield key, view

    def models(self) -> list[Model]:
        """
        Return every model that is present, by key.
        """
        found = (view.present for _, view in self.views())
        return [self.model(entry, "present", time.monotonic()) for entry in found if entry is not None]
