"""Checks of the card's health: memory errors, the NVSwitch fabric, and the kernel's log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.base.formatting import format_duration, plural
from toolkit.base.symptoms.devices import FATAL_XIDS, USER_XIDS
from toolkit.gpu.checks.check import (
    CheckContext,
    Outcome,
    checks_of,
    each,
    fail,
    judged_cards,
    ok,
    unknown,
    unread,
    warn,
)
from toolkit.gpu.checks.modes import compute_mode, mps, persistence

if TYPE_CHECKING:
    from toolkit.gpu.snapshot import GpuSnapshot, NodeSnapshot

RETIRED_PAGES_LIMIT = 60  # NVIDIA replaces a card at 64 retired pages
_RECOVERY = {
    1: "a GPU reset",
    2: "a reboot of the node",
    3: "a drain of its peer cards",
    4: "a drain, then a reset",
    5: "a recovery of the IMEX domain",
    6: "a bus reset",
    7: "a reboot of the system",
}
# nvmlGpuFabricInfo has a state, and from version 3 on a healthSummary.
_NO_FABRIC, _NOT_STARTED, _IN_PROGRESS, _COMPLETED = 0, 1, 2, 3
FABRIC_NOT_READY = (_NOT_STARTED, _IN_PROGRESS)
_UNHEALTHY, _LIMITED = 2, 3


def lost(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """Every card responds."""
    cards = judged_cards(snapshot, context)
    gone = [gpu for gpu in cards if gpu.lost]
    if not cards:
        return None
    if gone:
        return fail("node", "; ".join(f"{gpu.label}: {gpu.state.reason}" for gpu in gone))
    return ok(f"{len(cards)} of {len(cards)} respond")


def ecc(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """No uncorrected memory error since the driver was loaded."""

    def look(gpu: GpuSnapshot) -> Outcome | None:
        if gpu.ecc_mode.value == 0:
            return warn(
                "ECC is off: memory errors are not detected",
                "ask the node's owner to run `nvidia-smi -e 1`",
            )
        errors = gpu.ecc_uncorrected
        if errors.value is None:
            return unread(errors, "ECC errors")
        if errors.value:
            found = plural(errors.value, "uncorrected ECC error")
            return fail("node", f"{found} since the driver was loaded")
        before = gpu.ecc_uncorrected_lifetime.value or 0
        return ok(f"no uncorrected ECC error ({before} in the card's life)")

    return each(judged_cards(snapshot, context), look)


def rows(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """No memory row is pending remapping, and none failed to remap."""

    def look(gpu: GpuSnapshot) -> Outcome | None:
        state = gpu.remapped_rows.value
        if state is None:
            return unread(gpu.remapped_rows, "remapped rows")
        if state["failure"]:
            return fail("node", "a row could not be remapped", "replace the card (RMA)")
        if state["pending"]:
            return fail("node", "a row remap is pending")
        remapped = plural(state["correctable"] + state["uncorrectable"], "row")
        return ok(f"{remapped} remapped, none pending")

    return each(judged_cards(snapshot, context), look)


def pages(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """No memory page is pending retirement (cards before Ampere)."""

    def look(gpu: GpuSnapshot) -> Outcome | None:
        state = gpu.retired_pages.value
        if state is None:
            return unread(gpu.retired_pages, "retired pages")
        total = state["single_bit"] + state["double_bit"]
        if state["pending"]:
            return fail("node", f"a page retirement is pending ({total} retired)")
        if total >= RETIRED_PAGES_LIMIT:
            return fail("node", f"{total} pages retired", "replace the card (RMA)")
        return ok(f"{plural(total, 'page')} retired, none pending")

    return each(judged_cards(snapshot, context), look)


def recovery(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """The driver does not request a reset or reboot."""

    def look(gpu: GpuSnapshot) -> Outcome | None:
        action = gpu.recovery_action
        if action.value is None:
            return unread(action, "recovery action")
        if action.value:
            what = _RECOVERY.get(action.value, f"action {action.value}")
            return fail("node", f"the driver requests {what}")
        return ok("the driver requests no recovery")

    return each(judged_cards(snapshot, context), look)


def fabric(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """The NVSwitch fabric is ready. Without the fabric, CUDA fails to start with error 802, even on
    one card.
    """

    def look(gpu: GpuSnapshot) -> Outcome | None:
        state = gpu.fabric.value
        if state is None:
            return unread(gpu.fabric, "fabric")
        if state["state"] == _NO_FABRIC:
            return ok("no NVSwitch fabric")
        if state["state"] == _IN_PROGRESS:
            return fail(
                "retry", "the fabric is being set up", "wait until the fabric manager is ready"
            )
        if state["state"] != _COMPLETED:
            return fail("node", "the fabric is not started: CUDA error 802")
        if state["status"]:
            return fail("node", f"the fabric failed (NVML code {state['status']}): CUDA error 802")
        if state["health"] == _UNHEALTHY:
            return fail("node", "the fabric is unhealthy")
        if state["health"] == _LIMITED:
            return warn("the fabric runs at limited capacity")
        return ok("the fabric is ready")

    return each(judged_cards(snapshot, context), look)


XID_RECENT_S = 3600


def _meaning(event: dict[str, Any]) -> str:
    """Return a short text with the meaning of an event in the kernel's log."""
    if event["kind"] == "sxid":
        return "NVSwitch fault"
    number = event["number"]
    return FATAL_XIDS.get(number) or USER_XIDS.get(number) or "see NVIDIA's XID catalogue"


