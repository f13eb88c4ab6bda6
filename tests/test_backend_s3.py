"""
Models in buckets, on a real S3 server and through connections that break.
"""

import hashlib
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import shell
from origin import CountingProxy, SeaweedS3
from sources import Interfering
from tampering import TamperingProxy
from trees import model_files, read_tree

from kserve_pvc import (
    InvalidURIError,
    ModelStore,
    SourceChangedError,
    SourceDeniedError,
    SourceNotFoundError,
    SourceUnavailableError,
)
from kserve_pvc._source.ref import parse_ref
from kserve_pvc.backends.s3 import S3Backend

BUCKET = "models"
PART_BYTES = 100_000
FILES = model_files(seed=21)


@pytest.fixture(scope="session")
def client(origin):
    """
    What a model's owner uses.
    """
    return origin._client


@pytest.fixture(scope="session")
def backend(origin):
    """
    The back end by itself, at the server.
    """
    return S3Backend({"endpoint_url": origin.endpoint, "key": origin.key, "secret": origin.secret})


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def names(backend: S3Backend, uri: str) -> list[str]:
    return [str(file.entry.path) for file in backend.resolve(parse_ref(uri)).files]


def bucket_and_key(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def read(backend: S3Backend, file, start: int, stop: int, buffer_bytes: int = 4096) -> bytes:
    """
    Read a range to its end through a buffer.
    """
    buffer, data = memoryview(bytearray(buffer_bytes)), b""
    with backend.open_range(file, start, stop) as reader:
        while len(data) < stop - start and (count := reader.readinto(buffer[: stop - start - len(data)])):
            data += bytes(buffer[:count])
    return data


def test_a_listing_pins_every_object(backend, upload):
    """
    Each object is there with path, size, its ETag as token, and the condition that a later read must meet.
    """
    uri = upload(FILES)

    found = backend.resolve(parse_ref(uri)).files

    assert [(str(f.entry.path), f.entry.size_bytes, f.entry.token, f.entry.sha256) for f in found] == [
        (name, len(FILES[name]), md5(FILES[name]), None) for name in sorted(FILES)
    ]
    assert [dict(f.pin) for f in found] == [{"If-Match": f'"{f.entry.token}"'} for f in found]
    assert [f.address for f in found] == [f"{uri.removeprefix('s3://')}/{f.entry.path}" for f in found]


def test_tokens_are_kept_in_the_record(root, s3, upload):
    """
    The record of a download says which ETag each file had.
    """
    record = ModelStore(root, mode="rw", **s3).ensure(upload(FILES), progress=False).record

    assert {str(f.path): f.token for f in record.files} == {name: md5(data) for name, data in FILES.items()}


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_prefix_never_brings_its_siblings(root, s3, origin, upload, slash):
    """
    What begins with the same letters, beside the directory, is not part of the model.
    """
    uri = upload(FILES)
    _, key = bucket_and_key(uri)
    for sibling in (f"{key}-v2/config.json", f"{key}.json", f"{key}2", f"{key[:-1]}/x"):
        origin.put(BUCKET, sibling, b"sibling")

    model = ModelStore(root, mode="rw", **s3).ensure(uri + slash, progress=False)

    assert read_tree(model.path) == FILES


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_bucket_is_a_model(root, s3, origin, slash):
    """
    A URI without a path means all of the bucket.
    """
    origin.make_bucket("whole-bucket")
    for name, data in FILES.items():
        origin.put("whole-bucket", name, data)

    model = ModelStore(root, mode="rw", **s3).ensure(f"s3://whole-bucket{slash}", progress=False)

    assert read_tree(model.path) == FILES


def test_a_single_object_is_a_directory_with_that_file(root, s3, upload):
    """
    The URI of one object gives a directory that holds it under the last part of its name.
    """
    uri = upload(FILES)

    model = ModelStore(root, mode="rw", **s3).ensure(f"{uri}/weights/a.bin", progress=False)

    assert read_tree(model.path) == {"a.bin": FILES["weights/a.bin"]}
    assert model.key.startswith("a.bin-")


def test_an_object_wins_over_a_prefix_of_its_name(backend, upload):
    """
    Where an object and a prefix share a name the URI means the object, and with a slash the prefix.
    """
    uri = upload({"twin": b"object", "twin/inside": b"below"})

    assert (names(backend, f"{uri}/twin"), names(backend, f"{uri}/twin/")) == (["twin"], ["inside"])


def test_empty_objects_are_files_and_markers_are_not(root, s3, upload):
    """
    An object of no bytes is kept; an object of no bytes whose name ends in a slash is a directory and left out.
    """
    uri = upload({"": b"", "empty": b"", "sub/": b"", "sub/also-empty": b"", "a": b"a"})

    model = ModelStore(root, mode="rw", **s3).ensure(uri, progress=False)

    assert read_tree(model.path) == {"empty": b"", "sub/also-empty": b"", "a": b"a"}


@pytest.mark.parametrize("files", [{"": b"", "sub/": b""}, {}], ids=["markers", "nothing"])
def test_a_prefix_without_files_is_not_found(root, s3, upload, files):
    """
    A directory of nothing, or of nothing but directories, is no model, and nothing is published.
    """
    uri = upload(files)

    with pytest.raises(SourceNotFoundError, match="it has no files"):
        ModelStore(root, mode="rw", **s3).ensure(uri, progress=False)

    assert not (root / "models").exists()


def test_more_objects_than_one_page_are_all_listed(backend, upload, client):
    """
    A model of more than 1000 objects, which a server lists in several answers, is complete.
    """
    uri = upload({})
    _, key = bucket_and_key(uri)

    def put(number: int) -> None:
        client.put_object(Bucket=BUCKET, Key=f"{key}/{number:05d}", Body=b"%d" % number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, range(1100)))

    found = backend.resolve(parse_ref(uri))
    assert [str(f.entry.path) for f in found.files] == [f"{number:05d}" for number in range(1100)]
    assert found.size_bytes == sum(len(str(number)) for number in range(1100))


