"""
`kserve-pvc kserve patch`: manifests in files and pipes, and as a KRM function.
"""

import io
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kserve_pvc import SettingsError
from kserve_pvc._cli.main import main
from kserve_pvc.errors import InvalidFileError
from kserve_pvc.kserve._yaml import read_documents, write_documents

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed, the extra `kserve`")

SERVICE = """
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: llama   # a comment
spec:
  predictor:
    model:
      modelFormat: {name: huggingface}
      storageUri: s3://bucket/llama
"""
CONFIG = """
apiVersion: v1
kind: ConfigMap
metadata: {name: settings}
data: {port: "1e3", flag: "y", mode: '0o17', time: 12:30:45, day: 2026-11-22, number: "12"}
"""
VOLUMES = [{"name": "kserve-provision-location", "persistentVolumeClaim": {"claimName": "models"}}]
LIST = {"apiVersion": "config.kubernetes.io/v1", "kind": "ResourceList"}
FUNCTION = {"apiVersion": "kserve-pvc/v1", "kind": "ShareVolume", "metadata": {"name": "share"}}


@pytest.fixture
def patch(monkeypatch, capsys, tmp_path):
    """
    Run the verb on a text, from standard input or from a file, and return its exit code and outputs.
    """

    def run(text, *options, in_file=False):
        if in_file:
            (tmp_path / "isvc.yaml").write_text(text)
            options = ("-f", str(tmp_path / "isvc.yaml"), *options)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        return main(["kserve", "patch", *options]), *capsys.readouterr()

    return run


def resources(items, config=None):
    items = [document for item in items for document in read_documents(item, "item")]
    return write_documents([{**LIST, "items": items, **({"functionConfig": config} if config else {})}])


@pytest.mark.parametrize("in_file", [True, False])
def test_a_service_is_patched_and_all_else_is_passed_on(patch, in_file):
    """
    Of several documents the InferenceService gets the claim; the others mean what they meant.
    """
    code, out, err = patch(f"{CONFIG}---{SERVICE}---\n", "--claim", "models", in_file=in_file)

    config, service = yaml.safe_load_all(out)
    assert (code, err) == (0, "")
    assert config == yaml.safe_load(CONFIG.replace("12:30:45", "'12:30:45'").replace("2026-11-22", "'2026-11-22'"))
    assert service["spec"]["predictor"]["volumes"] == VOLUMES
    assert "annotations" not in service["metadata"]
    assert list(service) == ["apiVersion", "kind", "metadata", "spec"]


def test_the_options_are_those_of_share_volume(patch):
    """
    A directory is mounted by name, and read-write is asked for by annotation and mount.
    """
    _, writing, _ = patch(SERVICE, "--claim", "models", "--sub-path", "models/a", "--read-write")
    code, reading, _ = patch(writing, "--claim", "models", "--sub-path", "models/a", "--read-only")

    found = [yaml.safe_load(text) for text in (writing, reading)]
    mounts = [one["spec"]["predictor"]["model"]["volumeMounts"][0] for one in found]
    assert code == 0
    assert [one["metadata"]["annotations"] for one in found] == [
        {"storage.kserve.io/readonly": "false"},
        {"storage.kserve.io/readonly": "true"},
    ]
    assert mounts[0] == {"name": "kserve-provision-location", "mountPath": "/mnt/models", "subPath": "models/a"}
    assert mounts[1] == {**mounts[0], "readOnly": True}


def test_what_kubectl_lists_is_patched(patch):
    """
    The services in a `List` are patched where they stand.
    """
    text = yaml.safe_dump(
        {"apiVersion": "v1", "kind": "List", "items": [yaml.safe_load(CONFIG), yaml.safe_load(SERVICE)]}
    )

    code, out, _ = patch(text, "--claim", "models")

    assert code == 0
    assert yaml.safe_load(out)["items"][1]["spec"]["predictor"]["volumes"] == VOLUMES


def test_a_service_that_has_nothing_to_share_is_told(patch):
    """
    A service without a download comes back as it is, and standard error says why unless it is to be quiet.
    """
    text = SERVICE.replace("s3://bucket/llama", "pvc://claim/llama")

    told, quiet = patch(text, "--claim", "models"), patch(text, "--claim", "models", "-q")

    assert yaml.safe_load(told[1]) == yaml.safe_load(text)
    assert told[2] == "kserve-pvc: llama is unchanged: its model is served directly from a claim\n"
    assert quiet == (0, told[1], "")


