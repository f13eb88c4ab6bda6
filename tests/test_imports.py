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

# The folders are the tiers: a room imports from rooms further down and from itself, never from beside or above.
TIERS = (
    {"_units"},
    {"errors", "_defaults"},
    {"_format", "_settings", "_threads"},
    {"_source", "_show"},
    {"_volume", "locks"},
    {"_archive"},
    {"_keys", "backends"},
    {"_process"},
    {"_model", "_opening"},
    {"_download", "_doctor"},
    {"_access"},
    {"_store"},
    {"_filesystem"},
    {"__init__", "kserve", "testing"},
    {"_cli"},
    {"__main__"},
)
# These take values and return values: no room outside these, and no clock, thread, socket or process.
PURE = {"_units", "errors", "_defaults", "_format", "_source", "_show"}
PURE_MODULES = {"protocol", "procedures", "schedule"}
IMPURE = {"ctypes", "multiprocessing", "os", "random", "select", "socket", "subprocess", "threading", "time"}
# What a room may import besides attrs and the standard library.
FOREIGN = {
    "backends": {"fsspec", "s3fs", "aiobotocore", "botocore", "aiohttp", "azure", "gcsfs", "google"}
    | {"google_crc32c", "huggingface_hub", "requests", "yarl"},
    "_filesystem": {"fsspec"},
    "locks": {"portalocker", "redis", "kubernetes"},
    "testing": {"pytest"},
    "_show": {"tqdm"},
    "kserve": {"yaml", "starlette", "uvicorn", "prometheus_client"},
    "_cli": {"shtab"},
    # For types only: callers may pass file systems.
    **{room: {"fsspec"} for room in ("_access", "_opening", "_store")},
}

# `ModelStore` is the public interface: every method with its arguments and what it promises.
LARGE = {("_store", "class ModelStore"), ("_store", "module"), ("errors", "module")}

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
            # `from kserve_pvc._format import layout` names a module, `from … .layout import META` a thing in one.
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


def tier(name: str) -> int:
    return next((number for number, rooms in enumerate(TIERS) if name in rooms), -1)


def homeless(package: Path) -> list[str]:
    return sorted({room(name) for name in modules(package) if tier(room(name)) < 0})


def trespasses(package: Path) -> list[str]:
    """
    Every import that leads where the room of its module may not look.
    """
    found = []
    for name, tree in modules(package).items():
        here = room(name)
        found += [f"{name} imports {other}" for other in sorted(inner(tree) - {here}) if not may_import(name, other)]
        found += [f"{name} imports {other}" for other in sorted(foreign(tree) - {"attrs"} - FOREIGN.get(here, set()))]
        if name.rpartition(".")[2] in PURE_MODULES:
            tops = {other.partition(".")[0] for other in imported(tree)}
            found += [f"{name} imports {other}" for other in sorted(tops & IMPURE)]
    return found


def may_import(name: str, other: str) -> bool:
    if name == "__init__" and other == "ModelStore":
        return True
    if room(name) in PURE or name.rpartition(".")[2] in PURE_MODULES:
        return other in PURE and tier(other) < tier(room(name))
    return tier(other) < tier(room(name))


def circles(package: Path) -> list[tuple[str, ...]]:
    """
    Modules that import each other when they are loaded, in a circle. What a function imports, or a type checker, is
    not part of one.
    """
    trees = modules(package)
    reached = {name: {m for m in trees if m in loaded_with(tree)} for name, tree in trees.items()}
    grows = True
    while grows:
        grows = False
        for name, found in reached.items():
            more = found.union(*(reached[other] for other in found))
            grows = grows or more != found
            reached[name] = more
    return sorted(
        {tuple(sorted(n for n in reached[name] if name in reached[n])) for name in trees if name in reached[name]}
    )


def loaded_with(tree: ast.Module) -> set[str]:
    """
    The modules of this package that are loaded because a module is.
    """
    top = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], type_ignores=[])
    names = {name.removeprefix("kserve_pvc.") for name in imported(top)}
    return names | {name.rpartition(".")[0] for name in names}


def sizes(package: Path) -> Iterator[tuple[str, str, int]]:
    """
    Module, what in it, and how many lines it has. The docstring of a function does not count.
    """
    for path in sorted(package.rglob("*.py")):
        name, text = ".".join(path.relative_to(package).with_suffix("").parts), path.read_text(encoding="utf-8")
        yield name, "module", text.count("\n")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                yield name, f"class {node.name}", length(node)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[0]
                yield name, node.name, length(node) - (length(first) if ast.get_docstring(node) else 0)


