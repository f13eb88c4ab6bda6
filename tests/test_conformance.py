"""
The conformance suite on real services, and on back ends that are wrong in one way each.
"""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import broken
import gcs
import pytest
from azurite import Azurite, MissingError
from hub import HuggingFace
from remotes import (
    ClaimRemote,
    DirectoryRemote,
    FsspecMemoryRemote,
    FTPRemote,
    MemoryBackend,
    MemoryRemote,
    S3Remote,
    SFTPRemote,
    ThroughFsspec,
)

from kserve_pvc.backends.azure import AzureBackend
from kserve_pvc.backends.file import FileBackend
from kserve_pvc.backends.fsspec_ import FsspecBackend
from kserve_pvc.backends.gs import GSBackend
from kserve_pvc.backends.hf import HFBackend
from kserve_pvc.backends.pvc import PvcBackend
from kserve_pvc.backends.s3 import S3Backend
from kserve_pvc.testing import BackendConformance

# The whole number is a session of its own for each back end: most of its time is what the services take to hold them.
MANY_FILES = int(os.environ.get("KSERVE_PVC_TEST_FILES", "300"))
NO_SUCH_FILES = dict.fromkeys(["climbs", "climbs-inside", "dot-part", "nul"], "no file has such a name")

NO_SUCH_LINES = {**NO_SUCH_FILES, "newline": "FTP lists one file a line"}
NO_SUCH_KEYS = {
    **dict.fromkeys(["climbs", "climbs-inside", "dot-part", "nul", "backslash"], "SeaweedFS refuses such keys"),
}


@pytest.fixture(scope="session")
def ftp():
    """
    A real FTP server, once for all tests.
    """
    pytest.importorskip("pyftpdlib", reason="`pyftpdlib` is not installed")
    with FTPRemote() as server:
        yield server


@pytest.fixture(scope="session")
def sftp():
    """
    A real SFTP server, once for all tests.
    """
    for name in ("paramiko", "asyncssh"):
        pytest.importorskip(name, reason=f"`{name}` is not installed")
    with SFTPRemote() as server:
        yield server


class TestS3(BackendConformance):
    """
    S3 on SeaweedFS.
    """

    backend = S3Backend
    cannot_hold = NO_SUCH_KEYS
    many_files = MANY_FILES

    @pytest.fixture
    def remote(self, origin):
        pytest.importorskip("s3fs", reason="`s3fs` is not installed")
        origin.make_bucket("conformance")
        return S3Remote(origin, "conformance")


@pytest.fixture(scope="session")
def guarded_gcs():
    """
    An emulator of Google Cloud Storage behind a gate that knows one token, once for all tests.
    """
    pytest.importorskip("google.auth", reason="`google-auth` is not installed")
    try:
        with gcs.GuardedGCS() as server:
            yield server
    except gcs.MissingError as missing:
        pytest.skip(str(missing))


class TestGS(BackendConformance):
    """
    Google Cloud Storage on fake-gcs-server, whose refusals a gate in front of it adds.
    """

    backend = GSBackend
    secrets = (gcs.GuardedGCS.token,)
    many_files = min(MANY_FILES, 2000)  # The emulator looks through all objects for each one.

    @pytest.fixture
    def remote(self, guarded_gcs):
        return guarded_gcs


class ThroughClass:
    """
    A remote, reached with one more option that only the fsspec class knows.
    """

    def __init__(self, remote, **option):
        self._remote = remote
        self._option = option

    def __getattr__(self, name):
        value = getattr(self._remote, name)
        return {**value, **self._option} if name.endswith("_options") and value is not None else value


class TestGSThroughGcsfs(TestGS):
    """
    Google Cloud Storage through the session of gcsfs, which has a setting of its own.
    """

    @pytest.fixture
    def remote(self, guarded_gcs):
        pytest.importorskip("gcsfs", reason="`gcsfs` is not installed")
        return ThroughClass(guarded_gcs, session_kwargs={"headers": {"X-Test": "conformance"}})


@pytest.fixture(scope="session")
def azurite():
    """
    A real blob service, once for all tests.
    """
    pytest.importorskip("azure.storage.blob", reason="`azure-storage-blob` is not installed")
    try:
        with Azurite() as server:
            yield server
    except MissingError as missing:
        pytest.skip(str(missing))


