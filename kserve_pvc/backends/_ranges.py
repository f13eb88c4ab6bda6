"""
Ranges of pinned objects by plain HTTP requests: what all back ends share whose service can be asked directly.

The back end makes the request (an address and signed headers) and says what a refusal means; everything between is
here: which answers count, that an answer is for the bytes that were asked for, and that they are of the pinned content.
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
from kserve_pvc._source.retry import delays
from kserve_pvc.backends._http.client import Exchange, HTTPClient
from kserve_pvc.backends._http.connection import Response
from kserve_pvc.backends._http.target import HTTPError, Target, target_of
from kserve_pvc.errors import PolicyError, SourceChangedError, SourceDeniedError, SourceUnavailableError, StoreError

_MAX_ERROR_BYTES = 64 * 1024
_ERROR_SECONDS = 10.0
_BUSY = (429, 503)
_FINAL_STATUS = (301, 302, 303, 307, 308, 400, 405, 501)
_ATTEMPTS = 4
NO_CREDENTIALS = "NoCredentials"
# What a `Location` may hold unquoted: all that has a meaning in a URL.
_LOCATION_SAFE = "!#$%&'()*+,/:;=?@[]~"

_T = TypeVar("_T")


class RefusedError(Exception):
    """
    A refusal of a service: the HTTP status, the code of the service if there is one, and a sentence for people.

    `busy` is how many seconds a busy service requests as a pause, None if it is not busy. A login that finds no
    credentials raises it too, with the code `NO_CREDENTIALS`.
    """

    def __init__(
        self,
        reason: str,
        *,
        status: int = 0,
        code: str = "",
        busy: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.status = status
        self.code = code
        self.busy = busy
        self.headers: Mapping[str, str] = headers or {}

    @property
    def is_transient(self) -> bool:
        """
        Whether a retry may help.
        """
        return self.busy is not None or self.status in (408, 429) or self.status >= 500


class Requests(Protocol):
    """
    How a back end asks for an object. Called from many threads at once.
    """

    def request(self, file: RemoteFile, *, renewed: bool) -> tuple[Target, Mapping[str, str]]:
        """
        The address of a file and the headers that pin its version and carry the credentials, without a range.

        `renewed` means that the credentials used before were refused: ask for new ones where that can help.
        """

    def refusal(self, file: RemoteFile, status: int, headers: Mapping[str, str], body: bytes) -> StoreError | None:
        """What an answer that is no success means; None if it has no meaning of its own for this service."""


class Reader:
    """
    Bytes `start` to `stop` (not included) of a pinned file, as `RangeReader` wants them.

    The request is sent when the `with` begins, and nothing waits longer than a moment, so that whoever reads may look
    up. A refusal is taken for an expired signature once: then the request is signed anew.
    """

    def __init__(
        self, client: HTTPClient, requests: Requests, file: RemoteFile, where: str, start: int, stop: int
    ) -> None:
        self._client = client
        self._requests = requests
        self._file = file
        self._where = where
        self._range = (start, stop)
        self._is_renewed = False
        self._exchange: Exchange | None = None
        self._answer: Response | None = None
        self._worked_before = 0.0

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
        if exchange is not None:
            exchange.__exit__(kind, error, trace)

    @property
    def worked(self) -> float:
        """
        Seconds that reading took without waiting for the server.
        """
        return 0.0 if self._answer is None else self._answer.worked - self._worked_before

    def readinto(self, buffer: memoryview) -> int | None:
        """
        Fill the start of a buffer with what comes next. None: nothing has come for a moment; 0: the answer is over.

        Raises:
            SourceChangedError: The answer is of other content than was pinned.
            SourceUnavailableError: There is no answer, or not the one that was asked for.
            StoreError: What the back end calls a refusal.
        """
        try:
            if self._answer is None and not self._begin():
                return None
            assert self._answer is not None  # It has begun.
            return self._answer.readinto(buffer)
        except HTTPError as error:
            raise SourceUnavailableError(self._where, str(error), is_final=error.is_final) from error

    def _send(self) -> Exchange:
        start, stop = self._range
        target, headers = self._requests.request(self._file, renewed=self._is_renewed)
        if stop - start < self._file.entry.size_bytes:
            headers = {**headers, "Range": f"bytes={start}-{stop - 1}"}
        self._exchange = self._client.send("GET", target, headers)
        return self._exchange

    def _begin(self) -> bool:
        start, stop = self._range
        exchange = self._exchange or self._send()
        answer = exchange.answer()
        if answer is None:
            return False
        if answer.status in (200, 206):
            _check(self._file, self._where, answer, start, stop)
            self._answer, self._worked_before = answer, answer.worked
            return True
        body = read_refusal(answer)
        self.__exit__(None, None, None)
        refusal = self._requests.refusal(self._file, answer.status, answer.headers, body)
        # S3 has status 400 for a token that has expired.
        is_denied = answer.status in (401, 403) or isinstance(refusal, SourceDeniedError)
        if is_denied and not self._is_renewed:
            self._is_renewed = True
            return False
        raise refusal or unavailable(self._where, answer.status, answer.headers)


def ask_patiently(ask: Callable[[], _T], seconds: float) -> _T:
    """
    Ask for something small, and again while the service is busy or the network fails.

    Args:
        ask: Asks once, and raises `HTTPError`, `RefusedError` or `SourceUnavailableError` if that was in vain.
        seconds: For how long it is tried. The last failure is raised as it is.
    """
    pauses, deadline = delays(random.random(), attempts=_ATTEMPTS), time.monotonic() + seconds
    while True:
        try:
            return ask()
        except (HTTPError, RefusedError, SourceUnavailableError) as error:
            pause, least = next(pauses, None), _least_pause(error)
            if pause is None or least is None or time.monotonic() + max(pause, least) > deadline:
                raise
        time.sleep(max(pause, least))


def _least_pause(failure: HTTPError | RefusedError | SourceUnavailableError) -> float | None:
    """For how many seconds to leave a source alone at least; None if asking again does not help."""
    if isinstance(failure, RefusedError):
        return failure.busy or 0.0 if failure.is_transient else None
    if failure.is_final:
        return None
    return failure.retry_after or 0.0 if isinstance(failure, SourceUnavailableError) else 0.0


def follow(where: str, target: Target, location: str) -> Target:
    """
    Say where a redirect leads: anywhere, but never from https to http.

    Raises:
        SourceUnavailableError: It leads to what is no such URL.
        PolicyError: It would give up TLS.
    """
    base = f"{target.scheme}://{target.authority}{target.path}"
    try:
        found = target_of(urljoin(base, quote(location.encode("latin-1", "replace"), safe=_LOCATION_SAFE)))
    except (HTTPError, ValueError) as error:
        raise SourceUnavailableError(where, "it points to what is no http or https URL", is_final=True) from error
    if target.scheme == "https" and found.scheme != "https":
        raise PolicyError(where, f"it points from https to http (at `{found.host}`), where anybody may listen")
    return found


def read_refusal(answer: Response) -> bytes:
    """
    Read what a server says about a refusal, as far as it says it; nothing if it does not.
    """
    try:
        return answer.read(_MAX_ERROR_BYTES, time.monotonic() + _ERROR_SECONDS)
    except HTTPError:
        return b""


def unavailable(where: str, status: int, headers: Mapping[str, str], reason: str = "") -> SourceUnavailableError:
    """
    The error for an answer that is neither success nor a refusal, with how long the server asks to be left alone.
    """
    text = f"it answered {status}" + (f" ({reason})" if reason else "")
    if 300 <= status < 400:
        text += " and points elsewhere, where credentials are never sent; name the right endpoint"
    busy = retry_after(headers) if status in _BUSY or "retry-after" in headers else None
    return SourceUnavailableError(where, text, retry_after=busy, is_final=status in _FINAL_STATUS)


def retry_after(headers: Mapping[str, str]) -> float:
    """
    Seconds that a busy server wants to be left alone for (RFC 9110, 10.2.3); 0 if it does not say.
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
    A digest as services write it, in hex; None if it is none, or not one of so many bytes.
    """
    try:
        digest = binascii.a2b_base64(text, strict_mode=True)  # type: ignore[arg-type]  # What a remote says may be of any type.
    except (TypeError, ValueError):  # A checksum of checksums ends in `-<parts>`.
        return None
    return digest.hex() if digest and length in (None, len(digest)) else None


def _check(file: RemoteFile, where: str, answer: Response, start: int, stop: int) -> None:
    size = file.entry.size_bytes
    etag, pinned = answer.header("etag"), file.pin.get("If-Match")
    # Some servers list without the quotes that they answer with.
    if etag is not None and pinned is not None and etag.strip('"') != pinned.strip('"'):
        raise SourceChangedError(where, str(file.entry.path))
    expected = f"bytes {start}-{stop - 1}/{size}"
    # Where there is no ETag, not every server looks at the condition that pins.
    for name, pin in (("x-goog-generation", "generation"), ("last-modified", "If-Unmodified-Since")):
        said, wanted = answer.header(name) if pin in file.pin else None, file.pin.get(pin)
        if said is not None and said != wanted:
            raise SourceChangedError(where, str(file.entry.path))
    # A whole object comes without a range: then its length has to be the one that was pinned.
    got = (
        answer.header("content-range")
        if answer.status == 206
        else f"bytes 0-{(answer.length or 0) - 1}/{answer.length}"
    )
    if got != expected:
        raise SourceUnavailableError(where, f"it was asked for `{expected}` and answered `{got}`")
    if answer.length is not None and answer.length != stop - start:
        raise SourceUnavailableError(where, f"it was asked for {stop - start} bytes and announced {answer.length}")
