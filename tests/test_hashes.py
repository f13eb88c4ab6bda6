"""
What the source promises about its files is compared with what was received.
"""

from __future__ import annotations

import zlib
from pathlib import PurePosixPath

import pytest
from transfers import (
    DATA,
    KINDS,
    PART,
    Place,
    Source,
    md5,
    nothing_left_open,
    run,
    sha256,
    transfer,
)

from kserve_pvc import (
    DigestMismatchError,
)


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


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("digest", ["sha256", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_source_promises_is_compared(place, kind, digest, workers):
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


def test_a_digest_of_an_unknown_kind_is_not_evidence(place):
    """
    What cannot be compared is neither a failure nor a proof.
    """
    source = Source({"a.bin": DATA})

    entries = transfer(source, place).run([[source.remote("a.bin", digest="xxh3:0123456789abcdef")]])

    assert entries[PurePosixPath("a.bin")].evidence is None


def test_what_only_looked_like_an_md5_does_not_fail(place):
    """
    Where the source itself says that the digest of its listing is none, the bytes are taken.
    """
    source = Source({"a.bin": DATA})
    source.digests["a.bin"] = None

    entries = transfer(source, place).run([[source.remote("a.bin", digest=md5(b"other"))]])

    assert (entries[PurePosixPath("a.bin")].evidence, source.requested) == (None, ["a.bin"])


@pytest.mark.parametrize("kind", ["sha256", "crc32"])
@pytest.mark.parametrize("is_right", [True, False])
@pytest.mark.parametrize("size", [500, 3 * PART], ids=["small", "parts"])
@pytest.mark.parametrize("digest", ["sha256", "none"])
def test_an_md5_that_the_source_replaces_by_another_digest_is_compared_with_that(place, kind, is_right, size, digest):
    """
    Where the listing's MD5 fits not, and the source promises another digest, that one decides.
    """
    right = DATA[:size]
    sent = right if is_right else bytes([DATA[0] ^ 1]) + right[1:]
    source = Source({"a.bin": sent})
    source.digests["a.bin"] = {"sha256": f"sha256:{sha256(right)}", "crc32": f"crc32:{zlib.crc32(right):08x}"}[kind]
    made = transfer(source, place, digest=digest)
    # An MD5 of the right bytes, which were spoiled on the way, or of none: the server encrypts.
    listing = [[source.remote("a.bin", digest=md5(b"other" if is_right else right))]]

    if is_right:
        assert made.run(listing)[PurePosixPath("a.bin")].size_bytes == size
    else:
        with pytest.raises(DigestMismatchError):
            made.run(listing)


def test_a_large_file_is_compared_with_a_requested_digest(place):
    """
    Above the size at which an MD5 is cheap, the source's own checksum takes its place.
    """
    source = Source({"large": DATA, "small": DATA[: 2 * PART]})
    source.digests["large"] = KINDS["crc32"]

    entries = run(source, place, evidence_bytes=2 * PART)

    assert source.requested == ["large"]
    assert {str(path): e.evidence for path, e in entries.items()} == {"large": KINDS["crc32"], "small": None}


def test_a_source_without_evidence_is_taken_at_its_word(place):
    """
    A backend without requests for digests is compared with what its listing says, for large files too.
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
