"""
Lets the pods of an LLMInferenceService download into a shared claim.

KServe's controller writes these pods itself, without its webhook: it adds the volume only if a pod's template has none
of that name, mounts it read-only into the server regardless of annotations, and uses no ClusterStorageContainer.
"""

from __future__ import annotations

from collections.abc import Iterator

from kserve_pvc.errors import SettingsError
from kserve_pvc.kserve import _manifest_tools as tools
from kserve_pvc.kserve._manifest_tools import Manifest

KIND = "LLMInferenceService"


def share(service: Manifest, claim: str, sub_path: str, read_only: bool | None) -> None:
    """
    Add the claim to every pod template of a service, in place.
    """
    spec = tools.mapping(service, "spec", "")
    for place, pod in _pods(spec):
        tools.add_claim(pod, claim, place)
        server = _server(pod, place)
        if sub_path or read_only is False:
            tools.add_mount(server, f"{place}.containers[]", sub_path, read_only=read_only is not False)
        if read_only is not None:
            tools.set_read_only(server, f"{place}.containers[]", read_only)


def obstacle(service: Manifest) -> str | None:
    """
    Return the reason why a service must not or cannot download into a shared claim, or None.

    Raises:
        SettingsError: It is not an LLMInferenceService, or a field has the wrong type.
    """
    tools.check_group(service, f"{KIND} of `{tools.API_GROUP}v1alpha2`")
    spec = tools.mapping_or_empty(service, "spec", "")
    if not spec:
        raise SettingsError("spec", "", f"an {KIND} needs `model`")
    if tools.LOCAL_MODEL in tools.strings(tools.mapping_or_empty(service, "metadata", ""), "labels"):
        return "its model comes from a LocalModelCache"
    if tools.mapping_or_empty(spec, "storageInitializer", "spec").get("enabled") is False:
        return "its storage initializer is disabled"
    return _model_obstacle(tools.mapping_or_empty(spec, "model", "spec")) or _mount_obstacle(spec)


def remarks(service: Manifest) -> tuple[str, ...]:
    """
    Return what sharing the claim does not do for a service.
    """
    spec = tools.mapping_or_empty(service, "spec", "")
    if spec.get("baseRefs"):
        return ("workers or prefill pods that only its `baseRefs` describe are unchanged",)
    return ()


def _pods(spec: Manifest) -> Iterator[tuple[str, Manifest]]:
    """Yield the templates of the pods that download the model; the server's is created if it is missing."""
    yield "spec.template", tools.mapping(spec, "template", "spec")
    if spec.get("worker") is not None:
        yield "spec.worker", tools.mapping(spec, "worker", "spec")
    if spec.get("prefill") is not None:
        prefill = tools.mapping(spec, "prefill", "spec")
        yield "spec.prefill.template", tools.mapping(prefill, "template", "spec.prefill")
        if prefill.get("worker") is not None:
            yield "spec.prefill.worker", tools.mapping(prefill, "worker", "spec.prefill")


def _server(pod: Manifest, place: str) -> Manifest:
    """Return the container of the server, and add it to a template without one."""
    found = tools.find_by_name(tools.entries(pod, "containers", place), tools.LLM_SERVING)
    if found is None:
        # KServe merges containers by name into its own template, and a template without any would remove them there.
        found = {"name": tools.LLM_SERVING}
        tools.append(pod, "containers", found, place)
    return found


def _model_obstacle(model: Manifest) -> str | None:
    source = str(model.get("uri") or "")
    if source.startswith(tools.PVC_SCHEME):
        return "its model is served directly from a claim"
    if source.startswith(tools.OCI_SCHEMES):
        return "its model comes from an image"
    if tools.mapping_or_empty(model, "confidential", "spec.model").get("enabled") is True:
        return "its model is confidential: decrypted, it would be readable on a shared claim"
    lora = tools.mapping_or_empty(model, "lora", "spec.model")
    adapters = tools.entries(lora, "adapters", "spec.model.lora")
    if any(not str(adapter.get("uri") or "").startswith(tools.PVC_SCHEME) for adapter in adapters):
        return "its adapters are downloaded into the same volume, which KServe then mounts at another path"
    return None


def _mount_obstacle(spec: Manifest) -> str | None:
    pods = [tools.mapping_or_empty(spec, name, "spec") for name in ("template", "worker")]
    prefill = tools.mapping_or_empty(spec, "prefill", "spec")
    pods += [tools.mapping_or_empty(prefill, name, "spec.prefill") for name in ("template", "worker")]
    for pod in pods:
        server = tools.find_by_name(tools.entries(pod, "containers", "spec.template"), tools.LLM_SERVING) or {}
        reason = tools.mount_obstacle(server, "spec.template.containers[]")
        if reason is not None:
            return reason
    return None
