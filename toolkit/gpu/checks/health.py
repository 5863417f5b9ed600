"""Checks of the card's health: memory errors, the NVSwitch fabric, and the kernel's log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.base.formatting import format_duration, plural
from toolkit.base.symptoms.devices import FATAL_XIDS, USER_XIDS
from toolkit.gpu.checks.check import (
    CheckContext,
    Outcome,
    cards_to_check,
    check_each_gpu,
    fail,
    make_checks,
    ok,
    unknown,
    unread_outcome,
    warn,
)
from toolkit.gpu.checks.modes import compute_mode, mps, persistence

if TYPE_CHECKING:
    from toolkit.gpu.snapshot import GpuSnapshot, NodeSnapshot

RETIRED_PAGES_LIMIT = 60  # NVIDIA replaces a card at 64 retired pages
_RECOVERY_ACTIONS = {
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
    """Check that every card responds."""
    cards = cards_to_check(snapshot, context)
    lost_cards = [gpu for gpu in cards if gpu.lost]
    if not cards:
        return None
    if lost_cards:
        return fail("node", "; ".join(f"{gpu.label}: {gpu.state.reason}" for gpu in lost_cards))
    return ok(f"{len(cards)} of {len(cards)} respond")


def ecc(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """Check that the card had no uncorrected memory error since the driver was loaded."""

    def check_gpu(gpu: GpuSnapshot) -> Outcome | None:
        if gpu.ecc_mode.value == 0:
            return warn(
                "ECC is off, so memory errors are not detected",
                "ask the node's owner to turn on ECC with `nvidia-smi -e 1`",
            )
        errors = gpu.ecc_uncorrected
        if errors.value is None:
            return unread_outcome(errors, "ECC errors")
        if errors.value:
            count_text = plural(errors.value, "uncorrected ECC error")
            return fail("node", f"{count_text} since the driver was loaded")
        lifetime_errors = gpu.ecc_uncorrected_lifetime.value or 0
        return ok(
            f"no uncorrected ECC error since the driver was loaded ({lifetime_errors} over the "
            "card's "
            "lifetime)"
        )

    return check_each_gpu(cards_to_check(snapshot, context), check_gpu)


def rows(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """Check that no memory row waits for remapping, and that no remapping failed."""

    def check_gpu(gpu: GpuSnapshot) -> Outcome | None:
        state = gpu.remapped_rows.value
        if state is None:
            return unread_outcome(gpu.remapped_rows, "remapped rows")
        if state["failure"]:
            return fail("node", "a row could not be remapped", "replace the card (RMA)")
        if state["pending"]:
            return fail("node", "a row remap is pending")
        remapped = plural(state["correctable"] + state["uncorrectable"], "row")
        return ok(f"{remapped} remapped, none pending")

    return check_each_gpu(cards_to_check(snapshot, context), check_gpu)


def pages(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """Check that no memory page waits for retirement (cards before Ampere)."""

    def check_gpu(gpu: GpuSnapshot) -> Outcome | None:
        state = gpu.retired_pages.value
        if state is None:
            return unread_outcome(gpu.retired_pages, "retired pages")
        total = state["single_bit"] + state["double_bit"]
        if state["pending"]:
            retired = plural(total, "page")
            return fail("node", f"a page retirement is pending ({retired} already retired)")
        if total >= RETIRED_PAGES_LIMIT:
            return fail("node", f"{total} pages retired", "replace the card (RMA)")
        return ok(f"{plural(total, 'page')} retired, none pending")

    return check_each_gpu(cards_to_check(snapshot, context), check_gpu)


def recovery(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """Check that the driver does not request a reset of the card or a reboot of the node."""

    def check_gpu(gpu: GpuSnapshot) -> Outcome | None:
        action = gpu.recovery_action
        if action.value is None:
            return unread_outcome(action, "recovery action")
        if action.value:
            what = _RECOVERY_ACTIONS.get(action.value, f"action {action.value}")
            return fail("node", f"the driver requests {what}")
        return ok("the driver requests no recovery")

    return check_each_gpu(cards_to_check(snapshot, context), check_gpu)


def fabric(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """Check that the NVSwitch fabric is ready. If it is not ready, CUDA fails to start with error
    802, even on one card.
    """

    def check_gpu(gpu: GpuSnapshot) -> Outcome | None:
        state = gpu.fabric.value
        if state is None:
            return unread_outcome(gpu.fabric, "fabric")
        if state["state"] == _NO_FABRIC:
            return ok("no NVSwitch fabric")
        if state["state"] == _IN_PROGRESS:
            return fail(
                "retry", "the fabric is being set up", "wait until the fabric manager is ready"
            )
        if state["state"] != _COMPLETED:
            return fail("node", "the fabric has not started, so CUDA fails with error 802")
        if state["status"]:
            code = state["status"]
            return fail(
                "node", f"the fabric failed with NVML code {code}, so CUDA fails with error 802"
            )
        if state["health"] == _UNHEALTHY:
            return fail("node", "the fabric is unhealthy")
        if state["health"] == _LIMITED:
            return warn("the fabric runs at limited capacity")
        return ok("the fabric is ready")

    return check_each_gpu(cards_to_check(snapshot, context), check_gpu)


XID_RECENT_S = 3600


def _describe_event(event: dict[str, Any]) -> str:
    """Return a short text with the meaning of an XID or SXID event in the kernel's log."""
    if event["kind"] == "sxid":
        return "NVSwitch fault"
    number = event["number"]
    return FATAL_XIDS.get(number) or USER_XIDS.get(number) or "see NVIDIA's XID catalogue"


