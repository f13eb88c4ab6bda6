"""
An InferenceService whose downloads go to a shared claim instead of an `emptyDir`.

KServe adds the volume that it downloads into only if there is none of that name. So naming the volume is enough, and
KServe does the rest, without a webhook of ours.
"""

from __future__ import annotations

from kserve_pvc._settings import READONLY_ANNOTATION
from kserve_pvc.errors import SettingsError
from kserve_pvc.kserve import _manifest_tools as objects
from kserve_pvc.kserve._manifest_tools import MODEL_VOLUME, Manifest
from kserve_pvc.kserve._pods import mutate_pod
from kserve_pvc.kserve._policy import check_claim, check_sub_path

__all__ = ["mutate_pod", "obstacle", "share_volume"]

KIND = "InferenceService"
_API_GROUP = "serving.kserve.io/"

# Predictors from before there was `model`; each is a container with a `storageUri` of its own.
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
    Let an InferenceService download into a claim, which all of its replicas share.

    The service that is given stays as it is; doing it again changes nothing more. A service for which KServe downloads
    nothing, see `obstacle`, comes back unchanged.

    Args:
        inference_service: As it stands in its manifest.
        claim: The PersistentVolumeClaim, in the namespace of the service.
        sub_path: The directory of the claim that the server sees as `/mnt/models`; empty for all of it.
            The storage initializer sees all of the claim, so this needs one that knows that it is given a store.
        read_only: Whether the server may only read. None leaves it to the annotation `storage.kserve.io/readonly` of
            the service, which KServe takes for read-write only if it is exactly `"false"`.

    Raises:
        SettingsError: A part is missing, of the wrong kind, or already says something else.
        PolicyError: The directory is absolute or climbs.
    """
    check_claim(claim, "claim")
    check_sub_path(sub_path, "sub_path")
    if obstacle(inference_service) is not None:
        return objects.copied(inference_service, KIND)
    service = objects.copied(inference_service, KIND)
    predictor = objects.mapping(objects.mapping(service, "spec", ""), "predictor", "spec")
    is_writing = _settle_annotation(service, read_only)
    _add_volume(predictor, claim)
    for place, container in _serving(predictor):
        if sub_path or not _has_source(predictor):
            _add_mount(container, place, sub_path, read_only=not is_writing, is_explicit=read_only is not None)
    return service


def obstacle(inference_service: Manifest) -> str | None:
    """
    Why there is no download that a claim could take up, or None if there is one.

    Raises:
        SettingsError: It is no InferenceService, or a part is of the wrong kind.
    """
    service = objects.copied(inference_service, KIND)
    if not str(service.get("apiVersion", "")).startswith(_API_GROUP):
        raise SettingsError(
            "apiVersion", str(service.get("apiVersion", "")), f"give an InferenceService of `{_API_GROUP}v1beta1`"
        )
    predictor = objects.looked_up(objects.looked_up(service, "spec", ""), "predictor", "spec")
    if not predictor:
        raise SettingsError("spec.predictor", "", "an InferenceService has a predictor")
    if objects.LOCAL_MODEL in objects.texts(objects.looked_up(service, "metadata", ""), "labels"):
        return "its model comes from a LocalModelCache"
    for source in _sources(predictor):
        if source.startswith(objects.PVC_SCHEME):
            return "its model is served from a claim where it lies"
        if source.startswith(objects.OCI_SCHEMES):
            return "its model comes from an image"
    if any(container.get("storageUris") or predictor.get("storageUris") for _, container in _serving(predictor)):
        return "it has several sources (`storageUris`), for which KServe makes volumes of other names"
    return None


def _settle_annotation(service: Manifest, read_only: bool | None) -> bool:
    metadata = objects.mapping(service, "metadata", "")
    annotations = objects.texts(metadata, "annotations") if metadata.get("annotations") else {}
    is_writing = objects.asks_to_write(annotations)
    if read_only is None or is_writing is not read_only:
        return is_writing
    objects.mapping(metadata, "annotations", "metadata")[READONLY_ANNOTATION] = "true" if read_only else "false"
    return not read_only


def _add_volume(predictor: Manifest, claim: str) -> None:
    place = "spec.predictor"
    present = objects.named(objects.entries(predictor, "volumes", place), MODEL_VOLUME)
    volume = {"name": MODEL_VOLUME, "persistentVolumeClaim": {"claimName": claim}}
    if present is None:
        objects.append(predictor, "volumes", volume, place)
        return
    found = objects.looked_up(present, "persistentVolumeClaim", f"{place}.volumes[]").get("claimName")
    if found != claim:
        what = f"claim {found}" if found else "no claim"
        raise SettingsError(
            f"{place}.volumes[{MODEL_VOLUME}]",
            what,
            f"remove this volume, or share the claim that it names, not `{claim}`",
        )


def _add_mount(container: Manifest, place: str, sub_path: str, *, read_only: bool, is_explicit: bool) -> None:
    present = objects.named(objects.entries(container, "volumeMounts", place), MODEL_VOLUME)
    if present is None:
        objects.append(container, "volumeMounts", objects.mount(sub_path, read_only=read_only), place)
        return
    if sub_path and present.get("subPath") != sub_path:
        found = str(present.get("subPath") or "the whole claim")
        raise SettingsError(
            f"{place}.volumeMounts[{MODEL_VOLUME}].subPath",
            found,
            f"remove this mount, or share its directory, not `{sub_path}`",
        )
    if is_explicit and (present.get("readOnly") is True) is not read_only:
        present["readOnly"] = read_only


def _implementation(predictor: Manifest) -> tuple[str, Manifest] | None:
    """The part of a predictor that names a model and its server, if it does not list containers."""
    for name in ("model", *_FRAMEWORKS):
        if predictor.get(name) is not None:
            return f"spec.predictor.{name}", objects.mapping(predictor, name, "spec.predictor")
    return None


def _serving(predictor: Manifest) -> list[tuple[str, Manifest]]:
    """The containers into which KServe mounts a model, each with its place."""
    listed = objects.entries(predictor, "containers", "spec.predictor")
    found = [
        ("spec.predictor.containers[]", one)
        for one in listed
        if one.get("name") in (objects.SERVING, objects.TRANSFORMER)
    ]
    implementation = _implementation(predictor)
    if implementation is not None:
        return [implementation, *(one for one in found if one[1]["name"] == objects.TRANSFORMER)]
    # KServe gives the name itself to the only container, or to the first one that has none.
    if listed and objects.named(listed, objects.SERVING) is None and (len(listed) == 1 or not listed[0].get("name")):
        found.insert(0, ("spec.predictor.containers[]", listed[0]))
    if not found:
        raise SettingsError("spec.predictor", "", "an InferenceService names a `model`, or `containers`")
    return found


def _sources(predictor: Manifest) -> list[str]:
    implementation = _implementation(predictor)
    if implementation is not None:
        return [str(implementation[1]["storageUri"])] if implementation[1].get("storageUri") else []
    variables = [
        one
        for _, container in _serving(predictor)
        for one in objects.entries(container, "env", "spec.predictor.containers[]")
    ]
    return [str(one["value"]) for one in variables if one.get("name") == _SOURCE_VARIABLE and one.get("value")]


def _has_source(predictor: Manifest) -> bool:
    implementation = _implementation(predictor)
    return bool(_sources(predictor)) or bool(implementation and implementation[1].get("storage"))
