"""
Which settings of a scheme are plain, why the others are not, and what fsspec itself would do with them.

One rule for every scheme: plain settings are served by requests of our own; anything else, fsspec's own configuration
included, goes through the fsspec class of the protocol. What is plain, each backend says in a table of rules; a setting
that no row names is plain. Nothing here reads a value into a message: only names of settings are shown.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from importlib import import_module
from typing import Any

import attrs

from kserve_pvc.errors import InvalidFileError, unknown_option

# The protocols of each fsspec class, in the order in which fsspec looks them up in its configuration: the last wins.
_PROTOCOLS = {
    "s3": ("s3", "s3a"),
    "gs": ("gs", "gcs"),
    "az": ("abfs", "az", "abfss"),
    "abfs": ("abfs", "az", "abfss"),
    "abfss": ("abfs", "az", "abfss"),
    "http": ("http", "https"),
    "https": ("http", "https"),
    "file": ("file", "local"),
}
# The modules of this package that have `RULES`, by scheme.
_TABLES = {
    "abfs": "kserve_pvc.backends.azure",
    "abfss": "kserve_pvc.backends.azure",
    "az": "kserve_pvc.backends.azure",
    "file": "kserve_pvc.backends.file",
    "gs": "kserve_pvc.backends.gs",
    "hf": "kserve_pvc.backends.hf",
    "http": "kserve_pvc.backends.http",
    "https": "kserve_pvc.backends.http",
    "s3": "kserve_pvc.backends._s3_settings",
}
# One name for each table, as people write it.
# What the libraries call the switch of certificates.
_SWITCHES = ("verify", "verify_ssl", "ssl", "ssl_verify", "connection_verify", "validate_certs")
_EXPLAINED = ("s3", "gs", "az", "hf", "http", "file")
# Arguments of every fsspec class that change how objects are cached or awaited, and never which bytes are read.
NEUTRAL_OPTIONS = frozenset(
    (
        "asynchronous",
        "batch_size",
        "listings_expiry_time",
        "loop",
        "max_paths",
        "skip_instance_cache",
        "use_listings_cache",
    )
)
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@attrs.frozen
class Reason:
    """
    One setting that is not plain, by its name, and why. Never its value.
    """

    setting: str
    words: str

    def __str__(self) -> str:
        return f"`{self.setting}` {self.words}"


@attrs.frozen
class Settings:
    """
    What is set for one scheme: options, those of fsspec's configuration among them, and the environment.

    `configured` names the options that only fsspec's configuration sets.
    """

    options: Mapping[str, Any] = attrs.field(repr=False)
    configured: Set[str]
    environ: Mapping[str, str] = attrs.field(repr=False)


class TrimmedEnvironment(Mapping[str, str]):
    """
    An environment whose values have no blanks and line breaks around them, as `echo | base64` leaves in secrets.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ

    def __getitem__(self, name: str) -> str:
        return self._environ[name].strip()

    def __iter__(self) -> Iterator[str]:
        return iter(self._environ)

    def __len__(self) -> int:
        return len(self._environ)


