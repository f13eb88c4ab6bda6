"""
A diagnosis: what a doctor measured on a volume, and the findings that follow from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import attrs

from kserve_pvc._doctor.reports import LockTest, LockVerdict, PeerReport, Race
from kserve_pvc._show.units import format_bytes
from kserve_pvc._volume.profile import Profile

_IMPLAUSIBLE_BYTES = 512 * 1024**4
_CLOCK_SECONDS = 60.0
_NO_ACTION = "no action needed"
_NO_ACTION_IF_INTENDED = "no action needed if intended"

Level = Literal["unsafe", "change", "note"]


@attrs.frozen(kw_only=True)
class Finding:
    """
    One fact about a volume that its operator should know.

    Args:
        what: A short name for scripts, which does not change between versions.
        level: `unsafe` can cost a model or a download, `change` should be changed, `note` is for information.
        measured: The observation.
        rule: What a store needs, and why.
        hint: What to do.
    """

    what: str
    level: Level
    measured: str
    rule: str
    hint: str


@attrs.frozen(kw_only=True)
class Speed:
    """
    The throughput of one stream that writes and reads a sample.

    Args:
        sample_bytes: The size of the sample; random bytes, so that it cannot be compressed.
        write_bytes_per_second: Includes the time of `fsync`.
        read_bytes_per_second: None if the sample could not be read back.
        reading: `direct` bypassed the page cache of this node; `dropped` requested that the kernel drop it, which the
            kernel may ignore. Caches of the volume's client and server are included in both.
        free_dropped_bytes: By how much the free space decreased during the test.
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
        is_store: Whether the directory is a store.
        locker, lease_seconds: Those of the store, or the defaults for a store created here.
        uid, gid: Of this process.
        owner_uid, owner_gid, mode: Of the directory.
        free_bytes, total_bytes: As reported by the volume.
        clock_ahead: How many seconds the clock that sets file times is ahead of the clock of this node; None if
            nothing was written.
        peer: The results of the tests with another node; None if no peer was requested, or none appeared.
        sources: Why settings of sources are not plain, by scheme. Schemes whose settings are plain are left out.
        plugins: Which other distributions claim a scheme, with their versions, and whether they are used.
        ok: Whether no finding is `unsafe` or `change`.
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
    sources: Mapping[str, Sequence[str]] = attrs.field(factory=dict)
    plugins: Mapping[str, Sequence[str]] = attrs.field(factory=dict)

    @property
    def ok(self) -> bool:
        return all(finding.level == "note" for finding in self.findings)


def judge(diagnosis: Diagnosis, *, expects_peer: bool) -> Iterator[Finding]:
    """
    Compare the measurements with what a store needs and what suits it best.
    """
    yield from _judge_operations(diagnosis.profile)
    yield from _judge_names(diagnosis.profile)
    yield from _judge_mount(diagnosis)
    yield from _judge_access(diagnosis)
    yield from _judge_space(diagnosis)
    yield from _judge_clocks(diagnosis)
    if diagnosis.peer is not None:
        yield from _judge_peer(diagnosis, diagnosis.peer)
    elif expects_peer:
        yield _peer_missing(diagnosis.profile)
    elif diagnosis.locker == "flock" and diagnosis.profile.mount.is_network:
        yield _flock_unproven(
            "the store's locker is `flock`, and one node cannot tell whether it excludes other nodes",
            "run `kserve-pvc doctor DIR --peer NAME` on two nodes at once, or use a store with the locker `lease`",
        )


def _unsafe(what: str, measured: str, rule: str, hint: str) -> Finding:
    return Finding(what=what, level="unsafe", measured=measured, rule=rule, hint=hint)


def _change(what: str, measured: str, rule: str, hint: str) -> Finding:
    return Finding(what=what, level="change", measured=measured, rule=rule, hint=hint)


def _note(what: str, measured: str, rule: str, hint: str) -> Finding:
    return Finding(what=what, level="note", measured=measured, rule=rule, hint=hint)


