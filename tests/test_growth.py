"""
Twice the input costs twice the work and the memory, whatever the input is made of.

Work is counted as calls of functions, memory is what `tracemalloc` sees at its peak: neither depends on the machine.
"""

import io
import json
import lzma
import random
import sys
import tracemalloc
from pathlib import PurePosixPath

import pytest
from fsspec import AbstractFileSystem

from kserve_pvc import ModelStore, UnsafePathError
from kserve_pvc._archive.decompressed import Decompressed
from kserve_pvc._archive.members import NameCheck
from kserve_pvc._archive.tar import _records
from kserve_pvc._format.file_names import check_collisions
from kserve_pvc._format.records import FileEntry, Manifest, decode, encode
from kserve_pvc._keys.log import LogView
from kserve_pvc._keys.procedures import Publish, ReadHighestSlot, ReadNewest, Reserve, append, drive
from kserve_pvc._source.contract import UnpackLimits
from kserve_pvc.backends._directories import Directories
from kserve_pvc.backends._ranges import RefusedError
from kserve_pvc.kserve._admission import decide, patch, read_review
from kserve_pvc.kserve._policy import read_policy
from kserve_pvc.kserve._yaml import read_documents

MOST = 2.3
DOUBLINGS = 3


def deep_names(number):
    """
    Names of as many levels as there may be, none of which share a directory.
    """
    return [f"d{index}/" + "x/" * 30 + "f" for index in range(number)]


def collisions(number):
    names = [PurePosixPath(name) for name in deep_names(number)]
    return lambda: check_collisions(names)


def shallow_collisions(number):
    names = [PurePosixPath(f"d{index % 7}/f{index}") for index in range(10 * number)]
    random.Random(1).shuffle(names)
    return lambda: check_collisions(names)


def archive_names(number):
    names = deep_names(number)

    def act():
        check = NameCheck("m.tar", UnpackLimits(), lambda name: True)
        return [check.add(name) for name in names], check

    return act


def listed_directories(number):
    names = deep_names(number)

    def act():
        directories = Directories("s3://b/m")
        for name in names:
            directories.mark(name)
        return directories

    return act


def manifest(number):
    files = [FileEntry(path=name, size_bytes=1, sha256="0" * 64, token="t") for name in deep_names(number)]
    generation = "000000000001-" + "0" * 32
    data = encode(Manifest(key="m-0123456789abcdef", generation=generation, version="v", files=files))
    return lambda: decode(Manifest, data, "a manifest")


def extended_header(number):
    data = b"6 a=b\n" * (20 * number)
    return lambda: _records(data)


def empty_streams(number):
    data = lzma.compress(b"", lzma.FORMAT_XZ) * (2 * number)
    return lambda: Decompressed(io.BytesIO(data), "m.xz", lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ)).read(1000)


GOVERNING = read_policy({"version": 1, "rules": [{"namespaces": ["team"], "claim": "models", "access": "read"}]})


def pod_of(number):
    return {
        "kind": "Pod",
        "apiVersion": "v1",
        "metadata": {"name": "p"},
        "spec": {
            "volumes": [
                {"name": f"v{index}", "persistentVolumeClaim": {"claimName": "models"}} for index in range(number)
            ],
            "containers": [
                {"name": f"c{index}", "volumeMounts": [{"name": f"v{index}", "mountPath": "/m"}]}
                for index in range(number)
            ],
        },
    }


def review_of(pod):
    kind = {"group": "", "version": "v1", "kind": "Pod"}
    request = {"uid": "u", "kind": kind, "namespace": "team", "operation": "CREATE", "object": pod}
    return {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request}


def pods(number):
    body = json.dumps(review_of(pod_of(number))).encode()
    return lambda: decide(read_review(body), GOVERNING)


def long_names(number):
    before = after = [0] * number
    for _ in range(30):
        before, after = {"k" * number: before, "b": 0}, {"k" * number: after, "b": 1}
    return lambda: list(patch(before, after))


def aliases(number):
    text = "a: &a [1, 2, 3]\n" + "".join(f"b{index}: *a\n" for index in range(number))
    return lambda: read_documents(text, "f.yaml")


