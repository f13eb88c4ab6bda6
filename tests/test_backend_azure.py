"""
Models in containers, on Microsoft's emulator of Blob Storage.
"""

import base64
import hashlib
import json
import logging
import os
import random
import re
import socket
import time
import traceback
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qs

import pytest
import shell
from azurite import ACCOUNT, CONTAINER, KEY, OTHER_KEY, Azurite, MissingError
from origin import CountingProxy
from sources import Interfering
from tampering import TamperingProxy
from trees import digests, model_files, read_tree
from weather import Authority

from kserve_pvc import (
    DigestMismatchError,
    InvalidURIError,
    ModelStore,
    SettingsError,
    SourceChangedError,
    SourceDeniedError,
    SourceNotFoundError,
    SourceUnavailableError,
    StoreError,
    UnsafePathError,
)
from kserve_pvc._source.ref import ModelRef, parse_ref
from kserve_pvc.backends import azure
from kserve_pvc.backends._azure_xml import make_object, parse_listing, parse_properties, read_error
from kserve_pvc.backends._login import azure as _azure_login
from kserve_pvc.backends._login.azure import Account, AccountKey, Signature, Token, find_account, find_endpoint
from kserve_pvc.backends._login.contract import Anonymous, Scope
from kserve_pvc.backends._object_store import Place
from kserve_pvc.backends._ranges import RefusedError
from kserve_pvc.backends.azure import AzureBackend

pytest.importorskip("azure.storage.blob", reason="`azure-storage-blob` is not installed")

PART_BYTES = 100_000
FILES = model_files(seed=31)
SCHEMES = ("az", "abfs", "abfss", "https")


@pytest.fixture(scope="session")
def azurite():
    """
    A real blob service, once for all tests of this file.
    """
    try:
        with Azurite() as server:
            yield server
    except MissingError as missing:
        pytest.skip(str(missing))


@pytest.fixture
def here(request):
    """
    A prefix that belongs to the test.
    """
    return hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:12]


@pytest.fixture
def put(azurite, here):
    """
    Put files below a prefix that belongs to the test, and return its URI.
    """

    def do(files):
        for name, data in files.items():
            azurite.put(f"{here}/model/{name}", data)
        return azurite.uri(f"{here}/model")

    return do


