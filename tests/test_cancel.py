"""
Ending a call with `cancel=`: its claim is free within a second whatever it waits for, and what it fetched is kept.
"""

from __future__ import annotations

import os
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import pytest
import shell
from silence import SilentProxy
from sources import FakeBackend, Interfering
from trees import read_tree, write_files
from waiting import until
from webserver import WebServer, page

from kserve_pvc import (
    BytesAdopted,
    DownloadCancelledError,
    Event,
    ModelStore,
    SettingsError,
    TransferStarted,
    WaitingForDownload,
)
from kserve_pvc._download.unpacking import Unpacking

FILES = {f"{number}.bin": bytes([number]) * 100_000 for number in range(12)}
SIZE = 12 * 100_000
# What the workers may have requested ahead of the silent file, and not written yet.
AHEAD = 4 * 100_000
# What a call may take to end. The promise is a second; a busy machine is given some more.
SOON = 1.5


def is_listing(target: str) -> bool:
    return "list-type" in target


def is_last_file(target: str) -> bool:
    return "/9.bin" in target  # As they are listed.


@pytest.fixture(params=["listing", "response", "body"])
def silent(request, origin) -> Iterator[SilentProxy]:
    """
    A proxy in front of a real S3 server that falls silent in the listing, before a response, or within a body.
    """
    at = is_listing if request.param == "listing" else is_last_file
    with SilentProxy(origin.endpoint, at=at, in_body=request.param == "body") as proxy:
        proxy.is_listing = request.param == "listing"
        yield proxy


def options(proxy, origin) -> dict[str, object]:
    return {"storage_options": {"endpoint_url": proxy.endpoint, "key": origin.key, "secret": origin.secret}}


class Call:
    """
    A call in a thread, and how it ended.
    """

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self.error: BaseException | None = None
        self.seconds = 0.0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._call()
        except BaseException as error:
            self.error = error

    def cancel(self, event: threading.Event) -> None:
        """
        Set the event, and wait for the end.
        """
        began = time.monotonic()
        event.set()
        self._thread.join(30)
        self.seconds = time.monotonic() - began


def assert_ended_soon(call: Call, store: ModelStore) -> None:
    assert isinstance(call.error, DownloadCancelledError), call.error
    assert isinstance(call.error, InterruptedError)
    assert list(ModelStore(store.root).locks()) == []
    assert call.seconds < SOON


def test_a_silent_source_holds_no_claim(root, origin, upload, silent):
    """
    A call is over within a second while its source says nothing, and the next call fetches only what is missing.
    """
    uri, cancel = upload(FILES), threading.Event()
    store = ModelStore(root, mode="rw", **options(silent, origin))
    call = Call(lambda: store.ensure(uri, progress=False, max_workers=2, cancel=cancel))
    silent.silenced.wait(30)
    until(lambda: silent.is_listing or silent.body_bytes() >= SIZE - AHEAD, 10)
    time.sleep(0.3)

    call.cancel(cancel)

    assert_ended_soon(call, store)
    silent.speak()
    before = silent.body_bytes()
    model = store.ensure(uri, progress=False)
    assert read_tree(model.path) == FILES
    assert silent.body_bytes() - before <= (SIZE if silent.is_listing else AHEAD)


class Blocking(FakeBackend):
    """
    A source whose file `last` blocks the thread that reads it, as a client without a poll interval does.
    """

    def __init__(self) -> None:
        super().__init__({**{name: name.encode() * 100 for name in "abcdefgh"}, "last": b"last"})
        self.blocks, self.goes_on = threading.Event(), threading.Event()

    @contextmanager
    def open_range(self, file, start, stop):
        with super().open_range(file, start, stop) as reader:
            if file.address == "last":
                honest = reader.readinto
                reader.readinto = lambda buffer: (self.blocks.set(), self.goes_on.wait(30), honest(buffer))[2]
            yield reader


class Counting:
    """
    A callback that counts how often it is called.
    """

    calls = 0

    def set_size(self, size: int) -> None:
        self.calls += 1

    def relative_update(self, inc: int = 1) -> None:
        self.calls += 1


