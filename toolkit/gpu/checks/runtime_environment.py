"""Checks of the environment in which this process runs (container, Kubernetes, Slurm, WSL): whether
it gives the process access to GPUs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.base.formatting import plural
from toolkit.gpu.checks.check import CheckContext, Outcome, fail, make_checks, ok, unknown, warn
from toolkit.gpu.devices import visible_devices
from toolkit.gpu.presence import find_gpu_requirement, find_presence, missing_gpu_remedy

if TYPE_CHECKING:
    from toolkit.gpu.snapshot import NodeSnapshot


def runtime(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """Check that the container or pod has the GPUs that the job needs."""
    environment = snapshot.host.place.value
    if environment is None:
        return unknown(f"the environment could not be read: {snapshot.host.place.reason}")
    names = [environment["container"] or "", "kubernetes" if environment["kubernetes"] else ""]
    name = " in ".join(part for part in names if part)
    if not name:
        return ok("WSL" if environment["wsl"] else "no container")
    if snapshot.gpus:
        return ok(f"{name}, with {plural(len(snapshot.gpus), 'GPU')}")
    reason = find_gpu_requirement(snapshot, context)
    if find_presence(snapshot).kind not in ("none", "not passed in"):
        return None  # driver.present reports what is wrong
    if reason:
        return fail(
            "user", f"the container ({name}) has no GPU; {reason}", missing_gpu_remedy(snapshot)
        )
    return ok(f"the container ({name}) has no GPU, so the run uses the CPU")


def capabilities(snapshot: NodeSnapshot, _context: CheckContext) -> Outcome | None:
    """Check that NVIDIA_DRIVER_CAPABILITIES contains ``compute``. Otherwise the container has no
    libcuda.
    """
    value = snapshot.environment.get("NVIDIA_DRIVER_CAPABILITIES")
    if value is None or not snapshot.gpus:
        return None
    if {"all", "compute"} & {part.strip() for part in value.lower().split(",")}:
        return ok(f"NVIDIA_DRIVER_CAPABILITIES={value}")
    text = f"NVIDIA_DRIVER_CAPABILITIES={value} does not include compute"
    return fail("user", f"{text}, so the container has no libcuda")


def slurm(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """Check that the Slurm job has a GPU if the job needs one, and that CUDA sees all GPUs of the
    Slurm job.
    """
    environment, variables = snapshot.host.place.value or {}, snapshot.environment
    if not environment.get("slurm"):
        return None
    assigned = variables.get("SLURM_GPUS_ON_NODE") or variables.get("SLURM_JOB_GPUS")
    if assigned is None:
        reason = find_gpu_requirement(snapshot, context)
        text = "this Slurm job has no GPU"
        return fail("user", f"{text}; {reason}") if reason else ok(text)
    assigned_count = int(assigned) if assigned.isdecimal() else len(assigned.split(","))
    visible_count = len(visible_devices(snapshot).devices)
    if visible_count != assigned_count:
        return warn(
            f"Slurm assigned {plural(assigned_count, 'GPU')}, but CUDA sees {visible_count}"
        )
    return ok(f"Slurm assigned {plural(assigned_count, 'GPU')}")


def wsl(snapshot: NodeSnapshot, _context: CheckContext) -> Outcome | None:
    """Check that a process inside WSL uses the Windows driver."""
    environment = snapshot.host.place.value or {}
    if not environment.get("wsl"):
        return None
    module = snapshot.driver.kernel_module
    if module.has_value:
        return warn("a Linux NVIDIA driver is installed inside WSL and hides the Windows driver")
    return ok("WSL, with the Windows driver")


_ROWS = (
    (
        "place.runtime",
        "The container has its GPUs",
        "A container can use a GPU only if it was started with one of these options: `--gpus all` "
        "(Docker), `--device nvidia.com/gpu=all` (Podman), `--nv` (Apptainer), a limit of "
        "`nvidia.com/gpu` (Kubernetes).",
        "start the container with a GPU",
        runtime,
    ),
    (
        "place.capabilities",
        "The container has CUDA's library",
        "The NVIDIA runtime provides only the libraries for the capabilities that "
        "NVIDIA_DRIVER_CAPABILITIES lists. Without 'compute', NVML works but CUDA does not.",
        "start the container with `NVIDIA_DRIVER_CAPABILITIES=compute,utility`",
        capabilities,
    ),
    (
        "place.slurm",
        "The Slurm job has its GPUs",
        "Slurm assigns GPUs only to a job that requests GPUs (--gpus). Slurm lists the assigned "
        "GPUs in CUDA_VISIBLE_DEVICES.",
        "request the GPUs with `--gpus=N`, and do not set `CUDA_VISIBLE_DEVICES` yourself",
        slurm,
    ),
    (
        "place.wsl",
        "WSL uses the Windows driver",
        "Inside WSL only the Windows driver works. A Linux driver that is installed inside WSL "
        "hides the Windows driver.",
        "remove the Linux driver inside WSL",
        wsl,
    ),
)
CHECKS = make_checks(_ROWS)
