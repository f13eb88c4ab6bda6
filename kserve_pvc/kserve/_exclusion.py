"""
One writer of a destination at a time, and nothing left of it once it is done.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import PurePosixPath

from kserve_pvc._format import layout
from kserve_pvc._format.records import Holder
from kserve_pvc._keys.claims import find_live_downloader, newest_epoch, start_heartbeat, take_claim
from kserve_pvc._volume.calls import delete_tree
from kserve_pvc._volume.mount import mount_of
from kserve_pvc._volume.writing import VolumeWriter
from kserve_pvc.errors import LockTimeoutError, StoreError
from kserve_pvc.kserve._contents import OURS
from kserve_pvc.locks.external import ExternalLock
from kserve_pvc.locks.flock import grab_file
from kserve_pvc.locks.lease import LeaseLostError

_KEY = "destination-0000000000000000"


@contextmanager
def only_writer(
    writer: VolumeWriter, holder: Holder, lease_seconds: float, is_done: Callable[[], bool]
) -> Iterator[Callable[[], None]]:
    """
    Lock a destination.

    Args:
        is_done: Returns whether there is nothing to write, so that no directory need be made. Called once it is
            known that no other process is writing.

    Yields:
        A function that raises if the lock was lost.

    Raises:
        LockTimeoutError: Another live process is writing here.
    """
    with ExitStack() as stack:
        # Across nodes a kernel lock may not exclude, or may stay with a dead node, so heartbeats alone decide.
        if not mount_of(writer.root).is_network and _has_kernel_lock(writer, stack, lease_seconds):
            stack.callback(_delete_claims, writer)
            yield _do_nothing
        else:
            yield stack.enter_context(_claimed(writer, holder, lease_seconds, is_done))


def _has_kernel_lock(writer: VolumeWriter, stack: ExitStack, timeout: float) -> bool:
    """
    Acquire the kernel's lock, which ends with its holder. False if it is unavailable, or takes too long.

    It is a lock of the directory itself, so that no file is needed.
    """
    lock = ExternalLock(partial(grab_file, partial(writer.open_directory, PurePosixPath())), timeout=timeout)
    stack.callback(lock.release)
    is_held = lock.try_acquire(on_timeout=None)
    if is_held is False:
        raise _taken(writer, "another process")
    return is_held is True


@contextmanager
def _claimed(
    writer: VolumeWriter, holder: Holder, lease_seconds: float, is_done: Callable[[], bool]
) -> Iterator[Callable[[], None]]:
    if OURS.name in writer.list_names(PurePosixPath()):
        other = find_live_downloader(VolumeWriter(writer.absolute(OURS)), _KEY, lease_seconds=lease_seconds)
        if other is not None:
            raise _taken(writer, other)
    if is_done():
        yield _do_nothing
        return
    writer.make_directory(OURS)
    claims = VolumeWriter(writer.absolute(OURS))
    epoch = newest_epoch(claims, _KEY) + 1
    if take_claim(claims, _KEY, epoch, uri="file://", holder=holder) is None:
        raise _taken(writer, "another process")
    heartbeat = start_heartbeat(claims, layout.claim_dir(_KEY, epoch), lease_seconds=lease_seconds)

    def check() -> None:
        try:
            heartbeat.check()
        except LeaseLostError as error:
            raise _taken(writer, "another process, since this one was paused for too long") from error
        if newest_epoch(claims, _KEY) != epoch:
            raise _taken(writer, "another process")

    try:
        check()
        yield check
    finally:
        heartbeat.stop()
        _delete_claim(claims, epoch)
        _delete_ours(writer)


def _delete_claim(claims: VolumeWriter, epoch: int) -> None:
    """
    Delete a claim of this process, and each directory above it that holds no claim of another one.

    It comes after its release, since NFS keeps the name of an open file.
    """
    place = layout.claim_dir(_KEY, epoch)
    with suppress(OSError, StoreError):
        for tree in (place, layout.TRASH):  # The trash has the claims that this one superseded.
            with suppress(FileNotFoundError), claims.open_parent(tree) as parent:
                delete_tree(parent, tree.name)
        for above in place.parents[:-1]:
            with claims.open_parent(above) as parent:
                os.rmdir(above.name, dir_fd=parent)


def _delete_claims(writer: VolumeWriter) -> None:
    """Delete the claims of writers that ended before the kernel's lock was acquired."""
    with suppress(OSError, StoreError), writer.open_parent(OURS / layout.META) as parent:
        delete_tree(parent, layout.META.name)
    _delete_ours(writer)


def _delete_ours(writer: VolumeWriter) -> None:
    """Delete the directory of the initializers, unless it has anything that the next one continues with."""
    with suppress(OSError, StoreError), writer.open_parent(OURS) as parent:
        os.rmdir(OURS.name, dir_fd=parent)


def _taken(writer: VolumeWriter, holder: str) -> LockTimeoutError:
    return LockTimeoutError(str(writer.root), holder, 0.0, 0.0, 0, 0)


def _do_nothing() -> None:
    """A kernel lock cannot be lost."""
