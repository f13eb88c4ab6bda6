"""
Where a request goes: scheme, host, port, and the errors of getting there.
"""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import urlsplit


class HTTPError(Exception):
    """
    A request without a valid response. With `is_final` a retry would not help.
    """

    def __init__(self, reason: str, *, is_final: bool = False) -> None:
        super().__init__(reason)
        self.is_final = is_final


class StaleConnectionError(HTTPError):
    """The server had closed a kept connection before the request arrived."""


class Target(NamedTuple):
    """
    Where a URL leads: what to connect to, and what to request there.
    """

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """What belongs into the `Host` header: without the port where it is the usual one."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


_PORTS = {"http": 80, "https": 443}


def target_of(url: str) -> Target:
    """
    Take a URL apart.

    Raises:
        HTTPError: It is not an http or https URL.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise HTTPError("not an http or https URL", is_final=True) from error
    if parts.scheme not in _PORTS or not parts.hostname or port == 0:
        raise HTTPError("not an http or https URL", is_final=True)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Target(parts.scheme, parts.hostname, port or _PORTS[parts.scheme], path)