def trim_options(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """
    Return options without blanks and line breaks around strings, those of mappings such as `client_kwargs` among them.
    """
    return {name: _trimmed(value) for name, value in options.items()}


def _trimmed(value: Any) -> Any:
    if isinstance(value, str):
        return value.strip()
    return {name: _trimmed(inner) for name, inner in value.items()} if type(value) is dict else value


@attrs.frozen
class Rule:
    """
    One row of a table: `find` yields the names of the settings that are present and not plain.
    """

    find: Callable[[Settings], Iterable[str]]
    words: str


def read_settings(scheme: str, options: Mapping[str, Any], environ: Mapping[str, str]) -> Settings:
    """
    Put options above fsspec's configuration, as fsspec does: a whole argument replaces another one.

    Raises:
        InvalidFileError: A file of fsspec's configuration cannot be read.
    """
    configured = fsspec_configuration(scheme, environ)
    whole = trim_options({**configured, **options})
    return Settings(whole, configured.keys() - options.keys(), TrimmedEnvironment(environ))


def fsspec_configuration(protocol: str, environ: Mapping[str, str] = os.environ) -> Mapping[str, Any]:
    """
    Return the arguments that fsspec's configuration sets for the class of a protocol, now.

    Files come first (`*.json` and `*.ini` in `FSSPEC_CONFIG_DIR` or `~/.config/fsspec`), then `FSSPEC_<PROTOCOL>` with
    JSON, then `FSSPEC_<PROTOCOL>_<ARGUMENT>`. fsspec reads them when it is imported; here they are read at each call,
    so that later changes count. What a program put into `fsspec.config.conf` counts below them. fsspec is not imported
    to find that there is nothing.

    Raises:
        InvalidFileError: A file cannot be read.
    """
    found: dict[str, dict[str, Any]] = {}
    loaded = sys.modules.get("fsspec.config") if environ is os.environ else None
    for name, arguments in (loaded.conf if loaded is not None else {}).items():
        if isinstance(arguments, Mapping):
            found[name] = dict(arguments)
    _add_files(found, environ)
    _add_variables(found, environ)
    whole: dict[str, Any] = {}
    for name in _PROTOCOLS.get(protocol, (protocol,)):
        whole.update(found.get(name, {}))
    return whole


def _add_files(found: dict[str, dict[str, Any]], environ: Mapping[str, str]) -> None:
    home = environ.get("HOME") or os.path.expanduser("~")  # noqa: PTH111  # `Path.home` fails for a user without one.
    place = environ.get("FSSPEC_CONFIG_DIR", os.path.join(home, ".config/fsspec"))
    try:
        if not any(name.endswith((".json", ".ini")) for name in os.listdir(place)):
            return
    except OSError:
        return
    try:
        from fsspec.config import set_conf_files

        set_conf_files(place, found)
    except Exception as error:  # fsspec has no error of its own for a file that is malformed or unreadable.
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise InvalidFileError(place, "fsspec cannot read its configuration here", reason) from None


def _add_variables(found: dict[str, dict[str, Any]], environ: Mapping[str, str]) -> None:
    # Others, such as FSSPEC_CONFIG_DIR, name arguments of protocols that do not exist.
    variables = {
        name: value for name, value in environ.items() if name.startswith("FSSPEC_") and name[7:8] not in ("", "_")
    }
    if variables:
        import warnings

        from fsspec.config import set_conf_env

        with warnings.catch_warnings(action="ignore"):
            set_conf_env(found, variables)


def find_reasons(rules: Sequence[Rule], settings: Settings) -> tuple[Reason, ...]:
    """
    Name every setting that is not plain; an empty tuple means that requests of our own serve all of them.
    """
    return tuple(Reason(name, rule.words) for rule in rules for name in rule.find(settings))


def explain(scheme: str, options: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> Sequence[Reason]:
    """
    Say why a scheme goes through its fsspec class; an empty sequence if it does not, or has no class.

    Args:
        scheme: Of a URI, such as `s3`.
        options: The `storage_options` of that scheme.

    Raises:
        InvalidFileError: A file of fsspec's configuration cannot be read.
    """
    if scheme not in _TABLES:
        return ()
    rules: Sequence[Rule] = import_module(_TABLES[scheme]).RULES
    return find_reasons(rules, read_settings(scheme, options, environ))


def explain_all(
    options: Callable[[str], Mapping[str, Any]] = lambda scheme: {}, environ: Mapping[str, str] = os.environ
) -> Mapping[str, Sequence[str]]:
    """
    Say for each scheme why it goes through its fsspec class, where it does.

    Args:
        options: Gives the `storage_options` of a scheme.

    Returns:
        Schemes with their reasons. A configuration that cannot be read is the reason itself.
    """
    found: dict[str, Sequence[str]] = {}
    for scheme in _EXPLAINED:
        try:
            reasons = tuple(map(str, explain(scheme, options(scheme), environ)))
        except InvalidFileError as error:
            reasons = (str(error),)
        if reasons:
            found[scheme] = reasons
    return found


def log_access(scheme: str, access: str, reasons: Sequence[Reason]) -> None:
    """
    Log which way a scheme takes, and why, at level `DEBUG`.

    Nothing can be configured to receive a record before `logging` is imported, so it is not imported here.
    """
    logging = sys.modules.get("logging")
    if logging is None:
        return
    why = [*map(str, reasons)]
    logging.getLogger("kserve_pvc").debug(
        "%s:// is read by %s: %s",
        scheme,
        access,
        "; ".join(why) or "all settings are plain",
        extra={"access": access, "reasons": why},
    )


def checks_certificates(options: object, depth: int = 4) -> bool:
    """
    Whether no option, at any depth, switches off that certificates are checked.
    """
    if not isinstance(options, Mapping) or not depth:
        return True
    if any(options.get(name) is False for name in _SWITCHES):
        return False
    return all(checks_certificates(inner, depth - 1) for inner in options.values())


def warn_unverified(scheme: str) -> None:
    """
    Say once for each backend that anyone on the way can change what is read.
    """
    import logging

    logging.getLogger("kserve_pvc").warning(
        "%s: the certificates of the source are not checked; name a CA bundle instead", scheme
    )


def check_options(
    protocol: str,
    options: Mapping[str, Any],
    known: Collection[str],
    load: Callable[[], Sequence[Callable[..., Any]]],
) -> None:
    """
    Refuse options that neither we nor the fsspec class know.

    Args:
        options: With those of fsspec's configuration.
        known: Options that need no look at the class, our own among them.
        load: Imports the class, only if an option is not known, and returns it, together with whatever it passes its
            `**kwargs` on to. Their named parameters are allowed, and those of base classes as far as `**kwargs` lead.

    Raises:
        UnknownOptionError: An option is unknown. The error names the nearest supported one.
    """
    unknown = set(options) - set(known) - NEUTRAL_OPTIONS
    if not unknown:
        return
    try:
        accepted = {name for target in load() for name in _parameters(target)}
    except ImportError:
        accepted = set()
    for name in sorted(unknown - accepted):
        supported = sorted({*known, *accepted, *NEUTRAL_OPTIONS})
        hint = f"`{protocol}` has no such option; remove it, or pass options by scheme, as `{{'s3': {{…}}}}`"
        raise unknown_option("storage option", name, supported, hint)


def _parameters(target: Callable[..., Any]) -> Iterator[str]:
    """The named parameters of a callable; of a class, those of its bases too, as far as `**kwargs` lead."""
    makers = [vars(base).get("__init__") for base in target.__mro__] if isinstance(target, type) else [target]
    for maker in filter(None, makers):
        parameters = [*inspect.signature(maker).parameters.values()]
        yield from (p.name for p in parameters if p.kind in _NAMED and p.name != "self")
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
            return


def options_beyond(plain: Collection[str], *path: str) -> Callable[[Settings], Iterator[str]]:
    """
    Find options that are not among the plain ones; with a path, those inside an option that is a mapping.
    """

    def find(settings: Settings) -> Iterator[str]:
        place: Any = settings.options
        for name in path:
            place = place.get(name) if isinstance(place, Mapping) else None
        if not isinstance(place, Mapping):
            yield from () if place is None else (".".join(path),)
            return
        beyond = set(place) - set(plain) - (set() if path else NEUTRAL_OPTIONS)
        yield from (".".join((*path, str(name))) for name in sorted(beyond, key=str))

    return find


def configured_options(settings: Settings) -> Iterator[str]:
    """
    Find options that only fsspec's configuration sets.
    """
    yield from sorted(settings.configured - NEUTRAL_OPTIONS)


def variables(*names: str) -> Callable[[Settings], Iterator[str]]:
    """
    Find variables of the environment that are set and not empty.
    """

    def find(settings: Settings) -> Iterator[str]:
        yield from (name for name in names if settings.environ.get(name))

    return find
