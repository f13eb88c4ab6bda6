"""
The storage initializer as KServe runs it: pairs of a source and a directory, an environment, and an exit code.
"""

import hashlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import kserve_rules
import pytest
import shell
from trees import listing, model_files, read_tree, write_files
from users import public_directory
from waiting import until
from webserver import WebServer

import kserve_pvc
from kserve_pvc import (
    FileEntry,
    InvalidURIError,
    LockTimeoutError,
    ModelStore,
    PolicyError,
    RemoteFile,
    SettingsError,
    SourceNotFoundError,
    UnknownSchemeError,
    UnsafePathError,
)
from kserve_pvc.kserve import Storage, _initialize
from kserve_pvc.kserve._contents import OURS, RECORD, Contents, Source
from kserve_pvc.kserve._counting import find_only_file
from kserve_pvc.kserve._destination import Destination
from kserve_pvc.kserve._environment import leave_to_s3, read_variables, trust_bundle
from kserve_pvc.kserve._initialize import fill_all, main
from kserve_pvc.kserve._schemes import check_supported
from kserve_pvc.kserve._sources import read_source
from kserve_pvc.locks.flock import grab_file
from kserve_pvc.locks.liveness import here

FILES = model_files(seed=61, big=300_000)
COMMAND = [sys.executable, "-I", "-c", "import sys; from kserve_pvc.kserve._initialize import main; sys.exit(main())"]
# Another user may not be able to read this interpreter's libraries, so everything is imported before.
AS_OPENSHIFT = """
import os, sys, ctypes, fcntl, portalocker
from kserve_pvc import *
from kserve_pvc._archive import unpack as _unpack
from kserve_pvc._archive import bundle as _bundle
from kserve_pvc._download import download as _download
from kserve_pvc._download import attempt as _attempt
from kserve_pvc._keys import removal as _removal
from kserve_pvc._show import observing as _observing
from kserve_pvc._show import progress as _progress
from kserve_pvc.backends import file
from kserve_pvc.kserve._initialize import main
from kserve_pvc.kserve._schemes import check_supported
from kserve_pvc.kserve._sources import read_source

os.umask(0o077)
os.setgroups([])
os.setgid(0)
os.setuid(1000620000)
sys.exit(main())
"""
MEMORY_MODEL = int(os.environ.get("KSERVE_PVC_TEST_INIT_MIB", "1100")) * 1024 * 1024
REPLACING = {"KSERVE_PVC_REPLACE": "any"}
KILLS = int(os.environ.get("KSERVE_PVC_TEST_INIT_KILLS", "10"))


pytestmark = pytest.mark.usefixtures("initializer_environment")


@pytest.fixture
def uri(source):
    return f"file://{source}"


@pytest.fixture
def place(tmp_path):
    """
    A destination, as a mount of an empty volume.
    """
    found = tmp_path / "mnt-models"
    found.mkdir()
    return found


@pytest.fixture
def s3_env(origin, proxy):
    return {**origin.environ, "AWS_ENDPOINT_URL": proxy.endpoint}


def run(*arguments, env=None):
    """
    Run the initializer in this process, which takes a tenth of the time of one of its own.
    """
    out, err = io.StringIO(), io.StringIO()
    environ = {"KSERVE_PVC_TERMINATION_LOG": "/nowhere/termination-log", **(env or {})}
    with patch.dict(os.environ, shell.clean_environ(environ), clear=True), redirect_stdout(out), redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def spawn(*arguments, env=None, command=()):
    """
    Run the initializer in a process of its own and wait for its end.
    """
    return shell.run([*command, *COMMAND, *map(str, arguments)], env=env)


def start(*arguments, env=None):
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*COMMAND, *map(str, arguments)], env=shell.clean_environ(env), text=True, **streams)


def served(place) -> dict[str, bytes]:
    """
    What a server finds, without what is the initializer's own.
    """
    return {name: data for name, data in read_tree(place).items() if not name.startswith(str(OURS))}


def own(place) -> list[str]:
    """
    What the initializer has left for itself: one plain file.
    """
    found = [path for path in place.iterdir() if path.name.startswith(".kserve-pvc")]
    return [f"{path.name}/" if path.is_dir() else path.name for path in found]


def objects(proxy) -> int:
    return len([request for request in proxy.requests if request.method == "GET"])


def packed(kind: str) -> bytes:
    data = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(data, "w") as archive:
            for name, content in FILES.items():
                archive.writestr(name, content)
    else:
        with tarfile.open(fileobj=data, mode=f"w:{kind}") as archive:
            for name, content in FILES.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return data.getvalue()


# What KServe gives and gets


def test_a_bucket_lands_in_the_directory_and_is_not_fetched_again(upload, proxy, s3_env, place):
    """
    The files of a prefix lie in the directory by their names, and the second start asks no network for them.
    """
    uri = upload(FILES)
    first = spawn(uri, place, env=s3_env)
    asked, before = len(proxy.requests), listing(place)

    second = spawn(uri, place, env=s3_env)

    assert (first.returncode, first.stdout) == (0, "")
    assert served(place) == FILES
    assert own(place) == [str(RECORD)]
    assert (second.returncode, len(proxy.requests), listing(place)) == (0, asked, before)


def test_the_lines_that_people_look_for(uri, place):
    """
    The log has KServe's lines, in its order, on standard error.
    """
    result = run(uri, place)

    found = [line for line in result.stderr.splitlines() if " storage.initializer " in line]
    texts = [re.sub(r"^[-0-9]+ [:.0-9]+ [0-9]+ storage.initializer INFO ", "", line) for line in found]
    assert texts[:-1] == [
        f"Initializing, args: (src_uri, dest_path): [('{uri}', '{place}')]",
        f"Copying contents of {uri} to local",
        f"Successfully copied {uri} to {place}",
    ]
    assert re.fullmatch(r"Model downloaded in [0-9.]+ seconds\.", texts[-1])


@pytest.mark.parametrize(
    "arguments", [[], ["s3://b/m"], ["s3://b/m", "/mnt/models", "s3://b/n"]], ids=["none", "one", "three"]
)
def test_arguments_that_are_no_pairs(arguments):
    """
    The usage goes to standard output and the exit code is 1, as with KServe's own.
    """
    result = spawn(*arguments)

    assert (result.returncode, result.stdout) == (1, "usage: kserve-pvc-initializer SRC DEST [SRC DEST ...]\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stor", "/x", "SRC", "DEST"], "unknown option `--stor`; did you mean `--store`?"),
        (["SRC", "DEST", "--force"], "unknown option `--force`"),
        (["-x", "DEST"], "unknown option `-x`"),
        (["SRC", "DEST", "--store"], "`--store` is missing; name the directory of a store"),
        (["--store", "", "SRC", "DEST"], "`--store` is missing; name the directory of a store"),
        (["--store", "--quiet", "SRC", "DEST"], "`--store` is missing; name the directory of a store"),
        (["--", "--store", "DEST", "x"], "expected pairs of a source and a directory, got 3"),
    ],
)
def test_an_option_is_never_taken_for_a_source(arguments, message):
    """
    What begins with a dash and is not an option ends with 1, the usage and a line that names it.
    """
    result = run(*arguments)

    assert (result.returncode, result.stdout) == (1, "usage: kserve-pvc-initializer SRC DEST [SRC DEST ...]\n")
    assert message in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_the_initializer_has_its_help(option):
    """
    The help goes to standard output, names the variables, and ends with 0.
    """
    result = run(option)

    assert (result.returncode, result.stderr) == (0, "")
    assert [word for word in ("--store DIR", "example:", "default:") if word not in result.stdout] == []
    assert run("--version").stdout == f"kserve-pvc-initializer {kserve_pvc.__version__}\n"


STORE_WORDS = {
    "before": ["--store", "STORE", "SRC", "DEST"],
    "with a sign": ["--store=STORE", "SRC", "DEST"],
    "between": ["SRC", "--store", "STORE", "DEST"],
    "after": ["SRC", "DEST", "--store", "STORE"],
    "before the end of options": ["--store", "STORE", "--", "SRC", "DEST"],
}


@pytest.mark.parametrize("words", STORE_WORDS)
def test_a_store_is_named_by_an_option(root, uri, place, words):
    """
    `--store` is honoured wherever it stands, and before what the environment names.
    """
    arguments = [
        word.replace("STORE", str(root)).replace("SRC", uri).replace("DEST", str(place)) for word in STORE_WORDS[words]
    ]

    result = run(*arguments, env={"KSERVE_PVC_STORE": "/nowhere"})

    assert result.returncode == 0, result.stderr
    assert uri in ModelStore(root)
    assert place.is_dir()


