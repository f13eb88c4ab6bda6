"""
The webhook server: TLS, limits, probes, metrics and audit lines around the admission decision.

Its only state is the policy and the certificate, which are reloaded when their files change. A failed reload is logged
to standard error and counted, and the previous version stays in use.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from kserve_pvc.errors import MissingDependencyError, SettingsError, StoreError
from kserve_pvc.kserve._admission import MAX_BODY_BYTES, BadReviewError, decide, read_review
from kserve_pvc.kserve._policy import Policy, read_policy
from kserve_pvc.kserve._yaml import read_documents

try:
    import uvicorn
    from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
    from prometheus_client.exposition import CONTENT_TYPE_LATEST
    from starlette.applications import Starlette
    from starlette.requests import ClientDisconnect
    from starlette.responses import JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route

    from kserve_pvc.kserve._connections import (
        KEEP_ALIVE_SECONDS,
        MAX_CONNECTIONS,
        BoundedLoop,
        BoundedProtocol,
        allow_open_files,
    )
except ImportError as error:
    raise MissingDependencyError("the webhook", str(error.name), "pip install 'kserve-pvc[webhook]'") from None

if TYPE_CHECKING:
    from starlette.requests import Request

RELOAD_SECONDS = 5.0
# A body over the limit is read up to this size, so that the client gets a response instead of a reset connection.
_DRAIN_BYTES = 16 * 1024 * 1024
BODY_SECONDS = 10.0
_UVICORN_OPTIONS: dict[str, Any] = {
    "log_config": None,
    "access_log": False,
    "ws": "none",
    "server_header": False,
    "proxy_headers": False,
    "lifespan": "on",
    "http": BoundedProtocol,
    "limit_concurrency": MAX_CONNECTIONS + 1,
    "timeout_keep_alive": KEEP_ALIVE_SECONDS,
    "timeout_graceful_shutdown": 20,
}
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


def serve(
    *,
    policy_file: Path,
    certificate_file: Path,
    key_file: Path,
    host: str,
    port: int,
    reload_seconds: float = RELOAD_SECONDS,
) -> None:
    """
    Serve until a signal stops the process.

    Args:
        reload_seconds: How often the files are checked for changes.

    Raises:
        SettingsError: A file or the address cannot be used.
        PolicyError: The policy names a directory outside of a claim.
    """
    if not 0 < reload_seconds < float("inf"):
        raise SettingsError("--reload-seconds", str(reload_seconds), "expected a number of seconds above 0")
    webhook = Webhook(policy=read_policy_file(policy_file))
    context = tls_context(certificate_file, key_file)
    files = (
        Watched("policy", (policy_file,), lambda: webhook.use(read_policy_file(policy_file))),
        Watched("certificate", (certificate_file, key_file), lambda: _load(context, certificate_file, key_file)),
    )
    config = uvicorn.Config(
        webhook.application(files, reload_seconds=reload_seconds),
        ssl_certfile=str(certificate_file),
        ssl_keyfile=str(key_file),
        **_UVICORN_OPTIONS,
    )
    config.load()
    config.ssl = context
    allow_open_files()
    with _listen(host, port) as listener:
        _say(f"listening on https://{_shown(listener)}")
        with asyncio.Runner(loop_factory=BoundedLoop) as runner:
            runner.run(uvicorn.Server(config).serve(sockets=[listener]))


class Webhook:
    """
    The ASGI application, with the policy in use and the metrics.

    Args:
        body_seconds: The timeout for reading the body of a request.
    """

    def __init__(self, *, policy: Policy, body_seconds: float = BODY_SECONDS) -> None:
        self._policy = policy
        self._body_seconds = body_seconds
        self._metrics = CollectorRegistry()
        self._decisions = Counter(
            "kserve_pvc_admission_decisions", "Admission decisions, by outcome.", ["decision"], registry=self._metrics
        )
        self._refused = Counter(
            "kserve_pvc_admission_bad_requests",
            "Requests that were not a valid AdmissionReview, by HTTP status.",
            ["status"],
            registry=self._metrics,
        )
        self._seconds = Histogram(
            "kserve_pvc_admission_seconds",
            "Seconds from the complete request to the response.",
            registry=self._metrics,
            buckets=_BUCKETS,
        )
        self._reloads = Counter(
            "kserve_pvc_webhook_reloads",
            "Reloads of the policy and the certificate, by result.",
            ["file", "result"],
            registry=self._metrics,
        )
        for outcome in ("mutated", "unchanged", "ignored", "denied", "error"):
            self._decisions.labels(outcome)

    def use(self, policy: Policy) -> None:
        """
        Replace the policy.
        """
        self._policy = policy

    def application(self, files: Sequence[Watched], *, reload_seconds: float) -> Starlette:
        """
        Return the ASGI application, which reloads files while it runs.
        """

        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            task = asyncio.create_task(self._watch(files, reload_seconds))
            yield
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

        routes = [
            Route("/mutate-pods", self._mutate, methods=["POST"]),
            Route("/readyz", _healthy, methods=["GET"]),
            Route("/livez", _healthy, methods=["GET"]),
            Route("/metrics", self._show_metrics, methods=["GET"]),
        ]
        return Starlette(routes=routes, lifespan=lifespan)

    async def _mutate(self, request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return self._refuse(415, "expected `Content-Type: application/json`")
        try:
            async with asyncio.timeout(self._body_seconds):
                body = await _body(request)
        except ClientDisconnect:
            return self._refuse(400, "unexpected end of the body")
        except TimeoutError:
            return self._refuse(408, f"the body did not arrive within {self._body_seconds:g} s")
        if body is None:
            return self._refuse(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
        with self._seconds.time():
            return self._respond(body)

    def _respond(self, body: bytes) -> Response:
        began = time.perf_counter()
        try:
            decision = decide(read_review(body), self._policy)
        except BadReviewError as error:
            return self._refuse(400, str(error))
        except Exception as error:
            # The message of an unexpected error may contain parts of the pod.
            self._audit("error", {"decision": "error", "reason": type(error).__name__}, began)
            return PlainTextResponse("the webhook failed; see its log\n", 500)
        self._audit(decision.outcome, decision.audit, began)
        return JSONResponse(decision.response)

    def _audit(self, outcome: str, audit: dict[str, Any], began: float) -> None:
        self._decisions.labels(outcome).inc()
        when = datetime.now(UTC).isoformat(timespec="milliseconds")
        print(json.dumps({"time": when, **audit, "seconds": round(time.perf_counter() - began, 6)}), flush=True)

    def _refuse(self, status: int, reason: str) -> Response:
        self._refused.labels(str(status)).inc()
        return PlainTextResponse(f"{reason}\n", status)

    async def _show_metrics(self, _: Request) -> Response:
        return Response(generate_latest(self._metrics), media_type=CONTENT_TYPE_LATEST)

    async def _watch(self, files: Sequence[Watched], seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds)
            for file in files:
                result = file.reload()
                if result is not None:
                    self._reloads.labels(file.name, result).inc()


class Watched:
    """
    Files that are reloaded when their content has changed.
    """

    def __init__(self, name: str, paths: Sequence[Path], load: Callable[[], None]) -> None:
        self.name = name
        self._paths = paths
        self._load = load
        self._seen = self._digest()

    def reload(self) -> str | None:
        """
        Reload the files if they have changed. A failed reload is retried at the next change.

        Returns:
            `reloaded`, `failed`, or None if nothing has changed.
        """
        digest = self._digest()
        if digest == self._seen:
            return None
        self._seen = digest
        try:
            self._load()
        except (StoreError, OSError) as error:
            _say(f"cannot reload the {self.name}, the previous one stays in use: {error}")
            return "failed"
        _say(f"reloaded the {self.name}")
        return "reloaded"

    def _digest(self) -> bytes:
        # By content, not by time: a Secret is updated by a symbolic link, whose target may have the old time.
        digest = hashlib.sha256()
        for path in self._paths:
            with suppress(OSError):
                digest.update(path.read_bytes())
            digest.update(b"\0")
        return digest.digest()


def read_policy_file(path: Path) -> Policy:
    """
    Read a policy from YAML or JSON.

    Raises:
        SettingsError: The file cannot be read, or a field is invalid.
        PolicyError: A directory is outside of its claim.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise SettingsError("--policy", str(path), f"it cannot be read: {error.strerror}") from error
    documents = read_documents(text, str(path))
    if len(documents) != 1:
        raise SettingsError("--policy", str(path), "expected exactly one YAML document")
    return read_policy(documents[0])


