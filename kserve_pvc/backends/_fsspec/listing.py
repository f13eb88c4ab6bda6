"""
Listing a model through a file system.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
from fsspec import AbstractFileSystem as FileSystem
from fsspec.asyn import AsyncFileSystem

from kserve_pvc._format.file_names import MAX_LEVELS, check_name
from kserve_pvc._format.records import FileEntry
from kserve_pvc._source.contract import MAX_FILES, RemoteFile
from kserve_pvc._source.ref import ModelRef, join_parts
from kserve_pvc.backends._directories import Directories
from kserve_pvc.backends._fsspec.filesystems import Lender
from kserve_pvc.backends._fsspec.identity import identity, large_file_digest, token
from kserve_pvc.backends._fsspec.spelling import Spelling
from kserve_pvc.backends._listing import LOST_AND_FOUND
from kserve_pvc.errors import PolicyError, SourceNotFoundError, SourceUnavailableError, UnsafePathError

# Beside what identifies the content: where the file system is found, and what a reader knows the model by.
URL, URI = "url", "uri"

_LOCAL = ("file", "local")

# Does one call of a file system, with a limit for how long it may take.
Run = Callable[[Callable[[], Any]], Any]


@attrs.frozen
class Listing:
    """
    The files of a directory, or one file, at a URL, as far as the patterns of `ref` select them.
    """

    ref: ModelRef
    spelling: Spelling
    lender: Lender
    run: Run

    def files(self) -> Iterator[RemoteFile]:
        """
        List every file, each with what identifies its content.
        """
        url = self.spelling.url
        path = str(self.lender.kind._strip_protocol(url))
        with self.lender.borrowed() as fs:
            self.lender.forget(fs, path)
            info = None if url.endswith("/") else self.run(lambda: fs.info(path))
            if info is not None and info["type"] != "directory" and not self._is_marker(fs, path, info):
                name = self.spelling.name or str(info["name"]).rstrip("/").rpartition("/")[2]
                yield self._file(info, name)
                return
            directories = Directories(self.uri)
            for found in self._below(fs, path):
                name = str(found["name"])
                if found.get("size") == 0 and (name.endswith("/") or (name == path and info is not None)):
                    directories.mark(name[len(path.rstrip("/")) + 1 :])
                    continue
                if found["name"] == path:
                    raise SourceNotFoundError(self.uri, "it is a file, not a directory; remove the slash at its end")
                inside = self._inside(path, name)
                # What has something below its name is a directory, also where the patterns leave that out.
                directories.mark(inside)
                # A name that ends in a slash marks a directory, whatever it holds.
                if self.ref.selects(inside) and not inside.endswith("/"):
                    yield from directories.sift([self._file(found, join_parts(inside).removeprefix("/"))])
            yield from directories.empty_files()

    @property
    def uri(self) -> str:
        return self.ref.uri

    def _is_marker(self, fs: FileSystem, path: str, info: Mapping[str, Any]) -> bool:
        """Whether an empty file has something below it, so that it stands for a directory of an object store."""
        if info.get("size") != 0:
            return False
        prefix = path.rstrip("/") + "/"
        try:
            found = self.run(lambda: fs.find(path, detail=True))
        except (OSError, NotImplementedError):
            return False
        return any(str(name).startswith(prefix) for name in found)

    def _below(self, fs: FileSystem, path: str) -> Iterator[Mapping[str, Any]]:
        """
        List what lies below a directory, each with what the file system says about it.

        Where `find` is the one that fsspec brings for all, the tree is walked here: that one leaves out whatever it
        fails to list, without an error, even with `on_error="raise"`.
        """
        if _has_own_find(fs):
            yield from self.run(lambda: fs.find(path, detail=True)).values()
            return
        waiting, number = [path], 0
        while waiting:
            directory = waiting.pop()
            number += 1
            if number > MAX_FILES:
                raise PolicyError(self.uri, f"it has more than {MAX_FILES} directories; name a smaller part of it")
            self.lender.forget(fs, directory)
            for info in self.run(lambda: fs.ls(directory, detail=True)):  # noqa: B023
                name = str(info["name"]).rstrip("/")
                if info["type"] != "directory":
                    yield info
                elif name != directory.rstrip("/") and self._is_wanted(self._inside(path, name)):
                    waiting.append(name)

    def _is_wanted(self, directory: str) -> bool:
        if self.spelling.protocol in _LOCAL and directory == LOST_AND_FOUND:
            return False
        if ".." in directory.split("/"):
            check_name(directory)
        if not self.ref.may_select_below(directory):
            return False
        if directory.count("/") >= MAX_LEVELS - 1:
            # No file in it can be stored, and there may be one more directory in each.
            check_name(f"{directory}/x")
        return True

    def _inside(self, path: str, name: object) -> str:
        prefix = path.rstrip("/") + "/"
        if not isinstance(name, str) or not name.startswith(prefix):
            reason = f"the listing of `{prefix}` contains `{name}`, which is elsewhere"
            raise SourceUnavailableError(self.uri, reason, is_final=True)
        return name[len(prefix) :]

    def _file(self, info: Mapping[str, Any], name: str) -> RemoteFile:
        if info.get("islink"):
            rule = (
                "links are not followed through fsspec; name the source as `file://`, or leave it out with `--ignore`"
            )
            raise UnsafePathError(name, rule)
        if info["type"] != "file":
            raise UnsafePathError(name, "only regular files are copied; devices, pipes and sockets are refused")
        size = info.get("size")
        if not isinstance(size, int) or size < 0:
            raise SourceUnavailableError(self.uri, f"the listing gives no size for `{name}`", is_final=True)
        said = identity(info)
        promised = self.spelling.sha256
        entry = FileEntry(
            path=name,
            size_bytes=size,
            sha256=promised or large_file_digest(info),
            token=promised or token(self.spelling.protocol, said),
        )
        pin = {**said, URL: self.spelling.url, URI: self.uri}
        return RemoteFile(entry=entry, address=info["name"], pin=pin, unpack=self.spelling.unpack)


def _has_own_find(fs: FileSystem) -> bool:
    if isinstance(fs, AsyncFileSystem):
        return type(fs)._find is not AsyncFileSystem._find
    return type(fs).find is not FileSystem.find
