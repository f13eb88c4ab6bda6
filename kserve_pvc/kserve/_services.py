"""
What KServe does for an InferenceService, as far as its manifest shows: where its models come from, and which containers
get them.
"""

from __future__ import annotations

from kserve_pvc.errors import SettingsError
from kserve_pvc.kserve import _manifest_tools as tools
from kserve_pvc.kserve._manifest_tools import MODEL_MOUNT_PATH, Manifest

KIND = "InferenceService"

# Predictors older than `model`; each is a container with its own `storageUri`.
_FRAMEWORKS = (
    "sklearn",
    "xgboost",
    "tensorflow",
    "pytorch",
    "triton",
    "onnx",
    "huggingface",
    "pmml",
    "lightgbm",
    "paddle",
)
_SOURCE_VARIABLE = "STORAGE_URI"
_MULTI_MODEL_VARIABLE = "MULTI_MODEL_SERVER"
_MODELS = f"`{MODEL_MOUNT_PATH}`"
_DEPLOYMENT_MODE = "serving.kserve.io/deploymentMode"


def obstacle(service: Manifest) -> str | None:
    """
    Return the reason why the predictor of a service must not or cannot download into a shared claim, or None.

    Raises:
        SettingsError: It is not an InferenceService, or a field has the wrong type.
    """
    predictor = predictor_of(service)
    metadata = tools.mapping_or_empty(service, "metadata", "")
    if tools.LOCAL_MODEL in tools.strings(metadata, "labels"):
        return "its model comes from a LocalModelCache"
    if tools.strings(metadata, "annotations").get(_DEPLOYMENT_MODE) == "ModelMesh":
        return "ModelMesh downloads its model, into the volume of its own runtimes"
    if _is_confidential(predictor, metadata):
        return "its model is confidential: decrypted, it would be readable on a shared claim"
    return _source_obstacle(predictor) or _agent_obstacle(predictor) or _mount_obstacle(serving(predictor))


def remarks(service: Manifest) -> tuple[str, ...]:
    """
    Return what sharing the claim with the predictor does not do for other parts of a service.
    """
    spec = tools.mapping_or_empty(service, "spec", "")
    canaries = [
        tools.mapping_or_empty(one, "predictor", "spec.canary[]") for one in tools.entries(spec, "canary", "spec")
    ]
    found = [
        f"its canary `{one.get('name', '')}` is unchanged: it downloads into a volume of its own" for one in canaries
    ]
    found += [
        f"its {part} is unchanged: it downloads from a source of its own, into a volume of its own"
        for part in ("transformer", "explainer")
        if _has_own_source(tools.mapping_or_empty(spec, part, "spec"), f"spec.{part}")
    ]
    if tools.mapping_or_empty(spec, "predictor", "spec").get("workerSpec") is not None:
        found.append("its workers are unchanged: KServe supports only `pvc://` and `oci://` for several nodes")
    return tuple(found)


def predictor_of(service: Manifest) -> Manifest:
    """
    Return the predictor of an InferenceService.

    Raises:
        SettingsError: It is not an InferenceService, or has no predictor.
    """
    tools.check_group(service, f"{KIND} of `{tools.API_GROUP}v1beta1`")
    predictor = tools.mapping_or_empty(tools.mapping_or_empty(service, "spec", ""), "predictor", "spec")
    if not predictor:
        raise SettingsError("spec.predictor", "", f"an {KIND} needs a predictor")
    return predictor


def serving(predictor: Manifest) -> list[tuple[str, Manifest]]:
    """
    Return the containers into which KServe mounts a model, each with its path in the manifest.
    """
    listed = tools.entries(predictor, "containers", "spec.predictor")
    found = [
        ("spec.predictor.containers[]", one) for one in listed if one.get("name") in (tools.SERVING, tools.TRANSFORMER)
    ]
    implementation = _implementation(predictor)
    if implementation is not None:
        return [implementation, *(one for one in found if one[1]["name"] == tools.TRANSFORMER)]
    # KServe sets the name of the only container, or of the first one if it has none.
    if listed and tools.find_by_name(listed, tools.SERVING) is None and (len(listed) == 1 or not listed[0].get("name")):
        found.insert(0, ("spec.predictor.containers[]", listed[0]))
    if not found:
        raise SettingsError("spec.predictor", "", "a predictor needs `model` or `containers`")
    return found


