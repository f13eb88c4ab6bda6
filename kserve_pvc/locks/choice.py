"""
Which locker a store uses, as set in `store.json`, by an argument or in the environment.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import attrs

from kserve_pvc._format.log_entry import StoreSettings
from kserve_pvc.errors import HIDDEN, SettingsError
from kserve_pvc.locks import LOCKERS, Grab
from kserve_pvc.locks.external import ExternalLock

_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_REDIS = re.compile(
    r"(rediss?)://(\[[0-9a-f:.]+\]|[a-z0-9][a-z0-9._-]*)(?::([0-9]{1,5}))?(?:/([0-9]{1,4})?)?", re.ASCII | re.IGNORECASE
)
_NAMESPACE = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)
# What a locker may be called by mistake.
_NAME = re.compile(
    r"[a-z][a-z_-]{0,23}|kubernetes://[a-z0-9./_-]{0,253}|rediss?://[a-z0-9.-]*(?::[0-9]{1,6})?/?", re.IGNORECASE
)


@attrs.frozen
class Locker:
    """
    A kind of locker, and the location of its service: the URL of Redis, or a namespace of Kubernetes.
    """

    kind: str
    location: str = ""

    def __str__(self) -> str:
        if self.kind == "kubernetes" and self.location:
            return f"kubernetes://{self.location}"
        return self.location or self.kind

    def matches(self, stored: Locker) -> bool:
        """
        Whether a requested locker is the stored one. `kubernetes` without a namespace matches every namespace.
        """
        return self.kind == stored.kind and self.location in ("", stored.location)


def parse_locker(text: str) -> Locker:
    """
    Parse `lease`, `flock`, `redis://HOST[:PORT][/DB]`, `rediss://…` (with TLS) or `kubernetes[://NAMESPACE]`.

    Raises:
        SettingsError: It is something else, or contains a user name or a password.
    """
    if text in ("lease", "flock", "kubernetes"):
        return Locker(text)
    scheme, separator, rest = text.partition("://")
    if scheme.lower() in ("redis", "rediss") and separator:
        if "@" in rest or "?" in rest:
            hint = (
                "set user and password by KSERVE_PVC_REDIS_USERNAME and KSERVE_PVC_REDIS_PASSWORD, "
                "since this setting is stored on the volume in plain text"
            )
            raise SettingsError("locker", f"{scheme}://…", hint)
        found = _REDIS.fullmatch(text)
        if found is not None and int(found[3] or 6379) < 65536:
            host, port, database = found[2].lower(), int(found[3] or 6379), int(found[4] or 0)
            return Locker("redis", f"{found[1].lower()}://{host}:{port}/{database}")
    if scheme == "kubernetes" and separator and _NAMESPACE.fullmatch(rest):
        return Locker("kubernetes", rest)
    # What follows a colon may be a password, however the rest is mistyped; a name may be shown.
    shown = text if _NAME.fullmatch(text) else HIDDEN
    raise SettingsError("locker", shown, f"supported: {', '.join(f'`{name}`' for name in LOCKERS)}")


def resolve_namespace(locker: Locker, environ: Mapping[str, str]) -> Locker:
    """
    Add the namespace of this pod to a Kubernetes locker that has none.

    Raises:
        SettingsError: This process does not run in a pod.
    """
    if locker.kind != "kubernetes" or locker.location:
        return locker
    namespace = environ.get("POD_NAMESPACE") or _own_namespace()
    if not _NAMESPACE.fullmatch(namespace):
        raise SettingsError(
            "locker", "kubernetes", "outside of a pod the namespace is required: `kubernetes://NAMESPACE`"
        )
    return Locker(locker.kind, namespace)


def check_confirmed(stored: str, requested: str | None) -> None:
    """
    Check that this process was configured to use the lock service of a store, or need not be.

    Any process that can write to the volume could put another address there, and collect the password; or a namespace,
    to which this process would show what its token may do. A file on the volume, and its own namespace, are no more
    than it uses anyway.

    Raises:
        SettingsError: The store names a Redis server or another namespace, and this process was not configured with it.
    """
    locker = parse_locker(stored)
    if requested is not None or locker.kind in ("lease", "flock") or _is_own_namespace(locker):
        return
    what = "Redis server" if locker.kind == "redis" else "namespace"
    hint = f"`store.json` names the {what} `{stored}`; confirm it by setting the variable, or `locker`, to that"
    raise SettingsError("KSERVE_PVC_LOCKER", "", hint)


def _is_own_namespace(locker: Locker) -> bool:
    try:
        return locker.kind == "kubernetes" and resolve_namespace(Locker("kubernetes", ""), os.environ) == locker
    except SettingsError:
        return False  # It is not known.


def external_lock(
    settings: StoreSettings, key: str, *, holder: str, open_file: Callable[[], int]
) -> ExternalLock | None:
    """
    Return the external lock of one model.

    Returns:
        None if the locker is `lease`, where the claims on the volume are the lock.

    Raises:
        SettingsError: A package of the locker is not installed, or the locker is not configured.
    """
    locker = resolve_namespace(parse_locker(settings.locker), os.environ)
    if locker.kind == "lease":
        return None
    grab: Grab
    if locker.kind == "flock":
        from kserve_pvc.locks.flock import grab_file

        grab = partial(grab_file, open_file)
    elif locker.kind == "redis":
        from kserve_pvc.locks.redis import RedisGrab

        grab = RedisGrab(locker.location, f"kserve-pvc:{settings.store_id}:{key}")
    else:
        from kserve_pvc.locks.kubernetes import LeaseGrab

        name = f"kserve-pvc-{settings.store_id[:16]}-{key.rpartition('-')[2]}"
        grab = LeaseGrab(namespace=locker.location, name=name, lease_seconds=settings.lease_seconds, holder=holder)
    return ExternalLock(grab)


def _own_namespace() -> str:
    try:
        return _NAMESPACE_FILE.read_text().strip()
    except OSError:
        return ""
