"""
Names under which a pod can mount a model, and KServe's own name for it: links that follow the log.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import actors
import pytest
import shell
from trees import model_files, read_tree, write_files

from kserve_pvc import ModelNotFoundError, ModelStore, ReadOnlyStoreError, UnsafePathError, VolumeError

FIRST, SECOND = (model_files(seed=number, big=50_000) for number in (60, 61))


@pytest.fixture
def source(tmp_path):
    place = tmp_path / "source"
    write_files(place, FIRST)
    return place


@pytest.fixture
def uri(source):
    return f"file://{source}"


def view(root: Path, uri: str) -> Path:
    """
    Where KServe looks for a model: the first 16 hex digits of the SHA-256 of its URI.
    """
    return root / "models" / hashlib.sha256(uri.encode()).hexdigest()[:16]


def change(source: Path) -> None:
    for path in [path for path in source.rglob("*") if path.is_file()]:
        path.unlink()
    write_files(source, SECOND)


def test_a_model_is_found_where_kserve_looks_for_it(root, uri):
    """
    The view is a relative link inside of the volume, to plain files.
    """
    model = ModelStore(root, mode="rw").ensure(uri, progress=False)

    target = os.readlink(view(root, uri))

    assert target == f"{model.key}/{model.path.name}"
    assert read_tree(view(root, uri)) == FIRST
    assert [path for path in view(root, uri).rglob("*") if path.is_symlink()] == []


def test_a_newer_version_is_seen_by_who_looks_later(root, source, uri):
    """
    The view and the name lead to the newer version at once; who has opened the old directory keeps it, file by file.
    """
    store = ModelStore(root, mode="rw")
    store.ensure(uri, progress=False)
    store.alias("llama", uri)
    running = os.open(root / "names/llama", os.O_RDONLY | os.O_DIRECTORY)  # As a mount, it is no path any more.
    opened = os.open("weights/a.bin", os.O_RDONLY, dir_fd=running)
    named = os.readlink(root / "names/llama")
    change(source)

    store.ensure(uri, refresh=True, progress=False)

    assert read_tree(root / "names/llama") == read_tree(view(root, uri)) == SECOND
    assert os.readlink(root / "names/llama") == named == f"../models/{view(root, uri).name}"
    with open(opened, "rb") as old:
        assert old.read() == FIRST["weights/a.bin"]
    os.close(running)


def test_a_removed_model_has_no_view_and_its_name_waits(root, uri):
    """
    A name leads nowhere while its model is gone, and to it again once it is back.
    """
    store = ModelStore(root, mode="rw")
    store.ensure(uri, progress=False)
    store.alias("llama", uri)

    store.remove(uri, trash_seconds=0)
    gone = (view(root, uri).is_symlink(), (root / "names/llama").exists(), dict(store.aliases()))
    model = store.ensure(uri, progress=False)

    assert gone == (False, False, {"llama": model.key})
    assert read_tree(root / "names/llama") == FIRST


def test_names_are_moved_and_dropped(root, uri, tmp_path):
    """
    A name may lead to another model from now on, and go; the models stay.
    """
    write_files(tmp_path / "other", SECOND)
    other = f"file://{tmp_path}/other"
    store = ModelStore(root, mode="rw")
    keys = {place: store.ensure(place, progress=False).key for place in (uri, other)}
    store.alias("a", uri)
    store.alias("b", uri)

    store.alias("a", other)
    moved = dict(store.aliases())
    store.drop_alias("b")
    store.drop_alias("b")

    assert moved == {"a": keys[other], "b": keys[uri]}
    assert dict(ModelStore(root).aliases()) == {"a": keys[other]}
    assert read_tree(root / "names/a") == SECOND
    assert uri in store


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", ".hidden", "a.", "-a", "a" * 64, "ä", "a\nb", "a b"])
def test_what_cannot_stand_in_a_path_is_no_name(root, uri, name):
    """
    A name is one plain part of a path.
    """
    store = ModelStore(root, mode="rw")
    store.ensure(uri, progress=False)

    for act in (lambda: store.alias(name, uri), lambda: store.drop_alias(name)):
        with pytest.raises(UnsafePathError, match="an alias has 1 to 63"):
            act()

    assert not (root / "names").exists()


def test_only_what_is_present_gets_a_name_and_only_from_a_writer(root, uri):
    """
    A name for nothing is refused, and a read-only store writes none.
    """
    with pytest.raises(ModelNotFoundError):
        ModelStore(root, mode="rw").alias("llama", uri)
    ModelStore(root, mode="rw").ensure(uri, progress=False)
    for act in (lambda: ModelStore(root).alias("llama", uri), lambda: ModelStore(root).drop_alias("llama")):
        with pytest.raises(ReadOnlyStoreError):
            act()

    assert not (root / "names").exists()


@pytest.mark.parametrize("where", ["name", "view"])
@pytest.mark.parametrize("what", ["directory", "file"])
def test_what_somebody_else_put_there_stays(root, uri, where, what):
    """
    A directory or file in the place of a link is never replaced; the download succeeds, and naming says what is in the
    way.
    """
    place = view(root, uri) if where == "view" else root / "names/llama"
    place.parent.mkdir(parents=True)
    if what == "directory":
        write_files(place, {"theirs": b"1"})
    else:
        place.write_bytes(b"1")
    store = ModelStore(root, mode="rw")
    model = store.ensure(uri, progress=False)

    with pytest.raises(VolumeError, match="is not a link"):
        store.alias("llama", uri)
    store.drop_alias("llama")

    assert (read_tree(place) == {"theirs": b"1"}) if what == "directory" else place.read_bytes() == b"1"
    assert read_tree(model.path) == FIRST


def test_an_empty_directory_gives_way(root, uri):
    """
    Kubernetes makes one where a pod mounts a `subPath` too early; it does not keep the model away from later pods.
    """
    view(root, uri).mkdir(parents=True)

    ModelStore(root, mode="rw").ensure(uri, progress=False)

    assert read_tree(view(root, uri)) == FIRST


def test_a_planted_link_is_replaced_and_never_followed(root, uri, tmp_path):
    """
    Links that lead out of the volume are not listed, and replacing one changes nothing behind it.
    """
    outside = tmp_path / "outside"
    write_files(outside, {"precious": b"1"})
    (root / "names").mkdir()
    (root / "models").mkdir()
    (root / "names/llama").symlink_to(outside)
    (root / "names/other").symlink_to("../../outside")
    view(root, uri).symlink_to(outside)
    store = ModelStore(root, mode="rw")
    store.ensure(uri, progress=False)
    listed = dict(store.aliases())

    store.alias("llama", uri)
    store.drop_alias("other")

    assert listed == {}
    assert read_tree(root / "names/llama") == FIRST
    assert read_tree(outside) == {"precious": b"1"}


def test_a_planted_directory_of_names_is_not_entered(root, uri, tmp_path):
    """
    Where `names` itself is a link, nothing is written behind it.
    """
    outside = tmp_path / "outside"
    outside.mkdir()
    (root / "names").symlink_to(outside)
    store = ModelStore(root, mode="rw")
    store.ensure(uri, progress=False)

    with pytest.raises((UnsafePathError, VolumeError)):
        store.alias("llama", uri)

    assert list(outside.iterdir()) == []


def test_a_volume_without_links_keeps_its_models(root, uri, monkeypatch):
    """
    Where `symlink` is not supported a download succeeds, and naming says why it cannot. The refusal is injected.
    """

    def symlink(*_, **__):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", symlink)
    store = ModelStore(root, mode="rw")

    model = store.ensure(uri, progress=False)
    with pytest.raises(VolumeError, match="no symbolic links"):
        store.alias("llama", uri)

    assert read_tree(model.path) == FIRST


def test_a_reader_of_the_view_never_finds_nothing(root, uri):
    """
    While versions come and go the view leads to a model at every moment, since a link is replaced and not removed.
    """
    ModelStore(root, mode="rw").ensure(uri, progress=False)
    results = actors.context().Queue()
    writers = [actors.start(actors.ensure, str(root), uri, {}, {"force_download": True}, results) for _ in range(4)]
    found = []
    while any(writer.is_alive() for writer in writers):
        found.append(os.readlink(view(root, uri)))
    outcomes = [results.get(timeout=30) for _ in writers]
    actors.run_all(writers)

    assert len(found) > len(set(found)) >= 1
    assert {outcome[1] for outcome in outcomes} <= {"downloaded", "waited"}
    assert os.readlink(view(root, uri)) == "/".join(ModelStore(root).get(uri).path.parts[-2:])


def test_the_command_gives_lists_and_drops_names(root, uri):
    """
    `alias NAME URI` names, `alias` lists, `alias --drop NAME` takes away; a name without a model is a wrong use.
    """
    key = ModelStore(root, mode="rw").ensure(uri, progress=False).key

    given = shell.kserve_pvc(root, "alias", "llama", uri)
    listed = shell.kserve_pvc(root, "--json", "alias")
    alone = shell.kserve_pvc(root, "alias", "llama")
    dropped = shell.kserve_pvc(root, "--json", "alias", "--drop", "llama")

    assert given.stdout.split() == ["NAME", "KEY", "llama", key]
    assert (shell.document(listed), shell.document(dropped)) == ({"llama": key}, {})
    assert (alone.returncode, "say which model `llama`" in alone.stderr) == (2, True)
