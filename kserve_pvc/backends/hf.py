"""
`hf://`: models on the Hugging Face Hub, or on a server with its interface.

A revision is turned into a commit first, and every later request names that commit. Names, sizes and digests come from
the commit's tree: the SHA-256 of what is in large file storage, the id of the git blob for all else, so that every byte
is compared with one of the two. Bytes come by plain HTTP ranges from wherever the hub sends us, and the token goes to
the hub alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any
from urllib.parse import quote, urlencode

from kserve_pvc._format.json_size import check_size
from kserve_pvc._format.records import FileEntry
from kserve_pvc._source.contract import Backend, Checksum, RemoteFile, Resolved, order_listing
from kserve_pvc._source.ref import ModelRef
from kserve_pvc.backends._addresses import make_address_check
from kserve_pvc.backends._hf_addresses import ADDRESS_SECONDS, Addresses, lifetime
from kserve_pvc.backends._hf_names import HubLocation, is_repository, parse_location, repository_and_path
from kserve_pvc.backends._hf_replies import find_next_page, not_a_hub, read_refusal_of_hub
from kserve_pvc.backends._hf_settings import find_endpoint, find_token, is_true
from kserve_pvc.backends._http.client import HTTPClient
from kserve_pvc.backends._http.target import HTTPError, Target
from kserve_pvc.backends._options import (
    Rule,
    TrimmedEnvironment,
    checks_certificates,
    configured_options,
    options_beyond,
    trim_options,
    warn_unverified,
)
from kserve_pvc.backends._pages import PageCount
from kserve_pvc.backends._ranges import Reader, follow, read_refusal, request_with_retries, unavailable
from kserve_pvc.backends._refusals import hide_sent, words_of
from kserve_pvc.errors import (
    SettingsError,
    SourceChangedError,
    SourceNotFoundError,
    SourceUnavailableError,
    StoreError,
)

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_HOPS = 5
_MAX_ANSWER_BYTES = 32 * 1024 * 1024
_MAX_SIZE = 10**15
_MAX_BLOB_SIZE = 10**9
_BLOB = "gitblob"

_OWN_OPTIONS = {"allow_private", "endpoint", "token", "verify"}
RULES = (
    Rule(configured_options, "is set in fsspec's configuration"),
    Rule(options_beyond(_OWN_OPTIONS), "is an argument of huggingface_hub's HfFileSystem"),
)


def hf_backend(options: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> Backend:
    """
    Make the backend for `hf://`: our own, or huggingface_hub's `HfFileSystem` where an option is one of its arguments.

    Raises:
        SettingsError: An option is unknown, or has no meaning for the class.
    """
    from kserve_pvc.backends._through_class import choose

    def load() -> list[Any]:
        from huggingface_hub import HfFileSystem

        return [HfFileSystem]

    return choose(
        "hf",
        options,
        environ,
        rules=RULES,
        own=_OWN_OPTIONS,
        load=load,
        direct=lambda given: HFBackend(given, environ),
        through=_through_class,
    )


def _through_class(arguments: Mapping[str, Any]) -> Backend:
    from kserve_pvc.backends.fsspec_ import FsspecBackend

    if "verify" in arguments:
        hint = "HfFileSystem has no such argument; name certificates in SSL_CERT_FILE, or pass no other option"
        raise SettingsError("verify", "not shown", hint)
    # The class shares the client of huggingface_hub with the whole process, which goes wherever the hub sends it.
    return FsspecBackend({name: value for name, value in arguments.items() if name != "allow_private"})


class HFBackend:
    """
    Models on the Hugging Face Hub: `hf://org/name`, `hf://org/name:revision` or `hf://org/name@revision`, each with a
    path behind it that names a directory or one file.

    Args:
        options: `token` (a text; False for none; True for the one of the environment even if that is switched off),
            `endpoint`, `verify` (a file or directory of certificates, or False), and `allow_private` (True, or the
            hosts besides that of the hub that may have private addresses). They win over the environment.
        environ: What stands for the environment of the process.
    """

    def __init__(self, options: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> None:
        options, environ = trim_options(options), TrimmedEnvironment(environ)
        self._endpoint = find_endpoint(options, environ)
        self._token = find_token(options, environ)
        self._is_offline = any(is_true(environ.get(name)) for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
        # What the hub redirects to is chosen by others; where it is itself, by the user.
        check = make_address_check(options, environ, hosts=[self._endpoint.host])
        self.client = HTTPClient(environ=environ, ca_bundle=options.get("verify"), check_address=check)
        self.addresses = Addresses()
        self._is_verified = checks_certificates(options)
        if not self._is_verified:
            warn_unverified("hf")
        self._retry_seconds = 300.0

    def resolve(self, ref: ModelRef) -> Resolved:
        wish = parse_location(ref)
        self._check_online(ref.uri)
        repository, commit = self._pinned(ref, wish)
        return order_listing(ref, self._files(ref, repository, commit, wish.path), version=commit)

    def open_range(self, file: RemoteFile, start: int, stop: int) -> _Range:
        self._check_online(f"hf://{file.address}")
        return _Range(self, file, start, stop)

    def access(self, ref: ModelRef) -> str:
        del ref
        return "direct"

    def checks_certificates(self, ref: ModelRef) -> bool:
        del ref
        return self._is_verified

    def checksum(self, name: str) -> Checksum | None:
        """
        What makes the id of a git blob: a SHA-1 over its length, which is part of the name, and its bytes.
        """
        size = name.removeprefix(_BLOB)
        return (
            None
            if size == name or not size.isdigit()
            else hashlib.sha1(b"blob %d\0" % int(size), usedforsecurity=False)
        )

    def tune(self, *, stall_seconds: float, retry_seconds: float) -> None:
        """
        Limit how long the hub may take for a response, and for how long a listing is retried.
        """
        self.client.response_seconds = stall_seconds
        self._retry_seconds = retry_seconds

    def close(self) -> None:
        """
        Release idle connections. Later calls make new ones.
        """
        self.client.close()

    def place(self, path: str, query: Mapping[str, str] | None = None) -> Target:
        """
        Return the address of a path of the hub, which is encoded already.
        """
        path = self._endpoint.path + path
        return self._endpoint._replace(path=f"{path}?{urlencode(query)}" if query else path)

    def is_hub(self, target: Target) -> bool:
        """
        Whether an address belongs to the hub itself, and may see the token.
        """
        return target[:3] == self._endpoint[:3]

    def headers(self, target: Target) -> Mapping[str, str]:
        """
        What goes along with a request.
        """
        headers = {"User-Agent": "kserve-pvc"}
        if self._token is not None and self.is_hub(target):
            headers["Authorization"] = f"Bearer {self._token}"
        return headers

    def refusal(self, uri: str, status: int, headers: Mapping[str, str], words: str) -> StoreError:
        """
        What the hub means.
        """
        return read_refusal_of_hub(uri, status, headers, words, has_token=self._token is not None)

    def _check_online(self, uri: str) -> None:
        if self._is_offline:
            raise SourceUnavailableError(uri, "HF_HUB_OFFLINE is set, so no request is sent", is_final=True)

    def _pinned(self, ref: ModelRef, wish: HubLocation) -> tuple[str, str]:
        """The repository, by the name it has today, and the commit that its revision means now."""
        if _COMMIT.fullmatch(wish.revision):
            return wish.repository, wish.revision
        revision = quote(wish.revision, safe="")
        found, _ = self._ask(ref.uri, f"/api/models/{wish.repository}/revision/{revision}", {})
        commit, name = (found.get("sha"), found.get("id")) if isinstance(found, dict) else (None, None)
        if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
            raise not_a_hub(ref.uri, "the response names no commit")
        # A model that was renamed is requested by its new name, so that not every file leads through a redirect.
        return name if isinstance(name, str) and is_repository(name) else wish.repository, commit

    def _files(self, ref: ModelRef, repository: str, commit: str, path: str) -> Iterator[RemoteFile]:
        inside = path.rstrip("/")
        if inside and not path.endswith("/"):
            # Asked for in its directory, since only that tells a file from a directory, and brings its digest.
            parent, _, name = inside.rpartition("/")
            entries = self._tree(ref.uri, repository, commit, parent, is_recursive=False)
            entry = next((e for e in entries if e["path"] == inside), None)
            if entry is None:
                raise SourceNotFoundError(ref.uri, f"the model has no `{inside}` at commit {commit[:12]}")
            if entry["type"] == "file":
                yield _remote_file(ref.uri, repository, commit, entry, name)
                return
        for entry in self._tree(ref.uri, repository, commit, inside, is_recursive=True):
            if entry["type"] == "file":
                name = entry["path"][len(inside) + 1 :] if inside else entry["path"]
                if ref.selects(name):
                    yield _remote_file(ref.uri, repository, commit, entry, name)

    def _tree(
        self, uri: str, repository: str, commit: str, directory: str, *, is_recursive: bool
    ) -> Iterator[dict[str, Any]]:
        """Every file and directory below one, or in it, page by page."""
        path = f"/api/models/{repository}/tree/{commit}" + (f"/{quote(directory, safe='')}" if directory else "")
        query: Mapping[str, str] = {"recursive": str(is_recursive).lower(), "expand": "false"}
        pages = PageCount(uri)
        while True:
            entries, headers = self._ask(uri, path, query)
            if not isinstance(entries, list):
                raise not_a_hub(uri, "the listing is not a list")
            for entry in entries:
                yield _checked(uri, entry, f"{directory}/" if directory else "")
            following = find_next_page(uri, headers.get("link", ""))
            if following is None:
                return
            # Only the query is taken from the link: requests go to the configured hub, whatever host a mirror repeats.
            query = following
            pages.follow(urlencode(query), is_empty=not entries)

    def _ask(self, uri: str, path: str, query: Mapping[str, str]) -> tuple[Any, Mapping[str, str]]:
        """Send a small request, and retry while the hub is busy or the network fails."""
        try:
            headers, body = request_with_retries(
                lambda: self._ask_once(uri, self.place(path, query)), self._retry_seconds
            )
        except HTTPError as error:
            raise SourceUnavailableError(uri, str(error), is_final=error.is_final) from error
        return _from_json(uri, body), headers

    def _ask_once(self, uri: str, target: Target) -> tuple[Mapping[str, str], bytes]:
        status, headers, body = self._get(uri, target)
        if status != 200:
            words = hide_sent(words_of(headers, body), target, self.headers(target))
            raise self.refusal(uri, status, headers, words)
        return headers, body

    def _get(self, uri: str, target: Target) -> tuple[int, Mapping[str, str], bytes]:
        for _ in range(_MAX_HOPS + 1):
            with self.client.open("GET", target, self.headers(target)) as answer:
                headers = answer.headers
                if answer.status == 200:
                    return (
                        200,
                        headers,
                        answer.read(_MAX_ANSWER_BYTES, time.monotonic() + 2 * self.client.response_seconds),
                    )
                body = read_refusal(answer)
            if answer.status not in _REDIRECTS or "location" not in headers:
                return answer.status, headers, body
            target = follow(uri, target, headers["location"])
            if not self.is_hub(target):
                raise unavailable(uri, answer.status, headers)
        raise _astray(uri)


class _MovedError(Exception):
    """
    The bytes are elsewhere: where `headers` say, or, if they say nothing, where the hub says in response to
    another request.
    """

    def __init__(self, headers: Mapping[str, str]) -> None:
        super().__init__("the bytes are elsewhere")
        self.headers = headers


class _Range:
    """
    A range of one file, wherever the hub says that it is.

    Of several streams that read one file the first asks the hub, and the others wait for what it learns. Nothing waits
    longer than a poll interval, so that the reader can check other things.
    """

    def __init__(self, backend: HFBackend, file: RemoteFile, start: int, stop: int) -> None:
        self._backend = backend
        self._file = file
        self._range = (start, stop)
        self._where = f"hf://{file.address}"
        self._name = f"{file.pin['commit']}/{file.address}"
        repository, path = repository_and_path(file.address)
        self._at_hub = backend.place(f"/{repository}/resolve/{file.pin['commit']}/{quote(path, safe='/~')}")
        self._target: Target | None = None
        self._reader: Reader | None = None
        self._is_asking = self._is_renewed = False
        self._hops = 0

    def __enter__(self) -> _Range:
        try:
            self._open()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        reader, self._reader = self._reader, None
        if self._is_asking:
            self._is_asking = False
            self._backend.addresses.give_up(self._name)
        if reader is not None:
            reader.__exit__(kind, error, trace)

    @property
    def is_whole(self) -> bool:
        """
        Whether the server sends the whole file whatever range is requested.
        """
        return self._reader is not None and self._reader.is_whole

    @property
    def skipped(self) -> int:
        """
        How much was received and is not part of the range.
        """
        return 0 if self._reader is None else self._reader.skipped

    @property
    def worked(self) -> float:
        """
        Seconds that reading took without waiting for anybody.
        """
        return 0.0 if self._reader is None else self._reader.worked

    def readinto(self, buffer: memoryview) -> int | None:
        """
        Fill the start of a buffer with what comes next. None: no data within a poll interval; 0: it has ended.

        Raises:
            SourceChangedError: The hub has something else by now.
            SourceUnavailableError: There is no response, or not the one that was requested.
            StoreError: What the hub calls a refusal.
        """
        while True:
            try:
                if not self._open():
                    return None
                assert self._reader is not None  # It is open.
                count = self._reader.readinto(buffer)
            except _MovedError as moved:
                self._follow(moved.headers)
                continue
            if self._is_asking and count:
                self._learnt(ADDRESS_SECONDS)
            return count

    def request(self, file: RemoteFile, *, renewed: bool) -> tuple[Target, Mapping[str, str]]:
        target = self._target or self._at_hub
        if renewed and target != self._at_hub and not self._is_renewed:
            # A signature that is refused has expired: the hub gives another, once.
            self._is_renewed = True
            self._backend.addresses.forget(self._name, target)
            raise _MovedError({})
        return target, self._backend.headers(target)

    def refusal(self, file: RemoteFile, status: int, headers: Mapping[str, str], body: bytes) -> StoreError | None:
        target = self._target or self._at_hub
        if status in _REDIRECTS and "location" in headers:
            raise _MovedError(headers)
        if target != self._at_hub:
            self._backend.addresses.forget(self._name, target)
        if not self._backend.is_hub(target):
            if status not in (404, 410):
                return None
            # The hub may name a better address the next time.
            failure = unavailable(self._where, status, headers, words_of(headers, body))
            failure.is_final, failure.hint = False, ""
            return failure
        error = self._backend.refusal(self._where, status, headers, words_of(headers, body))
        # What was listed before has gone.
        is_gone = isinstance(error, SourceNotFoundError) and status != 401
        return SourceChangedError(self._where, str(file.entry.path)) if is_gone or status == 416 else error

    def is_unchanged(self, file: RemoteFile) -> bool:
        """No request has a condition: a commit names its files for ever."""
        return False

    def _open(self) -> bool:
        """Send the request, unless that has been done. False: another stream is asking where the file is."""
        if self._reader is not None:
            return True
        if self._target is None and not self._is_asking:
            self._target, self._is_asking = self._backend.addresses.take(self._name)
            if self._target is None and not self._is_asking:
                return False
        reader = Reader(self._backend.client, self, self._file, self._where, *self._range)
        reader.__enter__()
        self._reader = reader
        return True

    def _follow(self, headers: Mapping[str, str]) -> None:
        self._reader = None  # It has released its connection before it raised.
        self._hops += 1
        if self._hops > _MAX_HOPS:
            raise _astray(self._where)
        if not headers:
            self._target = None
            return
        target = self._target or self._at_hub
        if self._backend.is_hub(target):
            self._check_promise(headers)
        self._target = follow(self._where, target, headers["location"])
        self._learnt(lifetime(self._target, headers))

    def _learnt(self, seconds: float) -> None:
        self._is_asking = False
        self._backend.addresses.found(self._name, self._target or self._at_hub, seconds)

    def _check_promise(self, headers: Mapping[str, str]) -> None:
        """Compare what the hub says about the bytes that it points to with what was listed."""
        entry = self._file.entry
        listed = {
            "x-repo-commit": self._file.pin["commit"],
            "x-linked-size": str(entry.size_bytes),
            "x-linked-etag": entry.sha256,
        }
        for name, value in listed.items():
            if value is not None and headers.get(name, value).removeprefix("W/").strip('"') != value:
                raise SourceChangedError(self._where, str(entry.path))


def _from_json(uri: str, body: bytes) -> Any:
    try:
        check_size(body)
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise not_a_hub(uri, "the response is not JSON") from error


def _checked(uri: str, entry: Any, prefix: str) -> dict[str, Any]:
    """One entry of a listing, if it is below what was requested."""
    path = entry.get("path") if isinstance(entry, dict) else None
    if not isinstance(path, str) or entry.get("type") not in ("file", "directory"):
        raise not_a_hub(uri, "the listing contains an entry that is neither file nor directory")
    if not path.startswith(prefix):
        raise SourceUnavailableError(uri, f"the listing of `{prefix}` contains `{path}`")
    return dict(entry)


def _remote_file(uri: str, repository: str, commit: str, entry: Mapping[str, Any], name: str) -> RemoteFile:
    large = entry.get("lfs")
    size, blob = (
        (large.get("size"), large.get("oid")) if isinstance(large, dict) else (entry.get("size"), entry.get("oid"))
    )
    pattern = _SHA256 if isinstance(large, dict) else _COMMIT
    if type(size) is not int or not 0 <= size < _MAX_SIZE or not isinstance(blob, str) or not pattern.fullmatch(blob):
        raise not_a_hub(uri, f"the listing gives no size or no digest for `{entry['path']}`")
    is_large = isinstance(large, dict)
    return RemoteFile(
        entry=FileEntry(path=name, size_bytes=size, sha256=blob if is_large else None, token=blob),
        address=f"{repository}/{entry['path']}",
        pin={"commit": commit},
        digest=None if is_large or size >= _MAX_BLOB_SIZE else f"{_BLOB}{size}:{blob}",
    )


def _astray(uri: str) -> SourceUnavailableError:
    return SourceUnavailableError(uri, f"more than {_MAX_HOPS} redirects in a row", is_final=True)
