"""
A lock in the Kubernetes API: a Lease of `coordination.k8s.io`, renewed as client-go renews it.

The rules are those of the package `leaderelection` of client-go. A Lease is free if it has not changed for its
duration by the observer's monotonic clock; clocks of other nodes do not count. A write with an outdated
`resourceVersion` fails. As in client-go, a holder that was paused is not stopped from continuing; the records on the
volume keep that safe.
"""

from __future__ import annotations

import math
import os
import threading
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from time import monotonic
from typing import Any

from kserve_pvc._threads import start_thread
from kserve_pvc.errors import LockServiceError, MissingDependencyError, SettingsError
from kserve_pvc.locks import NoLockError
from kserve_pvc.locks.lease import HEARTBEATS_PER_LEASE, RENEW_DEADLINE

_TIMEOUTS = (2.0, 5.0)  # To connect, and to read the response.
_CONFLICT = 409
_NOT_FOUND = 404
# Refusals that a retry does not change. Other errors, such as 429 and 500, are transient.
_REFUSALS = {400, 401, 403, 404, 405, 422}


class LeaseGrab:
    """
    Tries to acquire one Lease, and renews it while it is held.
    """

    def __init__(
        self, *, namespace: str, name: str, lease_seconds: float, holder: str, environ: Mapping[str, str] | None = None
    ) -> None:
        self._namespace = namespace
        self._name = name
        self._lease_seconds = lease_seconds
        self._identity = f"{holder}_{uuid.uuid4()}"
        self._seen: tuple[str, float] | None = None
        self._api, self._errors = _client(os.environ if environ is None else environ)

    def __call__(self) -> Callable[[], None] | None:
        if self._request(self._acquire) is None:
            return None
        renewal = _Renewal(lambda: self._request(self._renew), lease_seconds=self._lease_seconds)

        def release() -> None:
            renewal.stop()
            self._request(self._release)

        return release

    def _acquire(self) -> Any:
        lease = self._read()
        if lease is None:
            return self._write(None, transitions=0)
        if not self._is_free(lease):
            return None
        return self._write(lease, transitions=(lease.spec.lease_transitions or 0) + 1)

    def _is_free(self, lease: Any) -> bool:
        if not (lease.spec and lease.spec.holder_identity):
            return True
        version = lease.metadata.resource_version
        if self._seen is None or self._seen[0] != version:
            self._seen = version, monotonic()
        return monotonic() - self._seen[1] >= self._lease_seconds

    def _renew(self) -> Any:
        """Renew the Lease. None if this process no longer holds it."""
        lease = self._read()
        if lease is None or lease.spec.holder_identity != self._identity:
            return None
        return self._write(lease, transitions=lease.spec.lease_transitions or 0)

    def _release(self) -> None:
        lease = self._read()
        if lease is not None and lease.spec.holder_identity == self._identity:
            self._write(lease, transitions=lease.spec.lease_transitions or 0, identity="")

    def _read(self) -> Any:
        """Read the Lease, or None if it does not exist."""
        try:
            return self._api.read_namespaced_lease(self._name, self._namespace, _request_timeout=_TIMEOUTS)
        except self._errors.ApiException as error:
            if error.status == _NOT_FOUND:
                return None
            raise

    def _write(self, lease: Any, *, transitions: int, identity: str | None = None) -> Any:
        """Write the Lease and return it, or None if another process wrote first."""
        now = _timestamp(datetime.now(UTC))
        holder = self._identity if identity is None else identity
        was_held = lease is not None and lease.spec and lease.spec.holder_identity == self._identity
        spec = {
            "holderIdentity": holder,
            # In whole seconds, as a Lease requires. For other tools: this class uses the setting of the store.
            "leaseDurationSeconds": math.ceil(self._lease_seconds) if holder else 1,
            "acquireTime": _timestamp(lease.spec.acquire_time) if was_held and lease.spec.acquire_time else now,
            "renewTime": now,
            "leaseTransitions": transitions,
        }
        body: dict[str, Any] = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": self._name},
            "spec": spec,
        }
        try:
            if lease is None:
                return self._api.create_namespaced_lease(self._namespace, body, _request_timeout=_TIMEOUTS)
            body["metadata"]["resourceVersion"] = lease.metadata.resource_version
            return self._api.replace_namespaced_lease(self._name, self._namespace, body, _request_timeout=_TIMEOUTS)
        except self._errors.ApiException as error:
            if error.status == _CONFLICT:
                return None
            raise

    def _request(self, request: Callable[[], Any]) -> Any:
        try:
            return request()
        except self._errors.ApiException as error:
            if error.status in _REFUSALS:
                raise LockServiceError(
                    f"kubernetes://{self._namespace}",
                    f"HTTP {error.status} {error.reason}",
                    "allow the service account to get, create and update `leases.coordination.k8s.io` in namespace "
                    f"`{self._namespace}`",
                ) from error
            raise NoLockError(f"HTTP {error.status}") from error
        except LockServiceError:
            raise
        except Exception as error:  # From urllib3, or from the client for a malformed response.
            raise NoLockError(type(error).__name__) from error


class _Renewal:
    """
    A thread that renews a Lease until it is stopped, another process holds the Lease, or the deadline has passed.
    """

    def __init__(self, renew: Callable[[], Any], *, lease_seconds: float) -> None:
        self._renew = renew
        self._lease_seconds = lease_seconds
        self._stop = threading.Event()
        self._thread = start_thread(self._run, "kserve-pvc-lease")

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(sum(_TIMEOUTS))

    def _run(self) -> None:
        renewed = monotonic()
        while not self._stop.wait(self._lease_seconds / HEARTBEATS_PER_LEASE):
            if monotonic() - renewed > self._lease_seconds * RENEW_DEADLINE:
                return
            began = monotonic()
            with suppress(NoLockError, LockServiceError):
                if self._renew() is None:
                    return
                renewed = began


def _client(environ: Mapping[str, str]) -> tuple[Any, Any]:
    try:
        from kubernetes import client, config
    except ImportError as error:
        raise MissingDependencyError(
            "the locker `kubernetes`", str(error.name), "pip install 'kserve-pvc[kubernetes]'"
        ) from error
    load: Any = config  # The package has no types.
    configuration = client.Configuration()
    try:
        if environ.get("KUBERNETES_SERVICE_HOST") and not environ.get("KUBECONFIG"):
            load.load_incluster_config(client_configuration=configuration)
        else:
            load.load_kube_config(config_file=environ.get("KUBECONFIG"), client_configuration=configuration)
    except (load.ConfigException, OSError) as error:
        hint = "cannot locate the API server; run in a pod with a service account, or set KUBECONFIG"
        raise SettingsError("locker", "kubernetes", hint) from error
    # The caller retries.
    configuration.retries = 0
    return client.CoordinationV1Api(client.ApiClient(configuration)), client.exceptions


def _timestamp(value: Any) -> str:
    return value if isinstance(value, str) else str(value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"))
