"""
Settings of fsspec, from wherever fsspec takes them, against what fsspec itself does with them on the same server.

A cell reads one model twice: by `ensure`, and by the fsspec class in a process of its own. Both must see the same
bytes with the setting, and both must fail without it, so that it is the setting that counts. `CELLS` says which cells
there are; `test_the_table_is_whole` fails for one that is in the table and has no column, and the other way round.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import azurite
import gcs
import pytest
from azurite import ACCOUNT, KEY, Azurite
from gcs import FakeGCS, Gate
from hub import HuggingFace
from origin import SeaweedS3
from trees import model_files, read_tree, write_files
from weather import Authority
from webserver import WebServer

from kserve_pvc import ModelStore, SettingsError, StoreError

# Rows: config file, config dir, environment, known to the class only, misspelled, custom credentials object,
# instance handed in. `x`: here; `-`: this column has no such thing; `.`: to be added with its backend.
CELLS = """
                  s3  gs  az  http  hf  file  fsspec+
config-file       x   x   x   x     x   x     x
config-dir        x   x   x   x     x   x     x
environment       x   x   x   x     x   x     x
class-only        x   x   x   x     x   x     x
misspelled        x   x   x   x     x   x     -
credentials       x   x   x   -     -   -     x
instance          x   x   x   x     x   x     x
"""
FILES = model_files(seed=49)


@attrs.frozen(kw_only=True)
class Column:
    """
    One protocol on one real server.

    Attributes:
        settings: Arguments of the fsspec class without which the model cannot be read, as JSON can hold them.
        class_only: Arguments of the class, beside those, that our own requests have no use for.
        access: What the record says if the class is needed.
        class_only_access: What it says with `class_only`, if that is not the same.
        credentials_access: What it says with `credentials`, if that is not the same.
        misspelled: An argument that does not exist, and the one that was meant.
        ignores_misspelled: Whether the class ignores it.
        credentials: Makes arguments with an object of the SDK instead of keys. Code, for the other process.
        package: The one that the class is from.
        files: What the model holds.
        is_open: Whether the model can be read without the settings, directly.
    """

    protocol: str
    uri: str
    settings: Mapping[str, Any]
    class_only: Mapping[str, Any]
    access: str
    misspelled: tuple[str, str]
    ignores_misspelled: bool = False
    credentials: str = ""
    package: str
    files: Mapping[str, bytes] = FILES
    is_open: bool = False
    class_only_access: str = attrs.field()
    credentials_access: str = attrs.field()

    @class_only_access.default
    @credentials_access.default
    def _same(self) -> str:
        return self.access


@pytest.fixture
def s3_column(origin: SeaweedS3, upload: Callable[[Mapping[str, bytes]], str]) -> Column:
    return Column(
        protocol="s3",
        uri=upload(FILES),
        settings={"endpoint_url": origin.endpoint, "key": origin.key, "secret": origin.secret},
        class_only={"max_concurrency": 2},
        access="direct:s3fs",
        package="s3fs",
        misspelled=("endpont_url", "endpoint_url"),
        credentials=(
            "from aiobotocore.session import AioSession\n"
            "session = AioSession()\n"
            f"session.set_credentials({origin.key!r}, {origin.secret!r})\n"
            f"arguments = {{'session': session, 'endpoint_url': {origin.endpoint!r}}}\n"
        ),
    )


@pytest.fixture(scope="session")
def google() -> Iterator[FakeGCS]:
    """
    An emulator of Google Cloud Storage.
    """
    pytest.importorskip("gcsfs", reason="`gcsfs` is not installed")
    try:
        with FakeGCS() as server:
            yield server
    except gcs.MissingError as missing:
        pytest.skip(str(missing))


@pytest.fixture
def gs_column(google: FakeGCS, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Column]:
    for name, data in FILES.items():
        google.put(f"{tmp_path.name}/model/{name}", data)
    # gcsfs itself would first request the type of the bucket over gRPC, which the emulator does not speak.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    with Gate(google) as elsewhere:
        # Where nothing is configured, requests go to a server that has no bucket.
        elsewhere.instead = lambda method, path: (404, {}, b"")
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", elsewhere.endpoint)
        yield Column(
            protocol="gs",
            uri=google.uri(f"{tmp_path.name}/model"),
            settings={"endpoint_url": google.endpoint, "token": "anon"},
            class_only={"session_kwargs": {"trust_env": True}},
            access="direct:gcsfs",
            package="gcsfs",
            class_only_access="fsspec:gcsfs",
            misspelled=("endpont_url", "endpoint_url"),
            ignores_misspelled=True,
            credentials=(
                "from google.oauth2.credentials import Credentials\n"
                f"arguments = {{'token': Credentials('canary'), 'endpoint_url': {google.endpoint!r}}}\n"
            ),
            credentials_access="direct",
        )


@pytest.fixture(scope="session")
def azure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Azurite, Path]]:
    """
    A storage account over TLS, which alone lets credentials be objects, and the authority that it is certified by.
    """
    pytest.importorskip("adlfs", reason="`adlfs` is not installed")
    try:
        authority = Authority(tmp_path_factory.mktemp("authority"))
    except FileNotFoundError:
        pytest.skip("`openssl` is not installed")
    authority.context("azurite")
    certificate = (authority.file.with_name("azurite.pem"), authority.file.with_name("azurite.key"))
    try:
        with Azurite(certificate=certificate) as server:
            yield server, authority.file
    except azurite.MissingError as missing:
        pytest.skip(str(missing))


@pytest.fixture
def az_column(azure: tuple[Azurite, Path], tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Column:
    server, authority = azure
    for name, data in FILES.items():
        server.put(f"{tmp_path.name}/model/{name}", data)
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
        monkeypatch.setenv(name, str(authority))
    account = {"account_name": ACCOUNT, "account_host": f"{server.endpoint.removeprefix('https://')}/{ACCOUNT}"}
    return Column(
        protocol="az",
        uri=server.uri(f"{tmp_path.name}/model"),
        settings={"connection_string": server.options()["connection_string"]},
        class_only={"location_mode": "primary"},
        access="direct:adlfs",
        package="adlfs",
        misspelled=("acount_name", "account_name"),
        ignores_misspelled=True,
        credentials=(
            "from azure.core.credentials import AzureNamedKeyCredential\n"
            f"arguments = {{**{account!r}, 'credential': AzureNamedKeyCredential({ACCOUNT!r}, {KEY!r})}}\n"
        ),
    )


@pytest.fixture
def http_column(monkeypatch: pytest.MonkeyPatch) -> Iterator[Column]:
    pytest.importorskip("aiohttp", reason="`aiohttp` is not installed")
    # The server is on this machine, which a URL may otherwise not lead to.
    monkeypatch.setenv("KSERVE_PVC_ALLOW_PRIVATE_ADDRESSES", "1")
    with WebServer(wants={"X-Key": "canary"}) as server:
        server.put("model.bin", FILES["config.json"])
        yield Column(
            protocol="http",
            uri=server.uri("model.bin"),
            files={"model.bin": FILES["config.json"]},
            settings={"client_kwargs": {"headers": {"X-Key": "canary"}}},
            class_only={"block_size": 65_536},
            access="fsspec:fsspec",
            package="fsspec",
            misspelled=("client_kwarg", "client_kwargs"),
        )


@pytest.fixture
def hf_column() -> Iterator[Column]:
    pytest.importorskip("huggingface_hub", reason="`huggingface_hub` is not installed")
    with HuggingFace() as hub:
        for name, data in FILES.items():
            hub.put(f"team/model/{name}", data)
        yield Column(
            protocol="hf",
            uri=hub.uri("team/model"),
            settings=hub.storage_options,
            class_only={"block_size": 1_048_576},
            access="fsspec:huggingface_hub",
            package="huggingface_hub",
            misspelled=("tokn", "token"),
            ignores_misspelled=True,
        )


@pytest.fixture
def file_column(tmp_path: Path) -> Column:
    write_files(tmp_path / "files", FILES)
    return Column(
        protocol="file",
        uri=f"file://{tmp_path}/files",
        settings={"auto_mkdir": False},
        class_only={"auto_mkdir": True},
        access="fsspec:fsspec",
        package="fsspec",
        misspelled=("auto_mkdr", "auto_mkdir"),
        ignores_misspelled=True,
        is_open=True,
    )


@pytest.fixture
def fsspec_column(s3_column: Column) -> Column:
    """
    The one of s3, where fsspec is requested by the URI.
    """
    way = "fsspec:s3fs"
    return attrs.evolve(
        s3_column, uri=f"fsspec+{s3_column.uri}", access=way, class_only_access=way, credentials_access=way
    )


def _rows() -> Mapping[str, Mapping[str, str]]:
    header, *lines = CELLS.strip().splitlines()
    columns = header.split()
    return {name: dict(zip(columns, marks, strict=True)) for name, *marks in (line.split() for line in lines)}


def cells(*rows: str) -> list[Any]:
    """
    The cells of some rows that there are, as parameters `row` and `column`.
    """
    table = _rows()
    return [
        pytest.param(row, column, id=f"{row}-{column}")
        for row in rows
        for column, mark in table[row].items()
        if mark == "x"
    ]


@pytest.fixture
def column(request: pytest.FixtureRequest) -> Column:
    found: Column = request.getfixturevalue(f"{request.param.rstrip('+')}_column")
    return found


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """
    A home without files, and an environment that names no credentials.
    """
    prefixes = ("AWS_", "FSSPEC_", "GOOGLE_", "AZURE_", "HF_", "STORAGE_")
    for name in [name for name in os.environ if name.startswith(prefixes)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return tmp_path


THEIRS = """
import base64, json, sys
from fsspec.core import url_to_fs
uri, arguments = sys.argv[1], json.loads(sys.argv[2])
{credentials}
fs, path = url_to_fs(uri, **arguments)
files = {{name.removeprefix(path).strip("/") or name.rpartition("/")[2]: fs.cat_file(name) for name in fs.find(path)}}
print(json.dumps({{name: base64.b64encode(data).decode() for name, data in files.items()}}))
"""


def theirs(column: Column, arguments: Mapping[str, Any], credentials: str = "") -> Mapping[str, bytes] | None:
    """
    What fsspec reads in a process that starts now, so that it reads its configuration; None if it fails.
    """
    import base64

    script = THEIRS.format(credentials=credentials)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, column.uri.removeprefix("fsspec+"), json.dumps(arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode:
        return None
    return {name: base64.b64decode(data) for name, data in json.loads(done.stdout).items()}


def ours(root: Path, column: Column, arguments: Mapping[str, Any]) -> tuple[Mapping[str, bytes], str | None]:
    """
    What `ensure` brings, and the way that the record names.
    """
    options = {"storage_options": arguments} if arguments else {}
    model = ModelStore(root, mode="rw", **options).ensure(column.uri, progress=False)
    return read_tree(model.path), model.record.access


def refused(root: Path, column: Column) -> None:
    """
    `ensure` brings nothing without settings, which is no fault that time mends.
    """
    with pytest.raises(StoreError):
        ModelStore(root, mode="rw", retry_seconds=1).ensure(column.uri, progress=False)


def configure(row: str, column: Column, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Put the settings of a column where a row says that fsspec finds them.
    """
    text = json.dumps({column.protocol: column.settings})
    if row == "environment":
        for name, value in column.settings.items():
            as_text = value if isinstance(value, str) else json.dumps(value)
            monkeypatch.setenv(f"FSSPEC_{column.protocol.upper()}_{name.upper()}", as_text)
        return
    place = home / (".config/fsspec" if row == "config-file" else "elsewhere")
    place.mkdir(parents=True)
    (place / "conf.json").write_text(text)
    if row == "config-dir":
        monkeypatch.setenv("FSSPEC_CONFIG_DIR", str(place))


