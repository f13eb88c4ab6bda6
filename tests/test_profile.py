"""
What a volume is found to be able to do, and what follows from it.

No file system that folds names, forgets links or lies about directories can be mounted everywhere, so some tests
replace single calls of `Scratch`; they say so.
"""

from __future__ import annotations

import os
import signal
import unicodedata
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import attrs
import pytest
import shell
from trees import read_tree, write_files
from volumes import LOCAL, CannotStartError

from kserve_pvc import ModelStore, Profile, ReadOnlyStoreError, StoreRootError, UnsafePathError
from kserve_pvc._volume import profile as profiles
from kserve_pvc._volume.profile import check_names, describe, probe_here
from kserve_pvc._volume.reading import Volume
from kserve_pvc._volume.scratch import Scratch
from kserve_pvc._volume.writing import VolumeWriter

HONEST = {
    **dict.fromkeys(("mkdir", "create", "link", "rename"), "refuses"),
    **dict.fromkeys(("lists", "writes_at_offset", "syncs_files", "syncs_directories", "keeps_names"), True),
    **dict.fromkeys(("flock", "range_lock"), "granted"),
    **dict.fromkeys(("folds_case", "folds_unicode", "read_only"), False),
    "name_bytes": 255,
}


def fail(*_: object, **__: object) -> None:
    raise AssertionError("nobody should have asked")


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "tmpfs"])
def test_a_local_file_system_does_all_of_it(kind):
    """
    On a real local file system everything is measured, all is as it should be, and nothing is left.
    """
    try:
        with LOCAL[kind](1) as volume:
            (place,) = volume.mounts
            profile = probe_here(VolumeWriter(place))
            left = [path for path in (place / ".kserve-pvc").rglob("*") if path.name != "trash"]
    except (CannotStartError, KeyError) as reason:
        pytest.skip(f"{kind}: {reason}")

    assert attrs.asdict(profile, filter=lambda field, _: field.name not in ("type", "options")) == HONEST
    assert (profile.type, profile.kind, profile.obstacles, left) == (kind, "local", (), [])


def test_a_volume_that_folds_case_is_seen(mount, tool, tmp_path):
    """
    A directory in which `FILE` and `file` are one is found to be such.
    """
    image, make, attribute = tmp_path / "image", tool("mkfs.ext4"), tool("chattr")
    with image.open("wb") as file:
        file.truncate(64 * 1024 * 1024)
    if shell.run([make, "-q", "-F", "-O", "casefold", str(image)]).returncode:
        pytest.skip("this `mkfs.ext4` does not know `casefold`")
    root = mount("-o", "loop", str(image)) / "folding"
    root.mkdir()
    assert shell.run([attribute, "+F", str(root)]).returncode == 0

    profile = probe_here(VolumeWriter(root))

    assert (profile.folds_case, profile.folds_unicode, profile.kind) == (True, True, "local")


def test_a_read_only_mount_is_described_without_being_written_to(root, mount):
    """
    Nothing is tried on a mount that may only be read, and the profile says so.
    """
    place = mount("-o", "bind,ro", str(root))

    profile = describe(Volume(place))

    assert (profile.read_only, profile.kind, profile.mkdir, profile.name_bytes) == (True, "read-only", None, None)
    assert os.listdir(root) == []


def test_options_that_may_hold_a_secret_are_not_told(monkeypatch, root):
    """
    Mount options are told by the names that are known to hold none.
    """
    said = ("rw", "vers=3.1.1", "username=someone", "secret=canary", "actimeo=30", "password=canary")
    monkeypatch.setattr(profiles, "mount_of", lambda _: profiles.Mount(type="cifs", options=said))

    profile = describe(Volume(root))

    assert profile.options == ("rw", "vers=3.1.1", "actimeo=30")


