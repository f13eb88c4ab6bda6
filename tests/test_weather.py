"""
Bad weather: whatever a server or a network does, either the exact pinned bytes or one typed error, soon and once.
"""

import gzip
import math
import random
import re
import socket
import sys
import time
import traceback
from email.utils import formatdate

import pytest
from trees import read_tree
from weather import (
    ELSEWHERE,
    HERE,
    UNKNOWN_HOST,
    Answer,
    Authority,
    ForwardProxy,
    StormyS3,
    changed,
    cut,
    drip,
    error,
    first,
    listing_of,
    multipart_etag,
    refuse,
    say,
    say_for_ever,
    stall,
)

from kserve_pvc import (
    DigestMismatchError,
    InsufficientSpaceError,
    ModelStore,
    SourceChangedError,
    SourceDeniedError,
    SourceUnavailableError,
    StoreError,
    UnsafePathError,
)

# No test measures how fast something is; one that hangs is ended.
pytestmark = pytest.mark.timeout(30)

BUCKET = "models"
URI = f"s3://{BUCKET}/llama"
PART_BYTES = 100_000
BIG = "weights.bin"
FILES = {"config.json": b'{"weather": "bad"}', BIG: random.Random(7).randbytes(250_000)}
NEWER = random.Random(8).randbytes(250_000)
LARGE = random.Random(9).randbytes(17 * 2**20)

# An argument that only s3fs understands.
ONLY_S3FS = {"requester_pays": False}

