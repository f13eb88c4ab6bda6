"""
The settings of the hub: where it is, and the token for it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kserve_pvc.backends._http.target import HTTPError, Target, target_of
from kserve_pvc.errors import SettingsError

_HUB = "https://huggingface.co"


def find_endpoint(options: Mapping[str, Any], environ: Mapping[str, str]) -> Target:
    name = "endpoint" if options.get("endpoint") else "HF_ENDPOINT"
    url = str(options.get("endpoint") or environ.get("HF_ENDPOINT") or _HUB)
    try:
        target = target_of(url)
        if "@" in urlsplit(url).netloc or "?" in url or "#" in url:
            raise HTTPError("it contains more than an address")
    except HTTPError as error:
        shown = "not shown" if re.search(r"[@?#]", url) else url
        raise SettingsError(name, shown, "use `https://host`; pass a token by `token` or HF_TOKEN") from error
    return target._replace(path=target.path.rstrip("/"))


def find_token(options: Mapping[str, Any], environ: Mapping[str, str]) -> str | None:
    """The token, with the precedence that huggingface_hub has. It is never shown, whatever is wrong with it."""
    given = options.get("token")
    if not isinstance(given, str | bool | None):
        raise SettingsError("token", f"of type {type(given).__name__}", "pass a string, or False for none")
    if given is False or (given is None and is_true(environ.get("HF_HUB_DISABLE_IMPLICIT_TOKEN"))):
        return None
    token = (
        given
        if isinstance(given, str)
        else environ.get("HF_TOKEN") or environ.get("HUGGING_FACE_HUB_TOKEN") or _token_file(environ)
    )
    token = token.replace("\r", "").replace("\n", "").strip()
    if not token.isascii() or not token.isprintable() or " " in token:
        raise SettingsError("token", "not shown", "it contains characters that a token cannot have")
    return token or None


def _token_file(environ: Mapping[str, str]) -> str:
    home = environ.get("HF_HOME") or os.path.join(environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    # Without a home directory, or with one that may not be read, there is no login.
    with suppress(OSError, RuntimeError, ValueError):
        return Path(environ.get("HF_TOKEN_PATH") or os.path.join(home, "token")).expanduser().read_text()
    return ""


def is_true(text: str | None) -> bool:
    return (text or "").upper() in ("1", "ON", "YES", "TRUE")
