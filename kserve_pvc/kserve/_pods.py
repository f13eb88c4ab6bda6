"""
What happens to a pod: the shared claim takes the place of the `emptyDir` that KServe would make, and no more is granted
than the policy does.

KServe decides by names: it leaves alone a volume or a mount whose name it would use itself. So this works before
KServe's own webhook as well as after it, with the same outcome, and once more changes nothing.
"""

from __future__ import annotations

import attrs

from kserve_pvc._settings import READONLY_ANNOTATION
from kserve_pvc.errors import PolicyError, SettingsError, printable
from kserve_pvc.kserve import _manifest_tools as objects
from kserve_pvc.kserve._manifest_tools import MODEL_VOLUME, Manifest
from kserve_pvc.kserve._policy import Policy, Rule, check_claim, check_sub_path

# What the owner of a service may wish: the claim (empty: none, not even a default one), and the directory to be served.
CLAIM = "kserve-pvc/claim"
SUB_PATH = "kserve-pvc/sub-path"


@attrs.frozen(kw_only=True)
class Admitted:
    """
    A pod as it may run, the claim that it shares if any, and what its owner should know.
    """

    pod: Manifest
    claim: str | None
    notes: tuple[str, ...]


@attrs.frozen(kw_only=True)
class _Owner:
    """
    Whose pod it is, and the policy for it.
    """

    namespace: str
    service_account: str
    policy: Policy

    def rules(self, claim: str) -> tuple[Rule, ...]:
        """The rules for a claim; empty if no rule of this namespace speaks of it."""
        found = self.policy.rules_for(self.namespace, self.service_account, claim)
        if not found and self.policy.governs(self.namespace, claim):
            self.refuse(claim)
        return found

    def rule(self, claim: str, sub_path: str) -> Rule | None:
        """The first rule for a directory of a claim; None if no rule of this namespace speaks of the claim."""
        rules = self.rules(claim)
        found = next((rule for rule in rules if rule.covers(sub_path)), None)
        if rules and found is None:
            raise PolicyError(
                f"claim {claim}", f"`{sub_path or '/'}` is outside of {_directories(rules)}, which this pod may mount"
            )
        return found

    def refuse(self, claim: str) -> None:
        raise PolicyError(
            f"claim {claim}",
            f"no rule lets service account `{self.service_account}` of namespace `{self.namespace}` mount it",
        )


@attrs.frozen(kw_only=True)
class _Wish:
    """
    The claim that a pod shares, the rule that lets it, and the directory that is served.
    """

    claim: str
    rule: Rule
    sub_path: str


def mutate_pod(pod: Manifest, policy: Policy, *, namespace: str | None = None) -> Manifest:
    """
    Give a pod the claim that it asks for and the policy grants, and take from it what the policy does not grant.

    The pod that is given stays as it is. To do it again, before KServe's own mutation or after it, changes nothing
    more.

    Args:
        pod: A pod as KServe's controller makes it, or as KServe's webhook leaves it.
        namespace: Where the pod will run, which a pod in an admission request does not say; else `metadata.namespace`.

    Raises:
        PolicyError: It asks for a claim or a directory that is not for it, or mounts one.
        SettingsError: A part is missing or of the wrong kind.
    """
    return admit(pod, policy, namespace=namespace).pod


def admit(pod: Manifest, policy: Policy, *, namespace: str | None = None) -> Admitted:
    """
    As `mutate_pod`, and say what was done.
    """
    pod = objects.copied(pod, "Pod")
    metadata = objects.mapping(pod, "metadata", "")
    namespace = namespace or metadata.get("namespace")
    if not isinstance(namespace, str) or not namespace:
        raise SettingsError("metadata.namespace", "", "say in which namespace the pod will run")
    spec = objects.mapping(pod, "spec", "")
    owner = _Owner(namespace=namespace, service_account=_service_account(spec), policy=policy)
    notes: list[str] = []
    wish = _wish(metadata, spec, owner, notes)
    _keep_read_only(metadata, owner, wish, notes)
    if wish is not None:
        _share(spec, wish, is_writing=objects.asks_to_write(objects.texts(metadata, "annotations")))
    _confine(spec, owner, notes)
    return Admitted(pod=pod, claim=wish.claim if wish else None, notes=tuple(map(printable, notes)))


def _service_account(spec: Manifest) -> str:
    # The API server fills in `default`, and copies the field of old to the new one, before it asks any webhook.
    name = spec.get("serviceAccountName") or spec.get("serviceAccount") or "default"
    if not isinstance(name, str):
        raise SettingsError("spec.serviceAccountName", str(name), "it must be a text")
    return name


