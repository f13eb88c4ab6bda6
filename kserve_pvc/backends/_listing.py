"""
Listing a directory of a mounted file system, with what links inside of it lead to.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import attrs

from kserve_pvc._format.file_names import check_name
from kserve_pvc._format.records import FileEntry
from kserve_pvc._source.contract import RemoteFile
from kserve_pvc._source.ref import ModelRef
from kserve_pvc._volume.beneath import follow_beneath, open_beneath, walk_beneath
from kserve_pvc.errors import UnsafePathError

LOST_AND_FOUND = "lost+found"
# A directory that links lead to is listed once for each, and links below it are followed too.
MAX_LINKS_TO_ONE = 16
MAX_LINK_LEVELS = 32
_REPOSITORY = re.compile(r"(?:models|datasets|spaces)--.+")
_WAY_OUT = (
    "links are followed only inside of the source: name a directory that holds the target too, "
    "copy the source with `cp -rL`, or leave the link out with `--ignore`"
)


def hub_repository(place: Path) -> Path | None:
    """
    Return the directory of the repository if a path is a snapshot in a cache of the Hugging Face Hub, or below one.

    In `models--<org>--<name>/snapshots/<commit>` every file is a link to `models--<org>--<name>/blobs`.
    """
    for above in place.parents:
        if above.parent.name == "snapshots" and _REPOSITORY.fullmatch(above.parent.parent.name):
            return above.parent.parent
    if place.parent.name == "snapshots" and _REPOSITORY.fullmatch(place.parent.parent.name):
        return place.parent.parent
    return None


@attrs.frozen
class Place:
    """
    What no link may lead out of.

    Args:
        fd: An open descriptor of it.
        path: Its path.
    """

    fd: int
    path: Path


def list_place(root: Place, place: Path, ref: ModelRef, name: str) -> Iterator[RemoteFile]:
    """
    List a file under a name, or a directory with everything below it that the patterns may select.

    Args:
        root: The place itself, or the repository that it is a snapshot of.

    Raises:
        UnsafePathError: Something that is chosen is not a regular file, or a link that cannot be followed.
        OSError: It cannot be listed.
    """
    listing = _Listing(root, PurePosixPath(place.relative_to(root.path)), ref)
    if place == root.path:
        real, found = PurePosixPath(), os.fstat(root.fd)
    else:
        real, found = listing.follow(listing.base, place)
    if stat.S_ISLNK(found.st_mode):
        hint = f"it is a link; name what it leads to, `file://{os.path.realpath(place)}`"
        raise UnsafePathError(str(place), hint)
    if stat.S_ISDIR(found.st_mode):
        yield from listing.walk(real, PurePosixPath(), ())
    else:
        yield listing.file(real, PurePosixPath(check_name(name)), found)


@attrs.define
class _Listing:
    """
    One listing. `real` is a path below the root without links, and `shown` the path in the model.
    """

    root: Place
    base: PurePosixPath
    ref: ModelRef
    links_to: Counter[PurePosixPath] = attrs.field(factory=Counter)

    def walk(self, real: PurePosixPath, shown: PurePosixPath, links: tuple[PurePosixPath, ...]) -> Iterator[RemoteFile]:
        """
        Args:
            links: The directories of the links that led here.
        """

        def enters(inside: PurePosixPath) -> bool:
            # `fsck` makes `lost+found` at the root of a volume, readable by root only; it is not part of a model.
            name = shown / inside
            return name != PurePosixPath(LOST_AND_FOUND) and self.ref.may_select_below(name.as_posix())

        fd = open_beneath(self.root.fd, str(real), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            for inside, found in walk_beneath(fd, enters=enters):
                name = shown / inside
                if stat.S_ISLNK(found.st_mode):
                    yield from self._linked(real / inside, name, links)
                elif self.ref.selects(name.as_posix()):
                    yield self.file(real / inside, check_name(name.as_posix()), found)
        finally:
            os.close(fd)

    def _linked(
        self, link: PurePosixPath, shown: PurePosixPath, links: tuple[PurePosixPath, ...]
    ) -> Iterator[RemoteFile]:
        name = shown.as_posix()
        if not (self.ref.selects(name) or self.ref.may_select_below(name)):
            return
        try:
            real, found = self.follow(link, self.root.path / link)
        except UnsafePathError:
            if self._needs(name):
                raise
            return
        if not stat.S_ISDIR(found.st_mode):
            if self.ref.selects(name):
                yield self.file(real, check_name(name), found)
            return
        if not self.ref.may_select_below(name):
            return
        links = (*links, link.parent)
        self.links_to[real] += 1
        if any(position.is_relative_to(real) for position in links):
            raise UnsafePathError(str(self.root.path / link), "it is a link to a directory that it lies in")
        if self.links_to[real] > MAX_LINKS_TO_ONE or len(links) > MAX_LINK_LEVELS:
            rule = (
                f"more than {MAX_LINKS_TO_ONE} links lead to one directory, "
                f"or links lie in each other deeper than {MAX_LINK_LEVELS} levels"
            )
            raise UnsafePathError(str(self.root.path / link), rule)
        yield from self.walk(real, shown, links)

    def _needs(self, name: str) -> bool:
        """Whether a link that cannot be followed would be missed, be it one to a file or to a directory."""
        is_ignored = not attrs.evolve(self.ref, allow_patterns=None).may_select_below(name)
        is_allowed = any(pattern.startswith(f"{name}/") for pattern in self.ref.allow_patterns or ())
        return not is_ignored and (is_allowed or self.ref.selects(name))

    def follow(self, link: PurePosixPath, path: Path) -> tuple[PurePosixPath, os.stat_result]:
        """
        Raises:
            UnsafePathError: The link leads out of the source, nowhere, or in a circle.
        """
        try:
            real, found = follow_beneath(self.root.fd, link, root=self.root.path)
        except OSError as error:
            rules = {
                errno.EXDEV: f"it is a link that leads out of `{self.root.path}`; {_WAY_OUT}",
                errno.ENOENT: "it is a link to nothing; leave it out with `--ignore`, or mend it",
                errno.ENOTDIR: "it is a link to nothing; leave it out with `--ignore`, or mend it",
                errno.ELOOP: "it is a link in a circle; leave it out with `--ignore`, or mend it",
            }
            is_missing = link == self.base and isinstance(error, FileNotFoundError | NotADirectoryError)
            if error.errno not in rules or is_missing:
                raise
            raise UnsafePathError(str(path), rules[error.errno]) from error
        if not (real.is_relative_to(self.base) or real.parts[:1] == ("blobs",)):
            raise UnsafePathError(str(path), f"it is a link that leads out of the snapshot; {_WAY_OUT}")
        return real, found

    def file(self, real: PurePosixPath, inside: PurePosixPath, found: os.stat_result) -> RemoteFile:
        path = self.root.path / real
        if not stat.S_ISREG(found.st_mode):
            raise UnsafePathError(str(path), "only regular files are copied; devices, pipes and sockets are refused")
        pin = token(found)
        # A single file is found in the directory that holds it.
        root = self.root.path if real.parts else self.root.path.parent
        return RemoteFile(
            entry=FileEntry(
                path=inside, size_bytes=found.st_size, token=pin, executable=bool(found.st_mode & stat.S_IXUSR)
            ),
            address=str(path),
            pin={"inode": pin, "root": str(root)},
        )


def token(found: os.stat_result) -> str:
    """
    Return what identifies the content of a file: compared, never interpreted.
    """
    # Programs can set the time of the content back, but not that of the inode.
    return f"{found.st_dev:x}-{found.st_ino:x}-{found.st_size:x}-{found.st_mtime_ns:x}-{found.st_ctime_ns:x}"
