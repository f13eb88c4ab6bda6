"""
Transfers on a source in memory that fails on cue, into a directory.
"""

from __future__ import annotations

import hashlib
import os
import random
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path, PurePosixPath

import attrs
import pytest

from kserve_pvc import (
    FileEntry,
    InsufficientSpaceError,
    RemoteFile,
    SourceDeniedError,
)
from kserve_pvc._download.adoption import Donor
from kserve_pvc._download.budget import BUFFERS, Budget, process_budget
from kserve_pvc._download.destination import Destination
from kserve_pvc._download.transfer import Transfer
from kserve_pvc._download.tuning import Tuning
from kserve_pvc._format.records import PartNote
from kserve_pvc._volume.calls import copy_range, trim, write_all
from kserve_pvc.locks.lease import LeaseLostError

PART = 1000
DATA = random.Random(1).randbytes(3 * PART)
# Ranges of a part where they would have 8 MiB at least, and pauses of no length.
SHORT = {"part_bytes": PART, "shortest_range_bytes": PART, "trickle_bytes": 50, "retry_first_seconds": 0.0}


class Source:
    """
    Files in memory, sent in pieces of at most `piece` bytes.

    `on_read` is called before each: it may raise, or return False to cut the response short, or None to say that
    nothing has come yet. `evidence` is the digest that the source returns on request.
    """

    def __init__(self, files: Mapping[str, bytes], piece: int = 100) -> None:
        self.files = files
        self.piece = piece
        self.ranges: list[tuple[str, int, int]] = []
        self.open = 0
        self.requested: list[str] = []
        self.digests: dict[str, str | None] = {}
        self.on_read: Callable[[str, int], bool | None] = lambda name, offset: True

    def remote(
        self, name: str, *, sha256: str | None = None, token: str | None = "t", digest: str | None = None
    ) -> RemoteFile:
        entry = FileEntry(path=name, size_bytes=len(self.files[name]), sha256=sha256, token=token)
        return RemoteFile(entry=entry, address=name, pin={}, digest=digest)

    def all(self) -> list[RemoteFile]:
        return [self.remote(name) for name in self.files]

    def evidence(self, file: RemoteFile) -> str | None:
        self.requested.append(file.address)
        return self.digests.get(file.address, file.digest)

    @contextmanager
    def open_range(self, file: RemoteFile, start: int, stop: int) -> Iterator[Source._Reader]:
        self.ranges.append((file.address, start, stop))
        self.open += 1
        try:
            yield Source._Reader(self, file.address, start, stop)
        finally:
            self.open -= 1

    class _Reader:
        def __init__(self, source: Source, name: str, start: int, stop: int) -> None:
            self.source, self.name, self.offset, self.stop = source, name, start, stop

        def readinto(self, buffer: memoryview) -> int | None:
            result = self.source.on_read(self.name, self.offset)
            if not result:
                return 0 if result is False else None
            data = self.source.files[self.name][
                self.offset : min(self.stop, self.offset + min(self.source.piece, len(buffer)))
            ]
            buffer[: len(data)] = data
            self.offset += len(data)
            return len(data)


class Recorder:
    """
    Counts what the transfer says; `check` may raise.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self.adopted_bytes = self.received_bytes = self.retries = self.checks = 0
        self.reasons: list[str] = []
        self.lose_after: int | None = None

    def check(self) -> None:
        self.checks += 1
        if self.lose_after is not None and self.checks > self.lose_after:
            raise LeaseLostError

    def adopted(self, size_bytes: int) -> None:
        with self._guard:
            self.adopted_bytes += size_bytes

    def received(self, size_bytes: int) -> None:
        with self._guard:
            self.received_bytes += size_bytes

    def retried(self, reason: str, delay: float) -> None:
        self.retries += 1
        self.reasons.append(reason)


class Place:
    """
    A directory that is written to, and what was noted in its journal. `events` says in which order.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self.notes: list[PartNote] = []
        self.events: list[str] = []

    def destination(self) -> Destination:
        return Destination(
            create=self.create,
            allocate=lambda fd, size: None,
            write=write_all,
            copy=copy_range,
            finish=self.finish,
            trim=trim,
            note=self.note,
            failure=self.failure,
        )

    def create(self, path: PurePosixPath) -> int:
        self.events.append(f"create {path}")
        return os.open(self.directory / path.name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)

    def finish(self, fd: int, path: PurePosixPath, is_large: bool, is_executable: bool) -> bool:
        self.events.append(f"finish {path}")
        os.fsync(fd)
        os.close(fd)
        return True

    def note(
        self,
        path: PurePosixPath,
        token: str,
        start: int,
        stop: int,
        sha256: str | None,
        crc32: int | None,
        is_durable: bool,
    ) -> None:
        self.events.append(f"note {path}")
        note = PartNote(
            path=path, token=token, start=start, stop=stop, sha256=sha256, crc32=crc32, is_durable=is_durable
        )
        self.notes.append(note)

    def failure(self, operation: str, path: PurePosixPath, error: OSError) -> Exception:
        return InsufficientSpaceError(f"{operation} {path}", 0, 0)

    def link(self, existing: Path, path: PurePosixPath) -> bool:
        os.link(existing, self.directory / path.name)
        return True

    def content(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.directory.iterdir()}


