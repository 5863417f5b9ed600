"""Map CUDA's device numbers to NVML's cards, with CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER.

The rules are those of the CUDA programming guide. CUDA_VISIBLE_DEVICES is a list of indices or of
UUIDs (a unique prefix of a UUID is enough). CUDA ignores the first unknown entry and all entries
after it. CUDA uses at most one MIG slice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolkit.base.capability import X86_64
from toolkit.base.errors import ConfigError
from toolkit.gpu import cards

if TYPE_CHECKING:
    from toolkit.gpu.snapshot import GpuSnapshot, NodeSnapshot

CUDA_VISIBLE_DEVICES, CUDA_DEVICE_ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"


@dataclass(frozen=True, slots=True)
class VisibleDevices:
    """The visible devices, in the order of their CUDA indices (0, 1, ...). If CUDA ignores a part
    of CUDA_VISIBLE_DEVICES, ``problem`` is a text that says why. Otherwise ``problem`` is None.
    """

    devices: tuple[GpuSnapshot, ...]
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """The total and the free bytes of memory that CUDA can use on a device. ``integrated`` is true
    if the device shares its memory with the CPU (GB10, Jetson).
    """

    total_bytes: int
    free_bytes: int
    integrated: bool = False


def cuda_order(snapshot: NodeSnapshot) -> tuple[GpuSnapshot, ...]:
    """Return all cards that respond, in the order in which CUDA numbers the cards without
    CUDA_VISIBLE_DEVICES.

    Without CUDA_DEVICE_ORDER=PCI_BUS_ID, CUDA sorts the cards by speed with an undocumented rule.
    Cards of one kind keep the order of the PCI bus. If the kinds differ, this function guesses the
    order from compute capability and memory, and the check ``devices.order`` reports that the order
    is a guess.
    """
    responding = [gpu for gpu in snapshot.gpus if not gpu.lost]
    by_bus = sorted(responding, key=lambda gpu: (gpu.pci_bus_id.value or "", gpu.index))
    if snapshot.environment.get(
        CUDA_DEVICE_ORDER, ""
    ).upper() == "PCI_BUS_ID" or not has_mixed_cards(snapshot):
        return tuple(by_bus)
    return tuple(
        sorted(
            by_bus, key=lambda gpu: (gpu.capability or (0, 0), gpu.total_bytes or 0), reverse=True
        )
    )


def has_mixed_cards(snapshot: NodeSnapshot) -> bool:
    """Whether the node has cards of different kinds."""
    return len({gpu.name.value for gpu in snapshot.gpus if gpu.name.has_value}) > 1


def visible_devices(snapshot: NodeSnapshot) -> VisibleDevices:
    """Return the devices that CUDA will see. If one of the selected cards has a MIG slice, CUDA
    sees only this slice.
    """
    cards = cuda_order(snapshot)
    setting = snapshot.environment.get(CUDA_VISIBLE_DEVICES)
    if setting is None:
        return _with_slices(cards)
    if setting.strip() == "NoDevFiles":
        return VisibleDevices(
            (), f"{CUDA_VISIBLE_DEVICES} is NoDevFiles, because Slurm gave this job no GPU"
        )
    chosen: list[GpuSnapshot] = []
    for entry in (part.strip() for part in setting.split(",")):
        device = _find_device(entry, cards)
        if device is None:
            problem = (
                f"{entry!r} in {CUDA_VISIBLE_DEVICES}={setting!r}"
                if entry
                else f"{CUDA_VISIBLE_DEVICES} is empty"
            )
            reason = (
                f"{problem} does not name a GPU of this node; CUDA ignores it and all entries "
                "after it"
            )
            return _with_slices(tuple(chosen), reason if entry else f"{problem}: CUDA sees no GPU")
        if device in chosen:
            duplicate = f"{CUDA_VISIBLE_DEVICES}={setting!r} contains {device.label} twice"
            return VisibleDevices((), f"{duplicate}: CUDA sees no GPU")
        chosen.append(device)
    return _with_slices(tuple(chosen))


def _find_device(entry: str, cards: tuple[GpuSnapshot, ...]) -> GpuSnapshot | None:
    if entry.isascii() and entry.isdigit():
        return cards[int(entry)] if int(entry) < len(cards) else None
    kinds = {"GPU-": cards, "MIG-": tuple(mig_slice for card in cards for mig_slice in card.slices)}
    candidates = kinds.get(entry[:4].upper(), ())
    matches = [
        device
        for device in candidates
        if (device.uuid.value or "").lower().startswith(entry.lower())
    ]
    if not matches and entry.upper().startswith("MIG-GPU-"):
        matches = [
            mig_slice
            for mig_slice in candidates
            if _old_mig_name(mig_slice, cards) == entry.lower()
        ]
    return matches[0] if len(matches) == 1 else None


def _old_mig_name(part: GpuSnapshot, cards: tuple[GpuSnapshot, ...]) -> str:
    """Return the name of a MIG slice in the form that drivers before 470 used: ``MIG-GPU-<uuid of
    the card>/<gpu instance>/<compute instance>``, in lower case.
    """
    card = next(card for card in cards if card.index == part.parent)
    return f"mig-{card.uuid.value}/{part.gpu_instance.value}/{part.compute_instance.value}".lower()


def _with_slices(devices: tuple[GpuSnapshot, ...], problem: str | None = None) -> VisibleDevices:
    """Return what CUDA sees of the chosen ``devices``. If one of them is a MIG slice or a card with
    slices, CUDA sees only the first slice and no other device. Otherwise CUDA sees all cards that
    are not in MIG mode.
    """
    slices = [device if device.parent is not None else device.slices[:1] for device in devices]
    first = next((part for part in slices if part), None)
    if first is not None:
        first_slice = first[0] if isinstance(first, tuple) else first
        return VisibleDevices((first_slice,), problem)
    usable = tuple(device for device in devices if not in_mig_mode(device))
    return VisibleDevices(usable, problem)


def in_mig_mode(gpu: GpuSnapshot) -> bool:
    """Whether the card is in MIG mode. A card in MIG mode may have no slices."""
    return bool(gpu.mig_mode.value and gpu.mig_mode.value[0] == 1)


def select_device(snapshot: NodeSnapshot, index: int | None = None) -> GpuSnapshot | None:
    """Return the device that has the number ``index`` in CUDA. Without an ``index``, return
    device 0. Return None if CUDA sees no GPU.

    Raises ConfigError if CUDA sees GPUs, but none with the number ``index``.
    """
    visible = visible_devices(snapshot)
    if not visible.devices:
        return None
    if (index or 0) >= len(visible.devices) or (index or 0) < 0:
        raise ConfigError(
            f"GPU {index} was requested, but CUDA sees {len(visible.devices)} on this node"
            + (f" ({visible.problem})" if visible.problem else ""),
            where="--gpu-index",
            fix=f"use an index below {len(visible.devices)}. CUDA numbers the cards in "
            "CUDA_VISIBLE_DEVICES from 0",
        )
    return visible.devices[index or 0]


def cuda_memory(snapshot: NodeSnapshot, gpu: GpuSnapshot) -> DeviceMemory | None:
    """Return the total and the free memory that CUDA has on ``gpu``. Return None if the memory is
    unknown. GB10 and Jetson share their memory with the CPU, and NVML does not report this memory.
    For these devices, the result is the total and the available memory of the host.
    """
    if gpu.total_bytes is not None and gpu.free_bytes is not None:
        return DeviceMemory(gpu.total_bytes, gpu.free_bytes)
    host_memory = snapshot.host.memory.value
    if not gpu.memory.unsupported or host_memory is None:
        return None
    return DeviceMemory(host_memory["total"], host_memory["available"], integrated=True)


def parent_card(snapshot: NodeSnapshot, gpu: GpuSnapshot) -> GpuSnapshot:
    """Return the card that the MIG slice ``gpu`` belongs to. If ``gpu`` is a card, return ``gpu``.
    Memory errors and links are properties of the card, but a slice has its own memory size.
    """
    if gpu.parent is None:
        return gpu
    return next(card for card in snapshot.gpus if card.index == gpu.parent)


def cpu_architecture(snapshot: NodeSnapshot, gpu: GpuSnapshot) -> str:
    """Return the CPU architecture of the node (x86_64, aarch64). If the snapshot does not contain
    the architecture, return the one in the table of cards. For a card that is not in the table,
    return x86_64.
    """
    if snapshot.software.machine.value:
        return snapshot.software.machine.value
    card = cards.card_of_nvml_name(parent_card(snapshot, gpu).name.value or "")
    return card.machine if card else X86_64
