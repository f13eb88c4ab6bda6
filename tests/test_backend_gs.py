"""
Models in buckets of Google Cloud Storage, on an emulator of the service.

The emulator refuses nobody and gives no tokens. Where a test needs that, a small server of our own stands in front of
it, which knows tokens and gives them to who has a key.
"""

import base64
import gzip
import hashlib
import json
import logging
import os
import random
import re
import socket
import threading
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import parse_qs, urlsplit

import pytest
import shell
from gcs import BUCKET, FakeGCS, Gate, MissingError
from origin import CountingProxy
from sources import Interfering
from tampering import TamperingProxy
from trees import digests, listing, model_files, read_tree
from weather import Authority

from kserve_pvc import (
    DigestMismatchError,
    InvalidURIError,
    ModelStore,
    PolicyError,
    SettingsError,
    SourceChangedError,
    SourceDeniedError,
    SourceNotFoundError,
    SourceUnavailableError,
    StoreError,
    UnsafePathError,
)
from kserve_pvc._source.ref import parse_ref
from kserve_pvc.backends._google_json import parse_listing
from kserve_pvc.backends._http.target import target_of
from kserve_pvc.backends._login import google as _google_login
from kserve_pvc.backends._login.contract import Scope
from kserve_pvc.backends._ranges import RefusedError
from kserve_pvc.backends.gs import GSBackend

pytest.importorskip("google.auth", reason="`google-auth` is not installed")

PART_BYTES = 100_000
FILES = model_files(seed=41)
# Nothing tells by its looks that it is one.
TOKEN = "canary-of-a-given-token"
GIB = 2**30


@pytest.fixture(scope="session")
def gcs():
    """
    A service that is really there, once for all tests of this file.
    """
    try:
        with FakeGCS() as server:
            yield server
    except MissingError as missing:
        pytest.skip(str(missing))


@pytest.fixture
def gate(gcs):
    """
    What stands in front of the service and lets in who has a good token.
    """
    with Gate(gcs) as gate:
        yield gate


@pytest.fixture
def here(request):
    """
    A prefix that belongs to the test.
    """
    return hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:12]


@pytest.fixture
def put(gcs, here):
    """
    Put files below a prefix that belongs to the test, and return its URI.
    """

    def do(files):
        for name, data in files.items():
            gcs.put(f"{here}/model/{name}", data)
        return gcs.uri(f"{here}/model")

    return do


@pytest.fixture
def backend(gcs):
    """
    The back end by itself.
    """
    return GSBackend(gcs.storage_options, {})


@pytest.fixture
def no_google(monkeypatch, tmp_path):
    """
    A machine where nobody has logged in, and which is none of Google's.
    """
    for name in [
        name for name in os.environ if name.startswith(("GOOGLE_", "GCLOUD_", "CLOUDSDK_", "GCE_", "STORAGE_EMULATOR"))
    ]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path / "gcloud"))
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "tests")