# Long enough to outlast any weather that passes, and short enough not to wait for what never will.
PATIENT, HASTY = 30.0, 0.6
MAX_REQUESTS = 100
REMEDY = re.compile(r"\b(call again|retry|check|correct|ask|name|set|write|remove)\b")
SECRETS = (StormyS3.secret, StormyS3.token, "proxy-password", "leaked-signature", "Signature=", "AWS4-HMAC")
VARIABLES = (
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "NO_PROXY",
    "AWS_CA_BUNDLE",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "SSL_CERT_FILE",
)


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch):
    """
    Nothing of the machine's own proxies, certificates and credentials counts.
    """
    for name in (*VARIABLES, *map(str.lower, VARIABLES), "SSL_CERT_DIR", "AWS_PROFILE", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def storm():
    """
    A server that holds the model, with ETags that are no digests: nothing but care notices a wrong byte.
    """
    with StormyS3() as server:
        fill(server)
        yield server


def fill(server: StormyS3, files=FILES, **arguments) -> None:
    for name, data in files.items():
        server.put(BUCKET, f"llama/{name}", data, **{"etag": multipart_etag(data), **arguments})


def make_store(root, server: StormyS3, *, patience: float = PATIENT, **arguments) -> ModelStore:
    settings = {
        "storage_options": server.options,
        "part_bytes": PART_BYTES,
        "stall_seconds": 0.3,
        "retry_seconds": patience,
    }
    return ModelStore(root, mode="rw", **{**settings, **arguments})


def check_failure(failure: StoreError, store: ModelStore, server: StormyS3, *, uri: str = URI, files=FILES) -> None:
    """
    Check all that holds after any failure: what is said, what is not said, what is visible, and that it is not for
    ever.
    """
    said = "".join(traceback.format_exception(failure)) + repr(failure) + repr(failure.fields)
    assert [secret for secret in SECRETS if secret in said] == []
    # A digest and a name belong to a file; everything else is about the URI.
    assert (uri if hasattr(failure, "uri") else BIG) in str(failure) or isinstance(failure, UnsafePathError)
    assert REMEDY.search(str(failure)) or isinstance(failure, UnsafePathError)
    assert (uri in store, store.list()) == (False, [])
    assert len(server.requests) <= MAX_REQUESTS

    server.clear()
    # The failing store may have been made hasty; a slow machine is not the weather's fault.
    model = make_store(store.root, server).ensure(uri, progress=False)

    assert read_tree(model.path) == files


def same_range(one, other) -> bool:
    """
    Whether a request asks for the first byte that another one was refused.
    """
    return one.key == other.key and one.range is not None and one.range[0] <= other.range[0] < one.range[1]


def head_of(body_bytes: int, *lines: str) -> bytes:
    return "\r\n".join(["HTTP/1.1 206 Partial Content", *lines, f"Content-Length: {body_bytes}", "", ""]).encode()


def with_headers(**headers: str | None):
    """
    The answer with some headers changed, or without them.
    """
    return changed(
        lambda answer: answer.headers.update({name.replace("_", "-"): value for name, value in headers.items()})
    )


def shifted(answer: Answer) -> None:
    """A range that begins one byte later than the one that was asked for."""
    start, last, total = map(int, re.findall(r"\d+", answer.headers["Content-Range"]))
    answer.headers["Content-Range"] = f"bytes {start + 1}-{last + 1}/{total}"


def of_another_size(answer: Answer) -> None:
    answer.headers["Content-Range"] = answer.headers["Content-Range"].replace("/250000", "/250001")


def shorter(answer: Answer) -> None:
    """An answer that announces fewer bytes than its own range has."""
    answer.body = answer.body[:-1000]
    answer.headers["Content-Length"] = str(len(answer.body))


def compressed(answer: Answer) -> None:
    answer.body = gzip.compress(answer.body)
    answer.headers |= {"Content-Length": str(len(answer.body)), "Content-Encoding": "gzip"}


def chunked(*, size: int = 7000, broken_after: int | None = None):
    """
    The body in chunks, which end after so many bytes and never end if that is 0.
    """

    def act(exchange) -> None:
        body = exchange.answer.body
        exchange.answer.headers |= {"Content-Length": None, "Transfer-Encoding": "chunked"}
        exchange.answer.body = b""
        exchange.reply()
        for start in range(0, len(body), size):
            piece = body[start : start + size]
            exchange.send(b"%x;weather=bad\r\n" % len(piece))
            exchange.send_body(piece)
            exchange.send(b"\r\n")
            if broken_after is not None and start >= broken_after:
                exchange.send(b"1b5")
                exchange.wait()
        exchange.send(b"0\r\nX-Trailer: yes\r\n\r\n")

    return act


def whole(exchange) -> None:
    """The whole object, whichever range was asked for."""
    data = exchange.storm.buckets[BUCKET][exchange.request.key].data
    exchange.answer.status, exchange.answer.body = 200, data
    exchange.answer.headers |= {"Content-Length": str(len(data)), "Content-Range": None}
    exchange.reply()


def until_the_end(exchange) -> None:
    """A body without a length, which ends with the connection, and here ends early."""
    exchange.answer.headers |= {"Content-Length": None}
    exchange.reply(len(exchange.answer.body) - 1000)
    exchange.hang_up()


def followed_by(surplus: bytes):
    """
    More bytes than were announced, in one piece with the last ones, on a connection that stays open.
    """

    def act(exchange) -> None:
        exchange.reply(len(exchange.answer.body) - 10)
        exchange.send(exchange.answer.body[-10:] + surplus)

    return act


def another_answer(exchange) -> None:
    """An answer that nobody asked for, made to pass for the next one on this connection."""
    size = len(exchange.storm.buckets[BUCKET][exchange.request.key].data)
    start, stop = exchange.request.range
    last = min(2 * stop - start, size)
    lines = [f"ETag: {exchange.answer.headers['ETag']}", f"Content-Range: bytes {stop}-{last - 1}/{size}"]
    wrong = bytes(max(0, last - stop))
    followed_by(head_of(len(wrong), *lines) + wrong)(exchange)


def served_once(exchange) -> None:
    """A server that closes a connection after each answer, without having said so."""
    exchange.reply()
    exchange.hang_up()


def deaf_to_the_second(exchange) -> None:
    """A server that has closed an idle connection at the moment in which it is used again."""
    if exchange.request.turn > 1:
        exchange.hang_up(hard=True)
    exchange.reply()


def of_http_1_0(exchange) -> None:
    """An answer of the old kind, which ends with its connection."""
    say(exchange.answer.head.replace(b"HTTP/1.1", b"HTTP/1.0") + exchange.answer.body)(exchange)


def endless_refusal(exchange) -> None:
    """An error whose explanation does not end."""
    exchange.send(b"HTTP/1.1 500 Weather\r\nContent-Length: 999999999999\r\n\r\n")
    say_for_ever(b"x" * 65536)(exchange)


def preceded_by(interim: bytes):
    def act(exchange) -> None:
        exchange.send(interim)
        exchange.reply()

    return act


PASSING = {
    "reset-in-body": (cut(20_000, hard=True), 6),
    "closed-in-body": (cut(20_000), 6),
    "reset-at-once": (cut(0, hard=True), 2),
    "closed-before-answer": (say(b""), 2),
    "closed-in-head": (say(b"HTTP/1.1 206 Partial Content\r\nContent-Le"), 2),
    "silent-in-body": (stall(20_000), 2),
    "silent-before-answer": (say(b"", then="wait"), 2),
    "silent-in-head": (say(b"HTTP/1.1 206 Part", then="wait"), 2),
    "500": (refuse(500, "InternalError"), 1),
    "502-html": (refuse(502, "BadGateway", body=b"<html><b>bad gateway</html>"), 2),
    "503-slow-down": (refuse(503, "SlowDown"), 2),
    "504": (refuse(504, "GatewayTimeout"), 1),
    "429": (refuse(429, "TooManyRequests"), 1),
    "retry-after-nonsense": (refuse(503, "SlowDown", Retry_After="-1e9 hours"), 1),
    "garbage": (say(b"\x16\x03\x01 what?\r\n\r\n" + bytes(1000)), 2),
    "endless-head": (say_for_ever(b"X-Weather: bad\r\n" * 4000), 1),
    "endless-line": (say_for_ever(b"HTTP/1.1 200 " + b"x" * 65536), 1),
    "other-range": (changed(shifted), 1),
    "whole-object": (whole, 1),
    "shorter-than-its-range": (changed(shorter), 1),
    "silent-in-chunk": (chunked(broken_after=21_000), 1),
    "closed-without-length": (until_the_end, 1),
}


@pytest.mark.parametrize(("act", "times"), PASSING.values(), ids=PASSING)
def test_weather_that_passes_costs_nothing_but_time(root, storm, act, times):
    """
    What goes wrong a few times with the ranges of a file is mended, and every byte is exact.
    """
    storm.script("get", act, times=times, key=BIG)

    model = make_store(root, storm).ensure(URI, progress=False)

    assert (read_tree(model.path), model.bytes_fetched) == (FILES, sum(map(len, FILES.values())))


PASSING_BEFORE = ["closed-before-answer", "silent-before-answer", "500", "503-slow-down", "429", "garbage"]


@pytest.mark.parametrize("name", PASSING_BEFORE)
@pytest.mark.parametrize("kind", ["list", "head"])
def test_weather_before_the_first_byte_passes_too(root, storm, kind, name):
    """
    Listing a model is tried again like reading it.
    """
    storm.script(kind, PASSING[name][0], times=1)

    assert read_tree(make_store(root, storm).ensure(URI, progress=False).path) == FILES


@pytest.mark.parametrize("act", [cut(100), cut(100, hard=True), stall(100)], ids=["closed", "reset", "silent"])
def test_a_listing_that_breaks_off_is_read_again(root, storm, act):
    """
    A page of a listing of which only a part came is never taken for all of it.
    """
    storm.page_keys = 1
    storm.script("list", act, times=2)

    assert read_tree(make_store(root, storm).ensure(URI, progress=False).path) == FILES


@pytest.mark.parametrize("digest", ["sha256", "none"])
@pytest.mark.parametrize("act", [cut(8_000), stall(8_000)], ids=["closed", "silent"])
def test_what_arrived_is_never_asked_for_again(root, storm, act, digest):
    """
    However often a body breaks off, another connection goes on with the byte that was missing: each byte is sent once.

    Even if all six bodies belong to the last part, which is the smallest, each of them breaks off.
    """
    storm.script("get", act, times=6, key=BIG)

    model = make_store(root, storm, digest=digest).ensure(URI, progress=False)

    broken = [r for r in storm.requests if r.key.endswith(BIG) and r.body_bytes == 8_000]
    taken_over = [
        next(r for r in storm.requests if r.number > b.number and r.range and r.range[0] == b.range[0] + 8_000)
        for b in broken
    ]
    assert read_tree(model.path) == FILES
    assert sum(r.body_bytes for r in storm.requests if r.kind == "get") == sum(map(len, FILES.values()))
    assert [(len(broken), r.connection != b.connection) for b, r in zip(broken, taken_over, strict=True)] == [
        (6, True)
    ] * 6


HARMLESS = {
    "100-continue": preceded_by(b"HTTP/1.1 100 Continue\r\n\r\n"),
    "103-early-hints": preceded_by(b"HTTP/1.1 103 Early Hints\r\nLink: </x>; rel=preload\r\nContent-Length: 7\r\n\r\n"),
    "chunked": chunked(),
    "chunks-of-one-byte": chunked(size=1),
    "connection-close": with_headers(Connection="close"),
    "surplus-bytes": followed_by(b"surplus"),
    "surplus-answer": another_answer,
    "odd-case": changed(lambda answer: answer.headers.update({"ETag": None, "eTAG": answer.headers["ETag"] + "  "})),
}


@pytest.mark.parametrize("act", HARMLESS.values(), ids=HARMLESS)
def test_unusual_answers_are_understood(root, storm, act):
    """
    What HTTP allows and few servers do gives the exact bytes, and what follows an answer is not taken for the next one.
    """
    files = {"a": FILES[BIG][:3000], "b": FILES[BIG][:2000]}
    storm.buckets.clear()
    fill(storm, files)
    storm.script("get", act)

    assert read_tree(make_store(root, storm, part_bytes=1000).ensure(URI, progress=False).path) == files


@pytest.mark.parametrize("act", [served_once, deaf_to_the_second])
def test_a_connection_that_the_server_has_closed_is_no_failure(root, storm, act):
    """
    A kept connection that turns out to be closed is replaced: each range is answered once, and nobody waits or counts
    it.
    """
    storm.script("get", act)

    model = make_store(root, storm, part_bytes=10_000, patience=HASTY).ensure(URI, progress=False)

    answered = sorted((r.key, r.range) for r in storm.requests if r.kind == "get" and r.status is not None)
    assert read_tree(model.path) == FILES
    assert answered == sorted(set(answered))


def test_a_slow_answer_is_no_failure(root, storm):
    """
    A small answer that comes byte by byte, head included, is slow and not broken.
    """
    storm.script("get", drip(0.0005), key="config.json")

    model = make_store(root, storm, stall_seconds=10).ensure(URI, progress=False)

    assert read_tree(model.path) == FILES
    assert len([r for r in storm.requests if r.kind == "get" and r.key.endswith("config.json")]) == 1


@pytest.mark.parametrize("head", [True, False], ids=["from-the-head-on", "in-the-body"])
def test_a_trickle_does_not_hold_a_download_up(root, storm, head):
    """
    A connection on which 20 bytes a second arrive is as good as dead: the range is asked for on another one.
    """
    storm.script("get", drip(0.05, head=head), times=2, key=BIG)

    assert read_tree(make_store(root, storm).ensure(URI, progress=False).path) == FILES


DOUBTFUL = {
    "whole-object": whole,
    "no-range": with_headers(Content_Range=None),
    "no-length": with_headers(Content_Length=None, Connection="close"),
    "two-lengths": with_headers(Content_Length="100000\r\nContent-Length: 7"),
    "length-and-chunks": with_headers(Transfer_Encoding="chunked"),
    "nonsense-length": with_headers(Content_Length="+100000"),
    "shorter-than-its-range": changed(shorter),
    "gzip": changed(compressed),
    "said-to-be-gzip": with_headers(Content_Encoding="gzip"),
    "surplus-bytes": followed_by(b"surplus"),
    "surplus-answer": another_answer,
    "line-of-1-mib": with_headers(X_Weather="x" * 2**20),
    "continued-line": with_headers(X_Weather="bad\r\n and worse\r\n\tand worse"),
    "name-with-blank": with_headers(**{"Content_Length ": "7"}),
    "http-1.0": of_http_1_0,
}


@pytest.mark.parametrize("act", DOUBTFUL.values(), ids=DOUBTFUL)
def test_doubtful_answers_give_exact_bytes_or_none(root, storm, act):
    """
    Where an answer can be read in two ways, nothing but the pinned bytes becomes visible: exact, or a typed error.
    """
    # Alone, so that nothing but its own next range can be answered wrongly.
    storm.delete(BUCKET, "llama/config.json")
    storm.script("get", act)
    store = make_store(root, storm, patience=HASTY)

    try:
        model = store.ensure(URI, progress=False, max_workers=1)
    except SourceUnavailableError as failure:
        check_failure(failure, store, storm, files={BIG: FILES[BIG]})
    else:
        assert read_tree(model.path) == {BIG: FILES[BIG]}


LASTING = {
    "silent-before-answer": (say(b"", then="wait"), SourceUnavailableError),
    "silent-in-head": (say(b"HTTP/1.1 206 Part", then="wait"), SourceUnavailableError),
    "silent-in-body": (stall(0), SourceUnavailableError),
    "silent-in-chunk": (chunked(size=1, broken_after=0), SourceUnavailableError),
    "reset": (cut(0, hard=True), SourceUnavailableError),
    "closed": (say(b""), SourceUnavailableError),
    "garbage": (say(b"\x16\x03\x01 what?\r\n\r\n" + bytes(1000)), SourceUnavailableError),
    "endless-head": (say_for_ever(b"X-Weather: bad\r\n" * 4000), SourceUnavailableError),
    "endless-line": (say_for_ever(b"HTTP/1.1 200 " + b"x" * 65536), SourceUnavailableError),
    "endless-interim": (say_for_ever(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000), SourceUnavailableError),
    "slow-endless-head": (drip(0.05), SourceUnavailableError),
    "503": (refuse(503, "SlowDown"), SourceUnavailableError),
    "503-come-back-tomorrow": (refuse(503, "SlowDown", Retry_After="86400"), SourceUnavailableError),
    "500": (refuse(500, "InternalError"), SourceUnavailableError),
    "500-endless": (endless_refusal, SourceUnavailableError),
    "304": (refuse(304, "NotModified", body=b""), SourceUnavailableError),
    "204": (refuse(204, "NoContent", body=b""), SourceUnavailableError),
    "other-range": (changed(shifted), SourceUnavailableError),
    "other-size": (changed(of_another_size), (SourceUnavailableError, SourceChangedError)),
    "403": (refuse(403, "AccessDenied"), SourceDeniedError),
    "403-expired": (refuse(403, "ExpiredToken"), SourceDeniedError),
    "400-expired": (refuse(400, "ExpiredToken"), SourceDeniedError),
    "401": (refuse(401, "Unauthorized", body=b""), SourceDeniedError),
}


@pytest.mark.parametrize(("act", "expected"), LASTING.values(), ids=LASTING)
def test_weather_that_stays_is_one_typed_error(root, storm, act, expected):
    """
    A source that stays broken from its second range on ends the call with one error, after a bounded number of
    requests.
    """
    storm.script("get", act, skip=1, key=BIG)
    store = make_store(root, storm, patience=HASTY)

    with pytest.raises(expected) as caught:
        store.ensure(URI, progress=False)

    # Whatever does not end is not read for long: a head has a limit, and what follows it waits in the buffers of the
    # network.
    assert max(r.sent_bytes for r in storm.requests) < 32 * 2**20
    check_failure(caught.value, store, storm)


@pytest.mark.parametrize("name", ["closed-in-body", "silent-in-body", "503-slow-down", "other-range"])
def test_weather_passes_for_signed_urls_too(root, storm, name):
    """
    Where only botocore knows how to sign, ranges are mended in the same way.
    """
    act, times = PASSING[name]
    storm.script("get", act, times=times, key=BIG)

    assert (
        read_tree(
            make_store(root, storm, storage_options={**storm.options, **ONLY_S3FS}).ensure(URI, progress=False).path
        )
        == FILES
    )


@pytest.mark.parametrize("name", ["silent-in-body", "garbage", "403-expired", "400-expired", "other-range"])
def test_an_error_holds_no_signed_url(root, storm, name):
    """
    Where only botocore knows how to sign, the signature is part of the URL, and no error shows it.
    """
    act, expected = LASTING[name]
    storm.script("get", act, skip=1, key=BIG)
    store = make_store(root, storm, storage_options={**storm.options, **ONLY_S3FS}, patience=HASTY)

    with pytest.raises(expected) as caught:
        store.ensure(URI, progress=False)

    check_failure(caught.value, store, storm)


LASTING_BEFORE = ["silent-before-answer", "closed", "garbage", "endless-head", "503", "500", "403", "401"]


@pytest.mark.parametrize("name", LASTING_BEFORE)
@pytest.mark.parametrize("kind", ["list", "head"])
def test_a_source_that_cannot_be_listed_is_one_typed_error(root, storm, kind, name):
    """
    A model that cannot be listed is reported in the same way as one that cannot be read.
    """
    act, expected = LASTING[name]
    storm.script(kind, act)
    # Whoever may not look at single objects may list them, so then only both together mean denied.
    storm.script("list", act)
    store = make_store(root, storm, patience=HASTY)

    with pytest.raises(expected) as caught:
        store.ensure(URI, progress=False)

    check_failure(caught.value, store, storm)


@pytest.mark.parametrize("status", [429, 503])
def test_no_range_is_asked_for_before_retry_after(root, storm, status):
    """
    A server that asks to be left alone for a second is left alone with that range for a second, and then asked again.
    """
    storm.script("get", refuse(status, "SlowDown", Retry_After="1"), times=2, key=BIG)

    model = make_store(root, storm).ensure(URI, progress=False)

    refused = [r for r in storm.requests if r.status == status]
    again = [next(r for r in storm.requests if r.number > one.number and same_range(r, one)) for one in refused]
    assert (read_tree(model.path), len(refused)) == (FILES, 2)
    assert [
        one for one, next_one in zip(refused, again, strict=True) if next_one.arrived_at < one.answered_at + 1.0
    ] == []


def test_retry_after_may_be_a_date(root, storm):
    """
    A moment to come back at is waited for like a number of seconds.
    """
    moment = math.ceil(time.time()) + 1
    arrivals = []

    def busy_until_then(exchange) -> None:
        arrivals.append(time.time())
        if len(arrivals) == 1:
            exchange.answer = error(503, "SlowDown")
            exchange.answer.headers["Retry-After"] = formatdate(moment, usegmt=True)
        exchange.reply()

    storm.script("get", busy_until_then, key="config.json")

    assert read_tree(make_store(root, storm).ensure(URI, progress=False).path) == FILES
    assert [arrival >= moment for arrival in arrivals] == [False, True]


@pytest.mark.parametrize("announced", ["etag", "SHA256", "CRC32"])
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0], ids=["first", "middle", "last"])
def test_wrong_bytes_of_the_right_length_are_noticed(root, storm, announced, place):
    """
    Where the source announced a digest, one wrong bit fails the call, and nothing of it is used by the next one.
    """
    # An ETag is compared where that is soon done; a checksum is worth a request of its own only for a large object.
    data = FILES[BIG] if announced == "etag" else LARGE
    files = {**FILES, BIG: data}
    evidence = {} if announced == "etag" else {"etag": multipart_etag(data), "checksums": [announced]}
    storm.put(BUCKET, f"llama/{BIG}", data, **evidence)
    storm.script("get", flipped(int(place * (len(data) - 1))), key=BIG)
    store = make_store(root, storm, patience=HASTY, part_bytes=len(data) // 3)

    with pytest.raises(DigestMismatchError) as caught:
        store.ensure(URI, progress=False)

    check_failure(caught.value, store, storm, files=files)


def flipped(place: int):
    """
    One bit of the object flipped, in whichever range it comes.
    """

    def act(exchange) -> None:
        body, start = bytearray(exchange.answer.body), (exchange.request.range or (0, 0))[0]
        if start <= place < start + len(body):
            body[place - start] ^= 1
        exchange.answer.body = bytes(body)
        exchange.reply()

    return act


def and_then(event):
    """
    Let something happen in the bucket as soon as the answer is complete, but before it is sent.
    """

    def act(exchange) -> None:
        event()
        exchange.reply()

    return act


MOMENTS = {
    "after-the-listing": lambda storm, event: storm.script("list", and_then(event), times=1),
    "before-the-first-range": lambda storm, event: storm.script("get", first(event), times=1, key=BIG),
    "between-two-ranges": lambda storm, event: storm.script("get", first(event), times=1, key=BIG, skip=1),
    "inside-a-range": lambda storm, event: storm.script("get", cut_and_then(event), times=1, key=BIG),
}


def cut_and_then(event):
    """
    Break off inside a body and let something happen in the bucket before the rest is asked for.
    """

    def act(exchange) -> None:
        event()
        cut(20_000)(exchange)

    return act


@pytest.mark.parametrize(
    ("pins", "digest"), [(True, "sha256"), (False, "none")], ids=["if-match", "no-if-match-no-digest"]
)
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("change", ["replaced", "grown", "deleted"])
def test_an_object_that_changes_is_never_mixed(root, storm, change, moment, pins, digest):
    """
    An object that is replaced or deleted under a download fails it, even if the server ignores the condition and only
    its ETag tells; the next call has the new bytes and no others.
    """
    newer = {"replaced": NEWER, "grown": NEWER + b"more"}.get(change)
    key = f"llama/{BIG}"
    event = (
        (lambda: storm.delete(BUCKET, key))
        if newer is None
        else (lambda: storm.put(BUCKET, key, newer, etag=multipart_etag(newer)))
    )
    storm.pins = pins
    MOMENTS[moment](storm, event)
    store = make_store(root, storm, digest=digest)

    with pytest.raises(SourceChangedError) as caught:
        store.ensure(URI, progress=False, max_workers=1)

    files = {name: data for name, data in {**FILES, BIG: newer}.items() if data is not None}
    assert caught.value.path == BIG
    check_failure(caught.value, store, storm, files=files)


@pytest.mark.parametrize("change", ["replaced", "deleted"])
def test_a_large_object_that_changes_is_never_mixed(root, storm, change):
    """
    An object that changes between its listing and the question for its checksum has changed like any other.
    """
    key = f"llama/{BIG}"
    storm.put(BUCKET, key, LARGE, etag=multipart_etag(LARGE))
    storm.script("list", and_then(lambda: storm.delete(BUCKET, key) if change == "deleted" else fill(storm)), times=1)
    store = make_store(root, storm, patience=HASTY, part_bytes=8 * 2**20)

    with pytest.raises(SourceChangedError) as caught:
        store.ensure(URI, progress=False)

    check_failure(
        caught.value,
        store,
        storm,
        files={name: data for name, data in FILES.items() if change != "deleted" or name != BIG},
    )


def test_a_denial_in_between_is_never_a_hole(root, storm):
    """
    A single range that is denied once ends the call or is requested again; no file is ever short of it.
    """
    storm.script("get", refuse(403, "RequestTimeTooSkewed"), times=1, skip=1, key=BIG)
    store = make_store(root, storm)

    try:
        model = store.ensure(URI, progress=False)
    except (SourceDeniedError, SourceUnavailableError) as failure:
        check_failure(failure, store, storm)
    else:
        assert read_tree(model.path) == FILES


@pytest.fixture(scope="session")
def connected():
    """
    Every address that this process connects to.
    """
    addresses = []
    sys.addaudithook(lambda event, arguments: addresses.append(arguments[1]) if event == "socket.connect" else None)
    return addresses


@pytest.mark.parametrize("place", ["another host", "another port", "metadata", "file"])
@pytest.mark.parametrize("status", [301, 307])
@pytest.mark.parametrize("kind", ["list", "get"])
def test_no_redirect_is_followed(root, storm, connected, kind, status, place):
    """
    An answer that points to another address, be it internal or a file, is one typed error, and nobody connects to it.
    """
    host = ELSEWHERE if place == "another host" else HERE
    with StormyS3(host=host) as elsewhere:
        fill(elsewhere)
        base = {"metadata": "http://169.254.169.254/latest/meta-data", "file": "file:///etc/passwd"}.get(
            place, elsewhere.endpoint
        )
        act = refuse(status, "TemporaryRedirect", Location=f"{base}/{BUCKET}/llama?X-Amz-Signature=leaked-signature")
        storm.script(kind, act, key=BIG if kind == "get" else "")
        store = make_store(root, storm, patience=HASTY)
        connected.clear()

        with pytest.raises(SourceUnavailableError) as caught:
            store.ensure(URI, progress=False)

        assert {address[:2] for address in connected} == {storm.address}
        assert elsewhere.requests == []
    check_failure(caught.value, store, storm)


@pytest.mark.parametrize("status", [301, 307])
def test_a_description_that_is_redirected_is_requested_again_and_not_elsewhere(root, storm, connected, status):
    """
    HEAD has no body that could say why, so that GET decides; where the response points to is not connected to.
    """
    with StormyS3(host=ELSEWHERE) as elsewhere:
        fill(elsewhere)
        target = f"{elsewhere.endpoint}/{BUCKET}/llama"
        storm.script("head", refuse(status, "TemporaryRedirect", Location=target))
        connected.clear()

        model = make_store(root, storm, patience=HASTY).ensure(URI, progress=False)

        assert {address[:2] for address in connected} == {storm.address}
        assert elsewhere.requests == []
    assert read_tree(model.path) == FILES


SMALL = "llama/config.json"


def listed(
    *keys: str,
    size: object = len(FILES["config.json"]),
    etag: str = f'"{multipart_etag(FILES["config.json"])}"',
    more: str = "",
) -> str:
    """
    The inside of a listing, with what comes after it.
    """
    rest = f"<IsTruncated>{'true' if more else 'false'}</IsTruncated>{more}"
    found = "".join(f"<Contents><Key>{key}</Key><ETag>{etag}</ETag><Size>{size}</Size></Contents>" for key in keys)
    return found + rest


LAUGHS = (
    "<!DOCTYPE l [<!ENTITY a0 'ha'>" + "".join(f"<!ENTITY a{n} '{f'&a{n - 1};' * 10}'>" for n in range(1, 11)) + "]>"
)
AGAIN = "<NextContinuationToken>again</NextContinuationToken>"
LISTINGS = {
    "cut-off": listing_of(listed(SMALL)).body[:-30],
    "nothing": b"",
    "html": b"<html><body>Welcome to this hotel's network!</body></html>",
    "json": b'{"Contents": []}',
    "another-root": b"<ListAllMyBucketsResult><Buckets/></ListAllMyBucketsResult>",
    "laughs": listing_of(listed("llama/&a10;"), LAUGHS).body,
    "entity": listing_of(listed("llama/&x;"), "<!DOCTYPE x [<!ENTITY x 'y'>]>").body,
    "file-as-entity": listing_of(listed("llama/&x;"), "<!DOCTYPE x [<!ENTITY x SYSTEM 'file:///etc/hostname'>]>").body,
    "foreign-definition": listing_of(listed(SMALL), f"<!DOCTYPE x SYSTEM 'http://{ELSEWHERE}/x.dtd'>").body,
    "not-utf-8": listing_of(listed(SMALL)).body.replace(b"config", b"\xff\xfe"),
    "outside-the-prefix": listing_of(listed("secret/x")).body,
    "no-size": listing_of("<Contents><Key>llama/config.json</Key><ETag>x</ETag></Contents>").body,
    "nonsense-size": listing_of(listed(SMALL, size="many")).body,
    "size-below-0": listing_of(listed(SMALL, size=-1)).body,
    "no-etag": listing_of("<Contents><Key>llama/config.json</Key><Size>3</Size></Contents>").body,
    "same-page-for-ever": listing_of(listed(SMALL, more=AGAIN)).body,
    "no-way-on": listing_of(listed(SMALL, more=" ")).body,
    "empty-pages-for-ever": listing_of(listed(more=AGAIN)).body,
}


@pytest.mark.parametrize("body", LISTINGS.values(), ids=LISTINGS)
def test_a_listing_that_makes_no_sense_is_refused(root, storm, connected, body):
    """
    A listing that is cut off, lies, repeats itself or has entities is refused; nothing is expanded, opened or loaded
    for it.
    """
    storm.script("list", refuse(200, "", body=body))
    store = make_store(root, storm, patience=HASTY)
    connected.clear()

    with pytest.raises(SourceUnavailableError) as caught:
        store.ensure(URI, progress=False)

    assert {address[:2] for address in connected} == {storm.address}
    check_failure(caught.value, store, storm)


@pytest.mark.parametrize("size", [19, 10**15, 10**30])
def test_a_listing_with_a_false_size_is_refused(root, storm, size):
    """
    A size that is not that of the object is found out, however large it is said to be; no file is longer or shorter
    than listed.
    """
    storm.script("list", refuse(200, "", body=listing_of(listed(SMALL, size=size)).body))
    store = make_store(root, storm, patience=HASTY)

    with pytest.raises((SourceUnavailableError, SourceChangedError, InsufficientSpaceError)) as caught:
        store.ensure(URI, progress=False)

    assert (REMEDY.search(str(caught.value)) is not None, store.list(), len(storm.requests) <= MAX_REQUESTS) == (
        True,
        [],
        True,
    )
    storm.clear()
    assert read_tree(store.ensure(URI, progress=False).path) == FILES


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/../x", "a//../x", "./x", "..", "a/..", "a&#10;b", "a\\..\\x"])
@pytest.mark.parametrize("spelling", ["plain", "encoded"])
def test_a_listing_with_names_that_leave_their_place_is_refused(root, storm, name, spelling):
    """
    A name that would leave the model, in whichever spelling, is refused before anything is written.
    """
    key = (
        f"llama/{name}"
        if spelling == "plain"
        else "llama/" + "".join(f"%{byte:02x}" for byte in name.replace("&#10;", "\n").encode())
    )
    coding = "" if spelling == "plain" else "<EncodingType>url</EncodingType>"
    answer = refuse(200, "", body=listing_of(coding + listed(key)).body)

    def act(exchange) -> None:
        # A server spells names in this way only for those who ask for it.
        (answer if spelling == "plain" or "encoding-type" in exchange.request.query else refuse(404, "NoSuchBucket"))(
            exchange
        )

    storm.script("list", act)
    store = make_store(root, storm, patience=HASTY)

    if spelling == "encoded" and "encoding-type" not in _query_of_a_listing(store, storm):
        pytest.skip("names are not asked for in this spelling")
    with pytest.raises(UnsafePathError) as caught:
        store.ensure(URI, progress=False)

    check_failure(caught.value, store, storm)


def _query_of_a_listing(store: ModelStore, storm: StormyS3):
    with pytest.raises(StoreError):
        store.resolve(URI)
    return next(r.query for r in storm.requests if r.kind == "list")


def test_names_are_decoded_once(root, storm):
    """
    A name that looks encoded is that name, whether or not the server spells names in that way.
    """
    files = {"a%2e%2e%2fb": b"1", "a+b": b"2", "a%252Fb": b"3", "ümläut &amp;": b"4"}
    storm.buckets.clear()
    fill(storm, files)

    assert read_tree(make_store(root, storm).ensure(URI, progress=False).path) == files


@pytest.fixture(scope="session")
def authority(tmp_path_factory):
    """
    An authority that only those trust who are told to.
    """
    try:
        return Authority(tmp_path_factory.mktemp("authority"))
    except FileNotFoundError:
        pytest.skip("`openssl` is not installed")


@pytest.fixture(scope="session")
def tls(authority):
    """
    A server's side of TLS that is in order.
    """
    return authority.context("good")


@pytest.mark.parametrize("case", ["unknown authority", "another host", "expired"])
def test_a_certificate_that_proves_nothing_is_named_at_once(root, monkeypatch, authority, tls, case):
    """
    Who cannot prove to be the endpoint gets no request; the error speaks of the certificate, and nothing is tried
    again.
    """
    context = {
        "another host": lambda: authority.context("other", "DNS:elsewhere.invalid"),
        "expired": lambda: authority.context("old", expired=True),
    }
    if case != "unknown authority":
        monkeypatch.setenv("AWS_CA_BUNDLE", str(authority.file))
    with StormyS3(tls=context.get(case, lambda: tls)()) as storm:
        store = make_store(root, storm)
        with pytest.raises(SourceUnavailableError, match=r"(?i)certificate") as caught:
            store.ensure(URI, progress=False)
        assert (storm.connections, storm.requests) == (1, [])

    assert URI in str(caught.value)
    assert REMEDY.search(str(caught.value))
    assert store.list() == []


@pytest.mark.parametrize("name", ["AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"])
def test_an_authority_of_ones_own_is_trusted_by_name(root, monkeypatch, authority, tls, name):
    """
    Each of the usual variables names the certificates to trust.
    """
    monkeypatch.setenv(name, str(authority.file))
    with StormyS3(tls=tls) as storm:
        fill(storm)
        model = make_store(root, storm).ensure(URI, progress=False)

    assert read_tree(model.path) == FILES


def test_plain_http_where_tls_was_expected_is_an_error(root, storm):
    """
    A server that speaks no TLS gets nothing that is worth reading, and the error says what was tried.
    """
    options = {**storm.options, "endpoint_url": storm.endpoint.replace("http://", "https://")}
    store = make_store(root, storm, storage_options=options, patience=HASTY)

    with pytest.raises(SourceUnavailableError, match=r"(?i)tls|ssl") as caught:
        store.ensure(URI, progress=False)

    assert (storm.requests, URI in str(caught.value), store.list()) == ([], True, [])
    assert storm.connections <= MAX_REQUESTS


TORN = {
    "in-body": (cut(20_000), 4),
    "in-body-reset": (cut(20_000, hard=True), 4),
    "without-length": (until_the_end, 1),
    "silent": (stall(20_000), 2),
    "after-each-answer": (served_once, math.inf),
    "whole-object": (whole, 1),
}


@pytest.mark.parametrize(("act", "times"), TORN.values(), ids=TORN)
def test_tls_that_ends_without_a_goodbye_is_no_end(root, monkeypatch, authority, tls, act, times):
    """
    A TLS connection that is torn off inside a body is never taken for the end of a file.
    """
    monkeypatch.setenv("AWS_CA_BUNDLE", str(authority.file))
    with StormyS3(tls=tls) as storm:
        fill(storm)
        storm.script("get", act, times=times, key=BIG)
        model = make_store(root, storm).ensure(URI, progress=False)

    assert read_tree(model.path) == FILES


@pytest.fixture(params=["http", "https"])
def far(request, monkeypatch, authority, tls):
    """
    A server at a name that only a proxy knows, in the clear and under TLS, with its `storage_options`.
    """
    monkeypatch.setenv("AWS_CA_BUNDLE", str(authority.file))
    with StormyS3(tls=tls if request.param == "https" else None) as storm:
        fill(storm)
        port = storm.address[1]
        yield (
            storm,
            {**storm.options, "endpoint_url": f"{request.param}://{UNKNOWN_HOST}:{port}"},
            f"{request.param}_proxy",
        )


@pytest.mark.parametrize("login", ["", "user:proxy-password", "us%40er:proxy-password%2F%3A"])
@pytest.mark.parametrize("spelled", [str.upper, str.lower])
def test_a_proxy_is_used_where_it_is_named(root, monkeypatch, far, login, spelled):
    """
    The proxy of the environment passes every request on, with its own login and without ever seeing ours under TLS.
    """
    storm, options, variable = far
    with ForwardProxy(storm.address, login=login) as proxy:
        monkeypatch.setenv(spelled(variable), proxy.url)
        model = make_store(root, storm, storage_options=options).ensure(URI, progress=False)

    assert read_tree(model.path) == FILES
    assert {method for method, _, _ in proxy.heads} <= ({"CONNECT"} if variable == "https_proxy" else {"GET", "HEAD"})
    assert [head for method, _, head in proxy.heads if method == "CONNECT" and "authorization" in head] == []
    assert [r for r in storm.requests if any(name.startswith("proxy-") for name in r.headers)] == []


@pytest.mark.parametrize("refusal", [403, 502, 407])
def test_a_proxy_that_refuses_is_one_typed_error(root, monkeypatch, far, refusal):
    """
    A proxy that passes nothing on ends the call with an error that does not hold its password.
    """
    storm, options, variable = far
    with ForwardProxy(storm.address, login="user:proxy-password", refusal=refusal) as proxy:
        monkeypatch.setenv(variable, proxy.url)
        store = make_store(root, storm, storage_options=options, patience=HASTY)
        with pytest.raises((SourceUnavailableError, SourceDeniedError)) as caught:
            store.ensure(URI, progress=False)
        assert (len(proxy.heads) <= MAX_REQUESTS, storm.requests) == (True, [])
        proxy.refusal = None

        check_failure(caught.value, store, storm)


@pytest.mark.parametrize("exception", [HERE, f"example.com, {HERE}", "*"])
def test_no_proxy_is_used_where_none_is_wanted(root, monkeypatch, storm, exception):
    """
    What the environment excepts is asked directly.
    """
    with ForwardProxy(storm.address) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("NO_PROXY", exception)
        model = make_store(root, storm).ensure(URI, progress=False)

    assert (read_tree(model.path), proxy.heads) == (FILES, [])


def test_an_endpoint_may_be_an_ipv6_address(root):
    """
    The address is connected to and signed as it is written in a URL.
    """
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("there is no IPv6 here")
    with StormyS3(host="::1") as storm:
        fill(storm)
        model = make_store(root, storm).ensure(URI, progress=False)

    assert read_tree(model.path) == FILES


@pytest.mark.parametrize("slash", ["", "/"])
def test_an_endpoint_may_have_a_path(root, slash):
    """
    A service that lives below a path of its host is asked below it, and its requests are signed with it.
    """
    with StormyS3(prefix="/storage/s3") as storm:
        fill(storm)
        options = {**storm.options, "endpoint_url": storm.endpoint + slash}
        model = make_store(root, storm, storage_options=options).ensure(URI, progress=False)

    assert read_tree(model.path) == FILES


@pytest.mark.parametrize("place", ["nobody listens", "unknown name"])
def test_an_endpoint_that_is_not_there_is_one_typed_error(root, place):
    """
    An address where nobody answers is reported, and names no secret.
    """
    with StormyS3() as storm:
        endpoint = storm.endpoint if place == "nobody listens" else f"http://{UNKNOWN_HOST}"
    store = make_store(root, storm, storage_options={**storm.options, "endpoint_url": endpoint}, patience=HASTY)

    with pytest.raises(SourceUnavailableError) as caught:
        store.ensure(URI, progress=False)

    assert (URI in str(caught.value), store.list()) == (True, [])
    assert [secret for secret in SECRETS if secret in "".join(traceback.format_exception(caught.value))] == []
