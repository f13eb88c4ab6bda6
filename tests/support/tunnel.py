"""
A proxy that takes every host of the internet to one server here, so that an address as clouds have them leads to an
emulator.
"""

from __future__ import annotations

import select
import socket
import threading
from contextlib import suppress
from socketserver import StreamRequestHandler, ThreadingTCPServer
from typing import Self

_HERE = "127.0.0.1"


class Tunnel(ThreadingTCPServer):
    """
    Answers CONNECT to any host with a connection to one port of this machine, while the `with` lasts.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port: int) -> None:
        super().__init__((_HERE, 0), _Connection)
        self.leads_to = port

    @property
    def url(self) -> str:
        return f"http://{_HERE}:{self.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Connection(StreamRequestHandler):
    server: Tunnel
    rbufsize = 0

    def handle(self) -> None:
        if not self.rfile.readline().startswith(b"CONNECT "):
            self.wfile.write(b"HTTP/1.1 405 Only CONNECT\r\nContent-Length: 0\r\n\r\n")
            return
        while self.rfile.readline().strip():
            pass
        with suppress(OSError), socket.create_connection((_HERE, self.server.leads_to), timeout=10) as far:
            self.wfile.write(b"HTTP/1.1 200 Connected\r\n\r\n")
            _pass_on(self.connection, far)


def _pass_on(near: socket.socket, far: socket.socket) -> None:
    other = {near: far, far: near}
    while True:
        ready, _, _ = select.select([near, far], [], [], 60)
        for end in ready:
            data = end.recv(64 * 1024)
            if not data:
                return
            other[end].sendall(data)
        if not ready:
            return
