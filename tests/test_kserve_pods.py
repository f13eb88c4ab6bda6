"""
Two pods as the recipe for a shared store makes them, on two JuiceFS mounts: an initializer that sees the claim, and a
server that sees the directory of its model.

No kubelet runs here. What it does with `subPath` is done by `mount`: links are followed once, and the directory is
bound.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
import shell
from trees import model_files, read_tree
from volumes import CannotStartError, SharedVolume, juicefs

FILES = model_files(seed=70, big=3_000_000)
SIZE = sum(map(len, FILES.values()))


@pytest.fixture(scope="module")
def claim() -> Iterator[SharedVolume]:
    try:
        with juicefs(2) as volume:
            yield volume
    except CannotStartError as reason:
        pytest.skip(f"juicefs: {reason}")


@pytest.fixture
def bind(tmp_path: Path) -> Iterator:
    """
    Mount a directory of a volume into a pod, read-only or not, as a kubelet does.
    """
    bound: list[Path] = []

    def do(source: Path, *, read_only: bool) -> Path:
        place = tmp_path / f"pod-{len(bound)}"
        place.mkdir()
        options = ["--bind", "--options", "ro"] if read_only else ["--bind"]
        subprocess.run(["mount", *options, os.path.realpath(source), str(place)], check=True)
        bound.append(place)
        return place

    try:
        do(tmp_path, read_only=False)
    except subprocess.CalledProcessError:
        pytest.skip("`mount --bind` is not allowed here")
    yield do
    for place in reversed(bound):
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def start(uri: str, mount: Path, origin, proxy) -> subprocess.Popen[str]:
    """
    An initializer with the environment of the ClusterStorageContainer for a store.
    """
    environ = {
        **origin.environ,
        "AWS_ENDPOINT_URL": proxy.endpoint,
        "KSERVE_PVC_STORE": str(mount),
        "KSERVE_PVC_LEASE_SECONDS": "5",
    }
    command = [sys.executable, "-Im", "kserve_pvc", "initialize", uri, str(mount)]
    return subprocess.Popen(
        command, env=shell.clean_environ(environ), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_two_pods_share_one_download(claim, bind, upload, origin, proxy):
    """
    Started together on two nodes, both are ready, the source has sent each byte once, and the server cannot write even
    as root.
    """
    uri = upload(FILES)
    key = sha256(uri.encode()).hexdigest()[:16]

    pods = [start(uri, mount, origin, proxy) for mount in claim.mounts]
    said = [pod.communicate(timeout=60)[1] for pod in pods]
    servers = [bind(mount / "models" / key, read_only=True) for mount in claim.mounts]
    with pytest.raises(OSError, match="Read-only file system") as refused:
        (servers[0] / "adapter.bin").write_bytes(b"1")

    assert [pod.returncode for pod in pods] == [0, 0], said
    assert proxy.body_bytes() == SIZE
    assert [read_tree(server) for server in servers] == [FILES, FILES]
    assert refused.value.errno == errno.EROFS


def test_a_pod_that_comes_later_is_ready_without_the_source(claim, bind, upload, origin, proxy):
    """
    Once a model is there a replica on another node asks nobody.
    """
    uri = upload(FILES)
    key = sha256(uri.encode()).hexdigest()[:16]
    first = start(uri, claim.mounts[0], origin, proxy)
    first.communicate(timeout=60)
    asked = len(proxy.requests)

    second = start(uri, claim.mounts[1], origin, proxy)
    second.communicate(timeout=60)

    assert (first.returncode, second.returncode, len(proxy.requests)) == (0, 0, asked)
    assert read_tree(bind(claim.mounts[1] / "models" / key, read_only=True)) == FILES


def test_with_the_annotation_the_server_writes(claim, bind, upload, origin, proxy):
    """
    A mount that is writable lets the server keep what it fetches at run time, through the library, beside what the
    initializer put there.
    """
    uri, adapter = upload(FILES), f"file://{Path(__file__).parent / 'data' / 'kserve_tests'}"
    pod = start(uri, claim.mounts[0], origin, proxy)
    pod.communicate(timeout=60)
    server = bind(claim.mounts[0], read_only=False)
    program = (
        "import sys\nfrom kserve_pvc import ModelStore\n"
        "store = ModelStore.from_env(sys.argv[1], annotations={'storage.kserve.io/readonly': sys.argv[3]})\n"
        "print(store.ensure(sys.argv[2], progress=False).status)"
    )

    def fetch(annotation: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-I", "-c", program, str(server), adapter, annotation]
        return subprocess.run(command, env=shell.clean_environ(), capture_output=True, text=True)

    refused, allowed = fetch("False"), fetch("false")

    assert pod.returncode == 0
    assert "ReadOnlyStoreError" in refused.stderr
    assert allowed.stdout.split() == ["downloaded"]


def test_a_newer_version_moves_nothing_under_a_running_server(claim, bind, tmp_path, origin, proxy):
    """
    What a server has mounted stays as it is, file by file, while the next container mounts the newer version.
    """
    source = tmp_path / "source"
    shutil.copytree(Path(__file__).parent / "data" / "kserve_tests", source)
    uri = f"file://{source}"
    key = sha256(uri.encode()).hexdigest()[:16]
    start(uri, claim.mounts[0], origin, proxy).communicate(timeout=60)
    running = bind(claim.mounts[0] / "models" / key, read_only=True)
    before = read_tree(running)
    (source / "new.txt").write_text("new")

    command = [sys.executable, "-Im", "kserve_pvc", "--store", str(claim.mounts[1]), "ensure", "--refresh", uri]
    subprocess.run(command, env=shell.clean_environ(), check=True, capture_output=True)
    later = bind(claim.mounts[1] / "models" / key, read_only=True)

    assert read_tree(running) == before
    assert read_tree(later) == {**before, "new.txt": b"new"}
