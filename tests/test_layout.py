"""
Where things lie on the volume, and which names there are ours.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kserve_pvc._format import layout

KEY = "llama-16d8a2f35f654b21"
GENERATION = "000000000007-0123456789abcdef0123456789abcdef"


def test_everything_has_its_fixed_place():
    """
    The places are part of the format: models apart, everything of ours under one dot-directory.
    """
    places = [
        layout.SETTINGS,
        layout.generation_dir(KEY, GENERATION),
        layout.log_dir(KEY),
        layout.slot_dir(KEY),
        layout.claims_dir(KEY),
        layout.claim_dir(KEY, 7),
        layout.lock_file(KEY),
        layout.manifest_file(GENERATION),
        layout.staging_dir(GENERATION),
        layout.journal_file(GENERATION),
        layout.lease_dir(GENERATION),
        layout.TRASH,
    ]

    assert list(map(str, places)) == [
        ".kserve-pvc/store.json",
        f"models/{KEY}/{GENERATION}",
        f".kserve-pvc/keys/{KEY}/log",
        f".kserve-pvc/keys/{KEY}/slots",
        f".kserve-pvc/keys/{KEY}/claims",
        f".kserve-pvc/keys/{KEY}/claims/000000000007",
        f".kserve-pvc/keys/{KEY}/lock",
        f".kserve-pvc/manifests/{GENERATION}.json",
        f".kserve-pvc/staging/{GENERATION}",
        f".kserve-pvc/staging/{GENERATION}/journal",
        f".kserve-pvc/leases/{GENERATION}",
        ".kserve-pvc/trash",
    ]


@given(st.integers(0, 10**12 - 1), st.sampled_from(["commit", "restore", "tombstone"]))
def test_numbered_names_are_read_back(number, type):
    """
    The number of a log record, a claim and a slot is read back from its name.
    """
    names = [f"{number:012d}.{type}", layout.claim_dir(KEY, number).name]

    assert (layout.parse_log_name(names[0]), layout.parse_number(names[1])) == (number, number)


@given(st.lists(st.integers(0, 10**12 - 1)))
def test_numbered_names_sort_like_their_numbers(numbers):
    """
    The order of names is the order of numbers, so the newest is the last of a listing.
    """
    names = sorted(layout.claim_dir(KEY, number).name for number in numbers)

    assert [layout.parse_number(name) for name in names] == sorted(numbers)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "1.commit",
        "000000000001",
        "000000000001.",
        "000000000001.Commit",
        "000000000001.commit\n",
        "000000000001.commit.tmp",
        "000000000001.committed",
        "000000000001-commit",
        ".nfs000000000001",
        "0000000000001.commit",
        "00000000001.commit",
        "-00000000001.commit",
        "00000000000x.commit",
        "\u0660" * 12 + ".commit",
        "x000000000001.commit",
    ],
    ids=ascii,
)
def test_debris_in_a_log_is_no_record(name):
    """
    Whatever else lies in a log directory has no number.
    """
    assert layout.parse_log_name(name) is None


@pytest.mark.parametrize(
    "name",
    [
        "",
        "7",
        "0000000000007",
        "00000000007",
        "-00000000007",
        "000000000007\n",
        "000000000007.tmp",
        ".nfs00000001",
        "\u0660" * 12,
    ],
    ids=ascii,
)
def test_debris_among_claims_is_no_claim(name):
    """
    Whatever else lies in a directory of claims or slots has no number.
    """
    assert layout.parse_number(name) is None


def test_a_generation_is_known_by_its_name():
    """
    The name of a generation is its own parse.
    """
    assert layout.parse_generation(GENERATION) == GENERATION


@pytest.mark.parametrize(
    "name",
    [
        "",
        "..",
        "7",
        GENERATION.upper(),
        GENERATION + "\n",
        GENERATION + "0",
        GENERATION[1:],
        GENERATION + "/..",
        f"../{GENERATION}",
        ".nfs0000",
    ],
    ids=ascii,
)
def test_debris_among_generations_is_no_generation(name):
    """
    Whatever else lies in the directory of a key is no generation, and so is never collected as one.
    """
    assert layout.parse_generation(name) is None
