"""The host around the card: shared memory, limits, disks, clock, account, environment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.base.formatting import GIB, MIB, format_bytes
from toolkit.gpu.checks.check import CheckContext, Outcome, checks_of, fail, ok, unknown, warn
from toolkit.gpu.checks.environment import env
from toolkit.gpu.needs import gpu_needed

if TYPE_CHECKING:
    from toolkit.gpu.snapshot import NodeSnapshot

SHM_WANTED, SHM_LEAST = GIB, 512 * MIB
FILES_WANTED, MEMLOCK_WANTED = 4096, 64 * MIB
DISK_WANTED, DISK_LEAST, INODES_LEAST = 10 * GIB, GIB, 1000
MEMORY_LEAST = 2 * GIB
# This check was written then; an earlier clock is wrong, and TLS and caches go wrong with it.
WRITTEN = 1_790_000_000


def shm(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """/dev/shm has room for what the processes of a job over several cards hand each other.

    NCCL takes about 10 MiB of it for each channel to a neighbour (nccl issue 342: 64 MB are not
    enough for four cards), and every group of vLLM's ranks a ring of 24 MiB (shm_broadcast, vLLM
    0.25 and 0.31). One process uses none: the engine runs inside it, and GRPO's data are texts.
    Ranks on CPUs talk over sockets.
    """
    space = snapshot.host.shm
    if space.value is None:
        return unknown(f"/dev/shm: {space.reason}")
    text = f"/dev/shm: {format_bytes(space.value['free'])} free"
    text += f" of {format_bytes(space.value['total'])}"
    on_cards = bool(snapshot.gpus) or gpu_needed(snapshot, context) is not None
    if context.gpus_wanted > 1 and on_cards and space.value["free"] < SHM_LEAST:
        return fail(
            "user",
            f"{text}; the processes of a job over {context.gpus_wanted} cards share it and need "
            f"{format_bytes(SHM_LEAST)}",
        )
    if space.value["free"] >= SHM_WANTED:
        return ok(text)
    # A semaphore of Python's takes a page of it, all the same.
    if context.configured and context.gpus_wanted == 1 and space.value["free"] >= MIB:
        return ok(f"{text}; a job of one process does not use it")
    return warn(text)


def available_memory(snapshot: NodeSnapshot) -> int | None:
    """Bytes of main memory for this job: the host's, or less where its cgroup is limited."""
    memory, cgroup = snapshot.host.memory.value, snapshot.host.cgroup.value or {}
    if memory is None:
        return None
    limit = cgroup.get("memory_limit")
    left = limit - (cgroup.get("memory_used") or 0) if limit else memory["available"]
    return max(0, min(memory["available"], left))


def memory(snapshot: NodeSnapshot, _context: CheckContext) -> Outcome | None:
    """Main memory is enough to load the model through, within the cgroup's limit."""
    free = available_memory(snapshot)
    if free is None:
        return unknown(f"main memory: {snapshot.host.memory.reason}")
    limit = (snapshot.host.cgroup.value or {}).get("memory_limit")
    text = f"{format_bytes(free)} of main memory available"
    text += f" (cgroup limit {format_bytes(limit)})" if limit else ""
    weights = int((snapshot.model.files.value or {}).get("weight_bytes", 0))
    if free < MEMORY_LEAST:
        return fail("user" if limit else "retry", text)
    # On a card the weights pass through the page cache; on the CPU they stay, float32 at worst.
    needed = weights if snapshot.gpus else 2 * weights
    if needed and free < needed + MEMORY_LEAST:
        return warn(f"{text}; the model's weights are {format_bytes(weights)}")
    return ok(text)


def cpus(snapshot: NodeSnapshot, _context: CheckContext) -> Outcome | None:
    """The job has CPUs for the engine, the trainer and the rewards."""
    count = snapshot.host.cpus.value
    if count is None:
        return unknown(f"CPUs: {snapshot.host.cpus.reason}")
    limit = (snapshot.host.cgroup.value or {}).get("cpu_limit")
    usable = min(count, limit) if limit else count
    text = f"{usable:g} CPUs" + (f" (cgroup limit; {count} on the host)" if limit else "")
    return ok(text) if usable >= 2 else warn(f"{text}: rollouts are bound by the host")


