"""
`share_volume` for files: several YAML documents, or one ResourceList as kustomize passes it to a KRM function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import attrs

from kserve_pvc.errors import SettingsError, StoreError, printable, unknown_option
from kserve_pvc.kserve._manifest_tools import Manifest
from kserve_pvc.kserve._manifests import KINDS, obstacle, remarks, share_volume
from kserve_pvc.kserve._yaml import read_documents, write_documents

_LIST = "ResourceList"


@attrs.frozen(kw_only=True)
class Sharing:
    """
    The arguments of `share_volume` from the command line or a function's configuration; None where not given.
    """

    claim: str | None = None
    sub_path: str | None = None
    read_only: bool | None = None

    def patch(self, service: Manifest) -> Manifest:
        if not self.claim:
            raise SettingsError("--claim", "", "set the PersistentVolumeClaim, here or in the `functionConfig`")
        return share_volume(service, claim=self.claim, sub_path=self.sub_path or "", read_only=self.read_only)


@attrs.frozen(kw_only=True)
class Patched:
    """
    The patched documents, remarks for standard error, and the error that a ResourceList reports, if any.
    """

    text: str
    remarks: tuple[str, ...]
    error: StoreError | None = None


def patch(text: str | bytes, sharing: Sharing, *, name: str) -> Patched:
    """
    Patch every InferenceService in YAML documents, and return all other documents unchanged.

    Raises:
        SettingsError: It is not YAML or has no InferenceService, or a service cannot be patched.
        PolicyError: The directory is absolute or contains `..`.
    """
    documents = read_documents(text, name)
    if len(documents) == 1 and isinstance(documents[0], dict) and documents[0].get("kind") == _LIST:
        return _patch_list(documents[0], sharing)
    remarks: list[str] = []
    if not any(_is_service(found) for document in documents for found in _flatten(document)):
        raise SettingsError(name, "no InferenceService", "expected the manifest of at least one")
    return Patched(
        text=write_documents(_patched(document, sharing.patch, remarks) for document in documents),
        remarks=tuple(remarks),
    )


def _patch_list(resources: Manifest, sharing: Sharing) -> Patched:
    """Patch a ResourceList. A KRM function returns the list that it got, and reports errors in it too."""
    remarks: list[str] = []
    try:
        items = resources.get("items") or []
        if not isinstance(items, list):
            raise SettingsError("items", type(items).__name__, "expected a list of resources")
        configured = _configured(resources.get("functionConfig") or {}, sharing)
        resources = {**resources, "items": [_patched(item, configured.patch, remarks) for item in items]}
    except StoreError as error:
        failed = {
            **resources,
            "results": [*(resources.get("results") or ()), {"message": str(error), "severity": "error"}],
        }
        return Patched(text=write_documents([failed]), remarks=tuple(remarks), error=error)
    return Patched(text=write_documents([resources]), remarks=tuple(remarks))


def _configured(config: object, sharing: Sharing) -> Sharing:
    """Merge a function's configuration, in `spec` or in the `data` of a ConfigMap; the command line has precedence."""
    if not isinstance(config, dict):
        raise SettingsError("functionConfig", type(config).__name__, "expected a mapping")
    place = "data" if config.get("kind") == "ConfigMap" else "spec"
    fields = config.get(place) or {}
    if not isinstance(fields, dict):
        raise SettingsError(f"functionConfig.{place}", type(fields).__name__, "expected a mapping")
    for name in fields:
        if name not in ("claim", "subPath", "readOnly"):
            raise unknown_option("field", f"functionConfig.{place}.{name}", ("claim", "subPath", "readOnly"))
    read_only = fields.get("readOnly")
    if read_only not in (None, True, False, "true", "false"):
        raise SettingsError(f"functionConfig.{place}.readOnly", str(read_only), "expected `true` or `false`")
    return Sharing(
        claim=sharing.claim or fields.get("claim"),
        sub_path=sharing.sub_path if sharing.sub_path is not None else fields.get("subPath"),
        read_only=sharing.read_only
        if sharing.read_only is not None or read_only is None
        else read_only in (True, "true"),
    )


def _is_service(document: object) -> bool:
    return isinstance(document, dict) and document.get("kind") in KINDS


def _flatten(document: object) -> Iterator[object]:
    """Yield a document, and its items if it is a `List` as `kubectl get` prints it."""
    yield document
    if isinstance(document, dict) and document.get("kind") == "List" and isinstance(document.get("items"), list):
        yield from document["items"]


def _patched(document: Any, patch_one: Callable[[Manifest], Manifest], found: list[str]) -> Any:
    if _is_service(document):
        patched = patch_one(document)
        reason = obstacle(document)
        notes = [f": {remark}" for remark in remarks(document)] if reason is None else [f" is unchanged: {reason}"]
        found += (printable(f"{_name(document)}{note}") for note in notes)
        return patched
    if isinstance(document, dict) and document.get("kind") == "List" and isinstance(document.get("items"), list):
        return {**document, "items": [_patched(item, patch_one, found) for item in document["items"]]}
    return document


def _name(service: Manifest) -> str:
    metadata = service.get("metadata")
    return str(metadata.get("name", "a service")) if isinstance(metadata, dict) else "a service"
