"""
Where a transfer writes, and who observes it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import PurePosixPath
from typing import Protocol

import attrs

from kserve_pvc._download.hashes import Hashes
from kserve_pvc._format.records import FileEntry
from kserve_pvc._source.contract import RemoteFile
from kserve_pvc.errors import StoreError


@attrs.frozen(kw_only=True)
class Destination:
    """
    Where a generation is written.

    `create` opens a new file, `allocate` reserves room for it, `write` puts bytes at an offset, `copy` puts those of
    another file there (from, to, start, stop), `finish` makes the file immutable and returns whether it is durable yet,
    which it is if requested, `note` appends to the journal the fields of a `PartNote`, `failure` says what an error of
    the volume means.
    """

    create: Callable[[PurePosixPath], int]
    allocate: Callable[[int, int], None]
    write: Callable[[int, memoryview, int], None]
    copy: Callable[[int, int, int, int], bool]
    finish: Callable[[int, PurePosixPath, bool, bool], bool]
    note: Callable[[PurePosixPath, str, int, int, str | None, int | None, bool], None]
    failure: Callable[[str, PurePosixPath, OSError], Exception]


@attrs.define(eq=False)
class Writing:
    """
    A file that is open at the destination. `is_adopted`: some of its bytes were taken over from another file.
    """

    destination: Destination
    file: RemoteFile
    fd: int
    hashes: Hashes
    is_adopted: bool = False

    def note(self, start: int, stop: int, crc32: int | None, *, is_front: bool) -> None:
        """
        Make a range durable and note it: by its own checksum, or by the digest of all up to its end at the front.
        """
        os.fdatasync(self.fd)
        path, token = self.file.entry.path, str(self.file.entry.token)
        if is_front and self.hashes.sha256 is not None:
            self.destination.note(path, token, 0, stop, self.hashes.so_far(), None, True)
        else:
            self.destination.note(path, token, start, stop, None, crc32, True)

    def finish(self, promised: str | None, *, is_durable: bool) -> FileEntry:
        """
        Make the complete file immutable, and note it.

        Args:
            promised: The digest by the source that it was found to have.
        """
        entry, sha256 = self.file.entry, self.hashes.so_far()
        is_durable = self.destination.finish(self.fd, entry.path, is_durable, entry.executable)
        self.destination.note(entry.path, str(entry.token), 0, entry.size_bytes, sha256, None, is_durable)
        return entry.with_digests(sha256, promised)

    def abandon(self) -> None:
        """
        Close a file that is not going to be complete.
        """
        with suppress(OSError):
            os.close(self.fd)


class Observer(Protocol):
    """
    Is notified of every byte, and ends the transfer by raising from `check`.
    """

    def check(self) -> None: ...

    def adopted(self, size_bytes: int) -> None: ...

    def received(self, size_bytes: int) -> None: ...

    def retried(self, reason: str, delay: float) -> None: ...


class TransferCancelledError(Exception):
    """Another worker failed first."""


@contextmanager
def naming_errors(destination: Destination, path: PurePosixPath) -> Iterator[None]:
    """
    Translate errors of the volume to those of the store.
    """
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        if error.errno is None:
            raise
        raise destination.failure("writing", path, error) from error
