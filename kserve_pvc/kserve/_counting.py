"""
Which file KServe takes for the only one of a source, and unpacks if it is an archive.
"""

from __future__ import annotations

from collections.abc import Sequence

from kserve_pvc._source.contract import RemoteFile

# Where KServe passes over empty objects, such as the `_SUCCESS` that Hadoop's tools leave beside an archive.
_WITHOUT_EMPTY = ("s3", "az", "abfs", "abfss")
_DIRECTORIES = ("file", "pvc")


def find_only_file(service: str, files: Sequence[RemoteFile]) -> RemoteFile | None:
    """
    Return the only file that KServe counts: of a bucket whatever directory it is in; of a directory only at its top,
    beside hidden files at most.
    """
    counted = files
    if len(files) > 1 and service in _WITHOUT_EMPTY:
        counted = [file for file in files if file.entry.size_bytes]
    elif len(files) > 1 and service in _DIRECTORIES:
        counted = [file for file in files if not file.entry.path.parts[0].startswith(".")]
    if len(counted) != 1 or (service in _DIRECTORIES and len(counted[0].entry.path.parts) > 1):
        return None
    return counted[0]
