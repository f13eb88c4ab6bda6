"""
What a storage initializer leaves in a destination, and what it refuses to change there.
"""

import glob
import os
import shutil
from pathlib import Path

import pytest
from trees import listing, read_tree, write_files

from kserve_pvc import ModelStore, PolicyError
from kserve_pvc.kserve import Storage
from kserve_pvc.kserve._contents import INTENDED, OLD_RECORD, OURS, RECORD, WORK
from kserve_pvc.kserve._destination import Destination
from kserve_pvc.kserve._initialize import main
from kserve_pvc.locks.liveness import here

FILES = {
    "config.json": b"{}",
    "weights/b.bin": b"w",
    "echo/config.pbtxt": b"name: 'echo'",
    "echo/1/model.py": b"1",
    "model.joblib": b"j",
    "model.bst": b"b",
    "model-store/m.mar": b"m",
    "model.safetensors": b"s",
}


def names_in(place):
    return sorted(os.listdir(place))


# What model servers take for a model, by the calls with which they look for one.
LOOKS = {
    "triton": lambda place: [name for name in names_in(place) if (place / name).is_dir()],
    "tensorflow": lambda place: [name for name in names_in(place) if name.isdigit()],
    "sklearn": lambda place: [name for name in names_in(place) if name.endswith((".joblib", ".pkl", ".pickle"))],
    "xgboost": lambda place: [name for name in names_in(place) if name.endswith((".bst", ".json", ".ubj"))],
    "by suffix": lambda place: [path.name for path in sorted(place.iterdir()) if path.suffix],
    "mlserver": lambda place: sorted(glob.glob(str(place / "**" / "model-settings.json"), recursive=True)),
    "torchserve": lambda place: sorted(path.name for path in (place / "model-store").glob("*.mar")),
    "transformers": lambda place: sorted(Path(path).name for path in glob.glob(str(place / "*"))),
    "vllm": lambda place: sorted(
        os.path.relpath(path, place) for kind in ("safetensors", "bin", "pt") for path in place.glob(f"**/*.{kind}")
    ),
    "directories": lambda place: sorted(os.path.relpath(above, place) for above, _, _ in os.walk(place)),
}


pytestmark = pytest.mark.usefixtures("initializer_environment")


@pytest.fixture
def place(tmp_path):
    (tmp_path / "mnt-models").mkdir()
    return tmp_path / "mnt-models"


@pytest.fixture
def initialize(monkeypatch, capsys):
    def run(*pairs, **env):
        with monkeypatch.context() as context:
            for name, value in env.items():
                context.setenv(name, str(value))
            code = main([str(word) for word in pairs])
        return code, capsys.readouterr().err

    return run


@pytest.fixture
def on_a_network(monkeypatch):
    """
    Claims with heartbeats exclude. The kind of the volume is made up, as none can be mounted everywhere.
    """
    monkeypatch.setattr("kserve_pvc._volume.mount.Mount.is_network", property(lambda _: True))


def model(tmp_path, name="m", files=None):
    write_files(tmp_path / name, files or FILES)
    return f"file://{tmp_path / name}"


def check_seen(place, files):
    """
    Compare what servers find with what they would find in a directory that holds the model and nothing else.
    """
    alone = place.parent / "alone"
    shutil.rmtree(alone, ignore_errors=True)
    write_files(alone, files)
    for server, look in LOOKS.items():
        found = [name.removeprefix(str(place)) for name in look(place)]
        assert found == [name.removeprefix(str(alone)) for name in look(alone)], server
    ours = set(os.listdir(place)) - set(os.listdir(alone))
    assert ours == {RECORD.name}
    assert (place / RECORD).is_file()
    assert not (place / RECORD).suffix


# What servers see


@pytest.mark.parametrize("way", ["private", "auto", "link", "copy", "symlink"])
@pytest.mark.parametrize("kind", ["local", "network"])
def test_servers_see_the_model_alone(tmp_path, place, root, initialize, request, way, kind):
    """
    However a directory is filled, and after a second start, nothing else in it is taken for a model by a server.
    """
    if kind == "network":
        request.getfixturevalue("on_a_network")
    env = {} if way == "private" else {"KSERVE_PVC_STORE": root, "KSERVE_PVC_MATERIALIZE": way}
    uri = model(tmp_path)

    first = initialize(uri, place, **env)
    check_seen(place, FILES)
    before = listing(place)
    second = initialize(uri, place, **env)

    assert (first[0], second[0]) == (0, 0), first[1]
    check_seen(place, FILES)
    assert listing(place) == before


def test_servers_see_the_models_of_several_sources_alone(tmp_path, place, initialize):
    """
    The same holds for merged sources, and for a directory in another one.
    """
    one, two = model(tmp_path, "one"), model(tmp_path, "two", {"more.bin": b"2"})

    code, _ = initialize(one, place, two, place, one, place / "echo/2")

    assert code == 0
    assert (place / "echo/2" / RECORD).is_file()
    assert [path for path in place.rglob(f"{OURS}*") if path.is_dir()] == []