def _judge_operations(profile: Profile) -> Iterator[Finding]:
    for obstacle in profile.obstacles:
        yield _unsafe("unusable", obstacle, "no store can be correct on such a volume", "use another volume")
    if profile.read_only:
        rule = "model servers can read; downloaders need write access"
        yield _note("read-only", "the volume is mounted read-only", rule, _NO_ACTION_IF_INTENDED)
    elif profile.mkdir is None:
        rule = "only write tests show what a volume supports"
        yield _note("not-tested", "nothing was written", rule, "run it with write access")
    if profile.syncs_directories is False:
        yield _note(
            "directories-not-synced",
            "`fsync` of a directory is not supported",
            "new names may be lost in a power failure",
            f"{_NO_ACTION}: the next `ensure` downloads again",
        )
    if "hangs" in (profile.flock, profile.range_lock):
        yield _note(
            "locks-hang",
            "a non-blocking lock request got no response within a second",
            "this happens while an NFS server is in its grace period; the store treats the lock as refused",
            "check the server if it persists; the locker `lease` needs no such locks",
        )
    if profile.link == "unsupported":
        rule = "unchanged files of a new version are copied instead of linked"
        yield _note("no-hard-links", "hard links are not supported", rule, _NO_ACTION)


def _judge_names(profile: Profile) -> Iterator[Finding]:
    if profile.folds_case or profile.folds_unicode:
        measured = "names that differ only in case or Unicode form are the same file"
        rule = "a model with two such names is refused on every volume, so no file is lost"
        yield _note("folds-names", measured, rule, _NO_ACTION)
    if profile.keeps_names is False:
        measured = "some characters in names are refused or changed"
        yield _note("changes-names", measured, "a model with such names is refused", "rename its files")
    if profile.name_bytes is not None and profile.name_bytes < 255:
        measured = f"names are limited to {profile.name_bytes} bytes"
        rule = "a model with longer names is refused before it is downloaded"
        yield _note("short-names", measured, rule, "rename its files")


def _judge_mount(diagnosis: Diagnosis) -> Iterator[Finding]:
    kind = diagnosis.profile.type
    if kind == "overlay":
        yield _change(
            "no-volume",
            "the directory is in the container's own file system",
            "a store must be on a volume, or it is deleted with the container",
            "mount the volume at this path, or give the path where it is mounted",
        )
    if kind == "tmpfs":
        rule = "it is deleted with the pod or the node, and counts as memory of the pod"
        yield _note("memory", "the directory is in memory", rule, _NO_ACTION_IF_INTENDED)
    if kind.startswith("nfs"):
        yield from _judge_nfs(diagnosis)
    if kind.startswith(("cifs", "smb")):
        yield from _judge_smb(diagnosis)
    if kind == "fuse.seaweedfs" and diagnosis.locker == "flock" and diagnosis.peer is None:
        yield _flock_not_exclusive("each SeaweedFS mount grants all locks locally")


def _judge_nfs(diagnosis: Diagnosis) -> Iterator[Finding]:
    options = set(diagnosis.profile.options)
    if {"soft", "softerr"} & options:
        yield _change(
            "nfs-soft",
            "it is mounted with `soft`",
            "with `soft`, a slow server causes I/O errors in downloads and in servers that map a model",
            "mount with `hard`",
        )
    local = sorted({"nolock", "local_lock=all", "local_lock=flock"} & options)
    if local and diagnosis.locker == "flock":
        yield _flock_not_exclusive(f"it is mounted with `{local[0]}`, so locks are local to each node")
    delay = diagnosis.profile.visibility_delay
    if delay > 10:
        yield _note(
            "slow-removal",
            f"a node may cache the attributes of a directory for {delay / 2:.0f} s",
            f"a removal waits {delay:.0f} s for these caches; downloads and hits do not wait",
            "mount with a smaller `acdirmax` if that is too long",
        )


def _judge_smb(diagnosis: Diagnosis) -> Iterator[Finding]:
    options = diagnosis.profile.options
    if "nobrl" in options and diagnosis.locker == "flock":
        yield _flock_not_exclusive("it is mounted with `nobrl`, so locks are local to each node")
    if "cache=loose" in options:
        yield _unsafe(
            "smb-loose-cache",
            "it is mounted with `cache=loose`",
            "a node may read stale bytes of a file from its cache",
            "mount with `cache=strict`",
        )


