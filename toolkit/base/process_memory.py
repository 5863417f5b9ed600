"""The peak resident memory of this process."""

from __future__ import annotations

import resource
from pathlib import Path


def peak_resident_bytes() -> int:
    """Return the peak resident memory of this process in bytes, since its program began.

    On Linux, the result is VmHWM of /proc/self/status. ru_maxrss would be wrong there: it includes
    the memory of the parent process at the moment when the parent started this process.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        high = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(high.split()[1]) * 1024
    except (OSError, StopIteration, ValueError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
