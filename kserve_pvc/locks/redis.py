"""
A lock in Redis, for volumes whose own locks do not reach other nodes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from kserve_pvc.errors import LockServiceError, MissingDependencyError
from kserve_pvc.locks import NoLockError

_CONNECT_SECONDS = 2.0
_RESPONSE_SECONDS = 5.0


class RedisGrab:
    """
    Tries to acquire portalocker's `RedisLock`, which the subscriber of a channel holds.

    Redis ends the subscription when the holder dies. A holder that was paused for a second loses the lock too, and
    another process may get it. The claim on the volume then still protects the first holder.
    """

    def __init__(self, url: str, channel: str, environ: Mapping[str, str] | None = None) -> None:
        environ = os.environ if environ is None else environ
        self._url = url
        self._channel = channel
        self._options: dict[str, Any] = {
            "username": environ.get("KSERVE_PVC_REDIS_USERNAME") or None,
            "password": environ.get("KSERVE_PVC_REDIS_PASSWORD") or None,
            "socket_connect_timeout": _CONNECT_SECONDS,
            "socket_timeout": _RESPONSE_SECONDS,
            "client_name": "kserve-pvc",
        }
        try:
            import redis
            from portalocker.redis import RedisLock
        except ImportError as error:
            raise MissingDependencyError(
                f"the locker `{url}`", str(error.name), "pip install 'kserve-pvc[redis]'"
            ) from error
        self._redis: Any = redis
        self._lock_class: Any = RedisLock

    def __call__(self) -> Callable[[], None] | None:
        from portalocker import AlreadyLocked

        errors = self._redis.exceptions
        try:
            connection = self._redis.Redis.from_url(self._url, **self._options)
            # `RedisLock` cannot tell an unresponsive server from a lock that is held.
            connection.ping()
            lock = self._lock_class(
                self._channel,
                connection=connection,
                timeout=0,
                fail_when_locked=True,
                interrupt_on_lost=False,
                self_check_interval=None,
            )
            try:
                lock.acquire()
            except AlreadyLocked:
                connection.close()
                return None
        except (errors.AuthenticationError, errors.NoPermissionError, errors.ResponseError) as error:
            raise LockServiceError(
                self._url, _summary(error), "check KSERVE_PVC_REDIS_USERNAME and KSERVE_PVC_REDIS_PASSWORD"
            ) from error
        except (errors.RedisError, OSError) as error:
            raise NoLockError(type(error).__name__) from error

        def release() -> None:
            try:
                lock.release()
            finally:
                connection.close()

        return release


def _summary(error: Exception) -> str:
    """Return an error message of Redis, without the command that it may quote."""
    return str(error).split(",")[0][:80]
