"""
Small files that nothing depends on.
"""

from __future__ import annotations

import os
from pathlib import PurePosixPath

from kserve_pvc._format.layout import TRASH
from kserve_pvc._volume.calls import dated_name, write_all
from kserve_pvc._volume.making import create_file_at
from kserve_pvc._volume.writing import VolumeWriter


def replace_hint(writer: VolumeWriter, place: PurePosixPath, data: bytes) -> None:
    """
    Replace a small file in one step. It is not synced: after a power failure it may be empty.
    """
    made = TRASH / dated_name()  # It is found there if this process dies here.
    with writer.translated("writing", place):
        writer.make_directory(TRASH)
        with writer.open_parent(made) as source, writer.open_parent(place) as directory:
            fd = create_file_at(source, made, writer.file_mode)
            try:
                write_all(fd, data, 0)
            finally:
                os.close(fd)
            os.rename(made.name, place.name, src_dir_fd=source, dst_dir_fd=directory)
