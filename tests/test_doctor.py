"""
Doctors: alone on good and bad directories, and in pairs on real volumes with honest and with lying locks.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import actors
import attrs
import nodes
import pytest
import shell
from users import public_directory, python_as
from volumes import MOUNTS, NETWORK, CannotStartError, SharedVolume, fresh_root
from waiting import until

from kserve_pvc import Diagnosis, LockTest, ModelStore, PeerReport, Profile, Race, ReadOnlyStoreError, SettingsError
from kserve_pvc._doctor import exchange
from kserve_pvc._doctor.diagnosis import Speed, judge
from kserve_pvc._doctor.doctor import diagnose, sweep
from kserve_pvc._doctor.peer import heartbeats, new_directory
from kserve_pvc._doctor.reports import Hello, Message
from kserve_pvc._doctor.text import format_diagnosis
from kserve_pvc._format import layout
from kserve_pvc._format.codec import encode
from kserve_pvc._volume.scratch import open_scratch
from kserve_pvc._volume.writing import VolumeWriter
from kserve_pvc.locks.liveness import here

SAMPLE = 4 * 1024 * 1024
PROFILE = Profile(
    type="ext4",
    options=("rw",),
    read_only=False,
    mkdir="refuses",
    create="refuses",
    link="refuses",
    rename="refuses",
    lists=True,
    writes_at_offset=True,
    syncs_files=True,
    syncs_directories=True,
    flock="granted",
    range_lock="granted",
    folds_case=False,
    folds_unicode=False,
    keeps_names=True,
    name_bytes=255,
)
PEER = PeerReport(
    name="pod b on node-b (uid 0, pid 2)",
    same_node=False,
    same_mount=False,
    clock_ahead=0.01,
    clock_error=0.01,
    listed_after=0.0,
    found_after=0.0,
    replaced_after=0.0,
    deleted_after=0.0,
    gone_after=0.0,
    heartbeat_after=0.5,
    races={what: Race(rounds=40, contested=20, both_won=0, neither_won=0, supported=True) for what in exchange.RACED},
    locks={kind: [LockTest(held="granted", second="refused", after_release="granted")] * 2 for kind in exchange.LOCKS},
    step="done",
)
WELL = Diagnosis(
    root=Path("/mnt/models"),
    is_store=True,
    locker="lease",
    lease_seconds=60.0,
    profile=PROFILE,
    uid=1000,
    gid=0,
    owner_uid=0,
    owner_gid=0,
    mode=0o2775,
    free_bytes=10**11,
    total_bytes=10**12,
    clock_ahead=0.0,
    speed=Speed(
        sample_bytes=SAMPLE,
        write_bytes_per_second=1e8,
        read_bytes_per_second=1e9,
        reading="direct",
        free_dropped_bytes=SAMPLE,
    ),
    peer=PEER,
    findings=(),
)


def examine(root: Path, **arguments: object) -> Diagnosis:
    """
    A diagnosis of this process with a short sample.
    """
    return diagnose(root, **{"writes": True, "holder": here(), "sample_bytes": SAMPLE, **arguments})


def found(diagnosis: Diagnosis) -> dict[str, str]:
    """
    The level of each finding by its name.
    """
    return {finding.what: finding.level for finding in diagnosis.findings}


def left(root: Path) -> list[str]:
    """
    What lies in the directory but for the empty places in which doctors work.
    """
    places = {root / ".kserve-pvc", root / ".kserve-pvc" / "doctor"}
    return [path.relative_to(root).as_posix() for path in root.rglob("*") if path not in places]


def test_a_directory_that_is_no_store_is_examined(root):
    """
    A good local directory has nothing to be changed, everything is measured, no store is made of it and nothing is
    left.
    """
    diagnosis = examine(root)

    assert (diagnosis.ok, diagnosis.is_store, diagnosis.locker, diagnosis.peer) == (True, False, "lease", None)
    assert attrs.evolve(diagnosis.profile, type="ext4", options=("rw",)) == PROFILE
    assert diagnosis.speed is not None
    assert (diagnosis.speed.sample_bytes, diagnosis.speed.write_bytes_per_second > 0) == (SAMPLE, True)
    assert abs(diagnosis.clock_ahead or 0) < 60
    assert left(root) == []


def test_a_store_is_examined_with_its_settings(root, source):
    """
    The doctor of a store tells its locker and lease, and changes nothing in it.
    """
    store = ModelStore(root, mode="rw", locker="flock", lease_seconds=45)
    store.ensure(f"file://{source}", progress=False)
    before = left(root)

    diagnosis = store.doctor()

    assert (diagnosis.is_store, diagnosis.locker, diagnosis.lease_seconds, diagnosis.ok) == (True, "flock", 45, True)
    assert left(root) == before


def test_a_read_only_store_is_only_looked_at(root):
    """
    A store that was opened read-only is examined without one write, and without a peer.
    """
    store = ModelStore(root)

    diagnosis = store.doctor()
    with pytest.raises(ReadOnlyStoreError, match="cannot test with a peer"):
        store.doctor(peer="here")

    assert (found(diagnosis)["not-tested"], diagnosis.ok, diagnosis.profile.mkdir, diagnosis.speed) == (
        "note",
        True,
        None,
        None,
    )
    assert list(root.iterdir()) == []


def test_a_read_only_mount_is_only_looked_at(root, mount):
    """
    On a read-only mount the doctor tells what can be known, finds nothing wrong, and does not try to write.
    """
    place = mount("-o", "bind,ro", str(root))

    result = shell.kserve_pvc(root, "doctor", str(place), "--json")

    document = shell.document(result)
    assert (result.returncode, document["kind"], document["profile"]["mkdir"], document["ok"]) == (
        0,
        "read-only",
        None,
        True,
    )
    assert "read-only" in [finding["what"] for finding in document["findings"]]


FIELDS = {
    *(
        "root",
        "is_store",
        "locker",
        "lease_seconds",
        "profile",
        "uid",
        "gid",
        "owner_uid",
        "owner_gid",
        "mode",
        "free_bytes",
        "total_bytes",
    ),
    *("clock_ahead", "speed", "peer", "findings", "sources", "plugins", "kind", "ok"),
}
PROFILE_FIELDS = {
    *(
        "type",
        "options",
        "read_only",
        "mkdir",
        "create",
        "link",
        "rename",
        "lists",
        "writes_at_offset",
        "syncs_files",
        "syncs_directories",
    ),
    *("flock", "range_lock", "folds_case", "folds_unicode", "keeps_names", "name_bytes"),
}
PEER_FIELDS = {
    *(
        "name",
        "same_node",
        "same_mount",
        "clock_ahead",
        "clock_error",
        "listed_after",
        "found_after",
        "replaced_after",
        "deleted_after",
    ),
    *("gone_after", "heartbeat_after", "races", "locks", "step"),
}


def test_two_commands_meet_and_print_the_pinned_document(root):
    """
    Two shells that give one peer name test each other on one directory; their documents have the fields that scripts
    read.
    """
    first, second = (shell.start(root, "doctor", str(root), "--peer", "one", "--json") for _ in range(2))
    documents = [json.loads(process.communicate(timeout=60)[0]) for process in (first, second)]
    document = documents[0]

    assert [first.returncode, second.returncode] == [0, 0]
    assert set(document) == FIELDS
    assert set(document["profile"]) == PROFILE_FIELDS
    assert set(document["peer"]) == PEER_FIELDS
    assert {tuple(sorted(race)) for race in document["peer"]["races"].values()} == {
        tuple(sorted(attrs.asdict(PEER.races["link"])))
    }
    assert {tuple(sorted(finding)) for finding in document["findings"]} == {
        ("hint", "level", "measured", "rule", "what")
    }
    assert (document["peer"]["step"], document["peer"]["same_mount"]) == ("done", True)
    assert [race["both_won"] for race in document["peer"]["races"].values()] == [0] * 4
    assert left(root) == []


def test_nobody_comes(root):
    """
    A doctor that waits in vain says so, tells all the rest, and leaves nothing.
    """
    diagnosis = examine(root, peer="here", timeout=0.1)

    assert (found(diagnosis)["peer-missing"], diagnosis.ok, diagnosis.speed is not None) == ("change", False, True)
    assert left(root) == []


@pytest.mark.parametrize("name", ["", "../up", "a/b", "A", "-", "a" * 41, "a b", "a\n"])
def test_a_peer_name_is_plain(root, name):
    """
    A name that could be anything but a name is refused before anything is written.
    """
    with pytest.raises(SettingsError, match="use up to 40 lowercase letters, digits and dashes"):
        examine(root, peer=name)

    assert list(root.iterdir()) == []


@pytest.mark.parametrize(
    ("make", "said"),
    [(lambda _: None, "it does not exist"), (lambda place: place.write_text(""), "it is not a directory")],
)
def test_a_directory_that_is_none_is_an_error(tmp_path, make, said):
    """
    What is missing or a file is named, and no directory is made of it.
    """
    place = tmp_path / "place"
    make(place)

    result = shell.kserve_pvc(tmp_path, "doctor", str(place))

    assert (result.returncode, result.stdout) == (1, "")
    assert f"cannot use `{place}` as a store: {said}" in result.stderr
    assert not place.is_dir()


def test_a_full_volume_is_a_finding(mount):
    """
    Where not one more file fits, that is what is found, and what is there is left as it is.
    """
    place = mount("-t", "tmpfs", "-o", "size=1m", "none")
    (place / "filling").write_bytes(bytes(1024 * 1024))

    diagnosis = examine(place)

    assert (found(diagnosis)["full"], diagnosis.ok) == ("change", False)
    assert left(place) == ["filling"]


def test_a_volume_without_inodes_is_a_finding(mount):
    """
    Where no name can be made any more, that is found too.
    """
    place = mount("-t", "tmpfs", "-o", "size=1m,nr_inodes=2", "none")
    (place / "filling").write_bytes(b"")

    diagnosis = examine(place)

    assert (found(diagnosis)["full"], left(place)) == ("change", ["filling"])


def test_a_quota_below_what_is_said_to_be_free_is_a_finding(root, tool):
    """
    Free space that cannot be written is found, and the sample that did not fit is taken away. No quota can be set
    everywhere, so the system call answers as it would.
    """
    inject = [
        tool("strace"),
        "-f",
        "-qq",
        "-o",
        os.devnull,
        "-e",
        "trace=pwrite64",
        "-e",
        "inject=pwrite64:error=EDQUOT:when=12+",
    ]

    result = shell.run([*inject, *shell.COMMAND, "doctor", str(root), "--json"])

    assert [finding["what"] for finding in shell.document(result)["findings"] if finding["level"] == "change"] == [
        "free-space-wrong"
    ]
    assert (result.returncode, left(root)) == (1, [])


DENIED = """
from pathlib import Path
from kserve_pvc._doctor.doctor import diagnose
from kserve_pvc.locks.liveness import here
for finding in diagnose(sys.argv[1], writes=True, holder=here()).findings:
    print(finding.level, finding.what, finding.hint)
