"""
Moving bytes: from a source that fails on cue, and from what dead writers left.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path, PurePosixPath

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import until

from kserve_pvc import (
    DigestMismatchError,
    FileEntry,
    InsufficientSpaceError,
    RemoteFile,
    SourceDeniedError,
    SourceUnavailableError,
)
from kserve_pvc._download.adoption import Donor
from kserve_pvc._download.budget import BUFFERS, Budget, process_budget
from kserve_pvc._download.destination import Destination
from kserve_pvc._download.transfer import Transfer
from kserve_pvc._download.tuning import Tuning
from kserve_pvc._format.records import PartNote
from kserve_pvc._volume.calls import copy_range, write_all
from kserve_pvc.locks.lease import LeaseLostError

PART = 1000
DATA = random.Random(1).randbytes(3 * PART)
# Ranges of a part where they would have 8 MiB at least, and pauses of no length.
SHORT = {"part_bytes": PART, "shortest_range_bytes": PART, "trickle_bytes": 50, "retry_first_seconds": 0.0}


class Source:
    """
    Files in memory, sent in pieces of at most `piece` bytes.

    `on_read` is asked before each: it may raise, or answer False to cut the answer short, or None to say that nothing
    has come for a moment. `evidence` is what the source says if it is asked for a digest.
    """

    def __init__(self, files: Mapping[str, bytes], piece: int = 100) -> None:
        self.files = files
        self.piece = piece
        self.ranges: list[tuple[str, int, int]] = []
        self.open = 0
        self.asked: list[str] = []
        self.answers: dict[str, str | None] = {}
        self.on_read: Callable[[str, int], bool | None] = lambda name, offset: True

    def remote(
        self, name: str, *, sha256: str | None = None, token: str | None = "t", digest: str | None = None
    ) -> RemoteFile:
        entry = FileEntry(path=name, size_bytes=len(self.files[name]), sha256=sha256, token=token)
        return RemoteFile(entry=entry, address=name, pin={}, digest=digest)

    def all(self) -> list[RemoteFile]:
        return [self.remote(name) for name in self.files]

    def evidence(self, file: RemoteFile) -> str | None:
        self.asked.append(file.address)
        return self.answers.get(file.address, file.digest)

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
            answer = self.source.on_read(self.name, self.offset)
            if not answer:
                return 0 if answer is False else None
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
            note=self.note,
            failure=self.failure,
        )

    def create(self, path: PurePosixPath) -> int:
        self.events.append(f"create {path}")
        return os.open(self.directory / path.name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)

    def finish(self, fd: int, path: PurePosixPath, is_large: bool) -> None:
        self.events.append(f"finish {path}")
        os.close(fd)

    def note(
        self, path: PurePosixPath, token: str, start: int, stop: int, sha256: str | None, crc32: int | None
    ) -> None:
        self.events.append(f"note {path}")
        self.notes.append(PartNote(path=path, token=token, start=start, stop=stop, sha256=sha256, crc32=crc32))

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


@pytest.fixture(autouse=True)
def nothing_is_left_open():
    """
    However a transfer ends, its descriptors are closed, its threads over and its share of the memory given back.
    """
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert set(os.listdir("/proc/self/fd")) <= before
    assert workers_alive() == []
    with ExitStack() as buffers:
        for _ in range(BUFFERS):
            buffers.enter_context(process_budget().buffer(partial(pytest.fail, "a buffer is still in use")))


def workers_alive() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("kserve-pvc")]


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path / "new")


@pytest.fixture
def dead(tmp_path):
    """
    What a writer left that died after two of three parts.
    """
    left, source = Place(tmp_path / "dead"), Source({"a.bin": DATA})

    def die(name: str, offset: int) -> bool:
        if offset >= 2 * PART + 500:
            raise SourceDeniedError("a.bin", "killed here")
        return True

    source.on_read = die
    with pytest.raises(SourceDeniedError):
        run(source, left)
    return left


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


def test_files_arrive_whole_and_are_noted_part_by_part(place):
    """
    Bytes, digests and notes are exact, for files of no, one and several parts.
    """
    source, recorder = Source({"a.bin": DATA, "b.bin": b"b" * PART, "empty": b""}), Recorder()

    entries = run(source, place, recorder, workers=1)

    assert {str(path): (e.sha256, e.token) for path, e in entries.items()} == {
        n: (sha256(data), "t") for n, data in source.files.items()
    }
    assert place.content() == source.files
    assert [
        (str(n.path), n.start, n.stop, n.sha256 == sha256(source.files[str(n.path)][: n.stop])) for n in place.notes
    ] == [
        ("a.bin", 0, PART, True),
        ("a.bin", 0, 2 * PART, True),
        ("a.bin", 0, 3 * PART, True),
        ("b.bin", 0, PART, True),
        ("empty", 0, 0, True),
    ]
    assert recorder.received_bytes == 4 * PART


@pytest.mark.parametrize("digest", ["sha256", "none"])
@pytest.mark.parametrize("workers", [1, 2, 4, 16])
def test_ranges_of_several_streams_make_the_same_file(place, digest, workers):
    """
    However many streams fetch a file, in whichever order, its bytes, digest and notes are true, and no byte is asked
    for twice.
    """
    files = {
        "big": random.Random(2).randbytes(40 * PART + 1),
        "odd": random.Random(3).randbytes(7 * PART - 1),
        "empty": b"",
    }
    source, recorder = Source(files), Recorder()
    source.on_read = lambda name, offset: time.sleep(random.random() / 2000) or True

    entries = run(source, place, recorder, workers=workers, digest=digest)

    assert place.content() == files
    assert {str(path): e.sha256 for path, e in entries.items()} == {
        n: sha256(d) if digest == "sha256" else None for n, d in files.items()
    }
    assert all(is_true(note, files[str(note.path)]) for note in place.notes)
    asked = [offset for name, start, stop in source.ranges if name == "big" for offset in range(start, stop)]
    assert sorted(asked) == list(range(len(files["big"])))
    assert (recorder.received_bytes, recorder.adopted_bytes) == (sum(map(len, files.values())), 0)


def test_a_range_ahead_of_the_front_is_proven_by_a_checksum_of_its_own(place):
    """
    While the front waits, what lies further on is noted with its CRC32, and the file's digest is right in the end.
    """
    source, ahead = Source({"a.bin": DATA}), threading.Event()

    def hold_the_front(name: str, offset: int) -> bool:
        if offset == 0:
            assert ahead.wait(10)
        return True

    source.on_read = hold_the_front
    destination = place.destination()

    def note(path, token, start, stop, sha256, crc32):
        destination.note(path, token, start, stop, sha256, crc32)
        if start:
            ahead.set()

    entries = run(source, place, workers=2, destination=attrs.evolve(destination, note=note))

    first = place.notes[0]
    assert (first.start > 0, first.sha256, first.crc32) == (True, None, zlib.crc32(DATA[first.start : first.stop]))
    assert entries[PurePosixPath("a.bin")].sha256 == sha256(DATA)
    assert place.content() == {"a.bin": DATA}


def test_wrong_bytes_ahead_of_the_front_change_the_digest(place, monkeypatch):
    """
    What is hashed behind the front is what lies on the volume: a byte that a volume lost is in the digest.
    """
    source, ahead = Source({"a.bin": DATA}), threading.Event()
    source.on_read = lambda name, offset: offset >= PART or ahead.wait(10)

    def spoil(fd: int, data: memoryview, offset: int) -> None:
        write_all(fd, data, offset)
        if offset <= 2 * PART + 50 < offset + len(data):
            write_all(fd, bytes([DATA[2 * PART + 50] ^ 1]), 2 * PART + 50)
            ahead.set()

    spoiled = DATA[: 2 * PART + 50] + bytes([DATA[2 * PART + 50] ^ 1]) + DATA[2 * PART + 51 :]
    entries = run(source, place, workers=3, destination=attrs.evolve(place.destination(), write=spoil))

    assert place.content() == {"a.bin": spoiled}
    assert entries[PurePosixPath("a.bin")].sha256 == sha256(spoiled)


def test_the_largest_file_comes_first(place):
    """
    Files of one page are begun by size, so that a large one is not alone at the end.
    """
    source = Source({"b": b"b" * 10, "a": b"a" * 10, "z": b"z" * 900, "m": b"m" * 500})

    run(source, place, workers=1)

    assert [name for name, _, _ in source.ranges] == ["z", "m", "b", "a"]


def test_a_page_is_fetched_while_the_next_is_listed(place):
    """
    The first files are there before the listing is complete.
    """
    source = Source({"a": b"a" * 10, "b": b"b" * 20})

    def pages() -> Iterator[list[RemoteFile]]:
        yield [source.remote("a")]
        yield []
        until(lambda: "note a" in place.events, 10)
        yield [source.remote("b")]

    entries = transfer(source, place).run(pages())

    assert (place.content(), {str(path) for path in entries}) == (source.files, {"a", "b"})


def test_bytes_are_durable_before_they_are_noted(place, monkeypatch):
    """
    A note in the journal never speaks of bytes that a power failure could still take.
    """
    monkeypatch.setattr(os, "fdatasync", lambda fd: place.events.append("sync"))
    source = Source({"a.bin": DATA})

    run(source, place)

    assert place.events == ["create a.bin", *["sync", "note a.bin"] * 2, "finish a.bin", "note a.bin"]


def test_a_failed_sync_is_never_noted(place, monkeypatch):
    """
    Bytes of which nobody knows whether they are on the volume are spoken of in no note, and the transfer fails.
    """

    def fail(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail)

    with pytest.raises(InsufficientSpaceError, match=r"writing a\.bin"):
        run(Source({"a.bin": DATA}), place, workers=3)

    assert place.notes == []


def test_only_large_files_are_made_durable_one_by_one(place):
    """
    Small files are left to the sync of the whole tree.
    """
    source, said = Source({"large": b"l" * PART, "small": b"s" * (PART - 1)}), {}

    def finish(fd: int, path: PurePosixPath, is_large: bool) -> None:
        said[str(path)] = is_large
        os.close(fd)

    run(source, place, destination=attrs.evolve(place.destination(), finish=finish))

    assert said == {"large": True, "small": False}


def test_what_a_dead_writer_left_is_not_fetched_again(place, dead):
    """
    Parts that were noted are copied, and only the rest is asked for.
    """
    source, recorder = Source({"a.bin": DATA}), Recorder()

    entries = run(source, place, recorder, {"a.bin": [donor(dead, "a.bin", place)]})

    assert place.content() == {"a.bin": DATA}
    assert entries[PurePosixPath("a.bin")].sha256 == sha256(DATA)
    assert (recorder.adopted_bytes, recorder.received_bytes) == (2 * PART, PART)
    assert source.ranges == [("a.bin", 2 * PART, 3 * PART)]


@pytest.mark.parametrize(
    ("position", "adopted"), [(0, 0), (PART - 1, 0), (PART, PART), (2 * PART - 1, PART), (2 * PART, 2 * PART)]
)
def test_only_bytes_that_prove_themselves_are_taken_over(place, dead, position, adopted):
    """
    A byte that changed after it was noted ends the takeover at the part before it.
    """
    left = bytearray((dead.directory / "a.bin").read_bytes())
    left[position] ^= 1
    (dead.directory / "a.bin").write_bytes(left)
    source, recorder = Source({"a.bin": DATA}), Recorder()

    run(source, place, recorder, {"a.bin": [donor(dead, "a.bin", place)]})

    assert place.content() == {"a.bin": DATA}
    assert recorder.adopted_bytes == adopted


@pytest.mark.parametrize("digest", ["sha256", "none"])
@pytest.mark.parametrize("token", ["another", None])
def test_nothing_is_taken_over_of_other_content(place, dead, token, digest):
    """
    A note counts only for the token it was made with, and without a token for nothing.
    """
    source, recorder = Source({"a.bin": DATA}), Recorder()

    transfer(source, place, recorder, {"a.bin": [donor(dead, "a.bin", place)]}, digest=digest).run(
        [[source.remote("a.bin", token=token)]]
    )

    assert recorder.adopted_bytes == 0
    assert place.content() == {"a.bin": DATA}


@pytest.mark.parametrize("digest", ["sha256", "none"])
@pytest.mark.parametrize(
    "ruin",
    [Path.unlink, lambda path: path.write_bytes(DATA[: PART + 1]), lambda path: (path.unlink(), path.symlink_to("/"))],
)
def test_a_donor_that_is_gone_or_cut_short_costs_a_fetch(place, dead, ruin, digest):
    """
    Whatever became of a dead writer's file, the new one is exact.
    """
    ruin(dead.directory / "a.bin")
    source, recorder = Source({"a.bin": DATA}), Recorder()

    run(source, place, recorder, {"a.bin": [donor(dead, "a.bin", place)]}, digest=digest)

    assert place.content() == {"a.bin": DATA}
    assert recorder.adopted_bytes + recorder.received_bytes == len(DATA)


def test_a_second_donor_goes_on_where_the_first_ended(place, dead):
    """
    What several dead writers left adds up.
    """
    both = donor(dead, "a.bin", place)
    source, recorder = Source({"a.bin": DATA}), Recorder()

    run(source, place, recorder, {"a.bin": [attrs.evolve(both, notes=both.notes[:1]), both]})

    assert recorder.adopted_bytes == 2 * PART
    assert place.content() == {"a.bin": DATA}


def test_a_hole_in_what_was_left_is_fetched(place, dead):
    """
    A beginning and a range further on are taken over, and only what lies between is asked for.
    """
    (dead.directory / "a.bin").write_bytes(DATA)
    notes = [
        note("a.bin", 0, PART, sha256=sha256(DATA[:PART])),
        note("a.bin", 2 * PART, 3 * PART, crc32=zlib.crc32(DATA[2 * PART :])),
    ]
    source, recorder = Source({"a.bin": DATA}), Recorder()

    entries = run(source, place, recorder, {"a.bin": [donor(dead, "a.bin", place, notes)]})

    assert source.ranges == [("a.bin", PART, 2 * PART)]
    assert entries[PurePosixPath("a.bin")].sha256 == sha256(DATA)
    assert (place.content(), recorder.adopted_bytes) == ({"a.bin": DATA}, 2 * PART)


def note(name: str, start: int, stop: int, **digest: object) -> PartNote:
    return PartNote(path=name, token="t", start=start, stop=stop, **digest)


@pytest.mark.parametrize(("digest", "adopted"), [("sha256", 0), ("none", 2 * PART)])
def test_bytes_without_a_digest_are_for_those_who_want_none(place, dead, digest, adopted):
    """
    Notes of a store that does not hash are believed by such a store and by no other.
    """
    (dead.directory / "a.bin").write_bytes(DATA)
    source, recorder = Source({"a.bin": DATA}), Recorder()

    run(
        source,
        place,
        recorder,
        {"a.bin": [donor(dead, "a.bin", place, [note("a.bin", PART, 3 * PART)])]},
        digest=digest,
    )

    assert (recorder.adopted_bytes, place.content()) == (adopted, {"a.bin": DATA})


SIZE = 12 * 10
CONTENT = random.Random(5).randbytes(SIZE)
BOUNDS = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(sorted)
LEFT = st.lists(
    st.tuples(
        st.lists(st.tuples(BOUNDS, st.sampled_from(["sha256", "crc32", "whole", "longer"])), max_size=5),
        st.lists(st.integers(0, SIZE - 1), max_size=3),
        st.integers(0, SIZE) | st.just(SIZE),
    ),
    max_size=4,
)


@settings(max_examples=150, deadline=None, database=None)
@given(left=LEFT, workers=st.sampled_from([1, 4]), order=st.randoms(use_true_random=False), links=st.booleans())
def test_whatever_was_left_the_file_is_exact(left, workers, order, links):
    """
    From any donors with any overlapping notes and any damage the same bytes come out, and each is either taken over or
    fetched.
    """
    with tempfile.TemporaryDirectory() as directory:
        place, found = Place(Path(directory, "new")), []
        for number, (ranges, damage, length) in enumerate(left):
            content = bytearray(CONTENT)
            for position in damage:
                content[position] ^= 1
            (dead := Place(Path(directory, str(number)))).directory.joinpath("f").write_bytes(content[:length])
            notes = [noted(start, stop, kind) for (start, stop), kind in ranges]
            order.shuffle(notes)
            found.append(
                donor(dead, "f", place, notes) if links else donor(dead, "f", place, notes, link=lambda path: False)
            )
        source, recorder = Source({"f": CONTENT}, piece=7), Recorder()
        entries = run(source, place, recorder, {"f": found}, workers=workers, part_bytes=10, shortest_range_bytes=10)

        assert place.content() == {"f": CONTENT}
        assert entries[PurePosixPath("f")].sha256 == sha256(CONTENT)
        assert recorder.adopted_bytes + recorder.received_bytes == SIZE
        fetched = sum(stop - start for _, start, stop in source.ranges)
        assert (fetched, all(is_true(n, CONTENT) for n in place.notes)) == (recorder.received_bytes, True)


def noted(start: int, stop: int, kind: str) -> PartNote:
    """
    A note as it was right when it was made.
    """
    if kind == "crc32":
        return note("f", start, stop, crc32=zlib.crc32(CONTENT[start:stop]))
    end = {"sha256": stop, "whole": SIZE, "longer": SIZE + stop}[kind]
    return note("f", 0, end, sha256=sha256(CONTENT[:end]))


def whole(dead: Place, data: bytes = DATA) -> PartNote:
    (dead.directory / "a.bin").write_bytes(data)
    return note("a.bin", 0, len(data), sha256=sha256(data))


def test_a_whole_file_gets_a_second_name(place, dead):
    """
    A file that proves itself is linked: not a byte is fetched or written, and its bytes are the same ones.
    """
    source, recorder = Source({"a.bin": DATA}), Recorder()

    entries = run(source, place, recorder, {"a.bin": [donor(dead, "a.bin", place, [whole(dead)])]})

    assert (place.directory / "a.bin").samefile(dead.directory / "a.bin")
    assert entries[PurePosixPath("a.bin")] == FileEntry(
        path="a.bin", size_bytes=3 * PART, token="t", sha256=sha256(DATA)
    )
    assert (recorder.adopted_bytes, recorder.received_bytes, source.ranges, place.events) == (
        3 * PART,
        0,
        [],
        ["note a.bin"],
    )


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "ruin",
    [
        lambda path: flip(path, 0),
        lambda path: flip(path, 3 * PART - 1),
        lambda path: path.write_bytes(DATA[:-1]),
        lambda path: path.write_bytes(DATA + b"x"),
        Path.unlink,
    ],
    ids=["first-byte", "last-byte", "shorter", "longer", "gone"],
)
def test_a_file_that_does_not_prove_itself_is_never_shared(place, dead, ruin):
    """
    Damaged, cut, grown or gone: nothing is linked, and the new file is exact.
    """
    offered = donor(dead, "a.bin", place, [whole(dead)])
    ruin(dead.directory / "a.bin")

    run(Source({"a.bin": DATA}), place, donors={"a.bin": [offered]})

    assert place.content() == {"a.bin": DATA}
    assert (place.directory / "a.bin").stat().st_nlink == 1


@pytest.mark.parametrize("kind", ["sha256", "md5", "crc32"])
@pytest.mark.parametrize("workers", [1, 4])
def test_what_was_left_gives_way_to_what_the_source_vouches_for(place, dead, kind, workers):
    """
    Bytes that are as their writer noted, and still not what the source has, cost a fetch of the whole file and no
    failure.
    """
    left = bytes([DATA[0] ^ 1]) + DATA[1 : 2 * PART]
    (dead.directory / "a.bin").write_bytes(left)
    offered = donor(dead, "a.bin", place, [note("a.bin", 0, 2 * PART, sha256=sha256(left))])
    source = Source({"a.bin": DATA})

    entries = transfer(source, place, None, {"a.bin": [offered]}, workers).run(
        [[source.remote("a.bin", digest=KINDS[kind])]]
    )

    assert place.content() == {"a.bin": DATA}
    found = entries[PurePosixPath("a.bin")]
    assert (found.sha256, found.evidence) == (sha256(DATA), KINDS[kind])


@pytest.mark.parametrize("workers", [1, 4])
def test_a_source_that_contradicts_itself_fails_after_one_more_fetch(place, dead, workers):
    """
    If all of it was fetched and it still is not what the source said, the model fails.
    """
    source = Source({"a.bin": DATA})

    with pytest.raises(DigestMismatchError):
        transfer(source, place, None, {"a.bin": [donor(dead, "a.bin", place)]}, workers).run(
            [[source.remote("a.bin", sha256="0" * 64)]]
        )

    assert sum(stop - start for _, start, stop in source.ranges) == 4 * PART


def test_a_whole_file_of_another_digest_is_never_shared(place, dead):
    """
    Where the source announces a SHA-256, a file that proves to be another is not linked, whatever its token.
    """
    other = bytes([DATA[0] ^ 1]) + DATA[1:]
    offered = donor(dead, "a.bin", place, [whole(dead, other)])
    source = Source({"a.bin": DATA})

    transfer(source, place, None, {"a.bin": [offered]}).run([[source.remote("a.bin", sha256=sha256(DATA))]])

    assert place.content() == {"a.bin": DATA}


def refuse(path: PurePosixPath) -> bool:
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize("link", [lambda path: False, refuse], ids=["cannot", "may-not"])
def test_a_file_that_cannot_be_linked_is_copied(place, dead, link):
    """
    Where there are no hard links a whole file is taken over byte by byte.
    """
    source, recorder = Source({"a.bin": DATA}), Recorder()

    run(source, place, recorder, {"a.bin": [donor(dead, "a.bin", place, [whole(dead)], link=link)]})

    assert (place.content(), (place.directory / "a.bin").stat().st_nlink) == ({"a.bin": DATA}, 1)
    assert (recorder.adopted_bytes, source.ranges) == (3 * PART, [])


def test_a_file_that_was_not_closed_for_good_is_never_shared(place, dead):
    """
    What a dead writer left of a file is copied even if all but its end is there: its inode stays its own.
    """
    run(Source({"a.bin": DATA}), place, donors={"a.bin": [donor(dead, "a.bin", place)]})

    assert not (place.directory / "a.bin").samefile(dead.directory / "a.bin")


def test_a_store_that_does_not_hash_shares_nothing(place, dead):
    """
    Without digests nothing proves that a file of somebody else is whole, so it is copied.
    """
    recorder = Recorder()
    run(
        Source({"a.bin": DATA}), place, recorder, {"a.bin": [donor(dead, "a.bin", place, [whole(dead)])]}, digest="none"
    )

    assert (place.directory / "a.bin").stat().st_nlink == 1
    assert (place.content(), recorder.adopted_bytes) == ({"a.bin": DATA}, 3 * PART)


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
    run(source, place, recorder)

    assert place.content() == {"a.bin": DATA}
    assert source.ranges == [
        ("a.bin", 0, PART),
        ("a.bin", PART, 2 * PART),
        ("a.bin", 1500, 2 * PART),
        ("a.bin", 2 * PART, 3 * PART),
    ]
    assert (recorder.received_bytes, recorder.retries) == (len(DATA), 1)


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("digest", ["sha256", "none"])
def test_a_source_that_breaks_all_the_time_is_worn_down(place, workers, digest):
    """
    As long as every try brings something, any number of breaks leaves a file exact.
    """
    data, bits = random.Random(4).randbytes(20 * PART), random.Random(6)
    source, recorder = Source({"a.bin": data, "small": data[:999]}), Recorder()
    last = threading.local()

    def break_often(name: str, offset: int) -> bool:
        is_first = getattr(last, "seen", None) != (name, offset - 100)
        last.seen = (name, offset)
        if not is_first and bits.random() < 0.2:
            raise SourceUnavailableError(name, "reset")
        return True

    source.on_read = break_often
    entries = run(source, place, recorder, workers=workers, digest=digest)

    assert place.content() == source.files
    assert (recorder.received_bytes, recorder.retries > 10) == (20_999, True)
    assert entries[PurePosixPath("a.bin")].sha256 == (sha256(data) if digest == "sha256" else None)


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
    run(source, place, recorder)

    assert place.content() == {"a.bin": DATA}
    assert recorder.retries == 1


def test_moments_without_a_byte_are_no_failure(place):
    """
    A source that says nothing for a moment is asked again on the same connection, and the observer is heard meanwhile.
    """
    source, recorder, silent = Source({"a.bin": DATA}), Recorder(), iter([None, None, True] * 100)
    source.on_read = lambda name, offset: next(silent)

    run(source, place, recorder)

    assert (place.content(), recorder.retries, len(source.ranges)) == ({"a.bin": DATA}, 0, 3)
    assert recorder.checks >= 90


@pytest.mark.parametrize("trickle", [0, 20], ids=["silence", "trickle"])
def test_a_connection_that_stalls_is_replaced(place, trickle):
    """
    Silence and next to nothing are both ended after the time of a stall, and what had come is kept.
    """
    source, recorder, stalled = Source({"a.bin": DATA}, piece=10), Recorder(), []

    def stall(name: str, offset: int) -> bool | None:
        if offset >= 1500 + trickle and len(source.ranges) == 2:
            stalled.append(offset)
            time.sleep(0.01)
            return None
        if trickle and offset >= 1500 and len(source.ranges) == 2:
            time.sleep(0.05)
        return True

    source.on_read = stall
    run(source, place, recorder, stall_seconds=0.1)

    assert (place.content(), recorder.retries, bool(stalled)) == ({"a.bin": DATA}, 1, True)
    assert source.ranges[2] == ("a.bin", stalled[-1], 2 * PART)
    assert " bytes of `a.bin` came in " in recorder.reasons[0]


def test_a_source_that_stalls_for_ever_is_given_up(place):
    """
    Connections that stay silent end the transfer like those that break.
    """
    source, recorder = Source({"a.bin": DATA}), Recorder()
    source.on_read = lambda name, offset: time.sleep(0.005)

    with pytest.raises(SourceUnavailableError, match=r"only 0 bytes of `a\.bin` came in"):
        run(source, place, recorder, stall_seconds=0.02)

    assert (len(source.ranges), recorder.retries) == (5, 4)


def test_a_slow_source_is_no_stall(place):
    """
    Whoever brings more than a trickle in the time of a stall is left alone, however long it takes.
    """
    source, recorder = Source({"a.bin": DATA}), Recorder()
    source.on_read = lambda name, offset: time.sleep(0.02) or True

    run(source, place, recorder, stall_seconds=0.03)

    assert (place.content(), recorder.retries) == ({"a.bin": DATA}, 0)


def test_a_source_that_stays_away_is_given_up(place):
    """
    Tries without a byte in between are bounded.
    """
    source, recorder = Source({"a.bin": DATA}), Recorder()

    def reset(name: str, offset: int) -> bool:
        raise SourceUnavailableError(name, "connection refused")

    source.on_read = reset
    with pytest.raises(SourceUnavailableError):
        run(source, place, recorder)

    assert (len(source.ranges), recorder.retries) == (5, 4)


def test_bytes_that_arrive_start_the_count_anew(place):
    """
    Four tries without progress, some bytes, and four more tries are no reason to give up.
    """
    source, recorder, tries = Source({"a.bin": DATA[:900]}), Recorder(), []

    def reset(name: str, offset: int) -> bool:
        tries.append(offset)
        if tries.count(offset) < 5 and offset in (0, 100, 800):
            raise SourceUnavailableError(name, "connection refused")
        return True

    source.on_read = reset
    run(source, place, recorder)

    assert (place.content(), recorder.retries) == ({"a.bin": DATA[:900]}, 12)


def test_a_busy_source_is_left_alone_for_as_long_as_it_asks(place):
    """
    Retry-After of one range holds back every stream: no range is asked for before it is over.
    """
    files = {f"{number:02d}": DATA[:500] for number in range(24)}
    source, recorder, told, opened_at = Source(files), Recorder(), [], []

    def busy_once(name: str, offset: int) -> bool:
        time.sleep(0.005)
        if name == "02" and not told:
            told.append(time.monotonic())
            raise SourceUnavailableError(name, "busy", retry_after=0.5)
        return True

    source.on_read = busy_once
    honest = source.open_range
    source.open_range = lambda *args: (opened_at.append(time.monotonic()), honest(*args))[1]
    run(source, place, recorder, workers=4)

    assert (place.content(), recorder.retries) == (files, 1)
    assert [moment for moment in opened_at if told[0] + 0.1 < moment < told[0] + 0.49] == []
    assert max(opened_at) >= told[0] + 0.5


def test_a_busy_source_is_asked_as_long_as_time_is_left(place):
    """
    Who says that it is busy may say so more often than a connection may break.
    """
    source, recorder = Source({"a.bin": DATA[:500]}), Recorder()

    def busy(name: str, offset: int) -> bool:
        if recorder.retries < 6:
            raise SourceUnavailableError(name, "busy", retry_after=0.01)
        return True

    source.on_read = busy
    run(source, place, recorder)

    assert (place.content(), recorder.retries) == ({"a.bin": DATA[:500]}, 6)


@pytest.mark.parametrize(("asked", "least"), [(3600.0, 0.0), (0.1, 0.2)])
def test_the_deadline_bounds_what_a_busy_source_may_ask_for(place, asked, least):
    """
    A wait that would end after the deadline is not begun, and waits together do not go beyond it.
    """
    source, recorder, began = Source({"a.bin": DATA}), Recorder(), time.monotonic()

    def busy(name: str, offset: int) -> bool:
        raise SourceUnavailableError(name, "busy", retry_after=asked)

    source.on_read = busy
    with pytest.raises(SourceUnavailableError, match="busy"):
        run(source, place, recorder, retry_seconds=0.35)

    assert least <= time.monotonic() - began < 2


@pytest.mark.parametrize("step", ["bytes", "evidence"])
@pytest.mark.parametrize(
    "error",
    [SourceDeniedError("a", "expired"), SourceUnavailableError("a", "moved", is_final=True)],
    ids=["denied", "final"],
)
def test_errors_that_no_retry_cures_are_not_retried(place, error, step):
    """
    Denied once is denied, and what is final stays so.
    """
    source, recorder, calls = Source({"a.bin": DATA}), Recorder(), []

    def fail(*_: object) -> None:
        calls.append(1)
        raise error

    setattr(source, "on_read" if step == "bytes" else "evidence", fail)
    with pytest.raises(type(error)) as caught:
        run(source, place, recorder, evidence_bytes=1000)

    assert (caught.value, len(calls), recorder.retries) == (error, 1, 0)


def test_a_source_that_is_asked_for_a_digest_may_be_away_for_a_moment(place):
    """
    The question for evidence is asked as patiently as that for bytes.
    """
    source, recorder = Source({"a.bin": DATA}), Recorder()

    def evidence(file: RemoteFile) -> str:
        if recorder.retries < 3:
            raise SourceUnavailableError("a.bin", "reset")
        return f"sha256:{sha256(DATA)}"

    source.evidence = evidence
    entries = run(source, place, recorder, evidence_bytes=1000)

    assert (recorder.retries, entries[PurePosixPath("a.bin")].evidence) == (3, f"sha256:{sha256(DATA)}")


KINDS = {"sha256": f"sha256:{sha256(DATA)}", "md5": md5(DATA), "crc32": f"crc32:{zlib.crc32(DATA):08x}"}


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("digest", ["sha256", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_source_vouches_for_is_compared(place, kind, digest, workers):
    """
    A digest of the listing is compared, whatever the store itself hashes, and the record says which it was.
    """
    source = Source({"a.bin": DATA})
    entries = transfer(source, place, workers=workers, digest=digest).run(
        [[source.remote("a.bin", digest=KINDS[kind])]]
    )

    # A store that does not hash has no SHA-256 to compare with.
    expected = None if (kind, digest) == ("sha256", "none") else KINDS[kind]
    assert entries[PurePosixPath("a.bin")].evidence == expected
    assert place.content() == {"a.bin": DATA}


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize(
    ("kind", "digest"),
    [("sha256", "sha256"), ("md5", "sha256"), ("crc32", "sha256"), ("md5", "none"), ("crc32", "none")],
)
@pytest.mark.parametrize("size", [500, 3 * PART], ids=["small", "parts"])
def test_bytes_that_contradict_the_source_fail_the_model(place, kind, digest, workers, size):
    """
    Bytes of the right length and the wrong content fail the model, for small files and for those in parts.
    """
    right, wrong = DATA[:size], bytes([DATA[0] ^ 1]) + DATA[1:size]
    promised = {"sha256": f"sha256:{sha256(right)}", "md5": md5(right), "crc32": f"crc32:{zlib.crc32(right):08x}"}[kind]
    source = Source({"a.bin": wrong})

    with pytest.raises(DigestMismatchError) as caught:
        transfer(source, place, workers=workers, digest=digest).run([[source.remote("a.bin", digest=promised)]])

    assert (caught.value.path, caught.value.expected) == ("a.bin", promised)
    assert caught.value.actual != promised


def test_a_digest_the_source_announced_is_checked(place):
    """
    The SHA-256 of an entry is compared, and the error says both.
    """
    source = Source({"a.bin": DATA})

    with pytest.raises(DigestMismatchError) as caught:
        transfer(source, place).run([[source.remote("a.bin", sha256="0" * 64)]])

    assert (caught.value.expected, caught.value.actual) == (f"sha256:{'0' * 64}", f"sha256:{sha256(DATA)}")


def test_a_digest_of_a_kind_nobody_knows_is_no_evidence(place):
    """
    What cannot be compared is neither a failure nor a proof.
    """
    source = Source({"a.bin": DATA})

    entries = transfer(source, place).run([[source.remote("a.bin", digest="xxh3:0123456789abcdef")]])

    assert entries[PurePosixPath("a.bin")].evidence is None


def test_what_only_looked_like_an_md5_is_no_reason_to_fail(place):
    """
    Where the source itself says that the digest of its listing is none, the bytes are taken.
    """
    source = Source({"a.bin": DATA})
    source.answers["a.bin"] = None

    entries = transfer(source, place).run([[source.remote("a.bin", digest=md5(b"other"))]])

    assert (entries[PurePosixPath("a.bin")].evidence, source.asked) == (None, ["a.bin"])


@pytest.mark.parametrize("kind", ["sha256", "crc32"])
@pytest.mark.parametrize("is_right", [True, False])
@pytest.mark.parametrize("size", [500, 3 * PART], ids=["small", "parts"])
@pytest.mark.parametrize("digest", ["sha256", "none"])
def test_an_md5_that_the_source_replaces_by_another_digest_is_compared_with_that(place, kind, is_right, size, digest):
    """
    Where the listing's MD5 fits not, and the source vouches for another digest, that one decides.
    """
    right = DATA[:size]
    sent = right if is_right else bytes([DATA[0] ^ 1]) + right[1:]
    source = Source({"a.bin": sent})
    source.answers["a.bin"] = {"sha256": f"sha256:{sha256(right)}", "crc32": f"crc32:{zlib.crc32(right):08x}"}[kind]
    made = transfer(source, place, digest=digest)
    # An MD5 of the right bytes, which were spoiled on the way, or of none: the server encrypts.
    listing = [[source.remote("a.bin", digest=md5(b"other" if is_right else right))]]

    if is_right:
        assert made.run(listing)[PurePosixPath("a.bin")].size_bytes == size
    else:
        with pytest.raises(DigestMismatchError):
            made.run(listing)


def test_a_large_file_is_compared_with_what_the_source_is_asked_for(place):
    """
    Above the size at which an MD5 is cheap, the source's own checksum takes its place.
    """
    source = Source({"large": DATA, "small": DATA[: 2 * PART]})
    source.answers["large"] = KINDS["crc32"]

    entries = run(source, place, evidence_bytes=2 * PART)

    assert source.asked == ["large"]
    assert {str(path): e.evidence for path, e in entries.items()} == {"large": KINDS["crc32"], "small": None}


@pytest.mark.parametrize("attempt", range(10))
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
        run(source, place, workers=8)

    assert source.open == 0


def test_a_failure_ends_those_who_only_wait(place):
    """
    A stream that waits for a silent source, and one that pauses for a busy one, stop at once when another fails.
    """
    source, recorder, began = (
        Source({"busy": DATA, "silent": DATA, "denied": DATA[:PART]}),
        Recorder(),
        time.monotonic(),
    )

    def act(name: str, offset: int) -> bool | None:
        until(lambda: len({name for name, _, _ in source.ranges}) == 3, 10)
        if name == "busy":
            raise SourceUnavailableError(name, "busy", retry_after=60)
        if name == "silent":
            return time.sleep(0.01)
        until(lambda: recorder.retries, 10)
        raise SourceDeniedError(name, "expired")

    source.on_read = act
    with pytest.raises(SourceDeniedError):
        run(source, place, recorder, workers=4)

    assert time.monotonic() - began < 10


def test_a_listing_that_fails_half_way_ends_the_transfer(place):
    """
    Its error is what is raised, although workers are at work on what was listed before.
    """
    source = Source({"a.bin": DATA, "b.bin": DATA})
    source.on_read = lambda name, offset: time.sleep(0.01)

    def pages() -> Iterator[list[RemoteFile]]:
        yield source.all()
        until(lambda: source.open, 10)
        raise SourceDeniedError("s3://bucket", "expired")

    with pytest.raises(SourceDeniedError, match="expired"):
        transfer(source, place, workers=4).run(pages())

    assert source.open == 0


def test_a_listing_is_not_read_on_after_a_failure(place):
    """
    Once a file has failed, the next page is the last that is asked for.
    """
    source, listed = Source({"a.bin": DATA[:500]}), []

    def fail(name: str, offset: int) -> bool:
        raise SourceDeniedError(name, "expired")

    def pages() -> Iterator[list[RemoteFile]]:
        yield source.all()
        until(lambda: not workers_alive(), 10)
        for number in range(100):
            listed.append(number)
            yield []

    source.on_read = fail
    with pytest.raises(SourceDeniedError):
        transfer(source, place).run(pages())

    assert listed == [0]


def test_an_interrupt_ends_all_workers(place):
    """
    Control-C in the thread that called leaves no worker behind.
    """
    source = Source({"a.bin": DATA, "b.bin": DATA})
    source.on_read = lambda name, offset: time.sleep(0.01)

    def pages() -> Iterator[list[RemoteFile]]:
        yield source.all()
        until(lambda: source.open, 10)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        transfer(source, place, workers=4).run(pages())


def test_an_error_that_nobody_expected_ends_the_transfer(place):
    """
    A bug in a back end is raised as it is, and nothing hangs.
    """
    source = Source({"a.bin": DATA, "b.bin": DATA})

    def fail(name: str, offset: int) -> bool:
        raise ZeroDivisionError

    source.on_read = fail
    with pytest.raises(ZeroDivisionError):
        run(source, place, workers=4)


@pytest.mark.parametrize("workers", [1, 4])
def test_a_lost_lease_ends_the_transfer(place, workers):
    """
    Once the claim is lost no further byte is written.
    """
    source, recorder = Source({"a.bin": DATA}), Recorder()
    recorder.lose_after = 5

    with pytest.raises(LeaseLostError):
        run(source, place, recorder, workers=workers)

    assert recorder.received_bytes < len(DATA)


@pytest.mark.parametrize("step", ["create", "allocate", "write", "copy", "finish", "note"])
@pytest.mark.parametrize("size", [500, 3 * PART], ids=["small", "parts"])
def test_an_error_of_the_volume_is_told_as_one(place, dead, step, size):
    """
    Whatever the volume cannot do is an error of its own kind, raised as such, or does not matter.
    """
    source = Source({"a.bin": DATA[:size], "b.bin": DATA})

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def refuse_finish(fd: int, *_: object) -> None:
        os.close(fd)
        raise InsufficientSpaceError("writing", 0, 0)

    def refuse(*_: object) -> None:
        raise InsufficientSpaceError("writing", 0, 0)

    # The tree and the journal translate by themselves, everything else is translated here.
    act = {"finish": refuse_finish, "create": refuse, "note": refuse}.get(step, fail)
    broken = attrs.evolve(place.destination(), **{step: act})
    offered = {"b.bin": [donor(dead, "a.bin", place, [note("b.bin", 0, PART, sha256=sha256(DATA[:PART]))])]}

    if step == "copy":
        # What cannot be taken over is fetched.
        run(source, place, donors=offered, destination=broken)
        assert place.content() == source.files
    else:
        with pytest.raises(InsufficientSpaceError, match="writing"):
            run(source, place, donors=offered, destination=broken, workers=2)


def test_streams_beyond_the_budget_wait_for_memory(place):
    """
    However many streams are allowed, no more buffers are in use at once than the process has room for.
    """
    source, most = Source({str(number): DATA for number in range(8)}), []
    source.on_read = lambda name, offset: most.append(source.open) or True

    run(source, place, workers=8, budget=Budget(2))

    assert (max(most), place.content()) == (2, source.files)


def test_streams_that_wait_for_memory_hear_of_a_lost_lease(place):
    """
    A stream that waits for a buffer which never comes still ends when the claim is lost.
    """
    budget, recorder = Budget(1), Recorder()
    recorder.lose_after = 3

    with budget.buffer(recorder.check), pytest.raises(LeaseLostError):
        run(Source({"a.bin": DATA}), place, recorder, budget=budget)


FORK = """
import os
from contextlib import ExitStack
from kserve_pvc._download.budget import BUFFERS, process_budget

