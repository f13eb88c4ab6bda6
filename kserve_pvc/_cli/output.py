"""
What the commands print: results on stdout, everything else on stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import attrs

from kserve_pvc._model import Model
from kserve_pvc._source.ref import redact
from kserve_pvc.errors import StoreError, printable

# As in `_store`, what `path` does not need is imported by the verb that uses it.
if TYPE_CHECKING:
    from kserve_pvc._download.warm import Warmed
    from kserve_pvc._keys.usage import KeyUsage
    from kserve_pvc._volume.verify import Verification


def fail(error: StoreError, *, as_json: bool, verbose: bool) -> int:
    """
    Print an error and return its exit code.
    """
    print_error(error, "", verbose=verbose)
    if as_json:
        print_json({"error": _failure(error)})
    return error.exit_code


def print_error(error: Exception, about: str, *, verbose: bool) -> None:
    if verbose and isinstance(error, StoreError):
        import traceback

        # Without the chain: the message of a foreign error may contain a signed URL.
        sys.stderr.writelines(traceback.format_exception(type(error), error, error.__traceback__, chain=False))
    else:
        say(f"{about}{_reason(error)}")
    say_kept(error)


def say_kept(error: BaseException) -> None:
    """
    Print how much of a download is kept that an error or an interrupt ended.
    """
    for note in getattr(error, "__notes__", ()):
        say(printable(redact(note)))


def _failure(error: Exception) -> dict[str, Any]:
    return {
        "type": type(error).__name__,
        "message": _reason(error),
        **(error.fields if isinstance(error, StoreError) else {}),
    }


def _reason(error: Exception) -> str:
    # The message of a foreign error may contain a signed URL.
    return str(error) if isinstance(error, StoreError) else f"{type(error).__name__}: {redact(str(error))}"


def show_warmed(warmed: Warmed, arguments: argparse.Namespace) -> None:
    if warmed.error is not None:
        print_error(warmed.error, f"{printable(warmed.uri)}: ", verbose=arguments.verbose)
    elif warmed.model is not None and not arguments.json and not arguments.quiet:
        print(f"{warmed.model.status:10}  {printable(describe_model(warmed.model))}  {warmed.model.path}", flush=True)


def describe_warmed(warmed: Warmed) -> dict[str, Any]:
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


def print_model(arguments: argparse.Namespace, model: Model) -> None:
    document = {**describe_identity(model), "status": model.status, "size_bytes": model.size_bytes}
    print_result(
        arguments,
        {**document, "bytes_fetched": model.bytes_fetched, "seconds": round(model.seconds, 3)},
        str(model.path),
    )


def format_age(seconds: float) -> str:
    """
    Format seconds as `h:mm:ss`. The age is by this node's clock, so a negative one means clock skew and is shown as 0.
    """
    minutes, rest = divmod(int(max(seconds, 0)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def exit_code(error: Exception) -> int:
    return error.exit_code if isinstance(error, StoreError) else 1


def describe_identity(model: Model) -> dict[str, Any]:
    return {"uri": model.uri, "key": model.key, "version": model.version, "path": model.path}


def describe_model(model: Model) -> str:
    """
    Return the URI with its revision and patterns, in which alone two models may differ.
    """
    parts = [model.uri]
    parts += [f"at {model.revision}"] if model.revision else []
    parts += [f"only {' '.join(model.allow_patterns)}"] if model.allow_patterns else []
    parts += [f"without {' '.join(model.ignore_patterns)}"] if model.ignore_patterns else []
    return " ".join(parts)


def describe_row(model: Model) -> dict[str, Any]:
    # Nothing can be pinned before there is eviction to be protected from.
    return {
        **describe_identity(model),
        "size_bytes": model.size_bytes,
        "files": model.files,
        "created_at": model.created_at,
        "pinned": False,
    }


def describe_damaged(key: KeyUsage) -> dict[str, Any]:
    """
    Return the row of a model that counts as absent, with what is damaged.
    """
    unknown = {"version": None, "path": None, "size_bytes": 0, "files": 0, "created_at": None, "pinned": False}
    return {"uri": key.uri, "key": key.key, **unknown, "damage": key.damage}


def describe_verification(report: Verification) -> dict[str, Any]:
    problems = [attrs.asdict(problem) for problem in report.problems]
    return {"uri": report.uri, "ok": report.ok, "files": report.files, "bytes": report.bytes, "problems": problems}


def print_verification(report: Verification) -> None:
    from kserve_pvc._show.units import count, format_bytes

    level = "digests" if report.level == "full" else "sizes"
    checked = f"{count(report.files, 'file')}, {format_bytes(report.bytes)}, {level}"
    print(f"{'ok ' if report.ok else 'BAD'}  {printable(report.uri)}  ({checked})")
    for problem in report.problems:
        print(f"     {problem.kind}: {printable(problem.path)}: {printable(problem.detail)}")


def print_result(arguments: argparse.Namespace, document: Mapping[str, Any], line: str | None) -> None:
    if arguments.json:
        print_json(document)
    elif line is not None:
        print(line)


def print_json(document: object) -> None:
    print(json.dumps(document, default=_jsonable))


def _jsonable(value: object) -> object:
    return value.isoformat() if isinstance(value, datetime) else str(value)


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    shown = [tuple(printable(cell) for cell in row) for row in rows]
    widths = [max(len(row[i]) for row in [tuple(heads), *shown]) for i in range(len(heads))]
    for row in [tuple(heads), *shown]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def log_to_stderr() -> None:
    """
    Print every record of the package's logger, such as why a source is read through its fsspec class.
    """
    import logging

    logger, handler = logging.getLogger("kserve_pvc"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("kserve-pvc: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)


def say(text: str) -> None:
    """
    Print a line for a person, on stderr.
    """
    print(f"kserve-pvc: {text}", file=sys.stderr)
