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
    from kserve_pvc._download.warm import FailedModel, Warmed, WarmedModel
    from kserve_pvc._filesystem import filesystem
    from kserve_pvc._format.records import FileEntry, Record
    from kserve_pvc._keys.claims import LockInfo
    from kserve_pvc._keys.usage import KeyUsage, Usage
    from kserve_pvc._model import Model
    from kserve_pvc._opening import StoreArguments
    from kserve_pvc._settings import Mode, mode_from_annotations
    from kserve_pvc._show.events import (
        BytesAdopted,
        BytesReceived,
        CallFailed,
        CallFinished,
        ClaimLost,
        ClaimTakenOver,
        Event,
        LockerUnavailable,
        ModelRemoved,
        RequestRetried,
        TransferStarted,
        WaitingForDownload,
    )
    from kserve_pvc._source.contract import (
        Backend,
        BackendFactory,
        Checksum,
        RangeReader,
        RemoteFile,
        Resolved,
        SupportsAccess,
        SupportsCertificates,
        SupportsChecksums,
        SupportsClose,
        SupportsEvidence,
        SupportsPages,
        SupportsTuning,
        order_listing,
    )
    from kserve_pvc._source.ref import ModelRef, Patterns, Source
    from kserve_pvc._store import ModelStore
    from kserve_pvc._volume.profile import Profile
    from kserve_pvc._volume.verify import Level, Problem, Verification
    from kserve_pvc.errors import (
        DamagedArchiveError,
        DamagedRecordError,
        DigestMismatchError,
        DownloadCancelledError,
        InsufficientSpaceError,
        InvalidFileError,
        InvalidURIError,
        LockerMismatchError,
        LockServiceError,
        LockTimeoutError,
        MissingDependencyError,
        ModelInUseError,
        ModelNotFoundError,
        NoStoreError,
        OfflineError,
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
        UnknownOptionError,
        UnknownSchemeError,
        UnsafePathError,
        VolumeError,
    )
else:
    # Public names are loaded when they are first used (PEP 562), so importing the package stays cheap. Type
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
    "BackendFactory": "_source.contract",
    "BytesAdopted": "_show.events",
    "BytesReceived": "_show.events",
    "CallFailed": "_show.events",
    "CallFinished": "_show.events",
    "Checksum": "_source.contract",
    "ClaimLost": "_show.events",
    "ClaimTakenOver": "_show.events",
    "Diagnosis": "_doctor.diagnosis",
    "Event": "_show.events",
    "Exported": "_archive.export",
    "FailedModel": "_download.warm",
    "FileEntry": "_format.records",
    "Finding": "_doctor.diagnosis",
    "KeyUsage": "_keys.usage",
    "Level": "_volume.verify",
    "LockInfo": "_keys.claims",
    "LockTest": "_doctor.reports",
    "LockerUnavailable": "_show.events",
    "Mode": "_settings",
    "Model": "_model",
    "ModelRef": "_source.ref",
    "ModelRemoved": "_show.events",
    "ModelStore": "_store",
    "Patterns": "_source.ref",
    "PeerReport": "_doctor.reports",
    "Plan": "_download.plan",
    "Problem": "_volume.verify",
    "Profile": "_volume.profile",
    "Race": "_doctor.reports",
    "RangeReader": "_source.contract",
    "Record": "_format.records",
    "RemoteFile": "_source.contract",
    "RequestRetried": "_show.events",
    "Resolved": "_source.contract",
    "Source": "_source.ref",
    "Speed": "_doctor.diagnosis",
    "StoreArguments": "_opening",
    "SupportsAccess": "_source.contract",
    "SupportsCertificates": "_source.contract",
    "SupportsChecksums": "_source.contract",
    "SupportsClose": "_source.contract",
    "SupportsEvidence": "_source.contract",
    "SupportsPages": "_source.contract",
    "SupportsTuning": "_source.contract",
    "TransferStarted": "_show.events",
    "Usage": "_keys.usage",
    "Verification": "_volume.verify",
    "WaitingForDownload": "_show.events",
    "Warmed": "_download.warm",
    "WarmedModel": "_download.warm",
    "filesystem": "_filesystem",
    "mode_from_annotations": "_settings",
    "order_listing": "_source.contract",
}
__all__ = [
    "Backend",
    "BackendFactory",
    "BytesAdopted",
    "BytesReceived",
    "CallFailed",
    "CallFinished",
    "Checksum",
    "ClaimLost",
    "ClaimTakenOver",
    "DamagedArchiveError",
    "DamagedRecordError",
    "Diagnosis",
    "DigestMismatchError",
    "DownloadCancelledError",
    "Event",
    "Exported",
    "FailedModel",
    "FileEntry",
    "Finding",
    "InsufficientSpaceError",
    "InvalidFileError",
    "InvalidURIError",
    "KeyUsage",
    "Level",
    "LockInfo",
    "LockServiceError",
    "LockTest",
    "LockTimeoutError",
    "LockerMismatchError",
    "LockerUnavailable",
    "MissingDependencyError",
    "Mode",
    "Model",
    "ModelInUseError",
    "ModelNotFoundError",
    "ModelRef",
    "ModelRemoved",
    "ModelStore",
    "NoStoreError",
    "OfflineError",
    "Patterns",
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
    "RequestRetried",
    "Resolved",
    "SettingsError",
    "Source",
    "SourceChangedError",
    "SourceDeniedError",
    "SourceNotFoundError",
    "SourceUnavailableError",
    "Speed",
    "StoreArguments",
    "StoreError",
    "StoreFormatError",
    "StoreRootError",
    "SupportsAccess",
    "SupportsCertificates",
    "SupportsChecksums",
    "SupportsClose",
    "SupportsEvidence",
    "SupportsPages",
    "SupportsTuning",
    "TransferStarted",
    "UnknownOptionError",
    "UnknownSchemeError",
    "UnsafePathError",
    "Usage",
    "Verification",
    "VolumeError",
    "WaitingForDownload",
    "Warmed",
    "WarmedModel",
    "filesystem",
    "mode_from_annotations",
    "order_listing",
]
__version__ = "0.1.0"
