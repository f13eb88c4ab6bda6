"""
Guarding the sessions of fsspec's `HTTPFileSystem`: a URL must not choose which private addresses this machine reaches.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any
from urllib.parse import urljoin, urlsplit

from kserve_pvc.backends._addresses import AddressCheck
from kserve_pvc.backends._http.dial import literal_address
from kserve_pvc.errors import PolicyError


def guarded(options: Mapping[str, Any], check: AddressCheck, *, stays_at: str | None = None) -> Mapping[str, Any]:
    """
    Return arguments of `HTTPFileSystem` whose sessions connect only to addresses that pass the check.

    Args:
        stays_at: The only host that redirects may lead to, since secret headers go along with every request.

    Raises:
        PolicyError: The arguments bring a session or connector of their own, which cannot be guarded.
    """
    own = ["get_client"] if options.get("get_client") is not None else []
    own += ["client_kwargs.connector"] if "connector" in (options.get("client_kwargs") or {}) else []
    if own and check.allows_all and stays_at is None:
        return options
    if own:
        rule = f"`{own[0]}` connects where it likes; with it, set `allow_private=True` and give no `headers`"
        raise PolicyError("storage_options", rule)

    async def get_client(**arguments: Any) -> Any:
        return _session(check, stays_at, arguments)

    return {**options, "get_client": get_client}


def _session(check: AddressCheck, stays_at: str | None, arguments: Mapping[str, Any]) -> Any:
    import aiohttp

    async def check_start(session: Any, context: Any, parameters: Any) -> None:
        host = parameters.url.host or ""
        # An address that is written as such is never resolved.
        check(host, literal_address(host) or "")

    async def check_redirect(session: Any, context: Any, parameters: Any) -> None:
        location = parameters.response.headers.get("Location", "")
        host = urlsplit(urljoin(str(parameters.url), location)).hostname or ""
        try:
            if stays_at is not None and host != stays_at:
                raise PolicyError(stays_at, f"it redirects to `{host}`, which must not get the headers for this host")
            check(host, literal_address(host) or "")
        except PolicyError:
            # aiohttp does not release the connection of a request that ends here.
            parameters.response.close()
            raise

    trace = aiohttp.TraceConfig()
    trace.on_request_start.append(check_start)
    trace.on_request_redirect.append(check_redirect)
    more: dict[str, Any] = {"trace_configs": [*arguments.get("trace_configs", ()), trace]}
    more["connector"] = aiohttp.TCPConnector(resolver=_checked_resolver(check), use_dns_cache=False)
    return aiohttp.ClientSession(**{**arguments, **more})


def _checked_resolver(check: AddressCheck) -> Any:
    from aiohttp.abc import AbstractResolver
    from aiohttp.resolver import ThreadedResolver

    class Checked(AbstractResolver):
        def __init__(self) -> None:
            self._inner = ThreadedResolver()

        async def resolve(self, host: str, port: int = 0, family: Any = socket.AF_UNSPEC) -> Any:
            found = await self._inner.resolve(host, port, family)
            for place in found:
                check(host, place["host"])
            return found

        async def close(self) -> None:
            await self._inner.close()

    return Checked()
