"""
`Model`: what a store returns.
"""

from __future__ import annotations

import os
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import attrs

from kserve_pvc._format.log_entry import LogEntry
from kserve_pvc._keys.log import read_manifest
from kserve_pvc._source.ref import ModelRef
from kserve_pvc._volume.reading import Volume

# A server that starts on a warm volume loads what is imported above and nothing else. What downloads, removes, checks
# or talks to a source is imported by the method that does it.
if TYPE_CHECKING:
    from kserve_pvc._format.records import Record


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
