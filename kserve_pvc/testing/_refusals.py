"""
Conformance tests of errors, and of what must not be in them.
"""

from __future__ import annotations

import json
import pickle
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from kserve_pvc._source.contract import (
    Backend,
)
from kserve_pvc._source.ref import parse_ref
from kserve_pvc.errors import (
    InvalidURIError,
    SourceDeniedError,
    SourceNotFoundError,
    SourceUnavailableError,
    StoreError,
    UnsafePathError,
)
from kserve_pvc.testing._backends import (
    change_object,
)
from kserve_pvc.testing._base import ConformanceBase
from kserve_pvc.testing._remote import (
    WEIGHTS,
    Remote,
)

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


class RefusalConformance(ConformanceBase):
    """
    What a backend refuses, how its errors are typed, and that they hold no secrets.
    """

    def test_a_hostile_name_is_refused(
        self, remote: Remote, subject: Backend, volume: Path, place: str, hostile_names: tuple[str, ...]
    ) -> None:
        """
        A name that a volume cannot store, or that leads out of the model, fails the whole model and writes nothing.
        """
        uri = self._put_tree(remote, place, {**dict.fromkeys(hostile_names, b"hostile"), "plain": b"plain"})
        around = sorted(volume.parent.iterdir())

        with pytest.raises(UnsafePathError):
            subject.resolve(parse_ref(uri))
        store = self._store(volume, remote, uri)
        with pytest.raises(UnsafePathError):
            store.ensure(uri, progress=False)

        assert uri not in store
        assert [p for p in volume.rglob("*") if p.is_file() and ".kserve-pvc" not in p.parts] == []
        assert sorted(volume.parent.iterdir()) == around

    def test_what_is_missing_is_not_found(self, remote: Remote, subject: Backend, volume: Path, place: str) -> None:
        """
        A URI without objects raises `SourceNotFoundError`, and nothing is published.
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
        A request for an unknown revision never returns another one.
        """
        uri, _ = self._put_file(remote, place, b"weights")

        with pytest.raises((SourceNotFoundError, InvalidURIError)):
            subject.resolve(parse_ref(uri, revision="no-such-revision"))

    def test_refused_credentials_are_told(self, remote: Remote, volume: Path, place: str) -> None:
        """
        Wrong credentials raise `SourceDeniedError`, in the backend and in a store.
        """
        if remote.denied_options is None:
            pytest.skip("the service refuses no credentials")
        uri, _ = self._put_file(remote, place, WEIGHTS)

        with pytest.raises(SourceDeniedError):
            self._make_backend(remote.denied_options).resolve(parse_ref(uri))
        store = self._store(volume, remote, uri, storage_options=remote.denied_options)
        with pytest.raises(SourceDeniedError):
            store.ensure(uri, progress=False)

        assert uri not in store

    def test_nobody_listening_is_told_in_time(self, remote: Remote, volume: Path, place: str) -> None:
        """
        An unreachable service raises `SourceUnavailableError` in time.
        """
        if remote.unreachable_options is None:
            pytest.skip("the options cannot address another endpoint")
        uri, _ = self._put_file(remote, place, WEIGHTS)
        store = self._store(
            volume, remote, uri, storage_options=remote.unreachable_options, stall_seconds=1, retry_seconds=1
        )
        started = time.monotonic()

        with pytest.raises(SourceUnavailableError):
            store.ensure(uri, progress=False)

        assert time.monotonic() - started < self.unreachable_seconds
        assert uri not in store

    def test_secrets_are_never_shown(
        self,
        remote: Remote,
        volume: Path,
        place: str,
        caplog: pytest.LogCaptureFixture,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        """
        Secrets among the options are in no error, traceback, log record, output or `repr`, and not on the volume.
        """
        options = [
            o for o in (remote.storage_options, remote.denied_options, remote.unreachable_options) if o is not None
        ]
        secrets = sorted({*self.secrets, *(secret for each in options for secret in find_secrets(each))})
        if not secrets:
            pytest.skip("no option has the name of a secret, and `secrets` is empty")
        uri, path = self._put_file(remote, place, WEIGHTS)
        shown = []

        for each in options:
            for requested in (uri, remote.uri(f"{place}/nothing/here")):
                shown += self._capture_output(volume, remote, requested, each, caplog)
        change_object(remote, path, "replaced")
        shown += self._capture_output(volume, remote, uri, remote.storage_options, caplog)
        shown += capfd.readouterr()
        kept = [p.read_bytes().decode("latin-1") for p in volume.rglob("*") if p.is_file()] + [
            str(p) for p in volume.rglob("*")
        ]

        assert [(secret, text[:200]) for secret in secrets for text in shown + kept if secret in text] == []

    def _capture_output(
        self, volume: Path, remote: Remote, uri: str, options: Mapping[str, Any], caplog: pytest.LogCaptureFixture
    ) -> list[str]:
        """Download a model and return every string that the caller could see."""
        store = self._store(volume, remote, uri, storage_options=options, stall_seconds=1, retry_seconds=1)
        shown = [repr(store), repr(self._make_backend(options))]
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


def find_secrets(options: object, name: str = "") -> Iterator[str]:
    """
    Yield every option whose name is typical of a secret.
    """
    if isinstance(options, Mapping):
        for key, value in options.items():
            yield from find_secrets(value, str(key).lower())
    elif isinstance(options, str) and len(options) > 5 and any(word in name for word in _SECRET_WORDS):
        yield options
