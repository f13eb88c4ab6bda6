"""
One call that may have to download: does what the protocol decides, and says what happened.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from hashlib import sha256
from itertools import chain
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Literal, NoReturn

import attrs

from kserve_pvc import _defaults as defaults
from kserve_pvc._download import protocol
from kserve_pvc._download.journal import Journal
from kserve_pvc._download.reuse import Found, find_donors, shared_bytes
from kserve_pvc._download.streams import Tuning
from kserve_pvc._download.tally import Tally
from kserve_pvc._format import layout
from kserve_pvc._format.records import Claim, FileEntry, Holder, LogEntry, Manifest, StoreSettings, encode, now
from kserve_pvc._keys.claims import Sign, newest_epoch, read_claim, start_heartbeat, take_claim
from kserve_pvc._keys.log import LogView, read_log_of
from kserve_pvc._keys.log_writer import LogWriter, generations
from kserve_pvc._keys.procedures import Publish, append, collect_garbage, collect_unnamed, drive
from kserve_pvc._show.events import Listener, Started, TookOver, Unlocked
from kserve_pvc._source.contract import (
    Backend,
    Listing,
    RemoteFile,
    Resolved,
    SupportsAccess,
    SupportsClose,
    SupportsPages,
)
from kserve_pvc._source.ref import ModelRef
from kserve_pvc._volume.calls import copy_range, write_all
from kserve_pvc._volume.profile import check_names
from kserve_pvc._volume.tree import Tree, writing_tree
from kserve_pvc._volume.writing import VolumeWriter
from kserve_pvc.errors import (
    InsufficientSpaceError,
    LockTimeoutError,
    PolicyError,
    SourceNotFoundError,
    StoreError,
    StoreFormatError,
    UnsafePathError,
    VolumeError,
)
from kserve_pvc.locks.choice import external_lock
from kserve_pvc.locks.lease import LeaseLostError

if TYPE_CHECKING:
    from kserve_pvc._archive.members import Member

# A member of an archive from this size on is made durable at once.
_LARGE_BYTES = 8 * 1024 * 1024


@attrs.frozen(kw_only=True)
class Wish:
    """
    What counts as present: a record newer than `after_seq`, of `version` if one is named.
    """

    after_seq: int = 0
    version: str | None = None

    def is_met_by(self, view: LogView) -> bool:
        entry = view.entry
        if entry is None or not entry.is_present or entry.seq <= self.after_seq:
            return False
        return self.version is None or entry.version == self.version


@attrs.frozen(kw_only=True)
class Outcome:
    """
    How a call got its model, and what that cost it.
    """

    status: Literal["present", "downloaded", "waited"]
    entry: LogEntry
    bytes_fetched: int


class Download:
    """
    Drives the protocol for one call. Make one for each call; `run` is called once.

    Args:
        make_backend: Called once a claim is won: who only waits needs neither the SDK nor the network.
        resolved: What the source holds, if the caller has asked already; else it is asked once a claim is won, so
            that waiting processes do not list the source.
        tuning: How bytes are fetched.
    """

    def __init__(
        self,
        writer: VolumeWriter,
        settings: StoreSettings,
        ref: ModelRef,
        make_backend: Callable[[], Backend],
        *,
        holder: Holder,
        timeout: float,
        listener: Listener,
        wish: Wish,
        tuning: Tuning,
        resolved: Resolved | None = None,
    ) -> None:
        self._writer = writer
        self._settings = settings
        self._ref = ref
        self._key = ref.key
        self._make_backend = make_backend
        self._unpublished: list[str] = []
        self._holder = holder
        self._listener = listener
        self._wish = wish
        self._resolved = resolved
        self._tuning = tuning
        self._rules = protocol.Rules(
            lease_seconds=settings.lease_seconds, timeout=timeout, lock_decides=settings.locker != "lease"
        )
        open_file = partial(writer.open_shared, layout.lock_file(self._key))
        self._lock = external_lock(settings, self._key, holder=holder.pod, open_file=open_file)
        self._view = LogView()
        self._sign: Sign | None = None
        self._claim: Claim | None = None
        self._tally = Tally(str(ref), listener)
        self._manifest: Manifest | None = None
        self._manifest_sha256 = ""
        self._is_unpacking = False
        self._is_unlocked = False

    def run(self) -> Outcome:
        """
        Go through the protocol until the model is there.

        Raises:
            LockTimeoutError: Another process is still downloading.
            StoreError: This process downloaded, and failed. What it has is left for the next one.
        """
        state, actions = protocol.begin(self._rules)
        try:
            while True:
                event: protocol.Event | None = None
                for action in actions:
                    if isinstance(action, protocol.Return):
                        return self._outcome(action.status)
                    event = self._do(action)
                assert event is not None  # Every step that does not end the call ends in an action with an answer.
                state, actions = protocol.step(state, event)
        finally:
            self._release()

    def _outcome(self, status: Literal["present", "downloaded", "waited"]) -> Outcome:
        assert self._view.entry is not None  # The protocol returns only after a record met the wish.
        # Somebody else published: what this process wrote will never be, so nobody but itself is to be asked.
        with suppress(OSError, StoreFormatError):
            log = LogWriter(self._writer, self._key, self._commit, private=layout.STAGING, collect=self._collect)
            drive(collect_unnamed(self._unpublished), log.perform)
        return Outcome(status=status, entry=self._view.entry, bytes_fetched=self._tally.fetched)

    def _do(self, action: protocol.Action) -> protocol.Event | None:
        match action:
            case protocol.Look():
                return self._look()
            case protocol.TryLock():
                return self._try_lock()
            case protocol.MakeClaim(epoch=epoch, reason=reason):
                return self._make_claim(epoch, reason)
            case protocol.Fetch():
                return self._fetch()
            case protocol.Publish(after_seq=after_seq):
                return self._publish(after_seq)
            case protocol.Pause(seconds=seconds):
                return self._pause(seconds)
            case protocol.Release():
                self._release()
            case protocol.GiveUp():
                self._give_up(action)
        return None

    def _look(self) -> protocol.Looked:
        began = time.monotonic()  # A sign of life is as old as the moment before it was read.
        self._view = read_log_of(self._writer, self._ref)
        present = self._wish.is_met_by(self._view)
        self._sign = None if present else read_claim(self._writer, self._key)
        self._tally.look(self._sign)
        seen = None
        if self._sign is not None:
            sign = self._sign
            seen = protocol.ClaimSeen(
                epoch=int(sign.name), sign_of_life=sign.raw, released=sign.is_released, dead=sign.is_dead
            )
        return protocol.Looked(now=began, present=present, seq=self._view.seq, claim=seen)

    def _try_lock(self) -> protocol.Locked:
        assert self._lock is not None  # The protocol asks only where a lock decides.
        granted = self._lock.try_acquire()
        if granted is None and not self._is_unlocked:
            self._is_unlocked = True
            self._listener(Unlocked(ref=str(self._ref), locker=self._settings.locker))
        return protocol.Locked(now=time.monotonic(), granted=granted)

    def _pause(self, seconds: float) -> protocol.Paused:
        self._listener(self._tally.waiting(self._sign))
        time.sleep(seconds * random.uniform(0.8, 1.0))
        return protocol.Paused()

    def _make_claim(self, epoch: int, reason: str) -> protocol.Claimed:
        try:
            return self._take_claim(epoch, reason)
        except VolumeError:
            # A claim is thrown away when it is superseded, even under a process that stood still while it made it.
            if newest_epoch(self._writer, self._key) > epoch:
                return protocol.Claimed(now=time.monotonic(), won=False)
            raise

    def _take_claim(self, epoch: int, reason: str) -> protocol.Claimed:
        self._claim = take_claim(self._writer, self._key, epoch, uri=self._ref.uri, holder=self._holder)
        if self._claim is None:
            return protocol.Claimed(now=time.monotonic(), won=False)
        if self._sign is not None and not self._sign.is_released:
            self._listener(TookOver(ref=str(self._ref), holder=self._sign.holder, reason=reason))
        self._tally.heart = start_heartbeat(
            self._writer,
            layout.claim_dir(self._key, epoch),
            lease_seconds=self._settings.lease_seconds,
            progress=self._tally.progress,
            superseded=lambda: newest_epoch(self._writer, self._key) > epoch,
        )
        return protocol.Claimed(now=time.monotonic(), won=True)

    def _release(self) -> None:
        heart, self._tally.heart = self._tally.heart, None
        if heart is not None:
            heart.stop()
        if self._lock is not None:
            self._lock.release()

    def _give_up(self, action: protocol.GiveUp) -> NoReturn:
        if action.reason == "volume" and self._tally.spoiled is not None:
            raise self._tally.spoiled
        waiting = self._tally.waiting(self._sign)
        raise LockTimeoutError(
            str(self._ref), waiting.holder, action.waited, action.idle, waiting.bytes_done, waiting.bytes_total
        )

    def _fetch(self) -> protocol.Event:
        assert self._claim is not None  # The protocol fetches only under a claim.
        try:
            backend = self._make_backend()
            try:
                self._manifest = self._write_generation(self._claim.generation, backend)
            finally:
                if isinstance(backend, SupportsClose):
                    backend.close()
        except LeaseLostError:
            return protocol.ClaimLost()
        except VolumeError as error:
            self._tally.spoiled = error
            return protocol.Spoiled()
        except StoreError as error:
            if self._is_unpacking or isinstance(error, InsufficientSpaceError | UnsafePathError | PolicyError):
                # It will not do a second time either, and what is left of it takes room from others.
                with suppress(OSError):
                    self._collect(self._claim.generation)
            raise
        return protocol.Fetched()

    def _write_generation(self, generation: str, backend: Backend) -> Manifest:
        # Of eight processes that ask at once, seven only wait.
        from kserve_pvc._download.destination import Destination
        from kserve_pvc._download.transfer import Transfer

        self._is_unpacking = False
        place = layout.generation_dir(self._key, generation)
        donors = find_donors(self._writer, self._ref, own=generation, with_complete=not self._wish.after_seq)
        self._tally.begin()
        pages = self._pages(backend, donors)
        # Nothing is made for a source that holds nothing.
        first = next((page for page in pages if page), ())
        self._writer.empty_trash(defaults.TRASH_SECONDS)
        self._unpublished.append(generation)
        with (
            writing_tree(self._writer, place) as tree,
            Journal(self._writer, generation, self._tuning.part_bytes) as journal,
        ):
            destination = Destination(
                create=tree.create,
                allocate=tree.allocate,
                write=write_all,
                copy=copy_range,
                finish=tree.finish,
                note=journal.note,
                failure=lambda operation, path, error: self._writer.failure(operation, place / path, error),
            )
            offered = {path: [f.donor(tree) for f in found] for path, found in donors.items()}
            transfer = Transfer(
                backend=backend,
                destination=destination,
                donors=offered,
                observer=self._tally,
                tuning=self._tuning,
                uri=str(self._ref),
            )
            done = transfer.run(chain([first], pages))
            assert self._resolved is not None  # All pages were listed.
            files = tuple(done[f.entry.path] for f in self._resolved.files)
            if any(f.unpack is not None for f in self._resolved.files):
                files = self._unpack_all(tree, place, done)
        manifest = Manifest(
            key=self._key,
            generation=generation,
            version=self._resolved.version,
            files=files,
            access=backend.access(self._ref) if isinstance(backend, SupportsAccess) else None,
        )
        data = encode(manifest)
        self._manifest_sha256 = sha256(data).hexdigest()
        self._writer.write_private(layout.manifest_file(generation), data)
        return manifest

    def _unpack_all(
        self, tree: Tree, place: PurePosixPath, done: Mapping[PurePosixPath, FileEntry]
    ) -> tuple[FileEntry, ...]:
        """The files of the model, once what its archives hold has taken their place."""
        assert self._resolved is not None  # All of it was fetched.
        self._is_unpacking = True
        files: list[FileEntry] = []
        for file in self._resolved.files:
            if file.unpack is None:
                files.append(done[file.entry.path])
                continue
            files += self._unpack(tree, place, file)
            tree.remove(file.entry.path)
        if not files:
            raise SourceNotFoundError(str(self._ref), "the archive holds no file, or the patterns let none through")
        return tuple(sorted(files, key=lambda f: str(f.path).replace("/", "\0")))

    def _unpack(self, tree: Tree, place: PurePosixPath, archive: RemoteFile) -> Sequence[FileEntry]:
        from kserve_pvc._archive.unpack import unpack

        assert archive.unpack is not None  # It was looked at.
        path = archive.entry.path
        try:
            with self._writer.open_file(place / path) as fd, open(fd, "rb", closefd=False) as stream:
                members = unpack(
                    stream, str(path), archive.unpack, selects=self._ref.selects, make_room=self._make_room
                )
                return [self._write_member(tree, member) for member in members]
        except StoreError:
            raise
        except OSError as error:
            raise self._writer.failure("unpacking", place / path, error) from error

    def _write_member(self, tree: Tree, member: Member) -> FileEntry:
        hashed = sha256() if self._tuning.digest == "sha256" else None
        size = 0
        fd = tree.create(member.path)
        try:
            for piece in member.pieces:
                self._tally.check()
                if hashed is not None:
                    hashed.update(piece)
                write_all(fd, piece, size)
                size += len(piece)
        except BaseException:
            with suppress(OSError):
                os.close(fd)
            raise
        tree.finish(fd, member.path, size >= _LARGE_BYTES)
        digest = None if hashed is None else hashed.hexdigest()
        return FileEntry(path=member.path, size_bytes=size, sha256=digest, evidence=member.evidence)

    def _pages(
        self, backend: Backend, donors: Mapping[PurePosixPath, Sequence[Found]]
    ) -> Iterator[Sequence[RemoteFile]]:
        """What the source holds, page by page if it is listed only now."""
        if self._resolved is None and isinstance(backend, SupportsPages):
            listing, before = Listing(self._ref), None
            for page in backend.pages(self._ref):
                # One page behind, so that a model of one page is known whole before anything of it is written.
                if before is not None:
                    yield before
                before = listing.add(page)
            self._resolved = listing.resolved()
            self._start(self._resolved, donors)
            yield before or ()
            return
        if self._resolved is None:
            self._resolved = backend.resolve(self._ref)
        self._start(self._resolved, donors)
        yield self._resolved.files

    def _start(self, resolved: Resolved, donors: Mapping[PurePosixPath, Sequence[Found]]) -> None:
        check_names(self._writer, (file.entry.path for file in resolved.files))
        shared = 0
        if self._tuning.digest != "none":  # Without digests nothing can prove itself, so nothing is shared.
            shared = shared_bytes(donors, resolved)
        # What was written while the rest was listed no longer has to fit.
        self._make_room(resolved.size_bytes - shared - self._tally.progress()[0])
        self._listener(Started(ref=str(self._ref), bytes_total=resolved.size_bytes, files=len(resolved.files)))
        self._tally.start(resolved.size_bytes)

    def _make_room(self, needed_bytes: int) -> None:
        if self._writer.free_bytes() < needed_bytes:
            self._writer.empty_trash(0)
        if (free := self._writer.free_bytes()) < needed_bytes:
            raise InsufficientSpaceError(str(self._writer.root), needed_bytes, free)

    def _publish(self, after_seq: int) -> protocol.Published:
        assert self._claim is not None  # The protocol publishes only what was fetched under a claim.
        # Listed before the commit: these were begun on an older record, so they lose. Later ones may be begun on ours.
        begun = generations(self._writer, self._key)
        staging = layout.staging_dir(self._claim.generation)
        log = LogWriter(self._writer, self._key, self._commit, private=staging / "record", collect=self._collect)
        seq = drive(append(after_seq, "commit"), log.perform)
        if seq is None:
            return protocol.Published(won=False)
        entry = log.published[seq]
        self._view = LogView(seq=seq, entry=entry)
        self._unpublished.remove(entry.generation)
        # The model is there whatever becomes of the leftovers; the next download of this key tries again.
        with suppress(OSError, StoreFormatError):
            self._writer.throw_away(staging)
            drive(collect_garbage(seq, begun), log.perform)
        return protocol.Published(won=True)

    def _commit(self, wanted: Publish) -> LogEntry:
        assert self._manifest is not None  # The protocol publishes only after a fetch.
        return LogEntry(
            type=wanted.type,
            seq=wanted.seq,
            key=self._key,
            uri=self._ref.uri,
            revision=self._ref.revision,
            allow_patterns=self._ref.allow_patterns,
            ignore_patterns=self._ref.ignore_patterns,
            generation=self._manifest.generation,
            version=self._manifest.version,
            files=len(self._manifest.files),
            size_bytes=self._manifest.size_bytes,
            manifest_sha256=self._manifest_sha256,
            digest=self._tuning.digest,
            policy="allow",
            created_at=now(),
            writer=self._holder,
        )

    def _collect(self, generation: str) -> None:
        # The model's directory goes last: as long as it is there, the next collection finds the rest.
        for place in (
            layout.staging_dir(generation),
            layout.manifest_file(generation),
            layout.generation_dir(self._key, generation),
        ):
            self._writer.throw_away(place)
