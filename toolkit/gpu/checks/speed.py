"""Checks for causes that make a healthy card slow: heat, power, a narrow PCIe link, missing links
between cards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.gpu.checks.check import (
    CheckContext,
    Outcome,
    cards_to_check,
    check_each_gpu,
    make_checks,
    ok,
    unread_outcome,
    warn,
)

if TYPE_CHECKING:
    from toolkit.gpu.snapshot import GpuSnapshot, NodeSnapshot

# The bits of nvmlClocksEventReason* that mean a problem. Three other bits do not: an idle card, the
# power cap of a busy card, and clocks that the owner set.
THROTTLE_PROBLEMS = {
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
_CLOCKS_LIMITED_BY_OWNER = 0x02
_NEAR_SLOWDOWN_C = 3
_LOW_POWER_SHARE = 0.9
_P2P_OK = 0


def throttle(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """Check that the clocks of the card are not lowered by heat, by a lack of power or by the
    node's owner.
    """

    def check_gpu(gpu: GpuSnapshot) -> Outcome | None:
        mask = gpu.clock_reasons
        if mask.value is None:
            return unread_outcome(mask, "throttle reasons")
        problems = [text for bit, text in THROTTLE_PROBLEMS.items() if mask.value & bit]
        clocks = gpu.clocks_mhz.value
        clock_text = f" (SM clock {clocks['sm']} of {clocks['max_sm']} MHz)" if clocks else ""
        if problems:
            return warn(f"{', '.join(problems)}{clock_text}")
        if mask.value & _CLOCKS_LIMITED_BY_OWNER:
            return warn(
                f"the node's owner has limited the clocks{clock_text}",
                "ask the node's owner to reset the clocks with `nvidia-smi -rac`",
            )
        return ok("not throttled")

    return check_each_gpu(cards_to_check(snapshot, context), check_gpu)


def power(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """Check that the power limit of the card is not lower than its default limit."""

    def check_gpu(gpu: GpuSnapshot) -> Outcome | None:
        limit, default_limit = gpu.power_limit_mw.value, gpu.power_default_mw.value
        if limit is None or not default_limit:
            return unread_outcome(gpu.power_limit_mw, "power limit") if limit is None else None
        text = f"{limit / 1000:.0f} W of {default_limit / 1000:.0f} W"
        return ok(text) if limit >= _LOW_POWER_SHARE * default_limit else warn(f"limited to {text}")

    return check_each_gpu(cards_to_check(snapshot, context), check_gpu)


def temperature(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """Check that the card is cooler than the temperature at which it lowers its clocks."""

    def check_gpu(gpu: GpuSnapshot) -> Outcome | None:
        current, limit = gpu.temperature_c.value, gpu.slowdown_c.value
        if current is None:
            return unread_outcome(gpu.temperature_c, "temperature")
        if limit is None:
            return ok(f"{current} C")
        text = f"{current} C; the card slows down at {limit} C"
        return ok(text) if current < limit - _NEAR_SLOWDOWN_C else warn(text)

    return check_each_gpu(cards_to_check(snapshot, context), check_gpu)


def pcie(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """Check that the PCIe link has its full width, and its full speed under load."""

    def check_gpu(gpu: GpuSnapshot) -> Outcome | None:
        link = gpu.pcie.value
        if link is None:
            return unread_outcome(gpu.pcie, "PCIe link")
        text = f"x{link['width']} of x{link['max_width']}, generation {link['generation']}"
        text += f" of {link['max_generation']}"
        if 0 < link["width"] < link["max_width"]:
            return warn(f"the link is narrow: {text}")
        # Below P0 the card lowers the PCIe generation to save power, and raises it under load.
        busy = gpu.performance_state.value == 0 and (gpu.utilization_percent.value or 0) > 0
        if busy and link["generation"] < link["max_generation"]:
            return warn(f"the link is slow under load: {text}")
        return ok(text)

    return check_each_gpu(cards_to_check(snapshot, context), check_gpu)


def nvlink(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """Check that all NVLinks of the cards are up."""
    if len(snapshot.gpus) < 2:
        return None

    def check_gpu(gpu: GpuSnapshot) -> Outcome | None:
        links = gpu.nvlinks.value
        if not links:
            return None if links is not None else unread_outcome(gpu.nvlinks, "NVLink")
        down = [str(number) for number, state in enumerate(links) if not state]
        if not down:
            return ok(f"{len(links)} NVLinks up")
        return warn(f"NVLink {', '.join(down)} of {len(links)} down")

    return check_each_gpu(cards_to_check(snapshot, context), check_gpu)


def p2p(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """Check that the cards of a job can read each other's memory."""
    if context.gpu_count < 2 or len(snapshot.gpus) < 2:
        return None
    pairs = snapshot.driver.p2p
    if pairs.value is None:
        return unread_outcome(pairs, "P2P")
    checked_indices = {gpu.index for gpu in cards_to_check(snapshot, context)}
    blocked_pairs = [
        f"{i}-{j}"
        for i, j, status in pairs.value
        if {i, j} <= checked_indices and status != _P2P_OK
    ]
    if blocked_pairs:
        return warn(
            f"no peer access between cards {', '.join(blocked_pairs[:6])}, so copies go through "
            "the host"
        )
    return ok("all cards can read each other's memory")


