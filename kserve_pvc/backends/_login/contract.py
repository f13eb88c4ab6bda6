"""
What the logins of all services have in common: how a request is authorized, and how it fails that it is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple, Protocol

import attrs

from kserve_pvc.backends._ranges import NO_CREDENTIALS, RefusedError


class LoginError(RefusedError):
    """
    No credentials to authorize a request with.

    `is_denied`: the service that issues tokens refused; otherwise it could not be reached. `is_absent`: no credentials
    are configured. It is not retried, since the libraries that get tokens do that themselves.
    """

    def __init__(self, reason: str, *, is_denied: bool, is_absent: bool = False) -> None:
        super().__init__(f"no token: {reason}", code=NO_CREDENTIALS if is_denied else "")
        self.detail = reason
        self.is_denied = is_denied
        self.is_absent = is_absent


def describe_foreign(error: Exception) -> str:
    """
    Say in one line what a library raised, with the file or the kind of error where its message alone says little.

    The caller hides what may be secret.
    """
    if isinstance(error, OSError) and error.filename is not None:
        return f"`{error.filename}` cannot be read: {error.strerror or type(error).__name__}"
    first = str(error.args[0] if error.args else error).strip().partition("\n")[0].rstrip(". ")
    is_plain = isinstance(error, LookupError | TypeError | AttributeError | AssertionError) or not first
    return f"{type(error).__name__}: {first}".rstrip(": ") if is_plain else first


@attrs.frozen
class Scope:
    """
    What a request reads: a container (bucket) of an account, over TLS or not.
    """

    account: str = ""
    container: str = ""
    is_encrypted: bool = True


class Authorization(NamedTuple):
    """
    What makes a request an authorized one: a part of its query, already encoded, and headers.
    """

    query: str
    headers: Mapping[str, str]


class Login(Protocol):
    """
    Authorizes requests. Called from several threads at once.

    `is_bound`: the credentials belong to one account and must not be sent to another.
    """

    is_bound: ClassVar[bool] = False

    def authorize(self, scope: Scope, *, renewed: bool) -> Authorization:
        """
        Return what to add to a request.

        Args:
            scope: What the request reads.
            renewed: The service refused what was returned before, so it is renewed where that is possible.

        Raises:
            LoginError: No credentials are available.
        """

    def hint(self) -> str:
        """Return a hint to append to an access-denied error, or an empty string."""
        return ""

    def secret(self) -> str:
        """Return what must never be shown, even if the service repeats it in an error, or an empty string."""
        return ""

    def close(self) -> None:
        """Release idle connections. The login can still be used and then makes new ones."""
        return


@attrs.frozen
class Anonymous(Login):
    """
    Anonymous access, for public buckets and containers.
    """

    reason: str = "the request was anonymous, as configured"

    def authorize(self, scope: Scope, *, renewed: bool) -> Authorization:
        return Authorization("", {})

    def hint(self) -> str:
        return self.reason


@attrs.frozen
class GivenToken(Login):
    """
    An access token that was configured, and that cannot be renewed.
    """

    token: str = attrs.field(repr=False)

    def authorize(self, scope: Scope, *, renewed: bool) -> Authorization:
        return Authorization("", {"Authorization": f"Bearer {self.token}"})

    def hint(self) -> str:
        return "the configured token may have expired, and cannot be renewed"

    def secret(self) -> str:
        return self.token