def test_what_is_left_behind_ends_with_its_source(root):
    """
    A thread that cannot be interrupted closes all it has open once its source goes on, and reports nothing more.
    """
    source, cancel, events, callback = Blocking(), threading.Event(), [], Counting()
    store = ModelStore(root, mode="rw", backends={"fake": source.factory})
    before = len(os.listdir("/proc/self/fd"))
    how = {"progress": False, "cancel": cancel, "on_event": events.append, "callback": callback}
    call = Call(lambda: store.ensure("fake://x/y", **how))
    assert source.blocks.wait(30)
    call.cancel(cancel)
    told = len(events), callback.calls
    left = [thread for thread in threading.enumerate() if thread.name.startswith("kserve-pvc-download")]
    source.goes_on.set()

    assert_ended_soon(call, store)
    assert len(left) == 1
    until(lambda: not [t for t in threading.enumerate() if t.name.startswith("kserve-pvc")])
    assert (len(events), callback.calls) == told
    assert len(os.listdir("/proc/self/fd")) <= before
    assert store.list() == []


def test_a_call_that_waits_for_another_process_can_be_cancelled(root, origin, upload, proxy):
    """
    The waiting call ends at once and leaves the downloader alone.
    """
    uri = upload(FILES)
    proxy.limit_bytes_per_second = 300_000
    downloader = shell.start(root, "ensure", uri, env={**origin.environ, "AWS_ENDPOINT_URL": proxy.endpoint})
    until(lambda: ModelStore(root).locks())
    store, cancel, waits = ModelStore(root, mode="rw"), threading.Event(), threading.Event()

    def listen(event: Event) -> None:
        if isinstance(event, WaitingForDownload):
            waits.set()

    call = Call(lambda: store.ensure(uri, progress=False, cancel=cancel, on_event=listen))
    assert waits.wait(30)
    call.cancel(cancel)

    assert isinstance(call.error, DownloadCancelledError)
    assert call.seconds < SOON
    proxy.limit_bytes_per_second = None
    _, stderr = downloader.communicate(timeout=60)
    assert downloader.returncode == 0, stderr


def test_a_call_that_waits_for_a_thread_of_its_process_can_be_cancelled(root):
    """
    Of two threads that call for one model, the one that waits ends, and the other one downloads to its end.
    """
    at_work, go_on, cancel = threading.Event(), threading.Event(), threading.Event()
    slow = Interfering(FakeBackend({"a": b"a"}), after_resolve=lambda: (at_work.set(), go_on.wait(30)))
    store = ModelStore(root, mode="rw", backends={"slow": slow.factory})

    first = threading.Thread(target=lambda: store.ensure("slow://x/y", progress=False))
    first.start()
    at_work.wait(30)
    second = Call(lambda: store.ensure("slow://x/y", progress=False, cancel=cancel))
    second.cancel(cancel)
    go_on.set()
    first.join()

    assert isinstance(second.error, DownloadCancelledError)
    assert second.seconds < SOON
    assert [model.uri for model in store.list()] == ["slow://x/y"]


def test_hashing_ends(root, tmp_path):
    """
    A call that hashes a large file of an older version, to reuse it, ends before it has read all of it.
    """
    source = tmp_path / "source"
    write_files(source, {"config.json": b"{}", "big.bin": bytes(200_000_000)})
    uri, cancel, events = f"file://{source}", threading.Event(), []
    store = ModelStore(root, mode="rw")
    store.ensure(uri, progress=False)
    (source / "config.json").write_text("[]")

    def listen(event: Event) -> None:
        events.append(event)
        if isinstance(event, TransferStarted):
            cancel.set()

    with pytest.raises(DownloadCancelledError):
        store.ensure(uri, refresh=True, progress=False, cancel=cancel, on_event=listen)

    assert sum(event.size_bytes for event in events if isinstance(event, BytesAdopted)) < 200_000_000
    assert store.locks() == []
    assert store.ensure(uri, refresh=True, progress=False).status == "downloaded"


