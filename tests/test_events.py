"""
What programs are notified of: events for listeners, and records of the logger `kserve_pvc`.
"""

from __future__ import annotations

import io
import logging
import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import attrs
import pytest
import shell
from sources import FakeBackend, Interfering
from trees import write_files
from waiting import until

import kserve_pvc
from kserve_pvc import (
    BytesAdopted,
    BytesReceived,
    CallFailed,
    CallFinished,
    ClaimLost,
    ClaimTakenOver,
    Event,
    LockerUnavailable,
    ModelRemoved,
    ModelStore,
    RequestRetried,
    SourceNotFoundError,
    SourceUnavailableError,
    TransferStarted,
    WaitingForDownload,
)
from kserve_pvc._show.log import extra
from kserve_pvc._show.observing import Delivery

# Version 1 of the events. A field that is missing here was added; one that is missing there breaks programs.
VERSION_1 = {
    "TransferStarted": {"bytes_total", "files", "activity"},
    "BytesAdopted": {"size_bytes"},
    "BytesReceived": {"size_bytes"},
    "WaitingForDownload": {"holder", "since", "waited", "idle", "bytes_done", "bytes_total", "bytes_per_second"},
    "ClaimTakenOver": {"holder", "reason"},
    "ClaimLost": set(),
    "LockerUnavailable": {"locker"},
    "RequestRetried": {"reason", "delay"},
    "CallFinished": {"status", "size_bytes", "bytes_fetched", "seconds"},
    "CallFailed": {"error", "message", "seconds"},
    "ModelRemoved": set(),
}
SUBJECT = {"store", "key", "uri", "ref"}
ABOUT = {"store": "/mnt/models", "key": "m-0123456789abcdef", "uri": "s3://b/m", "ref": "s3://b/m at v1"}
RECEIVED = BytesReceived(**ABOUT, size_bytes=1)


def kinds(events: list[Event]) -> list[type[Event]]:
    """
    The classes of events in order, with those in a row that differ only in bytes as one.
    """
    found: list[type[Event]] = []
    for event in events:
        if not (found and found[-1] is type(event)):
            found.append(type(event))
    return found


@pytest.mark.parametrize("name", VERSION_1)
def test_fields_are_only_added(name):
    """
    Every event of version 1 is public, frozen, keeps its fields, and pickles.
    """
    cls = getattr(kserve_pvc, name)
    fields = {field.name for field in attrs.fields(cls)}
    event = cls(**dict.fromkeys(fields, "x"))

    assert issubclass(cls, Event)
    assert VERSION_1[name] | SUBJECT <= fields
    assert pickle.loads(pickle.dumps(event)) == event
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        event.store = "elsewhere"


def test_every_public_event_belongs_to_a_version():
    """
    An event that is added is added to the fields above, too.
    """
    public = {name for name in kserve_pvc.__all__ if isinstance(getattr(kserve_pvc, name), type)}
    events = {name for name in public if issubclass(getattr(kserve_pvc, name), Event)} - {"Event"}

    assert events == set(VERSION_1)


def test_a_download_is_followed_by_two_listeners(root, source):
    """
    The store's listener and the call's get the same events in order: the start, all bytes, the end.
    """
    of_store, of_call = [], []
    store = ModelStore(root, mode="rw", on_event=of_store.append)
    uri = f"file://{source}"

    model = store.ensure(uri, progress=False, on_event=of_call.append)

    started, *received, finished = of_call
    assert of_store == of_call
    assert kinds(of_call) == [TransferStarted, BytesReceived, CallFinished]
    assert (started.bytes_total, started.files, started.activity) == (model.size_bytes, model.files, "downloading")
    assert sum(event.size_bytes for event in received) == model.size_bytes
    assert (finished.status, finished.size_bytes, finished.bytes_fetched, finished.seconds > 0) == (
        "downloaded",
        model.size_bytes,
        model.size_bytes,
        True,
    )
    assert {(e.store, e.key, e.uri, e.ref) for e in of_call} == {(str(root), model.key, uri, uri)}


