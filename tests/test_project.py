"""
What the project says about itself: sessions, dependencies and metadata agree with the code.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


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
                found.add(next((ast.literal_eval(word.value) for word in mark.keywords if word.arg == "name"), node.name))
    return found


def session_tables() -> list[list[str]]:
    """
    The sessions that CONTRIBUTING.md lists: those of plain `nox`, and those that are run by hand.
    """
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return [re.findall(r"^\| `([\w-]+)` \|", table, re.M) for table in page.split("| session | what it does |")[1:]]


def test_contributors_find_every_session():
    """
    CONTRIBUTING.md lists the sessions of plain `nox` in their order, and all others once.
    """
    by_default, by_hand = session_tables()

    assert by_default == default_sessions()
    assert sorted(by_hand) == sorted(all_sessions() - set(by_default))
