"""
How the methods of a store are called: what names a model, which numbers they take, and what they return.
"""

import inspect
import math
import os
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path, PurePosixPath

import attrs
import pytest

import kserve_pvc
from kserve_pvc import InvalidURIError, ModelRef, ModelStore, PolicyError, SettingsError
from kserve_pvc._opening import StoreArguments
from kserve_pvc._source.arguments import check_count, check_seconds, check_timeout
from kserve_pvc._source.ref import parse_ref

FILES = {"config.json": b"{}", "weights/a.bin": b"weights"}


@pytest.fixture
def source(tmp_path):
    """
    The directory of a model.
    """
    place = tmp_path / "source"
    for name, data in FILES.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)
    return place


@pytest.fixture
def store(tmp_path):
    """
    An empty read-write store.
    """
    root = tmp_path / "volume"
    root.mkdir()
    return ModelStore(root, mode="rw")


def spellings(place: Path) -> list[object]:
    """
    Every way to name a directory.
    """
    uri = f"file://{place}"
    return [uri, f"{uri}/", str(place), f"{place}/", f"{place.parent}/./{place.name}//", place, ModelRef(uri=uri)]


def test_a_path_is_one_model_however_it_is_spelled(store, source):
    """
    With or without a slash at its end, as a string, a path, a URI or a ref: one model with one key, fetched once.
    """
    models = [store.ensure(spelling, progress=False) for spelling in spellings(source)]

    assert [model.status for model in models] == ["downloaded"] + ["present"] * (len(models) - 1)
    assert {(model.uri, model.key, model.path) for model in models} == {(models[0].uri, models[0].key, models[0].path)}
    assert models[0].uri == f"file://{source}"


@pytest.mark.parametrize(
    ("uri", "canonical"),
    [
        ("/", "file:///"),
        ("//", "file:///"),
        ("/a/", "file:///a"),
        ("//a//b/.//", "file:///a/b"),
        ("/a/../b", "file:///a/../b"),
        ("file:///a/./b/", "file:///a/b"),
        (PurePosixPath("/a"), "file:///a"),
        ("file://a/", "file://a/"),
        ("s3://b/m/", "s3://b/m/"),
        ("s3://b//m", "s3://b//m"),
        ("hf://org/name", "hf://org/name"),
    ],
)
def test_only_paths_are_put_in_order(uri, canonical):
    """
    Empty and `.` parts of a path mean nothing and go; `..` may lead through a link, and a URI is what it is spelled.
    """
    assert parse_ref(uri).uri == canonical


def test_every_method_takes_every_source(store, source):
    """
    A URI, a path, a ref and a model name the same thing to every method that takes one.
    """
    made = store.ensure(source, progress=False)

    for found in (str(source), source, ModelRef(uri=f"file://{source}"), made, made.ref):
        assert found in store
        assert store.get(found).key == made.key
        assert store.resolve(found).version == made.version
        assert store.plan(found).action == "nothing"
        assert store.verify(found).ok
        assert [result.model.key for result in store.warm([found], progress=False)] == [made.key]
        store.alias("name", found)
        store.break_lock(found)
        with store.open(found) as held:
            assert held.key == made.key
        assert store.export(found, source.parent / "bundle", progress=False).uri == made.uri
        store.remove(found)
        assert found not in store
        assert store.ensure(found, progress=False).status == "downloaded"


def test_a_ref_has_its_own_selection(store, source):
    """
    A ref or model with revision or patterns is looked up with them, and no other ones may come with it.
    """
    part = store.ensure(source, allow_patterns="*.json", progress=False)

    assert store.get(part.ref).key == store.get(part).key == part.key
    assert part.ref != store.ensure(source, progress=False).ref
    for name, value in (("revision", "v1"), ("allow_patterns", "*.bin"), ("ignore_patterns", ["*.bin"])):
        with pytest.raises(SettingsError, match=f"for `{name}`; omit it, since a `ModelRef` has its own"):
            store.get(part.ref, **{name: value})


@pytest.mark.parametrize(
    ("uri", "error"),
    [
        (Path("model"), InvalidURIError),
        (Path("s3://bucket/model"), InvalidURIError),
        (5, InvalidURIError),
        (b"/model", InvalidURIError),
        (ModelRef(uri="s3://key:canary@bucket/model"), PolicyError),
        (ModelRef(uri="s3://bucket/model?sig=canary"), PolicyError),
        (ModelRef(uri="model"), InvalidURIError),
        (ModelRef(uri="s3://bucket/model", revision=""), InvalidURIError),
        (ModelRef(uri="s3://bucket/model", query="sig=canary"), PolicyError),
    ],
    ids=repr,
)
def test_what_names_no_model_is_refused(store, uri, error):
    """
    A relative path is no model, and a ref that was made by hand is checked like a URI, without repeating a secret.
    """
    with pytest.raises(error) as caught:
        store.get(uri)

    assert "canary" not in str(caught.value) + repr(caught.value)


def from_pretrained(name: object) -> bytes:
    """
    Load a model as `transformers` does: a directory is recognised by its string, and names are joined to it.
    """
    place = str(name)
    if not os.path.isdir(place):  # noqa: PTH112 - as it is written there
        raise OSError(f"{place} is not a local folder and is not a valid model identifier")
    with open(os.path.join(place, "config.json"), "rb") as file:
        return file.read()


