"""
Sources of one archive, and of one file with a digest, as the storage initializer takes them.
"""

import bz2
import gzip
import hashlib
import io
import lzma
import os
import tarfile
import zipfile

import fsspec
import pytest
from trees import read_tree, write_files
from webserver import WebServer

from kserve_pvc import ModelStore, PolicyError
from kserve_pvc._format.records import FileEntry
from kserve_pvc._source.contract import RemoteFile, UnpackLimits
from kserve_pvc._source.ref import parse_ref
from kserve_pvc.kserve._archives import _Marking, unpacking
from kserve_pvc.kserve._contents import RECORD, WORK
from kserve_pvc.kserve._destination import Destination
from kserve_pvc.kserve._environment import read_variables
from kserve_pvc.kserve._initialize import fill_all, main

FILES = {"config.json": b"{}", "weights/b.bin": b"w" * 5_000, "README.md": b"read"}
COMPRESS = {
    "": lambda data: data,
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
}


def tar(files=FILES, modes=None):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), (modes or {}).get(name, 0o644)
            archive.addfile(member, io.BytesIO(content))
    return data.getvalue()


def zipped(files=FILES, modes=None):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in files.items():
            member = zipfile.ZipInfo(name)
            member.external_attr = (modes or {}).get(name, 0) << 16
            archive.writestr(member, content)
    return data.getvalue()


def digest(data):
    return hashlib.sha256(data).hexdigest()


pytestmark = pytest.mark.usefixtures("initializer_environment")


@pytest.fixture
def place(tmp_path):
    return tmp_path / "mnt-models"


@pytest.fixture
def initialize(monkeypatch, capsys):
    def run(*pairs, **env):
        with monkeypatch.context() as context:
            for name, value in env.items():
                context.setenv(name, str(value))
            code = main([str(word) for word in pairs])
        return code, capsys.readouterr().err

    return run


def served(place):
    """
    The files of the model, without what is the initializer's own.
    """
    if not place.exists():
        return {}
    return {name: data for name, data in read_tree(place).items() if not name.startswith(".kserve-pvc-init")}


# Which archives are unpacked


@pytest.mark.parametrize(
    ("name", "coding"),
    [
        *(("m.tar.bz2", "bz2"), ("m.tbz2", "bz2"), ("m.tbz", "bz2"), ("m.txz", "xz"), ("m.taz", "gz"), ("m.tz", "gz")),
        *(("m.TAR.GZ", "gz"), ("m.tar.gz", "bz2"), ("m.tar", "xz"), ("m.tar.xz", "lzma"), ("m.tar.bz2", "")),
    ],
)
def test_the_content_says_how_a_tar_is_compressed(tmp_path, place, initialize, name, coding):
    """
    What has the name of a tar is unpacked by its content, as KServe does.
    """
    write_files(tmp_path / "m", {name: COMPRESS[coding](tar())})

    code, err = initialize(tmp_path / "m", place)

    assert code == 0, err
    assert served(place) == FILES


@pytest.mark.parametrize(
    ("name", "what"),
    [
        *(("m.tar.Z", "compress"), ("m.tar.br", "Brotli"), ("m.tar.lz4", "LZ4"), ("m.tar.lz", "lzip")),
        *(("m.7z", "7-Zip"), ("m.RAR", "RAR"), ("m.tar.sz", "Snappy"), ("m.tlz", "lzip")),
    ],
)
@pytest.mark.parametrize("is_web", [False, True], ids=["directory", "web"])
def test_an_archive_that_cannot_be_unpacked_is_refused_by_its_name(tmp_path, place, initialize, name, what, is_web):
    """
    No run ends well with a packed model in its directory.
    """
    write_files(tmp_path / "m", {name: b"\x1f\x9d" + b"x" * 100})

    if is_web:
        with WebServer() as server:
            server.put(name, b"x" * 100)
            code, err = initialize(server.uri(name), place, KSERVE_PVC_ALLOW_PRIVATE_ADDRESSES=1)
    else:
        code, err = initialize(tmp_path / "m", place)

    assert code == 1
    assert f"{what}" in err
    assert "not supported" in err
    assert served(place) == {}