@pytest.fixture
def clean_environ(monkeypatch):
    """
    An environment that says nothing about Azure.
    """
    for name in [name for name in os.environ if name.startswith(("AZURE_", "AZ_"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def backend(azurite):
    """
    The back end by itself, with the key of the account.
    """
    return AzureBackend(azurite.storage_options)


def serve(backend) -> dict:
    """
    One back end for all schemes.
    """
    return {"backends": dict.fromkeys(SCHEMES, lambda options: backend)}


def store_of(root, options, **more) -> ModelStore:
    return ModelStore(root, mode="rw", **{**serve(AzureBackend(options, {})), **more})


def names(backend, uri, **wish) -> list[str]:
    return [str(file.entry.path) for file in backend.resolve(parse_ref(uri, **wish)).files]


def signed(uri: str, signature: str) -> ModelRef:
    """
    A URI that brought its signature.
    """
    return ModelRef(uri=uri, query=signature)


def at_account(path: str) -> str:
    """
    The address of something in the container as KServe spells it.
    """
    return f"https://{ACCOUNT}.blob.core.windows.net/{CONTAINER}/{path}"


def read(backend, file, start: int, stop: int, buffer_bytes: int = 65_536) -> bytes:
    """
    Read a range to its end through a buffer.
    """
    buffer, data = memoryview(bytearray(buffer_bytes)), b""
    with backend.open_range(file, start, stop) as reader:
        while len(data) < stop - start and (count := reader.readinto(buffer[: stop - start - len(data)])) != 0:
            data += bytes(buffer[: count or 0])
    return data


def test_a_listing_pins_every_blob(backend, put, here):
    """
    Each blob is there with path, size, MD5, its ETag as token, and the condition that a later read must meet.
    """
    found = backend.resolve(parse_ref(put(FILES))).files

    md5s = {name: hashlib.md5(data, usedforsecurity=False).hexdigest() for name, data in FILES.items()}
    assert [(str(f.entry.path), f.entry.size_bytes, f.digest, f.entry.sha256) for f in found] == [
        (name, len(FILES[name]), f"md5:{md5s[name]}", None) for name in sorted(FILES)
    ]
    assert [dict(f.pin) for f in found] == [{"If-Match": f'"{f.entry.token}"'} for f in found]
    assert len({f.entry.token for f in found} - {None, ""}) == len(FILES)
    assert [f.address for f in found] == [
        f"{ACCOUNT}.blob.core.windows.net/{CONTAINER}/{here}/model/{f.entry.path}" for f in found
    ]


@pytest.mark.parametrize(
    "form", ["az://{c}/{p}", "abfs://{c}/{p}", "abfss://{c}@{a}.dfs.core.windows.net/{p}", at_account("{p}")]
)
def test_a_download_is_exact_whatever_the_form_of_the_uri(root, azurite, put, here, form):
    """
    Every form of the URI brings every byte, with its SHA-256 and the MD5 that it was compared with, into a model that
    verifies.
    """
    put(FILES)
    uri = form.format(c=CONTAINER, a=ACCOUNT, p=f"{here}/model")
    store = store_of(root, azurite.storage_options)

    model = store.ensure(uri, progress=False)

    assert read_tree(model.path) == FILES
    assert {str(f.path): f.sha256 for f in model.record.files} == digests(FILES)
    assert {f.evidence for f in model.record.files} == {
        f"md5:{hashlib.md5(data).hexdigest()}" for data in FILES.values()
    }
    assert store.verify(uri, level="full").ok


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_prefix_never_brings_its_siblings(backend, azurite, put, here, slash):
    """
    What begins with the same letters, beside the directory, is not part of the model.
    """
    uri = put(FILES)
    for sibling in ("model-v2/config.json", "model.json", "model2", "mode/x"):
        azurite.put(f"{here}/{sibling}", b"sibling")

    assert names(backend, uri + slash) == sorted(FILES)


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_container_is_a_model(root, azurite, slash):
    """
    A URI without a path means all of the container.
    """
    whole = f"whole{len(slash)}"
    azurite.make_container(whole)
    for name, data in FILES.items():
        azurite.put(name, data, container=whole)

    model = store_of(root, azurite.storage_options).ensure(f"az://{whole}{slash}", progress=False)

    assert read_tree(model.path) == FILES


def test_a_read_names_what_was_listed(backend, azurite, put, here):
    """
    A request for a blob carries the condition on its ETag and a signature, goes to the endpoint, and its version is
    always said.
    """
    (file,) = backend.resolve(parse_ref(f"{put({'a b': b'x'})}/a b")).files

    target, headers = backend.request(file, renewed=False)

    path, _, query = target.path.partition("?")
    assert (f"{target.scheme}://{target.authority}", path) == (
        azurite.endpoint,
        f"/{ACCOUNT}/{CONTAINER}/{here}/model/a%20b",
    )
    assert dict(headers) == {"If-Match": f'"{file.entry.token}"', "x-ms-version": "2021-02-12"}
    assert {"se", "sig", "sp", "sr", "sv"} == set(parse_qs(query))


def test_a_single_blob_is_a_directory_with_that_file(root, azurite, put):
    """
    The URI of one blob gives a directory that holds it under the last part of its name.
    """
    model = store_of(root, azurite.storage_options).ensure(f"{put(FILES)}/weights/a.bin", progress=False)

    assert read_tree(model.path) == {"a.bin": FILES["weights/a.bin"]}


def test_a_blob_wins_over_a_prefix_of_its_name(backend, put):
    """
    Where a blob and a prefix share a name the URI means the blob, and with a slash the prefix.
    """
    uri = put({"twin": b"blob", "twin/inside": b"below"})

    assert (names(backend, f"{uri}/twin"), names(backend, f"{uri}/twin/")) == (["twin"], ["inside"])


def test_empty_blobs_are_files_and_placeholders_are_not(root, azurite, put, here):
    """
    A blob of no bytes is kept, one that stands for a directory is left out: by its slash, or by what tools write into
    its metadata.
    """
    uri = put({"": b"", "empty": b"", "sub/": b"", "sub/also-empty": b"", "a": b"a"})
    for directory, word in (("", "true"), ("/sub", "True"), ("/marked", "true")):
        azurite.put(f"{here}/model{directory}", b"", headers={"x-ms-meta-hdi_isfolder": word})
    azurite.put(f"{here}/model/marked/b", b"b")

    model = store_of(root, azurite.storage_options).ensure(uri, progress=False)

    assert read_tree(model.path) == {"empty": b"", "sub/also-empty": b"", "a": b"a", "marked/b": b"b"}


@pytest.mark.parametrize("files", [{"": b"", "sub/": b""}, {}], ids=["placeholders", "nothing"])
def test_a_prefix_without_files_is_not_found(root, azurite, put, files):
    """
    A directory of nothing, or of nothing but directories, is no model, and nothing is published.
    """
    uri = put(files)

    with pytest.raises(SourceNotFoundError, match="it has no files"):
        store_of(root, azurite.storage_options).ensure(uri, progress=False)

    assert not (root / "models").exists()


@pytest.mark.parametrize("path", ["", "m", "m/"])
def test_a_container_that_is_not_there_is_not_found(root, azurite, path):
    """
    The error says that it is the container.
    """
    with pytest.raises(SourceNotFoundError, match="ContainerNotFound"):
        store_of(root, azurite.storage_options).ensure(f"az://no-such-container/{path}", progress=False)


@pytest.fixture
def counted(azurite):
    """
    What stands between the store and the blob service, and counts.
    """
    with CountingProxy(azurite.endpoint) as proxy:
        yield proxy


def test_a_listing_of_several_pages_is_whole(azurite, counted, put, monkeypatch):
    """
    A model of more blobs than one answer holds is complete, and is listed page by page.
    """
    monkeypatch.setattr(azure, "_PAGE_BLOBS", 3)
    files = {f"{number:02d}/{name}": b"x" * number for number in range(1, 6) for name in "ab"}
    uri = put(files)
    backend = AzureBackend(azurite.options(counted.endpoint))

    pages = [[str(f.entry.path) for f in page] for page in backend.pages(parse_ref(uri))]

    assert [name for page in pages for name in page] == sorted(files)
    assert [len(page) for page in pages] == [3, 3, 3, 1]
    assert [(r.method, r.path.count("/")) for r in counted.requests] == [("HEAD", 4)] + [("GET", 2)] * 4


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
    '<&>"',
]


def test_odd_names_arrive_unchanged(root, azurite, put):
    """
    Blanks, plus and percent signs, leading dots and Unicode are kept as they are, in listings and in requests.
    """
    files = {name: name.encode() for name in ODD}

    model = store_of(root, azurite.storage_options).ensure(put(files), progress=False)

    assert read_tree(model.path) == files


@pytest.mark.parametrize("name", ["a b+c%25", "caf\u00e9"], ids=ascii)
def test_a_uri_is_taken_as_it_is_spelled(backend, put, name):
    """
    Nothing in a URI is decoded: a blank is a blank and a percent sign a percent sign.
    """
    assert names(backend, f"{put({f'{name}/x': b'x'})}/{name}") == ["x"]


def test_slashes_too_many_in_keys_make_no_other_names(root, azurite, put):
    """
    A key that ends in a slash is a directory whatever it holds, and the empty parts of a key are no directories.
    """
    uri = put({"": b"x", "sub/": b"y", "sub//w.bin": b"w", "a": b"a"})
    store = store_of(root, azurite.storage_options)

    model = store.ensure(uri, progress=False)

    assert read_tree(model.path) == {"sub/w.bin": b"w", "a": b"a"}
    assert read_tree(store.ensure(uri, ignore_patterns="sub//*", progress=False).path) == {"a": b"a"}


def test_a_slash_too_many_in_a_uri_is_named(root, azurite, put):
    """
    Nothing is found, and the error says that the slash is a part of the key.
    """
    uri = put({"a": b"a"})
    scheme, _, rest = uri.partition("://")
    bucket, _, path = rest.partition("/")

    for wrong, words in ((f"{bucket}//{path}", "begins with a slash"), (f"{bucket}/{path}//a", "two slashes")):
        with pytest.raises(SourceNotFoundError, match=words):
            store_of(root, azurite.storage_options).ensure(f"{scheme}://{wrong}", progress=False)


@pytest.mark.parametrize("name", ["x\u200b", "end.", "C:/x", "bell\u0007"], ids=ascii)
def test_a_name_that_cannot_be_a_file_is_refused(root, azurite, put, name):
    """
    A blob whose name is no path inside the model refuses the model, and nothing is published.
    """
    uri = put({"good": b"good", name: b"bad"})

    with pytest.raises((UnsafePathError, SourceUnavailableError)):
        store_of(root, azurite.storage_options).ensure(uri, progress=False)

    assert not (root / "models").exists()


@pytest.mark.parametrize(
    "name",
    [
        "../up",
        "a/../../up",
        "./x",
        "a/.",
        "x\u202etxt",
        "new\nline",
        "end ",
        "a\\..\\b",
        "..%2fup",
    ],
    ids=ascii,
)
def test_a_listing_with_a_hostile_name_is_refused(name):
    """
    Whatever names a server lists, none leaves the model's directory; a quoted slash stays a percent sign.
    """
    backend = AzureBackend({"account_name": ACCOUNT}, {})
    backend.service.page = lambda *_: parse_listing(listing(blob_xml(f"m/{name}")))

    try:
        found = [str(f.entry.path) for page in backend.pages(parse_ref("az://models/m/")) for f in page]
    except UnsafePathError:
        found = []

    assert found == (["..%2fup"] if name == "..%2fup" else [])


def blob_xml(name: str, *, size: str = "1", etag: str = "0x1", more: str = "", attributes: str = "") -> str:
    spelled = name.replace("&", "&amp;").replace("<", "&lt;")
    properties = f"<Etag>{etag}</Etag><Content-Length>{size}</Content-Length>{more}"
    return f"<Blob><Name{attributes}>{spelled}</Name><Properties>{properties}</Properties><OrMetadata/></Blob>"


def listing(blobs: str, *, before: str = "", marker: str = "<NextMarker/>") -> bytes:
    inside = f'<EnumerationResults ContainerName="models"><Blobs>{blobs}</Blobs>{marker}</EnumerationResults>'
    return f'\ufeff<?xml version="1.0" encoding="utf-8"?>{before}{inside}'.encode()


def test_a_listing_is_read_as_azure_writes_it():
    """
    With a byte order mark, names that XML cannot hold, kinds of entries, MD5 of some, and the mark of the next page.
    """
    md5 = "<Content-MD5>CY9rzUYh03PK3k6DJie09g==</Content-MD5>"
    body = listing(
        blob_xml("m/a", more=md5)
        + blob_xml("m/%EF%BF%BF&", attributes=' Encoded="true"')
        + blob_xml("m/%41")
        + blob_xml("m/d", size="0", more="<ResourceType>directory</ResourceType>"),
        marker="<NextMarker>2!4!=</NextMarker>",
    )

    blobs, marker = parse_listing(body)

    assert [(b.name, b.size_bytes, b.token, b.is_directory) for b in blobs] == [
        ("m/a", 1, "0x1", False),
        ("m/\uffff&", 1, "0x1", False),
        ("m/%41", 1, "0x1", False),
        ("m/d", 0, "0x1", True),
    ]
    assert [b.digest for b in blobs] == ["md5:098f6bcd4621d373cade4e832627b4f6", None, None, None]
    assert marker == "2!4!="


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>sign in</html>",
        b'{"blobs": []}',
        listing("", before='<!DOCTYPE x [<!ENTITY a "a">]>'),
        listing("", before='<!DOCTYPE x [<!ENTITY a "a">]>').decode("utf-8-sig").encode("utf-16"),
        listing(blob_xml("m/a"))[:-20],
        listing(blob_xml("m/a", size="-1")),
        listing(blob_xml("m/a", size="9" * 40)),
        listing(blob_xml("m/a", size="\u0661")),
        listing(blob_xml("m/a", etag="")),
        listing("<Blob><Properties/></Blob>"),
        listing("<Blob><Name>m/a</Name></Blob>"),
    ],
)
def test_what_is_no_listing_is_refused(body):
    """
    An answer that is no list of blobs, is cut short, or has a document type, is believed nothing.
    """
    with pytest.raises(RefusedError, match="is this an Azure Blob Storage endpoint"):
        parse_listing(body)


