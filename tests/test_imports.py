"""
Who may import whom, who may touch the volume, and what importing the package costs.
"""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kserve_pvc

PACKAGE = Path(kserve_pvc.__file__).parent

PURE = {
    "_amounts",
    "_html",
    "_buffers",
    "_pace",
    "errors",
    "_codec",
    "_defaults",
    "_entry",
    "_names",
    "_ref",
    "_record",
    "_layout",
    "_source",
    "_procedures",
    "_protocol",
    "_events",
    "_retry",
    "_unpack",
}
EDGE = {"_bundle", "_settings", "_volume", "_transfer", "_verify", "_progress", "locks", "backends"}
TOP = {
    "_aliases",
    "_diagnosis",
    "_diagnosis_text",
    "_doctor",
    "_meeting",
    "_profile",
    "_log",
    "_log_writer",
    "_warm",
    "_claims",
    "_download",
    "_plan",
    "_removal",
    "_reuse",
    "_store",
}
DOORS = {"_cli", "__main__", "kserve"}
# What others import: the package itself, and the suite for back ends.
FRONT = {"__init__", "testing"}

# What each room may import besides the standard library.
FOREIGN = {
    **{room: {"attrs"} for room in PURE | EDGE | TOP | FRONT},
    "backends": {
        "attrs",
        "fsspec",
        "s3fs",
        "aiobotocore",
        "botocore",
        "aiohttp",
        "azure",
        "gcsfs",
        "google",
        "google_crc32c",
        "requests",
    },
    "locks": {"attrs", "portalocker", "redis", "kubernetes"},
    "testing": {"pytest"},
    "_progress": {"attrs", "tqdm"},
    **{door: {"attrs"} for door in DOORS},
    "_cli": {"attrs", "shtab"},
    "kserve": {"attrs", "yaml", "starlette", "uvicorn", "prometheus_client"},
}
NEIGHBOURS = {
    **dict.fromkeys(PURE, PURE),
    **{room: PURE | {room} for room in EDGE},
    **dict.fromkeys(TOP, PURE | EDGE | TOP),
    **dict.fromkeys(FRONT, PURE | EDGE | TOP | {"testing", "ModelStore"}),
}

# What creates, renames or deletes: functions of `os`, methods of a path, and flags.
CHANGES = {
    *(
        "chmod",
        "chown",
        "fchmod",
        "fchown",
        "ftruncate",
        "lchmod",
        "lchown",
        "link",
        "makedirs",
        "mkdir",
        "mkfifo",
        "mknod",
        "posix_fallocate",
    ),
    *(
        "remove",
        "removedirs",
        "rename",
        "renames",
        "replace",
        "rmdir",
        "setxattr",
        "symlink",
        "truncate",
        "unlink",
        "utime",
    ),
    *("O_CREAT", "O_TRUNC", "O_APPEND", "O_TMPFILE"),
}
PATH_CHANGES = {
    "chmod",
    "hardlink_to",
    "mkdir",
    "rename",
    "rmdir",
    "symlink_to",
    "touch",
    "unlink",
    "write_bytes",
    "write_text",
}


def modules(package: Path) -> dict[str, ast.Module]:
    """
    Every module of the package by its dotted name below it.
    """
    paths = {".".join(path.relative_to(package).with_suffix("").parts): path for path in sorted(package.rglob("*.py"))}
    return {name: ast.parse(path.read_text(encoding="utf-8"), str(path)) for name, path in paths.items()}


def room(module: str) -> str:
    return module.partition(".")[0]


