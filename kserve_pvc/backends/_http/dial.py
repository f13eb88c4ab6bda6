"""
Opening connections: name look-up, address checks, proxies and tunnels.
"""

from __future__ import annotations

import base64
import re
import socket
import struct
import time
from collections.abc import Callable
from typing import NamedTuple

from kserve_pvc.backends._http.connection import Connection
from kserve_pvc.backends._http.target import HTTPError, Target
from kserve_pvc.backends._http.wire import CONNECT_SECONDS, POLL_SECONDS, PlainTransport
from kserve_pvc.errors import StoreError

# An address of IPv6 may stand without brackets, and has no port then.
_NAME_AND_PORT = re.compile(r"(?:\[([^\]]+)\]|([^:]+|[0-9a-f:.]+(?:%\S*)?))(?::([0-9]{1,5}))?")


class Proxy(NamedTuple):
    host: str
    port: int
    user: str
    password: str


def bypasses_proxy(target: Target, no_proxy: str) -> bool:
    """
    Whether `NO_PROXY` names a target: by its name, a domain above it, its address, or a network in CIDR notation; each
    but a network may have a port, and an address of IPv6 brackets.
    """
    host = target.host.lower().rstrip(".")
    return any(_names(entry, host, target.port) for entry in no_proxy.lower().replace(",", " ").split())


def _names(entry: str, host: str, port: int) -> bool:
    if entry == "*":
        return True
    address = literal_address(host)
    if "/" in entry:
        return address is not None and _is_in_network(address, entry)
    match = _NAME_AND_PORT.fullmatch(entry)
    if match is None:
        return False
    bracketed, name, named_port = match.groups()
    if named_port is not None and int(named_port) != port:
        return False
    name = bracketed or name
    if address is not None:
        return _same_address(address, name)
    domain = name.removeprefix("*").strip(".")
    return bool(domain) and (host == domain or host.endswith("." + domain))


def _is_in_network(address: str, network: str) -> bool:
    from ipaddress import ip_address, ip_network

    try:
        spelled = network.replace("[", "").replace("]", "")
        return ip_address(address.partition("%")[0]) in ip_network(spelled, strict=False)
    except ValueError:
        return False


def _same_address(address: str, name: str) -> bool:
    from ipaddress import ip_address

    try:
        return ip_address(address.partition("%")[0]) == ip_address(name.partition("%")[0])
    except ValueError:
        return False


def basic_authorization(proxy: Proxy) -> str:
    if not proxy.user:
        return ""
    return "Basic " + base64.b64encode(f"{proxy.user}:{proxy.password}".encode()).decode()


def literal_address(host: str) -> str | None:
    """
    Return the address that a host is, in any of the spellings that a resolver or a proxy accepts; None for a name.
    """
    host = host.rstrip(".")
    try:
        socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
        return host
    except (OSError, ValueError):
        pass
    try:
        # Also `0x7f000001`, `2130706433` and `127.1`.
        return socket.inet_ntoa(socket.inet_aton(host))
    except (OSError, ValueError):
        return None


def _connect_checked(host: str, port: int, check: Callable[[str, str], None]) -> socket.socket:
    """Look a host up once, and connect to what was checked: a second look-up could return something else."""
    # Not every resolver takes an address with a dot at its end for one.
    if (literal := literal_address(host)) is not None:
        check(host, literal)
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for *_, address in found:
        check(host, str(address[0]))
    failure: OSError | None = None
    for family, kind, protocol, _, address in found:
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(CONNECT_SECONDS)
            sock.connect(address)
            return sock
        except OSError as error:
            sock.close()
            failure = error
    raise failure or OSError("the host has no address")


def dial(place: Target | Proxy, check: Callable[[str, str], None] | None = None) -> socket.socket:
    try:
        if check is not None:
            sock = _connect_checked(place.host, place.port, check)
        else:
            sock = socket.create_connection((place.host, place.port), timeout=CONNECT_SECONDS)
    except StoreError:
        raise
    except OSError as error:
        name = (
            f"the proxy {place.host}:{place.port}"
            if isinstance(place, Proxy)
            else f"{place.scheme}://{place.authority}"
        )
        raise HTTPError(f"no connection to {name}: {error.strerror or error}") from error
    except UnicodeError as error:
        raise HTTPError(f"`{place.host}` is not a host name", is_final=True) from error
    sock.settimeout(None)
    poll_interval = struct.pack("ll", int(POLL_SECONDS), int(POLL_SECONDS % 1 * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, poll_interval)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(CONNECT_SECONDS), 0))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def open_tunnel(sock: socket.socket, target: Target, password: str, deadline: float) -> None:
    host = f"[{target.host}]" if ":" in target.host else target.host
    lines = [f"CONNECT {host}:{target.port} HTTP/1.1", f"Host: {host}:{target.port}"]
    if password:
        lines.append(f"Proxy-Authorization: {password}")
    connection = Connection(sock, PlainTransport(sock))
    connection.send("\r\n".join([*lines, "", ""]).encode("latin-1"))
    while (response := connection.receive_head("CONNECT")) is None:
        if time.monotonic() > deadline:
            raise HTTPError("the proxy did not respond to CONNECT in time")
    if response.status != 200:
        raise HTTPError(
            f"the proxy responded to CONNECT with HTTP {response.status}",
            is_final=response.status in (401, 403, 405, 407),
        )
