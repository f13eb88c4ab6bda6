"""
Models that lie on a mounted file system already.
"""

import os
import socket
import time
from pathlib import Path

import pytest
from sources import Interfering
from trees import model_files, read_tree, write_files
from users import public_directory, python_as

from kserve_pvc import (
    InvalidURIError,
    ModelStore,
    RemoteFile,
    SourceChangedError,
    SourceNotFoundError,
    StoreError,
    UnsafePathError,
)
from kserve_pvc._source.ref import parse_ref
from kserve_pvc.backends.file import FileBackend
from kserve_pvc.backends.fsspec_ import FsspecBackend

BACKEND = FileBackend({})


def names_in(place: Path | str) -> list[str]:
    return [str(file.entry.path) for file in BACKEND.resolve(parse_ref(f"file://{place}")).files]


def only_file(place: Path) -> RemoteFile:
    (file,) = BACKEND.resolve(parse_ref(f"file://{place}")).files
    return file


def read(file: RemoteFile, start: int, stop: int, buffer_bytes: int = 7) -> bytes:
    """
    Read a range to its end through a small buffer.
    """
    buffer, data = memoryview(bytearray(buffer_bytes)), b""
    with BACKEND.open_range(file, start, stop) as reader:
        while count := reader.readinto(buffer):
            data += bytes(buffer[:count])
    return data


def test_a_directory_is_listed_with_all_its_files(source):
    """
    Every regular file is there with its path, size and a token, in order, and empty directories are nothing.
    """
    (source / "nothing/in/here").mkdir(parents=True)

    found = BACKEND.resolve(parse_ref(f"file://{source}")).files

    files = model_files(seed=1)
    assert [(str(f.entry.path), f.entry.size_bytes) for f in found] == [
        (name, len(files[name])) for name in sorted(files)
    ]
    assert len({f.entry.token for f in found}) == len(files)
    assert {f.entry.sha256 for f in found} == {None}


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_single_file_is_a_directory_with_that_file(root, source, slash):
    """
    The URI of one file gives a directory that holds it under its own name.
    """
    model = ModelStore(root, mode="rw").ensure(f"file://{source}/config.json{slash}", progress=False)

    assert read_tree(model.path) == {"config.json": (source / "config.json").read_bytes()}


@pytest.mark.parametrize(
    "name",
    ["caf\u00e9", "cafe\u0301", "\u65e5\u672c\u8a9e/\u6a21\u578b.bin", "a b+c%25d&e=f#g?", ".hidden/.x", "\U0001f984"],
    ids=ascii,
)
def test_names_are_kept_as_they_are(root, tmp_path, name):
    """
    Unicode in either form, blanks, percent signs and leading dots arrive unchanged, in the name of the model too.
    """
    write_files(tmp_path / "m\u00e9 100%", {name: b"x"})

    model = ModelStore(root, mode="rw").ensure(f"file://{tmp_path}/m\u00e9 100%", progress=False)

    assert read_tree(model.path) == {name: b"x"}


@pytest.mark.parametrize(
    ("start", "stop", "data"),
    [(0, 26, "abcdefghijklmnopqrstuvwxyz"), (0, 1, "a"), (25, 26, "z"), (5, 20, "fghijklmnopqrst"), (3, 3, "")],
)
def test_a_range_is_exactly_what_was_asked_for(tmp_path, start, stop, data):
    """
    A range starts and stops where it should, whatever the size of the buffer.
    """
    (tmp_path / "alphabet").write_text("abcdefghijklmnopqrstuvwxyz")
    file = only_file(tmp_path / "alphabet")

    assert [read(file, start, stop, size) for size in (1, 7, 100)] == [data.encode()] * 3


def make_a_dangling_link(path: Path) -> None:
    path.symlink_to("/not/there")


def make_a_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # The address of a socket is short, and a temporary directory is not.
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(here)


def make_a_device(path: Path) -> None:
    try:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("it needs root, to make a device")


IRREGULAR = [make_a_socket, make_a_device, os.mkfifo]


