"""The effect of a signal in each phase of a run."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress

import pytest

from toolkit.train.checkpointing.stop_signals import SIGNALS, StepAbandoned, StopSignals


@pytest.fixture(autouse=True)
def default_sighup():
    """Handle SIGHUP by default, because nohup starts the tests with SIGHUP ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_stops_the_run_at_once_while_there_is_nothing_to_save(number):
    with StopSignals().installed() as signals:
        with pytest.raises(StepAbandoned, match=number.name):
            send(number)
        assert signals.received == number.name


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_during_training_sets_a_flag(number):
    with StopSignals().installed() as signals, signals.stop_at_step_end():
        send(number)
        assert signals.received == number.name


def test_no_number_of_signals_interrupts_the_writing_of_a_checkpoint():
    with StopSignals(grace_s=0.01).installed() as signals, signals.stop_at_step_end():
        signals.shield()
        for number in (*SIGNALS, signal.SIGINT, signal.SIGINT) * 5:
            send(number)
        assert signals.received == "SIGTERM"
        signals.begin_shutdown()
        signals.unshield()
        time.sleep(0.3)  # no alarm arrives any more
        send(signal.SIGINT)
        assert signals.received == "SIGTERM"


def test_the_previous_handler_ignores_signals_once_the_run_ends():
    with StopSignals().installed() as outer:
        with StopSignals().installed() as signals:
            signals.begin_shutdown()
        send(signal.SIGTERM)
        assert outer.received is None
        assert outer.is_shutting_down


def test_after_a_second_interrupt_no_other_signal_changes_the_exit_code():
    with StopSignals().installed() as outer:
        with suppress(KeyboardInterrupt), StopSignals().installed() as signals:
            signals.stops_immediately = False
            send(signal.SIGINT)
            send(signal.SIGINT)
            raise AssertionError("the second SIGINT was ignored")
        send(signal.SIGHUP)
        assert outer.received is None
        assert outer.is_shutting_down


def test_an_ignored_sighup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals().installed() as signals, signals.stop_at_step_end():
            send(signal.SIGHUP)
            assert signals.received is None
            signals.ignore_signals()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_second_interrupt_stops_at_once():
    with StopSignals().installed() as signals, signals.stop_at_step_end():
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_a_long_step_is_abandoned_but_never_while_shielded():
    with StopSignals(grace_s=0.05).installed() as signals, signals.stop_at_step_end():
        signals.shield()
        send(signal.SIGTERM)
        time.sleep(0.5)  # the alarm has no effect while shielded, and repeats
        signals.unshield()
        with pytest.raises(StepAbandoned):
            time.sleep(5)


def test_ranks_that_stop_together_are_never_interrupted():
    with (
        StopSignals(abandon=False, grace_s=0.05).installed() as signals,
        signals.stop_at_step_end(),
    ):
        send(signal.SIGTERM)
        time.sleep(0.2)
        assert signals.received == "SIGTERM"


def test_the_previous_handlers_are_restored():
    before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGALRM)}
    with StopSignals().installed():
        assert signal.getsignal(signal.SIGTERM) is not before[signal.SIGTERM]
    assert {number: signal.getsignal(number) for number in before} == before


def test_except_exception_does_not_catch_step_abandoned():
    assert not issubclass(StepAbandoned, Exception)
