"""
Who may use which claim, and how: the rules of whoever runs the cluster, over the wishes of whoever owns a pod.

A pod's annotations are wishes. What a pod may do follows from where it runs, its namespace and service account, which
its owner cannot choose freely. A claim that some rule of a namespace names is *governed* there: only who has a rule may
mount it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import attrs

from kserve_pvc._format.file_names import check_name
from kserve_pvc.errors import PolicyError, SettingsError, UnsafePathError, unknown_option

# read: nobody in the pod writes. download: KServe's storage initializer does. write: whoever asks by annotation does
# too.
Access = Literal["read", "download", "write"]

ANY = "*"
MAX_RULES = 10_000

# What Kubernetes calls an RFC 1123 subdomain: the form of the names of claims, service accounts and services.
_SUBDOMAIN = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*", re.ASCII)
_MAX_SUBDOMAIN = 253


@attrs.frozen(kw_only=True)
class Rule:
    """
    What the pods of some namespaces and service accounts may do with one claim.

    Args:
        namespaces: Names of namespaces, or `*` for all.
        claim: The name of the claim, which lies in the namespace of the pod as every claim does.
        service_accounts: Names of service accounts, or `*` for all.
        sub_path: The directory of the claim that the rule is about, with all below it; empty for the whole claim.
        access: `read`, `download` or `write`.
        default: Whether pods that KServe would give an `emptyDir` get this claim without asking for it.

    Raises:
        SettingsError: A name is none, or an access is not known.
        PolicyError: The directory is absolute or climbs.
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
                raise SettingsError(name, "", f"name at least one, or write `{ANY}` for all")
            for value in values:
                if value != ANY:
                    check_subdomain(value, name)
        if self.access not in get_args(Access):
            raise SettingsError("access", str(self.access), "write `read`, `download` or `write`")

    def is_about(self, namespace: str, service_account: str) -> bool:
        """
        Whether a pod of this namespace and service account is meant.
        """
        return _names(self.namespaces, namespace) and _names(self.service_accounts, service_account)

    def covers(self, sub_path: str) -> bool:
        """
        Whether a directory of the claim is the rule's own or lies below it.
        """
        mine, others = _parts(self.sub_path), _parts(sub_path)
        return ".." not in others and others[: len(mine)] == mine


@attrs.frozen
class Policy:
    """
    Rules, of which the first that fits decides. Without a rule nothing is granted, and no claim is governed.
    """

    rules: tuple[Rule, ...] = ()

    def governs(self, namespace: str, claim: str) -> bool:
        """
        Whether some rule names this claim in this namespace, for whomever.
        """
        return any(rule.claim == claim and _names(rule.namespaces, namespace) for rule in self.rules)

    def rules_for(self, namespace: str, service_account: str, claim: str) -> tuple[Rule, ...]:
        """
        What a pod may do with a claim, in the order of the policy.
        """
        return tuple(rule for rule in self.rules if rule.claim == claim and rule.is_about(namespace, service_account))

    def default_for(self, namespace: str, service_account: str) -> str | None:
        """
        The claim that a pod gets without asking for one.
        """
        found = (rule.claim for rule in self.rules if rule.default and rule.is_about(namespace, service_account))
        return next(found, None)


def check_subdomain(value: object, name: str) -> str:
    """
    Take only what Kubernetes takes for the name of an object.

    Raises:
        SettingsError: It is something else.
    """
    if not isinstance(value, str) or len(value) > _MAX_SUBDOMAIN or _SUBDOMAIN.fullmatch(value) is None:
        raise SettingsError(
            name, str(value), f"write lower-case letters, digits, `-` and `.`, {_MAX_SUBDOMAIN} characters at most"
        )
    return value


def check_claim(value: object, name: str) -> str:
    """
    Take only what can be the name of a PersistentVolumeClaim.

    Raises:
        SettingsError: It cannot.
    """
    if value in (None, ""):
        raise SettingsError(name, "", "name a PersistentVolumeClaim")
    return check_subdomain(value, name)


def check_sub_path(value: object, name: str) -> str:
    """
    Take only a directory inside a volume; empty is the volume itself.

    Raises:
        SettingsError: It is no text.
        PolicyError: It is absolute, climbs with `..`, or is not written in its shortest form.
    """
    if not isinstance(value, str):
        raise SettingsError(name, str(value), "write a directory of the claim, such as `models/llama`")
    if value:
        try:
            check_name(value)
        except UnsafePathError as error:
            raise PolicyError(f"{name}: {value}", error.rule) from error
    return value


def read_policy(document: object) -> Policy:
    """
    Turn a policy file's content, as YAML or JSON reads it, into a `Policy`.

    Raises:
        SettingsError: A field is unknown, missing or of the wrong kind; it is named as in `rules[2].access`.
        PolicyError: A directory is absolute or climbs.
    """
    fields = _mapping(document, "the policy", ("version", "rules"))
    if type(fields.get("version")) is not int or fields["version"] != 1:
        raise SettingsError("version", str(fields.get("version", "")), "write `version: 1`")
    rules = fields.get("rules")
    if not isinstance(rules, list) or len(rules) > MAX_RULES:
        raise SettingsError("rules", _shown(rules), f"write a list of rules, {MAX_RULES} at most")
    return Policy(tuple(_read_rule(rule, f"rules[{index}]") for index, rule in enumerate(rules)))


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


# The names in a policy file, which follow the custom of Kubernetes; those of `Rule`; and what each must be.
_FIELDS: Mapping[str, tuple[str, Callable[[object], bool], str]] = {
    "namespaces": ("namespaces", _is_texts, "write a list of names"),
    "serviceAccounts": ("service_accounts", _is_texts, "write a list of names"),
    "claim": ("claim", lambda value: isinstance(value, str), "name a PersistentVolumeClaim"),
    "subPath": ("sub_path", lambda value: isinstance(value, str), "write a directory of the claim"),
    "access": ("access", lambda value: isinstance(value, str), "write `read`, `download` or `write`"),
    "default": ("default", lambda value: isinstance(value, bool), "write `true` or `false`"),
}


def _read_rule(document: object, place: str) -> Rule:
    fields = _mapping(document, place, tuple(_FIELDS))
    for name in ("namespaces", "claim"):
        if name not in fields:
            raise SettingsError(f"{place}.{name}", "", _FIELDS[name][2])
    arguments: dict[str, Any] = {}
    for name, value in fields.items():
        ours, fits, remedy = _FIELDS[name]
        if not fits(value):
            raise SettingsError(f"{place}.{name}", _shown(value), remedy)
        arguments[ours] = value
    try:
        return Rule(**arguments)
    except SettingsError as error:
        raise SettingsError(f"{place}.{_theirs(error.name)}", error.value, error.hint) from error
    except PolicyError as error:
        raise PolicyError(f"{place}.{error.subject.replace('sub_path', 'subPath', 1)}", error.rule) from error


def _mapping(document: object, place: str, known: Sequence[str]) -> Mapping[str, Any]:
    if not isinstance(document, dict):
        raise SettingsError(place, _shown(document), f"write a mapping with {', '.join(known)}")
    for name in document:
        if name not in known:
            where = str(name) if place == "the policy" else f"{place}.{name}"
            raise unknown_option("field", where, known)
    return document


def _shown(value: object) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _theirs(name: str) -> str:
    return next((theirs for theirs, (ours, _, _) in _FIELDS.items() if ours == name), name)


def _names(names: Sequence[str], name: str) -> bool:
    return ANY in names or name in names


def _parts(sub_path: str) -> list[str]:
    return [part for part in sub_path.split("/") if part not in ("", ".")]
