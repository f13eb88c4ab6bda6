"""
The storage initializer: puts models where KServe says, from a store that its pods share if there is one.

It takes what KServe gives its own initializer, pairs of a source and a directory, and is told everything else by its
environment.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path, PurePosixPath
from types import FrameType
from typing import NoReturn

import attrs

from kserve_pvc._format import layout
from kserve_pvc._format.records import FileEntry
from kserve_pvc._keys.aliases import settle_view
from kserve_pvc._model import Model
from kserve_pvc._settings import pod_and_node
from kserve_pvc._source.ref import ModelRef, parse_ref, redact
from kserve_pvc._store import ModelStore
from kserve_pvc._volume.profile import NETWORK_LEASE_SECONDS
from kserve_pvc._volume.writing import VolumeWriter
from kserve_pvc.errors import (
    DigestMismatchError,
    InvalidURIError,
    ModelNotFoundError,
    PolicyError,
    SettingsError,
    SourceNotFoundError,
    StoreError,
    StoreFormatError,
    UnknownSchemeError,
    VolumeError,
    printable,
)
from kserve_pvc.kserve._archives import is_archive, unpacking
from kserve_pvc.kserve._destination import WORK, Contents, Destination, Source
from kserve_pvc.kserve._environment import Variables, read_variables, trust_bundle
from kserve_pvc.locks.liveness import here

_USAGE = "usage: kserve-pvc-initializer SRC DEST [SRC DEST ...]"
_TERMINATION_LOG = "/dev/termination-log"
_MAX_TERMINATION_BYTES = 4096
_GIT = re.compile(r"https://.+\.git/?")
# Schemes of KServe that are served neither here nor by a plug-in, and what to do instead.
_ELSEWHERE = {
    "oci": "leave images to KServe, by `oci://` without this initializer's ClusterStorageContainer",
    "modelscope": "copy the model to a bucket, or fetch it from Hugging Face",
    "hdfs": "copy the model to a bucket, or read it through WebHDFS with `fsspec+webhdfs://`",
    "webhdfs": "write `fsspec+webhdfs://`",
}


def main(argv: Sequence[str] | None = None) -> int:
    """
    Fill every destination, one after the other, and return 0, or 1 with one line in the termination log.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # A pod that is deleted gets SIGTERM first: unwinding gives claims back, so that nobody waits out a lease.
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        return _run(arguments)
    except _Terminated:
        return _fail("terminated; what was fetched is kept for the next start")
    except KeyboardInterrupt:
        return _fail("interrupted; what was fetched is kept for the next start")
    except StoreError as error:
        return _fail(str(error))
    except Exception as error:  # The text of a foreign error may hold a signed URL.
        return _fail(f"{type(error).__name__}: {redact(str(error))}")
    finally:
        signal.signal(signal.SIGTERM, before)


class _Terminated(BaseException):
    """
    SIGTERM has come. Not an error that anything in between should take for one of its own.
    """


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    # Once is enough: unwinding must not be interrupted by another one.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Terminated


def _run(arguments: Sequence[str]) -> int:
    if len(arguments) < 2 or len(arguments) % 2:
        print(_USAGE, flush=True)
        return _fail(f"{len(arguments)} arguments are no pairs of a source and a directory; {_USAGE}")
    pairs = list(zip(arguments[::2], arguments[1::2], strict=True))
    shown = ", ".join(f"({redact(source)!r}, {printable(place)!r})" for source, place in pairs)
    _log("INFO", f"Initializing, args: (src_uri, dest_path): [{shown}]")
    fill_all(pairs, _variables())
    return 0


def _variables() -> Variables:
    os.environ.update(trust_bundle(os.environ))
    return read_variables()


def fill_all(pairs: Sequence[tuple[str, str]], variables: Variables) -> None:
    """
    Put every source into its directory. Those of one directory are put there together.

    Raises:
        StoreError: One could not be put there. Those before it are.
    """
    if variables.digest is not None and len(pairs) != 1:
        raise SettingsError(
            "VERIFICATION_DIGEST", variables.digest, "it is for one source; name the digests of several by `#sha256=`"
        )
    by_place: dict[str, list[Wanted]] = {}
    for source, place in pairs:
        if not place or ".." in place.split("/") or "\0" in place:
            raise SettingsError("DEST", place, "name a directory, by a path that does not climb")
        by_place.setdefault(os.path.normpath(place), []).append(read_source(source, variables))
    for place, wanted in by_place.items():
        began = time.monotonic()
        for one in wanted:
            _log("INFO", f"Copying contents of {one.shown} to local")
        _fill(Path(place), wanted, variables)
        for one in wanted:
            _log("INFO", f"Successfully copied {one.shown} to {printable(place)}")
        _log("INFO", f"Model downloaded in {time.monotonic() - began} seconds.")


