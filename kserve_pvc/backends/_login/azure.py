"""
Who asks Azure, and where: what options and environment say, turned into a query or a header for each request.

Signatures are queries, tokens are headers. An SDK is imported only where it is needed: to get tokens.
"""

from __future__ import annotations

import base64
import hmac
import re
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from typing import Any, ClassVar, Protocol
from urllib.parse import parse_qs, urlencode

import attrs

from kserve_pvc._source.ref import redact
from kserve_pvc.backends._http.target import HTTPError, Target, target_of
from kserve_pvc.errors import SettingsError

OPTIONS = (
    "account_host",
    "account_key",
    "account_name",
    "anon",
    "client_id",
    "client_secret",
    "connection_string",
    "credential",
    "sas_token",
    "tenant_id",
)
# Any of these among the options, and the credentials of the environment do not count.
_CREDENTIALS = ("account_key", "client_id", "client_secret", "connection_string", "credential", "sas_token")
# The names of adlfs, then those of Azure's SDK, then what KServe took before it took those.
_VARIABLES = {
    "account_name": ("AZURE_STORAGE_ACCOUNT_NAME",),
    "account_key": ("AZURE_STORAGE_ACCOUNT_KEY",),
    "connection_string": ("AZURE_STORAGE_CONNECTION_STRING",),
    "sas_token": ("AZURE_STORAGE_SAS_TOKEN",),
    "client_id": ("AZURE_STORAGE_CLIENT_ID", "AZURE_CLIENT_ID", "AZ_CLIENT_ID"),
    "client_secret": ("AZURE_STORAGE_CLIENT_SECRET", "AZURE_CLIENT_SECRET", "AZ_CLIENT_SECRET"),
    "tenant_id": ("AZURE_STORAGE_TENANT_ID", "AZURE_TENANT_ID", "AZ_TENANT_ID"),
}
# KServe asks for it after a client id.
_LAST_KEY = "AZURE_STORAGE_ACCESS_KEY"
_USUAL_SUFFIX = "core.windows.net"
_SCOPE = "https://storage.azure.com/.default"
_ACCOUNT = re.compile(r"[a-z0-9]{3,24}")
# A signature is part of a request line: no blank, no control character, no fragment.
_SIGNATURE = re.compile(r"(?!.*#)[!-~]+")
# What a request asks for is never said by a signature.
_OURS = {
    "comp",
    "delimiter",
    "include",
    "marker",
    "maxresults",
    "prefix",
    "restype",
    "snapshot",
    "timeout",
    "versionid",
}
_SIGNED_SECONDS = 3600
# It decides what a signature is made of.
_SIGNED_VERSION = "2021-02-12"
# Signed anew early enough that clocks may differ and no request begins with a signature that is over.
_RENEW_SECONDS = 1800.0
_TOKEN_SPARE_SECONDS = 300
_HIDDEN = "(not shown)"


class TokenError(Exception):
    """
    No token to ask with. With `is_denied` whoever issues them refused, else nobody was there to ask.
    """

    def __init__(self, reason: str, *, is_denied: bool) -> None:
        super().__init__(reason)
        self.is_denied = is_denied


class Credential(Protocol):
    """
    What makes a request one of somebody who may. `is_bound` if it is good for one account only.

    Called from many threads at once.
    """

    is_bound: ClassVar[bool]

    def authorize(
        self, account: str, container: str, *, is_sealed: bool, renewed: bool
    ) -> tuple[str, Mapping[str, str]]:
        """
        What to add to the query and to the headers. `is_sealed` if the request goes over TLS; `renewed` if what was
        given before was refused. Raises `TokenError`.
        """

    def hint(self) -> str:
        """What to tell whom the service denies, if anything."""


@attrs.frozen
class Anonymous:
    """
    Nobody in particular, who may read public containers.
    """

    reason: str = (
        "no credentials were given, so set AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_SAS_TOKEN or AZURE_CLIENT_ID"
    )
    is_bound: ClassVar[bool] = False

    def authorize(
        self, account: str, container: str, *, is_sealed: bool, renewed: bool
    ) -> tuple[str, Mapping[str, str]]:
        return "", {}

    def hint(self) -> str:
        return self.reason