def test_each_verb_notifies(root, source, tmp_path):
    """
    A hit, a refresh that reuses, an export, an import and a removal are events of the store.
    """
    events: list[Event] = []
    store, uri = ModelStore(root, mode="rw", on_event=events.append), f"file://{source}"
    seen = {}

    def note(name, call):
        events.clear()
        call()
        seen[name] = (kinds(events), [e.status for e in events if isinstance(e, CallFinished)])

    note("downloaded", lambda: store.ensure(uri, progress=False))
    note("hit", lambda: store.ensure(uri))
    note("unchanged", lambda: store.ensure(uri, refresh=True, progress=False))
    write_files(source, {"new": b"new"})
    note("refreshed", lambda: store.ensure(uri, refresh=True, progress=False))
    note("exported", lambda: store.export(uri, tmp_path / "bundle", progress=False))
    note("warmed", lambda: list(store.warm([uri], progress=False)))
    note("imported", lambda: store.import_(tmp_path / "bundle", progress=False))
    note("removed", lambda: store.remove(uri))

    assert {name: status for name, (_, (status,)) in list(seen.items())[:-1]} == {
        "downloaded": "downloaded",
        "hit": "present",
        "unchanged": "present",
        "refreshed": "downloaded",
        "exported": "exported",
        "warmed": "present",
        "imported": "present",
    }
    assert seen["hit"][0] == [CallFinished]
    assert {BytesAdopted, BytesReceived} < set(seen["refreshed"][0])
    assert seen["exported"][0] == [TransferStarted, BytesReceived, CallFinished]
    assert seen["removed"][0] == [ModelRemoved]


def test_an_import_says_so(root, source, tmp_path):
    """
    A model that comes from a bundle is transferred as an import.
    """
    ModelStore(root, mode="rw").ensure(f"file://{source}", progress=False)
    ModelStore(root).export(f"file://{source}", tmp_path / "bundle", progress=False)
    other, events = tmp_path / "other", []
    other.mkdir()

    ModelStore(other, mode="rw").import_(tmp_path / "bundle", progress=False, on_event=events.append)

    assert (events[0].activity, events[-1].status) == ("importing", "downloaded")


def test_a_failure_is_an_event(root, source):
    """
    A call that raises ends with its error, and nothing else is reported after it.
    """
    events: list[Event] = []
    store = ModelStore(root, mode="rw", on_event=events.append)

    with pytest.raises(SourceNotFoundError) as caught:
        store.ensure(f"file://{source}/absent", progress=False)

    (failed,) = events
    assert isinstance(failed, CallFailed)
    assert (failed.error, failed.message) == ("SourceNotFoundError", str(caught.value))


def test_a_foreign_error_may_hold_a_secret(root):
    """
    Of an exception that is not this library's only the class is reported.
    """
    events: list[Event] = []

    class Wild(FakeBackend):
        def resolve(self, ref):
            raise RuntimeError("canary")

    store = ModelStore(root, mode="rw", backends={"wild": lambda options: Wild({})}, on_event=events.append)

    with pytest.raises(RuntimeError, match="canary"):
        store.ensure("wild://x/y", progress=False)

    assert (events[-1].error, "canary" in repr(events)) == ("RuntimeError", False)


def test_a_retry_names_its_reason(root):
    """
    A request that failed and is repeated is an event with the reason and the delay.
    """

    def fail_once(number, file):
        if number == 1:
            raise SourceUnavailableError("wobbly://x/y", "HTTP 503")

    events: list[Event] = []
    wobbly = Interfering(FakeBackend({"a": b"a"}), before_range=fail_once)
    store = ModelStore(root, mode="rw", backends={"wobbly": wobbly.factory}, on_event=events.append)

    store.ensure("wobbly://x/y", progress=False)

    (retried,) = [event for event in events if isinstance(event, RequestRetried)]
    assert ("HTTP 503" in retried.reason, 0 < retried.delay < 1) == (True, True)


def test_a_claim_that_is_broken_is_lost(root):
    """
    The process whose claim is broken is notified, and waits until the model is there.
    """
    at_work, go_on, events = threading.Event(), threading.Event(), []
    slow = Interfering(
        FakeBackend({"a": b"a", "b": b"b"}),
        before_range=lambda number, file: (at_work.set(), go_on.wait(30)) if number == 1 else None,
    )
    store = ModelStore(root, mode="rw", lease_seconds=1, backends={"slow": slow.factory})
    call = threading.Thread(target=lambda: store.ensure("slow://x/y", progress=False, on_event=events.append))
    call.start()
    at_work.wait(30)
    store.break_lock("slow://x/y")
    time.sleep(0.5)  # Its heartbeat notices within a sixth of the lease.
    go_on.set()
    call.join()

    assert [type(e) for e in events if not isinstance(e, BytesReceived)][:2] == [TransferStarted, ClaimLost]
    assert isinstance(events[-1], CallFinished)


