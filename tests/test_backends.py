"""
How the plug-in for a URI scheme is found.
"""

import importlib
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import pytest
import shell
from sources import FakeBackend
from trees import read_tree

from kserve_pvc import ModelStore, UnknownSchemeError, backends
from kserve_pvc._source.ref import parse_ref
from kserve_pvc.backends import GROUP, make_backend
from kserve_pvc.backends.file import FileBackend

FIND = """
import sys
from kserve_pvc import StoreError
from kserve_pvc.backends import make_backend

try:
    options = {} if sys.argv[1] == "file" else {"token": "canary"}
    print(type(make_backend(sys.argv[1], {}, options)).__name__)
except StoreError as error:
    print(f"{type(error).__name__}: {error}")
"""
# A plug-in that says which options it was given, and how often it was imported.
PLUGIN = """
import sys
print("imported", file=sys.stderr)


class Backend:
    def __init__(self, options):
        self.options = options
"""


@pytest.fixture
def site(tmp_path):
    """
    A directory of installed distributions, and what makes another one there.
    """
    place = tmp_path / "site"
    place.mkdir()

    def install(distribution: str, points: str, modules: dict[str, str] | None = None) -> Path:
        info = place / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{GROUP}]\n{points}\n")
        for name, text in (modules or {}).items():
            (place / f"{name}.py").write_text(text)
        return place

    return install


def find(place: Path, scheme: str) -> subprocess.CompletedProcess[str]:
    """
    Look for a scheme in an interpreter that sees the distributions of a directory before its own.
    """
    command = [sys.executable, "-c", FIND, scheme]
    env = shell.clean_environ({"PYTHONPATH": str(place)})
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=env, cwd=place, check=True)


def test_an_unknown_scheme_says_what_is_served(root):
    """
    A scheme that nobody serves names the installed ones and how others are added, and no claim is left for it.
    """
    with pytest.raises(UnknownSchemeError) as caught:
        ModelStore(root, mode="rw").ensure("oci://registry/model", progress=False)

    assert re.match("no backend for `oci://`; .*installed backends serve .*`file`, .*`s3`", str(caught.value))
    assert f"`{GROUP}`" in str(caught.value)
    assert (caught.value.scheme, caught.value.exit_code) == ("oci", 2)
    assert list((root / ".kserve-pvc").rglob("claims")) == []


@pytest.mark.parametrize(("scheme", "name"), [("file", "FileBackend"), ("s3", "S3Backend")])
def test_the_built_in_back_ends_are_found_by_entry_point(tmp_path, scheme, name):
    """
    What ships with the package is registered as plug-ins are.
    """
    if scheme == "s3":
        pytest.importorskip("s3fs", reason="`s3fs` is not installed")
    assert find(tmp_path, scheme).stdout.strip() == name


def test_what_is_known_without_the_metadata_is_what_the_metadata_says():
    """
    The table that saves reading all metadata names the entry points of this distribution, no more and no less.
    """
    registered = {
        p.name: tuple(p.value.split(":")) for p in metadata.entry_points(group=GROUP) if p.dist.name == "kserve-pvc"
    }

    assert registered == backends._BUILT_IN


@pytest.mark.parametrize("scheme", ["s3", "file"])
def test_a_plugin_does_not_take_over_a_built_in_scheme(site, scheme):
    """
    What is installed beside this package changes nothing about a scheme of ours, and is not even imported.
    """
    if scheme == "s3":
        pytest.importorskip("s3fs", reason="`s3fs` is not installed")
    place = site("other-store", f"{scheme} = other_store:Backend\n", {"other_store": PLUGIN})

    found = find(place, scheme)

    assert (found.stdout.strip(), found.stderr) == ({"s3": "S3Backend", "file": "FileBackend"}[scheme], "")


def test_plugins_are_listed_with_their_distributions(site):
    """
    A plug-in is named with distribution and version, and whether it is used.
    """
    place = site("other-store", "s3 = other_store:Backend\nother = other_store:Backend\n", {"other_store": PLUGIN})
    script = "import json; from kserve_pvc.backends import list_plugins; print(json.dumps(list_plugins()))"

    env = shell.clean_environ({"PYTHONPATH": str(place)})
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, env=env, cwd=place, check=True)
    found = json.loads(run.stdout)

    assert sorted(found) == ["other", "s3"]
    assert re.fullmatch(r"other-store [0-9.]+ \(other_store:Backend\)", found["other"][0])
    assert found["s3"][0].endswith("not used: the scheme is built in")


OPTIONS = {"s3": {"key": "a"}, "hf": {"token": "b"}}


