"""
Google Cloud Storage through gcsfs, for everything that only gcsfs knows: logins of a browser, its own cache of logins,
fsspec's configuration, settings of an HTTP session, client certificates.

gcsfs finds and keeps the credentials. Requests are our own wherever a header is enough to authorize them; only where
the HTTP session itself is configured do they go through the session of gcsfs.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any

import attrs
from aiohttp import ClientConnectorCertificateError, ClientError, ClientSession, InvalidURL
from fsspec import get_filesystem_class
from fsspec.asyn import sync
from google.auth.exceptions import GoogleAuthError
from yarl import URL

from kserve_pvc._source.contract import RemoteFile
from kserve_pvc.backends._class_reader import ClassReader, Future, Piece, run
from kserve_pvc.backends._google_json import read_error
from kserve_pvc.backends._http.client import HTTPClient
from kserve_pvc.backends._http.target import HTTPError, Target, target_of
from kserve_pvc.backends._login.contract import GivenToken, LoginError
from kserve_pvc.backends._login.google import KEPT_LOGINS, GoogleAuthLogin, check_encrypted, find_login, hide
from kserve_pvc.backends._object_store import MAX_PAGE_BYTES, MetadataRequests, Request
from kserve_pvc.backends._ranges import check_range

_OURS = ("asynchronous", "loop", "skip_instance_cache")
_MAX_ERROR_BYTES = 64 * 1024


@attrs.define(eq=False, kw_only=True)
class SessionRequests(MetadataRequests):
    """
    Small requests through the session of gcsfs.
    """

    gcsfs: Gcsfs

    def send_once(self, method: str, target: Target, headers: Mapping[str, str]) -> tuple[Mapping[str, str], bytes]:
        del method  # All of them are GET.
        return self.gcsfs.get((target, headers), MAX_PAGE_BYTES, 2 * self.client.response_seconds)


class Gcsfs:
    """
    An instance of `gcsfs.GCSFileSystem` that is made when it is first needed, since that may take requests.

    Args:
        options: Its arguments.
        endpoint: Where plain settings would find the service.
        is_emulator: Whether that is an address to which default credentials are not sent.
        is_session: Whether requests go through its HTTP session.
    """

    def __init__(self, options: Mapping[str, Any], endpoint: Target, *, is_emulator: bool, is_session: bool) -> None:
        self._options = {name: value for name, value in options.items() if name not in _OURS}
        self._options["token"] = _class_token(options.get("token"), endpoint, is_emulator=is_emulator)
        if self._options["token"] not in (None, *KEPT_LOGINS):
            # gcsfs would request full control, under which it looks for logins that it keeps.
            self._options.setdefault("access", "read_only")
        self._guard = threading.Lock()
        self._made: Any = None
        self.is_session = is_session
        self.login = GoogleAuthLogin(self._find_credentials, is_optional=True)

    @property
    def way(self) -> str:
        """
        How the service is reached, for the record.
        """
        return "fsspec:gcsfs" if self.is_session else "direct:gcsfs"

    def find_endpoint(self, plain: Target) -> Target:
        """
        Return the address of the service; for requests through the session, the one that gcsfs uses.
        """
        return target_of(self._fs.base.removesuffix("/storage/v1/")) if self.is_session else plain

    @property
    def project(self) -> str | None:
        """
        The project of the credentials, or the one that is configured.
        """
        project: str | None = self._fs.project
        return project

    def requests(self, client: HTTPClient) -> MetadataRequests:
        """
        Return how small requests are sent: through the session of gcsfs, if that is configured, or by the client.
        """
        return (
            SessionRequests(client, read_error, gcsfs=self) if self.is_session else MetadataRequests(client, read_error)
        )

    def get(self, request: Request, max_bytes: int, seconds: float) -> tuple[Mapping[str, str], bytes]:
        """
        Fetch a small resource through the session of gcsfs, and return headers and body.

        Raises:
            RefusedError: The status is not 200.
            HTTPError: There is no response, or one that is too long.
        """
        status, headers, body = run(self._fs.loop, self._fetch(*request, max_bytes), seconds)
        if status != 200:
            raise read_error(status, headers, bytes(body))
        if len(body) > max_bytes:
            raise HTTPError(f"response is longer than {max_bytes} bytes", is_final=True)
        return headers, bytes(body)

    def read(self, file: RemoteFile, make: Callable[[bool], Request], start: int, stop: int) -> ClassReader:
        """
        Read a range through the session of gcsfs, piece by piece.

        Args:
            make: Makes the request that reads the pinned object; takes whether credentials are renewed.
        """

        def fetch(first: int, last: int, is_renewed: bool) -> Future[Piece]:
            work = self._fetch_piece(file, make(is_renewed), first, last)
            return asyncio.run_coroutine_threadsafe(work, self._fs.loop)

        return ClassReader(fetch, start, stop)

    async def _fetch_piece(self, file: RemoteFile, request: Request, start: int, stop: int) -> Piece:
        target, headers = request
        headers = {**headers, "Range": f"bytes={start}-{stop - 1}"}
        status, received, body = await self._fetch(target, headers, max(stop - start, _MAX_ERROR_BYTES))
        if status not in (200, 206):
            raise read_error(status, received, bytes(body))
        check_range(file, f"gs://{file.address}", _Head(status, received), start, stop)
        if len(body) != stop - start:
            raise HTTPError(f"requested {stop - start} bytes and received {len(body)}")
        return body

    async def _fetch(
        self, target: Target, headers: Mapping[str, str], max_bytes: int
    ) -> tuple[int, Mapping[str, str], Piece]:
        """Send a GET, and return its status, headers by lower-case name, and the body as far as `max_bytes` + 1."""
        url = URL(f"{target.scheme}://{target.authority}{target.path}", encoded=True)
        sent = {"Accept-Encoding": "identity", **headers}
        limit: dict[str, Any] = {"timeout": self._fs.requests_timeout} if self._fs.requests_timeout else {}
        with _translated():
            session: ClientSession = await self._fs._set_session()
            async with session.get(
                url, headers=sent, allow_redirects=False, raise_for_status=False, **limit
            ) as response:
                body = bytearray()
                while len(body) <= max_bytes and (data := await response.content.read(max_bytes + 1 - len(body))):
                    body += data
                # Not copied into `bytes`: a download holds a piece for each of its streams.
                return response.status, {n.lower(): v for n, v in response.headers.items()}, body

    def close(self) -> None:
        """
        Close idle connections. gcsfs makes new ones when they are needed.
        """
        fs = self._made
        # A connector that was passed in belongs to the caller, and may serve other sessions.
        if fs is None or fs._session is None or "connector" in fs.session_kwargs:
            return
        session, fs._session = fs._session, None
        with suppress(Exception):
            sync(fs.loop, session.close, timeout=1.0)

    @property
    def _fs(self) -> Any:
        with self._guard:
            if self._made is None:
                # The login of a browser prints where to log in, and stdout may be read by a program.
                with redirect_stdout(sys.stderr):
                    self._made = get_filesystem_class("gs")(**self._options, skip_instance_cache=True)
            return self._made

    def _find_credentials(self, request: object) -> Any:
        del request  # gcsfs makes its own.
        try:
            credentials = self._fs.credentials.credentials
        except (GoogleAuthError, ValueError):
            raise
        except Exception as error:  # Whatever a login of a browser or a damaged cache may raise.
            raise LoginError(hide(f"gcsfs cannot log in: {type(error).__name__}: {error}"), is_denied=True) from None
        if credentials is None:
            raise LoginError("gcsfs found none", is_denied=True, is_absent=True)
        return credentials


def _class_token(token: Any, endpoint: Target, *, is_emulator: bool) -> Any:
    """The `token` for the class, which would take a wrong path for a token, and show a token to another service."""
    if token in (None, ""):
        return "anon" if is_emulator else None
    if isinstance(token, str) and token in KEPT_LOGINS:
        check_encrypted(endpoint)
        return token
    login = find_login(token, endpoint, is_emulator=is_emulator)
    if isinstance(login, GivenToken):
        from google.oauth2.credentials import Credentials

        credentials: Any = Credentials
        return credentials(login.token)
    # Not `Path.expanduser`, which fails where there is no home directory.
    return os.path.expanduser(token) if isinstance(token, str) else token  # noqa: PTH111


@attrs.frozen
class _Head:
    """
    Status and headers of a response, as `check_range` reads them.
    """

    status: int
    headers: Mapping[str, str]

    @property
    def length(self) -> int | None:
        text = self.headers.get("content-length", "")
        return int(text) if text.isdigit() else None

    def header(self, name: str) -> str | None:
        return self.headers.get(name)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (ClientError, TimeoutError, OSError) as error:
        is_final = isinstance(error, ClientConnectorCertificateError | InvalidURL)
        raise HTTPError(hide(str(error)) or "no response", is_final=is_final) from None
    except (TypeError, ValueError) as error:
        raise HTTPError(f"gcsfs refuses `session_kwargs`: {hide(str(error))}", is_final=True) from None
