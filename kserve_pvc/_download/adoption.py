"""
Taking over bytes that another writer left, once they prove themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import PurePosixPath

import attrs

from kserve_pvc._format.records import PartNote


@attrs.frozen(kw_only=True)
class Donor:
    """
    A file that somebody else wrote and that may hold the bytes we want.

    `notes` says what of it is proven by which digest. A note of a whole file also says that its writer has closed it
    for good, so that its inode may be shared: `link` gives it a second name in our generation, or says that it cannot.
    """

    notes: tuple[PartNote, ...]
    open_file: Callable[[], AbstractContextManager[int]]
    link: Callable[[PurePosixPath], bool]
