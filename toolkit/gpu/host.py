"""Read the facts about the host that apply to the job: its memory and CPUs (within the limits of
the job's cgroup), its disks, and its clock.

Nothing is written: the kernel reports whether a folder is writable (``access``). All paths start at
``root``, so that tests can use a folder in place of a host's file system.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import resource
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toolkit.base import process_environment
from toolkit.gpu.cgroup import read_cgroup
from toolkit.gpu.driver_files import ROOT, as_reading
from toolkit.gpu.reading import NOT_QUERIED, Reading, failed, succeeded

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

# The variables that checks read. No other variables are kept, because the environment contains
# secrets.
RECORDED_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_MODULE_LOADING",
    "CUDA_MPS_PIPE_DIRECTORY",
    "HF_HUB_OFFLINE",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "NCCL_DEBUG",
    "NCCL_P2P_DISABLE",
    "NVIDIA_DRIVER_CAPABILITIES",
    "NVIDIA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    *process_environment.ALLOCATOR_VARIABLES,
    "PYTORCH_NO_CUDA_MEMORY_CACHING",
    "SLURM_GPUS_ON_NODE",
    "SLURM_JOB_GPUS",
    "SLURM_JOB_ID",
    "TRANSFORMERS_OFFLINE",
    "VLLM_ATTENTION_BACKEND",
    "VLLM_USE_V1",
    "VLLM_WORKER_MULTIPROC_METHOD",
)


@dataclass(frozen=True, slots=True)
class HostSnapshot:
    """What is known about the host, in bytes, counts and seconds.

    Some fields have several values:

    - ``place``: {container, kubernetes, slurm, wsl}.
    - ``memory``: {total, available}, and ``shm``: {total, free}.
    - ``cgroup``: {version, memory_limit, memory_used, cpu_limit}.
    - ``limits``: {memlock, nofile}, None for unlimited.
    - ``disks``: a list of {role, path, total, free, free_inodes, writable}.
    - ``clock``: {now, synchronised}.
    """

    place: Reading[dict[str, Any]] = NOT_QUERIED
    memory: Reading[dict[str, int]] = NOT_QUERIED
    cgroup: Reading[dict[str, Any]] = NOT_QUERIED
    cpus: Reading[int] = NOT_QUERIED
    shm: Reading[dict[str, int]] = NOT_QUERIED
    limits: Reading[dict[str, int | None]] = NOT_QUERIED
    disks: Reading[list[dict[str, Any]]] = NOT_QUERIED
    clock: Reading[dict[str, Any]] = NOT_QUERIED
    user: Reading[str] = NOT_QUERIED


def recorded_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of ``environ`` that checks read."""
    return {name: environ[name] for name in RECORDED_VARIABLES if name in environ}


def read(environ: Mapping[str, str], paths: Mapping[str, Path], root: Path = ROOT) -> HostSnapshot:
    """Read all facts about the host. If one fact cannot be read, the other facts are still
    returned.
    """
    return HostSnapshot(
        place=as_reading(lambda: detect_environment(environ, root)),
        memory=read_memory(root),
        cgroup=as_reading(lambda: read_cgroup(root)),
        cpus=as_reading(lambda: len(os.sched_getaffinity(0))),
        shm=as_reading(lambda: _read_space(root / "dev/shm")),
        limits=as_reading(_read_limits),
        disks=as_reading(lambda: [disk_facts(role, path) for role, path in paths.items()]),
        clock=read_clock(),
        user=_account_name_source(environ),
    )


def read_memory(root: Path = ROOT) -> Reading[dict[str, int]]:
    """Return the total bytes of main memory, and the bytes that are available without swapping."""
    return as_reading(lambda: _parse_meminfo(root))


def _parse_meminfo(root: Path) -> dict[str, int]:
    lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if ":" in line}
    if "MemTotal" not in kib or "MemAvailable" not in kib:
        raise ValueError("/proc/meminfo has no MemTotal or MemAvailable")
    return {"total": kib["MemTotal"] * 1024, "available": kib["MemAvailable"] * 1024}


def _read_space(path: Path) -> dict[str, int]:
    status = os.statvfs(path)
    return {"total": status.f_blocks * status.f_frsize, "free": status.f_bavail * status.f_frsize}


def disk_facts(role: str, path: Path) -> dict[str, Any]:
    """Return the total space, the free space and the free inodes of the file system of a folder,
    and whether the folder is writable. For a folder that does not exist yet, its nearest existing
    parent is used.
    """
    existing = path.expanduser().absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    status = os.statvfs(existing)
    return {
        "role": role,
        "path": str(path),
        "total": status.f_blocks * status.f_frsize,
        "free": status.f_bavail * status.f_frsize,
        # File systems without a fixed number of inodes (btrfs, some network ones) report 0 of 0.
        "free_inodes": status.f_favail if status.f_files else None,
        "writable": os.access(existing, os.W_OK | os.X_OK) and existing.is_dir(),
    }


def _read_limits() -> dict[str, int | None]:
    kinds = {"memlock": resource.RLIMIT_MEMLOCK, "nofile": resource.RLIMIT_NOFILE}
    soft = {name: resource.getrlimit(kind)[0] for name, kind in kinds.items()}
    return {
        name: None if value == resource.RLIM_INFINITY else value for name, value in soft.items()
    }


def read_clock() -> Reading[dict[str, Any]]:
    """Return the current time, and whether the kernel's clock is synchronized. The kernel's state
    is read with ``adjtimex``, which changes nothing here.
    """
    now = time.time()
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "adjtimex"):
        return failed("this C library has no adjtimex")
    state = libc.adjtimex(ctypes.create_string_buffer(256))  # struct timex with modes = 0
    if state < 0:
        return failed(os.strerror(ctypes.get_errno()))
    return succeeded({"now": now, "synchronised": state != 5})  # TIME_ERROR


def _account_name_source(environ: Mapping[str, str]) -> Reading[str]:
    """Return where the account's name comes from: an environment variable, or the system's list of
    accounts. If the account has no name, the Reading is "failed", because torch and triton need a
    name.
    """
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        if environ.get(name):
            return succeeded("from the environment")
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        return failed(f"uid {os.getuid()} has no account, and USER is not set")
    return succeeded("from the accounts")


def detect_environment(environ: Mapping[str, str], root: Path = ROOT) -> dict[str, Any]:
    """Return {container, kubernetes, slurm, wsl}: the name of the container engine or None, and
    whether this process runs under Kubernetes, Slurm and WSL. All four are detected from files and
    environment variables.
    """
    container = None
    if "APPTAINER_CONTAINER" in environ or "SINGULARITY_CONTAINER" in environ:
        container = "apptainer"
    elif (root / "run/.containerenv").exists():
        container = "podman"
    elif (root / ".dockerenv").exists():
        container = "docker"
    elif environ.get("container"):
        container = environ["container"][:20]
    try:
        release = (root / "proc/sys/kernel/osrelease").read_text(encoding="ascii").lower()
    except (OSError, UnicodeDecodeError):
        release = ""
    return {
        "container": container,
        "kubernetes": "KUBERNETES_SERVICE_HOST" in environ,
        "slurm": "SLURM_JOB_ID" in environ,
        "wsl": "microsoft" in release,
    }