@attrs.frozen(kw_only=True)
class Wanted:
    """
    A source that was checked.
    """

    ref: ModelRef

    @property
    def shown(self) -> str:
        return redact(self.ref.uri)

    @property
    def is_filtered(self) -> bool:
        return self.ref.allow_patterns is not None or bool(self.ref.ignore_patterns)

    @property
    def keys(self) -> set[str]:
        """What a store may know it by: an object that is named itself is fetched without patterns."""
        return {self.ref.key, attrs.evolve(self.ref, allow_patterns=None, ignore_patterns=()).key}

    def is_one_object(self, paths: Iterable[PurePosixPath]) -> bool:
        """Whether these are all files of the source, and so the source is a file by itself."""
        return [str(path) for path in paths] == [self.ref.location.rpartition("/")[2]]


def read_source(source: str, variables: Variables) -> Wanted:
    """
    Check a source, without asking it.

    Raises:
        InvalidURIError, UnknownSchemeError, PolicyError: It means nothing, or is not for this initializer.
    """
    if ".." in source.split("://", 1)[-1].split("/"):
        raise InvalidURIError(redact(source), "its path may not climb with `..`")
    if _GIT.fullmatch(source):
        raise InvalidURIError(
            redact(source), "git repositories are not fetched; put the files into a bucket, or on Hugging Face"
        )
    if (scheme := source.partition("://")[0]) in _ELSEWHERE:
        raise UnknownSchemeError(scheme, _ELSEWHERE[scheme])
    if source and "://" not in source and Path(source).exists():
        source = os.path.abspath(source)
    ref = parse_ref(source, allow_patterns=variables.allow_patterns, ignore_patterns=variables.ignore_patterns)
    return Wanted(ref=ref)


def _fill(place: Path, wanted: Sequence[Wanted], variables: Variables) -> None:
    if _is_own_source(place, wanted):
        _log("INFO", f"{printable(place)} is the source itself, so nothing is copied")
        return
    store = find_store(place, variables)
    if store is None:
        _download_into(place, wanted, variables)
        return
    models = [from_store(store, one, variables) for one in wanted]
    inside = _inside(place, store)
    if inside is None:
        _copy_into(place, wanted, models, variables)
    else:
        _point_to(store, inside, wanted, models)


def _is_own_source(place: Path, wanted: Sequence[Wanted]) -> bool:
    """Whether a local source is its own destination."""
    here = Path(os.path.realpath(place))
    for one in wanted:
        source = Path(os.path.realpath(one.ref.location))
        if one.ref.scheme == "file" and source != here and here.is_relative_to(source):
            raise SettingsError("DEST", str(place), f"it lies inside of its source `{one.shown}`")
    return (
        len(wanted) == 1 and wanted[0].ref.scheme == "file" and Path(os.path.realpath(wanted[0].ref.location)) == here
    )


def find_store(place: Path, variables: Variables) -> Path | None:
    """
    The root of the store that a destination is served from, or None if it is private.
    """
    if variables.kind == "private":
        return None
    if variables.store is not None:
        return variables.store
    if variables.kind == "store":
        return place
    return next((above for above in (place, *place.parents) if (above / layout.SETTINGS).is_file()), None)


def _open(root: Path, variables: Variables, *, mode: str | None = None) -> ModelStore:
    return ModelStore(
        root,
        mode="r" if mode == "r" else "rw",
        locker=variables.locker,
        lease_seconds=variables.lease_seconds,
        backends=unpacking(),
        storage_options=variables.storage_options,
        offline=variables.offline,
    )


def _ensure(store: ModelStore, one: Wanted, variables: Variables) -> Model:
    ref = one.ref
    ensure = partial(store.ensure, timeout=variables.timeout)
    if ref.scheme in variables.streams:
        ensure = partial(ensure, max_workers=variables.streams[ref.scheme])
    # With its signature, which is asked with and never stored.
    uri = ref.uri if ref.query is None else f"{ref.uri}?{ref.query}"
    try:
        return ensure(uri, allow_patterns=ref.allow_patterns, ignore_patterns=ref.ignore_patterns or None)
    except SourceNotFoundError:
        if not (
            one.is_filtered
            and ref.scheme == "s3"
            and one.is_one_object(file.entry.path for file in store.resolve(uri).files)
        ):
            raise
    # As in KServe, patterns choose among files, and an object that is named itself is no choice.
    return ensure(uri)


