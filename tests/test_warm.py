"""
Several models at once: each fetched once, each with its result, whatever becomes of the others.
"""

import argparse
import io
import json
import os
import pickle
import signal
import subprocess
import threading
import time
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from multiprocessing import get_context

import attrs
import pytest
import shell
from fsspec.callbacks import Callback
from sources import FakeBackend, Interfering
from trees import model_files, read_tree, write_files
from waiting import until

from kserve_pvc import (
    InvalidURIError,
    ModelRef,
    ModelStore,
    PolicyError,
    ReadOnlyStoreError,
    SettingsError,
    SourceNotFoundError,
    SourceUnavailableError,
    StoreFormatError,
)
from kserve_pvc._cli import verbs
from kserve_pvc._show.events import CallFinished, RequestRetried, Subject, WaitingForDownload
from kserve_pvc._show.progress import make_listener

CATALOGUE = {name: model_files(seed=seed, big=200_000) for seed, name in enumerate(("tiny", "small", "large"), 70)}
SIZES = {name: sum(map(len, files.values())) for name, files in CATALOGUE.items()}
SIZE = sum(SIZES.values())


@pytest.fixture
def uris(tmp_path):
    """
    The URIs of the catalogue on a local file system, by name.
    """
    for name, files in CATALOGUE.items():
        write_files(tmp_path / name, files)
    return {name: f"file://{tmp_path / name}" for name in CATALOGUE}


@pytest.fixture
def store(root):
    """
    A store that may write.
    """
    return ModelStore(root, mode="rw")


@pytest.fixture
def buckets(upload):
    """
    The URIs of the catalogue on S3, by name.
    """
    base = upload({f"{name}/{path}": data for name, files in CATALOGUE.items() for path, data in files.items()})
    return {name: f"{base}/{name}" for name in CATALOGUE}


@pytest.fixture(params=["one by one", "threads", "processes"])
def executor(request):
    """
    Each way to run several calls; without an executor they run in this thread.
    """
    # Not by `fork`: this process has threads.
    kinds = {
        "one by one": nullcontext,
        "threads": lambda: ThreadPoolExecutor(3),
        "processes": lambda: ProcessPoolExecutor(2, mp_context=get_context("forkserver")),
    }
    with kinds[request.param]() as made:
        yield made


class Now(Executor):
    """
    An executor that runs a call at once, in the thread that submits it.
    """

    def submit(self, call, /, *arguments, **keywords):
        from concurrent.futures import Future

        future = Future()
        future.set_result(call(*arguments, **keywords))
        return future


class Dying(FakeBackend):
    """
    A back end that kills its process.
    """

    def resolve(self, ref):
        os.kill(os.getpid(), signal.SIGKILL)


def make_dying(options):
    return Dying({})


def by_uri(results) -> dict[str, object]:
    return {warmed.uri: warmed for warmed in results}


def test_a_catalogue_is_fetched_once_each(root, buckets, s3, proxy, executor):
    """
    One by one, by threads or by processes: every model is there, whole, and each byte was sent once.
    """
    store = ModelStore(root, mode="rw", **s3)

    results = list(store.warm(buckets.values(), executor, progress=False))

    found = {warmed.uri: read_tree(warmed.model.path) for warmed in results}
    assert found == {buckets[name]: files for name, files in CATALOGUE.items()}
    assert [(w.ok, w.error, w.model.status, w.ref, w.seconds > 0) for w in results] == [
        (True, None, "downloaded", ModelRef(uri=w.uri), True) for w in results
    ]
    assert sorted(warmed.index for warmed in results) == [0, 1, 2]
    assert proxy.body_bytes() == SIZE == sum(warmed.model.bytes_fetched for warmed in results)
    assert [warmed.model.status for warmed in store.warm(buckets.values(), executor)] == ["present"] * 3


def test_one_that_fails_stops_no_other(root, buckets, s3, executor):
    """
    What is missing at the source and what is no URI are results with their error, and all others are fetched.
    """
    store = ModelStore(root, mode="rw", **s3)
    missing, wrong, secret = "s3://models/absent/model", "no uri at all", "s3://key:canary@models/x"

    results = list(store.warm([missing, buckets["tiny"], wrong, buckets["small"], secret], executor, progress=False))

    errors = {warmed.index: type(warmed.error) for warmed in results if not warmed.ok}
    assert errors == {0: SourceNotFoundError, 2: InvalidURIError, 4: PolicyError}
    assert {warmed.uri for warmed in results if warmed.ok} == {buckets["tiny"], buckets["small"]}
    assert [(w.ref, w.model) for w in results if w.index in (2, 4)] == [(None, None)] * 2
    assert "canary" not in repr(results)


