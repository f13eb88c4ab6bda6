"""
Finding the backend for a URI scheme: a factory that was given, one of ours, a plug-in, or a protocol of fsspec, in this
order.

Plug-ins are entry points of the group `kserve_pvc.backends`: the name is the scheme, the value a callable that takes
the store's `storage_options` and returns a backend. The built-in ones are registered the same way, and win over others:
what is installed beside this package changes nothing about a scheme of ours. `backends=` does, by the name of the
scheme. A plug-in is imported when its scheme is first used, never earlier.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, TextIO

from kserve_pvc._source.contract import Backend, BackendFactory
from kserve_pvc._source.ref import ModelRef
from kserve_pvc.errors import UnknownSchemeError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from fsspec import AbstractFileSystem as AbstractFileSystem  # Its name for the rooms above, which have no fsspec.

GROUP = "kserve_pvc.backends"

# What to install for schemes whose backend needs a package that is missing.
_EXTRAS = {"abfs": "azure", "abfss": "azure", "az": "azure", "gs": "gs", "hf": "hf", "s3": "s3"}
# The entry points of this distribution, as in `pyproject.toml`.
_BUILT_IN = {
    "abfs": ("kserve_pvc.backends.azure", "AzureBackend"),
    "abfss": ("kserve_pvc.backends.azure", "AzureBackend"),
    "az": ("kserve_pvc.backends.azure", "AzureBackend"),
    "file": ("kserve_pvc.backends.file", "file_backend"),
    "fsspec": ("kserve_pvc.backends.fsspec_", "FsspecBackend"),
    "gs": ("kserve_pvc.backends.gs", "GSBackend"),
    "hf": ("kserve_pvc.backends.hf", "hf_backend"),
    "http": ("kserve_pvc.backends.http", "http_backend"),
    "https": ("kserve_pvc.backends.http", "http_backend"),
    "pvc": ("kserve_pvc.backends.pvc", "PvcBackend"),
    "s3": ("kserve_pvc.backends.s3", "S3Backend"),
}
# Schemes that mean one thing to KServe and another to fsspec: an image registry, and the object storage of Oracle.
_NOT_OF_FSSPEC = ("oci",)

# What `sys.stdout` was, once for each plug-in that is being loaded now.
_SET_ASIDE: list[TextIO] = []
_GUARD = threading.Lock()


def check_scheme(scheme: str, factories: Mapping[str, BackendFactory]) -> None:
    """
    Make sure that a scheme has a backend, without importing it.

    Those of this distribution are known without reading the metadata of all others; whether another one claims them too
    is checked before they are used.

    Raises:
        UnknownSchemeError: No distribution serves it and fsspec does not know it, or two distributions serve it.
    """
    if scheme not in factories and scheme not in _BUILT_IN and _find(scheme) is None and not _fsspec_knows(scheme):
        raise _unknown(scheme, factories)


def list_plugins() -> Mapping[str, Sequence[str]]:
    """
    Return the distributions that claim a scheme besides this one, by scheme, each with its version.
    """
    from importlib.metadata import entry_points

    found: dict[str, list[str]] = {}
    for point in entry_points(group=GROUP):
        if point.dist is not None and tuple(point.value.split(":")) == _BUILT_IN.get(point.name):
            continue
        name = "?" if point.dist is None else f"{point.dist.name} {point.dist.version}"
        used = "" if point.name not in _BUILT_IN else ", not used: the scheme is built in"
        if (shown := f"{name} ({point.value}){used}") not in found.setdefault(point.name, []):
            found[point.name].append(shown)
    return found


def check_filesystem(filesystem: AbstractFileSystem) -> None:
    """
    Make sure that a file system can be used by a call of this thread, before anything is claimed.

    Raises:
        SettingsError: It cannot.
    """
    from kserve_pvc.backends._fsspec.filesystems import check_instance

    check_instance(filesystem)


def options_for(
    ref: ModelRef, options: Mapping[str, Any], factories: Mapping[str, BackendFactory]
) -> Mapping[str, Any]:
    """
    Choose the options of one scheme, where they are given by scheme: a secret for one service is not for any other.
    """
    names = (ref.scheme, ref.scheme.removeprefix("fsspec+"), ref.service)
    if not options or not all(isinstance(value, Mapping) for value in options.values()):
        return options
    if not any(name in _BUILT_IN or name in factories or name in names or _fsspec_knows(name) for name in options):
        return options
    return next((options[name] for name in names if options.get(name)), {})


def make_backend(
    scheme: str,
    factories: Mapping[str, BackendFactory],
    options: Mapping[str, Any],
    *,
    filesystem: AbstractFileSystem | None = None,
) -> Backend:
    """
    Make the backend of a scheme: of the file system given, or from the factories, or from the installed distributions.

    Raises:
        SettingsError: The file system cannot be used.
        UnknownSchemeError: No distribution serves the scheme, two do, or the one that does cannot be imported.
    """
    if filesystem is not None:
        from kserve_pvc.backends.fsspec_ import through_instance

        return through_instance(filesystem, options)
    try:
        if scheme in factories:
            factory = factories[scheme]
        elif scheme in _BUILT_IN:
            # Also where a distribution claims it: installing one must not change where models come from.
            module, name = _BUILT_IN[scheme]
            factory = getattr(import_module(module), name)
        else:
            factory = _find_factory(scheme, factories)
        return factory(options)
    except (ImportError, SystemExit) as error:
        # A foreign factory may exit, as its module may when it is imported.
        raise UnknownSchemeError(scheme, _how_to_install(scheme, error)) from error


def _find_factory(scheme: str, factories: Mapping[str, BackendFactory]) -> BackendFactory:
    """Look among the plug-ins, and then among the protocols of fsspec."""
    point = _find(scheme)
    if point is not None:
        return _load(point)
    if not _fsspec_knows(scheme):
        raise _unknown(scheme, factories)
    from kserve_pvc.backends.fsspec_ import FsspecBackend

    return FsspecBackend


def _fsspec_knows(scheme: str) -> bool:
    return scheme not in _NOT_OF_FSSPEC and scheme in _protocols_of_fsspec()


def _protocols_of_fsspec() -> set[str]:
    """Return those that it would import a class for, and those that a program has registered."""
    from fsspec import available_protocols, registry

    return {*available_protocols(), *registry}


def _unknown(scheme: str, factories: Mapping[str, BackendFactory]) -> UnknownSchemeError:
    from difflib import get_close_matches
    from importlib.metadata import entry_points

    installed = {point.name for point in entry_points(group=GROUP)} | set(_BUILT_IN) | set(factories)
    known = (installed | _protocols_of_fsspec()) - {scheme}
    near = get_close_matches(scheme, sorted(known), n=3)
    guess = f"did you mean {' or '.join(f'`{name}://`' for name in near)}? " if near else ""
    served = ", ".join(f"`{name}`" for name in sorted(installed))
    others = f"those of fsspec are served too, and a plug-in adds others by an entry point of `{GROUP}`"
    return UnknownSchemeError(scheme, f"{guess}installed backends serve {served}; {others}")


def _load(point: EntryPoint) -> BackendFactory:
    try:
        with _printing_to_stderr():
            factory: BackendFactory = point.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        # Whatever a foreign module does when it is imported, exiting too, this scheme cannot be served.
        raise UnknownSchemeError(point.name, _how_to_install(point.name, error)) from error
    return factory


@contextmanager
def _printing_to_stderr() -> Iterator[None]:
    """
    Send to stderr what Python code prints, since a program may be reading a path or JSON from stdout.

    All threads share one `sys.stdout`: what another one prints meanwhile goes to stderr too.
    """
    with _GUARD:
        _SET_ASIDE.append(sys.stdout)
        sys.stdout = sys.stderr
    try:
        yield
    finally:
        with _GUARD:
            # Of several threads that load plug-ins at once, the last to end restores what the first has found.
            found = _SET_ASIDE[0]
            _SET_ASIDE.pop()
            if not _SET_ASIDE:
                sys.stdout = found


def _find(scheme: str) -> EntryPoint | None:
    # Reading the metadata of all distributions takes longer than a whole warm hit, which never comes here.
    from importlib.metadata import entry_points

    found = {
        (point.dist.name if point.dist else "?", point.value): point for point in entry_points(group=GROUP, name=scheme)
    }
    if len(found) > 1:
        claimants = " and ".join(f"`{name}`" for name, _ in sorted(found))
        raise UnknownSchemeError(scheme, f"{claimants} both claim it; uninstall one, or choose with `backends=`")
    return next(iter(found.values()), None)


def _how_to_install(scheme: str, error: BaseException) -> str:
    if scheme in _EXTRAS and isinstance(error, ImportError):
        return f"install it with `pip install 'kserve-pvc[{_EXTRAS[scheme]}]'` ({error})"
    return f"its plug-in cannot be loaded: {type(error).__name__}: {error}"
