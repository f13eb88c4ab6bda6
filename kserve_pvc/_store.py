"""
`ModelStore`: one shared volume, and everything that a person or a server does with it.

Longer than other modules: it is the public interface, so most of it are signatures and docstrings.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from copy import copy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Unpack

from kserve_pvc import _defaults as defaults
from kserve_pvc._access import SourceAccess
from kserve_pvc._format import layout
from kserve_pvc._format.log_entry import LogEntry, StoreSettings
from kserve_pvc._keys.log import LogView, read_log, read_manifest
from kserve_pvc._model import Lookup, Model, Status
from kserve_pvc._opening import (
    StoreArguments,
    check_arguments,
    check_tuning,
    open_store,
    read_store_settings,
)
from kserve_pvc._process import flight_of, this_process
from kserve_pvc._source.arguments import check_cancel, check_choice, check_count, check_listener, check_timeout
from kserve_pvc._source.ref import ModelRef, Patterns, Source, parse_ref
from kserve_pvc._volume.reading import Volume
from kserve_pvc.errors import InsufficientSpaceError, ReadOnlyStoreError, StoreFormatError

# A server that starts on a warm volume loads what is imported above and nothing else. What downloads, removes, checks
# or requests a source is imported by the method that does it.
if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable
    from concurrent.futures import Executor

    from kserve_pvc._archive.export import Exported
    from kserve_pvc._doctor.diagnosis import Diagnosis
    from kserve_pvc._download.call import Call, CallOptions
    from kserve_pvc._download.cancellation import Cancel
    from kserve_pvc._download.plan import Plan
    from kserve_pvc._download.warm import Item, Listen, Warmed
    from kserve_pvc._keys.claims import LockInfo
    from kserve_pvc._keys.usage import Usage
    from kserve_pvc._settings import Mode
    from kserve_pvc._show.events import Listener, Subject
    from kserve_pvc._show.progress import Callback
    from kserve_pvc._source.contract import Backend, BackendFactory, Resolved
    from kserve_pvc._volume.verify import Level, Verification
    from kserve_pvc._volume.writing import VolumeWriter
    from kserve_pvc.backends import AbstractFileSystem

    # What writes, with the settings that all writers share.
    Writing = tuple[VolumeWriter, StoreSettings]


class ModelStore:
    """
    A directory on a shared volume that holds complete, verified models.

    Args:
        root: An existing directory, usually where the volume is mounted.
        mode: `"r"` never writes one byte to the volume; `"rw"` may download and remove.
        locker: What decides which process downloads. Counts when the store is created, and is read from the store
            afterwards; a different one is an error. Safety depends on no locker.

            - `"lease"` (default): claims on the volume, which need `mkdir` to exclude.
            - `"flock"`: a file lock, which must reach all nodes. On NFS it needs a file opened for writing, which it
              is; on a SeaweedFS mount with `-dlm` one opened for reading, which it is not, so choose another one there.
            - `"redis://HOST:PORT/DB"` (or `rediss://`; extra `redis`): portalocker's `RedisLock`, which lets a holder
              that was paused for a second be taken over. Every downloading process must pass it.
            - `"kubernetes"` or `"kubernetes://NAMESPACE"` (extra `kubernetes`): Leases, as client-go's leader election.
        lease_seconds: How long after its last heartbeat a downloader is taken over. Counts when the store is created;
            default 30 on local and 60 on network file systems.
        backends: Factories by URI scheme, preferred to installed ones.
        storage_options: Arguments for the backend, as in fsspec (endpoint, credentials, …), or such arguments by
            scheme: `{"s3": {…}, "hf": {…}}`. Never stored.
        filesystems: Configured fsspec file systems by URI scheme, as `{"s3": S3FileSystem(…)}`: models of that scheme
            are read through them.
        part_bytes: The most bytes per stream that are fetched again after a process was killed.
        digest: `"sha256"` (default) hashes every byte on the way. `"none"` trusts transport and volume, which is
            recorded, and `verify` can compare only sizes.
        stall_seconds: How long a range may bring no byte before it is requested again on another connection.
        retry_seconds: How long a range is retried without any progress before `ensure` fails.
        offline: True requests no source; models that are present are served. None leaves it to `KSERVE_PVC_OFFLINE`,
            which is read before a source is requested.
        on_event: Called with every `Event` of every call on this store, see the events page of the reference.

    Raises:
        StoreRootError: The root is not a directory, or the volume cannot hold a store.
        ReadOnlyStoreError: The mode is read-write and the volume refuses to be written.
        StoreFormatError: The store was made by a newer version, or its settings are damaged.
        LockerMismatchError: The store was created with other settings.
        SettingsError: An argument is invalid.
        LockServiceError: (by methods that download) the lock service refuses this process.

    What is not guaranteed: that a model stays while no process holds it with `open`, and that two stores on two roots
    share anything. Threads and processes may share a store freely, also after a fork.
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
        filesystems: Mapping[str, AbstractFileSystem] | None = None,
        part_bytes: int = defaults.PART_BYTES,
        digest: Literal["sha256", "none"] = "sha256",
        stall_seconds: float = defaults.STALL_SECONDS,
        retry_seconds: float = defaults.RETRY_SECONDS,
        offline: bool | None = None,
        on_event: Listener | None = None,
    ) -> None:
        check_arguments(mode, locker, lease_seconds)
        check_listener(on_event)
        check_tuning(part_bytes, digest, stall_seconds, retry_seconds)
        self._volume = Volume(root)
        # What writes exists only here: a read-only store has nothing to write with.
        self._writing, identity = open_store(self._volume, mode, locker, lease_seconds)
        self._lookup = Lookup(self._volume, identity)
        self._locker = locker
        self._on_event = on_event
        patience = {"stall_seconds": stall_seconds, "retry_seconds": retry_seconds}
        self._tuning: Mapping[str, Any] = {"part_bytes": part_bytes, "digest": digest, **patience}
        self._sources = SourceAccess(
            factories=backends or {},
            storage_options=storage_options or {},
            filesystems=filesystems or {},
            patience=patience,
            offline=offline,
        )

    @classmethod
    def from_env(
        cls,
        root: str | os.PathLike[str] | None = None,
        *,
        environ: Mapping[str, str] | None = None,
        annotations: Mapping[str, str] | None = None,
        **arguments: Unpack[StoreArguments],
    ) -> ModelStore:
        """
        Open the store that the environment describes: `KSERVE_PVC_STORE`, `KSERVE_PVC_MODE`, or the pod's annotations.

        The mode is `KSERVE_PVC_MODE` (`r` or `rw`) if it is set; else read-write for exactly the annotation
        `storage.kserve.io/readonly: "false"`, which is looked up in `annotations` or in the downward-API file
        named by `KSERVE_PVC_ANNOTATIONS` (default `/etc/podinfo/annotations`); else read-only.

        Args:
            root: Instead of `KSERVE_PVC_STORE`, which defaults to `/mnt/models`.
            arguments: Those of `ModelStore`; they take precedence over the environment.
        """
        from kserve_pvc._settings import read_settings

        settings = read_settings(environ, annotations)
        found: StoreArguments = {
            "mode": settings.mode or "r",
            "locker": settings.locker,
            "lease_seconds": settings.lease_seconds,
            "offline": settings.offline,
        }
        found.update(arguments)
        return cls(settings.store if root is None else root, **found)

    @property
    def root(self) -> Path:
        return self._volume.root

    @property
    def mode(self) -> Mode:
        return "r" if self._writing is None else "rw"

    @property
    def exists(self) -> bool:
        """
        Whether there is a store at the root. One that is opened read-only may be made later, by another process.
        """
        return self.settings is not None

    @property
    def settings(self) -> StoreSettings | None:
        """
        The settings that all writers of the store share, or None if there is no store.
        """
        return read_store_settings(self._volume) if self._writing is None else self._writing[1]

    def __repr__(self) -> str:
        return f"ModelStore({str(self.root)!r}, mode={self.mode!r})"

    def _repr_html_(self) -> str:
        from kserve_pvc._show.html import show_store

        return show_store(str(self.root), self.mode, (model._facts() for model in self.list()))

    def ensure(
        self,
        uri: Source,
        *,
        revision: str | None = None,
        allow_patterns: Patterns = None,
        ignore_patterns: Patterns = None,
        refresh: bool = False,
        force_download: bool = False,
        local_files_only: bool = False,
        timeout: float | None = defaults.TIMEOUT,
        max_workers: int = defaults.MAX_WORKERS,
        callback: Callback | None = None,
        progress: bool | None = None,
        on_event: Listener | None = None,
        cancel: threading.Event | None = None,
        storage_options: Mapping[str, Any] | None = None,
        filesystem: AbstractFileSystem | None = None,
    ) -> Model:
        """
        Return a complete, verified directory of the model, downloading it once for all processes.

        A model that is present is returned at once: no network, no lock, no write, but that the link by which KServe
        finds it is put right if its writer died too early. Otherwise one process downloads while all others wait, and
        one of them continues from what it wrote if it dies.

        Args:
            uri: As KServe spells it, such as `s3://bucket/path`; an absolute path; or a `ModelRef` or `Model`, which
                have revision and patterns in themselves.
            revision: Which version of the source; the backend defines what it means (an S3 VersionId, …).
            refresh: Request what the source holds now, and fetch a newer version beside the old one; unchanged files
                are linked or copied after their digest is checked.
            force_download: Fetch a model that is present too, into a new directory, reusing nothing of complete models.
            local_files_only: Never use the network.
            timeout: Seconds to wait for another downloader; None waits without limit.
            max_workers: The most streams at the same time; how many are used depends on the measured gain.
            callback: Receives the size and every step in bytes, as in fsspec.
            progress: None shows bars on a terminal and lines elsewhere, False nothing.
            on_event: Called with every `Event` of this call, after the store's own listener.
            cancel: Ends the call once it is set, within a second and whatever the source does. What was fetched is
                kept for the next call. A model that is present is returned all the same.
            storage_options: For this call, instead of all of the store's. A model that is present is returned in any
                case.
            filesystem: A configured fsspec file system to read the source through, for this call. It must be one for
                the scheme of the URI, which stays the identity of the model.

        Raises:
            ReadOnlyStoreError: It is absent, and the store is read-only. The network was not used.
            ModelNotFoundError: It is absent, and `local_files_only` is true.
            LockTimeoutError: Another process was still downloading it.
            DownloadCancelledError: `cancel` was set.
            InsufficientSpaceError: It does not fit.
            SourceNotFoundError, SourceDeniedError, SourceUnavailableError, SourceChangedError: The source failed.
            DigestMismatchError, UnsafePathError, PolicyError: What the source holds is refused.
        """
        timeout = check_timeout(timeout)
        check_count("max_workers", max_workers)
        check_listener(on_event)
        check_cancel(cancel)
        ref = _ref(uri, revision, allow_patterns, ignore_patterns)
        return self._with_sources(storage_options, filesystem)._ensure(
            ref,
            listen=partial(_listen, progress, callback),
            on_event=on_event,
            cancel=cancel,
            refresh=refresh,
            force_download=force_download,
            local_files_only=local_files_only,
            timeout=timeout,
            max_workers=max_workers,
        )

    def _ensure(
        self,
        ref: ModelRef,
        *,
        listen: Listen,
        on_event: Listener | None,
        cancel: Cancel | None,
        refresh: bool,
        force_download: bool,
        local_files_only: bool,
        **options: Unpack[CallOptions],
    ) -> Model:
        started = time.monotonic()
        view = self._lookup.view(ref)
        entry = view.present
        if entry is not None and (local_files_only or not (refresh or force_download)):
            return self._found(ref, entry, started, on_event)
        if entry is None and (why := self._sources.why_offline(local_files_only)):
            raise self._lookup.absent(ref, view, why)
        self._sources.check_online(ref)
        if entry is None or force_download:
            self._writer(f"download `{ref}`", view.damage)
        resolved = self._sources.resolve(ref, cancel) if refresh else None
        if refresh:
            entry = self._lookup.view(ref).present  # Another process may have published meanwhile.
        if entry is not None and resolved is not None and not force_download and entry.version == resolved.version:
            return self._found(ref, entry, started, on_event)
        writing = self._writer(f"download the newer version of `{ref}`")
        options["resolved"] = resolved
        options["resolved_after"] = view.seq
        options["after"] = view if force_download else None
        call = self._call(ref, started, listen, on_event, cancel, **options)
        self._sources.check(ref)
        return self._download(writing, ref, call, partial(self._sources.backend, ref))

    def _call(
        self,
        ref: ModelRef,
        started: float,
        listen: Listen,
        on_event: Listener | None,
        cancel: Cancel | None,
        **options: Unpack[CallOptions],
    ) -> Call:
        """Describe a call that downloads, with what is the same for all calls of this store."""
        from kserve_pvc._download.call import Call

        options.setdefault("tuning", self._tuning)
        return Call(
            **options,
            subject=self._subject(ref),
            look=partial(self._lookup.view, ref),
            listen=listen,
            listeners=self._listeners(on_event),
            cancel=cancel,
            holder=this_process(),
            flight=flight_of(self._lookup.identity, ref.key),
            started=started,
        )

    def _download(self, writing: Writing, ref: ModelRef, call: Call, make_backend: Callable[[], Backend]) -> Model:
        from kserve_pvc.locks.choice import check_confirmed

        writer, settings = writing
        check_confirmed(settings.locker, self._locker)
        outcome = call.run(writer, settings, ref, make_backend)
        status: Status = "waited" if outcome.status == "present" else outcome.status
        return self._lookup.model(outcome.entry, status, call.started, bytes_fetched=outcome.bytes_fetched)

    def _subject(self, ref: ModelRef) -> Subject:
        return {"store": str(self.root), "key": ref.key, "uri": ref.uri, "ref": str(ref)}

    def _listeners(self, on_event: Listener | None) -> Sequence[Listener]:
        return [listener for listener in (self._on_event, on_event) if listener is not None]

    def _found(self, ref: ModelRef, entry: LogEntry, started: float, on_event: Listener | None) -> Model:
        """Describe a model that is present. Without a listener nothing else happens: a hit is fast."""
        model = self._lookup.model(entry, "present", started)
        self._mend_view(entry)
        if on_event is not None or self._on_event is not None:
            from kserve_pvc._show.events import CallFinished
            from kserve_pvc._show.observing import notify

            finished = CallFinished(
                **self._subject(ref),
                status="present",
                size_bytes=entry.size_bytes,
                bytes_fetched=0,
                seconds=time.monotonic() - started,
            )
            notify(self._listeners(on_event), finished)
        return model

    def _mend_view(self, entry: LogEntry) -> None:
        """Put KServe's link to a model right, once for each generation, if its writer died before it did so."""
        if self._writing is None or self._lookup.seen_views.get(entry.key) == entry.generation:
            return
        self._lookup.seen_views[entry.key] = entry.generation
        if self._volume.link_target(layout.view_link(entry.key)) != f"{entry.key}/{entry.generation}":
            from kserve_pvc._keys.aliases import settle_view_quietly

            settle_view_quietly(self._writing[0], entry.key)

    def warm(
        self,
        items: Iterable[Item],
        executor: Executor | None = None,
        *,
        refresh: bool = False,
        timeout: float | None = defaults.TIMEOUT,
        max_workers: int = defaults.MAX_WORKERS,
        callback: Callback | None = None,
        progress: bool | None = None,
        on_event: Listener | None = None,
        cancel: threading.Event | None = None,
        storage_options: Mapping[str, Any] | None = None,
        filesystem: AbstractFileSystem | None = None,
    ) -> Generator[Warmed, None, None]:
        """
        Ensure several models, and yield a result for each once it is present or has failed. A failure stops no other
        model.

        A model that is named twice is fetched once and has one result. Nothing begins before the first result is
        requested. Closing the iterator cancels what has not begun; an exception that is raised in it, such as a
        KeyboardInterrupt, also stops what runs in threads.

        Args:
            items: URIs, absolute paths, `ModelRef`s, or mappings with `uri` and, if needed, `revision`,
                `allow_patterns` and `ignore_patterns`, and with `refresh` or `force_download` for this item.
            executor: What fetches several at a time, such as a `ThreadPoolExecutor(4)`. Without one they are fetched
                one after the other, each by several streams. The store is sent to an executor of processes, with its
                `backends`, `storage_options` and `filesystems`, so these must pickle then; lines take the place of
                bars there.
            refresh, timeout, max_workers: As in `ensure`, for each model.
            callback: Receives the total size of what is being downloaded, and every step in bytes. Not with
                processes.
            progress: As in `ensure`; several bars or lines at a time.
            on_event: As in `ensure`, for each model; several calls at a time where several models are fetched at a
                time. Not with processes.
            cancel: Ends, once it is set, what is being fetched, and lets no other download begin: the results of these
                models have a `DownloadCancelledError`. Not with processes.
            storage_options, filesystem: As in `ensure`, for all of them.

        Raises:
            SettingsError: An argument is invalid, or cannot be sent to other processes. An invalid item is the `error`
                of its result.
        """
        from kserve_pvc._download.warm import warm

        timeout = check_timeout(timeout)
        check_count("max_workers", max_workers)
        check_listener(on_event)
        check_cancel(cancel)
        how: Mapping[str, Any] = {"refresh": refresh, "force_download": False, "local_files_only": False}
        ensure = partial(
            self._with_sources(storage_options, filesystem)._ensure, **how, timeout=timeout, max_workers=max_workers
        )
        return warm(
            ensure,
            items,
            executor,
            progress=progress,
            callback=callback,
            on_event=on_event,
            cancel=cancel,
            remember=lambda model: self._lookup.remember(model._entry),
        )

    def get(
        self,
        uri: Source,
        *,
        revision: str | None = None,
        allow_patterns: Patterns = None,
        ignore_patterns: Patterns = None,
    ) -> Model:
        """
        Return a model that is present. Never the network, never a lock, never a write.

        Raises:
            ModelNotFoundError: It is absent.
            DamagedRecordError: Its newest record is damaged; also a `ModelNotFoundError` and a `StoreFormatError`.
        """
        return self._lookup.get(_ref(uri, revision, allow_patterns, ignore_patterns))

    def __contains__(self, uri: Source) -> bool:
        return self._lookup.view(parse_ref(uri)).present is not None

    def find(self, name: str) -> ModelRef | None:
        """
        Return the model that is meant by something this store prints: a key, an alias, or a directory of a model.

        Pass the result to any method in place of a URI. The model need not be present. Without network.

        Returns:
            None if the store knows no such model.
        """
        from kserve_pvc._keys.naming import find_ref

        return find_ref(self._volume, name)

    def list(self) -> list[Model]:
        """
        Every complete model, by key. A model whose newest record is damaged is left out; `verify` names it.
        """
        return self._lookup.models()

    def usage(self) -> Usage:
        """
        Measure what the store occupies: its models, what unfinished downloads left, and the trash; damaged models too.
        """
        from kserve_pvc._keys.usage import measure

        return measure(self._volume, self._lookup.views())

    def resolve(
        self,
        uri: Source,
        *,
        revision: str | None = None,
        allow_patterns: Patterns = None,
        ignore_patterns: Patterns = None,
        storage_options: Mapping[str, Any] | None = None,
        filesystem: AbstractFileSystem | None = None,
    ) -> Resolved:
        """
        Request what the source holds now. Network, but no write.

        Args:
            storage_options, filesystem: As in `ensure`.

        Raises:
            SourceNotFoundError, SourceDeniedError, SourceUnavailableError, UnsafePathError: As `ensure`.
        """
        ref = _ref(uri, revision, allow_patterns, ignore_patterns)
        return self._sources.with_arguments(storage_options, filesystem).resolve(ref)

    def plan(
        self,
        uri: Source,
        *,
        revision: str | None = None,
        allow_patterns: Patterns = None,
        ignore_patterns: Patterns = None,
        refresh: bool = False,
        storage_options: Mapping[str, Any] | None = None,
        filesystem: AbstractFileSystem | None = None,
    ) -> Plan:
        """
        Return what `ensure` would do, without doing it. The source is requested unless the model is present.

        Args:
            storage_options, filesystem: As in `ensure`.

        What is not guaranteed: that the free space is real (some network volumes invent it), and that no other
        process changes anything in between.
        """
        from kserve_pvc._download.plan import plan_download, plan_nothing

        ref = _ref(uri, revision, allow_patterns, ignore_patterns)
        sources = self._sources.with_arguments(storage_options, filesystem)
        entry = Lookup(self._volume.listing_much(), self._lookup.identity).view(ref).present
        resolved = None if entry is not None and not refresh else sources.resolve(ref)
        if entry is not None and (resolved is None or resolved.version == entry.version):
            return plan_nothing(self._volume, ref, entry)
        assert resolved is not None  # Without an entry it was requested.
        shares = self._tuning["digest"] != "none"
        return plan_download(self._volume, ref, resolved, shares=shares)

    def verify(
        self,
        uri: Source,
        level: Level = "size",
        *,
        revision: str | None = None,
        allow_patterns: Patterns = None,
        ignore_patterns: Patterns = None,
        callback: Callback | None = None,
        progress: bool | None = False,
    ) -> Verification:
        """
        Compare a model with its record: missing and foreign files, sizes, and at level `full` digests.

        Works offline and on a read-only mount, and changes nothing. Several files are read at a time.

        Args:
            callback, progress: As in `ensure`, at level `full`.

        Raises:
            ModelNotFoundError: It is absent.
        """
        ref = _ref(uri, revision, allow_patterns, ignore_patterns)
        view = self._lookup.view(ref)
        if view.entry is None and view.damage is None:
            raise self._lookup.absent(ref, view)
        return self._verify(ref.uri, view, level, partial(_listen, progress, callback))

    def verify_all(
        self, level: Level = "size", *, callback: Callback | None = None, progress: bool | None = False
    ) -> Iterator[Verification]:
        """
        Verify every model, those with a damaged record included, one after the other. The arguments are as in `verify`.
        """
        listen = partial(_listen, progress, callback)
        for key, view in self._lookup.views():
            if view.damage is not None or view.present is not None:
                yield self._verify(view.entry.uri if view.entry else key, view, level, listen)

    def _verify(self, uri: str, view: LogView, level: Level, listen: Listen) -> Verification:
        from kserve_pvc._volume.verify import report_damage, verify_files

        check_choice("level", level, ("size", "full"))
        try:
            if view.present is None:
                raise view.damage or StoreFormatError(uri, "it has no record")
            manifest = read_manifest(self._volume, view.present)
        except StoreFormatError as damage:
            return report_damage(damage, uri=uri, level=level)
        place = layout.generation_dir(view.present.key, view.present.generation)
        verify = partial(verify_files, self._volume, place, manifest, uri=uri, level=level)
        if level == "size":
            return verify()
        from kserve_pvc._show.events import BytesReceived, TransferStarted

        subject: Subject = {"store": str(self.root), "key": manifest.key, "uri": uri, "ref": uri}
        with listen() as tell:
            tell(
                TransferStarted(
                    **subject, bytes_total=manifest.size_bytes, files=len(manifest.files), activity="verifying"
                )
            )
            return verify(read=lambda count: tell(BytesReceived(**subject, size_bytes=count)))

    def remove(
        self,
        uri: Source,
        *,
        revision: str | None = None,
        allow_patterns: Patterns = None,
        ignore_patterns: Patterns = None,
        trash_seconds: float = defaults.TRASH_SECONDS,
    ) -> None:
        """
        Remove a model, or what is left of an unfinished download of it.

        It is absent for all processes at once. Its bytes are kept until the change is visible on all nodes and no
        reader holds it, then moved to the trash, and deleted after `trash_seconds` there, by this or a later writer. On
        a network volume this waits for the attribute caches of other nodes, which may take minutes.

        Raises:
            ModelNotFoundError: The store has nothing of it.
            ModelInUseError: A process reads or downloads it; it stays, unless another process removes it too.
            ReadOnlyStoreError: The store is read-only.
        """
        ref = _ref(uri, revision, allow_patterns, ignore_patterns)
        check_timeout(trash_seconds, "trash_seconds")
        writer, settings = self._writer(f"remove `{ref}`")
        from kserve_pvc._keys.aliases import settle_view_quietly
        from kserve_pvc._keys.removal import Removal
        from kserve_pvc._show.events import ModelRemoved
        from kserve_pvc._show.observing import notify

        try:
            if not Removal(writer, settings, ref, this_process()).run(trash_seconds):
                raise self._lookup.absent(ref, self._lookup.view(ref))
        finally:
            settle_view_quietly(writer, ref.key)
        notify(self._listeners(None), ModelRemoved(**self._subject(ref)))

    def alias(
        self,
        name: str,
        uri: Source,
        *,
        revision: str | None = None,
        allow_patterns: Patterns = None,
        ignore_patterns: Patterns = None,
    ) -> None:
        """
        Give a model that is present a name under which a pod can mount it: `names/<name>` in the volume.

        The name follows the model: containers that start later mount a newer version under it, and nothing changes
        under one that runs. It is decoration, which the store never consults. It stays when the model is removed, and
        leads nowhere until the model is there again.

        Raises:
            ModelNotFoundError: The model is absent.
            UnsafePathError: The name is not 1 to 63 letters, digits, `-`, `_` and `.`.
            VolumeError: Something other than a link has that name, or the volume has no symbolic links.
            ReadOnlyStoreError: The store is read-only.
        """
        from kserve_pvc._keys.aliases import check_alias, point_alias

        ref = _ref(uri, revision, allow_patterns, ignore_patterns)
        check_alias(name)
        writer, _ = self._writer(f"name `{ref}`")
        point_alias(writer, name, self._lookup.get(ref).key)

    def drop_alias(self, name: str) -> None:
        """
        Remove a name, if it exists. The model stays.

        Raises:
            UnsafePathError: An alias cannot have that name.
            ReadOnlyStoreError: The store is read-only.
        """
        from kserve_pvc._keys.aliases import check_alias, drop_alias

        check_alias(name)
        writer, _ = self._writer(f"remove the name `{name}`")
        drop_alias(writer, name)

    def aliases(self) -> Mapping[str, str]:
        """
        Return every name with the key of its model, present or not. Links that lead elsewhere are left out.
        """
        from kserve_pvc._keys.aliases import read_aliases

        return read_aliases(self._volume)

    def export(
        self,
        uri: Source,
        file: str | os.PathLike[str] | BinaryIO,
        *,
        revision: str | None = None,
        allow_patterns: Patterns = None,
        ignore_patterns: Patterns = None,
        callback: Callback | None = None,
        progress: bool | None = None,
        on_event: Listener | None = None,
    ) -> Exported:
        """
        Write a model that is present as one file, to be imported where there is no network. The store is not changed.

        Every file is compared with its SHA-256 on the way. The file gets its name once it is complete and synced; an
        interrupted export is resumed. The same version of a model gives the same bytes.

        Args:
            file: Where to write it, outside the store; or a binary stream, which cannot be resumed.
            on_event: As in `ensure`.

        Raises:
            ModelNotFoundError: It is absent.
            VolumeError: A file of the model is missing or damaged, or the bundle could not be written.
            InsufficientSpaceError: The bundle does not fit.
            PolicyError: The model was fetched without hashing, so its bytes cannot be checked.
            SettingsError: The file would lie in the store, or something other than a regular file is there.
        """
        from kserve_pvc._archive.bundle_manifest import manifest_of
        from kserve_pvc._archive.export import export_bundle
        from kserve_pvc._show.observing import observing
        from kserve_pvc._show.progress import make_listener

        check_listener(on_event)
        with self.open(_ref(uri, revision, allow_patterns, ignore_patterns)) as model:
            place = layout.generation_dir(model.key, model.path.name)
            manifest = manifest_of(model._entry, model.record.files, model.record.archive_sha256)
            subject = self._subject(manifest.ref)
            with (
                make_listener(progress, callback) as show,
                observing(subject, show, self._listeners(on_event)) as listener,
            ):
                return export_bundle(
                    manifest,
                    lambda path: self._volume.open_file(place / path),
                    file,
                    root=self.root,
                    subject=subject,
                    listener=listener,
                )

    def import_(
        self,
        file: str | os.PathLike[str],
        *,
        sha256: str | None = None,
        manifest_sha256: str | None = None,
        timeout: float | None = defaults.TIMEOUT,
        callback: Callback | None = None,
        progress: bool | None = None,
        on_event: Listener | None = None,
        cancel: threading.Event | None = None,
    ) -> Model:
        """
        Import a model from a file that `export` wrote, without any network.

        It is written like a download: by one process, resumed after a crash, every file compared with its SHA-256, and
        published last. A version that is present is returned at once; another one is written beside it and becomes the
        current one.

        Args:
            sha256: The digest of the file, as returned by `export` and printed by `sha256sum`. The whole file is read
                once more for it. Without a digest the file is trusted.
            manifest_sha256: The digest of its manifest, as returned by `export`, which takes no time to compare.
            on_event, cancel: As in `ensure`.

        Raises:
            ReadOnlyStoreError: The store is read-only.
            StoreFormatError: It is not a bundle, was truncated, or was changed.
            DigestMismatchError: A file differs from its digest in the bundle, or the bundle from a digest given here.
            SourceNotFoundError, SourceDeniedError, SourceUnavailableError, SourceChangedError: The file cannot be read.
            LockTimeoutError, DownloadCancelledError, InsufficientSpaceError: As `ensure`.
        """
        started = time.monotonic()
        timeout = check_timeout(timeout)
        check_listener(on_event)
        check_cancel(cancel)
        writing = self._writer(f"import `{os.fspath(file)}`")
        from kserve_pvc._archive.bundle import open_bundle

        with open_bundle(file, sha256=sha256, manifest_sha256=manifest_sha256, cancel=cancel) as bundle:
            resolved = bundle.resolve(bundle.manifest.ref)
            view = self._lookup.view(resolved.ref)
            if view.present is not None and view.present.version == resolved.version:
                return self._found(resolved.ref, view.present, started, on_event)
            # What a bundle promises is SHA-256, and is compared whatever this store does with its own downloads.
            options: CallOptions = {
                "timeout": timeout,
                "max_workers": defaults.MAX_WORKERS,
                "resolved": resolved,
                "resolved_after": view.seq,
                "tuning": {**self._tuning, "digest": "sha256"},
                "activity": "importing",
            }
            call = self._call(resolved.ref, started, partial(_listen, progress, callback), on_event, cancel, **options)
            return self._download(writing, resolved.ref, call, lambda: bundle)

    @contextmanager
    def open(
        self,
        uri: Source,
        *,
        revision: str | None = None,
        allow_patterns: Patterns = None,
        ignore_patterns: Patterns = None,
    ) -> Iterator[Model]:
        """
        Hold a model that is present, so that no process removes it inside the `with`.

        A read-only store, or a volume that refuses to be written or is full, cannot hold a lease: there only the time
        that bytes stay in the trash protects the model.

        Raises:
            ModelNotFoundError: It is absent.
        """
        ref = _ref(uri, revision, allow_patterns, ignore_patterns)
        while True:
            model = self._lookup.get(ref)
            if self._writing is None:
                yield model
                return
            from kserve_pvc._keys.claims import reading

            (writer, settings), generation = self._writing, model.path.name
            with ExitStack() as lease:
                with suppress(ReadOnlyStoreError, InsufficientSpaceError):
                    lease.enter_context(
                        reading(writer, generation, lease_seconds=settings.lease_seconds, holder=this_process())
                    )
                # A remover looks for leases after its tombstone is visible: looking again closes the gap.
                entry = read_log(self._volume, model.key).present
                if entry is not None and entry.generation == generation:
                    yield model
                    return

    def doctor(self, *, peer: str | None = None, timeout: float | None = defaults.DOCTOR_TIMEOUT) -> Diagnosis:
        """
        Examine the volume: its kind, what it supports, its speed, and what to change. A read-only store writes nothing.

        Args:
            peer: A name that a doctor on another node is given too: `store.doctor(peer="a")` there, or
                `kserve-pvc doctor DIR --peer a`. The two then test each other.
            timeout: Seconds to wait for the peer; None waits without limit.

        Raises:
            ReadOnlyStoreError: A peer is named, and the store is read-only.
            SettingsError: The name or the timeout is invalid.
        """
        from kserve_pvc._doctor.doctor import diagnose
        from kserve_pvc.backends import list_plugins

        timeout = check_timeout(timeout)
        return diagnose(
            self.root,
            writes=self._writing is not None,
            holder=this_process(),
            peer=peer,
            timeout=timeout,
            sources=self._sources.explain(),
            plugins=list_plugins(),
        )

    def locks(self) -> Sequence[LockInfo]:
        """
        Return every claim that has not been released, by key. Changes nothing. A key that cannot be read is left out;
        `verify_all` names it.
        """
        from kserve_pvc._keys.claims import read_locks

        return read_locks(self._volume, self._lookup.list_keys())

    def break_lock(
        self,
        uri: Source,
        *,
        revision: str | None = None,
        allow_patterns: Patterns = None,
        ignore_patterns: Patterns = None,
    ) -> None:
        """
        Take a claim from its holder and release it at once, so that another process may download.

        A live holder notices at its next heartbeat, stops, and starts waiting. What it does until then cannot harm the
        model.

        Raises:
            ReadOnlyStoreError: The store is read-only.
        """
        ref = _ref(uri, revision, allow_patterns, ignore_patterns)
        writer, settings = self._writer(f"break the claim on `{ref}`")
        from kserve_pvc._keys.claims import break_claim

        break_claim(writer, ref.key, uri=ref.uri, holder=this_process(), lease_seconds=settings.lease_seconds)

    def _writer(self, operation: str, cause: Exception | None = None) -> Writing:
        if self._writing is None:
            raise ReadOnlyStoreError(str(self.root), operation, _HOW_TO_WRITE) from cause
        return self._writing

    def _with_sources(
        self, storage_options: Mapping[str, Any] | None, filesystem: AbstractFileSystem | None
    ) -> ModelStore:
        """Return this store with other sources for one call."""
        sources = self._sources.with_arguments(storage_options, filesystem)
        if sources is self._sources:
            return self
        store = copy(self)
        store._sources = sources
        return store


_HOW_TO_WRITE = (
    'open it with `mode="rw"`, `KSERVE_PVC_MODE=rw`, or the annotation `storage.kserve.io/readonly: "false"`'
)


def _listen(progress: bool | None, callback: Callback | None) -> AbstractContextManager[Listener]:
    from kserve_pvc._show.progress import make_listener

    return make_listener(progress, callback)


def _ref(uri: Source, revision: str | None, allow_patterns: Patterns, ignore_patterns: Patterns) -> ModelRef:
    return parse_ref(uri, revision=revision, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