def test_a_foreign_error_is_a_result(root, store):
    """
    A back end that raises what it should not spoils no other model.
    """

    class Wild(FakeBackend):
        def resolve(self, ref):
            raise RuntimeError("wild")

    good = FakeBackend({"a": b"a"})
    store = ModelStore(root, mode="rw", backends={"wild": lambda options: Wild({}), "good": good.factory})

    wild, fine = store.warm(["wild://x/y", "good://x/y"], progress=False)

    assert (wild.ok, type(wild.error), str(wild.error), fine.ok) == (False, RuntimeError, "wild", True)


def test_a_model_named_twice_is_fetched_once(root, buckets, s3, proxy, executor):
    """
    However it is spelled as an item, one model has one result, which carries the place where it was named first.
    """
    uri = buckets["tiny"]
    items = [
        buckets["small"],
        uri,
        ModelRef(uri=uri),
        {"uri": uri},
        {"uri": uri, "revision": None, "ignore_patterns": []},
    ]

    results = list(ModelStore(root, mode="rw", **s3).warm(items, executor, progress=False))

    assert {warmed.index: warmed.uri for warmed in results} == {0: buckets["small"], 1: uri}
    assert proxy.body_bytes() == SIZES["tiny"] + SIZES["small"]


def test_items_choose_parts_of_models(store, uris):
    """
    Patterns of a mapping or a ref make the models that `ensure` makes of them.
    """
    uri = uris["tiny"]
    items = [{"uri": uri, "allow_patterns": "*.json"}, ModelRef(uri=uri, ignore_patterns=("weights/*",)), uri]

    results = list(store.warm(items, progress=False))

    assert [sorted(read_tree(w.model.path)) for w in results] == [
        ["config.json"],
        ["config.json", "empty"],
        sorted(CATALOGUE["tiny"]),
    ]
    assert store.get(uri, allow_patterns="*.json").key == results[0].model.key == results[0].ref.key


@pytest.mark.parametrize(
    "items",
    [
        "file:///model",
        {"uri": "file:///model"},
        ModelRef(uri="file:///model"),
        [{"url": "file:///model"}],
        [{}],
        [{"uri": "a", "allow": "b"}],
        [5],
    ],
    ids=repr,
)
def test_what_is_no_list_of_models_is_refused(store, items):
    """
    A single URI, a word that no item has, and anything else are mistakes of the caller and are told before anything
    begins.
    """
    with pytest.raises(SettingsError, match="items"):
        store.warm(items)


@pytest.mark.parametrize(("name", "arguments"), [("timeout", {"timeout": -1}), ("executor", {"executor": 4})])
def test_senseless_arguments_are_refused_at_once(store, uris, name, arguments):
    """
    They are told before the first result is asked for.
    """
    with pytest.raises(SettingsError, match=name):
        store.warm(uris.values(), **arguments)


def test_a_secret_in_an_item_is_not_repeated(store):
    """
    The error of an item that cannot be understood names its place and its words, not what they hold.
    """
    with pytest.raises(SettingsError) as caught:
        store.warm([{"uri": "s3://b/m", "token": "canary"}])

    assert "items[0]" in str(caught.value)
    assert "canary" not in str(caught.value) + repr(caught.value)


def test_a_read_only_store_says_what_is_missing(root, store, uris):
    """
    What is there is a result, and what is not is an error that says why it was not fetched.
    """
    store.ensure(uris["tiny"], progress=False)

    results = by_uri(ModelStore(root).warm(uris.values(), progress=False))

    assert {uri: (warmed.ok, type(warmed.error)) for uri, warmed in results.items()} == {
        uris["tiny"]: (True, type(None)),
        uris["small"]: (False, ReadOnlyStoreError),
        uris["large"]: (False, ReadOnlyStoreError),
    }


def test_refreshing_asks_every_source(store, uris, tmp_path):
    """
    With `refresh` what has changed is fetched beside the old version, and what has not is present.
    """
    before = by_uri(store.warm(uris.values(), progress=False))
    (tmp_path / "small/config.json").write_text("{}")

    after = by_uri(store.warm(uris.values(), refresh=True, progress=False))

    assert {name: after[uri].model.status for name, uri in uris.items()} == {
        "tiny": "present",
        "small": "downloaded",
        "large": "present",
    }
    assert after[uris["small"]].model.version != before[uris["small"]].model.version


