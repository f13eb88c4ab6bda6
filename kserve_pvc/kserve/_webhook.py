"""
The server around the decision: TLS, limits, probes, metrics and the audit line.

It holds no state but the policy and the certificate, both of which are read again when their files change. What cannot
be read then is said on standard error and counted, and what was read before stays in force.
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
except ImportError as error:
    raise MissingDependencyError("the webhook", str(error.name), "pip install 'kserve-pvc[webhook]'") from None

if TYPE_CHECKING:
    from starlette.requests import Request

RELOAD_SECONDS = 5.0
# Who sends too much is listened to for that much longer, so that it hears the answer instead of a reset connection.
_DRAIN_BYTES = 16 * 1024 * 1024
_BODY_SECONDS = 10.0
# The API server keeps a connection for longer than uvicorn would by itself, and would find it closed.
_KEEP_ALIVE_SECONDS = 120
_MAX_CONNECTIONS = 512
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
    Answer until a signal ends it.

    Args:
        reload_seconds: How often the files are looked at for changes.

    Raises:
        SettingsError: A file cannot be used, or the address.
        PolicyError: The policy names a directory outside of a claim.
    """
    if not 0 < reload_seconds < float("inf"):
        raise SettingsError("--reload-seconds", str(reload_seconds), "write a number of seconds above 0")
    webhook = Webhook(policy=read_policy_file(policy_file))
    context = tls_context(certificate_file, key_file)
    files = (
        Watched("policy", (policy_file,), lambda: webhook.take(read_policy_file(policy_file))),
        Watched("certificate", (certificate_file, key_file), lambda: _load(context, certificate_file, key_file)),
    )
    config = uvicorn.Config(
        webhook.application(files, reload_seconds=reload_seconds),
        ssl_certfile=str(certificate_file),
        ssl_keyfile=str(key_file),
        log_config=None,
        access_log=False,
        ws="none",
        server_header=False,
        proxy_headers=False,
        lifespan="on",
        limit_concurrency=_MAX_CONNECTIONS,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=20,
    )
    config.load()
    config.ssl = context
    with _listen(host, port) as listener:
        _say(f"listening on https://{_shown(listener)}")
        uvicorn.Server(config).run(sockets=[listener])


