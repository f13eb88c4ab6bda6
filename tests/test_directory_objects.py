"""
Empty objects that stand for directories, on every object store, whichever way it is reached.

S3 is an imitation here, as SeaweedFS cannot hold an object and others below its name.
"""

from __future__ import annotations

import hashlib

import pytest
from azurite import Azurite
from azurite import MissingError as NoAzurite
from gcs import FakeGCS
from gcs import MissingError as NoGCS
from trees import read_tree
from weather import StormyS3, refuse

from kserve_pvc import ModelStore, SourceNotFoundError

TREE = {"config.json": b"{}", "sub/w.bin": b"w", "sub/deep/v.bin": b"v", "empty.txt": b""}
# `sub-` and `sub.` sort between `sub` and what lies below it.
MARKED = {**TREE, "": b"", "sub": b"", "sub/deep": b"", "sub-1": b"1", "sub.txt": b"", "alone/": b"", "alone": b""}
EXPECTED = {**TREE, "sub-1": b"1", "sub.txt": b""}


@pytest.fixture(scope="module")
def azurite():
    """
    A real blob service.
    """
    try:
        with Azurite() as server:
            yield server
    except NoAzurite as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def gcs():
    """
    A service that speaks the JSON API of Google.
    """
    try:
        with FakeGCS() as server:
            yield server
    except NoGCS as missing:
        pytest.skip(str(missing))


@pytest.fixture
def storm():
    """
    An S3 server with small pages, so that a marker and what lies below it come in different ones.
    """
    with StormyS3(page_keys=2) as server:
        server.buckets["bkt"] = {}
        yield server


def place(name: str, request, storm) -> tuple[object, str, dict[str, object]]:
    """
    Return what puts an object, the URI of a prefix, and the options, of one way to reach one service.
    """
    service, _, way = name.partition(":")
    prefix = hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:12]
    if service == "s3":
        more = {"direct": {}, "s3fs": {"version_aware": False}, "fsspec": {"token": None}}[way or "direct"]
        options = {**storm.options, **({} if way == "fsspec" else more)}
        scheme = "fsspec+s3" if way == "fsspec" else "s3"
        return (lambda key, data: storm.put("bkt", f"{prefix}/{key}", data)), f"{scheme}://bkt/{prefix}/m", options
    server = request.getfixturevalue({"gs": "gcs", "az": "azurite"}[service])
    return (lambda key, data: server.put(f"{prefix}/{key}", data)), server.uri(f"{prefix}/m"), server.storage_options


@pytest.mark.parametrize("slash", ["", "/"])
@pytest.mark.parametrize("way", ["s3", "s3:s3fs", "s3:fsspec", "gs", "az"])
def test_an_empty_object_with_others_below_it_is_a_directory(way, slash, root, storm, request):
    """
    The prefix and a directory inside it may each be marked by an empty object of its name, with or without a slash.
    """
    put, uri, options = place(way, request, storm)
    for name, data in MARKED.items():
        put(f"m/{name}" if name else "m", data)

    model = ModelStore(root, mode="rw", storage_options=options).ensure(uri + slash, progress=False)

    assert read_tree(model.path) == EXPECTED


@pytest.mark.parametrize("way", ["s3", "s3:fsspec", "gs", "az"])
def test_an_empty_object_with_nothing_below_it_is_a_file(way, root, storm, request):
    """
    A name that only begins like its own does not make a directory of an empty object.
    """
    put, uri, options = place(way, request, storm)
    for name in ("m", "m-2/w.bin", "m.bin"):
        put(name, b"w" * (name != "m"))

    assert read_tree(ModelStore(root, mode="rw", storage_options=options).ensure(uri, progress=False).path) == {
        "m": b""
    }


def test_patterns_do_not_make_a_file_of_a_directory(root, storm):
    """
    A marker stays a marker where patterns leave out all that lies below it.
    """
    for key in ("m/sub", "m/sub/w.bin", "m/a.txt"):
        storm.put("bkt", key, b"" if key == "m/sub" else b"a")
    store = ModelStore(root, mode="rw", storage_options=storm.options)

    model = store.ensure("s3://bkt/m", ignore_patterns=["sub/*"], progress=False)

    assert read_tree(model.path) == {"a.txt": b"a"}


def test_a_directory_without_files_is_not_found(root, storm):
    """
    An empty object beside a marker of its own name is no model of one empty file.
    """
    for key in ("m", "m/"):
        storm.put("bkt", key, b"")

    with pytest.raises(SourceNotFoundError):
        ModelStore(root, mode="rw", storage_options=storm.options).ensure("s3://bkt/m", progress=False)


def test_an_empty_object_is_a_file_for_those_who_may_not_list(root, storm):
    """
    The right to read one object is enough for one object, even if it is empty.
    """
    storm.put("bkt", "m", b"")
    storm.script("list", refuse(403, "AccessDenied"))

    model = ModelStore(root, mode="rw", storage_options=storm.options).ensure("s3://bkt/m", progress=False)

    assert read_tree(model.path) == {"m": b""}
