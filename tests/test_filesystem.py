"""
The store as a file system of fsspec, and the URLs under which other libraries find its files.
"""

import csv
import errno
import json
import mmap
import pickle

import fsspec
import pytest
from trees import model_files, write_files

import kserve_pvc
from kserve_pvc import ModelStore, ReadOnlyStoreError, StoreRootError
from kserve_pvc._filesystem import _find_root

FILES = model_files(seed=1)


@pytest.fixture
def uri(source):
    return f"file://{source}"


@pytest.fixture
def store(root, uri):
    """
    A store with one model.
    """
    store = ModelStore(root, mode="rw")
    store.ensure(uri, progress=False)
    return store


def spellings(root, key, uri):
    """
    The URLs of one file, with the options that go with them.
    """
    return {
        "key": (f"kserve-pvc://{root}/{key}/config.json", {}),
        "uri-below-root": (f"kserve-pvc://{root}/{uri}/config.json", {}),
        "uri-and-option": (f"kserve-pvc://{uri}/config.json", {"root": str(root)}),
        "chain": (f"kserve-pvc://{root}::{uri}/config.json", {}),
    }


@pytest.mark.parametrize("spelling", ["key", "uri-below-root", "uri-and-option", "chain"])
def test_a_file_is_opened_by_url(root, store, uri, spelling):
    """
    Each spelling leads `fsspec.open`, `url_to_fs` and `open_local` to the committed file.
    """
    url, options = spellings(root, store.get(uri).key, uri)[spelling]

    with fsspec.open(url, **options) as file:
        opened = file.read()
    fs, path = fsspec.core.url_to_fs(url, **options)
    place = fsspec.open_local(url, **options)

    assert opened == fs.cat_file(path) == FILES["config.json"]
    assert (fs.isfile(path), fs.size(path)) == (True, len(FILES["config.json"]))
    assert str(place) == str(store.get(uri) / "config.json")


def test_the_environment_names_the_store(root, store, uri, monkeypatch):
    """
    Without a root in the URL or the options, `KSERVE_PVC_STORE` counts.
    """
    monkeypatch.setenv("KSERVE_PVC_STORE", str(root))

    fs = kserve_pvc.filesystem()

    assert fs.cat_file(f"{uri}/config.json") == FILES["config.json"]


def test_a_tree_is_listed_from_the_record(root, store, uri):
    """
    `ls`, `find`, `walk`, `glob` and `info` say what the manifest says, under the path that was asked for.
    """
    fs, key = kserve_pvc.filesystem(root), store.get(uri).key
    (root / "models" / key / store.get(uri).path.name / "foreign.txt").write_text("not recorded")

    for base in (f"{root}/{key}", key, uri):
        assert fs.find(base) == sorted(f"{base}/{name}" for name in FILES)
        assert fs.isdir(base)
        assert {info["name"]: info["size"] for info in fs.ls(base) if info["type"] == "file"} == {
            f"{base}/{name}": len(data) for name, data in FILES.items() if "/" not in name
        }
        assert fs.glob(f"{base}/*.json") == [f"{base}/config.json"]
    assert fs.info(f"{uri}/config.json")["sha256"] == store.get(uri).record.files[0].sha256
    assert [info["name"] for info in fs.ls("")] == [key]
    assert [info["uri"] for info in fs.ls(str(root))] == [uri]
    assert fs.get_mapper(uri)["config.json"] == FILES["config.json"]


def test_an_open_file_is_a_file_of_the_volume(root, store, uri):
    """
    A file can be mapped into memory, since it has a descriptor.
    """
    with (
        kserve_pvc.filesystem(root).open(f"{uri}/config.json") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
    ):
        assert mapped[:] == FILES["config.json"]


@pytest.mark.parametrize(
    "path",
    [
        "no-such-key-0123456789abcdef/config.json",
        "s3://bucket/model/config.json",
        "{uri}/missing.json",
        "{key}/missing.json",
        "{key}/../../.kserve-pvc/store.json",
        "not a key/x",
    ],
)
def test_what_is_not_present_is_not_found(root, store, uri, path):
    """
    Nothing is downloaded, and nothing beside the models is shown.
    """
    fs = kserve_pvc.filesystem(root)
    path = path.format(uri=uri, key=store.get(uri).key)

    with pytest.raises(FileNotFoundError):
        fs.open(path)
    with pytest.raises(FileNotFoundError):
        fs.info(path)
    assert not fs.exists(path)


