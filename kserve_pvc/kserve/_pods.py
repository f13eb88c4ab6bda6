"""
Mutates pods: the shared claim replaces the `emptyDir` that KServe would add, and a pod gets no more access than the
policy grants.

KServe goes by names: it does not change an existing volume or mount with the name that it would use. So the mutation is
idempotent, and works before KServe's own webhook; called again after it, it confines what KServe has added. Only after
KServe it has the same result as long as KServe adds an `emptyDir` without settings, which is its default.
"""

from __future__ import annotations

import attrs

from kserve_pvc._settings import READONLY_ANNOTATION
from kserve_pvc.errors import PolicyError, SettingsError, printable
from kserve_pvc.kserve import _manifest_tools as tools
from kserve_pvc.kserve._manifest_tools import MODEL_VOLUME, Manifest
from kserve_pvc.kserve._policy import Access, Policy, Rule, check_claim, check_sub_path

# The annotations for the owner of a service: the claim (empty: none, not even a default), and the directory to serve.
CLAIM = "kserve-pvc/claim"
SUB_PATH = "kserve-pvc/sub-path"

_CONFIDENTIAL = "the model is confidential: decrypted, it would be readable on the claim"


@attrs.frozen(kw_only=True)
class Admitted:
    """
    A mutated pod, the shared claim that it mounts if any, and notes for its owner.
    """

    pod: Manifest
    claim: str | None
    notes: tuple[str, ...]


@attrs.frozen(kw_only=True)
class _Owner:
    """
    The namespace and service account of a pod, and the policy.
    """

    namespace: str
    service_account: str
    policy: Policy

    def rules(self, claim: str) -> tuple[Rule, ...]:
        """Return the rules for a claim; empty if no rule of this namespace names it."""
        found = self.policy.rules_for(self.namespace, self.service_account, claim)
        if not found and self.policy.governs(self.namespace, claim):
            self.refuse(claim)
        return found

    def rule(self, claim: str, sub_path: str) -> Rule | None:
        """Return the first rule for a directory of a claim; None if no rule of this namespace names the claim."""
        rules = self.rules(claim)
        found = next((rule for rule in rules if rule.covers(sub_path)), None)
        if rules and found is None:
            rule = f"`{sub_path or '/'}` is outside of {_directories(rules)}, which this pod may mount"
            raise PolicyError(f"claim {claim}", rule)
        return found

    def default(self) -> Rule | None:
        """Return the rule for a pod that requests nothing, if any."""
        return self.policy.default_for(self.namespace, self.service_account)

    def refuse(self, claim: str) -> None:
        raise PolicyError(
            f"claim {claim}",
            f"no rule allows service account `{self.service_account}` of namespace `{self.namespace}` to mount it",
        )


@attrs.frozen(kw_only=True)
class _Grant:
    """
    The claim that a pod shares, the rule that allows it, and the directory that is served.

    `is_default` if the pod requests neither claim nor directory, so that it gets what the default rule allows, even
    where an earlier rule allows more.
    """

    claim: str
    rule: Rule
    sub_path: str
    is_default: bool


def mutate_pod(pod: Manifest, policy: Policy, *, namespace: str | None = None) -> Manifest:
    """
    Return a pod with the claim that it requests, and with no more access to claims than the policy grants.

    The argument is not changed. The function is idempotent, before and after KServe's own mutation.

    Args:
        pod: A pod as KServe's controller creates it, or as KServe's webhook changes it.
        namespace: The namespace of the pod, which a pod in an admission request does not contain. Default:
            `metadata.namespace`.

    Raises:
        PolicyError: It requests or mounts a claim or a directory that the policy does not grant.
        SettingsError: A field is missing or has the wrong type.
    """
    return admit(pod, policy, namespace=namespace).pod


