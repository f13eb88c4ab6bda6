"""
The journal of finished parts, from which another process resumes.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import PurePosixPath

from kserve_pvc._format import layout
from kserve_pvc._format.records import PartNote, encode
from kserve_pvc._volume.calls import write_all
from kserve_pvc._volume.writing import VolumeWriter
from kserve_pvc.errors import StoreError

# The note of a range of this length is written at once.
_GATHERED_BYTES = 8 * 1024 * 1024


class Journal:
    """
    The notes of one attempt, each a line with its own checksum. Several threads may note at the same time.
    """

    def __init__(self, writer: VolumeWriter, generation: str, part_bytes: int) -> None:
        self._guard = threading.Lock()
        self._part_bytes = part_bytes
        self._notes: list[tuple[PurePosixPath, str, int, int, str | None, int | None, bool]] = []
        self._fronts: dict[PurePosixPath, int] = {}
        self._unwritten = 0
        self._unsynced = 0
        self._offset = 0
        self._writer = writer
        self._is_closed = False
        self._generation = generation
        self._place = layout.journal_file(generation)
        self._fd = writer.create(self._place)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # Only a failed download is resumed. Notes are hints: a lost one costs a fetch.
        with self._guard:
            self._is_closed = True
            with suppress(OSError, StoreError):
                if kind is not None:
                    self._write()
            with suppress(OSError):
                os.close(self._fd)

    def flush(self) -> None:
        """
        Write down now what was noted so far, if the volume takes it.
        """
        with self._guard, suppress(OSError, StoreError):
            if not self._is_closed:
                self._write()

    def spoil(self) -> None:
        """
        Write down that the volume failed while this generation was written, if the volume takes it.

        The kernel reports a failed write once, and the page that was not written looks like a good one afterwards.
        """
        with suppress(OSError, StoreError):
            self._writer.write_private(layout.spoiled_file(self._generation), b"")

    def note(
        self,
        path: PurePosixPath,
        token: str,
        start: int,
        stop: int,
        sha256: str | None,
        crc32: int | None,
        is_durable: bool = False,
    ) -> None:
        """
        Note what is on the volume, with the fields of a `PartNote`.

        Notes of small files are gathered until together they cover a part: many downloads are complete before that.
        """
        with self._guard:
            self._notes.append((path, token, start, stop, sha256, crc32, is_durable))
            covered = self._newly_covered(path, start, stop, is_running=sha256 is not None)
            self._unwritten += covered
            if self._unwritten >= self._part_bytes or covered >= _GATHERED_BYTES:
                self._write()

    def _newly_covered(self, path: PurePosixPath, start: int, stop: int, *, is_running: bool) -> int:
        """Count bytes once: a running digest covers those of the note before it too."""
        if not is_running or stop < _GATHERED_BYTES:
            return stop - start
        before = self._fronts.get(path, 0)
        self._fronts[path] = stop
        return max(0, stop - before)  # A file that is fetched once more has smaller notes again.

    def _write(self) -> None:
        data = b"".join(
            encode(
                PartNote(
                    path=path, token=token, start=start, stop=stop, sha256=sha256, crc32=crc32, is_durable=is_durable
                )
            )
            for path, token, start, stop, sha256, crc32, is_durable in self._notes
        )
        try:
            write_all(self._fd, data, self._offset)
            self._offset += len(data)
            self._unsynced += self._unwritten
            self._unwritten = 0
            self._notes.clear()
            if self._unsynced >= self._part_bytes:
                os.fdatasync(self._fd)
                self._unsynced = 0
        except OSError as error:
            raise self._writer.failure("writing", self._place, error) from error
