"""Checks of the modes that the card's owner sets: persistence mode, compute mode, and MPS (NVIDIA's
Multi-Process Service).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.gpu.checks.check import (
    CheckContext,
    Outcome,
    cards_to_check,
    check_each_gpu,
    fail,
    ok,
    unread_outcome,
    warn,
)

if TYPE_CHECKING:
    from toolkit.gpu.snapshot import GpuSnapshot, NodeSnapshot

_PROHIBITED, _EXCLUSIVE = 2, 3


def persistence(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """Check that persistence mode is on, which keeps the driver loaded between jobs."""

    def check_gpu(gpu: GpuSnapshot) -> Outcome | None:
        mode = gpu.persistence_mode
        if mode.value is None:
            return unread_outcome(mode, "persistence mode")
        return (
            ok("persistence mode is on")
            if mode.value
            else warn("persistence mode is off, so each start waits until the card is initialized")
        )

    return check_each_gpu(cards_to_check(snapshot, context), check_gpu)


def compute_mode(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """Check that the compute mode allows the job to create CUDA contexts on the card."""

    def check_gpu(gpu: GpuSnapshot) -> Outcome | None:
        mode = gpu.compute_mode
        if mode.value is None:
            return unread_outcome(mode, "compute mode")
        others = [p for p in gpu.processes.value or [] if not p["mine"] and p["kind"] == "compute"]
        if mode.value == _PROHIBITED:
            return fail(
                "node", "the compute mode is 'prohibited', so no process can create a CUDA context"
            )
        if mode.value == _EXCLUSIVE and others:
            return fail(
                "retry",
                f"the compute mode is exclusive, and process {others[0]['pid']} uses the card",
                "wait for that process to end",
            )
        if mode.value == _EXCLUSIVE:
            return warn(
                "the compute mode is exclusive, so only one process can use the card. The engine "
                "must run in the trainer's process"
            )
        return ok("shared (default)")

    return check_each_gpu(cards_to_check(snapshot, context), check_gpu)


def mps(snapshot: NodeSnapshot, _context: CheckContext) -> Outcome | None:
    """Check that the job does not use the card through MPS (NVIDIA's Multi-Process Service)."""
    running = snapshot.driver.mps
    if not snapshot.gpus or running.value is None:
        return None if not snapshot.gpus else unread_outcome(running, "MPS")
    if running.value:
        return warn(
            "an MPS control daemon is running. Its limits on memory and threads apply to the job"
        )
    return ok("no MPS daemon")