@pytest.mark.parametrize(
    ("type", "options", "kind", "lease", "delay"),
    [
        ("ext4", (), "local", 30.0, 0.0),
        ("nfs4", (), "nfs", 60.0, 120.0),
        ("nfs", ("acdirmax=3",), "nfs", 60.0, 6.0),
        ("nfs4", ("noac",), "nfs", 60.0, 0.0),
        ("cifs", ("actimeo=30",), "smb", 60.0, 60.0),
        ("fuse.juicefs", (), "network", 60.0, 2.0),
    ],
)
def test_the_profile_picks_the_waits(type, options, kind, lease, delay):
    """
    How long a lease is and a removal waits follows from the file system and how it is mounted.
    """
    profile = Profile(type=type, options=options, read_only=False)

    assert (profile.kind, profile.lease_seconds, profile.visibility_delay) == (kind, lease, delay)


@pytest.mark.parametrize(
    ("flaw", "reason"),
    [
        ({"mkdir": "replaces"}, "making a directory that is there succeeds"),
        ({"mkdir": "unsupported"}, "no directories can be made"),
        ({"create": "replaces"}, "an exclusive create succeeds though the file is there"),
        ({"link": "replaces"}, "a hard link replaces a file"),
        ({"link": "unsupported", "create": "unsupported"}, "neither hard links nor exclusive creates work"),
        ({"lists": False}, "a listing does not show what was made"),
        ({"writes_at_offset": False}, "a file cannot be written at an offset"),
        ({"syncs_files": False}, "`fsync` of a file is not supported"),
    ],
)
def test_what_breaks_a_store_is_an_obstacle(flaw, reason):
    """
    Each property that the protocol rests on makes the volume unusable if it is missing.
    """
    profile = Profile(type="ext4", options=(), **(HONEST | flaw))

    assert (profile.obstacles, profile.kind) == ((reason,), "unusable")


@pytest.mark.parametrize(
    "flaw",
    [
        {"link": "unsupported"},
        {"rename": "unsupported"},
        {"syncs_directories": False},
        {"flock": "unsupported"},
        {"folds_case": True},
    ],
)
def test_what_has_a_fallback_is_no_obstacle(flaw):
    """
    What the store can do in another way, or does not need, does not make a volume unusable.
    """
    profile = Profile(type="ext4", options=(), **(HONEST | flaw))

    assert (profile.obstacles, profile.kind) == ((), "local")


def test_no_store_is_created_where_directories_do_not_exclude(root, monkeypatch):
    """
    A volume that lets everybody make the same directory is refused, and no store is made. The call is replaced, as no
    such one is at hand.
    """
    monkeypatch.setattr(
        Scratch, "make_directory", lambda scratch, name: Path(f"/proc/self/fd/{scratch.fd}/{name}").mkdir(exist_ok=True)
    )

    with pytest.raises(
        StoreRootError,
        match="making a directory that is there succeeds; use another volume, and see `kserve-pvc doctor`",
    ):
        ModelStore(root, mode="rw")

    assert [path.name for path in root.rglob("*")] == [".kserve-pvc", "trash"]


def test_a_volume_that_may_not_be_written_is_that_error(root, mount):
    """
    What keeps anybody from writing is no property of the volume: the error is that of every other write.
    """
    place = mount("-o", "bind,ro", str(root))

    with pytest.raises(ReadOnlyStoreError, match="mounted read-only"):
        ModelStore(place, mode="rw")


def test_a_trash_that_is_emptied_meanwhile_costs_a_second_try(root, monkeypatch):
    """
    Somebody who empties all of the trash takes the scratch with it, and it is tried once more.
    """
    writer, real, emptied = VolumeWriter(root), Scratch.sync, []

    def sync(scratch: Scratch) -> None:
        if not emptied:
            emptied.append(VolumeWriter(root).empty_trash(0))
            scratch.write("gone", b"")
        real(scratch)

    monkeypatch.setattr(Scratch, "sync", sync)

    assert (probe_here(writer).obstacles, len(emptied)) == ((), 1)


KILLED = """
import os, signal, sys
from kserve_pvc import ModelStore
from kserve_pvc._volume.scratch import Scratch
Scratch.sync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
ModelStore(sys.argv[1], mode="rw")
"""


