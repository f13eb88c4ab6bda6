"""
What a caller asks for: a source URI, a revision, and which of its files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import PurePosixPath

import attrs

from kserve_pvc.errors import InvalidURIError, PolicyError, printable

MAX_URI_BYTES = 2048
_MAX_SLUG = 40
_NOT_IN_SLUG = re.compile(r"[^a-z0-9._]+")

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_URL_IN_TEXT = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)([^\s\"<>]*)")
_HOST_AND_PORT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:]*)(:[0-9]+)?")
# A password may hold anything, slashes and question marks included, so its end is the last `@`.
_USER_INFORMATION = re.compile(r"([^/:]*@)|([^/:]*:(?![0-9]+/).*@)", re.DOTALL)

Patterns = str | Iterable[str] | None


@attrs.frozen(slots=False, kw_only=True)
class ModelRef:
    """
    One model as it is asked for; equal refs share one key and one copy in a store.
    """

    uri: str
    revision: str | None = None
    allow_patterns: tuple[str, ...] | None = None
    ignore_patterns: tuple[str, ...] = ()

    @property
    def scheme(self) -> str:
        return self.uri.partition("://")[0]

    @property
    def location(self) -> str:
        """
        What follows the scheme and its slashes.
        """
        return self.uri.partition("://")[2]

    @cached_property
    def key(self) -> str:
        """
        The name of this model in a store: `<slug>-<16 hex digits>`.

        For a plain URI the digits are KServe's storage key: the first 16 hex digits of the SHA-256 of the URI exactly
        as it is spelled. A revision or patterns make another key, since they make another tree.
        """
        identity = self.uri
        if self.revision is not None or self.allow_patterns is not None or self.ignore_patterns:
            identity = json.dumps([self.uri, self.revision, self.allow_patterns, self.ignore_patterns])
        return f"{_slug(self.location)}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"

    def selects(self, path: PurePosixPath) -> bool:
        """
        Whether the patterns let this file through: allowed first, then not ignored, as Hugging Face does it.
        """
        name = str(path)
        if self.allow_patterns is not None and not any(fnmatchcase(name, p) for p in self.allow_patterns):
            return False
        return not any(fnmatchcase(name, p) for p in self.ignore_patterns)

    def __str__(self) -> str:
        return self.uri if self.revision is None else f"{self.uri} at {self.revision}"


def parse_ref(uri: str, *, revision: str | None = None, allow_patterns: Patterns = None, ignore_patterns: Patterns = None) -> ModelRef:
    """
    Check what a caller asks for, without touching disk or network.

    Args:
        uri: As KServe spells it. The spelling is the identity: a trailing slash makes another model.
        allow_patterns: Shell patterns over the path inside the model, `*` also matching `/`; one or several.
        ignore_patterns: The same, applied after `allow_patterns`.

    Raises:
        InvalidURIError: It is not a URI, or the revision is empty.
        PolicyError: It carries credentials. They are not repeated in the message.
    """
    match = _SCHEME.fullmatch(uri) if isinstance(uri, str) else None
    if match is None:
        # No scheme tells where a secret could be: a second colon may be a password's.
        shown = ":".join(re.split(r"[?#]", str(uri).rpartition("@")[2], maxsplit=1)[0].split(":")[:2])
        raise InvalidURIError(shown, "it must look like `scheme://location`, for example `s3://bucket/model`")
    scheme, location = match.groups()
    _check_location(scheme, location)
    if revision is not None and not (isinstance(revision, str) and revision and revision.isprintable()):
        raise InvalidURIError(uri, "the revision must be a printable text; leave it out to take the newest")
    return ModelRef(
        uri=uri,
        revision=revision,
        allow_patterns=None if allow_patterns is None else _patterns(allow_patterns),
        ignore_patterns=_patterns(ignore_patterns),
    )


def _check_location(scheme: str, location: str) -> None:
    def shown() -> str:
        return f"{scheme}://{_without_secrets(location)}"

    authority = location.partition("/")[0]
    # What follows a colon is a port or a password; a password may hold a slash and hide its `@` behind it.
    if "@" in authority or (not authority and "@" in location) or not _HOST_AND_PORT.fullmatch(authority):
        raise PolicyError(shown(), "credentials do not belong in a URI; use the provider's environment or `storage_options`")
    if "?" in location or "#" in location:
        raise PolicyError(shown(), "a query or fragment may carry a signature and would be stored; use `revision=` for a version")
    if scheme != scheme.lower():
        raise InvalidURIError(shown(), f"schemes are lower case; write `{scheme.lower()}://`")
    if not location.isprintable():
        raise InvalidURIError(shown(), "it holds control or unprintable characters")
    if len(location.encode()) > MAX_URI_BYTES:
        raise InvalidURIError(shown()[:80] + "...", f"it is longer than {MAX_URI_BYTES} bytes")


def _without_secrets(location: str) -> str:
    """Cut a location that is refused down to what can hold no secret, however it is spelled."""
    location = re.split(r"[?#]", location.rpartition("@")[2], maxsplit=1)[0]
    authority = location.partition("/")[0]
    return location if _HOST_AND_PORT.fullmatch(authority) else authority.partition(":")[0]


def _patterns(patterns: Patterns) -> tuple[str, ...]:
    if patterns is None:
        return ()
    if not isinstance(patterns, str | Iterable):
        raise InvalidURIError(repr(patterns), "patterns are one or several texts such as `*.safetensors`")
    several = [patterns] if isinstance(patterns, str) else list(patterns)
    if not all(isinstance(pattern, str) for pattern in several):
        raise InvalidURIError(repr(several), "patterns are texts such as `*.safetensors`")
    # A pattern that ends in `/` means the whole directory, as in huggingface_hub.
    return tuple(sorted({p + "*" if p.endswith("/") else p for p in several}))


def _slug(location: str) -> str:
    last = next((part for part in reversed(location.split("/")) if part), "")
    slug = _NOT_IN_SLUG.sub("-", last.lower()).strip("-._")
    return slug[:_MAX_SLUG].rstrip("-._") or "model"


def redact(text: str) -> str:
    """
    Remove what may be secret from every URL in a text: the user information, the query and the fragment.
    """

    def cleaned(match: re.Match[str]) -> str:
        scheme, rest = match.groups()
        return scheme + re.split(r"[?#]", _USER_INFORMATION.sub("", rest, count=1), maxsplit=1)[0]

    return printable(_URL_IN_TEXT.sub(cleaned, text))
