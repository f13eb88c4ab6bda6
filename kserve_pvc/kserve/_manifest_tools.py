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
# The server in the pods of an LLMInferenceService.
LLM_SERVING = "main"

API_GROUP = "serving.kserve.io/"

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


def copy_manifest(manifest: object, *kinds: str) -> Manifest:
    """
    Check that a manifest is of one of several kinds, and copy it.

    Raises:
        SettingsError: It is not a manifest, or is of another kind.
    """
    if not isinstance(manifest, dict):
        raise SettingsError("manifest", type(manifest).__name__, f"expected a {' or '.join(kinds)} as a mapping")
    if manifest.get("kind") not in kinds:
        raise SettingsError("kind", str(manifest.get("kind", "")), f"expected a {' or '.join(kinds)}")
    return deepcopy(manifest)


def check_group(manifest: Manifest, expected: str) -> None:
    """
    Check that a manifest is of KServe's API group.

    Raises:
        SettingsError: It is not.
    """
    if not str(manifest.get("apiVersion", "")).startswith(API_GROUP):
        raise SettingsError("apiVersion", str(manifest.get("apiVersion", "")), f"expected an {expected}")


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


def add_claim(pod: Manifest, claim: str, place: str) -> None:
    """
    Add the volume that KServe downloads into, backed by a claim.

    Raises:
        SettingsError: There is another volume of its name.
    """
    present = find_by_name(entries(pod, "volumes", place), MODEL_VOLUME)
    volume = {"name": MODEL_VOLUME, "persistentVolumeClaim": {"claimName": claim}}
    if present is None:
        append(pod, "volumes", volume, place)
        return
    found = mapping_or_empty(present, "persistentVolumeClaim", f"{place}.volumes[]").get("claimName")
    if found != claim:
        value = f"claim {found}" if found else "no claim"
        hint = f"remove this volume, or share its claim instead of `{claim}`"
        raise SettingsError(f"{place}.volumes[{MODEL_VOLUME}]", value, hint)


def add_mount(container: Manifest, place: str, sub_path: str, *, read_only: bool) -> None:
    """
    Add a mount of that volume to a container that has none.

    Raises:
        SettingsError: It has one of another directory.
    """
    present = find_by_name(entries(container, "volumeMounts", place), MODEL_VOLUME)
    if present is None:
        append(container, "volumeMounts", make_mount(sub_path, read_only=read_only), place)
        return
    if sub_path and present.get("subPath") != sub_path:
        found = str(present.get("subPath") or "the whole claim")
        raise SettingsError(
            f"{place}.volumeMounts[{MODEL_VOLUME}].subPath",
            found,
            f"remove this mount, or share its directory instead of `{sub_path}`",
        )


def set_read_only(container: Manifest, place: str, read_only: bool) -> None:
    """
    Change the mounts that a service itself has of that volume, to which KServe does not apply the annotation.
    """
    for mount in entries(container, "volumeMounts", place):
        if mount.get("name") == MODEL_VOLUME and (mount.get("readOnly") is True) is not read_only:
            mount["readOnly"] = read_only


def mount_obstacle(container: Manifest, place: str) -> str | None:
    """
    Return why a mount of the claim would make a pod invalid, in which a path can be mounted only once; or None.
    """
    for mount in entries(container, "volumeMounts", place):
        if mount.get("name") != MODEL_VOLUME and is_model_path(mount.get("mountPath")):
            return f"it mounts its own volume `{mount.get('name')}` at `{MODEL_MOUNT_PATH}`"
    return None
