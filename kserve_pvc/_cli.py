"""
`kserve-pvc`: the store from a shell, an init container or a Job.

The last line of stdout is what a script wants (a directory, or one JSON document); everything a person reads goes to
stderr. Exit codes: 0 done, 1 failed or verification found differences, 2 usage, 3 not in the store, 4 read-only,
5 waited too long, 6 not enough space, 7 source missing, denied or unreachable, 8 refused by policy.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import attrs

from kserve_pvc import __version__
from kserve_pvc import _defaults as defaults
from kserve_pvc._settings import read_settings
from kserve_pvc._store import Model, ModelStore
from kserve_pvc.errors import StoreError, printable

# As in `_store`, what `path` does not need is imported by the verb that does.
if TYPE_CHECKING:
    from kserve_pvc._verify import Level, Verification

# Verbs that write are the wish to write, unless the environment or the pod's annotation forbids it.
_WRITING = ("ensure", "rm")


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run one command and return its exit code.
    """
    argv = sys.argv[1:] if argv is None else argv
    arguments = _parser(argv[0] if argv and argv[0] in _VERBS else None).parse_args(argv)
    # A pod that is deleted gets SIGTERM first: unwinding gives the claim back, so that nobody waits out its lease.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        code = int(arguments.run(_open(arguments), arguments))
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read our output has gone, as in `kserve-pvc ls | head -1`; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except StoreError as error:
        return _fail(error, as_json=arguments.json, verbose=arguments.verbose)
    except KeyboardInterrupt:
        _say("interrupted; what was fetched is kept for the next call")
        return 130


def _open(arguments: argparse.Namespace) -> ModelStore:
    settings = read_settings()
    writes = arguments.verb in _WRITING or getattr(arguments, "break_claim", False)
    mode = (settings.mode or "rw") if writes else "r"
    return ModelStore(arguments.store or settings.store, mode=mode, locker=settings.locker, lease_seconds=settings.lease_seconds)


def _fail(error: StoreError, *, as_json: bool, verbose: bool) -> int:
    if verbose:
        import traceback

        # Only our own errors: the text of a foreign one may hold a signed URL.
        sys.stderr.writelines(traceback.format_exception(type(error), error, error.__traceback__, chain=False))
    else:
        _say(str(error))
    if as_json:
        _print_json({"error": {"type": type(error).__name__, "message": str(error), **error.fields}})
    return error.exit_code


def _ensure(store: ModelStore, arguments: argparse.Namespace) -> int:
    model = store.ensure(
        arguments.uri,
        **_selection(arguments),
        refresh=arguments.refresh,
        force_download=arguments.force_download,
        local_files_only=arguments.local_files_only,
        timeout=arguments.timeout,
        max_workers=arguments.max_workers,
        progress=False if arguments.quiet else None,
    )
    document = {**_identity(model), "status": model.status, "size_bytes": model.size_bytes}
    _answer(arguments, {**document, "bytes_fetched": model.bytes_fetched, "seconds": round(model.seconds, 3)}, str(model.path))
    return 0


def _path(store: ModelStore, arguments: argparse.Namespace) -> int:
    model = store.get(arguments.uri, **_selection(arguments))
    _answer(arguments, _identity(model), str(model.path))
    return 0


def _ls(store: ModelStore, arguments: argparse.Namespace) -> int:
    from kserve_pvc._progress import amount, count

    models = store.list()
    if arguments.json:
        _print_json([_row(model) for model in models])
        return 0
    _print_table(
        ("URI", "SIZE", "FILES", "CREATED", "KEY"),
        [(_described(m), amount(m.size_bytes), str(m.files), m.created_at.strftime("%Y-%m-%d %H:%M"), m.key) for m in models],
    )
    if not arguments.quiet:
        _say(f"{count(len(models), 'model')}, {amount(sum(m.size_bytes for m in models))} at {store.root}")
    return 0


def _info(store: ModelStore, arguments: argparse.Namespace) -> int:
    from kserve_pvc._progress import amount, count

    model = store.get(arguments.uri, **_selection(arguments))
    record = model.record
    if arguments.json:
        _print_json({**attrs.asdict(record), "path": model.path})
        return 0
    facts = [
        ("uri", record.uri),
        ("revision", record.revision or "newest at the time"),
        ("key", record.key),
        ("version", record.version),
        ("path", str(model.path)),
        ("size", f"{amount(record.size_bytes)} in {count(len(record.files), 'file')}"),
        ("created", f"{record.created_at.isoformat(timespec='seconds')} by {record.writer}"),
    ]
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        print(f"{name.ljust(width)}  {printable(value)}")
    _print_table(("FILE", "SIZE", "SHA256"), [(str(f.path), amount(f.size_bytes), f.sha256 or "unknown") for f in record.files])
    return 0


