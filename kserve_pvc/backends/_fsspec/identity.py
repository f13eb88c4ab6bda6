"""
What tells the content of a file from other content, out of what a file system says about it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime

from kserve_pvc.backends._validators import identifies

# Fields that name content, or a version of it.
STRONG = {
    "blob_id",
    "checksum",
    "content_md5",
    "e_tag",
    "etag",
    "generation",
    "hex",
    "hexsha",
    "md5",
    "md5hash",
    "sha",
    "sha256",
    "version",
    "version_id",
    "versionid",
    "xet_hash",
}
# Fields that change with it, as far as clocks can tell. `time` is not one of them: where it is given, it is the time of
# the last read.
WEAK = {
    "crc",
    "created",
    "fileid",
    "ino",
    "last-modified",
    "last_modified",
    "lastmodified",
    "modificationtime",
    "modified",
    "modify",
    "mtime",
    "unique",
    "updated",
}
# The field, the best one first, whose value alone is the token that our own backend of the scheme gives a file. So a
# model has one version, whichever way it was listed.
_OWN_TOKENS = {
    "abfs": ("version_id", "etag"),
    "abfss": ("version_id", "etag"),
    "az": ("version_id", "etag"),
    "gs": ("generation",),
    "hf": ("sha256", "blob_id"),
    "http": ("ETag",),
    "https": ("ETag",),
    "s3": ("VersionId", "ETag"),
}
_SHA256 = re.compile(r"[0-9a-f]{64}")


def identity(info: Mapping[str, object]) -> Mapping[str, str]:
    """
    Return the strong fields of what is said about a file, or else all weak ones.
    """
    said = {field: text for field, value in info.items() if (text := as_text(value)) is not None}
    if (digest := large_file_digest(info)) is not None:
        said["sha256"] = digest
    size = info.get("size")
    strong = {
        field: text
        for field, text in said.items()
        if field.lower() in STRONG and identifies(text, size if isinstance(size, int) else 0)
    }
    return strong or {field: text for field, text in said.items() if field.lower() in WEAK}


def token(protocol: str, said: Mapping[str, str]) -> str | None:
    """
    Write an identity as the token of a file; None if nothing is said.
    """
    for field in _OWN_TOKENS.get(protocol, ()):
        if field in said:
            return said[field]
    return " ".join(f"{field}={text}" for field, text in sorted(said.items())) or None


def large_file_digest(info: Mapping[str, object]) -> str | None:
    """
    Return the SHA-256 of a file in the large file storage of a hub, if it is said.
    """
    large = info.get("lfs")
    digest = large.get("sha256") if isinstance(large, Mapping) else None
    return digest if isinstance(digest, str) and _SHA256.fullmatch(digest) else None


def as_text(value: object) -> str | None:
    """
    Write a value so that a listing and a single response that say the same compare equal.
    """
    if isinstance(value, datetime):
        value = value.timestamp()
    if isinstance(value, bytes | bytearray):
        return value.hex()
    if isinstance(value, str):
        return value.strip('"') or None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return repr(value) if isinstance(value, int | float) else None
