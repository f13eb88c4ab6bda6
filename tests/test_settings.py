"""
What the environment and the pod's annotations say about a store.
"""

import os
from types import MappingProxyType

import pytest

from kserve_pvc import SettingsError, mode_from_annotations
from kserve_pvc._settings import Settings, pod_and_node, read_settings

READONLY = "storage.kserve.io/readonly"
NOTHING = Settings(store="/mnt/models", mode=None, locker=None, lease_seconds=None)


def test_an_empty_environment_says_nothing():
    """
    Without variables and annotations only the place of the store is known.
    """
    assert read_settings({}, {}) == NOTHING


def test_every_variable_is_read():
    """
    Each variable sets its own setting.
    """
    environ = {
        "KSERVE_PVC_STORE": "/data/models",
        "KSERVE_PVC_MODE": "rw",
        "KSERVE_PVC_LOCKER": "flock",
        "KSERVE_PVC_LEASE_SECONDS": "12.5",
        "KSERVE_PVC_UNRELATED": "x",
    }

    assert read_settings(environ, {}) == Settings(store="/data/models", mode="rw", locker="flock", lease_seconds=12.5)


def test_empty_variables_say_nothing():
    """
    A variable that is set to nothing is as good as unset, as a template leaves it.
    """
    names = ["KSERVE_PVC_STORE", "KSERVE_PVC_MODE", "KSERVE_PVC_LOCKER", "KSERVE_PVC_LEASE_SECONDS"]

    assert read_settings(dict.fromkeys(names, ""), {}) == NOTHING


def test_the_environment_is_never_written(monkeypatch, tmp_path):
    """
    Settings come from the process's own environment if none is given, which may refuse every change.
    """
    annotations = tmp_path / "annotations"
    annotations.write_text(f'{READONLY}="false"\n')
    environ = MappingProxyType({"KSERVE_PVC_STORE": "/from/environ", "KSERVE_PVC_ANNOTATIONS": str(annotations)})

    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", environ)
        settings = read_settings()

    assert settings == Settings(store="/from/environ", mode="rw", locker=None, lease_seconds=None)


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        ({}, (None, None)),
        ({"POD_NAME": "server-0", "NODE_NAME": "node-a"}, ("server-0", "node-a")),
        ({"POD_NAME": "server-0", "HOSTNAME": "host"}, ("server-0", None)),
        ({"HOSTNAME": "host"}, ("host", None)),
        ({"NODE_NAME": "node-a"}, (None, "node-a")),
        ({"POD_NAME": "", "HOSTNAME": "host", "NODE_NAME": ""}, ("host", None)),
        ({"POD_NAME": "", "HOSTNAME": ""}, (None, None)),
    ],
    ids=str,
)
def test_pod_and_node_are_what_the_downward_api_says(environ, names):
    """
    A pod is called by its name, else by its host name; a node only by its name; and nothing is guessed beyond that.
    """
    assert pod_and_node(environ) == names


def test_pod_and_node_come_from_the_own_environment(monkeypatch):
    """
    Without a mapping the process's own environment is read.
    """
    environ = MappingProxyType({"POD_NAME": "server-0", "NODE_NAME": "node-a"})

    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", environ)
        names = pod_and_node()

    assert names == ("server-0", "node-a")


def test_read_only_mappings_are_enough():
    """
    Settings are read from mappings that cannot be written.
    """
    environ = MappingProxyType({"KSERVE_PVC_STORE": "/data"})
    annotations = MappingProxyType({READONLY: "false"})

    assert read_settings(environ, annotations) == Settings(store="/data", mode="rw", locker=None, lease_seconds=None)


READONLY_VALUES = [
    "true",
    "True",
    "False",
    "FALSE",
    "0",
    "no",
    "off",
    "",
    " false",
    "false ",
    "false\n",
    '"false"',
    "f",
    "rw",
]


@pytest.mark.parametrize("value", READONLY_VALUES, ids=ascii)
def test_only_the_exact_value_opens_a_store_for_writing(value):
    """
    Everything but exactly `false` keeps the store read-only, as in KServe.
    """
    annotations = {READONLY: value}

    assert mode_from_annotations(annotations) == "r"
    assert read_settings({}, annotations).mode == "r"


def test_the_exact_value_opens_a_store_for_writing():
    """
    The annotation `false` asks for read-write.
    """
    annotations = {READONLY: "false", "other": "true"}

    assert mode_from_annotations(annotations) == "rw"
    assert read_settings({}, annotations).mode == "rw"


@pytest.mark.parametrize(
    "name", ["storage.kserve.io/readOnly", "kserve.io/readonly", "storage.kserve.io/readonly ", "readonly"]
)
def test_other_annotations_do_not_count(name):
    """
    An annotation of another name opens nothing.
    """
    annotations = {name: "false"}

    assert mode_from_annotations(annotations) == "r"
    assert read_settings({}, annotations).mode is None