def _flock_not_exclusive(measured: str) -> Finding:
    return _unsafe(
        "flock-not-exclusive",
        measured,
        "as the locker, `flock` must exclude across nodes; without that models stay correct, but are downloaded twice",
        "create the store with the locker `lease`",
    )


def _flock_unproven(measured: str, hint: str) -> Finding:
    return _change("flock-unproven", measured, "`flock` saves work only if it excludes across nodes", hint)


def _judge_access(diagnosis: Diagnosis) -> Iterator[Finding]:
    owner = f"uid {diagnosis.owner_uid} gid {diagnosis.owner_gid}"
    if diagnosis.mode & 0o002:
        yield _change(
            "world-writable",
            f"the directory has mode {diagnosis.mode:04o}, so every user in every container that mounts it can write",
            "who may write can replace models and records, and checksums do not tell",
            "take the right to write from others (`chmod o-w`), and give it to the group by `fsGroup`",
        )
    if diagnosis.owner_uid not in (0, diagnosis.uid):
        yield _note(
            "owned-by-another-user",
            f"the directory belongs to {owner}, and this process runs as uid {diagnosis.uid}",
            "the owner of a directory can replace what is in it, whatever its mode",
            "make sure that only trusted processes run as that user",
        )
    if diagnosis.profile.read_only or diagnosis.uid != 0 or diagnosis.mode & 0o020:
        return
    yield _note(
        "only-root-writes",
        f"the directory belongs to {owner} with mode {diagnosis.mode:04o}",
        "downloads in a pod with another uid may fail for lack of write permission",
        "set `fsGroup` in the pods' security context, or give the group write permission and the set-gid bit",
    )


def _judge_space(diagnosis: Diagnosis) -> Iterator[Finding]:
    if diagnosis.total_bytes >= _IMPLAUSIBLE_BYTES:
        yield _change(
            "free-space-implausible",
            f"the volume reports a size of {format_bytes(diagnosis.total_bytes)}",
            "a download checks first whether it fits, and against a made-up size it always does",
            "give the volume its true size, for example by a quota or JuiceFS's `--capacity`",
        )
    speed = diagnosis.speed
    if speed is not None and speed.free_dropped_bytes < speed.sample_bytes // 2:
        written, dropped = format_bytes(speed.sample_bytes), format_bytes(max(speed.free_dropped_bytes, 0))
        yield _note(
            "free-space-lags",
            f"{written} were written, and the free space decreased by {dropped}",
            "reported free space may already be used",
            "leave a reserve; a download that does not fit fails and deletes what it wrote",
        )


def _judge_clocks(diagnosis: Diagnosis) -> Iterator[Finding]:
    peer = diagnosis.peer
    clocks = {"clock-of-volume": diagnosis.clock_ahead, "clock-of-peer": peer.clock_ahead if peer else None}
    for what, ahead in clocks.items():
        if ahead is not None and abs(ahead) > _CLOCK_SECONDS:
            yield _change(
                what,
                f"its clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} this node's",
                "no model depends on clocks, but the age of trash does, and displayed times are wrong",
                "synchronise the clocks of the nodes",
            )


def _peer_missing(profile: Profile) -> Finding:
    hint = "run `kserve-pvc doctor DIR --peer NAME` on both nodes, with the same NAME and directory, within the timeout"
    if profile.type == "nfs4":
        hint += "; give each node its own host name, or its NFS client an `nfs4_unique_id`"
    return _change(
        "peer-missing",
        "no other doctor appeared in time, or its files were not visible here",
        "nodes must see each other's files on a shared volume",
        hint,
    )


def _judge_peer(diagnosis: Diagnosis, peer: PeerReport) -> Iterator[Finding]:
    if not peer.is_done:
        measured = f"{peer.name} stopped during the step `{peer.step}`"
        yield _change("peer-lost", measured, "the tests need both doctors", "run it again on both nodes")
    if peer.same_mount:
        measured = "both doctors use the same mount of one node"
        rule = "results within one mount say nothing about other nodes"
        yield _note("peer-on-same-mount", measured, rule, "run them on two nodes")
    for what, race in peer.races.items():
        yield from _judge_race(what, race)
    yield from _judge_locks(diagnosis, peer)
    if peer.has_compared_names:
        yield from _judge_visibility(peer)
    if peer.is_done:
        yield from _judge_heartbeats(diagnosis, peer)


