"""
InferenceServices and pods that share a claim: what is changed, what is left alone, and what is refused.
"""

import json
import pickle
from copy import deepcopy
from hashlib import sha256
from itertools import permutations, product
from pathlib import Path

import kserve_rules
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import kserve_pvc.kserve
from kserve_pvc import PolicyError, SettingsError
from kserve_pvc.kserve import Policy, Rule, mutate_pod, read_policy, share_volume
from kserve_pvc.kserve._manifests import obstacle, remarks
from kserve_pvc.kserve._pods import admit

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed, the extra `kserve`")

SOURCE = "internal.serving.kserve.io/storage-initializer-sourceuri"
READONLY = "storage.kserve.io/readonly"
CONFIDENTIAL = "internal.serving.kserve.io/confidential-enabled"
VOLUME = "kserve-provision-location"
CASES = yaml.safe_load((Path(__file__).parent / "data" / "kserve" / "pods.yaml").read_text(encoding="utf-8"))


def pod(spec=None, *, annotations=None, labels=None, **metadata):
    """
    A pod of the namespace `team` as it travels, with empty fields left out.
    """
    metadata = {
        **metadata,
        **({"annotations": annotations} if annotations else {}),
        **({"labels": labels} if labels else {}),
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"namespace": "team", **metadata},
        "spec": deepcopy(spec) or {},
    }


def served(spec=None, *, source="s3://bucket/llama", **annotations):
    """
    A pod that KServe downloads for; `claim` and `sub_path` are its wishes.
    """
    wishes = {f"kserve-pvc/{name.replace('_', '-')}": value for name, value in annotations.items()}
    return pod(spec or {"containers": [{"name": "kserve-container"}]}, annotations={SOURCE: source, **wishes})


def policy(*rules):
    return read_policy({"version": 1, "rules": list(rules)})


def rule(**fields):
    return {"namespaces": ["team"], "claim": "models", "access": "download", **fields}


def case_pod(case, name):
    found = case[name]
    annotations = found.get("annotations", case["pod"].get("annotations"))
    return pod(found["spec"], annotations=annotations, labels=found.get("labels", case["pod"].get("labels")))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["rule"])
def test_a_pod_follows_each_rule(case):
    """
    Each rule of KServe's webhook meets ours as the case says, whichever comes first, and the pod that was given stays
    as it is.
    """
    given, ours = case_pod(case, "pod"), case_pod(case, "ours")
    both = case_pod(case, "both") if "both" in case else kserve_rules.inject(ours)
    before, grants = deepcopy(given), policy(*case["policy"])

    first = mutate_pod(given, grants)
    kserve_first = mutate_pod(kserve_rules.inject(given), grants)
    ours_first = mutate_pod(kserve_rules.inject(first), grants)

    assert given == before
    assert first == ours
    assert kserve_first == both
    assert ours_first == both


NAMES = ["kserve-container", "worker-container", "transformer-container", "sidecar"]
SUB_PATHS = ["", "models/a", "tenants/team", "tenants/team/b", "tenants/other"]
VOLUMES = {
    "ours": {"name": VOLUME, "persistentVolumeClaim": {"claimName": "models"}},
    "a free claim": {"name": VOLUME, "persistentVolumeClaim": {"claimName": "free"}},
    "emptyDir": {"name": VOLUME, "emptyDir": {}},
    "emptyDir with a limit": {"name": VOLUME, "emptyDir": {"sizeLimit": "1Gi"}},
    "another": {"name": "data", "persistentVolumeClaim": {"claimName": "models"}},
    "host": {"name": "data", "hostPath": {"path": "/data"}},
}


@st.composite
def mounts(draw):
    optional = {}
    if draw(st.booleans()):
        optional["subPath"] = draw(st.sampled_from(SUB_PATHS[1:]))
    if draw(st.booleans()):
        optional["readOnly"] = True
    return {
        "name": draw(st.sampled_from([VOLUME, "data"])),
        "mountPath": draw(st.sampled_from(["/mnt/models", "/m"])),
        **optional,
    }


@st.composite
def containers(draw, *names):
    chosen = draw(st.lists(st.sampled_from(names), unique=True, max_size=3))
    return [{"name": name, **({"volumeMounts": [m]} if (m := draw(st.none() | mounts())) else {})} for name in chosen]


DOWNLOADED = ("s3://b/m", "hf://org/m", "https://h/m", "oci://r/m", "oci+fetch://r/m")
LYING = ("pvc://models/models/a", "pvc://models", "pvc://free/x")


@st.composite
def pods(draw, sources=(*DOWNLOADED, *LYING)):
    main, *others = draw(st.permutations(NAMES))
    main = main if main in ("kserve-container", "worker-container") else "kserve-container"
    spec = {"containers": [{"name": main}, *draw(containers(*(name for name in others if name != main)))]}
    if m := draw(st.none() | mounts()):
        spec["containers"][0]["volumeMounts"] = [m]
    if initial := draw(containers("prepare")):
        spec["initContainers"] = initial
    chosen = draw(st.lists(st.sampled_from(sorted(VOLUMES)), max_size=2, unique_by=lambda kind: VOLUMES[kind]["name"]))
    if chosen:
        spec["volumes"] = [VOLUMES[kind] for kind in chosen]
    if draw(st.booleans()):
        spec["serviceAccountName"] = draw(st.sampled_from(["default", "trainer"]))
    annotations, labels = {SOURCE: draw(st.sampled_from(sources))}, {}
    for name, values in (
        ("kserve-pvc/claim", ["models", "models", ""]),
        ("kserve-pvc/sub-path", SUB_PATHS),
        (READONLY, ["false", "false", "true", "False", ""]),
    ):
        if draw(st.booleans()):
            annotations[name] = draw(st.sampled_from(values))
    if draw(st.integers(0, 5)) == 0:
        annotations["internal.serving.kserve.io/agent"] = "true"
    if sources != DOWNLOADED and draw(st.integers(0, 5)) == 0:
        labels["internal.serving.kserve.io/localmodel"] = "cached"
        annotations["internal.serving.kserve.io/localmodel-sourceuri"] = draw(st.sampled_from(sources))
        annotations["internal.serving.kserve.io/localmodel-pvc-name"] = draw(st.sampled_from(["models", "cache"]))
    return pod(spec, annotations=annotations, labels=labels)


ACCESSES = ("read", "download", "write")


@st.composite
def policies(draw, sub_paths=tuple(SUB_PATHS), accesses=ACCESSES):
    count = draw(st.integers(1, 3))
    default = draw(st.none() | st.integers(0, count - 1))
    return policy(
        *(
            rule(
                access=draw(st.sampled_from(accesses)),
                subPath=draw(st.sampled_from(sub_paths)),
                default=index == default,
                serviceAccounts=[draw(st.sampled_from(["*", "trainer"]))],
            )
            for index in range(count)
        )
    )


