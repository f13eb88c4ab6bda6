"""
`Scratch`: a private directory in which calls are tried, to learn what the volume does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath

from kserve_pvc._format.layout import DOCTOR, TRASH
from kserve_pvc._volume.calls import CREATE_FLAGS, DIRECTORY_FLAGS, rename_no_replace, write_all
from kserve_pvc._volume.reading import READ_FLAGS
from kserve_pvc._volume.writing import VolumeWriter
from kserve_pvc.errors import UnsafePathError


class Scratch:
    """
    One directory, open, for trying out single calls. They fail as on the volume, with a bare `OSError`.
    """

    def __init__(self, fd: int, file_mode: int) -> None:
        self.fd = fd
        self.file_mode = file_mode

    def make_directory(self, name: str) -> None:
        os.mkdir(name, 0o700, dir_fd=self.fd)

    def create(self, name: str) -> int:
        """Make a new file and return its descriptor, open for reading and writing."""
        return os.open(name, CREATE_FLAGS, self.file_mode, dir_fd=self.fd)

    def write(self, name: str, data: bytes) -> None:
        fd = self.create(name)
        try:
            write_all(fd, data, 0)
        finally:
            os.close(fd)

    def open(self, name: str, flags: int = 0) -> int:
        return os.open(name, READ_FLAGS | flags, dir_fd=self.fd)

    def open_shared(self, name: str) -> int:
        return os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, self.file_mode, dir_fd=self.fd)

    def link(self, name: str, new: str) -> None:
        os.link(name, new, src_dir_fd=self.fd, dst_dir_fd=self.fd, follow_symlinks=False)

    def replace(self, name: str, new: str) -> None:
        os.rename(name, new, src_dir_fd=self.fd, dst_dir_fd=self.fd)

    def move(self, name: str, new: str) -> None:
        """Rename where nothing is replaced: `renameat2` with RENAME_NOREPLACE."""
        rename_no_replace(self.fd, name, new)

    def remove(self, name: str) -> None:
        os.unlink(name, dir_fd=self.fd)

    def names(self) -> list[str]:
        # Opened again: through a descriptor Btrfs lists what was there when it was opened.
        fd = os.open(".", DIRECTORY_FLAGS, dir_fd=self.fd)
        try:
            return os.listdir(fd)
        finally:
            os.close(fd)

    def sync(self) -> None:
        os.fsync(self.fd)


@contextmanager
def open_scratch(writer: VolumeWriter, place: PurePosixPath) -> Iterator[Scratch]:
    """
    Open a directory for trying out what the volume can do, making it if need be; `delete_trash` removes it.

    Raises:
        UnsafePathError: The directory is neither in the trash nor a doctor's.
    """
    if not {TRASH, DOCTOR} & set(place.parents):
        raise UnsafePathError(str(place), "calls are tried out in the trash or by a doctor, and nowhere else")
    with writer.translated("trying out the volume", place):
        fd = writer.ensure_directory(place)
        try:
            yield Scratch(fd, writer.file_mode)
        finally:
            os.close(fd)
