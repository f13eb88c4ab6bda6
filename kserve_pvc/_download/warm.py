"""
Fetching many models, each once and each with a result of its own, whatever becomes of the others.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Literal, Protocol

import attrs

from kserve_pvc._download.cancellation import AnyOf, Cancel
from kserve_pvc._show.events import Listener
from kserve_pvc._source.ref import ModelRef, Source, parse_ref
from kserve_pvc._threads import naming_thread_limit
from kserve_pvc.errors import DownloadCancelledError, InvalidURIError, PolicyError, SettingsError

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future

    from kserve_pvc._model import Model
    from kserve_pvc._show.progress import Callback

Item = Source | Mapping[str, Any]
Listen = Callable[[], AbstractContextManager[Listener]]

_FIELDS = ("uri", "revision", "allow_patterns", "ignore_patterns")
# What may differ between the items besides the model that they name.
_OPTIONS = ("refresh", "force_download")
# How long an interrupt waits for what it ends in other threads, each of which ends within a second.
_PATIENCE_SECONDS = 2.0
_HOW_TO_NAME = (
    "pass a URI, an absolute path, a `ModelRef`, or a mapping with `uri` and, if needed, `revision`, "
    "`allow_patterns`, `ignore_patterns`, `refresh` and `force_download`"
)


class Ensure(Protocol):
    """
    How one model is fetched.
    """

    def __call__(
        self, ref: ModelRef, *, listen: Listen, on_event: Listener | None, cancel: Cancel | None, **options: Any
    ) -> Model: ...


@attrs.frozen(kw_only=True)
class WarmedModel:
    """
    The result for a model that is in the store now.

    Args:
        index: Which of the items named it, from 0; the first one, if several did.
        seconds: How long it took, without the time in the queue.
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
    The result for a model that could not be fetched.

    Args:
        index: Which of the items named it, from 0; the first one, if several did.
        ref: The parsed request; None if it is invalid.
        error: Usually a `StoreError`; otherwise what a third-party backend or the executor raised.
        seconds: How long it took, without the time in the queue.
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


# Type checkers conclude from `result.error is None` that `result.model` is a `Model`.
Warmed = WarmedModel | FailedModel


def warm(
    ensure: Ensure,
    items: Iterable[Item],
    executor: Executor | None,
    *,
    progress: bool | None,
    callback: Callback | None,
    on_event: Listener | None,
    cancel: Cancel | None,
    remember: Callable[[Model], None],
) -> Generator[Warmed, None, None]:
    """
    Check the arguments, and return the results as they will come. Nothing begins before the first result is requested.

    Args:
        ensure: Called in this thread, or wherever the executor calls it.
        remember: Called with each model, which another process may have found.

    Raises:
        SettingsError: An argument is invalid.
    """
    if executor is not None and not callable(getattr(executor, "submit", None)):
        raise SettingsError(
            "executor",
            type(executor).__name__,
            "pass a `concurrent.futures.Executor`, such as a `ThreadPoolExecutor(4)`",
        )
    if isinstance(items, str | os.PathLike | ModelRef | Mapping):
        raise SettingsError("items", type(items).__name__, "pass several: a list of URIs")
    specs = [normalize_item(item, f"items[{index}]") for index, item in enumerate(items)]
    refused, requested = _parse(specs)
    listening = _Listening(progress, callback, on_event, cancel, is_one_of_many=executor is not None)
    options = [{name: spec[name] for name in _OPTIONS if name in spec} for spec in specs]
    tasks = [_Task(index, ref, ensure, listening, options[index]) for ref, index in requested.items()]
    return _results(refused, tasks, executor, listening.stopped, remember)


def normalize_item(item: object, name: str) -> dict[str, Any]:
    """
    Take one item apart into the arguments of `ensure` that choose a model.

    Args:
        name: The item's name in an error. The item itself may hold a secret.
    """
    if isinstance(item, str | os.PathLike | ModelRef):
        return {"uri": item}
    if not isinstance(item, Mapping):
        raise SettingsError(name, f"of type {type(item).__name__}", _HOW_TO_NAME)
    if "uri" not in item or set(item) - {*_FIELDS, *_OPTIONS}:
        raise SettingsError(name, f"a mapping with {', '.join(map(str, item)) or 'nothing'}", _HOW_TO_NAME)
    for option in _OPTIONS:
        if not isinstance(item.get(option, False), bool):
            raise SettingsError(f"{name}, `{option}`", f"of type {type(item[option]).__name__}", "write true or false")
    return dict(item)


def parse_item(item: Mapping[str, Any]) -> ModelRef:
    """
    Return the model that an item names, which was taken apart.

    Raises:
        InvalidURIError, PolicyError: As `parse_ref`.
    """
    return parse_ref(**{name: item[name] for name in _FIELDS if name in item})


def _parse(specs: Sequence[Mapping[str, Any]]) -> tuple[list[FailedModel], dict[ModelRef, int]]:
    """The results of items that are invalid, and every model that is requested, with its place in the list."""
    refused: list[FailedModel] = []
    requested: dict[ModelRef, int] = {}
    for index, spec in enumerate(specs):
        try:
            requested.setdefault(parse_item(spec), index)
        except (InvalidURIError, PolicyError) as error:
            refused.append(FailedModel(index=index, uri=_redacted(spec["uri"]), error=error))
    return refused, requested


