"""Error texts about the cards that a job gets, and the health of the cards."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.base.symptoms import numbers
from toolkit.base.symptoms.symptom import entry

if TYPE_CHECKING:
    import re

    from toolkit.base.symptoms.symptom import Symptom

FATAL_XIDS: dict[int, str] = {
    46: "the GPU stopped processing",
    48: "double-bit ECC error",
    61: "internal micro-controller breakpoint",
    62: "internal micro-controller halt",
    64: "a row remap or page retirement failed",
    74: "NVLink error",
    79: "the GPU has fallen off the bus",
    94: "contained memory error",
    95: "uncontained memory error",
    119: "the GPU's system processor does not respond",
    120: "the GPU's system processor failed",
    121: "C2C link error",
    136: "link training failed",
    140: "unrecovered ECC error",
    143: "the GPU did not initialise",
}
USER_XIDS: dict[int, str] = {
    13: "graphics engine exception",
    31: "memory page fault",
    32: "corrupted push buffer",
    43: "the GPU stopped a channel",
    45: "preemptive cleanup",
    68: "video processor exception",
    69: "graphics engine class error",
}


def _xid(symptom: Symptom, match: re.Match[str], context: str) -> Symptom:
    """Return the symptom of an XID (an error number of the NVIDIA driver). Its title explains the
    number, and its exit code says who must act.
    """
    del context
    number = int(match.group(2).rstrip("."))
    if number in FATAL_XIDS:
        return symptom.with_values(title=f"XID {number}: {FATAL_XIDS[number]}")
    if number in USER_XIDS:
        return symptom.with_values(
            title=f"XID {number}: {USER_XIDS[number]}, usually a fault of the program",
            remedy="run the program with CUDA_LAUNCH_BLOCKING=1 to find the kernel; if other "
            "programs also cause this XID on this card, the node is bad",
            exit_code=1,
        )
    return symptom.with_values(
        title=f"The kernel's log contains XID {number}",
        remedy="look the number up in NVIDIA's XID catalogue, and run `envcheck check --only "
        "health`",
        exit_code=5,
    )


_SLOWED = (
    "check cooling, power supply and power limit of the node (`envcheck check --only speed`): the "
    "run is slower than the card allows"
)

ENTRIES = (
    entry(
        "slow-link",
        "The cards that share a model are not linked by NVLink",
        "speed.group_link",
        "use cards that are linked by NVLink (`nvidia-smi topo -m` shows the links), or set "
        "model.tensor_parallel_size: 1; without NVLink the run works, but is slow",
        1,
        "Custom allreduce is disabled because it's not supported on more than two PCIe-only GPUs",
    ),
    entry(
        "gpu-lost",
        "A GPU no longer responds",
        "health.lost",
        "drain the node and power-cycle it; the other GPUs of the node are not safe to use either",
        3,
        "GPU has fallen off the bus",
        "GPU is lost. Reboot the system to recover this GPU",
        "NVML_ERROR_GPU_IS_LOST",
        "NVMLError_GpuIsLost",
        "Unable to determine the device handle for GPU",
        "CUDA error: device lost",
    ),
    entry(
        "ecc",
        "The card has memory errors that it could not correct",
        "health.ecc",
        "reset the GPU (`nvidia-smi --gpu-reset`) or reboot the node; if the errors return, have "
        "the card replaced",
        3,
        "uncorrectable ECC error encountered",
        "CUDA_ERROR_ECC_UNCORRECTABLE",
        "cudaErrorECCUncorrectable",
        "uncorrectable NVLink error detected",
        "CUDA error: hardware error",
    ),
    entry(
        "rows",
        "Memory rows of the card must be remapped, or remapping failed",
        "health.rows",
        "reset the GPU or reboot the node; after a failed remap have the card replaced",
        3,
        "Row remapper: {..}pending",
        "Row Remap Failure",
        "Remapping Failure Occurred : Yes",
        "Row remapping failure",
        "GPU requires reset due to pending row remap",
    ),
    entry(
        "pages",
        "Memory pages of the card are pending retirement",
        "health.pages",
        "reset the GPU or reboot the node",
        3,
        "Pending Page Blacklist : Yes",
        "Pending Page Blacklist: Yes",
        "Dynamic Page Retirement: {..}reboot",
        "Retired pages pending: Yes",
    ),
    entry(
        "recovery",
        "The driver requests a reset of the card",
        "health.recovery",
        "drain the node, then reset the GPU (`nvidia-smi --gpu-reset`) or reboot the node, "
        "whichever the driver requests",
        3,
        "GPU recovery action changed from",
        "GPU requires reset",
        "GPU Recovery Action : Reset",
        "GPU Recovery Action : Reboot",
        "NVML_ERROR_RESET_REQUIRED",
    ),
    entry(
        "xid",
        "The driver reported a fault",
        "health.xid",
        "drain the node and follow NVIDIA's XID catalogue",
        3,
        "NVRM: Xid ({w}): {n}",
        "NVRM: Xid (PCI:{w} {n}",
        add_details=_xid,
        unless=("gpu-lost", "recovery"),
    ),
    entry(
        "sxid",
        "An NVSwitch reported a fault",
        "health.xid, health.fabric",
        "drain the node, then restart nvidia-fabricmanager or reboot the node",
        3,
        "SXid (PCI:",
    ),
    entry(
        "mps",
        "The MPS daemon does not accept this process",
        "health.mps",
        "restart the MPS daemon on the node as the same user, or unset CUDA_MPS_PIPE_DIRECTORY",
        3,
        "MPS client failed to connect to the MPS control daemon",
        "CUDA_ERROR_MPS_CONNECTION_FAILED",
        "cudaErrorMpsConnectionFailed",
        "CUDA_ERROR_MPS_SERVER_NOT_READY",
        "cudaErrorMpsRpcFailure",
    ),
    entry(
        "busy",
        "The card is busy, or in exclusive mode with a process on it",
        "health.compute_mode, memory.tenant",
        "wait for the other process (`envcheck probe` names it), or ask the node's owner to set "
        "compute mode Default (`nvidia-smi -c 0`)",
        4,
        "CUDA-capable device(s) is/are busy or unavailable",
        "all CUDA-capable devices are busy or unavailable",
        "cudaErrorDevicesUnavailable",
        "CUDA_ERROR_DEVICE_UNAVAILABLE",
        "exclusive-thread device already in use",
        "exclusive-process mode{..}in use",
    ),
    entry(
        "persistence",
        "The driver unloads between jobs: persistence mode is off",
        "health.persistence",
        "start nvidia-persistenced on the node (`nvidia-smi -pm 1`)",
        3,
        "Persistence mode is disabled",
        "Persistence-M is off",
        "nvidia-persistenced failed to initialize",
        "Failed to query NVIDIA devices. Please ensure that the NVIDIA device files",
    ),
    entry(
        "uuid-in-visible-devices",
        "This vLLM release reads CUDA_VISIBLE_DEVICES as numbers only",
        "devices.uuid",
        "write the index of the GPU instead of its UUID, or install vllm 0.25.1 (releases up to "
        "0.20 are known to fail)",
        1,
        "invalid literal for int() with base 10: 'MIG-",
        "invalid literal for int() with base 10: 'GPU-",
        'invalid literal for int() with base 10: "MIG-',
        'invalid literal for int() with base 10: "GPU-',
    ),
    entry(
        "slurm",
        "The Slurm job did not get the GPUs that it uses",
        "place.slurm",
        "request GPUs for the job (--gres=gpu:N or --gpus=N), and start the step with srun",
        1,
        "CUDA_VISIBLE_DEVICES=NoDevFiles",
        "Unable to create step for job {n}: Requested node configuration is not available",
        "Unable to create step for job {n}: Invalid generic resource (gres) specification",
        "error: Invalid generic resource (gres) specification",
    ),
    entry(
        "card-kind",
        "No node has the card or the number of cards that the job requests",
        "devices.kind, devices.count",
        "request a kind and a number of cards that the cluster has (`sinfo -o %G` or `kubectl "
        "describe node` lists them)",
        1,
        "Insufficient nvidia.com/gpu",
        "Batch job submission failed: Requested node configuration is not available",
    ),
    entry(
        "too-few-gpus",
        "There are fewer GPUs than the job needs",
        "devices.count",
        "start as many processes as there are GPUs, or give the job more GPUs",
        1,
        "World size ({n}) is larger than the number of available GPUs ({n})",
        "Tensor parallel size ({n}) cannot be larger than the number of available GPUs ({n})",
        "tensor_parallel_size={n} {..}only {n} GPUs",
        "The number of required GPUs exceeds the total number of available GPUs",
        "Duplicate GPU detected : rank {n} and rank {n}",
        add_details=numbers.card_count,
    ),
    entry(
        "ordinal",
        "A process requested a GPU index that does not exist",
        "devices.count, devices.index",
        "start at most one process for each GPU in CUDA_VISIBLE_DEVICES (`envcheck probe` lists "
        "them); indices count from 0",
        1,
        "invalid device ordinal",
        "cudaErrorInvalidDevice",
        "CUDA_ERROR_INVALID_DEVICE",
        "GPU device may be out of range, do you have enough GPUs",
    ),
    entry(
        "mig-slice",
        "The card is in MIG mode, but the job has no slice of it",
        "devices.mig",
        "create a slice (`nvidia-smi mig -cgi PROFILE -C`) and set CUDA_VISIBLE_DEVICES to its "
        "UUID",
        1,
        "No MIG devices found",
        "No MIG-enabled devices found",
        "MIG device is in use by another client",
        "error using MIG device",
        "MIG M. {..}Enabled{..}No CUDA",
    ),
    entry(
        "no-gpu",
        "CUDA sees no GPU",
        "devices.visible",
        "check CUDA_VISIBLE_DEVICES (empty, -1 or a missing index hides all GPUs) and the job's "
        "request for GPUs; `envcheck probe` shows which GPUs CUDA finds",
        1,
        "No CUDA GPUs are available",
        "no CUDA-capable device is detected",
        "cudaErrorNoDevice",
        "CUDA_ERROR_NO_DEVICE",
        "torch.cuda.is_available() is False",
    ),
    entry(
        "device-order",
        "CUDA numbers the cards differently from nvidia-smi",
        "devices.order",
        "set CUDA_DEVICE_ORDER=PCI_BUS_ID",
        1,
        "Detected different devices in the system{..}CUDA_DEVICE_ORDER=PCI_BUS_ID",
        "CUDA_DEVICE_ORDER=PCI_BUS_ID` to avoid unexpected behavior",
    ),
    entry(
        "unlike-cards",
        "The job uses cards of different kinds",
        "devices.alike",
        "list only cards of one kind in CUDA_VISIBLE_DEVICES, because the smallest card limits all "
        "others",
        1,
        "There is an imbalance between your GPUs",
        "GPUs have different compute capabilities",
    ),
    entry(
        "peer",
        "The cards cannot read each other's memory",
        "speed.p2p",
        "set NCCL_P2P_DISABLE=1, or use cards of one NVLink or PCIe switch with ACS off",
        1,
        "peer access is not supported between these two devices",
        "cudaErrorPeerAccessUnsupported",
        "your platform lacks GPU P2P capability",
        "peer mapping resources exhausted",
        "P2P is disabled between connected GPUs",
    ),
    entry(
        "nvls",
        "NCCL cannot use NVLink SHARP (multicast) on this node",
        "health.fabric",
        "set NCCL_NVLS_ENABLE=0; on the node, restart nvidia-fabricmanager",
        3,
        "nvls.cc:{n} NCCL WARN Cuda failure",
        "NCCL WARN NVLS multicast",
        "Failed to bind NVLink SHARP (NVLS) Multicast memory",
        "Failed to create NVLS multicast",
    ),
    entry(
        "nvlink",
        "An NVLink is down",
        "speed.nvlink",
        "drain the node, then reset the GPUs or reseat the link",
        3,
        "Link {n}: <inactive>",
        "NVLink is down",
        "nvlinkState: inactive",
    ),
    entry("throttled", "The card has lowered its clocks", "speed.throttle", _SLOWED, 3,
          "HW Slowdown : Active", "clocks_event_reasons.hw_slowdown, Active"),
    entry("hot", "The card is too hot", "speed.temperature", _SLOWED, 3,
          "HW Thermal Slowdown : Active", "SW Thermal Slowdown : Active",
          "GPU is overheating", "temperature is above the slowdown threshold"),
    entry("power", "The card's power is limited", "speed.power", _SLOWED, 3,
          "HW Power Brake Slowdown : Active", "SW Power Cap : Active",
          "power limit is below the default"),
    entry("pcie", "The card's PCIe link is not at its full speed", "speed.pcie", _SLOWED, 3,
          "Gb/s available PCIe bandwidth, limited by", "PCIe link width degraded",
          "PCIe Bus Error: severity="),
    entry(
        "launch-failure",
        "A kernel read or wrote outside its memory, or the card failed",
        "health.xid",
        "check the kernel's log (`envcheck check --only health` reads XIDs). A fatal XID means "
        "a bad node. Without a fatal XID, run again with CUDA_LAUNCH_BLOCKING=1 to find the kernel",
        3,
        "an illegal memory access was encountered",
        "CUDA error: unspecified launch failure",
        "CUDA error: misaligned address",
        "cudaErrorIllegalAddress",
        "cudaErrorLaunchFailure",
        unless=("gpu-lost", "ecc", "xid", "sxid"),
    ),
)  # fmt: skip