def tls_context(certificate_file: Path, key_file: Path) -> ssl.SSLContext:
    """
    Return the TLS configuration of the server, which requires TLS 1.2.

    Raises:
        SettingsError: Certificate or key cannot be read, or do not match.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(certificate_file, key_file, password=_refuse_password)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
        raise SettingsError(
            "--tls-cert and --tls-key", f"{certificate_file} and {key_file}", f"cannot load them: {reason}"
        ) from None
    return context


def _load(context: ssl.SSLContext, certificate_file: Path, key_file: Path) -> None:
    """Use a new certificate for new connections; existing ones continue."""
    # First into a context of its own: a pair that does not match would break the one in use.
    tls_context(certificate_file, key_file)
    context.load_cert_chain(certificate_file, key_file, password=_refuse_password)


def _refuse_password() -> NoReturn:
    raise ValueError("the key is encrypted")


async def _body(request: Request) -> bytes | None:
    """Return the body, or None if it is too large."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > _DRAIN_BYTES:
        return None
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > _DRAIN_BYTES:
            return None
        if size <= MAX_BODY_BYTES:
            chunks.append(chunk)
    return None if size > MAX_BODY_BYTES else b"".join(chunks)


async def _healthy(_: Request) -> Response:
    return PlainTextResponse("ok\n")


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=1024, dualstack_ipv6=host == "::")
    except (OSError, OverflowError) as error:
        raise SettingsError("--host and --port", f"{host} and {port}", f"cannot listen there: {error}") from None
    # Accepted connections inherit it. asyncio does not set it for this listener, whose protocol number is 0, and the
    # body of a response would wait 40 ms for the acknowledgement of its headers.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _shown(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _say(text: str) -> None:
    print(f"kserve-pvc: {text}", file=sys.stderr, flush=True)
