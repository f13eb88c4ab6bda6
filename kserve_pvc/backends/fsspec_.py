"""
`fsspec+<protocol>://`: whatever fsspec can read and nobody here has a back end for, such as `sftp`, `webhdfs` or `smb`.

Only `ls`, `find`, `info` and `cat_file` of a file system are called, which write nothing. Its own downloads (`get`) are
not used: some of them make a file of the right size before it has its bytes. How well a version is pinned depends on
what the protocol says about a file.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from types import TracebackType
from typing import Any

import attrs
from fsspec import AbstractFileSystem as FileSystem
from fsspec import get_filesystem_class
from fsspec.asyn import AsyncFileSystem

from kserve_pvc._format.file_names import check_name
from kserve_pvc._format.records import FileEntry
from kserve_pvc._source.contract import MAX_FILES, RemoteFile, Resolved, order_listing
from kserve_pvc._source.ref import ModelRef, redact
from kserve_pvc.backends import _BUILT_IN
from kserve_pvc.errors import (
    InvalidURIError,
    PolicyError,
    SourceChangedError,
    SourceDeniedError,
    SourceNotFoundError,
    SourceUnavailableError,
    StoreError,
    UnknownSchemeError,
    UnsafePathError,
)

PREFIX = "fsspec+"
PIECE_BYTES = 4 * 1024 * 1024
# These fetch all of a file for any part of it, so that each part is best asked for once.
_WHOLE = {"data", "gist", "git", "github", "jlab", "jupyter", "libarchive"}
# These read through another file system: from anywhere at all, or by way of copies that nobody checks.
_WRAPPERS = {
    "async_wrapper",
    "asyncwrapper",
    "blockcache",
    "cached",
    "dask",
    "dir",
    "filecache",
    "generic",
    "reference",
    "simplecache",
}
# What names content, or a version of it.
_STRONG = {
    "etag",
    "e_tag",
    "checksum",
    "sha256",
    "sha",
    "hex",
    "hexsha",
    "md5",
    "md5hash",
    "content_md5",
    "generation",
    "version",
} | {
    "version_id",
    "versionid",
}
# What changes with it, as far as clocks can tell. `time` is none of them: where it is said, it is the time of the last
# read.
_WEAK = {
    "mtime",
    "modified",
    "lastmodified",
    "last_modified",
    "modify",
    "modificationtime",
    "updated",
    "created",
    "crc",
} | {
    "ino",
    "fileid",
    "unique",
}
_DENIED = {
    "AuthenticationException",
    "AuthenticationError",
    "LogonFailure",
    "AccessDenied",
    "Unauthorized",
    "Forbidden",
}
# Never secret, and needed to understand what an error says.
_PLAIN_OPTIONS = {"host", "port", "endpoint_url"}
_URL = "url"
_MOMENT = 0.25
_LEAVE_SECONDS = 1.0


class FsspecBackend:
    """
    Models on any file system of fsspec: `fsspec+sftp://host/models/llama` is a directory, or one file.

    Files are pinned by what the file system says about them: an ETag, a checksum or a version if there is one, else
    times and inode. That is compared again after the last byte of every range; nothing makes the server itself refuse,
    as an If-Match would.

    Args:
        options: Arguments of the file system. They are used for every host that a URI names, so a URI may not name
            another host than they do.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = dict(options)
        self._hidden = sorted(set(_texts(options)), key=len, reverse=True)
        self._guard = threading.Lock()
        self._sites: dict[str, _Site] = {}
        self._call_seconds = 300.0

    def resolve(self, ref: ModelRef) -> Resolved:
        if ref.revision is not None:
            raise InvalidURIError(
                ref.uri, "a revision means nothing here; some file systems take one among the `storage_options`"
            )
        if "::" in ref.location:
            raise InvalidURIError(ref.uri, "it is a chain of URLs; name one protocol")
        if ".." in ref.location.split("/"):
            raise UnsafePathError(ref.location, "a path may not climb with `..`")
        return order_listing(ref, self._list(ref))

    def open_range(self, file: RemoteFile, start: int, stop: int) -> _Reader:
        return _Reader(self, file, start, stop)

    def tune(self, *, stall_seconds: float, retry_seconds: float) -> None:
        """
        How long one call of a listing may take. How long a connection may is the file system's own business.
        """
        del stall_seconds
        self._call_seconds = retry_seconds

    def close(self) -> None:
        """
        Let go of idle connections. Whoever goes on gets new ones.
        """
        with self._guard:
            sites = [*self._sites.values()]
            self._sites.clear()
        for site in sites:
            site.close()

    def _list(self, ref: ModelRef) -> Iterator[RemoteFile]:
        url = ref.uri.removeprefix(PREFIX)
        with self._translated(ref.uri):
            site = self._site(url)
            path = str(site.kind._strip_protocol(url))
            with site.borrowed() as fs:
                fs.invalidate_cache()
                info = None if url.endswith("/") else self._call(ref.uri, lambda: fs.info(path))
                if info is not None and info["type"] != "directory":
                    yield _file(ref, url, info, str(info["name"]).rstrip("/").rpartition("/")[2])
                    return
                for info in self._below(ref, fs, path):
                    if info["name"] == path:
                        raise SourceNotFoundError(
                            ref.uri, "it is a file and no directory; leave out the slash at its end"
                        )
                    yield _file(ref, url, info, _inside(ref, path, info["name"]))

    def _below(self, ref: ModelRef, fs: FileSystem, path: str) -> Iterator[Mapping[str, Any]]:
        """
        What lies below a directory, each with what the file system says about it.

        Where `find` is what fsspec brings for all, the tree is walked here: that one leaves out whatever it fails to
        list and says nothing, even if it is asked to.
        """
        if _has_own_find(fs):
            yield from self._call(ref.uri, lambda: fs.find(path, detail=True)).values()
            return
        waiting, number = [path], 0
        while waiting:
            directory = waiting.pop()
            number += 1
            if number > MAX_FILES:
                raise PolicyError(str(ref), f"it has more than {MAX_FILES} directories; name a smaller part of it")
            for info in self._call(ref.uri, lambda: fs.ls(directory, detail=True)):  # noqa: B023
                name = str(info["name"]).rstrip("/")
                if info["type"] != "directory":
                    yield info
                elif name != directory.rstrip("/"):
                    check_name(_inside(ref, path, name))
                    waiting.append(name)

    def _site(self, url: str) -> _Site:
        with self._guard:
            site = self._sites.get(url)
        if site is None:
            site = _make_site(url, self._options)
            with self._guard:
                site = self._sites.setdefault(url, site)
        return site

    def _call(self, uri: str, work: Callable[[], Any]) -> Any:
        """Do one call of a listing, and do not wait for ever."""
        call = _Call(work)
        if not call.wait(self._call_seconds):
            raise SourceUnavailableError(uri, f"it did not answer for {self._call_seconds:g} s")
        return call.result()

    def read(self, file: RemoteFile, start: int, stop: int, *, is_last: bool) -> bytes:
        """
        Read a piece of a file, and after the last one of a range see whether the file is still the one that was pinned.

        Raises:
            SourceChangedError: It is not.
            SourceUnavailableError: It is, but these are not the bytes that were asked for.
        """
        where = f"{PREFIX}{file.pin[_URL]}"
        with self._translated(where, changed=_changed(file)):
            data = _fetch(self._site(file.pin[_URL]), file, start, stop, is_last=is_last)
        if len(data) != stop - start:
            # Whoever sends more than was asked for knows no ranges, and will not learn it.
            is_final = len(data) > stop - start
            raise SourceUnavailableError(
                where, f"it was asked for {stop - start} bytes and sent {len(data)}", is_final=is_final
            )
        return data

    @contextmanager
    def _translated(self, uri: str, *, changed: SourceChangedError | None = None) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except Exception as error:
            # Not chained: what a foreign error says may hold what must not be shown.
            raise self._meaning(uri, error, changed) from None

    def _meaning(self, uri: str, error: Exception, changed: SourceChangedError | None) -> StoreError:
        reason = f"{type(error).__name__}: {self._redacted(str(error))}".rstrip(": .")
        status = getattr(error, "status", getattr(getattr(error, "response", None), "status_code", None))
        names = {kind.__name__ for kind in type(error).__mro__}
        # FTP says 530 if nobody has logged in, and 550 for all else that it refuses.
        if (
            isinstance(error, PermissionError)
            or status in (401, 403)
            or names & _DENIED
            or ("error_perm" in names and "530" in reason)
        ):
            return SourceDeniedError(uri, reason)
        if isinstance(error, FileNotFoundError | NotADirectoryError) or status == 404:
            return changed or SourceNotFoundError(uri, reason)
        is_bug = isinstance(error, TypeError | ValueError | AttributeError | NotImplementedError) and not isinstance(
            error, OSError
        )
        return SourceUnavailableError(uri, reason, is_final=is_bug)

    def _redacted(self, text: str) -> str:
        for hidden in self._hidden:
            text = text.replace(hidden, "***")
        return redact(text)


