"""
Putting one file of a store into a destination: as a shared extent, a hard link, a copy or a symbolic link.

Files are opened from the roots of both volumes, so a link that somebody put on the way leads nowhere.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path, PurePosixPath
from typing import Literal

from kserve_pvc._format.records import FileEntry
from kserve_pvc._volume.calls import allocate, copy_range
from kserve_pvc._volume.making import widen_new_file
from kserve_pvc._volume.reading import Volume
from kserve_pvc._volume.verify import sha256_of
from kserve_pvc._volume.writing import VolumeWriter
from kserve_pvc.errors import UnsafePathError, VolumeError

Method = Literal["reflink", "link", "copy", "symlink"]

_CLONE = 0x40049409  # FICLONE
# The errors of a volume that does not support an operation, or not between these two directories.
_UNSUPPORTED = {
    *(errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS),
    *(errno.EINVAL, errno.ENOTTY, errno.EBADF, errno.ETXTBSY),
}


def place_by(
    method: Method, writer: VolumeWriter, store: Volume, source: Path, file: FileEntry, place: PurePosixPath
) -> bool:
    """
    Put a file under a private name of the destination.

    Returns:
        False if the volumes do not support the method.

    Raises:
        UnsafePathError: A link stands on the way to the file, or it is not a regular file.
        VolumeError: It is not as its record says.
    """
    inside = PurePosixPath(source.relative_to(store.root))
    try:
        if method in ("reflink", "copy"):
            return copy_file(writer, store, inside, file, place, is_clone=method == "reflink")
        with store.open_file(inside) as fd:
            found = os.fstat(fd)
        _check_size(source, found.st_size, file)
        with writer.open_parent(place) as parent:
            if method == "symlink":
                os.symlink(os.path.relpath(source, writer.absolute(file.path).parent), place.name, dir_fd=parent)
            else:
                _link(store, inside, parent, place.name, found)
    except (UnsafePathError, VolumeError):
        raise
    except OSError as error:
        if method == "copy" or error.errno not in _UNSUPPORTED:
            raise
        return False
    return True


def _link(store: Volume, inside: PurePosixPath, parent: int, name: str, expected: os.stat_result) -> None:
    with store.open_parent(inside) as directory:
        os.link(inside.name, name, src_dir_fd=directory, dst_dir_fd=parent, follow_symlinks=False)
    if not os.path.samestat(os.stat(name, dir_fd=parent, follow_symlinks=False), expected):
        raise UnsafePathError(str(inside), "another file was put there while it was linked")


def copy_file(
    writer: VolumeWriter,
    store: Volume,
    source: PurePosixPath,
    file: FileEntry,
    place: PurePosixPath,
    *,
    is_clone: bool = False,
) -> bool:
    """
    Copy a file into a new one; its bytes are compared with the digest of the record.

    Args:
        is_clone: Whether its extents are shared, so that nothing is read; only the size is compared then.

    Returns:
        False if the volumes share no extents.
    """
    where = store.absolute(source)
    with store.open_file(source) as read:
        _check_size(where, os.fstat(read).st_size, file)
        written = writer.create(place)
        try:
            if file.executable:
                widen_new_file(written, writer.file_mode | 0o111)
            if is_clone and not _clone(read, written):
                return False
            if not is_clone:
                allocate(written, file.size_bytes)
                copy_range(read, written, 0, file.size_bytes)
            _check_size(where, os.fstat(written).st_size, file)
            if not is_clone and file.sha256 is not None and sha256_of(written, file.size_bytes) != file.sha256:
                raise VolumeError(str(where), "copying", "it does not have the sha256 of its record")
            os.fsync(written)
        finally:
            os.close(written)
    return True


def _check_size(source: Path, size_bytes: int, file: FileEntry) -> None:
    if size_bytes != file.size_bytes:
        raise VolumeError(str(source), "copying", f"it does not have the {file.size_bytes} bytes of its record")


def _clone(source: int, target: int) -> bool:
    import fcntl

    try:
        fcntl.ioctl(target, _CLONE, source)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return False
    return True
