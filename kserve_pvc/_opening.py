"""
Opening a store: arguments checked, settings read, a new store created and agreed on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from kserve_pvc._format import layout
from kserve_pvc._format.codec import MAX_RECORD_BYTES
from kserve_pvc._format.log_entry import (
    MAX_LEASE_SECONDS,
    MIN_LEASE_SECONDS,
    StoreSettings,
    decode_settings,
    encode_settings,
    now,
)
from kserve_pvc._process import store_identity
from kserve_pvc._source.arguments import check_choice, check_count, check_seconds
from kserve_pvc._volume.reading import Volume
from kserve_pvc.errors import LockerMismatchError, SettingsError, StoreFormatError, StoreRootError, VolumeError

# A server that starts on a warm volume loads what is imported above and nothing else. What downloads, removes, checks
# or talks to a source is imported by the method that does it.
if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

    from kserve_pvc._settings import Mode
    from kserve_pvc._show.events import Listener
    from kserve_pvc._source.contract import BackendFactory
    from kserve_pvc._volume.writing import VolumeWriter

# Lockers that need no module to be understood.
_PLAIN_LOCKERS = ("lease", "flock")
# How often, and how long, a process looks for the settings that another one is creating.
LOOKS_FOR_SETTINGS = 20
LOOK_PAUSE = 0.05


class StoreArguments(TypedDict, total=False):
    """
    The keyword arguments of `ModelStore`, for what passes them on.
    """

    mode: Mode
    locker: str | None
    lease_seconds: float | None
    backends: Mapping[str, BackendFactory] | None
    storage_options: Mapping[str, Any] | None
    filesystems: Mapping[str, AbstractFileSystem] | None
    part_bytes: int
    digest: Literal["sha256", "none"]
    stall_seconds: float
    retry_seconds: float
    offline: bool | None
    on_event: Listener | None


def check_arguments(mode: object, locker: str | None, lease_seconds: object) -> None:
    """
    Raises:
        SettingsError: One of them is invalid.
    """
    check_choice("mode", mode, ("r", "rw"))
    if locker is not None:
        from kserve_pvc.locks.choice import parse_locker

        parse_locker(locker)
    if lease_seconds is not None:
        check_seconds("lease_seconds", lease_seconds, least=MIN_LEASE_SECONDS, most=MAX_LEASE_SECONDS)


def check_tuning(part_bytes: object, digest: object, stall_seconds: object, retry_seconds: object) -> None:
    """
    Raises:
        SettingsError: One of them is invalid.
    """
    check_count("part_bytes", part_bytes)
    check_choice("digest", digest, ("sha256", "none"))
    check_seconds("stall_seconds", stall_seconds)
    check_seconds("retry_seconds", retry_seconds)


def read_store_settings(volume: Volume) -> StoreSettings | None:
    data = volume.read(layout.SETTINGS, MAX_RECORD_BYTES)
    if data is None:
        return None
    settings = decode_settings(data, str(layout.SETTINGS))
    volume.settings = data  # From now on this volume is that store, and what replaces it is noticed.
    return settings


def open_store(
    volume: Volume, mode: Mode, locker: str | None, lease_seconds: float | None
) -> tuple[tuple[VolumeWriter, StoreSettings] | None, str]:
    """
    Open a store, and create it if it is opened for writing and has no settings yet.

    Returns:
        What writes, with the settings that all writers share, if the mode is read-write; and what this process knows
        the store by, however often it is opened.

    Raises:
        LockerMismatchError: It was created with other settings.
        StoreRootError: The volume cannot hold a store.
    """
    settings = read_store_settings(volume)
    if mode == "r":
        return None, store_identity(volume.root, "" if settings is None else settings.store_id)
    from kserve_pvc._volume.writing import VolumeWriter

    writer = VolumeWriter(volume.root)
    # Read by the writer itself: another volume may have been mounted since.
    found = read_store_settings(writer) or create_store(writer, locker, lease_seconds)
    if settings is not None and settings.store_id != found.store_id:
        raise StoreRootError(str(volume.root), "the volume was replaced while it was opened")
    volume.settings = writer.settings
    # Only writers contend; a reader takes no lock, so there is nothing it could disagree about.
    check_agreement(volume, found, locker, lease_seconds)
    return (writer, found), store_identity(volume.root, found.store_id)


def create_store(writer: VolumeWriter, locker: str | None, lease_seconds: float | None) -> StoreSettings:
    """
    Make `store.json`, or take what another process made.

    As with a record of a log, a number is reserved first, by `mkdir`: of two processes that link one name, some volumes
    let both win.
    """
    from kserve_pvc._volume.profile import probe_here
    from kserve_pvc._volume.reserve import fill_reserve

    chosen = "lease"
    if locker is not None:
        from kserve_pvc.locks.choice import parse_locker, resolve_namespace

        chosen = str(resolve_namespace(parse_locker(locker), os.environ))
    # A volume on which no store can be correct is refused before there is one.
    default = probe_here(writer).lease_seconds
    settings = StoreSettings(
        store_id=os.urandom(16).hex(), locker=chosen, lease_seconds=lease_seconds or default, created_at=now()
    )
    number = 1
    while not writer.reserve(layout.CREATION / f"{number:012d}"):
        if (found := _await_settings(writer)) is not None:
            return found
        # The process with that number died before it wrote. Those below the highest number are not waited for each.
        number = max(number + 1, *(layout.parse_number(name) or 0 for name in writer.list_names(layout.CREATION)))
    if (found := _fresh_settings(writer)) is not None:
        return found
    private = layout.staging_dir(f"create-{settings.store_id}")
    writer.publish(layout.SETTINGS, encode_settings(settings), private / "store.json")
    # What is on the volume counts, for all.
    made = _fresh_settings(writer)
    writer.throw_away(private)
    fill_reserve(writer)
    if made is None:
        raise VolumeError(str(writer.absolute(layout.SETTINGS)), "creating a store", "it is missing after it was made")
    return made


def _await_settings(writer: VolumeWriter) -> StoreSettings | None:
    """Wait for what the process that reserved the number before is about to write."""
    for look in range(LOOKS_FOR_SETTINGS):
        if look:
            time.sleep(LOOK_PAUSE)
        if (found := _fresh_settings(writer)) is not None:
            return found
    return None


def _fresh_settings(volume: Volume) -> StoreSettings | None:
    # A listing makes a network volume look again where it remembers that there was nothing.
    return read_store_settings(volume) if layout.SETTINGS.name in volume.list_names(layout.META) else None


def check_agreement(volume: Volume, settings: StoreSettings, locker: str | None, lease_seconds: float | None) -> None:
    if settings.locker not in _PLAIN_LOCKERS or locker not in (None, settings.locker):
        _check_same_locker(volume, settings.locker, locker)
    if lease_seconds is not None and lease_seconds != settings.lease_seconds:
        raise LockerMismatchError(
            str(volume.root), "lease_seconds", f"{settings.lease_seconds:g}", f"{lease_seconds:g}"
        )


def _check_same_locker(volume: Volume, stored: str, requested: str | None) -> None:
    from kserve_pvc.locks.choice import parse_locker

    try:
        choice = parse_locker(stored)
    except SettingsError as error:
        raise StoreFormatError(
            str(layout.SETTINGS), f"this version does not have the locker `{stored}`; upgrade kserve_pvc"
        ) from error
    if requested is not None and not parse_locker(requested).matches(choice):
        raise LockerMismatchError(str(volume.root), "locker", stored, requested)
