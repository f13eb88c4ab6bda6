"""
What the errors of file systems mean, and what of their text may be shown.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from kserve_pvc._source.redaction import redact
from kserve_pvc.backends._refusals import final_status
from kserve_pvc.errors import (
    SourceChangedError,
    SourceDeniedError,
    SourceNotFoundError,
    SourceUnavailableError,
    StoreError,
)

_DENIED = {
    "AccessDenied",
    "AuthenticationError",
    "AuthenticationException",
    "ClientAuthenticationError",
    "Forbidden",
    "GatedRepoError",
    "LogonFailure",
    "Unauthorized",
}
_MISSING = {"BucketNotFoundError", "RepositoryNotFoundError", "ResourceNotFoundError", "RevisionNotFoundError"}
# Never secret, and needed to understand what an error says.
_PLAIN_OPTIONS = {"host", "port", "endpoint_url", "endpoint", "protocol"}
_SECRET_NAME = re.compile(r"token|secret|key|passw|sas|credential|connection_string|auth|cookie", re.IGNORECASE)
_MAX_DEPTH = 5


class Failures:
    """
    Translates the errors of file systems, without any string of their options.

    Args:
        secrets: Returns what must not be shown, options and objects that hold credentials. Called at each failure,
            since tokens are renewed.
    """

    def __init__(self, secrets: Callable[[], object]) -> None:
        self._secrets = secrets

    @contextmanager
    def translated(self, uri: str, *, changed: SourceChangedError | None = None) -> Iterator[None]:
        """
        Raise foreign errors as ours.

        Args:
            changed: Raised instead, where a file was there before and is missing now.
        """
        try:
            yield
        except StoreError:
            raise
        except Exception as error:
            # Not chained: what a foreign error says may hold what must not be shown.
            raise _ours(error) or self._meaning(uri, _telling(error), changed) from None

    def _meaning(self, uri: str, error: BaseException, changed: SourceChangedError | None) -> StoreError:
        reason = f"{type(error).__name__}: {self._redacted(str(error))}".rstrip(": .")
        status = _status(error)
        names = {kind.__name__ for kind in type(error).__mro__}
        # FTP says 530 to a client that has not logged in, and 550 for all else that it refuses.
        is_login = "error_perm" in names and "530" in reason
        # A hub says 401 about what may not exist, and its error for that says which.
        is_refused = isinstance(error, PermissionError) or (status in (401, 403) and not names & _MISSING) or is_login
        if is_refused or names & _DENIED:
            return SourceDeniedError(uri, reason)
        if isinstance(error, FileNotFoundError | NotADirectoryError) or status == 404 or names & _MISSING:
            return changed or SourceNotFoundError(uri, reason)
        is_bug = isinstance(error, TypeError | ValueError | AttributeError | NotImplementedError)
        is_final = isinstance(status, int) and status >= 400 and final_status(status)
        return SourceUnavailableError(uri, reason, is_final=is_final or (is_bug and not isinstance(error, OSError)))

    def _redacted(self, text: str) -> str:
        for hidden in sorted(set(_strings(self._secrets())), key=len, reverse=True):
            text = text.replace(hidden, "***")
        return redact(text)


def _ours(error: BaseException) -> StoreError | None:
    """An error of ours that a library has wrapped."""
    for inner in _causes(error):
        if isinstance(inner, StoreError):
            return inner
    return None


def _telling(error: BaseException) -> BaseException:
    """The error itself, or its cause where a file system calls every failure a missing file, as over HTTP."""
    if isinstance(error, FileNotFoundError):
        for inner in _causes(error):
            is_network = isinstance(inner, OSError) and not isinstance(inner, FileNotFoundError | PermissionError)
            if is_network or _status(inner) not in (None, 404):
                return inner
    return error


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    for _ in range(10):
        if seen is None:
            return
        yield seen
        seen = seen.__cause__ or seen.__context__


def _status(error: BaseException) -> object:
    """The HTTP status of an error, as far as libraries have it; gcsfs keeps it in `code`, and as a string."""
    found: object = getattr(error, "status", None)
    if found is None:
        found = getattr(getattr(error, "response", None), "status_code", None)
    if found is None:
        found = getattr(error, "status_code", getattr(error, "code", None))
    found = int(found) if isinstance(found, str) and found.isdigit() else found
    return found if isinstance(found, int) else None


def _strings(value: object, name: str = "", depth: int = 0) -> Iterator[str]:
    """Every string among options that may be secret, and what objects among them hold under the name of a secret."""
    if isinstance(value, str):
        if len(value) > 3 and name not in _PLAIN_OPTIONS:
            yield value
    elif depth > _MAX_DEPTH:
        return
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _strings(inner, str(key), depth + 1)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner, name, depth + 1)
    elif not isinstance(value, type) and hasattr(value, "__dict__"):
        for key, inner in [*vars(value).items()]:
            if _SECRET_NAME.search(key):
                yield from _strings(inner, key, depth + 1)