def _plan(store: ModelStore, arguments: argparse.Namespace) -> int:
    from kserve_pvc._progress import amount, count

    plan = store.plan(arguments.uri, **_selection(arguments), refresh=arguments.refresh)
    if arguments.json:
        _print_json({**attrs.asdict(plan), "fits": plan.fits})
        return 0
    if plan.action == "nothing":
        print(f"nothing to do: {printable(plan.uri)} is present ({amount(plan.size_bytes)})")
        return 0
    seconds = "at an unknown rate" if plan.seconds is None else f"in about {plan.seconds:.0f} s"
    print(f"would fetch {amount(plan.bytes_to_fetch)} of {amount(plan.size_bytes)} in {count(plan.files, 'file')} {seconds}")
    print(f"would take over {amount(plan.bytes_reusable)} that is there already")
    print(f"{amount(plan.free_bytes)} are free: {'it fits' if plan.fits else 'IT DOES NOT FIT'}")
    return 0


def _verify(store: ModelStore, arguments: argparse.Namespace) -> int:
    level: Level = "full" if arguments.full else "size"
    if arguments.uri is None and not arguments.all:
        _say("verify: name a URI, or write `--all`")
        return 2
    reports = store.verify_all(level) if arguments.all else [store.verify(arguments.uri, level, **_selection(arguments))]
    seen = []
    for report in reports:
        seen.append(report)
        if not arguments.json and not arguments.quiet:
            _print_verification(report)
    ok = all(report.ok for report in seen)
    if arguments.json:
        _print_json({"ok": ok, "models": [_verification(report) for report in seen]})
    return 0 if ok else 1


def _rm(store: ModelStore, arguments: argparse.Namespace) -> int:
    store.remove(arguments.uri, **_selection(arguments), trash_seconds=0.0 if arguments.now else defaults.TRASH_SECONDS)
    _answer(arguments, {"uri": arguments.uri, "removed": True}, None)
    return 0


def _locks(store: ModelStore, arguments: argparse.Namespace) -> int:
    from kserve_pvc._progress import amount, count

    for uri in arguments.break_claim or ():
        store.break_lock(uri, **_selection(arguments))
    locks = store.locks()
    if arguments.json:
        _print_json([attrs.asdict(lock) for lock in locks])
        return 0
    rows = [
        (lock.uri, lock.key, lock.state, lock.holder, lock.since, f"{amount(lock.bytes_done)} of {amount(lock.bytes_total)}")
        for lock in locks
    ]
    _print_table(("URI", "KEY", "STATE", "HOLDER", "SINCE", "PROGRESS"), rows)
    if not arguments.quiet:
        _say(f"{count(len(locks), 'claim')} not given back")
    return 0


def _identity(model: Model) -> dict[str, Any]:
    return {"uri": model.uri, "key": model.key, "version": model.version, "path": model.path}


def _described(model: Model) -> str:
    """The URI, and what else was asked for if anything: two models may differ in nothing but that."""
    parts = [model.uri]
    parts += [f"at {model.revision}"] if model.revision else []
    parts += [f"only {' '.join(model.allow_patterns)}"] if model.allow_patterns else []
    parts += [f"without {' '.join(model.ignore_patterns)}"] if model.ignore_patterns else []
    return " ".join(parts)


def _row(model: Model) -> dict[str, Any]:
    # Nothing can be pinned before there is eviction to be protected from.
    return {**_identity(model), "size_bytes": model.size_bytes, "files": model.files, "created_at": model.created_at, "pinned": False}


def _verification(report: Verification) -> dict[str, Any]:
    problems = [attrs.asdict(problem) for problem in report.problems]
    return {"uri": report.uri, "ok": report.ok, "files": report.files, "bytes": report.bytes, "problems": problems}


def _print_verification(report: Verification) -> None:
    from kserve_pvc._progress import amount, count

    checked = f"{count(report.files, 'file')}, {amount(report.bytes)}, {'digests' if report.level == 'full' else 'sizes'}"
    print(f"{'ok ' if report.ok else 'BAD'}  {printable(report.uri)}  ({checked})")
    for problem in report.problems:
        print(f"     {problem.kind}: {printable(problem.path)}: {printable(problem.detail)}")


def _answer(arguments: argparse.Namespace, document: Mapping[str, Any], line: str | None) -> None:
    if arguments.json:
        _print_json(document)
    elif line is not None:
        print(line)


def _print_json(document: object) -> None:
    print(json.dumps(document, default=_jsonable))


def _jsonable(value: object) -> object:
    return value.isoformat() if isinstance(value, datetime) else str(value)