def from_store(root: Path, one: Wanted, variables: Variables) -> Model:
    """
    The model in a store that pods share. If it is there, the store need not be writable.

    Raises:
        StoreError: As `ModelStore.ensure`; or it is there and not what KServe would serve.
    """
    model = _find(root, one) or _ensure(_open(root, variables, mode=variables.mode), one, variables)
    files = model.record.files
    if one.ref.service in unpacking() and len(files) == 1 and is_archive(files[0].path.name):
        rule = "the store holds it as the archive that it is, which was not fetched by an initializer; remove it with `kserve-pvc rm`"
        raise PolicyError(one.shown, rule)
    _check_digest([model], variables)
    _log("INFO", f"{one.shown} is {model.status} in the store at {root}, as {model.path}")
    return model


def _find(root: Path, one: Wanted) -> Model | None:
    ref = one.ref
    with suppress(StoreError):
        store = ModelStore(root)
        with suppress(ModelNotFoundError):
            return store.get(ref.uri, allow_patterns=ref.allow_patterns, ignore_patterns=ref.ignore_patterns or None)
        if one.is_filtered and ref.scheme == "s3":
            model = store.get(ref.uri)
            return model if one.is_one_object(file.path for file in model.record.files) else None
    return None


def _check_digest(models: Sequence[Model], variables: Variables) -> None:
    if variables.digest is None:
        return
    files = [file for model in models for file in model.record.files]
    if len(files) != 1:
        rule = f"`VERIFICATION_DIGEST` is the SHA-256 of one file, and this has {len(files)}; unset it"
        raise PolicyError(models[0].uri, rule)
    if files[0].sha256 != variables.digest:
        raise DigestMismatchError(str(files[0].path), variables.digest, str(files[0].sha256))


def _download_into(place: Path, wanted: Sequence[Wanted], variables: Variables) -> None:
    """Fill a directory that nobody else writes to, keeping nothing but its files."""
    destination = Destination(place)
    if _holds(destination, wanted, None):
        _log("INFO", f"{printable(place)} is complete, so nothing is downloaded")
        _tidy(destination)
        return
    with destination.writing(here(*pod_and_node()), variables.lease_seconds or NETWORK_LEASE_SECONDS) as check:
        if not _holds(destination, wanted, None):
            models = _download(destination, wanted, variables)
            _move(destination, wanted, models, check)
        destination.tidy()


def _download(destination: Destination, wanted: Sequence[Wanted], variables: Variables) -> Sequence[Model]:
    # Whoever gets here is alone, and its lock ends with it: nobody has to wait for the lease of one that was killed.
    variables = attrs.evolve(variables, locker="flock", lease_seconds=None)
    if _begun(destination) - {key for one in wanted for key in one.keys}:
        destination.drop(WORK)  # Somebody was killed over another source; nobody goes on with it, and it takes up room.
    try:
        store = _open(destination.make_work(), variables)
    except StoreFormatError:
        # Nothing but a broken volume or somebody else damages this; and it is of no use to anybody.
        destination.drop(WORK)
        store = _open(destination.make_work(), variables)
    models = [_ensure(store, one, variables) for one in wanted]
    try:
        _check_digest(models, variables)
    except StoreError:
        destination.drop(WORK)
        raise
    return models


def _begun(destination: Destination) -> set[str]:
    """The keys of what an earlier run began and did not end."""
    try:
        return destination.begun()
    except StoreError:
        return set()


def _tidy(destination: Destination) -> None:
    # A hit needs no right to write.
    with suppress(StoreError):
        destination.tidy()


def _holds(destination: Destination, wanted: Sequence[Wanted], versions: Sequence[str] | None) -> bool:
    record = destination.record()
    if record is None or [source.key for source in record.sources] != [one.ref.key for one in wanted]:
        return False
    return versions is None or [source.version for source in record.sources] == list(versions)


