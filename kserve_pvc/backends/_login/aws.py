"""
Credentials, region and endpoint as AWS's SDK finds them: profiles, roles, SSO, web identity, containers and instances.

s3fs leaves all of this to botocore, so botocore is what runs here too, with the same arguments. No client of S3 is
made: that costs half a second, and about a millisecond for each request that it signs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from kserve_pvc._source.redaction import redact
from kserve_pvc.backends._login.contract import describe_foreign
from kserve_pvc.backends._login.sigv4 import Credentials
from kserve_pvc.backends._ranges import NO_CREDENTIALS, RefusedError
from kserve_pvc.errors import InvalidFileError, SettingsError

NO_CREDENTIALS_HINT = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or `anon`"
# botocore refreshes ten minutes before the end; it is consulted this often, since that takes as long as a signature.
_FRESH_SECONDS = 1.0
# Credentials that were refused are not renewed again earlier.
_RENEW_SECONDS = 10.0
# Keys of a profile that change neither where a request to S3 goes nor how it is signed, or that are read here.
_ORDINARY_KEYS = {
    *("aws_access_key_id", "aws_secret_access_key", "aws_session_token", "aws_account_id", "region", "output"),
    *("role_arn", "role_session_name", "source_profile", "credential_source", "external_id", "mfa_serial"),
    *("duration_seconds", "web_identity_token_file", "credential_process", "login_session"),
    *("sso_session", "sso_start_url", "sso_region", "sso_account_id", "sso_role_name", "sso_registration_scopes"),
    *("endpoint_url", "services", "ignore_configured_endpoint_urls", "ca_bundle", "s3", "sts_regional_endpoints"),
    *("metadata_service_timeout", "metadata_service_num_attempts", "ec2_metadata_service_endpoint"),
    *("ec2_metadata_service_endpoint_mode", "ec2_metadata_v1_disabled", "retry_mode", "max_attempts"),
    *("defaults_mode", "tcp_keepalive", "parameter_validation", "sdk_ua_app_id", "s3_us_east_1_regional_endpoint"),
    *("request_checksum_calculation", "response_checksum_validation", "use_fips_endpoint", "use_dualstack_endpoint"),
    *("cli_pager", "cli_auto_prompt", "cli_timestamp_format", "cli_binary_format", "cli_history"),
}
_ORDINARY_S3_KEYS = {
    *("addressing_style", "payload_signing_enabled", "us_east_1_regional_endpoint", "use_arn_region"),
    *("max_concurrent_requests", "max_queue_size", "multipart_threshold", "multipart_chunksize", "max_bandwidth"),
    *("preferred_transfer_client", "target_bandwidth"),
}


class CredentialSource(Protocol):
    """
    Who signs requests. Called from many threads at once.
    """

    def get(self) -> Credentials | None:
        """Return what signs now, None for anonymous requests. Raises `RefusedError`."""

    def renew(self) -> bool:
        """Replace credentials that were refused, and return whether others are used now. Raises `RefusedError`."""


class FixedCredentials:
    """
    Credentials that were given, and are all there are.
    """

    def __init__(self, credentials: Credentials | None) -> None:
        self._credentials = credentials

    def get(self) -> Credentials | None:
        return self._credentials

    def renew(self) -> bool:
        return False


class SDKCredentials:
    """
    Credentials that the SDK finds, refreshes before they expire, and finds anew once they are refused.

    Args:
        find: Goes through the SDK's chain of providers, and returns its credentials, or None.
        freeze: Returns what those are now, refreshed if need be.
    """

    def __init__(self, find: Callable[[], Any], freeze: Callable[[Any], Any]) -> None:
        self._find = find
        self._freeze = freeze
        self._guard = threading.Lock()
        self._found: Any = None
        self._current: Credentials | None = None
        self._fresh_until = 0.0
        self._renewed_at = float("-inf")
        self._has_changed = False

    def get(self) -> Credentials:
        current = self._current
        if current is not None and time.monotonic() < self._fresh_until:
            return current
        with self._guard:
            if self._current is None or time.monotonic() >= self._fresh_until:
                self._current = self._load()
            return self._current

    def renew(self) -> bool:
        with self._guard:
            # Of many threads whose requests were refused, the first renews for all.
            if time.monotonic() - self._renewed_at >= _RENEW_SECONDS:
                before, self._found = self._current, None
                self._current = self._load()
                self._has_changed = self._current != before
                self._renewed_at = time.monotonic()
            return self._has_changed

    def _load(self) -> Credentials:
        with sdk_errors():
            if self._found is None:
                self._found = self._find()
            if self._found is None:
                raise RefusedError("no credentials found", code=NO_CREDENTIALS, hint=NO_CREDENTIALS_HINT)
            frozen = self._freeze(self._found)
        self._fresh_until = time.monotonic() + _FRESH_SECONDS
        return Credentials(frozen.access_key, frozen.secret_key, frozen.token)


class SDKSession:
    """
    What botocore reads from AWS's files, the environment and the session arguments of `s3fs.S3FileSystem`.

    Args:
        options: `profile`, `session_vars` and `session` count.

    Raises:
        SettingsError: The profile is in none of the files, or a file cannot be read.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._arguments = {name: options[name] for name in ("profile", "session_vars") if options.get(name)}
        self._given = options.get("session")
        with _setting_errors():
            self._session = self._given or self._make()
            self._profile: Mapping[str, Any] = self._session.get_scoped_config()

    def _make(self) -> Any:
        from botocore.session import Session

        return Session(**self._arguments)

    def variable(self, name: str) -> Any:
        """
        Return a setting by botocore's name for it, from the environment or the profile.
        """
        with _setting_errors():
            return self._session.get_config_variable(name)

    def endpoint_url(self) -> str | None:
        """
        Return the endpoint of S3 that variables or files set.
        """
        from botocore.configprovider import ConfiguredEndpointProvider

        with _setting_errors():
            url: str | None = ConfiguredEndpointProvider(
                full_config=self._session.full_config, scoped_config=self._profile, client_name="s3"
            ).provide()
        return None if self.variable("ignore_configured_endpoint_urls") else url

    def unusual(self) -> Iterator[str]:
        """
        Name the settings of the profile that only botocore's client of S3 knows how to obey.
        """
        yield from sorted(set(self._profile) - _ORDINARY_KEYS)
        section = self._profile.get("s3") or {}
        if not isinstance(section, Mapping):
            yield "s3"
            return
        yield from (f"s3.{name}" for name in sorted(set(section) - _ORDINARY_S3_KEYS))
        yield from (name for name in ("use_fips_endpoint", "use_dualstack_endpoint") if self.variable(name))

    def credentials(self) -> SDKCredentials:
        """
        Make the credentials of this session, which are found when they are first used.
        """
        if self._given is None:
            # Each time from the beginning: files are read again, tokens exchanged again.
            return SDKCredentials(lambda: self._make().get_credentials(), lambda found: found.get_frozen_credentials())
        from fsspec.asyn import get_loop, sync

        given, loop = self._given, get_loop()
        return SDKCredentials(
            lambda: sync(loop, given.get_credentials), lambda found: sync(loop, found.get_frozen_credentials)
        )


