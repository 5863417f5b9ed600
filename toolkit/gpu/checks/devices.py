"""Checks of the cards that CUDA will see: the entries of CUDA_VISIBLE_DEVICES, the order and number
of the cards, and MIG slices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.base.formatting import plural
from toolkit.base.versions import as_version
from toolkit.gpu import cards
from toolkit.gpu.checks.check import (
    Check,
    CheckContext,
    Outcome,
    cards_to_check,
    fail,
    ok,
    warn,
)
from toolkit.gpu.devices import (
    CUDA_DEVICE_ORDER,
    CUDA_VISIBLE_DEVICES,
    cuda_order,
    has_mixed_cards,
    in_mig_mode,
    visible_devices,
)
from toolkit.gpu.presence import find_gpu_requirement

if TYPE_CHECKING:
    from toolkit.gpu.snapshot import NodeSnapshot

# vLLM turns entries of CUDA_VISIBLE_DEVICES into numbers. Release 0.20.1 still fails on UUIDs
# (issue 41848). Releases 0.25.1 and 0.31 query NVML for the index (vllm/platforms/cuda.py).
VLLM_WITH_UUIDS = (0, 25)


def visible(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """Check that every entry of CUDA_VISIBLE_DEVICES is an existing card."""
    if not snapshot.gpus:
        return None
    cuda_devices = visible_devices(snapshot)
    if not cuda_devices.problem:
        names = ", ".join(gpu.label for gpu in cuda_devices.devices) or "no GPU"
        return ok(f"CUDA sees {names}")
    if cuda_devices.devices or find_gpu_requirement(snapshot, context):
        return fail("user", cuda_devices.problem)
    if snapshot.environment.get(CUDA_VISIBLE_DEVICES, "x").strip() in ("", "-1"):
        return ok(f"{CUDA_VISIBLE_DEVICES} hides every GPU, so the run uses the CPU")
    return fail("user", cuda_devices.problem)


def count(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """Check that CUDA sees as many cards as the job needs."""
    needed = context.gpu_count
    if not snapshot.gpus or (needed <= 1 and context.required_gpus == 0):
        return None
    visible_count = len(visible_devices(snapshot).devices)
    if visible_count < needed:
        lost = [gpu.label for gpu in snapshot.gpus if gpu.lost]
        reason = f" ({', '.join(lost)} lost)" if lost else ""
        return fail(
            "node" if lost else "user",
            f"the job needs {needed} GPUs, but CUDA sees {visible_count}{reason}",
        )
    return ok(f"CUDA sees {visible_count}, the job needs {needed}")


def index(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """Check that the card that --gpu-index selects exists."""
    if context.gpu_index is None or not snapshot.gpus:
        return None
    cuda_devices, option = visible_devices(snapshot).devices, f"--gpu-index {context.gpu_index}"
    if context.gpu_index >= len(cuda_devices):
        return fail("user", f"{option}: CUDA sees {plural(len(cuda_devices), 'GPU')}")
    chosen = cuda_devices[context.gpu_index]
    return ok(f"{option} is {chosen.label} ({chosen.name.value})")


def kind(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """Check that the card matches the name and the compute capability that --require gives."""
    gpus = [gpu for gpu in cards_to_check(snapshot, context) if not gpu.lost]
    if not gpus or not (context.required_card or context.required_capability):
        return None
    names = {gpu.name.value or "" for gpu in gpus}
    wanted_card = context.required_card
    if wanted_card and not any(
        cards.card_matches(wanted_card, gpu.name.value or "", gpu.capability) for gpu in gpus
    ):
        return fail(
            "user", f"{wanted_card} is required, but the job has {', '.join(sorted(names))}"
        )
    required_capability = context.required_capability
    too_old = [
        gpu
        for gpu in gpus
        if required_capability and (gpu.capability is None or gpu.capability < required_capability)
    ]
    if required_capability and too_old:
        actual = ".".join(map(str, too_old[0].capability or ())) or "unknown"
        required = ".".join(map(str, required_capability))
        return fail(
            "user",
            f"{too_old[0].label} has compute capability {actual}, but at least {required} is "
            "required",
        )
    return ok(", ".join(sorted(names)))


def uuid(snapshot: NodeSnapshot, _context: CheckContext) -> Outcome | None:
    """Check that the installed vLLM can read CUDA_VISIBLE_DEVICES if it contains UUIDs."""
    entries = snapshot.environment.get(CUDA_VISIBLE_DEVICES, "").upper()
    installed = (snapshot.software.packages.value or {}).get("vllm")
    if not snapshot.gpus or not installed or not ("GPU-" in entries or "MIG-" in entries):
        return None
    if as_version(installed).release[:2] < VLLM_WITH_UUIDS:
        return fail(
            "user", f"vLLM {installed} reads {CUDA_VISIBLE_DEVICES} as numbers and fails on UUIDs"
        )
    if "MIG-" in entries:
        return warn(
            f"vLLM {installed} queries NVML with an index instead of the UUID of the MIG slice, so "
            "it may use the memory size of the whole card",
            "set `model.gpu_memory_utilization` to the value that `envcheck size` prints, because "
            "that value is computed from the memory of the slice",
        )
    return ok(f"vLLM {installed} reads UUIDs")


def order(snapshot: NodeSnapshot, _context: CheckContext) -> Outcome | None:
    """Check that CUDA and NVML number the cards in the same order. Warn if this is not certain."""
    if len(snapshot.gpus) < 2:
        return None
    by_bus = snapshot.environment.get(CUDA_DEVICE_ORDER, "").upper() == "PCI_BUS_ID"
    if by_bus or not has_mixed_cards(snapshot):
        return ok("CUDA numbers the cards in the order of the PCI bus")
    guess = ", ".join(f"{n} = {gpu.label}" for n, gpu in enumerate(cuda_order(snapshot)))
    return warn(
        f"the cards differ and {CUDA_DEVICE_ORDER} is not set, so CUDA numbers the cards by speed. "
        f"The numbers are probably {guess}"
    )


def mig(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """Check that cards in MIG mode have a slice, and that the job does not need more than one
    slice.
    """
    mig_cards = [gpu for gpu in snapshot.gpus if in_mig_mode(gpu)]
    if not mig_cards:
        return None
    empty = [gpu for gpu in mig_cards if not gpu.slices]
    if len(empty) == len(snapshot.gpus):
        return fail(
            "node", f"{empty[0].label} is in MIG mode but has no slice, so CUDA sees no device"
        )
    if context.gpu_count > 1:
        return fail(
            "user",
            f"the job needs {context.gpu_count} GPUs, but CUDA uses one MIG slice per process",
        )
    if empty:
        return warn(f"{empty[0].label} is in MIG mode but has no slice, so CUDA ignores this card")
    names = [
        f"{mig_slice.label} ({mig_slice.name.value})"
        for gpu in mig_cards
        for mig_slice in gpu.slices
    ]
    return ok("slices: " + ", ".join(names))


def alike(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """Check that all cards of the job are of the same kind. If cards of one tensor-parallel group
    differ, the check fails. If only cards of different groups differ, the check warns.
    """
    job_devices = visible_devices(snapshot).devices[: context.gpu_count]
    if context.gpu_count < 2 or len(job_devices) < 2:
        return None
    size = context.tensor_parallel_size
    for start in range(0, len(job_devices), size):
        group = sorted({str(gpu.name.value) for gpu in job_devices[start : start + size]})
        if len(group) > 1:
            last_index = min(start + size, len(job_devices)) - 1
            kinds = " and ".join(group)
            what = (
                f"cards {start} to {last_index} form a tensor-parallel group, but differ: {kinds}"
            )
            return fail("user", what)
    names = {gpu.name.value for gpu in job_devices}
    if len(names) > 1:
        return warn(f"the job would use different cards: {' and '.join(sorted(map(str, names)))}")
    return ok(f"{len(job_devices)} x {names.pop()}")


CHECKS = (
    Check(
        "devices.visible",
        "CUDA_VISIBLE_DEVICES names existing cards",
        "CUDA reads the list in CUDA_VISIBLE_DEVICES up to the first unknown entry and silently "
        "ignores the rest. A job then runs on fewer cards or finds no GPU.",
        "set `CUDA_VISIBLE_DEVICES` to indices or UUIDs of existing GPUs (`envcheck probe --json` "
        "lists both), or unset it",
        visible,
    ),
    Check(
        "devices.count",
        "There are as many GPUs as the job needs",
        "A GPU counts if it responds and CUDA_VISIBLE_DEVICES does not hide it. The job needs the "
        "largest of three numbers: N of `--require N`, the number of its processes on this node, "
        "and model.tensor_parallel_size.",
        "request more GPUs from the scheduler, or lower `model.tensor_parallel_size`",
        count,
    ),
    Check(
        "devices.index",
        "--gpu-index names an existing card",
        "The index N of --gpu-index is CUDA's number of a card. CUDA numbers the cards in "
        "CUDA_VISIBLE_DEVICES from 0.",
        "use an index below the number of visible GPUs",
        index,
    ),
    Check(
        "devices.kind",
        "The card is the required one",
        "`--require h200` requires a card by its name. `--require 'cc>=9.0'` requires a compute "
        "capability.",
        "use a node with the required card",
        kind,
    ),
    Check(
        "devices.uuid",
        "vLLM understands the form of CUDA_VISIBLE_DEVICES",
        "CUDA_VISIBLE_DEVICES can contain indices or UUIDs. vLLM 0.20.1 and older fails on a UUID "
        "(invalid literal for int()). vLLM 0.25.1 and newer asks NVML for the index of the UUID.",
        "write the index of the GPU instead of its UUID, or install vllm 0.25.1",
        uuid,
    ),
    Check(
        "devices.order",
        "CUDA numbers the cards like nvidia-smi",
        "If a node has cards of several kinds, CUDA numbers them by speed, but nvidia-smi numbers "
        "them by PCI bus. A job that selects GPU 1 of nvidia-smi may then run on another card. "
        "With CUDA_DEVICE_ORDER=PCI_BUS_ID, CUDA uses the order of nvidia-smi.",
        "set `CUDA_DEVICE_ORDER=PCI_BUS_ID`",
        order,
    ),
    Check(
        "devices.mig",
        "A card in MIG mode has a slice for the job",
        "A card in MIG mode without slices is not a CUDA device. A process can use only one MIG "
        "slice, so tensor parallelism over several slices does not work.",
        "create a slice (`nvidia-smi mig -cgi PROFILE -C`), or use a whole card",
        mig,
    ),
    Check(
        "devices.alike",
        "All cards of the job are of one kind",
        "A job on several cards is limited by the smallest memory and the slowest card. With "
        "model.tensor_parallel_size above 1, the cards of a group must be of one kind. Different "
        "kinds of cards use different kernels, whose results are rounded differently. The cards "
        "would then sample different tokens.",
        "list only cards of one kind in `CUDA_VISIBLE_DEVICES`",
        alike,
    ),
)
