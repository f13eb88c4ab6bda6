"""
Conformance tests of reading ranges.
"""

from __future__ import annotations

import hashlib
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from kserve_pvc._source.contract import (
    Backend,
    SupportsEvidence,
)
from kserve_pvc._source.ref import parse_ref
from kserve_pvc.errors import (
    SourceChangedError,
    SourceUnavailableError,
)
from kserve_pvc.testing._backends import (
    WatchedBackend,
    change_object,
    close_backend,
    is_digest_of,
    read_or_changed,
    read_pieces,
    read_range,
    read_tree,
)
from kserve_pvc.testing._base import ConformanceBase
from kserve_pvc.testing._processes import count_resources, count_stable_resources, wait_until
from kserve_pvc.testing._remote import (
    REPLACEMENT,
    WEIGHTS,
    Remote,
)


class ReadingConformance(ConformanceBase):
    """
    What a backend reads, also while objects change and from several threads.
    """

    @pytest.mark.parametrize("buffer_bytes", [1000, 65_536, 2_000_000])
    def test_a_range_is_exactly_what_was_asked_for(
        self, remote: Remote, subject: Backend, place: str, buffer_bytes: int
    ) -> None:
        """
        Ranges have the right bytes at both ends of a file and in between, with any size of the buffer.
        """
        uri, _ = self._put_file(remote, place, WEIGHTS)
        size = len(WEIGHTS)
        (file,) = subject.resolve(parse_ref(uri)).files
        ranges = [
            (0, 1),
            (1, 2),
            (0, size),
            (1, size),
            (size - 1, size),
            (0, size - 1),
            (65_535, 65_537),
            (100_000, 200_000),
        ]

        found = {(start, stop): read_range(subject, file, start, stop, buffer_bytes) for start, stop in ranges}

        assert [span for span, data in found.items() if data != WEIGHTS[slice(*span)]] == []

    def test_a_range_ends(self, remote: Remote, subject: Backend, place: str) -> None:
        """
        A reader ends after the last requested byte, even if the buffer has room for more.
        """
        uri, _ = self._put_file(remote, place, WEIGHTS)
        (file,) = subject.resolve(parse_ref(uri)).files

        with subject.open_range(file, 10, 1010) as reader:
            found = b"".join(read_pieces(reader, 4096))

        assert found == WEIGHTS[10:1010]

    @pytest.mark.parametrize("change", ["replaced", "made-shorter", "made-longer", "deleted"])
    def test_what_was_listed_is_read_or_nothing(
        self, remote: Remote, subject: Backend, place: str, change: str
    ) -> None:
        """
        Every range of an object that changed after the listing has the listed bytes, or raises `SourceChangedError`.
        """
        self._require("can_pin")
        uri, path = self._put_file(remote, place, WEIGHTS)
        size = len(WEIGHTS)
        (file,) = subject.resolve(parse_ref(uri)).files

        change_object(remote, path, change)

        for start, stop in ((0, size), (0, 1), (size // 2, size), (size - 1, size)):
            assert read_or_changed(subject, file, start, stop) in (None, WEIGHTS[start:stop]), (start, stop)

    @pytest.mark.parametrize("change", ["replaced", "deleted"])
    def test_a_change_inside_a_range_is_not_mixed_in(
        self, remote: Remote, subject: Backend, place: str, change: str
    ) -> None:
        """
        A range whose object changes meanwhile continues with the old bytes, ends early, or raises `SourceChangedError`.
        """
        self._require("can_pin")
        first = WEIGHTS * 12
        uri, path = self._put_file(remote, place, first)
        (file,) = subject.resolve(parse_ref(uri)).files
        found = bytearray()

        with suppress(SourceChangedError, SourceUnavailableError), subject.open_range(file, 0, len(first)) as reader:
            for piece in read_pieces(reader, 1000):
                if not found:
                    change_object(remote, path, change)
                found += piece

        assert first.startswith(bytes(found))
        rest = read_or_changed(subject, file, len(found), len(first)) if len(found) < len(first) else b""
        assert rest in (None, first[len(found) :])

    @pytest.mark.parametrize("change", ["replaced", "deleted"])
    def test_a_change_between_two_ranges_is_not_published(
        self, remote: Remote, volume: Path, place: str, change: str
    ) -> None:
        """
        A download whose object changes halfway raises `SourceChangedError` and publishes nothing, or publishes exactly
        the listed bytes.
        """
        self._require("can_pin")
        uri, path = self._put_file(remote, place, WEIGHTS)

        def change_at_the_third(number: int) -> None:
            if number == 3:
                change_object(remote, path, change)

        watched = WatchedBackend(self._make_backend(remote.storage_options), change_at_the_third)
        store = self._store(volume, remote, uri, backend=watched)

        if self.has_versions:
            assert read_tree(store.ensure(uri, progress=False, max_workers=1).path) == {"weights.bin": WEIGHTS}
            return
        with pytest.raises(SourceChangedError):
            store.ensure(uri, progress=False, max_workers=1)
        assert uri not in store
        if change == "replaced":
            assert read_tree(self._store(volume, remote, uri).ensure(uri, progress=False).path) == {
                "weights.bin": REPLACEMENT
            }

    def test_a_big_file_is_fetched_in_ranges(self, remote: Remote, volume: Path, place: str) -> None:
        """
        Several workers download a big file in adjacent ranges that do not overlap, and its bytes are right.
        """
        data = random.Random(5).randbytes(self.big_bytes)
        uri, _ = self._put_file(remote, place, data)
        watched = WatchedBackend(self._make_backend(remote.storage_options))

        model = self._store(volume, remote, uri, backend=watched, part_bytes=1024 * 1024).ensure(
            uri, progress=False, max_workers=4
        )

        assert hashlib.sha256((model.path / "weights.bin").read_bytes()).digest() == hashlib.sha256(data).digest()
        assert model.bytes_fetched == len(data)
        ranges = sorted(watched.ranges)
        assert [start for start, _ in ranges[1:]] == [stop for _, stop in ranges[:-1]]
        assert (ranges[0][0], ranges[-1][1]) == (0, len(data))
        assert len(ranges) > 2

    def test_evidence_is_true(self, remote: Remote, subject: Backend, place: str) -> None:
        """
        A digest that the backend requests from the source is the digest of the bytes.
        """
        if not isinstance(subject, SupportsEvidence):
            pytest.skip("the backend has no `evidence`")
        uri, _ = self._put_file(remote, place, WEIGHTS)
        (file,) = subject.resolve(parse_ref(uri)).files

        assert is_digest_of(subject, subject.evidence(file), WEIGHTS)

    def test_giving_up_leaves_nothing_behind(self, remote: Remote, place: str) -> None:
        """
        Readers that are abandoned, normally or by an exception, leave neither threads nor descriptors after the backend
        is closed.
        """
        uri, _ = self._put_file(remote, place, WEIGHTS * 6)

        def give_up(times: int) -> None:
            backend = self._make_backend(remote.storage_options)
            (file,) = backend.resolve(parse_ref(uri)).files
            for _ in range(times):
                with suppress(KeyboardInterrupt), backend.open_range(file, 0, file.entry.size_bytes) as reader:
                    next(read_pieces(reader, 1000))
                    raise KeyboardInterrupt
                with backend.open_range(file, 0, file.entry.size_bytes):
                    pass
            close_backend(backend)

        give_up(1)  # What is loaded once is not a leak.
        before = count_stable_resources()
        give_up(5)

        wait_until(
            lambda: all(now <= then for now, then in zip(count_resources(), before, strict=True)),
            f"{before} before",
            self.patience_seconds,
        )

    def test_eight_threads_share_one_back_end(self, remote: Remote, subject: Backend, place: str) -> None:
        """
        Eight threads that list and read at the same time each get the right bytes.
        """
        uri, _ = self._put_file(remote, place, WEIGHTS)
        start_together = threading.Barrier(8)

        def use(number: int) -> bool:
            start_together.wait(60)
            (file,) = subject.resolve(parse_ref(uri)).files
            ranges = [(k * 50_000, k * 50_000 + 70_000) for k in range(number, number + 5)]
            return all(read_range(subject, file, start, stop) == WEIGHTS[start:stop] for start, stop in ranges)

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(use, range(8))) == [True] * 8

    def test_closing_is_harmless(self, remote: Remote, subject: Backend, place: str) -> None:
        """
        `close` may be called at any time and twice, and the backend can be used after it.
        """
        if not hasattr(subject, "close"):
            pytest.skip("the backend has no `close`")
        uri, _ = self._put_file(remote, place, WEIGHTS)
        subject.close()
        (file,) = subject.resolve(parse_ref(uri)).files
        subject.close()
        subject.close()

        assert read_range(subject, file, 5, 5000) == WEIGHTS[5:5000]
