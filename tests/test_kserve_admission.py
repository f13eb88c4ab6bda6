"""
What an AdmissionReview is answered: by a function, without a server.
"""

import base64
import json
from copy import deepcopy

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kserve_pvc.kserve import Policy, mutate_pod, read_policy
from kserve_pvc.kserve._admission import MAX_DEPTH, BadReviewError, decide, patch, read_review

jsonpatch = pytest.importorskip("jsonpatch", reason="`jsonpatch` is not installed, which applies the patches")

SOURCE = "internal.serving.kserve.io/storage-initializer-sourceuri"
GRANTS = read_policy(
    {
        "version": 1,
        "rules": [
            {"namespaces": ["team"], "claim": "models", "subPath": "tenants/team", "access": "download"},
            {"namespaces": ["others"], "claim": "secret-models", "access": "write"},
        ],
    }
)
CANARY = "canary-of-a-secret"


def pod(claim="models", **annotations):
    """
    A pod as the API server sends it: without a namespace, and with secrets where people put them.
    """
    wishes = {f"kserve-pvc/{name.replace('_', '-')}": value for name, value in annotations.items()}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "generateName": "llama-predictor-",
            "annotations": {SOURCE: f"https://u:{CANARY}@host/m?sig={CANARY}", "kserve-pvc/claim": claim, **wishes},
            "labels": {"serving.kserve.io/inferenceservice": "llama"},
        },
        "spec": {
            "containers": [{"name": "kserve-container", "env": [{"name": "TOKEN", "value": CANARY}]}],
            "serviceAccountName": "default",
        },
    }


def review(found=None, *, version="v1", **request):
    """
    What the API server asks about a pod that is created in the namespace `team`.
    """
    found = pod() if found is None else found
    request = {
        "uid": "705ab4f5",
        "kind": {"group": "", "version": "v1", "kind": "Pod"},
        "resource": {"group": "", "version": "v1", "resource": "pods"},
        "namespace": "team",
        "operation": "CREATE",
        "userInfo": {"username": "system:serviceaccount:kube-system:replicaset-controller"},
        "object": found,
        "dryRun": False,
        **request,
    }
    return {"apiVersion": f"admission.k8s.io/{version}", "kind": "AdmissionReview", "request": request}


def decided(asked, grants=GRANTS):
    """
    The decision about a review that went over the wire, which is answered without an error.
    """
    decision = decide(read_review(json.dumps(asked).encode()), grants)
    assert CANARY not in json.dumps(decision.audit)
    return decision


def operations(decision):
    return json.loads(base64.b64decode(decision.response["response"]["patch"]))


@pytest.mark.parametrize("version", ["v1", "v1beta1"])
def test_a_pod_gets_its_claim(version):
    """
    The answer has the version and uid of the question, and a patch that makes what `mutate_pod` makes.
    """
    asked = review(version=version)

    decision = decided(asked)

    response = decision.response["response"]
    assert decision.outcome == "mutated"
    assert decision.response["apiVersion"] == f"admission.k8s.io/{version}"
    assert decision.response["kind"] == "AdmissionReview"
    assert {name: value for name, value in response.items() if name != "patch"} == {
        "uid": "705ab4f5",
        "allowed": True,
        "patchType": "JSONPatch",
    }
    expected = mutate_pod(pod(), GRANTS, namespace="team")
    assert jsonpatch.apply_patch(pod(), operations(decision)) == expected
    assert expected["spec"]["volumes"] == [
        {"name": "kserve-provision-location", "persistentVolumeClaim": {"claimName": "models"}}
    ]
    assert decision.audit == {
        "decision": "mutated",
        "uid": "705ab4f5",
        "namespace": "team",
        "pod": "llama-predictor-",
        "service_account": "default",
        "user": "system:serviceaccount:kube-system:replicaset-controller",
        "dry_run": False,
        "claim": "models",
        "notes": [],
    }


def test_a_second_call_patches_nothing():
    """
    A pod that comes again, as when another webhook has changed it, is allowed without a patch.
    """
    decision = decided(review(mutate_pod(pod(), GRANTS, namespace="team")))

    assert decision.outcome == "unchanged"
    assert decision.response["response"] == {"uid": "705ab4f5", "allowed": True}


