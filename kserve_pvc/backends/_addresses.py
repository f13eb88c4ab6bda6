"""
Which addresses a URL may lead to: none inside of a network, unless that is allowed.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping
from typing import Any

from kserve_pvc.errors import PolicyError, SettingsError

ALLOW_PRIVATE = "KSERVE_PVC_ALLOW_PRIVATE_ADDRESSES"
# What lies inside and is not told as such by all versions of Python: what virtual machines of Azure and Oracle learn
# secrets from, and the local addresses that IPv6 had first.
_ALSO_INSIDE = [ipaddress.ip_network(network) for network in ("168.63.129.16/32", "192.0.0.0/24", "fec0::/10")]
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def check_address(host: str, address: str) -> None:
    """
    Refuse an address inside of a network: the author of a URL must not choose which hosts this machine reaches there.

    Raises:
        PolicyError: The address is private, loopback, link-local, of metadata, multicast or reserved.
    """
    for found in _addresses(ipaddress.ip_address(address)):
        is_outside = found.is_global and not found.is_multicast and not found.is_reserved
        if not is_outside or any(found in network for network in _ALSO_INSIDE):
            allowed = f"`allow_private` or {ALLOW_PRIVATE}=1"
            raise PolicyError(host, f"its address {address} is not public; if it is meant, allow it with {allowed}")


def _addresses(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """Where packets may end up: an address of IPv6 may hold one of IPv4."""
    if isinstance(address, ipaddress.IPv4Address):
        return [address]
    if address.ipv4_mapped is not None:
        return [address.ipv4_mapped]
    if address in _NAT64:
        return [ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)]
    return [address, *(found for found in (address.sixtofour, *(address.teredo or ())) if found is not None)]


def make_address_check(options: Mapping[str, Any], environ: Mapping[str, str]) -> Callable[[str, str], None] | None:
    """
    Make the check of one store, from its option `allow_private` or else the environment; None allows every address.

    Raises:
        SettingsError: The environment says neither yes nor no.
    """
    given = options.get("allow_private")
    if given is None:
        text = environ.get(ALLOW_PRIVATE, "").strip()
        given = text.lower() in ("1", "true", "yes", "on")
        if not given and text.lower() not in ("", "0", "false", "no", "off"):
            raise SettingsError(ALLOW_PRIVATE, text, "use 1, or unset it")
    if isinstance(given, bool):
        return None if given else check_address
    hosts = {str(host).lower() for host in ([given] if isinstance(given, str) else given)}

    def check(host: str, address: str) -> None:
        if host not in hosts:
            check_address(host, address)

    return check
