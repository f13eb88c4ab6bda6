"""
Whether what was recorded of a model is what `VERIFICATION_DIGEST` promises: the SHA-256 of the one file of its source.
"""

from __future__ import annotations

from collections.abc import Sequence

from kserve_pvc._format.records import FileEntry
from kserve_pvc._source.redaction import redact
from kserve_pvc.errors import PolicyError


def has_digest(digest: str, files: Sequence[FileEntry], archive_sha256: str | None) -> bool:
    """
    Whether this is the digest of the archive from which the files were unpacked, or of the only file.
    """
    return digest in (archive_sha256, files[0].sha256 if len(files) == 1 else None)


def found_digest(files: Sequence[FileEntry], archive_sha256: str | None) -> str:
    """
    Describe what was found instead.
    """
    if archive_sha256 is not None:
        return archive_sha256
    return str(files[0].sha256) if len(files) == 1 else f"{len(files)} files"


def digest_refusal(uri: str, files: Sequence[FileEntry], archive_sha256: str | None, remedy: str) -> PolicyError:
    """
    Make the error of a model that is present and has another digest.
    """
    found = found_digest(files, archive_sha256)
    rule = f"`VERIFICATION_DIGEST` is the SHA-256 of one file or archive, but what is present has `{found}`; {remedy}"
    return PolicyError(redact(uri), rule)
