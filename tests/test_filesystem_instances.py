"""
File systems of fsspec that the caller made: for one call, for a store, and for processes.
"""

import asyncio
import os
import pickle
import threading
from concurrent.futures import ProcessPoolExecutor

import fsspec
import pytest
from fsspec.implementations.cached import SimpleCacheFileSystem
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from trees import model_files, read_tree

from kserve_pvc import InvalidURIError, ModelStore, SettingsError
from kserve_pvc._source.ref import parse_ref

FILES = model_files(seed=1)


@pytest.fixture
def s3_instance(origin):
    """
    A configured s3fs, which is not in fsspec's cache of instances.
    """
    s3fs = pytest.importorskip("s3fs", reason="`s3fs` is not installed")
    return s3fs.S3FileSystem(
        key=origin.key, secret=origin.secret, endpoint_url=origin.endpoint, skip_instance_cache=True
    )


def test_an_instance_reads_the_source_for_one_call(root, upload, s3_instance):
    """
    Without any other setting the model arrives through the instance, under the URI's own key, and the record says how.
    """
    uri = upload(FILES)
    store = ModelStore(root, mode="rw")

    model = store.ensure(uri, filesystem=s3_instance, progress=False)

    assert read_tree(model.path) == FILES
    assert (model.uri, model.key, model.record.access) == (uri, parse_ref(uri).key, "fsspec:s3fs")
    assert store.ensure(uri).status == "present"


def test_an_instance_finds_the_version_that_our_own_requests_find(root, upload, s3, s3_instance):
    """
    A model has one version whichever way it is listed, so a refresh by the other way fetches nothing.
    """
    uri = upload(FILES)
    ModelStore(root, mode="rw", **s3).ensure(uri, progress=False)

    model = ModelStore(root, mode="rw").ensure(uri, filesystem=s3_instance, refresh=True, progress=False)

    assert model.status == "present"


def test_a_store_keeps_instances_by_scheme(root, source, upload, s3_instance):
    """
    Models of the named scheme are read through the instance, and others as before.
    """
    store = ModelStore(root, mode="rw", filesystems={"s3": s3_instance})

    ways = [store.ensure(uri, progress=False).record.access for uri in (upload(FILES), f"file://{source}")]

    assert ways == ["fsspec:s3fs", "direct"]


def test_resolve_and_plan_take_an_instance(root, upload, s3_instance):
    """
    What is there and what it would cost is found through the instance too.
    """
    uri, store = upload(FILES), ModelStore(root)

    resolved = store.resolve(uri, filesystem=s3_instance)
    plan = store.plan(uri, filesystem=s3_instance)

    assert {str(file.entry.path) for file in resolved.files} == set(FILES)
    assert plan.size_bytes == sum(map(len, FILES.values()))


def test_an_instance_travels_to_a_pool_of_processes(root, upload, s3_instance):
    """
    The processes of an executor make their own instance as fsspec pickles it.
    """
    uri = upload(FILES)
    store = ModelStore(root, mode="rw", filesystems={"s3": s3_instance})

    with ProcessPoolExecutor(1) as executor:
        (warmed,) = store.warm([uri], executor, progress=False)

    assert warmed.model is not None, warmed.error
    assert warmed.model.record.access == "fsspec:s3fs"


def test_an_instance_is_used_after_a_fork(root, upload, s3_instance):
    """
    A child process has no event loop of its parent, and makes the instance anew.
    """
    uri = upload(FILES)
    store = ModelStore(root, mode="rw", filesystems={"s3": s3_instance})
    store.resolve(uri)

    child = os.fork()
    if child == 0:
        os._exit(0 if store.ensure(uri, progress=False).status == "downloaded" else 1)

    assert os.waitpid(child, 0)[1] == 0


def test_an_instance_may_have_an_event_loop_of_its_own(root, upload, origin):
    """
    What an instance does runs on the loop that it was made with.
    """
    s3fs = pytest.importorskip("s3fs", reason="`s3fs` is not installed")
    uri, loop = upload(FILES), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        fs = s3fs.S3FileSystem(
            key=origin.key,
            secret=origin.secret,
            endpoint_url=origin.endpoint,
            loop=loop,
            skip_instance_cache=True,
        )
        model = ModelStore(root, mode="rw").ensure(uri, filesystem=fs, progress=False)
        asyncio.run_coroutine_threadsafe(fs._s3.close(), loop).result(10)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

    assert read_tree(model.path) == FILES


def test_an_instance_of_the_loop_that_would_be_blocked_is_refused(root):
    """
    A call on the event loop's own thread says at once that it belongs on another one, instead of hanging.
    """
    http = pytest.importorskip("fsspec.implementations.http", reason="`aiohttp` is not installed")

    async def serve():
        fs = http.HTTPFileSystem(loop=asyncio.get_running_loop(), skip_instance_cache=True)
        ModelStore(root, mode="rw").ensure("https://models.example.org/m.bin", filesystem=fs, progress=False)

    with pytest.raises(SettingsError, match=r"asyncio\.to_thread"):
        asyncio.run(serve())


