"""
The numbered log of a key.
"""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest

from kserve_pvc import StoreFormatError
from kserve_pvc._format import layout
from kserve_pvc._format.records import Holder, LogEntry, decode, encode, now
from kserve_pvc._keys import log, procedures
from kserve_pvc._keys.log_writer import LogWriter
from kserve_pvc._volume.reading import Volume
from kserve_pvc._volume.writing import VolumeWriter

KEY = "model-0123456789abcdef"
HOLDER = Holder(pod="p", node="n", uid=0, pid=1, boot_id="b", pid_namespace="s", started=1)


def entry(seq: int, kind: str = "commit", nonce: str = "a") -> LogEntry:
    return LogEntry(
        type=kind,
        seq=seq,
        key=KEY,
        uri="s3://b/model",
        revision=None,
        allow_patterns=None,
        ignore_patterns=(),
        generation=f"000000000001-{nonce * 32}",
        version="v",
        files=1,
        size_bytes=1,
        manifest_sha256="0" * 64,
        digest="sha256",
        policy="allow",
        created_at=now(),
        writer=HOLDER,
    )


def append(writer: VolumeWriter, *, after_seq: int, nonce: str = "a", kind: str = "commit") -> LogEntry | None:
    private = layout.STAGING / f"private-{nonce}" / "record"
    hand = LogWriter(
        writer, KEY, lambda wanted: entry(wanted.seq, wanted.type, nonce), private=private, collect=pytest.fail
    )
    seq = procedures.drive(procedures.append(after_seq, kind), hand.perform)
    return None if seq is None else hand.published[seq]


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """
    Do not wait long for a number whose owner is dead.
    """
    monkeypatch.setattr(procedures, "LOOKS_FOR_A_RECORD", 1)
    monkeypatch.setattr(procedures, "LOOK_PAUSE", 0.02)
    monkeypatch.setattr(log, "_REREAD_PAUSE", 0.001)


def test_records_are_numbered_from_one_without_gaps(root):
    """
    Each append takes the next number, and the newest is what is read.
    """
    writer = VolumeWriter(root)

    first, second = append(writer, after_seq=0), append(writer, after_seq=1, kind="tombstone")

    assert [e.seq for e in (first, second) if e] == [1, 2]
    assert log.read_log(writer, KEY).entry == second
    assert log.read_all(writer, KEY) == [first, second]


def test_who_did_not_see_the_newest_record_loses(root):
    """
    An append after an older number is refused, and changes nothing.
    """
    writer = VolumeWriter(root)
    first = append(writer, after_seq=0)

    assert append(writer, after_seq=0, nonce="b") is None
    assert log.read_all(writer, KEY) == [first]


def test_a_number_whose_owner_died_is_skipped(root):
    """
    A reserved number without a record does not stop the log.
    """
    writer = VolumeWriter(root)
    writer.reserve(layout.slot_dir(KEY) / "000000000001")

    appended = append(writer, after_seq=0)

    assert appended is not None
    assert appended.seq == 2


def test_who_was_paused_after_reserving_loses_to_a_later_record(root, monkeypatch):
    """
    A writer that wakes up between reserving and publishing finds the log moved on, and stays out.
    """
    writer, other = VolumeWriter(root), VolumeWriter(root)
    honest = VolumeWriter.reserve
    meanwhile = []

    def reserve(self, place):
        reserved = honest(self, place)
        if self is writer and not meanwhile:
            meanwhile.append(None)
            meanwhile.append(append(other, after_seq=0, nonce="b"))
        return reserved

    monkeypatch.setattr(VolumeWriter, "reserve", reserve)

    assert append(writer, after_seq=0) is None
    assert log.read_all(writer, KEY) == [meanwhile[1]]


def test_a_commit_below_a_newer_record_stays_invisible(root):
    """
    Even a record published late into a lower number does not become the newest.
    """
    writer = VolumeWriter(root)
    writer.reserve(layout.slot_dir(KEY) / "000000000001")
    newer = append(writer, after_seq=0)
    late = entry(1, nonce="c")
    writer.publish(layout.log_dir(KEY) / late.name, encode(late), layout.STAGING / "late" / "record")

    assert log.read_log(writer, KEY).entry == newer


def test_of_two_records_of_one_number_the_tombstone_counts(root):
    """
    Should a volume break exclusivity, every reader chooses the same and the safe one.
    """
    writer = VolumeWriter(root)
    for kind in ("tombstone", "commit"):
        record = entry(1, kind)
        writer.write_private(layout.log_dir(KEY) / record.name, encode(record))

    view = log.read_log(writer, KEY)

    assert view.entry is not None
    assert not view.entry.is_present


@pytest.mark.parametrize("debris", [".nfs0001", "000000000009.tmp", "000000000009", "9.commit", "notes.txt"])
def test_foreign_files_in_the_log_are_ignored(root, debris):
    """
    Only names of records count.
    """
    writer = VolumeWriter(root)
    first = append(writer, after_seq=0)
    (root / layout.log_dir(KEY) / debris).write_text("debris")

    assert log.read_log(writer, KEY).entry == first


def test_a_record_under_anothers_name_is_damage(root):
    """
    A genuine record that was copied to another number or key is not believed.
    """
    writer = VolumeWriter(root)
    append(writer, after_seq=0)
    data = (root / layout.log_dir(KEY) / "000000000001.commit").read_bytes()
    (root / layout.log_dir(KEY) / "000000000002.commit").write_bytes(data)

    view = log.read_log(writer, KEY)

    assert decode(LogEntry, data, "x").seq == 1
    assert (view.seq, view.entry) == (2, None)
    assert "another name" in str(view.damage)


def test_a_manifest_that_is_not_the_recorded_one_is_refused(root):
    """
    The record vouches for its manifest by digest.
    """
    writer = VolumeWriter(root)
    record = append(writer, after_seq=0)
    assert record is not None
    place: PurePosixPath = layout.manifest_file(record.generation)

    with pytest.raises(StoreFormatError, match="missing"):
        log.read_manifest(Volume(root), record)
    writer.write_private(place, b"{}")
    with pytest.raises(StoreFormatError, match="not the manifest its record names"):
        log.read_manifest(Volume(root), record)
