"""
The sources of one store: which backend serves a model, and whether a source may be requested at all.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

from kserve_pvc._source.ref import ModelRef
from kserve_pvc.errors import HIDDEN, PolicyError, SettingsError

# A server that starts on a warm volume requests no source, so what does is imported by the method that needs it.
if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

    from kserve_pvc._download.cancellation import Cancel
    from kserve_pvc._source.contract import Backend, BackendFactory, Resolved


class SourceAccess:
    """
    How one store reaches its sources.

    Args:
        factories: Backends by URI scheme, preferred to installed ones.
        filesystems: Configured fsspec file systems by URI scheme, preferred to backends.
        patience: The arguments of `SupportsTuning.tune`.
        offline: Whether no source may be requested; None leaves it to the environment.
    """

    def __init__(
        self,
        *,
        factories: Mapping[str, BackendFactory],
        storage_options: Mapping[str, Any],
        filesystems: Mapping[str, AbstractFileSystem],
        patience: Mapping[str, float],
        offline: bool | None,
    ) -> None:
        self._factories = dict(factories)
        self._options = dict(storage_options)
        self._filesystems = dict(filesystems)
        self._filesystem: AbstractFileSystem | None = None
        self._patience = patience
        self._offline = offline
        self._backends: dict[tuple[int, str, str], Backend] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Clients of remote services are neither pickled nor copied, since a copy may have other options. The storage
        # options are, secrets included: they go to a process, not to a file.
        return {**self.__dict__, "_backends": {}}

    def with_arguments(
        self, storage_options: Mapping[str, Any] | None, filesystem: AbstractFileSystem | None
    ) -> SourceAccess:
        """
        Return these sources with other storage options or a file system for one call, and with backends of its own.

        Raises:
            SettingsError: Both are given.
        """
        if storage_options is None and filesystem is None:
            return self
        if storage_options is not None and filesystem is not None:
            raise SettingsError("storage_options", HIDDEN, "`filesystem` is configured already; pass one of the two")
        sources = copy(self)
        if storage_options is not None:
            sources._options = dict(storage_options)
        sources._filesystem = filesystem
        return sources

    @property
    def is_offline(self) -> bool:
        if self._offline is None:
            from kserve_pvc._settings import is_offline

            self._offline = is_offline()
        return self._offline

    def why_offline(self, local_files_only: bool) -> str:
        """
        Say why no source may be requested for a call; empty if one may.
        """
        if local_files_only:
            return "`local_files_only` is set"
        return "the store is offline (`KSERVE_PVC_OFFLINE` or `offline=True`)" if self.is_offline else ""

    def check_online(self, ref: ModelRef) -> None:
        """
        Raises:
            PolicyError: No source may be requested.
        """
        if self.is_offline:
            raise PolicyError(
                str(ref), "this store is offline; unset `KSERVE_PVC_OFFLINE`, or `import` a bundle of the model"
            )

    def check(self, ref: ModelRef) -> None:
        """
        Make sure that there is a way to the source, before anything is claimed.

        Raises:
            UnknownSchemeError: No backend serves the scheme.
            SettingsError: The file system cannot be used by this thread.
        """
        from kserve_pvc.backends import check_filesystem, check_scheme

        filesystem = self._filesystem_for(ref)
        if filesystem is None:
            check_scheme(self._service(ref), self._factories)
        else:
            check_filesystem(filesystem)

    def resolve(self, ref: ModelRef, cancel: Cancel | None = None) -> Resolved:
        """
        Request what a source holds now, and release the connections.

        Raises:
            PolicyError: No source may be requested.
        """
        self.check_online(ref)
        from kserve_pvc._download.cancellation import Cancellation, run_detachable
        from kserve_pvc._source.contract import SupportsClose

        backend = self.backend(ref)

        def resolve() -> Resolved:
            try:
                return backend.resolve(ref)
            finally:
                if isinstance(backend, SupportsClose):
                    backend.close()

        return resolve() if cancel is None else run_detachable(resolve, Cancellation(str(ref), cancel))

    def explain(self) -> Mapping[str, Sequence[str]]:
        """
        Say for each scheme why it goes through its fsspec class, where it does.
        """
        from kserve_pvc.backends import options_for
        from kserve_pvc.backends._options import explain_all

        # A name that no source needs to have: only the scheme counts.
        return explain_all(lambda scheme: options_for(ModelRef(uri=f"{scheme}://x"), self._options, self._factories))

    def backend(self, ref: ModelRef) -> Backend:
        """
        Return the backend of a model, made on first use in each process.
        """
        from kserve_pvc._source.contract import SupportsTuning
        from kserve_pvc.backends import make_backend, options_for

        # Clients of remote services do not survive a fork, so each process has its own.
        name = (os.getpid(), ref.scheme, self._service(ref))
        if name not in self._backends:
            options = options_for(ref, self._options, self._factories)
            backend = make_backend(self._service(ref), self._factories, options, filesystem=self._filesystem_for(ref))
            if isinstance(backend, SupportsTuning):
                backend.tune(**self._patience)
            self._backends[name] = backend
        return self._backends[name]

    def _service(self, ref: ModelRef) -> str:
        """The name of the backend. A factory that was given for the scheme itself comes first."""
        return ref.scheme if ref.scheme in self._factories else ref.service

    def _filesystem_for(self, ref: ModelRef) -> AbstractFileSystem | None:
        return self._filesystem if self._filesystem is not None else self._filesystems.get(ref.scheme)