def outcome(steps, given):
    """
    The pod after several steps, or None where one of them refuses it.
    """
    try:
        for step in steps:
            given = step(given)
    except PolicyError:
        return None
    return given


@settings(max_examples=400, deadline=None)
@given(given=pods(), grants=policies())
def test_the_order_does_not_matter_and_once_more_changes_nothing(given, grants):
    """
    Ours before KServe's rules, after them, or on both sides ends in the same pod, or in a refusal; and then neither
    changes more.
    """
    ours, theirs = lambda found: mutate_pod(found, grants), kserve_rules.inject

    after = outcome([theirs, ours], given)
    around = outcome([ours, theirs, ours], given)

    assert around == after
    once = outcome([ours], given)
    assert once is None or ours(once) == once
    if after is not None:
        assert ours(after) == after
        assert theirs(after) == after


MODEL_VOLUMES = [
    {"emptyDir": {"sizeLimit": "10Gi"}},
    {"ephemeral": {"volumeClaimTemplate": {"spec": {"accessModes": ["ReadWriteOnce"]}}}},
    {"persistentVolumeClaim": {"claimName": "free"}},
    {"persistentVolumeClaim": {"claimName": "models"}},
]


@settings(max_examples=300, deadline=None)
@given(given=pods(), grants=policies(), model_volume=st.sampled_from(MODEL_VOLUMES))
def test_what_kserve_is_configured_to_add_does_not_matter_to_a_pod_that_shares(given, grants, model_volume):
    """
    In the documented order, ours before KServe's and again after it, a pod that gets a claim is the same whatever
    volume the cluster would add, and any other pod is stable after that.
    """

    def ours(found):
        return mutate_pod(found, grants)

    def theirs(found):
        return kserve_rules.inject(found, model_volume)

    plain = outcome([ours, kserve_rules.inject, ours], given)
    first = outcome([lambda found: admit(found, grants).claim], given)

    configured = outcome([ours, theirs, ours], given)

    if first is not None:
        assert configured == plain
    assert configured is None or ours(theirs(configured)) == configured


@settings(max_examples=200, deadline=None)
@given(
    given=pods(sources=DOWNLOADED),
    grants=st.sampled_from(ACCESSES).flatmap(lambda one: policies(sub_paths=("",), accesses=(one,))),
)
def test_where_the_store_is_the_claim_ours_is_done_before_kserve_begins(given, grants):
    """
    Where rules give whole claims and nothing else mounts them, a second call after KServe's rules finds nothing to do.
    """
    first = outcome([lambda found: mutate_pod(found, grants)], given)
    assume(first is not None)

    second = kserve_rules.inject(first)

    assert mutate_pod(second, grants) == second


@settings(max_examples=300, deadline=None)
@given(given=pods(), grants=policies())
def test_no_mount_is_looser_than_the_policy(given, grants):
    """
    After both webhooks, each mount of the claim lies where a rule allows it, and writes only where that rule does: for
    a pod that requests nothing the default rule, for others the first that covers the directory.
    """
    found = outcome([kserve_rules.inject, lambda found: mutate_pod(found, grants)], given)
    assume(found is not None)
    account = found["spec"].get("serviceAccountName", "default")
    rules = [*grants.rules_for("team", account, "models")]
    if not {"kserve-pvc/claim", "kserve-pvc/sub-path"} & given["metadata"]["annotations"].keys():
        rules.sort(key=lambda rule: not rule.default)
    volumes = {
        v["name"]: v
        for v in found["spec"].get("volumes", [])
        if v.get("persistentVolumeClaim", {}).get("claimName") == "models"
    }

    for kind in ("initContainers", "containers"):
        for container in found["spec"].get(kind, []):
            for mount in container.get("volumeMounts", []):
                if mount["name"] in volumes:
                    writes = not (
                        mount.get("readOnly") or volumes[mount["name"]]["persistentVolumeClaim"].get("readOnly")
                    )
                    allowing = next(one for one in rules if one.covers(mount.get("subPath", "")))
                    is_initializer = container["name"] == "storage-initializer"
                    assert (
                        not writes or allowing.access == "write" or (allowing.access == "download" and is_initializer)
                    )
                    asked = given["metadata"]["annotations"].get(READONLY) == "false"
                    is_given = mount in [m for c in given["spec"].get(kind, []) for m in c.get("volumeMounts", [])]
                    assert not writes or asked or is_initializer or is_given or mount.get("subPath")


@pytest.mark.parametrize(
    ("given", "grants", "message"),
    [
        (
            served(claim="models"),
            (),
            "`claim models` is refused: no rule allows service account `default` of namespace `team` to mount it",
        ),
        (
            served(claim="models"),
            (rule(namespaces=["other"]),),
            "no rule allows service account `default` of namespace `team` to mount it",
        ),
        (
            served(claim="models"),
            (rule(serviceAccounts=["trainer"]),),
            "no rule allows service account `default` of namespace `team`",
        ),
        (served(claim="others"), (rule(),), "`claim others` is refused: no rule allows"),
        (served(claim="models", sub_path="../other"), (rule(),), "a name may not climb with `..`"),
        (served(claim="models", sub_path="models/../../x"), (rule(),), "a name may not climb with `..`"),
        (served(claim="models", sub_path="/models"), (rule(),), "a name must be relative"),
        (served(claim="models", sub_path="a//b"), (rule(),), "a name may have no empty or `.` part"),
        (served(claim="models", sub_path="a\nb"), (rule(),), "a name may hold no NUL, control"),
        (
            served(claim="models", sub_path="tenants/b"),
            (rule(subPath="tenants/a"),),
            "`tenants/b` is outside of `tenants/a`",
        ),
        (
            served(claim="models", sub_path="tenants/ab"),
            (rule(subPath="tenants/a"),),
            "`tenants/ab` is outside of `tenants/a`",
        ),
        (served(source="pvc://models/x/../y"), (rule(),), "`x/../y` is outside of ``"),
        (
            served(source="pvc://models/tenants/b"),
            (rule(subPath="tenants/a"),),
            "`tenants/b` is outside of `tenants/a`",
        ),
        (served(source="pvc://models"), (rule(subPath="tenants/a"),), "`/` is outside of `tenants/a`"),
        (
            served(source="pvc://models/x"),
            (rule(serviceAccounts=["trainer"]),),
            "no rule allows service account `default`",
        ),
    ],
)
def test_what_a_pod_asks_for_is_refused(given, grants, message):
    """
    A wish for a claim or directory that no rule grants to this pod, and one that climbs, is an error that names it.
    """
    with pytest.raises(PolicyError) as raised:
        mutate_pod(given, policy(*grants))

    assert message in str(raised.value)
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