ODD = [
    "a b",
    "a+b",
    "100%25",
    "a&b=c;d,e",
    "x?y#z",
    ".hidden/.x",
    "caf\u00e9",
    "\u65e5\u672c/\U0001f984",
    "(1) [2] {3}~!@$'",
    "-dash",
]


def test_odd_names_arrive_unchanged(root, s3, upload):
    """
    Blanks, plus and percent signs, leading dots and Unicode are kept as they are, in listings and in requests.
    """
    files = {name: name.encode() for name in ODD}
    uri = upload(files)

    model = ModelStore(root, mode="rw", **s3).ensure(uri, progress=False)

    assert read_tree(model.path) == files


@pytest.mark.parametrize("name", ["a b+c%25", "caf\u00e9"], ids=ascii)
def test_a_uri_is_taken_as_it_is_spelled(root, s3, upload, name):
    """
    Nothing in a URI is decoded: a blank is a blank and a percent sign a percent sign.
    """
    uri = upload({f"{name}/x": b"x"})

    model = ModelStore(root, mode="rw", **s3).ensure(f"{uri}/{name}", progress=False)

    assert read_tree(model.path) == {"x": b"x"}


def test_what_a_server_lists_outside_the_prefix_is_no_part_of_the_model(backend, upload):
    """
    A listing that answers another prefix than was asked for, as this server does after `//`, brings no file under a
    foreign name.
    """
    _, key = bucket_and_key(upload({"x": b"x"}))

    try:
        found = names(backend, f"s3://{BUCKET}//{key}")
    except (SourceNotFoundError, SourceUnavailableError):
        found = []

    assert found in ([], ["x"])


@pytest.mark.parametrize(("uri", "word"), [("s3://", "names no bucket"), ("s3:///key", "names no bucket")])
def test_a_uri_without_a_bucket_is_refused(backend, uri, word):
    """
    The error says what a URI looks like.
    """
    with pytest.raises(InvalidURIError, match=word):
        backend.resolve(parse_ref(uri))


