"""
The store that a verb gets, and when one is made: by `init`, or for a download or an import that can begin.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from kserve_pvc._cli.catalogue import warm_items
from kserve_pvc._cli.verbs import selection
from kserve_pvc._settings import read_settings
from kserve_pvc._source.arguments import check_count, check_timeout
from kserve_pvc._source.ref import parse_ref
from kserve_pvc._store import ModelStore
from kserve_pvc.errors import InvalidURIError, NoStoreError, StoreError

if TYPE_CHECKING:
    from kserve_pvc._download.warm import Item
    from kserve_pvc._settings import Mode, Settings

# A verb that writes is itself the request to write, unless the environment or the pod's annotation forbids it.
_WRITING = ("ensure", "rm", "import", "warm", "init")
# In a directory without a store these make one, or say what that would take. All other verbs fail.
_BEGINNING = ("ensure", "import", "warm", "init", "plan")


def open_store(arguments: argparse.Namespace) -> ModelStore:
    """
    Open the store that a verb is about, and make it only if the verb is to put something there.

    Raises:
        NoStoreError: There is none, and the verb does not make one.
        StoreError: There is none, and what the verb was to put there cannot be read.
    """
    settings = read_settings()
    invalid = _find_invalid(arguments)
    writes = _writes(arguments, is_offline=bool(settings.offline))
    if arguments.verb == "init" and settings.mode != "r":
        return _open(arguments, settings, "rw")
    store = _open(arguments, settings, "r")
    _name_models(store, arguments, invalid)
    if writes and settings.mode == "r":
        return store  # The verb refuses to write.
    if not store.exists and arguments.verb not in _BEGINNING and not _is_incomplete(arguments):
        raise NoStoreError("", str(store.root))
    if not writes or not (store.exists or _can_begin(store, arguments)):
        return store
    return _open(arguments, settings, "rw")


def _open(arguments: argparse.Namespace, settings: Settings, mode: Mode) -> ModelStore:
    return ModelStore(
        arguments.store or settings.store,
        mode=mode,
        locker=getattr(arguments, "locker", None) or settings.locker,
        lease_seconds=getattr(arguments, "lease_seconds", None) or settings.lease_seconds,
        offline=settings.offline,
    )


def _is_incomplete(arguments: argparse.Namespace) -> bool:
    """Whether the verb is going to say that an argument is missing, or one too many."""
    if arguments.verb == "export":
        return bool(arguments.json) and arguments.file == "-"
    return arguments.verb == "verify" and (arguments.uri is None) != bool(arguments.all)


def _find_invalid(arguments: argparse.Namespace) -> InvalidURIError | None:
    """What is wrong with the URI, which may still be a key or an alias. Others are refused before a store is made."""
    if getattr(arguments, "uri", None) is not None:
        try:
            parse_ref(arguments.uri, **selection(arguments))
        except InvalidURIError as error:
            return error
    return None


def _name_models(store: ModelStore, arguments: argparse.Namespace, invalid: InvalidURIError | None) -> None:
    """Put the model in place of a key, an alias or a directory that the store has printed."""
    if invalid is not None or str(getattr(arguments, "uri", None) or "").startswith("/"):
        ref = store.find(arguments.uri)
        if ref is None and invalid is not None:
            raise invalid
        arguments.uri = ref or arguments.uri
    broken = getattr(arguments, "break_claim", None) or ()
    arguments.break_claim = [store.find(uri) or uri if "://" not in uri else uri for uri in broken]


def _writes(arguments: argparse.Namespace, *, is_offline: bool) -> bool:
    """
    Tell whether a verb may write. Opening read-write creates the store, so what will be refused must not get that far.
    """
    if arguments.verb in ("ensure", "warm") and (is_offline or getattr(arguments, "local_files_only", False)):
        return False
    if arguments.verb == "warm" and not (arguments.uris or arguments.file):
        return False
    if arguments.verb == "alias":
        return arguments.uri is not None or arguments.drop is not None
    return arguments.verb in _WRITING or getattr(arguments, "break_claim", False)


def _can_begin(reading: ModelStore, arguments: argparse.Namespace) -> bool:
    """
    See that there is something to put into a store, before one is made. The first time that lists the source twice.

    Returns:
        False if the verb is going to refuse what it is given.
    """
    check_timeout(arguments.timeout)
    if arguments.verb == "import":
        from kserve_pvc._archive.bundle import open_bundle

        if arguments.file == "-":
            return False
        with open_bundle(arguments.file):
            return True
    check_count("max_workers", arguments.max_workers)
    if arguments.verb == "warm":
        return any(map(_is_valid, warm_items(arguments)))
    reading.resolve(arguments.uri, **selection(arguments))
    return True


def _is_valid(item: Item) -> bool:
    from kserve_pvc._download.warm import normalize_item, parse_item

    try:
        parse_item(normalize_item(item, "item"))
    except StoreError:
        return False
    return True
