"""
A model as one file: written by one store, read by another, and believed in nothing.
"""

import errno
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import attrs
import pytest
import shell
from forging import ABSENT, signed
from hypothesis import given, settings
from hypothesis import strategies as st
from sources import FakeBackend
from trees import digests, listing, model_files, read_tree, write_files

from kserve_pvc import (
    DigestMismatchError,
    InsufficientSpaceError,
    InvalidURIError,
    ModelNotFoundError,
    ModelStore,
    PolicyError,
    ReadOnlyStoreError,
    SettingsError,
    SourceDeniedError,
    SourceNotFoundError,
    StoreError,
    StoreFormatError,
    UnsafePathError,
    VolumeError,
)
from kserve_pvc._archive.bundle_bytes import _padding, tar_header

MIB = 1024 * 1024
URI = "fake://host/model"
FILES = {**model_files(seed=51), "weights/größe.bin": b"three", f"deep/{'x' * 120}/y": b"long", ".hidden": b"dot"}
MANIFEST = "kserve-pvc-bundle.json"
END = "kserve-pvc-bundle.end"
# Three files that each get a note of their own in the journal, and several writes in the bundle.
LARGE = {f"part-{number}": random.Random(number).randbytes(9 * MIB) for number in range(3)}


@pytest.fixture
def isolated(tmp_path):
    """
    A read-write store on another volume, which has no back end for what it is to hold.
    """
    place = tmp_path / "isolated"
    place.mkdir()
    return ModelStore(place, mode="rw")


def filled(root: Path, files=FILES, uri: str = URI, *, selection=None, **arguments) -> ModelStore:
    """
    A store that holds the model of these files.
    """
    backend = FakeBackend(files)
    store = ModelStore(root, mode="rw", backends={"fake": backend.factory}, **arguments)
    store.ensure(uri, progress=False, **(selection or {}))
    return store


@pytest.fixture
def connected(root):
    """
    A store that holds the model of `FILES`.
    """
    return filled(root)


@pytest.fixture
def bundle(connected, tmp_path):
    """
    The bundle of the model of `FILES`.
    """
    connected.export(URI, tmp_path / "model.tar", progress=False)
    return tmp_path / "model.tar"


@pytest.fixture
def large(tmp_path):
    """
    The root of a store that holds the model of `LARGE`, its URI, and its bundle.
    """
    write_files(tmp_path / "large", LARGE)
    root, uri = tmp_path / "large-store", f"file://{tmp_path}/large"
    root.mkdir()
    store = ModelStore(root, mode="rw")
    store.ensure(uri, progress=False)
    store.export(uri, tmp_path / "reference.tar", progress=False)
    return root, uri, tmp_path / "reference.tar"


def facts(model) -> list[tuple[str, int, str | None, str | None]]:
    return [(str(f.path), f.size_bytes, f.sha256, f.token) for f in model.record.files]


