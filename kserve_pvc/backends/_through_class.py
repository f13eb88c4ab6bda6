"""
Which way the settings of `http`, `hf` and `file` lead: to our own requests, or through the fsspec class of the scheme.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from kserve_pvc._source.contract import Backend
from kserve_pvc.backends._options import Rule, check_options, find_reasons, log_access, read_settings

Load = Callable[[], Sequence[Callable[..., Any]]]
# Given all options, makes the backend.
Make = Callable[[Mapping[str, Any]], Backend]


def choose(
    scheme: str,
    options: Mapping[str, Any],
    environ: Mapping[str, str],
    *,
    rules: Sequence[Rule],
    own: Collection[str],
    load: Load,
    direct: Make,
    through: Make,
) -> Backend:
    """
    Make the backend of a scheme: `direct` where every setting is plain, else `through` the fsspec class.

    Args:
        rules: What is not plain.
        own: Options that need no look at the class.
        load: The fsspec class, and whatever it passes options on to.

    Raises:
        SettingsError: An option is unknown, or fsspec's configuration cannot be read.
    """
    settings = read_settings(scheme, options, environ)
    check_options(scheme, settings.options, own, load)
    reasons = find_reasons(rules, settings)
    log_access(scheme, "its fsspec class" if reasons else "direct", reasons)
    return through(settings.options) if reasons else direct(options)
