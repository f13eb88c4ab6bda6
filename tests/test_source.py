"""
How the listing of a source becomes what a store works with.
"""

import hashlib
import random
from pathlib import PurePosixPath

import pytest

from kserve_pvc import FileEntry, PolicyError, RemoteFile, Resolved, SourceNotFoundError, UnsafePathError, order_listing
from kserve_pvc._source import contract as _source
from kserve_pvc._source.ref import parse_ref

URI = "s3://bucket/llama"
REF = parse_ref(URI)


def remote(path: str, size_bytes: int = 1, token: str | None = "t") -> RemoteFile:
    return RemoteFile(
        entry=FileEntry(path=path, size_bytes=size_bytes, token=token),
        address=f"bucket/{path}",
        pin={"IfMatch": str(token)},
    )


def test_a_listing_is_put_in_order():
    """
    Files come in the order of their paths, whatever the order of the listing, and nothing of them is lost.
    """
    files = [remote(name, size) for size, name in enumerate(["a", "a-b/c", "a.b", "b/a", "b/a.c", "c"], start=1)]
    shuffled = random.Random(0).sample(files, len(files))

    result = order_listing(REF, iter(shuffled), version="v7")

    assert result == Resolved(ref=REF, version="v7", files=tuple(sorted(files, key=lambda file: file.entry.path)))
    assert result.size_bytes == 21


def test_patterns_choose_the_files():
    """
    Only what the patterns of the ref let through is listed.
    """
    ref = parse_ref(URI, allow_patterns=["*.json", "w/"], ignore_patterns="*.bin")

    result = order_listing(ref, map(remote, ["w/a.bin", "w/b", "config.json", "readme.md"]))

    assert [str(file.entry.path) for file in result.files] == ["config.json", "w/b"]


@pytest.mark.parametrize(("names", "patterns"), [([], None), (["a.bin"], "*.json"), (["a.bin"], [])])
def test_a_source_without_files_is_not_found(names, patterns):
    """
    A model of no files does not exist, be it that the source has none or that the patterns let none through.
    """
    ref = parse_ref(URI, revision="main", allow_patterns=patterns)

    with pytest.raises(SourceNotFoundError) as caught:
        order_listing(ref, map(remote, names))

    assert caught.value.fields == {
        "uri": f"{URI} at main",
        "reason": "it has no files, or the patterns exclude them all",
        "hint": "",
    }


@pytest.mark.parametrize(
    "names",
    [("Model.bin", "model.bin"), ("caf\u00e9", "cafe\u0301"), ("a", "a/b"), ("D/a", "d/b"), ("a", "a")],
    ids=ascii,
)
def test_files_that_may_be_one_refuse_the_model(names):
    """
    A listing with colliding names is refused as a whole.
    """
    with pytest.raises(UnsafePathError):
        order_listing(REF, map(remote, names))


def test_a_file_that_is_listed_twice_refuses_the_model():
    """
    A source that repeats one and the same file cannot be trusted to list the others.
    """
    file = remote("a")

    with pytest.raises(UnsafePathError):
        order_listing(REF, [file, file])


def test_a_model_of_the_most_files_is_accepted(monkeypatch):
    """
    A listing of exactly `MAX_FILES` is taken whole.
    """
    monkeypatch.setattr(_source, "MAX_FILES", 3)

    result = order_listing(REF, map(remote, "abc"))

    assert [str(file.entry.path) for file in result.files] == ["a", "b", "c"]


def test_a_listing_without_end_is_refused(monkeypatch):
    """
    A listing is read no further than one file beyond `MAX_FILES`, then refused.
    """
    monkeypatch.setattr(_source, "MAX_FILES", 3)
    listing = (remote(str(number)) for number in range(100))

    with pytest.raises(PolicyError) as caught:
        order_listing(REF, listing)

    assert caught.value.fields == {"subject": URI, "rule": "it has more than 3 files; name a smaller part of it"}
    assert str(next(listing).entry.path) == "4"


def test_only_chosen_files_collide():
    """
    Patterns are applied first, so they can get a person out of a collision.
    """
    ref = parse_ref(URI, ignore_patterns="model.bin")

    result = order_listing(ref, map(remote, ["Model.bin", "model.bin"]))

    assert [file.entry.path for file in result.files] == [PurePosixPath("Model.bin")]


def test_an_empty_file_is_a_file():
    """
    A model of one empty file is a model.
    """
    result = order_listing(REF, [remote("a", 0)])

    assert ([file.entry.size_bytes for file in result.files], result.size_bytes) == ([0], 0)


def test_the_version_of_a_known_listing_never_changes():
    """
    Without a name of its own a version is a SHA-256 over path, size and token of every file.
    """
    result = order_listing(REF, [remote("b", 2, None), remote("a", 1, "t")])

    assert result.version == "sha256:52e6fd4c9b57303822b90a6c37c0d918a73ea6858da59bf20d8cfe852cfec27c"
    assert result.version == "sha256:" + hashlib.sha256(b'["a", 1, "t"]["b", 2, null]').hexdigest()


def test_the_version_does_not_depend_on_the_order_of_the_listing():
    """
    The same files make the same version, however the source lists them and whatever their addresses are.
    """
    files = [remote(name) for name in ("a", "b", "c")]
    moved = [RemoteFile(entry=file.entry, address="elsewhere", pin={}) for file in files]

    assert order_listing(REF, files).version == order_listing(REF, reversed(moved)).version


def test_whatever_changes_at_the_source_changes_the_version():
    """
    Another path, size or token, and one file more or fewer, each make another version.
    """
    listings = [
        [remote("a")],
        [remote("b")],
        [remote("a", 2)],
        [remote("a", token="u")],
        [remote("a", token="")],
        [remote("a"), remote("b")],
        [remote("a"), remote("b"), remote("c")],
        [remote("a1", 1)],
        [remote("a", 11)],
        [remote("a", 1, "1")],
        [remote("a", 1, "t1")],
        [remote("a", 1, None)],
        [remote("a", 1, "None")],
        [remote("a", 1, "null")],
        [remote("a", 1, "t"), remote("b", 2, "u")],
        [remote("a", 1, "t\nb\x002\x00u")],
        [remote("a", 1, 't"]["b", 2, "u')],
    ]

    versions = {order_listing(REF, listing).version for listing in listings}

    assert len(versions) == len(listings)
