"""
The settings of S3: which are plain, what s3fs and its SDK would make of the others, and who signs.

Settings count as s3fs would count them: options first, then fsspec's configuration, then the SDK's own variables and
files. Whoever signs, an endpoint of one of these is never used with credentials of a later one that it overrides.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from kserve_pvc._source.redaction import redact
from kserve_pvc.backends._http.target import HTTPError, Target, target_of
from kserve_pvc.backends._login.aws import CredentialSource, FixedCredentials, SDKSession
from kserve_pvc.backends._login.sigv4 import Credentials
from kserve_pvc.backends._options import (
    Reason,
    Rule,
    Settings,
    configured_options,
    find_reasons,
    options_beyond,
    variables,
)
from kserve_pvc.errors import SettingsError

# Buckets that need none of botocore's special rules: no ARN, no access point, no directory bucket.
ORDINARY_BUCKET = re.compile(r"(?!.*--)[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
PLAIN_OPTIONS = frozenset(("key", "secret", "token", "anon", "endpoint_url", "client_kwargs", "config_kwargs"))
PLAIN_CLIENT = frozenset(
    ("endpoint_url", "region_name", "verify", "aws_access_key_id", "aws_secret_access_key", "aws_session_token")
)
# Our own, which s3fs never sees.
OWN_OPTIONS = frozenset(("etag_is_md5",))
# What we can sign ourselves once botocore has found who we are: arguments of the class that say so, or that say nothing
# about which bytes are read or from where.
_SIGNED_OPTIONS = PLAIN_OPTIONS | {
    *("profile", "session", "session_vars", "username", "password", "use_ssl", "requester_pays"),
    *("default_block_size", "default_cache_type", "default_fill_cache", "version_aware", "cache_regions"),
    *("max_concurrency", "fixed_upload_size", "local_expiry_check"),
}
_SIGNED_CLIENT = PLAIN_CLIENT | {"use_ssl"}
_SIGNED_CONFIG = {
    *("s3", "signature_version", "region_name", "ignore_configured_endpoint_urls", "retries", "connect_timeout"),
    *("read_timeout", "max_pool_connections", "tcp_keepalive", "user_agent", "user_agent_extra", "user_agent_appid"),
    *("parameter_validation", "request_checksum_calculation", "response_checksum_validation"),
}
_SIGNED_S3 = {"addressing_style", "payload_signing_enabled", "us_east_1_regional_endpoint"}
# What the SDK can put into the URL of an object, so that the bytes still come by our requests.
_URL_CONFIG = _SIGNED_CONFIG | {
    *("use_dualstack_endpoint", "use_fips_endpoint", "sigv4a_signing_region_set", "auth_scheme_preference"),
    *("account_id_endpoint_mode", "inject_host_prefix"),
}
_VARIANTS = ("AWS_USE_FIPS_ENDPOINT", "AWS_USE_DUALSTACK_ENDPOINT")
_OTHER_PARTITIONS = ("cn-", "us-iso", "eu-iso")
_KEYS = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")


@attrs.frozen
class Account:
    """
    Where requests of our own go, and who signs them.

    `endpoint` is None for Amazon's own, which depends on the region. `payer` is set if the requester pays.
    """

    endpoint: Target | None
    region: str
    source: CredentialSource
    is_virtual: bool
    scheme: str = "https"
    is_payer: bool = False
    has_conditions: bool = True
    ca_bundle: str | bool | None = None


def _aws_files(settings: Settings) -> Iterator[str]:
    environ = settings.environ
    for name, place in (("AWS_CONFIG_FILE", "~/.aws/config"), ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")):
        # Not `Path.expanduser`, which fails for a user without a home.
        path = os.path.expanduser(environ.get(name) or place)  # noqa: PTH111
        if os.path.exists(path):
            yield name if environ.get(name) else place


def _no_keys(settings: Settings) -> Iterator[str]:
    key, secret, _ = _given_keys(settings) or (None, None, None)
    if not settings.options.get("anon") and not (key and secret):
        yield "AWS_ACCESS_KEY_ID"


def _other_partition(settings: Settings) -> Iterator[str]:
    if not _given_url(settings) and _plain_region(settings).startswith(_OTHER_PARTITIONS):
        yield "region_name"


def _other_signature(settings: Settings) -> Iterator[str]:
    if _inside(settings, "config_kwargs").get("signature_version") not in (None, "s3v4"):
        yield "config_kwargs.signature_version"


# Without one of these, requests are signed here with what is given, and no SDK is loaded.
RULES = (
    Rule(configured_options, "is set in fsspec's configuration"),
    Rule(options_beyond(PLAIN_OPTIONS | OWN_OPTIONS), "is an argument for s3fs"),
    Rule(options_beyond(PLAIN_CLIENT, "client_kwargs"), "is an argument for the SDK"),
    Rule(options_beyond({"s3"}, "config_kwargs"), "is an argument for the SDK"),
    Rule(options_beyond({"addressing_style"}, "config_kwargs", "s3"), "is an argument for the SDK"),
    Rule(variables("AWS_PROFILE", "AWS_DEFAULT_PROFILE"), "names a profile of AWS's files"),
    Rule(variables(*_VARIANTS, "AWS_S3_US_EAST_1_REGIONAL_ENDPOINT"), "changes endpoints"),
    Rule(_aws_files, "exists, and may set endpoint, region, roles and certificates"),
    Rule(_no_keys, "is not set together with AWS_SECRET_ACCESS_KEY, so the SDK finds the credentials"),
    Rule(_other_partition, "is in a partition whose endpoints the SDK knows"),
)
# Without one of these, the SDK finds credentials, region and endpoint, and requests are signed here.
_BEYOND_SIGNING = (
    Rule(options_beyond(_SIGNED_CLIENT, "client_kwargs"), "changes requests in ways that the SDK knows"),
    Rule(options_beyond(_SIGNED_CONFIG, "config_kwargs"), "changes requests in ways that the SDK knows"),
    Rule(options_beyond(_SIGNED_S3, "config_kwargs", "s3"), "changes addresses in ways that the SDK knows"),
    Rule(_other_signature, "is another signature than Signature Version 4"),
    Rule(variables(*_VARIANTS), "changes endpoints in ways that the SDK knows"),
    Rule(_other_partition, "is in a partition whose endpoints the SDK knows"),
)
# Without one of these, the SDK signs a URL for each object, and the bytes come by requests of our own.
BEYOND_URLS = (
    Rule(options_beyond(_SIGNED_OPTIONS | OWN_OPTIONS), "counts for calls of s3fs only"),
    Rule(options_beyond(_SIGNED_CLIENT, "client_kwargs"), "counts for calls of the SDK only"),
    Rule(options_beyond(_URL_CONFIG, "config_kwargs"), "counts for calls of the SDK only"),
)


def plain_account(settings: Settings) -> Account:
    """
    Read plain settings.

    Raises:
        SettingsError: The endpoint is not a URL.
    """
    return _account(settings, _given_url(settings), _plain_region(settings), _given_source(settings), "auto")


def sdk_account(settings: Settings) -> tuple[Account, tuple[Reason, ...]]:
    """
    Let the SDK find what the options leave open, and return it with the reasons why only the SDK can sign, if any.

    Raises:
        SettingsError: AWS's files or the endpoint cannot be used.
    """
    session = SDKSession(settings.options)
    config = _inside(settings, "config_kwargs")
    url = _option_url(settings)
    if not url and not config.get("ignore_configured_endpoint_urls"):
        url = session.endpoint_url()
    region = _option_region(settings) or session.variable("region") or settings.environ.get("AWS_REGION") or "us-east-1"
    source = _given_source(settings, with_environ=False) or session.credentials()
    style = (session.variable("s3") or {}).get("addressing_style") or "auto"
    account = _account(settings, url, region, source, style)
    if account.ca_bundle is None:
        account = attrs.evolve(account, ca_bundle=session.variable("ca_bundle"))
    reasons = find_reasons(_BEYOND_SIGNING, settings)
    if not url and region.startswith(_OTHER_PARTITIONS):
        reasons += (Reason("region", "is in a partition whose endpoints the SDK knows"),)
    unusual = tuple(
        Reason(name, "is in the profile, and changes requests as the SDK knows") for name in session.unusual()
    )
    return account, reasons + unusual


def _account(settings: Settings, url: str | None, region: str, source: CredentialSource | None, style: str) -> Account:
    options, arguments = settings.options, _inside(settings, "client_kwargs")
    endpoint = _endpoint(url)
    addressing = (_inside(settings, "config_kwargs").get("s3") or {}).get("addressing_style") or style
    is_sealed = arguments.get("use_ssl", options.get("use_ssl", True))
    return Account(
        endpoint,
        region.strip(),
        source or FixedCredentials(None),
        # As botocore does: the bucket goes into the name of the host, but not at an endpoint that was named.
        is_virtual=addressing == "virtual" or (addressing == "auto" and endpoint is None),
        scheme="https" if is_sealed else "http",
        is_payer=bool(options.get("requester_pays")),
        has_conditions=not options.get("local_expiry_check"),
        ca_bundle=arguments.get("verify"),
    )


def _given_source(settings: Settings, *, with_environ: bool = True) -> CredentialSource | None:
    """Credentials that are given as they are, or none at all; None if the SDK has to find them."""
    if settings.options.get("anon"):
        return FixedCredentials(None)
    key, secret, token = _given_keys(settings, with_environ=with_environ) or (None, None, None)
    if not key and not secret:
        return None
    if not key or not secret:
        raise SettingsError("secret" if key else "key", "", "give both `key` and `secret`")
    return FixedCredentials(Credentials(str(key), str(secret), token))


def _given_keys(settings: Settings, *, with_environ: bool = True) -> tuple[Any, Any, Any] | None:
    """Key, secret and session token of one place: they are never mixed."""
    options, arguments = settings.options, _inside(settings, "client_kwargs")
    key, secret, token = (arguments.get(name) for name in _KEYS)
    key = options.get("key") or options.get("username") or key
    secret = options.get("secret") or options.get("password") or secret
    token = options.get("token") or token
    if key or secret:
        return key, secret, token
    if not with_environ:
        return None
    key, secret, token = (settings.environ.get(name.upper()) for name in _KEYS)
    return key, secret, token


def _option_url(settings: Settings) -> str | None:
    url: str | None = settings.options.get("endpoint_url") or _inside(settings, "client_kwargs").get("endpoint_url")
    return url


def _given_url(settings: Settings) -> str | None:
    environ = settings.environ
    url = _option_url(settings)
    if not url and environ.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() != "true":
        url = environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL")
    return url


def _option_region(settings: Settings) -> str | None:
    arguments, config = _inside(settings, "client_kwargs"), _inside(settings, "config_kwargs")
    return arguments.get("region_name") or config.get("region_name")


def _plain_region(settings: Settings) -> str:
    environ = settings.environ
    return _option_region(settings) or environ.get("AWS_DEFAULT_REGION") or environ.get("AWS_REGION") or "us-east-1"


def _endpoint(url: str | None) -> Target | None:
    try:
        return target_of(url.strip()) if url else None
    except HTTPError as error:
        raise SettingsError("endpoint_url", redact(str(url)), "write `https://host:port`") from error


def _inside(settings: Settings, name: str) -> Mapping[str, Any]:
    value = settings.options.get(name)
    return value if isinstance(value, Mapping) else {}