def test_a_dry_run_is_answered_as_any_other():
    """
    A dry run gets the same patch, as nothing is stored, and the audit line says that it is one.
    """
    real, dry = decided(review()), decided(review(dryRun=True))

    assert dry.response == real.response
    assert dry.audit == {**real.audit, "dry_run": True}


@pytest.mark.parametrize(
    ("found", "request_fields", "code", "message"),
    [
        (
            pod("secret-models"),
            {},
            403,
            "`claim secret-models` is refused: no rule allows service account `default` of namespace `team`",
        ),
        (
            pod(),
            {"namespace": "elsewhere"},
            403,
            "no rule allows service account `default` of namespace `elsewhere` to mount it",
        ),
        (pod(sub_path="tenants/team/../other"), {}, 403, "a name may not climb with `..`"),
        (pod(sub_path="tenants/other"), {}, 403, "`tenants/other` is outside of `tenants/team`"),
        (pod(sub_path="tenants/team\n"), {}, 403, "tenants/team\\n` is refused: a name may hold no NUL, control"),
        (
            pod("models,secret-models"),
            {},
            400,
            "`models,secret-models` for `metadata.annotations[kserve-pvc/claim]`; expected up to 253 lowercase letters",
        ),
        (
            pod("models\nsecret-models"),
            {},
            400,
            "`models\\nsecret-models` for `metadata.annotations[kserve-pvc/claim]`; "
            "expected up to 253 lowercase letters",
        ),
        (pod("m" * 100_000), {}, 400, "kserve-pvc: invalid value `mmm"),
        (pod(), {"namespace": ""}, 400, "the request has no `namespace`"),
        (pod(), {"namespace": 7}, 400, "the request has no `namespace`"),
        (pod(), {"object": None}, 400, "invalid value `NoneType` for `manifest`; expected a Pod"),
        (pod(), {"object": {"kind": "Pod", "spec": []}}, 400, "invalid value `list` for `spec`; expected a mapping"),
    ],
)
def test_what_is_not_granted_is_denied_with_a_reason(found, request_fields, code, message):
    """
    A claim of another tenant, a directory outside of one's own and an annotation that means nothing are denied, and the
    owner told.
    """
    decision = decided(review(found, **request_fields))

    response = decision.response["response"]
    assert (decision.outcome, response["allowed"], "patch" in response) == ("denied", False, False)
    assert response["status"]["code"] == code
    assert message in response["status"]["message"]
    assert len(response["status"]["message"]) < 1100
    assert decision.audit["reason"] in response["status"]["message"]


def test_the_namespace_of_a_pod_counts_for_nothing():
    """
    A pod cannot name the namespace whose rules it wants.
    """
    found = pod("secret-models")
    found["metadata"]["namespace"] = "others"

    decision = decided(review(found))

    assert "of namespace `team` to mount it" in decision.response["response"]["status"]["message"]


@pytest.mark.parametrize(
    "request_fields",
    [
        {"operation": "DELETE", "object": None},
        {"operation": "UPDATE"},
        {
            "operation": "CONNECT",
            "subResource": "exec",
            "kind": {"group": "", "version": "v1", "kind": "PodExecOptions"},
        },
        {"operation": "CREATE", "subResource": "binding"},
        {"kind": {"group": "apps", "version": "v1", "kind": "Deployment"}},
        {"kind": None},
        {"operation": []},
    ],
)
def test_what_is_no_new_pod_is_let_through(request_fields):
    """
    A review that is not about the creation of a pod is allowed as it is, and counted apart.
    """
    decision = decided(review(**request_fields))

    assert decision.outcome == "ignored"
    assert decision.response["response"] == {"uid": "705ab4f5", "allowed": True}


