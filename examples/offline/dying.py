"""
An export or import that dies by SIGKILL once half of its bytes are there: `python dying.py VERB STORE URI FILE`.
"""

from __future__ import annotations

import os
import signal
import sys

from kserve_pvc import ModelStore


class DieHalfWay:
    """
    Counts as a progress callback does, and ends the process without any farewell.
    """

    def __init__(self) -> None:
        self._total = self._done = 0

    def set_size(self, size: int) -> None:
        self._total = size

    def relative_update(self, inc: int = 1) -> None:
        self._done += inc
        if self._done > self._total // 2:
            os.kill(os.getpid(), signal.SIGKILL)


def main(verb: str, store: str, uri: str, file: str) -> None:
    if verb == "export":
        ModelStore(store).export(uri, file, callback=DieHalfWay(), progress=False)
    else:
        ModelStore(store, mode="rw").import_(file, callback=DieHalfWay(), progress=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