def admit(pod: Manifest, policy: Policy, *, namespace: str | None = None) -> Admitted:
    """
    Mutate a pod as `mutate_pod` does, and report what was changed.
    """
    pod = tools.copy_manifest(pod, "Pod")
    metadata = tools.mapping(pod, "metadata", "")
    namespace = namespace or metadata.get("namespace")
    if not isinstance(namespace, str) or not namespace:
        raise SettingsError("metadata.namespace", "", "pass the namespace of the pod")
    spec = tools.mapping(pod, "spec", "")
    owner = _Owner(namespace=namespace, service_account=_service_account(spec), policy=policy)
    notes: list[str] = []
    grant = _grant(metadata, spec, owner, notes)
    _keep_read_only(metadata, owner, grant, notes)
    if grant is not None:
        _share(spec, grant, is_writing=tools.requests_write(tools.strings(metadata, "annotations")))
    _confine(spec, owner, grant, notes)
    return Admitted(pod=pod, claim=grant.claim if grant else None, notes=tuple(map(printable, notes)))


def _service_account(spec: Manifest) -> str:
    # The API server sets `default`, and copies the deprecated field to the new one, before it calls a webhook.
    name = spec.get("serviceAccountName") or spec.get("serviceAccount") or "default"
    if not isinstance(name, str):
        raise SettingsError("spec.serviceAccountName", str(name), "expected a string")
    return name


def _grant(metadata: Manifest, spec: Manifest, owner: _Owner, notes: list[str]) -> _Grant | None:
    annotations = tools.strings(metadata, "annotations")
    requested = _requested_claim(annotations, owner)
    obstacle = _obstacle(metadata, spec)
    own = _own_claim(spec)
    is_downloaded = not annotations.get(tools.SOURCE, "").startswith((tools.PVC_SCHEME, *tools.OCI_SCHEMES))
    if own and owner.rules(own) and is_downloaded and _is_confidential(annotations, spec):
        raise PolicyError(f"claim {own}", _CONFIDENTIAL)
    if obstacle is None and own and owner.rules(own):
        if requested not in (None, own):
            notes.append(f"the pod's own volume `{MODEL_VOLUME}` keeps claim `{own}`")
        requested = own
    else:
        obstacle = obstacle or _own_volume(spec)
    if requested is None or obstacle is not None:
        if requested is not None and CLAIM in annotations:
            notes.append(f"claim `{requested}` is not mounted: {obstacle}")
        return None
    return _apply_rules(requested, annotations, owner)


def _requested_claim(annotations: dict[str, str], owner: _Owner) -> str | None:
    if CLAIM not in annotations:
        default = owner.default()
        return default.claim if default else None
    if not annotations[CLAIM]:
        return None
    claim = check_claim(annotations[CLAIM], f"metadata.annotations[{CLAIM}]")
    if not owner.rules(claim):
        owner.refuse(claim)
    return claim


def _apply_rules(claim: str, annotations: dict[str, str], owner: _Owner) -> _Grant:
    if SUB_PATH in annotations:
        sub_path = check_sub_path(annotations[SUB_PATH], f"metadata.annotations[{SUB_PATH}]")
        rule = owner.rule(claim, sub_path)
        assert rule is not None, "`owner.rules` is not empty"
        return _Grant(claim=claim, rule=rule, sub_path=sub_path, is_default=False)
    # A second call finds the volume that the first one has added, and must apply the same rule.
    default = owner.default() if CLAIM not in annotations else None
    is_default = default is not None and default.claim == claim
    rule = default if default is not None and is_default else owner.rules(claim)[0]
    return _Grant(claim=claim, rule=rule, sub_path=rule.sub_path, is_default=is_default)


