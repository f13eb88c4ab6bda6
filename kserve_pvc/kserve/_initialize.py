"""
The storage initializer: puts models into the directories that KServe passes, through a shared store if there is one.

It takes the same arguments as KServe's own initializer, pairs of a source and a directory, and is configured by
environment variables.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path, PurePosixPath
from types import FrameType
from typing import NoReturn

import attrs

from kserve_pvc import __version__
from kserve_pvc._format import layout
from kserve_pvc._format.records import FileEntry, Holder
from kserve_pvc._keys.aliases import settle_view
from kserve_pvc._model import Model
from kserve_pvc._settings import pod_and_node
from kserve_pvc._source.redaction import redact
from kserve_pvc._source.ref import show_source
from kserve_pvc._store import ModelStore
from kserve_pvc._volume.profile import NETWORK_LEASE_SECONDS
from kserve_pvc._volume.reading import Volume
from kserve_pvc._volume.writing import VolumeWriter
from kserve_pvc.errors import (
    DigestMismatchError,
    ModelNotFoundError,
    PolicyError,
    SettingsError,
    SourceNotFoundError,
    StoreError,
    StoreFormatError,
    UnsafePathError,
    VolumeError,
    printable,
)
from kserve_pvc.kserve._archives import is_archive, may_unpack, unpacking
from kserve_pvc.kserve._arguments import USAGE, Arguments, read_arguments
from kserve_pvc.kserve._contents import OURS, WORK, Contents, Source, check_unreserved
from kserve_pvc.kserve._destination import Destination
from kserve_pvc.kserve._digests import digest_refusal, found_digest, has_digest
from kserve_pvc.kserve._environment import Variables, leave_to_s3, read_variables, trust_bundle
from kserve_pvc.kserve._log import hide, write
from kserve_pvc.kserve._log import log as _log
from kserve_pvc.kserve._replacing import is_complete, may_repoint
from kserve_pvc.kserve._sources import CheckedSource, read_source
from kserve_pvc.locks.liveness import here

_TERMINATION_LOG = "/dev/termination-log"
_MAX_TERMINATION_BYTES = 4096


def main(argv: Sequence[str] | None = None) -> int:
    """
    Fill every destination, one after the other.

    Returns:
        0, or 1 after writing one line to the termination log.
    """
    outcome = initialize(sys.argv[1:] if argv is None else argv)
    write(sys.stdout, outcome.text)
    return 0 if outcome.error is None else 1


@attrs.frozen(kw_only=True)
class Outcome:
    """
    How a run ended.

    Args:
        pairs: The sources, without secrets, and their directories.
        error: What ended it, or None.
        message: What was logged about the error.
        text: What is to be printed: a help text, or how it is used.
    """

    pairs: Sequence[tuple[str, str]] = ()
    error: BaseException | None = None
    message: str = ""
    text: str = ""


def initialize(argv: Sequence[str]) -> Outcome:
    """
    Run the initializer. A failure is logged, and is the termination message of the container.
    """
    try:
        arguments = read_arguments(argv, __version__)
    except SettingsError as error:
        return attrs.evolve(_fail(error, str(error)), text=f"{USAGE}\n")  # As KServe's own.
    if arguments.text:
        return Outcome(text=arguments.text)
    # A deleted pod gets SIGTERM first: unwinding releases claims, so that no process waits for a lease to expire.
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        return _run(arguments)
    except (Terminated, KeyboardInterrupt) as error:
        end = "terminated" if isinstance(error, Terminated) else "interrupted"
        return _fail(error, "; ".join([end, *getattr(error, "__notes__", ())]))
    except StoreError as error:
        return _fail(error, str(error))
    except Exception as error:  # The message of another library may hold a signed URL.
        return _fail(error, f"{type(error).__name__}: {redact(str(error))}")
    finally:
        signal.signal(signal.SIGTERM, before)


class Terminated(BaseException):
    """
    Raised by SIGTERM. Not an `Exception`, so that no handler in between catches it.
    """


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    # A second signal must not interrupt the unwinding.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated


def _run(arguments: Arguments) -> Outcome:
    hide(*(("INFO",) if arguments.is_quiet else ()))
    pairs = arguments.pairs
    shown = ", ".join(f"({show_source(source)!r}, {printable(place)!r})" for source, place in pairs)
    _log("INFO", f"Initializing, args: (src_uri, dest_path): [{shown}]")
    fill_all(pairs, _variables(arguments))
    return Outcome(pairs=[(redact(source), place) for source, place in pairs])


def _variables(arguments: Arguments) -> Variables:
    given = {} if arguments.store is None else {"KSERVE_PVC_STORE": os.path.abspath(arguments.store)}
    variables = read_variables({**os.environ, **given})
    if given and variables.store is None:
        hint = "`KSERVE_PVC_DESTINATION` is `private`, which uses no store; give one of the two"
        raise SettingsError("--store", str(arguments.store), hint)
    if arguments.is_quiet:
        variables = attrs.evolve(variables, progress=False)
    os.environ.update({**trust_bundle(os.environ), **leave_to_s3(os.environ)})
    return variables


def fill_all(pairs: Sequence[tuple[str, str]], variables: Variables) -> None:
    """
    Put every source into its directory. Sources with the same directory are merged.

    Raises:
        StoreError: A source failed. The sources before it are complete.
    """
    if variables.digest is not None and len(pairs) != 1:
        raise SettingsError(
            "VERIFICATION_DIGEST",
            variables.digest,
            "it applies to one source only; for several, append `#sha256=` to each URI",
        )
    by_place: dict[str, list[CheckedSource]] = {}
    for source, place in pairs:
        by_place.setdefault(_check_place(place), []).append(read_source(source, variables))
    # Before the first of them is filled: what a source brings along makes no store of a later destination.
    stores = {place: find_store(Path(place), variables) for place in by_place}
    for place, sources in by_place.items():
        began = time.monotonic()
        for one in sources:
            _log("INFO", f"Copying contents of {one.shown} to local")
        _fill(Path(place), stores[place], sources, variables)
        for one in sources:
            _log("INFO", f"Successfully copied {one.shown} to {printable(place)}")
        _log("INFO", f"Model downloaded in {time.monotonic() - began} seconds.")


def _check_place(place: str) -> str:
    if not place or ".." in place.split("/") or "\0" in place:
        raise SettingsError("DEST", place, "expected the path of a directory, without `..`")
    try:
        check_unreserved(PurePosixPath(place))
    except UnsafePathError as error:
        raise SettingsError("DEST", place, error.rule) from None
    return os.path.normpath(place)


def _fill(place: Path, store: Path | None, sources: Sequence[CheckedSource], variables: Variables) -> None:
    if _is_own_source(place, sources):
        _log("INFO", f"{printable(place)} is the source itself: nothing to copy")
        return
    if store is None:
        _download_into(place, sources, variables)
        return
    inside = _inside(place, store)
    if inside is None and place.is_dir():
        is_complete(Destination(place), [one.ref for one in sources], variables)  # Or refused, before a download.
    models = [from_store(store, one, variables) for one in sources]
    if inside is None:
        _copy_into(place, Volume(store), sources, models, variables)
    else:
        _point_to(store, inside, sources, models, variables)


def _is_own_source(place: Path, sources: Sequence[CheckedSource]) -> bool:
    """Whether a local source is its own destination."""
    here = Path(os.path.realpath(place))
    for one in sources:
        source = Path(os.path.realpath(one.ref.location))
        if one.ref.scheme == "file" and source != here and here.is_relative_to(source):
            raise SettingsError("DEST", str(place), f"it is inside of its source `{one.shown}`")
    return (
        len(sources) == 1
        and sources[0].ref.scheme == "file"
        and Path(os.path.realpath(sources[0].ref.location)) == here
    )


def find_store(place: Path, variables: Variables) -> Path | None:
    """
    Return the root of the store that serves a destination, or None if it is private.

    It is the one that is configured, or the destination itself. Directories above it are not looked at, since others
    may write there.
    """
    if variables.kind == "private":
        return None
    if variables.store is not None:
        return variables.store
    if variables.kind == "store":
        return place
    if (place / layout.SETTINGS).is_file():
        return place
    above = next((above for above in place.parents if (above / layout.SETTINGS).is_file()), None)
    if above is not None:
        shown = f"{printable(str(place))} is inside the store at {printable(str(above))}"
        _log("WARNING", f"{shown}, which is not used, as KSERVE_PVC_STORE does not name it")
    return None


def _open(root: Path, one: CheckedSource, variables: Variables, *, mode: str | None = None) -> ModelStore:
    return ModelStore(
        root,
        mode="r" if mode == "r" else "rw",
        locker=variables.locker,
        lease_seconds=variables.lease_seconds,
        backends=unpacking(one.ref.service, variables.unpack_limits, variables.digest),
        storage_options=variables.storage_options,
        offline=variables.offline,
    )


def _ensure(store: ModelStore, one: CheckedSource, variables: Variables) -> Model:
    ref = one.ref
    ensure = partial(store.ensure, timeout=variables.timeout, progress=variables.progress)
    if ref.scheme in variables.streams:
        ensure = partial(ensure, max_workers=variables.streams[ref.scheme])
    # With its signature, which is sent and never stored.
    uri = ref.signed_uri
    try:
        return ensure(uri, allow_patterns=ref.allow_patterns, ignore_patterns=ref.ignore_patterns or None)
    except SourceNotFoundError:
        if not (
            one.is_filtered
            and one.may_be_object
            and one.is_one_object(file.entry.path for file in store.resolve(uri).files)
        ):
            raise
    # As in KServe, patterns do not apply to a URI of a single object.
    return ensure(uri)


def from_store(root: Path, one: CheckedSource, variables: Variables) -> Model:
    """
    Return a model of a shared store, and download it if it is missing. For a hit, the store need not be writable.

    Raises:
        StoreError: As `ModelStore.ensure`, or the stored model is not what KServe would serve.
    """
    open_store = partial(_open, root, one, variables, mode=variables.mode)
    model = _find(root, one) or _ensure(open_store(), one, variables)
    record = model.record
    files = record.files
    is_packed = record.archive_sha256 is None and len(files) == 1 and is_archive(files[0].path.name)
    if may_unpack(one.ref.service) and is_packed:
        rule = "the store holds the packed archive, which no initializer downloaded; remove it with `kserve-pvc rm`"
        raise PolicyError(one.shown, rule)
    _check_digest(open_store, model, variables)
    _log("INFO", f"{one.shown} is {model.status} in the store at {root}, at {model.path}")
    return model


def _check_digest(open_store: Callable[[], ModelStore], model: Model, variables: Variables) -> None:
    """Most backends have compared it before the model was published; a hit was published without it."""
    digest, record = variables.digest, model.record
    if digest is None or has_digest(digest, record.files, record.archive_sha256):
        return
    if model.status == "downloaded":
        open_store().remove(model.ref)
        raise DigestMismatchError(model.uri, digest, found_digest(record.files, record.archive_sha256))
    raise digest_refusal(model.uri, record.files, record.archive_sha256, "remove the model with `kserve-pvc rm`")


def _find(root: Path, one: CheckedSource) -> Model | None:
    ref = one.ref
    with suppress(StoreError):
        store = ModelStore(root)
        with suppress(ModelNotFoundError):
            return store.get(ref.uri, allow_patterns=ref.allow_patterns, ignore_patterns=ref.ignore_patterns or None)
        if one.is_filtered and one.may_be_object:
            model = store.get(ref.uri)
            return model if one.is_one_object(file.path for file in model.record.files) else None
    return None


def _download_into(place: Path, sources: Sequence[CheckedSource], variables: Variables) -> None:
    """Download into a private directory."""
    destination = Destination(place)
    is_done = partial(is_complete, destination, [one.ref for one in sources], variables)
    if is_done():
        _log("INFO", f"{printable(place)} is complete: nothing to download")
        _tidy(destination, variables)
        return
    with destination.writing(*_writer(variables), is_done=is_done) as check:
        if not is_done():
            _move(destination, sources, _download(destination, sources, variables), check)


def _writer(variables: Variables) -> tuple[Holder, float]:
    return here(*pod_and_node()), variables.lease_seconds or NETWORK_LEASE_SECONDS


def _download(destination: Destination, sources: Sequence[CheckedSource], variables: Variables) -> Sequence[Model]:
    # This process has the destination locked. A `flock` ends with it, so no later one waits for a lease to expire.
    variables = attrs.evolve(variables, locker="flock", lease_seconds=None)
    if _started_keys(destination) - {key for one in sources for key in one.keys}:
        destination.delete(WORK)  # Left by a killed download of another source, and of no use.
    try:
        _open(destination.make_work(), sources[0], variables)
    except StoreFormatError:
        # Only a broken volume or a foreign process damages it, and it is of no use.
        destination.delete(WORK)
    models = []
    for one in sources:
        open_store = partial(_open, destination.make_work(), one, variables)
        with _discarding(destination, DigestMismatchError):
            models.append(_ensure(open_store(), one, variables))
        with _discarding(destination, StoreError):  # Of what a killed start has left, too.
            _check_digest(open_store, models[-1], variables)
    return models


@contextmanager
def _discarding(destination: Destination, error: type[StoreError]) -> Iterator[None]:
    try:
        yield
    except error:
        destination.delete(WORK)
        raise


def _started_keys(destination: Destination) -> set[str]:
    """Return the keys of unfinished downloads of an earlier run."""
    try:
        return destination.started_keys()
    except StoreError:
        return set()


def _tidy(destination: Destination, variables: Variables) -> None:
    """Delete what a process left that was killed after the directory was complete, or an earlier version."""
    if destination.is_tidy:
        return
    # A hit needs no write permission, and another process may be replacing the model.
    with suppress(StoreError), destination.writing(*_writer(variables)):
        pass
    if not destination.is_tidy:
        place = printable(destination.absolute(OURS))
        _log("WARNING", f"{place} cannot be deleted now; a server that takes every directory for a model will fail")


def _contents(
    sources: Sequence[CheckedSource], models: Sequence[Model], *, is_linked: bool = False
) -> tuple[Contents, Mapping[PurePosixPath, Path]]:
    """Merge models, and return the origin of each file. As in KServe, a later model wins."""
    files, origins = {}, {}
    for model in models:
        for file in model.record.files:
            files[file.path], origins[file.path] = file, model.path / file.path
    recorded = [
        Source(key=one.ref.key, uri=model.uri, version=model.version, archive_sha256=model.record.archive_sha256)
        for one, model in zip(sources, models, strict=True)
    ]
    return Contents(sources=recorded, files=[files[path] for path in sorted(files)], is_linked=is_linked), origins


def _move(
    destination: Destination, sources: Sequence[CheckedSource], models: Sequence[Model], check: Callable[[], None]
) -> None:
    try:
        contents, origins = _contents(sources, models)
    except UnsafePathError:
        destination.delete(WORK)
        raise

    def place(file: FileEntry) -> None:
        if not destination.move(PurePosixPath(origins[file.path].relative_to(destination.root)), file):
            destination.delete(WORK)
            raise VolumeError(str(destination.absolute(file.path)), "renaming", "another process has removed it")

    destination.fill(contents, place, check)


def _copy_into(
    place: Path, store: Volume, sources: Sequence[CheckedSource], models: Sequence[Model], variables: Variables
) -> None:
    """Fill a directory from a store that is mounted elsewhere."""
    destination = Destination(place)
    versions = [model.version for model in models]
    is_done = partial(is_complete, destination, [one.ref for one in sources], variables, versions)
    if is_done():
        _log("INFO", f"{printable(place)} is complete: nothing to copy")
        _tidy(destination, variables)
        return
    contents, origins = _contents(sources, models, is_linked=variables.methods == ("symlink",))
    used: set[str] = set()
    with destination.writing(*_writer(variables), is_done=is_done) as check:
        if not is_done():
            destination.fill(
                contents,
                lambda file: used.add(destination.materialize(store, origins[file.path], file, variables.methods)),
                check,
            )
    _log("INFO", f"{printable(place)} is complete, by {' and '.join(sorted(used)) or 'another process'}")


def _inside(place: Path, store: Path) -> PurePosixPath | None:
    """Return the path of a destination inside the store, or None if it is outside."""
    parent = Path(os.path.realpath(place.parent)) / place.name if place.name else Path("/")
    root = Path(os.path.realpath(store))
    if Path(os.path.realpath(place)) == root:
        return PurePosixPath()
    return PurePosixPath(parent.relative_to(root)) if parent.is_relative_to(root) else None


def _point_to(
    store: Path,
    inside: PurePosixPath,
    sources: Sequence[CheckedSource],
    models: Sequence[Model],
    variables: Variables,
) -> None:
    """Create links in the store, which a server mounts as its model directory."""
    writer = VolumeWriter(store)
    for one, model in zip(sources, models, strict=True):
        view = layout.view_link(model.key)
        if not settle_view(writer, model.key):
            raise _cannot_link(writer, view)
        _log("INFO", f"{one.shown} is at `{view}` of this volume; mount that directory into the server")
        if inside.parts and inside != view:
            _check_name(inside, sources)
            # To the generation: for a server that mounts the whole store, the model changes at a restart only.
            target = os.path.relpath(layout.generation_dir(model.key, model.path.name), inside.parent)
            if not may_repoint(store, inside, one.ref, model, variables):
                continue
            if writer.link_target(inside) != target and not writer.repoint(inside, target):
                raise _cannot_link(writer, inside)


def _cannot_link(writer: VolumeWriter, place: PurePosixPath) -> VolumeError:
    reason = "a file that is not a link has that name, or the volume does not support symbolic links"
    return VolumeError(str(writer.absolute(place)), "linking a model", reason)


def _check_name(inside: PurePosixPath, sources: Sequence[CheckedSource]) -> None:
    if len(sources) != 1:
        raise SettingsError(
            "DEST",
            str(inside),
            f"it is one link in a store, for {len(sources)} sources; give each its own directory",
        )
    if inside.parts[0] in (layout.META.name, layout.MODELS.name):
        raise SettingsError("DEST", str(inside), "it is reserved for the store; use a directory next to `models`")


def _fail(error: BaseException, text: str) -> Outcome:
    line = printable(text).strip()
    _log("ERROR", line)
    place = os.environ.get("KSERVE_PVC_TERMINATION_LOG") or _TERMINATION_LOG
    # The kubelet creates the file, so it exists in containers only.
    with suppress(OSError):
        fd = os.open(place, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.write(fd, line.encode(errors="replace")[:_MAX_TERMINATION_BYTES])
        finally:
            os.close(fd)
    return Outcome(error=error, message=line)