def _wish(metadata: Manifest, spec: Manifest, owner: _Owner, notes: list[str]) -> _Wish | None:
    annotations = objects.texts(metadata, "annotations")
    wished = _wished_claim(annotations, owner)
    obstacle = _obstacle(metadata, spec)
    own = _own_claim(spec)
    if obstacle is None and own and owner.rules(own):
        if wished not in (None, own):
            notes.append(f"the volume `{MODEL_VOLUME}` of the pod itself stays on claim `{own}`")
        wished = own
    elif obstacle is None and _has_own_volume(spec):
        obstacle = f"the pod has a volume `{MODEL_VOLUME}` of its own"
    if wished is None or obstacle is not None:
        if wished is not None and CLAIM in annotations:
            notes.append(f"claim `{wished}` is not mounted: {obstacle}")
        return None
    return _granted(wished, annotations, owner)


def _wished_claim(annotations: dict[str, str], owner: _Owner) -> str | None:
    if CLAIM not in annotations:
        return owner.policy.default_for(owner.namespace, owner.service_account)
    if not annotations[CLAIM]:
        return None
    claim = check_claim(annotations[CLAIM], f"metadata.annotations[{CLAIM}]")
    if not owner.rules(claim):
        owner.refuse(claim)
    return claim


def _granted(claim: str, annotations: dict[str, str], owner: _Owner) -> _Wish:
    if SUB_PATH in annotations:
        sub_path = check_sub_path(annotations[SUB_PATH], f"metadata.annotations[{SUB_PATH}]")
        rule = owner.rule(claim, sub_path)
    else:
        rule = owner.rules(claim)[0]
        sub_path = rule.sub_path
    assert rule is not None, "a claim is granted by a rule"
    return _Wish(claim=claim, rule=rule, sub_path=sub_path)


def _obstacle(metadata: Manifest, spec: Manifest) -> str | None:
    """Why KServe's storage initializer does not download into a volume of this pod."""
    annotations = objects.texts(metadata, "annotations")
    source = annotations.get(objects.SOURCE)
    if source is None:
        return "KServe downloads nothing for this pod"
    if objects.AGENT in annotations:
        return "KServe's agent downloads for this pod"
    if objects.LOCAL_MODEL in objects.texts(metadata, "labels"):
        return "the model comes from a LocalModelCache"
    if source.startswith(objects.OCI_SCHEMES):
        return "the model comes from an image"
    if source.startswith(objects.PVC_SCHEME):
        return "the model is served from a claim where it lies"
    return None if _serving(spec) else f"the pod has no container `{objects.SERVING}`"


def _serving(spec: Manifest) -> list[Manifest]:
    """The containers into which KServe mounts the model."""
    found = objects.entries(spec, "containers", "spec")
    main = objects.named(found, objects.SERVING) or objects.named(found, objects.WORKER)
    transformer = objects.named(found, objects.TRANSFORMER)
    return [] if main is None else [main, transformer] if transformer else [main]


def _model_volume(spec: Manifest) -> Manifest | None:
    return objects.named(objects.entries(spec, "volumes", "spec"), MODEL_VOLUME)


def _has_own_volume(spec: Manifest) -> bool:
    """Whether the pod brings the volume. An `emptyDir` without settings is what KServe adds, whoever wrote it."""
    return (_model_volume(spec) or {"emptyDir": {}}).get("emptyDir") != {}


def _own_claim(spec: Manifest) -> str | None:
    return _claim_of(_model_volume(spec) or {})


def _claim_of(volume: Manifest) -> str | None:
    source = objects.looked_up(volume, "persistentVolumeClaim", "spec.volumes[]")
    if not source:
        return None
    name = source.get("claimName")
    if not isinstance(name, str):
        raise SettingsError(
            "spec.volumes[].persistentVolumeClaim.claimName", str(name or ""), "name a PersistentVolumeClaim"
        )
    return name


def _keep_read_only(metadata: Manifest, owner: _Owner, wish: _Wish | None, notes: list[str]) -> None:
    """Take back the annotation that asks to write where no rule grants it: KServe, and our own library in the pod, obey it."""
    annotations = objects.texts(metadata, "annotations")
    rules = [wish.rule] if wish else []
    for claim, sub_path in _direct(metadata):
        rule = owner.rule(claim, sub_path)
        rules += [rule] if rule else []
    if objects.asks_to_write(annotations) and any(rule.access != "write" for rule in rules):
        annotations[READONLY_ANNOTATION] = "true"
        notes.append(f'`{READONLY_ANNOTATION}: "false"` is not granted here, the model is mounted read-only')