class _Reader:
    """
    Bytes `start` to `stop` (not included) of a file, piece by piece; the first is asked for when the `with` begins.
    """

    def __init__(self, backend: FsspecBackend, file: RemoteFile, start: int, stop: int) -> None:
        self._backend = backend
        self._file = file
        self._position = start
        self._stop = stop
        self._piece = memoryview(b"")
        self._call: _Call | None = None

    def __enter__(self) -> _Reader:
        if self._position < self._stop:
            self._call = self._ask()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A call cannot be broken off. Nearly all are over soon; one that hangs is left to itself.
        call, self._call, self._piece = self._call, None, memoryview(b"")
        if call is not None:
            call.wait(_LEAVE_SECONDS)

    def readinto(self, buffer: memoryview) -> int | None:
        if not self._piece:
            if self._position == self._stop:
                return 0
            self._call = self._call or self._ask()
            if not self._call.wait(_MOMENT):
                return None
            call, self._call = self._call, None
            self._piece = memoryview(call.result())
            self._position += len(self._piece)
        count = min(len(buffer), len(self._piece))
        buffer[:count] = self._piece[:count]
        self._piece = self._piece[count:]
        return count

    def _ask(self) -> _Call:
        start = self._position
        is_whole = self._file.pin[_URL].partition("://")[0] in _WHOLE
        stop = self._stop if is_whole else min(self._stop, start + PIECE_BYTES)
        return _Call(lambda: self._backend.read(self._file, start, stop, is_last=stop == self._stop))


