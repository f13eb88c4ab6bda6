"""
Models in SQLite files, under the conformance suite and as a store finds them.
"""

from importlib.metadata import entry_points

import kserve_pvc_sqlite
import pytest
from kserve_pvc_sqlite import SQLiteBackend

from kserve_pvc import ModelStore, SourceUnavailableError
from kserve_pvc.testing import BackendConformance


class Database:
    """
    A database as the service of the conformance suite, filled without the backend.
    """

    storage_options = {"timeout": 30}  # noqa: RUF012
    denied_options = None
    unreachable_options = None

    def __init__(self, path):
        self.path = path
        kserve_pvc_sqlite.create(path)

    def uri(self, path):
        return f"sqlite://{self.path}/{path}"

    def put(self, path, data):
        kserve_pvc_sqlite.put(self.path, path, data)

    def delete(self, path):
        kserve_pvc_sqlite.delete(self.path, path)


class TestSQLite(BackendConformance):
    """
    The conformance suite.
    """

    backend = SQLiteBackend
    many_files = 1000

    @pytest.fixture
    def remote(self, tmp_path):
        return Database(tmp_path / "models.db")


@pytest.fixture
def database(tmp_path):
    """
    A database with one small model.
    """
    database = Database(tmp_path / "models.db")
    database.put("tiny/config.json", b"{}")
    return database


@pytest.fixture
def store(tmp_path):
    """
    A store without explicit backends.
    """
    (tmp_path / "volume").mkdir()
    return ModelStore(tmp_path / "volume", mode="rw", retry_seconds=1)


def test_the_scheme_is_found_by_its_entry_point(store, database):
    """
    Installing the distribution is all it takes.
    """
    assert [point.dist.name for point in entry_points(group="kserve_pvc.backends", name="sqlite")] == [
        "kserve-pvc-sqlite"
    ]

    model = store.ensure(database.uri("tiny"), progress=False)

    assert [(str(f.path), f.evidence is not None) for f in model.record.files] == [("config.json", True)]


def test_what_is_no_database_is_said_to_be_none(store, tmp_path):
    """
    A file that SQLite cannot read is an error with its reason, which is not tried again.
    """
    (tmp_path / "notes.txt").write_text("no database, but as long as the header of one, and longer than that" * 10)

    with pytest.raises(SourceUnavailableError, match="file is not a database") as caught:
        store.ensure(f"sqlite://{tmp_path}/notes.txt/tiny", progress=False)

    assert caught.value.is_final