def fail():
    os._exit(1)

with ExitStack() as buffers:
    for _ in range(BUFFERS):
        buffers.enter_context(process_budget().buffer(fail))
    child = os.fork()
    if not child:
        with process_budget().buffer(fail):
            os._exit(0)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_process_has_a_budget_of_its_own():
    """
    Buffers that were in use at the time of a fork are not missing in the child.
    """
    assert subprocess.run([sys.executable, "-I", "-c", FORK]).returncode == 0


def test_a_source_without_evidence_is_taken_at_its_word(place):
    """
    A back end that cannot be asked for digests is compared with what its listing says, for large files too.
    """
    source = Source({"a.bin": DATA})
    without = Without(source)

    made = transfer(without, place, evidence_bytes=1000)
    entries = made.run([[source.remote("a.bin", digest=KINDS["md5"])]])

    assert entries[PurePosixPath("a.bin")].evidence == KINDS["md5"]


class Without:
    """A source that has nothing but bytes."""

    def __init__(self, source: Source) -> None:
        self.open_range = source.open_range


@pytest.mark.parametrize("workers", [1, 2, 4, 5, 9])
def test_no_more_is_asked_for_than_the_pace_allows(place, workers):
    """
    Small files are asked for before their turn, and requests that nobody reads yet count among those in flight.
    """
    source = Source({f"{i:02}.bin": bytes([i]) * (i * 20) for i in range(40)})
    most, honest = [], source.open_range

    @contextmanager
    def open_range(file, start, stop):
        with honest(file, start, stop) as reader:
            most.append(source.open)
            yield reader

    source.open_range = open_range
    transfer(source, place, workers=workers).run([source.all()])

    assert place.content() == source.files
    assert max(most) == min(workers, 4)  # Nobody waits for bytes here, so there are never more than the first streams.
    assert sorted(source.ranges) == [(name, 0, len(data)) for name, data in source.files.items() if data]