@pytest.mark.parametrize(
    ("name", "data", "what"),
    [
        ("m.tar.gz", zipped(), "a zip archive"),
        ("m.tar", b"\x1f\x9d" + b"x" * 100, "compress"),
        ("m.txz", b"Rar!\x1a\x07" + b"x" * 100, "a RAR archive"),
        ("m.tar", b"7z\xbc\xaf\x27\x1c" + b"x" * 100, "a 7-Zip archive"),
        ("m.zip", tar(), "a tar archive"),
        ("m.zip", COMPRESS["gz"](tar()), "gzip"),
        ("m.zip", COMPRESS["bz2"](tar()), "bzip2"),
    ],
)
def test_an_archive_with_a_wrong_name_is_called_what_it_is(tmp_path, place, initialize, name, data, what):
    """
    The error says what the content is, not that it is damaged.
    """
    write_files(tmp_path / "m", {name: data})

    code, err = initialize(tmp_path / "m", place)

    assert code == 1
    assert f"its content is {what}" in err or f"compressed by {what}" in err
    assert served(place) == {}


@pytest.mark.parametrize("harm", ["cut", "tail", "flipped"])
@pytest.mark.parametrize("coding", ["bz2", "lzma"])
def test_a_damaged_archive_is_called_damaged(tmp_path, place, initialize, coding, harm):
    """
    What a decompressor raises is not reported as an error of the volume.
    """
    data = COMPRESS[coding](tar({"a": os.urandom(3_000)}))
    broken = {"cut": data[:-200], "tail": data + b"garbage", "flipped": data[:60] + bytes(40) + data[100:]}[harm]
    write_files(tmp_path / "m", {f"m.tar.{coding}": broken})

    code, err = initialize(tmp_path / "m", place)

    assert code == 1
    assert "is damaged" in err
    assert served(place) == {}


@pytest.mark.parametrize(
    ("others", "patterns", "expected"),
    [
        ({"LICENSE": b"l"}, {"STORAGE_ALLOW_PATTERNS": "*.tar.gz"}, set(FILES)),
        ({"LICENSE": b"l"}, {"STORAGE_IGNORE_PATTERNS": "LICENSE"}, set(FILES)),
        (
            {"LICENSE": b"l"},
            {"STORAGE_ALLOW_PATTERNS": "m.*", "STORAGE_IGNORE_PATTERNS": "*.md"},
            {*FILES} - {"README.md"},
        ),
        ({}, {"STORAGE_ALLOW_PATTERNS": "*.tar.gz"}, set(FILES)),
        ({}, {"STORAGE_ALLOW_PATTERNS": "*.bin"}, {"weights/b.bin"}),
        ({}, {"STORAGE_IGNORE_PATTERNS": "*.md"}, {*FILES} - {"README.md"}),
    ],
)
@pytest.mark.parametrize("source", ["directory", "bucket"])
def test_patterns_that_leave_one_archive(
    tmp_path, place, initialize, request, upload_free_s3, source, others, patterns, expected
):
    """
    What the patterns leave is unpacked, too. If they allow the archive, they allow what is in it.
    """
    files = {"m.tar.gz": COMPRESS["gz"](tar()), **others}
    uri, env = upload_free_s3(files) if source == "bucket" else (tmp_path / "m", {})
    if source == "directory":
        write_files(tmp_path / "m", files)

    code, err = initialize(uri, place, **env, **patterns)

    assert code == 0, err
    assert set(served(place)) == expected


@pytest.fixture
def upload_free_s3(request):
    def put(files):
        upload, origin = request.getfixturevalue("upload"), request.getfixturevalue("origin")
        return upload(files), origin.environ

    return put


