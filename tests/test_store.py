"""
What a model server and an operator do with a store, on a real S3 server and on files.
"""

import asyncio
import hashlib
import json
import logging
import os
import pickle
import re
import shutil
import signal
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import actors
import holders
import pytest
import shell
from fsspec.callbacks import Callback
from sources import FakeBackend, Interfering
from trees import digests, listing, model_files, read_tree, write_files
from waiting import until

from kserve_pvc import (
    LockerMismatchError,
    LockTimeoutError,
    ModelInUseError,
    ModelNotFoundError,
    ModelStore,
    Problem,
    ReadOnlyStoreError,
    SettingsError,
    SourceDeniedError,
    StoreError,
    StoreFormatError,
    Verification,
)
from kserve_pvc._show.units import format_bytes
from kserve_pvc.backends.file import FileBackend

BUCKET = "models"
FILES = model_files(seed=11)
SIZE = sum(map(len, FILES.values()))
RACE_SECONDS = 0.5


@dataclass(frozen=True)
class Source:
    """
    A model at its source: how a store reaches it, and how its owner changes it.
    """

    uri: str
    arguments: dict[str, object]
    put: Callable[[str, bytes], object]
    lose: Callable[[], object]


@pytest.fixture
def on_s3(origin, upload, s3):
    """
    The model of `FILES` on the S3 server.
    """
    uri = upload(FILES)
    prefix = uri.removeprefix(f"s3://{BUCKET}/")
    client = origin._client

    def lose():
        for name in FILES:
            client.delete_object(Bucket=BUCKET, Key=f"{prefix}/{name}")

    return Source(uri, s3, lambda name, data: origin.put(BUCKET, f"{prefix}/{name}", data), lose)


@pytest.fixture
def on_disk(tmp_path):
    """
    The model of `FILES` in a directory.
    """
    place = tmp_path / "origin"
    write_files(place, FILES)
    return Source(
        f"file://{place}", {}, lambda name, data: write_files(place, {name: data}), lambda: shutil.rmtree(place)
    )


@pytest.fixture(params=["on_s3", "on_disk"])
def there(request):
    """
    The model of `FILES`, once on the S3 server and once in a directory.
    """
    return request.getfixturevalue(request.param)


@pytest.fixture
def present(root, on_disk):
    """
    A model that is in the store.
    """
    return ModelStore(root, mode="rw").ensure(on_disk.uri, progress=False)


def test_ensure_gives_a_complete_directory(root, there):
    """
    A model that is absent is downloaded whole, and the answer says where it is and what that cost.
    """
    store = ModelStore(root, mode="rw", **there.arguments)

    model = store.ensure(there.uri, progress=False)

    assert read_tree(model.path) == FILES
    assert os.fspath(model) == str(model.path)
    assert model.path.is_relative_to(root / "models" / model.key)
    assert (model.uri, model.status, model.size_bytes, model.files, model.bytes_fetched) == (
        there.uri,
        "downloaded",
        SIZE,
        4,
        SIZE,
    )
    assert model.seconds > 0


def test_a_record_says_what_a_model_consists_of(root, there):
    """
    The record names source, version, writer and time, and every file with its size and digest, in the order of the
    paths.
    """
    started = datetime.now(UTC)
    store = ModelStore(root, mode="rw", **there.arguments)

    record = store.ensure(there.uri, progress=False).record

    assert [(str(f.path), f.size_bytes, f.sha256) for f in record.files] == [
        (name, len(FILES[name]), digest) for name, digest in sorted(digests(FILES).items())
    ]
    assert (record.uri, record.revision, record.size_bytes) == (there.uri, None, SIZE)
    assert record.version == store.resolve(there.uri).version
    assert started <= record.created_at <= datetime.now(UTC)
    assert record.created_at.utcoffset() == timedelta(0)
    assert (record.writer.pid, record.writer.uid) == (os.getpid(), os.geteuid())


def test_the_key_of_a_plain_uri_is_kserves(root, present):
    """
    A key is a readable name and the first 16 hexadecimal digits of the URI's SHA-256.
    """
    assert present.key == f"origin-{hashlib.sha256(present.uri.encode()).hexdigest()[:16]}"


def test_a_second_ensure_asks_nobody_and_writes_nothing(root, on_s3, proxy):
    """
    A model that is present is returned without a request and without a change on the volume.
    """
    first = ModelStore(root, mode="rw", **on_s3.arguments).ensure(on_s3.uri, progress=False)
    before, requests = listing(root), len(proxy.requests)

    again = ModelStore(root, mode="rw", **on_s3.arguments).ensure(on_s3.uri)

    assert (again.status, again.path, again.bytes_fetched) == ("present", first.path, 0)
    assert len(proxy.requests) == requests
    assert listing(root) == before


def test_what_is_in_a_store_is_found_without_its_source(root, there):
    """
    Getting, asking, listing and ensuring work offline, read-only, and agree with what was downloaded.
    """
    model = ModelStore(root, mode="rw", **there.arguments).ensure(there.uri, progress=False)
    there.lose()
    store = ModelStore(root)

    found = [store.get(there.uri), store.ensure(there.uri), *store.list()]

    assert [(m.path, m.version, m.status, m.record) for m in found] == [
        (model.path, model.version, "present", model.record)
    ] * 3
    assert there.uri in store
    assert f"{there.uri}/other" not in store


def test_an_absent_model_is_named_with_its_store(root, on_disk):
    """
    The error of `get` says which model, which store and what to do.
    """
    ModelStore(root, mode="rw")

    with pytest.raises(
        ModelNotFoundError, match="`ensure` it from a read-write store, or `import` a bundle of it"
    ) as caught:
        ModelStore(root).get(on_disk.uri)

    assert caught.value.fields == {"ref": on_disk.uri, "root": str(root)}
    assert isinstance(caught.value, FileNotFoundError)


