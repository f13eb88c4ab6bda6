"""
What a process that was killed left in `staging/`, of the creation of a store, a removal, or the like.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import PurePosixPath

from kserve_pvc._format.layout import STAGING
from kserve_pvc._volume.writing import VolumeWriter
from kserve_pvc.errors import StoreError

# Such a directory is in use for a moment.
_SWEPT_SECONDS = 24 * 3600.0
_BRIEF = re.compile(r"(create|remove|discard)-[0-9a-f]{32}")


def sweep_staging(writer: VolumeWriter) -> None:
    """
    Delete directories of calls that were over long ago. Those of downloads belong to their generations.

    Their age is judged by the volume alone: `staging/` itself changed when a directory was last made or deleted in it,
    which is never later than now. A directory that cannot be looked at or deleted stays, and fails nothing.
    """
    with suppress(StoreError, OSError):
        newest = _changed_at(writer, STAGING)
        for name in writer.list_names(STAGING):
            if _BRIEF.fullmatch(name):
                with suppress(StoreError, OSError):
                    if newest - _changed_at(writer, STAGING / name) >= _SWEPT_SECONDS:
                        writer.throw_away(STAGING / name)


def _changed_at(writer: VolumeWriter, place: PurePosixPath) -> float:
    fd = writer.open_directory(place)
    try:
        return os.fstat(fd).st_mtime
    finally:
        os.close(fd)