def test_tiny_files_are_written_by_one_worker_as_long_as_that_is_enough(place):
    """
    One worker that asks for four files at once is faster than four that take turns with the interpreter's lock.
    """
    source, threads = Source({f"{i:02}.bin": bytes([i]) * 20 for i in range(40)}), set()
    source.on_read = lambda name, offset: bool(threads.add(threading.current_thread().name)) or True
    transfer(source, place, workers=4).run([source.all()])

    assert len(threads) == 1
    assert place.content() == source.files


@pytest.mark.parametrize("name", ["00.bin", "01.bin", "39.bin"])
def test_what_was_asked_for_before_its_turn_is_let_go_of_after_a_failure(place, name):
    """
    The files behind the one that fails were asked for already: their answers are closed and not written.
    """
    source = Source({f"{i:02}.bin": bytes([i]) * 20 for i in range(40)})

    def refuse(asked: str, offset: int) -> bool:
        if asked == name:
            raise SourceDeniedError(asked, "not for you")
        return True

    source.on_read = refuse
    with pytest.raises(SourceDeniedError):
        transfer(source, place, workers=4).run([source.all()])

    assert source.open == 0
    assert sorted(e for e in place.events if e.startswith("finish")) == [
        f"finish {n}" for n in sorted(source.files) if n < name
    ]


