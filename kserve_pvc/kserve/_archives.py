"""
Unpacking archives as KServe does, and comparing the one file of a source with a digest before anything is published.

KServe unpacks a source of one file whose name is that of a tar or zip. The store itself unpacks archives from HTTP
only; these backends do it for the other sources. An archive that cannot be unpacked is an error, whatever KServe does:
a server would find it in place of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import attrs

from kserve_pvc._archive.unpack import check_readable
from kserve_pvc._archive.unpack import is_archive as is_unpacked
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
from kserve_pvc.errors import DigestMismatchError, PolicyError, SourceDeniedError, UnsafePathError
from kserve_pvc.kserve._counting import find_only_file

# Files with a compression and no container: KServe unpacks those of HTTP only, as the store does.
_ONE_FILE = (".gz", ".xz", ".zst", ".lzma")
_TARS = (".tar.gz", ".tar.xz", ".tar.zst", ".tar.lzma")
_REFUSED = {
    ".tar.z": "compress (`.Z`)",
    ".tar.br": "Brotli",
    ".tar.lz": "lzip",
    ".tlz": "lzip",
    ".tar.lz4": "LZ4",
    ".tar.lzo": "LZO",
    ".tzo": "LZO",
    ".tar.sz": "Snappy",
    ".7z": "7-Zip",
    ".rar": "RAR",
}
# The schemes whose sources are unpacked here. HTTP has a backend that does, and KServe keeps archives of the hub.
_SERVICES = ("s3", "gs", "az", "abfs", "abfss", "file", "pvc", "fsspec")
_WEB = ("http", "https")
_OTHERS = ("hf",)


def is_archive(name: str) -> bool:
    """
    Whether a model of one file of this name is unpacked, or refused because it cannot be.
    """
    lower = name.lower()
    return _refused(name) is not None or (
        is_unpacked(name) and (lower.endswith(_TARS) or not lower.endswith(_ONE_FILE))
    )


def _refused(name: str) -> str | None:
    lower = name.lower().rpartition("/")[2]
    return next((what for ending, what in _REFUSED.items() if lower.endswith(ending) and lower != ending), None)


def may_unpack(service: str) -> bool:
    """
    Whether archives from there are unpacked.
    """
    return service in (*_SERVICES, *_WEB)


def unpacking(service: str, limits: UnpackLimits, digest: str | None = None) -> Mapping[str, BackendFactory]:
    """
    Return the backend of a store that unpacks as KServe does.

    Args:
        service: The one of the source. For others there is none, since `https` addresses of Azure have a service of
            their own, and a backend for the scheme would come first.
        digest: The SHA-256 of the only file of the source, as it is stored there.
    """
    is_known = service in (*_SERVICES, *_WEB, *_OTHERS)
    return {service: partial(_make, service, limits, digest)} if is_known else {}


def _make(service: str, limits: UnpackLimits, digest: str | None, options: Mapping[str, Any]) -> Backend:
    backend = make_backend(service, {}, options)
    marking = _Marking(service=service, limits=limits, digest=digest)
    made: Backend = (
        _PagedUnpacking(backend, marking, backend)
        if isinstance(backend, SupportsPages)
        else _Unpacking(backend, marking)
    )
    return made


@attrs.frozen(kw_only=True)
class _Marking:
    """
    What is said of the files of a source.
    """

    service: str
    limits: UnpackLimits
    digest: str | None

    def find_archive(self, files: Sequence[RemoteFile]) -> RemoteFile | None:
        found = find_only_file(self.service, files) if may_unpack(self.service) else None
        return found if found is not None and is_archive(self._name(found)) else None

    def _name(self, file: RemoteFile) -> str:
        """What a file is called. A backend gives one that is stored compressed, and says that it is not, a suffix."""
        return file.entry.path.name.removesuffix(".gz") if self._is_encoded(file) else file.entry.path.name

    def mark(self, ref: ModelRef, files: Sequence[RemoteFile]) -> tuple[RemoteFile, ...]:
        """
        Mark all files of a source.

        Raises:
            PolicyError: The only file is an archive that cannot be unpacked, or a digest is given for several files.
            DigestMismatchError: The source itself says that the file has another digest.
        """
        if self.digest is not None and len(files) != 1:
            rule = f"`VERIFICATION_DIGEST` is the SHA-256 of one file, but the model has {len(files)}; unset it"
            raise PolicyError(str(ref), rule)
        archive = self.find_archive(files)
        # What is beside an archive is left out by the patterns as any file is.
        chosen = [file for file in files if archive is None or file is archive or ref.selects(file.entry.path)]
        marked = [
            self._archive(ref, file) if file is archive else limited
            for file, limited in zip(chosen, self.limit(chosen), strict=True)
        ]
        if self.digest is not None and not self._is_encoded(files[0]):
            marked = [self._pinned(marked[0], self.digest)]
        return tuple(marked)

    def limit(self, files: Sequence[RemoteFile]) -> list[RemoteFile]:
        """
        Set the limits of what the backend itself has marked: files of HTTP, and objects that are stored compressed.
        """
        return [file if file.unpack is None else attrs.evolve(file, unpack=self.limits) for file in files]

    def _archive(self, ref: ModelRef, file: RemoteFile) -> RemoteFile:
        name = self._name(file)
        if self._is_encoded(file) and name.lower().endswith(".zip"):
            raise PolicyError(str(ref), "it is a zip that is stored with another compression; upload it without that")
        if (what := _refused(name)) is not None:
            rule = f"{what} archives are not supported; repack it as `.tar.gz`, `.tar.xz`, `.tar.bz2` or `.zip`"
            raise PolicyError(str(ref), rule)
        check_readable(name)
        # Of a tar, the compression is found by its content.
        entry = attrs.evolve(file.entry, path=file.entry.path.with_name(name))
        return attrs.evolve(file, entry=entry, unpack=self.limits)

    def _is_encoded(self, file: RemoteFile) -> bool:
        """Whether a service stores it compressed and says that it is not: then its digest is that of its content."""
        return file.unpack is not None and self.service not in _WEB

    def _pinned(self, file: RemoteFile, digest: str) -> RemoteFile:
        if file.entry.sha256 not in (None, digest):
            raise DigestMismatchError(str(file.entry.path), digest, str(file.entry.sha256))
        return attrs.evolve(file, entry=attrs.evolve(file.entry, sha256=digest))


class _Unpacking:
    """
    A backend that marks its only file as an archive, if it is one.
    """

    def __init__(self, backend: Backend, marking: _Marking) -> None:
        self._backend = backend
        self._marking = marking
        for name in ABILITIES:
            if name != "pages" and hasattr(backend, name):
                setattr(self, name, getattr(backend, name))

    def resolve(self, ref: ModelRef) -> Resolved:
        found = self._resolve(ref)
        return attrs.evolve(found, ref=ref, files=self._marking.mark(ref, found.files))

    def _resolve(self, ref: ModelRef) -> Resolved:
        """Leave an archive to which the patterns belong, since they select its members."""
        if ref.allow_patterns or ref.ignore_patterns:
            try:
                found = self._backend.resolve(attrs.evolve(ref, allow_patterns=None, ignore_patterns=()))
                if self._marking.find_archive(found.files) is not None:
                    return found
            except (UnsafePathError, PolicyError, SourceDeniedError):
                pass  # What cannot be stored or listed may be what the patterns leave out.
        return self._backend.resolve(ref)

    def open_range(self, file: RemoteFile, start: int, stop: int) -> Any:
        return self._backend.open_range(file, start, stop)


class _PagedUnpacking(_Unpacking):
    """
    The same for a backend that lists page by page.
    """

    def __init__(self, backend: Backend, marking: _Marking, lister: SupportsPages) -> None:
        super().__init__(backend, marking)
        self._lister = lister

    def pages(self, ref: ModelRef) -> Iterator[Sequence[RemoteFile]]:
        if ref.allow_patterns or ref.ignore_patterns or self._marking.digest is not None:
            yield self.resolve(ref).files
            return
        pages = self._lister.pages(ref)
        first: list[RemoteFile] = []
        for page in pages:
            first += page
            if sum(1 for file in first if file.entry.size_bytes) > 1:
                break
        yield self._marking.mark(ref, first)
        yield from map(self._marking.limit, pages)