class Webhook:
    """
    The policy that is in force, and what was counted.
    """

    def __init__(self, *, policy: Policy) -> None:
        self._policy = policy
        self._metrics = CollectorRegistry()
        self._decisions = Counter(
            "kserve_pvc_admission_decisions", "Pods that were decided about.", ["decision"], registry=self._metrics
        )
        self._refused = Counter(
            "kserve_pvc_admission_bad_requests",
            "Requests that were no AdmissionReview.",
            ["status"],
            registry=self._metrics,
        )
        self._seconds = Histogram(
            "kserve_pvc_admission_seconds",
            "From the whole body to the answer.",
            registry=self._metrics,
            buckets=_BUCKETS,
        )
        self._reloads = Counter(
            "kserve_pvc_webhook_reloads", "Files read again.", ["file", "result"], registry=self._metrics
        )
        for outcome in ("mutated", "unchanged", "ignored", "denied", "error"):
            self._decisions.labels(outcome)

    def take(self, policy: Policy) -> None:
        """
        Decide by this policy from now on.
        """
        self._policy = policy

    def application(self, files: Sequence[Watched], *, reload_seconds: float) -> Starlette:
        """
        The ASGI application, which reads files again for as long as it runs.
        """

        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            watching = asyncio.create_task(self._watch(files, reload_seconds))
            yield
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching

        routes = [
            Route("/mutate-pods", self._mutate, methods=["POST"]),
            Route("/readyz", _well, methods=["GET"]),
            Route("/livez", _well, methods=["GET"]),
            Route("/metrics", self._show_metrics, methods=["GET"]),
        ]
        return Starlette(routes=routes, lifespan=lifespan)

    async def _mutate(self, request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return self._refuse(415, "send `Content-Type: application/json`")
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                body = await _body(request)
        except ClientDisconnect:
            return self._refuse(400, "the body ended early")
        except TimeoutError:
            return self._refuse(408, f"the body did not come within {_BODY_SECONDS:.0f} s")
        if body is None:
            return self._refuse(413, f"a body may have {MAX_BODY_BYTES} bytes")
        with self._seconds.time():
            return self._answer(body)

    def _answer(self, body: bytes) -> Response:
        began = time.perf_counter()
        try:
            decision = decide(read_review(body), self._policy)
        except BadReviewError as error:
            return self._refuse(400, str(error))
        except Exception as error:
            # The text of an error that nobody foresaw may hold parts of the pod.
            self._note("error", {"decision": "error", "reason": type(error).__name__}, began)
            return PlainTextResponse("the webhook failed; see its log\n", 500)
        self._note(decision.outcome, decision.audit, began)
        return JSONResponse(decision.response)

    def _note(self, outcome: str, audit: dict[str, Any], began: float) -> None:
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
                result = file.look()
                if result is not None:
                    self._reloads.labels(file.name, result).inc()


class Watched:
    """
    Files that are taken over again when what they hold has changed.
    """

    def __init__(self, name: str, paths: Sequence[Path], take: Callable[[], None]) -> None:
        self.name = name
        self._paths = paths
        self._take = take
        self._seen = self._digest()

    def look(self) -> str | None:
        """
        Take a change over: `taken`, `failed`, or None if there is none. What failed is tried again when it changes
            again.
        """
        digest = self._digest()
        if digest == self._seen:
            return None
        self._seen = digest
        try:
            self._take()
        except (StoreError, OSError) as error:
            _say(f"the {self.name} was not read again, the old one stays in force: {error}")
            return "failed"
        _say(f"the {self.name} was read again")
        return "taken"

    def _digest(self) -> bytes:
        # Contents and not times: a Secret is swapped by a link, and its file may be as old as the one before.
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
        SettingsError: The file cannot be read, or a field means nothing.
        PolicyError: A directory lies outside of its claim.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise SettingsError("--policy", str(path), f"it cannot be read: {error.strerror}") from error
    documents = read_documents(text, str(path))
    if len(documents) != 1:
        raise SettingsError("--policy", str(path), "write one document")
    return read_policy(documents[0])


def tls_context(certificate_file: Path, key_file: Path) -> ssl.SSLContext:
    """
    What the server shows to clients that speak TLS 1.2 or newer.

    Raises:
        SettingsError: Certificate and key cannot be read, or do not belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(certificate_file, key_file, password=_refuse_password)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
        raise SettingsError(
            "--tls-cert and --tls-key", f"{certificate_file} and {key_file}", f"they cannot be used: {reason}"
        ) from None
    return context


def _load(context: ssl.SSLContext, certificate_file: Path, key_file: Path) -> None:
    """Show a new certificate to whoever connects from now on; connections that are there go on."""
    # First into a context that nobody uses: a pair that is only half written would spoil the one that is in use.
    tls_context(certificate_file, key_file)
    context.load_cert_chain(certificate_file, key_file, password=_refuse_password)


def _refuse_password() -> NoReturn:
    raise ValueError("the key is encrypted")


async def _body(request: Request) -> bytes | None:
    """The body, or None if it is too large."""
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


async def _well(_: Request) -> Response:
    return PlainTextResponse("ok\n")


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=1024, dualstack_ipv6=host == "::")
    except (OSError, OverflowError) as error:
        raise SettingsError("--host and --port", f"{host} and {port}", f"nobody can listen there: {error}") from None
    # Every accepted connection has it from here: asyncio sets it only where the protocol number is not 0, which it is
    # here, and the body of an answer would wait 40 ms for the acknowledgement of its headers.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _shown(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _say(text: str) -> None:
    print(f"kserve-pvc: {text}", file=sys.stderr, flush=True)
