"""Read from torch which device this machine has, and return it as plain values for
``config.resolved``.
"""

from __future__ import annotations

import torch

from toolkit.config.resolved import DeviceFacts, Situation
from toolkit.engine.rollout_engine import vllm_available


def cuda_in_use() -> bool:
    """Return True if torch has a CUDA context in this process. The check does not create one."""
    is_initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # untyped upstream
    return bool(torch.cuda.is_available() and is_initialized)


def detect_machine() -> Situation:
    """Return what ``config.resolved`` needs to know about this machine: the device of this process,
    and whether vLLM is installed.
    """
    device = DeviceFacts("no GPU", None)
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        device = DeviceFacts("GPU", (major, minor))
    return Situation(device=device, vllm=vllm_available())
