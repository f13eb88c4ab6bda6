"""
Many models, each fetched once and each with a result of its own, whatever becomes of the others.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Literal, Protocol

import attrs

from kserve_pvc._show.events import Event, Listener
from kserve_pvc._source.ref import ModelRef, Source, parse_ref
from kserve_pvc.errors import InvalidURIError, PolicyError, SettingsError

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future

    from kserve_pvc._model import Model
    from kserve_pvc._show.progress import Callback

Item = Source | Mapping[str, Any]
Listen = Callable[[], AbstractContextManager[Listener]]

_WORDS = ("uri", "revision", "allow_patterns", "ignore_patterns")
_HOW_TO_NAME = (
    "use a URI, an absolute path, a `ModelRef`, or a mapping "
    "with `uri` and, if need be, `revision`, `allow_patterns` and `ignore_patterns`"
)


class Ensure(Protocol):
    """
    How one model is fetched.
    """

    def __call__(self, ref: ModelRef, *, listen: Listen) -> Model: ...


@attrs.frozen(kw_only=True)
class WarmedModel:
    """
    A model that `warm` was to bring into the store, and that is there.

    Args:
        index: Which of the items named it, from 0; the first one, if several did.
        seconds: How long it took, without the time until its turn came.
    """

    index: int
    uri: str
    ref: ModelRef
    model: Model
    error: None = attrs.field(default=None, init=False)
    seconds: float = 0.0

    @property
    def ok(self) -> Literal[True]:
        return True


@attrs.frozen(kw_only=True)
class FailedModel:
    """
    A model that `warm` was to bring into the store, and that is not there.

    Args:
        index: Which of the items named it, from 0; the first one, if several did.
        ref: What was requested; None if the item is invalid.
        error: Usually a `StoreError`; whatever a foreign backend or the executor raised instead of one.
        seconds: How long it took, without the time until its turn came.
    """

    index: int
    uri: str
    ref: ModelRef | None = None
    model: None = attrs.field(default=None, init=False)
    error: Exception
    seconds: float = 0.0

    @property
    def ok(self) -> Literal[False]:
        return False


# A type checker that sees `if result.error is None` or `if result.ok` knows that `result.model` is a `Model`.
Warmed = WarmedModel | FailedModel


class StoppedError(Exception):
    """
    Whoever wanted the model was interrupted.
    """


def warm(
    ensure: Ensure,
    items: Iterable[Item],
    executor: Executor | None,
    *,
    progress: bool | None,
    callback: Callback | None,
    remember: Callable[[Model], None],
) -> Generator[Warmed, None, None]:
    """
    Check what is asked for, and return the results as they will come. Nothing is begun before the first one is asked
    for.

    Args:
        ensure: Called in this thread, or wherever the executor calls it.
        remember: Told of each model, which another process may have found.

    Raises:
        SettingsError: An argument means nothing.
    """
    if executor is not None and not callable(getattr(executor, "submit", None)):
        raise SettingsError(
            "executor",
            type(executor).__name__,
            "give a `concurrent.futures.Executor`, such as a `ThreadPoolExecutor(4)`",
        )
    if isinstance(items, str | os.PathLike | ModelRef | Mapping):
        raise SettingsError("items", type(items).__name__, "give several: a list of URIs")
    refused, asked = _sorted_out([normalize_item(item, f"items[{index}]") for index, item in enumerate(items)])
    listen = _Listening(progress, callback, is_one_of_many=executor is not None)
    tasks = [_Task(index, ref, ensure, listen) for ref, index in asked.items()]
    return _results(refused, tasks, executor, listen.stopped, remember)


def normalize_item(item: object, name: str) -> dict[str, Any]:
    """
    Take one item apart into the arguments of `ensure` that choose a model.

    Args:
        name: What to call it in an error. The item itself may hold a secret.
    """
    if isinstance(item, str | os.PathLike | ModelRef):
        return {"uri": item}
    if not isinstance(item, Mapping):
        raise SettingsError(name, f"of type {type(item).__name__}", _HOW_TO_NAME)
    if "uri" not in item or set(item) - set(_WORDS):
        raise SettingsError(name, f"a mapping with {', '.join(map(str, item)) or 'nothing'}", _HOW_TO_NAME)
    return dict(item)


def _sorted_out(wishes: Sequence[Mapping[str, Any]]) -> tuple[list[FailedModel], dict[ModelRef, int]]:
    """What means nothing and will not be tried, and every model that is asked for, with its place in the list."""
    refused: list[FailedModel] = []
    asked: dict[ModelRef, int] = {}
    for index, wish in enumerate(wishes):
        try:
            asked.setdefault(parse_ref(**wish), index)
        except (InvalidURIError, PolicyError) as error:
            refused.append(FailedModel(index=index, uri=_shown(wish["uri"]), error=error))
    return refused, asked


def _shown(uri: Source) -> str:
    try:
        return parse_ref(uri).uri
    except InvalidURIError as error:
        return error.uri
    except PolicyError as error:
        return error.subject


def _results(
    refused: Iterable[Warmed],
    tasks: Sequence[_Task],
    executor: Executor | None,
    stopped: threading.Event,
    remember: Callable[[Model], None],
) -> Generator[Warmed, None, None]:
    done = (task() for task in tasks) if executor is None else _as_they_finish(tasks, executor)
    try:
        yield from refused
        for warmed in done:
            if warmed.model is not None:
                remember(warmed.model)
            yield warmed
    except GeneratorExit:
        raise
    except BaseException:
        # Ctrl-C or the end of a pod: what other threads are at would go on for as long as it takes.
        stopped.set()
        raise
    finally:
        done.close()


def _as_they_finish(tasks: Sequence[_Task], executor: Executor) -> Generator[Warmed, None, None]:
    from concurrent.futures import as_completed

    under_way: dict[Future[Warmed], _Task] = {}
    try:
        for task in tasks:  # Not a comprehension: what was submitted is cancelled if the executor refuses the next.
            under_way[executor.submit(task)] = task
        for future in as_completed(under_way):
            yield _outcome(future, under_way[future])
    finally:
        for future in under_way:
            future.cancel()


def _outcome(future: Future[Warmed], task: _Task) -> Warmed:
    try:
        return future.result()
    except SettingsError:
        raise  # Not the model failed but the call: it cannot be made in other processes.
    except Exception as error:  # A process that was killed, or an executor that was shut down.
        return FailedModel(index=task.index, uri=task.ref.uri, ref=task.ref, error=error)


class _Task:
    """
    One model to be fetched, by this thread or by whichever thread or process an executor chooses.
    """

    def __init__(self, index: int, ref: ModelRef, ensure: Ensure, listen: Listen) -> None:
        self.index = index
        self.ref = ref
        self._ensure = ensure
        self._listen = listen

    def __call__(self) -> Warmed:
        started = time.monotonic()
        try:
            model = self._ensure(self.ref, listen=self._listen)
        except Exception as error:  # A foreign backend may raise anything; the others are to be fetched all the same.
            seconds = time.monotonic() - started
            return FailedModel(index=self.index, uri=self.ref.uri, ref=self.ref, error=error, seconds=seconds)
        seconds = time.monotonic() - started
        return WarmedModel(index=self.index, uri=self.ref.uri, ref=self.ref, model=model, seconds=seconds)

    def __reduce__(self) -> tuple[Any, ...]:
        # Only an executor of processes asks for this, and would tell what cannot be sent in the words of pickle.
        import pickle

        try:
            return _unpacked, (pickle.dumps((self.index, self.ref, self._ensure, self._listen)),)
        except SettingsError:
            raise
        except Exception as error:
            why = f"what its store was opened with cannot be sent to other processes ({type(error).__name__})"
            raise SettingsError("executor", "one of processes", f"{why}; use a `ThreadPoolExecutor`") from error


def _unpacked(data: bytes) -> _Task:
    import pickle

    return _Task(*pickle.loads(data))


@attrs.frozen
class _Stoppable:
    """
    A listener that ends the call it listens to once nobody wants the model any more, also while nothing happens.
    """

    listener: Listener
    stopped: threading.Event

    def __call__(self, event: Event) -> None:
        self.check()
        self.listener(event)

    def check(self) -> None:
        if self.stopped.is_set():
            raise StoppedError


class _Listening:
    """
    Who hears of the models. In other processes lines take the place of bars, which would overwrite each other.
    """

    def __init__(
        self, progress: bool | None, callback: Callback | None, *, is_one_of_many: bool, may_draw: bool = True
    ) -> None:
        self.stopped = threading.Event()
        self._progress = progress
        self._is_one_of_many = is_one_of_many
        self._may_draw = may_draw
        self._part: Callable[[], Callback] | None = None
        if callback is not None:
            from kserve_pvc._show.progress import share

            self._part = share(callback)

    @contextmanager
    def __call__(self) -> Iterator[Listener]:
        from kserve_pvc._show.progress import make_listener

        callback = None if self._part is None else self._part()
        with make_listener(
            self._progress, callback, names_model=self._is_one_of_many, may_draw=self._may_draw
        ) as listener:
            yield _Stoppable(listener, self.stopped)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._part is not None:
            raise SettingsError(
                "callback", "one of this process", "it cannot hear other processes; use a `ThreadPoolExecutor`"
            )
        return _in_another_process, (self._progress,)


def _in_another_process(progress: bool | None) -> _Listening:
    return _Listening(progress, None, is_one_of_many=True, may_draw=False)
