"""
Sources that KServe supports and this initializer does not, each with the alternative.
"""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from kserve_pvc._source.ref import show_source
from kserve_pvc.errors import InvalidURIError, UnknownSchemeError

_IMAGE = (
    "images are not downloaded; KServe mounts `oci://` and `oci+native://` without an initializer, and needs its own "
    "initializer's image for `oci+fetch://` and `ociModelMode: fetch`"
)
_HDFS = (
    "copy the model to a bucket, or use KServe's own initializer; WebHDFS without Kerberos is read from "
    "`fsspec+webhdfs://HOST:PORT/PATH`, for which KServe needs a ClusterStorageContainer with that prefix"
)
_GIT = "git repositories are not supported; put the files into a bucket, or on Hugging Face"
_SCHEMES = {
    "oci": _IMAGE,
    "oci+native": _IMAGE,
    "oci+fetch": _IMAGE,
    "docker": _IMAGE,
    "modelscope": "copy the model to a bucket, or use Hugging Face",
    "hdfs": _HDFS,
    "webhdfs": _HDFS,
    "git": _GIT,
    "git+https": _GIT,
    "git+ssh": _GIT,
}
_REPOSITORY = re.compile(r"https?://.+\.git/?", re.IGNORECASE)
_FILE_SHARE = re.compile(r".+\.file\.(?:core\.[a-z0-9.]+|storage\.azure\.net)", re.IGNORECASE)


def check_supported(source: str) -> None:
    """
    Refuse a source of which KServe's own initializer knows the kind, and this one does not.

    Raises:
        InvalidURIError: It is a git repository or a file share of Azure.
        UnknownSchemeError: It is of another kind.
    """
    scheme = source.partition("://")[0].lower()
    if scheme in _SCHEMES:
        raise UnknownSchemeError(scheme, _SCHEMES[scheme])
    if _REPOSITORY.fullmatch(source):
        raise InvalidURIError(show_source(source), _GIT)
    if scheme in ("http", "https") and _FILE_SHARE.fullmatch(_host(source)):
        rule = (
            "file shares of Azure are not supported; copy the model to a blob container (`.blob.` in the URL), or "
            "mount the share as a claim and use `pvc://`"
        )
        raise InvalidURIError(show_source(source), rule)


def _host(source: str) -> str:
    try:
        return urlsplit(source).hostname or ""
    except ValueError:  # A malformed address, which is refused where the URI is parsed.
        return ""
