"""
`Model`: what a store returns, looked up in the logs of its keys without network, lock or write.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import attrs

from kserve_pvc._format import layout
from kserve_pvc._format.codec import KEY
from kserve_pvc._format.log_entry import LogEntry
from kserve_pvc._keys.log import LogView, read_log_of, read_manifest, read_model
from kserve_pvc._process import newest_returned, remember_returned
from kserve_pvc._source.ref import ModelRef
from kserve_pvc._volume.reading import Volume
from kserve_pvc.errors import (
    DamagedRecordError,
    ModelNotFoundError,
    NoStoreError,
    OfflineError,
    StoreFormatError,
    StoreRootError,
    VolumeError,
)

# A server that starts on a warm volume loads what is imported above and nothing else. What downloads, removes, checks
# or talks to a source is imported by the method that does it.
if TYPE_CHECKING:
    from kserve_pvc._format.records import Record

# Of how many damaged records a listing reads again what may be half written, each after a pause.
_MOST_REREAD = 20


Status = Literal["present", "downloaded", "waited"]


@attrs.frozen(slots=False, kw_only=True)
class Model:
    """
    A complete, verified model on the volume.

    `str(model)`, `format(model)` and `os.fspath(model)` are its directory, so that it can be passed to code that takes
    a path, such as `AutoTokenizer.from_pretrained(model)`. `model / "config.json"` joins as `pathlib` does: nothing is
    looked up, and an absolute name or `..` leads out of the directory.

    It stays valid until the model is removed; hold `ModelStore.open` to keep it from being removed.

    Args:
        status: How this call got it: it was `present`, was `downloaded` by this call, or was `waited` for.
        bytes_fetched: What this call itself read from the source.
        seconds: How long the call took.
    """

    uri: str
    revision: str | None
    allow_patterns: tuple[str, ...] | None
    ignore_patterns: tuple[str, ...]
    key: str
    version: str
    path: Path
    status: Status
    size_bytes: int
    files: int
    created_at: datetime
    bytes_fetched: int = 0
    seconds: float = 0.0
    _entry: LogEntry = attrs.field(repr=False, alias="entry")
    _root: Path = attrs.field(repr=False, alias="root")

    @cached_property
    def record(self) -> Record:
        """
        Where the model came from and every file of it, read from the volume on first access.

        Raises:
            StoreFormatError: The manifest is damaged or gone.
        """
        from kserve_pvc._format.records import Record

        entry, manifest = self._entry, read_manifest(Volume(self._root), self._entry)
        return Record(
            uri=entry.uri,
            revision=entry.revision,
            allow_patterns=entry.allow_patterns,
            ignore_patterns=entry.ignore_patterns,
            key=entry.key,
            version=entry.version,
            generation=entry.generation,
            files=manifest.files,
            size_bytes=entry.size_bytes,
            created_at=entry.created_at,
            writer=entry.writer,
            access=manifest.access,
            tls=manifest.tls,
            archive_sha256=manifest.archive_sha256,
        )

    @property
    def ref(self) -> ModelRef:
        """
        What was requested to get this model, to be passed to any method of a store.
        """
        return ModelRef(
            uri=self.uri,
            revision=self.revision,
            allow_patterns=self.allow_patterns,
            ignore_patterns=self.ignore_patterns,
        )

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def __format__(self, spec: str) -> str:
        return format(str(self.path), spec)

    def __truediv__(self, name: str | os.PathLike[str]) -> Path:
        return self.path / name

    def _repr_html_(self) -> str:
        from kserve_pvc._show.html import show_model

        return show_model(**self._facts())

    def _facts(self) -> dict[str, Any]:
        return attrs.asdict(self, filter=lambda field, _: bool(field.repr))


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
        view, step_back = self._read(ref.key, lambda: read_log_of(self._volume, ref))
        if step_back is not None:
            raise step_back
        return view

    def _read(self, key: str, read: Callable[[], LogView]) -> tuple[LogView, StoreFormatError | None]:
        """Read a log, and describe the error if it went back."""
        # Before reading: another thread may return a newer one meanwhile.
        seen = newest_returned(self.identity, key)
        view = read()
        if view.seq >= seen:
            return view, None
        reason = f"its newest record is {view.seq}, but this process has returned {seen}; records were deleted"
        return view, StoreFormatError(str(layout.log_dir(key)), reason)

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

    def absent(self, ref: ModelRef, view: LogView, why_offline: str = "") -> ModelNotFoundError:
        """
        Make the error for a model that is absent.

        Args:
            why_offline: Why it is not downloaded, if it might be.
        """
        if view.damage is not None:
            return DamagedRecordError(
                ref=str(ref), root=str(self._volume.root), path=view.damage.path, reason=view.damage.reason
            )
        if why_offline:
            return OfflineError(str(ref), str(self._volume.root), why_offline)
        if self._volume.settings is None and layout.SETTINGS.name not in self._volume.list_names(layout.META):
            return NoStoreError(str(ref), str(self._volume.root))
        return ModelNotFoundError(str(ref), str(self._volume.root))

    def list_keys(self) -> Sequence[str]:
        """
        List every key of the store, whether its model is present or not.
        """
        self._volume.check()
        return [name for name in self._volume.list_names(layout.KEYS) if KEY.fullmatch(name)]

    def views(self) -> Iterator[tuple[str, LogView]]:
        """
        Read the newest record of every key. One that is older than what this process has returned is damage.
        """
        damaged = 0
        for key in self.list_keys():
            try:
                # Writers leave no records half written but for a moment, so there are never many of them.
                read = partial(read_model, self._volume, key, may_pause=damaged < _MOST_REREAD)
                view, step_back = self._read(key, read)
                damaged += view.damage is not None
            except StoreRootError:
                raise
            except VolumeError as error:
                # One key that cannot be read takes no other with it.
                view, step_back = LogView(), StoreFormatError(error.path, error.reason)
            yield key, view if step_back is None else LogView(seq=view.seq, damage=step_back)

    def models(self) -> list[Model]:
        """
        Return every model that is present, by key.
        """
        found = (view.present for _, view in self.views())
        return [self.model(entry, "present", time.monotonic()) for entry in found if entry is not None]
