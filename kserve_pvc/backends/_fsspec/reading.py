"""
Reading ranges of files through a file system, and noticing that a file has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from fsspec import AbstractFileSystem as FileSystem

from kserve_pvc._source.contract import RemoteFile
from kserve_pvc.backends._fsspec.calls import Call
from kserve_pvc.backends._fsspec.failures import Failures
from kserve_pvc.backends._fsspec.filesystems import WHOLE, Lender
from kserve_pvc.backends._fsspec.identity import as_text, identity
from kserve_pvc.backends._fsspec.listing import URI, URL
from kserve_pvc.errors import SourceChangedError, SourceUnavailableError

PIECE_BYTES = 4 * 1024 * 1024
_POLL_SECONDS = 0.25
_LEAVE_SECONDS = 1.0


class Reader:
    """
    Bytes `start` to `stop` (not included) of a file, piece by piece. The first is requested when the `with` begins.

    Args:
        read: Reads a piece, given where it starts and ends and whether it is the last one.
    """

    def __init__(
        self, read: Callable[[int, int, bool], bytes], start: int, stop: int, *, piece_bytes: int = PIECE_BYTES
    ) -> None:
        self._read = read
        self._position = start
        self._stop = stop
        self._piece_bytes = piece_bytes
        self._piece = memoryview(b"")
        self._call: Call | None = None

    def __enter__(self) -> Reader:
        if self._position < self._stop:
            self._call = self._request()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A call cannot be cancelled. Nearly all end soon; one that hangs is left alone.
        call, self._call, self._piece = self._call, None, memoryview(b"")
        if call is not None:
            call.wait(_LEAVE_SECONDS)

    def readinto(self, buffer: memoryview) -> int | None:
        if not self._piece:
            if self._position == self._stop:
                return 0
            self._call = self._call or self._request()
            if not self._call.wait(_POLL_SECONDS):
                return None
            call, self._call = self._call, None
            self._piece = memoryview(call.result())
            self._position += len(self._piece)
        count = min(len(buffer), len(self._piece))
        buffer[:count] = self._piece[:count]
        self._piece = self._piece[count:]
        return count

    def _request(self) -> Call:
        start = self._position
        stop = min(self._stop, start + self._piece_bytes)
        return Call(lambda: self._read(start, stop, stop == self._stop))


def piece_bytes_of(file: RemoteFile) -> int:
    """
    Return how much of a file to request at once.
    """
    is_whole = file.pin[URL].partition("://")[0] in WHOLE
    return max(file.entry.size_bytes, 1) if is_whole else PIECE_BYTES


def read_piece(lender: Lender, failures: Failures, file: RemoteFile, start: int, stop: int, *, is_last: bool) -> bytes:
    """
    Read a piece of a file, and after the last one of a range check that the file is still the one that was listed.

    Raises:
        SourceChangedError: It is not.
        SourceUnavailableError: It is, but these are not the bytes that were requested.
    """
    with failures.translated(file.pin[URI], changed=_changed(file)):
        data = _fetch(lender, file, start, stop, is_last=is_last)
    if len(data) != stop - start:
        # A file system that sends more than was requested does not support ranges, and a retry does not help.
        reason = f"{stop - start} bytes were requested and {len(data)} received"
        raise SourceUnavailableError(file.pin[URI], reason, is_final=len(data) > stop - start)
    return data


def _fetch(lender: Lender, file: RemoteFile, start: int, stop: int, *, is_last: bool) -> bytes:
    try:
        with lender.borrowed() as fs:
            # By name: the second positional argument differs between file systems.
            data: bytes = fs.cat_file(file.address, start=start, end=stop)
            if is_last or len(data) != stop - start:
                _check(lender, fs, file)
            return data
    except SourceChangedError:
        raise
    except Exception:
        _check_after_failure(lender, file)
        raise


def _check_after_failure(lender: Lender, file: RemoteFile) -> None:
    """A file that has shrunk or gone fails in as many ways as there are servers."""
    try:
        with lender.borrowed() as fs:
            _check(lender, fs, file)
    except (SourceChangedError, FileNotFoundError):
        raise _changed(file) from None
    except Exception:
        return  # The first failure tells more than the second.


def _check(lender: Lender, fs: FileSystem, file: RemoteFile) -> None:
    lender.forget(fs, file.address)
    info = fs.info(file.address)
    said = {**{field: as_text(value) for field, value in info.items()}, **identity(info)}
    pinned = {field: text for field, text in file.pin.items() if field not in (URL, URI) and field in said}
    if info.get("size") != file.entry.size_bytes or any(said[field] != text for field, text in pinned.items()):
        raise _changed(file)


def _changed(file: RemoteFile) -> SourceChangedError:
    return SourceChangedError(file.pin[URI], str(file.entry.path))
