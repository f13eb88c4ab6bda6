"""
The messages of all errors, as they are raised for real, are those that `docs/reference/errors.md` shows.
"""

import io
import re
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest

from kserve_pvc import ModelStore, errors
from kserve_pvc._archive.unpack import unpack
from kserve_pvc._keys.claims import take_claim
from kserve_pvc._process import this_process
from kserve_pvc._source.contract import UnpackLimits
from kserve_pvc._source.ref import parse_ref
from kserve_pvc._volume.reading import Volume
from kserve_pvc._volume.writing import VolumeWriter
from kserve_pvc.errors import StoreError, unknown_option
from kserve_pvc.kserve._yaml import read_documents
from tests.support import pages

PAGE = pages.DOCS / "reference/errors.md"


@attrs.frozen
class Stage:
    """
    A store with one model, an empty one beside it, and what tests may replace.
    """

    store: ModelStore
    root: Path
    source: Path
    absent: str
    monkeypatch: pytest.MonkeyPatch

    def damage_log(self) -> None:
        record = next(self.root.glob(".kserve-pvc/keys/*/log/*.commit"))
        record.write_text(record.read_text().replace('"files":1', '"files":2'))

    def claim_elsewhere(self) -> None:
        """
        Another pod begins to download what is absent.
        """
        holder = attrs.evolve(this_process(), pod="server-1", node="node-b", pid_namespace="pid:[1]", boot_id="other")
        ref = parse_ref(self.absent)
        take_claim(VolumeWriter(self.root), ref.key, 1, uri=ref.uri, holder=holder)

    def export(self) -> Path:
        self.store.export(self.source, self.source.parent / "llama.bundle", progress=False)
        return self.source.parent / "llama.bundle"


def unpack_damaged() -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("weights.bin", b"weights")
    data = archive.getvalue().replace(b"weights", b"wEights", 3).replace(b"wEights.bin", b"weights.bin")
    members = unpack(io.BytesIO(data), "llama.zip", UnpackLimits(), selects=lambda _: True, make_room=lambda _: None)
    for member in members:
        list(member.pieces)


def remove_while_open(stage: Stage) -> None:
    with stage.store.open(stage.source):
        stage.store.remove(stage.source)


def cancelled() -> threading.Event:
    event = threading.Event()
    event.set()
    return event


def without(package: str, stage: Stage) -> None:
    stage.monkeypatch.setitem(sys.modules, package, None)


def raise_error(error: StoreError) -> None:
    """
    What a service would have to be driven into is raised by hand, as its backend raises it.
    """
    raise error


