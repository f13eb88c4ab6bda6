"""
Files of the web through fsspec's `HTTPFileSystem`, to the rules of our own backend.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kserve_pvc.backends._addresses import make_address_check
from kserve_pvc.backends._fsspec.filesystems import MadeHere
from kserve_pvc.backends._fsspec.guard import guarded
from kserve_pvc.backends._web_settings import OWN_OPTIONS, Headers, unpack_limits
from kserve_pvc.backends.fsspec_ import FsspecBackend
from kserve_pvc.errors import SettingsError


def web_backend(arguments: Mapping[str, Any], options: Mapping[str, Any], environ: Mapping[str, str]) -> FsspecBackend:
    """
    Read files of the web through fsspec's `HTTPFileSystem`, to the rules of our own backend.

    Args:
        arguments: Options, with those of fsspec's configuration.
        options: Those of the store alone. Its `headers` are by host, as for our own backend; those of fsspec's
            configuration are for all hosts, as in fsspec.

    Raises:
        SettingsError: An option of ours means nothing.
    """
    headers, check = Headers(options, environ), make_address_check(options, environ)
    plain = {name: value for name, value in arguments.items() if name not in OWN_OPTIONS}
    if "headers" in arguments and "headers" not in options:
        plain["headers"] = arguments["headers"]
    if "verify" in options:
        plain["ssl"] = options["verify"] and _trusting(options["verify"])

    def prepare(url: str, unused: Mapping[str, Any]) -> Mapping[str, Any]:
        host = (urlsplit(url).hostname or "").lower()
        secret = headers.for_host(host)
        given = {"headers": {**plain.get("headers", {}), **secret}} if secret else {}
        return guarded({**plain, **given}, check, stays_at=host if secret else None)

    made = MadeHere({**plain, "headers": options.get("headers")}, prepare)
    return FsspecBackend(plain, made, limits=unpack_limits(options))


def _trusting(verify: object) -> Any:
    """The certificates of a file or directory; True stands for those of the system."""
    if verify is True:
        return True
    place = Path(str(verify))
    try:
        if place.is_dir():
            return ssl.create_default_context(capath=place)
        return ssl.create_default_context(cafile=place)
    except OSError as error:
        raise SettingsError("verify", str(place), f"it cannot be read: {error}") from error
