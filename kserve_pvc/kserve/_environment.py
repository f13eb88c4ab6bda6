"""
The settings of a storage initializer in its environment, from KServe and its users.

Every variable that KServe's own initializer reads is honoured, or refused with its name and the reason. None is
silently ignored, since a setting without effect would only show in production.
"""

from __future__ import annotations

import json
import os
import re
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import attrs

from kserve_pvc import _defaults as defaults
from kserve_pvc._settings import Mode, read_settings
from kserve_pvc._source.contract import UnpackLimits
from kserve_pvc._source.ref import parse_ref, show_source
from kserve_pvc.errors import PolicyError, SettingsError, StoreError, printable
from kserve_pvc.kserve._log import log
from kserve_pvc.kserve._placing import Method

Kind = Literal["auto", "private", "store"]

REPLACE = "KSERVE_PVC_REPLACE"
UNPACK_LIMITS = "KSERVE_PVC_UNPACK_LIMITS"

_AUTO: tuple[Method, ...] = ("reflink", "link", "copy")
_SHA256 = re.compile(r"(?:sha256:)?([0-9a-f]{64})")
# The fields of an S3 storage secret, and the equivalent variables.
_SECRET_FIELDS = {
    "endpoint_url": "AWS_ENDPOINT_URL",
    "access_key_id": "AWS_ACCESS_KEY_ID",
    "secret_access_key": "AWS_SECRET_ACCESS_KEY",
    "region": "AWS_DEFAULT_REGION",
    "ca_bundle": "AWS_CA_BUNDLE",
    "verify_ssl": "S3_VERIFY_SSL",
    "anonymous": "awsAnonymousCredential",
}
# Other types of secrets, and what to do instead.
_HDFS_SECRET = "credentials for HDFS are not supported; copy the model to a bucket, or use KServe's own initializer"
_OTHER_SECRETS = {
    "hdfs": _HDFS_SECRET,
    "webhdfs": _HDFS_SECRET,
    "gs": "set `GOOGLE_APPLICATION_CREDENTIALS`, as KServe does for a secret of the service account; supported: `s3`",
    "azure": "set `AZURE_STORAGE_ACCESS_KEY`, as KServe does for a secret of the service account; supported: `s3`",
    "hf": "set `HF_TOKEN`, as KServe does for a secret of the service account; supported: `s3`",
    "http": "set `<host>-headers`, as KServe does for a secret of the service account; supported: `s3`",
    "https": "set `<host>-headers`, as KServe does for a secret of the service account; supported: `s3`",
}
# Other fields of a secret, which KServe itself reads.
_KSERVE_FIELDS = {"type", "bucket", "default_bucket", "scheme", "cabundle_configmap"}
# KServe's own number of files, and of parts of one file, at a time.
_AZURE_CONCURRENCY = 4
# Settings of verification that KServe may have and this initializer does not know, except what Kubernetes sets for a
# Service of such a name. To pass over one of them would be to serve an unverified model.
_VERIFICATION = re.compile(
    r"(?:(?:KSERVE|MODEL|STORAGE)_)*(?:VERIFICATION|SIGNATURE|SIGNING|SCAN|SCANNING|SCANNER)(?:_.*)?"
)
_SERVICE_LINK = re.compile(r".*_(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT(?:_\d+_(?:TCP|UDP|SCTP)(?:_\w+)?)?)")
_BUNDLE = "cabundle.crt"
_BUNDLE_DIRECTORY = "/etc/ssl/custom-certs"


@attrs.frozen(kw_only=True)
class Variables:
    """
    The settings of one run of the initializer.

    Args:
        store: The root of a store to download into, or None.
        kind: What a destination is; `auto` detects it.
        methods: How files get from a store into a destination; the first that the volumes support is used.
        digest: The SHA-256 that the only file must have.
        storage_options: By scheme.
        streams: The number of connections, by scheme.
        refused: The errors of settings that only one scheme uses, by that scheme.
        unpack_limits: For every archive.
        replaceable: The URIs of models that may be replaced in a destination, or `any`.
        progress: As in `ModelStore.ensure`.
    """

    store: Path | None
    mode: Mode | None
    locker: str | None
    lease_seconds: float | None
    offline: bool
    kind: Kind
    methods: tuple[Method, ...]
    timeout: float
    allow_patterns: tuple[str, ...] | None
    ignore_patterns: tuple[str, ...] | None
    digest: str | None
    storage_options: Mapping[str, Any] = attrs.field(repr=False)
    streams: Mapping[str, int]
    refused: Mapping[str, SettingsError]
    unpack_limits: UnpackLimits
    replaceable: frozenset[str] = frozenset()
    progress: bool | None = None

    def may_replace(self, uri: str | None) -> bool:
        """Whether a destination that holds this model, or something unknown, may be filled with another one."""
        return "any" in self.replaceable or uri in self.replaceable

    def check(self, scheme: str) -> None:
        """
        Check the settings that only sources of one scheme use.

        Raises:
            SettingsError: One of them cannot be honoured.
        """
        if scheme in self.refused:
            raise self.refused[scheme]


