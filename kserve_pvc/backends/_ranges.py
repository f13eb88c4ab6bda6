"""
Ranges of pinned objects by plain HTTP requests: what all backends share whose service takes direct requests.

The backend makes the request (an address and signed headers) and says what a refusal means; everything between is
here: which responses count, that a response has the bytes that were requested, and that they are of the pinned content.
"""

from __future__ import annotations

import binascii
import random
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Protocol, TypeVar
from urllib.parse import quote, urljoin

from kserve_pvc._source.contract import RemoteFile
from kserve_pvc._source.redaction import redact
from kserve_pvc._source.retry import delays
from kserve_pvc.backends._http.client import Exchange, HTTPClient
from kserve_pvc.backends._http.connection import Response
from kserve_pvc.backends._http.target import HTTPError, Target, target_of
from kserve_pvc.backends._refusals import SAME_AGAIN, final_status, hide_sent, without_sent, words_of
from kserve_pvc.backends._validators import bare_etag
from kserve_pvc.errors import PolicyError, SourceChangedError, SourceDeniedError, SourceUnavailableError, StoreError

_MAX_ERROR_BYTES = 64 * 1024
_MAX_REASON = 2000
_ERROR_SECONDS = 10.0
_END_SECONDS = 10.0
_BUSY = (429, 503)
# The status by which servers refuse ranges, instead of ignoring them. 416 is that of a file that has become shorter.
_NO_RANGES = (400, 405, 406, 417, 501)
_ATTEMPTS = 4
_NOTHING = Target("", "", 0, "")
NO_CREDENTIALS = "NoCredentials"
# What a `Location` may hold unquoted: all that has a meaning in a URL.
_LOCATION_SAFE = "!#$%&'()*+,/:;=?@[]~"

_T = TypeVar("_T")


class RefusedError(Exception):
    """
    A refusal of a service: the HTTP status, the code of the service if there is one, and a sentence for people.

    `busy` is how many seconds a busy service requests as a pause, None if it is not busy; `hint` is what to do. A login
    that finds no credentials raises it too, with the code `NO_CREDENTIALS`.
    """

    def __init__(
        self,
        reason: str,
        *,
        status: int = 0,
        code: str = "",
        busy: float | None = None,
        headers: Mapping[str, str] | None = None,
        hint: str = "",
    ) -> None:
        super().__init__(reason)
        # Taking secrets out of a long text takes long. Cut between words, so that no half of a secret is left.
        self.reason = reason if len(reason) <= _MAX_REASON else reason[:_MAX_REASON].rpartition(" ")[0] + " ..."
        self.status = status
        self.code = code
        self.busy = busy
        self.headers: Mapping[str, str] = headers or {}
        self.hint = hint

    @property
    def is_transient(self) -> bool:
        """
        Whether a retry may help.
        """
        return self.busy is not None or (self.status >= 400 and not final_status(self.status))


class Requests(Protocol):
    """
    How a backend requests an object. Called from many threads at once.
    """

    def request(self, file: RemoteFile, *, renewed: bool) -> tuple[Target, Mapping[str, str]]:
        """
        Return the address of a file and the headers that pin its version and carry the credentials, without a range.

        `renewed` means that the credentials used before were refused: get new ones where that can help.
        """

    def refusal(self, file: RemoteFile, status: int, headers: Mapping[str, str], body: bytes) -> StoreError | None:
        """Say what an unsuccessful response means; None if it has no meaning of its own for this service."""

    def is_unchanged(self, file: RemoteFile) -> bool:
        """
        Whether a file whose condition was refused is what was pinned after all, as some servers find no condition
        true. Then it is requested without a condition from now on.
        """


