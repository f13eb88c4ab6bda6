"""
A Hugging Face endpoint on the loopback interface, and the storage that it redirects to, on another host.

It exists because the real hub cannot be asked in a test. It answers what clients ask when they download a model, as
`huggingface_hub` itself is shown to understand it, and misbehaves at the request that a test names.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

HUB_HOST = "127.0.0.1"
# Another host for every client, since it has another name.
STORAGE_HOST = "127.0.0.2"
OWNER = "hf_ownerOfAllOfThem"
STRANGER = "hf_someOtherAccount"
WRONG = "hf_neverIssued"


@dataclass(frozen=True, kw_only=True)
class Request:
    """
    One request as it arrived; `host` is `hub` or `storage`, `range` the text of the header.
    """

    host: str
    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]

    @property
    def range(self) -> str | None:
        return self.headers.get("range")

    @property
    def token(self) -> str | None:
        return self.headers.get("authorization", "").removeprefix("Bearer ") or None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """
    What is sent for a request. A GET of a body that has a range gets that range.
    """

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


Meddler = Callable[[Request, Answer], Answer | None]


@dataclass(frozen=True)
class StoredFile:
    """
    One file as git and the large file storage know it.
    """

    data: bytes
    is_large: bool
    sha256: str
    blob: str

    @classmethod
    def of(cls, data: bytes, *, is_large: bool) -> StoredFile:
        sha256 = hashlib.sha256(data).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n".encode()
        return cls(data, is_large, sha256, git_blob(pointer if is_large else data))

    def entry(self, path: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "oid": self.blob, "size": len(self.data), "path": path}
        if self.is_large:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.data), "pointerSize": 134}
        return entry


def git_blob(data: bytes) -> str:
    """
    The name that git gives to some bytes.
    """
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


class Repository:
    """
    Branches, commits, and files that are not committed before somebody asks.
    """

    def __init__(self) -> None:
        self.commits: dict[str, Mapping[str, StoredFile]] = {}
        self._heads: dict[str, str] = {}
        self._work: dict[str, dict[str, StoredFile]] = {}
        self._changed: set[str] = set()
        self.readers: set[str] | None = None
        self.is_gated = False

    def change(self, branch: str, path: str, file: StoredFile | None) -> None:
        work = self._work.setdefault(branch, {})
        self._changed.add(branch)
        if file is None:
            work.pop(path, None)
        else:
            work[path] = file

    def head(self, branch: str) -> str | None:
        if branch in self._changed:
            self._changed.remove(branch)
            files = dict(self._work[branch])
            tree = "".join(f"{path}\0{file.blob}\n" for path, file in sorted(files.items()))
            commit = hashlib.sha1(f"{self._heads.get(branch)}\n{tree}".encode(), usedforsecurity=False).hexdigest()
            self.commits[commit], self._heads[branch] = files, commit
        return self._heads.get(branch)

    def forget(self, commit: str) -> None:
        """
        Lose a commit, as a hub does after a branch was squashed.
        """
        del self.commits[commit]

    def commit(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.head(revision)


class _RefusedError(Exception):
    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer = _json(status, {"error": message}, headers)


class Hub:
    """
    The hub and its storage, while the `with` lasts.

    Tokens are `OWNER`, whom every repository knows, `STRANGER`, and any other, which is refused. `requests` holds what
    was asked, in order. `meddle` sees each request and its honest answer and may return another.

    Args:
        page: How many entries of a tree one answer holds.
        large_bytes: From which size on a file is in large file storage.
        signed_seconds: How long the address of a large file is good.
        is_direct: Whether small files are sent at once, instead of after a redirect on the same host.
    """

    def __init__(
        self, *, page: int = 1000, large_bytes: int = 10_000, signed_seconds: int = 3600, is_direct: bool = False
    ) -> None:
        self._page = page
        self._large_bytes = large_bytes
        self.signed_seconds = signed_seconds
        self._is_direct = is_direct
        self._repositories: dict[str, Repository] = {}
        self._new_names: dict[str, str] = {}
        self._secret = secrets.token_bytes(16)
        self._guard = threading.Lock()
        self._servers: list[_Server] = []
        self.requests: list[Request] = []
        self.meddle: Meddler = lambda request, answer: None

    def __enter__(self) -> Self:
        for host, answer in ((HUB_HOST, self._hub_answer), (STORAGE_HOST, self._storage_answer)):
            server = _Server(host, "hub" if host == HUB_HOST else "storage", self, answer)
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            self._servers.append(server)
        return self

    def __exit__(self, *_: object) -> None:
        while self._servers:
            self._servers.pop().stop()

    @property
    def endpoint(self) -> str:
        return f"http://{HUB_HOST}:{self._servers[0].server_port}"

    def push(self, name: str, files: Mapping[str, bytes], branch: str = "main") -> str:
        """
        Make or extend a repository, and return the commit that the branch then is.
        """
        for path, data in files.items():
            self.put(name, path, data, branch)
        commit = self.repository(name).head(branch)
        assert commit is not None  # Something was put.
        return commit

    def put(self, name: str, path: str, data: bytes | None, branch: str = "main") -> None:
        """
        Put one file into a branch, or, without data, delete it.
        """
        stored = None if data is None else StoredFile.of(data, is_large=len(data) >= self._large_bytes)
        with self._guard:
            self._repositories.setdefault(name, Repository()).change(branch, path, stored)

    def repository(self, name: str) -> Repository:
        return self._repositories[name]

    def rename(self, old: str, new: str) -> None:
        """
        Give a repository a new name; the old one leads there.
        """
        self._repositories[new] = self._repositories.pop(old)
        self._new_names[old] = new

    def revoke_addresses(self) -> None:
        """
        Let every address that was signed so far expire now.
        """
        self._secret = secrets.token_bytes(16)

    def asked(self, host: str, method: str = "GET", containing: str = "") -> list[Request]:
        """
        The requests that one of the hosts got.
        """
        return [r for r in self.requests if (r.host, r.method) == (host, method) and containing in r.path]

    def _hub_answer(self, request: Request) -> Answer:
        parts = [unquote(part) for part in request.path.split("/")[1:]]
        try:
            if request.token not in (None, OWNER, STRANGER):
                raise _RefusedError(401, "", "Invalid credentials in Authorization header")
            match parts:
                case ["api", "models", organisation, name]:
                    return self._info(request, f"{organisation}/{name}", "main")
                case ["api", "models", organisation, name, "paths-info", revision]:
                    return self._paths(request, f"{organisation}/{name}", revision)
                case ["api", "models", organisation, name, "revision", revision]:
                    return self._info(request, f"{organisation}/{name}", revision)
                case ["api", "models", organisation, name, "tree", revision, *inside]:
                    return self._tree(request, f"{organisation}/{name}", revision, "/".join(inside))
                case ["api", "resolve-cache", "models", organisation, name, commit, *path]:
                    return self._small(request, f"{organisation}/{name}", commit, "/".join(path))
                case [organisation, name, "resolve", revision, *path]:
                    return self._resolve(request, f"{organisation}/{name}", revision, "/".join(path))
            raise _RefusedError(404, "", "Sorry, we can't find the page you are looking for.")
        except _RefusedError as refusal:
            return refusal.answer

    def _commit(self, request: Request, name: str, revision: str) -> tuple[str, Mapping[str, StoredFile]]:
        repository = self._repositories.get(name)
        if repository is None or (repository.readers is not None and request.token not in repository.readers):
            if request.token is None:
                raise _RefusedError(401, "RepoNotFound", "Invalid username or password.")
            raise _RefusedError(404, "RepoNotFound", "Repository not found")
        with self._guard:
            commit = repository.commit(revision)
        if commit is None:
            raise _RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repository.commits[commit]

    def _moved(self, request: Request, name: str) -> Answer | None:
        new = self._new_names.get(name)
        if new is None:
            return None
        query = f"?{urlencode(request.query)}" if request.query else ""
        return Answer(status=307, headers={"Location": self.endpoint + request.path.replace(name, new, 1) + query})

    def _info(self, request: Request, name: str, revision: str) -> Answer:
        if (moved := self._moved(request, name)) is not None:
            return moved
        commit, files = self._commit(request, name, revision)
        gated = "manual" if self._repositories[name].is_gated else False
        return _json(
            200,
            {
                "_id": "0" * 24,
                "id": name,
                "sha": commit,
                "private": self._repositories[name].readers is not None,
                "gated": gated,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [{"rfilename": path} for path in sorted(files)],
            },
        )

    def _paths(self, request: Request, name: str, revision: str) -> Answer:
        _, files = self._commit(request, name, revision)
        entries = _listed(files, "", is_recursive=True)
        return _json(200, [entry for entry in entries if entry["path"] in request.query["paths"].split("\n")])

    def _tree(self, request: Request, name: str, revision: str, inside: str) -> Answer:
        if (moved := self._moved(request, name)) is not None:
            return moved
        _, files = self._commit(request, name, revision)
        is_recursive = request.query.get("recursive", "false").lower() == "true"
        entries = _listed(files, f"{inside}/" if inside else "", is_recursive=is_recursive)
        if inside and not entries:
            raise _RefusedError(404, "EntryNotFound", f"{inside} does not exist on {revision}")
        start = int(base64.urlsafe_b64decode(request.query.get("cursor", "MA==")))
        headers = {}
        if start + self._page < len(entries):
            cursor = base64.urlsafe_b64encode(str(start + self._page).encode()).decode()
            query = urlencode({**request.query, "limit": str(self._page), "cursor": cursor})
            headers["Link"] = f'<{self.endpoint}{request.path}?{query}>; rel="next"'
        return _json(200, entries[start : start + self._page], headers)

    def _found(self, request: Request, name: str, revision: str, path: str) -> tuple[str, StoredFile]:
        commit, files = self._commit(request, name, revision)
        if self._repositories[name].is_gated and request.token != OWNER:
            status, words = (401, "log in") if request.token is None else (403, "ask for access")
            raise _RefusedError(status, "GatedRepo", f"Access to model {name} is restricted. You must {words}.")
        if path not in files:
            raise _RefusedError(404, "EntryNotFound", "Entry not found")
        return commit, files[path]

    def _resolve(self, request: Request, name: str, revision: str, path: str) -> Answer:
        if (moved := self._moved(request, name)) is not None:
            return moved
        commit, file = self._found(request, name, revision, path)
        headers = {"X-Repo-Commit": commit, "X-Linked-Size": str(len(file.data)), "Date": formatdate(usegmt=True)}
        if file.is_large:
            return Answer(
                status=302, headers={**headers, "X-Linked-Etag": f'"{file.sha256}"', "Location": self._signed(file)}
            )
        if self._is_direct:
            return self._small(request, name, commit, path)
        query = urlencode({f"/{name}/resolve/{revision}/{path}": "", "etag": f'"{file.blob}"'})
        place = f"/api/resolve-cache/models/{name}/{commit}/{quote(path)}?{query}"
        return Answer(
            status=307,
            headers={**headers, "X-Linked-Etag": f'"{file.blob}"', "Location": place},
            body=b"Temporary Redirect",
        )

    def _small(self, request: Request, name: str, commit: str, path: str) -> Answer:
        _, file = self._found(request, name, commit, path)
        return Answer(status=200, headers={"X-Repo-Commit": commit, "ETag": f'"{file.blob}"'}, body=file.data)

    def _signed(self, file: StoredFile) -> str:
        expires = str(int(time.time()) + self.signed_seconds)
        query = urlencode(
            {
                "response-content-disposition": "inline; filename=x",
                "Expires": expires,
                "Signature": self._sign(file.sha256, expires),
            }
        )
        return f"http://{STORAGE_HOST}:{self._servers[1].server_port}/xet-bridge/{file.sha256}?{query}"

    def _sign(self, sha256: str, expires: str) -> str:
        return hmac.new(self._secret, f"{sha256} {expires}".encode(), "sha256").hexdigest()

    def _storage_answer(self, request: Request) -> Answer:
        sha256, expires = request.path.rpartition("/")[2], request.query.get("Expires", "0")
        is_good = hmac.compare_digest(request.query.get("Signature", ""), self._sign(sha256, expires))
        if not is_good or int(expires) < time.time() or request.token is not None:
            return Answer(
                status=403,
                headers={"Content-Type": "application/xml"},
                body=b"<Error><Code>AccessDenied</Code></Error>",
            )
        with self._guard:
            commits = [files for repository in self._repositories.values() for files in repository.commits.values()]
        file = next((f for files in commits for f in files.values() if f.sha256 == sha256), None)
        if file is None:
            return Answer(status=404)
        # No digest of ours: storage has names of its own for what it holds.
        return Answer(status=200, headers={"ETag": f'"{sha256[:32]}-3"'}, body=file.data)


def busy(times: int, *, containing: str = "", **headers: str) -> Meddler:
    """
    Answer 429 to the first requests for a path, with these headers (`Retry_After="1"`).
    """
    left = [times]

    def act(request: Request, answer: Answer) -> Answer | None:
        if containing not in request.path or not left[0]:
            return None
        left[0] -= 1
        return Answer(status=429, headers={name.replace("_", "-"): value for name, value in headers.items()})

    return act


def _listed(files: Mapping[str, StoredFile], prefix: str, *, is_recursive: bool) -> list[dict[str, Any]]:
    entries: dict[str, dict[str, Any]] = {}
    for path, file in files.items():
        if not path.startswith(prefix):
            continue
        parents = path[len(prefix) :].split("/")[:-1]
        for depth in range(1, len(parents) + 1 if is_recursive else min(2, len(parents) + 1)):
            directory = prefix + "/".join(parents[:depth])
            entries[directory] = {
                "type": "directory",
                "oid": git_blob(directory.encode()),
                "size": 0,
                "path": directory,
            }
        if is_recursive or not parents:
            entries[path] = file.entry(path)
    return [entries[path] for path in sorted(entries)]


def _json(status: int, document: Any, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(
        status=status,
        headers={"Content-Type": "application/json", **(headers or {})},
        body=json.dumps(document).encode(),
    )


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: str, host: str, hub: Hub, answer: Callable[[Request], Answer]) -> None:
        super().__init__((address, 0), _Handler)
        self.host = host
        self.hub = hub
        self.answer = answer
        self._open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients hang up whenever they like."""

    def stop(self) -> None:
        self.shutdown()
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        form = self.rfile.read(int(headers.get("content-length", 0))).decode()
        query: dict[str, str] = {}
        for name, value in parse_qsl(form or parts.query, keep_blank_values=True):
            query[name] = f"{query[name]}\n{value}" if name in query else value
        request = Request(host=self.server.host, method=self.command, path=parts.path, query=query, headers=headers)
        self.server.hub.requests.append(request)
        answer = self.server.answer(request)
        other = self.server.hub.meddle(request, answer)
        self._send(_ranged(request, answer if other is None else other))

    do_HEAD = do_POST = do_GET  # noqa: N815

    def _send(self, answer: Answer) -> None:
        lines = [f"HTTP/1.1 {answer.status} Whatever", *(f"{name}: {value}" for name, value in answer.headers.items())]
        if not any(name.lower() == "content-length" for name in answer.headers):
            lines.append(f"Content-Length: {len(answer.body)}")
        head = "\r\n".join([*lines, "", ""]).encode("latin-1")
        # In one piece: two would wait for each other.
        self.wfile.write(head if self.command == "HEAD" else head + answer.body)

    def log_message(self, *_: object) -> None:
        pass


