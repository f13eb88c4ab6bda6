"""
Certificates that are not checked are said, and recorded.
"""

from __future__ import annotations

import json
import logging

import pytest
from webserver import WebServer, page

from kserve_pvc import ModelStore
from kserve_pvc._format.records import Manifest
from kserve_pvc._source.ref import parse_ref
from kserve_pvc.backends.fsspec_ import FsspecBackend
from kserve_pvc.backends.hf import HFBackend
from kserve_pvc.backends.http import HTTPBackend, http_backend
from kserve_pvc.backends.s3 import S3Backend
from kserve_pvc.kserve._environment import read_variables

KEYS = {"key": "k", "secret": "s"}
REF = parse_ref("s3://bucket/model")


def made(way: str, verify: object):
    """
    The backend of a way of switching the check off, or of not doing so.
    """
    initializer = read_variables({"AWS_ACCESS_KEY_ID": "k", "S3_VERIFY_SSL": "1" if verify else "0"})
    return {
        "s3": lambda: S3Backend({**KEYS, "client_kwargs": {"verify": verify}}, {}),
        "s3fs": lambda: S3Backend({**KEYS, "version_aware": False, "client_kwargs": {"verify": verify}}, {}),
        "initializer": lambda: S3Backend({**KEYS, **initializer.storage_options.get("s3", {})}, {}),
        "hf": lambda: HFBackend({"verify": verify}, {}),
        "http": lambda: HTTPBackend({"verify": verify}, {}),
        "http-class": lambda: http_backend({"verify": verify, "block_size": 1000}, {}),
        "fsspec": lambda: FsspecBackend({"client_kwargs": {"ssl": verify}}),
    }[way]()


WAYS = ["s3", "s3fs", "initializer", "hf", "http", "http-class", "fsspec"]


@pytest.mark.parametrize("way", WAYS)
def test_certificates_that_are_not_checked_are_told_once(way, caplog):
    """
    One line at level WARNING for a backend, whichever way the check was switched off.
    """
    backend = made(way, False)

    assert not backend.checks_certificates(REF)
    assert [record.levelno for record in caplog.records if "certificates" in record.message] == [logging.WARNING]


@pytest.mark.parametrize("way", WAYS)
def test_certificates_that_are_checked_are_not_spoken_of(way, caplog):
    """
    Without the switch there is nothing to say.
    """
    assert made(way, True).checks_certificates(REF)
    assert [record for record in caplog.records if "certificates" in record.message] == []


def test_the_record_says_that_certificates_were_not_checked(root):
    """
    The manifest has a field for it, which other models do not have.
    """
    with WebServer() as server:
        server.pages["/a.bin"] = server.pages["/b.bin"] = page(b"weights")
        options = {"allow_private": True, "verify": False}
        store = ModelStore(root, mode="rw", storage_options=options)
        unverified = store.ensure(f"{server.endpoint}/a.bin", progress=False)
        options.pop("verify")
        verified = ModelStore(root, mode="rw", storage_options=options).ensure(
            f"{server.endpoint}/b.bin", progress=False
        )

    assert (unverified.record.tls, verified.record.tls) == ("unverified", None)
    manifests = [json.loads(path.read_bytes()) for path in root.rglob("*.json") if b'"tls"' in path.read_bytes()]
    assert [manifest["tls"] for manifest in manifests] == ["unverified"]


def test_a_manifest_says_nothing_else_there():
    """
    Any other word is a manifest that cannot be trusted.
    """
    with pytest.raises(ValueError, match="maybe"):
        Manifest(key="m-0123456789abcdef", generation="000000000001-" + "0" * 32, version="v", files=(), tls="maybe")
