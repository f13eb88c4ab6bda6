"""
What others send ends, and takes memory in proportion to its size: listings, pages, names.
"""

import json
import threading
import tracemalloc
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from urllib.parse import parse_qs, urlsplit

import pytest

from kserve_pvc import PolicyError, SourceUnavailableError, StoreError, StoreFormatError, UnsafePathError
from kserve_pvc._format.json_size import check_size
from kserve_pvc._format.records import FileEntry, Manifest, decode
from kserve_pvc._source.contract import RemoteFile
from kserve_pvc._source.ref import parse_ref
from kserve_pvc.backends._directories import Directories
from kserve_pvc.backends._pages import MAX_TOKEN_BYTES, PageCount
from kserve_pvc.backends._xml import is_crowded, parse_xml
from kserve_pvc.backends.azure import AzureBackend
from kserve_pvc.backends.gs import GSBackend
from kserve_pvc.backends.hf import HFBackend
from kserve_pvc.backends.s3 import S3Backend

COMMIT = "0" * 40


@contextmanager
def serving(respond):
    """
    A server whose responses a function makes of the path of the request: headers and body.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            headers, body = respond(self.path)
            self.send_response(200)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def s3_options(endpoint, **more):
    return {"endpoint_url": endpoint, "key": "k", "secret": "s", **more}


def s3_page(objects, token):
    more = f"<IsTruncated>true</IsTruncated><NextContinuationToken>{token}</NextContinuationToken>" if token else ""
    return {}, f"<ListBucketResult>{objects}{more}</ListBucketResult>".encode()


def gs_page(objects, token):
    return {}, json.dumps({"items": objects, **({"nextPageToken": token} if token else {})}).encode()


def azure_page(objects, token):
    return (
        {},
        f"<EnumerationResults><Blobs>{objects}</Blobs><NextMarker>{token}</NextMarker></EnumerationResults>".encode(),
    )


def hf_page(objects, token):
    link = {"Link": f'<http://hub/x?cursor={token}>; rel="next"'} if token else {}
    return link, json.dumps(objects).encode()


BACKENDS = {
    "s3": ("s3://bucket/m/", s3_page, "", lambda at: S3Backend(s3_options(at), {})),
    "s3-urls": (
        "s3://bucket/m/",
        s3_page,
        "",
        lambda at: S3Backend(s3_options(at, config_kwargs={"s3": {"use_arn_region": True}}), {}),
    ),
    "s3-class": (
        "s3://bucket/m/",
        s3_page,
        "",
        lambda at: S3Backend(s3_options(at, s3_additional_kwargs={"RequestPayer": "requester"}), {}),
    ),
    "gs": ("gs://bucket/m/", gs_page, [], lambda at: GSBackend({"endpoint_url": at, "token": "anon"}, {})),
    "azure": (
        "az://container/m/",
        azure_page,
        "",
        lambda at: AzureBackend({"connection_string": f"AccountName=acc;AccountKey=a2V5;BlobEndpoint={at}/acc;"}, {}),
    ),
    "hf": (f"hf://org/m@{COMMIT}", hf_page, [], lambda at: HFBackend({"endpoint": at}, {})),
}


@pytest.mark.parametrize("name", BACKENDS)
def test_a_listing_of_empty_pages_ends(name, monkeypatch):
    """
    A listing whose pages are empty, and each of which names another next one, is refused after a number of pages.
    """
    monkeypatch.setattr("kserve_pvc.backends._pages.MAX_EMPTY_PAGES", 7)
    uri, page, nothing, make = BACKENDS[name]
    numbers = count(1)

    with serving(lambda path: page(nothing, f"t{next(numbers)}")) as endpoint:
        backend = make(endpoint)
        with pytest.raises(PolicyError, match="7 empty pages in a row"):
            backend.resolve(parse_ref(uri))
        backend.close()

    assert next(numbers) == 8


@pytest.mark.parametrize("name", BACKENDS)
def test_a_page_of_very_small_values_is_refused(name):
    """
    A page that consists of elements so small that each takes a multiple of its size in memory is no listing.
    """
    uri, _, nothing, make = BACKENDS[name]
    body = b"<ListBucketResult>" + b"<a/>" * 300_000 + b"</ListBucketResult>" if nothing == "" else b"[]" * 300_000

    with serving(lambda path: ({}, body)) as endpoint:
        backend = make(endpoint)
        backend.tune(stall_seconds=30.0, retry_seconds=0.1)
        with pytest.raises(SourceUnavailableError):
            backend.resolve(parse_ref(uri))
        backend.close()


@pytest.mark.parametrize("name", ["s3", "s3-urls", "s3-class"])
def test_a_page_that_is_too_long_is_not_kept(name, monkeypatch):
    """
    Of a page that is longer than one can be no more is read, in each way of listing.
    """
    for module in ("_object_store", "_bounded_session"):
        monkeypatch.setattr(f"kserve_pvc.backends.{module}.MAX_PAGE_BYTES", 100_000)
    uri, page, _, make = BACKENDS[name]

    with serving(lambda path: page("x" * 200_000, "")) as endpoint:
        backend = make(endpoint)
        backend.tune(stall_seconds=30.0, retry_seconds=0.1)
        with pytest.raises(SourceUnavailableError, match="longer than 100000 bytes"):
            backend.resolve(parse_ref(uri))
        backend.close()


def test_pages_are_counted():
    """
    Empty pages count in a row, all pages count together, a token that comes back is a loop, and one has a length.
    """
    pages = PageCount("x://y")

    for number in range(3_000):
        pages.follow(f"t{number}", is_empty=number % 1_000 != 0)
    with pytest.raises(SourceUnavailableError, match="loops"):
        pages.follow("t7", is_empty=False)
    with pytest.raises(SourceUnavailableError, match="token of more than"):
        pages.follow("x" * (MAX_TOKEN_BYTES + 1), is_empty=False)
    for number in range(3_000, 9_999):
        pages.follow(f"t{number}", is_empty=False)
    with pytest.raises(PolicyError, match="more than 10000 pages"):
        pages.follow("last", is_empty=False)


@pytest.mark.parametrize("name", ["s3", "azure"])
def test_a_key_that_is_not_utf8_is_refused(name):
    """
    A key whose bytes are no UTF-8 is not stored under another name; the patterns may leave it out.
    """
    uri, page, _, make = BACKENDS[name]
    listed = {
        "s3": "<EncodingType>url</EncodingType>"
        "<Contents><Key>m/a%FF.bin</Key><Size>1</Size><ETag>&quot;x&quot;</ETag></Contents>"
        "<Contents><Key>m/b.bin</Key><Size>1</Size><ETag>&quot;x&quot;</ETag></Contents>",
        "azure": "".join(
            f'<Blob><Name Encoded="true">m/{key}</Name><Properties><Content-Length>1</Content-Length><Etag>x</Etag>'
            "</Properties></Blob>"
            for key in ("a%FF.bin", "b.bin")
        ),
    }[name]

    with serving(lambda path: page(listed, "")) as endpoint:
        backend = make(endpoint)
        with pytest.raises(UnsafePathError, match="not UTF-8"):
            backend.resolve(parse_ref(uri))
        found = backend.resolve(parse_ref(uri, allow_patterns="b.bin"))
        backend.close()

    assert [str(file.entry.path) for file in found.files] == ["b.bin"]


JSON_UNITS = [b"[]", b"{}", b'{"a":0}', b"[[]]", b"0", b'""', b'"ab"', b"1234567", b'{"a":{}}']
XML_UNITS = [b"<a/>", b"<a></a>", b'<a b=""/>', b"<a>b</a>", b"<a b='' c='' d=''/>", b"<a><b/></a>"]


@pytest.mark.parametrize("unit", JSON_UNITS, ids=bytes.decode)
def test_json_takes_memory_in_proportion_to_its_size(unit):
    """
    JSON that is parsed takes at most sixteen times its size, since what has more values for its size is refused.
    """
    worst = 0.0
    for blanks in range(64):
        data = b"[" + b",".join([unit + b" " * blanks] * 5_000) + b"]"
        try:
            check_size(data)
        except ValueError:
            continue
        worst = max(worst, peak_of(lambda data=data: json.loads(data)) / len(data))
        break

    assert 0 < worst <= 16


@pytest.mark.parametrize("unit", XML_UNITS, ids=bytes.decode)
def test_xml_takes_memory_in_proportion_to_its_size(unit):
    """
    XML that is parsed takes at most twenty times its size, since what has more elements for its size is refused.
    """
    worst = 0.0
    for blanks in range(200):
        data = b"<r>" + (unit + b" " * blanks) * 5_000 + b"</r>"
        if is_crowded(data):
            continue
        worst = peak_of(lambda data=data: parse_xml(data)) / len(data)
        break

    assert 0 < worst <= 20


def peak_of(act):
    act()
    tracemalloc.start()
    try:
        kept = act()
        assert kept is not None
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_large_record_of_very_small_values_is_damage():
    """
    A forged manifest that would take a multiple of its size in memory is refused before it is parsed.
    """
    data = b'{"format":1,"files":[' + b"[]," * 30_000 + b"[]]}"

    with pytest.raises(StoreFormatError, match="more values than"):
        decode(Manifest, data, "a manifest")


def test_ordinary_responses_are_not_crowded():
    """
    Records and listings of the shortest names that occur are below the bounds, also if their names look like markup.
    """
    check_size(json.dumps([{"path": ",{[:" * 50, "size_bytes": 1, "sha256": None, "token": None}] * 5_000).encode())
    check_size(json.dumps([{"path": "a", "size_bytes": 1, "sha256": None, "token": None}] * 5_000).encode())

    assert not is_crowded(
        b"<r>"
        + b"<Contents><Key>a</Key><LastModified>2020-01-01T00:00:00.000Z</LastModified><ETag>&quot;x&quot;</ETag>"
        b"<Size>1</Size><Owner><ID>a</ID><DisplayName>b</DisplayName></Owner><StorageClass>STANDARD</StorageClass>"
        b"</Contents>" * 5_000 + b"</r>"
    )
    assert not is_crowded(b"<r>" + (b"<Blob><Name>" + b"a=" * 400 + b"</Name></Blob>") * 5_000 + b"</r>")


def test_directories_of_a_listing_are_bounded(monkeypatch):
    """
    Names of very many levels are noted as deep as a file can lie, and too many directories are refused.
    """
    monkeypatch.setattr("kserve_pvc.backends._directories.MAX_LISTED_DIRECTORIES", 100)
    directories = Directories("s3://b/m")

    directories.mark("a/" * 100_000 + "x")

    assert len(directories._names) == 32
    with pytest.raises(StoreError, match="more than 100 directories"):
        directories.sift(
            RemoteFile(entry=FileEntry(path=f"{n}/x", size_bytes=1), address="", pin={}) for n in range(99)
        )


def test_a_query_of_a_listing_is_what_the_last_page_named():
    """
    Each page is requested by the token of the page before it.
    """
    asked = []

    def respond(path):
        query = parse_qs(urlsplit(path).query)
        asked.append(query.get("continuation-token", [""])[0])
        item = f"<Contents><Key>m/{len(asked)}</Key><Size>1</Size><ETag>x</ETag></Contents>"
        return s3_page(item, f"t{len(asked)}" if len(asked) < 4 else "")

    with serving(respond) as endpoint:
        backend = BACKENDS["s3"][3](endpoint)
        found = backend.resolve(parse_ref("s3://bucket/m/"))
        backend.close()

    assert (asked, len(found.files)) == (["", "t1", "t2", "t3"], 4)