@pytest.mark.parametrize(
    ("uri", "options", "chosen"),
    [
        ("s3://b/m", {"key": "a"}, {"key": "a"}),
        ("hf://o/m", {"key": "a"}, {"key": "a"}),
        ("s3://b/m", {"client_kwargs": {"region_name": "x"}}, {"client_kwargs": {"region_name": "x"}}),
        ("s3://b/m", {}, {}),
        ("s3://b/m", OPTIONS, {"key": "a"}),
        ("hf://o/m", OPTIONS, {"token": "b"}),
        ("gs://b/m", OPTIONS, {}),
        ("other://m", {"other": {"x": 1}}, {"x": 1}),
        ("other://m", {"mine": {"x": 1}}, {}),
        ("https://account.blob.core.windows.net/c/m", {"az": {"account_key": "c"}}, {"account_key": "c"}),
        ("fsspec+sftp://host/m", {"fsspec+sftp": {"username": "u"}, "fsspec": {}}, {"username": "u"}),
    ],
)
def test_options_by_scheme_are_for_that_scheme_alone(uri, options, chosen):
    """
    A secret for one service is never handed to the back end of another; options that name no scheme are for all.
    """
    assert backends.options_for(parse_ref(uri), options, {"mine": FileBackend}) == chosen


def test_a_missing_package_is_named_with_its_extra():
    """
    Without s3fs an S3 model cannot be fetched, and the error says what to install.
    """
    script = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "s3fs":
            raise ModuleNotFoundError("No module named 's3fs'", name="s3fs")

sys.meta_path.insert(0, Blocker())
"""
    said = shell.python(script + FIND, "s3")

    assert said.startswith("UnknownSchemeError: no backend for `s3://`; install it with `pip install 'kserve-pvc[s3]'`")
    assert "No module named 's3fs'" in said


def test_a_plugin_is_imported_when_its_scheme_is_used(site):
    """
    An installed plug-in serves its scheme with the options of the store, and is not imported for another.
    """
    place = site("other-store", "other = other_store:Backend\n", {"other_store": PLUGIN})

    used, unused = find(place, "other"), find(place, "file")

    assert (used.stdout.strip(), used.stderr.count("imported")) == ("Backend", 1)
    assert (unused.stdout.strip(), unused.stderr) == ("FileBackend", "")


def test_two_distributions_that_claim_one_scheme_are_both_named(site):
    """
    Of two plug-ins neither is preferred silently: the error names both, imports neither and says what to do.
    """
    place = site("first-store", "other = first_store:Backend", {"first_store": PLUGIN})
    site("second-store", "other = second_store:Backend", {"second_store": PLUGIN})

    found = find(place, "other")

    assert found.stdout.startswith("UnknownSchemeError: ")
    assert all(f"`{name}`" in found.stdout for name in ("first-store", "second-store"))
    assert "uninstall one, or choose with `backends=`" in found.stdout
    assert found.stderr == ""


def test_one_distribution_that_is_found_twice_is_one(site, tmp_path):
    """
    A distribution that lies on the path twice, as after an editable install, claims its scheme once.
    """
    place = site("other-store", "other = other_store:Backend", {"other_store": PLUGIN})
    command = [sys.executable, "-c", FIND, "other"]
    (tmp_path / "again").symlink_to(place)
    env = shell.clean_environ({"PYTHONPATH": os.pathsep.join([str(place), str(tmp_path / "again")])})

    found = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, check=True)

    assert found.stdout.strip() == "Backend"


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("import not_installed_sdk", "ModuleNotFoundError: No module named 'not_installed_sdk'"),
        ("raise ImportError('libfoo.so is missing')", "ImportError: libfoo.so is missing"),
        (
            "def Backend(options):\n    import not_installed_sdk",
            "ModuleNotFoundError: No module named 'not_installed_sdk'",
        ),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("raise SystemExit(7)", "SystemExit: 7"),
        ("class Odd(BaseException): pass\nraise Odd('odd')", "Odd: odd"),
        ("Renamed = dict", "AttributeError: module 'other_store' has no attribute 'Backend'"),
    ],
    ids=["package", "library", "factory", "bug", "exit", "odd", "renamed"],
)
def test_a_plugin_that_cannot_be_loaded_says_why(site, module, reason):
    """
    The error has the reason, whether the module or the factory fails, or half an upgrade has renamed it.
    """
    place = site("other-store", "other = other_store:Backend", {"other_store": module})

    assert (
        f"UnknownSchemeError: no backend for `other://`; its plug-in cannot be loaded: {reason}"
        in find(place, "other").stdout
    )


def test_an_interrupt_while_a_plugin_is_imported_is_one(site, monkeypatch):
    """
    Who interrupts a program that imports a plug-in is heard.
    """
    monkeypatch.syspath_prepend(
        site("other-store", "other = interrupted_store:Backend", {"interrupted_store": "raise KeyboardInterrupt"})
    )
    out = sys.stdout

    with pytest.raises(KeyboardInterrupt):
        make_backend("other", {}, {})

    assert sys.stdout is out


# Says something when it is imported, and serves one file.
LOUD = """
import io
from contextlib import contextmanager

from kserve_pvc import FileEntry, RemoteFile, order_listing

print("welcome to the other store")


