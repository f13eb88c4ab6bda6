"""
The REST API of Azure Blob Storage: properties of blobs, pages of a listing, and errors.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping
from urllib.parse import unquote

from kserve_pvc.backends._object_store import Object, md5_digest
from kserve_pvc.backends._ranges import RefusedError, from_base64, retry_after, unavailable
from kserve_pvc.backends._refusals import words_of
from kserve_pvc.backends._validators import bare_etag, identifies, make_token
from kserve_pvc.backends._xml import is_size, parse_xml

_BUSY = {"ServerBusy", "OperationTimedOut"}
# A blob in the archive tier has to be rehydrated first.
_REHYDRATE = "rehydrate the blob to the hot or cool tier first"
_HINTS = {"BlobArchived": _REHYDRATE, "BlobBeingRehydrated": "wait until the blob is rehydrated, then retry"}
_NOT_A_SERVICE = "is this an Azure Blob Storage endpoint?"


def make_object(
    name: str,
    size_bytes: int,
    etag: str | None,
    *,
    date: str | None = None,
    md5: str | None = None,
    version: str | None = None,
    is_directory: bool = False,
    tier: str | None = None,
) -> Object:
    """
    Describe a blob.

    Args:
        etag: With or without quotes: listings have it without those that a condition needs.
        date: When it was written, as a header has it.
        md5: Its Content-MD5, in hex.
        version: Its version id, if it is one version of a blob.
        tier: Its access tier, if it has one.
    """
    bare = bare_etag(etag) if etag is not None and identifies(etag, size_bytes) else None
    pin = {} if version is None else {"versionid": version}
    if bare is not None:
        pin["If-Match"] = f'"{bare}"'
    elif date is not None:
        pin["If-Unmodified-Since"] = date
    digest = md5_digest(md5, size_bytes)
    return Object(
        name=name,
        size_bytes=size_bytes,
        token=version or bare or date or make_token(),
        pin=pin,
        digest=digest,
        is_directory=is_directory,
        is_cold=tier == "Archive",
    )


def parse_properties(name: str, headers: Mapping[str, str], version: str | None) -> Object:
    """
    Read the response to a request for the properties of one blob.

    Raises:
        RefusedError: It does not describe a blob.
    """
    is_directory = is_marker(headers.get("x-ms-resource-type"), headers.get("x-ms-meta-hdi_isfolder"))
    size, etag, date = headers.get("content-length", ""), headers.get("etag"), headers.get("last-modified")
    if not is_size(size) or not (etag or date):
        raise RefusedError(f"response lacks Content-Length, or both ETag and Last-Modified; {_NOT_A_SERVICE}")
    md5 = from_base64(headers.get("content-md5"), 16)
    tier = headers.get("x-ms-access-tier")
    return make_object(name, int(size), etag, date=date, md5=md5, version=version, is_directory=is_directory, tier=tier)


def parse_listing(body: bytes) -> tuple[list[Object], str | None]:
    """
    Read one response of List Blobs: the blobs, and the marker of the next page.

    Raises:
        RefusedError: It is not such a response.
    """
    root = parse_xml(body)
    if root is None or root.tag != "EnumerationResults":
        raise RefusedError(f"response is not a listing of blobs; {_NOT_A_SERVICE}")
    return [_parse_blob(item) for item in root.iterfind("Blobs/Blob")], root.findtext("NextMarker") or None


def _parse_blob(item: ET.Element) -> Object:
    named, properties = item.find("Name"), item.find("Properties")
    if named is None or not named.text or properties is None:
        raise RefusedError(f"the listing has a blob without name or properties; {_NOT_A_SERVICE}")
    size, etag = properties.findtext("Content-Length", ""), properties.findtext("Etag", "")
    date = properties.findtext("Last-Modified")
    if not is_size(size) or not (etag or date):
        raise RefusedError(f"the listing has a blob without length, or without ETag and date; {_NOT_A_SERVICE}")
    # What XML cannot hold is percent-encoded, and marked as such.
    name = unquote(named.text) if named.get("Encoded") == "true" else named.text
    metadata = {child.tag.lower(): child.text for child in item.find("Metadata") or ()}
    is_directory = is_marker(properties.findtext("ResourceType"), metadata.get("hdi_isfolder"))
    is_empty_name = size == "0" and name.endswith("/")
    md5 = from_base64(properties.findtext("Content-MD5"), 16)
    is_directory, tier = is_directory or is_empty_name, properties.findtext("AccessTier")
    return make_object(name, int(size), etag, date=date, md5=md5, is_directory=is_directory, tier=tier)


def is_marker(kind: str | None, is_folder: str | None) -> bool:
    """
    Whether a blob stands for a directory: accounts with directories say so; in others, tools mark empty blobs.
    """
    return kind == "directory" or (is_folder or "").lower() == "true"


def read_error(status: int, headers: Mapping[str, str], body: bytes) -> RefusedError:
    """
    Read an error response.
    """
    root = parse_xml(body) if body else None
    words = {child.tag: child.text or "" for child in root} if root is not None and root.tag == "Error" else {}
    if 300 <= status < 400:
        return RefusedError(unavailable("", status, headers).reason, status=status)
    code = headers.get("x-ms-error-code") or words.get("Code") or str(status)
    # After the first line there are only numbers of the request.
    message = words.get("Message", "").strip().partition("\n")[0]
    reason = f"{code}: {message}" if message else code if code != str(status) else f"HTTP {status}"
    if not message and not words:
        # Not all that speaks for a service speaks its XML.
        reason = f"{reason}: {said}" if (said := words_of({**headers, "x-ms-error-code": ""}, body)) else reason
    busy = retry_after(headers) if status in (429, 503) or code in _BUSY else None
    return RefusedError(reason, status=status, code=code, busy=busy, hint=_HINTS.get(code, ""))
