"""
A power cut at any moment of a download, a refresh, a takeover, a removal or an initializer, on a volume that keeps only
what was synced.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs
import pytest
from power_cut import Cut, Recording, Sync, record
from trees import model_files, read_tree, write_files

from kserve_pvc import ModelNotFoundError, ModelStore
from kserve_pvc._model import Lookup
from kserve_pvc.kserve._contents import INTENDED, OURS
from kserve_pvc.kserve._destination import Destination
from kserve_pvc.kserve._environment import Variables, read_variables
from kserve_pvc.kserve._initialize import fill_all

# `nox -s soak` asks for many more.
FEW_CUTS = 320
CUTS = int(os.environ.get("KSERVE_PVC_TEST_CUTS", str(FEW_CUTS)))

# Each argument is a step. A mark is made after each, outside the volume.
STEPS = """
import os, sys
from kserve_pvc import ModelStore
from kserve_pvc._volume import writing as _volume
from kserve_pvc.backends.file import FileBackend
root, uri, marks, *steps = sys.argv[1:]
open_store = lambda: ModelStore(root, mode="rw", lease_seconds=1, backends={"file": FileBackend}, part_bytes=4096)
for step in steps:
    if step == "die":
        # What many writers leave together of which each was killed between making a directory and making it durable.
        _volume.sync_directory = lambda fd: None
        honest = _volume.VolumeWriter.publish
        def publish(self, place, *rest):
            return os.kill(os.getpid(), 9) if place.parent.name == "log" else honest(self, place, *rest)
        _volume.VolumeWriter.publish = publish
        open_store().ensure(uri, progress=False)
    elif step == "remove":
        open_store().remove(uri, trash_seconds=0)
    else:
        open_store().ensure(uri, refresh=step == "refresh", progress=False, max_workers=2)
    os.close(os.open(f"{marks}/{step}", os.O_CREAT | os.O_WRONLY))
