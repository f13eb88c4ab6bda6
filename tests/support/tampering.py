"""
A proxy that breaks what it passes on, at one named place.
"""

from __future__ import annotations

import threading
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
        self,
        endpoint: str,
        *,
        cuts: tuple[int, ...] = (),
        rewrite: Callable[[str, bytes], bytes] = lambda asked, answer: answer,
    ) -> None:
        super().__init__(endpoint)
        self.cuts = list(cuts)
        self._rewrite = rewrite
        self._of = threading.local()

    def _pass_request(self, near: Any, far: Any, asked: Any) -> Any:
        honest = near.send
        self._of.is_listing = "list-type=" in asked.words[1]
        near.send = lambda data: honest(self._rewrite(" ".join(asked.words), bytes(data)))
        try:
            return super()._pass_request(near, far, asked)
        finally:
            near.send = honest

    def _paced(self, piece: memoryview) -> Iterator[memoryview]:
        if self.cuts and not self._of.is_listing:
            if len(piece) >= self.cuts[0]:
                yield piece[: self.cuts.pop(0)]
                raise ConnectionError("cut")
            self.cuts[0] -= len(piece)
        yield from super()._paced(piece)
