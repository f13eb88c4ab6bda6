"""
Google Cloud Storage through gcsfs and Azure through adlfs: when they are used, and that they then do what fsspec does.

Each setting is tried in a fresh interpreter, which lists and reads a model, and then lists it with fsspec itself, the
same setting and the same server.
"""

import asyncio
import base64
import hashlib
import json
import os
import pickle
import ssl
import threading
import time
from contextlib import suppress

import pytest
import shell
from azurite import ACCOUNT, KEY, Azurite
from azurite import MissingError as NoAzurite
from gcs import FakeGCS, Gate
from gcs import MissingError as NoGCS
from trees import model_files, read_tree
from weather import Authority

from kserve_pvc import ModelStore, SettingsError, SourceChangedError, SourceDeniedError, SourceUnavailableError
from kserve_pvc._source.contract import SupportsAccess
from kserve_pvc._source.ref import parse_ref
from kserve_pvc.backends import _class_reader
from kserve_pvc.backends._options import explain
from kserve_pvc.backends.azure import AzureBackend
from kserve_pvc.backends.gs import GSBackend

pytest.importorskip("gcsfs", reason="`gcsfs` is not installed")
pytest.importorskip("adlfs", reason="`adlfs` is not installed")

FILES = model_files(seed=53)
TOKEN = "canary-of-a-kept-login"
# gcsfs itself would first request the type of the bucket over gRPC, which an emulator does not speak.
NO_GRPC = {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}

COMPARE = """
import json, sys
from kserve_pvc import ModelStore
from kserve_pvc._source.ref import parse_ref
from kserve_pvc.backends import make_backend

root, uri, expression, before = sys.argv[1:]
exec(before)
options = eval(expression)
backend = make_backend(uri.partition(":")[0], {}, options)
ref = parse_ref(uri)
ours = {str(file.entry.path): file.entry.size_bytes for file in backend.resolve(ref).files}
model = ModelStore(root, mode="rw", storage_options=options).ensure(uri, progress=False)
backend.close()
loaded = sorted({"adlfs", "aiohttp", "fsspec", "gcsfs", "grpc"} & set(sys.modules))

import fsspec

fs, path = fsspec.url_to_fs(uri, **options)
theirs = {name[len(path) + 1:]: info["size"] for name, info in fs.find(path, detail=True).items()}
print(json.dumps([ours, theirs, backend.access(ref), loaded, model.size_bytes]))
"""


def compare(root, uri: str, expression: str, *, env=None, before: str = "") -> tuple[str, list[str]]:
    """
    Make sure that a setting does what it does in fsspec; return how the source was reached and what was imported.
    """
    home = {"HOME": str(root.parent), **NO_GRPC}
    said = shell.python(COMPARE, str(root), uri, expression, before, env={**home, **(env or {})})
    ours, theirs, access, loaded, size = json.loads(said)

    expected = {name: len(data) for name, data in FILES.items()}
    assert (ours, theirs, size) == (expected, expected, sum(expected.values()))
    return access, loaded


@pytest.fixture
def here(request):
    """
    A prefix that belongs to the test.
    """
    return hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:12]


@pytest.fixture(scope="session")
def gcs():
    """
    An emulator of Google Cloud Storage.
    """
    try:
        with FakeGCS() as server:
            yield server
    except NoGCS as missing:
        pytest.skip(str(missing))


@pytest.fixture
def gate(gcs):
    """
    A server in front of the emulator that requires a token.
    """
    with Gate(gcs) as gate:
        gate.good = {TOKEN}
        yield gate


@pytest.fixture
def gs_uri(gcs, here):
    """
    A model in the emulator.
    """
    for name, data in FILES.items():
        gcs.put(f"{here}/model/{name}", data)
    return gcs.uri(f"{here}/model")


@pytest.fixture(scope="session")
def azurite():
    """
    A storage account without TLS.
    """
    try:
        with Azurite() as server:
            yield server
    except NoAzurite as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def authority(tmp_path_factory):
    """
    A certificate authority that only a test trusts.
    """
    try:
        return Authority(tmp_path_factory.mktemp("authority"))
    except FileNotFoundError:
        pytest.skip("`openssl` is not installed")