@pytest.fixture(scope="session")
def private_key():
    """
    The key of a service account, made for the tests.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()).decode()


@pytest.fixture
def account(gate, private_key):
    """
    The content of a file with the key of a service account whose tokens the gate gives.
    """
    return {
        "type": "service_account",
        "client_email": "reader@tests.invalid",
        "private_key_id": "1",
        "private_key": private_key,
        "token_uri": gate.token_uri,
    }


def serve(backend) -> dict:
    return {"backends": {"gs": lambda options: backend}}


def store_of(root, options, **more) -> ModelStore:
    return ModelStore(root, mode="rw", **{**serve(GSBackend(options, {})), **more})


def names(backend, uri, **wish) -> list[str]:
    return [str(file.entry.path) for file in backend.resolve(parse_ref(uri, **wish)).files]


def crc32c_of(data: bytes) -> str:
    from google_crc32c import value

    return f"crc32c:{value(data):08x}"


def read(backend, file, start: int, stop: int, buffer_bytes: int = 65_536) -> bytes:
    """
    Read a range to its end through a buffer.
    """
    buffer, data = memoryview(bytearray(buffer_bytes)), b""
    with backend.open_range(file, start, stop) as reader:
        while len(data) < stop - start and (count := reader.readinto(buffer[: stop - start - len(data)])) != 0:
            data += bytes(buffer[: count or 0])
    return data


def test_a_listing_pins_every_object(backend, gcs, here):
    """
    Each object is there with path, size, its generation as token and pin, and the CRC32C that the service found.
    """
    generations = {name: gcs.put(f"{here}/model/{name}", data) for name, data in FILES.items()}

    found = backend.resolve(parse_ref(gcs.uri(f"{here}/model"))).files

    assert [(str(f.entry.path), f.entry.size_bytes, f.digest, f.entry.token, f.entry.sha256) for f in found] == [
        (name, len(FILES[name]), crc32c_of(FILES[name]), generations[name], None) for name in sorted(FILES)
    ]
    assert [dict(f.pin) for f in found] == [{"generation": f.entry.token} for f in found]
    assert [f.address for f in found] == [f"{BUCKET}/{here}/model/{f.entry.path}" for f in found]


def test_a_download_is_exact_and_compared(root, gcs, put):
    """
    Every byte arrives, with its SHA-256 and the CRC32C that it was compared with, in a model that verifies; nothing is
    asked twice.
    """
    uri = put(FILES)
    store = store_of(root, gcs.storage_options)

    models = [store.ensure(uri, progress=False) for _ in range(2)]

    assert [(model.status, read_tree(model.path)) for model in models] == [("downloaded", FILES), ("present", FILES)]
    assert {str(f.path): f.sha256 for f in models[0].record.files} == digests(FILES)
    assert {str(f.path): f.evidence for f in models[0].record.files} == {
        name: crc32c_of(data) for name, data in FILES.items()
    }
    assert store.verify(uri, level="full").ok


def test_the_scheme_is_served_without_being_asked(root, gcs, put):
    """
    A store finds this back end by the scheme, and hands it its `storage_options`.
    """
    model = ModelStore(root, mode="rw", storage_options=gcs.storage_options).ensure(put(FILES), progress=False)

    assert read_tree(model.path) == FILES


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_prefix_never_brings_its_siblings(backend, gcs, put, here, slash):
    """
    What begins with the same letters, beside the directory, is not part of the model.
    """
    uri = put(FILES)
    for sibling in ("model-v2/config.json", "model.json", "model2", "mode/x"):
        gcs.put(f"{here}/{sibling}", b"sibling")

    assert names(backend, uri + slash) == sorted(FILES)


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_bucket_is_a_model(root, gcs, slash):
    """
    A URI without a path means all of the bucket.
    """
    whole = f"whole-{len(slash)}"
    gcs.make_bucket(whole)
    for name, data in FILES.items():
        gcs.put(name, data, bucket=whole)

    model = store_of(root, gcs.storage_options).ensure(f"gs://{whole}{slash}", progress=False)

    assert read_tree(model.path) == FILES


def test_a_single_object_is_a_directory_with_that_file(root, gcs, put):
    """
    The URI of one object gives a directory that holds it under the last part of its name.
    """
    uri = put(FILES)

    model = store_of(root, gcs.storage_options).ensure(f"{uri}/weights/a.bin", progress=False)

    assert read_tree(model.path) == {"a.bin": FILES["weights/a.bin"]}
    assert model.record.files[0].evidence == crc32c_of(FILES["weights/a.bin"])


def test_an_object_wins_over_a_prefix_of_its_name(backend, put):
    """
    Where an object and a prefix share a name the URI means the object, and with a slash the prefix.
    """
    uri = put({"twin": b"object", "twin/inside": b"below"})

    assert (names(backend, f"{uri}/twin"), names(backend, f"{uri}/twin/")) == (["twin"], ["inside"])


def test_empty_objects_are_files_and_markers_are_not(root, gcs, put):
    """
    An object of no bytes is kept; an object of no bytes whose name ends in a slash is a directory and left out.
    """
    uri = put({"": b"", "empty": b"", "sub/": b"", "sub/also-empty": b"", "a": b"a"})

    model = store_of(root, gcs.storage_options).ensure(uri, progress=False)

    assert read_tree(model.path) == {"empty": b"", "sub/also-empty": b"", "a": b"a"}


def test_slashes_too_many_in_keys_make_no_other_names(root, gcs, put):
    """
    A key that ends in a slash is a directory whatever it holds, and the empty parts of a key are no directories.
    """
    uri = put({"": b"x", "sub/": b"y", "sub//w.bin": b"w", "a": b"a"})
    store = store_of(root, gcs.storage_options)

    model = store.ensure(uri, progress=False)

    assert read_tree(model.path) == {"sub/w.bin": b"w", "a": b"a"}
    assert read_tree(store.ensure(uri, ignore_patterns="sub//*", progress=False).path) == {"a": b"a"}


def test_a_slash_too_many_in_a_uri_is_named(root, gcs, put):
    """
    Nothing is found, and the error says that the slash is a part of the key.
    """
    uri = put({"a": b"a"})
    scheme, _, rest = uri.partition("://")
    bucket, _, path = rest.partition("/")

    for wrong, words in ((f"{bucket}//{path}", "begins with a slash"), (f"{bucket}/{path}//a", "two slashes")):
        with pytest.raises(SourceNotFoundError, match=words):
            store_of(root, gcs.storage_options).ensure(f"{scheme}://{wrong}", progress=False)


@pytest.mark.parametrize("files", [{"": b"", "sub/": b""}, {}], ids=["markers", "nothing"])
def test_a_prefix_without_files_is_not_found(root, gcs, put, files):
    """
    A directory of nothing, or of nothing but directories, is no model, and nothing is published.
    """
    uri = put(files)

    with pytest.raises(SourceNotFoundError, match="it has no files"):
        store_of(root, gcs.storage_options).ensure(uri, progress=False)

    assert not (root / "models").exists()


@pytest.mark.parametrize("path", ["", "/x", "/x/"])
def test_a_bucket_that_is_not_there_is_not_found(root, gcs, path):
    """
    A missing bucket is told apart from an endpoint that does not answer, and nothing is published.
    """
    with pytest.raises(SourceNotFoundError, match="404: Not Found"):
        store_of(root, gcs.storage_options).ensure(f"gs://no-such-bucket{path}", progress=False)

    assert not (root / "models").exists()


def test_an_endpoint_where_nobody_listens_is_unavailable(root, gcs):
    """
    The error says that there is no connection and where to; nothing is published.
    """
    store = store_of(root, gcs.unreachable_options, retry_seconds=1)

    with pytest.raises(SourceUnavailableError, match=r"no connection to http://127\.0\.0\.1:\d+: .*retry"):
        store.ensure(gcs.uri("model"), progress=False)

    assert not (root / "models").exists()


def test_more_objects_than_one_page_are_all_fetched(root, gcs, here):
    """
    A model of more than 1000 objects, which the service lists in two answers, is complete.
    """
    files = {f"{number:05d}": b"%d" % number for number in range(1100)}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda item: gcs.put(f"{here}/model/{item[0]}", item[1]), files.items()))

    with CountingProxy(gcs.endpoint) as proxy:
        store = store_of(root, {"endpoint_url": proxy.endpoint, "token": "anon"})
        model = store.ensure(gcs.uri(f"{here}/model"), progress=False)
        asked = Counter(r.path for r in proxy.requests)

    assert read_tree(model.path) == files
    assert asked[f"/storage/v1/b/{BUCKET}/o"] == 2
    assert set(asked.values()) == {1, 2}


ODD = [
    "a b",
    "a+b",
    "100%25",
    "a%2Fb",
    "a&b=c;d,e",
    "x?y#z",
    ".hidden/.x",
    "caf\u00e9",
    "\u65e5\u672c/\U0001f984",
    "(1) [2] {3}~!@$'*:",
]


def test_odd_names_arrive_unchanged(root, gcs, put):
    """
    Blanks, plus and percent signs, question marks, leading dots and Unicode are kept as they are, in listings and in
    requests.
    """
    files = {name: name.encode() for name in ODD}
    uri = put(files)

    model = store_of(root, gcs.storage_options).ensure(uri, progress=False)

    assert read_tree(model.path) == files


def test_the_whole_name_is_one_part_of_a_request(put, here, open_gate):
    """
    The slashes of a name are quoted too, as the service wants it, for its description as for its bytes.
    """
    uri = put({"a/b c": b"x"})
    backend = GSBackend(through(open_gate), {})

    (file,) = backend.resolve(parse_ref(f"{uri}/a/b c")).files
    read(backend, file, 0, 1)

    place = f"/storage/v1/b/{BUCKET}/o/{here}%2Fmodel%2Fa%2Fb%20c"
    assert open_gate.asked() == [place, f"/download{place}"]


@pytest.mark.parametrize("name", ["a b+c%25", "caf\u00e9", "a%2Fb"], ids=ascii)
@pytest.mark.parametrize("below", ["", "/x"], ids=["object", "prefix"])
def test_a_uri_is_taken_as_it_is_spelled(backend, put, name, below):
    """
    Nothing in a URI is decoded: a blank is a blank and a percent sign a percent sign, in objects and in prefixes.
    """
    uri = put({f"{name}{below}": b"x"})

    assert names(backend, f"{uri}/{name}") == [below[1:] or name]


@pytest.mark.parametrize(
    "name",
    ["../up", "a/../../up", ".", "a/./b", "a\\b", "new\nline", "C:/x", "a.", "a\u202eb"],
    ids=ascii,
)
def test_a_hostile_name_is_refused_and_nothing_is_written_outside(root, gcs, put, name):
    """
    One name that would leave its place, or not be itself on every volume, refuses the whole model.
    """
    uri = put({"config.json": b"{}", name: b"evil"})
    before = listing(root.parent)

    with pytest.raises(UnsafePathError, match="nothing was written"):
        store_of(root, gcs.storage_options).ensure(uri, progress=False)

    assert uri not in ModelStore(root)
    outside = {path for path in listing(root.parent) if not path.startswith("volume/") and path not in before}
    assert (outside, b"evil" in read_tree(root).values()) == (set(), False)


@pytest.mark.parametrize(
    ("uri", "kind", "word"),
    [
        ("gs://", InvalidURIError, "no bucket"),
        ("gs:///key", InvalidURIError, "no bucket"),
        ("gs://bucket:80/key", InvalidURIError, "letters, digits"),
        ("gs://.../key", InvalidURIError, "letters, digits"),
        ("gs://bucket/..", UnsafePathError, "may not contain"),
        ("gs://bucket/a/../../other/o", UnsafePathError, "may not contain"),
    ],
)
def test_a_uri_that_names_nothing_is_refused_without_asking(gcs, uri, kind, word):
    """
    A URI without a proper bucket, or one that a server might shorten, reaches no server.
    """
    with CountingProxy(gcs.endpoint) as proxy:
        backend = GSBackend({"endpoint_url": proxy.endpoint, "token": "anon"}, {})
        with pytest.raises(kind, match=word):
            backend.resolve(parse_ref(uri))
        asked = proxy.requests

    assert asked == []


@pytest.mark.parametrize(("start", "stop"), [(0, 700_000), (0, 1), (699_999, 700_000), (1000, 250_000)])
def test_a_range_is_exactly_what_was_asked_for(backend, put, start, stop):
    """
    A range starts and stops where it should, whatever the size of the buffer.
    """
    uri = put(FILES)
    (file,) = backend.resolve(parse_ref(f"{uri}/weights/a.bin")).files

    pieces = {read(backend, file, start, stop, size) for size in (stop - start, 65_537)}

    assert pieces == {FILES["weights/a.bin"][start:stop]}


def test_a_file_is_read_in_parts(root, gcs, put):
    """
    Every byte of an object is asked for once, in ranges of at most a part that follow each other.
    """
    uri = put(FILES)

    with CountingProxy(gcs.endpoint) as proxy:
        store = store_of(root, {"endpoint_url": proxy.endpoint, "token": "anon"}, part_bytes=PART_BYTES)
        model = store.ensure(uri, progress=False)
        bodies = [r for r in proxy.requests if r.path.startswith("/download/")]

    asked = [r.range for r in bodies if r.path.endswith("a.bin")]
    assert sorted(asked) == sorted(
        f"bytes={start}-{min(start + PART_BYTES, 700_000) - 1}" for start in range(0, 700_000, PART_BYTES)
    )
    assert sum(r.body_bytes for r in bodies) == sum(map(len, FILES.values()))
    assert read_tree(model.path) == FILES


def test_a_big_file_comes_in_many_ranges_at_once(root, gcs, put):
    """
    A file of 24 MiB, in parts of 1 MiB and by four streams, is exact, and compared with its CRC32C.
    """
    data = random.Random(5).randbytes(24 * 2**20)
    uri = put({"weights.bin": data})

    model = store_of(root, gcs.storage_options, part_bytes=2**20).ensure(uri, progress=False, max_workers=4)

    assert read_tree(model.path) == {"weights.bin": data}
    assert model.record.files[0].evidence == crc32c_of(data)


def interfered(root, gcs, **events) -> ModelStore:
    """
    A store whose back end is interfered with.
    """
    inner = GSBackend(gcs.storage_options, {})
    return ModelStore(root, mode="rw", backends={"gs": Interfering(inner, **events).factory}, part_bytes=PART_BYTES)


@pytest.mark.parametrize("moment", ["after the listing", "between two parts"])
@pytest.mark.parametrize("change", ["replaced", "deleted"])
def test_an_object_that_changes_is_never_mixed(root, gcs, put, here, moment, change):
    """
    An object that is replaced or deleted during a download fails it, nothing is present, and the next one is exact.
    """
    uri = put(FILES)
    newer = random.Random(1).randbytes(len(FILES["weights/a.bin"]))

    def act():
        if change == "replaced":
            gcs.put(f"{here}/model/weights/a.bin", newer)
        else:
            gcs.delete(f"{here}/model/weights/a.bin")

    events = (
        {"after_resolve": act}
        if moment == "after the listing"
        else {"before_range": lambda number, file: number == 2 and act()}
    )
    store = interfered(root, gcs, **events)

    with pytest.raises(SourceChangedError, match="retry once the upload is complete") as caught:
        store.ensure(uri, progress=False, max_workers=1)

    assert caught.value.path == "weights/a.bin"
    assert uri not in store
    expected = (
        {**FILES, "weights/a.bin": newer}
        if change == "replaced"
        else {k: v for k, v in FILES.items() if k != "weights/a.bin"}
    )
    assert read_tree(store_of(root, gcs.storage_options).ensure(uri, progress=False).path) == expected


def test_the_same_bytes_put_again_are_another_version(root, gcs, put, here):
    """
    A generation is a strong token: a refresh fetches nothing while it stays, and what was uploaded again once it has
    changed.
    """
    uri = put(FILES)
    store = store_of(root, gcs.storage_options)
    first = store.ensure(uri, progress=False)

    same = store.ensure(uri, refresh=True, progress=False)
    gcs.put(f"{here}/model/config.json", FILES["config.json"])
    newer = store.ensure(uri, refresh=True, progress=False)

    assert (same.status, same.record.version == first.record.version) == ("present", True)
    assert (newer.status, newer.record.version == first.record.version) == ("downloaded", False)
    assert newer.bytes_fetched == len(FILES["config.json"])
    assert read_tree(newer.path) == FILES


@pytest.fixture(scope="session")
def generations(gcs):
    """
    Two generations of one object in a bucket that keeps them, as their bytes and numbers, and the URI.
    """
    gcs.make_bucket("versioned", keeps_versions=True)
    put = [(data, gcs.put("m/weights.bin", data, bucket="versioned")) for data in (b"first", b"second!")]
    return "gs://versioned/m/weights.bin", put


def test_a_generation_is_a_revision(root, gcs, generations):
    """
    Each generation gives the bytes it had, as a model of its own, and without one the newest.
    """
    uri, ((first, first_number), (second, second_number)) = generations
    store = store_of(root, gcs.storage_options)

    models = [store.ensure(uri, revision=revision, progress=False) for revision in (first_number, second_number, None)]

    assert [read_tree(model.path) for model in models] == [{"weights.bin": data} for data in (first, second, second)]
    assert [model.record.files[0].token for model in models] == [first_number, second_number, second_number]
    assert len({model.key for model in models}) == 3


def test_a_generation_pins_against_replacement(root, gcs, generations):
    """
    An object of a bucket that keeps generations, replaced during a download, is still read as it was listed.
    """
    gcs.put("pinned/weights.bin", b"listed", bucket="versioned")

    def replace():
        gcs.put("pinned/weights.bin", b"newer!", bucket="versioned")

    model = interfered(root, gcs, after_resolve=replace).ensure("gs://versioned/pinned/weights.bin", progress=False)

    assert read_tree(model.path) == {"weights.bin": b"listed"}


@pytest.mark.parametrize("path", ["m/weights.bin", "m", "", "none"])
def test_a_revision_that_is_no_generation_of_the_object_is_not_found(root, gcs, generations, path):
    """
    An unknown generation, and a generation of a directory, are told what a revision is; nothing is published.
    """
    with pytest.raises(SourceNotFoundError, match="generation of one object"):
        store_of(root, gcs.storage_options).ensure(f"gs://versioned/{path}", revision="12345", progress=False)

    assert not (root / "models").exists()


@pytest.mark.parametrize("revision", ["main", "-1", "1.5", "\u0661", "1" * 20, "1&alt=media"])
def test_a_revision_that_is_no_number_is_refused(backend, generations, revision):
    """
    What cannot be a generation is refused before anybody is asked.
    """
    uri, _ = generations

    with pytest.raises(InvalidURIError, match="generation, which is a number"):
        backend.resolve(parse_ref(uri, revision=revision))


def test_an_object_that_is_stored_compressed_is_what_it_holds(root, gcs, put, here):
    """
    What was uploaded with `Content-Encoding: gzip` is fetched as it is stored and then unpacked, under its own name.
    """
    uri = put(FILES)
    data = b"{}" * 500_000
    gcs.put(f"{here}/model/sub/packed.json", data, encoding="gzip")
    store = store_of(root, gcs.storage_options)

    model = store.ensure(uri, progress=False)
    single = store.ensure(f"{uri}/sub/packed.json", progress=False)
    without = store.ensure(uri, ignore_patterns="sub/*.json", progress=False)

    assert read_tree(model.path) == {**FILES, "sub/packed.json": data}
    assert read_tree(single.path) == {"packed.json": data}
    assert read_tree(without.path) == FILES
    assert store.verify(uri, "full").ok


def test_an_encoding_that_repeats_the_name_changes_nothing(root, gcs, put, here):
    """
    A `.gz` file that the service calls gzip is kept as it is stored.
    """
    put({})
    gcs.put(f"{here}/model/a.tar.gz", b"content", encoding="gzip")

    tree = read_tree(store_of(root, gcs.storage_options).ensure(gcs.uri(f"{here}/model"), progress=False).path)

    assert tree.keys() == {"a.tar.gz"}
    assert gzip.decompress(tree["a.tar.gz"]) == b"content"


def test_a_compressed_object_that_holds_too_much_is_refused(root, gcs, put, here):
    """
    What it unpacks to is bounded as that of an archive is, and nothing is published.
    """
    put({})
    gcs.put(f"{here}/model/bomb.json", bytes(40 << 20), encoding="gzip")

    store, uri = store_of(root, gcs.storage_options), gcs.uri(f"{here}/model")
    with pytest.raises(PolicyError, match="unpacks to more than"):
        store.ensure(uri, progress=False)

    assert uri not in store


@pytest.mark.parametrize("path", ["", "/packed.tar"])
def test_a_tar_that_is_stored_compressed_is_refused_with_a_way_out(root, gcs, put, here, path):
    """
    Under its name with `.gz` it would be unpacked as an archive, which other tools do not do here.
    """
    uri = put(FILES)
    gcs.put(f"{here}/model/packed.tar", b"{}" * 1000, encoding="gzip")

    with pytest.raises(PolicyError, match=r"packed\.tar` is refused: .*Content-Encoding: gzip.*`ignore_patterns`"):
        store_of(root, gcs.storage_options).ensure(uri + path, progress=False)

    model = store_of(root, gcs.storage_options).ensure(uri, ignore_patterns="packed.tar", progress=False)
    assert read_tree(model.path) == FILES


def through(proxy) -> dict:
    return {"endpoint_url": proxy.endpoint, "token": "anon"}


def test_a_connection_that_is_cut_goes_on_where_it_was(root, gcs, put):
    """
    After each of three cuts only the rest is asked for.
    """
    data = random.Random(2).randbytes(8_000_000)
    uri = put({"weights.bin": data})
    with TamperingProxy(gcs.endpoint, cuts=(3_000_000, 1_500_000, 2_000_000)) as proxy:
        model = store_of(root, through(proxy)).ensure(uri, progress=False, max_workers=1)
        begun = [int(r.range.removeprefix("bytes=").partition("-")[0]) for r in proxy.requests if r.range]

    assert read_tree(model.path) == {"weights.bin": data}
    assert (len(begun), begun == sorted(set(begun))) == (3, True)
    assert model.bytes_fetched == len(data)


def other_range(asked: str, answer: bytes) -> bytes:
    return answer.replace(b"Content-Range: bytes 0-", b"Content-Range: bytes 1-")


def other_length(asked: str, answer: bytes) -> bytes:
    return answer.replace(b"/700000\r\n", b"/700001\r\n")


@pytest.mark.parametrize("rewrite", [other_range, other_length], ids=lambda rewrite: rewrite.__name__)
def test_an_answer_for_another_range_is_refused(gcs, put, rewrite):
    """
    A server that moves a range, or speaks of another length, is believed nothing.
    """
    uri = put(FILES)
    with TamperingProxy(gcs.endpoint, rewrite=rewrite) as proxy:
        backend = GSBackend(through(proxy), {})
        (file,) = backend.resolve(parse_ref(f"{uri}/weights/a.bin")).files
        with pytest.raises(SourceUnavailableError, match="requested `bytes 0-349999/700000`, received"):
            read(backend, file, 0, 350_000)


@pytest.fixture
def open_gate(gate):
    """
    A gate that lets everybody in, and says instead what a test tells it.
    """
    gate.good = None
    return gate


def refused(status: int, message: str, reason: str = "", **headers: str):
    """
    A refusal as the service words it.
    """
    error = {"code": status, "message": message, "errors": [{"reason": reason, "message": message, "domain": "global"}]}
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, {"Content-Type": "application/json", **names}, json.dumps({"error": error}).encode()


@pytest.mark.parametrize("status", [429, 500, 503, 403], ids=["429", "500", "503", "403 rateLimitExceeded"])
def test_a_busy_service_is_asked_again(root, put, open_gate, status):
    """
    A service that is busy, for listings as for bytes, slows a download down and does not end it.
    """
    uri = put(FILES)
    asked = Counter()

    def busy(method, path):
        asked[path] += 1
        return refused(status, "slow down", "rateLimitExceeded" if status == 403 else "") if asked[path] <= 2 else None

    open_gate.instead = busy
    model = store_of(root, through(open_gate)).ensure(uri, progress=False, max_workers=1)

    assert read_tree(model.path) == FILES
    assert min(asked.values()) >= 3


def test_a_busy_service_says_how_long_it_wants_to_be_left_alone(open_gate):
    """
    `Retry-After` is in the error, and a wait that is longer than a call may take is not begun.
    """
    open_gate.instead = lambda method, path: refused(503, "back later", Retry_After="777")
    backend = GSBackend(through(open_gate), {})

    with pytest.raises(SourceUnavailableError, match="503: back later") as caught:
        backend.resolve(parse_ref("gs://models/m/"))

    assert (caught.value.retry_after, caught.value.is_final, len(open_gate.requests)) == (777.0, False, 1)


@pytest.mark.parametrize(
    ("status", "body", "word"),
    [
        (
            400,
            refused(400, "Bucket is a requester pays bucket but no user project provided.", "required")[2],
            "no user project provided",
        ),
        (301, b"", "redirect, and credentials are never sent elsewhere"),
        (200, b"<html>Log in</html>", "response is not JSON"),
        (200, b"[]", "response is not JSON"),
        (200, b"[" * 100_000, "response is not JSON"),
        (200, b'{"items": 5}', "is this a Google Cloud Storage endpoint"),
        (200, b'{"items": [5]}', "without name, size or generation"),
        (200, b'{"items": [{"name": "m/x", "size": "-1", "generation": "1"}]}', "without name, size or generation"),
        (200, b'{"items": [{"name": "m/x", "size": "1", "generation": "1&x"}]}', "without name, size or generation"),
        (
            200,
            b'{"items": [{"name": "m/\\ud800", "size": "1", "generation": "1"}]}',
            "without name, size or generation",
        ),
        (200, b'{"nextPageToken": "\\ud800"}', "is this a Google Cloud Storage endpoint"),
        (200, b'{"nextPageToken": "again"}', "the listing loops"),
        (
            200,
            b'{"items": [{"name": "other/x", "size": "1", "generation": "1"}]}',
            "the listing of prefix `m/` contains `other/x`",
        ),
    ],
)
def test_a_listing_that_makes_no_sense_is_refused(open_gate, status, body, word):
    """
    Whatever is no listing of this service, or no listing of what was asked for, is told and brings nothing.
    """
    open_gate.instead = lambda method, path: (status, {}, body)

    with pytest.raises(SourceUnavailableError, match=word):
        GSBackend(through(open_gate), {}).resolve(parse_ref("gs://models/m/"))


def test_a_description_of_another_object_is_refused(open_gate):
    """
    A server that is asked for one object and describes another is believed nothing.
    """
    other = json.dumps({"name": "m/y", "size": "1", "generation": "1"}).encode()
    open_gate.instead = lambda method, path: (200, {}, other)

    with pytest.raises(SourceUnavailableError, match="describes another object"):
        GSBackend(through(open_gate), {}).resolve(parse_ref("gs://models/m/x"))


def test_bytes_that_are_not_what_the_service_vouches_for_are_not_published(root, put, open_gate):
    """
    A file whose bytes do not have the CRC32C of the listing ends the download, and nothing is present.
    """
    uri = put(FILES)
    wrong = b"x" * 1000
    open_gate.instead = lambda method, path: (
        (200, {}, wrong) if path.startswith("/download/") and "b.bin" in path else None
    )

    with pytest.raises(DigestMismatchError, match="crc32c:") as caught:
        store_of(root, through(open_gate)).ensure(uri, progress=False)

    assert (caught.value.path, caught.value.expected, caught.value.actual) == (
        "weights/b.bin",
        crc32c_of(FILES["weights/b.bin"]),
        crc32c_of(wrong),
    )
    assert uri not in ModelStore(root)


def described(**fields) -> str | None:
    item = {"name": "x", "size": "3", "generation": "1", **fields}
    ((found,), _) = parse_listing(json.dumps({"items": [item]}).encode())
    return found.digest


MD5 = base64.b64encode(hashlib.md5(b"abc").digest()).decode()


@pytest.mark.parametrize(
    ("fields", "digest"),
    [
        ({"crc32c": "NkuypA==", "md5Hash": MD5}, "crc32c:364bb2a4"),
        ({"crc32c": "AAAAAA=="}, "crc32c:00000000"),
        ({"md5Hash": MD5}, f"md5:{hashlib.md5(b'abc').hexdigest()}"),
        ({"md5Hash": MD5, "size": str(GIB)}, None),
        ({"crc32c": "AAAA", "md5Hash": "AAAA"}, None),
        ({"crc32c": "no base64", "md5Hash": 5}, None),
        ({}, None),
    ],
    ids=str,
)
def test_what_the_service_vouches_for_is_read(fields, digest):
    """
    The CRC32C counts, else the MD5 of what is not too large; what is neither is none.
    """
    assert described(**fields) == digest


def test_without_a_fast_crc32c_the_md5_counts(monkeypatch):
    """
    Where nothing computes a CRC32C fast, objects that have an MD5 too are compared with that.
    """
    monkeypatch.setattr("kserve_pvc.backends._google_json.make_checksum", lambda kind: None)

    found = [described(crc32c="NkuypA==", md5Hash=MD5), described(crc32c="NkuypA==")]

    assert found == [f"md5:{hashlib.md5(b'abc').hexdigest()}", "crc32c:364bb2a4"]


def test_a_page_that_is_no_page_is_told():
    """
    Bytes that are no JSON are refused by the reader of listings itself.
    """
    with pytest.raises(RefusedError, match="not JSON"):
        parse_listing(b"\xff")


def test_a_given_token_is_sent_and_never_shown(root, gate, put):
    """
    Who has a good token gets the model, and every request carries it.
    """
    uri = put(FILES)
    gate.good = {TOKEN}

    model = store_of(root, {"endpoint_url": gate.endpoint, "token": TOKEN}).ensure(uri, progress=False)

    assert read_tree(model.path) == FILES
    assert {headers.get("authorization") for _, _, headers in gate.requests} == {f"Bearer {TOKEN}"}
    assert not [path for _, path, _ in gate.requests if TOKEN in path]
    assert not [name for name, data in read_tree(root).items() if TOKEN.encode() in data]


@pytest.mark.parametrize("path", ["", "/config.json", "/none"])
def test_a_token_that_is_no_good_is_denied_and_never_shown(root, gate, put, path, caplog):
    """
    The service's own words are in the error, without the token that it repeats.
    """
    uri = put(FILES) + path
    caplog.set_level(logging.DEBUG)

    with pytest.raises(SourceDeniedError, match=r"401: Invalid Credentials, Bearer ….*may have expired") as caught:
        store_of(root, {"endpoint_url": gate.endpoint, "token": TOKEN}).ensure(uri, progress=False)

    said = (
        "".join(traceback.format_exception(caught.value)) + repr(caught.value) + str(caught.value.fields) + caplog.text
    )
    assert "canary" not in said
    assert not (root / "models").exists()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Authorization: Bearer canary/1 was sent", "Authorization: Bearer … was sent"),
        ("got ya29.canary-1, which is old", "got ya29.… which is old"),
        ("see https://user:canary@host/a?access_token=canary", "see https://host/a"),
        ("no secret here: 401", "no secret here: 401"),
    ],
)
def test_what_looks_like_a_token_is_hidden(text, shown):
    """
    What others say is shown without tokens that are not ours, too.
    """
    assert _google_login.hide(text) == shown


def test_a_token_that_is_no_good_any_more_ends_the_bytes(root, gate, put):
    """
    A token that is refused only once bytes are asked for is denied, and the error does not show it.
    """
    uri = put(FILES)
    gate.good = {TOKEN}
    backend = GSBackend({"endpoint_url": gate.endpoint, "token": TOKEN}, {})
    (file,) = backend.resolve(parse_ref(f"{uri}/weights/b.bin")).files
    gate.forget()

    with pytest.raises(SourceDeniedError, match="Invalid Credentials") as caught:
        read(backend, file, 0, 1000)

    assert "canary" not in "".join(traceback.format_exception(caught.value))


def test_no_default_credentials_mean_nobody_in_particular(root, gcs, put, gate, no_google):
    """
    As in KServe, public buckets are read without credentials; where that is denied, the error says why there were none.
    """
    uri = put(FILES)
    login = _google_login.GoogleAuthLogin(_google_login._default, is_optional=True)

    assert login.authorize(Scope(), renewed=False) == ("", {})
    assert "no credentials: Your default credentials were not found" in login.hint()
    backend = GSBackend(through(gate), {})
    backend.service.login = login
    with pytest.raises(SourceDeniedError, match=r"Invalid Credentials.*default credentials were not found"):
        backend.resolve(parse_ref(uri))


@pytest.mark.parametrize("form", ["file", "content", "object"])
def test_a_service_account_gets_its_tokens_and_renews_them(root, tmp_path, gate, put, account, form):
    """
    A key is signed with and never sent; one token does for many requests, and another is got when it is refused.
    """
    uri = put(FILES)
    if form == "file":
        token = tmp_path / "key.json"
        token.write_text(json.dumps(account))
    else:
        from google.oauth2.service_account import Credentials

        token = account if form == "content" else Credentials.from_service_account_info(account)
    backend = GSBackend({"endpoint_url": gate.endpoint, "token": str(token) if form == "file" else token}, {})

    model = ModelStore(root, mode="rw", **serve(backend)).ensure(uri, progress=False)
    gate.forget()
    backend.service.login._renewed_at -= 60  # Some time has passed.
    again = ModelStore(root, mode="rw", **serve(backend)).ensure(f"{uri}/weights/a.bin", progress=False)

    assert (read_tree(model.path), read_tree(again.path)) == (FILES, {"a.bin": FILES["weights/a.bin"]})
    assert len(gate.given) == 2
    claims = json.loads(base64.urlsafe_b64decode(gate.assertions[0]["assertion"][0].split(".")[1] + "=="))
    assert (claims["iss"], claims["scope"]) == (
        account["client_email"],
        "https://www.googleapis.com/auth/devstorage.read_only",
    )


def test_a_token_that_expires_between_two_ranges_is_renewed(gate, put, account):
    """
    A range that is refused for its old token is asked for once more with a new one, and many threads get one for all of
    them.
    """
    uri = put({"weights.bin": FILES["weights/a.bin"]})
    backend = GSBackend({"endpoint_url": gate.endpoint, "token": account}, {})
    (file,) = backend.resolve(parse_ref(f"{uri}/weights.bin")).files
    gate.forget()
    backend.service.login._renewed_at -= 60  # Some time has passed.
    together = threading.Barrier(4)

    def fetch(start: int) -> bytes:
        together.wait()
        return read(backend, file, start, start + 100_000)

    with ThreadPoolExecutor(4) as pool:
        pieces = list(pool.map(fetch, range(0, 400_000, 100_000)))

    assert b"".join(pieces) == FILES["weights/a.bin"][:400_000]
    assert len(gate.given) == 2


def test_a_token_that_cannot_be_renewed_is_told_by_the_service(gate):
    """
    Where google-auth has nothing to renew with, what the service says about the token is the error.
    """
    from google.oauth2.credentials import Credentials

    backend = GSBackend({"endpoint_url": gate.endpoint, "token": Credentials("canary-without-more")}, {})

    with pytest.raises(SourceDeniedError, match="401: Invalid Credentials") as caught:
        backend.resolve(parse_ref("gs://models/m"))

    assert "canary" not in "".join(traceback.format_exception(caught.value))


def test_a_token_service_that_says_nothing_is_not_waited_for_long(gcs, put, account, monkeypatch):
    """
    The time that google-auth waits for a token service is bounded.
    """
    uri = put(FILES)
    monkeypatch.setattr(_google_login, "_TOKEN_SERVICE_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        account["token_uri"] = f"http://127.0.0.1:{silent.getsockname()[1]}/token"
        started = time.monotonic()
        with pytest.raises(SourceUnavailableError, match=r"no token: .*timed out"):
            GSBackend({"endpoint_url": gcs.endpoint, "token": account}, {}).resolve(parse_ref(uri))

    assert time.monotonic() - started < 20


def test_an_expired_token_is_renewed_before_it_is_sent(gate, put, account):
    """
    A token that is about to expire is not sent at all.
    """
    uri = put(FILES)
    gate.token_seconds = 10
    backend = GSBackend({"endpoint_url": gate.endpoint, "token": account}, {})

    found = [names(backend, f"{uri}/config.json") for _ in range(2)]

    assert found == [["config.json"], ["config.json"]]
    assert [headers.get("authorization") for method, _, headers in gate.requests if method == "GET"] == [
        f"Bearer {t}" for t in gate.given
    ]


def test_a_key_that_is_no_good_is_denied_and_never_shown(root, gate, put, account):
    """
    The reason of the token service is in the error, and neither key nor assertion are.
    """
    uri = put(FILES)
    gate.is_giving = False

    with pytest.raises(SourceDeniedError, match=r"no token: .*invalid_grant: Invalid JWT Signature") as caught:
        store_of(root, {"endpoint_url": gate.endpoint, "token": account}).ensure(uri, progress=False)

    said = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
    assert [word for word in ("PRIVATE KEY", gate.assertions[0]["assertion"][0]) if word in said] == []


def test_a_token_service_that_is_not_there_is_unavailable(gcs, gate, put, account):
    """
    Nobody to ask for a token is weather, and no denial.
    """
    account["token_uri"] = str(gcs.unreachable_options["endpoint_url"])

    with pytest.raises(SourceUnavailableError, match="no token: "):
        GSBackend({"endpoint_url": gate.endpoint, "token": account}, {}).resolve(parse_ref(put(FILES)))


def test_default_credentials_come_from_the_environment(root, tmp_path, gcs, put, account, gate, no_google, monkeypatch):
    """
    GOOGLE_APPLICATION_CREDENTIALS counts where no `token` is given, over TLS with an authority that the environment
    names.
    """
    uri = put(FILES)
    key = tmp_path / "key.json"
    key.write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(key))
    try:
        authority = Authority(tmp_path)
    except FileNotFoundError:
        pytest.skip("`openssl` is not installed")

    with Gate(gcs, tls=authority.context("storage")) as sealed:
        gate.given, gate.good = sealed.given, sealed.good  # One gives the tokens that the other knows.
        sealed.instead = lambda method, path: setattr(sealed, "good", set(gate.given))
        backend = GSBackend({"endpoint_url": sealed.endpoint}, {"REQUESTS_CA_BUNDLE": str(authority.file)})
        model = ModelStore(root, mode="rw", **serve(backend)).ensure(uri, progress=False)
        shown = {headers.get("authorization") for _, _, headers in sealed.requests}

    assert read_tree(model.path) == FILES
    assert shown == {f"Bearer {token}" for token in gate.given}


def test_an_authority_that_nobody_trusts_is_told(tmp_path, gcs):
    """
    A certificate that cannot be verified ends it, and the error names what to set.
    """
    try:
        authority = Authority(tmp_path)
    except FileNotFoundError:
        pytest.skip("`openssl` is not installed")

    with Gate(gcs, tls=authority.context("storage")) as sealed:
        backend = GSBackend({"endpoint_url": sealed.endpoint, "token": "anon"}, {})
        with pytest.raises(SourceUnavailableError, match=r"certificate verification failed.*SSL_CERT_FILE") as caught:
            backend.resolve(parse_ref("gs://models/m"))

    assert caught.value.is_final


MACHINE = """
import sys
from kserve_pvc import ModelStore

