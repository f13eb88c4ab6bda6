"""
Standard output and standard error, which may be full, closed, or read by a program that has ended.

With `--json` a call prints one document, however it ends. What was printed is known here, so that an error or a signal
that comes later adds no second one.
"""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import datetime
from itertools import takewhile
from typing import TextIO

import attrs

from kserve_pvc.errors import VolumeError


class OutputClosedError(Exception):
    """
    The program that read standard output has ended, as in `kserve-pvc ls | head -1`.
    """


@attrs.define
class _Call:
    """
    What is known about the output of the running call.
    """

    as_json: bool = False
    has_document: bool = False


_call = _Call()


def begin(argv: Sequence[str]) -> None:
    """
    Start a call: find out whether it is to print a document, also if its arguments are wrong.
    """
    _call.as_json = any(len(word) > 2 and "--json".startswith(word) for word in takewhile("--".__ne__, argv))
    _call.has_document = False
    # A descriptor that is free would become that of a file on the volume, and `print` writes to the other stream.
    if sys.stdout is None:
        sys.stdout = _occupy(1, os.O_RDONLY)  # Cannot be written to, so what is printed is not lost in silence.
    if sys.stderr is None:
        sys.stderr = _occupy(2, os.O_WRONLY)


def _occupy(number: int, flags: int) -> TextIO:
    fd = os.open(os.devnull, flags | os.O_CLOEXEC)
    try:
        os.fstat(number)
    except OSError:
        os.dup2(fd, number)
        os.close(fd)
        fd = number
    return io.TextIOWrapper(io.BufferedWriter(io.FileIO(fd, "w", closefd=False)), encoding="utf-8")


def put(text: str, *, end: str = "\n") -> None:
    """
    Write a line to standard output.

    Raises:
        OutputClosedError: Its reader has ended.
        VolumeError: It cannot be written to.
    """
    with translating_output():
        try:
            sys.stdout.write(text + end)
        except UnicodeEncodeError:  # A path holds bytes that are not text, and is written as it is.
            sys.stdout.flush()
            sys.stdout.buffer.write(os.fsencode(text + end))


def print_json(document: object) -> None:
    """
    Print the document of this call.
    """
    text = json.dumps(document, default=_jsonable, skipkeys=True)
    _call.has_document = True
    put(text)


def print_document(document: object) -> bool:
    """
    Print the document of a call that ends here, if it is to print one and has not yet.

    Standard output that cannot be written to was reported before, or is as the call ends.

    Returns:
        Whether the call is to print a document.
    """
    if _call.as_json and not _call.has_document:
        with suppress(OutputClosedError, VolumeError):
            print_json(document)
    return _call.as_json


def put_help(text: str) -> None:
    """
    Print a help text, or the document that holds it.
    """
    if _call.as_json:
        print_json({"help": text})
    else:
        put(text, end="")


def _jsonable(value: object) -> object:
    return value.isoformat() if isinstance(value, datetime) else str(value)


def flush() -> None:
    """
    Write what is buffered to standard output.

    Raises:
        OutputClosedError, VolumeError: As `put`.
    """
    with translating_output():
        sys.stdout.flush()


def discard_unwritten() -> None:
    """
    Write what is buffered, and discard what cannot be written: Python would report it once more at its exit.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):  # The stream of a test has no descriptor.
                null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
                os.dup2(null, stream.fileno())
                os.close(null)


@contextmanager
def translating_output() -> Iterator[None]:
    """
    Translate what goes wrong when standard output is written to.
    """
    try:
        yield
    except BrokenPipeError as error:
        raise OutputClosedError from error
    except OSError as error:
        reason = os.strerror(error.errno or errno.EIO)
        raise VolumeError("standard output", "writing", reason, "redirect it to where there is room") from error


class BinaryOutput:
    """
    Standard output for bytes.
    """

    def write(self, data: bytes | memoryview) -> int:
        with translating_output():
            return sys.stdout.buffer.write(data)

    def flush(self) -> None:
        with translating_output():
            sys.stdout.buffer.flush()


def say(text: str) -> None:
    """
    Print a line for a person, on stderr. A log that is full ends nothing.
    """
    with suppress(OSError, ValueError), above_bars(sys.stderr):
        print(f"kserve-pvc: {text}", file=sys.stderr, flush=True)


def above_bars(stream: TextIO) -> AbstractContextManager[None]:
    """
    Write to a terminal on which a download may be drawing its bar.
    """
    if "tqdm" not in sys.modules:  # No bar is shown, so tqdm need not be loaded.
        return nullcontext()
    from kserve_pvc._show import progress

    return progress.above_bars(stream)
