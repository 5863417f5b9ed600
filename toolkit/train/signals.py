"""Stop on purpose: a signal asks, the next safe point answers, and a step that is too long is
abandoned.

SIGTERM, SIGINT and SIGUSR1 (Slurm's warning) set a flag that the trainer reads at the end of a
step. Where no step ends within ``GRACE_S``, the step under way is abandoned by an exception in the
main thread and the state at its beginning is what is saved; ``shielded`` code is never cut. A
second SIGINT stops at once.
"""

from __future__ import annotations

import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
GRACE_S = 8.0
RETRY_S = 0.2


class Abandoned(BaseException):
    """The step under way was cut. A BaseException, so that no ``except Exception`` swallows it."""


class StopSignals:
    """What has been asked for.

    ``immediate`` holds while there is nothing to lose (loading, judging): a signal cuts at once.
    With ``abandon`` False, where ranks must stop together, a step under way is never cut.
    """

    def __init__(self, *, abandon: bool = True, grace_s: float | None = None) -> None:
        self.received: str | None = None
        self.immediate = True
        self._interrupts = 0
        self._shields = 0
        self._ignored = False
        self._abandon = abandon
        self._grace_s = GRACE_S if grace_s is None else grace_s

    @contextmanager
    def installed(self) -> Iterator[StopSignals]:
        """Listen while the block runs, and put back what listened before. Main thread only."""
        before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGALRM)}
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGALRM, self._on_alarm)
        try:
            yield self
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items() if not self._ignored else ():
                signal.signal(number, handler)

    def ignore(self) -> None:
        """The process is about to end by itself, and has something to say first."""
        self._ignored = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def agree(self, number: int) -> None:
        """The ranks have agreed to stop for signal ``number``, which came to one of them."""
        self.received = self.received or signal.Signals(number).name

    @property
    def number(self) -> int:
        """Of the signal that was received, or 0."""
        return 0 if self.received is None else int(signal.Signals[self.received])

    @contextmanager
    def at_steps(self) -> Iterator[None]:
        """In the block a signal waits for the end of a step, or abandons one that is long."""
        self.immediate = False
        try:
            yield
        finally:
            self.settle()
            self.immediate = True

    def shield(self) -> None:
        """From here to ``unshield`` nothing is cut (weights and files change)."""
        self._shields += 1

    def unshield(self) -> None:
        """The weights and the files are whole again."""
        self._shields = max(0, self._shields - 1)

    def settle(self) -> None:
        """The run is at a safe point: no alarm may come any more."""
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
        if self.received is not None:
            return
        self.received = signal.Signals(number).name
        if self.immediate:
            raise Abandoned(self.received)
        if self._abandon:
            signal.setitimer(signal.ITIMER_REAL, self._grace_s)

    def _on_alarm(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self.immediate or self.received is None:  # a reward's own alarm
            return
        if self._shields:
            signal.setitimer(signal.ITIMER_REAL, RETRY_S)
            return
        raise Abandoned(self.received)
