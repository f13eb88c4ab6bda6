"""
The only module that reads the environment, once for each store that is opened.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import attrs

from kserve_pvc.errors import SettingsError

Mode = Literal["r", "rw"]

READONLY_ANNOTATION = "storage.kserve.io/readonly"
DEFAULT_STORE = "/mnt/models"
DEFAULT_ANNOTATIONS_FILE = "/etc/podinfo/annotations"
# The words of huggingface_hub, and their opposites.
_TRUE = ("1", "ON", "YES", "TRUE")
_FALSE = ("0", "OFF", "NO", "FALSE", "")
_MAX_ANNOTATIONS_BYTES = 1024 * 1024
_ANNOTATION_LINE = re.compile(r'(?P<name>[^=\s"]+)="(?P<value>(?:[^"\\]|\\.)*)"')


@attrs.frozen(kw_only=True)
class Settings:
    """
    What the environment says about a store. `mode` is None if neither a variable nor an annotation sets it.
    """

    store: str
    mode: Mode | None
    locker: str | None
    lease_seconds: float | None
    offline: bool = False


def read_settings(environ: Mapping[str, str] | None = None, annotations: Mapping[str, str] | None = None) -> Settings:
    """
    Read `KSERVE_PVC_STORE`, `_MODE`, `_LOCKER`, `_LEASE_SECONDS`, `_OFFLINE` and the pod's annotations.

    Annotations are given, or read from the downward-API file named by `KSERVE_PVC_ANNOTATIONS`
    (default `/etc/podinfo/annotations`; a missing file counts as one without annotations).

    Raises:
        SettingsError: A value is invalid. Nothing is guessed from it.
    """
    environ = os.environ if environ is None else environ
    if annotations is None:
        annotations = _read_annotations(Path(environ.get("KSERVE_PVC_ANNOTATIONS") or DEFAULT_ANNOTATIONS_FILE))
    return Settings(
        store=environ.get("KSERVE_PVC_STORE") or DEFAULT_STORE,
        mode=_mode(environ.get("KSERVE_PVC_MODE"), annotations),
        locker=environ.get("KSERVE_PVC_LOCKER") or None,
        lease_seconds=_seconds(environ.get("KSERVE_PVC_LEASE_SECONDS")),
        offline=is_offline(environ),
    )


def is_offline(environ: Mapping[str, str] | None = None) -> bool:
    """
    Return whether `KSERVE_PVC_OFFLINE` forbids requests to any source.

    True are `1`, `ON`, `YES` and `TRUE` in any case, as for huggingface_hub's `HF_HUB_OFFLINE`; false are `0`, `OFF`,
    `NO`, `FALSE` and nothing.

    Raises:
        SettingsError: It is another word. huggingface_hub takes that for false; here a ban is not guessed away.
    """
    text = (os.environ if environ is None else environ).get("KSERVE_PVC_OFFLINE") or "0"
    word = text.strip().upper()
    if word not in _TRUE and word not in _FALSE:
        raise SettingsError("KSERVE_PVC_OFFLINE", text, "use `1` or `0`, or `true` or `false`")
    return word in _TRUE


def pod_and_node(environ: Mapping[str, str] | None = None) -> tuple[str | None, str | None]:
    """
    Return the names of this pod and node from `POD_NAME` and `NODE_NAME` of the downward API; None if they are not set.

    A pod's host name, which Kubernetes also puts into `HOSTNAME`, stands in for its name.
    """
    environ = os.environ if environ is None else environ
    return environ.get("POD_NAME") or environ.get("HOSTNAME") or None, environ.get("NODE_NAME") or None


def mode_from_annotations(annotations: Mapping[str, str]) -> Mode:
    """
    Return the mode of KServe's annotation: `storage.kserve.io/readonly: "false"` is read-write, all else read-only.

    `"False"`, `"0"`, `"no"` and `""` stay read-only, as in KServe.
    """
    return "rw" if annotations.get(READONLY_ANNOTATION) == "false" else "r"


def _mode(text: str | None, annotations: Mapping[str, str]) -> Mode | None:
    if text == "r" or text == "rw":
        return "r" if text == "r" else "rw"
    if text:
        raise SettingsError("KSERVE_PVC_MODE", text, "use `r` or `rw`")
    return mode_from_annotations(annotations) if READONLY_ANNOTATION in annotations else None


def _seconds(text: str | None) -> float | None:
    if not text:
        return None
    try:
        return float(text)
    except ValueError as error:
        raise SettingsError("KSERVE_PVC_LEASE_SECONDS", text, "use a number of seconds") from error


def _read_annotations(path: Path) -> dict[str, str]:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            text = file.read(_MAX_ANNOTATIONS_BYTES)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise SettingsError("KSERVE_PVC_ANNOTATIONS", str(path), f"it cannot be read: {error.strerror}") from error
    return {
        m["name"]: _unquote(m["value"]) for line in text.splitlines() if (m := _ANNOTATION_LINE.fullmatch(line.strip()))
    }


def _unquote(value: str) -> str:
    # The downward API writes values with Go's %q, whose escapes for strings are a subset of Python's.
    return re.sub(r'\\(["\\])', r"\1", value)
