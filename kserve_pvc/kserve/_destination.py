"""
The destination of a storage initializer: a directory from which a server reads its model, such as an `emptyDir`.

It may be a mount point, which has no siblings and cannot be renamed. So files are prepared in a hidden directory inside
of it, and renamed into place one by one. The record is written last: with it the model is complete, without it nothing
is trusted. Then the hidden directory is deleted. Only files named in an earlier record or list of intended files are
removed; foreign files stay.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import TypeVar

from kserve_pvc._format import layout
from kserve_pvc._format.codec import decode, encode
from kserve_pvc._format.records import MAX_MANIFEST_BYTES, FileEntry, Holder
from kserve_pvc._volume.calls import delete_tree, sync_directory
from kserve_pvc._volume.making import widen_new_file
from kserve_pvc._volume.reading import Volume
from kserve_pvc._volume.verify import sha256_of
from kserve_pvc._volume.writing import VolumeWriter
from kserve_pvc.errors import SettingsError, StoreFormatError, UnsafePathError, VolumeError
from kserve_pvc.kserve._contents import INTENDED, NEXT, OLD_RECORD, OURS, RECORD, WORK, Contents, Intended, Source
from kserve_pvc.kserve._exclusion import only_writer
from kserve_pvc.kserve._placing import Method, copy_file, place_by

_T = TypeVar("_T")


class Destination:
    """
    The directory itself, which is created if it is missing.

    Raises:
        SettingsError: It is a link, not a directory, or cannot be created.
    """

    def __init__(self, place: str | os.PathLike[str]) -> None:
        _make(Path(place))
        self._writer = VolumeWriter(place)
        # The server may run as any user.
        self._writer.file_mode = 0o644 | (self._writer.file_mode & 0o020)

    @property
    def root(self) -> Path:
        return self._writer.root

    def absolute(self, place: PurePosixPath) -> Path:
        """
        Return the path of something in the directory.
        """
        return self._writer.absolute(place)

    def record(self) -> Contents | None:
        """
        Return the record if the model is complete, or None.
        """
        contents = self._recorded()
        if contents is None:
            return None
        exists = self._is_linked if contents.is_linked else self._is_file
        return contents if all(map(exists, contents.files)) else None

    def _recorded(self) -> Contents | None:
        return self._read(Contents, RECORD) or self._read(Contents, OLD_RECORD)

    def served(self) -> Sequence[Source]:
        """
        Return the models that servers may be reading here, whether or not all of their files are there.

        While it is filled with others, these are the others, as servers may have been started with neither.
        """
        contents = self._recorded()
        if contents is not None:
            return contents.sources
        intended = self._read(Intended, INTENDED)
        return intended.sources if intended is not None and intended.is_served else ()

    def _is_file(self, file: FileEntry) -> bool:
        try:
            with self._writer.open_parent(file.path) as parent:
                found = os.stat(file.path.name, dir_fd=parent, follow_symlinks=False)
        except (OSError, UnsafePathError):
            return False
        return stat.S_ISREG(found.st_mode) and found.st_size == file.size_bytes

    def _is_linked(self, file: FileEntry) -> bool:
        try:
            found = os.stat(self.absolute(file.path))
        except OSError:
            return False
        return stat.S_ISREG(found.st_mode) and found.st_size == file.size_bytes

    def _read(self, cls: type[_T], place: PurePosixPath) -> _T | None:
        # A damaged record counts as missing: then all files are written again.
        try:
            data = self._writer.read(place, MAX_MANIFEST_BYTES)
            return None if data is None else decode(cls, data, str(self.absolute(place)))
        except StoreFormatError:
            return None

    @contextmanager
    def writing(
        self, holder: Holder, lease_seconds: float, *, is_done: Callable[[], bool] = lambda: False
    ) -> Iterator[Callable[[], None]]:
        """
        Lock the destination for writing. Afterwards, unless there was an error, only the record is left of our files.

        Args:
            is_done: Returns whether there is nothing to write. It is called before anything is created.

        Yields:
            A function to call before each visible change, which raises if the lock was lost.

        Raises:
            LockTimeoutError: Another live process is writing here.
        """
        with only_writer(self._writer, holder, lease_seconds, lambda: self.is_tidy and is_done()) as check:
            yield check
            check()
            self._tidy()

    @property
    def is_tidy(self) -> bool:
        """Whether there is no directory of an initializer, which a server could take for a model."""
        return OURS.name not in self._writer.list_names(PurePosixPath())

    def _tidy(self) -> None:
        contents = self._read(Contents, OLD_RECORD)
        if contents is not None and self._read(Contents, RECORD) is None:
            self._put(RECORD, encode(contents))
        for name in self._writer.list_names(OURS):
            if name != layout.META.name:  # It has the claims, of which each is deleted by its owner.
                self.delete(OURS / name)

    def fill(self, contents: Contents, place: Callable[[FileEntry], None], check: Callable[[], None]) -> None:
        """
        Put these files into the directory, and remove earlier files of an initializer. If it is interrupted, a second
        call completes it.

        Args:
            contents: The record of the complete directory.
            place: Puts one file into its place.
            check: Raises if the lock was lost.
        """
        paths = {file.path for file in contents.files}
        earlier = self._earlier_paths()
        check()
        self._declare(contents, paths | earlier)
        for path in sorted(earlier - paths, reverse=True):
            check()
            self._remove(path)
        with self._writer.translated("making directories", PurePosixPath()):
            self._make_directories(paths)
        for file in contents.files:
            check()
            place(file)
        with self._writer.translated("syncing", PurePosixPath()):
            # Those of removed files too: with the new record, no later call would know that these are an initializer's.
            self._sync_directories(paths | earlier)
        check()
        self._put(RECORD, encode(contents))

    def _make_directories(self, paths: Iterable[PurePosixPath]) -> None:
        """Make the directories durable before files are renamed into them, which would else be in neither place."""
        for directory in {path.parent for path in paths}:
            os.close(self._writer.ensure_directory(directory))
        self._sync_directories(paths)

    def make_work(self) -> Path:
        """
        Create the directory in which models are prepared, and return its path.
        """
        self._writer.make_directory(WORK)
        return self.absolute(WORK)

    def started_keys(self) -> set[str]:
        """
        Return the keys of the models that an earlier call started to prepare.
        """
        return set(self._writer.list_names(WORK / layout.KEYS))

    def _earlier_paths(self) -> set[PurePosixPath]:
        """Return every file that an earlier call has, or may have, put here."""
        record, intended = self._recorded(), self._read(Intended, INTENDED)
        recorded = {file.path for file in (record.files if record else ())}
        return recorded | {PurePosixPath(path) for path in (intended.paths if intended else ())}

    def _declare(self, contents: Contents, paths: Iterable[PurePosixPath]) -> None:
        # The intended files are written before the old record is deleted, so that no file is ever without an owner.
        names = tuple(map(str, sorted(paths)))
        self._put(INTENDED, encode(Intended(paths=names, sources=contents.sources, is_served=bool(self.served()))))
        for record in (OLD_RECORD, RECORD):
            self.delete(record)
            with self._writer.translated("syncing", record):
                self._sync_directory(record.parent)

    def _put(self, place: PurePosixPath, data: bytes) -> None:
        self.delete(NEXT)
        self._writer.write_private(NEXT, data)
        self._rename(NEXT, place)
        with self._writer.translated("syncing", place):
            for above in place.parents:  # The hidden directory may have been made just now.
                self._sync_directory(above)

    def delete(self, place: PurePosixPath) -> None:
        """
        Delete the record, or a file or a directory in the hidden directory, if it exists.
        """
        if place != RECORD and (place.parts[0] != OURS.name or len(place.parts) < 2):
            raise UnsafePathError(str(place), "only files of the initializer are deleted")
        with (
            self._writer.translated("deleting", place),
            suppress(FileNotFoundError),
            self._writer.open_parent(place) as parent,
        ):
            delete_tree(parent, place.name)

    def _remove(self, path: PurePosixPath) -> None:
        """Remove a file of an earlier call, and the directories that become empty."""
        with self._writer.translated("removing", path), suppress(FileNotFoundError, UnsafePathError):
            # A file that was not put there yet may have a directory already.
            with self._writer.open_parent(path) as parent, suppress(IsADirectoryError, FileNotFoundError):
                os.unlink(path.name, dir_fd=parent)
            for above in path.parents[:-1]:
                with self._writer.open_parent(above) as parent:
                    try:
                        os.rmdir(above.name, dir_fd=parent)
                    except OSError:
                        return

    def move(self, source: PurePosixPath, file: FileEntry) -> bool:
        """
        Rename a prepared file into its place.

        Returns:
            False if the file is neither in the hidden directory nor in its place.
        """
        try:
            if not self._is_readable_by_all(source):
                # It is copied, since the mode is set only of files that this call has created.
                self.delete(NEXT)
                copy_file(self._writer, self._writer, source, file, NEXT)
                self._rename(NEXT, file.path)
                return True
        except FileNotFoundError:
            return self._is_moved(file)
        self._rename(source, file.path)
        return True

    def _is_readable_by_all(self, source: PurePosixPath) -> bool:
        """Whether a prepared file has the mode of the destination, or can be given it without any doubt whose it is."""
        with self._writer.open_parent(source) as parent:
            others_write = os.fstat(parent).st_mode & 0o022
        with self._writer.open_file(source) as fd:
            found = os.fstat(fd)
            if found.st_mode & 0o444 == 0o444:
                return True
            if others_write or found.st_nlink > 1 or found.st_uid != os.geteuid():
                return False
            widen_new_file(fd, self._writer.file_mode | (found.st_mode & 0o100 and 0o111))
        return True

    def _is_moved(self, file: FileEntry) -> bool:
        try:
            with self._writer.open_file(file.path) as fd:
                return os.fstat(fd).st_size == file.size_bytes and (
                    file.sha256 is None or sha256_of(fd, file.size_bytes) == file.sha256
                )
        except (FileNotFoundError, UnsafePathError):
            return False

    def materialize(self, store: Volume, source: Path, file: FileEntry, methods: Iterable[Method]) -> Method:
        """
        Put a file of a store into its place, by the first method that the volumes support. No link is followed.

        Returns:
            The method.

        Raises:
            VolumeError: The volumes support none of them.
        """
        self.delete(NEXT)
        self._writer.make_directory(OURS)
        for method in methods:
            with self._writer.translated(f"creating a {method} of `{source}`", file.path):
                if place_by(method, self._writer, store, source, file, NEXT):
                    self._rename(NEXT, file.path)
                    return method
                self.delete(NEXT)
        tried = " or a ".join(methods)
        reason = (
            f"the volumes do not support a {tried} of `{source}`; choose another method by `KSERVE_PVC_MATERIALIZE`"
        )
        raise VolumeError(str(self.absolute(file.path)), "materializing", reason)

    def _rename(self, source: PurePosixPath, path: PurePosixPath) -> None:
        with self._writer.translated("renaming", path):
            fd = self._writer.ensure_directory(path.parent)
            try:
                with self._writer.open_parent(source) as parent:
                    _rename_into(parent, source.name, fd, path)
            finally:
                os.close(fd)

    def _sync_directories(self, paths: Iterable[PurePosixPath]) -> None:
        for directory in sorted({above for path in paths for above in path.parents}, reverse=True):
            with suppress(FileNotFoundError, UnsafePathError):  # It went with the last file in it.
                self._sync_directory(directory)

    def _sync_directory(self, place: PurePosixPath) -> None:
        fd = self._writer.open_directory(place)
        try:
            sync_directory(fd)
        finally:
            os.close(fd)


def _rename_into(source: int, name: str, target: int, path: PurePosixPath) -> None:
    try:
        os.rename(name, path.name, src_dir_fd=source, dst_dir_fd=target)
    except IsADirectoryError:
        try:
            os.rmdir(path.name, dir_fd=target)
        except OSError as error:
            raise UnsafePathError(str(path), "a directory with foreign files has this name; empty it") from error
        os.rename(name, path.name, src_dir_fd=source, dst_dir_fd=target)


def _make(place: Path) -> None:
    if place.is_symlink():
        raise SettingsError("DEST", str(place), "it is a link; give the path of the directory itself")
    try:
        place.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise SettingsError("DEST", str(place), "it is not a directory") from error
    except OSError as error:
        reason = os.strerror(error.errno or errno.EIO)
        hint = f"cannot create it: {reason}; mount a volume there that uid {os.geteuid()} may write to"
        raise SettingsError("DEST", str(place), hint) from error


@contextmanager
def temporary_directory() -> Iterator[str]:
    """
    Create a temporary directory, and delete it after an error only.
    """
    from shutil import rmtree
    from tempfile import mkdtemp

    place, owner = mkdtemp(prefix="kserve-pvc-"), os.getpid()
    try:
        yield place
    except BaseException:
        if os.getpid() == owner:  # And not a child that was forked inside.
            rmtree(place, ignore_errors=True)
        raise