def imported(tree: ast.Module) -> Iterator[str]:
    """
    The absolute name of everything a module imports anywhere, inside functions and under `TYPE_CHECKING` too.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute, so that they can be read and checked"
            # `from kserve_pvc import _layout` names a module, `from kserve_pvc._layout import META` a thing in one.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def inner(tree: ast.Module) -> set[str]:
    """
    The rooms of this package that a module imports from.
    """
    return {name.split(".")[1] for name in imported(tree) if name.startswith("kserve_pvc.")}


def foreign(tree: ast.Module) -> set[str]:
    """
    The distributions that a module imports from, without the standard library.
    """
    tops = {name.partition(".")[0] for name in imported(tree)}
    return tops - set(sys.stdlib_module_names) - {"kserve_pvc"}


def homeless(package: Path) -> list[str]:
    return sorted({room(name) for name in modules(package)} - PURE - EDGE - TOP - DOORS - FRONT)


def trespasses(package: Path) -> list[str]:
    """
    Every import that leads where the room of its module may not look.
    """
    found = []
    for name, tree in modules(package).items():
        here = room(name)
        if here in NEIGHBOURS:
            found += [f"{name} imports {other}" for other in sorted(inner(tree) - NEIGHBOURS[here])]
            found += [f"{name} imports {other}" for other in sorted(foreign(tree) - FOREIGN[here])]
        elif here in DOORS:
            found += [f"{name} imports {other}" for other in sorted(foreign(tree) - FOREIGN[here])]
    return found


def changes(tree: ast.Module) -> Iterator[str]:
    """
    Every mention of something that creates, renames or deletes files.
    """
    for name in imported(tree):
        if name.partition(".")[0] in ("shutil", "tempfile") or name.rpartition(".")[::2] in {
            ("os", change) for change in CHANGES
        }:
            yield name
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="os"), attr=attr) if attr in CHANGES:
                yield f"os.{attr}"
            case ast.Call(func=ast.Attribute(value=value, attr=attr)) if attr in PATH_CHANGES and not is_module(value):
                yield f".{attr}()"
            case ast.Call(func=ast.Name(id="open")) if is_writing(node, 1):
                yield "open() for writing"
            case ast.Call(func=ast.Attribute(value=value, attr="open")) if is_writing(node, 0) and not is_module(value):
                yield "open() for writing"


def is_module(value: ast.expr) -> bool:
    return isinstance(value, ast.Name) and value.id == "os"


def is_writing(call: ast.Call, position: int) -> bool:
    """
    Whether the mode of a call that opens a file, named or at its position, is one that writes.
    """
    modes = [
        *call.args[position : position + 1],
        *(keyword.value for keyword in call.keywords if keyword.arg == "mode"),
    ]
    texts = [mode.value for mode in modes if isinstance(mode, ast.Constant) and isinstance(mode.value, str)]
    return any(re.fullmatch(r"[rwaxbt+]*[wax+][rwaxbt+]*", text) for text in texts)


def writers(package: Path) -> dict[str, list[str]]:
    found = {name: sorted(set(changes(tree))) for name, tree in modules(package).items()}
    return {name: what for name, what in found.items() if what}


def test_every_module_has_its_room():
    """
    A new module is put into a room before it lands, so that the rules below speak of it.
    """
    assert homeless(PACKAGE) == []


def test_imports_only_go_down():
    """
    Pure modules import pure ones, edge modules do not import each other, nobody imports the doors, and what is heavy
    or foreign is imported in one room only.
    """
    assert trespasses(PACKAGE) == []


def test_only_the_volume_changes_the_volume():
    """
    Creating, renaming and deleting is written in `_volume` and nowhere else, but for bundles and the directories that
    the initializer fills, which lie outside of every store.
    """
    assert set(writers(PACKAGE)) == {"_volume", "_bundle", "kserve._destination"}


@pytest.mark.parametrize(
    ("module", "line", "trespass"),
    [
        ("_ref", "from kserve_pvc._volume import Volume", "_ref imports _volume"),
        ("_ref", "from kserve_pvc import _volume", "_ref imports _volume"),
        ("_ref", "import kserve_pvc._settings", "_ref imports _settings"),
        ("_protocol", "import fsspec", "_protocol imports fsspec"),
        ("_record", "def f():\n    import kserve_pvc.backends.s3", "_record imports backends"),
        ("_volume", "from kserve_pvc._settings import read_settings", "_volume imports _settings"),
        ("_volume", "import portalocker", "_volume imports portalocker"),
        ("_transfer", "from fsspec.asyn import sync", "_transfer imports fsspec"),
        ("backends.file", "from kserve_pvc.locks.flock import FileLock", "backends.file imports locks"),
        ("backends.s3", "from tqdm.auto import tqdm", "backends.s3 imports tqdm"),
        ("locks.lease", "from kserve_pvc._volume import Volume", "locks.lease imports _volume"),
        ("_store", "import s3fs", "_store imports s3fs"),
        ("_store", "from kserve_pvc import _cli", "_store imports _cli"),
        ("__init__", "from kserve_pvc.__main__ import main", "__init__ imports __main__"),
    ],
)
def test_a_forbidden_import_is_noticed(tmp_path, module, line, trespass):
    """
    Each rule about imports fails for a module that breaks it.
    """
    place = tmp_path.joinpath(*module.split(".")).with_suffix(".py")
    place.parent.mkdir(exist_ok=True)
    place.write_text(f"{line}\n")

    assert trespasses(tmp_path) == [trespass]


@pytest.mark.parametrize("module", ["_manager", "utils", "kubernetes.leases"])
def test_a_module_without_a_room_is_noticed(tmp_path, module):
    """
    A module that no rule speaks of is named.
    """
    place = tmp_path.joinpath(*module.split(".")).with_suffix(".py")
    place.parent.mkdir(exist_ok=True)
    place.write_text("")

    assert homeless(tmp_path) == [module.partition(".")[0]]


@pytest.mark.parametrize(
    ("line", "change"),
    [
        ("os.rename('a', 'b')", "os.rename"),
        ("os.replace('a', 'b')", "os.replace"),
        ("os.link('a', 'b')", "os.link"),
        ("os.unlink('a')", "os.unlink"),
        ("os.mkdir('a')", "os.mkdir"),
        ("os.rmdir('a')", "os.rmdir"),
        ("make = os.makedirs", "os.makedirs"),
        ("from os import remove", "os.remove"),
        ("from os import rename as move", "os.rename"),
        ("import shutil", "shutil"),
        ("from shutil import rmtree", "shutil.rmtree"),
        ("import tempfile", "tempfile"),
        ("os.open('a', os.O_WRONLY | os.O_CREAT)", "os.O_CREAT"),
        ("open('a', 'w')", "open() for writing"),
        ("Path('a').open('ab')", "open() for writing"),
        ("open('a', encoding='utf-8', mode='r+')", "open() for writing"),
        ("Path('a').unlink()", ".unlink()"),
        ("path.mkdir(parents=True)", ".mkdir()"),
        ("path.write_bytes(b'')", ".write_bytes()"),
    ],
)
def test_a_change_of_the_volume_is_noticed(tmp_path, line, change):
    """
    Each way to create, rename or delete is seen wherever it is written.
    """
    (tmp_path / "_store.py").write_text(f"{line}\n")

    assert writers(tmp_path) == {"_store": [change]}


# Heavy or optional; the command line and a hit in the store must not pay for them.
LAZY = {
    *(
        "s3fs",
        "fsspec",
        "aiohttp",
        "aiobotocore",
        "botocore",
        "boto3",
        "google",
        "azure",
        "huggingface_hub",
        "requests",
        "urllib3",
    ),
    *("ssl", "socket", "http.client", "asyncio", "portalocker", "tqdm", "kubernetes", "redis", "importlib.metadata"),
    *("yaml", "starlette", "uvicorn", "prometheus_client"),
    *("multiprocessing", "concurrent.futures", "subprocess", "ctypes", "secrets", "random", "shutil"),
}
# What a hit in the store loads of this package: nothing that downloads, removes, checks, locks or shows progress.
HIT = {"_codec", "_defaults", "_entry", "_layout", "_log", "_ref", "_store", "_volume", "errors"}


def run(program: str) -> str:
    """
    What a program prints as its last line in a fresh interpreter.
    """
    result = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    return result.stdout.splitlines()[-1]


def loaded_by(statement: str) -> set[str]:
    """
    The modules that are there after a statement in a fresh interpreter.
    """
    return set(run(f"{statement}\nimport sys\nprint(*sys.modules)").split())


def ours(loaded: set[str]) -> set[str]:
    return {name.removeprefix("kserve_pvc.") for name in loaded if name.startswith("kserve_pvc.")}


@pytest.fixture
def warm(tmp_path):
    """
    The root of a store that holds a model, and the model's URI.
    """
    source, root = tmp_path / "source", tmp_path / "volume"
    source.mkdir()
    root.mkdir()
    (source / "weights.bin").write_bytes(b"weights")
    uri = f"file://{source}"
    kserve_pvc.ModelStore(root, mode="rw").ensure(uri, progress=False)
    return str(root), uri


def test_importing_the_package_loads_nothing_else():
    """
    `import kserve_pvc` runs its one file: not even attrs is loaded before a name is used.
    """
    assert loaded_by("import importlib, kserve_pvc") - loaded_by("import importlib") == {"kserve_pvc"}


@pytest.mark.parametrize(
    "hit",
    [
        "ModelStore(root).get(uri)",
        "ModelStore(root).ensure(uri)",
        "ModelStore(root, mode='rw').get(uri)",
        "ModelStore(root, mode='rw').ensure(uri)",
        "assert uri in ModelStore(root)",
        "assert len(ModelStore(root).list()) == 1",
    ],
)
def test_a_hit_stays_light(warm, hit):
    """
    A model that is there is found without an SDK, the network, a thread pool, a progress bar, or our own download side.
    """
    root, uri = warm

    loaded = loaded_by(f"from kserve_pvc import ModelStore\nroot, uri = {root!r}, {uri!r}\n{hit}")

    assert loaded & LAZY == set()
    assert ours(loaded) == HIT


@pytest.mark.parametrize("verb", ["path", "ensure"])
def test_a_hit_from_the_shell_stays_light(warm, verb):
    """
    The command line adds its own module and the settings to what a hit loads, and nothing heavy.
    """
    root, uri = warm

    loaded = loaded_by(f"from kserve_pvc._cli import main\nassert main([{verb!r}, {uri!r}, '--store', {root!r}]) == 0")

    assert loaded & LAZY == set()
    assert ours(loaded) == HIT | {"_cli", "_settings"}


def test_the_decision_about_a_pod_loads_no_server():
    """
    What is decided about manifests is pure: it loads neither YAML nor anything of a network, nor the store.
    """
    loaded = loaded_by("from kserve_pvc.kserve import mutate_pod, share_volume\nimport kserve_pvc.kserve._admission")

    assert loaded & LAZY == set()
    assert ours(loaded) - {"kserve"} == {
        *("_names", "_settings", "errors"),
        *(f"kserve.{name}" for name in ("_admission", "_manifests", "_objects", "_pods", "_policy")),
    }


@pytest.mark.parametrize("hit", ["assert uri in store", "store.get(uri)", "store.ensure(uri)"])
def test_a_hit_reads_one_directory_and_one_record(warm, hit):
    """
    A store that is open lists the log and opens its newest record; it opens and lists nothing else.
    """
    root, uri = warm
    program = f"""
