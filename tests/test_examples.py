"""
What people copy runs as it stands: a custom model server, and a notebook that warms a volume.
"""

import asyncio
import importlib.util
import io
import json
import re
import sys
from pathlib import Path

import pytest
import shell
from trees import model_files, read_tree, write_files

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
