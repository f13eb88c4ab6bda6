"""
Two doctors on two nodes test each other through the volume that they examine.

Each has a directory of its own under `.kserve-pvc/doctor`, beats there, and writes numbered messages; both do the same
steps in the same order, and wait for each other's message between them. Only fresh listings and complete files are
relied on, never a lock. What the other one writes is read as strictly as any record, and where it stops beating the
meeting ends with what was found until then.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import PurePosixPath

from kserve_pvc._doctor.exchange import Exchange, read_beat, read_listed
from kserve_pvc._doctor.reports import MAX_MESSAGE_BYTES, Hello, PeerReport
from kserve_pvc._format import layout
from kserve_pvc._format.codec import decode, encode
from kserve_pvc._format.log_entry import Holder
from kserve_pvc._keys.claims import start_heart
from kserve_pvc._volume.calls import dated_name
from kserve_pvc._volume.scratch import open_scratch
from kserve_pvc._volume.writing import VolumeWriter
from kserve_pvc.errors import SettingsError, StoreFormatError

MEETING = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")
DIRECTORY = re.compile(r"[0-9]{12}-[0-9a-f]{16}")
BEAT_LEASE = 3.0  # Beats are a sixth of it apart.
_LOOK = 0.05


@contextmanager
def beating(writer: VolumeWriter, own: PurePosixPath) -> Iterator[None]:
    """
    Beat in the directory of a doctor, so that others meet it and do not take it for what a dead one left.
    """
    heart = start_heart(writer, own, lease_seconds=BEAT_LEASE)
    try:
        yield
    finally:
        heart.stop()


def check_meeting(name: str) -> str:
    """
    Raises:
        SettingsError: Two doctors cannot meet by this name.
    """
    if MEETING.fullmatch(name) is None:
        raise SettingsError(
            "peer", name, "name the meeting by up to 40 small letters, digits and dashes, the same on both nodes"
        )
    return name


def meet(writer: VolumeWriter, own: PurePosixPath, meeting: str, holder: Holder, timeout: float) -> PeerReport | None:
    """
    Wait for the other doctor of a meeting and do all tests with it. None: nobody came in time.

    Args:
        own: The directory of this doctor, which beats there and takes it away.
    """
    hello = Hello(meeting=meeting, holder=holder, device=os.stat(writer.root).st_dev)
    writer.write_private(own / "hello", encode(hello))
    found = _find_peer(writer, own, meeting, timeout)
    if found is None:
        return None
    with open_scratch(writer, own) as scratch:
        return Exchange(writer, scratch, own, *found, hello).run()


def _find_peer(
    writer: VolumeWriter, own: PurePosixPath, meeting: str, timeout: float
) -> tuple[PurePosixPath, Hello] | None:
    """The one other doctor of this meeting that beats: what lies there may be years old."""
    deadline = time.monotonic() + timeout
    first: dict[str, bytes] = {}
    while True:
        live = {}
        for name in writer.list_names(layout.DOCTOR):
            if name == own.name or DIRECTORY.fullmatch(name) is None:
                continue
            hello = _read_hello(writer, layout.DOCTOR / name)
            if hello is None or hello.meeting != meeting:
                continue
            beat = read_beat(writer, name)
            if first.setdefault(name, beat) != beat:
                live[name] = hello
        if live:
            # A third one finds the first two busy, or makes all of them fail: a meeting is for two.
            name = min(live)
            return layout.DOCTOR / name, live[name]
        if time.monotonic() >= deadline:
            return None
        time.sleep(_LOOK)


def _read_hello(writer: VolumeWriter, place: PurePosixPath) -> Hello | None:
    data = read_listed(writer, place / "hello", MAX_MESSAGE_BYTES)
    with suppress(StoreFormatError):
        return decode(Hello, data, str(place / "hello"))
    return None


def new_directory() -> PurePosixPath:
    return layout.DOCTOR / dated_name()
