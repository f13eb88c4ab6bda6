"""
What a reader can paste: the visible Python of each page, run in a fresh interpreter and an empty directory.
"""

from __future__ import annotations

import doctest
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pages
import pytest
from hub import Hub
from origin import SeaweedS3

PAGES = {str(page.relative_to(pages.ROOT)): page for page in pages.find_pages()}
ALL_PAGES = {
    str(page.relative_to(pages.ROOT)): page for page in [pages.ROOT / "README.md", *sorted(pages.DOCS.rglob("*.md"))]
}
MODEL = {"config.json": b'{"layers": 2}', "model.safetensors": bytes(1000)}
SECONDS = 120


@pytest.fixture
def bucket(origin: SeaweedS3) -> dict[str, str]:
    """
    The variables with which a reader reaches an S3 server that has the models of the page.
    """
    for name in ["bucket", "ours", "theirs"]:
        origin.make_bucket(name)
        for path, data in MODEL.items():
            origin.put(name, f"llama-3-8b/{path}", data)
    return {
        "AWS_ENDPOINT_URL": origin.endpoint,
        "AWS_ACCESS_KEY_ID": origin.key,
        "AWS_SECRET_ACCESS_KEY": origin.secret,
    }


@pytest.fixture
def hub() -> Iterator[dict[str, str]]:
    """
    The variable with which a reader reaches a mirror of the hub that has the model of the page.
    """
    with Hub() as hub:
        for path, data in MODEL.items():
            hub.put("sentence-transformers/all-MiniLM-L6-v2", path, data)
        yield {"HF_ENDPOINT": hub.endpoint, "KSERVE_PVC_ALLOW_PRIVATE_ADDRESSES": "1"}


# Pages that say that they need a service, with the fixture that starts it.
SERVICES = {"docs/how-to/s3.md": "bucket", "docs/how-to/huggingface.md": "hub"}


@pytest.fixture
def run(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[str], list[str]]:
    """
    Run the Python of a page as a reader would, and return what each block printed.
    """

    def do(name: str) -> list[str]:
        service = request.getfixturevalue(SERVICES[name]) if name in SERVICES else {}
        home, program, temporary = tmp_path / "home", tmp_path / Path(name).with_suffix(".py").name, tmp_path / "tmp"
        home.mkdir()
        temporary.mkdir()
        program.write_text(pages.write_program(PAGES[name]))
        for file, text in pages.read_files(PAGES[name]).items():
            (home / file).write_text(text)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environ = {"HOME": str(home), "TMPDIR": str(temporary), "PATH": path, "LANG": "C.UTF-8", **service}
        done = subprocess.run(
            [sys.executable, "-I", program],
            cwd=home,
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split(pages.MARK)[1:]

    return do


@pytest.mark.parametrize("name", PAGES)
def test_what_a_page_shows_is_what_happens(name, run):
    """
    The visible Python of a page runs from top to bottom, and each block prints exactly what the page says.
    """
    check = doctest.OutputChecker().check_output

    printed = run(name)

    expected = pages.read_outputs(PAGES[name])
    assert [
        (line, want, got)
        for (line, want), got in zip(expected, printed, strict=True)
        if not check(want, got, doctest.ELLIPSIS)
    ] == []


@pytest.mark.parametrize("name", ALL_PAGES)
def test_nothing_on_a_page_is_hidden_or_left_out(name):
    """
    A page hides no code, each output belongs to a block that runs, and each file that readers save is valid Python.
    """
    page = ALL_PAGES[name]

    for file, text in pages.read_files(page).items():
        compile(text, file, "exec")

    assert (pages.find_hidden(page), pages.find_stray_outputs(page)) == ([], [])


def test_the_test_sees_wrong_output_and_hidden_code(tmp_path):
    """
    A page whose output is wrong, a block that is hidden, and an output that belongs to nothing are found.
    """
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nprint(1)\n```\n\n```output\n2\n```\n\nText.\n\n```output\n3\n```\n\n```{testsetup}\nx = 1\n```\n"
    )

    assert pages.read_outputs(page) == [(1, "2\n")]
    assert pages.find_stray_outputs(page) == [11]
    assert pages.find_hidden(page) == ["{testsetup}"]
    assert pages.write_program(page).splitlines()[1] == "print(1)"
