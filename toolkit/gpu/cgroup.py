"""Read the limits of this process's control group (versions 1 and 2): the memory and the CPUs that
the job may use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

# In version 1, "no limit" is the largest multiple of a page below 2^63.
_NO_LIMIT = 1 << 60


def read_cgroup(root: Path) -> dict[str, Any]:
    """Return {version, memory_limit, memory_used, cpu_limit}. The values for memory are in bytes,
    and cpu_limit is a number of CPUs. A limit of None means that there is no limit.

    The limits of all parent groups apply too. So memory_limit and cpu_limit are the smallest limits
    among the group and its parent groups.

    Raises:
        OSError: there is no cgroup file system.
        ValueError: a cgroup file has an unknown form.
    """
    groups = _control_groups(root)
    base = root / "sys/fs/cgroup"
    if (base / "cgroup.controllers").exists():
        folders = _group_folders(base, groups.get("", "/"))
        return {
            "version": 2,
            "memory_limit": _smallest(_read_limit(folder / "memory.max") for folder in folders),
            "memory_used": _used_bytes(folders[0], "memory.current"),
            "cpu_limit": _smallest(_cpu_limit_v2(folder) for folder in folders),
        }
    memory_folders = _group_folders(base / "memory", groups.get("memory", "/"))
    cpu_folders = _group_folders(base / "cpu", groups.get("cpu", "/"))
    return {
        "version": 1,
        "memory_limit": _smallest(
            _read_limit(folder / "memory.limit_in_bytes") for folder in memory_folders
        ),
        "memory_used": _used_bytes(memory_folders[0], "memory.usage_in_bytes", "total_"),
        "cpu_limit": _smallest(_cpu_limit_v1(folder) for folder in cpu_folders),
    }


def _control_groups(root: Path) -> dict[str, str]:
    """Return {controller: path of the control group of this process}. With cgroup version 2, the
    only key is "".
    """
    groups: dict[str, str] = {}
    for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        parts = line.split(":", 2)
        if len(parts) == 3:
            groups.update(dict.fromkeys(parts[1].split(","), parts[2]))
    return groups


def _group_folders(base: Path, group: str) -> list[Path]:
    """Return the folder of the control group ``group``, and all its parent folders up to ``base``.

    In a container, ``group`` may be a path of the host that does not exist in the container. Then
    the result is only ``base``.
    """
    folder = base / group.lstrip("/")
    if ".." in group.split("/") or not folder.is_dir():
        return [base]
    folders = [folder]
    while folders[-1] != base:
        folders.append(folders[-1].parent)
    return folders


def _read_limit(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except FileNotFoundError:  # the root group has no such file and no limit
        return None
    return None if text == "max" or int(text) >= _NO_LIMIT else int(text)


def _used_bytes(folder: Path, name: str, prefix: str = "") -> int | None:
    """Return the bytes of memory that the control group uses, without the page cache; None if the
    file ``name`` does not exist. The page cache is subtracted, because when memory runs out, the
    kernel frees the page cache before it kills a process.
    """
    used_bytes = _read_limit(folder / name)
    if used_bytes is None:
        return None
    try:
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except FileNotFoundError:
        return used_bytes
    cache_counters = {f"{prefix}inactive_file", f"{prefix}active_file"}
    counters = (line.partition(" ") for line in lines)
    return max(
        0, used_bytes - sum(int(number) for key, _, number in counters if key in cache_counters)
    )


def _cpu_limit_v2(folder: Path) -> float | None:
    """Return the CPU limit of a version 2 group: the quota divided by the period, both in
    microseconds, from the file ``cpu.max``.
    """
    try:
        quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
    except FileNotFoundError:
        return None
    return None if quota == "max" else int(quota) / int(period)


def _cpu_limit_v1(folder: Path) -> float | None:
    quota, period = (
        _read_limit(folder / "cpu.cfs_quota_us"),
        _read_limit(folder / "cpu.cfs_period_us"),
    )
    return None if not quota or not period or quota < 0 else quota / period


def _smallest(values: Any) -> Any:
    limits = [value for value in values if value is not None]
    return min(limits) if limits else None