@contextmanager
def _setting_errors() -> Iterator[None]:
    from botocore.exceptions import ProfileNotFound

    try:
        yield
    except ProfileNotFound as error:
        raise SettingsError("profile", error.kwargs["profile"], "name a profile of AWS's configuration files") from None
    except Exception as error:  # A file that cannot be read or parsed.
        raise InvalidFileError("AWS's configuration", type(error).__name__, redact(describe_foreign(error))) from None


@contextmanager
def sdk_errors() -> Iterator[None]:
    """
    Turn what the SDK raises while it finds credentials into a refusal.
    """
    try:
        yield
    except RefusedError:
        raise
    except Exception as error:  # Files, programs and agents, each with errors of its own.
        reason = redact(describe_foreign(error))
        if _is_transient(error):
            raise RefusedError(f"credentials are unavailable: {reason}", status=503, busy=0.0) from None
        raise RefusedError(f"no credentials: {reason}", code=NO_CREDENTIALS, hint=NO_CREDENTIALS_HINT) from None


def _is_transient(error: BaseException) -> bool:
    """Whether a service that gives out credentials was not reached, or is failing."""
    from botocore.exceptions import ClientError, HTTPClientError, MetadataRetrievalError

    if isinstance(error, ClientError):
        return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) >= 500
    cause = error.__cause__ or error.__context__
    if isinstance(error, HTTPClientError | MetadataRetrievalError):
        return True
    return cause is not None and _is_transient(cause)
