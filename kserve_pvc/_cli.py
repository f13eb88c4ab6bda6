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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import attrs

from kserve_pvc import __version__
from kserve_pvc import _defaults as defaults
from kserve_pvc._settings import read_settings
from kserve_pvc._source.ref import parse_ref, redact
from kserve_pvc._store import Model, ModelStore, _this_process
from kserve_pvc.errors import SettingsError, StoreError, printable

# As in `_store`, what `path` does not need is imported by the verb that does.
if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

    from kserve_pvc._download.warm import Item, Warmed
    from kserve_pvc._volume.verify import Level, Verification

# Verbs that write are the wish to write, unless the environment or the pod's annotation forbids it.
_WRITING = ("ensure", "rm", "import", "warm")
_STORELESS = ("doctor", "initialize", "kserve", "webhook")


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run one command and return its exit code.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] == "initialize" and not {"-h", "--help"} & set(argv):
        return _run_initializer(argv[1:])  # With arguments and exit codes of KServe's, which know nothing of ours.
    arguments = _parser(argv[0] if argv and argv[0] in _VERBS else None).parse_args(argv)
    # A pod that is deleted gets SIGTERM first: unwinding gives the claim back, so that nobody waits out its lease.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        # A verb that is not about a store gets none, as opening one may make it.
        store = () if arguments.verb in _STORELESS else (_open(arguments),)
        code = int(arguments.run(*store, arguments))
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
    if getattr(arguments, "uri", None) is not None:
        parse_ref(arguments.uri, **_selection(arguments))  # What means nothing is refused before the store is made.
    return ModelStore(
        arguments.store or settings.store,
        mode=(settings.mode or "rw") if _writes(arguments, is_offline=bool(settings.offline)) else "r",
        locker=settings.locker,
        lease_seconds=settings.lease_seconds,
        offline=settings.offline,
    )


def _writes(arguments: argparse.Namespace, *, is_offline: bool) -> bool:
    """Whether a verb may write. Opening read-write makes the store, and what is bound to be refused leaves nothing on the volume."""
    if arguments.verb in ("ensure", "warm") and (is_offline or getattr(arguments, "local_files_only", False)):
        return False
    if arguments.verb == "warm" and not (arguments.uris or arguments.file):
        return False
    if arguments.verb == "alias":
        return arguments.uri is not None or arguments.drop is not None
    return arguments.verb in _WRITING or getattr(arguments, "break_claim", False)


def _fail(error: StoreError, *, as_json: bool, verbose: bool) -> int:
    _complain(error, "", verbose=verbose)
    if as_json:
        _print_json({"error": _failure(error)})
    return error.exit_code


def _complain(error: Exception, about: str, *, verbose: bool) -> None:
    if verbose and isinstance(error, StoreError):
        import traceback

        # Only our own errors: the text of a foreign one may hold a signed URL.
        sys.stderr.writelines(traceback.format_exception(type(error), error, error.__traceback__, chain=False))
    else:
        _say(f"{about}{_reason(error)}")


def _failure(error: Exception) -> dict[str, Any]:
    return {
        "type": type(error).__name__,
        "message": _reason(error),
        **(error.fields if isinstance(error, StoreError) else {}),
    }


def _reason(error: Exception) -> str:
    # The text of a foreign error may hold a signed URL.
    return str(error) if isinstance(error, StoreError) else f"{type(error).__name__}: {redact(str(error))}"


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
    _answer(
        arguments,
        {**document, "bytes_fetched": model.bytes_fetched, "seconds": round(model.seconds, 3)},
        str(model.path),
    )
    return 0


def _warm(store: ModelStore, arguments: argparse.Namespace) -> int:
    items = [*arguments.uris, *(item for name in arguments.file or () for item in _read_catalogue(name))]
    if not items and not arguments.file:
        _say("warm: name URIs, or a file of them with `-f`")
        return 2
    if arguments.workers < 1:
        raise SettingsError("--workers", str(arguments.workers), "write 1 or more")
    done = sorted(_warm_all(store, items, arguments), key=lambda warmed: warmed.index)
    failures = [warmed.error for warmed in done if warmed.error is not None]
    if arguments.json:
        _print_json([_warmed(warmed) for warmed in done])
    elif not arguments.quiet:
        from kserve_pvc._show.units import count

        _say(f"{count(len(done), 'model')}, {len(failures) or 'none'} failed")
    return _exit_code(failures[0]) if failures else 0


