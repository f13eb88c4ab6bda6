"""
Claims of downloaders and leases of readers: which process works on a key or generation, and whether it is alive.

Both are a directory with two files: `owner` names the holder, `beat` is its heartbeat. A claim on a volume of one
kernel has a third one, `held`: its holder has locked `beat` as long as it lives.
"""

from __future__ import annotations

import errno
import os
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import PurePosixPath
from typing import Literal, TypeVar

import attrs

from kserve_pvc._format import layout
from kserve_pvc._format.codec import MAX_RECORD_BYTES, decode, encode
from kserve_pvc._format.log_entry import Holder, now
from kserve_pvc._format.records import BEAT_BYTES, Beat, Claim, ReaderLease, encode_beat
from kserve_pvc._keys.watching import Watch
from kserve_pvc._volume.reading import Volume
from kserve_pvc._volume.writing import VolumeWriter
from kserve_pvc.errors import StoreError, StoreFormatError, VolumeError
from kserve_pvc.locks.lease import Heartbeat
from kserve_pvc.locks.liveness import hold, is_elsewhere_here, is_held, is_provably_dead

# The heartbeat of a reader is this many times slower: it lives for days, and only deletion waits for it.
READER_LEASES = 4

_HELD = "held"

_T = TypeVar("_T")


@attrs.frozen(kw_only=True)
class Sign:
    """
    What a claim or lease shows at one time. `owner` and `beat` are None if they do not have that form.

    `is_unreadable`: the volume failed, so that nothing is known of that time. `is_let_go`: the kernel has released what
    the holder had locked, so its process is over.
    """

    name: str
    raw: bytes
    owner: Claim | ReaderLease | None
    beat: Beat | None
    raw_owner: bytes = b""
    is_unreadable: bool = False
    is_let_go: bool = False

    @property
    def holder(self) -> str:
        return "an unknown process" if self.owner is None else str(self.owner.holder)

    @property
    def is_released(self) -> bool:
        return self.beat is not None and self.beat.released

    @property
    def is_dead(self) -> bool:
        return self.is_let_go or (self.owner is not None and is_provably_dead(self.owner.holder))


@attrs.frozen(kw_only=True)
class LockInfo:
    """
    A claim that its holder has not released. `state` is `dead` if its process provably no longer exists.

    `pod`, `node` and `uid` are empty and -1 where the holder is not known. `age_seconds` compares this node's clock
    with the holder's when it claimed, so it is for people.
    """

    uri: str
    key: str
    epoch: int
    holder: str
    pod: str
    node: str
    uid: int
    since: str
    age_seconds: float
    state: Literal["held", "dead"]
    bytes_done: int
    bytes_total: int
    bytes_per_second: int


def _read_sign(
    volume: Volume, place: PurePosixPath, cls: type[Claim] | type[ReaderLease], earlier: Sign | None = None
) -> Sign:
    """
    Args:
        earlier: What it showed before. Its owner is written once, so it need not be read again.
    """
    names: Collection[str] = ()
    with suppress(VolumeError):
        # GlusterFS learns by it that a file has changed, which it believes it knows for a second.
        names = volume.list_names(place)
    raw = earlier.raw_owner if earlier and earlier.owner else _quietly(volume, place / "owner", MAX_RECORD_BYTES)
    beat = _quietly(volume, place / "beat", BEAT_BYTES, uncached=True)
    owner = earlier.owner if earlier and earlier.owner else _decoded(cls, raw or b"", place)
    return Sign(
        name=place.name,
        raw=(raw or b"") + (beat or b""),
        raw_owner=raw or b"",
        owner=owner,
        beat=_decoded(Beat, beat or b"", place),
        is_unreadable=raw is None or beat is None,
        is_let_go=_HELD in names and owner is not None and _is_let_go(volume, place, owner.holder),
    )


def _is_let_go(volume: Volume, place: PurePosixPath, holder: Holder) -> bool:
    """Whether a process in another container of this node had locked its heartbeat, and no longer does."""
    if is_elsewhere_here(holder):
        with suppress(OSError, StoreError), volume.open_file(place / "beat") as fd:
            return not is_held(fd)
    return False


def _quietly(volume: Volume, place: PurePosixPath, limit: int, *, uncached: bool = False) -> bytes | None:
    """Read a small file. Anything else counts as empty; None if the volume failed."""
    try:
        return volume.read(place, limit, uncached=uncached) or b""
    except StoreFormatError:
        return b""
    except VolumeError as error:
        cause = error.__cause__
        return b"" if isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EPERM) else None


