"""Rules on what the GPU must support. The rules check the card that --gpu names, or a machine
without a GPU (--gpu none).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.base.capability import (
    BFLOAT16,
    FLOAT8_CACHE,
    FLOAT8_NATIVE,
    FOUR_BIT,
    build_problem,
)
from toolkit.config.finding import Severity
from toolkit.config.libraries import package_folder
from toolkit.config.rules.violation import RuleViolation, rule
from toolkit.config.trl_names import LIGER_PACKAGE, is_installed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from toolkit.config.rules.run import Run


def capability_problem(run: Run, required: tuple[int, int]) -> str | None:
    """A text that says why the card does not have the compute capability ``required``. None if the
    card has it, or if no card was given with --gpu.
    """
    device = run.situation.device
    if device is None:
        return None
    if device.compute_capability is None:
        return "there is no GPU"
    if device.compute_capability >= required:
        return None
    capability = ".".join(map(str, device.compute_capability))
    return (
        f"{device.name} has compute capability {capability}, but {required[0]}.{required[1]} is "
        "required"
    )


@rule(
    "HW001",
    "runtime.engine",
    example="runtime:\n  engine: vllm  # with --gpu v100",
    fix=(
        "use a card that the builds of torch and vLLM support (`envcheck validate --gpu NAME` "
        "checks a card)"
    ),
)
def builds_support_gpu(run: Run) -> Iterator[RuleViolation]:
    """The builds of torch and vLLM in the lock file support the card.

    These builds are for CUDA 13, which supports compute capability 7.5 and above. torch's build for
    aarch64 supports only 8.0 and above, so it cannot use a T4G (7.5). The card of --gpu need not be
    in this machine. `envcheck check` checks the installed builds instead of the locked ones.
    """
    device = run.situation.device
    if device is None or not device.compute_capability or device.machine is None:
        return
    vllm = run.engine != "transformers"
    problem = build_problem(device.compute_capability, machine=device.machine, vllm=vllm)
    if problem:
        yield RuleViolation("runtime.engine", f"{device.name} cannot be used: {problem}")


@rule(
    "LOAD002",
    "model.load_in_4bit model.load_in_8bit",
    example="model:\n  load_in_4bit: true  # with --gpu none",
    fix="load_in_4bit: false",
)
def four_bit_needs_a_card(run: Run) -> Iterator[RuleViolation]:
    """load_in_4bit and load_in_8bit need bitsandbytes and compute capability 7.0 or above.

    The kernels of bitsandbytes run on Volta and newer GPUs. `envcheck validate` checks the rule
    only with --gpu.
    """
    for bits in (4, 8):
        key = f"model.load_in_{bits}bit"
        if not run.get(key):
            continue
        problem = capability_problem(run, FOUR_BIT)
        if problem:
            yield RuleViolation(
                key,
                f"{bits}-bit weights cannot be used: {problem}",
                fixes=(run.set_fix(key, False),),
            )
        elif run.situation.device is not None and package_folder("bitsandbytes") is None:
            # On the machine that trains, a missing package would end the run.
            is_training_machine = run.situation.vllm is not None
            yield RuleViolation(
                key,
                "bitsandbytes is not installed here",
                severity=Severity.ERROR if is_training_machine else Severity.WARNING,
                unknown=not is_training_machine,
            )


@rule(
    "LOAD027",
    "runtime.fused_kernels",
    example="runtime:\n  fused_kernels: true  # with --gpu none",
    fix="fused_kernels: auto",
)
def fused_kernels_need_a_card(run: Run) -> Iterator[RuleViolation]:
    """fused_kernels: true needs a CUDA GPU and the package liger-kernel.

    With auto, the kernels are used if the GPU and the package are available. `envcheck validate
    --gpu`, `envcheck check` and `toolkit train` check the rule.
    """
    device = run.situation.device
    if device is None or run.value("runtime.fused_kernels") is not True:
        return
    is_training_machine = run.situation.vllm is not None  # the machine that trains
    if device.compute_capability is None:
        problem = "there is no GPU, and the kernels need CUDA"
    elif is_training_machine and not is_installed(LIGER_PACKAGE):
        problem = f"{LIGER_PACKAGE.install} is not installed here"
    else:
        return
    yield RuleViolation(
        "runtime.fused_kernels",
        f"cannot be true: {problem}",
        fixes=(run.set_fix("runtime.fused_kernels", "auto"),),
    )


@rule(
    "LOAD004",
    "model.float8_kv_cache",
    example="model:\n  float8_kv_cache: true  # with --gpu t4",
    fix="float8_kv_cache: false",
)
def float8_cache_needs_a_card(run: Run) -> Iterator[RuleViolation]:
    """float8_kv_cache needs compute capability 8.0 or above, and is fast only with 8.9 or above.

    Ampere cards (8.0) store the cache in 8 bits and convert it at every use. Ada (8.9) and Hopper
    cards compute in 8 bits. `envcheck validate` checks the rule only with --gpu.
    """
    if not run.value("model.float8_kv_cache") or run.engine == "transformers":
        return  # Hugging Face generation does not read the key, which KEY008 reports
    problem, speed_problem = (
        capability_problem(run, FLOAT8_CACHE),
        capability_problem(run, FLOAT8_NATIVE),
    )
    if problem or speed_problem:
        yield RuleViolation(
            "model.float8_kv_cache",
            f"an 8-bit cache cannot be used: {problem}"
            if problem
            else f"an 8-bit cache is slow, because it is converted at every use: {speed_problem}",
            fixes=(run.set_fix("model.float8_kv_cache", False),),
            severity=Severity.ERROR if problem else Severity.WARNING,
        )


@rule(
    "LOAD005",
    "model.dtype grpo.bf16",
    example="model:\n  dtype: bfloat16  # with --gpu t4",
    fix="dtype: auto",
)
def bfloat16_needs_a_card(run: Run) -> Iterator[RuleViolation]:
    """bfloat16 needs compute capability 8.0 or above, or a CPU.

    Cards before Ampere support only float16. dtype: auto chooses a format that the card supports.
    `envcheck validate` checks the rule only with --gpu.
    """
    device = run.situation.device
    if device is None or device.compute_capability is None:
        return
    problem = capability_problem(run, BFLOAT16)
    if problem is None:
        return
    for key, value, replacement in (
        ("model.dtype", "bfloat16", "auto"),
        ("grpo.bf16", True, False),
    ):
        if run.value(key) == value:
            yield RuleViolation(
                key, f"bfloat16 cannot be used: {problem}", fixes=(run.set_fix(key, replacement),)
            )
