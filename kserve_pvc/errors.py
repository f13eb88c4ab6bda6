"""
What can go wrong, sorted by what the caller can do about it.

Every deliberate error is a `StoreError` and also the builtin that a Python caller expects. Fields carry the facts, the
message says what happened and then what to do, and every error pickles, because errors cross process boundaries.
Longer than other modules: one place says what all of them mean.
`exit_code` is what the command line returns for it. `docs/reference/errors.md` shows an example of every message.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import attrs


def printable(text: object) -> str:
    """
    Show an untrusted string on one line, with control, bidirectional and other unprintable characters escaped.
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii") for c in str(text)
    )


class StoreError(RuntimeError):
    """
    The base of every error this package raises on purpose. A `RuntimeError`, since that is what programs written for
    KServe's storage library catch.
    """

    exit_code: ClassVar[int] = 1

    def _message(self) -> str:
        return super().__str__()

    def __str__(self) -> str:
        # Fields may hold what a remote or another tenant wrote: escaped here, once, for all of them.
        return printable(self._message())

    def __repr__(self) -> str:
        # As attrs would write it. One method for all, since every start of a process pays for what attrs generates.
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
    The source URI, its revision or its patterns are malformed.
    """

    exit_code: ClassVar[int] = 2
    uri: str
    reason: str

    def _message(self) -> str:
        return f"invalid source URI `{self.uri}`: {self.reason}"


@attrs.define(slots=False, str=False, repr=False, eq=False)
class UnknownSchemeError(StoreError, ValueError):
    """
    No installed backend serves the scheme of a URI.
    """

    exit_code: ClassVar[int] = 2
    scheme: str
    hint: str

    def _message(self) -> str:
        return f"no backend for `{self.scheme}://`; {self.hint}"


# Stands for a value that may hold a secret, so that an error does not repeat it.
HIDDEN = "not shown"


@attrs.define(slots=False, str=False, repr=False, eq=False)
class SettingsError(StoreError, ValueError):
    """
    An argument, a storage option, an environment variable or a field of a document has an invalid value.

    `value` is empty if it is missing, and `HIDDEN` if it may hold a secret.
    """

    exit_code: ClassVar[int] = 2
    name: str
    value: str
    hint: str

    def _message(self) -> str:
        if not self.value:
            return f"`{self.name}` is missing; {self.hint}"
        shown = "" if self.value == HIDDEN else f" `{self.value}`"
        return f"invalid value{shown} for `{self.name}`; {self.hint}"


@attrs.define(slots=False, str=False, repr=False, eq=False)
class UnknownOptionError(SettingsError):
    """
    A storage option, or a field of a document, has a name that does not exist.

    `name` is what was given and `value` the kind of thing that it should name, such as `storage option`.
    """

    supported: tuple[str, ...] = ()

    def _message(self) -> str:
        message = f"unknown {self.value} `{self.name}`; {self.hint}"
        if not self.supported:
            return message
        names = ", ".join(f"`{name}`" for name in self.supported)
        return f"{message}{'' if message.endswith('?') else ';'} supported: {names}"


def unknown_option(kind: str, name: str, supported: Iterable[str], hint: str = "") -> UnknownOptionError:
    """
    Describe a name that does not exist, with the one that was probably meant.

    Args:
        kind: What it should name, such as `storage option`.
        hint: What to do if no supported name resembles it.
    """
    from difflib import get_close_matches

    names = tuple(supported)
    near = get_close_matches(name.rpartition(".")[2], names, n=1)
    return UnknownOptionError(name, kind, f"did you mean `{near[0]}`?" if near else hint or "remove it", names)


@attrs.define(slots=False, str=False, repr=False, eq=False)
class InvalidFileError(SettingsError):
    """
    A file that the caller named cannot be read or parsed. `value` is the problem, `hint` its details.
    """

    def _message(self) -> str:
        return f"`{self.name}`: {self.value}: {self.hint}"


@attrs.define(slots=False, str=False, repr=False, eq=False)
class MissingDependencyError(SettingsError, ImportError):  # type: ignore[misc]  # `name` is never None here.
    """
    An optional package is not installed.

    `name` is what needs it, `value` the package, and `hint` the command that installs it.
    """

    def _message(self) -> str:
        return f"{self.name} needs {self.value}: `{self.hint}`"


@attrs.define(slots=False, str=False, repr=False, eq=False)
class LockerMismatchError(StoreError, ValueError):
    """
    This process and the store disagree about how writers exclude each other.

    All contenders must use the same locker, so the settings in the store win and no process may override them.
    """

    exit_code: ClassVar[int] = 2
    root: str
    setting: str
    stored: str
    requested: str

    def _message(self) -> str:
        return (
            f"the store at `{self.root}` was created with {self.setting} `{self.stored}`, not `{self.requested}`; "
            f"omit the argument (and KSERVE_PVC_{self.setting.upper()}) to use the setting in the store"
        )


@attrs.define(slots=False, str=False, repr=False, eq=False)
class LockServiceError(StoreError, ConnectionError):
    """
    The lock service refuses this process, and will keep refusing.

    A lock service that merely fails to respond is not an error; the claims on the volume decide instead.
    """

    exit_code: ClassVar[int] = 1
    service: str
    reason: str
    hint: str

    def _message(self) -> str:
        return f"lock service `{self.service}` refused this process: {self.reason}; {self.hint}"


@attrs.define(slots=False, str=False, repr=False, eq=False)
class StoreRootError(StoreError, NotADirectoryError):
    """
    The path of a store is not a directory, or lies on a volume that cannot hold a store.
    """

    root: str
    reason: str

    def _message(self) -> str:
        return f"cannot use `{self.root}` as a store: {self.reason}"


@attrs.define(slots=False, str=False, repr=False, eq=False)
class StoreFormatError(StoreError, ValueError):
    """
    A file of the store does not hold what this version can trust.

    It was damaged, forged, or written by a newer version. Nothing was changed or deleted.
    """

    path: str
    reason: str

    def _message(self) -> str:
        return f"cannot trust `{self.path}`: {self.reason}"


@attrs.define(slots=False, str=False, repr=False, eq=False)
class ModelNotFoundError(StoreError, FileNotFoundError):
    """
    The model is not in the store, and this call may not download it.
    """

    exit_code: ClassVar[int] = 3
    ref: str
    root: str

    def _message(self) -> str:
        return (
            f"`{self.ref}` is not in the store at `{self.root}`; "
            "`ensure` it from a read-write store, or `import` a bundle of it"
        )


@attrs.define(slots=False, str=False, repr=False, eq=False)
class NoStoreError(ModelNotFoundError):
    """
    There is no store at the root, as where a volume is not mounted. `ref` is empty if no model was named.
    """

    def _message(self) -> str:
        what = f"no store at `{self.root}`, so no `{self.ref}`" if self.ref else f"no store at `{self.root}`"
        how = "`kserve-pvc init`, `ensure` a model, or `import` a bundle"
        return f"{what}; mount the volume there, or make one: {how}"


@attrs.define(slots=False, str=False, repr=False, eq=False)
class OfflineError(ModelNotFoundError):
    """
    The model is not in the store, and no source may be requested. `reason` says by which setting.
    """

    ref: str
    root: str
    reason: str

    def _message(self) -> str:
        return (
            f"`{self.ref}` is not in the store at `{self.root}`, and not downloaded, because {self.reason}; "
            "unset that, or `import` a bundle of the model"
        )


@attrs.define(slots=False, str=False, repr=False, eq=False)
class DamagedRecordError(ModelNotFoundError, StoreFormatError):
    """
    The newest record of a model is damaged, so the model counts as absent until it is downloaded again.
    """

    exit_code: ClassVar[int] = 3
    ref: str
    root: str
    path: str
    reason: str

    def _message(self) -> str:
        return (
            f"the newest record of `{self.ref}`, `{self.path}`, cannot be trusted: {self.reason}; "
            "`ensure` it from a read-write store to write the next record"
        )


@attrs.define(slots=False, str=False, repr=False, eq=False)
class ModelInUseError(StoreError, BlockingIOError):
    """
    The model is being read or downloaded, so it was kept.
    """

    ref: str
    readers: tuple[str, ...]

    def _message(self) -> str:
        return f"`{self.ref}` is in use by {', '.join(self.readers)}; retry once they have closed it"


@attrs.define(slots=False, str=False, repr=False, eq=False)
class ReadOnlyStoreError(StoreError, PermissionError):
    """
    The call would have to write, but the store or its volume is read-only.
    """

    exit_code: ClassVar[int] = 4
    root: str
    operation: str
    hint: str

    def _message(self) -> str:
        return f"cannot {self.operation}: the store at `{self.root}` is read-only here; {self.hint}"


@attrs.define(slots=False, str=False, repr=False, eq=False)
class LockTimeoutError(StoreError, TimeoutError):
    """
    Another process was still downloading the model when the timeout expired.

    `waited` and `idle` are seconds; `idle` is the age of the holder's last heartbeat.
    """

    exit_code: ClassVar[int] = 5
    ref: str
    holder: str
    waited: float
    idle: float
    bytes_done: int
    bytes_total: int

    def _message(self) -> str:
        from kserve_pvc._units import progress_of

        return (
            f"waited {self.waited:.0f} s for {self.holder} to download `{self.ref}` "
            f"({progress_of(self.bytes_done, self.bytes_total)}, last heartbeat {self.idle:.0f} s ago); "
            "raise `timeout`, or see `kserve-pvc locks`"
        )


@attrs.define(slots=False, str=False, repr=False, eq=False)
class DownloadCancelledError(StoreError, InterruptedError):
    """
    The caller cancelled a call that was downloading or waiting for another downloader.

    It is an `InterruptedError` because the call was interrupted from outside and may simply be repeated. It is not a
    `CancelledError` of `asyncio` or `concurrent.futures`: these mean the cancellation of a task or a future.

    `kept_bytes` of the `size_bytes` of the model need not be fetched by the next call; both are 0 if the call was not
    downloading yet.
    """

    exit_code: ClassVar[int] = 1
    ref: str
    kept_bytes: int = 0
    size_bytes: int = 0

    def _message(self) -> str:
        kept = f"{self.kept_bytes} of {self.size_bytes} bytes are kept, " if self.size_bytes else ""
        return f"the call for `{self.ref}` was cancelled; {kept}call again to continue"


@attrs.define(slots=False, str=False, repr=False, eq=False)
class InsufficientSpaceError(StoreError, OSError):
    """
    The volume has no room for the model. Sizes are in bytes; `needed_bytes` is 0 if a quota or the volume stopped a
    write. `is_quota` means that it was a quota, which `free_bytes` says nothing about.
    """

    exit_code: ClassVar[int] = 6
    root: str
    needed_bytes: int
    free_bytes: int
    is_quota: bool = False
    hint: str = ""

    def _message(self) -> str:
        from kserve_pvc._units import tell_apart

        more = "have the quota of this user, group or project raised" if self.is_quota else "enlarge the volume"
        hint = self.hint or f"remove a model with `kserve-pvc rm`, or {more}"
        free, needed = tell_apart(self.free_bytes, self.needed_bytes)
        if self.is_quota:
            return f"a quota is used up on the volume of `{self.root}`, which has {free} free; {hint}"
        need = f"{needed} are needed" if self.needed_bytes else "the last write did not fit"
        return f"the volume of `{self.root}` has {free} free and {need}; {hint}"


@attrs.define(slots=False, str=False, repr=False, eq=False)
class VolumeError(StoreError, OSError):
    """
    An operation on the volume failed; what was being written was discarded and nothing was published.
    """

    path: str
    operation: str
    reason: str
    hint: str = "check the logs of the volume, then retry"

    def _message(self) -> str:
        return f"{self.operation} failed on `{self.path}`: {self.reason}; {self.hint}"


@attrs.define(slots=False, str=False, repr=False, eq=False)
class SourceNotFoundError(StoreError, FileNotFoundError):
    """
    The source has nothing under this URI. `hint` is the backend's advice; empty means a general one.
    """

    exit_code: ClassVar[int] = 7
    uri: str
    reason: str
    hint: str = ""

    def _message(self) -> str:
        hint = self.hint or "check the URI, the revision and the patterns"
        return f"nothing found at `{self.uri}`: {self.reason}; {hint}"


@attrs.define(slots=False, str=False, repr=False, eq=False)
class SourceDeniedError(StoreError, PermissionError):
    """
    The source refused the credentials, or their absence. `hint` is the backend's advice; empty means a general one.
    """

    exit_code: ClassVar[int] = 7
    uri: str
    reason: str
    hint: str = ""

    def _message(self) -> str:
        hint = self.hint or "check the credentials and their permissions"
        return f"access to `{self.uri}` was denied: {self.reason}; {hint}"


@attrs.define(slots=False, str=False, repr=False, eq=False)
class SourceUnavailableError(StoreError, ConnectionError):
    """
    The source could not be reached, or did not respond properly. The only error that is retried.

    `retry_after` is the pause in seconds that a busy source requested, or None if it is not busy; `is_final` means that
    a retry would not help; `hint` is the backend's advice, and empty means a general one.
    """

    exit_code: ClassVar[int] = 7
    uri: str
    reason: str
    retry_after: float | None = None
    is_final: bool = False
    hint: str = ""

    def _message(self) -> str:
        pause = f", retry after {self.retry_after:g} s" if self.retry_after else ""
        general = "check the endpoint and the network" + ("" if self.is_final else ", then retry")
        return f"request to `{self.uri}` failed: {self.reason}{pause}; {self.hint or general}"


@attrs.define(slots=False, str=False, repr=False, eq=False)
class SourceChangedError(StoreError, RuntimeError):
    """
    The source changed while it was being read, so no byte of the attempt was published.
    """

    exit_code: ClassVar[int] = 7
    uri: str
    path: str

    def _message(self) -> str:
        return f"`{self.path}` of `{self.uri}` changed while it was being read; retry once the upload is complete"


@attrs.define(slots=False, str=False, repr=False, eq=False)
class DigestMismatchError(StoreError, ValueError):
    """
    The bytes that arrived do not have the digest or the length that was announced.
    """

    exit_code: ClassVar[int] = 7
    path: str
    expected: str
    actual: str
    hint: str = "retry"

    def _message(self) -> str:
        found = f"expected `{self.expected}`, got `{self.actual}`"
        return f"`{self.path}` does not match: {found}; nothing was published, {self.hint}"


@attrs.define(slots=False, str=False, repr=False, eq=False)
class DamagedArchiveError(DigestMismatchError):
    """
    An archive at the source cannot be unpacked: it was cut off, or its bytes are wrong. `actual` says what is wrong.
    """

    exit_code: ClassVar[int] = 7
    path: str
    actual: str
    expected: str = "an intact archive"
    hint: str = "upload it again"

    def _message(self) -> str:
        return f"archive `{self.path}` is damaged: {self.actual}; nothing was published, {self.hint}"


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
    The request is valid, and refused by policy.
    """

    exit_code: ClassVar[int] = 8
    subject: str
    rule: str

    def _message(self) -> str:
        return f"`{self.subject}` is refused: {self.rule}"
