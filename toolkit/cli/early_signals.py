"""Handle the signals that arrive before ``toolkit train`` has installed its own handlers.

The imports and the reading of the run file take seconds. A job that is preempted in these seconds
must not look like a failed job. Therefore a signal ends the process with the exit code of a stopped
run.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from toolkit.base.streams import ignore_lost_streams
from toolkit.cli.lazy_group import LazyGroup

if TYPE_CHECKING:
    from collections.abc import Iterator


class StoppableGroup(LazyGroup):
    """A click group that treats the command ``train`` specially.

    As soon as ``train`` starts, signals are handled. If standard output is closed, ``train``
    continues.
    """

    def main(self, *args: Any, **kwargs: Any) -> Any:
        words = kwargs.get("args", args[0] if args else None)
        words = sys.argv[1:] if words is None else words
        if next((word for word in words if not word.startswith("-")), None) != "train":
            return super().main(*args, **kwargs)
        with early_stop_signals(), ignore_lost_streams():
            return super().main(*args, **kwargs)


@contextmanager
def early_stop_signals() -> Iterator[None]:
    """Inside the block, a signal that stops a run raises StoppedError.

    If the process belongs to a run with several ranks, a signal ends it without a StoppedError,
    because the launcher of the ranks reports the signal once for all ranks.
    """
    from toolkit.train.checkpointing.stop_signals import StepAbandoned, StopSignals  # noqa: PLC0415 - only for train
    from toolkit.train.launch import end_with_launcher, stopped_early_error  # noqa: PLC0415 - only for train

    if "RANK" in os.environ:
        end_with_launcher()
        yield
        return
    signals = StopSignals()
    try:
        with signals.installed():
            try:
                yield
            finally:
                if signals.received is not None or signals.is_shutting_down:
                    # Further signals must not cut off the remaining output or change the exit code.
                    signals.ignore_signals()
    # An exception that a signal raises during the import of a compiled module arrives here as an
    # ImportError.
    except (StepAbandoned, ImportError):
        if signals.received is None:
            raise
        raise stopped_early_error(signals.received) from None
