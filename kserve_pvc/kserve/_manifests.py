"""
Lets an InferenceService download into a shared claim instead of an `emptyDir`.

KServe adds the volume that it downloads into only if the pod has none of that name. So adding a volume of that name is
enough, and no webhook is needed.
"""

from __future__ import annotations

from kserve_pvc._settings import READONLY_ANNOTATION
from kserve_pvc.errors import SettingsError
from kserve_pvc.kserve import _manifest_tools as tools
from kserve_pvc.kserve._manifest_tools import MODEL_VOLUME, Manifest
from kserve_pvc.kserve._pods import mutate_pod
from kserve_pvc.kserve._policy import check_claim, check_sub_path

__all__ = ["mutate_pod", "obstacle", "share_volume"]

KIND = "InferenceService"
_API_GROUP = "serving.kserve.io/"

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


def share_volume(
    inference_service: Manifest, *, claim: str, sub_path: str = "", read_only: bool | None = None
) -> Manifest:
    """
    Return an InferenceService that downloads into a claim, which all of its replicas share.

    The argument is not changed, and the function is idempotent. A service for which KServe downloads nothing, see
    `obstacle`, is returned unchanged.

    Args:
        inference_service: The manifest.
        claim: The PersistentVolumeClaim, in the namespace of the service.
        sub_path: The directory of the claim that the server sees as `/mnt/models`; empty for all of it.
            The storage initializer sees all of the claim, so this needs one that is configured with the store.
        read_only: Whether the server gets a read-only mount. It is written to the annotation
            `storage.kserve.io/readonly`, where it has precedence: in the predictor if that has the annotation, else in
            the service. None leaves the annotations unchanged: KServe mounts read-write only if the one of the
            predictor, else that of the service, else that of the ServingRuntime is exactly `"false"`. The
            ServingRuntime is not part of the manifest, so its annotation is not known here.

    Raises:
        SettingsError: A field is missing, has the wrong type, or conflicts with the arguments.
        PolicyError: The directory is absolute or contains `..`.
    """
    check_claim(claim, "claim")
    check_sub_path(sub_path, "sub_path")
    if obstacle(inference_service) is not None:
        return tools.copy_manifest(inference_service, KIND)
    service = tools.copy_manifest(inference_service, KIND)
    predictor = tools.mapping(tools.mapping(service, "spec", ""), "predictor", "spec")
    is_writing = _set_annotation(service, predictor, read_only)
    _add_volume(predictor, claim)
    for place, container in _serving(predictor):
        if sub_path or not _has_source(predictor):
            _add_mount(container, place, sub_path, read_only=not is_writing)
        if read_only is not None:
            _set_read_only(container, place, read_only)
    return service


def obstacle(inference_service: Manifest) -> str | None:
    """
    Return the reason why KServe downloads nothing for a service, or None if it does.

    Raises:
        SettingsError: It is not an InferenceService, or a field has the wrong type.
    """
    service = tools.copy_manifest(inference_service, KIND)
    if not str(service.get("apiVersion", "")).startswith(_API_GROUP):
        raise SettingsError(
            "apiVersion", str(service.get("apiVersion", "")), f"expected an InferenceService of `{_API_GROUP}v1beta1`"
        )
    predictor = tools.mapping_or_empty(tools.mapping_or_empty(service, "spec", ""), "predictor", "spec")
    if not predictor:
        raise SettingsError("spec.predictor", "", "an InferenceService needs a predictor")
    if tools.LOCAL_MODEL in tools.strings(tools.mapping_or_empty(service, "metadata", ""), "labels"):
        return "its model comes from a LocalModelCache"
    for source in _sources(predictor):
        if source.startswith(tools.PVC_SCHEME):
            return "its model is served directly from a claim"
        if source.startswith(tools.OCI_SCHEMES):
            return "its model comes from an image"
    if any(container.get("storageUris") or predictor.get("storageUris") for _, container in _serving(predictor)):
        return "it has several sources (`storageUris`), for which KServe creates volumes of other names"
    return None


