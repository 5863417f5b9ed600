"""Describe the card to size for: a card of this node (GpuSnapshot), or a card in the table of known
cards (Card).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolkit.base.errors import ConfigError
from toolkit.base.formatting import MIB
from toolkit.config.resolved import DeviceFacts, Situation, is_vllm_installed
from toolkit.gpu.devices import cuda_memory, visible_devices

if TYPE_CHECKING:
    from collections.abc import Sequence

    from toolkit.gpu.cards import Card
    from toolkit.gpu.snapshot import GpuSnapshot, NodeSnapshot

# Memory of a process's CUDA context outside torch's allocator, including libraries that are loaded
# on first use: 682 MiB on an H100 (driver 580, torch 2.11, CUDA 13).
CONTEXT_BYTES = 682 * MIB
# NVML's total includes the memory that the driver reserves. The total of cudaMemGetInfo, which vLLM
# multiplies by gpu_memory_utilization, does not. On H100 and H200 the difference is 0.4 to 0.6 % of
# the card.
RESERVED_SHARE = 0.0055


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One card. ``total_bytes`` and ``free_bytes`` are the total and the free memory that NVML
    reports. ``cuda_total_bytes`` is the total that CUDA reports, which vLLM multiplies by
    gpu_memory_utilization.
    """

    name: str
    total_bytes: int
    free_bytes: int
    context_bytes: int = CONTEXT_BYTES
    compute_capability: tuple[int, int] = (9, 0)
    reserved_bytes: int | None = None
    machine: str = "x86_64"
    is_local: bool = True

    @property
    def cuda_total_bytes(self) -> int:
        reserved = self.reserved_bytes
        if reserved is None:
            reserved = int(self.total_bytes * RESERVED_SHARE)
        return self.total_bytes - reserved

    @classmethod
    def from_card(cls, card: Card) -> Device:
        """The device for a card in the table of known cards. All of its memory counts as free."""
        return cls(
            name=card.name,
            total_bytes=card.total_bytes,
            free_bytes=card.cuda_bytes,
            compute_capability=card.compute_capability,
            reserved_bytes=card.total_bytes - card.cuda_bytes,
            machine=card.machine,
            is_local=False,
        )

    @classmethod
    def from_node(cls, snapshot: NodeSnapshot, gpu: GpuSnapshot) -> Device:
        """Return the device for ``gpu``, a GPU of this node. If the GPU shares its memory with the
        CPU, the free bytes of the device are the available bytes of the host.

        A MIG slice has the memory of the slice, and not that of the whole card. Raises ConfigError
        if NVML does not report the memory.
        """
        memory = cuda_memory(snapshot, gpu)
        if memory is None or not memory.integrated:
            return cls.from_snapshot(gpu)
        return cls(
            name=f"{gpu.name.value or gpu.label} (integrated memory)",
            total_bytes=memory.total_bytes,
            free_bytes=memory.free_bytes,
            compute_capability=gpu.capability or (0, 0),
            reserved_bytes=0,
        )

    @classmethod
    def from_snapshot(cls, gpu: GpuSnapshot) -> Device:
        """The device for a card in its current state. Memory that other processes use is not free.
        Raises ConfigError if NVML does not report the memory.
        """
        total, free = gpu.total_bytes, gpu.free_bytes
        if total is None or free is None:
            raise ConfigError(
                f"{gpu.label} does not report its memory ({gpu.memory.reason})",
                fix="use the option --gpu with the name of the card",
            )
        reserved = (gpu.memory.value or {}).get("reserved")
        if not isinstance(reserved, int) or reserved <= 0:
            reserved = int(total * RESERVED_SHARE)
        return cls(
            name=gpu.name.value or gpu.label,
            total_bytes=total,
            free_bytes=min(free, total - reserved),
            compute_capability=gpu.capability or (0, 0),
            reserved_bytes=reserved,
        )


def device_situation(device: Device | None, world_size: int = 1) -> Situation:
    """Return the Situation of a run on ``device`` (None: the CPU): the card, the number of
    processes of the run, and the installed vLLM. If ``device`` belongs to another node, vLLM is
    assumed to be installed there.
    """
    is_local = device is None or device.is_local
    facts = DeviceFacts("no GPU", None)
    if device is not None:
        machine = None if device.is_local else device.machine
        facts = DeviceFacts(device.name, device.compute_capability, machine)
    return Situation(
        world_size=world_size, device=facts, vllm=is_vllm_installed() if is_local else None
    )


def local_situation(
    snapshot: NodeSnapshot, *, gpu_index: int | None = None, world_size: int = 1
) -> Situation:
    """Return the Situation of a run on this node: the card, the number of processes of the run, and
    the installed vLLM.

    The card is the GPU with the CUDA index ``gpu_index``. If ``gpu_index`` is None or too large,
    the card is the first GPU. Without a GPU, the run uses the CPU.
    """
    gpus = visible_devices(snapshot).devices
    facts = DeviceFacts("no GPU", None)
    if gpus:
        gpu = gpus[gpu_index if gpu_index is not None and gpu_index < len(gpus) else 0]
        facts = DeviceFacts(gpu.name.value or gpu.label, gpu.capability or (0, 0))
    return Situation(world_size=world_size, device=facts, vllm=is_vllm_installed())


def device_with_least_free_memory(devices: Sequence[Device | None]) -> Device | None:
    """Return the device with the least free memory among the devices of all processes of a run;
    None if all processes run on the CPU.

    Raises:
        ConfigError: some processes have a GPU and others do not.
    """
    cards = [device for device in devices if device is not None]
    if cards and len(cards) < len(devices):
        ranks_without_gpu = [str(number) for number, device in enumerate(devices) if device is None]
        raise ConfigError(
            (
                f"{len(cards)} of {len(devices)} processes have a GPU; process "
                f"{', '.join(ranks_without_gpu)} has none"
            ),
            where="pre-flight",
            fix=(
                "on each node, start as many processes as the node has visible GPUs "
                "(CUDA_VISIBLE_DEVICES limits the visible GPUs)"
            ),
        )
    return min(cards, key=lambda card: (card.free_bytes, card.total_bytes), default=None)
