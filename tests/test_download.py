"""
Downloads that overlap where locks have failed: what the log decides, and what is left afterwards.
"""

from __future__ import annotations

import threading
from threading import Event, Thread

import pytest
from memory import MemorySource

from kserve_pvc import Model, ModelStore
from kserve_pvc._download import publication
from kserve_pvc._format import layout
from kserve_pvc._volume.tree import Tree
from kserve_pvc._volume.writing import VolumeWriter

URI = "s3://bucket/model"
FILES = {"a.bin": b"a" * 1000, "b.bin": b"b" * 1000, "c.bin": b"c" * 1000}


@pytest.fixture
def stores(root, monkeypatch) -> list[ModelStore]:
    """
    Two writers, as on two nodes, that do not share the lock which threads of one process share.
    """
    source = MemorySource({URI: FILES})
    monkeypatch.setattr("kserve_pvc._store.flight_of", lambda identity, key: threading.Lock())
    return [ModelStore(root, mode="rw", lease_seconds=1, backends={"s3": source}) for _ in range(2)]


def test_a_late_collector_spares_what_was_begun_on_its_own_record(root, stores, monkeypatch):
    """
    A writer that is paused between its commit and collecting does not touch a generation that was begun meanwhile.
    """
    first, second = stores
    committed, second_is_writing, first_has_collected = Event(), Event(), Event()
    honest_collect, honest_create = publication.collect_garbage, Tree.create

    def collect_garbage(*args):
        if not committed.is_set():
            first.break_lock(URI)
            committed.set()
            assert second_is_writing.wait(10)
        return honest_collect(*args)

    def create(self, path):
        if self._writer is second._writing[0] and path.name == "b.bin":
            second_is_writing.set()
            assert first_has_collected.wait(10)
        return honest_create(self, path)

    monkeypatch.setattr(publication, "collect_garbage", collect_garbage)
    monkeypatch.setattr(Tree, "create", create)

    def ensure_first() -> None:
        first.ensure(URI, progress=False)
        first_has_collected.set()

    thread = Thread(target=ensure_first)
    thread.start()
    assert committed.wait(10)
    model = second.ensure(URI, force_download=True, max_workers=1, progress=False)
    thread.join()

    assert model.status == "downloaded"
    assert ModelStore(root).verify(URI, "full").ok
    assert {path.name: path.read_bytes() for path in model.path.iterdir()} == FILES


def test_a_record_that_is_published_too_late_is_not_returned(stores, monkeypatch):
    """
    A writer that is paused right before it publishes returns the model that another published meanwhile.
    """
    first, second = stores
    honest = VolumeWriter.publish
    meanwhile: list[Model] = []

    def publish(self, place, data, private):
        if self is first._writing[0] and place.parent.name == "log" and not meanwhile:
            second.break_lock(URI)
            meanwhile.append(second.ensure(URI, progress=False))
        return honest(self, place, data, private)

    monkeypatch.setattr(VolumeWriter, "publish", publish)

    model = first.ensure(URI, progress=False)

    assert (model.status, model.path) == ("waited", meanwhile[0].path)
    assert {path.name: path.read_bytes() for path in model.path.iterdir()} == FILES
    assert first.verify(URI, "full").ok


def test_a_loser_collects_what_it_wrote(root, stores, monkeypatch):
    """
    A writer whose directory was collected and made anew by its own writing leaves none of it behind.
    """
    first, second = stores
    honest = Tree.create
    meanwhile: list[Model] = []

    def create(self, path):
        if self._writer is first._writing[0] and path.name == "b.bin":
            second.break_lock(URI)
            meanwhile.append(second.ensure(URI, progress=False))
        return honest(self, path)

    monkeypatch.setattr(Tree, "create", create)

    model = first.ensure(URI, max_workers=1, progress=False)

    assert (model.status, model.path) == ("waited", meanwhile[0].path)
    assert [path.name for path in model.path.parent.iterdir()] == [model.path.name]
    assert list((root / layout.STAGING).iterdir()) == []


def test_old_claims_are_forgotten(root, stores):
    """
    A key keeps its newest claim, however many attempts failed before.
    """
    store = stores[0]
    for _ in range(5):
        store.break_lock(URI)

    key = store.plan(URI).key

    assert [path.name for path in (root / layout.claims_dir(key)).iterdir()] == ["000000000005"]


def test_removing_leaves_nothing_but_the_log(root, stores):
    """
    After a removal with an empty trash only records, numbers and the newest claim are left of a model, and the store's
    reserve.
    """
    store = stores[0]
    model = store.ensure(URI, progress=False)

    store.remove(URI, trash_seconds=0)

    left = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    keys = f".kserve-pvc/keys/{model.key}"
    assert {name for name in left if not name.startswith(".kserve-pvc/reserve/")} == {
        ".kserve-pvc/store.json",
        f"{keys}/log/000000000001.commit",
        f"{keys}/log/000000000002.tombstone",
        f"{keys}/claims/000000000001/owner",
        f"{keys}/claims/000000000001/beat",
        f"{keys}/claims/000000000001/held",
    }


def test_a_claim_that_is_thrown_away_while_it_is_made_is_a_lost_race(root, stores, monkeypatch):
    """
    A writer that stands still while it makes its claim, until another has superseded it, looks again.
    """
    first, second = stores
    honest, opened = VolumeWriter.ensure_directory, []

    def ensure_directory(self, place):
        fd = honest(self, place)
        if place.parent.name == "claims" and self is first._writing[0]:
            opened.append(place.name)
            if opened == ["000000000001"] * 2:
                second.ensure(URI, timeout=10, progress=False)
                self.empty_trash(0)
        return fd

    monkeypatch.setattr(VolumeWriter, "ensure_directory", ensure_directory)
    model = first.ensure(URI, progress=False)

    assert opened[:2] == ["000000000001"] * 2
    assert model.status == "waited"
    assert second.get(URI).path == model.path
