"""
Services as the conformance suite wants them: each is put into past the back end under test.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import fsspec
import origin
from origin import LOOPBACK, SeaweedS3

from kserve_pvc import FileEntry, InvalidURIError, ModelRef, RemoteFile, Resolved, SourceChangedError, order_listing


def free_port() -> int:
    """
    A port where nobody listens, now and as good as certainly in a moment.
    """
    (port,) = origin._free_ports(1)
    return port


class S3Remote:
    """
    A bucket of an S3 server that runs already.
    """

    def __init__(self, server: SeaweedS3, bucket: str, scheme: str = "s3") -> None:
        self._server = server
        self._bucket = bucket
        self._scheme = scheme
        self.storage_options = {"endpoint_url": server.endpoint, "key": server.key, "secret": server.secret}
        self.denied_options = {**self.storage_options, "key": "nokey", "secret": "nosecret"}
        self.unreachable_options = {**self.storage_options, "endpoint_url": f"http://{LOOPBACK}:{free_port()}"}

    def uri(self, path: str) -> str:
        return f"{self._scheme}://{self._bucket}/{path}"

    def put(self, path: str, data: bytes) -> None:
        self._server.put(self._bucket, path, data)

    def delete(self, path: str) -> None:
        self._server._client.delete_object(Bucket=self._bucket, Key=path)


class DirectoryRemote:
    """
    A directory of this machine, under whichever scheme reads it.
    """

    storage_options: Mapping[str, Any] = {}
    denied_options = None
    unreachable_options = None

    def __init__(self, place: Path, scheme: str) -> None:
        self._place = place
        self._scheme = scheme
        self._numbers = itertools.count()
        (place / "new").mkdir(parents=True)
        (place / "all").mkdir()

    def uri(self, path: str) -> str:
        return f"{self._scheme}://{self._place}/all/{path}"

    def put(self, path: str, data: bytes) -> None:
        # Another inode takes the place of the old one, as those do who publish files in one step.
        new, final = self._place / "new" / str(next(self._numbers)), self._place / "all" / path
        new.write_bytes(data)
        final.parent.mkdir(parents=True, exist_ok=True)
        new.replace(final)

    def delete(self, path: str) -> None:
        (self._place / "all" / path).unlink()


class ClaimRemote(DirectoryRemote):
    """
    A claim that is mounted on this machine.
    """

    def __init__(self, place: Path) -> None:
        super().__init__(place, "pvc")
        self.storage_options = {"claims": {"models": place / "all"}}

    def uri(self, path: str) -> str:
        return f"pvc://models/{path}"


class _Served:
    """
    A server of files in a process of its own, while the `with` lasts.
    """

    def __init__(self, password: str) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="served-")
        self._files = DirectoryRemote(Path(self._directory.name) / "files", "unused")
        self._process: subprocess.Popen[bytes] | None = None
        self.storage_options = {"host": LOOPBACK, "port": free_port(), "username": "reader", "password": password}
        self.denied_options = {**self.storage_options, "password": f"not-{password}"}
        self.unreachable_options = {**self.storage_options, "port": free_port()}

    @property
    def directory(self) -> Path:
        return Path(self._directory.name) / "files" / "all"

    def start(self, *arguments: str) -> None:
        # Through the launcher that ties a server to the life of this process.
        launcher = [sys.executable, "-I", "-S", origin.__file__, str(os.getpid()), sys.executable, "-I"]
        nowhere = subprocess.DEVNULL
        self._process = subprocess.Popen([*launcher, *arguments], stdin=nowhere, stdout=nowhere, stderr=nowhere)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                with socket.create_connection((LOOPBACK, int(self.storage_options["port"])), timeout=1):
                    return
            except OSError:
                time.sleep(0.05)
        raise RuntimeError("the server was not ready after 30 s")

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            origin._end(self._process)
        self._directory.cleanup()

    def put(self, path: str, data: bytes) -> None:
        self._files.put(path, data)

    def delete(self, path: str) -> None:
        self._files.delete(path)


class FTPRemote(_Served):
    """
    A real FTP server: `pyftpdlib`.
    """

    def __init__(self) -> None:
        super().__init__("ftp-password-of-the-reader")

    def __enter__(self) -> Self:
        options = {"-i": LOOPBACK, "-p": self.storage_options["port"], "-d": self.directory}
        options |= {"-u": self.storage_options["username"], "-P": self.storage_options["password"]}
        self.start("-m", "pyftpdlib", *(str(word) for pair in options.items() for word in pair))
        return self

    def uri(self, path: str) -> str:
        return f"fsspec+ftp:///{path}"


class SFTPRemote(_Served):
    """
    A real SFTP server: `asyncssh`.
    """

    def __init__(self) -> None:
        super().__init__("sftp-password-of-the-reader")
        for options in (self.storage_options, self.denied_options, self.unreachable_options):
            options.update({"allow_agent": False, "look_for_keys": False})
        self._seconds = itertools.count(int(time.time()) - 1_000_000)

    def __enter__(self) -> Self:
        self.start(
            "-c", _SFTP_SERVER, str(self.directory), *(str(self.storage_options[name]) for name in ("port", "password"))
        )
        return self

    def uri(self, path: str) -> str:
        return f"fsspec+sftp:///{path}"

    def put(self, path: str, data: bytes) -> None:
        super().put(path, data)
        # SFTP tells times in whole seconds: a second change within one looks like none, so here each has its own.
        moment = next(self._seconds)
        os.utime(self.directory / path, (moment, moment))


_SFTP_SERVER = """
import asyncio, asyncssh, sys

