"""
Two doctors on two nodes find each other through the volume that they examine.

Each has a directory of its own under `.kserve-pvc/doctor`, where it writes heartbeats and numbered messages. Both run
the same steps in the same order, and wait for each other's message between them. They rely on fresh listings and
complete files only, never on a lock. Messages are decoded as strictly as any record, and if the peer's heartbeats stop,
the tests end with the results so far.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import PurePosixPath

from kserve_pvc._doctor.exchange import Exchange, ExchangeLimits, read_heartbeat, read_listed
from kserve_pvc._doctor.reports import MAX_MESSAGE_BYTES, Hello, PeerReport
from kserve_pvc._format import layout
from kserve_pvc._format.codec import decode, encode
from kserve_pvc._format.log_entry import Holder
from kserve_pvc._keys.claims import start_heartbeat
from kserve_pvc._volume.calls import dated_name
from kserve_pvc._volume.scratch import open_scratch
from kserve_pvc._volume.writing import VolumeWriter
from kserve_pvc.errors import SettingsError, StoreFormatError

DIRECTORY = re.compile(r"[0-9]{12}-[0-9a-f]{16}")
LEASE_SECONDS = 3.0
_RENDEZVOUS = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")
_POLL_SECONDS = 0.05


@contextmanager
def heartbeats(writer: VolumeWriter, own: PurePosixPath) -> Iterator[None]:
    """
    Write heartbeats into the directory of a doctor, so that a peer finds it and no other doctor deletes it.
    """
    heartbeat = start_heartbeat(writer, own, lease_seconds=LEASE_SECONDS)
    try:
        yield
    finally:
        heartbeat.stop()


def check_rendezvous(name: str) -> None:
    """
    Check the name by which two doctors find each other.

    Raises:
        SettingsError: It is not a valid name.
    """
    if _RENDEZVOUS.fullmatch(name) is None:
        raise SettingsError(
            "peer", name, "use up to 40 lowercase letters, digits and dashes, and the same name on both nodes"
        )


def examine_with_peer(
    writer: VolumeWriter, own: PurePosixPath, rendezvous: str, holder: Holder, timeout: float
) -> PeerReport | None:
    """
    Wait for a doctor on another node, and run all tests with it.

    Args:
        own: The directory of this doctor, which must have heartbeats. The caller deletes it.

    Returns:
        None if no other doctor appeared in time.
    """
    hello = Hello(rendezvous=rendezvous, holder=holder, device=os.stat(writer.root).st_dev)
    writer.write_private(own / "hello", encode(hello))
    found = _find_peer(writer, own, rendezvous, timeout)
    if found is None:
        return None
    with open_scratch(writer, own) as scratch:
        return Exchange(writer, scratch, own, *found, hello, ExchangeLimits()).run()


def _find_peer(
    writer: VolumeWriter, own: PurePosixPath, rendezvous: str, timeout: float
) -> tuple[PurePosixPath, Hello] | None:
    """Find the other doctor of this name whose heartbeat changes: directories may be left over from years ago."""
    deadline = time.monotonic() + timeout
    first: dict[str, bytes] = {}
    while True:
        live = {}
        for name in writer.list_names(layout.DOCTOR):
            if name == own.name or DIRECTORY.fullmatch(name) is None:
                continue
            hello = _read_hello(writer, layout.DOCTOR / name)
            if hello is None or hello.rendezvous != rendezvous:
                continue
            heartbeat = read_heartbeat(writer, name)
            if first.setdefault(name, heartbeat) != heartbeat:
                live[name] = hello
        if live:
            # A rendezvous is for two: a third doctor finds the first two busy, or makes all of them fail.
            name = min(live)
            return layout.DOCTOR / name, live[name]
        if time.monotonic() >= deadline:
            return None
        time.sleep(_POLL_SECONDS)


def _read_hello(writer: VolumeWriter, place: PurePosixPath) -> Hello | None:
    data = read_listed(writer, place / "hello", MAX_MESSAGE_BYTES)
    with suppress(StoreFormatError):
        return decode(Hello, data, str(place / "hello"))
    return None


def new_directory() -> PurePosixPath:
    """
    Return a new name for the directory of a doctor.
    """
    return layout.DOCTOR / dated_name()
