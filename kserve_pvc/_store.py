"""
`ModelStore`: one shared volume, and everything a person or a server does with it.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import attrs

from kserve_pvc import _layout as layout
from kserve_pvc._claims import Sign, break_claim, read_claim, reading
from kserve_pvc._download import TRASH_SECONDS, Download, Outcome, Wish, reusable_bytes
from kserve_pvc._events import Finished, Listener
from kserve_pvc._log import LogView, read_log, read_log_of, read_manifest
from kserve_pvc._progress import Callback, make_listener
from kserve_pvc._record import (
    KEY,
    MAX_LEASE_SECONDS,
    MAX_RECORD_BYTES,
    MIN_LEASE_SECONDS,
    Beat,
    Claim,
    LogEntry,
    Record,
    StoreSettings,
    decode_settings,
    encode_settings,
    now,
)
from kserve_pvc._ref import ModelRef, Patterns, parse_ref
from kserve_pvc._removal import Removal
from kserve_pvc._settings import Mode, pod_and_node, read_settings
from kserve_pvc._source import Backend, BackendFactory, Resolved
from kserve_pvc._transfer import MAX_WORKERS, PART_BYTES
from kserve_pvc._verify import Level, Problem, Verification, compare
from kserve_pvc._volume import Volume, VolumeWriter, mount_of
from kserve_pvc.backends import check_scheme, make_backend
from kserve_pvc.errors import (
    DamagedRecordError,
    LockerMismatchError,
    LockTimeoutError,
    ModelNotFoundError,
    ReadOnlyStoreError,
    SettingsError,
    StoreFormatError,
    UnsafePathError,
)
from kserve_pvc.locks import LOCKERS
from kserve_pvc.locks.liveness import here

# Seconds to wait for another downloader. Long enough for hundreds of gigabytes, short enough to show up in monitoring.
DEFAULT_TIMEOUT = 3600.0
LOCAL_LEASE_SECONDS = 30.0
NETWORK_LEASE_SECONDS = 60.0

Status = Literal["present", "downloaded", "waited"]

# One download per process is a matter of the process, not of one ModelStore object: (store id, key) -> lock.
_flights: dict[tuple[str, str], threading.Lock] = {}
_process_guard = threading.Lock()
# The newest record this process has returned, so that a stale listing never takes it back to an older one.
_returned: dict[tuple[str, str], int] = {}


def _forget_flights() -> None:
    global _process_guard
    _process_guard = threading.Lock()
    _flights.clear()


# A lock that another thread held at the time of a fork would stay locked in the child for ever.
os.register_at_fork(after_in_child=_forget_flights)


@attrs.frozen(slots=False, kw_only=True)
class Model:
    """
    A complete, verified model on the volume. `os.fspath(model)` is its directory.

    It stays valid until the model is removed; hold `ModelStore.open` to keep it from being removed.

    Args:
        status: How this call got it: it was `present`, was `downloaded` by this call, or was `waited` for.
        bytes_fetched: What this call itself read from the source.
        seconds: How long the call took.
    """

    uri: str
    revision: str | None
    allow_patterns: tuple[str, ...] | None
    ignore_patterns: tuple[str, ...]
    key: str
    version: str
    path: Path
    status: Status
    size_bytes: int
    files: int
    created_at: datetime
    bytes_fetched: int = 0
    seconds: float = 0.0
    _entry: LogEntry = attrs.field(repr=False, alias="entry")
    _root: Path = attrs.field(repr=False, alias="root")

    @cached_property
    def record(self) -> Record:
        """
        Where the model came from and every file of it, read from the volume when first asked for.

        Raises:
            StoreFormatError: The manifest is damaged or gone.
        """
        entry, manifest = self._entry, read_manifest(Volume(self._root), self._entry)
        return Record(
            uri=entry.uri,
            revision=entry.revision,
            allow_patterns=entry.allow_patterns,
            ignore_patterns=entry.ignore_patterns,
            key=entry.key,
            version=entry.version,
            generation=entry.generation,
            files=manifest.files,
            size_bytes=entry.size_bytes,
            created_at=entry.created_at,
            writer=entry.writer,
        )

    def __fspath__(self) -> str:
        return str(self.path)


@attrs.frozen(kw_only=True)
class Plan:
    """
    What `ensure` would do. Sizes are bytes; `seconds` is an estimate at the rate last measured, or None without one.
    """

    uri: str
    key: str
    version: str
    action: Literal["nothing", "download"]
    files: int
    size_bytes: int
    bytes_to_fetch: int
    bytes_reusable: int
    free_bytes: int
    seconds: float | None

    @property
    def fits(self) -> bool:
        return self.bytes_to_fetch + self.bytes_reusable <= self.free_bytes


@attrs.frozen(kw_only=True)
class LockInfo:
    """
    A claim that its holder has not given back. `state` is `dead` if its process provably no longer exists.
    """

    uri: str
    key: str
    epoch: int
    holder: str
    since: str
    state: Literal["held", "dead"]
    bytes_done: int
    bytes_total: int
    bytes_per_second: int


class ModelStore:
    """
    A directory on a shared volume that holds complete, verified models.

    Args:
        root: An existing directory, usually where the volume is mounted.
        mode: `"r"` never writes one byte to the volume; `"rw"` may download and remove.
        locker: `"lease"` (default) or `"flock"`. Counts when the store is created, and is read from it ever after.
        lease_seconds: After how long without a sign of life a downloader is taken over. Counts when the store is
            created; default 30 on local and 60 on network file systems.
        backends: Factories by URI scheme, preferred to installed ones.
        storage_options: Arguments for the back end, as in fsspec (endpoint, credentials, …). Never written down.
        part_bytes: The most that a killed process costs per worker in bytes fetched again.

    Raises:
        StoreRootError: The root is missing or no directory.
        ReadOnlyStoreError: Read-write was asked for and the volume refuses.
        StoreFormatError: The store was made by a newer version, or its settings are damaged.
        LockerMismatchError: The store was created with other settings.
        SettingsError: An argument means nothing.

    What is not guaranteed: that a model stays while nobody holds it with `open`, and that two stores on two roots
    share anything. Threads and processes may share a store freely; after a fork the child may go on using it.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        mode: Mode = "r",
        locker: str | None = None,
        lease_seconds: float | None = None,
        backends: Mapping[str, BackendFactory] | None = None,
        storage_options: Mapping[str, Any] | None = None,
        part_bytes: int = PART_BYTES,
    ) -> None:
        _check_arguments(mode, locker, lease_seconds, part_bytes)
        self._volume = Volume(root)
        self._settings = _read_store_settings(self._volume)
        # The tool that writes exists only here: a read-only store has nothing to write with.
        self._writer: VolumeWriter | None = None
        if mode == "rw":
            self._writer = VolumeWriter(root)
            self._settings = self._settings or _create_store(self._writer, locker, lease_seconds)
            # Only writers contend; a reader takes no lock, so there is nothing it could disagree about.
            _check_agreement(self._volume, self._settings, locker, lease_seconds)
        self._factories = dict(backends or {})
        self._options = dict(storage_options or {})
        self._part_bytes = part_bytes
        self._backends: dict[tuple[int, str], Backend] = {}

    @classmethod
    def from_env(
        cls,
        root: str | os.PathLike[str] | None = None,
        *,
        environ: Mapping[str, str] | None = None,
        annotations: Mapping[str, str] | None = None,
        **arguments: Any,
    ) -> ModelStore:
        """
        Open the store the environment describes: `KSERVE_PVC_STORE`, `KSERVE_PVC_MODE`, or the pod's annotations.

        The mode is `KSERVE_PVC_MODE` (`r` or `rw`) if it is set; else read-write for exactly the annotation
        `storage.kserve.io/readonly: "false"`, which is looked up in `annotations` or in the downward-API file
        named by `KSERVE_PVC_ANNOTATIONS` (default `/etc/podinfo/annotations`); else read-only.

        Args:
            root: Instead of `KSERVE_PVC_STORE`, which defaults to `/mnt/models`.
            arguments: Passed on to `ModelStore`.
        """
        settings = read_settings(environ, annotations)
        chosen = {"mode": settings.mode or "r", "locker": settings.locker, "lease_seconds": settings.lease_seconds, **arguments}
        return cls(settings.store if root is None else root, **chosen)

    @property
    def root(self) -> Path:
        return self._volume.root

    @property
    def mode(self) -> Mode:
        return "r" if self._writer is None else "rw"

    def __repr__(self) -> str:
        return f"ModelStore({str(self.root)!r}, mode={self.mode!r})"

    def ensure(
        self,
        uri: str,
        *,
        revision: str | None = None,
        allow_patterns: Patterns = None,
        ignore_patterns: Patterns = None,
        refresh: bool = False,
        force_download: bool = False,
        local_files_only: bool = False,
        timeout: float = DEFAULT_TIMEOUT,
        max_workers: int = MAX_WORKERS,
        callback: Callback | None = None,
        progress: bool | None = None,
    ) -> Model:
        """
        Return a complete, verified directory of the model, downloading it once however many ask.

        A model that is present is returned at once: no network, no lock, no write. Otherwise one process downloads
        and all others wait for it, and take over from what it wrote if it dies.

        Args:
            uri: As KServe spells it, such as `s3://bucket/path`.
            revision: Which version of the source; what it means is the back end's (an S3 VersionId, …).
            refresh: Ask the source, and fetch a newer version beside the old one.
            force_download: Fetch even if it is present, into a new directory.
            local_files_only: Never use the network.
            timeout: Seconds to wait for another downloader; `math.inf` waits for ever.
            max_workers: Files fetched at the same time.
            callback: Told the size and every step in bytes, as fsspec does it.
            progress: None shows bars on a terminal and lines elsewhere, False nothing.

        Raises:
            ReadOnlyStoreError: It is absent, and the store may only be read. The network was not touched.
            ModelNotFoundError: It is absent, and `local_files_only` was asked for.
            LockTimeoutError: Another process was still downloading it.
            InsufficientSpaceError: It does not fit.
            SourceNotFoundError, SourceDeniedError, SourceUnavailableError, SourceChangedError: The source failed.
            DigestMismatchError, UnsafePathError, PolicyError: What the source offers is not acceptable.
        """
        started = time.monotonic()
        if not timeout >= 0:
            raise SettingsError("timeout", str(timeout), "write a number of seconds, 0 or more")
        ref = parse_ref(uri, revision=revision, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        view = self._look(ref)
        entry = _present(view)
        if entry is not None and (local_files_only or not (refresh or force_download)):
            return self._model(entry, "present", started)
        if local_files_only:
            raise self._absent(ref, view)
        if self._writer is None and (entry is None or force_download):
            raise ReadOnlyStoreError(str(self.root), f"download `{ref}`", _HOW_TO_WRITE) from view.damage
        resolved = self._backend(ref).resolve(ref) if refresh else None
        if entry is not None and resolved is not None and not force_download and entry.version == resolved.version:
            return self._model(entry, "present", started)
        if self._writer is None:
            raise ReadOnlyStoreError(str(self.root), f"download the newer version of `{ref}`", _HOW_TO_WRITE)
        check_scheme(ref.scheme, self._factories)
        wish = Wish(after_seq=view.seq if force_download else 0, version=resolved.version if resolved else None)
        with make_listener(progress, callback) as listener, self._flight(ref, timeout):
            left = max(0.0, timeout - (time.monotonic() - started))
            outcome = self._download(self._writer, ref, wish, resolved, left, max_workers, listener)
            listener(Finished(ref=str(ref), status=outcome.status))
        status: Status = "waited" if outcome.status == "present" else outcome.status
        return self._model(outcome.entry, status, started, bytes_fetched=outcome.bytes_fetched)

    def _download(
        self,
        writer: VolumeWriter,
        ref: ModelRef,
        wish: Wish,
        resolved: Resolved | None,
        timeout: float,
        max_workers: int,
        listener: Listener,
    ) -> Outcome:
        assert self._settings is not None  # A read-write store has created them.
        download = Download(
            writer,
            self._settings,
            ref,
            partial(self._backend, ref),
            holder=here(*pod_and_node()),
            timeout=timeout,
            listener=listener,
            wish=wish,
            resolved=resolved,
            part_bytes=self._part_bytes,
            max_workers=max_workers,
        )
        return download.run()

    @contextmanager
    def _flight(self, ref: ModelRef, timeout: float) -> Iterator[None]:
        """Among the threads of this process, one goes ahead and the others wait here."""
        name = (self._identity, ref.key)
        with _process_guard:
            lock = _flights.setdefault(name, threading.Lock())
        if not lock.acquire(timeout=min(timeout, threading.TIMEOUT_MAX)):
            raise LockTimeoutError(str(ref), "another thread of this process", timeout, 0.0, 0, 0)
        try:
            yield
        finally:
            lock.release()

    def get(self, uri: str, *, revision: str | None = None, allow_patterns: Patterns = None, ignore_patterns: Patterns = None) -> Model:
        """
        Return a model that is present. Never the network, never a lock, never a write.

        Raises:
            ModelNotFoundError: It is absent.
            DamagedRecordError: Its newest record is damaged; also a `ModelNotFoundError` and a `StoreFormatError`.
        """
        started = time.monotonic()
        ref = parse_ref(uri, revision=revision, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        view = self._look(ref)
        entry = _present(view)
        if entry is None:
            raise self._absent(ref, view)
        return self._model(entry, "present", started)

    def __contains__(self, uri: str) -> bool:
        return _present(self._look(parse_ref(uri))) is not None

    def list(self) -> list[Model]:
        """
        Every complete model, by key. A model whose newest record is damaged is left out; `verify` names it.
        """
        entries = (_present(read_log(self._volume, key)) for key in self._keys())
        return [self._model(entry, "present", time.monotonic()) for entry in entries if entry is not None]

    def resolve(
        self, uri: str, *, revision: str | None = None, allow_patterns: Patterns = None, ignore_patterns: Patterns = None
    ) -> Resolved:
        """
        Ask the source what it holds now. Network, but no write.

        Raises:
            SourceNotFoundError, SourceDeniedError, SourceUnavailableError, UnsafePathError: As `ensure`.
        """
        ref = parse_ref(uri, revision=revision, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        return self._backend(ref).resolve(ref)

    def plan(
        self,
        uri: str,
        *,
        revision: str | None = None,
        allow_patterns: Patterns = None,
        ignore_patterns: Patterns = None,
        refresh: bool = False,
    ) -> Plan:
        """
        Say what `ensure` would do, without doing it. The source is asked unless the model is present.

        What is not guaranteed: that the free space is real (some network volumes make it up), and that nobody else
        changes anything in between.
        """
        ref = parse_ref(uri, revision=revision, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        entry = _present(self._look(ref))
        resolved = None if entry is not None and not refresh else self._backend(ref).resolve(ref)
        if entry is not None and (resolved is None or resolved.version == entry.version):
            return self._plan(ref, entry.version, "nothing", entry.files, entry.size_bytes, 0, 0)
        assert resolved is not None  # Without an entry the source was asked.
        reusable = reusable_bytes(self._volume, resolved)
        to_fetch = resolved.size_bytes - reusable
        return self._plan(ref, resolved.version, "download", len(resolved.files), resolved.size_bytes, to_fetch, reusable)

    def _plan(
        self, ref: ModelRef, version: str, action: Literal["nothing", "download"], files: int, size_bytes: int, to_fetch: int, reusable: int
    ) -> Plan:
        rate = self._measured_rate() if to_fetch else 0
        return Plan(
            uri=ref.uri,
            key=ref.key,
            version=version,
            action=action,
            files=files,
            size_bytes=size_bytes,
            bytes_to_fetch=to_fetch,
            bytes_reusable=reusable,
            free_bytes=self._volume.free_bytes(),
            seconds=to_fetch / rate if rate else (None if to_fetch else 0.0),
        )

    def _measured_rate(self) -> int:
        """Bytes per second of the newest download whose last beat is still there; 0 if there is none."""
        newest = sorted(self.list(), key=lambda model: model.created_at, reverse=True)
        signs = (read_claim(self._volume, model.key) for model in newest)
        return next((s.beat.bytes_per_second for s in signs if s is not None and s.beat is not None and s.beat.bytes_per_second), 0)

    def verify(
        self,
        uri: str,
        level: Level = "size",
        *,
        revision: str | None = None,
        allow_patterns: Patterns = None,
        ignore_patterns: Patterns = None,
    ) -> Verification:
        """
        Compare a model with its record: every file there, none too many, sizes, and at level `full` digests.

        Works offline and on a read-only mount, and changes nothing.

        Raises:
            ModelNotFoundError: It is absent.
        """
        ref = parse_ref(uri, revision=revision, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        view = self._look(ref)
        if view.entry is None and view.damage is None:
            raise self._absent(ref, view)
        return self._verify(ref.uri, view, level)

    def verify_all(self, level: Level = "size") -> Iterator[Verification]:
        """
        Verify every model, those with a damaged record included, one after the other.
        """
        for key in self._keys():
            view = read_log(self._volume, key)
            if view.damage is not None or _present(view) is not None:
                yield self._verify(view.entry.uri if view.entry else key, view, level)

    def _verify(self, uri: str, view: LogView, level: Level) -> Verification:
        if level not in ("size", "full"):
            raise SettingsError("level", str(level), "write `size` or `full`")
        entry = _present(view)
        try:
            if entry is None:
                raise view.damage or StoreFormatError(uri, "it has no record")
            manifest = read_manifest(self._volume, entry)
        except StoreFormatError as damage:
            problem = Problem(path=damage.path, kind="record", detail=damage.reason)
            return Verification(uri=uri, level=level, files=0, bytes=0, problems=(problem,))
        place = layout.generation_dir(entry.key, entry.generation)
        try:
            problems = tuple(compare(manifest.files, self._volume.tree(place), lambda path: self._volume.open_file(place / path), level))
        except UnsafePathError as planted:
            problems = (Problem(path=planted.name, kind="type", detail=planted.rule),)
        return Verification(uri=uri, level=level, files=len(manifest.files), bytes=manifest.size_bytes, problems=problems)

    def remove(
        self,
        uri: str,
        *,
        revision: str | None = None,
        allow_patterns: Patterns = None,
        ignore_patterns: Patterns = None,
        trash_seconds: float = TRASH_SECONDS,
    ) -> None:
        """
        Remove a model, or what is left of an unfinished download of it.

        It is gone for everybody at once. Its bytes are kept until the change is visible on all nodes and no reader
        holds it, then moved to the trash, and deleted once they have been there for `trash_seconds`, by this or a
        later writer. On a network volume this waits for the attribute caches of other nodes, minutes if need be.

        Raises:
            ModelNotFoundError: There is nothing of it.
            ModelInUseError: Somebody reads or downloads it; it is there as before.
            ReadOnlyStoreError: The store may only be read.
        """
        ref = parse_ref(uri, revision=revision, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        if self._writer is None:
            raise ReadOnlyStoreError(str(self.root), f"remove `{ref}`", _HOW_TO_WRITE)
        assert self._settings is not None  # A read-write store has created them.
        if not Removal(self._writer, self._settings, ref, here(*pod_and_node())).run(trash_seconds):
            raise self._absent(ref, self._look(ref))

    @contextmanager
    def open(
        self, uri: str, *, revision: str | None = None, allow_patterns: Patterns = None, ignore_patterns: Patterns = None
    ) -> Iterator[Model]:
        """
        Hold a model that is present, so that nobody removes it inside the `with`.

        A read-only store, or a volume that refuses, cannot keep a lease: there the model is protected only by the
        time its bytes stay in the trash.

        Raises:
            ModelNotFoundError: It is absent.
        """
        while True:
            model = self.get(uri, revision=revision, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
            if self._writer is None or self._settings is None:
                yield model
                return
            generation = model.path.name
            with ExitStack() as lease:
                with suppress(ReadOnlyStoreError):
                    holder = here(*pod_and_node())
                    lease.enter_context(reading(self._writer, generation, lease_seconds=self._settings.lease_seconds, holder=holder))
                # Whoever removes looks for leases after its tombstone is visible: looking again closes the gap.
                entry = _present(read_log(self._volume, model.key))
                if entry is not None and entry.generation == generation:
                    yield model
                    return

    def locks(self) -> Sequence[LockInfo]:
        """
        Every claim that has not been given back, by key. Changes nothing.
        """
        signs = ((key, read_claim(self._volume, key)) for key in self._keys())
        return [_lock_info(key, sign) for key, sign in signs if sign is not None and not sign.is_released]

    def break_lock(
        self, uri: str, *, revision: str | None = None, allow_patterns: Patterns = None, ignore_patterns: Patterns = None
    ) -> None:
        """
        Take a claim away from its holder and give it back at once, so that another process may download.

        A holder that lives notices at its next beat, stops, and starts waiting. Whatever it does after that cannot
        harm the model.

        Raises:
            ReadOnlyStoreError: The store may only be read.
        """
        ref = parse_ref(uri, revision=revision, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        if self._writer is None or self._settings is None:
            raise ReadOnlyStoreError(str(self.root), f"break the claim on `{ref}`", _HOW_TO_WRITE)
        break_claim(self._writer, ref.key, uri=ref.uri, holder=here(*pod_and_node()), lease_seconds=self._settings.lease_seconds)

    def _keys(self) -> Sequence[str]:
        return [name for name in self._volume.names(layout.KEYS) if KEY.fullmatch(name)]

    @property
    def _identity(self) -> str:
        return str(self.root) if self._settings is None else self._settings.store_id

    def _look(self, ref: ModelRef) -> LogView:
        """Read the newest record of a ref, and never an older one than this process has returned."""
        seen = _returned.get((self._identity, ref.key), 0)  # Before reading: another thread may return a newer one meanwhile.
        view = read_log_of(self._volume, ref)
        if view.seq < seen:
            reason = f"its newest record is {view.seq}, but this process has returned {seen}; somebody deleted records"
            raise StoreFormatError(str(layout.log_dir(ref.key)), reason)
        return view

    def _model(self, entry: LogEntry, status: Status, started: float, bytes_fetched: int = 0) -> Model:
        name = (self._identity, entry.key)
        with _process_guard:
            _returned[name] = max(entry.seq, _returned.get(name, 0))
        return Model(
            uri=entry.uri,
            revision=entry.revision,
            allow_patterns=entry.allow_patterns,
            ignore_patterns=entry.ignore_patterns,
            key=entry.key,
            version=entry.version,
            path=self._volume.absolute(layout.generation_dir(entry.key, entry.generation)),
            status=status,
            size_bytes=entry.size_bytes,
            files=entry.files,
            created_at=entry.created_at,
            bytes_fetched=bytes_fetched,
            seconds=time.monotonic() - started,
            entry=entry,
            root=self.root,
        )

    def _absent(self, ref: ModelRef, view: LogView) -> ModelNotFoundError:
        if view.damage is not None:
            return DamagedRecordError(str(ref), str(self.root), view.damage.path, view.damage.reason)
        return ModelNotFoundError(str(ref), str(self.root))

    def _backend(self, ref: ModelRef) -> Backend:
        # Clients of remote services do not survive a fork, so each process has its own.
        name = (os.getpid(), ref.scheme)
        if name not in self._backends:
            self._backends[name] = make_backend(ref.scheme, self._factories, self._options)
        return self._backends[name]


_HOW_TO_WRITE = 'open it with `mode="rw"`, `KSERVE_PVC_MODE=rw`, or the annotation `storage.kserve.io/readonly: "false"`'


def _present(view: LogView) -> LogEntry | None:
    return view.entry if view.entry is not None and view.entry.is_present else None


def _lock_info(key: str, sign: Sign) -> LockInfo:
    owner = sign.owner if isinstance(sign.owner, Claim) else None
    beat = sign.beat or Beat(count=0)
    return LockInfo(
        uri=owner.uri if owner else "unknown",
        key=key,
        epoch=int(sign.name),
        holder=sign.holder,
        since=owner.claimed_at.isoformat(timespec="seconds") if owner else "unknown",
        state="dead" if sign.is_dead else "held",
        bytes_done=beat.bytes_done,
        bytes_total=beat.bytes_total,
        bytes_per_second=beat.bytes_per_second,
    )


def _check_arguments(mode: str, locker: str | None, lease_seconds: float | None, part_bytes: int) -> None:
    if mode not in ("r", "rw"):
        raise SettingsError("mode", str(mode), 'write "r" or "rw"')
    if locker is not None and locker not in LOCKERS:
        raise SettingsError("locker", str(locker), f"choose one of {', '.join(LOCKERS)}")
    if lease_seconds is not None and not MIN_LEASE_SECONDS <= lease_seconds <= MAX_LEASE_SECONDS:
        raise SettingsError("lease_seconds", str(lease_seconds), f"choose between {MIN_LEASE_SECONDS:g} and {MAX_LEASE_SECONDS:g} seconds")
    if part_bytes < 1:
        raise SettingsError("part_bytes", str(part_bytes), "it must be positive")


def _read_store_settings(volume: Volume) -> StoreSettings | None:
    data = volume.read(layout.SETTINGS, MAX_RECORD_BYTES)
    return None if data is None else decode_settings(data, str(layout.SETTINGS))


def _create_store(writer: VolumeWriter, locker: str | None, lease_seconds: float | None) -> StoreSettings:
    default = NETWORK_LEASE_SECONDS if mount_of(writer.root).is_network else LOCAL_LEASE_SECONDS
    settings = StoreSettings(
        store_id=secrets.token_hex(16), locker=locker or LOCKERS[0], lease_seconds=lease_seconds or default, created_at=now()
    )
    private = layout.staging_dir(f"create-{settings.store_id}")
    writer.publish(layout.SETTINGS, encode_settings(settings), private / "store.json")
    writer.throw_away(private)
    # Another process may have been first: what is there counts, for everybody.
    return _read_store_settings(writer) or settings


def _check_agreement(volume: Volume, settings: StoreSettings, locker: str | None, lease_seconds: float | None) -> None:
    if settings.locker not in LOCKERS:
        raise StoreFormatError(str(layout.SETTINGS), f"this version does not have the locker `{settings.locker}`; upgrade kserve_pvc")
    if locker is not None and locker != settings.locker:
        raise LockerMismatchError(str(volume.root), "locker", settings.locker, locker)
    if lease_seconds is not None and lease_seconds != settings.lease_seconds:
        raise LockerMismatchError(str(volume.root), "lease_seconds", f"{settings.lease_seconds:g}", f"{lease_seconds:g}")
