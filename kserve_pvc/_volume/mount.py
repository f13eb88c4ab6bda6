"""
The mount that a directory lies on, as the kernel describes it.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import attrs

# The kernel writes blanks and backslashes of mount points as octal escapes.
_OCTAL = re.compile(r"\\([0-7]{3})")
_NETWORK_TYPES = (
    "nfs",
    "cifs",
    "smb",
    "fuse",
    "ceph",
    "lustre",
    "glusterfs",
    "gpfs",
    "9p",
    "virtiofs",
    "beegfs",
    "afs",
)
# Where no other node sees what is written, and `fsync` is for the medium only.
LOCAL_TYPES = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "tmpfs", "overlay"})


@attrs.frozen(kw_only=True)
class Mount:
    """
    The mount that a path lies on, as the kernel describes it.

    `visibility_delay` is the number of seconds after which a change made on one node is seen on all others.
    """

    type: str
    options: tuple[str, ...]

    @property
    def is_network(self) -> bool:
        return self.type.startswith(_NETWORK_TYPES)

    @property
    def visibility_delay(self) -> float:
        if not self.is_network:
            return 0.0
        if self.type.startswith("nfs"):
            # nfs(5): attributes of directories are cached for up to acdirmax seconds, 60 by default.
            return 0.0 if "noac" in self.options else 2 * self._seconds("acdirmax", self._seconds("actimeo", 60.0))
        if self.type.startswith(("cifs", "smb")):
            return 2 * self._seconds("acdirmax", self._seconds("actimeo", 1.0))
        return 2.0

    def _seconds(self, option: str, default: float) -> float:
        for text in self.options:
            name, _, value = text.partition("=")
            if name == option and value.isdigit():
                return float(value)
        return default


def mount_of(path: Path) -> Mount:
    """
    Find the mount that a path lies on. An unknown one counts as a network volume, which only makes waits longer.
    """
    best, found = "", Mount(type="fuse", options=())
    with suppress(OSError), open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        for line in table:
            left, _, right = line.rstrip("\n").partition(" - ")
            place = _OCTAL.sub(lambda match: chr(int(match[1], 8)), left.split()[4])
            # A later line covers an earlier one at the same place.
            if len(place) >= len(best) and (path == Path(place) or Path(place) in path.parents):
                kind, _, super_options = right.split(" ", 2)
                best, found = place, Mount(type=kind, options=(*left.split()[5].split(","), *super_options.split(",")))
    return found
