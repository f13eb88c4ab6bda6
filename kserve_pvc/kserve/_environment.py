"""
What KServe and its users say to a storage initializer in its environment.

Everything that KServe's own initializer reads is honoured, or refused with its name and the reason. Nothing is passed
over, since a setting that has no effect is found out in production.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import attrs

from kserve_pvc import _defaults as defaults
from kserve_pvc._settings import Mode, read_settings
from kserve_pvc.errors import PolicyError, SettingsError
from kserve_pvc.kserve._destination import Way

Kind = Literal["auto", "private", "store"]

_AUTO: tuple[Way, ...] = ("reflink", "link", "copy")
_SHA256 = re.compile(r"(?:sha256:)?([0-9a-f]{64})")
# What a storage secret says about S3, and the variable that it stands for.
_OF_SECRET = {
    "endpoint_url": "AWS_ENDPOINT_URL",
    "access_key_id": "AWS_ACCESS_KEY_ID",
    "secret_access_key": "AWS_SECRET_ACCESS_KEY",
    "region": "AWS_DEFAULT_REGION",
    "ca_bundle": "AWS_CA_BUNDLE",
    "verify_ssl": "S3_VERIFY_SSL",
    "anonymous": "awsAnonymousCredential",
}
# What may stand in a secret besides, for those who read it before us.
_OF_KSERVE = {"type", "bucket", "default_bucket", "scheme", "cabundle_configmap"}
_STREAMS = {"s3": "S3_MAX_FILE_CONCURRENCY", "az": "AZURE_MAX_FILE_CONCURRENCY", "abfs": "AZURE_MAX_FILE_CONCURRENCY"}
_BUNDLE = "cabundle.crt"


@attrs.frozen(kw_only=True)
class Variables:
    """
    How this run of the initializer is meant.

    `store` is the root of a store to download into, or None. `kind` says what a destination is, if that is not to be
    found out. `storage_options` are by scheme.
    """

    store: Path | None
    mode: Mode | None
    locker: str | None
    lease_seconds: float | None
    offline: bool
    kind: Kind
    ways: tuple[Way, ...]
    timeout: float
    allow_patterns: tuple[str, ...] | None
    ignore_patterns: tuple[str, ...] | None
    digest: str | None
    storage_options: Mapping[str, Any] = attrs.field(repr=False)
    streams: Mapping[str, int]


def read_variables(environ: Mapping[str, str] | None = None) -> Variables:
    """
    Read the environment, and refuse what cannot be honoured.

    Raises:
        SettingsError: A value means nothing.
        PolicyError: It asks for what this initializer does not do.
    """
    environ = os.environ if environ is None else environ
    # KServe's annotation is about the server; its initializer always writes.
    settings = read_settings(environ, annotations={})
    _refuse(environ)
    kind: Kind = _one_of("KSERVE_PVC_DESTINATION", environ, "auto", get_args(Kind))
    return Variables(
        store=Path(settings.store) if environ.get("KSERVE_PVC_STORE") and kind != "private" else None,
        mode=settings.mode,
        locker=settings.locker,
        lease_seconds=settings.lease_seconds,
        offline=settings.offline,
        kind=kind,
        ways=_ways(environ),
        timeout=_number("KSERVE_PVC_TIMEOUT", environ, defaults.TIMEOUT, float),
        allow_patterns=_patterns("STORAGE_ALLOW_PATTERNS", environ),
        ignore_patterns=_patterns("STORAGE_IGNORE_PATTERNS", environ),
        digest=_digest(environ),
        storage_options=_storage_options(environ),
        streams={scheme: _number(name, environ, 0, int) for scheme, name in _STREAMS.items() if environ.get(name)},
    )


def trust_bundle(environ: Mapping[str, str]) -> Mapping[str, str]:
    """
    The variables that make KServe's CA bundle trusted besides the system's own.

    Raises:
        SettingsError: The bundle that is named is not there.
    """
    if not environ.get("CA_BUNDLE_CONFIGMAP_NAME"):
        return {}
    bundle = _bundle(environ)
    if bundle is None:
        where = environ.get("CA_BUNDLE_VOLUME_MOUNT_POINT") or "nowhere"
        raise SettingsError(
            "CA_BUNDLE_VOLUME_MOUNT_POINT", where, f"mount the ConfigMap there; it must have the key `{_BUNDLE}`"
        )
    # OpenSSL goes on to look into the directory of the system.
    return {} if environ.get("SSL_CERT_FILE") else {"SSL_CERT_FILE": str(bundle)}


def _bundle(environ: Mapping[str, str]) -> Path | None:
    place = environ.get("CA_BUNDLE_VOLUME_MOUNT_POINT")
    bundle = Path(place) / _BUNDLE if place else None
    return bundle if bundle is not None and bundle.is_file() else None


def _refuse(environ: Mapping[str, str]) -> None:
    if _truth("CONFIDENTIAL_ENABLED", environ):
        rule = "what it decrypts would lie readable on a volume; use KServe's own initializer for confidential models"
        raise PolicyError("CONFIDENTIAL_ENABLED", rule)
    if _truth("S3_USE_ACCELERATE", environ) and environ.get("AWS_ENDPOINT_URL"):
        raise SettingsError(
            "S3_USE_ACCELERATE", "true", "transfer acceleration is Amazon's own; unset it, or `AWS_ENDPOINT_URL`"
        )


def _ways(environ: Mapping[str, str]) -> tuple[Way, ...]:
    way: Way | Literal["auto"] = _one_of("KSERVE_PVC_MATERIALIZE", environ, "auto", ("auto", *get_args(Way)))
    return _AUTO if way == "auto" else (way,)


def _one_of(name: str, environ: Mapping[str, str], default: str, choices: tuple[str, ...]) -> Any:
    value = environ.get(name) or default
    if value not in choices:
        raise SettingsError(name, value, f"write one of {', '.join(f'`{choice}`' for choice in choices)}")
    return value


def _number(name: str, environ: Mapping[str, str], default: float, kind: Callable[[str], Any]) -> Any:
    text = environ.get(name)
    if not text:
        return default
    try:
        value = kind(text)
    except ValueError:
        value = -1
    if not value > 0:
        raise SettingsError(name, text, "write a number above 0")
    return value


def _truth(name: str, environ: Mapping[str, str]) -> bool:
    text = environ.get(name, "").lower()
    if text not in ("", "true", "false", "0", "1"):
        raise SettingsError(name, text, "write `true` or `false`")
    return text in ("true", "1")


def _patterns(name: str, environ: Mapping[str, str]) -> tuple[str, ...] | None:
    """A JSON list, a JSON text, or a list with commas, as KServe reads it."""
    text = environ.get(name, "").strip()
    try:
        found = json.loads(text) if text else []
    except ValueError:
        found = text.split(",")
    several = found if isinstance(found, list) else [found]
    return tuple(pattern for one in several if (pattern := str(one).strip())) or None


def _digest(environ: Mapping[str, str]) -> str | None:
    text = environ.get("VERIFICATION_DIGEST", "").strip()
    match = _SHA256.fullmatch(text.lower())
    if text and match is None:
        raise SettingsError("VERIFICATION_DIGEST", text, "write `sha256:` and 64 hexadecimal digits")
    return match[1] if match else None


def _storage_options(environ: Mapping[str, str]) -> Mapping[str, Any]:
    secret = {**_json("STORAGE_CONFIG", environ), **_json("STORAGE_OVERRIDE_CONFIG", environ)}
    kind = secret.get("type", "")
    if kind not in ("", "s3"):
        raise SettingsError("STORAGE_CONFIG", f"type {kind}", "credentials of this type are not supported; `s3` is")
    said = _said(secret) if kind == "s3" else {}
    options = _s3_options({**environ, **said}, said)
    return {"s3": options} if options else {}


def _said(secret: Mapping[str, Any]) -> dict[str, str]:
    """What a secret of S3 says, as the variables that it stands for."""
    said = {}
    for name, value in secret.items():
        if name in _OF_KSERVE:
            continue
        if name not in _OF_SECRET:
            raise SettingsError("STORAGE_CONFIG", name, f"it may hold {', '.join(_OF_SECRET)}")
        if not isinstance(value, str | bool):
            raise SettingsError("STORAGE_CONFIG", name, "write its value as a text")
        said[_OF_SECRET[name]] = value if isinstance(value, str) else str(value).lower()
    return said


def _json(name: str, environ: Mapping[str, str]) -> Mapping[str, Any]:
    try:
        found = json.loads(environ.get(name) or "{}")
    except ValueError:
        found = None
    if not isinstance(found, dict):  # Its text holds secrets.
        raise SettingsError(name, "not shown", "it must be a JSON object")
    return found


def _s3_options(environ: Mapping[str, str], said: Mapping[str, str]) -> dict[str, Any]:
    """Arguments of the back end, for what it does not read from the environment by itself."""
    options: dict[str, Any] = {}
    client: dict[str, Any] = {}
    s3: dict[str, Any] = {}
    for name, variable in (
        ("key", "AWS_ACCESS_KEY_ID"),
        ("secret", "AWS_SECRET_ACCESS_KEY"),
        ("endpoint_url", "AWS_ENDPOINT_URL"),
    ):
        if said.get(variable):
            options[name] = said[variable]
    if said.get("AWS_DEFAULT_REGION"):
        client["region_name"] = said["AWS_DEFAULT_REGION"]
    if _truth("awsAnonymousCredential", environ):
        options["anon"] = True
    if (verify := _verify(environ, said)) is not None:
        client["verify"] = verify
    endpoint, region = environ.get("AWS_ENDPOINT_URL"), environ.get("AWS_DEFAULT_REGION")
    if _truth("S3_USER_VIRTUAL_BUCKET", environ) or (
        endpoint == "https://s3.amazonaws.com" and region not in (None, "", "us-east-1")
    ):
        s3["addressing_style"] = "virtual"
    if _truth("S3_USE_ACCELERATE", environ):
        s3["use_accelerate_endpoint"] = True
    config: dict[str, Any] = {"s3": s3} if s3 else {}
    config |= {
        argument: _number(name, environ, 0, int)
        for name, argument in (("S3_CONNECT_TIMEOUT", "connect_timeout"), ("S3_READ_TIMEOUT", "read_timeout"))
        if environ.get(name)
    }
    if environ.get("S3_MAX_ATTEMPTS"):
        config["retries"] = {"max_attempts": _number("S3_MAX_ATTEMPTS", environ, 0, int), "mode": "standard"}
    return options | ({"client_kwargs": client} if client else {}) | ({"config_kwargs": config} if config else {})


def _verify(environ: Mapping[str, str], said: Mapping[str, str]) -> str | bool | None:
    if environ.get("S3_VERIFY_SSL", "").lower() in ("0", "false"):
        return False
    named = said.get("AWS_CA_BUNDLE") or environ.get("AWS_CA_BUNDLE")
    if named and not Path(named).exists():
        raise SettingsError("AWS_CA_BUNDLE", named, "there is no such file; mount it, or unset the variable")
    return named or None
