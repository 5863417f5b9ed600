"""Host memory that a CPU run may use: what is available, less if the control group allows less."""

from __future__ import annotations

from toolkit.gpu.cgroup import read_cgroup
from toolkit.gpu.driver_files import ROOT
from toolkit.gpu.host import read_memory

UNKNOWN_HOST = 4 << 30  # what is assumed where the host does not tell


def available_bytes() -> int:
    """Bytes that can still be allocated."""
    memory = read_memory().value
    found = UNKNOWN_HOST if memory is None else memory["available"]
    try:
        group = read_cgroup(ROOT)
    except (OSError, ValueError):
        return found  # no control groups here
    limit, used = group["memory_limit"], group["memory_used"]
    return found if limit is None else min(found, max(int(limit) - int(used or 0), 0))
