"""
What a volume can do: measured by single calls in a scratch directory, together with what the kernel reports about the
mount.

A profile picks waits and fallbacks, and refuses a volume on which no store can be correct. It never switches a check
off, and it is not stored: each process measures, so there is nothing on the volume to forge.
"""

from __future__ import annotations

import errno
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import PurePosixPath
from typing import Any, Literal

import attrs

from kserve_pvc._format import layout
from kserve_pvc._format.file_names import MAX_PART_BYTES
from kserve_pvc._threads import start_thread
from kserve_pvc._volume.calls import dated_name, write_all
from kserve_pvc._volume.mount import Mount, mount_of
from kserve_pvc._volume.reading import Volume
from kserve_pvc._volume.scratch import Scratch, open_scratch
from kserve_pvc._volume.writing import VolumeWriter
from kserve_pvc.errors import StoreError, StoreRootError, UnsafePathError, VolumeError

LOCAL_LEASE_SECONDS = 30.0
NETWORK_LEASE_SECONDS = 60.0

# `refuses`: the second caller gets EEXIST. `replaces`: it succeeds too. `unsupported`: no caller can do it.
Exclusion = Literal["refuses", "replaces", "unsupported"]
LockAnswer = Literal["granted", "refused", "unsupported", "hangs"]

# Errors about the volume itself and not about this operation.
_HOPELESS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EIO,
    errno.ESTALE,
    errno.ENOENT,
    errno.ENOTCONN,
}
# Every file system measured keeps names of this kind, and encrypting ones keep 143 bytes of 255.
_PLAIN_PART = re.compile(r"[\w.+=@-]{1,140}", re.ASCII)
_ODD_PART = 'a:b*c?d"e<f>g|h'
_MIXED_PART = "Nn\u00e9"
# Mount options are shown and compared by these names only: others may hold an account or a secret.
_TOLD = {
    *(
        "ro",
        "rw",
        "sync",
        "noatime",
        "relatime",
        "nosuid",
        "nodev",
        "noexec",
        "dirsync",
        "casefold",
        "size",
        "nr_inodes",
    ),
    *(
        "vers",
        "hard",
        "soft",
        "softerr",
        "softreval",
        "timeo",
        "retrans",
        "proto",
        "rsize",
        "wsize",
        "nconnect",
        "lookupcache",
    ),
    *(
        "ac",
        "noac",
        "actimeo",
        "acregmin",
        "acregmax",
        "acdirmin",
        "acdirmax",
        "nolock",
        "lock",
        "local_lock",
        "cto",
        "nocto",
    ),
    *(
        "cache",
        "nobrl",
        "mfsymlinks",
        "noperm",
        "forceuid",
        "forcegid",
        "uid",
        "gid",
        "file_mode",
        "dir_mode",
        "nounix",
    ),
    *("flock", "localflock", "noflock", "user_id", "group_id", "allow_other", "default_permissions"),
}
_PATIENCE = 1.0


@attrs.frozen(kw_only=True)
class Profile:
    """
    What a volume is and can do, as this node sees it. None stands for what could not be tried.

    Args:
        type: The file system, as the mount table calls it.
        options: The mount options that matter here.
        read_only: Nothing can be written, so nothing was tried.
        mkdir, create, link, rename: What a second caller that makes the same name gets: by a directory, by an exclusive
            create, by a hard link, by a rename that replaces nothing.
        lists: A listing shows what was made before it.
        writes_at_offset: A file can be written from its middle.
        syncs_files, syncs_directories: `fsync` is supported.
        flock, range_lock: The result of a first `flock` and a first lock by range (OFD).
        folds_case, folds_unicode: Two names that differ in nothing else are one.
        keeps_names: Names with `:*?"<>|` and letters beyond ASCII are listed as they were made.
        name_bytes: The longest name.
    """

    type: str
    options: tuple[str, ...]
    read_only: bool
    mkdir: Exclusion | None = None
    create: Exclusion | None = None
    link: Exclusion | None = None
    rename: Exclusion | None = None
    lists: bool | None = None
    writes_at_offset: bool | None = None
    syncs_files: bool | None = None
    syncs_directories: bool | None = None
    flock: LockAnswer | None = None
    range_lock: LockAnswer | None = None
    folds_case: bool | None = None
    folds_unicode: bool | None = None
    keeps_names: bool | None = None
    name_bytes: int | None = None

    @property
    def mount(self) -> Mount:
        return Mount(type=self.type, options=self.options)

    @property
    def kind(self) -> Literal["read-only", "unusable", "nfs", "smb", "network", "local"]:
        """
        How the store treats it: `local` waits for no other node, `nfs` and `smb` wait for the attribute caches of
            theirs.
        """
        if self.read_only:
            return "read-only"
        if self.obstacles:
            return "unusable"
        if self.type.startswith("nfs"):
            return "nfs"
        if self.type.startswith(("cifs", "smb")):
            return "smb"
        return "network" if self.mount.is_network else "local"

    @property
    def lease_seconds(self) -> float:
        """
        The default lease of a store that is created here.
        """
        return NETWORK_LEASE_SECONDS if self.mount.is_network else LOCAL_LEASE_SECONDS

    @property
    def visibility_delay(self) -> float:
        """
        After how many seconds a removal may believe that every node sees its tombstone.
        """
        return self.mount.visibility_delay

    @property
    def obstacles(self) -> tuple[str, ...]:
        """
        Why no store can be correct here; empty if nothing speaks against it.
        """
        found = {
            "making a directory that is there succeeds": self.mkdir == "replaces",
            "no directories can be made": self.mkdir == "unsupported",
            "an exclusive create succeeds though the file is there": self.create == "replaces",
            "a hard link replaces a file": self.link == "replaces",
            "neither hard links nor exclusive creates work": self.create == self.link == "unsupported",
            "a listing does not show what was made": self.lists is False,
            "a file cannot be written at an offset": self.writes_at_offset is False,
            "`fsync` of a file is not supported": self.syncs_files is False,
        }
        return tuple(reason for reason, is_so in found.items() if is_so)


