"""
What a destination holds is not replaced under the servers that may be reading it, unless a setting names it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from kserve_pvc._format import layout
from kserve_pvc._model import Model
from kserve_pvc._source.redaction import redact
from kserve_pvc._source.ref import ModelRef
from kserve_pvc._store import ModelStore
from kserve_pvc._volume.reading import Volume
from kserve_pvc.errors import PolicyError, printable
from kserve_pvc.kserve._contents import Source
from kserve_pvc.kserve._destination import Destination
from kserve_pvc.kserve._digests import digest_refusal, has_digest
from kserve_pvc.kserve._environment import REPLACE, Variables
from kserve_pvc.kserve._log import log

_REMEDY = f"use another directory or claim, or name what may be replaced in `{REPLACE}`"

_KEPT = "{} keeps its version, and the store has another; to replace it, see `" + REPLACE + "`"


def is_complete(
    destination: Destination, refs: Sequence[ModelRef], variables: Variables, versions: Sequence[str] | None = None
) -> bool:
    """
    Whether a destination holds these models, and they need not be brought to these versions.

    Raises:
        PolicyError: It holds others, which may not be replaced.
    """
    served = destination.served()
    if [source.key for source in served] != [ref.key for ref in refs]:
        _check(destination, refs, served, variables)
        return False
    record = destination.record()
    if record is None:
        return False
    may_replace = all(variables.may_replace(source.uri) for source in served)
    archive = served[0].archive_sha256
    if variables.digest is not None and not has_digest(variables.digest, record.files, archive):
        if may_replace:
            return False
        raise digest_refusal(refs[0].uri, record.files, archive, f"{_REMEDY}")
    if versions is None or [source.version for source in served] == list(versions):
        return True
    if may_replace:
        return False
    log("INFO", _KEPT.format(printable(str(destination.root))))
    return True


def _check(destination: Destination, refs: Sequence[ModelRef], served: Sequence[Source], variables: Variables) -> None:
    if not all(variables.may_replace(source.uri) for source in served):
        held = " and ".join(f"`{redact(source.uri)}`" for source in served)
        if {source.uri for source in served} == {ref.uri for ref in refs}:
            held += " with other patterns or in another order"
        raise _refusal(refs[0].uri, destination.root, held)


def may_repoint(store: Path, link: PurePosixPath, ref: ModelRef, model: Model, variables: Variables) -> bool:
    """
    Whether a link in a store is to lead to this version of a model. If it leads to another version, it is kept.

    Raises:
        PolicyError: It leads to something else, which may not be replaced.
    """
    volume = Volume(store)
    target = volume.link_target(link)
    if target is None:
        return True
    place = PurePosixPath(os.path.normpath(link.parent / target))
    if ".." in place.parts or place.is_absolute():
        held, uri = f"a link to `{printable(target)}`", None
    elif volume.absolute(place) == model.path or place.name not in volume.list_names(place.parent):
        return True
    elif place.parent == layout.MODELS / model.key:
        held, uri = "", model.uri
    else:
        uri = next((one.uri for one in ModelStore(store).list() if place.parent == layout.MODELS / one.key), None)
        held = f"`{redact(uri)}`" if uri is not None else f"a link to `{printable(target)}`"
    if variables.may_replace(uri):
        return True
    if held:
        raise _refusal(ref.uri, volume.absolute(link), held)
    log("INFO", _KEPT.format(printable(str(volume.absolute(link)))))
    return False


def _refusal(uri: str, place: Path, held: str) -> PolicyError:
    rule = f"`{printable(str(place))}` holds {held}, which servers may be reading; {_REMEDY}"
    return PolicyError(redact(uri), rule)
