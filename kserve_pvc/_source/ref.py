"""
What a caller requests: a source URI, a revision, and which of its files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache
from pathlib import PurePosixPath
from urllib.parse import unquote

import attrs

from kserve_pvc.errors import InvalidURIError, PolicyError, SettingsError, printable

MAX_URI_BYTES = 2048
_MAX_SLUG = 40
_NOT_IN_SLUG = re.compile(r"[^a-z0-9._]+")

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_HOST_AND_PORT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:]*)(:[0-9]+)?")

# Before a colon without slashes they are a scheme that is mistyped, and no name of a user.
_KNOWN_SCHEMES = frozenset(("s3", "gs", "hf", "http", "https", "az", "abfs", "abfss", "pvc", "file"))
# Where a pattern stops being a plain name.
_WILD = re.compile(r"[*?\[]")
# What may follow a `#`: a digest is public, and part of the request.
_DIGEST_FRAGMENT = re.compile(r"query=[0-9a-f]{16}(?:&sha256=[0-9a-f]{64})?|sha256=[0-9a-f]{64}")
# Parameters that sign a link, or let its bearer in, and do not select what is read. A link that is signed anew names
# the same model.
_SIGNING = re.compile(
    r"x-(?:amz|goog|oss|obs|tos|ms)-.*|q-(?:sign|ak|key|header|url|signature).*|(?:aws|oss)?access_?key_?id|googleaccessid"
    r"|signature|sig|expires?|exp|policy|key-pair-id|hash-algorithm|security-token|token|access_token|auth|authorization"
    r"|api_?key|response-(?:content|cache|expires).*|hmac|hdnts|__token__",
    re.IGNORECASE,
)
# Those of a shared access signature of Azure, which are too short to mean anything without one.
_AZURE_SIGNING = re.compile(r"s[a-z]{1,5}|rs[a-z]{2}")
_MAX_QUERY_BYTES = 16 * 1024
# The hosts of Azure accounts, as KServe knows them, whose addresses may bring a shared access signature as their query.
_AZURE_HOST = re.compile(r"[a-z0-9]+\.(?:blob\.core\.windows\.net|z[0-9]{1,2}\.blob\.storage\.azure\.net)")
# `s3://arn:aws:s3:region:account:accesspoint/name/key`, also with a colon before the name.
_ACCESS_POINT = re.compile(
    r"arn:aws[a-z-]*:s3[a-z-]*:[a-z0-9-]*:[0-9]{12}:(?:accesspoint|outpost)(?::[A-Za-z0-9.-]+)*", re.ASCII
)
# `abfss://container@account.dfs.core.windows.net`: the one scheme whose `@` does not end user information.
_AZURE_AUTHORITY = re.compile(r"[a-z0-9$-]{3,63}@[a-z0-9]+\.(?:dfs|blob)\.core\.windows\.net")

Patterns = str | Iterable[str] | None


@attrs.frozen(slots=False, kw_only=True)
class ModelRef:
    """
    One model as it is requested; equal refs share one key and one copy in a store.

    `query` is what followed the address of an Azure blob or a web page: it may hold a signature, so it is neither shown
    nor stored. What signs a link makes no other model. Other parameters do: `uri` then ends in `#query=` and a digest.
    """

    uri: str
    revision: str | None = None
    allow_patterns: tuple[str, ...] | None = None
    ignore_patterns: tuple[str, ...] = ()
    query: str | None = attrs.field(default=None, repr=False, eq=False)

    @property
    def signed_uri(self) -> str:
        """
        The URI with its query, which is a secret.
        """
        address, mark, fragment = self.uri.partition("#")
        return self.uri if self.query is None else f"{address}?{self.query}{mark}{fragment}"

    @property
    def scheme(self) -> str:
        return self.uri.partition("://")[0]

    @property
    def service(self) -> str:
        """
        The name of the backend: the scheme, but `az` for `https` addresses of Azure accounts, and `fsspec` for what
        fsspec serves without a backend of ours.
        """
        if self.scheme == "https" and _AZURE_HOST.fullmatch(self.location.partition("/")[0]):
            return "az"
        return "fsspec" if self.scheme.startswith("fsspec+") else self.scheme

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

    def selects(self, path: PurePosixPath | str) -> bool:
        """
        Whether the patterns let this file through: allowed first, then not ignored, as Hugging Face does it.

        A string is a name as the source spells it. Backends call this before they make a `FileEntry`, which refuses
        unsafe names: a file that the patterns leave out may have any name. Empty parts of a name are not compared.
        """
        if self.allow_patterns is None and not self.ignore_patterns:
            return True
        name = join_parts(str(path))
        if self.allow_patterns is not None and not any(fnmatchcase(name, join_parts(p)) for p in self.allow_patterns):
            return False
        return not any(fnmatchcase(name, join_parts(p)) for p in self.ignore_patterns)

    def may_select_below(self, directory: str) -> bool:
        """
        Whether the patterns may let a file of this directory through, if it has one.

        A directory that cannot be listed is left out only where this is False.
        """
        below = directory.rstrip("/") + "/"
        if any(fnmatchcase(below, p) for p in self.ignore_patterns if p.endswith("*")):
            return False
        starts = None if self.allow_patterns is None else [_WILD.split(p, maxsplit=1) for p in self.allow_patterns]
        return starts is None or any(
            start.startswith(below) or (bool(wild) and below.startswith(start)) for start, *wild in starts
        )

    def __str__(self) -> str:
        return self.uri if self.revision is None else f"{self.uri} at {self.revision}"


def join_parts(name: str) -> str:
    """
    Leave the empty parts out of a name, as every file system does: `a//b` is `a/b`.
    """
    return re.sub("/{2,}", "/", name) if "//" in name else name


# What names a model: a URI or an absolute path, or a ref that was made before.
Source = str | os.PathLike[str] | ModelRef


def parse_ref(
    uri: Source, *, revision: str | None = None, allow_patterns: Patterns = None, ignore_patterns: Patterns = None
) -> ModelRef:
    """
    Check what a caller requests, without touching disk or network.

    Args:
        uri: As KServe spells it, or an absolute path; or a `ModelRef`, which has the other arguments in itself. The
            spelling of a URI is its identity: a trailing slash makes another model. A path has no spelling: `/a`, `/a/`
            and `file:///a/` are one model.
        allow_patterns: Shell patterns over the path inside the model, `*` also matching `/`; one or several.
        ignore_patterns: The same, applied after `allow_patterns`.

    Raises:
        InvalidURIError: It is not a URI, or the revision is empty.
        PolicyError: It carries credentials. They are not repeated in the message.
        SettingsError: A `ModelRef` came with a revision or patterns.
    """
    if type(uri) is not str:
        # A `Model` is a path too, but stands for what it is a copy of.
        given = uri if isinstance(uri, ModelRef) else getattr(uri, "ref", None)
        if isinstance(given, ModelRef):
            selection = {"revision": revision, "allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
            return _check_ref(given, selection)
    spelled = _spelling(uri)
    if type(spelled) is str and "?" not in spelled and revision is allow_patterns is ignore_patterns is None:
        return _parse_plain(spelled)
    return _parse(spelled, revision, allow_patterns, ignore_patterns)


@lru_cache(maxsize=256)
def _parse_plain(uri: str) -> ModelRef:
    # A server requests the same model again and again. What may hold a signature is not kept.
    return _parse(uri, None, None, None)


def _check_ref(ref: ModelRef, selection: Mapping[str, Patterns]) -> ModelRef:
    """Check a ref, which may not have been made by `parse_ref`."""
    for name, value in selection.items():
        if value is not None:
            raise SettingsError(name, str(value), "omit it, since a `ModelRef` has its own; see `attrs.evolve`")
    return _parse(ref.signed_uri, ref.revision, ref.allow_patterns, ref.ignore_patterns)


def _spelling(uri: object) -> object:
    """A path as a string; everything else as it is."""
    if isinstance(uri, str) or not isinstance(uri, os.PathLike):
        return uri
    path = os.fspath(uri)
    if not (isinstance(path, str) and path.startswith("/")):
        from kserve_pvc._source.redaction import redact

        shown = path if isinstance(path, str) else os.fsdecode(path)
        raise InvalidURIError(redact(shown), "a path must be an absolute one; pass a URI as a string")
    return path


def _parse(uri: object, revision: str | None, allow_patterns: Patterns, ignore_patterns: Patterns) -> ModelRef:
    if isinstance(uri, str) and uri.startswith("/"):
        uri = f"file://{uri}"
    match = _SCHEME.fullmatch(uri) if isinstance(uri, str) else None
    if match is None:
        raise InvalidURIError(
            _show_malformed(str(uri)), "it must look like `scheme://location`, for example `s3://bucket/model`"
        )
    scheme, location = match.groups()
    address, query = _take_signature(scheme, location)
    _check_location(scheme, address)
    if scheme == "file" and address.startswith("/"):
        address = "/" + "/".join(part for part in address.split("/") if part not in ("", "."))
    uri = f"{scheme}://{address}"
    if revision is not None and not (isinstance(revision, str) and revision and revision.isprintable()):
        raise InvalidURIError(uri, "the revision must be a printable string; omit it for the newest")
    return ModelRef(
        uri=uri,
        revision=revision,
        allow_patterns=None if allow_patterns is None else _patterns(allow_patterns),
        ignore_patterns=_patterns(ignore_patterns),
        query=query,
    )


def _take_signature(scheme: str, location: str) -> tuple[str, str | None]:
    """Take the query off an address that may be signed; any other query stays, and is refused."""
    if scheme in ("http", "https") and not _AZURE_HOST.fullmatch(location.partition("/")[0]):
        return _take_query(location)
    address, _, query = location.partition("?")
    is_signed = (
        scheme == "https"
        and _AZURE_HOST.fullmatch(location.partition("/")[0])
        and re.search(r"(?:^|&)sig=[^&#]", query)
    )
    return (
        (address, query)
        if is_signed and "#" not in query and query.isascii() and query.isprintable()
        else (location, None)
    )


def _take_query(location: str) -> tuple[str, str | None]:
    before, _, rest = location.partition("?")
    query, _, fragment = rest.partition("#")
    if "?" in location and not query and "#" not in before:
        # A question mark with nothing behind it.
        return before + (f"#{fragment}" if fragment else ""), None
    is_query = query.isascii() and query.isprintable() and not {" ", "@"} & set(query)
    if not query or not is_query or len(query) > _MAX_QUERY_BYTES or "/" not in before or "#" in before:
        return location, None
    selecting = _selecting(query)
    parts = [f"query={hashlib.sha256(selecting.encode()).hexdigest()[:16]}"] if selecting else []
    parts += [part for part in fragment.split("&") if part and not part.startswith("query=")]
    return before + ("#" + "&".join(parts) if parts else ""), query


def _selecting(query: str) -> str:
    """The parameters of a query that may select what is read, in their order."""
    pairs = [(unquote(pair.partition("=")[0]), pair) for pair in query.split("&") if pair]
    is_azure = any(name == "sig" for name, _ in pairs)
    return "&".join(
        pair
        for name, pair in pairs
        if not _SIGNING.fullmatch(name) and not (is_azure and _AZURE_SIGNING.fullmatch(name))
    )


def _check_location(scheme: str, location: str) -> None:
    def shown() -> str:
        return f"{scheme}://{_without_secrets(location)}"

    authority, _, path = location.partition("/")
    if scheme in ("abfs", "abfss") and _AZURE_AUTHORITY.fullmatch(authority):
        authority = authority.partition("@")[2]
    has_digest = scheme in ("http", "https") and _DIGEST_FRAGMENT.fullmatch(location.partition("#")[2])
    if scheme == "s3" and _ACCESS_POINT.fullmatch(authority):
        authority = ""
        path = path.replace("@", "")
    # What follows a colon is a port or a password; a password may hold a slash and hide its `@` behind it.
    if "@" in authority or (not authority and "@" in path) or not _HOST_AND_PORT.fullmatch(authority):
        raise PolicyError(
            shown(), "credentials do not belong in a URI; use the provider's environment or `storage_options`"
        )
    if "?" in location or ("#" in location and not has_digest):
        raise PolicyError(
            shown(), "a query or fragment may carry a signature and would be stored; use `revision=` for a version"
        )
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


def _show_malformed(uri: str) -> str:
    """
    Cut a string that is not a URI down to what can hold no secret. What follows its first colon may be a password,
    unless a slash or a scheme comes before it, as in `s3:/bucket/model` and `hf:organization/model`.
    """
    # What is redacted is an error, and a hit loads nothing for one.
    from kserve_pvc._source.redaction import redact

    before, colon, after = re.split(r"[?#&;]", uri.rpartition("@")[2], maxsplit=1)[0].partition(":")
    after = after.partition(":")[0] if after.startswith("/") or before in _KNOWN_SCHEMES else ""
    return redact(before + colon + after)


def show_source(source: str) -> str:
    """
    Show a source that was not checked yet as errors about it do: without anything that may be a secret.
    """
    from kserve_pvc._source.redaction import redact

    try:
        return redact(parse_ref(source).uri)
    except (InvalidURIError, PolicyError) as error:
        return printable(error.uri if isinstance(error, InvalidURIError) else error.subject)


def _patterns(patterns: Patterns) -> tuple[str, ...]:
    if patterns is None:
        return ()
    if not isinstance(patterns, str | Iterable):
        raise InvalidURIError(repr(patterns), "patterns are one or several strings such as `*.safetensors`")
    several = [patterns] if isinstance(patterns, str) else list(patterns)
    if not all(isinstance(pattern, str) for pattern in several):
        raise InvalidURIError(repr(several), "patterns are strings such as `*.safetensors`")
    # A pattern that ends in `/` means the whole directory, as in huggingface_hub.
    return tuple(sorted({p + "*" if p.endswith("/") else p for p in several}))


def _slug(location: str) -> str:
    last = next((part for part in reversed(location.partition("#")[0].split("/")) if part), "")
    slug = _NOT_IN_SLUG.sub("-", last.lower()).strip("-._")
    return slug[:_MAX_SLUG].rstrip("-._") or "model"
