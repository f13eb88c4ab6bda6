"""
What a store records besides its logs: the files of a model, claims and heartbeats, leases and journals.
"""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any

import attrs
from attrs.validators import and_, in_, instance_of, lt, matches_re, optional

from kserve_pvc._format.codec import (
    GENERATION,
    KEY,
    OMITTED,
    SHA256,
    build,
    decode,
    encode,
    number,
    size,
    text,
    timestamp,
)
from kserve_pvc._format.file_names import check_collisions, check_name
from kserve_pvc._format.log_entry import Holder, LogEntry, StoreSettings, now, to_holder

# What a manifest says of a source whose certificates were not checked.
UNVERIFIED = "unverified"

# Modules import all records from here; only what a hit loads imports `log_entry` itself.
__all__ = [
    "BEAT_BYTES",
    "MAX_MANIFEST_BYTES",
    "Beat",
    "Claim",
    "FileEntry",
    "FoundFile",
    "Holder",
    "LogEntry",
    "Manifest",
    "PartNote",
    "ReaderLease",
    "Record",
    "StoreSettings",
    "decode",
    "encode",
    "encode_beat",
    "now",
    "to_file",
    "to_files",
]

ACCESS = r"direct(:[A-Za-z0-9._-]{1,64})?|fsspec:[A-Za-z0-9._-]{1,64}"
EVIDENCE = re.compile(r"[a-z0-9]{1,16}:[0-9a-f]{8,128}")
MAX_MANIFEST_BYTES = 512 * 1024 * 1024
BEAT_BYTES = 256


def _path(value: str | PurePosixPath) -> PurePosixPath:
    if isinstance(value, PurePosixPath):
        check_name(str(value))
        return value
    if not isinstance(value, str):
        raise TypeError("a path must be a string")
    return check_name(value)


@attrs.frozen(kw_only=True)
class FileEntry:
    """
    One file of a model.

    `token` is what the source calls this content (an ETag, a version id); it identifies, but is not a digest.
    `evidence` is the digest the source vouches for and that the bytes were compared with, as `name:hex`. Without
    `sha256` the bytes were never hashed, because hashing was switched off. `executable` says that its owner could
    execute it at the source, where that is known.
    """

    path: PurePosixPath = attrs.field(converter=_path)
    size_bytes: int
    sha256: str | None = None
    token: str | None = None
    evidence: str | None = attrs.field(default=None, metadata=OMITTED)
    executable: bool = attrs.field(default=False, metadata=OMITTED)

    def __attrs_post_init__(self) -> None:
        # One function takes a third of the time of validators, and a manifest may have 250,000 files.
        size_bytes = self.size_bytes
        if type(size_bytes) is not int or not 0 <= size_bytes < 2**63:
            raise ValueError("`size_bytes` must be an integer from 0 up to 64 bits")
        if self.sha256 is not None and (not isinstance(self.sha256, str) or not SHA256.fullmatch(self.sha256)):
            raise ValueError("`sha256` must be 64 hex digits")
        if self.token is not None and not isinstance(self.token, str):
            raise TypeError("`token` must be a string")
        evidence = self.evidence
        if evidence is not None and (not isinstance(evidence, str) or not EVIDENCE.fullmatch(evidence)):
            raise ValueError("`evidence` must be a name and hex digits")
        if not isinstance(self.executable, bool):
            raise TypeError("`executable` must be a boolean")

    def with_digests(self, sha256: str | None, evidence: str | None) -> FileEntry:
        """
        Return this file with the digests of its bytes.
        """
        return attrs.evolve(self, sha256=sha256, evidence=evidence)


def to_file(body: dict[str, Any]) -> FileEntry | dict[str, Any]:
    """
    Make a file entry of an object that is read, if it has the fields of one.
    """
    return FileEntry(**body) if "size_bytes" in body and "path" in body else body


def to_files(value: Any) -> tuple[FileEntry, ...]:
    """
    Convert a JSON array of objects to file entries.
    """
    if not isinstance(value, list | tuple):
        raise TypeError("`files` must be a list")
    return tuple(f if isinstance(f, FileEntry) else build(FileEntry, f) for f in value)