def test_nothing_begins_before_it_is_asked_for(store, uris, root):
    """
    An iterator that is closed, or forgotten, before its first result has fetched nothing.
    """
    with ThreadPoolExecutor(2) as pool:
        for executor in (None, pool):
            store.warm(uris.values(), executor, progress=False).close()
            store.warm(uris.values(), executor, progress=False)

    assert ModelStore(root).list() == []


def test_closing_one_by_one_fetches_no_more(store, uris):
    """
    After the first result the rest is not even begun.
    """
    results = store.warm(uris.values(), progress=False)

    first = next(results)
    results.close()

    assert [model.uri for model in store.list()] == [first.uri]


def test_closing_cancels_what_has_not_begun(root):
    """
    Of four models in two threads one is done, two are under way and go on to their end, and the last never begins.
    """
    at_work, go_on = threading.Barrier(3, timeout=30), threading.Event()
    slow = Interfering(FakeBackend({"a": b"a"}), after_resolve=lambda: (at_work.wait(), go_on.wait(30)))
    quick = FakeBackend({"a": b"a"})
    store = ModelStore(root, mode="rw", backends={"slow": slow.factory, "quick": quick.factory})

    with ThreadPoolExecutor(2) as pool:
        results = store.warm(["slow://x/1", "quick://x/2", "slow://x/3", "quick://x/4"], pool, progress=False)
        first = next(results)
        at_work.wait()
        results.close()
        go_on.set()

    assert first.uri == "quick://x/2"
    assert sorted(model.uri for model in store.list()) == ["quick://x/2", "slow://x/1", "slow://x/3"]


@pytest.fixture
def two_at_work(root):
    """
    A store with one quick source and two that come to a halt in their first range: until both are there, and until let
    go.
    """
    at_work, let_go = threading.Barrier(3, timeout=30), threading.Event()

    def wait(number, file):
        if number == 1:
            at_work.wait()
            let_go.wait(30)

    slow = {
        f"slow{n}": Interfering(FakeBackend({"a": b"a" * 5, "b": b"b" * 5}), before_range=wait).factory
        for n in range(2)
    }
    return ModelStore(root, mode="rw", backends={**slow, "quick": FakeBackend({"a": b"a"}).factory}), at_work, let_go


def test_an_interruption_stops_what_runs(two_at_work):
    """
    An exception raised in the iterator ends the downloads of other threads at their next step, and their claims are
    given back.
    """
    store, at_work, let_go = two_at_work

    with ThreadPoolExecutor(3) as pool:
        results = store.warm(["slow0://x/y", "slow1://x/y", "quick://x/y"], pool, progress=False)
        first = next(results)
        at_work.wait()
        with pytest.raises(KeyboardInterrupt):
            results.throw(KeyboardInterrupt())
        let_go.set()

    assert first.uri == "quick://x/y"
    assert [model.uri for model in store.list()] == ["quick://x/y"]
    assert store.locks() == []


def test_an_interruption_does_not_wait_for_a_silent_source(root):
    """
    A thread whose source says nothing any more inside a file ends as soon as nobody wants its model.
    """
    is_silent, seconds = threading.Event(), 0.02

    class Silent(FakeBackend):
        @contextmanager
        def open_range(self, file, start, stop):
            yield self

        def readinto(self, buffer):
            is_silent.set()
            time.sleep(seconds)
            return

    good = FakeBackend({"a": b"a"})
    backends = {"silent": lambda options: Silent({"a": b"a" * 5}), "good": good.factory}
    store = ModelStore(root, mode="rw", backends=backends, stall_seconds=60)

    with ThreadPoolExecutor(2) as pool:
        results = store.warm(["silent://x/y", "good://x/y"], pool, progress=False)
        first = next(results)
        is_silent.wait(30)
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            results.throw(KeyboardInterrupt())
        pool.shutdown()
        took = time.monotonic() - began

    assert first.uri == "good://x/y"
    assert took < 10
    assert store.locks() == []


