"""
Ranges of pinned objects through the fsspec class of a protocol, where no request of our own can be made.

The class is asynchronous inside: its coroutines run on the event loop of its own instance, and the threads of a
download wait for them. A range comes in pieces of bounded size, so that memory is bounded too.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, TypeVar

from kserve_pvc.backends._http.target import HTTPError
from kserve_pvc.backends._ranges import RefusedError

PIECE_BYTES = 4 * 1024 * 1024
_POLL_SECONDS = 0.25

_T = TypeVar("_T")
Future = concurrent.futures.Future
Piece = bytes | bytearray


def run(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, _T], seconds: float) -> _T:
    """
    Run a coroutine on the event loop of a file system, and wait for its result.

    Raises:
        HTTPError: There is no result within the time. The coroutine is cancelled.
    """
    future = asyncio.run_coroutine_threadsafe(work, loop)
    concurrent.futures.wait([future], seconds)
    if not future.done():
        future.cancel()
        raise HTTPError(f"no response within {seconds:g} s")
    return future.result()


class ClassReader:
    """
    Bytes `start` to `stop` (not included) of a pinned file, as `RangeReader` describes, piece by piece.

    The first piece is requested when the `with` begins. Leaving it cancels the request that is under way. A refusal is
    taken for expired credentials once: then they are renewed.

    Args:
        fetch: Starts to fetch a piece, whole and of the pinned content. Takes where the piece starts and stops, and
            whether the credentials used before were refused.
    """

    def __init__(self, fetch: Callable[[int, int, bool], Future[Piece]], start: int, stop: int) -> None:
        self._fetch = fetch
        self._position = start
        self._stop = stop
        self._is_renewed = False
        self._piece = memoryview(b"")
        self._future: Future[Piece] | None = None

    def __enter__(self) -> ClassReader:
        if self._position < self._stop:
            self._request()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        future, self._future = self._future, None
        self._piece = memoryview(b"")
        if future is not None:
            future.cancel()

    def readinto(self, buffer: memoryview) -> int | None:
        """
        Fill the start of a buffer with the next bytes. None: none have arrived yet; 0: the range is complete.

        Raises:
            RefusedError: The service refuses the piece.
            HTTPError: There is no response.
        """
        if not self._piece:
            if self._position == self._stop:
                return 0
            if not self._receive():
                return None
        count = min(len(buffer), len(self._piece))
        buffer[:count] = self._piece[:count]
        # An empty slice would keep the whole piece while the next one is fetched.
        self._piece = self._piece[count:] or memoryview(b"")
        return count

    def _request(self) -> Future[Piece]:
        stop = min(self._stop, self._position + PIECE_BYTES)
        self._future = self._fetch(self._position, stop, self._is_renewed)
        return self._future

    def _receive(self) -> bool:
        future = self._future or self._request()
        concurrent.futures.wait([future], _POLL_SECONDS)
        if not future.done():
            return False
        self._future = None
        try:
            data = future.result()
        except RefusedError as refusal:
            if refusal.status not in (401, 403) or self._is_renewed:
                raise
            self._is_renewed = True
            return False
        self._piece = memoryview(data)
        self._position += len(data)
        return True
