"""
`http://` and `https://` against a real web server that does what a test wants of it.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import logging
import os
import pickle
import random
import socket
import tarfile
import threading
import traceback
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import webserver
from trees import read_tree
from weather import Authority
from webserver import HERE, MODIFIED, SECRET, Page, WebServer, page

from kserve_pvc import (
    DigestMismatchError,
    InsufficientSpaceError,
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
from kserve_pvc._download.unpacking import Unpacking
from kserve_pvc._source.ref import parse_ref
from kserve_pvc._volume.writing import VolumeWriter
from kserve_pvc.backends._addresses import check_address
from kserve_pvc.backends._http.client import HTTPClient
from kserve_pvc.backends._http.target import target_of
from kserve_pvc.backends.http import HTTPBackend
from kserve_pvc.testing import BackendConformance

WEIGHTS = random.Random(31).randbytes(700_001)
PART_BYTES = 100_000
FILES = {"config.json": b'{"layers": 2}', "empty": b"", "weights/a.bin": WEIGHTS}
ELSEWHERE = "127.0.0.2"
LATER = "Mon, 02 Nov 2026 11:00:00 GMT"


@pytest.fixture
def server() -> Iterator[WebServer]:
    with WebServer() as made:
        yield made


@pytest.fixture
def other() -> Iterator[WebServer]:
    """
    A server on another host.
    """
    with WebServer(host=ELSEWHERE) as made:
        yield made


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


def backend(**options: object) -> HTTPBackend:
    """
    The back end by itself, without proxies, and asking only once.
    """
    made = HTTPBackend({"allow_private": True, **options}, environ=options.pop("environ", {}))
    made.tune(stall_seconds=5.0, retry_seconds=0.0)
    return made


def store(
    root: Path, *, environ: dict[str, str] | None = None, retry_seconds: float = 30.0, **options: object
) -> ModelStore:
    """
    A store that knows our two schemes.
    """

    def make(given: object) -> HTTPBackend:
        return HTTPBackend(given, environ=environ or {})

    return ModelStore(
        root,
        mode="rw",
        backends={"http": make, "https": make},
        storage_options={"allow_private": True, **options},
        part_bytes=PART_BYTES,
        stall_seconds=5.0,
        retry_seconds=retry_seconds,
    )


def ensure(root: Path, uri: str, *, options: dict[str, object] | None = None, **wishes: object):
    return store(root, **(options or {})).ensure(uri, progress=False, **wishes)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def generations(root: Path) -> list[Path]:
    """
    What lies where models go, complete or not.
    """
    return [path for path in root.glob("models/*-*/*") if any(path.rglob("*"))]


def tar(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return file.getvalue()


def test_one_file_is_a_model(root, server):
    """
    A URL is a model of one file, named as its last part, in parts that are pinned by the ETag.
    """
    server.pages["/m/weights.bin"] = page(WEIGHTS)

    model = ensure(root, server.uri("m/weights.bin"))

    assert read_tree(model.path) == {"weights.bin": WEIGHTS}
    assert [(str(f.path), f.size_bytes, f.sha256, f.token) for f in model.record.files] == [
        ("weights.bin", len(WEIGHTS), sha256(WEIGHTS), sha256(WEIGHTS)[:16])
    ]
    data = [asked for asked in server.asked if asked.method == "GET"]
    assert server.asked[0].method == "HEAD"
    assert len(data) > 1
    assert {asked.headers["if-match"] for asked in data} == {server.pages["/m/weights.bin"].etag}


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("a%20b.bin", "a b.bin"),
        ("%C3%A9.bin", "é.bin"),
        ("100%25.bin", "100%.bin"),
        ("a+b.bin", "a+b.bin"),
        ("m.bin;v=1", "m.bin"),
    ],
)
def test_the_name_is_what_the_last_part_means(root, server, path, name):
    """
    The last part of a URL is decoded once, without the parameters of a path.
    """
    server.pages[f"/{path}"] = page(b"1")

    assert read_tree(ensure(root, f"{server.endpoint}/{path}").path) == {name: b"1"}


@pytest.mark.parametrize("name", ["..", "..%2F..%2Fx", "a%2Fb", "a%00b", "a%5Cb", "%FF", "a%0Ab", "x."])
def test_a_name_that_leaves_its_place_is_refused(root, server, name):
    """
    What the last part of a URL means must be the name of one file; nobody is asked for anything else.
    """
    with pytest.raises(UnsafePathError):
        ensure(root, f"{server.endpoint}/m/{name}")

    assert server.asked == []


@pytest.mark.parametrize("path", ["", "/", "/directory/"])
def test_a_directory_is_no_model(root, server, path):
    """
    A URL that names no file is refused without a request, as is a revision.
    """
    with pytest.raises(InvalidURIError, match="no file is named"):
        ensure(root, server.endpoint + path)
    with pytest.raises(InvalidURIError, match="has no revisions"):
        ensure(root, server.uri("x"), revision="1")

    assert server.asked == []


def test_where_head_is_refused_one_byte_is_asked_for(root, server):
    """
    A server that knows no HEAD is asked for the first byte, which says as much.
    """
    server.pages["/weights.bin"] = page(WEIGHTS, takes_head=False)

    model = ensure(root, server.uri("weights.bin"))

    assert read_tree(model.path) == {"weights.bin": WEIGHTS}
    assert [(asked.method, asked.range) for asked in server.asked[:2]] == [("HEAD", None), ("GET", "bytes=0-0")]


@pytest.mark.parametrize("takes_head", [True, False])
@pytest.mark.parametrize("in_ranges", [True, False])
def test_an_empty_file_is_a_file(root, server, takes_head, in_ranges):
    """
    A file of no bytes is one, however it is asked for.
    """
    server.pages["/empty"] = page(b"", takes_head=takes_head, in_ranges=in_ranges)

    assert read_tree(ensure(root, server.uri("empty")).path) == {"empty": b""}


@pytest.mark.parametrize("takes_head", [True, False])
def test_a_server_without_ranges_sends_all_of_it_once(root, server, takes_head):
    """
    Where ranges are ignored the file comes as one stream, and is asked for once.
    """
    server.pages["/weights.bin"] = page(WEIGHTS, in_ranges=False, takes_head=takes_head)

    model = ensure(root, server.uri("weights.bin"))

    assert read_tree(model.path) == {"weights.bin": WEIGHTS}
    assert server.ranges() == [None]
    assert model.bytes_fetched == len(WEIGHTS)


@pytest.mark.parametrize("status", [400, 403, 405, 406, 416, 417, 501])
@pytest.mark.parametrize("takes_head", [True, False])
def test_a_server_that_refuses_ranges_sends_all_of_it(root, server, status, takes_head):
    """
    A refusal of a range is no refusal of the file, whether HEAD describes that or not.
    """
    server.pages["/weights.bin"] = page(
        WEIGHTS,
        refuses=lambda method, wanted: status if wanted or (method == "HEAD" and not takes_head) else None,
        in_ranges=False,
    )

    model = ensure(root, server.uri("weights.bin"))

    assert read_tree(model.path) == {"weights.bin": WEIGHTS}
    assert None in server.ranges()


@pytest.mark.parametrize("status", [400, 405, 406, 417, 501])
def test_ranges_that_are_promised_and_refused_are_given_up(root, server, status):
    """
    A server that says it has ranges, and refuses each, is asked for the whole file.
    """
    server.pages["/weights.bin"] = page(WEIGHTS, refuses=lambda _, wanted: status if wanted else None)

    model = ensure(root, server.uri("weights.bin"), max_workers=2)

    assert read_tree(model.path) == {"weights.bin": WEIGHTS}


def test_a_file_that_is_refused_whole_is_refused(root, server):
    """
    Where the whole file is refused too, its status is told.
    """
    server.pages["/weights.bin"] = page(WEIGHTS, refuses=lambda method, _: 400 if method == "GET" else None)

    with pytest.raises(SourceUnavailableError, match="HTTP 400"):
        ensure(root, server.uri("weights.bin"))


def test_without_ranges_a_cut_stream_goes_on_where_it_was(root, server):
    """
    What came before the cut is passed over, and not written twice.
    """
    server.pages["/weights.bin"] = page(WEIGHTS, in_ranges=False, cuts=[300_000, 500_000])

    model = ensure(root, server.uri("weights.bin"))

    assert read_tree(model.path) == {"weights.bin": WEIGHTS}
    assert server.ranges() == [None] * 3


def test_a_later_range_of_a_server_without_any_is_cut_out(server):
    """
    A range in the middle is found behind what comes before it.
    """
    server.pages["/weights.bin"] = page(WEIGHTS, in_ranges=False)
    made = backend()
    file = made.resolve(parse_ref(server.uri("weights.bin"))).files[0]
    buffer, data = memoryview(bytearray(1000)), b""

    with made.open_range(file, 600_000, 650_000) as reader:
        while len(data) < 50_000:
            count = reader.readinto(buffer[: 50_000 - len(data)])
            data += bytes(buffer[: count or 0])

    assert (file.in_ranges, data) == (False, WEIGHTS[600_000:650_000])


@pytest.mark.parametrize("in_ranges", [True, False])
def test_a_file_of_unknown_length_is_refused(root, server, in_ranges):
    """
    Without a length nothing tells a whole file from a part of it, so nothing is fetched.
    """
    server.pages["/weights.bin"] = page(WEIGHTS, tells_length=False, in_ranges=in_ranges)

    with pytest.raises(PolicyError, match="sends no length"):
        ensure(root, server.uri("weights.bin"))

    assert server.ranges() == []
    assert generations(root) == []


def test_a_file_that_is_compressed_on_the_way_is_refused(root, server):
    """
    Bytes in another encoding are not those of the file.
    """
    server.pages["/weights.bin"] = page(WEIGHTS, headers={"Content-Encoding": "gzip"})

    with pytest.raises(PolicyError, match="encodes it as `gzip`"):
        ensure(root, server.uri("weights.bin"))


def test_a_page_for_people_is_no_model(root, server):
    """
    A login page in place of a file means that access is denied; a page may still be a model by its name or its digest.
    """
    html = b"<html>log in</html>"
    for name in ("weights.bin", "page.html"):
        server.pages[f"/{name}"] = page(html, headers={"Content-Type": "text/html; charset=utf-8"})

    with pytest.raises(SourceDeniedError, match="is a web page"):
        ensure(root, server.uri("weights.bin"))

    assert read_tree(ensure(root, server.uri("page.html")).path) == {"page.html": html}
    assert read_tree(ensure(root, f"{server.uri('weights.bin')}#sha256={sha256(html)}").path) == {"weights.bin": html}


def test_a_digest_in_the_fragment_is_compared(root, server):
    """
    The right digest is recorded as evidence, the fragment is not sent, and the URI is kept as it was spelled.
    """
    server.pages["/weights.bin"] = page(WEIGHTS)
    uri = f"{server.uri('weights.bin')}#sha256={sha256(WEIGHTS)}"

    model = ensure(root, uri)

    assert [f.evidence for f in model.record.files] == [f"sha256:{sha256(WEIGHTS)}"]
    assert model.uri == uri
    assert {asked.path for asked in server.asked} == {"/weights.bin"}


def test_a_wrong_digest_publishes_nothing(root, server):
    """
    Other bytes than promised end in an error that names both digests.
    """
    server.pages["/weights.bin"] = page(WEIGHTS)
    uri = f"{server.uri('weights.bin')}#sha256={sha256(b'other')}"

    with pytest.raises(DigestMismatchError) as caught:
        ensure(root, uri)

    assert (caught.value.expected, caught.value.actual) == (f"sha256:{sha256(b'other')}", f"sha256:{sha256(WEIGHTS)}")
    assert uri not in ModelStore(root)


def test_what_a_server_vouches_for_is_compared(root, server):
    """
    A digest in the headers, as RFC 9530 or as repositories of artefacts have it, is evidence, and a wrong one an error.
    """
    encoded = base64.b64encode(hashlib.sha256(WEIGHTS).digest()).decode()
    server.pages["/a"] = page(WEIGHTS, headers={"Repr-Digest": f"md5=:AAAA:, sha-256=:{encoded}:"})
    server.pages["/b"] = page(WEIGHTS, headers={"X-Checksum-Sha256": sha256(WEIGHTS).upper()})
    server.pages["/c"] = page(WEIGHTS, headers={"X-Checksum-Sha256": sha256(b"other")})

    assert [ensure(root, server.uri(name)).record.files[0].evidence for name in "ab"] == [
        f"sha256:{sha256(WEIGHTS)}"
    ] * 2
    with pytest.raises(DigestMismatchError):
        ensure(root, server.uri("c"))


@pytest.mark.parametrize("checks", [True, False])
@pytest.mark.parametrize(
    "tags",
    [
        ({"etag": '"one"', "modified": None}, {"etag": '"two"', "modified": None}),
        ({"etag": 'W/"one"', "modified": MODIFIED}, {"etag": 'W/"one"', "modified": LATER}),
        ({"etag": None, "modified": MODIFIED}, {"etag": None, "modified": LATER}),
        ({"etag": None, "modified": None}, {"etag": None, "modified": None, "data": WEIGHTS[1:]}),
    ],
    ids=["strong", "weak", "date", "length"],
)
def test_what_changes_before_it_is_read_is_noticed(root, server, tags, checks):
    """
    A file that is replaced between HEAD and GET ends the call, by ETag, date or length, also where conditions are
    ignored.
    """
    server.pages["/weights.bin"] = Page(data=WEIGHTS, **tags[0])
    replaced = Page(**{"data": WEIGHTS[::-1], "checks": checks, **tags[1]})

    def replace(asked: webserver.Asked) -> None:
        if asked.method == "GET":
            server.pages["/weights.bin"] = replaced

    server.before = replace

    # A length that has changed alone is told by an answer that is not the one asked for, again and again.
    with pytest.raises((SourceChangedError, SourceUnavailableError)) as caught:
        store(root, retry_seconds=0.5).ensure(server.uri("weights.bin"), progress=False)

    assert isinstance(caught.value, SourceChangedError) or tags[0]["modified"] is tags[0]["etag"] is None
    assert server.uri("weights.bin") not in ModelStore(root)


def test_what_goes_before_it_is_read_is_noticed(root, server):
    """
    A file that is deleted between HEAD and GET has changed.
    """
    server.pages["/weights.bin"] = page(WEIGHTS)
    server.before = lambda asked: server.delete("weights.bin") if asked.method == "GET" else None

    with pytest.raises(SourceChangedError):
        ensure(root, server.uri("weights.bin"))


def test_a_newer_version_is_told_by_what_pins_it(root, server):
    """
    `refresh` fetches nothing while the ETag stays, and what is there when it changes.
    """
    server.pages["/weights.bin"] = page(WEIGHTS)
    uri = server.uri("weights.bin")
    ensure(root, uri)
    before = len(server.ranges())

    same = ensure(root, uri, refresh=True)
    after = len(server.ranges())
    server.pages["/weights.bin"] = page(WEIGHTS[::-1])
    newer = ensure(root, uri, refresh=True)

    assert (same.status, after) == ("present", before)
    assert (newer.status, read_tree(newer.path)) == ("downloaded", {"weights.bin": WEIGHTS[::-1]})


def test_a_cut_range_goes_on_where_it_was(root, server):
    """
    A connection that breaks costs no byte twice.
    """
    server.pages["/weights.bin"] = page(WEIGHTS, cuts=[30_000, 50_000, 10])

    model = ensure(root, server.uri("weights.bin"))

    assert read_tree(model.path) == {"weights.bin": WEIGHTS}
    assert model.bytes_fetched == len(WEIGHTS)


@pytest.mark.parametrize("name", ["weights.bin", "model.tar"])
def test_another_process_goes_on_where_one_failed(root, server, name):
    """
    What was fetched before a failure is taken over by the next call, of an archive too.
    """
    data = tar(FILES) if name == "model.tar" else WEIGHTS
    server.pages[f"/{name}"] = page(data)
    failing: list[str] = []

    def fail(asked: webserver.Asked) -> None:
        if asked.range not in (None, "bytes=0-0"):
            failing.append(asked.range)
            if len(failing) > 3:
                server.pages[f"/{name}"] = Page(status=400)

    server.before = fail
    with pytest.raises(StoreError):
        store(root).ensure(server.uri(name), progress=False, max_workers=1)
    server.before = lambda asked: None
    server.pages[f"/{name}"] = page(data)

    model = ensure(root, server.uri(name))

    assert 0 < model.bytes_fetched <= len(data) - 3 * PART_BYTES // 2
    assert read_tree(model.path) == (FILES if name == "model.tar" else {"weights.bin": WEIGHTS})


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(root, server, other, status):
    """
    A file is found where the server says, with the condition that pins it, and is named as it was asked for.
    """
    server.pages["/weights.bin"] = Page(status=status, location="/second?signature=1")
    server.pages["/second?signature=1"] = Page(status=status, location=f"{other.endpoint}/third.dat?x=%20y")
    other.pages["/third.dat?x=%20y"] = page(WEIGHTS)

    model = ensure(root, server.uri("weights.bin"))

    assert read_tree(model.path) == {"weights.bin": WEIGHTS}
    assert [asked.path for asked in server.asked] == ["/weights.bin", "/second?signature=1"]


def test_five_redirects_are_followed_and_no_more(root, server):
    """
    The sixth redirect in a row, as in a loop, is one too many.
    """
    for number in range(6):
        server.pages[f"/{number}"] = Page(status=302, location=f"/{number + 1}")
    server.pages["/6"] = page(b"1")
    server.pages["/loop"] = Page(status=302, location="/loop")

    assert read_tree(ensure(root, server.uri("1")).path) == {"1": b"1"}
    for name in ("0", "loop"):
        with pytest.raises(SourceUnavailableError, match="more than 5 redirects"):
            ensure(root, server.uri(name))


@pytest.mark.parametrize("location", ["ftp://x/y", "file:///etc/passwd", "http://[::1", "http://x:99999/"])
def test_a_redirect_to_no_url_is_refused(root, server, location):
    """
    What is no http or https URL is not followed, at once.
    """
    server.pages["/x"] = Page(status=302, location=location)

    with pytest.raises(SourceUnavailableError, match="other than an http or https URL"):
        ensure(root, server.uri("x"))

    assert len(server.asked) == 1


def test_a_signed_place_that_expires_is_asked_for_again(root, server, other):
    """
    When the place it led to refuses, the server is asked once more, and the download goes on at the next one.
    """
    server.pages["/weights.bin"] = Page(status=302, location=f"{other.endpoint}/x?sig=1")
    other.pages["/x?sig=1"] = other.pages["/x?sig=2"] = page(WEIGHTS)

    def expire(asked: webserver.Asked) -> None:
        if asked.method == "GET" and asked.path.endswith("sig=1"):
            other.pages["/x?sig=1"] = Page(status=403)
            server.pages["/weights.bin"] = Page(status=302, location=f"{other.endpoint}/x?sig=2")

    other.before = expire

    assert read_tree(ensure(root, server.uri("weights.bin")).path) == {"weights.bin": WEIGHTS}


@pytest.mark.parametrize("gone", [Page(status=404), Page(status=302, location="/x?sig=2")])
def test_a_place_that_is_gone_is_asked_for_again(root, server, other, gone):
    """
    When the file is no longer where it led, or the place leads on, the server is asked from the beginning.
    """
    server.pages["/weights.bin"] = Page(status=302, location=f"{other.endpoint}/x?sig=1")
    other.pages["/x?sig=1"] = other.pages["/x?sig=2"] = page(WEIGHTS)

    def move(asked: webserver.Asked) -> None:
        if asked.method == "GET" and asked.path.endswith("sig=1"):
            other.pages["/x?sig=1"] = gone
            server.pages["/weights.bin"] = Page(status=302, location=f"{other.endpoint}/x?sig=2")

    other.before = move

    assert read_tree(ensure(root, server.uri("weights.bin")).path) == {"weights.bin": WEIGHTS}


def test_headers_come_from_the_environment(root, server):
    """
    The variable that KServe uses gives the headers for a host, and the option wins over it.
    """
    server.pages["/a"] = server.pages["/b"] = page(WEIGHTS, wants={"X-Key": SECRET})
    environ = {f"{HERE}-headers": json.dumps({"X-Key": SECRET})}

    by_variable = ensure(root, server.uri("a"), options={"environ": environ})
    by_option = ensure(root, server.uri("b"), options={"headers": {HERE: {"X-Key": SECRET}}})

    assert [read_tree(model.path) for model in (by_variable, by_option)] == [{"a": WEIGHTS}, {"b": WEIGHTS}]
    with pytest.raises(SourceDeniedError, match=f"variable `{HERE}-headers`"):
        ensure(root, server.uri("b"), force_download=True, options={"environ": environ, "headers": {HERE: {}}})


@pytest.mark.parametrize(
    "given",
    ["no json", "[]", '{"X": 1}', '{"X Y": "1"}', '{"X": "a\\nb"}', '{"Host": "x"}', '{"range": "x"}', "[" * 99_999],
)
def test_headers_that_mean_nothing_are_refused(root, server, given):
    """
    What is no object of texts, and headers that requests have already, are refused without being shown.
    """
    environ = {f"{HERE}-headers": given.replace("1", SECRET)}

    with pytest.raises(SettingsError) as caught:
        ensure(root, server.uri("x"), options={"environ": environ})

    assert caught.value.name == f"{HERE}-headers"
    assert SECRET not in str(caught.value) + repr(caught.value)
    assert server.asked == []
    for flat in ({"X-Key": SECRET}, [SECRET]):
        with pytest.raises(SettingsError, match="by host") as caught:
            HTTPBackend({"headers": flat}, environ={})
        assert SECRET not in str(caught.value)


def test_headers_go_to_their_host_alone(root, server, other):
    """
    Where a redirect leads to another host or port, no header goes along: neither ours, nor those given for that host.
    """
    wants = {"X-Key": SECRET}
    with WebServer() as neighbour:
        server.pages["/a"] = Page(status=302, location=f"{other.endpoint}/a", wants=wants)
        server.pages["/b"] = Page(status=302, location=f"{neighbour.endpoint}/b", wants=wants)
        other.pages["/a"] = neighbour.pages["/b"] = page(WEIGHTS)
        headers = {HERE: {**wants, "Authorization": SECRET, "Cookie": SECRET}, ELSEWHERE: {"X-Other": SECRET}}

        for name in "ab":
            assert read_tree(ensure(root, server.uri(name), options={"headers": headers}).path) == {name: WEIGHTS}

        assert other.asked
        assert neighbour.asked
        assert SECRET not in repr(other.asked + neighbour.asked)
    assert all(asked.headers["x-key"] == SECRET for asked in server.asked)


def test_headers_go_from_the_open_port_to_the_sealed_one():
    """
    Only the usual ports of one host count as one server.
    """
    made = backend(headers={"h.example": {"X-Key": SECRET}})

    sent = [
        "X-Key" in made.headers(target_of(url), "http://H.example/x")
        for url in (
            "http://h.example/y",
            "https://h.example/y",
            "https://h.example:444/y",
            "http://h.example:81/y",
            "https://g.example/y",
        )
    ]

    assert sent == [True, True, False, False, False]
    assert "X-Key" not in made.headers(target_of("http://h.example/y"), "https://h.example/x")


ADDRESSES = {
    "private": ["10.1.2.3", "172.16.0.1", "192.168.1.1", "fd00::1", "100.64.0.1", "fec0::1"],
    "loopback": ["127.0.0.1", "127.9.9.9", "::1"],
    "link-local": ["169.254.0.1", "fe80::1", "fe80::1%eth0"],
    "metadata": ["169.254.169.254", "fd00:ec2::254", "168.63.129.16", "100.100.100.200", "192.0.0.192"],
    "nowhere": ["0.0.0.0", "::", "255.255.255.255", "240.0.0.1", "192.0.2.1", "2001:db8::1", "0.1.2.3"],
    "multicast": ["224.0.0.1", "239.1.1.1", "ff02::1", "ff0e::1"],
    "inside-another": [
        "::ffff:10.0.0.1",
        "::ffff:169.254.169.254",
        "64:ff9b::a9fe:a9fe",
        "2002:a9fe:a9fe::1",
        "2002:7f00:1::",
        "::127.0.0.1",
    ],
}


@pytest.mark.parametrize("address", [address for addresses in ADDRESSES.values() for address in addresses])
def test_an_address_inside_is_refused(address):
    """
    Private, loopback, link-local, metadata, multicast and reserved addresses are refused, also inside of other ones.
    """
    with pytest.raises(PolicyError, match="is not public"):
        check_address("models.example", address)


@pytest.mark.parametrize(
    "address", ["93.184.216.34", "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_an_address_outside_is_allowed(address):
    """
    Public addresses are connected to.
    """
    assert check_address("models.example", address) is None


def test_private_addresses_are_refused_unless_allowed(root, server):
    """
    By default nothing inside is connected to; an option or a variable allows it, for all or for named hosts.
    """
    server.pages["/x"] = page(b"1")
    variable = "KSERVE_PVC_ALLOW_PRIVATE_ADDRESSES"
    refusing = [
        {"allow_private": None},
        {"allow_private": False, "environ": {variable: "1"}},
        {"allow_private": ["other.example"]},
    ]
    allowing = [{"allow_private": None, "environ": {variable: "1"}}, {"allow_private": [HERE]}, {"allow_private": HERE}]

    for options in refusing:
        with pytest.raises(PolicyError, match=f"`{HERE}` is refused: its address {HERE} is not public"):
            ensure(root, server.uri("x"), options=options)
    assert server.asked == []

    assert [ensure(root, server.uri("x"), force_download=True, options=options).status for options in allowing] == [
        "downloaded"
    ] * 3


def test_a_variable_that_means_nothing_is_told():
    """
    What is neither yes nor no is not guessed.
    """
    with pytest.raises(SettingsError, match="use 1"):
        HTTPBackend({}, environ={"KSERVE_PVC_ALLOW_PRIVATE_ADDRESSES": "maybe"})


@pytest.mark.parametrize(
    "host",
    [
        ELSEWHERE,
        "[::ffff:127.0.0.2]",
        "0x7f000002",
        "2130706434",
        "0177.0.0.2",
        "127.2",
        "localhost",
        "169.254.169.254",
        "169.254.169.254.",
        "127.0.0.2.",
    ],
)
def test_a_redirect_inside_is_refused(root, server, other, host):
    """
    Every hop is checked, in whatever spelling an address comes, and nobody there hears of it.
    """
    server.pages["/x"] = Page(status=302, location=f"http://{host}:{other.port}/x")
    other.pages["/x"] = page(b"secret of another machine")

    with pytest.raises(PolicyError, match=r"is not public|never connected to"):
        ensure(root, server.uri("x"), options={"allow_private": [HERE]})

    assert other.asked == []
    assert generations(root) == []


METADATA = [
    *("169.254.169.254", "169.254.169.254.", "0xA9FEA9FE", "2852039166", "[::ffff:a9fe:a9fe]", "[fd00:ec2::254]"),
    *("[fe80::1]", "169.254.170.2", "100.100.100.200", "168.63.129.16"),
]


@pytest.mark.parametrize("proxied", [False, True])
@pytest.mark.parametrize("host", METADATA)
def test_what_gives_secrets_to_a_machine_is_never_connected_to(root, server, host, proxied):
    """
    Where private addresses are allowed, metadata services and link-local addresses still are not, however they are
    spelled, behind a proxy too, and whichever hosts are allowed by name.
    """
    url = f"http://{host}/latest/meta-data"
    environ = {"http_proxy": server.endpoint} if proxied else {}
    server.pages[url] = page(b"role")

    for allowed in (True, [host.strip("[]")]):
        with pytest.raises(PolicyError, match="never connected to"):
            ensure(root, url, options={"allow_private": allowed, "environ": environ})
    assert server.asked == []


@pytest.mark.parametrize("name", ["metadata.google.internal", "metadata.google.internal.", "METADATA.goog", "metadata"])
def test_behind_a_proxy_the_names_of_metadata_services_are_refused(root, server, name):
    """
    A proxy looks names up itself, so those that are known to lead to metadata are refused by name.
    """
    with pytest.raises(PolicyError, match="never connected to"):
        ensure(root, f"http://{name}/x", options={"allow_private": True, "environ": {"http_proxy": server.endpoint}})
    assert server.asked == []


@pytest.mark.parametrize("host", ["127.0.0.2.", "10.0.0.1.", "0x7f000002."])
def test_behind_a_proxy_an_address_with_a_dot_at_its_end_is_one(root, server, host):
    """
    Proxies look such a name up as the address that it is.
    """
    options = {"allow_private": False, "environ": {"http_proxy": server.endpoint}}
    with pytest.raises(PolicyError, match="is not public"):
        ensure(root, f"http://{host}/x", options=options)
    assert server.asked == []


def test_a_redirect_inside_is_refused_while_reading(root, server, other):
    """
    A place that was public when it was found, and leads inside when it is read, is refused too.
    """
    server.pages["/x"] = page(WEIGHTS)

    def move(asked: webserver.Asked) -> None:
        if asked.method == "GET":
            server.pages["/x"] = Page(status=302, location=f"{other.endpoint}/x")

    server.before = move

    with pytest.raises(PolicyError, match=f"`{ELSEWHERE}` is refused"):
        ensure(root, server.uri("x"), options={"allow_private": [HERE]})
    assert other.asked == []


def test_a_name_is_looked_up_once_for_each_connection(server, monkeypatch):
    """
    What was checked is what is connected to: a name that changes its address in between is not asked again.
    """
    looked, checked = [], []
    real = socket.getaddrinfo

    def look_up(host: str, *arguments: object, **options: object):
        looked.append(host)
        return real(HERE if len(looked) == 1 else ELSEWHERE, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    client = HTTPClient(environ={}, check_address=lambda host, address: checked.append((host, address)))
    server.pages["/x"] = page(b"1")

    with client.open("GET", target_of(f"http://rebinding.example:{server.port}/x"), {}) as answer:
        assert answer.status == 200

    assert (looked, checked) == (["rebinding.example"], [("rebinding.example", HERE)])


def test_one_private_address_among_others_is_enough(monkeypatch):
    """
    A name with a public and a private address is refused, in whichever order they come.
    """
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80)) for address in ("93.184.216.34", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    client = HTTPClient(environ={}, check_address=check_address)

    with pytest.raises(PolicyError, match=r"10\.0\.0\.1 is not public"):
        client.connect(target_of("http://both.example/x"))


def test_behind_a_proxy_addresses_are_checked_and_names_left_to_it(root, server):
    """
    The proxy is the user's own choice, wherever it is; a target inside is refused at every hop, if it is spelled as an
    address.
    """
    environ = {"http_proxy": server.endpoint}
    server.pages["http://models.example/x"] = Page(status=302, location="http://93.184.216.34/x")
    server.pages["http://93.184.216.34/x"] = page(WEIGHTS)

    model = ensure(root, "http://models.example/x", options={"allow_private": False, "environ": environ})

    assert read_tree(model.path) == {"x": WEIGHTS}
    for host in ("169.254.169.254", "0xA9FEA9FE", "2852039166", "[::1]"):
        server.pages["http://models.example/y"] = Page(status=302, location=f"http://{host}/latest")
        with pytest.raises(PolicyError, match=r"is not public|never connected to"):
            ensure(root, "http://models.example/y", options={"allow_private": False, "environ": environ})
    assert {asked.path for asked in server.asked} == {
        "http://models.example/x",
        "http://93.184.216.34/x",
        "http://models.example/y",
    }


def test_tls_is_checked(root, authority):
    """
    A server whose certificate nobody trusts is refused at once, and the error says which variable names the CA.
    """
    with WebServer(tls=authority.context("web")) as server:
        server.pages["/weights.bin"] = page(WEIGHTS)
        uri = server.uri("weights.bin")

        with pytest.raises(SourceUnavailableError, match=r"AWS_CA_BUNDLE or SSL_CERT_FILE") as caught:
            ensure(root, uri)

        assert caught.value.is_final
        assert server.asked == []
        assert read_tree(ensure(root, uri, options={"verify": str(authority.file)}).path) == {"weights.bin": WEIGHTS}
        by_variable = {"REQUESTS_CA_BUNDLE": str(authority.file)}
        assert ensure(root, uri, force_download=True, options={"environ": by_variable}).bytes_fetched == len(WEIGHTS)
        assert ensure(root, uri, force_download=True, options={"verify": False}).bytes_fetched == len(WEIGHTS)


def test_a_redirect_to_plain_http_is_refused(root, server, authority):
    """
    What began sealed stays so.
    """
    server.pages["/x"] = page(b"1")
    with WebServer(tls=authority.context("downgrading")) as sealed:
        sealed.pages["/x"] = Page(status=302, location=server.uri("x"))

        with pytest.raises(PolicyError, match=f"from https to http \\(host `{HERE}`\\)"):
            ensure(root, sealed.uri("x"), options={"verify": str(authority.file)})

    assert server.asked == []


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, SourceDeniedError),
        (403, SourceDeniedError),
        (404, SourceNotFoundError),
        (410, SourceNotFoundError),
        (400, SourceUnavailableError),
        (418, SourceUnavailableError),
    ],
)
@pytest.mark.parametrize("takes_head", [True, False])
def test_a_refusal_says_what_to_do(root, server, status, kind, takes_head):
    """
    Denied, missing and odd answers are told apart, whether they come to HEAD or only to GET.
    """
    server.pages["/x"] = Page(status=status, takes_head=takes_head, data=b"a page for people")

    with pytest.raises(kind, match=str(status)):
        backend().resolve(parse_ref(server.uri("x")))


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again(server, status):
    """
    A server that is busy or broken is left alone for as long as it says, and asked again.
    """
    server.pages["/x"] = Page(status=status, headers={"Retry-After": "1"})

    def recover(asked: webserver.Asked) -> None:
        if len(server.asked) == 3:
            server.pages["/x"] = page(b"1")

    server.before = recover
    made = backend()

    with pytest.raises(SourceUnavailableError, match=str(status)) as caught:
        made.resolve(parse_ref(server.uri("x")))
    made.tune(stall_seconds=5, retry_seconds=30)

    assert caught.value.retry_after == 1.0
    assert made.resolve(parse_ref(server.uri("x"))).size_bytes == 1


def test_a_busy_range_is_asked_for_again(root, server):
    """
    A server that answers 503 in the middle gets its time, and the download goes on.
    """
    server.pages["/weights.bin"] = whole = page(WEIGHTS)
    seen = []

    def stumble(asked: webserver.Asked) -> None:
        seen.append(asked)
        gets = [a for a in seen if a.method == "GET"]
        server.pages["/weights.bin"] = (
            Page(status=503, headers={"Retry-After": "0"}) if len(gets) == 2 and asked.method == "GET" else whole
        )

    server.before = stumble

    assert read_tree(ensure(root, server.uri("weights.bin")).path) == {"weights.bin": WEIGHTS}


def test_nobody_listens(server):
    """
    A port where nobody listens is told as such.
    """
    with pytest.raises(SourceUnavailableError, match="no connection to"):
        backend().resolve(parse_ref(server.unreachable_uri("x")))


ARCHIVES = {
    "model.zip": zipped(FILES),
    "model.tar": tar(FILES),
    "model.tar.gz": gzip.compress(tar(FILES)),
    "model.tgz": gzip.compress(tar(FILES)),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_is_what_it_holds(root, server, name):
    """
    The record names the unpacked files with the digests of what was written; of the archive nothing is left.
    """
    server.pages[f"/{name}"] = page(ARCHIVES[name])
    uri = f"{server.uri(name)}#sha256={sha256(ARCHIVES[name])}"

    model = ensure(root, uri)

    assert read_tree(model.path) == FILES
    assert [(str(f.path), f.size_bytes, f.sha256) for f in model.record.files] == [
        (n, len(d), sha256(d)) for n, d in sorted(FILES.items())
    ]
    assert (model.size_bytes, model.files, model.bytes_fetched) == (
        sum(map(len, FILES.values())),
        3,
        len(ARCHIVES[name]),
    )
    assert ModelStore(root).verify(uri, level="full").ok
    assert ModelStore(root).get(uri).path == model.path


def test_a_compressed_file_loses_its_ending(root, server):
    """
    What is compressed and no tar is one file without the ending.
    """
    server.pages["/weights.bin.gz"] = page(gzip.compress(WEIGHTS))

    assert read_tree(ensure(root, server.uri("weights.bin.gz")).path) == {"weights.bin": WEIGHTS}


def test_the_version_is_that_of_the_archive(root, server):
    """
    As long as the archive stays the same nothing is fetched, and a new one is unpacked beside.
    """
    server.pages["/model.zip"] = page(ARCHIVES["model.zip"])
    uri = server.uri("model.zip")
    first = ensure(root, uri)

    same = ensure(root, uri, refresh=True)
    server.pages["/model.zip"] = page(zipped({"other": b"1"}))
    newer = ensure(root, uri, refresh=True)

    assert (same.status, same.path) == ("present", first.path)
    assert read_tree(newer.path) == {"other": b"1"}
    assert store(root).resolve(uri).version == newer.version != first.version


def test_an_archive_can_be_kept(root, server):
    """
    With `unpack=False` an archive is a file like any other.
    """
    server.pages["/model.zip"] = page(ARCHIVES["model.zip"])

    assert read_tree(ensure(root, server.uri("model.zip"), options={"unpack": False}).path) == {
        "model.zip": ARCHIVES["model.zip"]
    }


@pytest.mark.parametrize("name", ["model.zip", "model.tar"])
def test_patterns_are_for_what_an_archive_holds(root, server, name):
    """
    Patterns choose among the members; when none is left there is no model.
    """
    server.pages[f"/{name}"] = page(ARCHIVES[name])

    assert read_tree(ensure(root, server.uri(name), allow_patterns="*.json").path) == {
        "config.json": FILES["config.json"]
    }
    with pytest.raises(SourceNotFoundError, match="the archive holds no file"):
        ensure(root, server.uri(name), allow_patterns="*.onnx")
    assert len(generations(root)) == 1


def test_without_hashing_an_archive_is_unpacked_too(root, server):
    """
    A store that was told not to hash records no digests of members.
    """
    server.pages["/model.zip"] = page(ARCHIVES["model.zip"])

    with_none = ModelStore(
        root, mode="rw", digest="none", backends={"http": HTTPBackend}, storage_options={"allow_private": True}
    )
    model = with_none.ensure(server.uri("model.zip"), progress=False)

    assert read_tree(model.path) == FILES
    assert {f.sha256 for f in model.record.files} == {None}


def link() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        planted = tarfile.TarInfo("escape")
        planted.type, planted.linkname = tarfile.SYMTYPE, "/tmp"
        archive.addfile(planted)
        archive.addfile(tarfile.TarInfo("escape/x"))
    return file.getvalue()


HOSTILE = {
    "climbing.zip": (
        zipped({"fine": b"1", "../../../../escaped": b"2"}),
        UnsafePathError,
        "climbing.zip: ../../../../escaped",
    ),
    "climbing.tar": (
        tar({"fine": b"1", "../../../../escaped": b"2"}),
        UnsafePathError,
        "climbing.tar: ../../../../escaped",
    ),
    "link.tar": (link(), UnsafePathError, "link.tar: escape"),
    "twins.tar.gz": (gzip.compress(tar({"fine": b"1", "FINE": b"2"})), UnsafePathError, "twins.tar.gz: FINE"),
    "bomb.gz": (gzip.compress(bytes(60_000_000)), PolicyError, "bomb.gz"),
    "bomb.zip": (zipped({"zeros": bytes(60_000_000)}), PolicyError, "bomb.zip"),
    "cut.tar.gz": (gzip.compress(tar(FILES))[:-100], DigestMismatchError, "cut.tar.gz"),
    "crc.zip": (
        ARCHIVES["model.zip"].replace(FILES["weights/a.bin"][1000:1010], bytes(10)),
        DigestMismatchError,
        "crc.zip: weights/a.bin",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_leaves_nothing(tmp_path, root, server, name):
    """
    The error names archive and member; nothing is published, written outside, or left behind, and the next call fetches
    anew.
    """
    data, kind, named = HOSTILE[name]
    server.pages[f"/{name}"] = page(data)

    for _ in range(2):
        before = len(server.ranges())
        with pytest.raises(kind) as caught:
            ensure(root, server.uri(name))

        assert f"`{named}`" in str(caught.value)
        assert generations(root) == []
        assert not list(root.glob(".kserve-pvc/staging/*/*"))
        assert not list(root.glob(".kserve-pvc/manifests/*"))
        assert len(server.ranges()) > before
    assert not list(tmp_path.rglob("escape*"))
    assert not Path("/tmp/x").exists()
    assert server.uri(name) not in ModelStore(root)


def test_an_archive_that_does_not_fit_is_told(root, server, monkeypatch):
    """
    When what an archive holds does not fit, the error has the bytes that are needed and those that are free, and all
    goes.
    """
    server.pages["/model.zip"] = page(zipped({"zeros": bytes(5_000_000)}))
    monkeypatch.setattr(VolumeWriter, "free_bytes", lambda self: 1_000_000)

    with pytest.raises(InsufficientSpaceError) as caught:
        ensure(root, server.uri("model.zip"))

    assert (caught.value.needed_bytes, caught.value.free_bytes) == (5_000_000, 1_000_000)
    assert generations(root) == []


def test_a_full_volume_is_told(mount, as_root, server):
    """
    A file whose length the archive does not say runs into the end of the volume, and leaves it empty.
    """
    volume = mount("-t", "tmpfs", "-o", "size=4m", "none")
    server.pages["/noise.gz"] = page(gzip.compress(bytes(15_000_000)))

    with pytest.raises(InsufficientSpaceError) as caught:
        ensure(volume, server.uri("noise.gz"))

    assert caught.value.root == str(volume)
    assert generations(volume) == []
    assert os.statvfs(volume).f_bavail * os.statvfs(volume).f_frsize > 3_000_000


def test_limits_are_options(root, server):
    """
    What an archive may hold is set by an option, whose fields are checked.
    """
    server.pages["/bomb.gz"] = page(HOSTILE["bomb.gz"][0])

    assert ensure(root, server.uri("bomb.gz"), options={"unpack_limits": {"ratio": 2000}}).size_bytes == 60_000_000
    server.pages["/model.zip"] = page(ARCHIVES["model.zip"])
    with pytest.raises(PolicyError, match="more than 2 entries"):
        ensure(root, server.uri("model.zip"), options={"unpack_limits": {"entries": 2}})
    for limits in ({"files": 1}, {"ratio": 0}, {"ratio": "2"}, {"entries": True}):
        with pytest.raises(SettingsError, match="unpack_limits"):
            HTTPBackend({"unpack_limits": limits}, environ={})


def test_unpacking_needs_little_memory(root, server):
    """
    An archive of 40 MB is unpacked piece by piece.
    """
    noise = random.Random(9).randbytes(1_000_000)
    server.pages["/model.tar.gz"] = page(
        gzip.compress(tar({f"{number}.bin": noise * 10 for number in range(4)}), compresslevel=1)
    )
    uri = server.uri("model.tar.gz")
    ready = store(root)
    ready.resolve(uri)

    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    model = ready.ensure(uri, progress=False)
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()

    assert model.size_bytes == 40_000_000
    # The server lives in this process too, and sends what it has without copying it.
    assert peak < 12_000_000


def test_a_crash_while_unpacking_costs_no_byte_of_the_source(root, server, monkeypatch):
    """
    Who takes over from a process that died while it was unpacking has the archive already.
    """
    server.pages["/model.zip"] = page(ARCHIVES["model.zip"])
    honest, written = Unpacking._write, []

    def die(self: Unpacking, member: object) -> object:
        written.append(member.path)
        if len(written) == 2:
            raise KeyboardInterrupt
        return honest(self, member)

    with monkeypatch.context() as dying:
        dying.setattr(Unpacking, "_write", die)
        with pytest.raises(KeyboardInterrupt):
            ensure(root, server.uri("model.zip"))
    left = generations(root)

    model = ensure(root, server.uri("model.zip"))

    assert len(left) == 1
    assert (model.bytes_fetched, read_tree(model.path)) == (0, FILES)
    assert generations(root) == [model.path]


def test_many_ask_and_one_fetches(root, server):
    """
    Threads that ask for one archive at once get one directory, from one download.
    """
    server.pages["/model.zip"] = page(ARCHIVES["model.zip"])
    shared, found = store(root), []
    threads = [
        threading.Thread(target=lambda: found.append(shared.ensure(server.uri("model.zip"), progress=False)))
        for _ in range(4)
    ]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(found) == 4
    assert len({model.path for model in found}) == 1
    assert sum(model.bytes_fetched for model in found) == len(ARCHIVES["model.zip"])


@pytest.mark.parametrize("status", [200, 302, 401, 403, 404, 410, 412, 416, 429, 500])
def test_secrets_are_never_shown(tmp_path, root, server, other, caplog, status):
    """
    Headers and the queries of signed places are in no error, log or file of the store, whatever goes wrong.
    """
    caplog.set_level(logging.DEBUG)
    signature = "canary-of-a-signature"
    server.pages["/weights.bin"] = Page(status=302, location=f"{other.endpoint}/x?sig={signature}")
    place = f"/x?sig={signature}"
    other.pages[place] = page(WEIGHTS)

    def turn(asked: webserver.Asked) -> None:
        if asked.method == "GET" and status != 200:
            other.pages[place] = Page(status=status, location=f"{other.endpoint}{place}", headers={"Retry-After": "0"})

    other.before = turn
    shown = ""
    try:
        made = store(root, retry_seconds=0.3, headers={HERE: {"X-Key": SECRET}})
        shown += repr(made.ensure(server.uri("weights.bin"), progress=False))
    except StoreError as error:
        shown += str(error) + repr(error) + repr(error.fields) + "".join(traceback.format_exception(error))
        shown += repr(pickle.loads(pickle.dumps(error)))
    everything = shown + caplog.text + "".join(p.read_bytes().decode("latin-1") for p in root.rglob("*") if p.is_file())

    assert shown
    assert SECRET not in everything
    assert signature not in everything


class TestHttp(BackendConformance):
    """
    The suite that every back end runs.
    """

    backend = HTTPBackend
    has_trees = False
    secrets = (SECRET,)

    @pytest.fixture
    def remote(self) -> Iterator[WebServer]:
        with WebServer(wants={"X-Key": SECRET}) as server:
            yield server


QUERY = "X-Amz-Expires=60&X-Amz-Signature=canary%2Fof+a+signature"


def test_a_signed_link_is_read_and_its_signature_is_nowhere(root, server, other, caplog):
    """
    The query is sent as it is spelled, not on to another host, and is neither stored, shown nor needed afterwards.
    """
    caplog.set_level("DEBUG")
    server.pages[f"/weights.bin?{QUERY}"] = page(WEIGHTS, takes_head=False)
    server.pages[f"/moved.bin?{QUERY}"] = page(b"", status=302, location=other.uri("there.bin"))
    other.pages["/there.bin"] = page(WEIGHTS)
    events = []
    here = ModelStore(root, mode="rw", storage_options={"allow_private": True}, on_event=events.append)
    address = server.uri("weights.bin")

    model = here.ensure(f"{address}?{QUERY}", progress=False)
    moved = here.ensure(f"{server.uri('moved.bin')}?{QUERY}", progress=False)
    with pytest.raises(SourceNotFoundError) as gone:
        here.ensure(f"{server.uri('gone.bin')}?{QUERY}", progress=False)

    assert read_tree(model.path) == {"weights.bin": WEIGHTS}
    assert read_tree(moved.path) == {"moved.bin": WEIGHTS}
    assert (model.ref.uri, here.ensure(f"{address}?{QUERY}0").status, here.ensure(address).status) == (
        address,
        "present",
        "present",
    )
    assert all("?" not in asked.path for asked in other.asked)
    shown = [str(gone.value), repr(gone.value), caplog.text, repr(events), repr(model), repr(model.record)]
    stored = [path.read_bytes().decode("latin-1") + str(path) for path in root.rglob("*") if path.is_file()]
    assert [text for text in shown + stored if "canary" in text] == []


def test_parameters_that_do_not_sign_make_other_models(root, server):
    """
    Each is fetched with its own query, several at once too, and without the link only what is present is found.
    """
    for number in (1, 2):
        server.pages[f"/get?id={number}&{QUERY}"] = page(b"%d" % number)
    here = ModelStore(root, mode="rw", storage_options={"allow_private": True})
    address = server.uri("get")

    models = [here.ensure(f"{address}?id={number}&{QUERY}", progress=False) for number in (1, 2)]

    assert [read_tree(model.path) for model in models] == [{"get": b"1"}, {"get": b"2"}]
    assert here.ensure(models[0].ref.uri).path == models[0].path
    with pytest.raises(PolicyError, match="pass the link with its query"):
        here.ensure(models[0].ref.uri, force_download=True, progress=False)


@pytest.mark.parametrize(
    ("name", "coding", "is_read"),
    [
        ("m.json.gz", "gzip", True),
        ("m.tgz", "x-gzip", True),
        ("m.tar.xz", "xz", True),
        ("m.tar.zst", "zstd", True),
        ("m.json", "gzip", False),
        ("m.tar", "gzip", False),
        ("m.xz", "gzip", False),
        ("m.gz", "gzip, gzip", False),
        ("m.gz", "br", False),
    ],
)
def test_an_encoding_that_repeats_the_name_is_none(root, server, name, coding, is_read):
    """
    Servers announce `gzip` for a file that lies there as `.gz`: its bytes are those of the file.
    """
    server.pages[f"/{name}"] = page(b"as it lies there", headers={"Content-Encoding": coding})
    here = ModelStore(root, mode="rw", storage_options={"allow_private": True, "unpack": False})

    if is_read:
        assert read_tree(here.ensure(server.uri(name), progress=False).path) == {name: b"as it lies there"}
    else:
        with pytest.raises(PolicyError, match="unasked"):
            here.ensure(server.uri(name), progress=False)
