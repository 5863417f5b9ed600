"""Host memory that a CPU run may use: MemAvailable, less if the control group allows less."""

from __future__ import annotations

from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUP_LIMITS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)
UNKNOWN_HOST = 4 << 30  # what is assumed where the host does not tell


def available_bytes() -> int:
    """Bytes that can still be allocated."""
    found = _meminfo()
    for limit_file, used_file in CGROUP_LIMITS:
        limit, used = _number(limit_file), _number(used_file)
        if limit is not None and used is not None and limit < 1 << 60:
            found = min(found, max(limit - used, 0))
    return found


def _meminfo() -> int:
    try:
        text = MEMINFO.read_text("ascii", "replace")
    except OSError:
        return UNKNOWN_HOST
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    return UNKNOWN_HOST


def _number(path: Path) -> int | None:
    try:
        text = path.read_text("ascii", "replace").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
