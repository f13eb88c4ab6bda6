"""
Several credentials in one process: each request is signed with those of its call, and nothing of them is anywhere else.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import product
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import origin
import pytest
from origin import CountingProxy, SeaweedS3
from sources import FakeBackend
from trees import model_files, read_tree

from kserve_pvc import ModelStore, SourceDeniedError
from kserve_pvc.backends._login.aws import SDKCredentials
from kserve_pvc.backends._login.azure import Token
from kserve_pvc.backends._login.contract import Scope
from kserve_pvc.backends._login.google import GoogleAuthLogin
from kserve_pvc.backends._ranges import NO_CREDENTIALS, RefusedError

TENANTS = ("alice", "bob")
MODELS = 3
FILES = {
    (tenant, number): model_files(seed=80 + 10 * index + number)
    for index, tenant in enumerate(TENANTS)
    for number in range(MODELS)
}


class Witness(CountingProxy):
    """
    Remembers also whose key signed the requests for which bucket.
    """

    def __init__(self, endpoint: str) -> None:
        super().__init__(endpoint)
        self.signatures: set[tuple[str, str]] = set()

    def _exchange(self, near: Any, far: Any, head: bytes) -> bool:
        asked = unquote(head.decode("latin-1"))
        bucket = asked.split()[1].strip("/").partition("/")[0].partition("?")[0]
        self.signatures.update((bucket, key) for key in re.findall(r"Credential=([^/]*)/", asked))
        return super()._exchange(near, far, head)


@pytest.fixture(scope="module")
def shared_server() -> Iterator[SeaweedS3]:
    """
    A real S3 server for two tenants, each of whom may read one bucket and nothing else.
    """
    tenants = [
        {
            "name": tenant,
            "credentials": [{"accessKey": f"{tenant}-key", "secretKey": f"{tenant}-secret"}],
            "actions": [f"Read:{tenant}s-models", f"List:{tenant}s-models"],
        }
        for tenant in TENANTS
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(origin, "_IDENTITIES", {"identities": [*origin._IDENTITIES["identities"], *tenants]})
        with SeaweedS3() as server:
            for tenant in TENANTS:
                server.make_bucket(f"{tenant}s-models")
            for (tenant, number), files in FILES.items():
                for name, data in files.items():
                    server.put(f"{tenant}s-models", f"m{number}/{name}", data)
            yield server


@pytest.fixture
def witness(shared_server: SeaweedS3) -> Iterator[Witness]:
    with Witness(shared_server.endpoint) as proxy:
        yield proxy


Options = Callable[[str], dict[str, Any]]


@pytest.fixture
def options(witness: Witness) -> Options:
    """
    The storage options of a tenant.
    """
    return lambda tenant: {"endpoint_url": witness.endpoint, "key": f"{tenant}-key", "secret": f"{tenant}-secret"}


def uri_of(tenant: str, number: int = 0) -> str:
    return f"s3://{tenant}s-models/m{number}"


# With another block size requests are not simple enough to be signed here, and s3fs signs them.
@pytest.mark.parametrize("more", [{}, {"default_block_size": 5_000_000}], ids=["signed here", "s3fs"])
def test_each_request_is_signed_with_the_credentials_of_its_call(root, witness, options, more):
    """
    Threads of one process fetch models of two tenants through one store at the same time, each with its own key, and
    the environment is what it was.
    """
    store, environ = ModelStore(root, mode="rw"), dict(os.environ)
    together = threading.Barrier(len(FILES))

    def ensure(owned):
        together.wait(30)
        return store.ensure(uri_of(*owned), storage_options={**options(owned[0]), **more}, progress=False)

    with ThreadPoolExecutor(len(FILES)) as pool:
        models = dict(zip(FILES, pool.map(ensure, FILES), strict=True))

    assert {owned: read_tree(model.path) for owned, model in models.items()} == FILES
    assert witness.signatures == {("alices-models", "alice-key"), ("bobs-models", "bob-key")}
    assert dict(os.environ) == environ


def test_stores_on_one_volume_have_credentials_of_their_own(root, witness, options):
    """
    Two stores of one process on one volume sign with what each of them was opened with, at the same time.
    """
    stores = {tenant: ModelStore(root, mode="rw", storage_options=options(tenant)) for tenant in TENANTS}
    together = threading.Barrier(len(FILES))

    def ensure(owned):
        together.wait(30)
        return stores[owned[0]].ensure(uri_of(*owned), progress=False)

    with ThreadPoolExecutor(len(FILES)) as pool:
        models = dict(zip(FILES, pool.map(ensure, FILES), strict=True))

    assert {owned: read_tree(model.path) for owned, model in models.items()} == FILES
    assert witness.signatures == {("alices-models", "alice-key"), ("bobs-models", "bob-key")}


def ask(store: ModelStore, how: str, uri: str, given: Mapping[str, Any] | None) -> Any:
    """
    Have a store ask a source, in one of the ways there are.
    """
    if how == "warm":
        (warmed,) = store.warm([uri], storage_options=given, progress=False)
        if warmed.error is not None:
            raise warmed.error
        return warmed.model.path
    if how == "ensure":
        return store.ensure(uri, storage_options=given, progress=False).path
    return getattr(store, how)(uri, storage_options=given)


@pytest.mark.parametrize(("how", "by_scheme"), list(product(["ensure", "warm", "plan", "resolve"], [False, True])))
def test_a_call_may_bring_its_own_credentials(root, witness, options, how, by_scheme):
    """
    Options of a call, by scheme or not, stand in for all of the store's, which count again for the next one.
    """
    store = ModelStore(root, mode="rw", storage_options=options("alice"))
    given = {"s3": options("bob"), "hf": {}} if by_scheme else options("bob")

    with pytest.raises(SourceDeniedError):
        ask(store, how, uri_of("alice"), given)
    ask(store, how, uri_of("bob"), given)
    ask(store, how, uri_of("alice"), None)

    assert witness.signatures == {
        ("alices-models", "bob-key"),
        ("bobs-models", "bob-key"),
        ("alices-models", "alice-key"),
    }


def test_a_newer_version_is_asked_for_with_the_credentials_of_the_call(root, witness, options):
    """
    Refreshing asks and fetches with what the call brings; a model that is present needs none.
    """
    store = ModelStore(root, mode="rw")
    first = store.ensure(uri_of("bob"), storage_options=options("bob"), progress=False)

    again = store.ensure(uri_of("bob"), refresh=True, storage_options=options("bob"), progress=False)
    with pytest.raises(SourceDeniedError):
        store.ensure(uri_of("bob"), refresh=True, storage_options=options("alice"), progress=False)

    assert (again.path, again.status) == (first.path, "present")
    assert store.ensure(uri_of("bob"), storage_options={}, progress=False).status == "present"
    assert witness.signatures == {("bobs-models", "bob-key"), ("bobs-models", "alice-key")}


def test_other_processes_get_the_credentials_of_the_call(root, witness, options):
    """
    An executor of processes signs with what the call brings, not with what the store was opened with.
    """
    store = ModelStore(root, mode="rw", storage_options=options("alice"))

    with ProcessPoolExecutor(2) as pool:
        warmed = list(
            store.warm(
                [uri_of("bob", number) for number in range(MODELS)],
                pool,
                storage_options=options("bob"),
                progress=False,
            )
        )

    assert {each.index: read_tree(each.model.path) for each in warmed} == {
        number: FILES["bob", number] for number in range(MODELS)
    }
    assert witness.signatures == {("bobs-models", "bob-key")}


@pytest.mark.parametrize("call", [None, {}, {"password": "of the call"}])
def test_a_back_end_gets_the_options_of_one_place(root, call):
    """
    Options of the store and of a call are never mixed; an empty mapping is none at all, and not the store's.
    """
    made, backend = [], FakeBackend({"a": b"a"})
    backends = {"fake": lambda given: made.append(dict(given)) or backend}
    store = ModelStore(root, mode="rw", backends=backends, storage_options={"user": "store"})

    store.plan("fake://x/y", storage_options=call)
    store.resolve("fake://x/y")

    assert made == ([{"user": "store"}] if call is None else [call, {"user": "store"}])


class ForeignError(Exception):
    """
    What no library here knows.
    """


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        (IsADirectoryError(21, "Is a directory", "/creds"), "`/creds` cannot be read: Is a directory"),
        (PermissionError(13, "Permission denied", "/creds"), "`/creds` cannot be read: Permission denied"),
        (KeyError("private_key"), "KeyError: private_key"),
        (AttributeError("'list' object has no attribute 'get'"), "AttributeError: 'list'"),
        (ForeignError("cannot decode\nmore"), "cannot decode"),
        (ForeignError(), "ForeignError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
@pytest.mark.parametrize("service", ["gs", "az", "s3"])
def test_what_a_library_raises_for_credentials_is_a_refusal(service, raised, words):
    """
    A file that cannot be read, or has another shape than expected, denies access and is named; nothing passes raw.

    The libraries are replaced by what raises: each of their ways to fail cannot be brought about here.
    """
    pytest.importorskip({"gs": "google.auth", "az": "azure.identity", "s3": "botocore"}[service])

    def fail(*_: object) -> object:
        raise raised

    acts = {
        "gs": lambda: GoogleAuthLogin(fail).authorize(Scope(), renewed=False),
        "az": lambda: Token(SimpleNamespace(get_token=fail)).authorize(Scope(), renewed=False),
        "s3": lambda: SDKCredentials(fail, fail).get(),
    }
    with pytest.raises(RefusedError) as caught:
        acts[service]()

    assert words in caught.value.reason
    assert "\n" not in caught.value.reason
    assert caught.value.code == NO_CREDENTIALS
