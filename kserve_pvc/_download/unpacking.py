"""
Replacing the archives of a download by their members.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import PurePosixPath

import attrs

from kserve_pvc._archive.members import PIECE_BYTES, Member
from kserve_pvc._archive.unpack import unpack
from kserve_pvc._format.records import FileEntry
from kserve_pvc._source.contract import RemoteFile
from kserve_pvc._source.ref import ModelRef
from kserve_pvc._volume.calls import write_all
from kserve_pvc._volume.tree import Tree
from kserve_pvc._volume.writing import VolumeWriter
from kserve_pvc.errors import SourceNotFoundError, StoreError

# A member of an archive from this size on is made durable at once.
_LARGE_BYTES = 8 * 1024 * 1024


@attrs.frozen(kw_only=True)
class Unpacking:
    """
    The members of archives on their way into a generation.

    Args:
        place: The directory of the generation.
        digest: `sha256`, or `none` to compute no digests.
        make_room: Raises if so many bytes do not fit.
        check: Raises if the call is over or the claim is lost.
    """

    writer: VolumeWriter
    tree: Tree
    place: PurePosixPath
    ref: ModelRef
    digest: str
    make_room: Callable[[int], None]
    check: Callable[[], None]

    def run(self, files: Iterable[RemoteFile], done: Mapping[PurePosixPath, FileEntry]) -> tuple[FileEntry, ...]:
        """
        Unpack every archive, and return the files of the model.

        Args:
            done: Every file as it was written.
        """
        found: list[FileEntry] = []
        for file in files:
            if file.unpack is None:
                found.append(done[file.entry.path])
                continue
            found += self._unpack(file)
            self.tree.remove(file.entry.path)
        if not found:
            raise SourceNotFoundError(str(self.ref), "the archive holds no file, or the patterns let none through")
        return tuple(sorted(found, key=lambda f: str(f.path).replace("/", "\0")))

    def _unpack(self, archive: RemoteFile) -> Sequence[FileEntry]:
        assert archive.unpack is not None  # `run` has checked it.
        path = archive.entry.path
        ref = self.ref
        if ref.allow_patterns is not None and ref.selects(path):
            # They have selected the archive, and so all that is in it.
            ref = attrs.evolve(ref, allow_patterns=None)
        try:
            # Checked whenever the archive is read, since not all of it becomes bytes of a file.
            with self.writer.open_file(self.place / path) as fd, io.BufferedReader(_Checked(fd, self.check)) as stream:
                members = unpack(stream, str(path), archive.unpack, selects=ref.selects, make_room=self.make_room)
                return [self._write(member) for member in members]
        except StoreError:
            self.check()  # What ends the call inside of a decompressor comes out as damage.
            raise
        except OSError as error:
            raise self.writer.failure("unpacking", self.place / path, error) from error

    def _write(self, member: Member) -> FileEntry:
        hashed = sha256() if self.digest == "sha256" else None
        size = 0
        fd = self.tree.create(member.path)
        try:
            for piece in member.pieces if member.copy_of is None else self._read(member.copy_of):
                self.check()
                if hashed is not None:
                    hashed.update(piece)
                write_all(fd, piece, size)
                size += len(piece)
        except BaseException:
            with suppress(OSError):
                os.close(fd)
            raise
        self.tree.finish(fd, member.path, size >= _LARGE_BYTES, member.is_executable)
        digest = None if hashed is None else hashed.hexdigest()
        return FileEntry(
            path=member.path,
            size_bytes=size,
            sha256=digest,
            evidence=member.evidence,
            executable=member.is_executable,
        )

    def _read(self, path: PurePosixPath) -> Iterator[bytes]:
        """Read a member that was written before."""
        with self.writer.open_file(self.place / path) as fd, open(fd, "rb", closefd=False) as stream:
            while piece := stream.read(PIECE_BYTES):
                yield piece


class _Checked(io.FileIO):
    """
    An open file, where each read is preceded by a check that may end it by raising.
    """

    def __init__(self, fd: int, check: Callable[[], None]) -> None:
        super().__init__(fd, "rb", closefd=False)
        self._check = check

    def readinto(self, buffer: memoryview, /) -> int | None:  # type: ignore[override]  # Any buffer in `io`.
        self._check()
        return super().readinto(buffer)
