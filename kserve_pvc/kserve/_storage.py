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
from kserve_pvc.kserve._initialize import fill_all, from_store, read_source


class Storage:
    """
    Downloads as KServe's `Storage` does, with what this project guarantees.
    """

    @staticmethod
    def download(
        uri: str,
        out_dir: str | os.PathLike[str] | None = None,
        allow_patterns: Sequence[str] | None = None,
        ignore_patterns: Sequence[str] | None = None,
    ) -> str:
        """
        Put a model into a directory and return it. A second call finds it there.

        Args:
            uri: As KServe spells it; or a path.
            out_dir: Without it a path is returned as it is, a model of the store that `KSERVE_PVC_STORE` names where it
                lies in there, and any other one in a new temporary directory, which is the caller's to delete.
            allow_patterns: Only files that match; else what `STORAGE_ALLOW_PATTERNS` says.
            ignore_patterns: No files that match; else what `STORAGE_IGNORE_PATTERNS` says.

        Raises:
            StoreError: As `ModelStore.ensure`, and if the environment asks for what cannot be done.
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
        Download several models one after the other, each as `download` does, but for those of one directory, which are
        put there together.

        Raises:
            ValueError: There are not as many directories as sources.
        """
        pairs = list(zip(source_uris, out_dirs, strict=True))
        variables = _variables(allow_patterns, ignore_patterns)
        fill_all([(uri, os.fspath(place)) for uri, place in pairs if place is not None], variables)
        return [
            Storage.download(uri, None, allow_patterns, ignore_patterns) if place is None else os.fspath(place)
            for uri, place in pairs
        ]


def _variables(allow_patterns: Sequence[str] | None, ignore_patterns: Sequence[str] | None) -> Variables:
    os.environ.update(trust_bundle(os.environ))
    variables = read_variables()
    return attrs.evolve(
        variables,
        allow_patterns=variables.allow_patterns if allow_patterns is None else tuple(allow_patterns) or None,
        ignore_patterns=variables.ignore_patterns if ignore_patterns is None else tuple(ignore_patterns) or None,
    )
