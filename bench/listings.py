"""
What each service says about the files of a directory: pages of S3, Google Cloud Storage and Azure, and a hub's tree.

The bytes are the same for all, and so are names and sizes; digests are those that the service would have, worked out
once.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from email.utils import formatdate
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import escape

# Key, size and time of the last change; a size of -1 marks a common prefix.
Entry = tuple[str, int, float]
# Objects of a bucket are never replaced here, so that one number is the generation of them all.
GENERATION = "1700000000000000"
# What begins the path of whatever belongs to Azure, as its emulator has it.
AZURE_ACCOUNT = "benchaccount"
_MIB = 1 << 20
# What comes in one piece gets an MD5 from Azure; what is put together from blocks has none.
_LARGEST_PIECE = 64 * _MIB
# What is larger than this is in a hub's large file storage.
_LARGEST_BLOB = 10 * _MIB


class Digests:
    """
    Digests of the files below a directory, each computed when it is first asked for.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[tuple[str, str], bytes] = {}

    def get(self, kind: str, bucket: str, key: str) -> bytes:
        """
        A digest of one file: `crc32c`, `git`, or a name that hashlib knows.
        """
        name = (kind, f"{bucket}/{key}")
        if name not in self._known:
            self._known[name] = _digest(kind, self._root / bucket / key)
        return self._known[name]


def _digest(kind: str, place: Path) -> bytes:
    if kind == "crc32c":
        return _crc32c(place)
    if kind == "git":
        content = place.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).digest()
    with place.open("rb") as file:
        return hashlib.file_digest(file, kind).digest()


def _crc32c(place: Path) -> bytes:
    import google_crc32c

    checksum = google_crc32c.Checksum()
    with place.open("rb") as file:
        while block := file.read(_MIB):
            checksum.update(block)
    return bytes(checksum.digest())


def etag(changed_at: float, size: int) -> str:
    """
    An ETag as nginx makes it, so that its objects are those of our listings.
    """
    return f'"{int(changed_at):x}-{size:x}"'


def s3(
    bucket: str,
    prefix: str,
    delimiter: str,
    page: Sequence[Entry],
    *,
    more: bool,
    second: bool,
    limit: int,
    encoded: bool,
) -> bytes:
    """
    A page of ListObjects, or of its second version. Its token is the last name.
    """
    name: Callable[[str], str] = quote if encoded else escape
    parts = [
        f'<?xml version="1.0" encoding="UTF-8"?>\n<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>{bucket}</Name>'
    ]
    parts.append(
        f"<Prefix>{name(prefix)}</Prefix><MaxKeys>{limit}</MaxKeys><IsTruncated>{str(more).lower()}</IsTruncated>"
    )
    if encoded:
        parts.append("<EncodingType>url</EncodingType>")
    if delimiter:
        parts.append(f"<Delimiter>{escape(delimiter)}</Delimiter>")
    if second:
        parts.append(f"<KeyCount>{len(page)}</KeyCount>")
    if more and second:
        # It comes back as it went, url-encoded listings or not.
        parts.append(f"<NextContinuationToken>{escape(page[-1][0])}</NextContinuationToken>")
    elif more:
        parts.append(f"<NextMarker>{name(page[-1][0])}</NextMarker>")
    for key, size, changed_at in page:
        if size < 0:
            parts.append(f"<CommonPrefixes><Prefix>{name(key)}</Prefix></CommonPrefixes>")
            continue
        when = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(changed_at))
        quoted = escape(etag(changed_at, size), {'"': "&quot;"})
        parts.append(
            f"<Contents><Key>{name(key)}</Key><LastModified>{when}</LastModified><ETag>{quoted}</ETag><Size>{size}</Size>"
        )
        parts.append("<StorageClass>STANDARD</StorageClass></Contents>")
    return "".join([*parts, "</ListBucketResult>"]).encode()


def google(bucket: str, page: Sequence[Entry], digests: Digests, *, more: bool) -> bytes:
    """
    A page of `objects.list`, with as much of each object as ours ask for. Its token is the last name.
    """
    items = [_google_object(bucket, entry, digests) for entry in page]
    return json.dumps({"items": items, **({"nextPageToken": page[-1][0]} if more else {})}).encode()


def _google_object(bucket: str, entry: Entry, digests: Digests) -> dict[str, str]:
    key, size, _ = entry
    # All objects have a CRC32C; only what was not composed has an MD5 beside it.
    crc32c = base64.b64encode(digests.get("crc32c", bucket, key)).decode()
    return {"name": key, "size": str(size), "generation": GENERATION, "crc32c": crc32c}


def azure(bucket: str, prefix: str, page: Sequence[Entry], digests: Digests, *, more: bool) -> bytes:
    """
    A page of List Blobs. Its marker is the last name.
    """
    parts = [f'\ufeff<?xml version="1.0" encoding="utf-8"?><EnumerationResults ContainerName="{bucket}">']
    parts.append(f"<Prefix>{escape(prefix)}</Prefix><Blobs>")
    for key, size, changed_at in page:
        when, tag = formatdate(changed_at, usegmt=True), etag(changed_at, size).strip('"')
        md5 = base64.b64encode(digests.get("md5", bucket, key)).decode() if size <= _LARGEST_PIECE else ""
        parts.append(
            f"<Blob><Name>{escape(key)}</Name><Properties><Last-Modified>{when}</Last-Modified><Etag>{tag}</Etag>"
        )
        parts.append(
            f"<Content-Length>{size}</Content-Length><Content-MD5>{md5}</Content-MD5><BlobType>BlockBlob</BlobType>"
        )
        parts.append("<ResourceType>file</ResourceType></Properties><Metadata /></Blob>")
    marker = escape(page[-1][0]) if more else ""
    return "".join([*parts, f"</Blobs><NextMarker>{marker}</NextMarker></EnumerationResults>"]).encode()


def hub_tree(bucket: str, prefix: str, page: Sequence[Entry], digests: Digests) -> bytes:
    """
    All files of a model at a hub: small ones by the id of their git blob, the others by their SHA-256.
    """
    return json.dumps([_hub_file(bucket, prefix, entry, digests) for entry in page]).encode()


def _hub_file(bucket: str, prefix: str, entry: Entry, digests: Digests) -> dict[str, Any]:
    key, size, _ = entry
    found: dict[str, Any] = {"type": "file", "size": size, "path": key.removeprefix(prefix)}
    if size <= _LARGEST_BLOB:
        return found | {"oid": digests.get("git", bucket, key).hex()}
    sha256 = digests.get("sha256", bucket, key).hex()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
    oid = hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest()
    return found | {"oid": oid, "lfs": {"oid": sha256, "size": size, "pointerSize": len(pointer)}}