class _Call:
    """
    One call of a file system, on a thread of its own, so that nobody waits for it longer than he likes.
    """

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self._done = threading.Event()
        self._result: Any = None
        self._error: BaseException | None = None
        threading.Thread(target=self._run, name="kserve-pvc-fsspec", daemon=True).start()

    def _run(self) -> None:
        try:
            self._result = self._work()
        except BaseException as error:
            self._error = error
        self._done.set()

    def wait(self, seconds: float) -> bool:
        """
        Whether it is over, after so many seconds at the most.
        """
        return self._done.wait(seconds)

    def result(self) -> Any:
        """
        What came of it, once it is over.
        """
        if self._error is not None:
            raise self._error
        return self._result


@attrs.define(eq=False)
class _Site:
    """
    The file systems of one URL. Those that are asynchronous inside serve all threads; of the others, each call has its
    own.
    """

    kind: type[FileSystem]
    arguments: Mapping[str, Any] = attrs.field(repr=False)
    _idle: list[FileSystem] = attrs.field(factory=list)
    _guard: threading.Lock = attrs.field(factory=threading.Lock)
    _is_closed: bool = False

    @contextmanager
    def borrowed(self) -> Iterator[FileSystem]:
        """
        One that nobody else uses meanwhile. After an error it is not used again: nobody knows what its connection is
        at.
        """
        if self.kind.async_impl:
            yield self._shared()
            return
        with self._guard:
            fs = self._idle.pop() if self._idle else None
        fs = fs or self._make()
        try:
            yield fs
        except BaseException:
            _let_go(fs)
            raise
        with self._guard:
            if not self._is_closed:
                self._idle.append(fs)
                return
        _let_go(fs)

    def close(self) -> None:
        """
        Let go of idle connections now, and of those in use once they are not.
        """
        with self._guard:
            self._is_closed, idle = True, [*self._idle]
            self._idle.clear()
        for fs in idle if not self.kind.async_impl else ():
            _let_go(fs)

    def _shared(self) -> FileSystem:
        with self._guard:
            if not self._idle:
                self._idle.append(self._make())
            return self._idle[0]

    def _make(self) -> FileSystem:
        return self.kind(**self.arguments, skip_instance_cache=True)


def _let_go(fs: FileSystem) -> None:
    # fsspec has no word for it, and some connections have threads that keep them alive.
    for name in ("ftp", "client", "session"):
        with suppress(Exception):
            getattr(fs, name).close()


