"""
Users as clusters have them: random uids with gid 0, an fsGroup, a umask of 077, and a server that makes root nobody.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs
import pytest
from trees import model_files, read_tree, write_files
from users import public_directory

pytestmark = pytest.mark.usefixtures("as_root")

FILES = model_files(seed=1, big=90_000)
SIZE = sum(map(len, FILES.values()))

# Another user may not be able to read this interpreter's libraries, so everything is imported before.
ACT = """
import os, sys
from kserve_pvc import ModelStore, StoreError
from kserve_pvc._download import download as _download
from kserve_pvc._download import attempt as _attempt
from kserve_pvc._keys import removal as _removal
from kserve_pvc._keys import claims as _claims
from kserve_pvc._volume import verify as _verify
from kserve_pvc._volume import writing as _volume
from kserve_pvc._show import observing as _observing
from kserve_pvc._show import progress as _progress
from kserve_pvc.backends.file import FileBackend
import ctypes, concurrent.futures.thread, fcntl
uid, gid, groups, umask, act, root, uri = sys.argv[1:]
os.umask(int(umask, 8))
os.setgroups([int(group) for group in groups.split(",") if group]); os.setgid(int(gid)); os.setuid(int(uid))
try:
    mode = "r" if act in ("get", "verify") else "rw"
    store = ModelStore(root, mode=mode, backends={"file": FileBackend}, lease_seconds=1, part_bytes=4096)
    if act == "die":
        _volume.VolumeWriter.publish = lambda *_: os.kill(os.getpid(), 9)
    if act == "remove":
        print("removed" if store.remove(uri, trash_seconds=0) is None else "?")
    elif act == "verify":
        print("intact" if store.verify(uri, "full").ok else "damaged")
    else:
        model = store.ensure(uri, progress=False)
        print(model.status, sum(len(p.read_bytes()) for p in model.path.rglob("*") if p.is_file()))
except StoreError as error:
    print(type(error).__name__, error)
