"""
The far side of the Azure tests: Microsoft's emulator of Blob Storage, and raw access to it.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import os
import random
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import origin

VERSION = "3.37.0"
ACCOUNT = "kservepvc"
# A key that is easily found where it does not belong.
KEY = base64.b64encode(hashlib.sha512(b"canary of the account key").digest()).decode()
OTHER_KEY = base64.b64encode(hashlib.sha512(b"canary of another key").digest()).decode()
CONTAINER = "models"
_STARTS = 3
_INSTALL_SECONDS = 300
_SERVICE_VERSION = "2021-02-12"


class MissingError(Exception):
    """
    There is no Azurite here, and it cannot be had.
    """


def find_azurite() -> Path:
    """
    The program, which npm installs into a cache directory when it is first asked for.

    Raises:
        MissingError: There is no npm, or it has no registry to ask.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kserve-pvc-tests"
    place = cache / f"azurite-{VERSION}"
    program = place / "node_modules/.bin/azurite-blob"
    if not program.exists():
        if shutil.which("npm") is None or shutil.which("node") is None:
            raise MissingError("`npm` is not installed, so there is no Azurite")
        cache.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix="installing-", dir=cache))
        try:
            _install(fresh)
            with suppress(OSError):  # Somebody else was faster.
                fresh.rename(place)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return program


