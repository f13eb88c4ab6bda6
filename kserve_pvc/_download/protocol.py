"""
The download protocol as a pure state machine: who may fetch, who waits, who takes over, and when a call is over.

`step(state, event)` returns the next state and what to do now; the caller does it and reports what happened. Nothing
here reads a clock, a disk or a network, so production and tests run the same decisions.

Safety never depends on this machine. Each process that fetches writes into a generation directory of its own, and only
the numbered log decides which generation exists. The machine saves work: it keeps all processes but one from fetching.
"""

from __future__ import annotations

from typing import Literal

import attrs

MAX_SPOILED_ATTEMPTS = 3
_LONGEST_PAUSE = 1.0
_SHORTEST_PAUSE = 0.05


@attrs.frozen(kw_only=True)
class Rules:
    """
    The settings of one call and its store.

    `timeout` is how many seconds to wait for another downloader. With `lock_decides` an external lock decides who is
    next; without, the claim is the lock, and it is dead once unchanged for `lease_seconds` on the observer's clock.
    """

    lease_seconds: float
    timeout: float
    lock_decides: bool = False


@attrs.frozen(kw_only=True)
class ClaimSeen:
    """
    The current claim as the volume shows it.

    `sign_of_life` is compared, never interpreted. `released` means that its holder has released it, `dead` that its
    process provably no longer exists.
    """

    epoch: int
    sign_of_life: bytes
    released: bool = False
    dead: bool = False


@attrs.frozen(kw_only=True)
class Looked:
    """
    The log and the claims were read. `present` means that the newest record satisfies this call.
    """

    now: float
    present: bool
    seq: int = 0
    claim: ClaimSeen | None = None


@attrs.frozen(kw_only=True)
class Locked:
    """
    The external lock was tried. `granted` is None where it is unavailable.
    """

    now: float
    granted: bool | None


@attrs.frozen(kw_only=True)
class Claimed:
    """
    The claim was tried.
    """

    now: float
    won: bool


@attrs.frozen(kw_only=True)
class Fetched:
    """
    The generation is complete.
    """


@attrs.frozen(kw_only=True)
class ClaimLost:
    """
    This process was paused or cut off for too long, or another one made a claim with a higher number.
    """


@attrs.frozen(kw_only=True)
class Spoiled:
    """
    The volume failed an operation on this generation; a new one may succeed.
    """


@attrs.frozen(kw_only=True)
class Published:
    """
    The commit was tried.
    """

    won: bool


@attrs.frozen(kw_only=True)
class Paused:
    """
    The pause is over.
    """


Event = Looked | Locked | Claimed | Fetched | ClaimLost | Spoiled | Published | Paused


@attrs.frozen(kw_only=True)
class Look:
    """
    Read the log and the claims.
    """


@attrs.frozen(kw_only=True)
class TryLock:
    """
    Try the external lock, without waiting.
    """


@attrs.frozen(kw_only=True)
class MakeClaim:
    """
    Create the claim `epoch` exclusively. `reason` says why the one before it no longer counts.
    """

    epoch: int
    reason: str


@attrs.frozen(kw_only=True)
class Fetch:
    """
    Fetch into a new generation.
    """


@attrs.frozen(kw_only=True)
class Publish:
    """
    Append a commit right after record `after_seq`, unless another process was first.
    """

    after_seq: int


@attrs.frozen(kw_only=True)
class Pause:
    """
    Wait before looking again.
    """

    seconds: float


@attrs.frozen(kw_only=True)
class Release:
    """
    Mark the claim as released, and release the external lock.
    """


@attrs.frozen(kw_only=True)
class Return:
    """
    End the call: the model is there.
    """

    status: Literal["present", "downloaded", "waited"]


@attrs.frozen(kw_only=True)
class GiveUp:
    """
    End the call without the model.

    `timeout`: another process is still downloading. `volume`: every attempt was spoiled.
    """

    reason: Literal["timeout", "volume"]
    waited: float = 0.0
    idle: float = 0.0


Action = Look | TryLock | MakeClaim | Fetch | Publish | Pause | Release | Return | GiveUp


@attrs.frozen(kw_only=True)
class State:
    """
    The state of one call. `looked` is when the claim was last read and `idle_since` when its sign of life last changed,
    both on the caller's monotonic clock.
    """

    rules: Rules
    phase: Literal["looking", "rechecking", "fetching"] = "looking"
    started: float | None = None
    waited: bool = False
    claim: ClaimSeen | None = None
    idle_since: float = 0.0
    looked: float = 0.0
    epoch: int = 0
    base_seq: int = 0
    spoiled: int = 0

    def waited_for(self, now: float) -> float:
        """
        Return the seconds since the call began to wait.
        """
        return 0.0 if self.started is None else now - self.started


Step = tuple[State, tuple[Action, ...]]


def begin(rules: Rules) -> Step:
    """
    Start a call.
    """
    return State(rules=rules), (Look(),)