@pytest.mark.parametrize("text", ["", "x", "AAAA", "CY9rzUYh03PK3k6DJie09g", "CY9rzUYh03PK3k6DJie09g==\n"])
def test_what_is_no_md5_is_no_evidence(text):
    """
    A Content-MD5 that is not 16 bytes in base64 is left alone.
    """
    found = parse_properties("m/a", {"content-length": "1", "etag": '"0x1"', "content-md5": text}, None)

    assert found.digest is None


@pytest.mark.parametrize(
    ("uri", "word"),
    [
        ("az:///path", "no container"),
        ("az://no_container/path", "no container"),
        (at_account("")[: -len(f"/{CONTAINER}/")], "no container"),
        ("https://example.com/models/m", "is not a storage account"),
        ("abfss://models@x.dfs.core.windows.net/m", "is not a storage account"),
    ],
)
def test_a_uri_that_names_no_container_is_refused(azurite, uri, word):
    """
    The error says what a URI looks like, and nothing is asked.
    """
    with pytest.raises(InvalidURIError, match=word):
        AzureBackend(azurite.storage_options).resolve(ModelRef(uri=uri))


@pytest.mark.parametrize("path", ["../other/x", "a/../b", "a/./b", ".."])
def test_a_path_that_climbs_is_refused(backend, path):
    """
    Servers resolve `..` in different ways, so it is not sent.
    """
    with pytest.raises(UnsafePathError, match="may not contain"):
        backend.resolve(parse_ref(f"az://models/{path}"))


def test_without_an_account_a_short_uri_means_nothing():
    """
    `az://container/path` needs to be told the account.
    """
    with pytest.raises(InvalidURIError, match="set AZURE_STORAGE_ACCOUNT_NAME"):
        AzureBackend({}, {}).resolve(parse_ref("az://models/m"))


@pytest.mark.parametrize(("start", "stop"), [(0, 700_000), (0, 1), (699_999, 700_000), (1000, 250_000)])
def test_a_range_is_exactly_what_was_asked_for(backend, put, start, stop):
    """
    A range starts and stops where it should, whatever the size of the buffer.
    """
    (file,) = backend.resolve(parse_ref(f"{put(FILES)}/weights/a.bin")).files

    pieces = {read(backend, file, start, stop, size) for size in (stop - start, 65_537)}

    assert pieces == {FILES["weights/a.bin"][start:stop]}


