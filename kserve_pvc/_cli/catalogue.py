"""
Catalogues of models to warm: one model a line, with its own options.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kserve_pvc.errors import InvalidFileError

if TYPE_CHECKING:
    from kserve_pvc._download.warm import Item


def warm_items(arguments: argparse.Namespace) -> Sequence[Item]:
    """
    Read what a catalogue or the command line names, once.
    """
    if not hasattr(arguments, "items"):
        catalogued = (item for name in arguments.file or () for item in read_catalogue(name))
        named = [_parse_item(text, f"item {number}") for number, text in enumerate(arguments.uris, 1)]
        arguments.items = [*named, *catalogued]
    items: Sequence[Item] = arguments.items
    return items


def read_catalogue(name: str) -> Iterator[str | dict[str, Any]]:
    """
    Read a catalogue: one model a line, as a URI, with options after it, or a JSON object. Blank lines and `#` comments
    are skipped.
    """
    try:
        lines = read_input(name).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InvalidFileError(name, "cannot be read", "it is not text in UTF-8") from error
    for number, line in enumerate(map(str.strip, lines), 1):
        if line and not line.startswith("#"):
            yield _parse_item(line, f"{name}, line {number}")


def _parse_item(text: str, place: str) -> str | dict[str, Any]:
    """Read one model: a URI, a URI with options after it, or a JSON object."""
    from kserve_pvc._download.warm import normalize_item

    if text.startswith("{"):
        try:
            item = json.loads(text)
        except (ValueError, RecursionError):  # Without the text, which may hold a secret.
            raise InvalidFileError(place, "invalid JSON", 'use `{"uri": "…"}` in one line') from None
        return normalize_item(item, place)
    uri, *options = re.split(r"\s+(?=--[a-z])", text.strip(), maxsplit=1)
    return {"uri": uri, **_parse_options(options[0], place)} if options else text


def _parse_options(text: str, place: str) -> dict[str, Any]:
    import shlex

    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--revision")
    parser.add_argument("--allow", action="append", dest="allow_patterns")
    parser.add_argument("--ignore", action="append", dest="ignore_patterns")
    for flag in ("--refresh", "--force-download"):
        parser.add_argument(flag, action="store_true")
    try:
        options, rest = parser.parse_known_args(shlex.split(text))
    except (argparse.ArgumentError, ValueError) as error:
        raise InvalidFileError(place, "invalid options", str(error)) from None
    if rest:
        supported = "`--revision`, `--allow`, `--ignore`, `--refresh`, `--force-download`"
        raise InvalidFileError(place, f"unknown option `{rest[0]}`", f"supported: {supported}")
    return {name: value for name, value in vars(options).items() if value}


def read_input(name: str) -> bytes:
    """
    Read a file, or standard input where its name is `-`.

    Raises:
        InvalidFileError: It cannot be read.
    """
    if name == "-" and sys.stdin is None:
        raise InvalidFileError(name, "cannot be read", "standard input is closed")
    try:
        return sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise InvalidFileError(name, "cannot be read", str(error.strerror)) from error
