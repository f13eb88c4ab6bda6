"""
Services whose ETags identify nothing, or that have none: what else they say about an object tells versions apart.
"""

from __future__ import annotations

import re

import pytest
from trees import read_tree
from weather import Answer, StormyS3, changed
from webserver import WebServer, page

from kserve_pvc import ModelStore, RemoteFile, SourceChangedError
from kserve_pvc._source.ref import parse_ref
from kserve_pvc.backends._azure_xml import make_object
from kserve_pvc.backends._fsspec.identity import identity
from kserve_pvc.backends._google_json import parse_object
from kserve_pvc.backends._validators import bare_etag, http_date, identifies
from kserve_pvc.backends.s3 import S3Backend

DATES = ("2026-11-01T00:00:00.250Z", "2026-11-02T00:00:00.250Z")
HEADERS = ("Sun, 01 Nov 2026 00:00:00 GMT", "Mon, 02 Nov 2026 00:00:00 GMT")
# Beside plain settings: what lets botocore find the credentials, and what only calls of s3fs can carry.
MORE: dict[str, dict[str, object]] = {
    "direct": {},
    "s3fs": {"version_aware": False},
    "through": {"s3_additional_kwargs": {"ExpectedBucketOwner": "123456789012"}},
}
USELESS = ['"null"', 'W/"null"', '""', "", None, '"0"', '"d41d8cd98f00b204e9800998ecf8427e"', '"%s"' % ("0" * 32)]


class Service(StormyS3):
    """
    An S3 server that gives every object the same ETag, or none.
    """

    def __init__(self, etag: str | None) -> None:
        super().__init__(pins=False)
        self.etag = etag
        self.version = 0
        self.script("list", changed(self._relist))
        self.script("head", changed(self._redescribe))
        self.script("get", changed(self._redescribe))

    def publish(self, data: bytes, version: int) -> None:
        self.put("bkt", "m/model.bin", data)
        self.version = version

    def _relist(self, answer: Answer) -> None:
        said = "" if self.etag is None else f"<ETag>{self.etag.replace(chr(34), '&quot;')}</ETag>"
        body = re.sub(r"<ETag>.*?</ETag>", said, answer.body.decode())
        answer.body = re.sub(r"<LastModified>.*?<", f"<LastModified>{DATES[self.version]}<", body).encode()
        answer.headers["Content-Length"] = str(len(answer.body))

    def _redescribe(self, answer: Answer) -> None:
        answer.headers["ETag"] = self.etag
        answer.headers["Last-Modified"] = HEADERS[self.version]


@pytest.mark.parametrize("way", ["direct", "s3fs", "through"])
@pytest.mark.parametrize("uri", ["s3://bkt/m", "s3://bkt/m/model.bin"])
@pytest.mark.parametrize("etag", USELESS)
def test_a_refresh_sees_a_change_of_the_same_length(etag, uri, way, root):
    """
    Where the ETag identifies nothing, the date does, on every way to S3.
    """
    with Service(etag) as service:
        store = ModelStore(root, mode="rw", storage_options={**service.options, **MORE[way]})
        service.publish(b"weights-1", 0)
        before = store.ensure(uri, progress=False)
        service.publish(b"weights-2", 1)
        after = store.ensure(uri, refresh=True, progress=False)
        again = store.ensure(uri, refresh=True, progress=False)

    assert (read_tree(after.path), after.version != before.version) == ({"model.bin": b"weights-2"}, True)
    assert again.version == after.version


@pytest.mark.parametrize("way", ["direct", "s3fs", "through"])
def test_a_date_pins(way):
    """
    An object without a useful ETag that is replaced after the listing is not read.
    """
    with Service('"null"') as service:
        backend = S3Backend({**service.options, **MORE[way]})
        service.publish(b"weights-1", 0)
        (file,) = backend.resolve(parse_ref("s3://bkt/m")).files
        service.publish(b"weights-2", 1)
        with pytest.raises(SourceChangedError):
            read(backend, file)


def read(backend: S3Backend, file: RemoteFile) -> bytes:
    data, buffer = b"", memoryview(bytearray(100))
    with backend.open_range(file, 0, file.entry.size_bytes) as reader:
        while (count := reader.readinto(buffer)) != 0:
            data += buffer[: count or 0]
    return data


@pytest.mark.parametrize(("etag", "more"), [(etag, HEADERS) for etag in USELESS] + [(None, (None, None))])
def test_a_refresh_over_http_sees_it_too(etag, more, root):
    """
    The date identifies a file of the web; without a date nothing does, and then a refresh fetches it anew.
    """
    with WebServer() as server:
        store = ModelStore(root, mode="rw", storage_options={"allow_private": True})
        found = []
        for data, date in zip((b"weights-1", b"weights-2"), more, strict=True):
            server.pages["/m.bin"] = page(data, etag=etag, modified=date)
            found.append(store.ensure(f"{server.endpoint}/m.bin", refresh=True, progress=False).path)

    assert read_tree(found[1]) == {"m.bin": b"weights-2"}


def test_objects_of_azure_and_google_without_a_useful_name_are_told_apart():
    """
    A blob without ETag has its date, and an object of generation 0 its checksum.
    """
    first, second = (make_object("m.bin", 9, None, date=date) for date in HEADERS)
    assert (first.token != second.token, first.pin) == (True, {"If-Unmodified-Since": HEADERS[0]})

    said = ({"name": "m.bin", "size": "9", "generation": "0", "crc32c": crc} for crc in ("AAAAAA==", "BBBBBA=="))
    assert len({parse_object(item).token for item in said}) == 2


def test_a_file_system_of_fsspec_that_says_null_is_asked_for_the_date():
    """
    What a class says about a file identifies it by its date where the ETag does not.
    """
    assert identity({"size": 9, "ETag": '"null"', "LastModified": "today"}) == {"LastModified": "today"}
    assert identity({"size": 9, "ETag": '"abc"', "LastModified": "today"}) == {"ETag": "abc"}


@pytest.mark.parametrize("etag", ['"1"', '"00001"', '"5f3-abc"', 'W/"abc"', "0a4d55a8d778e502"])
def test_other_etags_identify(etag):
    """
    Whatever may differ between two contents is used as it is.
    """
    assert identifies(etag, 9)
    assert bare_etag(etag) == etag.removeprefix("W/").strip('"')


def test_dates_of_listings_are_those_of_headers():
    """
    A listing writes a date with fractions of a second, a header without.
    """
    assert [http_date(date) for date in (*DATES, HEADERS[0], "yesterday", None)] == [*HEADERS, HEADERS[0], None, None]
