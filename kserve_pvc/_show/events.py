"""
What happens during a call, as values for programs and for what shows progress.

The classes are public. Within version 1 of this package classes and fields are only added, never renamed, removed or
given another meaning, so a listener ignores the classes that it does not know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypedDict

import attrs


class Subject(TypedDict):
    """
    What an event is about: the fields of `Event`.
    """

    store: str
    key: str
    uri: str
    ref: str


@attrs.frozen(kw_only=True)
class Event:
    """
    The base of all events. No field holds a secret.

    Args:
        store: The root of the store.
        key: The key of the model.
        uri: The URI of the model, without credentials and query.
        ref: The model as messages name it: the URI, then revision and patterns if there are any.
    """

    store: str
    key: str
    uri: str
    ref: str


@attrs.frozen(kw_only=True)
class TransferStarted(Event):
    """
    This process transfers the model, and its listing is complete.

    A download that starts over, because its claim was lost or the volume failed, starts with another of these.

    Args:
        bytes_total: The size of the model, whether its bytes come from the source or are on the volume already.
        files: The number of files.
        activity: What is done.
    """

    bytes_total: int
    files: int
    activity: Literal["downloading", "importing", "exporting", "verifying"] = "downloading"


@attrs.frozen(kw_only=True)
class BytesAdopted(Event):
    """
    Bytes that were on the volume already were verified and reused instead of fetched.
    """

    size_bytes: int


@attrs.frozen(kw_only=True)
class BytesReceived(Event):
    """
    Bytes arrived from the source and were written.
    """

    size_bytes: int


@attrs.frozen(kw_only=True)
class WaitingForDownload(Event):
    """
    Another process downloads the model. Sent at every poll of the volume, at most once in 50 ms.

    Args:
        holder: The process that downloads: pod, node, user id and process id.
        since: When it claimed the download, by its own clock, or `unknown`.
        waited: Seconds that this call has waited.
        idle: Seconds since the last sign of life of the holder.
        bytes_done: How far the holder was at its last heartbeat.
        bytes_total: The size of the model, 0 if it is unknown.
        bytes_per_second: The rate of the holder.
    """

    holder: str
    since: str
    waited: float
    idle: float
    bytes_done: int
    bytes_total: int
    bytes_per_second: int


@attrs.frozen(kw_only=True)
class ClaimTakenOver(Event):
    """
    The process that was downloading is dead or silent, and this process continues its download.
    """

    holder: str
    reason: str


@attrs.frozen(kw_only=True)
class ClaimLost(Event):
    """
    This process was paused or cut off from the volume for so long that another one may take over, or its claim was
    broken. It stops fetching and waits like the others.
    """


@attrs.frozen(kw_only=True)
class LockerUnavailable(Event):
    """
    The locker of the store is unavailable. The claims on the volume alone decide which process downloads.
    """

    locker: str


@attrs.frozen(kw_only=True)
class RequestRetried(Event):
    """
    A request to the source failed and is retried after `delay` seconds.
    """

    reason: str
    delay: float


@attrs.frozen(kw_only=True)
class CallFinished(Event):
    """
    The call succeeded.

    Args:
        status: `present`, `downloaded` or `waited` as in `Model.status`; `exported` for an export.
        size_bytes: The size of the model.
        bytes_fetched: How many bytes this call fetched from the source.
        seconds: How long the call took.
    """

    status: Literal["present", "downloaded", "waited", "exported"]
    size_bytes: int
    bytes_fetched: int
    seconds: float


@attrs.frozen(kw_only=True)
class CallFailed(Event):
    """
    The call raised. What was fetched stays on the volume for the next call.

    Args:
        error: The class of the exception.
        message: Its message. Empty if it is not a `StoreError`, whose messages are the only ones known to hold no
            secret.
        seconds: How long the call took.
    """

    error: str
    message: str
    seconds: float


@attrs.frozen(kw_only=True)
class ModelRemoved(Event):
    """
    The model was removed from the store.
    """


Listener = Callable[[Event], None]
