"""
Where a transfer writes, and who observes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Protocol

import attrs

from kserve_pvc.errors import StoreError


@attrs.frozen(kw_only=True)
class Destination:
    """
    Where a generation is written.

    `create` opens a new file, `allocate` reserves room for it, `write` puts bytes at an offset, `copy` puts those of
    another file there (from, to, start, stop), `finish` makes the file immutable and closed, and durable if asked,
    `note` appends to the journal the fields of a `PartNote`, `failure` says what an error of the volume means.
    """

    create: Callable[[PurePosixPath], int]
    allocate: Callable[[int, int], None]
    write: Callable[[int, memoryview, int], None]
    copy: Callable[[int, int, int, int], bool]
    finish: Callable[[int, PurePosixPath, bool], None]
    note: Callable[[PurePosixPath, str, int, int, str | None, int | None], None]
    failure: Callable[[str, PurePosixPath, OSError], Exception]


class Observer(Protocol):
    """
    Hears of every byte, and ends the transfer by raising from `check`.
    """

    def check(self) -> None: ...

    def adopted(self, size_bytes: int) -> None: ...

    def received(self, size_bytes: int) -> None: ...

    def retried(self, reason: str, delay: float) -> None: ...


class TransferCancelledError(Exception):
    """Another worker failed first."""


@contextmanager
def naming_errors(destination: Destination, path: PurePosixPath) -> Iterator[None]:
    """Errors of the volume, in its words."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        if error.errno is None:
            raise
        raise destination.failure("writing", path, error) from error