def test_a_foreign_file_in_a_model_is_not_opened(root, store, uri):
    """
    What is not in the manifest does not exist, and a link that took the place of a file is refused.
    """
    model = store.get(uri)
    (model.path / "foreign.txt").write_text("not recorded")
    fs = kserve_pvc.filesystem(root)

    with pytest.raises(FileNotFoundError):
        fs.open(f"{uri}/foreign.txt")


def test_a_directory_is_not_opened(root, store, uri):
    """
    Opening a model or the root says that it is a directory.
    """
    for path in (uri, "", str(root)):
        with pytest.raises(IsADirectoryError) as caught:
            kserve_pvc.filesystem(root).open(path)
        assert caught.value.errno == errno.EISDIR


def test_the_longest_uri_wins(tmp_path, root, store, uri, source):
    """
    Where one model lies inside another one, a path belongs to the inner one if that has the file.
    """
    write_files(source / "inner", {"config.json": b"inner", "other.json": b"other"})
    store.ensure(f"{uri}/inner", progress=False)
    fs = kserve_pvc.filesystem(root)

    assert fs.cat_file(f"{uri}/inner/config.json") == b"inner"
    assert fs.info(f"{uri}/inner/config.json")["uri"] == f"{uri}/inner"
    assert fs.info(f"{uri}/config.json")["uri"] == uri


def test_a_model_of_one_file_is_that_file(root, source):
    """
    The source URI of a single object is the path of the file.
    """
    uri = f"file://{source}/config.json"
    ModelStore(root, mode="rw").ensure(uri, progress=False)

    assert kserve_pvc.filesystem(root).cat_file(uri) == FILES["config.json"]


def test_narrower_models_are_found_unless_they_are_ambiguous(root, source):
    """
    A model with patterns serves its files by the URI; two that have the file are an error that names both keys.
    """
    uri, store = f"file://{source}", ModelStore(root, mode="rw")
    one = store.ensure(uri, allow_patterns="*.json", progress=False)
    fs = kserve_pvc.filesystem(root)
    assert fs.cat_file(f"{uri}/config.json") == FILES["config.json"]

    other = store.ensure(uri, allow_patterns=["*.json", "*.txt"], progress=False)

    with pytest.raises(FileNotFoundError) as caught:
        fs.open(f"{uri}/config.json")
    assert one.key in str(caught.value)
    assert other.key in str(caught.value)
    assert fs.cat_file(f"{one.key}/config.json") == FILES["config.json"]


def test_the_newest_version_is_read(root, store, uri, source):
    """
    After a refresh, the same file system reads the newer version.
    """
    fs = kserve_pvc.filesystem(root)
    assert fs.cat_file(f"{uri}/config.json") == FILES["config.json"]
    (source / "config.json").write_bytes(b"newer")

    store.ensure(uri, refresh=True, progress=False)

    assert fs.cat_file(f"{uri}/config.json") == b"newer"


@pytest.mark.parametrize(
    "write",
    [
        lambda fs, path: fs.open(path, "wb"),
        lambda fs, path: fs.open(path, "ab"),
        lambda fs, path: fs.pipe_file(path, b"x"),
        lambda fs, path: fs.rm(path),
        lambda fs, path: fs.rm_file(path),
        lambda fs, path: fs.mkdir(path),
        lambda fs, path: fs.makedirs(path),
        lambda fs, path: fs.touch(path),
        lambda fs, path: fs.mv(path, f"{path}.moved"),
        lambda fs, path: fs.cp_file(path, f"{path}.copied"),
    ],
)
def test_nothing_is_written(root, store, uri, write):
    """
    Every way to write is refused with the error of a read-only store.
    """
    with pytest.raises(ReadOnlyStoreError):
        write(kserve_pvc.filesystem(root), f"{uri}/config.json")


def test_a_file_system_pickles(root, store, uri):
    """
    Another process, as of dask or a data loader, gets the same file system.
    """
    fs = pickle.loads(pickle.dumps(kserve_pvc.filesystem(root)))

    assert fs.cat_file(f"{uri}/config.json") == FILES["config.json"]