@pytest.mark.parametrize(("row", "column"), cells("config-file", "config-dir", "environment"), indirect=["column"])
def test_configuration_counts_as_for_fsspec(row, column, home, root, monkeypatch):
    """
    What fsspec finds in its configuration, `ensure` finds too, and the record says that the class was needed.
    """
    for store in ("before", "configured"):
        (root / store).mkdir()
    assert theirs(column, {}) == (column.files if column.is_open else None)
    if column.is_open:
        assert ours(root / "before", column, {}) == (column.files, "direct")
    else:
        refused(root / "before", column)
    configure(row, column, home, monkeypatch)

    assert theirs(column, {}) == column.files
    assert ours(root / "configured", column, {}) == (column.files, column.access)


@pytest.mark.parametrize(("row", "column"), cells("class-only"), indirect=["column"])
def test_an_argument_of_the_class_leads_to_the_class(row, column, root):
    """
    An argument that only the class knows is no error, and the record says that the class was needed.
    """
    arguments = {**column.settings, **column.class_only}

    assert theirs(column, arguments) == column.files
    assert ours(root, column, arguments) == (column.files, column.class_only_access)


@pytest.mark.parametrize(("row", "column"), cells("misspelled"), indirect=["column"])
def test_a_misspelled_argument_is_an_error(row, column, root):
    """
    The error names the argument that was meant. fsspec fails too, unless the class ignores what it does not know.
    """
    wrong, right = column.misspelled
    arguments = {**column.settings, wrong: "value"}

    with pytest.raises(SettingsError, match=f"{wrong}.*did you mean `{right}`"):
        ModelStore(root, mode="rw", storage_options=arguments).ensure(column.uri, progress=False)

    assert (theirs(column, arguments) is None) != column.ignores_misspelled


