"""
A shared Kubernetes volume as a correct model store.
"""

# As in `typing`, which would take longer to import than this package; type checkers know the name.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from kserve_pvc._bundle import Exported
    from kserve_pvc._claims import LockInfo
    from kserve_pvc._plan import Plan
    from kserve_pvc._record import FileEntry, Record
    from kserve_pvc._ref import ModelRef
    from kserve_pvc._settings import mode_from_annotations
    from kserve_pvc._source import Backend, RangeReader, RemoteFile, Resolved, resolved
    from kserve_pvc._store import Model, ModelStore
    from kserve_pvc._verify import Problem, Verification
    from kserve_pvc._warm import Warmed
    from kserve_pvc.errors import (
        DamagedRecordError,
        DigestMismatchError,
        InsufficientSpaceError,
        InvalidURIError,
        LockerMismatchError,
        LockServiceError,
        LockTimeoutError,
        ModelInUseError,
        ModelNotFoundError,
        PolicyError,
        ReadOnlyStoreError,
        SettingsError,
        SourceChangedError,
        SourceDeniedError,
        SourceNotFoundError,
        SourceUnavailableError,
        StoreError,
        StoreFormatError,
        StoreRootError,
        UnknownSchemeError,
        UnsafePathError,
        VolumeError,
    )
else:
    # Public names are loaded when they are first used (PEP 562), so that nobody waits for what he does not call. Type
    # checkers must not see this: to them it would mean that every misspelled name exists.
    def __getattr__(name):
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES.get(name, 'errors')}"), name)
        return value

    def __dir__():
        return sorted({*globals(), *__all__})


# The module of every public name that is not an error.
_HOMES = {
    "Backend": "_source",
    "Exported": "_bundle",
    "FileEntry": "_record",
    "LockInfo": "_claims",
    "Model": "_store",
    "ModelRef": "_ref",
    "ModelStore": "_store",
    "Plan": "_plan",
    "Problem": "_verify",
    "RangeReader": "_source",
    "Record": "_record",
    "RemoteFile": "_source",
    "Resolved": "_source",
    "Verification": "_verify",
    "Warmed": "_warm",
    "mode_from_annotations": "_settings",
    "resolved": "_source",
}
__all__ = [
    "Backend",
    "DamagedRecordError",
    "DigestMismatchError",
    "Exported",
    "FileEntry",
    "InsufficientSpaceError",
    "InvalidURIError",
    "LockInfo",
    "LockServiceError",
    "LockTimeoutError",
    "LockerMismatchError",
    "Model",
    "ModelInUseError",
    "ModelNotFoundError",
    "ModelRef",
    "ModelStore",
    "Plan",
    "PolicyError",
    "Problem",
    "RangeReader",
    "ReadOnlyStoreError",
    "Record",
    "RemoteFile",
    "Resolved",
    "SettingsError",
    "SourceChangedError",
    "SourceDeniedError",
    "SourceNotFoundError",
    "SourceUnavailableError",
    "StoreError",
    "StoreFormatError",
    "StoreRootError",
    "UnknownSchemeError",
    "UnsafePathError",
    "Verification",
    "VolumeError",
    "Warmed",
    "mode_from_annotations",
    "resolved",
]
__version__ = "0.1.0"
