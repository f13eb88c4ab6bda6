"""
Lets an InferenceService download into a shared claim instead of an `emptyDir`.

KServe adds the volume that it downloads into only if the pod has none of that name. So adding a volume of that name is
enough, and no webhook is needed.
"""

from __future__ import annotations

from kserve_pvc._settings import READONLY_ANNOTATION
from kserve_pvc.errors import SettingsError
from kserve_pvc.kserve import _manifest_tools as tools
from kserve_pvc.kserve import _services as services
from kserve_pvc.kserve._manifest_tools import MODEL_VOLUME, Manifest
from kserve_pvc.kserve._pods import mutate_pod
from kserve_pvc.kserve._policy import check_claim, check_sub_path
from kserve_pvc.kserve._services import obstacle

__all__ = ["mutate_pod", "obstacle", "share_volume"]


def share_volume(
    inference_service: Manifest, *, claim: str, sub_path: str = "", read_only: bool | None = None
) -> Manifest:
    """
    Return an InferenceService that downloads into a claim, which all of its replicas share.

    The argument is not changed, and the function is idempotent. A service is returned unchanged if KServe downloads
    nothing for its predictor, or not into a volume that can be shared. Only the predictor shares the claim.

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
    service = tools.copy_manifest(inference_service, services.KIND)
    if obstacle(service) is not None:
        return service
    predictor = services.predictor_of(service)
    is_writing = _set_annotation(service, predictor, read_only)
    _add_volume(predictor, claim)
    for place, container in services.serving(predictor):
        if sub_path or not services.has_source(predictor):
            _add_mount(container, place, sub_path, read_only=not is_writing)
        if read_only is not None:
            _set_read_only(container, place, read_only)
    return service


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
