"""
`sqlite:///srv/models.db/llama-3-8b`: models in SQLite files.

One file that is easily copied and backed up holds many models. A file of a model is a row, cut into chunks, since a
value in SQLite has at most a gigabyte. A row is never changed: who replaces a file makes another row, whose number was
never used before. So the number pins the content.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from kserve_pvc import (
    FileEntry,
    InvalidURIError,
    ModelRef,
    RemoteFile,
    Resolved,
    SourceChangedError,
    SourceDeniedError,
    SourceNotFoundError,
    SourceUnavailableError,
    order_listing,
)

CHUNK_BYTES = 1024 * 1024
_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
  id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, size INTEGER NOT NULL, sha256 TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS chunks (
  file INTEGER NOT NULL, number INTEGER NOT NULL, data BLOB NOT NULL, PRIMARY KEY (file, number)
);
"""


class SQLiteBackend:
    """
    Reads models from SQLite files: the longest part of the path that is a file is the database, the rest is the model.

    Args:
        options: `timeout`, the seconds to wait for a concurrent writer.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._timeout = float(options.get("timeout", 5.0))

    def resolve(self, ref: ModelRef) -> Resolved:
        if ref.revision is not None:
            raise InvalidURIError(ref.uri, "a database has no revisions")
        database, prefix = _split(ref)
        query = "SELECT id, name, size, sha256 FROM files WHERE name = ? OR substr(name, 1, ?) = ?"
        with self._connected(ref.uri, database) as connection:
            rows = connection.execute(query, (prefix, len(prefix) + 1, f"{prefix}/")).fetchall()
        # A file of exactly this name, or the files below it; both may exist.
        single = [row for row in rows if row[1] == prefix]
        return order_listing(ref, (_file(database, prefix, row) for row in single or rows))

    @contextmanager
    def open_range(self, file: RemoteFile, start: int, stop: int) -> Iterator[_Reader]:
        with self._connected(file.address, Path(file.pin["database"])) as connection:
            yield _Reader(connection, file, start, stop)

    @contextmanager
    def _connected(self, where: str, database: Path) -> Iterator[sqlite3.Connection]:
        try:
            with closing(
                sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True, timeout=self._timeout, isolation_level=None)
            ) as connection:
                yield connection
        except sqlite3.DatabaseError as error:
            raise _meaning(where, error) from error


class _Reader:
    """
    Bytes `start` to `stop` (not included) of one row, chunk by chunk.
    """

    def __init__(self, connection: sqlite3.Connection, file: RemoteFile, start: int, stop: int) -> None:
        self._connection = connection
        self._file = file
        self._position = start
        self._stop = stop

    def readinto(self, buffer: memoryview) -> int:
        number, offset = divmod(self._position, CHUNK_BYTES)
        count = min(len(buffer), self._stop - self._position, CHUNK_BYTES - offset)
        if count == 0:
            return 0
        # Each read is a transaction of its own, so a slow reader does not block writers.
        query = "SELECT substr(data, ?, ?) FROM chunks WHERE file = ? AND number = ?"
        try:
            row = self._connection.execute(query, (offset + 1, count, int(self._file.pin["id"]), number)).fetchone()
        except sqlite3.DatabaseError as error:
            raise _meaning(self._file.address, error) from error
        if row is None or len(row[0]) != count:
            raise SourceChangedError(self._file.address, str(self._file.entry.path))
        buffer[:count] = row[0]
        self._position += count
        return count


def create(database: Path) -> None:
    """
    Make a database for models, whose readers and writers do not wait for each other.
    """
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(_SCHEMA)


def put(database: Path, name: str, data: bytes) -> None:
    """
    Store a file under a name, in place of the one that has it.
    """
    with closing(sqlite3.connect(database, timeout=30.0)) as connection, connection:
        _delete(connection, name)
        digest = hashlib.sha256(data).hexdigest()
        row = connection.execute(
            "INSERT INTO files (name, size, sha256) VALUES (?, ?, ?)", (name, len(data), digest)
        ).lastrowid
        chunks = (
            (row, start // CHUNK_BYTES, data[start : start + CHUNK_BYTES]) for start in range(0, len(data), CHUNK_BYTES)
        )
        connection.executemany("INSERT INTO chunks (file, number, data) VALUES (?, ?, ?)", chunks)


def delete(database: Path, name: str) -> None:
    """
    Remove a file.
    """
    with closing(sqlite3.connect(database, timeout=30.0)) as connection, connection:
        _delete(connection, name)


def _delete(connection: sqlite3.Connection, name: str) -> None:
    connection.execute("DELETE FROM chunks WHERE file IN (SELECT id FROM files WHERE name = ?)", (name,))
    connection.execute("DELETE FROM files WHERE name = ?", (name,))


def _split(ref: ModelRef) -> tuple[Path, str]:
    path = Path(ref.location)
    if not path.is_absolute() or ".." in path.parts:
        raise InvalidURIError(ref.uri, "write `sqlite:///path/of/models.db/name-of-the-model`")
    for place in path.parents:
        if place.is_file():
            return place, path.relative_to(place).as_posix()
    raise SourceNotFoundError(ref.uri, "no part of its path is a file")


def _file(database: Path, prefix: str, row: tuple[int, str, int, str]) -> RemoteFile:
    number, name, size, sha256 = row
    inside = name.rpartition("/")[2] if name == prefix else name[len(prefix) + 1 :]
    # A database is as untrusted as a server: `FileEntry` checks the name, and the store the digest.
    entry = FileEntry(path=inside, size_bytes=size, sha256=sha256, token=str(number))
    return RemoteFile(
        entry=entry, address=f"sqlite://{database}/{name}", pin={"database": str(database), "id": str(number)}
    )


def _meaning(where: str, error: sqlite3.DatabaseError) -> SourceUnavailableError | SourceDeniedError:
    if error.sqlite_errorcode in (sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH, sqlite3.SQLITE_CANTOPEN):
        return SourceDeniedError(where, str(error))
    # A lock is transient; a file that is not a database is not.
    is_final = error.sqlite_errorcode not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
    return SourceUnavailableError(where, str(error), is_final=is_final)