@pytest.mark.parametrize(("name", "expected"), [("m.tar", "m.tar"), ("m.tar.gz", "m.tar.gz"), ("m.bin", "m.bin.gz")])
def test_an_archive_that_is_stored_compressed_is_unpacked(name, expected):
    """
    Google stores objects compressed that are not; an archive among them is one by the name that it has there.
    """
    ref = parse_ref(f"gs://bucket/{name}")

    (marked,) = _Marking(service="gs", limits=UnpackLimits(entries=7), digest="0" * 64).mark(ref, [encoded(name)])

    assert (str(marked.entry.path), marked.unpack) == (expected, UnpackLimits(entries=7))
    assert marked.entry.sha256 is None  # It is compared with what is unpacked.


@pytest.mark.parametrize("name", ["m.zip", "m.7z"])
def test_an_archive_in_another_compression_is_refused(name):
    """
    What cannot be unpacked from two formats at once does not stay packed.
    """
    with pytest.raises(PolicyError, match="is refused"):
        _Marking(service="gs", limits=UnpackLimits(), digest=None).mark(parse_ref("gs://b/m"), [encoded(name)])


def encoded(name):
    entry = FileEntry(path=f"{name}.gz", size_bytes=3, token="t")
    return RemoteFile(entry=entry, address="a", pin={}, unpack=UnpackLimits())


# Digests


@pytest.mark.parametrize("kind", ["tar", "zip", "file"])
def test_the_digest_of_the_file_at_the_source_is_compared(tmp_path, place, root, initialize, kind):
    """
    It may be that of an archive. With a wrong one nothing is placed, and in a store nothing is left with a name.
    """
    data, name = {"tar": (tar(), "m.tar"), "zip": (zipped(), "m.zip"), "file": (b"model", "m.bin")}[kind]
    write_files(tmp_path / "m", {name: data})
    uri = f"file://{tmp_path}/m/{name}"
    files = {"m.bin": b"model"} if kind == "file" else FILES

    wrong = [
        initialize(uri, place, VERIFICATION_DIGEST="0" * 64),
        initialize(uri, place, VERIFICATION_DIGEST="0" * 64, KSERVE_PVC_STORE=root),
    ]
    after = served(place), ModelStore(root).list(), [*root.glob(".kserve-pvc/keys/*/log/*")]
    right = initialize(uri, place, VERIFICATION_DIGEST=f"sha256:{digest(data)}")
    stored = initialize(uri, place / "stored", VERIFICATION_DIGEST=digest(data), KSERVE_PVC_STORE=root)

    assert [code for code, _ in wrong] == [1, 1]
    assert "nothing was published" in wrong[1][1]
    assert after == ({}, [], [])
    assert (right[0], stored[0]) == (0, 0), right[1] + stored[1]
    assert served(place / "stored") == files


def test_a_wrong_file_of_another_backend_does_not_stay_in_a_store(place, root, initialize):
    """
    What a plug-in or fsspec serves is compared after it was published, and removed again.
    """
    memory = fsspec.filesystem("memory")
    memory.pipe("/digests/m.bin", b"model")
    env = {"KSERVE_PVC_STORE": root}

    wrong = initialize("memory://digests/m.bin", place, VERIFICATION_DIGEST="0" * 64, **env)
    left = ModelStore(root).list(), [path for path in root.glob("models/*") if path.is_symlink()]
    right = initialize("memory://digests/m.bin", place, VERIFICATION_DIGEST=digest(b"model"), **env)

    assert (wrong[0], right[0]) == (1, 0), right[1]
    assert left == ([], [])
    assert served(place) == {"m.bin": b"model"}