def test_a_container_for_debugging_gets_no_more_than_the_others():
    """
    A container that is added to a running pod is confined as the first ones were, and nothing else of the pod is
    touched.
    """
    found = mutate_pod(pod(), GRANTS, namespace="team")
    found["spec"]["containers"][0]["volumeMounts"][0].pop("readOnly")
    found["spec"]["ephemeralContainers"] = [
        {
            "name": "debug",
            "volumeMounts": [{"name": "kserve-provision-location", "mountPath": "/m", "subPath": "tenants/team"}],
        }
    ]
    outside = deepcopy(found)
    outside["spec"]["ephemeralContainers"][0]["volumeMounts"][0]["subPath"] = "tenants"

    confined = decided(review(found, operation="UPDATE", subResource="ephemeralcontainers"))
    denied = decided(review(outside, operation="UPDATE", subResource="ephemeralcontainers"))

    assert operations(confined) == [
        {"op": "add", "path": "/spec/ephemeralContainers/0/volumeMounts/0/readOnly", "value": True}
    ]
    assert "`tenants` is outside of `tenants/team`" in denied.response["response"]["status"]["message"]


def test_the_owner_is_warned():
    """
    What was not granted, though the pod may run, is a warning of the length that the API server passes on.
    """
    found = pod()
    found["metadata"]["annotations"]["storage.kserve.io/readonly"] = "false"
    found["spec"]["containers"].append(
        {
            "name": "x" * 300,
            "volumeMounts": [{"name": "kserve-provision-location", "mountPath": "/m", "subPath": "tenants/team/a"}],
        }
    )

    decision = decided(review(found))

    first, second = decision.response["response"]["warnings"]
    assert first == '`storage.kserve.io/readonly: "false"` is not granted; the model is mounted read-only'
    assert len(second) == 256
    changed = jsonpatch.apply_patch(found, operations(decision))
    assert changed["metadata"]["annotations"]["storage.kserve.io/readonly"] == "true"


def test_names_are_escaped_in_a_patch():
    """
    The slash and the tilde in a name are written as RFC 6901 says.
    """
    before, after = {"a/b": {"~x": 1}, "m~n": []}, {"a/b": {"~x": 2, "c~/d": 3}, "m~n": [0]}

    assert list(patch(before, after)) == [
        {"op": "replace", "path": "/a~1b/~0x", "value": 2},
        {"op": "add", "path": "/a~1b/c~0~1d", "value": 3},
        {"op": "add", "path": "/m~0n/-", "value": 0},
    ]


SCALARS = st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from(["", "a", "~", "/", "~1", "é"])
DOCUMENTS = st.recursive(
    SCALARS,
    lambda below: (
        st.lists(below, max_size=4) | st.dictionaries(st.sampled_from(["", "a", "~", "/", "~1"]), below, max_size=4)
    ),
)


@settings(max_examples=500, deadline=None)
@given(before=DOCUMENTS, after=DOCUMENTS)
@example(before=[True, 0, {"a": False}], after=[1, False, {"a": 0}])
def test_a_patch_makes_one_document_of_another(before, after):
    """
    What another implementation makes of the patch is the document that was meant, and equal documents need none.
    """
    found = list(patch(before, after))

    # That library takes 1 for True, as Python does; JSON does not.
    assert json.dumps(jsonpatch.apply_patch(deepcopy(before), found), sort_keys=True) == json.dumps(
        after, sort_keys=True
    )
    assert list(patch(after, deepcopy(after))) == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe{", "not valid JSON"),
        (b'{"a": NaN}', "not valid JSON"),
        (b'{"kind": "AdmissionReview", "kind": "Pod"}', "not valid JSON"),
        (b"9" * 5000, "not valid JSON"),
        (b"[" * 400_000, "not valid JSON"),
        (b"[" * 1_000_000, "the body holds more than 500000 values"),
        (b"[" + b"{}," * 300_000 + b"{}]", "the body holds more than 500000 values"),
        (b'{"a":' * 200_000 + b"1" + b"}" * 200_000, "not valid JSON"),
        (b"[]", "expected an AdmissionReview of admission.k8s.io/v1 or admission.k8s.io/v1beta1"),
        (b"null", "expected an AdmissionReview"),
        (
            b'{"kind": "AdmissionReview", "apiVersion": "admission.k8s.io/v2", "request": {"uid": "x"}}',
            "expected an AdmissionReview",
        ),
        (
            b'{"kind": "AdmissionReview", "apiVersion": ["admission.k8s.io/v1"], "request": {"uid": "x"}}',
            "expected an AdmissionReview",
        ),
        (b'{"kind": "Pod", "apiVersion": "admission.k8s.io/v1"}', "expected an AdmissionReview"),
        (b'{"kind": "AdmissionReview", "apiVersion": "admission.k8s.io/v1"}', "the review has no `request.uid`"),
        (b'{"kind": "AdmissionReview", "apiVersion": "admission.k8s.io/v1", "request": {}}', "has no `request.uid`"),
        (
            b'{"kind": "AdmissionReview", "apiVersion": "admission.k8s.io/v1", "request": {"uid": 3}}',
            "has no `request.uid`",
        ),
        (
            json.dumps(review(object={"a": [[]]})).encode().replace(b"[[]]", b"[" * MAX_DEPTH + b"]" * MAX_DEPTH),
            "nested deeper than 64",
        ),
    ],
    ids=range(19),
)
def test_what_is_no_review_is_refused(body, message):
    """
    What cannot be read, or not be answered since it has no uid, is an error of the request.
    """
    with pytest.raises(BadReviewError) as raised:
        read_review(body)

    assert message in str(raised.value)