def test_an_empty_directory_is_an_empty_store(root):
    """
    A read-only store on a new volume has nothing, and leaves nothing there.
    """
    store = ModelStore(root)

    found = [store.list(), list(store.verify_all("full")), list(store.locks()), "s3://bucket/model" in store]

    assert found == [[], [], [], False]
    assert list(root.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [{"local_files_only": True}, {"local_files_only": True, "refresh": True, "force_download": True}]
)
def test_local_files_only_never_asks_the_source(root, on_s3, proxy, arguments):
    """
    What is present is returned and what is absent is an error, both without a request.
    """
    store = ModelStore(root, mode="rw", **on_s3.arguments)
    with pytest.raises(ModelNotFoundError):
        store.ensure(on_s3.uri, **arguments)
    asked_while_absent = len(proxy.requests)
    path = store.ensure(on_s3.uri, progress=False).path
    asked = len(proxy.requests)

    model = store.ensure(on_s3.uri, **arguments)

    assert (model.status, model.path) == ("present", path)
    assert (asked_while_absent, len(proxy.requests)) == (0, asked)


@pytest.mark.parametrize("arguments", [{}, {"force_download": True}])
def test_a_read_only_store_asks_nobody_for_what_it_may_not_fetch(root, on_s3, proxy, arguments):
    """
    Ensuring an absent model read-only fails with the remedy, no request and no trace on the volume.
    """
    store = ModelStore(root, **on_s3.arguments)

    with pytest.raises(ReadOnlyStoreError, match='mode="rw"') as caught:
        store.ensure(on_s3.uri, **arguments)

    assert caught.value.fields["operation"] == f"download `{on_s3.uri}`"
    assert isinstance(caught.value, PermissionError)
    assert proxy.requests == []
    assert list(root.iterdir()) == []


def test_a_read_only_store_says_whether_a_newer_version_exists(root, there):
    """
    Refreshing read-only is a hit while the source is unchanged, and an error once it would have to download.
    """
    ModelStore(root, mode="rw", **there.arguments).ensure(there.uri, progress=False)
    store = ModelStore(root, **there.arguments)
    before = listing(root)
    unchanged = store.ensure(there.uri, refresh=True)
    there.put("config.json", b"newer")

    with pytest.raises(ReadOnlyStoreError):
        store.ensure(there.uri, refresh=True)

    assert unchanged.status == "present"
    assert listing(root) == before


def test_refreshing_an_unchanged_model_writes_nothing(root, on_s3, proxy):
    """
    A refresh asks the source for its listing only, and finds nothing to do.
    """
    store = ModelStore(root, mode="rw", **on_s3.arguments)
    path = store.ensure(on_s3.uri, progress=False).path
    before, sent = listing(root), proxy.body_bytes()

    model = store.ensure(on_s3.uri, refresh=True)

    assert (model.status, model.path) == ("present", path)
    assert (proxy.body_bytes(), listing(root)) == (sent, before)


def test_refreshing_a_changed_model_puts_the_new_one_beside_the_old(root, there):
    """
    A newer version has a directory of its own, and whoever still reads the old one sees every byte of it.
    """
    store = ModelStore(root, mode="rw", **there.arguments)
    old = store.ensure(there.uri, progress=False)
    changed = {"config.json": b"newer", "weights/b.bin": b"other"}
    for name, data in changed.items():
        there.put(name, data)

    stale = store.ensure(there.uri)
    new = store.ensure(there.uri, refresh=True, progress=False)

    assert (stale.status, stale.path) == ("present", old.path)
    assert new.status == "downloaded"
    assert new.version not in (old.version, "")
    assert read_tree(old.path) == FILES
    assert read_tree(new.path) == {**FILES, **changed}
    assert [m.path for m in (store.get(there.uri), *store.list())] == [new.path] * 2
    assert old.record.version == old.version


def test_a_forced_download_leaves_the_old_directory_alone(root, on_s3, proxy):
    """
    Forcing fetches every byte again into a new directory, although nothing has changed.
    """
    store = ModelStore(root, mode="rw", **on_s3.arguments)
    old = store.ensure(on_s3.uri, progress=False)
    before = listing(old.path)

    new = store.ensure(on_s3.uri, force_download=True, progress=False)

    assert (new.status, new.version, new.bytes_fetched) == ("downloaded", old.version, SIZE)
    assert new.path != old.path
    assert proxy.body_bytes() == 2 * SIZE
    assert listing(old.path) == before
    assert read_tree(store.get(on_s3.uri).path) == FILES


@pytest.mark.parametrize("look", [lambda store, uri: None, lambda store, uri: store.get(uri)], ids=["ensure", "get"])
def test_a_process_never_goes_back_to_an_older_record(root, on_disk, look):
    """
    Once a call has returned a newer record, a volume that shows only older ones is an error and not the older model.
    """
    store = ModelStore(root, mode="rw")
    model = store.ensure(on_disk.uri, progress=False)
    store.ensure(on_disk.uri, force_download=True, progress=False)
    look(store, on_disk.uri)

    (root / ".kserve-pvc/keys" / model.key / "log/000000000002.commit").unlink()

    for use in (store.get, store.ensure, store.verify):
        with pytest.raises(StoreFormatError, match="its newest record is 1, but this process has returned 2"):
            use(on_disk.uri)


def test_resolving_says_what_is_there_and_writes_nothing(root, there):
    """
    `resolve` names version, files and size at the source, and leaves the volume as it was.
    """
    found = ModelStore(root, **there.arguments).resolve(there.uri)

    assert {str(f.entry.path): f.entry.size_bytes for f in found.files} == {
        name: len(data) for name, data in FILES.items()
    }
    assert (found.size_bytes, re.fullmatch(r"sha256:[0-9a-f]{64}", found.version) is not None) == (SIZE, True)
    assert list(root.iterdir()) == []


