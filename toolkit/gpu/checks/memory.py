"""Memory of the card: what is free, who holds the rest, and whether the job's share is there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.base.formatting import MIB, format_bytes
from toolkit.gpu.checks.check import (
    Check,
    CheckContext,
    Outcome,
    each,
    fail,
    judged,
    ok,
    unknown,
    warn,
)
from toolkit.gpu.devices import memory_of

if TYPE_CHECKING:
    from toolkit.gpu.snapshot import GpuSnapshot, NodeSnapshot

# An empty card still shows some MiB (driver, display, a persistence daemon's context).
NEGLIGIBLE_BYTES = 700 * MIB
TENANT_SHARE = 0.2  # of the card: above it a job sized for the card does not fit
DISPLAY_SHARE = 0.5  # of what others hold: then the card draws, and waiting does not help
DISPLAY = "the display"
# A CUDA context and cuBLAS of the job itself, before it allocates a byte (measured on an H100).
CONTEXT_BYTES = 600 * MIB


def held_by_others(gpu: GpuSnapshot) -> int | None:
    """Bytes in use by other processes. Version 1 of the call counts the driver's share as used."""
    memory = gpu.memory.value
    if memory is None:
        return None
    mine = sum(
        process["used_bytes"] or 0 for process in gpu.processes.value or [] if process["mine"]
    )
    return max(0, int(memory["used"]) - mine)


def display(snapshot: NodeSnapshot, gpu: GpuSnapshot) -> str | None:
    """Who draws on the card, where that holds most of what others hold: a desktop, or Windows under
    WSL. None otherwise. That memory does not come free by waiting.
    """
    held = held_by_others(gpu) or 0
    if held <= NEGLIGIBLE_BYTES:
        return None
    if (snapshot.host.place.value or {}).get("wsl"):
        return "Windows and its programs"
    drawn = sum(
        process["used_bytes"] or 0
        for process in gpu.processes.value or []
        if process["kind"] == "graphics" and not process["mine"]
    )
    return DISPLAY if drawn >= DISPLAY_SHARE * held else None


def share_that_fits(gpu: GpuSnapshot) -> float:
    """The largest gpu_memory_utilization beside what is held now, rounded down."""
    memory = gpu.memory.value or {}
    total = int(memory.get("total", 0)) - int(memory.get("reserved") or 0)
    room = max(0, int(memory.get("free", 0)) - CONTEXT_BYTES)
    return room * 100 // total / 100 if total else 0.0


def beside_display(gpu: GpuSnapshot) -> str:
    """What to do where a display holds memory."""
    return (
        f"set gpu_memory_utilization to at most {share_that_fits(gpu):.2f} (envcheck size says"
        " whether that is enough), close programs that draw, or let another card draw"
    )


def holders(gpu: GpuSnapshot) -> str:
    """Who holds it, by pid; in a pid namespace the list is empty or its numbers are the host's."""
    others: list[dict[str, Any]] = [p for p in gpu.processes.value or [] if not p["mine"]]
    if not others:
        return "hidden processes"
    parts = []
    for process in sorted(others, key=lambda p: -(p["used_bytes"] or 0))[:4]:
        used = process["used_bytes"]
        name = f" {process['name']}" if process.get("name") else ""
        parts.append(f"pid {process['pid']}{name}" + (f" {format_bytes(used)}" if used else ""))
    more = f" and {len(others) - 4} more" if len(others) > 4 else ""
    return ", ".join(parts) + more


def readable(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """The card tells its memory."""

    def look(gpu: GpuSnapshot) -> Outcome:
        memory = memory_of(snapshot, gpu)
        if memory is None:
            return unknown(f"memory not reported: {gpu.memory.reason}")
        size = f"{format_bytes(memory.free_bytes)} free of {format_bytes(memory.total_bytes)}"
        if memory.integrated:
            return ok(f"{size}, shared with the CPU")
        if gpu.memory.value and gpu.memory.value["version"] == 1:
            return ok(f"{size} (an older driver: 'used' includes what the driver reserves)")
        return ok(size)

    return each(judged(snapshot, context), look)


def free(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """What the job asks of the card is free."""
    share, least = context.gpu_memory_utilization, context.required_free_bytes
    if share is None and not least:
        return None

    def look(gpu: GpuSnapshot) -> Outcome:
        memory = memory_of(snapshot, gpu)
        if memory is None:
            return unknown(f"memory not reported: {gpu.memory.reason}")
        wanted = max(least, int((share or 0) * memory.total_bytes))
        what = f"gpu_memory_utilization {share:g}" if share else "--require"
        amount = f"{format_bytes(wanted)} wanted ({what}), {format_bytes(memory.free_bytes)} free"
        if wanted <= memory.free_bytes:
            return ok(amount)
        if wanted > memory.total_bytes - CONTEXT_BYTES:
            return fail("user", f"{amount} of {format_bytes(memory.total_bytes)}: never fits")
        if who := display(snapshot, gpu):
            hold = "holds" if who == DISPLAY else "hold"
            text = f"{amount}; {who} ({holders(gpu)}) {hold} the rest"
            return fail("user", text, beside_display(gpu))
        if (held_by_others(gpu) or 0) > NEGLIGIBLE_BYTES:
            who = holders(gpu)
            hold = "holds" if who.startswith("pid") and "," not in who else "hold"
            return fail("retry", f"{amount}; {who} {hold} the rest")
        return fail("user", amount)

    return each(judged(snapshot, context), look)


def tenant(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """Nobody else holds a large part of the card."""

    def look(gpu: GpuSnapshot) -> Outcome | None:
        held, total = held_by_others(gpu), gpu.total_bytes
        if held is None or not total:
            return None  # integrated memory, or memory.readable says why
        if held <= NEGLIGIBLE_BYTES:
            return ok("no other process holds memory")
        evidence = f"{format_bytes(held)} held by others: {holders(gpu)}"
        large = held / total >= TENANT_SHARE and context.gpu_memory_utilization is None
        if who := display(snapshot, gpu):
            evidence = f"{format_bytes(held)} held by {who}: {holders(gpu)}"
            remedy = beside_display(gpu)
            return fail("user", evidence, remedy) if large else warn(evidence, remedy)
        return fail("retry", evidence) if large else warn(evidence)

    return each(judged(snapshot, context), look)


CHECKS = (
    Check(
        "memory.readable",
        "The card tells its memory",
        "Sizing needs the total and what is free. On GB10 and Jetson NVML answers 'not "
        "supported' and the host's available memory counts.",
        "state the memory by hand: `envcheck size --gpu CARD`",
        readable,
    ),
    Check(
        "memory.free",
        "What the job asks of the card is free",
        "vLLM refuses to start where less is free than gpu_memory_utilization x total.",
        "lower gpu_memory_utilization or set it to auto; or wait for the other process",
        free,
    ),
    Check(
        "memory.tenant",
        "No other process holds much of the card",
        "A neighbour that frees or takes memory while vLLM measures makes its start fail, and "
        "one that grows later ends the run. In a container its pid can be invisible.",
        "wait for the process or end it, or choose another card with CUDA_VISIBLE_DEVICES",
        tenant,
    ),
)