@pytest.mark.parametrize("make", IRREGULAR, ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", ["odd", "weights/odd"])
def test_what_is_no_regular_file_refuses_the_model(root, source, make, name):
    """
    Pipes, sockets and devices are neither read nor left out: the model is refused, naming them.
    """
    make(source / name)

    with pytest.raises(UnsafePathError, match="only regular files are copied") as caught:
        ModelStore(root, mode="rw").ensure(f"file://{source}", progress=False)

    assert caught.value.name == str(source / name)
    assert not (root / "models").exists()


def test_a_uri_of_something_irregular_is_refused(source):
    """
    A pipe is no model, and neither is a link, whose target is named.
    """
    os.mkfifo(source / "pipe")
    (source / "latest").symlink_to("weights")

    with pytest.raises(UnsafePathError, match="only regular files are copied"):
        names_in(source / "pipe")
    with pytest.raises(UnsafePathError, match=f"name what it leads to, `file://{source}/weights`"):
        names_in(source / "latest")


@pytest.mark.parametrize("make", [make_a_dangling_link, os.mkfifo], ids=lambda make: make.__name__)
def test_patterns_leave_out_what_is_irregular(root, source, make):
    """
    A link or device that the patterns leave out is not read, and refuses no model.
    """
    make(source / "odd")
    store = ModelStore(root, mode="rw")

    model = store.ensure(f"file://{source}", ignore_patterns="odd", progress=False)
    chosen = store.ensure(f"file://{source}", allow_patterns="*.json", progress=False)

    assert read_tree(model.path) == model_files(seed=1)
    assert not (model.path / "odd").exists()
    assert read_tree(chosen.path).keys() == {name for name in model_files(seed=1) if name.endswith(".json")}


@pytest.mark.parametrize("scheme", ["file", "fsspec+local"])
def test_what_a_volume_keeps_at_its_root_is_no_part_of_a_model(source, scheme):
    """
    `lost+found` at the root of a source is passed over; a directory of that name elsewhere is one as others are.
    """
    write_files(source, {"lost+found/#12": b"x", "deep/lost+found/kept": b"y"})

    backend = FileBackend({}) if scheme == "file" else FsspecBackend({})
    found = backend.resolve(parse_ref(f"{scheme}://{source}"))

    assert [name for name in (str(f.entry.path) for f in found.files) if "lost" in name] == ["deep/lost+found/kept"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_closed_directory_is_named_and_can_be_left_out():
    """
    A directory that may not be listed is an error that names it, unless the patterns select nothing below it.
    """
    script = """
from kserve_pvc._source.ref import parse_ref
for patterns in ({}, {"ignore_patterns": "shut/*"}, {"ignore_patterns": "shut/"}, {"allow_patterns": "w.bin"},
                 {"allow_patterns": "*.bin"}, {"ignore_patterns": "shut/?"}):
    try:
        found = FileBackend({}).resolve(parse_ref("file://" + sys.argv[1], **patterns))
        print([str(f.entry.path) for f in found.files])
    except PermissionError as error:
        print(type(error).__name__, "shut" in str(error))
"""
    with public_directory() as place:
        write_files(place, {"w.bin": b"w"})
        (place / "shut").mkdir(mode=0o700)
        printed = python_as(65534, script, str(place)).splitlines()

    assert printed == [
        "SourceDeniedError True",
        *["['w.bin']"] * 3,
        *["SourceDeniedError True"] * 2,
    ]


@pytest.mark.parametrize("name", [b"bad\xff", b"new\nline", b"back\\slash", b"esc\x1b[31m"], ids=repr)
def test_names_that_cannot_be_kept_refuse_the_model(tmp_path, name):
    """
    A name that is no text, or holds control characters or backslashes, is refused and escaped in the message.
    """
    (tmp_path / "model").mkdir()
    path = os.fsencode(tmp_path / "model") + b"/" + name
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))

    with pytest.raises(UnsafePathError) as caught:
        names_in(tmp_path / "model")

    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("uri", "error", "word"),
    [
        ("file://relative/model", InvalidURIError, "file:///absolute/path"),
        ("file://./model", InvalidURIError, "file:///absolute/path"),
        ("file://", InvalidURIError, "file:///absolute/path"),
        ("file:///mnt/../etc", UnsafePathError, "climb"),
        ("file:///..", UnsafePathError, "climb"),
        ("file:///not/there", SourceNotFoundError, "No such file or directory"),
        ("file:///etc/passwd/x", SourceNotFoundError, "Not a directory"),
        ("file:///" + "x" * 300, StoreError, "File name too long"),
    ],
)
def test_a_uri_that_names_nothing_usable_says_why(root, uri, error, word):
    """
    Relative, climbing, missing and impossible paths are typed errors that name the URI.
    """
    with pytest.raises(error, match=word) as caught:
        ModelStore(root, mode="rw").ensure(uri, progress=False)

    assert uri.removeprefix("file://") in str(caught.value)
    assert not (root / "models").exists()


@pytest.mark.parametrize(
    "make", [lambda path: None, lambda path: (path / "a/b").mkdir(parents=True)], ids=["empty", "directories"]
)
def test_a_directory_without_files_is_no_model(tmp_path, make):
    """
    Nothing, or nothing but directories, is not found.
    """
    (tmp_path / "model").mkdir()
    make(tmp_path / "model")

    with pytest.raises(SourceNotFoundError, match="it has no files"):
        names_in(tmp_path / "model")


def test_a_file_has_no_revisions(root, source):
    """
    A revision is refused instead of ignored.
    """
    with pytest.raises(InvalidURIError, match="a file has no revisions"):
        ModelStore(root, mode="rw").ensure(f"file://{source}", revision="main", progress=False)