def _decoded(cls: type[_T], data: bytes, place: PurePosixPath) -> _T | None:
    with suppress(StoreFormatError):
        return decode(cls, data, str(place))
    return None


def newest_epoch(volume: Volume, key: str) -> int:
    """
    The number of the current claim of a key, 0 if there is none.
    """
    return max(
        (n for name in volume.list_names(layout.claims_dir(key)) if (n := layout.parse_number(name)) is not None),
        default=0,
    )


def read_claim(volume: Volume, key: str) -> Sign | None:
    """
    Read the current claim of a key. Signs of life are read, never judged by the times of a file.
    """
    epoch = newest_epoch(volume, key)
    return _read_sign(volume, layout.claim_dir(key, epoch), Claim) if epoch else None


def read_lock(volume: Volume, key: str) -> LockInfo | None:
    """
    Describe the current claim of a key for people; None if there is none, or it was released.
    """
    sign = read_claim(volume, key)
    if sign is None or sign.is_released:
        return None
    owner = sign.owner if isinstance(sign.owner, Claim) else None
    beat = sign.beat or Beat(count=0)
    return LockInfo(
        uri=owner.uri if owner else "unknown",
        key=key,
        epoch=int(sign.name),
        holder=sign.holder,
        pod=owner.holder.pod if owner else "",
        node=owner.holder.node if owner else "",
        uid=owner.holder.uid if owner else -1,
        age_seconds=round((now() - owner.claimed_at).total_seconds(), 3) if owner else 0.0,
        since=owner.claimed_at.isoformat(timespec="seconds") if owner else "unknown",
        state="dead" if sign.is_dead else "held",
        bytes_done=beat.bytes_done,
        bytes_total=beat.bytes_total,
        bytes_per_second=beat.bytes_per_second,
    )


def read_locks(volume: Volume, keys: Iterable[str]) -> list[LockInfo]:
    """
    Describe the claims of several keys that are not released, but for keys that the volume cannot read.
    """
    found = []
    for key in keys:
        with suppress(VolumeError):
            found.append(read_lock(volume, key))
    return [lock for lock in found if lock is not None]


def take_claim(writer: VolumeWriter, key: str, epoch: int, *, uri: str, holder: Holder) -> Claim | None:
    """
    Claim a number, or learn that another process has it.

    If the process dies here, the number is a claim without an owner, which is superseded once its lease is over.
    """
    if epoch > layout.MAX_NUMBER:
        raise StoreFormatError(
            str(layout.claims_dir(key)), f"claim {epoch - 1} in it was made by no writer; delete that forgery"
        )
    place = layout.claim_dir(key, epoch)
    if not writer.reserve(place, is_durable=False):
        return None
    claim = Claim(epoch=epoch, nonce=secrets.token_hex(16), uri=uri, holder=holder, claimed_at=now())
    with _given_back_on_failure(writer, place):
        writer.write_sign(place / "owner", encode(claim))
    with suppress(StoreError):  # Tidying may fail where others hold a file open; the claim is ours all the same.
        _forget_older(writer, key, epoch)
    return claim


def _forget_older(writer: VolumeWriter, key: str, epoch: int) -> None:
    # Only the newest counts, and as long as it is there no number comes back. A pod that fails in a loop leaves one,
    # not all.
    for name in writer.list_names(layout.claims_dir(key)):
        number = layout.parse_number(name)
        if number is not None and number < epoch:
            writer.throw_away(layout.claim_dir(key, number))


@contextmanager
def _given_back_on_failure(writer: VolumeWriter, place: PurePosixPath) -> Iterator[None]:
    try:
        yield
    except StoreError:
        # No process has to wait for a claim without heartbeats: it is released if the volume still takes one more small
        # file, and else it is deleted, which takes no room.
        try:
            writer.write_sign(place / "beat", encode_beat(Beat(count=1, released=True)))
        except StoreError:
            with suppress(StoreError):
                writer.throw_away(place)
        raise


def start_heartbeat(
    writer: VolumeWriter,
    place: PurePosixPath,
    *,
    lease_seconds: float,
    progress: Callable[[], tuple[int, int, int]] = lambda: (0, 0, 0),
    superseded: Callable[[], bool] = lambda: False,
) -> Heartbeat:
    """
    Write heartbeats for a claim or lease of this process until they are stopped.
    """
    with _given_back_on_failure(writer, place), writer.translated("writing", place / "beat"):
        return Heartbeat(
            _create_beat(writer, place),
            lease_seconds=lease_seconds,
            progress=progress,
            superseded=superseded,
            is_shared=not writer.is_local,
        )


