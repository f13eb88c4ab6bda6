"""
System calls of a download, a plan, a removal and a refresh: they follow the model, and neither the store nor its past.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from crowded import add_models, lengthen_log
from trees import read_tree, write_files

from kserve_pvc import ModelStore

# How many times as many calls are still the same cost: an attempt differs from the next by a few of its threads'.
AT_MOST = 1.2
MANY = 10_000
VERSIONS = 3_000
# Calls by which threads wait for each other. How many there are is chance.
WAITING = {"futex", "sched_yield", "clock_nanosleep", "restart_syscall", "madvise", "mprotect", "munmap", "mmap", "brk"}

SCRIPT = """
import os, sys
from kserve_pvc import ModelStore
from kserve_pvc._download import attempt, download, plan, publication, transfer
from kserve_pvc._keys import removal
from kserve_pvc.backends.file import FileBackend
root, uri, act = sys.argv[1:]
store = ModelStore(root, mode="rw", backends={"file": FileBackend})
def mark():
    try:
        os.stat("/between the marks")
    except OSError:
        pass
mark()
if act == "plan":
    store.plan(uri)
elif act == "remove":
    store.remove(uri)
else:
    store.ensure(uri, refresh=act == "refresh", progress=False, max_workers=2)
mark()
"""
_CALL = re.compile(r"\d+ +(\w+)\(")


@pytest.fixture
def count(tool, tmp_path) -> Callable[[Path, str, str], Counter[str]]:
    """
    Do something in another process, and count its system calls by their names, without those that wait.
    """
    strace = tool("strace")

    def run(root: Path, uri: str, act: str) -> Counter[str]:
        log = tmp_path / "calls.log"
        command = [strace, "-f", "-qq", "-o", str(log), sys.executable, "-I", "-c", SCRIPT, str(root), uri, act]
        subprocess.run(command, check=True, timeout=300)
        lines = log.read_text().splitlines()
        first, last = (number for number, line in enumerate(lines) if "/between the marks" in line)
        found = Counter(match[1] for line in lines[first + 1 : last] if (match := _CALL.match(line)))
        return Counter({name: number for name, number in found.items() if name not in WAITING})

    return run


def small_store(place: Path) -> tuple[ModelStore, str, str]:
    """
    A store of one model of one byte, its URI, and one that is not there.
    """
    (place / "volume").mkdir(parents=True)
    for name in ("model", "target"):
        write_files(place / name, {"model.bin": b"x"})
    store = ModelStore(place / "volume", mode="rw")
    store.ensure(f"file://{place}/model", progress=False)
    return store, f"file://{place}/model", f"file://{place}/target"


def test_the_number_of_other_models_costs_nothing(tmp_path, count):
    """
    A plan, a download, a refresh and a removal of one byte take as many calls among ten thousand models as beside one.
    """
    acts, totals = ("plan", "ensure", "refresh", "remove"), []
    for name, models in (("one", 0), ("many", MANY)):
        store, uri, target = small_store(tmp_path / name)
        add_models(store, uri, models)
        totals.append(counted(count, store, target, acts))

    print(totals)
    one, many = totals
    assert {act: many[act] <= AT_MOST * one[act] for act in acts} == dict.fromkeys(acts, True)


def counted(count, store: ModelStore, uri: str, acts: Sequence[str]) -> dict[str, int]:
    """
    The calls of several acts after each other. There is something new before a refresh.
    """
    found = {}
    for act in acts:
        if act == "refresh":
            write_files(Path(uri.removeprefix("file://")), {"model.bin": b"changed"})
        found[act] = sum(count(store.root, uri, act).values())
        if act == "refresh":
            assert read_tree(ModelStore(store.root).get(uri).path) == {"model.bin": b"changed"}
    return found


def test_models_that_are_called_alike_cost_a_bounded_number_of_looks(tmp_path, count):
    """
    Ten thousand models of other sources, each in a directory of the same name, are not all read.
    """
    store, _, target = small_store(tmp_path / "alike")
    few = sum(count(store.root, target, "plan").values())
    for number in range(30):
        write_files(tmp_path / f"{number}" / "target", {"model.bin": b"x"})
        store.ensure(f"file://{tmp_path}/{number}/target", progress=False)

    assert sum(count(store.root, target, "plan").values()) <= AT_MOST * few


@pytest.mark.parametrize(("acts", "has_files"), [(("plan", "refresh"), True), (("remove",), False)], ids=repr)
def test_the_length_of_a_log_costs_nothing(tmp_path, count, acts, has_files):
    """
    A plan and a refresh take as many calls after thousands of versions as after one, and so does a removal but for the
    versions that it deletes.
    """
    totals = []
    for name, versions in (("short", 0), ("long", VERSIONS)):
        store, uri, _ = small_store(tmp_path / name)
        lengthen_log(store, uri, versions, has_files=has_files)
        totals.append(counted(count, store, uri, acts))

    print(totals)
    short, long = totals
    assert {act: long[act] <= AT_MOST * short[act] for act in acts} == dict.fromkeys(acts, True)


def test_what_dead_downloads_of_other_models_left_costs_nothing(tmp_path, count):
    """
    Thousands of journals and of generations that are no model of this key are listed, and not read.
    """
    totals = []
    for name, dead in (("tidy", 0), ("littered", 5000)):
        store, _, target = small_store(tmp_path / name)
        for number in range(dead):
            (store.root / ".kserve-pvc" / "staging" / f"{1:012d}-{number:032x}").mkdir(parents=True)
        totals.append(sum(count(store.root, target, "ensure").values()))

    print(totals)
    assert totals[1] <= AT_MOST * totals[0]


def test_an_unchanged_file_is_opened_at_most_four_times(tmp_path, count):
    """
    A refresh of many linked files opens each to read and to link it, and syncs none of them.
    """
    files = {f"{number % 20}/{number:05}": b"%d" % number for number in range(2000)}
    (tmp_path / "volume").mkdir()
    write_files(tmp_path / "model", files)
    store, uri = ModelStore(tmp_path / "volume", mode="rw"), f"file://{tmp_path}/model"
    store.ensure(uri, progress=False)
    write_files(tmp_path / "model", {"0/00000": b"changed"})

    calls = count(store.root, uri, "refresh")

    print(calls.most_common(12))
    assert calls["linkat"] >= 1999
    assert (calls["openat"] + calls["openat2"]) / len(files) <= 4
    assert sum(calls.values()) / len(files) <= 16
    assert calls["fsync"] + calls["fdatasync"] + calls["syncfs"] <= 100
    assert read_tree(ModelStore(store.root).get(uri).path) == {**files, "0/00000": b"changed"}


def test_a_model_of_one_file_is_synced_few_times(tmp_path, count):
    """
    What has to be durable is synced once: the file, four directories of it, the manifest, the number, and the record
    with the directories above.
    """
    store, _, target = small_store(tmp_path)

    calls = count(store.root, target, "ensure")

    assert calls["fsync"] + calls["fdatasync"] + calls["syncfs"] <= 16


@pytest.mark.parametrize("names", [0, 1, 300, 5000])
def test_a_large_directory_is_listed_whole(tmp_path, names):
    """
    Calls with a large buffer give the same names as the standard library's, whatever letters they have.
    """
    import os

    from kserve_pvc._volume.calls import list_large

    for number in range(names):
        (tmp_path / os.fsdecode(b"\xff%d" % number + b"\xc3\xa4" * (number % 60))).touch()
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        assert sorted(list_large(fd)) == sorted(os.listdir(tmp_path))
    finally:
        os.close(fd)
