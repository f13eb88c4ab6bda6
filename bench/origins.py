"""
Origins to download from, which count what they sent: files below a directory, and the S3 server of SeaweedFS.

Files are served by nginx, which answers for all objects itself, whatever service it stands for; only listings and
tokens come from `server.py` behind it. What has to be slow comes from `server.py` alone.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self
from urllib.parse import quote

import listings
import measure

_SERVER = Path(__file__).with_name("server.py")
_DEMO = Path(__file__).parents[1] / "examples" / "demo"
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """
    How slow the way to the origin is.

    Attributes:
        tls: Whether it speaks TLS, with a certificate of an authority made for the run.
        latency: Seconds before each answer.
        connection_limit: Bytes per second that each connection gets, or None.
        total_limit: Bytes per second that all of them get together, or None.
    """

    tls: bool = False
    latency: float = 0.0
    connection_limit: float | None = None
    total_limit: float | None = None

    @property
    def is_slow(self) -> bool:
        return bool(self.latency or self.connection_limit or self.total_limit)


SHAPES = {
    "plain": Shape(),
    "tls": Shape(tls=True),
    "latency": Shape(latency=0.020),
    "connection-limit": Shape(connection_limit=50e6),
    "slow-connections": Shape(latency=0.020, connection_limit=50e6),
    "gigabit": Shape(total_limit=125e6),
}


@dataclass(frozen=True, kw_only=True)
class Sent:
    """
    What an origin did in some time: requests answered, and bytes of objects and listings sent.
    """

    requests: int
    body_bytes: int


class Origin(Protocol):
    """
    A server, while its `with` lasts.

    Attributes:
        ca: The certificate that signed the endpoint's, if that speaks TLS.
        pids: Its processes; their descendants belong to it too.
        google: The file of a service account whose tokens it issues, or None.
        is_hub: Whether it imitates a Hugging Face hub, Google Cloud Storage and Azure Blob Storage beside S3.
    """

    is_hub: bool

    @property
    def name(self) -> str: ...
    @property
    def endpoint(self) -> str: ...
    @property
    def ca(self) -> Path | None: ...
    @property
    def google(self) -> Path | None: ...
    @property
    def pids(self) -> list[int]: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...
    def mark(self) -> int:
        """Remember now, for `since`."""

    def since(self, mark: int) -> Sent | None:
        """Count what was sent since a mark; None if this server does not say."""


class FileOrigin:
    """
    Serves the files below a directory as the buckets of S3, Google Cloud Storage and Azure, and as models of a Hugging
    Face hub.

    Args:
        root: Its directories are the buckets.
        scratch: A directory for logs, sockets and certificates.
        shape: Served by nginx if it is not slow and nginx can be found, else by `server.py`.

    Raises:
        RuntimeError: It does not start, or does not keep to what clients rely on.
    """

    is_hub = True

    def __init__(self, root: Path, scratch: Path, shape: Shape) -> None:
        self._root, self._scratch, self._shape = root.resolve(), scratch.resolve(), shape
        self._nginx = None if shape.is_slow else find_nginx()
        self._log = self._scratch / "access.log"
        self._processes: list[subprocess.Popen[bytes]] = []
        self._port = 0
        if shape.tls and self._nginx is None:
            raise RuntimeError("TLS needs nginx, and there is none; install it or name it in `BENCH_NGINX`")

    @property
    def name(self) -> str:
        return "nginx" if self._nginx else "sendfile server"

    @property
    def endpoint(self) -> str:
        return f"https://localhost:{self._port}" if self._shape.tls else f"http://{LOOPBACK}:{self._port}"

    @property
    def ca(self) -> Path | None:
        return self._scratch / "ca.pem" if self._shape.tls else None

    @property
    def google(self) -> Path | None:
        place = self._scratch / "google.json"
        return place if place.exists() else None

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def __enter__(self) -> Self:
        self._scratch.mkdir(parents=True, exist_ok=True)
        self._log.touch()
        self._port = _free_port()
        try:
            self._start()
            _wait_for(lambda: _answers(self._port), self._processes)
            check(self.endpoint, self.ca, self._root)
            make_google_account(self._scratch / "google.json", self.endpoint)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def mark(self) -> int:
        """Remember now, for `since`."""
        return self._settled()

    def since(self, mark: int) -> Sent:
        """
        Count what was sent since a mark. Answers that a client broke off count with what was sent until then.
        """
        self._settled()
        with self._log.open() as log:
            log.seek(mark)
            sizes = [int(line.split(" ", 3)[2]) for line in log]
        return Sent(requests=len(sizes), body_bytes=sum(sizes))

    def _settled(self) -> int:
        """The log's size when it has stopped to grow: a request is logged a moment after its client has all of it."""
        size = -1
        while size != (size := self._log.stat().st_size):
            time.sleep(0.05)
        return size

    def _start(self) -> None:
        arguments = [sys.executable, str(_SERVER), str(self._root)]
        if self._nginx is None:
            limits = [
                str(self._shape.latency),
                str(self._shape.connection_limit or 0),
                str(self._shape.total_limit or 0),
            ]
            self._spawn([*arguments, str(self._port), str(self._log), *limits])
            return
        socket_of_listings = self._scratch / "listings.sock"
        self._spawn([*arguments, str(socket_of_listings), os.devnull, "0", "0", "0"])
        _wait_for(socket_of_listings.exists, self._processes)
        if self._shape.tls:
            make_certificates(self._scratch)
        # The generation is a directory, so that there is none for any other.
        (self._scratch / "generations").mkdir()
        (self._scratch / "generations" / listings.GENERATION).symlink_to(self._root)
        configuration = self._scratch / "nginx.conf"
        configuration.write_text(self._configuration(socket_of_listings))
        self._spawn(
            [self._nginx, "-c", str(configuration), "-p", str(self._scratch), "-e", str(self._scratch / "error.log")]
        )

    def _spawn(self, command: list[str]) -> None:
        with (self._scratch / "server.log").open("ab") as log:
            self._processes.append(
                subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
            )

    def _stop(self) -> None:
        for process in reversed(self._processes):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        for process in self._processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self._processes.clear()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _configuration(self, socket_of_listings: Path) -> str:
        scratch = self._scratch
        certificates = (
            f"ssl_certificate {scratch}/server.pem; ssl_certificate_key {scratch}/server.key; ssl_protocols TLSv1.3;"
        )
        # A prefix is no object; nginx by itself would redirect to the directory.
        names = [place.relative_to(self._root) for place in self._root.glob("*/*/")]
        starts = ("", f"/{listings.AZURE_ACCOUNT}")
        prefixes = "".join(f"location = {start}/{name} {{ return 404; }} " for name in names for start in starts)
        temporary = "".join(
            f"{kind}_temp_path {scratch}/tmp;" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        return f"""
            daemon off; user {_user()}; worker_processes {os.cpu_count()}; pid {scratch}/nginx.pid;
            worker_rlimit_nofile 8192;
            events {{ worker_connections 2048; }}
            http {{
                {temporary}
                log_format counted '$request_method $status $body_bytes_sent $request_uri';
                access_log {self._log} counted;
                sendfile on; tcp_nopush on; tcp_nodelay on; keepalive_requests 1000000; keepalive_timeout 60s;
                open_file_cache max=20000 inactive=600s; server_tokens off;
                default_type application/octet-stream; types {{ }}
                upstream listings {{ server unix:{socket_of_listings}; keepalive 4; }}
                server {{
                    listen {LOOPBACK}:{self._port}{" ssl" if self._shape.tls else ""} backlog=1024;
                    {certificates if self._shape.tls else ""}
                    root {self._root};
                    proxy_http_version 1.1; proxy_set_header Connection "";
                    location / {{ }}
                    {prefixes}
                    location ~ ^/[^/]*/?$ {{ proxy_pass http://listings; }}
                    location /api/ {{ proxy_pass http://listings; }}
                    location ^~ /storage/ {{ proxy_pass http://listings; }}
                    location ~ ^/download/storage/v1/b/([^/]+)/o/(.+)$ {{
                        alias {scratch}/generations/$arg_generation/$1/$2;
                        add_header X-Goog-Generation $arg_generation;
                    }}
                    location ~ ^/{listings.AZURE_ACCOUNT}/[^/]+$ {{ proxy_pass http://listings; }}
                    location ~ ^/{listings.AZURE_ACCOUNT}/([^/]+)/(.+)$ {{ alias {self._root}/$1/$2; }}
                    location ~ ^/([^/]+)/([^/]+)/resolve/([0-9a-f]+)/(.+)$ {{
                        alias {self._root}/$1/$2/$4;
                        add_header X-Repo-Commit $3;
                    }}
                }}
            }}
        """


class WeedOrigin:
    """
    The S3 server of SeaweedFS, filled with the files below a directory. It counts nothing, and its own work is what
    limits.
    """

    is_hub = False
    name = "SeaweedFS"
    ca = None
    google = None

    def __init__(self, root: Path) -> None:
        self._root = root
        self._stack = ExitStack()
        self._endpoint = ""
        self._pids: list[int] = []

    @property
    def endpoint(self) -> str:
        return self._endpoint

    @property
    def pids(self) -> list[int]:
        return self._pids

    def __enter__(self) -> Self:
        if str(_DEMO) not in sys.path:
            sys.path.append(str(_DEMO))
        from origin import SeaweedS3

        before = measure.tree(os.getpid())
        with ExitStack() as stack:
            server = stack.enter_context(SeaweedS3())
            self._endpoint = server.endpoint
            self._pids = [pid for pid in measure.tree(os.getpid()) if pid not in before][:1]
            for bucket in self._root.iterdir():
                server.make_bucket(bucket.name)
                for path in (path for path in bucket.rglob("*") if path.is_file()):
                    server.put(bucket.name, str(path.relative_to(bucket)), path)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def mark(self) -> int:
        return 0

    def since(self, mark: int) -> Sent | None:
        return None


def check(endpoint: str, ca: Path | None, root: Path) -> None:
    """
    Ask for one file in the ways that decide whether a measurement means anything.

    A server that ignores `Range` or `If-Match`, or lists other ETags than it sends, would flatter some clients and
    break others, silently.

    Raises:
        RuntimeError: It answers otherwise than S3 would.
    """
    path = min((path for path in root.rglob("*") if path.is_file()), key=lambda path: (path.stat().st_size, path))
    bucket, _, key = str(path.relative_to(root)).partition("/")
    size, target = path.stat().st_size, quote(f"/{bucket}/{key}")
    with path.open("rb") as file:
        wanted = file.read(5)[2:]
    ranged = {"Range": "bytes=2-4"}
    partial, fields, body = _ask(endpoint, ca, target, ranged)
    etag = fields.get("etag", "")
    listing = _ask(endpoint, ca, f"/{bucket}?list-type=2&prefix={quote(key)}", {})[2].decode().replace("&quot;", '"')
    blob = f"/{listings.AZURE_ACCOUNT}{target}"
    blobs = _ask(
        endpoint, ca, f"/{listings.AZURE_ACCOUNT}/{bucket}?restype=container&comp=list&prefix={quote(key)}", {}
    )[2].decode()
    media = f"/download/storage/v1/b/{bucket}/o/{quote(key, safe='')}?alt=media&generation="
    found = {
        "a range": (partial, fields.get("content-range"), body[:8]),
        "a range beyond the end": _ask(endpoint, ca, target, {"Range": f"bytes={size}-"})[0],
        "another If-Match": _ask(endpoint, ca, target, {"If-Match": '"another"'})[0],
        "another If-Match of a range": _ask(endpoint, ca, target, {"If-Match": '"another"', **ranged})[0],
        "its own If-Match of a range": _brief(_ask(endpoint, ca, target, {"If-Match": etag, **ranged})),
        "the ETag in the listing": etag in listing,
        "a blob by its If-Match": _brief(_ask(endpoint, ca, blob, {"If-Match": etag, **ranged})),
        "a blob by another If-Match": _ask(endpoint, ca, blob, {"If-Match": '"another"', **ranged})[0],
        "the ETag in the listing of blobs": etag.strip('"') in blobs,
        "an object by its generation": _brief(_ask(endpoint, ca, media + listings.GENERATION, ranged)),
        "an object by another generation": _ask(endpoint, ca, f"{media}1", ranged)[0],
    }
    expected = {
        "a range": (206, f"bytes 2-4/{size}", wanted),
        "a range beyond the end": 416,
        "another If-Match": 412,
        "another If-Match of a range": 412,
        "its own If-Match of a range": (206, wanted),
        "the ETag in the listing": True,
        "a blob by its If-Match": (206, wanted),
        "a blob by another If-Match": 412,
        "the ETag in the listing of blobs": True,
        "an object by its generation": (206, wanted),
        "an object by another generation": 404,
    }
    if wrong := [
        f"{what}: {found[what]!r}, not {expected[what]!r}" for what in expected if found[what] != expected[what]
    ]:
        raise RuntimeError(f"the origin at {endpoint} is no origin to measure with: {'; '.join(wrong)}")


def _brief(answer: tuple[int, dict[str, str], bytes]) -> tuple[int, bytes]:
    """What fits into a message if it is wrong."""
    return answer[0], answer[2][:8]


def _ask(endpoint: str, ca: Path | None, target: str, fields: Mapping[str, str]) -> tuple[int, dict[str, str], bytes]:
    address = endpoint.partition("://")[2]
    if ca is None:
        connection = http.client.HTTPConnection(address, timeout=10)
    else:
        connection = http.client.HTTPSConnection(
            address, timeout=10, context=ssl.create_default_context(cafile=str(ca))
        )
    with contextlib.closing(connection):
        connection.request("GET", target, headers=dict(fields))
        answer = connection.getresponse()
        # An ignored range or condition must not cost a gigabyte.
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read(64 * 1024)


def find_nginx() -> str | None:
    """
    The nginx to use: what `BENCH_NGINX` names, or what is installed.
    """
    return os.environ.get("BENCH_NGINX") or shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


def make_certificates(directory: Path) -> None:
    """
    Write `ca.pem`, and `server.pem` with `server.key` that it signed for localhost.
    """
    import trustme

    authority = trustme.CA()
    server = authority.issue_cert("localhost", LOOPBACK)
    authority.cert_pem.write_to_path(directory / "ca.pem")
    server.private_key_pem.write_to_path(directory / "server.key")
    for pem in server.cert_chain_pems:
        pem.write_to_path(directory / "server.pem", append=True)


def make_google_account(place: Path, endpoint: str) -> None:
    """
    Write the file of a service account that gets its tokens at an endpoint; nothing if there is nothing to make keys
    with.
    """
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import rsa
    except ImportError:
        return
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    account = {"type": "service_account", "project_id": "bench", "private_key_id": "1", "private_key": pem.decode()}
    place.write_text(
        json.dumps(
            {**account, "client_email": "bench@bench.invalid", "client_id": "1", "token_uri": f"{endpoint}/token"}
        )
    )


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


def _free_port() -> int:
    with socket.create_server((LOOPBACK, 0)) as probe:
        return int(probe.getsockname()[1])


def _answers(port: int) -> bool:
    try:
        socket.create_connection((LOOPBACK, port), timeout=1).close()
    except OSError:
        return False
    return True


def _wait_for(ready: Callable[[], object], processes: list[subprocess.Popen[bytes]], seconds: float = 10.0) -> None:
    ends_at = time.monotonic() + seconds
    while not ready():
        if any(process.poll() is not None for process in processes) or time.monotonic() > ends_at:
            raise RuntimeError("the origin did not start; see its `server.log` and `error.log`")
        time.sleep(0.02)
