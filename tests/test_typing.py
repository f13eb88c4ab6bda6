"""
What type checkers say about a project that uses the package: its types are part of its interface.
"""

import importlib.util
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kserve_pvc

# A project of a user, with a call of every method. Each `reveal_type` is checked below.
PROJECT = '''\
"""A model server, a warming job and a backend of a user's own."""

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, assert_type

import kserve_pvc
from kserve_pvc import (
    Backend,
    BackendFactory,
    Event,
    FailedModel,
    Level,
    Mode,
    Model,
    ModelRef,
    ModelStore,
    Patterns,
    Plan,
    RangeReader,
    Record,
    RemoteFile,
    Resolved,
    SettingsError,
    Source,
    StoreArguments,
    StoreError,
    Verification,
    Warmed,
    WarmedModel,
    mode_from_annotations,
    order_listing,
)


class Shelf:
    """A backend needs no base class."""

    def resolve(self, ref: ModelRef) -> Resolved:
        return order_listing(ref, [], version="1")

    def open_range(self, file: RemoteFile, start: int, stop: int) -> AbstractContextManager[RangeReader]:
        raise NotImplementedError


def make_shelf(options: Mapping[str, Any]) -> Backend:
    return Shelf()


factory: BackendFactory = make_shelf
mode: Mode = "rw"
level: Level = "full"
patterns: Patterns = ["*.json"]
common: StoreArguments = {"mode": mode, "offline": True, "lease_seconds": 30}
store = ModelStore("/mnt/models", mode=mode, backends={"shelf": factory}, storage_options={"key": "value"})
store = ModelStore(Path("/mnt/models"), **common)
store = ModelStore.from_env(annotations={}, mode="r", lease_seconds=30.0, storage_options={})
assert_type(store.mode, Mode)
assert_type(store.root, Path)
assert_type(mode_from_annotations({}), Mode)

sources: list[Source] = ["s3://bucket/model", Path("/model"), ModelRef(uri="s3://bucket/model")]
for source in sources:
    model = store.ensure(source, timeout=None, max_workers=4, progress=False)
    assert_type(model, Model)
    assert_type(model / "config.json", Path)
    assert_type(os.fspath(model), str)
    assert_type(model.record, Record)
    assert_type(model.ref, ModelRef)
    assert_type(source in store, bool)
    assert_type(store.get(source, revision="v1", allow_patterns=patterns, ignore_patterns="*.bin"), Model)
    assert_type(store.list(), list[Model])
    assert_type(store.resolve(source), Resolved)
    assert_type(store.plan(source, refresh=True), Plan)
    assert_type(store.verify(source, level), Verification)
    store.verify(model)
    store.remove(source, trash_seconds=0)
    store.alias("name", source)
    store.drop_alias("name")
    store.break_lock(source)
    with store.open(source) as held:
        assert_type(held, Model)
    store.export(source, "bundle")
    assert_type(store.import_("bundle", timeout=5), Model)
verifications: Iterator[Verification] = store.verify_all("full")
holders: list[str] = [lock.holder for lock in store.locks()]
names: Mapping[str, str] = store.aliases()
assert_type(store.find("llama"), ModelRef | None)
assert_type(store.usage(), kserve_pvc.Usage)
healthy: bool = store.doctor(timeout=None).ok


def tell(result: Warmed) -> str:
    if result.error is not None:
        assert_type(result, FailedModel)
        return f"{result.uri}: {result.error}"
    assert_type(result, WarmedModel)
    return f"{result.ref.key}: {result.model.path}"


def tell_shortly(result: Warmed) -> Path | None:
    return result.model.path if isinstance(result, WarmedModel) else None


def show(event: Event) -> None:
    print(event)


with ThreadPoolExecutor(2) as threads:
    for result in store.warm(sources, threads):
        print(tell(result), tell_shortly(result))
for result in store.warm([{"uri": "s3://bucket/model", "revision": "v1"}, "s3://bucket/other"]):
    print(tell(result))

try:
    store.get("s3://bucket/absent")
except SettingsError as error:
    print(error.name, error.value, error.hint)
except kserve_pvc.ReadOnlyStoreError as error:
    print(error.operation, error.hint, error.exit_code)
except StoreError as error:
    print(error.fields)
'''

# What must not pass: the line, and what it is about.
MISTAKES = [
    ('ModelStore("/mnt", mode="w")', "mode"),
    ('ModelStore.from_env(moed="r")', "moed"),
    ('ModelStore.from_env(lease_seconds="30")', "lease_seconds"),
    ('ModelStore("/mnt").ensure(5)', "ensure"),
    ('ModelStore("/mnt").ensure("s3://b/m", timeout="5")', "timeout"),
    ('ModelStore("/mnt").verify("s3://b/m", "deep")', "verify"),
    ('[r.model.path for r in ModelStore("/mnt").warm([])]', "path"),
    ("import kserve_pvc; kserve_pvc.ModelStor", "ModelStor"),
]


def mypy(place: Path) -> list[str]:
    """
    The complaints of mypy about a file, under its strict rules.
    """
    pytest.importorskip("mypy")
    command = [sys.executable, "-Im", "mypy", "--strict", "--no-incremental", "--no-error-summary", place.name]
    result = subprocess.run(command, cwd=place.parent, capture_output=True, text=True, timeout=300)
    assert result.returncode in (0, 1), result.stderr
    return [line for line in result.stdout.splitlines() if ": error: " in line]


def pyright(place: Path) -> list[str]:
    """
    The complaints of pyright about a file, under its strict rules.
    """
    if importlib.util.find_spec("pyright") is None:
        pytest.skip("pyright is not installed")
    (place.parent / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}')
    command = [sys.executable, "-Im", "pyright", "--outputjson", "--pythonpath", sys.executable, place.name]
    result = subprocess.run(command, cwd=place.parent, capture_output=True, text=True, timeout=300)
    if result.returncode not in (0, 1) or not result.stdout.startswith("{"):
        pytest.skip(f"pyright cannot run here: {(result.stderr or result.stdout).strip()[-200:]}")
    found = json.loads(result.stdout)["generalDiagnostics"]
    return [f"{d['range']['start']['line'] + 1}: {d['message']}" for d in found if d["severity"] == "error"]


@pytest.fixture(params=[mypy, pyright], ids=lambda checker: checker.__name__)
def checker(request):
    """
    A type checker.
    """
    return request.param


def test_a_users_project_is_sound(checker, tmp_path):
    """
    A small project that calls every method has no complaint under strict rules.
    """
    place = tmp_path / "project.py"
    place.write_text(PROJECT)

    assert checker(place) == []


def test_a_users_mistakes_are_found(checker, tmp_path):
    """
    Each mistake in a call is found in its own line.
    """
    place = tmp_path / "mistakes.py"
    place.write_text("from kserve_pvc import ModelStore\n" + "".join(f"{line}\n" for line, _ in MISTAKES))

    found = checker(place)

    for number, (line, about) in enumerate(MISTAKES, 2):
        assert any(re.search(rf"\b{number}: .*{about}", complaint, re.DOTALL) for complaint in found), (line, found)


def test_the_project_uses_the_whole_interface():
    """
    Every public method of a store is called in the project, so that a new one is checked too.
    """
    methods = {name for name, _ in inspect.getmembers(kserve_pvc.ModelStore, callable) if not name.startswith("_")}

    assert {name for name in methods if not re.search(rf"\b(store|ModelStore)\.{name}\(", PROJECT)} == set()