def cached(source, sub_path=""):
    """
    A pod whose model comes from the LocalModelCache `llama` on the claim `models`.
    """
    own = {
        SOURCE: source + sub_path,
        "internal.serving.kserve.io/localmodel-sourceuri": source,
        "internal.serving.kserve.io/localmodel-pvc-name": "models",
    }
    spec = {"containers": [{"name": "kserve-container"}]}
    return pod(spec, annotations=own, labels={"internal.serving.kserve.io/localmodel": "llama"})


@pytest.mark.parametrize("source", ["s3://bucket/llama", "s3://bucket/llama/", "hf://owner/m:main", "https://h/ä b"])
@pytest.mark.parametrize("sub_path", ["", "/sub", "sub"])
def test_a_cached_model_is_judged_by_the_directory_that_kserve_mounts(source, sub_path):
    """
    The policy is compared with KServe's storage key of the cached source, however the cache is called, before KServe's
    webhook as after it.
    """
    key = sha256(source.encode()).hexdigest()[:16]
    given = cached(source, sub_path)
    given["metadata"]["annotations"][READONLY] = "false"
    allowed, by_name = policy(rule(subPath=f"models/{key}")), policy(rule(subPath="models/llama"))

    before, after = mutate_pod(given, allowed), mutate_pod(kserve_rules.inject(given), allowed)

    assert before["metadata"]["annotations"][READONLY] == after["metadata"]["annotations"][READONLY] == "true"
    [mount] = kserve_rules.inject(before)["spec"]["containers"][0]["volumeMounts"]
    assert (mount["subPath"].rstrip("/"), mount["readOnly"]) == (
        f"models/{key}/{sub_path.strip('/')}".rstrip("/"),
        True,
    )
    for step in (given, kserve_rules.inject(given)):
        with pytest.raises(PolicyError, match=f"`models/{key}/.*` is outside of `models/llama`"):
            mutate_pod(step, by_name)


def mounting(claim, mount=None, device=None, kind="containers"):
    """
    The spec of a pod that mounts a claim by itself.
    """
    container = {
        "name": "c",
        **({"volumeMounts": [{"name": "v", "mountPath": "/v", **mount}]} if mount is not None else {}),
    }
    container |= {"volumeDevices": [{"name": "v", "devicePath": "/dev/v"}]} if device else {}
    other = [{"name": "other"}] if kind != "containers" else []
    listed = {kind: [container], **({"containers": other} if other else {})}
    return {**listed, "volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": claim}}]}


@pytest.mark.parametrize(
    ("spec", "grants", "message"),
    [
        (mounting("models", {}), rule(serviceAccounts=["trainer"]), "no rule allows service account `default`"),
        (mounting("models"), rule(serviceAccounts=["trainer"]), "no rule allows service account `default`"),
        (mounting("models", {}), rule(subPath="tenants/a"), "`/` is outside of `tenants/a`"),
        (mounting("models", {"subPath": "tenants/b"}), rule(subPath="tenants/a"), "`tenants/b` is outside"),
        (mounting("models", {"subPath": "tenants/a/../b"}), rule(subPath="tenants/a"), "is outside of"),
        (mounting("models", {"subPathExpr": "tenants/a/$(X)"}), rule(subPath="tenants/a"), "`/` is outside of"),
        (
            mounting("models", {"subPath": "tenants/b"}, kind="initContainers"),
            rule(subPath="tenants/a"),
            "`tenants/b` is outside",
        ),
        (
            mounting("models", {"subPath": "tenants/b"}, kind="ephemeralContainers"),
            rule(subPath="tenants/a"),
            "`tenants/b` is outside",
        ),
        (mounting("models", device=True), rule(), "container `c` requests it as a block device"),
    ],
)
def test_what_a_pod_mounts_by_itself_is_refused(spec, grants, message):
    """
    A pod that mounts a governed claim past the rules is refused, with or without KServe.
    """
    with pytest.raises(PolicyError) as raised:
        mutate_pod(pod(spec), policy(grants))

    assert message in str(raised.value)


def test_a_claim_that_no_rule_of_the_namespace_names_is_left_alone():
    """
    A pod may mount claims that the policy does not speak of, or only for other namespaces, as it could without us.
    """
    given = pod(mounting("free", {}))

    assert mutate_pod(given, policy(rule())) == given
    assert mutate_pod(pod(mounting("models", {})), policy(rule(namespaces=["other"]))) == pod(mounting("models", {}))


def test_the_first_rule_that_fits_decides():
    """
    A rule for one service account goes before the rule for all of them.
    """
    grants = policy(rule(access="write", serviceAccounts=["trainer"]), rule(access="read"))
    spec = mounting("models", {})

    trainer = mutate_pod(pod({**spec, "serviceAccountName": "trainer"}), grants)
    other = mutate_pod(pod(spec), grants)

    assert trainer == pod({**spec, "serviceAccountName": "trainer"})
    assert other["spec"]["volumes"] == [
        {"name": "v", "persistentVolumeClaim": {"claimName": "models", "readOnly": True}}
    ]


CLAIM_RULES = [
    rule(subPath="scratch", access="write"),
    rule(subPath="", access="write", serviceAccounts=["trainer"]),
    rule(subPath="tenants/team", access="download"),
    rule(claim="others", access="write"),
]


@pytest.mark.parametrize("access", ["read", "download", "write"])
@pytest.mark.parametrize("account", ["default", "trainer"])
@pytest.mark.parametrize("read_only", [None, "false"])
def test_a_pod_that_requests_nothing_gets_the_default_rule_wherever_it_stands(access, account, read_only):
    """
    Over all orders of the rules, the pod serves the directory of the flagged one with that rule's access, whichever
    webhook is called first, and a second call changes nothing.
    """
    flagged = rule(subPath="approved", access=access, default=True)
    annotations = {SOURCE: "s3://bucket/llama", **({READONLY: read_only} if read_only else {})}
    given = pod({"containers": [{"name": "kserve-container"}], "serviceAccountName": account}, annotations=annotations)

    for rules in permutations([flagged, *CLAIM_RULES]):
        grants = policy(*rules)
        ours_first = mutate_pod(kserve_rules.inject(mutate_pod(given, grants)), grants)
        kserve_first = mutate_pod(kserve_rules.inject(given), grants)

        assert ours_first == kserve_first == mutate_pod(ours_first, grants)
        [volume], [server] = ours_first["spec"]["volumes"], ours_first["spec"]["containers"]
        [initializer] = ours_first["spec"]["initContainers"]
        source = volume["persistentVolumeClaim"]
        assert source == {"claimName": "models", **({"readOnly": True} if access == "read" else {})}
        assert [mount["subPath"] for mount in server["volumeMounts"]] == ["approved"]
        assert [mount["subPath"] for mount in initializer["volumeMounts"]] == ["approved"]
        writes = [mount.get("readOnly") is not True for mount in server["volumeMounts"]]
        assert writes == [access == "write" and read_only == "false"]


