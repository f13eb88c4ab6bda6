"""
Where outside locks are kept: a real Redis, and what a Kubernetes API server does with Leases.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from waiting import until

KUBECONFIG = "KSERVE_PVC_TEST_KUBECONFIG"
NAMESPACE = "models"
_LEASES = re.compile(rf"/apis/coordination\.k8s\.io/v1/namespaces/{NAMESPACE}/leases(?:/([a-z0-9-]+))?")


class Redis:
    """
    A Redis server with a password, which can be stopped, killed and started again on its port.
    """

    password = "correct horse"

    def __init__(self, place: Path) -> None:
        program = shutil.which("redis-server")
        if program is None:
            pytest.skip("`redis-server` is not installed")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._command = [
            program,
            "--bind",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--dir",
            str(place),
            "--save",
            "",
            "--appendonly",
            "no",
        ]
        self._command += ["--requirepass", self.password]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        until(self._answers)

    def pause(self) -> None:
        os.kill(self._process.pid, signal.SIGSTOP)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(100).startswith(b"-NOAUTH")
        except OSError:
            return False


class LeaseServer(ThreadingHTTPServer):
    """
    A stand-in for a Kubernetes API server, as none runs in the normal tests: it keeps Leases, and refuses to replace
    one by a writer that does not know its newest `resourceVersion`. `nox -s apiserver` runs the same tests against a
    real one.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.leases: dict[str, dict[str, Any]] = {}
        self.guard = threading.Lock()
        self.version = 0
        # Instead of an answer to everything: a status, or bytes that are no JSON.
        self.trouble: int | bytes | None = None
        self.tokens: set[str] = set()


class _Handler(BaseHTTPRequestHandler):
    server: LeaseServer
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16

    def do_GET(self) -> None:
        self._answer(self._read)

    def do_POST(self) -> None:
        self._answer(self._create)

    def do_PUT(self) -> None:
        self._answer(self._replace)

    def _answer(self, act: Any) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.tokens.add(self.headers.get("Authorization", ""))
        found = _LEASES.fullmatch(self.path.partition("?")[0])
        trouble = self.server.trouble
        if isinstance(trouble, bytes):
            return self._send(200, trouble)
        if trouble is not None or found is None:
            return self._send(trouble or 404, _status(trouble or 404))
        with self.server.guard:
            status, document = act(found[1], json.loads(body) if body else {})
        return self._send(status, json.dumps(document).encode())

    def _read(self, name: str, _: Any) -> tuple[int, Any]:
        lease = self.server.leases.get(name)
        return (404, _failure(404)) if lease is None else (200, lease)

    def _create(self, _: str, lease: Any) -> tuple[int, Any]:
        name = lease["metadata"]["name"]
        return (409, _failure(409)) if name in self.server.leases else (201, self._store(name, lease))

    def _replace(self, name: str, lease: Any) -> tuple[int, Any]:
        present = self.server.leases.get(name)
        if present is None:
            return 404, _failure(404)
        if lease["metadata"].get("resourceVersion") != present["metadata"]["resourceVersion"]:
            return 409, _failure(409)
        return 200, self._store(name, lease)

    def _store(self, name: str, lease: Any) -> Any:
        self.server.version += 1
        self.server.leases[name] = {
            **lease,
            "metadata": {"name": name, "namespace": NAMESPACE, "resourceVersion": str(self.server.version)},
        }
        return self.server.leases[name]

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def _failure(code: int) -> dict[str, Any]:
    return {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code}


def _status(code: int) -> bytes:
    return json.dumps(_failure(code)).encode()


@contextmanager
def lease_server(place: Path) -> Iterator[tuple[LeaseServer | None, Path]]:
    """
    A server, and the kubeconfig that leads to it; None if that of a real one is given.
    """
    if KUBECONFIG in os.environ:
        yield None, Path(os.environ[KUBECONFIG])
        return
    with LeaseServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        config = place / "kubeconfig"
        config.write_text(yaml.safe_dump(_config(f"http://127.0.0.1:{server.server_address[1]}")))
        yield server, config
        server.shutdown()
        thread.join()


def _config(url: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        "clusters": [{"name": "test", "cluster": {"server": url}}],
        "users": [{"name": "test", "user": {"token": "token-of-the-tests"}}],
    }