def test_unpacking_ends_and_keeps_the_archive(root, tmp_path, monkeypatch):
    """
    A call that unpacks an archive ends between two members, and the next call does not fetch the archive again.
    """
    cancel, honest = threading.Event(), Unpacking._write
    archive = tmp_path / "model.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for name, data in FILES.items():
            packed.writestr(name, data)

    def write(self: Unpacking, member: object) -> object:
        cancel.set()
        return honest(self, member)

    monkeypatch.setattr(Unpacking, "_write", write)
    with WebServer() as server:
        server.pages["/model.zip"] = page(archive.read_bytes())
        store = ModelStore(root, mode="rw", storage_options={"http": server.storage_options})
        with pytest.raises(DownloadCancelledError):
            store.ensure(server.uri("model.zip"), progress=False, cancel=cancel)
        assert store.locks() == []
        model = store.ensure(server.uri("model.zip"), progress=False)

    assert (model.bytes_fetched, read_tree(model.path)) == (0, FILES)


def test_what_was_noted_is_kept_while_another_file_hangs(root):
    """
    The notes of small files are written although the thread that would write them cannot be interrupted.
    """
    source, cancel, other = Blocking(), threading.Event(), FakeBackend(Blocking().files)
    store = ModelStore(root, mode="rw", backends={"fake": source.factory})
    call = Call(lambda: store.ensure("fake://x/y", progress=False, max_workers=1, cancel=cancel))
    assert source.blocks.wait(30)
    call.cancel(cancel)

    model = ModelStore(root, mode="rw", backends={"fake": other.factory}).ensure("fake://x/y", progress=False)
    source.goes_on.set()

    assert_ended_soon(call, store)
    assert other.calls == ["resolve", "last"]
    assert read_tree(model.path) == source.files


def test_a_silent_listing_of_a_refresh_can_be_cancelled(root, origin, upload):
    """
    A call that asks whether there is a newer version ends within a second, and the model stays.
    """
    uri, cancel = upload({"a": b"a"}), threading.Event()
    ModelStore(root, mode="rw", **options(origin, origin)).ensure(uri, progress=False)
    with SilentProxy(origin.endpoint, at=is_listing) as silent:
        store = ModelStore(root, mode="rw", **options(silent, origin))
        call = Call(lambda: store.ensure(uri, refresh=True, progress=False, cancel=cancel))
        silent.silenced.wait(30)
        call.cancel(cancel)

    assert_ended_soon(call, store)
    assert read_tree(store.get(uri).path) == {"a": b"a"}


def test_a_model_that_is_present_is_returned_all_the_same(root, source):
    """
    A cancelled call does not download, and has nothing to cancel where the model is present.
    """
    store, cancel = ModelStore(root, mode="rw"), threading.Event()
    cancel.set()

    with pytest.raises(DownloadCancelledError):
        store.ensure(f"file://{source}", progress=False, cancel=cancel)
    assert store.list() == []
    store.ensure(f"file://{source}", progress=False)

    assert store.ensure(f"file://{source}", cancel=cancel).status == "present"


def test_an_import_can_be_cancelled(root, source, tmp_path):
    """
    An import that is cancelled publishes nothing, and continues when it is repeated.
    """
    store, cancel = ModelStore(root, mode="rw"), threading.Event()
    model = store.ensure(f"file://{source}", progress=False)
    store.export(f"file://{source}", tmp_path / "model.bundle", progress=False)
    other = tmp_path / "other"
    other.mkdir()
    importing = ModelStore(other, mode="rw")
    cancel.set()

    with pytest.raises(DownloadCancelledError):
        importing.import_(tmp_path / "model.bundle", progress=False, cancel=cancel)

    assert (importing.list(), importing.locks()) == ([], [])
    assert read_tree(importing.import_(tmp_path / "model.bundle", progress=False).path) == read_tree(model.path)