def test_a_pod_that_requests_the_claim_or_a_directory_is_not_bound_to_the_default_rule():
    """
    The default is for pods that request nothing: an annotation, or a mount of another directory, is decided by all
    rules.
    """
    grants = policy(rule(subPath="scratch", access="write"), rule(subPath="approved", default=True, access="read"))
    claim = served(claim="models")
    directory = served(sub_path="scratch/x")
    mounted = served(
        {
            "containers": [
                {"name": "kserve-container"},
                {"name": "c", "volumeMounts": [{**WRITE, "subPath": "scratch"}]},
            ],
            "volumes": SHARED,
        }
    )

    found = [mutate_pod(kserve_rules.inject(mutate_pod(one, grants)), grants) for one in (claim, directory, mounted)]

    paths = [[one["spec"][kind][0]["volumeMounts"][0]["subPath"] for one in found] for kind in ("containers",)]
    assert paths == [["scratch", "scratch/x", "approved"]]
    assert [one["spec"]["volumes"] for one in found] == [SHARED] * 3
    assert found[2]["spec"]["containers"][1]["volumeMounts"] == [{**WRITE, "subPath": "scratch"}]


@pytest.mark.parametrize(
    ("first", "second", "clash"),
    [
        ({}, {}, True),
        ({}, {"claim": "others"}, True),
        ({"namespaces": ["*"]}, {"serviceAccounts": ["trainer"]}, True),
        (
            {"serviceAccounts": ["a", "trainer"]},
            {"namespaces": ["b", "team"], "serviceAccounts": ["trainer", "c"]},
            True,
        ),
        ({"namespaces": ["*"], "serviceAccounts": ["trainer"]}, {"serviceAccounts": ["*"]}, True),
        ({"namespaces": ["*", "team"]}, {"namespaces": ["other"]}, True),
        ({"namespaces": ["other"]}, {}, False),
        ({"serviceAccounts": ["a"]}, {"serviceAccounts": ["b", "c"]}, False),
        ({"namespaces": ["*"], "serviceAccounts": ["a"]}, {"serviceAccounts": ["b"]}, False),
        ({"default": False}, {}, False),
    ],
)
def test_two_defaults_of_one_pod_are_an_error(first, second, clash):
    """
    Two flagged rules that could apply to one pod are refused in either order, by the place of the second one; for
    different pods there may be several.
    """
    rules = [rule(**{"default": True, **one}) for one in (first, second)]

    for ordered in (rules, rules[::-1]):
        if not clash:
            policy(rule(), *ordered)
            continue
        with pytest.raises(SettingsError) as raised:
            policy(rule(), *ordered)
        assert "invalid value `true` for `rules[2].default`; `rules[1]` is the default of the same" in str(raised.value)


def test_the_namespace_of_the_request_counts():
    """
    The namespace that is given goes before what the pod says of itself.
    """
    given = served(claim="models")

    with pytest.raises(PolicyError, match="namespace `other`"):
        mutate_pod(given, policy(rule()), namespace="other")


def test_what_was_done_is_told():
    """
    Whoever owns the pod is told why a wish was not granted, with unprintable characters escaped.
    """
    own = served(
        claim="models",
        spec={"containers": [{"name": "kserve-container"}], "volumes": [VOLUMES["emptyDir with a limit"]]},
    )
    writing = served(claim="models", spec={"containers": [{"name": "kserve-container"}]})
    writing["metadata"]["annotations"][READONLY] = "false"
    closed = pod(mounting("models", {}))
    closed["spec"]["containers"][0]["name"] = "a\x1b[2J"

    notes = [admit(given, policy(rule())).notes for given in (own, writing, closed)]

    assert notes == [
        (f"claim `models` is not mounted: the pod has its own volume `{VOLUME}`",),
        (f'`{READONLY}: "false"` is not granted; the model is mounted read-only',),
        ("container `a\\x1b[2J` mounts claim `models` read-only: the policy grants `download`",),
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "invalid value `NoneType` for `manifest`; expected a Pod as a mapping"),
        ({"kind": "Deployment"}, "invalid value `Deployment` for `kind`; expected a Pod"),
        ({"kind": "Pod"}, "`metadata.namespace` is missing; pass the namespace of the pod"),
        ({"kind": "Pod", "metadata": [], "spec": {}}, "invalid value `list` for `metadata`; expected a mapping"),
        (
            pod({"containers": "many"}) | {"metadata": {"namespace": "t", "annotations": {SOURCE: "s3://a/b"}}},
            "invalid value `str` for `spec.containers`",
        ),
        (
            pod(annotations={READONLY: False}),
            f"invalid value `False` for `metadata.annotations[{READONLY}]`; expected a string: put the value in quotes",
        ),
        (
            pod(
                {
                    "volumes": [
                        {"name": "v", "persistentVolumeClaim": {}},
                        {"name": "w", "persistentVolumeClaim": {"claimName": 1}},
                    ]
                }
            ),
            "claimName",
        ),
        (pod({"serviceAccountName": 7}), "invalid value `7` for `spec.serviceAccountName`"),
        (
            served(claim="Models_"),
            "invalid value `Models_` for `metadata.annotations[kserve-pvc/claim]`; "
            "expected up to 253 lowercase letters",
        ),
    ],
)
def test_what_is_no_pod_is_named(given, message):
    """
    A part that is missing or of the wrong kind is a `SettingsError` that names it.
    """
    with pytest.raises(SettingsError) as raised:
        mutate_pod(given, policy(rule()))

    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "invalid value `[]` for `the policy`; expected a mapping with `version`, `rules`"),
        ({"rules": []}, "`version` is missing; expected `version: 1`"),
        ({"version": True, "rules": []}, "invalid value `True` for `version`"),
        ({"version": 1}, "`rules` is missing; expected a list of up to 10000 rules"),
        (
            {"version": 1, "rules": [], "rule": 2},
            "unknown field `rule`; did you mean `rules`? supported: `version`, `rules`",
        ),
        ({"version": 1, "rules": [[]]}, "invalid value `[]` for `rules[0]`; expected a mapping with `namespaces`"),
        (
            {"version": 1, "rules": [rule(), rule(acces="read")]},
            "unknown field `rules[1].acces`; did you mean `access`? supported: ",
        ),
        ({"version": 1, "rules": [{"claim": "models"}]}, "`rules[0].namespaces` is missing; expected a list of names"),
        (
            {"version": 1, "rules": [{"namespaces": ["team"]}]},
            "`rules[0].claim` is missing; expected the name of a PersistentVolumeClaim",
        ),
        (
            {"version": 1, "rules": [rule(namespaces="team")]},
            "invalid value `team` for `rules[0].namespaces`; expected a list of names",
        ),
        ({"version": 1, "rules": [rule(namespaces=[])]}, "`rules[0].namespaces` is missing; list at least one name"),
        (
            {"version": 1, "rules": [rule(namespaces=["team-*"])]},
            "invalid value `team-*` for `rules[0].namespaces`; expected up to 253 lowercase letters",
        ),
        (
            {"version": 1, "rules": [rule(serviceAccounts=["A b"])]},
            "invalid value `A b` for `rules[0].serviceAccounts`",
        ),
        ({"version": 1, "rules": [rule(claim="-models")]}, "invalid value `-models` for `rules[0].claim`"),
        ({"version": 1, "rules": [rule(claim="a" * 254)]}, "invalid value `aaa"),
        ({"version": 1, "rules": [rule(claim=None)]}, "`rules[0].claim` is missing"),
        (
            {"version": 1, "rules": [rule(access="rw")]},
            "invalid value `rw` for `rules[0].access`; supported: `read`, `download`, `write`",
        ),
        (
            {"version": 1, "rules": [rule(default="yes")]},
            "invalid value `yes` for `rules[0].default`; expected `true` or `false`",
        ),
        ({"version": 1, "rules": [rule(subPath=3)]}, "invalid value `3` for `rules[0].subPath`; expected a directory"),
    ],
)
def test_a_policy_that_means_nothing_names_the_field(document, message):
    """
    An unknown, missing or wrong field of a policy file is named with its place and the remedy.
    """
    with pytest.raises(SettingsError) as raised:
        read_policy(document)

    assert message in str(raised.value)


