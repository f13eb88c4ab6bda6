"""
The journal of a download: when it is written, and when it is made durable.
"""

from __future__ import annotations

import os
from pathlib import PurePosixPath

import pytest

from kserve_pvc._download.journal import Journal
from kserve_pvc._format import layout
from kserve_pvc._volume.writing import VolumeWriter

GENERATION = "000000000001-0123456789abcdef"
PART = 64 * 1024 * 1024
RANGE = 8 * 1024 * 1024
SHA256 = "0" * 64


class Opened:
    """
    A journal on a volume, and how often it was made durable.
    """

    def __init__(self, writer: VolumeWriter, monkeypatch: pytest.MonkeyPatch) -> None:
        self.syncs = 0
        self.file = writer.root / layout.journal_file(GENERATION)
        self.journal = Journal(writer, GENERATION, PART)
        monkeypatch.setattr(os, "fdatasync", self.sync)

    def sync(self, fd: int) -> None:
        self.syncs += 1

    def note(self, name: str, start: int, stop: int, *, is_front: bool = True) -> int:
        """The lines that are in the file after a note."""
        digest = (SHA256, None) if is_front else (None, 7)
        self.journal.note(PurePosixPath(name), "t", start, stop, *digest)
        return len(self.file.read_bytes().splitlines())


@pytest.fixture
def opened(root, monkeypatch):
    opened = Opened(VolumeWriter(root), monkeypatch)
    with opened.journal:
        yield opened


def test_notes_of_small_files_are_gathered(opened):
    """
    They are written once together they cover a part.
    """
    assert [opened.note(f"{number}", 0, RANGE - 1) for number in range(10)] == [0] * 8 + [9] * 2
    assert opened.syncs == 1


def test_the_note_of_a_range_is_written_at_once(opened):
    """
    At the front and further on, and what was gathered before goes with it.
    """
    lines = [
        opened.note("small", 0, 10),
        opened.note("a", 0, RANGE),
        opened.note("a", 4 * RANGE, 5 * RANGE, is_front=False),
    ]

    assert lines == [0, 2, 3]


def test_the_journal_is_made_durable_once_a_part(opened):
    """
    The note of a running digest covers all bytes of its file so far, of which only the last range is new.
    """
    for number in range(1, 33):
        opened.note("a", 0, number * RANGE)

    assert opened.syncs == 32 * RANGE // PART


def test_a_file_that_is_fetched_once_more_is_noted_once_more(opened):
    """
    Its second notes cover fewer bytes than the last of the first ones.
    """
    opened.note("a", 0, 3 * RANGE)

    assert [opened.note("a", 0, number * RANGE) for number in (1, 2, 3)] == [1, 3, 4]
