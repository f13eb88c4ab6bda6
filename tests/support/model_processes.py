"""
The processes of the model checker: production code on a simulated volume, with simulated clocks, sources and transfers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import model_checker
from model_checker import current
from model_volume import (
    DEAD,
    LEASE_SECONDS,
    PARTIAL,
    VISIBILITY_DELAY,
    WHOLE,
    AwaitModel,
    Begin,
    Close,
    Collect,
    DropLease,
    ForgetClaim,
    ForgetLeases,
    ListClaims,
    ListGenerations,
    ListLeases,
    ListLog,
    ListSlots,
    MakeClaim,
    Now,
    Publish,
    Read,
    ReadBeat,
    ReadLeaseBeat,
    ReadLeaseOwner,
    ReadOwner,
    ReadRecord,
    Record,
    Release,
    Reserve,
    Resolve,
    Sleep,
    Sync,
    TakeLease,
    Upload,
    Watch,
    Write,
    WriteOwner,
)

from kserve_pvc import _model, _store
from kserve_pvc._download import attempt, call, cancellation, download, protocol, publication, tally
from kserve_pvc._format import layout
from kserve_pvc._format.codec import encode
from kserve_pvc._format.log_entry import Holder, LogEntry, StoreSettings, encode_settings
from kserve_pvc._keys import aliases, claims, log, log_writer, procedures, removal
from kserve_pvc._show import observing
from kserve_pvc._source.contract import Resolved
from kserve_pvc._source.ref import ModelRef, parse_ref
from kserve_pvc._volume import writing
from kserve_pvc.errors import StoreError, VolumeError
from kserve_pvc.locks.lease import LeaseLostError

URI = "file:///source"
REF = parse_ref(URI)
KEY = REF.key
# It is looked at only for its number, so that a copy of a store is another store.
ROOT = Path("/")
PATIENCE_SECONDS = 1.5
THEN = datetime(2026, 1, 1, tzinfo=UTC)
SETTINGS = encode_settings(
    StoreSettings(store_id="0" * 32, locker="lease", lease_seconds=LEASE_SECONDS, created_at=THEN)
)


LOG = layout.log_dir(KEY)
GENERATIONS = layout.MODELS / KEY


@lru_cache
def _listing(place: PurePosixPath) -> Any:
    """The operation that lists a directory."""
    if place.parent == layout.LEASES:
        return ListLeases(place.name)
    if layout.is_claim(place) or place.parent.parent == layout.LEASES:
        return None
    known = {
        layout.slot_dir(KEY): ListSlots(),
        layout.claims_dir(KEY): ListClaims(),
        GENERATIONS: ListGenerations(),
        # More than there are: any generation may look unfinished, since its writer may die before its journal goes.
        layout.STAGING: ListGenerations(),
    }
    return known[place]


@lru_cache
def _reading(place: PurePosixPath) -> Any:
    """The operation that reads a file."""
    above = place.parent
    if above == LOG:
        return ReadRecord(place.name)
    if layout.is_claim(above):
        return {"owner": ReadOwner, "beat": ReadBeat}[place.name](int(above.name))
    assert above.parent.parent == layout.LEASES
    return {"owner": ReadLeaseOwner, "beat": ReadLeaseBeat}[place.name](above.name)


class SimulatedVolume:
    """
    What the volume offers to production, as operations.
    """

    def __init__(self, root: object) -> None:
        self.root = ROOT

    def check(self) -> None:
        pass

    def is_directory(self, place: PurePosixPath) -> bool:
        return True

    def link_target(self, place: PurePosixPath) -> str | None:
        return None

    def absolute(self, place: PurePosixPath) -> Path:
        return ROOT / place

    def list_names(self, place: PurePosixPath, list_directory: object = None) -> list[str]:
        if place == LOG:
            return list(current().do(ListLog(current().is_late)))
        operation = _listing(place)
        # Production lists some for what it does to the caches of a node, and believes nothing of it.
        return [] if operation is None else list(current().do(operation))

    def read(self, place: PurePosixPath, limit: int, *, uncached: bool = False) -> bytes | None:
        if place == layout.SETTINGS:
            return SETTINGS
        assert uncached == (place.name == "beat")
        found: bytes | None = current().do(_reading(place))
        return found

    def reserve(self, place: PurePosixPath, *, is_durable: bool = True) -> bool:
        number = int(place.name)
        return bool(current().do(MakeClaim(number) if layout.is_claim(place) else Reserve(number)))

    def publish(self, place: PurePosixPath, data: bytes, private: PurePosixPath) -> bool:
        assert place.parent == layout.log_dir(KEY)
        assert private.parent.parent == layout.STAGING
        return bool(current().do(Publish(place.name, data)))

    def write_private(self, place: PurePosixPath, data: bytes) -> None:
        if layout.is_claim(place.parent):
            current().do(WriteOwner(int(place.parent.name), data))
        elif place.parent != layout.MANIFESTS:
            assert place.name == "owner"
            current().do(TakeLease(place.parent.parent.name, place.parent.name, data))

    write_sign = write_private

    @property
    def is_local(self) -> bool:
        return False

    def translated(self, operation: str, place: PurePosixPath) -> AbstractContextManager[None]:
        return nullcontext()

    def create(self, place: PurePosixPath) -> PurePosixPath:
        return place

    def throw_away(self, place: PurePosixPath) -> None:
        if layout.STAGING in place.parents or layout.MANIFESTS in place.parents:
            return
        if layout.is_claim(place):
            current().do(ForgetClaim(int(place.name)))
        elif place.parent == layout.LEASES:
            current().do(ForgetLeases(place.name))
        elif place.parent.parent == layout.LEASES:
            current().do(DropLease(place.name))
        else:
            assert place.parent == GENERATIONS
            current().do(Collect(place.name))

    discard = throw_away

    def empty_trash(self, older_than: float) -> None:
        pass

    def open_shared(self, place: PurePosixPath) -> int:
        raise AssertionError("no locker needs it")


class Heart:
    """
    The heart of a claim or lease. That it beats is an outcome of somebody's sleep.
    """

    is_ours = True

    def __init__(self, place: PurePosixPath, **_: Any) -> None:
        self._place = place

    def stop(self) -> None:
        above = self._place.parent
        is_claim = layout.is_claim(above)
        current().do(Release(int(above.name) if is_claim else 0, "" if is_claim else above.name))


class Clock:
    """
    The module `time` for one module of production.
    """

    def __init__(self, sleep: type | None) -> None:
        self._sleep = sleep

    def monotonic(self) -> float:
        if self._sleep is Watch:
            current().now = round(current().now + current().do(Now()), 3)
        return current().now

    def sleep(self, seconds: float) -> None:
        if self._sleep is not None:
            current().now = round(current().now + current().do(self._sleep(seconds)), 3)


class Stopped(Clock):
    """
    For modules that measure time for people only, so that it makes no two situations different.
    """

    def monotonic(self) -> float:
        return 0.0


class Sources:
    """
    A source of models, which holds one version after the other.
    """

    is_offline = False

    def why_offline(self, local_files_only: bool) -> str:
        return ""

    def check_online(self, ref: ModelRef) -> None:
        pass

    def check(self, ref: ModelRef) -> None:
        pass

    def with_arguments(self, *arguments: object) -> Sources:
        return self

    def resolve(self, ref: ModelRef, cancel: object = None) -> Resolved:
        return Resolved(ref=ref, version=current().do(Resolve()), files=())

    def backend(self, ref: ModelRef) -> Sources:
        return self


class Attempt(attempt.Attempt):
    """
    Fetches into a generation; the bytes come in two pieces. What a subclass changes is wrong.
    """

    settles = True

    def begin(self) -> None:
        current().do(Begin(self._generation))

    def _write_files(self) -> tuple[()]:
        self.resolved = self.resolved or self._backend.resolve(self._ref)
        self.begin()
        for content in (PARTIAL, WHOLE):
            if not current().do(Write(self._generation, content)):
                raise LeaseLostError
        for operation in (Sync, Close) if self.settles else ():
            if not current().do(operation(self._generation)):
                raise VolumeError(self._generation, "syncing", "Input/output error")
        return ()


def holder() -> Holder:
    return holder_of(current().who)


def holder_of(who: int) -> Holder:
    return Holder(pod=f"p{who}", node="n", uid=0, pid=who, boot_id="", pid_namespace="", started=0)


def token_hex(count: int) -> str:
    run = current()
    if not run.is_late:  # A reader drops its lease before it takes another, which may as well have the same name.
        run.tokens += 1
    return token_of(run.who, run.tokens)


def token_of(who: int, number: int) -> str:
    return hashlib.sha256(b"%d %d" % (who, number)).hexdigest()[:32]


def commit(seq: int, epoch: int, who: int, version: str = "v1") -> Record:
    """
    The record of a model that is there from the beginning.
    """
    entry = LogEntry(
        type="commit",
        seq=seq,
        key=KEY,
        uri=REF.uri,
        revision=REF.revision,
        allow_patterns=REF.allow_patterns,
        ignore_patterns=REF.ignore_patterns,
        generation=f"{epoch:012d}-{token_of(who, 1)}",
        version=version,
        files=0,
        size_bytes=0,
        manifest_sha256="0" * 64,
        digest="sha256",
        policy="allow",
        created_at=THEN,
        writer=holder_of(who),
    )
    return Record(entry.name, encode(entry))


# The clock of each module.
_CLOCKS = {
    claims: Clock(Watch),
    removal: Clock(Sleep),
    cancellation: Clock(Sleep),
    download: Clock(None),
    # Looking again soon: another process goes on meanwhile or does not, which the checker tries anyway.
    log: Clock(None),
    log_writer: Clock(None),
    **dict.fromkeys((call, tally, observing, _model, _store), Stopped(None)),
}


def simulate(monkeypatch: Any) -> None:
    """
    Let production run on the simulated volume.
    """
    for module, clock in _CLOCKS.items():
        monkeypatch.setattr(module, "time", clock)
    # How often a process looks changes when it goes on, which the checker tries at every moment anyway.
    monkeypatch.setattr(procedures, "LOOKS_FOR_A_RECORD", 1)
    monkeypatch.setattr(log, "_REREADS", 1)
    monkeypatch.setattr(protocol, "_SHORTEST_PAUSE", 1.0)
    monkeypatch.setattr(download, "random", SimpleNamespace(uniform=lambda low, high: high))
    monkeypatch.setattr(download, "run_detachable", lambda act, *_, **__: act())
    monkeypatch.setattr(attempt, "Attempt", Attempt)
    monkeypatch.setattr(claims, "Heartbeat", Heart)
    monkeypatch.setattr(removal, "mount_of", lambda root: SimpleNamespace(visibility_delay=VISIBILITY_DELAY))
    # What has no effects need not be computed anew each time that a process is run.
    for module in (claims, log_writer):
        monkeypatch.setattr(module, "encode", lru_cache(10_000)(encode))
    monkeypatch.setattr(claims, "_decoded", lru_cache(10_000)(claims._decoded))
    # There is room on this volume, and no brief call was killed.
    monkeypatch.setattr(removal, "fill_reserve", lambda writer: None)
    monkeypatch.setattr(removal, "sweep_staging", lambda writer: None)
    # Any generation may have a manifest, and the oldest leftover be the best one, so that those of live writers go.
    monkeypatch.setattr(log, "_is_unpublished", lambda volume, generation: False)
    monkeypatch.setattr(publication, "most_noted", lambda volume, generations: generations[-1])
    for module in (claims, removal, publication):
        monkeypatch.setattr(module, "now", lambda: THEN)
    for module in (claims, removal, publication):
        monkeypatch.setattr(module, "secrets", SimpleNamespace(token_hex=token_hex))
    for module in (call, aliases):
        monkeypatch.setattr(module, "settle_view_quietly", lambda writer, key: None)
    monkeypatch.setattr(observing, "EventLog", lambda: lambda event: None)
    monkeypatch.setattr(_store, "this_process", holder)
    monkeypatch.setattr(_store, "Volume", SimulatedVolume)
    monkeypatch.setattr(writing, "VolumeWriter", SimulatedVolume)
    monkeypatch.setattr(_model, "newest_returned", lambda store, key: current().returned.get(key, 0))
    monkeypatch.setattr(_model, "remember_returned", _remember)


def _remember(store: object, key: str, seq: int) -> None:
    current().returned[key] = max(seq, current().returned.get(key, 0))


def _open() -> _store.ModelStore:
    store = _store.ModelStore(ROOT, mode="rw")
    store._sources = Sources()
    return store


def asks() -> object:
    """
    A call of `ensure`.
    """
    with suppress(StoreError):
        return _open().ensure(URI, progress=False, timeout=PATIENCE_SECONDS).status
    return None


def refreshes() -> object:
    """
    A call of `ensure` for what the source holds now.
    """
    with suppress(StoreError):
        return _open().ensure(URI, refresh=True, progress=False, timeout=PATIENCE_SECONDS).status
    return None


def forces() -> object:
    """
    A call of `ensure` that downloads in any case.
    """
    with suppress(StoreError):
        return _open().ensure(URI, force_download=True, progress=False, timeout=PATIENCE_SECONDS).status
    return None


def reads() -> object:
    """
    The `with store.open(…)` of a server, on a node that learns of changes late.
    """
    current().is_late = True
    with suppress(StoreError), _open().open(URI) as model:
        current().do(Read(model.path.name))
    return None


def passes() -> object:
    """
    A reader that is late: its lease is there for a moment, and it never reads.
    """
    name = token_hex(16)
    current().do(TakeLease(commit(1, 1, DEAD).entry.generation, name, b""))
    current().do(Release(0, name))
    return None


def removes() -> object:
    """
    A call of `remove`.
    """
    with suppress(StoreError):
        _open().remove(URI, trash_seconds=0)
    return None


def breaks() -> object:
    """
    A call of `break_lock`.
    """
    with suppress(StoreError):
        _open().break_lock(URI)
    return None


def once_present(process: Callable[[], object]) -> Callable[[], object]:
    """
    A process that somebody starts as soon as there is a model.
    """

    def run() -> object:
        current().do(AwaitModel())
        return process()

    return run


def uploads() -> object:
    """
    The owner of the source, who uploads a newer version twice.
    """
    for _ in range(2):
        current().do(Upload())
    return None


model_checker.CONSTANT |= {
    _store.ModelStore,
    _model.Lookup,
    SimulatedVolume,
    Sources,
    ModelRef,
    Holder,
    StoreSettings,
    protocol.Rules,
    cancellation.Cancellation,
    Clock,
}