def test_a_policy_with_a_directory_that_climbs_is_refused():
    """
    A rule cannot be about what lies outside of its claim.
    """
    with pytest.raises(PolicyError, match=r"`rules\[0\].subPath: a/../b` is refused: a name may not climb with `..`"):
        read_policy({"version": 1, "rules": [rule(subPath="a/../b")]})


def test_a_policy_is_a_value():
    """
    What a file says and what a program says are the same policy.
    """
    document = {
        "version": 1,
        "rules": [rule(serviceAccounts=["trainer"], subPath="tenants/a", access="write", default=True)],
    }

    expected = Rule(
        namespaces=("team",),
        claim="models",
        service_accounts=("trainer",),
        sub_path="tenants/a",
        access="write",
        default=True,
    )
    assert read_policy(document) == Policy((expected,))
    assert read_policy(json.loads(json.dumps(document))) == read_policy(document)
    assert Policy().rules == ()


def service(predictor=None, *, annotations=None, **metadata):
    metadata = {"name": "llama", **metadata, **({"annotations": annotations} if annotations else {})}
    predictor = predictor if predictor is not None else {"model": {"storageUri": "s3://bucket/llama"}}
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": metadata,
        "spec": {"predictor": predictor},
    }


MODEL = {"storageUri": "s3://bucket/llama"}
SHARED = [{"name": VOLUME, "persistentVolumeClaim": {"claimName": "models"}}]
READ = {"name": VOLUME, "mountPath": "/mnt/models", "readOnly": True}
WRITE = {"name": VOLUME, "mountPath": "/mnt/models"}


@pytest.mark.parametrize(
    ("given", "arguments", "expected"),
    [
        (service(), {}, service({"model": MODEL, "volumes": SHARED})),
        (
            service(),
            {"read_only": False},
            service({"model": MODEL, "volumes": SHARED}, annotations={READONLY: "false"}),
        ),
        (
            service(),
            {"read_only": True},
            service({"model": MODEL, "volumes": SHARED}, annotations={READONLY: "true"}),
        ),
        (
            service(annotations={READONLY: "false"}),
            {"read_only": True},
            service({"model": MODEL, "volumes": SHARED}, annotations={READONLY: "true"}),
        ),
        (
            service(annotations={READONLY: "false"}),
            {},
            service({"model": MODEL, "volumes": SHARED}, annotations={READONLY: "false"}),
        ),
        (
            service(annotations={READONLY: "False"}),
            {"sub_path": "models/a"},
            service(
                {
                    "model": {**MODEL, "volumeMounts": [{**WRITE, "subPath": "models/a", "readOnly": True}]},
                    "volumes": SHARED,
                },
                annotations={READONLY: "False"},
            ),
        ),
        (
            service(),
            {"sub_path": "models/a", "read_only": False},
            service(
                {"model": {**MODEL, "volumeMounts": [{**WRITE, "subPath": "models/a"}]}, "volumes": SHARED},
                annotations={READONLY: "false"},
            ),
        ),
        (
            service(
                {"sklearn": MODEL, "containers": [{"name": "transformer-container"}], "volumes": [VOLUMES["host"]]}
            ),
            {"sub_path": "a"},
            service(
                {
                    "sklearn": {**MODEL, "volumeMounts": [{**WRITE, "subPath": "a", "readOnly": True}]},
                    "containers": [
                        {"name": "transformer-container", "volumeMounts": [{**WRITE, "subPath": "a", "readOnly": True}]}
                    ],
                    "volumes": [VOLUMES["host"], *SHARED],
                }
            ),
        ),
        (
            service({"containers": [{"image": "mine"}]}),
            {},
            service({"containers": [{"image": "mine", "volumeMounts": [READ]}], "volumes": SHARED}),
        ),
        (
            service(
                {"containers": [{"name": "kserve-container", "env": [{"name": "STORAGE_URI", "value": "s3://b/m"}]}]}
            ),
            {},
            service(
                {
                    "containers": [{"name": "kserve-container", "env": [{"name": "STORAGE_URI", "value": "s3://b/m"}]}],
                    "volumes": SHARED,
                }
            ),
        ),
        (
            service({"model": {"storage": {"key": "x"}}}),
            {},
            service({"model": {"storage": {"key": "x"}}, "volumes": SHARED}),
        ),
        (
            service({"model": {**MODEL, "volumeMounts": [{**READ, "mountPath": "/m"}]}, "volumes": SHARED}),
            {},
            service({"model": {**MODEL, "volumeMounts": [{**READ, "mountPath": "/m"}]}, "volumes": SHARED}),
        ),
    ],
)
def test_a_service_shares_a_claim(given, arguments, expected):
    """
    KServe's volume is named in advance, mounts are added where KServe would make another one, and twice is the same as
    once.
    """
    before = deepcopy(given)

    found = share_volume(given, claim="models", **arguments)

    assert found == expected
    assert given == before
    assert share_volume(found, claim="models", **arguments) == found


