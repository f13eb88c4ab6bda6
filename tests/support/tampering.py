"""
A proxy that breaks what it passes on, at one named place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from origin import CountingProxy


class TamperingProxy(CountingProxy):
    """
    Cuts connections inside the body of an object, or changes the heads of answers.

    Args:
        cuts: After how many more bytes of objects a connection is cut, one after the other.
        rewrite: Gets the first line of a request and the head of its answer, and returns the head to send.
    """

    def __init__(
        self, endpoint: str, *, cuts: tuple[int, ...] = (), rewrite: Callable[[str, bytes], bytes] = lambda asked, answer: answer
    ) -> None:
        super().__init__(endpoint)
        self.cuts = list(cuts)
        self._rewrite = rewrite

    def _pass_request(self, near: Any, far: Any, asked: Any) -> Any:
        honest = near.send
        near.send = lambda data: honest(self._rewrite(" ".join(asked.words), bytes(data)))
        try:
            return super()._pass_request(near, far, asked)
        finally:
            near.send = honest

    def _paced(self, piece: memoryview) -> Iterator[memoryview]:
        # Listings are far smaller than any cut, so only objects are counted.
        if self.cuts and len(piece) > 10_000:
            if len(piece) >= self.cuts[0]:
                yield piece[: self.cuts.pop(0)]
                raise ConnectionError("cut")
            self.cuts[0] -= len(piece)
        yield from super()._paced(piece)
