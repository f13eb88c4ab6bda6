"""
Moving bytes: from a source that fails on cue, and from what dead writers left.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath

import pytest

from kserve_pvc import DigestMismatchError, FileEntry, InsufficientSpaceError, RemoteFile, SourceDeniedError, SourceUnavailableError
from kserve_pvc._record import PartNote
from kserve_pvc._transfer import Destination, Donor, Transfer
from kserve_pvc._volume import write_all
from kserve_pvc.locks.lease import LeaseLostError

PART = 1000


class Source:
    """
    Files in memory; `on_read` may raise or cut an answer short before each read of at most `piece` bytes.
    """

    def __init__(self, files: Mapping[str, bytes], piece: int = 100) -> None:
        self.files = files
        self.piece = piece
        self.ranges: list[tuple[str, int, int]] = []
        self.on_read: Callable[[str, int], bool] = lambda name, offset: True

    def remote(self, name: str, *, sha256: str | None = None, token: str | None = "t") -> RemoteFile:
        entry = FileEntry(path=name, size_bytes=len(self.files[name]), sha256=sha256, token=token)
        return RemoteFile(entry=entry, address=name, pin={})

    @contextmanager
    def open_range(self, file: RemoteFile, start: int, stop: int) -> Iterator[Source._Reader]:
        self.ranges.append((file.address, start, stop))
        yield Source._Reader(self, file.address, start, stop)

    class _Reader:
        def __init__(self, source: Source, name: str, start: int, stop: int) -> None:
            self.source, self.name, self.offset, self.stop = source, name, start, stop

        def readinto(self, buffer: memoryview) -> int:
            if not self.source.on_read(self.name, self.offset):
                return 0
            data = self.source.files[self.name][self.offset : min(self.stop, self.offset + min(self.source.piece, len(buffer)))]
            buffer[: len(data)] = data
            self.offset += len(data)
            return len(data)


class Recorder:
    """
    Counts what the transfer says; `check` may raise.
    """

    def __init__(self) -> None:
        self.adopted_bytes = self.received_bytes = self.retries = self.checks = 0
        self.lose_after = None

    def check(self) -> None:
        self.checks += 1
        if self.lose_after is not None and self.checks > self.lose_after:
            raise LeaseLostError

    def adopted(self, size_bytes: int) -> None:
        self.adopted_bytes += size_bytes

    def received(self, size_bytes: int) -> None:
        self.received_bytes += size_bytes

    def retried(self, reason: str, delay: float) -> None:
        self.retries += 1


class Place:
    """
    A directory that is written to, and what was noted in its journal.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.notes: list[PartNote] = []

    def destination(self) -> Destination:
        return Destination(create=self.create, write=write_all, finish=self.finish, note=self.notes.append, failure=self.failure)

    def create(self, path: PurePosixPath) -> int:
        return os.open(self.directory / path.name, os.O_RDWR | os.O_CREAT | os.O_EXCL)

    def finish(self, fd: int, path: PurePosixPath) -> None:
        os.close(fd)

    def failure(self, operation: str, path: PurePosixPath, error: OSError) -> Exception:
        return InsufficientSpaceError(operation, 0, 0)

    def donor(self, name: str) -> Donor:
        notes = tuple(note for note in self.notes if str(note.path) == name)
        return Donor(notes=notes, open_file=partial(opened, self.directory / name))


@contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    """
    Retry at once.
    """
    monkeypatch.setattr("kserve_pvc._transfer.delays", lambda _random: iter([0.0] * 4))


@pytest.fixture
def place(tmp_path):
    (tmp_path / "new").mkdir()
    return Place(tmp_path / "new")


@pytest.fixture
def dead(tmp_path):
    """
    What a writer left that died after two of three parts.
    """
    (tmp_path / "dead").mkdir()
    left, source, recorder = Place(tmp_path / "dead"), Source({"a.bin": DATA}), Recorder()

    def die(name: str, offset: int) -> bool:
        if offset >= 2 * PART + 500:
            raise SourceDeniedError("a.bin", "killed here")
        return True

    source.on_read = die
    with pytest.raises(SourceDeniedError):
        transfer(source, left, recorder).run([source.remote("a.bin")])
    return left


DATA = random.Random(1).randbytes(3 * PART)


def transfer(source: Source, place: Place, recorder: Recorder, donors: Mapping[PurePosixPath, list[Donor]] | None = None, workers: int = 1):
    return Transfer(
        backend=source, destination=place.destination(), donors=donors or {}, observer=recorder, part_bytes=PART, max_workers=workers
    )