def read_variables(environ: Mapping[str, str] | None = None) -> Variables:
    """
    Read the environment, and refuse what cannot be honoured.

    Raises:
        SettingsError: A value is invalid.
        PolicyError: A variable requests what this initializer does not support.
    """
    environ = os.environ if environ is None else environ
    # KServe's annotation applies to the server; its initializer always writes.
    settings = read_settings(environ, annotations={})
    _refuse_confidential(environ)
    _refuse_verification(environ)
    options, refused = _s3_settings(environ)
    kind: Kind = _one_of("KSERVE_PVC_DESTINATION", environ, "auto", get_args(Kind))
    return Variables(
        store=Path(settings.store) if environ.get("KSERVE_PVC_STORE") and kind != "private" else None,
        mode=settings.mode,
        locker=settings.locker,
        lease_seconds=settings.lease_seconds,
        offline=settings.offline,
        kind=kind,
        methods=_methods(environ),
        timeout=_number("KSERVE_PVC_TIMEOUT", environ, defaults.TIMEOUT, float),
        allow_patterns=_patterns("STORAGE_ALLOW_PATTERNS", environ),
        ignore_patterns=_patterns("STORAGE_IGNORE_PATTERNS", environ),
        digest=_digest(environ),
        storage_options=options,
        streams=_streams(environ),
        refused=refused,
        unpack_limits=_unpack_limits(environ),
        replaceable=frozenset(map(_replaceable, environ.get(REPLACE, "").split())),
    )


def trust_bundle(environ: Mapping[str, str]) -> Mapping[str, str]:
    """
    Return the changes to the environment with which KServe's CA bundle is trusted in addition to the system's.

    As in KServe, a bundle that is missing or unusable is a warning: only S3 needs it, see `Variables.check`.
    """
    if not environ.get("CA_BUNDLE_CONFIGMAP_NAME") or environ.get("SSL_CERT_FILE"):
        return {}
    bundle = _bundle(environ)
    reason = _unusable(bundle)
    if reason is not None:
        log("WARNING", f"the CA bundle {printable(str(bundle))} {reason}; only the system's certificates are trusted")
        return {}
    # OpenSSL still reads the system's directory of certificates.
    return {"SSL_CERT_FILE": str(bundle)}


def leave_to_s3(environ: Mapping[str, str]) -> Mapping[str, str]:
    """
    Return the changes to the environment after which only S3, which has it as an option, uses `AWS_CA_BUNDLE`.

    KServe sets it for S3 alone, and other backends would trust no other certificates.
    """
    return {"AWS_CA_BUNDLE": ""} if environ.get("AWS_CA_BUNDLE") else {}


def _bundle(environ: Mapping[str, str]) -> Path:
    return Path(environ.get("CA_BUNDLE_VOLUME_MOUNT_POINT") or _BUNDLE_DIRECTORY) / _BUNDLE


def _unusable(bundle: Path) -> str | None:
    """Return why a bundle cannot be trusted, or None. An empty one is a bundle without certificates."""
    try:
        if bundle.stat().st_size:
            ssl.create_default_context(cafile=bundle)
    except ssl.SSLError:
        return "has no valid certificates"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def _refused(environ: Mapping[str, str]) -> Mapping[str, SettingsError]:
    """Return the error of a CA bundle that S3 needs; KServe compares no other scheme with it."""
    secret = _secret(environ)
    variables = {**environ, **(_variables_of(secret) if secret.get("type") == "s3" else {})}
    named = variables.get("AWS_CA_BUNDLE")
    if variables.get("S3_VERIFY_SSL", "").lower() in ("0", "false"):
        return {}
    if named:
        hint = "the file does not exist; mount it, or unset the variable"
        return {} if Path(named).exists() else {"s3": SettingsError("AWS_CA_BUNDLE", named, hint)}
    bundle = _bundle(environ)
    reason = _unusable(bundle) if environ.get("CA_BUNDLE_CONFIGMAP_NAME") else None
    if reason is None:
        return {}
    hint = f"it {reason}; mount the ConfigMap of `CA_BUNDLE_CONFIGMAP_NAME` there, with the key `{_BUNDLE}`"
    return {"s3": SettingsError("CA_BUNDLE_VOLUME_MOUNT_POINT", str(bundle), hint)}