"""


@attrs.frozen
class User:
    """
    A process's user: uid, gid, more groups, and a umask as text.
    """

    uid: int
    gid: int
    groups: Sequence[int] = ()
    umask: str = "077"

    def does(self, act: str, root: Path, source: Path, before: Sequence[str] = ()) -> str:
        groups = ",".join(map(str, self.groups))
        arguments = [str(self.uid), str(self.gid), groups, self.umask, act, str(root), f"file://{source}"]
        done = subprocess.run(
            [*before, sys.executable, "-I", "-c", ACT, *arguments], capture_output=True, text=True, timeout=60
        )
        assert done.returncode in (0, -9), done.stderr
        return done.stdout.strip()


@pytest.fixture
def place() -> Iterator[Path]:
    """
    A place with two models to download, `one` and `two`.
    """
    with public_directory() as found:
        for name in ("one", "two"):
            write_files(found / name, FILES)
        yield found


def volume(place: Path, uid: int, gid: int, mode: int) -> Path:
    made = place / "volume"
    made.mkdir()
    os.chown(made, uid, gid)
    made.chmod(mode)
    return made


# Who shares a volume, and how its root looks: OpenShift's random users, an fsGroup, one user, everybody.
SHARED = {
    "random uids with gid 0": ((0, 0, 0o2775), User(1000660001, 0), User(1000770001, 0)),
    "random uids with gid 0, no set-gid": ((0, 0, 0o775), User(1000660001, 0), User(1000770001, 0)),
    "an fsGroup": ((0, 2000, 0o2775), User(1001, 1001, (2000,)), User(1002, 1002, (2000,))),
    "an fsGroup that others may not enter": ((0, 2000, 0o2770), User(1001, 1001, (2000,)), User(1002, 1002, (2000,))),
    "everybody": ((0, 0, 0o777), User(1001, 1001), User(1002, 1002)),
}


@pytest.fixture(params=SHARED)
def shared(request, place):
    """
    A volume and two users who share it.
    """
    owner, first, second = SHARED[request.param]
    return volume(place, *owner), first, second


def test_what_one_writes_others_read_check_add_to_and_remove(shared, place):
    """
    Row 46: whatever the umask, each of two users does with the other's models all that a store is for.
    """
    root, first, second = shared

    said = [
        first.does("ensure", root, place / "one"),
        second.does("get", root, place / "one"),
        second.does("verify", root, place / "one"),
        second.does("ensure", root, place / "two"),
        first.does("ensure", root, place / "two"),
        second.does("remove", root, place / "one"),
        first.does("ensure", root, place / "one"),
    ]

    downloaded, present = f"downloaded {SIZE}", f"present {SIZE}"
    assert said == [downloaded, present, "intact", downloaded, present, "removed", downloaded]


def test_what_one_left_unfinished_another_takes_over(shared, place):
    """
    Row 46: a writer of another uid finishes what a killed one began, and leaves nothing of it.
    """
    root, first, second = shared
    first.does("ensure", root, place / "two")
    first.does("die", root, place / "one")

    said = second.does("ensure", root, place / "one")

    model = next((root / "models").glob("one-*"))
    assert said == f"downloaded {SIZE}"
    assert [read_tree(generation) for generation in model.iterdir()] == [FILES]


def test_nobody_changes_what_is_not_his(shared, place):
    """
    Row 46: no writer tries to change the mode or owner of a file or directory that another user made.
    """
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("`strace` is not installed")
    root, first, second = shared
    first.does("ensure", root, place / "one")
    first.does("die", root, place / "two")
    of_first = {path: path.stat().st_mode for path in root.rglob("*")}
    log = place / "calls.log"
    tracing = [
        strace,
        "-f",
        "-y",
        "-qq",
        "-o",
        str(log),
        "-e",
        "trace=chmod,fchmod,fchmodat,chown,fchown,fchownat,lchown",
    ]

    said = second.does("ensure", root, place / "two", tracing)

    assert said == f"downloaded {SIZE}"
    assert [line for line in log.read_text().splitlines() if "EPERM" in line or "EACCES" in line] == []
    assert [str(path) for path, mode in of_first.items() if path.exists() and path.stat().st_mode != mode] == []


def test_a_set_gid_bit_is_inherited_by_every_directory(place):
    """
    Row 46: below a set-gid root everything belongs to its group, whoever wrote it, and directories hand that on.
    """
    root = volume(place, 0, 2000, 0o2775)
    for user, name in ((User(1001, 1001, (2000,)), "one"), (User(1002, 1002, (2000,)), "two")):
        user.does("ensure", root, place / name)

    found = [path.stat() for path in root.rglob("*")]

    assert {status.st_gid for status in found} == {2000}
    assert {stat.S_IMODE(status.st_mode) for status in found if stat.S_ISDIR(status.st_mode)} == {0o2775}


@pytest.mark.parametrize(
    ("owner", "user", "words"),
    [
        # What a server with `root_squash` makes of root, on an export that belongs to root.
        ((0, 0, 0o755), User(65534, 65534), ["uid 65534", "gid 65534", "uid 0", "gid 0", "mode 0755", "fsGroup"]),
        ((0, 2000, 0o2775), User(1001, 1001), ["uid 1001", "gid 1001", "gid 2000", "mode 2775", "fsGroup"]),
        (
            (1001, 1001, 0o700),
            User(1002, 1002),
            ["uid 1002", "gid 1002", "uid 1001", "gid 1001", "mode 0700", "fsGroup"],
        ),
    ],
    ids=["root-squash", "not in the fsGroup", "closed"],
)
def test_a_refusal_names_both_sides_and_the_remedy(place, owner, user, words):
    """
    Row 46: who may not write is told the own uid and gid, the root's, its mode, and what to set, and nothing is left.
    """
    root = volume(place, *owner)

    said = user.does("ensure", root, place / "one")

    assert said.split()[0] in ("ReadOnlyStoreError", "VolumeError")
    assert [word for word in words if word not in said] == []
    assert list(root.iterdir()) == []


def test_who_may_only_read_is_refused_and_still_reads(place):
    """
    Row 46: a store that one user keeps serves all others, and says to them why it takes nothing.
    """
    root = volume(place, 1001, 1001, 0o755)
    User(1001, 1001).does("ensure", root, place / "one")
    other = User(65534, 65534)

    said = [
        other.does(act, root, place / name)
        for act, name in (("get", "one"), ("ensure", "one"), ("ensure", "two"), ("remove", "one"))
    ]

    assert said[:2] == [f"present {SIZE}"] * 2
    assert [line.split()[0] for line in said[2:]] == ["ReadOnlyStoreError"] * 2
    assert ["uid 65534" in line and "uid 1001" in line and "mode 0755" in line for line in said[2:]] == [True, True]
