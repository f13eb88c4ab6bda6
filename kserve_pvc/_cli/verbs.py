"""
One function for each verb of the command line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import attrs

from kserve_pvc import _defaults as defaults
from kserve_pvc._cli.catalogue import read_input, warm_items
from kserve_pvc._cli.output import (
    describe_damaged,
    describe_error,
    describe_identity,
    describe_model,
    describe_row,
    describe_verification,
    describe_warmed,
    exit_code,
    format_age,
    print_error,
    print_model,
    print_result,
    print_table,
    print_verification,
    show_warmed,
)
from kserve_pvc._cli.streams import BinaryOutput, print_document, print_json, put, say
from kserve_pvc._process import this_process
from kserve_pvc._settings import read_settings
from kserve_pvc._source.ref import parse_ref
from kserve_pvc._store import ModelStore
from kserve_pvc.errors import ReadOnlyStoreError, SettingsError, printable

# As in `_store`, what `path` does not need is imported by the verb that uses it.
if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

    from kserve_pvc._download.warm import Item, Warmed
    from kserve_pvc._volume.verify import Level


def ensure(store: ModelStore, arguments: argparse.Namespace) -> int:
    model = store.ensure(
        arguments.uri,
        **selection(arguments),
        refresh=arguments.refresh,
        force_download=arguments.force_download,
        local_files_only=arguments.local_files_only,
        timeout=arguments.timeout,
        max_workers=arguments.max_workers,
        progress=False if arguments.quiet else None,
    )
    print_model(arguments, model)
    return 0


def warm(store: ModelStore, arguments: argparse.Namespace) -> int:
    items = warm_items(arguments)
    if not items and not arguments.file:
        raise SettingsError("URI", "", "name at least one URI, or a file of URIs with `-f`")
    if arguments.workers < 1:
        raise SettingsError("--workers", str(arguments.workers), "write 1 or more")
    done = sorted(_warm_all(store, items, arguments), key=lambda warmed: warmed.index)
    failures = [warmed.error for warmed in done if warmed.error is not None]
    if arguments.json:
        print_json([describe_warmed(warmed) for warmed in done])
    elif not arguments.quiet:
        from kserve_pvc._show.units import count

        say(f"{count(len(done), 'model')}, {len(failures) or 'none'} failed")
    return exit_code(failures[0]) if failures else 0


def init(store: ModelStore, arguments: argparse.Namespace) -> int:
    settings = store.settings
    if settings is None:
        raise ReadOnlyStoreError(str(store.root), "make a store", "unset KSERVE_PVC_MODE, or set it to `rw`")
    document = {"root": store.root, "locker": settings.locker, "lease_seconds": settings.lease_seconds}
    print_result(arguments, {**document, "created_at": settings.created_at}, str(store.root))
    if not arguments.quiet:
        say(f"a store with locker {settings.locker} and leases of {settings.lease_seconds:g} s")
    return 0


def _warm_all(store: ModelStore, items: Iterable[Item], arguments: argparse.Namespace) -> list[Warmed]:
    """
    Warm all models, report each as it finishes, and leave nothing running.
    """
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
                show_warmed(warmed, arguments)
        except BaseException as error:
            # Wherever this thread was interrupted, the others stop and release their claims.
            results.throw(error)
    return done


def _threads(workers: int) -> AbstractContextManager[ThreadPoolExecutor | None]:
    if workers == 1:
        return nullcontext()
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(workers, thread_name_prefix="warm")


def path(store: ModelStore, arguments: argparse.Namespace) -> int:
    model = store.get(arguments.uri, **selection(arguments))
    print_result(arguments, describe_identity(model), str(model.path))
    return 0


def ls(store: ModelStore, arguments: argparse.Namespace) -> int:
    from kserve_pvc._show.units import count, format_bytes

    models, usage = store.list(), store.usage()
    damaged = [key for key in usage.keys if key.damage is not None]
    if arguments.json:
        print_json([*map(describe_row, models), *map(describe_damaged, damaged)])
        return 0
    print_table(
        ("URI", "SIZE", "FILES", "CREATED", "KEY"),
        [
            (
                describe_model(m),
                format_bytes(m.size_bytes),
                str(m.files),
                m.created_at.strftime("%Y-%m-%d %H:%M"),
                m.key,
            )
            for m in models
        ]
        + [(key.uri or "unknown", "DAMAGED", "", "", key.key) for key in damaged],
    )
    if not arguments.quiet:
        say(f"{count(len(models), 'model')}, {format_bytes(sum(m.size_bytes for m in models))} at {store.root}")
        unfinished = [key for key in usage.keys if key.unfinished_bytes]
        if unfinished:
            occupied = format_bytes(sum(key.unfinished_bytes for key in unfinished))
            say(f"{occupied} of {count(len(unfinished), 'unfinished download')}, see `kserve-pvc du`")
        if damaged:
            say(f"{count(len(damaged), 'model')} damaged, and absent until downloaded again; see `verify --all`")
    return 0


def du(store: ModelStore, arguments: argparse.Namespace) -> int:
    from kserve_pvc._show.units import format_bytes

    usage = store.usage()
    if arguments.json:
        print_json(attrs.asdict(usage))
        return 0
    rows = [(key.uri or "unknown", key.size_bytes, key.unfinished_bytes, key.key) for key in usage.keys]
    print_table(
        ("URI", "MODEL", "UNFINISHED", "KEY"),
        [(uri, format_bytes(size), format_bytes(unfinished), key) for uri, size, unfinished, key in rows],
    )
    if not arguments.quiet:
        say(f"{format_bytes(usage.trash_bytes)} in the trash, {format_bytes(usage.free_bytes)} free at {store.root}")
    return 0


def info(store: ModelStore, arguments: argparse.Namespace) -> int:
    from kserve_pvc._show.units import count, format_bytes

    model = store.get(arguments.uri, **selection(arguments))
    record = model.record
    if arguments.json:
        print_json({**attrs.asdict(record), "path": model.path})
        return 0
    facts = [
        ("uri", record.uri),
        ("revision", record.revision or "newest at the time"),
        ("key", record.key),
        ("version", record.version),
        ("path", str(model.path)),
        ("size", f"{format_bytes(record.size_bytes)} in {count(len(record.files), 'file')}"),
        ("created", f"{record.created_at.isoformat(timespec='seconds')} by {record.writer}"),
    ]
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        put(f"{name.ljust(width)}  {printable(value)}")
    print_table(
        ("FILE", "SIZE", "SHA256"),
        [(str(f.path), format_bytes(f.size_bytes), f.sha256 or "unknown") for f in record.files],
    )
    return 0


def plan(store: ModelStore, arguments: argparse.Namespace) -> int:
    from kserve_pvc._show.units import count, format_bytes

    plan = store.plan(arguments.uri, **selection(arguments), refresh=arguments.refresh)
    if not store.exists:
        say(f"there is no store at {store.root} yet; `ensure` makes one")
    if arguments.json:
        print_json({**attrs.asdict(plan), "fits": plan.fits})
        return 0
    if plan.action == "nothing":
        put(f"nothing to do: {printable(plan.uri)} is present ({format_bytes(plan.size_bytes)})")
        return 0
    seconds = "at an unknown rate" if plan.seconds is None else f"in about {plan.seconds:.0f} s"
    size = f"{format_bytes(plan.size_bytes)} in {count(plan.files, 'file')}"
    put(f"would download {format_bytes(plan.bytes_to_fetch)} of {size} {seconds}")
    put(f"would reuse {format_bytes(plan.bytes_reusable)} that is on the volume")
    put(f"{format_bytes(plan.free_bytes)} free: {'it fits' if plan.fits else 'IT DOES NOT FIT'}")
    return 0


def verify(store: ModelStore, arguments: argparse.Namespace) -> int:
    level: Level = "full" if arguments.full else "size"
    if arguments.uri is None and not arguments.all:
        raise SettingsError("URI", "", "name a URI, or write `--all`")
    if arguments.all and (arguments.uri is not None or any(selection(arguments).values())):
        raise SettingsError("--all", str(arguments.uri or "with a selection"), "verify one model, or all of them")
    progress = False if arguments.quiet else None
    if arguments.all:
        reports = store.verify_all(level, progress=progress)
    else:
        reports = iter([store.verify(arguments.uri, level, **selection(arguments), progress=progress)])
    seen = []
    for report in reports:
        seen.append(report)
        if not arguments.json and not arguments.quiet:
            print_verification(report)
    ok = all(report.ok for report in seen)
    if arguments.json:
        print_json({"ok": ok, "models": [describe_verification(report) for report in seen]})
    return 0 if ok else 1


def alias(store: ModelStore, arguments: argparse.Namespace) -> int:
    if arguments.drop is not None and arguments.name is not None:
        raise SettingsError("--drop", arguments.drop, "remove a name, or give one")
    if arguments.uri is None and any(selection(arguments).values()):
        raise SettingsError("URI", "", "a selection is of the model that gets the name")
    if arguments.drop is not None:
        store.drop_alias(arguments.drop)
    elif arguments.uri is not None:
        store.alias(arguments.name, arguments.uri, **selection(arguments))
    elif arguments.name is not None:
        raise SettingsError("URI", "", f"say which model `{arguments.name}` is to be the name of")
    aliases = store.aliases()
    if arguments.json:
        print_json(dict(aliases))
    else:
        print_table(("NAME", "KEY"), list(aliases.items()))
    return 0


def rm(store: ModelStore, arguments: argparse.Namespace) -> int:
    store.remove(arguments.uri, **selection(arguments), trash_seconds=0.0 if arguments.now else defaults.TRASH_SECONDS)
    if not arguments.json and not arguments.quiet:
        from kserve_pvc._source.redaction import redact

        kept = f"; its files are kept in the trash for {defaults.TRASH_SECONDS / 60:.0f} minutes, `--now` deletes them"
        say(f"removed {printable(redact(parse_ref(arguments.uri).uri))}{'' if arguments.now else kept}")
    print_result(arguments, {"uri": parse_ref(arguments.uri).uri, "removed": True}, None)
    return 0


def export(store: ModelStore, arguments: argparse.Namespace) -> int:
    from kserve_pvc._show.units import count, format_bytes

    to_stdout = arguments.file == "-"
    if to_stdout and (arguments.json or sys.stdout.isatty()):
        hint = "the bundle goes to standard output; redirect it, leave out `--json`, or name a file"
        raise SettingsError("FILE", "-", hint)
    file = cast(BinaryIO, BinaryOutput()) if to_stdout else arguments.file
    exported = store.export(arguments.uri, file, **selection(arguments), progress=False if arguments.quiet else None)
    if arguments.json:
        print_json(attrs.asdict(exported))
    elif not arguments.quiet:
        size = f"{count(exported.files, 'file')}, {format_bytes(exported.size_bytes)}"
        say(f"wrote {printable(exported.uri)} to {printable(exported.file)}: {size}")
        say(f"verify it on the other side with `import --sha256 {exported.sha256}`")
    return 0


def import_(store: ModelStore, arguments: argparse.Namespace) -> int:
    if arguments.file == "-":
        hint = "a bundle needs random access, which a pipe does not have; write it to a file first"
        raise SettingsError("FILE", "-", hint)
    if arguments.sha256 is not None and not arguments.quiet:
        say(f"comparing {printable(arguments.file)} with its SHA-256")
    model = store.import_(
        arguments.file,
        sha256=arguments.sha256,
        manifest_sha256=arguments.manifest_sha256,
        timeout=arguments.timeout,
        progress=False if arguments.quiet else None,
    )
    print_model(arguments, model)
    return 0


def locks(store: ModelStore, arguments: argparse.Namespace) -> int:
    from kserve_pvc._show.units import count, progress_of

    if any(selection(arguments).values()) and not arguments.break_claim:
        raise SettingsError("--break", "", "a selection is of the model whose claim is released")
    for uri in arguments.break_claim or ():
        store.break_lock(uri, **selection(arguments))
    locks = store.locks()
    if arguments.json:
        print_json([attrs.asdict(lock) for lock in locks])
        return 0
    rows = [
        (
            lock.uri,
            lock.key,
            lock.state,
            lock.holder,
            lock.since,
            format_age(lock.age_seconds),
            progress_of(lock.bytes_done, lock.bytes_total),
        )
        for lock in locks
    ]
    print_table(("URI", "KEY", "STATE", "HOLDER", "SINCE", "AGE", "PROGRESS"), rows)
    if not arguments.quiet:
        say(f"{count(len(locks), 'claim')} held or left behind")
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    from kserve_pvc._doctor.doctor import diagnose
    from kserve_pvc._doctor.text import format_diagnosis
    from kserve_pvc.backends import list_plugins
    from kserve_pvc.backends._options import explain_all

    settings = read_settings()
    if not arguments.timeout >= 0:
        raise SettingsError("--timeout", str(arguments.timeout), "write a number of seconds, 0 or more")
    if arguments.peer is not None and not arguments.quiet:
        command = f"kserve-pvc doctor DIR --peer {printable(arguments.peer)}"
        say(f"waiting up to {arguments.timeout:.0f} s for `{command}` on another node")
    diagnosis = diagnose(
        arguments.directory or arguments.store or settings.store,
        writes=settings.mode != "r",
        holder=this_process(),
        peer=arguments.peer,
        timeout=arguments.timeout,
        sources=explain_all(),
        plugins=list_plugins(),
    )
    if arguments.json:
        print_json({**attrs.asdict(diagnosis), "kind": diagnosis.profile.kind, "ok": diagnosis.ok})
    else:
        for line in format_diagnosis(diagnosis):
            put(line)
    return 0 if diagnosis.ok else 1


def kserve_patch(arguments: argparse.Namespace) -> int:
    from kserve_pvc.kserve._patch import Sharing, patch

    read_only = False if arguments.read_write else True if arguments.read_only else None
    sharing = Sharing(claim=arguments.claim, sub_path=arguments.sub_path, read_only=read_only)
    patched = patch(
        read_input(arguments.file), sharing, name="standard input" if arguments.file == "-" else arguments.file
    )
    remarks = [printable(remark) for remark in patched.remarks]
    if arguments.json:
        failure = None if patched.error is None else describe_error(patched.error)
        print_json({"manifests": patched.text, "remarks": remarks, "error": failure})
    else:
        put(patched.text, end="")
    for remark in () if arguments.quiet else remarks:
        say(remark)
    if patched.error is not None:
        print_error(patched.error, "", verbose=arguments.verbose)
        return 1  # What kustomize expects of a function that failed.
    return 0


def webhook(arguments: argparse.Namespace) -> int:
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


def completion(arguments: argparse.Namespace) -> int:
    from kserve_pvc._cli.completion import make_script

    script = make_script(arguments.make_parser(), arguments.shell)
    print_result(arguments, {"shell": arguments.shell, "script": script}, script)
    return 0


def initialize(arguments: argparse.Namespace) -> int:
    store = [] if arguments.store is None else ["--store", arguments.store]
    quiet = ["--quiet"] if arguments.quiet else []
    return run_initializer([*store, *quiet, "--", *arguments.pairs], verbose=arguments.verbose)


def run_initializer(words: Sequence[str], *, verbose: bool) -> int:
    """
    Run the storage initializer. Its arguments and exit codes are those of KServe, not of this command.
    """
    from kserve_pvc.kserve._initialize import initialize

    outcome = initialize(words)
    if outcome.error is not None:
        if verbose:
            print_error(outcome.error, "", verbose=True)
        document: dict[str, Any] = {"error": {**describe_error(outcome.error), "message": outcome.message}}
    elif outcome.text:
        document = {"help": outcome.text}
    else:
        document = {"models": [{"uri": uri, "path": place} for uri, place in outcome.pairs]}
    if not print_document(document):
        put(outcome.text, end="")
    return 0 if outcome.error is None else 1


def selection(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"revision": arguments.revision, "allow_patterns": arguments.allow, "ignore_patterns": arguments.ignore}
