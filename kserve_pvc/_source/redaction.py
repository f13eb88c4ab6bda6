"""
Taking secrets out of strings that others wrote, or that are malformed: by their shape, and by their value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from urllib.parse import quote, quote_plus

from kserve_pvc.errors import printable

# Stands where a secret was.
MASK = "…"

# Repetitions below are bounded where another match could begin at each of their characters, so that the time grows with
# the length of the text and no faster.
# With fewer slashes than a URL has, since a URL that is mistyped holds the same secrets.
_URL_IN_TEXT = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,63}:/+)([^\s\"<>]*)")
# A password may hold anything, slashes and question marks included, so its end is the last `@`.
_USER_INFORMATION = re.compile(r"([^/:]*@)|([^/:]*:(?![0-9]+/).*@)", re.DOTALL)
# `hf://organization/name@revision`: behind a slash, and with no colon before it, an `@` ends no user information.
_AT_IN_PATH = re.compile(r"[^/:@]+/[^:]*@[^@]*", re.DOTALL)
# `user:password@host` without a scheme.
_BARE_LOGIN = re.compile(r"(?<![\w.%+:/-])[\w.%+-]{1,255}:(?!/)[^\s:@\"'`<>]{1,1024}@(?=[\w\[])")
# A header as a service repeats it; what follows on its line may belong to it.
_HEADER = re.compile(
    r"\b((?:proxy-)?authorization|(?:set-)?cookie|[a-z0-9][a-z0-9-]{0,63}-(?:token|secret|key|signature|password|credential)"
    rf"(?:-md5)?)([\"']?\s*[:=]\s*[\"']?)(?![\w-]+\s+{MASK})[^\s\"'<>][^\r\n\"<>]*",
    re.IGNORECASE,
)
# A parameter of a query, of a form, or of a connection string.
_PARAMETER = re.compile(
    r"((?:(?<![A-Za-z0-9_-])|%3F|%26)(?:x-(?:amz|goog)-(?:signature|credential|security-token)|sig|signature"
    r"|(?:[a-z]{1,32}_){0,4}(?:token|secret|password|passwd|pwd|api_?key|access_key|secret_key)|accountkey|sharedaccesssignature"
    r"|awsaccesskeyid)(?:=|%3D)\s*)[^&\s\"'<>;,`]+",
    re.IGNORECASE,
)
# What an `Authorization` holds; a word of prose has no digit or capital letter in it.
_SCHEME = re.compile(
    r"\b(Bearer|Basic|Digest|Negotiate|SharedKey(?:Lite)?|AWS4-HMAC-SHA256)(\s+)"
    r"(?=[^\s\"'<>]*[^\s\"'<>a-z.,;:])[^\s\"'<>]{6,}(?:,\s*[A-Za-z]+=[^\s,\"'<>]+)*",
    re.IGNORECASE,
)
# A shorter value hides nothing that could not be guessed, and its letters occur everywhere.
_SHORTEST = 4


def redact(text: str) -> str:
    """
    Remove what looks like a secret: user information, query and fragment of every URL, and what headers, parameters and
    schemes of authentication hold.
    """

    def cleaned(match: re.Match[str]) -> str:
        scheme, rest = match.groups()
        shown = rest
        if "@" in rest and not (scheme == "hf://" and _AT_IN_PATH.fullmatch(rest)):
            shown = _USER_INFORMATION.sub("", rest, count=1)
        return str(scheme) + re.split(r"[?#]", shown, maxsplit=1)[0]

    text = _BARE_LOGIN.sub("", _URL_IN_TEXT.sub(cleaned, text))
    text = _PARAMETER.sub(rf"\1{MASK}", _HEADER.sub(rf"\1\2{MASK}", _SCHEME.sub(rf"\1\2{MASK}", text)))
    return printable(text)


def hide(text: str, secrets: Iterable[str]) -> str:
    """
    Remove given secrets from a string, in any spelling that URLs, XML and JSON have for them.
    """
    spelled = {form for secret in secrets if len(secret) >= _SHORTEST for form in _spellings(secret)}
    if not spelled:
        return text
    # The longest first: one may be the beginning of another.
    pattern = "|".join(re.escape(form) for form in sorted(spelled, key=len, reverse=True))
    return re.sub(pattern, MASK, text, flags=re.IGNORECASE)


def _spellings(secret: str) -> set[str]:
    quoted = {quote(secret, safe=""), quote(secret), quote(secret, safe="/+="), quote_plus(secret)}
    xml = secret.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
    escaped = json.dumps(secret)[1:-1]
    return {secret, xml, escaped, escaped.replace("/", "\\/"), *quoted}
