"""Call a reward function once, with copies of its arguments, a time limit, and a check of the
result.

The training process and the reward worker process use this module. Therefore both processes treat a
faulty reward in the same way.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
from concurrent.futures import wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from toolkit.base.errors import ToolkitError
from toolkit.base.time_limits import OutOfTime, call_within
from toolkit.train.checkpointing.stop_signals import StepAbandoned
from toolkit.train.rewards.score_checks import Failure, UserCodeFailed, check_scores, failure_from

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from toolkit.train.rewards.builtin import Score

T = TypeVar("T")
_LOOP_RESPONSE_S = 0.1  # an event loop that does not react within this time counts as blocked


class LoopThread:
    """An event loop in a daemon thread.

    All calls of a reward share the loop, because an async client (for example an HTTP client) works
    only in the loop in which it was created. A coroutine that exceeds its time limit is cancelled.
    If blocking code in a coroutine blocks the loop, the loop is abandoned, and the next call gets a
    new loop.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def call_within(self, seconds: float | None, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run ``coroutine`` in the event loop. Return its result or raise its exception.

        Raises OutOfTime after ``seconds`` (None: no limit).
        """
        loop = self._loop = self._loop or self._start()
        future = asyncio.run_coroutine_threadsafe(coroutine, loop)
        if wait([future], seconds).done:
            return future.result()
        future.cancel()
        responded = threading.Event()
        loop.call_soon_threadsafe(responded.set)
        if not responded.wait(_LOOP_RESPONSE_S):
            self._loop = None
        raise OutOfTime(f"took longer than {seconds:g} s")

    @staticmethod
    def _start() -> asyncio.AbstractEventLoop:
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, daemon=True, name="reward-loop").start()
        return loop


_IMMUTABLE_TYPES = {int, float, str, bool, type(None), bytes}
_RUN_SIGNAL_ERRORS = (KeyboardInterrupt, StepAbandoned)


class Batch(NamedTuple):
    """The arguments of a reward call."""

    prompts: list[Any]
    completions: list[Any]
    columns: dict[str, Any]

    def sample(self, index: int) -> Batch:
        """Return a batch that contains only the sample at ``index``.

        Values that a reward function logs when it is called with this batch are dropped.
        """
        size = len(self.completions)
        columns = {
            key: [value[index]] if isinstance(value, list) and len(value) == size else value
            for key, value in self.columns.items()
        }
        columns |= {key: ignore_log for key in ("log_extra", "log_metric") if key in columns}
        return Batch([self.prompts[index]], [self.completions[index]], columns)


def call_reward(
    function: Callable[..., Any], batch: Batch, seconds: float | None, loop: LoopThread
) -> list[Score | Failure]:
    """Call the reward ``function`` with a copy of ``batch``. Return one item per completion: its
    score, or a ``Failure`` (the description of an error) if the returned value is invalid.

    Raises UserCodeFailed if the whole call fails and there are no scores. ToolkitError is raised
    unchanged. KeyboardInterrupt and StepAbandoned are also raised unchanged, because they come from
    a signal to the run and not from the reward.
    """
    copies = {name: copy_containers(value) for name, value in batch.columns.items()}
    prompts, completions = copy_containers(batch.prompts), copy_containers(batch.completions)
    call = partial(function, prompts=prompts, completions=completions, **copies)
    size = len(batch.completions)
    try:
        with preserve_process_state():
            if not is_async(function):
                return call_within(seconds, lambda: check_scores(call(), size))
            result = loop.call_within(seconds, _await_scores(call(), size))
        if isinstance(result, BaseException):
            raise result
        return result
    except (UserCodeFailed, ToolkitError):
        raise  # an error of the toolkit itself, for example a missing column
    except OutOfTime as error:
        raise UserCodeFailed(Failure(str(error))) from error
    except BaseException as error:
        signal_error = _signal_error_in(error)
        if signal_error is not None:
            raise signal_error from None
        raise UserCodeFailed(failure_from(error)) from error


def copy_containers(value: object) -> Any:
    """``value`` with copies of all its lists and dicts, so that a reward cannot change the
    arguments of other rewards.
    """
    if isinstance(value, list):
        return (
            value[:]
            if set(map(type, value)) <= _IMMUTABLE_TYPES
            else [copy_containers(item) for item in value]
        )
    if isinstance(value, dict):
        return {key: copy_containers(item) for key, item in value.items()}
    return value


def is_async(function: Callable[..., Any]) -> bool:
    """Whether a call of ``function`` returns a coroutine. The result is the same as that of
    ``is_async_callable`` in TRL 1.16.
    """
    while isinstance(function, partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        type(function).__call__
    )


def ignore_log(*_: Any) -> None:
    """Do nothing. A reward gets this function as ``log_metric`` and ``log_extra`` if the values of
    the reward must not be logged.
    """
    return


async def _await_scores(
    coroutine: Coroutine[Any, Any, Any], size: int
) -> list[Score | Failure] | BaseException:
    """Await the ``coroutine`` of a reward. Return its checked result, or the exception that it
    raised.

    The exception is returned and not raised, because a SystemExit in a task would end the thread of
    the event loop.
    """
    try:
        return check_scores(await coroutine, size)
    except BaseException as error:  # noqa: BLE001 - the caller raises it
        return error


def _signal_error_in(error: BaseException) -> BaseException | None:
    """Return ``error`` if a signal to the run caused it (KeyboardInterrupt or StepAbandoned).
    Return None if the reward itself raised ``error``.

    If ``error`` is an exception group, return the first such exception among its members.
    """
    if isinstance(error, _RUN_SIGNAL_ERRORS):
        return error
    if isinstance(error, BaseExceptionGroup):
        signal_errors = (_signal_error_in(member) for member in error.exceptions)
        return next((member for member in signal_errors if member is not None), None)
    return None


@contextmanager
def preserve_process_state() -> Iterator[None]:
    """After the ``with`` block, restore the umask and the working folder of the process. User code
    in the block may have changed them.
    """
    umask, folder = _current_umask(), _working_folder()
    try:
        yield
    finally:
        os.umask(umask)
        if folder is not None and _working_folder() != folder:
            os.chdir(folder)


def _working_folder() -> Path | None:
    try:
        return Path.cwd()
    except OSError:  # the working folder was removed
        return None


def _current_umask() -> int:
    """The umask of this process.

    If possible, the umask is read from /proc. os.umask can read the umask only by changing it for a
    moment. A file that another thread creates in this moment would have the wrong permissions.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    except OSError:
        pass
    umask = os.umask(0o022)
    os.umask(umask)
    return umask
