"""
What can go wrong, sorted by what the caller can do about it.

Every deliberate error is a `StoreError` and also the builtin a Python caller would expect. Fields carry the
facts, the message says what happened and then what to do next, and every error pickles, because errors cross
process boundaries. `exit_code` is what the command line returns for it.
"""

from __future__ import annotations

from typing import ClassVar

import attrs


def printable(text: object) -> str:
    """
    Show untrusted text on one line, with control, bidirectional and other unprintable characters escaped.
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii") for c in str(text)
    )


class StoreError(Exception):
    """
    The base of every error this package raises on purpose.
    """

    exit_code: ClassVar[int] = 1

    def _message(self) -> str:
        return super().__str__()

    def __str__(self) -> str:
        # Fields may hold what a remote or another tenant said: escaped here, once, for all of them.
        return printable(self._message())

    def __repr__(self) -> str:
        # As attrs would write it. Once for all of them, since every start of a process pays for what attrs generates.
        facts = ", ".join(f"{name}={value!r}" for name, value in self.fields.items())
        return f"{type(self).__name__}({facts})" if facts else super().__repr__()

    @property
    def fields(self) -> dict[str, object]:
        """
        The facts of this error by name, for logs and `--json`.
        """
        return {field.name: getattr(self, field.name) for field in getattr(type(self), "__attrs_attrs__", ())}


@attrs.define(slots=False, str=False, repr=False, eq=False)
class InvalidURIError(StoreError, ValueError):
    """
    The source URI, its revision or its patterns cannot be understood.
    """

    exit_code: ClassVar[int] = 2
    uri: str
    reason: str

    def _message(self) -> str:
        return f"`{self.uri}` is not a usable source URI: {self.reason}"


@attrs.define(slots=False, str=False, repr=False, eq=False)
class UnknownSchemeError(StoreError, ValueError):
    """
    No installed back end serves the scheme of a URI.
    """

    exit_code: ClassVar[int] = 2
    scheme: str
    remedy: str

    def _message(self) -> str:
        return f"no usable back end for `{self.scheme}://`; {self.remedy}"


@attrs.define(slots=False, str=False, repr=False, eq=False)
class SettingsError(StoreError, ValueError):
    """
    An argument or environment variable has a value that means nothing.
    """

    exit_code: ClassVar[int] = 2
    name: str
    value: str
    remedy: str

    def _message(self) -> str:
        return f"`{self.name}` is `{self.value}`; {self.remedy}"


@attrs.define(slots=False, str=False, repr=False, eq=False)
class LockerMismatchError(StoreError, ValueError):
    """
    This process and the store disagree about how writers exclude each other.

    All contenders must use the same locker, so the store's own settings win and nobody may override them.
    """

    exit_code: ClassVar[int] = 2
    root: str
    setting: str
    stored: str
    wanted: str

    def _message(self) -> str:
        return (
            f"the store at `{self.root}` was created with {self.setting} `{self.stored}`, not `{self.wanted}`; "
            f"drop the argument (and KSERVE_PVC_{self.setting.upper()}) to use the store's own setting"
        )


@attrs.define(slots=False, str=False, repr=False, eq=False)
class LockServiceError(StoreError, ConnectionError):
    """
    The service that keeps the locks refuses this process, and will go on to.

    A service that only does not answer is no error: the claims on the volume decide then.
    """

    exit_code: ClassVar[int] = 1
    service: str
    reason: str
    remedy: str

    def _message(self) -> str:
        return f"the locker `{self.service}` refused: {self.reason}; {self.remedy}"


@attrs.define(slots=False, str=False, repr=False, eq=False)
class StoreRootError(StoreError, NotADirectoryError):
    """
    The path given as a store cannot be one.
    """

    root: str
    reason: str

    def _message(self) -> str:
        return f"`{self.root}` cannot be a store: {self.reason}"


@attrs.define(slots=False, str=False, repr=False, eq=False)
class StoreFormatError(StoreError, ValueError):
    """
    A file of the store does not say what this version can trust.

    It was damaged, forged, or written by a newer version. Nothing was changed or deleted.
    """

    path: str
    reason: str

    def _message(self) -> str:
        return f"`{self.path}` cannot be trusted: {self.reason}"


@attrs.define(slots=False, str=False, repr=False, eq=False)
class ModelNotFoundError(StoreError, FileNotFoundError):
    """
    The model is not in the store, and this call may not fetch it.
    """

    exit_code: ClassVar[int] = 3
    ref: str
    root: str

    def _message(self) -> str:
        return f"`{self.ref}` is not in the store at `{self.root}`; `ensure` it from a read-write store, or `import` a bundle of it"


@attrs.define(slots=False, str=False, repr=False, eq=False)
class DamagedRecordError(ModelNotFoundError, StoreFormatError):
    """
    The newest record of a model is damaged, so the model counts as absent until it is fetched again.
    """

    exit_code: ClassVar[int] = 3
    ref: str
    root: str
    path: str
    reason: str

    def _message(self) -> str:
        return (
            f"the newest record of `{self.ref}`, `{self.path}`, cannot be trusted: {self.reason}; "
            "`ensure` it from a read-write store to write the next one"
        )


@attrs.define(slots=False, str=False, repr=False, eq=False)
class ModelInUseError(StoreError, BlockingIOError):
    """
    The model has live readers, so it was kept.
    """

    ref: str
    readers: tuple[str, ...]

    def _message(self) -> str:
        return f"`{self.ref}` is in use by {', '.join(self.readers)}; try again once they have closed it"


@attrs.define(slots=False, str=False, repr=False, eq=False)
class ReadOnlyStoreError(StoreError, PermissionError):
    """
    The call would have to write, and the store or its volume may only be read.
    """

    exit_code: ClassVar[int] = 4
    root: str
    wish: str
    remedy: str

    def _message(self) -> str:
        return f"cannot {self.wish}: the store at `{self.root}` is read-only here; {self.remedy}"


@attrs.define(slots=False, str=False, repr=False, eq=False)
class LockTimeoutError(StoreError, TimeoutError):
    """
    Another downloader was still at work when the time to wait for it was over.

    `waited` and `idle` are seconds; `idle` is how long the holder has shown no sign of life.
    """

    exit_code: ClassVar[int] = 5
    ref: str
    holder: str
    waited: float
    idle: float
    bytes_done: int
    bytes_total: int

    def _message(self) -> str:
        return (
            f"waited {self.waited:.0f} s for {self.holder} to download `{self.ref}` "
            f"({self.bytes_done} of {self.bytes_total} bytes, last sign of life {self.idle:.0f} s ago); "
            "wait longer with `timeout=`, or look at `kserve-pvc locks`"
        )


@attrs.define(slots=False, str=False, repr=False, eq=False)
class InsufficientSpaceError(StoreError, OSError):
    """
    The volume has no room for the model. Sizes are in bytes; `needed_bytes` is 0 if a quota or the volume stopped a
    write.
    """

    exit_code: ClassVar[int] = 6
    root: str
    needed_bytes: int
    free_bytes: int

    def _message(self) -> str:
        need = f"{self.needed_bytes} are needed" if self.needed_bytes else "the last write did not fit"
        return (
            f"the volume of `{self.root}` has {self.free_bytes} bytes free and {need}; "
            "remove a model with `kserve-pvc rm`, or enlarge the volume"
        )


@attrs.define(slots=False, str=False, repr=False, eq=False)
class VolumeError(StoreError, OSError):
    """
    The volume failed an operation; what was being written was given up and nothing was published.
    """

    path: str
    operation: str
    reason: str

    def _message(self) -> str:
        return f"{self.operation} failed on `{self.path}`: {self.reason}; see the volume's own logs, then call again"


@attrs.define(slots=False, str=False, repr=False, eq=False)
class SourceNotFoundError(StoreError, FileNotFoundError):
    """
    The source answered that there is nothing under this URI.
    """

    exit_code: ClassVar[int] = 7
    uri: str
    reason: str

    def _message(self) -> str:
        return f"nothing to fetch at `{self.uri}`: {self.reason}; check bucket, path, revision and patterns"


@attrs.define(slots=False, str=False, repr=False, eq=False)
class SourceDeniedError(StoreError, PermissionError):
    """
    The source refused the credentials, or their absence.
    """

    exit_code: ClassVar[int] = 7
    uri: str
    reason: str

    def _message(self) -> str:
        return f"access to `{self.uri}` was denied: {self.reason}; check the credentials and their permissions"


@attrs.define(slots=False, str=False, repr=False, eq=False)
class SourceUnavailableError(StoreError, ConnectionError):
    """
    The source could not be reached or did not answer properly. The only error that is retried.

    `retry_after` is how many seconds a busy source asks to be left alone for, or None if it is not busy; `is_final`
    means that asking again would not help.
    """

    exit_code: ClassVar[int] = 7
    uri: str
    reason: str
    retry_after: float | None = None
    is_final: bool = False

    def _message(self) -> str:
        return f"`{self.uri}` is not answering: {self.reason}; check endpoint and network, then call again"


@attrs.define(slots=False, str=False, repr=False, eq=False)
class SourceChangedError(StoreError, RuntimeError):
    """
    The source changed while it was being read, so no byte of the attempt was published.
    """

    exit_code: ClassVar[int] = 7
    uri: str
    path: str

    def _message(self) -> str:
        return f"`{self.path}` of `{self.uri}` changed while it was being read; call again once the upload is over"


@attrs.define(slots=False, str=False, repr=False, eq=False)
class DigestMismatchError(StoreError, ValueError):
    """
    The bytes that arrived do not have the digest or length the source announced.
    """

    exit_code: ClassVar[int] = 7
    path: str
    expected: str
    actual: str

    def _message(self) -> str:
        return f"`{self.path}` should be `{self.expected}` but is `{self.actual}`; nothing was published, call again"


@attrs.define(slots=False, str=False, repr=False, eq=False)
class UnsafePathError(StoreError, ValueError):
    """
    A name from a remote or from the volume would leave its place, or cannot be stored faithfully.
    """

    exit_code: ClassVar[int] = 8
    name: str
    rule: str

    def _message(self) -> str:
        return f"`{self.name}` is refused: {self.rule}; nothing was written"


@attrs.define(slots=False, str=False, repr=False, eq=False)
class PolicyError(StoreError, PermissionError):
    """
    The request is understood and refused on principle.
    """

    exit_code: ClassVar[int] = 8
    subject: str
    rule: str

    def _message(self) -> str:
        return f"`{self.subject}` is refused: {self.rule}"
