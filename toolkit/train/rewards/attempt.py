"""One call of a reward function, wherever it runs: with copies, under a time limit, judged.

Both the process that trains (rewards that run in it) and the worker use this, so a reward that
misbehaves is treated the same in either.
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
from toolkit.train.checkpointing.stop_signals import Abandoned
from toolkit.train.rewards.returned import Misbehaved, Trouble, checked, raised

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from toolkit.train.rewards.builtin import Score

T = TypeVar("T")
_ANSWER_S = 0.1  # how long a loop may take to show that it is not blocked


class LoopThread:
    """An event loop in a daemon thread, kept for all calls: clients stay bound to one loop.

    A coroutine that is out of time is cancelled; a loop that no longer answers (blocking code in
    a coroutine) is left to itself, and the next call gets a new one.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def call_within(self, seconds: float | None, coroutine: Coroutine[Any, Any, T]) -> T:
        """What ``coroutine`` returns or raises; OutOfTime after ``seconds`` (None: no limit)."""
        loop = self._loop = self._loop or self._start()
        outcome = asyncio.run_coroutine_threadsafe(coroutine, loop)
        if wait([outcome], seconds).done:
            return outcome.result()
        outcome.cancel()
        answered = threading.Event()
        loop.call_soon_threadsafe(answered.set)
        if not answered.wait(_ANSWER_S):
            self._loop = None
        raise OutOfTime(f"took longer than {seconds:g} s")

    @staticmethod
    def _start() -> asyncio.AbstractEventLoop:
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, daemon=True, name="reward-loop").start()
        return loop


_PLAIN = {int, float, str, bool, type(None), bytes}
_THE_RUNS = (KeyboardInterrupt, Abandoned)


class Batch(NamedTuple):
    """What a reward is called with."""

    prompts: list[Any]
    completions: list[Any]
    columns: dict[str, Any]

    def only(self, index: int) -> Batch:
        """The sample at ``index`` as a batch of one; what the function logs is then dropped."""
        size = len(self.completions)
        columns = {
            key: [value[index]] if isinstance(value, list) and len(value) == size else value
            for key, value in self.columns.items()
        }
        columns |= {key: drop for key in ("log_extra", "log_metric") if key in columns}
        return Batch([self.prompts[index]], [self.completions[index]], columns)


def attempt(
    function: Callable[..., Any], batch: Batch, seconds: float | None, loop: LoopThread
) -> list[Score | Trouble]:
    """Call ``function``; each value is checked.

    Raises Misbehaved, the run's own KeyboardInterrupt and Abandoned, and ToolkitError.
    """
    copies = {name: copied(value) for name, value in batch.columns.items()}
    prompts, completions = copied(batch.prompts), copied(batch.completions)
    call = partial(function, prompts=prompts, completions=completions, **copies)
    size = len(batch.completions)
    try:
        with _process_kept():
            if not is_async(function):
                return call_within(seconds, lambda: checked(call(), size))
            ended = loop.call_within(seconds, _awaited(call(), size))
        if isinstance(ended, BaseException):
            raise ended
        return ended
    except (Misbehaved, ToolkitError):
        raise  # ours: judged already, or a column that is not there
    except OutOfTime as error:
        raise Misbehaved(Trouble(str(error))) from error
    except BaseException as error:
        the_runs = _from_the_run(error)
        if the_runs is not None:
            raise the_runs from None
        raise Misbehaved(raised(error)) from error


def copied(value: Any) -> Any:
    """A copy of the lists and dicts in ``value``: what a reward does to them no one else sees."""
    if isinstance(value, list):
        return value[:] if set(map(type, value)) <= _PLAIN else [copied(item) for item in value]
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return value


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling it gives a coroutine, by the rule of TRL 1.16's ``is_async_callable``."""
    while isinstance(function, partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        type(function).__call__
    )


def drop(*_: Any) -> None:
    """In the place of ``log_metric`` and ``log_extra`` where nothing is logged."""
    return


async def _awaited(
    coroutine: Coroutine[Any, Any, Any], size: int
) -> list[Score | Trouble] | BaseException:
    """What it gave, judged, or raised: a SystemExit in a task would end the loop's thread."""
    try:
        return checked(await coroutine, size)
    except BaseException as error:  # noqa: BLE001 - carried to the caller, who decides
        return error


def _from_the_run(error: BaseException) -> BaseException | None:
    """A signal's own exception, alone or in a group; None where the reward raised by itself."""
    if isinstance(error, _THE_RUNS):
        return error
    if isinstance(error, BaseExceptionGroup):
        found = (_from_the_run(part) for part in error.exceptions)
        return next((part for part in found if part is not None), None)
    return None


@contextmanager
def _process_kept() -> Iterator[None]:
    """The umask and the working folder are afterwards what they were: the run writes files."""
    umask, folder = _umask(), _folder()
    try:
        yield
    finally:
        os.umask(umask)
        if folder is not None and _folder() != folder:
            os.chdir(folder)


def _folder() -> Path | None:
    try:
        return Path.cwd()
    except OSError:  # it is gone
        return None


def _umask() -> int:
    """Of this process, read without setting it: other threads make files."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    except OSError:
        pass
    umask = os.umask(0o022)
    os.umask(umask)
    return umask
