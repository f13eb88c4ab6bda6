"""
KServe's own tests of its storage library, as far as they are about what is public, run against ours under KServe's
name.

They come with the sources that `nox -s differential` fetches from the package index; nothing of them is kept here.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

SOURCES = "KSERVE_PVC_TEST_STOCK_SOURCES"
DATA = Path(__file__).with_name("data") / "kserve_tests"
JUDGED = tomllib.loads((DATA / "judged.toml").read_text(encoding="utf-8"))
pytestmark = pytest.mark.skipif(
    SOURCES not in os.environ, reason=f"`{SOURCES}` names no sources of kserve-storage, see `nox -s differential`"
)


def theirs() -> dict[str, str]:
    """
    Every test by file and name, with what pytest calls it.
    """
    found = {}
    for path in sorted((Path(os.environ[SOURCES]) / "test").glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            inside = (
                [(f"{node.name}::", child) for child in node.body] if isinstance(node, ast.ClassDef) else [("", node)]
            )
            for prefix, child in inside:
                if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and child.name.startswith("test_"):
                    found[f"{path.stem}::{child.name}"] = f"{path.name}::{prefix}{child.name}"
    return found


def test_every_test_is_judged_once():
    """
    Each test of theirs applies or has one reason why it does not, and nothing is judged that is not there.
    """
    patterns = [*JUDGED["applies"], *(pattern for group in JUDGED["not_applicable"] for pattern in group["tests"])]
    judged = {name: [pattern for pattern in patterns if fnmatchcase(name, pattern)] for name in theirs()}

    assert {name: found for name, found in judged.items() if len(found) != 1} == {}
    assert set(patterns) == {found[0] for found in judged.values()}
    assert len(judged) > 150


def test_what_applies_passes(tmp_path):
    """
    Under KServe's name for the package, all that applies passes, each test by name.
    """
    known = theirs()
    wanted = [known[name] for name in JUDGED["applies"]]
    environ = {**os.environ, "PYTHONPATH": str(DATA / "shim"), "PYTHONDONTWRITEBYTECODE": "1"}

    command = [
        sys.executable,
        "-m",
        "pytest",
        "-o",
        "addopts=",
        "-o",
        "filterwarnings=",
        "-p",
        "no:cacheprovider",
        "-rA",
        *wanted,
    ]
    done = subprocess.run(
        command, cwd=Path(os.environ[SOURCES]) / "test", env=environ, capture_output=True, text=True, timeout=120
    )

    passed = [line.removeprefix("PASSED ") for line in done.stdout.splitlines() if line.startswith("PASSED ")]
    assert sorted(passed) == sorted(wanted), done.stdout[-3000:]
