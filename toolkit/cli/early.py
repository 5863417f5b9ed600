"""Handle signals before the run installs its own handlers: a signal then ends the process with the
exit code of a stopped run.

Reading the command line, the run file and the imports takes seconds. A job that is preempted in
this time must not look like a failed job.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from toolkit.base.streams import outliving
from toolkit.cli.lazy import LazyGroup

if TYPE_CHECKING:
    from collections.abc import Iterator


class StoppableGroup(LazyGroup):
    """A click group whose command ``train`` can be stopped as soon as its command line is read, and
    continues if its output is lost.
    """

    def main(self, *args: Any, **kwargs: Any) -> Any:
        words = kwargs.get("args", args[0] if args else None)
        words = sys.argv[1:] if words is None else words
        if next((word for word in words if not word.startswith("-")), None) != "train":
            return super().main(*args, **kwargs)
        with listening_early(), outliving():
            return super().main(*args, **kwargs)


@contextmanager
def listening_early() -> Iterator[None]:
    """Inside the block, a signal raises StoppedError. With several ranks no rank raises it, because
    their launcher reports the signal once.
    """
    from toolkit.train.checkpointing.stop_signals import StepAbandoned, StopSignals  # noqa: PLC0415 - as above
    from toolkit.train.launch import follow_launcher, stopped_early  # noqa: PLC0415 - only here

    if "RANK" in os.environ:
        follow_launcher()
        yield
        return
    early = StopSignals()
    try:
        with early.installed():
            try:
                yield
            finally:
                if early.received is not None or early.ended:
                    # the output that remains is still printed, and the exit code stays
                    early.ignore()
    # Compiled modules turn an exception that is raised inside them into an ImportError.
    except (StepAbandoned, ImportError):
        if early.received is None:
            raise
        raise stopped_early(early.received) from None
