"""
Volumes that are read-only, full, foreign, broken, or tampered with.
"""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from trees import digests, listing, model_files, read_tree, write_files
from users import public_directory

from kserve_pvc import (
    InsufficientSpaceError,
    ModelNotFoundError,
    ModelStore,
    ReadOnlyStoreError,
    StoreError,
    UnsafePathError,
    VolumeError,
)
from kserve_pvc._volume import beneath


@pytest.fixture
def model(root, source):
    """
    A model that is in the store.
    """
    return ModelStore(root, mode="rw").ensure(f"file://{source}", progress=False)


def read_only(root: Path, mount) -> Path:
    place = mount("--bind", str(root))
    subprocess.run(["mount", "-o", "remount,bind,ro", str(place)], check=True)
    return place


def test_a_hit_works_on_a_volume_mounted_read_only(root, model, mount, source):
    """
    A read-only bind mount serves, verifies and lists what is there.
    """
    place = read_only(root, mount)

    store = ModelStore(place)

    assert store.ensure(model.uri).status == "present"
    assert store.verify(model.uri, "full").ok
    assert [m.uri for m in store.list()] == [model.uri]
    with store.open(model.uri) as held:
        assert read_tree(held.path) == read_tree(source)


def test_a_read_write_store_on_a_read_only_volume_serves_hits_and_refuses_the_rest(root, model, mount, tmp_path):
    """
    Read-write on a read-only mount is an error only when something has to be written.
    """
    store = ModelStore(read_only(root, mount), mode="rw")
    write_files(tmp_path / "other", {"x": b"x"})

    assert store.ensure(model.uri).status == "present"
    with pytest.raises(ReadOnlyStoreError, match="mounted read-only"):
        store.ensure(f"file://{tmp_path}/other", progress=False)
    with pytest.raises(ReadOnlyStoreError, match="mounted read-only"):
        store.remove(model.uri)


def test_a_read_write_store_cannot_be_created_on_a_read_only_volume(root, mount):
    """
    Creating a store there fails with the remedy.
    """
    place = read_only(root, mount)

    with pytest.raises(ReadOnlyStoreError, match="mount it read-write"):
        ModelStore(place, mode="rw")


def test_too_little_space_is_said_before_the_first_byte(mount, tmp_path):
    """
    A model that is larger than the free space is refused with both numbers, and nothing is left of it.
    """
    place = mount("-t", "tmpfs", "-o", "size=2m", "tmpfs")
    write_files(tmp_path / "source", model_files(seed=1, big=3_000_000))
    store = ModelStore(place, mode="rw")

    with pytest.raises(InsufficientSpaceError) as caught:
        store.ensure(f"file://{tmp_path}/source", progress=False)

    assert caught.value.needed_bytes > 3_000_000 > caught.value.free_bytes
    assert list(place.rglob("*.bin")) == []


def test_a_volume_that_fills_up_meanwhile_loses_nothing_else(mount, tmp_path, monkeypatch):
    """
    When the space ends half-way the attempt is given back whole, and the models that are there stay.
    """
    place = mount("-t", "tmpfs", "-o", "size=3m", "tmpfs")
    write_files(tmp_path / "first", model_files(seed=1))
    write_files(tmp_path / "second", model_files(seed=2, big=4_000_000))
    store = ModelStore(place, mode="rw")
    first = store.ensure(f"file://{tmp_path}/first", progress=False)
    free = store._volume.free_bytes()
    monkeypatch.setattr("kserve_pvc._volume.reading.Volume.free_bytes", lambda self: 1 << 40)

    with pytest.raises(InsufficientSpaceError):
        store.ensure(f"file://{tmp_path}/second", progress=False)

    monkeypatch.undo()
    assert store.verify(first.uri, "full").ok
    assert store._volume.free_bytes() > free - 100_000
    assert f"file://{tmp_path}/second" not in store


def test_no_inodes_left_is_a_lack_of_space(mount, tmp_path):
    """
    A volume out of inodes gives the same error as one out of bytes.
    """
    place = mount("-t", "tmpfs", "-o", "size=8m,nr_inodes=60", "tmpfs")
    write_files(tmp_path / "source", {f"{number}.bin": b"x" for number in range(80)})
    store = ModelStore(place, mode="rw")

    with pytest.raises(InsufficientSpaceError):
        store.ensure(f"file://{tmp_path}/source", progress=False)


