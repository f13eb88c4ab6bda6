"""
What a service says about a refusal reaches the user, once, and without what was sent to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from refusing import SECRETS, SERVICES, RefusingServer, in_json, in_text, in_xml, make, refusing_server
from weather import Answer, StormyS3, changed, refuse

from kserve_pvc import (
    Backend,
    FileEntry,
    ModelStore,
    RemoteFile,
    SourceDeniedError,
    SourceNotFoundError,
    SourceUnavailableError,
    StoreError,
)
from kserve_pvc._source.redaction import redact
from kserve_pvc._source.ref import parse_ref

WRITERS = {"gs": in_json, "hf": in_json, "http-basic": in_text}
FINAL = [400, 402, 405, 406, 409, 411, 418, 422, 428, 431, 451]
CANARIES = (*SECRETS, "canary")


@pytest.fixture(scope="module")
def listening() -> Iterator[RefusingServer]:
    with refusing_server() as found:
        yield found


@pytest.fixture
def server(listening: RefusingServer) -> RefusingServer:
    listening.reset()
    return listening


@pytest.fixture(scope="module")
def backend_of(listening: RefusingServer) -> Iterator[Callable[[str], tuple[Any, str]]]:
    """
    The backends, each made once, since the classes of SDKs take seconds.
    """
    made: dict[str, tuple[Any, str]] = {}

    def find(service: str) -> tuple[Any, str]:
        if service not in made:
            made[service] = make(service, listening.url)
            made[service][0].tune(stall_seconds=5.0, retry_seconds=0.0)
        return made[service]

    yield find
    for backend, _ in made.values():
        backend.close()


def refused_listing(backend: Any, uri: str) -> StoreError:
    with pytest.raises(StoreError) as caught:
        backend.resolve(parse_ref(uri))
    return caught.value


def refused_range(backend: Any, uri: str) -> StoreError:
    """
    What becomes of a file that was listed and is now refused.
    """
    address, pin = {
        "s3": lambda: ("bkt/m.bin", {"If-Match": '"e"'}),
        "gs": lambda: ("bkt/m.bin", {"generation": "7"}),
        "az": lambda: (backend.service.place(parse_ref(uri)).address, {"If-Match": '"e"'}),
        "hf": lambda: ("org/model/m.bin", {"commit": "0" * 40}),
        "http": lambda: (uri.partition("?")[0], {"If-Match": '"e"'}),
    }[uri.partition(":")[0]]()
    if uri.startswith("http"):
        # The query of a link is known once it was looked up, which is refused as well.
        refused_listing(backend, uri)
    file = RemoteFile(entry=FileEntry(path="m.bin", size_bytes=9, token="t"), address=address, pin=pin)
    with pytest.raises(StoreError) as caught:
        read_all(backend, file)
    return caught.value


def read_all(backend: Backend, file: RemoteFile) -> None:
    with backend.open_range(file, 0, file.entry.size_bytes) as reader:
        buffer = memoryview(bytearray(file.entry.size_bytes))
        while reader.readinto(buffer) is None:
            pass


@pytest.mark.parametrize("find", [refused_listing, refused_range])
@pytest.mark.parametrize("service", SERVICES)
def test_every_refusal_of_a_request_is_final_and_keeps_its_words(service, find, server, backend_of):
    """
    Whatever status a service refuses with and whatever code it gives, the user reads both code and message, and the
    same request is not sent again.
    """
    server.write = WRITERS.get(service, in_xml)
    # Of the class of an SDK a few are enough, as each takes long.
    for status in FINAL if service != "s3-class" else (400, 409, 451):
        server.status = status

        error = find(*backend_of(service))

        assert "SomeCode" in str(error), (status, str(error))
        assert "some words" in str(error), (status, str(error))
        assert isinstance(error, SourceDeniedError | SourceNotFoundError) or error.is_final, (status, repr(error))
        assert "check the endpoint" not in str(error)


@pytest.mark.parametrize("find", [refused_listing, refused_range])
@pytest.mark.parametrize("service", SERVICES)
def test_a_denial_with_a_code_that_is_on_no_list_keeps_its_words(service, find, server, backend_of):
    """
    Status 403 is a denial whatever its code, and its code and message are told.
    """
    server.write = WRITERS.get(service, in_xml)

    error = find(*backend_of(service))

    assert "some words" in str(error)
    assert isinstance(error, SourceDeniedError), repr(error)


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize("status", [408, 425, 429, 500, 503])
def test_a_refusal_that_is_about_time_is_not_final(service, status, server, backend_of):
    """
    What may be different in a moment is tried again, and its words are kept too.
    """
    server.write, server.status = WRITERS.get(service, in_xml), status

    error = refused_range(*backend_of(service))

    assert isinstance(error, SourceUnavailableError)
    assert not error.is_final
    # What HEAD of a web page leaves out is not asked for by GET while the server is busy.
    assert "some words" in str(error) or service.startswith("http")


@pytest.mark.parametrize("find", [refused_listing, refused_range])
@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize("status", [400, 403, 404, 409, 500])
def test_no_refusal_repeats_what_was_sent(service, status, find, server, backend_of):
    """
    A service that repeats headers and query in its message shows no secret of them: keys, tokens, signatures and the
    headers that a user gave are taken out by their value, in any spelling.
    """
    server.write, server.status, server.repeats = WRITERS.get(service, in_xml), status, True

    error = find(*backend_of(service))

    seen = f"{error} {error!r} {error.fields}"
    assert not [secret for secret in CANARIES if secret in seen], seen
    assert len(server.requests) < 16


@pytest.mark.parametrize("service", ["s3", "az-key", "gs", "http"])
def test_what_a_proxy_says_in_its_own_form_is_told(service, server, backend_of):
    """
    A gateway in front of a service answers in JSON or plain text, and that is told too; a page is not.
    """
    server.status = 409
    for write in (in_json, in_text):
        server.write = write
        assert "some words" in str(refused_listing(*backend_of(service)))
    server.write = lambda code, message: b"<html><body>" + message.encode() + b"</body></html>"
    assert "some words" not in str(refused_listing(*backend_of(service)))


def test_a_long_message_is_cut_after_its_secrets_are_taken_out(server, backend_of):
    """
    A message has no end that a service could not set; what is shown of it is short.
    """
    server.message, server.repeats = "word " * 10_000, True

    assert len(str(refused_listing(*backend_of("s3")))) < 1000


@pytest.fixture
def storm() -> Iterator[StormyS3]:
    """
    An S3 server whose listing says that its objects lie in a cold storage class.
    """
    with StormyS3() as server:
        server.put("bkt", "m/a.bin", b"weights")
        server.put("bkt", "m/empty", b"")

        def cool(answer: Answer) -> None:
            answer.body = answer.body.replace(b"</Size>", b"</Size><StorageClass>GLACIER</StorageClass>")
            answer.headers["Content-Length"] = str(len(answer.body))

        server.script("list", changed(cool))
        server.script("head", changed(lambda answer: answer.headers.update({"x-amz-storage-class": "GLACIER"})))
        yield server


@pytest.mark.parametrize("uri", ["s3://bkt/m/", "s3://bkt/m/a.bin"])
@pytest.mark.parametrize("way", [{}, {"version_aware": False}])
def test_a_plan_says_that_an_object_has_to_be_restored(uri, way, root, storm):
    """
    A storage class that cannot be read is found out before anything is written, with the code of the service.
    """
    storm.script("get", refuse(403, "InvalidObjectState"))
    store = ModelStore(root, storage_options={**storm.options, **way})

    with pytest.raises(SourceUnavailableError, match=r"InvalidObjectState.*restore the object first") as caught:
        store.plan(uri)

    assert caught.value.is_final
    assert sum(request.kind == "get" for request in storm.requests) == 1


def test_objects_of_a_cold_class_that_can_be_read_are_read(root, storm):
    """
    A restored object keeps its class, and other services give such names to classes that can be read at once.
    """
    store = ModelStore(root, mode="rw", storage_options=storm.options)

    assert (store.ensure("s3://bkt/m/", progress=False).path / "a.bin").read_bytes() == b"weights"


@pytest.mark.parametrize("code", ["AllAccessDisabled", "AccessDenied"])
def test_an_object_that_is_denied_is_not_called_missing(code, root):
    """
    Where the listing shows nothing below the name of an object that was denied, the denial is what is told.
    """
    with StormyS3() as storm:
        storm.put("bkt", "m.bin", b"weights")
        for kind in ("head", "get"):
            storm.script(kind, refuse(403, code))

        with pytest.raises(SourceDeniedError):
            ModelStore(root, storage_options=storm.options).plan("s3://bkt/m.bin")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("unit", ["http://", "a", "a-", "a_", "a:b", "a@", "Bearer ", "http://a:1/@", "token="])
def test_a_long_text_is_redacted_in_the_time_that_its_length_takes(unit):
    """
    Twice the text takes twice the time, whatever it repeats: this one would take minutes otherwise.
    """
    text = unit * (256 * 1024 // len(unit))

    assert len(redact(text)) <= len(text)
