"""Stop on a signal at the next safe point. A step that takes too long is abandoned.

SIGTERM, SIGINT, SIGUSR1 (Slurm's warning) and SIGHUP (a terminal that closes) set a flag that the
trainer reads at the end of a step. If no step ends within ``GRACE_S``, an exception in the main
thread abandons the current step, and the state at its beginning is saved. Code between ``shield``
and ``unshield`` is never interrupted. A second SIGINT stops at once, unless a checkpoint is being
written or the run has begun to end. A SIGHUP that was already ignored (nohup) stays ignored.
"""

from __future__ import annotations

import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
GRACE_S = 8.0
RETRY_S = 0.2


class StepAbandoned(BaseException):
    """The current step was interrupted. It is a BaseException, so that ``except Exception`` does
    not catch it.
    """


def handled_signals() -> tuple[signal.Signals, ...]:
    """The signals that stop this process: all of ``SIGNALS``, except a SIGHUP that was already
    ignored.
    """
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return tuple(number for number in SIGNALS if not (ignored and number == signal.SIGHUP))


class StopSignals:
    """Records the first signal that was received, and decides when this signal may stop the run.

    ``stops_immediately`` is true while there is nothing to save (loading, checks). A signal then
    stops the run at once.

    If ``abandon`` is True, a step that does not end within ``grace_s`` seconds after the signal is
    interrupted. A run with several ranks sets ``abandon`` to False, because all ranks must stop at
    the same step.
    """

    def __init__(self, *, abandon: bool = True, grace_s: float | None = None) -> None:
        self.received: str | None = None
        self.stops_immediately = True
        self._interrupts = 0
        self._shields = 0
        self._ignored = False
        self._ended = False
        self._can_abandon = abandon
        self._grace_s = GRACE_S if grace_s is None else grace_s

    @contextmanager
    def installed(self) -> Iterator[StopSignals]:
        """Handle signals inside the ``with`` block, and restore the previous handlers afterwards.
        Call this only in the main thread.

        After ``begin_shutdown``, this object ignores all signals. A previous handler may belong to
        another ``StopSignals`` object. If ``begin_shutdown`` was called inside the ``with`` block,
        or the block ends with KeyboardInterrupt, that other object then ignores all signals too.
        """
        numbers = handled_signals()
        previous = {number: signal.getsignal(number) for number in (*numbers, signal.SIGALRM)}
        for number in numbers:
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGALRM, self._on_alarm)
        try:
            yield self
        except KeyboardInterrupt:
            self.begin_shutdown()  # another signal must not change the exit code
            raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            if self._ended:
                notify_shutdown(previous.values())
            for number, handler in previous.items() if not self._ignored else ():
                signal.signal(number, handler)

    def ignore_signals(self) -> None:
        """Ignore further signals, because the process will end by itself and must first write its
        output.
        """
        self._ignored = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number in handled_signals():
            signal.signal(number, signal.SIG_IGN)

    def begin_shutdown(self) -> None:
        """Begin to end the run because of the received signal. Later signals are ignored."""
        self._ended = True
        signal.setitimer(signal.ITIMER_REAL, 0)

    def record_agreed_signal(self, number: int) -> None:
        """Record that the ranks have agreed to stop for signal ``number``, which one of them
        received.
        """
        self.received = self.received or signal.Signals(number).name

    @property
    def is_shutting_down(self) -> bool:
        """True if a received signal is ending the run (``begin_shutdown`` was called)."""
        return self._ended

    @property
    def signal_number(self) -> int:
        """The number of the received signal, or 0."""
        return 0 if self.received is None else int(signal.Signals[self.received])

    @contextmanager
    def stop_at_step_end(self) -> Iterator[None]:
        """Inside the ``with`` block, a signal stops the run at the end of the current step. A step
        that takes too long is abandoned.
        """
        self.stops_immediately = False
        try:
            yield
        finally:
            self.cancel_alarm()
            self.stops_immediately = True

    def shield(self) -> None:
        """Prevent the interruption of a step until ``unshield`` is called, because weights or files
        are about to change.
        """
        self._shields += 1

    def unshield(self) -> None:
        """Allow interruption again, because weights and files are consistent."""
        self._shields = max(0, self._shields - 1)

    def cancel_alarm(self) -> None:
        """Cancel the alarm, because the run is at a safe point."""
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._ended:
            return
        is_repeated = self.received is not None
        self.received = self.received or signal.Signals(number).name
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1 and not self._shields:
                # While loading, treat the second SIGINT like the first, whose exception may have
                # been lost.
                raise StepAbandoned(self.received) if self.stops_immediately else KeyboardInterrupt
        if is_repeated:
            return
        if self.stops_immediately:
            raise StepAbandoned(self.received)
        if self._can_abandon:
            signal.setitimer(signal.ITIMER_REAL, self._grace_s)

    def _on_alarm(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        # If no signal was received, a reward function set the alarm.
        if self.stops_immediately or self._ended or self.received is None:
            return
        if self._shields:
            signal.setitimer(signal.ITIMER_REAL, RETRY_S)
            return
        raise StepAbandoned(self.received)


def notify_shutdown(handlers: Iterable[Any]) -> None:
    """Tell ``StopSignals`` objects that the process has begun to end. If one of the signal
    ``handlers`` is a method of a ``StopSignals`` object, ``begin_shutdown`` of this object is
    called.
    """
    for handler in handlers:
        owner = getattr(handler, "__self__", None)
        if isinstance(owner, StopSignals):
            owner.begin_shutdown()
