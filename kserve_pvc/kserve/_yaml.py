"""
Reading and writing YAML as Kubernetes does.

PyYAML follows YAML 1.1 to the letter: `80:80` is a base-60 number and `2026-11-22` a date, `1e3` is a string, and the
last one of duplicate keys wins. Kubernetes reads the first two as strings and the third as a number, and refuses
duplicate keys. So does this module, and Kubernetes reads back from its output what was read here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import Any

from kserve_pvc.errors import InvalidFileError, MissingDependencyError

_MAX_BYTES = 16 * 1024 * 1024
# With each alias written out.
MAX_VALUES = 1_000_000
_MAX_DIGITS = 128
_INTEGER = re.compile(r"[-+]?(?:0b[01_]+|0o[0-7_]+|0[0-7_]+|0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)")
_NUMBER = re.compile(
    r"[-+]?(?:(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)"
)
# Line breaks in YAML 1.1 that are not in 1.2, so they must be escaped.
_BREAKS = re.compile("[\x85\u2028\u2029\ufeff]")
_TAG = "tag:yaml.org,2002:"


def read_documents(text: str | bytes, name: str) -> list[Any]:
    """
    Read every document that is not empty.

    Args:
        name: The file name, for messages.

    Raises:
        SettingsError: It is not valid YAML, or PyYAML is not installed.
    """
    yaml = _yaml()
    if len(text) > _MAX_BYTES:
        raise InvalidFileError(name, "too large", f"{len(text)} bytes of at most {_MAX_BYTES}")
    try:
        documents = [document for document in yaml.load_all(text, Loader=_loader()) if document is not None]
        _count_values(documents, {})
        return documents
    except yaml.YAMLError as error:
        raise InvalidFileError(name, "invalid YAML", _problem(error)) from None
    except _CrowdedError as error:
        raise InvalidFileError(name, "invalid YAML", str(error)) from None
    except (RecursionError, ValueError) as error:
        raise InvalidFileError(name, "invalid YAML", type(error).__name__) from None


class _CrowdedError(Exception):
    """
    Aliases make a document larger than any manifest, or infinite.
    """


def _count_values(value: Any, known: dict[int, int | None]) -> int:
    """
    Count the values of a document as if each alias were written out.

    Args:
        known: The values of collections that were counted, by their identity; None while they are.
    """
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = None
        inside = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count_values(one, known) for one in inside)
    total = known[id(value)]
    if total is None:
        raise _CrowdedError("an alias stands inside of what it stands for")
    if total > MAX_VALUES:
        raise _CrowdedError(f"it has more than {MAX_VALUES} values, with its aliases written out")
    return total


def write_documents(documents: Iterable[Any]) -> str:
    """
    Write documents in their order, with keys in theirs and without comments.
    """
    documents = list(documents)
    is_stream = len(documents) > 1
    options = {
        "sort_keys": False,
        "allow_unicode": True,
        "width": 1000,
        "explicit_start": is_stream,
        "default_flow_style": False,
    }
    return str(_yaml().dump_all(documents, Dumper=_dumper(), **options))


def _yaml() -> Any:
    try:
        import yaml
    except ImportError:
        raise MissingDependencyError("reading YAML", "PyYAML", "pip install 'kserve-pvc[kserve]'") from None
    return yaml


@cache
def _loader() -> Any:
    yaml = _yaml()

    class Loader(yaml.SafeLoader):  # type: ignore[misc, name-defined]
        """
        PyYAML's safe loader, with the numbers of Kubernetes, and without dates and duplicate keys.
        """

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key, _ in node.value:
                name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
                if name in seen and key.tag != f"{_TAG}merge":
                    raise yaml.constructor.ConstructorError(None, None, f"duplicate key `{key.value}`", key.start_mark)
                seen.add(name or id(key))
            return super().construct_mapping(node, deep)

        def flatten_mapping(self, node: Any) -> Any:
            _count_merged(self, node)
            return super().flatten_mapping(node)

    _resolve_numbers(Loader, yaml.SafeLoader.yaml_implicit_resolvers)
    return Loader


def _resolve_numbers(loader: Any, inherited: Any) -> None:
    replaced = {f"{_TAG}{kind}" for kind in ("timestamp", "int", "float")}
    loader.yaml_implicit_resolvers = {
        first: [one for one in found if one[0] not in replaced] for first, found in inherited.items()
    }
    # In this order, since an integer also matches as a number.
    loader.add_implicit_resolver(f"{_TAG}int", re.compile(f"^(?:{_INTEGER.pattern})$"), list("-+0123456789"))
    loader.add_implicit_resolver(f"{_TAG}float", re.compile(f"^(?:{_NUMBER.pattern})$"), list("-+0123456789."))
    loader.add_constructor(f"{_TAG}int", lambda own, node: _integer(own.construct_scalar(node)))


def _count_merged(loader: Any, node: Any) -> None:
    """Count what the merges of a mapping copy, since it may be merged itself."""
    yaml = _yaml()
    for key, value in node.value:
        if key.tag != f"{_TAG}merge":
            continue
        for one in value.value if isinstance(value, yaml.SequenceNode) else [value]:
            if isinstance(one, yaml.MappingNode):
                loader.flatten_mapping(one)
                loader.merged = getattr(loader, "merged", 0) + len(one.value)
                if loader.merged > MAX_VALUES:
                    raise _CrowdedError(f"it merges more than {MAX_VALUES} values")


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError("a number of too many digits")  # Python reads it if it is hexadecimal, and cannot print it.
    digits = text.replace("_", "")
    is_octal = re.fullmatch(r"[-+]?0[0-7]+", digits) is not None
    return int(digits, 8 if is_octal else 0)


@cache
def _dumper() -> Any:
    yaml = _yaml()

    class Dumper(yaml.SafeDumper):  # type: ignore[misc, name-defined]
        """
        PyYAML's safe dumper, which quotes every string that some YAML reader would take for a number or a boolean.
        """

    def represent(dumper: Any, value: str) -> Any:
        if _BREAKS.search(value):
            return dumper.represent_scalar(f"{_TAG}str", value, style='"')
        is_ambiguous = _INTEGER.fullmatch(value) or _NUMBER.fullmatch(value) or value in ("y", "Y", "n", "N")
        return dumper.represent_scalar(f"{_TAG}str", value, style="'" if is_ambiguous else None)

    Dumper.add_representer(str, represent)
    return Dumper


def _problem(error: Any) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}: " if mark is not None else ""
    return f"{where}{getattr(error, 'problem', None) or type(error).__name__}"