def _warm_all(store: ModelStore, items: Iterable[Item], arguments: argparse.Namespace) -> list[Warmed]:
    """Warm all, telling of each as it is done, and leave nothing behind that runs."""
    done = []
    with _threads(arguments.workers) as executor:
        results = store.warm(
            items,
            executor,
            refresh=arguments.refresh,
            timeout=arguments.timeout,
            max_workers=arguments.max_workers,
            progress=False if arguments.quiet else None,
        )
        try:
            for warmed in results:
                done.append(warmed)
                _tell_warmed(warmed, arguments)
        except BaseException as error:
            # Wherever this thread was when it was interrupted: the others stop, and give their claims back.
            results.throw(error)
    return done


def _threads(workers: int) -> AbstractContextManager[ThreadPoolExecutor | None]:
    if workers == 1:
        return nullcontext()
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(workers, thread_name_prefix="warm")


def _read_catalogue(name: str) -> Iterator[str | dict[str, Any]]:
    """One model a line: its URI, or an object as `warm` takes it. Neither blank lines nor lines that begin with `#` count."""
    from kserve_pvc._download.warm import wanted

    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        lines = data.decode("utf-8-sig").splitlines()
    except OSError as error:
        raise SettingsError("--file", name, f"it cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SettingsError("--file", name, "it must be text in UTF-8") from error
    for number, line in enumerate(map(str.strip, lines), 1):
        if line.startswith("{"):
            place = f"{name}, line {number}"
            try:
                item = json.loads(line)
            except ValueError:  # Without the line, which may hold a secret.
                raise SettingsError(place, "no JSON object", 'write `{"uri": "…"}` in one line') from None
            yield wanted(item, place)
        elif line and not line.startswith("#"):
            yield line


def _tell_warmed(warmed: Warmed, arguments: argparse.Namespace) -> None:
    if warmed.error is not None:
        _complain(warmed.error, f"{printable(warmed.uri)}: ", verbose=arguments.verbose)
    elif warmed.model is not None and not arguments.json and not arguments.quiet:
        print(f"{warmed.model.status:10}  {printable(_described(warmed.model))}  {warmed.model.path}", flush=True)


def _warmed(warmed: Warmed) -> dict[str, Any]:
    model = warmed.model
    return {
        "uri": warmed.uri,
        "ok": warmed.ok,
        "key": warmed.ref.key if warmed.ref else None,
        "path": model.path if model else None,
        "status": model.status if model else None,
        "bytes_fetched": model.bytes_fetched if model else 0,
        "seconds": round(warmed.seconds, 3),
        "error": None if warmed.error is None else _failure(warmed.error),
    }


def _path(store: ModelStore, arguments: argparse.Namespace) -> int:
    model = store.get(arguments.uri, **_selection(arguments))
    _answer(arguments, _identity(model), str(model.path))
    return 0


def _ls(store: ModelStore, arguments: argparse.Namespace) -> int:
    from kserve_pvc._show.units import amount, count

    models = store.list()
    if arguments.json:
        _print_json([_row(model) for model in models])
        return 0
    _print_table(
        ("URI", "SIZE", "FILES", "CREATED", "KEY"),
        [
            (_described(m), amount(m.size_bytes), str(m.files), m.created_at.strftime("%Y-%m-%d %H:%M"), m.key)
            for m in models
        ],
    )
    if not arguments.quiet:
        _say(f"{count(len(models), 'model')}, {amount(sum(m.size_bytes for m in models))} at {store.root}")
    return 0


def _info(store: ModelStore, arguments: argparse.Namespace) -> int:
    from kserve_pvc._show.units import amount, count

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
    _print_table(
        ("FILE", "SIZE", "SHA256"), [(str(f.path), amount(f.size_bytes), f.sha256 or "unknown") for f in record.files]
    )
    return 0


def _plan(store: ModelStore, arguments: argparse.Namespace) -> int:
    from kserve_pvc._show.units import amount, count

    plan = store.plan(arguments.uri, **_selection(arguments), refresh=arguments.refresh)
    if arguments.json:
        _print_json({**attrs.asdict(plan), "fits": plan.fits})
        return 0
    if plan.action == "nothing":
        print(f"nothing to do: {printable(plan.uri)} is present ({amount(plan.size_bytes)})")
        return 0
    seconds = "at an unknown rate" if plan.seconds is None else f"in about {plan.seconds:.0f} s"
    print(
        f"would fetch {amount(plan.bytes_to_fetch)} of {amount(plan.size_bytes)} in {count(plan.files, 'file')} {seconds}"
    )
    print(f"would take over {amount(plan.bytes_reusable)} that is there already")
    print(f"{amount(plan.free_bytes)} are free: {'it fits' if plan.fits else 'IT DOES NOT FIT'}")
    return 0


def _verify(store: ModelStore, arguments: argparse.Namespace) -> int:
    level: Level = "full" if arguments.full else "size"
    if arguments.uri is None and not arguments.all:
        _say("verify: name a URI, or write `--all`")
        return 2
    reports = (
        store.verify_all(level) if arguments.all else [store.verify(arguments.uri, level, **_selection(arguments))]
    )
    seen = []
    for report in reports:
        seen.append(report)
        if not arguments.json and not arguments.quiet:
            _print_verification(report)
    ok = all(report.ok for report in seen)
    if arguments.json:
        _print_json({"ok": ok, "models": [_verification(report) for report in seen]})
    return 0 if ok else 1


def _alias(store: ModelStore, arguments: argparse.Namespace) -> int:
    if arguments.drop is not None:
        store.drop_alias(arguments.drop)
    elif arguments.uri is not None:
        store.alias(arguments.name, arguments.uri, **_selection(arguments))
    elif arguments.name is not None:
        raise SettingsError("URI", "", f"say which model `{arguments.name}` is to be the name of")
    aliases = store.aliases()
    if arguments.json:
        _print_json(dict(aliases))
    else:
        _print_table(("NAME", "KEY"), list(aliases.items()))
    return 0


def _rm(store: ModelStore, arguments: argparse.Namespace) -> int:
    store.remove(arguments.uri, **_selection(arguments), trash_seconds=0.0 if arguments.now else defaults.TRASH_SECONDS)
    _answer(arguments, {"uri": arguments.uri, "removed": True}, None)
    return 0


def _export(store: ModelStore, arguments: argparse.Namespace) -> int:
    from kserve_pvc._show.units import amount, count

    to_stdout = arguments.file == "-"
    if to_stdout and (arguments.json or sys.stdout.isatty()):
        _say(
            "export: standard output is the bundle, so it can be neither a terminal nor `--json`; redirect it, or name a file"
        )
        return 2
    file = sys.stdout.buffer if to_stdout else arguments.file
    exported = store.export(arguments.uri, file, **_selection(arguments), progress=False if arguments.quiet else None)
    if arguments.json:
        _print_json(attrs.asdict(exported))
    elif not arguments.quiet:
        size = f"{count(exported.files, 'file')}, {amount(exported.size_bytes)}"
        _say(
            f"{printable(exported.file)} holds {printable(exported.uri)}: {size}; check it with `import --sha256 {exported.sha256}`"
        )
    return 0


def _import(store: ModelStore, arguments: argparse.Namespace) -> int:
    if arguments.file == "-":
        _say("import: a bundle is read from any place in it, which a pipe cannot do; write it to a file first")
        return 2
    quiet = False if arguments.quiet else None
    model = store.import_(arguments.file, sha256=arguments.sha256, timeout=arguments.timeout, progress=quiet)
    _answer_model(arguments, model)
    return 0


def _answer_model(arguments: argparse.Namespace, model: Model) -> None:
    document = {**_identity(model), "status": model.status, "size_bytes": model.size_bytes}
    _answer(
        arguments,
        {**document, "bytes_fetched": model.bytes_fetched, "seconds": round(model.seconds, 3)},
        str(model.path),
    )


def _locks(store: ModelStore, arguments: argparse.Namespace) -> int:
    from kserve_pvc._show.units import amount, count

    for uri in arguments.break_claim or ():
        store.break_lock(uri, **_selection(arguments))
    locks = store.locks()
    if arguments.json:
        _print_json([attrs.asdict(lock) for lock in locks])
        return 0
    rows = [
        (
            lock.uri,
            lock.key,
            lock.state,
            lock.holder,
            lock.since,
            _age(lock.age_seconds),
            f"{amount(lock.bytes_done)} of {amount(lock.bytes_total)}",
        )
        for lock in locks
    ]
    _print_table(("URI", "KEY", "STATE", "HOLDER", "SINCE", "AGE", "PROGRESS"), rows)
    if not arguments.quiet:
        _say(f"{count(len(locks), 'claim')} not given back")
    return 0


def _age(seconds: float) -> str:
    """Hours, minutes and seconds since, by this node's clock. A clock that is behind the holder's shows nothing below zero."""
    minutes, rest = divmod(int(max(seconds, 0)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _doctor(arguments: argparse.Namespace) -> int:
    from kserve_pvc._doctor.doctor import diagnose
    from kserve_pvc._doctor.text import tell

    settings = read_settings()
    if not arguments.timeout >= 0:
        raise SettingsError("--timeout", str(arguments.timeout), "write a number of seconds, 0 or more")
    if arguments.peer is not None and not arguments.quiet:
        _say(
            f"waiting up to {arguments.timeout:.0f} s for `kserve-pvc doctor DIR --peer {printable(arguments.peer)}` on another node"
        )
    diagnosis = diagnose(
        arguments.directory or arguments.store or settings.store,
        writes=settings.mode != "r",
        holder=_this_process(),
        peer=arguments.peer,
        timeout=arguments.timeout,
    )
    if arguments.json:
        _print_json({**attrs.asdict(diagnosis), "kind": diagnosis.profile.kind, "ok": diagnosis.ok})
    else:
        for line in tell(diagnosis):
            print(line)
    return 0 if diagnosis.ok else 1


def _kserve_patch(arguments: argparse.Namespace) -> int:
    from kserve_pvc.kserve._patch import Sharing, patch

    read_only = False if arguments.read_write else True if arguments.read_only else None
    sharing = Sharing(claim=arguments.claim, sub_path=arguments.sub_path, read_only=read_only)
    patched = patch(
        _read_input(arguments.file), sharing, name="standard input" if arguments.file == "-" else arguments.file
    )
    sys.stdout.write(patched.text)
    for remark in () if arguments.quiet else patched.remarks:
        _say(printable(remark))
    if patched.error is not None:
        _complain(patched.error, "", verbose=arguments.verbose)
        return 1  # What kustomize expects of a function that failed.
    return 0


def _read_input(name: str) -> bytes:
    try:
        return sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise SettingsError("--file", name, f"it cannot be read: {error.strerror}") from error


def _webhook(arguments: argparse.Namespace) -> int:
    from kserve_pvc.kserve._webhook import serve

    serve(
        policy_file=Path(arguments.policy),
        certificate_file=Path(arguments.tls_cert),
        key_file=Path(arguments.tls_key),
        host=arguments.host,
        port=arguments.port,
        reload_seconds=arguments.reload_seconds,
    )
    return 0


def _initialize(arguments: argparse.Namespace) -> int:
    return _run_initializer(arguments.pairs)


def _run_initializer(pairs: Sequence[str]) -> int:
    from kserve_pvc.kserve._initialize import main as initialize

    return initialize(pairs)


def _exit_code(error: Exception) -> int:
    return error.exit_code if isinstance(error, StoreError) else 1


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
    return {
        **_identity(model),
        "size_bytes": model.size_bytes,
        "files": model.files,
        "created_at": model.created_at,
        "pinned": False,
    }


def _verification(report: Verification) -> dict[str, Any]:
    problems = [attrs.asdict(problem) for problem in report.problems]
    return {"uri": report.uri, "ok": report.ok, "files": report.files, "bytes": report.bytes, "problems": problems}


def _print_verification(report: Verification) -> None:
    from kserve_pvc._show.units import amount, count

    checked = (
        f"{count(report.files, 'file')}, {amount(report.bytes)}, {'digests' if report.level == 'full' else 'sizes'}"
    )
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
    parser.add_argument(
        "--refresh", action="store_true", help="ask the source, and fetch a newer version beside the old one"
    )
    parser.add_argument("--force-download", action="store_true", help="fetch even if it is present")
    parser.add_argument("--local-files-only", action="store_true", help="never use the network")
    _add_patience(parser)


def _add_patience(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--timeout",
        type=float,
        default=defaults.TIMEOUT,
        metavar="SECONDS",
        help="wait that long for another downloader",
    )
    parser.add_argument(
        "--max-workers", type=int, default=defaults.MAX_WORKERS, metavar="N", help="most streams at the same time"
    )


def _add_warm(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("uris", metavar="URI", nargs="*")
    parser.add_argument(
        "-f",
        "--file",
        action="append",
        metavar="FILE",
        help="a model a line, as a URI or a JSON object; `-` is standard input",
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="models at the same time")
    parser.add_argument(
        "--refresh", action="store_true", help="ask the sources, and fetch newer versions beside the old ones"
    )
    _add_patience(parser)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--refresh", action="store_true", help="as if `ensure --refresh` were meant")


def _add_verify(parser: argparse.ArgumentParser) -> None:
    _add_model(parser, optional=True)
    parser.add_argument("--all", action="store_true", help="verify every model")
    parser.add_argument(
        "--full", action="store_true", help="read every byte and compare digests, instead of sizes only"
    )


def _add_rm(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--now", action="store_true", help="empty the trash at once, under readers that hold no lease")


def _add_locks(parser: argparse.ArgumentParser) -> None:
    _add_selection(parser)
    parser.add_argument(
        "--break",
        dest="break_claim",
        action="append",
        metavar="URI",
        help="let another process download; safe at any time",
    )


def _add_alias(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", metavar="NAME", nargs="?", help="a name that a pod can mount: `names/NAME` in the volume"
    )
    parser.add_argument(
        "uri", metavar="URI", nargs="?", help="the model, which is present; without any arguments all names are listed"
    )
    parser.add_argument("--drop", metavar="NAME", help="take a name away; the model stays")
    _add_selection(parser)


def _add_export(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("file", metavar="FILE", help="where to write the bundle; `-` is standard output")


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a bundle that `export` wrote")
    parser.add_argument("--sha256", metavar="HEX", help="accept only the bundle whose digest `export` told")
    parser.add_argument(
        "--timeout",
        type=float,
        default=defaults.TIMEOUT,
        metavar="SECONDS",
        help="wait that long for another downloader",
    )


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", nargs="?", help="what to examine, a store or not (else the store)")
    parser.add_argument(
        "--peer", metavar="NAME", help="test a second node too, on which the same is started with the same name"
    )
    parser.add_argument(
        "--timeout", type=float, default=defaults.DOCTOR_TIMEOUT, metavar="SECONDS", help="wait that long for it"
    )


def _add_kserve(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    text = "print an InferenceService that downloads into a claim; standard input and output may be a ResourceList"
    patch = actions.add_parser("patch", help=text, description=text)
    _add_common(patch, defaults=False)
    patch.add_argument(
        "-f",
        "--file",
        default="-",
        metavar="FILE",
        help="the manifests, of which all others are passed on; `-` is standard input",
    )
    patch.add_argument("--claim", metavar="NAME", help="the PersistentVolumeClaim")
    patch.add_argument(
        "--sub-path", metavar="DIR", help="the directory of the claim that the server sees; else all of it"
    )
    mode = patch.add_mutually_exclusive_group()
    mode.add_argument("--read-write", action="store_true", help="let the server write")
    mode.add_argument("--read-only", action="store_true", help="do not let it, whatever its annotation says now")


def _add_initialize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "pairs",
        metavar="SRC DEST",
        nargs="*",
        help="a source and the directory that it goes to; settings are variables",
    )


def _add_webhook(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--policy", required=True, metavar="FILE", help="who may use which claim, and how")
    parser.add_argument(
        "--tls-cert", required=True, metavar="FILE", help="the certificate, with its chain; read again when it changes"
    )
    parser.add_argument("--tls-key", required=True, metavar="FILE", help="its private key")
    parser.add_argument("--host", default="0.0.0.0", metavar="ADDRESS", help="where to listen")
    parser.add_argument(
        "--port", type=int, default=8443, metavar="N", help="where to listen; 0 takes a free one and says which"
    )
    parser.add_argument(
        "--reload-seconds",
        type=float,
        default=5.0,
        metavar="SECONDS",
        help="how often to look whether the files have changed",
    )


def _add_common(parser: argparse.ArgumentParser, *, defaults: bool) -> None:
    # Accepted before and after the verb; only the first place has defaults, or the second would undo the first.
    missing = None if defaults else argparse.SUPPRESS
    parser.add_argument(
        "--store", metavar="DIR", default=missing, help="the store (else KSERVE_PVC_STORE, else /mnt/models)"
    )
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
_VERBS: Mapping[str, tuple[Callable[..., int], Callable[[argparse.ArgumentParser], None], str]] = {
    "ensure": (_ensure, _add_ensure, "print the directory of a model, downloading it if it is absent"),
    "warm": (_warm, _add_warm, "make sure of several models, downloading those that are absent"),
    "path": (_path, _add_model, "print the directory of a model that is present"),
    "ls": (_ls, lambda _: None, "list the models"),
    "info": (_info, _add_model, "show what is known about a model"),
    "plan": (_plan, _add_plan, "show what `ensure` would do"),
    "verify": (_verify, _add_verify, "compare models with their records"),
    "rm": (_rm, _add_rm, "remove a model, or what is left of an unfinished download"),
    "alias": (_alias, _add_alias, "give a model a name that a pod can mount, or list the names"),
    "export": (_export, _add_export, "write a model as one file, to import it where there is no network"),
    "import": (_import, _add_import, "take over a model from a file that `export` wrote, and print its directory"),
    "locks": (_locks, _add_locks, "show who is downloading"),
    "doctor": (_doctor, _add_doctor, "say what a volume is and can do, and what should be changed"),
    "initialize": (_initialize, _add_initialize, "fill directories as KServe's storage initializer does"),
    "kserve": (_kserve_patch, _add_kserve, "share a claim between the replicas of an InferenceService"),
    "webhook": (_webhook, _add_webhook, "give pods the claims that a policy grants, as an admission webhook"),
}