def length(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def too_large(package: Path) -> list[str]:
    """
    Modules over 500 lines, classes over 300 and functions over 35, without those that say why they are.
    """
    return [
        f"{name}: {what} has {lines} lines"
        for name, what, lines in sizes(package)
        if lines > (500 if what == "module" else 300 if what.startswith("class ") else 35) and (name, what) not in LARGE
    ]


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
    A room imports rooms below it, pure modules import pure ones, and what is foreign is imported in one room only.
    """
    assert trespasses(PACKAGE) == []


def test_nothing_imports_in_a_circle():
    """
    Every module can be loaded first.
    """
    assert circles(PACKAGE) == []


def test_nothing_is_too_large():
    """
    A module is read in one sitting, and a function on one screen.
    """
    assert too_large(PACKAGE) == []


def test_what_may_be_large_still_is():
    """
    An exception that is no longer needed is removed.
    """
    found = {(name, what): lines for name, what, lines in sizes(PACKAGE)}

    assert {name for name in LARGE if found[name] <= (500 if name[1] == "module" else 300)} == set()


def test_only_the_volume_changes_the_volume():
    """
    Creating, renaming and deleting is written in `_volume` and nowhere else, but for bundles and the directories that
    the initializer fills, which lie outside of every store.
    """
    assert {room(name) if room(name) == "_volume" else name for name in writers(PACKAGE)} == {
        "_volume",
        "_archive.export",
        "kserve._destination",
        "kserve._exclusion",
        "kserve._placing",
    }


def test_no_mode_is_set_by_path():
    """
    Modes are set through descriptors of what was just created, and in two modules only: a path may lead elsewhere by
    the time it is followed.
    """
    setters = {"chmod", "lchmod", "fchmod", "chown", "lchown", "fchown"}

    found = {
        (name, node.attr)
        for name, tree in ((module_name(file), ast.parse(file.read_text())) for file in PACKAGE.rglob("*.py"))
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in setters
    }

    assert found == {("_volume.making", "fchmod"), ("_volume.tree", "fchmod")}


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts)


@pytest.mark.parametrize(
    ("module", "line", "trespass"),
    [
        ("_source.ref", "from kserve_pvc._volume.reading import Volume", "_source.ref imports _volume"),
        ("_source.ref", "from kserve_pvc import _volume", "_source.ref imports _volume"),
        ("_format.codec", "import kserve_pvc._source.ref", "_format.codec imports _source"),
        ("_show.events", "from kserve_pvc._settings import is_offline", "_show.events imports _settings"),
        ("_format.records", "def f():\n    import kserve_pvc.backends.s3", "_format.records imports backends"),
        ("_download.protocol", "import fsspec", "_download.protocol imports fsspec"),
        ("_download.protocol", "from kserve_pvc._volume import mount", "_download.protocol imports _volume"),
        ("_keys.procedures", "def f():\n    import time", "_keys.procedures imports time"),
        ("_volume.reading", "from kserve_pvc._keys.log import read_log", "_volume.reading imports _keys"),
        ("_volume.writing", "import portalocker", "_volume.writing imports portalocker"),
        ("_download.transfer", "from fsspec.asyn import sync", "_download.transfer imports fsspec"),
        ("_download.warm", "import kserve_pvc._doctor.doctor", "_download.warm imports _doctor"),
        ("backends.file", "from kserve_pvc._keys.log import read_log", "backends.file imports _keys"),
        ("backends.s3", "from tqdm.auto import tqdm", "backends.s3 imports tqdm"),
        ("locks.lease", "from kserve_pvc._volume.reading import Volume", "locks.lease imports _volume"),
        ("_store", "import s3fs", "_store imports s3fs"),
        ("_store", "from kserve_pvc._cli import main", "_store imports _cli"),
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


def test_a_circle_is_noticed(tmp_path):
    """
    Two modules that load each other are named; an import in a function closes no circle.
    """
    for name, line in {
        "_a": "from kserve_pvc._b import x",
        "_b": "from kserve_pvc import _a",
        "_c": "def f():\n    from kserve_pvc import _c, _a",
    }.items():
        (tmp_path / f"{name}.py").write_text(f"{line}\n")

    assert circles(tmp_path) == [("_a", "_b")]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("x = 1\n" * 501, "_model: module has 501 lines"),
        ("class A:\n" + "    x = 1\n" * 300, "_model: class A has 301 lines"),
        ('def f():\n    """\n    Do.\n    """\n' + "    x = 1\n" * 35, "_model: f has 36 lines"),
    ],
)
def test_what_is_too_large_is_noticed(tmp_path, text, found):
    """
    A module, a class and a function over the limit are named.
    """
    (tmp_path / "_model.py").write_text(text)

    assert too_large(tmp_path) == [found]


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
# What a hit in the store loads of this package: nothing that writes, downloads, removes, checks, locks or shows.
HIT = {
    "_access",
    "_defaults",
    "_model",
    "_opening",
    "_process",
    "_store",
    "errors",
    "_format",
    "_keys",
    "_source",
    "_volume",
} | {
    *(
        "_format.codec",
        "_format.layout",
        "_format.log_entry",
        "_keys.log",
        "_source.arguments",
        "_source.ref",
        "_volume.beneath",
        "_volume.calls",
        "_volume.reading",
        "_volume.root",
    ),
}
# A store that may write has the tool that writes, and its hit loads nothing more.
WRITING_HIT = HIT | {"_volume.making", "_volume.writing"}


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
    ("hit", "expected"),
    [
        ("ModelStore(root).get(uri)", HIT),
        ("ModelStore(root).ensure(uri)", HIT),
        ("ModelStore(root, mode='rw').get(uri)", WRITING_HIT),
        ("ModelStore(root, mode='rw').ensure(uri)", WRITING_HIT),
        ("assert uri in ModelStore(root)", HIT),
        ("assert len(ModelStore(root).list()) == 1", HIT),
    ],
)
def test_a_hit_stays_light(warm, hit, expected):
    """
    A model that is there is found without an SDK, the network, a thread pool, a progress bar, or our own download side.
    """
    root, uri = warm

    loaded = loaded_by(f"from kserve_pvc import ModelStore\nroot, uri = {root!r}, {uri!r}\n{hit}")

    assert loaded & LAZY == set()
    assert ours(loaded) == expected


@pytest.mark.parametrize(("verb", "expected"), [("path", HIT), ("ensure", WRITING_HIT)])
def test_a_hit_from_the_shell_stays_light(warm, verb, expected):
    """
    The command line adds its own modules and the settings to what a hit loads, and nothing heavy.
    """
    root, uri = warm

    loaded = loaded_by(
        f"from kserve_pvc._cli.main import main\nassert main([{verb!r}, {uri!r}, '--store', {root!r}]) == 0"
    )

    assert loaded & LAZY == set()
    assert ours(loaded) == expected | {"_cli", "_settings"} | {
        f"_cli.{name}" for name in ("catalogue", "main", "opening", "output", "parser", "streams", "verbs", "words")
    }


def test_the_decision_about_a_pod_loads_no_server():
    """
    What is decided about manifests is pure: it loads neither YAML nor anything of a network, nor the store.
    """
    loaded = loaded_by("from kserve_pvc.kserve import mutate_pod, share_volume\nimport kserve_pvc.kserve._admission")

    assert loaded & LAZY == set()
    assert ours(loaded) - {"kserve"} == {
        *("_format", "_format.file_names", "_settings", "errors"),
        *(f"kserve.{name}" for name in ("_admission", "_manifests", "_manifest_tools", "_pods", "_policy")),
        *("kserve._llm_services", "kserve._services"),
    }


@pytest.mark.parametrize("hit", ["assert uri in store", "store.get(uri)", "store.ensure(uri)"])
def test_a_hit_reads_one_directory_and_one_record(warm, hit):
    """
    A store that is open lists the log, opens its newest record and looks what the model's directory is; it opens and
    lists nothing else. With `ctypes`, which a process loads once it is worth it, each of them is one call. The first
    hit of a store that may write also looks at KServe's link to the model.
    """
    root, uri = warm
    program = f"""
import ctypes, json, sys
from kserve_pvc import ModelStore
store, uri, seen = ModelStore({root!r}, mode="rw"), {uri!r}, []
def note(event, found):
    if event == "open" or event.startswith("os."):
        seen.append((event, str(found[0])))
{hit}
sys.addaudithook(note)
{hit}
print(json.dumps(seen))
"""

    seen = json.loads(run(program))

    log, model = (next(Path(root).glob(place)) for place in (".kserve-pvc/keys/*/log", "models/*/0*"))
    places = [str(place.relative_to(root)) for place in (log, log / "000000000001.commit", model)]
    assert [found for event, found in seen if event == "open"] == places
    assert [event for event, _ in seen if event != "open"] == ["os.listdir"]


def test_what_is_lazy_would_be_noticed():
    """
    The checks above see a module that an import pulls in behind another one.
    """
    assert {"asyncio", "ssl"} <= loaded_by("import asyncio") & LAZY
    loaded = ours(loaded_by("import kserve_pvc._download.download"))
    assert {"_download.download", "_download.protocol", "_keys.claims"} <= loaded - HIT


def test_every_public_name_is_there():
    """
    Each name in `__all__` is found and listed, in order, though it is loaded only when it is used.
    """
    program = """
import json, kserve_pvc
before = dir(kserve_pvc)
from kserve_pvc import *
print(json.dumps([before, dir(), dir(kserve_pvc)]))
"""

    before, star, after = json.loads(run(program))

    assert kserve_pvc.__all__ == sorted(kserve_pvc.__all__)
    assert set(kserve_pvc.__all__) <= set(before) & set(star) & set(after)
    # Aliases of types, such as `Mode`, have no name of their own.
    names = {name: getattr(getattr(kserve_pvc, name), "__name__", name) for name in kserve_pvc.__all__}
    assert {name for name, found in names.items() if found not in (name, "Literal", "Callable")} == set()


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