def describe(volume: Volume) -> Profile:
    """
    Describe a volume without writing to it.
    """
    mount = mount_of(volume.root)
    with suppress(OSError):
        found = os.statvfs(volume.root)
        return Profile(type=mount.type, options=_told(mount.options), read_only=bool(found.f_flag & os.ST_RDONLY))
    return Profile(type=mount.type, options=_told(mount.options), read_only="ro" in mount.options)


def _told(options: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(option for option in options if option.partition("=")[0] in _TOLD))


def probe_here(writer: VolumeWriter) -> Profile:
    """
    Measure a volume before a store is created on it.

    It is tried out in the trash: what is left if the process dies here goes with the next emptying.

    Raises:
        StoreRootError: No store can be correct on this volume.
        StoreError: The volume may not be written, is full, or fails.
    """
    try:
        profile = _probe_once(writer)
    except VolumeError:  # A process that emptied the trash meanwhile took the scratch with it.
        profile = _probe_once(writer)
    if profile.obstacles:
        reason = f"{'; '.join(profile.obstacles)}; use another volume, and see `kserve-pvc doctor`"
        raise StoreRootError(str(writer.root), reason)
    return profile


def _probe_once(writer: VolumeWriter) -> Profile:
    with _in_trash(writer) as place:
        return probe(writer, place)


@contextmanager
def _in_trash(writer: VolumeWriter) -> Iterator[PurePosixPath]:
    place = layout.TRASH / dated_name()
    try:
        yield place
    finally:
        with suppress(OSError, StoreError):
            writer.delete_trash(place)


def probe(writer: VolumeWriter, place: PurePosixPath) -> Profile:
    """
    Measure what a volume can do in a scratch directory, which the caller takes away.

    About fifty calls, two of them `fsync`: a few milliseconds on a local disk, some dozens over a network.
    """
    known = describe(writer)
    with open_scratch(writer, place) as scratch:
        file = _try_file(scratch)
        return attrs.evolve(
            known,
            mkdir=_second(lambda: scratch.make_directory("directory")),
            link=_second(lambda: scratch.link("file", "link")),
            rename=_try_rename(scratch),
            lists={"file", "directory"} <= set(scratch.names()),
            folds_case=_is_there(scratch, "FILE"),
            **file,
            **_try_names(scratch),
            syncs_directories=_can(scratch.sync),
        )


def _try_file(scratch: Scratch) -> dict[str, Any]:
    fd = scratch.create("file")
    try:
        found = {
            "writes_at_offset": _can(lambda: _write_backwards(fd)),
            "syncs_files": _can(lambda: os.fsync(fd)),
            "flock": try_lock(fd, _flock),
            "range_lock": try_lock(fd, lock_range),
        }
    finally:
        os.close(fd)
    return {**found, "create": _refusal(lambda: os.close(scratch.create("file")))}


def _write_backwards(fd: int) -> None:
    write_all(fd, b"end", 8192)
    write_all(fd, b"begin", 0)
    if os.pread(fd, 5, 0) + os.pread(fd, 3, 8192) != b"beginend" or os.fstat(fd).st_size != 8195:
        raise OSError(errno.EOPNOTSUPP, "it was not written where it should be")


