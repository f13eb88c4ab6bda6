"""
A minimal model server: `python serve.py STORE URI`.

It makes sure that its model is on the volume, loads it, and responds to `{"x": 3}`
with `{"y": 7}`.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

from kserve_pvc import ModelStore


class Line(BaseHTTPRequestHandler):
    weights: dict[str, float]

    def do_POST(self) -> None:
        x = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["x"]
        body = json.dumps(
            {"y": self.weights["slope"] * x + self.weights["intercept"]}
        ).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main(root: str, uri: str) -> None:
    model = ModelStore(root, mode="rw").ensure(uri)
    Line.weights = json.loads((model.path / "model.json").read_text())
    server = HTTPServer(("127.0.0.1", 0), Line)
    print(model.status, server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