def test_a_plan_says_what_ensure_would_do(root, there):
    """
    A plan names every byte to fetch before, nothing after, and what changed on a refresh; it changes nothing itself.
    """
    store = ModelStore(root, mode="rw", **there.arguments)
    untouched = listing(root)
    before = store.plan(there.uri)
    planned = listing(root)
    model = store.ensure(there.uri, progress=False)
    after = store.plan(there.uri)
    there.put("config.json", b"newer")
    newer = store.plan(there.uri, refresh=True)

    assert planned == untouched
    assert (before.action, before.files, before.size_bytes, before.bytes_to_fetch, before.bytes_reusable) == (
        "download",
        4,
        SIZE,
        SIZE,
        0,
    )
    assert (before.key, before.version, before.seconds, before.fits) == (model.key, model.version, None, True)
    assert (after.action, after.version, after.bytes_to_fetch, after.seconds) == ("nothing", model.version, 0, 0.0)
    assert (newer.action, newer.bytes_to_fetch, newer.bytes_reusable) == (
        "download",
        len(b"newer"),
        SIZE - len(FILES["config.json"]),
    )
    assert newer.version != model.version
    assert 0 < before.free_bytes <= shutil.disk_usage(root).total


def test_a_plan_for_a_present_model_asks_nobody(root, on_s3, proxy):
    """
    What is present needs no request to be planned.
    """
    store = ModelStore(root, mode="rw", **on_s3.arguments)
    store.ensure(on_s3.uri, progress=False)
    requests = len(proxy.requests)

    plan = store.plan(on_s3.uri)

    assert (plan.action, len(proxy.requests)) == ("nothing", requests)


def fail_at(data_file: str, error: Exception) -> Callable[[int, object], None]:
    """
    Something that happens before a range is read: one of the files fails.
    """

    def before_range(number, file):
        if str(file.entry.path) == data_file:
            raise error

    return before_range


def unfinished(root, uri):
    """
    Start a download that ends half-way, since the source denies its smaller files.
    """
    broken = Interfering(FileBackend({}), before_range=fail_at("weights/b.bin", SourceDeniedError(uri, "no")))
    with pytest.raises(SourceDeniedError):
        ModelStore(root, mode="rw", backends={"file": broken.factory}).ensure(uri, progress=False, max_workers=1)


def test_what_an_unfinished_download_left_is_planned_and_used(root, on_disk):
    """
    A plan counts the bytes that need not be fetched again, and `ensure` then fetches exactly the others.
    """
    unfinished(root, on_disk.uri)
    store = ModelStore(root, mode="rw")

    plan = store.plan(on_disk.uri)
    model = store.ensure(on_disk.uri, progress=False)

    assert (plan.bytes_reusable, plan.bytes_to_fetch) == (
        len(FILES["weights/a.bin"]),
        SIZE - len(FILES["weights/a.bin"]),
    )
    assert (model.bytes_fetched, read_tree(model.path)) == (plan.bytes_to_fetch, FILES)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"allow_patterns": "*.json"}, {"config.json"}),
        ({"allow_patterns": ["weights/"]}, {"weights/a.bin", "weights/b.bin"}),
        ({"ignore_patterns": ["*.bin", "empty"]}, {"config.json"}),
        ({"allow_patterns": ["weights/*", "empty"], "ignore_patterns": "*/a.bin"}, {"weights/b.bin", "empty"}),
    ],
)
def test_patterns_make_another_model(root, there, arguments, names):
    """
    A part of a source is a model of its own, beside the whole.
    """
    store = ModelStore(root, mode="rw", **there.arguments)
    whole = store.ensure(there.uri, progress=False)

    part = store.ensure(there.uri, progress=False, **arguments)

    assert read_tree(part.path) == {name: FILES[name] for name in names}
    assert part.key != whole.key
    assert store.get(there.uri, **arguments).path == part.path
    assert store.ensure(there.uri, **arguments).status == "present"
    assert store.verify(there.uri, "full", **arguments).ok
    assert {m.key for m in store.list()} == {whole.key, part.key}
    store.remove(there.uri, **arguments)
    assert [m.key for m in store.list()] == [whole.key]


def test_a_revision_makes_another_model(root):
    """
    The same URI at another revision is a model of its own, which says so.
    """
    store = ModelStore(root, mode="rw", backends={"fake": FakeBackend({"a": b"a"}).factory})

    newest, pinned = (store.ensure("fake://models/m", revision=revision, progress=False) for revision in (None, "v1"))

    assert newest.key != pinned.key
    assert (newest.record.revision, pinned.record.revision) == (None, "v1")
    assert store.get("fake://models/m", revision="v1").path == pinned.path
    with pytest.raises(ModelNotFoundError, match="at v2"):
        store.get("fake://models/m", revision="v2")


