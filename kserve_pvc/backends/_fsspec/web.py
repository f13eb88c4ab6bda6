"""
Guarding the sessions of fsspec's `HTTPFileSystem`: a URL must not choose which private addresses this machine reaches.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urljoin, urlsplit

from kserve_pvc.errors import PolicyError

# Given a host and one of its addresses, raises `PolicyError` if it must not be reached.
Check = Callable[[str, str], None]


def guarded(options: Mapping[str, Any], check: Check | None) -> Mapping[str, Any]:
    """
    Return arguments of `HTTPFileSystem` whose sessions connect only to addresses that pass the check.

    Args:
        check: None where every address is allowed.

    Raises:
        PolicyError: The arguments bring a session or connector of their own, which cannot be guarded.
    """
    if check is None:
        return options
    own = [name for name in ("get_client",) if options.get(name) is not None]
    own += [f"client_kwargs.{name}" for name in ("connector",) if name in (options.get("client_kwargs") or {})]
    if own:
        rule = f"with `{own[0]}`, private addresses cannot be refused; allow them with `allow_private=True`"
        raise PolicyError("storage_options", rule)

    async def get_client(**arguments: Any) -> Any:
        return _session(check, arguments)

    return {**options, "get_client": get_client}


def _session(check: Check, arguments: Mapping[str, Any]) -> Any:
    import aiohttp

    async def check_literal(session: Any, context: Any, parameters: Any) -> None:
        # An address that is written as such is never resolved. At a redirect, `url` is where it was found.
        url = str(parameters.url)
        response = getattr(parameters, "response", None)
        if response is not None:
            url = urljoin(url, response.headers.get("Location", ""))
        host = urlsplit(url).hostname or ""
        if _is_address(host):
            check(host, host)

    trace = aiohttp.TraceConfig()
    trace.on_request_start.append(check_literal)
    trace.on_request_redirect.append(check_literal)
    connector = aiohttp.TCPConnector(resolver=_checked_resolver(check), ttl_dns_cache=None, use_dns_cache=False)
    traces = [*arguments.get("trace_configs", ()), trace]
    return aiohttp.ClientSession(**{**arguments, "connector": connector, "trace_configs": traces})


def _checked_resolver(check: Check) -> Any:
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


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