def pack(path: Path, members: dict[str, bytes], kinds: dict[str, bytes] | None = None) -> Path:
    """
    Write an archive of these members as the standard library does, with all that a bundle leaves out left out.
    """
    with path.open("wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode, member.type = len(data), 0o444, (kinds or {}).get(name, tarfile.REGTYPE)
            archive.addfile(member, io.BytesIO(data))
    # The standard library fills the last record of 20 blocks.
    size = sum(512 + len(data) + len(_padding(len(data))) for data in members.values()) + 1024
    os.truncate(path, size)
    return path


def manifest_of(bundle: Path) -> dict:
    with tarfile.open(bundle) as archive:
        return json.load(archive.extractfile(MANIFEST))


def forged(path: Path, body: dict, files=FILES) -> Path:
    """
    An archive that is a bundle in every respect but what its manifest says.
    """
    data = signed({name: value for name, value in body.items() if value is not ABSENT})
    pieces = [tar_header(MANIFEST, len(data)), data, _padding(len(data))]
    for entry in body["files"] if isinstance(body.get("files"), list) else ():
        content = files.get(entry["path"], b"")
        pieces += [tar_header(f"model/{entry['path']}", len(content)), content, _padding(len(content))]
    end = hashlib.sha256(data).hexdigest().encode() + b"\n"
    path.write_bytes(b"".join([*pieces, tar_header(END, len(end)), end, _padding(len(end)), bytes(1024)]))
    return path


def test_a_model_comes_out_of_a_bundle_as_it_went_in(connected, isolated, bundle):
    """
    The imported model has the same files, digests, tokens and version, and both ways to ask for it find it at once.
    """
    original = connected.get(URI)

    model = isolated.import_(bundle, progress=False)

    assert (model.status, model.uri, model.key, model.version) == ("downloaded", URI, original.key, original.version)
    assert model.bytes_fetched == model.size_bytes == sum(map(len, FILES.values()))
    assert read_tree(model.path) == FILES
    assert facts(model) == facts(original)
    assert {path: sha256 for path, _, sha256, _ in facts(model)} == digests(FILES)
    assert isolated.get(URI).path == isolated.ensure(URI).path == model.path
    assert isolated.ensure(URI).status == "present"
    assert isolated.verify(URI, "full").ok


def test_what_was_asked_for_is_part_of_the_bundle(root, isolated, tmp_path):
    """
    A model of a revision and patterns is found by the same revision and patterns, and by nothing else.
    """
    selection = {"revision": "v1", "allow_patterns": ["*.bin", "*.json"], "ignore_patterns": "weights/a*"}
    filled(root, selection=selection).export(URI, tmp_path / "m.tar", progress=False, **selection)

    model = isolated.import_(tmp_path / "m.tar", progress=False)

    assert sorted(read_tree(model.path)) == ["config.json", "weights/b.bin", "weights/größe.bin"]
    assert isolated.get(URI, **selection).path == model.path
    assert URI not in isolated


def test_the_same_version_gives_the_same_bytes(root, bundle, isolated, tmp_path):
    """
    Stores of another time, part size and locker write the same bundle, and so does one that imported it.
    """
    (tmp_path / "other").mkdir()
    other = filled(tmp_path / "other", part_bytes=4096, locker="flock", lease_seconds=7)
    other.ensure(URI, progress=False, force_download=True)
    isolated.import_(bundle, progress=False)

    exports = [store.export(URI, tmp_path / f"{i}.tar", progress=False) for i, store in enumerate((other, isolated))]

    assert [(tmp_path / f"{i}.tar").read_bytes() for i in range(2)] == [bundle.read_bytes()] * 2
    assert exports[0].sha256 == exports[1].sha256 == hashlib.sha256(bundle.read_bytes()).hexdigest()
    inner = hashlib.sha256(_content(bundle, MANIFEST)).hexdigest()
    assert exports[0].manifest_sha256 == exports[1].manifest_sha256 == inner
    assert exports[0].size_bytes == bundle.stat().st_size


def _content(bundle: Path, name: str) -> bytes:
    with tarfile.open(bundle) as archive:
        return archive.extractfile(name).read()


class Backwards(FakeBackend):
    """
    A plug-in that lists files in an order of its own.
    """

    def resolve(self, ref):
        found = super().resolve(ref)
        return attrs.evolve(found, files=found.files[::-1])


def test_the_order_of_a_listing_makes_no_other_bundle(bundle, tmp_path):
    """
    Files are in the order of their paths, whatever a back end's listing was.
    """
    (tmp_path / "backwards").mkdir()
    store = ModelStore(tmp_path / "backwards", mode="rw", backends={"fake": Backwards(FILES).factory})
    store.ensure(URI, progress=False)

    store.export(URI, tmp_path / "backwards.tar", progress=False)

    assert (tmp_path / "backwards.tar").read_bytes() == bundle.read_bytes()


def test_a_bundle_is_a_plain_archive(bundle, tool, tmp_path):
    """
    `tar` lists and unpacks it; nothing in it says who wrote it or when, and its last member is the digest of its first.
    """
    listed = subprocess.run(
        [tool("tar"), "--quoting-style=literal", "-tf", bundle], check=True, capture_output=True, text=True
    )
    subprocess.run([tool("tar"), "--extract", "--directory", tmp_path, "--file", bundle, "model"], check=True)
    with tarfile.open(bundle) as archive:
        members = archive.getmembers()

    names = [f"model/{name}" for name in sorted(FILES, key=lambda name: name.replace("/", "\0"))]
    assert listed.stdout.splitlines() == [m.name for m in members] == [MANIFEST, *names, END]
    assert listed.stderr == ""
    assert {(m.type, m.mode, m.uid, m.gid, m.uname, m.gname, m.mtime) for m in members} == {
        (tarfile.REGTYPE, 0o444, 0, 0, "", "", 0)
    }
    assert read_tree(tmp_path / "model") == FILES
    assert _content(bundle, END).decode() == hashlib.sha256(_content(bundle, MANIFEST)).hexdigest() + "\n"


def test_a_bundle_of_plain_names_is_what_the_standard_library_packs(root, tmp_path):
    """
    The format is plain ustar, byte for byte, where names are short and sizes small.
    """
    files = model_files(seed=52)
    filled(root, files).export(URI, tmp_path / "m.tar", progress=False)

    names = sorted(files, key=lambda name: name.replace("/", "\0"))
    own = {name: _content(tmp_path / "m.tar", name) for name in (MANIFEST, END)}
    packed = pack(
        tmp_path / "p.tar", {MANIFEST: own[MANIFEST], **{f"model/{n}": files[n] for n in names}, END: own[END]}
    )

    assert (tmp_path / "m.tar").read_bytes() == packed.read_bytes()


@settings(max_examples=200, deadline=None)
@given(
    name=st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=300).map(
        lambda text: text.replace("/", "") or "x"
    ),
    size=st.one_of(st.integers(0, 2000), st.integers(8**11 - 2, 8**11 + 2), st.integers(0, 2**62)),
)
def test_every_name_and_size_can_be_written_down(name, size):
    """
    What the standard library reads from a header is the name and the size it was made of.
    """
    with tarfile.open(fileobj=io.BytesIO(tar_header(name, size) + bytes(1024))) as archive:
        member = archive.next()

    assert (member.name, member.size, member.isreg()) == (name, size, True)


def test_a_member_of_more_than_eight_gibibytes_is_read_by_tar(tmp_path, tool):
    """
    A size that does not fit the plain header is understood by `tar`, and so is what comes after.
    """
    size = 9 * 1024 * MIB + 5
    archive = tmp_path / "m.tar"
    with archive.open("wb") as file:
        file.write(tar_header("model/large", size))
        file.seek(size + len(_padding(size)), os.SEEK_CUR)
        file.write(tar_header("model/small", 0) + bytes(1024))

    listed = subprocess.run(
        [tool("tar"), "-tvf", archive], check=True, capture_output=True, text=True
    ).stdout.splitlines()

    assert [line.split()[2::3] for line in listed] == [[str(size), "model/large"], ["0", "model/small"]]


def test_exporting_writes_nothing_to_the_store(connected, root, bundle, tmp_path, mount):
    """
    A read-only store on a volume mounted read-only writes the same bundle, and no inode of the store is touched.
    """
    before = listing(root)
    place = mount("--bind", str(root))
    subprocess.run(["mount", "-o", "remount,bind,ro", str(place)], check=True)

    ModelStore(place).export(URI, tmp_path / "again.tar", progress=False)

    assert (tmp_path / "again.tar").read_bytes() == bundle.read_bytes()
    assert listing(root) == before