def test_an_interruption_between_results_stops_what_runs(two_at_work, monkeypatch):
    """
    A command that is interrupted while it prints a result ends the downloads of its threads before it waits for them.
    """
    store, at_work, let_go = two_at_work

    class Pool(ThreadPoolExecutor):
        def __exit__(self, *raised):
            let_go.set()
            return super().__exit__(*raised)

    def interrupt(warmed, arguments):
        at_work.wait()
        raise KeyboardInterrupt

    monkeypatch.setattr(verbs, "_threads", Pool)
    monkeypatch.setattr(verbs, "show_warmed", interrupt)
    arguments = argparse.Namespace(workers=3, refresh=False, timeout=60.0, max_workers=4, quiet=True)

    with pytest.raises(KeyboardInterrupt):
        verbs._warm_all(store, ["slow0://x/y", "slow1://x/y", "quick://x/y"], arguments)

    assert [model.uri for model in store.list()] == ["quick://x/y"]
    assert store.locks() == []


def test_a_store_and_its_results_travel(root, buckets, s3):
    """
    A store pickles without its clients, and what it finds pickles too.
    """
    store = ModelStore(root, mode="rw", **s3)
    (warmed,) = store.warm([buckets["tiny"]], progress=False)

    copy, travelled = pickle.loads(pickle.dumps((store, warmed)))

    assert (repr(copy), travelled) == (repr(store), warmed)
    assert copy.get(buckets["tiny"]).path == travelled.model.path
    assert travelled.model.record == warmed.model.record


def test_what_other_processes_found_is_remembered(root, uris):
    """
    When the record of a model that another process found is deleted, this process does not believe that there never was
    one.
    """
    store = ModelStore(root, mode="rw")
    with ProcessPoolExecutor(1, mp_context=get_context("forkserver")) as pool:
        (warmed,) = store.warm([uris["tiny"]], pool, progress=False)
    next(root.glob(".kserve-pvc/keys/*/log/*")).unlink()

    with pytest.raises(StoreFormatError, match="records were deleted"):
        store.get(warmed.uri)


@pytest.mark.parametrize("what", ["backends", "callback"])
def test_what_cannot_travel_is_refused_by_name(root, uris, what):
    """
    Processes cannot be given a back end that pickle cannot send, nor a callback; the error says what to use instead.
    """
    store = ModelStore(
        root, mode="rw", backends={"fake": lambda options: FakeBackend({})} if what == "backends" else None
    )
    callback = Callback() if what == "callback" else None

    with (
        ProcessPoolExecutor(1, mp_context=get_context("forkserver")) as pool,
        pytest.raises(SettingsError, match="ThreadPoolExecutor"),
    ):
        list(store.warm(uris.values(), pool, callback=callback, progress=False))


def test_any_executor_will_do(store, uris):
    """
    An executor that runs calls at once gets what it needs, and needs not to be told of this library.
    """
    results = list(store.warm(uris.values(), Now(), progress=False))

    assert [warmed.ok for warmed in results] == [True] * 3


@pytest.mark.parametrize("executor", ["one by one", "threads"], indirect=True)
def test_a_callback_hears_the_sum(root, buckets, s3, executor):
    """
    One callback for several models ends at the size of all of them.
    """
    callback = Callback()

    list(ModelStore(root, mode="rw", **s3).warm(buckets.values(), executor, callback=callback, progress=False))

    assert (callback.size, callback.value) == (SIZE, SIZE)


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_each_line_is_about_one_model(root, buckets, origin, kind):
    """
    Lines of several downloads at once are whole lines, and each names its model.
    """
    script = """
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from kserve_pvc import ModelStore
if __name__ == "__main__":
    with {"threads": ThreadPoolExecutor, "processes": ProcessPoolExecutor}[sys.argv[1]](3) as pool:
        progress = True if sys.argv[1] == "processes" else None
        print([w.ok for w in ModelStore(sys.argv[2], mode="rw").warm(sys.argv[3:], pool, progress=progress)])
"""
    result = subprocess.run(
        [shell.COMMAND[0], "-I", "-c", script, kind, str(root), *buckets.values()],
        env=shell.clean_environ(origin.environ),
        capture_output=True,
        text=True,
        timeout=60,
    )

    announced = [
        f"kserve-pvc: downloading {uri}: 4 files, {SIZES[name] / 1024:.1f} KiB" for name, uri in buckets.items()
    ]
    finished = [f"kserve-pvc: {uri}: downloaded" for uri in buckets.values()]
    assert result.stdout == "[True, True, True]\n"
    assert sorted(result.stderr.splitlines()) == sorted(announced + finished)


