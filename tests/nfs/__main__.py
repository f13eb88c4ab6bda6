"""
Run the tests of real volumes on NFS: a real server and two real clients, in a Linux kernel that runs as a process.

`python tests/nfs [--options vers=4.2] [--same-name] [ARGUMENTS OF PYTEST]`. The guest needs no rights of its own beyond
those to mount its image, and Debian's packages `user-mode-linux`, `nfs-kernel-server`, `nfs-common`, `rpcbind` and
`kmod`.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODULES = Path("/usr/lib/uml/modules")
DISK_BYTES = 1024**3
DOCTORS = "test_a_volume_of_the_users_is_examined_by_both_nodes"
PROGRAMS = ("linux.uml", "rpc.nfsd", "mount.nfs", "rpcbind", "modprobe", "mkfs.ext4")


def main() -> int:
    options, arguments = _parse()
    missing = [
        program for program in PROGRAMS if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None
    ]
    if missing:
        print(f"skipped: {', '.join(missing)} not installed", file=sys.stderr)
        return 0
    with tempfile.TemporaryDirectory(prefix="volume-nfs-") as place:
        stage = Path(place)
        _prepare(stage, options, arguments)
        _boot(stage, options.seconds)
        return _exit_code(stage)


def _parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--options", default="vers=4.2", help="of the mounts, such as vers=3,nolock")
    parser.add_argument("--same-name", action="store_true", help="both clients call themselves the same")
    parser.add_argument("--seconds", type=int, default=900, help="after which the guest is stopped")
    return parser.parse_known_args()


def _prepare(stage: Path, options: argparse.Namespace, arguments: list[str]) -> None:
    (stage / "lib").mkdir()
    (stage / "lib" / "modules").symlink_to(MODULES)
    with (stage / "disk").open("wb") as file:
        file.truncate(DISK_BYTES)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(stage / "disk")], check=True)
    tests = [str(HERE.parent / name) for name in ("test_real_volumes.py", f"test_doctor.py::{DOCTORS}")]
    command = [sys.executable, "-Im", "pytest", "--import-mode=importlib", "-p", "no:cacheprovider", *tests, *arguments]
    passed = {name: value for name, value in os.environ.items() if name.startswith("KSERVE_PVC_TEST_")}
    # The guest is several times slower than its host: with less, a holder that lives misses its own beats.
    exported = {
        "TMPDIR": "/run/tmp",
        "KSERVE_PVC_TEST_MOUNTS": "/mnt/node-0:/mnt/node-1",
        "KSERVE_PVC_TEST_LEASE_SECONDS": "6",
        **passed,
    }
    lines = [f"export {name}={shlex.quote(value)}" for name, value in exported.items()]
    lines += [f"NFS_OPTIONS={options.options}", f"SAME_NAME={'yes' if options.same_name else ''}"]
    lines += [f"PLACE={shlex.quote(str(HERE.parent.parent))}", f"COMMAND=({shlex.join(command)})"]
    (stage / "environment").write_text("\n".join(lines) + "\n")


def _boot(stage: Path, seconds: int) -> None:
    kernel = ["linux.uml", "mem=2048M", "rootfstype=hostfs", "rw", f"ubd0={stage}/disk", "init=/bin/bash", "quiet"]
    console = ["con=null", "con0=null,fd:1", f"umid={stage.name}", f"STAGE={stage}", "--", str(HERE / "guest.sh")]
    # A session of its own: the guest's processes are processes of this machine, and end together.
    guest = subprocess.Popen([*kernel, *console], stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        guest.wait(seconds)
    except subprocess.TimeoutExpired:
        print(f"the guest was stopped after {seconds} s", file=sys.stderr)
    finally:
        if guest.poll() is None:
            os.killpg(guest.pid, 9)
            guest.wait()


def _exit_code(stage: Path) -> int:
    try:
        return int((stage / "exit-code").read_text())
    except (OSError, ValueError):
        return 3


if __name__ == "__main__":
    sys.exit(main())