@pytest.mark.parametrize(("start", "stop"), [(0, 700_000), (0, 1), (699_999, 700_000), (1000, 250_000)])
def test_a_range_is_exactly_what_was_asked_for(backend, upload, start, stop):
    """
    A range starts and stops where it should, whatever the size of the buffer.
    """
    uri = upload(FILES)
    (file,) = backend.resolve(parse_ref(f"{uri}/weights/a.bin")).files

    pieces = {read(backend, file, start, stop, size) for size in (stop - start, 65_537)}

    assert pieces == {FILES["weights/a.bin"][start:stop]}


def test_a_file_is_read_in_parts(root, s3, proxy, upload):
    """
    Every byte of an object is asked for once, in ranges of at most a part that follow each other.
    """
    uri = upload(FILES)

    ModelStore(root, mode="rw", part_bytes=PART_BYTES, **s3).ensure(uri, progress=False)

    asked = [r.range for r in proxy.requests if r.method == "GET" and r.path.endswith("a.bin")]
    assert sorted(asked) == sorted(
        f"bytes={start}-{min(start + PART_BYTES, 700_000) - 1}" for start in range(0, 700_000, PART_BYTES)
    )
    assert proxy.body_bytes() == sum(map(len, FILES.values()))


def interfered(root, s3, **events) -> ModelStore:
    """
    A store whose S3 back end is interfered with.
    """
    inner = S3Backend(s3["storage_options"])
    return ModelStore(root, mode="rw", backends={"s3": Interfering(inner, **events).factory}, part_bytes=PART_BYTES)


@pytest.mark.parametrize("moment", ["after the listing", "between two parts"])
@pytest.mark.parametrize("change", ["replaced", "deleted"])
def test_an_object_that_changes_is_never_mixed(root, s3, origin, client, upload, moment, change):
    """
    An object that is replaced or deleted during a download fails it, nothing is present, and the next one is exact.
    """
    uri = upload(FILES)
    bucket, key = bucket_and_key(f"{uri}/weights/a.bin")
    newer = random.Random(1).randbytes(len(FILES["weights/a.bin"]))

    def act():
        if change == "replaced":
            origin.put(bucket, key, newer)
        else:
            client.delete_object(Bucket=bucket, Key=key)

    events = (
        {"after_resolve": act}
        if moment == "after the listing"
        else {"before_range": lambda number, file: number == 2 and act()}
    )
    store = interfered(root, s3, **events)

    with pytest.raises(SourceChangedError, match="retry once the upload is complete") as caught:
        store.ensure(uri, progress=False, max_workers=1)

    assert caught.value.path == "weights/a.bin"
    assert uri not in store
    expected = (
        {**FILES, "weights/a.bin": newer}
        if change == "replaced"
        else {k: v for k, v in FILES.items() if k != "weights/a.bin"}
    )
    assert read_tree(ModelStore(root, mode="rw", **s3).ensure(uri, progress=False).path) == expected


@pytest.fixture(scope="session")
def versions(origin, client):
    """
    Two versions of one object in a bucket that keeps versions, as their bytes and ids, and the URI.
    """
    origin.make_bucket("versioned")
    client.put_bucket_versioning(Bucket="versioned", VersioningConfiguration={"Status": "Enabled"})
    put = [
        (data, client.put_object(Bucket="versioned", Key="m/weights.bin", Body=data)["VersionId"])
        for data in (b"first", b"second!")
    ]
    return "s3://versioned/m/weights.bin", put


def test_a_version_id_is_a_revision(root, s3, versions):
    """
    Each VersionId gives the bytes it had, as a model of its own, and without one the newest.
    """
    uri, ((first, first_id), (second, second_id)) = versions
    store = ModelStore(root, mode="rw", **s3)

    models = [store.ensure(uri, revision=revision, progress=False) for revision in (first_id, second_id, None)]

    assert [read_tree(model.path) for model in models] == [{"weights.bin": data} for data in (first, second, second)]
    assert [model.record.files[0].token for model in models] == [first_id, second_id, second_id]
    assert len({model.key for model in models}) == 3