class Reader:
    """
    Bytes `start` to `stop` (not included) of a pinned file, as `RangeReader` wants them.

    The request is sent when the `with` begins, and nothing blocks longer than a poll interval, so that the caller can
    stop. A refusal is taken for an expired signature once: then the request is signed anew. A server that does not keep
    ranges sends the whole file: what comes before the range is skipped, and the next reader goes on with the response.
    """

    def __init__(
        self, client: HTTPClient, requests: Requests, file: RemoteFile, where: str, start: int, stop: int
    ) -> None:
        self._client = client
        self._requests = requests
        self._file = file
        self._where = where
        self._range = (start, stop)
        self._is_renewed = self._is_unconditional = self._is_ranged = self._is_refused = False
        self._exchange: Exchange | None = None
        self._response: Response | None = None
        self._worked_before = 0.0
        self._sent: tuple[Target, Mapping[str, str]] | None = None
        self._whole = client.whole_of((where, *sorted(file.pin.items())))
        self._position, self._stop = start, stop
        # How much was received and is not part of the range.
        self.skipped = 0

    def __enter__(self) -> Reader:
        try:
            self._send()
        except HTTPError as error:
            raise SourceUnavailableError(self._where, str(error), is_final=error.is_final) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        exchange, self._exchange = self._exchange, None
        has_rest = not self._is_ranged and self._position == self._stop < self._file.entry.size_bytes
        if exchange is not None and self._response is not None and kind is None and has_rest:
            self._whole.keep(self._position, exchange)
        elif exchange is not None:
            exchange.__exit__(kind, error, trace)

    @property
    def is_whole(self) -> bool:
        """
        Whether the server sends the whole file whatever range is requested.
        """
        return self._whole.is_known

    @property
    def worked(self) -> float:
        """
        Seconds that reading took without waiting for the server.
        """
        return 0.0 if self._response is None else self._response.worked - self._worked_before

    def readinto(self, buffer: memoryview) -> int | None:
        """
        Fill the start of a buffer with what comes next. None: nothing arrived within a poll interval; 0: it is over.

        Raises:
            SourceChangedError: The response is of other content than was pinned.
            SourceUnavailableError: There is no response, or not the one that was requested.
            StoreError: What the backend makes of a refusal.
        """
        try:
            if self._response is None and not self._begin():
                return None
            return self._receive(buffer)
        except HTTPError as error:
            raise SourceUnavailableError(self._where, str(error), is_final=error.is_final) from error

    def _receive(self, buffer: memoryview) -> int | None:
        assert self._response is not None  # It has begun.
        before = self._range[0] - self._position
        if before > 0:
            count = self._response.readinto(buffer[:before])
            self._position += count or 0
            self.skipped += count or 0
            return None if count else count
        # The end of a response is received together with its last byte, in case it has more of them.
        left = self._stop - self._position
        count = self._response.readinto(buffer[:left]) if left else 0
        self._position += count or 0
        if count == left and self._response.length is None and self._position == self._file.entry.size_bytes:
            self._expect_end(self._response)
        return count

    def _expect_end(self, response: Response) -> None:
        """Make sure that a response without a length has no more bytes than the file."""
        deadline, one = time.monotonic() + _END_SECONDS, memoryview(bytearray(1))
        while (count := response.readinto(one)) is None:
            if time.monotonic() > deadline:
                raise SourceUnavailableError(self._where, "the response does not end")
        if count:
            raise SourceChangedError(self._where, str(self._file.entry.path))

    def _send(self) -> Exchange:
        start, stop = self._range
        kept = self._whole.take(start)
        if kept is not None:
            self._position, self._exchange = kept
            self._is_ranged = False
            return self._exchange
        is_part = stop - start < self._file.entry.size_bytes
        # As it is known now: what other readers learn meanwhile says nothing about this request.
        self._is_ranged = is_part and not self._whole.is_known and not self._is_refused
        self._position = start if self._is_ranged else 0
        target, headers = self._requests.request(self._file, renewed=self._is_renewed)
        if self._is_ranged:
            headers = {**headers, "Range": f"bytes={start}-{stop - 1}"}
        self._sent = target, headers
        self._exchange = self._client.send("GET", target, headers)
        return self._exchange

    def _begin(self) -> bool:
        exchange = self._exchange or self._send()
        response = exchange.response()
        if response is None:
            return False
        if response.status in (200, 206):
            return self._accept(response)
        body = read_refusal(response)
        self.__exit__(None, None, None)
        if response.status == 412 and not self._is_unconditional and self._requests.is_unchanged(self._file):
            self._is_unconditional = True
            return False
        refusal = self._requests.refusal(self._file, response.status, response.headers, body)
        # S3 has status 400 for a token that has expired, and 403 for what no credentials help with.
        is_final = isinstance(refusal, SourceUnavailableError) and refusal.is_final
        is_denied = isinstance(refusal, SourceDeniedError) or (response.status in (401, 403) and not is_final)
        if is_denied and not self._is_renewed:
            self._is_renewed = True
            return False
        if self._is_ranged and response.status in _NO_RANGES:
            self._is_refused = True
            return False
        sent = self._sent or (_NOTHING, {})
        words = hide_sent(words_of(response.headers, body), *sent)
        error = refusal or unavailable(self._where, response.status, response.headers, words)
        raise without_sent(error, *sent)

    def _accept(self, response: Response) -> bool:
        """Begin with a response, if it has the range. False: the whole file is requested instead."""
        if self._is_ranged and response.status == 206 and response.header("content-range") is None:
            # Nothing tells which bytes these are.
            self._whole.is_known = True
            self.__exit__(None, None, None)
            return False
        check_range(self._file, self._where, response, *self._range)
        if self._is_ranged and response.status == 200:
            self._whole.is_known, self._is_ranged, self._position = True, False, 0
        self._whole.is_known = self._whole.is_known or self._is_refused
        self._response, self._worked_before = response, response.worked
        return True


def request_with_retries(attempt: Callable[[], _T], seconds: float) -> _T:
    """
    Make a small request, and retry it while the service is busy or the network fails.

    Args:
        attempt: Makes it once, and raises `HTTPError`, `RefusedError` or `SourceUnavailableError` if that fails.
        seconds: For how long it is tried. The last failure is raised as it is.
    """
    pauses, deadline = delays(random.random(), attempts=_ATTEMPTS), time.monotonic() + seconds
    while True:
        try:
            return attempt()
        except (HTTPError, RefusedError, SourceUnavailableError) as error:
            pause, least = next(pauses, None), _least_pause(error)
            if pause is None or least is None or time.monotonic() + max(pause, least) > deadline:
                raise
        time.sleep(max(pause, least))


