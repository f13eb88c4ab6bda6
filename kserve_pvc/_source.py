"""
What a back end is, and what it says about a model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import attrs

from kserve_pvc._names import check_collisions
from kserve_pvc._record import FileEntry
from kserve_pvc._ref import ModelRef
from kserve_pvc.errors import PolicyError, SourceNotFoundError

MAX_FILES = 250_000


@attrs.frozen(kw_only=True)
class RemoteFile:
    """
    One file at the source, pinned to the content it had when it was listed.

    `address` is the back end's own name for it; `pin` is what makes a later read fail rather than return other
    content (an ETag, a version id, an inode with its times).
    """

    entry: FileEntry
    address: str
    pin: Mapping[str, str]


@attrs.frozen(kw_only=True)
class Resolved:
    """
    What the source of a model holds now.

    `version` is the source's own name for it, such as a commit, or a SHA-256 over path, size and token of every file.
    """

    ref: ModelRef
    version: str
    files: tuple[RemoteFile, ...]

    @property
    def size_bytes(self) -> int:
        return sum(f.entry.size_bytes for f in self.files)


def resolved(ref: ModelRef, files: Iterable[RemoteFile], *, version: str | None = None) -> Resolved:
    """
    Put a back end's listing in order: patterns applied, names checked against each other, version computed.

    Raises:
        SourceNotFoundError: Nothing is left.
        UnsafePathError: Two names collide.
        PolicyError: More than `MAX_FILES` are listed; neither a listing nor a manifest may grow without bound.
    """
    chosen = []
    for number, file in enumerate(files):
        if number >= MAX_FILES:
            raise PolicyError(str(ref), f"it has more than {MAX_FILES} files; name a smaller part of it")
        if ref.selects(file.entry.path):
            chosen.append(file)
    chosen.sort(key=lambda f: f.entry.path)
    if not chosen:
        raise SourceNotFoundError(str(ref), "no file is there, or the patterns let none through")
    check_collisions(f.entry.path for f in chosen)
    return Resolved(ref=ref, version=version or _version(chosen), files=tuple(chosen))


def _version(files: Iterable[RemoteFile]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(json.dumps([str(file.entry.path), file.entry.size_bytes, file.entry.token]).encode())
    return "sha256:" + digest.hexdigest()


class RangeReader(Protocol):
    """
    One answer of the source, being read.
    """

    def readinto(self, buffer: memoryview) -> int:
        """Fill the start of a buffer with the bytes that come next; 0 means the answer is over."""


class Backend(Protocol):
    """
    The plug-in for one URI scheme.

    Methods are called from several threads at once. Every failure is raised as one of the `Source…Error` classes,
    translated here and nowhere else.
    """

    def resolve(self, ref: ModelRef) -> Resolved:
        """List a model and pin what is there. No write, neither here nor there."""

    def open_range(self, file: RemoteFile, start: int, stop: int) -> AbstractContextManager[RangeReader]:
        """
        Read bytes `start` to `stop` (not included) of the pinned content.

        Raises:
            SourceChangedError: The source holds something else by now.
        """


BackendFactory = Callable[[Mapping[str, Any]], Backend]
