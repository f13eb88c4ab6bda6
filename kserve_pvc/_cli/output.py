"""
What the commands print: results on stdout, everything else on stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import attrs

from kserve_pvc._cli.streams import above_bars, flush, print_document, print_json, put, say
from kserve_pvc._model import Model
from kserve_pvc.errors import StoreError, printable

# As in `_store`, what `path` does not need is imported by the verb that uses it.
if TYPE_CHECKING:
    from kserve_pvc._download.warm import Warmed
    from kserve_pvc._keys.usage import KeyUsage
    from kserve_pvc._volume.verify import Verification


def fail(error: BaseException, *, verbose: bool) -> int:
    """
    Print an error, also one of another library, and return its exit code.
    """
    print_error(error, "", verbose=verbose)
    print_document({"error": describe_error(error)})
    return exit_code(error)


def stop(error: BaseException, message: str, code: int) -> int:
    """
    Print why a call was ended from outside and what is kept, and return its exit code.
    """
    say(message)
    say_kept(error)
    text = "; ".join([message, *_notes(error)])
    print_document({"error": {"type": type(error).__name__, "message": text}})
    return code


def print_error(error: BaseException, about: str, *, verbose: bool) -> None:
    if verbose:
        _print_traceback(error)
    else:
        say(f"{about}{_reason(error)}")
    say_kept(error)


def _print_traceback(error: BaseException) -> None:
    import traceback

    # Without the chain: the message of a foreign error may contain a signed URL.
    frames = traceback.format_tb(error.__traceback__)
    kind = f"{type(error).__module__}.{type(error).__qualname__}"
    text = f"{kind}: {error}\n" if isinstance(error, StoreError) else f"{_reason(error)}\n"
    with suppress(OSError), above_bars(sys.stderr):
        sys.stderr.writelines(["Traceback (most recent call last):\n", *frames, text])


def say_kept(error: BaseException) -> None:
    """
    Print how much of a download is kept that an error or an interrupt ended.
    """
    for note in _notes(error):
        say(note)


def _notes(error: BaseException) -> list[str]:
    notes = getattr(error, "__notes__", ())
    if not notes:
        return []
    from kserve_pvc._source.redaction import redact

    return [printable(redact(note)) for note in notes]


def describe_error(error: BaseException) -> dict[str, Any]:
    """
    Return the fields of an error in a document.
    """
    return {
        "type": type(error).__name__,
        "message": _reason(error),
        **(error.fields if isinstance(error, StoreError) else {}),
    }


def _reason(error: BaseException) -> str:
    if isinstance(error, StoreError):
        return str(error)
    from kserve_pvc._source.redaction import redact

    try:
        message = printable(redact(str(error)))  # It may contain a signed URL.
    except Exception:
        message = "its message cannot be shown"
    return f"{type(error).__name__}: {message}"


def show_warmed(warmed: Warmed, arguments: argparse.Namespace) -> None:
    if warmed.error is not None:
        print_error(warmed.error, f"{printable(warmed.uri)}: ", verbose=arguments.verbose)
    elif warmed.model is not None and not arguments.json and not arguments.quiet:
        with above_bars(sys.stdout):
            put(f"{warmed.model.status:10}  {printable(describe_model(warmed.model))}  {warmed.model.path}")
            flush()


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
        "error": None if warmed.error is None else describe_error(warmed.error),
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


def exit_code(error: BaseException) -> int:
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
    put(f"{'ok ' if report.ok else 'BAD'}  {printable(report.uri)}  ({checked})")
    for problem in report.problems:
        put(f"     {problem.kind}: {printable(problem.path)}: {printable(problem.detail)}")


def print_result(arguments: argparse.Namespace, document: Mapping[str, Any], line: str | None) -> None:
    if arguments.json:
        print_json(document)
    elif line is not None:
        put(line)


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """
    Print a table. On a terminal no line is wider than that; elsewhere, and for programs, every cell is whole.
    """
    from kserve_pvc._show.units import shorten

    shown = [tuple(printable(cell) for cell in row) for row in rows]
    widths = [max(len(row[i]) for row in [tuple(heads), *shown]) for i in range(len(heads))]
    widths = _fit(widths, heads, _columns())
    for row in [tuple(heads), *shown]:
        put("  ".join(shorten(cell, width).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


# What is shortened first. A key or a name may be wanted for the next command.
_LONG = ("URI", "FILE", "SHA256", "HOLDER")


def _fit(widths: Sequence[int], heads: Sequence[str], columns: int | None) -> list[int]:
    """Narrow the widest columns, those of long values first, until a line fits."""
    fitted = list(widths)
    if columns is None:
        return fitted
    for least, long_only in ((24, True), (12, False), (4, False)):
        while sum(fitted) + 2 * (len(fitted) - 1) > columns:
            candidates = [
                (width, number)
                for number, width in enumerate(fitted)
                if width > max(least, len(heads[number])) and (heads[number] in _LONG or not long_only)
            ]
            if not candidates:
                break
            fitted[max(candidates)[1]] -= 1
    return fitted


def _columns() -> int | None:
    """The width of standard output if it is a terminal, 80 if that is not known, or None."""
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or 80 if sys.stdout.isatty() else None
    except (OSError, ValueError):
        return None


@contextmanager
def log_to_stderr(*, verbose: bool = True) -> Iterator[None]:
    """
    Print every record of the package's logger during a call, such as why a source is read through its fsspec class.
    """
    if not verbose:
        yield
        return
    import logging

    class Handler(logging.StreamHandler):  # type: ignore[type-arg]
        def emit(self, record: logging.LogRecord) -> None:
            with above_bars(sys.stderr):
                super().emit(record)

    logger, handler = logging.getLogger("kserve_pvc"), Handler()
    handler.setFormatter(logging.Formatter("kserve-pvc: %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
