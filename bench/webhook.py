"""
How long the admission webhook takes at 100 requests a second over TLS, while its certificate is renewed.

Run it with `nox -s bench-webhook`. There is no peer: nothing else takes this decision.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import trustme

RATE = 100
CONNECTIONS = 8
POLICY = "version: 1\nrules:\n- {namespaces: [team], claim: models, access: download}\n"
SOURCE = "internal.serving.kserve.io/storage-initializer-sourceuri"


def review() -> bytes:
    """
    A pod with five containers and eighty variables, which asks for a claim.
    """
    side = [{"name": f"side-{i}", "env": [{"name": f"E{j}", "value": "x" * 40} for j in range(20)]} for i in range(4)]
    pod = {
        "kind": "Pod",
        "metadata": {"annotations": {SOURCE: "s3://bucket/model", "kserve-pvc/claim": "models"}},
        "spec": {"containers": [{"name": "kserve-container"}, *side]},
    }
    kind = {"group": "", "version": "v1", "kind": "Pod"}
    request = {"uid": "1", "kind": kind, "namespace": "team", "operation": "CREATE", "object": pod}
    return json.dumps({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request}).encode()


def renew(authority: trustme.CA, place: Path) -> None:
    """
    Replace certificate and key, each in one step.
    """
    made = authority.issue_cert("localhost")
    for name, data in (
        ("tls.key", made.private_key_pem.bytes()),
        ("tls.crt", b"".join(blob.bytes() for blob in made.cert_chain_pems)),
    ):
        (place / f"{name}.new").write_bytes(data)
        (place / f"{name}.new").replace(place / name)


def ask(port: int, trust: ssl.SSLContext, first: int, count: int, began: float, took: list[float]) -> None:
    """
    Send every eighth request when it is due, whatever the ones before took.
    """
    connection, body = http.client.HTTPSConnection("localhost", port, context=trust), review()
    for number in range(first, count, CONNECTIONS):
        time.sleep(max(0.0, began + number / RATE - time.perf_counter()))
        sent = time.perf_counter()
        connection.request("POST", "/mutate-pods", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = json.loads(response.read())
        assert response.status == 200, answer
        assert answer["response"]["patch"], answer
        took.append(time.perf_counter() - sent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=15, metavar="N", help="for how long to ask")
    count = parser.parse_args().seconds * RATE
    with tempfile.TemporaryDirectory() as directory:
        place, authority = Path(directory), trustme.CA()
        renew(authority, place)
        (place / "policy.yaml").write_text(POLICY)
        files = ["--policy", place / "policy.yaml", "--tls-cert", place / "tls.crt", "--tls-key", place / "tls.key"]
        command = [
            sys.executable,
            "-m",
            "kserve_pvc",
            "webhook",
            *map(str, files),
            "--host",
            "127.0.0.1",
            "--port",
            "0",
        ]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as server:
            assert server.stderr is not None
            port = int(re.findall(r":(\d+)$", server.stderr.readline().strip())[0])
            trust = ssl.create_default_context()
            authority.configure_trust(trust)
            took: list[float] = []
            began = time.perf_counter() + 0.5
            askers = [
                threading.Thread(target=ask, args=(port, trust, first, count, began, took))
                for first in range(CONNECTIONS)
            ]
            for asker in askers:
                asker.start()
            while any(asker.is_alive() for asker in askers):
                renew(authority, place)
                time.sleep(2)
            server.terminate()
            used = os.wait4(server.pid, 0)[2]
    took.sort()
    assert len(took) == count, f"{count - len(took)} requests failed"
    middle, late, last = (1e3 * took[int(len(took) * part)] for part in (0.5, 0.99, 1 - 1e-9))
    print(
        f"{count} requests of {len(review())} bytes: p50 {middle:.1f} ms, p99 {late:.1f} ms, the longest {last:.1f} ms"
    )
    print(
        f"{1e3 * (used.ru_utime + used.ru_stime) / count:.2f} ms of processor time each; load {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main()
