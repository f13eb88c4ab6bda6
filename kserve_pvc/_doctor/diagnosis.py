"""
A diagnosis: what a doctor has measured about a volume, and what follows from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import attrs

from kserve_pvc._doctor.reports import LockTest, PeerReport, Race
from kserve_pvc._show.units import format_bytes
from kserve_pvc._volume.profile import Profile

_INCREDIBLE_BYTES = 512 * 1024**4
_CLOCK_SECONDS = 60.0

Level = Literal["unsafe", "change", "note"]


@attrs.frozen(kw_only=True)
class Finding:
    """
    One thing about a volume that a person should know.

    Args:
        what: A short name that stays the same, for scripts.
        level: `unsafe` can cost a model or a download, `change` should be changed, `note` is good to know.
        measured: What was seen.
        rule: What should be, and why.
        remedy: What to do.
    """

    what: str
    level: Level
    measured: str
    rule: str
    remedy: str


@attrs.frozen(kw_only=True)
class Speed:
    """
    How fast one stream wrote and read a sample.

    Args:
        sample_bytes: How long the sample was; random bytes, so that nothing compresses them.
        write_bytes_per_second: Until `fsync` had come back.
        read_bytes_per_second: None if it could not be read back.
        reading: `direct` went around the page cache of this node; `dropped` had asked the kernel to forget it, which it
            may refuse. Caches of the volume's own client and server count in both.
        free_dropped_bytes: By how much the free space went down meanwhile.
    """

    sample_bytes: int
    write_bytes_per_second: float
    read_bytes_per_second: float | None
    reading: Literal["direct", "dropped"] | None
    free_dropped_bytes: int


@attrs.frozen(kw_only=True)
class Diagnosis:
    """
    What a doctor found about one directory on a volume.

    Args:
        is_store: A store has been created here.
        locker, lease_seconds: Those of the store, or those of one that would be created here.
        uid, gid: Of this process.
        owner_uid, owner_gid, mode: Of the directory.
        free_bytes, total_bytes: What the volume says.
        clock_ahead: By how many seconds the clock that dates files is ahead of this node's; None if nothing was
            written.
        peer: What two nodes found out about each other; None if none was waited for, or none came.
        ok: Nothing is unsafe or to be changed.
    """

    root: Path
    is_store: bool
    locker: str
    lease_seconds: float
    profile: Profile
    uid: int
    gid: int
    owner_uid: int
    owner_gid: int
    mode: int
    free_bytes: int
    total_bytes: int
    clock_ahead: float | None
    speed: Speed | None
    peer: PeerReport | None
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        return all(finding.level == "note" for finding in self.findings)


def judge(diagnosis: Diagnosis, *, wanted_peer: bool) -> Iterator[Finding]:
    """
    Compare what was measured with what a store needs and what serves it best.
    """
    yield from _judge_profile(diagnosis)
    yield from _judge_mount(diagnosis)
    yield from _judge_access(diagnosis)
    yield from _judge_space(diagnosis)
    yield from _judge_clock(diagnosis)
    if diagnosis.peer is not None:
        yield from _judge_peer(diagnosis, diagnosis.peer)
    elif wanted_peer:
        nfs4 = diagnosis.profile.type == "nfs4"
        yield Finding(
            what="peer-missing",
            level="change",
            measured="no other doctor came to this meeting in time, or its signs were not seen here",
            rule="two nodes see each other's files on a shared volume",
            remedy="start `kserve-pvc doctor DIR --peer NAME` on both nodes with one NAME, within the time limit, on the same directory"
            + ("; give each node a host name of its own, or its NFS client an `nfs4_unique_id`" if nfs4 else ""),
        )
    elif diagnosis.locker == "flock" and diagnosis.profile.mount.is_network:
        yield Finding(
            what="flock-unproven",
            level="change",
            measured="the store's locker is `flock`, and one node cannot see whether it excludes others",
            rule="`flock` is worth choosing only where it excludes across nodes",
            remedy="run `kserve-pvc doctor DIR --peer NAME` on two nodes at once, or use a store with the locker `lease`",
        )


def _judge_profile(diagnosis: Diagnosis) -> Iterator[Finding]:
    profile = diagnosis.profile
    for obstacle in profile.obstacles:
        rule = "no store can be correct on such a volume"
        yield Finding(what="unusable", level="unsafe", measured=obstacle, rule=rule, remedy="use another volume")
    if profile.read_only:
        yield _note(
            "read-only",
            "the volume is mounted read-only",
            "a replica may read; what downloads needs to write",
            "nothing, if so meant",
        )
    elif profile.mkdir is None:
        yield _note(
            "not-tried", "nothing was written", "only writing shows what a volume can do", "run it where it may write"
        )
    if profile.syncs_directories is False:
        rule = "after a power failure a name may be gone that `fsync` of its directory would have kept"
        yield _note(
            "directories-not-synced",
            "`fsync` of a directory is not supported",
            rule,
            "nothing; the next `ensure` downloads again",
        )
    if "hangs" in (profile.flock, profile.range_lock):
        yield _note(
            "locks-hang",
            "a lock that does not wait was not answered within a second",
            "so it is while an NFS server recovers; the store asks in a thread of its own and counts it as refused",
            "look at the server if it stays so; the locker `lease` needs no such locks",
        )
    if profile.link == "unsupported":
        yield _note(
            "no-hard-links",
            "there are no hard links",
            "unchanged files of a new version are copied, not linked",
            "nothing",
        )
    if profile.folds_case or profile.folds_unicode:
        rule = "models with two such names are refused on every volume, so nothing gets lost"
        yield _note("folds-names", "names that differ only in case or Unicode form are one", rule, "nothing")
    if profile.keeps_names is False:
        yield _note(
            "changes-names",
            "some letters of names are refused or changed",
            "a model with such names is refused",
            "rename its files",
        )
    if profile.name_bytes is not None and profile.name_bytes < 255:
        measured = f"names may have {profile.name_bytes} bytes"
        yield _note(
            "short-names", measured, "a model with longer names is refused before it is fetched", "rename its files"
        )


def _note(what: str, measured: str, rule: str, remedy: str) -> Finding:
    return Finding(what=what, level="note", measured=measured, rule=rule, remedy=remedy)


def _judge_mount(diagnosis: Diagnosis) -> Iterator[Finding]:
    kind, options = diagnosis.profile.type, diagnosis.profile.options
    if kind == "overlay":
        yield Finding(
            what="no-volume",
            level="change",
            measured="the directory lies in the container's own layer",
            rule="a store lies on a volume, or it is gone with the container",
            remedy="mount the volume there, or name the directory where it is mounted",
        )
    if kind == "tmpfs":
        yield _note(
            "memory",
            "the directory lies in memory",
            "it is gone with the pod or the node, and counts as its memory",
            "nothing, if so meant",
        )
    if kind.startswith("nfs"):
        yield from _judge_nfs(diagnosis, options)
    if kind.startswith(("cifs", "smb")):
        yield from _judge_smb(diagnosis, options)
    if kind == "fuse.seaweedfs" and diagnosis.locker == "flock" and diagnosis.peer is None:
        yield _flock_lies("each SeaweedFS mount grants all locks to itself")


def _judge_nfs(diagnosis: Diagnosis, options: tuple[str, ...]) -> Iterator[Finding]:
    if {"soft", "softerr"} & set(options):
        yield Finding(
            what="nfs-soft",
            level="change",
            measured="it is mounted `soft`",
            rule="with `soft` a slow server becomes an I/O error in the middle of a download or of a server that maps the model",
            remedy="mount with `hard`",
        )
    local = sorted({"nolock", "local_lock=all", "local_lock=flock"} & set(options))
    if local and diagnosis.locker == "flock":
        yield _flock_lies(f"it is mounted with `{local[0]}`, so locks stay on their node")
    if diagnosis.profile.visibility_delay > 10:
        yield _note(
            "slow-removal",
            f"a node may keep what it knows of a directory for {diagnosis.profile.visibility_delay / 2:.0f} s",
            f"a removal waits {diagnosis.profile.visibility_delay:.0f} s for it; downloads and hits do not wait",
            "mount with a smaller `acdirmax` if that is too long",
        )


def _judge_smb(diagnosis: Diagnosis, options: tuple[str, ...]) -> Iterator[Finding]:
    if "nobrl" in options and diagnosis.locker == "flock":
        yield _flock_lies("it is mounted with `nobrl`, so locks stay on their node")
    if "cache=loose" in options:
        yield Finding(
            what="smb-loose-cache",
            level="unsafe",
            measured="it is mounted with `cache=loose`",
            rule="a node may then read old bytes of a file without asking the server",
            remedy="mount with `cache=strict`",
        )


def _flock_lies(measured: str) -> Finding:
    return Finding(
        what="flock-lies",
        level="unsafe",
        measured=measured,
        rule="`flock` must exclude across nodes to be the locker; models stay correct without, but work is done twice",
        remedy="do not use `flock` here: create the store with the locker `lease`",
    )


def _judge_access(diagnosis: Diagnosis) -> Iterator[Finding]:
    if diagnosis.profile.read_only or diagnosis.uid != 0 or diagnosis.mode & 0o020:
        return
    yield _note(
        "only-root-writes",
        f"the directory belongs to uid {diagnosis.owner_uid} gid {diagnosis.owner_gid} with mode {diagnosis.mode:04o}",
        "a pod with another uid may then not write, and its downloads fail",
        "set `fsGroup` in the pods' security context, or give the group write permission and the set-gid bit",
    )


def _judge_space(diagnosis: Diagnosis) -> Iterator[Finding]:
    if diagnosis.total_bytes >= _INCREDIBLE_BYTES:
        yield Finding(
            what="free-space-made-up",
            level="change",
            measured=f"the volume says that it has {format_bytes(diagnosis.total_bytes)}",
            rule="a download asks first whether it fits, which a made-up number always answers with yes",
            remedy="give the volume its true size, as by a quota or JuiceFS's `--capacity`",
        )
    speed = diagnosis.speed
    if speed is not None and speed.free_dropped_bytes < speed.sample_bytes // 2:
        yield _note(
            "free-space-lags",
            f"{format_bytes(speed.sample_bytes)} were written, and the free space went down by {format_bytes(max(speed.free_dropped_bytes, 0))}",
            "what is said to be free may be gone already",
            "leave room to spare; a download that does not fit after all fails and gives back what it took",
        )


def _judge_clock(diagnosis: Diagnosis) -> Iterator[Finding]:
    peer = diagnosis.peer
    for what, ahead in (
        ("clock-of-volume", diagnosis.clock_ahead),
        ("clock-of-peer", peer.clock_ahead if peer else None),
    ):
        if ahead is None or abs(ahead) <= _CLOCK_SECONDS:
            continue
        yield Finding(
            what=what,
            level="change",
            measured=f"its clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} this node's",
            rule="no model depends on clocks, but the trash is emptied by them, and times that people read are wrong",
            remedy="synchronise the clocks of the nodes",
        )


def _judge_peer(diagnosis: Diagnosis, peer: PeerReport) -> Iterator[Finding]:
    if not peer.is_done:
        yield Finding(
            what="peer-lost",
            level="change",
            measured=f"{peer.name} stopped while both tested {peer.step}",
            rule="a test needs both",
            remedy="run it again on both nodes",
        )
    if peer.same_mount:
        rule = "what holds within one mount says nothing about other nodes"
        yield _note("peer-on-same-mount", "both doctors use one mount of one node", rule, "run them on two nodes")
    for what, race in peer.races.items():
        yield from _judge_race(what, race)
    yield from _judge_locks(diagnosis, peer)
    if peer.is_done or peer.step not in ("hello", "clocks", "names"):
        yield from _judge_names(peer)
    if peer.is_done:
        yield from _judge_beats(diagnosis, peer)


def _judge_race(what: str, race: Race) -> Iterator[Finding]:
    calls = {
        "mkdir": "`mkdir`",
        "create": "an exclusive create",
        "link": "`link`",
        "rename": "a rename that replaces nothing",
    }
    measured = f"of {race.rounds} names that both nodes made at once by {calls[what]}, {race.both_won} had two winners"
    if race.both_won and what == "mkdir":
        rule = "two writers may take one number or one claim; each still publishes only complete, verified models"
        remedy = "do not let several nodes write here; use another volume"
        yield Finding(what="mkdir-not-exclusive", level="unsafe", measured=measured, rule=rule, remedy=remedy)
    elif race.both_won:
        yield _note(
            f"{what}-not-exclusive",
            measured,
            "the store takes numbers by `mkdir` and does not rely on it",
            "nothing; do not rely on it yourself",
        )
    elif race.supported and not race.contested:
        rule = "exclusion shows only if two calls overlap"
        yield _note(
            f"{what}-not-contested",
            f"no two of {race.rounds} calls overlapped",
            rule,
            "run it again while the nodes are idle",
        )


def _judge_locks(diagnosis: Diagnosis, peer: PeerReport) -> Iterator[Finding]:
    verdict = lock_verdict(peer.locks.get("flock", ()))
    if verdict == "lies" and diagnosis.locker == "flock":
        yield _flock_lies("both nodes held one `flock` at the same time")
    elif verdict == "lies":
        rule = "the locker `lease` does not need it"
        yield _note(
            "flock-lies",
            "both nodes held one `flock` at the same time",
            rule,
            "do not use `flock` here; `lease` is right",
        )
    elif verdict != "excludes" and diagnosis.locker == "flock":
        yield Finding(
            what="flock-unproven",
            level="change",
            measured=f"whether `flock` excludes between the nodes is {verdict}",
            rule="`flock` is worth choosing only where it excludes across nodes",
            remedy="use a store with the locker `lease`",
        )


def lock_verdict(tests: Sequence[LockTest]) -> Literal["excludes", "lies", "unsupported", "unclear", "untested"]:
    """
    What all tests of one kind of lock say together: one lie is enough, and all must exclude to be believed.
    """
    verdicts = [test.verdict for test in tests]
    for verdict in ("lies", "unsupported", "unclear", "excludes"):
        if verdict in verdicts:
            return verdict
    return "untested"


def _judge_names(peer: PeerReport) -> Iterator[Finding]:
    if peer.listed_after is None:
        yield Finding(
            what="not-listed",
            level="unsafe",
            measured="a new file of the other node was in no listing here",
            rule="every model is found by listing a directory",
            remedy="turn off the caching of directories in the mount options, or use another volume",
        )
    hidden = peer.found_after
    if hidden is None or hidden > 2.0:
        measured = "was not found within the test" if hidden is None else f"stayed hidden for {hidden:.0f} s"
        rule = "the store lists instead of asking by name, so it does not wait for this"
        yield _note(
            "hidden-name",
            f"a name that was looked for too early {measured}",
            rule,
            "for other programs: on NFS, `lookupcache=positive`",
        )
    stale = peer.replaced_after
    if stale is None or stale > 2.0:
        measured = "kept its old content" if stale is None else f"kept its old content for {stale:.0f} s"
        yield _note(
            "stale-content",
            f"a file that was replaced {measured}",
            "the store never replaces a file of a model",
            "nothing",
        )


def _judge_beats(diagnosis: Diagnosis, peer: PeerReport) -> Iterator[Finding]:
    limit = diagnosis.lease_seconds / 3
    if peer.beat_after is not None and peer.beat_after <= limit:
        return
    seen = "were not seen here" if peer.beat_after is None else f"were seen only after {peer.beat_after:.1f} s"
    yield Finding(
        what="beats-not-seen",
        level="unsafe" if peer.beat_after is None else "change",
        measured=f"beats that the other node writes every half second {seen}",
        rule=f"a downloader whose beats are not seen for the lease ({diagnosis.lease_seconds:g} s) is taken over while it works",
        remedy="mount with less caching, or create the store with a longer lease",
    )