def _print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    shown = [tuple(printable(cell) for cell in row) for row in rows]
    widths = [max(len(row[i]) for row in [tuple(heads), *shown]) for i in range(len(heads))]
    for row in [tuple(heads), *shown]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _say(text: str) -> None:
    print(f"kserve-pvc: {text}", file=sys.stderr)


def _selection(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"revision": arguments.revision, "allow_patterns": arguments.allow, "ignore_patterns": arguments.ignore}


class _Parser(argparse.ArgumentParser):
    """
    Says what is wrong as this command says everything, and asks for the width of the terminal only to show help.
    """

    def __init__(self, **arguments: Any) -> None:
        # argparse makes a formatter for each argument it is given, and without a width would import shutil for it.
        super().__init__(**arguments, formatter_class=partial(argparse.HelpFormatter, width=80))

    def format_help(self) -> str:
        self.formatter_class = argparse.HelpFormatter
        return super().format_help()

    def format_usage(self) -> str:
        self.formatter_class = argparse.HelpFormatter
        return super().format_usage()

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        _say(f"{message}; see `{self.prog} --help`")
        sys.exit(2)


def _parser(only: str | None = None) -> argparse.ArgumentParser:
    """Parse every verb, or just one of them: argparse takes longer to learn them all than a hit takes."""
    parser = _Parser(prog="kserve-pvc", description="A shared volume as a correct model store.")
    parser.add_argument("--version", action="version", version=f"kserve-pvc {__version__}")
    _add_common(parser, defaults=True)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name in _VERBS if only is None else (only,):
        run, add_arguments, text = _VERBS[name]
        verb = verbs.add_parser(name, help=text, description=text)
        verb.set_defaults(run=run)
        _add_common(verb, defaults=False)
        add_arguments(verb)
    return parser


def _add_ensure(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--refresh", action="store_true", help="ask the source, and fetch a newer version beside the old one")
    parser.add_argument("--force-download", action="store_true", help="fetch even if it is present")
    parser.add_argument("--local-files-only", action="store_true", help="never use the network")
    parser.add_argument("--timeout", type=float, default=defaults.TIMEOUT, metavar="SECONDS", help="wait that long for another downloader")
    parser.add_argument("--max-workers", type=int, default=defaults.MAX_WORKERS, metavar="N", help="most streams at the same time")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--refresh", action="store_true", help="as if `ensure --refresh` were meant")


def _add_verify(parser: argparse.ArgumentParser) -> None:
    _add_model(parser, optional=True)
    parser.add_argument("--all", action="store_true", help="verify every model")
    parser.add_argument("--full", action="store_true", help="read every byte and compare digests, instead of sizes only")


def _add_rm(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--now", action="store_true", help="empty the trash at once, under readers that hold no lease")


def _add_locks(parser: argparse.ArgumentParser) -> None:
    _add_selection(parser)
    parser.add_argument(
        "--break", dest="break_claim", action="append", metavar="URI", help="let another process download; safe at any time"
    )


def _add_common(parser: argparse.ArgumentParser, *, defaults: bool) -> None:
    # Accepted before and after the verb; only the first place has defaults, or the second would undo the first.
    missing = None if defaults else argparse.SUPPRESS
    parser.add_argument("--store", metavar="DIR", default=missing, help="the store (else KSERVE_PVC_STORE, else /mnt/models)")
    for names, text in (
        (("--json",), "print one JSON document"),
        (("-q", "--quiet"), "no progress and no summaries"),
        (("-v", "--verbose"), "show where an error was raised"),
    ):
        parser.add_argument(*names, action="store_true", default=False if defaults else argparse.SUPPRESS, help=text)


def _add_model(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    parser.add_argument("uri", metavar="URI", nargs="?" if optional else None)
    _add_selection(parser)


def _add_selection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", help="which version of the source")
    parser.add_argument("--allow", action="append", metavar="PATTERN", help="only files that match; may be repeated")
    parser.add_argument("--ignore", action="append", metavar="PATTERN", help="no files that match; may be repeated")


# What each verb runs, which arguments it takes besides the common ones, and what it does.
_VERBS: Mapping[str, tuple[Callable[[ModelStore, argparse.Namespace], int], Callable[[argparse.ArgumentParser], None], str]] = {
    "ensure": (_ensure, _add_ensure, "print the directory of a model, downloading it if it is absent"),
    "path": (_path, _add_model, "print the directory of a model that is present"),
    "ls": (_ls, lambda _: None, "list the models"),
    "info": (_info, _add_model, "show what is known about a model"),
    "plan": (_plan, _add_plan, "show what `ensure` would do"),
    "verify": (_verify, _add_verify, "compare models with their records"),
    "rm": (_rm, _add_rm, "remove a model, or what is left of an unfinished download"),
    "locks": (_locks, _add_locks, "show who is downloading"),
}
