"""
Links in sources that are directories: followed inside of the source, by descriptors, and refused where they lead out.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from sources import Interfering
from trees import model_files, read_tree, write_files

from kserve_pvc import ModelStore, SourceChangedError, SourceNotFoundError, UnsafePathError
from kserve_pvc._source.ref import parse_ref
from kserve_pvc._volume import beneath
from kserve_pvc.backends._listing import MAX_LINKS_TO_ONE, hub_repository
from kserve_pvc.backends.file import FileBackend
from kserve_pvc.backends.pvc import PvcBackend

FILES = model_files(seed=7)
COMMIT = "5c97e3b9d7a5f4b6e3d2c1b0a9f8e7d6c5b4a392"


def cache_of_the_hub(place: Path, files: dict[str, bytes] = FILES) -> Path:
    """
    Make what `huggingface_hub` leaves of a download, and return the snapshot.
    """
    repository = place / "hub/models--org--line"
    snapshot = repository / "snapshots" / COMMIT
    for number, (name, data) in enumerate(files.items()):
        write_files(repository / "blobs", {f"{number:040x}": data})
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        up = "../" * (len(Path(name).parts) + 1)
        (snapshot / name).symlink_to(f"{up}blobs/{number:040x}")
    write_files(repository, {"refs/main": COMMIT.encode()})
    return snapshot


@pytest.fixture(params=["file", "pvc"])
def fetch(request, root, tmp_path):
    """
    Download a path below `tmp_path` as `file://` or `pvc://`, and return what the model holds.
    """
    store = ModelStore(root, mode="rw", storage_options={"pvc": {"claims": {"claim": tmp_path}}})

    def fetch(place: Path, **selection) -> dict[str, bytes]:
        uri = f"file://{place}" if request.param == "file" else f"pvc://claim/{place.relative_to(tmp_path)}"
        return read_tree(store.ensure(uri, progress=False, **selection).path)

    return fetch


@pytest.mark.parametrize("below", ["", "/", "/weights", "/config.json"])
def test_a_snapshot_of_the_hub_is_a_source(fetch, tmp_path, below):
    """
    A snapshot, a directory of one and a file of one have the bytes of the blobs under the names of the snapshot.
    """
    snapshot = cache_of_the_hub(tmp_path)

    found = fetch(Path(f"{snapshot}{below}"))

    inside = below.strip("/")
    whole = {name: data for name, data in FILES.items() if name.startswith(inside)}
    assert found == (
        {inside: FILES[inside]} if inside in FILES else {n.removeprefix(f"{inside}/"): d for n, d in whole.items()}
    )


def test_a_repository_of_the_hub_is_a_source(fetch, tmp_path):
    """
    The directory of a repository holds its blobs and its snapshots, and patterns choose.
    """
    snapshot = cache_of_the_hub(tmp_path)

    found = fetch(snapshot.parent.parent, allow_patterns="snapshots/*/config.json")

    assert found == {f"snapshots/{COMMIT}/config.json": FILES["config.json"]}


INSIDE = {
    "a file": ("odd", "config.json"),
    "a file above": ("weights/odd", "../config.json"),
    "a directory": ("odd", "weights"),
    "a file through a directory": ("odd", "weights/../weights/b.bin"),
    "a link": ("odd", "first"),
    "a link through a link": ("odd", "also/b.bin"),
    "by the whole path": ("odd", "SOURCE/config.json"),
    "a slash at its end": ("odd", "weights/"),
}


@pytest.mark.parametrize("inside", INSIDE)
def test_a_link_inside_of_a_source_is_followed(fetch, tmp_path, inside):
    """
    The model has what the link leads to, under the name of the link.
    """
    source = tmp_path / "source"
    write_files(source, FILES)
    (source / "first").symlink_to("config.json")
    (source / "also").symlink_to("weights")
    name, target = INSIDE[inside]
    (source / name).symlink_to(target.replace("SOURCE", str(source)))

    found = fetch(source)

    assert found == {
        str(path.relative_to(source)): path.read_bytes()
        for path in map(
            Path, (os.path.join(top, n) for top, _, names in os.walk(source, followlinks=True) for n in names)
        )
    }


def test_what_kubernetes_projects_is_a_source(fetch, tmp_path):
    """
    In a volume of a ConfigMap each file is a link through a link; patterns leave the directories of its versions out.
    """
    write_files(tmp_path / "projected/..2026_11_29", {"config.json": b"{}"})
    (tmp_path / "projected/..data").symlink_to("..2026_11_29")
    (tmp_path / "projected/config.json").symlink_to("..data/config.json")

    assert fetch(tmp_path / "projected", ignore_patterns="..*") == {"config.json": b"{}"}


OUTSIDE = {
    "above": "../secret/key",
    "above, through the source": "weights/../../secret/key",
    "elsewhere": "/etc/passwd",
    "a directory": "../secret",
    "by a link": "way/secret/key",
    "the directory itself, and back": "../source/config.json",
    "a name that only begins alike": "SOURCE-other/key",
    "out of the root": "/" + "../" * 60 + "etc/passwd",
}


@pytest.mark.parametrize("outside", OUTSIDE)
def test_a_link_that_leads_out_of_a_source_is_refused(fetch, root, tmp_path, outside):
    """
    The message names the link and what to do, nothing is published, and patterns leave the link out.
    """
    source = tmp_path / "source"
    write_files(source, FILES)
    write_files(tmp_path / "secret", {"key": b"private"})
    write_files(tmp_path / "source-other", {"key": b"private"})
    (source / "way").symlink_to("..")
    (source / "odd").symlink_to(OUTSIDE[outside].replace("SOURCE", str(source)))

    with pytest.raises(UnsafePathError, match=r"leads out of .*; links are followed only .*`cp -rL`.*`--ignore`"):
        fetch(source, ignore_patterns="way")

    assert not (root / "models").exists()
    for patterns in ({"ignore_patterns": ["odd", "way"]}, {"ignore_patterns": ["odd/*", "way/*"]}):
        assert fetch(source, **patterns) == FILES
    assert fetch(source, allow_patterns="config.json") == {"config.json": FILES["config.json"]}


def test_a_directory_that_patterns_name_is_not_left_out_silently(fetch, tmp_path):
    """
    Patterns that choose files below a link that leads out refuse the model, though they do not choose the link.
    """
    source = tmp_path / "source"
    write_files(source, FILES)
    (source / "odd").symlink_to("/etc")

    with pytest.raises(UnsafePathError, match="leads out of"):
        fetch(source, allow_patterns=["*.json", "odd/passwd"])


@pytest.mark.parametrize(
    "target", ["../../../../models--org--other/blobs/key", "../../../refs/key", "../../../../../key", "../../other/key"]
)
def test_a_snapshot_leads_to_its_own_blobs_only(fetch, tmp_path, target):
    """
    Neither other repositories nor other directories of the same one are read through a link in a snapshot.
    """
    snapshot = cache_of_the_hub(tmp_path)
    (snapshot / "weights/odd").symlink_to(target)
    place = Path(os.path.normpath(snapshot / "weights" / target))
    write_files(place.parent, {place.name: b"private"})

    with pytest.raises(UnsafePathError, match="leads out of"):
        fetch(snapshot)


@pytest.mark.parametrize("target", ["odd", "nowhere", "config.json/x", "weights/nowhere"])
def test_a_link_that_leads_nowhere_is_refused_by_its_name(fetch, tmp_path, target):
    """
    Circles and links to nothing say so.
    """
    write_files(tmp_path / "source", FILES)
    (tmp_path / "source/odd").symlink_to(target)

    with pytest.raises(UnsafePathError, match=r"odd` is refused: it is a link (to nothing|in a circle)"):
        fetch(tmp_path / "source")


@pytest.mark.parametrize("target", [".", "..", "../..", "../../other"])
def test_directories_that_lie_in_each_other_by_links_end(fetch, tmp_path, target):
    """
    A link to a directory above it, or two that lead to each other, are refused instead of followed for ever.
    """
    write_files(tmp_path / "source", {"deep/er/x": b"x", "other/y": b"y"})
    (tmp_path / "source/deep/er/odd").symlink_to(target)
    (tmp_path / "source/other/back").symlink_to("../deep")

    with pytest.raises(UnsafePathError, match="a link to a directory that it lies in"):
        fetch(tmp_path / "source")


def test_links_to_links_cost_no_more_than_the_directories(tmp_path):
    """
    Thirty directories that each lead to the next one twice would be a thousand million: they are refused at once.
    """
    for number in range(30):
        write_files(tmp_path / f"source/d{number:02}", {"x": b"x"})
        for name in ("a", "b"):
            (tmp_path / f"source/d{number:02}/{name}").symlink_to(f"../d{number + 1:02}")
    write_files(tmp_path / "source/d30", {"x": b"x"})

    with pytest.raises(UnsafePathError, match=f"more than {MAX_LINKS_TO_ONE} links lead to one directory"):
        FileBackend({}).resolve(parse_ref(f"file://{tmp_path}/source"))


@pytest.mark.parametrize("step", [True, False], ids=["step by step", "openat2"])
def test_a_target_that_is_swapped_for_a_link_is_not_read(root, tmp_path, monkeypatch, step):
    """
    Between listing and reading, what a link led to becomes a link to a private file: the download fails.
    """
    monkeypatch.setattr(beneath, "_call_if_worth", (lambda: None) if step else beneath._openat2)
    snapshot = cache_of_the_hub(tmp_path)
    write_files(tmp_path / "secret", {"key": b"private"})

    def swap() -> None:
        for blob in (snapshot.parent.parent / "blobs").iterdir():
            blob.unlink()
            blob.symlink_to(tmp_path / "secret/key")

    swapping = Interfering(FileBackend({}), after_resolve=swap)
    store = ModelStore(root, mode="rw", backends={"file": swapping.factory})

    with pytest.raises(SourceChangedError):
        store.ensure(f"file://{snapshot}", progress=False)

    assert f"file://{snapshot}" not in store


def test_a_snapshot_that_is_not_there_is_not_found(fetch, tmp_path):
    """
    A commit that was never downloaded is nothing, and no unsafe name.
    """
    snapshot = cache_of_the_hub(tmp_path)

    with pytest.raises(SourceNotFoundError):
        fetch(snapshot.with_name("0" * 40))


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/c/models--o--m/snapshots/abc", "/c/models--o--m"),
        ("/c/models--o--m/snapshots/abc/x/y", "/c/models--o--m"),
        ("/c/datasets--o--m/snapshots/abc", "/c/datasets--o--m"),
        ("/c/models--o--m/snapshots", None),
        ("/c/models--o--m", None),
        ("/c/models/snapshots/abc", None),
        ("/snapshots/abc", None),
    ],
)
def test_only_what_is_laid_out_as_the_hub_does_it_is_a_repository(path, found):
    """
    The layout of the cache is known by its names.
    """
    assert hub_repository(Path(path)) == (Path(found) if found else None)


def test_a_claim_that_ends_inside_of_a_repository_is_its_own_border(tmp_path):
    """
    Where only the snapshots of a repository are mounted as a claim, its blobs are outside.
    """
    snapshot = cache_of_the_hub(tmp_path)
    backend = PvcBackend({"claims": {"claim": snapshot.parent}})

    with pytest.raises(UnsafePathError, match="leads out of"):
        backend.resolve(parse_ref(f"pvc://claim/{COMMIT}"))
