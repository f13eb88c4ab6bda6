"""
A source that falls silent: its connections stay open, and nothing more arrives on them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

from origin import CountingProxy


class SilentProxy(CountingProxy):
    """
    A proxy in front of a real S3 server that falls silent at the requests that a test chooses.

    Args:
        endpoint: As in `CountingProxy`.
        at: The targets of the requests at which it falls silent.
        in_body: Whether it sends the head of the response and some of the body before that.
    """

    def __init__(self, endpoint: str, *, at: Callable[[str], bool], in_body: bool = False) -> None:
        super().__init__(endpoint)
        self._at = at
        self._in_body = in_body
        self._current = threading.local()
        self.silenced = threading.Event()
        self.is_listing = False  # For the test that knows.

    def speak(self) -> None:
        """
        Fall silent no more. What hangs stays as it is until the proxy is closed.
        """
        self._at = lambda target: False

    def _pass_request(self, near: Any, far: Any, asked: Any) -> Any:
        self._current.target = asked.words[1]
        if not self._in_body:
            self._hang()
        return super()._pass_request(near, far, asked)

    def _paced(self, piece: memoryview) -> Iterator[memoryview]:
        if self._in_body and self._at(self._current.target):
            yield piece[: len(piece) // 2]
            self._hang()
        yield from super()._paced(piece)

    def _hang(self) -> None:
        if self._at(self._current.target):
            self.silenced.set()
            self._closing.wait()
            raise ConnectionError("the proxy is closed")