import json, sys
from kserve_pvc import ModelStore
store, uri, seen = ModelStore({root!r}, mode="rw"), {uri!r}, []
sys.addaudithook(lambda event, found: seen.append((event, str(found[0]))) if event == "open" or event.startswith("os.") else None)
{hit}
print(json.dumps(seen))
"""

    seen = json.loads(run(program))

    log = next(Path(root).glob(".kserve-pvc/keys/*/log"))
    assert seen == [["os.listdir", str(log)], ["open", str(log / "000000000001.commit")]]


def test_what_is_lazy_would_be_noticed():
    """
    The checks above see a module that an import pulls in behind another one.
    """
    assert {"asyncio", "ssl"} <= loaded_by("import asyncio") & LAZY
    assert {"_download", "_protocol", "_claims"} <= ours(loaded_by("import kserve_pvc._download")) - HIT


def test_every_public_name_is_there():
    """
    Each name in `__all__` is found and listed, in order, though it is loaded only when it is used.
    """
    program = "import json, kserve_pvc\nbefore = dir(kserve_pvc)\nfrom kserve_pvc import *\nprint(json.dumps([before, dir(), dir(kserve_pvc)]))"

    before, star, after = json.loads(run(program))

    assert kserve_pvc.__all__ == sorted(kserve_pvc.__all__)
    assert set(kserve_pvc.__all__) <= set(before) & set(star) & set(after)
    assert all(getattr(kserve_pvc, name).__name__ == name for name in kserve_pvc.__all__)


def test_type_checkers_see_the_names_that_are_loaded():
    """
    What `__init__` imports for type checkers is what it loads, name by name and from the same module.
    """
    checked = [
        node
        for node in ast.parse(Path(kserve_pvc.__file__).read_text(encoding="utf-8")).body
        if isinstance(node, ast.If)
    ]

    shown = {name for node in checked for name in imported(ast.Module(node.body, type_ignores=[]))}
    loaded = {f"kserve_pvc.{kserve_pvc._HOMES.get(name, 'errors')}.{name}" for name in kserve_pvc.__all__}

    assert shown == loaded
    assert set(kserve_pvc._HOMES) <= set(kserve_pvc.__all__)


def test_a_name_that_does_not_exist_is_an_attribute_error():
    """
    A misspelled name fails as in any module, and a submodule is still found by importing it.
    """
    with pytest.raises(AttributeError, match="module 'kserve_pvc' has no attribute 'ModelStor'"):
        kserve_pvc.ModelStor  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'ModelStor'"):
        exec("from kserve_pvc import ModelStor")

    assert run("from kserve_pvc import errors\nprint(errors.StoreError.__name__)") == "StoreError"
