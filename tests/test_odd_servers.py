"""
Servers that do not keep to what they announce: ranges that are not kept, bodies without a length, conditions that are
never true. Real ones of each kind exist behind proxies and mirrors; they are imitated here.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from trees import read_tree
from weather import Answer, Exchange, StormyS3, changed, error

from kserve_pvc import ModelStore, SourceChangedError, SourceUnavailableError

DATA = random.Random(15).randbytes(1_000_000)
ETAG = f'"{hashlib.md5(DATA, usedforsecurity=False).hexdigest()}"'
SHA256 = hashlib.sha256(DATA).hexdigest()
COMMIT = "a" * 40
DATE = "Sun, 22 Nov 2026 12:00:00 GMT"
FAULTS = ("200-for-a-range", "206-without-range", "chunked", "until-close")
Behaviour = Callable[[BaseHTTPRequestHandler], None]


class OddServer:
    """
    A web server and a mirror of the Hugging Face Hub whose answers with bytes are made by one function.
    """

    def __init__(self, answer: Behaviour) -> None:
        self.sent: list[str | None] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                if "/revision/" in self.path:
                    reply(self, 200, json.dumps({"id": "org/name", "sha": COMMIT}).encode())
                elif "/tree/" in self.path:
                    large = {"oid": SHA256, "size": len(DATA), "pointerSize": 130}
                    entry = {"type": "file", "oid": "b" * 40, "size": len(DATA), "path": "m.bin", "lfs": large}
                    reply(self, 200, json.dumps([entry]).encode())
                else:
                    if self.command == "GET":
                        server.sent.append(self.headers.get("Range"))
                    answer(self)

            def do_HEAD(self) -> None:
                self.do_GET()

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> OddServer:
        self._thread = Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)


def reply(
    handler: BaseHTTPRequestHandler, status: int, body: bytes = b"", *, framed: bool = True, **headers: str
) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    if framed:
        handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)


def chunks(data: bytes) -> bytes:
    pieces = (data[start : start + 70_000] for start in range(0, len(data), 70_000))
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def misbehaving(fault: str, *, length: bool = True) -> Behaviour:
    """
    Answers of one kind of fault; without `length` not even HEAD says how long the file is.
    """

    def answer(handler: BaseHTTPRequestHandler) -> None:
        asked = handler.headers.get("Range")
        common = {"ETag": ETAG, "Accept_Ranges": "bytes"}
        if handler.command == "HEAD" and length:
            reply(handler, 200, DATA, **common)
        elif fault == "206-without-range" and asked:
            start, stop = asked.removeprefix("bytes=").split("-")
            reply(handler, 206, DATA[int(start) : int(stop) + 1], ETag=ETAG)
        elif fault == "chunked":
            reply(handler, 200, chunks(DATA), framed=False, Transfer_Encoding="chunked", **common)
        elif fault == "until-close":
            handler.close_connection = True
            reply(handler, 200, DATA, framed=False, Connection="close", **common)
        else:
            reply(handler, 200, DATA, **common)

    return answer


def storm_fault(fault: str) -> Callable[[Exchange], None]:
    """
    The same faults in the answers of an S3 server.
    """

    def alter(answer: Answer) -> None:
        if fault == "206-without-range":
            answer.headers["Content-Range"] = None
            return
        answer.status, answer.body, answer.headers["Content-Range"] = 200, DATA, None
        answer.headers["Content-Length"] = str(len(DATA))
        if fault == "chunked":
            answer.body, answer.headers["Content-Length"] = chunks(DATA), None
            answer.headers["Transfer-Encoding"] = "chunked"
        elif fault == "until-close":
            answer.headers["Content-Length"], answer.headers["Connection"] = None, "close"

    return changed(alter)


@pytest.fixture
def storm() -> Iterator[StormyS3]:
    """
    An S3 server with one object.
    """
    with StormyS3() as server:
        server.put("bkt", "m.bin", DATA)
        yield server


def ensure(root, uri: str, **options: object):
    return ModelStore(root, mode="rw", part_bytes=50_000, retry_seconds=5, storage_options=options).ensure(
        uri, progress=False
    )


@pytest.mark.parametrize("scheme", ["http", "hf"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_comes_whole_whatever_is_requested_is_fetched(fault, scheme, root):
    """
    What lies before a range is skipped, and responses are continued: their number does not grow with that of ranges.
    """
    with OddServer(misbehaving(fault)) as server:
        uri = "hf://org/name" if scheme == "hf" else f"{server.endpoint}/m.bin"
        options = {"endpoint": server.endpoint} if scheme == "hf" else {"allow_private": True}
        model = ensure(root, uri, **options)

    assert read_tree(model.path) == {"m.bin": DATA}
    assert len([asked for asked in server.sent if asked != "bytes=0-0"]) <= 12


@pytest.mark.parametrize("uri", ["s3://bkt/m.bin", "s3://bkt"])
@pytest.mark.parametrize("fault", FAULTS)
def test_an_object_that_comes_whole_is_fetched(fault, uri, root, storm):
    """
    S3 behind a proxy that does not keep ranges, or sends no lengths.
    """
    storm.script("get", storm_fault(fault))

    assert read_tree(ensure(root, uri, **storm.options).path) == {"m.bin": DATA}


def test_an_attempt_that_was_cut_goes_on_where_the_server_sends_all(root, storm):
    """
    The bytes that are there are skipped in the response, not written again.
    """
    storm.script("get", lambda exchange: exchange.reply(400_000), times=1)
    storm.script("get", storm_fault("200-for-a-range"))

    assert read_tree(ensure(root, "s3://bkt/m.bin", **storm.options).path) == {"m.bin": DATA}


def test_a_description_without_a_length_is_completed_from_the_listing(root, storm):
    """
    A proxy that leaves Content-Length out of responses to HEAD does not hide an object.
    """
    storm.script("head", changed(lambda answer: answer.headers.update({"Content-Length": None})))

    assert read_tree(ensure(root, "s3://bkt/m.bin", **storm.options).path) == {"m.bin": DATA}


@pytest.mark.parametrize("fault", ["chunked", "until-close"])
def test_a_digest_makes_a_length_needless(fault, root):
    """
    A file whose server never says how long it is can be fetched if the URI tells its digest, and not without.
    """
    with OddServer(misbehaving(fault, length=False)) as server:
        model = ensure(root, f"{server.endpoint}/m.bin#sha256={SHA256}", allow_private=True)

    assert read_tree(model.path) == {"m.bin": DATA}


@pytest.mark.parametrize("more", [b"x", b"x" * 70_000])
def test_a_body_without_a_length_that_is_too_long_is_not_published(more, root, storm):
    """
    A whole response in chunks that goes on after the last byte is of other content.
    """

    def lengthen(answer: Answer) -> None:
        answer.status, answer.body = 200, chunks(DATA + more)
        answer.headers |= {"Content-Length": None, "Content-Range": None, "Transfer-Encoding": "chunked"}

    storm.script("get", changed(lengthen))

    with pytest.raises(SourceChangedError):
        ensure(root, "s3://bkt/m.bin", **storm.options)


def test_a_body_without_a_length_that_is_too_short_is_not_published(root, storm):
    """
    A response that ends with the connection, and early, is not taken for the whole.
    """

    def shorten(answer: Answer) -> None:
        answer.status, answer.body = 200, DATA[:-1]
        answer.headers |= {"Content-Length": None, "Content-Range": None, "Connection": "close"}

    storm.script("get", changed(shorten))

    with pytest.raises(SourceUnavailableError, match="ended 1 bytes early"):
        ModelStore(root, mode="rw", retry_seconds=1, storage_options=storm.options).ensure(
            "s3://bkt/m.bin", progress=False
        )


def conditional(condition: str, **headers: str) -> Behaviour:
    """
    Honest ranges from a server to which a condition is never true.
    """

    def answer(handler: BaseHTTPRequestHandler) -> None:
        asked = handler.headers.get("Range")
        if handler.headers.get(condition):
            reply(handler, 412)
        elif asked:
            start, stop = map(int, asked.removeprefix("bytes=").split("-"))
            part = f"bytes {start}-{stop}/{len(DATA)}"
            reply(handler, 206, DATA[start : stop + 1], Content_Range=part, **headers)
        else:
            reply(handler, 200, DATA, Accept_Ranges="bytes", **headers)

    return answer


@pytest.mark.parametrize(
    "behaviour",
    [
        conditional("If-Match", ETag="0a4d55a8d778e502"),
        conditional("If-Match", ETag=ETAG),
        conditional("If-Unmodified-Since", Last_Modified=DATE),
        conditional("If-Unmodified-Since", Last_Modified=DATE, ETag='W/"weak"'),
    ],
)
def test_a_condition_that_is_never_true_is_left_out(behaviour, root):
    """
    What is there is looked at once, and requested without a condition if it is what was pinned.
    """
    with OddServer(behaviour) as server:
        model = ensure(root, f"{server.endpoint}/m.bin", allow_private=True)

    assert read_tree(model.path) == {"m.bin": DATA}


@pytest.mark.parametrize("uri", ["s3://bkt/m.bin", "s3://bkt"])
@pytest.mark.parametrize("is_listed_bare", [True, False])
def test_s3_may_list_an_etag_without_quotes_and_refuse_conditions(is_listed_bare, uri, root, storm):
    """
    An ETag is sent with its quotes; where no condition is true, it is compared with that of the response only.
    """

    def strict(exchange: Exchange) -> None:
        condition = exchange.request.headers.get("if-match")
        if condition is not None and (condition != ETAG or not is_listed_bare):
            exchange.answer = error(412, "PreconditionFailed")
        exchange.reply()

    def bare(answer: Answer) -> None:
        answer.body = answer.body.replace(b"&quot;", b"")
        answer.headers["Content-Length"] = str(len(answer.body))

    storm.script("get", strict)
    if is_listed_bare:
        storm.script("list", changed(bare))

    assert read_tree(ensure(root, uri, **storm.options).path) == {"m.bin": DATA}


def test_a_change_is_still_a_change(root, storm):
    """
    412 of an object that was replaced ends the download.
    """

    def replace(exchange: Exchange) -> None:
        storm.put("bkt", "m.bin", DATA[::-1])
        exchange.answer = error(412, "PreconditionFailed")
        exchange.reply()

    storm.script("get", replace)

    with pytest.raises(SourceChangedError):
        ensure(root, "s3://bkt/m.bin", **storm.options)
