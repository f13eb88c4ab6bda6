"""
Serving where there is no network: what is present is served, nothing else is asked for, and no socket is made.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import shell
from trees import model_files, read_tree, write_files

from kserve_pvc import ModelNotFoundError, ModelStore, PolicyError, SettingsError
from kserve_pvc._settings import read_settings

FILES = model_files(seed=61)
OFFLINE = {"KSERVE_PVC_OFFLINE": "1"}


@pytest.fixture
def uri(upload):
    """
    The model of `FILES` on S3.
    """
    return upload(FILES)


@pytest.fixture
def bundle(root, uri, s3, tmp_path):
    """
    The model, downloaded on the connected side and exported.
    """
    store = ModelStore(root, mode="rw", **s3)
    store.ensure(uri, progress=False)
    store.export(uri, tmp_path / "model.tar", progress=False)
    return tmp_path / "model.tar"


@pytest.fixture
def isolated(tmp_path):
    """
    An empty volume on the isolated side.
    """
    place = tmp_path / "isolated"
    place.mkdir()
    return place


def test_what_is_present_is_served_offline(root, uri, bundle, s3, proxy, monkeypatch):
    """
    Every call that needs no source works as ever, without a request.
    """
    asked = len(proxy.requests)
    monkeypatch.setenv("KSERVE_PVC_OFFLINE", "1")
    store = ModelStore(root, mode="rw", **s3)

    with store.open(uri) as held:
        assert read_tree(held.path) == FILES

    assert store.ensure(uri).status == "present"
    assert store.ensure(uri, local_files_only=True).path == store.get(uri).path
    assert store.plan(uri).action == "nothing"
    assert store.verify(uri, "full").ok
    assert [model.uri for model in store.list()] == [uri]
    assert len(proxy.requests) == asked


@pytest.mark.parametrize("mode", ["r", "rw"])
def test_what_is_absent_is_not_found_offline(root, uri, s3, proxy, monkeypatch, mode):
    """
    The error says that a bundle can be imported; no source was asked, whatever the store may do otherwise.
    """
    monkeypatch.setenv("KSERVE_PVC_OFFLINE", "1")
    store = ModelStore(root, mode=mode, **s3)

    for arguments in ({}, {"refresh": True}, {"force_download": True}, {"local_files_only": True}):
        with pytest.raises(ModelNotFoundError, match="`import` a bundle"):
            store.ensure(uri, **arguments)

    assert proxy.requests == []


def test_what_would_ask_the_source_is_refused_offline(root, uri, bundle, s3, proxy, monkeypatch):
    """
    `resolve`, `plan` of what is absent, `refresh` and `force_download` say that the store is offline, without a
    request.
    """
    asked = len(proxy.requests)
    monkeypatch.setenv("KSERVE_PVC_OFFLINE", "1")
    store = ModelStore(root, mode="rw", **s3)
    calls = [
        lambda: store.resolve(uri),
        lambda: store.plan(f"{uri}/absent"),
        lambda: store.plan(uri, refresh=True),
        lambda: store.ensure(uri, refresh=True),
        lambda: store.ensure(uri, force_download=True),
        lambda: ModelStore(root, **s3).ensure(uri, refresh=True),
    ]

    for call in calls:
        with pytest.raises(PolicyError, match="KSERVE_PVC_OFFLINE"):
            call()

    assert len(proxy.requests) == asked


def test_an_argument_counts_more_than_the_environment(root, uri, s3, monkeypatch):
    """
    `offline=` decides either way, and without it the environment that the store was made from.
    """
    monkeypatch.setenv("KSERVE_PVC_OFFLINE", "1")
    online = ModelStore(root, mode="rw", offline=False, **s3)
    monkeypatch.delenv("KSERVE_PVC_OFFLINE")
    stores = [ModelStore(root, offline=True, **s3), ModelStore.from_env(root, environ=OFFLINE, annotations={}, **s3)]

    version = online.resolve(uri).version
    for store in stores:
        with pytest.raises(PolicyError):
            store.resolve(uri)

    assert version.startswith("sha256:")


@pytest.mark.parametrize(
    ("text", "is_offline"),
    [
        *((word, True) for word in ("1", "true", "TRUE", "True", "yes", "on", "ON", " 1 ")),
        *((word, False) for word in ("0", "false", "FALSE", "no", "Off", "", " ", None)),
    ],
)
def test_the_environment_says_yes_or_no(text, is_offline):
    """
    The words that huggingface_hub takes for true are, in any case; their opposites, nothing and no variable are not.
    """
    environ = {} if text is None else {"KSERVE_PVC_OFFLINE": text}

    assert read_settings(environ, {}).offline is is_offline


@pytest.mark.parametrize("text", ["2", "offline", "y", "-1", "0.0"])
def test_a_ban_is_not_guessed(text, root, monkeypatch):
    """
    Any other word is an error where it would count, and a model server that only serves does not even read it.
    """
    monkeypatch.setenv("KSERVE_PVC_OFFLINE", text)

    with pytest.raises(SettingsError, match="KSERVE_PVC_OFFLINE"):
        read_settings(annotations={})
    with pytest.raises(SettingsError, match="KSERVE_PVC_OFFLINE"):
        ModelStore(root).resolve("s3://bucket/model")

    assert ModelStore(root).list() == []


def test_the_shell_is_offline_too(root, uri, bundle, s3, proxy):
    """
    The command line serves what is there and tells by its exit codes what it may not do.
    """
    asked = len(proxy.requests)
    present = shell.kserve_pvc(root, "ensure", uri, env=OFFLINE)
    absent = shell.kserve_pvc(root, "ensure", f"{uri}/absent", env=OFFLINE)
    refused = shell.kserve_pvc(root, "plan", "--refresh", uri, env=OFFLINE)

    assert read_tree(Path(present.stdout.strip())) == FILES
    assert (present.returncode, absent.returncode, refused.returncode) == (0, 3, 8)
    assert len(proxy.requests) == asked


# What an isolated server does, in one process: import, ensure, read, and be refused what is not there.
SERVE = """
import sys
from kserve_pvc import ModelNotFoundError, ModelStore, PolicyError

