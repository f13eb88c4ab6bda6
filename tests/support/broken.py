"""
Back ends that are wrong in one way each, under the conformance suite: it has to notice every one of them.

pytest does not find this file by its name. `test_conformance.py` hands it over, test by test.
"""

from __future__ import annotations

import io
import os
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import attrs
import pytest
from remotes import DirectoryRemote, MemoryBackend, MemoryRemote

from kserve_pvc import ModelRef, RangeReader, RemoteFile, Resolved, SourceDeniedError, SourceNotFoundError
from kserve_pvc.backends.file import FileBackend
from kserve_pvc.testing import BackendConformance


class Secretive(MemoryRemote):
    """
    Objects in memory, for those who know a password.
    """

    def __init__(self) -> None:
        super().__init__()
        self.storage_options = {**self.storage_options, "password": "canary-of-the-right-one"}
        self.denied_options = {**self.storage_options, "password": "canary-of-the-wrong-one"}


class Right(MemoryBackend):
    """
    Nothing is wrong with it.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self._password = options["password"]

    def resolve(self, ref: ModelRef) -> Resolved:
        if self._password != "canary-of-the-right-one":
            raise SourceDeniedError(ref.uri, self.refusal())
        return super().resolve(ref)

    def refusal(self) -> str:
        return "the password is wrong"

    def evidence(self, file: RemoteFile) -> str:
        return f"md5:{self.token(self._objects[file.address])}"

    def close(self) -> None:
        pass


class Unpinned(Right):
    @contextmanager
    def open_range(self, file: RemoteFile, start: int, stop: int) -> Iterator[io.BytesIO]:
        yield io.BytesIO(self._objects.get(file.address, b"")[start:stop])


class OneByteShort(Right):
    @contextmanager
    def open_range(self, file: RemoteFile, start: int, stop: int) -> Iterator[io.BytesIO]:
        with super().open_range(file, start, stop - (stop - start > 50_000)) as reader:
            yield reader


class GoesOn(Right):
    @contextmanager
    def open_range(self, file: RemoteFile, start: int, stop: int) -> Iterator[io.BytesIO]:
        with super().open_range(file, start, stop + 1) as reader:
            yield reader


class TakesSiblings(Right):
    def resolve(self, ref: ModelRef) -> Resolved:
        siblings = [
            name for name in self._objects if name.startswith(ref.location) and not name.startswith(ref.location + "/")
        ]
        files = (self._file(name, f"{number}.sibling") for number, name in enumerate(siblings))
        found = super().resolve(ref)
        return attrs.evolve(found, files=(*found.files, *files))


class DropsEmpty(Right):
    def resolve(self, ref: ModelRef) -> Resolved:
        found = super().resolve(ref)
        return attrs.evolve(found, files=tuple(f for f in found.files if f.entry.size_bytes))


class CleansNames(Right):
    def _inside(self, name: str, location: str) -> str:
        inside = super()._inside(name, location).replace("\\", "/").replace(" ", "_")
        return str(PurePosixPath(*(part for part in PurePosixPath("/" + inside).parts if part not in ("/", "..", "."))))


class SwallowsWhatIsMissing(Right):
    def resolve(self, ref: ModelRef) -> Resolved:
        try:
            return super().resolve(ref)
        except SourceNotFoundError:
            return Resolved(ref=ref, version="none", files=())


class AnotherVersionEachTime(Right):
    def resolve(self, ref: ModelRef) -> Resolved:
        return attrs.evolve(super().resolve(ref), version=uuid.uuid4().hex)


class TheSameVersionEachTime(Right):
    def resolve(self, ref: ModelRef) -> Resolved:
        return attrs.evolve(super().resolve(ref), version="latest")


class IgnoresPatterns(Right):
    def resolve(self, ref: ModelRef) -> Resolved:
        return super().resolve(attrs.evolve(ref, allow_patterns=None, ignore_patterns=()))


class IgnoresRevisions(Right):
    def resolve(self, ref: ModelRef) -> Resolved:
        return super().resolve(attrs.evolve(ref, revision=None))


class LeavesThreads(Right):
    @contextmanager
    def open_range(self, file: RemoteFile, start: int, stop: int) -> Iterator[io.BytesIO]:
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        with super().open_range(file, start, stop) as reader:
            yield reader


class LeavesDescriptors(Right):
    @contextmanager
    def open_range(self, file: RemoteFile, start: int, stop: int) -> Iterator[io.BytesIO]:
        os.open("/dev/null", os.O_RDONLY)
        with super().open_range(file, start, stop) as reader:
            yield reader


class SharesItsPlace(Right):
    start = 0

    @contextmanager
    def open_range(self, file: RemoteFile, start: int, stop: int) -> Iterator[io.BytesIO]:
        self.start = start
        threading.Event().wait(0.001)
        with super().open_range(file, self.start, self.start + stop - start) as reader:
            yield reader


class TellsSecrets(Right):
    def refusal(self) -> str:
        return f"`{self._password}` is wrong"


class KeepsSecrets(Right):
    def token(self, data: bytes) -> str:
        return super().token(data) + self._password


class LiesAboutDigests(Right):
    def evidence(self, file: RemoteFile) -> str:
        return "md5:" + "0" * 32


class SetsTheEnvironment(Right):
    def resolve(self, ref: ModelRef) -> Resolved:
        os.environ["BROKEN_PASSWORD"] = "set"
        return super().resolve(ref)


class ClosesOnce(Right):
    is_closed = False

    def close(self) -> None:
        if self.is_closed:
            raise RuntimeError("closed already")
        self.is_closed = True


class AnotherTokenInEachProcess:
    """
    Models on this machine, so that another process can read them; what the other has fetched is then unknown to this
    one.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._files = FileBackend(options)

    def resolve(self, ref: ModelRef) -> Resolved:
        found = self._files.resolve(ref)
        return attrs.evolve(
            found, files=tuple(self._with_token(f, f"{os.getpid()}-{f.entry.token}") for f in found.files)
        )

    def open_range(self, file: RemoteFile, start: int, stop: int) -> AbstractContextManager[RangeReader]:
        return self._files.open_range(self._with_token(file, file.pin["inode"]), start, stop)

    def _with_token(self, file: RemoteFile, token: str) -> RemoteFile:
        return attrs.evolve(file, entry=attrs.evolve(file.entry, token=token))