def test_a_store_and_a_private_destination_contradict_each_other(root, uri, place):
    """
    A store that would not be used is refused instead of ignored.
    """
    result = run("--store", root, uri, place, env={"KSERVE_PVC_DESTINATION": "private"})

    assert (result.returncode, list(root.iterdir())) == (1, [])
    assert "`KSERVE_PVC_DESTINATION` is `private`" in result.stderr


def test_a_quiet_initializer_logs_errors_only(uri, place, tmp_path):
    """
    With `-q` a success says nothing, and a failure its one line.
    """
    silent, failed = run("-q", uri, place), run("-q", f"file://{tmp_path}/missing", place)

    assert (silent.returncode, silent.stderr) == (0, "")
    assert (failed.returncode, len(failed.stderr.splitlines())) == (1, 1)
    assert " ERROR " in failed.stderr


def test_a_failure_is_one_line_in_the_termination_log(tmp_path, place):
    """
    The line that ends the log is what the InferenceService shows; a success writes nothing there.
    """
    log = tmp_path / "termination-log"
    log.touch()
    env = {"KSERVE_PVC_TERMINATION_LOG": str(log)}

    bad = run(f"file://{tmp_path}/missing", place, env=env)
    said = log.read_text()
    log.write_text("")
    write_files(tmp_path / "missing", FILES)
    good = run(f"file://{tmp_path}/missing", place, env=env)

    assert bad.returncode == 1
    assert said == (
        f"nothing found at `file://{tmp_path}/missing`: No such file "
        "or directory; check the URI, the revision and the patterns"
    )
    assert bad.stderr.endswith(f"storage.initializer ERROR {said}\n")
    assert (good.returncode, log.read_text()) == (0, "")


def test_a_long_line_fits_into_the_termination_log(tmp_path):
    """
    The kubelet takes 4,096 bytes.
    """
    log = tmp_path / "termination-log"
    log.touch()

    result = run(*["s3://" + "ü" * 5000, "x"] * 2, env={"KSERVE_PVC_TERMINATION_LOG": str(log)})

    assert result.returncode == 1
    assert 0 < log.stat().st_size <= 4096


def test_no_secret_is_logged(tmp_path, place):
    """
    Neither what stands before a host nor what follows a question mark is shown, whatever is refused.
    """
    result = run("https://someone:canary@host.example/m.bin?sig=canary", place)

    assert result.returncode == 1
    assert "canary" not in result.stdout + result.stderr


def test_pairs_go_one_after_the_other(tmp_path, uri, place):
    """
    The first pair that fails ends the run; those before it stay.
    """
    result = run(uri, place / "one", f"file://{tmp_path}/missing", place / "two", uri, place / "three")

    assert result.returncode == 1
    assert served(place / "one") == read_tree(Path(uri.removeprefix("file://")))
    assert not (place / "three").exists()


def test_two_sources_of_one_directory_lie_there_together(tmp_path, place):
    """
    KServe's mount path is the same for all sources unless it is said; what a later one brings wins, and both are a hit.
    """
    write_files(tmp_path / "a", {"one": b"a", "both": b"a"})
    write_files(tmp_path / "b", {"two": b"b", "both": b"b"})
    pairs = (tmp_path / "a", place, tmp_path / "b", place)

    first = run(*pairs)
    before = listing(place)
    second = run(*pairs)

    assert (first.returncode, second.returncode) == (0, 0)
    assert served(place) == {"one": b"a", "two": b"b", "both": b"b"}
    assert "is complete" in second.stderr
    assert listing(place) == before


# Where files lie


@pytest.mark.parametrize("kind", ["zip", "", "gz", "xz"])
def test_an_object_that_is_an_archive_is_unpacked(upload, origin, proxy, s3_env, place, kind):
    """
    One archive by itself is the model that it holds; it does not stay.
    """
    name = {"zip": "model.zip", "": "model.tar"}.get(kind, f"model.tar.{kind}")
    uri = upload({name: packed(kind)})

    by_name, by_prefix = run(f"{uri}/{name}", place / "a", env=s3_env), run(uri, place / "b", env=s3_env)

    assert (by_name.returncode, by_prefix.returncode) == (0, 0)
    assert served(place / "a") == served(place / "b") == FILES


def test_archives_among_others_stay(tmp_path, place):
    """
    Of two files none is unpacked.
    """
    write_files(tmp_path / "m", {"a.zip": packed("zip"), "b.txt": b"b"})

    result = run(tmp_path / "m", place)

    assert result.returncode == 0
    assert served(place) == read_tree(tmp_path / "m")


@pytest.mark.parametrize(
    ("scheme", "names", "expected"),
    [
        ("s3", ["m.zip", "_SUCCESS-"], "m.zip"),
        ("az", ["sub/m.tgz", "a-", "b/c-"], "sub/m.tgz"),
        ("abfss", ["m.tar-", "n.tar"], "n.tar"),
        ("gs", ["m.zip", "_SUCCESS-"], None),
        ("s3", ["m.zip", "b.txt"], None),
        ("s3", ["m.zip-"], "m.zip"),
        ("s3", ["m.zip-", "n.zip-"], None),
        ("gs", ["sub/m.zip"], "sub/m.zip"),
        ("file", ["m.zip", ".note", ".git/config"], "m.zip"),
        ("file", [".m.zip"], ".m.zip"),
        ("file", ["sub/m.zip"], None),
        ("pvc", ["sub/m.zip", ".note"], None),
        ("file", ["m.zip", "_SUCCESS-"], None),
        ("file", ["m.zip", "sub/x"], None),
    ],
)
def test_the_one_file_that_kserve_counts_is_unpacked(scheme, names, expected):
    """
    Empty objects of S3 and Azure do not count, nor do hidden files of a directory, whose archive must lie at its top.
    Names that end in `-` are empty here.
    """
    files = [
        RemoteFile(
            entry=FileEntry(path=name.rstrip("-"), size_bytes=0 if name.endswith("-") else 5), address=name, pin={}
        )
        for name in names
    ]

    found = find_only_file(scheme, files)

    assert (found and str(found.entry.path)) == expected


def test_an_archive_beside_an_empty_object_is_unpacked(upload, s3_env, place):
    """
    The `_SUCCESS` of Hadoop's tools does not leave a packed model to the server.
    """
    uri = upload({"m.zip": packed("zip"), "_SUCCESS": b""})

    result = run(uri, place, env=s3_env)

    assert result.returncode == 0, result.stderr
    assert served(place) == {**FILES, "_SUCCESS": b""}


def test_an_archive_beside_a_hidden_file_is_unpacked(tmp_path, place):
    """
    Hidden files of a directory do not count, and an archive below a directory is a file as others.
    """
    write_files(tmp_path / "m", {"a.zip": packed("zip"), ".note": b"n"})
    write_files(tmp_path / "n", {"sub/a.zip": packed("zip")})

    first, second = run(tmp_path / "m", place / "m"), run(tmp_path / "n", place / "n")

    assert (first.returncode, second.returncode) == (0, 0)
    assert served(place / "m") == {**FILES, ".note": b"n"}
    assert served(place / "n") == read_tree(tmp_path / "n")


def test_an_archive_that_climbs_is_refused(tmp_path, place):
    """
    Nothing is written outside of the directory, nor left in it for a server to find.
    """
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        archive.writestr("../../evil", b"evil")

    result = run(tmp_path / "m.zip", place)

    assert result.returncode == 1
    assert served(place) == {}
    assert not list(tmp_path.rglob("evil"))


def test_one_object_lies_there_by_its_name(upload, s3_env, place):
    """
    An object that is named itself is a file, and patterns are no choice then; the second start asks for nothing.
    """
    uri = upload({"deep/m.onnx": b"onnx"})

    result = run(f"{uri}/deep/m.onnx", place, env={**s3_env, "STORAGE_ALLOW_PATTERNS": "*.bin"})
    again = run(f"{uri}/deep/m.onnx", place, env={**s3_env, "STORAGE_ALLOW_PATTERNS": "*.bin"})

    assert (result.returncode, again.returncode) == (0, 0)
    assert served(place) == {"m.onnx": b"onnx"}
    assert "is complete" in again.stderr


@pytest.mark.parametrize(
    "variables", [{"STORAGE_ALLOW_PATTERNS": "*.onnx"}, {"STORAGE_IGNORE_PATTERNS": "*"}], ids=["allow", "ignore"]
)
def test_patterns_are_no_choice_for_the_file_of_a_url(place, variables):
    """
    A web page is one file, as in KServe; the second start sends no request.
    """
    env = {"KSERVE_PVC_ALLOW_PRIVATE_ADDRESSES": "1", **variables}
    with WebServer() as server:
        server.put("some/a b.bin", b"model")
        result = run(server.uri("some/a b.bin"), place, env=env)
    again = run(server.uri("some/a b.bin"), place, env=env)

    assert (result.returncode, again.returncode) == (0, 0), result.stderr
    assert served(place) == {"a b.bin": b"model"}


