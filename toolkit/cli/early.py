"""Signals before a run listens to them itself: they end it with the code of a run that was stopped.

The command line, the run file and the imports take seconds, in which a preempted job is to be told
apart from a failed one.
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
    """Its command ``train`` may be stopped from the first look at the command line on, and needs
    nobody who reads what it prints.
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
    """Raises StoppedError for a signal in the block. Of several ranks none does: their launcher
    tells of the signal once.
    """
    from toolkit.train.checkpointing.stop_signals import Abandoned, StopSignals  # noqa: PLC0415 - as above
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
                    early.ignore()  # what is still to be said is said, and the exit code stays
    except (Abandoned, ImportError):  # compiled modules turn what is raised in them into the latter
        if early.received is None:
            raise
        raise stopped_early(early.received) from None
