"""
`kserve-pvc`: the store from a shell, an init container or a Job.

The last line of stdout is for scripts (a directory, or one JSON document); everything for people goes to stderr.
Exit codes: 0 done, 1 failed or verification found differences, 2 usage, 3 not in the store or no store at all, 4
read-only, 5 waited too long, 6 not enough space, 7 source missing, denied or unreachable, 8 refused by
policy.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from itertools import takewhile

from kserve_pvc._cli.opening import open_store
from kserve_pvc._cli.output import fail, log_to_stderr, stop
from kserve_pvc._cli.parser import VERBS, make_parser
from kserve_pvc._cli.streams import OutputClosedError, begin, discard_unwritten, flush
from kserve_pvc._cli.verbs import run_initializer
from kserve_pvc._cli.words import ALIASES
from kserve_pvc.errors import VolumeError

_TERMINATED = 128 + signal.SIGTERM
_STORELESS = ("completion", "doctor", "initialize", "kserve", "webhook")


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run one command and return its exit code.
    """
    argv = sys.argv[1:] if argv is None else argv
    begin(argv)
    try:
        if argv and argv[0] == "initialize" and not {"-h", "--help"} & set(argv):
            return _initialize(argv[1:])
        arguments = _parse(argv)
        if arguments is None:
            return 0
        # A deleted pod gets SIGTERM first: unwinding releases the claim, so that no process waits out its lease.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED))
        with log_to_stderr(verbose=arguments.verbose):
            return _run(arguments)
    except OutputClosedError:  # While a help text was printed.
        return 1
    except VolumeError as error:
        return fail(error, verbose=False)
    finally:
        discard_unwritten()


def _initialize(words: Sequence[str]) -> int:
    """Run the initializer without the parser. Options of this command are taken out, the others are its own."""
    ours = [word for word in takewhile("--".__ne__, words) if word in ("--json", "-v", "--verbose")]
    rest = list(words)
    for word in ours:
        rest.remove(word)
    return run_initializer(rest, verbose=bool({"-v", "--verbose"} & set(ours)))


def _parse(argv: Sequence[str]) -> argparse.Namespace | None:
    """Return the arguments, or None if a help text or the version was requested and printed."""
    try:
        first = ALIASES.get(argv[0], argv[0]) if argv else ""
        return make_parser(first if first in VERBS else None).parse_args(argv)
    except SystemExit as leaving:
        if leaving.code:
            raise
    flush()
    return None


def _run(arguments: argparse.Namespace) -> int:
    """Run a verb. However it ends, one line on stderr says so, and one document with `--json`."""
    try:
        # A verb that is not about a store gets none, since opening one may create it.
        store = () if arguments.verb in _STORELESS else (open_store(arguments),)
        code = int(arguments.run(*store, arguments))
        flush()
        return code
    except OutputClosedError:
        return 1
    except KeyboardInterrupt as interrupt:
        return stop(interrupt, "interrupted", 130)
    except SystemExit as leaving:
        if leaving.code == _TERMINATED:
            return stop(leaving, "terminated", _TERMINATED)
        # A plug-in that ends the process, which is not for it to do.
        return fail(RuntimeError(f"a plug-in ended the process: {leaving.code}"), verbose=arguments.verbose)
    except BaseException as error:  # Of other libraries too, such as a `CancelledError`.
        return fail(error, verbose=arguments.verbose)
