"""
The file systems that models are read through: made here for a URL, or handed in by the caller.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Protocol

import attrs
from fsspec import AbstractFileSystem as FileSystem
from fsspec import get_filesystem_class
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.config import apply_config
from fsspec.implementations.arrow import ArrowFSWrapper
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from kserve_pvc.backends._options import fsspec_configuration
from kserve_pvc.errors import InvalidURIError, PolicyError, SettingsError, UnknownSchemeError

PREFIX = "fsspec+"
# These fetch all of a file for any part of it, so that each part is best requested once.
WHOLE = {"data", "gist", "git", "github", "jlab", "jupyter", "libarchive"}
# These read through another file system: from anywhere at all, or by way of copies that are not checked.
WRAPPERS = {
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
_CLOSE_SECONDS = 2.0
# Besides those that are asynchronous inside: several threads may use one of these at once.
_THREAD_SAFE = (LocalFileSystem, MemoryFileSystem, ArrowFSWrapper)


class Lender(Protocol):
    """
    Something that lends file systems of one class to calls, each for as long as the `with` lasts.
    """

    @property
    def kind(self) -> type[FileSystem]: ...

    def borrowed(self) -> AbstractContextManager[FileSystem]: ...

    def forget(self, fs: FileSystem, path: str) -> None:
        """Drop what a borrowed file system remembers about a path."""


class FileSystems(Protocol):
    """
    Where the file systems come from.
    """

    def secrets(self) -> object:
        """Return options, and objects with credentials, whose strings must not be shown."""

    def at(self, url: str) -> Lender:
        """Find the file systems for a URL, which begins with a protocol of fsspec."""

    def close(self) -> None:
        """Release idle connections that belong to us."""


class MadeHere:
    """
    File systems that are made here, from options and fsspec's own configuration.

    Args:
        options: Arguments of the class. They are used for every host that a URI names, so a URI may not name another
            host than they do.
        prepare: Changes the arguments of a class before a file system is made, or refuses them.
    """

    def __init__(
        self, options: Mapping[str, Any], prepare: Callable[[str, Mapping[str, Any]], Mapping[str, Any]] | None = None
    ) -> None:
        self._options = dict(options)
        self._prepare = prepare
        self._guard = threading.Lock()
        self._pools: dict[str, _Pool] = {}

    def at(self, url: str) -> Lender:
        """
        Find the file systems for a URL, or make room for them.

        Raises:
            PolicyError: The protocol reads through another file system.
            UnknownSchemeError: fsspec does not know the protocol, or its package is not installed.
            InvalidURIError: The URL does not name a place, or another host than the options.
        """
        with self._guard:
            pool = self._pools.get(url)
        if pool is None:
            pool = self._make_pool(url)
            with self._guard:
                pool = self._pools.setdefault(url, pool)
        return pool

    def secrets(self) -> object:
        with self._guard:
            return [self._options, *(fs for pool in self._pools.values() for fs in pool.known)]

    def close(self) -> None:
        with self._guard:
            pools = [*self._pools.values()]
            self._pools.clear()
        for pool in pools:
            pool.close()

    def _make_pool(self, url: str) -> _Pool:
        protocol, _, location = url.partition("://")
        kind = find_class(protocol)
        if getattr(kind, "local_file", False) and not location.startswith("/"):
            # It would mean another directory for every process.
            raise InvalidURIError(url, f"write `{protocol}:///` and an absolute path")
        # fsspec reads its files and variables when it is imported; what has changed since counts too.
        options = {**fsspec_configuration(protocol), **self._options}
        options = options if self._prepare is None else dict(self._prepare(url, options))
        named = kind._get_kwargs_from_urls(url)
        check_same_place(url, named, apply_config(kind, options))
        return _Pool(kind, {**named, **options})


class HandedIn:
    """
    One file system that the caller made. It is used as it is, never copied within its process, and never closed.
    """

    def __init__(self, fs: FileSystem) -> None:
        check_instance(fs)
        self._fs = _of_this_process(fs)
        self.kind: type[FileSystem] = type(self._fs)
        is_shared = self.kind.async_impl or isinstance(self._fs, _THREAD_SAFE)
        self._one_at_a_time: threading.Lock | None = None if is_shared else threading.Lock()

    def at(self, url: str) -> Lender:
        """
        Return the file system for a URL, if it is one for that URL.

        Raises:
            SettingsError: It is for another protocol, account or host, or for the event loop of this thread.
        """
        protocol = url.partition("://")[0]
        if protocol not in protocols(self.kind):
            known = ", ".join(f"`{name}://`" for name in sorted(protocols(self.kind)))
            raise SettingsError("filesystem", self.kind.__name__, f"it reads {known}, and not `{protocol}://`")
        named = self.kind._get_kwargs_from_urls(url)
        has = {name: getattr(self._fs, name, self._fs.storage_options.get(name)) for name in named}
        check_same_place(url, named, {name: value for name, value in has.items() if value is not None})
        return self

    def secrets(self) -> object:
        return [self._fs.storage_options, self._fs.storage_args, self._fs]

    @contextmanager
    def borrowed(self) -> Iterator[FileSystem]:
        if self._one_at_a_time is None:
            yield self._fs
            return
        with self._one_at_a_time:
            yield self._fs

    def forget(self, fs: FileSystem, path: str) -> None:
        # Listings of other paths are the caller's, who may be using them.
        fs.invalidate_cache(path)

    def close(self) -> None:
        pass


@attrs.define(eq=False)
class _Pool:
    """
    The file systems of one URL. One that is asynchronous inside serves all threads; of the others, each call has its
    own.
    """

    kind: type[FileSystem]
    arguments: Mapping[str, Any] = attrs.field(repr=False)
    _idle: list[FileSystem] = attrs.field(factory=list)
    _guard: threading.Lock = attrs.field(factory=threading.Lock)
    _is_closed: bool = False
    _borrowers: int = 0

    @contextmanager
    def borrowed(self) -> Iterator[FileSystem]:
        """
        Lend one that no other call uses meanwhile. After an error it is dropped, as the state of its connection is
        unknown.
        """
        if self.kind.async_impl:
            with self._sharing() as fs:
                yield fs
            return
        with self._guard:
            fs = self._idle.pop() if self._idle else None
        fs = fs or self._make()
        try:
            yield fs
        except BaseException:
            _release(fs)
            raise
        with self._guard:
            if not self._is_closed:
                self._idle.append(fs)
                return
        _release(fs)

    @property
    def known(self) -> list[FileSystem]:
        return [*self._idle]

    def forget(self, fs: FileSystem, path: str) -> None:
        del path
        fs.invalidate_cache()

    def close(self) -> None:
        """
        Release idle connections now, and those in use once they are idle.
        """
        with self._guard:
            self._is_closed = True
            released = [] if self._borrowers else [*self._idle]
            if not self._borrowers:
                self._idle.clear()
        for fs in released:
            _release(fs)

    @contextmanager
    def _sharing(self) -> Iterator[FileSystem]:
        with self._guard:
            if not self._idle:
                self._idle.append(self._make())
            fs = self._idle[0]
            self._borrowers += 1
        try:
            yield fs
        finally:
            with self._guard:
                self._borrowers -= 1
                is_last = self._is_closed and not self._borrowers
                if is_last:
                    self._idle.clear()
            if is_last:
                _release(fs)

    def _make(self) -> FileSystem:
        return self.kind(**self.arguments, skip_instance_cache=True)


def find_class(protocol: str) -> type[FileSystem]:
    """
    Return the class of a protocol.

    Raises:
        PolicyError: It reads through another file system.
        InvalidURIError: No protocol is named.
        UnknownSchemeError: fsspec does not know it, or its package is not installed.
    """
    if not protocol:
        raise InvalidURIError(PREFIX, "no protocol is named; write `fsspec+sftp://host/path` or the like")
    if protocol in WRAPPERS:
        raise PolicyError(f"{protocol}://", "this protocol reads through another file system; name that one")
    try:
        kind: type[FileSystem] = get_filesystem_class(protocol)
    except Exception as error:  # A foreign module is imported, and may do anything.
        raise UnknownSchemeError(protocol, f"fsspec cannot load it: {error}") from error
    return kind


def protocols(kind: type[FileSystem]) -> set[str]:
    """
    Return the protocols of a class, those of its bases among them.
    """
    found: set[str] = set()
    for base in kind.__mro__:
        names = vars(base).get("protocol", ())
        found.update([names] if isinstance(names, str) else names if isinstance(names, tuple | list) else ())
    return found - {"abstract"}


def package_of(kind: type[FileSystem]) -> str:
    """
    Return the package that provides a class, as records name it.
    """
    return f"fsspec:{kind.__module__.partition('.')[0][:64]}"


def check_instance(fs: object) -> None:
    """
    Refuse a file system that cannot be used by the thread that calls this.

    Raises:
        SettingsError: It is not a file system, reads through another one, is for `await` only, or works on the event
            loop of this thread.
    """
    name = type(fs).__name__
    if not isinstance(fs, FileSystem):
        raise SettingsError("filesystem", name, "pass an instance of `fsspec.AbstractFileSystem`")
    if protocols(type(fs)) & WRAPPERS:
        # A cache may hand out a file that another process is still writing, and a mapping may lead anywhere.
        raise SettingsError("filesystem", name, "it reads through another file system; pass that one")
    if getattr(fs, "asynchronous", False):
        raise SettingsError(
            "filesystem", name, "it was made for `await`, with `asynchronous=True`; make one without that argument"
        )
    if _is_running_here(getattr(fs, "_loop", None)):
        raise SettingsError(
            "filesystem",
            name,
            "it works on the event loop that this call blocks; call `await asyncio.to_thread(store.ensure, …)`",
        )


def check_same_place(url: str, named: Mapping[str, Any], configured: Mapping[str, Any]) -> None:
    """
    Make sure that credentials go to the host that they are configured for.

    Raises:
        InvalidURIError: The URL names another host, account, port or user.
    """
    for option, value in named.items():
        if option in configured and str(configured[option]) != str(value):
            raise InvalidURIError(url, f"its `{option}` is `{value}`, but another one is configured")


def _of_this_process(fs: FileSystem) -> FileSystem:
    """The same file system after a fork, made anew as fsspec itself does when one is unpickled."""
    if getattr(fs, "_pid", os.getpid()) == os.getpid():
        return fs
    copy: FileSystem = pickle.loads(pickle.dumps(fs))
    return copy


def _is_running_here(loop: object) -> bool:
    with suppress(RuntimeError):
        return loop is not None and asyncio.get_running_loop() is loop
    return False


def _release(fs: FileSystem) -> None:
    # fsspec has no method for it, and some connections have threads that keep them alive.
    if isinstance(fs, AsyncFileSystem):
        with suppress(Exception):
            sync(fs.loop, fs._session.close, timeout=_CLOSE_SECONDS)
        return
    for name in ("ftp", "client", "session"):
        with suppress(Exception):
            getattr(fs, name).close()
