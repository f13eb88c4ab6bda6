"""
The clients that are Python: `python clients.py CLIENT URI DESTINATION` downloads, or lists if there is no destination.

Each does what its documentation shows for the job, with its own defaults. Endpoint, credentials and CA come from the
environment, for all alike. Nothing of this directory is imported: the time to start is part of what is measured.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path


def ours(uri: str, directory: str) -> None:
    """`ensure` with its defaults: every byte hashed, everything durable."""
    _ensure(uri, directory)


def ours_unverified(uri: str, directory: str) -> None:
    """`ensure` with hashing off."""
    _ensure(uri, directory, digest="none")


def ours_google(uri: str, directory: str) -> None:
    """`ensure` as a service account, which is not asked for by itself where the address is not Google's."""
    _ensure(uri, directory, storage_options={"token": "google_default"})


def ours_packed(uri: str, directory: str) -> None:
    """`ensure` of an archive as the one file that it is."""
    _ensure(uri, directory, storage_options={"unpack": False})


def ours_resolve(uri: str) -> None:
    """What the source holds now."""
    from kserve_pvc import ModelStore

    print(len(ModelStore(".").resolve(uri).files))


def ours_plan(uri: str) -> None:
    """What `ensure` would do."""
    from kserve_pvc import ModelStore

    ModelStore(".").plan(uri)


def kserve(uri: str, directory: str) -> None:
    """KServe's own storage initializer."""
    from kserve_storage import Storage

    Storage.download(uri, directory)


def s3fs(uri: str, directory: str) -> None:
    """fsspec's S3 file system."""
    from s3fs import S3FileSystem

    S3FileSystem().get(uri + "/", directory, recursive=True)


def boto3(uri: str, directory: str) -> None:
    """`download_file` for each object of a listing, one after the other; each uses its ten threads."""
    import boto3

    client = boto3.client("s3")
    bucket, prefix = _split(uri)
    for key in _boto3_keys(client, bucket, prefix):
        client.download_file(bucket, key, str(_place(directory, prefix, key)))


def boto3_list(uri: str) -> None:
    """The paginator."""
    import boto3

    print(sum(1 for _ in _boto3_keys(boto3.client("s3"), *_split(uri))))


def obstore(uri: str, directory: str) -> None:
    """Streams of whole objects in eight threads."""
    from concurrent.futures import ThreadPoolExecutor

    store, prefix = _obstore(uri)

    def fetch(key: str) -> None:
        with open(_place(directory, prefix, key), "wb", buffering=0) as file:
            file.writelines(store.get(key).stream(min_chunk_size=1 << 20))

    keys = sorted((item for page in store.list(prefix) for item in page), key=lambda item: -item["size"])
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(fetch, [item["path"] for item in keys]):
            pass


def obstore_list(uri: str) -> None:
    """`list` in pages."""
    store, prefix = _obstore(uri)
    print(sum(len(page) for page in store.list(prefix, chunk_size=1000)))


def huggingface(uri: str, directory: str) -> None:
    """`snapshot_download` into a directory, from the origin's imitation of the hub."""
    from huggingface_hub import snapshot_download

    snapshot_download("/".join(_split(uri)), local_dir=directory)


def _ensure(uri: str, directory: str, **settings) -> None:
    from kserve_pvc import ModelStore

    print(ModelStore(directory, mode="rw", **settings).ensure(uri, progress=False).path)


def _split(uri: str) -> tuple[str, str]:
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    return bucket, prefix


def _place(directory: str, prefix: str, key: str) -> Path:
    place = Path(directory, key.removeprefix(prefix).lstrip("/"))
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


def _boto3_keys(client, bucket: str, prefix: str) -> Iterator[str]:
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix + "/"):
        for item in page["Contents"]:
            yield item["Key"]


def _obstore(uri: str):
    from obstore.store import S3Store

    bucket, prefix = _split(uri)
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    options = {"allow_http": endpoint.startswith("http:")}
    return S3Store(bucket, endpoint=endpoint, client_options=options), prefix


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
