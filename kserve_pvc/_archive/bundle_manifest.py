"""
The manifest at the head of a bundle.
"""

from __future__ import annotations

from collections.abc import Iterable

import attrs
from attrs.validators import matches_re, optional

from kserve_pvc._format.codec import KEY, OMITTED, SHA256, size, strings, text
from kserve_pvc._format.file_names import check_collisions
from kserve_pvc._format.log_entry import LogEntry, to_tuple
from kserve_pvc._format.records import FileEntry, to_files
from kserve_pvc._source.contract import MAX_FILES
from kserve_pvc._source.ref import ModelRef, parse_ref
from kserve_pvc.errors import PolicyError


@attrs.frozen(kw_only=True)
class BundleManifest:
    """
    The first member of a bundle: which version of which model it holds, and every file of it with its SHA-256.

    It says nothing about the store, the time or the process that wrote it, so that the same version of a model gives
    the same bundle. Files that were unpacked from an archive need not match the patterns, which may have selected it.
    """

    uri: str = attrs.field(validator=text)
    revision: str | None = attrs.field(validator=optional(text))
    allow_patterns: tuple[str, ...] | None = attrs.field(converter=to_tuple, validator=optional(strings))
    ignore_patterns: tuple[str, ...] = attrs.field(converter=to_tuple, validator=strings)
    key: str = attrs.field(validator=matches_re(KEY))
    version: str = attrs.field(validator=text)
    size_bytes: int = attrs.field(validator=size)
    files: tuple[FileEntry, ...] = attrs.field(converter=to_files)
    archive_sha256: str | None = attrs.field(default=None, metadata=OMITTED, validator=optional(matches_re(SHA256)))

    def __attrs_post_init__(self) -> None:
        ref = self._parse_ref()
        if not 0 < len(self.files) <= MAX_FILES:
            raise ValueError(f"a model has 1 to {MAX_FILES} files")
        if any(file.sha256 is None or file.evidence is not None for file in self.files):
            raise ValueError("every file must have a `sha256` and no `evidence`")
        is_selected = self.archive_sha256 is not None or all(ref.selects(file.path) for file in self.files)
        if list(self.files) != sorted(self.files, key=_order) or not is_selected:
            raise ValueError("`files` are not sorted, or not all of them match the patterns")
        if sum(file.size_bytes for file in self.files) != self.size_bytes:
            raise ValueError("`size_bytes` is not the total size of `files`")
        check_collisions(file.path for file in self.files)

    @property
    def ref(self) -> ModelRef:
        """
        The reference under which a caller requests this model.
        """
        return ModelRef(
            uri=self.uri,
            revision=self.revision,
            allow_patterns=self.allow_patterns,
            ignore_patterns=self.ignore_patterns,
        )

    def _parse_ref(self) -> ModelRef:
        try:
            ref = parse_ref(
                self.uri,
                revision=self.revision,
                allow_patterns=self.allow_patterns,
                ignore_patterns=self.ignore_patterns,
            )
        except PolicyError as error:  # `InvalidURIError` is already a ValueError, as `decode` expects.
            raise ValueError(str(error)) from error
        if ref != self.ref or ref.key != self.key:
            raise ValueError("`key` does not match `uri` and patterns")
        return ref


def _order(file: FileEntry) -> str:
    # Component by component, as `order_listing` sorts the listing of a source.
    return str(file.path).replace("/", "\0")


def manifest_of(entry: LogEntry, files: Iterable[FileEntry], archive_sha256: str | None = None) -> BundleManifest:
    """
    Return the manifest of a bundle of a stored model.

    Raises:
        PolicyError: The model was never hashed, so an import could not verify it.
    """
    bare = [file.with_digests(file.sha256, None) for file in files]
    if any(file.sha256 is None for file in bare):
        rule = (
            "it was downloaded without hashing, so an import could not verify it; "
            "download it with `force_download=True` in a store that hashes"
        )
        raise PolicyError(entry.uri, rule)
    return BundleManifest(
        uri=entry.uri,
        revision=entry.revision,
        allow_patterns=entry.allow_patterns,
        ignore_patterns=entry.ignore_patterns,
        key=entry.key,
        version=entry.version,
        size_bytes=sum(file.size_bytes for file in bare),
        files=tuple(sorted(bare, key=_order)),
        archive_sha256=archive_sha256,
    )
