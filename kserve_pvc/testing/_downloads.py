"""
Conformance tests of whole downloads by a store.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kserve_pvc._source.ref import parse_ref
from kserve_pvc.errors import (
    SourceUnavailableError,
)
from kserve_pvc.testing._backends import (
    WatchedBackend,
    read_tree,
)
from kserve_pvc.testing._base import ConformanceBase
from kserve_pvc.testing._processes import kill_halfway, our_threads, wait_until
from kserve_pvc.testing._remote import (
    FILES,
    PART_BYTES,
    WEIGHTS,
    Remote,
)


class DownloadConformance(ConformanceBase):
    """
    What a store gets through a backend.
    """

    def test_a_tree_is_fetched_as_it_is(self, remote: Remote, volume: Path, place: str) -> None:
        """
        A store downloads every file byte for byte, records the digests, and leaves the environment unchanged.
        """
        uri, environ = self._put_tree(remote, place, FILES), dict(os.environ)

        model = self._store(volume, remote, uri).ensure(uri, progress=False)

        assert read_tree(model.path) == FILES
        assert {str(f.path): f.sha256 for f in model.record.files} == {
            n: hashlib.sha256(d).hexdigest() for n, d in FILES.items()
        }
        assert (model.status, model.bytes_fetched) == ("downloaded", sum(map(len, FILES.values())))
        assert dict(os.environ) == environ

    def test_a_single_object_is_a_directory_with_that_file(self, remote: Remote, volume: Path, place: str) -> None:
        """
        The URI of one object is a model of one file, with the last part of its name.
        """
        self._require("has_single_objects")
        remote.put(f"{place}/one.bin", WEIGHTS)
        remote.put(f"{place}/one.bin.sig", b"beside it")
        uri = remote.uri(f"{place}/one.bin")

        model = self._store(volume, remote, uri).ensure(uri, progress=False)

        assert read_tree(model.path) == {"one.bin": WEIGHTS}

    def test_an_empty_object_is_a_file(self, remote: Remote, volume: Path, place: str) -> None:
        """
        Empty files are part of the model, at its top and below.
        """
        self._require("has_empty_objects")
        files = {"empty": b"", "sub/also-empty": b"", "full": b"x"}
        uri = self._put_tree(remote, place, files)

        model = self._store(volume, remote, uri).ensure(uri, progress=False)

        assert read_tree(model.path) == files

    def test_siblings_are_not_part_of_a_model(self, remote: Remote, volume: Path, place: str) -> None:
        """
        Objects next to or above the model whose names begin with the same letters are not part of it.
        """
        uri = self._put_tree(remote, place, FILES)
        for sibling in (
            f"{place}-2/config.json",
            f"{place}2/x/config.json",
            f"{place[:-1]}/config.json",
            f"{place}.d/config.json",
        ):
            remote.put(sibling, b"sibling")

        model = self._store(volume, remote, uri).ensure(uri, progress=False)

        assert read_tree(model.path) == FILES

    def test_an_odd_name_arrives_unchanged(self, remote: Remote, volume: Path, place: str, odd_name: str) -> None:
        """
        An unusual but harmless name is kept, character by character, in listings and in requests.
        """
        files = {odd_name: odd_name.encode(), "plain": b"plain"}
        uri = self._put_tree(remote, place, files)

        model = self._store(volume, remote, uri).ensure(uri, progress=False)

        assert read_tree(model.path) == files

    def test_many_small_files_are_all_there(
        self, remote: Remote, volume: Path, place: str, number_of_files: int
    ) -> None:
        """
        A model of very many small files is complete and byte for byte the same.
        """
        self._require("has_trees")
        files = {f"part-{number // 500:03}/{number:05}.txt": b"%d" % (number * 7) for number in range(number_of_files)}
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda item: remote.put(f"{place}/{item[0]}", item[1]), files.items()))
        uri = remote.uri(place)

        model = self._store(volume, remote, uri).ensure(uri, progress=False)

        assert read_tree(model.path) == files

    def test_a_killed_download_is_resumed(self, remote: Remote, volume: Path, place: str) -> None:
        """
        After `kill -9` halfway another process finishes the download, and does not download the first part again.
        """
        self._require("is_shared")
        uri, _ = self._put_file(remote, place, WEIGHTS)
        (file,) = self._make_backend(remote.storage_options).resolve(parse_ref(uri)).files

        kill_halfway(type(self).backend, dict(remote.storage_options), uri, volume)
        store = self._store(volume, remote, uri)
        assert uri not in store
        model = store.ensure(uri, progress=False, timeout=120)

        assert read_tree(model.path) == {"weights.bin": WEIGHTS}
        assert model.status == "downloaded"
        # Without a token, nothing proves that both processes read the same content.
        assert model.bytes_fetched <= len(WEIGHTS) - 3 * PART_BYTES or file.entry.token is None

    def test_a_download_that_fails_leaves_no_thread(self, remote: Remote, volume: Path, place: str) -> None:
        """
        If a worker fails, all stop and nothing is published, and the next call succeeds.
        """

        def fail(number: int) -> None:
            if number > 3:
                raise SourceUnavailableError(uri, "cancelled", is_final=True)

        # A call of an earlier test that nothing can interrupt may still be running.
        before = {*our_threads()}
        uri, _ = self._put_file(remote, place, WEIGHTS)
        store = self._store(
            volume, remote, uri, backend=WatchedBackend(self._make_backend(remote.storage_options), fail)
        )

        with pytest.raises(SourceUnavailableError, match="cancelled"):
            store.ensure(uri, progress=False, max_workers=4)

        assert uri not in store
        wait_until(lambda: {*our_threads()} <= before, "no thread of ours", self.patience_seconds)
        assert read_tree(self._store(volume, remote, uri).ensure(uri, progress=False).path) == {"weights.bin": WEIGHTS}
