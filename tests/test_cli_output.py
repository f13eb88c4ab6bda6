"""
What the command line prints when something goes wrong that is not an error of the store.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from unittest.mock import patch

import pytest
import shell
from trees import write_files

from kserve_pvc import ModelStore
from kserve_pvc._cli.main import main

# A backend of another project, whose errors are of every kind.
PLUGIN = """
import asyncio


class Unreadable(Exception):
    def __str__(self):
        raise RuntimeError("no text")


def wrong(kind):
    match kind:
        case "type": raise TypeError("got 'NoneType' for https://host/m?X-Amz-Signature=can" + "ary")
        case "pipe": raise BrokenPipeError(32, "Broken pipe")
        case "cancelled": raise asyncio.CancelledError("task")
        case "unreadable": raise Unreadable
        case "exit": raise SystemExit("bye")
        case "interrupt": raise KeyboardInterrupt
        case "lines": raise OSError("one\\ntwo \\x1b[31m")


class Backend:
    def __init__(self, options):
        pass

    def resolve(self, ref):
        wrong(ref.location)

    def open_range(self, file, start, stop):
        raise AssertionError
"""
SERVICE = """
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata: {name: line}
spec: {predictor: {model: {modelFormat: {name: sklearn}, storageUri: s3://bucket/line}}}
"""
KINDS = ["type", "pipe", "cancelled", "unreadable", "exit", "lines"]


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """
    An installed plug-in that serves the scheme `foreign`.
    """
    place = tmp_path / "site"
    write_files(
        place,
        {
            "foreign_store.py": PLUGIN.encode(),
            "foreign_store-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: foreign-store\nVersion: 1.0\n",
            "foreign_store-1.0.dist-info/entry_points.txt": (
                b"[kserve_pvc.backends]\nforeign = foreign_store:Backend\n"
            ),
        },
    )
    monkeypatch.syspath_prepend(place)


@pytest.fixture
def run(root, monkeypatch, capsys):
    """
    Run a command in this process, and return its exit code, its output and its errors.
    """
    for name in [name for name in os.environ if name.startswith("KSERVE_PVC_")]:
        monkeypatch.delenv(name)
    handler = signal.getsignal(signal.SIGTERM)

    def bare(*arguments):
        try:
            code = main([*arguments])
        except SystemExit as leaving:
            code = leaving.code
        return code, *capsys.readouterr()

    def run(*arguments):
        return bare("--store", str(root), *arguments)

    run.bare = bare

    with patch.dict(os.environ):  # The initializer changes it.
        yield run
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.usefixtures("foreign")
@pytest.mark.parametrize("verb", ["ensure", "plan", "warm"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_error_of_a_foreign_backend_is_one_line_and_one_document(run, verb, kind):
    """
    Whatever a plug-in raises is a line without a secret on stderr and a document on stdout, not a traceback.
    """
    code, out, err = run("--json", "-q", verb, f"foreign://{kind}")

    (document,) = [json.loads(line) for line in out.splitlines()]
    error = document[0]["error"] if verb == "warm" and isinstance(document, list) else document["error"]
    assert (code, len(err.splitlines()), err.startswith("kserve-pvc: ")) == (1, 1, True)
    assert error["message"] in err
    assert ("Traceback" in err, "canary" in out + err) == (False, False)


@pytest.mark.usefixtures("foreign")
def test_verbose_shows_where_a_foreign_error_was_raised(run):
    """
    With `-v` the frames of the plug-in are shown too, and its message only without secrets.
    """
    code, _, err = run("-v", "plan", "foreign://type")

    assert (code, "in wrong" in err, "canary" in err) == (1, True, False)
    assert "in wrong" not in run("plan", "foreign://type")[2]


@pytest.mark.usefixtures("foreign")
def test_an_interrupt_prints_its_document(run):
    """
    Ctrl-C ends with 130, one line and one document.
    """
    code, out, err = run("--json", "plan", "foreign://interrupt")

    error = json.loads(out)["error"]
    assert (code, error["type"], err) == (130, "KeyboardInterrupt", f"kserve-pvc: {error['message']}\n")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fetch"],
        ["ensure"],
        ["ensure", "s3://a/b", "s3://c/d"],
        ["ensure", "--timeout", "soon", "s3://a/b"],
        ["ls", "--nonsense"],
        ["ls", "\x1b[31m"],
        ["verify"],
        ["warm"],
        ["import", "-"],
        ["export", "s3://a/b", "-"],
        ["completion", "powershell"],
        ["kserve"],
        ["kserve", "patch", "-f", "/not/there"],
        ["warm", "-f", "/not/there"],
        ["doctor", "--timeout", "-1"],
        ["webhook"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("option", ["--json", "--js"])
def test_wrong_usage_prints_its_document(run, arguments, option):
    """
    What cannot be understood is one document under `--json`, wherever it is found and however the option is cut.
    """
    code, out, err = run(*arguments, option)

    (document,) = [json.loads(line) for line in out.splitlines()]
    assert (code, list(document)) == (2, ["error"])
    assert err.splitlines()[-1] == f"kserve-pvc: {document['error']['message']}"
    assert "\x1b" not in err


@pytest.mark.parametrize(
    ("arguments", "field"), [(["--help"], "help"), (["ls", "-h"], "help"), (["--version"], "version")]
)
def test_help_and_version_have_documents(run, arguments, field):
    """
    Also what ends before a verb runs prints one document.
    """
    code, out, err = run("--json", *arguments)

    assert (code, list(json.loads(out)), err) == (0, [field], "")


def test_what_prints_other_formats_has_documents(run, tmp_path):
    """
    Manifests and completion scripts are fields of a document.
    """
    pytest.importorskip("shtab", reason="`shtab` is not installed, which makes the completion scripts")
    (tmp_path / "m.yaml").write_text(SERVICE)

    script = json.loads(run("--json", "completion", "bash")[1])
    patched = json.loads(run("--json", "kserve", "patch", "--claim", "models", "-f", str(tmp_path / "m.yaml"))[1])

    assert sorted(script) == ["script", "shell"]
    assert (sorted(patched), "InferenceService" in patched["manifests"]) == (["error", "manifests", "remarks"], True)


@pytest.mark.parametrize("words", [["--json", "initialize"], ["initialize", "--json"]], ids=" ".join)
@pytest.mark.parametrize("place", ["before", "after"])
def test_the_initializer_has_a_document_and_a_store(run, root, tmp_path, words, place):
    """
    `initialize` honours the store and `--json` on either side of the verb, and keeps its exit code 1.
    """
    write_files(tmp_path / "origin", {"a.bin": b"a"})
    source, filled, store = f"{tmp_path}/origin", f"{tmp_path}/filled", ["--store", str(tmp_path / "other")]
    (tmp_path / "other").mkdir()
    words = [*store, *words] if place == "before" else [*words, *store]

    done, failed, wrong = (
        run.bare(*words, *pair) for pair in ([source, filled], [f"{source}/absent", f"{filled}-not"], [source])
    )

    assert (done[0], json.loads(done[1])) == (0, {"models": [{"uri": source, "path": filled}]})
    assert (failed[0], json.loads(failed[1])["error"]["type"]) == (1, "SourceNotFoundError")
    assert (wrong[0], list(json.loads(wrong[1]))) == (1, ["error"])
    assert len(ModelStore(tmp_path / "other").list()) == 1


def in_a_shell(root, command: str) -> subprocess.CompletedProcess[str]:
    words = " ".join([*shell.COMMAND, "--store", str(root)])
    environ = shell.clean_environ()
    return subprocess.run(
        ["bash", "-c", command.replace("kserve-pvc", words)], capture_output=True, text=True, timeout=60, env=environ
    )


@pytest.mark.parametrize(
    ("verb", "redirection", "reason"),
    [
        ("ls", ">/dev/full", "No space left on device"),
        ("--json ls", ">&-", "Bad file descriptor"),
        ("--help", ">/dev/full", "No space left on device"),
        ("--json --version", "<&- >&-", "Bad file descriptor"),
    ],
)
def test_output_that_cannot_be_written_is_an_error(root, verb, redirection, reason):
    """
    A full or closed standard output ends with 1 and one line that names it, not with a traceback or with success.
    """
    ModelStore(root, mode="rw")

    done = in_a_shell(root, f"kserve-pvc {verb} {redirection}")

    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == (
        f"kserve-pvc: writing failed on `standard output`: {reason}; redirect it to where there is room"
    )


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-"])
def test_a_log_that_cannot_be_written_ends_nothing(root, tmp_path, redirection):
    """
    A full or closed stderr neither fails a download nor adds to the document on stdout.
    """
    write_files(tmp_path / "origin", {"a.bin": b"a"})

    done = in_a_shell(root, f"kserve-pvc --json ensure {tmp_path}/origin {redirection}")
    absent = in_a_shell(root, f"kserve-pvc --json path {tmp_path}/absent {redirection}")

    assert (done.returncode, json.loads(done.stdout)["status"]) == (0, "downloaded")
    assert (absent.returncode, list(json.loads(absent.stdout))) == (3, ["error"])


def test_the_initializer_survives_a_full_log(tmp_path):
    """
    The storage initializer fills its directory although nobody can be told.
    """
    write_files(tmp_path / "origin", {"a.bin": b"a"})

    words = " ".join([*shell.COMMAND, "initialize", f"{tmp_path}/origin", f"{tmp_path}/filled"])
    done = subprocess.run(["bash", "-c", f"{words} 2>/dev/full"], timeout=60, env=shell.clean_environ())

    assert (done.returncode, (tmp_path / "filled/a.bin").read_bytes()) == (0, b"a")


def test_a_terminated_command_prints_its_document(root, tmp_path):
    """
    SIGTERM ends with 143 and one document.
    """
    os.mkfifo(tmp_path / "catalogue")

    process = shell.start(root, "--json", "warm", "-f", str(tmp_path / "catalogue"))
    with process, (tmp_path / "catalogue").open("w"):  # It reads by now.
        process.terminate()
        out, _ = process.communicate(timeout=30)

    assert (process.returncode, list(json.loads(out))) == (143, ["error"])


def test_a_path_that_is_not_text_is_printed_as_it_is(tmp_path):
    """
    A store in a directory whose name is not UTF-8 prints the bytes of that name.
    """
    place = os.fsencode(tmp_path) + b"/store\xff"
    Path(os.fsdecode(place)).mkdir()
    write_files(tmp_path / "origin", {"a.bin": b"a"})
    command = [*map(os.fsencode, shell.COMMAND), b"--store", place, b"ensure", os.fsencode(tmp_path / "origin")]

    done = subprocess.run(command, capture_output=True, timeout=60, env=shell.clean_environ({"PYTHONUTF8": "1"}))

    assert (done.returncode, done.stdout.startswith(place + b"/models/")) == (0, True)
