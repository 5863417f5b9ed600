"""The peak resident memory of this process."""

from __future__ import annotations

import resource
from pathlib import Path


def peak_resident_bytes() -> int:
    """Peak resident memory of this process in bytes, since its program began.

    Linux counts in ru_maxrss also what the parent process held when it started this one. VmHWM of
    /proc/self/status counts from the start of the program.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        high = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(high.split()[1]) * 1024
    except (OSError, StopIteration, ValueError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