root, endpoint, uri = sys.argv[1:]
store = ModelStore(root, mode="rw", storage_options={"endpoint_url": endpoint, "token": "cloud"})
print(store.ensure(uri, progress=False).size_bytes)
"""


def test_a_machine_of_googles_asks_as_itself(root, gate, put):
    """
    With `token="cloud"` the metadata service of the machine gives the tokens.
    """
    host = gate.endpoint.removeprefix("http://")

    said = shell.python(
        MACHINE, str(root), gate.endpoint, put(FILES), env={"GCE_METADATA_HOST": host, "GCE_METADATA_IP": host}
    )

    assert int(said) == sum(map(len, FILES.values()))
    assert len(gate.given) == 1


EMULATED = """
import os, sys
from kserve_pvc import ModelStore

root, uri = sys.argv[1:]
before = dict(os.environ)
model = ModelStore(root, mode="rw").ensure(uri, progress=False)
loaded = {name for name in ("aiohttp", "gcsfs", "google.auth", "grpc", "requests") if name in sys.modules}
print(model.size_bytes, dict(os.environ) == before, *loaded)
"""


@pytest.mark.parametrize("scheme", ["", "http://"])
def test_the_environment_names_an_emulator(root, gcs, put, scheme):
    """
    STORAGE_EMULATOR_HOST is enough. No SDK is loaded for it, nor gRPC asked anything, nor the environment written to.
    """
    environ = {"STORAGE_EMULATOR_HOST": gcs.endpoint.replace("http://", scheme)}

    said = shell.python(EMULATED, str(root), put(FILES), env=environ)

    assert said.split() == [str(sum(map(len, FILES.values()))), "True"]


def test_variables_of_fsspec_count_below_options(gcs, put):
    """
    fsspec's own variables for gcsfs go through gcsfs, by both its names and in its order; options replace them.
    """
    environ = {
        "FSSPEC_GS_ENDPOINT_URL": "http://other.invalid",
        "FSSPEC_GCS_ENDPOINT_URL": gcs.endpoint,
        "FSSPEC_GCS_TOKEN": "anon",
    }
    configured = GSBackend({}, environ)
    given = GSBackend({"endpoint_url": "https://named.invalid", "token": TOKEN}, environ)

    ref = parse_ref(put(FILES))
    assert (names(configured, ref.uri), configured.access(ref)) == (sorted(FILES), "direct:gcsfs")
    assert (given.service.endpoint.host, given.access(ref)) == ("named.invalid", "direct")


@pytest.mark.parametrize(
    ("options", "environ", "expected"),
    [
        ({}, {}, ("https://storage.googleapis.com", "GoogleAuthLogin")),
        ({}, {"GOOGLE_CLOUD_UNIVERSE_DOMAIN": "example.org"}, ("https://storage.example.org", "GoogleAuthLogin")),
        ({}, {"STORAGE_EMULATOR_HOST": "gcs:9000"}, ("http://gcs:9000", "Anonymous")),
        ({}, {"STORAGE_EMULATOR_HOST": "https://gcs:9000"}, ("https://gcs:9000", "Anonymous")),
        ({}, {"STORAGE_EMULATOR_HOST": "default"}, ("https://storage.googleapis.com", "GoogleAuthLogin")),
        ({"endpoint_url": "https://a.b"}, {"STORAGE_EMULATOR_HOST": "gcs:9000"}, ("https://a.b", "GoogleAuthLogin")),
        ({"endpoint_url": "http://a.b"}, {}, ("http://a.b", "Anonymous")),
        ({"token": "anon"}, {}, ("https://storage.googleapis.com", "Anonymous")),
        ({"token": TOKEN}, {}, ("https://storage.googleapis.com", "GivenToken")),
        ({"token": TOKEN, "endpoint_url": "http://[::1]:80"}, {}, ("http://[::1]:80", "GivenToken")),
        ({"token": "google_default"}, {}, ("https://storage.googleapis.com", "GoogleAuthLogin")),
        ({"token": "cloud"}, {}, ("https://storage.googleapis.com", "GoogleAuthLogin")),
        (
            {"project": "p", "access": "read_only", "consistency": "none", "cache_timeout": 5},
            {},
            ("https://storage.googleapis.com", "GoogleAuthLogin"),
        ),
    ],
    ids=str,
)
def test_who_is_asked_and_by_whom(options, environ, expected):
    """
    Options win over the environment, and default credentials are looked for only where they would be sent over TLS.
    """
    backend = GSBackend(options, environ)

    url, login = expected
    assert (backend.service.endpoint, type(backend.service.login).__name__) == (target_of(url), login)


@pytest.mark.parametrize(
    ("options", "environ", "word"),
    [
        ({"token": TOKEN, "endpoint_url": "http://gcs.example.org"}, {}, "sent over https"),
        ({"token": {"private_key": "canary"}, "endpoint_url": "http://127.0.0.1.example.org"}, {}, "sent over https"),
        ({"token": "/no/such/key.json"}, {}, "`/no/such/key.json`.*the file cannot be read"),
        ({"token": "key.json"}, {}, "the file cannot be read"),
        ({"token": "~nobody-of-this-name/key"}, {}, "the file cannot be read"),
        ({"token": __file__}, {}, "not the JSON of a service account"),
        ({"token": {"type": "external_account"}}, {}, "GOOGLE_APPLICATION_CREDENTIALS"),
        ({"token": "browser", "endpoint_url": "http://gcs.example.org"}, {}, "sent over https"),
        ({"token": f"{TOKEN}\r\nX-Other: 1"}, {}, "one word"),
        ({"token": 5}, {}, "`int` for `token`; pass a file"),
        ({"endpoint_url": "ftp://host"}, {}, "https://host:port"),
        ({"endpoint_url": "https://user:canary@host"}, {}, "https://host:port"),
        ({"endpoint_url": "https://host/?sig=canary"}, {}, "https://host:port"),
        ({}, {"STORAGE_EMULATOR_HOST": "canary@host:port"}, "`STORAGE_EMULATOR_HOST`"),
        ({"tokn": "canary"}, {}, "`tokn`.*did you mean `token`"),
        ({"session_kwarg": {"headers": {"x": "canary"}}}, {}, "did you mean `session_kwargs`"),
        ({"requester_pays": 5}, {}, "name of the project"),
    ],
    ids=str,
)
def test_a_setting_that_means_nothing_is_refused(options, environ, word):
    """
    Wrong settings are told by name before anybody is asked, and what may be secret is not repeated.
    """
    with pytest.raises(SettingsError, match=word) as caught:
        GSBackend(options, environ)

    assert "canary" not in "".join(traceback.format_exception(caught.value)).partition("Error: ")[2]
    assert "canary" not in repr(caught.value)


@pytest.mark.parametrize(
    "content", [{"private_key": "canary"}, {"type": "authorized_user", "client_secret": "canary"}], ids=str
)
def test_a_key_that_is_none_is_denied(gate, content):
    """
    Content that google-auth cannot read is told, without what it holds.
    """
    with pytest.raises(SourceDeniedError, match="no token: ") as caught:
        GSBackend({"endpoint_url": gate.endpoint, "token": content}, {}).resolve(parse_ref("gs://models/m"))

    assert "canary" not in "".join(traceback.format_exception(caught.value))
    assert gate.requests == []


@pytest.mark.parametrize(
    "options", [{"requester_pays": "billed"}, {"requester_pays": True, "project": "billed"}], ids=str
)
def test_who_pays_is_said_in_every_request(root, put, open_gate, options):
    """
    In a bucket whose readers pay, the project that pays is named with listings and bytes.
    """
    store_of(root, {**through(open_gate), **options}).ensure(put(FILES), progress=False)

    assert {parse_qs(urlsplit(path).query)["userProject"][0] for _, path, _ in open_gate.requests} == {"billed"}


def test_without_the_right_to_list_one_object_is_enough(root, put, open_gate):
    """
    Who may read objects and not list them gets a single object, and is denied a directory.
    """
    uri = put(FILES)
    open_gate.instead = lambda method, path: (
        refused(403, "no storage.objects.list access") if urlsplit(path).path.endswith("/o") else None
    )
    store = store_of(root, through(open_gate))

    model = store.ensure(f"{uri}/config.json", progress=False)
    with pytest.raises(SourceDeniedError, match=r"403: no storage\.objects\.list access"):
        store.ensure(uri, progress=False)

    assert read_tree(model.path) == {"config.json": FILES["config.json"]}


def test_closing_lets_go_of_connections_and_is_no_end(backend, put):
    """
    A back end that was closed opens new connections when it is asked again.
    """
    uri = put(FILES)

    found = []
    for _ in range(2):
        found.append(names(backend, uri))
        backend.close()

    assert found == [sorted(FILES)] * 2
    assert not any(backend._client._idle.values())


def test_every_error_can_cross_processes(open_gate):
    """
    What the back end raises is one of the typed errors, whatever the service says.
    """
    said = []
    for status in (400, 401, 403, 404, 409, 410, 412, 416, 418, 451):
        open_gate.instead = lambda method, path, status=status: refused(status, "no")
        with pytest.raises(StoreError) as caught:
            GSBackend(through(open_gate), {}).resolve(parse_ref("gs://models/m/"))
        said.append(type(caught.value).__name__.removeprefix("Source").removesuffix("Error"))

    assert said == ["Unavailable", "Denied", "Denied", "NotFound", *["Unavailable"] * 6]


def test_an_answer_of_another_generation_is_refused(gcs, put):
    """
    A server that answers with another generation than was asked for is told by the head of its answer.
    """
    uri = put(FILES)

    def rewrite(asked: str, answer: bytes) -> bytes:
        return re.sub(rb"(?i)(x-goog-generation: )[0-9]+", rb"\g<1>17", answer)

    with TamperingProxy(gcs.endpoint, rewrite=rewrite) as proxy:
        backend = GSBackend(through(proxy), {})
        (file,) = backend.resolve(parse_ref(f"{uri}/weights/a.bin")).files
        with pytest.raises(SourceChangedError):
            read(backend, file, 0, 1000)