def test_a_request_that_fails_before_its_turn_is_made_again(place):
    """
    A source that cannot be asked ahead is no failure: the file is asked for once more when it is its turn.
    """
    source = Source({f"{i:02}.bin": bytes([i]) * 20 for i in range(9)})
    failed, honest = [], source.open_range

    def open_range(file, start, stop):
        if file.address not in failed:
            failed.append(file.address)
            raise SourceUnavailableError("x", "it is busy")
        return honest(file, start, stop)

    source.open_range = open_range
    recorder = Recorder()
    transfer(source, place, recorder, workers=4).run([source.all()])

    assert place.content() == source.files
    assert sorted(failed) == sorted(source.files)
    assert recorder.retries == 1  # The first had nobody before it; the others had failed ahead of their turn.


def test_what_was_asked_ahead_and_breaks_is_fetched_all_the_same(place):
    """
    A connection may be lost while an answer waits for its turn.
    """
    source = Source({f"{i:02}.bin": bytes([i]) * 20 for i in range(9)})
    broken = set()

    def cut(name: str, offset: int) -> bool:
        return name in broken or bool(broken.add(name))

    source.on_read = cut
    transfer(source, place, workers=4).run([source.all()])

    assert place.content() == source.files
    assert len(broken) == 9


@pytest.mark.parametrize("works", [True, False])
def test_a_reader_that_works_does_not_wait(place, works):
    """
    Time that a reader spends decrypting is not time it waits for the source: more streams would not help.
    """
    source = Source({"a.bin": DATA})

    class Slow(Source._Reader):
        worked = 5.0  # What the connection did before does not count.

        def readinto(self, buffer: memoryview) -> int | None:
            time.sleep(0.002)
            self.worked += 0.002 if works else 0.0
            return super().readinto(buffer)

    source.open_range = lambda file, start, stop: nullcontext(Slow(source, file.address, start, stop))
    one = transfer(source, place)
    one.run([source.all()])
    reads = len(DATA) / 100

    assert (one.reader.waited < reads * 0.001) is works
    assert one.reader.waited > 0


@pytest.mark.parametrize("size", [10, 2 * PART])
def test_what_is_read_into_begins_with_a_page(place, size):
    """
    A processor copies much slower to an address that lies a little behind the source's within a page.
    """
    source, places = Source({"a.bin": DATA[:size]}, piece=5000), []

    class Reader(Source._Reader):
        def readinto(self, buffer: memoryview) -> int | None:
            places.append(ctypes.addressof(ctypes.c_char.from_buffer(buffer)))
            return super().readinto(buffer)

    source.open_range = lambda file, start, stop: nullcontext(Reader(source, file.address, start, stop))
    run(source, place)

    assert places
    assert {each % mmap.PAGESIZE for each in places} == {0}


def test_an_empty_listing_is_nothing_to_do(place):
    """
    No page, or pages without files, end at once with nothing.
    """
    assert dict(transfer(Source({}), place).run([])) == {}
    assert dict(transfer(Source({}), place).run([[], []])) == {}