@pytest.mark.parametrize(("mode", "annotation"), [("r", "false"), ("r", "true"), ("rw", "true"), ("rw", "false")])
def test_the_variable_goes_before_the_annotation(mode, annotation):
    """
    `KSERVE_PVC_MODE` decides whatever the annotation says.
    """
    assert read_settings({"KSERVE_PVC_MODE": mode}, {READONLY: annotation}).mode == mode


@pytest.mark.parametrize("mode", ["RW", "w", "wr", "r ", "read-write", "0", "true", "r\x1b[31m"], ids=ascii)
def test_a_mode_that_means_nothing_is_refused(mode):
    """
    A mode is not guessed, also where the annotation would give one.
    """
    with pytest.raises(SettingsError) as caught:
        read_settings({"KSERVE_PVC_MODE": mode}, {READONLY: "false"})

    assert caught.value.fields == {"name": "KSERVE_PVC_MODE", "value": mode, "hint": "use `r` or `rw`"}
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("text", ["soon", "30s", "1,5", "--1", "0x10", " "])
def test_seconds_that_are_no_number_are_refused(text):
    """
    A lease is not guessed from something that is no number.
    """
    with pytest.raises(SettingsError) as caught:
        read_settings({"KSERVE_PVC_LEASE_SECONDS": text}, {})

    assert caught.value.fields == {
        "name": "KSERVE_PVC_LEASE_SECONDS",
        "value": text,
        "hint": "use a number of seconds",
    }


@pytest.fixture
def mode_from_file(tmp_path):
    """
    The mode that follows from the text of a downward-API file.
    """

    def read(text: str | bytes) -> str | None:
        place = tmp_path / "annotations"
        place.write_bytes(text.encode() if isinstance(text, str) else text)
        return read_settings({"KSERVE_PVC_ANNOTATIONS": str(place)}).mode

    return read


# As the kubelet writes it: sorted names, values quoted by Go's %q.
POD = r"""kubectl.kubernetes.io/last-applied-configuration=(
    "{\"apiVersion\":\"v1\",\"metadata\":{\"annotations\":{\"a\":\"b=c\"}}}\n"
    ""
)
kubernetes.io/config.seen="2026-02-03T04:05:06.000000007Z"
note="a \\ b \"c\" \t é"
storage.kserve.io/readonly="false"
zzz="true\""
"""


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        (POD, "rw"),
        (POD.rstrip("\n"), "rw"),
        (POD.replace("\n", "\r\n"), "rw"),
        (POD.replace('"false"', '"true"'), "r"),
        (POD.replace('"false"', '"False"'), "r"),
        (POD.replace('"false"', r'"\"false\""'), "r"),
        (POD.replace('"false"', r'"false\n"'), "r"),
        (POD.replace('"false"', r'"false\\"'), "r"),
        (POD.replace(READONLY, "other"), None),
        (b"\xff\xfe broken\n" + POD.encode(), "rw"),
        ("", None),
        ("\n\n", None),
        (f"{READONLY}=false\n", None),
        (f'{READONLY}="false\n', None),
        (f'{READONLY} = "false"\n', None),
        (f'note="x {READONLY}=\\"false\\""\n', None),
        (f'note="x" {READONLY}="false"\n', None),
        (f'{READONLY}="false" # comment\n', None),
    ],
)
def test_the_downward_api_file_is_read_strictly(mode_from_file, text, mode):
    """
    Only a line that is exactly the annotation counts; nothing inside the value of another one does.
    """
    assert mode_from_file(text) == mode


def test_a_missing_file_says_nothing(tmp_path):
    """
    Outside of Kubernetes there is no annotations file, and the mode is open.
    """
    assert read_settings({"KSERVE_PVC_ANNOTATIONS": str(tmp_path / "nowhere")}) == NOTHING


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    """
    A file that is there and cannot be read is an error: nothing is guessed about the mode.
    """
    with pytest.raises(SettingsError) as caught:
        read_settings({"KSERVE_PVC_ANNOTATIONS": str(tmp_path)})

    assert caught.value.fields == {
        "name": "KSERVE_PVC_ANNOTATIONS",
        "value": str(tmp_path),
        "hint": "it cannot be read: Is a directory",
    }


def test_given_annotations_spare_the_file(tmp_path):
    """
    Whoever hands over annotations is not overruled by a file, not even if there is none to hand over.
    """
    place = tmp_path / "annotations"
    place.write_text(f'{READONLY}="false"\n')

    assert read_settings({"KSERVE_PVC_ANNOTATIONS": str(place)}, {}).mode is None