"""


@attrs.frozen(kw_only=True)
class Scene:
    """
    A recording, and what may be there: nothing or one of these trees. `after` says what a mark promises.
    """

    recording: Recording
    uri: str
    allowed: tuple[dict[str, bytes] | None, ...]
    after: Mapping[str, dict[str, bytes] | None]
    newest: dict[str, bytes]


@pytest.fixture
def memory() -> Iterator[Path]:
    """
    A directory in memory, where many small states cost little.
    """
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as place:
        yield Path(place)


@pytest.fixture(autouse=True)
def machines_of_their_own(monkeypatch):
    """
    All states are of one store, and no two of one process: what was returned of one says nothing about another.
    """
    by_place = property(lambda self: str(self._volume.root), lambda self, identity: None)
    monkeypatch.setattr(Lookup, "identity", by_place, raising=False)


def run(root: Path, source: Path, marks: Path, *steps: str) -> list[str]:
    return [sys.executable, "-I", "-c", STEPS, str(root), f"file://{source}", str(marks), *steps]


def many_files(seed: int) -> dict[str, bytes]:
    """More small files than are made durable one by one."""
    return {f"{number % 3}/{number:03}": b"%d %d" % (seed, number) for number in range(105)}


@pytest.fixture
def scene(request, tmp_path, tool) -> Scene:
    """
    One of the scenes by name.
    """
    strace = tool("strace")
    root, source, marks, scratch = (tmp_path / name for name in ("volume", "source", "marks", "scratch"))
    for place in (root, marks, scratch):
        place.mkdir()
    old, new = model_files(seed=1, big=9_000), model_files(seed=2, big=9_000)
    write_files(source, old)
    uri, steps = f"file://{source}", [request.param]
    if request.param == "many":
        old = new = many_files(1)
        shutil.rmtree(source)
        write_files(source, old)
        steps = ["ensure"]
    if request.param == "refresh":
        # One file of the old model is found unchanged, and shared.
        new["weights/b.bin"] = old["weights/b.bin"]
        subprocess.run(run(root, source, marks, "ensure"), check=True)
        write_files(source, {name: data for name, data in new.items() if name != "weights/b.bin"})
        return Scene(
            recording=record(strace, run(root, source, marks, *steps), root, marks, scratch),
            uri=uri,
            allowed=(old, new),
            after={"refresh": new},
            newest=new,
        )
    command = run(root, source, marks, *steps)
    if request.param == "remove":
        subprocess.run(run(root, source, marks, "ensure"), check=True)
    if request.param == "takeover":
        command = [
            "sh",
            "-c",
            f"{shlex.join(run(root, source, marks, 'die'))}; {shlex.join(run(root, source, marks, 'ensure'))}",
        ]
    recording = record(strace, command, root, marks, scratch)
    after = {"remove": None} if request.param == "remove" else {"ensure": old}
    return Scene(recording=recording, uri=uri, allowed=(None, old), after=after, newest=old)


SCENES = ["ensure", "many", "refresh", "remove", "takeover"]


def found(root: Path, uri: str) -> dict[str, bytes] | None:
    """
    What a reader finds.
    """
    try:
        return read_tree(ModelStore(root).get(uri).path)
    except ModelNotFoundError:
        return None


def judge(scene: Scene, cut: int, seed: int, place: Path, secured: list[int]) -> str:
    """
    Leave what a cut may leave, open it as a reader and then as the next writer, and say what is wrong or "".
    """
    scene.recording.leave(cut, seed, place, secured)
    try:
        there = found(place, scene.uri)
        if there not in scene.allowed:
            return f"cut {cut} seed {seed}: a mix is visible"
        for mark in scene.recording.marks(cut):
            if there != scene.after[mark]:
                return f"cut {cut} seed {seed}: what `{mark}` promised is not there"
        store = ModelStore(place, mode="rw", lease_seconds=1)
        model = store.ensure(scene.uri, refresh=True, progress=False)
        if read_tree(model.path) != scene.newest or not store.verify(scene.uri, "full").ok:
            return f"cut {cut} seed {seed}: the next download is not exact"
    except Exception as error:  # Whatever it is, it is what the test reports.
        return f"cut {cut} seed {seed}: {error!r}"
    else:
        return ""
    finally:
        shutil.rmtree(place, ignore_errors=True)


def judge_many(scene: Scene, count: int, memory: Path) -> list[str]:
    """
    Every prefix as often as the count allows, at least once.
    """
    secured, prefixes = scene.recording.secured(), len(scene.recording.steps) + 1
    numbers = range(max(count, prefixes))
    # A state whose claim has no owner waits for its lease, so several are judged at a time.
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda n: judge(scene, n % prefixes, n, memory / str(n), secured), numbers))


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("scene", SCENES, indirect=True)
def test_a_power_cut_leaves_the_old_state_or_the_whole_model(scene, memory, request):
    """
    After every prefix, with any part of what was not synced gone, a reader finds old or new, and what was returned
    stays.
    """
    said = judge_many(scene, CUTS // len(SCENES), memory)

    print(f"{request.node.callspec.id}: {len(scene.recording.steps)} steps, {len(said)} states")
    assert [wrong for wrong in said if wrong] == []


@pytest.mark.parametrize("scene", ["ensure"], indirect=True)
def test_a_writer_that_syncs_nothing_is_caught(scene, memory):
    """
    The same recording without its syncs loses what was returned, or shows a mix: the check can fail.
    """
    deaf = [step for step in scene.recording.steps if not isinstance(step, Sync)]
    kept = [n for n, step in enumerate(scene.recording.steps) if not isinstance(step, Sync)]
    times = scene.recording.began, scene.recording.ended
    recording = Recording(scene.recording.before, deaf, *([times_of[n] for n in kept] for times_of in times))

    said = judge_many(attrs.evolve(scene, recording=recording), 300, memory)

    assert Counter(wrong.partition(": ")[2] for wrong in said)["what `ensure` promised is not there"] > 0


INITIALIZE = """
import os, sys
from kserve_pvc.kserve._initialize import main
source, place, marks = sys.argv[1:]
code = main([source, place])
os.close(os.open(f"{marks}/initialized", os.O_CREAT | os.O_WRONLY))
sys.exit(code)
"""


@attrs.frozen(kw_only=True)
class Filling(Scene):
    """
    A recording of an initializer; `variables` are its settings.
    """

    variables: Variables


def variables_for(method: str, store: Path) -> dict[str, str]:
    """
    The environment of an initializer whose destination is private, or which fills it from a store that is mounted
    elsewhere.
    """
    if method == "move":
        return {"KSERVE_PVC_DESTINATION": "private"}
    return {"KSERVE_PVC_STORE": str(store), "KSERVE_PVC_MATERIALIZE": method}


def initialize(source: Path, place: Path, marks: Path, environ: Mapping[str, str]) -> list[str]:
    settings = [f"{name}={value}" for name, value in environ.items()]
    return ["env", *settings, sys.executable, "-I", "-c", INITIALIZE, f"file://{source}", str(place), str(marks)]


@pytest.fixture
def filling(request, tmp_path, tool) -> Filling:
    """
    An initializer that fills a directory, in which another model of equal sizes is or is not.
    """
    strace = tool("strace")
    before, method = request.param
    place, store, marks, scratch = (tmp_path / name for name in ("place", "store", "marks", "scratch"))
    for directory in (place, store, marks, scratch):
        directory.mkdir()
    # Only the digests tell which of the two a file belongs to, or whether half of it is missing.
    old, new = model_files(seed=1, big=9_000), model_files(seed=2, big=9_000)
    old["of/the/old"], new["deep/er/new"] = b"old", b"new"
    write_files(tmp_path / "old", old)
    write_files(tmp_path / "new", new)
    environ = variables_for(method, store)
    if before == "replace":
        subprocess.run(initialize(tmp_path / "old", place, scratch, environ), check=True, capture_output=True)
        environ = {**environ, "KSERVE_PVC_REPLACE": "any"}
        # In a directory of the old model, which therefore stays.
        foreign = {"of/the/user": b"foreign"}
        write_files(place, foreign)
        old, new = old | foreign, new | foreign
    command = initialize(tmp_path / "new", place, marks, environ)
    return Filling(
        recording=record(strace, command, place, marks, scratch),
        uri=f"file://{tmp_path / 'new'}",
        allowed=(None, new) if before == "fill" else (None, old, new),
        after={"initialized": new},
        newest=new,
        variables=read_variables(environ),
    )


FILLINGS = [("fill", "move"), ("fill", "copy"), ("replace", "move"), ("replace", "copy")]


def served(place: Path) -> dict[str, bytes] | None:
    """
    What a server reads, if a record says that it is complete.
    """
    if Destination(place).record() is None:
        return None
    return {name: data for name, data in read_tree(place).items() if not name.startswith(str(OURS))}


def judge_filling(filling: Filling, cut: Cut, place: Path) -> str:
    """
    Leave what a cut leaves, look whether its record is true, start the initializer again, and say what is wrong or "".
    """
    filling.recording.image(cut).write_to(place)
    try:
        there = served(place)
        if there not in filling.allowed:
            return f"{cut}: the record is not true"
        for mark in filling.recording.marks(cut.count):
            if there != filling.after[mark]:
                return f"{cut}: what `{mark}` promised is not there"
        fill_all([(filling.uri, str(place))], filling.variables)
        if served(place) != filling.newest:
            return f"{cut}: the next start does not complete it"
    except Exception as error:  # Whatever it is, it is what the test reports.
        return f"{cut}: {error!r}"
    else:
        return ""
    finally:
        shutil.rmtree(place, ignore_errors=True)


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("filling", FILLINGS, indirect=True, ids="-".join)
def test_a_power_cut_leaves_a_destination_whose_record_is_true(filling, memory, request):
    """
    After every prefix, with nothing, one step, all but one or all of what was not synced gone, a destination with a
    record has the files of that record and no others, a finished one is complete, and the next start completes any.
    """
    cuts = filling.recording.distinct_cuts(filling.recording.secured())
    if CUTS <= FEW_CUTS:  # What comes before is a download, which has scenes of its own.
        declared = filling.recording.find(INTENDED.name)
        cuts = [cut for cut in cuts if cut.count >= declared]

    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(lambda n: judge_filling(filling, cuts[n], memory / str(n)), range(len(cuts))))

    print(f"{request.node.callspec.id}: {len(filling.recording.steps)} steps, {len(cuts)} states")
    assert [wrong for wrong in said if wrong] == []
