"""
Who asks Google Cloud Storage: nobody in particular, a token that was given, or an account whose tokens google-auth
renews.

google-auth is loaded only for the last of them. gcsfs, which depends on it, is never loaded: it takes three times as
long, and asks for a bucket's type over gRPC before it lists anything.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import attrs

from kserve_pvc._source.ref import redact
from kserve_pvc.backends._http.target import HTTPError, Target, target_of
from kserve_pvc.errors import SettingsError

# What reading and listing need, and no more.
_SCOPE = "https://www.googleapis.com/auth/devstorage.read_only"
_LOOPBACK = re.compile(r"localhost|127(?:\.[0-9]{1,3}){3}|::1")
_TOKEN = re.compile(r"[!-~]+")
_SECRET = re.compile(r"((?:Bearer|Basic)\s+|\bya29\.)[^\s\"'<>]+", re.IGNORECASE)
_HIDDEN = "(not shown)"
# Refused streams come in a crowd: what was renewed for the first of them is good for the others.
_RENEWAL_SECONDS = 10.0
_TOKEN_SERVICE_SECONDS = 30.0
# What gcsfs understands and we do not: it keeps logins of a browser in a pickle in the home directory.
_INTERACTIVE = ("browser", "cache")


class LoginError(Exception):
    """
    No token to ask with. With `is_denied` whoever issues them refused, else nobody was there to ask. With `is_absent`
    there are no credentials at all.
    """

    def __init__(self, reason: str, *, is_denied: bool, is_absent: bool = False) -> None:
        super().__init__(reason)
        self.is_denied = is_denied
        self.is_absent = is_absent


class Login(Protocol):
    """
    What makes a request one of somebody who may. Called from many threads at once.
    """

    def headers(self, *, renewed: bool) -> Mapping[str, str]:
        """The headers to add; `renewed` if those given before were refused. Raises `LoginError`."""

    def hint(self) -> str:
        """What to tell whom the service denies, if anything."""

    def secret(self) -> str:
        """What must not be repeated to anybody."""


@attrs.frozen
class Anonymous:
    """
    Nobody in particular, who may read public buckets.
    """

    reason: str = "it was asked without credentials, as the settings say"

    def headers(self, *, renewed: bool) -> Mapping[str, str]:
        return {}

    def hint(self) -> str:
        return self.reason

    def secret(self) -> str:
        return ""


@attrs.frozen
class GivenToken:
    """
    An access token that somebody else got, and that nobody renews.
    """

    token: str = attrs.field(repr=False)

    def headers(self, *, renewed: bool) -> Mapping[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    def hint(self) -> str:
        return "the token that was given may have expired, and is not renewed"

    def secret(self) -> str:
        return self.token


class Account:
    """
    Credentials of google-auth. Their tokens are renewed when they expire, and when they are refused.

    Args:
        load: Makes the credentials when they are first needed, since that may take a request.
        is_optional: If there are none, nobody in particular asks.
    """

    def __init__(self, load: Callable[[Any], Any], *, is_optional: bool = False) -> None:
        self._load = load
        self._is_optional = is_optional
        self._guard = threading.Lock()
        self._credentials: Any = None
        self._nobody: Anonymous | None = None
        self._renewed_at = float("-inf")

    def headers(self, *, renewed: bool) -> Mapping[str, str]:
        with self._guard:
            is_refused = renewed and time.monotonic() - self._renewed_at > _RENEWAL_SECONDS
            if self._credentials is None and (self._nobody is None or is_refused):
                self._find()
            found: dict[str, str] = {}
            if self._credentials is not None:
                if is_refused or not self._credentials.valid:
                    self._renew()
                self._credentials.apply(found)
            return found

    def _find(self) -> None:
        try:
            self._credentials, self._nobody = self._call(self._load), None
        except LoginError as error:
            if not (self._is_optional and error.is_absent):
                raise
            # As KServe does. Why there are none is told if the bucket turns out not to be public.
            self._nobody = Anonymous(f"it was asked without credentials, because there are none: {error}")
            self._renewed_at = time.monotonic()

    def _renew(self) -> None:
        try:
            self._call(self._credentials.refresh)
        except LoginError:
            # A token that cannot be renewed and has not expired may be a good one that lacks a right: the service
            # knows.
            if not self._credentials.valid:
                raise
        self._renewed_at = time.monotonic()

    def _call(self, act: Callable[[Any], Any]) -> Any:
        """Let google-auth do something that may take requests."""
        from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, TransportError
        from google.auth.transport.requests import Request

        try:
            with _session() as session:
                return act(Request(session))
        except (GoogleAuthError, ValueError) as error:
            is_transient = isinstance(error, TransportError) or bool(getattr(error, "retryable", False))
            reason = hide(str(error.args[0] if error.args else error)).partition("\n")[0].rstrip(". ")
            # What google-auth chains to it may hold a whole answer of the token service.
            raise LoginError(
                reason, is_denied=not is_transient, is_absent=isinstance(error, DefaultCredentialsError)
            ) from None

    def hint(self) -> str:
        return "" if self._nobody is None else self._nobody.hint()

    def secret(self) -> str:
        return str(getattr(self._credentials, "token", None) or "")


def _session() -> Any:
    from requests import Session

    session: Any = Session()
    ask, most = session.request, _TOKEN_SERVICE_SECONDS
    # google-auth by itself would wait for two minutes, three times.
    session.request = lambda *arguments, timeout=None, **more: ask(
        *arguments, timeout=min(timeout or most, most), **more
    )
    return session


def hide(text: str) -> str:
    """
    Take what looks like a token, and whatever may be secret in URLs, out of what others say.
    """
    return _SECRET.sub(r"\1…", redact(text))


def find_endpoint(options: Mapping[str, Any], environ: Mapping[str, str]) -> tuple[Target, bool]:
    """
    Decide where the service is, and whether that is an emulator or the like, which is asked without default
    credentials.

    Raises:
        SettingsError: It is no address.
    """
    named = options.get("endpoint_url")
    emulator = environ.get("STORAGE_EMULATOR_HOST", "")
    name, url = "endpoint_url", named
    if not named and emulator not in ("", "default"):
        name, url = "STORAGE_EMULATOR_HOST", emulator if "://" in emulator else f"http://{emulator}"
    if not url:
        name = "GOOGLE_CLOUD_UNIVERSE_DOMAIN"
        url = f"https://storage.{environ.get(name) or 'googleapis.com'}"
    try:
        if {"?", "#", "@"} & set(str(url)):
            raise HTTPError("an address has neither user nor query")
        endpoint = target_of(str(url))
    except HTTPError:
        raise SettingsError(name, _HIDDEN, "write `https://host:port`") from None
    return endpoint, endpoint.scheme == "http" or name == "STORAGE_EMULATOR_HOST"


def find_login(token: Any, endpoint: Target, *, is_emulator: bool) -> Login:
    """
    Decide who asks, without asking anybody.

    Args:
        token: As `gcsfs.GCSFileSystem` takes it: None for the default credentials, `anon`, `google_default`, `cloud`, a
            file or the content of a key or of a user's login, credentials of google-auth, or an access token.

    Raises:
        SettingsError: It means nothing, or would be sent in the clear.
    """
    if token is None or token == "":
        if is_emulator:
            return Anonymous(
                "it was asked without credentials, as every address that is not https is unless `token` gives some"
            )
        return Account(_default, is_optional=True)
    if token == "anon":
        return Anonymous()
    if endpoint.scheme == "http" and not _LOOPBACK.fullmatch(endpoint.host):
        raise SettingsError(
            "token", _HIDDEN, "credentials are sent over https, or to this machine; else use `token='anon'`"
        )
    if token == "google_default":
        return Account(_default)
    if token == "cloud":
        return Account(_machine)
    return _given(token)


def _given(token: Any) -> Login:
    if not isinstance(token, str):
        return Account(_reader(token)) if isinstance(token, Mapping) else _object(token)
    if token in _INTERACTIVE:
        raise SettingsError(
            "token", token, "log in with `gcloud auth application-default login`, and leave `token` out"
        )
    # Not `Path.expanduser`, which fails for a home that nobody has.
    place = Path(os.path.expanduser(token))  # noqa: PTH111
    if token.startswith(("/", "~", "./", "../")) or token.endswith(".json") or (len(token) < 256 and place.is_file()):
        return Account(_reader(_read_json(place)))
    if not _TOKEN.fullmatch(token):
        raise SettingsError("token", _HIDDEN, "an access token is one word")
    return GivenToken(token)


def _object(token: Any) -> Login:
    if not all(callable(getattr(token, name, None)) for name in ("apply", "refresh")):
        raise SettingsError(
            "token", type(token).__name__, "give a file, an access token, or credentials of google-auth"
        )
    if type(token).__name__ == "AnonymousCredentials":
        return Anonymous()
    return Account(lambda request: _scoped(token))


def _read_json(place: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(place.read_bytes())
    except OSError as error:
        raise SettingsError("token", str(place), f"the file cannot be read: {error.strerror or error}") from None
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise SettingsError("token", str(place), "the file is no JSON of a service account or of a user's login")
    return content


def _reader(content: Mapping[str, Any]) -> Callable[[Any], Any]:
    """What makes credentials of the content of a file."""
    kind = content.get("type", "service_account" if "private_key" in content else "authorized_user")
    if kind not in ("service_account", "authorized_user"):
        remedy = "name its file in GOOGLE_APPLICATION_CREDENTIALS, or give credentials of google-auth as `token`"
        raise SettingsError(
            "token", str(kind)[:40], f"only `service_account` and `authorized_user` are read here; {remedy}"
        )

    def read(request: Any) -> Any:
        if kind == "service_account":
            from google.oauth2 import service_account

            key: Any = service_account.Credentials
            return key.from_service_account_info(content, scopes=[_SCOPE])
        from google.oauth2 import credentials

        # Whoever logged in has chosen the scopes, and others are refused.
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
