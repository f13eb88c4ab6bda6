"""
What is found when a directory is compared with its manifest.
"""

import hashlib
import os
import tempfile
import threading
from contextlib import contextmanager
from pathlib import PurePosixPath

import pytest

from kserve_pvc import FileEntry, ModelStore, Problem, UnsafePathError, Verification
from kserve_pvc._format.records import FoundFile
from kserve_pvc._volume.verify import compare, sha256_of

FILES = {"config.json": b"{}", "empty": b"", "w/a.bin": b"weights" * 1000}


def entry(path: str, data: bytes) -> FileEntry:
    return FileEntry(path=path, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def found(path: str, size_bytes: int, is_regular: bool = True) -> FoundFile:
    return FoundFile(path=PurePosixPath(path), size_bytes=size_bytes, is_regular=is_regular)


EXPECTED = [entry(path, data) for path, data in FILES.items()]
LYING = [found(path, len(data)) for path, data in FILES.items()]


@pytest.fixture
def model(tmp_path):
    """
    A directory that holds exactly the files above.
    """
    for path, data in FILES.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(data)
    return tmp_path


def opener(root):
    @contextmanager
    def open_file(path):
        fd = os.open(root / path, os.O_RDONLY)
        try:
            yield fd
        finally:
            os.close(fd)

    return open_file


def closed(path):
    raise AssertionError(f"`{path}` was opened")


@pytest.mark.parametrize("level", ["size", "full"])
def test_an_untouched_model_has_no_problem(model, level):
    """
    A directory that holds exactly what is recorded has no difference at either level.
    """
    problems = list(compare(EXPECTED, LYING, opener(model), level))

    assert problems == []


def test_comparing_sizes_opens_no_file():
    """
    The quick level trusts the listing, so it costs no read of a file.
    """
    problems = list(compare(EXPECTED, LYING, closed, "size"))

    assert problems == []


@pytest.mark.parametrize("level", ["size", "full"])
def test_a_missing_file_is_found(model, level):
    """
    A recorded file that is not there is a problem at either level.
    """
    problems = list(compare(EXPECTED, LYING[1:], opener(model), level))

    assert problems == [Problem(path="config.json", kind="missing", detail="missing")]


@pytest.mark.parametrize("level", ["size", "full"])
def test_an_unexpected_file_is_found(model, level):
    """
    A file that nobody recorded is a problem at either level, wherever it lies.
    """
    problems = list(compare(EXPECTED, [found("w/.git/hooks/x", 3), *LYING], opener(model), level))

    assert problems == [Problem(path="w/.git/hooks/x", kind="extra", detail="not in the manifest")]


@pytest.mark.parametrize("level", ["size", "full"])
def test_a_file_of_another_size_is_found_unread(level):
    """
    A file that has grown or shrunk is a problem that no reading is needed for.
    """
    lying = [found("config.json", 3), found("empty", 1), found("w/a.bin", 6999)]

    problems = list(compare(EXPECTED, lying, closed, level))

    assert problems == [
        Problem(path="config.json", kind="size", detail="3 bytes instead of 2"),
        Problem(path="empty", kind="size", detail="1 bytes instead of 0"),
        Problem(path="w/a.bin", kind="size", detail="6999 bytes instead of 7000"),
    ]


@pytest.mark.parametrize("level", ["size", "full"])
def test_what_is_no_regular_file_is_found_unread(level):
    """
    A link, device or pipe in place of a file is a problem even if its size fits, and is never opened.
    """
    problems = list(compare(EXPECTED[:1], [found("config.json", 2, is_regular=False)], closed, level))

    assert problems == [Problem(path="config.json", kind="type", detail="not a regular file")]


def test_a_changed_byte_is_found_by_reading(model):
    """
    A file of the right size with one wrong byte is found at the full level, with both digests, and only there.
    """
    changed = b"Weights" + FILES["w/a.bin"][7:]
    (model / "w/a.bin").write_bytes(changed)

    quick, full = ([*compare(EXPECTED, LYING, opener(model), level)] for level in ("size", "full"))

    detail = f"sha256 {hashlib.sha256(changed).hexdigest()} instead of {hashlib.sha256(FILES['w/a.bin']).hexdigest()}"
    assert (quick, full) == ([], [Problem(path="w/a.bin", kind="digest", detail=detail)])


def test_a_file_without_a_recorded_digest_is_never_called_intact(model):
    """
    Without a digest there is no evidence, so the full level reports the file.
    """
    expected = [FileEntry(path="empty", size_bytes=0)]

    problems = list(compare(expected, [found("empty", 0)], opener(model), "full"))

    assert [(problem.path, problem.kind) for problem in problems] == [("empty", "digest")]


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "Permission denied"),
        OSError(5, "Input/output error"),
        UnsafePathError("config.json", "it is a link"),
    ],
)
def test_a_file_that_cannot_be_read_does_not_end_the_comparison(model, error):
    """
    A file that cannot be opened is a problem with the reason, and the other files are still read.
    """
    (model / "w/a.bin").write_bytes(bytes(7000))
    working = opener(model)

    def open_file(path):
        if path == PurePosixPath("config.json"):
            raise error
        return working(path)

    problems = list(compare(EXPECTED, LYING, open_file, "full"))

    assert problems[0] == Problem(path="config.json", kind="unreadable", detail=str(error))
    assert [(problem.path, problem.kind) for problem in problems[1:]] == [("w/a.bin", "digest")]


