"""
The pages of `docs/reference` list what the package has.
"""

import ast
import re
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

import kserve_pvc
from kserve_pvc._cli.parser import VERBS

REFERENCE = Path(__file__).parent.parent / "docs" / "reference"
PACKAGE = Path(kserve_pvc.__file__).parent


def documented() -> list[str]:
    """
    The full name of everything that a page of the reference documents, as often as it does.
    """
    names = []
    for page in sorted(REFERENCE.rglob("*.md")):
        module = ""
        for kind, name in re.findall(r"^\.\. (\w+):: ([\w.]+)", page.read_text(encoding="utf-8"), re.MULTILINE):
            if kind == "currentmodule":
                module = name
            elif kind.startswith("auto"):
                names.append(f"{module}.{name}")
    return names


def shown_lines() -> list[str]:
    """
    The lines of progress.md, with capitals and numbers where the code puts values.
    """
    page = (REFERENCE / "progress.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| [^|]+ \| (`.*) \|$", page, re.MULTILINE)
    return [line for cell in cells for line in re.findall(r"`([^`]+)`", cell) if not line.startswith("-")]


@cache
def fixed_parts() -> str:
    """
    Every constant part of a string of the package, one on each line.
    """
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")]
    constants = (node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return "\n".join(text for text in constants if isinstance(text, str))


@pytest.mark.parametrize("module", ["kserve_pvc", "kserve_pvc.kserve", "kserve_pvc.testing"])
def test_every_public_name_is_on_one_page(module):
    """
    Each public name is documented once, and no page documents a name that is not public.
    """
    public = [f"{module}.{name}" for name in import_module(module).__all__]
    found = [name for name in documented() if name.rpartition(".")[0] == module]

    assert sorted(found) == sorted(public)


def test_every_verb_has_a_row():
    """
    The table of verbs on the page of the command line has the verbs that the parser has.
    """
    page = (REFERENCE / "cli.md").read_text(encoding="utf-8")
    table = page.split("## Verbs", 1)[1].split("\n\n", 2)[1]

    assert sorted(re.findall(r"^\| `(\w+)", table, re.MULTILINE)) == sorted(VERBS)


@pytest.mark.parametrize("line", shown_lines())
def test_lines_of_progress_are_those_of_the_code(line):
    """
    What the page says that a call writes is in the code, apart from values.
    """
    parts = [part.strip(" :") for part in re.split(r"[A-Z]{2,}|[\d.]+ [KMGT]iB(?:/s)?|[\d.]+", line)]

    assert [part for part in parts if len(part) > 2 and part not in fixed_parts()] == []
