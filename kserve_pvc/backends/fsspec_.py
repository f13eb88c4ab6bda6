"""
Models through fsspec: `fsspec+<protocol>://`, protocols that only fsspec knows, and file systems that are handed in.

Only `ls`, `find`, `info` and `cat_file` of a file system are called, which write nothing. Its own downloads (`get`) are
not used: some of them make a file of the right size before it has its bytes. How well a version is pinned depends on
what the protocol says about a file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from fsspec import AbstractFileSystem as FileSystem

from kserve_pvc._source.contract import RemoteFile, Resolved, UnpackLimits, order_listing
from kserve_pvc._source.ref import ModelRef
from kserve_pvc.backends._fsspec.calls import Call
from kserve_pvc.backends._fsspec.failures import Failures
from kserve_pvc.backends._fsspec.filesystems import FileSystems, HandedIn, MadeHere, package_of
from kserve_pvc.backends._fsspec.guard import guarded
from kserve_pvc.backends._fsspec.listing import URI, URL, Listing
from kserve_pvc.backends._fsspec.reading import Reader, piece_bytes_of, read_piece
from kserve_pvc.backends._fsspec.spelling import spell
from kserve_pvc.backends._options import checks_certificates, trim_options, warn_unverified
from kserve_pvc.errors import SourceUnavailableError

_LIMITS = UnpackLimits()


class FsspecBackend:
    """
    Models on file systems of fsspec: `fsspec+sftp://host/models/llama` is a directory, or one file.

    Files are pinned by what the file system says about them: an ETag, a checksum or a version if there is one, else
    times and inode. That is compared again after the last byte of every range; the server itself does not refuse other
    content, as it would with an If-Match.

    Args:
        options: Arguments of the file system's class. Those of fsspec's configuration apply below them, as they do in
            fsspec. For `http` and `https` also `allow_private`, as in our own backend.
        filesystems: Where the file systems come from, instead of being made from options.
        limits: For archives that come over HTTP; None keeps them as they are.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        filesystems: FileSystems | None = None,
        *,
        limits: UnpackLimits | None = _LIMITS,
    ) -> None:
        self._filesystems = filesystems or MadeHere(trim_options(options), _prepare)
        self._failures = Failures(self._filesystems.secrets)
        self._limits = limits
        self._is_verified = checks_certificates(options)
        if not self._is_verified:
            warn_unverified("fsspec")
        self._call_seconds = 300.0

    def resolve(self, ref: ModelRef) -> Resolved:
        spelling = spell(ref, self._limits)
        lender = self._filesystems.at(spelling.url)
        with self._failures.translated(ref.uri):
            listing = Listing(ref, spelling, lender, partial(self._run, ref.uri))
            return order_listing(ref, listing.files())

    def open_range(self, file: RemoteFile, start: int, stop: int) -> Reader:
        def read(first: int, last: int, is_last: bool) -> bytes:
            with self._failures.translated(file.pin[URI]):
                lender = self._filesystems.at(file.pin[URL])
            return read_piece(lender, self._failures, file, first, last, is_last=is_last)

        return Reader(read, start, stop, piece_bytes=piece_bytes_of(file))

    def access(self, ref: ModelRef) -> str:
        """
        Return `fsspec:<package>`, where the package is the one that provides the class.
        """
        return package_of(self._filesystems.at(spell(ref, self._limits).url).kind)

    def checks_certificates(self, ref: ModelRef) -> bool:
        del ref
        return self._is_verified

    def tune(self, *, stall_seconds: float, retry_seconds: float) -> None:
        """
        Limit the time of one call of a listing. The limit for a connection is the file system's own.
        """
        del stall_seconds
        self._call_seconds = retry_seconds

    def close(self) -> None:
        """
        Release idle connections that were made here. Later calls make new ones.
        """
        self._filesystems.close()

    def _run(self, uri: str, work: Callable[[], Any]) -> Any:
        """Do one call of a listing, with a limit for how long it may take."""
        call = Call(work)
        if not call.wait(self._call_seconds):
            raise SourceUnavailableError(uri, f"no response for {self._call_seconds:g} s")
        return call.result()


def through_instance(fs: FileSystem, options: Mapping[str, Any]) -> FsspecBackend:
    """
    Read models through a file system that the caller made.

    Args:
        options: The store's options, of which those count that say what a file means: `unpack` and `unpack_limits`.

    Raises:
        SettingsError: It cannot be used from here.
    """
    from kserve_pvc.backends._web_settings import unpack_limits

    given = getattr(fs, "storage_options", None)
    return FsspecBackend(given if isinstance(given, Mapping) else {}, HandedIn(fs), limits=unpack_limits(options))


def _prepare(url: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Keep to the rule about private addresses where a class would connect to any."""
    if url.partition("://")[0] not in ("http", "https"):
        return options
    from kserve_pvc.backends._addresses import make_address_check

    arguments = {name: value for name, value in options.items() if name != "allow_private"}
    return guarded(arguments, make_address_check(options, os.environ))