def test_every_problem_is_found_at_once(model):
    """
    One comparison reports all differences, the recorded files first and in their order.
    """
    lying = [found("zzz", 1), found("w/a.bin", 1), found("empty", 0, is_regular=False), found("aaa", 1)]

    problems = list(compare(EXPECTED, lying, opener(model), "full"))

    assert [(problem.path, problem.kind) for problem in problems] == [
        ("config.json", "missing"),
        ("empty", "type"),
        ("w/a.bin", "size"),
        ("zzz", "extra"),
        ("aaa", "extra"),
    ]


@pytest.mark.parametrize("size", [0, 1, 2**20 - 1, 2**20, 2**20 + 1, 3 * 2**20])
def test_digests_cover_every_byte(tmp_path, size):
    """
    A digest is over the whole file from its start, wherever the descriptor stands and however large the buffer is.
    """
    data = os.urandom(size)
    (tmp_path / "file").write_bytes(data)

    with (tmp_path / "file").open("rb") as file:
        file.seek(size // 2)
        digest = sha256_of(file.fileno(), size)

    assert digest == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(("size", "now"), [(0, 1 << 40), (7, 1 << 40), (2**20, 1 << 40), (2**20, 2**20 + 1), (7, 6)])
def test_no_more_is_read_of_a_file_than_its_record_says(tmp_path, size, now):
    """
    A file that has grown after it was listed, here to a terabyte, is not read to its end; one that has shrunk is
    different too.
    """
    data = os.urandom(size)
    (tmp_path / "file").write_bytes(data)
    os.truncate(tmp_path / "file", now)

    (problem,) = compare([entry("file", data)], [found("file", size)], opener(tmp_path), "full")

    assert (problem.path, problem.kind) == ("file", "size")


@pytest.mark.parametrize(("problems", "ok"), [((), True), ((Problem(path="a", kind="missing", detail=""),), False)])
def test_a_verification_is_as_good_as_its_problems(problems, ok):
    """
    A model is fine exactly if nothing was found.
    """
    report = Verification(uri="s3://b/m", level="size", files=1, bytes=1, problems=problems)

    assert report.ok is ok


def test_what_was_never_hashed_is_not_vouched_for(root, tmp_path):
    """
    A model fetched with hashing off is well at level size; at level full each file is told as one that nobody can
    judge.
    """
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights.bin").write_bytes(b"weights")
    uri = f"file://{tmp_path}/model"
    store = ModelStore(root, mode="rw", digest="none")
    model = store.ensure(uri, progress=False)

    assert [file.sha256 for file in model.record.files] == [None]
    assert store.verify(uri).ok
    detail = "no sha256 was recorded, because the model was fetched without hashing"
    assert store.verify(uri, "full").problems == (Problem(path="weights.bin", kind="digest", detail=detail),)


def test_files_are_read_by_several_threads_and_every_byte_is_told(monkeypatch):
    """
    At level `full` one slow file does not keep the others waiting, problems keep their order, and progress is complete.
    """
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    both = threading.Barrier(2, timeout=10)
    data = {name: name.encode() * 1000 for name in "ab"}
    entries = [FileEntry(path=name, size_bytes=1000, sha256="0" * 64) for name in data]
    told: list[int] = []

    @contextmanager
    def open_file(path):
        both.wait()  # Fails unless two files are open at a time.
        with tempfile.TemporaryFile() as file:
            file.write(data[str(path)])
            file.flush()
            yield file.fileno()

    problems = list(compare(entries, [found(name, 1000) for name in data], open_file, "full", told.append))

    assert [(problem.path, problem.kind) for problem in problems] == [("a", "digest"), ("b", "digest")]
    assert sum(told) == 2000