def test_a_large_blob_is_read_in_parts(root, azurite, counted, here):
    """
    Every byte of a blob of 20 MiB is asked for once, in ranges that follow each other, and one without an MD5 has no
    evidence.
    """
    data = random.Random(5).randbytes(20 * 2**20)
    azurite.put_blocks(f"{here}/model/weights.bin", [data[: 7 * 2**20], data[7 * 2**20 :]])
    store = store_of(root, azurite.options(counted.endpoint), part_bytes=3_000_000)

    model = store.ensure(azurite.uri(f"{here}/model"), progress=False)

    assert read_tree(model.path) == {"weights.bin": data}
    asked = sorted(tuple(map(int, re.findall(r"\d+", r.range))) for r in counted.requests if r.range)
    assert [first for first, _ in asked] == [0, *(last + 1 for _, last in asked[:-1])]
    assert (asked[-1][1], len(asked) > 5) == (len(data) - 1, True)
    assert model.record.files[0].evidence is None


def test_an_md5_of_a_large_blob_is_not_compared(backend, azurite, here):
    """
    Above 16 MiB an MD5 would cost more than it proves.
    """
    azurite.put(f"{here}/large", bytes(16 * 2**20 + 1))

    (file,) = backend.resolve(parse_ref(azurite.uri(f"{here}/large"))).files

    assert (file.entry.size_bytes, file.digest) == (16 * 2**20 + 1, None)


def test_a_wrong_md5_is_told_and_can_be_switched_off(root, azurite, here):
    """
    What whoever uploaded a blob claimed as its MD5 is compared, unless the store is told not to.
    """
    claimed = base64.b64encode(hashlib.md5(b"other").digest()).decode()
    azurite.put_blocks(f"{here}/model/weights.bin", [b"these"], headers={"x-ms-blob-content-md5": claimed})
    uri = azurite.uri(f"{here}/model")

    with pytest.raises(DigestMismatchError):
        store_of(root, azurite.storage_options).ensure(uri, progress=False)

    model = store_of(root, {**azurite.storage_options, "check_md5": False}).ensure(uri, progress=False)
    assert read_tree(model.path) == {"weights.bin": b"these"}


@pytest.mark.parametrize("moment", ["after the listing", "between two parts"])
@pytest.mark.parametrize("change", ["replaced", "deleted"])
def test_a_blob_that_changes_is_never_mixed(root, azurite, put, here, moment, change):
    """
    A blob that is replaced or deleted during a download fails it, nothing is present, and the next one is exact.
    """
    uri, blob = put(FILES), f"{here}/model/weights/a.bin"
    newer = random.Random(1).randbytes(len(FILES["weights/a.bin"]))

    def act():
        if change == "replaced":
            azurite.put(blob, newer)
        else:
            azurite.delete(blob)

    events = (
        {"after_resolve": act}
        if moment == "after the listing"
        else {"before_range": lambda number, file: number == 2 and act()}
    )
    interfering = Interfering(AzureBackend(azurite.storage_options), **events)

    with pytest.raises(SourceChangedError, match="retry once the upload is complete") as caught:
        ModelStore(root, mode="rw", part_bytes=PART_BYTES, **serve(interfering)).ensure(
            uri, progress=False, max_workers=1
        )

    assert caught.value.path == "weights/a.bin"
    expected = (
        {**FILES, "weights/a.bin": newer}
        if change == "replaced"
        else {k: v for k, v in FILES.items() if k != "weights/a.bin"}
    )
    assert read_tree(store_of(root, azurite.storage_options).ensure(uri, progress=False).path) == expected


def naming_versions(asked: str, answer: bytes) -> bytes:
    """
    A service that keeps versions, which the emulator does not: it says which one it answers with.
    """
    found = re.search(r"[?&]versionid=([^& ]+)", asked)
    return answer.replace(b"\r\n\r\n", f"\r\nx-ms-version-id: {found[1]}\r\n\r\n".encode()) if found else answer


def test_a_version_id_is_a_revision(root, azurite, put):
    """
    A version is asked for by its id, each time, and its id is the token of the file.
    """
    uri = put(FILES)
    asked = []

    def rewrite(line: str, answer: bytes) -> bytes:
        asked.append(line.partition(" HTTP")[0])
        return naming_versions(line, answer)

    with TamperingProxy(azurite.endpoint, rewrite=rewrite) as proxy:
        store = store_of(root, azurite.options(proxy.endpoint))
        model = store.ensure(f"{uri}/config.json", revision="2026-11-22T12-00-00.1234567Z", progress=False)

    assert read_tree(model.path) == {"config.json": FILES["config.json"]}
    assert [f.token for f in model.record.files] == ["2026-11-22T12-00-00.1234567Z"]
    assert [(line.split()[0], "versionid=2026-11-22T12-00-00.1234567Z&" in line) for line in asked] == [
        ("HEAD", True),
        ("GET", True),
    ]


@pytest.mark.parametrize("path", ["config.json", "weights", "none"])
def test_a_version_that_nobody_names_is_not_found(root, azurite, put, path):
    """
    A service that ignores the version, a version of a directory, and one of nothing: told what a revision is, nothing
    published.
    """
    with pytest.raises(SourceNotFoundError, match="version id of one blob"):
        store_of(root, azurite.storage_options).ensure(
            f"{put(FILES)}/{path}", revision="2026-11-22T12:00:00.1Z", progress=False
        )

    assert not (root / "models").exists()


@pytest.mark.parametrize("path", ["", "/config.json", "/none"])
def test_a_wrong_key_is_denied(root, azurite, put, path):
    """
    Directory, blob and what is absent are all denied, so that nothing is learnt from the difference.
    """
    with pytest.raises(SourceDeniedError, match="check the credentials"):
        store_of(root, azurite.denied_options).ensure(put(FILES) + path, progress=False)

    assert not (root / "models").exists()


def test_a_service_that_is_not_there_is_unavailable(root, azurite):
    """
    The error says what could not be reached.
    """
    store = store_of(root, azurite.unreachable_options, retry_seconds=0.1)

    with pytest.raises(SourceUnavailableError, match=r"no connection to http://127\.0\.0\.1:"):
        store.ensure("az://models/m", progress=False)


@pytest.mark.parametrize("way", ["option", "environment", "connection string", "credential"])
def test_a_signature_is_enough(root, azurite, put, way):
    """
    A signature of the container, wherever it is given, lists and reads.
    """
    signature, uri = azurite.signature(), put(FILES)
    place = f"BlobEndpoint={azurite.endpoint}/{ACCOUNT}"
    options, environ = {
        "option": ({"sas_token": f"?{signature}"}, {}),
        "environment": ({}, {"AZURE_STORAGE_SAS_TOKEN": signature}),
        "connection string": ({"connection_string": f"{place};SharedAccessSignature={signature}"}, {}),
        "credential": ({"credential": signature}, {}),
    }[way]
    backend = AzureBackend({"account_name": ACCOUNT, **options}, environ)
    endpoint = find_endpoint("x", f"{azurite.endpoint}/{ACCOUNT}")
    backend.service.account = Account(ACCOUNT, endpoint, backend.service.account.login)

    model = ModelStore(root, mode="rw", **serve(backend)).ensure(uri, progress=False)

    assert read_tree(model.path) == FILES