def test_a_hit_has_the_digest_too(tmp_path, place, root, initialize):
    """
    What was filled or stored without a digest, or with another one, does not pass for what a later start asks for.
    """
    data = tar()
    write_files(tmp_path / "m", {"m.tar": data})
    uri = f"file://{tmp_path}/m/m.tar"
    initialize(uri, place)
    initialize(uri, place / "stored", KSERVE_PVC_STORE=root)

    right, wrong = {"VERIFICATION_DIGEST": digest(data)}, {"VERIFICATION_DIGEST": "0" * 64}
    hits = [initialize(uri, place, **right), initialize(uri, place / "new", **right, KSERVE_PVC_STORE=root)]
    refused = [
        initialize(uri, place, **wrong),
        initialize(uri, place / "stored", **wrong, KSERVE_PVC_STORE=root),
        initialize(uri, place / "other", **wrong, KSERVE_PVC_STORE=root),
    ]

    assert [code for code, _ in hits] == [0, 0], hits
    assert [code for code, _ in refused] == [1, 1, 1]
    assert all("VERIFICATION_DIGEST" in err for _, err in refused)
    assert served(place / "stored") == FILES
    assert len(ModelStore(root).list()) == 1


def test_what_a_killed_start_left_must_have_the_digest(tmp_path, place, initialize, monkeypatch):
    """
    A finished download that was never placed is discarded if it is not what the digest asks for.
    """
    write_files(tmp_path / "m", {"m.tar": tar()})
    uri = f"file://{tmp_path}/m/m.tar"
    with monkeypatch.context() as context:
        context.setattr(Destination, "fill", killed)
        with pytest.raises(KeyboardInterrupt):
            fill_all([(uri, str(place))], read_variables({}))
    left = sorted(path.name for path in (place / WORK).iterdir())

    code, _ = initialize(uri, place, VERIFICATION_DIGEST="0" * 64)

    assert "models" in left
    assert code == 1
    assert not (place / WORK).exists()
    assert initialize(uri, place, VERIFICATION_DIGEST=digest(tar()))[0] == 0


def killed(*_: object) -> None:
    raise KeyboardInterrupt


def test_the_digest_of_an_archive_on_the_web(place, initialize):
    """
    The same holds for HTTP, whose own digest of a URI counts besides.
    """
    data = COMPRESS["gz"](tar())
    with WebServer() as server:
        server.put("m.tar.gz", data)
        uri, env = server.uri("m.tar.gz"), {"KSERVE_PVC_ALLOW_PRIVATE_ADDRESSES": 1}
        codes = [
            initialize(uri, place, **env, VERIFICATION_DIGEST="1" * 64)[0],
            initialize(f"{uri}#sha256={'1' * 64}", place, **env, VERIFICATION_DIGEST=digest(data))[0],
            initialize(uri, place, **env, VERIFICATION_DIGEST=digest(data))[0],
        ]

    assert codes == [1, 1, 0]
    assert served(place) == FILES


# Limits


def test_limits_of_archives_are_a_setting(tmp_path, place, initialize):
    """
    The variable that the error names raises the limit, for every kind of source.
    """
    bomb = {"zeros.bin": bytes(40_000_000)}
    write_files(tmp_path / "m", {"m.tar.gz": COMPRESS["gz"](tar(bomb))})
    with WebServer() as server:
        server.put("m.zip", zipped({str(number): b"" for number in range(20)}))
        few = {"KSERVE_PVC_ALLOW_PRIVATE_ADDRESSES": 1, "KSERVE_PVC_UNPACK_LIMITS": "entries=10"}
        refused, web = initialize(tmp_path / "m", place), initialize(server.uri("m.zip"), place / "web", **few)
    raised = initialize(tmp_path / "m", place, KSERVE_PVC_UNPACK_LIMITS="ratio=2000, entries=3")

    assert (refused[0], web[0], raised[0]) == (1, 1, 0)
    assert "KSERVE_PVC_UNPACK_LIMITS" in refused[1]
    assert "more than 10 entries" in web[1]
    assert os.stat(place / "zeros.bin").st_size == 40_000_000


@pytest.mark.parametrize("value", ["ratio", "ratio=", "entries=1.5", "size=3", "ratio=-1", "ratio=nan", "entries=0"])
def test_limits_that_are_none(tmp_path, place, initialize, value):
    """
    A value without a meaning is an error that names the variable, before anything is fetched.
    """
    write_files(tmp_path / "m", {"a": b"a"})

    code, err = initialize(tmp_path / "m", place, KSERVE_PVC_UNPACK_LIMITS=value)

    assert code == 1
    assert "KSERVE_PVC_UNPACK_LIMITS" in err
    assert not (place / RECORD).exists()