@settings(max_examples=300, deadline=None)
@given(
    found=DOCUMENTS,
    place=st.sampled_from(["object", "namespace", "kind", "operation", "userInfo", "dryRun", "subResource"]),
)
def test_whatever_a_request_holds_it_is_answered(found, place):
    """
    A request with anything in any place gets an answer that can be sent, and no exception.
    """
    decision = decided(review(**{place: found}))

    assert json.loads(json.dumps(decision.response))["response"]["uid"] == "705ab4f5"


NAMES = [
    "name",
    "volumeMounts",
    "persistentVolumeClaim",
    "claimName",
    "subPath",
    "readOnly",
    "emptyDir",
    "mountPath",
    "volumeDevices",
]
WORDS = SCALARS | st.sampled_from(
    ["models", "kserve-provision-location", "kserve-container", "storage-initializer", "tenants/team"]
)
STRANGE = st.recursive(
    WORDS, lambda below: st.lists(below, max_size=3) | st.dictionaries(st.sampled_from(NAMES), below, max_size=4)
)


@settings(max_examples=600, deadline=None)
@given(
    found=STRANGE,
    place=st.sampled_from(["metadata", "spec", "annotations", "labels", "containers", "volumes", "initContainers"]),
)
def test_whatever_a_pod_holds_it_is_answered(found, place):
    """
    A pod with anything in any place gets an answer that can be sent, and no exception.
    """
    strange = pod()
    {"annotations": strange["metadata"], "labels": strange["metadata"]}.get(place, strange["spec"])[place] = found
    if place in ("metadata", "spec"):
        strange[place] = found

    decision = decided(review(strange))

    assert json.loads(json.dumps(decision.response))["response"]["uid"] == "705ab4f5"


def test_without_rules_nothing_is_granted():
    """
    An empty policy denies every wish, and leaves pods without one as they are.
    """
    quiet = pod()
    del quiet["metadata"]["annotations"]["kserve-pvc/claim"]

    assert [decided(review(found), Policy()).outcome for found in (pod(), quiet)] == ["denied", "unchanged"]


@pytest.mark.parametrize("name", ["v", None, 5, ["v"]], ids=str)
def test_volumes_of_one_name_are_refused(name):
    """
    A pod with two volumes of one name, which Kubernetes would refuse after the webhook, or with one of none, is denied:
    which of them a mount means is not decided here.
    """
    volumes = [{"name": other, "emptyDir": {}} for other in ("v", name)]
    decision = decided(review({**pod(), "spec": {"containers": [{"name": "kserve-container"}], "volumes": volumes}}))

    assert decision.outcome == "denied"
    assert "every volume needs a name of its own" in decision.audit["reason"]


@pytest.mark.parametrize("name", [None, 5, ["v"]], ids=str)
def test_a_mount_of_no_name_mounts_nothing(name):
    """
    Names of the wrong type in mounts and devices end in a decision, not in an error.
    """
    container = {"name": "kserve-container", "volumeMounts": [{"name": name}], "volumeDevices": [{"name": name}]}

    assert decided(review({**pod(), "spec": {"containers": [container]}})).outcome in ("mutated", "unchanged")
