"""
A download that ends before its time, by an error or in good order: what it keeps, what it gives back, what it says.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from sources import FakeBackend
from trees import read_tree

from kserve_pvc import DownloadCancelledError, ModelStore, SourceDeniedError
from kserve_pvc._cli.main import main
from kserve_pvc._show.units import format_bytes

MIB = 1024 * 1024
PIECE = 64 * 1024
RANDOM = random.Random(15)
LAYOUTS = {
    "one large file": {"model.bin": RANDOM.randbytes(12 * MIB)},
    "several files": {
        **{f"{n}.bin": RANDOM.randbytes(9 * MIB) for n in range(2)},
        **{f"{n}.json": RANDOM.randbytes(300_000) for n in range(6)},
    },
    "small files": {f"{n}.bin": RANDOM.randbytes(700_000) for n in range(20)},
}
URI = "fake://hub/model"


class Ending(FakeBackend):
    """
    A source that sends small pieces, and does something once it has sent so many bytes. After that it sends no more.
    """

    def __init__(self, files: Mapping[str, bytes], after: int, act: Callable[[str], object]) -> None:
        super().__init__(files)
        self.after, self.act = after, act
        self.handed_out = 0
        self.acted = threading.Event()
        self.hangs: threading.Event | None = None
        self._guard = threading.Lock()

    @contextmanager
    def open_range(self, file, start, stop) -> Iterator[Ending._Pieces]:
        with super().open_range(file, start, stop) as reader:
            yield Ending._Pieces(self, file.address, reader)

    class _Pieces:
        def __init__(self, source: Ending, name: str, reader) -> None:
            self.source, self.name, self.reader = source, name, reader

        def readinto(self, buffer: memoryview) -> int | None:
            source = self.source
            with source._guard:
                if source.handed_out < source.after:
                    count = self.reader.readinto(buffer[:PIECE])
                    source.handed_out += count
                    return count
                is_first = not source.acted.is_set()
                source.acted.set()
            if is_first:
                source.act(self.name)
            if source.hangs is not None:
                source.hangs.wait(30)
            threading.Event().wait(0.01)
            return None


def deny(name: str) -> None:
    raise SourceDeniedError(name, "no")


def allocated(root: Path) -> int:
    """
    The bytes that the files below `models/` occupy.
    """
    return sum(path.lstat().st_blocks * 512 for path in (root / "models").rglob("*") if path.is_file())


@pytest.fixture(params=LAYOUTS)
def files(request) -> Mapping[str, bytes]:
    return LAYOUTS[request.param]


@pytest.fixture
def handlers(monkeypatch) -> Iterator[None]:
    """
    The signal handlers of a command, and afterwards those of the tests again.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def end(root: Path, source: Ending, how: str, **options) -> BaseException:
    """
    Download until the source acts, and return what ended the call.
    """
    cancel = threading.Event()
    source.act = {
        "error": deny,
        "cancel": lambda _: cancel.set(),
        "interrupt": lambda _: os.kill(os.getpid(), signal.SIGINT),
        "sigterm": lambda _: os.kill(os.getpid(), signal.SIGTERM),
    }[how]
    store = ModelStore(root, mode="rw", backends={"fake": source.factory}, **options)
    kinds = (SourceDeniedError, DownloadCancelledError, KeyboardInterrupt, SystemExit)
    with pytest.raises(kinds) as caught:
        store.ensure(URI, progress=False, cancel=cancel, max_workers=4)
    return caught.value


def assert_kept(root: Path, files: Mapping[str, bytes], source: Ending, error: BaseException, **options) -> None:
    whole = FakeBackend(files)
    store = ModelStore(root, mode="rw", backends={"fake": whole.factory}, **options)
    size, kept = sum(map(len, files.values())), store.plan(URI).bytes_reusable
    said = "\n".join([str(error), *getattr(error, "__notes__", ())])

    # Each stream, and each file that is requested ahead, has one piece in flight.
    assert source.handed_out - 8 * PIECE <= kept <= source.handed_out
    assert allocated(root) <= kept + 8 * PIECE + len(files) * 4096
    assert (f"{kept} of {size} bytes" if isinstance(error, DownloadCancelledError) else format_bytes(kept)) in said
    model = store.ensure(URI, progress=False)
    assert (model.bytes_fetched, read_tree(model.path)) == (size - kept, files)


@pytest.mark.parametrize("how", ["error", "cancel", "interrupt", "sigterm"])
def test_a_stop_loses_what_was_in_flight_and_keeps_no_room(root, files, how, handlers):
    """
    However a download ends, all that was written is used by the next one, and nothing else occupies the volume.
    """
    source = Ending(files, 5 * MIB + 12_345, deny)

    error = end(root, source, how)

    assert_kept(root, files, source, error)