@pytest.mark.parametrize("threads", [None, 2], ids=["one by one", "threads"])
def test_warm_gives_each_model_a_result_when_it_is_cancelled(root, origin, upload, threads):
    """
    What is present is a result, what runs ends, and what has not begun does not begin.
    """
    base = upload({f"{name}/{file}": data for name in ("a", "b", "c", "d") for file, data in FILES.items()})
    uris, cancel, here = [f"{base}/{name}" for name in ("a", "b", "c", "d")], threading.Event(), {}
    with SilentProxy(origin.endpoint, at=is_last_file) as silent:
        store = ModelStore(root, mode="rw", **options(silent, origin))
        ModelStore(root, mode="rw", **options(origin, origin)).ensure(uris[3], progress=False)

        def collect(pool: ThreadPoolExecutor | None) -> None:
            here.update((w.uri, w) for w in store.warm(uris, pool, progress=False, cancel=cancel))

        @contextmanager
        def executor() -> Iterator[ThreadPoolExecutor | None]:
            if threads is None:
                yield None
            else:
                with ThreadPoolExecutor(threads) as pool:
                    yield pool

        with executor() as pool:
            call = Call(lambda: collect(pool))
            silent.silenced.wait(30)
            call.cancel(cancel)

    assert (call.error, call.seconds < SOON) == (None, True)
    kinds = {uri: type(here[uri].error) for uri in uris}
    assert kinds == {**dict.fromkeys(uris[:3], DownloadCancelledError), uris[3]: type(None)}
    assert store.locks() == []


@pytest.mark.parametrize("what", ["cancel", "on_event"])
def test_what_belongs_to_this_process_is_refused_by_a_process_pool(root, source, what):
    """
    Neither an event nor a listener of this call reaches other processes; the error names the argument.
    """
    store = ModelStore(root, mode="rw")
    arguments = {"cancel": threading.Event()} if what == "cancel" else {"on_event": print}

    with (
        ProcessPoolExecutor(1, mp_context=get_context("forkserver")) as pool,
        pytest.raises(SettingsError, match=what) as caught,
    ):
        list(store.warm([f"file://{source}"], pool, progress=False, **arguments))

    assert "ThreadPoolExecutor" in str(caught.value)


@pytest.mark.parametrize("arguments", [{"cancel": True}, {"cancel": "now"}, {"on_event": "print"}, {"on_event": 5}])
@pytest.mark.parametrize("verb", ["ensure", "warm", "import_"])
def test_arguments_of_the_wrong_kind_are_refused(root, tmp_path, verb, arguments):
    """
    Something that is neither an event nor a function is refused before anything begins.
    """
    store = ModelStore(root, mode="rw")
    (name,) = arguments
    item = {"ensure": "file:///m", "warm": ["file:///m"], "import_": tmp_path / "bundle"}[verb]

    with pytest.raises(SettingsError, match=name):
        getattr(store, verb)(item, **arguments)


def test_a_cancelled_call_says_what_it_was_about():
    """
    The error names the model and what to do, and is not one of a task or a future.
    """
    error = DownloadCancelledError("s3://bucket/model")

    assert str(error).startswith("the call for `s3://bucket/model` was cancelled; ")
    assert error.fields == {"ref": "s3://bucket/model", "kept_bytes": 0, "size_bytes": 0}


def test_an_interrupt_does_not_wait_for_a_silent_source(root, origin, upload, tmp_path):
    """
    Ctrl-C ends a command within a second while its source says nothing in the listing, and its claim is free.
    """
    uri = upload(FILES)
    ModelStore(root, mode="rw")
    with SilentProxy(origin.endpoint, at=is_listing) as silent:
        command = shell.start(root, "ensure", uri, env={**origin.environ, "AWS_ENDPOINT_URL": silent.endpoint})
        assert silent.silenced.wait(30)
        until(lambda: ModelStore(root).locks())
        began = time.monotonic()
        command.terminate()
        command.communicate(timeout=30)
        seconds = time.monotonic() - began

    assert (command.returncode, ModelStore(Path(root)).locks()) == (143, [])
    assert seconds < 2 * SOON  # The end of the interpreter included.