def test_a_uri_brings_its_own_signature(azurite, put, here):
    """
    The query of a URI counts for what is below it, and for nothing else.
    """
    put(FILES)
    backend = AzureBackend(azurite.denied_options)

    found = backend.resolve(signed(at_account(f"{here}/model"), azurite.signature())).files

    assert {str(f.entry.path): read(backend, f, 0, f.entry.size_bytes) for f in found if f.entry.size_bytes} == {
        name: data for name, data in FILES.items() if data
    }
    with pytest.raises(SourceDeniedError):
        backend.resolve(parse_ref(at_account(here)))
    with pytest.raises(SourceDeniedError):
        backend.resolve(parse_ref(at_account(f"{here}/model-2")))
    with pytest.raises(SourceDeniedError):
        backend.resolve(parse_ref(at_account(f"{here}/model")))


def test_a_store_takes_the_signature_off_the_uri(root, azurite, put, here):
    """
    A URI as KServe has it, signature and all, is fetched, and found again without its signature.
    """
    put(FILES)
    uri, signature = at_account(f"{here}/model"), azurite.signature()
    store = store_of(root, azurite.denied_options)

    model = store.ensure(f"{uri}?{signature}", progress=False)

    assert read_tree(model.path) == FILES
    assert (model.uri, store.get(uri).path) == (uri, model.path)


def test_a_signature_of_one_blob_reads_that_blob(azurite, put, here):
    """
    A signature that may not list is enough for one blob; for a directory it is denied.
    """
    put(FILES)
    blob = f"{here}/model/weights/a.bin"
    backend = AzureBackend(azurite.denied_options)
    signature = azurite.signature(blob=blob, permission="r")

    (file,) = backend.resolve(signed(at_account(blob), signature)).files

    assert read(backend, file, 0, 700_000) == FILES["weights/a.bin"]
    with pytest.raises(SourceDeniedError):
        backend.resolve(signed(at_account(f"{here}/model/"), signature))


@pytest.mark.parametrize("path", ["", "/config.json"])
def test_an_expired_signature_is_denied_and_told(azurite, put, here, path):
    """
    The error says when the signature expired, and does not show it.
    """
    put(FILES)
    signature = azurite.signature(seconds=-60)

    with pytest.raises(SourceDeniedError, match="the signature expired at 20") as caught:
        AzureBackend(azurite.storage_options).resolve(signed(at_account(f"{here}/model{path}"), signature))

    assert "sig=" not in shown(caught.value)


def test_a_public_container_needs_no_credentials(azurite, here):
    """
    Without credentials a public container is read, and a private one is refused with what could be set.
    """
    azurite.make_container("public", is_public=True)
    azurite.put("m/a", b"a", container="public")
    azurite.put(f"{here}/a", b"a")
    backend = AzureBackend(
        {"connection_string": f"AccountName={ACCOUNT};BlobEndpoint={azurite.endpoint}/{ACCOUNT}"}, {}
    )

    assert names(backend, "az://public/m") == ["a"]
    with pytest.raises(
        (SourceDeniedError, SourceNotFoundError), match="no credentials are configured; set AZURE_STORAGE_ACCOUNT_KEY"
    ):
        backend.resolve(parse_ref(azurite.uri(here)))


def test_a_refused_signature_is_made_anew(azurite, put):
    """
    A range that is refused once, as after the key was used for long, is asked for with a new signature.
    """
    uri, refused = put(FILES), []

    def refuse_once(asked: str, answer: bytes) -> bytes:
        if asked.startswith("GET") and "comp=list" not in asked and not refused:
            refused.append(asked)
            return answer.replace(b"206 Partial Content", b"403 Forbidden")
        return answer

    with TamperingProxy(azurite.endpoint, rewrite=refuse_once) as proxy:
        backend = AzureBackend(azurite.options(proxy.endpoint))
        (file,) = backend.resolve(parse_ref(f"{uri}/weights/a.bin")).files
        data = read(backend, file, 10, 350_000)

    assert (data, len(refused)) == (FILES["weights/a.bin"][10:350_000], 1)


@pytest.mark.parametrize("protocol", ["https", None])
def test_a_signature_is_that_of_the_sdk(monkeypatch, protocol):
    """
    What a key signs is field by field what Azure's own library makes of it.
    """
    blob = pytest.importorskip("azure.storage.blob")
    monkeypatch.setattr(blob._shared_access_signature, "X_MS_VERSION", _azure_login._SIGNED_VERSION)

    ours = parse_qs(AccountKey(KEY).authorize(Scope(ACCOUNT, "one", protocol is not None), renewed=False).query)

    end = datetime.fromisoformat(ours["se"][0])
    only = {"protocol": protocol} if protocol else {}
    theirs = blob.generate_container_sas(ACCOUNT, "one", account_key=KEY, permission="rl", expiry=end, **only)
    assert ours == parse_qs(theirs)


def test_a_key_signs_for_one_container_and_a_short_time(monkeypatch):
    """
    The signature may read and list one container for an hour, is kept for half of that, and is bound to TLS where there
    is TLS.
    """
    key = AccountKey(KEY)
    clock = [1000.0]
    monkeypatch.setattr(_azure_login.time, "monotonic", lambda: clock[0])

    def made(container: str = "one", *, is_encrypted: bool = True, renewed: bool = False) -> str:
        return key.authorize(Scope(ACCOUNT, container, is_encrypted), renewed=renewed).query

    first = made()
    fields = {name: value for name, (value,) in parse_qs(first).items()}
    seconds = (datetime.fromisoformat(fields["se"]) - datetime.now(UTC)) / timedelta(seconds=1)
    assert (fields["sp"], fields["sr"], fields["spr"], 3590 <= seconds <= 3601) == ("rl", "c", "https", True)
    assert "spr=" not in made(is_encrypted=False)
    assert parse_qs(made("two"))["sig"] != parse_qs(first)["sig"]
    calls = []
    monkeypatch.setattr(AccountKey, "_sign", lambda *_: calls.append(1) or f"signature {len(calls)}")
    clock[0] += 1799
    assert made() == first
    clock[0] += 2
    assert [made(), made(), made(renewed=True)] == ["signature 1", "signature 1", "signature 2"]


