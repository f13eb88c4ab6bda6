"""
The connections of the webhook server: none may keep others out by sending or taking nothing.
"""

from __future__ import annotations

import asyncio
import resource
from contextlib import suppress
from typing import Any, cast

from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS = 512
# From the connection to the end of the TLS handshake; then, each time, to the end of the header of a request.
HANDSHAKE_SECONDS = 5.0
HEAD_SECONDS = 5.0
# From the header of a request until the client has taken the response.
REQUEST_SECONDS = 30.0
# The API server keeps idle connections longer than the default of uvicorn.
KEEP_ALIVE_SECONDS = 120
_GRACE_SECONDS = 5.0
_MOST_FILES = 65_536


class BoundedProtocol(H11Protocol):
    """
    One connection, which is aborted when its client lets it wait. If there are too many, the one that has been without
    a request for longest makes way for a new one.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.timer: asyncio.TimerHandle | None = None
        self.waits_since: float | None = None
        self._wait(HEAD_SECONDS)
        others: set[Any] = cast("set[Any]", self.connections)
        idle = [one for one in others if one is not self and one.waits_since is not None]
        if len(self.connections) >= MAX_CONNECTIONS and idle:
            min(idle, key=lambda one: one.waits_since).abort()

    def data_received(self, data: bytes) -> None:
        # The first bytes of another request on a connection that was kept.
        if self._is_between and self.cycle is not None:
            self._wait(HEAD_SECONDS)
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before and not self._is_between:
            self.waits_since = None
            self._limit(REQUEST_SECONDS)

    def on_response_complete(self) -> None:
        before = self.cycle
        # The client may take what is still in the buffers, and send another request.
        self._wait(KEEP_ALIVE_SECONDS + _GRACE_SECONDS)
        super().on_response_complete()
        if self.cycle is not before and not self._is_between:
            self.waits_since = None
            self._limit(REQUEST_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.timer is not None:
            self.timer.cancel()
        super().connection_lost(exc)

    def abort(self) -> None:
        """
        End the connection without waiting for the client.
        """
        self.connections.discard(self)
        self.transport.abort()

    @property
    def _is_between(self) -> bool:
        """Whether no request is being processed."""
        return self.cycle is None or bool(self.cycle.response_complete)

    def _wait(self, seconds: float) -> None:
        self.waits_since = self.loop.time()
        self._limit(seconds)

    def _limit(self, seconds: float) -> None:
        if self.timer is not None:
            self.timer.cancel()
        self.timer = self.loop.call_later(seconds, self.abort)


class BoundedLoop(asyncio.SelectorEventLoop):
    """
    An event loop whose servers do not wait long for a TLS handshake.
    """

    async def create_server(self, *arguments: Any, **options: Any) -> Any:
        if options.get("ssl") is not None:
            options.setdefault("ssl_handshake_timeout", HANDSHAKE_SECONDS)
        return await super().create_server(*arguments, **options)


def allow_open_files() -> None:
    """
    Let this process have as many connections as the system allows, since those in a handshake are not counted.
    """
    with suppress(OSError, ValueError):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
        if soft != resource.RLIM_INFINITY and soft < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