@pytest.fixture(scope="session")
def sealed_azurite(authority):
    """
    A storage account over TLS, which takes any token.
    """
    authority.context("azurite")
    certificate = (authority.file.with_name("azurite.pem"), authority.file.with_name("azurite.key"))
    try:
        with Azurite(certificate=certificate) as server:
            yield server
    except NoAzurite as missing:
        pytest.skip(str(missing))


@pytest.fixture
def az_uri(azurite, here):
    """
    A model in the account without TLS.
    """
    for name, data in FILES.items():
        azurite.put(f"{here}/model/{name}", data)
    return azurite.uri(f"{here}/model")


@pytest.fixture
def sealed_uri(sealed_azurite, here):
    """
    A model in the account over TLS.
    """
    for name, data in FILES.items():
        sealed_azurite.put(f"{here}/model/{name}", data)
    return sealed_azurite.uri(f"{here}/model")


def test_plain_settings_of_google_import_no_class(root, gcs, gs_uri):
    """
    An endpoint and a token need neither gcsfs nor fsspec.
    """
    found = compare(root, gs_uri, repr(dict(gcs.storage_options)))

    assert found == ("direct", [])


def test_an_argument_that_only_gcsfs_knows_goes_through_it(root, gcs, gs_uri):
    """
    Settings of the HTTP session can be used by gcsfs only, so that requests go through its session.
    """
    options = {**gcs.storage_options, "session_kwargs": {"trust_env": True}}

    access, loaded = compare(root, gs_uri, repr(options))

    assert (access, "gcsfs" in loaded) == ("fsspec:gcsfs", True)


def test_a_login_that_gcsfs_keeps_is_used(root, tmp_path, gate, gs_uri):
    """
    With `token="cache"` gcsfs gives the token that it keeps in the home directory, and it is sent by our own requests.
    """
    from google.oauth2.credentials import Credentials

    (tmp_path / ".gcs_tokens").write_bytes(pickle.dumps({("", "full_control"): Credentials(TOKEN)}))

    access, _ = compare(root, gs_uri, repr({"endpoint_url": gate.endpoint, "token": "cache"}))

    assert access == "direct:gcsfs"
    assert {headers["authorization"] for _, _, headers in gate.requests} == {f"Bearer {TOKEN}"}


def test_credentials_of_google_auth_are_plain(root, gate, gs_uri):
    """
    An object of google-auth authorizes our own requests without gcsfs.
    """
    expression = f"{{'endpoint_url': {gate.endpoint!r}, 'token': Credentials({TOKEN!r})}}"

    access, loaded = compare(root, gs_uri, expression, before="from google.oauth2.credentials import Credentials")

    assert (access, "gcsfs" in loaded) == ("direct", False)


def test_the_project_of_the_credentials_pays(root, tmp_path, gate, gs_uri):
    """
    `requester_pays=True` without a project means the one of the default credentials, which gcsfs finds.
    """
    pytest.importorskip("cryptography", reason="`cryptography` is not installed")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    private = rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    account = {"type": "service_account", "client_email": "reader@tests.invalid", "project_id": "billed"}
    key = tmp_path / "key.json"
    key.write_text(json.dumps({**account, "private_key": private.decode(), "token_uri": gate.token_uri}))
    options = {"endpoint_url": gate.endpoint, "token": "google_default", "requester_pays": True}

    access, _ = compare(root, gs_uri, repr(options), env={"GOOGLE_APPLICATION_CREDENTIALS": str(key)})

    assert access == "direct:gcsfs"
    assert all("userProject=billed" in path for _, path, _ in gate.requests if path.startswith(("/storage", "/down")))


def test_a_client_certificate_is_presented(root, tmp_path, gcs, gs_uri, authority):
    """
    A certificate that google-auth is configured with is presented to a server that requires one.
    """
    context = authority.context("storage")
    authority.context("client")
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(authority.file)
    place = authority.file.with_name
    workload = {"cert_path": str(place("client.pem")), "key_path": str(place("client.key"))}
    config = tmp_path / "certificate_config.json"
    config.write_text(json.dumps({"cert_configs": {"workload": workload}}))
    env = {"GOOGLE_API_CERTIFICATE_CONFIG": str(config), "SSL_CERT_FILE": str(authority.file)}

    with Gate(gcs, tls=context) as sealed:
        sealed.good = None
        access, _ = compare(root, gs_uri, repr({"endpoint_url": sealed.endpoint, "token": "anon"}), env=env)

    assert access == "fsspec:gcsfs"