place, port, password = sys.argv[1:]

class Server(asyncssh.SSHServer):
    def password_auth_supported(self):
        return True

    def validate_password(self, username, given):
        return given == password

async def serve():
    key = asyncssh.generate_private_key("ssh-ed25519")
    files = lambda channel: asyncssh.SFTPServer(channel, chroot=place)
    await asyncssh.listen("127.0.0.1", int(port), server_host_keys=[key], server_factory=Server, sftp_factory=files)
    await asyncio.Event().wait()

asyncio.run(serve())
"""


class FsspecMemoryRemote:
    """
    The file system in memory that fsspec brings.
    """

    storage_options: Mapping[str, Any] = {}
    denied_options = None
    unreachable_options = None

    def __init__(self) -> None:
        self._files = fsspec.filesystem("memory", skip_instance_cache=True)

    def uri(self, path: str) -> str:
        return f"fsspec+memory://{path}"

    def put(self, path: str, data: bytes) -> None:
        self._files.pipe_file(f"/{path}", data)

    def delete(self, path: str) -> None:
        self._files.rm_file(f"/{path}")


class ThroughFsspec:
    """
    Another service, whose URIs request fsspec.

    Args:
        change: Makes options of the class out of those of our backend.
    """

    def __init__(self, remote: Any, *, change: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict) -> None:
        self._remote = remote
        for name in ("storage_options", "denied_options", "unreachable_options"):
            setattr(self, name, change(getattr(remote, name)))

    def uri(self, path: str) -> str:
        return f"fsspec+{self._remote.uri(path)}"

    def put(self, path: str, data: bytes) -> None:
        self._remote.put(path, data)

    def delete(self, path: str) -> None:
        self._remote.delete(path)


class MemoryRemote:
    """
    Objects in the memory of this process.
    """

    denied_options = None
    unreachable_options = None

    def __init__(self) -> None:
        self._objects: dict[str, bytes] = {}
        self.storage_options = {"objects": self._objects}

    def uri(self, path: str) -> str:
        return f"memory://{path}"

    def put(self, path: str, data: bytes) -> None:
        self._objects[path] = data

    def delete(self, path: str) -> None:
        del self._objects[path]


class MemoryBackend:
    """
    The back end of a third party, as small as one can be.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._objects: Mapping[str, bytes] = options["objects"]

    def resolve(self, ref: ModelRef) -> Resolved:
        if ref.revision is not None:
            raise InvalidURIError(ref.uri, "what is in memory has no revisions")
        names = [
            name
            for name in list(self._objects)
            if name == ref.location or name.startswith(ref.location.rstrip("/") + "/")
        ]
        return order_listing(ref, [self._file(name, self._inside(name, ref.location)) for name in names])

    def _inside(self, name: str, location: str) -> str:
        return name.rpartition("/")[2] if name == location else name[len(location.rstrip("/")) + 1 :]

    def _file(self, name: str, inside: str) -> RemoteFile:
        data = self._objects[name]
        entry = FileEntry(path=inside, size_bytes=len(data), token=self.token(data))
        return RemoteFile(entry=entry, address=name, pin={"token": str(entry.token)})

    @contextmanager
    def open_range(self, file: RemoteFile, start: int, stop: int) -> Iterator[io.BytesIO]:
        data = self._objects.get(file.address)
        if data is None or self.token(data) != file.pin["token"]:
            raise SourceChangedError("memory://", str(file.entry.path))
        yield io.BytesIO(data[start:stop])

    def token(self, data: bytes) -> str:
        return hashlib.md5(data, usedforsecurity=False).hexdigest()
