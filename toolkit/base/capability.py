"""Which GPUs (cards) the software supports, by the compute capability of the card.

Rules and the sizer use this module for a card that the user names. Checks and remedies use it for
an installed card. Each constant is the lowest compute capability that supports one number format.
Two tables list the compute capabilities that the builds of torch and vLLM support, for each CUDA
version and machine type.
"""

from __future__ import annotations

FOUR_BIT = (7, 0)  # bitsandbytes' NF4 kernels need Volta or newer
BFLOAT16 = (8, 0)  # Ampere and newer
FLOAT8_CACHE = (8, 0)  # cards before Ada only store 8-bit values and convert them at every use
FLOAT8_NATIVE = (8, 9)  # Ada and newer cards compute with 8-bit values

LOCKED_CUDA = "13.0"
"""The CUDA version of the torch and vLLM builds in the lock files."""

X86_64, AARCH64 = "x86_64", "aarch64"

# Source for x86_64: PyTorch's .ci/manywheel/build_cuda.sh. Sources for aarch64:
# https://github.com/pytorch/pytorch/pull/161257 (CUDA 13.0, sm_80 to sm_120 with Thor's sm_110),
# .../pull/163764 (aarch64 begins with 8.0) and .../pull/166044 (one script for both machines).
_TORCH_CAPABILITIES: dict[tuple[str, str], str] = {
    (X86_64, "12.6"): "5.0 6.0 7.0 7.5 8.0 8.6 9.0",
    (X86_64, "12.8"): "7.0 7.5 8.0 8.6 9.0 10.0 12.0",
    (X86_64, "12.9"): "7.0 7.5 8.0 8.6 9.0 10.0 12.0",
    (X86_64, "13.0"): "7.5 8.0 8.6 9.0 10.0 12.0",
    (AARCH64, "12.6"): "8.0 9.0",
    (AARCH64, "12.8"): "8.0 9.0 10.0 12.0",
    (AARCH64, "12.9"): "8.0 9.0 10.0 11.0 12.0",
    (AARCH64, "13.0"): "8.0 9.0 10.0 11.0 12.0",
}

# For the releases of vLLM since 0.20. Source: CUDA_ARCH_X86 and CUDA_ARCH_AARCH64 of its
# .buildkite/release-pipeline.yaml, from https://github.com/vllm-project/vllm/pull/39878 (Thor:
# .../pull/31544). Wheels for other CUDA versions are of older releases, which this table does not
# cover.
_VLLM_CAPABILITIES: dict[tuple[str, str], str] = {
    (X86_64, "12.9"): "7.5 8.0 8.6 8.9 9.0 10.0 12.0",
    (X86_64, "13.0"): "7.5 8.0 8.6 8.9 9.0 10.0 12.0",
    (AARCH64, "12.9"): "8.0 8.7 8.9 9.0 10.0 12.0",
    (AARCH64, "13.0"): "8.0 8.7 8.9 9.0 10.0 11.0 12.0",
}


def format_capability(capability: tuple[int, int]) -> str:
    """A compute capability as text, such as ``8.9``."""
    return ".".join(map(str, capability))


def torch_capabilities(cuda: str, machine: str) -> tuple[str, ...] | None:
    """The compute capabilities that torch supports, if it is built for CUDA ``cuda`` and the
    machine type ``machine`` (such as ``aarch64``); None if unknown.
    """
    return _look_up(_TORCH_CAPABILITIES, cuda, machine)


def vllm_capabilities(cuda: str, machine: str) -> tuple[str, ...] | None:
    """The compute capabilities that vLLM supports, if it is built for CUDA ``cuda`` and the machine
    type ``machine`` (such as ``aarch64``); None if unknown.
    """
    return _look_up(_VLLM_CAPABILITIES, cuda, machine)


def _look_up(table: dict[tuple[str, str], str], cuda: str, machine: str) -> tuple[str, ...] | None:
    capabilities = table.get((machine, cuda))
    return None if capabilities is None else tuple(capabilities.split())


def build_problem(
    capability: tuple[int, int], *, machine: str, cuda: str = LOCKED_CUDA, vllm: bool = True
) -> str | None:
    """Return why a card cannot run torch or vLLM that is built for CUDA ``cuda``. Return None if
    the card can run both, or if that is unknown. vLLM is ignored if ``vllm`` is false.

    Code that is compiled for one compute capability runs on cards with this capability, and on
    cards with a higher capability of the same major number.
    """
    text = f"compute capability {format_capability(capability)}"
    vllm_built_for = vllm_capabilities(cuda, machine) if vllm else None
    if vllm_built_for is not None and capability < min(map(_parse_capability, vllm_built_for)):
        on = f" on {machine}" if machine == AARCH64 else ""
        return f"{text}: vLLM for CUDA {cuda}{on} needs at least {vllm_built_for[0]}"
    for name, supported in (("torch", torch_capabilities(cuda, machine)), ("vLLM", vllm_built_for)):
        if supported is not None and not any(
            _can_run(compiled, capability) for compiled in map(_parse_capability, supported)
        ):
            return f"{text}: {name} for CUDA {cuda} on {machine} supports {', '.join(supported)}"
    return None


def _parse_capability(text: str) -> tuple[int, int]:
    major, minor = text.split(".")
    return int(major), int(minor)


def _can_run(compiled: tuple[int, int], capability: tuple[int, int]) -> bool:
    return compiled[0] == capability[0] and compiled[1] <= capability[1]