AS_OTHER = """
import os, sys
from kserve_pvc import ModelStore, StoreError
from kserve_pvc._download import download as _download
from kserve_pvc._download import attempt as _attempt
from kserve_pvc._keys import removal as _removal
from kserve_pvc._keys import claims as _claims
from kserve_pvc._show import observing as _observing
from kserve_pvc._show import progress as _progress
from kserve_pvc.backends.file import FileBackend
import ctypes, fcntl
# Another user may not be able to read this interpreter's libraries, so everything is imported before.
os.umask(0o077)
os.setgroups([int(group) for group in sys.argv[6:]]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[1]))
try:
    store = ModelStore(sys.argv[3], mode=sys.argv[4], backends={"file": FileBackend})
    model = store.ensure(sys.argv[5], progress=False)
    names = [p for p in model.path.rglob("*") if p.is_file()]
    print(model.status, sum(len(p.read_bytes()) for p in names))
except StoreError as error:
    print(type(error).__name__, error)
"""


def as_other(uid: int, gid: int, *arguments: str) -> str:
    command = [sys.executable, "-I", "-c", AS_OTHER, str(uid), str(gid), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.fixture
def reachable():
    """
    A directory that other users can reach. Not one of pytest's, which any other pytest closes when it starts.
    """
    with public_directory() as place:
        for path in place.parents:
            if path.stat().st_uid == os.geteuid() and path != Path("/"):
                path.chmod(path.stat().st_mode | 0o055)
        yield place


@pytest.mark.usefixtures("as_root")
def test_another_user_reads_what_one_wrote_whatever_the_umask(reachable):
    """
    A store under a root of mode 0755 serves other users, although its writer has umask 077.
    """
    volume, source = reachable / "volume", reachable / "source"
    write_files(source, model_files(seed=1))
    volume.mkdir(mode=0o755)
    os.chown(volume, 1001, 1001)

    written = as_other(1001, 1001, str(volume), "rw", f"file://{source}")
    read = as_other(1002, 1002, str(volume), "r", f"file://{source}")

    size = sum(map(len, model_files(seed=1).values()))
    assert (written.split(), read.split()) == (["downloaded", str(size)], ["present", str(size)])


@pytest.mark.usefixtures("as_root")
def test_users_of_one_group_write_one_store(reachable):
    """
    Under a set-gid root that a group may write, as `fsGroup` makes it, members with other uids and primary groups add
    models.
    """
    volume = reachable / "volume"
    for name in ("one", "two"):
        write_files(reachable / name, model_files(seed=1))
    volume.mkdir()
    os.chown(volume, 0, 2000)
    volume.chmod(0o2775)

    first = as_other(1001, 1001, str(volume), "rw", f"file://{reachable}/one", "2000")
    second = as_other(1002, 1002, str(volume), "rw", f"file://{reachable}/two", "2000")
    again = as_other(1002, 1002, str(volume), "rw", f"file://{reachable}/one", "2000")

    assert [line.split()[0] for line in (first, second, again)] == ["downloaded", "downloaded", "present"]


@pytest.mark.usefixtures("as_root")
def test_a_user_who_may_not_write_is_told_who_may(reachable):
    """
    The error names uid, gid, owner, mode and the remedy.
    """
    volume = reachable / "volume"
    write_files(reachable / "source", model_files(seed=1))
    volume.mkdir(mode=0o755)

    said = as_other(1001, 1001, str(volume), "rw", f"file://{reachable}/source")

    assert said.startswith("ReadOnlyStoreError")
    assert all(word in said for word in ("uid 1001", "gid 1001", "uid 0", "mode 0755", "fsGroup"))


@pytest.mark.parametrize(
    "place", ["models", "models/{key}", ".kserve-pvc/keys", ".kserve-pvc/keys/{key}/claims", ".kserve-pvc/staging"]
)
def test_a_link_planted_where_we_write_leads_nowhere(root, source, tmp_path, place):
    """
    A symbolic link instead of any directory of the store is refused, and nothing is written outside.
    """
    outside = tmp_path / "outside"
    outside.mkdir()
    store = ModelStore(root, mode="rw")
    uri = f"file://{source}"
    planted = root / place.format(key=store.plan(uri).key)
    if planted.is_dir():
        planted.rmdir()
    planted.parent.mkdir(parents=True, exist_ok=True)
    planted.symlink_to(outside)

    with pytest.raises(UnsafePathError, match="a link or file stands where"):
        store.ensure(uri, progress=False)

    assert list(outside.iterdir()) == []
    assert planted.is_symlink()


def test_a_link_planted_for_a_file_of_the_model_is_not_written_through(root, source, tmp_path, monkeypatch):
    """
    A link that appears under the name of a file before it is written fails the attempt and keeps its target.
    """
    from kserve_pvc._volume.tree import Tree

    victim = tmp_path / "victim"
    victim.write_text("precious")
    honest = Tree.create

    def create(self, path):
        if path.name == "config.json":
            (root / self._place / path).symlink_to(victim)
        return honest(self, path)

    monkeypatch.setattr(Tree, "create", create)
    with pytest.raises(StoreError):
        ModelStore(root, mode="rw").ensure(f"file://{source}", progress=False)

    assert victim.read_text() == "precious"


@pytest.mark.parametrize("call", ["fsync", "fdatasync", "pwrite64", "linkat"])
def test_an_input_output_error_is_survived_or_typed_and_publishes_nothing_half(root, source, tool, call):
    """
    With EIO on the n-th call of every thread a download ends well or with `VolumeError`, and the next one is exact.
    """
    script = f"""
import sys
from kserve_pvc import ModelStore, VolumeError
try:
    store = ModelStore(sys.argv[1], mode="rw", part_bytes=4096)
    print(store.ensure("file://{source}", progress=False, max_workers=1).status)
except VolumeError as error:
    print(error.operation)
"""
    ModelStore(root, mode="rw", lease_seconds=1)
    said = []
    for number in (1, 2, 3, 5, 8):
        options = ["-f", "-qq", "-o", os.devnull, "-e", f"trace={call}", "-e", f"inject={call}:error=EIO:when={number}"]
        command = [tool("strace"), *options, sys.executable, "-I", "-c", script, str(root)]
        said.append(subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip())
        store = ModelStore(root, mode="rw")
        model = store.ensure(f"file://{source}", progress=False)
        assert digests(read_tree(model.path)) == digests(read_tree(source))
        store.remove(model.uri, trash_seconds=0)

    assert set(said) - {"downloaded"} != set()


def test_a_transient_error_of_the_volume_costs_one_attempt(root, source, monkeypatch):
    """
    When making a file durable fails once, the next generation succeeds within the same call, on new inodes.
    """
    from kserve_pvc._volume.tree import Tree

    honest, failed = Tree.finish, []

    def finish(self, fd, path, is_large, is_executable):
        if not failed:
            failed.append(path)
            os.close(fd)
            raise VolumeError(str(path), "syncing", "Input/output error")
        return honest(self, fd, path, is_large)

    monkeypatch.setattr(Tree, "finish", finish)
    model = ModelStore(root, mode="rw").ensure(f"file://{source}", progress=False)

    assert len(failed) == 1
    assert model.path.name.startswith("000000000002-")
    assert read_tree(model.path) == read_tree(source)


def test_reading_writes_nothing(root, model, source):
    """
    Every reading call of a read-only store leaves each inode, size and time as it was.
    """
    before = listing(root)
    store = ModelStore(root)

    store.ensure(model.uri)
    assert store.get(model.uri).record.uri == model.uri
    assert model.uri in store
    store.list()
    store.plan(model.uri)
    store.resolve(model.uri)
    store.verify(model.uri, "full")
    store.locks()
    with store.open(model.uri):
        pass
    with pytest.raises(ReadOnlyStoreError):
        store.ensure("file:///not/there")
    with pytest.raises(ReadOnlyStoreError):
        store.remove(model.uri)

    assert listing(root) == before


FORBIDDEN = (
    "mkdir,mkdirat,link,linkat,rename,renameat,renameat2,unlink,unlinkat,rmdir,symlink,symlinkat,"
    "utimensat,chmod,fchmod,fchmodat,truncate,ftruncate,pwrite64,fsync,fdatasync"
)


def test_a_warm_ensure_makes_no_network_call_and_no_write(root, model, tool, tmp_path):
    """
    A hit, read-write and from the command line, makes no socket and opens and changes nothing for writing in the store.
    """
    log = tmp_path / "trace.log"
    tracing = [tool("strace"), "-f", "-y", "-qq", "-o", str(log), "-e", f"trace=openat,open,socket,connect,{FORBIDDEN}"]
    command = [sys.executable, "-I", "-m", "kserve_pvc", "--store", str(root), "--json", "ensure", model.uri]

    answer = subprocess.run([*tracing, *command], check=True, capture_output=True, text=True).stdout

    lines = log.read_text().splitlines()
    in_store = [line for line in lines if str(root) in line]
    assert '"present"' in answer
    assert [line for line in lines if "socket(" in line or "connect(" in line] == []
    assert [line for line in in_store if "openat(" not in line] == []
    assert [line for line in in_store if "O_WRONLY" in line or "O_RDWR" in line or "O_CREAT" in line] == []
    assert any("store.json" in line for line in in_store)


DOWNLOAD = """
import sys
from kserve_pvc import ModelStore, StoreError
try:
    store = ModelStore(sys.argv[1], mode="rw", part_bytes=4096)
    print(store.ensure(sys.argv[2], progress=False, max_workers=1).status)
except StoreError as error:
    print(type(error).__name__)
"""


def with_errors(strace: str, injected: str, root: Path, source: Path) -> str:
    """
    Download with errors injected into the system calls of every thread.
    """
    tracing = [
        strace,
        "-f",
        "-qq",
        "-o",
        os.devnull,
        "-e",
        f"trace={injected.partition(':')[0]}",
        "-e",
        f"inject={injected}",
    ]
    command = [*tracing, sys.executable, "-I", "-c", DOWNLOAD, str(root), f"file://{source}"]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


@pytest.mark.parametrize("code", ["EPERM", "EOPNOTSUPP", "ENOSYS", "EXDEV", "EMLINK"])
def test_a_volume_without_hard_links_holds_models(root, source, tool, code):
    """
    Row 24: where no link can be made, records are created in place and the model is exact.
    """
    said = with_errors(tool("strace"), f"linkat:error={code}", root, source)

    store = ModelStore(root)
    assert said == "downloaded"
    assert read_tree(store.get(f"file://{source}").path) == read_tree(source)
    assert store.verify(f"file://{source}", "full").ok


@pytest.mark.parametrize("code", ["ENOLCK", "ENOSYS", "EOPNOTSUPP", "EBADF", "EINVAL", "EIO"])
def test_a_lock_that_cannot_be_taken_loses_no_model(root, source, tool, code):
    """
    Row 6: with every `flock` refused a download ends well or with a typed error, and what is visible is exact.
    """
    ModelStore(root, mode="rw", locker="flock", lease_seconds=1)

    said = with_errors(tool("strace"), f"flock:error={code}", root, source)

    assert (
        (said == "downloaded") if code in ("ENOLCK", "ENOSYS", "EOPNOTSUPP") else said in ("downloaded", "VolumeError")
    )
    assert ModelStore(root, mode="rw").ensure(f"file://{source}", progress=False).status in ("present", "downloaded")
    assert ModelStore(root).verify(f"file://{source}", "full").ok


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT"])
@pytest.mark.parametrize("call", ["pwrite64", "fsync", "mkdirat", "linkat"])
def test_a_volume_that_says_it_is_full_publishes_nothing_half(root, source, tool, call, code):
    """
    Rows 17 and 18: whichever call reports that space or quota is used up, the error is that, and the next download is
    exact.
    """
    ModelStore(root, mode="rw", lease_seconds=1)
    uri, said = f"file://{source}", []
    for number in (1, 2, 5):
        said.append(with_errors(tool("strace"), f"{call}:error={code}:when={number}", root, source))
        store = ModelStore(root, mode="rw")
        model = store.ensure(uri, progress=False)
        assert read_tree(model.path) == read_tree(source)
        store.remove(uri, trash_seconds=0)

    assert set(said) <= {"downloaded", "InsufficientSpaceError"}
    assert "InsufficientSpaceError" in said


def test_a_directory_that_cannot_be_synced_costs_nothing(root, source, monkeypatch):
    """
    Row 24: where `fsync` of a directory means nothing, as on many FUSE and SMB mounts, models are stored all the same.
    """
    honest, refused = os.fsync, []

    def fsync(fd):
        if Path(f"/proc/self/fd/{fd}").is_dir():
            refused.append(fd)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        honest(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    model = ModelStore(root, mode="rw").ensure(f"file://{source}", progress=False)

    assert len(refused) > 0
    assert read_tree(model.path) == read_tree(source)


def test_short_writes_go_on_where_they_stopped(root, source, monkeypatch):
    """
    Row 15: a volume that takes a third of every write gets all of it.
    """
    honest = os.pwrite

    def pwrite(fd, data, offset):
        return honest(fd, memoryview(data)[: max(1, len(data) // 3)], offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    store = ModelStore(root, mode="rw", part_bytes=4096)
    model = store.ensure(f"file://{source}", progress=False)

    assert read_tree(model.path) == read_tree(source)
    assert store.verify(model.uri, "full").ok


@pytest.mark.parametrize("name", ["rename", "mkdir", "link", "unlink"])
def test_a_call_that_was_carried_out_although_it_failed_breaks_nothing(root, source, monkeypatch, name):
    """
    Row 22: whichever reply is lost once, the call ends well or with a typed error, and the next ones are exact.
    """
    honest = getattr(os, name)
    uri, ends = f"file://{source}", []
    for lost in range(1, 12):
        calls = iter(range(1, 1000))

        def carried_out(*arguments, lost=lost, calls=calls, **options):
            honest(*arguments, **options)
            if next(calls) == lost:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        store = ModelStore(root, mode="rw", lease_seconds=1)
        monkeypatch.setattr(os, name, carried_out)
        for act in (store.ensure, store.remove):
            try:
                act(uri, **({"progress": False} if act == store.ensure else {"trash_seconds": 0}))
                ends.append("well")
            except (VolumeError, ModelNotFoundError):
                ends.append("typed")
        monkeypatch.undo()
        model = store.ensure(uri, progress=False)
        assert read_tree(model.path) == read_tree(source)
        assert store.verify(uri, "full").ok
        assert [m.uri for m in store.list()] == [uri]
        store.remove(uri, trash_seconds=0)
        assert uri not in store

    assert set(ends) >= {"well"}


@pytest.mark.parametrize("call", ["pwrite64", "mkdirat", "fsync"])
def test_a_volume_that_becomes_read_only_half_way_is_said_so(root, model, tool, tmp_path, call):
    """
    Row 19: from the third call on nothing is written any more; the download says why, and what is there is served.
    """
    write_files(tmp_path / "other", model_files(seed=3))

    said = with_errors(tool("strace"), f"{call}:error=EROFS:when=3+", root, tmp_path / "other")

    assert said == "ReadOnlyStoreError"
    assert f"file://{tmp_path}/other" not in ModelStore(root)
    assert ModelStore(root).verify(model.uri, "full").ok


@pytest.mark.parametrize(("times", "status"), [(1, "present"), (1000, None)])
def test_a_stale_handle_is_looked_up_once_more(root, model, monkeypatch, times, status):
    """
    Row 29: a record whose handle is stale is opened again; one that stays stale is absent and never a wrong model.
    """
    honest, stale = os.open, iter(range(times))

    def open_(path, *arguments, **options):
        if str(path).endswith(".commit") and next(stale, None) is not None:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return honest(path, *arguments, **options)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(beneath, "_call_if_worth", lambda: None)  # `openat2` cannot be replaced from here.
    store = ModelStore(root)

    if status is None:
        with pytest.raises(StoreError):
            store.get(model.uri)
    else:
        assert store.get(model.uri).status == status


def test_long_names_deep_trees_and_many_files_are_one_record(root, tmp_path, tool):
    """
    Row 47: names of 255 bytes, 31 directories deep, and thousands of files arrive, with one record and few syncs.
    """
    files = {f"{number % 20}/{number:05}": b"%d" % number for number in range(3000)}
    files |= {"n" * 255: b"long", "/".join(["d"] * 31) + "/deep": b"deep"}
    write_files(tmp_path / "source", files)
    log = tmp_path / "calls.log"
    tracing = [tool("strace"), "-f", "-qq", "-o", str(log), "-e", "trace=fsync,fdatasync,syncfs"]

    subprocess.run(
        [*tracing, sys.executable, "-I", "-c", DOWNLOAD, str(root), f"file://{tmp_path}/source"],
        check=True,
        timeout=120,
    )

    store = ModelStore(root)
    assert read_tree(store.get(f"file://{tmp_path}/source").path) == files
    assert len(list(root.glob(".kserve-pvc/keys/*/log/*"))) == 1
    # Twenty and thirty-two directories, the directories and small files of the store itself, and beats.
    assert len(log.read_text().splitlines()) < 300


def test_every_fault_has_a_row_and_every_row_names_tests_that_are_there():
    """
    The fault matrix of the documentation has the rows 1 to 49, and no test it names has gone.
    """
    tests = Path(__file__).parent
    matrix = (tests.parent / "docs" / "reference" / "fault-matrix.md").read_text()

    rows = sorted(int(number) for number in re.findall(r"^\| (\d+) \|", matrix, re.MULTILINE))
    gone, file = [], ""
    for module, name in re.findall(r"`(?:tests/)?(test_\w+\.py)`|`(test_\w+)`", matrix):
        file = module or file
        if not (tests / file).exists() or (name and f"def {name}(" not in (tests / file).read_text()):
            gone.append((file, name))

    assert rows == list(range(1, 50))
    assert gone == []
