"""
Unpacking archives as KServe does: a source with one `.tar`, `.tar.gz`, `.tgz`, `.tar.xz` or `.zip` file is unpacked.

The store itself unpacks archives from HTTP only. These backends do it for the other sources.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import attrs

from kserve_pvc._source.contract import (
    ABILITIES,
    Backend,
    BackendFactory,
    RemoteFile,
    Resolved,
    SupportsPages,
    UnpackLimits,
)
from kserve_pvc._source.ref import ModelRef
from kserve_pvc.backends import make_backend
from kserve_pvc.errors import PolicyError, SourceDeniedError, UnsafePathError
from kserve_pvc.kserve._counting import find_only_file

_UNPACKED = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".zip")
_REFUSED = (".tar.bz2", ".tbz2", ".tbz", ".txz")
# The schemes that KServe unpacks, except for HTTP, whose backend unpacks itself.
_SCHEMES = ("s3", "gs", "az", "abfs", "abfss", "file", "pvc")


def is_archive(name: str) -> bool:
    """
    Whether KServe unpacks a file of this name.
    """
    return name.lower().endswith((*_UNPACKED, *_REFUSED))


def unpacking() -> Mapping[str, BackendFactory]:
    """
    Return the backends of a store that unpacks as KServe does.
    """
    return {scheme: partial(_make, scheme) for scheme in _SCHEMES}


def _make(scheme: str, options: Mapping[str, Any]) -> Backend:
    backend = make_backend(scheme, {}, options)
    made: Backend = (
        _PagedUnpacking(scheme, backend, backend) if isinstance(backend, SupportsPages) else _Unpacking(scheme, backend)
    )
    return made


def _find_archive(service: str, files: Sequence[RemoteFile]) -> RemoteFile | None:
    found = find_only_file(service, files)
    return found if found is not None and is_archive(found.entry.path.name) else None


class _Unpacking:
    """
    A backend that marks its only file as an archive, if it is one.
    """

    def __init__(self, scheme: str, backend: Backend) -> None:
        self._scheme = scheme
        self._backend = backend
        for name in ABILITIES:
            if name != "pages" and hasattr(backend, name):
                setattr(self, name, getattr(backend, name))

    def resolve(self, ref: ModelRef) -> Resolved:
        has_patterns = bool(ref.allow_patterns or ref.ignore_patterns)
        try:
            found = self._backend.resolve(attrs.evolve(ref, allow_patterns=None, ignore_patterns=()))
        except (UnsafePathError, PolicyError, SourceDeniedError):
            # What cannot be stored or listed may be what the patterns leave out.
            if has_patterns:
                return self._backend.resolve(ref)
            raise
        archive = _find_archive(self._scheme, found.files)
        if archive is None:
            return self._backend.resolve(ref) if has_patterns else found
        return attrs.evolve(found, ref=ref, files=self._with_archive(found.files, archive, ref))

    def _with_archive(
        self, files: Sequence[RemoteFile], archive: RemoteFile | None, ref: ModelRef
    ) -> tuple[RemoteFile, ...]:
        """Mark the archive, and leave out what else the patterns do."""
        chosen = (file for file in files if file is archive or ref.selects(file.entry.path))
        return tuple(_marked(file, ref) if file is archive else file for file in chosen)

    def open_range(self, file: RemoteFile, start: int, stop: int) -> Any:
        return self._backend.open_range(file, start, stop)


class _PagedUnpacking(_Unpacking):
    """
    The same for a backend that lists page by page.
    """

    def __init__(self, scheme: str, backend: Backend, lister: SupportsPages) -> None:
        super().__init__(scheme, backend)
        self._lister = lister

    def pages(self, ref: ModelRef) -> Iterator[Sequence[RemoteFile]]:
        pages = self._lister.pages(ref)
        first: list[RemoteFile] = []
        for page in pages:
            first += page
            if sum(1 for file in first if file.entry.size_bytes) > 1:
                break
        yield self._with_archive(first, _find_archive(self._scheme, first), ref)
        yield from pages


def _marked(file: RemoteFile, ref: ModelRef) -> RemoteFile:
    if file.entry.path.name.lower().endswith(_REFUSED):
        raise PolicyError(str(ref), "bzip2 archives are not supported; repack it as `.tar.gz`, `.tar.xz` or `.zip`")
    return attrs.evolve(file, unpack=UnpackLimits())
