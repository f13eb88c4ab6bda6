"""
The interface of KServe's own storage library, for servers that download by themselves.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import attrs

from kserve_pvc.kserve._destination import temporary_directory
from kserve_pvc.kserve._environment import Variables, read_variables, trust_bundle
from kserve_pvc.kserve._initialize import fill_all, from_store
from kserve_pvc.kserve._sources import read_source


class Storage:
    """
    Downloads like KServe's `Storage`, with the guarantees of this project.
    """

    @staticmethod
    def download(
        uri: str,
        out_dir: str | os.PathLike[str] | None = None,
        allow_patterns: Sequence[str] | None = None,
        ignore_patterns: Sequence[str] | None = None,
    ) -> str:
        """
        Download a model into a directory and return its path. A second call finds the model there.

        Args:
            uri: A URI as in KServe, or a path.
            out_dir: The directory. Without it, a local path is returned unchanged; with `KSERVE_PVC_STORE` the model
                is downloaded into that store, and its path there is returned; otherwise it is downloaded into a new
                temporary directory, which the caller must delete.
            allow_patterns: Only download files that match. Default: `STORAGE_ALLOW_PATTERNS`.
            ignore_patterns: Do not download files that match. Default: `STORAGE_IGNORE_PATTERNS`.

        Raises:
            StoreError: As `ModelStore.ensure`, or if a setting in the environment is not supported. Each is a
                `RuntimeError`, as KServe's errors are.
        """
        variables = _variables(allow_patterns, ignore_patterns)
        if out_dir is None:
            if uri and "://" not in uri and Path(uri).exists():
                return uri
            ref = read_source(uri, variables).ref
            if ref.scheme == "file" and Path(ref.location).exists():
                return ref.location
            if variables.store is not None:
                return str(from_store(variables.store, read_source(uri, variables), variables).path)
            with temporary_directory() as made:
                fill_all([(uri, made)], variables)
            return made
        fill_all([(uri, os.fspath(out_dir))], variables)
        return os.fspath(out_dir)

    @staticmethod
    def download_files(
        source_uris: Iterable[str],
        out_dirs: Iterable[str | os.PathLike[str] | None],
        allow_patterns: Sequence[str] | None = None,
        ignore_patterns: Sequence[str] | None = None,
    ) -> list[str]:
        """
        Download several models one after the other, each like `download`. Models with the same directory are merged.

        Raises:
            ValueError: The numbers of sources and directories differ.
        """
        pairs = list(zip(source_uris, out_dirs, strict=True))
        variables = _variables(allow_patterns, ignore_patterns)
        fill_all([(uri, os.fspath(place)) for uri, place in pairs if place is not None], variables)
        return [
            Storage.download(uri, None, allow_patterns, ignore_patterns) if place is None else os.fspath(place)
            for uri, place in pairs
        ]


def _variables(allow_patterns: Sequence[str] | None, ignore_patterns: Sequence[str] | None) -> Variables:
    variables = read_variables()
    os.environ.update(trust_bundle(os.environ))
    return attrs.evolve(
        variables,
        allow_patterns=variables.allow_patterns if allow_patterns is None else tuple(allow_patterns) or None,
        ignore_patterns=variables.ignore_patterns if ignore_patterns is None else tuple(ignore_patterns) or None,
    )