@pytest.mark.parametrize("kind", ["local", "network"])
def test_what_a_killed_process_left_is_deleted_by_the_next_start(tmp_path, place, initialize, request, kind):
    """
    A process that dies between the record and the end leaves a directory, which a hit deletes.
    """
    if kind == "network":
        request.getfixturevalue("on_a_network")
    uri = model(tmp_path)
    initialize(uri, place)
    write_files(place, {str(INTENDED): b"{}", str(WORK / "models/x"): b"x", str(OURS / "lock"): b""})

    code, err = initialize(uri, place)

    assert code == 0
    assert "nothing to download" in err
    check_seen(place, FILES)


def test_the_directory_of_a_writer_that_lives_is_left_alone(tmp_path, place, initialize):
    """
    A hit while another process replaces the model deletes nothing of it, and warns.
    """
    uri = model(tmp_path)
    initialize(uri, place)
    destination = Destination(place)
    with destination.writing(here(), 1.0):
        destination.make_work()

        code, err = initialize(uri, place)

        assert (place / WORK).is_dir()
    assert code == 0
    assert "WARNING" in err
    assert not (place / OURS).exists()


def as_before(place):
    """
    Turn a destination into one of an earlier version, whose record was in a directory.
    """
    (place / OURS).mkdir()
    (place / RECORD).rename(place / OLD_RECORD)
    (place / OURS / "lock").touch()


@pytest.mark.parametrize("kind", ["local", "network"])
def test_the_record_of_an_earlier_version_is_a_hit_and_is_moved(tmp_path, place, initialize, request, kind):
    """
    A directory with the earlier kind of record is not filled again: the record becomes a plain file.
    """
    if kind == "network":
        request.getfixturevalue("on_a_network")
    uri = model(tmp_path)
    initialize(uri, place)
    as_before(place)
    inodes = {path: path.stat().st_ino for path in place.rglob("*.bin")}

    code, err = initialize(uri, place)

    assert code == 0
    assert "nothing to download" in err
    assert {path: path.stat().st_ino for path in place.rglob("*.bin")} == inodes
    check_seen(place, FILES)


def test_an_earlier_record_protects_what_it_names(tmp_path, place, initialize):
    """
    Another model is refused in a directory of an earlier version, and replaces all of its files if that is allowed.
    """
    initialize(model(tmp_path), place)
    as_before(place)
    other = model(tmp_path, "other", {"other.bin": b"o"})

    refused = initialize(other, place)
    replaced = initialize(other, place, KSERVE_PVC_REPLACE="any")

    assert (refused[0], replaced[0]) == (1, 0)
    check_seen(place, {"other.bin": b"o"})


@pytest.mark.parametrize(
    "name", [f"{OURS}/record.json", str(RECORD), str(RECORD).upper(), f"{OURS}/work/a", ".kserve-pvc/store.json"]
)
def test_a_model_has_no_file_with_a_name_of_ours(tmp_path, place, initialize, name):
    """
    A file of the model in the place of our own bookkeeping is refused.
    """
    code, err = initialize(model(tmp_path, files={name: b"{}", "a": b"a"}), place)

    assert code == 1
    assert "is reserved" in err
    assert not (place / "a").exists()


# What is served is not changed


@pytest.mark.parametrize("way", ["private", "auto", "symlink"])
@pytest.mark.parametrize("change", ["source", "patterns", "second source", "order"])
def test_another_model_does_not_replace_what_is_served(tmp_path, place, root, initialize, way, change):
    """
    Whatever is different about the sources, a complete directory stays as it is, and the old sources are a hit.
    """
    env = {} if way == "private" else {"KSERVE_PVC_STORE": root, "KSERVE_PVC_MATERIALIZE": way}
    one, two = model(tmp_path), model(tmp_path, "two", {"other.bin": b"o", "config.json": b"2"})
    pairs = [one, place, two, place] if change == "order" else [one, place]
    initialize(*pairs, **env)
    before = listing(place)
    others = {
        "source": ([two, place], {}),
        "patterns": ([one, place], {"STORAGE_ALLOW_PATTERNS": "*.json"}),
        "second source": ([one, place, two, place], {}),
        "order": ([two, place, one, place], {}),
    }[change]

    code, err = initialize(*others[0], **env, **others[1])
    again = initialize(*pairs, **env)

    assert code == 1
    assert "which servers may be reading" in err
    assert "KSERVE_PVC_REPLACE" in err
    assert again[0] == 0
    assert listing(place) == before


def test_a_damaged_directory_is_not_filled_with_another_model(tmp_path, place, initialize):
    """
    Servers may be reading what is left of a model of which one file was deleted.
    """
    one, two = model(tmp_path), model(tmp_path, "two", {"other.bin": b"o"})
    initialize(one, place)
    (place / "config.json").unlink()

    refused, mended = initialize(two, place)[0], initialize(one, place)[0]

    assert (refused, mended) == (1, 0)
    check_seen(place, FILES)