class Counting(Callback):
    """
    A callback that keeps what it is told.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.steps: list[int] = []

    def set_size(self, size):
        self.sizes.append(size)

    def relative_update(self, inc=1):
        self.steps.append(inc)


def test_a_callback_is_told_the_size_and_every_byte(root, there):
    """
    An fsspec callback hears the size once and all bytes of a download, and nothing of a hit.
    """
    store = ModelStore(root, mode="rw", **there.arguments)
    first, second = Counting(), Counting()

    store.ensure(there.uri, callback=first, progress=False)
    store.ensure(there.uri, callback=second, progress=False)

    assert (first.sizes, sum(first.steps), min(first.steps) > 0) == ([SIZE], SIZE, True)
    assert (second.sizes, second.steps) == ([], [])


def test_a_model_pickles(root, present):
    """
    A model crosses a process boundary with its facts, its path and its record.
    """
    copy = pickle.loads(pickle.dumps(present))

    assert copy == present
    assert (os.fspath(copy), copy.record) == (os.fspath(present), present.record)


def test_threads_download_different_models_at_the_same_time(root, s3, upload, proxy):
    """
    One store serves many threads, each with a model of its own.
    """
    uris = [upload({f"{number}/weights.bin": os.urandom(200_000)}) + f"/{number}" for number in range(6)]
    store = ModelStore(root, mode="rw", **s3)

    with ThreadPoolExecutor(6) as pool:
        models = list(pool.map(lambda uri: store.ensure(uri, progress=False), uris))

    assert [m.uri for m in models] == uris
    assert {m.status for m in models} == {"downloaded"}
    assert all(report.ok for report in store.verify_all("full"))
    assert proxy.body_bytes() == 6 * 200_000


def test_a_thread_may_refuse_to_wait_for_another(root, on_s3, proxy):
    """
    With a timeout of zero a thread is told that another thread of its process is downloading.
    """
    proxy.limit_bytes_per_second = 1_000_000
    store = ModelStore(root, mode="rw", **on_s3.arguments)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(store.ensure, on_s3.uri, progress=False)
        until(lambda: proxy.body_bytes() > 0)

        with pytest.raises(LockTimeoutError, match="another thread of this process"):
            store.ensure(on_s3.uri, timeout=0, progress=False)

        assert first.result().status == "downloaded"


def test_ensure_runs_beside_an_event_loop(root, on_s3):
    """
    `asyncio.to_thread(store.ensure, …)` leaves the loop free, and many of them share one download.
    """
    store = ModelStore(root, mode="rw", **on_s3.arguments)

    async def ensure_all():
        return await asyncio.gather(*(asyncio.to_thread(store.ensure, on_s3.uri, progress=False) for _ in range(4)))

    models = asyncio.run(ensure_all())

    assert {m.path for m in models} == {store.get(on_s3.uri).path}
    assert sum(m.bytes_fetched for m in models) == SIZE


def replace(path, data: bytes) -> None:
    """
    Put other bytes where a file of a model was, whatever its permissions.
    """
    path.unlink()
    path.write_bytes(data)


def flip_a_byte(path) -> None:
    data = bytearray((path / "weights/a.bin").read_bytes())
    data[len(data) // 2] ^= 1
    replace(path / "weights/a.bin", bytes(data))


def link_elsewhere(path) -> None:
    copy = path.parent / "copy"
    (path / "weights/b.bin").rename(copy)
    (path / "weights/b.bin").symlink_to(copy)


def make_a_pipe(path) -> None:
    (path / "weights/b.bin").unlink()
    os.mkfifo(path / "weights/b.bin")


NOT_REGULAR = ("weights/b.bin", "type", "not a regular file")
DAMAGES = {
    "missing": (
        lambda path: (path / "config.json").unlink(),
        ("config.json", "missing", "missing"),
    ),
    "extra": (
        lambda path: (path / "weights/.git").write_bytes(b"x"),
        ("weights/.git", "extra", "not in the manifest"),
    ),
    "truncated": (
        lambda path: replace(path / "weights/b.bin", FILES["weights/b.bin"][:-1]),
        ("weights/b.bin", "size", "999 bytes instead of 1000"),
    ),
    "grown": (lambda path: replace(path / "empty", b"x"), ("empty", "size", "1 bytes instead of 0")),
    "link": (link_elsewhere, NOT_REGULAR),
    "pipe": (make_a_pipe, NOT_REGULAR),
}


@pytest.mark.parametrize("level", ["size", "full"])
@pytest.mark.parametrize("name", DAMAGES)
def test_verify_names_what_differs(root, present, name, level):
    """
    At either level, read-only, every difference but a changed byte is found and described.
    """
    damage, (path, kind, detail) = DAMAGES[name]
    damage(present.path)

    report = ModelStore(root).verify(present.uri, level)

    assert report == Verification(
        uri=present.uri, level=level, files=4, bytes=SIZE, problems=(Problem(path=path, kind=kind, detail=detail),)
    )


def test_a_flipped_byte_is_found_by_reading_only(root, present):
    """
    Sizes say nothing about a changed byte; digests do.
    """
    flip_a_byte(present.path)
    store = ModelStore(root)

    quick, full = (store.verify(present.uri, level) for level in ("size", "full"))

    assert quick.ok
    assert [(p.path, p.kind) for p in full.problems] == [("weights/a.bin", "digest")]
    assert digests(FILES)["weights/a.bin"] in full.problems[0].detail


def test_a_model_whose_directory_is_gone_is_all_missing(root, present):
    """
    A record without its files is reported file by file.
    """
    shutil.rmtree(present.path)

    report = ModelStore(root).verify(present.uri, "full")

    assert [(p.path, p.kind) for p in report.problems] == [(name, "missing") for name in sorted(FILES)]


def test_verify_needs_no_source(root, on_s3, proxy):
    """
    A full verification asks nobody, and works when the source is gone.
    """
    ModelStore(root, mode="rw", **on_s3.arguments).ensure(on_s3.uri, progress=False)
    on_s3.lose()
    before, requests = listing(root), len(proxy.requests)

    report = ModelStore(root, **on_s3.arguments).verify(on_s3.uri, "full")

    assert report == Verification(uri=on_s3.uri, level="full", files=4, bytes=SIZE, problems=())
    assert (listing(root), len(proxy.requests)) == (before, requests)


def test_verify_all_goes_on_after_a_damaged_model(root, present, tmp_path):
    """
    Every model is reported, the damaged with its problems and the others as fine.
    """
    write_files(tmp_path / "other", {"a": b"a"})
    store = ModelStore(root, mode="rw")
    store.ensure(f"file://{tmp_path}/other", progress=False)
    flip_a_byte(present.path)

    reports = {report.uri: [p.kind for p in report.problems] for report in ModelStore(root).verify_all("full")}

    assert reports == {present.uri: ["digest"], f"file://{tmp_path}/other": []}


def test_verify_refuses_what_it_does_not_know(root, present):
    """
    An absent model and an unknown level are errors, not empty reports.
    """
    store = ModelStore(root)

    with pytest.raises(ModelNotFoundError):
        store.verify("s3://bucket/absent")
    with pytest.raises(SettingsError, match="use `size` or `full`"):
        store.verify(present.uri, "deep")


def test_a_removed_model_is_gone_at_once_and_its_bytes_are_in_the_trash(root, present):
    """
    Everybody sees the removal immediately, while whoever reads the files without a lease can read on for a while.
    """
    other = ModelStore(root)
    with (present.path / "weights/a.bin").open("rb") as reading:
        ModelStore(root, mode="rw").remove(present.uri)
        read_after = reading.read()

    assert (present.uri in other, other.list(), present.path.exists()) == (False, [], False)
    assert read_after == FILES["weights/a.bin"]
    (trashed,) = (root / ".kserve-pvc/trash").iterdir()
    assert read_tree(trashed) == FILES


def test_an_emptied_trash_gives_the_space_back(root, present):
    """
    With `trash_seconds=0` no byte, manifest, staging file or lease of the model is left.
    """
    ModelStore(root, mode="rw").remove(present.uri, trash_seconds=0)

    files = [path for path in (root / ".kserve-pvc").rglob("*") if path.is_file()]
    left = [path for path in files if not {"keys", "reserve"} & set(path.parts)]
    assert [path.name for path in left] == ["store.json"]
    assert read_tree(root / "models") == {}
    assert present.uri not in ModelStore(root)


def test_old_trash_is_emptied_by_a_later_removal(root, present):
    """
    What a removal left in the trash goes with the next one whose grace is over.
    """
    store = ModelStore(root, mode="rw")
    store.remove(present.uri)
    store.ensure(present.uri, progress=False)

    store.remove(present.uri, trash_seconds=0)

    assert list((root / ".kserve-pvc/trash").iterdir()) == []


def test_a_removed_model_can_come_back(root, present):
    """
    After a removal the next `ensure` downloads into a directory that has never been used.
    """
    store = ModelStore(root, mode="rw")
    store.remove(present.uri, trash_seconds=0)

    model = store.ensure(present.uri, progress=False)

    assert (model.status, model.path.name != present.path.name, read_tree(model.path)) == ("downloaded", True, FILES)


def test_removing_needs_something_to_remove(root, present):
    """
    Removing what is absent, or was removed before, is an error that names it.
    """
    store = ModelStore(root, mode="rw")
    store.remove(present.uri)

    for uri in (present.uri, "s3://bucket/never-there"):
        with pytest.raises(ModelNotFoundError) as caught:
            store.remove(uri)
        assert caught.value.ref == uri


def test_a_read_only_store_removes_nothing(root, present):
    """
    Removing and breaking claims need a read-write store.
    """
    store, before = ModelStore(root), listing(root)

    with pytest.raises(ReadOnlyStoreError, match="remove"):
        store.remove(present.uri)
    with pytest.raises(ReadOnlyStoreError, match="break the claim"):
        store.break_lock(present.uri)

    assert listing(root) == before


def test_an_unfinished_download_can_be_removed(root, on_disk):
    """
    What a failed download left is removed like a model, and then there is nothing any more.
    """
    unfinished(root, on_disk.uri)
    store = ModelStore(root, mode="rw")
    left = read_tree(root / "models")

    store.remove(on_disk.uri, trash_seconds=0)

    assert sum(map(len, left.values())) >= len(FILES["weights/a.bin"])
    assert read_tree(root / "models") == {}
    assert list((root / ".kserve-pvc/staging").iterdir()) == []
    with pytest.raises(ModelNotFoundError):
        store.remove(on_disk.uri)


def test_what_a_killed_download_left_can_be_removed(root, on_s3, proxy):
    """
    A process that was killed blocks no removal.
    """
    proxy.limit_bytes_per_second = 200_000
    ModelStore(root, mode="rw")
    child = actors.start(actors.ensure, str(root), on_s3.uri, {**on_s3.arguments, "part_bytes": 4096}, {})
    until(lambda: proxy.body_bytes() > 100_000)
    child.kill()
    child.join()

    ModelStore(root, mode="rw").remove(on_s3.uri, trash_seconds=0)

    assert read_tree(root / "models") == {}
    assert list((root / ".kserve-pvc/staging").iterdir()) == []


def test_a_model_that_is_being_downloaded_is_not_removed(root, on_s3, proxy):
    """
    A removal while another process downloads says who that is, and the download goes on to its end.
    """
    proxy.limit_bytes_per_second = 500_000
    store = ModelStore(root, mode="rw", lease_seconds=RACE_SECONDS)
    child = actors.start(actors.ensure, str(root), on_s3.uri, on_s3.arguments, {})
    until(lambda: proxy.body_bytes() > 0)

    with pytest.raises(ModelInUseError, match=f"a download by pod .*pid {child.pid}"):
        store.remove(on_s3.uri)

    proxy.limit_bytes_per_second = None
    child.join()
    assert read_tree(store.get(on_s3.uri).path) == FILES


@pytest.fixture
def holder(root, present):
    """
    A process that holds the model open, and what makes it let go and end.
    """
    line, far_end = actors.context().Pipe()
    process = actors.start(holders.hold, str(root), present.uri, far_end)
    assert line.poll(60)
    yield process, lambda: (line.send("leave"), process.join())
    process.kill()
    process.join()


@pytest.fixture
def short_leases(root):
    """
    A store whose claims are dead after half a second without a sign of life.
    """
    return ModelStore(root, mode="rw", lease_seconds=RACE_SECONDS)


def log_of(root, key):
    return [path.name for path in sorted((root / ".kserve-pvc/keys" / key / "log").iterdir())]


def leases_in(root):
    return list((root / ".kserve-pvc/leases").glob("*/*"))


@pytest.mark.usefixtures("short_leases")
def test_a_model_in_use_is_kept(root, present, holder):
    """
    While another process holds a model open its removal is refused, and goes through once that process has left.
    """
    process, let_go = holder
    store = ModelStore(root, mode="rw")

    with pytest.raises(ModelInUseError, match="in use by pod") as caught:
        store.remove(present.uri, trash_seconds=0)

    kept = store.get(present.uri)
    assert [f"pid {process.pid}" in reader for reader in caught.value.readers] == [True]
    assert (kept.path, kept.record.files, store.verify(present.uri, "full").ok) == (
        present.path,
        present.record.files,
        True,
    )
    assert log_of(root, present.key) == ["000000000001.commit"]
    let_go()
    assert leases_in(root) == []
    store.remove(present.uri, trash_seconds=0)
    assert read_tree(root / "models") == {}


@pytest.mark.timeout(60)
def test_a_killed_reader_keeps_nothing(root, present, holder):
    """
    The lease of a process that no longer exists, which would count for two minutes, does not hold a removal up.
    """
    process, _ = holder
    process.kill()
    process.join()

    ModelStore(root, mode="rw").remove(present.uri, trash_seconds=0)

    assert (present.uri in ModelStore(root), read_tree(root / "models")) == (False, {})
    assert leases_in(root) == []


@pytest.mark.usefixtures("short_leases")
def test_open_protects_from_the_own_process_too(root, present):
    """
    Inside `open` a model cannot be removed; afterwards no lease is left.
    """
    store = ModelStore(root, mode="rw")

    with store.open(present.uri) as model:
        with pytest.raises(ModelInUseError):
            store.remove(present.uri)
        assert read_tree(model.path) == FILES

    assert leases_in(root) == []
    assert store.get(present.uri).path == present.path


def test_open_gives_the_lease_back_after_an_error(root, present):
    """
    An exception inside `open` travels on and leaves no lease.
    """
    store = ModelStore(root, mode="rw")

    with pytest.raises(KeyError) as caught, store.open(present.uri):
        raise KeyError(len(leases_in(root)))

    assert caught.value.args == (1,)
    assert leases_in(root) == []


def test_a_read_only_store_opens_without_a_trace(root, present):
    """
    Read-only, `open` gives the model and writes no lease; an absent model is an error.
    """
    store, before = ModelStore(root), listing(root)

    with store.open(present.uri) as model:
        assert read_tree(model.path) == FILES

    with pytest.raises(ModelNotFoundError), store.open("s3://bucket/absent"):
        pass
    assert listing(root) == before


@pytest.fixture
def slow_pod(root, origin, proxy):
    """
    Start a download in another process, which calls itself a pod and does not get far.
    """
    started = []

    def start(uri):
        proxy.limit_bytes_per_second = 50_000
        env = {**origin.environ, "AWS_ENDPOINT_URL": proxy.endpoint, "POD_NAME": "server-0", "NODE_NAME": "node-a"}
        started.append(shell.start(root, "--json", "ensure", uri, env=env))
        until(lambda: any(lock.bytes_done for lock in ModelStore(root).locks()))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_whoever_waited_too_long_is_told_for_whom(root, on_s3, slow_pod):
    """
    The timeout names pod, node, uid and process of the downloader, how far it is and when it last showed a sign of
    life.
    """
    store = ModelStore(root, mode="rw", lease_seconds=2, **on_s3.arguments)
    process = slow_pod(on_s3.uri)

    with pytest.raises(LockTimeoutError) as caught:
        store.ensure(on_s3.uri, timeout=0, progress=False)

    error = caught.value
    assert error.holder == f"pod server-0 on node-a (uid {os.geteuid()}, pid {process.pid})"
    assert (error.ref, error.bytes_total, 0 < error.bytes_done < SIZE) == (on_s3.uri, SIZE, True)
    assert isinstance(error, TimeoutError)
    assert all(
        word in str(error)
        for word in (error.holder, on_s3.uri, f"of {format_bytes(SIZE)}", "raise `timeout`", "kserve-pvc locks")
    )


def test_locks_show_who_downloads(root, on_s3, slow_pod):
    """
    A read-only store lists the claim with holder, progress and rate, and changes nothing by it.
    """
    ModelStore(root, mode="rw", lease_seconds=2)
    started = datetime.now(UTC).replace(microsecond=0)
    process = slow_pod(on_s3.uri)

    (lock,) = ModelStore(root).locks()

    assert (lock.uri, lock.epoch, lock.state, lock.bytes_total) == (on_s3.uri, 1, "held", SIZE)
    assert lock.holder == f"pod server-0 on node-a (uid {os.geteuid()}, pid {process.pid})"
    assert 0 < lock.bytes_done < SIZE
    assert lock.bytes_per_second > 0
    assert started <= datetime.fromisoformat(lock.since) <= datetime.now(UTC)


def test_a_killed_downloader_is_shown_as_dead(root, on_s3, slow_pod):
    """
    The claim of a process that no longer exists says so.
    """
    ModelStore(root, mode="rw", lease_seconds=2)
    process = slow_pod(on_s3.uri)

    process.kill()
    process.wait()

    assert [lock.state for lock in ModelStore(root).locks()] == ["dead"]


@pytest.mark.timeout(120)
def test_a_broken_claim_lets_another_process_download_at_once(root, on_s3, proxy):
    """
    Whoever breaks the claim of a stopped process downloads without waiting for its lease, and that process comes to the
    same model.
    """
    store = ModelStore(root, mode="rw", lease_seconds=3600, **on_s3.arguments)
    proxy.limit_bytes_per_second = 50_000
    results = actors.context().Queue()
    stopped = actors.start(actors.ensure, str(root), on_s3.uri, on_s3.arguments, {}, results)
    until(lambda: proxy.body_bytes() > 0)
    os.kill(stopped.pid, signal.SIGSTOP)
    proxy.limit_bytes_per_second = None

    store.break_lock(on_s3.uri)
    broken = list(store.locks())
    model = store.ensure(on_s3.uri, progress=False)
    os.kill(stopped.pid, signal.SIGCONT)

    outcome = results.get(timeout=60)
    stopped.join()
    assert (broken, model.status) == ([], "downloaded")
    assert outcome[2] == str(model.path)
    assert read_tree(model.path) == FILES


@pytest.mark.parametrize(("arguments", "mode"), [({}, "r"), ({"mode": "r"}, "r"), ({"mode": "rw"}, "rw")])
def test_a_store_is_read_only_unless_asked_otherwise(root, arguments, mode):
    """
    The mode is read-only by default, and shown.
    """
    store = ModelStore(root, **arguments)

    assert (store.mode, store.root, repr(store)) == (mode, root, f"ModelStore({str(root)!r}, mode={mode!r})")


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"mode": "w"}, "mode"),
        ({"mode": "RW"}, "mode"),
        ({"locker": "redis"}, "locker"),
        ({"locker": ""}, "locker"),
        ({"lease_seconds": 0}, "lease_seconds"),
        ({"lease_seconds": -1}, "lease_seconds"),
        ({"lease_seconds": float("nan")}, "lease_seconds"),
        ({"lease_seconds": 1e9}, "lease_seconds"),
        ({"part_bytes": 0}, "part_bytes"),
    ],
)
def test_an_argument_that_means_nothing_is_refused(root, arguments, name):
    """
    A senseless argument is named, and nothing is created.
    """
    with pytest.raises(SettingsError, match=f"`{name}`") as caught:
        ModelStore(root, **{"mode": "rw", **arguments})

    assert isinstance(caught.value, ValueError)
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("timeout", [-5, float("nan")])
def test_a_timeout_that_means_nothing_is_refused(root, on_disk, timeout):
    """
    A negative timeout is named as a senseless argument is.
    """
    with pytest.raises(SettingsError, match="timeout"):
        ModelStore(root, mode="rw").ensure(on_disk.uri, timeout=timeout, progress=False)


READONLY = "storage.kserve.io/readonly"


@pytest.mark.parametrize(
    ("environ", "annotations", "mode"),
    [
        ({}, {}, "r"),
        ({"KSERVE_PVC_MODE": "rw"}, {}, "rw"),
        ({"KSERVE_PVC_MODE": "r"}, {READONLY: "false"}, "r"),
        ({}, {READONLY: "false"}, "rw"),
        *(({}, {READONLY: value}, "r") for value in ("true", "False", "FALSE", "0", "no", "", " false")),
        ({}, {"storage.kserve.io/other": "false"}, "r"),
    ],
)
def test_the_environment_opens_a_store_in_the_mode_it_says(root, environ, annotations, mode):
    """
    `KSERVE_PVC_MODE` decides, else exactly the annotation `"false"` opens read-write, else a store is read-only.
    """
    store = ModelStore.from_env(environ={"KSERVE_PVC_STORE": str(root), **environ}, annotations=annotations)

    assert (store.root, store.mode) == (root, mode)


@pytest.mark.parametrize(
    ("line", "mode"), [(f'{READONLY}="false"', "rw"), (f'{READONLY}="true"', "r"), ('a="b"', "r"), (None, "r")]
)
def test_the_pods_annotations_are_read_from_a_file(root, tmp_path, line, mode):
    """
    The downward-API file named by `KSERVE_PVC_ANNOTATIONS` counts as annotations do; a missing file says nothing.
    """
    path = tmp_path / "annotations"
    if line is not None:
        path.write_text(f'kubernetes.io/config.source="api"\n{line}\n')

    store = ModelStore.from_env(root, environ={"KSERVE_PVC_ANNOTATIONS": str(path)})

    assert store.mode == mode


@pytest.mark.parametrize("locker", ["lease", "flock"])
def test_a_store_remembers_its_locker_and_lease(root, locker):
    """
    What is chosen at the creation is written down, and counts for everybody who asks for nothing else.
    """
    ModelStore(root, mode="rw", locker=locker, lease_seconds=7)

    settings = json.loads((root / ".kserve-pvc/store.json").read_text())
    agreeing = [
        ModelStore(root),
        ModelStore(root, mode="rw"),
        ModelStore(root, mode="rw", locker=locker, lease_seconds=7),
        ModelStore.from_env(
            root, environ={"KSERVE_PVC_LOCKER": locker, "KSERVE_PVC_LEASE_SECONDS": "7"}, annotations={}
        ),
    ]
    assert (settings["format"], settings["locker"], settings["lease_seconds"]) == (1, locker, 7)
    assert [store.mode for store in agreeing] == ["r", "rw", "rw", "r"]


def test_the_environment_chooses_the_locker_of_a_new_store(root):
    """
    `KSERVE_PVC_LOCKER` and `KSERVE_PVC_LEASE_SECONDS` count when a store is created.
    """
    environ = {"KSERVE_PVC_MODE": "rw", "KSERVE_PVC_LOCKER": "flock", "KSERVE_PVC_LEASE_SECONDS": "12.5"}
    ModelStore.from_env(root, environ=environ, annotations={})

    settings = json.loads((root / ".kserve-pvc/store.json").read_text())
    assert (settings["locker"], settings["lease_seconds"]) == ("flock", 12.5)


@pytest.mark.parametrize(
    ("arguments", "setting", "stored", "requested"),
    [({"locker": "flock"}, "locker", "lease", "flock"), ({"lease_seconds": 60}, "lease_seconds", "7", "60")],
)
def test_a_contender_that_disagrees_is_told_so(root, arguments, setting, stored, requested):
    """
    Another locker or lease than the store's is refused, with both named, and the store's stays; a reader contends for
    nothing.
    """
    ModelStore(root, mode="rw", lease_seconds=7)
    before = listing(root)

    with pytest.raises(LockerMismatchError, match=f"`{stored}`, not `{requested}`") as caught:
        ModelStore(root, mode="rw", **arguments)

    assert caught.value.fields == {"root": str(root), "setting": setting, "stored": stored, "requested": requested}
    assert ModelStore(root, **arguments).mode == "r"
    assert listing(root) == before


def test_two_stores_on_one_root_are_one_store(root, on_disk):
    """
    What one object downloads or removes is at once present or absent for another, however early that was opened.
    """
    early, writer = ModelStore(root), ModelStore(root, mode="rw")
    another = ModelStore(root, mode="rw")

    path = writer.ensure(on_disk.uri, progress=False).path
    seen = [early.get(on_disk.uri).path, another.ensure(on_disk.uri).path]
    another.remove(on_disk.uri)

    assert seen == [path, path]
    assert [on_disk.uri in store for store in (early, writer, another)] == [False] * 3


FORKING = """
import json, os, sys
from kserve_pvc import ModelStore

