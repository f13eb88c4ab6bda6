"""
Empty objects that stand for directories.

File managers, mounts and Hadoop's tools write an empty object of a directory's own name, with or without a slash at
its end. The first kind is told from an empty file by what lies below its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kserve_pvc._format.file_names import MAX_LEVELS, MAX_NAME_BYTES
from kserve_pvc._source.contract import MAX_FILES, RemoteFile
from kserve_pvc.errors import PolicyError

# Those of files that the patterns leave out count too.
MAX_LISTED_DIRECTORIES = MAX_FILES


class Directories:
    """
    Holds back the empty files of a listing until it is known which of them stand for directories.

    A listing need not be in order, so that is known at its end only.

    Args:
        uri: Named in errors.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._names = {""}
        self._empty: list[RemoteFile] = []

    def mark(self, path: str) -> None:
        """
        Note that something has this path, so that all that lies above it are directories.

        Names that no file can have, as the patterns may leave them out, are noted as far as one can.

        Raises:
            PolicyError: There are more than `MAX_LISTED_DIRECTORIES`.
        """
        path = "/".join(path[: MAX_NAME_BYTES + 1].split("/", MAX_LEVELS)[:MAX_LEVELS])
        while (path := path.rpartition("/")[0]) not in self._names:
            self._names.add(path)
            if len(self._names) > MAX_LISTED_DIRECTORIES:
                rule = f"it has more than {MAX_LISTED_DIRECTORIES} directories; name a smaller part of it"
                raise PolicyError(self._uri, rule)

    def sift(self, files: Iterable[RemoteFile]) -> Sequence[RemoteFile]:
        """
        Take in files, and return those that are not empty.

        Raises:
            PolicyError: More than `MAX_FILES` are held back.
        """
        kept: list[RemoteFile] = []
        for file in files:
            self.mark(str(file.entry.path))
            (kept if file.entry.size_bytes else self._empty).append(file)
        if len(self._empty) > MAX_FILES:
            raise PolicyError(self._uri, f"it has more than {MAX_FILES} files; name a smaller part of it")
        return kept

    def empty_files(self) -> Sequence[RemoteFile]:
        """
        Return the files that are held back and have nothing below their names.
        """
        return [file for file in self._empty if str(file.entry.path) not in self._names]
