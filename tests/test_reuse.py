"""
What a download takes over from other generations of the same source, and what it never takes.
"""

from __future__ import annotations

import random
from pathlib import Path

import attrs
import memory
import pytest
from memory import MemorySource
from trees import digests, read_tree

from kserve_pvc import InsufficientSpaceError, Model, ModelStore
from kserve_pvc._format import layout

URI, OTHER = "s3://bucket/model", "s3://bucket/other"
BITS = random.Random(31)
OLD = {
    "config.json": b"{}",
    "weights/a.bin": BITS.randbytes(300_000),
    "weights/b.bin": BITS.randbytes(200_000),
    "empty": b"",
}
NEW = {**OLD, "config.json": b'{"new": 1}', "weights/b.bin": BITS.randbytes(200_001)}
CHANGED = len(NEW["config.json"]) + len(NEW["weights/b.bin"])


@pytest.fixture
def source() -> MemorySource:
    return MemorySource({URI: OLD, OTHER: OLD})


@pytest.fixture
def store(root, source) -> ModelStore:
    return ModelStore(root, mode="rw", backends={"s3": source})


@pytest.fixture
def old(store) -> Model:
    """
    The model as it was before the source changed.
    """
    return store.ensure(URI, progress=False)


def inodes(model: Model) -> dict[str, int]:
    return {
        path.relative_to(model.path).as_posix(): path.stat().st_ino for path in model.path.rglob("*") if path.is_file()
    }


def shared(one: Model, other: Model) -> set[str]:
    """
    The files that two models have in common, not only in content.
    """
    return {name for name, inode in inodes(one).items() if inodes(other).get(name) == inode}


def damage(path: Path, change: str) -> None:
    content = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(
        {"flipped": bytes([content[0] ^ 1]) + content[1:], "shorter": content[:-1], "longer": content + b"x"}[change]
    )


def test_a_refresh_fetches_what_has_changed(store, source, old):
    """
    Unchanged files get a second name, changed ones are fetched, and the plan had said so.
    """
    source.models[URI] = NEW
    source.bytes_read = 0
    plan = store.plan(URI, refresh=True)

    new = store.ensure(URI, refresh=True, progress=False)

    assert (plan.action, plan.bytes_to_fetch, plan.bytes_reusable) == ("download", CHANGED, 300_000)
    assert (new.bytes_fetched, source.bytes_read, new.status) == (CHANGED, CHANGED, "downloaded")
    assert shared(old, new) == {"weights/a.bin", "empty"}
    assert read_tree(new.path) == NEW
    assert {str(f.path): f.sha256 for f in new.record.files} == digests(NEW)
    assert store.verify(URI, "full").ok


def test_a_refresh_leaves_the_old_model_as_it_was(store, source, old):
    """
    A reader of the generation before sees every byte of it, links or not.
    """
    source.models[URI] = NEW

    store.ensure(URI, refresh=True, progress=False)

    assert read_tree(old.path) == OLD


def test_removing_one_of_two_leaves_the_other_whole(store, source):
    """
    A file with two names stays as long as one of them does.
    """
    part = store.ensure(URI, allow_patterns=["weights/*"], progress=False)
    whole = store.ensure(URI, progress=False)
    assert shared(part, whole) == {"weights/a.bin", "weights/b.bin"}

    store.remove(URI, allow_patterns=["weights/*"], trash_seconds=0)

    assert not part.path.exists()
    assert read_tree(whole.path) == OLD
    assert store.verify(URI, "full").ok


@pytest.mark.parametrize("change", ["flipped", "shorter", "longer"])
def test_a_damaged_file_is_fetched_again(store, source, old, change):
    """
    What does not prove itself is not linked, and the damage does not get into the new generation.
    """
    damage(old.path / "weights/a.bin", change)
    source.models[URI] = NEW
    assert not store.verify(URI, "full").ok

    new = store.ensure(URI, refresh=True, progress=False)

    # The beginning of a file that has grown is as it was, so it is copied.
    fetched = CHANGED + (0 if change == "longer" else 300_000)
    assert shared(old, new) == {"empty"}
    assert (new.bytes_fetched, read_tree(new.path)) == (fetched, NEW)
    assert store.verify(URI, "full").ok


def test_a_download_by_force_takes_nothing_that_is_there(store, old):
    """
    Who insists on a download has doubts about what is there: every byte is fetched, and the old model stays as it was.
    """
    damage(old.path / "weights/a.bin", "flipped")

    new = store.ensure(URI, force_download=True, progress=False)

    assert (new.bytes_fetched, shared(old, new), read_tree(new.path)) == (500_002, set(), OLD)
    assert store.verify(URI, "full").ok


@pytest.mark.parametrize(("digest", "room"), [("sha256", 0), ("none", 500_002)])
def test_a_plan_needs_no_room_for_what_is_linked(root, source, old, monkeypatch, digest, room):
    """
    Whole files that are there take no room a second time, so they fit on a full volume; without digests they are
    copied.
    """
    store = ModelStore(root, mode="rw", backends={"s3": source}, digest=digest)
    monkeypatch.setattr("kserve_pvc._volume.reading.Volume.free_bytes", lambda self: room - 1)
    short = store.plan(URI, revision="v2")
    monkeypatch.setattr("kserve_pvc._volume.reading.Volume.free_bytes", lambda self: room)

    plan = store.plan(URI, revision="v2")

    assert (plan.bytes_shared, plan.bytes_reusable, plan.fits, short.fits) == (500_002 - room, 500_002, True, False)
    assert store.ensure(URI, revision="v2", progress=False).bytes_fetched == 0