@pytest.mark.parametrize(
    ("source", "names", "expected"),
    [
        ("gs://b/m.onnx", ["m.onnx"], True),
        ("gs://b/m", ["m.onnx"], False),
        ("s3://b/m.onnx", ["m.onnx", "n.onnx"], False),
        ("https://h.example/m.onnx", ["m.onnx"], True),
        ("https://h.example/m.tar.gz", ["m.onnx"], False),
        ("https://a.blob.core.windows.net/c/m.onnx", ["m.onnx"], False),
        ("hf://o/m/m.onnx", ["m.onnx"], False),
        ("file:///d/m.onnx", ["m.onnx"], False),
    ],
)
def test_where_patterns_are_no_choice(source, names, expected):
    """
    KServe applies them to named objects of Azure, and to paths; not to those of S3 and Google, nor to web pages.
    """
    one = read_source(source, read_variables({}))

    assert (one.may_be_object and one.is_one_object(map(Path, names))) is expected


def test_siblings_and_an_empty_prefix(upload, s3_env, place):
    """
    A prefix brings what lies below it, and a prefix that holds nothing is an error.
    """
    uri = upload({"m/a": b"a", "m-v2/b": b"b"})

    result, empty = run(f"{uri}/m", place / "m", env=s3_env), run(f"{uri}/none", place / "none", env=s3_env)

    assert (result.returncode, served(place / "m")) == (0, {"a": b"a"})
    assert empty.returncode == 1
    assert "nothing found" in empty.stderr


def test_a_file_of_a_web_server(place):
    """
    The last part of the URL is the name.
    """
    with WebServer() as server:
        server.put("some/m.bin", b"model")
        result = run(server.uri("some/m.bin"), place, env={"KSERVE_PVC_ALLOW_PRIVATE_ADDRESSES": "1"})

    assert result.returncode == 0, result.stderr
    assert served(place) == {"m.bin": b"model"}


@pytest.mark.parametrize("name", ["STORAGE_ALLOW_PATTERNS", "STORAGE_IGNORE_PATTERNS"])
@pytest.mark.parametrize("text", ['["*.bin", "*.txt"]', "*.bin, *.txt"], ids=["json", "commas"])
def test_patterns_choose_and_count(uri, source, place, name, text):
    """
    Patterns choose files by their whole path, and another choice is another model.
    """
    result = run(uri, place, env={name: text})
    chosen = served(place)
    other = run(uri, place, env={"KSERVE_PVC_REPLACE": uri})

    allowed = name == "STORAGE_ALLOW_PATTERNS"
    assert (result.returncode, other.returncode) == (0, 0)
    assert chosen == {name: data for name, data in read_tree(source).items() if name.endswith(".bin") is allowed}
    assert served(place) == read_tree(source)


@pytest.mark.parametrize(
    ("name", "text"), [("STORAGE_ALLOW_PATTERNS", "m.bin"), ("STORAGE_IGNORE_PATTERNS", "bad./*,ln")]
)
def test_patterns_leave_out_what_cannot_be_stored(tmp_path, place, name, text):
    """
    A file with a name that no store keeps, or a link, is left out by the patterns, and refuses the model without them.
    """
    model = tmp_path / "odd"
    write_files(model, {"m.bin": b"m", "bad./x": b"x"})
    (model / "ln").symlink_to("m.bin")

    assert run(str(model), place).returncode == 1
    assert run(str(model), place, env={name: text}).returncode == 0
    assert served(place) == {"m.bin": b"m"}


@pytest.mark.parametrize(
    "bad",
    [
        "s3://b/m/../../x",
        "file:///etc/../etc",
        "oci://r/m:1",
        "https://github.com/o/r.git",
        "modelscope://o/m",
        "nope",
        "",
    ],
)
def test_sources_that_are_refused(source, place, monkeypatch, bad):
    """
    What climbs, and what is served by nobody here, is refused before anything is written. Nothing does not mean "here".
    """
    monkeypatch.chdir(source)

    result = run(bad, place)

    assert result.returncode == 1
    assert list(place.iterdir()) == []


SHARE = "file shares of Azure are not supported; copy the model to a blob container"
IMAGE = "images are not downloaded; KServe mounts `oci://` and `oci+native://` without an initializer"
HDFS = "copy the model to a bucket, or use KServe's own initializer; WebHDFS without Kerberos is read from"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("https://acct.file.core.windows.net/share/m", SHARE),
        ("https://acct.file.core.windows.net/share/m?sv=1&sig=canary", SHARE),
        ("https://acct.z12.file.storage.azure.net/share/m", SHARE),
        ("HTTPS://ACCT.FILE.core.chinacloudapi.cn:443/share", SHARE),
        ("oci://r/m:1", IMAGE),
        ("oci+native://r/m", IMAGE),
        ("oci+fetch://r/m", IMAGE),
        ("OCI://r/m", IMAGE),
        ("hdfs://nn:8020/m", HDFS),
        ("webhdfs://nn/m", HDFS),
        ("modelscope://o/m", "copy the model to a bucket, or use Hugging Face"),
        ("https://host/o/r.git/", "git repositories are not supported"),
        ("git+https://host/o/r", "git repositories are not supported"),
    ],
)
def test_what_only_kserves_own_initializer_reads_is_refused_by_its_name(place, bad, message):
    """
    Each kind of source that KServe supports and this initializer does not has a sentence of its own, without a request
    and without the signature.
    """
    with pytest.raises((InvalidURIError, UnknownSchemeError)) as raised:
        check_supported(bad)
    result = run(bad, place)

    assert message in str(raised.value)
    assert (result.returncode, message in result.stderr, list(place.iterdir())) == (1, True, [])
    assert "canary" not in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "good",
    [
        "https://acct.blob.core.windows.net/c/m",
        "https://host/file.core.windows.net/m",
        "https://files.example.com/m.file.core",
        "s3://bucket/r.git",
        "https://host/r.github/m",
        "https://[::1",
        "/mnt/models",
    ],
)
def test_what_only_resembles_an_unsupported_source_is_left_to_the_parser(good):
    """
    A name that holds one of these words is not one of these kinds.
    """
    check_supported(good)


@pytest.mark.parametrize(
    ("kind", "hint"),
    [
        ("hdfs", "credentials for HDFS are not supported; copy the model to a bucket"),
        ("webhdfs", "credentials for HDFS are not supported"),
        ("gs", "set `GOOGLE_APPLICATION_CREDENTIALS`"),
        ("azure", "set `AZURE_STORAGE_ACCESS_KEY`"),
        ("hf", "set `HF_TOKEN`"),
        ("https", "set `<host>-headers`"),
        ("other", "supported: `s3`"),
    ],
)
def test_a_storage_secret_of_another_type_is_refused_with_the_way_out(kind, hint):
    """
    Each type that KServe documents is named, with what to set instead.
    """
    with pytest.raises(SettingsError) as raised:
        read_variables({"STORAGE_CONFIG": json.dumps({"type": kind, "secret": "canary"})})

    assert f"invalid value `type {kind}` for `STORAGE_CONFIG`" in str(raised.value)
    assert hint in str(raised.value)
    assert "canary" not in str(raised.value)


# Directories as they are found


def test_a_directory_that_is_missing_is_made(uri, source, place):
    """
    KServe names directories below its mount, which nobody has made.
    """
    result = run(uri, place / "a/b")

    assert result.returncode == 0
    assert served(place / "a/b") == read_tree(source)


def test_a_destination_that_is_no_directory(uri, place):
    """
    A file, a link and a name that climbs are refused, and stay as they are.
    """
    (place / "file").write_text("x")
    (place / "elsewhere").mkdir()
    (place / "link").symlink_to(place / "elsewhere")
    before = listing(place)

    results = [run(uri, found) for found in (place / "file", place / "link", f"{place}/x/../y", "")]

    assert [result.returncode for result in results] == [1, 1, 1, 1]
    assert listing(place) == before


def test_strangers_stay(uri, source, place):
    """
    What nobody here has written is kept, but for files that the model has by the same name.
    """
    write_files(place, {"lost+found/x": b"x", "config.json": b"old", "weights/mine": b"m"})

    result = run(uri, place)

    assert result.returncode == 0
    assert served(place) == {"lost+found/x": b"x", "weights/mine": b"m", **read_tree(source)}


def test_a_directory_of_strangers_where_a_file_belongs(uri, place):
    """
    It is not emptied: the run fails and names it.
    """
    write_files(place, {"config.json/mine": b"m"})

    result = run(uri, place)

    assert result.returncode == 1
    assert "`config.json` is refused" in result.stderr
    assert served(place)["config.json/mine"] == b"m"