def test_an_llm_service_is_patched(patch):
    """
    An LLMInferenceService gets the claim in the template of its pods, and what its configurations add is named.
    """
    text = (
        "apiVersion: serving.kserve.io/v1alpha2\nkind: LLMInferenceService\nmetadata: {name: chat}\n"
        "spec: {model: {uri: hf://org/m}, baseRefs: [{name: multi-node}]}\n"
    )

    code, out, err = patch(text, "--claim", "models")

    assert (code, yaml.safe_load(out)["spec"]["template"]["volumes"]) == (0, VOLUMES)
    assert err == "kserve-pvc: chat: workers or prefill pods that only its `baseRefs` describe are unchanged\n"


def test_what_else_a_service_downloads_is_told(patch):
    """
    A service of which the claim is shared by the predictor only is patched, and standard error names the rest.
    """
    text = f"{SERVICE}  canary:\n    - predictor: {{name: next, model: {{storageUri: s3://b/next}}}}\n"

    code, out, err = patch(text, "--claim", "models")

    assert (code, yaml.safe_load(out)["spec"]["predictor"]["volumes"]) == (0, VOLUMES)
    assert err == "kserve-pvc: llama: its canary `next` is unchanged: it downloads into a volume of its own\n"


@pytest.mark.parametrize(
    ("text", "options", "code", "message"),
    [
        (SERVICE, (), 2, "`--claim` is missing; set the PersistentVolumeClaim"),
        (SERVICE, ("--claim", "No_Claim"), 2, "invalid value `No_Claim` for `claim`"),
        (SERVICE, ("--claim", "models", "--sub-path", "../x"), 8, "may not climb with `..`"),
        (CONFIG, ("--claim", "models"), 2, "invalid value `no InferenceService` for `standard input`"),
        ("", ("--claim", "models"), 2, "no InferenceService"),
        ("{", ("--claim", "models"), 2, "`standard input`: invalid YAML: "),
        ("a: 1\na: 2\n", ("--claim", "models"), 2, "line 2: duplicate key `a`"),
        ("[" * 100_000, ("--claim", "models"), 2, "invalid YAML"),
        ("a: !!python/object:os.system {}", ("--claim", "models"), 2, "invalid YAML"),
        (
            SERVICE,
            ("--claim", "models", "-f", "/nowhere"),
            2,
            "`/nowhere`: cannot be read: No such file",
        ),
    ],
)
def test_what_cannot_be_patched_is_said(patch, text, options, code, message):
    """
    A missing claim, a manifest that is none and a directory that climbs end with their exit code, and print nothing
    else.
    """
    found = patch(text, *options)

    assert (found[0], found[1]) == (code, "")
    assert message in found[2]


@pytest.mark.parametrize(
    "config",
    [
        {**FUNCTION, "spec": {"claim": "models", "subPath": "models/a", "readOnly": False}},
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "data": {"claim": "models", "subPath": "models/a", "readOnly": "false"},
        },
    ],
)
def test_it_is_a_krm_function(patch, config):
    """
    A ResourceList comes back as one, with its items in their order and its configuration as it was.
    """
    text = resources([CONFIG, SERVICE], config)

    code, out, err = patch(text)

    found = yaml.safe_load(out)
    _, alone, _ = patch(SERVICE, "--claim", "models", "--sub-path", "models/a", "--read-write")
    assert (code, err) == (0, "")
    assert found["items"][1] == yaml.safe_load(alone)
    assert {name: value for name, value in found.items() if name != "items"} == {**LIST, "functionConfig": config}
    assert [item["kind"] for item in found["items"]] == ["ConfigMap", "InferenceService"]