class TestAzure(BackendConformance):
    """
    Azure Blob Storage on Azurite.
    """

    backend = AzureBackend
    cannot_hold = dict.fromkeys(["bell", "escape-sequence", "nul"], "Azurite answers 500 to a listing with such a name")
    many_files = MANY_FILES

    @pytest.fixture
    def remote(self, azurite):
        return azurite


class TestAzureThroughAdlfs(TestAzure):
    """
    Azure Blob Storage through the client that adlfs holds.

    The SDK takes no kind of credential today that cannot authorize our own requests, so that this one is hidden.
    """

    @pytest.fixture
    def remote(self, azurite, monkeypatch):
        pytest.importorskip("adlfs", reason="`adlfs` is not installed")
        monkeypatch.setattr("kserve_pvc.backends._adlfs._find_login", lambda *_: None)
        return ThroughClass(azurite, location_mode="primary")


@pytest.fixture(scope="session")
def hub():
    """
    An endpoint that answers as a Hugging Face Hub does, once for all tests.
    """
    with HuggingFace() as server:
        yield server


class TestHF(BackendConformance):
    """
    A Hugging Face Hub on this machine.
    """

    backend = HFBackend
    has_versions = True
    many_files = MANY_FILES

    @pytest.fixture
    def remote(self, hub):
        return hub


class TestFile(BackendConformance):
    """
    A directory of this machine.
    """

    backend = FileBackend
    many_files = MANY_FILES
    cannot_hold = NO_SUCH_FILES

    @pytest.fixture
    def remote(self, tmp_path):
        return DirectoryRemote(tmp_path / "source", "file")


class TestPvc(BackendConformance):
    """
    A claim that is mounted beside the store's.
    """

    backend = PvcBackend
    many_files = MANY_FILES
    cannot_hold = NO_SUCH_FILES

    @pytest.fixture
    def remote(self, tmp_path):
        return ClaimRemote(tmp_path / "claim")


class TestMemory(BackendConformance):
    """
    What a third party may write in thirty lines.
    """

    backend = MemoryBackend
    many_files = MANY_FILES
    is_shared = False

    @pytest.fixture
    def remote(self):
        return MemoryRemote()


class TestFsspecLocal(BackendConformance):
    """
    A directory of this machine through fsspec.
    """

    backend = FsspecBackend
    cannot_hold = NO_SUCH_FILES

    @pytest.fixture
    def remote(self, tmp_path):
        return DirectoryRemote(tmp_path / "source", "fsspec+local")


class TestFsspecMemory(BackendConformance):
    """
    A file system that lists in a way of its own, through fsspec.
    """

    backend = FsspecBackend
    is_shared = False
    many_files = min(MANY_FILES, 1000)  # Each look at one file goes through all of them.

    @pytest.fixture
    def remote(self):
        return FsspecMemoryRemote()


class TestFsspecS3A(BackendConformance):
    """
    A file system that is asynchronous inside, through fsspec: s3fs on SeaweedFS.
    """

    backend = FsspecBackend
    cannot_hold = NO_SUCH_KEYS
    many_files = min(MANY_FILES, 500)
    log_level = logging.INFO  # At DEBUG botocore writes down the headers that it sends.

    @pytest.fixture
    def remote(self, origin):
        pytest.importorskip("s3fs", reason="`s3fs` is not installed")
        origin.make_bucket("conformance")
        return S3Remote(origin, "conformance", "fsspec+s3a")


class TestFsspecS3(TestFsspecS3A):
    """
    S3 through fsspec although there is a backend of ours for it.
    """

    @pytest.fixture
    def remote(self, origin):
        pytest.importorskip("s3fs", reason="`s3fs` is not installed")
        origin.make_bucket("conformance")
        return S3Remote(origin, "conformance", "fsspec+s3")


def with_credentials(options):
    """
    Options of gcsfs, which would show a token that is a string to Google before it uses it.
    """
    from google.oauth2.credentials import Credentials

    return {**options, "token": Credentials(options["token"])}


