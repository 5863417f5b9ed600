"""Call code that may never end, with a limit on time and memory.

Python cannot stop a thread. A thread in an endless loop continues to use CPU time. A thread in an
endless regular expression keeps the interpreter lock, and no other thread can run. A timer signal
has neither problem, but it works only in the main thread. It interrupts loops, sleeps, sockets,
locks and regular expressions. So ``call_within`` uses a timer signal in the main thread. In any
other thread it makes the call in a new daemon thread, and abandons this thread when the time is
over.

Neither method stops native code that never returns to Python, or code that catches every exception
in a loop. So the reward functions of the user run in a process that can be killed
(train/rewards/worker).
"""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

T = TypeVar("T")
_ALARM_REPEAT_S = 1.0  # the alarm repeats, because the called code may catch the first one


class OutOfTime(Exception):
    """The call did not return in time."""


class _AlarmFired(BaseException):
    """The exception that the timer signal raises in the called code when the time is over. It is
    not an ``Exception``, so ``except Exception`` in the called code does not catch it.
    """


def call_within(seconds: float | None, call: Callable[[], T]) -> T:
    """Return what ``call`` returns, or raise what it raises. Raises OutOfTime after ``seconds``
    (None: no limit).
    """
    if seconds is None:
        return call()
    if threading.current_thread() is threading.main_thread():
        return _call_with_alarm(seconds, call)
    return _call_in_thread(seconds, call)


def _call_with_alarm(seconds: float, call: Callable[[], T]) -> T:
    is_armed = True
    deadline = time.monotonic() + seconds

    def on_alarm(signum: int, frame: FrameType | None) -> None:
        remaining_s = deadline - time.monotonic()
        if remaining_s > 0:
            # This alarm is not from this module: a signal handler set it during the call.
            signal.setitimer(signal.ITIMER_REAL, remaining_s, _ALARM_REPEAT_S)
            if callable(old_handler):
                old_handler(signum, frame)
        elif is_armed:
            raise _AlarmFired

    started = time.monotonic()
    old_handler = signal.signal(signal.SIGALRM, on_alarm)
    old_remaining_s, old_interval = signal.getitimer(signal.ITIMER_REAL)
    try:
        try:
            # the alarm may fire immediately
            signal.setitimer(signal.ITIMER_REAL, seconds, _ALARM_REPEAT_S)
            return call()
        finally:
            is_armed = False
    except _AlarmFired:
        raise OutOfTime(f"took longer than {seconds:g} s") from None
    finally:
        is_armed = False
        remaining_s, interval = signal.setitimer(signal.ITIMER_REAL, 0)
        if remaining_s and interval != _ALARM_REPEAT_S and callable(old_handler):
            # The called code set this alarm, so it must stay set.
            old_remaining_s, old_interval = remaining_s, interval
        elif old_remaining_s:  # the alarm that was set before the call continues
            old_remaining_s = max(old_remaining_s - (time.monotonic() - started), 1e-3)
        signal.signal(signal.SIGALRM, old_handler or signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, old_remaining_s, old_interval)


def _call_in_thread(seconds: float, call: Callable[[], T]) -> T:
    outcome: Future[T] = Future()

    def work() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:  # noqa: BLE001 - the error is raised again in the caller's thread
            outcome.set_exception(error)

    threading.Thread(target=work, daemon=True, name="toolkit-time-limit").start()
    if not wait([outcome], seconds).done:
        raise OutOfTime(f"took longer than {seconds:g} s")
    return outcome.result()


@contextmanager
def limit_extra_memory(extra_bytes: int) -> Iterator[None]:
    """Inside the ``with`` block, let this process allocate at most ``extra_bytes`` in addition to
    its present memory. Allocations above this limit raise MemoryError.

    The limit applies to all threads. So keep the block short, and let no other thread run
    meanwhile.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        current_bytes = _address_space_bytes()
    except OSError:
        yield  # without /proc the memory is not limited
        return
    limits = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([current_bytes + extra_bytes, *limits]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_space_bytes() -> int:
    """Bytes of this process's address space. Raises OSError without /proc."""
    handle = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return int(os.read(handle, 64).split(maxsplit=1)[0]) * resource.getpagesize()
    finally:
        os.close(handle)