def _contents(
    wanted: Sequence[Wanted], models: Sequence[Model], *, is_linked: bool = False
) -> tuple[Contents, Mapping[PurePosixPath, Path]]:
    """What these models are together, and where each file of it comes from. A later one wins, as with KServe."""
    files, origins = {}, {}
    for model in models:
        for file in model.record.files:
            files[file.path], origins[file.path] = file, model.path / file.path
    sources = [
        Source(key=one.ref.key, uri=model.uri, version=model.version) for one, model in zip(wanted, models, strict=True)
    ]
    return Contents(sources=sources, files=[files[path] for path in sorted(files)], is_linked=is_linked), origins


def _move(
    destination: Destination, wanted: Sequence[Wanted], models: Sequence[Model], check: Callable[[], None]
) -> None:
    contents, origins = _contents(wanted, models)

    def bring(file: FileEntry) -> None:
        if not destination.move(PurePosixPath(origins[file.path].relative_to(destination.root)), file):
            destination.drop(WORK)
            raise VolumeError(str(destination.absolute(file.path)), "renaming", "somebody else has taken it away")

    destination.fill(contents, bring, check)


def _copy_into(place: Path, wanted: Sequence[Wanted], models: Sequence[Model], variables: Variables) -> None:
    """Fill a directory from a store that is mounted beside it."""
    destination = Destination(place)
    if _holds(destination, wanted, [model.version for model in models]):
        _log("INFO", f"{printable(place)} is complete, so nothing is copied")
        return
    contents, origins = _contents(wanted, models, is_linked=variables.ways == ("symlink",))
    used: set[str] = set()
    with destination.writing(here(*pod_and_node()), variables.lease_seconds or NETWORK_LEASE_SECONDS) as check:
        destination.fill(
            contents, lambda file: used.add(destination.take(origins[file.path], file, variables.ways)), check
        )
        destination.tidy()
    _log("INFO", f"{printable(place)} holds it by {' and '.join(sorted(used))}")


def _inside(place: Path, store: Path) -> PurePosixPath | None:
    """Where in the store a destination lies, or None if it lies beside it."""
    parent = Path(os.path.realpath(place.parent)) / place.name if place.name else Path("/")
    root = Path(os.path.realpath(store))
    if Path(os.path.realpath(place)) == root:
        return PurePosixPath()
    return PurePosixPath(parent.relative_to(root)) if parent.is_relative_to(root) else None


def _point_to(store: Path, inside: PurePosixPath, wanted: Sequence[Wanted], models: Sequence[Model]) -> None:
    """Give models names in the store, which lead a server's mount to what it serves."""
    writer = VolumeWriter(store)
    for one, model in zip(wanted, models, strict=True):
        view = layout.view_link(model.key)
        if not settle_view(writer, model.key):
            raise _not_named(writer, view)
        _log("INFO", f"`{view}` of this volume is {one.shown}; mount that directory into the server")
        if inside.parts and inside != view:
            _check_name(inside, wanted)
            # To the generation: what a server sees through a mount of the whole store changes only with another start.
            target = os.path.relpath(layout.generation_dir(model.key, model.path.name), inside.parent)
            if writer.link_target(inside) != target and not writer.repoint(inside, target):
                raise _not_named(writer, inside)


def _not_named(writer: VolumeWriter, place: PurePosixPath) -> VolumeError:
    reason = "something that is no link has that name, or the volume has no symbolic links"
    return VolumeError(str(writer.absolute(place)), "naming a model", reason)


def _check_name(inside: PurePosixPath, wanted: Sequence[Wanted]) -> None:
    if len(wanted) != 1:
        raise SettingsError(
            "DEST",
            str(inside),
            f"it is one name in a store, for {len(wanted)} sources; give each a directory of its own",
        )
    if inside.parts[0] in (layout.META.name, layout.MODELS.name):
        raise SettingsError("DEST", str(inside), "it belongs to the store; name a directory beside `models`")


def _fail(text: str) -> int:
    line = printable(text).strip()
    _log("ERROR", line)
    place = os.environ.get("KSERVE_PVC_TERMINATION_LOG") or _TERMINATION_LOG
    # Only in a container there is such a file, and the kubelet has made it.
    with suppress(OSError):
        fd = os.open(place, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.write(fd, line.encode(errors="replace")[:_MAX_TERMINATION_BYTES])
        finally:
            os.close(fd)
    return 1


def _log(level: str, text: str) -> None:
    moment = datetime.now(UTC)
    stamp = f"{moment:%Y-%m-%d %H:%M:%S}.{moment.microsecond // 1000:03d}"
    print(f"{stamp} {os.getpid()} storage.initializer {level} {text}", file=sys.stderr, flush=True)