def _try_rename(scratch: Scratch) -> Exclusion:
    # Onto a free name first: the kernel refuses a name that is taken without calling the file system.
    scratch.write("one", b"")
    scratch.write("other", b"")
    return (
        _refusal(lambda: scratch.move("other", "moved"))
        if _can(lambda: scratch.move("one", "moved"))
        else "unsupported"
    )


def _try_names(scratch: Scratch) -> dict[str, Any]:
    folds_unicode = keeps = None
    if _can(lambda: scratch.write(_MIXED_PART, b"")):
        folds_unicode = _is_there(scratch, "Nne\u0301")
        keeps = _can(lambda: scratch.write(_ODD_PART, b"")) and {_MIXED_PART, _ODD_PART} <= set(scratch.names())
    return {"folds_unicode": folds_unicode, "keeps_names": bool(keeps), "name_bytes": _longest_name(scratch)}


def _longest_name(scratch: Scratch) -> int:
    if _can(lambda: scratch.write("n" * MAX_PART_BYTES, b"")):
        return MAX_PART_BYTES
    low, high = 1, MAX_PART_BYTES
    while high - low > 1:
        middle = (low + high) // 2
        if _can(partial(scratch.write, "n" * middle, b"")):
            low = middle
        else:
            high = middle
    return low


def _second(make: Callable[[], None]) -> Exclusion:
    """Return what a second identical call gets."""
    return _refusal(make) if _can(make) else "unsupported"


def _refusal(make: Callable[[], None]) -> Exclusion:
    try:
        make()
    except FileExistsError:
        return "refuses"
    except OSError as error:
        _pass_on(error)
        return "unsupported"
    return "replaces"


def _can(act: Callable[[], None]) -> bool:
    try:
        act()
    except OSError as error:
        _pass_on(error)
        return False
    return True


def _pass_on(error: OSError) -> None:
    if error.errno in _HOPELESS:
        raise error


def _is_there(scratch: Scratch, name: str) -> bool:
    try:
        os.close(scratch.open(name))
    except OSError:
        return False
    return True


def try_lock(fd: int, lock: Callable[[int], None], patience: float = _PATIENCE) -> LockAnswer:
    """
    Request a lock without waiting for the volume: on some, even a lock that does not wait hangs while a server
    recovers.

    An attempt that hangs is left behind with a descriptor of its own: the number of the caller's may by then be that of
    another file.
    """
    answers: list[LockAnswer] = []
    own = os.dup(fd)

    def ask() -> None:
        try:
            lock(own)
        except OSError as error:
            is_held = error.errno in (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK)
            answers.append("refused" if is_held else "unsupported")
        else:
            answers.append("granted")
        finally:
            os.close(own)

    try:
        thread = start_thread(ask, "kserve-pvc-lock-probe")
    except VolumeError:
        os.close(own)
        raise
    thread.join(patience)
    return answers[0] if answers else "hangs"


def _flock(fd: int) -> None:
    import fcntl

    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(fd, fcntl.LOCK_UN)


def lock_range(fd: int, *, release: bool = True) -> None:
    """
    Lock all of a file by an open file description lock, which other descriptors of this process respect too.
    """
    import fcntl

    for kind in (fcntl.F_WRLCK, fcntl.F_UNLCK) if release else (fcntl.F_WRLCK,):
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, 0, 0, 0))


def check_names(writer: VolumeWriter, paths: Iterable[PurePosixPath]) -> None:
    """
    Refuse a model whose names this volume does not keep, before it is written.

    Plain names are kept everywhere, so nothing is tried for them. Of the others the longest and one for each unusual
    letter are tried out as they are.

    Raises:
        UnsafePathError: Names the part that the volume refuses or changes.
    """
    tried = _worth_trying(part for path in paths for part in path.parts if _PLAIN_PART.fullmatch(part) is None)
    if not tried:
        return
    with _in_trash(writer) as place, open_scratch(writer, place) as scratch:
        for part in tried:
            _try_out(scratch, part)


def _worth_trying(odd_parts: Iterable[str]) -> list[str]:
    longest, by_letter = "", dict[str, str]()
    for part in odd_parts:
        longest = max(longest, part, key=lambda name: len(name.encode()))
        for letter in part:
            if not letter.isalnum() or not letter.isascii():
                by_letter.setdefault(letter, part)
    return sorted({part for part in (longest, *by_letter.values()) if part})


def _try_out(scratch: Scratch, part: str) -> None:
    try:
        scratch.write(part, b"")
    except OSError as error:
        _pass_on(error)
        raise UnsafePathError(part, f"this volume takes no such name ({error.strerror})") from error
    if part not in scratch.names():
        raise UnsafePathError(part, "this volume keeps such a name in another spelling")
    scratch.remove(part)
