"""
Hearts, file locks, and who is provably dead.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import attrs
import pytest

from kserve_pvc._format.layout import claim_dir
from kserve_pvc._format.records import Beat, decode
from kserve_pvc._keys.claims import (
    break_claim,
    find_live_downloader,
    newest_epoch,
    read_claim,
    start_heartbeat,
    take_claim,
)
from kserve_pvc._volume.writing import VolumeWriter
from kserve_pvc.locks import liveness
from kserve_pvc.locks.external import ExternalLock
from kserve_pvc.locks.flock import grab_file
from kserve_pvc.locks.lease import RENEW_DEADLINE, Heartbeat, LeaseLostError
from kserve_pvc.locks.liveness import here, is_provably_dead

KEY = "model-0123456789abcdef"


@pytest.fixture
def beat_file(tmp_path):
    return tmp_path / "beat"


def heart(path: Path, **arguments) -> Heartbeat:
    return Heartbeat(os.open(path, os.O_RDWR | os.O_CREAT), **{"lease_seconds": 0.6, **arguments})


def file_lock(open_file: Callable[[], int], timeout: float = 1.0) -> ExternalLock:
    return ExternalLock(partial(grab_file, open_file), timeout=timeout)


def read_beat(path: Path) -> Beat:
    return decode(Beat, path.read_bytes(), "beat")


def check_for_ever(beating: Heartbeat) -> None:
    while True:
        beating.check()
        time.sleep(0.01)


def test_a_heart_beats_and_says_goodbye(beat_file):
    """
    The count rises, progress travels with it, and stopping releases.
    """
    beating = heart(beat_file, progress=lambda: (1, 2, 3))
    first = read_beat(beat_file)
    while read_beat(beat_file).count == first.count:
        beating.check()
    beating.stop()
    last = read_beat(beat_file)

    assert (first.released, last.released) == (False, True)
    assert last.count > first.count
    assert (last.bytes_done, last.bytes_total, last.bytes_per_second) == (1, 2, 3)


def test_a_heart_that_is_superseded_reports_it(beat_file):
    """
    Once somebody has a higher number the holder is told, and the claim is given back.
    """
    beating = heart(beat_file, superseded=lambda: True)
    while not read_beat(beat_file).released:
        time.sleep(0.01)

    with pytest.raises(LeaseLostError):
        beating.check()
    beating.stop()


def test_a_hanging_volume_does_not_hang_the_check(beat_file):
    """
    When a beat does not come back the holder gives up by its own clock, before an observer would.
    """
    blocked = threading.Event()
    beating = heart(beat_file, superseded=lambda: blocked.wait(10))
    started = time.monotonic()
    with pytest.raises(LeaseLostError):
        check_for_ever(beating)
    took = time.monotonic() - started
    blocked.set()
    beating.stop()

    assert took >= 0.6 * RENEW_DEADLINE - 0.1
    assert RENEW_DEADLINE < 1


def test_a_lock_excludes_and_is_given_back(tmp_path):
    """
    A second lock on the file is refused until the first is released; the file stays.
    """
    path = tmp_path / "lock"
    first, second = (file_lock(lambda: os.open(path, os.O_RDWR | os.O_CREAT)) for _ in range(2))

    assert [first.try_acquire(), first.try_acquire(), second.try_acquire()] == [True, True, False]
    first.release()
    assert second.try_acquire()
    second.release()
    assert path.exists()


def test_a_lock_of_a_killed_process_is_free(tmp_path):
    """
    The kernel gives the lock back when its holder dies.
    """
    path = tmp_path / "lock"
    script = (
        f"import fcntl, time; f = open({str(path)!r}, 'w'); fcntl.flock(f, "
        "fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        lock = file_lock(lambda: os.open(path, os.O_RDWR))
        refused = lock.try_acquire()
        holder.kill()
        holder.wait()

    assert not refused
    assert lock.try_acquire()
    lock.release()


def test_a_lock_call_that_hangs_is_not_waited_for(tmp_path, monkeypatch):
    """
    An attempt that has not returned by the timeout counts as a held lock, and a lock that it gets later is released.
    """
    import portalocker

    path, go_on = tmp_path / "lock", threading.Event()
    honest = portalocker.lock

    def lock(fd, flags):
        go_on.wait(30)
        honest(fd, flags)

    monkeypatch.setattr(portalocker, "lock", lock)
    hanging = file_lock(lambda: os.open(path, os.O_RDWR | os.O_CREAT), 0.05)
    tried = hanging.try_acquire()
    hanging.release()
    go_on.set()
    hanging._attempt.join()
    other = file_lock(lambda: os.open(path, os.O_RDWR), 5)

    assert (tried, other.try_acquire()) == (False, True)
    other.release()


def test_without_lock_support_there_is_no_lock(tmp_path, monkeypatch):
    """
    A volume that answers ENOLCK has no lock, which is neither granted nor refused.
    """
    import portalocker

    def lock(fd, flags):
        raise portalocker.LockException("No locks available")

    monkeypatch.setattr(portalocker, "lock", lock)

    assert file_lock(lambda: os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)).try_acquire() is None


def test_an_error_of_the_lock_file_reaches_the_caller(tmp_path):
    """
    A lock file that cannot be opened is an error, not a lock that is taken.
    """
    with pytest.raises(FileNotFoundError):
        file_lock(lambda: os.open(tmp_path / "missing" / "lock", os.O_RDWR)).try_acquire()


def test_this_process_is_not_dead_and_a_finished_one_is():
    """
    Death is proved by PID and start time within one PID namespace.
    """
    me = here("server-1", "node-1")
    finished = subprocess.Popen([sys.executable, "-c", ""])
    finished.wait()

    assert (me.pod, me.node, me.uid, me.pid) == ("server-1", "node-1", os.geteuid(), os.getpid())
    assert not is_provably_dead(me)
    assert is_provably_dead(attrs.evolve(me, pid=finished.pid))
    assert is_provably_dead(attrs.evolve(me, started=me.started - 1))


HIDDEN = """
import os, sys
from kserve_pvc.locks import liveness
import attrs, json
os.setgroups([]); os.setgid(1001); os.setuid(1001)
me = liveness.here()
other = attrs.evolve(me, pid=int(sys.argv[1]), started=int(sys.argv[2]))
gone = attrs.evolve(me, pid=int(sys.argv[3]))
print(os.path.exists(f"/proc/{other.pid}/stat"), *map(liveness.is_provably_dead, (me, other, gone)))
"""


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize("hidepid", ["1", "2", "4"])
def test_a_process_that_is_hidden_is_not_dead(tool, hidepid):
    """
    Where `/proc` shows a process only its own user's, others are unknown; those that are gone are dead all the same.
    """
    tool("unshare")
    finished = subprocess.Popen([sys.executable, "-c", ""])
    finished.wait()
    script = f'mount -o remount,hidepid={hidepid} /proc 2>/dev/null || exit 77; exec "$@"'
    arguments = [str(os.getpid()), str(here().started), str(finished.pid)]
    command = ["unshare", "-m", "sh", "-c", script, "sh", sys.executable, "-I", "-c", HIDDEN, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if result.returncode == 77:
        pytest.skip("`/proc` cannot be mounted with `hidepid` here")

    assert result.stdout.split()[1:] == ["False", "False", "True"], result.stderr
    assert hidepid == "1" or result.stdout.startswith("False")


def test_a_process_that_did_not_know_its_start_is_judged_by_its_number():
    """
    A start time of 0 was written where `/proc` could not be read, and differs from every other one.
    """
    assert not is_provably_dead(attrs.evolve(here(), started=0))


@pytest.mark.parametrize("pid", [0, -1, -4711, 2**40])
def test_numbers_that_are_no_process_prove_nothing(pid):
    """
    A forged number is no proof of death, and never a signal to several processes.
    """
    assert not is_provably_dead(attrs.evolve(here(), pid=pid))


def test_a_forked_child_leaves_the_lock_and_the_lease_of_its_parent(tmp_path, beat_file):
    """
    Releasing in a child that was forked does nothing, and its check fails: both are its parent's.
    """
    path = tmp_path / "lock"
    lock, beating = file_lock(lambda: os.open(path, os.O_RDWR | os.O_CREAT)), heart(beat_file, lease_seconds=60)
    assert lock.try_acquire()
    child = os.fork()
    if child == 0:
        lock.release()
        beating.stop()
        try:
            beating.check()
        except LeaseLostError:
            os._exit(42)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    other = file_lock(lambda: os.open(path, os.O_RDWR))

    assert os.waitstatus_to_exitcode(status) == 42
    assert (other.try_acquire(), read_beat(beat_file).released) == (False, False)
    beating.check()
    beating.stop()
    lock.release()
    assert other.try_acquire()
    other.release()


@pytest.mark.parametrize("field", ["boot_id", "pid_namespace"])
def test_nothing_is_known_about_other_nodes_and_namespaces(field):
    """
    A PID of another node or container proves nothing, whether or not it exists here.
    """
    other = attrs.evolve(here(), started=1, **{field: "elsewhere"})

    assert not is_provably_dead(other)
    assert not is_provably_dead(attrs.evolve(other, boot_id=""))


def test_a_claim_is_taken_once_and_read_back(root):
    """
    A number can be claimed once, and whoever looks sees who has it and how far it is.
    """
    writer, me = VolumeWriter(root), here()

    claim = take_claim(writer, KEY, 1, uri="s3://b/m", holder=me)
    beating = start_heartbeat(writer, claim_dir(KEY, 1), lease_seconds=5, progress=lambda: (7, 9, 1))
    sign = read_claim(writer, KEY)
    beating.stop()

    assert claim is not None
    assert sign is not None
    assert take_claim(writer, KEY, 1, uri="s3://b/m", holder=me) is None
    assert (sign.owner, sign.is_released, sign.is_dead) == (claim, False, False)
    assert sign.beat is not None
    assert (sign.beat.bytes_done, sign.beat.bytes_total) == (7, 9)
    assert (released := read_claim(writer, KEY)) is not None
    assert released.is_released


CONTAINER = """
import os, sys, time
from kserve_pvc._format.layout import claim_dir
from kserve_pvc._keys.claims import start_heartbeat, take_claim
from kserve_pvc._volume.writing import VolumeWriter
from kserve_pvc.locks.liveness import here
writer, key = VolumeWriter(sys.argv[1]), sys.argv[2]
take_claim(writer, key, 1, uri="s3://b/m", holder=here())
start_heartbeat(writer, claim_dir(key, 1), lease_seconds=60)
print("claimed", flush=True)
time.sleep(60)
"""


@pytest.fixture
def container(tool, root, request):
    """
    A process that holds the claim in a PID namespace of its own, as another container of this node would.
    """
    command = [tool("unshare"), "--pid", "--fork", "--kill-child", sys.executable, "-I", "-c", CONTAINER]
    with subprocess.Popen([*command, str(root), KEY], stdout=subprocess.PIPE) as process:
        if process.stdout.readline() != b"claimed\n":
            pytest.skip("a PID namespace cannot be made here")
        yield process
        process.kill()


def test_a_container_that_was_killed_is_dead_for_the_one_after_it(root, container):
    """
    The kernel shows it, whatever numbers processes have there: at once, and not after a lease.
    """
    writer = VolumeWriter(root)
    alive = read_claim(writer, KEY)
    assert alive is not None
    assert alive.owner is not None
    assert alive.owner.holder.pid_namespace != here().pid_namespace
    assert not alive.is_dead
    began = time.monotonic()

    container.kill()
    container.wait()
    while not (sign := read_claim(writer, KEY)).is_dead and time.monotonic() - began < 10:
        time.sleep(0.01)

    assert sign.is_dead
    assert not sign.is_released
    assert find_live_downloader(writer, KEY, lease_seconds=60) is None
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("missing", ["held", "kernel", "local"])
def test_what_no_kernel_vouches_for_is_not_dead(root, container, monkeypatch, missing):
    """
    A holder that has locked nothing, or is on another node or a network volume, is watched for a lease.
    """
    place = root / claim_dir(KEY, 1)
    container.kill()
    container.wait()
    if missing == "held":
        (place / "held").unlink()
    elif missing == "kernel":
        monkeypatch.setattr(liveness, "_boot_id", lambda: "another")
    else:
        monkeypatch.setattr(VolumeWriter, "is_local", False)
        take_claim(VolumeWriter(root), KEY, 2, uri="s3://b/m", holder=here())
        start_heartbeat(VolumeWriter(root), claim_dir(KEY, 2), lease_seconds=60).stop()
        assert not (root / claim_dir(KEY, 2) / "held").exists()
        return

    assert not read_claim(VolumeWriter(root), KEY).is_dead


def test_a_sign_of_life_is_the_content_of_a_heartbeat(root):
    """
    A heartbeat that was rewritten with the same size and times is a sign of life; one with other times, modes and names
    is none. Network volumes serve the status of a file from a cache.
    """
    writer = VolumeWriter(root)
    take_claim(writer, KEY, 1, uri="s3://b/m", holder=here())
    beating = start_heartbeat(writer, claim_dir(KEY, 1), lease_seconds=60)
    beat = root / claim_dir(KEY, 1) / "beat"
    before, found = read_claim(writer, KEY), beat.stat()

    os.utime(beat, ns=(1, 2))
    beat.chmod(0o600)
    (root / "another name").hardlink_to(beat)
    touched = read_claim(writer, KEY)
    content = beat.read_bytes()
    with beat.open("r+b") as file:
        file.write(content.replace(b'"count":1', b'"count":2'))
    os.utime(beat, ns=(found.st_atime_ns, found.st_mtime_ns))
    rewritten = read_claim(writer, KEY)
    beating.stop()

    assert before is not None
    assert touched is not None
    assert rewritten is not None
    assert touched.raw == before.raw
    assert rewritten.raw != before.raw


def test_breaking_a_claim_supersedes_and_releases(root):
    """
    After a break the newest claim is released, whatever the old one shows.
    """
    writer, me = VolumeWriter(root), here()
    take_claim(writer, KEY, 1, uri="s3://b/m", holder=me)

    break_claim(writer, KEY, uri="s3://b/m", holder=me, lease_seconds=1)

    assert newest_epoch(writer, KEY) == 2
    assert find_live_downloader(writer, KEY, lease_seconds=1) is None


def test_a_claim_that_could_not_be_written_is_given_back(root, monkeypatch):
    """
    When the volume fails right after the claim was won, nobody waits for its lease.
    """
    from kserve_pvc import VolumeError

    writer, honest = VolumeWriter(root), VolumeWriter.write_sign

    def write_sign(self, place, data):
        if place.name == "owner":
            raise VolumeError(str(place), "writing", "Input/output error")
        honest(self, place, data)

    monkeypatch.setattr(VolumeWriter, "write_sign", write_sign)
    with pytest.raises(VolumeError):
        take_claim(writer, KEY, 1, uri="s3://b/m", holder=here())

    sign = read_claim(writer, KEY)
    assert sign is not None
    assert sign.is_released


@pytest.mark.parametrize("debris", [b"", b"{}", b"x" * 10_000])
def test_debris_in_place_of_a_claim_shows_no_life(root, debris):
    """
    A claim that cannot be read is nobody's: it is superseded when its lease is over.
    """
    writer = VolumeWriter(root)
    writer.reserve(claim_dir(KEY, 3))
    for name in ("owner", "beat"):
        (root / claim_dir(KEY, 3) / name).write_bytes(debris)

    sign = read_claim(writer, KEY)

    assert sign is not None
    assert (sign.name, sign.holder, sign.is_released, sign.is_dead) == (
        "000000000003",
        "an unknown process",
        False,
        False,
    )
    assert find_live_downloader(writer, KEY, lease_seconds=0.2) is None


def test_a_file_is_locked_where_no_temporary_file_can_be_written(tmp_path):
    """
    Without a directory for temporary files, which portalocker wants at import, `flock` still excludes.
    """
    program = f"""
import os, tempfile
tempfile._candidate_tempdir_list = lambda: []
from kserve_pvc.locks.flock import grab_file
opened = lambda: os.open({str(tmp_path / "lock")!r}, os.O_RDWR | os.O_CREAT)
release = grab_file(opened)
held = grab_file(opened)
release()
print(callable(release), held, callable(grab_file(opened)), tempfile.tempdir)
"""

    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert result.stdout.split() == ["True", "None", "True", "None"]