def _judge_race(what: str, race: Race) -> Iterator[Finding]:
    calls = {
        "mkdir": "`mkdir`",
        "create": "exclusive create",
        "link": "`link`",
        "rename": "rename without replacing",
    }
    measured = (
        f"of {race.rounds} names that both nodes created at once by {calls[what]}, {race.both_won} had two winners"
    )
    if race.both_won and what == "mkdir":
        rule = "two writers may take the same number or claim; each still publishes only complete, verified models"
        yield _unsafe("mkdir-not-exclusive", measured, rule, "write from one node only, or use another volume")
    elif race.both_won:
        rule = "the store does not rely on it: it takes numbers by `mkdir`"
        yield _note(f"{what}-not-exclusive", measured, rule, f"{_NO_ACTION}; do not rely on it in your own code")
    elif race.supported and not race.contested:
        measured = f"no two of {race.rounds} calls overlapped"
        rule = "only overlapping calls can show whether one excludes the other"
        yield _note(f"{what}-not-contested", measured, rule, "run it again while the nodes are idle")


def _judge_locks(diagnosis: Diagnosis, peer: PeerReport) -> Iterator[Finding]:
    verdict = lock_verdict(peer.locks.get("flock", ()))
    both = "both nodes held one `flock` at the same time"
    if verdict == "not exclusive" and diagnosis.locker == "flock":
        yield _flock_not_exclusive(both)
    elif verdict == "not exclusive":
        yield _note("flock-not-exclusive", both, "the locker `lease` does not need it", "keep the locker `lease`")
    elif verdict != "excludes" and diagnosis.locker == "flock":
        measured = f"the test whether `flock` excludes between the nodes gave `{verdict}`"
        yield _flock_unproven(measured, "use a store with the locker `lease`")


def lock_verdict(tests: Sequence[LockTest]) -> LockVerdict | Literal["untested"]:
    """
    Summarise all tests of one kind of lock: one failure is enough, and all must exclude to pass.
    """
    verdicts = {test.verdict for test in tests}
    order: tuple[LockVerdict, ...] = ("not exclusive", "unsupported", "unclear", "excludes")
    return next((verdict for verdict in order if verdict in verdicts), "untested")


def _judge_visibility(peer: PeerReport) -> Iterator[Finding]:
    if peer.listed_after is None:
        yield _unsafe(
            "not-listed",
            "a new file of the other node did not appear in any listing here",
            "the store finds every model by listing a directory",
            "turn off the caching of directories in the mount options, or use another volume",
        )
    hidden = peer.found_after
    if hidden is None or hidden > 2.0:
        delay = "for the whole test" if hidden is None else f"for {hidden:.0f} s"
        yield _note(
            "hidden-name",
            f"a name that was looked up before it existed stayed hidden {delay}",
            "the store lists directories instead of looking names up, so it is not affected",
            "for other programs on NFS: mount with `lookupcache=positive`",
        )
    stale = peer.replaced_after
    if stale is None or stale > 2.0:
        delay = "for the whole test" if stale is None else f"for {stale:.0f} s"
        measured = f"a replaced file kept its old content {delay}"
        yield _note("stale-content", measured, "the store never replaces a file of a model", _NO_ACTION)


def _judge_heartbeats(diagnosis: Diagnosis, peer: PeerReport) -> Iterator[Finding]:
    if peer.heartbeat_after is not None and peer.heartbeat_after <= diagnosis.lease_seconds / 3:
        return
    seen = "were not seen" if peer.heartbeat_after is None else f"were seen only after {peer.heartbeat_after:.1f} s"
    yield Finding(
        what="heartbeats-not-seen",
        level="unsafe" if peer.heartbeat_after is None else "change",
        measured=f"heartbeats that the other node writes every half second {seen}",
        rule=f"a live downloader loses its claim if its heartbeats are not seen for {diagnosis.lease_seconds:g} s",
        hint="mount with less caching, or create the store with a longer lease",
    )
