"""
What the command line prints is accepted back, what it would ignore is refused, and what is damaged is shown.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator

import pytest
from sources import FakeBackend

from kserve_pvc import DigestMismatchError, ModelRef, ModelStore, OfflineError
from kserve_pvc._cli.main import main


@pytest.fixture
def run(root, monkeypatch, capsys) -> Iterator:
    """
    Run a verb inside this process, which gets its signal handler back.
    """
    for name in [name for name in os.environ if name.startswith("KSERVE_PVC_")]:
        monkeypatch.delenv(name)
    handler = signal.getsignal(signal.SIGTERM)

    def act(*arguments: str, **environ: str) -> tuple[int, str, str]:
        with monkeypatch.context() as patched:
            for name, value in environ.items():
                patched.setenv(name, value)
            code = main(["--store", str(root), *arguments])
        return code, *capsys.readouterr()

    yield act
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def model(root, source):
    """
    A model of some of the files of a source, with an alias.
    """
    store = ModelStore(root, mode="rw")
    model = store.ensure(f"file://{source}", allow_patterns="*.json", progress=False)
    store.alias("llama", model)
    return model


NAMES = {
    "key": lambda model, root: model.key,
    "16 hex digits": lambda model, root: model.key[-16:],
    "alias": lambda model, root: "llama",
    "directory": lambda model, root: str(model.path),
    "file": lambda model, root: str(model.path / "config.json"),
    "view": lambda model, root: str(root / "models" / model.key[-16:]),
    "alias path": lambda model, root: str(root / "names/llama"),
}


VERBS = ["info", "verify", "plan", "ensure", "export", "alias", "locks", "rm"]


@pytest.mark.parametrize(("verb", "kind"), [*(("path", kind) for kind in NAMES), *((verb, "key") for verb in VERBS)])
def test_a_name_that_is_printed_is_accepted(root, run, model, tmp_path, kind, verb):
    """
    Each verb takes a key, an alias or a directory of the store for the model, with its revision and patterns.
    """
    name = NAMES[kind](model, root)
    arguments = {
        "export": ["export", name, str(tmp_path / "bundle")],
        "alias": ["alias", "other", name],
        "locks": ["locks", "--break", name],
        "rm": ["rm", "--now", name],
    }.get(verb, [verb, name])

    code, out, err = run("--json", *arguments)

    assert code == 0, err
    if verb == "path":
        assert json.loads(out)["path"] == str(model.path)
    if verb == "rm":
        assert json.loads(out) == {"uri": model.uri, "removed": True}
        assert ModelStore(root).list() == []


def test_a_name_of_nothing_is_still_no_uri(root, run, model):
    """
    A word that the store has not printed is refused as before, and a path outside is a source.
    """
    assert run("path", "nothing")[0] == 2
    assert run("path", f"{model.key[:-1]}{'1' if model.key.endswith('0') else '0'}")[0] == 2
    assert run("path", "/nowhere/models/llama")[0] == 3
    assert run("rm", model.key, "--revision", "1")[0] == 2
    assert ModelStore(root).find("nothing") is None


def test_the_key_of_a_damaged_or_removed_model_is_known(root, run, model):
    """
    An older record, or the damaged one's claim, says which model it is; so it can be verified, fetched and removed.
    """
    store = ModelStore(root, mode="rw")
    again = store.ensure(model.ref, force_download=True, progress=False)
    newest = max((root / f".kserve-pvc/keys/{model.key}/log").glob("*.commit"))
    newest.chmod(0o644)
    newest.write_bytes(b"damaged")

    code, out, _ = run("verify", model.key)

    assert (code, "BAD" in out) == (1, True)
    assert store.find(model.key) == model.ref == again.ref
    assert run("rm", "--now", model.key)[0] == 0
    assert run("path", model.key)[0] == 3


def test_the_key_of_leftovers_is_known_by_their_claim(root):
    """
    A download that never published has no record; its claim names the source.
    """
    ref = ModelRef(uri="file:///nowhere/model")
    store = ModelStore(root, mode="rw")
    with pytest.raises(FileNotFoundError):
        store.ensure(ref, progress=False)

    assert store.find(ref.key) in (ref, None)
    assert (root / f".kserve-pvc/keys/{ref.key}").exists() == (store.find(ref.key) == ref)


@pytest.mark.parametrize(
    "arguments",
    [
        ["verify", "--all", "URI"],
        ["verify", "--all", "--revision", "1"],
        ["verify", "--all", "--allow", "*.json"],
        ["verify", "--all", "--ignore", "*.json"],
        ["locks", "--revision", "1"],
        ["alias", "--revision", "1"],
        ["alias", "--drop", "llama", "other", "URI"],
    ],
    ids=" ".join,
)
def test_what_would_be_ignored_is_refused(run, model, arguments):
    """
    An argument without a meaning is an error of usage, and nothing is done.
    """
    assert run(*(model.uri if argument == "URI" else argument for argument in arguments))[0] == 2
    assert run("path", "llama")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "environ"),
    [(["--local-files-only"], {}), ([], {"KSERVE_PVC_OFFLINE": "1"})],
    ids=["local_files_only", "KSERVE_PVC_OFFLINE"],
)
@pytest.mark.parametrize("exists", [True, False])
def test_an_offline_refusal_says_so(root, run, exists, arguments, environ):
    """
    The error names the setting that forbids the download, whether there is a store or not.
    """
    if exists:
        ModelStore(root, mode="rw")

    code, out, err = run("--json", "ensure", "s3://bucket/absent", *arguments, **environ)

    error = json.loads(out)["error"]
    assert (code, error["type"]) == (3, OfflineError.__name__)
    assert next(iter(environ), "local_files_only") in err


def break_record(root, key: str) -> None:
    newest = max((root / f".kserve-pvc/keys/{key}/log").glob("*.commit"))
    newest.chmod(0o644)
    newest.write_bytes(b"damaged")


def test_ls_shows_what_is_damaged(root, run, model):
    """
    A model that counts as absent because its record is damaged is a row of its own, and its key leads on.
    """
    break_record(root, model.key)

    code, out, err = run("ls")
    (row,) = json.loads(run("--json", "ls")[1])

    assert (code, "DAMAGED" in out, model.key in out) == (0, True, True)
    assert "1 model damaged" in err
    assert (row["key"], row["path"]) == (model.key, None)
    assert "damage" in row
    assert run("verify", model.key)[0] in (1, 2)


def test_ls_and_du_show_what_is_unfinished(root, run, model):
    """
    What an interrupted download occupies is in the summary and, by key, in the table; a complete model has none.
    """
    wrong = FakeBackend({"a.bin": os.urandom(300_000), "z.bin": b"z"}, sha256={"z.bin": "0" * 64})
    with pytest.raises(DigestMismatchError):
        ModelStore(root, mode="rw", backends={"fake": wrong.factory}).ensure(
            "fake://h/m", progress=False, max_workers=1
        )

    _, out, err = run("du")
    document = json.loads(run("--json", "du")[1])

    used = {key["uri"]: key for key in document["keys"]}
    assert 290_000 < used["fake://h/m"]["unfinished_bytes"] < 400_000
    assert (used[model.uri]["unfinished_bytes"], used[model.uri]["size_bytes"]) == (0, model.size_bytes)
    assert "fake://h/m" in out
    assert "in the trash" in err
    assert "of 1 unfinished download" in run("ls")[2]


def test_verify_full_shows_progress(run, model):
    """
    Reading every byte takes long, so it is shown, unless the command is quiet; comparing sizes is not.
    """
    full, quiet, size = (run(*options, "verify", *level, "--all")[2] for options, level in MODES)

    assert full.startswith(f"kserve-pvc: verifying {model.uri}: ")
    assert (quiet, size) == ("", "")


MODES = (([], ["--full"]), (["-q"], ["--full"]), ([], []))


@pytest.mark.parametrize("place", ["line", "argument", "object"])
def test_an_item_of_warm_has_options_of_its_own(root, run, source, tmp_path, place):
    """
    A selection and a way to fetch for each model: after its URI in a file or in quotes, or as fields of an object.
    """
    options = {
        "line": "--allow '*.json' --allow 'w*' --force-download",
        "argument": "--allow '*.json' --allow 'w*' --force-download",
    }
    item = f"file://{source} {options.get(place, '')}"
    if place == "object":
        item = json.dumps({"uri": f"file://{source}", "allow_patterns": ["*.json", "w*"], "force_download": True})
    (tmp_path / "catalogue").write_text(f"# models\n{item}\nfile://{source}\n")
    arguments = [item, f"file://{source}"] if place == "argument" else ["-f", str(tmp_path / "catalogue")]

    first, second = (run("--json", "warm", *arguments) for _ in range(2))

    assert (first[0], second[0]) == (0, 0)
    statuses = [[row["status"] for row in json.loads(out)] for _, out, _ in (first, second)]
    assert statuses == [["downloaded", "downloaded"], ["downloaded", "present"]]
    assert ModelStore(root).get(f"file://{source}", allow_patterns=["*.json", "w*"]).status == "present"


@pytest.mark.parametrize("options", ["--nonsense", "--revision", "--allow 'open"])
def test_an_option_of_an_item_that_is_wrong_is_refused(root, run, source, options):
    """
    The error names the item, and nothing is fetched.
    """
    code, _, err = run("warm", f"file://{source} {options}")

    assert (code, "item 1" in err, list(root.iterdir())) == (2, True, [])