def _obstacle(metadata: Manifest, spec: Manifest) -> str | None:
    """Return the reason why KServe's storage initializer downloads nothing into a volume of this pod, or None."""
    annotations = tools.strings(metadata, "annotations")
    source = annotations.get(tools.SOURCE)
    if tools.AGENT in annotations:
        return "KServe's agent downloads for this pod"
    if source is None:
        return _initializer_obstacle(spec) or (_CONFIDENTIAL if _is_confidential(annotations, spec) else None)
    if tools.LOCAL_MODEL in tools.strings(metadata, "labels"):
        return "the model comes from a LocalModelCache"
    if source.startswith(tools.OCI_SCHEMES):
        return "the model comes from an image"
    if source.startswith(tools.PVC_SCHEME):
        return "the model is served directly from a claim"
    if _is_confidential(annotations, spec):
        return _CONFIDENTIAL
    return None if _serving(spec) else f"the pod has no container `{tools.SERVING}`"


def _initializer_obstacle(spec: Manifest) -> str | None:
    """
    Return why a pod cannot share a claim to which KServe's controller, not its webhook, has added the initializer.

    Those are pods of an LLMInferenceService, which can, and of an InferenceService with `storageUris`, which cannot.
    """
    initializer = _initializer(spec)
    if initializer is None:
        return "KServe downloads nothing for this pod"
    mounts = [(str(mount.get("name")), mount.get("mountPath")) for mount in _mounts(initializer)]
    names = [name for name, path in mounts if name == MODEL_VOLUME or tools.is_model_path(path)]
    if MODEL_VOLUME not in names:
        where = f"the volume `{names[0]}`" if names else "a volume of another name"
        return f"KServe downloads into {where}, as it does for `storageUris`"
    arguments = initializer.get("args")
    paths = [path for name, path in mounts if name == MODEL_VOLUME]
    paths += [
        mount.get("mountPath") for one in _serving(spec) for mount in _mounts(one) if mount.get("name") == MODEL_VOLUME
    ]
    if not isinstance(arguments, list) or len(arguments) != 2 or not all(map(tools.is_model_path, paths)):
        return f"KServe mounts its volume for other files than one model at `{tools.MODEL_MOUNT_PATH}`"
    return None if _serving(spec) else f"the pod has no container `{tools.LLM_SERVING}`"


def _initializer(spec: Manifest) -> Manifest | None:
    return tools.find_by_name(tools.entries(spec, "initContainers", "spec"), tools.INITIALIZER)


def _own_volume(spec: Manifest) -> str | None:
    """Return why a volume of the pod's own takes the place of the claim, or None."""
    if _has_own_volume(spec):
        return f"the pod has its own volume `{MODEL_VOLUME}`"
    mounts = [mount for container in _serving(spec) for mount in _mounts(container)]
    others = [mount for mount in mounts if mount.get("name") != MODEL_VOLUME]
    other = next((mount for mount in others if tools.is_model_path(mount.get("mountPath"))), None)
    return f"the pod mounts its own volume `{other.get('name')}` at `{tools.MODEL_MOUNT_PATH}`" if other else None


def _is_confidential(annotations: dict[str, str], spec: Manifest) -> bool:
    """Whether the storage initializer decrypts the model; a ClusterStorageContainer may set only the variable."""
    found = _initializer(spec) or {}
    variable = tools.find_by_name(tools.entries(found, "env", "spec.initContainers[]"), tools.CONFIDENTIAL_VARIABLE)
    is_set = variable is not None and str(variable.get("value", "")).lower() == "true"
    return is_set or annotations.get(tools.CONFIDENTIAL) == "true"


def _serving(spec: Manifest) -> list[Manifest]:
    """Return the containers into which KServe mounts the model."""
    found = tools.entries(spec, "containers", "spec")
    main = tools.find_by_name(found, tools.SERVING) or tools.find_by_name(found, tools.WORKER)
    if main is None and _initializer(spec) is not None:
        # The tokenizer of an LLMInferenceService needs a few files only, and its initializer downloads no others.
        main = tools.find_by_name(found, tools.LLM_SERVING)
    transformer = tools.find_by_name(found, tools.TRANSFORMER)
    return [] if main is None else [main, transformer] if transformer else [main]


