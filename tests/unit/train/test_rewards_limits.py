"""Time limits for calls: in the main thread, in another thread, and in an event loop."""

from __future__ import annotations

import asyncio
import signal
import threading
import time

import pytest

from toolkit.base.time_limits import OutOfTime, call_within
from toolkit.train.rewards.reward_call import LoopThread


def test_limits_nest_and_restore_the_alarm() -> None:
    alarms: list[int] = []
    old = signal.signal(signal.SIGALRM, lambda *_: alarms.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(OutOfTime, match=r"longer than 0\.05 s"):
            call_within(5, lambda: call_within(0.05, lambda: time.sleep(10)))
        assert call_within(5, lambda: call_within(5, lambda: 7)) == 7
        assert alarms == []
        time.sleep(0.5)
        assert alarms == [1]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def test_a_very_short_limit_raises_at_once() -> None:
    for _ in range(50):
        with pytest.raises(OutOfTime, match="longer than 1e-06 s"):
            call_within(1e-6, lambda: time.sleep(10))


def test_the_outer_limit_still_counts_after_an_inner_one() -> None:
    def work() -> None:
        call_within(5, lambda: None)
        time.sleep(10)

    started = time.monotonic()
    with pytest.raises(OutOfTime):
        call_within(0.2, work)
    assert time.monotonic() - started < 8


def test_limits_work_in_another_thread() -> None:
    outcomes: list[object] = []

    def work() -> None:
        try:
            call_within(0.1, lambda: time.sleep(2))
        except OutOfTime as error:
            outcomes.append(str(error))
        outcomes.append(call_within(5, lambda: 7))
        try:
            call_within(5, lambda: 1 / 0)
        except ZeroDivisionError:
            outcomes.append("raised")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert outcomes == ["took longer than 0.1 s", 7, "raised"]


def test_all_calls_share_one_event_loop() -> None:
    async def loop_id() -> int:
        return id(asyncio.get_running_loop())

    loop = LoopThread()
    assert loop.call_within(5, loop_id()) == loop.call_within(None, loop_id())
