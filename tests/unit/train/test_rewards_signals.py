"""A signal arrives while a reward with a time limit runs. The alarm of the run is not lost."""

from __future__ import annotations

import os
import signal
import time

import pytest

from toolkit.base.time_limits import OutOfTime, call_within
from toolkit.train.checkpointing.stop_signals import StepAbandoned, StopSignals


def sigterm_and_sleep(seconds: float) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(seconds)


def test_a_reward_that_exceeds_the_grace_time_is_abandoned_with_its_step():
    signals = StopSignals(grace_s=0.2)
    begin = time.monotonic()
    with signals.installed(), signals.stop_at_step_end(), pytest.raises(StepAbandoned):
        call_within(20, lambda: sigterm_and_sleep(20))
    assert time.monotonic() - begin < 5
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_the_grace_time_continues_after_the_reward():
    signals = StopSignals(grace_s=0.4)
    with signals.installed(), signals.stop_at_step_end():
        call_within(20, lambda: sigterm_and_sleep(0.1))
        with pytest.raises(StepAbandoned):
            time.sleep(20)


def test_a_hanging_reward_is_interrupted_by_the_alarm_of_the_run_at_the_latest():
    signals = StopSignals(grace_s=0.5)
    with signals.installed(), signals.stop_at_step_end():
        signals.shield()
        with pytest.raises(OutOfTime):
            call_within(0.3, lambda: sigterm_and_sleep(20))
        assert signals.received == "SIGTERM"