def test_a_version_id_pins_against_replacement(root, s3, client, versions):
    """
    An object that is replaced during a download is still read as it was listed if the URI names its version; without
    one it has changed, as reading an older version takes another right.
    """
    _, ((_, _), (second, _)) = versions
    put = client.put_object(Bucket="versioned", Key="pinned/weights.bin", Body=second)
    replace = lambda: client.put_object(Bucket="versioned", Key="pinned/weights.bin", Body=b"third")  # noqa: E731

    store = interfered(root, s3, after_resolve=replace)
    with pytest.raises(SourceChangedError):
        store.ensure("s3://versioned/pinned/weights.bin", progress=False)
    model = store.ensure("s3://versioned/pinned/weights.bin", revision=put["VersionId"], progress=False)

    assert read_tree(model.path) == {"weights.bin": second}


@pytest.mark.parametrize("path", ["m/weights.bin", "m", "", "none"])
def test_a_revision_that_is_no_version_is_not_found(root, s3, versions, path):
    """
    An unknown VersionId, and a VersionId of a directory, are told what a revision is; nothing is published.
    """
    with pytest.raises(SourceNotFoundError, match="VersionId of one object"):
        ModelStore(root, mode="rw", **s3).ensure(f"s3://versioned/{path}", revision="no-such-version", progress=False)

    assert not (root / "models").exists()


def through(proxy: CountingProxy, origin: SeaweedS3) -> dict[str, object]:
    return {"storage_options": {"endpoint_url": proxy.endpoint, "key": origin.key, "secret": origin.secret}}


def test_a_connection_that_is_cut_goes_on_where_it_was(root, origin, upload):
    """
    After each of three cuts only the rest is asked for: nothing that was written is sent twice.
    """
    data = random.Random(2).randbytes(8_000_000)
    uri = upload({"weights.bin": data})
    retried = []
    with TamperingProxy(origin.endpoint, cuts=(3_000_000, 1_500_000, 2_000_000)) as proxy:
        store = ModelStore(root, mode="rw", **through(proxy, origin))
        model = store.ensure(uri, progress=False, max_workers=1)
        retried = [int(r.range.removeprefix("bytes=").partition("-")[0]) for r in proxy.requests if r.range]
        sent = proxy.body_bytes()

    assert read_tree(model.path) == {"weights.bin": data}
    assert (retried[0], len(retried), retried == sorted(set(retried))) == (3_000_000, 3, True)
    # What was on its way into the buffer of 1 MiB when a connection was cut is lost, and what the client had not read
    # yet.
    assert sent - len(data) <= 3 * (1024 + 256) * 1024
    assert model.bytes_fetched == len(data)


def test_a_source_that_cuts_every_connection_is_given_up(root, origin, upload):
    """
    When no byte arrives any more the download ends with the reason, and what had arrived is kept for the next one.
    """
    data = random.Random(3).randbytes(3_000_000)
    uri = upload({"weights.bin": data})
    with TamperingProxy(origin.endpoint, cuts=(1_500_000, *[0] * 50)) as proxy:
        store = ModelStore(root, mode="rw", part_bytes=1_000_000, **through(proxy, origin))
        with pytest.raises(SourceUnavailableError, match="check the endpoint and the network, then retry"):
            store.ensure(uri, progress=False, max_workers=1)
        proxy.cuts.clear()
        model = store.ensure(uri, progress=False)

    assert read_tree(model.path) == {"weights.bin": data}
    assert 0 < model.bytes_fetched <= len(data) - 1_000_000


def other_range(asked: str, answer: bytes) -> bytes:
    return answer.replace(b"Content-Range: bytes 0-", b"Content-Range: bytes 1-")


def no_range(asked: str, answer: bytes) -> bytes:
    if b"206 Partial" not in answer:
        return answer
    lines = answer.replace(b"206 Partial Content", b"200 OK").split(b"\r\n")
    return b"\r\n".join(line for line in lines if not line.lower().startswith(b"content-range"))


def other_length(asked: str, answer: bytes) -> bytes:
    return answer.replace(b"/700000\r\n", b"/700001\r\n")