ABOUT: Subject = {"store": "/mnt/models", "key": "m-0123456789abcdef", "uri": "s3://b/m", "ref": "s3://b/m"}
WAITING = WaitingForDownload(
    **ABOUT, holder="pod a", since="now", waited=0, idle=0, bytes_done=0, bytes_total=0, bytes_per_second=0
)


def test_events_that_name_no_model_are_named_among_several():
    """
    Who waits and who asks again says for which model if there are others, and only then.
    """
    alone, among = io.StringIO(), io.StringIO()
    for stream, names_model in ((alone, False), (among, True)):
        with make_listener(None, None, stream, names_model=names_model) as tell:
            for event in (
                WAITING,
                RequestRetried(**ABOUT, reason="503", delay=0),
                CallFinished(**ABOUT, status="waited", size_bytes=1, bytes_fetched=0, seconds=1.0),
            ):
                tell(event)

    named = [line.startswith("kserve-pvc: s3://b/m: ") for line in among.getvalue().splitlines()]
    assert named == [True, True, True]
    assert alone.getvalue().splitlines()[2] == "kserve-pvc: s3://b/m: waited"
    assert among.getvalue().replace("s3://b/m: ", "") == alone.getvalue().replace("s3://b/m: ", "")


@pytest.mark.parametrize("several", [False, True])
def test_among_several_each_line_names_its_model(root, capsys, several):
    """
    With an executor, who asks its source again says which one that is; without one there is only one at a time.
    """

    def fail_once(number, file):
        if number == 1:
            raise SourceUnavailableError("wobbly://x/y", "answered 503")

    wobbly = Interfering(FakeBackend({"a": b"a"}), before_range=fail_once)
    store = ModelStore(root, mode="rw", backends={"wobbly": wobbly.factory})

    with ThreadPoolExecutor(1) as pool:
        (warmed,) = store.warm(["wobbly://x/y"], pool if several else None)

    again = [line for line in capsys.readouterr().err.splitlines() if "retrying" in line]
    assert (warmed.ok, len(again), again[0].startswith("kserve-pvc: wobbly://x/y: retrying")) == (True, 1, several)


def test_two_bars_have_a_line_each():
    """
    Bars of two models at once stand below each other, and none is left at the end.
    """

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with (
        make_listener(None, None, stream, names_model=True) as one,
        make_listener(None, None, stream, names_model=True) as other,
    ):
        one(attrs.evolve(WAITING, ref="s3://b/one"))
        other(attrs.evolve(WAITING, ref="s3://b/other"))

    drawn = stream.getvalue()
    assert ("s3://b/one: waiting for pod a" in drawn, "s3://b/other: waiting for pod a" in drawn) == (True, True)
    assert "\n" in drawn
    assert drawn.rpartition("\r")[2] in ("", "\x1b[A")


def test_a_process_that_dies_is_a_result(root, uris):
    """
    The model whose process was killed has an error that says so, and the iterator comes to its end.
    """
    store = ModelStore(root, mode="rw", backends={"dying": make_dying})
    context = get_context("fork")  # This module, whose back end is sent, can be imported only where it is already.

    with ProcessPoolExecutor(1, mp_context=context) as pool:
        (warmed,) = store.warm(["dying://x/y"], pool, progress=False)

    assert (warmed.ok, warmed.uri, type(warmed.error)) == (False, "dying://x/y", BrokenProcessPool)


def catalogue(place, *lines) -> str:
    place.write_text("\n".join(lines) + "\n")
    return str(place)


def test_warm_prints_a_line_for_each(root, uris):
    """
    Each model that is there is a line with its directory on stdout; what a person reads goes to stderr.
    """
    result = shell.kserve_pvc(root, "warm", *uris.values(), "--workers", "2")

    lines = [line.split() for line in result.stdout.splitlines()]
    store = ModelStore(root)
    assert sorted(lines) == sorted(["downloaded", uri, str(store.get(uri).path)] for uri in uris.values())
    assert (result.returncode, result.stderr.splitlines()[-1]) == (0, "kserve-pvc: 3 models, none failed")


