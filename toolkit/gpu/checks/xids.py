"""The kernel's log: the XID and SXID events of the cards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.base.formatting import format_duration
from toolkit.base.symptoms.devices import FATAL_XIDS, USER_XIDS
from toolkit.gpu.checks.check import CheckContext, Outcome, fail, judged_cards, ok, unknown, warn

if TYPE_CHECKING:
    from toolkit.gpu.snapshot import NodeSnapshot

RECENT_S = 3600


def about(event: dict[str, Any]) -> str:
    """The meaning of an event of the kernel's log, in words."""
    if event["kind"] == "sxid":
        return "NVSwitch fault"
    number = event["number"]
    return FATAL_XIDS.get(number) or USER_XIDS.get(number) or "see NVIDIA's XID catalogue"


def xid(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """The kernel's log has no XID that means a bad card."""
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
    text = f"{worst['kind'].upper()} {worst['number']} on {worst['bus']}: {about(worst)}"
    if worst["age_s"] is None:
        return fail("node", text)
    text += f", {format_duration(worst['age_s'])} ago"
    # The card responds now; an old event may have been cleared by a reset since.
    return fail("node", text) if worst["age_s"] <= RECENT_S else warn(text)


def _bus(text: str) -> str:
    """``00000000:3B:00.0`` and ``0000:3b:00`` as ``3b:00``, with the domain where it is not 0."""
    domain, _, rest = text.lower().partition(":")
    short = rest.split(".")[0]
    return short if domain.strip("0") == "" else f"{domain.lstrip('0')}:{short}"
