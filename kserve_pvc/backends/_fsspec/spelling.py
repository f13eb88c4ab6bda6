"""
What a source URI is for fsspec: the URL of its class, and what else the URI says.
"""

from __future__ import annotations

from urllib.parse import quote

import attrs

from kserve_pvc._source.contract import UnpackLimits
from kserve_pvc._source.ref import ModelRef
from kserve_pvc.backends._fsspec.filesystems import PREFIX
from kserve_pvc.errors import InvalidURIError, PolicyError, UnsafePathError


@attrs.frozen(kw_only=True)
class Spelling:
    """
    A source URI as fsspec spells it.

    `name`, `sha256` and `unpack` are for URIs of one file: what the file is called, what its bytes must amount to, and
    how it is unpacked.
    """

    url: str
    name: str | None = None
    sha256: str | None = None
    unpack: UnpackLimits | None = None

    @property
    def protocol(self) -> str:
        return self.url.partition("://")[0]


def spell(ref: ModelRef, limits: UnpackLimits | None) -> Spelling:
    """
    Spell a source URI for fsspec. It means the same files as for our own backend of its scheme, if there is one.

    Args:
        limits: For archives that come over HTTP; None keeps them as they are.

    Raises:
        InvalidURIError: It is a chain, or there is a revision that its protocol does not have.
        UnsafePathError: It climbs.
    """
    url = ref.uri.removeprefix(PREFIX)
    protocol, _, location = url.partition("://")
    if "::" in location:
        raise InvalidURIError(ref.uri, "it is a chain of URLs; name one protocol")
    if ".." in location.split("/"):
        raise UnsafePathError(location, "a path may not climb with `..`")
    if protocol == "hf":
        return Spelling(url=_hub_url(ref, url))
    if ref.revision is not None:
        reason = "a revision has no meaning here; some file systems take one among the `storage_options`"
        raise InvalidURIError(ref.uri, reason)
    if ref.service == "az" and protocol == "https":
        return Spelling(url=_azure_url(location))
    if protocol in ("http", "https"):
        return _web_file(ref, url, limits)
    return Spelling(url=url)


def _hub_url(ref: ModelRef, url: str) -> str:
    from kserve_pvc.backends._hf_names import parse_location

    found = parse_location(attrs.evolve(ref, uri=url))
    revision = "" if found.revision == "main" else f"@{quote(found.revision, safe='')}"
    return f"hf://{found.repository}{revision}" + (f"/{found.path}" if found.path else "")


def _azure_url(location: str) -> str:
    """`https://account.blob.core.windows.net/container/path`, which adlfs spells in another order."""
    host, _, path = location.partition("/")
    container, _, inside = path.partition("/")
    return f"abfs://{container}@{host.partition('.')[0]}.dfs.core.windows.net/{inside}"


def _web_file(ref: ModelRef, url: str, limits: UnpackLimits | None) -> Spelling:
    from kserve_pvc.backends._web_settings import parse_file

    file = parse_file(attrs.evolve(ref, uri=url), limits)
    if file.query is not None:
        reason = "a link with a query is read by plain requests only; leave out the options that fsspec is needed for"
        raise PolicyError(ref.uri, reason)
    return Spelling(url=file.address, name=file.name, sha256=file.sha256, unpack=file.limits)
