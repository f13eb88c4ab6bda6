"""
A store of format 1, made once and kept for ever, is read and written by every later version.
"""

from __future__ import annotations

import shutil
from pathlib import Path, PurePosixPath

import pytest
from memory import MemorySource

from kserve_pvc import ModelNotFoundError, ModelStore

FIXTURE = Path(__file__).parent / "data" / "format-v1"


@pytest.fixture
def kept(tmp_path):
    """
    A copy of the kept store. Its empty directories, which git does not keep, are not needed.
    """
    return Path(shutil.copytree(FIXTURE, tmp_path / "store"))


def test_its_models_are_found_and_verify(kept):
    """
    Every model that was present is, with all of its digests, and the removed one is not.
    """
    store = ModelStore(kept)

    assert sorted((m.uri, m.files, m.size_bytes) for m in store.list()) == [
        ("s3://models/renewed", 1, 3),
        ("s3://models/tiny", 1, 14),
        ("s3://models/tiny", 3, 2062),
    ]
    assert [report.problems for report in store.verify_all("full")] == [(), (), ()]
    with pytest.raises(ModelNotFoundError):
        store.get("s3://models/removed")


def test_its_records_say_what_they_said(kept):
    """
    Fields keep their meaning.
    """
    record = ModelStore(kept).get("s3://models/tiny").record

    assert record.key == "tiny-7d8f6b60abfc67ed"
    assert record.version.startswith("sha256:")
    assert [(f.path, f.size_bytes) for f in record.files] == [
        (PurePosixPath("config.json"), 14),
        (PurePosixPath("empty"), 0),
        (PurePosixPath("weights/part-1.bin"), 2048),
    ]
    assert record.files[0].sha256 == "09d343c37de0bba143b7ff45f82c0ab9308531dcc78b56b8eb40c5938c4be418"
    assert (record.writer.pod, record.writer.node, record.writer.uid) == ("warm-job-x7k2p", "node-1", 1000)
    assert record.created_at.tzinfo is not None


def test_its_newest_version_counts(kept):
    """
    A model that was refreshed is served in its new version, from a directory beside the old one.
    """
    path = ModelStore(kept).get("s3://models/renewed").path

    assert (path / "model.bin").read_bytes() == b"new"
    assert sorted((p / "model.bin").read_bytes() for p in path.parent.iterdir()) == [b"new", b"old"]


def test_it_can_be_written_on(kept):
    """
    Models can be fetched into it, also one that was removed before, and removed from it.
    """
    source = MemorySource({"s3://models/removed": {"model.bin": b"back"}, "s3://models/more": {"x": b"x"}})
    store = ModelStore(kept, mode="rw", backends={"s3": source})

    back = store.ensure("s3://models/removed", progress=False)
    more = store.ensure("s3://models/more", progress=False)
    store.remove("s3://models/tiny", trash_seconds=0)

    assert (back.status, more.status) == ("downloaded", "downloaded")
    assert (back.path / "model.bin").read_bytes() == b"back"
    assert "s3://models/tiny" not in store
    assert store.get("s3://models/tiny", allow_patterns="*.json").files == 1
