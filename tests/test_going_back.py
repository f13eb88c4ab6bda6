"""
One process never goes back to an older version than it has returned, and no version is published above a newer one.
"""

from __future__ import annotations

import shutil
from threading import Event, Thread, current_thread

import pytest
from memory import MemorySource
from trees import read_tree

from kserve_pvc import ModelStore, StoreError, StoreFormatError
from kserve_pvc._download.call import Call
from kserve_pvc._download.download import Download
from kserve_pvc._format import layout
from kserve_pvc._keys.log import LogView, read_all
from kserve_pvc._process import flight_of
from kserve_pvc._volume.reading import Volume

URI, OTHER = "s3://bucket/model", "s3://bucket/other"
V1, V2, V3 = ({"config.json": b"v%d" % number, "weights.bin": b"w" * 1000 * number} for number in (1, 2, 3))


@pytest.fixture
def source():
    return MemorySource({URI: V1, OTHER: V1})


@pytest.fixture
def store(root, source):
    return ModelStore(root, mode="rw", lease_seconds=5, backends={"s3": source})


def versions(store: ModelStore) -> list[str]:
    """
    Every version that was published, in the order of the log.
    """
    (key,) = [key for key in Volume(store.root).list_names(layout.KEYS) if key.startswith("model-")]
    return [entry.version for entry in read_all(Volume(store.root), key)]


class Paused:
    """
    A refresh in a thread that has learned what the source holds, and then waits for its turn.
    """

    def __init__(self, store: ModelStore, monkeypatch: pytest.MonkeyPatch, where: type, name: str) -> None:
        self._resolved, self._go_on = Event(), Event()
        self.models: list[object] = []
        other = ModelStore(store.root, mode="rw", backends={"s3": store._sources._factories["s3"]})
        self._thread = Thread(target=self._run, args=(other,))
        honest = getattr(where, name)

        def wait(this, *arguments, **more):
            if current_thread().name != "MainThread" and not self._resolved.is_set():
                self._resolved.set()
                assert self._go_on.wait(30)
            return honest(this, *arguments, **more)

        monkeypatch.setattr(where, name, wait)
        self._thread.start()
        assert self._resolved.wait(30)
        # In this process one of them would wait for the other; they stand for two processes.
        monkeypatch.setattr("kserve_pvc._store.flight_of", lambda identity, key: flight_of(f"not {identity}", key))

    def _run(self, store: ModelStore) -> None:
        self.models.append(store.ensure(URI, refresh=True, progress=False))

    def end(self):
        self._go_on.set()
        self._thread.join()
        (model,) = self.models
        return model


@pytest.mark.parametrize(("where", "name"), [(Call, "run"), (Download, "_make_claim")])
def test_a_refresh_that_waited_publishes_nothing_older(store, source, monkeypatch, where, name):
    """
    It learned v2 and had to wait; v3 was published meanwhile: it returns v3, and the log never goes back.
    """
    store.ensure(URI, progress=False)
    source.models[URI] = V2
    waiting = Paused(store, monkeypatch, where, name)
    source.models[URI] = V3
    newest = ModelStore(store.root, mode="rw", backends={"s3": source})
    published = newest.ensure(URI, refresh=True, progress=False)

    model = waiting.end()

    assert (read_tree(model.path), model.version) == (V3, published.version)
    assert versions(store)[-1] == published.version
    assert read_tree(store.get(URI).path) == V3


def test_a_refresh_that_waited_for_an_older_one_publishes_the_newer(store, source, monkeypatch):
    """
    It learned v3 and had to wait; v2, learned before that, was published meanwhile: it publishes v3 above it.
    """
    store.ensure(URI, progress=False)
    source.models[URI] = V3
    waiting = Paused(store, monkeypatch, Call, "run")
    source.models[URI] = V2
    ModelStore(store.root, mode="rw", backends={"s3": source}).ensure(URI, refresh=True, progress=False)
    source.models[URI] = V3

    model = waiting.end()

    assert read_tree(model.path) == V3
    assert read_tree(store.get(URI).path) == V3


def test_a_refresh_by_force_fetches_what_is_there_now(store, source, monkeypatch):
    """
    With `force_download` the source is requested again too, and the same version may be fetched once more.
    """
    first = store.ensure(URI, progress=False)

    second = store.ensure(URI, refresh=True, force_download=True, progress=False)

    assert (second.status, second.path == first.path, second.version == first.version) == ("downloaded", False, True)


def go_back(store: ModelStore, source: MemorySource) -> None:
    """
    Return the second version in this process, and delete its record, as a snapshot that was restored has it.
    """
    store.ensure(URI, progress=False)
    source.models[URI] = V2
    model = store.ensure(URI, refresh=True, progress=False)
    (store.root / layout.log_dir(model.key) / "000000000002.commit").unlink()


def test_a_log_that_went_back_is_not_listed(store, source):
    """
    `list` leaves it out as it does a damaged record, `verify_all` names it, and other models are as they were.
    """
    other = store.ensure(OTHER, progress=False)
    go_back(store, source)

    again = ModelStore(store.root)

    assert [model.uri for model in again.list()] == [other.uri]
    assert {result.uri.rpartition("/")[2][:5]: result.ok for result in again.verify_all()} == {
        "model": False,
        "other": True,
    }
    with pytest.raises(StoreFormatError, match="records were deleted"):
        again.get(URI)


def test_a_log_that_goes_back_during_a_download_is_refused(store, source, monkeypatch):
    """
    The look inside of a download is as strict as the one before it.
    """
    go_back(store, source)
    honest, looks = type(store._lookup).view, []

    def view(lookup, ref):
        looks.append(1)
        return LogView(seq=2) if len(looks) == 1 else honest(lookup, ref)

    monkeypatch.setattr(type(store._lookup), "view", view)
    with pytest.raises(StoreFormatError, match="records were deleted"):
        store.ensure(URI, progress=False)

    assert len(looks) == 2


def test_a_copy_of_a_store_has_a_life_of_its_own(store, source, tmp_path):
    """
    A clone or snapshot that is older than what this process has returned of the original is no step back.
    """
    store.ensure(URI, progress=False)
    shutil.copytree(store.root, tmp_path / "copy", symlinks=True)
    source.models[URI] = V2
    newer = store.ensure(URI, refresh=True, progress=False)

    copy = ModelStore(tmp_path / "copy", mode="rw", backends={"s3": source})

    assert read_tree(copy.get(URI).path) == V1
    assert [read_tree(model.path) for model in copy.list()] == [V1]
    assert read_tree(store.get(URI).path) == V2
    assert read_tree(copy.ensure(URI, refresh=True, progress=False).path) == V2
    assert store._lookup.identity != copy._lookup.identity
    assert newer.path.is_relative_to(store.root)


def test_two_paths_to_one_store_are_one(store, source, tmp_path):
    """
    A link or another spelling of the root leads to the same store: what was returned through one counts for both.
    """
    go_back(store, source)
    (tmp_path / "link").symlink_to(store.root)

    with pytest.raises(StoreError, match="records were deleted"):
        ModelStore(tmp_path / "link").get(URI)
