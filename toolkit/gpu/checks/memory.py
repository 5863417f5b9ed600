"""Checks of the card's memory: how much is free, which processes use the rest, and whether the
memory that the job needs is free.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.base.formatting import MIB, format_bytes
from toolkit.gpu.checks.check import (
    Check,
    CheckContext,
    Outcome,
    check_each_gpu,
    devices_to_check,
    fail,
    ok,
    unknown,
    warn,
)
from toolkit.gpu.devices import cuda_memory

if TYPE_CHECKING:
    from toolkit.gpu.snapshot import GpuSnapshot, NodeSnapshot

# An empty card still shows some MiB (driver, display, a persistence daemon's context).
NEGLIGIBLE_BYTES = 700 * MIB
# If other processes use more than this fraction of the card, a job sized for the card does not fit.
TENANT_SHARE = 0.2
# If graphics processes use more than this fraction of the memory that other processes use, the card
# drives a display, and waiting does not help.
DISPLAY_SHARE = 0.5
DISPLAY = "the display"
# Memory of the job's own CUDA context and cuBLAS, before the job allocates a byte (measured on an
# H100).
CONTEXT_BYTES = 600 * MIB


def bytes_used_by_others(gpu: GpuSnapshot) -> int | None:
    """Return the bytes of the card's memory that other processes use; None if unknown. If the
    driver supports only version 1 of NVML's memory query, the result includes the memory that the
    driver reserves.
    """
    memory = gpu.memory.value
    if memory is None:
        return None
    own_bytes = sum(
        process["used_bytes"] or 0 for process in gpu.processes.value or [] if process["mine"]
    )
    return max(0, int(memory["used"]) - own_bytes)


def find_display_programs(snapshot: NodeSnapshot, gpu: GpuSnapshot) -> str | None:
    """Return a name for the programs that draw the display: "the display", or "Windows and its
    programs" with WSL. Return None if these programs do not use most of the memory that other
    processes use. These programs keep their memory, so waiting does not help a job that needs it.
    """
    used_by_others = bytes_used_by_others(gpu) or 0
    if used_by_others <= NEGLIGIBLE_BYTES:
        return None
    if (snapshot.host.place.value or {}).get("wsl"):
        return "Windows and its programs"
    graphics_bytes = sum(
        process["used_bytes"] or 0
        for process in gpu.processes.value or []
        if process["kind"] == "graphics" and not process["mine"]
    )
    return DISPLAY if graphics_bytes >= DISPLAY_SHARE * used_by_others else None


def max_memory_utilization(gpu: GpuSnapshot) -> float:
    """Return the largest gpu_memory_utilization that fits into the free memory, rounded down to two
    decimals.
    """
    memory = gpu.memory.value or {}
    usable_total_bytes = int(memory.get("total", 0)) - int(memory.get("reserved") or 0)
    usable_free_bytes = max(0, int(memory.get("free", 0)) - CONTEXT_BYTES)
    return usable_free_bytes * 100 // usable_total_bytes / 100 if usable_total_bytes else 0.0


def display_remedy(gpu: GpuSnapshot) -> str:
    """Return the remedy for a card whose memory is partly used by a display."""
    return (
        f"set `gpu_memory_utilization` to at most {max_memory_utilization(gpu):.2f} (`envcheck "
        "size` shows whether that is enough), close graphical programs, or use another card for "
        "the display"
    )


def describe_other_processes(gpu: GpuSnapshot) -> str:
    """Return a text that lists the pids, names and memory of other processes on the card. In a
    container, NVML may report no processes, or pids that are valid only on the host.
    """
    others: list[dict[str, Any]] = [p for p in gpu.processes.value or [] if not p["mine"]]
    if not others:
        return "hidden processes"
    parts = []
    for process in sorted(others, key=lambda p: -(p["used_bytes"] or 0))[:4]:
        used = process["used_bytes"]
        name = f" {process['name']}" if process.get("name") else ""
        parts.append(f"pid {process['pid']}{name}" + (f" {format_bytes(used)}" if used else ""))
    remaining = f" and {len(others) - 4} more" if len(others) > 4 else ""
    return ", ".join(parts) + remaining


def readable(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """Check that the memory of the card can be read."""

    def check_gpu(gpu: GpuSnapshot) -> Outcome:
        memory = cuda_memory(snapshot, gpu)
        if memory is None:
            return unknown(f"NVML does not report the memory: {gpu.memory.reason}")
        size = f"{format_bytes(memory.free_bytes)} free of {format_bytes(memory.total_bytes)}"
        if memory.integrated:
            return ok(f"{size}, shared with the CPU")
        if gpu.memory.value and gpu.memory.value["version"] == 1:
            return ok(
                f"{size} (on this older driver, used memory includes the memory that the driver "
                "reserves)"
            )
        return ok(size)

    return check_each_gpu(devices_to_check(snapshot, context), check_gpu)


def free(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """Check that the memory that the job needs is free."""
    share, required_bytes = context.gpu_memory_utilization, context.required_free_bytes
    if share is None and not required_bytes:
        return None

    def check_gpu(gpu: GpuSnapshot) -> Outcome:
        memory = cuda_memory(snapshot, gpu)
        if memory is None:
            return unknown(f"NVML does not report the memory: {gpu.memory.reason}")
        needed_bytes = max(required_bytes, int((share or 0) * memory.total_bytes))
        what = f"gpu_memory_utilization {share:g}" if share else "--require"
        amount = (
            f"{format_bytes(needed_bytes)} needed ({what}), {format_bytes(memory.free_bytes)} free"
        )
        if needed_bytes <= memory.free_bytes:
            return ok(amount)
        if needed_bytes > memory.total_bytes - CONTEXT_BYTES:
            size = format_bytes(memory.total_bytes)
            return fail("user", f"{amount}; the card has only {size} in total")
        if users := find_display_programs(snapshot, gpu):
            verb = "uses" if users == DISPLAY else "use"
            text = f"{amount}; {users} ({describe_other_processes(gpu)}) {verb} the rest"
            return fail("user", text, display_remedy(gpu))
        if (bytes_used_by_others(gpu) or 0) > NEGLIGIBLE_BYTES:
            users = describe_other_processes(gpu)
            verb = "uses" if users.startswith("pid") and "," not in users else "use"
            return fail("retry", f"{amount}; {users} {verb} the rest")
        return fail("user", amount)

    return check_each_gpu(devices_to_check(snapshot, context), check_gpu)


def tenant(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """Check that no other process uses a large part of the card's memory."""

    def check_gpu(gpu: GpuSnapshot) -> Outcome | None:
        used_by_others, total = bytes_used_by_others(gpu), gpu.total_bytes
        if used_by_others is None or not total:
            return None  # the memory is integrated, or memory.readable reports the reason
        if used_by_others <= NEGLIGIBLE_BYTES:
            return ok("no other process uses memory")
        evidence = (
            f"{format_bytes(used_by_others)} used by other processes: "
            f"{describe_other_processes(gpu)}"
        )
        is_large = used_by_others / total >= TENANT_SHARE and context.gpu_memory_utilization is None
        if display_programs := find_display_programs(snapshot, gpu):
            evidence = (
                f"{format_bytes(used_by_others)} used by {display_programs}: "
                f"{describe_other_processes(gpu)}"
            )
            remedy = display_remedy(gpu)
            return fail("user", evidence, remedy) if is_large else warn(evidence, remedy)
        return fail("retry", evidence) if is_large else warn(evidence)

    return check_each_gpu(devices_to_check(snapshot, context), check_gpu)


CHECKS = (
    Check(
        "memory.readable",
        "The card reports its memory",
        "The sizer needs the total and the free memory. On GB10 and Jetson, NVML reports 'not "
        "supported', so the sizer uses the host's available memory.",
        "give the name of the card with `envcheck size --gpu CARD`",
        readable,
    ),
    Check(
        "memory.free",
        "The memory that the job needs is free",
        "vLLM reserves the fraction gpu_memory_utilization of the card's total memory. vLLM does "
        "not start if less memory is free.",
        "lower `gpu_memory_utilization`, set it to `auto`, or wait until the other process ends",
        free,
    ),
    Check(
        "memory.tenant",
        "No other process uses much of the card",
        "If another process frees or allocates memory while vLLM measures the memory, vLLM fails "
        "to start. If the other process allocates more memory later, the run fails. In a "
        "container, the pid of the other process may be invisible.",
        "end the other process, wait until it ends, or choose another card with "
        "`CUDA_VISIBLE_DEVICES`",
        tenant,
    ),
)