def test_files_arrive_whole_and_are_noted_part_by_part(place):
    """
    Bytes, digests and notes are exact, for files of no, one and several parts.
    """
    source, recorder = Source({"a.bin": DATA, "b.bin": b"b" * PART, "empty": b""}), Recorder()

    entries = transfer(source, place, recorder, workers=3).run([source.remote(name) for name in source.files])

    assert {e.path.name: e.sha256 for e in entries} == {name: hashlib.sha256(data).hexdigest() for name, data in source.files.items()}
    assert {p.name: p.read_bytes() for p in place.directory.iterdir()} == source.files
    assert sorted(
        (str(n.path), n.stop, n.sha256 == hashlib.sha256(source.files[str(n.path)][: n.stop]).hexdigest()) for n in place.notes
    ) == [
        ("a.bin", PART, True),
        ("a.bin", 2 * PART, True),
        ("a.bin", 3 * PART, True),
        ("b.bin", PART, True),
        ("empty", 0, True),
    ]
    assert recorder.received_bytes == 4 * PART


def test_bytes_are_durable_before_they_are_noted(place, monkeypatch):
    """
    A note in the journal never speaks of bytes that a power failure could still take.
    """
    order: list[str] = []
    honest_note, honest_finish = place.notes.append, place.finish
    monkeypatch.setattr(os, "fdatasync", lambda fd: order.append("sync"))
    place.finish = lambda fd, path: (order.append("finish"), honest_finish(fd, path))
    source = Source({"a.bin": DATA})
    destination = place.destination()
    noted = Destination(
        create=destination.create,
        write=destination.write,
        finish=destination.finish,
        note=lambda note: (order.append("note"), honest_note(note)),
        failure=destination.failure,
    )

    Transfer(backend=source, destination=noted, donors={}, observer=Recorder(), part_bytes=PART).run([source.remote("a.bin")])

    assert order == ["sync", "note", "sync", "note", "finish", "note"]


def test_what_a_dead_writer_left_is_not_fetched_again(place, dead):
    """
    Parts that were noted are copied, and only the rest is asked for.
    """
    source, recorder = Source({"a.bin": DATA}), Recorder()

    transfer(source, place, recorder, {PurePosixPath("a.bin"): [dead.donor("a.bin")]}).run([source.remote("a.bin")])

    assert (place.directory / "a.bin").read_bytes() == DATA
    assert (recorder.adopted_bytes, recorder.received_bytes) == (2 * PART, PART)
    assert source.ranges == [("a.bin", 2 * PART, 3 * PART)]


@pytest.mark.parametrize(("position", "adopted"), [(0, 0), (PART - 1, 0), (PART, PART), (2 * PART - 1, PART), (2 * PART, 2 * PART)])
def test_only_bytes_that_prove_themselves_are_taken_over(place, dead, position, adopted):
    """
    A byte that changed after it was noted ends the takeover at the part before it.
    """
    left = bytearray((dead.directory / "a.bin").read_bytes())
    left[position] ^= 1
    (dead.directory / "a.bin").write_bytes(left)
    source, recorder = Source({"a.bin": DATA}), Recorder()

    transfer(source, place, recorder, {PurePosixPath("a.bin"): [dead.donor("a.bin")]}).run([source.remote("a.bin")])

    assert (place.directory / "a.bin").read_bytes() == DATA
    assert recorder.adopted_bytes == adopted


@pytest.mark.parametrize("token", ["another", None])
def test_nothing_is_taken_over_of_other_content(place, dead, token):
    """
    A note counts only for the token it was made with, and without a token for nothing.
    """
    source, recorder = Source({"a.bin": DATA}), Recorder()

    transfer(source, place, recorder, {PurePosixPath("a.bin"): [dead.donor("a.bin")]}).run([source.remote("a.bin", token=token)])

    assert recorder.adopted_bytes == 0
    assert (place.directory / "a.bin").read_bytes() == DATA


@pytest.mark.parametrize(
    "ruin", [Path.unlink, lambda path: path.write_bytes(DATA[: PART + 1]), lambda path: (path.unlink(), path.symlink_to("/"))]
)
def test_a_donor_that_is_gone_or_cut_short_costs_a_fetch(place, dead, ruin):
    """
    Whatever became of a dead writer's file, the new one is exact.
    """
    ruin(dead.directory / "a.bin")
    source, recorder = Source({"a.bin": DATA}), Recorder()

    transfer(source, place, recorder, {PurePosixPath("a.bin"): [dead.donor("a.bin")]}).run([source.remote("a.bin")])

    assert (place.directory / "a.bin").read_bytes() == DATA


def test_a_second_donor_goes_on_where_the_first_ended(place, dead, tmp_path):
    """
    What several dead writers left adds up.
    """
    first = Donor(notes=dead.donor("a.bin").notes[:1], open_file=dead.donor("a.bin").open_file)
    source, recorder = Source({"a.bin": DATA}), Recorder()

    transfer(source, place, recorder, {PurePosixPath("a.bin"): [first, dead.donor("a.bin")]}).run([source.remote("a.bin")])

    assert recorder.adopted_bytes == 2 * PART
    assert (place.directory / "a.bin").read_bytes() == DATA