def test_an_export_that_is_there_is_not_written_again(connected, bundle):
    """
    A Job that runs twice reads the bundle and leaves it as it is, and one that was damaged is replaced.
    """
    good, before = bundle.read_bytes(), bundle.stat()

    again = connected.export(URI, bundle, progress=False)
    bundle.write_bytes(good[:-2000] + b"x" + good[-1999:])
    damaged = bundle.stat().st_ino
    mended = connected.export(URI, bundle, progress=False)

    assert (again.bytes_written, mended.bytes_written) == (0, len(good))
    assert before.st_ino == damaged != bundle.stat().st_ino
    assert bundle.read_bytes() == good


@pytest.mark.parametrize("write", ["to a file", "to a stream"])
def test_a_callback_hears_of_every_byte(connected, tmp_path, write):
    """
    An fsspec callback is told the size of the model and steps that add up to it.
    """
    from fsspec.callbacks import Callback

    callback = Callback()
    connected.export(URI, tmp_path / "m.tar" if write == "to a file" else io.BytesIO(), callback=callback)

    assert callback.size == callback.value == sum(map(len, FILES.values()))


def test_a_stream_gets_the_same_bytes(connected, bundle):
    """
    Whatever has a `write` takes a bundle.
    """
    stream = io.BytesIO()

    exported = connected.export(URI, stream, progress=False)

    assert stream.getvalue() == bundle.read_bytes()
    assert exported.sha256 == sha256sum(bundle)
    assert (exported.file, exported.bytes_written) == ("-", bundle.stat().st_size)