def _install(place: Path) -> None:
    command = [
        "npm",
        "install",
        "--prefix",
        str(place),
        "--no-audit",
        "--no-fund",
        "--ignore-scripts",
        f"azurite@{VERSION}",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_INSTALL_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise MissingError(f"Azurite was not installed within {_INSTALL_SECONDS} s") from error
    if done.returncode:
        raise MissingError(f"Azurite cannot be installed: {done.stderr.strip()[-500:]}")


class Azurite:
    """
    An empty storage account with the container `models`, in memory, while the `with` lasts.

    Args:
        certificate: Certificate and key of a server over TLS, which also believes whatever token looks like one.
    """

    def __init__(self, *, certificate: tuple[Path, Path] | None = None, start_seconds: float = 60.0) -> None:
        self._certificate = certificate
        self._start_seconds = start_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._directory: Path | None = None
        self.port = 0

    @property
    def endpoint(self) -> str:
        return f"{'https' if self._certificate else 'http'}://{origin.LOOPBACK}:{self.port}"

    @property
    def storage_options(self) -> Mapping[str, Any]:
        return self.options()

    @property
    def denied_options(self) -> Mapping[str, Any]:
        return self.options(key=OTHER_KEY)

    @property
    def unreachable_options(self) -> Mapping[str, Any]:
        with socket.socket() as unused:
            unused.bind((origin.LOOPBACK, 0))
            return self.options(f"http://{origin.LOOPBACK}:{unused.getsockname()[1]}")

    def options(self, endpoint: str | None = None, *, key: str = KEY) -> dict[str, Any]:
        """
        How a store reaches the account with its key, at another endpoint if one is given.
        """
        return {
            "connection_string": f"AccountName={ACCOUNT};AccountKey={key};"
            f"BlobEndpoint={endpoint or self.endpoint}/{ACCOUNT};"
        }

    def uri(self, path: str) -> str:
        return f"az://{CONTAINER}/{path}"

    def put(
        self, path: str, data: bytes, *, container: str = CONTAINER, headers: Mapping[str, str] | None = None
    ) -> None:
        """
        Make or replace one blob in one piece, so that the service itself finds its MD5.
        """
        self._ask("PUT", self._path(container, path), data, {"x-ms-blob-type": "BlockBlob", **(headers or {})})

    def put_blocks(self, path: str, blocks: Sequence[bytes], *, headers: Mapping[str, str] | None = None) -> None:
        """
        Make or replace one blob block by block, which has the MD5 that the headers claim, or none.
        """
        names = [base64.b64encode(b"%08d" % number).decode() for number in range(len(blocks))]
        place = self._path(CONTAINER, path)
        for name, block in zip(names, blocks, strict=True):
            self._ask("PUT", f"{place}?comp=block&blockid={quote(name, safe='')}", block)
        listed = "".join(f"<Latest>{name}</Latest>" for name in names)
        body = f'<?xml version="1.0" encoding="utf-8"?><BlockList>{listed}</BlockList>'.encode()
        self._ask("PUT", f"{place}?comp=blocklist", body, headers or {})

    def delete(self, path: str) -> None:
        self._ask("DELETE", self._path(CONTAINER, path))

    def make_container(self, name: str, *, is_public: bool = False) -> None:
        self._ask(
            "PUT",
            f"/{ACCOUNT}/{name}?restype=container",
            headers={"x-ms-blob-public-access": "container"} if is_public else {},
        )

    def signature(
        self, container: str = CONTAINER, *, permission: str = "rl", seconds: float = 3600, blob: str | None = None
    ) -> str:
        """
        A shared access signature for a container or a blob, as the account's owner makes it.
        """
        from azure.storage.blob import generate_blob_sas, generate_container_sas

        end = datetime.now(UTC) + timedelta(seconds=seconds)
        if blob is not None:
            return generate_blob_sas(ACCOUNT, container, blob, account_key=KEY, permission=permission, expiry=end)
        return generate_container_sas(ACCOUNT, container, account_key=KEY, permission=permission, expiry=end)

    def _path(self, container: str, path: str) -> str:
        return f"/{ACCOUNT}/{container}/{quote(path, safe='/~')}"

    def _ask(self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        signed = f"{path}{'&' if '?' in path else '?'}{self._owner}"
        connection = self._connection()
        try:
            connection.request(method, signed, body, {"x-ms-version": _SERVICE_VERSION, **(headers or {})})
            answer = connection.getresponse()
            said = answer.read()
            if answer.status >= 300 and (method, answer.status) != ("DELETE", 404):
                raise RuntimeError(f"{method} {path}: {answer.status} {said[:500]!r}")
        finally:
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        if self._certificate is None:
            return http.client.HTTPConnection(origin.LOOPBACK, self.port, timeout=30)
        trusting = ssl._create_unverified_context()
        return http.client.HTTPSConnection(origin.LOOPBACK, self.port, timeout=30, context=trusting)

    def __enter__(self) -> Self:
        from azure.storage.blob import generate_account_sas

        program = find_azurite()
        for starts_left in reversed(range(_STARTS)):
            try:
                self._start(program)
                break
            except ChildProcessError:
                self._stop()
                # A port that was free when it was chosen may have been taken since.
                if not starts_left:
                    raise
            except BaseException:
                self._stop()
                raise
        end = datetime.now(UTC) + timedelta(days=1)
        self._owner = generate_account_sas(ACCOUNT, KEY, "sco", "rwdlac", end)
        self.make_container(CONTAINER)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _start(self, program: Path) -> None:
        self.port = _free_port()
        self._directory = Path(tempfile.mkdtemp(prefix="azurite-"))
        where = ["--blobHost", origin.LOOPBACK, "--blobPort", str(self.port)]
        how = ["--inMemoryPersistence", "--silent", "--skipApiVersionCheck", "--disableTelemetry"]
        if self._certificate is not None:
            how += ["--oauth", "basic", "--cert", str(self._certificate[0]), "--key", str(self._certificate[1])]
        # The launcher ties it to the life of the process that started it.
        launcher = [sys.executable, "-I", "-S", str(Path(origin.__file__).resolve()), str(os.getpid())]
        log = self._directory / "log"
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [*launcher, str(program), *where, *how],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self._directory,
                env={**os.environ, "AZURITE_ACCOUNTS": f"{ACCOUNT}:{KEY}"},
                start_new_session=True,
            )
        deadline = time.monotonic() + self._start_seconds
        while not self._is_ready():
            if self._process.poll() is not None:
                raise ChildProcessError(
                    f"Azurite ended with {self._process.returncode}:\n{log.read_text(errors='replace')[-2000:]}"
                )
            if time.monotonic() > deadline:
                raise RuntimeError(f"Azurite was not ready after {self._start_seconds:g} s")
            time.sleep(0.05)

    def _is_ready(self) -> bool:
        connection = self._connection()
        try:
            connection.request("GET", f"/{ACCOUNT}?comp=list")
            return connection.getresponse().status == 403
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(15)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None


def _free_port() -> int:
    """A port that is free now, below the range of outgoing connections."""
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind((origin.LOOPBACK, port))
            return port
    raise RuntimeError("no free port")
