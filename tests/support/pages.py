"""
The fenced blocks of a page in Markdown, in order, and the program that they make together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

# Written to standard output where a block begins, so that each block is compared with its own output.
MARK = "\x1e"

_FENCE = re.compile(r"^(?P<ticks>`{3,})(?:(?P<language>[\w-]+)|\{(?P<directive>[\w-]+)\}[ ]*(?P<argument>\S*))?[ ]*$")
_OPTION = re.compile(r"^:(?P<name>[\w-]+):[ ]*(?P<value>.*)$")
# What would be run and not seen, or seen and not run.
_HIDDEN = re.compile(
    r"\{test\w+\}|\{doctest\}|^:hide:|<!--(?:(?!-->)[\s\S])*```|^% |^ *>>> "
    r"|^ *\.\. (?:code-block|testcode|testsetup|doctest)::",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """
    One fenced block.

    Attributes:
        kind: What stands after the backticks: a language, or the name of a directive in braces.
        argument: What follows a directive.
        options: The options of a directive.
        text: What is inside, without the options.
        line: The number of the line with the opening backticks, from 1.
        is_adjacent: Whether nothing but blank lines is between this block and the one before it.
    """

    kind: str
    argument: str
    options: dict[str, str]
    text: str
    line: int
    is_adjacent: bool


def find_pages() -> list[Path]:
    """
    Find every page of the documentation that has Python blocks, and the README.
    """
    pages = [path for path in sorted(DOCS.rglob("*.md")) if "_build" not in path.parts]
    return [path for path in [ROOT / "README.md", *pages] if any(block.kind == "python" for block in read_blocks(path))]


def find_hidden(page: Path) -> list[str]:
    """
    Find what a page has that readers do not see, or that looks like an example and is not run.
    """
    return [match.group().strip() for match in _HIDDEN.finditer(page.read_text())]


def read_blocks(page: Path) -> list[Block]:
    """
    Read the fenced blocks of a page.
    """
    return list(_blocks(page.read_text().splitlines()))


def _blocks(lines: Sequence[str]) -> Iterator[Block]:
    number, is_adjacent = 0, False
    while number < len(lines):
        fence = _FENCE.match(lines[number])
        if fence is None:
            is_adjacent = is_adjacent and not lines[number].strip()
            number += 1
            continue
        end = next(n for n in range(number + 1, len(lines)) if lines[n].rstrip() == fence["ticks"])
        kind = f"{{{fence['directive']}}}" if fence["directive"] else fence["language"] or ""
        options, text = _split(lines[number + 1 : end]) if fence["directive"] else ({}, lines[number + 1 : end])
        yield Block(
            kind, fence["argument"] or "", options, "".join(f"{line}\n" for line in text), number + 1, is_adjacent
        )
        number, is_adjacent = end + 1, True


def _split(lines: Sequence[str]) -> tuple[dict[str, str], Sequence[str]]:
    options = {}
    for number, line in enumerate(lines):
        option = _OPTION.match(line)
        if option is None:
            return options, lines[number + bool(options and not line.strip()) :]
        options[option["name"]] = option["value"]
    return options, []


def write_program(page: Path) -> str:
    """
    Join the Python blocks of a page, each line where it is on the page, so that tracebacks name its lines.
    """
    lines = [""] * len(page.read_text().splitlines())
    for block in _python(page):
        lines[block.line - 1] = f"__import__('sys').stdout.write({MARK!r})"
        for offset, line in enumerate(block.text.splitlines()):
            lines[block.line + offset] = line
    return "\n".join(lines) + "\n"


def read_outputs(page: Path) -> list[tuple[int, str]]:
    """
    Read what each Python block should print, with the line of the block: the `output` block directly below, or nothing.
    """
    blocks = read_blocks(page)
    found = []
    for number, block in enumerate(blocks):
        below = blocks[number + 1] if number + 1 < len(blocks) else None
        if block.kind == "python":
            found.append((block.line, below.text if below and below.kind == "output" and below.is_adjacent else ""))
    return found


def find_stray_outputs(page: Path) -> list[int]:
    """
    Find the lines of `output` blocks that belong to no Python block, so that nothing would be compared with them.
    """
    blocks = read_blocks(page)
    before = [None, *blocks]
    return [
        block.line
        for previous, block in zip(before, blocks, strict=False)
        if block.kind == "output" and not (previous and previous.kind == "python" and block.is_adjacent)
    ]


def read_files(page: Path) -> dict[str, str]:
    """
    Read the files that readers save: Python blocks and included files with a caption, by their captions.
    """
    files = {}
    for block in read_blocks(page):
        if block.kind in ("{code-block}", "{literalinclude}") and "caption" in block.options:
            included = block.kind == "{literalinclude}"
            files[block.options["caption"]] = (page.parent / block.argument).read_text() if included else block.text
    return files


def _python(page: Path) -> list[Block]:
    return [block for block in read_blocks(page) if block.kind == "python"]
