"""
Reading with no right but the one to read.
"""

from __future__ import annotations

import pytest
from trees import read_tree
from weather import Answer, Exchange, StormyS3, error, refuse

from kserve_pvc import ModelStore, SourceDeniedError

DATA = b"weights" * 100
WAYS: dict[str, dict[str, object]] = {
    "direct": {},
    "s3fs": {"version_aware": False},
    "through": {"s3_additional_kwargs": {"ExpectedBucketOwner": "123456789012"}},
}


@pytest.fixture
def versioned():
    """
    A bucket with versions, for an identity with `s3:GetObject` and without `s3:GetObjectVersion` or `s3:ListBucket`.
    """

    def announce(answer: Answer) -> None:
        answer.headers["x-amz-version-id"] = "3HL4kqtJvjVBH40Nrjfkd"

    def deny_versions(exchange: Exchange) -> None:
        if "versionId" in exchange.request.query:
            exchange.answer = error(403, "AccessDenied")
        else:
            announce(exchange.answer)
        exchange.reply()

    with StormyS3() as server:
        server.put("bkt", "m/model.bin", DATA)
        server.script("list", refuse(403, "AccessDenied"))
        server.script("head", deny_versions)
        server.script("get", deny_versions)
        yield server


@pytest.mark.parametrize("way", sorted(WAYS))
def test_one_object_of_a_bucket_with_versions_needs_only_the_right_to_read_it(way, root, versioned):
    """
    Without a revision no request names a version, whichever way the bytes come.
    """
    store = ModelStore(root, mode="rw", part_bytes=100, storage_options={**versioned.options, **WAYS[way]})

    model = store.ensure("s3://bkt/m/model.bin", progress=False)

    assert read_tree(model.path) == {"model.bin": DATA}
    assert not any("versionId" in request.query for request in versioned.requests)


def test_a_revision_that_may_not_be_read_is_denied(root, versioned):
    """
    Who names a version gets that one or an error, never the newest.
    """
    store = ModelStore(root, mode="rw", storage_options=versioned.options)

    with pytest.raises(SourceDeniedError):
        store.ensure("s3://bkt/m/model.bin", revision="3HL4kqtJvjVBH40Nrjfkd", progress=False)