def has_source(predictor: Manifest) -> bool:
    """
    Whether KServe downloads a model for the predictor, and therefore adds mounts.
    """
    implementation = _implementation(predictor)
    return bool(_sources(predictor)) or bool(implementation and implementation[1].get("storage"))


def _implementation(predictor: Manifest) -> tuple[str, Manifest] | None:
    """Return the field of a predictor that describes a model, with its path; None if it lists containers."""
    for name in ("model", *_FRAMEWORKS):
        if predictor.get(name) is not None:
            return f"spec.predictor.{name}", tools.mapping(predictor, name, "spec.predictor")
    return None


def _sources(predictor: Manifest) -> list[str]:
    implementation = _implementation(predictor)
    if implementation is not None:
        return [str(implementation[1]["storageUri"])] if implementation[1].get("storageUri") else []
    containers = [container for _, container in serving(predictor)]
    return [value for container in containers if (value := _variable(container, _SOURCE_VARIABLE))]


def _variable(container: Manifest, name: str) -> str:
    found = tools.find_by_name(tools.entries(container, "env", "spec.predictor.containers[]"), name)
    return str(found.get("value") or "") if found else ""


def _source_obstacle(predictor: Manifest) -> str | None:
    for source in _sources(predictor):
        if source.startswith(tools.PVC_SCHEME):
            return "its model is served directly from a claim"
        if source.startswith(tools.OCI_SCHEMES):
            return "its model comes from an image"
    if any(container.get("storageUris") or predictor.get("storageUris") for _, container in serving(predictor)):
        return "it has several sources (`storageUris`), for which KServe creates volumes of other names"
    return None


def _agent_obstacle(predictor: Manifest) -> str | None:
    if _is_multi_model(predictor):
        return f"KServe's agent downloads its models, into a volume of its own at {_MODELS}"
    return None


def _mount_obstacle(found: list[tuple[str, Manifest]]) -> str | None:
    reasons = (tools.mount_obstacle(container, place) for place, container in found)
    return next((reason for reason in reasons if reason is not None), None)


def _is_confidential(predictor: Manifest, metadata: Manifest) -> bool:
    owners = ((predictor, "spec.predictor"), (metadata, "metadata"))
    annotated = any(
        tools.strings(owner, "annotations", place).get(tools.CONFIDENTIAL) == "true" for owner, place in owners
    )
    place, described = _implementation(predictor) or ("", {})
    return annotated or tools.mapping_or_empty(described, "confidential", place).get("enabled") is True


def _is_multi_model(predictor: Manifest) -> bool:
    """Whether KServe adds its agent, which mounts a volume of its own where the model would be."""
    listed = tools.entries(predictor, "containers", "spec.predictor")
    if listed:
        return _variable(listed[0], _MULTI_MODEL_VARIABLE) == "true"
    place, described = _implementation(predictor) or ("", {})
    model_format = tools.mapping_or_empty(described, "modelFormat", place).get("name")
    if not place or place == "spec.predictor.huggingface" or model_format == "huggingface":
        return False
    fields = (described.get("storageUri"), described.get("storage"), predictor.get("storageUris") or None)
    return all(value is None for value in fields)


def _has_own_source(component: Manifest, place: str) -> bool:
    found = [component, *(value for value in component.values() if isinstance(value, dict))]
    sources = any(one.get("storageUri") or one.get("storageUris") for one in found)
    return sources or any(
        _variable(container, _SOURCE_VARIABLE) for container in tools.entries(component, "containers", place)
    )
