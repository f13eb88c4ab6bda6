"""
YAML as Kubernetes reads it, in and out.

PyYAML follows YAML 1.1 to the letter: `80:80` is a number to base 60 and `2026-11-22` a date, `1e3` is a text, and of a
key that is there twice the last one counts. Kubernetes reads the first two as texts and the third as a number, and
refuses the last. So does this, and what is written means to Kubernetes what was read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import Any

from kserve_pvc.errors import InvalidFileError, MissingDependencyError

_MAX_BYTES = 64 * 1024 * 1024
_INTEGER = re.compile(r"[-+]?(?:0b[01_]+|0o[0-7_]+|0[0-7_]+|0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)")
_NUMBER = re.compile(
    r"[-+]?(?:(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)"
)
# What ends a line in YAML 1.1 and not in 1.2, so that it must be escaped to stay what it is.
_BREAKS = re.compile("[\x85\u2028\u2029\ufeff]")
_TAG = "tag:yaml.org,2002:"


def read_documents(text: str | bytes, name: str) -> list[Any]:
    """
    Read every document that holds something.

    Args:
        name: Where the text comes from, for messages.

    Raises:
        SettingsError: It is no YAML, or PyYAML is not installed.
    """
    yaml = _yaml()
    if len(text) > _MAX_BYTES:
        raise InvalidFileError(name, "too large", f"{len(text)} bytes of at most {_MAX_BYTES}")
    try:
        return [document for document in yaml.load_all(text, Loader=_loader()) if document is not None]
    except yaml.YAMLError as error:
        raise InvalidFileError(name, "invalid YAML", _problem(error)) from None
    except (RecursionError, ValueError) as error:
        raise InvalidFileError(name, "invalid YAML", type(error).__name__) from None


def write_documents(documents: Iterable[Any]) -> str:
    """
    Write documents in the order and with the names that they have, without comments.
    """
    documents = list(documents)
    several = len(documents) > 1
    options = {
        "sort_keys": False,
        "allow_unicode": True,
        "width": 1000,
        "explicit_start": several,
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
        PyYAML's safe loader, with the numbers of Kubernetes, and without dates and keys that are there twice.
        """

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key, _ in node.value:
                name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
                if name in seen and key.tag != f"{_TAG}merge":
                    raise yaml.constructor.ConstructorError(None, None, f"`{key.value}` is there twice", key.start_mark)
                seen.add(name or id(key))
            return super().construct_mapping(node, deep)

    replaced = {f"{_TAG}{kind}" for kind in ("timestamp", "int", "float")}
    inherited = yaml.SafeLoader.yaml_implicit_resolvers
    Loader.yaml_implicit_resolvers = {
        first: [one for one in found if one[0] not in replaced] for first, found in inherited.items()
    }
    # In this order, as an integer is a number too.
    Loader.add_implicit_resolver(f"{_TAG}int", re.compile(f"^(?:{_INTEGER.pattern})$"), list("-+0123456789"))
    Loader.add_implicit_resolver(f"{_TAG}float", re.compile(f"^(?:{_NUMBER.pattern})$"), list("-+0123456789."))
    Loader.add_constructor(f"{_TAG}int", lambda loader, node: _integer(loader.construct_scalar(node)))
    return Loader


def _integer(text: str) -> int:
    digits = text.replace("_", "")
    is_octal = re.fullmatch(r"[-+]?0[0-7]+", digits) is not None
    return int(digits, 8 if is_octal else 0)


@cache
def _dumper() -> Any:
    yaml = _yaml()

    class Dumper(yaml.SafeDumper):  # type: ignore[misc, name-defined]
        """
        PyYAML's safe dumper, which puts into quotes all that some reader of YAML would take for a number or a truth
        value.
        """

    def represent(dumper: Any, value: str) -> Any:
        if _BREAKS.search(value):
            return dumper.represent_scalar(f"{_TAG}str", value, style='"')
        is_doubtful = _INTEGER.fullmatch(value) or _NUMBER.fullmatch(value) or value in ("y", "Y", "n", "N")
        return dumper.represent_scalar(f"{_TAG}str", value, style="'" if is_doubtful else None)

    Dumper.add_representer(str, represent)
    return Dumper


def _problem(error: Any) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f" in line {mark.line + 1}" if mark is not None else ""
    return f"{getattr(error, 'problem', None) or type(error).__name__}{where}"
