"""Coroutines of a reward, in an event loop that is kept, for a limited time."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import wait
from typing import TYPE_CHECKING, Any, TypeVar

from toolkit.base.time_limits import OutOfTime

if TYPE_CHECKING:
    from collections.abc import Coroutine

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