class _Suite(BackendConformance):
    is_shared = False
    many_files = 0
    patience_seconds = 2.0

    @pytest.fixture
    def remote(self) -> Secretive:
        return Secretive()

    @pytest.fixture(autouse=True)
    def _same_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("BROKEN_PASSWORD", raising=False)


# What is wrong, and the test that has to say so.
NOTICED = {
    Unpinned: "test_what_was_listed_is_read_or_nothing[replaced]",
    OneByteShort: "test_a_range_is_exactly_what_was_asked_for[65536]",
    GoesOn: "test_a_range_ends",
    TakesSiblings: "test_siblings_are_not_part_of_a_model",
    DropsEmpty: "test_an_empty_object_is_a_file",
    CleansNames: "test_a_hostile_name_is_refused[climbs]",
    SwallowsWhatIsMissing: "test_what_is_missing_is_not_found",
    AnotherVersionEachTime: "test_a_listing_is_the_same_each_time",
    TheSameVersionEachTime: "test_a_change_makes_another_version",
    IgnoresPatterns: "test_patterns_choose_files",
    IgnoresRevisions: "test_a_revision_that_is_not_there_is_refused",
    LeavesThreads: "test_giving_up_leaves_nothing_behind",
    LeavesDescriptors: "test_giving_up_leaves_nothing_behind",
    SharesItsPlace: "test_eight_threads_share_one_back_end",
    TellsSecrets: "test_secrets_are_never_shown",
    KeepsSecrets: "test_secrets_are_never_shown",
    LiesAboutDigests: "test_evidence_is_true",
    SetsTheEnvironment: "test_a_tree_is_fetched_as_it_is",
    ClosesOnce: "test_closing_is_harmless",
    AnotherTokenInEachProcess: "test_a_killed_download_is_resumed",
}
for _wrong in (Right, *(kind for kind in NOTICED if issubclass(kind, Right))):
    globals()[f"Test{_wrong.__name__}"] = type(f"Test{_wrong.__name__}", (_Suite,), {"backend": _wrong})


class TestAnotherTokenInEachProcess(BackendConformance):
    backend = AnotherTokenInEachProcess

    @pytest.fixture
    def remote(self, tmp_path: Path) -> DirectoryRemote:
        return DirectoryRemote(tmp_path / "source", "file")