def xid(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """Check that the kernel's log contains no XID that means a bad card. An XID is an error that
    the NVIDIA driver reports.
    """
    if not snapshot.gpus:
        return None
    events = snapshot.driver.kernel_log.value
    if events is None:
        return unknown(f"the kernel's log is not readable: {snapshot.driver.kernel_log.reason}")
    buses = {_short_bus_id(gpu.pci_bus_id.value or "") for gpu in cards_to_check(snapshot, context)}
    relevant = [
        event for event in events if event["kind"] == "sxid" or _short_bus_id(event["bus"]) in buses
    ]
    fatal = [e for e in relevant if e["kind"] == "sxid" or e["number"] in FATAL_XIDS]
    if not fatal:
        user_numbers = sorted(
            {event["number"] for event in relevant if event["number"] in USER_XIDS}
        )
        user_note = (
            f" (XID {', '.join(map(str, user_numbers))}: caused by programs)"
            if user_numbers
            else ""
        )
        return ok(f"no XID since boot indicates a bad card{user_note}")
    latest = min(fatal, key=lambda event: event["age_s"] if event["age_s"] is not None else 0)
    text = (
        f"{latest['kind'].upper()} {latest['number']} on {latest['bus']}: {_describe_event(latest)}"
    )
    if latest["age_s"] is None:
        return fail("node", text)
    text += f", {format_duration(latest['age_s'])} ago"
    # The card responds now; an old event may have been cleared by a reset since.
    return fail("node", text) if latest["age_s"] <= XID_RECENT_S else warn(text)


def _short_bus_id(text: str) -> str:
    """Return the short form of a PCI bus id: ``00000000:3B:00.0`` and ``0000:3b:00`` become
    ``3b:00``. The PCI domain is kept if it is not 0.
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
        "reset the card or reboot the node. If the card is lost again, check its power supply and "
        "its PCIe slot",
        lost,
    ),
    (
        "health.ecc",
        "No uncorrected memory error",
        "An uncorrected ECC error ends the process that reads the bad memory. Later processes on "
        "the card soon fail too.",
        "ask the node's owner to reset the GPU (`nvidia-smi -r`), and to drain the node if the "
        "error recurs",
        ecc,
    ),
    (
        "health.rows",
        "No row remap is pending or failed",
        "Ampere and newer cards remap a bad memory row to a spare row. The remap takes effect at "
        "the next reset of the card. Until then the bad row is in use.",
        "end all processes on the GPU, reset the GPU, and run the check again",
        rows,
    ),
    (
        "health.pages",
        "No page retirement is pending",
        "Cards before Ampere retire bad pages at a reset. A card with 64 retired pages must "
        "be replaced.",
        "end all processes on the GPU, reset the GPU, and run the check again",
        pages,
    ),
    (
        "health.recovery",
        "The driver requests no recovery",
        "Driver 570 and newer reports whether the card must be reset or the node rebooted.",
        "end all processes on the card, then do what the driver requests",
        recovery,
    ),
    (
        "health.xid",
        "The kernel's log has no XID of a bad card",
        "XID and SXID lines are the driver's own reports of faults. Some are caused by a "
        "program (13, 31, 43, 45), others by the card (48, 64, 74, 79, 94, 95, 119, 120 ...).",
        "drain the node and follow NVIDIA's XID catalogue. If the kernel's log could not be read, "
        "run the check as a user who can read the log",
        xid,
    ),
    (
        "health.fabric",
        "The NVSwitch fabric is ready",
        "On HGX boards CUDA does not start, even on one card, until nvidia-fabricmanager has "
        "set up the fabric. Until then CUDA fails with error 802, system not yet initialized.",
        "start the version of `nvidia-fabricmanager` that is equal to the driver's version",
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
        "In the compute mode 'prohibited', no process can create a CUDA context. In the mode "
        "'exclusive process', only one process can create a CUDA context.",
        "ask the node's owner to set the default compute mode with `nvidia-smi -c 0`",
        compute_mode,
    ),
    (
        "health.mps",
        "No MPS daemon limits the job",
        "With MPS (CUDA's multi-process service), the limits of the MPS daemon on memory and "
        "threads apply to the job. An error in one process can end the other processes.",
        "stop the MPS daemon (`echo quit | nvidia-cuda-mps-control`), or unset "
        "`CUDA_MPS_PIPE_DIRECTORY`",
        mps,
    ),
)
CHECKS = make_checks(
    _ROWS,
    about_node=tuple(row[0] for row in _ROWS if row[0] not in ("health.persistence", "health.mps")),
)