def test_a_named_model_is_replaced_and_does_not_come_back(tmp_path, place, initialize):
    """
    The setting names what may be replaced, so a start of an old replica, which has it too, does not swap it back.
    """
    one, two = model(tmp_path), model(tmp_path, "two", {"other.bin": b"o"})
    initialize(one, place)

    wrong = initialize(two, place, KSERVE_PVC_REPLACE=two)
    right = initialize(two, place, KSERVE_PVC_REPLACE=f"s3://some/other {one}")
    back = initialize(one, place, KSERVE_PVC_REPLACE=one)

    assert (wrong[0], right[0], back[0]) == (1, 0, 1)
    check_seen(place, {"other.bin": b"o"})


def test_an_interrupted_replacement_is_completed_by_its_own_source_only(tmp_path, place, initialize, monkeypatch):
    """
    A directory that is half replaced is not given back to the old model without being told so.
    """
    one, two = model(tmp_path), model(tmp_path, "two", {"config.json": b"2", "z.bin": b"z"})
    initialize(one, place)
    with monkeypatch.context() as context:
        context.setattr(Destination, "move", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        died = initialize(two, place, KSERVE_PVC_REPLACE=one)

    back, completed = initialize(one, place), initialize(two, place)

    assert (died[0], back[0], completed[0]) == (1, 1, 0)
    check_seen(place, {"config.json": b"2", "z.bin": b"z"})


def test_an_interrupted_first_start_binds_to_nothing(tmp_path, place, initialize, monkeypatch):
    """
    A directory that was never complete has no readers, so a corrected source fills it.
    """
    one, two = model(tmp_path), model(tmp_path, "two", {"config.json": b"2"})
    with monkeypatch.context() as context:
        context.setattr(Destination, "move", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        died = initialize(one, place)

    code, _ = initialize(two, place)

    assert (died[0], code) == (1, 0)
    check_seen(place, {"config.json": b"2"})


def test_a_server_that_downloads_twice_into_one_directory_is_refused(tmp_path, place):
    """
    The same holds in Python.
    """
    Storage.download(model(tmp_path), place)

    with pytest.raises(PolicyError, match="servers may be reading"):
        Storage.download(model(tmp_path, "two", {"x": b"x"}), place)

    assert read_tree(place)["config.json"] == FILES["config.json"]


@pytest.mark.parametrize("value", ["nonsense", "any, s3://b/m"])
def test_what_may_be_replaced_is_a_list_of_uris(tmp_path, place, initialize, value):
    """
    A value that names no model is an error, not a setting without effect.
    """
    code, err = initialize(model(tmp_path), place, KSERVE_PVC_REPLACE=value)

    assert code == 1
    assert "KSERVE_PVC_REPLACE" in err


def test_a_link_in_a_store_leads_to_what_it_led_to(tmp_path, root, initialize, monkeypatch):
    """
    A directory in a store keeps its model, and its version, until it may be replaced or is gone.
    """
    monkeypatch.setenv("KSERVE_PVC_STORE", str(root))
    store, link = ModelStore(root, mode="rw"), root / "served"
    one, two = model(tmp_path), model(tmp_path, "two", {"other.bin": b"o"})
    initialize(one, link)
    first = os.readlink(link)

    refused = initialize(two, link)
    after_refusal = os.readlink(link)
    with store.open(one):  # A reader, which keeps the old version.
        write_files(tmp_path / "m", {"config.json": b"newer"})
        store.ensure(one, refresh=True, progress=False)
        kept, after_refresh = initialize(one, link), os.readlink(link)
        moved, after_moving = initialize(one, link, KSERVE_PVC_REPLACE=one), os.readlink(link)
    other, in_the_end = initialize(two, link, KSERVE_PVC_REPLACE=one), read_tree(link)

    assert [refused[0], kept[0], moved[0], other[0]] == [1, 0, 0, 0]
    assert after_refusal == after_refresh == first
    assert "keeps its version" in kept[1]
    assert after_moving != first
    assert in_the_end == {"other.bin": b"o"}


def test_a_link_of_a_user_in_a_store_is_kept(tmp_path, root, initialize, monkeypatch):
    """
    A link that leads to something else that exists is not replaced; one that leads nowhere is.
    """
    monkeypatch.setenv("KSERVE_PVC_STORE", str(root))
    ModelStore(root, mode="rw")
    uri = model(tmp_path)
    (root / "mine").mkdir()
    (root / "a").symlink_to("mine")
    (root / "b").symlink_to("gone")
    (root / "c").symlink_to(tmp_path)

    results = [initialize(uri, root / name) for name in "abc"]

    assert [code for code, _ in results] == [1, 0, 1], results
    assert (os.readlink(root / "a"), os.readlink(root / "c")) == ("mine", str(tmp_path))
    assert read_tree(root / "b") == FILES
