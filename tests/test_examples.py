"""
What people copy runs as it stands: a custom model server, and a notebook that warms a volume.
"""

import asyncio
import importlib.util
import io
import json
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import shell
from silence import SilentProxy
from trees import model_files, read_tree, write_files
from waiting import until

from kserve_pvc import ModelStore

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOK = EXAMPLES / "notebooks/warm.ipynb"


def test_two_replicas_serve_and_fetch_an_adapter():
    """
    The example of a custom server keeps all its promises: one download, right answers over HTTP, serving while
    fetching.
    """
    pytest.importorskip("kserve")

    result = shell.run([sys.executable, str(EXAMPLES / "custom_server")])

    promises = re.findall(r"^  ([✓✗]) ", result.stdout, re.MULTILINE)
    assert (result.returncode, promises) == (0, ["✓"] * 6), result.stdout + result.stderr


@pytest.mark.parametrize("phase", ["loading", "serving"])
def test_a_terminated_server_releases_its_claim(root, origin, upload, phase):
    """
    Whether it loads its model or fetches an adapter for a request, SIGTERM frees the claim of a silent source in a
    second.
    """
    pytest.importorskip("kserve")
    import numpy as np

    arrays = {"weights.npy": np.eye(2), "adapters/one/a.npy": np.ones((2, 1)), "adapters/one/b.npy": np.ones((1, 2))}
    files = {}
    for name, array in arrays.items():
        file = io.BytesIO()
        np.save(file, array)
        files[name] = file.getvalue()
    name = "/weights.npy" if phase == "loading" else "/a.npy"
    with SilentProxy(origin.endpoint, at=lambda target: name in target) as silent, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        environ = {**origin.environ, "AWS_ENDPOINT_URL": silent.endpoint, "MODEL_URI": upload(files)}
        environ |= {"KSERVE_PVC_STORE": str(root), "KSERVE_PVC_MODE": "rw"}
        command = [sys.executable, str(EXAMPLES / "custom_server/server.py"), "--http_port", str(port)]
        command += ["--model_name", "linear", "--enable_grpc=false"]
        server = subprocess.Popen(command, env=shell.clean_environ(environ), stderr=subprocess.PIPE, text=True)
        if phase == "serving":
            until(lambda: ask(port) is not None, 60)
            threading.Thread(target=ask, args=(port, "one"), daemon=True).start()
        assert silent.silenced.wait(60)
        until(lambda: ModelStore(root).locks())
        time.sleep(0.3)

        began = time.monotonic()
        server.terminate()
        until(lambda: not ModelStore(root).locks())
        seconds = time.monotonic() - began
        _, stderr = server.communicate(timeout=60)

    assert seconds < 1.5, stderr


def ask(port: int, adapter: str | None = None) -> object:
    """
    Predict over HTTP; None if the server does not respond with a prediction.
    """
    body = {"instances": [[1.0, 2.0]]} | ({} if adapter is None else {"adapter": adapter})
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/models/linear:predict",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as response:
            return json.load(response)["predictions"]
    except OSError:
        return None


