"""
A real Triton server starts on a directory that the initializer has filled.

It runs where `nox -s triton` has installed the server.
"""

import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from contextlib import closing
from pathlib import Path

import pytest
import shell
from trees import write_files

from kserve_pvc.kserve._contents import OURS
from kserve_pvc.kserve._initialize import main

# The directory of the package `pytriton`, which brings the server, and one with numpy, which its backend imports.
TRITON = os.environ.get("KSERVE_PVC_TEST_TRITON", "")
LIBRARIES = os.environ.get("KSERVE_PVC_TEST_TRITON_LIBRARIES", "")
START_SECONDS = 60

pytestmark = pytest.mark.skipif(not TRITON, reason="run by `nox -s triton`, which installs the server")

CONFIG = b"""
name: "echo"
backend: "python"
input [{ name: "IN" data_type: TYPE_FP32 dims: [1] }]
output [{ name: "OUT" data_type: TYPE_FP32 dims: [1] }]
"""
MODEL = {
    "echo/config.pbtxt": CONFIG,
    "echo/1/model.py": b"class TritonPythonModel:\n    def execute(self, requests):\n        return []\n",
}


@pytest.fixture(scope="module")
def backends(tmp_path_factory):
    """
    The Python backend with the stub for this interpreter.
    """
    server = Path(TRITON) / "tritonserver"
    made = tmp_path_factory.mktemp("backends")
    shutil.copytree(server / "backends/python", made / "python")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copy(server / "python_backend_stubs" / version / "triton_python_backend_stub", made / "python")
    for file in ("triton_python_backend_stub", "libtriton_python.so"):
        (made / "python" / file).chmod(0o755)
    (server / "bin/tritonserver").chmod(0o755)
    return made


@pytest.fixture
def is_ready(backends, tmp_path):
    """
    Start a server on a directory, and tell whether it gets ready.
    """

    def start(place):
        with closing(socket.create_server(("127.0.0.1", 0))) as found:
            port = found.getsockname()[1]
        libraries = [*Path(TRITON).parent.glob("nvidia_pytriton.libs"), Path(sysconfig.get_config_var("LIBDIR"))]
        environ = {"LD_LIBRARY_PATH": ":".join(map(str, libraries)), "PYTHONPATH": LIBRARIES}
        command = [
            *(f"{TRITON}/tritonserver/bin/tritonserver", f"--model-repository={place}"),
            *(f"--backend-directory={backends}", "--http-address=127.0.0.1", f"--http-port={port}"),
            *("--allow-grpc=false", "--allow-metrics=false"),
        ]
        with (tmp_path / "triton.log").open("wb") as log:
            server = subprocess.Popen(command, env=shell.clean_environ(environ), stdout=log, stderr=log)
        try:
            return wait(server, f"http://127.0.0.1:{port}/v2/health/ready")
        finally:
            server.kill()
            server.wait()

    return start


def wait(server, url):
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                return response.status == 200
        except OSError:
            time.sleep(0.2)
    return False


@pytest.mark.parametrize("way", ["private", "copy", "symlink"])
def test_triton_is_ready_on_a_directory_of_the_initializer(tmp_path, root, is_ready, monkeypatch, way):
    """
    However the directory was filled, also by a second start.
    """
    write_files(tmp_path / "repository", MODEL)
    place = tmp_path / "mnt-models"
    if way != "private":
        monkeypatch.setenv("KSERVE_PVC_STORE", str(root))
        monkeypatch.setenv("KSERVE_PVC_MATERIALIZE", way)

    codes = [main([f"file://{tmp_path}/repository", str(place)]) for _ in range(2)]

    assert codes == [0, 0]
    assert is_ready(place), (tmp_path / "triton.log").read_text()[-4000:]


def test_triton_fails_on_a_directory_that_is_no_model(tmp_path, is_ready):
    """
    The test above would notice: a hidden directory is a model to Triton, and a missing one ends it.
    """
    place = tmp_path / "mnt-models"
    write_files(place, MODEL)
    alone = is_ready(place)
    (place / OURS).mkdir()

    assert (alone, is_ready(place)) == (True, False)
