"""
Which locker a store uses, as `store.json`, an argument or the environment says it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import attrs

from kserve_pvc._format.log_entry import StoreSettings
from kserve_pvc.errors import SettingsError
from kserve_pvc.locks import LOCKERS, Grab
from kserve_pvc.locks.external import ExternalLock

_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_REDIS = re.compile(
    r"(rediss?)://(\[[0-9a-f:.]+\]|[a-z0-9][a-z0-9._-]*)(?::([0-9]{1,5}))?(?:/([0-9]{1,4})?)?", re.ASCII | re.IGNORECASE
)
_NAMESPACE = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)


@attrs.frozen
class Choice:
    """
    A kind of locker, and where its service is: the address of Redis, or a namespace of Kubernetes.
    """

    kind: str
    place: str = ""

    def __str__(self) -> str:
        return f"kubernetes://{self.place}" if self.kind == "kubernetes" and self.place else self.place or self.kind

    def agrees_with(self, stored: Choice) -> bool:
        """
        Whether what somebody says is what is stored. `kubernetes` alone leaves the namespace to the store.
        """
        return self.kind == stored.kind and self.place in ("", stored.place)


def parse_locker(text: str) -> Choice:
    """
    Understand `lease`, `flock`, `redis://HOST[:PORT][/DB]`, `rediss://…` (with TLS) or `kubernetes[://NAMESPACE]`.

    Raises:
        SettingsError: It is something else, or carries a user or a password.
    """
    if text in ("lease", "flock", "kubernetes"):
        return Choice(text)
    scheme, separator, rest = text.partition("://")
    if scheme.lower() in ("redis", "rediss") and separator:
        if "@" in rest or "?" in rest:
            variables = "KSERVE_PVC_REDIS_USERNAME and KSERVE_PVC_REDIS_PASSWORD"
            hint = f"pass user and password in {variables}, since every tenant of the volume can read this setting"
            raise SettingsError("locker", f"{scheme}://…", hint)
        found = _REDIS.fullmatch(text)
        if found is not None and int(found[3] or 6379) < 65536:
            return Choice(
                "redis", f"{found[1].lower()}://{found[2].lower()}:{int(found[3] or 6379)}/{int(found[4] or 0)}"
            )
    if scheme == "kubernetes" and separator and _NAMESPACE.fullmatch(rest):
        return Choice("kubernetes", rest)
    raise SettingsError("locker", text, f"choose one of {', '.join(LOCKERS)}")


def settled(choice: Choice, environ: Mapping[str, str]) -> Choice:
    """
    Say in which namespace the Leases of a new store are: that of this pod, if none is named.

    Raises:
        SettingsError: This is no pod.
    """
    if choice.kind != "kubernetes" or choice.place:
        return choice
    namespace = environ.get("POD_NAMESPACE") or _own_namespace()
    if not _NAMESPACE.fullmatch(namespace):
        raise SettingsError("locker", "kubernetes", "outside of a pod name the namespace too: `kubernetes://NAMESPACE`")
    return Choice(choice.kind, namespace)


def check_confirmed(stored: str, said: str | None) -> None:
    """
    Go only where this process itself was told to go: whoever can write to the volume could name any address.

    Raises:
        SettingsError: The store names a service, and the process did not.
    """
    if said is None and parse_locker(stored).kind == "redis":
        hint = (
            f"`store.json` names the Redis server `{stored}`; confirm it by setting the variable, or `locker`, to that"
        )
        raise SettingsError("KSERVE_PVC_LOCKER", "", hint)


def outside_lock(
    settings: StoreSettings, key: str, *, holder: str, open_file: Callable[[], int]
) -> ExternalLock | None:
    """
    The lock for one model beside its claims; None if the claims are the lock.

    Raises:
        SettingsError: What the locker needs is not installed or not configured.
    """
    choice = settled(parse_locker(settings.locker), os.environ)
    if choice.kind == "lease":
        return None
    grab: Grab
    if choice.kind == "flock":
        from kserve_pvc.locks.flock import grab_file

        grab = partial(grab_file, open_file)
    elif choice.kind == "redis":
        from kserve_pvc.locks.redis import RedisGrab

        grab = RedisGrab(choice.place, f"kserve-pvc:{settings.store_id}:{key}")
    else:
        from kserve_pvc.locks.kubernetes import LeaseGrab

        name = f"kserve-pvc-{settings.store_id[:16]}-{key.rpartition('-')[2]}"
        grab = LeaseGrab(namespace=choice.place, name=name, lease_seconds=settings.lease_seconds, holder=holder)
    return ExternalLock(grab)


def _own_namespace() -> str:
    try:
        return _NAMESPACE_FILE.read_text().strip()
    except OSError:
        return ""