@pytest.mark.parametrize(("row", "column"), cells("credentials"), indirect=["column"])
def test_an_object_of_the_sdk_authorizes(row, column, root):
    """
    Credentials that are an object of the service's SDK are used as the class uses them.
    """
    made: dict[str, Any] = {}
    exec(column.credentials, made)

    assert theirs(column, {}, column.credentials) == FILES
    assert ours(root, column, made["arguments"]) == (FILES, column.credentials_access)


INSTANCE = """
import json, sys
from fsspec.core import url_to_fs
from kserve_pvc import ModelStore
uri, arguments, root = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
fs, _ = url_to_fs(uri.removeprefix("fsspec+"), **arguments)
ModelStore(root, mode="rw").ensure(uri, filesystem=fs, progress=False)
"""


@pytest.mark.parametrize(("row", "column"), cells("instance"), indirect=["column"])
def test_an_instance_is_used_as_it_is(row, column, root):
    """
    A file system that was made with the settings reads the model without any other setting, and the record says so.
    """
    # In a process of its own, since aiohttp reads the variables for certificates when it is imported.
    arguments = [column.uri, json.dumps(column.settings), str(root)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INSTANCE, *arguments], capture_output=True, text=True, timeout=120
    )

    assert theirs(column, column.settings) == column.files
    assert done.returncode == 0, done.stderr
    model = ModelStore(root).get(column.uri)
    assert (read_tree(model.path), model.record.access) == (column.files, f"fsspec:{column.package}")


def test_the_table_is_whole(request):
    """
    Every cell of the table is marked, and every column that has a cell has a server.
    """
    table = _rows()
    marks = {mark for row in table.values() for mark in row.values()}
    columns = {name for row in table.values() for name, mark in row.items() if mark == "x"}

    assert marks <= {"x", "-", "."}
    assert {name for name in columns if f"{name.rstrip('+')}_column" not in globals()} == set()
