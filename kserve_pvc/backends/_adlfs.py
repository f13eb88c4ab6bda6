"""
Azure Blob Storage through adlfs, for everything that only adlfs knows: fsspec's configuration, credentials that are
awaited, arguments of `DefaultAzureCredential`, the secondary location, the emulator's own name.

adlfs and Azure's SDK find account, address and credentials. Requests are our own wherever a query or a header is enough
to authorize them. What the SDK alone can sign is listed and read through its client, which adlfs holds.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

import attrs
from azure.core import MatchConditions
from azure.core.exceptions import AzureError, ClientAuthenticationError, HttpResponseError, ServiceRequestError
from fsspec import get_filesystem_class

from kserve_pvc._source.contract import RemoteFile
from kserve_pvc._source.redaction import redact
from kserve_pvc.backends._azure_xml import is_marker, make_object
from kserve_pvc.backends._class_reader import ClassReader, Future, Piece, run
from kserve_pvc.backends._http.target import HTTPError
from kserve_pvc.backends._login.azure import Account, Signature, Token, find_endpoint, make_key, read_signature
from kserve_pvc.backends._login.contract import Anonymous, Authorization, Login, Scope
from kserve_pvc.backends._object_store import MetadataRequests, Object, Place
from kserve_pvc.backends._ranges import RefusedError, request_with_retries, retry_after
from kserve_pvc.backends._validators import http_date
from kserve_pvc.errors import HIDDEN, SettingsError

_OURS = ("asynchronous", "loop", "skip_instance_cache")
# The arguments that name an account, and the variables that adlfs reads without them.
_NAMES = {"account_name": "AZURE_STORAGE_ACCOUNT_NAME", "connection_string": "AZURE_STORAGE_CONNECTION_STRING"}
_TOKEN_SECONDS = 60.0
_CONNECT_SECONDS = 5
_TIMEOUTS = ("connection_timeout", "read_timeout", "timeout")

_T = TypeVar("_T")


class Adlfs:
    """
    Instances of `adlfs.AzureBlobFileSystem`, made when they are first needed: one, or one for each account that a URI
    names where none is configured.

    Args:
        options: Its arguments.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = {name: value for name, value in options.items() if name not in _OURS}
        given = {name: options[name] for name in _TIMEOUTS if options.get(name) is not None}
        # Retries are ours: the SDK by itself tries for a minute.
        self._timeouts = {"connection_timeout": _CONNECT_SECONDS, **given, "retry_total": 0}
        self._guard = threading.Lock()
        self._made: dict[str | None, _Instance] = {}

    def account(self, host: str | None) -> Account | None:
        """
        Return the configured account, or else that of a host; None if there is neither.

        Raises:
            SettingsError: adlfs or Azure's SDK refuses the arguments.
        """
        instance = self._instance(host)
        return None if instance is None else instance.account

    def is_opaque(self, host: str) -> bool:
        """
        Whether the credentials for a host can be used by the SDK only.
        """
        instance = self._instance(host)
        return instance is not None and instance.is_opaque and instance.account.name == host.partition(".")[0]

    def head(self, place: Place, version: str | None, patience: MetadataRequests) -> Object | None:
        """
        Request one blob; None if it stands for a directory.
        """
        client, container = self._client(place)

        async def properties() -> Any:
            async with client.service_client.get_blob_client(container, place.name) as blob:
                return await blob.get_blob_properties(version_id=version, **self._timeouts)

        found = _call(client.loop, properties, patience)
        if version is not None and found.version_id != version:
            raise RefusedError("response is for another version", status=404)
        described = _describe(found, version)
        return None if described.is_directory else described

    def page(
        self, place: Place, token: str | None, size: int, patience: MetadataRequests
    ) -> tuple[Sequence[Object], str | None]:
        """
        Request a page of what is below a prefix, and return the marker of the next one.
        """
        client, container = self._client(place)

        async def page() -> tuple[list[Any], str | None]:
            async with client.service_client.get_container_client(container) as listed:
                pages: Any = listed.list_blobs(
                    name_starts_with=place.name, include=["metadata"], results_per_page=size, **self._timeouts
                ).by_page(token)
                found = [blob async for blob in await anext(pages)]
                return found, pages.continuation_token

        blobs, following = _call(client.loop, page, patience)
        return [_describe(blob, None) for blob in blobs], following or None

    def read(self, place: Place, file: RemoteFile, start: int, stop: int) -> ClassReader:
        """
        Read a range, piece by piece; the service refuses content other than the pinned.
        """
        client, container = self._client(place)

        async def piece(first: int, last: int) -> Piece:
            with _translated():
                async with client.service_client.get_blob_client(container, place.name) as blob:
                    stream = await blob.download_blob(
                        offset=first,
                        length=last - first,
                        **_conditions(file.pin),
                        version_id=file.pin.get("versionid"),
                        max_concurrency=1,
                        **self._timeouts,
                    )
                    data: bytes = await stream.readall()
            if len(data) != last - first:
                raise HTTPError(f"requested {last - first} bytes and received {len(data)}")
            return data

        def fetch(first: int, last: int, is_renewed: bool) -> Future[Piece]:
            del is_renewed  # The SDK renews its credentials itself.
            return asyncio.run_coroutine_threadsafe(piece(first, last), client.loop)

        return ClassReader(fetch, start, stop)

    def _client(self, place: Place) -> tuple[Any, str]:
        host, _, container = place.bucket.partition("/")
        instance = self._instance(host)
        assert instance is not None  # The host names an account.
        return instance.fs, container

    def _instance(self, host: str | None) -> _Instance | None:
        # adlfs itself reads the environment of the process.
        is_named = any(self._options.get(option) or os.environ.get(name) for option, name in _NAMES.items())
        account = None if host is None or is_named else host.partition(".")[0]
        if account is None and not is_named:
            return None
        with self._guard:
            if account not in self._made:
                self._made[account] = _make(self._options if is_named else {**self._options, "account_name": account})
            return self._made[account]


