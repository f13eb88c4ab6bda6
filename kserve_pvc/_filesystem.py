"""
The store as a read-only file system of fsspec: `kserve-pvc://`, for code that opens files by URL.

A path is one of three things, all below the directory of a store:

- `<root>`: a directory of all models that are present, each under its key;
- `<root>/<key>/config.json`: a file of one of them;
- `<root>/s3://bucket/model/config.json`: the same file by its source URI. Without a root before it, `s3://…` is looked
  up in the root of this file system.

Nothing is downloaded and nothing written, and no lease is taken: compose it with `ModelStore.open` to keep a model from
being removed meanwhile. Every call reads the newest version of a model.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NoReturn, cast

import attrs
from fsspec import AbstractFileSystem

from kserve_pvc._format import layout
from kserve_pvc._format.codec import KEY
from kserve_pvc._format.records import FileEntry
from kserve_pvc._keys.log import read_log
from kserve_pvc._model import Model
from kserve_pvc._settings import read_settings
from kserve_pvc._source.ref import ModelRef
from kserve_pvc._store import ModelStore
from kserve_pvc._volume.reading import Volume
from kserve_pvc.errors import InvalidURIError, ModelNotFoundError, PolicyError, ReadOnlyStoreError

PROTOCOL = "kserve-pvc"
_MAX_TREES = 16
_OWN_DIRECTORIES = frozenset(place.name for place in (layout.MODELS, layout.META, layout.NAMES))


def filesystem(root: str | os.PathLike[str] | None = None) -> StoreFileSystem:
    """
    Return a store as a read-only file system of fsspec.

    Paths are `<key>/config.json` or source URIs such as `s3://bucket/model/config.json`, with the root before them or
    not. Opened files are ordinary files of the volume: they have a `fileno()` and can be mapped into memory.

    Args:
        root: The directory of the store; None for `KSERVE_PVC_STORE`, which defaults to `/mnt/models`.

    Raises:
        StoreRootError: It is not a directory.
    """
    return StoreFileSystem(root=_default_root() if root is None else os.path.abspath(root))


@attrs.frozen
class _Tree:
    """
    The files of one version of a model, and what lies in each of its directories.
    """

    files: Mapping[str, FileEntry]
    directories: Mapping[str, Sequence[str]]


@attrs.frozen
class _Place:
    """
    Where a path leads: to the list of models, or to a file or directory `inner` of a model.
    """

    path: str
    model: Model | None = None
    inner: str = ""


class StoreFileSystem(AbstractFileSystem):  # type: ignore[misc]  # fsspec is not typed.
    """
    A read-only file system over the models that are present in a store. Never downloads.

    In a chain, `kserve-pvc:///mnt/models::s3://bucket/model/config.json`, the left part stands for the right one:
    the path `/mnt/models` is then that file, and `/mnt/models/x` what lies below it.

    Args:
        root: The directory of the store.
        fo: In a chain, the path that the next file system would read.
        target_protocol: In a chain, the protocol of that path.
    """

    protocol = PROTOCOL
    root_marker = ""
    # So that `fsspec.open_local` returns paths of the volume.
    local_file = True

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        fo: str | None = None,
        target_protocol: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.root = _default_root() if root is None else os.path.abspath(root)
        self._store = ModelStore(self.root)
        self._volume = Volume(self.root)
        self._target = None if fo is None else fo if "://" in fo else f"{target_protocol}://{fo}"
        self._trees: OrderedDict[tuple[str, str], _Tree] = OrderedDict()
        self._guard = threading.Lock()

    @property
    def fsid(self) -> str:
        return f"{PROTOCOL}:{self.root}"

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(one) for one in path]
        return os.fspath(path).removeprefix(f"{PROTOCOL}://").rstrip("/")

    @classmethod
    def _get_kwargs_from_urls(cls, path: str) -> dict[str, str]:
        place = cls._strip_protocol(path)
        return {"root": _find_root(place)} if place.startswith("/") else {}

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        """
        Say what a path is. A file has its recorded `sha256`; a model its `uri` and `version`.

        Raises:
            FileNotFoundError: No model that is present has it.
        """
        path = self._strip_protocol(path)
        place = self._locate(path)
        if place.model is None:
            return {"name": path, "size": 0, "type": "directory"}
        return self._describe(place.model, path, place.inner)

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        """
        List a directory: the models of the store, or what lies in a directory of one of them.

        Raises:
            FileNotFoundError: No model that is present has it.
        """
        path = self._strip_protocol(path)
        place = self._locate(path)
        above = f"{path}/" if path else ""
        if place.model is None:
            found = [self._describe(model, f"{above}{model.key}", "") for model in self._store.list()]
        elif place.inner in (tree := self._tree(place.model)).files:
            found = [self._describe(place.model, path, place.inner)]
        else:
            inside = tree.directories[place.inner]
            found = [self._describe(place.model, above + name.rpartition("/")[2], name) for name in inside]
        return found if detail else [info["name"] for info in found]

    def created(self, path: str) -> Any:
        return self._model_of(path).created_at

    modified = created

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> BinaryIO:
        if mode != "rb":
            self._refuse()
        place = self._locate(path)
        if place.model is None or place.inner not in self._tree(place.model).files:
            code = errno.EISDIR if place.model is None or not place.inner else errno.ENOENT
            raise OSError(code, os.strerror(code), path)
        model = place.model
        generation = layout.generation_dir(model.key, model.path.name)
        with self._volume.open_file(generation / PurePosixPath(place.inner)) as fd:
            return cast(BinaryIO, open(model.path / place.inner, "rb", opener=lambda *_: os.dup(fd)))

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ReadOnlyStoreError(self.root, "write through the file system", "use `ModelStore` and its methods")

    mkdir = makedirs = rmdir = rm = rm_file = _rm = cp_file = mv = touch = put_file = pipe_file = _refuse

    def _model_of(self, path: str) -> Model:
        place = self._locate(self._strip_protocol(path))
        if place.model is None:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        return place.model

    def _locate(self, path: str) -> _Place:
        below = path.removeprefix(self.root) if f"{path}/".startswith(f"{self.root}/") else f"/{path.lstrip('/')}"
        below = below.strip("/")
        if self._target is not None and "://" not in below:
            return self._by_uri(f"{self._target.rstrip('/')}/{below}".rstrip("/"), path)
        if "://" in below:
            return self._by_uri(below, path)
        if not below:
            return _Place(path)
        key, _, inner = below.partition("/")
        model = self._by_key(key, path)
        self._check_there(model, inner, path)
        return _Place(path, model, inner)

    def _by_key(self, key: str, path: str) -> Model:
        entry = read_log(self._volume, key).entry if KEY.fullmatch(key) else None
        if entry is None or not entry.is_present:
            raise FileNotFoundError(errno.ENOENT, f"no model with the key `{key}` is present in `{self.root}`", path)
        # Through the store, which never goes back to an older version than this process has seen.
        return self._store.get(
            ModelRef(
                uri=entry.uri,
                revision=entry.revision,
                allow_patterns=entry.allow_patterns,
                ignore_patterns=entry.ignore_patterns,
            )
        )

    def _by_uri(self, uri: str, path: str) -> _Place:
        """The longest URI of a model that is present and holds the rest; plain models come before narrower ones."""
        for prefix in _prefixes(uri):
            try:
                model = self._store.get(prefix)
            except (ModelNotFoundError, InvalidURIError, PolicyError):
                continue
            if (place := self._place_in(model, uri, path)) is not None:
                return place
        return self._by_narrower(uri, path)

    def _by_narrower(self, uri: str, path: str) -> _Place:
        """Among models with a revision or patterns, which share a URI; more than one of them is an error."""
        models = [model for model in self._store.list() if f"{uri}/".startswith(f"{model.uri.rstrip('/')}/")]
        found = [(model, place) for model in models if (place := self._place_in(model, uri, path)) is not None]
        longest = max((len(model.uri) for model, _ in found), default=0)
        places = [place for model, place in found if len(model.uri) == longest]
        if len(places) == 1:
            return places[0]
        if places:
            keys = " and ".join(f"`{place.model.key}`" for place in places if place.model is not None)
            raise FileNotFoundError(
                errno.ENOENT, f"`{uri}` is in several models of `{self.root}`; name one by its key: {keys}", path
            )
        raise FileNotFoundError(errno.ENOENT, f"no model that is present in `{self.root}` has `{uri}`", path)

    def _place_in(self, model: Model, uri: str, path: str) -> _Place | None:
        tree, inner = self._tree(model), uri[len(model.uri) :].strip("/")
        name = uri.rpartition("/")[2]
        if not inner and [*tree.files] == [name]:
            # The model of a single object is a directory with that file; its URI is that of the file.
            return _Place(path, model, name)
        if inner in tree.files or inner in tree.directories:
            return _Place(path, model, inner)
        return None

    def _check_there(self, model: Model, inner: str, path: str) -> None:
        tree = self._tree(model)
        if inner not in tree.files and inner not in tree.directories:
            raise FileNotFoundError(errno.ENOENT, f"`{model.uri}` has no `{inner}`", path)

    def _describe(self, model: Model, name: str, inner: str) -> dict[str, Any]:
        about = {"name": name, "uri": model.uri, "version": model.version, "created": model.created_at}
        file = self._tree(model).files.get(inner) if inner else None
        if file is None:
            return {**about, "size": 0, "type": "directory"}
        return {**about, "size": file.size_bytes, "type": "file", "sha256": file.sha256}

    def _tree(self, model: Model) -> _Tree:
        name = (model.key, model.path.name)
        with self._guard:
            tree = self._trees.get(name)
        if tree is None:
            tree = _make_tree(model.record.files)
            with self._guard:
                self._trees[name] = tree
                while len(self._trees) > _MAX_TREES:
                    self._trees.popitem(last=False)
        return tree


def _make_tree(files: Sequence[FileEntry]) -> _Tree:
    directories: dict[str, dict[str, None]] = {"": {}}
    for file in files:
        path = PurePosixPath(file.path)
        for inner, directory in zip((path, *path.parents), path.parents, strict=False):
            above = "" if directory == PurePosixPath() else str(directory)
            directories.setdefault(above, {})[str(inner)] = None
    return _Tree({str(f.path): f for f in files}, {name: [*inside] for name, inside in directories.items()})


def _prefixes(uri: str) -> list[str]:
    """A URI and everything above it, the longest first."""
    scheme, _, location = uri.partition("://")
    parts = location.split("/")
    return [f"{scheme}://{'/'.join(parts[:count])}" for count in range(len(parts), 0, -1) if any(parts[:count])]


def _find_root(path: str) -> str:
    """The nearest directory above a path, or the path itself, that holds a store and is not part of another one."""
    place = Path(os.path.abspath(path.partition("://")[0]))
    found: Path | None = None
    for directory in reversed((place, *place.parents)):
        # A model may hold whatever looks like a store.
        is_inside = found is not None and directory.relative_to(found).parts[0] in _OWN_DIRECTORIES
        if not is_inside and (directory / layout.SETTINGS).exists():
            found = directory
    if found is None:
        raise FileNotFoundError(errno.ENOENT, "no store is there or above", path)
    return str(found)


def _default_root() -> str:
    return os.path.abspath(read_settings().store)
