"""
The policy of a cluster's operator: which pods may use which claims, and how.

The annotations of a pod are requests. What a pod may do depends on its namespace, and on its service account, of which
anyone who may create pods can name any of the namespace: between users, only namespaces separate. A claim that a rule
of a namespace names is *governed* there: only pods with a rule may mount it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, Literal, get_args

import attrs

from kserve_pvc._format.file_names import check_name
from kserve_pvc.errors import PolicyError, SettingsError, UnsafePathError, unknown_option

# read: no container may write. download: KServe's storage initializer may. write: every container may, if the pod's
# annotation requests it.
Access = Literal["read", "download", "write"]

ANY = "*"
MAX_RULES = 10_000

# An RFC 1123 subdomain: the form of the names of claims, service accounts and services.
_SUBDOMAIN = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*", re.ASCII)
_MAX_SUBDOMAIN = 253


@attrs.frozen(kw_only=True)
class Rule:
    """
    What the pods of some namespaces and service accounts may do with one claim.

    Args:
        namespaces: Names of namespaces, or `*` for all.
        claim: The name of the claim, in the namespace of the pod.
        service_accounts: Names of service accounts, or `*` for all.
        sub_path: The directory of the claim to which the rule applies, with all below it; empty for the whole claim.
        access: `read`, `download` or `write`.
        default: Whether pods for which KServe would add an `emptyDir` get what this rule allows without requesting it.

    Raises:
        SettingsError: A name is invalid, or the access is unknown.
        PolicyError: The directory is absolute or contains `..`.
    """

    namespaces: tuple[str, ...] = attrs.field(converter=tuple)
    claim: str
    service_accounts: tuple[str, ...] = attrs.field(default=(ANY,), converter=tuple)
    sub_path: str = ""
    access: Access = "read"
    default: bool = False

    def __attrs_post_init__(self) -> None:
        check_claim(self.claim, "claim")
        check_sub_path(self.sub_path, "sub_path")
        for name, values in (("namespaces", self.namespaces), ("service_accounts", self.service_accounts)):
            if not values:
                raise SettingsError(name, "", f"list at least one name, or `{ANY}` for all")
            for value in values:
                if value != ANY:
                    check_subdomain(value, name)
        if self.access not in get_args(Access):
            raise SettingsError("access", str(self.access), "supported: `read`, `download`, `write`")

    def applies_to(self, namespace: str, service_account: str) -> bool:
        """
        Whether the rule applies to a pod of this namespace and service account.
        """
        return _names(self.namespaces, namespace) and _names(self.service_accounts, service_account)

    def covers(self, sub_path: str) -> bool:
        """
        Whether a directory of the claim is the rule's directory or below it.
        """
        own, other = _parts(self.sub_path), _parts(sub_path)
        return ".." not in other and other[: len(own)] == own


@attrs.frozen
class Policy:
    """
    Rules, of which the first match decides. Without a rule nothing is granted, and no claim is governed.

    Raises:
        SettingsError: Two rules are the default of the same pods.
    """

    rules: tuple[Rule, ...] = ()

    def __attrs_post_init__(self) -> None:
        check_defaults(self.rules)

    def governs(self, namespace: str, claim: str) -> bool:
        """
        Whether any rule names this claim in this namespace, for any service account.
        """
        return any(rule.claim == claim and _names(rule.namespaces, namespace) for rule in self.rules)

    def rules_for(self, namespace: str, service_account: str, claim: str) -> tuple[Rule, ...]:
        """
        Return the rules of a pod for a claim, in the order of the policy.
        """
        return tuple(rule for rule in self.rules if rule.claim == claim and rule.applies_to(namespace, service_account))

    def default_for(self, namespace: str, service_account: str) -> Rule | None:
        """
        Return the rule for a pod that requests no claim, if any.
        """
        found = (rule for rule in self.rules if rule.default and rule.applies_to(namespace, service_account))
        return next(found, None)


def check_defaults(rules: Sequence[Rule]) -> None:
    """
    Check that no pod has two default rules, of which the order of the policy would choose one.

    Raises:
        SettingsError: Two rules are the default of the same pods.
    """
    # The rules seen so far, by pairs of namespace and service account, each exact, `*`, or None for "not compared".
    seen: dict[tuple[str | None, str | None], int] = {}
    for index, rule in enumerate(rules):
        pairs = list(product(_or_any(rule.namespaces), _or_any(rule.service_accounts))) if rule.default else []
        for namespace, account in pairs:
            # A `*` in this rule overlaps with every name, and a `*` in another one with this name.
            pairs_before = product(_overlapping(namespace), _overlapping(account))
            earlier = next((seen[pair] for pair in pairs_before if pair in seen), None)
            if earlier is not None:
                hint = f"`rules[{earlier}]` is the default of the same pods already; let one of the two name others"
                raise SettingsError(f"rules[{index}].default", "true", hint)
        for namespace, account in pairs:
            for pair in product((namespace, None), (account, None)):
                seen.setdefault(pair, index)


def _overlapping(name: str) -> tuple[str | None, ...]:
    return (None,) if name == ANY else (name, ANY)


def check_subdomain(value: object, name: str) -> str:
    """
    Check that a value is a valid name of a Kubernetes object, and return it.

    Raises:
        SettingsError: It is not.
    """
    if not isinstance(value, str) or len(value) > _MAX_SUBDOMAIN or _SUBDOMAIN.fullmatch(value) is None:
        raise SettingsError(name, str(value), f"expected up to {_MAX_SUBDOMAIN} lowercase letters, digits, `-` and `.`")
    return value


def check_claim(value: object, name: str) -> str:
    """
    Check that a value is a valid name of a PersistentVolumeClaim, and return it.

    Raises:
        SettingsError: It is not.
    """
    if value in (None, ""):
        raise SettingsError(name, "", "expected the name of a PersistentVolumeClaim")
    return check_subdomain(value, name)


def check_sub_path(value: object, name: str) -> str:
    """
    Check that a value is a directory inside a volume, and return it; empty is the volume itself.

    Raises:
        SettingsError: It is not a string.
        PolicyError: It is absolute, contains `..`, or is not normalized.
    """
    if not isinstance(value, str):
        raise SettingsError(name, str(value), "expected a directory of the claim, such as `models/llama`")
    if value:
        try:
            check_name(value)
        except UnsafePathError as error:
            raise PolicyError(f"{name}: {value}", error.rule) from error
    return value


def read_policy(document: object) -> Policy:
    """
    Convert the parsed YAML or JSON of a policy file to a `Policy`.

    Raises:
        SettingsError: A field is unknown, missing or of the wrong type. Its name is a path such as `rules[2].access`.
        PolicyError: A directory is absolute or contains `..`.
    """
    fields = _mapping(document, "the policy", ("version", "rules"))
    if type(fields.get("version")) is not int or fields["version"] != 1:
        raise SettingsError("version", str(fields.get("version", "")), "expected `version: 1`")
    rules = fields.get("rules")
    if not isinstance(rules, list) or len(rules) > MAX_RULES:
        raise SettingsError("rules", _shown(rules), f"expected a list of up to {MAX_RULES} rules")
    return Policy(tuple(_read_rule(rule, f"rules[{index}]") for index, rule in enumerate(rules)))


def _is_strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


# The fields of a rule in a policy file, spelled as in Kubernetes; the arguments of `Rule`; and their types.
_FIELDS: Mapping[str, tuple[str, Callable[[object], bool], str]] = {
    "namespaces": ("namespaces", _is_strings, "expected a list of names"),
    "serviceAccounts": ("service_accounts", _is_strings, "expected a list of names"),
    "claim": ("claim", lambda value: isinstance(value, str), "expected the name of a PersistentVolumeClaim"),
    "subPath": ("sub_path", lambda value: isinstance(value, str), "expected a directory of the claim"),
    "access": ("access", lambda value: isinstance(value, str), "supported: `read`, `download`, `write`"),
    "default": ("default", lambda value: isinstance(value, bool), "expected `true` or `false`"),
}


def _read_rule(document: object, place: str) -> Rule:
    fields = _mapping(document, place, tuple(_FIELDS))
    for name in ("namespaces", "claim"):
        if name not in fields:
            raise SettingsError(f"{place}.{name}", "", _FIELDS[name][2])
    arguments: dict[str, Any] = {}
    for name, value in fields.items():
        argument, is_valid, hint = _FIELDS[name]
        if not is_valid(value):
            raise SettingsError(f"{place}.{name}", _shown(value), hint)
        arguments[argument] = value
    try:
        return Rule(**arguments)
    except SettingsError as error:
        raise SettingsError(f"{place}.{_field(error.name)}", error.value, error.hint) from error
    except PolicyError as error:
        raise PolicyError(f"{place}.{error.subject.replace('sub_path', 'subPath', 1)}", error.rule) from error


def _mapping(document: object, place: str, known: Sequence[str]) -> Mapping[str, Any]:
    if not isinstance(document, dict):
        raise SettingsError(
            place, _shown(document), f"expected a mapping with {', '.join(f'`{field}`' for field in known)}"
        )
    for name in document:
        if name not in known:
            where = str(name) if place == "the policy" else f"{place}.{name}"
            raise unknown_option("field", where, known)
    return document


def _shown(value: object) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _field(name: str) -> str:
    return next((field for field, (argument, _, _) in _FIELDS.items() if argument == name), name)


def _names(names: Sequence[str], name: str) -> bool:
    return ANY in names or name in names


def _or_any(names: Sequence[str]) -> Sequence[str]:
    return (ANY,) if ANY in names else names


def _parts(sub_path: str) -> list[str]:
    return [part for part in sub_path.split("/") if part not in ("", ".")]