@pytest.mark.parametrize("how", ["cancel", "interrupt"])
def test_a_source_that_hangs_changes_nothing_of_that(root, files, how, handlers):
    """
    The call that leaves a thread behind notes what that thread has written, and gives back the rest.
    """
    source = Ending(files, 5 * MIB + 12_345, deny)
    source.hangs = threading.Event()

    error = end(root, source, how)

    assert_kept(root, files, source, error)
    source.hangs.set()


def test_a_stop_keeps_what_is_not_hashed(root, handlers):
    """
    Without digests a note has to be durable, and is.
    """
    files = LAYOUTS["one large file"]
    source = Ending(files, 5 * MIB, deny)

    error = end(root, source, "cancel", digest="none")

    assert_kept(root, files, source, error, digest="none")


def test_stops_add_up_and_their_leftovers_do_not(root, handlers):
    """
    Of a download that is stopped again and again no byte is fetched twice, and no reserved room stays.
    """
    files, fetched = LAYOUTS["one large file"], 0
    for how in ("error", "cancel", "interrupt", "sigterm"):
        source = Ending(files, 2 * MIB, deny)
        end(root, source, how)
        fetched += source.handed_out
        store = ModelStore(root, backends={"fake": source.factory})
        assert store.plan(URI).bytes_reusable >= fetched - 8 * PIECE

    generations = sum(path.is_dir() for path in (root / "models").glob("*/*"))
    assert allocated(root) <= generations * fetched


def test_a_file_with_a_wrong_digest_is_not_kept(root):
    """
    Its bytes are given back and count for nothing, while those of the other files are kept.
    """
    files = {"good.bin": RANDOM.randbytes(9 * MIB), "bad.bin": RANDOM.randbytes(9 * MIB)}
    source = FakeBackend(files, sha256={"bad.bin": "0" * 64})
    store = ModelStore(root, mode="rw", backends={"fake": source.factory})

    with pytest.raises(Exception, match=r"bad\.bin") as caught:
        store.ensure(URI, progress=False, max_workers=1)

    kept = store.plan(URI).bytes_reusable
    assert kept in (0, 9 * MIB)
    assert allocated(root) <= kept + 8192
    assert (format_bytes(kept) if kept else "nothing of") in caught.value.__notes__[0]


def test_what_was_copied_from_a_dead_writer_is_noted(root):
    """
    A call that continues and is stopped at once leaves all that it has taken over, so that the older leftover is not
    needed any more.
    """
    files = LAYOUTS["one large file"]
    end(root, Ending(files, 6 * MIB, deny), "error")
    before = {path.parent.name for path in root.glob(".kserve-pvc/staging/*/journal*")}
    end(root, Ending(files, 0, deny), "error")

    for generation in before:
        for path in root.glob(f".kserve-pvc/staging/{generation}/*"):
            path.unlink()
    store = ModelStore(root, backends={"fake": FakeBackend(files).factory})
    assert store.plan(URI).bytes_reusable >= 6 * MIB - 8 * PIECE


def test_warm_says_what_each_of_its_threads_keeps(root, handlers):
    """
    An interrupt of the main thread says so for every model that it ended in another thread.
    """
    files = LAYOUTS["small files"]
    source = Ending(files, 5 * MIB, lambda _: os.kill(os.getpid(), signal.SIGINT))
    store = ModelStore(root, mode="rw", backends={"fake": source.factory})
    uris = [f"fake://hub/{name}" for name in "ab"]

    with ThreadPoolExecutor(2) as pool, pytest.raises(KeyboardInterrupt) as caught:
        list(store.warm(uris, pool, progress=False))

    assert sorted(uri for uri in uris for note in caught.value.__notes__ if f"`{uri}`" in note) == uris


@pytest.mark.parametrize("verb", [["verify", "--all", "--full"], ["ls"], ["doctor"]], ids=lambda verb: verb[0])
def test_only_a_download_says_that_something_is_kept(root, source, verb, monkeypatch, capsys, handlers):
    """
    A verb that fetches nothing is interrupted, and says no more.
    """
    for name in [name for name in os.environ if name.startswith("KSERVE_PVC_")]:
        monkeypatch.delenv(name)
    ModelStore(root, mode="rw").ensure(f"file://{source}", progress=False)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ModelStore, "list", interrupt)
    monkeypatch.setattr(ModelStore, "verify_all", interrupt)
    monkeypatch.setattr("kserve_pvc._doctor.doctor.diagnose", interrupt)

    assert main(["--store", str(root), *verb]) == 130
    assert capsys.readouterr().err == "kserve-pvc: interrupted\n"
