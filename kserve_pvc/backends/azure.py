"""
Azure Blob Storage: `az://`, `abfs://`, `abfss://`, and the `https` addresses of accounts that KServe knows.

Listing and bytes come by plain HTTP requests, the bytes pinned with If-Match and straight into the caller's buffer.
Plain settings need Azure's SDK for tokens at most; anything else goes through adlfs (`_adlfs`). With an account's key a
container is signed for and not a range, so that one signature is enough for all its blobs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

import attrs

from kserve_pvc._source.contract import RemoteFile
from kserve_pvc._source.redaction import redact
from kserve_pvc._source.ref import ModelRef
from kserve_pvc.backends._azure_xml import parse_listing, parse_properties, read_error
from kserve_pvc.backends._http.client import HTTPClient
from kserve_pvc.backends._http.target import Target
from kserve_pvc.backends._login.azure import OPTIONS, Account, Signature, find_account, read_signature
from kserve_pvc.backends._login.contract import Login, LoginError, Scope
from kserve_pvc.backends._object_store import Kind, MetadataRequests, Object, ObjectStore, Place, Request
from kserve_pvc.backends._options import (
    Rule,
    Settings,
    check_options,
    configured_options,
    find_reasons,
    log_access,
    options_beyond,
    read_settings,
)
from kserve_pvc.backends._ranges import RefusedError
from kserve_pvc.backends._refusals import head_of_range, hides_reason
from kserve_pvc.errors import InvalidURIError, UnsafePathError

if TYPE_CHECKING:
    from kserve_pvc.backends._adlfs import Adlfs
    from kserve_pvc.backends._class_reader import ClassReader

# The first version that encodes names which XML cannot hold, and knows versions of blobs.
_VERSION = "2021-02-12"
_DENIED = {"AccountIsDisabled", "KeyBasedAuthenticationNotPermitted", "PublicAccessNotPermitted"}
_MISSING = {"ContainerBeingDeleted"}
_CHANGED = {"ConditionNotMet", "InvalidRange"}
# So many with the longest names and metadata still fit a page.
_PAGE_BLOBS = 1000
_NO_HEADERS: Mapping[str, str] = {}
_HOST = re.compile(r"[a-z0-9]{3,24}\.(?:blob\.core\.windows\.net|z[0-9]{1,2}\.blob\.storage\.azure\.net)")
_CONTAINER = re.compile(r"[$a-z0-9][a-z0-9-]{2,62}")
_SECRET = re.compile(r"(sig=|Bearer )[^&\s\"'<>]+", re.IGNORECASE)
_EXAMPLES = {
    "az": "az://container/path",
    "https": "https://account.blob.core.windows.net/container/path",
    "abfs": "abfs://container@account.dfs.core.windows.net/path",
    "abfss": "abfss://container@account.dfs.core.windows.net/path",
}
# An option of ours.
_CHECK_MD5 = "check_md5"
# Arguments of `adlfs.AzureBlobFileSystem` that never change what is read.
_IGNORED_OPTIONS = {
    *("assume_container_exists", "blocksize", "connection_timeout", "default_cache_type", "default_fill_cache"),
    *("max_concurrency", "read_timeout", "socket_timeout", "timeout", "version_aware"),
}
# Arguments of `DefaultAzureCredential`, to which adlfs passes on what it does not know itself.
_CREDENTIAL_OPTIONS = {
    *("additionally_allowed_tenants", "authority", "broker_client_id", "broker_tenant_id"),
    *("disable_instance_discovery", "exclude_broker_credential", "exclude_cli_credential"),
    *("exclude_developer_cli_credential", "exclude_environment_credential", "exclude_interactive_browser_credential"),
    *("exclude_managed_identity_credential", "exclude_powershell_credential", "exclude_shared_token_cache_credential"),
    *("exclude_visual_studio_code_credential", "exclude_workload_identity_credential"),
    *("interactive_browser_client_id", "interactive_browser_tenant_id", "managed_identity_client_id"),
    *("process_timeout", "require_envvar", "shared_cache_tenant_id", "shared_cache_username"),
    *("visual_studio_code_tenant_id", "workload_identity_client_id", "workload_identity_tenant_id"),
}
_PLAIN_OPTIONS = {*OPTIONS, *_IGNORED_OPTIONS, _CHECK_MD5}


def _foreign_credential(settings: Settings) -> Iterator[str]:
    """A credential that is not a string and has no `get_token` to call, or one that has to be awaited."""
    credential = settings.options.get("credential")
    if isinstance(credential, str) or credential is None:
        return
    if not callable(getattr(credential, "get_token", None)) or hasattr(credential, "__aenter__"):
        yield "credential"


def _development_storage(settings: Settings) -> Iterator[str]:
    for name, where in (("connection_string", settings.options), (_CONNECTION_STRING, settings.environ)):
        if "usedevelopmentstorage=" in str(where.get(name) or "").lower():
            yield name


_CONNECTION_STRING = "AZURE_STORAGE_CONNECTION_STRING"
RULES: Sequence[Rule] = (
    Rule(configured_options, "is set by fsspec's configuration"),
    Rule(options_beyond(_PLAIN_OPTIONS), "is an argument that only adlfs knows"),
    Rule(_foreign_credential, "is a credential that Azure's SDK awaits or unpacks"),
    Rule(_development_storage, "names the emulator, whose address Azure's SDK knows"),
)


class AzureBackend(ObjectStore):
    """
    Models in a container of a storage account: `az://container/prefix` is a directory, `az://container/blob` a single
    file.

    A prefix never includes its siblings: `az://c/m/model` means `m/model/…`, not `m/model-v2/…`. Empty blobs are files;
    blobs that stand for directories are left out. `revision` is the version id of one blob.

    Args:
        options: Arguments of `adlfs.AzureBlobFileSystem`. Those that name credentials and account are served by plain
            requests, others through adlfs. Without them the environment is read, by the names of adlfs, of Azure's SDK
            and of KServe. One more of our own: `check_md5=False`, for blobs whose Content-MD5 is wrong.
        environ: What stands for the environment of the process, which adlfs and Azure's SDK read.
    """

    def __init__(self, options: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> None:
        settings = read_settings("az", options, environ)
        check_options("az", settings.options, _PLAIN_OPTIONS | _CREDENTIAL_OPTIONS, _load_class)
        reasons = find_reasons(RULES, settings)
        requests = MetadataRequests(HTTPClient(environ=settings.environ), read_error)
        checks_md5 = bool(settings.options.get(_CHECK_MD5, True))
        if reasons:
            service = AzureStorage(requests, None, _make_adlfs(settings), checks_md5=checks_md5)
        else:
            account = find_account(settings.options, settings.environ)
            service = AzureStorage(requests, account, None, checks_md5=checks_md5)
        log_access("az", "direct" if not reasons else "adlfs", reasons)
        super().__init__(service, requests, bucket_parts=2)


class AzureStorage:
    """
    What is peculiar to Azure Blob Storage; a `Service` of `_object_store`. Buckets are `host/container`.

    Args:
        account: The account of plain settings, or None if adlfs knows it.
    """

    no_version = (
        "no such version; the revision of an Azure URI is the version id of one blob, in an account that keeps versions"
    )

    def __init__(
        self, requests: MetadataRequests, account: Account | None, adlfs: Adlfs | None, *, checks_md5: bool
    ) -> None:
        self.requests = requests
        self.account = account
        self._adlfs = adlfs
        self._checks_md5 = checks_md5
        # Signatures that came with URIs, by address. Replaced as a whole, since several threads read it.
        self._signatures: Mapping[str, Signature] = {}

    def place(self, ref: ModelRef) -> Place:
        authority, _, name = ref.location.partition("/")
        container, _, host = authority.partition("@")
        if ref.scheme == "https":
            host = authority
            container, _, name = name.partition("/")
        # What is a file system at one host is a container at the other.
        host = host.replace(".dfs.", ".blob.", 1) or self._usual_host() or ""
        example = _EXAMPLES.get(ref.scheme, _EXAMPLES["az"])
        if not host:
            hint = f"set AZURE_STORAGE_ACCOUNT_NAME, or write `{_EXAMPLES['abfss']}`"
            raise InvalidURIError(ref.uri, f"no account; {hint}")
        if not _HOST.fullmatch(host):
            raise InvalidURIError(ref.uri, f"its host is not a storage account; write `{example}`")
        if not _CONTAINER.fullmatch(container):
            raise InvalidURIError(ref.uri, f"no container; write `{example}`")
        if {".", ".."} & set(name.split("/")):
            # Servers and proxies remove such parts, and then it is another blob, or even another container.
            raise UnsafePathError(ref.location, "a path may not contain `.` or `..`")
        place = Place(f"{host}/{container}", name)
        self._remember(place, ref)
        return place

    def _usual_host(self) -> str | None:
        account = self.account if self._adlfs is None else self._adlfs.account(None)
        return None if account is None else account.host

    def _remember(self, place: Place, ref: ModelRef) -> None:
        others = {address: signature for address, signature in self._signatures.items() if address != place.address}
        query = getattr(ref, "query", None)
        self._signatures = {**others, place.address: read_signature("the query of the URI", query)} if query else others

    def uri(self, place: Place) -> str:
        return f"az://{place.bucket.partition('/')[2]}/{place.name}"

    def head(self, place: Place, revision: str | None) -> Object | None:
        try:
            if (adlfs := self._class_for(place)) is not None:
                return self._checked(adlfs.head(place, revision, self.requests))
            headers = self._head(place, {"versionid": revision} if revision else {})
        except RefusedError as refusal:
            if revision is not None and refusal.status == 400:
                # A version id that is not one.
                raise RefusedError(refusal.reason, status=404, code=refusal.code) from None
            raise
        if revision is not None and headers.get("x-ms-version-id") != revision:
            raise RefusedError("response is for another version", status=404)
        found = parse_properties(place.name, headers, revision)
        return None if found.is_directory else self._checked(found)

    def page(self, place: Place, token: str | None) -> tuple[Sequence[Object], str | None]:
        if (adlfs := self._class_for(place)) is not None:
            found, following = adlfs.page(place, token, _PAGE_BLOBS, self.requests)
        else:
            query = {"restype": "container", "comp": "list", "include": "metadata", "prefix": place.name}
            more = {"maxresults": str(_PAGE_BLOBS)} | ({} if token is None else {"marker": token})
            found, following = parse_listing(self._send("GET", place, query | more)[1])
        return (found if self._checks_md5 else [attrs.evolve(blob, digest=None) for blob in found]), following

    def _checked(self, found: Object | None) -> Object | None:
        return found if found is None or self._checks_md5 else attrs.evolve(found, digest=None)

    def read(self, place: Place, pin: Mapping[str, str], *, renewed: bool) -> Request:
        query = {"versionid": pin["versionid"]} if "versionid" in pin else {}
        target, headers = self._request(place, query, renewed=renewed)
        conditions = {name: value for name, value in pin.items() if name != "versionid"}
        return target, {**headers, **conditions}

    def reader(self, place: Place, file: RemoteFile, start: int, stop: int) -> ClassReader | None:
        adlfs = self._class_for(place)
        return None if adlfs is None else adlfs.read(place, file, start, stop)

    def evidence(self, place: Place, file: RemoteFile) -> str | None:
        return file.digest

    def refused(self, status: int, headers: Mapping[str, str], body: bytes) -> RefusedError:
        return read_error(status, headers, body)

    def kind(self, refusal: RefusedError) -> Kind:
        if isinstance(refusal, LoginError):
            return "denied" if refusal.is_denied else "other"
        if refusal.status in (401, 403) or refusal.code in _DENIED:
            return "denied"
        if refusal.status == 404 or refusal.code in _MISSING:
            return "missing"
        if refusal.status in (412, 416) or refusal.code in _CHANGED:
            return "changed"
        if refusal.busy is not None:
            return "busy"
        return "final" if 400 <= refusal.status < 500 and not refusal.is_transient else "other"

    def describe(self, refusal: RefusedError, place: Place) -> str:
        reason = _SECRET.sub(r"\1…", redact(refusal.reason)).rstrip(". ")
        # Without access, Azure shows a private container as one that does not exist.
        is_hidden = self.kind(refusal) in ("denied", "missing") and not isinstance(refusal, LoginError)
        hint = self._reach(place)[1].hint() if is_hidden else ""
        return f"{reason}; {hint}" if hint else reason

    def access(self, place: Place) -> str:
        if self._adlfs is None:
            return "direct"
        return "direct:adlfs" if self._class_for(place) is None else "fsspec:adlfs"

    def close(self) -> None:
        if self.account is not None:
            self.account.login.close()

    def _class_for(self, place: Place) -> Adlfs | None:
        """The instance of adlfs, if its credentials cannot authorize requests of our own for a place."""
        if self._adlfs is None or self._signature(place) is not None:
            return None
        return self._adlfs if self._adlfs.is_opaque(place.bucket.partition("/")[0]) else None

    def _signature(self, place: Place) -> Signature | None:
        """A signature that came with a URI: it is used for everything below that."""
        given = [a for a in self._signatures if f"{place.address}/".startswith(f"{a.rstrip('/')}/")]
        return self._signatures[max(given, key=len)] if given else None

    def _reach(self, place: Place) -> tuple[Target, Login]:
        host = place.bucket.partition("/")[0]
        account = self.account if self._adlfs is None else self._adlfs.account(host)
        assert account is not None  # adlfs is given the account of the host, if none is configured.
        endpoint, login = account.reach(host)
        return endpoint, self._signature(place) or login

    def _request(self, place: Place, query: Mapping[str, str], *, renewed: bool = False) -> Request:
        endpoint, login = self._reach(place)
        host, _, container = place.bucket.partition("/")
        scope = Scope(host.partition(".")[0], container, endpoint.scheme == "https")
        signed, headers = login.authorize(scope, renewed=renewed)
        name = "" if "comp" in query else f"/{quote(place.name, safe='/~')}"
        whole = "&".join(part for part in (urlencode(query, quote_via=quote), signed) if part)
        path = f"{endpoint.path.rstrip('/')}/{container}{name}"
        return endpoint._replace(path=f"{path}?{whole}" if whole else path), {"x-ms-version": _VERSION, **headers}

    def _head(self, place: Place, query: Mapping[str, str]) -> Mapping[str, str]:
        try:
            return self._send("HEAD", place, query)[0]
        except RefusedError as refusal:
            if not hides_reason(refusal.status, refusal.code) or isinstance(refusal, LoginError):
                raise
        found = head_of_range(self._send("GET", place, query, {"Range": "bytes=0-0"})[0])
        whole = {"content-md5": found.get("x-ms-blob-content-md5", "")}
        return {**found, **whole}

    def _send(
        self, method: str, place: Place, query: Mapping[str, str], more: Mapping[str, str] = _NO_HEADERS
    ) -> tuple[Mapping[str, str], bytes]:
        def make() -> Request:
            target, headers = self._request(place, query)
            return target, {**headers, **more}

        return self.requests.send(method, make, lambda refusal: False)


def _load_class() -> Sequence[Callable[..., Any]]:
    from fsspec import get_filesystem_class

    return [get_filesystem_class("abfs")]


def _make_adlfs(settings: Settings) -> Adlfs:
    if find_spec("adlfs") is None:
        raise ImportError("No module named 'adlfs'", name="adlfs")
    from kserve_pvc.backends._adlfs import Adlfs

    return Adlfs({name: value for name, value in settings.options.items() if name != _CHECK_MD5})