def test_waiting_and_taking_over_name_the_holder(root, origin, upload, proxy):
    """
    A process that waits is notified of the holder, and again when it takes over after the holder was killed.
    """
    uri, events = upload({f"{n}.bin": bytes(1_000_000) for n in range(8)}), []
    proxy.limit_bytes_per_second = 100_000
    environ = {**origin.environ, "AWS_ENDPOINT_URL": proxy.endpoint}
    ModelStore(root, mode="rw", lease_seconds=2)
    holder = shell.start(root, "ensure", uri, env=environ)
    until(lambda: any(f"pid {holder.pid}" in lock.holder for lock in ModelStore(root).locks()))
    options = {"endpoint_url": proxy.endpoint, "key": origin.key, "secret": origin.secret}
    store = ModelStore(root, mode="rw", storage_options=options)

    def listen(event: Event) -> None:
        events.append(event)
        if isinstance(event, WaitingForDownload) and holder.poll() is None:
            proxy.limit_bytes_per_second = None
            holder.kill()
            holder.wait()

    store.ensure(uri, progress=False, on_event=listen)
    holder.communicate(timeout=30)

    waiting = next(event for event in events if isinstance(event, WaitingForDownload))
    (taken,) = [event for event in events if isinstance(event, ClaimTakenOver)]
    assert f"pid {holder.pid}" in waiting.holder
    assert (taken.holder, taken.reason) == (waiting.holder, "its process no longer exists")


def test_a_slow_listener_holds_up_nothing(root):
    """
    The transfer goes on while a listener takes its time; byte counts that it has missed come as one, and none is lost.
    """
    events: list[Event] = []
    files = {f"{number:03}": bytes(1000) for number in range(200)}
    fake = FakeBackend(files)

    def listen(event: Event) -> None:
        time.sleep(0.1)
        events.append(event)

    store = ModelStore(root, mode="rw", backends={"fake": fake.factory}, on_event=listen)
    began = time.monotonic()
    store.ensure("fake://x/y", progress=False)
    seconds = time.monotonic() - began

    assert sum(event.size_bytes for event in events if isinstance(event, BytesReceived)) == 200_000
    assert seconds < 200 * 0.1 / 2
    assert len(events) < 100


def test_events_come_in_one_thread():
    """
    However many threads report, one thread at a time calls the listeners, and everything is delivered at the end.
    """
    threads, total = set(), []

    def listen(event: Event) -> None:
        threads.add(threading.get_ident())
        total.append(event.size_bytes)

    delivery = Delivery([listen])
    with ThreadPoolExecutor(8) as pool:
        for _ in range(1000):
            pool.submit(delivery.put, RECEIVED)
    delivery.close()
    delivery.put(RECEIVED)

    assert (len(threads), threads & {threading.get_ident()}, sum(total)) == (1, set(), 1000)


@pytest.mark.parametrize("is_hit", [False, True])
def test_a_listener_that_raises_ends_no_call(root, source, monkeypatch, is_hit):
    """
    Its exception goes where those of threads go, once for a call, and the other listener gets everything.
    """
    store, raised, events, uri = ModelStore(root, mode="rw"), [], [], f"file://{source}"
    monkeypatch.setattr(threading, "excepthook", lambda arguments: raised.append(str(arguments.exc_value)))
    if is_hit:
        store.ensure(uri, progress=False)

    def fail(event: Event) -> None:
        raise ValueError("no good")

    failing = ModelStore(root, mode="rw", on_event=fail)
    model = failing.ensure(uri, progress=False, on_event=events.append)

    assert (model.status, raised) == ("present" if is_hit else "downloaded", ["no good"])
    assert isinstance(events[-1], CallFinished)


def test_a_listener_costs_a_hit_nothing_if_there_is_none(root, source):
    """
    A hit without a listener starts no thread and loads neither events nor logging.
    """
    ModelStore(root, mode="rw").ensure(f"file://{source}", progress=False)
    script = """
import sys
from kserve_pvc import ModelStore
ModelStore(sys.argv[1]).ensure(sys.argv[2])
print(*sorted({"logging", "kserve_pvc._show", "kserve_pvc._download"} & set(sys.modules)))
"""

    assert shell.python(script, str(root), f"file://{source}") == "\n"


# The logger.


def logged(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str, str]]:
    return [(record.levelname, record.event, record.getMessage()) for record in caplog.records]