def test_the_session_renews_a_token_that_is_refused(gate, gs_uri, monkeypatch):
    """
    A token that expires between two pieces is renewed once, and the range goes on.
    """
    from google.oauth2.credentials import Credentials

    class Renewed(Credentials):
        def refresh(self, request):
            self.token = f"{self.token}-again"

    monkeypatch.setattr(_class_reader, "PIECE_BYTES", 1000)
    options = {"endpoint_url": gate.endpoint, "token": Renewed(TOKEN), "session_kwargs": {"headers": {"X-Test": "1"}}}
    backend = GSBackend(options, {})
    file = max(backend.resolve(parse_ref(gs_uri)).files, key=lambda f: f.entry.size_bytes)
    gate.good = {TOKEN, f"{TOKEN}-again"}
    asked = len(gate.requests)
    gate.instead = lambda method, path: (
        setattr(gate, "good", {f"{TOKEN}-again"}) if len(gate.requests) > asked + 1 else None
    )

    assert read(backend, file) == FILES[str(file.entry.path)]
    assert [headers["x-test"] for _, _, headers in gate.requests] == ["1"] * len(gate.requests)
    assert {headers["authorization"][7:] for _, _, headers in gate.requests} == {TOKEN, f"{TOKEN}-again"}
    backend.close()


def read(backend, file, interfere=lambda: None) -> bytes:
    """
    Read a whole file by one range, and interfere once after the first bytes.
    """
    found, buffer = bytearray(), memoryview(bytearray(500))
    with backend.open_range(file, 0, file.entry.size_bytes) as reader:
        while (count := reader.readinto(buffer)) != 0:
            if count and not found:
                interfere()
            found += buffer[: count or 0]
    return bytes(found)


@pytest.mark.parametrize("change", ["put again", "deleted"])
def test_the_session_never_mixes_two_versions(gcs, gs_uri, here, change, monkeypatch):
    """
    Each piece is of the generation that was listed, or the read fails.
    """
    monkeypatch.setattr(_class_reader, "PIECE_BYTES", 1000)
    backend = GSBackend({**gcs.storage_options, "session_kwargs": {"trust_env": False}}, {})
    file = max(backend.resolve(parse_ref(gs_uri)).files, key=lambda f: f.entry.size_bytes)
    name = f"{here}/model/{file.entry.path}"

    def interfere():
        gcs.put(name, b"x" * file.entry.size_bytes) if change == "put again" else gcs.delete(name)

    with pytest.raises(SourceChangedError):
        read(backend, file, interfere)
    backend.close()


def test_settings_of_a_session_that_mean_nothing_are_told(gcs):
    """
    What aiohttp refuses is an error that names the argument, and is not tried again.
    """
    backend = GSBackend({**gcs.storage_options, "session_kwargs": {"no_such": 1}}, {})

    with pytest.raises(SourceUnavailableError, match="refuses `session_kwargs`") as caught:
        backend.resolve(parse_ref("gs://models/m"))

    assert caught.value.is_final


def test_a_kept_login_that_is_absent_is_denied(gate, monkeypatch):
    """
    `token="cache"` without a login in the cache is denied, as gcsfs does, and the error says why.
    """
    import gcsfs.core

    monkeypatch.setattr(gcsfs.core.GoogleCredentials, "tokens", {})
    backend = GSBackend({"endpoint_url": gate.endpoint, "token": "cache"}, {})

    with pytest.raises(SourceDeniedError, match="No cached tokens"):
        backend.resolve(parse_ref("gs://models/m"))


def test_plain_settings_of_azure_import_no_class(root, azurite, az_uri):
    """
    A connection string needs neither adlfs nor fsspec.
    """
    found = compare(root, az_uri, repr(dict(azurite.storage_options)))

    assert found == ("direct", [])


def test_an_argument_that_only_adlfs_knows_goes_through_it(root, azurite, az_uri):
    """
    An argument that plain requests do not know imports adlfs, whose key then signs our own requests.
    """
    access, loaded = compare(root, az_uri, repr({**azurite.storage_options, "location_mode": "primary"}))

    assert (access, "adlfs" in loaded) == ("direct:adlfs", True)


