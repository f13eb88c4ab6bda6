"""
Finding the plug-in for a URI scheme.

Plug-ins are entry points of the group `kserve_pvc.backends`: the name is the scheme, the value a callable that takes
the store's `storage_options` and returns a back end. The built-in ones are registered the same way. A plug-in is
imported when its scheme is first used, never earlier.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kserve_pvc._source import Backend, BackendFactory
from kserve_pvc.errors import UnknownSchemeError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "kserve_pvc.backends"

# What to install for schemes whose back end needs a package that is not there.
_EXTRAS = {"s3": "s3"}
_BUILT_IN = {"file", "s3"}


def check_scheme(scheme: str, factories: Mapping[str, BackendFactory]) -> None:
    """
    Make sure that somebody serves a scheme, without importing it.

    This distribution serves some, which is known without reading the metadata of all others; whether another one
    claims them too is looked at before they are used.

    Raises:
        UnknownSchemeError: No distribution serves it, or two do.
    """
    if scheme not in factories and scheme not in _BUILT_IN:
        _find(scheme)


def make_backend(scheme: str, factories: Mapping[str, BackendFactory], options: Mapping[str, Any]) -> Backend:
    """
    Make the back end of a scheme, from the factories given or else from the installed distributions.

    Raises:
        UnknownSchemeError: No distribution serves the scheme, two do, or the one that does cannot be imported.
    """
    factory = factories[scheme] if scheme in factories else _load(_find(scheme))
    try:
        return factory(options)
    except ImportError as error:
        raise UnknownSchemeError(scheme, _how_to_install(scheme, error)) from error


def _load(point: EntryPoint) -> BackendFactory:
    try:
        factory: BackendFactory = point.load()
    except Exception as error:  # Whatever a foreign module does when it is imported, this scheme cannot be served.
        raise UnknownSchemeError(point.name, _how_to_install(point.name, error)) from error
    return factory


def _find(scheme: str) -> EntryPoint:
    # Reading the metadata of all distributions takes longer than a whole warm hit, which never comes here.
    from importlib.metadata import entry_points

    found = {(point.dist.name if point.dist else "?", point.value): point for point in entry_points(group=GROUP, name=scheme)}
    if not found:
        raise UnknownSchemeError(scheme, f"installed back ends serve {_installed()}; a plug-in adds others by an entry point of `{GROUP}`")
    if len(found) > 1:
        claimants = " and ".join(f"`{name}`" for name, _ in sorted(found))
        raise UnknownSchemeError(scheme, f"{claimants} both claim it; uninstall one, or choose with `backends=`")
    return next(iter(found.values()))


def _installed() -> str:
    from importlib.metadata import entry_points

    return ", ".join(f"`{name}`" for name in sorted({point.name for point in entry_points(group=GROUP)})) or "nothing"


def _how_to_install(scheme: str, error: Exception) -> str:
    if scheme in _EXTRAS and isinstance(error, ImportError):
        return f"install it with `pip install 'kserve-pvc[{_EXTRAS[scheme]}]'` ({error})"
    return f"its plug-in cannot be loaded: {type(error).__name__}: {error}"
