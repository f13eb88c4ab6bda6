"""
The settings, fixtures and helper methods that all parts of the conformance suite share.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from kserve_pvc._source.contract import (
    Backend,
    BackendFactory,
)
from kserve_pvc._source.ref import parse_ref
from kserve_pvc._store import ModelStore
from kserve_pvc.testing._backends import (
    close_backend,
)
from kserve_pvc.testing._remote import (
    HOSTILE_NAMES,
    LEASE_SECONDS,
    ODD_NAMES,
    PART_BYTES,
    Remote,
)


class ConformanceBase:
    """
    What all parts of the suite share. The settings are documented in `BackendConformance`.
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
        Put the number of files and the names into the test ids, and skip what the service cannot hold.
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
        Return a unique path for the model of a test.
        """
        return f"{uuid.uuid4().hex[:12]}/model"

    @pytest.fixture
    def subject(self, remote: Remote) -> Iterator[Backend]:
        """
        Create the backend as a store does.
        """
        backend = self._make_backend(remote.storage_options)
        yield backend
        close_backend(backend)

    @pytest.fixture
    def volume(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """
        Return an empty directory for a store.
        """
        return tmp_path_factory.mktemp("volume")

    def _make_backend(self, options: Mapping[str, Any]) -> Backend:
        return type(self).backend(options)

    def _store(
        self, volume: Path, remote: Remote, uri: str, *, backend: Backend | None = None, **arguments: Any
    ) -> ModelStore:
        ref, factory = parse_ref(uri), type(self).backend if backend is None else lambda options: backend
        chosen = {
            "storage_options": remote.storage_options,
            "part_bytes": PART_BYTES,
            "lease_seconds": LEASE_SECONDS,
            **arguments,
        }
        return ModelStore(volume, mode="rw", backends={ref.scheme: factory}, **chosen)

    def _require(self, *names: str) -> None:
        for name in names:
            if not getattr(self, name):
                pytest.skip(f"`{type(self).__name__}.{name}` is not set")

    def _put_file(self, remote: Remote, place: str, data: bytes) -> tuple[str, str]:
        """Put a model of one object. Return its URI and the path of the object."""
        path = f"{place}/weights.bin"
        remote.put(path, data)
        return remote.uri(place if self.has_trees else path), path

    def _put_tree(self, remote: Remote, place: str, files: Mapping[str, bytes]) -> str:
        self._require("has_trees")
        for name, data in files.items():
            remote.put(f"{place}/{name}", data)
        return remote.uri(place)


def _named(cls: type[ConformanceBase], short: str, value: object) -> Any:
    why = cls.cannot_hold.get(short)
    marks = [] if why is None else [pytest.mark.skip(reason=f"`{cls.__name__}` cannot store it: {why}")]
    return pytest.param(value, id=short, marks=marks)
