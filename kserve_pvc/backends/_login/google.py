"""
Credentials for Google Cloud Storage: none, a token that was configured, or credentials of google-auth, which renews
their tokens.

google-auth is loaded only for the last of them, and gcsfs only for logins that it alone keeps (`_gcsfs`).
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kserve_pvc._source.redaction import redact
from kserve_pvc.backends._http.target import HTTPError, Target, target_of
from kserve_pvc.backends._login.contract import (
    Anonymous,
    Authorization,
    GivenToken,
    Login,
    LoginError,
    Scope,
    describe_foreign,
)
from kserve_pvc.errors import HIDDEN, SettingsError

# What reading and listing need, and no more.
_SCOPE = "https://www.googleapis.com/auth/devstorage.read_only"
_LOOPBACK = re.compile(r"localhost|127(?:\.[0-9]{1,3}){3}|::1")
_TOKEN = re.compile(r"[!-~]+")
_SECRET = re.compile(r"((?:Bearer|Basic)\s+|\bya29\.)[^\s\"'<>]+", re.IGNORECASE)
# Names of logins that gcsfs keeps in the home directory.
KEPT_LOGINS = ("browser", "cache")
# Many streams are refused at once: a token that was renewed for the first of them is good for the others.
_RENEWAL_SECONDS = 10.0
_TOKEN_SERVICE_SECONDS = 30.0


class GoogleAuthLogin(Login):
    """
    Credentials of google-auth. Their tokens are renewed when they expire, and when they are refused.

    Args:
        load: Makes the credentials when they are first needed, since that may take a request.
        is_optional: Whether requests are anonymous if there are no credentials.
    """

    def __init__(self, load: Callable[[Any], Any], *, is_optional: bool = False) -> None:
        self._load = load
        self._is_optional = is_optional
        self._guard = threading.Lock()
        self._credentials: Any = None
        self._anonymous: Anonymous | None = None
        self._renewed_at = float("-inf")

    def authorize(self, scope: Scope, *, renewed: bool) -> Authorization:
        with self._guard:
            is_refused = renewed and time.monotonic() - self._renewed_at > _RENEWAL_SECONDS
            if self._credentials is None and (self._anonymous is None or is_refused):
                self._find()
            found: dict[str, str] = {}
            if self._credentials is not None:
                if is_refused or not self._credentials.valid:
                    self._renew()
                self._credentials.apply(found)
            return Authorization("", found)

    def _find(self) -> None:
        try:
            self._credentials = self._call(self._load)
            self._anonymous = None
        except LoginError as error:
            if not (self._is_optional and error.is_absent):
                raise
            # As KServe does. The error says why there are none if the bucket turns out not to be public.
            self._anonymous = Anonymous(f"the request was anonymous, because there are no credentials: {error.detail}")
            self._renewed_at = time.monotonic()

    def _renew(self) -> None:
        try:
            self._call(self._credentials.refresh)
        except LoginError:
            # A token that cannot be renewed and has not expired may be a valid one that lacks a permission: let the
            # service decide.
            if not self._credentials.valid:
                raise
        self._renewed_at = time.monotonic()

    def _call(self, act: Callable[[Any], Any]) -> Any:
        """Call google-auth for what may take requests."""
        from google.auth.exceptions import DefaultCredentialsError, TransportError
        from google.auth.transport.requests import Request

        try:
            with _session() as session:
                return act(Request(session))
        except LoginError:
            raise
        except Exception as error:  # A file that cannot be read or has another shape than expected may raise anything.
            is_transient = isinstance(error, TransportError) or bool(getattr(error, "retryable", False))
            reason = hide(describe_foreign(error))
            # Not chained: the context may hold a whole response of the token service.
            raise LoginError(
                reason, is_denied=not is_transient, is_absent=isinstance(error, DefaultCredentialsError)
            ) from None

    def hint(self) -> str:
        return "" if self._anonymous is None else self._anonymous.hint()

    def secret(self) -> str:
        return str(getattr(self._credentials, "token", None) or "")


def _session() -> Any:
    from requests import Session

    session: Any = Session()
    request = session.request
    # google-auth by itself would wait for two minutes, three times.
    session.request = lambda *arguments, timeout=None, **more: request(
        *arguments, timeout=min(timeout or _TOKEN_SERVICE_SECONDS, _TOKEN_SERVICE_SECONDS), **more
    )
    return session


def hide(text: str) -> str:
    """
    Remove what looks like a token, and what may be secret in URLs, from a foreign message.
    """
    return _SECRET.sub(r"\1…", redact(text))


def find_endpoint(options: Mapping[str, Any], environ: Mapping[str, str]) -> tuple[Target, bool]:
    """
    Find the address of the service.

    Returns:
        The address, and whether it is that of an emulator or the like, where default credentials are not sent.

    Raises:
        SettingsError: It is not a valid address.
    """
    named = options.get("endpoint_url")
    emulator = environ.get("STORAGE_EMULATOR_HOST", "")
    name = "endpoint_url"
    url = named
    if not named and emulator not in ("", "default"):
        name = "STORAGE_EMULATOR_HOST"
        url = emulator if "://" in emulator else f"http://{emulator}"
    if not url:
        name = "GOOGLE_CLOUD_UNIVERSE_DOMAIN"
        url = f"https://storage.{environ.get(name) or 'googleapis.com'}"
    try:
        if {"?", "#", "@"} & set(str(url)):
            raise HTTPError("an endpoint has neither user nor query")
        endpoint = target_of(str(url))
    except HTTPError:
        raise SettingsError(name, HIDDEN, "write `https://host:port`") from None
    return endpoint, endpoint.scheme == "http" or name == "STORAGE_EMULATOR_HOST"


def find_login(token: Any, endpoint: Target, *, is_emulator: bool) -> Login:
    """
    Choose the login that `token` describes. Sends no request.

    Args:
        token: As `gcsfs.GCSFileSystem` takes it: None for the default credentials, `anon`, `google_default`, `cloud`, a
            file or the content of a key or of a user's login, credentials of google-auth, or an access token.

    Raises:
        SettingsError: It is not valid, or would be sent without TLS.
    """
    if token is None or token == "":
        if is_emulator:
            return Anonymous(
                "the request was anonymous, since default credentials are sent neither to an emulator nor over http; "
                "set `token`"
            )
        return GoogleAuthLogin(_default, is_optional=True)
    if token == "anon":
        return Anonymous()
    check_encrypted(endpoint)
    if token == "google_default":
        return GoogleAuthLogin(_default)
    if token == "cloud":
        return GoogleAuthLogin(_machine)
    return _given(token)


def check_encrypted(endpoint: Target) -> None:
    """
    Make sure that credentials may be sent to an endpoint.

    Raises:
        SettingsError: It is another machine, and not reached over TLS.
    """
    if endpoint.scheme == "http" and not _LOOPBACK.fullmatch(endpoint.host):
        raise SettingsError(
            "token", HIDDEN, "credentials are sent over https or to this machine only; otherwise use `token='anon'`"
        )


def _given(token: Any) -> Login:
    if not isinstance(token, str):
        return GoogleAuthLogin(_reader(token)) if isinstance(token, Mapping) else _object(token)
    # Not `Path.expanduser`, which fails where there is no home directory.
    place = Path(os.path.expanduser(token))  # noqa: PTH111
    if token.startswith(("/", "~", "./", "../")) or token.endswith(".json") or (len(token) < 256 and place.is_file()):
        return GoogleAuthLogin(_reader(_read_json(place)))
    if not _TOKEN.fullmatch(token):
        raise SettingsError("token", HIDDEN, "an access token is one word")
    return GivenToken(token)


def _object(token: Any) -> Login:
    if not all(callable(getattr(token, name, None)) for name in ("apply", "refresh")):
        raise SettingsError(
            "token", type(token).__name__, "pass a file, an access token, or credentials of google-auth"
        )
    if type(token).__name__ == "AnonymousCredentials":
        return Anonymous()
    return GoogleAuthLogin(lambda request: _scoped(token))


def _read_json(place: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(place.read_bytes())
    except OSError as error:
        raise SettingsError("token", str(place), f"the file cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise SettingsError("token", str(place), "the file is not the JSON of a service account or of a user's login")
    return content


def _reader(content: Mapping[str, Any]) -> Callable[[Any], Any]:
    """Return a function that makes credentials of the content of a file."""
    kind = content.get("type", "service_account" if "private_key" in content else "authorized_user")
    if kind not in ("service_account", "authorized_user"):
        hint = "name its file in GOOGLE_APPLICATION_CREDENTIALS, or pass credentials of google-auth as `token`"
        raise SettingsError(
            "token", str(kind)[:40], f"only `service_account` and `authorized_user` are read here; {hint}"
        )

    def read(request: Any) -> Any:
        if kind == "service_account":
            from google.oauth2 import service_account

            key: Any = service_account.Credentials
            return key.from_service_account_info(content, scopes=[_SCOPE])
        from google.oauth2 import credentials

        # The scopes were chosen at login, and others are refused.
        user: Any = credentials.Credentials
        return user.from_authorized_user_info(content)

    return read


def _default(request: Any) -> Any:
    from google.auth import default

    return default(scopes=[_SCOPE], request=request)[0]


def _machine(request: Any) -> Any:
    from google.auth import compute_engine

    machine: Any = compute_engine.Credentials
    return _scoped(machine())


def _scoped(credentials: Any) -> Any:
    from google.auth import credentials as kinds

    scoped: Any = kinds.with_scopes_if_required
    return scoped(credentials, [_SCOPE])
