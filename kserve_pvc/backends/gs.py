"""
`gs://`: Google Cloud Storage.

Listing and bytes come by plain HTTP requests of the JSON API, the bytes pinned by their generation and straight into
the caller's buffer. Plain settings need google-auth for tokens at most; anything else goes through gcsfs (`_gcsfs`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from kserve_pvc._source.contract import RemoteFile
from kserve_pvc._source.ref import ModelRef
from kserve_pvc.backends._google_json import (
    ENCODING,
    FIELDS,
    is_generation,
    parse_json,
    parse_listing,
    parse_object,
    read_error,
)
from kserve_pvc.backends._http.client import HTTPClient
from kserve_pvc.backends._http.target import Target
from kserve_pvc.backends._login.contract import Login, LoginError, Scope
from kserve_pvc.backends._login.google import KEPT_LOGINS, find_endpoint, find_login, hide
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
from kserve_pvc.errors import InvalidURIError, PolicyError, SettingsError, UnsafePathError

if TYPE_CHECKING:
    from kserve_pvc.backends._class_reader import ClassReader
    from kserve_pvc.backends._gcsfs import Gcsfs

# As many as the service lists at once.
_PAGE_OBJECTS = 1000
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,221}")
# Arguments of `gcsfs.GCSFileSystem` that plain requests take into account, and those that never change what is read.
_OPTIONS = {"endpoint_url", "project", "requester_pays", "token"}
_IGNORED_OPTIONS = {
    *("access", "block_size", "cache_timeout", "check_connection", "consistency", "default_location"),
    *("finalize_on_close", "requests_timeout", "secure_serialize", "timeout", "version_aware"),
}
_SESSION = "session_kwargs"
# Further arguments that gcsfs takes from its `**kwargs`.
_CLASS_OPTIONS = {
    *("memmove_max_workers", "retry_initial", "retry_maximum", "retry_multiplier", "retry_timeout", _SESSION),
}
_CERTIFICATE_SWITCHES = ("GOOGLE_API_USE_CLIENT_CERTIFICATE", "CLOUDSDK_CONTEXT_AWARE_USE_CLIENT_CERTIFICATE")
_CERTIFICATE_FILES = ("GOOGLE_API_CERTIFICATE_CONFIG", "CLOUDSDK_CONTEXT_AWARE_CERTIFICATE_CONFIG_FILE_PATH")


def _kept_logins(settings: Settings) -> Iterator[str]:
    """Logins that gcsfs keeps. Without a token they come after the default credentials, as in gcsfs."""
    token = settings.options.get("token")
    if isinstance(token, str) and token in KEPT_LOGINS:
        yield "token"
    elif token in (None, "") and _is_file("~/.gcs_tokens"):
        _, is_emulator = find_endpoint(settings.options, settings.environ)
        if not is_emulator and not settings.environ.get("GOOGLE_APPLICATION_CREDENTIALS"):
            yield "~/.gcs_tokens"


def _unnamed_payer(settings: Settings) -> Iterator[str]:
    if settings.options.get("requester_pays") is True and not _project(settings):
        yield "requester_pays"


def client_certificates(settings: Settings) -> Iterator[str]:
    """
    Find what makes google-auth present a client certificate.
    """
    for name in _CERTIFICATE_SWITCHES:
        if value := settings.environ.get(name, "").lower():
            yield from (name,) if value == "true" else ()
            return
    named = [name for name in _CERTIFICATE_FILES if settings.environ.get(name)]
    yield from named
    if not named and _is_file("~/.config/gcloud/certificate_config.json"):
        yield "~/.config/gcloud/certificate_config.json"


def _is_file(place: str) -> bool:
    # Not `Path.expanduser`, which fails where there is no home directory.
    return Path(os.path.expanduser(place)).is_file()  # noqa: PTH111


RULES: Sequence[Rule] = (
    Rule(configured_options, "is set by fsspec's configuration"),
    Rule(options_beyond(_OPTIONS | _IGNORED_OPTIONS), "is an argument that only gcsfs knows"),
    Rule(_kept_logins, "is a login that gcsfs keeps"),
    Rule(_unnamed_payer, "means the project of the credentials, which gcsfs finds"),
    Rule(client_certificates, "names a client certificate"),
)


class GSBackend(ObjectStore):
    """
    Models in a bucket of Google Cloud Storage: `gs://bucket/prefix` is a directory, `gs://bucket/object` a single file.

    A prefix never includes its siblings: `gs://b/m/model` means `m/model/…`, not `m/model-v2/…`. Empty objects are
    files; those whose names end in `/` and that hold nothing are markers of directories. `revision` is the generation
    of one object.

    Args:
        options: Arguments of `gcsfs.GCSFileSystem`. `token`, `endpoint_url`, `project` and `requester_pays` are served
            by plain requests, others through gcsfs. Without `token` the default credentials are used, and without those
            requests are anonymous.
        environ: Where the endpoint, proxies and certificates are looked up. google-auth and gcsfs read the environment
            of the process.
    """

    def __init__(self, options: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> None:
        if find_spec("google") is None or find_spec("google.auth") is None:
            raise ImportError("No module named 'google.auth'", name="google.auth")
        settings = read_settings("gs", options, environ)
        check_options("gs", settings.options, _OPTIONS | _IGNORED_OPTIONS | _CLASS_OPTIONS, _load_class)
        payer = _payer(settings)
        endpoint, is_emulator = find_endpoint(settings.options, settings.environ)
        reasons = find_reasons(RULES, settings)
        client = HTTPClient(environ=settings.environ)
        if reasons:
            gcsfs = _make_gcsfs(settings, endpoint, is_emulator=is_emulator)
            service = GoogleStorage(gcsfs.requests(client), endpoint, gcsfs.login, payer, gcsfs)
        else:
            login = find_login(settings.options.get("token"), endpoint, is_emulator=is_emulator)
            service = GoogleStorage(MetadataRequests(client, read_error), endpoint, login, payer)
        log_access("gs", service.way, reasons)
        super().__init__(service, service.requests)


class GoogleStorage:
    """
    What is peculiar to Google Cloud Storage; a `Service` of `_object_store`.

    Args:
        payer: The project that pays for requests: empty if it is that of the bucket, None if it is that of the
            credentials.
        gcsfs: The instance of the class, if not all settings are plain.
    """

    no_version = "no such version; the revision of a gs URI is the generation of one object"

    def __init__(
        self,
        requests: MetadataRequests,
        endpoint: Target,
        login: Login,
        payer: str | None,
        gcsfs: Gcsfs | None = None,
    ) -> None:
        self.requests = requests
        self.login = login
        self._endpoint = endpoint
        self._payer = payer
        self._gcsfs = gcsfs

    @property
    def way(self) -> str:
        """
        How buckets are reached: `direct`, `direct:gcsfs`, or `fsspec:gcsfs` through a session that is configured.
        """
        return "direct" if self._gcsfs is None else self._gcsfs.way

    @property
    def endpoint(self) -> Target:
        """
        The address of the service.
        """
        return self._endpoint if self._gcsfs is None else self._gcsfs.find_endpoint(self._endpoint)

    def place(self, ref: ModelRef) -> Place:
        bucket, _, name = ref.location.partition("/")
        if not bucket:
            raise InvalidURIError(ref.uri, "no bucket; write `gs://bucket/path`")
        if not _BUCKET.fullmatch(bucket):
            rule = "a bucket has letters, digits, `-`, `_` and `.` only; write `gs://bucket/path`"
            raise InvalidURIError(ref.uri, rule)
        if {".", ".."} & set(name.split("/")):
            # Servers and proxies remove such parts of a path, and then it is another object, or even another bucket.
            raise UnsafePathError(ref.location, "a path may not contain `.` or `..`")
        if ref.revision is not None and not is_generation(ref.revision):
            raise InvalidURIError(ref.uri, "the revision of a gs URI is a generation, which is a number")
        return Place(bucket, name)

    def uri(self, place: Place) -> str:
        return f"gs://{place.address}"

    def head(self, place: Place, revision: str | None) -> Object | None:
        query = {"fields": FIELDS} | ({"generation": revision} if revision else {})
        found = parse_object(parse_json(self._get(_object_path(place), query)))
        if found.name != place.name or (revision is not None and int(found.pin["generation"]) != int(revision)):
            raise RefusedError(f"requested `{place.name}`, but the response describes another object")
        return found

    def page(self, place: Place, token: str | None) -> tuple[Sequence[Object], str | None]:
        query = {"prefix": place.name, "maxResults": str(_PAGE_OBJECTS), "fields": f"nextPageToken,items({FIELDS})"}
        more = {} if token is None else {"pageToken": token}
        return parse_listing(self._get(f"/storage/v1/b/{quote(place.bucket, safe='')}/o", query | more))

    def read(self, place: Place, pin: Mapping[str, str], *, renewed: bool) -> Request:
        # A generation names the same bytes for ever: other bytes are never sent instead.
        query = {"alt": "media", "generation": pin["generation"]}
        target, headers = self._request("/download" + _object_path(place), query, renewed=renewed)
        # Without this header the service unpacks on the way, and neither ranges nor checksums fit.
        return target, {**headers, "Accept-Encoding": pin[ENCODING]} if ENCODING in pin else headers

    def reader(self, place: Place, file: RemoteFile, start: int, stop: int) -> ClassReader | None:
        if self._gcsfs is None or not self._gcsfs.is_session:
            return None
        if ENCODING in file.pin:
            reason = "it is stored with `Content-Encoding: gzip`, which is not read through a session of gcsfs"
            raise PolicyError(self.uri(place), f"{reason}; upload it without, or exclude it with `ignore_patterns`")
        return self._gcsfs.read(file, lambda is_renewed: self.read(place, file.pin, renewed=is_renewed), start, stop)

    def evidence(self, place: Place, file: RemoteFile) -> str | None:
        """
        Return the checksum of the listing: the service computes it when an object is uploaded, and keeps it with the
        generation.
        """
        return file.digest

    def refused(self, status: int, headers: Mapping[str, str], body: bytes) -> RefusedError:
        return read_error(status, headers, body)

    def kind(self, refusal: RefusedError) -> Kind:
        if isinstance(refusal, LoginError):
            return "denied" if refusal.is_denied else "other"
        if refusal.busy is not None:
            return "busy"
        if refusal.status in (401, 403):
            return "denied"
        if refusal.status == 404:
            return "missing"
        if refusal.status in (412, 416):
            return "changed"
        return "final" if 400 <= refusal.status < 500 and not refusal.is_transient else "other"

    def describe(self, refusal: RefusedError, place: Place) -> str:
        secret = self.login.secret()
        reason = hide(refusal.reason.replace(secret, "…") if secret else refusal.reason).rstrip(". ")
        hint = self.login.hint() if self.kind(refusal) == "denied" else ""
        return f"{reason}; {hint}" if hint else reason

    def access(self, place: Place) -> str:
        return self.way

    def close(self) -> None:
        self.login.close()
        if self._gcsfs is not None:
            self._gcsfs.close()

    def _get(self, path: str, query: Mapping[str, str]) -> bytes:
        return self.requests.send("GET", lambda: self._request(path, query, renewed=False), self._renew)[1]

    def _renew(self, refusal: RefusedError) -> bool:
        if isinstance(refusal, LoginError) or self.kind(refusal) != "denied":
            return False
        before = self.login.authorize(Scope(), renewed=False)
        return self.login.authorize(Scope(), renewed=True) != before

    def _request(self, path: str, query: Mapping[str, str], *, renewed: bool) -> Request:
        headers = self.login.authorize(Scope(), renewed=renewed).headers
        payer = self._payer
        if payer is None and self._gcsfs is not None:
            payer = self._gcsfs.project
        whole = {**query, "userProject": payer} if payer else query
        endpoint = self.endpoint
        place = endpoint.path.rstrip("/") + path
        return endpoint._replace(path=f"{place}?{urlencode(whole, quote_via=quote, safe='')}"), headers


def _load_class() -> Sequence[Callable[..., Any]]:
    from fsspec import get_filesystem_class

    return [get_filesystem_class("gs")]


def _make_gcsfs(settings: Settings, endpoint: Target, *, is_emulator: bool) -> Gcsfs:
    if find_spec("gcsfs") is None:
        raise ImportError("No module named 'gcsfs'", name="gcsfs")
    from kserve_pvc.backends._gcsfs import Gcsfs

    is_session = bool(settings.options.get(_SESSION)) or any(client_certificates(settings))
    return Gcsfs(settings.options, endpoint, is_emulator=is_emulator, is_session=is_session)


def _payer(settings: Settings) -> str | None:
    """The project that pays for requests: empty if it is that of the bucket, None if it is that of the credentials."""
    payer = settings.options.get("requester_pays")
    if not payer:
        return ""
    if payer is True:
        payer = _project(settings)
    if payer and not isinstance(payer, str):
        raise SettingsError("requester_pays", str(payer), "pass the name of the project that pays")
    return payer or None


def _project(settings: Settings) -> Any:
    return settings.options.get("project") or settings.environ.get("GCSFS_DEFAULT_PROJECT")


def _object_path(place: Place) -> str:
    return f"/storage/v1/b/{quote(place.bucket, safe='')}/o/{quote(place.name, safe='')}"
