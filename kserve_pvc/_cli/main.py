"""
`kserve-pvc`: the store from a shell, an init container or a Job.

The last line of stdout is for scripts (a directory, or one JSON document); everything for people goes to stderr.
Exit codes: 0 done, 1 failed or verification found differences, 2 usage, 3 not in the store or no store at all, 4
read-only, 5 waited too long, 6 not enough space, 7 source missing, denied or unreachable, 8 refused by
policy.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from kserve_pvc._cli.opening import open_store
from kserve_pvc._cli.output import fail, log_to_stderr, say, say_kept
from kserve_pvc._cli.parser import VERBS, make_parser
from kserve_pvc._cli.verbs import run_initializer
from kserve_pvc.errors import StoreError

_TERMINATED = 143  # As a shell reports a process that SIGTERM ended.
_STORELESS = ("completion", "doctor", "initialize", "kserve", "webhook")


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run one command and return its exit code.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] == "initialize" and not {"-h", "--help"} & set(argv):
        return run_initializer(argv[1:])  # Arguments and exit codes are KServe's, not ours.
    arguments = make_parser(argv[0] if argv and argv[0] in VERBS else None).parse_args(argv)
    if arguments.verbose:
        log_to_stderr()
    # A pod that is deleted gets SIGTERM first: unwinding releases the claim, so that no process waits out its lease.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED))
    try:
        # A verb that is not about a store gets none, since opening one may create it.
        store = () if arguments.verb in _STORELESS else (open_store(arguments),)
        code = int(arguments.run(*store, arguments))
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader of our output has exited, as in `kserve-pvc ls | head -1`; Python would report it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except StoreError as error:
        return fail(error, as_json=arguments.json, verbose=arguments.verbose)
    except KeyboardInterrupt as interrupt:
        say("interrupted")
        say_kept(interrupt)
        return 130
    except SystemExit as end:
        if end.code == _TERMINATED:
            say("terminated")
            say_kept(end)
        raise