def test_a_busy_service_is_asked_again(root, azurite, put):
    """
    A service that answers 503 a few times slows a download down and does not end it.
    """
    busy = {"HEAD": 2, "GET": 3}

    def refuse(asked: str, answer: bytes) -> bytes:
        method = asked.partition(" ")[0]
        if not busy[method]:
            return answer
        busy[method] -= 1
        return re.sub(
            rb"^HTTP/1.1 \d+ [^\r]*", b"HTTP/1.1 503 Busy\r\nx-ms-error-code: ServerBusy\r\nRetry-After: 0", answer
        )

    with TamperingProxy(azurite.endpoint, rewrite=refuse) as proxy:
        model = store_of(root, azurite.options(proxy.endpoint)).ensure(put(FILES), progress=False)

    assert (read_tree(model.path), busy) == (FILES, {"HEAD": 0, "GET": 0})


@pytest.mark.parametrize(
    ("status", "code", "kind", "facts"),
    [
        (404, "ContainerNotFound", SourceNotFoundError, {}),
        (404, "ResourceNotFound", SourceNotFoundError, {}),
        (409, "ContainerBeingDeleted", SourceNotFoundError, {}),
        (401, "NoAuthenticationInformation", SourceDeniedError, {}),
        (403, "AuthenticationFailed", SourceDeniedError, {}),
        (403, "AuthorizationFailure", SourceDeniedError, {}),
        (409, "PublicAccessNotPermitted", SourceDeniedError, {}),
        (503, "ServerBusy", SourceUnavailableError, {"retry_after": 7.0, "is_final": False}),
        (500, "OperationTimedOut", SourceUnavailableError, {"retry_after": 7.0, "is_final": False}),
        (500, "InternalError", SourceUnavailableError, {"retry_after": None, "is_final": False}),
        (409, "BlobArchived", SourceUnavailableError, {"retry_after": None, "is_final": True}),
        (400, "InvalidUri", SourceUnavailableError, {"retry_after": None, "is_final": True}),
    ],
)
@pytest.mark.parametrize("place", ["header", "body"])
def test_each_refusal_has_one_meaning(status, code, kind, facts, place):
    """
    What Azure says, in a header or in a body, becomes the one error that tells what to do, with Azure's own word in it.
    """
    backend = AzureBackend({"account_name": ACCOUNT}, {})
    headers = {"retry-after": "7", **({"x-ms-error-code": code} if place == "header" else {})}
    body = (
        f"\ufeff<Error><Code>{code}</Code><Message>Said so.\nRequestId:1 Time:2</Message></Error>".encode()
        if place == "body"
        else b""
    )

    error = backend._meaning(read_error(status, headers, body), "az://models/m", Place("a/models", "m"))

    assert (type(error), {name: error.fields[name] for name in facts}) == (kind, facts)
    assert code in str(error)
    assert "RequestId" not in str(error)


@pytest.mark.parametrize("status", [404, 409, 412, 416])
def test_a_range_of_a_blob_that_is_gone_has_changed(status):
    """
    What was listed a moment ago and is not there as it was has changed.
    """
    backend = AzureBackend({"account_name": ACCOUNT}, {})
    blob = make_object("m/a", 1, "0x1")
    file = backend._file(Place(f"{HOST}/models", "m/"), parse_ref("az://models/m/"), blob, "a")
    code = {"x-ms-error-code": "ContainerBeingDeleted"} if status == 409 else {}

    error = backend.refusal(file, status, code, b"")

    assert (type(error), error.uri, error.path) == (SourceChangedError, "az://models/m/a", "a")


HOST = f"{ACCOUNT}.blob.core.windows.net"
PRINCIPAL = {"AZURE_CLIENT_ID": "id", "AZURE_TENANT_ID": "tenant", "AZURE_CLIENT_SECRET": "canary-secret"}


