"""
Which addresses a URL may lead to: none inside of a network, unless that is allowed.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from typing import Any

from kserve_pvc.errors import PolicyError, SettingsError

ALLOW_PRIVATE = "KSERVE_PVC_ALLOW_PRIVATE_ADDRESSES"
# What lies inside and is not told as such by all versions of Python: what virtual machines of Azure and Oracle learn
# secrets from, and the local addresses that IPv6 had first.
_ALSO_INSIDE = [ipaddress.ip_network(network) for network in ("168.63.129.16/32", "192.0.0.0/24", "fec0::/10")]
_METADATA = [
    ipaddress.ip_network(network)
    for network in ("168.63.129.16/32", "100.100.100.200/32", "192.0.0.192/32", "fd00:ec2::/32", "fd20:ce::254/128")
]
# Behind a proxy, which looks names up itself, only these tell where a request goes.
_METADATA_NAMES = {
    *("metadata", "metadata.google.internal", "metadata.goog", "instance-data", "instance-data.ec2.internal"),
    *("metadata.azure.internal", "metadata.tencentyun.com"),
}
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def check_metadata(host: str, address: str) -> None:
    """
    Refuse what gives secrets to every process of a machine, whatever is allowed, and the networks that it is in.

    Raises:
        PolicyError: The name or the address is that of a metadata service, or the address is link-local.
    """
    found = _addresses(ipaddress.ip_address(address)) if address else []
    is_metadata = any(place.is_link_local or place in network for place in found for network in _METADATA)
    if is_metadata or _bare(host) in _METADATA_NAMES:
        what = f"its address {address}" if is_metadata else "the name"
        raise PolicyError(host, f"{what} is link-local or that of a metadata service, which is never connected to")


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


class AddressCheck:
    """
    What one store may connect to: called with a host and an address of it, or an empty string where the address is not
    known. Raises `PolicyError`.

    Args:
        allows_all: Private addresses are allowed for all hosts.
        hosts: Those for which they are allowed.
    """

    def __init__(self, *, allows_all: bool = False, hosts: Iterable[str] = ()) -> None:
        self.allows_all = allows_all
        self._hosts = {_bare(host) for host in hosts}

    def __call__(self, host: str, address: str) -> None:
        check_metadata(host, address)
        if address and not self.allows_all and _bare(host) not in self._hosts:
            check_address(host, address)


def make_address_check(
    options: Mapping[str, Any], environ: Mapping[str, str], hosts: Iterable[str] = ()
) -> AddressCheck:
    """
    Make the check of one store, from its option `allow_private` or else the environment.

    Args:
        hosts: Those that may be private without either, since the user configured them.

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
        return AddressCheck(allows_all=given, hosts=hosts)
    return AddressCheck(hosts=[*hosts, *([given] if isinstance(given, str) else map(str, given))])


def _bare(host: str) -> str:
    """A host as it is compared: a dot at its end only says that the name is complete."""
    return host.lower().rstrip(".")