class TestFsspecGS(BackendConformance):
    """
    Google Cloud Storage through fsspec: gcsfs on fake-gcs-server.
    """

    backend = FsspecBackend
    secrets = (gcs.GuardedGCS.token,)
    many_files = min(MANY_FILES, 300)  # The emulator looks through all objects for each one.

    @pytest.fixture
    def remote(self, guarded_gcs):
        pytest.importorskip("gcsfs", reason="`gcsfs` is not installed")
        remote = ThroughFsspec(guarded_gcs, change=with_credentials)
        remote.denied_options = None  # gcsfs retries what is refused for more than a minute.
        return remote


class TestFsspecAzure(BackendConformance):
    """
    Azure Blob Storage through fsspec: adlfs on Azurite.
    """

    backend = FsspecBackend
    cannot_hold = dict.fromkeys(["bell", "escape-sequence", "nul"], "Azurite answers 500 to a listing with such a name")
    many_files = min(MANY_FILES, 300)

    @pytest.fixture
    def remote(self, azurite):
        pytest.importorskip("adlfs", reason="`adlfs` is not installed")
        return ThroughFsspec(azurite)


class TestFsspecFTP(BackendConformance):
    """
    A real FTP server through fsspec.
    """

    backend = FsspecBackend
    cannot_hold = NO_SUCH_LINES
    many_files = min(MANY_FILES, 500)

    @pytest.fixture
    def remote(self, ftp):
        return ftp


class TestFsspecSFTP(BackendConformance):
    """
    A real SFTP server through fsspec.
    """

    backend = FsspecBackend
    cannot_hold = NO_SUCH_FILES
    many_files = min(MANY_FILES, 500)

    @pytest.fixture
    def remote(self, sftp):
        return sftp


def verdicts(*tests: str) -> dict[str, str]:
    """
    What the suite says about back ends that are wrong: PASSED or FAILED for each test.
    """
    place = Path(broken.__file__)
    paths = [str(place.parent), str(Path(sys.modules["origin"].__file__).parent)]
    command = [
        sys.executable,
        "-Im",
        "pytest",
        "--import-mode=importlib",
        "-c",
        "/dev/null",
        "--rootdir",
        str(place.parent),
        "-p",
        "no:cacheprovider",
    ]
    # Without a summary, whose lines differ where a variable `CI` is set.
    options = ["-o", f"pythonpath={' '.join(paths)}", "-v", "-rN", "--tb=no", "-W", "error"]
    result = subprocess.run(
        [*command, *options, *(f"{place}::{test}" for test in tests)], capture_output=True, text=True, timeout=200
    )
    lines = [line.split() for line in result.stdout.splitlines() if "::" in line]
    return {words[0].partition("::")[2]: words[1] for words in lines if words[1] in ("PASSED", "FAILED")}


def test_the_suite_notices_what_is_wrong():
    """
    Each back end that is wrong in one way fails the test for it, and one that is right passes them all.
    """
    wrong = [f"Test{kind.__name__}::{test}" for kind, test in broken.NOTICED.items()]
    right = [f"TestRight::{test}" for kind, test in broken.NOTICED.items() if issubclass(kind, broken.Right)]

    found = verdicts(*wrong, *right)

    assert found == {**dict.fromkeys(wrong, "FAILED"), **dict.fromkeys(right, "PASSED")}


def test_the_page_names_every_attribute():
    """
    What a subclass may declare is told in the documentation, with its default.
    """
    page = (Path(__file__).parent.parent / "docs" / "how-to" / "backend.md").read_text(encoding="utf-8")

    told = dict(re.findall(r"^\| `([a-z_]+)` \| `?([^|`]+)`? \|", page, re.MULTILINE))

    shown = {"cannot_hold": "{}", "big_bytes": "24 MiB", "log_level": "DEBUG", "secrets": "()"}
    declared = {
        name: getattr(BackendConformance, name)
        for cls in BackendConformance.__mro__
        for name in vars(cls).get("__annotations__", {})
        if hasattr(BackendConformance, name)
    }
    assert told == {
        name: shown.get(name, f"{value:g}" if isinstance(value, float) else str(value))
        for name, value in declared.items()
    }
    assert (BackendConformance.big_bytes, BackendConformance.log_level) == (24 << 20, logging.DEBUG)