def group_link(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """Check that the cards of a tensor-parallel group are linked by NVLink."""
    size = context.tensor_parallel_size
    if size < 2 or len(snapshot.gpus) < 2:
        return None

    def check_gpu(gpu: GpuSnapshot) -> Outcome | None:
        links = gpu.nvlinks.value
        if links is None:
            return unread_outcome(gpu.nvlinks, "NVLink")
        links_up = sum(bool(state) for state in links)
        if links_up:
            return ok(f"{links_up} NVLinks connect this card to the tensor-parallel group")
        return warn(f"no NVLink, so the {size} cards of the tensor-parallel group use PCIe")

    return check_each_gpu(cards_to_check(snapshot, context), check_gpu)


_ROWS = (
    (
        "speed.throttle",
        "Nothing lowers the clocks",
        "Heat, a power brake or a failing power supply can halve the clocks without any error.",
        "use another node, and ask the node's owner to check the cooling and the power supply",
        throttle,
    ),
    (
        "speed.power",
        "The power limit is the card's usual one",
        "A lowered power limit often remains from an experiment. It reduces speed under load.",
        "ask the node's owner to set the default limit with `nvidia-smi -pl WATTS`",
        power,
    ),
    (
        "speed.temperature",
        "The card is below its slowdown temperature",
        "At its slowdown temperature a card halves its clocks.",
        "use another node, and ask the node's owner to check the cooling",
        temperature,
    ),
    (
        "speed.pcie",
        "The PCIe link is at its full width",
        "A card that is not fully in its slot uses fewer PCIe lanes, which slows down the loading "
        "of weights and copies to the host.",
        "ask the node's owner to reseat the card, and to check the slot and its BIOS settings",
        pcie,
    ),
    (
        "speed.nvlink",
        "All NVLinks are up",
        "An NVLink that is down slows down every collective operation of a job on several cards.",
        "ask the node's owner to check the bridge or the NVSwitch trays, and to reset the node",
        nvlink,
    ),
    (
        "speed.p2p",
        "The cards of a job can read each other's memory",
        "Without peer access, NCCL copies data between cards through the host's memory.",
        "check the topology (`nvidia-smi topo -m`) and the settings of IOMMU and ACS",
        p2p,
    ),
    (
        "speed.group_link",
        "Cards of a tensor-parallel group have NVLink between them",
        "With model.tensor_parallel_size above 1, the cards of a group sum their results over the "
        "link: four times per layer in a training step, twice per layer for each sampled token.",
        "use cards with NVLink, or set `model.tensor_parallel_size` as low as the memory allows",
        group_link,
    ),
)
CHECKS = make_checks(_ROWS, about_node=("speed.throttle", "speed.pcie"))