def xid(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """The kernel's log contains no XID (error of the NVIDIA driver) that means a bad card."""
    if not snapshot.gpus:
        return None
    events = snapshot.driver.kernel_log.value
    if events is None:
        return unknown(f"the kernel's log is not readable: {snapshot.driver.kernel_log.reason}")
    buses = {_bus(gpu.pci_bus_id.value or "") for gpu in judged_cards(snapshot, context)}
    ours = [event for event in events if event["kind"] == "sxid" or _bus(event["bus"]) in buses]
    bad = [e for e in ours if e["kind"] == "sxid" or e["number"] in FATAL_XIDS]
    if not bad:
        seen = sorted({event["number"] for event in ours if event["number"] in USER_XIDS})
        of_programs = f" (XID {', '.join(map(str, seen))}: caused by programs)" if seen else ""
        return ok(f"no XID of a bad card since boot{of_programs}")
    worst = min(bad, key=lambda event: event["age_s"] if event["age_s"] is not None else 0)
    text = f"{worst['kind'].upper()} {worst['number']} on {worst['bus']}: {_meaning(worst)}"
    if worst["age_s"] is None:
        return fail("node", text)
    text += f", {format_duration(worst['age_s'])} ago"
    # The card responds now; an old event may have been cleared by a reset since.
    return fail("node", text) if worst["age_s"] <= XID_RECENT_S else warn(text)


def _bus(text: str) -> str:
    """Return a short bus id: ``00000000:3B:00.0`` and ``0000:3b:00`` become ``3b:00``. The PCI
    domain is kept if it is not 0.
    """
    domain, _, rest = text.lower().partition(":")
    short = rest.split(".")[0]
    return short if domain.strip("0") == "" else f"{domain.lstrip('0')}:{short}"


_ROWS = (
    (
        "health.lost",
        "Every GPU responds",
        "A card that fell off the bus (XID 79) fails every query. CUDA may still start on the "
        "other cards, but numbers them differently.",
        "reset the card or reboot the node; if the card is lost again, check its power and seating",
        lost,
    ),
    (
        "health.ecc",
        "No uncorrected memory error",
        "An uncorrected ECC error ends the process that hits it, and soon the next one.",
        "ask the node's owner to reset the GPU (`nvidia-smi -r`), and to drain the node if the "
        "error recurs",
        ecc,
    ),
    (
        "health.rows",
        "No row remap is pending or failed",
        "Ampere and newer cards replace bad memory rows by spare rows (remap). The remap takes "
        "effect at a reset. Until then the bad row is in use.",
        "reset the GPU with no process on it, then check again",
        rows,
    ),
    (
        "health.pages",
        "No page retirement is pending",
        "Cards before Ampere retire bad pages at a reset. A card with 64 retired pages must "
        "be replaced.",
        "reset the GPU with no process on it, then check again",
        pages,
    ),
    (
        "health.recovery",
        "The driver requests no recovery",
        "Drivers from 570 on report whether the card must be reset or the node rebooted.",
        "do what the driver requests, with no process on the card",
        recovery,
    ),
    (
        "health.xid",
        "The kernel's log has no XID of a bad card",
        "XID and SXID lines are the driver's own reports of faults. Some are caused by a "
        "program (13, 31, 43, 45), others by the card (48, 64, 74, 79, 94, 95, 119, 120 ...).",
        "drain the node and follow NVIDIA's XID catalogue; if the log could not be read, run the "
        "check with the permission to read it",
        xid,
    ),
    (
        "health.fabric",
        "The NVSwitch fabric is ready",
        "On HGX boards CUDA does not start, even on one card, until nvidia-fabricmanager has "
        "set up the fabric: error 802, system not yet initialized.",
        "start nvidia-fabricmanager of exactly the driver's version",
        fabric,
    ),
    (
        "health.persistence",
        "Persistence mode is on",
        "Without persistence mode the driver unloads its state when the last process ends, so each "
        "start takes seconds per card. The toolkit never changes the mode.",
        "ask the node's owner to start nvidia-persistenced",
        persistence,
    ),
    (
        "health.compute_mode",
        "The compute mode allows the job",
        "The mode 'prohibited' refuses every CUDA context; 'exclusive process' allows only one.",
        "ask the node's owner to run `nvidia-smi -c 0`",
        compute_mode,
    ),
    (
        "health.mps",
        "No MPS daemon limits the job",
        "With MPS (CUDA's multi-process service), the daemon's limits on memory and threads apply, "
        "and an error of one process can end the other processes.",
        "stop the daemon (`echo quit | nvidia-cuda-mps-control`) or unset CUDA_MPS_PIPE_DIRECTORY",
        mps,
    ),
)
CHECKS = checks_of(
    _ROWS,
    about_node=tuple(row[0] for row in _ROWS if row[0] not in ("health.persistence", "health.mps")),
)
