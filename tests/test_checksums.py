"""
Checksums that object stores vouch for and the standard library does not have.
"""

from __future__ import annotations

import random

import pytest

from kserve_pvc.backends._crc32c import make_checksum


def crc32c(data: bytes) -> str:
    """
    CRC32C bit by bit, as RFC 3720 appendix B defines it.
    """
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
    return f"{value ^ 0xFFFFFFFF:08x}"


@pytest.fixture(autouse=True)
def google_crc32c():
    return pytest.importorskip("google_crc32c")


@pytest.mark.parametrize(
    ("data", "expected"), [(b"", "00000000"), (b"123456789", "e3069283"), (b"\0" * 32, "8a9136aa")]
)
def test_the_checksum_is_the_one_of_the_standard(data, expected):
    """
    Known values of RFC 3720 come out.
    """
    checksum = make_checksum("crc32c")
    checksum.update(memoryview(bytearray(data)))

    assert (checksum.hexdigest(), crc32c(data)) == (expected, expected)


def test_pieces_amount_to_the_whole_and_a_copy_goes_its_own_way():
    """
    However the bytes are cut, the checksum is that of all of them; what a copy is fed does not count for the original.
    """
    data = random.Random(1).randbytes(200_000)
    checksum = make_checksum("crc32c")
    for start in range(0, len(data), 70_001):
        checksum.update(memoryview(data)[start : start + 70_001])
    twin = checksum.copy()
    twin.update(memoryview(b"more"))

    assert checksum.hexdigest() == crc32c(data)
    assert twin.hexdigest() == crc32c(data + b"more")


@pytest.mark.parametrize("kind", ["md5", "crc64nvme", "", "CRC32C"])
def test_nobody_makes_what_is_unknown(kind):
    """
    What cannot be computed is said to be so, and is then no evidence.
    """
    assert make_checksum(kind) is None
