"""End a process although an abandoned thread (one that no other thread waits for) still runs.

A library that was called in such a thread may have an exit handler that waits for a server, as W&B
has. If the server does not answer, the process would never end, although its work is finished.
"""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress

THREAD_NAME_PREFIX = "abandoned: "
"""The names of abandoned threads begin with this text."""


def exit_despite_abandoned_threads(code: object) -> None:
    """End the process with ``code`` if an abandoned thread still runs. Otherwise do nothing.

    ``code`` is the code of a SystemExit: a number, None (exit code 0), or a text. A text is
    printed, and the exit code is 1. Exit handlers of libraries (``atexit``) are not called. The
    caller must flush buffered output before the call.
    """
    if not any(thread.name.startswith(THREAD_NAME_PREFIX) for thread in threading.enumerate()):
        return
    if code is not None and not isinstance(code, int):
        with suppress(OSError, ValueError):
            sys.stderr.write(f"{code}\n")
            sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))
