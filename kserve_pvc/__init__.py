"""
A shared Kubernetes volume as a correct model store.
"""

# As in `typing`, which would take longer to import than this package; type checkers know the name.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from kserve_pvc._archive.export import Exported
    from kserve_pvc._doctor.diagnosis import Diagnosis, Finding, Speed
    from kserve_pvc._doctor.reports import LockTest, PeerReport, Race
    from kserve_pvc._download.plan import Plan
    from kserve_pvc._download.warm import Warmed
    from kserve_pvc._format.records import FileEntry, Record
    from kserve_pvc._keys.claims import LockInfo
    from kserve_pvc._model import Model
    from kserve_pvc._settings import mode_from_annotations
    from kserve_pvc._source.contract import Backend, RangeReader, RemoteFile, Resolved, order_listing
    from kserve_pvc._source.ref import ModelRef
    from kserve_pvc._store import ModelStore
    from kserve_pvc._volume.profile import Profile
    from kserve_pvc._volume.verify import Problem, Verification
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
    "Backend": "_source.contract",
    "Diagnosis": "_doctor.diagnosis",
    "Exported": "_archive.export",
    "FileEntry": "_format.records",
    "Finding": "_doctor.diagnosis",
    "LockInfo": "_keys.claims",
    "LockTest": "_doctor.reports",
    "Model": "_model",
    "ModelRef": "_source.ref",
    "ModelStore": "_store",
    "PeerReport": "_doctor.reports",
    "Plan": "_download.plan",
    "Problem": "_volume.verify",
    "Profile": "_volume.profile",
    "Race": "_doctor.reports",
    "RangeReader": "_source.contract",
    "Record": "_format.records",
    "RemoteFile": "_source.contract",
    "Resolved": "_source.contract",
    "Speed": "_doctor.diagnosis",
    "Verification": "_volume.verify",
    "Warmed": "_download.warm",
    "mode_from_annotations": "_settings",
    "order_listing": "_source.contract",
}
__all__ = [
    "Backend",
    "DamagedRecordError",
    "Diagnosis",
    "DigestMismatchError",
    "Exported",
    "FileEntry",
    "Finding",
    "InsufficientSpaceError",
    "InvalidURIError",
    "LockInfo",
    "LockServiceError",
    "LockTest",
    "LockTimeoutError",
    "LockerMismatchError",
    "Model",
    "ModelInUseError",
    "ModelNotFoundError",
    "ModelRef",
    "ModelStore",
    "PeerReport",
    "Plan",
    "PolicyError",
    "Problem",
    "Profile",
    "Race",
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
    "Speed",
    "StoreError",
    "StoreFormatError",
    "StoreRootError",
    "UnknownSchemeError",
    "UnsafePathError",
    "Verification",
    "VolumeError",
    "Warmed",
    "mode_from_annotations",
    "order_listing",
]
__version__ = "0.1.0"