def _direct(metadata: Manifest) -> list[tuple[str, str]]:
    """The claim and directory that KServe mounts for a `pvc://` source or a LocalModelCache."""
    annotations, labels = objects.texts(metadata, "annotations"), objects.texts(metadata, "labels")
    source = annotations.get(objects.SOURCE, "")
    if source and objects.LOCAL_MODEL in labels:
        below = source.removeprefix(annotations.get(objects.LOCAL_MODEL_SOURCE, ""))
        path = f"models/{labels[objects.LOCAL_MODEL]}/{below}"
        return [(annotations.get(objects.LOCAL_MODEL_CLAIM, ""), path)]
    if source.startswith(objects.PVC_SCHEME):
        claim, _, path = source.removeprefix(objects.PVC_SCHEME).partition("/")
        return [(claim, path)]
    return []


def _share(spec: Manifest, wish: _Wish, *, is_writing: bool) -> None:
    volume = {"name": MODEL_VOLUME, "persistentVolumeClaim": {"claimName": wish.claim}}
    present = _model_volume(spec)
    if present is None:
        objects.append(spec, "volumes", volume, "spec")
    elif _claim_of(present) is None:
        present.clear()
        present.update(volume)
    serving = _serving(spec)
    for _, container in objects.containers(spec):
        is_serving = any(container is one for one in serving)
        # The initializer sees the whole store, so that it can find what is there already; the server sees one model.
        _aim(container, wish.sub_path if is_serving else wish.rule.sub_path)
    for container in serving if wish.sub_path else ():
        if objects.named(_mounts(container), MODEL_VOLUME) is None:
            mount = objects.mount(wish.sub_path, read_only=not is_writing)
            objects.append(container, "volumeMounts", mount, "spec.containers[]")


def _aim(container: Manifest, sub_path: str) -> None:
    for mount in _mounts(container):
        if sub_path and mount.get("name") == MODEL_VOLUME and not (mount.get("subPath") or mount.get("subPathExpr")):
            mount["subPath"] = sub_path


def _mounts(container: Manifest) -> list[Manifest]:
    return objects.entries(container, "volumeMounts", "spec.containers[]")


def _confine(spec: Manifest, owner: _Owner, notes: list[str]) -> None:
    """See to it that every governed claim is mounted where, and as, the rules allow."""
    for volume in objects.entries(spec, "volumes", "spec"):
        claim = _claim_of(volume)
        rules = owner.rules(claim) if claim else ()
        if claim is None or not rules:
            continue
        if all(rule.access == "read" for rule in rules):
            # For all mounts at once, also for those that KServe will add.
            volume["persistentVolumeClaim"]["readOnly"] = True
        for kind, container in objects.containers(spec):
            _confine_container(kind, container, volume, claim, owner, notes)


def _confine_container(
    kind: str, container: Manifest, volume: Manifest, claim: str, owner: _Owner, notes: list[str]
) -> None:
    name = container.get("name")
    if any(
        device.get("name") == volume.get("name")
        for device in objects.entries(container, "volumeDevices", "spec.containers[]")
    ):
        raise PolicyError(f"claim {claim}", f"container `{name}` would have it as a block device, past its directories")
    is_initializer = kind == "initContainers" and name == objects.INITIALIZER
    # The mount that KServe adds for its initializer, maybe later, stays as it is where the volume itself is read-only.
    is_closed = is_initializer and volume["persistentVolumeClaim"].get("readOnly") is True
    for mount in (mount for mount in _mounts(container) if mount.get("name") == volume.get("name")):
        rule = owner.rule(claim, _directory(mount, claim, owner))
        granted = rule.access if rule else "write"
        may_write = granted == "write" or (granted == "download" and is_initializer)
        if not (may_write or is_closed or mount.get("readOnly") is True):
            mount["readOnly"] = True
            notes.append(f"container `{name}` mounts claim `{claim}` read-only: the policy grants `{granted}`")


def _directory(mount: Manifest, claim: str, owner: _Owner) -> str:
    if mount.get("subPathExpr"):
        # What its variables hold is known when the container starts, so only who may mount everything may use it.
        owner.rule(claim, "")
        return ""
    return str(mount.get("subPath") or "")


def _directories(rules: tuple[Rule, ...]) -> str:
    return ", ".join(f"`{rule.sub_path}`" for rule in rules)