LEFT = {
    "nothing": lambda good: b"",
    "a byte": lambda good: good[:1],
    "half": lambda good: good[: len(good) // 2],
    "all but the end": lambda good: good[:-1],
    "all": lambda good: good,
    "more than all": lambda good: good + b"more",
    "zeros, as power loss leaves them": lambda good: bytes(len(good)),
    "half and a hole": lambda good: good[: len(good) // 2] + bytes(len(good) // 3),
    "a hole and the rest": lambda good: bytes(len(good) // 2) + good[len(good) // 2 :],
    "a byte of a file changed": lambda good: good[:300_000] + bytes([good[300_000] ^ 1]) + good[300_001:],
    "a byte of the beginning of a file changed": lambda good: (
        good[:300_000] + bytes([good[300_000] ^ 1]) + good[300_001:400_000]
    ),
    "noise": lambda good: random.Random(1).randbytes(len(good) + 1000),
}


@pytest.mark.parametrize("left", LEFT)
def test_whatever_an_export_left_the_next_one_is_right(connected, bundle, left):
    """
    What is there is taken over as far as it proves itself, and everything else is written.
    """
    good = bundle.read_bytes()
    bundle.unlink()
    partial = partial_of(good, bundle)
    partial.write_bytes(LEFT[left](good))

    exported = connected.export(URI, bundle, progress=False)

    assert bundle.read_bytes() == good
    assert exported.sha256 == hashlib.sha256(good).hexdigest()
    assert not partial.exists()
    expected = {"nothing": len(good), "all": 0, "more than all": 0}
    assert exported.bytes_written == expected.get(left, exported.bytes_written)
    assert left != "half" or exported.bytes_written <= len(good) // 2 + 10 * 512


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
def test_an_export_that_could_not_be_synced_is_written_anew(connected, tmp_path, monkeypatch, code):
    """
    Its bytes may be in the page cache only, where the next export would find them valid: they are deleted.
    """

    def fail(fd: int) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(StoreError):
            connected.export(URI, tmp_path / "model.tar", progress=False)

    assert [path.name for path in tmp_path.glob("model.tar*")] == []
    exported = connected.export(URI, tmp_path / "model.tar", progress=False)
    assert exported.bytes_written == (tmp_path / "model.tar").stat().st_size


def partial_of(good: bytes, bundle: Path) -> Path:
    """
    Where an export of this bundle lies before it is whole.
    """
    size = int(good[124:135], 8)
    return bundle.with_name(f"{bundle.name}.{hashlib.sha256(good[512 : 512 + size]).hexdigest()[:16]}.partial")


def test_what_another_version_left_is_left_alone(connected, bundle, tmp_path):
    """
    The private name belongs to one version of one model.
    """
    foreign = bundle.with_name(f"{bundle.name}.{'0' * 16}.partial")
    foreign.write_bytes(b"another version")

    connected.export(URI, bundle, progress=False)

    assert foreign.read_bytes() == b"another version"


def test_exports_at_the_same_time_do_not_harm_each_other(large, tmp_path):
    """
    Several processes that write the same bundle to the same place all end well, and leave nothing but the bundle.
    """
    root, uri, reference = large
    file = tmp_path / "out" / "m.tar"
    file.parent.mkdir()

    processes = [shell.start(root, "-q", "export", uri, str(file)) for _ in range(4)]
    said = [(process.communicate(timeout=60), process.returncode) for process in processes]

    assert said == [(("", ""), 0)] * 4
    assert file.read_bytes() == reference.read_bytes()
    assert list(file.parent.iterdir()) == [file]


def test_what_a_third_export_has_begun_is_not_taken_for_whole(tmp_path):
    """
    An export whose file was named by another one does not give that name to what lies under the private name since.
    """
    from kserve_pvc._archive.export import _publish

    partial, named = tmp_path / "m.tar.partial", tmp_path / "m.tar"
    partial.write_bytes(b"whole")
    with partial.open("rb") as ours:
        partial.rename(named)
        _publish(ours.fileno(), partial, named)
        partial.write_bytes(b"wh")
        _publish(ours.fileno(), partial, named)

    assert (named.read_bytes(), partial.read_bytes()) == (b"whole", b"wh")


# Writing 27 MiB of files, in pieces of 1 MiB, and what makes it durable and gives it its name.
@pytest.mark.parametrize(
    ("call", "number"),
    [("pwrite64", n) for n in (1, 2, 3, 9, 14, 25, 32)] + [("fsync", 1), ("fsync", 2), ("rename", 1), ("ftruncate", 1)],
)
def test_an_export_that_is_killed_goes_on_where_it_was(large, tool, tmp_path, call, number):
    """
    After SIGKILL at any step there is no bundle or the whole one; the next export ends with the same bytes and writes
    only what is missing.
    """
    root, uri, reference = large
    file = tmp_path / "out" / "m.tar"
    file.parent.mkdir()
    command = [sys.executable, "-I", "-m", "kserve_pvc", "--store", str(root), "export", uri, str(file)]
    kill = [
        tool("strace"),
        "-f",
        "-qq",
        "-o",
        os.devnull,
        "-e",
        f"trace={call}",
        "-e",
        f"inject={call}:signal=SIGKILL:when={number}",
    ]

    killed = subprocess.run([*kill, *command], capture_output=True, timeout=60, env=shell.clean_environ())
    left = sum(path.stat().st_size for path in file.parent.iterdir())
    was_whole = file.exists()
    exported = ModelStore(root).export(uri, file, progress=False)

    assert killed.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL)
    assert not was_whole or (call, number) in {("rename", 1), ("fsync", 2)}
    assert file.read_bytes() == reference.read_bytes()
    assert list(file.parent.iterdir()) == [file]
    assert exported.bytes_written <= reference.stat().st_size - left + MIB
    assert number < 9 or exported.bytes_written < reference.stat().st_size - 5 * MIB


# The number counts for each thread; seven pieces of 1 MiB are more than half of a file.
@pytest.mark.parametrize(
    ("call", "number"), [("pwrite64", n) for n in (1, 2, 4, 7)] + [("linkat", 1), ("fsync", 2), ("fsync", 5)]
)
def test_an_import_that_is_killed_goes_on_where_it_was(large, tool, tmp_path, call, number):
    """
    After SIGKILL at any step the model is absent or whole; the next import ends with the whole model.
    """
    _, uri, reference = large
    place = tmp_path / "isolated"
    place.mkdir()
    ModelStore(place, mode="rw", lease_seconds=1)
    command = [sys.executable, "-I", "-m", "kserve_pvc", "--store", str(place), "import", str(reference)]
    kill = [
        tool("strace"),
        "-f",
        "-qq",
        "-o",
        os.devnull,
        "-e",
        f"trace={call}",
        "-e",
        f"inject={call}:signal=SIGKILL:when={number}",
    ]

    killed = subprocess.run([*kill, *command], capture_output=True, timeout=60, env=shell.clean_environ())
    store = ModelStore(place, mode="rw")
    was_present = uri in store
    model = store.import_(reference, progress=False)

    assert killed.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL)
    assert model.status == ("present" if was_present else "downloaded")
    assert digests(read_tree(model.path)) == digests(LARGE)
    assert store.verify(uri, "full").ok
    assert [path.name for path in model.path.parent.iterdir()] == [model.path.name]


def test_an_import_takes_over_what_a_killed_one_left(large, isolated, monkeypatch):
    """
    What was copied before is proven by its digest, and not read from the bundle again.
    """
    from kserve_pvc._archive import bundle as _bundle

    reference = large[2]
    honest, opened = _bundle.Bundle.open_range, []

    def failing(self, file, start, stop):
        opened.append(str(file.entry.path))
        if len(opened) == 3:
            raise SourceDeniedError("the third range", "it is for the test")
        return honest(self, file, start, stop)

    monkeypatch.setattr(_bundle.Bundle, "open_range", failing)
    monkeypatch.setattr("kserve_pvc._defaults.MAX_WORKERS", 1)
    with pytest.raises(SourceDeniedError):
        isolated.import_(reference, progress=False)
    monkeypatch.undo()

    model = isolated.import_(reference, progress=False)

    assert digests(read_tree(model.path)) == digests(LARGE)
    assert model.bytes_fetched < model.size_bytes


def test_a_version_that_is_present_is_not_imported(connected, root, bundle):
    """
    The model is returned as it is, and nothing is written.
    """
    before = listing(root)

    model = connected.import_(bundle, progress=False)

    assert (model.status, model.bytes_fetched, model.path) == ("present", 0, connected.get(URI).path)
    assert listing(root) == before


def test_another_version_is_put_beside_the_present_one(bundle, tmp_path):
    """
    What is imported becomes the current version; readers of the other one keep their directory.
    """
    (tmp_path / "newer").mkdir()
    newer = filled(tmp_path / "newer", {**FILES, "config.json": b"newer"})
    before = newer.get(URI)

    model = newer.import_(bundle, progress=False)

    assert (model.status, model.version != before.version) == ("downloaded", True)
    assert read_tree(model.path) == read_tree(newer.get(URI).path) == FILES
    assert read_tree(before.path) == {**FILES, "config.json": b"newer"}


def test_a_store_that_does_not_hash_compares_digests_all_the_same(bundle, tmp_path):
    """
    `digest="none"` is about what a store downloads itself: a bundle promises SHA-256, and its record has it.
    """
    (tmp_path / "trusting").mkdir()
    store = ModelStore(tmp_path / "trusting", mode="rw", digest="none")
    data = bytearray(bundle.read_bytes())
    data[300_000] ^= 1
    (tmp_path / "bad.tar").write_bytes(data)

    with pytest.raises(DigestMismatchError):
        store.import_(tmp_path / "bad.tar", progress=False)
    model = store.import_(bundle, progress=False)

    assert {path: sha256 for path, _, sha256, _ in facts(model)} == digests(FILES)
    assert store.verify(URI, "full").ok


def sha256sum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("spelled", [str, str.upper, "sha256:{}".format, "{}\n".format])
def test_an_import_takes_the_digest_of_the_file_in_every_spelling(isolated, bundle, spelled):
    """
    What `sha256sum`, PowerShell, our own messages and a file with the digest say of the bundle is accepted.
    """
    model = isolated.import_(bundle, sha256=spelled(sha256sum(bundle)), progress=False)

    assert model.status == "downloaded"


def test_an_export_that_is_there_has_the_same_digests(connected, bundle):
    """
    A second export writes nothing and returns both digests as the first did.
    """
    again = connected.export(URI, bundle, progress=False)

    manifest = hashlib.sha256(_content(bundle, MANIFEST)).hexdigest()
    assert (again.bytes_written, again.sha256, again.manifest_sha256) == (0, sha256sum(bundle), manifest)


def test_the_two_digests_of_a_bundle_are_not_mixed_up(isolated, bundle):
    """
    Each is accepted under its own name only, and the message says under which.
    """
    manifest = hashlib.sha256(_content(bundle, MANIFEST)).hexdigest()

    with pytest.raises(DigestMismatchError, match="--manifest-sha256"):
        isolated.import_(bundle, sha256=manifest, progress=False)
    with pytest.raises(DigestMismatchError, match="copy the bundle again"):
        isolated.import_(bundle, manifest_sha256=sha256sum(bundle), progress=False)
    absent = URI in isolated
    model = isolated.import_(bundle, manifest_sha256=manifest, progress=False)

    assert (absent, model.status) == (False, "downloaded")


def test_the_digest_of_a_file_is_compared_before_anything_is_written(isolated, root, bundle):
    """
    A bundle with one other byte in a file is refused with the digest that `sha256sum` would print of it.
    """
    told = sha256sum(bundle)
    flip(bundle, 300_000)

    with pytest.raises(DigestMismatchError) as caught:
        isolated.import_(bundle, sha256=told, progress=False)

    assert caught.value.actual == f"sha256:{sha256sum(bundle)}"
    assert not (isolated.root / "models").exists() or not list((isolated.root / "models").iterdir())


def test_only_the_bundle_that_was_told_is_imported(connected, isolated, bundle, tmp_path):
    """
    `sha256` accepts one bundle and refuses any other, before anything is written.
    """
    told = connected.export(URI, bundle, progress=False).sha256

    with pytest.raises(DigestMismatchError):
        isolated.import_(bundle, sha256="0" * 64, progress=False)
    with pytest.raises(SettingsError):
        isolated.import_(bundle, sha256="told by phone", progress=False)
    absent = URI in isolated
    model = isolated.import_(bundle, sha256=told, progress=False)

    assert (absent, model.status) == (False, "downloaded")


DAMAGED = {
    "a byte changed": lambda path: flip(path, 1000),
    "cut short": lambda path: rewrite(path, path.read_bytes()[:-1]),
    "longer": lambda path: rewrite(path, path.read_bytes() + b"x"),
    "missing": Path.unlink,
}


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    rewrite(path, bytes(data))


def rewrite(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_model_is_not_exported(connected, tmp_path, damage):
    """
    The error names the file, and there is no bundle.
    """
    DAMAGED[damage](connected.get(URI).path / "weights" / "a.bin")

    with pytest.raises(VolumeError, match=r"weights/a\.bin"):
        connected.export(URI, tmp_path / "m.tar", progress=False)
    stream = io.BytesIO()
    with pytest.raises(VolumeError):
        connected.export(URI, stream, progress=False)

    assert not (tmp_path / "m.tar").exists()
    assert END.encode() not in stream.getvalue()


def test_a_link_in_a_model_is_not_followed(connected, tmp_path):
    """
    What somebody planted on the volume does not get out by a bundle.
    """
    (tmp_path / "secret").write_bytes(FILES["weights/b.bin"])
    planted = connected.get(URI).path / "weights" / "b.bin"
    planted.unlink()
    planted.symlink_to(tmp_path / "secret")

    with pytest.raises(UnsafePathError):
        connected.export(URI, tmp_path / "m.tar", progress=False)

    assert not (tmp_path / "m.tar").exists()


def test_what_was_never_hashed_is_not_exported(root, tmp_path):
    """
    Hashing it now would call proven what nobody has proven.
    """
    store = filled(root, digest="none")

    with pytest.raises(PolicyError, match="without hashing"):
        store.export(URI, tmp_path / "m.tar", progress=False)

    assert list(tmp_path.glob("m.tar*")) == []


def test_a_bundle_is_not_written_where_it_does_harm(connected, root, tmp_path):
    """
    Not into the store, also not through a link, and not over a directory or a device.
    """
    (tmp_path / "link").symlink_to(root)
    os.mkfifo(tmp_path / "pipe")
    before, store = listing(root), ModelStore(root)

    for place in (
        root / "m.tar",
        connected.get(URI).path / "m.tar",
        tmp_path / "link" / "m.tar",
        tmp_path,
        tmp_path / "pipe",
        "/dev/null",
    ):
        with pytest.raises(SettingsError):
            store.export(URI, place, progress=False)
    with pytest.raises(VolumeError):
        store.export(URI, tmp_path / "no" / "such" / "directory", progress=False)
    with pytest.raises(ModelNotFoundError):
        store.export("fake://host/absent", tmp_path / "m.tar", progress=False)

    assert listing(root) == before
    assert Path("/dev/null").is_char_device()


def test_a_bundle_that_does_not_fit_is_not_begun(connected, tmp_path, mount):
    """
    The error says how much is needed, and nothing lies where the bundle should be.
    """
    small = mount("-t", "tmpfs", "-o", "size=64k", "none")

    with pytest.raises(InsufficientSpaceError) as caught:
        connected.export(URI, small / "m.tar", progress=False)

    assert caught.value.needed_bytes > 700_000
    assert not (small / "m.tar").exists()


def nothing_is_there(store: ModelStore) -> bool:
    return store.list() == [] and URI not in store and not list((store.root / ".kserve-pvc" / "keys").glob("*/log/*"))


def test_a_bundle_cut_off_anywhere_is_refused(isolated, bundle, tmp_path):
    """
    Whatever its length is, a bundle that is not whole is a `StoreFormatError`, and nothing was written.
    """
    good = bundle.read_bytes()
    before = listing(isolated.root)
    cut = tmp_path / "cut.tar"

    lengths = {0, 1, 511, 512, 513, 600, len(good) - 1, len(good) - 512, len(good) - 1024, *range(0, len(good), 9973)}
    for length in lengths:
        cut.write_bytes(good[:length])
        with pytest.raises(StoreFormatError, match="truncated" if length >= 512 else "not a bundle"):
            isolated.import_(cut, progress=False)

    assert listing(isolated.root) == before


def test_a_byte_changed_outside_of_the_files_is_refused(isolated, bundle, tmp_path):
    """
    In the manifest, a header, padding or the end it is a `StoreFormatError`, and nothing was published.
    """
    good = bundle.read_bytes()
    manifest = int(good[124:135], 8)
    headers = [at for at in range(0, len(good), 512) if good[at + 257 : at + 262] == b"ustar"]
    changed = tmp_path / "changed.tar"
    edges = [at + offset for at in headers for offset in (0, 100, 124, 148, 156, 157, 500)]
    positions = {*edges, 512, 512 + manifest - 1, 512 + manifest, *range(len(good) - 1700, len(good), 97)}
    for position in sorted(positions):
        data = bytearray(good)
        data[position] ^= 1
        changed.write_bytes(data)
        with pytest.raises(StoreFormatError):
            isolated.import_(changed, progress=False)

    assert nothing_is_there(isolated)


@pytest.mark.parametrize("name", ["config.json", "weights/a.bin", "weights/größe.bin"])
def test_a_byte_of_a_file_changed_is_refused(isolated, bundle, tmp_path, name):
    """
    What is not as its digest says is a `DigestMismatchError` that names the file; the good bundle is imported
    afterwards.
    """
    data = bytearray(good := bundle.read_bytes())
    data[good.index(FILES[name]) + len(FILES[name]) - 1] ^= 1
    (tmp_path / "changed.tar").write_bytes(data)

    with pytest.raises(DigestMismatchError) as caught:
        isolated.import_(tmp_path / "changed.tar", progress=False)
    clean = nothing_is_there(isolated)

    assert (caught.value.path, clean) == (name, True)
    assert read_tree(isolated.import_(bundle, progress=False).path) == FILES


def packed_anew(change):
    """
    The members of a bundle, changed and packed with right checksums.
    """

    def build(bundle: Path, target: Path) -> None:
        with tarfile.open(bundle) as archive:
            members = {member.name: archive.extractfile(member).read() for member in archive}
        kinds: dict[str, bytes] = {}
        pack(target, change(members, kinds) or members, kinds)

    return build


def linked(kind: bytes):
    def change(members, kinds):
        kinds["model/weights/b.bin"] = kind

    return change


PACKED = {
    "a member is missing": packed_anew(lambda m, _: m.pop("model/config.json") and None),
    "a member too many": packed_anew(lambda m, _: {**m, "model/extra": b"x"}),
    "a member before the end too many": packed_anew(
        lambda m, _: {**{k: v for k, v in m.items() if k != END}, "x": b"", END: m[END]}
    ),
    "a member twice as long": packed_anew(lambda m, _: {**m, "model/weights/b.bin": m["model/weights/b.bin"] * 2}),
    "another order": packed_anew(lambda m, _: {MANIFEST: m[MANIFEST], **dict(reversed(m.items()))}),
    "the manifest is not first": packed_anew(lambda m, _: dict(sorted(m.items(), reverse=True))),
    "no end": packed_anew(lambda m, _: m.pop(END) and None),
    "the end of another": packed_anew(lambda m, _: {**m, END: b"0" * 64 + b"\n"}),
    "a name that climbs": packed_anew(
        lambda m, _: {k.replace("model/config", "model/../../config"): v for k, v in m.items()}
    ),
    "an absolute name": packed_anew(lambda m, _: {k.replace("model/config", "/etc/config"): v for k, v in m.items()}),
    "a symbolic link": packed_anew(linked(tarfile.SYMTYPE)),
    "a hard link": packed_anew(linked(tarfile.LNKTYPE)),
    "a device": packed_anew(linked(tarfile.CHRTYPE)),
    "a pipe": packed_anew(linked(tarfile.FIFOTYPE)),
    "no archive": lambda bundle, target: target.write_bytes(b"PK\x03\x04" + bytes(100_000)),
    "an empty archive": lambda bundle, target: target.write_bytes(bytes(10_240)),
    "something follows": lambda bundle, target: target.write_bytes(bundle.read_bytes() + bytes(512)),
    "two bundles": lambda bundle, target: target.write_bytes(bundle.read_bytes() * 2),
    "a manifest without end": lambda bundle, target: target.write_bytes(tar_header(MANIFEST, 8**11 - 1) + bytes(1000)),
    "a manifest of nothing": lambda bundle, target: target.write_bytes(tar_header(MANIFEST, 0) + bytes(1024)),
}


@pytest.mark.parametrize("wrong", PACKED)
def test_an_archive_that_is_not_as_written_is_refused(isolated, bundle, tmp_path, wrong):
    """
    Members that are missing, too many, out of order, links, devices or elsewhere are one error, and write nothing.
    """
    before = listing(isolated.root)
    PACKED[wrong](bundle, tmp_path / "wrong.tar")

    with pytest.raises(StoreFormatError):
        isolated.import_(tmp_path / "wrong.tar", progress=False)

    assert listing(isolated.root) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["isolated", "model.tar", "volume", "wrong.tar"]


def file(path: str, **changes) -> dict:
    data = FILES.get(path, b"")
    return {"path": path, "size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "token": "t", **changes}


def of_files(*files: dict, **changes):
    return lambda body: {
        **body,
        "files": list(files),
        "size_bytes": sum(f.get("size_bytes", 0) for f in files),
        **changes,
    }


FORGED = {
    "a name that climbs": of_files(file("../../x")),
    "an absolute name": of_files(file("/etc/x")),
    "a name with a backslash": of_files(file("a\\b")),
    "a name with a control character": of_files(file("a\x1b[2J")),
    "an empty name": of_files(file("")),
    "a name that is too long": of_files(file("x" * 300)),
    "a name twice": of_files(file("x"), file("x")),
    "names that differ in case": of_files(file("A"), file("a")),
    "a file that is a directory too": of_files(file("x"), file("x/y")),
    "another order": lambda body: {**body, "files": body["files"][::-1]},
    "no files": of_files(),
    "a file without a digest": of_files(file("x", sha256=None)),
    "a digest that is none": of_files(file("x", sha256="0" * 63)),
    "a negative size": of_files(file("x", size_bytes=-1)),
    "a huge size": of_files(file("x", size_bytes=2**63 - 1)),
    "a size beyond all sizes": of_files(file("x", size_bytes=2**70)),
    "evidence of its own": of_files(file("x", evidence="md5:" + "0" * 32)),
    "a wrong sum": lambda body: {**body, "size_bytes": body["size_bytes"] + 1},
    "a file that the patterns do not let through": lambda body: {**body, "ignore_patterns": ["config.json"]},
    "the key of another model": lambda body: {**body, "key": "model-0123456789abcdef"},
    "a key that climbs": lambda body: {**body, "key": "../../x-0123456789abcdef"},
    "another uri": lambda body: {**body, "uri": "fake://host/other"},
    "credentials": lambda body: {**body, "uri": "fake://user:secret@host/model"},
    "a query": lambda body: {**body, "uri": "fake://host/model?sig=secret"},
    "no uri": lambda body: {**body, "uri": "model"},
    "a number for a uri": lambda body: {**body, "uri": 7},
    "patterns that are a text": lambda body: {**body, "allow_patterns": "*"},
    "an unknown field": lambda body: {**body, "post_install": "rm -rf /"},
    "a field is missing": lambda body: {**body, "version": ABSENT},
    "files that are none": lambda body: {**body, "files": {"x": 1}},
    "a newer format": lambda body: {**body, "format": 2},
}


@pytest.mark.parametrize("wrong", FORGED)
def test_a_forged_manifest_is_refused(isolated, bundle, tmp_path, wrong):
    """
    A manifest that is whole, has a right checksum and says what no export says, is one error and writes nothing.
    """
    before = listing(isolated.root)
    forged(tmp_path / "forged.tar", FORGED[wrong](manifest_of(bundle)))

    with pytest.raises(StoreFormatError) as caught:
        isolated.import_(tmp_path / "forged.tar", progress=False)

    assert listing(isolated.root) == before
    assert "secret" not in str(caught.value)
    assert "secret" not in repr(caught.value)
    assert str(caught.value).isprintable()


def test_forging_as_such_is_not_what_is_refused(isolated, bundle, tmp_path):
    """
    An archive made as the forged ones, of a manifest that is right, is the bundle itself.
    """
    made = forged(tmp_path / "made.tar", manifest_of(bundle))

    assert made.read_bytes() == bundle.read_bytes()


def test_a_manifest_in_another_spelling_is_refused(isolated, bundle, tmp_path):
    """
    A manifest with a blank that changes neither its meaning nor its checksum would make another bundle of the same
    model.
    """
    size = int(bundle.read_bytes()[124:135], 8)
    good = bundle.read_bytes()[512 : 512 + size]
    spelled = good.replace(b",", b", ", 1)
    rest = bundle.read_bytes()[512 + size + len(_padding(size)) : -2048]
    end = hashlib.sha256(spelled).hexdigest().encode() + b"\n"
    pieces = [
        tar_header(MANIFEST, len(spelled)),
        spelled,
        _padding(len(spelled)),
        rest,
        tar_header(END, len(end)),
        end,
        _padding(len(end)),
        bytes(1024),
    ]
    (tmp_path / "spelled.tar").write_bytes(b"".join(pieces))

    with pytest.raises(StoreFormatError, match="not in canonical form"):
        isolated.import_(tmp_path / "spelled.tar", progress=False)

    assert nothing_is_there(isolated)


def test_a_file_that_cannot_be_read_is_a_typed_error(isolated, bundle, tmp_path):
    """
    A bundle that is missing, a directory or a pipe is told apart, without waiting for a pipe's writer.
    """
    os.mkfifo(tmp_path / "pipe")

    for place, error in (
        (tmp_path / "no.tar", SourceNotFoundError),
        (tmp_path, SettingsError),
        (tmp_path / "pipe", SettingsError),
    ):
        with pytest.raises(error):
            isolated.import_(place, progress=False)
    with pytest.raises(ReadOnlyStoreError):
        ModelStore(isolated.root).import_(bundle, progress=False)

    assert nothing_is_there(isolated)


def test_a_bundle_that_changes_while_it_is_read_is_noticed(isolated, bundle, monkeypatch):
    """
    A bundle that shrinks or is written over after it was opened publishes nothing.
    """
    from kserve_pvc._archive import bundle as _bundle

    honest, good = _bundle.Bundle.resolve, bundle.read_bytes()

    def shrinking(self, ref):
        os.truncate(bundle, 5000)
        return honest(self, ref)

    monkeypatch.setattr(_bundle.Bundle, "resolve", shrinking)
    with pytest.raises(StoreError) as caught:
        isolated.import_(bundle, progress=False)
    monkeypatch.undo()
    absent = nothing_is_there(isolated)
    bundle.write_bytes(good)

    assert type(caught.value).__name__ == "SourceChangedError"
    assert absent
    assert isolated.import_(bundle, progress=False).status == "downloaded"


def test_the_shell_exports_and_imports(root, connected, bundle, tmp_path):
    """
    Both verbs print their JSON document, `import` the directory as `ensure` does, and a pipe takes a bundle.
    """
    place, piped = tmp_path / "isolated", tmp_path / "piped.tar"
    place.mkdir()

    exported = shell.kserve_pvc(root, "--json", "export", URI, str(tmp_path / "m.tar"))
    with piped.open("wb") as out:
        streamed = subprocess.run(
            [*shell.COMMAND, "--store", str(root), "export", URI, "-"], stdout=out, stderr=subprocess.PIPE, text=True
        )
    imported = shell.kserve_pvc(place, "import", str(piped), "--sha256", shell.document(exported)["sha256"])
    again = shell.kserve_pvc(place, "--json", "-q", "import", str(piped))

    assert (exported.returncode, streamed.returncode, imported.returncode, again.returncode) == (0, 0, 0, 0)
    assert (tmp_path / "m.tar").read_bytes() == piped.read_bytes() == bundle.read_bytes()
    document = shell.document(exported)
    assert (document["uri"], document["files"], document["size_bytes"]) == (URI, len(FILES), bundle.stat().st_size)
    assert document["sha256"] in streamed.stderr
    (path,) = imported.stdout.splitlines()
    assert read_tree(Path(path)) == FILES
    assert sorted(shell.document(again)) == sorted(
        ["uri", "key", "version", "path", "status", "size_bytes", "bytes_fetched", "seconds"]
    )
    assert (shell.document(again)["status"], again.stderr) == ("present", "")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["import", "-"], 2),
        (["--json", "export", URI, "-"], 2),
        (["export", "fake://host/absent", "FILE"], 3),
        (["import", "/not/there.tar"], 7),
        (["import", "/dev/null"], 2),
    ],
)
def test_the_shell_tells_by_exit_code_what_went_wrong(root, connected, tmp_path, arguments, code):
    """
    What cannot work has the exit code of its kind, and leaves no file.
    """
    result = shell.kserve_pvc(root, *(str(tmp_path / "m.tar") if word == "FILE" else word for word in arguments))

    assert result.returncode == code
    assert result.stderr.startswith("kserve-pvc: ")
    assert not (tmp_path / "m.tar").exists()