def replace_by_rename(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(0, path.stat().st_mtime_ns))
    other.rename(path)


def rewrite(path: Path) -> None:
    before = path.stat().st_mtime_ns
    path.write_bytes(b"y" * path.stat().st_size)
    os.utime(path, ns=(0, before + 1))


def rewrite_and_set_the_time_back(path: Path) -> None:
    before = path.stat().st_mtime_ns
    time.sleep(0.05)  # The clock of inodes ticks every ten milliseconds at the slowest.
    path.write_bytes(b"y" * path.stat().st_size)
    os.utime(path, ns=(0, before))


def replace_by_a_link(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")


CHANGES = [
    lambda path: path.write_bytes(path.read_bytes() + b"more"),
    lambda path: os.truncate(path, 5),
    rewrite,
    rewrite_and_set_the_time_back,
    replace_by_rename,
    replace_by_a_link,
    Path.unlink,
]


@pytest.mark.parametrize(
    "change", CHANGES, ids=["grown", "truncated", "rewritten", "set back", "replaced", "linked", "deleted"]
)
def test_a_file_that_changed_since_it_was_listed_is_not_read(tmp_path, change):
    """
    A file that was written to, replaced, linked or deleted after the listing fails instead of giving other bytes.
    """
    (tmp_path / "weights").write_bytes(b"x" * 100)
    file = only_file(tmp_path / "weights")
    change(tmp_path / "weights")

    with pytest.raises(SourceChangedError) as caught:
        read(file, 0, 100)

    assert str(tmp_path / "weights") in str(caught.value)


@pytest.mark.timeout(60)
def test_a_file_that_became_a_pipe_is_not_waited_for(tmp_path):
    """
    A pipe that stands where a file was listed is an error, not an endless wait.
    """
    path = tmp_path / "weights"
    path.write_bytes(b"x" * 100)
    file = only_file(path)
    path.unlink()
    os.mkfifo(path)

    with pytest.raises(SourceChangedError):
        read(file, 0, 100)


@pytest.mark.parametrize(
    "change", CHANGES, ids=["grown", "truncated", "rewritten", "set back", "replaced", "linked", "deleted"]
)
def test_a_file_that_changes_between_two_parts_is_never_published(root, source, change):
    """
    When a file changes half-way the download fails, nothing is present, and the next one gets the new content whole.
    """
    changing = Interfering(BACKEND, before_range=lambda number, file: number == 2 and change(source / "weights/a.bin"))
    store = ModelStore(root, mode="rw", backends={"file": changing.factory}, part_bytes=100_000)

    with pytest.raises(SourceChangedError, match=r"retry once the upload is complete"):
        store.ensure(f"file://{source}", progress=False, max_workers=1)

    present = f"file://{source}" in store
    for link in filter(Path.is_symlink, source.rglob("*")):
        link.unlink()
    model = ModelStore(root, mode="rw").ensure(f"file://{source}", progress=False)
    assert (present, read_tree(model.path)) == (False, read_tree(source))


def test_a_file_that_appears_after_the_listing_is_not_part_of_it(root, source):
    """
    A model is what was listed, neither more nor less.
    """
    late = Interfering(BACKEND, after_resolve=lambda: (source / "late").write_bytes(b"x"))

    model = ModelStore(root, mode="rw", backends={"file": late.factory}).ensure(f"file://{source}", progress=False)

    assert read_tree(model.path) == model_files(seed=1)


ENSURE = """
try:
    print(ModelStore(sys.argv[1], mode="rw", backends={"file": FileBackend}).ensure(sys.argv[2], progress=False).status)
except StoreError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize(
    ("hidden", "outcome"),
    [
        ("model", "SourceDeniedError"),
        ("model/weights", "SourceDeniedError"),
        ("model/weights/a.bin", "SourceDeniedError"),
        ("other", "downloaded"),
    ],
)
def test_what_may_not_be_read_is_denied(hidden, outcome):
    """
    Another user's closed directory or file is a typed error about the source, and nothing is published.
    """
    with public_directory() as place:
        write_files(place / "model", model_files(seed=1))
        write_files(place / "other", {"x": b"x"})
        (place / "volume").mkdir()
        os.chown(place / "volume", 1001, 1001)
        (place / hidden).chmod(0o000)

        said = python_as(1001, ENSURE, str(place / "volume"), f"file://{place}/model")
        commits = list((place / "volume").glob(".kserve-pvc/keys/*/log/*.commit"))

    assert said.startswith(outcome)
    assert len(commits) == (outcome == "downloaded")


def test_options_are_not_shown():
    """
    A store's options hold secrets, also when its model is a directory.
    """
    assert "canary" not in repr(FileBackend({"secret": "canary"}))