root, options, first, second, third = sys.argv[1:]
store = ModelStore(root, mode="rw", storage_options=json.loads(options))
store.ensure(first, progress=False)
child = os.fork()
if not child:
    code = 1
    try:
        code = 0 if store.ensure(second, progress=False).status == "downloaded" else 2
    finally:
        os._exit(code)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(code, store.ensure(second).status, store.ensure(third, progress=False).status)
"""


def test_a_store_goes_on_working_in_a_forked_child(root, s3, upload):
    """
    After a fork the child downloads with the same object, and so does the parent.
    """
    uris = [upload({f"{number}/weights.bin": os.urandom(100_000)}) + f"/{number}" for number in range(3)]

    said = shell.python(FORKING, str(root), json.dumps(s3["storage_options"]), *uris)

    assert said.split() == ["0", "present", "downloaded"]
    assert all(report.ok for report in ModelStore(root).verify_all("full"))


CANARIES = ("canary-key", "canary-secret", "canary-token", "canary-user")


def texts_of(error: Exception) -> str:
    """
    Everything that a program may show of an error, pickled and with the errors it came from.
    """
    shown = [repr(error), str(error), *traceback.format_exception(error), repr(pickle.dumps(error))]
    return "\n".join([*shown, repr(getattr(error, "fields", ""))])


def test_working_credentials_appear_nowhere(root, on_s3, origin, caplog, capfd):
    """
    Key and secret of a download are in no file and name of the store, in no log, and in nothing that is shown.
    """
    caplog.set_level(logging.DEBUG, logger="kserve_pvc")
    store = ModelStore(root, mode="rw", **on_s3.arguments)
    model = store.ensure(on_s3.uri)

    shown = [
        store,
        model,
        model.record,
        store.list(),
        store.resolve(on_s3.uri),
        store.plan(on_s3.uri),
        store.verify(on_s3.uri, "full"),
    ]
    texts = {f"shown {type(value).__name__}": repr(value) for value in shown}
    texts |= {"pickled": repr(pickle.dumps(model)), "logs": caplog.text, "streams": "".join(capfd.readouterr())}
    texts |= {
        str(p): p.name + p.read_bytes().decode("latin-1")
        for p in root.rglob("*")
        if p.is_file() and ".bin" not in p.name
    }
    leaks = [name for name, text in texts.items() if origin.key in text or origin.secret in text]
    assert leaks == []
    assert any(name.endswith("000000000001.commit") for name in texts)


def test_refused_credentials_appear_nowhere(root, upload, proxy, caplog, capfd):
    """
    Key, secret and token that the source refuses are in no error, no file of the store, no log and no output.
    """
    caplog.set_level(logging.DEBUG, logger="kserve_pvc")
    options = {"endpoint_url": proxy.endpoint, "key": CANARIES[0], "secret": CANARIES[1], "token": CANARIES[2]}
    store = ModelStore(root, mode="rw", storage_options=options)
    uri = upload(FILES)

    with pytest.raises(SourceDeniedError) as caught:
        store.ensure(uri)

    texts = {
        "error": texts_of(caught.value),
        "store": repr(store),
        "logs": caplog.text,
        "streams": "".join(capfd.readouterr()),
    }
    texts |= {str(p): p.name + p.read_bytes().decode("latin-1") for p in root.rglob("*") if p.is_file()}
    assert [name for name, text in texts.items() if any(canary in text for canary in CANARIES)] == []


def test_credentials_inside_an_endpoint_appear_nowhere(root):
    """
    An endpoint with user, password and query, which no client accepts, is repeated neither by the error nor by its
    causes.
    """
    endpoint = f"http://{CANARIES[3]}:{CANARIES[1]}@127.0.0.1:9/?token={CANARIES[2]}"
    options = {"endpoint_url": endpoint, "key": CANARIES[0], "secret": CANARIES[1]}
    store = ModelStore(root, mode="rw", storage_options=options)

    with pytest.raises(StoreError) as caught:
        store.ensure("s3://models/model", progress=False)

    assert [canary for canary in CANARIES if canary in texts_of(caught.value)] == []
