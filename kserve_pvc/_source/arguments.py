"""
Arguments that a caller passes, checked before anything is done with them.
"""

from __future__ import annotations

import math

from kserve_pvc.errors import SettingsError


def check_timeout(value: object, name: str = "timeout") -> float:
    """
    Return how many seconds to wait; None means without limit.

    Raises:
        SettingsError: It is neither None nor a number of seconds, 0 or more.
    """
    if type(value) is float and value >= 0:
        return value  # The default, as nearly always: a hit takes no longer than need be.
    if value is None:
        return math.inf
    seconds = _to_seconds(value)
    if seconds is None or not seconds >= 0:
        raise SettingsError(name, _shown(value), "use a number of seconds, 0 or more, or None to wait without limit")
    return seconds


def check_seconds(name: str, value: object, *, least: float = 0.0, most: float = math.inf) -> float:
    """
    Return a number of seconds: above 0, or within limits.

    Raises:
        SettingsError: It is not a number, or lies outside of the limits.
    """
    seconds = _to_seconds(value)
    if seconds is None or not (least <= seconds <= most and seconds > 0):
        limits = f"from {least:g} to {most:g}" if least else "above 0"
        raise SettingsError(name, _shown(value), f"use a number of seconds {limits}")
    return seconds


def check_count(name: str, value: object) -> int:
    """
    Return a whole number, 1 or more.

    Raises:
        SettingsError: It is anything else; a fraction is not rounded.
    """
    if type(value) is int and value >= 1:
        return value
    try:
        number = 0 if isinstance(value, bool) else value.__index__()  # type: ignore[attr-defined]  # Caught below.
    except (AttributeError, TypeError):
        number = 0
    if number < 1:
        raise SettingsError(name, _shown(value), "use a whole number, 1 or more")
    return int(number)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """
    Check that a word is one of several.

    Raises:
        SettingsError: It is not.
    """
    if value not in choices:
        raise SettingsError(name, _shown(value), f"use {' or '.join(f'`{choice}`' for choice in choices)}")


def check_listener(value: object) -> None:
    """
    Check that something can be called with an event.

    Raises:
        SettingsError: It cannot.
    """
    if value is not None and not callable(value):
        raise SettingsError("on_event", type(value).__name__, "pass a function that takes one event")


def check_cancel(value: object) -> None:
    """
    Check that something has the `is_set` of a `threading.Event`.

    Raises:
        SettingsError: It cannot.
    """
    if value is not None and not callable(getattr(value, "is_set", None)):
        raise SettingsError("cancel", type(value).__name__, "pass a `threading.Event`")


def _to_seconds(value: object) -> float | None:
    """A number of any kind, such as NumPy's; neither a truth value nor a string."""
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        return None
    try:
        return float(value)
    except (ArithmeticError, TypeError, ValueError):
        return None


def _shown(value: object) -> str:
    return repr(value)[:80]