def test_a_krm_function_may_find_nothing_to_do(patch):
    """
    A list without a service comes back as it is, as kustomize asks with whatever it has.
    """
    code, out, _ = patch(resources([CONFIG]), "--claim", "models")

    assert code == 0
    assert read_documents(out, "out")[0]["items"] == read_documents(CONFIG, "item")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "`--claim` is missing; set the PersistentVolumeClaim, here or in the `functionConfig`"),
        (
            {**FUNCTION, "spec": {"claim": "models", "subpath": "x"}},
            "unknown field `functionConfig.spec.subpath`; did you "
            "mean `subPath`? supported: `claim`, `subPath`, `readOnly`",
        ),
        (
            {**FUNCTION, "spec": {"claim": "models", "readOnly": "no"}},
            "invalid value `no` for `functionConfig.spec.readOnly`; expected `true` or `false`",
        ),
        ({**FUNCTION, "spec": ["claim"]}, "invalid value `list` for `functionConfig.spec`; expected a mapping"),
        ({**FUNCTION, "spec": {"claim": ["models"]}}, "invalid value `['models']` for `claim`"),
        ({**FUNCTION, "spec": {"claim": "models", "subPath": "../x"}}, "may not climb with `..`"),
    ],
)
def test_a_krm_function_tells_of_an_error_in_its_list(patch, config, message):
    """
    What fails is a result of the list, where kustomize looks for it, and the exit code is 1.
    """
    code, out, err = patch(resources([SERVICE], config))

    found = yaml.safe_load(out)
    assert code == 1
    assert found["items"] == [yaml.safe_load(SERVICE)]
    assert [result["severity"] for result in found["results"]] == ["error"]
    assert message in found["results"][0]["message"]
    assert message in err


def test_numbers_and_texts_stay_what_they_are():
    """
    What Kubernetes reads as a text or a number is written so that it reads the same again.
    """
    text = (
        'a: 12:30\nb: 2026-11-22\nc: 1e3\nd: "1e3"\ne: 0017\nf: 0o17\ng: '
        '"0o17"\nh: 1_000\ni: yes\nj: "yes"\nk: y\nl: .5\nm: ~\nn: -7\n'
    )

    (found,) = read_documents(text, "text")

    expected = {"a": "12:30", "b": "2026-11-22", "c": 1000.0, "d": "1e3", "e": 15, "f": 15, "g": "0o17", "h": 1000}
    assert found == {**expected, "i": True, "j": "yes", "k": "y", "l": 0.5, "m": None, "n": -7}
    assert [type(value) for value in found.values()] == [type(value) for value in {**expected, **found}.values()]
    assert read_documents(write_documents([found]), "text") == [found]


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.from_regex(
    r"[-+.0-9_exXobyYnN:]{1,8}", fullmatch=True
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda below: st.lists(below, max_size=3) | st.dictionaries(TEXTS, below, max_size=3),
)


@settings(max_examples=500, deadline=None)
@given(VALUES)
def test_what_is_written_is_read_again(value):
    """
    Any document survives being written and read.
    """
    found = read_documents(write_documents([{"a": value}]), "text")

    assert repr(found) == repr([{"a": value}])


def test_a_missing_library_is_told(monkeypatch):
    """
    Without PyYAML the error says what to install.
    """
    monkeypatch.setitem(sys.modules, "yaml", None)

    with pytest.raises(SettingsError, match=r"pip install 'kserve-pvc\[kserve\]'"):
        read_documents("a: 1", "text")


LAUGHS = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)
MERGES = "a: &a {x: 1, y: 2}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 10)}]}}\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("&a [*a]", "inside of what it stands for"),
        ("a: &a {b: {c: [*a]}}", "inside of what it stands for"),
        (f"{SERVICE}x: &x [1, *x]\n", "inside of what it stands for"),
        (LAUGHS, "more than 1000000 values"),
    ],
    ids=["list", "mapping", "service", "laughs"],
)
def test_aliases_do_not_multiply(text, says):
    """
    Collections that hold themselves, and aliases of aliases that make billions of values, are invalid YAML.
    """
    with pytest.raises(InvalidFileError, match=says):
        read_documents(text, "f.yaml")


def test_merges_do_not_multiply():
    """
    Merges of merges end as one mapping, or are refused where PyYAML, in older versions, would copy each.
    """
    try:
        found = read_documents(MERGES, "f.yaml")
    except InvalidFileError as error:
        assert "merges more than" in str(error)  # noqa: PT017
    else:
        assert found[0]["j"] == {"x": 1, "y": 2}


def test_aliases_and_merges_of_ordinary_manifests_are_read():
    """
    An anchor may be used several times, and merged.
    """
    text = "a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]\n"

    assert read_documents(text, "f.yaml") == [{"a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": [{"x": 1}, {"x": 1}]}]
