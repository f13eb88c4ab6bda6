"""
A model server in miniature for a machine without a network: `python server.py STORE URI SOCKET`.

It finds its model on the volume, loads it, reports what it sees of the network, and responds to `{"x": 3}` with
`{"y": 7}` over HTTP on a Unix socket.
"""

from __future__ import annotations

import json
import socket
import sys
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import UnixStreamServer

from kserve_pvc import ModelStore


class Line(BaseHTTPRequestHandler):
    weights: dict[str, float]

    def do_POST(self) -> None:
        x = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["x"]
        response = json.dumps({"y": self.weights["slope"] * x + self.weights["intercept"]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(response)))
        self.end_headers()
        self.wfile.write(response)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def main(root: str, uri: str, address: str) -> None:
    model = ModelStore(root).ensure(uri)
    Line.weights = json.loads((model.path / "model.json").read_text())
    with UnixStreamServer(address, Line) as server:
        print(json.dumps({"status": model.status, **network()}), flush=True)
        server.serve_forever()


def network() -> dict[str, object]:
    """
    What this process could reach: the names of its interfaces, and how many routes it has.
    """
    routes = Path("/proc/self/net/route").read_text().splitlines()[1:]
    return {"interfaces": [name for _, name in socket.if_nameindex()], "routes": len(routes)}


if __name__ == "__main__":
    main(*sys.argv[1:])