def step(state: State, event: Event) -> Step:
    """
    Decide what follows from one event.
    """
    match event:
        case Looked() if state.phase == "rechecking":
            return _rechecked(state, event)
        case Looked():
            return _looked(state, event)
        case Locked():
            return _locked(state, event)
        case Claimed(won=True):
            return attrs.evolve(state, phase="rechecking"), (Look(),)
        case Fetched():
            return state, (Publish(after_seq=state.base_seq),)
        case Published(won=True):
            return state, (Release(), Return(status="downloaded"))
        case Spoiled() if state.spoiled + 1 >= MAX_SPOILED_ATTEMPTS:
            return state, (Release(), GiveUp(reason="volume"))
        case Spoiled():
            return _again(attrs.evolve(state, spoiled=state.spoiled + 1))
        case Claimed(now=now):
            state, actions = _wait(state, now)
            return state, (Release(), *actions)
        case ClaimLost() | Published():
            return _again(attrs.evolve(state, waited=True))
        case Paused():
            return state, (Look(),)


def _again(state: State) -> Step:
    return attrs.evolve(state, phase="looking"), (Release(), Look())


def _looked(state: State, event: Looked) -> Step:
    if event.present:
        return state, (Return(status="waited" if state.waited else "present"),)
    state = _observe(state, event)
    if state.rules.lock_decides:
        return state, (TryLock(),)
    reason = _why_free(state, event.now)
    return _wait(state, event.now) if reason is None else _claim(state, reason)


def _locked(state: State, event: Locked) -> Step:
    reason = _why_locked_is_free(state, event.granted)
    return _wait(state, event.now) if reason is None else _claim(state, reason)


def _why_locked_is_free(state: State, granted: bool | None) -> str | None:
    if granted is None:  # Where there is no lock the claims are the lock.
        return _why_free(state, state.looked)
    claim = state.claim
    is_free = claim is None or claim.released or claim.dead
    if granted and is_free:
        return "its lock is free"
    # Where locks do nothing every try is granted. A holder with a heartbeat is alive all the same, and there are six of
    # them in a lease. And a lock may stay with a process that has released the claim, or has lost it.
    is_silent = state.looked - state.idle_since >= state.rules.lease_seconds / 3
    if is_silent and claim is not None and (granted or is_free):
        return "its lock is free" if granted else _why_free(state, state.looked)
    # A lock decides who is next among live processes. A holder without a sign of life is not waited for.
    return _why_dead(state, state.looked)


def _rechecked(state: State, event: Looked) -> Step:
    # Creating the claim has refreshed this node's view of the directory: the log may show more than before.
    if event.present:
        return attrs.evolve(state, phase="looking"), (Release(), Return(status="waited"))
    if event.claim is not None and event.claim.epoch > state.epoch:
        return _again(attrs.evolve(state, waited=True))
    return attrs.evolve(state, phase="fetching", base_seq=event.seq), (Fetch(),)


def _observe(state: State, event: Looked) -> State:
    started = event.now if state.started is None else state.started
    if state.started is None or _signature(event.claim) != _signature(state.claim):
        return attrs.evolve(state, started=started, claim=event.claim, idle_since=event.now, looked=event.now)
    # Whether its process is dead is not part of the signature. Only what was observed is silence: if this process
    # was stopped, or the volume hung, between two looks, its holder may have had no better time.
    unobserved = max(0.0, event.now - state.looked - state.rules.lease_seconds / 2)
    idle_since = state.idle_since + unobserved
    return attrs.evolve(state, started=started, claim=event.claim, looked=event.now, idle_since=idle_since)


def _signature(claim: ClaimSeen | None) -> tuple[int, bytes] | None:
    return None if claim is None else (claim.epoch, claim.sign_of_life)


def _why_free(state: State, now: float) -> str | None:
    claim = state.claim
    if claim is None:
        return "it is unclaimed"
    if claim.released:
        return "its holder has released it"
    if claim.dead:
        return "its process no longer exists"
    return _why_dead(state, now)


def _why_dead(state: State, now: float) -> str | None:
    if now - state.idle_since >= state.rules.lease_seconds:
        return f"no sign of life for {state.rules.lease_seconds:g} s"
    return None


def _claim(state: State, reason: str) -> Step:
    epoch = 1 if state.claim is None else state.claim.epoch + 1
    return attrs.evolve(state, epoch=epoch), (MakeClaim(epoch=epoch, reason=reason),)


def _wait(state: State, now: float) -> Step:
    waited = state.waited_for(now)
    if waited >= state.rules.timeout:
        idle = 0.0 if state.claim is None else now - state.idle_since
        return state, (GiveUp(reason="timeout", waited=waited, idle=idle),)
    # A twentieth of the time waited so far: the last waiter is ready within 5 % of the download it waited for. Not less
    # than a twentieth of a second: looking takes processor time from a downloader on the same node.
    pause = min(max(_SHORTEST_PAUSE, waited / 20), _LONGEST_PAUSE, state.rules.lease_seconds / 4)
    return attrs.evolve(state, waited=True), (Pause(seconds=min(pause, max(state.rules.timeout - waited, 0.001))),)