def jwt() -> str:
    """
    An unsigned token of the form that Microsoft Entra ID issues; the emulator does not check signatures.
    """
    now = int(time.time())
    issuer = "https://sts.windows.net/ab1f708d-50f6-404c-a006-d71b2ac7a606/"
    claims = {"aud": "https://storage.azure.com", "iss": issuer, "iat": now - 60, "nbf": now - 60, "exp": now + 3600}
    parts = [json.dumps(part).encode() for part in ({"alg": "RS256", "typ": "JWT"}, claims)]
    return ".".join([*(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts), "canarysignature"])


AWAITED = """
from azure.core.credentials import AccessToken, AzureNamedKeyCredential, AzureSasCredential

class Awaited:
    async def get_token(self, *scopes, **_):
        return AccessToken({token!r}, 2**31)

    async def close(self):
        pass

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass
"""


@pytest.mark.parametrize("kind", ["awaited", "key", "key as a dictionary", "signature"])
def test_a_credential_that_the_sdk_knows_authorizes_our_requests(
    root, sealed_azurite, sealed_uri, authority, here, kind
):
    """
    Whatever kind of credential adlfs takes, its token, key or signature serves our own requests over TLS.
    """
    expression = {
        "awaited": "Awaited()",
        "key": f"AzureNamedKeyCredential({ACCOUNT!r}, {KEY!r})",
        "key as a dictionary": repr({"account_name": ACCOUNT, "account_key": KEY}),
        "signature": f"AzureSasCredential({sealed_azurite.signature()!r})",
    }[kind]
    host = f"{sealed_azurite.endpoint.removeprefix('https://')}/{ACCOUNT}"
    options = f"{{'account_name': {ACCOUNT!r}, 'account_host': {host!r}, 'credential': {expression}}}"
    trusted = {"SSL_CERT_FILE": str(authority.file), "REQUESTS_CA_BUNDLE": str(authority.file), "NO_PROXY": "*"}

    access, loaded = compare(root, sealed_uri, options, env=trusted, before=AWAITED.format(token=jwt()))

    assert (access, "adlfs" in loaded) == ("direct:adlfs", True)


def test_a_signature_that_is_replaced_counts_from_then_on():
    """
    An `AzureSasCredential` may get another signature at any time, and the next request has it.
    """
    from azure.core.credentials import AzureSasCredential

    credential = AzureSasCredential("sv=1&sig=first")
    backend = AzureBackend({"account_name": ACCOUNT, "credential": credential}, {})
    place = backend.service.place(parse_ref("az://models/m"))
    first = backend.service.read(place, {"If-Match": '"1"'}, renewed=False)[0].path
    credential.update("sv=1&sig=second")

    second = backend.service.read(place, {"If-Match": '"1"'}, renewed=False)[0].path

    assert [path.partition("sig=")[2] for path in (first, second)] == ["first", "second"]


def test_arguments_of_the_default_credential_reach_it(monkeypatch):
    """
    With `anon=False`, what adlfs does not know itself configures `DefaultAzureCredential`, whose failure is told.
    """
    for name in [name for name in os.environ if name.startswith("AZURE_")]:
        monkeypatch.delenv(name)
    others = ("cli", "developer_cli", "managed_identity", "powershell", "shared_token_cache", "visual_studio_code")
    excluded = {f"exclude_{name}_credential": True for name in (*others, "workload_identity", "broker")}
    backend = AzureBackend({"account_name": ACCOUNT, "anon": False, **excluded}, {})

    with pytest.raises(SourceDeniedError, match=r"no token: .*DefaultAzureCredential failed") as caught:
        backend.resolve(parse_ref("az://models/m"))

    assert "ManagedIdentityCredential" not in str(caught.value)
    assert backend.access(parse_ref("az://models/m")) == "direct:adlfs"


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"credential": object()}, "Unsupported credential"),
        ({"connection_string": "x", "location_mode": "secondary"}, "malformed"),
    ],
)
def test_what_the_sdk_refuses_is_told(options, word):
    """
    Arguments that adlfs or the SDK refuse are an error of the settings.
    """
    with pytest.raises(SettingsError, match=word):
        AzureBackend({"account_name": ACCOUNT, **options}, {}).resolve(parse_ref("az://models/m"))


