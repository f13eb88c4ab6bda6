"""
A shared Kubernetes volume as a correct model store.
"""

from kserve_pvc._record import FileEntry, Record
from kserve_pvc._ref import ModelRef
from kserve_pvc._settings import mode_from_annotations
from kserve_pvc._source import Backend, RangeReader, RemoteFile, Resolved, resolved
from kserve_pvc._store import LockInfo, Model, ModelStore, Plan
from kserve_pvc._verify import Problem, Verification
from kserve_pvc.errors import (
    DamagedRecordError,
    DigestMismatchError,
    InsufficientSpaceError,
    InvalidURIError,
    LockerMismatchError,
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

__all__ = [
    "Backend",
    "DamagedRecordError",
    "DigestMismatchError",
    "FileEntry",
    "InsufficientSpaceError",
    "InvalidURIError",
    "LockInfo",
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
    "mode_from_annotations",
    "resolved",
]
__version__ = "0.1.0"