@pytest.mark.parametrize(
    ("options", "environ", "kind", "account"),
    [
        ({}, {}, Anonymous, None),
        ({"account_name": ACCOUNT}, {}, Anonymous, ACCOUNT),
        ({}, {"AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT, "AZURE_STORAGE_ACCOUNT_KEY": KEY}, AccountKey, ACCOUNT),
        ({}, {"AZURE_STORAGE_ACCESS_KEY": KEY}, AccountKey, None),
        ({}, {"AZURE_STORAGE_CONNECTION_STRING": f"AccountName={ACCOUNT};AccountKey={KEY}"}, AccountKey, ACCOUNT),
        ({}, {"AZURE_STORAGE_SAS_TOKEN": "sv=1&sig=x"}, Signature, None),
        ({}, PRINCIPAL, Token, None),
        ({}, {name.replace("AZURE", "AZ"): value for name, value in PRINCIPAL.items()}, Token, None),
        ({}, {name.replace("AZURE", "AZURE_STORAGE"): value for name, value in PRINCIPAL.items()}, Token, None),
        ({}, {**PRINCIPAL, "AZURE_STORAGE_ACCESS_KEY": KEY}, Token, None),
        ({}, {**PRINCIPAL, "AZURE_STORAGE_ACCOUNT_KEY": KEY}, AccountKey, None),
        ({}, {"AZURE_CLIENT_ID": "id"}, Token, None),
        ({}, {"AZURE_TENANT_ID": "tenant"}, Anonymous, None),
        ({}, {"AZURE_STORAGE_ANON": "false"}, Token, None),
        ({"anon": False}, {}, Token, None),
        ({"anon": True}, {**PRINCIPAL, "AZURE_STORAGE_ACCOUNT_KEY": KEY}, Anonymous, None),
        ({"sas_token": "sv=1&sig=x"}, {**PRINCIPAL, "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT}, Signature, ACCOUNT),
        ({"account_key": KEY, "sas_token": "sv=1&sig=x"}, {}, AccountKey, None),
        ({"account_key": KEY, "account_host": f"{ACCOUNT}.blob.core.chinacloudapi.cn"}, {}, AccountKey, ACCOUNT),
    ],
)
def test_who_asks_is_found_where_it_is_said(options, environ, kind, account):
    """
    Options win over the environment, whose names are those of adlfs, of Azure's SDK and of KServe, in one order.
    """
    found = find_account(options, environ)

    assert (type(found.login), found.name) == (kind, account)


@pytest.mark.parametrize(
    ("text", "endpoint", "account"),
    [
        (f"AccountName={ACCOUNT};AccountKey={KEY}", None, ACCOUNT),
        (
            f"DefaultEndpointsProtocol=https;AccountName={ACCOUNT};AccountKey={KEY};EndpointSuffix=core.windows.net",
            None,
            ACCOUNT,
        ),
        (
            f"AccountName={ACCOUNT};AccountKey={KEY};EndpointSuffix=core.chinacloudapi.cn",
            f"https://{ACCOUNT}.blob.core.chinacloudapi.cn",
            ACCOUNT,
        ),
        (
            f"BlobEndpoint=http://127.0.0.1:10000/{ACCOUNT};SharedAccessSignature=sv=1&sig=x",
            f"http://127.0.0.1:10000/{ACCOUNT}",
            ACCOUNT,
        ),
        (f"BlobEndpoint=https://{HOST}/;SharedAccessSignature=sv=1&sig=x", f"https://{HOST}", ACCOUNT),
    ],
)
def test_a_connection_string_says_where_the_account_is(text, endpoint, account):
    """
    The endpoint is the one that it names, or made of its parts, or the usual one.
    """
    found = find_account({"connection_string": text}, {})

    target = found.endpoint and f"{found.endpoint.scheme}://{found.endpoint.authority}{found.endpoint.path}".rstrip("/")
    assert (target, found.name) == (endpoint, account)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"acount_key": KEY}, "acount_key"),
        ({"account_key": "canary no base64"}, "account_key"),
        ({"account_name": "evil.example/"}, "account_name"),
        ({"account_host": "user@evil.example"}, "account_host"),
        ({"sas_token": "canary"}, "sas_token"),
        ({"sas_token": "sv=1&sig=canary x"}, "sas_token"),
        ({"sas_token": "sv=1&sig=canary\r\nHost: x"}, "sas_token"),
        ({"sas_token": "sv=1&sig=canary&prefix=x"}, "sas_token"),
        ({"connection_string": "canary"}, "connection_string"),
        ({"connection_string": f"AccountName={ACCOUNT};AccountKey=canary-no-base64"}, "connection_string"),
        ({"connection_string": "BlobEndpoint=ftp://canary;AccountName=abc"}, "connection_string"),
        ({"client_secret": "canary"}, "client_secret"),
        ({"client_secret": "canary", "client_id": "id"}, "client_secret"),
        ({"credential": "canary"}, "credential"),
    ],
)
def test_a_setting_that_means_nothing_is_told_without_its_value(options, name):
    """
    The error names the setting and what it should look like, and never shows a secret.
    """
    with pytest.raises(SettingsError) as caught:
        AzureBackend(options, {})

    assert caught.value.name == name
    assert "canary" not in shown(caught.value)


@pytest.mark.parametrize(
    ("options", "shows"),
    [
        ({"account_key": KEY}, Anonymous),
        ({"sas_token": "sv=1&sig=x"}, Anonymous),
        ({"anon": False}, Token),
        ({"client_id": "id"}, Token),
    ],
)
def test_what_belongs_to_one_account_is_not_shown_to_another(options, shows):
    """
    A URI of another account is asked for without the key or signature, at its own host; tokens count for all.
    """
    account = find_account({"account_name": "other1", **options}, {})

    endpoint, login = account.reach(HOST)

    assert (endpoint.host, type(login)) == (HOST, shows)
    assert not isinstance(login, Anonymous) or "those of the account `other1`" in login.hint()
    assert account.reach("other1.blob.core.windows.net")[1] is account.login


def jwt(seconds: float = 3600) -> str:
    """
    A token as Entra ID gives them, signed by nobody, which the emulator does not look at.
    """
    now = int(time.time())
    claims = {
        "aud": "https://storage.azure.com",
        "iss": "https://sts.windows.net/ab1f708d-50f6-404c-a006-d71b2ac7a606/",
    }
    parts = {"alg": "RS256", "typ": "JWT"}, {**claims, "iat": now - 60, "nbf": now - 60, "exp": int(now + seconds)}
    encoded = [base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts]
    return ".".join([*encoded, "canarysignature"])


class Issuer:
    """
    A credential as azure.identity has them.
    """

    def __init__(self, *tokens: tuple[str, float]) -> None:
        self.tokens = list(tokens)
        self.scopes: list[str] = []

    def get_token(self, *scopes: str):
        from azure.core.credentials import AccessToken

        self.scopes += scopes
        token, expires = self.tokens.pop(0)
        return AccessToken(token, int(expires))


def test_a_token_reads_over_tls(root, tmp_path_factory):
    """
    A token of Entra ID, asked for once, lists and reads at a service over TLS.
    """
    try:
        authority = Authority(tmp_path_factory.mktemp("authority"))
    except FileNotFoundError:
        pytest.skip("`openssl` is not installed")
    authority.context("azurite")
    issuer = Issuer((jwt(), time.time() + 3600))
    certificate = (authority.file.with_name("azurite.pem"), authority.file.with_name("azurite.key"))
    try:
        with Azurite(certificate=certificate) as server:
            for name, data in FILES.items():
                server.put(f"m/{name}", data)
            backend = AzureBackend(
                {"account_name": ACCOUNT, "credential": issuer},
                {"REQUESTS_CA_BUNDLE": str(authority.file), "NO_PROXY": "*"},
            )
            endpoint = find_endpoint("x", f"{server.endpoint}/{ACCOUNT}")
            backend.service.account = Account(ACCOUNT, endpoint, backend.service.account.login)
            model = ModelStore(root, mode="rw", **serve(backend)).ensure("az://models/m", progress=False)
            refused = Token(Issuer(*[("no-token", time.time() + 3600)] * 2))
            backend.service.account = Account(ACCOUNT, endpoint, refused)
            with pytest.raises(SourceDeniedError):
                backend.resolve(parse_ref("az://models/m"))
    except MissingError as missing:
        pytest.skip(str(missing))

    assert read_tree(model.path) == FILES
    assert issuer.scopes == ["https://storage.azure.com/.default"]


def test_a_token_is_renewed_before_it_expires():
    """
    A token is kept until five minutes before its end, or until it was refused.
    """
    now = time.time()
    token = Token(Issuer(("one", now + 301), ("two", now + 299), ("three", now + 3600), ("four", now + 3600)))

    def sent(*, renewed: bool = False) -> str:
        return token.authorize(Scope(ACCOUNT, "c"), renewed=renewed).headers["Authorization"]

    assert [sent(), sent(renewed=True), sent(), sent(), sent(renewed=True)] == [
        "Bearer one",
        "Bearer two",
        "Bearer three",
        "Bearer three",
        "Bearer four",
    ]


