"""
The sources that KServe passes: their URIs, read as KServe reads them, before any request.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import attrs

from kserve_pvc._archive.unpack import is_archive as is_web_archive
from kserve_pvc._source.redaction import redact
from kserve_pvc._source.ref import ModelRef, parse_ref, show_source
from kserve_pvc.errors import InvalidURIError
from kserve_pvc.kserve._environment import Variables
from kserve_pvc.kserve._schemes import check_supported

# The services where KServe applies no patterns to an object that the URI names.
_NAMING = ("s3", "gs", "http", "https")
# What YAML leaves at the end of a block, and never is part of a URI.
_LINE_BREAKS = "\r\n\t"
# Slashes in front of a prefix in S3 and Azure, which KServe does not count as a part of it.
_LEADING = re.compile(r"\A(s3://[^/?#]+/|https://[^/?#]+\.blob\.[^/?#]+/+[^/?#]+/)/+")


@attrs.frozen(kw_only=True)
class CheckedSource:
    """
    A source whose URI was checked.
    """

    ref: ModelRef

    @property
    def shown(self) -> str:
        return redact(self.ref.uri)

    @property
    def is_filtered(self) -> bool:
        return self.ref.allow_patterns is not None or bool(self.ref.ignore_patterns)

    @property
    def keys(self) -> set[str]:
        """The keys that a store may have it under: a URI of a single object is downloaded without patterns."""
        return {self.ref.key, attrs.evolve(self.ref, allow_patterns=None, ignore_patterns=()).key}

    @property
    def may_be_object(self) -> bool:
        """Whether KServe applies no patterns to an object of this service that the URI names."""
        is_web = self.ref.service in ("http", "https")
        return self.ref.service in _NAMING and not (is_web and is_web_archive(self._name))

    @property
    def _name(self) -> str:
        return self.ref.location.partition("#")[0].rpartition("/")[2]

    def is_one_object(self, paths: Iterable[PurePosixPath]) -> bool:
        """Whether the source is a single object, and these are its paths."""
        names = [str(path) for path in paths]
        return len(names) == 1 if self.ref.service in ("http", "https") else names == [self._name]


def read_source(source: str, variables: Variables) -> CheckedSource:
    """
    Check the URI of a source, without a request.

    Raises:
        InvalidURIError: It is malformed.
        UnknownSchemeError: This initializer does not support its scheme.
        PolicyError: It carries credentials.
    """
    source = _LEADING.sub(r"\1", source.strip(_LINE_BREAKS))
    if ".." in source.split("://", 1)[-1].split("/"):
        raise InvalidURIError(show_source(source), "its path contains `..`")
    check_supported(source)
    if source and "://" not in source and Path(source).exists():
        source = os.path.abspath(source)
    ref = parse_ref(source, allow_patterns=variables.allow_patterns, ignore_patterns=variables.ignore_patterns)
    variables.check(ref.scheme)
    return CheckedSource(ref=ref)
