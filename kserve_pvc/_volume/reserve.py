"""
Room that is kept on a volume for removals, which have to write something before they can free anything.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import PurePosixPath

from kserve_pvc._format.layout import RESERVE
from kserve_pvc._volume.calls import write_all
from kserve_pvc._volume.writing import VolumeWriter
from kserve_pvc.errors import StoreError

# A removal makes a number, a directory and a record, and three directories may grow by a block.
_FILES = 8
_FILE_BYTES = 8 * 1024


def fill_reserve(writer: VolumeWriter) -> None:
    """
    Make what is missing of the reserve. Where there is no room for it, there is less of it.
    """
    with suppress(StoreError, OSError):
        present = writer.list_names(RESERVE)
        for name in (str(number) for number in range(_FILES)):
            if name not in present:
                _make(writer, RESERVE / name)


def _make(writer: VolumeWriter, place: PurePosixPath) -> None:
    fd = writer.create(place)
    try:
        # Bytes that no file system can compress.
        write_all(fd, os.urandom(_FILE_BYTES), 0)
    finally:
        os.close(fd)


def release_reserve(writer: VolumeWriter) -> bool:
    """
    Free the reserve.

    Returns:
        False if there was none.
    """
    names = [name for name in writer.list_names(RESERVE) if name.isascii() and name.isdigit()]
    with writer.translated("freeing the reserve", RESERVE), writer.open_parent(RESERVE / "0") as parent:
        for name in names:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=parent)
    return bool(names)