def _create_beat(writer: VolumeWriter, place: PurePosixPath) -> int:
    fd = writer.create(place / "beat")
    # For a container that is started again after it was killed: it numbers processes anew, so that the one before it
    # would look alive for a lease. Only a kernel that all share knows better, and there a lock call does not hang.
    if layout.is_claim(place) and writer.is_local and hold(fd):
        with suppress(StoreError):  # What it says is true from before it is there.
            os.close(writer.create(place / _HELD))
    return fd


@contextmanager
def reading(writer: VolumeWriter, generation: str, *, lease_seconds: float, holder: Holder) -> Iterator[None]:
    """
    Hold a reader's lease on a generation.

    It counts only for removers that look after it was made, so look again inside. It belongs to this process: a forked
    child that leaves the `with` does not release it.
    """
    place = layout.lease_dir(generation) / secrets.token_hex(16)
    writer.write_sign(place / "owner", encode(ReaderLease(generation=generation, holder=holder)))
    heart = start_heartbeat(writer, place, lease_seconds=lease_seconds * READER_LEASES)
    try:
        yield
    finally:
        if heart.is_ours:
            heart.stop()
            with suppress(StoreError):  # A lease that was released blocks no process, wherever its files are.
                writer.throw_away(place)


class Readers:
    """
    The leases on some generations, which may be watched several times. A reader that was silent for a lease once is not
    waited for again.
    """

    def __init__(self, volume: Volume, *, lease_seconds: float) -> None:
        self._volume = volume
        self._seconds = lease_seconds * READER_LEASES
        self._silent: Mapping[str, bytes] = {}

    def watch(self, generations: Iterable[str]) -> tuple[str, ...]:
        """
        Return the readers of these generations that are provably alive. Waits up to a reader's lease for those without
        heartbeats, for all of them together.
        """
        leases = [layout.lease_dir(generation) for generation in generations]
        signs: dict[str, Sign] = {}

        def look(names: Collection[str] | None) -> dict[str, Sign]:
            if names is None:
                names = [str(place / name) for place in leases for name in self._volume.list_names(place)]
            found = {
                name: _read_sign(self._volume, PurePosixPath(name), ReaderLease, signs.get(name)) for name in names
            }
            signs.update(found)
            return found

        live, self._silent = _watch(look, self._seconds, self._silent)
        return live


def find_live_downloader(volume: Volume, key: str, *, lease_seconds: float) -> str | None:
    """
    Return the downloader of a key that is provably alive, or None. Waits up to a lease for one without heartbeats.
    """

    def look(names: Collection[str] | None) -> dict[str, Sign]:
        sign = read_claim(volume, key)
        return {} if sign is None else {sign.name: sign}

    live, _ = _watch(look, lease_seconds, {})
    return next(iter(live), None)


def _watch(
    look: Callable[[Collection[str] | None], Mapping[str, Sign]], seconds: float, silent: Mapping[str, bytes]
) -> tuple[tuple[str, ...], Mapping[str, bytes]]:
    """
    Watch signs until one changes, or all holders have released theirs, are dead, or were silent for so many seconds.

    Returns:
        The holders that show a sign of life, and the signs of those that were silent.
    """
    watch = Watch(seconds, silent)
    while True:
        began = time.monotonic()  # A sign of life is as old as the time before it was read.
        signs = {name: s for name, s in look(watch.names).items() if not (s.is_released or s.is_dead)}
        live = watch.look(began, {name: None if s.is_unreadable else s.raw for name, s in signs.items()})
        if live is not None:
            return tuple(signs[name].holder for name in live), watch.silent
        time.sleep(watch.pause)


def break_claim(writer: VolumeWriter, key: str, *, uri: str, holder: Holder, lease_seconds: float) -> None:
    """
    Supersede whatever claim there is by one that is released at once.
    """
    epoch = newest_epoch(writer, key)
    while True:
        epoch += 1
        if take_claim(writer, key, epoch, uri=uri, holder=holder) is not None:
            break
    start_heartbeat(writer, layout.claim_dir(key, epoch), lease_seconds=lease_seconds).stop()
