"""
Credentials of S3 that the SDK finds and renews, while requests are signed here.

The servers of objects are SeaweedFS, and an imitation that can expire credentials where SeaweedFS cannot. The services
that hand out credentials run inside AWS only, so they are imitated (`examples/demo/identity.py`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import pytest
from identity import IdentityServices
from origin import SeaweedS3
from trees import model_files, read_tree
from weather import Exchange, StormyS3, error

from kserve_pvc import ModelStore, SettingsError, SourceDeniedError, SourceUnavailableError
from kserve_pvc._source.ref import parse_ref
from kserve_pvc.backends._login import aws
from kserve_pvc.backends.s3 import S3Backend

BUCKET = "models"
FILES = model_files(seed=37)
KINDS = ("web-identity", "container", "metadata")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """
    A home without files of AWS or fsspec, and an environment that says nothing about them.
    """
    for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return tmp_path


def use(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def identity(origin: SeaweedS3) -> Iterator[IdentityServices]:
    """
    Services that hand out what the real S3 server accepts.
    """
    with IdentityServices(origin.key, origin.secret) as services:
        yield services


@pytest.fixture
def storm() -> Iterator[StormyS3]:
    """
    An S3 server that wants a session token too, with a model on it.
    """
    with StormyS3() as server:
        for name, data in FILES.items():
            server.put(BUCKET, f"m/{name}", data)
        yield server


@pytest.fixture
def rotating(storm: StormyS3) -> Iterator[IdentityServices]:
    """
    Services that hand out the credentials of that server.
    """
    with IdentityServices(storm.key, storm.secret, storm.token) as services:
        yield services


def ensure(root, uri: str, **options):
    return ModelStore(root, mode="rw", part_bytes=100_000, retry_seconds=5, **options).ensure(uri, progress=False)


@pytest.mark.parametrize("kind", KINDS)
def test_credentials_are_found_once_and_sign_every_request(
    kind, home, root, origin, proxy, upload, identity, monkeypatch
):
    """
    A role of the pod or of the machine reads a model as s3fs reads it, with one request for credentials.
    """
    uri = upload(FILES)
    use(monkeypatch, {**identity.environ(kind, home), "AWS_ENDPOINT_URL_S3": proxy.endpoint})

    model = ensure(root, uri)

    assert (read_tree(model.path), model.record.access, identity.requests) == (FILES, "direct:s3fs", 1)
    from s3fs import S3FileSystem

    theirs = S3FileSystem(skip_instance_cache=True)
    assert {name: theirs.cat_file(f"{uri}/{name}") for name in FILES} == FILES


@pytest.mark.parametrize("kind", KINDS)
def test_a_session_token_is_signed_too(kind, home, root, storm, rotating, monkeypatch):
    """
    Temporary credentials go along whole.
    """
    use(monkeypatch, {**rotating.environ(kind, home), "AWS_ENDPOINT_URL_S3": storm.endpoint})

    assert read_tree(ensure(root, f"s3://{BUCKET}/m").path) == FILES


@pytest.mark.parametrize("status", [400, 403])
@pytest.mark.parametrize("moment", ["list", "get"])
@pytest.mark.parametrize("kind", KINDS)
def test_credentials_that_expire_on_the_way_are_renewed(kind, moment, status, home, root, storm, rotating, monkeypatch):
    """
    A refusal in the middle of a listing or of a transfer leads to other credentials, once for all streams, and nothing
    of what has come is lost.
    """
    use(monkeypatch, {**rotating.environ(kind, home), "AWS_ENDPOINT_URL_S3": storm.endpoint})

    def expire(exchange: Exchange) -> None:
        storm.key = rotating.key = "another-key"
        storm.secret = rotating.secret = "another-secret"
        storm.token = rotating.session_token = "another-token"
        exchange.answer = error(status, "ExpiredToken")
        exchange.reply()

    storm.page_keys = 2
    storm.script(moment, expire, times=1, skip=1)
    model = ensure(root, f"s3://{BUCKET}/m")

    assert read_tree(model.path) == FILES
    assert rotating.requests == 2
    signed = {r.headers["authorization"].partition("Credential=")[2].partition("/")[0] for r in storm.requests}
    assert signed == {StormyS3.key, "another-key"}


# Not for the metadata service: botocore stretches the life of what that hands out, so that there only a refusal renews.
@pytest.mark.parametrize("kind", ["web-identity", "container"])
def test_credentials_are_refreshed_before_they_expire(kind, home, storm, rotating, monkeypatch):
    """
    What ends within minutes is replaced before a request is signed with it.
    """
    monkeypatch.setattr(aws, "_FRESH_SECONDS", 0.0)
    use(monkeypatch, {**rotating.environ(kind, home), "AWS_ENDPOINT_URL_S3": storm.endpoint})
    rotating.lifetime = 60
    backend = S3Backend({})
    backend.resolve(parse_ref(f"s3://{BUCKET}/m"))
    before = rotating.requests

    backend.resolve(parse_ref(f"s3://{BUCKET}/m"))

    backend.close()
    assert rotating.requests > before


@pytest.mark.parametrize("kind", ["web-identity", "container"])
def test_a_service_that_is_down_is_no_denial(kind, home, root, storm, rotating, monkeypatch):
    """
    If credentials cannot be had for the moment, the source is unavailable, which is retried, and not denied.
    """
    use(monkeypatch, {**rotating.environ(kind, home), "AWS_ENDPOINT_URL_S3": storm.endpoint, "AWS_MAX_ATTEMPTS": "1"})
    rotating.is_down = True

    with pytest.raises(SourceUnavailableError, match="credentials are unavailable"):
        ModelStore(root, mode="rw", retry_seconds=0.1).ensure(f"s3://{BUCKET}/m", progress=False)


@pytest.mark.parametrize("kind", ["web-identity", "metadata"])
def test_no_credentials_are_a_denial(kind, home, root, storm, rotating, monkeypatch):
    """
    A token that the service refuses, or a machine without a role, is denied access, and the error says what to do.
    """
    variables = {**rotating.environ(kind, home), "AWS_ENDPOINT_URL_S3": storm.endpoint}
    (home / "token").write_text("stolen")
    if kind == "metadata":
        rotating.is_down = True
    use(monkeypatch, variables)

    with pytest.raises(SourceDeniedError, match=r"no credentials.*AWS_ACCESS_KEY_ID") as caught:
        ensure(root, f"s3://{BUCKET}/m")

    assert "stolen" not in str(caught.value)


def write_profile(home, endpoint: str, key: str, secret: str, token: str) -> None:
    place = home / ".aws"
    place.mkdir(exist_ok=True)
    (place / "config").write_text(f"[profile work]\nendpoint_url = {endpoint}\nregion = us-east-1\n")
    (place / "credentials").write_text(
        f"[work]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\naws_session_token = {token}\n"
    )


@pytest.mark.parametrize("by", ["variable", "option"])
def test_a_profile_that_changes_is_read_again(by, home, root, storm, monkeypatch):
    """
    Keys that were replaced in a file are found after a refusal.
    """
    write_profile(home, storm.endpoint, storm.key, storm.secret, storm.token)
    options = {"storage_options": {"profile": "work"}} if by == "option" else {}
    if by == "variable":
        monkeypatch.setenv("AWS_PROFILE", "work")

    def rotate(exchange: Exchange) -> None:
        storm.key = "another-key"
        write_profile(home, storm.endpoint, storm.key, storm.secret, storm.token)
        exchange.answer = error(403, "InvalidAccessKeyId")
        exchange.reply()

    storm.script("get", rotate, times=1, skip=1)

    assert read_tree(ensure(root, f"s3://{BUCKET}/m", **options).path) == FILES


def test_a_refusal_that_no_renewal_helps_ends(home, root, storm, monkeypatch):
    """
    Credentials that stay the same are denied, and not tried again and again.
    """
    write_profile(home, storm.endpoint, "wrong", "wrong", "wrong")
    monkeypatch.setenv("AWS_PROFILE", "work")

    with pytest.raises(SourceDeniedError):
        ensure(root, f"s3://{BUCKET}/m")

    assert len(storm.requests) == 3  # For the object of that name, for the reason, and for what is below it.


def test_a_profile_that_does_not_exist_is_named(home):
    """
    The setting is wrong before anything is requested.
    """
    with pytest.raises(SettingsError, match="nowhere"):
        S3Backend({"profile": "nowhere"})


def test_a_session_of_the_caller_signs(root, storm):
    """
    A session with credentials of its own is used as s3fs uses it.
    """
    from aiobotocore.session import AioSession

    session = AioSession()
    session.set_credentials(storm.key, storm.secret, storm.token)

    model = ensure(root, f"s3://{BUCKET}/m", storage_options={"session": session, "endpoint_url": storm.endpoint})

    assert (read_tree(model.path), model.record.access) == (FILES, "direct:s3fs")


ELSEWHERE = "http://127.0.0.1:9"  # Where nothing listens.


@pytest.mark.parametrize(
    ("options", "conf", "environ"),
    [
        ({}, {"endpoint_url": "right"}, {"AWS_ENDPOINT_URL": ELSEWHERE}),
        ({}, {"endpoint_url": "right"}, {}),
        ({"endpoint_url": "right"}, {"endpoint_url": ELSEWHERE}, {"AWS_ENDPOINT_URL": ELSEWHERE}),
        ({}, {"client_kwargs": {"endpoint_url": "right"}}, {"AWS_ENDPOINT_URL_S3": ELSEWHERE}),
        ({"key": "testkey", "secret": "testsecret"}, {"endpoint_url": "right", "key": "wrong", "secret": "no"}, {}),
        ({}, {"anon": False}, {"AWS_ENDPOINT_URL": "right"}),
    ],
)
def test_endpoints_count_in_the_order_of_fsspec(home, root, origin, proxy, upload, monkeypatch, options, conf, environ):
    """
    Options, then fsspec's configuration, then the SDK's variables: with keys in the environment and an endpoint in a
    configuration file, the private server is asked, and nobody else.
    """
    place = home / ".config/fsspec"
    place.mkdir(parents=True)

    def filled(values: dict) -> dict:
        return json.loads(json.dumps(values).replace("right", proxy.endpoint))

    (place / "conf.json").write_text(json.dumps({"s3": filled(conf)}))
    use(monkeypatch, {"AWS_ACCESS_KEY_ID": origin.key, "AWS_SECRET_ACCESS_KEY": origin.secret, **filled(environ)})

    model = ensure(root, upload(FILES), storage_options=filled(options))

    assert read_tree(model.path) == FILES
    assert {r.status for r in proxy.requests} <= {200, 206, 404}
