"""
The arguments of the command line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn

from kserve_pvc import __version__
from kserve_pvc import _defaults as defaults

# As in `_store`, what `path` does not need is imported by the verb that does.
from kserve_pvc._cli.streams import print_document, put, put_help, say
from kserve_pvc._cli.verbs import (
    alias,
    completion,
    doctor,
    du,
    ensure,
    export,
    import_,
    info,
    init,
    initialize,
    kserve_patch,
    locks,
    ls,
    path,
    plan,
    rm,
    verify,
    warm,
    webhook,
)
from kserve_pvc._cli.words import ALIASES, format_examples, say_unknown
from kserve_pvc.errors import printable


class _Parser(argparse.ArgumentParser):
    """
    An argument parser that reports errors as this command does, and measures the terminal only to show help.
    """

    def __init__(self, **arguments: Any) -> None:
        # argparse makes a formatter for each argument it is given, and without a width would import shutil for it.
        super().__init__(**arguments, formatter_class=partial(argparse.HelpFormatter, width=80))

    def format_help(self) -> str:
        self.formatter_class = _Formatter
        return super().format_help()

    def format_usage(self) -> str:
        self.formatter_class = _Formatter
        return super().format_usage()

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            # Of the verb, or of its action: these know which options there are.
            getattr(found, "parser", self).refuse(rest)
        return found

    def refuse(self, rest: Sequence[str]) -> NoReturn:
        """
        End the call for arguments that were not understood.
        """
        option = next((word.partition("=")[0] for word in rest if word.startswith("-") and len(word) > 1), None)
        if option is None:
            self.error(f"unexpected argument `{rest[0]}`")
        self.error(say_unknown("option", option, self._option_string_actions))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        self.error(say_unknown(str(action.metavar or action.dest).lower(), str(value), list(action.choices)))

    def print_help(self, file: object = None) -> None:
        put_help(self.format_help())

    def error(self, message: str) -> NoReturn:
        from kserve_pvc._source.redaction import redact

        text = printable(redact(message))
        text += f"{'' if text.endswith('?') else ';'} see `{self.prog} --help`"
        with suppress(OSError):
            self.print_usage(sys.stderr)
        say(text)
        print_document({"error": {"type": "UsageError", "message": text}})
        sys.exit(2)


class _Formatter(argparse.HelpFormatter):
    """
    Wraps every text but examples, which have lines of their own.
    """

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


class _ShowVersion(argparse.Action):
    """
    Prints the version, or the document that holds it.
    """

    def __call__(self, parser: argparse.ArgumentParser, *arguments: object) -> NoReturn:
        if not print_document({"version": __version__}):
            put(f"kserve-pvc {__version__}")
        parser.exit()


def make_parser(only: str | None = None) -> argparse.ArgumentParser:
    """
    Make a parser for every verb, or for just one: building all of them takes longer than a hit in the store.
    """
    parser = _Parser(
        prog="kserve-pvc",
        description="A shared volume as a correct model store.",
        epilog=format_examples(("ensure", "ls", "verify")),
    )
    parser.add_argument("--version", nargs=0, action=_ShowVersion, help="print the version and exit")
    _add_common(parser, defaults=True)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name in VERBS if only is None else (only,):
        run, add_arguments, text = VERBS[name]
        aliases = [alias for alias, meant in ALIASES.items() if meant == name]
        verb = verbs.add_parser(name, aliases=aliases, help=text, description=text, epilog=format_examples((name,)))
        verb.set_defaults(run=run, verb=name, parser=verb)
        _add_common(verb, defaults=False)
        add_arguments(verb)
    return parser


def _add_ensure(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument(
        "--refresh", action="store_true", help="check the source, and fetch a newer version beside the old one"
    )
    parser.add_argument("--force-download", action="store_true", help="download even if the model is present")
    parser.add_argument("--local-files-only", action="store_true", help="never use the network")
    _add_patience(parser)


def _add_patience(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--timeout",
        type=float,
        default=defaults.TIMEOUT,
        metavar="SECONDS",
        help="how long to wait for another downloader (default: %(default)g)",
    )
    parser.add_argument(
        "--max-workers",
        type=int,
        default=defaults.MAX_WORKERS,
        metavar="N",
        help="maximum number of parallel streams (default: %(default)d)",
    )


def _add_warm(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("uris", metavar="URI", nargs="*", help="a model, in quotes with options as in FILE")
    parser.add_argument(
        "-f",
        "--file",
        action="append",
        metavar="FILE",
        help="read models from FILE, one a line, as a URI, if need be with `--revision`, `--allow`, `--ignore`, "
        "`--refresh` or `--force-download` after it, or as a JSON object; `-` is standard input (default: none)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="number of models downloaded in parallel (default: %(default)d)",
    )
    parser.add_argument(
        "--refresh", action="store_true", help="check the sources, and fetch newer versions beside the old ones"
    )
    _add_patience(parser)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--refresh", action="store_true", help="plan for `ensure --refresh`")


def _add_verify(parser: argparse.ArgumentParser) -> None:
    _add_model(parser, optional=True)
    parser.add_argument("--all", action="store_true", help="verify every model")
    parser.add_argument("--full", action="store_true", help="read every byte and compare digests, not only sizes")


def _add_rm(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument(
        "--now", action="store_true", help="delete the files at once; readers without a lease lose them"
    )


def _add_locks(parser: argparse.ArgumentParser) -> None:
    _add_selection(parser)
    parser.add_argument(
        "--break",
        dest="break_claim",
        action="append",
        metavar="URI",
        help="release the claim on a model, so that another process may download it; safe at any time (default: none)",
    )


def _add_alias(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", metavar="NAME", nargs="?", help="name that a pod can mount, as `names/NAME` on the volume"
    )
    parser.add_argument(
        "uri", metavar="URI", nargs="?", help="a model that is present; without arguments, all names are listed"
    )
    parser.add_argument("--drop", metavar="NAME", help="remove a name; the model stays (default: none)")
    _add_selection(parser)


def _add_export(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("file", metavar="FILE", help="file to write the bundle to; `-` is standard output")


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a bundle that `export` wrote")
    parser.add_argument(
        "--sha256", metavar="HEX", help="expected digest of FILE, as printed by `export` and `sha256sum` (default: any)"
    )
    parser.add_argument(
        "--manifest-sha256",
        metavar="HEX",
        help="expected digest of its manifest, as printed by `export --json`; FILE is not read for it (default: any)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=defaults.TIMEOUT,
        metavar="SECONDS",
        help="how long to wait for another downloader (default: %(default)g)",
    )


def _add_init(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--locker", metavar="NAME", help="what decides which process downloads (default: lease)")
    parser.add_argument(
        "--lease-seconds",
        type=float,
        metavar="SECONDS",
        help="how long after its last heartbeat a downloader is taken over (default: by the kind of volume)",
    )


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", nargs="?", help="directory to examine (default: the store)")
    parser.add_argument(
        "--peer",
        metavar="NAME",
        help="test with a second node, where the same command runs with the same NAME (default: none)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=defaults.DOCTOR_TIMEOUT,
        metavar="SECONDS",
        help="how long to wait for the peer (default: %(default)g)",
    )


def _add_kserve(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    text = "print an InferenceService that downloads into a claim; standard input and output may be a ResourceList"
    patch = actions.add_parser("patch", help=text, description=text, epilog=format_examples(("kserve",)))
    patch.set_defaults(parser=patch)
    _add_common(patch, defaults=False)
    patch.add_argument(
        "-f",
        "--file",
        default="-",
        metavar="FILE",
        help="manifests to read; those that are not InferenceServices pass unchanged (default: standard input)",
    )
    patch.add_argument(
        "--claim", metavar="NAME", help="the PersistentVolumeClaim (default: the one in the function's configuration)"
    )
    patch.add_argument(
        "--sub-path", metavar="DIR", help="directory of the claim that the server sees (default: all of it)"
    )
    mode = patch.add_mutually_exclusive_group()
    mode.add_argument("--read-write", action="store_true", help="mount read-write")
    mode.add_argument("--read-only", action="store_true", help="mount read-only, overriding the annotation")


def _add_initialize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "pairs",
        metavar="SRC DEST",
        nargs="*",
        help="source and the directory to fill; the other settings are environment variables",
    )


def _add_webhook(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--policy",
        required=True,
        metavar="FILE",
        help="policy that says which pods may use which claims, and how (required)",
    )
    parser.add_argument(
        "--tls-cert",
        required=True,
        metavar="FILE",
        help="certificate with its chain; reloaded when it changes (required)",
    )
    parser.add_argument("--tls-key", required=True, metavar="FILE", help="private key of the certificate (required)")
    parser.add_argument(
        "--host", default="0.0.0.0", metavar="ADDRESS", help="address to listen on (default: %(default)s)"
    )
    parser.add_argument(
        "--port",
        type=int,
        default=8443,
        metavar="N",
        help="port to listen on; 0 picks a free one and prints it (default: %(default)d)",
    )
    parser.add_argument(
        "--reload-seconds",
        type=float,
        default=5.0,
        metavar="SECONDS",
        help="interval between checks for changed files (default: %(default)g)",
    )


def _add_completion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", metavar="SHELL", choices=("bash", "zsh", "fish"), help="`bash`, `zsh` or `fish`")
    # The script is about every verb, and only this one was made for the call.
    parser.set_defaults(make_parser=make_parser)


def _add_common(parser: argparse.ArgumentParser, *, defaults: bool) -> None:
    # Accepted before and after the verb; only the first place has defaults, or the second would undo the first.
    missing = None if defaults else argparse.SUPPRESS
    parser.add_argument(
        "--store", metavar="DIR", default=missing, help="store directory (default: KSERVE_PVC_STORE, else /mnt/models)"
    )
    for names, text in (
        (("--json",), "print one JSON document"),
        (("-q", "--quiet"), "print neither progress nor summaries"),
        (("-v", "--verbose"), "print log records, and the traceback of an error"),
    ):
        parser.add_argument(*names, action="store_true", default=False if defaults else argparse.SUPPRESS, help=text)


def _add_model(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    parser.add_argument("uri", metavar="URI", nargs="?" if optional else None)
    _add_selection(parser)


def _add_selection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--revision", help="version of the source, such as a commit or a VersionId (default: the newest one)"
    )
    parser.add_argument(
        "--allow",
        action="append",
        metavar="PATTERN",
        help="only files that match; may be repeated (default: all files)",
    )
    parser.add_argument(
        "--ignore", action="append", metavar="PATTERN", help="no files that match; may be repeated (default: none)"
    )


# What each verb runs, which arguments it takes besides the common ones, and what it does.
VERBS: Mapping[str, tuple[Callable[..., int], Callable[[argparse.ArgumentParser], None], str]] = {
    "ensure": (ensure, _add_ensure, "print the directory of a model, downloading it if it is absent"),
    "warm": (warm, _add_warm, "download several models, skipping those that are present"),
    "path": (path, _add_model, "print the directory of a model that is present"),
    "ls": (ls, lambda _: None, "list the models"),
    "du": (du, lambda _: None, "show what models, unfinished downloads and the trash occupy"),
    "info": (info, _add_model, "show the record of a model"),
    "plan": (plan, _add_plan, "show what `ensure` would do"),
    "verify": (verify, _add_verify, "compare models with their records"),
    "rm": (rm, _add_rm, "remove a model, or the leftovers of an unfinished download"),
    "alias": (alias, _add_alias, "give a model a name that a pod can mount, or list the names"),
    "export": (export, _add_export, "write a model into one file, for machines without a network"),
    "import": (import_, _add_import, "add a model from a file that `export` wrote, and print its directory"),
    "init": (init, _add_init, "make a store in an existing directory; other verbs that only read never do"),
    "locks": (locks, _add_locks, "show which processes are downloading"),
    "doctor": (doctor, _add_doctor, "examine a volume: what it supports, and what should be changed"),
    "initialize": (initialize, _add_initialize, "fill directories as KServe's storage initializer does"),
    "kserve": (kserve_patch, _add_kserve, "share a claim between the replicas of an InferenceService"),
    "webhook": (webhook, _add_webhook, "serve an admission webhook that mounts claims as a policy allows"),
    "completion": (completion, _add_completion, "print a script that completes this command in a shell"),
}
