"""
What KServe's own pod webhook does to volumes, mounts and init containers, written down again as plain rules.

It is a model of the rules, not of the code: only what bears on storage, on dictionaries as they travel in JSON, where
empty fields are left out. A pod that KServe would refuse raises `RefusedByKServeError`.
"""

from __future__ import annotations

import json
import re
from copy import deepcopy
from hashlib import sha256
from typing import Any

INTERNAL = "internal.serving.kserve.io"
SOURCE = f"{INTERNAL}/storage-initializer-sourceuri"
AGENT = f"{INTERNAL}/agent"
LOCAL_MODEL = f"{INTERNAL}/localmodel"
VOLUME = "kserve-provision-location"
MODELS = "/mnt/models"


READONLY = "storage.kserve.io/readonly"


class RefusedByKServeError(Exception):
    """
    KServe's webhook answers with an error.
    """


def inject(pod: dict[str, Any], model_volume: dict[str, Any] | None = None) -> dict[str, Any]:
    """
    Apply the rules once, in a cluster whose `modelVolumeSource` is given, else an `emptyDir`.
    """
    model_volume = {"emptyDir": {}} if model_volume is None else model_volume
    pod = deepcopy(pod)
    annotations = pod["metadata"].get("annotations", {})
    source = _source(pod)
    names = [container["name"] for container in pod["spec"].get("initContainers", [])]
    if source is None or AGENT in annotations or source.startswith("oci") or "storage-initializer" in names:
        return pod
    targets = _targets(pod["spec"])
    read_only = annotations.get("storage.kserve.io/readonly") != "false"
    if source.startswith("pvc://"):
        claim, _, path = source.removeprefix("pvc://").partition("/")
        mount = _mount("kserve-pvc-source", path, read_only)
        _add(pod["spec"], targets, mount, {"persistentVolumeClaim": {"claimName": claim}})
        return pod
    initializer = {"name": "storage-initializer", "image": "kserve/storage-initializer", "args": [source, MODELS]}
    pod["spec"]["initContainers"] = [*pod["spec"].get("initContainers", []), initializer]
    _add(pod["spec"], targets, _mount(VOLUME, "", read_only), model_volume)
    _add(pod["spec"], [initializer], _mount(VOLUME, "", False), model_volume)
    return pod


def pod_of(service: dict[str, Any], runtime: dict[str, str]) -> dict[str, Any]:
    """
    Return what KServe's controller makes of an InferenceService with a `model`, with the annotations of its runtime.
    """
    predictor = service["spec"]["predictor"]
    annotations = {
        **runtime,
        **service["metadata"].get("annotations", {}),
        SOURCE: predictor["model"]["storageUri"],
        **predictor.get("annotations", {}),
    }
    mounts = predictor["model"].get("volumeMounts")
    serving = {"name": "kserve-container", **({"volumeMounts": deepcopy(mounts)} if mounts else {})}
    spec = {"containers": [serving], "volumes": deepcopy(predictor.get("volumes", []))}
    return {"kind": "Pod", "metadata": {"annotations": annotations}, "spec": spec}


def is_supported(container: dict[str, Any], uri: str) -> bool:
    """
    Whether a ClusterStorageContainer takes a source: by a prefix, or by a regular expression that may match anywhere.
    """
    return any(
        uri.startswith(one["prefix"]) if "prefix" in one else re.search(one["regex"], uri) is not None
        for one in container["supportedUriFormats"]
    )


def storage_spec(storage: dict[str, Any], secret: dict[str, str]) -> tuple[str, str, dict[str, str]]:
    """
    Return of a `storage:` the URI by which KServe selects a container, and the source and variables that this gets.
    """
    selected = f"<scheme-placeholder>://{storage['path'].removeprefix('/')}"
    over = storage.get("parameters", {})
    kind, bucket = over.get("type") or secret["type"], over.get("bucket") or secret.get("bucket", "")
    path = selected.removeprefix("<scheme-placeholder>://")
    source = f"{kind}://{bucket}/{path}" if kind == "s3" else f"{kind}://{path}"
    variables = {"STORAGE_CONFIG": json.dumps(secret)}
    return selected, source, variables | ({"STORAGE_OVERRIDE_CONFIG": json.dumps(over)} if over else {})


def _source(pod: dict[str, Any]) -> str | None:
    """The source URI, which for a cached model is the cache's claim."""
    annotations, labels = pod["metadata"].get("annotations", {}), pod["metadata"].get("labels", {})
    source = annotations.get(SOURCE)
    if source is None or LOCAL_MODEL not in labels:
        return source
    if f"{INTERNAL}/localmodel-pvc-name" not in annotations:
        raise RefusedByKServeError("the cached model has no claim")
    cached = annotations.get(f"{INTERNAL}/localmodel-sourceuri", "")
    below = source.removeprefix(cached)
    below = below if below.startswith("/") else f"/{below}"
    # `GetStorageKey`: the claim's directory does not depend on the name of the cache.
    key = sha256(cached.encode()).hexdigest()[:16]
    return f"pvc://{annotations[f'{INTERNAL}/localmodel-pvc-name']}/models/{key}{below}"


def _targets(spec: dict[str, Any]) -> list[dict[str, Any]]:
    found = {container["name"]: container for container in reversed(spec.get("containers", []))}
    main = found.get("kserve-container") or found.get("worker-container")
    if main is None:
        raise RefusedByKServeError("there is no container to serve from")
    return [main, *([found["transformer-container"]] if "transformer-container" in found else [])]


def _mount(volume: str, sub_path: str, read_only: bool) -> dict[str, Any]:
    optional = {**({"subPath": sub_path} if sub_path else {}), **({"readOnly": True} if read_only else {})}
    return {"name": volume, "mountPath": MODELS, **optional}


def _add(spec: dict[str, Any], containers: list[dict[str, Any]], mount: dict[str, Any], source: dict[str, Any]) -> None:
    """Add a mount where there is none of the name, and then the volume if there is none of the name."""
    for container in containers:
        if any(present["name"] == mount["name"] for present in container.get("volumeMounts", [])):
            continue
        container["volumeMounts"] = [*container.get("volumeMounts", []), dict(mount)]
        if all(volume["name"] != mount["name"] for volume in spec.get("volumes", [])):
            spec["volumes"] = [*spec.get("volumes", []), {"name": mount["name"], **deepcopy(source)}]
