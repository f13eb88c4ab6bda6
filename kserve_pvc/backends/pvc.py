"""
`pvc://claim/path`: models on another volume that is mounted into this pod too.

KServe names volumes by their claim. Only the pod's specification says where a claim is mounted, so it has to be set
here too: by the option `claims`, or by `KSERVE_PVC_CLAIMS=claim=/mnt/one,other=/mnt/two`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs

from kserve_pvc._source.contract import RangeReader, RemoteFile, Resolved, order_listing
from kserve_pvc._source.ref import ModelRef
from kserve_pvc._volume.beneath import open_beneath
from kserve_pvc.backends._listing import hub_repository
from kserve_pvc.backends._options import check_options
from kserve_pvc.backends.file import FileBackend, translate_error
from kserve_pvc.errors import InvalidURIError, SettingsError, UnsafePathError

CLAIMS = "KSERVE_PVC_CLAIMS"


class PvcBackend:
    """
    Copies from a mounted claim as `file://` copies from a directory, and never from outside of it.

    Args:
        options: `claims` maps names of claims to absolute directories; without it the environment does.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        check_options("pvc", options, ("claims",), list)
        given = options.get("claims")
        self._claims = _checked("claims", given) if given is not None else _parse(os.environ.get(CLAIMS, ""))
        self._files = FileBackend()

    def resolve(self, ref: ModelRef) -> Resolved:
        """
        List a model below a claim.

        Raises:
            InvalidURIError: It is not set where the claim is mounted, or a revision is requested.
            UnsafePathError: The path leads out of the claim.
        """
        if ref.revision is not None:
            raise InvalidURIError(ref.uri, "a claim has no revisions")
        claim, _, path = ref.location.partition("/")
        if claim not in self._claims:
            known = ", ".join(f"`{name}`" for name in sorted(self._claims)) or "none"
            raise InvalidURIError(
                ref.uri, f"no mount is set for the claim `{claim}`; set are {known}; add it to `{CLAIMS}`"
            )
        root = Path(os.path.realpath(self._claims[claim]))
        # A link such as `latest` is followed, as long as it stays inside.
        place = Path(os.path.realpath(root / path.lstrip("/")))
        if ".." in path.split("/") or not place.is_relative_to(root):
            raise UnsafePathError(ref.location, "it leads out of the claim")
        listed = hub_repository(place)
        top = listed if listed is not None and listed.is_relative_to(root) else place
        name = Path(path.rstrip("/")).name or None
        found = self._list(attrs.evolve(ref, uri=f"file://{place}"), root, top, place, name)
        return order_listing(ref, found.files, version=found.version)

    def _list(self, ref: ModelRef, root: Path, top: Path, place: Path, name: str | None) -> Resolved:
        # From the claim itself, so that what was a directory a moment ago and now is a link leads nowhere.
        try:
            above = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fd = open_beneath(above, str(top.relative_to(root)), os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
            finally:
                os.close(above)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise UnsafePathError(ref.location, "a link was put there while it was listed") from error
            raise translate_error(ref.uri, error) from error
        try:
            return self._files.resolve_opened(ref, fd, top, place=place, name=name)
        finally:
            os.close(fd)

    def access(self, ref: ModelRef) -> str:
        del ref
        return "direct"

    @contextmanager
    def open_range(self, file: RemoteFile, start: int, stop: int) -> Iterator[RangeReader]:
        with self._files.open_range(file, start, stop) as reader:
            yield reader


def _parse(text: str) -> Mapping[str, Path]:
    pairs = [pair.partition("=") for pair in text.split(",") if pair.strip()]
    return _checked(CLAIMS, {name.strip(): place.strip() for name, _, place in pairs})


def _checked(setting: str, claims: object) -> Mapping[str, Path]:
    if not isinstance(claims, Mapping):
        raise SettingsError(setting, repr(claims), "it maps names of claims to directories")
    for name, place in claims.items():
        if not name or "/" in str(name) or not Path(place).is_absolute():
            raise SettingsError(setting, f"{name}={place}", "write `claim=/absolute/directory`, separated by commas")
    return {str(name): Path(place) for name, place in claims.items()}
