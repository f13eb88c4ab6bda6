"""
What all object stores share: the listing loop, a single object or a prefix, pins, refusals, retries, and errors.

A backend of one cloud says how its requests are addressed and authorized and what its responses mean (`Service`), and
hands that to `ObjectStore`, which does the rest. The bytes come by `Reader`, or through the fsspec class of the
protocol where no direct request can be made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from typing import Literal, Protocol

import attrs

from kserve_pvc._format.records import FileEntry
from kserve_pvc._source.contract import (
    EXCLUDED,
    Checksum,
    RangeReader,
    RemoteFile,
    Resolved,
    UnpackLimits,
    order_listing,
)
from kserve_pvc._source.ref import ModelRef, join_parts
from kserve_pvc.backends._crc32c import make_checksum
from kserve_pvc.backends._directories import Directories
from kserve_pvc.backends._http.client import HTTPClient
from kserve_pvc.backends._http.target import HTTPError, Target
from kserve_pvc.backends._pages import PageCount
from kserve_pvc.backends._ranges import Reader, RefusedError, read_refusal, request_with_retries
from kserve_pvc.backends._refusals import SAME_AGAIN, hide_sent
from kserve_pvc.errors import (
    PolicyError,
    SourceChangedError,
    SourceDeniedError,
    SourceNotFoundError,
    SourceUnavailableError,
    StoreError,
)

# An MD5 costs more than fetching and hashing together, so it is compared only for objects where that is quick.
MAX_MD5_BYTES = 16 * 1024 * 1024
MAX_PAGE_BYTES = 16 * 1024 * 1024
# One for a region or an endpoint that the service corrects, one for credentials that have expired.
_RENEWALS = 2
_CONDITIONS = ("If-Match", "If-Unmodified-Since")

# What a refusal means: no access; no such object or bucket; other content than was pinned; a pause is requested; a
# retry does not help; nothing that the service gives a meaning of its own.
Kind = Literal["denied", "missing", "changed", "busy", "final", "other"]
Request = tuple[Target, Mapping[str, str]]


@attrs.frozen
class Place:
    """
    A bucket (with its host, where a service needs it), and the name of an object or a prefix in it.
    """

    bucket: str
    name: str = ""

    @property
    def address(self) -> str:
        return f"{self.bucket}/{self.name}"


@attrs.frozen(kw_only=True)
class Object:
    """
    One object as the service describes it now.

    `token` changes with its content, `pin` makes a read of other content fail, `digest` is what the service vouches
    for, as `name:hex`. An object that only marks a directory is left out; one with a `flaw` cannot be fetched as it is.
    One that `is_compressed` by the service's own account comes as gzip and is stored as what that holds. One that
    `is_cold` lies in a storage class that may have to be left before it can be read.
    """

    name: str
    size_bytes: int
    token: str
    pin: Mapping[str, str]
    digest: str | None = None
    is_directory: bool = False
    flaw: str = ""
    is_compressed: bool = False
    is_cold: bool = False


class Service(Protocol):
    """
    What differs between object stores. Methods are called from many threads at once, and raise `RefusedError` or
    `HTTPError` where a request fails.
    """

    # The reason of the error for a revision of something that has none.
    no_version: str

    def place(self, ref: ModelRef) -> Place:
        """Return what a URI names. Raises `InvalidURIError`."""

    def uri(self, place: Place) -> str:
        """Write a place as a URI, for errors."""

    def head(self, place: Place, revision: str | None) -> Object | None:
        """Request one object; None if it only marks a directory. One that is absent is a refusal."""

    def page(self, place: Place, token: str | None) -> tuple[Sequence[Object], str | None]:
        """Request a page of what lies below a prefix, from a continuation token on, and return the next token."""

    def read(self, place: Place, pin: Mapping[str, str], *, renewed: bool) -> Request:
        """
        Make the request that reads a pinned object, without a range.

        `renewed` means that the credentials used before were refused: get new ones where that can help.
        """

    def reader(
        self, place: Place, file: RemoteFile, start: int, stop: int
    ) -> AbstractContextManager[RangeReader] | None:
        """Read a range through the fsspec class; None if `read` makes a direct request for it."""

    def evidence(self, place: Place, file: RemoteFile) -> str | None:
        """Return a digest that the service vouches for, requested now if the listing has none; None if it has none."""

    def refused(self, status: int, headers: Mapping[str, str], body: bytes) -> RefusedError:
        """Read a response that is not a success."""

    def kind(self, refusal: RefusedError) -> Kind:
        """Classify a refusal."""

    def describe(self, refusal: RefusedError, place: Place) -> str:
        """Say what was refused, without secrets."""

    def access(self, place: Place) -> str:
        """Return how the place is reached; see `SupportsAccess`."""

    def close(self) -> None:
        """Release what else is kept open."""


@attrs.define(eq=False)
class MetadataRequests:
    """
    Small requests about objects, sent again while the service is busy, the network fails, or renewing may help.

    `refused` reads a response that is not a success.
    """

    client: HTTPClient
    refused: Callable[[int, Mapping[str, str], bytes], RefusedError]
    retry_seconds: float = 300.0

    def send(
        self, method: str, make: Callable[[], Request], renew: Callable[[RefusedError], bool]
    ) -> tuple[Mapping[str, str], bytes]:
        """
        Send a request and return headers and body of the response.

        Args:
            make: Makes the request, anew for each try.
            renew: Does what a refusal suggests, such as renewing credentials. True: send the request once more.

        Raises:
            RefusedError: The service refuses it.
            HTTPError: There is no response.
        """

        def attempt() -> tuple[Mapping[str, str], bytes]:
            for _ in range(_RENEWALS):
                try:
                    return self.send_once(method, *make())
                except RefusedError as refusal:
                    if not renew(refusal):
                        raise
            return self.send_once(method, *make())

        return request_with_retries(attempt, self.retry_seconds)

    def send_once(self, method: str, target: Target, headers: Mapping[str, str]) -> tuple[Mapping[str, str], bytes]:
        """
        Send a request once; a subclass may send it in another way.
        """
        with self.client.open(method, target, headers) as response:
            if response.status in (200, 206):
                deadline = time.monotonic() + 2 * self.client.response_seconds
                return response.headers, response.read(MAX_PAGE_BYTES, deadline)
            refusal = self.refused(response.status, response.headers, read_refusal(response))
            refusal.reason = hide_sent(refusal.reason, target, headers)
        # Outside, so that the connection is kept.
        raise refusal


class ObjectStore:
    """
    Models in the buckets of one service.

    A URI of one object is a single file; any other names a prefix, and never brings its siblings: `m/model` means
    `m/model/…`, not `m/model-v2/…`. An object wins over a prefix of the same name. Empty objects are files, unless
    something lies below their names: then they stand for directories.

    Args:
        bucket_parts: How many parts of an address, separated by `/`, name the bucket.
    """

    def __init__(self, service: Service, requests: MetadataRequests, *, bucket_parts: int = 1) -> None:
        self.service = service
        self._requests = requests
        self._client = requests.client
        self._bucket_parts = bucket_parts
        # Set by a backend whose certificates are not checked.
        self.is_unverified = False
        # Objects whose server refuses every condition.
        self._unconditional: set[str] = set()

    def resolve(self, ref: ModelRef) -> Resolved:
        return order_listing(ref, chain.from_iterable(self.pages(ref)))

    def pages(self, ref: ModelRef) -> Iterator[Sequence[RemoteFile]]:
        place = self.service.place(ref)
        name = place.name
        with self._translated(ref.uri, place):
            prefix = name.rstrip("/") + "/" if name.strip("/") else ""
            below = attrs.evolve(place, name=prefix)
            single, denial = self._single(place, ref) if name and not name.endswith("/") else (None, None)
            is_file = single is not None and (single.entry.size_bytes > 0 or ref.revision is not None)
            if single is not None and (is_file or not self._is_directory(below)):
                yield [single]
                return
            if ref.revision is not None:
                raise SourceNotFoundError(str(ref), self.service.no_version)
            yield from self._below(below, ref, denial)

    def _single(self, place: Place, ref: ModelRef) -> tuple[RemoteFile | None, RefusedError | None]:
        """The object itself, if the URI names one, or a denial that may mean that there is none."""
        try:
            found = self.service.head(place, ref.revision)
        except RefusedError as refusal:
            # Without the right to list, services deny what is absent: the listing then shows which it is.
            kind = self.service.kind(refusal)
            if kind == "missing" or (kind == "denied" and ref.revision is None):
                return None, refusal if kind == "denied" else None
            raise
        if found is None:
            return None, None
        path = place.name.rpartition("/")[2]
        if not ref.selects(path):
            raise SourceNotFoundError(ref.uri, EXCLUDED)
        file = self._file(place, ref, found, path)
        if found.is_cold and found.size_bytes:
            self._try(file)
        return file, None

    def _is_directory(self, below: Place) -> bool:
        """Whether something lies below the name of an empty object. Without the right to list, it is a file."""
        try:
            return any(page for page, _ in self._listed(below))
        except RefusedError as refusal:
            if self.service.kind(refusal) in ("denied", "missing"):
                return False
            raise

    def _below(self, place: Place, ref: ModelRef, denial: RefusedError | None = None) -> Iterator[Sequence[RemoteFile]]:
        """
        What lies below a prefix. If that is nothing, a denial of the object of that name is raised.
        """
        directories = Directories(ref.uri)
        is_empty = True
        for page, is_last in self._listed(place):
            is_empty = is_empty and not page
            for found in page:
                if found.is_directory:
                    directories.mark(found.name[len(place.name) :])
            inside = [(found, self._inside(place, ref, found)) for found in _files(page)]
            for _, path in inside:
                # What has something below its name is a directory, also where the patterns leave that out.
                directories.mark(path)
            chosen = [(found, self._file(place, ref, found, path)) for found, path in inside if ref.selects(path)]
            # One of each page: others of its class will be refused as it is, when they are read.
            if (cold := next((file for found, file in chosen if found.is_cold and found.size_bytes), None)) is not None:
                self._try(cold)
            files = directories.sift(file for _, file in chosen)
            # On the last page, so that a model of one page is known whole before anything of it is written.
            yield [*files, *directories.empty_files()] if is_last else files
        if is_empty and denial is not None:
            raise denial

    def _try(self, file: RemoteFile) -> None:
        """Read the first byte of a file, so that what is refused for good is known before anything is written."""
        byte, deadline = memoryview(bytearray(1)), time.monotonic() + self._client.response_seconds
        try:
            with self.open_range(file, 0, 1) as reader:
                while reader.readinto(byte) is None and time.monotonic() < deadline:
                    pass
        except SourceUnavailableError as error:
            if error.is_final:
                raise

    def _listed(self, place: Place) -> Iterator[tuple[Sequence[Object], bool]]:
        """The pages of a listing, each with whether it is the last."""
        token: str | None = None
        pages = PageCount(self.service.uri(place))
        while True:
            page, token = self.service.page(place, token)
            yield page, token is None
            if token is None:
                return
            pages.follow(token, is_empty=not page)

    def _inside(self, place: Place, ref: ModelRef, found: Object) -> str:
        if not found.name.startswith(place.name):
            raise SourceUnavailableError(ref.uri, f"the listing of prefix `{place.name}` contains `{found.name}`")
        # A directory has no name that is empty, so `m//w.bin` lies where `m/w.bin` would. Two such are a collision.
        return join_parts(found.name[len(place.name) :]).removeprefix("/")

    def _file(self, place: Place, ref: ModelRef, found: Object, path: str) -> RemoteFile:
        if found.is_compressed:
            # Fetched as it is stored, with its size and checksum, and unpacked like an archive of one file.
            path += ".gz"
        entry = FileEntry(path=path, size_bytes=found.size_bytes, token=found.token)
        at = attrs.evolve(place, name=found.name)
        if found.flaw:
            raise PolicyError(self.service.uri(at), found.flaw)
        limits = UnpackLimits() if found.is_compressed else None
        return RemoteFile(entry=entry, address=at.address, pin=found.pin, digest=found.digest, unpack=limits)

    def open_range(self, file: RemoteFile, start: int, stop: int) -> AbstractContextManager[RangeReader]:
        place = self._place_of(file)
        through_class = self.service.reader(place, file, start, stop)
        if through_class is not None:
            return self._reading(through_class, file, place)
        return Reader(self._client, self, file, self.service.uri(place), start, stop)

    @contextmanager
    def _reading(
        self, reader: AbstractContextManager[RangeReader], file: RemoteFile, place: Place
    ) -> Iterator[RangeReader]:
        with self._pinned(file, place), reader as opened:
            yield opened

    def request(self, file: RemoteFile, *, renewed: bool) -> Request:
        place = self._place_of(file)
        pin = file.pin
        if file.address in self._unconditional:
            pin = {name: value for name, value in pin.items() if name not in _CONDITIONS}
        with self._pinned(file, place):
            return self.service.read(place, pin, renewed=renewed)

    def is_unchanged(self, file: RemoteFile) -> bool:
        """
        Look what is there now, and remember if it is what was pinned.
        """
        place = self._place_of(file)
        if file.address in self._unconditional:
            return True  # Another stream was faster.
        with self._pinned(file, place):
            found = self.service.head(place, None)
        is_same = found is not None and found.size_bytes == file.entry.size_bytes and found.pin == file.pin
        if is_same:
            self._unconditional.add(file.address)
        return is_same

    def refusal(self, file: RemoteFile, status: int, headers: Mapping[str, str], body: bytes) -> StoreError | None:
        place, refusal = self._place_of(file), self.service.refused(status, headers, body)
        kind = self.service.kind(refusal)
        if kind in ("missing", "changed"):
            return SourceChangedError(self.service.uri(place), str(file.entry.path))
        return self._meaning(refusal, self.service.uri(place), place)

    def evidence(self, file: RemoteFile) -> str | None:
        """
        Return a digest of a whole object that the service vouches for, as `name:hex`.
        """
        place = self._place_of(file)
        with self._pinned(file, place):
            return self.service.evidence(place, file)

    def checksum(self, name: str) -> Checksum | None:
        return make_checksum(name)

    def access(self, ref: ModelRef) -> str:
        return self.service.access(self.service.place(ref))

    def checks_certificates(self, ref: ModelRef) -> bool:
        del ref
        return not self.is_unverified

    def tune(self, *, stall_seconds: float, retry_seconds: float) -> None:
        """
        Set how long a listing may stay silent, and how long it is tried.
        """
        self._client.response_seconds = stall_seconds
        self._requests.retry_seconds = retry_seconds

    def close(self) -> None:
        """
        Release idle connections. Later requests open new ones.
        """
        self._client.close()
        self.service.close()

    def _place_of(self, file: RemoteFile) -> Place:
        parts = file.address.split("/", self._bucket_parts)
        return Place("/".join(parts[:-1]), parts[-1])

    @contextmanager
    def _pinned(self, file: RemoteFile, place: Place) -> Iterator[None]:
        """Errors of what was listed: if it is missing now, it has been deleted or replaced since."""
        with self._translated(self.service.uri(place), place):
            try:
                yield
            except RefusedError as refusal:
                if self.service.kind(refusal) in ("missing", "changed"):
                    raise SourceChangedError(self.service.uri(place), str(file.entry.path)) from None
                raise

    @contextmanager
    def _translated(self, uri: str, place: Place) -> Iterator[None]:
        try:
            yield
        except RefusedError as refusal:
            raise self._meaning(refusal, uri, place) from refusal.__cause__
        except HTTPError as error:
            raise SourceUnavailableError(uri, str(error), is_final=error.is_final) from error

    def _meaning(self, refusal: RefusedError, uri: str, place: Place) -> StoreError:
        reason, kind = self.service.describe(refusal, place), self.service.kind(refusal)
        if kind == "denied":
            return SourceDeniedError(uri, reason, refusal.hint)
        if kind == "missing":
            return SourceNotFoundError(uri, reason, refusal.hint)
        is_final = kind == "final" or (300 <= refusal.status < 500 and not refusal.is_transient)
        hint = refusal.hint or (SAME_AGAIN if is_final and refusal.status >= 400 else "")
        return SourceUnavailableError(uri, reason, retry_after=refusal.busy, is_final=is_final, hint=hint)


def _files(page: Sequence[Object]) -> Iterator[Object]:
    # A key that ends in a slash can be no file, whatever it holds.
    return (found for found in page if not found.is_directory and not found.name.endswith("/"))


def md5_digest(hex_digits: str | None, size_bytes: int) -> str | None:
    """
    Return an MD5 as a digest, if it is one and quick enough to compare.
    """
    return f"md5:{hex_digits}" if hex_digits and size_bytes <= MAX_MD5_BYTES else None
