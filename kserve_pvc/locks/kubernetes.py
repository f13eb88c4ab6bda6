"""
A lock that the Kubernetes API server keeps: a Lease of `coordination.k8s.io`, renewed as client-go renews it.

Source of the rules: the package `leaderelection` of client-go. A Lease that did not change for its duration, on the
observer's own monotonic clock, is free; no clock of another node counts. Whoever writes with an old `resourceVersion`
has lost. As there, nothing stops a holder that stood still from going on; that is what records are for.
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

from kserve_pvc.errors import LockServiceError, MissingDependencyError, SettingsError
from kserve_pvc.locks import NoLockError
from kserve_pvc.locks.lease import BEATS_PER_LEASE, RENEW_DEADLINE

_TIMEOUTS = (2.0, 5.0)  # To connect, and to be answered.
_CONFLICT = 409
_NOT_FOUND = 404
# The server refuses, and will do so again. What else it may say, 429 or 500, passes.
_REFUSALS = {400, 401, 403, 404, 405, 422}


class LeaseGrab:
    """
    Tries to get one Lease, and renews it for as long as it is held.
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
        held = self._ask(self._take)
        if held is None:
            return None
        renewing = _Renewing(lambda: self._ask(self._renew), lease_seconds=self._lease_seconds)

        def give_back() -> None:
            renewing.stop()
            self._ask(self._leave)

        return give_back

    def _take(self) -> Any:
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
        """None if it is no longer this process's."""
        lease = self._read()
        if lease is None or lease.spec.holder_identity != self._identity:
            return None
        return self._write(lease, transitions=lease.spec.lease_transitions or 0)

    def _leave(self) -> None:
        lease = self._read()
        if lease is not None and lease.spec.holder_identity == self._identity:
            self._write(lease, transitions=lease.spec.lease_transitions or 0, identity="")

    def _read(self) -> Any:
        """The Lease, or None if there is none."""
        try:
            return self._api.read_namespaced_lease(self._name, self._namespace, _request_timeout=_TIMEOUTS)
        except self._errors.ApiException as error:
            if error.status == _NOT_FOUND:
                return None
            raise

    def _write(self, lease: Any, *, transitions: int, identity: str | None = None) -> Any:
        """The Lease as it was written, or None if somebody else wrote first."""
        moment = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        mine = self._identity if identity is None else identity
        was_mine = lease is not None and lease.spec and lease.spec.holder_identity == self._identity
        spec = {
            "holderIdentity": mine,
            # Whole seconds are what a Lease can say. Other tools read this, we go by the store's own.
            "leaseDurationSeconds": math.ceil(self._lease_seconds) if mine else 1,
            "acquireTime": _moment(lease.spec.acquire_time) if was_mine and lease.spec.acquire_time else moment,
            "renewTime": moment,
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

    def _ask(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except self._errors.ApiException as error:
            if error.status in _REFUSALS:
                raise LockServiceError(
                    f"kubernetes://{self._namespace}",
                    f"the API server answers {error.status} {error.reason}",
                    f"let the service account get, create and update `leases.coordination.k8s.io` in namespace `{self._namespace}`",
                ) from error
            raise NoLockError(f"HTTP {error.status}") from error
        except LockServiceError:
            raise
        except Exception as error:  # urllib3's errors, and whatever the client makes of an answer that is no Lease.
            raise NoLockError(type(error).__name__) from error


class _Renewing:
    """
    A thread that renews until it is stopped, the Lease belongs to somebody else, or the deadline has passed.
    """

    def __init__(self, renew: Callable[[], Any], *, lease_seconds: float) -> None:
        self._renew = renew
        self._lease_seconds = lease_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kserve-pvc-lease", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(sum(_TIMEOUTS))

    def _run(self) -> None:
        renewed = monotonic()
        while not self._stop.wait(self._lease_seconds / BEATS_PER_LEASE):
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
    load: Any = config  # It has no types.
    configuration = client.Configuration()
    try:
        if environ.get("KUBERNETES_SERVICE_HOST") and not environ.get("KUBECONFIG"):
            load.load_incluster_config(client_configuration=configuration)
        else:
            load.load_kube_config(config_file=environ.get("KUBECONFIG"), client_configuration=configuration)
    except (load.ConfigException, OSError) as error:
        hint = "cannot locate the API server; run in a pod with a service account, or set KUBECONFIG"
        raise SettingsError("locker", "kubernetes", hint) from error
    # A try is made again soon by whoever waits.
    configuration.retries = 0
    return client.CoordinationV1Api(client.ApiClient(configuration)), client.exceptions


def _moment(value: Any) -> str:
    return value if isinstance(value, str) else str(value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"))
