"""
Models on another claim that is mounted here too.
"""

from __future__ import annotations

import pytest
from trees import model_files, read_tree, write_files

from kserve_pvc import InvalidURIError, ModelStore, SettingsError, SourceNotFoundError, UnsafePathError
from kserve_pvc._source.ref import parse_ref
from kserve_pvc.backends.pvc import CLAIMS, PvcBackend

FILES = model_files(seed=3)


@pytest.fixture
def claim(tmp_path):
    """
    A mounted claim that holds a model.
    """
    place = tmp_path / "claim"
    write_files(place / "team" / "model", FILES)
    return place


def test_a_model_is_copied_from_a_mounted_claim(root, claim):
    """
    The record names the claim as KServe does, whatever directory it is mounted at.
    """
    store = ModelStore(root, mode="rw", storage_options={"claims": {"models": claim}})
    model = store.ensure("pvc://models/team/model", progress=False)

    assert read_tree(model.path) == FILES
    assert (model.uri, model.record.uri) == ("pvc://models/team/model", "pvc://models/team/model")
    assert store.verify(model.uri, level="full").ok


def test_the_environment_says_where_claims_are_mounted(root, claim, monkeypatch):
    """
    Several claims are separated by commas; what an option says wins.
    """
    monkeypatch.setenv(CLAIMS, f"other=/nowhere, models={claim},")
    from_environment = ModelStore(root).resolve("pvc://models/team/model/")
    named = PvcBackend({"claims": {"x": claim}}).resolve(parse_ref("pvc://x/team/model"))

    assert [f.entry for f in from_environment.files] == [f.entry for f in named.files]
    assert from_environment.version == named.version


@pytest.mark.parametrize("uri", ["pvc://unknown/team/model", "pvc:///team/model", "pvc://"])
def test_a_claim_that_nobody_named_is_refused_with_the_known_ones(claim, uri):
    """
    Nothing is guessed about where a claim may be mounted.
    """
    with pytest.raises(
        InvalidURIError, match=r"no mount is set for the claim `.*`; set are `models`; add it to `KSERVE_PVC_CLAIMS`"
    ):
        PvcBackend({"claims": {"models": claim}}).resolve(parse_ref(uri))


@pytest.mark.parametrize("path", ["../secret", "team/../../secret", "out/secret", "out"])
def test_nothing_outside_of_a_claim_is_read(claim, path):
    """
    Neither dots nor a link that somebody planted on the claim lead out of it.
    """
    write_files(claim.parent / "secret", {"key": b"private"})
    (claim / "out").symlink_to(claim.parent)
    with pytest.raises(UnsafePathError):
        PvcBackend({"claims": {"models": claim}}).resolve(parse_ref(f"pvc://models/{path}"))


@pytest.mark.parametrize("alias", ["latest", "latest/", "team/../latest"])
def test_an_alias_inside_of_a_claim_is_followed(claim, alias):
    """
    A link to a directory of the same claim is its own business; dots are refused all the same.
    """
    (claim / "latest").symlink_to("team/model")
    backend = PvcBackend({"claims": {"models": claim}})
    if ".." in alias:
        with pytest.raises(UnsafePathError):
            backend.resolve(parse_ref(f"pvc://models/{alias}"))
        return

    assert sorted(str(f.entry.path) for f in backend.resolve(parse_ref(f"pvc://models/{alias}")).files) == sorted(FILES)


def test_what_is_not_there_is_told(claim):
    """
    A claim without the path is as a bucket without the prefix.
    """
    with pytest.raises(SourceNotFoundError):
        PvcBackend({"claims": {"models": claim}}).resolve(parse_ref("pvc://models/nothing"))


@pytest.mark.parametrize("claims", [{"a": "relative"}, {"": "/mnt"}, {"a/b": "/mnt"}, "a=/mnt", 5], ids=str)
def test_settings_that_mean_nothing_are_refused(claims):
    """
    The error says how it is written.
    """
    with pytest.raises(SettingsError):
        PvcBackend({"claims": claims})


@pytest.mark.parametrize("text", ["a", "a=b", "=/mnt", "a=/mnt,b"])
def test_a_variable_that_means_nothing_is_refused(monkeypatch, text):
    """
    The same holds for the environment.
    """
    monkeypatch.setenv(CLAIMS, text)
    with pytest.raises(SettingsError, match=CLAIMS):
        PvcBackend({})
