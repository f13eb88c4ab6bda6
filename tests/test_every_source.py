"""
One model, wherever it comes from: each source brings the same bytes under the same names.
"""

from __future__ import annotations

import hashlib
import io
import random
import tarfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import azurite
import gcs
import pytest
from hub import HuggingFace
from remotes import DirectoryRemote, FsspecMemoryRemote, S3Remote
from trees import digests, read_tree, write_files
from webserver import WebServer

from kserve_pvc import ModelStore, UnsafePathError

# Nested, nothing, a name that each service can hold though it needs care in a URL, and more than one part.
FILES = {
    "config.json": b'{"model": "everywhere"}',
    "deep/er/tokens.txt": b"one\ntwo\n",
    "deep/empty": b"",
    "odd name + 100% (ü)=1&2.bin": bytes(range(256)),
    "weights.bin": random.Random(9).randbytes(20 << 20),
}
PLACE = "every/source"
Place = tuple[str, dict[str, object]]


# A name that no store keeps, and an archive's or a bucket's may have. The patterns leave it out.
LEFT_OUT = {"left out./notes": b"no part of it"}


def put_all(remote: object) -> Place:
    for name, data in (FILES | LEFT_OUT).items():
        remote.put(f"{PLACE}/{name}", data)
    return remote.uri(PLACE), dict(remote.storage_options)


def on_s3(request: pytest.FixtureRequest, stack: ExitStack) -> Place:
    pytest.importorskip("s3fs", reason="`s3fs` is not installed")
    origin = request.getfixturevalue("origin")
    origin.make_bucket("everywhere")
    return put_all(S3Remote(origin, "everywhere"))


def on_gs(request: pytest.FixtureRequest, stack: ExitStack) -> Place:
    pytest.importorskip("google.auth", reason="`google-auth` is not installed")
    try:
        return put_all(stack.enter_context(gcs.FakeGCS()))
    except gcs.MissingError as missing:
        pytest.skip(str(missing))


def on_azure(request: pytest.FixtureRequest, stack: ExitStack) -> Place:
    pytest.importorskip("azure.storage.blob", reason="`azure-storage-blob` is not installed")
    try:
        return put_all(stack.enter_context(azurite.Azurite()))
    except azurite.MissingError as missing:
        pytest.skip(str(missing))


def on_a_hub(request: pytest.FixtureRequest, stack: ExitStack) -> Place:
    return put_all(stack.enter_context(HuggingFace()))


def in_an_archive(request: pytest.FixtureRequest, stack: ExitStack) -> Place:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1) as archive:
        for name, data in (FILES | LEFT_OUT).items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    remote = stack.enter_context(WebServer())
    remote.put("model.tar.gz", packed.getvalue())
    return remote.uri("model.tar.gz"), dict(remote.storage_options)


def in_a_directory(request: pytest.FixtureRequest, stack: ExitStack) -> Place:
    return put_all(DirectoryRemote(request.getfixturevalue("tmp_path") / "files", "file"))


def on_another_claim(request: pytest.FixtureRequest, stack: ExitStack) -> Place:
    claim = request.getfixturevalue("tmp_path") / "claim"
    write_files(claim / PLACE, FILES | LEFT_OUT)
    return f"pvc://everywhere/{PLACE}", {"claims": {"everywhere": claim}}


def in_memory(request: pytest.FixtureRequest, stack: ExitStack) -> Place:
    return put_all(FsspecMemoryRemote())


def in_a_directory_by_fsspec(request: pytest.FixtureRequest, stack: ExitStack) -> Place:
    return put_all(DirectoryRemote(request.getfixturevalue("tmp_path") / "local", "fsspec+local"))


SOURCES: dict[str, Callable[[pytest.FixtureRequest, ExitStack], Place]] = {
    "s3": on_s3,
    "gs": on_gs,
    "azure": on_azure,
    "hf": on_a_hub,
    "http": in_an_archive,
    "file": in_a_directory,
    "pvc": on_another_claim,
    "fsspec-memory": in_memory,
    "fsspec-local": in_a_directory_by_fsspec,
}


@pytest.fixture
def offered(request: pytest.FixtureRequest) -> Iterator[Place]:
    """
    The model at one source: its URI and how to reach it.
    """
    with ExitStack() as stack:
        yield SOURCES[request.param](request, stack)


@pytest.mark.parametrize("offered", SOURCES, indirect=True)
def test_the_same_model_arrives_from_every_source(root, offered):
    """
    Names, bytes and recorded digests are those of the model, and a file that is left out may have any name.
    """
    uri, options = offered
    store = ModelStore(root, mode="rw", storage_options=options)

    with pytest.raises(UnsafePathError, match="left out"):
        store.ensure(uri, progress=False)
    model = store.ensure(uri, ignore_patterns="left out./notes", progress=False)
    chosen = store.ensure(uri, allow_patterns=("config.json", "deep/*"), progress=False)

    recorded = {str(file.path): (file.size_bytes, file.sha256) for file in model.record.files}
    assert read_tree(model.path).keys() == FILES.keys()
    assert {name: hashlib.sha256(data).hexdigest() for name, data in read_tree(model.path).items()} == digests(FILES)
    assert recorded == {name: (len(data), digests(FILES)[name]) for name, data in FILES.items()}
    assert (model.files, model.size_bytes) == (len(FILES), sum(map(len, FILES.values())))
    assert read_tree(chosen.path).keys() == {"config.json", "deep/er/tokens.txt", "deep/empty"}
    assert store.verify(model.ref, "full").ok
