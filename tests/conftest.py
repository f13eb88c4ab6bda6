"""
Real parts for the tests: an S3 server, a proxy that counts what it sends, and volumes with faults.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import fsspec.config  # noqa: F401  # While the environment is untouched: fsspec keeps what it finds there.
import pytest
import shell
from origin import CountingProxy, SeaweedS3
from trees import model_files, write_files

BUCKET = "models"
# Read when gcsfs is imported: emulators do not have the gRPC service that it asks about the layout of a bucket.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")


@pytest.fixture(scope="session")
def origin() -> Iterator[SeaweedS3]:
    """
    A real S3 server, once for all tests.
    """
    pytest.importorskip("botocore", reason="`botocore` is not installed, which fills the S3 server")
    with SeaweedS3() as server:
        server.make_bucket(BUCKET)
        yield server


@pytest.fixture
def proxy(origin: SeaweedS3) -> Iterator[CountingProxy]:
    """
    What stands between the store and the S3 server, and counts.
    """
    with CountingProxy(origin.endpoint) as proxy:
        yield proxy


@pytest.fixture
def s3(origin: SeaweedS3, proxy: CountingProxy) -> dict[str, object]:
    """
    Arguments of a `ModelStore` that reaches the S3 server through the proxy.
    """
    return {"storage_options": {"endpoint_url": proxy.endpoint, "key": origin.key, "secret": origin.secret}}


@pytest.fixture
def initializer_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """
    Nothing of this process's environment is a setting of an initializer.
    """
    kept = shell.clean_environ()
    for name in [name for name in os.environ if name not in kept or name.startswith("STORAGE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("KSERVE_PVC_TERMINATION_LOG", str(tmp_path / "no-such-log"))


Upload = Callable[[Mapping[str, bytes]], str]


@pytest.fixture
def upload(origin: SeaweedS3, request: pytest.FixtureRequest) -> Upload:
    """
    Put files under a prefix that belongs to the test, and return its URI.
    """
    prefix = hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:12]

    def put(files: Mapping[str, bytes]) -> str:
        for name, data in files.items():
            origin.put(BUCKET, f"{prefix}/model/{name}", data)
        return f"s3://{BUCKET}/{prefix}/model"

    return put


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """
    An empty volume.
    """
    volume = tmp_path / "volume"
    volume.mkdir()
    return volume


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """
    A small model on a local file system: two levels, an empty file, more than one part at small part sizes.
    """
    place = tmp_path / "source"
    write_files(place, model_files(seed=1))
    return place


@pytest.fixture
def tool() -> Callable[[str], str]:
    """
    Find a program, or skip the test by the program's name.
    """

    def find(name: str) -> str:
        path = shutil.which(name)
        if path is None:
            pytest.skip(f"`{name}` is not installed")
        return path

    return find


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """
    Mount something for the time of a test; skipped by name where mounting is not allowed.
    """
    mounted: list[Path] = []

    def do(*arguments: str, at: str = "mounted") -> Path:
        place = tmp_path / at
        place.mkdir(exist_ok=True)
        result = subprocess.run(["mount", *arguments, str(place)], capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"`mount {' '.join(arguments)}` is not allowed here: {result.stderr.strip()}")
        mounted.append(place)
        return place

    yield do
    for place in reversed(mounted):
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture
def as_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("it needs root, to act as other users")