def _refuse_confidential(environ: Mapping[str, str]) -> None:
    # To KServe only `true` means yes. A word that may mean yes is refused too, rather than to store what is secret.
    if environ.get("CONFIDENTIAL_ENABLED", "").strip().lower() not in ("", "false", "0", "no", "off"):
        rule = "decrypted models would be readable on a volume; use KServe's own initializer for confidential models"
        raise PolicyError("CONFIDENTIAL_ENABLED", rule)


def _refuse_verification(environ: Mapping[str, str]) -> None:
    for name in sorted(environ):
        is_known = name == "VERIFICATION_DIGEST" or _SERVICE_LINK.fullmatch(name)
        if environ[name] and _VERIFICATION.fullmatch(name) and not is_known:
            rule = (
                "this initializer does not know it, and an unverified model must not pass for a verified one; unset it"
            )
            raise PolicyError(name, f"{rule}, or use KServe's own initializer")


def _streams(environ: Mapping[str, str]) -> Mapping[str, int]:
    """Return the maximum number of connections by scheme; for Azure, KServe's number of files times that of parts."""
    files, parts = (f"AZURE_MAX_{kind}_CONCURRENCY" for kind in ("FILE", "CHUNK"))
    streams = {}
    if environ.get("S3_MAX_FILE_CONCURRENCY"):
        streams["s3"] = _number("S3_MAX_FILE_CONCURRENCY", environ, 0, int)
    if environ.get(files) or environ.get(parts):
        count = _number(files, environ, _AZURE_CONCURRENCY, int) * _number(parts, environ, 1, int)
        streams |= {"az": count, "abfs": count}
    return streams


def _unpack_limits(environ: Mapping[str, str]) -> UnpackLimits:
    """Parse `entries=200000,ratio=500`, in which a field that is left out has its default."""
    kinds = {field.name: float if field.name == "ratio" else int for field in attrs.fields(UnpackLimits)}
    given: dict[str, Any] = {}
    for part in environ.get(UNPACK_LIMITS, "").replace(" ", "").split(","):
        name, _, number = part.partition("=")
        if part and name not in kinds:
            supported = ", ".join(f"`{name}`" for name in kinds)
            raise SettingsError(UNPACK_LIMITS, part, f"expected `name=number`, separated by commas, of {supported}")
        if part:
            given[name] = _number(UNPACK_LIMITS, {UNPACK_LIMITS: number or "nothing"}, 0, kinds[name])
    return UnpackLimits(**given)


def _replaceable(word: str) -> str:
    try:
        return word if word == "any" else parse_ref(word).uri
    except StoreError as error:
        hint = "expected URIs of models, separated by spaces, or `any`"
        raise SettingsError(REPLACE, show_source(word), hint) from error


def _methods(environ: Mapping[str, str]) -> tuple[Method, ...]:
    choices = ("auto", *get_args(Method))
    method: Method | Literal["auto"] = _one_of("KSERVE_PVC_MATERIALIZE", environ, "auto", choices)
    return _AUTO if method == "auto" else (method,)


def _one_of(name: str, environ: Mapping[str, str], default: str, choices: tuple[str, ...]) -> Any:
    value = environ.get(name) or default
    if value not in choices:
        raise SettingsError(name, value, f"supported: {', '.join(f'`{choice}`' for choice in choices)}")
    return value


def _number(
    name: str, environ: Mapping[str, str], default: float, kind: Callable[[str], Any], *, least: int | None = None
) -> Any:
    text = environ.get(name)
    if not text:
        return default
    try:
        value = kind(text)
    except ValueError:
        value = -1
    if not (value > 0 or value == least):
        raise SettingsError(name, text, "expected a number above 0")
    return value


def _is_true(name: str, environ: Mapping[str, str]) -> bool:
    """As in KServe, `true` in any case is true, and every other word is false."""
    text = environ.get(name, "")
    if text.lower() not in ("", "true", "false", "0", "no", "off"):
        log("WARNING", f"{name} is {printable(text)!r}, which KServe takes for false; write `true` or `false`")
    return text.lower() == "true"


def _patterns(name: str, environ: Mapping[str, str]) -> tuple[str, ...] | None:
    """Parse a JSON array, a JSON string, or comma-separated values, as KServe does."""
    text = environ.get(name, "").strip()
    try:
        found = json.loads(text) if text else []
    except (ValueError, RecursionError):
        found = text.split(",")
    patterns = found if isinstance(found, list) else [found]
    return tuple(stripped for pattern in patterns if (stripped := str(pattern).strip())) or None


def _digest(environ: Mapping[str, str]) -> str | None:
    text = environ.get("VERIFICATION_DIGEST", "").strip()
    match = _SHA256.fullmatch(text.lower())
    if text and match is None:
        raise SettingsError("VERIFICATION_DIGEST", text, "expected `sha256:` and 64 hex digits")
    return match[1] if match else None