def _redacted(uri: Source) -> str:
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
    done = (task() for task in tasks) if executor is None else _as_they_finish(tasks, executor, stopped)
    try:
        yield from refused
        for warmed in done:
            if warmed.model is not None:
                remember(warmed.model)
            yield warmed
    except GeneratorExit:
        raise
    except BaseException as error:
        # Ctrl-C or the end of a pod: downloads of other threads would go on for as long as they take.
        stopped.set()
        done.throw(error)
        raise
    finally:
        done.close()


def _as_they_finish(
    tasks: Sequence[_Task], executor: Executor, stopped: threading.Event
) -> Generator[Warmed, None, None]:
    from concurrent.futures import as_completed

    submitted: dict[Future[Warmed], _Task] = {}
    try:
        for task in tasks:  # Not a comprehension: what was submitted is cancelled if the executor refuses the next.
            with naming_thread_limit("warm"):
                submitted[executor.submit(task)] = task
        for future in as_completed(submitted):
            yield _outcome(future, submitted[future])
    except GeneratorExit:
        raise
    except BaseException as error:
        stopped.set()
        _add_kept(error, submitted)
        raise
    finally:
        for future in submitted:
            future.cancel()


def _add_kept(error: BaseException, submitted: Mapping[Future[Warmed], _Task]) -> None:
    """Add to an interrupt what the downloads keep that it ended in other threads."""
    from concurrent.futures import wait

    from kserve_pvc._download.keeping import describe_kept

    running = [future for future in submitted if not future.cancel() and not future.done()]
    for future in wait(running, timeout=_PATIENCE_SECONDS).done:
        ended = None if future.exception() else future.result().error
        if isinstance(ended, DownloadCancelledError) and ended.size_bytes:
            error.add_note(describe_kept(submitted[future].ref, ended.kept_bytes, ended.size_bytes))


def _outcome(future: Future[Warmed], task: _Task) -> Warmed:
    try:
        return future.result()
    except SettingsError:
        raise  # Not the model failed but the call: it cannot be made in other processes.
    except Exception as error:  # A process that was killed, or an executor that was shut down.
        return FailedModel(index=task.index, uri=task.ref.uri, ref=task.ref, error=error)


class _Task:
    """
    One model to be fetched, by this thread or by the thread or process that an executor chooses.
    """

    def __init__(
        self, index: int, ref: ModelRef, ensure: Ensure, listening: _Listening, options: Mapping[str, Any]
    ) -> None:
        self.index = index
        self.ref = ref
        self._ensure = ensure
        self._listening = listening
        self._options = options

    def __call__(self) -> Warmed:
        started = time.monotonic()
        how = self._listening
        try:
            model = self._ensure(self.ref, listen=how.listen, on_event=how.on_event, cancel=how.cancel, **self._options)
        except Exception as error:  # A third-party backend may raise anything; the other models are still fetched.
            seconds = time.monotonic() - started
            return FailedModel(index=self.index, uri=self.ref.uri, ref=self.ref, error=error, seconds=seconds)
        seconds = time.monotonic() - started
        return WarmedModel(index=self.index, uri=self.ref.uri, ref=self.ref, model=model, seconds=seconds)

    def __reduce__(self) -> tuple[Any, ...]:
        # Only a process pool pickles tasks, and would report what cannot be pickled in the words of pickle.
        import pickle

        try:
            return _unpickle, (pickle.dumps((self.index, self.ref, self._ensure, self._listening, self._options)),)
        except SettingsError:
            raise
        except Exception as error:  # `__reduce__` of a listener or a backend may raise anything.
            why = f"the store cannot be pickled for other processes ({type(error).__name__})"
            raise SettingsError("executor", "a process pool", f"{why}; use a `ThreadPoolExecutor`") from error


def _unpickle(data: bytes) -> _Task:
    import pickle

    return _Task(*pickle.loads(data))


class _Listening:
    """
    What observes the models, and what cancels them. In other processes lines replace bars, which would overwrite each
    other.

    Args:
        is_one_of_many: Several models are fetched at the same time.
    """

    def __init__(
        self,
        progress: bool | None,
        callback: Callback | None = None,
        on_event: Listener | None = None,
        cancel: Cancel | None = None,
        *,
        is_one_of_many: bool,
        may_draw: bool = True,
    ) -> None:
        self.stopped = threading.Event()
        self.on_event = on_event
        self.cancel: Cancel = AnyOf(self.stopped, cancel)
        self._progress = progress
        # What is of no use in another process, by the name of its argument.
        self._local = {"callback": callback, "on_event": on_event, "cancel": cancel}
        self._is_one_of_many = is_one_of_many
        self._may_draw = may_draw
        self._part: Callable[[], Callback] | None = None
        if callback is not None:
            from kserve_pvc._show.progress import share

            self._part = share(callback)

    @contextmanager
    def listen(self) -> Iterator[Listener]:
        """
        Show one model.
        """
        from kserve_pvc._show.progress import make_listener

        callback = None if self._part is None else self._part()
        with make_listener(
            self._progress, callback, names_model=self._is_one_of_many, may_draw=self._may_draw
        ) as listener:
            yield listener

    def __reduce__(self) -> tuple[Any, ...]:
        for name, value in self._local.items():
            if value is not None:
                raise SettingsError(name, "an object of this process", _NOT_WITH_PROCESSES)
        return _in_another_process, (self._progress,)


_NOT_WITH_PROCESSES = "a process pool cannot use it; use a `ThreadPoolExecutor`"


def _in_another_process(progress: bool | None) -> _Listening:
    return _Listening(progress, is_one_of_many=True, may_draw=False)