def test_limits_that_are_not_given_are_the_defaults():
    """
    Each field is set alone.
    """
    given = read_variables({"KSERVE_PVC_UNPACK_LIMITS": "size_bytes=7"}).unpack_limits

    assert (given.size_bytes, given.entries) == (7, read_variables({}).unpack_limits.entries)


# Modes


MODES = {"run.sh": 0o755, "mine": 0o700, "others": 0o655, "data": 0o644}
SCRIPTS = dict.fromkeys(MODES, b"#!/bin/sh\n")
EXECUTABLE = {"run.sh", "mine"}


def executable(place):
    return {path.name for path in place.iterdir() if path.name in MODES and path.stat().st_mode & 0o111 == 0o111}


@pytest.mark.parametrize("kind", ["tar", "zip", "directory"])
@pytest.mark.parametrize("way", ["private", "reflink", "link", "copy", "symlink"])
def test_what_its_owner_may_execute_all_may(tmp_path, place, root, initialize, kind, way):
    """
    The permission is kept where KServe keeps it, for tars and directories, and for zips that have it; no other mode is.
    """
    if kind == "directory":
        write_files(tmp_path / "m", SCRIPTS)
        for name, mode in MODES.items():
            (tmp_path / "m" / name).chmod(mode)
    else:
        write_files(tmp_path / "m", {f"m.{kind}": tar(SCRIPTS, MODES) if kind == "tar" else zipped(SCRIPTS, MODES)})
    env = {} if way == "private" else {"KSERVE_PVC_STORE": root, "KSERVE_PVC_MATERIALIZE": way}

    code, err = initialize(tmp_path / "m", place, **env)
    if code and way == "reflink":
        pytest.skip("this file system shares no extents")

    assert code == 0, err
    assert executable(place) == EXECUTABLE
    assert {path.stat().st_mode & 0o7022 for path in place.iterdir() if path.name in MODES} == {0}


def test_a_zip_of_another_system_has_no_modes(tmp_path, place, initialize):
    """
    Its attributes mean something else there.
    """
    data = zipped(SCRIPTS, MODES)
    write_files(tmp_path / "m", {"m.zip": data.replace(b"PK\x01\x02\x14\x03", b"PK\x01\x02\x14\x00")})

    code, err = initialize(tmp_path / "m", place)

    assert code == 0, err
    assert executable(place) == set()


def test_an_exported_model_keeps_what_is_executable(tmp_path, place, root, initialize):
    """
    A bundle has it too, also one of an archive that the patterns had selected, whose digest is that of the archive.
    """
    data = tar(SCRIPTS, MODES)
    write_files(tmp_path / "m", {"m.tar": data, "LICENSE": b"l"})
    uri, patterns = f"file://{tmp_path}/m", ("*.tar",)
    initialize(uri, place, KSERVE_PVC_STORE=root, STORAGE_ALLOW_PATTERNS="*.tar")
    ModelStore(root).export(uri, tmp_path / "bundle", allow_patterns=patterns)
    (tmp_path / "other").mkdir()

    model = ModelStore(tmp_path / "other", mode="rw").import_(tmp_path / "bundle")

    assert read_tree(model.path) == SCRIPTS
    assert executable(model.path) == EXECUTABLE
    assert model.record.archive_sha256 == digest(data)


def test_addresses_of_azure_are_not_those_of_the_web():
    """
    Both have the scheme `https`, so a source brings only the backend of its own service.
    """
    limits = UnpackLimits()

    found = {service: set(unpacking(service, limits)) for service in ("az", "https", "s3", "memory")}

    assert found == {"az": {"az"}, "https": {"https"}, "s3": {"s3"}, "memory": set()}