def _least_pause(failure: HTTPError | RefusedError | SourceUnavailableError) -> float | None:
    """Return the shortest pause before a retry, in seconds; None if a retry does not help."""
    if isinstance(failure, RefusedError):
        return failure.busy or 0.0 if failure.is_transient else None
    if failure.is_final:
        return None
    return failure.retry_after or 0.0 if isinstance(failure, SourceUnavailableError) else 0.0


def follow(where: str, target: Target, location: str) -> Target:
    """
    Return where a redirect leads: anywhere, but never from https to http.

    Raises:
        SourceUnavailableError: It leads to something else than an http or https URL.
        PolicyError: It would give up TLS.
    """
    base = f"{target.scheme}://{target.authority}{target.path}"
    try:
        found = target_of(urljoin(base, quote(location.encode("latin-1", "replace"), safe=_LOCATION_SAFE)))
    except (HTTPError, ValueError) as error:
        raise SourceUnavailableError(
            where, "redirect to something other than an http or https URL", is_final=True
        ) from error
    if target.scheme == "https" and found.scheme != "https":
        raise PolicyError(where, f"redirect from https to http (host `{found.host}`), which would give up encryption")
    return found


def read_refusal(response: Response) -> bytes:
    """
    Read the body of a refusal, as far as it arrives.
    """
    try:
        return response.read(_MAX_ERROR_BYTES, time.monotonic() + _ERROR_SECONDS)
    except HTTPError:
        return b""


def unavailable(where: str, status: int, headers: Mapping[str, str], reason: str = "") -> SourceUnavailableError:
    """
    Make the error for a response that is neither a success nor a refusal, with the pause that the server requests.
    """
    text = f"HTTP {status}" + (f" ({redact(reason)})" if reason else "")
    if 300 <= status < 400:
        text += ", a redirect, and credentials are never sent elsewhere; set the right endpoint"
    busy = retry_after(headers) if status in _BUSY or "retry-after" in headers else None
    is_final = busy is None and final_status(status)
    hint = SAME_AGAIN if is_final and 400 <= status < 500 else ""
    return SourceUnavailableError(where, text, retry_after=busy, is_final=is_final, hint=hint)


def retry_after(headers: Mapping[str, str]) -> float:
    """
    Return the pause in seconds that a busy server requests (RFC 9110, 10.2.3); 0 if it does not say.
    """
    text = headers.get("retry-after", "")
    if text.isascii() and text.isdigit():
        return float(text[:9])
    from email.utils import parsedate_to_datetime

    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return 0.0


def from_base64(text: object, length: int | None = None) -> str | None:
    """
    Return a digest that services write in base64, in hex; None if it is not a digest of that many bytes.
    """
    try:
        digest = binascii.a2b_base64(text, strict_mode=True)  # type: ignore[arg-type]  # What a remote says may be of any type.
    except (TypeError, ValueError):  # A checksum of checksums ends in `-<parts>`.
        return None
    return digest.hex() if digest and length in (None, len(digest)) else None


class Head(Protocol):
    """
    Status and headers of a response to a request for a range.
    """

    @property
    def status(self) -> int: ...

    @property
    def length(self) -> int | None: ...

    def header(self, name: str) -> str | None: ...


def check_range(file: RemoteFile, where: str, response: Head, start: int, stop: int) -> None:
    """
    Make sure that a response is for the requested bytes of the pinned content, or (status 200) for all of it.

    Raises:
        SourceChangedError: It is of other content.
        SourceUnavailableError: It is for other bytes.
    """
    size = file.entry.size_bytes
    etag, pinned = response.header("etag"), file.pin.get("If-Match")
    # Some servers list without the quotes that their responses have.
    if etag is not None and pinned is not None and bare_etag(etag) != bare_etag(pinned):
        raise SourceChangedError(where, str(file.entry.path))
    expected = f"bytes {start}-{stop - 1}/{size}"
    # Where there is no ETag, not every server looks at the condition that pins.
    for name, pin in (("x-goog-generation", "generation"), ("last-modified", "If-Unmodified-Since")):
        said, wanted = response.header(name) if pin in file.pin else None, file.pin.get(pin)
        if said is not None and said != wanted:
            raise SourceChangedError(where, str(file.entry.path))
    if response.status == 200 and response.length in (None, size):
        # Without a length it is counted while it is received.
        return
    got = f"bytes 0-{response.length}" if response.status == 200 else response.header("content-range")
    if got not in (expected, f"bytes {start}-{stop - 1}/*"):
        raise SourceUnavailableError(where, f"requested `{expected}`, received `{got}`")
    if response.length is not None and response.length != stop - start:
        raise SourceUnavailableError(where, f"requested {stop - start} bytes, Content-Length is {response.length}")
