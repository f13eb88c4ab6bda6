"""
How fast the last download of a store was, for estimates.
"""

from __future__ import annotations

from contextlib import suppress

from kserve_pvc._format import layout
from kserve_pvc._format.records import BEAT_BYTES, Beat, decode, encode_beat
from kserve_pvc._volume.hints import replace_hint
from kserve_pvc._volume.reading import Volume
from kserve_pvc._volume.writing import VolumeWriter
from kserve_pvc.errors import StoreError, StoreFormatError, VolumeError

# A download of fewer bytes is over before it has a rate.
_TELLING_BYTES = 1024 * 1024


def read_rate(volume: Volume) -> int:
    """
    Return the bytes per second of the last download that was long enough to tell, or 0.
    """
    with suppress(StoreFormatError, VolumeError):
        data = volume.read(layout.RATE, BEAT_BYTES)
        return 0 if data is None else decode(Beat, data, str(layout.RATE)).bytes_per_second
    return 0


def note_rate(writer: VolumeWriter, size_bytes: int, seconds: float) -> None:
    """
    Note how fast a download was, for later estimates. Small ones say nothing about large ones.
    """
    if size_bytes < _TELLING_BYTES or seconds <= 0:
        return
    beat = Beat(count=1, bytes_done=size_bytes, bytes_total=size_bytes, bytes_per_second=round(size_bytes / seconds))
    with suppress(OSError, StoreError):
        replace_hint(writer, layout.RATE, encode_beat(beat))