def _model_volume(spec: Manifest) -> Manifest | None:
    return tools.find_by_name(tools.entries(spec, "volumes", "spec"), MODEL_VOLUME)


def _has_own_volume(spec: Manifest) -> bool:
    """Whether the pod defines the volume itself. An `emptyDir` without settings is treated as added by KServe."""
    return (_model_volume(spec) or {"emptyDir": {}}).get("emptyDir") != {}


def _own_claim(spec: Manifest) -> str | None:
    return _claim_of(_model_volume(spec) or {})


def _claim_of(volume: Manifest) -> str | None:
    source = tools.mapping_or_empty(volume, "persistentVolumeClaim", "spec.volumes[]")
    if not source:
        return None
    name = source.get("claimName")
    if not isinstance(name, str):
        raise SettingsError(
            "spec.volumes[].persistentVolumeClaim.claimName",
            str(name or ""),
            "expected the name of a PersistentVolumeClaim",
        )
    return name


def _keep_read_only(metadata: Manifest, owner: _Owner, grant: _Grant | None, notes: list[str]) -> None:
    """Reset the annotation for write access, which KServe and this library obey, where no rule grants it."""
    annotations = tools.strings(metadata, "annotations")
    rules = [grant.rule] if grant else []
    for claim, sub_path in _direct(metadata):
        rule = owner.rule(claim, sub_path)
        rules += [rule] if rule else []
    if tools.requests_write(annotations) and any(rule.access != "write" for rule in rules):
        annotations[READONLY_ANNOTATION] = "true"
        notes.append(f'`{READONLY_ANNOTATION}: "false"` is not granted; the model is mounted read-only')


def _direct(metadata: Manifest) -> list[tuple[str, str]]:
    """Return the claim and directory that KServe mounts for a `pvc://` source or a LocalModelCache."""
    annotations, labels = tools.strings(metadata, "annotations"), tools.strings(metadata, "labels")
    source = annotations.get(tools.SOURCE, "")
    if source and tools.LOCAL_MODEL in labels:
        cached = annotations.get(tools.LOCAL_MODEL_SOURCE, "")
        below = source.removeprefix(cached).removeprefix("/")
        return [(annotations.get(tools.LOCAL_MODEL_CLAIM, ""), f"models/{tools.storage_key(cached)}/{below}")]
    if source.startswith(tools.PVC_SCHEME):
        claim, _, path = source.removeprefix(tools.PVC_SCHEME).partition("/")
        return [(claim, path)]
    return []


def _share(spec: Manifest, grant: _Grant, *, is_writing: bool) -> None:
    volume = {"name": MODEL_VOLUME, "persistentVolumeClaim": {"claimName": grant.claim}}
    present = _model_volume(spec)
    if present is None:
        tools.append(spec, "volumes", volume, "spec")
    elif _claim_of(present) is None:
        present.clear()
        present.update(volume)
    serving = _serving(spec)
    for _, container in tools.containers(spec):
        is_serving = any(container is one for one in serving)
        # The initializer gets the whole store, so that it can find existing models; the server gets one model.
        _set_sub_path(container, grant.sub_path if is_serving else grant.rule.sub_path)
    for container in serving if grant.sub_path else ():
        if tools.find_by_name(_mounts(container), MODEL_VOLUME) is None:
            mount = tools.make_mount(grant.sub_path, read_only=not is_writing)
            tools.append(container, "volumeMounts", mount, "spec.containers[]")


def _set_sub_path(container: Manifest, sub_path: str) -> None:
    for mount in _mounts(container):
        if sub_path and mount.get("name") == MODEL_VOLUME and not (mount.get("subPath") or mount.get("subPathExpr")):
            mount["subPath"] = sub_path


def _mounts(container: Manifest) -> list[Manifest]:
    return tools.entries(container, "volumeMounts", "spec.containers[]")