def test_where_there_is_no_store_the_error_says_so(tmp_path):
    """
    A URL below a directory without a store, and a root that does not exist, are told.
    """
    with pytest.raises(FileNotFoundError, match="no store is there or above"):
        fsspec.open(f"kserve-pvc://{tmp_path}/key/config.json")
    with pytest.raises(StoreRootError):
        kserve_pvc.filesystem(tmp_path / "missing")


def test_a_store_can_be_the_source_of_another_one(tmp_path, root, store, uri):
    """
    A model is fetched from another store by its URL there, and the record says how.
    """
    (tmp_path / "other").mkdir()
    key = store.get(uri).key

    model = ModelStore(tmp_path / "other", mode="rw").ensure(f"kserve-pvc://{root}/{key}", progress=False)

    assert (model / "config.json").read_bytes() == FILES["config.json"]
    assert model.record.access == "fsspec:kserve_pvc"


@pytest.fixture
def table(tmp_path, root):
    """
    The URL of a table in a model.
    """
    place = tmp_path / "tables"
    write_files(place, {"table.csv": b"name,count\na,1\nb,2\n"})
    ModelStore(root, mode="rw").ensure(f"file://{place}", progress=False)
    return f"kserve-pvc://{root}::file://{place}/table.csv"


def test_the_standard_library_reads_text(table):
    """
    A file opened as text is what `csv` and `json` read.
    """
    with fsspec.open(table, "rt", newline="") as file:
        assert list(csv.DictReader(file)) == [{"name": "a", "count": "1"}, {"name": "b", "count": "2"}]


def test_pandas_reads_a_url(table):
    """
    `pandas.read_csv` takes the URL.
    """
    pandas = pytest.importorskip("pandas", reason="`pandas` is not installed")

    assert pandas.read_csv(table).to_dict("list") == {"name": ["a", "b"], "count": [1, 2]}


def test_pyarrow_reads_through_the_file_system(table, root):
    """
    `pyarrow.dataset` lists and reads a model of tables.
    """
    dataset = pytest.importorskip("pyarrow.dataset", reason="`pyarrow` is not installed")
    fs, path = fsspec.core.url_to_fs(table.rpartition("/")[0])

    found = dataset.dataset(path, filesystem=fs, format="csv").to_table().to_pydict()

    assert found == {"name": ["a", "b"], "count": [1, 2]}


def test_zarr_reads_an_array(tmp_path, root):
    """
    `zarr.open_array` opens an array that is a model, by its URL.
    """
    zarr = pytest.importorskip("zarr", reason="`zarr` is not installed")
    place = tmp_path / "array.zarr"
    zarr.create_array(str(place), shape=(4,), dtype="i4")[:] = [1, 2, 3, 4]
    ModelStore(root, mode="rw").ensure(f"file://{place}", progress=False)

    assert zarr.open_array(f"kserve-pvc://{root}/file://{place}", mode="r")[:].tolist() == [1, 2, 3, 4]


def test_safetensors_maps_a_file(tmp_path, root):
    """
    `safetensors.safe_open` takes the path that `fsspec.open_local` returns.
    """
    safetensors = pytest.importorskip("safetensors", reason="`safetensors` is not installed")
    header = json.dumps({"w": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}}).encode()
    write_files(tmp_path / "m", {"model.safetensors": len(header).to_bytes(8, "little") + header + b"\x01\x02\x03"})
    ModelStore(root, mode="rw").ensure(f"file://{tmp_path}/m", progress=False)
    (place,) = fsspec.open_local([f"kserve-pvc://{root}::file://{tmp_path}/m/model.safetensors"])

    with safetensors.safe_open(place, framework="numpy") as file:
        assert list(file.keys()) == ["w"]


def test_what_a_model_holds_is_no_store(tmp_path):
    """
    A path inside a model belongs to the store of the model, although the model's source had the files of a store.
    """
    root, source = tmp_path / "root", tmp_path / "m"
    root.mkdir()
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "weights").write_bytes(b"right")
    ModelStore(source / "sub", mode="rw")
    model = ModelStore(root, mode="rw").ensure(f"file://{source}")

    assert _find_root(f"{model.path}/sub/weights") == str(root)