def _ranged(request: Request, answer: Answer) -> Answer:
    if (
        answer.status != 200
        or request.range is None
        or request.method != "GET"
        or "json" in answer.headers.get("Content-Type", "")
    ):
        return answer
    first, _, last = request.range.removeprefix("bytes=").partition("-")
    size = len(answer.body)
    start, stop = int(first), min(int(last) + 1 if last else size, size)
    if start >= stop:
        return Answer(status=416, headers={"Content-Range": f"bytes */{size}"})
    headers = {**answer.headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}", "Accept-Ranges": "bytes"}
    return replace(answer, status=206, headers=headers, body=answer.body[start:stop])


class HuggingFace:
    """
    A hub of its own as raw access for tests that know no hub: the first two parts of a path are the model.
    """

    def __init__(self) -> None:
        self._hub = Hub()

    def __enter__(self) -> Self:
        self._hub.__enter__()
        with socket.socket() as probe:
            probe.bind((HUB_HOST, 0))
            self._nobody = f"http://{HUB_HOST}:{probe.getsockname()[1]}"
        return self

    def __exit__(self, *exception: object) -> None:
        self._hub.__exit__(*exception)

    @property
    def storage_options(self) -> Mapping[str, Any]:
        return {"endpoint": self._hub.endpoint, "token": OWNER, "allow_private": [STORAGE_HOST]}

    @property
    def denied_options(self) -> Mapping[str, Any]:
        return {"endpoint": self._hub.endpoint, "token": WRONG}

    @property
    def unreachable_options(self) -> Mapping[str, Any]:
        return {"endpoint": self._nobody, "token": OWNER}

    def uri(self, path: str) -> str:
        return f"hf://{path}"

    def put(self, path: str, data: bytes) -> None:
        self._change(path, data)

    def delete(self, path: str) -> None:
        self._change(path, None)

    def _change(self, path: str, data: bytes | None) -> None:
        organisation, name, inside = path.split("/", 2)
        self._hub.put(f"{organisation}/{name}", inside, data)