@attrs.frozen
class Signature:
    """
    A shared access signature (SAS) that somebody else made.
    """

    query: str = attrs.field(repr=False)
    is_bound: ClassVar[bool] = True

    def authorize(
        self, account: str, container: str, *, is_sealed: bool, renewed: bool
    ) -> tuple[str, Mapping[str, str]]:
        return self.query, {}

    def hint(self) -> str:
        try:
            end = datetime.fromisoformat(parse_qs(self.query)["se"][0])
        except (KeyError, ValueError):
            return ""
        end = end if end.tzinfo else end.replace(tzinfo=UTC)
        return f"the signature expired at {end:%Y-%m-%dT%H:%MZ}" if end < datetime.now(UTC) else ""


class AccountKey:
    """
    The key of an account, which is never sent: it makes signatures for one container each, to read and list, for an
    hour.
    """

    is_bound: ClassVar[bool] = True

    def __init__(self, key: str) -> None:
        self._key = key
        self._guard = threading.Lock()
        self._made: dict[tuple[str, str, bool], tuple[float, str]] = {}

    def authorize(
        self, account: str, container: str, *, is_sealed: bool, renewed: bool
    ) -> tuple[str, Mapping[str, str]]:
        place = (account, container, is_sealed)
        with self._guard:
            made_at, query = self._made.get(place, (0.0, ""))
            if not query or renewed or time.monotonic() - made_at > _RENEW_SECONDS:
                query = self._sign(account, container, is_sealed)
                self._made[place] = (time.monotonic(), query)
        return query, {}

    def _sign(self, account: str, container: str, is_sealed: bool) -> str:
        # What `generate_container_sas` makes, which takes half a CPU second and 33 MiB to be imported.
        end = f"{datetime.now(UTC) + timedelta(seconds=_SIGNED_SECONDS):%Y-%m-%dT%H:%M:%SZ}"
        protocol = "https" if is_sealed else ""
        lines = ["rl", "", end, f"/blob/{account}/{container}", "", "", protocol, _SIGNED_VERSION, "c", *[""] * 7]
        digest = hmac.digest(base64.b64decode(self._key), "\n".join(lines).encode(), "sha256")
        fields = {
            "sv": _SIGNED_VERSION,
            "sr": "c",
            "sp": "rl",
            "se": end,
            "spr": protocol,
            "sig": base64.b64encode(digest).decode(),
        }
        return urlencode({name: value for name, value in fields.items() if value})

    def hint(self) -> str:
        return ""


class Token:
    """
    Tokens of Microsoft Entra ID, kept until shortly before they expire.

    Args:
        credential: What gives them: an object with `get_token`, or None for one that is made when it is needed.
        arguments: Of `azure.identity.ClientSecretCredential` if there is a secret among them, else of
            `DefaultAzureCredential`.
    """

    is_bound: ClassVar[bool] = False

    def __init__(self, credential: Any = None, arguments: Mapping[str, str] | None = None) -> None:
        self._given = credential
        self._made: Any = None
        self._arguments = arguments or {}
        self._guard = threading.Lock()
        self._token = ""
        self._expires = 0.0

    def authorize(
        self, account: str, container: str, *, is_sealed: bool, renewed: bool
    ) -> tuple[str, Mapping[str, str]]:
        if not is_sealed:
            raise TokenError("tokens are sent over https only", is_denied=True)
        with self._guard:
            if renewed or time.time() > self._expires - _TOKEN_SPARE_SECONDS:
                self._token, self._expires = self._get()
            return "", {"Authorization": f"Bearer {self._token}"}

    def _get(self) -> tuple[str, float]:
        from azure.core.exceptions import AzureError, ClientAuthenticationError

        try:
            if self._given is None and self._made is None:
                self._made = self._make()
            token = (self._given or self._made).get_token(_SCOPE)
            return str(token.token), float(token.expires_on)
        except (AzureError, ValueError) as error:  # A ValueError is a tenant or an authority that cannot be one.
            reason = redact(str(error).strip().partition("\n")[0])
            is_denied = isinstance(error, ClientAuthenticationError | ValueError)
            # What the SDK chains to it may hold the whole request.
            raise TokenError(f"no token: {reason}", is_denied=is_denied) from None

    def _make(self) -> Any:
        from azure.identity import ClientSecretCredential, DefaultAzureCredential

        if "client_secret" in self._arguments:
            return ClientSecretCredential(**self._arguments)
        named = {"client_id": "managed_identity_client_id", "tenant_id": "workload_identity_tenant_id"}
        more = {named[name]: value for name, value in self._arguments.items()}
        if "client_id" in self._arguments:
            more["workload_identity_client_id"] = self._arguments["client_id"]
        return DefaultAzureCredential(**more)

    def hint(self) -> str:
        return ""

    def close(self) -> None:
        """
        Let go of idle connections. Whoever goes on gets new ones.
        """
        with self._guard:
            made, self._made = self._made, None
        if made is not None:
            made.close()