@pytest.mark.parametrize("rewrite", [other_range, no_range, other_length], ids=lambda rewrite: rewrite.__name__)
def test_an_answer_for_another_range_is_refused(root, origin, upload, rewrite):
    """
    A server that ignores a range, moves it, or speaks of another length is believed nothing.
    """
    uri = upload(FILES)
    with TamperingProxy(origin.endpoint, rewrite=rewrite) as proxy:
        backend = S3Backend(through(proxy, origin)["storage_options"])
        (file,) = backend.resolve(parse_ref(f"{uri}/weights/a.bin")).files
        with pytest.raises(SourceUnavailableError, match="requested `bytes 0-349999/700000`, received"):
            read(backend, file, 0, 350_000)


def test_a_busy_server_is_asked_again(root, origin, upload):
    """
    A server that answers 503 a few times slows a download down and does not end it.
    """
    uri = upload(FILES)
    busy = Counter()

    def refuse(asked: str, answer: bytes) -> bytes:
        busy[asked] += 1
        if "a.bin" not in asked or busy[asked] > 2:
            return answer
        return answer.replace(b"200 OK", b"503 Slow Down")

    with TamperingProxy(origin.endpoint, rewrite=refuse) as proxy:
        model = ModelStore(root, mode="rw", **through(proxy, origin)).ensure(uri, progress=False)

    assert read_tree(model.path) == FILES
    assert max(busy.values()) > 2


@pytest.mark.parametrize("status", [429, 500, 503, 504])
def test_a_busy_server_says_how_long_it_wants_to_be_left_alone(origin, upload, status):
    """
    `Retry-After` is in the error, whatever the status, and a wait that is longer than a call may take is not begun.
    """
    uri, began = upload(FILES), time.monotonic()
    busy = b"%d Busy\r\nRetry-After: 777" % status
    proxied = TamperingProxy(origin.endpoint, rewrite=lambda asked, answer: answer.replace(b"200 OK", busy))
    with proxied as proxy, pytest.raises(SourceUnavailableError) as caught:
        S3Backend(through(proxy, origin)["storage_options"]).resolve(parse_ref(uri))

    assert caught.value.retry_after == 777
    assert time.monotonic() - began < 60


def test_an_identity_that_may_only_read_is_enough(root, proxy, upload):
    """
    Reading and listing are all the rights that a download needs.
    """
    options = {"endpoint_url": proxy.endpoint, "key": "rokey", "secret": "rosecret"}

    model = ModelStore(root, mode="rw", storage_options=options).ensure(upload(FILES), progress=False)

    assert read_tree(model.path) == FILES
    assert {r.method for r in proxy.requests} == {"GET", "HEAD"}


@pytest.mark.parametrize("path", ["", "/config.json", "/none"])
def test_an_identity_without_rights_is_denied(root, proxy, upload, path):
    """
    Directory, object and what is absent are all denied, so that nothing is learnt from the difference.
    """
    options = {"endpoint_url": proxy.endpoint, "key": "nokey", "secret": "nosecret"}

    with pytest.raises(SourceDeniedError, match="check the credentials"):
        ModelStore(root, mode="rw", storage_options=options).ensure(upload(FILES) + path, progress=False)

    assert proxy.body_bytes() == 0


MEMORY = """
import sys
from kserve_pvc import ModelStore

root, uri = sys.argv[1:]
print(ModelStore(root, mode="rw").ensure(uri, progress=False).size_bytes, peak_mib())
"""


def test_memory_does_not_grow_with_the_model(root, origin, upload, tmp_path):
    """
    A download of 300 MiB in one object takes at most 128 MiB more than a bare interpreter.
    """
    shard = tmp_path / "shard"
    with shard.open("wb") as file:
        file.truncate(300 * 2**20)
    bucket, key = bucket_and_key(upload({}))
    origin.put(bucket, f"{key}/shard.bin", shard)

    said = shell.python(shell.PEAK_MIB + MEMORY, str(root), f"s3://{bucket}/{key}", env=origin.environ)

    size, peak = map(int, said.split())
    bare = int(shell.python(shell.PEAK_MIB + "print(peak_mib())"))
    assert (size, 0 < peak - bare <= 128) == (300 * 2**20, True)
