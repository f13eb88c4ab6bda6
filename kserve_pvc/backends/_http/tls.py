"""
TLS contexts and the certificate bundle they trust.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from kserve_pvc.backends._http.target import HTTPError

if TYPE_CHECKING:
    import ssl


def make_context(ca_bundle: str | bool | None, environ: Mapping[str, str]) -> ssl.SSLContext:
    """
    Decide which certificates to trust.

    `ca_bundle` wins, then `AWS_CA_BUNDLE`, `REQUESTS_CA_BUNDLE`, `CURL_CA_BUNDLE`, then what OpenSSL finds by itself
    (`SSL_CERT_FILE`, `SSL_CERT_DIR`, the system's store). Slim images have none, and what certifi or botocore bring is
    used.

    Raises:
        HTTPError: The bundle cannot be read.
    """
    import ssl

    if ca_bundle is False:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return context
    source, bundle = _named_bundle(ca_bundle, environ)
    try:
        return _trusting(bundle) if bundle else _trusting_defaults()
    except (OSError, ssl.SSLError) as error:
        raise HTTPError(f"{source} `{bundle}` cannot be read: {error}", is_final=True) from error


def _named_bundle(ca_bundle: str | bool | None, environ: Mapping[str, str]) -> tuple[str, str]:
    """Where a bundle is named, and its file or directory, empty if there is none."""
    if isinstance(ca_bundle, str):
        return "the CA bundle", ca_bundle
    for name in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        if environ.get(name):
            return name, environ[name]
    return "the CA bundle", ""


def _trusting(bundle: str) -> ssl.SSLContext:
    import ssl
    from pathlib import Path

    if Path(bundle).is_dir():
        return ssl.create_default_context(capath=bundle)
    return ssl.create_default_context(cafile=bundle)


def _trusting_defaults() -> ssl.SSLContext:
    import ssl

    context = ssl.create_default_context()
    if not context.get_ca_certs() and not _has_directory():
        bundle = _packaged_bundle()
        if bundle is not None:
            context.load_verify_locations(bundle)
    return context


def _packaged_bundle() -> str | None:
    """Find the certificates that come with certifi or botocore, without importing them."""
    from importlib.util import find_spec
    from pathlib import Path

    for package in ("certifi", "botocore"):
        spec = find_spec(package)
        place = Path(spec.origin).parent / "cacert.pem" if spec is not None and spec.origin else None
        if place is not None and place.is_file():
            return str(place)
    return None


def _has_directory() -> bool:
    """Certificates of a directory are loaded when they are needed, so a context does not count them."""
    import ssl
    from pathlib import Path

    place = ssl.get_default_verify_paths().capath
    return place is not None and any(Path(place).iterdir())
