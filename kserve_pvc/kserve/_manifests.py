"""
Lets an InferenceService download into a shared claim instead of an `emptyDir`.

KServe adds the volume that it downloads into only if the pod has none of that name. So adding a volume of that name is
enough, and no webhook is needed.
"""

from __future__ import annotations

from kserve_pvc._settings import READONLY_ANNOTATION
from kserve_pvc.kserve import _llm_services as llm_services
from kserve_pvc.kserve import _manifest_tools as tools
from kserve_pvc.kserve import _services as services
from kserve_pvc.kserve._manifest_tools import Manifest
from kserve_pvc.kserve._pods import mutate_pod
from kserve_pvc.kserve._policy import check_claim, check_sub_path

__all__ = ["mutate_pod", "obstacle", "remarks", "share_volume"]

KINDS = (services.KIND, llm_services.KIND)


def share_volume(
    inference_service: Manifest, *, claim: str, sub_path: str = "", read_only: bool | None = None
) -> Manifest:
    """
    Return an InferenceService or LLMInferenceService that downloads into a claim, which all of its replicas share.

    The argument is not changed, and the function is idempotent. A service is returned unchanged if KServe downloads
    nothing for its predictor, or not into a volume that can be shared. Of an InferenceService only the predictor
    shares the claim; of an LLMInferenceService the servers, their workers and those for prefill.

    Args:
        inference_service: The manifest.
        claim: The PersistentVolumeClaim, in the namespace of the service.
        sub_path: The directory of the claim that the server sees as `/mnt/models`; empty for all of it.
            The storage initializer sees all of the claim, so this needs one that is configured with the store.
        read_only: Whether the server gets a read-only mount. It is written to the annotation
            `storage.kserve.io/readonly`, where it has precedence: in the predictor if that has the annotation, else in
            the service. None leaves the annotations unchanged: KServe mounts read-write only if the one of the
            predictor, else that of the service, else that of the ServingRuntime is exactly `"false"`. The
            ServingRuntime is not part of the manifest, so its annotation is not known here. KServe mounts the model
            of an LLMInferenceService read-only regardless of annotations, so False adds a mount there.

    Raises:
        SettingsError: A field is missing, has the wrong type, or conflicts with the arguments.
        PolicyError: The directory is absolute or contains `..`.
    """
    check_claim(claim, "claim")
    check_sub_path(sub_path, "sub_path")
    service = tools.copy_manifest(inference_service, *KINDS)
    if obstacle(service) is not None:
        return service
    if service["kind"] == llm_services.KIND:
        llm_services.share(service, claim, sub_path, read_only)
        return service
    predictor = services.predictor_of(service)
    is_writing = _set_annotation(service, predictor, read_only)
    tools.add_claim(predictor, claim, "spec.predictor")
    for place, container in services.serving(predictor):
        if sub_path or not services.has_source(predictor):
            tools.add_mount(container, place, sub_path, read_only=not is_writing)
        if read_only is not None:
            tools.set_read_only(container, place, read_only)
    return service


def obstacle(service: Manifest) -> str | None:
    """
    Return the reason why a service of either kind must not or cannot share a claim, or None.

    Raises:
        SettingsError: It is neither kind, or a field has the wrong type.
    """
    service = tools.copy_manifest(service, *KINDS)
    return llm_services.obstacle(service) if service["kind"] == llm_services.KIND else services.obstacle(service)


def remarks(service: Manifest) -> tuple[str, ...]:
    """
    Return what sharing a claim does not do for a service of either kind.
    """
    return llm_services.remarks(service) if service["kind"] == llm_services.KIND else services.remarks(service)


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
