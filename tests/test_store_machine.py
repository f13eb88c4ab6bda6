"""
A store does what a dictionary does, whatever the order of calls, and whichever of its objects is asked.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from memory import MemorySource
from trees import read_tree

from kserve_pvc import ModelNotFoundError, ModelStore, SourceNotFoundError

URIS = [f"s3://bucket/model-{number}" for number in range(3)]
CONTENTS = st.dictionaries(
    st.sampled_from(["config.json", "a/b.bin", "a/c.bin", "empty"]), st.binary(max_size=300), min_size=1, max_size=4
)
uris = st.sampled_from(URIS)


class StoreMachine(RuleBasedStateMachine):
    """
    The store against a dictionary of what it holds; the source against a dictionary of what can be fetched.
    """

    def __init__(self) -> None:
        super().__init__()
        self.place = Path(tempfile.mkdtemp())
        self.source = MemorySource({})
        self.stores = [ModelStore(self.place, mode="rw", backends={"s3": self.source}, part_bytes=64) for _ in range(2)]
        self.reader = ModelStore(self.place)
        self.held: dict[str, dict[str, bytes]] = {}

    def teardown(self) -> None:
        shutil.rmtree(self.place)

    @rule(uri=uris, files=CONTENTS)
    def upload(self, uri: str, files: dict[str, bytes]) -> None:
        self.source.models[uri] = files

    @rule(uri=uris)
    def take_offline(self, uri: str) -> None:
        self.source.models.pop(uri, None)

    @rule(uri=uris, which=st.integers(0, 1), how=st.sampled_from(["plain", "refresh", "force_download"]))
    def ensure(self, uri: str, which: int, how: str) -> None:
        options = {} if how == "plain" else {how: True}
        before = self.source.bytes_read
        offered = self.source.models.get(uri)
        if offered is None and (how != "plain" or uri not in self.held):
            with pytest.raises(SourceNotFoundError):
                self.stores[which].ensure(uri, progress=False, **options)
            return
        model = self.stores[which].ensure(uri, progress=False, **options)
        if how == "force_download" or uri not in self.held or (how == "refresh" and self.held[uri] != offered):
            assert model.status == "downloaded"
            assert self.source.bytes_read - before == sum(map(len, offered.values()))
            self.held[uri] = dict(offered)
        else:
            assert (model.status, self.source.bytes_read) == ("present", before)
        assert read_tree(model.path) == self.held[uri]

    @rule(uri=uris, which=st.integers(0, 1))
    def remove(self, uri: str, which: int) -> None:
        if self.held.pop(uri, None) is None:
            with pytest.raises(ModelNotFoundError):
                self.stores[which].remove(uri)
        else:
            self.stores[which].remove(uri, trash_seconds=0)

    @rule(uri=uris)
    def read_inside_a_lease(self, uri: str) -> None:
        if uri in self.held:
            with self.stores[0].open(uri) as model:
                assert read_tree(model.path) == self.held[uri]

    @rule()
    def reopen(self) -> None:
        self.stores[1] = ModelStore(self.place, mode="rw", backends={"s3": self.source}, part_bytes=64)

    @invariant()
    def everybody_sees_the_same(self) -> None:
        for store in (*self.stores, self.reader):
            assert {model.uri for model in store.list()} == set(self.held)
            for uri in URIS:
                assert (uri in store) == (uri in self.held)

    @invariant()
    def everything_verifies(self) -> None:
        assert all(report.ok for report in self.reader.verify_all("full"))

    @invariant()
    def nothing_is_left_over(self) -> None:
        for name in ("staging", "trash"):
            place = self.place / ".kserve-pvc" / name
            assert not place.exists() or list(place.iterdir()) == []


StoreMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestStoreMachine = StoreMachine.TestCase
