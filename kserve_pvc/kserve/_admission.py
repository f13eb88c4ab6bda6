"""
The decision about one AdmissionReview, as a function from a request to a response.

The namespace is that of the request, which the API server guarantees; the one in the pod is ignored. Decisions have no
side effects, so a dry run needs no special case.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any, NoReturn

import attrs

from kserve_pvc.errors import StoreError, printable
from kserve_pvc.kserve._manifest_tools import Manifest
from kserve_pvc.kserve._pods import Admitted, admit
from kserve_pvc.kserve._policy import Policy

MAX_BODY_BYTES = 3 * 1024 * 1024
# A typical pod is nested about ten levels deep, the full schema less than thirty.
MAX_DEPTH = 64
# A pod of a megabyte has about ten thousand values. While one request is decided, others wait.
MAX_VALUES = 500_000

_GROUP = "admission.k8s.io"
_VERSIONS = (f"{_GROUP}/v1", f"{_GROUP}/v1beta1")
# The API server truncates longer warnings.
_MAX_WARNING = 256
_MAX_WARNINGS = 16
# The values of a pod that a message quotes may be long.
_MAX_REASON = 1024


class BadReviewError(Exception):
    """
    The body is not a valid AdmissionReview.
    """


@attrs.frozen(kw_only=True)
class Decision:
    """
    A response, and the fields of its audit line.

    `outcome` is `mutated`, `unchanged`, `ignored` (it is not the creation of a pod) or `denied`.
    """

    response: Manifest
    outcome: str
    audit: dict[str, Any]


def read_review(body: bytes) -> Manifest:
    """
    Parse an untrusted AdmissionReview.

    Raises:
        BadReviewError: It is not JSON, is nested too deeply, has too many values or a duplicate field, is of another
            kind or version, or has no request.
    """
    if sum(map(body.count, (b"[", b"{", b","))) > MAX_VALUES:
        raise BadReviewError(f"the body holds more than {MAX_VALUES} values")
    try:
        review = json.loads(body, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BadReviewError(f"the body is not valid JSON ({type(error).__name__})") from None
    if (
        not isinstance(review, dict)
        or review.get("kind") != "AdmissionReview"
        or review.get("apiVersion") not in _VERSIONS
    ):
        raise BadReviewError(f"expected an AdmissionReview of {' or '.join(_VERSIONS)}")
    if not _is_shallow(review):
        raise BadReviewError(f"the body is nested deeper than {MAX_DEPTH} levels")
    request = review.get("request")
    if not isinstance(request, dict) or not isinstance(request.get("uid"), str) or not request["uid"]:
        raise BadReviewError("the review has no `request.uid`")
    return review


def decide(review: Manifest, policy: Policy) -> Decision:
    """
    Decide about a review that `read_review` has parsed.
    """
    request = review["request"]
    scope = _mutable_path(request)
    if scope is None:
        return _decision(review, "ignored")
    namespace = request.get("namespace")
    if not isinstance(namespace, str) or not namespace:
        return _denied(review, 400, "the request has no `namespace`")
    try:
        admitted = admit(request.get("object"), policy, namespace=namespace)
    except StoreError as error:
        return _denied(review, 403 if isinstance(error, PermissionError) else 400, str(error))
    operations = [
        operation for operation in patch(request["object"], admitted.pod) if operation["path"].startswith(scope)
    ]
    return _decision(review, "mutated" if operations else "unchanged", admitted=admitted, operations=operations)


# The way to a value: the way to its parent, and its key or index. Written out only where something differs, since the
# names of a document may be long.
_Way = tuple["_Way", "str | int"] | None


def patch(before: Any, after: Any, way: _Way = None) -> Iterator[dict[str, Any]]:
    """
    Return the JSON Patch (RFC 6902) from one document to another.

    Lists are compared by index, since mutations append to lists and never reorder them.
    """
    if type(before) is not type(after) or not isinstance(before, dict | list):
        if before != after or type(before) is not type(after):
            yield {"op": "replace", "path": _pointer(way), "value": after}
    elif isinstance(before, dict):
        yield from ({"op": "remove", "path": _pointer((way, key))} for key in before if key not in after)
        for key, value in after.items():
            if key in before:
                yield from patch(before[key], value, (way, key))
            else:
                yield {"op": "add", "path": _pointer((way, key)), "value": value}
    else:
        for index, (old, new) in enumerate(zip(before, after, strict=False)):
            yield from patch(old, new, (way, index))
        surplus = reversed(range(len(after), len(before)))
        yield from ({"op": "remove", "path": _pointer((way, index))} for index in surplus)
        yield from ({"op": "add", "path": _pointer((way, "-")), "value": value} for value in after[len(before) :])


def _pointer(way: _Way) -> str:
    """Write a JSON Pointer (RFC 6901)."""
    parts: list[str] = []
    while way is not None:
        way, key = way
        parts.append(str(key).replace("~", "~0").replace("/", "~1"))
    return "".join(f"/{part}" for part in reversed(parts))


def _decision(
    review: Manifest, outcome: str, *, admitted: Admitted | None = None, operations: list[dict[str, Any]] | None = None
) -> Decision:
    response: Manifest = {"uid": review["request"]["uid"], "allowed": True}
    if operations:
        response["patchType"] = "JSONPatch"
        response["patch"] = base64.b64encode(json.dumps(operations, separators=(",", ":")).encode()).decode("ascii")
    if admitted and admitted.notes:
        response["warnings"] = [_shortened(note) for note in admitted.notes[:_MAX_WARNINGS]]
    facts = {"claim": admitted.claim, "notes": list(admitted.notes)} if admitted else {}
    return _respond(review, response, outcome, facts)


def _denied(review: Manifest, code: int, reason: str) -> Decision:
    reason = _shortened(reason, _MAX_REASON)
    status = {"code": code, "reason": "Forbidden" if code == 403 else "BadRequest", "message": f"kserve-pvc: {reason}"}
    return _respond(
        review, {"uid": review["request"]["uid"], "allowed": False, "status": status}, "denied", {"reason": reason}
    )


def _respond(review: Manifest, response: Manifest, outcome: str, facts: dict[str, Any]) -> Decision:
    return Decision(
        response={"apiVersion": review["apiVersion"], "kind": "AdmissionReview", "response": response},
        outcome=outcome,
        audit={"decision": outcome, **_subject(review["request"]), **facts},
    )


def _subject(request: Manifest) -> dict[str, Any]:
    """Return names only for the audit line, since other fields of a pod may hold secrets."""
    pod = request.get("object")
    metadata = pod.get("metadata") if isinstance(pod, dict) else None
    metadata = metadata if isinstance(metadata, dict) else {}
    spec = pod.get("spec") if isinstance(pod, dict) else None
    user = request.get("userInfo")
    return {
        "uid": _name(request.get("uid")),
        "namespace": _name(request.get("namespace")),
        "pod": _name(metadata.get("name") or metadata.get("generateName") or request.get("name")),
        "service_account": _name(spec.get("serviceAccountName") if isinstance(spec, dict) else None),
        "user": _name(user.get("username") if isinstance(user, dict) else None),
        "dry_run": request.get("dryRun") is True,
    }


def _name(value: object) -> str:
    return _shortened(printable(value)) if isinstance(value, str) else ""


def _shortened(text: str, length: int = _MAX_WARNING) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _mutable_path(request: Manifest) -> str | None:
    """
    Return the JSON path below which a request may be changed, or None.

    It is all of a pod that is created, and the ephemeral containers of a running pod, which could mount its volumes
    again. Other requests are not changed.
    """
    kind = request.get("kind")
    if not isinstance(kind, dict) or (kind.get("group") or "", kind.get("version"), kind.get("kind")) != (
        "",
        "v1",
        "Pod",
    ):
        return None
    paths = {("CREATE", ""): "", ("UPDATE", "ephemeralcontainers"): "/spec/ephemeralContainers"}
    operation, sub_resource = request.get("operation"), request.get("subResource") or ""
    return (
        paths.get((operation, sub_resource)) if isinstance(operation, str) and isinstance(sub_resource, str) else None
    )


def _is_shallow(document: object) -> bool:
    level: list[Any] = [document]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        if not level:
            return True
    return False


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate field")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")
