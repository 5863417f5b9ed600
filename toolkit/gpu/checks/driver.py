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
    return next((cuda for oldest_branch, cuda in SHIPPED_CUDA if branch >= oldest_branch), None)


def present(snapshot: NodeSnapshot, context: CheckContext) -> Outcome:
    """Check that NVML starts and reports a card."""
    presence = find_presence(snapshot)
    if presence.kind == "gpus":
        version = snapshot.driver.version.value or "of unknown version"
        return ok(f"driver {version} reports {plural(len(snapshot.gpus), 'GPU')}")
    requirement = find_gpu_requirement(snapshot, context)
    if requirement:
        blame = "user" if presence.kind in ("none", "not passed in") else "node"
        # mypy widens the conditional literal
        return fail(blame, f"{presence.text}; {requirement}", presence.remedy)  # type: ignore[arg-type]
    if presence.kind == "none":
        return ok(f"{presence.text}: the run uses the CPU")
    if context.configured or presence.kind == "not passed in":
        return warn(f"{presence.text}; a run on the CPU needs no GPU", presence.remedy)
    return fail("node", presence.text, presence.remedy)


def cuda(snapshot: NodeSnapshot, _context: CheckContext) -> Outcome | None:
    """Check that the driver is new enough for the CUDA version that the installed torch was built
    for.
    """
    torch_cuda, driver = snapshot.software.torch_cuda.value, snapshot.driver.version.value
    if not snapshot.gpus or torch_cuda is None:
        return None
    if driver is None:
        return unknown(f"torch needs CUDA {torch_cuda}; the driver's version is unknown")
    major = as_version(torch_cuda).major
    minimum_driver = MINIMUM_DRIVER.get(major)
    if minimum_driver is None:
        return unknown(
            f"torch was built for CUDA {torch_cuda}, but the driver version for this CUDA is "
            "unknown"
        )
    # A libcuda that is newer than the driver's own (the cuda-compat package) runs newer CUDA.
    libcuda_version = (snapshot.driver.libcuda.value or [{}])[0].get("version")
    if as_version(driver) >= as_version(minimum_driver):
        driver_text = f"driver {driver} (CUDA {newest_cuda(driver)})"
        return ok(f"{driver_text} supports the CUDA version of torch ({torch_cuda})")
    if libcuda_version and as_version(libcuda_version) >= as_version(minimum_driver):
        return warn(
            f"driver {driver} runs CUDA {torch_cuda} only through libcuda {libcuda_version} "
            "(cuda-compat)"
        )
    return fail(
        "node",
        f"driver {driver} (CUDA {newest_cuda(driver)}) is too old: torch was built for CUDA "
        f"{torch_cuda}, which needs driver {minimum_driver} or newer",
        _newer_driver_remedy(snapshot, minimum_driver, torch_cuda),
    )


def _newer_driver_remedy(snapshot: NodeSnapshot, minimum_driver: str, torch_cuda: str) -> str:
    """Return the remedy for a driver that is too old. The remedy names forward compatibility only
    if the cards support it.
    """
    remedy = f"use a node with driver {minimum_driver} or newer, or torch built for an older CUDA"
    if any(_lacks_forward_compatibility(gpu) for gpu in snapshot.gpus):
        return f"{remedy} (this card does not support forward compatibility)"
    package = f"cuda-compat-{torch_cuda.replace('.', '-')}"
    setting = "set `TOOLKIT_CUDA_COMPAT=1` in the toolkit's container"
    return f"{remedy}. For forward compatibility, {setting}, or install `{package}` elsewhere"


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
    libraries = snapshot.driver.libcuda.value
    if libraries is None:
        return unknown(
            f"the library search path could not be read: {snapshot.driver.libcuda.reason}"
        )
    if not libraries:
        return fail(
            "user" if _in_container(snapshot) else "node",
            "NVML works, but CUDA cannot start: libcuda.so.1 is not on the library search path",
            "start the container with NVIDIA_DRIVER_CAPABILITIES=compute,utility, or install the "
            "driver's CUDA library",
        )
    first, module = libraries[0], snapshot.driver.kernel_module.value
    where = f"{first['path']} ({first['source']})"
    if "/stubs/" in first["path"]:
        return fail("user", f"{where} is only a stub library for linking, so CUDA finds no driver")
    module = module or snapshot.driver.version.value
    if first["version"] is None or module is None:
        environment = snapshot.host.place.value or {}
        return (
            ok(f"{where} belongs to WSL")
            if environment.get("wsl")
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
    """If CUDA's forward compatibility is used, check that all cards support it. Desktop cards and
    cards with integrated memory do not support it, and CUDA fails on them with error 804.
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
    return ok(f"forward compatibility {version} works on these cards")


def nodes(snapshot: NodeSnapshot, _context: CheckContext) -> Outcome | None:
    """Check that the device files that CUDA opens exist and can be opened."""
    if not snapshot.gpus:
        return None
    reading = snapshot.driver.device_nodes
    if reading.value is None:
        return unknown(f"/dev could not be read: {reading.reason}")
    usable = {entry["path"]: entry["usable"] for entry in reading.value}
    if "/dev/dxg" in usable or "/dev/nvgpu" in usable:
        return ok("the GPU is used through /dev/dxg (WSL) or /dev/nvgpu (an integrated GPU)")
    required_paths = ["/dev/nvidiactl", "/dev/nvidia-uvm"]
    required_paths += [
        f"/dev/nvidia{gpu.minor.value}" for gpu in snapshot.gpus if gpu.minor.has_value
    ]
    missing = [path for path in required_paths if path not in usable]
    blame = "user" if _in_container(snapshot) else "node"
    if missing:
        text = f"CUDA cannot start, because these device files are missing: {', '.join(missing)}"
        # mypy widens the conditional literal
        return fail(blame, text)  # type: ignore[arg-type]
    unusable = [path for path in required_paths if not usable[path]]
    if unusable:
        return fail("node", f"this user cannot open {', '.join(unusable)}")
    return ok(f"this user can open all {len(required_paths)} device files")


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
    environment = snapshot.host.place.value or {}
    return bool(environment.get("container") or environment.get("kubernetes"))


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
        "CUDA 13.x needs driver 580 or newer, and CUDA 12.x needs driver 525 or newer. Such a "
        "driver runs all minor releases of the same major release of CUDA. Code that is compiled "
        "at run time is an exception: it can need a newer driver.",
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
        "The cards support CUDA forward compatibility, if it is used",
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
