"""Call code that may hang, for a limited time.

A thread cannot be cut: a loop continues to take the interpreter's time, and a pattern that
backtracks without end holds the interpreter lock, so that no other thread can notice. A timer
signal in the main thread cuts loops, sleeps, sockets, locks and patterns, and leaves nothing
behind. So that is what is used in a main thread, and elsewhere a daemon thread that is left to
itself when its time is up. Neither cuts native code that never returns to Python, nor code that
catches everything in a loop: for those, rewards of the user's run in a process that is killed
(rewards/worker).
"""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from types import FrameType

T = TypeVar("T")
_AGAIN_S = 1.0  # the alarm repeats: code that swallows one is cut by a later one
_ANSWER_S = 0.1  # how long a loop may take to show that it is not blocked


class OutOfTime(Exception):
    """The call did not return in time."""


class _Cut(BaseException):
    """Raised inside the call; no ``except Exception`` of the called code stops it."""


def call_within(seconds: float | None, call: Callable[[], T]) -> T:
    """What ``call`` returns or raises; OutOfTime after ``seconds`` (None: no limit)."""
    if seconds is None:
        return call()
    if threading.current_thread() is threading.main_thread():
        return _with_alarm(seconds, call)
    return _with_thread(seconds, call)


def _with_alarm(seconds: float, call: Callable[[], T]) -> T:
    armed = True
    deadline = time.monotonic() + seconds

    def on_alarm(signum: int, frame: FrameType | None) -> None:
        left = deadline - time.monotonic()
        if left > 0:
            # Not ours: a signal that came inside the call has set the run's alarm.
            signal.setitimer(signal.ITIMER_REAL, left, _AGAIN_S)
            if callable(old_handler):
                old_handler(signum, frame)
        elif armed:
            raise _Cut

    started = time.monotonic()
    old_handler = signal.signal(signal.SIGALRM, on_alarm)
    old_left, old_interval = signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN_S)
    try:
        try:
            return call()
        finally:
            armed = False
    except _Cut:
        raise OutOfTime(f"took longer than {seconds:g} s") from None
    finally:
        armed = False
        left, interval = signal.setitimer(signal.ITIMER_REAL, 0)
        if left and interval != _AGAIN_S and callable(old_handler):
            # The run's, set inside the call: it continues to count.
            old_left, old_interval = left, interval
        elif old_left:  # a limit around this one goes on counting
            old_left = max(old_left - (time.monotonic() - started), 1e-3)
        signal.signal(signal.SIGALRM, old_handler or signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, old_left, old_interval)


def _with_thread(seconds: float, call: Callable[[], T]) -> T:
    outcome: Future[T] = Future()

    def work() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:  # noqa: BLE001 - carried to the caller, who decides
            outcome.set_exception(error)

    threading.Thread(target=work, daemon=True, name="reward").start()
    if not wait([outcome], seconds).done:
        raise OutOfTime(f"took longer than {seconds:g} s")
    return outcome.result()


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
