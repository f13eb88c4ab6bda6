"""
Acting as another user, and a place that other users can reach.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import shell

# Another user may not be able to read this interpreter's libraries, so everything is imported before.
_BECOME = """
import os, sys
from kserve_pvc import *
from kserve_pvc._download import plan as _plan
from kserve_pvc._download import download as _download
from kserve_pvc._download import attempt as _attempt
from kserve_pvc._keys import removal as _removal
from kserve_pvc._keys import claims as _claims
from kserve_pvc._show import observing as _observing
from kserve_pvc._show import progress as _progress
from kserve_pvc.backends.file import FileBackend
import ctypes

os.setgroups([])
os.setgid({uid})
os.setuid({uid})
"""


def python_as(uid: int, script: str, *arguments: str) -> str:
    """
    Run a script as another user and return what it printed. It needs root.
    """
    return shell.python(_BECOME.format(uid=uid) + script, *arguments)


@contextmanager
def public_directory() -> Iterator[Path]:
    """
    A directory that everybody may enter; pytest's own are closed to others.
    """
    with tempfile.TemporaryDirectory(prefix="kserve-pvc-") as name:
        place = Path(name)
        place.chmod(0o755)
        yield place
