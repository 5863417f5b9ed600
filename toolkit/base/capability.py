"""What a card supports, by its compute capability.

Rules and the sizer use it for a named card, checks and remedies for an installed card. One table
has the number formats; one has the cards that builds of torch and vLLM support, by CUDA version and
machine.
"""

from __future__ import annotations

FOUR_BIT = (7, 0)  # bitsandbytes' NF4 kernels need Volta or newer
BFLOAT16 = (8, 0)  # Ampere
FLOAT8_CACHE = (8, 0)  # stored in 8 bits and converted at every use ...
FLOAT8_NATIVE = (8, 9)  # ... before Ada, which computes in 8 bits

LOCKED_CUDA = "13.0"
"""The CUDA of the torch and vLLM builds in the lock files."""

X86_64, AARCH64 = "x86_64", "aarch64"

# PyTorch's .ci/manywheel/build_cuda.sh (x86_64) and .ci/aarch64_linux/aarch64_ci_build.sh.
_TORCH: dict[tuple[str, str], str] = {
    (X86_64, "12.6"): "5.0 6.0 7.0 7.5 8.0 8.6 9.0",
    (X86_64, "12.8"): "7.0 7.5 8.0 8.6 9.0 10.0 12.0",
    (X86_64, "12.9"): "7.0 7.5 8.0 8.6 9.0 10.0 12.0",
    (X86_64, "13.0"): "7.5 8.0 8.6 9.0 10.0 12.0",
    (AARCH64, "12.6"): "8.0 9.0",
    (AARCH64, "12.8"): "8.0 9.0 10.0 12.0",
    (AARCH64, "12.9"): "8.0 9.0 10.0 11.0 12.0",
    (AARCH64, "13.0"): "8.0 9.0 10.0 11.0 12.0",
}
VLLM_LEAST = {X86_64: (7, 5), AARCH64: (8, 0)}
"""vLLM's builds for CUDA 13 support Turing and newer; on aarch64 torch's list is the limit."""


def spelled(capability: tuple[int, int]) -> str:
    """``8.9``."""
    return ".".join(map(str, capability))


def torch_list(cuda: str, machine: str) -> tuple[str, ...] | None:
    """The capabilities that torch for this CUDA supports on this machine; None if unknown."""
    known = _TORCH.get((machine, cuda))
    return None if known is None else tuple(known.split())


def build_problem(
    capability: tuple[int, int], *, machine: str, cuda: str = LOCKED_CUDA, vllm: bool = True
) -> str | None:
    """Why the builds of torch (and of vLLM) for this CUDA do not support a card; None if they do or
    if it is unknown.

    Compiled code runs on its own capability and on higher ones with the same major number.
    """
    text = f"compute capability {spelled(capability)}"
    least = VLLM_LEAST.get(machine)
    if vllm and least is not None and capability < least:
        on = f" on {machine}" if machine == AARCH64 else ""
        return f"{text}: vLLM for CUDA {cuda}{on} needs at least {spelled(least)}"
    known = torch_list(cuda, machine)
    if known is None:
        return None
    pairs = [tuple(int(part) for part in one.split(".")) for one in known]
    if any(major == capability[0] and minor <= capability[1] for major, minor in pairs):
        return None
    return f"{text}: torch for CUDA {cuda} on {machine} supports {', '.join(known)}"