INPUTS = {
    "names of many levels": (collisions, 50),
    "names of one directory": (shallow_collisions, 40),
    "names in an archive": (archive_names, 50),
    "directories of a listing": (listed_directories, 50),
    "a manifest": (manifest, 40),
    "an extended header": (extended_header, 50),
    "streams that hold nothing": (empty_streams, 50),
    "volumes and containers of a pod": (pods, 40),
    "long names in a pod": (long_names, 200),
    "aliases in YAML": (aliases, 40),
}


@pytest.mark.parametrize("name", INPUTS)
def test_twice_the_input_costs_twice_as_much(name):
    """
    Calls and peak memory grow by little more than two for each of three doublings of the input: over one alone, the
    steps in which sets and dictionaries grow would show.
    """
    make, number = INPUTS[name]

    (calls, memory), (more_calls, more_memory) = (cost_of(make(number * factor)) for factor in (1, 2**DOUBLINGS))

    assert more_calls <= MOST**DOUBLINGS * calls
    assert more_memory <= MOST**DOUBLINGS * memory


def cost_of(act):
    """
    Count the calls of one run, and its peak of memory; the first run only fills caches.
    """
    act()
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        act()
    finally:
        sys.setprofile(None)
    tracemalloc.start()
    try:
        kept = act()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    del kept
    return calls, peak


def test_planted_numbers_are_passed_over_together():
    """
    However many numbers of a log were taken and left, a writer looks at two of them.
    """
    taken, looks = set(range(1, 10_001)), []

    def perform(operation):
        looks.append(operation)
        match operation:
            case Reserve(seq):
                return seq not in taken
            case ReadNewest():
                return LogView(seq=10_001 if any(isinstance(look, Publish) for look in looks) else 0)
            case ReadHighestSlot():
                return max(taken)
            case Publish():
                return True
        return None

    assert drive(append(0, "tombstone"), perform) == 10_001
    assert len([look for look in looks if isinstance(look, Reserve)]) == 3


def test_damaged_records_are_not_waited_for_one_after_the_other(tmp_path, monkeypatch):
    """
    A listing of a store pauses for a few damaged records, in case they are half written, and not for each of many.
    """
    store = ModelStore(tmp_path, mode="rw")
    for number in range(100):
        log = tmp_path / ".kserve-pvc" / "keys" / f"m-{number:016x}" / "log"
        log.mkdir(parents=True)
        (log / f"{1:012d}.commit").write_bytes(b"{")
    pauses = []
    monkeypatch.setattr("kserve_pvc._keys.log.time.sleep", pauses.append)

    assert store.list() == []
    assert sum(pauses) <= 2.5


def test_a_long_refusal_is_cut_between_words():
    """
    Of a refusal of 64 KiB little is kept, and no half of a word, which could be half of a secret.
    """
    text = RefusedError("word " * 10_000 + "secret").reason

    assert len(text) <= 2_010
    assert set(text.split()) == {"word", "..."}


def test_a_tree_without_an_end_is_not_walked(tmp_path):
    """
    A file system that has one more directory in each is refused at the level at which no file can be stored.
    """
    filesystem = Bottomless()
    store = ModelStore(tmp_path, mode="rw")

    with pytest.raises(UnsafePathError, match="32 levels"):
        store.resolve("fsspec+bottomless://top", filesystem=filesystem)

    assert filesystem.listed <= 33


class Bottomless(AbstractFileSystem):
    """
    Has a directory in each directory, and nothing else.
    """

    protocol = "bottomless"
    cachable = False
    listed = 0

    def info(self, path, **_):
        return {"name": path, "type": "directory", "size": 0}

    def ls(self, path, detail=True, **_):
        self.listed += 1
        return [{"name": f"{path.rstrip('/')}/d", "type": "directory", "size": 0}]


def test_planted_numbers_of_a_creation_are_waited_for_twice(tmp_path, monkeypatch):
    """
    However many numbers were reserved by creators that died, a new one waits for the first and for the highest.
    """
    for number in range(1, 101):
        (tmp_path / ".kserve-pvc" / "creation" / f"{number:012d}").mkdir(parents=True)
    pauses = []
    monkeypatch.setattr("kserve_pvc._opening.time.sleep", pauses.append)

    assert ModelStore(tmp_path, mode="rw").list() == []
    assert sum(pauses) <= 2.5
