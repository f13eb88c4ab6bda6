"""
The names that KServe uses, and functions to read and change untrusted manifests as plain dictionaries.
"""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from kserve_pvc._settings import READONLY_ANNOTATION
from kserve_pvc.errors import SettingsError

Manifest = dict[str, Any]

# The volume that KServe downloads into, its mount path, and the volume of a `pvc://` source.
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

# Set for a service whose model the initializer decrypts, and the variable that KServe derives from it.
CONFIDENTIAL = "internal.serving.kserve.io/confidential-enabled"
CONFIDENTIAL_VARIABLE = "CONFIDENTIAL_ENABLED"

PVC_SCHEME = "pvc://"
OCI_SCHEMES = ("oci://", "oci+native://", "oci+fetch://")


def storage_key(uri: str) -> str:
    """
    Return KServe's name for the directory of a source, which follows from the URI exactly as it is written.
    """
    return hashlib.sha256(uri.encode()).hexdigest()[:16]


def copy_manifest(manifest: object, kind: str) -> Manifest:
    """
    Check the kind of a manifest and copy it.

    Raises:
        SettingsError: It is not a manifest, or is of another kind.
    """
    if not isinstance(manifest, dict):
        raise SettingsError("manifest", type(manifest).__name__, f"expected a {kind} as a mapping")
    if manifest.get("kind") != kind:
        raise SettingsError("kind", str(manifest.get("kind", "")), f"expected a {kind}")
    return deepcopy(manifest)


def mapping(parent: Manifest, name: str, place: str) -> Manifest:
    """
    Return the mapping under a name, and create it if it is missing.

    Raises:
        SettingsError: The value is not a mapping.
    """
    if parent.get(name) is None:
        parent[name] = {}
    found = parent[name]
    if not isinstance(found, dict):
        raise SettingsError(f"{place}.{name}".lstrip("."), type(found).__name__, "expected a mapping")
    return found


def mapping_or_empty(parent: Manifest, name: str, place: str) -> Manifest:
    """
    Return the mapping under a name, or an empty one, without changing the parent.
    """
    return {} if parent.get(name) is None else mapping(parent, name, place)


def entries(parent: Manifest, name: str, place: str) -> list[Manifest]:
    """
    Return the list of mappings under a name, which is empty if it is missing.

    Raises:
        SettingsError: The value is not a list of mappings.
    """
    found = parent.get(name)
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise SettingsError(f"{place}.{name}", type(found).__name__, "expected a list of mappings")
    return found


def append(parent: Manifest, name: str, entry: Manifest, place: str) -> None:
    if entries(parent, name, place):
        parent[name].append(entry)
    else:
        parent[name] = [entry]


def find_by_name(found: list[Manifest], name: str) -> Manifest | None:
    return next((entry for entry in found if entry.get("name") == name), None)


def strings(parent: Manifest, name: str, place: str = "metadata") -> dict[str, str]:
    """
    Return labels or annotations.

    Raises:
        SettingsError: A value is not a string, such as a `false` without quotes.
    """
    found = mapping_or_empty(parent, name, place)
    for key, value in found.items():
        if not isinstance(value, str):
            raise SettingsError(f"{place}.{name}[{key}]", str(value), "expected a string: put the value in quotes")
    return found


def requests_write(annotations: dict[str, str]) -> bool:
    """
    Whether KServe would mount read-write, which it does only for exactly `"false"`.
    """
    return annotations.get(READONLY_ANNOTATION) == "false"


def containers(spec: Manifest, place: str = "spec") -> Iterator[tuple[str, Manifest]]:
    """
    Yield every container of a pod, with the name of its list.
    """
    for kind in ("initContainers", "containers", "ephemeralContainers"):
        for container in entries(spec, kind, place):
            yield kind, container


def is_model_path(path: object) -> bool:
    """
    Whether a mount path is the one of the model.
    """
    return isinstance(path, str) and posixpath.normpath(path) == MODEL_MOUNT_PATH


def make_mount(sub_path: str, *, read_only: bool) -> Manifest:
    """
    Return a mount of the model's volume as KServe writes it, without empty fields.
    """
    found: Manifest = {"name": MODEL_VOLUME, "mountPath": MODEL_MOUNT_PATH}
    if sub_path:
        found["subPath"] = sub_path
    if read_only:
        found["readOnly"] = True
    return found
