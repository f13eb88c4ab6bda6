"""
One call that may have to download: does what the protocol decides, and reports what happened.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Literal, NoReturn

import attrs

from kserve_pvc._download import protocol
from kserve_pvc._download.cancellation import PATIENCE_SECONDS, Cancellation, run_detachable
from kserve_pvc._download.publication import NothingNewerError, Publication, Written
from kserve_pvc._download.tally import StoppedError, Tally
from kserve_pvc._download.tuning import Tuning
from kserve_pvc._format import layout
from kserve_pvc._format.records import Claim, Holder, LogEntry, StoreSettings
from kserve_pvc._keys.claims import Sign, newest_epoch, read_claim, start_heartbeat, take_claim
from kserve_pvc._keys.log import LogView
from kserve_pvc._show.events import ClaimLost, ClaimTakenOver, Listener, LockerUnavailable, Subject
from kserve_pvc._source.contract import Backend, Resolved
from kserve_pvc._source.ref import ModelRef
from kserve_pvc._volume.writing import VolumeWriter
from kserve_pvc.errors import (
    DownloadCancelledError,
    InsufficientSpaceError,
    LockTimeoutError,
    PolicyError,
    StoreError,
    UnsafePathError,
    VolumeError,
)
from kserve_pvc.locks.choice import external_lock
from kserve_pvc.locks.external import ExternalLock
from kserve_pvc.locks.lease import LeaseLostError

if TYPE_CHECKING:
    from kserve_pvc._download.attempt import Activity, Attempt


@attrs.frozen(kw_only=True)
class Request:
    """
    What a call needs: a record newer than `after_seq`, of `version` if there is one.

    Args:
        after_generation: What was present at `after_seq`. A newer record of it is not a newer model.
        resolved: What the source holds, if the caller has requested it already. Otherwise it is requested once a claim
            is won, so that waiting processes do not list the source.
        resolved_after: The newest record that was there before it was requested. Once there is a newer one the source
            is requested again: what another process has published since may be newer than this, and a version that is
            older is never published above it.
    """

    after_seq: int = 0
    after_generation: str | None = None
    version: str | None = None
    resolved: Resolved | None = None
    resolved_after: int = 0
    activity: Activity = "downloading"

    def is_met_by(self, view: LogView) -> bool:
        entry = view.entry
        if entry is None or not entry.is_present or entry.seq <= self.after_seq:
            return False
        if entry.generation == self.after_generation:
            return False
        return self.version is None or entry.version == self.version

    def begun_on(self, view: LogView) -> Request:
        """
        Return this request with what was resolved before the newest record left out.
        """
        is_outdated = self.resolved is None or view.seq > self.resolved_after
        return attrs.evolve(self, resolved=None, resolved_after=view.seq) if is_outdated else self

    def after(self, resolved: Resolved | None) -> Request:
        """
        Return this request with what the source holds, if that is known now.
        """
        version = resolved.version if resolved is not None and self.version is not None else self.version
        return attrs.evolve(self, resolved=resolved, version=version)


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
        make_backend: Called once a claim is won: a call that only waits needs neither the SDK nor the network.
        look: Reads the newest record of the model.
        timeout: Seconds to wait for another downloader.
        tuning: How bytes are fetched.
    """

    # How many leftovers of the model there are at most: any number, until they were looked at.
    _most_leftovers = 2

    def __init__(
        self,
        writer: VolumeWriter,
        settings: StoreSettings,
        ref: ModelRef,
        make_backend: Callable[[], Backend],
        *,
        look: Callable[[], LogView],
        holder: Holder,
        timeout: float,
        subject: Subject,
        listener: Listener,
        cancellation: Cancellation,
        request: Request,
        tuning: Tuning,
    ) -> None:
        self._writer = writer
        self._settings = settings
        self._ref = ref
        self._make_backend = make_backend
        self._read_view = look
        self._holder = holder
        self._cancellation = cancellation
        self._request = request
        self._tuning = tuning
        self._rules = _rules(settings, timeout)
        self._lock = _external_lock(writer, settings, ref.key, holder)
        self._view = LogView()
        self._sign: Sign | None = None
        self._claim: Claim | None = None
        self._tally = Tally(subject, listener, cancellation)
        self._publication = Publication(writer, ref, holder)
        self._written: Written | None = None
        self._spoiled: dict[str, VolumeError] = {}
        self._is_locker_unavailable = False

    def run(self) -> Outcome:
        """
        Go through the protocol until the model is present.

        Raises:
            LockTimeoutError: Another process is still downloading.
            DownloadCancelledError: The call was cancelled.
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
                assert event is not None  # Every step that does not end the call ends in an action with an event.
                state, actions = protocol.step(state, event)
        finally:
            self._release()

    def _outcome(self, status: Literal["present", "downloaded", "waited"]) -> Outcome:
        assert self._view.entry is not None  # The protocol returns only after a record met the request.
        self._publication.collect_unpublished()
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
        self._cancellation.check()
        began = time.monotonic()  # A sign of life is as old as the time before it was read.
        self._view = self._read_view()
        present = self._request.is_met_by(self._view)
        self._sign = None if present else read_claim(self._writer, self._ref.key)
        self._tally.look(self._sign)
        seen = None
        if self._sign is not None:
            sign = self._sign
            seen = protocol.ClaimSeen(
                epoch=int(sign.name), sign_of_life=sign.raw, released=sign.is_released, dead=sign.is_dead
            )
        return protocol.Looked(now=began, present=present, seq=self._view.seq, claim=seen)

    def _try_lock(self) -> protocol.Locked:
        assert self._lock is not None  # The protocol tries only where a lock decides.
        granted = self._lock.try_acquire()
        if granted is None and not self._is_locker_unavailable:
            self._is_locker_unavailable = True
            self._tally.tell(LockerUnavailable(**self._tally.subject, locker=self._settings.locker))
        return protocol.Locked(now=time.monotonic(), granted=granted)

    def _pause(self, seconds: float) -> protocol.Paused:
        self._tally.tell(self._tally.waiting(self._sign))
        self._cancellation.sleep(seconds * random.uniform(0.8, 1.0))
        return protocol.Paused()

    def _make_claim(self, epoch: int, reason: str) -> protocol.Claimed:
        self._cancellation.check()
        try:
            return self._take_claim(epoch, reason)
        except VolumeError:
            # A claim is thrown away when it is superseded, even if the process that makes it is paused meanwhile.
            if newest_epoch(self._writer, self._ref.key) > epoch:
                return protocol.Claimed(now=time.monotonic(), won=False)
            raise

    def _take_claim(self, epoch: int, reason: str) -> protocol.Claimed:
        self._claim = take_claim(self._writer, self._ref.key, epoch, uri=self._ref.uri, holder=self._holder)
        if self._claim is None:
            return protocol.Claimed(now=time.monotonic(), won=False)
        if self._sign is not None and not self._sign.is_released:
            self._tally.tell(ClaimTakenOver(**self._tally.subject, holder=self._sign.holder, reason=reason))
        self._tally.heart = start_heartbeat(
            self._writer,
            layout.claim_dir(self._ref.key, epoch),
            lease_seconds=self._settings.lease_seconds,
            progress=self._tally.progress,
            superseded=lambda: newest_epoch(self._writer, self._ref.key) > epoch,
        )
        return protocol.Claimed(now=time.monotonic(), won=True)

    def _release(self) -> None:
        heart, self._tally.heart = self._tally.heart, None
        if heart is not None:
            heart.stop()
        if self._lock is not None:
            self._lock.release()

    def _give_up(self, action: protocol.GiveUp) -> NoReturn:
        if action.reason == "volume" and self._spoiled:
            raise list(self._spoiled.values())[-1]
        waiting = self._tally.waiting(self._sign)
        raise LockTimeoutError(
            str(self._ref), waiting.holder, action.waited, action.idle, waiting.bytes_done, waiting.bytes_total
        )

    def _fetch(self) -> protocol.Event:
        assert self._claim is not None  # The protocol fetches only under a claim.
        generation = self._claim.generation
        if self._discards_leftovers(1):
            return protocol.ClaimLost()
        self._request = self._request.begun_on(self._view)
        attempt = self._attempt(generation)
        self._publication.begin(generation)
        try:
            self._written = self._run(attempt)
        except NothingNewerError:
            looked = self._look()
            return looked if looked.present else protocol.ClaimLost()
        except LeaseLostError:
            self._tally.tell(ClaimLost(**self._tally.subject))
            return protocol.ClaimLost()
        except VolumeError as error:
            self._spoiled[generation] = error
            return protocol.ClaimLost() if self._is_outdated() else protocol.Spoiled()
        except (InsufficientSpaceError, UnsafePathError, PolicyError) as error:
            self._discard(generation)
            if isinstance(error, InsufficientSpaceError) and self._discards_leftovers(0):
                return protocol.ClaimLost()
            raise
        except BaseException as error:
            if attempt.is_unpacking and isinstance(error, StoreError) and not isinstance(error, DownloadCancelledError):
                self._discard(generation)
            self._tell_kept(attempt, error)
            raise
        return protocol.Fetched()

    def _is_outdated(self) -> bool:
        """Whether the log moved on, so that another process may have collected what this one was writing."""
        with suppress(StoreError):
            return self._read_view().seq > self._view.seq
        return False

    def _discards_leftovers(self, most: int) -> bool:
        """Collect leftovers but for so many, once in a call. Then the log has a new record, and it is looked again."""
        is_due, self._most_leftovers = most < self._most_leftovers, min(most, self._most_leftovers)
        return is_due and self._publication.discard_leftovers(self._view, most=most)

    def _tell_kept(self, attempt: Attempt, error: BaseException) -> None:
        """Add to what ends the call how much of the model is kept: an error, or an interrupt of the process."""
        from kserve_pvc._download.keeping import describe_kept

        if (found := attempt.kept()) is not None:
            kept, total = found
            if isinstance(error, DownloadCancelledError):
                error.kept_bytes, error.size_bytes = kept, total
            else:
                error.add_note(describe_kept(self._ref, kept, total))

    def _run(self, attempt: Attempt) -> Written:
        # A bundle is closed when its call is over, so nothing that reads it is left behind.
        patience = PATIENCE_SECONDS if self._request.activity == "downloading" else math.inf
        try:
            return run_detachable(
                attempt.run, self._cancellation, stop=self._tally.stop, leave=attempt.flush, patience=patience
            )
        except StoppedError:
            self._cancellation.check()
            raise
        finally:
            # Another attempt need not list the source again.
            self._request = self._request.after(attempt.resolved)

    def _attempt(self, generation: str) -> Attempt:
        # Of eight processes that call at once, seven only wait.
        from kserve_pvc._download.attempt import Attempt

        is_refresh = self._request.version is not None and not self._request.after_seq
        current = self._view.present if is_refresh else None
        return Attempt(
            self._writer,
            self._ref,
            self._make_backend(),
            generation=generation,
            current=None if current is None else current.version,
            resolved=self._request.resolved,
            activity=self._request.activity,
            reuses_complete=not self._request.after_seq,
            spoiled=self._spoiled,
            tuning=self._tuning,
            tally=self._tally,
        )

    def _discard(self, generation: str) -> None:
        # Another attempt would fail too, and what is left of this one takes room from others.
        with suppress(OSError):
            self._publication.collect(generation)

    def _publish(self, after_seq: int) -> protocol.Published:
        assert self._written is not None  # The protocol publishes only after a fetch.
        view = self._publication.publish(self._written, after_seq)
        if view is None:
            return protocol.Published(won=False)
        self._view = view
        return protocol.Published(won=True)


def _external_lock(writer: VolumeWriter, settings: StoreSettings, key: str, holder: Holder) -> ExternalLock | None:
    open_file = partial(writer.open_shared, layout.lock_file(key))
    return external_lock(settings, key, holder=holder.pod, open_file=open_file)


def _rules(settings: StoreSettings, timeout: float) -> protocol.Rules:
    lock_decides = settings.locker != "lease"
    return protocol.Rules(lease_seconds=settings.lease_seconds, timeout=timeout, lock_decides=lock_decides)