def limits(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """Open files and locked memory are not held too low."""
    values = snapshot.host.limits.value
    if values is None:
        return unknown(f"limits: {snapshot.host.limits.reason}")
    low = []
    if values["nofile"] is not None and values["nofile"] < FILES_WANTED:
        low.append(f"open files {values['nofile']} (ulimit -n {FILES_WANTED})")
    locked = values["memlock"]
    if context.gpus_wanted > 1 and locked is not None and locked < MEMLOCK_WANTED:
        low.append(f"locked memory {format_bytes(locked)} (ulimit -l unlimited)")
    text = ", ".join(f"{name} {'unlimited' if v is None else v}" for name, v in values.items())
    return warn("low: " + "; ".join(low)) if low else ok(text)


def _disks(snapshot: NodeSnapshot) -> list[dict[str, Any]] | Outcome | None:
    disks = snapshot.host.disks
    if disks.value is None:
        return unknown(f"disks: {disks.reason}")
    return disks.value or None


def disk(snapshot: NodeSnapshot, _context: CheckContext) -> Outcome | None:
    """The folders of output and caches have room and inodes."""
    found = _disks(snapshot)
    if not isinstance(found, list):
        return found
    texts: list[str] = []
    worst = 0
    for entry in found:
        inodes = entry["free_inodes"]
        few = inodes is not None and inodes < INODES_LEAST
        level = 2 if entry["free"] < DISK_LEAST or few else int(entry["free"] < DISK_WANTED)
        if level >= worst:
            texts = texts if level == worst else []
            worst = level
            text = f"{entry['role']} {entry['path']}: {format_bytes(entry['free'])} free"
            texts.append(f"{text}, {inodes} inodes" if few else text)
    evidence = "; ".join(texts)
    if worst == 2:
        return fail("user", evidence)
    return warn(evidence) if worst else ok(evidence)


def writable(snapshot: NodeSnapshot, _context: CheckContext) -> Outcome | None:
    """The folders of output and caches can be written."""
    found = _disks(snapshot)
    if not isinstance(found, list):
        return found
    shut = [entry for entry in found if not entry["writable"]]
    if not shut:
        return ok("writable: " + ", ".join(entry["role"] for entry in found))
    text = "not writable: " + ", ".join(f"{one['role']} {one['path']}" for one in shut)
    # A read-only hub cache is fine for a model that is in it already.
    kind = (snapshot.model.location.value or {}).get("kind")
    if {entry["role"] for entry in shut} == {"HF_HOME"} and kind in ("folder", "cache"):
        return warn(f"{text} (the model is complete without)")
    return fail("user", text)


def clock(snapshot: NodeSnapshot, _context: CheckContext) -> Outcome | None:
    """The clock is right enough for TLS, caches and the order of files."""
    state = snapshot.host.clock.value
    if state is None:
        return unknown(f"clock: {snapshot.host.clock.reason}")
    if state["now"] < WRITTEN:
        return fail("node", "the clock is years behind")
    if not state["synchronised"]:
        return warn("the kernel's clock is not kept in step (no NTP)")
    return ok("kept in step")


def user(snapshot: NodeSnapshot, _context: CheckContext) -> Outcome | None:
    """The account has a name: torch's and triton's caches are named after it."""
    name = snapshot.host.user
    if name.known:
        return ok(f"account name {name.value}")
    return warn(str(name.reason))


_ROWS = (
    (
        "host.shm",
        "/dev/shm has room",
        "Containers get 64 MiB by default; with several cards, NCCL and vLLM's ranks share memory "
        'through it and die of a bus error or "No space left on device" when it is full.',
        "docker run --shm-size 8g (or --ipc host); Kubernetes: an emptyDir of medium Memory",
        shm,
    ),
    (
        "host.memory",
        "Main memory within the cgroup's limit is enough",
        "The limit of the job counts, not the host's total; above it the kernel kills the job "
        "with no message of its own.",
        "ask for more memory (--mem in Slurm, resources.limits.memory in Kubernetes)",
        memory,
    ),
    (
        "host.cpus",
        "There are CPUs for engine, trainer and rewards",
        "A small model's decode step is bound by the host; one CPU halves it.",
        "ask for more CPUs (--cpus-per-task)",
        cpus,
    ),
    (
        "host.limits",
        "Limits on open files and locked memory are not low",
        "Weights in many shards and data workers need open files; collectives over several "
        "cards lock memory.",
        "raise them with ulimit, or docker run --ulimit nofile=65536 --ulimit memlock=-1",
        limits,
    ),
    (
        "host.disk",
        "Output and cache folders have room and inodes",
        "A checkpoint that cannot be written ends the run at its most expensive moment.",
        "free some space, or point output_dir, HF_HOME and VLLM_CACHE_ROOT elsewhere",
        disk,
    ),
    (
        "host.writable",
        "Output and cache folders can be written",
        "Read-only images and foreign users leave HF_HOME, Triton's and vLLM's caches closed; "
        "each is found out minutes into a start.",
        "point output_dir, HF_HOME, TRITON_CACHE_DIR and VLLM_CACHE_ROOT at folders of yours",
        writable,
    ),
    (
        "host.clock",
        "The clock is right",
        "A clock that is off fails TLS, and confuses caches and logs.",
        "start chrony or systemd-timesyncd (the node's owner)",
        clock,
    ),
    (
        "host.env",
        "No environment variable harms the run",
        "An allocator without expandable segments loses memory in pieces, CUDA_LAUNCH_BLOCKING "
        "makes every kernel wait, a preloaded library changes everything.",
        "unset the variable that is named",
        env,
    ),
    (
        "host.user",
        "The account has a name",
        "torch and triton call getpass.getuser(), which fails for a uid without an account, as "
        "in containers that run under an arbitrary uid.",
        "set USER to any name",
        user,
    ),
)
CHECKS = checks_of(_ROWS, about_node=("host.clock",))
