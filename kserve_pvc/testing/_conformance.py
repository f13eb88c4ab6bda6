"""
The conformance suite: a pytest class that reads what it has put into a real service by other means.

Whatever is looked at was put there past the back end under test, and most of it is looked at twice: through the back
end alone, and through a `ModelStore` that has to end up with exactly the same bytes.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import pickle
import random
import subprocess
import sys
import threading
import time
import traceback
import unicodedata
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Protocol

import pytest

from kserve_pvc._source.contract import (
    ABILITIES,
    Backend,
    BackendFactory,
    RangeReader,
    RemoteFile,
    Resolved,
    SupportsChecksums,
    SupportsClose,
    SupportsEvidence,
    SupportsPages,
)
from kserve_pvc._source.ref import ModelRef, parse_ref
from kserve_pvc._store import ModelStore
from kserve_pvc.errors import (
    InvalidURIError,
    SourceChangedError,
    SourceDeniedError,
    SourceNotFoundError,
    SourceUnavailableError,
    StoreError,
    UnsafePathError,
)

PART_BYTES = 100_000
FILES = {
    "config.json": b'{"layers": 2}',
    "weights/a.bin": random.Random(1).randbytes(350_003),
    "weights/deep/er/b.bin": random.Random(2).randbytes(1000),
}
_WEIGHTS = random.Random(3).randbytes(700_003)
_OTHERS = random.Random(4).randbytes(len(_WEIGHTS))

# Names that are unusual and harmless: each arrives as it is, or cannot be held by the service at all.
ODD_NAMES = {
    "blank": "a b",
    "plus": "a+b",
    "percent": "100%25",
    "encoded-slash": "a%2Fb",
    "hash": "a#b",
    "question-mark": "what?.txt",
    "quotes": 'it\'s "quoted"',
    "ampersand": "a&b=c;d,e",
    "brackets": "(1) [2] {3}",
    "star": "a*b",
    "tilde": "~x",
    "colon": "layer:0",
    "exclamation": "a!/b$@",
    "leading-dot": ".hidden/.x",
    "dash": "-dash",
    "composed": unicodedata.normalize("NFC", "café"),
    "decomposed": unicodedata.normalize("NFD", "café"),
    "other-scripts": "日本語/模型🦄.bin",
    "long": "n" * 255,
    "deep": "/".join("d" * 30 for _ in range(20)),
}
# Names that would leave their place, hide what they are, or not be themselves on every volume.
HOSTILE_NAMES = {
    "climbs": ("../escape",),
    "climbs-inside": ("a/../../escape",),
    "absolute": ("/kserve-pvc-absolute",),
    "empty-part": ("a//b",),
    "dot-part": ("a/./b",),
    "newline": ("a\nb",),
    "bell": ("a\x07b",),
    "escape-sequence": ("a\x1b[31mb",),
    "nul": ("a\x00b",),
    "backslash": ("..\\escape",),
    "bidirectional": ("a\u202eb",),
    "trailing-dot": ("a.",),
    "trailing-blank": ("a ",),
    "drive": ("C:escape",),
    "twins-by-case": ("Twin", "twin"),
    "twins-by-unicode": (unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")),
}
_SECRET_WORDS = (
    "secret",
    "token",
    "password",
    "passwd",
    "key",
    "sas",
    "credential",
    "connection_string",
    "authorization",
    "cookie",
    "auth",
)
_LEASE_SECONDS = 2.0


class Remote(Protocol):
    """
    A service that is really there, reached past the back end under test.

    Paths are relative names with slashes. The first two parts of every path that the suite uses belong to one test, so
    a service whose models have two names (an organisation and a repository) can take them for those.
    """

    @property
    def storage_options(self) -> Mapping[str, Any]:
        """How a store reaches the service."""

    @property
    def denied_options(self) -> Mapping[str, Any] | None:
        """The same with credentials that it refuses; None if it refuses nobody."""

    @property
    def unreachable_options(self) -> Mapping[str, Any] | None:
        """The same, pointing at where nobody listens; None if the options cannot say where."""

    def uri(self, path: str) -> str:
        """The URI of the model below a path, or of the one object there."""

    def put(self, path: str, data: bytes) -> None:
        """Make or replace one object. Called from several threads at once."""

    def delete(self, path: str) -> None:
        """Remove one object."""


class BackendConformance:
    """
    What every back end does. Subclass it, name the factory, and bring a fixture `remote`.

    What a service cannot do is declared by the attributes below, and the tests that need it are skipped by that name.

    Args:
        backend: The factory under test. Other processes import it by its name, so it is a class or function of a module
            that they find.
        has_trees: A URI may mean many objects. If not, every model is one object.
        has_single_objects: A URI may mean one object.
        has_empty_objects: The service holds objects of no bytes.
        can_pin: What is replaced is never taken for what was listed.
        has_versions: The service goes on giving what was replaced, so that the change of a model is no failure.
        is_shared: Other processes on this machine reach the service by the same options.
        cannot_hold: Of `ODD_NAMES` and `HOSTILE_NAMES`, by their ids, those that the service cannot hold, and why.
        many_files: How many small files the longest listing has. 0 skips it.
        big_bytes: The size of the largest file.
        unreachable_seconds: How soon it must be told that nobody listens.
        patience_seconds: How soon everything that was given up must be gone.
        log_level: From which level on logs are searched for secrets. Some SDKs write down whole requests at DEBUG.
        secrets: Values among the options that must never be shown, besides those whose names give them away.
    """

    backend: ClassVar[BackendFactory]
    has_trees: ClassVar[bool] = True
    has_single_objects: ClassVar[bool] = True
    has_empty_objects: ClassVar[bool] = True
    can_pin: ClassVar[bool] = True
    has_versions: ClassVar[bool] = False
    is_shared: ClassVar[bool] = True
    cannot_hold: ClassVar[Mapping[str, str]] = {}
    many_files: ClassVar[int] = 5000
    big_bytes: ClassVar[int] = 24 * 1024 * 1024
    unreachable_seconds: ClassVar[float] = 60.0
    patience_seconds: ClassVar[float] = 20.0
    log_level: ClassVar[int] = logging.DEBUG
    secrets: ClassVar[Iterable[str]] = ()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """
        Tell in the name of the test how many files there are, and which names are not tried.
        """
        cls = metafunc.cls
        if cls is None:
            return
        if "number_of_files" in metafunc.fixturenames:
            marks = [] if cls.many_files else [pytest.mark.skip(reason=f"`{cls.__name__}.many_files` is 0")]
            metafunc.parametrize(
                "number_of_files", [pytest.param(cls.many_files, marks=marks)], ids=[f"{cls.many_files}-files"]
            )
        for fixture, names in (("odd_name", ODD_NAMES), ("hostile_names", HOSTILE_NAMES)):
            if fixture in metafunc.fixturenames:
                metafunc.parametrize(fixture, [_named(cls, short, value) for short, value in names.items()])

    @pytest.fixture
    def place(self) -> str:
        """
        Where a test puts its model.
        """
        return f"{uuid.uuid4().hex[:12]}/model"

    @pytest.fixture
    def subject(self, remote: Remote) -> Iterator[Backend]:
        """
        The back end by itself, as a store would make it.
        """
        backend = self._make(remote.storage_options)
        yield backend
        _close(backend)

    @pytest.fixture
    def volume(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """
        An empty directory among others.
        """
        return tmp_path_factory.mktemp("volume")

    def _make(self, options: Mapping[str, Any]) -> Backend:
        return type(self).backend(options)

    def _store(
        self, volume: Path, remote: Remote, uri: str, *, backend: Backend | None = None, **arguments: Any
    ) -> ModelStore:
        ref, factory = parse_ref(uri), type(self).backend if backend is None else lambda options: backend
        chosen = {
            "storage_options": remote.storage_options,
            "part_bytes": PART_BYTES,
            "lease_seconds": _LEASE_SECONDS,
            **arguments,
        }
        return ModelStore(volume, mode="rw", backends={ref.scheme: factory}, **chosen)

    def _need(self, *names: str) -> None:
        for name in names:
            if not getattr(self, name):
                pytest.skip(f"`{type(self).__name__}.{name}` is not set")

    def _offer(self, remote: Remote, place: str, data: bytes) -> tuple[str, str]:
        """Put a model of one object; return its URI and the path of the object."""
        path = f"{place}/weights.bin"
        remote.put(path, data)
        return remote.uri(place if self.has_trees else path), path

    def _offer_all(self, remote: Remote, place: str, files: Mapping[str, bytes]) -> str:
        self._need("has_trees")
        for name, data in files.items():
            remote.put(f"{place}/{name}", data)
        return remote.uri(place)

    def test_a_listing_names_every_file_and_its_size(self, remote: Remote, subject: Backend, place: str) -> None:
        """
        Each file is there once, in order, with its path below the model, its size and an entry that pins it.
        """
        uri = self._offer_all(remote, place, FILES)

        found = subject.resolve(parse_ref(uri))

        assert [(str(f.entry.path), f.entry.size_bytes) for f in found.files] == [
            (name, len(data)) for name, data in sorted(FILES.items())
        ]
        assert found.size_bytes == sum(map(len, FILES.values()))
        assert all(_vouches(subject, f.digest, FILES[str(f.entry.path)]) for f in found.files)
        assert all(f.entry.sha256 in (None, hashlib.sha256(FILES[str(f.entry.path)]).hexdigest()) for f in found.files)

    def test_a_listing_is_the_same_each_time(self, remote: Remote, subject: Backend, place: str) -> None:
        """
        As long as nothing changes, version, order and tokens do not, whichever object is asked.
        """
        uri = self._offer_all(remote, place, FILES)

        found = [backend.resolve(parse_ref(uri)) for backend in (subject, subject, self._make(remote.storage_options))]

        assert len({f.version for f in found}) == 1
        assert found[0].files == found[1].files == found[2].files

    def test_a_change_makes_another_version(self, remote: Remote, subject: Backend, place: str) -> None:
        """
        A file of the same length with other bytes makes another version of the model.
        """
        self._need("can_pin")
        uri, path = self._offer(remote, place, _WEIGHTS)
        before = subject.resolve(parse_ref(uri)).version
        remote.put(path, _OTHERS)

        assert subject.resolve(parse_ref(uri)).version != before

    def test_no_ability_is_misspelled(self, subject: Backend) -> None:
        """
        No public method is named nearly as an optional ability, which would then never be called.
        """
        methods = {name for name in dir(subject) if not name.startswith("_") and callable(getattr(subject, name))}
        misspelled = {
            name: near for name in methods - {*ABILITIES} if (near := get_close_matches(name, ABILITIES, 1, 0.8))
        }

        assert misspelled == {}

    def test_pages_are_the_listing(self, remote: Remote, subject: Backend, place: str) -> None:
        """
        What `pages` yields together is what `resolve` returns.
        """
        if not isinstance(subject, SupportsPages):
            pytest.skip("the back end has no `pages`")
        uri = self._offer_all(remote, place, FILES)

        found = [file for page in subject.pages(parse_ref(uri)) for file in page]

        assert sorted(found, key=lambda f: f.entry.path) == sorted(
            subject.resolve(parse_ref(uri)).files, key=lambda f: f.entry.path
        )

    def test_a_tree_is_fetched_as_it_is(self, remote: Remote, volume: Path, place: str) -> None:
        """
        A store gets every file with exactly its bytes, records their digests, and the environment stays as it was.
        """
        uri, environ = self._offer_all(remote, place, FILES), dict(os.environ)

        model = self._store(volume, remote, uri).ensure(uri, progress=False)

        assert _tree(model.path) == FILES
        assert {str(f.path): f.sha256 for f in model.record.files} == {
            n: hashlib.sha256(d).hexdigest() for n, d in FILES.items()
        }
        assert (model.status, model.bytes_fetched) == ("downloaded", sum(map(len, FILES.values())))
        assert dict(os.environ) == environ

    def test_a_single_object_is_a_directory_with_that_file(self, remote: Remote, volume: Path, place: str) -> None:
        """
        The URI of one object gives a model of one file under the last part of its name.
        """
        self._need("has_single_objects")
        remote.put(f"{place}/one.bin", _WEIGHTS)
        remote.put(f"{place}/one.bin.sig", b"beside it")
        uri = remote.uri(f"{place}/one.bin")

        model = self._store(volume, remote, uri).ensure(uri, progress=False)

        assert _tree(model.path) == {"one.bin": _WEIGHTS}

    def test_an_empty_object_is_a_file(self, remote: Remote, volume: Path, place: str) -> None:
        """
        Files of no bytes are part of the model, at its top and below.
        """
        self._need("has_empty_objects")
        files = {"empty": b"", "sub/also-empty": b"", "full": b"x"}
        uri = self._offer_all(remote, place, files)

        model = self._store(volume, remote, uri).ensure(uri, progress=False)

        assert _tree(model.path) == files

    def test_siblings_are_not_part_of_a_model(self, remote: Remote, volume: Path, place: str) -> None:
        """
        What begins with the same letters beside the model, or above it, stays out of it.
        """
        uri = self._offer_all(remote, place, FILES)
        for sibling in (
            f"{place}-2/config.json",
            f"{place}2/x/config.json",
            f"{place[:-1]}/config.json",
            f"{place}.d/config.json",
        ):
            remote.put(sibling, b"sibling")

        model = self._store(volume, remote, uri).ensure(uri, progress=False)

        assert _tree(model.path) == FILES

    def test_the_beginning_of_a_name_is_no_model(self, remote: Remote, subject: Backend, place: str) -> None:
        """
        A URI that only begins as a model does names nothing.
        """
        self._offer_all(remote, place, FILES)

        with pytest.raises(SourceNotFoundError):
            subject.resolve(parse_ref(remote.uri(place[:-1])))

    def test_patterns_choose_files(self, remote: Remote, subject: Backend, place: str) -> None:
        """
        Allowed and ignored patterns count for the listing, and make another version.
        """
        uri = self._offer_all(remote, place, FILES)

        part = subject.resolve(parse_ref(uri, allow_patterns=["weights/*"], ignore_patterns=["*/er/*"]))

        assert [str(f.entry.path) for f in part.files] == ["weights/a.bin"]

    def test_an_odd_name_arrives_unchanged(self, remote: Remote, volume: Path, place: str, odd_name: str) -> None:
        """
        A name that is unusual and harmless is kept, character by character, in listings and in requests.
        """
        files = {odd_name: odd_name.encode(), "plain": b"plain"}
        uri = self._offer_all(remote, place, files)

        model = self._store(volume, remote, uri).ensure(uri, progress=False)

        assert _tree(model.path) == files

    def test_a_hostile_name_is_refused(
        self, remote: Remote, subject: Backend, volume: Path, place: str, hostile_names: tuple[str, ...]
    ) -> None:
        """
        A name that a volume could not keep, or that leads out of the model, fails the whole model and writes nothing.
        """
        uri = self._offer_all(remote, place, {**dict.fromkeys(hostile_names, b"hostile"), "plain": b"plain"})
        around = sorted(volume.parent.iterdir())

        with pytest.raises(UnsafePathError):
            subject.resolve(parse_ref(uri))
        store = self._store(volume, remote, uri)
        with pytest.raises(UnsafePathError):
            store.ensure(uri, progress=False)

        assert uri not in store
        assert [p for p in volume.rglob("*") if p.is_file() and ".kserve-pvc" not in p.parts] == []
        assert sorted(volume.parent.iterdir()) == around
        assert not Path("/kserve-pvc-absolute").exists()

    def test_what_is_missing_is_not_found(self, remote: Remote, subject: Backend, volume: Path, place: str) -> None:
        """
        A URI under which there is nothing is told as such, and nothing is published.
        """
        uri = remote.uri(f"{place}/nothing/here")

        with pytest.raises(SourceNotFoundError):
            subject.resolve(parse_ref(uri))
        store = self._store(volume, remote, uri)
        with pytest.raises(SourceNotFoundError):
            store.ensure(uri, progress=False)

        assert uri not in store

    def test_a_revision_that_is_not_there_is_refused(self, remote: Remote, subject: Backend, place: str) -> None:
        """
        Nobody who asks for one version gets another.
        """
        uri, _ = self._offer(remote, place, b"weights")

        with pytest.raises((SourceNotFoundError, InvalidURIError)):
            subject.resolve(parse_ref(uri, revision="no-such-revision"))

    def test_refused_credentials_are_told(self, remote: Remote, volume: Path, place: str) -> None:
        """
        Wrong credentials are `SourceDeniedError`, at once and from a store.
        """
        if remote.denied_options is None:
            pytest.skip("the service refuses nobody")
        uri, _ = self._offer(remote, place, _WEIGHTS)

        with pytest.raises(SourceDeniedError):
            self._make(remote.denied_options).resolve(parse_ref(uri))
        store = self._store(volume, remote, uri, storage_options=remote.denied_options)
        with pytest.raises(SourceDeniedError):
            store.ensure(uri, progress=False)

        assert uri not in store

    def test_nobody_listening_is_told_in_time(self, remote: Remote, volume: Path, place: str) -> None:
        """
        A service that is not there is `SourceUnavailableError`, and soon.
        """
        if remote.unreachable_options is None:
            pytest.skip("the options cannot say where the service is")
        uri, _ = self._offer(remote, place, _WEIGHTS)
        store = self._store(
            volume, remote, uri, storage_options=remote.unreachable_options, stall_seconds=1, retry_seconds=1
        )
        started = time.monotonic()

        with pytest.raises(SourceUnavailableError):
            store.ensure(uri, progress=False)

        assert time.monotonic() - started < self.unreachable_seconds
        assert uri not in store

    @pytest.mark.parametrize("buffer_bytes", [1000, 65_536, 2_000_000])
    def test_a_range_is_exactly_what_was_asked_for(
        self, remote: Remote, subject: Backend, place: str, buffer_bytes: int
    ) -> None:
        """
        Ranges begin and end where they should, at both ends of a file and between, whatever the buffer.
        """
        uri, _ = self._offer(remote, place, _WEIGHTS)
        size = len(_WEIGHTS)
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

        found = {(start, stop): _read(subject, file, start, stop, buffer_bytes) for start, stop in ranges}

        assert [asked for asked, data in found.items() if data != _WEIGHTS[slice(*asked)]] == []

    def test_a_range_ends(self, remote: Remote, subject: Backend, place: str) -> None:
        """
        Behind the last byte that was asked for comes the end, even into a buffer with room for more.
        """
        uri, _ = self._offer(remote, place, _WEIGHTS)
        (file,) = subject.resolve(parse_ref(uri)).files

        with subject.open_range(file, 10, 1010) as reader:
            found = b"".join(_pieces(reader, 4096))

        assert found == _WEIGHTS[10:1010]

    @pytest.mark.parametrize("change", ["replaced", "made-shorter", "made-longer", "deleted"])
    def test_what_was_listed_is_read_or_nothing(
        self, remote: Remote, subject: Backend, place: str, change: str
    ) -> None:
        """
        Every range of an object that has changed since the listing is as it was listed, or `SourceChangedError`.
        """
        self._need("can_pin")
        uri, path = self._offer(remote, place, _WEIGHTS)
        size = len(_WEIGHTS)
        (file,) = subject.resolve(parse_ref(uri)).files

        _change(remote, path, change)

        for start, stop in ((0, size), (0, 1), (size // 2, size), (size - 1, size)):
            assert _read_or_changed(subject, file, start, stop) in (None, _WEIGHTS[start:stop]), (start, stop)

    @pytest.mark.parametrize("change", ["replaced", "deleted"])
    def test_a_change_inside_a_range_is_not_mixed_in(
        self, remote: Remote, subject: Backend, place: str, change: str
    ) -> None:
        """
        A range whose object changes under the reader goes on as it began, ends early, or is `SourceChangedError`.
        """
        self._need("can_pin")
        first = _WEIGHTS * 12
        uri, path = self._offer(remote, place, first)
        (file,) = subject.resolve(parse_ref(uri)).files
        found = bytearray()

        with suppress(SourceChangedError, SourceUnavailableError), subject.open_range(file, 0, len(first)) as reader:
            for piece in _pieces(reader, 1000):
                if not found:
                    _change(remote, path, change)
                found += piece

        assert first.startswith(bytes(found))
        rest = _read_or_changed(subject, file, len(found), len(first)) if len(found) < len(first) else b""
        assert rest in (None, first[len(found) :])

    @pytest.mark.parametrize("change", ["replaced", "deleted"])
    def test_a_change_between_two_ranges_is_not_published(
        self, remote: Remote, volume: Path, place: str, change: str
    ) -> None:
        """
        A download whose object changes half-way ends with `SourceChangedError` and nothing, or with exactly what was
        listed.
        """
        self._need("can_pin")
        uri, path = self._offer(remote, place, _WEIGHTS)

        def change_at_the_third(number: int) -> None:
            if number == 3:
                _change(remote, path, change)

        watched = _Watched(self._make(remote.storage_options), change_at_the_third)
        store = self._store(volume, remote, uri, backend=watched)

        if self.has_versions:
            assert _tree(store.ensure(uri, progress=False, max_workers=1).path) == {"weights.bin": _WEIGHTS}
            return
        with pytest.raises(SourceChangedError):
            store.ensure(uri, progress=False, max_workers=1)
        assert uri not in store
        if change == "replaced":
            assert _tree(self._store(volume, remote, uri).ensure(uri, progress=False).path) == {"weights.bin": _OTHERS}

    def test_a_big_file_is_fetched_in_ranges(self, remote: Remote, volume: Path, place: str) -> None:
        """
        Several workers fetch a big file in ranges that touch and do not overlap, and what the source vouches for is
        true.
        """
        data = random.Random(5).randbytes(self.big_bytes)
        uri, _ = self._offer(remote, place, data)
        watched = _Watched(self._make(remote.storage_options))

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
        A digest that the back end asks the source for is the digest of the bytes.
        """
        if not isinstance(subject, SupportsEvidence):
            pytest.skip("the back end has no `evidence`")
        uri, _ = self._offer(remote, place, _WEIGHTS)
        (file,) = subject.resolve(parse_ref(uri)).files

        assert _vouches(subject, subject.evidence(file), _WEIGHTS)

    def test_many_small_files_are_all_there(
        self, remote: Remote, volume: Path, place: str, number_of_files: int
    ) -> None:
        """
        A model of very many small files is complete and exact, and was listed as what it is.
        """
        self._need("has_trees")
        files = {f"part-{number // 500:03}/{number:05}.txt": b"%d" % (number * 7) for number in range(number_of_files)}
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda item: remote.put(f"{place}/{item[0]}", item[1]), files.items()))
        uri = remote.uri(place)

        model = self._store(volume, remote, uri).ensure(uri, progress=False)

        assert _tree(model.path) == files

    def test_a_killed_download_is_resumed(self, remote: Remote, volume: Path, place: str) -> None:
        """
        After `kill -9` half-way another process finishes the download; what was there already is not fetched again.
        """
        self._need("is_shared")
        uri, _ = self._offer(remote, place, _WEIGHTS)
        (file,) = self._make(remote.storage_options).resolve(parse_ref(uri)).files

        _kill_half_way(type(self).backend, dict(remote.storage_options), uri, volume)
        store = self._store(volume, remote, uri)
        assert uri not in store
        model = store.ensure(uri, progress=False, timeout=120)

        assert _tree(model.path) == {"weights.bin": _WEIGHTS}
        assert model.status == "downloaded"
        # Without a token nothing says that both processes read the same.
        assert model.bytes_fetched <= len(_WEIGHTS) - 3 * PART_BYTES or file.entry.token is None

    def test_giving_up_leaves_nothing_behind(self, remote: Remote, place: str) -> None:
        """
        Readers that are left in the middle, in order or by an exception, leave neither threads nor descriptors once the
        back end is closed.
        """
        uri, _ = self._offer(remote, place, _WEIGHTS * 6)

        def give_up(times: int) -> None:
            backend = self._make(remote.storage_options)
            (file,) = backend.resolve(parse_ref(uri)).files
            for _ in range(times):
                with suppress(KeyboardInterrupt), backend.open_range(file, 0, file.entry.size_bytes) as reader:
                    next(_pieces(reader, 1000))
                    raise KeyboardInterrupt
                with backend.open_range(file, 0, file.entry.size_bytes):
                    pass
            _close(backend)

        give_up(1)  # What is loaded once and for all is no leak.
        before = _until_settled()
        give_up(5)

        _until(
            lambda: all(now <= then for now, then in zip(_resources(), before, strict=True)),
            f"{before} before",
            self.patience_seconds,
        )

    def test_a_download_that_fails_leaves_no_thread(self, remote: Remote, volume: Path, place: str) -> None:
        """
        If a worker fails, all stop; nothing is published, and the next call is as good as the first.
        """

        def fail(number: int) -> None:
            if number > 3:
                raise SourceUnavailableError(uri, "cancelled", is_final=True)

        uri, _ = self._offer(remote, place, _WEIGHTS)
        store = self._store(volume, remote, uri, backend=_Watched(self._make(remote.storage_options), fail))

        with pytest.raises(SourceUnavailableError, match="cancelled"):
            store.ensure(uri, progress=False, max_workers=4)

        assert uri not in store
        _until(lambda: not _our_threads(), "no thread of ours", self.patience_seconds)
        assert _tree(self._store(volume, remote, uri).ensure(uri, progress=False).path) == {"weights.bin": _WEIGHTS}

    def test_eight_threads_share_one_back_end(self, remote: Remote, subject: Backend, place: str) -> None:
        """
        Eight threads that list and read at the same time each get what is theirs.
        """
        uri, _ = self._offer(remote, place, _WEIGHTS)
        start_together = threading.Barrier(8)

        def use(number: int) -> bool:
            start_together.wait(60)
            (file,) = subject.resolve(parse_ref(uri)).files
            ranges = [(k * 50_000, k * 50_000 + 70_000) for k in range(number, number + 5)]
            return all(_read(subject, file, start, stop) == _WEIGHTS[start:stop] for start, stop in ranges)

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(use, range(8))) == [True] * 8

    def test_closing_is_harmless(self, remote: Remote, subject: Backend, place: str) -> None:
        """
        `close` may be called at any time and twice, and whoever goes on is served.
        """
        if not hasattr(subject, "close"):
            pytest.skip("the back end has no `close`")
        uri, _ = self._offer(remote, place, _WEIGHTS)
        subject.close()
        (file,) = subject.resolve(parse_ref(uri)).files
        subject.close()
        subject.close()

        assert _read(subject, file, 5, 5000) == _WEIGHTS[5:5000]

    def test_secrets_are_never_shown(
        self,
        remote: Remote,
        volume: Path,
        place: str,
        caplog: pytest.LogCaptureFixture,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        """
        What is secret among the options is in no error, traceback, log record, output or `repr`, and nowhere on the
        volume.
        """
        options = [
            o for o in (remote.storage_options, remote.denied_options, remote.unreachable_options) if o is not None
        ]
        secrets = sorted({*self.secrets, *(secret for each in options for secret in _secrets(each))})
        if not secrets:
            pytest.skip("no option has a name that sounds secret, and `secrets` names none")
        uri, path = self._offer(remote, place, _WEIGHTS)
        shown = []

        for each in options:
            for wanted in (uri, remote.uri(f"{place}/nothing/here")):
                shown += self._what_is_shown(volume, remote, wanted, each, caplog)
        _change(remote, path, "replaced")
        shown += self._what_is_shown(volume, remote, uri, remote.storage_options, caplog)
        shown += capfd.readouterr()
        kept = [p.read_bytes().decode("latin-1") for p in volume.rglob("*") if p.is_file()] + [
            str(p) for p in volume.rglob("*")
        ]

        assert [(secret, text[:200]) for secret in secrets for text in shown + kept if secret in text] == []

    def _what_is_shown(
        self, volume: Path, remote: Remote, uri: str, options: Mapping[str, Any], caplog: pytest.LogCaptureFixture
    ) -> list[str]:
        """Fetch something and return every text that could be seen while doing so."""
        store = self._store(volume, remote, uri, storage_options=options, stall_seconds=1, retry_seconds=1)
        shown = [repr(store), repr(self._make(options))]
        caplog.clear()
        with caplog.at_level(self.log_level):
            try:
                shown += [
                    repr(store.resolve(uri)),
                    repr(store.ensure(uri, force_download=True)),
                    repr(store.get(uri).record),
                ]
            except StoreError as error:
                facts = json.dumps(error.fields, default=repr)
                shown += [str(error), repr(error), facts, repr(pickle.dumps(error)), *traceback.format_exception(error)]
        return [*shown, caplog.text]


class _Watched:
    """
    A back end that says what is asked of it before it does it.
    """

    def __init__(self, inner: Backend, before_range: Callable[[int], object] = lambda number: None) -> None:
        self._inner = inner
        self._before_range = before_range
        self._guard = threading.Lock()
        self.ranges: list[tuple[int, int]] = []
        for name in ABILITIES:
            if hasattr(inner, name):
                setattr(self, name, getattr(inner, name))

    def resolve(self, ref: ModelRef) -> Resolved:
        return self._inner.resolve(ref)

    def open_range(self, file: RemoteFile, start: int, stop: int) -> AbstractContextManager[RangeReader]:
        with self._guard:
            self.ranges.append((start, stop))
            number = len(self.ranges)
        self._before_range(number)
        return self._inner.open_range(file, start, stop)


def _named(cls: type[BackendConformance], short: str, value: object) -> Any:
    why = cls.cannot_hold.get(short)
    marks = [] if why is None else [pytest.mark.skip(reason=f"`{cls.__name__}` cannot hold it: {why}")]
    return pytest.param(value, id=short, marks=marks)


def _close(backend: Backend) -> None:
    if isinstance(backend, SupportsClose):
        backend.close()


def _change(remote: Remote, path: str, change: str) -> None:
    if change == "deleted":
        remote.delete(path)
    else:
        remote.put(path, {"replaced": _OTHERS, "made-shorter": _OTHERS[:-300_000], "made-longer": _OTHERS * 2}[change])


def _pieces(reader: RangeReader, buffer_bytes: int, patience: float = 60.0) -> Iterator[bytes]:
    """
    What an answer brings, until it is over.
    """
    buffer, deadline = memoryview(bytearray(buffer_bytes)), time.monotonic() + patience
    while (count := reader.readinto(buffer)) != 0:
        if count is not None:
            assert 0 < count <= len(buffer)
            yield bytes(buffer[:count])
        assert time.monotonic() < deadline, "nothing came for too long"


def _read(backend: Backend, file: RemoteFile, start: int, stop: int, buffer_bytes: int = 65_536) -> bytes:
    with backend.open_range(file, start, stop) as reader:
        return b"".join(_pieces(reader, buffer_bytes))


def _read_or_changed(backend: Backend, file: RemoteFile, start: int, stop: int) -> bytes | None:
    try:
        return _read(backend, file, start, stop)
    except SourceChangedError:
        return None


def _vouches(backend: Backend, digest: str | None, data: bytes) -> bool:
    """
    Whether a digest, as `name:hex`, is that of some bytes; no digest is as good.
    """
    if digest is None:
        return True
    name, _, value = digest.partition(":")
    if name in ("md5", "sha256"):
        return hashlib.new(name, data, usedforsecurity=False).hexdigest() == value
    if name == "crc32":
        return f"{zlib.crc32(data):08x}" == value
    checksum = backend.checksum(name) if isinstance(backend, SupportsChecksums) else None
    if checksum is None:
        return False
    checksum.update(memoryview(data))
    return bool(checksum.hexdigest() == value)


def _tree(place: Path) -> dict[str, bytes]:
    return {path.relative_to(place).as_posix(): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def _secrets(options: object, name: str = "") -> Iterator[str]:
    """
    Every text among options whose name sounds secret.
    """
    if isinstance(options, Mapping):
        for key, value in options.items():
            yield from _secrets(value, str(key).lower())
    elif isinstance(options, str) and len(options) > 5 and any(word in name for word in _SECRET_WORDS):
        yield options


def _resources() -> tuple[int, int]:
    """
    How many threads and descriptors this process has.
    """
    gc.collect()
    descriptors = Path("/proc/self/fd")
    return threading.active_count(), len(os.listdir(descriptors)) if descriptors.exists() else 0


def _our_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("kserve-pvc-")]


def _until_settled() -> tuple[int, int]:
    """
    What there is once that has stayed the same for a moment: whoever is on the way out has left.
    """
    found, since = _resources(), time.monotonic()
    while time.monotonic() - since < 0.3:
        time.sleep(0.05)
        if (now := _resources()) != found:
            found, since = now, time.monotonic()
    return found


def _until(condition: Callable[[], bool], wish: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{wish}, and now {_resources()}: {threading.enumerate()}"
        time.sleep(0.05)


@contextmanager
def _child(payload: bytes) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", f"from {__name__} import _fetch_and_stop; _fetch_and_stop()"]
    # Where this process finds the package, its child does too.
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ
    )
    guard = threading.Timer(120, child.kill)
    guard.start()
    try:
        assert child.stdin is not None
        child.stdin.write(payload)
        child.stdin.close()
        yield child
    finally:
        guard.cancel()
        guard.join()
        child.kill()
        child.wait()
        for stream in (child.stdout, child.stderr):
            if stream is not None:
                stream.close()


def _kill_half_way(backend: BackendFactory, options: Mapping[str, Any], uri: str, volume: Path) -> None:
    with _child(pickle.dumps((backend, options, uri, str(volume)))) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        if child.stdout.readline() != b"half-way\n":
            child.kill()
            raise AssertionError(f"the child did not get half-way:\n{child.stderr.read().decode(errors='replace')}")


def _fetch_and_stop() -> None:
    """
    Be the process that is killed: fetch a model, and stop for good when the fifth range would begin.
    """
    backend, options, uri, volume = pickle.load(sys.stdin.buffer)

    def stop(number: int) -> None:
        if number > 4:
            print("half-way", flush=True)
            threading.Event().wait()

    ref, watched = parse_ref(uri), _Watched(backend(options), stop)
    store = ModelStore(
        volume,
        mode="rw",
        backends={ref.scheme: lambda options: watched},
        part_bytes=PART_BYTES,
        lease_seconds=_LEASE_SECONDS,
    )
    store.ensure(uri, progress=False, max_workers=1)
