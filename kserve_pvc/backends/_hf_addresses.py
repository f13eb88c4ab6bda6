"""
The addresses that the hub hands out for files, kept until they expire.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from urllib.parse import parse_qsl

import attrs

from kserve_pvc.backends._http.target import Target
from kserve_pvc.backends._http.wire import POLL_SECONDS

_MAX_ADDRESSES = 1024
# How long an address is used that does not say when it expires, and at most.
ADDRESS_SECONDS = 600.0
_MAX_ADDRESS_SECONDS = 3600.0


@attrs.define(eq=False)
class _Address:
    target: Target | None = None
    good_until: float = 0.0
    is_requested: bool = False


class Addresses:
    """
    Where files were found to be, until that expires, and which are being requested. Used by all streams.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[str, _Address] = OrderedDict()
        self._guard = threading.Condition()

    def take(self, name: str) -> tuple[Target | None, bool]:
        """
        Return the address of a file; or True: the caller must request it, then call `found` or `give_up`; or, after a
        poll interval, neither: another stream is requesting it.
        """
        with self._guard:
            if (address := self._entry(name)).is_requested:
                self._guard.wait_for(lambda: not self._entry(name).is_requested, POLL_SECONDS)
                address = self._entry(name)
            if address.is_requested:
                return None, False
            if address.target is not None and time.monotonic() < address.good_until:
                return address.target, False
            address.target, address.is_requested = None, True
            return None, True

    def found(self, name: str, target: Target, seconds: float) -> None:
        """
        Remember an address for some seconds.
        """
        with self._guard:
            address = self._entry(name)
            address.target, address.good_until, address.is_requested = target, time.monotonic() + seconds, False
            self._guard.notify_all()

    def give_up(self, name: str) -> None:
        """
        Let another stream request the address.
        """
        with self._guard:
            self._entry(name).is_requested = False
            self._guard.notify_all()

    def forget(self, name: str, target: Target) -> None:
        """
        Do not use an address again. One that another stream has found since stays.
        """
        with self._guard:
            if (address := self._entry(name)).target == target:
                address.target = None

    def _entry(self, name: str) -> _Address:
        address = self._known.setdefault(name, _Address())
        self._known.move_to_end(name)
        if len(self._known) > _MAX_ADDRESSES:
            self._known.popitem(last=False)
        return address


def lifetime(target: Target, headers: Mapping[str, str]) -> float:
    """
    Return for how many seconds to use a signed address: four fifths of what is left, by the clock of the signer.
    """
    from calendar import timegm
    from email.utils import parsedate_to_datetime

    signed = {name.lower(): value for name, value in parse_qsl(target.path.partition("?")[2])}
    now = time.time()
    with suppress(TypeError, ValueError, OverflowError):
        now = parsedate_to_datetime(headers.get("date", "")).timestamp()
    try:
        if "x-amz-expires" in signed:
            begin = timegm(time.strptime(signed.get("x-amz-date", ""), "%Y%m%dT%H%M%SZ"))
            left = begin + int(signed["x-amz-expires"][:9]) - now
        else:
            left = int(signed["expires"][:12]) - now
    except (KeyError, ValueError, OverflowError):
        return ADDRESS_SECONDS
    return min(max(0.0, 0.8 * left), _MAX_ADDRESS_SECONDS)