def test_what_a_killed_probe_leaves_goes_with_the_trash(root, source):
    """
    A process that dies while it measures leaves only something in the trash, which the next emptying takes away.
    """
    died = shell.run([*shell.COMMAND[:2], "-c", KILLED, str(root)]).returncode
    (left,) = (root / ".kserve-pvc" / "trash").iterdir()
    ModelStore(root, mode="rw").ensure(f"file://{source}", progress=False)
    VolumeWriter(root).empty_trash(0)

    assert (died, list((root / ".kserve-pvc" / "trash").iterdir())) == (-signal.SIGKILL, [])
    assert left.name.partition("-")[0].isdigit()


def test_only_a_creation_measures(root, source, monkeypatch):
    """
    Opening a store that is there, a hit, and a download of plain names try nothing out.
    """
    ModelStore(root, mode="rw")
    monkeypatch.setattr(Scratch, "__init__", fail)

    store = ModelStore(root, mode="rw")
    got = [store.ensure(f"file://{source}", progress=False).status for _ in range(2)]

    assert got == ["downloaded", "present"]


ODD = {
    'ab:c*d?"e<f>g|h.bin': b"odd",
    "\u00e9t\u00e9/\u65e5\u672c.bin": b"letters",
    "n" * 255: b"long",
    "e\u0301.bin": b"composed",
}


def test_a_volume_that_keeps_odd_names_gets_them(root, tmp_path):
    """
    A model with unusual names is stored as it is where the volume keeps them, and nothing is left of the trial.
    """
    write_files(tmp_path / "source", ODD)

    model = ModelStore(root, mode="rw").ensure(f"file://{tmp_path}/source", progress=False)

    assert read_tree(model.path) == ODD
    assert list((root / ".kserve-pvc" / "trash").iterdir()) == []


def too_long(scratch: Scratch, name: str, data: bytes, real: Callable[..., None]) -> None:
    if len(name.encode()) > 143:
        raise OSError(36, os.strerror(36))
    real(scratch, name, data)


def other_spelling(scratch: Scratch, name: str, data: bytes, real: Callable[..., None]) -> None:
    real(scratch, unicodedata.normalize("NFD", name), data)


@pytest.mark.parametrize(
    ("write", "name", "rule"),
    [
        (too_long, "n" * 200, r"this volume takes no such name \(File name too long\)"),
        (other_spelling, "\u00e9.bin", "this volume keeps such a name in another spelling"),
    ],
)
def test_a_name_that_a_volume_does_not_keep_is_refused_before_it_is_written(
    root, tmp_path, monkeypatch, write, name, rule
):
    """
    A model with a name that this volume refuses or changes is refused by that name. The call is replaced, as no such
    volume is at hand.
    """
    write_files(tmp_path / "source", {name: b"bytes", "plain.bin": b"bytes"})
    store = ModelStore(root, mode="rw")
    real = Scratch.write
    monkeypatch.setattr(Scratch, "write", lambda scratch, name, data: write(scratch, name, data, real))

    with pytest.raises(UnsafePathError, match=rule) as refused:
        store.ensure(f"file://{tmp_path}/source", progress=False)

    assert refused.value.name == name
    assert [path for path in root.rglob("*") if path.is_file() and path.name in (name, "plain.bin")] == []


def test_the_longest_name_is_found(root, monkeypatch):
    """
    How long a name may be is measured where a volume takes shorter ones. The call is replaced, as no such volume is at
    hand.
    """
    real = Scratch.write
    monkeypatch.setattr(Scratch, "write", lambda scratch, name, data: too_long(scratch, name, data, real))

    assert probe_here(VolumeWriter(root)).name_bytes == 143


def test_few_of_many_odd_names_are_tried(root, monkeypatch):
    """
    Of ten thousand unusual names one for each letter is tried, so that trying costs nothing next to writing them.
    """
    tried, real = [], Scratch.write
    monkeypatch.setattr(Scratch, "write", lambda scratch, name, data: (tried.append(name), real(scratch, name, data)))

    check_names(VolumeWriter(root), (PurePosixPath(f"\u00e9-{number}.bin") for number in range(10_000)))

    assert 1 <= len(tried) <= 3