def _set_annotation(service: Manifest, predictor: Manifest, read_only: bool | None) -> bool:
    """
    Set the annotation where it has precedence, and return whether the server may write.

    KServe merges annotations: those of the predictor replace those of the service, which replace those of the
    ServingRuntime. An annotation that is absent in the manifest may be set in the runtime, so it is always written.
    """
    metadata = tools.mapping(service, "metadata", "")
    owners = [(predictor, "spec.predictor"), (metadata, "metadata")]
    found = [(owner, place) for owner, place in owners if READONLY_ANNOTATION in _annotations(owner, place)]
    owner, place = found[0] if found else owners[-1]
    is_writing = tools.requests_write(_annotations(owner, place))
    if read_only is None or (found and is_writing is not read_only):
        return is_writing
    tools.mapping(owner, "annotations", place)[READONLY_ANNOTATION] = "true" if read_only else "false"
    return not read_only


def _annotations(owner: Manifest, place: str) -> dict[str, str]:
    return tools.strings(owner, "annotations", place)


def _add_volume(predictor: Manifest, claim: str) -> None:
    place = "spec.predictor"
    present = tools.find_by_name(tools.entries(predictor, "volumes", place), MODEL_VOLUME)
    volume = {"name": MODEL_VOLUME, "persistentVolumeClaim": {"claimName": claim}}
    if present is None:
        tools.append(predictor, "volumes", volume, place)
        return
    found = tools.mapping_or_empty(present, "persistentVolumeClaim", f"{place}.volumes[]").get("claimName")
    if found != claim:
        value = f"claim {found}" if found else "no claim"
        hint = f"remove this volume, or share its claim instead of `{claim}`"
        raise SettingsError(f"{place}.volumes[{MODEL_VOLUME}]", value, hint)


def _add_mount(container: Manifest, place: str, sub_path: str, *, read_only: bool) -> None:
    present = tools.find_by_name(tools.entries(container, "volumeMounts", place), MODEL_VOLUME)
    if present is None:
        tools.append(container, "volumeMounts", tools.make_mount(sub_path, read_only=read_only), place)
        return
    if sub_path and present.get("subPath") != sub_path:
        found = str(present.get("subPath") or "the whole claim")
        raise SettingsError(
            f"{place}.volumeMounts[{MODEL_VOLUME}].subPath",
            found,
            f"remove this mount, or share its directory instead of `{sub_path}`",
        )


def _set_read_only(container: Manifest, place: str, read_only: bool) -> None:
    """Change the mounts of the service itself, to which KServe does not apply the annotation."""
    for mount in tools.entries(container, "volumeMounts", place):
        if mount.get("name") == MODEL_VOLUME and (mount.get("readOnly") is True) is not read_only:
            mount["readOnly"] = read_only


def _implementation(predictor: Manifest) -> tuple[str, Manifest] | None:
    """Return the field of a predictor that describes a model, with its path; None if it lists containers."""
    for name in ("model", *_FRAMEWORKS):
        if predictor.get(name) is not None:
            return f"spec.predictor.{name}", tools.mapping(predictor, name, "spec.predictor")
    return None


def _serving(predictor: Manifest) -> list[tuple[str, Manifest]]:
    """Return the containers into which KServe mounts a model, each with its path in the manifest."""
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


def _sources(predictor: Manifest) -> list[str]:
    implementation = _implementation(predictor)
    if implementation is not None:
        return [str(implementation[1]["storageUri"])] if implementation[1].get("storageUri") else []
    variables = [
        one
        for _, container in _serving(predictor)
        for one in tools.entries(container, "env", "spec.predictor.containers[]")
    ]
    return [str(one["value"]) for one in variables if one.get("name") == _SOURCE_VARIABLE and one.get("value")]


def _has_source(predictor: Manifest) -> bool:
    implementation = _implementation(predictor)
    return bool(_sources(predictor)) or bool(implementation and implementation[1].get("storage"))