def _confine(spec: Manifest, owner: _Owner, grant: _Grant | None, notes: list[str]) -> None:
    """Check the directory of every mount of a governed claim, and make it read-only unless a rule grants more."""
    uses = _uses(spec)
    names: set[object] = set()
    for volume in tools.entries(spec, "volumes", "spec"):
        name, claim = volume.get("name"), _claim_of(volume)
        if not isinstance(name, str) or name in names:
            raise SettingsError("spec.volumes[].name", str(name or ""), "every volume needs a name of its own")
        names.add(name)
        rules = owner.rules(claim) if claim else ()
        if claim is None or not rules:
            continue
        if grant is not None and name == MODEL_VOLUME and _requests_nothing_else(spec, grant):
            rules = (grant.rule,)
        if all(rule.access == "read" for rule in rules):
            # This applies to all mounts, including those that KServe adds later.
            volume["persistentVolumeClaim"]["readOnly"] = True
        for use in uses.get(name, ()):
            _confine_use(use, volume, claim, owner, rules, notes)


@attrs.frozen
class _Use:
    """
    What a container requests of a volume: a mount, or None for a block device.
    """

    kind: str
    container: Manifest
    mount: Manifest | None


def _uses(spec: Manifest) -> dict[object, list[_Use]]:
    """Return what all containers request, by the name of the volume: a pod may have many of both."""
    found: dict[object, list[_Use]] = {}
    for kind, container in tools.containers(spec):
        for device in tools.entries(container, "volumeDevices", "spec.containers[]"):
            found.setdefault(_hashable(device.get("name")), []).append(_Use(kind, container, None))
        for mount in _mounts(container):
            found.setdefault(_hashable(mount.get("name")), []).append(_Use(kind, container, mount))
    return found


def _hashable(name: object) -> str | None:
    # Anything else names no volume.
    return name if isinstance(name, str) else None


def _requests_nothing_else(spec: Manifest, grant: _Grant) -> bool:
    """Whether a pod gets the default claim, and no container mounts a directory outside of the default rule's."""
    mounts = [mount for _, container in tools.containers(spec) for mount in _mounts(container)]
    paths = [_path(mount) for mount in mounts if mount.get("name") == MODEL_VOLUME]
    return grant.is_default and all(grant.rule.covers(path) for path in paths)


def _confine_use(
    use: _Use, volume: Manifest, claim: str, owner: _Owner, rules: tuple[Rule, ...], notes: list[str]
) -> None:
    name, mount = use.container.get("name"), use.mount
    if mount is None:
        raise PolicyError(
            f"claim {claim}", f"container `{name}` requests it as a block device, which would bypass directories"
        )
    is_initializer = use.kind == "initContainers" and name == tools.INITIALIZER
    # Where the volume itself is read-only, the mount for KServe's initializer is not changed: KServe may add it later.
    is_volume_read_only = is_initializer and volume["persistentVolumeClaim"].get("readOnly") is True
    granted = _access(mount, claim, owner, rules)
    may_write = granted == "write" or (granted == "download" and is_initializer)
    if not (may_write or is_volume_read_only or mount.get("readOnly") is True):
        mount["readOnly"] = True
        notes.append(f"container `{name}` mounts claim `{claim}` read-only: the policy grants `{granted}`")


def _access(mount: Manifest, claim: str, owner: _Owner, rules: tuple[Rule, ...]) -> Access:
    """Return the access of the first of some rules for the directory of a mount, else of the first rule of all."""
    sub_path = _path(mount)
    rule = next((rule for rule in rules if rule.covers(sub_path)), None) or owner.rule(claim, sub_path)
    assert rule is not None, "`owner.rules` is not empty"
    return rule.access


def _path(mount: Manifest) -> str:
    # The variables of a `subPathExpr` are expanded when the container starts, so it needs a rule for the whole claim.
    return "" if mount.get("subPathExpr") else str(mount.get("subPath") or "")


def _directories(rules: tuple[Rule, ...]) -> str:
    return ", ".join(f"`{rule.sub_path}`" for rule in rules)