def test_the_account_of_a_uri_is_that_of_the_class():
    """
    Without a configured account adlfs is made for the account that a URI names, once for each.
    """
    backend = AzureBackend({"account_key": KEY, "location_mode": "secondary"}, {})

    found = {
        backend.service.read(backend.service.place(parse_ref(uri)), {"If-Match": '"1"'}, renewed=False)[0].host
        for uri in ("abfss://models@one1.dfs.core.windows.net/m", "abfss://models@two2.dfs.core.windows.net/m")
    }

    assert found == {"one1-secondary.blob.core.windows.net", "two2-secondary.blob.core.windows.net"}


def test_the_emulator_of_the_sdk_is_found():
    """
    `UseDevelopmentStorage=true` means the address that the SDK knows.
    """
    backend = AzureBackend({"connection_string": "UseDevelopmentStorage=true"}, {})
    place = backend.service.place(parse_ref("az://models/m"))

    target, _ = backend.service.read(place, {"If-Match": '"1"'}, renewed=False)

    assert (target.authority, target.path.partition("?")[0]) == ("127.0.0.1:10000", "/devstoreaccount1/models/m")


@pytest.mark.parametrize(
    ("scheme", "options", "environ", "reasons"),
    [
        ("gs", {"token": "anon", "requests_timeout": 5}, {}, []),
        ("gs", {"token": "browser"}, {}, ["`token` is a login that gcsfs keeps"]),
        ("gs", {"session_kwargs": {}}, {}, ["`session_kwargs` is an argument that only gcsfs knows"]),
        ("gs", {}, {"FSSPEC_GS_PROJECT": "p"}, ["`project` is set by fsspec's configuration"]),
        ("gs", {"requester_pays": True}, {"GCSFS_DEFAULT_PROJECT": "p"}, []),
        (
            "gs",
            {},
            {"GOOGLE_API_USE_CLIENT_CERTIFICATE": "true"},
            ["`GOOGLE_API_USE_CLIENT_CERTIFICATE` names a client certificate"],
        ),
        ("gs", {}, {"GOOGLE_API_USE_CLIENT_CERTIFICATE": "false", "GOOGLE_API_CERTIFICATE_CONFIG": "x"}, []),
        ("az", {"account_key": KEY, "max_concurrency": 4}, {}, []),
        ("abfs", {"credential": "sv=1&sig=x"}, {}, []),
        ("az", {"location_mode": "secondary"}, {}, ["`location_mode` is an argument that only adlfs knows"]),
        ("az", {}, {"FSSPEC_AZ_ACCOUNT_NAME": "a"}, ["`account_name` is set by fsspec's configuration"]),
        ("az", {"credential": {}}, {}, ["`credential` is a credential that Azure's SDK awaits or unpacks"]),
    ],
)
def test_the_reason_for_a_class_is_named(scheme, options, environ, reasons, tmp_path):
    """
    Every setting that is not plain is named with its reason, and a plain one is not.
    """
    assert [str(reason) for reason in explain(scheme, options, {"HOME": str(tmp_path), **environ})] == reasons


def test_how_a_cloud_was_reached_is_recorded(root, gcs, gs_uri):
    """
    The record of a model says whether a class was used.
    """
    options = {**gcs.storage_options, "session_kwargs": {"trust_env": False}}
    backend = GSBackend(options, {})
    store = ModelStore(root, mode="rw", backends={"gs": lambda _: backend})

    model = store.ensure(gs_uri, progress=False)

    assert isinstance(backend, SupportsAccess)
    assert (read_tree(model.path), model.record.access) == (FILES, "fsspec:gcsfs")


def test_a_piece_that_never_comes_is_not_waited_for():
    """
    A reader looks up while a piece is under way, and cancels it when it is left.
    """
    loop = asyncio.new_event_loop()
    cancelled = []

    async def hang():
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        with _class_reader.ClassReader(lambda *_: asyncio.run_coroutine_threadsafe(hang(), loop), 0, 10) as reader:
            assert reader.readinto(memoryview(bytearray(10))) is None
        deadline = time.monotonic() + 5
        while not cancelled and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

    assert cancelled == [True]
