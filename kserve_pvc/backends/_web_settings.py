"""
What a URL of the web names, and the settings for it that are our own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

import attrs

from kserve_pvc._archive.unpack import check_readable, is_archive
from kserve_pvc._format.file_names import check_name
from kserve_pvc._source.contract import UnpackLimits
from kserve_pvc._source.ref import ModelRef
from kserve_pvc.errors import InvalidURIError, PolicyError, SettingsError, UnsafePathError

OWN_OPTIONS = {"allow_private", "headers", "unpack", "unpack_limits", "verify"}
_SHA256_FRAGMENT = re.compile(r"sha256=([0-9a-f]{64})")
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
# Headers of every request: one from the user would change which bytes are requested, or how responses are framed.
_OWN_HEADERS = {
    *(
        "accept-encoding",
        "connection",
        "content-length",
        "expect",
        "host",
        "if-match",
        "if-none-match",
        "if-range",
        "range",
    ),
    *(
        "if-modified-since",
        "if-unmodified-since",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "proxy-authorization",
    ),
}


@attrs.frozen(kw_only=True)
class WebFile:
    """
    What a URI names: an address, the name of the file, what its bytes must amount to, and how it is unpacked.

    `query` belongs to the address, and is kept apart because it is a secret.
    """

    address: str
    name: str
    sha256: str | None
    limits: UnpackLimits | None
    query: str | None = attrs.field(default=None, repr=False)


def parse_file(ref: ModelRef, limits: UnpackLimits | None) -> WebFile:
    """
    Take the URL of a file apart.

    Args:
        limits: For what an archive may become; None keeps archives as they are.

    Raises:
        InvalidURIError: It names a directory, or a revision is given.
        UnsafePathError: The name cannot be kept.
        PolicyError: It is an archive that needs a package to be unpacked.
    """
    if ref.revision is not None:
        raise InvalidURIError(ref.uri, "a URL has no revisions; pin its content with `#sha256=<64 hex digits>`")
    address, _, fragment = ref.uri.partition("#")
    selector = fragment.partition("&")[0]
    if selector.startswith("query=") and ref.query is None:
        raise PolicyError(ref.uri, "its query selects what is read, and was not stored; pass the link with its query")
    name = _name(ref.uri, address)
    limits = limits if is_archive(name) else None
    if limits is not None:
        check_readable(name)
    promised = _SHA256_FRAGMENT.fullmatch(fragment.rpartition("&")[2])
    if selector.startswith("query="):
        address = f"{address}#{selector}"
    return WebFile(address=address, name=name, sha256=promised[1] if promised else None, limits=limits, query=ref.query)


class Headers:
    """
    The headers that the user gives for hosts, by the option `headers` or else by the variable `<host>-headers`.

    Raises:
        SettingsError: The option is not a mapping of hosts.
    """

    def __init__(self, options: Mapping[str, Any], environ: Mapping[str, str]) -> None:
        self._given = _given_headers(options.get("headers") or {})
        self._environ = environ

    def for_host(self, host: str) -> Mapping[str, str]:
        """
        Return the headers for one host.

        Raises:
            SettingsError: They are not headers that a request of ours may have.
        """
        name = f"{host}-headers"
        given = self._given.get(host)
        if given is None and self._environ.get(name):
            try:
                given = json.loads(self._environ[name])
            except (ValueError, RecursionError):
                given = ()
        return {} if given is None else _checked_headers(name, given)


def unpack_limits(options: Mapping[str, Any]) -> UnpackLimits | None:
    """
    Read the options `unpack` and `unpack_limits`; None keeps archives as they are.

    Raises:
        SettingsError: A limit is unknown or not a positive number.
    """
    if not options.get("unpack", True):
        return None
    given: Mapping[str, Any] = options.get("unpack_limits") or {}
    known = {field.name for field in attrs.fields(UnpackLimits)}
    for name, value in dict(given).items():
        if name not in known or isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise SettingsError(
                "unpack_limits", f"{name}={value!r}", f"use positive numbers for any of {', '.join(sorted(known))}"
            )
    return UnpackLimits(**given)


def _name(uri: str, address: str) -> str:
    # What follows a semicolon is a parameter of the path, and no part of the name.
    last = address.partition("://")[2].partition("/")[2].rpartition("/")[2].partition(";")[0]
    if not last:
        raise InvalidURIError(uri, "no file is named; a directory cannot be listed over HTTP")
    # What is no UTF-8 becomes what no name may hold.
    name = unquote(last, errors="surrogateescape")
    if "/" in name:
        raise UnsafePathError(name, "the last part of a URL is the name of one file, and holds no slash")
    return str(check_name(name))


def _given_headers(given: Any) -> Mapping[str, Any]:
    if not isinstance(given, Mapping) or not all(isinstance(headers, Mapping) for headers in given.values()):
        raise SettingsError(
            "headers", "not shown", 'pass them by host, as {"models.example.org": {"Authorization": "Bearer …"}}'
        )
    return {str(host).lower(): headers for host, headers in given.items()}


def _checked_headers(name: str, given: Any) -> Mapping[str, str]:
    """The user's headers. Their values are never shown, whatever is wrong with them."""
    remedy = 'use a JSON object of strings such as {"Authorization": "Bearer …"}'
    if not isinstance(given, Mapping):
        raise SettingsError(name, "not shown", remedy)
    given = {header: value.strip() if isinstance(value, str) else value for header, value in given.items()}
    checked: dict[str, str] = given
    for header, value in given.items():
        if (
            not isinstance(header, str)
            or not _TOKEN.fullmatch(header)
            or not isinstance(value, str)
            or not value.isprintable()
        ):
            raise SettingsError(name, "not shown", remedy)
        if header.lower() in _OWN_HEADERS:
            raise SettingsError(name, f"{header}: not shown", "omit this header; requests set their own")
    return checked