@pytest.fixture
def linear(root, tmp_path, monkeypatch):
    """
    The predictor of the example on a store of the test, loaded.
    """
    monkeypatch.setattr(sys, "argv", ["server.py"])  # KServe reads it when it is imported.
    pytest.importorskip("kserve")
    import numpy as np

    files = {"weights.npy": np.eye(2), "adapters/one/a.npy": np.ones((2, 1)), "adapters/one/b.npy": np.ones((1, 2))}
    for name, array in files.items():
        file = io.BytesIO()
        np.save(file, array)
        write_files(tmp_path / "model", {name: file.getvalue()})
    spec = importlib.util.spec_from_file_location("server", EXAMPLES / "custom_server/server.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.Linear("linear", ModelStore(root, mode="rw"), f"file://{tmp_path}/model")
    model.load()
    return model


def test_the_predictor_adds_an_adapter(root, linear):
    """
    With the adapter named, its product is added; the store holds the adapter as a model of its own.
    """
    x = [[1.0, 2.0]]

    plain = asyncio.run(linear.predict({"instances": x}))
    adapted = asyncio.run(linear.predict({"instances": x, "adapter": "one"}))

    assert (plain, adapted) == ({"predictions": [[1.0, 2.0]]}, {"predictions": [[4.0, 5.0]]})
    assert [sorted(read_tree(model.path)) for model in ModelStore(root).list()] in (
        [["weights.npy"], ["adapters/one/a.npy", "adapters/one/b.npy"]],
        [["adapters/one/a.npy", "adapters/one/b.npy"], ["weights.npy"]],
    )


@pytest.mark.parametrize("adapter", ["absent", "../one", "one/", "", 5, ["one"], "s3://elsewhere/model", "*"])
def test_a_client_names_an_adapter_and_nothing_else(root, linear, adapter):
    """
    What does not exist and what is no name is bad input, and fetches nothing.
    """
    from kserve.errors import InvalidInput

    with pytest.raises(InvalidInput):
        asyncio.run(linear.predict({"instances": [[1.0, 2.0]], "adapter": adapter}))

    assert len(ModelStore(root).list()) == 1


def execute(environ) -> str:
    """
    Run the notebook in a kernel of its own, and return everything its cells put out.
    """
    # In a process of its own: the clients of kernels warn about loops and sockets, which is not for this library to
    # mend.
    script = """
import json, sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
print(json.dumps([cell.outputs for cell in notebook.cells if cell.cell_type == "code"]))
"""
    for name in ("nbclient", "ipykernel", "ipywidgets"):
        # Only looked for: a process that has loaded ipykernel takes itself for a notebook.
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"`{name}` is not installed")
    result = shell.run([sys.executable, "-I", "-c", script, str(NOTEBOOK)], env=environ)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def html(outputs) -> str:
    return "".join("".join(output["data"]["text/html"]) for output in outputs if "text/html" in output.get("data", {}))


def text(outputs) -> str:
    return "".join("".join(output["text"]) for output in outputs if output.get("name") == "stdout")


def test_the_notebook_warms_a_catalogue(root, upload, origin):
    """
    Executed against a real S3 server, it fetches every model of the catalogue, says what failed and shows tables.
    """
    small, large = model_files(seed=81), model_files(seed=82, big=3_000_000)
    base = upload(
        {f"{name}/{path}": data for name, files in (("small", small), ("large", large)) for path, data in files.items()}
    )
    catalogue = [f"{base}/small", f"{base}/large", f"{base}/absent"]

    _, empty, plan, warm, filled, model, verification = execute(
        {**origin.environ, "KSERVE_PVC_STORE": str(root), "CATALOGUE": " ".join(catalogue)}
    )

    store = ModelStore(root)
    assert [read_tree(store.get(uri).path) for uri in catalogue[:2]] == [small, large]
    assert f"ModelStore at {root}, read-write: 0 models, 0 B" in html(empty)
    assert f">Plan for {base}/small</caption>" in html(plan)
    assert text(warm).splitlines()[:2] == ["downloaded", "downloaded"]
    assert "nothing found" in text(warm).splitlines()[2]
    assert any("application/vnd.jupyter.widget-view+json" in output.get("data", {}) for output in warm)
    assert f"ModelStore at {root}, read-write: 2 models, 3.5 MiB" in html(filled)
    assert f">Model {base}/small</caption>" in html(model)
    assert f"Verification of {base}/small: ok, no difference" in html(verification)


def test_the_notebook_needs_nothing():
    """
    Without any setting it makes a volume and models of its own.
    """
    outputs = execute({})

    assert text(outputs[3]).splitlines() == ["downloaded", "downloaded"]


def test_the_notebook_is_saved_without_outputs():
    """
    What is kept of it is text and code: no outputs, no counts and no paths of a machine.
    """
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))

    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [(cell["outputs"], cell["execution_count"]) for cell in cells] == [([], None)] * len(cells)
    assert re.findall(r"/(?:home|root|tmp|Users|work)/", NOTEBOOK.read_text(encoding="utf-8")) == []
