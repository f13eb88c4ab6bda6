"""
CRC32C, which object stores vouch for and the standard library does not have.

Computed by google-crc32c where that is installed, as it is with the extra `gs`: in pure Python it would take longer
than the download.
"""

from __future__ import annotations

from collections.abc import Callable

from kserve_pvc._source.contract import Checksum

_PIECE_BYTES = 64 * 1024


def make_checksum(kind: str) -> Checksum | None:
    """
    Make the checksum `crc32c`, or None if another one is requested, or nothing here can compute it.
    """
    if kind != "crc32c":
        return None
    try:
        from google_crc32c import extend, implementation
    except ImportError:
        return None
    return None if implementation == "python" else _CRC32C(extend)


class _CRC32C:
    def __init__(self, extend: Callable[[int, bytes], int], value: int = 0) -> None:
        self._extend = extend
        self._value = value

    def update(self, piece: memoryview) -> None:
        # It takes nothing that could change meanwhile, so it gets copies, small enough to stay in the processor's
        # cache.
        for start in range(0, len(piece), _PIECE_BYTES):
            self._value = self._extend(self._value, bytes(piece[start : start + _PIECE_BYTES]))

    def hexdigest(self) -> str:
        return f"{self._value:08x}"

    def copy(self) -> _CRC32C:
        return _CRC32C(self._extend, self._value)
