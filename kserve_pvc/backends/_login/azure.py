"""
Credentials for Azure Blob Storage, and the address of the account: found in options and environment, and turned into a
query or a header for each request.

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
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlencode

import attrs

from kserve_pvc._source.redaction import redact
from kserve_pvc.backends._http.target import HTTPError, Target, target_of
from kserve_pvc.backends._login.contract import Anonymous, Authorization, Login, LoginError, Scope, describe_foreign
from kserve_pvc.errors import HIDDEN, SettingsError

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
# With any of these among the options, the credentials of the environment are ignored.
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
# KServe uses it if there is no client id.
_LAST_KEY = "AZURE_STORAGE_ACCESS_KEY"
_USUAL_SUFFIX = "core.windows.net"
_SCOPE = "https://storage.azure.com/.default"
_ACCOUNT = re.compile(r"[a-z0-9]{3,24}")
# A signature is part of a request line: no space, no control character, no fragment.
_SIGNATURE = re.compile(r"(?!.*#)[!-~]+")
# What a request reads is never set by a signature.
_REQUEST_PARAMETERS = {
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
# Signed again early enough that clocks may differ and no request begins with an expired signature.
_RENEW_SECONDS = 1800.0
_TOKEN_SPARE_SECONDS = 300
_NO_CREDENTIALS = (
    "no credentials are configured; set AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_SAS_TOKEN or AZURE_CLIENT_ID"
)


@attrs.frozen
class Signature(Login):
    """
    A shared access signature (SAS) that was configured.
    """

    query: str = attrs.field(repr=False)
    is_bound: ClassVar[bool] = True

    def authorize(self, scope: Scope, *, renewed: bool) -> Authorization:
        return Authorization(self.query, {})

    def hint(self) -> str:
        try:
            end = datetime.fromisoformat(parse_qs(self.query)["se"][0])
        except (KeyError, ValueError):
            return ""
        end = end if end.tzinfo else end.replace(tzinfo=UTC)
        return f"the signature expired at {end:%Y-%m-%dT%H:%MZ}" if end < datetime.now(UTC) else ""


class AccountKey(Login):
    """
    The key of an account, which is never sent: it makes signatures for one container each, to read and list, for an
    hour.
    """

    is_bound: ClassVar[bool] = True

    def __init__(self, key: str) -> None:
        self._key = key
        self._guard = threading.Lock()
        self._made: dict[Scope, tuple[float, str]] = {}

    def authorize(self, scope: Scope, *, renewed: bool) -> Authorization:
        with self._guard:
            made_at, query = self._made.get(scope, (0.0, ""))
            if not query or renewed or time.monotonic() - made_at > _RENEW_SECONDS:
                query = self._sign(scope)
                self._made[scope] = (time.monotonic(), query)
        return Authorization(query, {})

    def _sign(self, scope: Scope) -> str:
        # What `generate_container_sas` makes, which takes half a CPU second and 33 MiB to be imported.
        end = f"{datetime.now(UTC) + timedelta(seconds=_SIGNED_SECONDS):%Y-%m-%dT%H:%M:%SZ}"
        protocol = "https" if scope.is_encrypted else ""
        resource = f"/blob/{scope.account}/{scope.container}"
        lines = ["rl", "", end, resource, "", "", protocol, _SIGNED_VERSION, "c", *[""] * 7]
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


class Token(Login):
    """
    Tokens of Microsoft Entra ID, kept until shortly before they expire.

    Args:
        credential: Issues them: an object with `get_token`, or None for one that is made when it is needed.
        arguments: Of `azure.identity.ClientSecretCredential` if there is a secret among them, else of
            `DefaultAzureCredential`.
    """

    def __init__(self, credential: Any = None, arguments: Mapping[str, str] | None = None) -> None:
        self._given = credential
        self._made: Any = None
        self._arguments = arguments or {}
        self._guard = threading.Lock()
        self._token = ""
        self._expires = 0.0

    def authorize(self, scope: Scope, *, renewed: bool) -> Authorization:
        if not scope.is_encrypted:
            raise LoginError("tokens are sent over https only", is_denied=True)
        with self._guard:
            if renewed or time.time() > self._expires - _TOKEN_SPARE_SECONDS:
                self._token, self._expires = self._get()
            return Authorization("", {"Authorization": f"Bearer {self._token}"})

    def _get(self) -> tuple[str, float]:
        from azure.core.exceptions import AzureError, ClientAuthenticationError

        try:
            if self._given is None and self._made is None:
                self._made = self._make()
            token = (self._given or self._made).get_token(_SCOPE)
            return str(token.token), float(token.expires_on)
        except Exception as error:  # A tenant that is not valid, a certificate that cannot be read, and what not.
            reason = redact(describe_foreign(error))
            is_denied = not isinstance(error, AzureError) or isinstance(error, ClientAuthenticationError)
            # Not chained: the context may hold the whole request.
            raise LoginError(reason, is_denied=is_denied) from None

    def _make(self) -> Any:
        from azure.identity import ClientSecretCredential, DefaultAzureCredential

        if "client_secret" in self._arguments:
            return ClientSecretCredential(**self._arguments)
        named = {"client_id": "managed_identity_client_id", "tenant_id": "workload_identity_tenant_id"}
        more = {named[name]: value for name, value in self._arguments.items()}
        if "client_id" in self._arguments:
            more["workload_identity_client_id"] = self._arguments["client_id"]
        return DefaultAzureCredential(**more)

    def close(self) -> None:
        with self._guard:
            made, self._made = self._made, None
        if made is not None:
            made.close()


@attrs.frozen
class Account:
    """
    The storage account that is configured: its name, its address, and the login for it.

    `name` is None if none is configured; the login is then used for the account that a URI names. `endpoint` is None
    if the account has its usual host.
    """

    name: str | None
    endpoint: Target | None
    login: Login

    @property
    def host(self) -> str | None:
        """The usual host of the account."""
        return None if self.name is None else f"{self.name}.blob.{_USUAL_SUFFIX}"

    def reach(self, host: str) -> tuple[Target, Login]:
        """
        Return the address of the account with a host, and the login for it.

        Credentials of one account are never sent to another.
        """
        usual = Target("https", host, 443, "")
        if self.name in (None, host.partition(".")[0]):
            return self.endpoint or usual, self.login
        if self.login.is_bound:
            return usual, Anonymous(f"the configured credentials are those of the account `{self.name}`")
        return usual, self.login


def find_account(options: Mapping[str, Any], environ: Mapping[str, str]) -> Account:
    """
    Find the account, its address and its login. Sends no request.

    Options win over the environment, and are not mixed with it, except for the name of the account. Among several
    credentials the first counts: connection string, account key, signature, `credential`, client id, KServe's access
    key, `anon=False`.

    Raises:
        SettingsError: A value is not valid.
        ImportError: The package that is needed is not installed.
    """
    given = {name: options[name] for name in OPTIONS if options.get(name) not in (None, "")}
    found = {name: _look(environ, names) for name, names in _VARIABLES.items()}
    if any(name in given for name in _CREDENTIALS) or given.get("anon"):
        found = {"account_name": found["account_name"]}
    else:
        given.setdefault("anon", environ.get("AZURE_STORAGE_ANON", "true").lower() not in ("false", "0", "f"))
        found["last_key"] = environ.get(_LAST_KEY, "")
    settings = {**{name: value for name, value in found.items() if value}, **given}
    return _account(settings)


def _look(environ: Mapping[str, str], names: tuple[str, ...]) -> str:
    return next((environ[name] for name in names if environ.get(name)), "")


def _account(settings: Mapping[str, Any]) -> Account:
    name = settings.get("account_name")
    endpoint = None
    if "account_host" in settings:
        endpoint = find_endpoint("account_host", f"https://{settings['account_host']}")
        name = name or endpoint.host.partition(".")[0]
    if "connection_string" in settings:
        name, endpoint, login = _read_connection_string(str(settings["connection_string"]))
    else:
        login = _find_login(settings)
    if name is not None and not _ACCOUNT.fullmatch(str(name)):
        raise SettingsError(
            "account_name", str(name), "the name of a storage account has 3 to 24 lower-case letters and digits"
        )
    return Account(name, endpoint, login)


def _find_login(settings: Mapping[str, Any]) -> Login:
    if settings.get("anon") and not any(name in settings for name in (*_CREDENTIALS, "last_key")):
        return Anonymous(_NO_CREDENTIALS)
    if "account_key" in settings:
        return make_key("account_key", settings["account_key"])
    if "sas_token" in settings:
        return read_signature("sas_token", str(settings["sas_token"]))
    if "credential" in settings:
        return read_credential(settings["credential"])
    arguments = {name: str(settings[name]) for name in ("tenant_id", "client_id", "client_secret") if name in settings}
    if "client_id" in arguments or "last_key" not in settings:
        if "client_secret" in arguments and len(arguments) < 3:
            raise SettingsError("client_secret", HIDDEN, "pass `client_id` and `tenant_id` with it")
        _need("azure.identity")
        return Token(arguments=arguments)
    return make_key(_LAST_KEY, settings["last_key"])


def read_credential(credential: Any) -> Login:
    """
    Take a credential as `azure.storage.blob` takes it, unless it is asynchronous.

    Raises:
        SettingsError: It is not a signature, a key or a credential of `azure.identity`.
    """
    if isinstance(credential, str):
        is_signature = "sig=" in credential
        return read_signature("credential", credential) if is_signature else make_key("credential", credential)
    if not callable(getattr(credential, "get_token", None)):
        raise SettingsError(
            "credential", type(credential).__name__, "pass a signature, a key, or a credential of `azure.identity`"
        )
    _need("azure.core")
    return Token(credential)


def make_key(name: str, key: Any) -> Login:
    """
    Take the key of an account, which the setting `name` holds; or a signature, which Azure's SDK takes there too, and
    which KServe's documentation puts into AZURE_STORAGE_ACCESS_KEY.

    Raises:
        SettingsError: It is neither base64 nor a signature.
    """
    key = key.strip() if isinstance(key, str) else key
    if isinstance(key, str) and "sig=" in key:
        return read_signature(name, key)
    try:
        base64.b64decode(key, validate=True)
    except (TypeError, ValueError):
        raise SettingsError(name, HIDDEN, "the key of an account is base64") from None
    return AccountKey(str(key))


def read_signature(name: str, text: str) -> Signature:
    """
    Take a signature with or without its question mark.

    Raises:
        SettingsError: It is not a signature, or has parameters of a request.
    """
    query = text.strip().removeprefix("?")
    try:
        fields = parse_qs(query, keep_blank_values=True)
    except ValueError:
        fields = {}
    if "sig" not in fields or not _SIGNATURE.fullmatch(query):
        raise SettingsError(name, HIDDEN, "a shared access signature looks like `sv=…&sp=rl&se=…&sig=…`")
    if found := sorted(_REQUEST_PARAMETERS & {field.lower() for field in fields}):
        raise SettingsError(name, HIDDEN, f"leave `{found[0]}` out of the query; a version goes into `revision=`")
    return Signature(query)


def _read_connection_string(text: str) -> tuple[str, Target | None, Login]:
    parts = {
        name.strip().lower(): value.strip()
        for name, _, value in (part.partition("=") for part in text.split(";") if part.strip())
    }
    account = parts.get("accountname")
    endpoint = None
    scheme = parts.get("defaultendpointsprotocol", "https").lower()
    suffix = parts.get("endpointsuffix", _USUAL_SUFFIX)
    if "blobendpoint" in parts:
        endpoint = find_endpoint("connection_string", parts["blobendpoint"])
        # An emulator has the account in the path, Azure in the name of the host.
        account = account or endpoint.path.strip("/") or endpoint.host.partition(".")[0]
    elif account and (scheme, suffix) != ("https", _USUAL_SUFFIX):
        endpoint = find_endpoint("connection_string", f"{scheme}://{account}.blob.{suffix}")
    if not account:
        raise SettingsError("connection_string", HIDDEN, "it has neither `AccountName` nor `BlobEndpoint`")
    if "accountkey" in parts:
        return account, endpoint, make_key("connection_string", parts["accountkey"])
    if "sharedaccesssignature" in parts:
        return account, endpoint, read_signature("connection_string", parts["sharedaccesssignature"])
    return account, endpoint, Anonymous(_NO_CREDENTIALS)


def find_endpoint(name: str, url: str) -> Target:
    """
    Take the address of an account apart, which the setting `name` holds.

    Raises:
        SettingsError: It is not a URL, or has a user or a query.
    """
    try:
        if "?" in url or "@" in url:
            raise HTTPError("")
        return target_of(url)
    except HTTPError:
        raise SettingsError(
            name, HIDDEN, "the endpoint of an account looks like `https://account.blob.core.windows.net`"
        ) from None


def _need(package: str) -> None:
    try:
        found = find_spec(package)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise ImportError(f"No module named '{package}'", name=package)