def is_writable(shared, runtime):
    """
    Whether the server of a service may write once KServe has made its pod.
    """
    found = kserve_rules.inject(kserve_rules.pod_of(shared, runtime))
    [mount] = found["spec"]["containers"][0]["volumeMounts"]
    return mount.get("readOnly") is not True


VALUES = [None, "true", "false", "False", ""]
OWN_MOUNTS = [None, WRITE, READ, {**WRITE, "subPath": "models/a"}, {**READ, "subPath": "models/a"}]


@pytest.mark.parametrize("read_only", [True, False])
@pytest.mark.parametrize("sub_path", ["", "models/a"])
def test_an_explicit_wish_wins_over_every_annotation_that_kserve_merges(read_only, sub_path):
    """
    With `read_only` the server's mount is what was requested, whatever predictor, service and runtime are annotated
    with, and whether or not the service mounts the volume itself.
    """
    for of_predictor, of_service, of_runtime, own in product(VALUES, VALUES, VALUES, OWN_MOUNTS):
        if sub_path and own and own.get("subPath") != sub_path:
            continue
        predictor = {"model": {**MODEL, **({"volumeMounts": [dict(own)]} if own else {})}}
        predictor |= {"annotations": {READONLY: of_predictor}} if of_predictor is not None else {}
        given = service(predictor, annotations=None if of_service is None else {READONLY: of_service})

        shared = share_volume(given, claim="models", sub_path=sub_path, read_only=read_only)

        runtime = {} if of_runtime is None else {READONLY: of_runtime}
        assert is_writable(shared, runtime) is not read_only, (of_predictor, of_service, of_runtime, own)
        assert share_volume(shared, claim="models", sub_path=sub_path, read_only=read_only) == shared


@pytest.mark.parametrize(
    ("of_predictor", "of_service", "writes"),
    [("false", "true", True), ("true", "false", False), (None, "false", True), ("False", "false", False)],
)
def test_a_mount_of_a_directory_follows_the_annotation_that_kserve_would_obey(of_predictor, of_service, writes):
    """
    Without `read_only` the annotation of the predictor decides, else that of the service, and both stay as they are.
    """
    annotated = {"annotations": {READONLY: of_predictor}} if of_predictor else {}
    given = service({"model": MODEL, **annotated}, annotations={READONLY: of_service})

    shared = share_volume(given, claim="models", sub_path="models/a")

    assert is_writable(shared, {}) is writes
    assert shared["spec"]["predictor"].get("annotations", {}) == annotated.get("annotations", {})
    assert shared["metadata"] == given["metadata"]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (service({"model": {"storageUri": "pvc://claim/x"}}), "its model is served directly from a claim"),
        (service({"model": {"storageUri": "oci://registry/x"}}), "its model comes from an image"),
        (service({"model": {"storageUri": "oci+native://registry/x"}}), "its model comes from an image"),
        (
            service({"model": {"storageUris": [{"uri": "s3://b/m"}]}}),
            "it has several sources (`storageUris`), for which",
        ),
        (service(labels={"internal.serving.kserve.io/localmodel": "x"}), "its model comes from a LocalModelCache"),
        (service({"triton": {}}), "KServe's agent downloads its models, into a volume of its own at `/mnt/models`"),
        (service({"sklearn": {"name": "x"}}), "KServe's agent downloads its models"),
        (service({"model": {"modelFormat": {"name": "sklearn"}}}), "KServe's agent downloads its models"),
        (
            service({"containers": [{"image": "mine", "env": [{"name": "MULTI_MODEL_SERVER", "value": "true"}]}]}),
            "KServe's agent downloads its models",
        ),
        (
            service(
                {"containers": [{"image": "mine", "volumeMounts": [{"name": "data", "mountPath": "/mnt/models"}]}]}
            ),
            "it mounts its own volume `data` at `/mnt/models`",
        ),
        (
            service({"model": {**MODEL, "volumeMounts": [{"name": "data", "mountPath": "/mnt/models/"}]}}),
            "it mounts its own volume `data` at `/mnt/models`",
        ),
        (service({"model": {**MODEL, "confidential": {"enabled": True}}}), "its model is confidential: decrypted,"),
        (service({"sklearn": {**MODEL, "confidential": {"enabled": True}}}), "its model is confidential: decrypted,"),
        (service(annotations={CONFIDENTIAL: "true"}), "its model is confidential: decrypted,"),
        (service({"model": MODEL, "annotations": {CONFIDENTIAL: "true"}}), "its model is confidential: decrypted,"),
        (service(annotations={"serving.kserve.io/deploymentMode": "ModelMesh"}), "ModelMesh downloads its model"),
    ],
)
def test_a_service_without_a_download_stays_as_it_is(given, reason):
    """
    Where KServe downloads nothing into its own volume, there is nothing to share, and the reason is told.
    """
    assert share_volume(given, claim="models", sub_path="a", read_only=False) == given
    assert reason in obstacle(given)


@pytest.mark.parametrize(
    "predictor",
    [
        {"huggingface": {"args": ["--model_id=org/m"]}},
        {"model": {"modelFormat": {"name": "huggingface"}}},
        {"model": {"modelFormat": {"name": "triton"}, "storage": {"path": "m"}}},
        {"model": {"modelFormat": {"name": "triton"}}, "containers": [{"name": "transformer-container"}]},
        {"containers": [{"image": "mine", "env": [{"name": "MULTI_MODEL_SERVER", "value": "false"}]}]},
        {"model": {**MODEL, "confidential": {"enabled": False}}},
        {"model": {**MODEL, "volumeMounts": [{"name": "data", "mountPath": "/mnt/models-2"}]}},
    ],
)
def test_what_only_resembles_an_obstacle_is_shared(predictor):
    """
    A server without a source that KServe does not call multi-model shares the claim, as one that is not confidential.
    """
    shared = share_volume(service(predictor), claim="models")

    assert shared["spec"]["predictor"]["volumes"] == SHARED


@pytest.mark.parametrize(
    ("parts", "notes"),
    [
        ({}, []),
        ({"canary": [{"predictor": {"name": "next", "model": MODEL}, "trafficPercent": 5}]}, ["its canary `next` is"]),
        ({"transformer": {"containers": [{"image": "t"}]}, "explainer": {"art": {"type": "SquareAttack"}}}, []),
        (
            {"transformer": {"containers": [{"env": [{"name": "STORAGE_URI", "value": "s3://b/t"}]}]}},
            ["its transformer is unchanged: it downloads from a source of its own"],
        ),
        ({"explainer": {"art": {"storageUri": "s3://b/e"}}}, ["its explainer is unchanged"]),
        (
            {
                "explainer": {"storageUris": [{"uri": "s3://b/e"}]},
                "transformer": {"storageUris": [{"uri": "s3://b/t"}]},
            },
            ["its transformer is", "its explainer is"],
        ),
    ],
)
def test_what_does_not_share_the_claim_is_remarked(parts, notes):
    """
    Canaries, transformers and explainers with sources of their own are left as they are, and each is named.
    """
    given = service()
    given["spec"] |= parts

    shared = share_volume(given, claim="models")

    assert {name: shared["spec"][name] for name in parts} == parts
    assert shared["spec"]["predictor"]["volumes"] == SHARED
    found = remarks(given)
    assert len(found) == len(notes)
    assert all(note in one for note, one in zip(notes, found, strict=True))


