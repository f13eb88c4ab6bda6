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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
from origin import SeaweedS3
from trees import model_files, read_tree

from kserve_pvc import ModelStore, SettingsError, StoreError

# Rows: config file, config dir, environment, known to the class only, misspelled, custom credentials object,
# instance handed in. `x`: here; `-`: this column has no such thing; `.`: to be added with its backend.
CELLS = """
                  s3  gs  az  http  hf  file  fsspec+
config-file       x   .   .   .     .   .     .
config-dir        x   .   .   .     .   .     .
environment       x   .   .   .     .   .     .
class-only        x   .   .   .     .   .     .
misspelled        x   .   .   .     .   .     .
credentials       x   .   .   -     -   -     .
instance          .   .   .   .     .   .     .
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
        misspelled: An argument that does not exist, and the one that was meant.
        credentials: Makes arguments with an object of the SDK instead of keys. Code, for the other process.
    """

    protocol: str
    uri: str
    settings: Mapping[str, Any]
    class_only: Mapping[str, Any]
    access: str
    misspelled: tuple[str, str]
    credentials: str = ""


@pytest.fixture
def s3_column(origin: SeaweedS3, upload: Callable[[Mapping[str, bytes]], str]) -> Column:
    return Column(
        protocol="s3",
        uri=upload(FILES),
        settings={"endpoint_url": origin.endpoint, "key": origin.key, "secret": origin.secret},
        class_only={"max_concurrency": 2},
        access="direct:s3fs",
        misspelled=("endpont_url", "endpoint_url"),
        credentials=(
            "from aiobotocore.session import AioSession\n"
            "session = AioSession()\n"
            f"session.set_credentials({origin.key!r}, {origin.secret!r})\n"
            f"arguments = {{'session': session, 'endpoint_url': {origin.endpoint!r}}}\n"
        ),
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
files = {{name.removeprefix(path).strip("/"): fs.cat_file(name) for name in fs.find(path)}}
print(json.dumps({{name: base64.b64encode(data).decode() for name, data in files.items()}}))
"""


def theirs(column: Column, arguments: Mapping[str, Any], credentials: str = "") -> Mapping[str, bytes] | None:
    """
    What fsspec reads in a process that starts now, so that it reads its configuration; None if it fails.
    """
    import base64

    script = THEIRS.format(credentials=credentials)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, column.uri, json.dumps(arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode:
        return None
    return {name: base64.b64decode(data) for name, data in json.loads(done.stdout).items()}


def ours(root: Path, column: Column, arguments: Mapping[str, Any]) -> tuple[Mapping[str, bytes], str | None] | None:
    """
    What `ensure` brings, and the way that the record names; None if it fails.
    """
    options = {"storage_options": arguments} if arguments else {}
    try:
        model = ModelStore(root, mode="rw", retry_seconds=1, **options).ensure(column.uri, progress=False)
    except StoreError:
        return None
    return read_tree(model.path), model.record.access


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
    without = (theirs(column, {}), ours(root, column, {}))
    configure(row, column, home, monkeypatch)

    assert without == (None, None)
    assert theirs(column, {}) == FILES
    assert ours(root, column, {}) == (FILES, column.access)


@pytest.mark.parametrize(("row", "column"), cells("class-only"), indirect=["column"])
def test_an_argument_of_the_class_leads_to_the_class(row, column, root):
    """
    An argument that only the class knows is no error, and the record says that the class was needed.
    """
    arguments = {**column.settings, **column.class_only}

    assert theirs(column, arguments) == FILES
    assert ours(root, column, arguments) == (FILES, column.access)


@pytest.mark.parametrize(("row", "column"), cells("misspelled"), indirect=["column"])
def test_a_misspelled_argument_is_an_error(row, column, root):
    """
    The error names the argument that was meant. fsspec fails too, unless the class ignores what it does not know.
    """
    wrong, right = column.misspelled
    arguments = {**column.settings, wrong: "value"}

    with pytest.raises(SettingsError, match=f"{wrong}.*did you mean `{right}`"):
        ModelStore(root, mode="rw", storage_options=arguments).ensure(column.uri, progress=False)

    assert theirs(column, arguments) is None or column.protocol == "file"


@pytest.mark.parametrize(("row", "column"), cells("credentials"), indirect=["column"])
def test_an_object_of_the_sdk_authorizes(row, column, root):
    """
    Credentials that are an object of the service's SDK are used as the class uses them.
    """
    made: dict[str, Any] = {}
    exec(column.credentials, made)

    assert theirs(column, {}, column.credentials) == FILES
    assert ours(root, column, made["arguments"]) == (FILES, column.access)


def test_the_table_is_whole(request):
    """
    Every cell of the table is marked, and every column that has a cell has a server.
    """
    table = _rows()
    marks = {mark for row in table.values() for mark in row.values()}
    columns = {name for row in table.values() for name, mark in row.items() if mark == "x"}

    assert marks <= {"x", "-", "."}
    assert {name for name in columns if f"{name.rstrip('+')}_column" not in globals()} == set()
