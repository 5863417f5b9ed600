"""Make torch's CUDA allocator use expandable segments.

Ordinary segments cannot grow, so freed pieces that are too small for later requests stay unusable.
On a GPU that is sized with a small reserve, a step can then run out of memory although gigabytes
are free (1.8 and 3.1 GiB were measured for an 8B model with 8 x 4096 tokens). Expandable segments
unmap such pieces instead. vLLM itself switches expandable segments off around the pool of a
sleeping KV cache, if they are set in ``PYTORCH_CUDA_ALLOC_CONF`` (0.25.1; 0.31 queries torch).
"""

from __future__ import annotations

import ctypes
import os

import torch

from toolkit.base.process_environment import VARIABLES, WANTED

VIRTUAL_MEMORY = 102
"""CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED of cuda.h; some virtual GPUs do not
support it.
"""


def use_expandable_segments() -> None:
    """Set the environment variables for expandable segments, and configure an allocator that is
    already in use. Does nothing if a GPU does not support expandable segments.

    If the user has set one of the two variables, its value is kept, and copied to the other
    variable for libraries that read only that one.
    """
    found = next((os.environ[name] for name in VARIABLES if os.environ.get(name)), None)
    if found is None and not _maps_virtual_memory():
        return
    for name in VARIABLES:
        os.environ[name] = os.environ.get(name) or found or WANTED
    # When bitsandbytes is imported it starts CUDA, and torch has then already read the variables.
    if found is None and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # untyped upstream
        torch._C._accelerator_setAllocatorSettings(WANTED)


def _maps_virtual_memory() -> bool:
    """Whether every GPU that CUDA sees supports virtual memory management. The check does not
    create a CUDA context.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count, able = ctypes.c_int(0), ctypes.c_int(0)
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return False
    for ordinal in range(count.value):
        device = ctypes.c_int(0)
        if cuda.cuDeviceGet(ctypes.byref(device), ordinal):
            return False
        failed = cuda.cuDeviceGetAttribute(ctypes.byref(able), VIRTUAL_MEMORY, device)
        if failed or not able.value:
            return False
    return True