def test_a_connection_that_breaks_goes_on_at_the_next_byte(place):
    """
    After a reset in the middle of a part nothing that arrived is asked for again.
    """
    source, recorder, broken = Source({"a.bin": DATA}), Recorder(), []

    def break_once(name: str, offset: int) -> bool:
        if offset == 1500 and not broken:
            broken.append(offset)
            raise SourceUnavailableError(name, "connection reset")
        return True

    source.on_read = break_once
    transfer(source, place, recorder).run([source.remote("a.bin")])

    assert (place.directory / "a.bin").read_bytes() == DATA
    assert source.ranges == [("a.bin", 0, PART), ("a.bin", PART, 2 * PART), ("a.bin", 1500, 2 * PART), ("a.bin", 2 * PART, 3 * PART)]
    assert (recorder.received_bytes, recorder.retries) == (len(DATA), 1)


def test_an_answer_that_ends_early_is_asked_for_again(place):
    """
    A short body is no end of file.
    """
    source, recorder, cut = Source({"a.bin": DATA}), Recorder(), []

    def cut_once(name: str, offset: int) -> bool:
        if offset == 700 and not cut:
            cut.append(offset)
            return False
        return True

    source.on_read = cut_once
    transfer(source, place, recorder).run([source.remote("a.bin")])

    assert (place.directory / "a.bin").read_bytes() == DATA
    assert recorder.retries == 1


def test_a_source_that_stays_away_is_given_up(place):
    """
    Tries without a byte in between are bounded.
    """
    source, recorder = Source({"a.bin": DATA}), Recorder()

    def reset(name: str, offset: int) -> bool:
        raise SourceUnavailableError(name, "connection refused")

    source.on_read = reset
    with pytest.raises(SourceUnavailableError):
        transfer(source, place, recorder).run([source.remote("a.bin")])

    assert (len(source.ranges), recorder.retries) == (5, 4)


def test_errors_that_no_retry_cures_are_not_retried(place):
    """
    Denied once is denied.
    """
    source, recorder = Source({"a.bin": DATA}), Recorder()

    def deny(name: str, offset: int) -> bool:
        raise SourceDeniedError(name, "expired")

    source.on_read = deny
    with pytest.raises(SourceDeniedError):
        transfer(source, place, recorder).run([source.remote("a.bin")])

    assert len(source.ranges) == 1


def test_a_digest_the_source_announced_is_checked(place):
    """
    Bytes of the right length and the wrong content fail the model.
    """
    source = Source({"a.bin": DATA})
    right, wrong = hashlib.sha256(DATA).hexdigest(), "0" * 64

    with pytest.raises(DigestMismatchError) as caught:
        transfer(source, place, Recorder()).run([source.remote("a.bin", sha256=wrong)])

    assert (caught.value.expected, caught.value.actual) == (f"sha256:{wrong}", f"sha256:{right}")


@pytest.mark.parametrize("attempt", range(20))
def test_the_first_failure_is_what_is_raised(place, attempt):
    """
    Workers that stop because another failed do not hide its error.
    """
    source = Source({f"{number}.bin": DATA for number in range(8)})

    def fail_one(name: str, offset: int) -> bool:
        if name == "3.bin" and offset > 500:
            raise SourceDeniedError(name, "expired")
        return True

    source.on_read = fail_one
    with pytest.raises(SourceDeniedError):
        transfer(source, place, Recorder(), workers=8).run([source.remote(name) for name in source.files])


def test_a_lost_lease_ends_the_transfer(place):
    """
    Once the claim is lost no further byte is written.
    """
    source, recorder = Source({"a.bin": DATA}), Recorder()
    recorder.lose_after = 5

    with pytest.raises(LeaseLostError):
        transfer(source, place, recorder).run([source.remote("a.bin")])

    assert recorder.received_bytes < len(DATA)


def test_an_error_of_the_volume_is_told_as_one(place, monkeypatch):
    """
    A write that fails is translated where the volume knows what it means.
    """
    source = Source({"a.bin": DATA})
    destination = place.destination()

    def write(fd: int, data: memoryview, offset: int) -> None:
        raise OSError(28, "No space left on device")

    broken = Destination(
        create=destination.create, write=write, finish=destination.finish, note=destination.note, failure=destination.failure
    )
    with pytest.raises(InsufficientSpaceError, match="writing"):
        Transfer(backend=source, destination=broken, donors={}, observer=Recorder()).run([source.remote("a.bin")])
