"""
What a backend is, and how it describes a model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import attrs

from kserve_pvc._format.file_names import MAX_NAME_BYTES, check_collisions
from kserve_pvc._format.records import FileEntry
from kserve_pvc._source.ref import ModelRef
from kserve_pvc.errors import PolicyError, SourceNotFoundError

MAX_FILES = 250_000
# Why nothing is found where something is listed.
EXCLUDED = "it has no files, or the patterns exclude them all"


@attrs.frozen(kw_only=True)
class UnpackLimits:
    """
    Limits for unpacking an archive. `ratio` is relative to its own size, `path_bytes` is for one name.
    """

    entries: int = 100_000
    size_bytes: int = 2**40
    ratio: float = 100.0
    path_bytes: int = MAX_NAME_BYTES


@attrs.frozen(kw_only=True)
class RemoteFile:
    """
    One file at the source, pinned to the content it had when it was listed.

    `address` is the backend's own name for it; `pin` makes a later read fail rather than return other content (an
    ETag, a version id, an inode with its times). `digest` is the digest in the listing, as `name:hex` with `md5`,
    `crc32` or `sha256`, if there is one. `in_ranges` is False if the source sends only the whole file: one stream then
    reads it from its beginning. A file with `unpack` is an archive, and its members are the files of the model;
    patterns apply to them, and it is deleted once they are written.
    """

    entry: FileEntry
    address: str
    pin: Mapping[str, str]
    digest: str | None = None
    in_ranges: bool = True
    unpack: UnpackLimits | None = None


@attrs.frozen(kw_only=True)
class Resolved:
    """
    The files that the source of a model holds now.

    `version` is the source's own name for it, such as a commit, or a SHA-256 over path, size and token of every file.
    `archive_sha256` is the digest of the archive from which a bundle has the files.
    """

    ref: ModelRef
    version: str
    files: tuple[RemoteFile, ...]
    archive_sha256: str | None = None

    @property
    def size_bytes(self) -> int:
        return sum(f.entry.size_bytes for f in self.files)


def order_listing(ref: ModelRef, files: Iterable[RemoteFile], *, version: str | None = None) -> Resolved:
    """
    Put a backend's listing in order: patterns applied, names checked against each other, version computed.

    Raises:
        SourceNotFoundError: Nothing is left.
        UnsafePathError: Two names collide.
        PolicyError: More than `MAX_FILES` are listed; neither a listing nor a manifest may grow without bound.
    """
    listing = Listing(ref)
    listing.add(files)
    return listing.resolved(version=version)


class Listing:
    """
    A backend's listing, page by page.
    """

    def __init__(self, ref: ModelRef) -> None:
        self._ref = ref
        self._number = 0
        self._chosen: list[RemoteFile] = []

    def add(self, files: Iterable[RemoteFile]) -> Sequence[RemoteFile]:
        """
        Add files, and return those that the patterns select.

        Raises:
            PolicyError: More than `MAX_FILES` are listed.
        """
        before = len(self._chosen)
        for file in files:
            self._number += 1
            if self._number > MAX_FILES:
                raise PolicyError(str(self._ref), f"it has more than {MAX_FILES} files; name a smaller part of it")
            if file.unpack is not None or self._ref.selects(file.entry.path):
                self._chosen.append(file)
        return self._chosen[before:]

    def resolved(self, *, version: str | None = None) -> Resolved:
        """
        Return what the source holds, once all of it is listed.

        Raises:
            SourceNotFoundError: Nothing is left.
            UnsafePathError: Two names collide.
        """
        # As paths are ordered, part by part, which comparing paths takes five times as long for.
        chosen = sorted(self._chosen, key=lambda f: str(f.entry.path).replace("/", "\0"))
        if not chosen:
            raise SourceNotFoundError(str(self._ref), EXCLUDED + _say_slashes(self._ref))
        check_collisions(f.entry.path for f in chosen)
        return Resolved(ref=self._ref, version=version or _version(chosen), files=tuple(chosen))


def _say_slashes(ref: ModelRef) -> str:
    """A slash too many is a part of the name in an object store, and no directory there is called so."""
    name = ref.location.partition("/")[2]
    if ref.service == "file" or "//" not in f"/{name.rstrip('/')}":
        return ""
    where = "begins with a slash" if name.startswith("/") else "holds two slashes in a row"
    return f"; its path `{name}` {where}, which is part of the name there: if it should not be, leave the slash out"


def _version(files: Iterable[RemoteFile]) -> str:
    digest, quoted = hashlib.sha256(), json.encoder.encode_basestring_ascii
    for file in files:
        entry = file.entry
        token = "null" if entry.token is None else quoted(entry.token)
        # One JSON list for each file, as `json.dumps` writes it.
        digest.update(f"[{quoted(str(entry.path))}, {entry.size_bytes}, {token}]".encode())
    return "sha256:" + digest.hexdigest()


class RangeReader(Protocol):
    """
    A response of the source, being read.
    """

    def readinto(self, buffer: memoryview) -> int | None:
        """
        Fill the start of a buffer with the bytes that come next.

        0 is the end of the response; None means that nothing arrived for one poll interval (about a quarter of a
        second), so that the caller can check for cancellation and call again. A reader without timeouts blocks.
        """


class Checksum(Protocol):
    """
    A digest that is computed piece by piece, as those of `hashlib`.
    """

    def update(self, piece: memoryview, /) -> None: ...

    def hexdigest(self) -> str: ...

    def copy(self) -> Checksum: ...


class Backend(Protocol):
    """
    The plug-in for one URI scheme.

    Methods are called from several threads at once. Every failure is raised as one of the `Source…Error` classes,
    translated here and nowhere else.

    A backend may also have any of the optional abilities, each a type of its own: `SupportsPages`, `SupportsEvidence`,
    `SupportsChecksums`, `SupportsTuning`, `SupportsAccess` and `SupportsClose`.
    """

    def resolve(self, ref: ModelRef) -> Resolved:
        """List a model and pin what is there. No write, neither here nor there."""

    def open_range(self, file: RemoteFile, start: int, stop: int) -> AbstractContextManager[RangeReader]:
        """
        Read bytes `start` to `stop` (not included) of the pinned content.

        Raises:
            SourceChangedError: The source holds something else by now.
        """


@runtime_checkable
class SupportsPages(Protocol):
    """
    A backend that lists page by page, so that files are fetched while the next page is requested.
    """

    def pages(self, ref: ModelRef) -> Iterator[Sequence[RemoteFile]]: ...


@runtime_checkable
class SupportsEvidence(Protocol):
    """
    A backend that can request the digest of a file, where the listing has none that is cheap or certain enough.
    """

    def evidence(self, file: RemoteFile) -> str | None:
        """
        Return a digest as `name:hex`, or None if the source has none.
        """


@runtime_checkable
class SupportsChecksums(Protocol):
    """
    A backend whose digests are not all among `sha256`, `md5` and `crc32`.
    """

    def checksum(self, name: str) -> Checksum | None:
        """
        Make an empty checksum, or return None if the name is unknown.
        """


@runtime_checkable
class SupportsTuning(Protocol):
    """
    A backend whose patience can be set, in seconds.
    """

    def tune(self, *, stall_seconds: float, retry_seconds: float) -> None: ...


@runtime_checkable
class SupportsAccess(Protocol):
    """
    A backend that can reach its source in more than one way.
    """

    def access(self, ref: ModelRef) -> str:
        """
        Return the way that was taken, for the record.

        `direct`: requests of our own with plain settings. `direct:<package>`: requests of our own, with credentials
        and listing by that package's fsspec class. `fsspec:<package>`: everything through that class, in ranges.
        """


@runtime_checkable
class SupportsCertificates(Protocol):
    """
    A backend that can be told not to check the certificates of its source.
    """

    def checks_certificates(self, ref: ModelRef) -> bool:
        """
        Return whether the certificates are checked, for the record.
        """


@runtime_checkable
class SupportsClose(Protocol):
    """
    A backend that keeps connections, which are released once a download is over.
    """

    def close(self) -> None: ...


# The methods of the abilities, for a backend that stands in front of another one and has whichever the other has.
ABILITIES = ("pages", "evidence", "checksum", "tune", "access", "checks_certificates", "close")

BackendFactory = Callable[[Mapping[str, Any]], Backend]
