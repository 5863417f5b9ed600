"""Say what a bus error is, instead of dying of it without a word.

The system sends SIGBUS where a process reads a page of a mapped file that is no longer there: the
file was cut short, or its disk failed. A signal handler of Python's never runs then, because the
faulting instruction is tried again first. So this one is called by the C library, writes one line
and ends the process.
"""

from __future__ import annotations

import os
import signal
from typing import Any

from toolkit.base.errors import InputError

TEXT = (
    "error: a file that was mapped into memory is no longer there in full (SIGBUS): a model or "
    "data file was cut short during the run, or its disk failed; restore it and start again, the "
    "run resumes from its last checkpoint\n"
)
_LINE = TEXT.encode()
_kept: list[Any] = []  # the C function, which must outlive this module's callers


def _end(_number: int) -> None:
    os.write(2, _LINE)
    os._exit(InputError.exit_code)


def report_bus_errors() -> None:
    """From now on a bus error ends this process with one line and exit code 2. A second call does
    nothing, and neither does one where somebody else handles the signal.
    """
    if _kept or signal.getsignal(signal.SIGBUS) is not signal.SIG_DFL:
        return
    import ctypes  # noqa: PLC0415 - only where a run begins

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(_end)
    library = ctypes.CDLL(None)
    library.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    library.signal.restype = ctypes.c_void_p
    library.signal(int(signal.SIGBUS), ctypes.cast(handler, ctypes.c_void_p))
    _kept.append(handler)
