"""Threads that nobody waits for, and the end of a process in which one still hangs.

A library that such a thread has started may wait for its server as the interpreter ends (W&B does),
so that a server which does not answer would keep a finished process alive.
"""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress

PREFIX = "abandoned: "
"""How the name of such a thread begins."""


def exit_past_them(code: object) -> None:
    """End the process with ``code`` now, without the libraries' last calls, if such a thread is
    still at work; else return.

    ``code`` is that of a SystemExit: a number, None (0), or a text (1), which is printed. The
    streams are settled before.
    """
    if not any(thread.name.startswith(PREFIX) for thread in threading.enumerate()):
        return
    if code is not None and not isinstance(code, int):
        with suppress(OSError, ValueError):
            sys.stderr.write(f"{code}\n")
            sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))