@attrs.frozen
class _Instance:
    """
    One file system of adlfs, and the account that it reaches.
    """

    fs: Any
    account: Account
    is_opaque: bool

    @classmethod
    def of(cls, fs: Any) -> _Instance:
        client = fs.service_client
        address = urlsplit(client.url)
        endpoint = find_endpoint("account_host", f"{address.scheme}://{address.netloc}{address.path}")
        login = _find_login(fs, client.credential, address.query)
        hidden = Anonymous("the credentials can be used through Azure's SDK only")
        return cls(fs, Account(client.account_name or fs.account_name, endpoint, login or hidden), login is None)


def _make(options: Mapping[str, Any]) -> _Instance:
    try:
        return _Instance.of(get_filesystem_class("abfs")(**options, skip_instance_cache=True))
    except (TypeError, ValueError) as error:
        raise SettingsError("storage_options", HIDDEN, f"adlfs refuses it: {_shown(error)}") from None


def _find_login(fs: Any, credential: Any, query: str) -> Login | None:
    """Turn what the SDK authorizes requests with into a login; None if it is of a kind that is not known here."""
    if credential is None:
        return read_signature("sas_token", query) if "sig=" in query else Anonymous("adlfs found no credentials")
    if callable(getattr(credential, "get_token", None)):
        return Token(getattr(fs, "sync_credential", None) or _Awaited(fs.loop, credential))
    if isinstance(getattr(credential, "signature", None), str):
        return _RotatedSignature(credential)
    if isinstance(getattr(credential, "account_key", None), str):
        return make_key("account_key", credential.account_key)
    return None


@attrs.frozen
class _Awaited:
    """
    A credential of `azure.identity.aio`, whose tokens are awaited on the event loop of the file system.
    """

    loop: asyncio.AbstractEventLoop
    credential: Any

    def get_token(self, *scopes: str) -> Any:
        token = self.credential.get_token(*scopes)
        if not inspect.isawaitable(token):
            return token
        try:
            return run(self.loop, _await(token), _TOKEN_SECONDS)
        except HTTPError as error:
            raise ServiceRequestError(str(error)) from None


async def _await(token: Awaitable[Any]) -> Any:
    return await token


@attrs.frozen
class _RotatedSignature(Login):
    """
    An `AzureSasCredential`, whose signature the caller may replace at any time.
    """

    credential: Any
    is_bound = True

    def authorize(self, scope: Scope, *, renewed: bool) -> Authorization:
        return self._current().authorize(scope, renewed=renewed)

    def hint(self) -> str:
        return self._current().hint()

    def _current(self) -> Signature:
        return read_signature("credential", self.credential.signature)


def _conditions(pin: Mapping[str, str]) -> Mapping[str, Any]:
    """Write a pin as arguments of the SDK."""
    if "If-Match" in pin:
        return {"etag": pin["If-Match"], "match_condition": MatchConditions.IfNotModified}
    date = pin.get("If-Unmodified-Since")
    return {"if_unmodified_since": parsedate_to_datetime(date)} if date else {}


def _describe(blob: Any, version: str | None) -> Object:
    metadata = {name.lower(): value for name, value in (blob.metadata or {}).items()}
    is_directory = is_marker(None, metadata.get("hdi_isfolder")) or (not blob.size and blob.name.endswith("/"))
    md5 = blob.content_settings.content_md5
    return make_object(
        blob.name,
        blob.size,
        blob.etag,
        date=http_date(blob.last_modified),
        md5=bytes(md5).hex() if md5 and len(md5) == 16 else None,
        version=version,
        is_directory=is_directory,
        tier=getattr(blob.blob_tier, "value", blob.blob_tier),
    )


def _call(
    loop: asyncio.AbstractEventLoop, make: Callable[[], Coroutine[Any, Any, _T]], patience: MetadataRequests
) -> _T:
    """Run a small request of the SDK, and retry it while the service is busy or the network fails."""

    def attempt() -> _T:
        with _translated():
            return run(loop, make(), 2 * patience.client.response_seconds)

    return request_with_retries(attempt, patience.retry_seconds)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except HttpResponseError as error:
        status = error.status_code or (401 if isinstance(error, ClientAuthenticationError) else 0)
        code = getattr(error, "error_code", None) or status
        code = str(getattr(code, "value", code))
        response: Any = error.response
        headers = {name.lower(): value for name, value in (response.headers if response else {}).items()}
        busy = retry_after(headers) if status in (429, 503) else None
        raise RefusedError(f"{code}: {_shown(error)}", status=status, code=code, busy=busy) from None
    except AzureError as error:
        raise HTTPError(_shown(error)) from None


def _shown(error: Exception) -> str:
    # After the first line there are only numbers of the request. Not chained: the context may hold the whole request.
    return redact(str(error).strip().partition("\n")[0]).rstrip(". ")