@attrs.frozen
class Login:
    """
    What is configured: who asks, for which account, and where that is reached.

    `account` is None if nothing says which; then what is given counts for the account that a URI names. `endpoint` is
    None if the account has its usual host.
    """

    account: str | None
    endpoint: Target | None
    credential: Credential

    @property
    def host(self) -> str | None:
        """The usual host of the account."""
        return None if self.account is None else f"{self.account}.blob.{_USUAL_SUFFIX}"

    def reach(self, host: str) -> tuple[Target, Credential]:
        """
        Where the account of a host is reached, and as whom. What belongs to one account is never shown to another.
        """
        account = host.partition(".")[0]
        if self.account is not None and self.account != account:
            is_other = self.credential.is_bound
            stranger = Anonymous(f"the credentials given are those of the account `{self.account}`")
            return Target("https", host, 443, ""), stranger if is_other else self.credential
        return self.endpoint or Target("https", host, 443, ""), self.credential


def find_login(options: Mapping[str, Any], environ: Mapping[str, str]) -> Login:
    """
    Decide who asks.

    Options win over the environment, and are not mixed with it, but for the name of the account. Among several the
    first
    counts: connection string, account key, signature, given credential, client id, KServe's access key, `anon=False`.

    Raises:
        SettingsError: An option is unknown, or a value means nothing.
        ImportError: The package that is needed is not there.
    """
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise SettingsError(
            "storage_options", ", ".join(unknown), f"write {', '.join(f'`{name}`' for name in OPTIONS)} or `check_md5`"
        )
    given = {name: value for name, value in options.items() if value not in (None, "")}
    found = {name: _look(environ, names) for name, names in _VARIABLES.items()}
    if any(name in given for name in _CREDENTIALS) or given.get("anon"):
        found = {"account_name": found["account_name"]}
    else:
        given.setdefault("anon", environ.get("AZURE_STORAGE_ANON", "true").lower() not in ("false", "0", "f"))
        found["last_key"] = environ.get(_LAST_KEY, "")
    settings = {**{name: value for name, value in found.items() if value}, **given}
    return _login(settings)


def _look(environ: Mapping[str, str], names: tuple[str, ...]) -> str:
    return next((environ[name] for name in names if environ.get(name)), "")


def _login(settings: Mapping[str, Any]) -> Login:
    account, endpoint = settings.get("account_name"), None
    if "account_host" in settings:
        endpoint = _endpoint("account_host", f"https://{settings['account_host']}")
        account = account or endpoint.host.partition(".")[0]
    if "connection_string" in settings:
        account, endpoint, credential = _read_connection_string(str(settings["connection_string"]))
    else:
        credential = _credential(settings)
    if account is not None and not _ACCOUNT.fullmatch(str(account)):
        raise SettingsError(
            "account_name", str(account), "the name of a storage account has 3 to 24 lower-case letters and digits"
        )
    return Login(account, endpoint, credential)