def test_a_model_is_its_directory(store, source):
    """
    Code that takes a path takes a model: as a string, formatted, by the protocol of paths, and joined to a name.
    """
    model = store.ensure(source, progress=False)

    assert from_pretrained(model) == FILES["config.json"]
    assert str(model) == f"{model}" == format(model) == os.fspath(model) == str(model.path)
    assert f"{model:>300}" == str(model.path).rjust(300)
    assert model / "weights" / "a.bin" == model.path / "weights/a.bin"
    assert (model / "weights/a.bin").read_bytes() == FILES["weights/a.bin"]
    assert model / "../x" == model.path / "../x"
    assert repr(model).startswith("Model(uri=")


NO_SECONDS = [-1, -0.1, math.nan, True, False, "30", b"30", [], frozenset(), 1j, pow]
NO_COUNTS = [0, -1, 1.0, 2.5, math.nan, math.inf, True, False, "4", None, []]


@pytest.mark.parametrize("value", NO_SECONDS, ids=repr)
def test_what_is_no_time_is_refused(store, source, value):
    """
    A timeout is None or a number from 0; anything else is an error that names the argument, also where nothing waits.
    """
    store.ensure(source, progress=False)
    calls = [
        lambda: store.ensure(source, timeout=value),
        lambda: store.warm([source], timeout=value),
        lambda: store.import_("bundle", timeout=value),
        lambda: store.doctor(timeout=value),
    ]

    for call in calls:
        with pytest.raises(SettingsError, match="for `timeout`; use a number of seconds, 0 or more, or None"):
            call()
    with pytest.raises(SettingsError, match="for `trash_seconds`; use a number of seconds"):
        store.remove(source, trash_seconds=value)
    assert source in store


@pytest.mark.parametrize("value", NO_COUNTS, ids=repr)
def test_what_is_no_count_is_refused(store, source, value):
    """
    A count is a whole number from 1: a fraction is not rounded, and a truth value is not a number.
    """
    for call in (
        lambda: store.ensure(source, max_workers=value),
        lambda: store.warm([source], max_workers=value),
        lambda: ModelStore(store.root, part_bytes=value),
    ):
        with pytest.raises(SettingsError, match=r"for `(max_workers|part_bytes)`; use a whole number, 1 or more"):
            call()


@pytest.mark.parametrize("name", ["lease_seconds", "stall_seconds", "retry_seconds"])
@pytest.mark.parametrize("value", [*NO_SECONDS, 0, 0.0], ids=repr)
def test_what_is_no_duration_is_refused(store, name, value):
    """
    A duration of a store is a number above 0, and a lease one within limits.
    """
    with pytest.raises(SettingsError, match=f"for `{name}`; use a number of seconds"):
        ModelStore(store.root, **{name: value})


@pytest.mark.parametrize("timeout", [None, 0, 0.0, 5, math.inf, Fraction(1, 2)])
def test_a_time_may_be_any_number_or_none(store, source, timeout):
    """
    0 does not wait, None and infinity wait without limit, and the kind of number makes no difference.
    """
    assert store.ensure(source, timeout=timeout, progress=False).files == len(FILES)


def test_none_waits_without_limit(store, source):
    """
    With None as the timeout a thread waits for another one that downloads, and gets what that brought.
    """
    with ThreadPoolExecutor(2) as threads:
        found = [threads.submit(store.ensure, source, timeout=None, progress=False) for _ in range(2)]

    assert {future.result().path for future in found} == {store.get(source).path}


class Index:
    """
    A whole number of another library, as NumPy's.
    """

    def __index__(self):
        return 3


def test_checks_return_plain_numbers():
    """
    What is checked is a float or an int afterwards, whatever kind of number it was before.
    """
    assert [check_timeout(None), check_timeout(Fraction(1, 2)), check_timeout(3)] == [math.inf, 0.5, 3.0]
    assert check_seconds("name", Fraction(7, 2), least=1, most=4) == 3.5
    assert (check_count("name", Index()), type(check_count("name", Index()))) == (3, int)


def test_from_env_takes_what_a_store_takes():
    """
    The typed arguments of `from_env` are those of `ModelStore`, one for one.
    """
    arguments = inspect.signature(ModelStore).parameters.values()
    expected = {a.name: a.annotation for a in arguments if a.kind is a.KEYWORD_ONLY}

    assert {name: kind.__forward_arg__ for name, kind in StoreArguments.__annotations__.items()} == expected


def test_every_way_to_choose_a_model_is_spelled_alike():
    """
    Methods that take a model take revision and patterns as keywords, with None as their default.
    """
    for name, method in inspect.getmembers(ModelStore, inspect.isfunction):
        parameters = inspect.signature(method).parameters
        if not name.startswith("_") and "uri" in parameters:
            assert parameters["uri"].annotation == "Source", name
            for option in ("revision", "allow_patterns", "ignore_patterns"):
                assert (parameters[option].kind, parameters[option].default) == (inspect.Parameter.KEYWORD_ONLY, None)


def test_results_of_warming_are_one_of_two_classes(store, source, tmp_path):
    """
    A result has a model or an error, and its class says which.
    """
    good, bad = store.warm([source, tmp_path / "absent"], progress=False)

    assert (type(good), good.ok, good.error, good.model.uri) == (kserve_pvc.WarmedModel, True, None, f"file://{source}")
    assert (type(bad), bad.ok, bad.model, bad.uri) == (kserve_pvc.FailedModel, False, None, f"file://{tmp_path}/absent")
    assert isinstance(good, kserve_pvc.Warmed)
    assert isinstance(bad, kserve_pvc.Warmed)
    assert {field.name for field in attrs.fields(type(good))} == {field.name for field in attrs.fields(type(bad))}
