"""
A directory without a store, as where a volume is not mounted: what reads says so, and what only reads makes none.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kserve_pvc import ModelNotFoundError, ModelStore, NoStoreError
from kserve_pvc._cli.main import main

URI = "file:///nowhere/model"
BUNDLE = "/nowhere/bundle.tar"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(root, monkeypatch, capsys) -> Iterator[Run]:
    """
    Run a verb inside this process, which gets its signal handler back.
    """
    for name in [name for name in os.environ if name.startswith("KSERVE_PVC_")]:
        monkeypatch.delenv(name)
    handler = signal.getsignal(signal.SIGTERM)

    def act(*arguments: str) -> tuple[int, str, str]:
        code = main(["--store", str(root), *arguments])
        return code, *capsys.readouterr()

    yield act
    signal.signal(signal.SIGTERM, handler)


READS = [
    ["ls"],
    ["verify", "--all"],
    ["verify", "--all", "--full"],
    ["verify", URI],
    ["locks"],
    ["locks", "--break", URI],
    ["alias"],
    ["alias", "llama", URI],
    ["alias", "--drop", "llama"],
    ["path", URI],
    ["info", URI],
    ["export", URI, "/nowhere/out.tar"],
    ["rm", URI],
    ["rm", "--now", URI],
]


@pytest.mark.parametrize("verb", READS, ids=" ".join)
def test_a_verb_about_what_is_there_fails_where_there_is_no_store(root, run, verb):
    """
    It ends with 3 and an error of its own kind, names the directory, and makes nothing.
    """
    code, out, err = run("--json", *verb)

    error = json.loads(out)["error"]
    assert (code, error["type"], error["root"]) == (3, "NoStoreError", str(root))
    assert f"no store at `{root}`" in err
    assert list(root.iterdir()) == []


@pytest.mark.parametrize(
    ("verb", "code"),
    [
        (["ensure", URI], 7),
        (["ensure", "nonsense://host/model"], 2),
        (["ensure", "file:///", "--timeout", "-1"], 2),
        (["ensure", "file:///", "--max-workers", "0"], 2),
        (["warm", "-f", "/nowhere/catalogue"], 2),
        (["warm", "-f", os.devnull], 0),
        (["warm", "no-uri"], 2),
        (["import", BUNDLE], 7),
        (["import", "-"], 2),
        (["plan", URI], 7),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_begin_makes_no_store(root, run, verb, code):
    """
    A download or an import of nothing fails as it would in a store, and leaves the directory as it was.
    """
    assert run(*verb)[0] == code
    assert list(root.iterdir()) == []


def test_an_import_of_what_is_no_bundle_makes_no_store(root, run, tmp_path):
    """
    Neither a file that is none nor a digest that another bundle has.
    """
    (tmp_path / "file.tar").write_bytes(b"no bundle" * 1000)

    assert run("import", str(tmp_path / "file.tar"))[0] == 1
    assert list(root.iterdir()) == []


def test_a_plan_says_that_there_is_no_store_yet(root, run, source):
    """
    A plan is about a download, which would make the store, so it is no error.
    """
    code, _, err = run("plan", f"file://{source}")

    assert (code, list(root.iterdir())) == (0, [])
    assert f"there is no store at {root} yet" in err


@pytest.mark.parametrize("how", ["init", "ensure", "warm", "import"])
def test_init_or_what_is_downloaded_makes_a_store(root, run, source, tmp_path, how):
    """
    Afterwards an empty store is none of a kind with no store: what reads succeeds.
    """
    if how == "import":
        (tmp_path / "other").mkdir()
        ModelStore(tmp_path / "other", mode="rw").ensure(f"file://{source}", progress=False)
        ModelStore(tmp_path / "other").export(f"file://{source}", tmp_path / "bundle", progress=False)
    made = {"init": [], "import": [str(tmp_path / "bundle")]}.get(how, [f"file://{source}"])

    codes = [run(how, *made)[0], *(run(*verb)[0] for verb in (["ls"], ["verify", "--all"], ["locks"], ["alias"]))]

    assert codes == [0] * 5


def test_init_says_what_the_store_is(root, run):
    """
    It prints the directory, is the same for a store that is there, and takes what counts when a store is made.
    """
    first = run("-q", "init", "--lease-seconds", "7", "--locker", "flock")
    code, out, _ = run("--json", "init")

    document = json.loads(out)
    assert first == (0, f"{root}\n", "")
    assert (code, document["root"], document["locker"], document["lease_seconds"]) == (0, str(root), "flock", 7)
    assert run("init", "--lease-seconds", "8")[0] == 2


def test_init_makes_no_directory_and_respects_the_mode(root, run, monkeypatch):
    """
    A directory that is not there is a volume that is not mounted; and a process that may not write makes no store.
    """
    assert main(["--store", str(root / "absent"), "init"]) == 1
    monkeypatch.setenv("KSERVE_PVC_MODE", "r")
    assert run("init")[0] == 4
    assert list(root.iterdir()) == []


def test_a_store_in_python_says_whether_there_is_one(root, source):
    """
    It may be opened before there is one, and notices when there is.
    """
    store = ModelStore(root)
    with pytest.raises(NoStoreError) as caught:
        store.get(f"file://{source}")
    before = store.exists
    ModelStore(root, mode="rw")

    assert isinstance(caught.value, ModelNotFoundError)
    assert (before, store.exists) == (False, True)
    with pytest.raises(ModelNotFoundError) as caught:
        store.get(f"file://{source}")
    assert type(caught.value) is ModelNotFoundError


def test_models_without_settings_are_no_store(root, source, run):
    """
    A copy that left out `.kserve-pvc` has files of models, and still no store.
    """
    ModelStore(root, mode="rw").ensure(f"file://{source}", progress=False)
    (root / ".kserve-pvc").rename(Path(root).parent / "lost")

    assert run("ls")[0] == 3