def test_another_choice_of_files_reuses_too(store, source, old):
    """
    Patterns name another model of the same source, which has the same bytes.
    """
    source.bytes_read = 0
    plan = store.plan(URI, allow_patterns=["weights/*"])

    part = store.ensure(URI, allow_patterns=["weights/*"], progress=False)

    assert (plan.bytes_to_fetch, plan.bytes_reusable, plan.key == old.key) == (0, 500_000, False)
    assert (part.bytes_fetched, source.bytes_read) == (0, 0)
    assert shared(old, part) == {"weights/a.bin", "weights/b.bin"}


def test_another_revision_reuses_too(store, source, old):
    """
    A revision names another model of the same source: what has the same token has the same bytes.
    """
    revised = store.ensure(URI, revision="v2", progress=False)

    assert (revised.bytes_fetched, shared(old, revised)) == (0, set(OLD))
    assert store.verify(URI, "full", revision="v2").ok


def test_another_source_reuses_nothing(store, source, old):
    """
    Equal names, sizes and tokens of another source prove nothing: who may read one may not read the other.
    """
    plan = store.plan(OTHER)

    other = store.ensure(OTHER, progress=False)

    assert (plan.bytes_to_fetch, plan.bytes_reusable) == (500_002, 0)
    assert (other.bytes_fetched, shared(old, other)) == (500_002, set())


def test_a_removed_model_lends_nothing(store, source, old):
    """
    What was removed is gone, also for those who come after.
    """
    store.remove(URI, trash_seconds=0)

    again = store.ensure(URI, progress=False)

    assert (again.bytes_fetched, read_tree(again.path)) == (500_002, OLD)


def test_files_without_a_token_are_always_fetched(root, store, source, old, monkeypatch):
    """
    Where the source does not name its content nothing says that it is still the same.
    """
    honest = memory._remote

    def nameless(uri: str, name: str, data: bytes):
        made = honest(uri, name, data)
        return attrs.evolve(made, entry=attrs.evolve(made.entry, token=None))

    monkeypatch.setattr(memory, "_remote", nameless)
    monkeypatch.setattr(memory, "_token", lambda data: None)

    new = store.ensure(URI, revision="v2", progress=False)

    assert (new.bytes_fetched, shared(old, new)) == (500_002, set())


def test_a_store_that_does_not_hash_takes_no_second_name(root, source, old):
    """
    Without digests files are copied: a name in two models has to be proven.
    """
    new = ModelStore(root, mode="rw", digest="none", backends={"s3": source}).ensure(URI, revision="v2", progress=False)

    assert (new.bytes_fetched, shared(old, new), read_tree(new.path)) == (0, set(), OLD)


def test_a_store_that_hashes_takes_nothing_from_one_that_does_not(root, source):
    """
    Bytes that were never hashed prove nothing.
    """
    unhashed = ModelStore(root, mode="rw", digest="none", backends={"s3": source}).ensure(URI, progress=False)
    assert [f.sha256 for f in unhashed.record.files] == [None] * 4

    new = ModelStore(root, mode="rw", backends={"s3": source}).ensure(URI, revision="v2", progress=False)

    assert (new.bytes_fetched, shared(unhashed, new)) == (500_002, set())
    assert None not in [f.sha256 for f in new.record.files]


def test_a_forged_record_of_another_source_is_no_donor(root, store, source, old):
    """
    A damaged record only costs what it could have saved.
    """
    (record,) = (root / layout.KEYS / old.key / "log").iterdir()
    record.chmod(0o644)
    record.write_bytes(record.read_bytes().replace(b"bucket/model", b"bucket/other"))

    other = store.ensure(OTHER, progress=False)

    assert (other.bytes_fetched, read_tree(other.path)) == (500_002, OLD)


def test_a_model_that_was_shared_in_vain_leaves_nothing(root, store, source, old):
    """
    A refresh that fails after some files were linked leaves the old model present and whole.
    """
    source.models[URI] = NEW
    honest = source.open_range

    def fail(file, start, stop):
        if file.address.endswith("b.bin"):
            raise ZeroDivisionError
        return honest(file, start, stop)

    source.open_range = fail
    with pytest.raises(ZeroDivisionError):
        store.ensure(URI, refresh=True, progress=False)
    source.open_range = honest

    assert read_tree(old.path) == OLD
    assert store.verify(URI, "full").ok
    assert store.get(URI).path == old.path
    new = store.ensure(URI, refresh=True, progress=False)
    assert (read_tree(new.path), new.bytes_fetched <= CHANGED) == (NEW, True)


@pytest.mark.parametrize(("digest", "fits"), [("sha256", True), ("none", False)])
def test_room_is_asked_for_what_cannot_be_shared(root, source, old, monkeypatch, digest, fits):
    """
    Files that get a second name need no room; without hashing nothing can prove itself, so all of the model does.
    """
    source.models[URI] = NEW
    monkeypatch.setattr("kserve_pvc._volume.reading.Volume.free_bytes", lambda self: CHANGED)
    store = ModelStore(root, mode="rw", backends={"s3": source}, digest=digest)

    if fits:
        assert store.ensure(URI, refresh=True, progress=False).bytes_fetched == CHANGED
    else:
        with pytest.raises(InsufficientSpaceError):
            store.ensure(URI, refresh=True, progress=False)