def _s3_settings(environ: Mapping[str, str]) -> tuple[Mapping[str, Any], Mapping[str, SettingsError]]:
    """Return the options of the backend, and the error of a setting without which only S3 cannot be read."""
    secret = _secret(environ)
    kind = secret.get("type", "")
    if kind not in ("", "s3"):
        raise SettingsError("STORAGE_CONFIG", f"type {kind}", _OTHER_SECRETS.get(str(kind), "supported: `s3`"))
    from_secret = _variables_of(secret) if kind == "s3" else {}
    variables = {**environ, **from_secret}
    try:
        options = _s3_options(variables, from_secret)
        if _is_true("S3_USE_ACCELERATE", environ) and variables.get("AWS_ENDPOINT_URL"):
            hint = "only Amazon S3 has transfer acceleration; unset it, or `AWS_ENDPOINT_URL`"
            raise SettingsError("S3_USE_ACCELERATE", "true", hint)
    except SettingsError as error:
        return {}, {"s3": error}
    return {"s3": options} if options else {}, _refused(environ)


def _secret(environ: Mapping[str, str]) -> Mapping[str, Any]:
    return {**_json("STORAGE_CONFIG", environ), **_json("STORAGE_OVERRIDE_CONFIG", environ)}


def _variables_of(secret: Mapping[str, Any]) -> dict[str, str]:
    """Return the variables that are equivalent to an S3 secret."""
    variables = {}
    for name, value in secret.items():
        if name in _KSERVE_FIELDS:
            continue
        if name not in _SECRET_FIELDS:
            raise SettingsError(
                "STORAGE_CONFIG",
                name,
                f"unknown field; supported: {', '.join(f'`{field}`' for field in _SECRET_FIELDS)}",
            )
        if not isinstance(value, str | bool):
            raise SettingsError("STORAGE_CONFIG", name, "its value must be a string")
        variables[_SECRET_FIELDS[name]] = value if isinstance(value, str) else str(value).lower()
    return variables


def _json(name: str, environ: Mapping[str, str]) -> Mapping[str, Any]:
    try:
        found = json.loads(environ.get(name) or "{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):  # The value may hold secrets.
        raise SettingsError(name, "not shown", "expected a JSON object")
    return found


def _s3_options(environ: Mapping[str, str], from_secret: Mapping[str, str]) -> dict[str, Any]:
    """Return the options of the backend for what it does not read from the environment itself."""
    options: dict[str, Any] = {}
    client: dict[str, Any] = {}
    s3: dict[str, Any] = {}
    for name, variable in (
        ("key", "AWS_ACCESS_KEY_ID"),
        ("secret", "AWS_SECRET_ACCESS_KEY"),
        ("endpoint_url", "AWS_ENDPOINT_URL"),
    ):
        if from_secret.get(variable):
            options[name] = from_secret[variable]
    if from_secret.get("AWS_DEFAULT_REGION"):
        client["region_name"] = from_secret["AWS_DEFAULT_REGION"]
    if _is_true("awsAnonymousCredential", environ):
        options["anon"] = True
    if (verify := _verify(environ, from_secret)) is not None:
        client["verify"] = verify
    endpoint, region = environ.get("AWS_ENDPOINT_URL"), environ.get("AWS_DEFAULT_REGION")
    if _is_true("S3_USER_VIRTUAL_BUCKET", environ) or (
        endpoint == "https://s3.amazonaws.com" and region not in (None, "", "us-east-1")
    ):
        s3["addressing_style"] = "virtual"
    if _is_true("S3_USE_ACCELERATE", environ):
        s3["use_accelerate_endpoint"] = True
    config: dict[str, Any] = {"s3": s3} if s3 else {}
    config |= {
        argument: _number(name, environ, 0, int)
        for name, argument in (("S3_CONNECT_TIMEOUT", "connect_timeout"), ("S3_READ_TIMEOUT", "read_timeout"))
        if environ.get(name)
    }
    if environ.get("S3_MAX_ATTEMPTS"):
        config["retries"] = {"max_attempts": _number("S3_MAX_ATTEMPTS", environ, 0, int, least=0), "mode": "standard"}
    return options | ({"client_kwargs": client} if client else {}) | ({"config_kwargs": config} if config else {})


def _verify(environ: Mapping[str, str], from_secret: Mapping[str, str]) -> str | bool | None:
    if environ.get("S3_VERIFY_SSL", "").lower() in ("0", "false"):
        return False
    return from_secret.get("AWS_CA_BUNDLE") or environ.get("AWS_CA_BUNDLE") or None
