"""
A store that was moved, copied, restored, or written by a newer version of the library.
"""

from __future__ import annotations

import json
import shutil

import pytest

from kserve_pvc import DamagedRecordError, ModelStore, StoreFormatError
from kserve_pvc._format import layout


@pytest.fixture
def model(root, source):
    """
    A model that is in the store.
    """
    return ModelStore(root, mode="rw").ensure(f"file://{source}", progress=False)


def test_a_copy_works_where_it_lies_beside_the_original(root, tmp_path, source, model):
    """
    It is found, verified and written to by the same process, and what becomes of it does not concern the original.
    """
    shutil.copytree(root, tmp_path / "copy", symlinks=True)
    original, copy = ModelStore(root, mode="rw"), ModelStore(tmp_path / "copy", mode="rw")

    again = copy.ensure(f"file://{source}", force_download=True, progress=False)
    copy.remove(f"file://{source}", trash_seconds=0)

    assert again.path.is_relative_to(tmp_path / "copy")
    assert (copy.list(), original.get(f"file://{source}").path) == ([], model.path)
    assert original.verify(f"file://{source}", "full").ok


@pytest.mark.parametrize("damage", ["missing", "older", "nowhere"])
@pytest.mark.parametrize("how", ["ensure", "refresh", "warm", "import"])
def test_a_link_that_a_copy_lost_is_mended_by_a_hit(root, tmp_path, source, model, damage, how):
    """
    Each call that finds a model present from a read-write store puts KServe's link to it right.
    """
    link = root / layout.view_link(model.key)
    link.unlink()
    if damage != "missing":
        link.symlink_to(f"{model.key}/{'000000000001-0123456789abcdef' if damage == 'older' else 'x'}")
    if how == "import":
        ModelStore(root).export(model, tmp_path / "bundle", progress=False)
    store = ModelStore(root, mode="rw")

    found = {
        "ensure": lambda: store.ensure(model, progress=False),
        "refresh": lambda: store.ensure(model, refresh=True, progress=False),
        "warm": lambda: next(store.warm([model], progress=False)).model,
        "import": lambda: store.import_(tmp_path / "bundle", progress=False),
    }[how]()

    assert (found.status, link.resolve()) == ("present", model.path.resolve())


def test_settings_that_were_deleted_are_made_anew(root, source, model):
    """
    Without `store.json` a copy is no store; a new one keeps the models and has an id and a locker of its own.
    """
    before = ModelStore(root).settings
    (root / layout.SETTINGS).unlink()
    assert not ModelStore(root).exists

    made = ModelStore(root, mode="rw", locker="flock").settings

    assert (made.locker, made.store_id != before.store_id) == ("flock", True)
    assert ModelStore(root).get(model).path == model.path


def test_a_process_refuses_what_was_restored_under_it(root, tmp_path, source, model):
    """
    It has returned a newer version than the snapshot has; a process that starts afterwards serves the older one.
    """
    shutil.copytree(root / ".kserve-pvc/keys", tmp_path / "keys", symlinks=True)
    store = ModelStore(root, mode="rw")
    store.ensure(model, force_download=True, progress=False)
    shutil.rmtree(root / ".kserve-pvc/keys")
    shutil.copytree(tmp_path / "keys", root / ".kserve-pvc/keys", symlinks=True)

    with pytest.raises(StoreFormatError, match="records were deleted"):
        store.get(model)


@pytest.mark.parametrize("what", ["store", "record"])
def test_an_older_version_changes_nothing_that_is_newer(root, source, model, what):
    """
    A format that is not known is refused by name, with the advice to upgrade, and stays as it is.
    """
    log = root / layout.log_dir(model.key)
    place = root / layout.SETTINGS if what == "store" else next(log.iterdir())
    newer = json.dumps({**json.loads(place.read_bytes()), "format": 2}).encode()
    place.chmod(0o644)
    place.write_bytes(newer)

    with pytest.raises(StoreFormatError if what == "store" else DamagedRecordError, match="upgrade"):
        ModelStore(root, mode="rw").get(model)

    assert place.read_bytes() == newer
