"""
One call of a store that downloads a model: among the threads of this process one at a time, with its events.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, Required, TypedDict

import attrs

from kserve_pvc._download.cancellation import Cancel, Cancellation
from kserve_pvc._download.download import Download, Outcome, Request
from kserve_pvc._download.rate import note_rate
from kserve_pvc._download.tuning import Tuning
from kserve_pvc._format.log_entry import Holder, StoreSettings
from kserve_pvc._keys.aliases import settle_view_quietly
from kserve_pvc._keys.log import LogView
from kserve_pvc._show.events import CallFinished, Listener, Subject
from kserve_pvc._show.observing import observing
from kserve_pvc._source.contract import Backend, Resolved
from kserve_pvc._source.ref import ModelRef
from kserve_pvc._volume.writing import VolumeWriter
from kserve_pvc.errors import LockTimeoutError


class CallOptions(TypedDict, total=False):
    """
    What differs between the calls of one store, as arguments of `Call`.
    """

    timeout: Required[float]
    max_workers: Required[int]
    tuning: Mapping[str, Any]
    after: LogView | None
    resolved: Resolved | None
    resolved_after: int
    activity: Literal["downloading", "importing"]


@attrs.frozen(kw_only=True)
class Call:
    """
    How a call downloads.

    Args:
        look: Reads the newest record of the model, and raises if it is older than one that this process has returned.
        flight: Held by the thread of this process that downloads the model.
        started: When the call began, by the monotonic clock.
        tuning: The arguments of `Tuning` that the store was opened with.
        after: The newest record, if it does not satisfy the call.
        resolved: What the source holds, if it was requested already.
        resolved_after: The newest record that was there before it was requested.
    """

    subject: Subject
    look: Callable[[], LogView]
    listen: Callable[[], AbstractContextManager[Listener]]
    listeners: Sequence[Listener]
    cancel: Cancel | None
    holder: Holder
    flight: threading.Lock
    started: float
    timeout: float
    max_workers: int
    tuning: Mapping[str, Any] = attrs.field(factory=dict)
    after: LogView | None = None
    resolved: Resolved | None = None
    resolved_after: int = 0
    activity: Literal["downloading", "importing"] = "downloading"

    def run(
        self, writer: VolumeWriter, settings: StoreSettings, ref: ModelRef, make_backend: Callable[[], Backend]
    ) -> Outcome:
        """
        Download the model, or wait for the process that does, and notify the listeners.

        Raises:
            LockTimeoutError: Another thread or process was still downloading it.
            DownloadCancelledError: The caller cancelled the call.
        """
        cancellation = Cancellation(str(ref), self.cancel)
        with (
            self.listen() as show,
            observing(self.subject, show, self.listeners) as listener,
            self._in_flight(ref, cancellation),
        ):
            began = time.monotonic()
            outcome = Download(
                writer,
                settings,
                ref,
                make_backend,
                look=self.look,
                holder=self.holder,
                timeout=max(0.0, self.timeout - (time.monotonic() - self.started)),
                subject=self.subject,
                listener=listener,
                cancellation=cancellation,
                request=self._request(),
                tuning=Tuning(max_workers=self.max_workers, **self.tuning),
            ).run()
            if outcome.status == "downloaded":
                settle_view_quietly(writer, ref.key)
                note_rate(writer, outcome.bytes_fetched, time.monotonic() - began)
            listener(self._finished(outcome))
        return outcome

    @contextmanager
    def _in_flight(self, ref: ModelRef, cancellation: Cancellation) -> Iterator[None]:
        if not cancellation.acquire(self.flight, self.timeout):
            raise LockTimeoutError(str(ref), "another thread of this process", self.timeout, 0.0, 0, 0)
        try:
            yield
        finally:
            self.flight.release()

    def _request(self) -> Request:
        return Request(
            after_seq=self.after.seq if self.after else 0,
            after_generation=self.after.present.generation if self.after and self.after.present else None,
            version=self.resolved.version if self.resolved else None,
            resolved=self.resolved,
            resolved_after=self.resolved_after,
            activity=self.activity,
        )

    def _finished(self, outcome: Outcome) -> CallFinished:
        return CallFinished(
            **self.subject,
            status="waited" if outcome.status == "present" else outcome.status,
            size_bytes=outcome.entry.size_bytes,
            bytes_fetched=outcome.bytes_fetched,
            seconds=time.monotonic() - self.started,
        )
