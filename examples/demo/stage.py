"""
The stage of the demonstration: models at a counted source, an empty volume, and processes that wait for their start.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath

from origin import CountingProxy, SeaweedS3
from worker import Report, Role

MIB = 1024 * 1024
BUCKET = "models"
# Far longer than anything here takes, so that a demonstration that hangs ends by itself.
PATIENCE = 120.0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """
    A source that is counted, and a store that starts empty.
    """

    source: SeaweedS3
    proxy: CountingProxy
    root: Path


@dataclass(frozen=True, kw_only=True)
class Uploaded:
    """
    A model as it was put at the source, with the SHA-256 of every file from before the upload.
    """

    uri: str
    digests: Mapping[PurePosixPath, str]
    size_bytes: int


def upload(
    source: SeaweedS3, scratch: Path, name: str, files: Mapping[PurePosixPath, Path], *, shard_bytes: int
) -> Uploaded:
    """
    Put files and one generated shard under a prefix of their own.
    """
    shard = scratch / f"{name}.shard"
    _write_shard(shard, shard_bytes, seed=name)
    everything = {**files, PurePosixPath("shards/00001.bin"): shard}
    for path, local in everything.items():
        source.put(BUCKET, f"{name}/{path}", local)
    uploaded = Uploaded(
        uri=f"s3://{BUCKET}/{name}",
        digests={path: sha256_of(local) for path, local in everything.items()},
        size_bytes=sum(local.stat().st_size for local in everything.values()),
    )
    shard.unlink()
    return uploaded


def packaged_model(distribution: str) -> dict[PurePosixPath, Path]:
    """
    Find the model directory that a distribution ships, without importing it.
    """
    found: dict[PurePosixPath, Path] = {}
    for file in metadata.files(distribution) or ():
        _, marker, name = file.as_posix().partition("/model/")
        if marker:
            found[PurePosixPath(name)] = Path(str(file.locate()))
    return found


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_shard(path: Path, size_bytes: int, *, seed: str) -> None:
    # Slices of one pool are ten times faster than fresh numbers, and no two of them are the same bytes.
    numbers = random.Random(seed)
    pool = memoryview(numbers.randbytes(2 * MIB))
    with path.open("wb") as file:
        for _ in range(size_bytes // MIB):
            start = numbers.randrange(MIB)
            file.write(pool[start : start + MIB])


class Worker:
    """
    A process of its own that says `ready` and waits for the end of its standard input.
    """

    def __init__(self, stage: Stage, name: str, role: Role, uri: str, start: int) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("worker.py")), role, str(os.getpid()), str(stage.root), uri],
            stdin=start,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=_worker_environ(stage, name),
            start_new_session=True,  # Ctrl-C reaches the demonstration alone, which ends its processes in order.
        )

    def wait_until_ready(self) -> None:
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            self._fail()

    def report(self) -> Report:
        """
        Wait for the end of the process and return what it reports.
        """
        output, errors = self._process.communicate(timeout=PATIENCE)
        if self._process.returncode:
            self._fail(errors)
        return Report(**json.loads(output))

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _fail(self, errors: str = "") -> None:
        errors = errors or self._process.communicate(timeout=PATIENCE)[1]
        raise RuntimeError(f"{self.name} ended with {self._process.returncode}:\n{errors}")


def _worker_environ(stage: Stage, name: str) -> dict[str, str]:
    own = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "KSERVE_PVC_"))}
    counted = {**stage.source.environ, "AWS_ENDPOINT_URL": stage.proxy.endpoint, "NO_PROXY": "127.0.0.1"}
    return own | counted | {"POD_NAME": name, "PYTHONDONTWRITEBYTECODE": "1"}


@contextmanager
def waiting(stage: Stage, uri: str, cast: Mapping[str, Role]) -> Iterator[tuple[Sequence[Worker], Callable[[], None]]]:
    """
    Start processes that wait, and yield them with the call that lets all of them go at the same moment.

    None of them outlives the `with`.
    """
    start, gate = os.pipe()
    with io.FileIO(start) as shared, io.FileIO(gate, "w") as closing:
        workers: list[Worker] = []
        try:
            for name, role in cast.items():  # Not a comprehension: those already started must end, come what may.
                workers.append(Worker(stage, name, role, uri, shared.fileno()))
            for worker in workers:
                worker.wait_until_ready()
            yield workers, closing.close
        finally:
            for worker in workers:
                worker.kill()