def test_a_reader_that_goes_away_ends_an_export(large):
    """
    `kserve-pvc export … - | head -c 1` ends as other tools do.
    """
    root, uri, _ = large
    with shell.start(root, "-q", "export", uri, "-") as process:
        process.stdout.buffer.read(1)
        process.stdout.close()
        said = process.stderr.read()

    assert (process.returncode, said) == (1, "")


def test_a_bundle_carries_no_secret(tmp_path, root):
    """
    What a store was told to reach its source with is not in the bundle.
    """
    store = filled(root, storage_options={"key": "AKIA-canary", "secret": "canary-secret"})

    store.export(URI, tmp_path / "m.tar", progress=False)

    assert b"canary" not in (tmp_path / "m.tar").read_bytes()


def test_nobody_imports_a_uri_that_nobody_may_ask_for(tmp_path, root):
    """
    What `ensure` refuses to ask for cannot be in a bundle either.
    """
    with pytest.raises((PolicyError, InvalidURIError)):
        ModelStore(root, mode="rw").export("fake://user:secret@host/model", tmp_path / "m.tar", progress=False)


@pytest.mark.parametrize("what", ["link", "second name", "link to nothing"])
@pytest.mark.parametrize("name", ["target", "partial"])
def test_a_bundle_replaces_no_file_that_a_link_leads_to(connected, bundle, tmp_path, what, name):
    """
    A link or a second name, planted under a name that an export is about to use, lets it change no other file.
    """
    good, secret = bundle.read_bytes(), tmp_path / "secret"
    bundle.unlink()
    if what != "link to nothing":
        secret.write_bytes(b"private")
    place = bundle if name == "target" else partial_of(good, bundle)
    os.link(secret, place) if what == "second name" else place.symlink_to(secret)

    if (name, what) == ("target", "second name"):
        connected.export(URI, bundle, progress=False)
        assert bundle.read_bytes() == good
    else:
        with pytest.raises((SettingsError, VolumeError)):
            connected.export(URI, bundle, progress=False)

    assert secret.exists() == (what != "link to nothing")
    assert what == "link to nothing" or secret.read_bytes() == b"private"
