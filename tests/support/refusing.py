"""
A server that refuses everything, in the words of each service, and may repeat what it was sent as some services do.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import escape

from kserve_pvc.backends.azure import AzureBackend
from kserve_pvc.backends.gs import GSBackend
from kserve_pvc.backends.hf import HFBackend
from kserve_pvc.backends.http import HTTPBackend
from kserve_pvc.backends.s3 import S3Backend

# What must not be seen, each in the alphabet that it may have.
KEY = "c2VjcmV0LWNhbmFyeS1rZXktb2YtYS1zdG9yYWdlLWFjY291bnQ="
TOKEN = "canary-0c4f/of+a=token"
HEADER = "canary header + 8821"
SIGNATURE = "canary%2F77%2Bsig%3D"
SECRETS = (KEY, TOKEN, HEADER, "canary/77+sig=", SIGNATURE, quote(TOKEN, safe=""))


class RefusingServer:
    """
    Refuses every request with a status, and with what a function makes of its method, path and headers.
    """

    port = 0

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.status = 403
        self.code = "SomeCode"
        self.message = "some words"
        self.repeats = False
        self.requests: list[str] = []
        self.write: Callable[[str, str], bytes] = in_xml

    def words(self, handler: BaseHTTPRequestHandler) -> str:
        if not self.repeats:
            return self.message
        sent = ", ".join(f"{name}: {value}" for name, value in handler.headers.items())
        values = " ".join(handler.headers.values())
        return f"{self.message} {values} of {handler.path} with {sent}"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def refusing_server() -> Iterator[RefusingServer]:
    server = RefusingServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            server.requests.append(f"{self.command} {self.path}")
            body = server.write(server.code, server.words(self))
            self.send_response(server.status)
            self.send_header("Content-Type", "text/plain")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815 - As the class of the standard library calls it.

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listener.daemon_threads = True
    thread = threading.Thread(target=listener.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    server.port = listener.server_address[1]
    try:
        yield server
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()


def in_xml(code: str, message: str) -> bytes:
    return f"<Error><Code>{code}</Code><Message>{escape(message)}</Message></Error>".encode()


def in_json(code: str, message: str) -> bytes:
    return json.dumps({"error": {"code": 1, "message": f"{code}: {message}"}}).encode()


def in_text(code: str, message: str) -> bytes:
    return f"{code}: {message}\nmore that nobody reads\n".encode()


def make(service: str, url: str) -> tuple[Any, str]:
    """
    Make the backend of a service with secrets of every kind that it takes, and a URI of it.
    """
    account = f"AccountName=devstore;BlobEndpoint={url}/devstore"
    signed = {"key": "AKIA", "secret": KEY, "token": TOKEN, "endpoint_url": url, "client_kwargs": {"region_name": "x"}}
    made: dict[str, Callable[[], tuple[Any, str]]] = {
        "s3": lambda: (S3Backend(signed, {}), "s3://bkt/m.bin"),
        "s3-url": lambda: (S3Backend({**signed, "version_aware": False}, {}), "s3://bkt/m.bin"),
        "s3-class": lambda: (
            S3Backend({**signed, "s3_additional_kwargs": {"ExpectedBucketOwner": "123456789012"}}, {}),
            "s3://bkt/m.bin",
        ),
        "gs": lambda: (GSBackend({"endpoint_url": url, "token": "ya29.canary-token"}, {}), "gs://bkt/m.bin"),
        "az-key": lambda: (AzureBackend({"connection_string": f"{account};AccountKey={KEY}"}, {}), "az://con/m.bin"),
        "az-sas": lambda: (
            AzureBackend({"connection_string": f"{account};SharedAccessSignature=sv=1&sig={SIGNATURE}"}, {}),
            "az://con/m.bin",
        ),
        "hf": lambda: (HFBackend({"endpoint": url, "token": TOKEN}, {}), "hf://org/model"),
        "http": lambda: (
            HTTPBackend({"headers": {"127.0.0.1": {"X-Team": HEADER, "Authorization": f"Bearer {TOKEN}"}}}, PRIVATE),
            f"{url}/m.bin",
        ),
        "http-link": lambda: (HTTPBackend({}, PRIVATE), f"{url}/m.bin?x-amz-signature={SIGNATURE}"),
        "http-basic": lambda: (
            HTTPBackend({"headers": {"127.0.0.1": {"Authorization": "Basic dXNlcjpjYW5hcnktb2YtYS11c2Vy"}}}, PRIVATE),
            f"{url}/m.bin",
        ),
    }
    return made[service]()


PRIVATE = {"KSERVE_PVC_ALLOW_PRIVATE_ADDRESSES": "1"}
SERVICES = ("s3", "s3-url", "s3-class", "gs", "az-key", "az-sas", "hf", "http", "http-link", "http-basic")
