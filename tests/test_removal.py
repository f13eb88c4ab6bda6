"""
Removing what others read, download, or have left behind.
"""

from __future__ import annotations

from threading import Event, Thread

import pytest
from memory import MemorySource

from kserve_pvc import ModelInUseError, ModelNotFoundError, ModelStore
from kserve_pvc._format import layout
from kserve_pvc._keys.log import read_all
from kserve_pvc._volume.reading import Volume
from kserve_pvc._volume.tree import Tree
from kserve_pvc._volume.writing import VolumeWriter

URI = "s3://bucket/model"
FILES = {"a.bin": b"a" * 1000, "b.bin": b"b" * 1000}


@pytest.fixture
def store(root):
    return ModelStore(root, mode="rw", lease_seconds=0.3, backends={"s3": MemorySource({URI: FILES})})


def kinds(store: ModelStore, key: str) -> list[str]:
    return [entry.type for entry in read_all(Volume(store.root), key)]


def test_a_reader_keeps_its_model(store):
    """
    While somebody holds the model it cannot be removed: the tombstone is undone, and the model is there as before.
    """
    model = store.ensure(URI, progress=False)

    with store.open(URI) as held:
        with pytest.raises(ModelInUseError, match="in use by pod"):
            ModelStore(store.root, mode="rw").remove(URI)
        kept = (held.path / "a.bin").read_bytes()

    assert kept == FILES["a.bin"]
    assert kinds(store, model.key) == ["commit", "tombstone", "restore"]
    assert store.get(URI).path == model.path
    assert store.verify(URI, "full").ok


def test_a_reader_looks_again_under_its_lease(store, monkeypatch):
    """
    A model that was replaced before the lease could count is let go, and the newer one is held.
    """
    from kserve_pvc._keys import claims as _claims

    first = store.ensure(URI, progress=False)
    honest, newer = _claims.reading, []

    def reading(*args, **kwargs):
        if not newer:
            newer.append(
                ModelStore(store.root, mode="rw", backends={"s3": MemorySource({URI: FILES})}).ensure(
                    URI, force_download=True, progress=False
                )
            )
        return honest(*args, **kwargs)

    monkeypatch.setattr(_claims, "reading", reading)
    with store.open(URI) as held:
        path = held.path

    assert path == newer[0].path
    assert path != first.path


def test_a_reader_that_let_go_is_not_waited_for(store):
    """
    After the `with` the lease is gone, and removing succeeds.
    """
    model = store.ensure(URI, progress=False)
    with store.open(URI):
        pass

    store.remove(URI, trash_seconds=0)

    assert not model.path.exists()
    assert URI not in store


def test_a_reader_that_died_is_waited_out(store, monkeypatch):
    """
    A lease that shows no sign of life holds a model for its term and no longer.
    """
    model = store.ensure(URI, progress=False)
    monkeypatch.setattr("kserve_pvc._keys.claims.is_provably_dead", lambda holder: False)
    place = store.root / layout.lease_dir(model.path.name) / "dead"
    place.mkdir(parents=True)
    (place / "owner").write_bytes(b"of a pod that is no more")

    store.remove(URI, trash_seconds=0)

    assert not model.path.exists()
    assert not (store.root / layout.lease_dir(model.path.name)).exists()


def test_a_download_under_way_is_not_removed(root, store, monkeypatch):
    """
    What somebody is fetching cannot be removed, and the download ends well.
    """
    writing, go_on = Event(), Event()
    honest = Tree.create

    def create(self, path):
        if path.name == "b.bin":
            writing.set()
            assert go_on.wait(10)
        return honest(self, path)

    monkeypatch.setattr(Tree, "create", create)
    models = []
    thread = Thread(target=lambda: models.append(store.ensure(URI, max_workers=1, progress=False)))
    thread.start()
    assert writing.wait(10)
    with pytest.raises(ModelInUseError, match="a download by pod"):
        ModelStore(root, mode="rw").remove(URI)
    go_on.set()
    thread.join()

    assert models[0].status == "downloaded"
    assert store.verify(URI, "full").ok


def test_what_a_removal_left_that_died_half_way_is_collected(store, monkeypatch):
    """
    A removal that is killed after its tombstone leaves the model gone; the next one collects its bytes.
    """
    model = store.ensure(URI, progress=False)

    def die(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("kserve_pvc._keys.removal.live_readers", die)
    with pytest.raises(KeyboardInterrupt):
        store.remove(URI)
    monkeypatch.undo()
    gone = URI not in store
    left = model.path.is_dir()

    store.remove(URI, trash_seconds=0)

    assert (gone, left, model.path.exists()) == (True, True, False)
    with pytest.raises(ModelNotFoundError):
        store.remove(URI)


def test_a_removal_ends_above_every_number_that_was_reserved(store, monkeypatch):
    """
    A download that reserved the number after the tombstone's and was paused there finds a newer tombstone, and loses.
    """
    model = store.ensure(URI, progress=False)
    honest, reserved = VolumeWriter.reserve, []

    def reserve(self, place):
        if place.name == "000000000002" and not reserved:
            reserved.append(honest(self, place.with_name("000000000003")))
        return honest(self, place)

    monkeypatch.setattr(VolumeWriter, "reserve", reserve)
    store.remove(URI, trash_seconds=0)

    assert [(entry.seq, entry.type) for entry in read_all(Volume(store.root), model.key)] == [
        (1, "commit"),
        (2, "tombstone"),
        (4, "tombstone"),
    ]


def test_a_model_that_was_removed_can_be_fetched_again(store):
    """
    A tombstone is no obstacle to the next download, which gets a new directory.
    """
    first = store.ensure(URI, progress=False)
    store.remove(URI, trash_seconds=0)

    second = store.ensure(URI, progress=False)

    assert second.status == "downloaded"
    assert second.path != first.path
    assert kinds(store, first.key) == ["commit", "tombstone", "commit"]


def test_bytes_stay_in_the_trash_for_readers_without_a_lease(store):
    """
    A file that was opened before the removal is readable until the trash is emptied, by `rm --now` or a later writer.
    """
    model = store.ensure(URI, progress=False)

    store.remove(URI)

    (trashed,) = (store.root / layout.TRASH).iterdir()
    assert (trashed / "a.bin").read_bytes() == FILES["a.bin"]
    assert not model.path.exists()
    with pytest.raises(ModelNotFoundError):
        store.remove(URI, trash_seconds=0)
    assert list((store.root / layout.TRASH).iterdir()) == []