def test_a_token_is_never_sent_in_the_clear(azurite):
    """
    Without TLS a token is not even asked for.
    """
    issuer = Issuer((jwt(), time.time() + 3600))
    backend = AzureBackend({"credential": issuer}, {})
    endpoint = find_endpoint("x", f"{azurite.endpoint}/{ACCOUNT}")
    backend.service.account = Account(ACCOUNT, endpoint, backend.service.account.login)

    with pytest.raises(SourceDeniedError, match="over https only"):
        backend.resolve(parse_ref("az://models/m"))

    assert issuer.scopes == []


def test_whoever_issues_tokens_may_be_out_of_reach(monkeypatch):
    """
    A service principal whose authority cannot be reached is unavailable, and its secret is shown nowhere.
    """
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AZURE_AUTHORITY_HOST", f"https://127.0.0.1:{unused.getsockname()[1]}")
        backend = AzureBackend({"account_name": ACCOUNT}, PRINCIPAL)
        backend.service.account.login._arguments |= {"disable_instance_discovery": True, "retry_total": 0}
        with pytest.raises((SourceUnavailableError, SourceDeniedError), match="no token") as caught:
            backend.resolve(parse_ref("az://models/m"))
        backend.close()

    assert "canary-secret" not in shown(caught.value)


def shown(error: StoreError) -> str:
    """
    All that is ever shown of an error.
    """
    return "".join(traceback.format_exception(error)) + str(error) + repr(error) + repr(error.fields)


def echoing(asked: str, answer: bytes) -> bytes:
    """
    A service that refuses with the signature it was sent in its own words.
    """
    signature = asked.partition("sig=")[2].split("&")[0].split(" ")[0]
    said = f"AuthenticationFailed sig={signature} https://u:p@h/?sig={signature}"
    return re.sub(rb"^HTTP/1.1 \d+ [^\r]*", f"HTTP/1.1 403 No\r\nx-ms-error-code: {said}".encode(), answer)


def test_secrets_are_shown_nowhere(root, azurite, put, here, caplog):
    """
    Neither key nor signature is in a message, a traceback, a log, a representation, or any file of the volume.
    """
    caplog.set_level(logging.DEBUG)
    uri, signature = put(FILES), azurite.signature()
    secrets = [KEY, OTHER_KEY, parse_qs(signature)["sig"][0], signature.rpartition("sig=")[2]]
    errors = []

    def fail(options, wish, **more):
        with pytest.raises(StoreError) as caught:
            store_of(root, options, retry_seconds=0.1, **more).ensure(wish, progress=False)
        errors.append(shown(caught.value))

    fail(azurite.denied_options, uri)
    fail(azurite.unreachable_options, uri)
    fail(azurite.storage_options, f"{at_account(here)}/none?{signature}")
    fail(azurite.storage_options, f"{at_account(here)}/model?{azurite.signature('other')}")
    fail(azurite.storage_options, f"{at_account(here)}/model?versionid=1&{signature}")
    with TamperingProxy(azurite.endpoint, rewrite=echoing) as proxy:
        fail(azurite.options(proxy.endpoint), uri)
        fail(azurite.options(proxy.endpoint), f"{at_account(here)}/model?{signature}")
    backend = AzureBackend(azurite.storage_options)
    store = ModelStore(root, mode="rw", **serve(backend))
    model = store.ensure(f"{at_account(here)}/model?{signature}", progress=False)
    found = backend.resolve(signed(at_account(f"{here}/model"), signature))
    described = repr(
        (
            backend,
            vars(backend),
            vars(backend.service),
            backend.service.account,
            found,
            model,
            model.record,
            vars(backend.service.account.login)["_made"].keys(),
        )
    )

    written = b"".join(p.read_bytes() for p in root.rglob("*") if p.is_file())
    for secret in secrets:
        assert secret.encode() not in written
        assert [
            text for text in [*errors, described, caplog.text] if secret in text or re.search(r"sig=[^…]", text)
        ] == []


def test_the_environment_of_the_process_is_left_alone(azurite, put, monkeypatch, clean_environ):
    """
    The environment is read, KServe's older names included, and never written.
    """
    for name, value in azurite.storage_options.items():
        monkeypatch.setenv(f"AZURE_STORAGE_{name.upper()}", value)
    before = dict(os.environ)

    found = names(AzureBackend({}), put(FILES))

    assert (found, dict(os.environ)) == (sorted(FILES), before)


@pytest.mark.parametrize(
    ("options", "package"),
    [
        ({"account_key": KEY}, None),
        ({"anon": False}, "azure.identity"),
        ({"credential": Issuer()}, "azure.core"),
        ({"sas_token": "sv=1&sig=x"}, None),
        ({}, None),
    ],
)
@pytest.mark.parametrize("absence", ["no package", "no parent"])
def test_only_what_is_needed_has_to_be_installed(monkeypatch, options, package, absence):
    """
    A token needs the SDK that gets it, which is told at once; keys, signatures and nobody need none.
    """

    def find(name: str):
        if absence == "no parent":
            raise ModuleNotFoundError(name)

    monkeypatch.setattr(_azure_login, "find_spec", find)

    try:
        missing = AzureBackend(options, {}) and None
    except ImportError as error:
        missing = error.name

    assert missing == package


WITHOUT_SDK = """
import sys
from kserve_pvc._source.ref import parse_ref
from kserve_pvc.backends.azure import AzureBackend

connection_string, uri = sys.argv[1:]
found = AzureBackend({"connection_string": connection_string}).resolve(parse_ref(uri))
loaded = {name for name in sys.modules if name.split(".")[0] in ("azure", "adlfs", "aiohttp", "fsspec", "requests")}
print(len(found.files), sorted(loaded))
"""


def test_keys_and_signatures_need_no_sdk(azurite, put):
    """
    Whoever brings a key or a signature waits for no SDK to be imported.
    """
    endpoint, uri = f"BlobEndpoint={azurite.endpoint}/{ACCOUNT}", put(FILES)
    signed = f"{endpoint};SharedAccessSignature={azurite.signature()}"
    with_key = f"{endpoint};AccountName={ACCOUNT};AccountKey={KEY}"

    found = [shell.python(WITHOUT_SDK, text, uri) for text in (signed, with_key)]

    assert found == [f"{len(FILES)} []\n"] * 2