class Counted(LocalFileSystem):
    """
    The local file system, which notes its calls.
    """

    protocol = "counted"
    cachable = False

    def __init__(self, **options):
        super().__init__(**options)
        self.inside = self.most_inside = 0
        self.guard = threading.Lock()

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("counted://"))

    def cat_file(self, path, start=None, end=None, **kwargs):
        with self.guard:
            self.inside += 1
            self.most_inside = max(self.most_inside, self.inside)
        try:
            return super().cat_file(path, start=start, end=end, **kwargs)
        finally:
            with self.guard:
                self.inside -= 1


class Alone(fsspec.AbstractFileSystem):
    """
    A file system of which nothing says that threads may share it.
    """

    protocol = "alone"
    cachable = False

    def __init__(self, place, **options):
        super().__init__(**options)
        self.files = Counted()

    @classmethod
    def _strip_protocol(cls, path):
        return str(path).removeprefix("alone://").rstrip("/")

    def info(self, path, **kwargs):
        return self.files.info(path)

    def ls(self, path, detail=True, **kwargs):
        return self.files.ls(path, detail=detail)

    def cat_file(self, path, start=None, end=None, **kwargs):
        return self.files.cat_file(path, start=start, end=end)


def test_an_instance_that_threads_may_not_share_does_one_thing_at_a_time(root, source):
    """
    Of several streams one reads at a time, through the instance itself.
    """
    fs = Alone(source)

    model = ModelStore(root, mode="rw", part_bytes=1000).ensure(f"alone://{source}", filesystem=fs, progress=False)

    assert read_tree(model.path) == FILES
    assert fs.files.most_inside == 1
    assert model.record.access == f"fsspec:{__name__.partition('.')[0]}"


def test_an_instance_is_not_closed_nor_forgotten(root, source):
    """
    After a download the instance is the one that fsspec hands out, and it still works.
    """
    fs = fsspec.filesystem("file")

    ModelStore(root, mode="rw").ensure(f"file://{source}", filesystem=fs, progress=False)

    assert fsspec.filesystem("file") is fs
    assert fs.cat_file(f"{source}/config.json") == FILES["config.json"]


def test_listings_that_the_caller_has_cached_do_not_count(root, upload, origin, s3_instance):
    """
    A file that was added after the instance last listed its directory is part of the model.
    """
    uri = upload(FILES)
    s3_instance.find(uri)
    s3_instance.ls(uri)
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    origin.put(bucket, f"{prefix}/added.txt", b"new")

    model = ModelStore(root, mode="rw").ensure(uri, filesystem=s3_instance, progress=False)

    assert read_tree(model.path) == {**FILES, "added.txt": b"new"}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda source: LocalFileSystem(), r"it reads `file://`, `local://`, and not `s3://`"),
        (lambda source: MemoryFileSystem(), r"it reads `memory://`, and not `s3://`"),
        (lambda source: SimpleCacheFileSystem(target_protocol="file"), "reads through another file system"),
        (lambda source: DirFileSystem(str(source), LocalFileSystem()), "reads through another file system"),
        (lambda source: "s3", r"an instance of `fsspec\.AbstractFileSystem`"),
    ],
    ids=["local", "memory", "simplecache", "dir", "no-file-system"],
)
def test_an_instance_that_cannot_be_meant_is_refused(root, source, make, words):
    """
    Another protocol, a wrapper, and what is not a file system are refused before anything is requested or claimed.
    """
    with pytest.raises(SettingsError, match=words):
        ModelStore(root, mode="rw").ensure("s3://bucket/model", filesystem=make(source), progress=False)


def test_an_instance_for_await_is_refused(root):
    """
    An instance whose methods must be awaited on the caller's own loop cannot be used from here.
    """
    s3fs = pytest.importorskip("s3fs", reason="`s3fs` is not installed")
    fs = s3fs.S3FileSystem(asynchronous=True, anon=True, skip_instance_cache=True)

    with pytest.raises(SettingsError, match="without that argument"):
        ModelStore(root, mode="rw").ensure("s3://bucket/model", filesystem=fs, progress=False)


def test_an_instance_for_another_account_is_refused(root):
    """
    A URI that names an account is not read from another one.
    """
    adlfs = pytest.importorskip("adlfs", reason="`adlfs` is not installed")
    fs = adlfs.AzureBlobFileSystem(account_name="ours", anon=True, skip_instance_cache=True)
    store = ModelStore(root, mode="rw")

    with pytest.raises(InvalidURIError, match="its `account_name` is `theirs`"):
        store.ensure("abfss://models@theirs.dfs.core.windows.net/m", filesystem=fs, progress=False)


def test_options_beside_an_instance_are_refused(root, s3_instance):
    """
    An instance is configured already: options for the same call would be ignored, so they are an error.
    """
    with pytest.raises(SettingsError, match="pass one of the two"):
        ModelStore(root, mode="rw").ensure("s3://b/m", filesystem=s3_instance, storage_options={"anon": True})


def test_an_instance_that_does_not_pickle_is_told_by_a_pool(root, upload, s3_instance):
    """
    What cannot be sent to other processes is an error of the call.
    """
    s3_instance.storage_options["lock"] = threading.Lock()
    with pytest.raises(TypeError):
        pickle.dumps(s3_instance)
    store = ModelStore(root, mode="rw", filesystems={"s3": s3_instance})

    with ProcessPoolExecutor(1) as executor, pytest.raises(SettingsError):
        list(store.warm([upload(FILES)], executor, progress=False))
