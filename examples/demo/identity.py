"""
The services that hand out AWS credentials, imitated: web identity of STS, a container's endpoint, instance metadata.

The real ones run inside AWS only. This one speaks as much of their protocols as clients need, refuses what they
would refuse (a wrong token, metadata without a session), and hands out whatever credentials it is told to.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs

LOOPBACK = "127.0.0.1"
ROLE = "arn:aws:iam::123456789012:role/reader"
_METADATA = "/latest/meta-data/iam/security-credentials/"
_SESSION = "session-of-the-metadata-service"
_STS_RESPONSE = """<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">
<AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>{AccessKeyId}</AccessKeyId>
<SecretAccessKey>{SecretAccessKey}</SecretAccessKey><SessionToken>{Token}</SessionToken>
<Expiration>{Expiration}</Expiration></Credentials></AssumeRoleWithWebIdentityResult>
</AssumeRoleWithWebIdentityResponse>"""
_STS_ERROR = (
    "<ErrorResponse><Error><Code>InvalidIdentityToken</Code><Message>wrong token</Message></Error></ErrorResponse>"
)


@dataclass
class IdentityServices:
    """
    All three services at one port of the loopback interface, while the `with` lasts.

    Attributes:
        key: What is handed out next, with `secret` and `session_token`, for `lifetime` seconds.
        requests: How often credentials were handed out.
        is_down: Whether every request fails with status 503.
    """

    key: str
    secret: str
    session_token: str = ""
    lifetime: float = 3600.0
    requests: int = 0
    is_down: bool = False
    _server: ThreadingHTTPServer | None = field(default=None, repr=False)

    def __enter__(self) -> Self:
        services = self

        class Handler(_Handler):
            identity = services

        self._server = ThreadingHTTPServer((LOOPBACK, 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    @property
    def endpoint(self) -> str:
        assert self._server is not None
        return f"http://{LOOPBACK}:{self._server.server_port}"

    def environ(self, kind: str, directory: Path) -> Mapping[str, str]:
        """
        Return the variables that lead a client to one of the services, whose token lies in a directory.
        """
        token = directory / "token"
        token.write_text("token-of-the-pod")
        if kind == "web-identity":
            return {
                "AWS_ROLE_ARN": ROLE,
                "AWS_WEB_IDENTITY_TOKEN_FILE": str(token),
                "AWS_ENDPOINT_URL_STS": self.endpoint,
            }
        if kind == "container":
            return {
                "AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{self.endpoint}/container",
                "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": str(token),
            }
        assert kind == "metadata"
        return {"AWS_EC2_METADATA_SERVICE_ENDPOINT": self.endpoint, "AWS_EC2_METADATA_DISABLED": "false"}

    def hand_out(self) -> dict[str, Any]:
        """
        Return credentials as the services describe them.
        """
        self.requests += 1
        expires = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + self.lifetime))
        return {
            "Code": "Success",
            "Type": "AWS-HMAC",
            "AccessKeyId": self.key,
            "SecretAccessKey": self.secret,
            "Token": self.session_token,
            "LastUpdated": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "Expiration": expires,
        }


class _Handler(BaseHTTPRequestHandler):
    identity: IdentityServices

    def do_POST(self) -> None:
        form = parse_qs(self.rfile.read(int(self.headers.get("Content-Length", 0))).decode())
        is_right = form.get("WebIdentityToken") == ["token-of-the-pod"] and form.get("RoleArn") == [ROLE]
        if is_right and not self.identity.is_down:
            self._send(200, _STS_RESPONSE.format(**self.identity.hand_out()))
        else:
            self._send(503 if self.identity.is_down else 400, _STS_ERROR)

    def do_PUT(self) -> None:
        self._send(503 if self.identity.is_down else 200, _SESSION)

    def do_GET(self) -> None:
        if self.identity.is_down:
            self._send(503, "")
        elif self.path == "/container":
            is_right = self.headers.get("Authorization") == "token-of-the-pod"
            self._send(200, json.dumps(self.identity.hand_out())) if is_right else self._send(401, "{}")
        elif self.headers.get("x-aws-ec2-metadata-token") != _SESSION:
            self._send(401, "")
        elif self.path == _METADATA:
            self._send(200, "reader")
        elif self.path == f"{_METADATA}reader":
            self._send(200, json.dumps(self.identity.hand_out()))
        else:
            self._send(404, "")

    def _send(self, status: int, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...