@pytest.mark.parametrize("source", ["file", "stdin"])
def test_a_catalogue_is_read_line_by_line(root, uris, tmp_path, source):
    """
    URIs and objects, comments and blank lines, from a file or from standard input, together with URIs as arguments.
    """
    selected = json.dumps({"uri": uris["small"], "allow_patterns": ["*.json"]})
    lines = ["# what the servers need", "", f"  {uris['tiny']}  ", selected, uris["tiny"]]
    name = catalogue(tmp_path / "catalogue.txt", *lines) if source == "file" else "-"

    with shell.start(root, "--json", "warm", "-f", name, uris["large"], stdin=subprocess.PIPE) as process:
        out, _ = process.communicate("\n".join(lines) if source == "stdin" else "", timeout=60)

    store, document = ModelStore(root), json.loads(out)
    models = [store.get(uris["large"]), store.get(uris["tiny"]), store.get(uris["small"], allow_patterns="*.json")]
    assert document == [
        {
            "uri": model.uri,
            "ok": True,
            "key": model.key,
            "path": str(model.path),
            "status": "downloaded",
            "bytes_fetched": model.size_bytes,
            "seconds": entry["seconds"],
            "error": None,
        }
        for model, entry in zip(models, document, strict=True)
    ]
    assert (process.returncode, len(store.list())) == (0, 3)


@pytest.mark.parametrize("workers", ["1", "3"])
def test_the_first_failure_in_the_list_is_the_exit_code(root, uris, tmp_path, workers):
    """
    All are tried; the document tells of each in the order of the list, and the exit code is the first failure's.
    """
    items = [uris["tiny"], f"file://{tmp_path}/absent", "s3://key:canary@b/m", uris["small"]]

    result = shell.kserve_pvc(root, "--json", "warm", "--workers", workers, *items)

    document = shell.document(result)
    assert result.returncode == 7
    assert [(entry["uri"], entry["ok"], (entry["error"] or {}).get("type")) for entry in document] == [
        (uris["tiny"], True, None),
        (f"file://{tmp_path}/absent", False, "SourceNotFoundError"),
        ("s3://b/m", False, "PolicyError"),
        (uris["small"], True, None),
    ]
    assert document[1] == {
        "uri": f"file://{tmp_path}/absent",
        "ok": False,
        "key": ModelRef(uri=f"file://{tmp_path}/absent").key,
        "path": None,
        "status": None,
        "bytes_fetched": 0,
        "seconds": document[1]["seconds"],
        "error": document[1]["error"],
    }
    assert (document[2]["key"], "canary" in result.stdout + result.stderr) == (None, False)
    assert sum("SourceNotFound" in line or "nothing found" in line for line in result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "lines", "told"),
    [
        ((), (), "name at least one URI"),
        (("-f", "CATALOGUE"), ('{"uri": "canary',), "line 1"),
        (("-f", "CATALOGUE"), ("# a comment", '{"url": "canary"}'), "line 2"),
        (("-f", "/nowhere/catalogue.txt"), (), "/nowhere/catalogue.txt"),
        (("--workers", "0", "file:///model"), (), "--workers"),
    ],
)
def test_wrong_usage_of_warm_ends_with_two(root, tmp_path, arguments, lines, told):
    """
    A catalogue that cannot be read says where, without repeating the line, and nothing is fetched.
    """
    name = catalogue(tmp_path / "catalogue.txt", *lines)

    result = shell.kserve_pvc(root, "warm", *(name if word == "CATALOGUE" else word for word in arguments))

    assert (result.returncode, told in result.stderr, "canary" in result.stderr, "Traceback" in result.stderr) == (
        2,
        True,
        False,
        False,
    )
    assert ModelStore(root).list() == []


def test_an_empty_catalogue_is_done(root, tmp_path):
    """
    A file without a model is no mistake: all of nothing is there.
    """
    result = shell.kserve_pvc(root, "--json", "warm", "-f", catalogue(tmp_path / "catalogue.txt", "# none yet"))

    assert (result.returncode, shell.document(result)) == (0, [])


def test_a_terminated_warm_gives_its_claims_back(root, buckets, origin, proxy):
    """
    A Job that is deleted while two models are under way ends within its grace and leaves no claim behind.
    """
    proxy.limit_bytes_per_second = 20_000
    environ = {**origin.environ, "AWS_ENDPOINT_URL": proxy.endpoint}

    with shell.start(root, "warm", "--workers", "2", buckets["tiny"], buckets["small"], env=environ) as process:
        until(lambda: len(ModelStore(root).locks()) == 2 and proxy.body_bytes() > 0)
        process.terminate()
        process.communicate(timeout=30)

    assert process.returncode == 143
    assert ModelStore(root).locks() == []
