"""Threads that nobody waits for, and how a process ends while such a thread still hangs.

A library that was called in such a thread may wait for its server when the interpreter ends (W&B
does). If the server does not answer, the finished process would never end.
"""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress

PREFIX = "abandoned: "
"""The name of such a thread begins with this text."""


def exit_past_them(code: object) -> None:
    """End the process with ``code`` if a thread that nobody waits for still runs; else return.

    Functions that libraries registered for the end of the process are not called. ``code`` is that
    of a SystemExit: a number, None (0), or a text (1), which is printed. Buffered output is written
    before.
    """
    if not any(thread.name.startswith(PREFIX) for thread in threading.enumerate()):
        return
    if code is not None and not isinstance(code, int):
        with suppress(OSError, ValueError):
            sys.stderr.write(f"{code}\n")
            sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))