def _make_site(url: str, options: Mapping[str, Any]) -> _Site:
    protocol, _, location = url.partition("://")
    if not protocol:
        raise InvalidURIError(PREFIX + url, "it names no protocol; write `fsspec+sftp://host/path` or the like")
    if protocol in _BUILT_IN:
        raise InvalidURIError(
            PREFIX + url, f"write `{url}`: `{protocol}` has a back end of its own, which pins what it reads"
        )
    if protocol in _WRAPPERS:
        raise PolicyError(PREFIX + url, f"`{protocol}` reads through another file system; name that one")
    try:
        kind = get_filesystem_class(protocol)
    except Exception as error:  # A foreign module is imported, and may do anything.
        raise UnknownSchemeError(PREFIX + protocol, f"fsspec cannot load it: {error}") from error
    if getattr(kind, "local_file", False) and not location.startswith("/"):
        # It would mean another directory for every process.
        raise InvalidURIError(PREFIX + url, f"write `{PREFIX}{protocol}:///` and an absolute path")
    named = kind._get_kwargs_from_urls(url)
    for option, value in named.items():
        if option in options and str(options[option]) != str(value):
            raise InvalidURIError(
                PREFIX + url, f"it says `{option}` is `{value}`, and the `storage_options` say otherwise"
            )
    return _Site(kind, {**named, **options})


def _has_own_find(fs: FileSystem) -> bool:
    if isinstance(fs, AsyncFileSystem):
        return type(fs)._find is not AsyncFileSystem._find
    return type(fs).find is not FileSystem.find


def _inside(ref: ModelRef, path: str, name: object) -> str:
    prefix = path.rstrip("/") + "/"
    if not isinstance(name, str) or not name.startswith(prefix):
        raise SourceUnavailableError(ref.uri, f"it was asked for `{prefix}` and listed `{name}`", is_final=True)
    return name[len(prefix) :]


def _file(ref: ModelRef, url: str, info: Mapping[str, Any], name: str) -> RemoteFile:
    if info["type"] != "file" or info.get("islink"):
        raise UnsafePathError(name, "only regular files are copied; links and devices are refused")
    size = info.get("size")
    if not isinstance(size, int) or size < 0:
        raise SourceUnavailableError(ref.uri, f"it does not say how long `{name}` is", is_final=True)
    said = _identity(info)
    token = " ".join(f"{field}={text}" for field, text in sorted(said.items())) or None
    return RemoteFile(
        entry=FileEntry(path=name, size_bytes=size, token=token), address=info["name"], pin={**said, _URL: url}
    )


def _identity(info: Mapping[str, Any]) -> Mapping[str, str]:
    """What is said about a file that tells its content from another: what is strong, or else all that is weak."""
    said = {field: text for field, value in info.items() if (text := _text(value)) is not None}
    strong = {field: text for field, text in said.items() if field.lower() in _STRONG}
    return strong or {field: text for field, text in said.items() if field.lower() in _WEAK}


def _text(value: object) -> str | None:
    # Listings and single answers may say the same in different types.
    if isinstance(value, datetime):
        value = value.timestamp()
    if isinstance(value, bytes | bytearray):
        return value.hex()
    if isinstance(value, str):
        return value.strip('"') or None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return repr(value) if isinstance(value, int | float) else None


def _fetch(site: _Site, file: RemoteFile, start: int, stop: int, *, is_last: bool) -> bytes:
    try:
        with site.borrowed() as fs:
            # Named: what comes second differs between file systems.
            data: bytes = fs.cat_file(file.address, start=start, end=stop)
            if is_last or len(data) != stop - start:
                _check(fs, file)
            return data
    except SourceChangedError:
        raise
    except Exception:
        _look_again(site, file)
        raise


def _look_again(site: _Site, file: RemoteFile) -> None:
    """After a failure: a file that has shrunk or gone is answered in as many ways as there are servers."""
    try:
        with site.borrowed() as fs:
            _check(fs, file)
    except (SourceChangedError, FileNotFoundError):
        raise _changed(file) from None
    except Exception:
        return  # The first failure tells more than the second.


def _check(fs: FileSystem, file: RemoteFile) -> None:
    fs.invalidate_cache()
    info = fs.info(file.address)
    pinned = {field: text for field, text in file.pin.items() if field != _URL and field in info}
    if info.get("size") != file.entry.size_bytes or any(_text(info[field]) != text for field, text in pinned.items()):
        raise _changed(file)


def _changed(file: RemoteFile) -> SourceChangedError:
    return SourceChangedError(PREFIX + file.pin[_URL], str(file.entry.path))


def _texts(value: object, name: str = "") -> Iterator[str]:
    """Every text among options that may be secret."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(inner, str(key))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner, name)
    elif isinstance(value, str) and len(value) > 3 and name not in _PLAIN_OPTIONS:
        yield value