root, bundle, uri = sys.argv[1:]
store = ModelStore(root, mode="rw")
print(store.import_(bundle, progress=False).status)
model = store.ensure(uri)
print(model.status, store.verify(uri, "full").ok, len(list(model.path.rglob("*.bin"))))
for call in (store.ensure, store.resolve, store.plan):
    try:
        call(uri + "/absent")
    except (ModelNotFoundError, PolicyError) as error:
        print(type(error).__name__)
store.export(uri, bundle + ".again", progress=False)
"""
SERVED = ["downloaded", "present True 2", "OfflineError", "PolicyError", "PolicyError"]


def test_no_socket_is_made_offline(uri, bundle, isolated, tool, tmp_path):
    """
    Importing, serving, exporting and refusing make no network call at all, as the kernel sees it.
    """
    log = tmp_path / "trace.log"
    tracing = [tool("strace"), "-f", "-qq", "-o", str(log), "-e", "trace=%network"]
    command = [*tracing, sys.executable, "-I", "-c", SERVE, str(isolated), str(bundle), uri]

    said = subprocess.run(command, check=True, capture_output=True, text=True, env=shell.clean_environ(OFFLINE)).stdout

    assert said.splitlines() == SERVED
    assert log.read_text() == ""


def test_the_trace_would_see_a_socket(tool, tmp_path):
    """
    The check above fails for a program that makes one.
    """
    log = tmp_path / "trace.log"
    tracing = [tool("strace"), "-f", "-qq", "-o", str(log), "-e", "trace=%network"]
    subprocess.run([*tracing, sys.executable, "-I", "-c", "import socket; socket.socket().close()"], check=True)

    assert "socket(" in log.read_text()


def test_a_machine_without_a_network_serves_what_was_imported(uri, bundle, isolated, tool):
    """
    In a network namespace of its own, without any route, a bundle is imported and its model served.
    """
    alone = [tool("unshare"), "--net"] if os.geteuid() == 0 else [tool("unshare"), "--map-root-user", "--net"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("`unshare --net` is not allowed here")
    command = [*alone, sys.executable, "-I", "-c", SERVE, str(isolated), str(bundle), uri]

    said = subprocess.run(command, check=True, capture_output=True, text=True, env=shell.clean_environ(OFFLINE)).stdout

    assert said.splitlines() == SERVED


def test_offline_is_no_matter_of_the_kind_of_source(tmp_path, root):
    """
    A source on a mounted file system is not asked either: offline means what is in the store.
    """
    write_files(tmp_path / "source", FILES)

    with pytest.raises(ModelNotFoundError):
        ModelStore(root, mode="rw", offline=True).ensure(f"file://{tmp_path}/source")

    assert ModelStore(root).list() == []
