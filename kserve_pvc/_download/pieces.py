"""
Reading from a source patiently: stalls, retries and pauses.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import PurePosixPath
from types import TracebackType

from kserve_pvc._download.slowness import Slowness
from kserve_pvc._download.streams import StreamLimit
from kserve_pvc._download.tuning import Tuning
from kserve_pvc._source.contract import Backend, RangeReader, RemoteFile, SupportsEvidence
from kserve_pvc.errors import SourceUnavailableError, StoreError

_POLL_SECONDS = 0.5


class OpenedRange:
    """
    A range that was requested before it is read, as a context manager around its reader. It is closed once.
    """

    def __init__(self, context: AbstractContextManager[RangeReader]) -> None:
        self._context: AbstractContextManager[RangeReader] | None = context
        self._reader = context.__enter__()

    def __enter__(self) -> RangeReader:
        return self._reader

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        context, self._context = self._context, None
        if context is not None:
            context.__exit__(kind, error, trace)


class Tries:
    """
    How often and how long something is tried that makes no progress.
    """

    def __init__(self, tuning: Tuning) -> None:
        self._deadline = time.monotonic() + tuning.retry_seconds
        self._pauses = tuning.pauses(random.random())
        self._last = tuning.retry_first_seconds

    def next_delay(self, retry_after: float | None) -> float | None:
        """
        Return the seconds until the next try, or None after the last.

        A source that is busy may be so for long: only time limits it.
        """
        delay = next(self._pauses, None if retry_after is None else min(self._last * 2, 10.0))
        if delay is None:
            return None
        self._last = delay
        delay = max(delay, retry_after or 0.0)
        return None if time.monotonic() + delay > self._deadline else delay


class PatientReader:
    """
    Reads from one source for all streams of a transfer; a source that is busy for one of them is so for all.

    `received` counts bytes and `waited` the seconds that all streams together waited for them. They are for the number
    of streams only, so an addition that is lost between threads does not matter.

    Args:
        limit: Is notified when the source refuses, or stalls.
        check: Called before each read and during pauses; ends them by raising.
        wait: Waits for at most so many seconds; may return at once when `check` is going to raise.
        retried: Is notified of the reason and the length of each pause.
    """

    def __init__(
        self,
        backend: Backend,
        uri: str,
        tuning: Tuning,
        *,
        limit: StreamLimit,
        check: Callable[[], None],
        wait: Callable[[float], object],
        retried: Callable[[str, float], None],
    ) -> None:
        self._backend = backend
        self._uri = uri
        self._tuning = tuning
        self._limit = limit
        self._check = check
        self._wait = wait
        self._retried = retried
        self._evidence: Callable[[RemoteFile], str | None] = (
            backend.evidence if isinstance(backend, SupportsEvidence) else lambda file: file.digest
        )
        # Files whose source sends them whole only.
        self.whole: set[PurePosixPath] = set()
        self._busy_until = 0.0
        self._slowness = Slowness(tuning.slow_seconds, tuning.least_bytes_per_second, time.monotonic())
        self.received = 0
        self.waited = 0.0

    def pieces(
        self,
        file: RemoteFile,
        start: int,
        stop: int,
        buffer: memoryview,
        opened: OpenedRange | None = None,
        streams: int = 1,
    ) -> Iterator[memoryview]:
        """
        Yield the bytes of a range in order; after a failure continue with the byte after the last one.

        Args:
            buffer: What the pieces are received into, one after the other.
            opened: The range, if it was requested before.
            streams: How many streams wait when this one does.
        """
        tries = Tries(self._tuning)
        while start < stop:
            self._wait_until_welcome()
            began, now = start, time.monotonic()
            try:
                opened_range, opened = opened or self._backend.open_range(file, start, stop), None
                with opened_range as reader:
                    for piece in self._receive(reader, file, (start, stop), buffer, now, streams):
                        start += len(piece)
                        yield piece
            except SourceUnavailableError as error:
                if start - began >= self._tuning.trickle_bytes:
                    tries = Tries(self._tuning)  # The source is well, so the count starts anew.
                self._pause(error, tries)

    def _receive(
        self,
        reader: RangeReader,
        file: RemoteFile,
        span: tuple[int, int],
        buffer: memoryview,
        since: float,
        streams: int,
    ) -> Iterator[memoryview]:
        """Yield what one response brings, as long as it is more than a trickle."""
        start, stop = span
        began, skipped = start, 0
        while start < stop:
            self._check()
            before, worked = time.monotonic(), getattr(reader, "worked", 0.0)
            count = reader.readinto(buffer[: min(len(buffer), stop - start)])
            now = time.monotonic()
            # A reader that decrypts does not wait: more streams would only take turns with it.
            self.waited += (now - before - getattr(reader, "worked", 0.0) + worked) * streams
            self._count(file, now, count, stop - start)
            if count is not None:
                start += count
                yield buffer[:count]
            if getattr(reader, "is_whole", False):
                self.whole.add(file.entry.path)
            if now - since > self._tuning.stall_seconds:
                # Bytes that come before the range are a sign of life.
                skipped, before_range = getattr(reader, "skipped", 0), skipped
                if start - began + skipped - before_range < self._tuning.trickle_bytes and start < stop:
                    self._limit.congested(now, 0.0)
                    reason = f"only {start - began} bytes of `{file.entry.path}` came in {now - since:.3g} s"
                    raise SourceUnavailableError(self._uri, reason)
                began, since = start, now

    def _count(self, file: RemoteFile, now: float, read: int | None, missing: int) -> None:
        if read == 0:
            raise SourceUnavailableError(self._uri, f"the response for `{file.entry.path}` ended {missing} bytes early")
        count = read or 0
        self.received += count
        rate = self._slowness.add(now, count)
        if rate is not None:
            least, seconds = self._tuning.least_bytes_per_second, self._tuning.slow_seconds
            reason = f"only {rate:.0f} bytes a second came for {seconds:g} s, of at least {least}"
            raise SourceUnavailableError(self._uri, reason, is_final=True)

    def open_ahead(self, file: RemoteFile) -> OpenedRange | None:
        """
        Request a whole file before its turn.

        Returns:
            None if that fails, as it will then be requested again, or if there is nothing to request.
        """
        if not file.entry.size_bytes or self._busy_until > time.monotonic():
            return None
        try:
            return OpenedRange(self._backend.open_range(file, 0, file.entry.size_bytes))
        except StoreError:
            return None

    def evidence(self, file: RemoteFile) -> str | None:
        """
        Request the digest of a file, as patiently as its bytes.
        """
        tries = Tries(self._tuning)
        while True:
            self._wait_until_welcome()
            try:
                return self._evidence(file)
            except SourceUnavailableError as error:
                self._pause(error, tries)

    def _pause(self, error: SourceUnavailableError, tries: Tries) -> None:
        delay = None if error.is_final else tries.next_delay(error.retry_after)
        if delay is None:
            raise error
        if error.retry_after is not None:
            self._limit.congested(time.monotonic(), delay)
        if error.retry_after:
            # The source said when to come back, which is meant for every stream.
            self._busy_until = max(self._busy_until, time.monotonic() + error.retry_after)
        self._retried(str(error), delay)
        self._sleep(delay)

    def _wait_until_welcome(self) -> None:
        while (seconds := self._busy_until - time.monotonic()) > 0:
            self._sleep(seconds)

    def _sleep(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self._check()
            self._wait(min(left, _POLL_SECONDS))