@attrs.frozen(kw_only=True)
class Manifest:
    """
    Every file of one generation, in the order of their paths.

    `access` is how the source was reached: `direct`, `direct:<package>` or `fsspec:<package>`. Manifests of older
    versions, and of models that were imported, do not have it. `tls` is `unverified` if the certificates of the source
    were not checked. `archive_sha256` is the digest of the one file of the source, if the files of the model were
    unpacked from it.
    """

    key: str = attrs.field(validator=matches_re(KEY))
    generation: str = attrs.field(validator=matches_re(GENERATION))
    version: str = attrs.field(validator=text)
    files: tuple[FileEntry, ...] = attrs.field(converter=to_files)
    access: str | None = attrs.field(default=None, metadata=OMITTED, validator=optional(matches_re(ACCESS)))
    tls: str | None = attrs.field(default=None, metadata=OMITTED, validator=optional(in_((UNVERIFIED,))))
    archive_sha256: str | None = attrs.field(default=None, metadata=OMITTED, validator=optional(matches_re(SHA256)))

    def __attrs_post_init__(self) -> None:
        check_collisions(f.path for f in self.files)

    @property
    def size_bytes(self) -> int:
        return sum(f.size_bytes for f in self.files)


@attrs.frozen(kw_only=True)
class Record:
    """
    What a store recorded about a model: where it came from and what it consists of.

    `access` is how the source was reached: `direct` by requests of our own, `direct:<package>` by requests of our own
    that the package's fsspec class authorised, `fsspec:<package>` through that class. None where it is not recorded.
    `tls` is `unverified` if the certificates of the source were not checked, else None.
    `archive_sha256` is the digest of the archive that its files were unpacked from, if it was a single one.
    """

    uri: str
    revision: str | None
    allow_patterns: tuple[str, ...] | None
    ignore_patterns: tuple[str, ...]
    key: str
    version: str
    generation: str
    files: tuple[FileEntry, ...]
    size_bytes: int
    created_at: datetime
    writer: Holder
    access: str | None = None
    tls: str | None = None
    archive_sha256: str | None = None


@attrs.frozen(kw_only=True)
class Claim:
    """
    The claim of one process to download a model; the highest number is the current one.
    """

    epoch: int = attrs.field(validator=number)
    nonce: str = attrs.field(validator=matches_re(r"[0-9a-f]{32}"))
    uri: str = attrs.field(validator=text)
    holder: Holder = attrs.field(converter=to_holder)
    claimed_at: datetime = attrs.field(converter=timestamp)

    @property
    def generation(self) -> str:
        return f"{self.epoch:012d}-{self.nonce}"


@attrs.frozen(kw_only=True)
class Beat:
    """
    The heartbeat of a downloader or of a reader. What counts is that it changed, never the time in it.
    """

    count: int = attrs.field(validator=size)
    released: bool = attrs.field(default=False, validator=instance_of(bool))
    bytes_done: int = attrs.field(default=0, validator=size)
    bytes_total: int = attrs.field(default=0, validator=size)
    bytes_per_second: int = attrs.field(default=0, validator=size)


@attrs.frozen(kw_only=True)
class ReaderLease:
    """
    A reader's request to keep a generation while the reader is alive.
    """

    generation: str = attrs.field(validator=matches_re(GENERATION))
    holder: Holder = attrs.field(converter=to_holder)


@attrs.frozen(kw_only=True)
class PartNote:
    """
    One line of a journal: bytes `start` to `stop` (not included) of `path` are on the volume.

    They are checked by `sha256` if they are the beginning of the file, else by `crc32`. A store without hashing writes
    neither, and only such a store reuses them. A note of no bytes takes back what was noted of the file before.

    `is_durable` says that they were synced without an error before the note was made. Without it they may be in the
    page cache only, and a page that could not be written stays there, clean: then its digest proves nothing about the
    medium, and the bytes are copied into a file that is synced itself.
    """

    path: PurePosixPath = attrs.field(converter=_path)
    token: str = attrs.field(validator=text)
    start: int = attrs.field(default=0, metadata=OMITTED, validator=size)
    stop: int = attrs.field(validator=size)
    sha256: str | None = attrs.field(default=None, validator=optional(matches_re(SHA256)))
    crc32: int | None = attrs.field(default=None, metadata=OMITTED, validator=optional(and_(size, lt(2**32))))
    is_durable: bool = attrs.field(default=False, metadata=OMITTED, validator=instance_of(bool))

    def __attrs_post_init__(self) -> None:
        if self.start > self.stop or (self.start and self.sha256 is not None):
            raise ValueError("a note is for a beginning with `sha256`, or a range with `crc32`")


@attrs.frozen(kw_only=True)
class FoundFile:
    """
    What lies in a model's directory. `is_regular` is False for links, devices, pipes and sockets.
    """

    path: PurePosixPath
    size_bytes: int
    is_regular: bool


def encode_beat(beat: Beat) -> bytes:
    """
    Encode a heartbeat in exactly `BEAT_BYTES`, so that a single write replaces it in place.
    """
    return encode(beat).rstrip(b"\n").ljust(BEAT_BYTES - 1) + b"\n"
