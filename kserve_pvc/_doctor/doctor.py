"""
The doctor: examines what a volume is, what it supports and how fast it is, and what should be changed about it.

All tests run in a directory of their own below `.kserve-pvc/doctor`, which is deleted at the end. The directory of a
killed doctor is deleted by the next doctor on its node, or by any doctor after an hour.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import PurePosixPath
from typing import Any, Literal

import attrs

from kserve_pvc import _defaults as defaults
from kserve_pvc._doctor.diagnosis import Diagnosis, Finding, Level, Speed, judge
from kserve_pvc._doctor.exchange import read_heartbeat
from kserve_pvc._doctor.peer import (
    DIRECTORY,
    LEASE_SECONDS,
    check_rendezvous,
    examine_with_peer,
    heartbeats,
    new_directory,
)
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
_ABANDONED_AFTER = 3600.0
_RETRY = "check the logs of the volume, then retry"


def diagnose(
    root: str | os.PathLike[str],
    *,
    writes: bool,
    holder: Holder,
    peer: str | None = None,
    timeout: float = defaults.DOCTOR_TIMEOUT,
    sample_bytes: int = SAMPLE_BYTES,
    sources: Mapping[str, Sequence[str]] | None = None,
    plugins: Mapping[str, Sequence[str]] | None = None,
) -> Diagnosis:
    """
    Examine a directory, which need not be a store.

    Args:
        writes: Whether write tests may run. Otherwise the directory is only inspected.
        peer: Run tests with a doctor on another node that is started with the same name.
        timeout: Seconds to wait for the peer.
        sources: Why sources are read through their fsspec class, for the report.
        plugins: Which distributions claim a scheme, for the report.

    Returns:
        All measurements, and the findings with the most severe first.

    Raises:
        StoreRootError: The directory is missing, or is not a directory.
        ReadOnlyStoreError: A peer is given, and `writes` is False.
        SettingsError: The name of the peer is not valid.
    """
    volume = Volume(root)
    if peer is not None:
        check_rendezvous(peer)
    if peer is not None and not writes:
        raise ReadOnlyStoreError(
            str(volume.root), "test with a peer", 'allow writing with `mode="rw"` or `KSERVE_PVC_MODE=rw`'
        )
    findings: list[Finding] = []
    settings = _read_settings(volume, findings)
    measured = _Measurements(profile=describe(volume))
    if writes and not measured.profile.read_only:
        measured = _examine(VolumeWriter(root), measured, holder, peer, timeout, sample_bytes, findings)
    diagnosis = _diagnosis(volume, settings, measured)
    findings += judge(diagnosis, expects_peer=peer is not None)
    order: Mapping[Level, int] = {"unsafe": 0, "change": 1, "note": 2}
    return attrs.evolve(
        diagnosis,
        sources=sources or {},
        plugins=plugins or {},
        findings=tuple(sorted(findings, key=lambda finding: order[finding.level])),
    )


@attrs.frozen(kw_only=True)
class _Measurements:
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


def _diagnosis(volume: Volume, settings: StoreSettings | None, measured: _Measurements) -> Diagnosis:
    space, owner = os.statvfs(volume.root), os.stat(volume.root)
    return Diagnosis(
        root=volume.root,
        is_store=settings is not None,
        locker=settings.locker if settings else "lease",
        lease_seconds=settings.lease_seconds if settings else measured.profile.lease_seconds,
        profile=measured.profile,
        uid=os.geteuid(),
        gid=os.getegid(),
        owner_uid=owner.st_uid,
        owner_gid=owner.st_gid,
        mode=stat.S_IMODE(owner.st_mode),
        free_bytes=space.f_bavail * space.f_frsize,
        total_bytes=space.f_blocks * space.f_frsize,
        clock_ahead=measured.clock_ahead,
        speed=measured.speed,
        peer=measured.peer,
        findings=(),
    )


def _examine(
    writer: VolumeWriter,
    measured: _Measurements,
    holder: Holder,
    peer: str | None,
    timeout: float,
    sample_bytes: int,
    findings: list[Finding],
) -> _Measurements:
    """Run all write tests. One that fails becomes a finding, and does not stop the others."""
    own = new_directory()

    def attempt(what: str, test: Callable[[], Mapping[str, Any]]) -> None:
        nonlocal measured
        try:
            measured = attrs.evolve(measured, **test())
        except StoreError as error:
            findings.append(_failed(what, error))

    def begin() -> Mapping[str, Any]:
        writer.write_private(own / "owner", encode(holder))
        stack.enter_context(heartbeats(writer, own))
        return {"profile": probe(writer, own / "probe")}

    with ExitStack() as stack:
        stack.callback(_delete, writer, own)
        attempt("write", begin)
        if measured.profile.mkdir is not None:
            attempt("speed", lambda: _measure(writer, own / "sample", sample_bytes))
            if peer is not None:
                attempt("peer", lambda: {"peer": examine_with_peer(writer, own, peer, holder, timeout)})
        sweep(writer)
    return measured


def sweep(writer: VolumeWriter) -> None:
    """
    Delete the directories of killed doctors: at once if they are provably dead, else after an hour without a heartbeat.
    """
    with suppress(StoreError, OSError):
        names = [name for name in writer.list_names(layout.DOCTOR) if DIRECTORY.fullmatch(name) is not None]
        old = {
            name: read_heartbeat(writer, name)
            for name in names
            if abs(time.time() - int(name.partition("-")[0])) > _ABANDONED_AFTER
        }
        if old:
            time.sleep(LEASE_SECONDS / 2)  # Clocks may be wrong by an hour: a live doctor writes a heartbeat meanwhile.
        for name in names:
            if _is_dead(writer, name) or (name in old and old[name] == read_heartbeat(writer, name)):
                _delete(writer, layout.DOCTOR / name)


def _is_dead(writer: VolumeWriter, name: str) -> bool:
    place = layout.DOCTOR / name / "owner"
    with suppress(StoreError, OSError):
        return is_provably_dead(decode(Holder, writer.read(place, MAX_RECORD_BYTES) or b"", str(place)))
    return False


def _delete(writer: VolumeWriter, place: PurePosixPath) -> None:
    with suppress(StoreError, OSError):
        writer.delete_trash(place)


def _measure(writer: VolumeWriter, place: PurePosixPath, sample_bytes: int) -> Mapping[str, Any]:
    # At most an eighth of the free space, since other processes write here too.
    size = min(sample_bytes, writer.free_bytes() // 8) // _BLOCK_BYTES * _BLOCK_BYTES
    with open_scratch(writer, place) as scratch:
        measured: dict[str, Any] = {"clock_ahead": _clock_ahead(scratch)}
        if size > 0:
            measured["speed"] = _speed(writer, scratch, size)
    return measured


def _clock_ahead(scratch: Scratch) -> float:
    before = time.time()
    scratch.write("clock", b"now")
    after = time.time()
    fd = scratch.open("clock")
    try:
        modified = os.fstat(fd).st_mtime
    finally:
        os.close(fd)
    # A timestamp between the two shows no difference; some file systems store whole seconds.
    return 0.0 if before - 1.0 <= modified <= after + 0.1 else modified - (before + after) / 2


def _speed(writer: VolumeWriter, scratch: Scratch, size: int) -> Speed:
    blocks = [os.urandom(_BLOCK_BYTES) for _ in range(2)]
    free = writer.free_bytes()
    fd = scratch.create("sample")
    try:
        written, seconds = _write_sample(fd, blocks, size)
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


def _write_sample(fd: int, blocks: list[bytes], size: int) -> tuple[int, float]:
    began = time.monotonic()
    written = 0
    while written < size and time.monotonic() - began < _LONGEST_SAMPLE:
        written += os.pwrite(fd, blocks[written // _BLOCK_BYTES % len(blocks)], written)
    os.fsync(fd)
    return written, time.monotonic() - began


def _read_sample(scratch: Scratch, size: int) -> tuple[float | None, Literal["direct", "dropped"] | None]:
    modes: dict[Literal["direct", "dropped"], int] = {"direct": os.O_DIRECT, "dropped": 0}
    for reading, flags in modes.items():
        with suppress(OSError):  # Not every file system supports O_DIRECT.
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
        return Finding(
            what="not-writable",
            level="change",
            measured=f"cannot {error.operation}",
            rule="downloaders need write access",
            hint=error.hint,
        )
    if isinstance(error, InsufficientSpaceError):
        return _out_of_space(what, error)
    is_format = isinstance(error, StoreFormatError)
    return Finding(
        what=what,
        level="unsafe",
        measured=str(error),
        rule="the volume must support the operations of a store",
        hint="upgrade kserve_pvc if the store is newer, else find out what wrote there" if is_format else _RETRY,
    )


def _out_of_space(what: str, error: InsufficientSpaceError) -> Finding:
    # The sample takes at most an eighth of the free space.
    is_wrong = what == "speed" and error.free_bytes > _BLOCK_BYTES
    return Finding(
        what="free-space-wrong" if is_wrong else "full",
        level="change",
        measured=f"a write did not fit, with {format_bytes(error.free_bytes)} reported free",
        rule="a download checks first whether it fits" if is_wrong else "a download needs free space",
        hint="remove a model with `kserve-pvc rm`, or enlarge the volume or its quota",
    )