@pytest.mark.parametrize(
    "mark",
    [
        lambda found: found["metadata"]["annotations"].update({CONFIDENTIAL: "true"}),
        lambda found: found["spec"].update(
            initContainers=[{"name": "storage-initializer", "env": [{"name": "CONFIDENTIAL_ENABLED", "value": "true"}]}]
        ),
    ],
)
def test_a_confidential_model_never_lies_on_a_shared_claim(mark):
    """
    The webhook keeps KServe's `emptyDir` for a model that the initializer decrypts, requested or by default, and denies
    a pod that brings a governed claim for it.
    """
    requested, by_default, own, direct = (
        served(claim="models"),
        served(),
        served({"containers": [{"name": "kserve-container"}], "volumes": SHARED}),
        served(source="pvc://models/m"),
    )
    for one in (requested, by_default, own, direct):
        mark(one)
    grants = policy(rule(default=True))

    found = [admit(one, grants) for one in (requested, by_default, direct)]

    assert [one.pod["spec"].get("volumes") for one in found] == [None] * 3
    confidential = (
        "claim `models` is not mounted: the model is confidential: decrypted, it would be readable on the claim"
    )
    assert [one.notes for one in found] == [(confidential,), (), ()]
    with pytest.raises(PolicyError, match="the model is confidential"):
        mutate_pod(own, grants)
    mutate_pod(own, policy(rule(claim="another")))


def llm_service(spec=None, **metadata):
    return {
        "apiVersion": "serving.kserve.io/v1alpha2",
        "kind": "LLMInferenceService",
        "metadata": {"name": "llama", **metadata},
        "spec": {"model": {"uri": "hf://org/llama"}, **(spec or {})},
    }


MAIN = {"name": "main"}


@pytest.mark.parametrize(
    ("given", "arguments", "expected"),
    [
        ({}, {}, {"template": {"containers": [MAIN], "volumes": SHARED}}),
        (
            {"template": {"containers": [{"name": "main", "image": "vllm"}], "volumes": [VOLUMES["host"]]}},
            {"read_only": True},
            {"template": {"containers": [{"name": "main", "image": "vllm"}], "volumes": [VOLUMES["host"], *SHARED]}},
        ),
        (
            {"worker": {}, "prefill": {"worker": {"containers": [{"name": "side"}]}}},
            {"sub_path": "models/a"},
            {
                "template": {
                    "volumes": SHARED,
                    "containers": [{**MAIN, "volumeMounts": [{**READ, "subPath": "models/a"}]}],
                },
                "worker": {
                    "volumes": SHARED,
                    "containers": [{**MAIN, "volumeMounts": [{**READ, "subPath": "models/a"}]}],
                },
                "prefill": {
                    "template": {
                        "volumes": SHARED,
                        "containers": [{**MAIN, "volumeMounts": [{**READ, "subPath": "models/a"}]}],
                    },
                    "worker": {
                        "volumes": SHARED,
                        "containers": [
                            {"name": "side"},
                            {**MAIN, "volumeMounts": [{**READ, "subPath": "models/a"}]},
                        ],
                    },
                },
            },
        ),
        (
            {},
            {"read_only": False},
            {"template": {"volumes": SHARED, "containers": [{**MAIN, "volumeMounts": [WRITE]}]}},
        ),
        (
            {"template": {"containers": [{**MAIN, "volumeMounts": [WRITE]}]}},
            {"read_only": True},
            {"template": {"volumes": SHARED, "containers": [{**MAIN, "volumeMounts": [READ]}]}},
        ),
    ],
)
def test_an_llm_service_shares_a_claim_in_every_pod_that_downloads(given, arguments, expected):
    """
    The volume is named in advance in each template, the server is mounted as requested, and twice is the same as once.
    """
    service = llm_service(given)
    before = deepcopy(service)

    found = share_volume(service, claim="models", **arguments)

    assert found == llm_service({**given, **expected})
    assert service == before
    assert share_volume(found, claim="models", **arguments) == found


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"model": {"uri": "pvc://claim/x"}}, "its model is served directly from a claim"),
        ({"model": {"uri": "oci+native://r/x"}}, "its model comes from an image"),
        ({"model": {"uri": "hf://o/m", "confidential": {"enabled": True}}}, "its model is confidential"),
        (
            {"model": {"uri": "hf://o/m", "lora": {"adapters": [{"uri": "hf://o/a"}]}}},
            "its adapters are downloaded into",
        ),
        ({"storageInitializer": {"enabled": False}}, "its storage initializer is disabled"),
        (
            {"worker": {"containers": [{**MAIN, "volumeMounts": [{"name": "d", "mountPath": "/mnt/models"}]}]}},
            "it mounts its own volume `d` at `/mnt/models`",
        ),
    ],
)
def test_an_llm_service_that_must_not_share_stays_as_it_is(spec, reason):
    """
    Where KServe downloads nothing, other files too, or secrets, the service comes back unchanged, with the reason.
    """
    given = llm_service(spec)

    assert share_volume(given, claim="models", sub_path="a", read_only=False) == given
    assert reason in obstacle(given)
    assert obstacle(llm_service(labels={"internal.serving.kserve.io/localmodel": "x"})) is not None
    assert obstacle(llm_service({"model": {"uri": "hf://o/m", "lora": {"adapters": [{"uri": "pvc://c/a"}]}}})) is None


def controlled(
    volume=VOLUME, path="/mnt/models", server="main", args=("hf://org/llama", "/mnt/models"), claim="models"
):
    """
    A pod as KServe's controller writes it, with the initializer in it and no annotation about a source.
    """
    mount = {"name": volume, "mountPath": "/mnt/models"}
    spec = {
        "initContainers": [{"name": "storage-initializer", "args": list(args), "volumeMounts": [mount]}],
        "containers": [{"name": server, "volumeMounts": [{**mount, "mountPath": path, "readOnly": True}]}],
        "volumes": [{"name": volume, "emptyDir": {}}],
    }
    return pod(spec, annotations={"kserve-pvc/claim": claim} if claim else {})


