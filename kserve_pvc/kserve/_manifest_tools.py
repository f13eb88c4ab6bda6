"""
The names that KServe gives to things, and how a manifest is taken apart: plain dictionaries, of which nothing is
believed.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from kserve_pvc._settings import READONLY_ANNOTATION
from kserve_pvc.errors import SettingsError

Manifest = dict[str, Any]

# The volume that KServe downloads into, where it is mounted, and the volume of a `pvc://` source.
MODEL_VOLUME = "kserve-provision-location"
MODEL_MOUNT_PATH = "/mnt/models"
PVC_SOURCE_VOLUME = "kserve-pvc-source"

INITIALIZER = "storage-initializer"
SERVING = "kserve-container"
WORKER = "worker-container"
TRANSFORMER = "transformer-container"

AGENT = "internal.serving.kserve.io/agent"
SOURCE = "internal.serving.kserve.io/storage-initializer-sourceuri"
LOCAL_MODEL = "internal.serving.kserve.io/localmodel"
LOCAL_MODEL_SOURCE = "internal.serving.kserve.io/localmodel-sourceuri"
LOCAL_MODEL_CLAIM = "internal.serving.kserve.io/localmodel-pvc-name"

PVC_SCHEME = "pvc://"
OCI_SCHEMES = ("oci://", "oci+native://", "oci+fetch://")


def copied(manifest: object, kind: str) -> Manifest:
    """
    Copy a manifest of the kind that is meant, so that the caller's stays as it is.

    Raises:
        SettingsError: It is none, or of another kind.
    """
    if not isinstance(manifest, dict):
        raise SettingsError("manifest", type(manifest).__name__, f"give a {kind} as a mapping")
    if manifest.get("kind") != kind:
        raise SettingsError("kind", str(manifest.get("kind", "")), f"give a {kind}")
    return deepcopy(manifest)


def mapping(parent: Manifest, name: str, place: str) -> Manifest:
    """
    The mapping under a name, made if it is not there.

    Raises:
        SettingsError: Something else is there.
    """
    if parent.get(name) is None:
        parent[name] = {}
    found = parent[name]
    if not isinstance(found, dict):
        raise SettingsError(f"{place}.{name}".lstrip("."), type(found).__name__, "it must be a mapping")
    return found


def looked_up(parent: Manifest, name: str, place: str) -> Manifest:
    """
    The mapping under a name, or an empty one that belongs to nothing.
    """
    return {} if parent.get(name) is None else mapping(parent, name, place)


def entries(parent: Manifest, name: str, place: str) -> list[Manifest]:
    """
    The mappings in the list under a name; none if there is no list.

    Raises:
        SettingsError: It is no list of mappings.
    """
    found = parent.get(name)
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise SettingsError(f"{place}.{name}", type(found).__name__, "it must be a list of mappings")
    return found


def append(parent: Manifest, name: str, entry: Manifest, place: str) -> None:
    if entries(parent, name, place):
        parent[name].append(entry)
    else:
        parent[name] = [entry]


def named(found: list[Manifest], name: str) -> Manifest | None:
    return next((entry for entry in found if entry.get("name") == name), None)


def texts(parent: Manifest, name: str) -> dict[str, str]:
    """
    Labels or annotations, whose values are texts.

    Raises:
        SettingsError: One is not, such as a bare `false` that should stand in quotes.
    """
    found = looked_up(parent, name, "metadata")
    for key, value in found.items():
        if not isinstance(value, str):
            raise SettingsError(f"metadata.{name}[{key}]", str(value), "it must be a text: put the value in quotes")
    return found


def asks_to_write(annotations: dict[str, str]) -> bool:
    """
    Whether KServe would mount read-write: for exactly `"false"`.
    """
    return annotations.get(READONLY_ANNOTATION) == "false"


def containers(spec: Manifest, place: str = "spec") -> Iterator[tuple[str, Manifest]]:
    """
    Every container of a pod, with the list that it stands in.
    """
    for kind in ("initContainers", "containers", "ephemeralContainers"):
        for container in entries(spec, kind, place):
            yield kind, container


def mount(sub_path: str, *, read_only: bool) -> Manifest:
    """
    A mount of the model's volume as KServe writes it, which leaves out what is empty.
    """
    found: Manifest = {"name": MODEL_VOLUME, "mountPath": MODEL_MOUNT_PATH}
    if sub_path:
        found["subPath"] = sub_path
    if read_only:
        found["readOnly"] = True
    return found