def test_a_link_of_a_stranger_is_not_followed(uri, source, place, tmp_path):
    """
    A link with the name of a file is replaced, and one with the name of a directory is an error; nothing is written
    behind them.
    """
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_text("kept")
    (place / "config.json").symlink_to(tmp_path / "outside/file")
    replaced = run(uri, place)
    (place / "two").mkdir()
    (place / "two/weights").symlink_to(tmp_path / "outside")

    refused = run(uri, place / "two")

    assert (replaced.returncode, refused.returncode) == (0, 1)
    assert served(place)["config.json"] == read_tree(source)["config.json"]
    assert read_tree(tmp_path / "outside") == {"file": b"kept"}


def test_another_version_leaves_nothing_of_the_old(source, place, tmp_path):
    """
    What an earlier run has put there and the model no longer has is removed, empty directories with it.
    """
    first = run(source, place)
    write_files(tmp_path / "next", {"config.json/now": b"a directory", "new.bin": b"new"})

    second = run(tmp_path / "next", place, env=REPLACING)

    assert (first.returncode, second.returncode) == (0, 0)
    assert served(place) == read_tree(tmp_path / "next")
    assert sorted(os.listdir(place)) == [str(RECORD), "config.json", "new.bin"]


@pytest.mark.parametrize("harm", ["missing", "cut", "link", "record"])
def test_what_is_not_whole_is_no_hit(uri, source, place, harm):
    """
    A file that is gone, cut, or a link, and a record that is damaged, each bring the files back.
    """
    run(uri, place)
    path = place / "weights/b.bin"
    if harm == "record":
        (place / RECORD).write_text("{}")
    else:
        path.unlink()
    if harm == "cut":
        path.write_bytes(b"cut")
    if harm == "link":
        path.symlink_to(source / "weights/b.bin")

    result = run(uri, place)

    assert result.returncode == 0
    assert served(place) == read_tree(source)
    assert not path.is_symlink()


def test_the_second_initializer_of_a_directory_is_refused(uri, place):
    """
    While one that lives writes there, another one ends at once and says so.
    """
    destination = Destination(place)
    with destination.writing(here(), 1.0):
        result = run(uri, place)

    assert result.returncode == 1
    assert "waited 0 s for another process" in result.stderr
    assert served(place) == {}


@pytest.mark.parametrize("seconds", [1.5, 10], ids=["late", "never"])
def test_a_lock_that_is_not_answered_at_once_refuses_nobody(uri, source, place, monkeypatch, seconds):
    """
    A try of the lock that takes longer than a second, or than the lease, is not taken for another process.
    """
    answer_now = threading.Event()

    def slow(open_file):
        answer_now.wait(seconds)
        return grab_file(open_file)

    monkeypatch.setattr("kserve_pvc.kserve._exclusion.grab_file", slow)

    result = run(uri, place, env={"KSERVE_PVC_LEASE_SECONDS": "2"})
    answer_now.set()

    assert result.returncode == 0, result.stderr
    assert served(place) == read_tree(source)


def refused(_):
    """
    Another process, which may be gone, has the lock.
    """
    return


def test_on_a_network_volume_a_claim_excludes(uri, source, place, monkeypatch):
    """
    Where the kernel's lock may be a lie, whoever shows signs of life is left alone, and whoever shows none is taken
    over. The lock, which may have stayed with a node that is gone, is not asked for.

    The kind of the volume is made up, as no network volume can be mounted everywhere.
    """
    monkeypatch.setattr("kserve_pvc._volume.mount.Mount.is_network", property(lambda _: True))
    monkeypatch.setattr("kserve_pvc.kserve._exclusion.grab_file", refused)
    one, other = Destination(place), Destination(place)
    with one.writing(here(), 0.5), pytest.raises(LockTimeoutError), other.writing(here(), 0.5):
        raise AssertionError("two write")

    with other.writing(here(), 0.5) as check:
        check()
        contents = Contents(sources=[Source(key="k", uri="u", version="v")], files=[])
        other.fill(contents, lambda file: None, check)

    assert one.record() == contents


@pytest.mark.parametrize(
    "name",
    [f"{OURS}/record.json", ".kserve-pvc/store.json", "a/b/.kserve-pvc/store.json", ".Kserve-PVC", f"a/{OURS}/x"],
)
def test_a_model_may_not_have_our_names(tmp_path, place, name):
    """
    A file of the model whose name, or that of a directory on its path, is one of our own is refused on every level.
    """
    write_files(tmp_path / "m", {name: b"{}", "z": b"a"})

    with pytest.raises(UnsafePathError, match="is reserved"):
        fill_all([(str(tmp_path / "m"), str(place))], read_variables({}))

    assert served(place) == {}


def test_a_store_above_a_destination_is_not_used(tmp_path, place):
    """
    A store in a directory above the destination that has a model under the same URI is neither read nor written.
    """
    uri = f"file://{tmp_path}/m"
    write_files(tmp_path / "m", {"weights": b"wrong"})
    ModelStore(place, mode="rw").ensure(uri)
    write_files(tmp_path / "m", {"weights": b"right"})
    before = listing(place / ".kserve-pvc")

    fill_all([(uri, str(place / "sub"))], read_variables({}))

    assert served(place / "sub") == {"weights": b"right"}
    assert listing(place / ".kserve-pvc") == before


def test_what_a_pair_brings_makes_no_store_of_the_next(tmp_path, place, monkeypatch):
    """
    Which destination has a store is decided before the first one is filled.
    """
    write_files(tmp_path / "m", {"weights": b"right"})
    write_files(tmp_path / "n", {"weights": b"wrong"})
    uri = f"file://{tmp_path}/m"
    fill = _initialize._fill

    def fill_and_plant(*arguments):
        fill(*arguments)
        (place / "sub").mkdir(exist_ok=True)
        if not (place / "sub" / ".kserve-pvc").exists():
            ModelStore(place / "sub", mode="rw")

    monkeypatch.setattr(_initialize, "_fill", fill_and_plant)

    fill_all([(f"file://{tmp_path}/n", str(place)), (uri, str(place / "sub"))], read_variables({}))

    assert (place / "sub" / "weights").read_bytes() == b"right"


def test_a_destination_with_one_of_our_names_is_refused(tmp_path, place):
    """
    A destination is no directory of a store or of an initializer.
    """
    write_files(tmp_path / "m", {"a": b"a"})

    with pytest.raises(SettingsError, match="is reserved"):
        fill_all([(str(tmp_path / "m"), f"{place}/.kserve-pvc/keys")], read_variables({}))

    assert not place.exists() or served(place) == {}


def test_a_source_that_is_its_own_destination(uri, source):
    """
    A model that lies where it should is left alone; a directory inside of its source is an error.
    """
    before = listing(source)

    same, inside = run(uri, source), run(uri, source / "inside")

    assert (same.returncode, inside.returncode) == (0, 1)
    assert listing(source) == before


# Stores


def test_a_store_that_is_the_destination_gets_a_name_for_the_server(upload, proxy, s3_env, root):
    """
    The model is in the store, and `models/<KServe's key>` is the directory that the server mounts; another pod fetches
    nothing.
    """
    uri = upload(FILES)
    env = {**s3_env, "KSERVE_PVC_STORE": str(root)}
    first = run(uri, root, env=env)
    asked = len(proxy.requests)

    second = run(uri, root, env=env)

    alias = root / "models" / hashlib.sha256(uri.encode()).hexdigest()[:16]
    assert (first.returncode, second.returncode, len(proxy.requests)) == (0, 0, asked)
    assert read_tree(alias) == FILES
    assert not os.readlink(alias).startswith("/")
    assert ModelStore(root).verify(uri, "full").ok
    assert sorted(os.listdir(root)) == [".kserve-pvc", "models"]


def test_pods_that_start_together_fetch_once(upload, proxy, s3_env, root, place):
    """
    Three initializers of one store at once all end well, and every byte is fetched once.
    """
    uri = upload(FILES)
    env = {**s3_env, "KSERVE_PVC_STORE": str(root)}

    processes = [start(uri, where, env=env) for where in (root, root, place)]
    errors = [process.communicate(timeout=60)[1] for process in processes]

    assert [process.returncode for process in processes] == [0, 0, 0], errors
    assert proxy.body_bytes() == sum(map(len, FILES.values()))
    assert served(place) == FILES


