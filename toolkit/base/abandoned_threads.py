"""End a process although an abandoned thread, which no other thread waits for, still runs.

A library that was called in such a thread may wait for its server when the interpreter ends (W&B
does). If the server does not answer, the finished process would never end.
"""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress

PREFIX = "abandoned: "
"""The names of abandoned threads begin with this text."""


def exit_past_them(code: object) -> None:
    """End the process with ``code`` if an abandoned thread still runs; else return.

    ``code`` is the code of a SystemExit: a number, None (exit code 0), or a text (exit code 1),
    which is printed. Functions that libraries registered for the end of the process are not called.
    The caller must write buffered output before the call.
    """
    if not any(thread.name.startswith(PREFIX) for thread in threading.enumerate()):
        return
    if code is not None and not isinstance(code, int):
        with suppress(OSError, ValueError):
            sys.stderr.write(f"{code}\n")
            sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))
