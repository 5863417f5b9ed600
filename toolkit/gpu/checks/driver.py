"""Driver and runtime: is there one, which libcuda wins, does it run the CUDA that torch wants.

Errors 802, 803 and 804 of CUDA are told here without making a CUDA context.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.base.formatting import plural
from toolkit.gpu.checks.check import (
    Check,
    CheckContext,
    Outcome,
    fail,
    ok,
    unknown,
    version_tuple,
    warn,
)
from toolkit.gpu.needs import gpu_needed
from toolkit.gpu.presence import presence

if TYPE_CHECKING:
    from toolkit.gpu.snapshot import GpuSnapshot, NodeSnapshot

# Oldest driver branch for a CUDA major release (NVIDIA's CUDA Compatibility guide): within a
# major, newer minors run on it by the minor-version rule.
MINIMUM_DRIVER = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}
# Driver branch -> the CUDA that it ships with, newest first.
SHIPPED_CUDA = (
    (595, "13.2"),
    (590, "13.1"),
    (580, "13.0"),
    (575, "12.9"),
    (570, "12.8"),
    (565, "12.7"),
    (560, "12.6"),
    (555, "12.5"),
    (550, "12.4"),
    (545, "12.3"),
    (535, "12.2"),
    (530, "12.1"),
    (525, "12.0"),
    (520, "11.8"),
    (515, "11.7"),
    (510, "11.6"),
    (470, "11.4"),
    (450, "11.0"),
)


def cuda_of(driver: str) -> str | None:
    """The CUDA that a driver ships with, from its branch."""
    branch = version_tuple(driver)[:1]
    return next((cuda for least, cuda in SHIPPED_CUDA if branch >= (least,)), None)


def present(snapshot: NodeSnapshot, context: CheckContext) -> Outcome:
    """NVML starts and serves a card."""
    found = presence(snapshot)
    if found.kind == "gpus":
        version = snapshot.driver.version.value or "of unknown version"
        return ok(f"driver {version} serves {plural(len(snapshot.gpus), 'GPU')}")
    needed = gpu_needed(snapshot, context)
    if needed:
        blame = "user" if found.kind in ("none", "not passed in") else "node"
        return fail(blame, f"{found.text}; {needed}", found.remedy)  # type: ignore[arg-type]  # mypy widens the conditional literal
    if found.kind == "none":
        return ok(f"{found.text}: a CPU run")
    if context.configured or found.kind == "not passed in":
        return warn(f"{found.text}; a CPU run does without", found.remedy)
    return fail("node", found.text, found.remedy)


def cuda(snapshot: NodeSnapshot, _context: CheckContext) -> Outcome | None:
    """The driver is new enough for the CUDA that the installed torch was built for."""
    wanted, driver = snapshot.software.torch_cuda.value, snapshot.driver.version.value
    if not snapshot.gpus or wanted is None:
        return None
    if driver is None:
        return unknown(f"torch wants CUDA {wanted}; the driver did not tell its version")
    major = version_tuple(wanted)[0]
    least = MINIMUM_DRIVER.get(major)
    if least is None:
        return unknown(f"torch was built for CUDA {wanted}, whose oldest driver is not known here")
    # A newer libcuda than the driver's own (the cuda-compat package) raises what it can run.
    first = (snapshot.driver.libcuda.value or [{}])[0].get("version")
    if version_tuple(driver) >= version_tuple(least):
        return ok(f"driver {driver} (CUDA {cuda_of(driver)}) runs torch's CUDA {wanted}")
    if first and version_tuple(first) >= version_tuple(least):
        return warn(f"driver {driver} runs CUDA {wanted} only through libcuda {first} (compat)")
    return fail(
        "node",
        f"driver {driver} (CUDA {cuda_of(driver)}) is too old for torch's CUDA {wanted}, "
        f"which needs {least}",
        _newer_driver(snapshot, least, wanted),
    )


def _newer_driver(snapshot: NodeSnapshot, least: str, wanted: str) -> str:
    """What to do about an old driver; forward compatibility only where the cards have it."""
    newer = f"use a node with driver {least} or newer, or torch built for an older CUDA"
    if any(_no_compat(gpu) for gpu in snapshot.gpus):
        return f"{newer}; forward compatibility is for data-centre cards, which this is not"
    package = f"cuda-compat-{wanted.replace('.', '-')}"
    switch = "set TOOLKIT_CUDA_COMPAT=1 in this project's container"
    return f"{newer}; or use forward compatibility: {switch}, elsewhere install {package}"


def _no_compat(gpu: GpuSnapshot) -> bool:
    """Cards for desktops have no forward compatibility, nor does integrated memory."""
    name = gpu.name.value or ""
    return any(word in name for word in ("GeForce", "TITAN", "Laptop", "GB10", "Thor", "Orin"))


def libcuda(snapshot: NodeSnapshot, _context: CheckContext) -> Outcome | None:
    """The libcuda.so.1 that the loader finds first is the driver's own (else CUDA error 803)."""
    if not snapshot.gpus:
        return None
    found = snapshot.driver.libcuda.value
    if found is None:
        return unknown(f"the loader's path could not be read: {snapshot.driver.libcuda.reason}")
    if not found:
        return fail(
            "user" if _contained(snapshot) else "node",
            "NVML works and no libcuda.so.1 is on the loader's path: CUDA cannot start",
            "pass the compute capability into the container "
            "(NVIDIA_DRIVER_CAPABILITIES=compute,utility), or install the driver's CUDA library",
        )
    first, module = found[0], snapshot.driver.kernel_module.value
    where = f"{first['path']} ({first['source']})"
    if "/stubs/" in first["path"]:
        return fail("user", f"{where} is a stub for linking: CUDA finds no driver through it")
    module = module or snapshot.driver.version.value
    if first["version"] is None or module is None:
        place = snapshot.host.place.value or {}
        return ok(f"{where} of WSL") if place.get("wsl") else unknown(f"{where}: version unknown")
    if first["version"] == module:
        return ok(f"{where} is the driver's own, {module}")
    if version_tuple(first["version"]) > version_tuple(module) and "compat" in first["path"]:
        return ok(f"{where} is a forward-compatibility {first['version']} over driver {module}")
    return fail(
        "user" if first["source"] == "LD_LIBRARY_PATH" else "node",
        f"{where} is of driver {first['version']} and the kernel module of {module}: "
        "CUDA error 803",
    )


