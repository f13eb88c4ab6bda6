"""
What the project says about itself: sessions, dependencies and metadata agree with the code.
"""

import ast
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml
from fsspec.registry import known_implementations

import kserve_pvc

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PACKAGE = Path(kserve_pvc.__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# Every distribution that the package or an extra installs: what is imported of it, and the tests that run that code.
DEPENDENCIES = {
    "adlfs": ("adlfs", "test_cloud_classes.py"),
    "attrs": ("attrs", "test_record.py"),
    "backports.zstd": ("backports.zstd", "test_unpack.py"),
    "fsspec": ("fsspec", "test_backend_fsspec.py"),
    "gcsfs": ("gcsfs", "test_cloud_classes.py"),
    "google-crc32c": ("google_crc32c", "test_checksums.py"),
    "kubernetes": ("kubernetes", "test_lockers.py"),
    "portalocker": ("portalocker", "test_locks.py"),
    "prometheus-client": ("prometheus_client", "test_kserve_webhook.py"),
    "pytest": ("pytest", "test_conformance.py"),
    "pyyaml": ("yaml", "test_kserve_patch.py"),
    "redis": ("redis", "test_lockers.py"),
    "s3fs": ("s3fs", "test_s3_access.py"),
    "shtab": ("shtab", "test_cli_completion.py"),
    "starlette": ("starlette", "test_kserve_webhook.py"),
    "tqdm": ("tqdm", "test_progress.py"),
    "uvicorn": ("uvicorn", "test_kserve_webhook.py"),
}


def default_sessions() -> list[str]:
    """
    The sessions that plain `nox` runs, as the noxfile lists them.
    """
    for node in ast.walk(ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "nox.options.sessions":
            return ast.literal_eval(node.value)
    raise LookupError("noxfile.py does not set `nox.options.sessions`")


def all_sessions() -> set[str]:
    """
    Every session of the noxfile, by the name that `nox -s` takes.
    """
    found = set()
    for node in ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8")).body:
        for mark in getattr(node, "decorator_list", []):
            if ast.unparse(mark) == "nox.session":
                found.add(node.name)
            elif isinstance(mark, ast.Call) and ast.unparse(mark.func) == "nox.session":
                found.add(
                    next((ast.literal_eval(word.value) for word in mark.keywords if word.arg == "name"), node.name)
                )
    return found


def session_tables() -> list[list[str]]:
    """
    The sessions that CONTRIBUTING.md lists: those of plain `nox`, and those that are run by hand.
    """
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return [
        re.findall(r"^\| `([\w-]+)` \|", table, re.MULTILINE) for table in page.split("| session | what it does |")[1:]
    ]


def test_contributors_find_every_session():
    """
    CONTRIBUTING.md lists the sessions of plain `nox` in their order, and all others once.
    """
    by_default, by_hand = session_tables()

    assert by_default == default_sessions()
    assert sorted(by_hand) == sorted(all_sessions() - set(by_default))


def declared() -> set[str]:
    """
    The distributions that pyproject.toml declares for users, the package itself left out.
    """
    lines = [*PROJECT["dependencies"], *(line for extra in PROJECT["optional-dependencies"].values() for line in extra)]
    return {re.match(r"[\w.-]+", line)[0].lower() for line in lines} - {PROJECT["name"]}


@cache
def imported() -> frozenset[str]:
    """
    The name of every module that the package imports, by a statement or by `import_module`.
    """
    return frozenset(imports())


def imports() -> Iterator[str]:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                yield node.module
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                yield from (word.value for word in ast.walk(node) if isinstance(word, ast.Constant))
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("get_filesystem_class"):
                # fsspec imports the package of a protocol when its class is requested.
                protocols = [word.value for word in node.args if isinstance(word, ast.Constant)]
                yield from (known_implementations[protocol]["class"] for protocol in protocols)


def test_every_dependency_has_tests_that_run_it():
    """
    Each declared dependency is in the table above, with tests that exist.
    """
    assert declared() == set(DEPENDENCIES)
    assert [file for _, file in DEPENDENCIES.values() if "def test_" not in (TESTS / file).read_text()] == []


@pytest.mark.parametrize("distribution", sorted(DEPENDENCIES))
def test_every_dependency_is_imported(distribution):
    """
    The package imports something of each declared dependency, so users install nothing in vain.
    """
    module = DEPENDENCIES[distribution][0]

    assert [name for name in imported() if name == module or name.startswith(f"{module}.")]


def test_versions_of_python_agree():
    """
    The classifiers list every version of Python from the oldest that is supported, without gaps.
    """
    listed = [name.rpartition(" :: ")[2] for name in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", name)]
    oldest = int(PROJECT["requires-python"].removeprefix(">=3."))

    assert listed == [f"3.{oldest + number}" for number in range(len(listed))]


def test_citation_is_of_this_version():
    """
    CITATION.cff has the name, version and license of the package.
    """
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))

    assert (citation["title"], citation["version"]) == (kserve_pvc.__name__, kserve_pvc.__version__)
    assert citation["license"] == PROJECT["license"]


def test_hosted_documentation_builds_from_files_that_exist():
    """
    .readthedocs.yaml names a configuration, requirements and extras that the project has.
    """
    config = yaml.safe_load((ROOT / ".readthedocs.yaml").read_text(encoding="utf-8"))
    requirements, package = config["python"]["install"]

    assert (ROOT / config["sphinx"]["configuration"]).is_file()
    assert (ROOT / requirements["requirements"]).is_file()
    assert set(package["extra_requirements"]) <= set(PROJECT["optional-dependencies"])


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_links_lead_to_files(page):
    """
    Every relative link of the pages outside `docs/` leads to a file or directory of the project.
    """
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text(encoding="utf-8"))

    assert [link for link in links if not (ROOT / link).exists()] == []
