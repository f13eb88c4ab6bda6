"""
What a process that was killed left in `staging/`, of the creation of a store, a removal, or the like.
"""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress

from kserve_pvc._format.layout import STAGING
from kserve_pvc._volume.writing import VolumeWriter
from kserve_pvc.errors import StoreError

# Such a directory is in use for a moment, and clocks differ by less than this.
_SWEPT_SECONDS = 24 * 3600.0
_BRIEF = re.compile(r"(create|remove|discard)-[0-9a-f]{32}")


def sweep_staging(writer: VolumeWriter) -> None:
    """
    Delete directories of calls that were over long ago. Those of downloads belong to their generations.

    A directory that cannot be looked at or deleted stays, and fails nothing.
    """
    with suppress(StoreError):
        for name in writer.list_names(STAGING):
            if _BRIEF.fullmatch(name):
                with suppress(StoreError, OSError):
                    fd = writer.open_directory(STAGING / name)
                    try:
                        age = time.time() - os.fstat(fd).st_mtime
                    finally:
                        os.close(fd)
                    if age >= _SWEPT_SECONDS:
                        writer.throw_away(STAGING / name)