def test_a_download_is_logged(root, source, caplog):
    """
    A record says when a download starts and when it is over, with its facts as attributes; a hit is not logged.
    """
    caplog.set_level(logging.INFO, logger="kserve_pvc")
    store, uri = ModelStore(root, mode="rw"), f"file://{source}"

    model = store.ensure(uri, progress=False)
    store.ensure(uri)
    store.remove(uri)

    started, *others = logged(caplog)
    assert started[:2] == ("INFO", "TransferStarted")
    assert started[2].startswith(f"downloading {uri}: {model.files} files, ")
    assert others == [
        ("INFO", "CallFinished", f"{uri}: downloaded"),
        ("INFO", "ModelRemoved", f"removed {uri}"),
    ]
    finished = caplog.records[1]
    assert (finished.name, finished.store, finished.key, finished.uri) == ("kserve_pvc", str(root), model.key, uri)
    assert (finished.bytes, finished.reason, finished.holder, finished.seconds > 0) == (
        model.size_bytes,
        "downloaded",
        None,
        True,
    )


@pytest.mark.parametrize(
    ("event", "level", "facts"),
    [
        (TransferStarted(**ABOUT, bytes_total=9, files=1), "INFO", {"bytes": 9}),
        (RECEIVED, None, {}),
        (BytesAdopted(**ABOUT, size_bytes=1), None, {}),
        (
            WaitingForDownload(
                **ABOUT, holder="a", since="", waited=2.0, idle=0, bytes_done=5, bytes_total=9, bytes_per_second=0
            ),
            "INFO",
            {"holder": "a", "bytes": 5, "seconds": 2.0},
        ),
        (ClaimTakenOver(**ABOUT, holder="a", reason="silent"), "INFO", {"holder": "a", "reason": "silent"}),
        (ClaimLost(**ABOUT), "WARNING", {}),
        (LockerUnavailable(**ABOUT, locker="flock"), "WARNING", {"holder": "flock"}),
        (RequestRetried(**ABOUT, reason="HTTP 503", delay=0.5), "DEBUG", {"reason": "HTTP 503", "seconds": 0.5}),
        (
            CallFinished(**ABOUT, status="waited", size_bytes=9, bytes_fetched=0, seconds=3.0),
            "INFO",
            {"bytes": 0, "seconds": 3.0, "reason": "waited"},
        ),
        (CallFailed(**ABOUT, error="E", message="m", seconds=1.0), "DEBUG", {"reason": "E", "seconds": 1.0}),
        (ModelRemoved(**ABOUT), "INFO", {}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Event) else "",
)
def test_every_event_has_its_level(event, level, facts, caplog):
    """
    What an operator must know is a warning, what a call does is information, and bytes are not logged one by one.
    """
    from kserve_pvc._show.log import EventLog

    caplog.set_level(logging.DEBUG, logger="kserve_pvc")
    log = EventLog()
    log(event)
    log(event)

    expected = [] if level is None else [level] * (1 if isinstance(event, WaitingForDownload) else 2)
    names = ("holder", "bytes", "seconds", "reason")
    assert [record.levelname for record in caplog.records] == expected
    assert extra(event) == {
        "event": type(event).__name__,
        **{name: ABOUT[name] for name in ("store", "key", "uri")},
        **{name: facts.get(name) for name in names},
    }


def test_the_library_is_silent_by_default(root, source):
    """
    A program that has imported `logging` and configured nothing sees no record, warnings included.
    """
    script = """
import logging, sys
from kserve_pvc import ModelStore
from kserve_pvc._show.events import ClaimLost
from kserve_pvc._show.log import EventLog
ModelStore(sys.argv[1], mode="rw").ensure(sys.argv[2], progress=False)
EventLog()(ClaimLost(store="s", key="k", uri="u", ref="r"))
print([type(handler).__name__ for handler in logging.getLogger("kserve_pvc").handlers])
"""
    command = [*shell.COMMAND[:2], "-c", script, str(root), f"file://{source}"]

    result = shell.run(command)

    assert (result.stdout, result.stderr) == ("['NullHandler']\n", "")


def test_the_library_does_not_import_logging(root, source):
    """
    Where the program has not imported `logging`, nothing could receive a record, and a download does not import it.
    """
    script = """
import sys
from kserve_pvc._show.events import ClaimLost
from kserve_pvc._show.log import EventLog
EventLog()(ClaimLost(store="s", key="k", uri="u", ref="r"))
print("logging" in sys.modules)
"""

    assert shell.python(script) == "False\n"


def test_a_format_string_may_name_any_attribute(root, source):
    """
    A handler whose format names the attributes formats every record.
    """
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(event)s %(store)s %(key)s %(uri)s %(holder)s %(bytes)s %(seconds)s"))
    logger = logging.getLogger("kserve_pvc")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        ModelStore(root, mode="rw").ensure(f"file://{source}", progress=False)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)

    assert [line.split()[:2] for line in stream.getvalue().splitlines()] == [
        ["TransferStarted", str(root)],
        ["CallFinished", str(root)],
    ]
    assert os.fspath(root) in stream.getvalue()