@pytest.mark.parametrize("claim", ["models", None])
def test_the_webhook_shares_the_claim_with_the_pods_of_an_llm_service(claim):
    """
    The claim takes the place of the emptyDir that the controller wrote, with the directories of the rule and of the
    request, and a second call changes nothing.
    """
    given = controlled(claim=claim)
    given["metadata"].setdefault("annotations", {})["kserve-pvc/sub-path"] = "team/models/a"
    grants = policy(rule(subPath="team", default=True))

    found = admit(given, grants)

    assert (found.claim, found.notes) == ("models", ())
    spec = found.pod["spec"]
    assert spec["volumes"] == SHARED
    assert spec["initContainers"][0]["volumeMounts"] == [{**WRITE, "subPath": "team"}]
    assert spec["containers"][0]["volumeMounts"] == [{**READ, "subPath": "team/models/a"}]
    assert mutate_pod(found.pod, grants) == found.pod


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (
            pod({"containers": [MAIN]}, annotations={"kserve-pvc/claim": "models"}),
            "KServe downloads nothing for this pod",
        ),
        (
            controlled("mnt-models", server="kserve-container"),
            "KServe downloads into the volume `mnt-models`, as it does for `storageUris`",
        ),
        (controlled(server="tokenizer", path="/mnt/models/base"), "the pod has no container `main`"),
        (
            controlled(path="/mnt"),
            "KServe mounts its volume for other files than one model at `/mnt/models`",
        ),
        (
            controlled(args=("hf://o/m", "/mnt/models", "hf://o/a", "/mnt/lora/a")),
            "KServe mounts its volume for other files than one model",
        ),
        (
            pod(controlled()["spec"], annotations={"kserve-pvc/claim": "models", CONFIDENTIAL: "true"}),
            "the model is confidential",
        ),
    ],
)
def test_what_the_webhook_says_of_pods_without_a_source_is_true(given, reason):
    """
    A pod that KServe's controller has written is left as it is where it cannot share, for the reason that holds.
    """
    found = admit(given, policy(rule()))

    assert (found.pod, found.claim) == (given, None)
    assert len(found.notes) == 1
    assert reason in found.notes[0]


def test_a_pod_that_mounts_something_else_as_the_model_stays_valid():
    """
    The webhook adds no second mount at `/mnt/models`, and says why.
    """
    mounting = {
        "containers": [{"name": "kserve-container", "volumeMounts": [{"name": "d", "mountPath": "/mnt/models"}]}]
    }

    found = admit(served(mounting, claim="models", sub_path="a"), policy(rule()))

    assert found.pod["spec"] == mounting
    assert found.notes == ("claim `models` is not mounted: the pod mounts its own volume `d` at `/mnt/models`",)


@pytest.mark.parametrize(
    ("given", "arguments", "error", "message"),
    [
        (None, {}, SettingsError, "invalid value `NoneType` for `manifest`; expected a InferenceService"),
        ({"kind": "Pod"}, {}, SettingsError, "invalid value `Pod` for `kind`"),
        ({**service(), "apiVersion": "v1"}, {}, SettingsError, "invalid value `v1` for `apiVersion`"),
        (
            {**service(), "spec": {}},
            {},
            SettingsError,
            "`spec.predictor` is missing; an InferenceService needs a predictor",
        ),
        (service({"minReplicas": 1}), {}, SettingsError, "a predictor needs `model` or `containers`"),
        (
            {**service(), "spec": {"predictor": []}},
            {},
            SettingsError,
            "invalid value `list` for `spec.predictor`; expected a mapping",
        ),
        (service(annotations={READONLY: False}), {}, SettingsError, "put the value in quotes"),
        (
            service({"model": MODEL, "annotations": {READONLY: False}}),
            {},
            SettingsError,
            f"`False` for `spec.predictor.annotations[{READONLY}]`; expected a string: put the value in quotes",
        ),
        (service(), {"claim": ""}, SettingsError, "`claim` is missing; expected the name of a PersistentVolumeClaim"),
        (
            service(),
            {"claim": "My_Claim"},
            SettingsError,
            "invalid value `My_Claim` for `claim`; expected up to 253 lowercase letters",
        ),
        (service(), {"claim": "a\n"}, SettingsError, "invalid value `a\\n` for `claim`"),
        (service(), {"claim": "ä"}, SettingsError, "expected up to 253 lowercase letters"),
        (service(), {"sub_path": None}, SettingsError, "invalid value `None` for `sub_path`; expected a directory"),
        (service(), {"sub_path": "../x"}, PolicyError, "`sub_path: ../x` is refused: a name may not climb with `..`"),
        (service(), {"sub_path": "/x"}, PolicyError, "a name must be relative"),
        (service(), {"sub_path": "x/"}, PolicyError, "a name may have no empty or `.` part"),
        (
            service({"model": MODEL, "volumes": [VOLUMES["a free claim"]]}),
            {},
            SettingsError,
            f"invalid value `claim free` for `spec.predictor.volumes[{VOLUME}]`; "
            "remove this volume, or share its claim",
        ),
        (
            service({"model": MODEL, "volumes": [VOLUMES["emptyDir"]]}),
            {},
            SettingsError,
            "invalid value `no claim` for `spec.predictor.volumes[kserve-provision-location]`; remove this volume",
        ),
        (
            service({"model": {**MODEL, "volumeMounts": [{**READ, "subPath": "b"}]}}),
            {"sub_path": "a"},
            SettingsError,
            "invalid value `b` for `spec.predictor.model.volumeMounts",
        ),
    ],
)
def test_what_cannot_be_shared_is_named(given, arguments, error, message):
    """
    What is no InferenceService, no claim, no directory, or says something else already, is an error that names it.
    """
    with pytest.raises(error) as raised:
        share_volume(given, **{"claim": "models", **arguments})

    assert message in str(raised.value)


def test_the_claim_of_a_patched_service_is_what_its_pods_download_into():
    """
    With the volume in the service, KServe's rules alone lead to the claim, mounted read-only into the server.
    """
    patched = share_volume(service(), claim="models")
    given = served({"containers": [{"name": "kserve-container"}], "volumes": patched["spec"]["predictor"]["volumes"]})

    found = kserve_rules.inject(given)

    assert found["spec"]["volumes"] == SHARED
    assert found["spec"]["containers"] == [{"name": "kserve-container", "volumeMounts": [READ]}]


def test_public_names_are_loaded_when_they_are_used():
    """
    Each public name is found, and a misspelled one is an attribute error.
    """
    assert kserve_pvc.kserve.__all__ == sorted(kserve_pvc.kserve.__all__)
    assert all(getattr(kserve_pvc.kserve, name).__name__ == name for name in kserve_pvc.kserve.__all__)
    assert set(kserve_pvc.kserve.__all__) <= set(dir(kserve_pvc.kserve))
    with pytest.raises(AttributeError, match="no attribute 'share'"):
        kserve_pvc.kserve.share  # noqa: B018
