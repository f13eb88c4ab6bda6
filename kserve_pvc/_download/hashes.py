"""
The digests of a file that is being written: fed in order, at the front or from the page cache, and compared.
"""

from __future__ import annotations

import copy
import hashlib
import os
import threading
import zlib
from collections import deque
from collections.abc import Callable

from kserve_pvc._download.tuning import Tuning
from kserve_pvc._source.contract import Backend, Checksum, RemoteFile, SupportsChecksums
from kserve_pvc._threads import start_thread
from kserve_pvc._volume.buffers import make_buffer
from kserve_pvc.errors import DigestMismatchError, VolumeError

_BUFFER_BYTES = 512 * 1024


class Hashes:
    """
    The digests of one file, fed in order: ours, and the one that the source promised.

    Args:
        digest: `sha256` or `none`, for ours.
        promised: The digest by the source as `name:hex`, or None.
        make: Makes a checksum that the standard library does not have, by its name, or returns None.
    """

    def __init__(self, digest: str, promised: str | None, make: Callable[[str], Checksum | None]) -> None:
        self.size_bytes = 0  # How much was fed.
        self.sha256 = hashlib.sha256() if digest == "sha256" else None
        self.promised = promised
        self._make = make
        self._kind = (promised or "").partition(":")[0]
        self._other = None if self._kind == "sha256" else self._checksum()
        self.is_needed = self.sha256 is not None or self._other is not None

    def _checksum(self) -> Checksum | None:
        if self._kind == "md5":
            return hashlib.md5(usedforsecurity=False)
        if self._kind == "crc32":
            return CRC32()
        return self._make(self._kind) if self._kind else None

    def anew(self) -> Hashes:
        """
        Return the same digests of nothing.
        """
        return Hashes("none" if self.sha256 is None else "sha256", self.promised, self._make)

    def copy(self) -> Hashes:
        """
        Return the same digests of the same bytes, which can be fed independently.
        """
        twin = copy.copy(self)
        twin.sha256 = self.sha256 and self.sha256.copy()
        twin._other = self._other and self._other.copy()
        return twin

    def update(self, piece: memoryview) -> None:
        """
        Feed the bytes that come next.
        """
        if self.sha256 is not None:
            self.sha256.update(piece)
        if self._other is not None:
            self._other.update(piece)
        self.size_bytes += len(piece)

    def so_far(self) -> str | None:
        """
        Return the SHA-256 of what was fed, or None without one.
        """
        return None if self.sha256 is None else self.sha256.hexdigest()

    def compare(self) -> tuple[str, str] | None:
        """
        Return what the source promised and what was received, or None if it promised nothing comparable.
        """
        found = self.sha256 if self._kind == "sha256" else self._other
        return None if found is None or self.promised is None else (self.promised, f"{self._kind}:{found.hexdigest()}")


class CRC32:
    """
    A CRC-32 as a checksum.
    """

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def update(self, piece: memoryview) -> None:
        """
        Feed the bytes that come next.
        """
        self.value = zlib.crc32(piece, self.value)

    def hexdigest(self) -> str:
        """
        Return eight hexadecimal digits.
        """
        return f"{self.value:08x}"

    def copy(self) -> CRC32:
        """
        Return the same checksum of the same bytes.
        """
        return CRC32(self.value)


def hash_range(
    fd: int,
    start: int,
    stop: int,
    buffer: memoryview,
    update: Callable[[memoryview], None],
    check: Callable[[], None],
) -> bool:
    """
    Feed a range of a file to a digest.

    Args:
        check: Called before each read; ends the call by raising.

    Returns:
        False if the file ends before the range does.
    """
    while start < stop:
        check()
        count = os.preadv(fd, [buffer[: min(len(buffer), stop - start)]], start)
        if count == 0:
            return False
        update(buffer[:count])
        start += count
    return True


class Promises:
    """
    What the source promised about its files, and whether that is what was received.

    Args:
        request: Requests the digest of a file from the source, for those where the listing's is not good enough.
        check: As for `hash_range`.
    """

    def __init__(
        self,
        backend: Backend,
        tuning: Tuning,
        *,
        request: Callable[[RemoteFile], str | None],
        check: Callable[[], None],
    ) -> None:
        self._make: Callable[[str], Checksum | None] = (
            backend.checksum if isinstance(backend, SupportsChecksums) else lambda name: None
        )
        self.digest = tuning.digest
        self._evidence_bytes = tuning.evidence_bytes
        self._request = request
        self._check = check

    def hashes(self, file: RemoteFile) -> Hashes:
        """
        Return the digests to feed with the bytes of a file.
        """
        promised = file.digest
        if file.entry.sha256:
            promised = f"sha256:{file.entry.sha256}"
        elif file.entry.size_bytes > self._evidence_bytes:
            promised = self._request(file)
        return Hashes(self.digest, promised, self._make)

    def compare(self, file: RemoteFile, fd: int, hashes: Hashes) -> str | None:
        """
        Compare a file that has all its bytes with what the source promised.

        Returns:
            The promised digest, or None if there was nothing to compare with.

        Raises:
            DigestMismatchError: They differ.
        """
        compared = hashes.compare()
        if compared is None:
            return None
        promised, found = compared
        if promised != found and promised == file.digest and not file.entry.sha256:
            # What looks like an MD5 in a listing is none where the server encrypts: then the source has another digest.
            better = self._request(file)
            if better is None:
                return None
            promised, found = self._compare_again(file, fd, better)
        if promised != found:
            raise DigestMismatchError(str(file.entry.path), promised, found)
        return promised

    def _compare_again(self, file: RemoteFile, fd: int, promised: str) -> tuple[str, str]:
        hashes = Hashes("sha256", promised, self._make)
        hash_range(fd, 0, file.entry.size_bytes, make_buffer(_BUFFER_BYTES), hashes.update, self._check)
        return hashes.compare() or (promised, "nothing that can be compared with it")


class Chasers:
    """
    Threads that hash what was written ahead of the front, from the page cache.

    Args:
        catch_up: Hashes what there is of one file, with the buffer it is given.
        fail: Takes an error that ended a thread.
    """

    def __init__(
        self, catch_up: Callable[[RemoteFile, memoryview], None], fail: Callable[[BaseException], None]
    ) -> None:
        self._catch_up = catch_up
        self._fail = fail
        self._guard = threading.Lock()
        self._files: deque[RemoteFile] = deque()
        self._threads: list[threading.Thread] = []
        self._running = 0

    def add(self, file: RemoteFile) -> None:
        """
        Have a file hashed as far as it is written.
        """
        with self._guard:
            self._files.append(file)
            # One for each processor: more would only take turns.
            if self._running < (os.cpu_count() or 1):
                name = f"kserve-pvc-hash-{len(self._threads)}"
                try:
                    self._threads.append(start_thread(self._run, name))
                except VolumeError:
                    if not self._running:
                        raise
                    return  # Those that run hash it too.
                self._running += 1

    def join(self) -> None:
        """
        Wait for all threads, once only they themselves add files.
        """
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        buffer = make_buffer(_BUFFER_BYTES)
        try:
            while (file := self._next()) is not None:
                self._catch_up(file, buffer)
        except BaseException as error:
            self._fail(error)

    def _next(self) -> RemoteFile | None:
        with self._guard:
            if self._files:
                return self._files.popleft()
            self._running -= 1
            return None