def test_the_name_of_an_empty_directory_that_the_kubelet_made_is_taken(uri, root):
    """
    A server that started too early has an empty directory there, which gives way; one with files does not.
    """
    alias = root / "models" / hashlib.sha256(uri.encode()).hexdigest()[:16]
    alias.mkdir(parents=True)
    env = {"KSERVE_PVC_STORE": str(root)}

    first = run(uri, root, env=env)
    alias.unlink()
    write_files(alias, {"mine": b"m"})
    second = run(uri, root, env=env)

    assert (first.returncode, second.returncode) == (0, 1)
    assert read_tree(alias) == {"mine": b"m"}


def test_a_directory_in_a_store_leads_to_the_model(uri, source, root):
    """
    A destination inside of the configured store is a relative link; the store's own places are refused.
    """
    env = {"KSERVE_PVC_STORE": str(root)}

    result = run(uri, root / "a", env=env)
    refused = [run(uri, root / name, env=env) for name in ("models", "models/x", ".kserve-pvc/x")]

    assert (result.returncode, [one.returncode for one in refused]) == (0, [1, 1, 1])
    assert read_tree(root / "a") == read_tree(source)
    assert (root / "a").is_symlink()


@pytest.mark.parametrize("way", ["auto", "link", "copy", "symlink"])
def test_a_directory_beside_a_store_is_made_of_it(upload, proxy, s3_env, root, place, way):
    """
    Each way gives the same tree, the second start is a hit, and the store's files stay as they were.
    """
    uri = upload(FILES)
    env = {**s3_env, "KSERVE_PVC_STORE": str(root), "KSERVE_PVC_MATERIALIZE": way}
    first = run(uri, place, env=env)
    before = listing(place)

    second = run(uri, place, env=env)

    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert served(place) == FILES
    assert listing(place) == before
    assert (place / "config.json").is_symlink() is (way == "symlink")
    assert ((place / "config.json").stat().st_nlink > 1) is (
        way == "link" or (way == "auto" and "by link" in first.stderr)
    )
    assert ModelStore(root).verify(uri, "full").ok


def test_between_two_file_systems_it_is_copied(uri, source, root, mount):
    """
    Where neither extents nor inodes can be shared, a copy is made; insisting on links is an error that says so.
    """
    env = {"KSERVE_PVC_STORE": str(root)}
    place = mount("-t", "tmpfs", "none")

    auto, link = run(uri, place / "a", env=env), run(uri, place / "b", env={**env, "KSERVE_PVC_MATERIALIZE": "link"})

    assert (auto.returncode, link.returncode) == (0, 1)
    assert served(place / "a") == read_tree(source)
    assert "by copy" in auto.stderr
    assert "KSERVE_PVC_MATERIALIZE" in link.stderr


def test_extents_are_shared_where_that_is_possible(uri, source, tmp_path, tool, mount):
    """
    On XFS the default gives the server files of its own that take no room, and insisting on it works too.
    """
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(320 * 1024 * 1024)
    subprocess.run([tool("mkfs.xfs"), "-q", "-m", "reflink=1", str(image)], check=True)
    volume = mount("-o", "loop", str(image))
    (volume / "store").mkdir()
    env = {"KSERVE_PVC_STORE": str(volume / "store")}

    auto = run(uri, volume / "a", env=env)
    named = run(uri, volume / "b", env={**env, "KSERVE_PVC_MATERIALIZE": "reflink"})

    assert (auto.returncode, named.returncode) == (0, 0)
    assert "is complete, by reflink" in auto.stderr
    assert served(volume / "a") == served(volume / "b") == read_tree(source)
    assert {path.stat().st_nlink for path in (volume / "a").rglob("*") if path.is_file()} == {1}


def test_a_store_that_may_only_be_read_serves_what_it_has(uri, source, root, place):
    """
    A hit writes nothing to the store; what is absent there is an error.
    """
    ModelStore(root, mode="rw").ensure(uri, progress=False)
    before = listing(root)
    env = {"KSERVE_PVC_STORE": str(root), "KSERVE_PVC_MODE": "r"}

    hit, miss = run(uri, place, env=env), run(f"{uri}/weights", place / "x", env=env)

    assert (hit.returncode, miss.returncode) == (0, 1)
    assert served(place) == read_tree(source)
    assert listing(root) == before


def test_an_archive_that_a_store_has_is_not_served_as_one(tmp_path, root, place):
    """
    The store keeps archives, which KServe unpacks: one that was fetched by something else is an error and no model.
    """
    (tmp_path / "m.zip").write_bytes(packed("zip"))
    ModelStore(root, mode="rw").ensure(f"file://{tmp_path}/m.zip", progress=False)

    result = run(tmp_path / "m.zip", place, env={"KSERVE_PVC_STORE": str(root)})

    assert result.returncode == 1
    assert "kserve-pvc rm" in result.stderr


def test_a_newer_version_in_the_store_reaches_the_directory(tmp_path, root, place):
    """
    A directory that holds what the store no longer serves is brought up to date, if that may be replaced.
    """
    write_files(tmp_path / "m", {"a": b"1", "old": b"o"})
    uri, env = f"file://{tmp_path}/m", {"KSERVE_PVC_STORE": str(root)}
    run(uri, place, env=env)
    (tmp_path / "m/old").unlink()
    (tmp_path / "m/a").write_bytes(b"22")
    ModelStore(root, mode="rw").ensure(uri, refresh=True, progress=False)

    kept, before = run(uri, place, env=env), served(place)
    result = run(uri, place, env={**env, "KSERVE_PVC_REPLACE": uri})

    assert (kept.returncode, result.returncode) == (0, 0)
    assert "keeps its version" in kept.stderr
    assert before == {"a": b"1", "old": b"o"}
    assert served(place) == {"a": b"22"}


