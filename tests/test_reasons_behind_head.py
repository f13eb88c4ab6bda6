"""
Why S3 refuses something is not in a response to HEAD, which has no body: it is found out by GET.
"""

from __future__ import annotations

import pytest
from trees import read_tree
from weather import Exchange, StormyS3, error

from kserve_pvc import ModelStore, SourceDeniedError, SourceNotFoundError, SourceUnavailableError

WAYS: dict[str, dict[str, object]] = {
    "direct": {},
    "s3fs": {"version_aware": False},
    "through": {"s3_additional_kwargs": {"ExpectedBucketOwner": "123456789012"}},
}


@pytest.fixture
def storm():
    """
    An S3 server with one object.
    """
    with StormyS3() as server:
        server.put("bkt", "m.bin", b"weights")
        yield server


def refusing(status: int, code: str, **headers: str):
    """
    Refuse everything, and say why only where a response has a body.
    """

    def act(exchange: Exchange) -> None:
        exchange.answer = error(status, code)
        exchange.answer.headers |= headers
        exchange.reply()

    return act


def ensure(root, storm: StormyS3, uri: str, way: str = "direct", **more: object):
    options = {**storm.options, **WAYS[way]}
    store = ModelStore(root, mode="rw", retry_seconds=1, storage_options=options)
    return store.ensure(uri, progress=False, **more)


@pytest.mark.parametrize("way", sorted(WAYS))
@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "ExpiredToken", SourceDeniedError),
        (400, "InvalidToken", SourceDeniedError),
        (403, "SignatureDoesNotMatch", SourceDeniedError),
        (400, "AuthorizationHeaderMalformed", SourceUnavailableError),
        (405, "MethodNotAllowed", SourceUnavailableError),
    ],
)
@pytest.mark.parametrize("uri", ["s3://bkt/m.bin", "s3://bkt/m/"])
def test_the_code_of_the_service_is_told(uri, status, code, kind, way, root, storm):
    """
    One object and a prefix are refused with the same words, whichever way they are requested.
    """
    for moment in ("head", "get", "list"):
        storm.script(moment, refusing(status, code))

    with pytest.raises(kind, match=code if way == "direct" else "."):
        ensure(root, storm, uri, way)


@pytest.mark.parametrize("way", sorted(WAYS))
@pytest.mark.parametrize("status", [400, 403, 405, 501])
def test_an_object_whose_description_is_refused_is_read(status, way, root, storm):
    """
    A server that does not take HEAD does not hide an object: one byte of it says the same.
    """
    storm.script("head", refusing(status, "MethodNotAllowed"))

    assert read_tree(ensure(root, storm, "s3://bkt/m.bin", way).path) == {"m.bin": b"weights"}


@pytest.mark.parametrize("way", ["direct", "s3fs"])
@pytest.mark.parametrize(
    ("status", "code", "headers"),
    [
        (405, "MethodNotAllowed", {"x-amz-delete-marker": "true"}),
        (400, "InvalidArgument", {}),
        (404, "NoSuchVersion", {}),
    ],
)
def test_a_version_that_is_none_is_told(status, code, headers, way, root, storm):
    """
    The VersionId of a delete marker and one that is malformed name no version.
    """
    for moment in ("head", "get"):
        storm.script(moment, refusing(status, code, **headers))

    with pytest.raises(SourceNotFoundError, match="no such version"):
        ensure(root, storm, "s3://bkt/m.bin", way, revision="nonsense")


def test_an_expired_token_is_not_taken_for_a_missing_version(root, storm):
    """
    400 with a reason of its own keeps it, revision or not.
    """
    for moment in ("head", "get"):
        storm.script(moment, refusing(400, "ExpiredToken"))

    with pytest.raises(SourceDeniedError, match="ExpiredToken"):
        ensure(root, storm, "s3://bkt/m.bin", revision="v1")
