"""
`kserve-pvc`: the store from a shell, an init container or a Job.

The last line of stdout is for scripts (a directory, or one JSON document); everything for people goes to stderr.
Exit codes: 0 done, 1 failed or verification found differences, 2 usage, 3 not in the store, 4 read-only, 5 waited too
long, 6 not enough space, 7 source missing, denied or unreachable, 8 refused by policy.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from itertools import takewhile

from kserve_pvc._cli.output import fail, log_to_stderr, stop
from kserve_pvc._cli.parser import VERBS, make_parser
from kserve_pvc._cli.streams import OutputClosedError, begin, discard_unwritten, flush
from kserve_pvc._cli.verbs import run_initializer, selection
from kserve_pvc._cli.words import ALIASES
from kserve_pvc._settings import read_settings
from kserve_pvc._source.ref import parse_ref
from kserve_pvc._store import ModelStore
from kserve_pvc.errors import VolumeError

# A verb that writes is itself the request to write, unless the environment or the pod's annotation forbids it.
_WRITING = ("ensure", "rm", "import", "warm")
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
        store = () if arguments.verb in _STORELESS else (_open(arguments),)
        code = int(arguments.run(*store, arguments))
        flush()
        return code
    except OutputClosedError:
        return 1
    except KeyboardInterrupt:
        return stop("KeyboardInterrupt", "interrupted; what was fetched is kept for the next call", 130)
    except SystemExit as leaving:
        if leaving.code == _TERMINATED:
            return stop("SystemExit", "terminated; what was fetched is kept for the next call", _TERMINATED)
        # A plug-in that ends the process, which is not for it to do.
        return fail(RuntimeError(f"a plug-in ended the process: {leaving.code}"), verbose=arguments.verbose)
    except BaseException as error:  # Of other libraries too, such as a `CancelledError`.
        return fail(error, verbose=arguments.verbose)


def _open(arguments: argparse.Namespace) -> ModelStore:
    settings = read_settings()
    if getattr(arguments, "uri", None) is not None:
        parse_ref(arguments.uri, **selection(arguments))  # An invalid URI is refused before a store is created.
    return ModelStore(
        arguments.store or settings.store,
        mode=(settings.mode or "rw") if _writes(arguments, is_offline=bool(settings.offline)) else "r",
        locker=settings.locker,
        lease_seconds=settings.lease_seconds,
        offline=settings.offline,
    )


def _writes(arguments: argparse.Namespace, *, is_offline: bool) -> bool:
    """
    Tell whether a verb may write. Opening read-write creates the store, so what will be refused must not get that far.
    """
    if arguments.verb in ("ensure", "warm") and (is_offline or getattr(arguments, "local_files_only", False)):
        return False
    if arguments.verb == "warm" and not (arguments.uris or arguments.file):
        return False
    if arguments.verb == "alias":
        return arguments.uri is not None or arguments.drop is not None
    return arguments.verb in _WRITING or getattr(arguments, "break_claim", False)
