"""
What a volume is, what it can do, how fast it is, and what should be changed about it.

Everything measured is measured in a directory of its own below `.kserve-pvc/doctor`, which is taken away afterwards.
One that a killed doctor left goes with the next doctor on its node, or with any after an hour.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import PurePosixPath
from typing import Any, Literal

import attrs

from kserve_pvc import _defaults as defaults
from kserve_pvc._doctor.diagnosis import Diagnosis, Finding, Level, Speed, judge
from kserve_pvc._doctor.exchange import read_beat
from kserve_pvc._doctor.peer import BEAT_LEASE, DIRECTORY, beating, check_meeting, meet, new_directory
from kserve_pvc._doctor.reports import PeerReport
from kserve_pvc._format import layout
from kserve_pvc._format.codec import MAX_RECORD_BYTES, decode, encode
from kserve_pvc._format.log_entry import Holder, StoreSettings, decode_settings
from kserve_pvc._show.units import format_bytes
from kserve_pvc._volume.profile import Profile, describe, probe
from kserve_pvc._volume.reading import Volume
from kserve_pvc._volume.scratch import Scratch, open_scratch
from kserve_pvc._volume.writing import VolumeWriter
from kserve_pvc.errors import InsufficientSpaceError, ReadOnlyStoreError, StoreError, StoreFormatError
from kserve_pvc.locks.liveness import is_provably_dead

SAMPLE_BYTES = 64 * 1024 * 1024

_BLOCK_BYTES = 4 * 1024 * 1024
_LONGEST_SAMPLE = 10.0
_LEFT_AFTER = 3600.0


def diagnose(
    root: str | os.PathLike[str],
    *,
    writes: bool,
    holder: Holder,
    peer: str | None = None,
    timeout: float = defaults.DOCTOR_TIMEOUT,
    sample_bytes: int = SAMPLE_BYTES,
) -> Diagnosis:
    """
    Examine a directory, which need not be a store.

    Args:
        writes: False looks only, and writes nothing.
        peer: The name of a meeting with a doctor on another node that is given the same name.
        timeout: Seconds to wait for it.

    Raises:
        StoreRootError: It is missing or no directory.
        ReadOnlyStoreError: A peer was asked for, and nothing may be written.
        SettingsError: The name of the meeting means nothing.
    """
    volume = Volume(root)
    if peer is not None:
        check_meeting(peer)
    if peer is not None and not writes:
        raise ReadOnlyStoreError(
            str(volume.root), "meet another doctor", 'let this one write, with `mode="rw"` or `KSERVE_PVC_MODE=rw`'
        )
    findings: list[Finding] = []
    settings = _read_settings(volume, findings)
    seen = _Seen(profile=describe(volume))
    if writes and not seen.profile.read_only:
        seen = _examine(VolumeWriter(root), seen, holder, peer, timeout, sample_bytes, findings)
    diagnosis = _conclude(volume, settings, seen)
    findings += judge(diagnosis, wanted_peer=peer is not None)
    order: Mapping[Level, int] = {"unsafe": 0, "change": 1, "note": 2}
    return attrs.evolve(diagnosis, findings=tuple(sorted(findings, key=lambda finding: order[finding.level])))


@attrs.frozen(kw_only=True)
class _Seen:
    profile: Profile
    clock_ahead: float | None = None
    speed: Speed | None = None
    peer: PeerReport | None = None


def _read_settings(volume: Volume, findings: list[Finding]) -> StoreSettings | None:
    try:
        data = volume.read(layout.SETTINGS, MAX_RECORD_BYTES)
        return None if data is None else decode_settings(data, str(layout.SETTINGS))
    except StoreError as error:
        findings.append(_failed("store-settings", error))
        return None


def _conclude(volume: Volume, settings: StoreSettings | None, seen: _Seen) -> Diagnosis:
    space, owner = os.statvfs(volume.root), os.stat(volume.root)
    return Diagnosis(
        root=volume.root,
        is_store=settings is not None,
        locker=settings.locker if settings else "lease",
        lease_seconds=settings.lease_seconds if settings else seen.profile.lease_seconds,
        profile=seen.profile,
        uid=os.geteuid(),
        gid=os.getegid(),
        owner_uid=owner.st_uid,
        owner_gid=owner.st_gid,
        mode=stat.S_IMODE(owner.st_mode),
        free_bytes=space.f_bavail * space.f_frsize,
        total_bytes=space.f_blocks * space.f_frsize,
        clock_ahead=seen.clock_ahead,
        speed=seen.speed,
        peer=seen.peer,
        findings=(),
    )


def _examine(
    writer: VolumeWriter,
    seen: _Seen,
    holder: Holder,
    peer: str | None,
    timeout: float,
    sample_bytes: int,
    findings: list[Finding],
) -> _Seen:
    """Do what writes, one thing after the other. What fails is a finding, and the others are done all the same."""
    own = new_directory()

    def attempt(what: str, act: Callable[[], Mapping[str, Any]]) -> None:
        nonlocal seen
        try:
            seen = attrs.evolve(seen, **act())
        except StoreError as error:
            findings.append(_failed(what, error))

    def begin() -> Mapping[str, Any]:
        writer.write_private(own / "owner", encode(holder))
        undo.enter_context(beating(writer, own))
        return {"profile": probe(writer, own / "probe")}

    with ExitStack() as undo:
        undo.callback(_take_away, writer, own)
        attempt("write", begin)
        if seen.profile.mkdir is not None:
            attempt("speed", lambda: _measure(writer, own / "sample", sample_bytes))
            if peer is not None:
                attempt("peer", lambda: {"peer": meet(writer, own, peer, holder, timeout)})
        sweep(writer)
    return seen


def sweep(writer: VolumeWriter) -> None:
    """
    Take away what doctors left that were killed: at once if that is provable, else after an hour without a beat.
    """
    with suppress(StoreError, OSError):
        names = [name for name in writer.list_names(layout.DOCTOR) if DIRECTORY.fullmatch(name) is not None]
        old = {
            name: read_beat(writer, name)
            for name in names
            if abs(time.time() - int(name.partition("-")[0])) > _LEFT_AFTER
        }
        if old:
            time.sleep(BEAT_LEASE / 2)  # A clock may be wrong by an hour, and a doctor that lives beats meanwhile.
        for name in names:
            if _is_dead(writer, name) or (name in old and old[name] == read_beat(writer, name)):
                _take_away(writer, layout.DOCTOR / name)


def _is_dead(writer: VolumeWriter, name: str) -> bool:
    place = layout.DOCTOR / name / "owner"
    with suppress(StoreError, OSError):
        return is_provably_dead(decode(Holder, writer.read(place, MAX_RECORD_BYTES) or b"", str(place)))
    return False


def _take_away(writer: VolumeWriter, place: PurePosixPath) -> None:
    with suppress(StoreError, OSError):
        writer.delete_trash(place)


def _measure(writer: VolumeWriter, place: PurePosixPath, sample_bytes: int) -> Mapping[str, Any]:
    # No more than an eighth of what is said to be free: others are at work here.
    wanted = min(sample_bytes, writer.free_bytes() // 8) // _BLOCK_BYTES * _BLOCK_BYTES
    with open_scratch(writer, place) as scratch:
        found: dict[str, Any] = {"clock_ahead": _clock_ahead(scratch)}
        if wanted > 0:
            found["speed"] = _speed(writer, scratch, wanted)
    return found


def _clock_ahead(scratch: Scratch) -> float:
    before = time.time()
    scratch.write("clock", b"now")
    after = time.time()
    fd = scratch.open("clock")
    try:
        dated = os.fstat(fd).st_mtime
    finally:
        os.close(fd)
    # Between the two it is as right as can be told; some file systems keep whole seconds.
    return 0.0 if before - 1.0 <= dated <= after + 0.1 else dated - (before + after) / 2


def _speed(writer: VolumeWriter, scratch: Scratch, wanted: int) -> Speed:
    blocks = [os.urandom(_BLOCK_BYTES) for _ in range(2)]
    free = writer.free_bytes()
    fd = scratch.create("sample")
    try:
        written, seconds = _write_sample(fd, blocks, wanted)
        dropped = free - writer.free_bytes()
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    rate, reading = _read_sample(scratch, written)
    return Speed(
        sample_bytes=written,
        write_bytes_per_second=written / max(seconds, 1e-9),
        read_bytes_per_second=rate,
        reading=reading,
        free_dropped_bytes=dropped,
    )


def _write_sample(fd: int, blocks: list[bytes], wanted: int) -> tuple[int, float]:
    began = time.monotonic()
    written = 0
    while written < wanted and time.monotonic() - began < _LONGEST_SAMPLE:
        written += os.pwrite(fd, blocks[written // _BLOCK_BYTES % len(blocks)], written)
    os.fsync(fd)
    return written, time.monotonic() - began


def _read_sample(scratch: Scratch, size: int) -> tuple[float | None, Literal["direct", "dropped"] | None]:
    ways: dict[Literal["direct", "dropped"], int] = {"direct": os.O_DIRECT, "dropped": 0}
    for reading, flags in ways.items():
        with suppress(OSError):  # Not every file system reads around the page cache.
            return _read_all(scratch, flags, size), reading
    return None, None


def _read_all(scratch: Scratch, flags: int, size: int) -> float:
    import mmap

    fd = scratch.open("sample", flags)
    try:
        with mmap.mmap(-1, _BLOCK_BYTES) as page_aligned:
            began, done = time.monotonic(), 0
            while done < size and time.monotonic() - began < _LONGEST_SAMPLE:
                count = os.preadv(fd, [page_aligned], done)
                if count == 0:
                    break
                done += count
            return done / max(time.monotonic() - began, 1e-9)
    finally:
        os.close(fd)


def _failed(what: str, error: StoreError) -> Finding:
    if isinstance(error, ReadOnlyStoreError):
        rule, remedy = "a process that downloads writes here", error.hint
        return Finding(
            what="not-writable", level="change", measured=f"cannot {error.operation}", rule=rule, remedy=remedy
        )
    if isinstance(error, InsufficientSpaceError):
        measured = f"a write did not fit, and {format_bytes(error.free_bytes)} are said to be free"
        remedy = "remove a model with `kserve-pvc rm`, or enlarge the volume or its quota"
        # The sample is at most an eighth of what is free.
        lies = what == "speed" and error.free_bytes > _BLOCK_BYTES
        rule = "a download asks first whether it fits" if lies else "a download needs room"
        return Finding(
            what="free-space-lies" if lies else "full", level="change", measured=measured, rule=rule, remedy=remedy
        )
    remedy = "see the volume's own logs, then call again"
    if isinstance(error, StoreFormatError):
        remedy = "upgrade kserve_pvc if the store is newer, else see who wrote there"
    return Finding(
        what=what,
        level="unsafe",
        measured=str(error),
        rule="the volume must do what the store asks of it",
        remedy=remedy,
    )
