"""
What a transfer takes over from other writers, and what it does not.
"""

from __future__ import annotations

import random
import tempfile
import zlib
from pathlib import Path, PurePosixPath

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transfers import (
    DATA,
    KINDS,
    PART,
    Place,
    Recorder,
    Source,
    donor,
    is_true,
    left_unfinished,
    note,
    nothing_left_open,
    run,
    sha256,
    transfer,
)

from kserve_pvc import (
    DigestMismatchError,
    FileEntry,
    RemoteFile,
    SourceDeniedError,
)
from kserve_pvc._format.records import PartNote


@pytest.fixture(autouse=True)
def nothing_is_left_open():
    """
    However a transfer ends, its descriptors are closed, its threads over and its buffers released.
    """
    with nothing_left_open():
        yield


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path / "new")


@pytest.fixture
def dead(tmp_path):
    """
    What a writer left that died after two of three parts.
    """
    return left_unfinished(tmp_path / "dead")


def test_what_a_dead_writer_left_is_not_fetched_again(place, dead):
    """
    Parts that were noted are copied, and only the rest is requested.
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
    A beginning and a range further on are taken over, and only what lies between is requested.
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
def test_what_was_left_gives_way_to_what_the_source_promises(place, dead, kind, workers):
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


@pytest.mark.parametrize("is_requested", [False, True], ids=["listing", "on-request"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_file_that_the_source_contradicts_is_never_shared(place, dead, kind, is_requested):
    """
    A note that is true of forged bytes is not enough: whatever digest the source vouches for decides, be it in the
    listing or on request, and what is fetched instead is exact.
    """
    forged = bytes([DATA[0] ^ 1]) + DATA[1:]
    offered = donor(dead, "a.bin", place, [whole(dead, forged)])
    source = Source({"a.bin": DATA})
    if is_requested:
        source.digests["a.bin"] = KINDS[kind]
    made = transfer(source, place, None, {"a.bin": [offered]}, evidence_bytes=PART if is_requested else 1 << 40)

    entries = made.run([[source.remote("a.bin", digest=None if is_requested else KINDS[kind])]])

    assert place.content() == {"a.bin": DATA}
    assert (place.directory / "a.bin").stat().st_nlink == 1
    assert entries[PurePosixPath("a.bin")].evidence == KINDS[kind]


def test_a_forged_file_gives_way_to_a_true_one(place, dead, tmp_path):
    """
    Of two whole files that are as noted, the one that the source vouches for is shared, with its evidence.
    """
    forged = bytes([DATA[0] ^ 1]) + DATA[1:]
    true = Place(tmp_path / "true")
    offered = [
        donor(dead, "a.bin", place, [whole(dead, forged)]),
        donor(true, "a.bin", place, [whole(true)]),
    ]
    source = Source({"a.bin": DATA})

    entries = transfer(source, place, None, {"a.bin": offered}).run([[source.remote("a.bin", digest=KINDS["md5"])]])

    assert (place.directory / "a.bin").samefile(true.directory / "a.bin")
    assert (entries[PurePosixPath("a.bin")].evidence, source.ranges) == (KINDS["md5"], [])


def test_a_source_that_fails_to_name_a_digest_shares_nothing(place, dead):
    """
    An error of the source while its digest is requested ends the call; it is not taken for a file that is gone.
    """
    source = Source({"a.bin": DATA})

    def refuse(file: RemoteFile) -> str | None:
        raise SourceDeniedError("a.bin", "no")

    source.evidence = refuse
    made = transfer(source, place, None, {"a.bin": [donor(dead, "a.bin", place, [whole(dead)])]}, evidence_bytes=PART)
    with pytest.raises(SourceDeniedError):
        made.run([source.all()])

    assert place.content() == {}


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
    Without digests nothing proves that a file of another generation is complete, so it is copied.
    """
    recorder = Recorder()
    run(
        Source({"a.bin": DATA}), place, recorder, {"a.bin": [donor(dead, "a.bin", place, [whole(dead)])]}, digest="none"
    )

    assert (place.directory / "a.bin").stat().st_nlink == 1
    assert (place.content(), recorder.adopted_bytes) == ({"a.bin": DATA}, 3 * PART)