# What to do on a stage, and how it fails. In the order of the page.
EXAMPLES: list[tuple[type[StoreError], Callable[[Stage], object]]] = [
    (errors.ModelNotFoundError, lambda s: s.store.get(s.absent)),
    (errors.NoStoreError, lambda s: raise_error(errors.NoStoreError("", "/mnt/models"))),
    (errors.OfflineError, lambda s: s.store.ensure(s.absent, local_files_only=True)),
    (errors.DamagedRecordError, lambda s: (s.damage_log(), s.store.get(s.source))),
    (errors.ReadOnlyStoreError, lambda s: ModelStore(s.root).ensure(s.absent)),
    (
        errors.LockServiceError,
        lambda s: raise_error(
            errors.LockServiceError(
                "kubernetes://serving", "HTTP 403 Forbidden", "grant the service account access to Leases"
            )
        ),
    ),
    (errors.LockTimeoutError, lambda s: (s.claim_elsewhere(), s.store.ensure(s.absent, timeout=0, progress=False))),
    (errors.DownloadCancelledError, lambda s: s.store.ensure(s.absent, cancel=cancelled(), progress=False)),
    (errors.ModelInUseError, remove_while_open),
    (
        errors.InsufficientSpaceError,
        lambda s: (
            # A volume that is nearly full, without filling one.
            s.monkeypatch.setattr(Volume, "free_bytes", lambda _: 1),
            s.store.ensure(s.source, force_download=True, progress=False),
        ),
    ),
    (
        errors.VolumeError,
        lambda s: ((s.root / "names/llama/mine").mkdir(parents=True), s.store.alias("llama", s.source)),
    ),
    (errors.SourceNotFoundError, lambda s: s.store.ensure(s.absent, progress=False)),
    (
        errors.SourceDeniedError,
        lambda s: raise_error(errors.SourceDeniedError("s3://bucket/llama", "HTTP 403 AccessDenied")),
    ),
    (
        errors.SourceUnavailableError,
        lambda s: raise_error(errors.SourceUnavailableError("s3://bucket/llama", "HTTP 503 SlowDown", retry_after=3.0)),
    ),
    (
        errors.SourceChangedError,
        lambda s: raise_error(errors.SourceChangedError("s3://bucket/llama", "config.json")),
    ),
    (errors.DigestMismatchError, lambda s: s.store.import_(s.export(), sha256="0" * 64, progress=False)),
    (errors.DamagedArchiveError, lambda s: unpack_damaged()),
    (errors.UnsafePathError, lambda s: s.store.alias("../llama", s.source)),
    (errors.PolicyError, lambda s: s.store.ensure("s3://bucket/llama?token=secret")),
    (errors.InvalidURIError, lambda s: s.store.ensure("llama")),
    (errors.UnknownSchemeError, lambda s: s.store.ensure("ftps://host/llama", progress=False)),
    (errors.SettingsError, lambda s: ModelStore(s.root, mode="w")),  # type: ignore[arg-type]
    (errors.SettingsError, lambda s: s.store.ensure(s.source, timeout=-1)),
    (errors.SettingsError, lambda s: ModelStore(s.root, mode="rw", lease_seconds="30")),  # type: ignore[arg-type]
    (
        errors.UnknownOptionError,
        lambda s: raise_error(unknown_option("storage option", "endpoint", ("endpoint_url", "key", "secret"))),
    ),
    (errors.InvalidFileError, lambda s: read_documents("rules: [", "policy.yaml")),
    (errors.MissingDependencyError, lambda s: (without("yaml", s), read_documents("", "policy.yaml"))),
    (errors.LockerMismatchError, lambda s: ModelStore(s.root, mode="rw", locker="flock")),
    (errors.StoreRootError, lambda s: ModelStore("/mnt/absent")),
    (errors.StoreFormatError, lambda s: ((s.root / ".kserve-pvc/store.json").write_text("{"), ModelStore(s.root))),
]


@pytest.fixture
def stage(tmp_path, monkeypatch) -> Stage:
    """
    A store that holds one model, in a pod.
    """
    monkeypatch.setenv("POD_NAME", "server-0")
    monkeypatch.setenv("NODE_NAME", "node-a")
    root, source = tmp_path / "volume", tmp_path / "data" / "llama"
    root.mkdir()
    source.mkdir(parents=True)
    (source / "config.json").write_text("{}")
    store = ModelStore(root, mode="rw")
    store.ensure(source, progress=False)
    return Stage(store, root, source, f"file://{tmp_path}/data/absent", monkeypatch)


def shown(message: str, stage: Stage) -> str:
    """
    A message as the page shows it, where nothing depends on this run.
    """
    message = message.replace(str(stage.root), "/mnt/models").replace(str(stage.source.parent), "/data")
    message = re.sub(r"\(uid \d+, pid \d+\)", "(uid 1000, pid 42)", message)
    message = re.sub(r"got `sha256:[0-9a-f]{64}`", f"got `sha256:{'e' * 8}…`", message)
    message = message.replace("0" * 64, f"{'0' * 8}…")
    return re.sub(r"[0-9a-f]{16}(?=[/`])", "16d8a2f35f654b21", message)


@pytest.mark.parametrize(("error", "act"), EXAMPLES, ids=[f"{n}-{e.__name__}" for n, (e, _) in enumerate(EXAMPLES)])
def test_the_page_shows_what_a_user_sees(stage, error, act):
    """
    Each example on the page is the message that the error really has.
    """
    with pytest.raises(error) as caught:
        act(stage)

    assert type(caught.value) is error
    line = f"{error.__name__}: {shown(str(caught.value), stage)}"
    assert line in examples(), f"write into {PAGE}: {line}"


def examples() -> list[str]:
    return re.search(r"^```text\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)[1].splitlines()


def test_the_page_has_an_example_of_every_error():
    """
    No error is without an example, and no line of the page is without a call that it comes from.
    """
    names = [line.partition(":")[0] for line in examples()]

    assert names == [error.__name__ for error, _ in EXAMPLES]
    public = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, StoreError)}
    assert set(names) == public - {"StoreError"}