"""


@pytest.mark.usefixtures("as_root")
def test_who_may_not_write_is_told_what_to_set():
    """
    A user without permission is told about `fsGroup`, and what can be known without writing.
    """
    with public_directory() as place:
        said = python_as(65534, "import kserve_pvc._doctor\n" + DENIED, str(place))

    assert said.splitlines()[0].startswith("change not-writable uid 65534 gid 65534 may not write it")
    assert "`fsGroup`" in said


def test_what_a_killed_doctor_leaves_goes_with_the_next(root):
    """
    After a kill during a test with a peer, the next doctor on the node takes away what was left.
    """
    waiting = shell.start(root, "doctor", str(root), "--peer", "one")
    place = root / ".kserve-pvc" / "doctor"
    until(lambda: list(place.glob("*/hello")))
    waiting.kill()
    waiting.communicate()
    before = len(list(place.iterdir()))
    examine(root)

    assert (before, left(root)) == (1, [])


def test_a_doctor_that_is_stopped_in_order_leaves_nothing(root):
    """
    On SIGTERM a waiting doctor takes its directory away before it ends.
    """
    waiting = shell.start(root, "doctor", str(root), "--peer", "one")
    until(lambda: list((root / ".kserve-pvc" / "doctor").glob("*/hello")))
    waiting.send_signal(signal.SIGTERM)
    waiting.communicate(timeout=30)

    assert (waiting.returncode, left(root)) == (143, [])


def test_debris_of_other_nodes_goes_after_an_hour_without_a_beat(root):
    """
    Old directories without heartbeats are deleted; those with heartbeats stay, whatever the clocks say. So do foreign
    names.
    """
    writer, doctors = VolumeWriter(root), root / ".kserve-pvc" / "doctor"
    old, live, young = "000000000001-0123456789abcdef", "000000000002-0123456789abcdef", new_directory().name
    for name in (old, live, young, "somebody's"):
        writer.make_directory(layout.DOCTOR / name)

    with heartbeats(writer, layout.DOCTOR / live):
        sweep(writer)

    assert sorted(path.name for path in doctors.iterdir()) == sorted([live, young, "somebody's"])


HELLO = Hello(rendezvous="here", holder=here(), device=1)


def plant_a_link_to(root: Path, outside: Path) -> None:
    doctors = root / ".kserve-pvc" / "doctor"
    doctors.mkdir(parents=True)
    (outside / "hello").write_bytes(encode(HELLO))
    (doctors / "000000000001-0123456789abcdef").symlink_to(outside)


def plant_the_whole_place(root: Path, outside: Path) -> None:
    (root / ".kserve-pvc").mkdir()
    (root / ".kserve-pvc" / "doctor").symlink_to(outside)


def plant_odd_files(root: Path, outside: Path) -> None:
    place = root / ".kserve-pvc" / "doctor" / "000000000001-0123456789abcdef"
    place.mkdir(parents=True)
    os.mkfifo(place / "hello")
    os.mkfifo(place / "owner")
    (place / "beat").symlink_to("/dev/zero")
    (place.parent / "\u202e\x1b[31m").write_bytes(b"")


def plant_nonsense(root: Path, outside: Path) -> None:
    place = root / ".kserve-pvc" / "doctor" / "000000000001-0123456789abcdef"
    place.mkdir(parents=True)
    (place / "hello").write_bytes(b'{"format":1,' * 30_000)
    (place / "owner").write_bytes(encode(HELLO))


@pytest.mark.parametrize("plant", [plant_a_link_to, plant_the_whole_place, plant_odd_files, plant_nonsense])
def test_what_strangers_plant_harms_nobody(root, tmp_path, plant):
    """
    Links, pipes, endless files and nonsense where doctors meet neither stop one nor lead it out of its place.
    """
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("kept")
    plant(root, outside)
    before = sorted(os.listdir(outside))

    diagnosis = examine(root, peer="here", timeout=0.2)

    assert not diagnosis.ok
    assert sorted(os.listdir(outside)) == before
    assert (outside / "precious").read_text() == "kept"


LIES = [
    {"races": {what: [["x"]] for what in exchange.RACED}},
    {"races": None, "start": 9e10, "lock": None},
    {"races": [], "start": 1e300, "lock": ["granted"]},
    {"races": {"mkdir": [[1.0, 2.0, 7]] * 3}, "start": float("nan"), "lock": "never"},
]


@pytest.mark.parametrize("lie", LIES)
def test_a_peer_that_lies_ends_no_doctor(root, lie, monkeypatch):
    """
    Whatever the other one answers in each step, the doctor ends and reports something printable.
    """
    limits = exchange.ExchangeLimits(rounds=3, silence=0.1, visibility=0.2, heartbeats=0.1)
    answers = iter(range(10**6))

    def hear(pair: exchange.Exchange) -> Message:
        return Message(
            to=pair._own.name, step=pair._step, written=float(next(answers)), seen=1e10, payload=json.dumps(lie)
        )

    monkeypatch.setattr(exchange.Exchange, "_receive", hear)
    # The other one is the first by its name, and so the one that proposes when to begin.
    writer, own, other = VolumeWriter(root), new_directory(), layout.DOCTOR / "000000000001-0123456789abcdef"
    writer.make_directory(other)
    writer.make_directory(own)
    with open_scratch(writer, own) as scratch:
        report = exchange.Exchange(writer, scratch, own, other, HELLO, HELLO, limits).run()
    diagnosis = attrs.evolve(WELL, peer=report)

    assert report.is_done
    assert all(
        line.isprintable()
        for line in format_diagnosis(attrs.evolve(diagnosis, findings=tuple(judge(diagnosis, expects_peer=True))))
    )
    json.dumps(attrs.asdict(report), allow_nan=False)


def test_a_peer_that_dies_is_reported(root):
    """
    When the other one is killed in the middle of the tests, this one says how far they came, and leaves nothing.
    """
    results = actors.context().Queue()
    survivor, victim = (actors.start(nodes.examine, str(root), "here", results) for _ in range(2))
    until(lambda: list((root / ".kserve-pvc" / "doctor").glob("*/race")))
    victim.kill()
    diagnosis = results.get(timeout=60)
    actors.run_all([survivor])
    sweep(VolumeWriter(root))

    assert found(diagnosis)["peer-lost"] == "change"
    assert (diagnosis.ok, diagnosis.peer.step in ("names", "races", "locks", "beats")) == (False, True)
    assert left(root) == []


def test_a_clock_that_is_wrong_is_found_and_harms_nothing(root):
    """
    Two doctors whose clocks differ by two hours still do every test, and each tells the difference with its sign.
    """
    here_, there = nodes.examine_together([root, root], clock_ahead=7200.0)

    assert [found(diagnosis)["clock-of-peer"] for diagnosis in (here_, there)] == ["change", "change"]
    assert (here_.peer.is_done, there.peer.is_done) == (True, True)
    assert abs(here_.peer.clock_ahead - 7200) < 5
    assert abs(there.peer.clock_ahead + 7200) < 5
    assert found(there)["clock-of-volume"] == "change"
    assert left(root) == []


@pytest.fixture(scope="module")
def volume(request: pytest.FixtureRequest) -> Iterator[SharedVolume]:
    """
    A volume with two mounts; skipped by name where it cannot be started.
    """
    if request.param not in NETWORK:
        pytest.skip(f"`{MOUNTS}` names mounts for this test, or leaves those of the other ones to be started")
    try:
        with NETWORK[request.param](2) as running:
            yield running
    except CannotStartError as reason:
        pytest.skip(f"{request.param}: {reason}")


@pytest.fixture
def roots(volume: SharedVolume) -> Sequence[Path]:
    """
    An empty directory on the volume, as each node sees it.
    """
    return fresh_root(volume)


@pytest.mark.parametrize("volume", ["mounted"], indirect=True, scope="module")
def test_a_volume_of_the_users_is_examined_by_both_nodes(roots):
    """
    Two doctors on the mounts that `KSERVE_PVC_TEST_MOUNTS` names go through all tests, and find what the store relies
    on.
    """
    pair = nodes.examine_together(roots)

    for diagnosis in pair:
        print(*format_diagnosis(diagnosis), sep="\n")
        assert (diagnosis.peer.is_done, diagnosis.peer.races["mkdir"].both_won, diagnosis.profile.obstacles) == (
            True,
            0,
            (),
        )
        assert None not in (diagnosis.peer.listed_after, diagnosis.peer.heartbeat_after)
    sweep(
        VolumeWriter(roots[0])
    )  # While an NFS server recovers, a lock that hangs keeps its file open until the process has ended.
    assert os.listdir(roots[0] / ".kserve-pvc" / "doctor") == []


@pytest.mark.parametrize("volume", ["juicefs"], indirect=True, scope="module")
def test_honest_locks_are_found_honest(roots):
    """
    On two JuiceFS mounts all locks exclude, no name has two winners, and only the made-up size is to be changed.
    """
    ModelStore(roots[0], mode="rw", locker="flock")

    pair = nodes.examine_together(roots)

    for diagnosis in pair:
        assert [[test.verdict for test in tests] for tests in diagnosis.peer.locks.values()] == [["excludes"] * 2] * 2
        assert [race.both_won for race in diagnosis.peer.races.values()] == [0] * 4
        assert [what for what, level in found(diagnosis).items() if level != "note"] == ["free-space-implausible"]
        assert (diagnosis.peer.is_done, diagnosis.peer.same_mount, diagnosis.peer.listed_after is None) == (
            True,
            False,
            False,
        )
        assert 0.3 < diagnosis.peer.heartbeat_after < 10
    assert os.listdir(roots[0] / ".kserve-pvc" / "doctor") == []


@pytest.mark.parametrize("volume", ["seaweedfs"], indirect=True, scope="module")
def test_lying_locks_are_found_to_lie(roots):
    """
    On two SeaweedFS mounts `flock` is found to lie, each name with two winners is told, and only `mkdir` had none.
    """
    ModelStore(roots[0], mode="rw", locker="flock")

    pair = nodes.examine_together(roots)

    for diagnosis in pair:
        assert found(diagnosis)["flock-not-exclusive"] == "unsafe"
        assert {test.verdict for tests in diagnosis.peer.locks.values() for test in tests} == {"not exclusive"}
        won = {what: race.both_won for what, race in diagnosis.peer.races.items()}
        assert won["mkdir"] == 0
        assert {what for what in won if f"{what}-not-exclusive" in found(diagnosis)} == {
            what for what in won if won[what]
        }
        assert not diagnosis.ok
    assert pair[0].peer.races["create"].both_won == pair[1].peer.races["create"].both_won
    assert os.listdir(roots[0] / ".kserve-pvc" / "doctor") == []


def test_a_name_with_two_winners_is_counted(root):
    """
    What both did is put together by round: who won, and whether the two calls overlapped on one clock.
    """
    writer, own, other = VolumeWriter(root), new_directory(), new_directory()
    with open_scratch(writer, own) as scratch:
        pair = exchange.Exchange(writer, scratch, own, other, HELLO, HELLO, exchange.ExchangeLimits())
        pair._clock_ahead = 100.0
        mine = [[1.0, 2.0, 1.0], [3.0, 4.0, 1.0], [5.0, 6.0, 0.0], [7.0, 8.0, 0.0]]
        theirs = [[101.5, 102.5, 1.0], [104.5, 105.5, 1.0], [105.5, 105.6, 0.0], [109.0, 110.0, 1.0]]

        judged = pair._judge(mine, theirs), pair._judge(mine, None)

    assert judged[0] == Race(rounds=4, contested=2, both_won=2, neither_won=1, supported=True)
    assert judged[1] == Race(rounds=0, contested=0, both_won=0, neither_won=0, supported=False)


def race(both_won: int, contested: int = 20) -> dict[str, Race]:
    return {"mkdir": Race(rounds=40, contested=contested, both_won=both_won, neither_won=0, supported=True)}


def nfs(*options: str) -> Profile:
    return attrs.evolve(PROFILE, type="nfs4", options=options)


LYING = {
    "flock": [
        LockTest(held="granted", second="refused", after_release="granted"),
        LockTest(held="granted", second="granted", after_release=None),
    ]
}


@pytest.mark.parametrize(
    ("change", "what", "level"),
    [
        ({"profile": attrs.evolve(PROFILE, mkdir="replaces")}, "unusable", "unsafe"),
        ({"profile": attrs.evolve(PROFILE, link="unsupported")}, "no-hard-links", "note"),
        ({"profile": attrs.evolve(PROFILE, folds_case=True)}, "folds-names", "note"),
        ({"profile": attrs.evolve(PROFILE, keeps_names=False)}, "changes-names", "note"),
        ({"profile": attrs.evolve(PROFILE, name_bytes=143)}, "short-names", "note"),
        ({"profile": attrs.evolve(PROFILE, syncs_directories=False)}, "directories-not-synced", "note"),
        ({"profile": attrs.evolve(PROFILE, flock="hangs")}, "locks-hang", "note"),
        ({"profile": attrs.evolve(PROFILE, type="overlay")}, "no-volume", "change"),
        ({"profile": attrs.evolve(PROFILE, type="tmpfs")}, "memory", "note"),
        ({"profile": nfs("soft", "actimeo=1")}, "nfs-soft", "change"),
        ({"profile": nfs("hard")}, "slow-removal", "note"),
        ({"profile": nfs("nolock", "noac"), "locker": "flock"}, "flock-not-exclusive", "unsafe"),
        ({"profile": nfs("noac"), "locker": "flock", "peer": None}, "flock-unproven", "change"),
        (
            {"profile": attrs.evolve(PROFILE, type="cifs", options=("nobrl",)), "locker": "flock"},
            "flock-not-exclusive",
            "unsafe",
        ),
        ({"profile": attrs.evolve(PROFILE, type="cifs", options=("cache=loose",))}, "smb-loose-cache", "unsafe"),
        ({"uid": 0, "mode": 0o755}, "only-root-writes", "note"),
        ({"total_bytes": 1 << 50}, "free-space-implausible", "change"),
        ({"speed": attrs.evolve(WELL.speed, free_dropped_bytes=0)}, "free-space-lags", "note"),
        ({"clock_ahead": -3600.0}, "clock-of-volume", "change"),
        ({"peer": attrs.evolve(PEER, clock_ahead=3600.0)}, "clock-of-peer", "change"),
        ({"peer": attrs.evolve(PEER, step="races")}, "peer-lost", "change"),
        ({"peer": attrs.evolve(PEER, same_mount=True)}, "peer-on-same-mount", "note"),
        ({"peer": attrs.evolve(PEER, races=race(1))}, "mkdir-not-exclusive", "unsafe"),
        ({"peer": attrs.evolve(PEER, races=race(0, contested=0))}, "mkdir-not-contested", "note"),
        ({"peer": attrs.evolve(PEER, locks=LYING)}, "flock-not-exclusive", "note"),
        ({"peer": attrs.evolve(PEER, locks=LYING), "locker": "flock"}, "flock-not-exclusive", "unsafe"),
        ({"peer": attrs.evolve(PEER, locks={}), "locker": "flock"}, "flock-unproven", "change"),
        ({"peer": attrs.evolve(PEER, listed_after=None)}, "not-listed", "unsafe"),
        ({"peer": attrs.evolve(PEER, found_after=29.0)}, "hidden-name", "note"),
        ({"peer": attrs.evolve(PEER, replaced_after=None)}, "stale-content", "note"),
        ({"peer": attrs.evolve(PEER, heartbeat_after=None)}, "heartbeats-not-seen", "unsafe"),
        ({"peer": attrs.evolve(PEER, heartbeat_after=25.0)}, "heartbeats-not-seen", "change"),
    ],
)
def test_each_flaw_is_its_own_finding(change, what, level):
    """
    A diagnosis that is well but for one thing has just the finding that names it, with its level and a hint.
    """
    (finding,) = judge(attrs.evolve(WELL, **change), expects_peer=False)

    assert (finding.what, finding.level) == (what, level)
    assert all((finding.measured, finding.rule, finding.hint))


def test_what_is_well_has_no_finding():
    """
    Nothing is said about a volume with which nothing is wrong.
    """
    assert list(judge(WELL, expects_peer=True)) == []
    assert WELL.ok
    assert list(format_diagnosis(WELL))[-1] == "no changes needed"


def test_what_others_say_is_printed_harmlessly():
    """
    A peer's name with control characters is shown escaped, on one line.
    """
    lines = list(format_diagnosis(attrs.evolve(WELL, peer=attrs.evolve(PEER, name="pod \x1b[2J\nok\u202e"))))

    assert all(line.isprintable() for line in lines)
    assert PurePosixPath("/mnt/models").as_posix() in lines[0]


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o2777, 0o702])
def test_a_root_that_everyone_can_write_to_is_to_be_changed(mode):
    """
    Whoever may write can replace models and records, so the mode is reported, with or without a sticky bit.
    """
    findings = {f.what: f.level for f in judge(attrs.evolve(WELL, mode=mode), expects_peer=True)}

    assert findings["world-writable"] == "change"


def test_a_root_of_another_user_is_noted():
    """
    The owner of a directory can replace what is in it; root and this process's own user are not worth a line.
    """
    whats = [
        {f.what for f in judge(attrs.evolve(WELL, owner_uid=uid), expects_peer=True)} for uid in (0, WELL.uid, 4711)
    ]

    assert ["owned-by-another-user" in what for what in whats] == [False, False, True]


def test_the_mode_of_a_root_is_examined(root):
    """
    A directory as an `emptyDir` is made, which every user can write to, is found so by `doctor`.
    """
    root.chmod(0o777)

    assert found(examine(root, writes=False))["world-writable"] == "change"