def compat(snapshot: NodeSnapshot, _context: CheckContext) -> Outcome | None:
    """Forward compatibility only works on data-centre cards (else CUDA error 804)."""
    first = (snapshot.driver.libcuda.value or [{}])[0]
    module = snapshot.driver.kernel_module.value or snapshot.driver.version.value
    version = first.get("version")
    if not snapshot.gpus or not version or not module or "compat" not in first["path"]:
        return None
    if version_tuple(version) <= version_tuple(module):
        return warn(f"{first['path']} is older than driver {module} and hides its libcuda")
    consumer = [gpu for gpu in snapshot.gpus if _no_compat(gpu)]
    if consumer:
        return fail(
            "user",
            f"{first['path']} asks for forward compatibility and "
            f"{consumer[0].label} ({consumer[0].name.value}) does not have it: CUDA error 804",
        )
    return ok(f"forward compatibility {version} on data-centre cards")


def nodes(snapshot: NodeSnapshot, _context: CheckContext) -> Outcome | None:
    """The device files that CUDA opens are here and may be opened."""
    if not snapshot.gpus:
        return None
    found = snapshot.driver.device_nodes
    if found.value is None:
        return unknown(f"/dev could not be read: {found.reason}")
    usable = {entry["path"]: entry["usable"] for entry in found.value}
    if "/dev/dxg" in usable or "/dev/nvgpu" in usable:
        return ok("/dev/dxg or /dev/nvgpu: WSL or an integrated GPU")
    wanted = ["/dev/nvidiactl", "/dev/nvidia-uvm"]
    wanted += [f"/dev/nvidia{gpu.minor.value}" for gpu in snapshot.gpus if gpu.minor.known]
    missing = [path for path in wanted if path not in usable]
    blame = "user" if _contained(snapshot) else "node"
    if missing:
        return fail(blame, f"missing: {', '.join(missing)}; CUDA cannot start without")  # type: ignore[arg-type]  # mypy widens the conditional literal
    shut = [path for path in wanted if not usable[path]]
    if shut:
        return fail("node", f"not open to this user: {', '.join(shut)}")
    return ok(f"{len(wanted)} device files are open to this user")


def required(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """The driver that --require asks for."""
    if not context.required_driver:
        return None
    driver = snapshot.driver.version.value
    if driver is None:
        return fail("user", f"driver {context.required_driver} was asked for and there is none")
    if version_tuple(driver) < version_tuple(context.required_driver):
        return fail("node", f"driver {driver} is older than the required {context.required_driver}")
    return ok(f"driver {driver}, at least {context.required_driver} as required")


def _contained(snapshot: NodeSnapshot) -> bool:
    place = snapshot.host.place.value or {}
    return bool(place.get("container") or place.get("kubernetes"))


CHECKS = (
    Check(
        "driver.present",
        "The NVIDIA driver is there and serves a GPU",
        "No driver, a half-finished driver update and a container without its GPUs all end in "
        "the same 'no CUDA-capable device'; NVML tells them apart.",
        "install or reload the driver, or pass the GPU into the container",
        present,
        about_node=True,
    ),
    Check(
        "driver.cuda",
        "The driver runs the CUDA that torch was built for",
        "CUDA 13.x needs a driver of at least 580, CUDA 12.x one of 525; within a major release "
        "newer minors run on older drivers, except for code that is compiled at run time.",
        "update the driver, use a node with a newer one, or install torch for an older CUDA",
        cuda,
    ),
    Check(
        "driver.libcuda",
        "The libcuda.so.1 that wins is the driver's own",
        "Another libcuda that is found first (an image's compat folder, a stub, a leftover of an "
        "update) fails CUDA's start with error 803 while NVML still works.",
        "take the folder out of LD_LIBRARY_PATH, or reload the driver after its update",
        libcuda,
    ),
    Check(
        "driver.compat",
        "Forward compatibility fits the cards",
        "The cuda-compat package lets newer CUDA run on older drivers on data-centre cards only; "
        "on others CUDA's start fails with error 804.",
        "remove the compat folder from LD_LIBRARY_PATH",
        compat,
    ),
    Check(
        "driver.nodes",
        "The device files are there and open",
        "NVML needs /dev/nvidiactl only; CUDA also opens /dev/nvidia-uvm and the card's own file, "
        "so a node can list its GPUs and still run nothing.",
        "load nvidia-uvm (`nvidia-modprobe -u -c 0`), or pass all device files into the container",
        nodes,
        about_node=True,
    ),
    Check(
        "driver.required",
        "The driver is the one that --require asks for",
        "Asked for with `--require driver>=VERSION`.",
        "use a node with a newer driver",
        required,
    ),
)