# The environment


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"CONFIDENTIAL_ENABLED": "true"}, "CONFIDENTIAL_ENABLED"),
        ({"VERIFICATION_DIGEST": "md5:0"}, "VERIFICATION_DIGEST"),
        ({"STORAGE_CONFIG": "{"}, "STORAGE_CONFIG"),
        ({"STORAGE_CONFIG": '{"type": "hdfs"}'}, "STORAGE_CONFIG"),
        ({"STORAGE_CONFIG": '{"type": "s3", "access_key": "canary"}'}, "STORAGE_CONFIG"),
        ({"STORAGE_OVERRIDE_CONFIG": "[]"}, "STORAGE_OVERRIDE_CONFIG"),
        ({"S3_MAX_FILE_CONCURRENCY": "many"}, "S3_MAX_FILE_CONCURRENCY"),
        ({"AZURE_MAX_CHUNK_CONCURRENCY": "many"}, "AZURE_MAX_CHUNK_CONCURRENCY"),
        ({"VERIFICATION_SIGNATURE_BUNDLE": "canary"}, "VERIFICATION_SIGNATURE_BUNDLE"),
        ({"SIGNATURE_OIDC_ISSUER": "canary"}, "SIGNATURE_OIDC_ISSUER"),
        ({"MODEL_SIGNATURE": "canary"}, "MODEL_SIGNATURE"),
        ({"KSERVE_SCAN_MODE": "canary"}, "KSERVE_SCAN_MODE"),
        ({"KSERVE_PVC_MATERIALIZE": "magic"}, "KSERVE_PVC_MATERIALIZE"),
        ({"KSERVE_PVC_DESTINATION": "magic"}, "KSERVE_PVC_DESTINATION"),
        ({"KSERVE_PVC_TIMEOUT": "-1"}, "KSERVE_PVC_TIMEOUT"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_honoured_is_refused(uri, place, variables, named):
    """
    A setting that would have no effect ends the run, names itself, and shows no secret.
    """
    result = run(uri, place, env=variables)

    assert result.returncode == 1
    assert named in result.stderr
    assert "canary" not in result.stderr
    assert list(place.iterdir()) == []


def test_credentials_of_a_storage_secret(upload, origin, proxy, place):
    """
    `STORAGE_CONFIG`, with what `STORAGE_OVERRIDE_CONFIG` lays over it, says all that S3 needs.
    """
    secret = {
        "type": "s3",
        "access_key_id": origin.key,
        "secret_access_key": origin.secret,
        "endpoint_url": "http://127.0.0.1:1",
    }
    over = {"endpoint_url": proxy.endpoint, "region": "us-east-1", "verify_ssl": "0"}
    env = {"STORAGE_CONFIG": json.dumps(secret), "STORAGE_OVERRIDE_CONFIG": json.dumps(over)}

    result = run(upload(FILES), place, env=env)

    assert result.returncode == 0, result.stderr
    assert served(place) == FILES


@pytest.mark.parametrize("over", [{}, {"region": "us-east-1"}])
def test_a_service_with_a_storage_key_gets_its_model(upload, origin, proxy, place, over):
    """
    What KServe makes of `storage:` with a key, a path and parameters leads to the model.
    """
    bucket, _, path = upload(FILES).removeprefix("s3://").partition("/")
    secret = {"type": "s3", "access_key_id": origin.key, "secret_access_key": origin.secret, "bucket": bucket}
    secret |= {"endpoint_url": proxy.endpoint, "region": "nowhere-1" if over else "us-east-1"}
    storage = {"key": "mine", "path": f"/{path}", **({"parameters": over} if over else {})}

    _, source, variables = kserve_rules.storage_spec(storage, secret)
    result = run(source, place, env=variables)

    assert result.returncode == 0, result.stderr
    assert served(place) == FILES


@pytest.mark.parametrize(
    ("variables", "options"),
    [
        ({}, {}),
        ({"awsAnonymousCredential": "true"}, {"s3": {"anon": True}}),
        ({"S3_VERIFY_SSL": "0"}, {"s3": {"client_kwargs": {"verify": False}}}),
        ({"S3_USER_VIRTUAL_BUCKET": "true"}, {"s3": {"config_kwargs": {"s3": {"addressing_style": "virtual"}}}}),
        (
            {"AWS_ENDPOINT_URL": "https://s3.amazonaws.com", "AWS_DEFAULT_REGION": "eu-west-1"},
            {"s3": {"config_kwargs": {"s3": {"addressing_style": "virtual"}}}},
        ),
        ({"S3_USE_ACCELERATE": "true"}, {"s3": {"config_kwargs": {"s3": {"use_accelerate_endpoint": True}}}}),
        (
            {"S3_CONNECT_TIMEOUT": "5", "S3_READ_TIMEOUT": "6"},
            {"s3": {"config_kwargs": {"connect_timeout": 5, "read_timeout": 6}}},
        ),
        ({"S3_MAX_ATTEMPTS": "7"}, {"s3": {"config_kwargs": {"retries": {"max_attempts": 7, "mode": "standard"}}}}),
        ({"S3_MAX_ATTEMPTS": "0"}, {"s3": {"config_kwargs": {"retries": {"max_attempts": 0, "mode": "standard"}}}}),
        ({"awsAnonymousCredential": "TRUE"}, {"s3": {"anon": True}}),
        ({"awsAnonymousCredential": "1"}, {}),
        ({"awsAnonymousCredential": "yes", "S3_USE_ACCELERATE": "on", "S3_USER_VIRTUAL_BUCKET": "maybe"}, {}),
        ({"STORAGE_CONFIG": '{"type": "s3", "anonymous": true}'}, {"s3": {"anon": True}}),
        ({"STORAGE_CONFIG": '{"type": "s3", "region": "r"}'}, {"s3": {"client_kwargs": {"region_name": "r"}}}),
    ],
    ids=lambda value: next(iter(value), "nothing") if isinstance(value, dict) else "",
)
def test_variables_of_s3(variables, options):
    """
    What KServe's own initializer reads of S3 becomes arguments of the back end.
    """
    assert read_variables(variables).storage_options == options


def test_a_word_that_kserve_does_not_know_is_remarked(capsys):
    """
    What may have been meant as `true`, and is false to KServe, is told.
    """
    read_variables({"awsAnonymousCredential": "yes"})
    read_variables({"awsAnonymousCredential": "off"})

    (line,) = capsys.readouterr().err.splitlines()
    assert "awsAnonymousCredential is 'yes', which KServe takes for false" in line


@pytest.mark.parametrize(
    "variables",
    [
        {"S3_CONNECT_TIMEOUT": "soon"},
        {"S3_READ_TIMEOUT": "-1"},
        {"S3_MAX_ATTEMPTS": "1.5"},
        {"S3_USE_ACCELERATE": "true", "AWS_ENDPOINT_URL": "http://s3.example"},
    ],
    ids=lambda value: next(iter(value)),
)
def test_a_setting_of_s3_ends_downloads_from_s3_only(variables):
    """
    What is wrong with a variable that only S3 reads does not concern other sources, as in KServe.
    """
    found = read_variables(variables)

    found.check("hf")
    with pytest.raises(SettingsError, match=next(iter(variables))):
        found.check("s3")


@pytest.mark.parametrize(
    ("word", "is_refused"), [("true", True), ("yes", True), ("1", True), ("no", False), ("", False)]
)
def test_a_model_that_may_be_confidential_is_refused(word, is_refused):
    """
    KServe knows `true` only; of other words those that may mean it are refused, and those that do not are not.
    """
    if not is_refused:
        read_variables({"CONFIDENTIAL_ENABLED": word})
        return
    with pytest.raises(PolicyError):
        read_variables({"CONFIDENTIAL_ENABLED": word})


@pytest.mark.parametrize(
    ("source", "uri"),
    [
        ("s3://b/m\n", "s3://b/m"),
        ("\thf://o/m\r\n", "hf://o/m"),
        ("s3://b//m", "s3://b/m"),
        ("s3://b///m//x/", "s3://b/m//x/"),
        ("https://a.blob.core.windows.net/c//m/", "https://a.blob.core.windows.net/c/m/"),
        ("gs://b//m", "gs://b//m"),
        ("https://h.example//m.bin", "https://h.example//m.bin"),
        ("https://h.example/m.bin?", "https://h.example/m.bin"),
    ],
)
def test_a_uri_is_read_as_kserve_reads_it(source, uri):
    """
    Line breaks around it go, and slashes in front of a prefix where KServe does not count them.
    """
    assert read_source(source, read_variables({})).ref.uri == uri


@pytest.mark.parametrize(
    ("text", "patterns"),
    [
        ("", None),
        (" ", None),
        ('["a", " b ", ""]', ("a", "b")),
        ('"a,b"', ("a,b",)),
        ("a, b,", ("a", "b")),
        ("[a", ("[a",)),
    ],
)
def test_patterns_as_kserve_spells_them(text, patterns):
    """
    A JSON list, a JSON text, and a list with commas.
    """
    assert read_variables({"STORAGE_ALLOW_PATTERNS": text}).allow_patterns == patterns


@pytest.mark.parametrize(
    "name",
    ["SCAN_SERVICE_HOST", "SIGNATURE_API_PORT", "VERIFICATION_PORT_80_TCP_ADDR", "SIGNATURE_SERVICE_PORT_HTTP"],
)
def test_what_kubernetes_sets_for_a_service_is_no_setting(name):
    """
    The variables of a Service that is called like a setting change nothing, and neither does an empty variable.
    """
    assert read_variables({name: "10.0.0.1", "VERIFICATION_LATER": ""}).digest is None


@pytest.mark.parametrize(
    ("files", "parts", "streams"),
    [(None, None, None), ("3", None, 3), (None, "8", 32), ("2", "8", 16)],
)
def test_the_concurrency_of_azure_is_that_of_files_times_parts(files, parts, streams):
    """
    Both variables of KServe bound the connections together, with its default for the number of files.
    """
    given = {"AZURE_MAX_FILE_CONCURRENCY": files, "AZURE_MAX_CHUNK_CONCURRENCY": parts, "S3_MAX_FILE_CONCURRENCY": "5"}

    found = read_variables({name: value for name, value in given.items() if value is not None})

    assert found.streams == {"s3": 5, **({"az": streams, "abfs": streams} if streams else {})}


MISSING_BUNDLES = [
    ({"AWS_CA_BUNDLE": "/nowhere/ca.crt"}, "`/nowhere/ca.crt` for `AWS_CA_BUNDLE`; the file does not exist"),
    (
        {"STORAGE_CONFIG": json.dumps({"type": "s3", "ca_bundle": "/nowhere/ca.crt"})},
        "`/nowhere/ca.crt` for `AWS_CA_BUNDLE`; the file does not exist",
    ),
    (
        {"CA_BUNDLE_CONFIGMAP_NAME": "ca", "CA_BUNDLE_VOLUME_MOUNT_POINT": "/nowhere"},
        "`/nowhere/cabundle.crt` for `CA_BUNDLE_VOLUME_MOUNT_POINT`; it cannot be read (No such file or directory)",
    ),
    (
        {"CA_BUNDLE_CONFIGMAP_NAME": "ca"},
        "`/etc/ssl/custom-certs/cabundle.crt` for `CA_BUNDLE_VOLUME_MOUNT_POINT`; it cannot be read",
    ),
]


@pytest.mark.parametrize(("variables", "message"), MISSING_BUNDLES)
def test_a_missing_bundle_ends_downloads_from_s3_only(tmp_path, place, variables, message):
    """
    As in KServe, a source of S3 is refused, unless certificates are not verified, and any other is downloaded; the
    global bundle is a warning there.
    """
    write_files(tmp_path / "m", FILES)
    variables = {"SSL_CERT_FILE": "", **variables}

    s3 = run("s3://bucket/m", place, env=variables)
    unverified = run("s3://bucket/m", place, env={**variables, "S3_VERIFY_SSL": "false", "AWS_ENDPOINT_URL": "nowhere"})
    other = run(f"file://{tmp_path}/m", place, env=variables)

    assert (s3.returncode, unverified.returncode, other.returncode) == (1, 1, 0)
    assert message in s3.stderr
    assert "BUNDLE" not in unverified.stderr
    assert served(place) == FILES
    is_global = "CA_BUNDLE_CONFIGMAP_NAME" in variables
    assert (" WARNING the CA bundle " in other.stderr) is is_global


def test_the_bundle_of_s3_is_for_s3_alone(tmp_path):
    """
    A bundle for S3, which KServe sets wherever its secret is, does not replace the certificates of another source.
    """
    (tmp_path / "ca.crt").write_text("")

    assert leave_to_s3({"AWS_CA_BUNDLE": str(tmp_path / "ca.crt"), "X": "1"}) == {"AWS_CA_BUNDLE": ""}
    assert leave_to_s3({"X": "1"}) == {}
    found = read_variables({"AWS_CA_BUNDLE": str(tmp_path / "ca.crt")}).storage_options
    assert found == {"s3": {"client_kwargs": {"verify": str(tmp_path / "ca.crt")}}}


def test_a_bundle_without_certificates_is_a_warning(tmp_path, capsys):
    """
    A file that is not a bundle is not given to OpenSSL, which would pass over it in silence.
    """
    (tmp_path / "cabundle.crt").write_text("not a certificate")
    named = {"CA_BUNDLE_CONFIGMAP_NAME": "ca", "CA_BUNDLE_VOLUME_MOUNT_POINT": str(tmp_path)}

    assert trust_bundle(named) == {}
    assert f"WARNING the CA bundle {tmp_path}/cabundle.crt has no valid certificates" in capsys.readouterr().err
    with pytest.raises(SettingsError, match="it has no valid certificates; mount the ConfigMap"):
        read_variables(named).check("s3")
    read_variables(named).check("hf")


def test_kserves_bundle_is_trusted_too(tmp_path):
    """
    The file of the ConfigMap is told to OpenSSL, unless somebody else has.
    """
    (tmp_path / "cabundle.crt").write_text("")
    named = {"CA_BUNDLE_CONFIGMAP_NAME": "ca", "CA_BUNDLE_VOLUME_MOUNT_POINT": str(tmp_path)}

    assert trust_bundle({}) == {}
    assert trust_bundle(named) == {"SSL_CERT_FILE": f"{tmp_path}/cabundle.crt"}
    assert trust_bundle({**named, "SSL_CERT_FILE": "/mine"}) == {}


def test_a_promised_digest_is_compared(tmp_path, place):
    """
    The one file of a model has the digest that was promised, or nothing is served; several files have no such digest.
    """
    write_files(tmp_path, {"m/m.bin": b"model"})
    uri, digest = f"file://{tmp_path}/m/m.bin", hashlib.sha256(b"model").hexdigest()

    wrong = run(uri, place / "a", env={"VERIFICATION_DIGEST": "0" * 64})
    right = run(uri, place / "a", env={"VERIFICATION_DIGEST": f"sha256:{digest}"})
    two = run(uri, place / "b", uri, place / "c", env={"VERIFICATION_DIGEST": digest})
    write_files(tmp_path, {"m/n.bin": b"n"})
    several = run(f"file://{tmp_path}/m", place / "d", env={"VERIFICATION_DIGEST": digest})

    assert [one.returncode for one in (wrong, right, two, several)] == [1, 0, 1, 1]
    assert served(place / "a") == {"m.bin": b"model"}
    assert not (place / "b").exists()
    assert served(place / "d") == {}


# As imported by a server


def test_storage_downloads_as_kserves_does(uri, source, place):
    """
    A directory is filled and returned, a second call is a hit, and patterns are given as arguments.
    """
    first, before = Storage.download(uri, str(place / "a")), listing(place / "a")
    second = Storage.download(uri, place / "a")
    chosen = Storage.download(uri, place / "b", ["*.json"], ["x"])

    assert (first, second, listing(place / "a")) == (f"{place}/a", f"{place}/a", before)
    assert served(place / "a") == read_tree(source)
    assert set(served(Path(chosen))) == {"config.json"}


def test_storage_without_a_directory(upload, origin, proxy, s3_env, uri, source, root, monkeypatch):
    """
    A path is returned as it is; a remote model lies in a temporary directory, or in the store if there is one.
    """
    for name, value in s3_env.items():
        monkeypatch.setenv(name, value)
    remote = upload(FILES)
    temporary = Storage.download(remote)
    monkeypatch.setenv("KSERVE_PVC_STORE", str(root))

    stored = Storage.download(remote)

    assert (Storage.download(uri), Storage.download(str(source))) == (str(source), str(source))
    assert served(Path(temporary)) == read_tree(Path(stored)) == FILES
    assert Path(stored).is_relative_to(root)
    shutil.rmtree(temporary)


def test_storage_leaves_no_temporary_directory_of_a_model_that_is_not_there(tmp_path, upload, s3_env, monkeypatch):
    """
    Nobody is told the name of a temporary directory whose download failed, so it is deleted.
    """
    for name, value in {**s3_env, "TMPDIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tempfile, "tempdir", None)

    with pytest.raises(SourceNotFoundError):
        Storage.download(f"{upload(FILES)}-missing")

    assert list(tmp_path.glob("kserve-pvc-*")) == []


def test_storage_downloads_several(uri, source, place):
    """
    Directories come back in order, and as many sources as directories are needed.
    """
    found = Storage.download_files([uri, uri], [str(place / "a"), None])

    assert found == [f"{place}/a", str(source)]
    assert served(place / "a") == read_tree(source)
    assert Storage.download_files([], []) == []
    with pytest.raises(ValueError, match="zip"):
        Storage.download_files([uri], [])


def test_storage_raises_what_it_is(tmp_path, place):
    """
    Errors are those of the store.
    """
    with pytest.raises(SourceNotFoundError):
        Storage.download(f"file://{tmp_path}/missing", place)
    with pytest.raises(InvalidURIError):
        Storage.download("nope", place)
    with pytest.raises(InvalidURIError):
        Storage.download("")


def test_programs_for_kserve_catch_what_storage_raises(tmp_path, place, monkeypatch):
    """
    Every error is a `RuntimeError` too, whatever else it is.
    """
    monkeypatch.setenv("CONFIDENTIAL_ENABLED", "true")
    with pytest.raises(RuntimeError):
        Storage.download("s3://b/m", place)
    monkeypatch.setenv("CONFIDENTIAL_ENABLED", "false")
    for uri in (f"file://{tmp_path}/missing", "nope", "", "s3://b/../x", "ftp://h/x", "http://u:p@h/x", "oci://h/x"):
        with pytest.raises(RuntimeError):
            Storage.download(uri, place)


# What a container does to a process


@pytest.mark.usefixtures("as_root")
def test_a_random_user_of_group_root():
    """
    As OpenShift runs it: a uid that nobody knows, gid 0, and no home; others can read what it writes, whatever its
    umask. No mode is set where the group may write, since what is prepared there may be another's by then.
    """
    with public_directory() as public:
        write_files(public / "source", FILES)
        place = public / "models"
        place.mkdir()
        place.chmod(0o2775)
        result = spawn_as_openshift(f"file://{public}/source", place, env={"HOME": "/nowhere", "TMPDIR": "/nowhere"})
        owners = {path.lstat().st_uid for path in place.rglob("*")}
        modes = {
            path.lstat().st_mode & 0o7777 for path in place.rglob("*") if path.is_file() and path.name != RECORD.name
        }

        assert result.returncode == 0, result.stderr
        assert served(place) == FILES
        assert (owners, modes) == ({1000620000}, {0o444})


def spawn_as_openshift(*arguments, env=None):
    return shell.run([sys.executable, "-I", "-c", AS_OPENSHIFT, *map(str, arguments)], env=env)


@pytest.mark.usefixtures("as_root")
def test_a_random_user_without_a_home(upload, s3_env):
    """
    A user of whom neither the environment nor the user database knows a home fetches from S3.
    """
    uri = upload(FILES)
    with public_directory() as public:
        place = public / "models"
        place.mkdir()
        place.chmod(0o2775)
        homeless = f"import s3fs, encodings.idna, encodings.utf_8_sig, kserve_pvc.backends.s3\n{AS_OPENSHIFT}".replace(
            "os.umask", "os.environ.pop('HOME', None); os.umask"
        )
        result = shell.run([sys.executable, "-I", "-c", homeless, uri, str(place)], env=s3_env)

        assert result.returncode == 0, result.stderr
        assert served(place) == FILES


@pytest.mark.usefixtures("as_root")
def test_a_root_file_system_that_may_only_be_read(upload, s3_env, place, tool):
    """
    Nothing is written but in the destination: everything else is mounted read-only.
    """
    uri = upload(FILES)
    script = f'mount --bind {place} {place} && mount -o remount,ro,bind / && for m in /tmp /var /home /root; do \
mountpoint -q $m && mount -o remount,ro,bind $m; done; touch {place.parent}/x 2>/dev/null && exit 77; exec "$@"'
    command = [tool("unshare"), "--mount", "--propagation", "private", "sh", "-c", script, "sh"]

    result = spawn(uri, place, env={**s3_env, "HOME": "/nonexistent"}, command=command)

    if result.returncode == 77 or "mount:" in result.stderr or "unshare" in result.stderr:
        pytest.skip(f"a read-only root is not possible here: {result.stderr.strip()[-200:]}")
    assert result.returncode == 0, result.stderr
    assert served(place) == FILES


@pytest.mark.timeout(600)
def test_a_gigabyte_of_memory(tmp_path, place):
    """
    A model that is larger than the memory that may be used is fetched in it. `KSERVE_PVC_TEST_INIT_MIB` says how large.
    """
    (tmp_path / "m").mkdir()
    with (tmp_path / "m/large.bin").open("wb") as file:
        file.truncate(MEMORY_MODEL)
        file.seek(MEMORY_MODEL // 2)
        file.write(b"middle")

    result = spawn(tmp_path / "m", place, command=["sh", "-c", 'ulimit -v 1048576; exec "$@"', "sh"])

    assert result.returncode == 0, result.stderr
    assert (place / "large.bin").stat().st_size == MEMORY_MODEL
    with (place / "large.bin").open("rb") as file:
        file.seek(MEMORY_MODEL // 2)
        assert file.read(6) == b"middle"


def test_a_gigabyte_of_memory_for_many_streams(upload, s3_env, place):
    """
    As many streams as there may be fit into the memory of an init container, with their stacks and buffers.
    """
    files = {f"{number}.bin": bytes([number]) * 2_000_000 for number in range(48)}
    env = {**s3_env, "S3_MAX_FILE_CONCURRENCY": "48"}

    result = spawn(upload(files), place, env=env, command=["sh", "-c", 'ulimit -v 1048576; exec "$@"', "sh"])

    assert result.returncode == 0, result.stderr
    assert served(place) == files


def test_sigterm_ends_it_at_once(upload, proxy, s3_env, place, tmp_path):
    """
    A pod that is deleted waits for nothing: the exit code is 1, and the next start goes on where this one was.
    """
    log = tmp_path / "log"
    log.touch()
    files = {f"{number}.bin": bytes([number]) * 200_000 for number in range(12)}
    uri = upload(files)
    proxy.limit_bytes_per_second = 400_000
    process = start(uri, place, env={**s3_env, "KSERVE_PVC_TERMINATION_LOG": str(log)})
    until(lambda: proxy.body_bytes() > 500_000)

    process.terminate()
    process.communicate(timeout=10)
    proxy.limit_bytes_per_second = None
    again = spawn(uri, place, env=s3_env)

    assert process.returncode == 1
    assert log.read_text().startswith("terminated")
    assert again.returncode == 0
    assert served(place) == files


@pytest.mark.timeout(60 + 5 * KILLS)
def test_killed_at_random_and_started_again(upload, proxy, s3_env, place, capsys):
    """
    Whenever it is killed, the next start waits for nobody, and what is there in the end is exact, without leftovers.

    `KSERVE_PVC_TEST_INIT_KILLS` says how often; the source changes on the way, as one that is uploaded anew does.
    """
    bits = random.Random(2)
    ended = 0
    for turn in range(KILLS // 2):
        files = {f"d{number % 3}/{number}.bin": bits.randbytes(40_000) for number in range(turn % 4, turn % 4 + 20)}
        uri = upload({f"{turn % 2}/{turn}/{name}": data for name, data in files.items()}) + f"/{turn % 2}/{turn}"
        for _ in range(2):
            process = start(uri, place, env={**s3_env, **REPLACING})
            time.sleep(bits.uniform(0.15, 0.75))  # Anywhere in its life, which is what is tried out.
            process.kill()
            process.communicate(timeout=30)
            ended += process.returncode == 0
        last = spawn(uri, place, env={**s3_env, **REPLACING})
        assert last.returncode == 0, last.stderr
        assert served(place) == files
        assert own(place) == [str(RECORD)]
    with capsys.disabled():
        print(f"\n{KILLS} starts, {ended} of them over before they were killed")


def test_a_volume_that_is_full(tmp_path, mount):
    """
    What does not fit ends the run with the reason, and after room is made the next start fills the directory.
    """
    place = mount("-t", "tmpfs", "-o", "size=3m", "none")
    write_files(tmp_path / "m", {"a.bin": b"a" * 2_000_000, "b.bin": b"b" * 500_000})
    (place / "ballast").write_bytes(b"x" * 1_500_000)

    full = run(tmp_path / "m", place)
    (place / "ballast").unlink()
    enough = run(tmp_path / "m", place)

    assert (full.returncode, enough.returncode) == (1, 0)
    assert " free and " in full.stderr
    assert served(place) == read_tree(tmp_path / "m")


def test_what_was_begun_of_another_source_takes_up_no_room(upload, proxy, s3_env, tmp_path, mount):
    """
    A directory in which another source was being fetched, by a process that was killed, has all of its room.
    """
    place = mount("-t", "tmpfs", "-o", "size=10m", "none")
    write_files(tmp_path / "m", {"b.bin": b"b" * 7_000_000})
    uri = upload({"a.bin": b"a" * 8_000_000})
    proxy.limit_bytes_per_second = 8_000_000
    killed = start(uri, place, env=s3_env)
    until(lambda: shutil.disk_usage(place).used > 4_500_000)
    killed.kill()
    killed.communicate(timeout=30)

    result = run(tmp_path / "m", place)

    assert killed.returncode == -9
    assert result.returncode == 0, result.stderr
    assert served(place) == {"b.bin": b"b" * 7_000_000}
    assert own(place) == [str(RECORD)]


def test_a_copy_that_does_not_fit(tmp_path, root, mount):
    """
    A directory beside a store that is too small ends the run with the reason, and has no record.
    """
    place = mount("-t", "tmpfs", "-o", "size=1m", "none")
    write_files(tmp_path / "m", {"a.bin": b"a" * 2_000_000})

    result = run(tmp_path / "m", place, env={"KSERVE_PVC_STORE": str(root), "KSERVE_PVC_MATERIALIZE": "copy"})

    assert result.returncode == 1
    assert " free and " in result.stderr
    assert served(place) == {}
    assert str(RECORD) not in own(place)


@pytest.mark.parametrize("after", ["old", "new", "third"])
@pytest.mark.parametrize("at", range(6))
def test_a_crash_while_files_are_placed(tmp_path, place, at, after):
    """
    Wherever it dies between two renames, the next start ends with its own model alone, be it the same one or another.
    """
    write_files(tmp_path / "old", {"same": b"old", "y": b"yyy"})
    write_files(tmp_path / "new", {"same": b"new", "y": b"YYY", "d/y": b"a directory"})
    write_files(tmp_path / "third", {"d": b"a file", "other/z": b"z"})
    run(tmp_path / "old", place)
    steps = iter(range(100))
    rename = Destination._rename

    def dying(self, source, path):
        if next(steps) == at:
            raise KeyboardInterrupt
        rename(self, source, path)

    with patch.object(Destination, "_rename", dying):
        died = run(tmp_path / "new", place, env=REPLACING)
    result = run(tmp_path / after, place, env=REPLACING)

    assert result.returncode == 0
    assert died.returncode == (1 if at < 5 else 0)
    assert served(place) == read_tree(tmp_path / after)
    assert own(place) == [str(RECORD)]


def test_a_file_that_was_moved_is_proven_after_a_crash(tmp_path, place):
    """
    What was renamed before a crash is compared with its digest; what somebody has changed since is fetched again.
    """
    write_files(tmp_path / "m", {"a": b"aaaa", "b": b"bbbb"})
    put = Destination._put
    with patch.object(
        Destination,
        "_put",
        lambda self, path, data: put(self, path, data) if path != RECORD else interrupt(),
    ):
        died = run(tmp_path / "m", place)
    (place / "a").write_bytes(b"evil")

    first, second = run(tmp_path / "m", place), run(tmp_path / "m", place)

    assert (died.returncode, first.returncode, second.returncode) == (1, 1, 0)
    assert served(place) == {"a": b"aaaa", "b": b"bbbb"}


def interrupt():
    raise KeyboardInterrupt
