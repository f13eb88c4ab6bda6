"""
What an initializer records of a destination: the models and files in it, and those that it is about to have.

A model server sees every name in its model directory. Triton takes each directory for a model, hidden ones too, and
other servers select files by their suffix. So a complete destination has one plain file of ours, without a suffix. The
directory that preparing a model needs is there only meanwhile.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

import attrs
from attrs.validators import instance_of, matches_re, optional

from kserve_pvc._format import layout
from kserve_pvc._format.codec import OMITTED, SHA256, build, text
from kserve_pvc._format.file_names import check_collisions, check_name, fold
from kserve_pvc._format.records import FileEntry, to_files
from kserve_pvc.errors import UnsafePathError

RECORD = PurePosixPath(".kserve-pvc-initialized")
OURS = PurePosixPath(".kserve-pvc-initialize")
WORK = OURS / "work"
INTENDED = OURS / "plan.json"
NEXT = OURS / "next"
# Where the record was before it became a file next to the model. It is read, and moved by the next start.
OLD_RECORD = OURS / "record.json"
# What a file of a model may be called at no level: it would be read as a record of a store or of an initializer.
RESERVED = frozenset(fold(name) for name in (RECORD.name, OURS.name, layout.META.name))


def check_unreserved(path: PurePosixPath) -> None:
    """
    Refuse a path whose name, or that of a directory on it, is one of ours.

    Raises:
        UnsafePathError: It is, on some volume.
    """
    reserved = next((part for part in path.parts if fold(part) in RESERVED), None)
    if reserved is not None:
        raise UnsafePathError(str(path), f"`{reserved}` is reserved for stores and their initializer")


@attrs.frozen(kw_only=True)
class Source:
    """
    One model in a destination. The key identifies it, patterns included.

    Args:
        archive_sha256: The digest of the archive from which its files were unpacked.
    """

    key: str = attrs.field(validator=text)
    uri: str = attrs.field(validator=text)
    version: str = attrs.field(validator=text)
    archive_sha256: str | None = attrs.field(default=None, metadata=OMITTED, validator=optional(matches_re(SHA256)))


def _sources(value: Any) -> tuple[Source, ...]:
    return tuple(item if isinstance(item, Source) else build(Source, item) for item in _listed(value))


def _listed(value: Any) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise TypeError("it must be a list")
    return value


def _to_paths(value: Any) -> tuple[str, ...]:
    return tuple(str(check_name(path)) for path in _listed(value))


@attrs.frozen(kw_only=True)
class Contents:
    """
    The models and files of a destination. Its record is written when they are complete.
    """

    sources: tuple[Source, ...] = attrs.field(converter=_sources)
    files: tuple[FileEntry, ...] = attrs.field(converter=to_files)
    # Whether the files are symbolic links into a store.
    is_linked: bool = attrs.field(default=False, validator=instance_of(bool))

    def __attrs_post_init__(self) -> None:
        check_collisions(f.path for f in self.files)
        for file in self.files:
            check_unreserved(file.path)


@attrs.frozen(kw_only=True)
class Intended:
    """
    What a destination is about to hold.

    Args:
        paths: All files that an initializer may have put there.
        sources: The models that it is being filled with.
        is_served: Whether it was complete before, with any models, so that servers may be reading it.
    """

    paths: tuple[str, ...] = attrs.field(converter=_to_paths)
    sources: tuple[Source, ...] = attrs.field(default=(), converter=_sources)
    is_served: bool = attrs.field(default=False, validator=instance_of(bool))
