"""
Shell completion: a script that shtab generates from the parser of the command line.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from kserve_pvc.errors import SettingsError

# Arguments that name a directory of this machine; the metavar `DIR` also stands for directories of a claim.
_DIRECTORIES = ("store", "directory")


def make_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """
    Generate a completion script.

    The script contains every verb and option of the parser, and needs neither Python nor shtab when it is used.

    Args:
        parser: The complete parser. Its actions are marked with what shtab should complete them to.
        shell: `bash`, `zsh` or `fish`.

    Raises:
        SettingsError: shtab is not installed.
    """
    try:
        import shtab
    except ImportError:
        raise SettingsError(
            "the completion", "without shtab", "install what it needs with `pip install 'kserve-pvc[completion]'`"
        ) from None
    for action in _actions(parser):
        if action.dest in _DIRECTORIES:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif action.metavar in ("FILE", "URI"):  # A path is a URI too.
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    return str(shtab.complete(parser, shell))


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Every argument of a parser and of its verbs."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                yield from _actions(verb)