def _credential(settings: Mapping[str, Any]) -> Credential:
    if settings.get("anon") and not any(name in settings for name in (*_CREDENTIALS, "last_key")):
        return Anonymous()
    if "account_key" in settings:
        return _account_key("account_key", settings["account_key"])
    if "sas_token" in settings:
        return read_signature("sas_token", str(settings["sas_token"]))
    if "credential" in settings:
        return _given_credential(settings["credential"])
    arguments = {name: str(settings[name]) for name in ("tenant_id", "client_id", "client_secret") if name in settings}
    if "client_id" in arguments or "last_key" not in settings:
        if "client_secret" in arguments and len(arguments) < 3:
            raise SettingsError("client_secret", _HIDDEN, "give `client_id` and `tenant_id` with it")
        _need("azure.identity")
        return Token(arguments=arguments)
    return _account_key(_LAST_KEY, settings["last_key"])


def _given_credential(credential: Any) -> Credential:
    if isinstance(credential, str):
        return read_signature("credential", credential)
    if not callable(getattr(credential, "get_token", None)) or hasattr(credential, "__aenter__"):
        raise SettingsError(
            "credential",
            type(credential).__name__,
            "give a signature, or a credential of azure.identity (not of its aio)",
        )
    _need("azure.core")
    return Token(credential)


def _account_key(name: str, key: Any) -> AccountKey:
    try:
        base64.b64decode(key, validate=True)
    except (TypeError, ValueError):
        raise SettingsError(name, _HIDDEN, "an account's key is written in base64") from None
    return AccountKey(str(key))


def read_signature(name: str, text: str) -> Signature:
    """
    Take a signature as it is written, with or without its question mark.

    Raises:
        SettingsError: It is none, or says what to ask for.
    """
    query = text.strip().removeprefix("?")
    try:
        fields = parse_qs(query, keep_blank_values=True)
    except ValueError:
        fields = {}
    if "sig" not in fields or not _SIGNATURE.fullmatch(query):
        raise SettingsError(name, _HIDDEN, "a shared access signature looks like `sv=…&sp=rl&se=…&sig=…`")
    if said := sorted(_OURS & {field.lower() for field in fields}):
        raise SettingsError(name, _HIDDEN, f"leave `{said[0]}` out of the query; a version goes into `revision=`")
    return Signature(query)


def _read_connection_string(text: str) -> tuple[str, Target | None, Credential]:
    parts = {
        name.strip().lower(): value.strip()
        for name, _, value in (part.partition("=") for part in text.split(";") if part.strip())
    }
    account, endpoint = parts.get("accountname"), None
    scheme, suffix = parts.get("defaultendpointsprotocol", "https").lower(), parts.get("endpointsuffix", _USUAL_SUFFIX)
    if "blobendpoint" in parts:
        endpoint = _endpoint("connection_string", parts["blobendpoint"])
        # An emulator has the account in the path, Azure in the name of the host.
        account = account or endpoint.path.strip("/") or endpoint.host.partition(".")[0]
    elif account and (scheme, suffix) != ("https", _USUAL_SUFFIX):
        endpoint = _endpoint("connection_string", f"{scheme}://{account}.blob.{suffix}")
    if not account:
        raise SettingsError("connection_string", _HIDDEN, "it names neither `AccountName` nor `BlobEndpoint`")
    if "accountkey" in parts:
        return account, endpoint, _account_key("connection_string", parts["accountkey"])
    if "sharedaccesssignature" in parts:
        return account, endpoint, read_signature("connection_string", parts["sharedaccesssignature"])
    return account, endpoint, Anonymous()


def _endpoint(name: str, url: str) -> Target:
    try:
        if "?" in url or "@" in url:
            raise HTTPError("")
        return target_of(url)
    except HTTPError:
        raise SettingsError(
            name, _HIDDEN, "the endpoint of an account looks like `https://account.blob.core.windows.net`"
        ) from None


def _need(package: str) -> None:
    try:
        found = find_spec(package)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise ImportError(f"No module named '{package}'", name=package)
