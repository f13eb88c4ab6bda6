"""
The arguments of the command line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NoReturn

from kserve_pvc import __version__
from kserve_pvc import _defaults as defaults

# As in `_store`, what `path` does not need is imported by the verb that does.
from kserve_pvc._cli.output import say
from kserve_pvc._cli.verbs import (
    alias,
    doctor,
    ensure,
    export,
    import_,
    info,
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
        say(f"{message}; see `{self.prog} --help`")
        sys.exit(2)


def make_parser(only: str | None = None) -> argparse.ArgumentParser:
    """Parse every verb, or just one of them: argparse takes longer to learn them all than a hit takes."""
    parser = _Parser(prog="kserve-pvc", description="A shared volume as a correct model store.")
    parser.add_argument("--version", action="version", version=f"kserve-pvc {__version__}")
    _add_common(parser, defaults=True)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name in VERBS if only is None else (only,):
        run, add_arguments, text = VERBS[name]
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
VERBS: Mapping[str, tuple[Callable[..., int], Callable[[argparse.ArgumentParser], None], str]] = {
    "ensure": (ensure, _add_ensure, "print the directory of a model, downloading it if it is absent"),
    "warm": (warm, _add_warm, "make sure of several models, downloading those that are absent"),
    "path": (path, _add_model, "print the directory of a model that is present"),
    "ls": (ls, lambda _: None, "list the models"),
    "info": (info, _add_model, "show what is known about a model"),
    "plan": (plan, _add_plan, "show what `ensure` would do"),
    "verify": (verify, _add_verify, "compare models with their records"),
    "rm": (rm, _add_rm, "remove a model, or what is left of an unfinished download"),
    "alias": (alias, _add_alias, "give a model a name that a pod can mount, or list the names"),
    "export": (export, _add_export, "write a model as one file, to import it where there is no network"),
    "import": (import_, _add_import, "take over a model from a file that `export` wrote, and print its directory"),
    "locks": (locks, _add_locks, "show who is downloading"),
    "doctor": (doctor, _add_doctor, "say what a volume is and can do, and what should be changed"),
    "initialize": (initialize, _add_initialize, "fill directories as KServe's storage initializer does"),
    "kserve": (kserve_patch, _add_kserve, "share a claim between the replicas of an InferenceService"),
    "webhook": (webhook, _add_webhook, "give pods the claims that a policy grants, as an admission webhook"),
}
