"""Checks of the driver: whether a driver is loaded, which libcuda is loaded, and whether the driver
runs the CUDA version that torch needs.

The causes of CUDA errors 802, 803 and 804 are found without creating a CUDA context.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.base.formatting import plural
from toolkit.base.versions import as_version
from toolkit.gpu.checks.check import (
    Check,
    CheckContext,
    Outcome,
    fail,
    ok,
    unknown,
    warn,
)
from toolkit.gpu.presence import find_gpu_requirement, find_presence

if TYPE_CHECKING:
    from toolkit.gpu.snapshot import GpuSnapshot, NodeSnapshot

# The oldest driver branch for each major release of CUDA (NVIDIA's CUDA Compatibility guide). A
# driver runs all minor releases of its major release, newer ones included.
MINIMUM_DRIVER = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}
# Driver branch -> the CUDA version that it supports, newest first.
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


def newest_cuda(driver: str) -> str | None:
    """Return the newest CUDA version that a driver supports, found from the driver's major version;
    None if the driver is older than all drivers in ``SHIPPED_CUDA``.
    """
    branch = as_version(driver).major
    return next((cuda for least, cuda in SHIPPED_CUDA if branch >= least), None)


def present(snapshot: NodeSnapshot, context: CheckContext) -> Outcome:
    """Check that NVML starts and reports a card."""
    found = find_presence(snapshot)
    if found.kind == "gpus":
        version = snapshot.driver.version.value or "of unknown version"
        return ok(f"driver {version} reports {plural(len(snapshot.gpus), 'GPU')}")
    needed = find_gpu_requirement(snapshot, context)
    if needed:
        blame = "user" if found.kind in ("none", "not passed in") else "node"
        # mypy widens the conditional literal
        return fail(blame, f"{found.text}; {needed}", found.remedy)  # type: ignore[arg-type]
    if found.kind == "none":
        return ok(f"{found.text}: the run uses the CPU")
    if context.configured or found.kind == "not passed in":
        return warn(f"{found.text}; a run on the CPU needs no GPU", found.remedy)
    return fail("node", found.text, found.remedy)


def cuda(snapshot: NodeSnapshot, _context: CheckContext) -> Outcome | None:
    """Check that the driver is new enough for the CUDA version that the installed torch was built
    for.
    """
    wanted, driver = snapshot.software.torch_cuda.value, snapshot.driver.version.value
    if not snapshot.gpus or wanted is None:
        return None
    if driver is None:
        return unknown(f"torch needs CUDA {wanted}; the driver's version is unknown")
    major = as_version(wanted).major
    least = MINIMUM_DRIVER.get(major)
    if least is None:
        return unknown(
            f"torch was built for CUDA {wanted}, but the driver version for this CUDA is unknown"
        )
    # A libcuda that is newer than the driver's own (the cuda-compat package) runs newer CUDA.
    first = (snapshot.driver.libcuda.value or [{}])[0].get("version")
    if as_version(driver) >= as_version(least):
        have = f"driver {driver} (CUDA {newest_cuda(driver)})"
        return ok(f"{have} supports the CUDA version of torch ({wanted})")
    if first and as_version(first) >= as_version(least):
        return warn(
            f"driver {driver} runs CUDA {wanted} only through libcuda {first} (cuda-compat)"
        )
    return fail(
        "node",
        f"driver {driver} (CUDA {newest_cuda(driver)}) is too old: torch was built for CUDA "
        f"{wanted}, which needs driver {least} or newer",
        _newer_driver_remedy(snapshot, least, wanted),
    )


def _newer_driver_remedy(snapshot: NodeSnapshot, least: str, wanted: str) -> str:
    """Return the remedy for a driver that is too old. The remedy names forward compatibility only
    if the cards support it.
    """
    newer = f"use a node with driver {least} or newer, or torch built for an older CUDA"
    if any(_lacks_forward_compatibility(gpu) for gpu in snapshot.gpus):
        return f"{newer} (this card does not support forward compatibility)"
    package = f"cuda-compat-{wanted.replace('.', '-')}"
    switch = "set `TOOLKIT_CUDA_COMPAT=1` in the toolkit's container"
    return f"{newer}. For forward compatibility, {switch}, or install `{package}` elsewhere"


def _lacks_forward_compatibility(gpu: GpuSnapshot) -> bool:
    """Whether the card does not support forward compatibility. This is the case for desktop cards
    and for cards with integrated memory.
    """
    name = gpu.name.value or ""
    return any(word in name for word in ("GeForce", "TITAN", "Laptop", "GB10", "Thor", "Orin"))


def libcuda(snapshot: NodeSnapshot, _context: CheckContext) -> Outcome | None:
    """Check that the first libcuda.so.1 on the library search path is the driver's own, or a newer
    one for forward compatibility. With any other libcuda, CUDA fails with error 803.
    """
    if not snapshot.gpus:
        return None
    found = snapshot.driver.libcuda.value
    if found is None:
        return unknown(
            f"the library search path could not be read: {snapshot.driver.libcuda.reason}"
        )
    if not found:
        return fail(
            "user" if _in_container(snapshot) else "node",
            "NVML works, but CUDA cannot start: libcuda.so.1 is not on the library search path",
            "start the container with NVIDIA_DRIVER_CAPABILITIES=compute,utility, or install the "
            "driver's CUDA library",
        )
    first, module = found[0], snapshot.driver.kernel_module.value
    where = f"{first['path']} ({first['source']})"
    if "/stubs/" in first["path"]:
        return fail("user", f"{where} is only a stub library for linking, so CUDA finds no driver")
    module = module or snapshot.driver.version.value
    if first["version"] is None or module is None:
        place = snapshot.host.place.value or {}
        return (
            ok(f"{where} belongs to WSL")
            if place.get("wsl")
            else unknown(f"{where}: version unknown")
        )
    if first["version"] == module:
        return ok(f"{where} is the driver's own, {module}")
    if as_version(first["version"]) > as_version(module) and "compat" in first["path"]:
        return ok(
            f"{where} is the forward-compatibility library {first['version']}, used with the older "
            f"driver {module}"
        )
    return fail(
        "user" if first["source"] == "LD_LIBRARY_PATH" else "node",
        f"{where} belongs to driver {first['version']}, but the kernel module belongs to "
        f"driver {module}, so CUDA fails with error 803",
    )


def compat(snapshot: NodeSnapshot, _context: CheckContext) -> Outcome | None:
    """Check that all cards are data-centre cards if forward compatibility is used. On other cards
    CUDA fails with error 804.
    """
    first = (snapshot.driver.libcuda.value or [{}])[0]
    module = snapshot.driver.kernel_module.value or snapshot.driver.version.value
    version = first.get("version")
    if not snapshot.gpus or not version or not module or "compat" not in first["path"]:
        return None
    if as_version(version) <= as_version(module):
        return warn(
            f"{first['path']} is older than driver {module} and hides that driver's own libcuda"
        )
    consumer = [gpu for gpu in snapshot.gpus if _lacks_forward_compatibility(gpu)]
    if consumer:
        return fail(
            "user",
            f"{first['path']} needs forward compatibility, but {consumer[0].label} "
            f"({consumer[0].name.value}) does not support it. CUDA fails with error 804",
        )
    return ok(f"forward compatibility {version} works on these data-centre cards")


def nodes(snapshot: NodeSnapshot, _context: CheckContext) -> Outcome | None:
    """Check that the device files that CUDA opens exist and can be opened."""
    if not snapshot.gpus:
        return None
    found = snapshot.driver.device_nodes
    if found.value is None:
        return unknown(f"/dev could not be read: {found.reason}")
    usable = {entry["path"]: entry["usable"] for entry in found.value}
    if "/dev/dxg" in usable or "/dev/nvgpu" in usable:
        return ok("the GPU is used through /dev/dxg (WSL) or /dev/nvgpu (an integrated GPU)")
    wanted = ["/dev/nvidiactl", "/dev/nvidia-uvm"]
    wanted += [f"/dev/nvidia{gpu.minor.value}" for gpu in snapshot.gpus if gpu.minor.has_value]
    missing = [path for path in wanted if path not in usable]
    blame = "user" if _in_container(snapshot) else "node"
    if missing:
        text = f"CUDA cannot start, because these device files are missing: {', '.join(missing)}"
        # mypy widens the conditional literal
        return fail(blame, text)  # type: ignore[arg-type]
    shut = [path for path in wanted if not usable[path]]
    if shut:
        return fail("node", f"this user cannot open {', '.join(shut)}")
    return ok(f"this user can open all {len(wanted)} device files")


def required(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """Check that the driver has at least the version that --require gives."""
    if not context.required_driver:
        return None
    driver = snapshot.driver.version.value
    if driver is None:
        return fail("user", f"driver {context.required_driver} is required, but there is no driver")
    if as_version(driver) < as_version(context.required_driver):
        return fail("node", f"driver {driver} is older than the required {context.required_driver}")
    return ok(f"driver {driver} is at least the required {context.required_driver}")


def _in_container(snapshot: NodeSnapshot) -> bool:
    place = snapshot.host.place.value or {}
    return bool(place.get("container") or place.get("kubernetes"))


CHECKS = (
    Check(
        "driver.present",
        "The NVIDIA driver is present and reports a GPU",
        "A missing driver, an unfinished driver update and a container without GPUs all cause "
        "the same error 'no CUDA-capable device'. NVML shows which of these causes it is.",
        "install or reload the driver, or pass the GPU into the container",
        present,
        about_node=True,
    ),
    Check(
        "driver.cuda",
        "The driver runs the CUDA that torch was built for",
        "CUDA 13.x needs driver 580 or newer, CUDA 12.x driver 525 or newer. Within a "
        "major release of CUDA, these drivers also run newer minor releases, except for code that "
        "is compiled at run time.",
        "update the driver, use a node with a newer driver, or install torch for an older CUDA",
        cuda,
    ),
    Check(
        "driver.libcuda",
        "The loaded libcuda.so.1 is the driver's own",
        "If a different libcuda is found first (an image's compat folder, a stub, a leftover of "
        "an update), CUDA fails to start with error 803 while NVML still works.",
        "remove the folder of that libcuda from `LD_LIBRARY_PATH`. After an update of the driver, "
        "reload the kernel modules of the driver",
        libcuda,
    ),
    Check(
        "driver.compat",
        "If CUDA forward compatibility is used, the cards support it",
        "With the cuda-compat package, newer CUDA runs on older drivers, but only on data-centre "
        "cards. On other cards CUDA fails to start with error 804.",
        "remove the compat folder from `LD_LIBRARY_PATH`",
        compat,
    ),
    Check(
        "driver.nodes",
        "The device files exist and can be opened",
        "NVML needs only /dev/nvidiactl. CUDA also opens /dev/nvidia-uvm and the card's own "
        "file, so a node can list its GPUs and still run nothing on them.",
        "load nvidia-uvm (`nvidia-modprobe -u -c 0`), or pass all device files into the container",
        nodes,
        about_node=True,
    ),
    Check(
        "driver.required",
        "The driver is at least the required one",
        "`--require driver>=VERSION` requires a driver of at least this version.",
        "use a node with a newer driver",
        required,
    ),
)
