"""Let Triton compile kernels for a GPU without using the GPU.

A second process on the GPU would take memory, which vLLM measures while it starts. Only
``engine.kernel_worker`` uses this module, because it changes Triton, torch and vLLM for the whole
process.
"""

from __future__ import annotations

import os
import sys
import types
from typing import NoReturn

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime import driver

_WARP_SIZE = 32


class CompilingDriver(CudaDriver):  # type: ignore[misc]  # triton ships no types
    """Triton's driver for CUDA, for a GPU with ``capability`` (major, minor). It returns the
    values that a compilation needs. It cannot launch kernels (Triton 3.6).
    """

    def __init__(self, capability: tuple[int, int]) -> None:
        super().__init__()
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda _device: 0
        self.get_device_capability = lambda _device=None: capability

    def get_current_target(self) -> GPUTarget:
        """Return the architecture to compile for."""
        major, minor = self.get_device_capability()  # type: ignore[no-untyped-call]
        return GPUTarget("cuda", 10 * major + minor, _WARP_SIZE)


def prepare(card: str, capability: tuple[int, int]) -> None:
    """Prepare this process to compile for the GPU ``card``, and to import vLLM's modules."""
    # With this variable, torch finds the GPU without starting CUDA.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    torch.cuda._lazy_init = _refuse_to_use_the_gpu
    torch.cuda.get_device_name = lambda device=None: card  # noqa: ARG005 - torch's signature
    driver.set_active(CompilingDriver(capability))
    _skip_changes_of_torch_compile()
    import vllm.utils.torch_utils  # noqa: PLC0415 - after the lines above

    vllm.utils.torch_utils.PIN_MEMORY = False  # pinned memory needs the GPU


def _refuse_to_use_the_gpu() -> NoReturn:
    raise RuntimeError("the process that compiles kernels must not use the GPU")


def _skip_changes_of_torch_compile() -> None:
    """Import vLLM without ``vllm.env_override``, which changes parts of torch.compile. Its import
    takes 8 s (0.25.1), and this process does not use torch.compile.
    """
    name = "vllm.env_override"
    sys.modules[name] = types.ModuleType(name)
