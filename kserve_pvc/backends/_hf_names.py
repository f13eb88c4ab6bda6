"""
How a URI names a model on the hub.
"""

from __future__ import annotations

import re

import attrs

from kserve_pvc._format.file_names import check_name
from kserve_pvc._source.ref import ModelRef
from kserve_pvc.errors import InvalidURIError

# As KServe reads it, `org/name:` has no revision.
_LOCATION = re.compile(r"([^/:@]+/[^/:@]+)(?:[:@](refs/(?:pr/[0-9]+|convert/[\w.-]+)|[^/]+)|:)?(?:/(.*))?")
_REPOSITORY = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9._-]{0,95}/){2}")
_OTHER_KINDS = ("models", "datasets", "spaces", "kernels", "buckets")


@attrs.frozen
class HubLocation:
    """
    What a URI names: a repository, a revision, and a path inside, which ends in a slash if it must be a directory.
    """

    repository: str
    revision: str
    path: str


def parse_location(ref: ModelRef) -> HubLocation:
    """
    Take a URI of the hub apart.

    Raises:
        InvalidURIError: It does not name a model, or contradicts its `revision`.
        UnsafePathError: Its path cannot be one.
    """
    match = _LOCATION.fullmatch(ref.location)
    if match is None or not is_repository(match[1]):
        raise InvalidURIError(
            ref.uri, "no model is named; use `hf://org/name`, `hf://org/name:revision` or `hf://org/name/directory`"
        )
    repository, named, path = match[1], match[2], match[3] or ""
    if repository.partition("/")[0] in _OTHER_KINDS:
        raise InvalidURIError(
            ref.uri, "only models are supported, without a prefix for their kind; use `hf://org/name`"
        )
    if named is not None and ref.revision not in (None, named):
        raise InvalidURIError(ref.uri, f"the URI names revision `{named}`, the argument `{ref.revision}`; omit one")
    revision = named or ref.revision or "main"
    if revision.startswith(".") or ".." in revision:
        raise InvalidURIError(ref.uri, "a revision cannot begin with a dot or contain two in a row")
    if path:
        check_name(path.removesuffix("/"))
    return HubLocation(repository, revision, path)


def is_repository(name: str) -> bool:
    """
    Return whether this can be the name of a repository.
    """
    return _REPOSITORY.fullmatch(f"{name}/") is not None


def repository_and_path(address: str) -> tuple[str, str]:
    """
    Split the address of a file into its repository and its path inside.
    """
    organisation, name, path = address.split("/", 2)
    return f"{organisation}/{name}", path