class Backend:
    def __init__(self, options):
        pass

    def resolve(self, ref):
        entry = FileEntry(path="config.json", size_bytes=2, token="1")
        return order_listing(ref, [RemoteFile(entry=entry, address="", pin={})])

    @contextmanager
    def open_range(self, file, start, stop):
        yield io.BytesIO(b"{}"[start:stop])
"""


@pytest.mark.parametrize(
    "module", [LOUD, "print('welcome to the other store')\nraise SystemExit(0)"], ids=["served", "exit"]
)
@pytest.mark.parametrize("as_json", [True, False], ids=["json", "plain"])
def test_what_a_plugin_prints_is_not_taken_for_the_answer(site, root, module, as_json):
    """
    What a plug-in prints when it is imported goes to stderr, and a script reads from stdout what it has asked for.
    """
    place = site("other-store", "other = other_store:Backend", {"other_store": module})
    # An isolated interpreter would not look where the plug-in is.
    command = [
        sys.executable,
        "-m",
        "kserve_pvc",
        "--store",
        str(root),
        "ensure",
        "other://model",
        *(["--json"] if as_json else []),
    ]

    result = shell.run(command, env={"PYTHONPATH": str(place), "PYTHONSAFEPATH": "1"})

    is_served = module is LOUD
    assert (result.returncode, "welcome to the other store" in result.stderr) == (0 if is_served else 2, True)
    if as_json:
        said = shell.document(result)
        assert said["status"] == "downloaded" if is_served else said["error"]["type"] == "UnknownSchemeError"
    else:
        assert [read_tree(Path(line)) for line in result.stdout.splitlines()] == (
            [{"config.json": b"{}"}] if is_served else []
        )


def test_plugins_that_are_loaded_at_once_leave_stdout_as_it_was(site, monkeypatch):
    """
    Two threads load two plug-ins, the first to begin is the first to end, and stdout is what it was.
    """
    first = "import loading\nloading.begun.set()\nloading.second_begun.wait(30)\nBackend = dict"
    second = "import loading\nloading.second_begun.set()\nloading.first_ended.wait(30)\nBackend = dict"
    events = "import threading\nbegun, second_begun, first_ended = (threading.Event() for _ in range(3))"
    modules = {"first_at_once": first, "second_at_once": second, "loading": events}
    place = site("two-stores", "first = first_at_once:Backend\nsecond = second_at_once:Backend", modules)
    monkeypatch.syspath_prepend(place)
    loading, out = importlib.import_module("loading"), sys.stdout

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(make_backend, "first", {}, {})
        loading.begun.wait(30)
        two = pool.submit(make_backend, "second", {}, {})
        one.result(30)
        during = sys.stdout
        loading.first_ended.set()
        two.result(30)

    assert during is sys.stderr
    assert sys.stdout is out


def test_factories_given_to_a_store_are_preferred(root):
    """
    `backends=` replaces an installed back end, and its factory gets the storage options, once for each store.
    """
    fake = FakeBackend({"a": b"a"})
    given = []

    def factory(options):
        given.append(dict(options))
        return fake

    store = ModelStore(root, mode="rw", backends={"s3": factory}, storage_options={"endpoint_url": "http://nowhere"})
    models = [store.ensure(f"s3://bucket/{name}", progress=False) for name in ("one", "two")]

    assert [read_tree(model.path) for model in models] == [{"a": b"a"}] * 2
    assert given == [{"endpoint_url": "http://nowhere"}]


def test_a_given_factory_that_lacks_a_package_says_so():
    """
    An ImportError of a factory in `backends=` is a typed error too.
    """

    def factory(options):
        raise ImportError("no sdk")

    with pytest.raises(UnknownSchemeError, match="its plug-in cannot be loaded: ImportError: no sdk"):
        make_backend("other", {"other": factory}, {})


LAZY = """
import sys
from kserve_pvc import ModelStore

root, source, on_s3 = sys.argv[1:]
store = ModelStore(root, mode="rw")
store.ensure(source, progress=False)
store.ensure(on_s3)
print(sorted({"s3fs", "fsspec", "aiohttp", "botocore", "importlib.metadata"} & set(sys.modules)))
"""


def test_files_and_hits_load_no_sdk(root, source):
    """
    Copying files and returning an S3 model that is present import neither s3fs nor what it stands on.
    """
    ModelStore(root, mode="rw", backends={"s3": FakeBackend({"a": b"a"}).factory}).ensure(
        "s3://bucket/model", progress=False
    )

    said = shell.python(LAZY, str(root), f"file://{source}", "s3://bucket/model")

    assert said.strip() == "[]"


def test_a_hit_looks_for_no_plugin(root, source):
    """
    Returning what is present does not even read which plug-ins are installed.
    """
    ModelStore(root, mode="rw", backends={"file": FileBackend}).ensure(f"file://{source}", progress=False)

    said = shell.python(LAZY, str(root), f"file://{source}", f"file://{source}")

    assert said.strip() == "[]"
