"""Checks of the host: shared memory, main memory, CPUs, limits, disks, clock, account, environment
variables.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.base.formatting import GIB, MIB, format_bytes
from toolkit.base.process_environment import (
    ALLOCATOR_VARIABLES,
    EXPANDABLE_SEGMENTS,
    has_expandable_segments,
)
from toolkit.gpu.checks.check import CheckContext, Outcome, fail, make_checks, ok, unknown, warn
from toolkit.gpu.presence import find_gpu_requirement

if TYPE_CHECKING:
    from collections.abc import Mapping

    from toolkit.gpu.snapshot import NodeSnapshot

SHM_RECOMMENDED_BYTES, SHM_MIN_BYTES = GIB, 512 * MIB
OPEN_FILES_RECOMMENDED, MEMLOCK_RECOMMENDED_BYTES = 4096, 64 * MIB
DISK_RECOMMENDED_BYTES, DISK_MIN_BYTES, MIN_INODES = 10 * GIB, GIB, 1000
MEMORY_MIN_BYTES = 2 * GIB
# The date when this check was written. An earlier clock is wrong and breaks TLS and caches.
EARLIEST_VALID_TIME = 1_790_000_000


def shm(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """Check that /dev/shm has enough free space for the processes of a job on several cards.

    NCCL uses about 10 MiB of /dev/shm for each channel to a neighbour (nccl issue 342: 64 MB are
    not enough for four cards). Every group of vLLM ranks uses a ring buffer of 24 MiB
    (shm_broadcast, vLLM 0.25 and 0.31). A job with one process needs almost no space: the engine
    runs inside this process, and the data of GRPO are texts, which do not pass through /dev/shm.
    Processes on CPUs communicate over sockets.
    """
    space = snapshot.host.shm
    if space.value is None:
        return unknown(f"/dev/shm could not be read: {space.reason}")
    text = f"/dev/shm: {format_bytes(space.value['free'])} free"
    text += f" of {format_bytes(space.value['total'])}"
    on_cards = bool(snapshot.gpus) or find_gpu_requirement(snapshot, context) is not None
    if context.gpu_count > 1 and on_cards and space.value["free"] < SHM_MIN_BYTES:
        return fail(
            "user",
            f"{text}; the processes of a job on {context.gpu_count} cards need at least "
            f"{format_bytes(SHM_MIN_BYTES)} free",
        )
    if space.value["free"] >= SHM_RECOMMENDED_BYTES:
        return ok(text)
    # a Python semaphore needs one page of /dev/shm in any case
    if context.configured and context.gpu_count == 1 and space.value["free"] >= MIB:
        return ok(f"{text}; a job with one process does not need /dev/shm")
    return warn(text)


def available_memory_bytes(snapshot: NodeSnapshot) -> int | None:
    """Return the bytes of main memory that this job can still use; None if unknown. This is the
    available memory of the host, or the rest of the job's cgroup limit if that is smaller.
    """
    memory, cgroup = snapshot.host.memory.value, snapshot.host.cgroup.value or {}
    if memory is None:
        return None
    limit = cgroup.get("memory_limit")
    group_bytes = limit - (cgroup.get("memory_used") or 0) if limit else memory["available"]
    return max(0, min(memory["available"], group_bytes))


def memory(snapshot: NodeSnapshot, _context: CheckContext) -> Outcome | None:
    """Check that the available main memory, within the cgroup's limit, is enough to load the
    model.
    """
    available_bytes = available_memory_bytes(snapshot)
    if available_bytes is None:
        return unknown(f"the main memory could not be read: {snapshot.host.memory.reason}")
    limit = (snapshot.host.cgroup.value or {}).get("memory_limit")
    text = f"{format_bytes(available_bytes)} of main memory available"
    text += f" (cgroup limit {format_bytes(limit)})" if limit else ""
    weight_bytes = int((snapshot.model.files.value or {}).get("weight_bytes", 0))
    if available_bytes < MEMORY_MIN_BYTES:
        return fail("user" if limit else "retry", text)
    # With a GPU, the weights pass through the page cache. On the CPU they stay in memory, as
    # float32 in the worst case.
    needed_bytes = weight_bytes if snapshot.gpus else 2 * weight_bytes
    if needed_bytes and available_bytes < needed_bytes + MEMORY_MIN_BYTES:
        return warn(f"{text}; the model's weights need {format_bytes(weight_bytes)}")
    return ok(text)


def cpus(snapshot: NodeSnapshot, _context: CheckContext) -> Outcome | None:
    """Check that the job has enough CPUs for the engine, the trainer and the rewards."""
    count = snapshot.host.cpus.value
    if count is None:
        return unknown(f"the CPUs could not be read: {snapshot.host.cpus.reason}")
    limit = (snapshot.host.cgroup.value or {}).get("cpu_limit")
    usable = min(count, limit) if limit else count
    text = f"{usable:g} CPUs" + (f" (cgroup limit; the host has {count})" if limit else "")
    return ok(text) if usable >= 2 else warn(f"{text}: fewer than 2 CPUs slow down the rollouts")


def limits(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """Check that the limits on open files and locked memory are high enough."""
    values = snapshot.host.limits.value
    if values is None:
        return unknown(f"the limits could not be read: {snapshot.host.limits.reason}")
    low_limits = []
    if values["nofile"] is not None and values["nofile"] < OPEN_FILES_RECOMMENDED:
        low_limits.append(f"open files {values['nofile']} (ulimit -n {OPEN_FILES_RECOMMENDED})")
    locked = values["memlock"]
    if context.gpu_count > 1 and locked is not None and locked < MEMLOCK_RECOMMENDED_BYTES:
        low_limits.append(f"locked memory {format_bytes(locked)} (ulimit -l unlimited)")
    text = ", ".join(f"{name} {'unlimited' if v is None else v}" for name, v in values.items())
    return warn("low: " + "; ".join(low_limits)) if low_limits else ok(text)


def _disks(snapshot: NodeSnapshot) -> list[dict[str, Any]] | Outcome | None:
    disks = snapshot.host.disks
    if disks.value is None:
        return unknown(f"the disks could not be read: {disks.reason}")
    return disks.value or None


def disk(snapshot: NodeSnapshot, _context: CheckContext) -> Outcome | None:
    """Check that the output and cache folders have enough free space and inodes."""
    disks = _disks(snapshot)
    if not isinstance(disks, list):
        return disks
    texts: list[str] = []
    worst_level = 0
    for entry in disks:
        inodes = entry["free_inodes"]
        has_few_inodes = inodes is not None and inodes < MIN_INODES
        level = (
            2
            if entry["free"] < DISK_MIN_BYTES or has_few_inodes
            else int(entry["free"] < DISK_RECOMMENDED_BYTES)
        )
        if level >= worst_level:
            texts = texts if level == worst_level else []
            worst_level = level
            text = f"{entry['role']} {entry['path']}: {format_bytes(entry['free'])} free"
            texts.append(f"{text}, {inodes} inodes" if has_few_inodes else text)
    evidence = "; ".join(texts)
    if worst_level == 2:
        return fail("user", evidence)
    return warn(evidence) if worst_level else ok(evidence)


def writable(snapshot: NodeSnapshot, _context: CheckContext) -> Outcome | None:
    """Check that the output and cache folders are writable."""
    disks = _disks(snapshot)
    if not isinstance(disks, list):
        return disks
    not_writable = [entry for entry in disks if not entry["writable"]]
    if not not_writable:
        return ok("writable: " + ", ".join(entry["role"] for entry in disks))
    text = "not writable: " + ", ".join(
        f"{entry['role']} {entry['path']}" for entry in not_writable
    )
    # A read-only hub cache is enough for a model that it already contains.
    kind = (snapshot.model.location.value or {}).get("kind")
    if {entry["role"] for entry in not_writable} == {"HF_HOME"} and kind in ("folder", "cache"):
        return warn(f"{text} (the run writes nothing there: the model is already on this machine)")
    return fail("user", text)


def clock(snapshot: NodeSnapshot, _context: CheckContext) -> Outcome | None:
    """Check that the clock is accurate enough for TLS, caches and the order of files."""
    state = snapshot.host.clock.value
    if state is None:
        return unknown(f"the clock could not be read: {snapshot.host.clock.reason}")
    if state["now"] < EARLIEST_VALID_TIME:
        return fail("node", "the clock is years behind")
    if not state["synchronised"]:
        return warn("the kernel's clock is not synchronized (no NTP)")
    return ok("synchronized")


def user(snapshot: NodeSnapshot, _context: CheckContext) -> Outcome | None:
    """Check that the account has a name. torch and triton use the name for their cache folders."""
    name = snapshot.host.user
    if name.has_value:
        return ok(f"account name {name.value}")
    return warn(str(name.reason))


_TRUE_VALUES = ("1", "true", "yes", "on")


def env(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """Check that no environment variable harms the run."""
    del context
    problems = [
        *_allocator_problems(snapshot.environment),
        *find_harmful_variables(snapshot.environment),
    ]
    return warn("; ".join(problems)) if problems else ok("no harmful variable")


def _allocator_problems(variables: Mapping[str, str]) -> list[str]:
    """Return a text for each variable in ``variables`` that sets torch's CUDA allocator but does
    not turn on expandable segments.

    Without such a variable, training turns on expandable segments (policy/cuda_allocator.py). The
    sizer assumes that they are on.
    """
    settings = {name: variables[name] for name in ALLOCATOR_VARIABLES if variables.get(name)}
    return [
        f"{name}={value}: without {EXPANDABLE_SEGMENTS}, memory is lost to fragmentation, and the "
        "sizer does not count this loss"
        for name, value in settings.items()
        if not has_expandable_segments(value)
    ]


def find_harmful_variables(variables: Mapping[str, str]) -> list[str]:
    """Return one text for each environment variable that harms the run. The text names the variable
    and says what it does. For example, the variable slows the run down or loads other code.
    """
    problems = []
    if variables.get("CUDA_LAUNCH_BLOCKING", "").lower() in _TRUE_VALUES:
        problems.append("CUDA_LAUNCH_BLOCKING=1: the CPU waits for every kernel")
    if variables.get("PYTORCH_NO_CUDA_MEMORY_CACHING", "").lower() in _TRUE_VALUES:
        problems.append("PYTORCH_NO_CUDA_MEMORY_CACHING: every allocation calls the slow driver")
    if variables.get("LD_PRELOAD"):
        names = ", ".join(part.rpartition("/")[2] for part in variables["LD_PRELOAD"].split(":"))
        problems.append(f"LD_PRELOAD loads {names} into every process")
    if variables.get("VLLM_USE_V1") == "0":
        problems.append("VLLM_USE_V1=0: the pinned vLLM has only the V1 engine")
    if variables.get("NCCL_P2P_DISABLE") == "1":
        problems.append("NCCL_P2P_DISABLE=1: copies between cards go through the host")
    if variables.get("NCCL_DEBUG", "").upper() in ("INFO", "TRACE"):
        problems.append(f"NCCL_DEBUG={variables['NCCL_DEBUG']}: NCCL writes too many log lines")
    return problems


_ROWS = (
    (
        "host.shm",
        "/dev/shm has enough space",
        "Containers get 64 MiB by default. With several cards, NCCL and vLLM's ranks share memory "
        "through /dev/shm. When /dev/shm is full, NCCL and vLLM fail with a bus error or 'No space "
        "left on device'.",
        "start the container with `--shm-size 8g` or `--ipc host`. In Kubernetes, mount an "
        "emptyDir of medium Memory at /dev/shm",
        shm,
    ),
    (
        "host.memory",
        "Main memory, within the cgroup's limit, is enough",
        "If the job's cgroup has a limit, the limit counts, not the host's memory. If the job uses "
        "more memory than the limit, the kernel kills the job without a message.",
        "request more memory (`--mem` in Slurm, `resources.limits.memory` in Kubernetes)",
        memory,
    ),
    (
        "host.cpus",
        "There are enough CPUs for engine, trainer and rewards",
        "The CPU limits the decoding speed of a small model. With a single CPU, decoding takes "
        "twice as long.",
        "request more CPUs (`--cpus-per-task` in Slurm)",
        cpus,
    ),
    (
        "host.limits",
        "Limits on open files and locked memory are not low",
        "Weights in many shards and data workers need many open files. Collectives over several "
        "cards lock memory.",
        "raise the limits with `ulimit`, or in Docker with `--ulimit nofile=65536 --ulimit "
        "memlock=-1`",
        limits,
    ),
    (
        "host.disk",
        "Output and cache folders have free space and inodes",
        "If a checkpoint cannot be written, the run ends and its last steps are lost.",
        "free some space, or set `output_dir`, `HF_HOME` and `VLLM_CACHE_ROOT` to other folders",
        disk,
    ),
    (
        "host.writable",
        "Output and cache folders are writable",
        "In a read-only image or under a different user, HF_HOME and the caches of Triton and "
        "vLLM may not be writable. The run would then fail minutes after its start.",
        "set `output_dir`, `HF_HOME`, `TRITON_CACHE_DIR` and `VLLM_CACHE_ROOT` to folders that "
        "you can write to",
        writable,
    ),
    (
        "host.clock",
        "The clock is right",
        "A wrong clock breaks TLS and confuses caches and logs.",
        "ask the node's owner to start chrony or systemd-timesyncd",
        clock,
    ),
    (
        "host.env",
        "No environment variable harms the run",
        "Without expandable segments, torch's CUDA allocator loses memory to fragmentation. "
        "CUDA_LAUNCH_BLOCKING makes the CPU wait for every kernel. A library in LD_PRELOAD can "
        "change any behaviour.",
        "unset the variable that this check names",
        env,
    ),
    (
        "host.user",
        "The account has a name",
        "torch and triton call getpass.getuser(), which fails for a uid without an account. "
        "Containers often run under such a uid.",
        "set the environment variable `USER` to any name",
        user,
    ),
)
CHECKS = make_checks(_ROWS, about_node=("host.clock",))