def donor(left: Place, name: str, place: Place, notes: Sequence[PartNote] | None = None, **changes: object) -> Donor:
    """
    What another writer left of a file, offered to the writer of `place`.
    """
    own = tuple(note for note in left.notes if str(note.path) == name) if notes is None else tuple(notes)
    path = left.directory / name
    return attrs.evolve(Donor(notes=own, open_file=partial(opened, path), link=partial(place.link, path)), **changes)


@contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def transfer(
    source: Source,
    place: Place,
    recorder: Recorder | None = None,
    donors: Mapping[str, Sequence[Donor]] | None = None,
    workers: int = 1,
    destination: Destination | None = None,
    budget: Budget | None = None,
    **tuning: object,
) -> Transfer:
    offered = {PurePosixPath(name): list(found) for name, found in (donors or {}).items()}
    return Transfer(
        uri="s3://bucket/model",
        backend=source,
        destination=destination or place.destination(),
        donors=offered,
        observer=recorder or Recorder(),
        tuning=Tuning(**{**SHORT, "max_workers": workers, **tuning}),
        budget=budget,
    )


def run(source: Source, place: Place, *args: object, **options: object) -> Mapping[PurePosixPath, FileEntry]:
    """
    Transfer all that a source has, listed on one page.
    """
    return transfer(source, place, *args, **options).run([source.all()])


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def md5(data: bytes) -> str:
    return "md5:" + hashlib.md5(data, usedforsecurity=False).hexdigest()


def is_true(note: PartNote, data: bytes) -> bool:
    """
    Whether a note says of some content what is so.
    """
    piece = data[note.start : note.stop]
    return (
        note.sha256 in (None, sha256(piece))
        and note.crc32 in (None, zlib.crc32(piece))
        and len(piece) == note.stop - note.start
    )


def workers_alive() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("kserve-pvc")]


def note(name: str, start: int, stop: int, *, is_durable: bool = True, **digest: object) -> PartNote:
    return PartNote(path=name, token="t", start=start, stop=stop, is_durable=is_durable, **digest)


KINDS = {"sha256": f"sha256:{sha256(DATA)}", "md5": md5(DATA), "crc32": f"crc32:{zlib.crc32(DATA):08x}"}


@contextmanager
def nothing_left_open() -> Iterator[None]:
    """
    However a transfer ends, its descriptors are closed, its threads over and its buffers released.
    """
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert set(os.listdir("/proc/self/fd")) <= before
    assert workers_alive() == []
    with ExitStack() as buffers:
        for _ in range(BUFFERS):
            buffers.enter_context(process_budget().buffer(partial(pytest.fail, "a buffer is still in use")))


def left_unfinished(directory: Path) -> Place:
    """
    What a writer leaves of `a.bin` that dies after two of its three parts.
    """
    left, source = Place(directory), Source({"a.bin": DATA})

    def die(name: str, offset: int) -> bool:
        if offset >= 2 * PART + 500:
            raise SourceDeniedError("a.bin", "killed here")
        return True

    source.on_read = die
    with pytest.raises(SourceDeniedError):
        run(source, left)
    left.notes = [note for note in left.notes if note.is_durable]  # It had no time to note more.
    return left
